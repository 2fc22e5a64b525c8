"""Going back, looking for a cause, and running a step twice."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import TINY, packed_batch, random_model

from lmjax.errors import CheckpointError, CorruptionError
from lmjax.objectives import pretrain
from lmjax.train.repair import Lineage, cause, rechecked
from lmjax.tree import named_leaves


def test_lineage_survives_and_adds_up(tmp_path):
    lineage = Lineage(tmp_path)
    assert [lineage.batch(s) for s in (0, 7)] == [0, 7]
    lineage.jump(4, 10, writes=True)
    lineage.jump(6, 100, writes=True)
    assert [Lineage(tmp_path).batch(s) for s in (3, 4, 5, 6, 7)] == [3, 14, 15, 116, 117]
    assert Lineage(tmp_path).ranges(8) == [(0, 4), (14, 16), (116, 118)] and Lineage(tmp_path).ranges(4) == [(0, 4)]
    Lineage(tmp_path).jump(8, 1, writes=False)
    assert Lineage(tmp_path).batch(9) == 119, "only the first process writes"


@pytest.mark.parametrize("text", ["{", "[]", '{"jumps": [["x", 1]]}', '{"jumps": [[1]]}', '{"jumps": 3}'])
def test_a_garbled_lineage_is_never_guessed(tmp_path, text):
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(CheckpointError, match="lineage.json: cannot be read"):
        Lineage(tmp_path)


def step_that_lies(lies):
    """x -> 2 x, but the n-th call adds lies[n]."""
    calls = iter(lies)
    double = jax.jit(lambda state, by: jax.tree.map(lambda x: 2 * x + by, state), donate_argnums=0)
    return lambda state, batch: (double(state, next(calls)), {"n": batch})


@pytest.mark.parametrize("lies,told", [((0, 0, 0), 0), ((1, 0, 0), 1), ((0, 1, 0), 1)])
def test_two_of_three_agree(lies, told):
    said = []
    state, metrics = rechecked(step_that_lies(lies), {"w": jnp.arange(5.0)}, 7, 3, said.append)
    assert state["w"].tolist() == [0, 2, 4, 6, 8] and metrics == {"n": 7}
    assert len(said) == told and all("transient" in text for text in said)


def test_three_results_end_the_run():
    with pytest.raises(CorruptionError, match="step 3: run three times, it gave three results"):
        rechecked(step_that_lies((0, 1, 2)), {"w": jnp.arange(5.0)}, None, 3, print)


def test_the_cause_is_named_with_its_layers():
    model = random_model(TINY)
    from flax import nnx

    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    loss = functools.partial(pretrain.loss, pretrain.PretrainConfig())
    placed = jax.tree.map(lambda x: x.sharding, params)
    batch = {name: jnp.asarray(x) for name, x in packed_batch(0).items()}
    assert "every gradient is finite" in cause(loss, graph, params, batch, 0, 0, placed)

    def overflowing(model, batch, key):
        total, weight, metrics = loss(model, batch, key)
        return total * jnp.float32(3e38) * 10, weight, metrics
    told = cause(overflowing, graph, params, batch, 0, 0, placed)
    assert "gradients that are not finite" in told and "embed_VD" in told, told
    name = next(n for n in named_leaves(params) if n.endswith("q_DNH"))
    params["blocks"]["attention"]["q_DNH"] = params["blocks"]["attention"]["q_DNH"].at[1, 0, 0, 0].set(jnp.nan)
    assert cause(loss, graph, params, batch, 0, 0, placed) == (
        f"weights that are not finite: {name} (layers 1 of {TINY.num_layers})")
