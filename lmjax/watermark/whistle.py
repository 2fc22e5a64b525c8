"""A dog whistle: a generator and a detector that share a key are trained so that the detector hears what an adversary
without the key does not. Beside it, the hand-made schemes on the same axes.

The language is small enough for minutes on two cores: letters of Python's standard library, drawn from counts of the
two letters before. The generator adds a bias b(key, last two letters) to the log-probabilities; keys are 16 random
signs, new for every text. Three networks are trained at once, the generator by straight-through Gumbel-softmax (arXiv
1611.01144):

    detector              cross-entropy: marked texts with their keys against plain ones, and against wrong keys
    adversary             cross-entropy: marked texts against plain ones
    generator             the detector's loss + secrecy x (the adversary is to say "plain") + KL over its budget

The idea of three players is that of Abadi and Andersen (arXiv 1610.06918). What does not live here: judging what came
of it (`lmjax.watermark.judges`). Results: docs/watermarks.md.
"""

import dataclasses
import functools
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.decode.marks import Watermark
from lmjax.decode.watermark import marker, marks, settings_of

ALPHABET = " \nabcdefghijklmnopqrstuvwxyz0_(."
V, PROMPT, SIGNS, HIDDEN, EMBED = len(ALPHABET), 4, 16, 64, 8
MODULES = ("argparse", "ast", "configparser", "decimal", "difflib", "inspect", "mailbox", "pickletools", "subprocess",
           "tarfile", "turtle", "typing", "zipfile")


@dataclasses.dataclass
class WhistleConfig:
    """steps of joint training, of `batch` marked and as many plain texts; then judges are trained for judge_steps on
    `texts` of each kind and measured on half as many others. budgets: KL given the key, in nats per letter."""

    steps: int = 1200
    batch: int = 64
    length: int = 64
    texts: int = 1024
    judge_steps: int = 300
    seed: int = 0
    budgets: tuple[float, ...] = (0.3,)

    def problems(self) -> list[str]:
        bad = [f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {low}" for name, low in (
            ("steps", 1), ("batch", 2), ("length", 8), ("texts", 16), ("judge_steps", 1)) if getattr(self, name) < low]
        return bad + [f"--budgets {b}: must be above 0 nats" for b in self.budgets if not 0 < b < math.inf]


# ---- The base language ---------------------------------------------------------------------------------


