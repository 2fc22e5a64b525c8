"""Attention by JAX's Pallas kernel for TPUs ("splash": sparse flash attention), the same numbers as the others.

What lives here: the call, on a mesh too. What does not: which form is taken where (`lmjax.nn.attention`). Scores never
leave the chip's fast memory, blocks that the mask hides are skipped, and it is one operation to compile, where
`blockwise_attention` is one for each block of queries. It is compiled for TPUs by Mosaic, which needs none; `interpret`
runs it anywhere, slowly, for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from lmjax.axes import activation_spec
from lmjax.nn.attention import KEPT

LANES = 128  # of a TPU's vector unit: rows must be a multiple, and so are the kernel's blocks
LARGEST_BLOCK = 512


def splash_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, *,
                     scale: float, softcap: float = 0.0, window: int = 0, interpret: bool = False) -> jax.Array:
    """Causal attention; arguments as `blockwise_attention`. T must be a multiple of 128.

    On a mesh each device runs the kernel on its own rows and heads. Where the key/value heads do not divide among the
    devices that share the query heads, they are repeated.
    """
    T = q_BTNH.shape[1]
    block = max(b for b in (LANES, 2 * LANES, LARGEST_BLOCK) if T % b == 0)
    run = functools.partial(_rows, scale=scale, softcap=softcap, window=window, block=block, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    q_spec, k_spec = activation_spec("BTNH", q_BTNH.shape, mesh), activation_spec("BTKH", k_BTKH.shape, mesh)
    if q_spec[2] != k_spec[2]:
        groups = q_BTNH.shape[2] // k_BTKH.shape[2]
        k_BTKH, v_BTKH = jnp.repeat(k_BTKH, groups, axis=2), jnp.repeat(v_BTKH, groups, axis=2)
        k_spec = q_spec
    if segments_BT is None:
        segments_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
    rows_spec = activation_spec("BT", segments_BT.shape, mesh)
    return jax.shard_map(run, in_specs=(q_spec, k_spec, k_spec, rows_spec), out_specs=q_spec,
                         check_vma=False)(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _rows(q_BTNH, k_BTKH, v_BTKH, segments_BT, *, scale, softcap, window, block, interpret):
    """The rows and heads of one device."""
    T, N = q_BTNH.shape[1:3]
    mask = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    sizes = kernel.BlockSizes(**{f"block_{name}": block for name in (
        "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")})
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * N), block_sizes=sizes, attn_logits_soft_cap=softcap or None, interpret=interpret,
        residual_checkpoint_name=KEPT)
    q_BNTH, k_BKTH, v_BKTH = (jnp.moveaxis(x, 2, 1) for x in (q_BTNH * scale, k_BTKH, v_BTKH))
    if segments_BT is None:
        out_BNTH = jax.vmap(lambda q, k, v: attend(q, k, v))(q_BNTH, k_BKTH, v_BKTH)
    else:
        out_BNTH = jax.vmap(lambda q, k, v, s: attend(q, k, v, segment_ids=kernel.SegmentIds(s, s)))(
            q_BNTH, k_BKTH, v_BKTH, segments_BT)
    return jnp.moveaxis(out_BNTH, 1, 2)
