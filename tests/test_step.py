"""The train step: meshes agree, accumulation is exact under ragged masks, it compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, packed_batch, run_steps

from lmjax.axes import MeshConfig, make_mesh
from lmjax.losses.goldfish import GoldfishConfig
from lmjax.models import ComputeConfig, Decoder
from lmjax.objectives import pretrain
from lmjax.objectives.pretrain import PretrainConfig
from lmjax.step import gradient_sums
from lmjax.tree import named_leaves

GOLDFISH = PretrainConfig(GoldfishConfig("hash", k=3, context=4), z_loss=1e-4)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2), (2, 4, 1), (1, 1, 4)]


@pytest.fixture(scope="module")
def one_device():
    return run_steps(MeshConfig(1, 1, 1), 1, objective=GOLDFISH)


def _same(a, b, rtol):
    for name, x in named_leaves(a).items():
        np.testing.assert_allclose(np.asarray(named_leaves(b)[name]), np.asarray(x), rtol=rtol, atol=rtol,
                                   err_msg=name)


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_one_device_run(one_device, sizes):
    first, state, history = run_steps(MeshConfig(*sizes), int(np.prod(sizes)), objective=GOLDFISH)
    for name, x in named_leaves(one_device[0]).items():
        assert np.array_equal(named_leaves(first)[name], x), f"initial {name} differs on {sizes}"
    for a, b in zip(one_device[2], history, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-5), name
    _same(one_device[1].params, state.params, 3e-4)


def test_weights_and_moments_are_split(one_device):
    _, state, _ = run_steps(MeshConfig(1, 4, 2), 8, steps=1)
    leaves = named_leaves(state)
    split = [n for n, x in leaves.items() if x.ndim > 2 and not x.sharding.is_fully_replicated]
    assert any(n.startswith("params/") for n in split) and any("/mu/" in n for n in split)
    q = leaves["params/blocks/attention/q_DNH"]
    assert q.sharding.shard_shape(q.shape) == (2, 32 // 4, 4 // 2, 8)
    assert leaves["params/final_norm/scale_D"].sharding.is_fully_replicated


@pytest.mark.parametrize("accumulate,sizes", [(2, (1, 1, 1)), (4, (1, 1, 1)), (2, (2, 2, 1))])
def test_accumulation_equals_the_big_batch(one_device, accumulate, sizes):
    _, state, history = run_steps(MeshConfig(*sizes), int(np.prod(sizes)), accumulate=accumulate,
                                  objective=GOLDFISH)
    for a, b in zip(one_device[2], history, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-5), name
    _same(one_device[1].params, state.params, 3e-4)


def test_mean_of_means_would_be_seen():
    """The known-wrong accumulation: dividing each micro-batch by its own weight. Same data, another result."""
    from flax import nnx

    model_def, params = nnx.split(Decoder(TINY))
    params = nnx.to_pure_dict(params)
    batch = jax.tree.map(np.asarray, packed_batch(0))
    loss = lambda model, batch, key: pretrain.loss(PretrainConfig(), model, batch, key)  # noqa: E731
    sums = jax.jit(lambda batch: gradient_sums(loss, model_def, params, batch, jax.random.key(0)))
    grads, weight, _ = sums(batch)
    right = np.asarray(grads["embed_VD"]) / float(weight)
    halves = [{k: v[a::2] for k, v in batch.items()} for a in range(2)]
    parts = [sums(half) for half in halves]
    summed = sum(np.asarray(p[0]["embed_VD"]) for p in parts) / sum(float(p[1]) for p in parts)
    means = sum(np.asarray(p[0]["embed_VD"]) / float(p[1]) for p in parts) / 2
    np.testing.assert_allclose(summed, right, rtol=1e-4, atol=1e-6)
    assert np.abs(means - right).max() > 1e-4


def test_all_weights_zero_is_no_gradient_and_no_nan():
    def silent(step):
        batch = packed_batch(step)
        return batch | {"weights": np.zeros_like(batch["weights"])}
    _, state, history = run_steps(MeshConfig(1, 1, 1), 1, steps=2, batch_of=silent)
    assert history[0]["weight"] == 0 and history[0]["grad_norm"] == 0
    assert all(np.isfinite(x).all() for x in named_leaves(jax.device_get(state)).values())


def test_step_compiles_once_and_is_deterministic():
    from lmjax import step as module

    traced = []
    original = module.gradient_sums
    module.gradient_sums = lambda *args, **kw: (traced.append(1), original(*args, **kw))[1]
    try:
        a = run_steps(MeshConfig(2, 2, 1), 4, steps=5)
    finally:
        module.gradient_sums = original
    assert len(traced) == 1, f"traced {len(traced)} times in 5 steps"
    b = run_steps(MeshConfig(2, 2, 1), 4, steps=5)
    assert a[2] == b[2]
    for name, x in named_leaves(jax.device_get(a[1])).items():
        assert np.array_equal(x, named_leaves(jax.device_get(b[1]))[name]), name


def test_compute_options_change_nothing_but_rounding(one_device):
    for compute in (ComputeConfig(remat="full"), ComputeConfig(remat="dots"),
                    ComputeConfig(attention="blockwise")):
        _, _, history = run_steps(MeshConfig(1, 1, 1), 1, objective=GOLDFISH, compute=compute)
        assert history[-1]["loss"] == pytest.approx(one_device[2][-1]["loss"], rel=2e-5), compute
    _, _, history = run_steps(MeshConfig(1, 1, 1), 1, objective=GOLDFISH, compute=ComputeConfig("bfloat16"))
    assert history[-1]["loss"] == pytest.approx(one_device[2][-1]["loss"], rel=2e-2)
    assert history[-1]["loss"] != one_device[2][-1]["loss"]


def test_an_option_that_xla_does_not_know_is_left_out():
    from lmjax.train.compiling import start_compiling

    said = []
    log = type("Log", (), {"say": lambda self, text: said.append(text)})()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    x = jax.device_put(jnp.ones(3), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    compiled = start_compiling(jax.jit(lambda x, y: x + y), x, x, {"xla_no_such_option": True})(log)
    assert compiled(x, x)[0] == 2 and "xla_no_such_option" in said[0]
