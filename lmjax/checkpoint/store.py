"""Saving and restoring: arrays by Orbax in the background, sealed with a manifest, verified before they are used.

A checkpoint is RUN/checkpoints/<step>/: `state`, the arrays as nested plain dictionaries (nothing of Flax or Optax is
needed to read them); `meta.json`, with the resolved config, the versions of the libraries, and the fingerprints of
tokenizer and data; `manifest.json`, written last. It is made under the name saving-<step> and renamed when it is whole,
so a number is a checkpoint. The arrays restore onto any mesh and any number of processes.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lmjax import hosts
from lmjax.checkpoint import manifest
from lmjax.checkpoint.fingerprint import fingerprints
from lmjax.errors import CheckpointError, NonFiniteError
from lmjax.tree import from_dict, named_leaves, to_dict

PACKAGES = ("lmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Config fields that may differ between the run that saved and the run that resumes. Everything else, such
# as the model, the data, the objective, the batch and the seed, must be equal.
FREE = ("name", "run_root", "steps", "optim", "mesh", "compute", "log", "checkpoint", "evals", "limits",
        "guard.sigmas", "guard.in_row", "guard.rewinds", "guard.rewind_steps", "guard.rewind_jump", "guard.recheck",
        "data.cache_dir", "data.workers", "data.verify")


@dataclasses.dataclass
class CheckpointConfig:
    """every: steps between saves (the last step is always saved). keep: newest to keep. keep_every: steps
    whose multiples are kept for good; 0 for none. patience: seconds that training waits for an earlier save before it
    leaves one out. failures: failed saves in a row that a run survives; at the last step it survives none."""

    every: int = 500
    keep: int = 3
    keep_every: int = 0
    patience: float = 60.0
    failures: int = 3

    def problems(self, prefix: str = "checkpoint") -> list[str]:
        bad = []
        for name, low in (("every", 1), ("keep", 1), ("keep_every", 0), ("patience", 0), ("failures", 0)):
            if not getattr(self, name) >= low:
                bad.append(f"{prefix}.{name}={getattr(self, name)}: must be at least {low}")
        if self.keep_every and self.every > 0 and self.keep_every % self.every:
            bad.append(f"{prefix}.keep_every={self.keep_every}: must be a multiple of "
                       f"{prefix}.every={self.every}, or no such step is ever saved")
        return bad


def quiet_storage() -> None:
    """Keeps Orbax's and TensorStore's threads from printing hundreds of lines about a save that fails: the
    error itself reaches `Checkpoints`, which tells it in one. For commands; a library user may want the noise.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # writes that nobody awaits once one has failed
    unraisable, excepthook = sys.unraisablehook, sys.excepthook

    def noise(error) -> bool:  # a write that ends after its event loop was closed because another one failed
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    sys.unraisablehook = lambda u: None if noise(u.exc_value) else unraisable(u)
    sys.excepthook = lambda kind, error, trace: None if noise(error) else excepthook(kind, error, trace)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'model.d_model': 256, …} of a nested JSON value."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    flat: dict[str, Any] = {}
    for key, value in items:
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, (dict, list, tuple)) and value:
            flat |= flatten(value, name)
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(saved: dict, wanted: dict) -> list[str]:
    """What stops the saved run from being continued: one line for each field, with both values.

    Where the corpus itself is the same, how the config names it (a moved file, say) does not matter.
    """
    a, b = flatten(saved), flatten(wanted)
    free = (*FREE, "data") if saved.get("corpus") == wanted.get("corpus") else FREE
    lines = []
    for name in sorted(a.keys() | b.keys()):
        bare = name.removeprefix("config.")
        if name.startswith("versions.") or name == "step":
            continue
        if any(bare == f or bare.startswith(f + ".") for f in free):
            continue
        if a.get(name) != b.get(name):
            lines.append(f"{bare}: the checkpoint has {a.get(name, 'nothing')!r}, "
                         f"this run has {b.get(name, 'nothing')!r}")
    return lines


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for a save in flight.

    Every process of a run calls the same methods in the same order; process 0 alone touches names and manifests.
    Raises CheckpointError for everything that a user can mend: a folder that cannot be written, a disk that is full, a
    checkpoint of another run.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, warn: Callable[[str], None] = print,
                 read_only: bool = False):
        logger = logging.getLogger("absl")
        logger.setLevel(max(logger.level, logging.ERROR))  # Orbax tells every save in ten lines
        self.folder, self.config, self.warn = folder.absolute(), config, warn
        self.failed: list[str] = []  # what went wrong with the newest saves, in a row
        self._saving: _Saving | None = None
        if read_only:
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: no such folder; give a run that has saved a checkpoint")
            return
        if hosts.is_main():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _clear(self.folder)
            except OSError as error:
                raise CheckpointError(f"{folder}: cannot be used for checkpoints ({error.strerror}); "
                                      "check the path and its permissions") from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.wait()
        elif self._saving is not None and not hosts.several():
            self._saving.join()  # with several processes, one that fails must not wait for the others, nor talk to them

    # ---- saving ----------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, meta: dict, last: bool = False) -> None:
        """Starts a save and returns once the arrays are copied. Waits up to `patience` for the save before it; if that
        takes longer, this one is left out, and told, unless it is the last. A save that fails is told, and training
        goes on, until more than `failures` have failed in a row: CheckpointError.

        Raises NonFiniteError, and writes nothing, where an array holds a NaN or an infinity.
        """
        saving = self._saving
        if saving is not None:
            if hosts.any_of(not saving.join(None if last else self.config.patience)):
                if hosts.is_main():
                    self.warn(f"step {step} is not saved: step {saving.step} is still being written after "
                              f"{self.config.patience:g} s more (slow storage?)")
                return
            self._collect()
        tree = to_dict(state)
        marks = fingerprints(tree)
        _check_finite(step, marks)
        arrays = {name: [str(leaf.dtype), list(leaf.shape), marks[name][0]]
                  for name, leaf in named_leaves(tree).items()}
        self._saving = _Saving(self.folder, step, tree, arrays, {"step": step, **meta}, self.config)

    def wait(self) -> None:
        """Returns when the save in flight is complete. Raises CheckpointError if the newest save failed."""
        self._collect()
        if self.failed:
            raise self._failure()

    def _collect(self) -> None:
        """Takes note of how the save in flight ended."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.join()
        problem = next((text for text in hosts.gather_text(saving.problem) if text), "")
        self.failed = [*self.failed, problem] if problem else []
        if not problem:
            return
        if hosts.is_main():
            with contextlib.suppress(OSError):  # the next save makes the folder anew
                shutil.rmtree(saving.folder, ignore_errors=True)
        if len(self.failed) > self.config.failures:
            raise self._failure()
        if hosts.is_main():
            self.warn(f"step {saving.step} could not be saved ({problem}); {self._kept()}; training goes on "
                      f"(failed save {len(self.failed)} of {self.config.failures} that it survives in a row)")

    def _failure(self) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: a checkpoint could not be written ({self.failed[-1]}); {self._kept()}; mend that (free "
            "some space, if it is the disk) and run the same command again")

    def _kept(self) -> str:
        intact = self.steps()
        return f"step {intact[0]} and older ones are intact" if intact else "no earlier one exists"

    # ---- looking ---------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps whose manifest is there and whose files have the right sizes, newest first."""
        return [step for step in manifest.numbered(self.folder)
                if not manifest.damage(self.folder / str(step), step, hashes=False)]

    def meta(self, step: int) -> dict:
        """The JSON saved beside the arrays."""
        path = self.folder / str(step) / manifest.META
        try:
            meta = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: unreadable: {_first_line(error)}") from None
        if not isinstance(meta, dict) or meta.get("step") != step:
            raise CheckpointError(f"{path}: is not what was saved with step {step}")
        return meta

    # ---- restoring -------------------------------------------------------------------------------------

    def restore_latest(self, like: Any, wanted: dict, before: int | None = None,
                       renew: Callable[[dict], dict] = lambda meta: meta) -> tuple[Any, dict] | None:
        """(state, meta) of the newest checkpoint that verifies, placed as `like` says, or None if there is none.

        like: the state as ShapeDtypeStructs with shardings. wanted: this run's meta; a checkpoint that was made by
        another model, tokenizer, data, … is refused with each field and both values. before: only steps up to this
        one. renew: brings a meta that an earlier version saved up to date (fields it did not know). Damaged checkpoints
        that are newer than the one restored are set aside: renamed, never deleted.
        """
        damaged: dict[int, str] = {}
        for step in self._candidates(before):
            why = hosts.from_main(lambda step=step: manifest.damage(self.folder / str(step), step))
            if why:
                damaged[step] = why
                continue
            meta = renew(self.meta(step))
            different = differences(meta, wanted)
            if different:
                raise CheckpointError(
                    f"{self.folder / str(step)}: belongs to another run: " + "; ".join(different)
                    + "; change it back, or give this run another name (--name=…)")
            try:
                state = self.restore(step, like, verified=True)
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            # Only now is it known that the newer ones, and not this machine, are at fault.
            for bad, why in damaged.items():
                self.set_aside(bad, why)
            return state, meta
        if damaged:
            step, why = next(iter(damaged.items()))
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints can be read; the newest, {step}: {why}; mend that, restore "
                "one from a copy, or give this run another name (--name=…) to start again")
        return None

    def _candidates(self, before: int | None) -> list[int]:
        text = hosts.from_main(lambda: " ".join(map(str, manifest.numbered(self.folder))))
        return [step for step in map(int, text.split()) if before is None or step <= before]

    def set_aside(self, step: int, why: str, name: str = "damaged") -> None:
        """Renames a checkpoint, so that its step can be saved again; nothing is ever deleted."""
        if not hosts.is_main():
            return
        names = (self.folder / f"{name}-{step}-{number}" for number in itertools.count())
        aside = next(path for path in names if not path.exists())
        (self.folder / str(step)).rename(aside)
        manifest.sync_folder(self.folder)
        if name == "damaged":
            self.warn(f"{self.folder / str(step)}: damaged ({why}); set aside as {aside.name}, "
                      "going on from an older one")

    def restore(self, step: int, like: Any, verified: bool = False) -> Any:
        """The arrays of one step (or a part of them, such as {'params': …}) placed as `like` says.

        Files are checked against the manifest first, unless the caller has; arrays against their fingerprints after.
        Raises CheckpointError.
        """
        where = self.folder / str(step)
        if not verified and (why := manifest.damage(where, step)):
            raise CheckpointError(f"{where}: damaged ({why}); choose another step, or restore it from a copy")
        saved = manifest.read_manifest(where)["arrays"]
        wanted = to_dict(like)
        _check_arrays(where, saved, named_leaves(wanted))
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(where / "state", args=ocp.args.PyTreeRestore(
                    wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True))
        except Exception as error:  # Orbax raises many kinds for files that it cannot make sense of
            raise _Damaged(f"{where}: {_first_line(error)}") from error
        _check_fingerprints(where, saved, restored)
        return from_dict(like, restored)


