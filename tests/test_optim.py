"""Schedules at their corners, AdamW against a float64 formula, and which weights decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY

from lmjax.models import Decoder, DecoderConfig
from lmjax.optim import OptimConfig, make_optimizer, make_schedule
from lmjax.tree import name_mask, named_leaves


@pytest.mark.parametrize("schedule,at", [
    ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
    ("linear", {0: 0.0, 10: 1.0, 55: 0.55, 100: 0.1}),
    ("wsd", {0: 0.0, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ("constant", {0: 0.0, 10: 1.0, 100: 1.0}),
])
def test_schedules(schedule, at):
    f = make_schedule(OptimConfig(1.0, schedule, warmup_steps=10, decay_fraction=0.2, final_fraction=0.1), 100)
    for step, value in at.items():
        assert float(f(step)) == pytest.approx(value, abs=1e-6), step


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_schedules_of_short_runs_are_finite(schedule):
    for steps, warmup in ((1, 0), (1, 1), (2, 2), (3, 1)):
        f = make_schedule(OptimConfig(1.0, schedule, warmup_steps=warmup), steps)
        assert all(np.isfinite(float(f(s))) for s in range(steps + 1))


def adamw64(params, grads, c, steps, decays):
    """AdamW with global-norm clipping, in float64, as in the papers."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    f = make_schedule(c, steps)
    for t in range(steps):
        norm = np.sqrt(sum((g**2).sum() for g in grads[t].values()))
        for k in params:
            g = grads[t][k] * min(1.0, c.clip_norm / norm)
            m[k] = c.b1 * m[k] + (1 - c.b1) * g
            v[k] = c.b2 * v[k] + (1 - c.b2) * g**2
            step = (m[k] / (1 - c.b1 ** (t + 1))) / (np.sqrt(v[k] / (1 - c.b2 ** (t + 1))) + c.eps)
            params[k] = params[k] - float(f(t)) * (step + c.weight_decay * decays[k] * params[k])
    return params


def test_adamw_equals_float64():
    rng, c, steps = np.random.default_rng(0), OptimConfig(0.1, warmup_steps=2, clip_norm=0.5), 8
    params = {"up_DF": rng.normal(size=(3, 4)), "scale_D": rng.normal(size=4)}
    grads = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(steps)]

    def ours(c):
        tx, _ = make_optimizer(c, steps)
        p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        state = tx.init(p)
        for g in grads:
            updates, state = tx.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g), state, p)
            p = jax.tree.map(jnp.add, p, updates)
        return p

    right = adamw64(dict(params), grads, c, steps, {"up_DF": 1.0, "scale_D": 0.0})
    for name, x in ours(c).items():
        np.testing.assert_allclose(x, right[name], rtol=2e-5, atol=1e-6)
    wrong = ours(OptimConfig(0.1, warmup_steps=2, clip_norm=0.5, decay=("scale", "up")))
    assert np.abs(np.asarray(wrong["scale_D"]) - right["scale_D"]).max() > 1e-3


@pytest.mark.parametrize("config", [TINY, DecoderConfig(vocab_size=64, biases=True, gated=False, norm="layernorm",
                                                        positions="learned", tied=False, d_model=32)])
def test_matrices_decay_and_vectors_do_not(config):
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.split(Decoder(config))[1]))
    mask = named_leaves(name_mask(params, OptimConfig().decay))
    for name, decays in mask.items():
        vector = any(part in name for part in ("scale_", "bias_")) or name.endswith(("_NH", "_KH", "_F", "_D"))
        assert decays == (not vector), name


def test_problems():
    bad = OptimConfig(learning_rate=-1, schedule="cos", b1=1.0, warmup_steps=200, decay=("(",))
    assert len(bad.problems(100)) == 5 and not OptimConfig().problems(100)
