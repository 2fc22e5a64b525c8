"""Checkpoints: other meshes, other runs, damaged and foreign folders, what is kept."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import run_steps

from lmjax.axes import MeshConfig, make_mesh
from lmjax.checkpoint import CheckpointConfig, Checkpoints, abstract, differences
from lmjax.errors import CheckpointError
from lmjax.state import shardings
from lmjax.tree import named_leaves

META = {"config": {"model": {"d_model": 32}, "seed": 0, "mesh": {"fsdp": 2}}, "versions": {"jax": "1"},
        "corpus": {"fingerprint": "abc"}}


@pytest.fixture(scope="module")
def state():
    return run_steps(MeshConfig(2, 2, 2), 8, steps=1)[1]


def like(state, sizes=(1, 1, 1)):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
    return abstract(state, shardings(state, mesh))


def save(folder, state, steps=(1,), **config):
    with Checkpoints(folder, CheckpointConfig(**config)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state, META)


def test_restores_on_any_mesh_bit_for_bit(state, tmp_path):
    save(tmp_path, state)
    right = named_leaves(jax.device_get(state))
    for sizes in ((2, 2, 2), (1, 1, 1), (1, 4, 1), (1, 2, 4)):
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            restored, meta = checkpoints.restore_latest(like(state, sizes), META)
        assert meta["step"] == 1
        leaves = named_leaves(restored)
        assert leaves.keys() == right.keys()
        for name, x in leaves.items():
            assert np.array_equal(np.asarray(x), right[name]), name
            assert len(x.sharding.device_set) == np.prod(sizes)


def test_keeps_the_newest_and_every_nth(state, tmp_path):
    save(tmp_path, state, steps=range(1, 8), keep=2, keep_every=3)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [3, 6, 7]


def test_nothing_to_restore(state, tmp_path):
    with Checkpoints(tmp_path / "new", CheckpointConfig()) as checkpoints:
        assert checkpoints.restore_latest(like(state), META) is None


@pytest.mark.parametrize("path,value,named", [
    (("config", "model", "d_model"), 64, "model.d_model: the checkpoint has 32, this run has 64"),
    (("config", "seed"), 1, "seed: the checkpoint has 0, this run has 1"),
    (("corpus", "fingerprint"), "xyz", "corpus.fingerprint: the checkpoint has 'abc', this run has 'xyz'"),
])
def test_another_run_is_refused_with_field_and_both_values(state, tmp_path, path, value, named):
    save(tmp_path, state)
    wanted = json.loads(json.dumps(META))
    node = wanted
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore_latest(like(state), wanted)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_differences():
    base = {"config": {"model": {"windows": [0]}, "data": {"sources": [{"path": "a"}]}, "steps": 1},
            "corpus": {"fingerprint": "x"}, "versions": {"jax": "1"}}
    moved = json.loads(json.dumps(base))
    moved["config"]["data"]["sources"][0]["path"] = "b"
    moved["config"]["steps"], moved["versions"]["jax"] = 2, "2"
    assert not differences(base, moved), "the same corpus by another name, more steps, another version"
    moved["corpus"]["fingerprint"] = "y"
    assert len(differences(base, moved)) == 2
    assert differences(base, base | {"config": base["config"] | {"model": {"windows": [0, 4]}}})


def test_other_shapes_and_dtypes_are_refused(state, tmp_path):
    save(tmp_path, state)
    wider = like(state)
    embed = wider.params["embed_VD"]
    wider.params["embed_VD"] = jax.ShapeDtypeStruct((99, 32), embed.dtype, sharding=embed.sharding)
    other = like(state)
    other.params["embed_VD"] = jax.ShapeDtypeStruct(embed.shape, jax.numpy.bfloat16, sharding=embed.sharding)
    more = like(state)
    more.params["extra_DF"] = embed
    for wrong, word in ((wider, r"embed_VD is float32\[64, 32\].*\[99, 32\]"), (other, "bfloat16"),
                        (more, "has no array params/extra_DF")):
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            with pytest.raises(CheckpointError, match=word):
                checkpoints.restore_latest(wrong, META)


@pytest.mark.parametrize("damage", ["empty folder", "no meta", "garbled meta", "no arrays", "truncated arrays"])
def test_damaged_newest_falls_back_to_the_one_before(state, tmp_path, damage):
    save(tmp_path, state, steps=(1, 2))
    newest, told = tmp_path / "2", []
    if damage == "empty folder":
        (tmp_path / "99").mkdir()
        shutil.rmtree(newest)
    elif damage == "no meta":
        shutil.rmtree(newest / "meta")
    elif damage == "garbled meta":
        (newest / "meta" / "metadata").write_text("{")
    elif damage == "no arrays":
        shutil.rmtree(newest / "state")
    else:
        for file in newest.rglob("d/*"):
            file.write_bytes(file.read_bytes()[:10])
    with Checkpoints(tmp_path, CheckpointConfig(), warn=told.append) as checkpoints:
        restored, meta = checkpoints.restore_latest(like(state), META)
        assert meta["step"] == 1 and len(told) == 1 and "set aside" in told[0]
        checkpoints.save(99 if damage == "empty folder" else 2, restored, META)  # its step is free again
    assert any(p.name.startswith("damaged-") for p in tmp_path.iterdir()), "never deleted"


def test_nothing_readable_is_an_error_not_a_fresh_start(state, tmp_path):
    save(tmp_path, state)
    (tmp_path / "1" / "meta" / "metadata").write_text("{")
    for _ in range(2):  # also when the same command is given again
        with Checkpoints(tmp_path, CheckpointConfig(), warn=lambda _: None) as checkpoints:
            with pytest.raises(CheckpointError, match="none of its checkpoints can be read"):
                checkpoints.restore_latest(like(state), META)


def test_missing_folder_for_reading(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoints(tmp_path / "nothing", CheckpointConfig(), read_only=True)


def test_problems():
    assert len(CheckpointConfig(0, 0, -1).problems()) == 3
    assert "multiple" in CheckpointConfig(every=5, keep_every=7).problems()[0]
