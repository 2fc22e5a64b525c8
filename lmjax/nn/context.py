"""Attention of rows whose tokens are split over the mesh axis `context`: the zig-zag order, and two ways to the keys.

Every device holds T / c tokens of a row, and queries of all of them need the keys and values of all earlier ones:

    gather   each layer gathers the keys and values of the whole row, in memory O(T), and attends at once
    ring     keys and values go round the devices, one stop after another, in memory O(T / c) (ring attention,
             arXiv 2310.01889); parts of a softmax are joined as in FlashAttention (arXiv 2205.14135, section 3.1)

Both move the same bytes and give the same numbers. In both, each device attends block by block, and skips blocks that
causality, the window or document boundaries hide. With rows cut in c pieces in order, the device with the last piece
would have all the work and the first almost none; so a row is cut in 2 c chunks and device i holds chunks i and
2 c - 1 - i (zig-zag). Only the layers see that order: `to_zigzag` and `from_zigzag` move half of each device's tokens
at the ends of a model, and masks, losses and weights never know.

The derivative is written by hand: differentiating the ring as it is would keep the keys of every stop, which is all of
them, where a second turn of the ring needs none. It is the one of FlashAttention (section 3.1, appendix B): with
P = exp(S - lse), D = rowsum(dO * O),

    dV = P^T dO      dS = P * (dO V^T - D)      dQ = dS K      dK = dS^T Q

What attends whole rows is `lmjax.nn.attention`. Legend of letters: `lmjax.axes`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lmjax.axes import ACTIVATION_RULES, context_ways, spec
from lmjax.nn.attention import KEPT, MASKED

AXIS = "context"
BLOCK = 512  # tokens, at most; scores of one block of queries and one of keys exist at a time
RING_FROM = 131_072  # tokens of a row: from here on "auto" is the ring


class Settings(NamedTuple):
    """What is static about one attention."""

    ways: int
    method: str
    scale: float
    softcap: float
    window: int


def context_problem(seq_len: int, ways: int) -> str | None:
    """Why rows of this length cannot be split so many ways, with the fix; None where they can."""
    if ways == 1 or (seq_len % (2 * ways) == 0 and seq_len > 0):
        return None
    nearest = max(seq_len // (2 * ways), 1) * 2 * ways
    return (f"mesh.context={ways} cuts rows in {2 * ways} chunks, which do not divide seq_len={seq_len}; set "
            f"seq_len={nearest}, or lower mesh.context")


def split_ways(seq_len: int) -> int:
    """Into how many parts rows of this length are split on the mesh that is set; 1 where the length does not allow it:
    then every device has whole rows, which is slower and as right."""
    ways = context_ways()
    return 1 if context_problem(seq_len, ways) else ways


def choose_context(method: str, seq_len: int) -> tuple[str, str]:
    """(method, reason): what "auto" means here, in words for the start of a run."""
    if method != "auto":
        return method, "set by compute.context"
    if seq_len >= RING_FROM:
        return "ring", f"rows of {seq_len:,} tokens: no device ever holds all keys of one"
    return "gather", f"keys of rows of {seq_len:,} tokens fit on a device; one collective a layer"


# ---- the order of tokens -------------------------------------------------------------------------------


def zigzag_order(seq_len: int, ways: int) -> np.ndarray:
    """int [T]: the token of the row that stands at each place, device after device."""
    chunks = np.arange(seq_len).reshape(2 * ways, -1)
    return np.concatenate([chunks[[i, 2 * ways - 1 - i]].reshape(-1) for i in range(ways)])


def held_index(device: jax.Array | int, ways: int, length: int) -> jax.Array:
    """int [T / c]: the indices in the row of the tokens that a device holds."""
    half = jnp.arange(length // 2)
    return jnp.concatenate([device * (length // 2) + half, (2 * ways - 1 - device) * (length // 2) + half])


def _holder(chunk: int, ways: int) -> int:
    return chunk if chunk < ways else 2 * ways - 1 - chunk


def to_zigzag(arrays: Any, ways: int) -> Any:
    """Arrays [B, T, …] in the zig-zag order; half of what each device holds goes to another one."""
    def local(x):
        even, odd = jnp.split(x, 2, axis=1)  # chunks 2 i and 2 i + 1 of the row
        even = jax.lax.ppermute(even, AXIS, [(i, _holder(2 * i, ways)) for i in range(ways)])
        odd = jax.lax.ppermute(odd, AXIS, [(i, _holder(2 * i + 1, ways)) for i in range(ways)])
        first = jax.lax.axis_index(AXIS) % 2 == 0  # chunk i came among the even ones
        return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis=1)
    return jax.tree.map(lambda x: _mapped(local, "BT", x), arrays)


def from_zigzag(x: jax.Array, ways: int) -> jax.Array:
    """The inverse of `to_zigzag`, of one array. A permutation's derivative is its inverse; said here, because
    `shard_map` would add a sum over the axes that x is not split over."""
    return _from_zigzag(x, ways)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _from_zigzag(x, ways):
    def local(x):
        low, high = jnp.split(x, 2, axis=1)
        first = jax.lax.axis_index(AXIS) % 2 == 0
        even, odd = jnp.where(first, low, high), jnp.where(first, high, low)
        even = jax.lax.ppermute(even, AXIS, [(_holder(2 * i, ways), i) for i in range(ways)])
        odd = jax.lax.ppermute(odd, AXIS, [(_holder(2 * i + 1, ways), i) for i in range(ways)])
        return jnp.concatenate([even, odd], axis=1)
    return _mapped(local, "BT", x)


_from_zigzag.defvjp(lambda x, ways: (_from_zigzag(x, ways), None), lambda ways, _, dx: (to_zigzag(dx, ways),))


def _spec(letters: str, x: jax.Array) -> P:
    mesh = jax.sharding.get_abstract_mesh()
    return spec(letters + "_" * (x.ndim - len(letters)), x.shape, ACTIVATION_RULES, mesh)


def _mapped(f: Callable, letters: str, x: jax.Array) -> jax.Array:
    """f of each device's part of one array, whose shape it keeps."""
    return jax.shard_map(f, in_specs=_spec(letters, x), out_specs=_spec(letters, x), check_vma=False)(x)