class _Damaged(CheckpointError):
    """Files that verify and still do not give back what was saved."""


class _Saving:
    """One save in flight: Orbax's background threads write, then one of ours seals and renames."""

    def __init__(self, folder: Path, step: int, tree: dict, arrays: dict, meta: dict, config: CheckpointConfig):
        self.step, self.folder, self.problem = step, folder / f"saving-{step}", ""
        self._checkpoints, self._config = folder, config
        writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        try:
            if hosts.is_main():
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
            writer.save(self.folder / "state", args=ocp.args.PyTreeSave(tree))
        except Exception as error:
            self.problem = _first_line(error)
        self.thread = threading.Thread(target=self._finish, args=(writer, arrays, meta), name="save", daemon=True)
        if not self.problem:
            self.thread.start()

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the end; whether it has come."""
        if self.thread.ident is not None:
            self.thread.join(seconds)
        return not self.thread.is_alive()

    def _finish(self, writer: ocp.AsyncCheckpointer, arrays: dict, meta: dict) -> None:
        try:
            writer.wait_until_finished()
            if hosts.is_main():
                manifest.seal(self.folder, self.step, arrays, meta)
                self._rename()
        except Exception as error:
            self.problem = _first_line(error)
        with contextlib.suppress(Exception):
            writer.close()

    def _rename(self) -> None:
        """The one moment at which the checkpoint comes to exist; then older ones may go."""
        there = self._checkpoints / str(self.step)
        if there.exists():  # something of this name that was not a checkpoint when the run started
            there.rename(self._checkpoints / f"replaced-{self.step}-{time.time_ns()}")
        self.folder.rename(there)
        manifest.sync_folder(self._checkpoints)
        every = self._config.keep_every
        there = manifest.numbered(self._checkpoints)
        whole = [step for step in there if (self._checkpoints / str(step) / manifest.NAME).exists()]
        for old in whole[self._config.keep:]:
            if every and old % every == 0:
                continue
            going = self._checkpoints / f"deleting-{old}"
            (self._checkpoints / str(old)).rename(going)  # so that half a checkpoint never has a number
            shutil.rmtree(going, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Removes what earlier processes began to write or to delete. The caller holds the run's lease."""
    for path in folder.iterdir():
        if path.name.startswith(("saving-", "deleting-")):
            shutil.rmtree(path, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    """What went wrong, short: the operating system's words where they are in there."""
    text = str(error).strip() or type(error).__name__
    causes = [os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES,
                                             errno.EIO)]
    return next((cause for cause in causes if cause in text), text.splitlines()[0][:200])


