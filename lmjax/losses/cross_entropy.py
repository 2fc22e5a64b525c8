"""Next-token cross-entropy from hidden states, without ever holding [tokens, vocabulary].

Per token, with logits z = x W^T (soft-capped where asked), lse = logsumexp(z), label y, smoothing e and
z-loss weight a:

    loss = lse - (1 - e) z_y - e mean(z) + a lse^2
    dloss/dz_i = p_i (1 + 2 a lse) - e / V - (1 - e) [i = y]

(label smoothing: Szegedy et al. 2015, section 7; z-loss: PaLM, arXiv 2204.02311, section 5; soft-cap c:
z = c tanh(raw / c), Gemma 2, arXiv 2408.00118.) What is reported as loss elsewhere is the pure
cross-entropy lse - z_y.

Tokens are cut into chunks; logits of one chunk are made in float32, used and dropped. Because the loss is a
weighted sum, its gradient is known up to one scalar in the forward pass, so the chunk's logits are made
once and not again in the backward pass. Masks of every kind are `weights_BT`.

On a mesh each device does this with the tokens, and the part of the vocabulary, that it holds (`jax.shard_map`). The
head is gathered once, before the first chunk, and its gradient is added up on the device and sent once, after the last:
left to itself, XLA sends V D numbers in every chunk. Within a chunk only sums over a split vocabulary are sent.

Legend: `lmjax.axes`; N is the tokens of a device, B T in one dimension.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmjax.axes import activation_spec, constrain, weight_spec
from lmjax.nn.linear import product

CHUNK_BYTES = 32 * 2**20  # of float32 logits on one device; two or three such arrays live at a time
# On a mesh a chunk also has at least so many tokens of each device. A chunk reads the head twice in two bytes, and
# reads and writes its gradient in four: 12 V D bytes of memory for 6 V D FLOPs a token, so 1,024 tokens are 512 FLOPs
# a byte. Peak over memory's bandwidth is 166 (TPU v5p), 240 (v5e), 295 (H100) and 560 (v6e); lmjax/plan/machine.py.
MESH_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class _Terms:
    z_loss: float
    label_smoothing: float
    softcap: float


class _Place(NamedTuple):
    """The mesh axes that split the tokens, the vocabulary, the head's D as it is stored, and that of its gradient; all
    () on one device."""

    tokens: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    scattered: tuple[str, ...] = ()

    @property
    def turned(self) -> bool:
        """Whether the head's gradient is summed up as [D, V], of hidden states [D, N]: on one device, since XLA's CPU
        backend multiplies that faster (docs/performance.md). On a mesh it is [V, D] as it is stored, or XLA copies the
        sums before they are sent."""
        return not any(self)


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


# ---- tokens that a device holds ------------------------------------------------------------------------


def _logits(x: jax.Array, head_VD: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | float]:
    """Float32-accumulated logits, and d(logits)/d(raw logits) of the soft-cap. x: [..., D]"""
    z = jnp.einsum("...D,VD->...V", x, head_VD.astype(x.dtype), preferred_element_type=jnp.float32)
    if not softcap:
        return z, 1.0
    t = jnp.tanh(z / softcap)
    return softcap * t, 1.0 - jnp.square(t)


def _logsumexp(z: jax.Array, over: tuple[str, ...]) -> jax.Array:
    if not over:
        return jax.nn.logsumexp(z, axis=-1)
    top = jax.lax.pmax(jnp.max(z, axis=-1), over)
    return jnp.log(_sum(jnp.sum(jnp.exp(z - top[..., None]), axis=-1), over)) + top


def _token_terms(z: jax.Array, targets: jax.Array, terms: _Terms, over: tuple[str, ...] = ()):
    """(loss, pure cross-entropy, lse, one-hot mask) of each token. z: [..., V], or the part of the vocabulary that a
    device holds, split over the axes `over`; the label is picked with a masked sum, as it may be elsewhere."""
    first = jax.lax.axis_index(over) * z.shape[-1] if over else 0
    lse = _logsumexp(z, over)
    hot = jax.lax.broadcasted_iota(targets.dtype, z.shape, z.ndim - 1) == targets[..., None] - first
    nll = lse - _sum(jnp.sum(jnp.where(hot, z, 0.0), axis=-1), over)
    loss = nll
    if terms.label_smoothing:
        e = terms.label_smoothing
        mean = jnp.mean(z, axis=-1)
        loss = (1 - e) * nll + e * (lse - (jax.lax.pmean(mean, over) if over else mean))
    if terms.z_loss:
        loss = loss + terms.z_loss * jnp.square(lse)
    return loss, nll, lse, hot


def weighted_sum(loss: jax.Array, weights: jax.Array) -> jax.Array:
    """sum(w * loss) where a weight of 0 silences even an infinite loss (inf * 0 would be NaN)."""
    return jnp.sum(jnp.where(weights != 0, loss * weights, 0.0))


def _forward_chunk(head_VD, terms: _Terms, place: _Place, total, chunk):
    x, targets, weights = chunk
    z, _ = _logits(x, head_VD, terms.softcap)
    loss, nll, _, _ = _token_terms(z, targets, terms, place.vocabulary)
    return total + weighted_sum(loss, weights), nll


def _gradient_chunk(head_VD, terms: _Terms, place: _Place, carry, chunk):
    total, sums = carry
    x, x_turned, targets, weights = chunk
    vocab_size = head_VD.shape[0] * (jax.lax.axis_size(place.vocabulary) if place.vocabulary else 1)
    z, dcap = _logits(x, head_VD, terms.softcap)
    loss, nll, lse, hot = _token_terms(z, targets, terms, place.vocabulary)
    # All in float32 up to the last rounding: p - 1 at the label cancels badly in bfloat16.
    p = jnp.exp(z - lse[..., None])
    if terms.z_loss:
        p = p * (1.0 + 2.0 * terms.z_loss * lse[..., None])
    dz = p - (1.0 - terms.label_smoothing) * hot - terms.label_smoothing / vocab_size
    dz = jnp.where(weights[..., None] != 0, dz * weights[..., None], 0.0) * dcap
    # In every chunk, not once after all of them: it travels while the head's gradient is computed.
    dx = _sum(product("NV,VD->ND", dz.astype(x.dtype), head_VD.astype(x.dtype)), place.vocabulary)
    spec, x = ("DN,NV->DV", x_turned) if place.turned else ("ND,NV->VD", x)
    dhead = product(spec, x, dz.astype(x.dtype), jnp.float32)
    return (total + weighted_sum(loss, weights), sums + dhead), (nll, dx)


def _cut(a: jax.Array, chunks: int) -> jax.Array:
    """[B, T, …] -> [chunks, N / chunks, …], with zeros after the last token where that is no whole number."""
    a = a.reshape(-1, *a.shape[2:])
    a = jnp.pad(a, [(0, -len(a) % chunks)] + [(0, 0)] * (a.ndim - 1))
    return a.reshape(chunks, -1, *a.shape[1:])


def _join(a: jax.Array, B: int, T: int) -> jax.Array:
    """The inverse of _cut."""
    return a.reshape(-1, *a.shape[2:])[:B * T].reshape(B, T, *a.shape[2:])


def _chunks(tokens: int, vocabulary: int, chunk_bytes: int, place: _Place) -> int:
    """How many chunks the tokens of a device are cut into, where it holds so much of the vocabulary."""
    size = max(1, (chunk_bytes or CHUNK_BYTES) // (4 * vocabulary))
    if any(place) and not chunk_bytes:
        size = max(size, MESH_TOKENS)
    return math.ceil(tokens / min(size, tokens))


def _gathered(head_VD: jax.Array, dtype: jnp.dtype, place: _Place) -> jax.Array:
    """The head with its D whole, in the dtype of its products."""
    head_VD = head_VD.astype(dtype)
    return jax.lax.all_gather(head_VD, place.width, axis=1, tiled=True) if place.width else head_VD


def _value(x_BTD, head_VD, targets_BT, weights_BT, *, terms: _Terms, chunk_bytes: int, place: _Place):
    """(sum over the tokens of all devices, pure cross-entropy of each token here)"""
    (B, T), V = targets_BT.shape, head_VD.shape[0]
    parts = tuple(_cut(a, _chunks(B * T, V, chunk_bytes, place)) for a in (x_BTD, targets_BT, weights_BT))
    step = functools.partial(_forward_chunk, _gathered(head_VD, x_BTD.dtype, place), terms, place)
    total, nll = jax.lax.scan(step, jnp.float32(0), parts)
    return _sum(total, place.tokens), _join(nll, B, T)


def _value_and_gradients(x_BTD, head_VD, targets_BT, weights_BT, *, terms: _Terms, chunk_bytes: int, place: _Place):
    """(the two of `_value`, gradient of x here, that of the head over the tokens of all devices)"""
    (B, T), V = targets_BT.shape, head_VD.shape[0]
    parts = tuple(_cut(a, _chunks(B * T, V, chunk_bytes, place)) for a in (x_BTD, targets_BT, weights_BT))
    whole_VD = _gathered(head_VD, x_BTD.dtype, place)
    # With a single chunk XLA would fold the turn into the product, but for the barrier.
    x_turned = jax.lax.optimization_barrier(parts[0].mT) if place.turned else None
    parts = (parts[0], x_turned, *parts[1:])
    step = functools.partial(_gradient_chunk, whole_VD, terms, place)
    start = jnp.zeros(whole_VD.T.shape if place.turned else whole_VD.shape, jnp.float32)
    (total, sums), (nll, dx) = jax.lax.scan(step, (jnp.float32(0), start), parts)
    if place.scattered:  # first what makes it smaller
        sums = jax.lax.psum_scatter(sums, place.scattered, scatter_dimension=1, tiled=True)
    sums = _sum(sums, tuple(axis for axis in place.tokens if axis not in place.scattered))
    # The sums are sent before the layers' backward pass, which dx begins, and not held through it. And on one device,
    # with a single chunk, XLA would fold the transpose below into the product, which is then in the slow order.
    sums, dx = jax.lax.optimization_barrier((sums, dx))
    dhead_VD = (sums.T if place.turned else sums).astype(head_VD.dtype)
    return _sum(total, place.tokens), _join(nll, B, T), _join(dx, B, T), dhead_VD


# ---- all devices ---------------------------------------------------------------------------------------


def _axes(*parts) -> tuple[str, ...]:
    """The mesh axes of some entries of a PartitionSpec."""
    return tuple(axis for part in parts if part for axis in (part if isinstance(part, tuple) else (part,)))


def _on_each_device(local: Callable, letters: tuple[str, ...], x_BTD, head_VD, targets_BT, weights_BT):
    """`local` on the tokens and the vocabulary of each device; letters: of its results. Rows or a vocabulary that their
    axes do not divide are whole on all of them, which then compute the same."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(x_BTD, head_VD, targets_BT, weights_BT, place=_Place())
    x_spec, head_spec = activation_spec("RTD", x_BTD.shape, mesh), weight_spec("head_VD", head_VD.shape, mesh)
    rows, tokens, width = P(*x_spec[:2]), _axes(*x_spec), _axes(head_spec[1])
    # Only devices that have different tokens can share out what they add up.
    scattered = width if set(width) <= set(tokens) else ()
    specs = {"": P(), "BT": rows, "BTD": x_spec, "VD": head_spec if scattered else P(head_spec[0], None)}
    local = functools.partial(local, place=_Place(tokens, _axes(head_spec[0]), width, scattered))
    return jax.shard_map(local, in_specs=(x_spec, head_spec, rows, rows), check_vma=False,
                         out_specs=tuple(specs[name] for name in letters))(x_BTD, head_VD, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(x_BTD, head_VD, targets_BT, weights_BT, terms, chunk_bytes):
    local = functools.partial(_value, terms=terms, chunk_bytes=chunk_bytes)
    return _on_each_device(local, ("", "BT"), x_BTD, head_VD, targets_BT, weights_BT)


def _chunked_fwd(x_BTD, head_VD, targets_BT, weights_BT, terms, chunk_bytes):
    local = functools.partial(_value_and_gradients, terms=terms, chunk_bytes=chunk_bytes)
    total, nll, dx, dhead = _on_each_device(local, ("", "BT", "BTD", "VD"), x_BTD, head_VD, targets_BT, weights_BT)
    return (total, nll), (dx, dhead, weights_BT)


def _chunked_bwd(terms, chunk_bytes, residuals, cotangents):
    dx, dhead, weights = residuals
    scale = cotangents[0]
    return (dx * scale.astype(dx.dtype), dhead * scale.astype(dhead.dtype), None, jnp.zeros_like(weights))


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def cross_entropy(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *,
                  z_loss: float = 0.0, label_smoothing: float = 0.0, softcap: float = 0.0,
                  chunk_bytes: int = 0) -> tuple[jax.Array, jax.Array]:
    """(sum over tokens of weight * loss, pure cross-entropy of every token [B, T]), both float32, nats.

    x_BTD: hidden states, float32 or bfloat16. head_VD: output matrix, float32. targets_BT: int labels;
    labels outside [0, V) get weight 0. weights_BT: float32, a constant: its gradient is zero. The second
    result is for reporting: no gradient flows through it, and it is computed for every token whatever its
    weight. chunk_bytes: of a chunk's float32 logits on a device; 0: CHUNK_BYTES, and on a mesh at least MESH_TOKENS
    tokens. On the mesh that is set, arrays are taken to be split as `lmjax.axes` says, and the gradients leave so.
    """
    inside = (targets_BT >= 0) & (targets_BT < head_VD.shape[0])
    weights_BT = jnp.where(inside, weights_BT, 0.0).astype(jnp.float32)
    targets_BT = jnp.where(inside, targets_BT, 0)
    total, nll_BT = _chunked(x_BTD, head_VD, targets_BT, weights_BT, _Terms(z_loss, label_smoothing, softcap),
                             chunk_bytes)
    return total, jax.lax.stop_gradient(nll_BT)


def naive_cross_entropy(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
                        *, z_loss: float = 0.0, label_smoothing: float = 0.0,
                        softcap: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """The same numbers with all logits at once and automatic differentiation: the reference."""
    z, _ = _logits(x_BTD, head_VD, softcap)
    loss_BT, nll_BT, _, _ = _token_terms(constrain(z, "RTV"), targets_BT, _Terms(z_loss, label_smoothing, softcap))
    return weighted_sum(loss_BT, weights_BT), jax.lax.stop_gradient(nll_BT)
