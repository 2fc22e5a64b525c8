"""Goldfish masks: which targets a model is never trained on, so that it cannot recite (arXiv 2406.10209).

About one target in k is dropped, chosen by a hash of what precedes it, so that every copy of a passage
loses the same tokens and the model has to guess there. A mask is all that lives here; it multiplies the
weights of a loss. Everything runs on NumPy or JAX arrays and gives the same bits on both; 64-bit integers
are never needed.

`hash` is our own: order-sensitive, and a function of the h tokens before the target and of nothing else,
never across a document boundary. `hash_table` reproduces the published code bit for bit, with its
peculiarities: the window ends with the target itself, the hash is a product (so order does not matter and
an id 0 makes it 0), and it runs across documents. `text_hash` is made of words instead of tokens: the data
pipeline hashes them (`lmjax.data.protect`), since only it sees text. Legend: `lmjax.axes`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.hashing import FACTOR, NEVER, fmix32, spread

STRATEGIES = ("none", "hash", "text_hash", "hash_table", "static", "random")

TABLE_SIZE = 1_000_003  # a prime, as published
TABLE_SEED = 2_971_215_073  # the 47th Fibonacci number, as published


@dataclasses.dataclass(unsafe_hash=True)
class GoldfishConfig:
    """Which targets are dropped.

    strategy: "none"; "hash" (ours); "text_hash" (ours, of words: near-duplicates lose the same ones);
    "hash_table" (the published mask, bit for bit); "static" (columns 0, k, 2k, … of every row); "random" (anew
    each step and micro-batch: protects nothing, a control).
    k: one target in k is dropped. context: tokens hashed (h in the paper, 13 in its experiments), words with
    "text_hash". seed: of the two that are ours; "random" draws from the run's seed.
    start: nothing is dropped in so many first steps. k_final, anneal_steps: from `start` on, over so many steps, the
    dropped share goes in a straight line from 1/k to 1/k_final and stays there; 0: k never changes.
    equal_supervised: the run is made longer, until it has trained on as many targets as `steps` would have without
    goldfish (k/(k-1) as long, where k is constant and every source protected).
    """

    strategy: str = "none"
    k: int = 4
    context: int = 13
    seed: int = 0
    start: int = 0
    k_final: int = 0
    anneal_steps: int = 0
    equal_supervised: bool = False

    @property
    def scheduled(self) -> bool:
        """Does the mask depend on the step?"""
        return self.strategy != "none" and bool(self.start or self.anneal_steps)

    def problems(self, prefix: str = "goldfish") -> list[str]:
        bad = []
        if self.strategy not in STRATEGIES:
            bad.append(f"{prefix}.strategy={self.strategy!r}: choose one of {', '.join(STRATEGIES)}")
        if self.k < 2:
            bad.append(f"{prefix}.k={self.k}: one target in k is dropped, so k is at least 2; "
                       f"to drop none set {prefix}.strategy='none'")
        if self.context < 1:
            bad.append(f"{prefix}.context={self.context}: at least 1 token is hashed")
        for name in ("start", "anneal_steps"):
            if not 0 <= getattr(self, name) < 2**31:
                bad.append(f"{prefix}.{name}={getattr(self, name)}: must be from 0 to 2^31 - 1 steps")
        if self.k_final and self.k_final < 2:
            bad.append(f"{prefix}.k_final={self.k_final}: must be at least 2, or 0 for a constant k")
        if bool(self.k_final) != bool(self.anneal_steps):
            bad.append(f"{prefix}.k_final={self.k_final}, {prefix}.anneal_steps={self.anneal_steps}: set both, or "
                       "neither for a constant k")
        if self.anneal_steps and self.strategy == "static":
            bad.append(f"{prefix}.anneal_steps={self.anneal_steps}: columns k apart cannot be annealed; choose another "
                       "strategy")
        return bad


def drop_rate(config: GoldfishConfig, step):
    """The share of targets that are dropped in a step (0-based; a number, or an array that may be traced)."""
    xp = _np_or_jnp(step)
    rate = 1 / config.k
    if config.anneal_steps:
        done = xp.clip((step - config.start) / config.anneal_steps, 0, 1)
        rate = rate + (1 / config.k_final - rate) * done
    return xp.where(step < config.start, 0.0, rate)


def dropped_steps(config: GoldfishConfig, steps: int) -> float:
    """The sum of `drop_rate` over steps 0 … steps - 1: so many steps' worth of targets are dropped."""
    if config.strategy == "none":
        return 0.0
    on = max(steps - config.start, 0)
    ramp = min(on, config.anneal_steps)
    if not ramp:
        return on / config.k
    slope = (1 / config.k_final - 1 / config.k) / config.anneal_steps
    return ramp / config.k + slope * ramp * (ramp - 1) / 2 + (on - ramp) / config.k_final


