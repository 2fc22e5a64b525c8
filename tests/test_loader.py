"""The loader: rows of each device, order, errors at their step, no thread left behind."""

import threading

import jax
import numpy as np
import pytest
from helpers import packed_batch

from lmjax.axes import MeshConfig, make_mesh
from lmjax.loader import Loader, local_rows


def rows_of(step, rows):
    return {k: v[rows] for k, v in packed_batch(step, rows=8).items()}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_global_batches_are_those_of_the_source(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    assert local_rows(mesh, 8) == slice(0, 8)
    with Loader(rows_of, mesh, 8, 3, 6) as loader:
        steps = []
        for step, batch in loader:
            steps.append(step)
            for name, x in packed_batch(step, rows=8).items():
                assert np.array_equal(np.asarray(batch[name]), x)
                assert batch[name].sharding.shard_shape(x.shape)[0] == 8 // (sizes[0] * sizes[1])
    assert steps == [3, 4, 5]


def test_an_error_arrives_at_its_step():
    def failing(step, rows):
        if step == 2:
            raise ValueError("shard 7 is gone")
        return rows_of(step, rows)
    seen = []
    with Loader(failing, make_mesh(MeshConfig()), 8, 0, 5) as loader:
        with pytest.raises(ValueError, match="shard 7"):
            for step, _ in loader:
                seen.append(step)
    assert seen == [0, 1]


def test_leaving_early_leaves_no_thread():
    with Loader(rows_of, make_mesh(MeshConfig()), 8, 0, 10**9) as loader:
        next(iter(loader))
    assert not any(t.name == "loader" for t in threading.enumerate())
    assert jax.device_count() == 8
