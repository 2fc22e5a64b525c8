"""The key/value cache of a decoder as a plain pytree: what decoding carries from one token to the next.

Rows are filled from the left and each has its own length, so nothing depends on what else is in the batch. A
layer that sees every token keeps position p in slot p. A layer with a window keeps a ring: the first `sinks`
positions stay for good, later ones take turns, and memory is O(window). Writing is in place where the cache is
carried through a loop. Running the layers is `lmjax.models.cached`. Legend: `lmjax.axes`.

    bytes = 2 L B K S (H e + s)     e: 4, 2 or 1 bytes an element; s: 4 bytes of scale for int8, else 0
    S     = sinks + window + chunk - 1 in a layer with a window, where that is less than the row's length
"""

import dataclasses

import jax
import jax.numpy as jnp

from lmjax.axes import constrain
from lmjax.nn.attention import MASKED

DTYPES = ("", "float32", "bfloat16", "int8")


@dataclasses.dataclass(unsafe_hash=True)
class CacheConfig:
    """dtype: "float32", "bfloat16", "int8" (one scale for each token and head) or "" for the model's compute
    dtype. window: layers that see everything are given this window too; 0: they keep all. sinks: so many first
    tokens stay visible to every layer with a window (attention sinks, Xiao et al. 2023, arXiv 2309.17453; here
    with their true positions)."""

    dtype: str = ""
    window: int = 0
    sinks: int = 0

    def problems(self, prefix: str = "cache") -> list[str]:
        bad = [f"{prefix}.{name}={getattr(self, name)}: must not be negative" for name in ("window", "sinks")
               if getattr(self, name) < 0]
        if self.dtype not in DTYPES:
            bad.append(f"{prefix}.dtype={self.dtype!r}: choose one of {', '.join(DTYPES[1:])}")
        return bad


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LayerStack:
    """Keys and values of the layers that stand at one place of the window pattern, one above the other."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    k_scale_LBKS: jax.Array | None  # of int8 only
    v_scale_LBKS: jax.Array | None
    window: int = dataclasses.field(metadata={"static": True})  # 0: all tokens
    sinks: int = dataclasses.field(metadata={"static": True})
    ring: bool = dataclasses.field(metadata={"static": True})  # slots are used again

    @property
    def slots(self) -> int:
        return self.k_LBKSH.shape[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """stacks[i] holds layers i, i + period, …, the period being that of the model's windows.

    lengths_B: int32, tokens seen by each row. Lowering it forgets the last tokens, as long as no more than
    `chunk - 1` were added since (see `empty_stack`).
    """

    stacks: tuple[LayerStack, ...]
    lengths_B: jax.Array


def empty_stack(layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: str, *, window: int = 0,
                sinks: int = 0, chunk: int = 1) -> LayerStack:
    """Room for rows of `slots` tokens, or for what a window needs of them.

    chunk: most tokens that are appended at once, prefill of an empty cache aside. A ring is `chunk - 1` longer
    than its window, so that the first token of a chunk still sees all of its window after the last is written.
    """
    sinks = sinks if window else 0
    ring = 0 < window and sinks + window + chunk - 1 < slots
    slots = sinks + window + chunk - 1 if ring else slots
    shape = (layers, batch, kv_heads, slots, head_dim)

    def scales():
        return jnp.zeros(shape[:-1], jnp.float32) if dtype == "int8" else None

    return pin(LayerStack(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scales(), scales(), window, sinks, ring))


def pin(stack: LayerStack) -> LayerStack:
    """The stack with its sharding stated: rows as activations are split, heads over the tensor axis."""
    def scale(x):
        return None if x is None else constrain(x, "LBKS")

    return dataclasses.replace(stack, k_LBKSH=constrain(stack.k_LBKSH, "LBKSH"),
                               v_LBKSH=constrain(stack.v_LBKSH, "LBKSH"),
                               k_scale_LBKS=scale(stack.k_scale_LBKS), v_scale_LBKS=scale(stack.v_scale_LBKS))


def slots_of(stack: LayerStack, positions: jax.Array) -> jax.Array:
    """The slot in which a position is kept."""
    if not stack.ring:
        return positions
    turning = stack.sinks + (positions - stack.sinks) % (stack.slots - stack.sinks)
    return jnp.where(positions < stack.sinks, positions, turning)


def positions_of(stack: LayerStack, lengths_B: jax.Array) -> jax.Array:
    """int32 [B, S]: the position that each slot holds once `lengths_B` tokens are written; -1 for none."""
    slots_S = jnp.arange(stack.slots)
    if not stack.ring:
        return jnp.where(slots_S < lengths_B[:, None], slots_S, -1)
    turns = stack.slots - stack.sinks
    last_B1 = lengths_B[:, None] - 1
    held_BS = last_B1 - (last_B1 - slots_S) % turns  # the newest position that belongs into the slot
    held_BS = jnp.where(slots_S < stack.sinks, slots_S, held_BS)
    return jnp.where((held_BS >= slots_S) & (held_BS <= last_B1), held_BS, -1)


def fill(stack: LayerStack, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array,
         counts_B: jax.Array) -> LayerStack:
    """Writes the first counts_B of T tokens into an empty cache; T is at most the slots, or the cache a ring."""
    if stack.ring:
        held_BS = jnp.clip(positions_of(stack, counts_B), 0, k_BTKH.shape[1] - 1)[:, :, None, None]
        k_BTKH, v_BTKH = (jnp.take_along_axis(x, held_BS, axis=1) for x in (k_BTKH, v_BTKH))

    def put(array, value):  # value: [B, K, T, …]
        return jax.lax.dynamic_update_slice(array, value[None], (layer, *[0] * (array.ndim - 1)))

    return _written(stack, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), put)


def append(stack: LayerStack, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array,
           positions_BT: jax.Array) -> LayerStack:
    """Writes T tokens at positions that follow what each row has; positions beyond the last slot are dropped."""
    slots_BT = slots_of(stack, positions_BT)
    rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]

    def put(array, value):  # value: [B, T, K, …]
        if value.shape[1] == 1:  # the form that XLA turns into one small loop over the rows, in place
            return array.at[layer, rows_B1[:, 0], :, slots_BT[:, 0]].set(value[:, 0], unique_indices=True)
        return array.at[layer, rows_B1, :, slots_BT].set(value, unique_indices=True)

    return _written(stack, k_BTKH, v_BTKH, put)


def _written(stack: LayerStack, k, v, put) -> LayerStack:
    if stack.k_scale_LBKS is None:
        dtype = stack.k_LBKSH.dtype
        return dataclasses.replace(stack, k_LBKSH=put(stack.k_LBKSH, k.astype(dtype)),
                                   v_LBKSH=put(stack.v_LBKSH, v.astype(dtype)))
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    return dataclasses.replace(stack, k_LBKSH=put(stack.k_LBKSH, k), v_LBKSH=put(stack.v_LBKSH, v),
                               k_scale_LBKS=put(stack.k_scale_LBKS, k_scale),
                               v_scale_LBKS=put(stack.v_scale_LBKS, v_scale))


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [..., H], float32 scale [...]) with x ~ int8 * scale; the largest of a head becomes 127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale


def attend(stack: LayerStack, layer: jax.Array, q_BTNH: jax.Array, positions_BT: jax.Array, lengths_B: jax.Array, *,
           scale: float, softcap: float = 0.0) -> jax.Array:
    """softmax(scale q k) v over one layer of the cache -> [B, T, N, H] in q's dtype; scores in float32.

    lengths_B: tokens written so far, those of the queries included. A query sees the positions up to its own
    that are within the window or are sinks.
    """
    B, T, N, H = q_BTNH.shape
    at = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)  # noqa: E731
    k_BKSH, v_BKSH = at(stack.k_LBKSH).astype(q_BTNH.dtype), at(stack.v_LBKSH).astype(q_BTNH.dtype)
    K = k_BKSH.shape[1]
    # Query heads of one kv head and the T tokens are rows of one matrix product with its keys.
    q_BKMH = (q_BTNH * scale).reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, T * (N // K), H)
    scores_BKMS = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32)
    if stack.k_scale_LBKS is not None:
        scores_BKMS = scores_BKMS * at(stack.k_scale_LBKS)[:, :, None]
    if softcap:
        scores_BKMS = softcap * jnp.tanh(scores_BKMS / softcap)
    mask_BTS = visible(positions_BT, positions_of(stack, lengths_B), stack.window, stack.sinks)
    scores_BKTGS = jnp.where(mask_BTS[:, None, :, None], scores_BKMS.reshape(B, K, T, N // K, -1), MASKED)
    probs_BKTGS = jax.nn.softmax(scores_BKTGS, axis=-1)
    if stack.v_scale_LBKS is not None:
        probs_BKTGS = probs_BKTGS * at(stack.v_scale_LBKS)[:, :, None, None]
    probs_BKMS = probs_BKTGS.reshape(B, K, T * (N // K), -1).astype(v_BKSH.dtype)
    y_BKMH = jnp.einsum("BKMS,BKSH->BKMH", probs_BKMS, v_BKSH)
    return y_BKMH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H)


def visible(q_positions_BT: jax.Array, k_positions_BS: jax.Array, window: int, sinks: int) -> jax.Array:
    """bool [B, T, S]: the key is there, is not after the query, and is within its window or a sink."""
    q_BT1, k_B1S = q_positions_BT[:, :, None], k_positions_BS[:, None, :]
    mask_BTS = (k_B1S >= 0) & (k_B1S <= q_BT1)
    return mask_BTS & ((q_BT1 - k_B1S < window) | (k_B1S < sinks)) if window else mask_BTS
