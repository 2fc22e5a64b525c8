"""What is trained in `bench train`: named shapes, the tokens, and the case that every contender reads.

A case is a folder: `case.json` (model, batch, dtype, optimizer, FLOPs, device) and, unless the model is large,
`weights.npz` (our initial weights, so that all contenders begin alike and their first losses can be compared).
Imports NumPy only at the top, so that a peer without JAX can use `tokens`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = 8  # batches are made once and go round, so that nobody's clock holds a generator
WARMUP = 3  # steps before the first round; their losses are what `--check` compares
SHARED_WEIGHTS = 500_000_000  # parameters; larger models are not written to disk to be compared
OPTIM = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}


@dataclasses.dataclass(frozen=True)
class Shape:
    """model: fields of DecoderConfig; `preset` names one to begin from. batch: rows on a CPU and on a GPU."""

    model: dict[str, Any]
    seq_len: int
    batch: tuple[int, int]
    preset: str = ""
    remat: str = "none"


_BASE = {"vocab_size": 8192, "num_layers": 4, "d_model": 256, "num_heads": 4, "d_ff": 1024, "max_seq_len": 512,
         "tied": False}

SHAPES: dict[str, Shape] = {
    "baseline": Shape(_BASE, 512, (8, 64)),
    "window": Shape(_BASE | {"windows": (128,)}, 512, (8, 64)),
    "gqa": Shape(_BASE | {"num_kv_heads": 1}, 512, (8, 64)),
    "vocab32k": Shape(_BASE | {"vocab_size": 32768}, 512, (8, 64)),
    "vocab128k": Shape(_BASE | {"vocab_size": 131072}, 512, (8, 32)),
    "gpt2-124m": Shape({"vocab_size": 50304}, 1024, (2, 64), "gpt2-124m"),
    "llama-1b": Shape({"rope_scaling": None, "max_seq_len": 2048}, 2048, (1, 16), "llama3.2-1b", "dots"),
    "llama3-8b": Shape({}, 8192, (1, 1), "llama3-8b", "full"),
    "quickstart": Shape({"vocab_size": 2048, "max_seq_len": 512}, 128, (8, 8), "tiny-1m"),
    "tiny": Shape({"vocab_size": 64, "num_layers": 2, "d_model": 32, "num_heads": 2, "d_ff": 64, "max_seq_len": 32,
                   "tied": False}, 32, (2, 2)),
}


@dataclasses.dataclass
class Case:
    """One setting for all contenders. flops_full and flops_causal: training FLOPs of a token with attention counted
    over all keys, or over those that a query sees. peak_flops: of the device in this dtype; 0 is not known."""

    shape: str
    model: dict[str, Any]
    batch: int
    seq_len: int
    dtype: str
    remat: str
    attention: str = "auto"
    optim: dict[str, float] = dataclasses.field(default_factory=lambda: dict(OPTIM))
    platform: str = ""
    device: str = ""
    parameters: int = 0
    matrix_weights: int = 0
    flops_full: float = 0.0
    flops_causal: float = 0.0
    peak_flops: float = 0.0
    same_weights: bool = False

    def save(self, folder: Path) -> None:
        (folder / "case.json").write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> "Case":
        return cls(**json.loads((Path(folder) / "case.json").read_text()))


def tokens(vocab: int, batch: int, seq_len: int, count: int = BATCHES, seed: int = 0) -> np.ndarray:
    """Learnable tokens, int32 [count, B, T + 1]: x[t + 1] = (5 x[t] + 7 + noise) mod vocab, noise in 0 … 3."""
    rng = np.random.default_rng(seed)
    x = np.empty((count, batch, seq_len + 1), np.int64)
    x[..., 0] = rng.integers(0, vocab, (count, batch))
    noise = rng.integers(0, 4, (count, batch, seq_len))
    for t in range(seq_len):
        x[..., t + 1] = (5 * x[..., t] + 7 + noise[..., t]) % vocab
    return x.astype(np.int32)
