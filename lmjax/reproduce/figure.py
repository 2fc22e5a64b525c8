"""Figures of the experiments: panels of curves, side by side, as one standalone SVG file.

Scales and ticks are `lmjax.report.charts`'s. White ground and dark ink, so that it reads on any page.
"""

from typing import NamedTuple

import numpy as np

from lmjax.report.charts import Axis, escape, format_tick, nice_ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 300, 56, 16, 56, 46
# Okabe and Ito's colours, which colour-blind eyes tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class Curve(NamedTuple):
    """One curve: its name in the legend ("": not there), its points, and which colour; `dash` as in SVG's
    stroke-dasharray."""

    name: str
    x: list[float]
    y: list[float]
    colour: int
    dash: str = ""


class Panel(NamedTuple):
    title: str
    x_label: str
    curves: list[Curve]
    ticks: list[float]  # of x, each at the same distance from the next: the values that were tried
    top: float | None = None  # of y, which begins at 0; None: the highest point


def panels(parts: list[Panel], title: str) -> str:
    """SVG text of panels side by side with one legend, of the first curve of each name."""
    width = WIDTH * len(parts)
    legend = list({curve.name: curve for part in reversed(parts) for curve in reversed(part.curves)
                   if curve.name}.values())[::-1]
    columns = max(1, min(len(legend), int((width - LEFT - RIGHT) / (46 + 6.8 * max(len(c.name) for c in legend)))))
    height = HEIGHT + 16 + 18 * -(-len(legend) // columns)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
           'font-family="system-ui, sans-serif" font-size="12" fill="#333">',
           f'<rect width="{width}" height="{height}" fill="#fff"/>',
           f'<text x="{LEFT}" y="20" font-size="14" fill="#000">{escape(title)}</text>']
    for number, panel in enumerate(parts):
        svg += _panel(panel, number * WIDTH)
    step = (width - LEFT - RIGHT) / columns
    for i, curve in enumerate(legend):
        x, y = LEFT + i % columns * step, HEIGHT + 18 + 18 * (i // columns)
        svg.append(f'<line x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y - 4}" y2="{y - 4}" stroke="{COLOURS[curve.colour]}" '
                   f'stroke-width="2" stroke-dasharray="{curve.dash}"/>'
                   f'<text x="{x + 28:.1f}" y="{y}">{escape(curve.name)}</text>')
    return "\n".join([*svg, "</svg>\n"])


def _panel(panel: Panel, left: int) -> list[str]:
    high = panel.top or 1.05 * max([y for curve in panel.curves for y in curve.y if np.isfinite(y)], default=1.0)
    axis = Axis(0.0, high or 1.0)
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    place = {tick: left + LEFT + inner * i / max(len(panel.ticks) - 1, 1) for i, tick in enumerate(panel.ticks)}

    def py(y: float) -> float:
        return TOP + (1 - float(axis.place(np.float64(y)))) * tall

    svg = [f'<text x="{left + LEFT}" y="{TOP - 14}" fill="#000">{escape(panel.title)}</text>']
    for tick in nice_ticks(0.0, high, 5):
        if tick <= high:
            svg.append(f'<line x1="{left + LEFT}" x2="{left + WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}" '
                       f'stroke="#ddd"/><text x="{left + LEFT - 8}" y="{py(tick) + 4:.1f}" text-anchor="end">'
                       f'{format_tick(tick)}</text>')
    for tick, x in place.items():
        shown = format_tick(float(f"{tick:.2g}") if tick >= 1000 else tick)
        svg.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{shown}</text>')
    svg.append(f'<text x="{left + LEFT + inner / 2:.1f}" y="{HEIGHT - BOTTOM + 36}" text-anchor="middle">'
               f'{escape(panel.x_label)}</text>')
    for curve in panel.curves:
        points = [(place[x], py(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        svg.append('<polyline points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in points) + '" fill="none" '
                   f'stroke="{COLOURS[curve.colour]}" stroke-width="2" stroke-dasharray="{curve.dash}"/>')
        svg += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{COLOURS[curve.colour]}"/>' for x, y in points]
    return svg