# ---- blocks on one device ------------------------------------------------------------------------------


def _block(length: int) -> int:
    """The largest divisor of half a device's tokens, up to BLOCK; all of them where that would be tiny."""
    half = length // 2
    found = max(d for d in range(1, min(half, BLOCK) + 1) if half % d == 0)
    return found if found >= min(half, 64) else half


def _cut(x: jax.Array, axis: int, block: int) -> jax.Array:
    """[…, T, …] -> [T / block, …, block, …]"""
    shape = x.shape
    return jnp.moveaxis(x.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1:]), axis, 0)


def _join(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2:])


class _Keys(NamedTuple):
    """Keys with what masks need: k_BSKH, v_BSKH, segments_BS, index_S; or blocks, with one dimension in front."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array
    index: jax.Array


class _Queries(NamedTuple):
    """Queries, scaled, as q_BKGTH; segments_BT, index_T; or blocks of them."""

    q: jax.Array
    segments: jax.Array
    index: jax.Array


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum in the operands' dtype, accumulated in float32. XLA's CPU backend lacks some 16-bit products."""
    if a.dtype == jnp.float32:
        return jnp.einsum(subscripts, a, b)
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32)),
        default=lambda a, b: jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32))


def _scores(queries: _Queries, keys: _Keys, s: Settings) -> tuple[jax.Array, jax.Array | float]:
    """(masked scores [B, K, G, T, S], their derivative by the raw ones), float32."""
    scores = _dot("BKGTH,BSKH->BKGTS", queries.q, keys.k)
    slope = 1.0
    if s.softcap:
        capped = jnp.tanh(scores / s.softcap)
        scores, slope = s.softcap * capped, 1.0 - jnp.square(capped)
    distance_TS = queries.index[:, None] - keys.index[None, :]
    mask_TS = distance_TS >= 0
    if s.window:
        mask_TS = mask_TS & (distance_TS < s.window)
    mask_BTS = mask_TS & (queries.segments[:, :, None] == keys.segments[:, None, :])
    return jnp.where(mask_BTS[:, None, None], scores, MASKED), slope


def _visible(queries: _Queries, keys: _Keys, s: Settings) -> jax.Array:
    """bool: whether any of these queries may see any of these keys (True where it is not certain)."""
    seen = queries.index.max() >= keys.index.min()
    if s.window:
        seen = seen & (queries.index.min() - keys.index.max() < s.window)
    apart_B = ((queries.segments.min(1) > keys.segments.max(1)) | (queries.segments.max(1) < keys.segments.min(1)))
    return seen & ~jnp.all(apart_B)


