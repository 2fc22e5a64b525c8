"""The decoder: causality and document masks by gradient, equal attention forms, windows, import use."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY

from lmjax.models import ComputeConfig, Decoder, DecoderConfig
from lmjax.models import decoder as module
from lmjax.nn.attention import blockwise_attention, causal_mask, cudnn_attention, reference_attention
from lmjax.nn.linear import product, project

KINDS = {
    "plain": TINY,
    "window": dataclasses.replace(TINY, windows=(5,)),
    "local-global": dataclasses.replace(TINY, num_layers=5, windows=(5, 0), rope_local_theta=500.0),
    "gpt2": dataclasses.replace(TINY, norm="layernorm", positions="learned", gated=False, biases=True,
                                activation="gelu_tanh", num_kv_heads=4, qk_norm=False),
    "gemma": dataclasses.replace(TINY, post_norms=True, attention_softcap=20.0, logit_softcap=10.0,
                                 scale_embed=True, num_kv_heads=1),
    "untied-relu2": dataclasses.replace(TINY, tied=False, activation="relu2", gated=False),
}


@jax.jit
def logits_of(model, ids, segments=None, positions=None):
    return model(ids, segments, positions)


def tokens(rows=2, length=24, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 64, (rows, length)), jnp.int32)


def influence(model, ids, segments=None):
    """bool [T, T]: does the embedding at position s change the logits at position t? By gradient."""
    def probe(noise_TD, t):
        original = Decoder._embed
        Decoder._embed = lambda self, tok, pos: original(self, tok, pos) + noise_TD[None]
        try:
            return jnp.sum(jnp.sin(model(ids, segments)[0, t]))
        finally:
            Decoder._embed = original
    T, D = ids.shape[1], model.config.d_model
    grads = jax.jit(jax.vmap(jax.grad(probe), (None, 0)))(jnp.zeros((T, D)), jnp.arange(T))
    return np.abs(np.asarray(grads)).max(-1) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_causal_by_gradient(kind, attention):
    model = Decoder(KINDS[kind], compute=ComputeConfig(attention=attention))
    seen = influence(model, tokens(1))
    right = np.tril(np.ones((24, 24), bool))
    if kind == "window":  # two layers of window 5 reach 8 tokens back
        right &= ~np.tril(right, -9)
    np.testing.assert_array_equal(seen, right)


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_packed_documents_never_see_each_other(attention):
    segments = jnp.asarray(np.repeat([1, 2, 3], [9, 4, 11])[None])
    model = Decoder(TINY, compute=ComputeConfig(attention=attention))
    right = np.tril(np.ones((24, 24), bool)) & (np.asarray(segments[0])[:, None] == np.asarray(segments[0]))
    np.testing.assert_array_equal(influence(model, tokens(1), segments), right)
    assert (influence(model, tokens(1)) != right).any(), "without segments the documents do see each other"


def test_a_leaky_mask_would_be_seen(monkeypatch):
    """The known-wrong causal mask, off by one, must fail the causality test."""
    from lmjax.nn import attention

    monkeypatch.setattr(attention, "causal_mask",
                        lambda q, k, window=0: q[:, None] - k[None, :] >= -1)
    seen = influence(Decoder(TINY, compute=ComputeConfig(attention="reference")), tokens(1))
    assert np.triu(seen, 1).any()


def test_packed_equals_separate():
    """Logits of documents packed in a row are those of each document alone."""
    ids = tokens(1)
    segments = jnp.asarray(np.repeat([1, 2], [10, 14])[None])
    positions = jnp.asarray(np.concatenate([np.arange(10), np.arange(14)])[None])
    for kind, config in KINDS.items():
        model = Decoder(config)
        packed = logits_of(model, ids, segments, positions)
        alone = jnp.concatenate([logits_of(model, ids[:, :10]), logits_of(model, ids[:, 10:])], axis=1)
        np.testing.assert_allclose(packed, alone, atol=3e-5, err_msg=kind)
    wrong = Decoder(KINDS["gpt2"])
    without = logits_of(wrong, ids, segments)
    assert np.abs(without - logits_of(wrong, ids, segments, positions)).max() > 1e-4, "positions must restart"


@pytest.mark.parametrize("window", [0, 3, 40])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_blockwise_equals_reference_with_gradients(window, softcap):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 50, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.repeat([1, 2, 3], [20, 5, 25])[None].repeat(2, 0))
    index = jnp.arange(50)
    mask = causal_mask(index, index, window)[None] & (segments[:, :, None] == segments[:, None])

    def both(f):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.cos(f(q, k, v))), (0, 1, 2)))(q, k, v)

    right = both(lambda q, k, v: reference_attention(q, k, v, mask, scale=0.3, softcap=softcap))
    ours = both(lambda q, k, v: blockwise_attention(q, k, v, segments, scale=0.3, softcap=softcap,
                                                    window=window, block=16))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_blockwise_looks_for_no_maximum_again_in_the_backward_pass():
    q = k = v = jnp.ones((1, 24, 2, 8))
    grad = jax.grad(lambda q, k, v: blockwise_attention(q, k, v, None, scale=0.3, block=8).sum(), (0, 1, 2))
    assert str(jax.make_jaxpr(grad)(q, k, v)).count("reduce_max") == 3  # one for each block of queries


@pytest.mark.parametrize("window", [0, 3])
def test_the_call_to_cudnn_means_the_same(window):
    """The same call with XLA's implementation, as no GPU is needed then."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 20, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.repeat([1, 2], [12, 8])[None].repeat(2, 0))
    index = jnp.arange(20)
    mask = causal_mask(index, index, window)[None] & (segments[:, :, None] == segments[:, None])
    right = reference_attention(q, k, v, mask, scale=0.3)
    call = functools.partial(cudnn_attention, q, k, v, scale=0.3, implementation="xla")
    np.testing.assert_allclose(call(segments, window=window), right, atol=1e-5)
    assert np.abs(call(None, window=window) - right).max() > 0.1, "documents must not see each other"
    assert np.abs(call(segments, window=window + 1) - right).max() > 0.1, "the window counts the token itself"


