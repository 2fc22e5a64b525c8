"""One self-contained HTML page from one or several run folders.

What lives here: the sections of the page. What does not: reading a run folder (`lmjax.report.runs`), drawing
charts (`lmjax.report.charts`), CSS and script (`lmjax.report.assets`).

Everything that came from a run is text and is escaped; a content security policy in the page forbids any
script but its own, and any request.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import CheckpointError
from lmjax.records import (
    Record,
    attempts,
    format_bytes,
    format_count,
    format_duration,
)
from lmjax.report.account import account
from lmjax.report.assets import SCRIPT, STYLE
from lmjax.report.charts import NEUTRAL, Series, escape, line_chart
from lmjax.report.runs import Run, differing, read_runs

SAMPLE_STEPS = 12  # steps of samples on the page; metrics.jsonl has them all
SAMPLE_CHARS = 2000


# ---- curves ------------------------------------------------------------------------------------


def _curve(rows: Iterable[Record], key: str, name: str, colour: int, style: str = "line") -> Series | None:
    points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), (int, float))]
    if not points:
        return None
    x, y = np.array(points, np.float64).T
    return Series(name, x, y, colour, style)


def _empty(name: str, colour: int, style: str) -> Series:
    return Series(name, np.zeros(0), np.zeros(0), colour, style)


def _evals(run: Run, key: str, label: str, colour: int | None) -> list[Series | None]:
    rows = run.rows("eval")
    splits = list(dict.fromkeys(str(r.get("split", "eval")) for r in rows))
    return [
        _curve(
            [r for r in rows if str(r.get("split", "eval")) == split],
            key,
            f"{label}{split}",
            2 + 2 * i if colour is None else colour,
            "dots",
        )
        for i, split in enumerate(splits)
    ]


def _loss_curves(runs: Sequence[Run]) -> list[Series]:
    found: list[Series | None] = []
    for i, run in enumerate(runs):
        rows = run.rows("train")
        goldfish = any(r.get("loss_dropped") is not None for r in rows)
        whole = "loss_all" if any(r.get("loss_all") is not None for r in rows) else "loss"
        if len(runs) == 1:
            found.append(_curve(rows, whole, "train, all tokens" if goldfish else "train", 0))
            if goldfish:
                found.append(_curve(rows, "loss_kept", "train, kept tokens", 3))
                found.append(_curve(rows, "loss_dropped", "train, dropped tokens", 1, "dash"))
            found += _evals(run, "loss", "", None)
        else:
            found.append(_curve(rows, whole, f"{run.name} train", i))
            if goldfish:
                found.append(_curve(rows, "loss_dropped", f"{run.name} dropped", i, "dash"))
            found += _evals(run, "loss", f"{run.name} ", i)
    return [s for s in found if s is not None]


def _run_legend(runs: Sequence[Run], curves: Sequence[Series]) -> list[Series] | None:
    """For several runs: a colour for each run, then what the line styles mean."""
    if len(runs) == 1:
        return None
    legend = [_empty(run.name, i, "line") for i, run in enumerate(runs)]
    meanings = {"line": "train", "dash": "train, dropped tokens", "dots": "evaluation"}
    used = [style for style in meanings if any(s.style == style for s in curves)]
    return legend + [_empty(meanings[s], NEUTRAL, s) for s in used if len(used) > 1]


def _simple(runs: Sequence[Run], key: str) -> list[Series]:
    found = [_curve(run.rows("train"), key, run.name, i) for i, run in enumerate(runs)]
    return [s for s in found if s is not None]


def _spiky(curves: Sequence[Series]) -> bool:
    """Whether a linear axis would press most of these curves flat."""
    y = np.concatenate([s.y for s in curves]) if curves else np.zeros(0)
    y = y[np.isfinite(y) & (y > 0)]
    return len(y) > 2 and bool(y.max() > 20 * np.median(y))


def _figure(title: str, unit: str, body: str, kind: str = "") -> str:
    caption = f"<figcaption>{title} <small>{unit}</small></figcaption>"
    return f'<figure class="{kind}">{caption}{body}</figure>'


def _charts(runs: Sequence[Run]) -> str:
    curves = _loss_curves(runs)
    legend = _run_legend(runs, curves)
    resumed = [a[0]["step"] for run in runs for a in attempts(run.records)[1:]]
    linear, logarithmic = (
        line_chart("Loss", curves, legend=legend, marks=resumed, log_x=log, log_y=log)
        for log in (False, True)
    )
    # Radio buttons and CSS choose the axis, so that the choice works without the script too.
    hero = (
        '<input class="axis" type="radio" name="axis" id="axis-log"><label for="axis-log">log–log</label>'
        '<input class="axis" type="radio" name="axis" id="axis-linear" checked>'
        '<label for="axis-linear">linear</label>'
        "<figcaption>Loss <small>nats per token</small></figcaption>"
        f'<div class="linear">{linear}</div><div class="logarithmic">{logarithmic}</div>'
    )
    if resumed:
        hero += '<p class="note">A dotted vertical line marks a step from which a run was continued.</p>'
    colours = [None] if len(runs) == 1 else list(range(len(runs)))
    label = [f"{run.name} " if len(runs) > 1 else "" for run in runs]
    bits = [s for i, run in enumerate(runs) for s in _evals(run, "bits_per_byte", label[i], colours[i]) if s]
    norm, rate = _simple(runs, "grad_norm"), _simple(runs, "tokens_per_second")
    some = {"limit": 500, "legend": [_empty(r.name, i, "line") for i, r in enumerate(runs)]}
    some = some if len(runs) > 1 else {"limit": 500}
    return (
        f'<figure class="hero">{hero}</figure><div class="charts">'
        + _figure("Bits per byte", "evaluation", line_chart("Bits per byte", bits, **some))
        + _figure("Learning rate", "", line_chart("Learning rate", _simple(runs, "lr"), zero=True, **some))
        + _figure(
            "Gradient norm",
            "logarithmic" if _spiky(norm) else "",
            line_chart("Gradient norm", norm, log_y=_spiky(norm), zero=not _spiky(norm), **some),
        )
        + _figure("Throughput", "tokens per second", line_chart("Throughput", rate, zero=True, **some))
        + "</div>"
    )


# ---- numbers -----------------------------------------------------------------------------------


def _number(x: float | None) -> str:
    if x is None or not math.isfinite(x):
        return "n/a" if x is None else str(float(x))
    return f"{x:.3f}" if abs(x) < 1000 else format_count(x)


def _validation(s: Record) -> Record | None:
    return s["evals"].get("validation") or next(iter(s["evals"].values()), None)


def _headline(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, small print) of a run's most telling numbers."""
    s, e = run.summary, _validation(run.summary)
    rate = s["tokens_per_second"]
    train_note = f"last record, step {run.rows('train')[-1]['step']:,}" if run.rows("train") else ""
    out = [
        ("Parameters", format_count(s["parameters"]), ""),
        ("Tokens", format_count(s["tokens"]), f"{s['steps']:,} steps"),
        ("Training loss", _number(s["train_loss"]), train_note),
    ]
    for key, label in (
        ("loss", "Validation loss"),
        ("perplexity", "Perplexity"),
        ("bits_per_byte", "Bits per byte"),
    ):
        if e is None:
            out.append((label, "n/a", ""))
            continue
        first, last = e["first"], e["last"]
        note = f"from {_number(first[key])} at step {first['step']:,}" if last["step"] > first["step"] else ""
        out.append((label, _number(last[key]), note if first[key] is not None else ""))
    spread = f"p10 {format_count(rate['p10'])}, p90 {format_count(rate['p90'])}"
    resumes = {0: "", 1: "resumed once"}.get(s["resumes"], f"resumed {s['resumes']} times")
    mfu = "n/a" if s["mfu"] is None else f"{100 * s['mfu']:.1f}%"
    return out + [
        ("Tokens per second", format_count(rate["median"]), spread if rate["median"] is not None else ""),
        ("Model FLOPs utilisation", mfu, "" if s["mfu"] is not None else "peak of this device unknown"),
        ("Wall time", format_duration(s["wall_seconds"]), resumes),
        ("Peak memory", format_bytes(s["memory_bytes"]), escape(s["devices"] or "")),
    ]


