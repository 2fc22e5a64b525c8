"""Softmax attention: one reference, one blockwise form that gives the same numbers in less memory, cuDNN's, and the
TPU's kernel (`lmjax.nn.splash`).

All take grouped queries (N = K G heads), segment ids (packed documents never see each other), a sliding
window and a soft-cap. Projections and position embeddings live in `lmjax.models.decoder`.

Time is the index in the row: causality and windows count indices, while rotary positions (which restart
at each document) are applied before. Legend of letters: `lmjax.axes`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmjax.axes import constrain
from lmjax.nn.linear import product

MASKED = -1e30  # finite, so that a row with nothing to see gives no NaN
# What compute.remat=named keeps of a block bears this name. What attention returns is among it; where a derivative is
# written by hand its residuals are, or the scores would be computed again to have them.
KEPT = "kept"
OF_A_BLOCK = "of a block of queries"  # what blockwise attention keeps for its own backward pass


def causal_mask(q_index_T: jax.Array, k_index_S: jax.Array, window: int = 0) -> jax.Array:
    """bool [T, S]: key s may be seen by query t: s <= t, and t - s < window where window > 0."""
    distance_TS = q_index_T[:, None] - k_index_S[None, :]
    mask_TS = distance_TS >= 0
    return mask_TS & (distance_TS < window) if window else mask_TS


def reference_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, *,
                        scale: float, softcap: float = 0.0) -> jax.Array:
    """softmax(scale q k + mask) v -> [B, T, N, H] in q's dtype; scores and softmax in float32.

    softcap c > 0 replaces a score z by c tanh(z / c) before the mask (Gemma 2, arXiv 2408.00118, 2).
    mask_BTS is bool and may have B = 1.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * scale).reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def _one_head(q_TGH: jax.Array, k_TH: jax.Array, v_TH: jax.Array, segments_T: jax.Array | None, *, scale: float,
              softcap: float, window: int, block: int) -> jax.Array:
    """Blocks of queries of the G heads that share one key/value head, in one row. Products are of plain matrices,
    with queries and their heads in one dimension R = T G: the form that every backend multiplies fastest.

    Softmax is divided by its sum after the product with v. The little that is kept of a block, then, leaves the
    backward pass an exponential to compute again, and no maximum and no sum over keys (as in FlashAttention,
    arXiv 2205.14135, appendix B.2)."""
    T, G, H = q_TGH.shape
    keep = functools.partial(checkpoint_name, name=OF_A_BLOCK)
    policy = jax.checkpoint_policies.save_only_these_names(OF_A_BLOCK)

    def one_block(start, stop, first, q_RH, k_SH, v_SH, segments_T):
        mask_TS = causal_mask(jnp.arange(start, stop), jnp.arange(first, stop), window)
        if segments_T is not None:
            mask_TS = mask_TS & (segments_T[start:stop, None] == segments_T[None, first:stop])
        scores_RS = product("rh,sh->rs", q_RH * scale, k_SH, jnp.float32)
        if softcap:
            scores_RS = softcap * jnp.tanh(scores_RS / softcap)
        scores_RS = jnp.where(jnp.repeat(mask_TS, G, axis=0), scores_RS, MASKED)
        top_R1 = keep(jax.lax.stop_gradient(jnp.max(scores_RS, axis=-1, keepdims=True)))
        powers_RS = jnp.exp(scores_RS - top_R1)
        sum_R1 = keep(jnp.sum(powers_RS, axis=-1, keepdims=True))
        mixed_RH = keep(product("rs,sh->rh", powers_RS.astype(v_SH.dtype), v_SH, jnp.float32))
        return (mixed_RH / sum_R1).astype(v_SH.dtype)

    outs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = max(0, start - window + 1) if window else 0
        out = jax.checkpoint(one_block, static_argnums=(0, 1, 2), policy=policy)(
            start, stop, first, q_TGH[start:stop].reshape(-1, H), k_TH[first:stop], v_TH[first:stop], segments_T)
        outs.append(out.reshape(-1, G, H))
    return jnp.concatenate(outs)


def blockwise_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, *,
                        scale: float, softcap: float = 0.0, window: int = 0, block: int = 128) -> jax.Array:
    """Causal attention in blocks of queries; equals `reference_attention` to rounding.

    A block sees only the keys that causality and the window allow, so about half of the score matrix is
    never computed, and each block is recomputed in the backward pass, so none of it is kept. `window` is
    static. segments_BT None means one document a row.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    one_head = functools.partial(_one_head, scale=scale, softcap=softcap, window=window, block=block)
    q_BKTGH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 2)
    k_BKTH, v_BKTH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    heads = jax.vmap(one_head, in_axes=(0, 0, 0, None))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, None if segments_BT is None else 0))
    out_BKTGH = rows(q_BKTGH, k_BKTH, v_BKTH, segments_BT)
    return jnp.moveaxis(out_BKTGH, 2, 1).reshape(B, T, N, H)


def cudnn_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, *,
                    scale: float, window: int = 0, implementation: str = "cudnn") -> jax.Array:
    """cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`: 16-bit inputs, no soft-cap.

    implementation: "xla" runs the same call without a GPU, for tests. Documents within a row become a mask of
    [B, 1, T, T]; segments_BT None spares it.
    """
    mask = None if segments_BT is None else (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask, scale=scale, is_causal=True,
        local_window_size=(window - 1, 0) if window else None, implementation=implementation)


def choose_attention(implementation: str, seq_len: int, dtype: str = "float32",
                     platform: str | None = None) -> tuple[str, str]:
    """(implementation, reason): what "auto" means on a platform (default: this process's), in words for the start of
    a run. dtype: of queries and keys."""
    if implementation == "splash" and seq_len % 128:  # a prompt, say; rows of a run are checked beforehand
        return "blockwise", f"rows of {seq_len} tokens are no multiple of 128, which splash needs"
    if implementation != "auto":
        return implementation, "set by compute.attention"
    if (platform or jax.default_backend()) == "tpu" and dtype == "bfloat16" and seq_len % 128 == 0:
        return "splash", "the TPU's kernel: scores never reach the memory"
    if seq_len >= 256:
        return "blockwise", f"rows of {seq_len} tokens: skips the masked half, keeps no scores"
    return "reference", f"rows of {seq_len} tokens fit whole"


def self_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None,
                   *, scale: float, softcap: float, window: int, implementation: str) -> jax.Array:
    """Causal self-attention within a row, by the chosen implementation."""
    q_BTNH, k_BTKH, v_BTKH = (constrain(q_BTNH, "BTNH"), constrain(k_BTKH, "BTKH"),
                              constrain(v_BTKH, "BTKH"))
    T = q_BTNH.shape[1]
    implementation, _ = choose_attention(implementation, T, q_BTNH.dtype.name)
    if implementation == "splash":
        from lmjax.nn.splash import splash_attention  # only here: Pallas takes long to import, and few need it

        out = splash_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale=scale, softcap=softcap, window=window)
        return constrain(out, "BTNH")
    if implementation == "cudnn":
        out = cudnn_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale=scale, window=window)
    elif implementation == "blockwise":
        out = blockwise_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale=scale, softcap=softcap,
                                  window=window)
    else:
        index_T = jnp.arange(T)
        mask_BTS = causal_mask(index_T, index_T, window)[None]
        if segments_BT is not None:
            mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
        out = reference_attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS, scale=scale, softcap=softcap)
    return checkpoint_name(constrain(out, "BTNH"), KEPT)
