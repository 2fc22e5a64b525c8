"""How many bits a decoder can hold: sequences of random tokens, trained on until nothing more goes in.

The experiment of Morris et al. 2025 (arXiv 2505.24832, section 3): N sequences of S uniform random tokens of a
vocabulary V are H = N S log2 V bits that nothing but memory can predict, so what a model has memorised of them is

    bits = H - sum of -log2 p(token)        over every token of every sequence

More sequences raise it until it levels off; the level over the number of parameters is the capacity.

What lives here: the grid, and the bits of one cell. Training: `lmjax.reproduce.seeds`; fits and the figure:
`lmjax.reproduce.levels`.
"""

import argparse
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.reproduce import levels, seeds
from lmjax.reproduce.seeds import Cell, Shape, rows_of

# Two layers hold more of each parameter than one, and narrow heads more than wide ones (docs/capacity.md).
SMALL, MIDDLE, LARGE = Shape(2, 12, 6, 256, 16), Shape(2, 16, 8, 512, 16), Shape(2, 24, 8, 1024, 16)


def _grid(shape: Shape, offered: tuple[float, ...], steps: tuple[int, ...], **others) -> list[Cell]:
    one = shape.num_params / shape.sequence_bits
    return [Cell(shape, round(bits * one), s, **others) for bits in offered for s in steps]


# size -> cells. Those that differ in steps alone tell how much longer training would add.
SIZES: dict[str, list[Cell]] = {
    "test": _grid(SMALL, (1.0,), (600,), seeds=2),
    "cpu": [*_grid(SMALL, (1.0, 2.0, 3.0, 4.0, 6.0), (4000,), batch=64),
            *_grid(MIDDLE, (3.0, 4.5), (4000,), batch=128),
            *_grid(MIDDLE, (6.0,), (1000, 2000, 4000), batch=128),
            *_grid(SMALL, (6.0,), (4000,), batch=64, dtype="bfloat16")],
    "long": [*_grid(MIDDLE, (6.0,), (12_500, 50_000), batch=128, learning_rate=0.1, seeds=1),
             *_grid(LARGE, (5.0,), (25_000,), batch=128, learning_rate=0.04, seeds=1)],
    # The paper's V and S; the largest has 1.06M parameters. For an accelerator.
    "paper": [cell for layers, width in ((1, 32), (1, 64), (2, 64), (2, 128), (4, 128))
              for dtype in ("float32", "bfloat16")
              for cell in _grid(Shape(layers, width, 4, 2048, 64), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (300_000,),
                                batch=2048, learning_rate=5e-3, dtype=dtype)],
}


def _data(cell: Cell) -> dict[str, jax.Array]:
    """Each seed's sequences."""
    def one(seed):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return rows_of(jax.random.randint(key, (cell.sequences, cell.shape.length), 0, cell.shape.vocab))

    return jax.jit(jax.vmap(one))(jnp.arange(cell.seeds))


def train(cell: Cell, tell: Callable[[int, str], None] = lambda step, what: None) -> dict[str, np.ndarray]:
    """{"bits": memorised bits per parameter of each seed, "bits_bf16_weights": the same with the final weights rounded
    to bfloat16}."""
    data = _data(cell)

    def bits(training, params):
        nats = np.asarray(training.nats(params, data), np.float64)
        return (cell.sequences * cell.shape.sequence_bits - nats / math.log(2)) / cell.shape.num_params

    training, params = seeds.train(cell, data, lambda step, *now: tell(
        step, f"{bits(*now).mean():.3f} of {cell.offered:.2f} bits/parameter memorised"))
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(w.dtype), params)
    return {"bits": bits(training, params), "bits_bf16_weights": bits(training, rounded)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu",
                        help="cpu: about twenty minutes; long: about forty; paper: for an accelerator")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[list[seeds.Record], str, str]:
    """(records, table, figure) of a size's cells; finished ones are kept in capacity-SIZE.jsonl."""
    def measure(cell: Cell, tell) -> seeds.Record:
        found = {name: [float(b) for b in bits] for name, bits in train(cell, tell).items()}
        return {"offered": cell.offered, "ceiling": cell.ceiling} | found

    records = seeds.each(SIZES[options.size], options.out / f"capacity-{options.size}.jsonl", measure, say)
    return records, levels.table(records), levels.figure(records)
