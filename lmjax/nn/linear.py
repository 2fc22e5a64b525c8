"""Activations times a weight, in the form that compiles best. Biases and activation functions live elsewhere."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.axes import platform


def project(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum(spec, x, w)` for specs like "BTD,DNH->BTNH": what follows BT in x is summed over and comes
    first in w. w is cast to x's dtype.

    On one device rows and time become one dimension first. The numbers are the same, but the gradient of w
    is then a plain product of two matrices; with two summed dimensions XLA's CPU backend first writes transposed
    copies, recomputing in them, slowly, whatever made the activations (docs/performance.md). On a mesh the two stay
    apart, since either may be split over devices.
    """
    w = w.astype(x.dtype)
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.einsum(spec, x, w)
    summed = len(spec.partition(",")[0]) - 2
    rows, columns = math.prod(w.shape[:summed]), math.prod(w.shape[summed:])
    B, T = x.shape[:2]
    multiply = _product_32 if platform() == "cpu" and x.dtype == jnp.float32 else functools.partial(
        product, "rk,kc->rc")
    return multiply(x.reshape(B * T, rows), w.reshape(rows, columns)).reshape(B, T, *w.shape[summed:])


@jax.custom_jvp
def _product_32(x_rk: jax.Array, w_kc: jax.Array) -> jax.Array:
    """x w, whose gradient by w takes x as [k, r] where x is narrower than the result: XLA's CPU backend is up to twice
    as fast in float32 where the dimension summed over does not begin the first matrix (docs/performance.md)."""
    return x_rk @ w_kc


@_product_32.defjvp
def _product_32_jvp(primals, tangents):
    (x_rk, w_kc), (d_x_rk, d_w_kc) = primals, tangents
    # JAX transposes what is said here into the gradient; the barrier keeps XLA from undoing the turn.
    turned_kr = jax.lax.optimization_barrier(x_rk.T) if x_rk.shape[1] <= w_kc.shape[1] else x_rk.T
    return x_rk @ w_kc, d_x_rk @ w_kc + turned_kr.T @ d_w_kc


def product(spec: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """`jnp.einsum(spec, a, b)` of two matrices that share one letter ("rk,kc->rc"); those of bfloat16 are added up in
    float32. The result's dtype is a's unless told.

    XLA's CPU backend has fast code for bfloat16 only where the result is float32, the letter summed over ends the first
    matrix, and neither is a transposed one; any other product it converts. So on a CPU products of bfloat16, and those
    of their gradients, take that form (docs/performance.md). These have no forward-mode derivative.
    """
    dtype = dtype or a.dtype
    if a.dtype != jnp.bfloat16 or platform() != "cpu":
        return jnp.einsum(spec, a, b, preferred_element_type=dtype)
    return _product_16(spec, dtype, a, b)


def _into_32(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    x, y, z = re.split(",|->", spec)
    if x[0] not in z and (y[0] in z or a.shape[1] > b.shape[1]):
        x, y, a, b = y, x, b, a
    in_order = "".join(letter for letter in x + y if letter in z)
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if x[0] in z:
        out = multiply(f"{x},{y}->{in_order}", a, b)
    else:  # The letter begins both: the narrower is turned. XLA would notice, but does not see through slices.
        turned, half = a.T, len(a) // 2
        out = sum(multiply(f"{x[::-1]},{y}->{in_order}", turned[:, rows], b[rows])
                  for rows in (slice(half), slice(half, None)))
    return out if in_order == z else out.T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product_16(spec: str, dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    return _into_32(spec, a, b).astype(dtype)


def _product_16_bwd(spec: str, dtype: Any, kept: tuple[jax.Array, jax.Array], d_z: jax.Array
                    ) -> tuple[jax.Array, jax.Array]:
    a, b = kept
    x, y, z = re.split(",|->", spec)
    d_z = d_z.astype(a.dtype)
    return _into_32(f"{z},{y}->{x}", d_z, b).astype(a.dtype), _into_32(f"{x},{z}->{y}", a, d_z).astype(b.dtype)


_product_16.defvjp(lambda spec, dtype, a, b: (_product_16(spec, dtype, a, b), (a, b)), _product_16_bwd)