def equal_steps(config: GoldfishConfig, steps: int, share: float = 1.0) -> int:
    """The fewest steps that train on as many targets as `steps` steps without goldfish, `share` of all targets being
    in protected sources. It counts 1/k as dropped: the first targets of each document, which the hashes always keep,
    are a little more on top."""
    low, high = steps, 2 * steps + 1  # at most half of the targets are dropped
    while low < high:
        middle = (low + high) // 2
        # A hair below, since k = 4 must turn 3 steps into 4 and not, by rounding, into 5.
        if middle - share * dropped_steps(config, middle) >= steps * (1 - 1e-12):
            high = middle
        else:
            low = middle + 1
    return low


def _np_or_jnp(a: Any):
    return jnp if isinstance(a, jax.Array) else np


def _shift(a, j: int, fill):
    """a[:, t - j] at position t, `fill` where that is before the row."""
    xp = _np_or_jnp(a)
    return xp.concatenate([xp.full_like(a[:, :j], fill), a[:, : a.shape[1] - j]], axis=1) if j else a


def hash_values(tokens_BT, segments_BT=None, *, context: int, seed: int = 0):
    """uint32 [B, T]: the hash of what precedes the target that follows tokens[t]; dropped where below 2^32 / k.

    A polynomial hash in uint32 of tokens[t - h + 1 … t], h = context, each token mixed first, and the sum mixed again.
    NEVER where fewer than h tokens of the same document precede the target in the row.
    """
    xp = _np_or_jnp(tokens_BT)
    T = tokens_BT.shape[1]
    if segments_BT is None:
        segments_BT = xp.ones_like(tokens_BT)
    h = min(context, T + 1)
    mixed = spread(tokens_BT.astype(np.uint32), seed)
    total = xp.zeros_like(mixed)
    factor = 1
    for j in range(min(h, T)):
        factor = factor * FACTOR % 2**32
        total = total + _shift(mixed, j, 0) * np.uint32(factor)
    same = _shift(segments_BT, h - 1, 0) == segments_BT if h <= T else xp.zeros(tokens_BT.shape, bool)
    whole = same & (xp.arange(T)[None, :] >= h - 1)
    return xp.where(whole, fmix32(total ^ np.uint32(seed % 2**32)), np.uint32(NEVER))


def hash_keep(tokens_BT, segments_BT=None, *, k: int, context: int, seed: int = 0):
    """bool [B, T]: is the target that follows tokens[t] kept? See `hash_values`."""
    return ~(hash_values(tokens_BT, segments_BT, context=context, seed=seed) < np.uint32(2**32 // k))


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


def hash_table_values(targets_BT, *, context: int):
    """float32 [B, T]: the entry that goldfish-loss@35d29f9 `hash-table` looks up, dropped where below 1/k; 1 for the
    first h - 1 targets of a row. Key: the int64 product of targets[t - h + 1 … t] (the label included) mod 1_000_003.
    """
    xp = _np_or_jnp(targets_BT)
    T = targets_BT.shape[1]
    if context > T:
        return xp.ones(targets_BT.shape, np.float32)
    high, low = _wide_product(targets_BT.astype(np.uint32), context)
    entries = xp.asarray(reference_table())[_signed_mod(high, low, TABLE_SIZE)]
    return xp.where(xp.arange(T)[None, :] >= context - 1, entries, np.float32(1))


def hash_table_keep(targets_BT, *, k: int, context: int):
    """bool [B, T], equal to the mask of goldfish-loss@35d29f9 `hash-table` and of its Megatron port."""
    return ~(hash_table_values(targets_BT, context=context) < np.float32(1 / k))


def keep_mask(config: GoldfishConfig, tokens_BT, targets_BT, segments_BT=None, key: jax.Array | None = None,
              marks_BT=None, step=None):
    """bool [B, T]: True where the target is trained on.

    key is used by "random" only. marks_BT: the batch's `goldfish` (`lmjax.data.protect`), where it has one; "text_hash"
    needs it. step: the number of the step, which a schedule needs; the threshold is then a traced value.
    """
    xp = _np_or_jnp(tokens_BT)
    if config.scheduled:
        rate = xp.float32(drop_rate(config, step))
        threshold, share = (rate * np.float32(2**32)).astype(np.uint32), rate  # at most 2^31: k is 2 or more
    else:
        rate, threshold, share = 1 / config.k, np.uint32(2**32 // config.k), np.float32(1 / config.k)
    if config.strategy == "hash":
        drop = hash_values(tokens_BT, segments_BT, context=config.context, seed=config.seed) < threshold
    elif config.strategy == "text_hash":
        assert marks_BT is not None, "the batch has no `goldfish`: make it with Batches(…, protect=…)"
        return ~(marks_BT < threshold)
    elif config.strategy == "hash_table":
        drop = hash_table_values(targets_BT, context=config.context) < share
    elif config.strategy == "static":
        columns = xp.broadcast_to(xp.arange(targets_BT.shape[1])[None, :] % config.k == 0, targets_BT.shape)
        drop = columns & (step >= config.start) if config.scheduled else columns
    elif config.strategy == "random":
        drop = jax.random.bernoulli(key, rate, targets_BT.shape)
    else:
        assert config.strategy == "none", config
        return xp.ones(targets_BT.shape, bool)
    return ~(drop if marks_BT is None else drop & (marks_BT != np.uint32(NEVER)))
