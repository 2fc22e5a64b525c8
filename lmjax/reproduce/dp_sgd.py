"""Differential privacy beside goldfish, under the same questions: what a guarantee stops, and what it costs.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133): every row is in a batch with the same probability, independently; each
row's own gradient is clipped to a norm; Gaussian noise is added to their sum. Then no row, a whole passage here,
changes the model's distribution by more than (epsilon, delta). Clipping, sampling and accounting are jax-privacy's
(`pip install 'lmjax[privacy]'`); the objective is the one that everything else trains with.

The texts and questions are those of `lmjax.reproduce.goldfish`; here each passage is one row of the data and is seen as
often as any other.
"""

import argparse
import functools
import importlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.errors import ConfigError
from lmjax.losses.goldfish import GoldfishConfig
from lmjax.objectives import pretrain
from lmjax.optim import OptimConfig, make_optimizer
from lmjax.reproduce.figure import Curve, Panel, panels
from lmjax.reproduce.goldfish import SUFFIX, Texts, asked, read
from lmjax.reproduce.lab import NO_MASK, Fields, joined, masked, spread, taken

EPSILONS = (8.0, 64.0, 512.0)
DELTA = 1e-4  # below one over the rows
ROWS, BATCH, MOST = 300, 32, 64  # rows beside the passages; of a batch on average, and at most (6 standard deviations)
CLIP = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="models of each kind (default: 1)")
    parser.add_argument("--epochs", type=int, default=20, metavar="N",
                        help="how often each row is seen, on average (default: %(default)s)")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict, str, str]:
    """Raises ConfigError for bad options, or without jax-privacy."""
    if bad := [f"--{name} {getattr(options, name)}: give 1 or more" for name in ("seeds", "epochs")
               if getattr(options, name) < 1]:
        raise ConfigError(*bad)
    try:
        accounting, selection, privacy = (importlib.import_module(f"jax_privacy{name}")
                                          for name in (".accounting", ".batch_selection", ""))
    except ImportError as error:
        raise ConfigError(f"dp-sgd: needs jax-privacy ({error}); pip install 'lmjax[privacy]'") from None
    texts = read()
    rest = taken(texts.rest, np.linspace(0, len(texts.rest["tokens"]) - 1, ROWS).astype(int))
    rows = joined([texts.passages, rest])
    count = len(rows["tokens"])
    steps = round(options.epochs * count / BATCH)
    noise = {epsilon: accounting.calibrate_noise_multiplier(
        target_epsilon=epsilon, accountant=accounting.analysis.DpsgdTrainingAccountant(
            dp_accountant_config=accounting.accountants.PldAccountantConfig()),
        batch_sizes=BATCH, num_updates=steps, num_samples=count, target_delta=DELTA) for epsilon in EPSILONS}
    say(f"{count} rows, {steps} steps; noise of " + ", ".join(f"{s:.2f} for epsilon {e:g}" for e, s in noise.items()))
    train = trainer(texts, privacy.clipped_grad, steps)
    kinds = {"no protection": (NO_MASK, math.inf, 0.0), "goldfish k=4": (GoldfishConfig("hash", 4), math.inf, 0.0),
             "clipped, no noise": (NO_MASK, CLIP, 0.0)}
    kinds |= {f"epsilon {epsilon:g}": (NO_MASK, CLIP, sigma) for epsilon, sigma in reversed(noise.items())}
    models = []
    for seed in range(options.seeds):
        chosen = list(selection.CyclicPoissonSampling(BATCH / count, steps).batch_iterator(count, seed))
        for name, (fish, clip, sigma) in kinds.items():
            found = asked(texts, train(masked(rows, fish), chosen, clip, sigma, seed))
            models.append({"kind": name, "seed": seed} | found)
            say(f"seed {seed}, {name}: {np.mean(np.array(found['verbatim']) == SUFFIX):.0%} recited, AUC "
                f"{found['auc']:.2f}, held-out loss {found['held_out']:.3f}")
    result = {"rows": count, "steps": steps, "delta": DELTA, "clip": CLIP, "noise": noise, "kinds": list(kinds),
              "seeds": options.seeds, "epochs": options.epochs, "models": models}
    return result, table(result), figure(result)


