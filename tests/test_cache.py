"""The key/value cache: cached logits equal the full pass, rings and sinks equal a mask, int8 is near."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, TINY, random_model

from lmjax.axes import MeshConfig, make_mesh
from lmjax.models import Decoder, DecoderConfig, RopeScaling
from lmjax.models.cached import layers_apart
from lmjax.nn.attention import reference_attention
from lmjax.nn.cache import CacheConfig, empty_stack, positions_of, quantize, slots_of, visible

# One small model with the features of each preset family.
FAMILIES = {
    "gpt2": dataclasses.replace(TINY, norm="layernorm", positions="learned", gated=False, biases=True, qk_norm=False,
                                activation="gelu_tanh", num_kv_heads=0),
    "llama": dataclasses.replace(TINY, qk_norm=False, tied=False,
                                 rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    "qwen3": dataclasses.replace(TINY, head_dim=16),
    "mistral": dataclasses.replace(TINY, qk_norm=False, windows=(5,), tied=False),
    "gemma2": dataclasses.replace(TINY, qk_norm=False, windows=(5, 0), num_layers=3, post_norms=True,
                                  attention_softcap=20.0, logit_softcap=10.0, scale_embed=True, query_scale=0.3),
    "gemma3": dataclasses.replace(TINY, windows=(5, 5, 0), num_layers=5, num_kv_heads=1, rope_local_theta=500.0,
                                  rope_scaling=RopeScaling("linear", 4.0), post_norms=True, scale_embed=True),
    "yarn": dataclasses.replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, original_len=16)),
}
LENGTHS = np.array([13, 6])  # of the two prompts; 24 tokens in all


@functools.cache
def setup(family: str):
    """(model, ids, logits of the whole rows)"""
    model = random_model(FAMILIES[family], spread=0.3)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 24)), jnp.int32)
    return model, ids, np.asarray(jax.jit(lambda m, t: m(t), compiler_options=QUICK)(model, ids))


@functools.partial(jax.jit, static_argnames=("empty",), compiler_options=QUICK)
def extend(model, ids, counts, cache, empty=False, layers=None):
    hidden, cache = model.extend(ids, counts, cache, empty, layers)
    return model.logits(hidden), cache


def cached_logits(model, ids, config=None, chunk=1, steps=(1,) * 11, layers=None):
    """[two rows][their logits]: prompts of unequal length padded to 16, then steps of so many tokens."""
    cache = model.new_cache(2, 40, config, chunk)
    counts = jnp.asarray(LENGTHS)
    logits, cache = extend(model, ids[:, :16], counts, cache, empty=True)
    outs = [[np.asarray(logits[row, :n])] for row, n in enumerate(LENGTHS)]
    at = LENGTHS.copy()
    for size in steps:
        size = min(size, 24 - at.max())
        if size < 1:
            break
        part = np.stack([np.asarray(ids)[row, at[row]:at[row] + size] for row in range(2)])
        logits, cache = extend(model, jnp.asarray(part), jnp.full(2, size), cache, layers=layers)
        for row in range(2):
            outs[row].append(np.asarray(logits[row]))
        at += size
    return [np.concatenate(out) for out in outs], cache


def worst(ours, full):
    return max(np.abs(out - full[row, :len(out)]).max() for row, out in enumerate(ours))


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_the_full_pass(family):
    model, ids, full = setup(family)
    ours, _ = cached_logits(model, ids)
    assert worst(ours, full) < 1e-5
    assert worst(ours, full[::-1]) > 1e-2, "a row of other tokens must be far away"


def stacked(model):
    return nnx.to_pure_dict(nnx.split(model.blocks)[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])  # the last two: layers beyond the last whole period
def test_layers_apart_equal_the_full_pass(family):
    model, ids, full = setup(family)
    layers = layers_apart(stacked(model))
    assert len(layers) == model.config.num_layers
    assert worst(cached_logits(model, ids, layers=layers)[0], full) < 1e-5
    assert worst(cached_logits(model, ids, layers=layers[::-1])[0], full) > 1e-2, "layers in another order"


def test_layers_apart_lie_in_the_memory_of_the_stack():
    blocks = stacked(setup("llama")[0])
    layers = layers_apart(blocks)
    for room, name in (("attention", "q_DNH"), ("mlp", "down_FD"), ("mlp_norm", "scale_D")):
        whole, one = blocks[room][name], layers[1][room][name]
        np.testing.assert_array_equal(one, whole[1])
        assert one.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + whole.nbytes // 2
        assert whole[1].unsafe_buffer_pointer() != one.unsafe_buffer_pointer(), "a slice is a copy"
    odd = {"w": jnp.arange(12.0).reshape(3, 4)}  # layers of 16 bytes
    np.testing.assert_array_equal([layer["w"] for layer in layers_apart(odd)], odd["w"])


def test_layers_apart_leave_the_weights_free():
    """A train step may donate the weights after a generation, and its results are not seen by views of the old ones."""
    add = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros((2, 64, 16)) + 0
    held, at = layers_apart({"w": w}), w.unsafe_buffer_pointer()
    new = add(w)
    assert new.unsafe_buffer_pointer() != at and not np.any(held[1]["w"])
    w, at = new, new.unsafe_buffer_pointer()
    del held, new
    layers_apart({"w": w})
    assert add(w).unsafe_buffer_pointer() == at, "the views are gone, and donation is in place again"


def test_layers_stay_together_on_a_mesh_and_while_tracing():
    w = jnp.zeros((2, 8, 64))
    assert layers_apart({"w": w}) is not None
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    assert layers_apart({"w": jax.device_put(w, jax.NamedSharding(mesh, jax.P(None, "fsdp")))}) is None
    seen = []
    jax.jit(lambda w: seen.append(layers_apart({"w": w}))).lower(w)
    assert seen == [None]


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_chunks_after_prefill(family):
    model, ids, full = setup(family)
    ours, _ = cached_logits(model, ids, chunk=4, steps=(4, 3, 4))
    assert worst(ours, full) < 1e-5
    short, _ = cached_logits(model, ids, chunk=1, steps=(4, 3, 4))  # a ring too short for its chunks
    assert worst(short, full) > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3"])
def test_forgetting_the_last_tokens(family):
    """Three tokens that were tried and given up leave no trace, as after a rejected proposal."""
    model, ids, full = setup(family)
    cache = model.new_cache(2, 40, chunk=4)
    _, cache = extend(model, ids[:, :16], jnp.asarray(LENGTHS), cache, empty=True)
    _, tried = extend(model, 63 - ids[:, :4], jnp.full(2, 4), cache)
    back = dataclasses.replace(tried, lengths_B=cache.lengths_B)
    part = jnp.stack([ids[row, n:n + 2] for row, n in enumerate(LENGTHS)])
    logits, _ = extend(model, part, jnp.full(2, 2), back)
    kept, _ = extend(model, part, jnp.full(2, 2), tried)
    right = np.stack([full[row, n:n + 2] for row, n in enumerate(LENGTHS)])
    assert np.abs(logits - right).max() < 1e-5
    assert np.abs(kept - right).max() > 1e-3


def test_memory_of_rings():
    model, _, _ = setup("gemma3")
    ring, whole = model.new_cache(2, 1000).stacks[0], model.new_cache(2, 1000).stacks[2]
    assert ring.k_LBKSH.shape == (2, 2, 1, 5, 8) and whole.k_LBKSH.shape == (1, 2, 1, 1000, 8)
    assert model.new_cache(2, 1000, CacheConfig(sinks=3), chunk=4).stacks[0].slots == 5 + 3 + 3
    assert model.new_cache(2, 1000, CacheConfig(window=9)).stacks[2].slots == 9
    assert model.new_cache(2, 4).stacks[0].slots == 4, "a ring is never longer than the row"


def by_mask(model, ids, window, sinks):
    """Logits of whole rows with the windows and sinks as a mask over everything: the slow way."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

    def attend(q, k, v, own):
        used = min([w for w in (own, window) if w], default=0)
        mask = visible(positions, positions, used, sinks if used else 0)
        return reference_attention(q, k, v, mask, scale=model.config.query_scale,
                                   softcap=model.config.attention_softcap), None
    def logits(model, ids):
        x, _ = model._blocks(nnx.split(model.blocks)[1], model._embed(ids, positions), positions, attend)
        return model.logits(model.final_norm(x))
    return np.asarray(jax.jit(logits, compiler_options=QUICK)(model, ids))


