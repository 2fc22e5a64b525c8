"""Runs that others have measured and published, against what the roofline says of them: its error, row by row.

What lives here: the rows, the fit of the one free number (the share of the peak that matrix products reach), and the
table of `lmjax plan --validate`. Nothing is compiled: shapes, chips and the formulas of `lmjax.plan.work`.

A row's settings are those of the recipe that its source names. MFU is counted as the source counts it: MaxText's
figures before July 2025 and those of axlearn take attention over whole rows (`all_keys`), later ones over the keys
that a causal query sees. Splits marked "ours" are not published with the figure. Mixtures of experts take no part in
the fit: how far off they are tells what a share that dense models gave is worth for them.
"""

import dataclasses
import math
import statistics

from lmjax.models import DecoderConfig, MoEConfig, preset
from lmjax.plan.machine import parse_machine
from lmjax.plan.roofline import Times, step_times
from lmjax.plan.work import Split, analytic

MIXTRAL = "MaxText, tiering.md; tpu-recipes, training/{}"
MAXTEXT = "MaxText, configs/{}/README.md and {}.sh"
TIERING = "MaxText, docs/reference/models/tiering.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """mfu: published, 0 to 1. batch: rows of the global batch. padding: of `analytic`."""

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
    padding: float = 1.0


def _scaled(width: int, heads: int, d_ff: int, layers: int) -> DecoderConfig:
    """The models of MaxText's global_parameter_scale: heads of 128, gated, vocabulary 32,000, untied."""
    return DecoderConfig(vocab_size=32000, num_layers=layers, d_model=width, num_heads=heads, head_dim=128, d_ff=d_ff,
                         tied=False)


def rows() -> list[Row]:
    b16, b32 = _scaled(4096, 64, 28672, 32), _scaled(8192, 64, 28672, 32)
    b64, b128 = _scaled(8192, 64, 28672, 64), _scaled(8192, 128, 57344, 64)
    m7 = preset("mixtral-8x7b")
    m22 = preset("mixtral-8x7b", num_layers=56, d_model=6144, num_heads=48, vocab_size=32768,
                 moe=MoEConfig(8, 2, 16384))
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
        # Drops no token; recomputes blocks wholly, which is MaxText's default.
        Row("Mixtral 8x7B", "v5p:4x4x8", m7, Split(1, 128), 36 * 128, 4096, "full", 0.5256,
            MIXTRAL.format("v5p/Mixtral-8X7B-Maxtext")),
        Row("Mixtral 8x7B", "v5p:4x4x4", m7, Split(1, 64), 36 * 64, 4096, "full", 0.5489,
            "MaxText, docs, architecture overview; batch of the former"),
        # With capacity_factor 1.25; blocks but for their attention's products are computed again, 0.89 and 0.87 of one.
        Row("Mixtral 8x7B", "v6e:16x16", m7, Split(1, 256), 12 * 256, 4096, 0.89, 0.3523,
            MIXTRAL.format("trillium/Mixtral-8x7B-MaxText"), padding=1.25),
        Row("Mixtral 8x22B", "v6e:16x16", m22, Split(1, 64, expert=4), 8 * 256, 4096, 0.87, 0.362,
            MIXTRAL.format("trillium/Mixtral-8x22B-MaxText"), padding=1.25),
    ]


def predict(row: Row, efficiency: float) -> Times:
    """The roofline's times of a row at one share of the peak."""
    machine = parse_machine(row.machine, row.slices)
    assert row.split.size == machine.chips, row
    work = analytic(row.model, row.split, row.batch, row.seq_len, row.remat, all_keys=row.all_keys,
                    padding=row.padding)
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


def fitted(data: list[Row], chip: str, but: Row | None = None) -> float:
    """The share that dense models on a chip fit, but for one row."""
    return fit([r for r in data if chip_of(r) == chip and r.model.moe is None and r is not but])


def table(data: list[Row] | None = None) -> str:
    """Predicted and published MFU of every row, each predicted from the *other* rows of its chip."""
    data = rows() if data is None else data
    lines = ["| model | machine | tokens a chip | published MFU | predicted | error | after products, limit | source |",
             "|---|---|---|---|---|---|---|---|"]
    errors: dict[bool, list[float]] = {False: [], True: []}  # of dense models, of mixtures
    for row in data:
        share = fitted(data, chip_of(row), row)
        times, machine = predict(row, share), parse_machine(row.machine, row.slices)
        errors[row.model.moe is not None].append(error(row, share))
        second = "network" if times.network + times.exposed > times.memory else "memory"
        lines.append(f"| {row.name} | {machine} | {row.batch * row.seq_len // machine.chips:,} | {row.mfu:.1%} | "
                     f"{times.mfu[1]:.1%} | {error(row, share):+.0%} | {second} | {row.source} |")
    chips = sorted({chip_of(r) for r in data})
    words = "; ".join(f"{len(found)} rows of {'mixtures, not fitted' if moe else 'dense models'}: mean absolute error "
                      f"{statistics.fmean(map(abs, found)):.0%}, largest {max(found, key=abs):+.0%}"
                      for moe, found in errors.items() if found)
    return "\n".join([*lines, "", f"{words}. Shares of the peak that all dense rows of a chip fit: "
                      + ", ".join(f"{chip} {fitted(data, chip):.2f}" for chip in chips) + "."])
