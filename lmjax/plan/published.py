"""Runs that others have measured and published, against what the roofline says of them: its error, row by row.

What lives here: the rows, the fit of the one free number (the share of the peak that matrix products reach), and the
table of `lmjax plan --validate`. Nothing is compiled: shapes, chips and the formulas of `lmjax.plan.work`.

A row's settings are those of the recipe that its source names. MFU is counted as the source counts it: MaxText's
figures before July 2025 and those of axlearn take attention over whole rows (`all_keys`), later ones over the keys
that a causal query sees. Splits marked "ours" are not published with the figure.
"""

import dataclasses
import math
import statistics

from lmjax.models import DecoderConfig, preset
from lmjax.plan.machine import parse_machine
from lmjax.plan.roofline import Times, step_times
from lmjax.plan.work import Split, analytic

MAXTEXT = "MaxText, configs/{}/README.md and {}.sh"
TIERING = "MaxText, docs/reference/models/tiering.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """mfu: published, 0 to 1. batch: rows of the global batch."""

    name: str
    machine: str
    model: DecoderConfig
    split: Split
    batch: int
    seq_len: int
    remat: str | float
    mfu: float
    source: str
    all_keys: bool = True
    slices: int = 1


def _scaled(width: int, heads: int, d_ff: int, layers: int) -> DecoderConfig:
    """The models of MaxText's global_parameter_scale: heads of 128, gated, vocabulary 32,000, untied."""
    return DecoderConfig(vocab_size=32000, num_layers=layers, d_model=width, num_heads=heads, head_dim=128, d_ff=d_ff,
                         tied=False)


def rows() -> list[Row]:
    b16, b32 = _scaled(4096, 64, 28672, 32), _scaled(8192, 64, 28672, 32)
    b64, b128 = _scaled(8192, 64, 28672, 64), _scaled(8192, 128, 57344, 64)
    v5e, v5p = MAXTEXT.format("v5e", "<size>"), MAXTEXT.format("v5p", "<size>")
    return [
        Row("16B", "v5e:16x16", b16, Split(1, 256), 6 * 256, 2048, "full", 0.6110, v5e),
        Row("32B", "v5e:16x16", b32, Split(1, 256), 4 * 256, 2048, "full", 0.6686, v5e),
        Row("64B", "v5e:16x16", b64, Split(1, 256), 2 * 256, 2048, "full", 0.5990, v5e),
        Row("128B", "v5e:16x16", b128, Split(1, 16, 16), 256, 2048, "dots", 0.5606, v5e),
        Row("32B", "v5p:4x4x4", b32, Split(1, 16, 4), 7 * 64, 2048, "dots", 0.7147, v5p),
        Row("64B", "v5p:4x4x4", b64, Split(1, 16, 4), 3 * 64, 2048, "dots", 0.7031, v5p),
        Row("128B", "v5p:4x4x8", b128, Split(1, 16, 8), 128, 2048, "dots", 0.6868, v5p),
        Row("Llama-2 70B", "v5p:4x4x4", preset("llama2-70b"), Split(1, 64), 4 * 64, 4096, 0.55, 0.65,
            "MaxText, docs, architecture overview"),
        Row("Llama-3.1 8B", "v6e:16x16", preset("llama3.1-8b"), Split(1, 256), 4 * 256, 8192, 0.54, 0.4546, TIERING,
            False),
        Row("Llama-3.1 70B", "v6e:16x16", preset("llama3.1-70b"), Split(1, 256), 5 * 256, 8192, 0.63, 0.5033,
            TIERING, False),
        Row("Llama-2 7B", "v5e:16x16", preset("llama2-7b"), Split(4, 256), 1024, 4096, "dots", 0.46,
            "axlearn, experiments/text/gpt/fuji.py (v2); 4 Mi tokens", slices=4),
        Row("Llama-2 70B", "v5e:16x16", preset("llama2-70b"), Split(4, 256), 1024, 4096, "full", 0.599,
            "axlearn, experiments/text/gpt/fuji.py (v2); 4 Mi tokens", slices=4),
        Row("Llama-2 7B", "h100:8", preset("llama2-7b"), Split(1, 8), 32, 4096, "dots", 0.497,
            "MaxText, configs/a3/llama_2_7b (492 TFLOP/s)"),
        Row("Llama-2 7B", "h100:256", preset("llama2-7b"), Split(32, 8), 1024, 4096, "dots", 0.39,
            "axlearn, experiments/text/gpt/fuji.py (v2); 4 Mi tokens, split ours"),
    ]


def predict(row: Row, efficiency: float) -> Times:
    """The roofline's times of a row at one share of the peak."""
    machine = parse_machine(row.machine, row.slices)
    assert row.split.size == machine.chips, row
    work = analytic(row.model, row.split, row.batch, row.seq_len, row.remat, all_keys=row.all_keys)
    return step_times(work, machine, (efficiency, efficiency, efficiency))


def error(row: Row, efficiency: float) -> float:
    """Predicted over published MFU, less 1."""
    return predict(row, efficiency).mfu[1] / row.mfu - 1


def fit(data: list[Row]) -> float:
    """The share of the peak, to 0.01, with the least mean of |log(predicted / published)|: of an even number of rows,
    the middle of the shares that are equally good."""
    shares = [e / 100 for e in range(30, 98)]
    losses = [statistics.fmean(abs(math.log1p(error(r, e))) for r in data) for e in shares]
    return statistics.median_low(e for e, loss in zip(shares, losses, strict=True) if loss < min(losses) + 1e-3)


def chip_of(row: Row) -> str:
    return row.machine.partition(":")[0]


def table(data: list[Row] | None = None) -> str:
    """Predicted and published MFU of every row, each predicted from the *other* rows of its chip."""
    data = rows() if data is None else data
    lines = ["| model | machine | tokens a chip | published MFU | predicted | error | after products, limit | source |",
             "|---|---|---|---|---|---|---|---|"]
    errors = []
    for i, row in enumerate(data):
        share = fit([r for j, r in enumerate(data) if j != i and chip_of(r) == chip_of(row)])
        times, machine = predict(row, share), parse_machine(row.machine, row.slices)
        errors.append(error(row, share))
        second = "network" if times.network + times.exposed > times.memory else "memory"
        lines.append(f"| {row.name} | {machine} | {row.batch * row.seq_len // machine.chips:,} | {row.mfu:.1%} | "
                     f"{times.mfu[1]:.1%} | {errors[-1]:+.0%} | {second} | {row.source} |")
    fitted = {chip: fit([r for r in data if chip_of(r) == chip]) for chip in sorted({chip_of(r) for r in data})}
    return "\n".join([*lines, "", f"{len(data)} rows: mean absolute error {statistics.fmean(map(abs, errors)):.0%}, "
                      f"largest {max(errors, key=abs):+.0%}. Shares of the peak that all rows of a chip fit: "
                      + ", ".join(f"{chip} {share:.2f}" for chip, share in fitted.items()) + "."])
