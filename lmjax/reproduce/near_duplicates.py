"""Goldfish masks on near-duplicates: what leaks, and what closing the leak costs.

Passages of English documentation (pydoc_data, in every Python) are mixed into the rest of it, each in eight copies
that differ in line breaks, in case, and in how they are cut into tokens. A mask of tokens drops other targets in each
copy, so that together the copies teach everything; a mask of words drops the same words in all of them. Counted
without training: the share of letters that no copy supervises. After training a small model from several seeds: how
many copies it continues word for word, and its loss on held-out text.
"""

import argparse
import textwrap
from collections.abc import Callable

import numpy as np

from lmjax.data import train_bpe
from lmjax.data.normal import letters, units
from lmjax.data.protect import plain_pieces, token_values
from lmjax.errors import ConfigError
from lmjax.losses.goldfish import GoldfishConfig, keep_mask
from lmjax.reproduce.figure import Curve, Panel, panels
from lmjax.reproduce.lab import NO_MASK, ROWS, Fields, Lab, Stream, joined, prose, spread, taken

COPIES, K = 8, 4
PREFIX, SUFFIX = 20, 20  # words of a passage: given, and asked for
NEAR_ROWS, SEQ_LEN, VOCABULARY = 6, 96, 1024  # rows of a batch that are of the copies
KINDS = ("breaks", "case", "tokens", "all")
STRATEGIES = {
    "none": NO_MASK, "hash_table": GoldfishConfig("hash_table", K, 13),
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
    passages, background, held_out = prose(options.passages, 75)
    tokenizer = train_bpe(background, VOCABULARY)
    hidden = {kind: hidden_shares(passages, kind, tokenizer) for kind in KINDS}
    say("letters that no copy supervises, of copies that differ in "
        + "; ".join(f"{kind}: " + ", ".join(f"{n} {v:.3f}" for n, v in hidden[kind].items()) for kind in KINDS))
    near = Stream([encode(copy, tokenizer) for i, passage in enumerate(passages)
                   for copy in copies(passage, options.differ, i)], tokenizer)
    rest = Stream([tokenizer.encode(text) for text in background], tokenizer)
    lab = Lab(tokenizer, SEQ_LEN)
    test = lab.rows(Stream([tokenizer.encode(text) for text in held_out], tokenizer))
    models = []
    for seed in range(options.seeds):
        for name in TRAINED:
            fish = STRATEGIES.get(name, NO_MASK)
            params = lab.train(batches(lab.rows(rest, fish), lab.rows(near, fish) if name != "control" else None,
                                       options.steps, seed), seed)
            right = recited(lab, params, passages, options.differ)
            models.append({"strategy": name, "seed": seed, "words_right": right, "held_out": lab.loss(params, test)})
            say(f"seed {seed}, {name}: {np.mean(np.array(right) == SUFFIX):.0%} recited, {np.mean(right):.1f} of "
                f"{SUFFIX} words, held-out loss {models[-1]['held_out']:.3f}")
    result = {"copies": COPIES, "k": K, "steps": options.steps, "passages": options.passages, "differ": options.differ,
              "hidden": hidden, "models": models}
    return result, table(result), figure(result)


# ---- The texts -----------------------------------------------------------------------------------------


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


def batches(rest: Fields, near: Fields | None, steps: int, seed: int) -> list[Fields]:
    """A run: rows drawn from both, or from the rest alone."""
    sources = [(rest, ROWS if near is None else ROWS - NEAR_ROWS)] + ([(near, NEAR_ROWS)] if near is not None else [])
    made = []
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        made.append(joined([taken(rows, rng.integers(0, len(rows["tokens"]), n)) for rows, n in sources]))
    return made


def recited(lab: Lab, params, passages: list[str], kind: str) -> list[int]:
    """Of each copy, how many words of the continuation are right before the first that is not. It is prompted with
    its own beginning, laid out and cut into tokens as it was trained on."""
    prompts, wanted = [], []
    for number, passage in enumerate(passages):
        for text, cuts in copies(passage, kind, number):
            found = units(text)
            end = int(found.ends[PREFIX - 1])
            ids = encode((text[:end], cuts[cuts < end]), lab.tokenizer)
            prompts.append(np.concatenate([[lab.tokenizer.bos_id], ids]))
            wanted.append(found.words[PREFIX:PREFIX + SUFFIX])
    right = []
    for out, words in zip(lab.continued(params, prompts, 56), wanted, strict=True):
        same = [a == b for a, b in zip(units(lab.tokenizer.decode(out)).words, words, strict=False)]
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
