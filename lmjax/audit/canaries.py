"""`lmjax audit exposure`: how much of its canaries a run remembers, by how often it was trained on them.

What lives here: the order of things: scoring each canary beside its candidates, the table, the files. The arithmetic is
`lmjax.audit.exposure`, the page `lmjax.audit.canary_page`, what canaries are `lmjax.data.canaries`.

A canary is scored as it stood in training, bos to eos, and so is each candidate: the same text with another secret. The
code length of the whole is compared, as in the paper: that of the secret alone would depend on where tokens end.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
from typing import Any

import jax
import numpy as np

from lmjax.analyze.output import Progress, say, short, table
from lmjax.audit import passes
from lmjax.audit.canary_page import canary_page
from lmjax.audit.exposure import CHANCE, Fit, exact_exposure, fit_skew_normal, fitted_exposure, sampled_exposure
from lmjax.audit.intervals import bootstrap_mean, wilson
from lmjax.audit.store import Arrays, Parts, weights_hash
from lmjax.config import injection
from lmjax.data import Canary, Injection
from lmjax.data.canaries import other_secrets, written
from lmjax.errors import CheckpointError, ConfigError
from lmjax.evals.score import score_documents
from lmjax.evals.spans import token_spans
from lmjax.evals.windows import WindowConfig
from lmjax.interop.load import Opened
from lmjax.records import plain, replace_file

FORMAT = 1


def exposure(options: argparse.Namespace) -> dict[str, Any]:
    """The command, its arguments parsed; gives what exposure.json holds. Raises ConfigError, DataError or
    CheckpointError for what is wrong, before anything is compiled or written."""
    model, canaries = _asked(options)
    config = canaries.config
    exact = config.secrets <= options.candidates
    identity = plain({"format": FORMAT, "weights_sha256": weights_hash(model.params), "path": model.name,
                      "canaries": dataclasses.asdict(config), "placed": canaries.identity, "seed": options.seed,
                      "candidates": options.candidates, "batch_tokens": options.batch_tokens})
    parts = Parts(options.folder, identity)
    seen = canaries.counts(model.step)
    among = f"all {config.secrets:,} secrets" if exact else f"{options.candidates:,} of {config.secrets:.4g} secrets"
    say(f"--- {model.name} ---\n{len(canaries.canaries):,} canaries, each ranked among {among}")
    notes = []
    if model.step < canaries.steps:
        notes.append(f"step {model.step:,} of {canaries.steps:,}: {int(seen.sum()):,} of {config.occurrences:,} "
                     "occurrences are past")
    if 0 not in config.repeats:
        notes.append("warning: data.canaries.repeats has no 0, so no canary tells what the model says of a text "
                     f"that it never saw; by chance that is {CHANCE:.2f} bits")
    for note in notes:
        say(note)
    scored = score_canaries(model, canaries, options, parts)
    rows = [_row(model.tokenizer, canaries, i, int(seen[i]), scored[i], exact) for i in range(len(scored))]
    found = {"format": FORMAT, "identity": identity, "model": model.name, "secrets": config.secrets, "exact": exact,
             "ceiling": math.log2(config.secrets), "chance": CHANCE, "notes": notes,
             "by_count": by_count(rows, options.seed), "canaries": rows}
    if not exact:
        found["sample_ceiling"] = math.log2(options.candidates + 1)
    _write(options, found)
    return found


def _asked(options: argparse.Namespace) -> tuple[Opened, Injection]:
    model = passes.open_audited(options.run, options.step)
    if model.run is None:
        raise ConfigError(f"{options.run}: is no run folder; which canaries a model was trained on is in the config of "
                          "its run")
    if model.run.data.canaries is None:
        raise ConfigError(f"{options.run}: was trained without canaries; set data.canaries in its config, and train it "
                          "anew")
    canaries = injection(model.run, model.tokenizer)
    if model.meta["corpus"].get("canaries") != canaries.identity:
        raise CheckpointError(f"{options.run}: its checkpoint was trained on other canaries than its config.json now "
                              "gives; restore that file from a copy")
    return model, canaries


# ---- scoring ---------------------------------------------------------------------------------------------


def candidates(canaries: Injection, canary: Canary, tokenizer, most: int) -> list[np.ndarray]:
    """The ids, bos and eos included, of the canary with the other secrets that it might have had."""
    texts = [written(canaries.config, canary.name, tuple(secret))[0]
             for secret in other_secrets(canaries.config, canary, most).tolist()]
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    return [np.concatenate([bos, ids, eos]).astype(np.int32) for ids in tokenizer.encode_batch(texts)]


def score_canaries(model: Opened, canaries: Injection, options: argparse.Namespace, parts: Parts) -> list[Arrays]:
    """Of each canary `rank` int32 [n - 1] of its tokens from the first on, `own` and `others` [m]: code lengths in bits
    of the whole text, with its own secret and with the others; where those are a sample also `fit`, a Fit."""
    out = []
    each = min(canaries.config.secrets, options.candidates + 1)
    progress, done = Progress("candidates,", each * sum(map(len, canaries.ids))), 0
    for canary, ids in zip(canaries.canaries, canaries.ids, strict=True):
        part = parts.get(canary.id)
        if part is None:
            texts = [ids, *candidates(canaries, canary, model.tokenizer, options.candidates)]
            width = -(-max(map(len, texts)) // 8) * 8  # of a few sizes, since each is compiled
            windows = WindowConfig(min(width, model.config.max_seq_len), 0, options.batch_tokens)
            bits = np.zeros(len(texts))
            with jax.set_mesh(model.mesh):
                for i, stats in enumerate(score_documents(model.graphdef, model.params, texts, windows,
                                                          mesh=model.mesh)):
                    bits[i] = stats["surprisal"].sum(dtype=np.float64) / math.log(2)
                    if i == 0:
                        rank = stats["rank"]
                    done += len(texts[i])
                    progress(done)
            part = {"rank": rank, "own": bits[0], "others": bits[1:]}
            if canaries.config.secrets > options.candidates:
                part["fit"] = np.array(fit_skew_normal(bits[1:]))
            parts.put(canary.id, part)
        else:
            done += each * len(ids)
        out.append(part)
    progress.clear()
    return out


# ---- numbers ---------------------------------------------------------------------------------------------


def secret_tokens(tokenizer, canary: Canary, ids: np.ndarray) -> slice:
    """Which tokens of a canary (bos first) hold its secret; the first and the last may hold more."""
    spans = token_spans(tokenizer, ids[1:-1], canary.text)
    ends = spans.starts + np.array([len(piece) for piece in spans.pieces])
    within = np.flatnonzero((ends > canary.start) & (spans.starts < canary.stop))
    return slice(int(within[0]) + 1, int(within[-1]) + 2)


def _row(tokenizer, canaries: Injection, i: int, seen: int, scored: Arrays, exact: bool) -> dict[str, Any]:
    """Everything about one canary. extracted: every token of the secret is the model's likeliest one, given what stands
    before: greedy decoding writes it."""
    canary, own, others = canaries.canaries[i], float(scored["own"]), scored["others"]
    secret = secret_tokens(tokenizer, canary, canaries.ids[i])
    row = {"id": canary.id, "count": canary.count, "seen": seen, "text": canary.text,
           "secret": canary.text[canary.start:canary.stop], "bits": own, "least_other_bits": float(others.min()),
           "extracted": bool((scored["rank"][secret.start - 1:secret.stop - 1] == 0).all())}
    if exact:
        return row | {"exposure": exact_exposure(own, others)}
    fit = Fit(*scored["fit"].tolist())
    return row | {"exposure": fitted_exposure(own, fit, canaries.config.secrets),
                  "exposure_sampled": sampled_exposure(own, others), "fit": fit._asdict()}


def by_count(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Of each count: means with bootstrapped intervals over canaries, and the share that greedy decoding writes."""
    out = []
    for count in sorted({row["count"] for row in rows}):
        part = [row for row in rows if row["count"] == count]
        hits = sum(row["extracted"] for row in part)
        cell = {"count": count, "canaries": len(part), "seen": sum(row["seen"] for row in part) / len(part),
                "extracted": hits / len(part), "extracted_95": wilson(hits, len(part))}
        for key in ("exposure", "exposure_sampled"):
            if key in part[0]:
                values = np.array([row[key] for row in part])
                cell |= {key: float(values.mean()), f"{key}_95": bootstrap_mean(values, np.arange(len(part)), seed)}
        if "fit" in part[0]:
            cell["fit_distance"] = float(np.median([row["fit"]["distance"] for row in part]))
        out.append(cell)
    return out


