"""Goldfish against recitation: the published comparison of k and of masks, on a CPU.

The experiment of Hans et al. 2024 (arXiv 2406.10209, section 4): documents that are repeated many times inside of a
real corpus, and a model for each mask. Here passages of Python's documentation, one row each, fill a quarter of the
rows, and the rest of the documentation the others. Asked of every model, with the beginning of each passage as the
prompt: is the rest recited, ROUGE-L, the first token that is wrong (if dropped tokens are never guessed, n tokens pass
with probability (1 - 1/k)^n), whether its loss tells passages from others that it never saw, and its loss on held-out
text; also for models that were trained k/(k-1) times as long, hence on as many targets.

Masks: "hash" of k, and at k = 4 the controls "static" (the same columns of every row) and "random" (anew each time).
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lmjax.audit.metrics import PAD, divergence, lcs
from lmjax.data import train_bpe
from lmjax.errors import ConfigError
from lmjax.evals.ranking import auc
from lmjax.losses.goldfish import GoldfishConfig, equal_steps
from lmjax.reproduce.figure import Curve, Panel, panels
from lmjax.reproduce.lab import NO_MASK, ROWS, Fields, Lab, Stream, joined, masked, prose, spread, taken

KS = (2, 3, 4, 8, 32, 128)
PASSAGES, REPEATS = 24, 50  # the paper's Wikipedia articles come 50 times too
REPEATED = 2  # rows of a batch that are of the passages
SEQ_LEN, VOCABULARY = 96, 1024
PREFIX, SUFFIX = 32, 48  # tokens of a passage: given, and asked for
MASKS = {"none": NO_MASK} | {f"k={k}": GoldfishConfig("hash", k) for k in KS} | {
    "static k=4": GoldfishConfig("static", 4), "random k=4": GoldfishConfig("random", 4)}
CONTROL = "control"  # never sees the passages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="models of each kind (default: 3)")
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="N",
                        help="how often each passage is trained on (default: %(default)s); sets the length of training")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict, str, str]:
    """Raises ConfigError for fewer than one seed, or fewer repeats than make a step."""
    if bad := [f"--{name} {getattr(options, name)}: give 1 or more" for name in ("seeds", "repeats")
               if getattr(options, name) < 1]:
        raise ConfigError(*bad)
    steps = PASSAGES * options.repeats // REPEATED
    texts = read()
    models = []
    for seed in range(options.seeds):
        for name in (CONTROL, *MASKS):
            fish = MASKS.get(name, NO_MASK)
            longer = equal_steps(fish, steps)
            for length in sorted({steps, longer} if fish.strategy == "hash" else {steps}):
                batches = _batches(texts.rest, None if name == CONTROL else texts.passages, fish, length, seed)
                found = asked(texts, texts.lab.train(batches, seed))
                models.append({"mask": name, "seed": seed, "steps": length} | found)
                say(f"seed {seed}, {name}, {length:,} steps: {np.mean(np.array(found['verbatim']) == SUFFIX):.0%} "
                    f"recited, {np.mean(found['verbatim']):.1f} of {SUFFIX} tokens before the first wrong one, "
                    f"held-out loss {found['held_out']:.3f}")
    result = {"passages": PASSAGES, "repeats": options.repeats, "steps": steps, "prefix": PREFIX, "suffix": SUFFIX,
              "seeds": options.seeds, "models": models}
    return result, table(result), figure(result)


class Texts(NamedTuple):
    """ids: of each passage. passages, others: a row of each, trained on and never seen. rest, test: rows of the other
    documentation, to train on and held out."""

    lab: Lab
    ids: list[np.ndarray]
    passages: Fields
    others: Fields
    rest: Fields
    test: Fields


def read() -> Texts:
    texts, background, held_out = prose(2 * PASSAGES, 55)
    tokenizer = train_bpe(background, VOCABULARY)
    ids = [tokenizer.encode(text)[:SEQ_LEN] for text in texts]
    assert min(map(len, ids)) > PREFIX + SUFFIX
    lab = Lab(tokenizer, SEQ_LEN)
    # Even ones are trained on, odd ones never: both are spread over the same pages.
    return Texts(lab, ids[::2], *(_one_a_row(lab, part) for part in (ids[::2], ids[1::2])),
                 *(lab.rows(Stream([tokenizer.encode(text) for text in part], tokenizer))
                   for part in (background, held_out)))


def _one_a_row(lab: Lab, ids: Sequence[np.ndarray]) -> Fields:
    """Each document in a row of its own, so that "static" drops the same targets of it every time."""
    parts = [lab.rows(Stream([one], lab.tokenizer)) for one in ids]
    return joined([taken(part, np.arange(1)) for part in parts])


def _batches(rest: Fields, passages: Fields | None, fish: GoldfishConfig, steps: int, seed: int) -> list[Fields]:
    """A run. The passages come in an order of their own, anew each time round; the control reads others in place."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(PASSAGES) for _ in range(-(-steps * REPEATED // PASSAGES))])
    made = []
    for step in range(steps):
        rows = taken(rest, rng.integers(0, len(rest["tokens"]), ROWS))
        if passages is not None:
            kept = taken(rows, np.arange(ROWS - REPEATED))
            rows = joined([kept, taken(passages, order[step * REPEATED:(step + 1) * REPEATED])])
        made.append(masked(rows, fish, jax.random.fold_in(jax.random.key(seed), step)))
    return made


