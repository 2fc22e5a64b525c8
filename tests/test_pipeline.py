"""Layers split over the mesh: the schedule, the model's loss and gradients against one device, and what is refused."""

import dataclasses
import functools
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":  # python tests/test_pipeline.py prints the table of docs/scale.md
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import conftest  # noqa: F401  (eight fake devices, before JAX looks for any)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, TINY, packed_batch, random_model, write_config

from lmjax.axes import MESH_AXES, MeshConfig, abstract_mesh, make_mesh
from lmjax.config import ComputeConfig, OptimConfig, RunConfig, ignored, load_config, validate
from lmjax.errors import ConfigError
from lmjax.loader import to_global
from lmjax.losses.goldfish import GoldfishConfig
from lmjax.nn import pipeline
from lmjax.nn.pipeline import Schedule, choose_micro, pipeline_problems
from lmjax.objectives import pretrain
from lmjax.optim import make_optimizer
from lmjax.plan import describe, make_plan
from lmjax.records import read_metrics
from lmjax.state import shardings
from lmjax.step import gradient_sums
from lmjax.tree import named_leaves

MODEL = dataclasses.replace(TINY, num_layers=8)
GEMMA = dataclasses.replace(MODEL, positions="learned", windows=(0, 5), attention_softcap=20.0)
OBJECTIVE = pretrain.PretrainConfig(GoldfishConfig("hash", k=3, context=4), z_loss=1e-4)
ROWS, LENGTH = 8, 16


def on_mesh(f, model=MODEL, rows=ROWS, compute=None, **sizes):
    """(f, of a model and a batch, as a function of what a mesh holds of them; those; the mesh): layers in a scan."""
    graphdef, params = nnx.split(random_model(model, **({"layers": "scan"} | (compute or {}))))
    params = nnx.to_pure_dict(params)
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)), jax.devices()[:int(np.prod([1, *sizes.values()]))])
    params = jax.device_put(params, shardings(params, mesh))
    batch = to_global(packed_batch(3, rows, LENGTH), slice(0, rows), mesh, rows)
    return functools.partial(f, graphdef), (params, batch), mesh


def compiled(f, **settings):
    """(the compiled function, its arguments)"""
    f, args, mesh = on_mesh(f, **settings)
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*args).compile(compiler_options=QUICK), args


def gradient(graphdef, params, batch, accumulate=1, zero1=False):
    loss = functools.partial(pretrain.loss, OBJECTIVE)
    return gradient_sums(loss, graphdef, params, batch, jax.random.key(0), accumulate, zero1)


def hidden(graphdef, params, batch):
    return nnx.merge(graphdef, params).hidden(batch["tokens"], batch["segments"], batch["positions"])


def values(f, **settings):
    """{name: array} of what it gives."""
    run, args = compiled(f, **settings)
    return named_leaves(jax.device_get({"all": run(*args)}))


def difference(right: dict, found: dict) -> float:
    """The largest difference of any array, over the largest number there."""
    assert right.keys() == found.keys()
    return max(np.abs(found[name] - x).max() / max(np.abs(x).max(), 1e-3) for name, x in right.items())


@functools.cache
def one_device(model, rows=ROWS):
    return values(gradient, model=model, rows=rows)


# ---- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages,repeats,micro", [(2, 1, 2), (4, 1, 8), (4, 3, 8), (8, 2, 8), (1, 2, 3)])
def test_every_layer_sees_every_micro_batch_in_turn(stages, repeats, micro):
    """By brute force: each stage has each micro-batch once a repeat, one tick after the stage before it."""
    schedule, when = Schedule(stages, repeats, micro), {}
    for tick in range(schedule.ticks):
        for stage in range(stages):
            batch, repeat, busy = (int(x) for x in schedule.at(tick, stage))
            assert 0 <= batch < micro and 0 <= repeat < repeats
            if busy:
                assert when.setdefault((batch, repeat * stages + stage), tick) == tick, "the same twice"
    assert len(when) == micro * repeats * stages
    for (batch, chunk), tick in when.items():
        assert chunk == 0 or when[batch, chunk - 1] == tick - 1
    assert schedule.ticks * schedule.bubble == pytest.approx(stages - 1)


