"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), in the half-split layout, and context extension.

Half-split ("rotate_half", GPT-NeoX, Hugging Face): dimension i turns with dimension i + H/2. Weights in
the interleaved layout (Meta's own checkpoints, GGUF) must be permuted when they are loaded.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.axes import platform


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Context extension by changing the rotation frequencies; s = `factor`, L = `original_len`, d = head width.

    kind "linear": every frequency divided by s (position interpolation, arXiv 2306.15595).
    kind "llama3": only wavelengths longer than `L / low_freq` are divided, those shorter than `L / high_freq` stay,
    those between are blended (Llama 3.1 model card and reference code).
    kind "ntk": theta becomes theta s^(d / (d - 2)) ("NTK-aware"; arXiv 2309.00071, section 3.1).
    kind "dynamic": the same with s = factor len / L - (factor - 1) once the row is longer than L, and nothing before
    (arXiv 2309.00071, section 3.3, and Transformers; factor 1 makes s = len / L). Keys in a cache keep the rotation
    of the length at which they were written, as in Transformers.
    kind "yarn": frequencies that turn more than `beta_fast` times over L stay, those that turn less than `beta_slow`
    times are divided by s, those between are blended by dimension, and queries and keys are multiplied by
    `attention_factor`; 0: 0.1 ln s + 1 (arXiv 2309.00071, sections 3.2 and 3.4).
    """

    kind: str = "llama3"
    factor: float = 8.0
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_len: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    def problems(self, prefix: str = "rope_scaling") -> list[str]:
        kinds = ("linear", "llama3", "ntk", "dynamic", "yarn")
        if self.kind not in kinds:
            return [f"{prefix}.kind={self.kind!r}: choose one of {', '.join(kinds)}"]
        rules = {
            "factor": (1 <= self.factor < math.inf, "must be at least 1"),
            "original_len": (self.original_len >= 1, "must be at least 1"),
            "high_freq": (self.kind != "llama3" or 0 < self.low_freq < self.high_freq,
                          f"must be above low_freq={self.low_freq}, and that above 0"),
            "beta_fast": (self.kind != "yarn" or 0 < self.beta_slow < self.beta_fast,
                          f"must be above beta_slow={self.beta_slow}, and that above 0"),
            "attention_factor": (self.attention_factor >= 0, "must not be negative; 0 is 0.1 ln(factor) + 1"),
        }
        return [f"{prefix}.{name}={getattr(self, name)}: {rule}" for name, (right, rule) in rules.items() if not right]


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None,
                     positions_BT: jax.Array | None = None) -> np.ndarray | jax.Array:
    """Radians per position, float32 [H/2]: theta^(-2i/H), then scaled. Computed in float64.

    Kind "dynamic" needs positions_BT, whose maximum tells each row's length, and gives [B, 1, 1, H/2], in float32.
    """
    if scaling is not None and scaling.kind == "dynamic":
        assert positions_BT is not None, "dynamic frequencies depend on the length of the row"
        lengths_B = jnp.max(positions_BT, axis=1).astype(jnp.float32) + 1
        s_B = jnp.maximum(scaling.factor * lengths_B / scaling.original_len - (scaling.factor - 1), 1.0)
        theta_B = theta * s_B ** (head_dim / (head_dim - 2))
        return theta_B[:, None, None, None] ** -(np.arange(0, head_dim, 2, np.float32) / head_dim)
    if scaling is not None and scaling.kind == "ntk":
        theta = theta * scaling.factor ** (head_dim / (head_dim - 2))
    freqs = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is None or scaling.kind == "ntk":
        return freqs.astype(np.float32)
    if scaling.kind == "linear":
        return (freqs / scaling.factor).astype(np.float32)
    turns = scaling.original_len * freqs / (2 * math.pi)  # full turns over the original context
    if scaling.kind == "llama3":
        keep = np.clip((turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq), 0.0, 1.0)
    else:
        assert scaling.kind == "yarn", scaling
        low, high = yarn_range(head_dim, theta, scaling)
        keep = 1 - np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return (freqs * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def yarn_range(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[int, int]:
    """(low, high): below dimension `low` frequencies stay, above `high` they are divided by the factor."""

    def dimension(turns: float) -> float:
        """Of the frequency that makes so many turns over the original context."""
        return head_dim * math.log(scaling.original_len / (2 * math.pi * turns)) / (2 * math.log(theta))

    return (max(math.floor(dimension(scaling.beta_fast)), 0),
            min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1))


def rope_magnitude(scaling: RopeScaling | None) -> float:
    """What queries and keys are multiplied by: YaRN's attention factor, 1 for every other kind."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def rotation(positions_BT: jax.Array, freqs: np.ndarray | jax.Array,
             magnitude: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of positions * freqs, times magnitude, float32 [B, T, 1, H/2]. Made once and used by every layer: a
    sine costs a CPU more than the rest of the rotation."""
    angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * freqs
    cos, sin = _cos_sin_by_a_loop(angles_BT1h) if platform() == "cpu" else (jnp.cos(angles_BT1h), jnp.sin(angles_BT1h))
    return (cos, sin) if magnitude == 1 else (cos * magnitude, sin * magnitude)


@jax.jit  # or it would be compiled at every call outside of a jit
def _cos_sin_by_a_loop(angles: jax.Array) -> jax.Array:
    """Cosines and sines, for XLA's CPU backend: it would compute them again wherever they are read, but leaves alone
    what a loop gave."""
    return jax.lax.map(lambda is_cos: jax.lax.cond(is_cos, jnp.cos, jnp.sin, angles), jnp.array([True, False]))


def apply_rope(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x_i, x_{i+H/2}) by the angle of `rotation`; in float32, keeps x's dtype."""
    cos, sin = cos_sin
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)
