"""How well a score tells two lists apart. NumPy only; thresholds and intervals stand with those who use them."""

import numpy as np


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties half: Mann and Whitney's U / (m n)."""
    ordered = np.sort(negatives)
    below, upto = np.searchsorted(ordered, positives, "left"), np.searchsorted(ordered, positives, "right")
    return float((below + upto).mean() / 2 / len(ordered))
