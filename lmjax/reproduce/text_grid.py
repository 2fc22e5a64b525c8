"""Small models trained on more and more sequences of real text, until they know them: one grid, two experiments.

With few sequences a model of a given size knows each by heart; where their bits exceed what it can hold it has to find
what they share. Morris et al. 2025 (arXiv 2505.24832, sections 4 and 5) read two things from that: where held-out loss
begins to fall and memorisation to shrink (`lmjax.reproduce.onset`), and how well membership can be inferred from size
and data alone (`lmjax.reproduce.membership_law`).

What lives here: the text, the grid, and what is measured of a cell. Training: `lmjax.reproduce.seeds`.
"""

import argparse
import ast
import collections
import functools
import importlib
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.data import train_bpe
from lmjax.errors import ConfigError
from lmjax.evals.ranking import auc
from lmjax.reproduce import seeds
from lmjax.reproduce.seeds import Cell, Record, Shape, rows_of

HELD_OUT = 2048  # sequences that no model sees: non-members, and the test of what was learned
TOLD = 64  # members whose loss is told while a model trains
SAMPLE = 1024  # members whose code length is kept one by one
LENGTH, VOCABULARY = 32, 512
SMALL, LARGE = Shape(1, 12, 3, VOCABULARY, LENGTH), Shape(2, 24, 4, VOCABULARY, LENGTH)


def _grid(shape: Shape, sizes: tuple[int, ...], steps: int) -> list[Cell]:
    return [Cell(shape, n, steps, batch=64, learning_rate=0.02) for n in sizes]


# size -> cells, the largest of each shape being the reference for "what a model knows of the language".
SIZES: dict[str, list[Cell]] = {
    "test": [Cell(SMALL, n, 60, batch=64, learning_rate=0.02, seeds=2) for n in (32, 256)],
    "cpu": [*_grid(SMALL, (32, 64, 128, 256, 512, 1024, 2048, 4096), 3000),
            *_grid(LARGE, (64, 128, 256, 512, 1024, 2048, 4096, 8192), 3000)],
    "long": [*_grid(SMALL, (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), 30_000),
             *_grid(LARGE, (64, 128, 256, 512, 1024, 2048, 4096, 8192), 30_000),
             *_grid(Shape(2, 48, 4, VOCABULARY, LENGTH), (256, 512, 1024, 2048, 4096, 8192, 16384), 30_000)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu",
                        help="cpu: half an hour on two cores; long: many hours, or an accelerator. membership-law and "
                        "onset share their models: what one has trained in a folder, the other finds there")


@functools.cache
def sequences() -> np.ndarray:
    """int32 [n, LENGTH]: different sequences of English, in an order of no meaning: the topics of pydoc and the
    docstrings of the standard library, cut end to end, each sequence once.

    Exact repetitions are taken out, since a sequence that occurs twice is learned sooner (section 4.1 of the paper).
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)] + _docstrings()
    tokenizer = train_bpe(texts, VOCABULARY)
    ids = np.concatenate(tokenizer.encode_batch(texts))
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int32)
    rows = np.unique(rows, axis=0)
    return np.random.default_rng(0).permutation(rows)


def _docstrings() -> list[str]:
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 120:
                    found.append(text)
    return found


def _data(cell: Cell) -> np.ndarray:
    """int32 [seeds, N, T]: each seed's own sequences."""
    rows = sequences()[HELD_OUT:]
    if len(rows) < cell.sequences:
        raise ConfigError(f"{cell.sequences:,} sequences: this Python's documentation holds {len(rows):,}; take another"
                          " --size")
    return np.stack([rows[np.random.default_rng([7, seed]).permutation(len(rows))[:cell.sequences]]
                     for seed in range(cell.seeds)])


def per_sequence(graphdef: nnx.GraphDef, params, rows_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nats of each sequence; is every token of its second half the likeliest one: it is recited), float64 and bool."""
    parts = [_per_sequence(graphdef, params, rows_NT[i:i + 1024]) for i in range(0, len(rows_NT), 1024)]
    nats, right = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    return nats.astype(np.float64), right


@functools.partial(jax.jit, static_argnums=0)  # here, so that the seeds of a cell share a program
def _per_sequence(graphdef, params, targets_BT):
    logits = nnx.merge(graphdef, params)(rows_of(targets_BT)["tokens"])
    nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
    return nats.sum(1), (logits.argmax(-1) == targets_BT)[:, LENGTH // 2:].all(1)


def measure(cell: Cell, tell: Callable[[int, str], None]) -> Record:
    """Of each seed: mean nats a token on members ("train") and on held-out sequences ("test"), the shares of both that
    are recited, membership by the loss ("f1", "auc"), and the nats of its first SAMPLE members, one by one."""
    data = _data(cell)
    fields = jax.vmap(rows_of)(jnp.asarray(data))
    shown = jax.tree.map(lambda a: a[:, :TOLD], fields)
    training, params = seeds.train(cell, fields, lambda step, training, params: tell(
        step, f"loss {np.asarray(training.nats(params, shown)).mean() / shown['weights'][0].size:.3f}"))
    others, found = sequences()[:HELD_OUT], collections.defaultdict(list)
    for seed in range(cell.seeds):
        own = jax.tree.map(lambda a, seed=seed: a[seed], params)
        (nats, right), (other, other_right) = (per_sequence(training.graphdef, own, rows)
                                               for rows in (data[seed], others))
        for name, value in (("train", nats.mean() / LENGTH), ("test", other.mean() / LENGTH),
                            ("train_recited", right.mean()), ("test_recited", other_right.mean()),
                            ("f1", balanced_f1(nats, other)), ("auc", auc(-nats, -other))):
            found[name].append(float(value))
        found["nats"].append([round(float(value), 3) for value in nats[:SAMPLE]])
    return dict(found)


def balanced_f1(members: np.ndarray, others: np.ndarray) -> float:
    """F1 of calling the half with the lower loss members, of a set with as many members as others (each side weighs
    one half): precision, recall, F1 and accuracy are then equal, and 0.5 by chance."""
    losses = np.concatenate([members, others])
    weight = np.repeat([0.5 / len(members), 0.5 / len(others)], [len(members), len(others)])
    order = np.argsort(losses, kind="stable")
    called = np.minimum(np.cumsum(weight[order]), 0.5)
    share = np.diff(called, prepend=0.0)  # how much of each is below the threshold; the one that it cuts, in part
    return float(2 * share[order < len(members)].sum())


def run(options: argparse.Namespace, say: Callable[[str], None]) -> list[Record]:
    """The records of a size's cells; finished ones are kept in text-grid-SIZE.jsonl."""
    return seeds.each(SIZES[options.size], options.out / f"text-grid-{options.size}.jsonl", measure, say)


def by_shape(records: Sequence[Record]) -> list[list[Record]]:
    """Records of each number of parameters, by the number of sequences."""
    sizes = sorted({r["params"] for r in records})
    return [sorted((r for r in records if r["params"] == p), key=lambda r: r["sequences"]) for p in sizes]
