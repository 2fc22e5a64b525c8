"""The decoder over a key/value cache: prefill and single steps are one function.

What lives here: how the layers of a `Decoder` run when keys and values of earlier tokens are kept. The weights,
and the pass over whole rows that training uses, are `lmjax.models.decoder`; the cache itself is `lmjax.nn.cache`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.axes import constrain
from lmjax.nn.attention import reference_attention, self_attention
from lmjax.nn.cache import Cache, CacheConfig, append, attend, empty_stack, fill, pin, visible


def period_of(config) -> int:
    """Layers n and n + period have the same window."""
    return min(len(config.windows), config.num_layers)


def new_cache(config, compute_dtype: str, batch: int, slots: int, cache: CacheConfig | None = None,
              chunk: int = 1) -> Cache:
    """An empty cache for rows of up to `slots` tokens; see `empty_stack` for `chunk`."""
    cache = cache or CacheConfig()
    period = period_of(config)

    def stack(i):
        windows = [w for w in (config.windows[i], cache.window) if w]
        return empty_stack(len(range(i, config.num_layers, period)), batch, slots, config.num_kv_heads,
                           config.head_dim, cache.dtype or compute_dtype, window=min(windows, default=0),
                           sinks=cache.sinks, chunk=chunk)

    return Cache(tuple(stack(i) for i in range(period)), constrain(jnp.zeros(batch, jnp.int32), "B"))


def extend(model, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache, empty: bool = False,
           layers: tuple[dict, ...] | None = None) -> tuple[jax.Array, Cache]:
    """Appends the first counts_B of T tokens to each row: (hidden states [B, T, D], the longer cache).

    What follows the first counts_B tokens of a row is padding: its hidden states mean nothing and it is never
    seen. empty: the cache has seen nothing yet, so the tokens need only see each other, by the kernels of
    training, and T may be any length up to the slots; otherwise T is at most the `chunk` of the cache.
    layers: of `layers_apart`, run one after another; None: a loop over the model's own, stacked ones, which compiles
    sooner.
    """
    c, T = model.config, tokens_BT.shape[1]
    steps_T = jnp.arange(T)
    slots_BT = cache.lengths_B[:, None] + steps_T  # distinct, also for padding
    positions_BT = jnp.minimum(slots_BT, (cache.lengths_B + counts_B - 1)[:, None]) if T > 1 else slots_BT

    def attend_with(stack, layer):
        def attend_empty(q, k, v, _):
            if stack.sinks or stack.window not in (0, *c.windows):
                y = _blocks_of_queries(q, k, v, stack, c)
            else:
                y = self_attention(q, k, v, None, scale=c.query_scale, softcap=c.attention_softcap,
                                   window=stack.window, implementation=model.compute.attention)
            return y, fill(stack, layer, k, v, counts_B)

        def attend_cached(q, k, v, _):
            written = append(stack, layer, k, v, slots_BT)
            return attend(written, layer, q, positions_BT, cache.lengths_B + T, scale=c.query_scale,
                          softcap=c.attention_softcap), written

        return attend_empty if empty else attend_cached

    x_BTD, stacks = _layers(model, model._embed(tokens_BT, positions_BT), positions_BT, attend_with, cache.stacks,
                            layers)
    lengths_B = constrain(cache.lengths_B + counts_B, "B")
    return model.final_norm(x_BTD), Cache(tuple(pin(stack) for stack in stacks), lengths_B)


def _layers(model, x_BTD, positions_BT, attend_with, stacks, apart):
    """One loop over the periods of the window pattern, then the layers that are left over; none where they are apart.

    The stacks are carried, not scanned over: a scan would read and write the whole cache at every step.
    """
    graphdef, params = nnx.split(model.blocks)
    windows, depth = model.config.windows, model.config.num_layers
    period = period_of(model.config)
    rotations = model.rotations(positions_BT)

    def sliced(n):
        return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, n, 0, keepdims=False), params)

    def group(g, x_BTD, stacks, size, weights_of=sliced):
        stacks = list(stacks)
        for i in range(size):
            block = nnx.merge(graphdef, weights_of(g * period + i))
            x_BTD, stacks[i], _ = block(x_BTD, rotations[windows[i] > 0], attend_with(stacks[i], g), windows[i])
        return x_BTD, tuple(stacks)

    left = depth % period
    if apart is not None:
        for g in range(-(-depth // period)):
            x_BTD, stacks = group(g, x_BTD, stacks, min(period, depth - g * period), apart.__getitem__)
        return x_BTD, stacks
    x_BTD, stacks = jax.lax.fori_loop(0, depth // period, lambda g, carry: group(g, *carry, period), (x_BTD, stacks))
    return group(depth // period, x_BTD, stacks, left) if left else (x_BTD, stacks)


def _blocks_of_queries(q_BTNH, k_BTKH, v_BTKH, stack, c, block: int = 128):
    """Attention of a prompt to itself with windows or sinks that only the cache knows, a block of queries at a
    time, so that [T, T] scores never exist."""
    B, T, N, H = q_BTNH.shape
    pad = -T % block
    starts = jnp.arange(0, T, block)
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
    keys_1S = jnp.arange(T)[None]

    def one(start):
        q = jax.lax.dynamic_slice_in_dim(q_BTNH, start, block, axis=1)
        mask_BTS = visible((start + jnp.arange(block))[None], keys_1S, stack.window, stack.sinks)
        return reference_attention(q, k_BTKH, v_BTKH, mask_BTS, scale=c.query_scale, softcap=c.attention_softcap)

    return jax.lax.map(one, starts).swapaxes(0, 1).reshape(B, T + pad, N, H)[:, :T]


class Prepared(NamedTuple):
    """What is made of the weights once, before the loop, because every step would make it again. None: nothing, the
    model's own serve. layers: of `layers_apart`. head_VD: `model.head_VD` in the compute dtype."""

    layers: tuple[dict, ...] | None = None
    head_VD: jax.Array | None = None


