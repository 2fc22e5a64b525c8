"""The safetensors format: tensors read by memory map, and written one after another.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, byte range),
then the bytes, without gaps. Nothing in it is ever executed. What a tensor means is said in `names`.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lmjax.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the format

# Of the format's dtypes, those that hold weights. The others (masks, quantised weights) may stand in a file, but are
# not read.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One line of the header; start and stop count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file, its header checked in full; `read` gives views of the file.

    Raises CheckpointError for a file that is missing, truncated, longer than it says, or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                self._begin = 8 + int.from_bytes(file.read(8), "little")
                if size < 8 or self._begin - 8 > MAX_HEADER or self._begin > size:
                    raise CheckpointError(f"{path}: not a whole safetensors file (its {size} bytes cannot hold the "
                                          f"header of {self._begin - 8} bytes that it announces); fetch it again")
                text = file.read(self._begin - 8)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path and the file") from None
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            self.entries = {name: _entry(fields) for name, fields in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: the header is not that of a safetensors file ({type(error).__name__}: "
                                  f"{str(error)[:100]}); fetch it again") from None
        self._check_ranges(size - self._begin)
        empty = size == self._begin  # which cannot be mapped
        self._bytes = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r", offset=self._begin)

    def _check_ranges(self, there: int) -> None:
        """Tensors follow each other without gaps and end with the file."""
        at = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].start):
            dtype = DTYPES.get(entry.dtype)
            needed = entry.stop - entry.start if dtype is None else math.prod(entry.shape) * dtype.itemsize
            if entry.start != at or entry.stop - entry.start != needed:
                raise CheckpointError(f"{self.path}: {name} claims the bytes from {entry.start} to {entry.stop}, "
                                      f"expected {at} to {at + needed}; the header is damaged, fetch the file again")
            at = entry.stop
        if at != there:
            raise CheckpointError(f"{self.path}: {'truncated' if there < at else 'too long'}: it holds {there} bytes "
                                  f"of tensors where its header says {at}; fetch it again")

    def read(self, name: str) -> np.ndarray:
        """The tensor, read-only, as a view of the file. Raises CheckpointError for a dtype that holds no weights."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} is {entry.dtype}; only {', '.join(DTYPES)} are read, so save "
                                  "the model unquantised")
        return self._bytes[entry.start:entry.stop].view(DTYPES[entry.dtype]).reshape(entry.shape)


def _entry(fields: dict[str, Any]) -> Entry:
    start, stop = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if not all(type(n) is int and n >= 0 for n in (start, stop, *shape)):
        raise ValueError(f"not whole numbers: {fields}")
    return Entry(str(fields["dtype"]), shape, start, stop)


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype,
                  tensors: Iterable[np.ndarray]) -> None:
    """Writes a file of tensors of one dtype. They are drawn from `tensors` one by one, in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for name, shape in shapes.items():
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == shape, f"{name}: {tensor.shape}, announced {shape}"
            file.write(np.ascontiguousarray(tensor, dtype).view(np.uint8).data)
