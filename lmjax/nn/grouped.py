"""Rows that lie in groups, times a matrix for each group: the product that a mixture of experts is made of.

    y_r = x_r w_e   for the rows r of group e, which follow each other

Two implementations of the product and of its gradients, held equal to a loop by the tests. Routing and sorting are
`lmjax.nn.moe`. Letters: R rows, E groups, and D, F for what is summed over and what comes out, whatever they are.

XLA has an instruction for it, `jax.lax.ragged_dot`, where the TPU backend has a kernel. On a CPU it becomes one
product with E copies of the rows, all but one of which are masked to zero: E times the work and the memory. There we
loop over blocks of rows instead, each of which meets its expert's matrix alone (docs/moe.md has the times).
"""

import jax
import jax.numpy as jnp

BLOCK = 64  # rows that meet a matrix at once: enough to pay for reading it


def choose_experts(implementation: str, platform: str | None = None) -> tuple[str, str]:
    """(what runs, reason) of compute.experts, in words for the start of a run. platform: "cpu", "gpu" or "tpu"; None:
    this process's."""
    if implementation != "auto":
        return implementation, "set by compute.experts"
    if (platform or jax.default_backend()) == "cpu":
        return "blocks", "on a CPU ragged_dot multiplies every row with every expert"
    return "ragged", "XLA's ragged_dot"


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, implementation: str) -> jax.Array:
    """[R, F] in x's dtype. sizes_E: rows of each group, int32; rows after the last group get unspecified values, and
    give no gradient to w."""
    return {"ragged": jax.lax.ragged_dot, "blocks": _blocks}[implementation](x_RD, w_EDF, sizes_E)


def _zeros(shape: tuple[int, ...], dtype, sizes_E: jax.Array) -> jax.Array:
    """Zeros that, inside of a shard_map, differ between devices where the sizes do, as the carry of a loop has to."""
    return jnp.full(shape, jnp.minimum(sizes_E[0], 0), dtype)


def _plan(sizes_E: jax.Array, rows: int) -> tuple[int, jax.Array, jax.Array, jax.Array, jax.Array]:
    """(rows of a block, how many blocks, and of each its group, its first row, and where the group ends). A group
    takes as many blocks as it needs; the last one reaches into the next group."""
    block, E = min(BLOCK, rows), sizes_E.shape[0]
    blocks_E = -(-sizes_E // block)
    until_E, ends_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E)
    numbers = jnp.arange(rows // block + E)  # never more
    group = jnp.minimum(jnp.sum(numbers[:, None] >= until_E, axis=1), E - 1)
    first = (ends_E - sizes_E)[group] + (numbers - (until_E - blocks_E)[group]) * block
    return block, until_E[-1], group, first, ends_E[group]


def _multiply(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, summed: int) -> jax.Array:
    """The product; summed: the dimension of w that meets x's last one."""
    (R, D), out = x_RD.shape, w_EDF.shape[3 - summed]
    block, count, group, first, _ = _plan(sizes_E, R)
    x_RD = jnp.pad(x_RD, ((0, block), (0, 0)))

    def one(n, y):
        part = jax.lax.dynamic_slice(x_RD, (first[n], 0), (block, D))
        w = jax.lax.dynamic_index_in_dim(w_EDF, group[n], 0, keepdims=False)
        part = jax.lax.dot_general(part, w, (((1,), (summed - 1,)), ((), ())))
        # Blocks go up, so what one leaves in rows of the next group is overwritten by that group's own.
        return jax.lax.dynamic_update_slice(y, part, (first[n], 0))

    return jax.lax.fori_loop(0, count, one, _zeros((R + block, out), x_RD.dtype, sizes_E))[:R]


@jax.custom_vjp
def _blocks(x_RD, w_EDF, sizes_E):
    return _multiply(x_RD, w_EDF, sizes_E, 1)


def _blocks_bwd(kept, dy_RF):
    x_RD, w_EDF, sizes_E = kept
    (R, D), F = x_RD.shape, dy_RF.shape[1]
    block, count, group, first, end = _plan(sizes_E, R)
    dx_RD = _multiply(dy_RF, w_EDF, sizes_E, 2)
    x_RD, dy_RF = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_RD, dy_RF))

    def one(n, dw_EDF):
        x = jax.lax.dynamic_slice(x_RD, (first[n], 0), (block, D))
        dy = jax.lax.dynamic_slice(dy_RF, (first[n], 0), (block, F))
        dy = jnp.where((first[n] + jnp.arange(block) < end[n])[:, None], dy, 0)
        dw = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        at = (group[n], 0, 0)
        return jax.lax.dynamic_update_slice(dw_EDF, jax.lax.dynamic_slice(dw_EDF, at, (1, D, F)) + dw[None], at)

    dw_EDF = jax.lax.fori_loop(0, count, one, _zeros(w_EDF.shape, jnp.float32, sizes_E))
    return dx_RD, dw_EDF.astype(w_EDF.dtype), None


_blocks.defvjp(lambda x, w, sizes: (_multiply(x, w, sizes, 1), (x, w, sizes)), _blocks_bwd)
