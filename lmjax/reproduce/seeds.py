"""Small decoders of several seeds, trained together on sequences that are given: cells of an experiment's grid.

The model is GPT-2's block (learned positions, LayerNorm, biases, tied embeddings). Each row begins with token 0, so
that its first token is predicted too. Seeds differ in data and initial weights.

What lives here: a cell, the jitted training of its seeds, and the loop over cells that goes on where it was. What does
not: the data and what is measured of a model (`lmjax.reproduce.capacity`, `lmjax.reproduce.text_grid`).
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lmjax.data.manifest import write_atomically
from lmjax.errors import DataError
from lmjax.models import ComputeConfig, Decoder, DecoderConfig
from lmjax.objectives.pretrain import PretrainConfig, loss
from lmjax.optim import OptimConfig, make_optimizer
from lmjax.records import format_duration
from lmjax.step import gradient_sums

Record = dict[str, Any]


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
        """Bits of the data per parameter, if its tokens are uniform (`lmjax.reproduce.capacity`)."""
        return self.sequences * self.shape.sequence_bits / self.shape.num_params

    @property
    def ceiling(self) -> float:
        """The share of such data's bits that can be known. Which of N sequences comes next is not: log2 N bits each."""
        return 1 - math.log2(self.sequences) / self.shape.sequence_bits


def rows_of(targets_BT: jax.Array) -> dict[str, jax.Array]:
    """Sequences as a batch, in the fields of `lmjax.objectives.pretrain`."""
    tokens_BT = jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)))
    return {"tokens": tokens_BT, "targets": targets_BT, "segments": jnp.zeros_like(tokens_BT),
            "positions": jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape),
            "weights": jnp.ones(tokens_BT.shape, jnp.float32)}


def batch_of(data: dict[str, jax.Array], step: jax.Array, batch: int, key: jax.Array) -> dict[str, jax.Array]:
    """Rows of a step: all of them, or the next `batch` of an epoch's own order (what is left over waits an epoch)."""
    sequences = len(data["tokens"])
    if not batch or batch >= sequences:
        return data
    steps = sequences // batch
    order = jax.random.permutation(jax.random.fold_in(key, step // steps), sequences)
    rows = jax.lax.dynamic_slice(order, ((step % steps) * batch,), (batch,))
    return jax.tree.map(lambda a: a[rows], data)


def _each_seed(function: Callable) -> Callable:
    """`function` of every seed, side by side on an accelerator and one after another on a CPU, where batched products
    of such small matrices are no faster than single ones."""
    if jax.default_backend() == "cpu":
        return lambda *args: jax.lax.map(lambda own: function(*own), args)
    return jax.vmap(function)


class Training:
    """The jitted functions of a cell; all take a leading dimension of seeds."""

    def __init__(self, cell: Cell, chunk: int):
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
            return params, tx.init(params)

        def steps(params, opt_state, data, seed, first):
            key = jax.random.fold_in(jax.random.key(seed), 2)

            def one(carry, step):
                params, opt_state = carry
                batch = batch_of(data, step, cell.batch, key)
                grads, weight, _ = gradient_sums(objective, graphdef, params, batch, key)
                updates, opt_state = tx.update(jax.tree.map(lambda g: g / weight, grads), opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            return jax.lax.scan(one, (params, opt_state), first + jnp.arange(chunk))[0]

        def nats(params, data):
            return objective(nnx.merge(graphdef, params), data, jax.random.key(0))[2]["loss"][0]

        self.graphdef = graphdef
        self.start = jax.jit(_each_seed(start))
        self.steps = jax.jit(lambda *args: _each_seed(lambda *own: steps(*own, args[-1]))(*args[:-1]),
                             donate_argnums=(0, 1))
        self.nats = jax.jit(_each_seed(nats))


def train(cell: Cell, data: dict[str, jax.Array], say: Callable[[int, Training, Any], None] | None = None
          ) -> tuple[Training, Any]:
    """(training, weights of each seed) after cell.steps updates. data: `rows_of` with a leading dimension of seeds.
    `say(step, training, weights)` is called about twenty times."""
    chunk = max(1, cell.steps // 20)
    while cell.steps % chunk:
        chunk -= 1
    training = Training(cell, chunk)
    seeds = jnp.arange(cell.seeds)
    params, opt_state = training.start(seeds)
    for first in range(0, cell.steps, chunk):
        params, opt_state = training.steps(params, opt_state, data, seeds, first)
        if say:
            say(first + chunk, training, params)
    return training, params


def each(cells: Sequence[Cell], path: Path, measure: Callable[[Cell, Callable[[int, str], None]], Record],
         say: Callable[[str], None]) -> list[Record]:
    """What `measure(cell, tell)` found of each cell, cheapest first, beside the cell's fields, "params" and "seconds".

    Each is added to `path` when it is done, and what is found there is not trained again. `tell(step, what)` tells how
    far a cell is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    records = read(path)
    cells = sorted(cells, key=lambda c: c.steps * min(c.batch or c.sequences, c.sequences) * c.shape.length
                   * c.shape.num_params * c.seeds)
    for number, cell in enumerate(cells, 1):
        fields = dataclasses.asdict(cell)
        fields |= fields.pop("shape")
        if any(fields.items() <= record.items() for record in records):
            continue
        began = time.monotonic()

        def tell(step, what, number=number, cell=cell, began=began):
            left = (time.monotonic() - began) / step * (cell.steps - step)
            say(f"cell {number} of {len(cells)}: {cell.shape.num_params:,} parameters, {cell.dtype}, "
                f"{cell.sequences:,} sequences, step {step:,} of {cell.steps:,}: {what}, {format_duration(left)} to go")

        found = measure(cell, tell)
        records.append(fields | {"params": cell.shape.num_params, "seconds": time.monotonic() - began} | found)
        with path.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    return records


def read(path: Path) -> list[Record]:
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
