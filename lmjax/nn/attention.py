"""Softmax attention: one reference, and one blockwise form that gives the same numbers in less memory.

Both take grouped queries (N = K G heads), segment ids (packed documents never see each other), a sliding
window and a soft-cap. Projections and position embeddings live in `lmjax.models.decoder`.

Time is the index in the row: causality and windows count indices, while rotary positions (which restart
at each document) are applied before. Legend of letters: `lmjax.axes`.
"""

import jax
import jax.numpy as jnp

from lmjax.axes import constrain

MASKED = -1e30  # finite, so that a row with nothing to see gives no NaN


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


def blockwise_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array,
                        segments_BT: jax.Array | None, *, scale: float, softcap: float = 0.0,
                        window: int = 0, block: int = 128) -> jax.Array:
    """Causal attention in blocks of queries; equals `reference_attention` to rounding.

    A block sees only the keys that causality and the window allow, so about half of the score matrix is
    never computed, and each block is recomputed in the backward pass, so none of it is kept. `window` is
    static. segments_BT None means one document a row.
    """
    T = q_BTNH.shape[1]

    @jax.checkpoint
    def one_block(q, k, v, q_seg, k_seg, mask_TS):
        mask_BTS = mask_TS[None]
        if q_seg is not None:
            mask_BTS = mask_BTS & (q_seg[:, :, None] == k_seg[:, None, :])
        return reference_attention(q, k, v, mask_BTS, scale=scale, softcap=softcap)

    outs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = max(0, start - window + 1) if window else 0
        q, k, v = q_BTNH[:, start:stop], k_BTKH[:, first:stop], v_BTKH[:, first:stop]
        q_seg, k_seg = (None, None) if segments_BT is None else (
            segments_BT[:, start:stop], segments_BT[:, first:stop])
        mask_TS = causal_mask(jnp.arange(start, stop), jnp.arange(first, stop), window)
        outs.append(one_block(q, k, v, q_seg, k_seg, mask_TS))
    return jnp.concatenate(outs, axis=1)


def choose_attention(implementation: str, seq_len: int) -> tuple[str, str]:
    """(implementation, reason): what "auto" means here, in words for the start of a run."""
    if implementation != "auto":
        return implementation, "set by compute.attention"
    if seq_len >= 256:
        return "blockwise", f"rows of {seq_len} tokens: skips the masked half, keeps no scores"
    return "reference", f"rows of {seq_len} tokens fit whole"


def self_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None,
                   *, scale: float, softcap: float, window: int, implementation: str) -> jax.Array:
    """Causal self-attention within a row, by the chosen implementation."""
    q_BTNH, k_BTKH, v_BTKH = (constrain(q_BTNH, "BTNH"), constrain(k_BTKH, "BTKH"),
                              constrain(v_BTKH, "BTKH"))
    T = q_BTNH.shape[1]
    implementation, _ = choose_attention(implementation, T)
    if implementation == "blockwise":
        out = blockwise_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale=scale, softcap=softcap,
                                  window=window)
    else:
        index_T = jnp.arange(T)
        mask_BTS = causal_mask(index_T, index_T, window)[None]
        if segments_BT is not None:
            mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
        out = reference_attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS, scale=scale, softcap=softcap)
    return constrain(out, "BTNH")
