"""Which targets the goldfish loss may drop, where that takes more than the tokens of a row.

What lives here: the one extra array of a batch, `goldfish`, uint32 [B, T], that gating by source and the mask of
normalised text need; no batch has it otherwise. What does not: the rule that turns it into a mask
(`lmjax.losses.goldfish`), and what a word is (`normal`).

An entry is the hash of a target: it is dropped where this is below 2^32 / k. NEVER marks a target that is always
kept. Where only sources are gated, the others have 0, and the strategy decides.

Text hash: a target is dropped where it lies in a dropped word, and whether a word is dropped is decided by the
`context` words before it, folded (`normal`). So copies of a passage with other line breaks, other case, other
punctuation, or cut into other tokens, lose the same words. Tokens between words (spaces, punctuation) share a hash
of their own with the place between these two words.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from lmjax.data.normal import LONGEST, Units, byte_offsets, units
from lmjax.data.pieces import token_pieces
from lmjax.data.shards import Tokens
from lmjax.data.tokenizers import Tokenizer
from lmjax.hashing import FACTOR, NEVER, fmix32, spread

_BETWEEN = 0x5BD1E995  # any odd constant: the places between words are drawn apart from the words
_AHEAD = 4  # tokens read beyond a row, to complete its last character


@dataclass(frozen=True)
class Protect:
    """sources: which of a mixture's sources are protected. text: mark words (strategy "text_hash"), decided by so many
    words before them."""

    sources: tuple[bool, ...]
    text: bool = False
    context: int = 13
    seed: int = 0


class Marks:
    """The `goldfish` entries of the rows of one source."""

    def __init__(self, protect: Protect, source: int, tokenizer: Tokenizer) -> None:
        self.protected, self.protect = protect.sources[source], protect
        self.pieces = plain_pieces(tokenizer) if protect.text and self.protected else []

    def row(self, tokens: Tokens, start: int, seq_len: int) -> np.ndarray:
        """uint32 [seq_len] for the targets tokens[start + 1 … start + seq_len] of a stream; NEVER past its end."""
        if not self.protected:
            return np.full(seq_len, NEVER, np.uint32)
        if not self.protect.text:
            return np.zeros(seq_len, np.uint32)
        values_T = np.full(seq_len, NEVER, np.uint32)
        # Enough tokens before the row to hold the context of its first word, so that the mask is the document's own.
        low = max(0, start + 1 - lookback(self.protect.context, self.pieces))
        ids_n, document_n = tokens.read(max(0, low - 1), start + 1 + seq_len + _AHEAD)
        first = low - max(0, low - 1)
        borders = np.flatnonzero(np.diff(document_n[first:])) + 1 + first
        for begin, end in zip([first, *borders], [*borders, len(ids_n)], strict=True):
            cut = begin == first and first > 0 and document_n[0] == document_n[begin]
            values_n = token_values([self.pieces[i] for i in ids_n[begin:end]], self.protect.context,
                                    self.protect.seed, begins=not cut)
            at = low + begin - first - (start + 1)  # in the row, of the run's first token
            here = slice(max(at, 0), min(at + end - begin, seq_len))
            if here.stop > here.start:
                values_T[here] = values_n[here.start - at:here.stop - at]
        return values_T


def plain_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token; b"" for specials, which no text holds."""
    sizes_V = tokenizer.token_bytes()
    return [piece if size else b"" for piece, size in zip(token_pieces(tokenizer), sizes_V, strict=True)]


def lookback(context: int, pieces: list[bytes]) -> int:
    """Tokens that hold `context` words in any usual text, and the beginning of one more."""
    return (context + 2) * (32 if max(map(len, pieces)) == 1 else 8)


def token_values(pieces: list[bytes], context: int, seed: int, begins: bool = True) -> np.ndarray:
    """uint32 [tokens] of consecutive tokens of one document: dropped where below 2^32 / k.

    A token takes the lowest value of the words that it holds a part of; one that holds none takes that of the place
    between words. NEVER for tokens without text, and where fewer than `context` whole words come before; `begins` says
    that the first token begins the document, else the first word may be a part of one and does not count.
    """
    sizes_n = np.array([len(piece) for piece in pieces], np.int64)
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    found = units(text)
    keys = np.array([zlib.crc32(word.encode()) for word in found.words], np.uint32)
    words = len(keys)
    mixed = spread(keys, seed)
    total = np.zeros(words + 1, np.uint32)  # of the context of each word, and of what follows the last
    factor = 1
    for j in range(1, min(context, words) + 1):
        factor = factor * FACTOR % 2**32
        total[j:] += mixed[:words + 1 - j] * np.uint32(factor)
    known = np.arange(words + 1) >= context + (0 if begins else _unsure(text, found))
    word_values = np.where(known, fmix32(total ^ np.uint32(seed % 2**32)), np.uint32(NEVER))
    gap_values = np.where(known, fmix32(total ^ np.uint32((seed ^ _BETWEEN) % 2**32)), np.uint32(NEVER))

    # Place, word, place, word, …, place: each one's bytes, then each token's.
    borders = np.empty(2 * words + 2, np.int64)
    borders[0], borders[1:-1:2], borders[2:-1:2], borders[-1] = 0, found.starts, found.ends, len(text)
    lengths = np.diff(byte_offsets(text)[borders])
    values = np.empty(2 * words + 1, np.uint32)
    values[0::2], values[1::2] = gap_values, word_values[:words]
    byte_values = np.repeat(values, lengths)
    in_word = np.repeat(np.arange(2 * words + 1) % 2 == 1, lengths)
    out = np.full(len(pieces), NEVER, np.uint32)
    some = sizes_n > 0
    if not some.any():
        return out
    offsets = (np.cumsum(sizes_n) - sizes_n)[some]
    lowest = np.minimum.reduceat(np.where(in_word, byte_values, np.uint32(NEVER)), offsets)
    holds_word = np.logical_or.reduceat(in_word, offsets)
    out[some] = np.where(holds_word, lowest, byte_values[offsets])
    return out


def _unsure(text: str, found: Units) -> int:
    """How many units at the beginning of a piece of text may be parts of longer ones that began before it."""
    at = next((i for i, c in enumerate(text) if not "\udc80" <= c <= "\udcff"), len(text))  # the rest of a character
    count = 0
    while count < len(found.words) and found.starts[count] == at:
        at, count = found.ends[count], count + 1
        if len(found.words[count - 1]) < LONGEST:
            break
    return count
