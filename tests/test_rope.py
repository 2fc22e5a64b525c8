"""Context extension against golden values of the papers' formulas, and the properties each kind promises."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, random_model

from lmjax.models import RopeScaling
from lmjax.nn.rope import apply_rope, rope_frequencies, rope_magnitude, rotation, yarn_range

# (head width, theta, original length, factor) -> low, high, magnitude: from the formulas of arXiv 2309.00071.
YARN = [((128, 1e4, 2048, 16.0), (16, 41, 1.27726)), ((64, 1e4, 2048, 4.0), (8, 21, 1.13863)),
        ((128, 5e5, 8192, 8.0), (18, 35, 1.20794)), ((128, 1e4, 4096, 16.0), (20, 46, 1.27726))]
NTK = [((128, 1e4, 16.0), 167_198.7), ((64, 1e4, 4.0), 41_829.4), ((128, 5e5, 8.0), 4_134_231.1)]


@pytest.mark.parametrize("given,golden", YARN)
def test_yarn_range_and_magnitude(given, golden):
    width, theta, length, factor = given
    scaling = RopeScaling("yarn", factor, original_len=length)
    assert yarn_range(width, theta, scaling) == golden[:2]
    assert rope_magnitude(scaling) == pytest.approx(golden[2], abs=1e-5)
    assert rope_magnitude(dataclasses.replace(scaling, attention_factor=1.5)) == 1.5


def test_yarn_frequencies():
    freqs = rope_frequencies(128, 1e4, RopeScaling("yarn", 16.0, original_len=2048))
    np.testing.assert_allclose(freqs[[0, 16, 32, 48, 63]], [1, 0.1, 0.004, 6.25e-5, 7.21739e-6], rtol=1e-6)
    longer = rope_frequencies(128, 1e4, RopeScaling("yarn", 16.0, original_len=4096))
    assert longer[32] == pytest.approx(0.00567308, rel=1e-6)
    assert abs(freqs[32] / longer[32] - 1) > 0.1, "another original length must be seen"


@pytest.mark.parametrize("given,base", NTK)
def test_ntk_is_another_base(given, base):
    width, theta, factor = given
    freqs = rope_frequencies(width, theta, RopeScaling("ntk", factor))
    np.testing.assert_allclose(freqs, base ** -(np.arange(0, width, 2) / width), rtol=1e-6)
    # Its lowest frequency is that of interpolation, its highest that of no scaling.
    plain, linear = rope_frequencies(width, theta), rope_frequencies(width, theta, RopeScaling("linear", factor))
    assert freqs[0] == plain[0] and freqs[-1] == pytest.approx(linear[-1], rel=1e-6)


def test_dynamic_depends_on_the_length_of_the_row():
    scaling = RopeScaling("dynamic", 2.0, original_len=10)
    positions = jnp.stack([jnp.minimum(jnp.arange(25), last) for last in (9, 14, 24)])
    freqs = np.asarray(rope_frequencies(16, 1e4, scaling, positions))[:, 0, 0]
    np.testing.assert_allclose(freqs[0], rope_frequencies(16, 1e4), rtol=1e-6)
    for row, length in ((1, 15), (2, 25)):
        s = 2.0 * length / 10 - 1
        np.testing.assert_allclose(freqs[row], rope_frequencies(16, 1e4, RopeScaling("ntk", s)), rtol=1e-5)
    assert freqs[2, -1] < freqs[1, -1] < freqs[0, -1]


def test_magnitude_scales_queries_and_keys():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 16)), jnp.float32)
    turn = (jnp.arange(4)[None], rope_frequencies(16, 1e4))
    np.testing.assert_allclose(apply_rope(x, rotation(*turn, 1.25)), 1.25 * apply_rope(x, rotation(*turn)), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "llama3", "ntk", "yarn", "dynamic"])
def test_models_use_it(kind):
    """Queries and keys of one layer; a dynamic scale leaves the original length alone."""
    scaled = dataclasses.replace(TINY, rope_scaling=RopeScaling(kind, 4.0, original_len=12))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 24, 32)), jnp.float32)

    def queries(config, length):
        model = random_model(config)
        layer = jax.tree.map(lambda w: w[0], model.blocks.attention)
        everywhere, _ = model.rotations(jnp.arange(length)[None])
        return np.asarray(layer.qkv(x[:, :length], everywhere)[0])
    assert np.abs(queries(TINY, 24) - queries(scaled, 24)).max() > 1e-2
    if kind == "dynamic":
        np.testing.assert_allclose(queries(scaled, 12), queries(TINY, 12), atol=1e-5)


def test_problems():
    def problems(**changes):
        return dataclasses.replace(TINY, rope_scaling=RopeScaling(**changes)).problems()
    assert "choose one of linear" in problems(kind="su")[0]
    assert "factor=0.5" in problems(factor=0.5)[0] and "factor" in problems(factor=math.nan)[0]
    assert "high_freq=1.0" in problems(low_freq=2.0, high_freq=1.0)[0]
    assert "beta_fast=1.0" in problems(kind="yarn", beta_fast=1.0)[0]
    assert "original_len=0" in problems(kind="dynamic", original_len=0)[0]
    assert not problems(kind="yarn") and not problems(kind="ntk", low_freq=9.0)


def test_a_compiled_model_has_the_sines_once():
    """XLA's CPU backend would put them into every loop that reads them, in each layer, forward and backward."""
    model, ids = random_model(dataclasses.replace(TINY, num_layers=3)), jnp.zeros((2, 16), jnp.int32)
    compiled = jax.jit(jax.grad(lambda m: m(ids).var())).lower(model).compile().as_text()
    assert compiled.count(" sine(") == 1 and compiled.count(" cosine(") == 1
