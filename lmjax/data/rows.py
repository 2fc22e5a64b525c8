"""Cutting a token stream into rows of equal length, with segment ids.

What lives here: concat-and-chunk as a pure function of (stream, row number). What does not: order, shuffling
and batches (`mixture`).

Legend: B rows of a batch, T tokens of a row.
"""

import numpy as np

from lmjax.data.protect import Marks
from lmjax.data.shards import Tokens
from lmjax.errors import DataError


class Rows:
    """Random access to the rows of a split: row i reads the stream at [i * T, i * T + T + 1).

    Every token of the stream is the target of exactly one row, except the very first and, without
    `keep_tail`, the fewer than T targets left at the end. `keep_tail` pads them into one more row, so that
    over all rows the weights sum to tokens - documents. A split shorter than one row is always padded.

    `marks` adds the field `goldfish` (`protect`). DataError: seq_len < 1, or a split without tokens.
    """

    def __init__(self, tokens: Tokens, seq_len: int, keep_tail: bool = False, marks: Marks | None = None) -> None:
        if seq_len < 1:
            raise DataError(f"seq_len = {seq_len}: must be at least 1")
        if len(tokens) < 2:
            raise DataError(f"{tokens.folder}: split {tokens.split!r} has no tokens; prepare it with another "
                            "validation_fraction")
        self.tokens, self.seq_len, self.marks = tokens, seq_len, marks
        targets = len(tokens) - 1
        self._length = -(-targets // seq_len) if keep_tail else max(1, targets // seq_len)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index` in [0, len), see `cut`."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        start = index * self.seq_len
        row = cut(*self.tokens.read(start, start + self.seq_len + 1), self.seq_len)
        return row | {"goldfish": self.marks.row(self.tokens, start, self.seq_len)} if self.marks else row


def cut(tokens_n: np.ndarray, document_n: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """One row [T] from 2 <= n <= T + 1 consecutive tokens and the document each belongs to.

    tokens     int32    input ids; 0 in the padding
    targets    int32    the next id
    segments   int32    1, 2, … for the documents within the row; 0 in the padding
    positions  int32    counted from 0 where the document, or the row, begins
    weights    float32  1 where input and target are of the same document, else 0: bos is never predicted
    """
    n, pad = len(tokens_n) - 1, seq_len + 1 - len(tokens_n)
    starts_n = np.diff(document_n[:n], prepend=document_n[:1]) != 0
    index_n = np.arange(n, dtype=np.int32)
    row = {
        "tokens": tokens_n[:n],
        "targets": tokens_n[1:],
        "segments": np.cumsum(starts_n, dtype=np.int32) + np.int32(1),
        "positions": index_n - np.maximum.accumulate(np.where(starts_n, index_n, 0)).astype(np.int32),
        "weights": (document_n[:n] == document_n[1:]).astype(np.float32),
    }
    return {name: np.pad(value, (0, pad)) for name, value in row.items()} if pad else row


def padding(seq_len: int) -> dict[str, np.ndarray]:
    """A row [T] of nothing but padding, to fill up a last batch."""
    empty = np.zeros(seq_len, np.int32)
    return {"tokens": empty, "targets": empty, "segments": empty, "positions": empty,
            "weights": np.zeros(seq_len, np.float32)}
