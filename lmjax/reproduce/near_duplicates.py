"""Goldfish masks on near-duplicates: what leaks, and what closing the leak costs.

Passages of English documentation (pydoc_data, in every Python) are mixed into the rest of it, each in eight copies
that differ in line breaks, in case, and in how they are cut into tokens. A mask of tokens drops other targets in each
copy, so that together the copies teach everything; a mask of words drops the same words in all of them. Counted
without training: the share of letters that no copy supervises. After training a small model from several seeds: how
many copies it continues word for word, and its loss on held-out text.
"""

import argparse
import functools
import importlib
import textwrap
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.data import Rows, train_bpe
from lmjax.data.normal import letters, units
from lmjax.data.protect import Marks, Protect, plain_pieces, token_values
from lmjax.decode.generate import SampleConfig, generate
from lmjax.errors import ConfigError
from lmjax.losses.goldfish import GoldfishConfig, keep_mask
from lmjax.models import Decoder, DecoderConfig
from lmjax.objectives import pretrain
from lmjax.optim import OptimConfig, make_optimizer
from lmjax.reproduce.figure import Curve, Panel, panels
from lmjax.state import graphdef

COPIES, K = 8, 4
PREFIX, SUFFIX = 20, 20  # words of a passage: given, and asked for
ROWS, NEAR_ROWS, SEQ_LEN, VOCABULARY = 8, 6, 96, 1024  # rows of a batch, and how many of them are of the copies
KINDS = ("breaks", "case", "tokens", "all")
STRATEGIES = {
    "none": GoldfishConfig("none"), "hash_table": GoldfishConfig("hash_table", K, 13),
    "hash": GoldfishConfig("hash", K, 13), "text_hash": GoldfishConfig("text_hash", K, 5),
}
TRAINED = ("control", "none", "hash", "text_hash")  # the control never sees the passages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, what in (("seeds", 3, "models of each kind"), ("steps", 300, "updates of a model"),
                                ("passages", 4, "passages, of 75 words or more")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--differ", choices=KINDS, default="breaks",
                        help="in what the copies that models are trained on differ (default: %(default)s)")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict, str, str]:
    if problems := [f"--{name} {getattr(options, name)}: give 1 or more" for name in ("seeds", "steps", "passages")
                    if getattr(options, name) < 1]:
        raise ConfigError(*problems)
    passages, background, held_out = corpus(options.passages)
    tokenizer = train_bpe(background, VOCABULARY)
    hidden = {kind: hidden_shares(passages, kind, tokenizer) for kind in KINDS}
    say("letters that no copy supervises, of copies that differ in "
        + "; ".join(f"{kind}: " + ", ".join(f"{n} {v:.3f}" for n, v in hidden[kind].items()) for kind in KINDS))
    near = Stream([encode(copy, tokenizer) for i, passage in enumerate(passages)
                   for copy in copies(passage, options.differ, i)], tokenizer)
    rest = Stream([tokenizer.encode(text) for text in background], tokenizer)
    test = Stream([tokenizer.encode(text) for text in held_out], tokenizer)
    lab = Lab(tokenizer, options.steps)
    models = []
    for seed in range(options.seeds):
        for name in TRAINED:
            fish = STRATEGIES.get(name, STRATEGIES["none"])
            params = lab.train(rest, near if name != "control" else None, fish, seed)
            right = lab.recited(params, passages, options.differ)
            models.append({"strategy": name, "seed": seed, "words_right": right, "held_out": lab.loss(params, test)})
            say(f"seed {seed}, {name}: {np.mean(np.array(right) == SUFFIX):.0%} recited, {np.mean(right):.1f} of "
                f"{SUFFIX} words, held-out loss {models[-1]['held_out']:.3f}")
    result = {"copies": COPIES, "k": K, "steps": options.steps, "passages": options.passages, "differ": options.differ,
              "hidden": hidden, "models": models}
    return result, table(result), figure(result)


# ---- The texts -----------------------------------------------------------------------------------------


def corpus(count: int) -> tuple[list[str], list[str], list[str]]:
    """(passages on one line each, documents to train on, documents held out): prose of pydoc's topics."""
    topics = importlib.import_module("pydoc_data.topics").topics
    found, seen = [], set()
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            line = " ".join(paragraph.split())
            words = units(line).words
            plain = sum(c.isalpha() or c in " ,.'" for c in line) / max(len(line), 1)
            if len(words) >= 75 and plain > 0.96 and line.isascii() and line not in seen:
                seen.add(line)
                found.append(paragraph)
    if len(found) < count:
        raise ConfigError(f"--passages {count}: this Python's documentation holds {len(found)} that fit")
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]
    documents = [topics[name] for name in sorted(topics)]
    for paragraph in chosen:
        documents = [document.replace(paragraph, "") for document in documents]
    return [" ".join(paragraph.split()) for paragraph in chosen], documents[::2] + documents[1::4], documents[3::4]


