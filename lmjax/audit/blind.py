"""A membership attack that never asks the model: it reads the texts. Better than chance, it says that the two lists of
documents differ, and that any other attack on them may be measuring that (Das et al. 2024, arXiv 2406.16201).

What lives here: naive Bayes over the character n-grams of a text, cross-validated. NumPy only.
"""

from collections.abc import Sequence

import numpy as np

ORDERS = (1, 2, 3, 4)  # bytes of an n-gram
BUCKETS = 2**15
FOLDS = 5
_READ = 20_000  # bytes of each text


def features(text: str) -> np.ndarray:
    """The distinct hashed n-grams of bytes of a text, int64, sorted."""
    data = np.frombuffer(text.encode("utf-8", "replace")[:_READ], np.uint8).astype(np.uint64)
    found = []
    for order in ORDERS:
        if len(data) < order:
            break
        code = np.zeros(len(data) - order + 1, np.uint64)
        for i in range(order):
            code = code * np.uint64(257) + data[i:len(data) - order + 1 + i] + np.uint64(1)
        mixed = (code * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - 15)
        found.append(np.unique(mixed))
    return np.unique(np.concatenate(found)).astype(np.int64) if found else np.zeros(0, np.int64)


def blind_scores(members: Sequence[str], others: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of each text by a model that was fitted to the other folds: (of members, of the others), higher for
    "member". Mean log-odds of a text's n-grams, each counted once a document, add-one smoothed."""
    lists = [[features(text) for text in texts] for texts in (members, others)]
    rng = np.random.default_rng(seed)
    folds = [rng.permutation(len(texts)) % FOLDS for texts in lists]
    scores = [np.zeros(len(texts)) for texts in lists]
    for fold in range(FOLDS):
        log_rates = []
        for texts, fold_of in zip(lists, folds, strict=True):
            seen = [text for text, f in zip(texts, fold_of, strict=True) if f != fold]
            counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *seen]), minlength=BUCKETS)
            log_rates.append(np.log((counts + 1) / (len(seen) + 2)))
        odds = log_rates[0] - log_rates[1]
        for texts, fold_of, score in zip(lists, folds, scores, strict=True):
            for i in np.flatnonzero(fold_of == fold):
                score[i] = odds[texts[i]].mean() if len(texts[i]) else 0.0
    return scores[0], scores[1]
