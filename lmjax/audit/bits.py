"""Memorisation in bits: how much shorter the model's code of a document is than a code that does not know it.

What lives here: code lengths. A model with probabilities p codes a text in -log2 p(text) bits by arithmetic coding, to
within two bits. NumPy only.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmjax.audit.intervals import bootstrap_mean
from lmjax.audit.texts import Text


def code_bits(surprisal: np.ndarray, tokens: int, vocab_size: int) -> float:
    """-log2 p of a document of `tokens` tokens. Where its first token was given and not predicted, it costs log2 of the
    vocabulary."""
    missing = tokens - len(surprisal)
    return float(surprisal.sum(dtype=np.float64) / np.log(2) + missing * np.log2(vocab_size))


def unintended(bits: np.ndarray, reference_bits: np.ndarray) -> np.ndarray:
    """max(0, log2 p(x | model) - log2 p(x | reference)): unintended memorisation of each sample in bits (Morris et al.
    2025, arXiv 2505.24832, section 2). The sum over samples is a lower bound of what the model holds of them together.
    """
    return np.maximum(reference_bits - bits, 0.0)


def bits_rows(texts: Sequence[Text], sizes: Sequence[int], surprisals: Sequence[np.ndarray], vocab_size: int,
              reference: Sequence[np.ndarray] | None = None) -> list[dict[str, Any]]:
    """One row a document. sizes: its tokens."""
    rows = []
    for i, (text, n) in enumerate(zip(texts, sizes, strict=True)):
        data = text.text.encode("utf-8", "replace")
        row = {"name": text.name, "count": text.count, "tokens": int(n), "bytes": len(data),
               "bits": code_bits(surprisals[i], n, vocab_size), "zlib_bits": 8 * len(zlib.compress(data, 9))}
        row["ratio_to_zlib"] = row["bits"] / row["zlib_bits"]
        if reference is not None:
            row["reference_bits"] = code_bits(reference[i], n, vocab_size)
            row["unintended_bits"] = float(unintended(np.array(row["bits"]), np.array(row["reference_bits"])))
        rows.append(row)
    return rows


def bits_summary(rows: Sequence[Mapping[str, Any]], parameters: int, seed: int = 0) -> dict[str, Any]:
    """Totals, and means a document with intervals. unintended_bits_per_parameter: their sum over the documents that
    were looked at, so a lower bound of what the model holds of its training data."""
    total = {key: sum(row[key] for row in rows) for key in ("tokens", "bytes", "bits", "zlib_bits")}
    found: dict[str, Any] = {"documents": len(rows), **total, "bits_per_byte": total["bits"] / max(total["bytes"], 1),
                             "zlib_bits_per_byte": total["zlib_bits"] / max(total["bytes"], 1),
                             "ratio_to_zlib": total["bits"] / max(total["zlib_bits"], 1)}
    if rows and "unintended_bits" in rows[0]:
        each = np.array([row["unintended_bits"] for row in rows])
        found |= {"unintended_bits": float(each.sum()), "unintended_bits_mean": float(each.mean()),
                  "unintended_bits_mean_95": bootstrap_mean(each, np.arange(len(each)), seed),
                  "unintended_bits_per_parameter": float(each.sum() / parameters),
                  "reference_bits": sum(row["reference_bits"] for row in rows)}
    return found
