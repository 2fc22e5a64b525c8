"""Losses that keep the router of a mixture of experts even and its logits small, from its sums (`lmjax.nn.moe`).

With C_e the choices of expert e and Q_e its scores, both summed over tokens with the weights of the loss, W the sum of
those weights, E experts, and A chosen by each token, a layer adds to the mean loss

    balance   E sum_e f_e P_e,  f_e = C_e / (A W),  P_e = Q_e / W     (Switch, arXiv 2101.03961, eq. 4-6, where A = 1)
    z         mean of logsumexp(logits)^2                             (ST-MoE, arXiv 2202.08906, eq. 5)

times its coefficient. balance is 1 where all experts are chosen alike and have the same scores. Transformers'
`load_balancing_loss_func` does not divide by A, and takes f and P over all L layers at once: its coefficient c does
about what c A / L does here.

Both leave here as sums, to be divided by the weight of the whole global batch. z is then a mean over that batch
exactly. balance is a product of two means: those of one micro-batch, over all devices. With accumulate = 1 that is the
global batch; else the step's balance is the mean of its micro-batches', by their weight.
"""

import jax
import jax.numpy as jnp


def router_loss(counts_LE: jax.Array, probs_LE: jax.Array, z_L: jax.Array, weight: jax.Array, choices: int, *,
                balance: float, z: float) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """(what the routers add to the sum of the loss, metrics), float32. weight: W; choices: A.

    Metrics, means over layers: balance and z, without coefficients; busiest: the share of all choices that the
    busiest expert has; entropy: of the load, 1 where all experts have as much, 0 where one has all.
    """
    E = counts_LE.shape[-1]
    some = jnp.maximum(weight, 1e-8)
    counts_LE = jax.lax.stop_gradient(counts_LE)
    balance_L = E / (choices * some) * jnp.sum(counts_LE * probs_LE, axis=-1)  # times W
    share_LE = counts_LE / (choices * some)
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(share_LE, share_LE), axis=-1) / jnp.log(max(E, 2))
    metrics = {"router_balance": (jnp.mean(balance_L), weight), "router_z": (jnp.mean(z_L), weight),
               "router_busiest": (jnp.mean(jnp.max(share_LE, axis=-1)) * weight, weight),
               "router_entropy": (jnp.mean(entropy_L) * weight, weight)}
    total = balance * jnp.sum(balance_L) + z * jnp.sum(z_L)
    return total, {name: (jax.lax.stop_gradient(s), w) for name, (s, w) in metrics.items()}
