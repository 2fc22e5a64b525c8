"""Checkpoints with Orbax: asynchronous saves, and restores that refuse what does not belong.

A checkpoint is RUN/checkpoints/<step>/ with two items: `state`, the arrays as nested plain dictionaries
(nothing of Flax or Optax is needed to read it), and `meta`, JSON with the resolved config, the versions of
the libraries, and the fingerprints of tokenizer and data. The arrays restore onto any mesh.
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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lmjax.errors import CheckpointError
from lmjax.tree import from_dict, named_leaves, to_dict

FORMAT = 1
PACKAGES = ("lmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Config fields that may differ between the run that saved and the run that resumes. Everything else, such
# as the model, the data, the objective, the batch and the seed, must be equal.
FREE = ("name", "run_root", "steps", "optim", "mesh", "compute", "log", "checkpoint", "evals",
        "data.cache_dir", "data.workers")


@dataclasses.dataclass
class CheckpointConfig:
    """every: steps between saves (the last step is always saved). keep: newest to keep. keep_every: steps
    whose multiples are kept for good; 0 for none."""

    every: int = 500
    keep: int = 3
    keep_every: int = 0

    def problems(self, prefix: str = "checkpoint") -> list[str]:
        bad = []
        for name, low in (("every", 1), ("keep", 1), ("keep_every", 0)):
            if getattr(self, name) < low:
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

    Raises CheckpointError for everything that a user can mend: a folder that cannot be written, a disk
    that is full, a checkpoint of another run.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, warn: Callable[[str], None] = print,
                 read_only: bool = False):
        logger = logging.getLogger("absl")
        logger.setLevel(max(logger.level, logging.ERROR))  # Orbax tells every save in ten lines
        self.folder, self.warn = folder, warn
        if read_only and not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give a run that has saved a checkpoint")
        try:
            self.manager = ocp.CheckpointManager(
                folder.absolute(),
                item_handlers={"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=config.keep, keep_period=config.keep_every or None, create=not read_only,
                    cleanup_tmp_directories=not read_only, read_only=read_only,
                    enable_async_checkpointing=True))
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be used for checkpoints ({error.strerror}); "
                                  "check the path and its permissions") from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self.manager.close()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts a save and returns once the arrays are copied; waits for the save before it."""
        with self._writing(step):
            self.manager.save(step, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(to_dict(state)),
                meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta})))

    def wait(self) -> None:
        """Returns when the save in flight is complete."""
        with self._writing():
            self.manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps that look complete, newest first: both items are there. Stray folders are passed over."""
        return [step for step in sorted(self.manager.all_steps(), reverse=True)
                if all((self.folder / str(step) / item).is_dir() for item in ("state", "meta"))]

    def meta(self, step: int) -> dict:
        """The JSON saved beside the arrays."""
        try:
            return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"unreadable meta: {_first_line(error)}") from None

    def set_aside(self, step: int, why: str) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again; nothing is ever deleted."""
        names = (self.folder / f"damaged-{step}-{number}" for number in itertools.count())
        aside = next(name for name in names if not name.exists())
        (self.folder / str(step)).rename(aside)
        self.manager.reload()
        self.warn(f"{self.folder / str(step)}: damaged ({why}); set aside as {aside.name}, going on from an older one")

    def restore_latest(self, like: Any, wanted: dict) -> tuple[Any, dict] | None:
        """(state, meta) of the newest readable checkpoint placed as `like` says, or None if there is none.

        like: the state as ShapeDtypeStructs with shardings. wanted: this run's meta; a checkpoint that was
        made by another model, tokenizer, data, … is refused with each field and both values.
        """
        damaged = {}
        complete = self.steps()
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                if step not in complete:
                    raise CheckpointError("it is not complete")
                meta = self.meta(step)
            except CheckpointError as error:
                damaged[step] = str(error)
                continue
            different = differences(meta, {"format": FORMAT, **wanted})
            if different:
                raise CheckpointError(
                    f"{self.folder / str(step)}: belongs to another run: " + "; ".join(different)
                    + "; change it back, or give this run another name (--name=…)")
            try:
                state = self.restore(step, like)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax raises many kinds for damaged files
                damaged[step] = _first_line(error)
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

    def restore(self, step: int, like: Any) -> Any:
        """The arrays of one step (or a part of them, such as {'params': …}) placed as `like` says."""
        wanted = to_dict(like)
        saved = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named_leaves(
            self.manager.item_metadata(step).state or {}).items() if hasattr(leaf, "shape")}
        part = named_leaves(wanted)
        if saved:
            _check_arrays(self.folder / str(step), saved, part)
        return from_dict(like, self.manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True))).state)

    @contextlib.contextmanager
    def _writing(self, step: int | None = None):
        """Turns what Orbax raises while it writes into one line that says what is left intact."""
        try:
            yield
        except Exception as error:
            intact = [s for s in self.steps() if s != step]
            kept = f"step {intact[0]} and older ones are intact" if intact else "no earlier one exists"
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({_first_line(error)}); {kept}; mend that (free "
                "some space, if it is the disk) and run the same command again") from error


def _first_line(error: BaseException) -> str:
    """What went wrong, short: the operating system's words where they are in there."""
    text = str(error).strip() or type(error).__name__
    causes = [os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES,
                                             errno.EIO)]
    return next((cause for cause in causes if cause in text), text.splitlines()[0][:200])


def _check_arrays(where: Path, saved: dict[str, tuple], wanted: dict[str, Any]) -> None:
    """Refuses other shapes and dtypes: Orbax would cast silently."""
    for name, leaf in wanted.items():
        shape_dtype = (tuple(leaf.shape), str(leaf.dtype))
        if name not in saved:
            raise CheckpointError(f"{where}: has no array {name}; it was saved by another model or optimizer")
        if saved[name] != shape_dtype:
            raise CheckpointError(
                f"{where}: {name} is {saved[name][1]}{list(saved[name][0])} in the checkpoint and "
                f"{shape_dtype[1]}{list(shape_dtype[0])} in this run")


def save_json(path: Path, value: Any) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def abstract(state: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings: what `restore` needs to place arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
