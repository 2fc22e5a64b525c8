"""Feed-forward layers: plain (up, activate, down) and gated (activate(gate) * up, down)."""

import jax
import jax.numpy as jnp

from lmjax.axes import constrain
from lmjax.nn.linear import project

# name -> function. "gelu" is the exact erf form, "gelu_tanh" GPT-2's and Gemma's approximation, and
# "relu2" the squared ReLU of Primer (So et al. 2021, arXiv 2109.08668).
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def feed_forward(x_BTD: jax.Array, up_DF: jax.Array, down_FD: jax.Array, activation: str,
                 gate_DF: jax.Array | None = None, up_F: jax.Array | None = None,
                 down_D: jax.Array | None = None) -> jax.Array:
    """The MLP of a block, in x's dtype.

    With `gate_DF` it is gated (GLU variants, Shazeer 2020, arXiv 2002.05202): down(act(x gate) * (x up)).
    `up_F` and `down_D` are biases of the plain form.
    """
    act = ACTIVATIONS[activation]
    h_BTF = constrain(project("BTD,DF->BTF", x_BTD, up_DF), "BTF")
    if up_F is not None:
        h_BTF = h_BTF + up_F
    if gate_DF is None:
        h_BTF = act(h_BTF)
    else:
        gate_BTF = constrain(project("BTD,DF->BTF", x_BTD, gate_DF), "BTF")
        # Recomputed in the backward pass: of the five arrays [B, T, F] here only the two inputs are kept.
        h_BTF = jax.checkpoint(lambda gate, up: act(gate) * up)(gate_BTF, h_BTF)
    y_BTD = project("BTF,FD->BTD", h_BTF, down_FD)
    return y_BTD if down_D is None else y_BTD + down_D
