"""Initial values of weights: uniform or constant, and the same bits on any mesh. Modules are in their own files."""

import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

EMBED_STD = 0.02  # of token and position embeddings


def random_weight(key: jax.Array, name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Uniform with mean 0 and the given std, float32; the key depends on the name, so adding a weight
    changes no other.

    The random bits become a float in [-1/2, 1/2) exactly, and one multiplication follows: no compiler, mesh
    or kind of device can round it differently. A normal's inverse error function has no such luck.
    """
    bits = jax.random.bits(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.uint32)
    one_to_two = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    return nnx.Param((one_to_two - 1.5) * jnp.float32(math.sqrt(12) * std))


def full_weight(shape: tuple[int, ...], value: float, present: bool = True) -> nnx.Param | None:
    return nnx.Param(jnp.full(shape, value, jnp.float32)) if present else None


def cast(weight: nnx.Param | None, dtype: jnp.dtype) -> jax.Array | None:
    return None if weight is None else weight[...].astype(dtype)
