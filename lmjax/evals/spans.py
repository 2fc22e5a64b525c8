"""Which characters of a text each token stands for. NumPy only; nothing is asked of a model.

Byte-level tokens may split a character, so a piece of text is not always the decoding of one token: here a character
belongs to the token that completes it, and a token that completes none has an empty piece.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmjax.data import Tokenizer

REACH = 16  # tokens: no character is made of more


class Spans(NamedTuple):
    """pieces: the text of each token; joined they are the text. starts: index of each piece's first character.
    sizes: UTF-8 bytes of each token. exact: whether the pieces join to the very text that was given."""

    pieces: list[str]
    starts: np.ndarray
    sizes: np.ndarray
    exact: bool

    def first(self, n: int) -> "Spans":
        """Of the first n tokens."""
        return Spans(self.pieces[:n], self.starts[:n], self.sizes[:n], self.exact)


def token_spans(tokenizer: Tokenizer, ids: Sequence[int], text: str, token_bytes: np.ndarray | None = None) -> Spans:
    """Aligns the tokens of a text, specials aside, with its characters. token_bytes: `tokenizer.token_bytes()`, where
    many texts share it.

    Where the tokens' bytes are the text's bytes (bytes and byte-level BPE) the alignment is exact. Elsewhere
    (normalisers, SentencePiece) the pieces are what the tokens decode to, one after another.
    """
    ids = np.asarray(ids, np.int64)
    sizes = (tokenizer.token_bytes() if token_bytes is None else token_bytes)[ids].astype(np.int64)
    data = text.encode("utf-8")
    if int(sizes.sum()) == len(data):
        ends = np.cumsum(sizes)
        # A character is there once its last byte is: count the characters that end at or before each byte.
        leads = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
        whole = np.concatenate([[0], np.cumsum(leads)])  # characters begun within the first b bytes
        inside = np.concatenate([leads, [True]])[ends] if len(ids) else np.zeros(0, bool)
        counts = whole[ends] - ~inside  # a character that goes on after the token is not whole yet
        starts = np.concatenate([[0], counts[:-1]]).astype(np.int64) if len(ids) else counts
        pieces = [text[a:b] for a, b in zip(starts, counts, strict=True)]
        if _same(tokenizer, ids, text):
            return Spans(pieces, starts, sizes, True)
    pieces = _decoded(tokenizer, ids)
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])[:len(ids)].astype(np.int64)
    return Spans(pieces, starts, sizes, "".join(pieces) == text)


def _same(tokenizer: Tokenizer, ids: np.ndarray, text: str) -> bool:
    """Whether the tokens decode to the text: equal sums of bytes could be a coincidence."""
    return tokenizer.decode(ids) == text


def _decoded(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """What each token adds to the decoding of those before it, looking back to the last whole character."""
    pieces, anchor, before = [], 0, ""
    for i in range(len(ids)):
        now = tokenizer.decode(ids[anchor:i + 1])
        last = i + 1 == len(ids)
        if now.endswith("\ufffd") and i - anchor < REACH and not last:
            pieces.append("")  # perhaps the first bytes of a character
            continue
        pieces.append(now[len(before):])
        # One token stays in front, since some decoders drop the space at the very beginning.
        anchor, before = i, tokenizer.decode(ids[i:i + 1])
    return pieces
