"""The weights of a mixture of experts, and their initial values. What they compute is `lmjax.nn.moe`."""

import jax
from flax import nnx

from lmjax.models.initial import EMBED_STD, cast, full_weight, random_weight
from lmjax.nn.mlp import feed_forward
from lmjax.nn.moe import RouterSums, mixture, route, router_sums


class MoE(nnx.Module):
    """A router, E experts, and where the config says so an MLP that every token takes; in place of an MLP.

    Initialised as an MLP is (`lmjax.models.decoder.Attention` says why); the router like an embedding, so that
    scores begin nearly equal.
    """

    def __init__(self, config, key: jax.Array, implementation: str = "auto"):
        c, m = config, config.moe
        D, E, F, S = c.d_model, m.num_experts, m.d_ff, m.shared_d_ff

        def inner(name, shape):
            return random_weight(key, name, shape, D**-0.5)

        def outer(name, shape):
            return random_weight(key, name, shape, EMBED_STD * (shape[-2] * 2 * c.num_layers) ** -0.5)

        self.moe, self.activation, self.implementation = m, c.activation, implementation
        self.router_DE = random_weight(key, "router_DE", (D, E), EMBED_STD)
        self.balance_E = full_weight((E,), 0.0, m.balance)
        self.up_EDF = inner("up_EDF", (E, D, F))
        self.gate_EDF = inner("gate_EDF", (E, D, F)) if c.gated else None
        self.down_EFD = outer("down_EFD", (E, F, D))
        self.shared_up_DF = inner("shared_up_DF", (D, S)) if S else None
        self.shared_gate_DF = inner("shared_gate_DF", (D, S)) if S and c.gated else None
        self.shared_down_FD = outer("shared_down_FD", (S, D)) if S else None

    def __call__(self, x_BTD, weights_BT=None, by_stage: bool = False) -> tuple[jax.Array, RouterSums | None]:
        """(what the experts add up to, the router's sums over tokens with these weights; None: without). by_stage: as
        in `mixture`."""
        dtype, balance_E = x_BTD.dtype, None if self.balance_E is None else self.balance_E[...]
        routed = route(x_BTD, self.router_DE[...], self.moe, balance_E)
        up, gate, down, shared_up, shared_gate, shared_down = (cast(w, dtype) for w in (
            self.up_EDF, self.gate_EDF, self.down_EFD, self.shared_up_DF, self.shared_gate_DF, self.shared_down_FD))
        y_BTD = mixture(x_BTD, routed, up, gate, down, self.activation, self.implementation, by_stage)
        if shared_up is not None:
            y_BTD = y_BTD + feed_forward(x_BTD, shared_up, shared_down, self.activation, shared_gate)
        return y_BTD, None if weights_BT is None else router_sums(routed, weights_BT, balance_E)
