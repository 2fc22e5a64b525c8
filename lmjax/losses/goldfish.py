"""Goldfish masks: which targets a model is never trained on, so that it cannot recite (arXiv 2406.10209).

About one target in k is dropped, chosen by a hash of what precedes it, so that every copy of a passage
loses the same tokens and the model has to guess there. A mask is all that lives here; it multiplies the
weights of a loss. Everything runs on NumPy or JAX arrays and gives the same bits on both; 64-bit integers
are never needed.

`hash` is our own: order-sensitive, and a function of the h tokens before the target and of nothing else,
never across a document boundary. `hash_table` reproduces the published code bit for bit, with its
peculiarities: the window ends with the target itself, the hash is a product (so order does not matter and
an id 0 makes it 0), and it runs across documents. Legend: `lmjax.axes`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STRATEGIES = ("none", "hash", "hash_table", "static", "random")

TABLE_SIZE = 1_000_003  # a prime, as published
TABLE_SEED = 2_971_215_073  # the 47th Fibonacci number, as published


@dataclasses.dataclass(unsafe_hash=True)
class GoldfishConfig:
    """Which targets are dropped.

    strategy: "none"; "hash" (ours); "hash_table" (the published mask, bit for bit); "static" (columns 0,
    k, 2k, … of every row); "random" (anew each step and micro-batch: protects nothing, a control).
    k: one target in k is dropped. context: tokens hashed (h in the paper, 13 in its experiments).
    seed: of "hash" only; "random" draws from the run's seed.
    """

    strategy: str = "none"
    k: int = 4
    context: int = 13
    seed: int = 0

    def problems(self, prefix: str = "goldfish") -> list[str]:
        bad = []
        if self.strategy not in STRATEGIES:
            bad.append(f"{prefix}.strategy={self.strategy!r}: choose one of {', '.join(STRATEGIES)}")
        if self.k < 2:
            bad.append(f"{prefix}.k={self.k}: one target in k is dropped, so k is at least 2; "
                       f"to drop none set {prefix}.strategy='none'")
        if self.context < 1:
            bad.append(f"{prefix}.context={self.context}: at least 1 token is hashed")
        return bad


def _np_or_jnp(a: Any):
    return jnp if isinstance(a, jax.Array) else np


def _fmix32(x):
    """The finaliser of MurmurHash3 (Appleby): a bijection of uint32 that flips half of the bits."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _shift(a, j: int, fill):
    """a[:, t - j] at position t, `fill` where that is before the row."""
    xp = _np_or_jnp(a)
    return xp.concatenate([xp.full_like(a[:, :j], fill), a[:, : a.shape[1] - j]], axis=1) if j else a


