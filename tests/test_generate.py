"""Sampling: greedy equals stepwise argmax, filters equal brute force, seeds repeat, padding does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY

from lmjax.decode.generate import SampleConfig, filter_logits, generate
from lmjax.models import Decoder


@pytest.fixture(scope="module")
def model():
    # An untrained tied model mostly repeats its input; a larger embedding makes it less sure of anything.
    model = Decoder(TINY, seed=3)
    return model, nnx.split(model)[0], nnx.to_pure_dict(nnx.split(model)[1])


def run(model, prompts, seed=0, eos_id=63, vocab_size=64, **config):
    _, graphdef, params = model
    return generate(graphdef, params, [np.asarray(p) for p in prompts], SampleConfig(**config),
                    key=jax.random.key(seed),                    vocab_size=vocab_size, eos_id=eos_id)


def test_greedy_equals_argmax_of_the_whole_row(model):
    prompt = [5, 9, 2]
    out = run(model, [prompt], max_new_tokens=12, temperature=0.0)[0]
    row = np.zeros((1, 16), np.int32)  # what comes after a position does not reach it
    row[0, :3 + len(out)] = [*prompt, *out]
    best = np.asarray(jnp.argmax(jax.jit(lambda m, t: m(t))(model[0], jnp.asarray(row))[0], -1))
    np.testing.assert_array_equal(out, best[2:2 + len(out)])
    assert len(out) == 12 or best[2 + len(out)] == 63


def test_prompts_of_unequal_length_do_not_disturb_each_other(model):
    prompts = [[5, 9, 2, 7, 7, 1], [4]]
    together = run(model, prompts, max_new_tokens=10, temperature=0.0)
    for prompt, out in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(out, run(model, [prompt], max_new_tokens=10, temperature=0.0)[0])


def test_seed_and_row_decide_the_sample(model):
    args = {"max_new_tokens": 20, "temperature": 1.0}
    a, b = run(model, [[5], [6]], seed=1, **args), run(model, [[5], [40, 41, 42]], seed=1, **args)
    np.testing.assert_array_equal(a[0], b[0])
    assert any(not np.array_equal(a[0], run(model, [[5]], seed=s, **args)[0]) for s in (2, 3))


def test_stops_at_the_end_and_never_leaves_the_vocabulary(model):
    out = run(model, [[5]] * 8, max_new_tokens=40, temperature=5.0, top_p=1.0, vocab_size=10, eos_id=3)
    assert all((row < 10).all() and 3 not in row for row in out)
    assert any(len(row) < 40 for row in out)


def brute_force(logits, temperature, top_k, top_p):
    """The kept tokens of one row, by sorting."""
    z = logits.astype(np.float64) / temperature
    order = np.argsort(-z)
    if top_k:
        order = order[:top_k]
    p = np.exp(z[order] - z[order].max())
    p /= p.sum()
    kept, mass = [], 0.0
    for token, q in zip(order, p, strict=True):
        if mass >= top_p:
            break
        kept.append(token)
        mass += q
    return set(kept)


@pytest.mark.parametrize("temperature,top_k,top_p", [(1.0, 0, 0.9), (0.5, 7, 1.0), (2.0, 20, 0.5), (1.0, 0, 0.01)])
def test_filters_equal_brute_force(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32) * 2
    config = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    out = np.asarray(filter_logits(jnp.asarray(logits), config))
    for row, z in zip(out, logits, strict=True):
        assert set(np.flatnonzero(np.isfinite(row))) == brute_force(z, temperature, top_k, top_p)


def test_sampled_frequencies():
    """Chi-square of 20,000 draws against the softmax of the filtered logits."""
    from lmjax.decode.generate import _sample

    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 12)), jnp.float32)
    config = SampleConfig(temperature=0.7, top_k=8, top_p=1.0)
    n = 20_000
    draws = np.asarray(_sample(jnp.repeat(logits, n, 0), jax.random.split(jax.random.key(0), n), config))
    counts = np.bincount(draws, minlength=12)
    p = np.asarray(jax.nn.softmax(filter_logits(logits, config)[0]), np.float64)
    kept = p > 0
    assert counts[~kept].sum() == 0

    def chi2(p):
        return ((counts[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum()
    assert chi2(p) < 24.3  # 99.9 % of chi-square with 7 degrees of freedom
    wrong = np.asarray(jax.nn.softmax(jnp.where(kept, logits[0], -jnp.inf)), np.float64)  # temperature lost
    assert chi2(wrong) > 24.3


def test_problems():
    assert len(SampleConfig(0, -1.0, -1, 0.0).problems()) == 4 and not SampleConfig().problems()
