"""The train step of large models lowers for TPU and GPU meshes of 256 devices, with no such device here."""

import functools
from pathlib import Path

import jax
import pytest

from lmjax.axes import abstract_mesh
from lmjax.checkpoint import abstract
from lmjax.config import ComputeConfig, MeshConfig, OptimConfig, RunConfig, load_config, preset
from lmjax.models import Decoder
from lmjax.objectives import pretrain
from lmjax.optim import make_optimizer
from lmjax.plan import make_batch, make_plan
from lmjax.state import graphdef, shardings
from lmjax.step import make_train_step

ROOT = Path(__file__).resolve().parent.parent
BFLOAT16 = ComputeConfig("bfloat16", "full")
RUNS = {
    "llama3-8b": RunConfig(batch_size=256, seq_len=2048, model=preset("llama3-8b"), compute=BFLOAT16,
                           mesh=MeshConfig(-1, 64, 1)),
    "llama2-70b": RunConfig(batch_size=64, seq_len=2048, model=preset("llama2-70b"), compute=BFLOAT16, accumulate=2,
                            mesh=MeshConfig(1, 32, 8)),
    "gemma3-1b": RunConfig(batch_size=256, seq_len=2048, model=preset("gemma3-1b"), compute=BFLOAT16,
                           mesh=MeshConfig(-1, 16, 1)),
    "mixtral-8x7b": RunConfig(batch_size=256, seq_len=2048, model=preset("mixtral-8x7b"),
                              compute=ComputeConfig("bfloat16", "full", experts="ragged"),
                              mesh=MeshConfig(-1, 8, 4, expert=8)),
    "quickstart": load_config(ROOT / "configs" / "quickstart.py", [
        "--model.vocab_size=2048", "--batch_size=256", "--objective.goldfish.strategy=text_hash",  # all that a batch
        "--objective.goldfish.k_final=8", "--objective.goldfish.anneal_steps=100"]),               # can have
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", RUNS)
def test_lowers_for_256_devices(name, platform):
    config = RUNS[name]
    mesh = abstract_mesh(config.mesh, 256)
    tx, schedule = make_optimizer(OptimConfig(), 1000)
    plan = make_plan(config, tx, mesh)
    placed = shardings(plan.state, mesh)
    step = make_train_step(functools.partial(pretrain.loss, config.objective),
                           graphdef(functools.partial(Decoder, config.model, compute=config.compute)), tx, schedule,
                           seed=0, accumulate=config.micro_batches(256, platform)[0], shardings=placed)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = step.trace(abstract(plan.state, placed), make_batch(config, mesh))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text and "sdy.sharding" in text
    # 80 layers in less text than Gemma 3's period of six windows: layers are scanned, depth adds nothing.
    assert len(text) < (5_000_000 if name == "gemma3-1b" else 2_000_000)
