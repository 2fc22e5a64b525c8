"""The TPU's attention kernel, run here by Pallas' interpreter, against the reference; and when it is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.axes import MeshConfig, make_mesh
from lmjax.nn.attention import causal_mask, choose_attention, reference_attention
from lmjax.nn.splash import splash_attention

SCALE = 0.125


def arrays(B=2, T=128, N=4, K=2, H=32):
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K, N))
    segments = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.03, axis=1), jnp.int32)
    return q, k, v, w, segments


def by_reference(q, k, v, segments, softcap=0.0, window=0):
    index = jnp.arange(q.shape[1])
    mask = causal_mask(index, index, window)[None] & (segments[:, :, None] == segments[:, None, :])
    return reference_attention(q, k, v, mask, scale=SCALE, softcap=softcap)


def gradients(f, q, k, v, w):
    return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(f(q, k, v) * w), (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("softcap,window", [(0.0, 0), (5.0, 40)])
def test_values_and_gradients_of_the_reference(softcap, window):
    q, k, v, w, segments = arrays()
    splash = functools.partial(splash_attention, segments_BT=segments, scale=SCALE, softcap=softcap, window=window,
                               interpret=True)
    want = gradients(lambda q, k, v: by_reference(q, k, v, segments, softcap, window), q, k, v, w)
    got = gradients(splash, q, k, v, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, want)
    # What this is there to catch: a window that is one key too wide.
    if window:
        wrong = by_reference(q, k, v, segments, softcap, window + 1)
        assert float(jnp.abs(splash(q, k, v) - wrong).max()) > 1e-3


@pytest.mark.parametrize("mesh", [MeshConfig(2, 1, 4), MeshConfig(-1, 2, 2)], ids=str)
def test_a_mesh_changes_nothing(mesh):
    """Four ways over heads of which there are two for keys: they are repeated."""
    q, k, v, _, segments = arrays(B=4)
    want = by_reference(q, k, v, segments)
    with jax.set_mesh(make_mesh(mesh)):
        got = jax.jit(lambda *a: splash_attention(*a, scale=SCALE, interpret=True))(q, k, v, segments)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_when_it_is_chosen():
    assert choose_attention("auto", 2048, "bfloat16", "tpu")[0] == "splash"
    assert choose_attention("auto", 2048, "float32", "tpu")[0] == "blockwise"
    assert choose_attention("auto", 2000, "bfloat16", "tpu")[0] == "blockwise"
    assert choose_attention("auto", 2048, "bfloat16", "cpu")[0] == "blockwise"
    name, why = choose_attention("splash", 100, "bfloat16", "tpu")
    assert name == "blockwise" and "128" in why