@pytest.mark.parametrize("family,window,sinks", [("mistral", 0, 2), ("mistral", 0, 7), ("gemma3", 0, 1),
                                                 ("qwen3", 6, 0), ("llama", 6, 3)])
def test_rings_and_sinks_equal_the_mask(family, window, sinks):
    model, ids, full = setup(family)
    right = by_mask(model, ids, window, sinks)
    ours, cache = cached_logits(model, ids, CacheConfig(window=window, sinks=sinks))
    assert worst(ours, right) < 1e-5
    assert worst(ours, full) > 1e-3, "sinks and windows must be seen to matter"
    assert any(stack.ring for stack in cache.stacks)


@pytest.mark.parametrize("sinks", [0, 3])
def test_slots_and_positions_are_inverse(sinks):
    stack = empty_stack(1, 1, 50, 1, 4, "float32", window=6, sinks=sinks, chunk=3)
    for length in range(40):
        held = np.asarray(positions_of(stack, jnp.asarray([length])))[0]
        slots = np.asarray(slots_of(stack, jnp.arange(length))) if length else np.zeros(0, int)
        right = np.full(stack.slots, -1)
        for position, slot in enumerate(slots):
            right[slot] = position  # later ones overwrite
        np.testing.assert_array_equal(held, right)


@pytest.mark.parametrize("dtype,least,most", [("bfloat16", 1e-5, 0.15), ("int8", 1e-5, 0.15)])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_small_caches_are_near(family, dtype, least, most):
    model, ids, full = setup(family)
    ours, cache = cached_logits(model, ids, CacheConfig(dtype=dtype))
    assert cache.stacks[0].k_LBKSH.dtype == dtype
    off = worst(ours, full)
    assert least < off < most * full.std()
    if dtype == "int8":  # scales that are lost must be seen
        broken = dataclasses.replace(cache, stacks=tuple(
            dataclasses.replace(s, k_scale_LBKS=2 * s.k_scale_LBKS) for s in cache.stacks))
        args = (model, ids[:, :1], jnp.ones(2, jnp.int32))
        assert np.abs(extend(*args, broken)[0] - extend(*args, cache)[0]).max() > off


