"""step -> sharded global batch, made ahead of time by one background thread.

Each host reads only the rows that its devices hold. The thread is stateless: it asks a pure function of
the step, so there is nothing to save and nothing to rewind.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from lmjax.axes import batch_sharding
from lmjax.errors import DataError

Rows = Callable[[int, slice], dict[str, np.ndarray]]  # (step, rows of the global batch) -> [rows, T] arrays


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The contiguous rows of the global batch that the devices of this process hold."""
    slices = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    bounds = [s[0].indices(batch_size)[:2] for s in slices]
    return slice(min(b[0] for b in bounds), max(b[1] for b in bounds))


def to_global(local: dict[str, np.ndarray], rows: slice, mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """This host's rows as part of global arrays [B, T, …]."""
    def place(x: np.ndarray) -> jax.Array:
        shape = (batch_size, *x.shape[1:])
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[(slice(start - rows.start, stop - rows.start), *index[1:])]
        return jax.make_array_from_callback(shape, batch_sharding(mesh, x.ndim, *x.shape[1:2]), shard)
    return {name: place(x) for name, x in local.items()}


class Loader:
    """Iterates over (step, batch) for steps start … stop - 1, `ahead` batches in advance.

    waited: seconds that the consumer has spent waiting for data so far. An error of the background thread
    is raised at the step it belongs to. Use as a context manager, or call close().
    """

    def __init__(self, rows_of: Rows, mesh: Mesh, batch_size: int, start: int, stop: int, ahead: int = 2):
        self.waited = 0.0
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(rows_of, mesh, batch_size, start, stop), daemon=True, name="loader")
        self._thread.start()

    def _fill(self, rows_of: Rows, mesh: Mesh, batch_size: int, start: int, stop: int) -> None:
        item: tuple | Exception
        try:
            rows = local_rows(mesh, batch_size)
            for step in range(start, stop):
                try:
                    local = rows_of(step, rows)
                except OSError as error:  # a disk or a mount that went away
                    raise DataError(f"step {step}: its batch could not be read ({error.filename or 'data'}: "
                                    f"{error.strerror or error}); mend that, and run the same command again") from error
                item = (step, to_global(local, rows, mesh, batch_size))
                if not self._put(item):
                    return
            self._put(None)
        except Exception as error:  # handed to the consumer, which raises it
            self._put(error)

    def _put(self, item) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        while True:
            began = time.perf_counter()
            item = self._queue.get()
            self.waited += time.perf_counter() - began
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5.0)  # a read that hangs must not keep the process; the thread is a daemon

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()
