"""The optimizer: an Optax chain and its learning-rate schedule, from a config.

Clipping by global norm, Adam, decoupled weight decay on the weights that a list of patterns names, and the
schedule. Nothing here knows a model; weights are found by their path names (`lmjax.tree`).
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import optax

from lmjax.tree import map_with_name, name_mask

SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclasses.dataclass
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) and its schedule.

    Every schedule first rises linearly from 0 over warmup_steps. "cosine" and "linear" then fall to
    learning_rate * final_fraction at the last step; "wsd" (warm-up, stable, decay; arXiv 2404.06395)
    stays level and falls linearly over the last decay_fraction of the steps; "constant" stays.
    decay: regular expressions of the weights that decay; the default is every matrix, so no norm and no
    bias. clip_norm: 0 does not clip. balance_rate: how far the balance of an expert moves in a step (see `by_sign`).
    """

    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # of "wsd" only
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: tuple[str, ...] = (r"_(VD|PD|DNH|DKH|NHD|DF|FD|DE|EDF|EFD)$",)
    clip_norm: float = 1.0
    balance_rate: float = 1e-3

    def problems(self, total_steps: int, prefix: str = "optim") -> list[str]:
        bad = []
        for name, low, high in (("learning_rate", 0, 10), ("weight_decay", 0, 10), ("clip_norm", 0, 1e9),
                                ("balance_rate", 0, 1), ("final_fraction", 0, 1), ("decay_fraction", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                bad.append(f"{prefix}.{name}={value}: must be from {low} to {high:g}")
        if not 0 < self.eps <= 1:
            bad.append(f"{prefix}.eps={self.eps}: must be above 0 and at most 1; with 0 a zero gradient becomes 0 / 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                bad.append(f"{prefix}.{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.schedule not in SCHEDULES:
            bad.append(f"{prefix}.schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup_steps <= total_steps:
            bad.append(f"{prefix}.warmup_steps={self.warmup_steps}: must be from 0 to steps={total_steps}; set "
                       f"--{prefix}.warmup_steps={total_steps // 10}, say")
        for pattern in self.decay:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                bad.append(f"{prefix}.decay={pattern!r}: not a regular expression ({error})")
        return bad


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, …, total_steps - 1."""
    c, peak, floor = config, config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(total_steps - c.warmup_steps, 1)
    warmup = optax.linear_schedule(0.0, peak, c.warmup_steps)
    if c.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=c.final_fraction)
    elif c.schedule == "linear":
        after = optax.linear_schedule(peak, floor, rest)
    elif c.schedule == "wsd":
        fall = max(min(round(c.decay_fraction * total_steps), rest), 1)
        after = optax.linear_schedule(peak, floor, fall, transition_begin=rest - fall)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([warmup, after], [c.warmup_steps]) if c.warmup_steps else after


def make_optimizer(config: OptimConfig, total_steps: int) -> tuple[optax.GradientTransformation,
                                                                   optax.Schedule]:
    """(the chain, its schedule). The gradients that it is given are means over the global batch."""
    schedule = make_schedule(config, total_steps)
    chain = [
        # Always one link, so that the state keeps its names when clipping is switched on between two attempts.
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: name_mask(params, config.decay)),
        optax.scale_by_learning_rate(schedule),
    ]
    return by_sign(optax.chain(*chain), config.balance_rate), schedule


# ---- balance without a loss ------------------------------------------------------------------------------------

BALANCE = re.compile(r"(^|/)balance_E$")


def losses_alone(grads: Any) -> Any:
    """Gradients with what is no slope of a loss at zero: it is neither clipped nor part of a norm."""
    return map_with_name(lambda name, g: jnp.zeros_like(g) if BALANCE.search(name) else g, grads)


def by_sign(chain: optax.GradientTransformation, rate: float) -> optax.GradientTransformation:
    """`chain`, but the balance of a mixture's experts moves by -rate sign(gradient): DeepSeek-V3's update of its bias
    (arXiv 2408.15664, algorithm 1; 2412.19437, section 2.1.2).

    What arrives as its gradient is each expert's load less the mean load (`lmjax.nn.moe.RouterSums.pull`), a sum over
    tokens like every gradient; so the sign is that of the whole global batch, over all devices and micro-batches.
    """
    def update(grads, state, params=None):
        updates, state = chain.update(losses_alone(grads), state, params)
        return map_with_name(lambda name, u, g: -rate * jnp.sign(g) if BALANCE.search(name) else u, updates,
                             grads), state
    return optax.GradientTransformation(chain.init, update)