def layers_apart(blocks: dict) -> tuple[dict, ...] | None:
    """The weights of each layer as arrays of their own, which lie where the stacked ones do; None elsewhere than on
    one CPU, and while tracing.

    A loop over stacked layers makes XLA's CPU backend copy each out of the stack at every step, which takes up to two
    thirds of the step (docs/performance.md); other devices are left as they are. Memory is shared only where it is
    aligned as XLA wants it, to 64 bytes, so weights whose layers are not, small or odd ones, are copied here.
    """
    stacked, tree = jax.tree.flatten(blocks)
    if any(isinstance(w, jax.core.Tracer) or not isinstance(w, jax.Array) for w in stacked):
        return None
    device, *others = set().union(*(w.devices() for w in stacked))
    mesh = jax.sharding.get_abstract_mesh()
    if others or device.platform != "cpu" or not (mesh.empty or mesh.size == 1):
        return None
    held = jax.device_get(stacked)  # on a CPU this is the memory itself
    return tuple(jax.device_put(jax.tree.unflatten(tree, [w[n] for w in held]), device) for n in range(len(held[0])))


def matmul_weights(params: dict, dtype: str) -> dict:
    """The weights of matrix products inside the blocks in the compute dtype, so that no step casts them again.

    They are those whose names have three letters or more, and the MLP's; norms and embeddings stay float32, and so
    does a router, which computes in it.
    """
    if dtype == "float32":
        return params
    blocks = dict(params["blocks"])
    for room in ("attention", "mlp"):
        blocks[room] = {name: w.astype(dtype) if w.ndim > 2 and name != "router_DE" else w
                        for name, w in blocks[room].items()}
    return params | {"blocks": blocks}


def last_hidden(x_BTD: jax.Array, counts_B: jax.Array) -> jax.Array:
    """[B, D]: the hidden state of each row's last real token."""
    return jnp.take_along_axis(x_BTD, (counts_B - 1)[:, None, None], axis=1)[:, 0]


def next_logits(model, x_BD: jax.Array, head_VD: jax.Array | None) -> jax.Array:
    """float32 [B, V] of `Decoder.logits`, the matrix first: for few rows that is 1.5 x as fast on a CPU.

    head_VD: of `Prepared`; None: the model's own.
    """
    logits_BV = jnp.einsum("VD,BD->VB", model.head_VD if head_VD is None else head_VD, x_BD,
                           preferred_element_type=jnp.float32).T
    cap = model.config.logit_softcap
    return constrain(cap * jnp.tanh(logits_BV / cap) if cap else logits_BV, "BV")
