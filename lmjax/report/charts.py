"""Line charts as inline SVG, with a few lines of HTML around them.

What lives here: scales, ticks, thinning of curves, one chart, and the escaping of text for it. What does not:
which charts a run gets (`lmjax.report.page`), the colours and the hover script (`lmjax.report.assets`).

The SVG of a plot is stretched to its box (preserveAspectRatio none, strokes that do not scale). The tick
labels are HTML placed in percent, so that text keeps its size from a phone to a wall. Without JavaScript only
the readout under the pointer is missing.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.records import printable

SIDE = 1000  # the plot's own coordinates run from 0 to SIDE on both axes
NEUTRAL = -1  # the colour of a line that belongs to no run


@dataclass(frozen=True)
class Series:
    """One curve: `x` and `y` of equal length; y may hold NaN and infinities, which are left as gaps."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0  # index of a CSS colour --c0 .. --c7
    style: str = "line"  # line | dash | dots (a line with a dot at each point)


@dataclass(frozen=True)
class Axis:
    """One direction: data from `low` to `high` onto 0..1, by its logarithm when `log`."""

    low: float
    high: float
    log: bool = False

    def place(self, v: np.ndarray) -> np.ndarray:
        """Values to fractions of the axis; what a logarithmic axis cannot show becomes NaN."""
        v = np.asarray(v, np.float64)
        if not self.log:
            return (v - self.low) / (self.high - self.low)
        safe = np.log(np.where(v > 0, v, np.nan))
        return (safe - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def ticks(self, count: int = 6) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, count)