def _check_arrays(where: Path, saved: dict[str, list], wanted: dict[str, Any]) -> None:
    """Refuses other shapes and dtypes: Orbax would cast silently."""
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointError(f"{where}: has no array {name}; it was saved by another model or optimizer")
        dtype, shape, _ = saved[name]
        if (dtype, shape) != (str(leaf.dtype), list(leaf.shape)):
            raise CheckpointError(f"{where}: {name} is {dtype}{shape} in the checkpoint and "
                                  f"{leaf.dtype}{list(leaf.shape)} in this run")


def _check_fingerprints(where: Path, saved: dict[str, list], restored: dict) -> None:
    """Holds restored arrays to what they were on the devices that saved them."""
    for name, (mark, _) in fingerprints(restored).items():
        if mark != saved[name][2]:
            raise _Damaged(f"{where}: {name} has fingerprint {mark} and was saved with {saved[name][2]}")


def _check_finite(step: int, marks: dict[str, tuple[str, int]]) -> None:
    bad = [f"{name} ({count:,} elements)" for name, (_, count) in marks.items() if count]
    if bad:
        raise NonFiniteError(f"step {step} is not saved: not finite: {'; '.join(bad[:5])}"
                             + (f" and {len(bad) - 5} more" if len(bad) > 5 else ""))


def save_json(path: Path, value: Any) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    manifest.write_synced(path, (json.dumps(value, indent=2) + "\n").encode())


def abstract(state: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings: what `restore` needs to place arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
