"""Membership inference: how well a score tells documents that were trained on from others of the same kind.

What lives here: the attacks, each one number a document from its tokens' numbers (a higher one says "member"), and the
table of their success with intervals. What does not: the pass that gives the numbers, and the attack that looks at no
model at all (`lmjax.audit.blind`), without which a difference between the two lists would pass for memory.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmjax.audit.blind import blind_scores
from lmjax.audit.intervals import bootstrap_pairs, tpr_at_fpr
from lmjax.evals.ranking import auc

MIN_K = 0.2  # share of tokens that Min-K % looks at
RATES = (0.01, 0.001)
NAMES = {
    "loss": "loss", "zlib": "total loss / zlib bytes", "zlib_mean": "mean loss / zlib bytes", "reference": "reference",
    "min_k": "Min-K %", "min_k_pp": "Min-K %++", "recall": "ReCaLL",
    "blind": "blind: character n-grams", "length": "blind: length",
}
BLIND = ("blind", "length")
Stats = Mapping[str, np.ndarray]


def lowest_mean(values: np.ndarray, share: float = MIN_K) -> float:
    """Mean of the lowest share of values, of at least one of them."""
    count = max(1, int(len(values) * share))
    return float(np.partition(values, count - 1)[:count].mean(dtype=np.float64))


def attack_scores(stats: Sequence[Stats], texts: Sequence[str], reference: Sequence[Stats] | None = None,
                  recall: Sequence[Stats] | None = None) -> dict[str, np.ndarray]:
    """{attack: float64 [documents]}.

    stats: `surprisal` s = -ln p and `normalised` z of each token, at least one a document. reference: the same under
    another model. recall: the same of the first tokens, as many as there are, read after a prefix of non-members.

        loss       -mean s                                   Yeom et al. 2018
        zlib       -(sum s) / bytes of zlib's compression    Carlini et al. 2021
        zlib_mean  -(mean s) / bytes of zlib's compression   as mimir (Duan et al. 2024) has it
        reference  mean s under the reference - mean s       Carlini et al. 2021
        min_k      mean of the lowest 20 % of -s             Shi et al. 2024
        min_k_pp   mean of the lowest 20 % of -z             Zhang et al. 2024
        recall     (mean s after the prefix) / (mean s)      Xie et al. 2024
    """
    mean = np.array([one["surprisal"].mean(dtype=np.float64) for one in stats])
    total = np.array([one["surprisal"].sum(dtype=np.float64) for one in stats])
    packed = np.array([len(zlib.compress(text.encode("utf-8", "replace"))) for text in texts])
    found = {"loss": -mean, "zlib": -total / packed, "zlib_mean": -mean / packed}
    if reference is not None:
        found["reference"] = np.array([one["surprisal"].mean(dtype=np.float64) for one in reference]) - mean
    found["min_k"] = np.array([lowest_mean(-one["surprisal"]) for one in stats])
    found["min_k_pp"] = np.array([lowest_mean(-one["normalised"]) for one in stats])
    if recall is not None:
        after = np.array([one["surprisal"].mean(dtype=np.float64) for one in recall])
        alone = np.array([one["surprisal"][:len(other["surprisal"])].mean(dtype=np.float64)
                          for one, other in zip(stats, recall, strict=True)])
        found["recall"] = after / np.maximum(alone, 1e-12)
    return found


def attack_table(members: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray], member_texts: Sequence[str],
                 other_texts: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """One row an attack, those of BLIND last: auc and tpr at RATES with 95 % intervals by resampling both lists."""
    blind = dict(zip(("members", "others"), blind_scores(member_texts, other_texts, seed), strict=True))
    columns = {name: (members[name], others[name]) for name in members}
    columns["blind"] = blind["members"], blind["others"]
    columns["length"] = tuple(np.array([float(len(text.encode("utf-8", "replace"))) for text in texts])
                              for texts in (member_texts, other_texts))
    rows = []
    for name, (yes, no) in columns.items():
        row: dict[str, Any] = {"attack": name, "auc": auc(yes, no), "auc_95": bootstrap_pairs(auc, yes, no, seed)}
        for rate in RATES:
            def tpr(a, b, rate=rate):
                return tpr_at_fpr(a, b, rate)

            row[f"tpr_at_{rate:g}"] = tpr(yes, no)
            row[f"tpr_at_{rate:g}_95"] = bootstrap_pairs(tpr, yes, no, seed)
        rows.append(row)
    return rows


def blind_warning(rows: Sequence[Mapping[str, Any]]) -> str:
    """What to say where the text alone tells the two lists apart; "" where it does not."""
    seen = [row for row in rows if row["attack"] in BLIND and not row["auc_95"][0] <= 0.5 <= row["auc_95"][1]
            and (row["attack"] != "blind" or row["auc"] > 0.5)]
    if not seen:
        return ""
    what = "; ".join(f"{NAMES[row['attack']]}: AUC {row['auc']:.2f}" for row in seen)
    return (f"members and non-members differ in their text alone ({what}), without any model: the attacks may be "
            "seeing that and not memory; take both lists from one source at random")
