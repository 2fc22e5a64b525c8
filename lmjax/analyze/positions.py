"""`lmjax analyze positions`: loss by position under each way to extend the context of the same weights.

What lives here: rows of text, the table and the page. The losses are `lmjax.evals.positions`.
"""

import argparse
from typing import Any

import jax
import numpy as np

from lmjax.analyze.output import read_files, say, table, writable, write_json, write_text
from lmjax.analyze.page import figure, html_table, page
from lmjax.data import prepare_all
from lmjax.errors import ConfigError, DataError
from lmjax.evals.positions import EXTENSIONS, by_stretch, extended, losses_by_position, restarted, stretches
from lmjax.interop.load import Opened, open_model
from lmjax.report.charts import Series, escape, line_chart
from lmjax.runs import all_devices


def positions(options: argparse.Namespace) -> None:
    """The command, its arguments parsed. Raises ConfigError, DataError or CheckpointError for what is wrong."""
    writable(options.json, options.html)
    opened = open_model(options.model, mesh=all_devices(), step=options.step)
    trained = options.trained or (opened.run.seq_len if opened.run else opened.config.max_seq_len)
    length = round(options.factor * trained)
    ends = stretches(trained, length, options.buckets)
    configs = {kind: extended(opened.config, kind, options.factor, trained, length) for kind in EXTENSIONS}
    rows_RT = _rows(opened, options.file, length, options.rows)
    compute = opened.model().compute
    say(f"--- {opened.name}: {len(rows_RT)} rows of {length:,} tokens, each of one text; trained on {trained:,}; "
        f"factor {options.factor:g}; nats a token ---")
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with jax.set_mesh(opened.mesh):
        common = {"mesh": opened.mesh, "batch_tokens": max(4096, length)}
        anew = restarted(opened.config, compute, opened.params, rows_RT, trained, **common)
        found["restart"] = by_stretch(anew, ends)
        for kind, config in configs.items():
            losses = losses_by_position(config, compute, opened.params, rows_RT, ends, **common)
            found[kind] = by_stretch(losses, ends)
    rows = table_rows(found, ends, trained)
    say(table(rows))
    say(f"\nstandard error over rows: {np.nanmean(found['none'][1]):.3f} on average; all columns read the same tokens")
    settings = {"model": opened.name, "trained": trained, "factor": options.factor, "rows": len(rows_RT), "ends": ends}
    if options.json:
        write_json(options.json, settings | {"units": "nats", "results": {
            kind: {"mean": mean.tolist(), "error": [None if np.isnan(e) else e for e in error.tolist()]}
            for kind, (mean, error) in found.items()}})
    if options.html:
        write_text(options.html, positions_page(settings, found, rows))


def _rows(opened: Opened, files: list[str], length: int, count: int) -> np.ndarray:
    """int32 [R, length + 1]: pieces of texts that are long enough, at most `count`, taken from all of them by turns."""
    if files:
        texts = [opened.encode(document.text) for document in read_files(files)]
    elif opened.run:
        corpus = prepare_all(opened.run.data)
        texts = [stream.document(i) for stream in corpus.tokens("validation") for i in range(stream.documents)]
    else:
        raise ConfigError(f"{opened.path} is no training run, so it held no text out; give --file")
    pieces = [[ids[at:at + length + 1] for at in range(0, len(ids) - length, length)] for ids in texts]
    by_turns = [rows[k] for k in range(max(map(len, pieces), default=0)) for rows in pieces if k < len(rows)]
    if not by_turns:
        raise DataError(f"no text has {length + 1:,} tokens (the longest has {max(map(len, texts), default=0):,}); "
                        "give longer texts with --file, or a smaller --factor")
    return np.stack(by_turns[:count])


def table_rows(found: dict[str, tuple[np.ndarray, np.ndarray]], ends: list[int], trained: int) -> list[list[str]]:
    """A heading, a line for each stretch, and one for all tokens beyond the trained length."""
    starts = np.array([0, *ends[:-1]])
    sizes = np.where(np.array(ends) > trained, np.array(ends) - starts, 0)
    return [["position", *found]] + [
        [f"{a:,} to {b - 1:,}", *(f"{mean[i]:.3f}" for mean, _ in found.values())]
        for i, (a, b) in enumerate(zip(starts, ends, strict=True))
    ] + [[f"from {starts[sizes > 0].min():,} on", *(f"{mean @ sizes / sizes.sum():.3f}" for mean, _ in found.values())]]


def positions_page(settings: dict[str, Any], found: dict[str, tuple[np.ndarray, np.ndarray]],
                   rows: list[list[str]]) -> str:
    """The page: one chart and the table."""
    at = np.array(settings["ends"], np.float64)
    curves = [Series(kind, at, mean, 7, "dash") if kind == "restart" else Series(kind, at, mean, colour - 1, "dots")
              for colour, (kind, (mean, _)) in enumerate(found.items())]
    chart = line_chart("Loss by position", curves, x_label="position", marks=[settings["trained"]])
    body = f"""<header><h1>Loss by position</h1><p>{escape(settings['model'])}: {settings['rows']} rows of
{settings['ends'][-1]:,} tokens, trained on {settings['trained']:,} (dotted line), factor {settings['factor']:g};
the same weights throughout</p></header>
<main>{figure("Loss", "nats a token, at the end of each stretch of positions", chart).replace(
        "<figure>", '<figure class="hero">')}<h2>By stretch</h2>{html_table(rows)}</main>
<footer>restart: the context begins anew every {settings['trained']:,} tokens. Made with
<code>lmjax analyze positions</code>. This file needs no network and can be sent as it is.</footer>"""
    return page(f"{settings['model']} · loss by position", body)
