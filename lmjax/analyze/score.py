"""`lmjax score`: texts through `lmjax.evals.score`, and what came out as tables, JSON, CSV and a page.

What lives here: the command, words and files. The stream of scored texts is `lmjax.analyze.scored`, the page
`lmjax.analyze.heatmap`.
"""

import argparse
import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.analyze.heatmap import PAGE_TOKENS, write_page
from lmjax.analyze.output import Progress, read_files, say, short, table, visible, writable
from lmjax.analyze.scored import Scored, context_of, most_surprising, scored_texts, shown, window_of
from lmjax.data import Document
from lmjax.errors import DataError
from lmjax.evals.score import STATS, Stats, Totals
from lmjax.evals.windows import WindowConfig
from lmjax.interop.load import Opened, open_model
from lmjax.runs import all_devices

SHORT = 120  # tokens: a text up to this gets a line for each of them
COLUMNS = ("surprisal", "entropy", "varentropy", "normalised", "rank")


def score(options: argparse.Namespace) -> None:
    """The command, its arguments parsed. Raises ConfigError, DataError or CheckpointError for what is wrong."""
    writable(options.html, options.json, options.csv)
    opened = open_model(options.model, mesh=all_devices(), step=options.step)
    windows = window_of(opened, options.context, options.stride)
    windows.check(opened.config.max_seq_len)
    top = min(options.top, opened.config.vocab_size) if options.html or options.json else 0
    say(f"--- {opened.name} ---")
    totals, summary, kept = Totals(), [], []
    progress = Progress("scored", options.limit)
    with contextlib.ExitStack() as files:
        write_csv = files.enter_context(_csv(options.csv)) if options.csv else None
        write_json = files.enter_context(_json(options.json, opened, windows, totals)) if options.json else None
        for done in scored_texts(opened, _texts(options), windows, top, options.limit, progress):
            if write_csv:
                write_csv(done)
            if write_json:
                write_json(done)
            if not kept or options.html and sum(len(other.ids) for other in kept) < PAGE_TOKENS:
                kept.append(done)
            summary.append((done.name, done.totals))
            totals.add(done.stats, int(done.spans.sizes[done.given:].sum()))
    progress.clear()
    _say_result(opened, windows, totals, summary, kept[0])
    for path in (options.json, options.csv):
        if path:
            say(f"wrote {path}")
    if options.html:
        write_page(options.html, opened.name, opened.tokenizer, kept, totals, windows, len(summary))


def _texts(options: argparse.Namespace) -> Iterator[Document]:
    for number, text in enumerate(options.text, 1):
        if not text:
            raise DataError(f"--text number {number} is empty; leave it out")
        line = " ".join(text.split())
        yield Document(text, f"“{line[:40]}{'…' if len(line) > 40 else ''}”")
    yield from read_files(options.file)


# ---- words -----------------------------------------------------------------------------------------------------


def _say_result(opened: Opened, windows: WindowConfig, totals: Totals, summary: list[tuple[str, Totals]],
                first: Scored) -> None:
    v = totals.values()
    if not v["tokens"]:
        say("nothing was predicted: the first token of a text is given, and there is no other; give more text")
        return
    of = "" if len(summary) == 1 else f" of {len(summary):,} texts"
    say(f"perplexity      {v['perplexity']:,.4g}   ({v['surprisal']:.4f} nats a token, {v['tokens']:,} tokens{of})")
    if v["bits_per_byte"] is not None:
        about = "" if first.spans.exact else "about "
        say(f"bits per byte   {about}{v['bits_per_byte']:.4f}   ({v['bytes']:,} bytes)")
    say(f"entropy         {v['entropy']:.4f} nats expected; normalised surprise {v['normalised']:+.3f} on average")
    say(f"likeliest       {v['top1']:.1%} of tokens are the model's first choice")
    begin = "the first token of a text is given" if first.given else "texts are begun as the model's are"
    say(f"read            {windows.context:,} tokens at a time, stride {windows.stride:,} (so from "
        f"{windows.least_context:,} or more where there are as many); {begin}\n")
    if len(summary) > 1:
        say(_document_table(summary))
    elif len(first.ids) <= SHORT:
        say(_token_table(first))
    else:
        say("most surprising tokens\n" + _surprise_table(first))


