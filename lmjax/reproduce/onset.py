"""Where a model stops memorising: more and more text for a model that can hold so many bits.

Morris et al. 2025 (arXiv 2505.24832, section 4): unintended memorisation, sum over sequences of
max(0, log2 p(x | model) - log2 p(x | reference)), grows with the data up to the model's capacity; where the data's bits
exceed it, memorisation gives way to what the sequences share, and held-out loss begins to fall after it had risen
(double descent). The reference is the model of the same size that was trained on the most data.

Models: `lmjax.reproduce.text_grid`.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np

from lmjax.log import format_count
from lmjax.reproduce import text_grid
from lmjax.reproduce.figure import Curve, Panel, panels
from lmjax.reproduce.levels import pm
from lmjax.reproduce.seeds import Record

KEPT = ("params", "sequences", "train", "test", "train_recited", "test_recited")
add_arguments = text_grid.add_arguments


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[list[dict], str, str]:
    rows = [row for shape in text_grid.by_shape(text_grid.run(options, say)) for row in analysed(shape)]
    return rows, table(rows), figure(rows)


def analysed(shape: Sequence[Record]) -> list[dict]:
    """Of each amount of data, of each seed: memorised bits per parameter (held: of the sequences that the reference
    knows less well; net: of all, so less what the reference knows better), and the data's bits over the most that this
    size was found to hold. Records of one size, by sequences; the last is the reference, and has 0 of both.

    A sequence has as many bits as a held-out one under the reference: what it takes to say it, knowing the language.
    """
    reference = shape[-1]
    sequence_bits = float(np.mean(reference["test"])) * reference["length"] / math.log(2)
    rows = []
    for r in shape:
        held, net = [], []
        for own, known in zip(r["nats"], reference["nats"], strict=True):
            gain = (np.array(known[:len(own)]) - np.array(own)) / math.log(2)
            for found, bits in ((held, np.maximum(gain, 0)), (net, gain)):
                found.append(float(bits.mean()) * r["sequences"] / r["params"])
        rows.append({name: r[name] for name in KEPT}
                    | {"held": held, "net": net, "offered": r["sequences"] * sequence_bits / r["params"]})
    most = max(float(np.mean(row["held"])) for row in rows)
    return [row | {"share": row["offered"] / most if most else math.inf} for row in rows]


def table(rows: Sequence[dict]) -> str:
    lines = ["| parameters | sequences | the text, bits/parameter | over the most held | memorised, bits/parameter "
             "| net | loss on members | held-out loss | recited: members | others |", "|---" * 10 + "|"]
    for r in rows:
        lines.append(f"| {r['params']:,} | {r['sequences']:,} | {r['offered']:.2f} | {r['share']:.2f} "
                     f"| {pm(r['held'])} | {pm(r['net'])} | {np.mean(r['train']):.2f} | {pm(r['test'])} "
                     f"| {np.mean(r['train_recited']):.1%} | {np.mean(r['test_recited']):.1%} |")
    return "\n".join(lines)


def figure(rows: Sequence[dict]) -> str:
    sizes = sorted({r["params"] for r in rows})
    ticks = sorted({float(r["sequences"]) for r in rows})
    of = {p: [r for r in rows if r["params"] == p] for p in sizes}

    def curves(name: str, label: str, dash: str = "", last: int | None = None):
        return [Curve(f"{label}, {format_count(p)}", [float(r["sequences"]) for r in of[p][:last]],
                      [float(np.mean(r[name])) for r in of[p][:last]], i, dash) for i, p in enumerate(sizes)]

    return panels([
        Panel("loss, nats a token", "training sequences",
              curves("test", "held out") + curves("train", "members", "3 3"), ticks),
        Panel("memorised bits per parameter, net", "training sequences", curves("net", "memorised", "8 3", -1), ticks),
    ], f"From memorising to generalising: {' and '.join(map(format_count, sizes))} parameters")
