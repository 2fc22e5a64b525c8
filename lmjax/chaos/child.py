"""A run with one thing broken inside it: what a signal or a damaged file cannot bring about from outside.

    python -m lmjax.chaos.child FAULT WITHOUT train CONFIG.py …

FAULT is a name of FAULTS with its arguments, such as `nan@12` (batch 12), or nothing. WITHOUT is a name of PROTECTIONS
that is taken out, to see that the fault then does harm, or nothing. Both patch this process only; the product holds no
hook for them. The rest is the command itself.
"""

import contextlib
import errno
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path


def _poison(first: int, last: int, factor: float) -> None:
    """The gradients of batches first … last are multiplied by a factor: NaN, or 1e4 for a spike. The batch tells the
    step its factor through its weights: sign and size survive, so the program is the same for every batch."""
    import jax.numpy as jnp

    from lmjax.data import Batches
    from lmjax.objectives import pretrain

    batch_of, loss = Batches.batch, pretrain.loss

    def batch(self, step, rows=None):
        found = batch_of(self, step, rows)
        return found | {"segments": found["segments"] + (1 << 20)} if first <= step <= last else found

    def poisoned(config, model, batch, key):
        hit = jnp.any(batch["segments"] >= 1 << 20)
        clean = batch | {"segments": batch["segments"] % (1 << 20)}
        total, weight, metrics = loss(config, model, clean, key)
        by = jnp.where(hit, jnp.float32(factor), 1)
        return total * by, weight, metrics | {"loss": (metrics["loss"][0] * by, metrics["loss"][1])}

    Batches.batch, pretrain.loss = batch, poisoned


def nan(first: str, last: str = "") -> None:
    _poison(int(first), int(last or first), float("nan"))


def spike(first: str, last: str = "") -> None:
    _poison(int(first), int(last or first), 1e4)


def hang(step: str) -> None:
    """Python sleeps before the given step, as a callback that waits for something would."""
    _before_step(int(step), lambda: time.sleep(10_000))


def freeze(step: str) -> None:
    """The same inside C with the interpreter's lock held: no Python thread runs any more."""
    import ctypes

    _before_step(int(step), lambda: ctypes.PyDLL(None).sleep(10_000))


def _before_step(step: int, act: Callable[[], None]) -> None:
    from lmjax.train.meter import Meter

    flush = Meter.flush

    def broken(self, pending, log, loader):
        if pending is not None and pending[0] == step:
            act()
        return flush(self, pending, log, loader)
    Meter.flush = broken


def stuck_data(step: str) -> None:
    """The loader's thread waits for a read that never comes back."""
    _reading(int(step), lambda: time.sleep(10_000))


def lost_data(step: str) -> None:
    """A read fails, as on a mount that has gone away."""
    def fail():
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "shard")
    _reading(int(step), fail)


def broken_loader(step: str) -> None:
    """A bug in the loader."""
    def fail():
        raise RuntimeError("the loader has a bug")
    _reading(int(step), fail)


def _reading(step: int, act: Callable[[], None]) -> None:
    from lmjax.data import Batches

    batch_of = Batches.batch

    def batch(self, at, rows=None):
        if at == step:
            act()
        return batch_of(self, at, rows)
    Batches.batch = batch


def fsync_fails(first: str, last: str = "") -> None:
    """fsync gives EIO, from its first … to its last call in checkpoints: a disk with bad sectors."""
    _storage("fsync", int(first), int(last or first), errno.EIO)


def rename_fails(first: str, last: str = "") -> None:
    _storage("rename", int(first), int(last or first), errno.EIO)


def read_only(first: str) -> None:
    """From the first call on nothing can be made any more: a file system that was remounted read-only."""
    _storage("mkdir", int(first), 1 << 60, errno.EROFS)


def slow_disk(milliseconds: str) -> None:
    """Every fsync of a checkpoint takes so long."""
    sync = os.fsync

    def slow(handle):
        time.sleep(int(milliseconds) / 1000)
        sync(handle)
    os.fsync = slow


def dead_disk(first: str) -> None:
    """From this fsync on none comes back: a network mount whose server is gone."""
    _storage("fsync", int(first), 1 << 60, 0)


def _storage(call: str, first: int, last: int, code: int) -> None:
    original, count = getattr(os, call), [0]

    def broken(*args, **kwargs):
        if call == "fsync" or "checkpoints" in str(args[0]):
            count[0] += 1
            if first <= count[0] <= last:
                if not code:
                    time.sleep(10_000)
                raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)
    setattr(os, call, broken)


