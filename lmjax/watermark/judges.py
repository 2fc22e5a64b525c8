"""Who hears the whistle: detectors with the key and adversaries without, for learned and hand-made watermarks alike.

The adversary has the base model and texts of both kinds, and is trained anew against the finished generator. It lives
in two worlds: `fresh`, where each text has a key of its own, as in training, and `one key` for all texts, which is how
keys are used. What lives here: judges, the rows of the table, and `lmjax watermark whistle`. The players: `whistle`.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.decode.marks import Watermark
from lmjax.errors import ConfigError
from lmjax.evals.ranking import auc
from lmjax.watermark.roc import evidence, secret_of
from lmjax.watermark.whistle import (
    PROMPT,
    SIGNS,
    Texts,
    V,
    WhistleConfig,
    adversary_logit,
    base_model,
    by_hand,
    cross_entropy,
    detector_logit,
    keyed_cross_entropy,
    keyless_network,
    learned,
    plain,
    prompts,
    read_letters,
    signs,
    train_players,
    write_texts,
)

ONE_KEY = 10**6  # the number of the key that all texts share in the adversary's second world
NGRAMS = (1, 2, 3, 4)
SECRECY = (0.0, 3.0)  # what the generator cares about the adversary


# ---- Judges --------------------------------------------------------------------------------------------


def train_judge(loss: Callable, w: dict, marked: Texts, free: Texts, config: WhistleConfig) -> dict:
    """The network after judge_steps of loss(network, marked batch, plain batch)."""
    adam, rng = optax.adam(2e-3), np.random.default_rng(config.seed + 1)

    @jax.jit
    def step(w, moments, a_N, b_N):
        a, b = (jax.tree.map(lambda x, at=at: x[at], texts) for texts, at in ((marked, a_N), (free, b_N)))
        updates, moments = adam.update(jax.grad(loss)(w, a, b), moments)
        return optax.apply_updates(w, updates), moments

    moments = adam.init(w)
    for _ in range(config.judge_steps):
        w, moments = step(w, moments, *(rng.integers(0, config.texts, 128) for _ in range(2)))
    return w


def ngram_scores(marked: np.ndarray, free: np.ndarray, texts: np.ndarray, n: int) -> np.ndarray:
    """Log of how much more often a text's n-grams are among the marked training texts than among the plain ones."""
    def grams(tokens_BT):
        return sum(tokens_BT[:, i:tokens_BT.shape[1] - n + 1 + i].astype(np.int64) * V**i for i in range(n))

    ratio = np.log((np.bincount(grams(marked).ravel(), minlength=V**n) + 1.0)
                   / (np.bincount(grams(free).ravel(), minlength=V**n) + 1.0))
    return ratio[grams(texts)].sum(1)


def adversary_auc(marked: list[Texts], free: list[Texts], config: WhistleConfig) -> float:
    """The best adversary of five, chosen on one half of the held-out texts and measured on the other: a network, and
    ratios of n-gram counts. marked, free: training texts, held-out texts."""
    start = keyless_network(np.random.default_rng(config.seed + 2))
    w = train_judge(lambda w, a, b: cross_entropy(functools.partial(adversary_logit, w), a, b), start, marked[0],
                    free[0], config)
    known, held = ([np.asarray(kind[i].tokens_BS)[:, PROMPT:] for kind in (marked, free)] for i in (0, 1))
    tries = [[np.asarray(jax.jit(adversary_logit)(w, kind[1])) for kind in (marked, free)]]
    tries += [[ngram_scores(*known, texts, n) for texts in held] for n in NGRAMS]
    half = len(held[0]) // 2
    best = max(tries, key=lambda pair: auc(pair[0][:half], pair[1][:half]))
    return auc(best[0][half:], best[1][half:])


# ---- Rows of the table ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """keyed, wrong_key: AUC of the detector with the text's key and with another text's. fresh, one_key: of the
    adversary in its two worlds. kl: given the key, nats per letter. cost: mean surprise above plain texts', nats."""

    name: str
    keyed: float
    wrong_key: float
    fresh: float
    one_key: float
    kl: float
    cost: float