def test_how_many_micro_batches():
    assert choose_micro(0, 32, 4, 1)[0] == 16 and choose_micro(0, 32, 4, 2)[0] == 8
    assert choose_micro(0, 12, 4, 1)[0] == 12 and choose_micro(0, 24, 4, 1)[0] == 24  # 12 are too few
    assert choose_micro(8, 32, 4, 1) == (8, "set by compute.pipeline_microbatches")
    assert choose_micro(0, 6, 4, 1)[0] == choose_micro(6, 12, 4, 1)[0] == choose_micro(8, 12, 4, 1)[0] == 0
    assert not pipeline_problems(3, 5, 1, 1, 1, 0)


# ---- the model -------------------------------------------------------------------------------------------------------

CASES = {  # name -> (model, compute, sizes of the mesh, accumulate, zero1)
    "pipeline=4": (MODEL, {}, {"pipeline": 4}, 1, False),
    "pipeline=2 x tensor=2, windows, remat=full": (GEMMA, {"remat": "full"}, {"pipeline": 2, "tensor": 2}, 1, False),
    "pipeline=2": (MODEL, {}, {"pipeline": 2}, 1, False),
    "pipeline=8": (MODEL, {}, {"pipeline": 8}, 1, False),
    "pipeline=2, 2 repeats": (MODEL, {"pipeline_repeats": 2}, {"pipeline": 2}, 1, False),
    "pipeline=2, 2 repeats, windows": (GEMMA, {"pipeline_repeats": 2, "pipeline_microbatches": 2}, {"pipeline": 2}, 1,
                                       False),
    "pipeline=4, remat=dots": (MODEL, {"remat": "dots"}, {"pipeline": 4}, 1, False),
    "pipeline=4, remat=named": (MODEL, {"remat": "named"}, {"pipeline": 4}, 1, False),
    "pipeline=4, remat=offload": (MODEL, {"remat": "offload"}, {"pipeline": 4}, 1, False),
    "pipeline=4, unrolled": (MODEL, {"layers": "unroll"}, {"pipeline": 4}, 1, False),
    "pipeline=2 x data=2": (MODEL, {}, {"pipeline": 2, "data": 2}, 1, False),
    "pipeline=2 x data=2, zero1, accumulate=2": (MODEL, {}, {"pipeline": 2, "data": 2}, 2, True),
    "pipeline=4 x fsdp=2": (MODEL, {}, {"pipeline": 4, "fsdp": 2}, 1, False),
    "pipeline=2 x replica=4": (MODEL, {}, {"pipeline": 2, "replica": 4}, 1, False),
    "pipeline=2 x context=2, windows": (GEMMA, {"context": "ring"}, {"pipeline": 2, "context": 2}, 1, False),
    "pipeline=2 x fsdp=2 x tensor=2": (MODEL, {}, {"pipeline": 2, "fsdp": 2, "tensor": 2}, 1, False),
}
QUICKLY = 2  # the others take minutes together


def error(name: str) -> float:
    model, compute, sizes, accumulate, zero1 = CASES[name]
    f = functools.partial(gradient, accumulate=accumulate, zero1=zero1)
    return difference(one_device(model), values(f, model=model, compute=compute, **sizes))


@pytest.mark.parametrize("name", [name if i < QUICKLY else pytest.param(name, marks=pytest.mark.slow)
                                  for i, name in enumerate(CASES)])
def test_loss_and_gradients_are_those_of_one_device(name):
    """Every gradient, the loss and all metrics, of packed rows with goldfish: 1e-5 of the largest, in float32."""
    assert error(name) < 1e-5


@pytest.fixture(scope="module")
def one_device_hidden():
    return values(hidden, model=GEMMA)


