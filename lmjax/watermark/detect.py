"""Finding a watermark: a score of a text, and the exact chance that a text made without the secret scores as high.

Each scored token has a word, pseudo-random in [0, 2^32), of (secret, the h tokens before it, itself). Of a text that
was made without the secret the words are independent and uniform, provided that each (context, token) is counted once.
So, over n scored tokens:

    kgw         tokens whose word is below gamma 2^32          Binomial(n, gamma)
    gumbel      sum of -log q, q = (word + 1/2) / 2^32         Gamma(n, 1)
    tournament  ones among the low m bits of the words         Binomial(n m, 1/2)

and the p-value is the upper tail of that. NumPy only. What lives elsewhere: the words (`lmjax.decode.marks`), arguments
and printing (`lmjax.watermark.commands`).
"""

import dataclasses
import math

import numpy as np

from lmjax.decode.marks import Watermark, words_of


@dataclasses.dataclass
class Detection:
    """What a text says. score: as in the table above; expected: its mean without the watermark; z: its distance from
    that in standard deviations. log10_p: of the p-value, which itself may be too small for a float (then 0.0).
    positions, values [scored]: which tokens were scored, and what each adds to the score."""

    scheme: str
    tokens: int
    scored: int
    score: float
    expected: float
    z: float
    p_value: float
    log10_p: float
    positions: np.ndarray = dataclasses.field(repr=False)
    values: np.ndarray = dataclasses.field(repr=False)

    def summary(self) -> dict:
        """Everything but the arrays, for JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("positions", "values")]
        return {name: getattr(self, name) for name in names}


def detect(tokens: np.ndarray, mark: Watermark, *, dedup: bool = True) -> Detection:
    """Scores token ids [T] for one watermark. Of a text with no scored token the p-value is 1.

    dedup=False counts repetitions again and again; its p-values are wrong for every text that repeats itself.
    """
    assert not mark.problems(), mark.problems()
    tokens = np.asarray(tokens, np.int64)
    at = scored_positions(tokens, mark, dedup)
    contexts = np.stack([tokens[at - j] for j in range(mark.context, 0, -1)], axis=1)
    words = words_of(mark, contexts, tokens[at])
    n, values = len(at), token_values(words, mark)
    score = float(values.sum())
    if mark.scheme == "gumbel":
        mean, spread, log_p = float(n), math.sqrt(n), log_gamma_tail(score, n)
    else:
        trials, chance = (n, mark.threshold / 2**32) if mark.scheme == "kgw" else (n * mark.layers, 0.5)
        mean, spread = trials * chance, math.sqrt(trials * chance * (1 - chance))
        log_p = log_binomial_tail(round(score), trials, chance)
    z = (score - mean) / spread if n else 0.0
    return Detection(mark.scheme, len(tokens), n, score, mean, z, math.exp(log_p), log_p / math.log(10), at, values)


def scored_positions(tokens: np.ndarray, mark: Watermark, dedup: bool = True) -> np.ndarray:
    """int64 [n], increasing: tokens with h tokens before them, that are counted.

    kgw marks every token, so each (context, token) counts once. The others mark the first token after each context
    and draw later ones freely, so that is the one that counts.
    """
    h = mark.context
    if len(tokens) <= h:
        return np.zeros(0, np.int64)
    seen_NH = np.lib.stride_tricks.sliding_window_view(tokens, h + 1)
    if not dedup:
        return np.arange(h, len(tokens))
    first = np.unique(seen_NH if mark.scheme == "kgw" else seen_NH[:, :-1], axis=0, return_index=True)[1]
    return np.sort(first) + h


def token_values(words_N: np.ndarray, mark: Watermark) -> np.ndarray:
    """float64 [N]: what each word adds to the score."""
    if mark.scheme == "kgw":
        return (words_N < mark.threshold).astype(np.float64)
    if mark.scheme == "gumbel":
        return -np.log((words_N + 0.5) / 2**32)
    bits_NM = (words_N[:, None] >> np.arange(mark.layers, dtype=np.uint32)) & np.uint32(1)
    return bits_NM.sum(axis=1).astype(np.float64)


# ---- Exact tails ---------------------------------------------------------------------------------------


def log_binomial_tail(k: int, n: int, p: float) -> float:
    """log P(X >= k) for X ~ Binomial(n, p), 0 < p < 1: the terms summed in logarithms, so that nothing underflows."""
    if k <= 0:
        return 0.0
    if k > n:
        return -math.inf
    # Past the mean, and past k, terms fall faster than a Gaussian's: 40 deviations on they are below any rounding.
    last = min(n, int(max(k, n * p) + 40 * math.sqrt(n * p * (1 - p)) + 100))
    first = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p)
             + (n - k) * math.log1p(-p))
    i = np.arange(k, last, dtype=np.float64)  # term i + 1 over term i
    ratios = np.log((n - i) / (i + 1)) + (math.log(p) - math.log1p(-p))
    return min(0.0, first + _log_sum(np.concatenate([[0.0], np.cumsum(ratios)])))


def log_gamma_tail(s: float, n: int) -> float:
    """log P(S >= s) for S ~ Gamma(n, 1): the chance of fewer than n Poisson events of mean s, summed in logarithms."""
    if s <= 0 or n == 0:
        return 0.0
    i = np.arange(1, n, dtype=np.float64)
    return min(0.0, -s + _log_sum(np.concatenate([[0.0], np.cumsum(math.log(s) - np.log(i))])))


def _log_sum(logs: np.ndarray) -> float:
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).sum()))