@pytest.mark.parametrize("spec, x_shape, w_shape", [
    ("BTD,DNH->BTNH", (2, 5, 6), (6, 3, 4)), ("BTNH,NHD->BTD", (2, 5, 3, 4), (3, 4, 6)),
    ("BTD,DF->BTF", (2, 5, 6), (6, 7))])
def test_project_is_einsum(spec, x_shape, w_shape):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (x_shape, w_shape))

    def both(f):
        return jax.tree.leaves(jax.value_and_grad(lambda x, w: jnp.sum(jnp.cos(f(spec, x, w))), (0, 1))(x, w))

    for ours, right in zip(both(project), both(jnp.einsum), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
    assert project(spec, x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form that XLA's CPU backend multiplies faster")
@pytest.mark.parametrize("wide, first", [(256, 1), (32, 0)])
def test_a_weights_gradient_turns_the_narrower_matrix(wide, first):
    """The dimension summed over begins the first matrix of the product only where that is the wider one."""
    x, w = jnp.ones((2, 64, 64)), jnp.ones((64, wide))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(project("BTD,DF->BTF", x * 2, w)))))
    text = gradient.lower(w, x).compile().as_text()
    weights = [line for line in text.splitlines() if " dot(" in line and f"f32[64,{wide}]" in line]
    assert len(weights) == 1 and f"lhs_contracting_dims={{{first}}}" in weights[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("spec", ["rk,kc->rc", "rh,sh->rs", "NV,VD->ND", "ND,NV->DV", "ND,NV->VD"])
def test_products_are_added_up_in_32_bits(spec, rows, dtype):
    """Whatever is summed over, and wide or narrow: the product and both gradients, beside float64."""
    rng = np.random.default_rng(rows)
    first, second, result = re.split(",|->", spec)
    sizes = dict.fromkeys(first + second, 33) | {first[0]: rows, result[1]: 50}
    a, b, g = (jnp.asarray(rng.normal(size=[sizes[letter] for letter in each]), dtype)
               for each in (first, second, result))
    out, back = jax.vjp(lambda a, b: product(spec, a, b, jnp.float32), a, b)
    a_64, b_64, g_64 = (np.asarray(x, np.float64) for x in (a, b, g))
    np.testing.assert_allclose(out, np.einsum(spec, a_64, b_64), rtol=1e-5, atol=1e-5)
    d_a, d_b = back(g.astype(jnp.float32))
    assert d_a.dtype == d_b.dtype == dtype
    for ours, right in ((d_a, np.einsum(f"{result},{second}->{first}", g_64, b_64)),
                        (d_b, np.einsum(f"{first},{result}->{second}", a_64, g_64))):
        np.testing.assert_allclose(ours, right.astype(dtype), rtol=2**-7 if dtype == "bfloat16" else 1e-5, atol=1e-4)
    assert product(spec, a, b).dtype == dtype


def test_a_hessian_times_a_vector_by_forward_mode():
    """What research does with a model that it imports: float32 has derivatives of every kind."""
    model, ids = Decoder(TINY, 0, ComputeConfig(attention="blockwise")), tokens(1, 8)
    graphdef, params = nnx.split(model)

    def gradient(params):
        return jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(ids))))(params)

    _, forward = jax.jit(lambda p: jax.jvp(gradient, (p,), (p,)))(params)
    step = 1e-2
    up, down = (jax.jit(gradient)(jax.tree.map(lambda w, by=by: w * (1 + by), params)) for by in (step, -step))
    for ours, above, below in zip(*map(jax.tree.leaves, (forward, up, down)), strict=True):
        right = (above - below) / (2 * step)
        np.testing.assert_allclose(ours, right, atol=0.02 * float(jnp.abs(right).max()) + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_unrolled_layers_are_scanned_layers(kind):
    """Also where the window pattern does not divide the depth."""
    def loss_and_gradients(layers):
        model = Decoder(KINDS[kind], compute=ComputeConfig(layers=layers))
        return jax.tree.leaves(jax.jit(jax.value_and_grad(lambda m, ids: jnp.sum(jnp.sin(m(ids)))))(model, tokens(2)))

    for ours, right in zip(loss_and_gradients("unroll"), loss_and_gradients("scan"), strict=True):
        np.testing.assert_allclose(ours, right, rtol=2e-4, atol=max(2e-4, 1e-5 * np.abs(right).max()))


def test_weights_do_not_depend_on_compute_and_do_on_seed():
    a, b = Decoder(TINY, 0), Decoder(TINY, 0, ComputeConfig("bfloat16", "full", "blockwise"))
    assert np.array_equal(a.embed_VD[...], b.embed_VD[...])
    assert not np.array_equal(a.embed_VD[...], Decoder(TINY, 1).embed_VD[...])
    layers = np.asarray(a.blocks.attention.q_DNH[...])
    assert not np.array_equal(layers[0], layers[1]), "layers must be born different"
    assert b(tokens()).dtype == jnp.float32


def test_initial_loss_is_that_of_a_uniform_guess():
    ids = tokens(8, 24)
    for kind, config in KINDS.items():
        logp = jax.nn.log_softmax(logits_of(Decoder(config), ids[:, :-1]))
        loss = -np.mean(np.take_along_axis(np.asarray(logp), np.asarray(ids[:, 1:, None]), -1))
        assert loss == pytest.approx(np.log(64), rel=0.25), kind


def test_problems_are_all_found_at_once():
    bad = DecoderConfig(num_layers=0, norm="rms", activation="swish", windows=(), rope_theta=-1.0)
    assert len(bad.problems()) == 5
    assert any("num_kv_heads=3" in p for p in dataclasses.replace(TINY, num_kv_heads=3).problems())
    assert not TINY.problems()


def test_config_is_small():
    assert len(dataclasses.fields(DecoderConfig)) <= 26
    assert len(module.__doc__) > 200


def test_research_use_in_both_nnx_modes():
    """The README's five lines, under plain jit and grad, in graph mode and in NNX's coming tree mode."""
    code = """
import jax, jax.numpy as jnp
from lmjax.models import Decoder, DecoderConfig
model = Decoder(DecoderConfig(vocab_size=64, num_layers=3, d_model=32, windows=(4, 0)))
tokens = jnp.arange(16).reshape(2, 8)
logits = jax.jit(lambda m, t: m(t))(model, tokens)
grads = jax.jit(jax.grad(lambda m: m(tokens).var()))(model)
print(float(abs(logits).sum()), float(abs(grads.blocks.mlp.up_DF[...]).sum()))
"""
    outputs = set()
    for flag in ("true", "false"):
        env = os.environ | {"NNX_GRAPH_MODE": flag, "NNX_GRAPH_UPDATES": flag, "XLA_FLAGS": "",
                            "PYTHONPATH": os.pathsep.join(sys.path)}
        outputs.add(subprocess.run([sys.executable, "-c", code], env=env, check=True, text=True,
                                   capture_output=True).stdout)
    assert len(outputs) == 1


def test_weights_are_born_with_the_stated_spread():
    model = Decoder(DecoderConfig(vocab_size=512, num_layers=2, d_model=128, num_heads=2, tied=False))
    for weight, std in ((model.embed_VD, 0.02), (model.out_VD, 128**-0.5),
                        (model.blocks.attention.q_DNH, 128**-0.5),
                        (model.blocks.mlp.down_FD, 0.02 * (model.config.d_ff * 4) ** -0.5)):
        values = np.asarray(weight[...])
        assert values.std() == pytest.approx(std, rel=0.02) and abs(values.mean()) < 0.02 * std
        assert np.abs(values).max() <= 1.7321 * std


def test_gradients_of_layers_one_after_another_are_put_together_once():
    """The gradient of slicing a stack is as many stacks, nearly all zeros, as there are layers."""
    model = Decoder(DecoderConfig(vocab_size=64, num_layers=3, d_model=32, num_heads=2),
                    compute=ComputeConfig(layers="unroll"))
    graphdef, params = nnx.split(model)
    tokens = jnp.arange(16).reshape(2, 8)
    text = str(jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graphdef, p)(tokens).var()))(params))
    shape = ",".join(map(str, model.blocks.mlp.up_DF.shape))
    made = [line.split(" = ")[1].split("[")[0] for line in text.splitlines() if f":f32[{shape}] = " in line]
    assert made and set(made) == {"concatenate"}


def test_layers_one_after_another_are_traced_once_and_compiled_in_no_call_outside_a_jit():
    model = Decoder(DecoderConfig(vocab_size=64, num_layers=3, d_model=32, num_heads=2),
                    compute=ComputeConfig(layers="unroll"))
    ids, compiled = jnp.arange(16).reshape(2, 8), []
    gradient = jax.grad(lambda m: m(ids).var())
    assert str(jax.make_jaxpr(gradient)(model)).count("name=layer") >= 3

    def listen(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        gradient(model)
        assert compiled, "nothing is heard"
        compiled.clear()
        gradient(model)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
