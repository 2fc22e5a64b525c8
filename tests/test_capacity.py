"""What a decoder memorises of random tokens: counts, bits and fits against formulas, and a training that must reach
what can be known."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax import cli
from lmjax.models import Decoder
from lmjax.reproduce import capacity, levels, seeds


@pytest.mark.parametrize("shape, published", [((1, 32), 80_352), ((2, 128), 667_136), ((4, 128), 1_063_680)])
def test_parameters_are_those_of_the_paper(shape, published):
    shape = seeds.Shape(*shape, 4, 2048, 64)
    model = jax.eval_shape(lambda: nnx.split(Decoder(shape.model, 0))[1])
    assert shape.num_params == published == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_bits_are_those_of_a_float64_forward_pass():
    """An untrained model memorises nothing; the bits are H minus the code length, computed here a second time."""
    cell = seeds.Cell(capacity.SMALL, 20, 10, seeds=2)
    training, data = seeds.Training(cell, 10), capacity._data(cell)
    params, _ = training.start(np.arange(2))
    graphdef = nnx.split(Decoder(cell.shape.model, 0))[0]
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    for seed, nats in enumerate(np.asarray(training.nats(params, data))):
        pick = jax.tree.map(lambda a, seed=seed: a[seed], (params, data))
        targets = np.asarray(pick[1]["targets"])
        tokens = np.concatenate([np.zeros((20, 1), int), targets[:, :-1]], 1)
        logits = np.asarray(forward(pick[0], tokens), np.float64)
        picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        expected = np.sum(np.log(np.exp(logits).sum(-1)) - picked)
        assert nats == pytest.approx(expected, rel=1e-5)
        assert abs(nats - 20 * 16 * math.log(256)) < 0.02 * nats
    assert not np.array_equal(data["targets"][0], data["targets"][1])


def test_all_that_can_be_known_is_memorised_and_nothing_beyond():
    """Which of N random sequences comes next costs log2 N bits each, so 100 % is (1 - log2 N / bits) of the data."""
    cell, = capacity.SIZES["test"]
    found = capacity.train(cell)
    known = cell.offered * cell.ceiling
    assert np.all(found["bits"] > 0.97 * known) and np.all(found["bits"] <= known * 1.0001)
    assert np.all(found["bits_bf16_weights"] <= found["bits"] + 1e-3)


def test_batches_of_an_epoch_are_every_sequence_once():
    data = {"tokens": jax.numpy.arange(12)[:, None]}
    rows = [np.asarray(seeds.batch_of(data, jax.numpy.int32(step), 4, jax.random.key(0))["tokens"])[:, 0]
            for step in range(6)]
    assert sorted(np.concatenate(rows[:3])) == sorted(np.concatenate(rows[3:])) == list(range(12))
    assert not np.array_equal(rows[0], rows[3])


def test_fits_find_what_points_were_made_from():
    offered, ceiling = np.array([1.0, 2.0, 4.0, 6.0]), np.full(4, 0.95)
    assert levels.level(offered, ceiling, np.minimum(offered * 0.95, 3.2)) == pytest.approx(3.2, abs=1e-4)
    steps = np.array([1000, 2000, 4000, 8000])
    assert levels.with_more_steps(steps, 3.6 - 20 * steps**-0.4, 1e6) == pytest.approx(3.6 - 20 * 1e6**-0.4, abs=1e-2)
    mean, half = levels.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302652729911275 / math.sqrt(3)))  # t(0.975, 2) from a table


def test_a_run_goes_on_where_it_was_ended(tmp_path, monkeypatch, capsys):
    calls = []

    def train(cell, tell):
        calls.append(cell.sequences)
        return {"bits": np.array([1.0, 1.2]), "bits_bf16_weights": np.array([0.9, 1.0])}

    monkeypatch.setattr(capacity, "train", train)
    monkeypatch.setitem(capacity.SIZES, "test", capacity._grid(capacity.SMALL, (1.0, 2.0, 3.0), (10,), seeds=2))
    command = ["reproduce", "capacity", "--size", "test", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    path = tmp_path / "capacity-test.jsonl"
    text = path.read_text()
    path.write_text(text[: text.rindex('"seconds"')])  # killed while the last line was written
    assert cli.main(command) == 0
    assert calls == [55, 110, 165, 165]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3
    assert "1.10 ± 1.27" in capsys.readouterr().out
    svg = Path(tmp_path / "capacity.svg").read_text()
    assert svg.count("<circle") == 3 * 2 + 1
    path.write_text("{}x\n")
    assert cli.main(command) == 3 and "move the file away" in capsys.readouterr().err
