"""What several tests share: tiny models, made-up batches, and a train step on a mesh."""

import functools

import jax
import numpy as np

from lmjax.axes import MeshConfig, make_mesh
from lmjax.loader import to_global
from lmjax.models import ComputeConfig, Decoder, DecoderConfig
from lmjax.objectives import pretrain
from lmjax.optim import OptimConfig, make_optimizer
from lmjax.state import graphdef, init_state, make_init
from lmjax.step import make_train_step

TINY = DecoderConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, max_seq_len=64,
                     qk_norm=True)


def packed_batch(step: int, rows: int = 8, seq_len: int = 32, vocab: int = 64, ragged: bool = True) -> dict:
    """A batch of packed documents with unequal weights, a pure function of the step."""
    rng = np.random.default_rng(step)
    stream = rng.integers(0, vocab, (rows, seq_len + 1)).astype(np.int32)
    starts = rng.random((rows, seq_len)) < 0.08
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1).astype(np.int32)
    index = np.arange(seq_len)
    positions = (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)
    weights = np.ones((rows, seq_len), np.float32)
    weights[:, :-1] = segments[:, :-1] == segments[:, 1:]
    if ragged:  # rows keep from 5 % to 100 % of their targets
        weights *= rng.random((rows, seq_len)) < np.linspace(0.05, 1, rows)[:, None]
    return {"tokens": stream[:, :-1], "targets": stream[:, 1:], "segments": segments, "positions": positions,
            "weights": weights}


def run_steps(mesh: MeshConfig, num_devices: int, *, steps: int = 3, accumulate: int = 1,
              objective: pretrain.PretrainConfig | None = None, config: DecoderConfig = TINY,
              compute: ComputeConfig | None = None, batch_of=packed_batch):
    """(initial params, final state, [metrics of each step]) of a few steps on a mesh, on the host."""
    tx, schedule = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=1), steps)
    build = functools.partial(Decoder, config, compute=compute)
    built = make_mesh(mesh, jax.devices()[:num_devices])
    loss = functools.partial(pretrain.loss, objective or pretrain.PretrainConfig())
    with jax.set_mesh(built):
        state, placed = init_state(make_init(build, tx), built, seed=0)
        first = jax.device_get(state.params)
        train_step = make_train_step(loss, graphdef(build), tx, schedule, seed=0, accumulate=accumulate,
                                     shardings=placed)
        history = []
        for step in range(steps):
            batch = batch_of(step)
            rows = batch["tokens"].shape[0]
            state, metrics = train_step(state, to_global(batch, slice(0, rows), built, rows))
            history.append({k: float(s) / max(float(w), 1e-9) for k, (s, w) in metrics.items()})
    return first, state, history
