"""Next-token pretraining, with or without the goldfish loss.

Batch fields, all [B, T]: tokens, targets, segments, positions, weights; `goldfish` where sources are gated or words are
hashed (`lmjax.data.protect`); and `step` [B], the same number in every row, where goldfish has a schedule.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lmjax.losses.cross_entropy import cross_entropy, weighted_sum
from lmjax.losses.goldfish import GoldfishConfig, keep_mask
from lmjax.losses.router import router_loss


@dataclasses.dataclass
class PretrainConfig:
    """goldfish: targets that are never trained on. z_loss: pulls logsumexp to 0 (PaLM: 1e-4). router_balance and
    router_z: coefficients of the losses of each layer's router, in models with experts (`lmjax.losses.router`;
    Switch: 1e-2, and ST-MoE: 1e-3)."""

    goldfish: GoldfishConfig = dataclasses.field(default_factory=GoldfishConfig)
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    router_balance: float = 1e-2
    router_z: float = 1e-3

    def problems(self, prefix: str = "objective") -> list[str]:
        bad = self.goldfish.problems(f"{prefix}.goldfish")
        return bad + [f"{prefix}.{name}={getattr(self, name)}: must be at least 0 and below 1"
                      for name in ("z_loss", "label_smoothing", "router_balance", "router_z")
                      if not 0 <= getattr(self, name) < 1]


def loss(config: PretrainConfig, model, batch: dict[str, jax.Array],
         key: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """(sum, weight, metrics) in nats. Reported losses are pure cross-entropy: on kept targets, on dropped
    ones (which the model was never trained on), and on all.

    The losses of routers count tokens with the same weights: padding and dropped targets do not pull at a router.
    """
    weights_BT = batch["weights"]
    keep_BT = keep_mask(config.goldfish, batch["tokens"], batch["targets"], batch["segments"], key,
                        batch.get("goldfish"), batch["step"][0] if config.goldfish.scheduled else None)
    kept_BT = weights_BT * keep_BT
    x_BTD, routers = model.hidden_and_router(batch["tokens"], batch["segments"], batch["positions"], kept_BT)
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
    if routers is not None:
        more, told = router_loss(routers.counts_E, routers.probs_E, routers.z, kept_weight,
                                 model.config.moe.experts_per_token, balance=config.router_balance, z=config.router_z)
        total, metrics = total + more + jnp.sum(routers.pull), metrics | told
    return total, kept_weight, metrics
