"""A mixture of experts on meshes of eight fake devices: the run of one device, experts split or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, TINY, run_steps
from test_step import _same

from lmjax.axes import MeshConfig, make_mesh
from lmjax.models import MoEConfig
from lmjax.nn import moe
from lmjax.objectives.pretrain import PretrainConfig
from lmjax.tree import named_leaves

MOE = dataclasses.replace(TINY, num_layers=1, moe=MoEConfig(8, 2, 16, balance=True))
LOSS = PretrainConfig(router_balance=0.1, router_z=0.01)


@pytest.fixture(scope="module")
def one_device():
    return run_steps(MeshConfig(1), 1, config=MOE, objective=LOSS)


QUICK_ONES = (dict(expert=8), dict(expert=2, fsdp=2, tensor=2))
MESHES = (*QUICK_ONES, dict(expert=2), dict(expert=4), dict(expert=2, data=2), dict(expert=2, fsdp=2),
          dict(expert=2, tensor=2), dict(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("sizes", [
    pytest.param(sizes, id="-".join(f"{a}{n}" for a, n in sizes.items()),
                 marks=[] if sizes in QUICK_ONES else pytest.mark.slow) for sizes in MESHES])
def test_every_mesh_gives_the_one_device_run(one_device, sizes):
    """Initial bits equal; losses and all metrics of three steps within 2e-5, weights within 3e-4 of an update."""
    mesh = MeshConfig(**{"data": 1, **sizes})
    first, state, history = run_steps(mesh, int(np.prod(list(sizes.values()))), config=MOE, objective=LOSS)
    for name, x in named_leaves(one_device[0]).items():
        assert np.array_equal(named_leaves(first)[name], x), f"initial {name} differs on {sizes}"
    for a, b in zip(one_device[2], history, strict=True):
        assert a.keys() == b.keys() and "router_busiest" in a
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-5), name
    _same(one_device[1].params, state.params, 3e-4)
    up = state.params["blocks"]["mlp"]["up_EDF"]
    E, D, F = (8 // sizes.get("expert", 1), 32 // sizes.get("fsdp", 1), 16 // sizes.get("tensor", 1))
    assert up.sharding.shard_shape(up.shape) == (1, E, D, F)


def problem(rows: int):
    rng = np.random.default_rng(0)
    x, router, up, gate, down = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (
        (rows, 4, 8), (8, 8), (8, 8, 16), (8, 8, 16), (8, 16, 8)))
    return x, router, up, gate, down


@jax.jit
def reference(x, router, up, gate, down):
    def f(*args):
        x, router, up, gate, down = args
        routed = moe.route(x, router, MoEConfig(8, 2))
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, routed.choice_BTA, routed.share_BTA))
        return moe.reference_experts(*flat, up, gate, down, "silu").reshape(x.shape)
    y, pull = jax.vjp(f, x, router, up, gate, down)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))


def on_mesh(mesh: MeshConfig, args, implementation: str):
    def f(x, router, up, gate, down):
        return moe.mixture(x, moe.route(x, router, MoEConfig(8, 2)), up, gate, down, "silu", implementation)

    def run(*args):
        y, pull = jax.vjp(f, *args)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    with jax.set_mesh(make_mesh(mesh)):
        compiled = jax.jit(run, compiler_options=QUICK).lower(*args).compile()
        return compiled(*args), compiled.as_text()


@pytest.mark.parametrize("rows, implementation", [(8, "ragged"), (3, "blocks"), (6, "blocks")])
def test_rows_that_the_mesh_does_not_divide(rows, implementation):
    """As in decoding; and XLA's own product under shard_map."""
    args = problem(rows)
    ours, _ = on_mesh(MeshConfig(2, 1, 2, expert=2), args, implementation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), ours, reference(*args))


def test_tokens_are_gathered_over_the_expert_axis_alone():
    """What the device that has an expert receives: rows of its group, never those of the whole batch."""
    _, text = on_mesh(MeshConfig(4, 1, 1, expert=2), problem(8), "blocks")
    gathers = [line for line in text.splitlines() if " all-gather(" in line or " reduce-scatter(" in line]
    assert len(gathers) > 3 and all("{{0,1},{2,3},{4,5},{6,7}}" in line for line in gathers), gathers


def test_an_expert_on_the_wrong_device_would_be_seen(monkeypatch):
    """The known-wrong variant: every device believes that it holds the first experts."""
    right = moe.experts
    monkeypatch.setattr(moe, "experts", lambda *args: right(*args[:-1], 0 * args[-1]))
    args = problem(8)
    ours, _ = on_mesh(MeshConfig(4, 1, 1, expert=2), args, "blocks")
    assert np.abs(ours[0] - reference(*args)[0]).max() > 0.1
