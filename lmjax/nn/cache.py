"""The key/value cache of a decoder as a plain pytree: what decoding carries from one token to the next."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """Keys and values seen so far, for every layer, in slots that are filled from the left.

    Prompts of unequal length are padded on the left; the padding's slots are never valid.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    valid_BS: jax.Array  # bool: the slot holds a real token of that row
    length: jax.Array  # int32 scalar: slots filled, the same for all rows


def empty_cache(num_layers: int, batch: int, slots: int, kv_heads: int, head_dim: int,
                dtype: jnp.dtype) -> Cache:
    """A cache with room for `slots` tokens a row; 2 L B S K H elements of `dtype`."""
    shape = (num_layers, batch, slots, kv_heads, head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), bool),
                 jnp.zeros((), jnp.int32))
