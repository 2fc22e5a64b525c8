"""One picture of a run's losses as a standalone SVG file, for a README or a paper.

What lives here: the picture. Scales, ticks and thinning are `lmjax.report.charts`'s; the page is
`lmjax.report.page`'s.
"""

from pathlib import Path

import numpy as np

from lmjax.records import read_metrics
from lmjax.report.charts import Axis, downsample, escape, format_tick, nice_ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 52, 128, 34, 40
# Okabe and Ito's colours, which colour-blind eyes tell apart.
CURVES = (("loss_kept", "kept", "#0072B2", ""), ("loss_dropped", "dropped", "#D55E00", ""),
          ("validation", "validation", "#000000", "5 4"))


def _smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean; the ends average what is there."""
    if window < 2:
        return y
    kernel = np.ones(window)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def loss_figure(folder: Path, title: str) -> str:
    """SVG text: training loss on kept and on dropped targets (running mean of 2 % of the run) and validation
    loss, in nats per token, against the step. Raises CheckpointError where the folder has no records."""
    records = read_metrics(folder)
    train = [r for r in records if r["kind"] == "train"]
    curves = {}
    for key, *_ in CURVES[:2]:
        points = [(r["step"], r[key]) for r in train if np.isfinite(r.get(key, np.nan))]
        if points:
            x, y = np.array(points, np.float64).T
            curves[key] = downsample(x, _smooth(y, max(1, len(y) // 50)), 400)
    points = [(r["step"], r["loss"]) for r in records if r["kind"] == "eval" and np.isfinite(r["loss"])]
    if points:
        curves["validation"] = tuple(np.array(points, np.float64).T)
    everything = np.concatenate([y for _, y in curves.values()]) if curves else np.array([0.0, 1.0])
    last = max((x[-1] for x, _ in curves.values()), default=1.0)
    x_axis = Axis(0.0, float(last))
    low, high = float(everything.min()), float(everything.max())
    y_axis = Axis(low - 0.05 * (high - low), high + 0.02 * (high - low))
    return _svg(curves, x_axis, y_axis, title)


def _svg(curves: dict, x_axis: Axis, y_axis: Axis, title: str) -> str:
    def px(x):
        return LEFT + x_axis.place(x) * (WIDTH - LEFT - RIGHT)

    def py(y):
        return TOP + (1 - y_axis.place(y)) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
             'font-family="system-ui, sans-serif" font-size="12" fill="#333">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
             f'<text x="{LEFT}" y="20" font-size="14" fill="#000">{escape(title)}</text>']
    for tick in nice_ticks(y_axis.low, y_axis.high, 6):
        y = float(py(tick))
        if TOP <= y <= HEIGHT - BOTTOM:
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                         f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_tick(tick)}</text>')
    for tick in nice_ticks(x_axis.low, x_axis.high, 6):
        x = float(px(tick))
        if x <= WIDTH - RIGHT + 1:
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                         f'{format_tick(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step</text>')
    labels = []
    for key, name, colour, dash in CURVES:
        if key in curves:
            x, y = curves[key]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px(x), py(y), strict=True))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
                         f'stroke-dasharray="{dash}"/>')
            labels.append([float(py(y[-1])), f"{name} {y[-1]:.2f}", colour])
    labels.sort()
    for above, label in zip(labels, labels[1:], strict=False):
        label[0] = max(label[0], above[0] + 15)  # so that labels of curves that end together stay apart
    parts += [f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}" fill="{colour}">{escape(text)}</text>'
              for y, text, colour in labels]
    return "\n".join([*parts, "</svg>\n"])
