"""Activations times a weight, in the form that compiles best. Biases and activation functions live elsewhere."""

import math

import jax
import jax.numpy as jnp


def project(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum(spec, x, w)` for specs like "BTD,DNH->BTNH": what follows BT in x is summed over and comes
    first in w. w is cast to x's dtype.

    On one device rows and time become one dimension first. The numbers are the same, but the gradient of w
    is then a plain product of two matrices, which XLA's CPU backend multiplies as they lie; with two summed
    dimensions it first writes transposed copies, recomputing in them, slowly, whatever made the activations
    (docs/performance.md). On a mesh the two stay apart, since either may be split over devices.
    """
    w = w.astype(x.dtype)
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.einsum(spec, x, w)
    summed = len(spec.partition(",")[0]) - 2
    rows, columns = math.prod(w.shape[:summed]), math.prod(w.shape[summed:])
    B, T = x.shape[:2]
    return (x.reshape(B * T, rows) @ w.reshape(rows, columns)).reshape(B, T, *w.shape[summed:])