def trainer(texts: Texts, clipped_grad: Callable, steps: int) -> Callable:
    """train(rows, chosen, clip, sigma, seed) -> weights. One program for every clip norm, which scales gradients before
    and after a clip to 1, and for every noise; without a clip no row needs a gradient of its own."""
    lab = texts.lab
    tx, _ = make_optimizer(OptimConfig(learning_rate=6e-3, warmup_steps=max(1, steps // 20)), steps)

    def own(params, row, clip):
        """A row's loss over the clip norm. Its weight is its own: one row must not touch another's gradient."""
        total, weight, _ = pretrain.loss(pretrain.PretrainConfig(), nnx.merge(lab.definition, params), row,
                                         jax.random.key(0))
        return total / jnp.maximum(weight, 1) / clip

    clipped = clipped_grad(own, l2_clip_norm=1.0, batch_argnums=1)

    def all_rows(params, batch, padding):
        """The sum of `own` of every row, with no clip."""
        each = jnp.where(padding, 0, 1 / jnp.maximum(batch["weights"].sum(1), 1))
        weighted = batch | {"weights": batch["weights"] * each[:, None]}
        return pretrain.loss(pretrain.PretrainConfig(), nnx.merge(lab.definition, params), weighted,
                             jax.random.key(0))[0]

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def plain(params, state, batch, padding):
        return step(params, state, jax.tree.map(lambda g: g / BATCH, jax.grad(all_rows)(params, batch, padding)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def private(params, state, batch, padding, clip, sigma, key):
        leaves, tree = jax.tree.flatten(clipped(params, batch, clip, is_padding_example=padding))
        noisy = [(g + sigma * jax.random.normal(jax.random.fold_in(key, i), g.shape)) * clip / BATCH
                 for i, g in enumerate(leaves)]
        return step(params, state, jax.tree.unflatten(tree, noisy))

    def train(rows: Fields, chosen: list[np.ndarray], clip: float, sigma: float, seed: int):
        params = lab.fresh(seed)
        state = tx.init(params)
        for step, numbers in enumerate(chosen):
            assert len(numbers) <= MOST, "a batch that is cut is not the one that is accounted for"
            numbers, padding = numbers.astype(int), np.arange(MOST) >= len(numbers)
            batch = taken(rows, np.pad(numbers, (0, MOST - len(numbers))))
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
            if math.isinf(clip):
                assert not sigma
                params, state = plain(params, state, batch, padding)
            else:
                params, state = private(params, state, batch, padding, clip, sigma, key)
        return params

    return train


# ---- What is told --------------------------------------------------------------------------------------


def table(result: dict) -> str:
    seeds = "one seed" if result["seeds"] == 1 else f"mean and range of {result['seeds']} seeds"
    lines = [f"{result['rows']} rows, each seen {result['epochs']} times on average; epsilon at delta = "
             f"{result['delta']:g}, for a row; {seeds}", "",
             "| trained with | noise | recited | ROUGE-L | tokens before the first wrong one | AUC of the loss "
             "| held-out loss, nats a token |", "|---" * 7 + "|"]
    for name in result["kinds"]:
        models = [m for m in result["models"] if m["kind"] == name]
        sigma = {f"epsilon {e:g}": f"{s:.2f}" for e, s in result["noise"].items()}.get(name, "")
        lines.append("| " + " | ".join([
            name, sigma, spread([np.mean(np.array(m["verbatim"]) == SUFFIX) for m in models], ".0%"),
            spread([np.mean(m["rouge_l"]) for m in models], ".2f"),
            spread([np.mean(m["verbatim"]) for m in models], ".1f"), spread([m["auc"] for m in models], ".2f"),
            spread([m["held_out"] for m in models], ".2f")]) + " |")
    return "\n".join(lines)


def figure(result: dict) -> str:
    ticks = sorted(result["noise"])

    def mean(kind: str, name: str) -> float:
        return float(np.mean([np.mean(m[name]) for m in result["models"] if m["kind"] == kind]))

    def curves(name: str) -> list[Curve]:
        flat = [Curve(kind, ticks, [mean(kind, name)] * len(ticks), colour, dash) for kind, colour, dash in (
            ("no protection", 6, "2 3"), ("goldfish k=4", 1, "6 3"), ("clipped, no noise", 2, "1 5"))]
        return [Curve("DP-SGD", ticks, [mean(f"epsilon {e:g}", name) for e in ticks], 0), *flat]

    return panels([Panel("AUC of the loss: seen or not", "epsilon", curves("auc"), ticks, 1.0),
                   Panel("held-out loss, nats a token", "epsilon", curves("held_out"), ticks)],
                  "What a guarantee stops, and what it costs")
