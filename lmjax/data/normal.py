"""Text as near-duplicates share it: words without case, accents, layout or punctuation, and where each one lies.

What lives here: the one normaliser that goldfish masks (`protect`), `overlap` and `dedup` all use. What does not: any
decision about documents.

A character is folded by itself: compatibility decomposition (Unicode NFKD), case folding, and no marks and no
invisible characters. So every normal form of a text (NFC, NFD, NFKC, NFKD) gives the same words, and each folded
character knows the character it came from. A unit is a run of letters and digits, cut after 24; in scripts that put
no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character is a unit.
"""

import re
import unicodedata
from typing import NamedTuple

import numpy as np

LONGEST = 24  # characters of a unit: an address or a blob of base64 is several
# Folding has no opinion about these blocks; they are where words are not set apart by spaces.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"(?:[{_SPACELESS}]|(?:(?![{_SPACELESS}_])\w){{1,{LONGEST}}})")
_ASCII_UNIT = re.compile(rf"[^\W_]{{1,{LONGEST}}}", re.ASCII)
_INVISIBLE = ("Mn", "Me", "Cf")  # marks, and soft hyphens, joiners, byte-order marks, …


class Units(NamedTuple):
    """The units of a text: folded words, and where each begins and ends in it (int64, in characters). A mark or an
    invisible character after a letter belongs to it."""

    words: list[str]
    starts: np.ndarray
    ends: np.ndarray


class _Fold(dict):
    """Code point -> what is left of it, for str.translate; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold())
        self[code] = kept = "".join(c for c in folded if unicodedata.category(c) not in _INVISIBLE)
        return kept


_FOLD = _Fold()


def fold(text: str) -> tuple[str, np.ndarray | None]:
    """(the folded text, the place in `text` that each of its characters came from, one more for the end). The places
    are None where they are 0, 1, 2, …."""
    if text.isascii():
        return text.lower(), None
    folded = text.translate(_FOLD)
    uneven = [ord(c) for c in set(text) if len(_FOLD[ord(c)]) != 1]
    if not uneven:
        return folded, None
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths_C = np.ones(len(codes_C), np.int64)
    for code in uneven:
        lengths_C[codes_C == code] = len(_FOLD[code])
    return folded, np.append(np.repeat(np.arange(len(codes_C)), lengths_C), len(codes_C))


def units(text: str) -> Units:
    """The units of a text, in order."""
    folded, places = fold(text)
    found = list((_ASCII_UNIT if folded.isascii() else _UNIT).finditer(folded))
    spans = np.array([match.span() for match in found], np.int64).reshape(-1, 2)
    if places is not None:
        spans = places[spans]
        # Two units may have come from one character (a ligature): neither is empty, and they do not overlap.
        spans[:, 1] = np.maximum(spans[:, 1], spans[:, 0])
    return Units([match.group() for match in found], spans[:, 0], spans[:, 1])


def letters(text: str) -> Units:
    """Every folded letter and digit as a unit of its own, for n-grams of characters."""
    folded, places = fold(text)
    starts = np.array([i for i, c in enumerate(folded) if c.isalnum()], np.int64)
    ends = starts + 1
    words = [folded[i] for i in starts.tolist()]
    if places is not None:
        starts, ends = places[starts], np.maximum(places[ends], places[starts])
    return Units(words, starts, ends)


def byte_offsets(text: str) -> np.ndarray:
    """Where each character begins in UTF-8, int64 [characters + 1]; an escaped byte counts one."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
    return np.concatenate([[0], np.cumsum(sizes)])
