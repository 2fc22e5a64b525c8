"""Intervals and rates: how sure a share, a mean or a ranking is. NumPy only.

All intervals are of 95 %. Draws come from a seed, so that the same numbers give the same interval.
"""

from collections.abc import Callable

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 1000
_CELLS = 2**24  # indices that are drawn at a time


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of n independent trials; (0, 1) for none."""
    if not n:
        return 0.0, 1.0
    share, z = hits / n, Z95
    middle = share + z * z / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return 0.0 if hits == 0 else float(low), 1.0 if hits == n else float(high)


def bootstrap_mean(values_n: np.ndarray, groups_n: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of a mean. Whole groups (documents) are drawn: probes of one document are no independent
    observations. With one group the interval is that mean alone."""
    _, group = np.unique(groups_n, return_inverse=True)
    sums, sizes = np.bincount(group, values_n), np.bincount(group)
    rng, means = np.random.default_rng(seed), []
    for part in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * len(sums) // _CELLS)):
        drawn = rng.integers(0, len(sums), (len(part), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


# ---- rankings --------------------------------------------------------------------------------------------


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, fpr: float) -> float:
    """Largest share of members above a threshold that at most `fpr` of the others are above. With fewer than 1 / fpr
    others none of them may be above it."""
    allowed = int(np.floor(fpr * len(others) + 1e-9))
    threshold = np.sort(others)[::-1][min(allowed, len(others) - 1)]
    return float((members > threshold).mean()) if allowed < len(others) else 1.0


def bootstrap_pairs(measure: Callable[[np.ndarray, np.ndarray], float], members: np.ndarray, others: np.ndarray,
                    seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of a measure of two samples, each drawn on its own."""
    rng = np.random.default_rng(seed)
    found = [measure(members[rng.integers(0, len(members), len(members))],
                     others[rng.integers(0, len(others), len(others))]) for _ in range(RESAMPLES)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
