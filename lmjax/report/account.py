"""Where a run's time went: one bar and one table for each run, from its time.jsonl (`lmjax.phases.goodput`)."""

from collections.abc import Mapping

from lmjax.records import format_duration
from lmjax.report.charts import escape

# class -> (what the reader is told, colour); every other class is told by its name.
CLASSES = {
    "step": ("training steps", 2), "evaluate": ("evaluations and samples", 0), "data": ("waiting for data", 4),
    "save": ("checkpoints: starting, or waiting for one", 3), "compile": ("compiling the step", 6),
    "restore": ("reading and verifying a checkpoint", 5), "prepare": ("preparing data", 5),
    "init": ("initial weights", 6), "start": ("starting Python and JAX", 7),
    "connect": ("processes finding each other, devices", 7), "lost": ("steps that were done again after a kill", 1),
    "down": ("between a kill and the next start", 1),
}


def account(name: str, times: Mapping[str, float]) -> str:
    """HTML of one run's account; "" where it kept none."""
    whole = sum(times.values())
    if not whole:
        return ""
    rows = sorted(times.items(), key=lambda item: (item[0] != "step", -item[1]))
    bar = "".join(f'<i style="flex:{seconds / whole:.5f};background:var(--c{CLASSES.get(key, ("", 7))[1]})" '
                  f'title="{escape(key)} {100 * seconds / whole:.1f}%"></i>' for key, seconds in rows)
    table = "".join(f'<tr><td><i class="swatch" style="background:var(--c{CLASSES.get(key, ("", 7))[1]})"></i>'
                    f"{escape(key)}</td><td>{100 * seconds / whole:.1f}%</td><td>{format_duration(seconds)}</td>"
                    f"<td>{CLASSES.get(key, ('', 7))[0]}</td></tr>" for key, seconds in rows)
    title = f"<h3>{escape(name)}</h3>" if name else ""
    good = 100 * times.get("step", 0.0) / whole
    return (f'<div class="card">{title}<p><b>{good:.0f}%</b> of {format_duration(whole)} were training steps.</p>'
            f'<div class="account">{bar}</div><div class="scroll"><table class="fields">{table}</table></div></div>')
