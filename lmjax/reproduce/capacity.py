"""How many bits a decoder can hold: sequences of random tokens, trained on until nothing more goes in.

The experiment of Morris et al. 2025 (arXiv 2505.24832, section 3): N sequences of S uniform random tokens of a
vocabulary V are H = N S log2 V bits that nothing but memory can predict, so what a model has memorised of them is

    bits = H - sum of -log2 p(token)        over every token of every sequence

More sequences raise it until it levels off; the level over the number of parameters is the capacity. The model is
GPT-2's block (learned positions, LayerNorm, biases, tied embeddings). Each row begins with token 0, so that its first
token is predicted too. Seeds differ in data and initial weights and are trained side by side.

What lives here: the grid, training of one cell, and the loop over cells. Fits and the figure: `lmjax.reproduce.levels`.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lmjax.data.manifest import write_atomically
from lmjax.errors import DataError
from lmjax.models import ComputeConfig, Decoder, DecoderConfig
from lmjax.objectives.pretrain import PretrainConfig, loss
from lmjax.optim import OptimConfig, make_optimizer
from lmjax.records import format_duration
from lmjax.reproduce import levels
from lmjax.step import gradient_sums


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and the kind of sequences that it is given."""

    layers: int
    width: int
    heads: int
    vocab: int
    length: int

    @property
    def model(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab, d_model=self.width, num_layers=self.layers, num_heads=self.heads,
            num_kv_heads=self.heads, head_dim=self.width // self.heads, d_ff=4 * self.width, max_seq_len=self.length,
            positions="learned", norm="layernorm", activation="gelu", gated=False, biases=True, tied=True)

    @property
    def num_params(self) -> int:
        """V d + S d + L (12 d^2 + 13 d) + 2 d: embeddings, positions, blocks, last norm."""
        d = self.width
        return self.vocab * d + self.length * d + self.layers * (12 * d * d + 13 * d) + 2 * d

    @property
    def sequence_bits(self) -> float:
        return self.length * math.log2(self.vocab)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid. batch 0: all sequences in every step. dtype: of activations; weights are float32."""

    shape: Shape
    sequences: int
    steps: int
    batch: int = 0
    learning_rate: float = 0.08
    dtype: str = "float32"
    seeds: int = 3

    @property
    def offered(self) -> float:
        """Bits of the data per parameter."""
        return self.sequences * self.shape.sequence_bits / self.shape.num_params

    @property
    def ceiling(self) -> float:
        """The share of the data's bits that can be known. Which of N sequences comes next is not: log2 N bits each."""
        return 1 - math.log2(self.sequences) / self.shape.sequence_bits


SMALL, MIDDLE = Shape(1, 12, 3, 256, 16), Shape(1, 16, 4, 512, 16)


def _grid(shape: Shape, offered: tuple[float, ...], steps: tuple[int, ...], **others) -> list[Cell]:
    one = shape.num_params / shape.sequence_bits
    return [Cell(shape, round(bits * one), s, **others) for bits in offered for s in steps]


# size -> cells. Those that differ in steps alone tell how much longer training would add.
SIZES: dict[str, list[Cell]] = {
    "test": _grid(SMALL, (1.0,), (600,), seeds=2),
    "cpu": [*_grid(SMALL, (1.0, 2.0, 3.0, 4.0, 6.0), (4000,), batch=64),
            *_grid(MIDDLE, (3.0, 4.5), (4000,), batch=128),
            *_grid(MIDDLE, (6.0,), (1000, 2000, 4000, 8000), batch=128),
            *_grid(SMALL, (6.0,), (4000,), batch=64, dtype="bfloat16")],
    "long": [*_grid(SMALL, (1.0, 2.0, 3.0, 4.0, 6.0), (50_000,), batch=64, learning_rate=0.05),
             *_grid(MIDDLE, (3.0, 4.5), (50_000,), batch=128, learning_rate=0.05),
             *_grid(MIDDLE, (6.0,), (6000, 12_500, 25_000, 50_000, 100_000), batch=128, learning_rate=0.05)],
    # The paper's V and S; the largest has 1.06M parameters. For an accelerator.
    "paper": [cell for layers, width in ((1, 32), (1, 64), (2, 64), (2, 128), (4, 128))
              for dtype in ("float32", "bfloat16")
              for cell in _grid(Shape(layers, width, 4, 2048, 64), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (300_000,),
                                batch=2048, learning_rate=5e-3, dtype=dtype)],
}


def _data(shape: Shape, sequences: int, key: jax.Array) -> dict[str, jax.Array]:
    """A batch of all sequences, in the fields of `lmjax.objectives.pretrain`."""
    targets_BT = jax.random.randint(key, (sequences, shape.length), 0, shape.vocab)
    tokens_BT = jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)))
    return {"tokens": tokens_BT, "targets": targets_BT, "segments": jnp.zeros_like(tokens_BT),
            "positions": jnp.broadcast_to(jnp.arange(shape.length), tokens_BT.shape),
            "weights": jnp.ones(tokens_BT.shape, jnp.float32)}


