"""`lmjax analyze loops`: greedy continuations by every checkpoint of a run, and how many of them end in a cycle.

What lives here: prompts, checkpoints, tables and the page. Finding cycles is `lmjax.evals.loops`.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.analyze.output import read_files, say, short, writable, write_json, write_text
from lmjax.analyze.page import figure, html_table, page
from lmjax.checkpoint import CheckpointConfig, Checkpoints
from lmjax.data import prepare_all
from lmjax.decode.generate import Completion, complete
from lmjax.decode.processors import SampleConfig
from lmjax.errors import ConfigError, DataError
from lmjax.evals.loops import repeated_ngram, seq_rep, summarise, tail_cycle
from lmjax.interop.load import Opened, open_model, what_is
from lmjax.models import Decoder
from lmjax.report.charts import Series, escape, line_chart
from lmjax.runs import all_devices
from lmjax.state import random_params

KINDS = ("text", "random", "ngrams")
RANDOM_TOKENS, NGRAM_TOKENS, NEW = 10, 100, 1000  # of the protocol
Prompts = dict[str, list[np.ndarray]]


def loops(options: argparse.Namespace) -> None:
    """The command, its arguments parsed. Raises ConfigError, DataError or CheckpointError for what is wrong."""
    writable(options.json, options.html)
    steps = _steps(options.model, options.steps)
    opened = open_model(options.model, mesh=all_devices(), step=max(steps))
    prompts, references = make_prompts(opened, options)
    room = opened.config.max_seq_len - max(len(p) for rows in prompts.values() for p in rows)
    new = options.new or min(NEW, room)
    if new > room or new < 1:
        raise ConfigError(f"--new {new}: prompts of {opened.config.max_seq_len - room} tokens and these make more than "
                          f"the model's max_seq_len={opened.config.max_seq_len}; lower it, or --prompt-tokens")
    trained = f", trained on rows of {opened.run.seq_len:,}" if opened.run else ""
    say(f"--- {opened.path}: {sum(map(len, prompts.values()))} prompts, {new:,} new tokens each, greedy; a loop is a "
        f"cycle {options.repeats} times round at the end{trained} ---")
    rows = []
    for step, checkpoint in _checkpoints(opened, steps):
        for kind, written in continue_all(checkpoint, prompts, new).items():
            found = summarise([done.tokens for done in written], options.repeats, options.max_period)
            ended = float(np.mean([done.finish == "stop" for done in written]))
            rows.append({"step": step, "kind": kind, **found, "ended": ended, "continuations": [
                _told(opened, prompt, done, options) for prompt, done in zip(prompts[kind], written, strict=True)]})
            say(_line(rows[-1], heading=len(rows) == 1))
    reference = [seq_rep(ids[:new]) for ids in references if len(ids) >= min(new, 64)]
    if reference:
        say(f"\nseq-rep-4 of the text itself, after the same prompts: {np.mean(reference):.3f}")
    settings = {"model": str(opened.path), "new": new, "repeats": options.repeats, "max_period": options.max_period,
                "seed": options.seed, "seq_rep_of_text": float(np.mean(reference)) if reference else None}
    if options.json:
        write_json(options.json, settings | {"results": rows})
    if options.html:
        write_text(options.html, loops_page(settings, rows))


def _steps(path: str, wanted: str) -> list[int]:
    """The checkpoints to ask, in order; 0 is also what a model without steps has."""
    if what_is(Path(path)) != "run":
        if wanted:
            raise ConfigError(f"--steps {wanted}: {path} is no training run, so it has no steps; leave it out")
        return [0]
    with Checkpoints(Path(path) / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        there = sorted(checkpoints.steps())
    if not wanted:
        return [0, *there]
    try:
        steps = sorted({int(step) for step in wanted.split(",")})
    except ValueError:
        raise ConfigError(f"--steps {wanted}: give whole numbers with commas between") from None
    if missing := [step for step in steps if step not in (0, *there)]:
        raise ConfigError(f"--steps {wanted}: there is no checkpoint of step {missing[0]}; there are {there}, and 0, "
                          "the initial weights")
    return steps


def _checkpoints(opened: Opened, steps: list[int]) -> Iterator[tuple[int, Opened]]:
    """Each step with its weights; those of step 0 are made as training made them."""
    if opened.run is None:
        yield 0, opened
        return
    for step in steps:
        if step:
            yield step, (opened if step == opened.step else open_model(opened.path, mesh=opened.mesh, step=step))
        elif opened.run.init_from:
            say(f"step 0 is left out: the run began with the weights of {opened.run.init_from}")
        else:
            build = functools.partial(Decoder, opened.run.model, compute=opened.run.compute)
            params = random_params(build, opened.mesh, opened.run.seed)
            yield 0, Opened(opened.path, opened.config, opened.graphdef, params, opened.mesh, opened.tokenizer,
                            opened.prefix_ids, opened.run, {"step": 0})


# ---- prompts ---------------------------------------------------------------------------------------------------


def make_prompts(opened: Opened, options: argparse.Namespace) -> tuple[Prompts, list[np.ndarray]]:
    """({kind: prompts}, what follows the prompts of kind text, where it is known)."""
    opened.encode("")  # says it now if there is no tokenizer
    own = bool(options.prompt or options.file)
    kinds = options.kinds.split(",") if options.kinds else [k for k in KINDS if k != "text" or own or opened.run]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"--kinds {options.kinds}: {unknown[0]!r} is not known; choose of {', '.join(KINDS)}")
    if own and "text" not in kinds:
        raise ConfigError("--prompt and --file have no effect without --kinds text; leave them out")
    if "text" in kinds and not own and not opened.run:
        raise ConfigError(f"--kinds text: {opened.path} is no training run, so it held no text out; give --prompt or "
                          "--file")
    rng, prefix = np.random.default_rng(options.seed), np.array(opened.prefix_ids, np.int32)
    ordinary = np.flatnonzero(opened.tokenizer.token_bytes()[:opened.config.vocab_size])
    found: Prompts = {}
    texts: list[np.ndarray] = []
    if "text" in kinds:
        if own:
            texts = [opened.encode(document.text) for document in itertools.islice(
                read_files(options.file), options.prompts)]
        else:
            texts = _held_out(opened, options.prompts, options.prompt_tokens + (options.new or NEW))
        found["text"] = [opened.encode(p) for p in options.prompt] + [ids[:options.prompt_tokens] for ids in texts]
    if "random" in kinds:
        found["random"] = [np.concatenate([prefix, rng.choice(ordinary, RANDOM_TOKENS)]).astype(np.int32)
                           for _ in range(options.prompts)]
    if "ngrams" in kinds:
        found["ngrams"] = [np.concatenate([prefix, repeated_ngram(rng, 1 + i % 4, NGRAM_TOKENS, ordinary)])
                           for i in range(options.prompts)]
    return found, [ids[options.prompt_tokens:] for ids in texts]


def _held_out(opened: Opened, count: int, room: int) -> list[np.ndarray]:
    """Pieces of what the run held out, begun with its bos: first the beginnings of documents spread evenly over it,
    then, while there are too few, from further within, every `room` tokens."""
    corpus = prepare_all(opened.run.data)
    where = [(stream, i) for stream in corpus.tokens("validation") for i in range(stream.documents)]
    if not where:
        raise DataError(f"{opened.path}: its data hold nothing out; give --prompt or --file")
    picked = np.unique(np.arange(count) * len(where) // count).tolist()
    texts = [where[i][0].document(where[i][1])[1:-1] for i in picked]  # without bos and eos
    prefix, pieces, at = np.array(opened.prefix_ids, np.int32), [], 0
    while len(pieces) < count and (left := [text[at:at + room] for text in texts if len(text) > at]):
        pieces += [np.concatenate([prefix, piece]) for piece in left]
        at += room
    return pieces[:count]


def continue_all(opened: Opened, prompts: Prompts, new: int) -> dict[str, list[Completion]]:
    """Greedy continuations of all prompts together, by kind."""
    flat = [prompt for rows in prompts.values() for prompt in rows]
    with jax.set_mesh(opened.mesh):
        written = complete(opened.graphdef, opened.params, flat, SampleConfig(new, temperature=0),
                           key=jax.random.key(0), vocab_size=opened.tokenizer.vocab_size,
                           eos_id=opened.tokenizer.eos_id)
    ends = np.cumsum([len(rows) for rows in prompts.values()]).tolist()
    return {kind: written[end - len(prompts[kind]):end] for kind, end in zip(prompts, ends, strict=True)}


# ---- words and pages -------------------------------------------------------------------------------------------


def _told(opened: Opened, prompt: np.ndarray, done: Completion, options: argparse.Namespace) -> dict[str, Any]:
    cycle = tail_cycle(done.tokens, options.repeats, options.max_period)
    return {"prompt": opened.tokenizer.decode(prompt), "text": opened.tokenizer.decode(done.tokens),
            "tokens": len(done.tokens), "ended": done.finish == "stop", "seq_rep": seq_rep(done.tokens),
            "cycle": cycle._asdict() if cycle else None}


HEADING = ("step", "prompts", "looping", "period", "begins at", "seq-rep-4", "ended", "periods")
WIDTHS = (8, 8, 9, 8, 10, 11, 7, 0)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    common = sorted(row["periods"].items(), key=lambda pair: (-pair[1], pair[0]))[:5]
    return (f"{row['step']:,}", row["kind"], f"{row['looping']:.0%}", short(row["period"], 1), short(row["onset"], 0),
            f"{row['seq_rep']:.3f}", f"{row['ended']:.0%}",
            " ".join(f"{period} ({count})" for period, count in common))


def _line(row: dict[str, Any], heading: bool) -> str:
    """One line at a time, so widths are fixed: a checkpoint may take minutes."""
    def line(cells: tuple[str, ...]) -> str:
        return "".join(cell.ljust(w) if i in (1, 7) else cell.rjust(w) + (" " * 2 if i in (0, 6) else "")
                       for i, (cell, w) in enumerate(zip(cells, WIDTHS, strict=True))).rstrip()

    return (line(HEADING) + "\n" if heading else "") + line(_cells(row))


def loops_page(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page: shares and periods by step, the table, and some continuations of the last checkpoint."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))

    def chart(title: str, key: str, log: bool = False) -> str:
        curves = []
        for colour, kind in enumerate(kinds):
            points = [(row["step"], row[key]) for row in rows if row["kind"] == kind and row[key] is not None]
            if points:
                curves.append(Series(f"{kind} prompts", *np.array(points, np.float64).T, colour, "dots"))
        return line_chart(title, curves, log_y=log, zero=not log)

    charts = (figure("Looping continuations", "share", chart("Looping", "looping"))
              + figure("Length of the cycle", "tokens, median, logarithmic", chart("Period", "period", log=True))
              + figure("Where the cycle begins", "token of the continuation, median", chart("Onset", "onset"))
              + figure("seq-rep-4", "share of 4-grams that occurred before", chart("seq-rep-4", "seq_rep")))
    last = max(row["step"] for row in rows)
    shown = [(row["kind"], one) for row in rows if row["step"] == last for one in row["continuations"][:2]]
    examples = "".join(
        f"<h3>{kind} prompt, {_in_words(one)}</h3><pre><b>{escape(one['prompt'][-300:])}</b>"
        f"{escape(one['text'][:700])}</pre>" for kind, one in shown)
    of_text = settings["seq_rep_of_text"]
    note = "" if of_text is None else f" seq-rep-4 of the text itself, after the same prompts: {of_text:.3f}."
    body = f"""<header><h1>Loops</h1><p>{escape(settings['model'])}: greedy continuations of {settings['new']:,} tokens;
a loop is a cycle {settings['repeats']} times round at the end.{note}</p></header>
<main><div class="charts">{charts}</div><h2>By checkpoint</h2>{html_table([HEADING, *map(_cells, rows)])}
<h2>What step {last:,} writes</h2><div class="card">{examples}</div></main>
<footer>Made with <code>lmjax analyze loops</code>. This file needs no network and can be sent as it is.</footer>"""
    return page(f"{settings['model']} · loops", body)


def _in_words(one: dict[str, Any]) -> str:
    cycle = one["cycle"]
    if cycle is None:
        return "ends by itself" if one["ended"] else "no loop"
    return f"{cycle['repeats']} times round {cycle['period']} tokens, from token {cycle['onset']} on"
