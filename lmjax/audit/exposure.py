"""Exposure: how much likelier a model finds a canary's own secret than the ones it might have had instead. No model.

    exposure = log2 |R| - log2 rank                                (Carlini et al. 2019, arXiv 1802.08232, section 4)

R: the secrets that a format can hold; rank: of the canary's own among all of them by the code length of the whole text
in bits, 1 for the shortest; with equals the middle one of their ranks. It is log2 |R| where the model prefers the own
secret to all others. Where the canary was never trained on, its rank is uniform, and exposure averages

    log2 |R| - log2(|R|!) / |R|  ->  log2 e = 1.443 bits.

Where |R| is too large to score, a sample of m others gives -log2 of the share of R that is as likely as the own secret
in two ways: by its rank in the sample, at most log2(m + 1) bits; and from a skew-normal distribution fitted to the
sample's code lengths, which reaches beyond the sample and is right only as far as the distribution is (the distance of
Kolmogorov and Smirnov says how far, within the sample).

What lives here: the arithmetic, NumPy and SciPy. What does not: scoring (`lmjax.audit.canaries`).
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

CHANCE = math.log2(math.e)  # the mean exposure of what was never seen


def rank_among(own: float, others: np.ndarray) -> float:
    """1 for the smallest; equal values share the middle of their ranks."""
    return 1.0 + float((others < own).sum()) + 0.5 * float((others == own).sum())


def exact_exposure(own: float, others: np.ndarray) -> float:
    """Bits, from the code lengths of the own secret and of every other one: 0 to log2 |R|."""
    return math.log2(len(others) + 1) - math.log2(rank_among(own, others))


def sampled_exposure(own: float, sample: np.ndarray) -> float:
    """Bits, at most log2(m + 1): the same as if the sample and the own secret were all there is."""
    return exact_exposure(own, sample)


# ---- the fitted distribution -----------------------------------------------------------------------------


class Fit(NamedTuple):
    """A skew-normal distribution. distance: of Kolmogorov and Smirnov, the largest between its distribution function
    and the sample's. p: the share of samples of the distribution itself that lie farther off; too large, since the
    distribution was fitted to this very sample."""

    shape: float
    location: float
    scale: float
    distance: float
    p: float


def fit_skew_normal(sample: np.ndarray) -> Fit:
    """By maximum likelihood. A sample without spread gets a scale of 1e-9."""
    values = np.asarray(sample, np.float64)
    if not values.std() > 1e-9:
        return Fit(0.0, float(values.mean()), 1e-9, 1.0, 0.0)
    shape, location, scale = (float(value) for value in stats.skewnorm.fit(values))
    test = stats.kstest(values, stats.skewnorm(shape, location, scale).cdf)
    return Fit(shape, location, scale, float(test.statistic), float(test.pvalue))


def fitted_exposure(own: float, fit: Fit, secrets: int) -> float:
    """Bits: -log2 P(X <= own), at most log2 |R|, which no rank exceeds."""
    log_p = float(stats.skewnorm.logcdf(own, fit.shape, fit.location, fit.scale))
    return min(max(-log_p / math.log(2), 0.0), math.log2(secrets))
