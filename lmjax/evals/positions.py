"""Loss by position, also beyond the length that a model was trained on, under each way to extend its context.

What lives here: one model's losses at every position of some rows, and their means by stretches of positions. The
command is `lmjax.analyze.positions`; the formulas of the scalings are `lmjax.nn.rope`'s.
"""

import dataclasses
import functools

import numpy as np
from jax.sharding import Mesh

from lmjax.errors import ConfigError
from lmjax.evals.score import score_documents
from lmjax.evals.windows import WindowConfig
from lmjax.models import ComputeConfig, Decoder, DecoderConfig, RopeScaling
from lmjax.state import graphdef

EXTENSIONS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")


def extended(config: DecoderConfig, kind: str, factor: float, trained: int, length: int) -> DecoderConfig:
    """The model with its rotary positions extended from `trained` to `factor` times that, for rows of `length`.

    Raises ConfigError for a model without rotary positions in layers that see all tokens, or one that is extended.
    """
    if config.positions != "rope" or all(config.windows):
        raise ConfigError(f"model.positions={config.positions!r}, windows={config.windows}: there is nothing to "
                          "extend; give a model whose layers see all tokens by rotary positions")
    if config.rope_scaling is not None:
        raise ConfigError(f"model.rope_scaling.kind={config.rope_scaling.kind!r}: the context of this model is "
                          "extended already; give one that is not")
    assert kind in EXTENSIONS, kind
    # "dynamic" grows with the row by itself: with factor 1, s is the row's length over the trained one.
    scaling = None if kind == "none" else RopeScaling(kind, 1.0 if kind == "dynamic" else factor, original_len=trained)
    return dataclasses.replace(config, rope_scaling=scaling, max_seq_len=max(config.max_seq_len, length))


def stretches(trained: int, length: int, each: int) -> list[int]:
    """Ends of stretches of positions: `each` in every trained length, up to `length`. At least one token long."""
    step = max(trained // each, 1)
    return [*range(step, length, step), length]


def losses_by_position(config: DecoderConfig, compute: ComputeConfig, params, rows_RT: np.ndarray, ends: list[int], *,
                       mesh: Mesh | None = None, batch_tokens: int = 4096) -> np.ndarray:
    """float32 [R, T - 1]: nats of each of rows_RT[:, 1:], each row read as one text from its first token.

    Where frequencies depend on the length of the row ("dynamic"), every stretch is read from rows that end with it: so
    each token is predicted about as it would be when it is the next one. Elsewhere that would change nothing.
    """
    model = graphdef(functools.partial(Decoder, config, compute=compute))
    dynamic = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
    found, start = np.zeros((rows_RT.shape[0], rows_RT.shape[1] - 1), np.float32), 0
    for end in ends if dynamic else ends[-1:]:
        windows = WindowConfig(end, end, batch_tokens)
        texts = score_documents(model, params, rows_RT[:, :end + 1], windows, mesh=mesh)
        for row, stats in enumerate(texts):
            found[row, start:end] = stats["surprisal"][start:end]
        start = end
    return found


def restarted(config: DecoderConfig, compute: ComputeConfig, params, rows_RT: np.ndarray, trained: int, *,
              mesh: Mesh | None = None, batch_tokens: int = 4096) -> np.ndarray:
    """float32 [R, T - 1] as above, but the context begins anew every `trained` tokens: what needs no extension."""
    model, windows = graphdef(functools.partial(Decoder, config, compute=compute)), WindowConfig(
        trained, trained, batch_tokens)
    parts = []
    for at in range(0, rows_RT.shape[1] - 1, trained):
        texts = score_documents(model, params, rows_RT[:, at:at + trained + 1], windows, mesh=mesh)
        parts.append(np.stack([stats["surprisal"] for stats in texts]))
    return np.concatenate(parts, axis=1)


def by_stretch(losses_RT: np.ndarray, ends: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(mean nats of each stretch, its standard error over rows): float64. The error is NaN for one row."""
    starts = [0, *ends[:-1]]
    per_row = np.stack([losses_RT[:, a:b].mean(axis=1, dtype=np.float64) for a, b in zip(starts, ends, strict=True)])
    rows = per_row.shape[1]
    error = per_row.std(axis=1, ddof=1) / np.sqrt(rows) if rows > 1 else np.full(len(ends), np.nan)
    return per_row.mean(axis=1), error
