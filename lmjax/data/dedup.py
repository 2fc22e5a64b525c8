"""Copies within a corpus: equal documents, nearly equal ones, and equal stretches of text.

What lives here: three rules, each with its own guarantee, and always the first copy kept. What does not: the command
(`corpora`), the folding (`normal`).

exact       documents with the same folded words (`normal`).
near        documents whose sets of n consecutive folded words have a Jaccard similarity of at least a threshold.
            Candidates by MinHash and LSH (the library datasketch), each then compared exactly: no false positives; some
            pairs near the threshold are missed. Clusters are what such pairs connect.
substring   stretches of at least so many bytes that stand in the text before, by a suffix array (the library
            pydivsufsort; the method of arXiv 2107.06499): exact, all found.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmjax.data.ngrams import window_hashes
from lmjax.data.normal import units
from lmjax.data.sources import SourceConfig, documents
from lmjax.errors import DataError

PERMUTATIONS = 128
Tell = Callable[[str], None]


@dataclass
class Copy:
    """A document that is left out: its number and name, what it is a copy of (a number), the rule, and the similarity
    to that one (1 for exact ones; 0 where only others of the cluster connect them)."""

    number: int
    name: str
    of: int
    rule: str
    similarity: float


@dataclass
class Found:
    """names: of all documents. copies: those left out. spans: characters to cut from kept ones, by number."""

    names: list[str] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def left_out(self) -> set[int]:
        return {copy.number for copy in self.copies}


def library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise DataError(f"this needs the package {name!r}; run: pip install 'lmjax[dedup]'") from None


def dedup(source: SourceConfig, *, near: float = 0.0, n: int = 5, substring: int = 0, seed: int = 1,
          tell: Tell = lambda line: None) -> Found:
    """All copies. near: the least similarity, 0 for none; n: words of a shingle. substring: the least bytes, or 0.

    Memory: near, the distinct shingles of every document, 8 bytes each, and 1 KB a document; substring, about 70 bytes
    for each byte of text. Deterministic. DataError: a missing library, a source that cannot be read.
    """
    found = Found()
    if near:
        library("datasketch")
    if substring:
        library("pydivsufsort")
    seen: dict[bytes, int] = {}
    shingles: dict[int, np.ndarray] = {}
    for number, document in enumerate(documents(source)):
        found.names.append(document.name)
        words = units(document.text).words
        key = hashlib.blake2b("\0".join(words).encode() or document.text.encode("utf-8", "surrogatepass"),
                              digest_size=16, person=b"words" if words else b"text").digest()
        first = seen.setdefault(key, number)
        if first != number:
            found.copies.append(Copy(number, document.name, first, "exact", 1.0))
        elif near:
            shingles[number] = shingle_set(words, n)
        if (number + 1) % 1000 == 0:
            tell(f"  {number + 1:,} documents, {len(found.copies):,} exact copies")
    if near:
        copies = near_copies(shingles, near, found.names, seed, tell)
        roots = {copy.number: copy.of for copy in copies}
        for copy in found.copies:  # the document that it equals may be a near copy itself
            copy.of = roots.get(copy.of, copy.of)
        found.copies += copies
    if substring:
        found.spans = repeated_spans(source, found.left_out, substring, tell)
    found.copies.sort(key=lambda copy: copy.number)
    return found


# ---- Near copies ---------------------------------------------------------------------------------------


def shingle_set(words: list[str], n: int) -> np.ndarray:
    """The distinct hashes of n consecutive words, sorted uint64; of fewer words, of all of them together."""
    ids = np.array([zlib.crc32(word.encode()) for word in words], np.uint32).view(np.int32)
    return np.unique(window_hashes(ids, min(n, max(len(ids), 1))))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted arrays of distinct values."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


def near_copies(shingles: dict[int, np.ndarray], threshold: float, names: list[str], seed: int, tell: Tell
                ) -> list[Copy]:
    """Copies of at least this similarity among documents given by their shingles."""
    sketch = library("datasketch")
    # Missing a pair costs more than comparing one in vain, since every candidate is compared.
    lsh = sketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.2, 0.8))
    parent = {number: number for number in shingles}

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    best: dict[int, float] = {}
    permutations = None
    for done, (number, mine) in enumerate(shingles.items(), 1):
        if not len(mine):
            continue
        sketched = sketch.MinHash(PERMUTATIONS, seed=seed, hashfunc=int, permutations=permutations,
                                  scheme="affine32")
        permutations = sketched.permutations
        sketched.update_batch((mine & np.uint64(0xFFFFFFFF)).tolist())
        for other in sorted(lsh.query(sketched)):
            similarity = jaccard(mine, shingles[other])
            if similarity >= threshold:
                a, b = sorted((root(number), root(other)))
                parent[b] = a  # the first of a cluster is its root
                best[number] = max(best.get(number, 0.0), similarity)
        lsh.insert(number, sketched)
        if done % 1000 == 0:
            tell(f"  {done:,} documents compared, {len(best):,} near copies")
    return [Copy(number, names[number], root(number), "near", jaccard(shingles[number], shingles[root(number)]))
            for number in shingles if root(number) != number]


# ---- Equal stretches -----------------------------------------------------------------------------------


def repeated_spans(source: SourceConfig, left_out: set[int], least: int, tell: Tell
                   ) -> dict[int, list[tuple[int, int]]]:
    """Of each kept document, the characters that lie in a window of `least` bytes that stands earlier in the corpus."""
    numbers, texts = [], []
    for number, document in enumerate(documents(source)):
        if number not in left_out:
            numbers.append(number)
            texts.append(document.text.encode("utf-8", "surrogatepass"))
    data = b"\xff".join(texts)  # a byte that UTF-8 never has
    tell(f"  suffix array of {len(data):,} bytes")
    mask = repeated(np.frombuffer(data, np.uint8), least)
    spans, at = {}, 0
    for number, text in zip(numbers, texts, strict=True):
        if found := list(_characters(text, mask[at:at + len(text)])):
            spans[number] = found
        at += len(text) + 1
    return spans


def repeated(data_n: np.ndarray, least: int) -> np.ndarray:
    """bool [n]: bytes in a window of `least` bytes, without 0xff, that has an equal one that begins earlier."""
    if len(data_n) < least:
        return np.zeros(len(data_n), bool)
    order_n = np.asarray(library("pydivsufsort").divsufsort(data_n.copy()), np.int64)
    count = len(data_n) - least + 1
    borders = np.concatenate([[0], np.cumsum(data_n == 0xFF)])
    inside = borders[least:] == borders[:count]  # windows within one document
    order_n = order_n[order_n < count]
    order_n = order_n[inside[order_n]]
    # Equal windows are neighbours in the order of suffixes.
    same = np.ones(max(len(order_n) - 1, 0), bool)
    for j in range(least):
        rest = np.flatnonzero(same)
        if not len(rest):
            break
        same[rest] = data_n[order_n[rest] + j] == data_n[order_n[rest + 1] + j]
    group = np.concatenate([[0], np.cumsum(~same)])[:len(order_n)]
    first = np.full(group[-1] + 1 if len(group) else 0, len(data_n), np.int64)
    np.minimum.at(first, group, order_n)
    again = order_n[order_n != first[group]] if len(group) else order_n
    change = np.zeros(len(data_n) + 1, np.int64)
    np.add.at(change, again, 1)
    np.add.at(change, again + least, -1)
    return np.cumsum(change)[:-1] > 0


def _characters(text: bytes, mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of a mask of bytes as spans of whole characters."""
    begins = (np.frombuffer(text, np.uint8) & 0xC0) != 0x80
    of_byte = np.cumsum(begins) - 1  # the character of each byte
    characters = int(begins.sum())
    whole = np.bincount(of_byte[~mask], minlength=characters) == 0 if characters else np.empty(0, bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], whole.astype(np.int8), [0]])))
    yield from zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True)
