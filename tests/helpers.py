"""What several tests share: tiny models, made-up batches, and a train step on a mesh."""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from lmjax.axes import MeshConfig, make_mesh
from lmjax.loader import to_global
from lmjax.models import ComputeConfig, Decoder, DecoderConfig
from lmjax.objectives import pretrain
from lmjax.optim import OptimConfig, make_optimizer
from lmjax.state import graphdef, make_init, shardings
from lmjax.step import make_train_step
from lmjax.tree import map_with_name, named_leaves

ROOT = Path(__file__).resolve().parent.parent

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


QUICK = {"xla_backend_optimization_level": 0}  # LLVM's level, for programs whose cost is compiling them


def run_steps(mesh: MeshConfig, num_devices: int, *, steps: int = 3, accumulate: int = 1,
              objective: pretrain.PretrainConfig | None = None, config: DecoderConfig = TINY,
              compute: ComputeConfig | None = None, batch_of=packed_batch):
    """(initial params, final state, [metrics of each step]) of a few steps on a mesh, on the host."""
    tx, schedule = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=1), steps)
    build = functools.partial(Decoder, config, compute=compute)
    built = make_mesh(mesh, jax.devices()[:num_devices])
    loss = functools.partial(pretrain.loss, objective or pretrain.PretrainConfig())
    with jax.set_mesh(built):
        init = make_init(build, tx)
        placed = shardings(jax.eval_shape(init, jax.random.key(0)), built)
        state = jax.jit(init, out_shardings=placed, compiler_options=QUICK)(jax.random.key(0))
        first = jax.device_get(state.params)
        train_step = make_train_step(loss, graphdef(build), tx, schedule, seed=0, accumulate=accumulate,
                                     shardings=placed)
        history = []
        for step in range(steps):
            batch = batch_of(step)
            rows = batch["tokens"].shape[0]
            state, metrics = train_step(state, to_global(batch, slice(0, rows), built, rows))
            history.append(metrics.fetch())
    return first, state, history


def random_model(config: DecoderConfig, seed: int = 1, spread: float = 0.05, **compute) -> Decoder:
    """A Decoder whose weights are its own plus noise of NumPy's: far from any symmetry, and nothing compiles."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, compute=ComputeConfig(**compute))))
    rng = np.random.default_rng(seed)

    def fill(name, leaf):
        middle, fan_in = float("scale" in name), leaf.shape[1] if leaf.ndim > 2 else 1
        noise = rng.uniform(-1, 1, leaf.shape) * (fan_in ** -0.5 if leaf.ndim > 2 else spread)
        return jnp.asarray(middle + noise, jnp.float32)
    return nnx.merge(graph, map_with_name(fill, nnx.to_pure_dict(state)))


# ---- whole runs, through the command line ---------------------------------------------------------------

CONFIG = '''
from lmjax.config import *

def get_config():
    return RunConfig(
        name="tiny", run_root={root!r}, steps=40, batch_size=8, seq_len=32,
        model=DecoderConfig(num_layers=2, d_model=32, num_heads=4, max_seq_len=64),
        objective=PretrainConfig(GoldfishConfig("hash", k=3, context=4)),
        data=DataConfig(sources=(SourceConfig("text", {text!r}),), validation_fraction=0.2,
                        cache_dir={cache!r}, workers=1),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=5),
        evals=EvalConfig(every=20, batches=2, prompts=("the ",), sample=SampleConfig(max_new_tokens=8)),
        checkpoint=CheckpointConfig(every=4, keep=2), log=LogConfig(every=1),
    )
'''

WORDS = "the a model learns what it reads and forgets what it never saw again under some loss".split()


def write_corpus(folder: Path, documents: int = 40) -> None:
    """Small text files of real words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(documents):
        (folder / f"{i:03}.txt").write_text(" ".join(rng.choice(WORDS, rng.integers(20, 120))) + ".\n")


def write_config(folder: Path) -> Path:
    """A config file in `folder` whose corpus, cache and runs are below it too."""
    write_corpus(folder / "text")
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(root=str(folder / "runs"), text=str(folder / "text"),
                                  cache=str(folder / "data")))
    return path


def command(config: Path, *args: str, devices: int = 2, **kwargs) -> subprocess.Popen:
    """`lmjax train` in a process of its own, on fake CPU devices."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                        "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "lmjax", "train", str(config), *args], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=config.parent, **kwargs)


def state_hash(run: Path, step: int) -> str:
    """SHA-256 of every array of a checkpoint, in order of their names: weights and optimizer state."""
    arrays = ocp.PyTreeCheckpointer().restore((run / "checkpoints" / str(step) / "state").absolute())
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(arrays).items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()
