"""Reading the tokens of a prepared folder.

What lives here: random access to a split's tokens across shard borders, and the checks that a folder is
whole. What does not: making shards (`prepare`) and cutting them into rows (`rows`).
"""

import itertools
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np

from lmjax.data.manifest import Manifest, Shard, damage, load_manifest
from lmjax.errors import DataError

_OPEN_SHARDS = 64  # each open map holds two file handles, and a large corpus has more shards than handles


class Tokens:
    """The token stream of one split: documents one after another, each as bos, tokens, eos.

    `len` is the number of tokens; `documents` and `bytes` (UTF-8, of the text) are totals of the split.
    Opening looks at file sizes only; `verify` reads everything. Reading is safe from several threads.

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
        self._open: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of the stream, n = stop - start, clipped to its end as slices are.

        Returns (tokens int32 [n], document int64 [n]), where document is the running number of each token's
        document within the split. DataError: a token id outside the vocabulary, with file and position.
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
            shard_tokens, offsets = self._shard(index)
            tokens.append(self._checked(shard_tokens[start - base:end - base], index, start - base))
            numbers.append(_documents(offsets, start - base, end - base) + self._first_documents[index])
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
        begin, end = (int(offset) + self._starts[index] for offset in self._shard(index)[1][local:local + 2])
        return self.read(begin, end)[0]

    def verify(self, hashes: bool = False) -> None:
        """Reads every token and offset and checks them. DataError: the first thing wrong, with its file.

        With `hashes` also compares each file with the sha256 in the manifest.
        """
        for index, shard in enumerate(self.shards):
            if problem := damage(self.folder, shard, hashes):
                raise DataError(f"{problem}; run `lmjax data prepare` again, it makes only this shard anew")
            tokens, offsets = self._shard(index)
            whole = offsets[0] == 0 and offsets[-1] == shard.tokens and (np.diff(offsets) > 0).all()
            if not whole:
                raise DataError(f"{self.folder / shard.offsets_file}: offsets do not run from 0 to "
                                f"{shard.tokens} tokens; run `lmjax data prepare` again")
            step = 1 << 20
            for begin in range(0, shard.tokens, step):
                self._checked(tokens[begin:begin + step], index, begin)

    def _checked(self, ids: np.ndarray, index: int, start: int) -> np.ndarray:
        ids_n = ids.astype(np.int64 if ids.dtype.itemsize > 2 else np.int32)
        if ids_n.size and ids_n.max() >= self.vocab_size:  # stored unsigned, so never negative
            at = int(np.argmax(ids_n >= self.vocab_size))
            raise DataError(f"{self.folder / self.shards[index].file}: token {start + at} is id "
                            f"{ids_n[at]}, but the vocabulary has {self.vocab_size}; prepare the corpus "
                            "again with its own tokenizer")
        return ids_n.astype(np.int32, copy=False)

    def _shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if index in self._open:
                self._open.move_to_end(index)
            else:
                self._open[index] = self._map(self.shards[index])
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            return self._open[index]

    def _map(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        arrays = []
        for name, shape, dtype in ((shard.file, (shard.tokens,), np.dtype(self.manifest.dtype)),
                                   (shard.offsets_file, (shard.documents + 1,), np.dtype(np.int64))):
            path = self.folder / name
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path}: cannot be read as .npy ({' '.join(str(error).split())}); run "
                                "`lmjax data prepare` again") from None
            if array.shape != shape or array.dtype != dtype:
                raise DataError(f"{path}: holds {array.dtype} {array.shape}, the manifest says {dtype} "
                                f"{shape}; run `lmjax data prepare` again")
            # A plain view: np.memmap's own indexing costs more than reading a row.
            arrays.append(array.view(np.ndarray))
        return arrays[0], arrays[1]


def _documents(offsets: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Document number within the shard of each token in [start, stop), int64 [stop - start]; stop > start."""
    first = int(np.searchsorted(offsets, start, side="right")) - 1
    last = int(np.searchsorted(offsets, stop - 1, side="right")) - 1
    borders = np.clip(offsets[first:last + 2], start, stop)
    return np.repeat(np.arange(first, last + 1, dtype=np.int64), np.diff(borders))
