"""n-grams that two corpora share: which parts of A also stand in B, exactly.

What lives here: streaming A past an index of B, and what is reported, removed or cut. What does not: the index
(`ngrams`), the units (`normal`), and the command (`corpora`). The usual use is decontamination: A is what a model will
be trained on, B what it will be tested on.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lmjax.data.ngrams import UNIT_BYTES, Index, covered
from lmjax.data.normal import Units, byte_offsets, letters, units
from lmjax.data.pieces import token_pieces
from lmjax.data.sources import SourceConfig, documents
from lmjax.data.tokenizers import Tokenizer
from lmjax.errors import DataError

UNITS = ("words", "characters", "tokens")
Cut = Callable[[str], Units]


@dataclass
class Hit:
    """A document that shares n-grams with the other corpus: its place in its own, its units, how many of them lie in a
    shared n-gram, and the shared stretches of text, in characters."""

    number: int
    name: str
    units: int
    shared: int
    spans: list[tuple[int, int]]

    @property
    def share(self) -> float:
        return self.shared / self.units


@dataclass
class Side:
    """One corpus: documents, units, documents too short for one n-gram, and those that share some."""

    documents: int = 0
    units: int = 0
    short: int = 0
    hits: list[Hit] = field(default_factory=list)

    def summary(self) -> dict:
        shared = sum(hit.shared for hit in self.hits)
        return {"documents": self.documents, "units": self.units, "too_short": self.short,
                "documents_with_overlap": len(self.hits), "units_shared": shared,
                "share": shared / max(self.units, 1)}


def cutter(unit: str, normalise: bool = True, tokenizer: Tokenizer | None = None) -> Cut:
    """What cuts a text into units: folded words or characters (`normal`), or as they are; or tokens.

    Without normalise, words are what white space parts, and every character counts. DataError, when it cuts: a
    tokenizer whose tokens are not pieces of the text.
    """
    if unit == "words":
        return units if normalise else _plain_words
    if unit == "characters":
        return letters if normalise else _plain_characters
    assert unit == "tokens" and tokenizer is not None, unit
    pieces = token_pieces(tokenizer)

    def tokens(text: str) -> Units:
        ids = tokenizer.encode(text).tolist()
        data = text.encode()
        if b"".join(pieces[i] for i in ids) != data:
            raise DataError(f"tokenizer {tokenizer.name}: its tokens are not pieces of the text (it changes case or "
                            "spaces), so what they share cannot be placed; use --unit words")
        ends = np.cumsum([len(pieces[i]) for i in ids], dtype=np.int64)
        offsets = byte_offsets(text)
        # A token may end inside a character: the character belongs to both.
        starts = np.searchsorted(offsets, np.concatenate([[0], ends[:-1]]), "right") - 1
        return Units(ids, starts, np.searchsorted(offsets, ends))

    return tokens


def _plain_words(text: str) -> Units:
    found = list(re.finditer(r"\S+", text))
    spans = np.array([match.span() for match in found], np.int64).reshape(-1, 2)
    return Units([match.group() for match in found], spans[:, 0], spans[:, 1])


def _plain_characters(text: str) -> Units:
    return Units(list(text), np.arange(len(text)), np.arange(1, len(text) + 1))


def overlap(a: SourceConfig, b: SourceConfig, cut: Cut, n: int, memory: int = 1 << 30,
            tell: Callable[[str], None] = lambda line: None) -> tuple[Side, Side]:
    """(A, B): what they share, of both. Exact: a hit is a run of n equal units, and no such run is missed.

    B is indexed, in parts of at most `memory` bytes (`ngrams.UNIT_BYTES` a unit, its distinct units on top); A is read
    once for each part, one document at a time. `tell` gets lines of progress.
    """
    side_a, side_b = Side(), Side()
    found_a: dict[int, np.ndarray] = {}
    for part, (index, owners) in enumerate(_indexes(b, cut, n, max(memory // UNIT_BYTES, 1), side_b), 1):
        tell(f"index {part}: {index.size:,} units of B, {len(index.first):,} different {n}-grams")
        hit_grams = np.zeros(len(index.first) + 1, bool)  # one more, for -1
        side_a.documents = side_a.units = side_a.short = 0
        for number, document in enumerate(documents(a)):
            found = cut(document.text)
            _count(side_a, found, n)
            grams = index.find(found.words)
            starts = np.flatnonzero(grams >= 0)
            if len(starts):
                hit_grams[grams[starts]] = True
                mask = covered(starts, n, len(found.words))
                found_a[number] = mask | found_a[number] if number in found_a else mask
            if (number + 1) % 1000 == 0:
                tell(f"  {number + 1:,} documents of A, {len(found_a):,} overlap")
        _hits_of_b(side_b, index, owners, hit_grams, n)
    side_a.hits = _placed(a, cut, found_a)
    side_b.hits = _placed(b, cut, {hit.number: hit.spans for hit in side_b.hits})
    return side_a, side_b


def _count(side: Side, found: Units, n: int) -> None:
    side.documents += 1
    side.units += len(found.words)
    side.short += len(found.words) < n


def _indexes(b: SourceConfig, cut: Cut, n: int, most: int, side: Side) -> Iterator[tuple[Index, list]]:
    """Indexes of whole documents of B, of about `most` units, and (document, its first place, its units) of each."""
    index, owners = Index(n), []
    for number, document in enumerate(documents(b)):
        found = cut(document.text)
        _count(side, found, n)
        owners.append((number, index.size, len(found.words)))
        index.add(found.words)
        if index.size >= most:
            index.build()
            yield index, owners
            index, owners = Index(n), []
    if owners:
        index.build()
        yield index, owners


def _hits_of_b(side: Side, index: Index, owners: list, hit_grams: np.ndarray, n: int) -> None:
    """Adds the documents of B that were hit; their spans are masks until `_placed`."""
    hit = hit_grams[index.gram]
    for number, first, count in owners:
        starts = np.flatnonzero(hit[first:first + count])
        if len(starts):
            side.hits.append(Hit(number, "", count, 0, covered(starts, n, count)))


def _placed(source: SourceConfig, cut: Cut, masks: dict[int, np.ndarray]) -> list[Hit]:
    """Hits with names and spans, which takes reading the corpus once more, up to the last of them."""
    hits, last = [], max(masks, default=-1)
    if not masks:
        return hits
    for number, document in enumerate(documents(source)):
        if number in masks:
            found, mask = cut(document.text), masks[number]
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
            spans = [(int(found.starts[i]), int(found.ends[j - 1]))
                     for i, j in zip(edges[0::2], edges[1::2], strict=True)]
            hits.append(Hit(number, document.name, len(mask), int(mask.sum()), spans))
        if number == last:
            break
    return hits


def without(text: str, spans: list[tuple[int, int]]) -> str:
    """A text without these stretches."""
    kept, at = [], 0
    for start, end in spans:
        kept.append(text[at:start])
        at = max(at, end)
    return "".join([*kept, text[at:]])


@contextmanager
def jsonl(path: Path) -> Iterator[Callable[[str, str], None]]:
    """Writes {"text", "name"} lines to a file that appears when all are written. DataError where it cannot be."""
    beside = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            yield lambda text, name: print(json.dumps({"text": text, "name": name}, ensure_ascii=False), file=file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); make room or choose another file") from None
    finally:
        beside.unlink(missing_ok=True)


def write_rest(source: SourceConfig, hits: list[Hit], out: Path, threshold: float, cut_out: bool) -> tuple[int, int]:
    """(documents, characters) written: A without its hits of at least this share, or without their shared stretches."""
    at = {hit.number: hit for hit in hits if hit.share >= threshold}
    count = size = 0
    with jsonl(out) as write:
        for number, document in enumerate(documents(source)):
            if number in at and not cut_out:
                continue
            text = without(document.text, at[number].spans) if number in at else document.text
            if text.strip():
                write(text, document.name)
                count, size = count + 1, size + len(text)
    return count, size