def test_quantize():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 16)), jnp.float32).at[0, 0].set(0.0)
    q, scale = quantize(x)
    assert q.dtype == jnp.int8 and np.abs(q).max() == 127 and not np.any(np.asarray(q[0, 0]))
    error = np.abs(np.asarray(q * scale[..., None] - x))
    assert (error <= np.asarray(scale)[..., None] * 0.5001).all() and error.max() > 0


def test_bytes_follow_the_formula():
    """The formula of lmjax/nn/cache.py, and Llama 2 7B with 4,096 tokens in 16 bits: 2 GiB exactly."""
    def size(config: DecoderConfig, batch, slots, cache=None):
        model = jax.eval_shape(lambda: Decoder(config))
        shapes = jax.eval_shape(lambda: model.new_cache(batch, slots, cache)).stacks
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert size(TINY, 3, 100, CacheConfig("int8")) == 2 * 2 * 3 * 2 * 100 * (8 + 4)
    llama = DecoderConfig(vocab_size=64, num_layers=32, d_model=4096, num_heads=32, d_ff=64)
    assert size(llama, 1, 4096, CacheConfig("bfloat16")) == 2 * 2**30


def test_problems():
    assert len(CacheConfig("float16", -1, -1).problems()) == 3 and not CacheConfig().problems()
