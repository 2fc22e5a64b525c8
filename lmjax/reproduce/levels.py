"""What the cells of `lmjax.reproduce.capacity` add up to: the level of each model, what more steps would add, a table
and a figure. Arithmetic on the records of capacity.jsonl; no JAX.

Every interval is Student's over seeds, 95 %: each seed is fitted by itself, so that nothing is assumed about how errors
of one seed hang together.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

from lmjax.report.charts import Axis, escape, format_tick, nice_ticks

Record = dict[str, Any]  # a cell's fields, "params", "offered", "ceiling", "bits" and "bits_bf16_weights" of each seed


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval); the width is infinite for one value."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def level(offered: Sequence[float], ceiling: Sequence[float], bits: Sequence[float]) -> float:
    """The a of the least-squares fit bits = min(ceiling * offered, a): all is memorised until nothing more goes in."""
    known, bits = np.asarray(ceiling) * np.asarray(offered), np.asarray(bits)

    def error(a):
        return float(np.sum((np.minimum(known, a) - bits) ** 2))

    return float(optimize.minimize_scalar(error, bounds=(0, float(bits.max()) * 1.2), method="bounded",
                                          options={"xatol": 1e-6}).x)


def with_more_steps(steps: Sequence[int], bits: Sequence[float], at: float) -> float:
    """bits at `at` steps by the fit a - b steps^-c, 0.05 <= c <= 1. At least three lengths of training."""
    x, y = np.log(np.asarray(steps, np.float64)), np.asarray(bits, np.float64)

    def ab(c):
        design = np.stack([np.ones_like(x), -np.exp(-c * (x - x[0]))], 1)
        return np.linalg.lstsq(design, y, rcond=None)[0], design

    def error(c):
        (ab_c, design) = ab(c)
        return float(np.sum((design @ ab_c - y) ** 2))

    c = optimize.minimize_scalar(error, bounds=(0.05, 1.0), method="bounded").x
    (a, b), _ = ab(c)
    return float(a - b * np.exp(-c * (math.log(at) - x[0])))


def _shape(r: Record) -> str:
    return f"L={r['layers']} d={r['width']} N={r['heads']} V={r['vocab']} S={r['length']}"


def _groups(records: Sequence[Record]) -> dict[tuple[str, int, str], list[Record]]:
    """(shape, params, dtype) -> records, by size."""
    groups: dict = {}
    for r in sorted(records, key=lambda r: (r["params"], r["dtype"] != "float32", r["offered"], r["steps"])):
        groups.setdefault((_shape(r), r["params"], r["dtype"]), []).append(r)
    return groups


def longest(records: Sequence[Record]) -> list[Record]:
    """Of cells that differ in nothing but steps, the longest."""
    best: dict = {}
    for r in records:
        key = (_shape(r), r["dtype"], r["sequences"], r["batch"])
        if key not in best or best[key]["steps"] < r["steps"]:
            best[key] = r
    return list(best.values())


def ladders(records: Sequence[Record]) -> list[list[Record]]:
    """Sets of at least three cells that differ in steps alone."""
    sets: dict = {}
    for r in sorted(records, key=lambda r: r["steps"]):
        sets.setdefault((_shape(r), r["dtype"], r["sequences"], r["batch"]), []).append(r)
    return [s for s in sets.values() if len(s) > 2]


def pm(values: Sequence[float]) -> str:
    """Mean and half the width of its interval."""
    mean, half = interval(values)
    return f"{mean:.2f}" if math.isinf(half) else f"{mean:.2f} ± {half:.2f}"


def table(records: Sequence[Record]) -> str:
    """Markdown: every cell, then what they add up to."""
    lines = ["| model | parameters | dtype | data, bits/parameter | steps | memorised, bits/parameter | of what can be "
             "known | weights rounded to bfloat16 |", "|---|---|---|---|---|---|---|---|"]
    for (shape, params, dtype), group in _groups(records).items():
        for r in group:
            share = np.mean(r["bits"]) / (r["offered"] * r["ceiling"])
            lines.append(f"| {shape} | {params:,} | {dtype} | {r['offered']:.2f} | {r['steps']:,} | {pm(r['bits'])} | "
                         f"{share:.0%} | {pm(r['bits_bf16_weights'])} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in summary(records))])


def summary(records: Sequence[Record]) -> list[str]:
    """Sentences: the highest value and the fitted level of each model, and of longer training."""
    lines = []
    for (shape, params, dtype), group in _groups(longest(records)).items():
        most = max(group, key=lambda r: np.mean(r["bits"]))
        text = f"{shape}, {params:,} parameters, {dtype}: at most {pm(most['bits'])} bits/parameter"
        if len(group) > 2:
            fits = [level([r["offered"] for r in group], [r["ceiling"] for r in group], bits)
                    for bits in zip(*(r["bits"] for r in group), strict=True)]
            text += f"; level of the fit over {len(group)} amounts of data {pm(fits)}"
        lines.append(text)
    for ladder in ladders(records):
        r, steps = ladder[-1], [r["steps"] for r in ladder]
        fits = [with_more_steps(steps, bits, 1e6) for bits in zip(*(r["bits"] for r in ladder), strict=True)]
        lines.append(f"{_shape(r)}, {r['dtype']}, {r['offered']:.1f} bits/parameter offered: a fit of a - b steps^-c "
                     f"to {', '.join(f'{s:,}' for s in steps)} steps would reach {pm(fits)} at 1,000,000 steps (a "
                     f"guess, {1e6 / steps[-1]:.0f} times beyond the data)")
    return lines


# ---- figure --------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 56, 24, 58, 48
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito


def figure(records: Sequence[Record]) -> str:
    """SVG: memorised against offered bits per parameter; every seed a dot, seeds' means joined; dashes: all of it."""
    groups = _groups(longest(records))
    x_axis = Axis(0.0, 1.05 * max(r["offered"] for r in records))
    y_axis = Axis(0.0, max(4.0, 1.1 * max(max(r["bits"]) for r in records)))

    def px(x):
        return LEFT + float(x_axis.place(x)) * (WIDTH - LEFT - RIGHT)

    def py(y):
        return TOP + (1 - float(y_axis.place(y))) * (HEIGHT - TOP - BOTTOM)

    top = min(x_axis.high, y_axis.high)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
             'font-family="system-ui, sans-serif" font-size="12" fill="#333">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
             f'<text x="{LEFT}" y="22" font-size="14" fill="#000">What a decoder memorises of random tokens</text>']
    for tick in nice_ticks(y_axis.low, y_axis.high, 5):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 8}" y="{py(tick) + 4:.1f}" text-anchor="end">{format_tick(tick)}</text>')
    for tick in nice_ticks(x_axis.low, x_axis.high, 8):
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                     f'{format_tick(tick)}</text>')
    parts.append(f'<line x1="{px(0):.1f}" y1="{py(0):.1f}" x2="{px(top):.1f}" y2="{py(top):.1f}" stroke="#888" '
                 'stroke-dasharray="5 4"/>'
                 f'<text x="{px(0.93 * y_axis.high) - 8:.1f}" y="{py(0.93 * y_axis.high):.1f}" text-anchor="end" '
                 'fill="#666">all of the data</text>'
                 f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">offered, bits per parameter</text>'
                 f'<text x="{LEFT - 44}" y="{TOP - 12}">memorised, bits per parameter</text>')
    for row, ((shape, params, dtype), group) in enumerate(groups.items()):
        colour = COLOURS[row % len(COLOURS)]
        path = " ".join(f"{px(r['offered']):.1f},{py(np.mean(r['bits'])):.1f}" for r in group)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{px(r["offered"]):.1f}" cy="{py(b):.1f}" r="3.5" fill="{colour}" fill-opacity="0.7"/>'
                  for r in group for b in r["bits"]]
        y = HEIGHT - BOTTOM - 14 - 17 * (len(groups) - 1 - row)
        label = f"{format_tick(params)} parameters, {shape}, {dtype}"
        parts.append(f'<circle cx="{WIDTH - RIGHT - 360}" cy="{y - 4}" r="4" fill="{colour}"/>'
                     f'<text x="{WIDTH - RIGHT - 350}" y="{y}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>\n"])
