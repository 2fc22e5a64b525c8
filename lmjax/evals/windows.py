"""Documents cut into windows that a model can read, and windows packed into rows of equal length. NumPy only.

What lives here: which token is predicted from where. What is done with the rows: `lmjax.evals.score`.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from lmjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """context: the most tokens that a prediction sees. stride: tokens by which the window slides over a longer text; 0:
    half of context. batch_tokens: about as many are on the devices at a time."""

    context: int = 1024
    stride: int = 0
    batch_tokens: int = 4096

    def __post_init__(self):
        object.__setattr__(self, "stride", self.stride or max(self.context // 2, 1))

    @property
    def least_context(self) -> int:
        """Tokens that every prediction sees, but those near the beginning of a document."""
        return self.context - self.stride + 1

    def check(self, max_seq_len: int) -> None:
        """Raises ConfigError for windows that the model cannot read."""
        bad = []
        if not 1 <= self.context <= max_seq_len:
            bad.append(f"context={self.context}: must be from 1 to the model's max_seq_len={max_seq_len}")
        elif not 1 <= self.stride <= self.context:
            bad.append(f"stride={self.stride}: must be from 1 to context={self.context}, or tokens would be left out")
        if self.batch_tokens < 1:
            bad.append(f"batch_tokens={self.batch_tokens}: must be at least 1")
        if bad:
            raise ConfigError(*bad)


class Window(NamedTuple):
    """ids [n]: the first n - 1 are read and the last n - 1 predicted, of which the first `skip` were predicted before.
    first: the place of the first new one among the document's n - 1 numbers. document: whatever the caller gave."""

    ids: np.ndarray
    skip: int
    first: int
    document: Any


@dataclasses.dataclass
class Row:
    """Windows one after another: (window, where its first input stands)."""

    placed: list[tuple[Window, int]] = dataclasses.field(default_factory=list)
    filled: int = 0

    def add(self, window: Window) -> None:
        self.placed.append((window, self.filled))
        self.filled += len(window.ids) - 1


def cut_windows(ids: np.ndarray, context: int, stride: int, document: Any = None) -> list[Window]:
    """Windows of at most `context` inputs that together predict each of ids[1:] exactly once, in order.

    The first window predicts all it can, each later one its last `stride` or fewer, and is as long as it can be.
    """
    last, end, found = len(ids) - 1, 0, []
    while end < last:
        stop = min(end + (stride if end else context), last)
        start = max(stop - context, 0)
        found.append(Window(ids[start:stop + 1], end - start, end, document))
        end = stop
    return found


def bucket(n: int) -> int:
    """n rounded up so that few widths are ever compiled: multiples of 16, then four sizes an octave."""
    step = max(16, 2 ** ((max(n, 1) - 1).bit_length() - 3))
    return -(-n // step) * step


def pack(windows: list[Window], config: WindowConfig, ways: int = 1, alone: bool = False):
    """Yields (rows, width): batches whose number of rows is `ways` times a power of 2, the widest first.

    Longest first, each window into the first row with room. alone: one window a row.
    """
    windows = sorted(windows, key=lambda window: -len(window.ids))  # stable: equal input, equal rows
    if not windows:
        return
    width = min(bucket(len(windows[0].ids) - 1), config.context)
    rows: list[Row] = []
    room_from = 0  # rows before it are full
    for window in windows:
        size = len(window.ids) - 1
        row = None if alone else next((row for row in rows[room_from:] if width - row.filled >= size), None)
        if row is None:
            row = Row()
            rows.append(row)
        row.add(window)
        while room_from < len(rows) and rows[room_from].filled == width:
            room_from += 1
    most = max(1, config.batch_tokens // (width * ways))
    most = ways * 2 ** (most.bit_length() - 1)
    at = 0
    while at < len(rows):
        size = ways
        while size < min(most, len(rows) - at):
            size *= 2
        part = rows[at:at + size]
        at += len(part)
        yield part + [Row() for _ in range(size - len(part))], width


def stack(rows: list[Row], width: int) -> dict[str, np.ndarray]:
    """{tokens, targets, segments, positions}: int32 [rows, width]; segments are 0 in the padding."""
    batch = {name: np.zeros((len(rows), width), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    for index, row in enumerate(rows):
        for number, (window, at) in enumerate(row.placed, 1):
            n = len(window.ids) - 1
            part = slice(at, at + n)
            batch["tokens"][index, part], batch["targets"][index, part] = window.ids[:-1], window.ids[1:]
            batch["segments"][index, part], batch["positions"][index, part] = number, np.arange(n)
    return batch