def _swatch(i: int, runs: Sequence[Run]) -> str:
    return f'<i class="swatch" style="background:var(--c{i % 8})"></i>' if len(runs) > 1 else ""


def _numbers(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        tiles = "".join(
            f"<div><dt>{label}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"
            for label, value, note in _headline(runs[0])
        )
        return f'<dl class="tiles">{tiles}</dl>'
    heads = [_headline(run) for run in runs]
    top = "".join(f"<th>{_swatch(i, runs)}{escape(run.name)}</th>" for i, run in enumerate(runs))
    rows = "".join(
        f"<tr><td>{same[0][0]}</td>"
        + "".join(f"<td><b>{value}</b> <small>{note}</small></td>" for _, value, note in same)
        + "</tr>"
        for same in zip(*heads, strict=True)
    )
    return f'<div class="card scroll"><table class="numbers"><tr><th></th>{top}</tr>{rows}</table></div>'


# ---- samples, config, history ------------------------------------------------------------------


def _sample(r: Record) -> str:
    text, prompt = str(r.get("text", "")), str(r.get("prompt", ""))
    cut = f"\n[{len(text) - SAMPLE_CHARS:,} more characters]" if len(text) > SAMPLE_CHARS else ""
    # A newline right after <pre> is dropped by HTML, so an empty element goes first.
    return f"<pre><b>{escape(prompt)}</b>{escape(text[:SAMPLE_CHARS])}{cut}</pre>"


def _samples(runs: Sequence[Run]) -> str:
    out = []
    for i, run in enumerate(runs):
        rows = run.rows("sample")
        steps = sorted({r["step"] for r in rows})
        if not steps:
            continue
        chosen = [
            steps[k] for k in sorted(set(np.linspace(0, len(steps) - 1, SAMPLE_STEPS).round().astype(int)))
        ]
        blocks = "".join(
            f'<div class="at" data-step="{step}"><h3>step {step:,}</h3>'
            + "".join(_sample(r) for r in rows if r["step"] == step)
            + "</div>"
            for step in chosen
        )
        name = f"<h3>{_swatch(i, runs)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
        some = f'<p class="note">{len(chosen)} of {len(steps)} sampled steps; metrics.jsonl has all.</p>'
        some = some if len(chosen) < len(steps) else ""
        last = len(chosen) - 1
        slider = (
            '<div class="slider"><input type="range" aria-label="step of the samples" min="0" '
            f'max="{last}" value="{last}"><output></output></div>'
        )
        out.append(f'<div class="card samples">{name}{slider}{blocks}{some}</div>')
    if not out:
        return ""
    about = '<p class="caption">The prompt is in bold blue; the rest is what the model wrote.</p>'
    return f"<h2>Samples</h2>{about}{''.join(out)}"


def _shown(value: Any) -> str:
    return escape(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))


