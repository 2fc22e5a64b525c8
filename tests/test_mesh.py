"""Mesh axes: how devices of slices and hosts are laid out, ZeRO-1, sums of gradients, bad sizes, a million tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, TINY, packed_batch, random_model

from lmjax.axes import MeshConfig, abstract_mesh, batch_sharding, count_slices, device_grid, make_mesh
from lmjax.checkpoint import abstract
from lmjax.config import ComputeConfig, OptimConfig, RunConfig, ignored, preset, validate
from lmjax.errors import ConfigError
from lmjax.loader import to_global
from lmjax.models import Decoder
from lmjax.objectives import pretrain
from lmjax.optim import make_optimizer
from lmjax.plan import describe, make_plan
from lmjax.state import fresh_state, graphdef, shardings
from lmjax.step import gradient_sums, make_train_step
from lmjax.tree import named_leaves

LOSS = functools.partial(pretrain.loss, pretrain.PretrainConfig())


# ---- slices and hosts ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """As much of a device as laying out a mesh looks at."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    client: object = None


def tpu_slices(count: int) -> list[FakeDevice]:
    """Slices of 2 x 4 chips, their devices shuffled."""
    devices = [FakeDevice(8 * s + 4 * y + x, s, 2 * s + y, (x, y, 0)) for s in range(count) for y in range(2)
               for x in range(4)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize("slices,replica", [(2, 2), (2, 4), (4, 4)])
def test_only_replica_crosses_slices(slices, replica):
    devices = tpu_slices(slices)
    assert count_slices(devices) == slices
    sizes = MeshConfig(-1, 2, 2, replica=replica).sizes(len(devices))
    grid = device_grid(sizes, devices)
    assert grid.shape == sizes and len(set(grid.flat)) == len(devices)
    for i, part in enumerate(grid):
        assert {d.slice_index for d in part.flat} == {i // (replica // slices)}


def test_an_axis_may_be_a_part_of_a_slices_dimension():
    """Two stages of v5p:4x8x8: each a box of half the chips."""
    chips = [FakeDevice(i, 0, i // 4, tuple(int(n) for n in np.unravel_index(i, (4, 8, 8))), device_kind="TPU v5")
             for i in range(256)]
    sizes = MeshConfig(1, -1, pipeline=2).sizes(256)
    grid = device_grid(sizes, chips)
    assert grid.shape == sizes and len(set(grid.flat)) == 256
    for stage in grid[0]:
        assert np.prod([len({d.coords[axis] for d in stage.flat}) for axis in range(3)]) == 128


def test_hosts_of_gpus_are_replicas_where_they_can_be():
    gpus = [FakeDevice(i, 0, i // 4, platform="gpu", device_kind="NVIDIA H100") for i in range(8)]
    assert count_slices(gpus) == 1
    grid = device_grid(MeshConfig(-1, 2, 2, replica=2).sizes(8), gpus[::-1])
    assert [{d.process_index for d in part.flat} for part in grid] == [{0}, {1}]


def test_a_replica_for_each_slice_or_an_error():
    (problem,) = MeshConfig(-1, 4).problems(16, slices=2)
    assert problem.startswith("mesh.replica=1") and "set mesh.replica=2" in problem
    assert MeshConfig(-1, replica=3).problems(24, slices=2)
    for good in (MeshConfig(-1, replica=4), MeshConfig(1, 8, replica=-1)):
        assert not good.problems(16, slices=2)
    with pytest.raises(ConfigError, match="mesh.replica=1"):
        validate(RunConfig(batch_size=16), 16, slices=2)


# ---- bad sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes,words", [
    ({"mesh": MeshConfig(context=4), "seq_len": 36}, ("mesh.context=4", "seq_len=36", "set seq_len=32")),
    ({"mesh": MeshConfig(context=8), "seq_len": 8}, ("mesh.context=8", "seq_len=8", "lower mesh.context")),
    ({"mesh": MeshConfig(context=2), "compute": ComputeConfig(attention="reference")},
     ("compute.attention='reference'", "mesh.context=2", "'auto'")),
    ({"mesh": MeshConfig(replica=0)}, ("mesh.replica=0",)), ({"mesh": MeshConfig(context=3)}, ("context=3",)),
    ({"compute": ComputeConfig(context="rings")}, ("compute.context='rings'", "ring"))])
def test_bad_sizes_name_field_value_and_fix(changes, words):
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig(**({"batch_size": 8} | changes)), 8)
    assert any(all(word in problem for word in words) for problem in caught.value.problems), caught.value.problems


def test_what_has_no_effect_is_told():
    said = ignored(RunConfig(mesh=MeshConfig(1, -1, zero1=True), compute=ComputeConfig(context="ring")))
    assert any("mesh.zero1" in line for line in said) and any("compute.context='ring'" in line for line in said)
    assert not ignored(RunConfig(mesh=MeshConfig(zero1=True, context=2), compute=ComputeConfig(context="ring")))


# ---- what lies where -----------------------------------------------------------------------------------


def test_batches_are_split_by_rows_and_tokens():
    mesh = make_mesh(MeshConfig(1, 2, 1, replica=2, context=2))
    batch = packed_batch(0, 8, 32) | {"odd": np.arange(8 * 5).reshape(8, 5)}
    for name, x in to_global(batch, slice(0, 8), mesh, 8).items():
        assert np.array_equal(x, batch[name])
        assert x.sharding.shard_shape(x.shape) == (2, 5 if name == "odd" else 16)
    assert batch_sharding(mesh, 1).shard_shape((8,)) == (2,)


def test_zero1_splits_moments_and_nothing_else():
    mesh = abstract_mesh(MeshConfig(4, 2, 2), 16)
    tx, _ = make_optimizer(OptimConfig(), 10)
    state = jax.eval_shape(lambda: fresh_state(nnx.to_pure_dict(nnx.split(Decoder(TINY))[1]), tx))
    def held(placed):
        return {name: s.shard_shape(named_leaves(state)[name].shape) for name, s in named_leaves(placed).items()}
    plain, split = held(shardings(state, mesh)), held(shardings(state, mesh, zero1=True))
    changed = {name for name in plain if plain[name] != split[name]}
    matrices = {name for name in plain if name.startswith("opt_state/") and ("_DNH" in name or "_VD" in name)}
    assert matrices <= changed and all(name.startswith("opt_state/") for name in changed)
    for name in changed:
        assert 4 * np.prod(split[name]) == np.prod(plain[name]), name
    config = RunConfig(model=dataclasses.replace(TINY, vocab_size=64), mesh=MeshConfig(4, 2, 2, zero1=True))
    text = describe(make_plan(config, tx, mesh), config)
    assert "split over data, ZeRO-1" in text


def first_steps(steps=2, accumulate=1, zero1=False, **sizes):
    """(state, metrics of each step) of a few steps of a one-layer model on a mesh."""
    tx, schedule = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=1), 10)
    graph, params = nnx.split(random_model(dataclasses.replace(TINY, num_layers=1)))
    state = fresh_state(nnx.to_pure_dict(params), tx)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:int(np.prod(list(sizes.values())))])
    placed = shardings(state, mesh, zero1)
    history = []
    with jax.set_mesh(mesh):
        state = jax.device_put(state, placed)
        step = make_train_step(LOSS, graph, tx, schedule, seed=0, accumulate=accumulate, shardings=placed, zero1=zero1)
        batches = [to_global(packed_batch(i), slice(0, 8), mesh, 8) for i in range(steps)]
        step = step.lower(state, batches[0]).compile(compiler_options=QUICK)
        for batch in batches:
            state, metrics = step(state, batch)
            history.append(metrics.fetch())
    return state, history