# ---- what comes out --------------------------------------------------------------------------------------


def _write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    names = ["id", "count", "seen", "secret", "exposure", "exposure_sampled", "extracted", "bits", "least_other_bits",
             "fit_distance", "fit_p"]
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(names)
    for row in found["canaries"]:
        fit = row.get("fit", {})
        writer.writerow([row.get(name, "") for name in names[:-2]] + [fit.get("distance", ""), fit.get("p", "")])
    # `lmjax audit RUN --data canaries.jsonl` takes this: verbatim extraction by how often a text was seen.
    texts = [{"text": row["text"], "id": row["id"], "count": row["seen"]} for row in found["canaries"]]
    say()
    say(table(told(found)))
    say(f"ceiling {found['ceiling']:.2f} bits; never seen, by chance: {found['chance']:.2f}")
    for name, text in (("exposure.csv", lines.getvalue()), ("exposure.html", canary_page(found, told(found))),
                       ("canaries.jsonl", "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)),
                       ("exposure.json", json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n")):
        replace_file(options.folder / name, text.encode())
        say(f"wrote {options.folder / name}")


def told(found: dict[str, Any]) -> list[list[str]]:
    """The table of the terminal and of the page."""
    sampled, unfinished = not found["exact"], any(cell["seen"] != cell["count"] for cell in found["by_count"])
    rows = [["in the run", *(["so far"] if unfinished else []), "canaries", "exposure, bits", "95 %",
             *(["by sample", "95 %", "fit's distance"] if sampled else []), "extracted", "95 %"]]
    for cell in found["by_count"]:
        rows.append([
            f"{cell['count']:,} x", *([short(cell["seen"], 1)] if unfinished else []), str(cell["canaries"]),
            short(cell["exposure"], 2), _range(cell["exposure_95"]),
            *([short(cell["exposure_sampled"], 2), _range(cell["exposure_sampled_95"]), short(cell["fit_distance"])]
              if sampled else []),
            f"{cell['extracted']:.0%}", "{:.0%}–{:.0%}".format(*cell["extracted_95"])])
    return rows


def _range(pair: tuple[float, float]) -> str:
    return "{:.2f}–{:.2f}".format(*pair)
