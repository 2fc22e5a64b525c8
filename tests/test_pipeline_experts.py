"""Layers with experts, split over stages: loss, gradients and what the routers count, against one device."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # python tests/test_pipeline_experts.py [NAME …] prints the table of docs/moe.md
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import conftest  # noqa: F401  (fake devices, before JAX looks for any)

    # XLA has a thread for each device that there is, and starts collectives that do not wait for each other at once,
    # each of which keeps a thread until the other devices have come: where a mesh has all devices, none may be left.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=48"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_pipeline import MODEL, difference, gradient, values

from lmjax.axes import MeshConfig
from lmjax.config import ComputeConfig, RunConfig, validate
from lmjax.models import MoEConfig
from lmjax.nn import moe, pipeline

LOSSES = dataclasses.replace(MODEL, num_layers=4, moe=MoEConfig(4, 2, 16))
BIAS = dataclasses.replace(LOSSES, moe=MoEConfig(4, 2, 16, 16, "sigmoid", balance=True))
CASES = {  # name -> (model, compute, sizes of the mesh, accumulate)
    "pipeline=2 x expert=2, balance": (BIAS, {}, {"pipeline": 2, "expert": 2}, 1),
    "pipeline=2": (LOSSES, {}, {"pipeline": 2}, 1),
    "pipeline=2, 2 repeats, balance": (BIAS, {"pipeline_repeats": 2}, {"pipeline": 2}, 1),
    "pipeline=4, remat=full": (LOSSES, {"remat": "full"}, {"pipeline": 4}, 1),
    "pipeline=2, remat=named, unrolled": (LOSSES, {"remat": "named", "layers": "unroll"}, {"pipeline": 2}, 1),
    "pipeline=2 x data=2, remat=dots": (LOSSES, {"remat": "dots"}, {"pipeline": 2, "data": 2}, 1),
    "pipeline=4 x fsdp=2, balance": (BIAS, {}, {"pipeline": 4, "fsdp": 2}, 1),
    "pipeline=2 x tensor=2": (LOSSES, {}, {"pipeline": 2, "tensor": 2}, 1),
    "pipeline=2 x fsdp=2 x expert=2": (LOSSES, {}, {"pipeline": 2, "fsdp": 2, "expert": 2}, 1),
    "pipeline=2 x tensor=2 x expert=2": (LOSSES, {}, {"pipeline": 2, "tensor": 2, "expert": 2}, 1),
    "pipeline=2 x context=2": (LOSSES, {"context": "ring"}, {"pipeline": 2, "context": 2}, 1),
    "pipeline=2, ragged_dot": (LOSSES, {"experts": "ragged"}, {"pipeline": 2}, 1),
}
QUICKLY = 1  # the others take minutes together


@functools.cache
def one_device(model):
    return values(gradient, model=model)


def error(name: str) -> float:
    model, compute, sizes, accumulate = CASES[name]
    found = values(functools.partial(gradient, accumulate=accumulate), model=model, compute=compute, **sizes)
    assert sum("router_" in key for key in found) >= 9  # a gradient, and two numbers of each of four metrics
    return difference(one_device(model), found)


@pytest.mark.parametrize("name", [name if i < QUICKLY else pytest.param(name, marks=pytest.mark.slow)
                                  for i, name in enumerate(CASES)])
def test_loss_gradients_and_counts_are_those_of_one_device(name):
    """Every gradient, the loss with those of the routers, and their metrics: 1e-5 of the largest, in float32. The
    balance is a product of two sums over the batch: were it taken in each micro-batch, it would be another number."""
    if math.prod(CASES[name][2].values()) < len(jax.devices()):
        assert error(name) < 1e-5
        return
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split("|")[-2]) < 1e-5


# ---- what the routers add up -------------------------------------------------------------------------------


def counts(graphdef, params, batch):
    return nnx.merge(graphdef, params).hidden_and_router(batch["tokens"], batch["segments"], batch["positions"],
                                                         batch["weights"])[1]


@pytest.mark.parametrize("wrong", [None, "with the bubble", "of the last micro-batch"])
def test_counts_of_a_layer_are_of_every_micro_batch_once(wrong, monkeypatch):
    """Against one device; and the known-wrong sums are seen: with what a stage computes in its bubble, whose weights
    are those of a real micro-batch; and of one micro-batch alone."""
    right = values(counts, model=LOSSES)
    if wrong == "with the bubble":
        monkeypatch.setattr(pipeline, "_all_ticks", lambda schedule, a: jnp.sum(a, axis=0).reshape(-1, *a.shape[3:]))
    elif wrong:
        monkeypatch.setattr(pipeline, "_all_ticks", lambda schedule, a: a[-1].reshape(-1, *a.shape[3:]))
    off = difference(right, values(counts, model=LOSSES, pipeline=2))
    assert off < 1e-6 if wrong is None else off > 0.1
    (chosen,) = (x for name, x in right.items() if name.endswith("0") or "counts" in name)
    assert chosen.shape == (4, 4) and (chosen.sum(axis=1) == chosen[0].sum()).all()


@pytest.mark.slow
def test_rows_that_cannot_be_cut_have_gradients_too():
    """Three rows are run whole, by every stage: nothing is mapped there, and a gradient goes through as ever."""
    def three(graphdef, params, batch):
        return gradient(graphdef, params, {name: x[:3] for name, x in batch.items()})[0]["blocks"]["mlp"]["router_DE"]
    model = dataclasses.replace(LOSSES, num_layers=2)
    assert difference(values(three, model=model), values(three, model=model, pipeline=2)) < 1e-5


def test_one_stage_is_not_mapped():
    """What is mapped over one thing is called on it, and has a gradient."""
    def f(x, more):
        seen.append((x.shape, more["y"].shape))
        return x * more["y"]
    x, seen = jnp.arange(6.0).reshape(1, 2, 3), []
    mapped = jax.vmap(moe._of_one_stage(f), in_axes=(0, {"y": None}))
    np.testing.assert_array_equal(mapped(x, {"y": jnp.float32(2)}), 2 * x)
    assert seen[-1] == ((2, 3), ())
    np.testing.assert_array_equal(jax.grad(lambda x: mapped(x, {"y": jnp.float32(3)}).sum())(x), jnp.full_like(x, 3))


def test_it_is_allowed():
    model = dataclasses.replace(LOSSES, max_seq_len=512)
    validate(RunConfig(batch_size=16, model=model, mesh=MeshConfig(2, pipeline=2, expert=2),
                       compute=ComputeConfig(pipeline_repeats=2)), 8)


if __name__ == "__main__":
    print("| mesh | largest difference |\n|---|---|", flush=True)
    for name in sys.argv[1:] or CASES:
        print(f"| {name} | {error(name):.1e} |", flush=True)
