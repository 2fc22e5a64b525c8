"""Repetition in sequences of tokens: the cycle at the end, and the share of n-grams that occur more than once.

Pure functions of NumPy; no model. What lives elsewhere: the stop of the sampler, which finds the same cycles on the
device (`lmjax.decode.loops`), and the command that asks checkpoints (`lmjax.analyze.loops`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Cycle(NamedTuple):
    """The end of a sequence goes round: its last tokens, from index `onset` on, have this period; `repeats` times
    they go round whole."""

    period: int
    repeats: int
    onset: int


def tail_cycle(ids: Sequence[int], min_repeats: int = 3, max_period: int = 0) -> Cycle | None:
    """The shortest cycle that the end of a sequence goes through at least `min_repeats` times; None without one.

    A suffix of m tokens has period p if each of its tokens equals the one p before it, where that is in the suffix;
    it goes round m // p times. max_period 0: any. With min_repeats 3 and greedy continuations this is the protocol of
    Honglu Fan's posts on loops (docs/surprise.md). O(n), by the Z-function of the reversed sequence. Raises
    ValueError for min_repeats below 2: every sequence goes once through itself.
    """
    if min_repeats < 2:
        raise ValueError(f"min_repeats={min_repeats}: must be at least 2")
    n = len(ids)
    z = z_function(np.asarray(ids)[::-1])
    longest = min(n // min_repeats, max_period or n)
    for period in range(1, longest + 1):
        length = z[period] + period  # of the longest suffix with this period
        if length >= min_repeats * period:
            return Cycle(period, length // period, n - length)
    return None


def z_function(ids: Sequence[int]) -> list[int]:
    """z[i]: how many tokens from i on equal those from 0 on. z[0] = n. (Gusfield 1997, section 1.4)"""
    ids = np.asarray(ids).tolist()
    n = len(ids)
    z, left, right = [n] * min(n, 1) + [0] * (n - 1), 0, 0
    for i in range(1, n):
        k = min(right - i, z[i - left]) if i < right else 0
        while i + k < n and ids[k] == ids[i + k]:
            k += 1
        if i + k > right:
            left, right = i, i + k
        z[i] = k
    return z


def seq_rep(ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n: 1 - (different n-grams) / (n-grams); 0 where there are none. (Welleck et al. 2020, arXiv 1908.04319,
    section 6)"""
    ids = np.asarray(ids)
    if len(ids) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, n)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def summarise(continuations: Sequence[Sequence[int]], min_repeats: int = 3, max_period: int = 0,
              n: int = 4) -> dict[str, object]:
    """What a set of continuations does: `looping` (share that ends in a cycle), `periods` {period: count}, the median
    `period` and `onset` of those that loop (None without any), and the mean `seq_rep` of all."""
    cycles = [tail_cycle(ids, min_repeats, max_period) for ids in continuations]
    found = [cycle for cycle in cycles if cycle]
    periods, counts = np.unique([cycle.period for cycle in found], return_counts=True) if found else ([], [])
    return {"count": len(cycles), "looping": len(found) / max(len(cycles), 1),
            "periods": {int(p): int(c) for p, c in zip(periods, counts, strict=True)},
            "period": float(np.median([cycle.period for cycle in found])) if found else None,
            "onset": float(np.median([cycle.onset for cycle in found])) if found else None,
            "seq_rep": float(np.mean([seq_rep(ids, n) for ids in continuations])) if len(cycles) else 0.0}


def repeated_ngram(rng: np.random.Generator, n: int, length: int, vocab: Sequence[int]) -> np.ndarray:
    """int32 [length]: n random tokens of `vocab`, again and again."""
    return np.resize(rng.choice(np.asarray(vocab, np.int32), n), length)
