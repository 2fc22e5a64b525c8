"""Bad numbers: which updates are skipped, decided on the device, with no wait of the host.

An update is skipped where the loss or the gradient's norm is not finite, or, with sigmas > 0, where either is that many
standard deviations above its mean over the last `window` good steps (OLMo-core, optim/skip_step_optimizer.py, has 6
over 128). Only good steps enter the window: with NaNs in it nothing would be found any more, and with spikes in it a
few would hide all that follow (four of them lift mean + 6 deviations over 128 steps above their own height). A loss
that stays on a new level is therefore skipped until `in_row` ends the run or turns it back, which says so. What a skip
does to the state is in `lmjax.step`; what many in a row lead to, in `lmjax.train`.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass
class GuardConfig:
    """What is done about bad numbers.

    sigmas: an outlier is so many standard deviations above the mean; 0: only what is not finite is skipped. window:
    steps that mean and deviation are taken over. in_row: so many skipped updates in a row end the run, or make it go
    back. rewinds: how often a run may go back, to a checkpoint at least rewind_steps before the first skip, and jump
    over the next rewind_jump batches (PaLM: 100 steps back, 200 to 500 batches; arXiv 2204.02311, section 5.1).
    recheck: steps between two at which the step is run twice and the bits compared; 0: never. It holds a second copy
    of the state while it does.
    """

    sigmas: float = 0.0
    window: int = 128
    in_row: int = 10
    rewinds: int = 0
    rewind_steps: int = 100
    rewind_jump: int = 200
    recheck: int = 0

    def problems(self, prefix: str = "guard") -> list[str]:
        bad = []
        if not (self.sigmas == 0 or 1 <= self.sigmas < float("inf")):
            bad.append(f"{prefix}.sigmas={self.sigmas}: at least 1 standard deviation (6 is usual), or 0 for none")
        for name, low in (("window", 8), ("in_row", 1), ("rewinds", 0), ("rewind_steps", 0), ("rewind_jump", 1),
                          ("recheck", 0)):
            if getattr(self, name) < low:
                bad.append(f"{prefix}.{name}={getattr(self, name)}: must be at least {low}")
        if self.window > 100_000:
            bad.append(f"{prefix}.window={self.window}: at most 100000 steps are remembered")
        return bad


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class GuardState:
    """recent: float32 [window, 2], loss and gradient norm of the last steps; seen: how many have entered. skipped: all
    in this run; in_row: up to now. Part of the state, so a resumed run skips what an uninterrupted one skips."""

    recent: jax.Array
    seen: jax.Array
    skipped: jax.Array
    in_row: jax.Array


def fresh_guard(config: GuardConfig) -> GuardState:
    # With sigmas=0 nothing is ever looked up, so nothing is remembered.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]  # three arrays: a donated one may be given once only
    return GuardState(jnp.zeros((config.window if config.sigmas else 1, 2), jnp.float32), *zeros)


def judge(sigmas: float, state: GuardState, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, GuardState]:
    """(whether this step's update is good, the state after it). loss: mean of the batch; norm: of the gradient."""
    both = jnp.stack([loss, norm]).astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(both))
    good, recent, seen = finite, state.recent, state.seen
    if sigmas:
        window = recent.shape[0]
        inside = (jnp.arange(window) < seen)[:, None]
        count = jnp.maximum(jnp.minimum(seen, window), 1)
        mean = jnp.sum(jnp.where(inside, recent, 0), 0) / count
        spread = jnp.sqrt(jnp.sum(jnp.where(inside, (recent - mean) ** 2, 0), 0) / count)
        # Half a window is needed before a deviation means anything.
        spike = (seen >= window // 2) & jnp.any(both > mean + sigmas * spread)
        good = finite & ~spike
        recent = jnp.where(good, recent.at[seen % window].set(both), recent)
        seen = seen + good.astype(jnp.int32)
    bad = (~good).astype(jnp.int32)
    return good, GuardState(recent, seen, state.skipped + bad, (state.in_row + 1) * bad)
