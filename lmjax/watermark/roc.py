"""How well each scheme is found: texts of a model with and without watermarks, edited, and scored.

What lives here: the edits, the measures, and the experiment of `lmjax watermark roc`. Every text has a secret of its
own, so that one unlucky list of green tokens does not decide; edits are made to tokens. Texts run on past stop tokens,
so that all are equally long.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lmjax.decode.generate import SampleConfig, complete
from lmjax.decode.marks import SCHEMES, Watermark
from lmjax.errors import ConfigError
from lmjax.evals.ranking import auc
from lmjax.watermark.detect import detect

OPENINGS = ("The history of the city begins with", "When the rain finally stopped,", "To grow tomatoes at home, you",
            "The committee met on Tuesday to", "She opened the old letter and", "Most birds build their nests",
            "In the early days of computing,", "The recipe calls for")
EDITS = {"substitute": (0.1, 0.2, 0.3, 0.5), "delete": (0.1, 0.2, 0.3, 0.5), "insert": (0.1, 0.2, 0.3, 0.5),
         "dilute": (0.5, 0.75, 0.9), "crop": (0.5, 0.75, 0.9)}
NULL_KEYS = 25  # secrets with which each unmarked text is scored


@dataclasses.dataclass
class RocConfig:
    """texts of so many new tokens for each scheme, `batch` at a time, sampled and marked so."""

    texts: int = 64
    tokens: int = 200
    batch: int = 16
    seed: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    context: int = 4

    def problems(self) -> list[str]:
        least = {"texts": 2, "tokens": 2, "batch": 1, "context": 1}
        bad = [f"--{name} {getattr(self, name)}: must be at least {low}" for name, low in least.items()
               if getattr(self, name) < low]
        if not 0 < self.temperature < np.inf or not 0 < self.top_p <= 1:
            bad.append(f"--temperature {self.temperature} --top-p {self.top_p}: texts are sampled, so both are above 0 "
                       "and top-p is at most 1")
        return bad


# ---- Edits ---------------------------------------------------------------------------------------------


def edit(tokens: np.ndarray, kind: str, rate: float, rng: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """The edited text. other: unmarked tokens, at least as many, from which new ones come.

    substitute, delete, insert: each token with probability `rate`, by itself; new tokens are drawn from `other`.
    dilute: one piece of 1 - rate of the text, pasted over a place in as long an unmarked text. crop: that piece alone.
    """
    hit = rng.random(len(tokens)) < rate
    drawn = rng.choice(other, len(tokens))
    if kind == "substitute":
        return np.where(hit, drawn, tokens)
    if kind == "delete":
        return tokens[~hit]
    if kind == "insert":
        return np.insert(tokens, np.flatnonzero(hit), drawn[hit])
    keep = max(1, round(len(tokens) * (1 - rate)))
    start, at = rng.integers(0, len(tokens) - keep + 1, 2)
    if kind == "crop":
        return tokens[start:start + keep]
    assert kind == "dilute", kind
    host = other[:len(tokens)].copy()
    host[at:at + keep] = tokens[start:start + keep]
    return host


# ---- Measures ------------------------------------------------------------------------------------------


def tpr_at(positives: np.ndarray, negatives: np.ndarray, rate: float = 0.01) -> float:
    """The share of positives above the threshold that `rate` of the negatives pass."""
    return float((positives > np.quantile(negatives, 1 - rate)).mean())


def repeated(tokens: np.ndarray, n: int = 4) -> float:
    """The share of n-grams that the text had already (seq-rep-n, arXiv 1908.04319)."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def evidence(tokens: np.ndarray, mark: Watermark) -> float:
    """-log10 of the p-value: high where the watermark is."""
    return -detect(tokens, mark).log10_p


# ---- The experiment ------------------------------------------------------------------------------------


def secret_of(*what: object) -> bytes:
    """A secret for an experiment: reproducible, and so no secret."""
    return hashlib.sha256(repr(what).encode()).digest()


