"""How well membership can be inferred, from nothing but the sizes of model and data.

Morris et al. 2025 (arXiv 2505.24832, section 5) give the F1 of a threshold on the loss as

    F1 = (1 + c1 sigmoid(c2 (x + c3))) / 2

and print x = capacity / |D|, with which it tends to 1 for endless data, where it has to be 0.5. With x = 15.32 times
the training tokens per parameter the same constants, c1 = 1.34, c2 = -0.034, c3 = -33.14, give the printed predictions
of all six of its validation rows; that form is fitted here, and the constants of one size of model predict the other.

Models: `lmjax.reproduce.text_grid`.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import curve_fit
from scipy.special import expit

from lmjax.reproduce import text_grid
from lmjax.reproduce.figure import Curve, Panel, panels
from lmjax.reproduce.lab import spread
from lmjax.reproduce.seeds import Record

PAPER = (1.34, -0.034 * 15.32, -33.14 / 15.32)  # c1, c2, c3 of tokens per parameter

add_arguments = text_grid.add_arguments


def law(x, c1: float, c2: float, c3: float):
    """F1 by tokens per parameter."""
    return (1 + c1 * expit(c2 * (np.asarray(x, np.float64) + c3))) / 2


def fit(x: Sequence[float], f1: Sequence[float]) -> tuple[float, float, float]:
    """(c1, c2, c3) of least squares, which begins at the paper's."""
    (c1, c2, c3), _ = curve_fit(law, x, f1, PAPER, bounds=((0.5, -50, -50), (2.0, 0, 5)), maxfev=20_000)
    return float(c1), float(c2), float(c3)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict, str, str]:
    shapes = text_grid.by_shape(text_grid.run(options, say))
    points = [[(tokens_per_parameter(r), float(np.mean(r["f1"]))) for r in shape] for shape in shapes]
    fits = {"all": fit(*zip(*sum(points, []), strict=True))}
    for shape, own in zip(shapes, points, strict=True):
        if len(own) >= 4:
            fits[str(shape[0]["params"])] = fit(*zip(*own, strict=True))
    result = {"fits": fits, "paper": PAPER, "records": [{k: v for k, v in r.items() if k != "nats"}
                                                        for shape in shapes for r in shape]}
    return result, table(shapes, fits), figure(shapes, fits)


def tokens_per_parameter(r: Record) -> float:
    return r["sequences"] * r["length"] / r["params"]


def error(shape: Sequence[Record], constants: Sequence[float]) -> float:
    """Root of the mean squared difference between a law and what was measured."""
    x = [tokens_per_parameter(r) for r in shape]
    return float(np.sqrt(np.mean((law(x, *constants) - [np.mean(r["f1"]) for r in shape]) ** 2)))


def table(shapes: Sequence[Sequence[Record]], fits: dict) -> str:
    lines = ["| parameters | sequences | tokens per parameter | F1, mean and range of seeds | AUC | fitted law | the "
             "paper's law | recited: members | others |", "|---" * 9 + "|"]
    for r in (r for shape in shapes for r in shape):
        x = tokens_per_parameter(r)
        lines.append(f"| {r['params']:,} | {r['sequences']:,} | {x:.3g} | {spread(r['f1'], '.3f')} "
                     f"| {np.mean(r['auc']):.3f} | {law(x, *fits['all']):.3f} | {law(x, *PAPER):.3f} "
                     f"| {np.mean(r['train_recited']):.1%} | {np.mean(r['test_recited']):.1%} |")
    lines += ["", "| law | c1 | c2 | c3 | " + " | ".join(f"error on {s[0]['params']:,}" for s in shapes) + " |",
              "|---" * (4 + len(shapes)) + "|"]
    for name, constants in (("the paper's", PAPER), *fits.items()):
        label = {"all": "fitted to all", "the paper's": name}.get(name, f"fitted to {name} parameters")
        lines.append(f"| {label} | " + " | ".join(f"{c:.3f}" for c in constants) + " | "
                     + " | ".join(f"{error(shape, constants):.3f}" for shape in shapes) + " |")
    return "\n".join(lines)


def figure(shapes: Sequence[Sequence[Record]], fits: dict) -> str:
    parts = []
    for shape in shapes:
        n = [float(r["sequences"]) for r in shape]
        x = np.array([tokens_per_parameter(r) for r in shape])
        parts.append(Panel(f"F1 of the loss, {shape[0]['params']:,} parameters", "training sequences", [
            Curve("measured", n, [float(np.mean(r["f1"])) for r in shape], 0),
            Curve("fitted to all", n, law(x, *fits["all"]).tolist(), 1, "6 3"),
            Curve("the paper's law", n, law(x, *PAPER).tolist(), 2, "2 3"),
            Curve("chance", n, [0.5] * len(n), 6, "1 5")], n, 1.05))
    return panels(parts, "Membership by sizes alone")
