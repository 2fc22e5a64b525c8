"""How much of a suffix a continuation repeats, and what it takes to draw it. NumPy only; nothing is asked of a model.

What lives here: arrays of token ids in, one number a probe out, in whole batches. Letters: n probes, S tokens of a
suffix. A continuation that ended early is filled with PAD, which equals nothing. Intervals are `lmjax.audit.intervals`.
"""

import re
from collections.abc import Sequence

import numpy as np

PAD = -1
_WORD = re.compile(r"[^\W_]+")


# ---- what was repeated -----------------------------------------------------------------------------------


def _apart(a_nS: np.ndarray, b_nT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As int64, with the padding of each unlike the other's."""
    a, b = a_nS.astype(np.int64), b_nT.astype(np.int64)
    return np.where(a == PAD, -2, a), np.where(b == PAD, -3, b)


def lcs(a_nS: np.ndarray, b_nT: np.ndarray) -> np.ndarray:
    """int [n]: tokens of the longest common subsequence of each pair, which need not be neighbours."""
    a, b = _apart(a_nS, b_nT)
    best = np.zeros((len(a), b.shape[1] + 1), np.int64)
    for i in range(a.shape[1]):
        longer = best[:, :-1] + (a[:, i:i + 1] == b)
        # The cell to the left is a running maximum, so that a row of the table is one step.
        best[:, 1:] = np.maximum.accumulate(np.maximum(best[:, 1:], longer), axis=1)
    return best[:, -1]


def longest_run(a_nS: np.ndarray, b_nT: np.ndarray) -> np.ndarray:
    """int [n]: tokens of the longest common substring of each pair: neighbours in both, wherever."""
    a, b = _apart(a_nS, b_nT)
    run, best = np.zeros((len(a), b.shape[1] + 1), np.int64), np.zeros(len(a), np.int64)
    for i in range(a.shape[1]):
        run[:, 1:] = (run[:, :-1] + 1) * (a[:, i:i + 1] == b)
        best = np.maximum(best, run.max(axis=1))
    return best


def divergence(same_nS: np.ndarray) -> np.ndarray:
    """int [n]: the first place where `same` is False; S where there is none."""
    return np.where(same_nS.all(axis=1), same_nS.shape[1], np.argmin(same_nS, axis=1))


def type_token_ratio(ids_nS: np.ndarray) -> np.ndarray:
    """float [n]: different tokens over tokens, padding left out; 0 where there are none. Loops have a small one."""
    found = np.sort(ids_nS, axis=1)
    real = found != PAD
    new = np.concatenate([real[:, :1], real[:, 1:] & (found[:, 1:] != found[:, :-1])], axis=1)
    return new.sum(axis=1) / np.maximum(real.sum(axis=1), 1)


def words(text: str) -> list[str]:
    """Runs of letters and digits, case folded."""
    return _WORD.findall(text.casefold())


def rouge_words(texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """float [n]: ROUGE-L on words (Lin 2004): F1 of LCS / words of the text and LCS / words of the reference.

    0 where either has no words.
    """
    known: dict[str, int] = {}
    lists = [[known.setdefault(word, len(known)) for word in words(text)] for text in [*texts, *references]]
    a, b = _padded(lists[:len(texts)]), _padded(lists[len(texts):])
    sizes = (a != PAD).sum(axis=1) + (b != PAD).sum(axis=1)
    return 2 * lcs(a, b) / np.maximum(sizes, 1)


def _padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.full((len(lists), max(map(len, lists), default=0) or 1), PAD, np.int64)
    for row, values in zip(out, lists, strict=True):
        row[:len(values)] = values
    return out


def other_document(documents_n: np.ndarray) -> np.ndarray | None:
    """int [n]: for each probe another one, of another document: whose suffix its continuation is held against for the
    base rate. A cyclic shift as near to half of the probes as does it for all; None where no shift does."""
    n = len(documents_n)
    for shift in sorted(range(1, n), key=lambda s: (abs(s - n // 2), s)):
        order = np.roll(np.arange(n), -shift)
        if (documents_n[order] != documents_n).all():
            return order
    return None


# ---- what it takes to draw it ----------------------------------------------------------------------------


def log10_draws(log_p_n: np.ndarray, p: float) -> np.ndarray:
    """float64 [n]: log10 of the number of independent draws until the suffix came at least once with probability p.

    log_p: ln of the probability p_z that one draw is the whole suffix. 1 - (1 - p_z)^n >= p, so n >= ln(1 - p) /
    ln(1 - p_z) (Hayes et al. 2025, arXiv 2410.19482); at least 1. inf where the scheme never draws it. p in (0, 1).
    """
    log_p = np.minimum(np.asarray(log_p_n, np.float64), 0.0)
    with np.errstate(divide="ignore"):
        # ln of -ln(1 - p_z), which is p_z itself where p_z is too small to be told from it.
        rate = np.where(log_p < -35, log_p, np.log(-np.log1p(-np.exp(np.maximum(log_p, -35.0)))))
    return np.maximum((np.log(-np.log1p(-p)) - rate) / np.log(10), 0.0)