@pytest.mark.parametrize("wrong", ["backwards", "out of order"])
def test_a_wrong_schedule_would_be_seen(one_device_hidden, wrong, monkeypatch):
    """The known-wrong pipelines: results handed to the stage before; every stage believing that it works on the
    micro-batch that has just entered."""
    if wrong == "backwards":
        monkeypatch.setattr(pipeline, "_to_next", lambda y, stages: jnp.roll(y, -1, axis=0))
    else:
        at = Schedule.at
        monkeypatch.setattr(Schedule, "at", lambda s, tick, stage: (at(s, tick, 0)[0], *at(s, tick, stage)[1:]))
    assert difference(one_device_hidden, values(hidden, model=GEMMA, pipeline=4)) > 1e-2


def test_rows_that_cannot_be_cut_are_run_whole(one_device_hidden):
    """As of an evaluation or a prompt: three rows."""
    right = {name: x[:3] for name, x in one_device_hidden.items()}
    def three(graphdef, params, batch):
        return hidden(graphdef, params, {name: x[:3] for name, x in batch.items()})
    assert difference(right, values(three, model=GEMMA, pipeline=2)) < 1e-5


# ---- memory ----------------------------------------------------------------------------------------------------------


def kept_by_ticks(**compute) -> list[tuple]:
    """Shapes of what the loop over ticks keeps for the backward pass."""
    f, args, mesh = on_mesh(gradient, model=dataclasses.replace(MODEL, d_ff=96), pipeline=2,
                            compute={"dtype": "bfloat16", "pipeline_microbatches": 8} | compute)
    with jax.set_mesh(mesh):
        found = []
        def look(jaxpr):
            for eqn in jaxpr.eqns:
                if eqn.primitive.name == "scan" and eqn.params["length"] >= 9:
                    found.extend(v.aval.shape for v in eqn.outvars[eqn.params["num_carry"]:])
                for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
                    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                        look(getattr(inner, "jaxpr", inner))
        look(jax.make_jaxpr(f)(*args).jaxpr)
    return found


@pytest.mark.parametrize("remat,repeats", [("none", 2), ("full", 1)])
def test_no_weight_is_kept_of_every_tick(remat, repeats):
    """Neither slices nor casts of them; and with remat=full, of the activations, one array a layer and tick."""
    kept = kept_by_ticks(remat=remat, pipeline_repeats=repeats)
    ticks, layers = 8 * repeats + 1, 4 // repeats
    assert kept and all(shape[0] == ticks for shape in kept)
    assert not any(shape[-2:] in ((32, 96), (96, 32), (8, 32)) for shape in kept)
    wide = [shape for shape in kept if shape[-1] == 32 and shape[-2] == LENGTH and shape[1] == layers]
    assert len(wide) == 1 if remat == "full" else len(wide) > 4


@pytest.mark.slow
def test_it_lowers_for_tpus_with_their_attention_kernel():
    """The kernel's own map over devices stands inside of the one over stages."""
    from lmjax.models import Decoder
    from lmjax.state import graphdef

    model = dataclasses.replace(MODEL, max_seq_len=128, head_dim=128)
    compute = ComputeConfig("bfloat16", "full", attention="splash", layers="scan")
    mesh = abstract_mesh(MeshConfig(4, 4, 2, pipeline=8), 256)
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.split(Decoder(model))[1]))
    params = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), params,
                          shardings(params, mesh))
    batch = {name: jax.ShapeDtypeStruct((512, 128), x.dtype) for name, x in packed_batch(0).items()}
    run = functools.partial(gradient, graphdef(functools.partial(Decoder, model, compute=compute)))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(params, batch).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and "collective_permute" in text


# ---- runs ------------------------------------------------------------------------------------------------------------