@dataclasses.dataclass
class World:
    """What all rows share: base model, letters, plain texts (to train judges on, and held out), and the settings."""

    config: WhistleConfig
    base: jax.Array
    letters: np.ndarray
    free: list[Texts]

    def texts(self, salt: int, make: Callable, one_key: bool = False) -> list[Texts]:
        """Texts to train judges on, and half as many held out. make(numbers of the keys) -> (keys_BK, `marked`)."""
        found, c = [], self.config
        for held, count in enumerate((c.texts, c.texts // 2)):
            rng = np.random.default_rng([c.seed, salt, held, one_key])
            keys_BK, marked = make(np.full(count, ONE_KEY) if one_key else np.arange(count) + held * c.texts)
            write = jax.jit(functools.partial(write_texts, length=c.length, marked=marked))
            found.append(write(self.base, prompts(self.letters, count, rng), keys_BK,
                               key=jax.random.key(int(rng.integers(2**31)))))
        return found


def new_world(config: WhistleConfig) -> World:
    letters = read_letters()
    world = World(config, jnp.asarray(base_model(letters)), letters, [])
    world.free = world.texts(0, lambda numbers: (np.zeros((len(numbers), SIGNS), np.float32), plain))
    return world


def row_of(world: World, name: str, make: Callable, listen: Callable, salt: int) -> Row:
    """listen(training texts) -> (texts -> their scores, given their keys)."""
    marked = world.texts(salt, make)
    keyed = listen(marked[0])
    free = dataclasses.replace(world.free[1], keys_BK=marked[1].keys_BK)
    wrong = dataclasses.replace(marked[1], keys_BK=jnp.roll(marked[1].keys_BK, 1, axis=0))
    negative = keyed(free)
    return Row(name, auc(keyed(marked[1]), negative), auc(keyed(wrong), negative),
               adversary_auc(marked, world.free, world.config),
               adversary_auc(world.texts(salt, make, True), world.free, world.config),
               float(jnp.mean(marked[1].kl_B)), float(jnp.mean(marked[1].surprise_BT) - jnp.mean(free.surprise_BT)))


def learned_row(world: World, budget: float, secrecy: float, say: Callable[[str], None]) -> Row:
    """The three players' row; the detector is trained on after the generator has stopped."""
    c = world.config
    generator, detector = train_players(c, world.base, world.letters, budget, secrecy, say)

    def make(numbers):
        table = {number: signs(np.random.default_rng([c.seed, 7, number]), 1)[0] for number in set(numbers.tolist())}
        keys_BK = np.stack([table[number] for number in numbers.tolist()])
        return keys_BK, learned(generator, keys_BK)

    def listen(marked):
        rng = np.random.default_rng(0)  # plain texts get keys too, that the key alone may say nothing
        free = dataclasses.replace(world.free[0], keys_BK=jnp.asarray(rng.permutation(np.asarray(marked.keys_BK))))
        w = train_judge(keyed_cross_entropy, detector, marked, free, c)
        return lambda texts: np.asarray(jax.jit(detector_logit)(w, texts))

    return row_of(world, f"learned, KL <= {budget:g}, secrecy {secrecy:g}", make, listen, 1)


def hand_row(world: World, name: str, **settings) -> Row:
    """A hand-made scheme: its own detector, by the exact p-value. The first sign is the number of the key."""
    def mark(number):
        return Watermark(secret=secret_of(world.config.seed, name, int(number)), **settings)

    def make(numbers):
        keys_BK = np.zeros((len(numbers), SIGNS), np.float32)
        keys_BK[:, 0] = numbers
        return keys_BK, by_hand([mark(number) for number in numbers])

    def listen(marked):
        return lambda texts: np.array([
            evidence(row, mark(number)) for row, number in zip(np.asarray(texts.tokens_BS), np.asarray(
                texts.keys_BK)[:, 0], strict=True)])

    return row_of(world, name, make, listen, 2)


HAND_MADE = {
    "kgw, delta 0.5": {"scheme": "kgw", "delta": 0.5}, "kgw, delta 1": {"scheme": "kgw", "delta": 1.0},
    "kgw, delta 2": {"scheme": "kgw", "delta": 2.0},
    "kgw, delta 1, context 1": {"scheme": "kgw", "delta": 1.0, "context": 1},
    "gumbel": {"scheme": "gumbel"}, "tournament": {"scheme": "tournament"},
}


def measure(config: WhistleConfig, say: Callable[[str], None]) -> list[Row]:
    """All rows: learned without and with an adversary to hide from, then hand-made. Raises ConfigError."""
    if problems := config.problems():
        raise ConfigError(*problems)
    world, rows = new_world(config), []
    todo = [functools.partial(learned_row, world, budget, secrecy, say) for budget in config.budgets
            for secrecy in SECRECY]
    todo += [functools.partial(hand_row, world, name, **settings) for name, settings in HAND_MADE.items()]
    for make in todo:
        began = time.monotonic()
        rows.append(make())
        say(f"{rows[-1].name}: {time.monotonic() - began:.0f} s")
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| | AUC with the key | with another key | without, fresh keys | without, one key | KL given the key, "
             "nats per letter | perplexity |", "|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [
        f"| {r.name} | {r.keyed:.3f} | {r.wrong_key:.3f} | {r.fresh:.3f} | {r.one_key:.3f} | {r.kl:.3f} | "
        f"{np.expm1(r.cost):+.1%} |" for r in rows])


def run(args: list[str]) -> int:
    """`lmjax watermark whistle`."""
    parser = argparse.ArgumentParser(
        prog="lmjax watermark whistle", allow_abbrev=False,
        description="Train a watermark that a detector with the key hears and an adversary without it does not, on a "
                    "small language of letters, and print it beside the hand-made schemes. docs/watermarks.md says "
                    "what the columns mean.")
    default = WhistleConfig()
    for name, what in (("steps", "of joint training"), ("batch", "texts of each kind in a step"),
                       ("length", "letters of a text"), ("texts", "of each kind, for judges to learn from"),
                       ("judge_steps", "of training a judge"), ("seed", "of everything")):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name), metavar="N",
                            help=f"{what} (default %(default)s)")
    parser.add_argument("--budgets", type=float, nargs="+", default=default.budgets, metavar="NATS",
                        help="KL given the key that the generator may spend on a letter (default 0.3)")
    parser.add_argument("--out", default="", metavar="FILE", help="write all figures as JSON")
    given = vars(parser.parse_args(args))
    out = given.pop("out")
    rows = measure(WhistleConfig(**given | {"budgets": tuple(given["budgets"])}),
                   lambda line: print(line, file=sys.stderr, flush=True))
    print(table(rows))
    if out:
        Path(out).write_text(json.dumps(given | {"rows": [dataclasses.asdict(r) for r in rows]}, indent=1) + "\n")
    return 0