def asked(texts: Texts, params) -> dict:
    """verbatim: tokens of each continuation before the first wrong one; rouge_l: of each, longest common subsequence
    over tokens of the suffix; auc: of the loss, passages against those that were never seen; held_out: the loss."""
    lab = texts.lab
    prompts = [np.concatenate([[lab.tokenizer.bos_id], one[:PREFIX]]) for one in texts.ids]
    truth = np.stack([one[PREFIX:PREFIX + SUFFIX] for one in texts.ids])
    own = np.full(truth.shape, PAD, np.int64)
    for row, out in zip(own, lab.continued(params, prompts, SUFFIX), strict=True):
        row[:len(out)] = out
    losses = [np.array([-float(lab.mean(params, taken(rows, np.array([i])))) for i in range(len(rows["tokens"]))])
              for rows in (texts.passages, texts.others)]
    return {"verbatim": divergence(own == truth).tolist(), "rouge_l": (lcs(own, truth) / SUFFIX).tolist(),
            "auc": auc(*losses), "held_out": lab.loss(params, texts.test)}


# ---- What is told --------------------------------------------------------------------------------------


def expected(k: int, tokens: int) -> float:
    """Mean tokens before the first wrong one of `tokens`, if dropped tokens are never guessed and others always right:
    the sum of (1 - 1/k)^n over n = 1 … tokens."""
    keep = 1 - 1 / k
    return float(sum(keep**n for n in range(1, tokens + 1)))


def _models(result: dict, mask: str, equal: bool = False) -> list[dict]:
    """Those of a mask: at equal input, or the longer ones."""
    return [m for m in result["models"] if m["mask"] == mask and (m["steps"] > result["steps"]) == equal]


def table(result: dict) -> str:
    lines = [f"{result['passages']} passages, each trained on {result['repeats']} times within {result['steps']:,} "
             f"steps; prompts of {result['prefix']} tokens, the next {result['suffix']} asked for; mean and range of "
             f"{result['seeds']} seeds", "",
             "| mask | recited | expected | ROUGE-L | tokens before the first wrong one | expected | AUC of the loss "
             "| held-out loss | the same, as many targets |", "|---" * 9 + "|"]
    labels = {CONTROL: "never trained on them", "none": "no mask"}
    for name in (CONTROL, *MASKS):
        models, longer = _models(result, name), _models(result, name, True)
        k = MASKS[name].k if name.startswith("k=") else 0
        recited = [np.mean(np.array(m["verbatim"]) == result["suffix"]) for m in models]
        lines.append("| " + " | ".join([
            labels.get(name, name), spread(recited, ".0%"), f"{(1 - 1 / k) ** result['suffix']:.1%}" if k else "",
            spread([np.mean(m["rouge_l"]) for m in models], ".2f"),
            spread([np.mean(m["verbatim"]) for m in models], ".1f"),
            f"{expected(k, result['suffix']):.1f}" if k else "", spread([m["auc"] for m in models], ".2f"),
            spread([m["held_out"] for m in models], ".3f"),
            spread([m["held_out"] for m in longer], ".3f") if longer else ""]) + " |")
    return "\n".join(lines)


def figure(result: dict) -> str:
    ticks = [float(n) for n in range(0, result["suffix"] + 1, 8)]
    curves = []
    for colour, name in enumerate(["none", *(f"k={k}" for k in reversed(KS))]):
        right = np.concatenate([m["verbatim"] for m in _models(result, name)])
        curves.append(Curve("no mask" if name == "none" else name, ticks, [float((right >= n).mean()) for n in ticks],
                            (colour - 1) % 7))
        if name != "none":
            keep = 1 - 1 / MASKS[name].k
            curves.append(Curve("(1 - 1/k)^n" if name == "k=2" else "", ticks, [keep**n for n in ticks],
                                (colour - 1) % 7, "2 3"))
    xs = [float(k) for k in KS]
    flat = float(np.mean([m["held_out"] for m in _models(result, "none")]))
    loss = [Curve("no mask", xs, [flat] * len(xs), 6)]
    for label, equal, dash in (("equal input", False, "6 3"), ("as many targets", True, "1 2")):
        loss.append(Curve(label, xs, [float(np.mean([m["held_out"] for m in _models(result, f"k={k}", equal)]))
                                      for k in KS], 6, dash))
    return panels([Panel("share of passages with the next n tokens right", "n tokens", curves, ticks, 1.0),
                   Panel("held-out loss, nats a token", "k", loss, xs)],
                  f"{result['passages']} passages, {result['repeats']} times each, under goldfish masks")