def measure(opened: Any, config: RocConfig, say: Callable[[str], None], schemes: Sequence[str] = SCHEMES) -> dict:
    """{scheme: {"nats", "repeated", "false_positives", "edits": [[kind, rate, tpr, auc, median log10 p], …]}}.

    opened: an `lmjax.interop.load.Opened` with a tokenizer. Raises ConfigError for settings out of range.
    """
    if problems := config.problems():
        raise ConfigError(*problems)
    plain, plain_nats = write_texts(opened, config, [None] * config.texts, "none", say)
    result = {"none": {"nats": plain_nats, "repeated": float(np.mean([repeated(t) for t in plain]))}}
    for scheme in schemes:
        keys = [Watermark(scheme, secret_of(config.seed, scheme, i), config.context) for i in range(config.texts)]
        texts, nats = write_texts(opened, config, keys, scheme, say)
        scores = measure_scheme(texts, keys, plain, opened.tokenizer, config.seed)
        result[scheme] = {"nats": nats, "repeated": float(np.mean([repeated(t) for t in texts]))} | scores
    return result


def measure_scheme(texts: list[np.ndarray], keys: list[Watermark], plain: list[np.ndarray], tokenizer: Any,
                   seed: int) -> dict:
    """Scores of edited texts against those of unmarked ones."""
    others = [dataclasses.replace(keys[0], secret=secret_of(seed, "null", i)) for i in range(NULL_KEYS)]
    null = np.array([evidence(text, key) for text in plain for key in others])
    rows = []

    def row(kind, rate, edited):
        scores = np.array([evidence(text, key) for text, key in zip(edited, keys, strict=True)])
        rows.append([kind, rate, tpr_at(scores, null), auc(scores, null), -float(np.median(scores))])

    row("none", 0.0, texts)
    if tokenizer is not None:
        row("retokenise", 0.0, [tokenizer.encode(tokenizer.decode(text)) for text in texts])
    for kind, rates in EDITS.items():
        for rate in rates:
            rng = np.random.default_rng([seed, int(1000 * rate), len(kind)])
            row(kind, rate, [edit(text, kind, rate, rng, np.roll(plain, -i - 1, axis=0).reshape(-1))
                             for i, text in enumerate(texts)])
    return {"false_positives": float((null >= 2).mean()), "edits": rows}


def write_texts(opened: Any, config: RocConfig, watermarks: list[Watermark | None], name: str,
                say: Callable[[str], None]) -> tuple[list[np.ndarray], float]:
    """(new tokens of each text, the model's own mean -log p of them in nats)."""
    began, found, nats = time.monotonic(), [], []
    prompts = [opened.encode(OPENINGS[i % len(OPENINGS)]) for i in range(config.texts)]
    sample = SampleConfig(config.tokens, config.temperature, top_p=config.top_p)
    for start in range(0, config.texts, config.batch):
        part = slice(start, start + config.batch)
        with jax.set_mesh(opened.mesh):
            done = complete(opened.graphdef, opened.params, prompts[part], sample, key=jax.random.key(config.seed),
                            vocab_size=opened.tokenizer.vocab_size, rows=range(config.texts)[part], logprobs=0,
                            watermark=watermarks[part])
        found += [d.tokens for d in done]
        nats += [-d.logprobs.mean() for d in done]
    say(f"{name}: {config.texts} texts of {config.tokens} tokens in {time.monotonic() - began:.0f} s")
    return found, float(np.mean(nats))


def table(result: dict) -> str:
    """Two Markdown tables: what a scheme costs, and how well it is found after each edit."""
    schemes = [name for name in result if name != "none"]
    lines = ["| | " + " | ".join(result) + " |", "|---" * (len(result) + 1) + "|"]
    for label, field in (("mean -log p under the model, nats per token", "nats"), ("repeated 4-grams", "repeated"),
                         ("unmarked texts with p <= 0.01", "false_positives")):
        lines.append(f"| {label} | " + " | ".join(f"{r[field]:.3f}" if field in r else "" for r in result.values())
                     + " |")
    lines += ["", "| TPR at 1 % FPR / AUC / median log10 p | " + " | ".join(schemes) + " |",
              "|---" * (len(schemes) + 1) + "|"]
    for rows in zip(*(result[s]["edits"] for s in schemes), strict=True):
        label = rows[0][0] + (f" {rows[0][1]:.0%}" if rows[0][1] else "")
        lines.append(f"| {label} | " + " | ".join(f"{tpr:.2f} / {area:.3f} / {p:.1f}" for _, _, tpr, area, p in rows)
                     + " |")
    return "\n".join(lines)