def read_letters() -> np.ndarray:
    """int32: some of the standard library, lower-cased; digits are 0, brackets (, all that is left a point."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES
                   if (folder / f"{name}.py").exists()).lower()
    table = {c: ALPHABET.index("0" if c.isdigit() else "(" if c in "()[]{}" else c if c in ALPHABET else ".")
             for c in set(text)}
    return np.array([table[c] for c in text], np.int32)


def base_model(letters: np.ndarray) -> np.ndarray:
    """float32 log p [V, V, V] of the third letter, from counts; two thousandths are spread evenly."""
    index = (letters[:-2] * V + letters[1:-1]) * V + letters[2:]
    counts = np.bincount(index, minlength=V**3).reshape(V, V, V) + 0.02
    return np.log(0.998 * counts / counts.sum(-1, keepdims=True) + 0.002 / V).astype(np.float32)


# ---- Networks: dictionaries of arrays ------------------------------------------------------------------


def dense(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.normal(size=shape) * scale / math.sqrt(shape[0])).astype(np.float32)


def keyed_network(rng: np.random.Generator, scale: float) -> dict:
    """Of the generator and of the detector: a number for each next letter, given key and the last two."""
    return {"embed": dense(rng, V, EMBED, scale=math.sqrt(V)), "context": dense(rng, 2 * EMBED, HIDDEN),
            "key": dense(rng, SIGNS, HIDDEN), "mixed": dense(rng, HIDDEN, HIDDEN),
            "out": dense(rng, HIDDEN, V, scale=scale), "bias": np.zeros((), np.float32)}


def keyed_scores(w: dict, keys: jax.Array, before: jax.Array, last: jax.Array) -> jax.Array:
    """[…, V] from keys […, SIGNS] and one-hot letters […, V]. A product of key and context, so that signs can flip."""
    context = jnp.tanh(jnp.concatenate([before @ w["embed"], last @ w["embed"]], -1) @ w["context"])
    return jax.nn.relu((context * (keys @ w["key"])) @ w["mixed"]) @ w["out"]


def detector_logit(w: dict, text: "Texts") -> jax.Array:
    """[B]: a sum over the letters of a score for each, given the key."""
    y = text.letters_BTV
    keys = jnp.broadcast_to(text.keys_BK[:, None], (*y[:, 2:].shape[:2], SIGNS))
    scores = keyed_scores(w, keys, y[:, :-2], y[:, 1:-1])
    return jnp.sum(y[:, 2:] * scores, (1, 2)) / math.sqrt(y.shape[1]) + w["bias"]


def keyless_network(rng: np.random.Generator) -> dict:
    return {"embed": dense(rng, V, EMBED, scale=math.sqrt(V)), "one": dense(rng, 3 * EMBED + 1, HIDDEN),
            "two": dense(rng, HIDDEN, HIDDEN), "three": dense(rng, HIDDEN, HIDDEN), "out": dense(rng, HIDDEN, 1),
            "bias_one": np.zeros(HIDDEN, np.float32), "bias_three": np.zeros(HIDDEN, np.float32)}


def adversary_logit(w: dict, text: "Texts") -> jax.Array:
    """[B]: features of every three letters and of their surprise under the base model, averaged over the text."""
    e = text.letters_BTV @ w["embed"]
    x = jnp.concatenate([e[:, :-2], e[:, 1:-1], e[:, 2:], text.surprise_BT[:, 2:, None]], -1)
    x = jax.nn.relu(jax.nn.relu(x @ w["one"] + w["bias_one"]) @ w["two"])
    return (jax.nn.relu(jnp.mean(x, 1) @ w["three"] + w["bias_three"]) @ w["out"])[:, 0]


# ---- Texts ---------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Texts:
    """tokens_BS: prompt and text. letters_BTV: the text one-hot, with the gradient of a soft choice. surprise_BT: -log
    p of it under the base model. kl_B: of the generator from that model given the key, nats per letter. keys_BK: the
    signs, 0 where there are none."""

    tokens_BS: jax.Array
    letters_BTV: jax.Array
    surprise_BT: jax.Array
    kl_B: jax.Array
    keys_BK: jax.Array


def write_texts(base: jax.Array, prompts_B4: jax.Array, keys_BK: jax.Array, length: int, key: jax.Array,
                marked: Callable) -> Texts:
    """marked(log p [B, V], tokens_BS, how many, last two letters as one-hots) -> the logits that are drawn from."""
    B = prompts_B4.shape[0]
    tokens_BS = jnp.zeros((B, PROMPT + length), jnp.int32).at[:, :PROMPT].set(prompts_B4)
    hot = jax.nn.one_hot(prompts_B4, V)

    def step(carry, t):
        tokens_BS, before, last = carry
        logp_BV = base[tokens_BS[:, t - 2], tokens_BS[:, t - 1]]
        logits_BV = marked(logp_BV, tokens_BS, t, before, last)
        noisy_BV = logits_BV + jax.random.gumbel(jax.random.fold_in(key, t), (B, V))
        hard_B, soft_BV = jnp.argmax(noisy_BV, axis=1), jax.nn.softmax(noisy_BV)
        y_BV = jax.nn.one_hot(hard_B, V) + soft_BV - jax.lax.stop_gradient(soft_BV)
        logq_BV = jax.nn.log_softmax(logits_BV)
        kl_B = jnp.sum(jnp.where(logq_BV > -jnp.inf, jnp.exp(logq_BV) * (logq_BV - logp_BV), 0.0), axis=1)
        return (tokens_BS.at[:, t].set(hard_B), last, y_BV), (y_BV, -jnp.sum(y_BV * logp_BV, axis=1), kl_B)

    carry, (y, surprise, kl) = jax.lax.scan(step, (tokens_BS, hot[:, -2], hot[:, -1]),
                                            jnp.arange(PROMPT, PROMPT + length))
    return Texts(carry[0], jnp.moveaxis(y, 0, 1), surprise.T, jnp.mean(kl, 0), keys_BK)


def plain(logp_BV, tokens_BS, t, before, last):
    """The base model itself."""
    return logp_BV


def learned(w: dict, keys_BK: jax.Array) -> Callable:
    return lambda logp_BV, tokens_BS, t, before, last: logp_BV + keyed_scores(w, keys_BK, before, last)


def by_hand(watermarks: list[Watermark]) -> Callable:
    """The very functions of `lmjax generate`, one watermark a row."""
    s, uses, starts_B = settings_of(watermarks), marks(watermarks), np.full(len(watermarks), PROMPT)
    return lambda logp_BV, tokens_BS, t, before, last: marker(
        s, uses, tokens_BS, starts_B, jnp.full(len(watermarks), t), V).sampled(logp_BV)


# ---- Joint training ------------------------------------------------------------------------------------


def cross_entropy(logit: Callable, marked: Texts, free: Texts) -> jax.Array:
    return jnp.mean(jax.nn.softplus(-logit(marked)) + jax.nn.softplus(logit(free)))


def keyed_cross_entropy(w: dict, marked: Texts, free: Texts) -> jax.Array:
    """Of the detector, which has to say no to plain texts and to marked ones when it is given another text's key.

    Without the latter generator and detector agree on a sign that needs no key, and the adversary sees it at once.
    """
    wrong = dataclasses.replace(marked, keys_BK=jnp.roll(marked.keys_BK, 1, axis=0))
    return cross_entropy(functools.partial(detector_logit, w), marked, free) + jnp.mean(
        jax.nn.softplus(detector_logit(w, wrong)))


def train_players(config: WhistleConfig, base: jax.Array, letters: np.ndarray, budget: float, secrecy: float,
                  say: Callable[[str], None] = lambda line: None) -> tuple[dict, dict]:
    """(generator, detector). secrecy 0: nobody minds being heard by the adversary. say: told how it goes."""
    rng, B = np.random.default_rng(config.seed), config.batch
    players = {"generator": keyed_network(rng, 0.1), "detector": keyed_network(rng, 1.0),
               "adversary": keyless_network(rng)}
    adam = optax.adam(2e-3)

    def loss(players, prompts_B4, keys_BK, key):
        one, two = jax.random.split(key)
        text = write_texts(base, prompts_B4, keys_BK, config.length, one, learned(players["generator"], keys_BK))
        free = write_texts(base, prompts_B4, keys_BK, config.length, two, plain)
        frozen, seen = jax.lax.stop_gradient((players, text))  # each player moves only what is its own
        judged = cross_entropy(functools.partial(adversary_logit, players["adversary"]), seen, free)
        judged += keyed_cross_entropy(players["detector"], seen, free)
        heard = keyed_cross_entropy(frozen["detector"], text, free)
        hidden = jnp.mean(jax.nn.softplus(adversary_logit(frozen["adversary"], text)))
        kl = jnp.mean(text.kl_B)
        return judged + heard + secrecy * hidden + 20 * jax.nn.relu(kl - budget), (heard, hidden, kl)

    @jax.jit
    def step(players, moments, prompts_B4, keys_BK, key):
        grads, values = jax.grad(loss, has_aux=True)(players, prompts_B4, keys_BK, key)
        updates, moments = adam.update(grads, moments)
        return optax.apply_updates(players, updates), moments, values

    moments = adam.init(players)
    for number in range(config.steps):
        players, moments, values = step(players, moments, prompts(letters, B, rng), signs(rng, B),
                                        jax.random.fold_in(jax.random.key(config.seed), number))
        if (number + 1) % 200 == 0:
            heard, hidden, kl = (float(value) for value in values)
            say(f"  step {number + 1}: detector's loss {heard:.2f} (2.08 where it hears nothing), adversary kept from "
                f"hearing {hidden:.2f}, KL {kl:.3f}")
    return players["generator"], players["detector"]


def prompts(letters: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    at = rng.integers(0, len(letters) - PROMPT, count)
    return letters[at[:, None] + np.arange(PROMPT)]


def signs(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.choice(np.float32([-1, 1]), (count, SIGNS))
