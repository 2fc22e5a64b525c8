"""Next-token pretraining, with or without the goldfish loss.

Batch fields, all [B, T]: tokens, targets, segments, positions, weights; `goldfish` where sources are gated or words are
hashed (`lmjax.data.protect`); and `step` [B], the same number in every row, where goldfish has a schedule.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lmjax.losses.cross_entropy import cross_entropy, weighted_sum
from lmjax.losses.goldfish import GoldfishConfig, keep_mask


@dataclasses.dataclass
class PretrainConfig:
    """goldfish: targets that are never trained on. z_loss: pulls logsumexp to 0 (PaLM: 1e-4)."""

    goldfish: GoldfishConfig = dataclasses.field(default_factory=GoldfishConfig)
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def problems(self, prefix: str = "objective") -> list[str]:
        bad = self.goldfish.problems(f"{prefix}.goldfish")
        if not 0 <= self.z_loss < 1:
            bad.append(f"{prefix}.z_loss={self.z_loss}: must be at least 0 and below 1")
        if not 0 <= self.label_smoothing < 1:
            bad.append(f"{prefix}.label_smoothing={self.label_smoothing}: must be at least 0 and below 1")
        return bad


def loss(config: PretrainConfig, model, batch: dict[str, jax.Array],
         key: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """(sum, weight, metrics) in nats. Reported losses are pure cross-entropy: on kept targets, on dropped
    ones (which the model was never trained on), and on all."""
    weights_BT = batch["weights"]
    keep_BT = keep_mask(config.goldfish, batch["tokens"], batch["targets"], batch["segments"], key,
                        batch.get("goldfish"), batch["step"][0] if config.goldfish.scheduled else None)
    kept_BT = weights_BT * keep_BT
    x_BTD = model.hidden(batch["tokens"], batch["segments"], batch["positions"])
    total, nll_BT = cross_entropy(
        x_BTD, model.head_VD, batch["targets"], kept_BT, z_loss=config.z_loss,
        label_smoothing=config.label_smoothing, softcap=model.config.logit_softcap)
    dropped_BT = weights_BT - kept_BT
    all_weight, kept_weight = jnp.sum(weights_BT), jnp.sum(kept_BT)
    metrics = {
        "loss": (weighted_sum(nll_BT, kept_BT), kept_weight),
        "loss_all": (weighted_sum(nll_BT, weights_BT), all_weight),
        "kept_fraction": (kept_weight, all_weight),
    }
    if config.goldfish.strategy != "none":
        metrics["loss_kept"] = metrics["loss"]
        metrics["loss_dropped"] = (weighted_sum(nll_BT, dropped_BT), jnp.sum(dropped_BT))
    return total, kept_weight, metrics
