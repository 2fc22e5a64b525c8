"""Bad numbers: what is skipped against a NumPy version, and what a skip does to a real train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, packed_batch, run_steps

from lmjax.axes import MeshConfig
from lmjax.guard import GuardConfig, fresh_guard, judge
from lmjax.objectives import pretrain
from lmjax.tree import named_leaves

SERIES = np.concatenate([np.random.default_rng(0).normal(3, 0.1, 60), [np.nan, 30.0, np.inf], [30.0] * 30,
                         np.random.default_rng(1).normal(3, 0.1, 20)]).astype(np.float32)


def by_hand(series, sigmas, window):
    """Which values are good, one after another, in float64."""
    seen, good = [], []
    for x in series.astype(float):
        recent = np.array(seen[-window:])
        spike = bool(sigmas) and len(seen) >= window // 2 and x > recent.mean() + sigmas * recent.std()
        good.append(bool(np.isfinite(x)) and not spike)
        if good[-1]:
            seen.append(x)
    return good


@pytest.mark.parametrize("sigmas", [0.0, 6.0])
def test_judge_equals_numpy_and_a_nan_blinds_nothing(sigmas):
    state, good = fresh_guard(GuardConfig(sigmas=sigmas, window=16)), []
    step = jax.jit(lambda s, x: judge(sigmas, s, x, jnp.float32(1)))
    for x in SERIES:
        ok, state = step(state, x)
        good.append(bool(ok))
    assert good == by_hand(SERIES, sigmas, 16)
    assert int(state.skipped) == good.count(False) and int(state.in_row) == 0
    if sigmas:
        assert good[60:93] == [False] * 33 and good[-1], "neither NaNs nor thirty spikes blind it"


def test_a_skipped_step_changes_nothing_but_the_count(monkeypatch):
    """A batch whose loss is not finite in step 1 of 3: weights and moments are those after step 0 and 2 alone."""
    original = pretrain.loss

    def poisoned(config, model, batch, key):
        total, weight, metrics = original(config, model, batch, key)
        wrong = jnp.where(batch["tokens"][0, 0] == -0, jnp.float32(1), 1)  # keeps the program the same
        bad = jnp.where(jnp.sum(batch["weights"]) < 0, jnp.nan, wrong)
        return total * bad, weight, {**metrics, "loss": (metrics["loss"][0] * bad, metrics["loss"][1])}

    def batch_of(step):
        batch = packed_batch(step)
        return batch | {"weights": -batch["weights"]} if step == 1 else batch
    monkeypatch.setattr(pretrain, "loss", poisoned)
    _, state, history = run_steps(MeshConfig(1, 1, 1), 1, steps=3, batch_of=batch_of)
    assert [h["skipped"] for h in history] == [0, 1, 1] and [h["skipped_in_row"] for h in history] == [0, 1, 0]
    assert not np.isfinite(history[1]["loss"])
    assert all(np.isfinite(x).all() for x in named_leaves(jax.device_get(state.params)).values())
    assert int(state.step) == 3
    counts = {name: int(x) for name, x in named_leaves(state.opt_state).items() if name.endswith("count")}
    assert sorted(counts.values()) == [2, 3], "Adam's bias correction counts updates, the schedule counts steps"

    _, after_one, _ = run_steps(MeshConfig(1, 1, 1), 1, steps=1, batch_of=batch_of)
    _, after_two, _ = run_steps(MeshConfig(1, 1, 1), 1, steps=2, batch_of=batch_of)
    one, two = (named_leaves(jax.device_get(s.params)) for s in (after_one, after_two))
    assert TINY.num_layers and all(np.array_equal(one[name], two[name]) for name in one)


def test_problems():
    assert not GuardConfig().problems()
    assert len(GuardConfig(sigmas=0.5, window=2, in_row=0, rewinds=-1, rewind_jump=0).problems()) == 5