def copies(passage: str, kind: str, number: int) -> list[tuple[str, np.ndarray]]:
    """(text, places where the tokenizer may not join) of each copy."""
    made = []
    for copy in range(COPIES):
        rng = np.random.default_rng([number, copy, KINDS.index(kind)])
        text = passage
        if kind in ("case", "all"):
            text = (str, str.lower, str.upper, str.title)[rng.integers(4)](text)
        if kind in ("breaks", "all"):
            text = textwrap.fill(text, int(rng.integers(28, 91)), subsequent_indent=("", "    ", "> ")[rng.integers(3)],
                                 break_on_hyphens=False)
        cuts = np.flatnonzero(rng.random(len(text)) < (0.03 if kind in ("tokens", "all") else 0.0))
        made.append((text, cuts))
    return made


def encode(copy: tuple[str, np.ndarray], tokenizer) -> np.ndarray:
    text, cuts = copy
    borders = [0, *cuts.tolist(), len(text)]
    return np.concatenate([tokenizer.encode(text[a:b]) for a, b in zip(borders, borders[1:], strict=False)])


class Stream:
    """Documents as one stream of bos, tokens, eos; read like a prepared split (`lmjax.data.Tokens`)."""

    folder, split = "memory", "train"

    def __init__(self, documents: list[np.ndarray], tokenizer) -> None:
        whole = [np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]) for ids in documents]
        self.ids = np.concatenate(whole).astype(np.int32)
        self.numbers = np.repeat(np.arange(len(whole)), [len(ids) for ids in whole])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[start:stop], self.numbers[start:stop]


def hidden_shares(passages: list[str], kind: str, tokenizer) -> dict[str, float]:
    """{strategy: the share of the passages' letters that no copy supervises}."""
    pieces = plain_pieces(tokenizer)
    hidden: dict[str, list[np.ndarray]] = {name: [] for name in STRATEGIES}
    for number, passage in enumerate(passages):
        dropped: dict[str, list[np.ndarray]] = {name: [] for name in STRATEGIES}
        for copy in copies(passage, kind, number):
            ids = np.concatenate([[tokenizer.bos_id], encode(copy, tokenizer)])
            sizes = np.array([len(pieces[i]) for i in ids[1:]])
            of_letter = np.searchsorted(np.cumsum(sizes), letters(copy[0]).starts, "right")  # ASCII: a byte a character
            for name, fish in STRATEGIES.items():
                marks = token_values([pieces[i] for i in ids], fish.context, fish.seed)[None, 1:]
                keep = keep_mask(fish, ids[None, :-1], ids[None, 1:], marks_BT=marks)[0]
                dropped[name].append(~keep[of_letter])
        for name in STRATEGIES:
            hidden[name].append(np.all(dropped[name], axis=0))
    return {name: float(np.concatenate(parts).mean()) for name, parts in hidden.items()}


# ---- The models ----------------------------------------------------------------------------------------