def _fields(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{_shown(v)}</td></tr>" for k, v in values.items())
    return f'<table class="fields">{rows}</table>'


def _details(title: str, values: dict[str, Any], file: str) -> str:
    body = _fields(values) if values else f"<p>The run folder has no {file}.</p>"
    return f'<details class="card"><summary>{title}</summary>{body}</details>'


def _config(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return "<h2>Config</h2>" + _details("All settings", runs[0].config, "config.json")
    table = differing([run.config for run in runs])
    top = "".join(f"<th>{_swatch(i, runs)}{escape(run.name)}</th>" for i, run in enumerate(runs))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_shown(v)}</td>' for v in values)}</tr>"
        for name, values in table.items()
    )
    body = (
        f'<div class="card scroll"><table class="fields"><tr><th>differs</th>{top}</tr>{rows}</table></div>'
        if table
        else "<p>These runs have the same config.</p>"
    )
    whole = "".join(_details(f"All settings of {escape(r.name)}", r.config, "config.json") for r in runs)
    return f"<h2>Config</h2>{body}{whole}"


def _history(run: Run) -> list[str]:
    """One sentence for each time the run was started, and how it ended."""
    lines = []
    for i, attempt in enumerate(attempts(run.records)):
        first = attempt[0]
        when = ""
        if isinstance(first.get("time"), (int, float)):
            when = f" at {datetime.fromtimestamp(first['time'], UTC):%Y-%m-%d %H:%M} UTC"
        where = f" on {escape(first['devices'])}" if first.get("devices") else ""
        verb = "started" if i == 0 else f"continued from step {first['step']:,}"
        lines.append(f"{verb}{when}{where}")
    steps = run.summary["steps"]
    ended = bool(run.records) and any(r["kind"] == "end" for r in attempts(run.records)[-1])
    lines.append(
        f"finished at step {steps:,}"
        if ended
        else f"no end recorded: still running, or stopped, at step {steps:,}"
    )
    return lines


def _accounts(runs: Sequence[Run]) -> str:
    parts = "".join(account(run.name if len(runs) > 1 else "", run.summary["times"]) for run in runs)
    about = '<p class="caption">Every second of every attempt, from the first start to the last sign of life.</p>'
    return f"<h2>Where the time went</h2>{about}{parts}" if parts else ""


def _environment(runs: Sequence[Run]) -> str:
    out = ["<h2>Environment and history</h2>"]
    for i, run in enumerate(runs):
        lines = "".join(f"<li>{line}</li>" for line in _history(run))
        name = f"<h3>{_swatch(i, runs)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
        out.append(f'<div class="card">{name}<ul class="attempts">{lines}</ul></div>')
        of = f" of {escape(run.name)}" if len(runs) > 1 else ""
        out.append(_details(f"Versions and devices{of}", run.environment, "environment.json"))
    return "".join(out)


# ---- the page ----------------------------------------------------------------------------------


def _page(runs: Sequence[Run]) -> str:
    title = escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared")
    subtitle = escape(", ".join(run.name for run in runs)) if len(runs) > 1 else _history(runs[0])[-1]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    command = escape("lmjax report " + " ".join(run.summary["folder"] for run in runs))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title} · lmjax report</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1><p>{subtitle}</p></header>
<main>
{_numbers(runs)}
<h2>Curves</h2>
{_charts(runs)}
{_accounts(runs)}
{_samples(runs)}
{_config(runs)}
{_environment(runs)}
</main>
<footer>Made with <code>{command}</code>. This file needs no network and can be sent as it is.</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs in `folders` to `out` (a file, or a folder for report.html).

    Raises CheckpointError for a folder that is missing or not a run's, a damaged file, or an `out` that
    cannot be written. The page is a function of the run folders alone.
    """
    page = _page(read_runs([Path(f) for f in folders]))
    out = Path(out)
    out = out / "report.html" if out.is_dir() else out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", newline="\n")
    except OSError as e:
        raise CheckpointError(
            f"{out}: cannot write the report ({e.strerror}); choose a path with --out"
        ) from None
    return out