def _token_table(done: Scored) -> str:
    rows = [["token", "surprisal", "entropy", "sqrt V", "normalised", "rank"]]
    rows += [[shown(done, i), "", "", "", "", "given"] for i in range(done.given)]
    rows += [[shown(done, i + done.given), *_numbers(done.stats, i)] for i in range(len(done.stats["surprisal"]))]
    return table(rows)


def _numbers(stats: Stats, i: int) -> list[str]:
    return [f"{stats['surprisal'][i]:.3f}", f"{stats['entropy'][i]:.3f}", f"{np.sqrt(stats['varentropy'][i]):.3f}",
            f"{stats['normalised'][i]:+.2f}", f"{stats['rank'][i]:,}"]


def _surprise_table(done: Scored, count: int = 15) -> str:
    rows = [["before", "token", "surprisal", "entropy", "sqrt V", "normalised", "rank"]]
    for i in most_surprising(done, count):
        rows.append([visible(context_of(done, i)[0]).rjust(28), shown(done, i + done.given), *_numbers(done.stats, i)])
    return table(rows, left=2)


def _document_table(summary: list[tuple[str, Totals]], most: int = 40) -> str:
    rows = [["text", "tokens", "perplexity", "nats", "bits/byte", "entropy", "normalised", "first choice"]]
    for name, totals in summary[:most]:
        v = totals.values()
        rows.append([visible(name)[-48:], f"{v['tokens']:,}", short(v["perplexity"], 2), short(v["surprisal"]),
                     short(v["bits_per_byte"]), short(v["entropy"]), short(v["normalised"]),
                     "" if v["top1"] is None else f"{v['top1']:.0%}"])
    more = f"\n… and {len(summary) - most:,} more; --json and --csv have them all" if len(summary) > most else ""
    return table(rows) + more


# ---- files -----------------------------------------------------------------------------------------------------


def _short(values: np.ndarray) -> list:
    """Numbers as JSON takes them: whole ones as they are, others with six digits."""
    if values.dtype.kind == "i":
        return values.tolist()
    return [float(f"{x:.6g}") for x in values.tolist()] if values.ndim == 1 else [_short(row) for row in values]


@contextlib.contextmanager
def _json(path: Path, opened: Opened, windows: WindowConfig, totals: Totals):
    """Gives a function that adds a text; the file is written as they come, and is one JSON object in the end."""
    head = {"model": str(opened.name), "tokenizer": opened.tokenizer.name, "context": windows.context,
            "stride": windows.stride, "least_context": windows.least_context, "units": "nats"}

    def as_object(done: Scored) -> dict[str, Any]:
        tokens: dict[str, Any] = {"id": done.ids.tolist(), "text": done.spans.pieces,
                                  "start": done.spans.starts.tolist(), "bytes": done.spans.sizes.tolist()}
        tokens |= {name: [None] * done.given + _short(value) for name, value in done.stats.items()}
        return {"name": done.name, "exact": done.spans.exact, "totals": done.totals.values(), "tokens": tokens}

    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "texts": [')
        comma = ""

        def add(done: Scored) -> None:
            nonlocal comma
            file.write(f"{comma}\n{json.dumps(as_object(done), ensure_ascii=False)}")
            comma = ","

        yield add
        file.write(f'\n], "totals": {json.dumps(totals.values())}}}\n')


@contextlib.contextmanager
def _csv(path: Path):
    """Gives a function that adds a line for each token of a text; numbers are empty for a given token."""
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["name", "index", "start", "bytes", "id", "text", *COLUMNS, "top_id", "top_logprob"])
        assert {*COLUMNS, "top_id", "top_logprob"} == {*STATS, "normalised"}

        def add(done: Scored) -> None:
            columns = [_short(done.stats[name]) for name in (*COLUMNS, "top_id", "top_logprob")]
            spans = done.spans
            for i, (token, start, size, piece) in enumerate(zip(done.ids, spans.starts, spans.sizes, spans.pieces,
                                                                strict=True)):
                numbers = [column[i - done.given] for column in columns] if i >= done.given else [""] * len(columns)
                lines.writerow([done.name, i, start, size, token, piece, *numbers])

        yield add
