"""Reading the tokens of a prepared folder.

What lives here: random access to a split's tokens across shard borders, and the checks that a folder is
whole. What does not: making shards (`prepare`), hashing them at a start (`verify`) and cutting them into rows
(`rows`).

Files are read, not mapped: where a mapped file shrinks or its disk vanishes, the next access ends the process with
SIGBUS and no word. A read that fails is a DataError that names the file.
"""

import itertools
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np

from lmjax.data.manifest import Manifest, damage, load_manifest
from lmjax.errors import DataError

Kept = TypeVar("Kept")

_OPEN_SHARDS = 64  # of each split; a process often has 1,024 file handles, and a large corpus more shards
_KEPT_OFFSETS = 64 << 20  # bytes of offsets in memory, of each split


class Tokens:
    """The token stream of one split: documents one after another, each as bos, tokens, eos.

    `len` is the number of tokens; `documents` and `bytes` (UTF-8, of the text) are totals of the split.
    Opening looks at file sizes only, `lmjax.data.verify` hashes them at the start of a run, `verify` reads
    everything. Reading is safe from several threads.

    DataError: not a prepared folder, no such split, a missing or truncated shard.
    """

    def __init__(self, folder: str | Path, split: str = "train", manifest: Manifest | None = None) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = load_manifest(folder) if manifest is None else manifest
        if split not in self.manifest.splits:
            raise DataError(f"{folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}")
        self.shards = self.manifest.splits[split].shards
        self.documents = self.manifest.splits[split].documents
        self.bytes = self.manifest.splits[split].bytes
        self.vocab_size = int(self.manifest.tokenizer["vocab_size"])
        for shard in self.shards:
            if problem := damage(self.folder, shard, hashes=False):
                raise DataError(f"{problem}; run `lmjax data prepare` again, it makes only this shard anew")
        # Where each shard begins, in tokens and in documents.
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in self.shards)]
        self._first_documents = [0, *itertools.accumulate(shard.documents for shard in self.shards)]
        self._files: _Recent[_Array] = _Recent(_OPEN_SHARDS)
        self._offsets: _Recent[np.ndarray] = _Recent(_KEPT_OFFSETS)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of the stream, n = stop - start, clipped to its end as slices are.

        Returns (tokens int32 [n], document int64 [n]), where document is the running number of each token's
        document within the split. DataError: a token id outside the vocabulary, with file and position; a file that
        became shorter or cannot be read any more.
        """
        if start < 0:
            raise IndexError(f"start = {start} is negative")
        tokens: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        stop = min(stop, len(self))
        while start < stop:
            index = bisect_right(self._starts, start) - 1
            base = self._starts[index]
            end = min(stop, self._starts[index + 1])
            ids = self._file(index).read(start - base, end - base)
            tokens.append(self._checked(ids, index, start - base))
            numbers.append(_documents(self._offsets_of(index), start - base, end - base)
                           + self._first_documents[index])
            start = end
        if len(tokens) == 1:
            return tokens[0], numbers[0]
        return (np.concatenate([np.empty(0, np.int32), *tokens]),
                np.concatenate([np.empty(0, np.int64), *numbers]))

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document with its bos and eos, int32 [tokens]."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        index = bisect_right(self._first_documents, number) - 1
        local = number - self._first_documents[index]
        begin, end = (int(offset) + self._starts[index] for offset in self._offsets_of(index)[local:local + 2])
        return self.read(begin, end)[0]

    def verify(self, hashes: bool = False) -> None:
        """Reads every token and offset and checks them. DataError: the first thing wrong, with its file.

        With `hashes` also compares each file with the sha256 in the manifest.
        """
        for index, shard in enumerate(self.shards):
            if problem := damage(self.folder, shard, hashes):
                raise DataError(f"{problem}; run `lmjax data prepare` again, it makes only this shard anew")
            self._offsets_of(index)
            step = 1 << 20
            for begin in range(0, shard.tokens, step):
                self._checked(self._file(index).read(begin, min(begin + step, shard.tokens)), index, begin)

    def _checked(self, ids: np.ndarray, index: int, start: int) -> np.ndarray:
        ids_n = ids.astype(np.int64 if ids.dtype.itemsize > 2 else np.int32)
        if ids_n.size and ids_n.max() >= self.vocab_size:  # stored unsigned, so never negative
            at = int(np.argmax(ids_n >= self.vocab_size))
            raise DataError(f"{self.folder / self.shards[index].file}: token {start + at} is id "
                            f"{ids_n[at]}, but the vocabulary has {self.vocab_size}; prepare the corpus "
                            "again with its own tokenizer")
        return ids_n.astype(np.int32, copy=False)

    def _file(self, index: int) -> "_Array":
        def opened() -> _Array:
            shard = self.shards[index]
            return _Array(self.folder / shard.file, shard.tokens, np.dtype(self.manifest.dtype))

        return self._files.get(index, opened)

    def _offsets_of(self, index: int) -> np.ndarray:
        """Where each document of a shard begins, and its end, int64 [documents + 1]."""
        def loaded() -> np.ndarray:
            shard = self.shards[index]
            path = self.folder / shard.offsets_file
            offsets = _Array(path, shard.documents + 1, np.dtype(np.int64)).read()
            if offsets[0] != 0 or offsets[-1] != shard.tokens or not (np.diff(offsets) > 0).all():
                raise DataError(f"{path}: offsets do not run from 0 to {shard.tokens} tokens; run `lmjax data "
                                "prepare` again")
            return offsets

        return self._offsets.get(index, loaded, lambda offsets: offsets.nbytes)


class _Recent(Generic[Kept]):
    """The values that were used last, up to a limit of their sizes together; the last one always stays."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._values: OrderedDict[int, tuple[Kept, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: int, make: Callable[[], Kept], size_of: Callable[[Kept], int] = lambda _: 1) -> Kept:
        """The value of a key, made where it is not there. Other threads go on while it is made."""
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                return found[0]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value, size_of(value)
                self._size += size_of(value)
                while self._size > self._limit and len(self._values) > 1:
                    self._size -= self._values.popitem(last=False)[1][1]
        return value