def flipped_weight(step: str) -> None:
    """One bit of one copy of a weight flips in memory before the given step, on the second device alone."""
    import jax
    import numpy as np

    from lmjax.train import loop

    original = loop.rechecked

    def flipped(train_step, state, batch, at, say):
        if at == int(step):
            leaf = state.params["final_norm"]["scale_D"]
            parts = [np.array(shard.data) for shard in leaf.addressable_shards]
            parts[1].view(np.uint32)[3] ^= 1 << 12
            state.params["final_norm"]["scale_D"] = jax.make_array_from_single_device_arrays(
                leaf.shape, leaf.sharding,
                [jax.device_put(p, s.device) for p, s in zip(parts, leaf.addressable_shards, strict=True)])
        return original(train_step, state, batch, at, say)
    loop.rechecked = flipped


def wrong_once(step: str, times: str = "1") -> None:
    """The given step comes out wrong in a weight by 1e-3 so many times, and right after that."""
    from lmjax.train import loop

    original, left = loop.rechecked, [int(times)]

    def wrong(train_step, state, batch, at, say):
        def lying(state, batch):
            after, metrics = train_step(state, batch)
            if at == int(step) and left[0]:
                left[0] -= 1
                scale = after.params["final_norm"]["scale_D"]
                after.params["final_norm"]["scale_D"] = scale.at[3].add(1e-3 * (left[0] + 1))
            return after, metrics
        return original(lying, state, batch, at, say)
    loop.rechecked = wrong


FAULTS = {f.__name__.replace("_", "-"): f for f in (
    nan, spike, hang, freeze, stuck_data, lost_data, broken_loader, fsync_fails, rename_fails, read_only, slow_disk,
    dead_disk, flipped_weight, wrong_once)}


# ---- protections taken out -----------------------------------------------------------------------------


def no_manifest() -> None:
    """Any numbered folder is taken for a checkpoint, and arrays are not held to their fingerprints."""
    from lmjax.checkpoint import manifest, store

    manifest.damage = lambda folder, step, hashes=True: ""
    store._check_fingerprints = lambda *_: None


def no_seal() -> None:
    """Checkpoints are written under their final name, and nothing waits for the disk."""
    from lmjax.checkpoint import store

    seal = store.manifest.seal

    def early(folder, step, arrays, meta):
        there = folder.parent / str(step)
        there.mkdir(exist_ok=True)
        seal(folder, step, arrays, meta)
        there.rmdir()
    store.manifest.seal = early
    no_manifest()


def no_guard() -> None:
    """Every update is made, and every state is saved."""
    import jax.numpy as jnp

    from lmjax import step
    from lmjax.checkpoint import store

    judge, one = step.judge, jnp.float32(1)
    step.judge = lambda sigmas, state, loss, norm: (jnp.bool_(True), judge(0.0, state, one, one)[1])
    store._check_finite = lambda *_: None


def no_watchdog() -> None:
    from lmjax.phases import Phases

    Phases._arm = lambda self, now: None
    Phases._watch = lambda self: None


def no_lease() -> None:
    from lmjax.train import loop

    @contextlib.contextmanager
    def everybody(folder: Path, holds: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.lock").touch()
        yield
    loop.open_folder = everybody


def no_signals() -> None:
    from lmjax.train.stopping import StopSignals

    StopSignals.__enter__ = lambda self: self


def no_patience() -> None:
    """The first failed save ends the run."""
    from lmjax.checkpoint import store

    init = store.Checkpoints.__init__

    def impatient(self, folder, config, *args, **kwargs):
        init(self, folder, config, *args, **kwargs)
        self.config.failures = 0
    store.Checkpoints.__init__ = impatient


def no_recheck() -> None:
    from lmjax.train import loop

    loop.rechecked = lambda train_step, state, batch, at, say: train_step(state, batch)


def no_rewind() -> None:
    """The record keeps what was done after the checkpoint that a run continues from."""
    from lmjax import log

    log.rewind = lambda path, step: None


def no_leave() -> None:
    """A process of several that fails waits for the others, who wait for it."""
    from lmjax import hosts

    hosts.leave = lambda code: None


PROTECTIONS = {f.__name__.removeprefix("no_"): f for f in (
    no_manifest, no_seal, no_guard, no_watchdog, no_lease, no_signals, no_patience, no_recheck, no_rewind, no_leave)}


def main() -> None:
    fault, without, *command = sys.argv[1:]
    if without:  # first, so that a fault may sit on top of what is left
        PROTECTIONS[without]()
    if fault:
        name, _, arguments = fault.partition("@")
        FAULTS[name](*(arguments.split(",") if arguments else ()))
    sys.argv = ["lmjax", *command]
    runpy.run_module("lmjax", run_name="__main__")


if __name__ == "__main__":
    main()