def _attend(queries: _Queries, keys: _Keys, state: tuple, s: Settings) -> tuple:
    """One block of queries sees blocks of keys; state: (largest score, sum of exp, their values), joined with more."""
    def see(state, block):
        largest, total, values = state
        scores, _ = _scores(queries, block, s)
        higher = jnp.maximum(largest, scores.max(-1))
        p = jnp.where(scores > MASKED / 2, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(largest - higher)
        return (higher, total * shrink + p.sum(-1),
                values * shrink[..., None] + _dot("BKGTS,BSKH->BKGTH", p.astype(block.v.dtype), block.v))

    def step(state, block):
        return jax.lax.cond(_visible(queries, block, s), see, lambda state, _: state, state, block), None

    return jax.lax.scan(step, state, keys)[0]


def _attend_back(queries: _Queries, dout: jax.Array, lse: jax.Array, delta: jax.Array, dq: jax.Array, keys: _Keys,
                 dkv: tuple, s: Settings) -> tuple:
    """(dq of one block of queries, (dk, dv) of blocks of keys), what these give added."""
    def see(dq, dk, dv, block):
        scores, slope = _scores(queries, block, s)
        p = jnp.where(scores > MASKED / 2, jnp.exp(scores - lse[..., None]), 0.0)
        ds = p * (_dot("BKGTH,BSKH->BKGTS", dout, block.v) - delta[..., None]) * slope
        p, ds = p.astype(block.v.dtype), ds.astype(block.k.dtype)
        return (dq + _dot("BKGTS,BSKH->BKGTH", ds, block.k), dk + _dot("BKGTS,BKGTH->BSKH", ds, queries.q),
                dv + _dot("BKGTS,BKGTH->BSKH", p, dout))

    def step(dq, part):
        block, (dk, dv) = part
        dq, dk, dv = jax.lax.cond(_visible(queries, block, s), see, lambda dq, dk, dv, _: (dq, dk, dv), dq, dk, dv,
                                  block)
        return dq, (dk, dv)

    return jax.lax.scan(step, dq, (keys, dkv))


# ---- one device's share --------------------------------------------------------------------------------


def _next(x: Any, ways: int) -> Any:
    return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, [(i, (i + 1) % ways) for i in range(ways)]), x)


def _cut_keys(k, v, segments, index, block: int) -> _Keys:
    return _Keys(_cut(k, 1, block), _cut(v, 1, block), _cut(segments, 1, block), _cut(index, 0, block))


def _prepare(q, k, segments, s: Settings) -> tuple:
    """(block, blocks of queries, this device's place on the axis)."""
    B, T, N, H = q.shape
    # What depends on places and documents alone is the same in every layer, and JAX would move it out of their loop:
    # the masks of all pairs of blocks of all stops, in memory at once. Here it depends on the queries.
    q, segments, here = jax.lax.optimization_barrier((q, segments, jax.lax.axis_index(AXIS)))
    block = _block(T)
    K = k.shape[2]
    q_BKGTH = jnp.moveaxis((q * s.scale).reshape(B, T, K, N // K, H), 1, 3)
    queries = _Queries(_cut(q_BKGTH, 3, block), _cut(segments, 1, block), _cut(held_index(here, s.ways, T), 0, block))
    return block, queries, here


def _whole_row(k, v, segments, s: Settings, block: int) -> _Keys:
    """Blocks of every device's keys."""
    index = jnp.concatenate([held_index(i, s.ways, k.shape[1]) for i in range(s.ways)])
    k, v, segments = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v, segments))
    return _cut_keys(k, v, segments, index, block)


