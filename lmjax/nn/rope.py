"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), in the half-split layout.

Half-split ("rotate_half", GPT-NeoX, Hugging Face): dimension i turns with dimension i + H/2. Weights in
the interleaved layout (Meta's own checkpoints, GGUF) must be permuted when they are loaded.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Context extension by changing the rotation frequencies.

    kind "linear": every frequency divided by `factor` (position interpolation, arXiv 2306.15595).
    kind "llama3": only wavelengths longer than `original_len / low_freq` are divided, those shorter than
    `original_len / high_freq` stay, those between are blended (Llama 3.1 model card and reference code).
    """

    kind: str = "llama3"
    factor: float = 8.0
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_len: int = 8192


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position, float32 [H/2]: theta^(-2i/H), then scaled. Computed in float64."""
    freqs = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return freqs.astype(np.float32)
    if scaling.kind == "linear":
        return (freqs / scaling.factor).astype(np.float32)
    assert scaling.kind == "llama3", scaling
    turns = scaling.original_len * freqs / (2 * math.pi)  # full turns over the original context
    blend = np.clip((turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq), 0.0, 1.0)
    return (freqs * (blend + (1 - blend) / scaling.factor)).astype(np.float32)


def rotation(positions_BT: jax.Array, freqs: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of positions * freqs, float32 [B, T, 1, H/2]. Made once and used by every layer: a sine costs a
    CPU more than the rest of the rotation."""
    angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * freqs
    return jnp.cos(angles_BT1h), jnp.sin(angles_BT1h)


def apply_rope(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x_i, x_{i+H/2}) by the angle of `rotation`; in float32, keeps x's dtype."""
    cos, sin = cos_sin
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)