def hash_keep(tokens_BT, segments_BT=None, *, k: int, context: int, seed: int = 0):
    """bool [B, T]: is the target that follows tokens[t] kept?

    A polynomial hash in uint32 of tokens[t - h + 1 … t], h = context, each token mixed first; dropped
    where the mixed sum is below 2^32 / k. Where fewer than h tokens of the same document precede the
    target in the row, it is kept.
    """
    xp = _np_or_jnp(tokens_BT)
    T = tokens_BT.shape[1]
    if segments_BT is None:
        segments_BT = xp.ones_like(tokens_BT)
    h = min(context, T + 1)
    mixed = _fmix32(tokens_BT.astype(np.uint32) * np.uint32(0x9E3779B1)
                    + np.uint32((seed + 1) % 2**32))
    total = xp.zeros_like(mixed)
    factor = 1
    for j in range(min(h, T)):
        factor = factor * 0x01000193 % 2**32
        total = total + _shift(mixed, j, 0) * np.uint32(factor)
    same = _shift(segments_BT, h - 1, 0) == segments_BT if h <= T else xp.zeros(tokens_BT.shape, bool)
    whole = same & (xp.arange(T)[None, :] >= h - 1)
    drop = (_fmix32(total ^ np.uint32(seed % 2**32)) < np.uint32(2**32 // k)) & whole
    return ~drop


@functools.cache
def reference_table() -> np.ndarray:
    """The published table, float32 [1_000_003]: the CPU stream of torch.rand from its seed, which is a
    Mersenne twister's 24 low bits over 2^24."""
    bits = np.random.MT19937()
    bits._legacy_seeding(TABLE_SEED)
    raw = bits.random_raw(TABLE_SIZE).astype(np.uint32) & np.uint32(0xFFFFFF)
    return raw.astype(np.float32) * np.float32(2**-24)


def _wide_product(ids, h: int):
    """(high, low) uint32 words of the wrapping 64-bit product of ids[t - h + 1 … t]; 1 before the row."""
    xp = _np_or_jnp(ids)
    low, high = xp.ones_like(ids), xp.zeros_like(ids)
    mask = np.uint32(0xFFFF)
    for j in range(h):
        f = _shift(ids, j, 1)
        # (high, low) * f mod 2^64 with 16-bit halves: low * f needs its upper word too.
        l0, l1, f0, f1 = low & mask, low >> np.uint32(16), f & mask, f >> np.uint32(16)
        cross = l1 * f0 + ((l0 * f0) >> np.uint32(16))
        middle = (cross & mask) + l0 * f1
        carry = l1 * f1 + (cross >> np.uint32(16)) + (middle >> np.uint32(16))
        low, high = low * f, high * f + carry
    return high, low


def _signed_mod(high, low, p: int):
    """The 64-bit two's complement number (high, low) modulo p < 2^20, as Python's % gives it."""
    rest = (high >> np.uint32(31)) * np.uint32(-(2**64) % p)  # minus 2^64 where the sign bit is set
    digits = [(high >> np.uint32(s)) & np.uint32(0xFF) for s in (24, 16, 8, 0)]
    digits += [(low >> np.uint32(s)) & np.uint32(0xFF) for s in (24, 16, 8, 0)]
    value = digits[0] * np.uint32(0)
    for digit in digits:
        value = (value * np.uint32(256) + digit) % np.uint32(p)
    return (value + rest) % np.uint32(p)


def hash_table_keep(targets_BT, *, k: int, context: int):
    """bool [B, T], equal to the mask of goldfish-loss@35d29f9 `hash-table` and of its Megatron port.

    key = int64 product of targets[t - h + 1 … t] (the label included); dropped where table[key mod
    1_000_003] < 1/k; the first h - 1 targets of a row are kept.
    """
    xp = _np_or_jnp(targets_BT)
    T = targets_BT.shape[1]
    if context > T:
        return xp.ones(targets_BT.shape, bool)
    high, low = _wide_product(targets_BT.astype(np.uint32), context)
    index = _signed_mod(high, low, TABLE_SIZE)
    dropped = xp.asarray(reference_table() < np.float32(1 / k))[index]
    return ~(dropped & (xp.arange(T)[None, :] >= context - 1))


def keep_mask(config: GoldfishConfig, tokens_BT, targets_BT, segments_BT=None, key: jax.Array | None = None):
    """bool [B, T]: True where the target is trained on. `key` is used by "random" only."""
    xp = _np_or_jnp(tokens_BT)
    if config.strategy == "hash":
        return hash_keep(tokens_BT, segments_BT, k=config.k, context=config.context, seed=config.seed)
    if config.strategy == "hash_table":
        return hash_table_keep(targets_BT, k=config.k, context=config.context)
    if config.strategy == "static":
        return xp.broadcast_to(xp.arange(targets_BT.shape[1])[None, :] % config.k != 0, targets_BT.shape)
    if config.strategy == "random":
        return ~jax.random.bernoulli(key, 1 / config.k, targets_BT.shape)
    assert config.strategy == "none", config
    return xp.ones(targets_BT.shape, bool)