def escape(value: Any) -> str:
    """Anything as HTML text: escaped, without control characters, and valid UTF-8 (no lone surrogates)."""
    text = printable(str(value).replace("\r\n", "\n"))
    return html.escape(text.encode("utf-8", "replace").decode())


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return [low] if math.isfinite(low) else []
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Multiply, and round to the step's own digits: adding steps up would show 0.30000000000000004.
    digits = max(0, -math.floor(math.log10(step)))
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 times them where fewer than three would be left."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [
            f * 10.0**e for e in exponents for f in factors if low * 0.999 <= f * 10.0**e <= high * 1.001
        ]
        if len(found) >= 3:
            every = -(-len(found) // 8)
            return found[::every]
    return nice_ticks(low, high, 4)


def format_tick(v: float) -> str:
    """0.0003 -> '3e-4', 1500 -> '1.5k', 2_000_000 -> '2M', 3.5 -> '3.5'."""
    if v == 0:
        return "0"
    if abs(v) < 0.01:
        digits, power = f"{v:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(v) >= limit:
            return f"{v / limit:.4g}{unit}"
    return f"{v:.4g}"


def downsample(x: np.ndarray, y: np.ndarray, limit: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a curve: first, last, and the lowest and highest of each stretch in between.

    Non-finite values count as neither; a stretch of nothing else keeps one of them, so that the gap stays.
    """
    n = len(x)
    if n <= limit:
        return x, y
    keep = {0, n - 1}
    edges = np.linspace(1, n - 1, max(1, (limit - 2) // 2) + 1).astype(int)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        part = y[start:stop]
        finite = np.flatnonzero(np.isfinite(part))
        if len(finite):
            keep.add(int(start + finite[np.argmin(part[finite])]))
            keep.add(int(start + finite[np.argmax(part[finite])]))
        elif stop > start:
            keep.add(int(start))
    index = sorted(keep)
    return x[index], y[index]


def _x_axis(steps: np.ndarray, log: bool) -> Axis:
    low, high = float(steps.min()), float(steps.max())
    if log:
        return Axis(low, high, True) if high > low else Axis(low / 2, high * 2, True)
    # The first record comes a few steps in; from 0 on, the charts of a page share their x axis.
    low = 0.0 if low < 0.2 * high or low == high else low
    return Axis(low, max(high, low + 1))


def _y_axis(values: np.ndarray, log: bool, zero: bool) -> Axis:
    """A little room above and below; a flat curve still gets a height to be drawn in."""
    values = values[np.isfinite(values) & ((values > 0) if log else True)]
    if not len(values):
        return Axis(0.1, 1.0, log)
    low, high = float(values.min()), float(values.max())
    if log:
        room = (high / low) ** 0.05 if high > low else 1.5
        return Axis(low / room, high * room, True)
    low = min(low, 0.0) if zero else low
    room = (high - low) * 0.05 if high > low else abs(high) * 0.1 or 0.5
    return Axis(low if zero else low - room, high + room)


def _path(u: np.ndarray, v: np.ndarray) -> str:
    """The SVG path of fractions `u`, `v`, with a gap at each NaN."""
    pieces, pen_up = [], True
    for a, b in zip(u, v, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            pen_up = True
            continue
        pieces.append(f"{'M' if pen_up else 'L'}{a * SIDE:.0f} {(1 - b) * SIDE:.0f}")
        pen_up = False
    return "".join(pieces)


def _drawn(s: Series, x_axis: Axis, y_axis: Axis) -> str:
    u, v = x_axis.place(s.x), y_axis.place(s.y)
    ok = np.isfinite(u) & np.isfinite(v)
    # A point with no neighbour has no line, so it is drawn as a dot: a path of no length with a round cap.
    alone = ok & ~np.r_[False, ok[:-1]] & ~np.r_[ok[1:], False]
    dots = ok if s.style == "dots" and ok.sum() <= 80 else alone
    colour = f'style="stroke:var(--c{s.colour % 8})"'
    out = f'<path class="{s.style}" {colour} d="{_path(u, v)}"/>'
    if dots.any():
        marks = "".join(
            f"M{a * SIDE:.0f} {(1 - b) * SIDE:.0f}h0" for a, b in zip(u[dots], v[dots], strict=True)
        )
        out += f'<path class="dot" {colour} d="{marks}"/>'
    return out


def _short(v: float) -> float | None:
    return float(f"{v:.5g}") if math.isfinite(v) else None


def _data(series: Sequence[Series], x_axis: Axis, label: str) -> str:
    """What the readout needs, as a JSON block that no text can break out of."""
    data = {
        "x": [x_axis.low, x_axis.high, int(x_axis.log)],
        "label": label,
        "series": [
            {"name": s.name, "c": s.colour % 8, "x": [int(v) for v in s.x], "y": [_short(v) for v in s.y]}
            for s in series
        ],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def _legend(series: Sequence[Series]) -> str:
    items = []
    for s in series:
        colour = "var(--ink)" if s.colour == NEUTRAL else f"var(--c{s.colour % 8})"
        items.append(f'<li><i class="{s.style}" style="color:{colour}"></i>{escape(s.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    legend: Sequence[Series] | None = None,
    marks: Sequence[float] = (),
    limit: int = 1000,
) -> str:
    """One chart as an HTML `<div>`: legend, plot, readout, and a note about values that could not be drawn.

    `zero` starts the y axis at 0; `marks` are x values with a dotted vertical line; `legend` replaces the
    entries (given as empty Series); `limit` bounds the points kept of each curve. An empty chart says so.
    """
    lost = [(s, s.x[~np.isfinite(s.y)]) for s in series]
    thin = []
    for s in series:
        ok = s.x > 0 if log_x else np.full(len(s.x), True)
        x, y = downsample(s.x[ok], s.y[ok], limit)
        thin.append(Series(s.name, x, y, s.colour, s.style))
    thin = [s for s in thin if np.isfinite(s.y).any()]
    notes = [
        f"{s.name}: {len(x)} value{'s' * (len(x) > 1)} not finite, first at {x_label} {int(x[0])}"
        for s, x in lost
        if len(x)
    ]
    note = f'<p class="note">{escape("; ".join(notes))}</p>' if notes else ""
    if not thin:
        return f'<div class="chart"><p class="empty">nothing to draw yet</p>{note}</div>'
    x_axis = _x_axis(np.concatenate([s.x[np.isfinite(s.y)] for s in thin]), log_x)
    y_axis = _y_axis(np.concatenate([s.y for s in thin]), log_y, zero)
    grid, labels = [], []
    for t in y_axis.ticks(5):
        at = 1 - float(y_axis.place(np.array(t)))
        grid.append(f"M0 {at * SIDE:.0f}H{SIDE}")
        labels.append(f'<span class="y" style="top:{100 * at:.2f}%">{format_tick(t)}</span>')
    for t in (t for t in x_axis.ticks(6) if t == int(t)):  # there is no half step
        at = float(x_axis.place(np.array(t)))
        labels.append(f'<span class="x" style="left:{100 * at:.2f}%">{format_tick(t)}</span>')
    lines = [
        f"M{x_axis.place(np.array(m)) * SIDE:.0f} 0V{SIDE}" for m in marks if x_axis.low <= m <= x_axis.high
    ]
    curves = "".join(_drawn(s, x_axis, y_axis) for s in thin)
    about = escape(f"{title} by {x_label}: {', '.join(s.name for s in thin)}")
    shown = _legend(thin if legend is None else legend) if len(thin) > 1 or legend else ""
    return (
        f'<div class="chart">{shown}<div class="plot">'
        f'<svg role="img" aria-label="{about}" viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none">'
        f'<path class="grid" d="{"".join(grid)}"/><path class="mark" d="{"".join(lines)}"/>{curves}</svg>'
        f'{"".join(labels)}<b class="cursor"></b><div class="readout"></div></div>'
        f'<p class="x-label">{escape(x_label)}{", logarithmic" if log_x else ""}</p>{note}'
        f"{_data(thin, x_axis, x_label)}</div>"
    )
