"""How the published goldfish hash behaves on real text, by context length and vocabulary.

The text is the source of this Python's standard library and the documentation in pydoc_data, which are everywhere;
tokenizers are bytes and byte-level BPEs trained on it. What is measured, over the whole stream:
windows whose 64-bit product is 0 (all of them share the table's first entry, 0.2337), the entropy of the table index,
the share of targets dropped, the chance of a drop right after a drop (k's own rate if drops are independent), and the
longest stretch without one. Beside it the hash of lmjax, on the same tokens.
"""

import argparse
import importlib
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from lmjax.data import SourceConfig, documents, load_tokenizer, train_bpe
from lmjax.errors import ConfigError
from lmjax.losses.goldfish import TABLE_SIZE, hash_values, reference_table
from lmjax.reproduce.figure import Curve, Panel, panels

CONTEXTS = (4, 13, 25, 50, 100)
KS = (4, 50)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1_000_000, metavar="N",
                        help="tokens looked at for each tokenizer (default: %(default)s)")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[257, 4096, 32768], metavar="V",
                        help="257 is bytes, others are BPEs trained here (default: 257 4096 32768)")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict, str, str]:
    if options.tokens < 1000:
        raise ConfigError(f"--tokens {options.tokens}: give 1000 or more")
    rows = []
    for vocabulary in options.vocabularies:
        tokenizer = load_tokenizer("bytes") if vocabulary == 257 else train_bpe(texts(), vocabulary)
        ids = stream(tokenizer, options.tokens)
        say(f"{tokenizer.name}: {len(ids):,} tokens")
        for context in CONTEXTS:
            rows.append({"tokenizer": tokenizer.name, "context": context} | measure(ids, context))
    return {"rows": rows}, table(rows), figure(rows)


def texts() -> Iterator[str]:
    """English documentation first, then source code, so that few tokens hold both."""
    yield from importlib.import_module("pydoc_data.topics").topics.values()
    for document in documents(SourceConfig(), Counter()):
        yield document.text


def stream(tokenizer, count: int) -> np.ndarray:
    """Token ids of half documentation, half code, int64 [count at most]."""
    prose, code = [], []
    for number, text in enumerate(texts()):
        part = prose if number < len(importlib.import_module("pydoc_data.topics").topics) else code
        if sum(map(len, part)) < count // 2:
            part.append(tokenizer.encode(text))
        elif part is code:
            break
    return np.concatenate([np.concatenate(part)[:count // 2] for part in (prose, code)]).astype(np.int64)


def published_keys(ids: np.ndarray, context: int) -> np.ndarray:
    """The wrapping int64 product of each window of `context` ids."""
    key = np.ones(len(ids) - context + 1, np.int64)
    for j in range(context):
        key *= ids[j:j + len(key)]  # wraps, as in the published code
    return key


def measure(ids: np.ndarray, context: int) -> dict:
    keys = published_keys(ids, context)
    index = np.mod(keys, TABLE_SIZE)
    share = np.bincount(index, minlength=TABLE_SIZE) / len(index)
    entropy = float(-np.sum(share[share > 0] * np.log2(share[share > 0])))
    entries = reference_table()[index]
    ours = hash_values(ids[None].astype(np.int32), context=context)[0, context:]
    found = {"zero": float((keys == 0).mean()), "zero_if_independent": expected_zero(ids, context), "entropy": entropy}
    for k in KS:
        for name, drop in (("published", entries < np.float32(1 / k)), ("ours", ours < np.uint32(2**32 // k))):
            before = drop[:-1]
            found[f"{name}_{k}"] = {"rate": float(drop.mean()), "longest_gap": longest_gap(drop),
                                    "after_a_drop": float(drop[1:][before].mean()) if before.any() else 0.0}
    return found


def expected_zero(ids: np.ndarray, context: int) -> float:
    """The share of zero products if the ids of a window were drawn independently: a product of 64-bit integers is 0
    where its factors hold 64 twos together, or one of them is 0."""
    twos = np.where(ids == 0, 64, 0)
    for power in range(1, 32):
        twos += (ids != 0) & (ids % 2**power == 0)
    one = np.bincount(np.minimum(twos, 64), minlength=65) / len(ids)
    total = np.zeros(65)
    total[0] = 1.0
    for _ in range(context):
        both = np.convolve(total, one)
        total = np.append(both[:64], both[64:].sum())
    return float(total[64])


def longest_gap(drop: np.ndarray) -> int:
    """The longest run of targets without a drop."""
    at = np.flatnonzero(np.concatenate([[True], drop, [True]]))
    return int(np.diff(at).max() - 1)


def table(rows: list[dict]) -> str:
    lines = ["| tokenizer | h | zero products (if ids were independent) | index entropy, bits of 19.9 | dropped at k=4 "
             "(after a drop) | dropped at k=50 (after a drop) | longest gap at k=50 | ours: k=4, k=50 | ours: longest "
             "gap at k=50 |", "|---" * 9 + "|"]
    for r in rows:
        p4, p50, o4, o50 = r["published_4"], r["published_50"], r["ours_4"], r["ours_50"]
        lines.append(
            f"| {r['tokenizer']} | {r['context']} | {r['zero']:.2%} ({r['zero_if_independent']:.2%}) "
            f"| {r['entropy']:.1f} | {p4['rate']:.3f} ({p4['after_a_drop']:.2f}) "
            f"| {p50['rate']:.4f} ({p50['after_a_drop']:.2f}) | {p50['longest_gap']:,} "
            f"| {o4['rate']:.3f}, {o50['rate']:.4f} | {o50['longest_gap']:,} |")
    return "\n".join(lines)


def figure(rows: list[dict]) -> str:
    names = list(dict.fromkeys(r["tokenizer"] for r in rows))
    ticks = [float(c) for c in CONTEXTS]

    def curves(value: Callable[[dict], float], more: list[Curve]) -> list[Curve]:
        return [Curve(name, ticks, [value(r) for r in rows if r["tokenizer"] == name], i)
                for i, name in enumerate(names)] + more

    def constant(y: float) -> list[Curve]:
        return [Curve("wanted", ticks, [y] * len(ticks), 6, "5 4")]

    return panels([
        Panel("windows whose product is 0", "context h", curves(lambda r: r["zero"], constant(0.0)), ticks),
        Panel("targets dropped at k = 4", "context h",
              curves(lambda r: r["published_4"]["rate"], constant(0.25)), ticks),
        Panel("targets dropped at k = 50", "context h",
              curves(lambda r: r["published_50"]["rate"], constant(0.02)), ticks),
    ], "The published product hash, by the number of tokens that it multiplies")