class Lab:
    """One compiled train step for all models: a mask is weights, made on the host."""

    def __init__(self, tokenizer, steps: int) -> None:
        self.tokenizer, self.steps = tokenizer, steps
        self.config = DecoderConfig(vocab_size=VOCABULARY, num_layers=2, d_model=96, num_heads=4, num_kv_heads=4,
                                    max_seq_len=256, qk_norm=True)
        self.build = functools.partial(Decoder, self.config)
        self.definition = graphdef(self.build)
        tx, _ = make_optimizer(OptimConfig(learning_rate=6e-3, warmup_steps=max(1, steps // 20)), steps)
        loss = functools.partial(pretrain.loss, pretrain.PretrainConfig())

        def mean(params, batch):
            total, weight, _ = loss(nnx.merge(self.definition, params), batch, jax.random.key(0))
            return total / weight

        def update(params, state, batch):
            updates, state = tx.update(jax.grad(mean)(params, batch), state, params)
            return jax.tree.map(jnp.add, params, updates), state

        self.init, self.update, self.mean = tx.init, jax.jit(update, donate_argnums=(0, 1)), jax.jit(mean)

    def rows(self, stream: Stream, fish: GoldfishConfig) -> dict[str, np.ndarray]:
        """Every row of a stream, its weights masked."""
        protect = Protect((True,), True, fish.context, fish.seed) if fish.strategy == "text_hash" else None
        source = Rows(stream, SEQ_LEN, marks=Marks(protect, 0, self.tokenizer) if protect else None)
        rows = [source[i] for i in range(len(source))]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        marks = batch.pop("goldfish", None)
        keep = keep_mask(fish, batch["tokens"], batch["targets"], batch["segments"], marks_BT=marks)
        return batch | {"weights": batch["weights"] * keep}

    def train(self, rest: Stream, near: Stream | None, fish: GoldfishConfig, seed: int):
        sources = [self.rows(stream, fish) for stream in (rest, near) if stream is not None]
        params = nnx.state(self.build(seed=seed), nnx.Param)
        params = jax.tree.map(jnp.array, params)
        state = self.init(params)
        for step in range(self.steps):
            rng = np.random.default_rng([seed, step])
            shares = (ROWS - NEAR_ROWS, NEAR_ROWS) if near is not None else (ROWS,)
            part = [rng.integers(0, len(s["tokens"]), n) for s, n in zip(sources, shares, strict=True)]
            batch = {name: np.concatenate([s[name][i] for s, i in zip(sources, part, strict=True)])
                     for name in sources[0]}
            params, state = self.update(params, state, batch)
        return params

    def loss(self, params, stream: Stream) -> float:
        """Mean nats a token on up to 24 batches of held-out rows."""
        rows = self.rows(stream, STRATEGIES["none"])
        starts = range(0, len(rows["tokens"]) - ROWS, ROWS)[:24]
        return float(np.mean([self.mean(params, {n: v[i:i + ROWS] for n, v in rows.items()}) for i in starts]))

    def recited(self, params, passages: list[str], kind: str) -> list[int]:
        """Of each copy, how many words of the continuation are right before the first that is not. It is prompted with
        its own beginning, laid out and cut into tokens as it was trained on."""
        prompts, wanted = [], []
        for number, passage in enumerate(passages):
            for text, cuts in copies(passage, kind, number):
                found = units(text)
                end = int(found.ends[PREFIX - 1])
                ids = encode((text[:end], cuts[cuts < end]), self.tokenizer)
                prompts.append(np.concatenate([[self.tokenizer.bos_id], ids]))
                wanted.append(found.words[PREFIX:PREFIX + SUFFIX])
        outs = generate(self.definition, params, prompts, SampleConfig(max_new_tokens=56, temperature=0.0),
                        key=jax.random.key(0), vocab_size=self.tokenizer.vocab_size, eos_id=self.tokenizer.eos_id)
        right = []
        for out, words in zip(outs, wanted, strict=True):
            pairs = zip(units(self.tokenizer.decode(out)).words, words, strict=False)
            same = [a == b for a, b in pairs]
            right.append(same.index(False) if False in same else len(same))
        return right


# ---- What is told --------------------------------------------------------------------------------------


def table(result: dict) -> str:
    lines = [f"Letters that none of {result['copies']} copies supervises (wanted: {1 / result['k']:.2f}), where copies "
             "differ in", "", "| mask | line breaks | case | tokens | all three |", "|---" * 5 + "|"]
    for name in STRATEGIES:
        if name != "none":
            lines.append(f"| {name} | " + " | ".join(f"{result['hidden'][kind][name]:.3f}" for kind in KINDS) + " |")
    differ = {"all": "all three", "breaks": "line breaks"}.get(result["differ"], result["differ"])
    lines += ["", f"Models trained on copies that differ in {differ} ({result['steps']} steps; mean and range of "
              f"{len(result['models']) // len(TRAINED)} seeds)", "",
              f"| mask | copies recited ({SUFFIX} of {SUFFIX} words) | words right before the first wrong one "
              "| held-out loss, nats a token |", "|---" * 4 + "|"]
    for name in TRAINED:
        models = [m for m in result["models"] if m["strategy"] == name]
        label = {"control": "never trained on them", "none": "no mask"}.get(name, name)
        recited = [np.mean(np.array(m["words_right"]) == SUFFIX) for m in models]
        words, loss = [np.mean(m["words_right"]) for m in models], [m["held_out"] for m in models]
        lines.append(f"| {label} | {spread(recited, '.0%')} | {spread(words, '.1f')} | {spread(loss, '.3f')} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def figure(result: dict) -> str:
    ticks = [float(n) for n in range(0, SUFFIX + 1, 4)]
    curves = []
    for colour, name in enumerate(TRAINED):
        right = np.concatenate([m["words_right"] for m in result["models"] if m["strategy"] == name])
        label = {"control": "never trained on them", "none": "no mask", "hash": "mask of tokens",
                 "text_hash": "mask of words"}[name]
        curves.append(Curve(label, ticks, [float((right >= n).mean()) for n in ticks], (6, 1, 4, 0)[colour],
                            "5 4" if name == "control" else ""))
    theory = [(1 - 1 / result["k"]) ** n for n in ticks]
    curves.append(Curve("(1 - 1/k)^n", ticks, theory, 2, "2 3"))
    return panels([Panel("share of copies with the first n words right", "n words", curves, ticks, 1.0)],
                  f"{result['copies']} near-duplicates of each passage, k = {result['k']}")
