"""The decoder over a key/value cache: prefill and single steps are one function.

What lives here: how the layers of a `Decoder` run when keys and values of earlier tokens are kept. The weights,
and the pass over whole rows that training uses, are `lmjax.models.decoder`; the cache itself is `lmjax.nn.cache`.
"""

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


def extend(model, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache, empty: bool = False
           ) -> tuple[jax.Array, Cache]:
    """Appends the first counts_B of T tokens to each row: (hidden states [B, T, D], the longer cache).

    What follows the first counts_B tokens of a row is padding: its hidden states mean nothing and it is never
    seen. empty: the cache has seen nothing yet, so the tokens need only see each other, by the kernels of
    training, and T may be any length up to the slots; otherwise T is at most the `chunk` of the cache.
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

    x_BTD, stacks = _layers(model, model._embed(tokens_BT, positions_BT), positions_BT, attend_with, cache.stacks)
    lengths_B = constrain(cache.lengths_B + counts_B, "B")
    return model.final_norm(x_BTD), Cache(tuple(pin(stack) for stack in stacks), lengths_B)


def _layers(model, x_BTD, positions_BT, attend_with, stacks):
    """One loop over the periods of the window pattern, then the layers that are left over.

    The stacks are carried, not scanned over: a scan would read and write the whole cache at every step.
    """
    graphdef, params = nnx.split(model.blocks)
    windows, depth = model.config.windows, model.config.num_layers
    period = period_of(model.config)
    rotations = model.rotations(positions_BT)

    def group(g, x_BTD, stacks, size):
        stacks = list(stacks)
        for i in range(size):
            block = nnx.merge(graphdef, jax.tree.map(
                lambda w, i=i: jax.lax.dynamic_index_in_dim(w, g * period + i, 0, keepdims=False), params))
            x_BTD, stacks[i] = block(x_BTD, rotations[windows[i] > 0], attend_with(stacks[i], g), windows[i])
        return x_BTD, tuple(stacks)

    x_BTD, stacks = jax.lax.fori_loop(0, depth // period, lambda g, carry: group(g, *carry, period), (x_BTD, stacks))
    left = depth % period
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


def matmul_weights(params: dict, dtype: str) -> dict:
    """The weights of matrix products inside the blocks in the compute dtype, so that no step casts them again.

    They are those whose names have three letters or more, and the MLP's; norms and embeddings stay float32.
    """
    if dtype == "float32":
        return params
    blocks = dict(params["blocks"])
    for room in ("attention", "mlp"):
        blocks[room] = {name: w.astype(dtype) if w.ndim > 2 else w for name, w in blocks[room].items()}
    return params | {"blocks": blocks}


def last_hidden(x_BTD: jax.Array, counts_B: jax.Array) -> jax.Array:
    """[B, D]: the hidden state of each row's last real token."""
    return jnp.take_along_axis(x_BTD, (counts_B - 1)[:, None, None], axis=1)[:, 0]


def next_logits(model, x_BD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """float32 [B, V] of `Decoder.logits`, the matrix first: for few rows that is 1.5 x as fast on a CPU.

    head_VD: `model.head_VD` in the compute dtype, cast once before the loop.
    """
    logits_BV = jnp.einsum("VD,BD->VB", head_VD, x_BD, preferred_element_type=jnp.float32).T
    cap = model.config.logit_softcap
    return constrain(cap * jnp.tanh(logits_BV / cap) if cap else logits_BV, "BV")