class _Array:
    """A one-dimensional .npy file of `length` values, open for reading from any place by any thread.

    The file is closed with the last reference, so a shard that is put out of memory while another thread reads it
    stays open until that read is done. DataError: not such a file, another length or dtype, or a failed read.
    """

    __slots__ = ("path", "length", "dtype", "_handle", "_begin")

    def __init__(self, path: Path, length: int, dtype: np.dtype[Any]) -> None:
        self.path, self.length, self.dtype, self._handle = path, length, dtype, -1
        try:
            with path.open("rb", buffering=0) as file:
                major = np.lib.format.read_magic(file)
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, found = read_header[major](file)
                self._begin = file.tell()
                self._handle = os.dup(file.fileno())
        except Exception as error:  # NumPy's parser of headers ends damage in many kinds of errors
            raise DataError(f"{path}: cannot be read as .npy ({' '.join(str(error).split())[:200]}); run "
                            "`lmjax data prepare` again") from None
        if shape != (length,) or found != dtype:
            raise DataError(f"{path}: holds {found} {shape}, the manifest says {dtype} {(length,)}; run "
                            "`lmjax data prepare` again")

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values [start, stop), read-only. DataError: the file has become shorter, or its disk fails."""
        stop = self.length if stop is None else stop
        size = self.dtype.itemsize
        wanted, at = (stop - start) * size, self._begin + start * size
        try:
            data = _pread(self._handle, wanted, at)
            while len(data) < wanted:  # a signal or a network file system may cut a read short
                more = _pread(self._handle, wanted - len(data), at + len(data))
                if not more:
                    raise DataError(f"{self.path}: ends at byte {at + len(data)}, in the middle of its tokens; it was "
                                    "whole when the run began, so something wrote to it: bring it back, or run `lmjax "
                                    "data prepare` again")
                data += more
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read any more ({error.strerror}); look at the disk or mount it "
                            "lies on, then give the same command again") from None
        return np.frombuffer(data, self.dtype)


def _seek_and_read(handle: int, size: int, at: int) -> bytes:
    """os.pread for systems that have none."""
    with _SEEKING:
        os.lseek(handle, at, os.SEEK_SET)
        return os.read(handle, size)


_SEEKING = Lock()
_pread = getattr(os, "pread", _seek_and_read)


def _documents(offsets: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Document number within the shard of each token in [start, stop), int64 [stop - start]; stop > start."""
    first = int(offsets.searchsorted(start, "right")) - 1
    last = int(offsets.searchsorted(stop - 1, "right")) - 1
    if first == last:
        return np.full(stop - start, first, np.int64)
    borders = offsets[first:last + 2].copy()
    borders[0], borders[-1] = start, stop
    return np.arange(first, last + 1).repeat(borders[1:] - borders[:-1])
