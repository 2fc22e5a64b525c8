"""Small models trained many at a time on texts held in memory: what the experiments on protection share.

What lives here: a stream of documents, rows of it with their goldfish weights, one compiled train step for all models
of a length of training, held-out loss, greedy continuations, and prose that every Python brings. What does not: which
texts and which models (the experiments), and training for its own sake (`lmjax.train`).
"""

import functools
import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.data import Rows
from lmjax.data.normal import units
from lmjax.data.protect import Marks, Protect
from lmjax.decode.generate import SampleConfig, generate
from lmjax.errors import ConfigError
from lmjax.losses.goldfish import GoldfishConfig, keep_mask
from lmjax.models import Decoder, DecoderConfig
from lmjax.objectives import pretrain
from lmjax.optim import OptimConfig, make_optimizer
from lmjax.state import graphdef

ROWS = 8  # of a batch
NO_MASK = GoldfishConfig("none")
Fields = dict[str, np.ndarray]


class Stream:
    """Documents as one stream of bos, tokens, eos; read like a prepared split (`lmjax.data.Tokens`)."""

    folder, split = "memory", "train"

    def __init__(self, documents: Sequence[np.ndarray], tokenizer) -> None:
        whole = [np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]) for ids in documents]
        self.ids = np.concatenate(whole).astype(np.int32)
        self.numbers = np.repeat(np.arange(len(whole)), [len(ids) for ids in whole])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[start:stop], self.numbers[start:stop]


class Lab:
    """Models of 0.3M parameters. A mask is weights of rows, made on the host, so all strategies share a program."""

    def __init__(self, tokenizer, seq_len: int) -> None:
        self.tokenizer, self.seq_len = tokenizer, seq_len
        config = DecoderConfig(vocab_size=tokenizer.vocab_size, num_layers=2, d_model=96, num_heads=4, num_kv_heads=4,
                               max_seq_len=256, qk_norm=True)
        self.build = functools.partial(Decoder, config)
        self.definition = graphdef(self.build)
        self._programs: dict = {}
        self.mean = jax.jit(self._mean)

    def _mean(self, params, batch):
        total, weight, _ = pretrain.loss(pretrain.PretrainConfig(), nnx.merge(self.definition, params), batch,
                                         jax.random.key(0))
        return total / weight

    def _program(self, steps: int):
        """(optimizer's init, jitted update): a schedule's length is part of the program."""
        if steps not in self._programs:
            tx, _ = make_optimizer(OptimConfig(learning_rate=6e-3, warmup_steps=max(1, steps // 20)), steps)

            def update(params, state, batch):
                updates, state = tx.update(jax.grad(self._mean)(params, batch), state, params)
                return jax.tree.map(jnp.add, params, updates), state

            self._programs[steps] = tx.init, jax.jit(update, donate_argnums=(0, 1))
        return self._programs[steps]

    def rows(self, stream: Stream, fish: GoldfishConfig = NO_MASK) -> Fields:
        """Every row of a stream, its weights masked."""
        protect = Protect((True,), True, fish.context, fish.seed) if fish.strategy == "text_hash" else None
        source = Rows(stream, self.seq_len, marks=Marks(protect, 0, self.tokenizer) if protect else None)
        rows = [source[i] for i in range(len(source))]
        return masked({name: np.stack([row[name] for row in rows]) for name in rows[0]}, fish)

    def fresh(self, seed: int):
        return jax.tree.map(jnp.array, nnx.state(self.build(seed=seed), nnx.Param))

    def train(self, batches: Sequence[Fields], seed: int):
        """Weights after one update a batch. The length of `batches` is the schedule's."""
        init, update = self._program(len(batches))
        params = self.fresh(seed)
        state = init(params)
        for batch in batches:
            params, state = update(params, state, batch)
        return params

    def loss(self, params, rows: Fields) -> float:
        """Mean nats a token on up to 24 batches of held-out rows."""
        starts = range(0, len(rows["tokens"]) - ROWS, ROWS)[:24]
        return float(np.mean([self.mean(params, {n: v[i:i + ROWS] for n, v in rows.items()}) for i in starts]))

    def continued(self, params, prompts: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
        """Each prompt's greedy continuation, until eos."""
        return generate(self.definition, params, prompts, SampleConfig(max_new_tokens=tokens, temperature=0.0),
                        key=jax.random.key(0), vocab_size=self.tokenizer.vocab_size, eos_id=self.tokenizer.eos_id)


def masked(rows: Fields, fish: GoldfishConfig, key: jax.Array | None = None) -> Fields:
    """Rows with the weights of dropped targets 0. key: of "random"."""
    rows = dict(rows)
    marks = rows.pop("goldfish", None)
    keep = keep_mask(fish, rows["tokens"], rows["targets"], rows["segments"], key, marks_BT=marks)
    return rows | {"weights": rows["weights"] * np.asarray(keep)}


def joined(parts: Sequence[Fields]) -> Fields:
    """Rows of several sources as one batch."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def taken(rows: Fields, numbers: np.ndarray) -> Fields:
    return {name: values[numbers] for name, values in rows.items()}


def prose(count: int, words: int) -> tuple[list[str], list[str], list[str]]:
    """(passages of at least so many words, on one line each; documents to train on; documents held out): English from
    the documentation that every Python brings (pydoc_data). Passages are in none of the documents.

    Raises ConfigError where there are not so many passages.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    found, seen = [], set()
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            line = " ".join(paragraph.split())
            plain = sum(c.isalpha() or c in " ,.'" for c in line) / max(len(line), 1)
            if len(units(line).words) >= words and plain > 0.96 and line.isascii() and line not in seen:
                seen.add(line)
                found.append(paragraph)
    if len(found) < count:
        raise ConfigError(f"{count} passages of {words} words: this Python's documentation holds {len(found)}; ask for "
                          "fewer")
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]
    documents = [topics[name] for name in sorted(topics)]
    for paragraph in chosen:
        documents = [document.replace(paragraph, "") for document in documents]
    return [" ".join(paragraph.split()) for paragraph in chosen], documents[::2] + documents[1::4], documents[3::4]


def spread(values: Sequence[float], form: str) -> str:
    """Mean, least and greatest of seeds; the value of one."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