def test_zero1_gives_the_same_run():
    """Weights, moments and metrics, with two micro-batches a step, as without: within rounding."""
    state, history = first_steps(data=4, accumulate=2)
    split, again = first_steps(data=4, accumulate=2, zero1=True)
    for a, b in zip(history, again, strict=True):
        assert a.keys() == b.keys() and all(b[name] == pytest.approx(a[name], rel=2e-5) for name in a)
    for name, x in named_leaves(state).items():
        np.testing.assert_allclose(np.asarray(named_leaves(split)[name]), np.asarray(x), rtol=3e-4, atol=3e-5)
    mu = next(x for name, x in named_leaves(split).items() if name.endswith("/mu/embed_VD"))
    assert mu.sharding.shard_shape(mu.shape) == (64, 32 // 4)
    assert named_leaves(split)["params/embed_VD"].sharding.is_fully_replicated


def test_sums_over_micro_batches_lie_where_the_weights_do():
    """Each loop of the program that carries gradients carries parts of them, in float32."""
    graph, params = nnx.split(random_model(dataclasses.replace(TINY, num_layers=1)))
    mesh = make_mesh(MeshConfig(1, 8))
    with jax.set_mesh(mesh):
        params = jax.device_put(nnx.to_pure_dict(params), shardings(nnx.to_pure_dict(params), mesh))
        batch = to_global(packed_batch(0, 16), slice(0, 16), mesh, 16)
        run = jax.jit(lambda p, b: gradient_sums(LOSS, graph, p, b, jax.random.key(0), 2)[0])
        text = run.lower(params, batch).compile(compiler_options=QUICK).as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    assert any("f32[64,4]" in line for line in loops), "the sum for embed_VD, [64, 32], an eighth on each device"
    sums = [line for line in loops if "f32[64,4]" in line]
    assert not any("f32[1,32,64]" in line and "f32[1,4,64]" not in line for line in sums)


# ---- a million tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ring", "gather"])
def test_a_million_tokens_lower_for_256_devices(method):
    """Llama 3.2 1B with four of its layers on rows of 1,048,576 tokens, of which a device holds 32,768: no scores of
    [T, T] exist, and with the ring no device ever holds the keys of a row."""
    model = dataclasses.replace(preset("llama3.2-1b"), num_layers=4, max_seq_len=2**20, vocab_size=128_256)
    config = RunConfig(batch_size=8, seq_len=2**20, model=model,
                       compute=ComputeConfig("bfloat16", "full", layers="scan", context=method),
                       mesh=MeshConfig(1, 8, 1, context=32))
    validate(config, 256)
    mesh = abstract_mesh(config.mesh, 256)
    tx, schedule = make_optimizer(OptimConfig(), 1000)
    plan = make_plan(config, tx, mesh)
    placed = shardings(plan.state, mesh)
    rows = batch_sharding(mesh, 2, config.seq_len)
    batch = {field: jax.ShapeDtypeStruct((8, 2**20), np.float32 if field == "weights" else np.int32, sharding=rows)
             for field in ("tokens", "targets", "segments", "positions", "weights")}
    assert rows.shard_shape((8, 2**20)) == (1, 2**15)
    step = make_train_step(LOSS, graphdef(functools.partial(Decoder, model, compute=config.compute)), tx, schedule,
                           seed=0, accumulate=1, shardings=placed)
    with jax.sharding.use_abstract_mesh(mesh):
        text = step.trace(abstract(plan.state, placed), batch).lower(lowering_platforms=("tpu",)).as_text()
    assert "1048576x1048576" not in text and "32768x32768" not in text
    keys_of_a_row = "tensor<1x1048576x8x64xbf16>" in text  # one row a device: the arrays of all rows begin with 8
    gathers = text.count("stablehlo.all_gather")  # that of the output matrix, before the loss, is always there
    assert keys_of_a_row == (gathers > 1) == (method == "gather")
    assert "collective_permute" in text