def losses(run):
    return {r["step"]: r["loss"] for r in read_metrics(run) if r["kind"] == "train"}


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """Train, evaluate and sample with stages; the last steps again without, from the checkpoint between."""
    from lmjax.train import train

    path, run = write_config(tmp_path), tmp_path / "runs" / "tiny"
    few = ["--steps=4", "--checkpoint.every=2", "--optim.warmup_steps=1"]
    train(load_config(path, [*few, "--mesh.data=4", "--mesh.pipeline=2"]))
    whole = losses(run)
    assert len(whole) == 4 and "2 stages of 1 layer; 2 micro-batches" in (run / "log.txt").read_text()
    shutil.rmtree(run / "checkpoints" / "4")
    train(load_config(path, [*few, "--mesh.data=2", "--mesh.fsdp=4", "--evals.every=0"]))
    again = losses(run)
    assert "mesh.pipeline was 2 and is 1" in (run / "log.txt").read_text()
    assert again.keys() == whole.keys() and all(again[n] == pytest.approx(whole[n], rel=2e-5) for n in whole)


def test_layers_and_their_moments_are_split():
    config = RunConfig(batch_size=32, model=dataclasses.replace(MODEL, max_seq_len=512),
                       mesh=MeshConfig(4, zero1=True, pipeline=4), compute=ComputeConfig(pipeline_repeats=2))
    mesh = abstract_mesh(config.mesh, 16)
    plan = make_plan(config, make_optimizer(OptimConfig(), 10)[0], mesh)
    placed = {name: tuple(s.spec) for name, s in named_leaves(shardings(plan.state, mesh, zero1=True)).items()}
    assert placed["params/blocks/attention/q_DNH"] == ("pipeline", None, None, None)
    assert placed["params/embed_VD"] == (None, None)
    (mu,) = (spec for name, spec in placed.items() if name.endswith("/mu/blocks/attention/q_DNH"))
    assert mu == ("pipeline", "data", None, None)
    text = describe(plan, config)
    assert "4 stages, each 2 times with 1 layer; 8 micro-batches" in text and "bubble 15.8%" in text


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes,words", [
    ({"mesh": MeshConfig(1, pipeline=8)}, ("mesh.pipeline=8", "= 8 chunks", "model.num_layers=4")),
    ({"mesh": MeshConfig(4, pipeline=2), "compute": ComputeConfig(pipeline_repeats=4)},
     ("compute.pipeline_repeats=4", "model.num_layers=4")),
    ({"mesh": MeshConfig(2, pipeline=4), "model": dataclasses.replace(GEMMA, num_layers=4, max_seq_len=512)},
     ("mesh.pipeline=4", "model.windows", "fewer stages")),
    ({"mesh": MeshConfig(2, pipeline=4), "compute": ComputeConfig(pipeline_microbatches=6)},
     ("compute.pipeline_microbatches=6", "multiple of mesh.pipeline=4")),
    ({"mesh": MeshConfig(4, pipeline=2), "compute": ComputeConfig(pipeline_microbatches=6)},
     ("compute.pipeline_microbatches=6", "the 4 rows", "batch_size")),
    ({"mesh": MeshConfig(2, pipeline=4), "batch_size": 4}, ("mesh.pipeline=4", "has 2 rows", "raise batch_size")),
    ({"compute": ComputeConfig(pipeline_repeats=0)}, ("compute.pipeline_repeats=0", "at least 1")),
    ({"mesh": MeshConfig(8, pipeline=0)}, ("mesh.pipeline=0",))])
def test_what_does_not_fit_names_field_value_and_fix(changes, words):
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig(**({"batch_size": 16} | changes)), 8)
    assert any(all(word in problem for word in words) for problem in caught.value.problems), caught.value.problems


def test_what_fits_and_what_has_no_effect():
    validate(RunConfig(batch_size=16, mesh=MeshConfig(2, pipeline=4)), 8)
    assert not ignored(RunConfig(mesh=MeshConfig(2, pipeline=4), compute=ComputeConfig(pipeline_microbatches=8)))
    said = ignored(RunConfig(compute=ComputeConfig(pipeline_microbatches=8, pipeline_repeats=2)))
    assert len(said) == 2 and all("no effect with mesh.pipeline=1" in line for line in said)


if __name__ == "__main__":
    assert "pipeline" in MESH_AXES
    print("| mesh | largest difference |\n|---|---|", flush=True)
    for name in CASES:
        print(f"| {name} | {error(name):.1e} |", flush=True)