def _forward(q, k, v, segments, s: Settings) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H] in q's dtype, lse [B, K, G, T]) of one device's queries."""
    block, queries, here = _prepare(q, k, segments, s)
    shape = queries.q.shape  # [blocks, B, K, G, T, H]
    state = (jnp.full(shape[:-1], MASKED), jnp.zeros(shape[:-1]), jnp.zeros(shape))

    def attend(state, keys):
        return jax.lax.map(lambda x: _attend(x[0], keys, x[1], s), (queries, state))

    if s.method == "gather":
        state = attend(state, _whole_row(k, v, segments, s, block))
    else:
        def stop(carry, n):
            state, held = carry
            coming = _next(held, s.ways)  # goes on while this stop is computed
            index = held_index((here - n) % s.ways, s.ways, k.shape[1])
            return (attend(state, _cut_keys(*held, index, block)), coming), None

        (state, held), _ = jax.lax.scan(stop, (state, (k, v, segments)), jnp.arange(s.ways - 1))
        state = attend(state, _cut_keys(*held, held_index((here + 1) % s.ways, s.ways, k.shape[1]), block))
    largest, total, values = state
    out = _join(values / total[..., None], 3)  # every token sees itself, so that no total is 0
    return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype), _join(largest + jnp.log(total), 3)


def _backward(q, k, v, segments, out, lse, dout, s: Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) of one device's queries, keys and values."""
    block, queries, here = _prepare(q, k, segments, s)
    length = k.shape[1]
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1)  # [B, T, N]
    B, T, N, H = q.shape
    K = k.shape[2]
    dout = _cut(jnp.moveaxis(dout.reshape(B, T, K, N // K, H), 1, 3), 3, block)
    delta = _cut(jnp.moveaxis(delta.reshape(B, T, K, N // K), 1, 3), 3, block)
    lse = _cut(lse, 3, block)

    def attend(dq, keys, dkv):
        def one(dkv, x):
            part, dout, lse, delta, dq = x
            dq, dkv = _attend_back(part, dout, lse, delta, dq, keys, dkv, s)
            return dkv, dq
        dkv, dq = jax.lax.scan(one, dkv, (queries, dout, lse, delta, dq))
        return dq, dkv

    def zeros(keys):
        return jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)

    dq = jnp.zeros(queries.q.shape, jnp.float32)
    if s.method == "gather":
        keys = _whole_row(k, v, segments, s, block)
        dq, dkv = attend(dq, keys, zeros(keys))
        dk, dv = (jax.lax.psum_scatter(_join(x, 1), AXIS, scatter_dimension=1, tiled=True) for x in dkv)
    else:
        def stop(carry, n):
            dq, held, dkv = carry
            coming = _next(held, s.ways)
            index = held_index((here - n) % s.ways, s.ways, length)
            dq, dkv = attend(dq, _cut_keys(*held, index, block), dkv)
            return (dq, coming, _next(dkv, s.ways)), None  # gradients of keys travel with them, and come home

        start = zeros(_cut_keys(k, v, segments, held_index(here, s.ways, length), block))
        (dq, held, dkv), _ = jax.lax.scan(stop, (dq, (k, v, segments), start), jnp.arange(s.ways - 1))
        index = held_index((here + 1) % s.ways, s.ways, length)
        dq, dkv = attend(dq, _cut_keys(*held, index, block), dkv)
        dk, dv = (_join(x, 1) for x in _next(dkv, s.ways))
    dq = jnp.moveaxis(_join(dq, 3), 3, 1).reshape(q.shape) * s.scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


# ---- all devices ---------------------------------------------------------------------------------------


def _specs(q, k, segments) -> tuple:
    """Of (q, k, v, segments, lse)."""
    mesh = jax.sharding.get_abstract_mesh()
    q_spec, k_spec = _spec("BTNH", q), _spec("BTKH", k)
    lse = spec("BKGT", (q.shape[0], k.shape[2], 1, q.shape[1]), ACTIVATION_RULES, mesh)
    return q_spec, k_spec, k_spec, _spec("BT", segments), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, segments, s: Settings):
    return _attention_fwd(q, k, v, segments, s)[0]


def _attention_fwd(q, k, v, segments, s: Settings):
    *specs, lse_spec = _specs(q, k, segments)
    run = jax.shard_map(functools.partial(_forward, s=s), in_specs=tuple(specs), out_specs=(specs[0], lse_spec),
                        check_vma=False)
    out, lse = checkpoint_name(run(q, k, v, segments), KEPT)
    return out, (q, k, v, segments, out, lse)


def _attention_bwd(s: Settings, residuals, dout):
    q, k, _, segments, _, _ = residuals
    *specs, lse_spec = _specs(q, k, segments)
    run = jax.shard_map(functools.partial(_backward, s=s), in_specs=(*specs, specs[0], lse_spec, specs[0]),
                        out_specs=tuple(specs[:3]), check_vma=False)
    return *run(*residuals, dout), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def context_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, *,
                      ways: int, method: str, scale: float, softcap: float = 0.0, window: int = 0) -> jax.Array:
    """Causal self-attention of rows in the zig-zag order, split `ways` ways over the mesh that is set -> [B, T, N, H]
    in q's dtype, in the same order. method: "gather" or "ring".

    Where the key/value heads are fewer than what splits the heads, each is repeated as often as it is needed.
    """
    heads, tensor = k_BTKH.shape[2], jax.sharding.get_abstract_mesh().shape["tensor"]
    if heads % tensor and q_BTNH.shape[2] % tensor == 0:
        times = np.lcm(heads, tensor) // heads
        k_BTKH, v_BTKH = jnp.repeat(k_BTKH, times, axis=2), jnp.repeat(v_BTKH, times, axis=2)
    if segments_BT is None:
        segments_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
    return _attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, Settings(ways, method, scale, softcap, window))
