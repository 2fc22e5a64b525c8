"""What a run does about bad numbers beyond skipping an update: go back and jump, look for the cause, check a device.

Skipping itself is decided on the device (`lmjax.guard`).
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.checkpoint import save_json
from lmjax.checkpoint.fingerprint import fingerprints, unequal_copies
from lmjax.errors import CheckpointError, CorruptionError
from lmjax.step import gradient_sums
from lmjax.tree import named_leaves


class GoBack(Exception):
    """Too many updates in a row were skipped, and the run may go back."""


class Lineage:
    """RUN/lineage.json: where a run jumped over batches. batch(step) is the index of the batch that a step takes:
    the step, plus every jump made at or before it. Written before the first step after a jump, so that a run which is
    killed and continued takes the same batches."""

    def __init__(self, folder: Path):
        self.path = folder / "lineage.json"
        self.jumps: list[list[int]] = []  # [step, batches]
        try:
            self.jumps = [[int(step), int(batches)] for step, batches in json.loads(self.path.read_text())["jumps"]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}); it says which batches this run jumped over; "
                                  "restore it from a copy") from None

    def batch(self, step: int) -> int:
        return step + sum(batches for at, batches in self.jumps if at <= step)

    def ranges(self, steps: int) -> list[tuple[int, int]]:
        """The batches that so many steps take, as [from, to) each."""
        bounds = sorted({0, steps, *(at for at, _ in self.jumps if at < steps)})
        return [(self.batch(a), self.batch(b - 1) + 1) for a, b in itertools.pairwise(bounds)]

    def jump(self, step: int, batches: int, writes: bool) -> None:
        self.jumps.append([step, batches])
        if writes:
            save_json(self.path, {"jumps": self.jumps})


def cause(loss: Callable, graphdef, params: Any, batch: dict, seed: int, step: int, shardings: Any) -> str:
    """Which arrays are not finite in the step that was just skipped: its weights, its loss, its gradients.

    The weights are still what they were before that step, so running it again shows the same. Costs a compile.
    """
    bad = _not_finite(params)
    if bad:
        return f"weights that are not finite: {bad}"
    key = jax.random.fold_in(jax.random.key(seed), step)
    run = jax.jit(lambda p, b: gradient_sums(loss, graphdef, p, b, key), out_shardings=(shardings, None, None))
    grads, _, metrics = run(params, batch)
    total, weight = (float(x) for x in jax.device_get(metrics["loss"]))
    value = total / max(weight, 1e-8)
    bad = _not_finite(grads)
    told = f"its loss is {value:.4g}"
    return f"{told}; gradients that are not finite, nearest to the loss first: {bad}" if bad else (
        f"{told}, and every gradient is finite")


def _not_finite(tree: Any) -> str:
    """'blocks/attention/q_DNH (layers 3, 4 of 8), …' in the order of a backward pass; "" for none."""
    found = []
    for name, leaf in reversed(list(named_leaves(tree).items())):
        stacked = name.startswith("blocks/") and leaf.ndim > 1
        axes = tuple(range(1 if stacked else 0, leaf.ndim))
        bad = np.atleast_1d(jax.device_get(jnp.any(~jnp.isfinite(leaf), axis=axes)))
        if bad.any():
            layers = ", ".join(str(i) for i in np.flatnonzero(bad)[::-1][:6])
            found.append(f"{name} (layers {layers} of {len(bad)})" if stacked else name)
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return "; ".join(found[:6]) + more


def rechecked(train_step: Callable, state: Any, batch: dict, step: int,
              say: Callable[[str], None]) -> tuple[Any, Any]:
    """(state, metrics) of a step that is run twice, from copies, and must give the same bits.

    If it does not, a third run decides: two that agree are kept and the odd one is told (a transient fault); raises
    CorruptionError where all differ, or where copies of one array on several devices do.
    """
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    if odd := unequal_copies(state):
        raise CorruptionError(f"step {step}: copies of an array differ between devices: {'; '.join(odd[:5])}; take "
                              "that device out, and run the same command again")
    before = copy(state)
    one, _ = train_step(state, batch)
    mark = fingerprints(one)
    del one
    kept = copy(before)
    two, metrics = train_step(before, batch)
    again = fingerprints(two)
    if again == mark:
        return two, metrics
    names = [name for name in mark if mark[name] != again[name]]
    del two
    three, metrics = train_step(kept, batch)
    last = fingerprints(three)
    if last not in (mark, again):
        raise CorruptionError(f"step {step}: run three times, it gave three results ({', '.join(names[:3])} first "
                              "differ); a device computes wrongly, or XLA_FLAGS=--xla_gpu_deterministic_ops=true is "
                              "missing (compute.deterministic=true sets it)")
    if last == again:
        say(f"step {step}: run again, it gave other bits in {len(names)} arrays ({', '.join(names[:3])} …) and a third "
            "run agreed with the second: a transient fault of a device; the result of the agreeing runs is kept")
    else:
        say(f"step {step}: run again, it gave other bits in {len(names)} arrays ({', '.join(names[:3])} …) and a third "
            "run agreed with the first: a transient fault of a device; the result of the agreeing runs is kept")
    return three, metrics