def _batch(data: dict[str, jax.Array], step: jax.Array, batch: int, key: jax.Array) -> dict[str, jax.Array]:
    """Rows of a step: all of them, or the next `batch` of an epoch's own order (what is left over waits an epoch)."""
    sequences = len(data["tokens"])
    if not batch or batch >= sequences:
        return data
    steps = sequences // batch
    order = jax.random.permutation(jax.random.fold_in(key, step // steps), sequences)
    rows = jax.lax.dynamic_slice(order, ((step % steps) * batch,), (batch,))
    return jax.tree.map(lambda a: a[rows], data)


class Training:
    """The jitted functions of a cell; all take a leading dimension of seeds."""

    def __init__(self, cell: Cell, chunk: int):
        self.cell = cell
        compute = ComputeConfig(dtype=cell.dtype, attention="reference", layers="auto")
        config = OptimConfig(learning_rate=cell.learning_rate, warmup_steps=min(200, cell.steps // 10), b2=0.999,
                             weight_decay=0.0, final_fraction=0.01)
        tx, _ = make_optimizer(config, cell.steps)

        def build(key):
            return Decoder(cell.shape.model, key, compute)

        graphdef = nnx.split(build(jax.random.key(0)))[0]
        objective = functools.partial(loss, PretrainConfig())

        def start(seed):
            params = nnx.to_pure_dict(nnx.split(build(jax.random.fold_in(jax.random.key(seed), 0)))[1])
            data = _data(cell.shape, cell.sequences, jax.random.fold_in(jax.random.key(seed), 1))
            return params, tx.init(params), data

        def steps(params, opt_state, data, seed, first):
            key = jax.random.fold_in(jax.random.key(seed), 2)

            def one(carry, step):
                params, opt_state = carry
                grads, weight, _ = gradient_sums(objective, graphdef, params, _batch(data, step, cell.batch, key), key)
                updates, opt_state = tx.update(jax.tree.map(lambda g: g / weight, grads), opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            return jax.lax.scan(one, (params, opt_state), first + jnp.arange(chunk))[0]

        def nats(params, data):
            return objective(nnx.merge(graphdef, params), data, jax.random.key(0))[2]["loss"][0]

        self.start = jax.jit(jax.vmap(start))
        self.steps = jax.jit(jax.vmap(steps, in_axes=(0, 0, 0, 0, None)), donate_argnums=(0, 1))
        self.nats = jax.jit(jax.vmap(nats))


def train(cell: Cell, say: Callable[[int, np.ndarray], None] = lambda step, bits: None) -> dict[str, np.ndarray]:
    """{"bits": memorised bits per parameter of each seed, "bits_bf16_weights": the same with the final weights rounded
    to bfloat16}. `say(step, bits)` is called about twenty times."""
    chunk = max(1, cell.steps // 20)
    while cell.steps % chunk:
        chunk -= 1
    training = Training(cell, chunk)
    seeds = jnp.arange(cell.seeds)
    params, opt_state, data = training.start(seeds)

    def bits(params):
        nats = np.asarray(training.nats(params, data), np.float64)
        return (cell.sequences * cell.shape.sequence_bits - nats / math.log(2)) / cell.shape.num_params

    for first in range(0, cell.steps, chunk):
        params, opt_state = training.steps(params, opt_state, data, seeds, first)
        say(first + chunk, bits(params))
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(w.dtype), params)
    return {"bits": bits(params), "bits_bf16_weights": bits(rounded)}




def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu",
                        help="cpu: a quarter of an hour on two cores; long: hours; paper: for an accelerator")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[list[levels.Record], str, str]:
    """(records, table, figure) of a size's cells, cheapest first. Each is added to capacity-SIZE.jsonl when it is done,
    and what is found there is not trained again."""
    path = options.out / f"capacity-{options.size}.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    cells = sorted(SIZES[options.size],
                   key=lambda c: c.steps * c.sequences * c.shape.length * c.shape.num_params * c.seeds)
    records = read(path)
    for number, cell in enumerate(cells, 1):
        fields = dataclasses.asdict(cell)
        fields |= fields.pop("shape")
        if any(fields.items() <= record.items() for record in records):
            continue
        began = time.monotonic()

        def tell(step, bits, number=number, cell=cell, began=began):
            passed = time.monotonic() - began
            say(f"cell {number} of {len(cells)}: {cell.shape.num_params:,} parameters, {cell.dtype}, "
                f"{cell.offered:.2f} bits/parameter offered, step {step:,} of {cell.steps:,}: {bits.mean():.3f} "
                f"memorised, {format_duration(passed / step * (cell.steps - step))} to go")

        found = {name: [float(b) for b in bits] for name, bits in train(cell, tell).items()}
        records.append(fields | {"params": cell.shape.num_params, "offered": cell.offered, "ceiling": cell.ceiling,
                                 "seconds": time.monotonic() - began} | found)
        with path.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    return records, levels.table(records), levels.figure(records)


def read(path: Path) -> list[levels.Record]:
    """The records of a folder that was begun. Raises DataError for a line that is not one of them; the last one may be
    incomplete, and is made anew."""
    if not path.exists():
        return []
    *lines, last = path.read_text().split("\n")
    if last:
        write_atomically(path, "".join(line + "\n" for line in lines).encode())
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not a line of JSON ({error}); move the file away to begin anew") from error
