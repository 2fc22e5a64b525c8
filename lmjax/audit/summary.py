"""From the passes to the numbers of a report: one row a probe, then shares and means with intervals. NumPy only.

What lives here: reductions. `exact` and `divergence` come from the ranks of the teacher-forced pass: a greedy
continuation is the suffix where every token has rank 0, and leaves it at the first one that has not. ROUGE-L, the
longest run and the type-token ratio need the continuation itself, so they are known of probes that were `written`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.audit import metrics
from lmjax.audit.intervals import bootstrap_mean, wilson
from lmjax.audit.probes import Probes
from lmjax.audit.store import Arrays
from lmjax.data import Tokenizer
from lmjax.evals.score import SAMPLED

DRAWS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
CHANCES = (0.1, 0.5, 0.9)
BINS = np.linspace(0, 1, 21)  # of ROUGE-L
MEANS = ("rouge_l", "rouge_l_words", "longest_run", "divergence", "ttr")


def probe_columns(probes: Probes, found: Arrays, tokenizer: Tokenizer) -> Arrays:
    """One number a probe: exact, divergence, nats (of the suffix), log_p (ln of the probability that the scheme draws
    it), and of those that were written, else NaN: rouge_l = LCS / S, rouge_l_words (F1), longest_run (tokens), ttr of
    the continuation, truth_ttr, and base_rouge_l, base_rouge_l_words, base_longest_run, base_exact against the suffix
    of another document."""
    S, n = probes.config.suffix, len(probes.probes)
    truth = np.stack([probes.suffix(probe) for probe in probes.probes])
    likeliest = found["rank"] == 0
    out = {"exact": likeliest.all(axis=1), "divergence": metrics.divergence(likeliest),
           "nats": found["surprisal"].sum(axis=1, dtype=np.float64),
           "log_p": found[SAMPLED].sum(axis=1, dtype=np.float64), "truth_ttr": metrics.type_token_ratio(truth)}
    for key in ("in_beams", "best_beam"):
        if key in found:
            out[key] = found[key]
    written = np.flatnonzero(found["written"])
    greedy = found["greedy"][written]

    def spread(values: np.ndarray) -> np.ndarray:
        column = np.full(n, np.nan)
        column[written] = values
        return column

    for key in ("greedy_exact", "rouge_l", "rouge_l_words", "longest_run", "ttr", "base_rouge_l", "base_rouge_l_words",
                "base_longest_run", "base_exact"):
        out[key] = np.full(n, np.nan)
    if not len(written):
        return out
    said = [tokenizer.decode(row[row != metrics.PAD]) for row in greedy]
    meant = [tokenizer.decode(row) for row in truth[written]]
    out["greedy_exact"] = spread((greedy == truth[written]).all(axis=1))
    out["rouge_l"] = spread(metrics.lcs(greedy, truth[written]) / S)
    out["rouge_l_words"] = spread(metrics.rouge_words(said, meant))
    out["longest_run"] = spread(metrics.longest_run(greedy, truth[written]))
    out["ttr"] = spread(metrics.type_token_ratio(greedy))
    other = metrics.other_document(np.array([probes.probes[i].document for i in written]))
    if other is not None:
        out["base_rouge_l"] = spread(metrics.lcs(greedy, truth[written][other]) / S)
        out["base_rouge_l_words"] = spread(metrics.rouge_words(said, [meant[i] for i in other]))
        out["base_longest_run"] = spread(metrics.longest_run(greedy, truth[written][other]))
        out["base_exact"] = spread((greedy == truth[written][other]).all(axis=1))
    return out


# ---- tables ------------------------------------------------------------------------------------------------


def extraction(probes: Probes, columns: Arrays, seed: int = 0) -> dict[str, Any]:
    """Everything about one model: overall, by prefix length, offset, count, source and position, how long
    continuations stay verbatim, the histogram of ROUGE-L, and shares by the number of draws."""
    count = np.array([probes.texts[probe.document].count for probe in probes.probes])
    documents = np.array([probe.document for probe in probes.probes])
    axes = {"prefix": np.array([probe.prefix for probe in probes.probes]),
            "offset": np.array([probe.offset for probe in probes.probes]), "count": count,
            "position": np.array([probe.start for probe in probes.probes]) - max(probes.config.prefixes)}
    every = np.ones(len(documents), bool)
    out: dict[str, Any] = {"overall": _cell(columns, every, documents, seed)}
    for name, values in axes.items():
        out[f"by_{name}"] = [{name: int(value)} | _cell(columns, values == value, documents, seed)
                             for value in np.unique(values)]
    sources = np.array([probes.texts[probe.document].source for probe in probes.probes])
    out["by_source"] = [{"source": str(value)} | _cell(columns, sources == value, documents, seed)
                        for value in np.unique(sources)] if len(np.unique(sources)) > 1 else []
    S = probes.config.suffix
    out["survival"] = [float((columns["divergence"] >= t).mean()) for t in range(S + 1)]
    out["rouge_l_histogram"] = _histogram(columns["rouge_l"])
    out["draws"] = draws(columns["log_p"])
    return out


def _histogram(values: np.ndarray) -> list[float] | None:
    values = values[np.isfinite(values)]
    return (np.histogram(values, BINS)[0] / len(values)).tolist() if len(values) else None


def draws(log_p: np.ndarray) -> dict[str, Any]:
    """(n, p)-discoverable extraction: by chance p, the share of probes that n draws extract, for each n of DRAWS; and
    `possible`, the share that the scheme draws at all."""
    found: dict[str, Any] = {"n": list(DRAWS), "possible": float(np.isfinite(log_p).mean())}
    for p in CHANCES:
        needed = metrics.log10_draws(log_p, p)
        found[f"p={p:g}"] = [float((needed <= np.log10(n) + 1e-12).mean()) for n in DRAWS]
    return found


def _cell(columns: Arrays, where: np.ndarray, documents: np.ndarray, seed: int) -> dict[str, Any]:
    """Of some probes: shares with Wilson intervals, means with bootstrapped ones (whole documents drawn)."""
    n = int(where.sum())
    cell: dict[str, Any] = {"probes": n, "documents": len(np.unique(documents[where]))}
    for key in ("exact", "in_beams", "best_beam"):
        if key in columns:
            hits = int(columns[key][where].sum())
            cell |= {key: hits / n, f"{key}_probes": hits, f"{key}_95": wilson(hits, n)}
    for key in (*MEANS, *(f"base_{name}" for name in ("exact", *MEANS[:3])), "truth_ttr"):
        if key not in columns:
            continue
        values = columns[key][where].astype(np.float64)
        known = np.isfinite(values)
        cell[key] = float(values[known].mean()) if known.any() else None
        if key in MEANS and known.any():
            cell[f"{key}_95"] = bootstrap_mean(values[known], documents[where][known], seed)
    cell["written"] = int(np.isfinite(columns["rouge_l"][where]).sum())
    return cell


def by_document(probes: Probes, columns: Arrays) -> list[int]:
    """Indices of probes, the most extracted first: verbatim, then by how far they got, then by probability."""
    order = np.lexsort((np.where(np.isfinite(columns["log_p"]), -columns["log_p"], np.inf), columns["nats"],
                        -columns["divergence"]))
    return order.tolist()


def csv_rows(probes: Probes, model: Arrays, control: Arrays | None) -> tuple[list[str], list[Sequence[Any]]]:
    """(names, rows) of audit.csv: one row a probe, the control's columns after the model's."""
    keys = [key for key in model if not (key.startswith("base_") and np.isnan(model[key]).all())]
    theirs = [key for key in keys if control is not None and key in control and key != "truth_ttr"]
    names = ["document", "source", "count", "position", "prefix", "offset", *keys,
             "log10_draws_at_0.5", *(f"control_{key}" for key in theirs)]
    needed = metrics.log10_draws(model["log_p"], 0.5)
    rows = []
    for i, probe in enumerate(probes.probes):
        text = probes.texts[probe.document]
        rows.append([text.name, text.source, text.count, probe.start - max(probes.config.prefixes), probe.prefix,
                     probe.offset, *(_short(model[key][i]) for key in keys), _short(needed[i]),
                     *(_short(control[key][i]) for key in theirs)])
    return names, rows


def _short(value: Any) -> Any:
    """A number for a table: whole ones as they are, others with eight digits, "" for NaN."""
    if isinstance(value, np.bool_ | bool):
        return int(value)
    if isinstance(value, np.integer | int):
        return int(value)
    return "" if np.isnan(value) else f"{value:.8g}"
