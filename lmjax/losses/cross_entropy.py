"""Next-token cross-entropy from hidden states, without ever holding [tokens, vocabulary].

Per token, with logits z = x W^T (soft-capped where asked), lse = logsumexp(z), label y, smoothing e and
z-loss weight a:

    loss = lse - (1 - e) z_y - e mean(z) + a lse^2
    dloss/dz_i = p_i (1 + 2 a lse) - e / V - (1 - e) [i = y]

(label smoothing: Szegedy et al. 2015, section 7; z-loss: PaLM, arXiv 2204.02311, section 5; soft-cap c:
z = c tanh(raw / c), Gemma 2, arXiv 2408.00118.) What is reported as loss elsewhere is the pure
cross-entropy lse - z_y.

Time is cut into chunks; logits of one chunk are made in float32, used and dropped. Because the loss is a
weighted sum, its gradient is known up to one scalar in the forward pass, so the chunk's logits are made
once and not again in the backward pass. Masks of every kind are `weights_BT`. Legend: `lmjax.axes`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lmjax.axes import constrain, context_ways

CHUNK_BYTES = 32 * 2**20  # of float32 logits on one device; two or three such arrays live at a time
# On a mesh a chunk also has at least so many tokens of each device: the gradient of the head is added up over the
# devices once a chunk, V D floats, and that has to fit behind the chunk's 6 V D FLOPs a token. Peak over links gives
# 570 (TPU v5p), 730 (v5e) and 1,700 (v6e); docs/planning.md.
MESH_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class _Terms:
    z_loss: float
    label_smoothing: float
    softcap: float


def _logits(x_BTD: jax.Array, head_VD: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | float]:
    """Float32-accumulated logits, and d(logits)/d(raw logits) of the soft-cap."""
    z = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    z = constrain(z, "RTV")
    if not softcap:
        return z, 1.0
    t = jnp.tanh(z / softcap)
    return softcap * t, 1.0 - jnp.square(t)


def _token_terms(z_BTV: jax.Array, targets_BT: jax.Array, terms: _Terms):
    """(loss, pure cross-entropy, lse, one-hot mask) of each token. The label is picked with a masked sum,
    which stays local where the vocabulary is split over devices; a gather would not."""
    lse_BT = jax.nn.logsumexp(z_BTV, axis=-1)
    hot_BTV = jax.lax.broadcasted_iota(targets_BT.dtype, z_BTV.shape, 2) == targets_BT[..., None]
    nll_BT = lse_BT - jnp.sum(jnp.where(hot_BTV, z_BTV, 0.0), axis=-1)
    loss_BT = nll_BT
    if terms.label_smoothing:
        e = terms.label_smoothing
        loss_BT = (1 - e) * nll_BT + e * (lse_BT - jnp.mean(z_BTV, axis=-1))
    if terms.z_loss:
        loss_BT = loss_BT + terms.z_loss * jnp.square(lse_BT)
    return loss_BT, nll_BT, lse_BT, hot_BTV


def weighted_sum(loss_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """sum(w * loss) where a weight of 0 silences even an infinite loss (inf * 0 would be NaN)."""
    return jnp.sum(jnp.where(weights_BT != 0, loss_BT * weights_BT, 0.0))


def _forward_chunk(head_VD, terms: _Terms, total, chunk):
    x, targets, weights = chunk
    z, _ = _logits(x, head_VD, terms.softcap)
    loss_BT, nll_BT, _, _ = _token_terms(z, targets, terms)
    return total + weighted_sum(loss_BT, weights), nll_BT


def _head_gradient(x_BTD: jax.Array, dz_BTV: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,BTV->DV", x_BTD, dz_BTV, preferred_element_type=jnp.float32)


def _gradient_chunk(head_VD, terms: _Terms, carry, chunk):
    total, dhead_DV = carry
    x, targets, weights = chunk
    z, dcap = _logits(x, head_VD, terms.softcap)
    loss_BT, nll_BT, lse_BT, hot = _token_terms(z, targets, terms)
    # All in float32 up to the last rounding: p - 1 at the label cancels badly in bfloat16.
    p = jnp.exp(z - lse_BT[..., None])
    if terms.z_loss:
        p = p * (1.0 + 2.0 * terms.z_loss * lse_BT[..., None])
    dz = p - (1.0 - terms.label_smoothing) * hot - terms.label_smoothing / z.shape[-1]
    dz = jnp.where(weights[..., None] != 0, dz * weights[..., None], 0.0) * dcap
    dz = constrain(dz, "RTV")
    dx = jnp.einsum("BTV,VD->BTD", dz.astype(x.dtype), head_VD.astype(x.dtype))
    # XLA's CPU backend has no product of 16-bit matrices into 32 bits where the first one lies transposed.
    dhead = jax.lax.platform_dependent(x, dz, cpu=lambda x, dz: _head_gradient(x.astype(jnp.float32), dz),
                                       default=lambda x, dz: _head_gradient(x, dz.astype(x.dtype)))
    return (total + weighted_sum(loss_BT, weights), dhead_DV + dhead), (nll_BT, constrain(dx, "RTD"))


def _split(a: jax.Array, chunks: int, ways: int = 1) -> jax.Array:
    """[B, T, …] -> [chunks, B, T / chunks, …]; rows, which are split over devices, are never cut. Where tokens
    are split too, `ways` ways, each chunk has as many of every device, so that all work on all chunks."""
    B, T, *rest = a.shape
    a = a.reshape(B, ways, chunks, T // (ways * chunks), *rest)
    return jnp.moveaxis(a, 2, 0).reshape(chunks, B, T // chunks, *rest)


def _join(a: jax.Array, ways: int = 1) -> jax.Array:
    """The inverse of _split."""
    chunks, B, t, *rest = a.shape
    return jnp.moveaxis(a.reshape(chunks, B, ways, t // ways, *rest), 0, 2).reshape(B, chunks * t, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked(x_BTD, head_VD, targets_BT, weights_BT, terms, chunks, ways):
    parts = tuple(_split(a, chunks, ways) for a in (x_BTD, targets_BT, weights_BT))
    total, nll = jax.lax.scan(functools.partial(_forward_chunk, head_VD, terms), jnp.float32(0), parts)
    return total, _join(nll, ways)


def _chunked_fwd(x_BTD, head_VD, targets_BT, weights_BT, terms, chunks, ways):
    parts = tuple(_split(a, chunks, ways) for a in (x_BTD, targets_BT, weights_BT))
    start = (jnp.float32(0), jnp.zeros(head_VD.T.shape, jnp.float32))
    (total, dhead), (nll, dx) = jax.lax.scan(
        functools.partial(_gradient_chunk, head_VD, terms), start, parts)
    return (total, _join(nll, ways)), (_join(dx, ways), dhead.T.astype(head_VD.dtype), weights_BT)


def _chunked_bwd(terms, chunks, ways, residuals, cotangents):
    dx, dhead, weights = residuals
    scale = cotangents[0]
    return (dx * scale.astype(dx.dtype), dhead * scale.astype(dhead.dtype), None, jnp.zeros_like(weights))


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _pad(a: jax.Array, ways: int, pad: int) -> jax.Array:
    """[B, T, …] with `pad` zeros after each of the `ways` parts of T."""
    B, T, *rest = a.shape
    widths = [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * len(rest)
    return jnp.pad(a.reshape(B, ways, T // ways, *rest), widths).reshape(B, T + ways * pad, *rest)


def cross_entropy(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *,
                  z_loss: float = 0.0, label_smoothing: float = 0.0, softcap: float = 0.0,
                  chunk_bytes: int = CHUNK_BYTES) -> tuple[jax.Array, jax.Array]:
    """(sum over tokens of weight * loss, pure cross-entropy of every token [B, T]), both float32, nats.

    x_BTD: hidden states, float32 or bfloat16. head_VD: output matrix, float32. targets_BT: int labels;
    labels outside [0, V) get weight 0. weights_BT: float32, a constant: its gradient is zero. The second
    result is for reporting: no gradient flows through it, and it is computed for every token whatever its
    weight.
    """
    B, T = targets_BT.shape
    V = head_VD.shape[0]
    inside = (targets_BT >= 0) & (targets_BT < V)
    weights_BT = jnp.where(inside, weights_BT, 0.0).astype(jnp.float32)
    targets_BT = jnp.where(inside, targets_BT, 0)
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    if devices == 1:  # one long row: the gradient of the head is then a product of two matrices
        x_BTD, targets_BT, weights_BT = (
            a.reshape(1, B * T, *a.shape[2:]) for a in (x_BTD, targets_BT, weights_BT))
    rows, length = targets_BT.shape
    columns = max(1, chunk_bytes * devices // (4 * V * rows))
    if devices > 1:
        columns = max(columns, min(length, MESH_TOKENS * devices // rows))
    ways = context_ways() if T % context_ways() == 0 else 1
    length //= ways  # of the part of a row that a device holds
    chunks = min(math.ceil(length * ways / columns), length)
    pad = -length % chunks
    if pad:
        x_BTD, targets_BT, weights_BT = (_pad(a, ways, pad) for a in (x_BTD, targets_BT, weights_BT))
    total, nll_BT = _chunked(x_BTD, head_VD, targets_BT, weights_BT,
                             _Terms(z_loss, label_smoothing, softcap), chunks, ways)
    nll_BT = nll_BT.reshape(rows, ways, length + pad)[:, :, :length].reshape(B, T)
    return total, jax.lax.stop_gradient(nll_BT)


def naive_cross_entropy(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
                        *, z_loss: float = 0.0, label_smoothing: float = 0.0,
                        softcap: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """The same numbers with all logits at once and automatic differentiation: the reference."""
    z, _ = _logits(x_BTD, head_VD, softcap)
    loss_BT, nll_BT, _, _ = _token_terms(z, targets_BT, _Terms(z_loss, label_smoothing, softcap))
    return weighted_sum(loss_BT, weights_BT), jax.lax.stop_gradient(nll_BT)
