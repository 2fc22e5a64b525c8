"""Checkpoints: other meshes, other runs, damage of every kind, failing disks, what is kept."""

import json
import os
import random
import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import run_steps

from lmjax.axes import MeshConfig, make_mesh
from lmjax.checkpoint import CheckpointConfig, Checkpoints, abstract, differences, manifest
from lmjax.checkpoint.fingerprint import fingerprints, unequal_copies
from lmjax.checkpoint.manifest import damage
from lmjax.cli import main
from lmjax.errors import CheckpointError, NonFiniteError
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
    for sizes in ((2, 2, 2), (1, 1, 1), (1, 4, 1), (1, 2, 4), (1, 1, 1, 2, 4), (1, 2, 1, 2, 2)):
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


@pytest.mark.parametrize("kind", ["empty folder", "no meta", "garbled meta", "no manifest", "no arrays",
                                    "truncated arrays", "one bit of an array"])
def test_damaged_newest_falls_back_to_the_one_before(state, tmp_path, kind):
    save(tmp_path, state, steps=(1, 2))
    newest, told = tmp_path / "2", []
    if kind == "empty folder":
        (tmp_path / "99").mkdir()
        shutil.rmtree(newest)
    elif kind == "no meta":
        (newest / "meta.json").unlink()
    elif kind == "no manifest":
        (newest / "manifest.json").unlink()
    elif kind == "garbled meta":
        (newest / "meta.json").write_text("{")
    elif kind == "no arrays":
        shutil.rmtree(newest / "state")
    elif kind == "one bit of an array":
        flip(max(newest.rglob("d/*"), key=lambda path: path.stat().st_size), 12345)
    else:
        for file in newest.rglob("d/*"):
            file.write_bytes(file.read_bytes()[:10])
    with Checkpoints(tmp_path, CheckpointConfig(), warn=told.append) as checkpoints:
        restored, meta = checkpoints.restore_latest(like(state), META)
        assert meta["step"] == 1 and len(told) == 1 and "set aside" in told[0]
        checkpoints.save(99 if kind == "empty folder" else 2, restored, META)  # its step is free again
    assert any(p.name.startswith("damaged-") for p in tmp_path.iterdir()), "never deleted"


def test_nothing_readable_is_an_error_not_a_fresh_start(state, tmp_path):
    save(tmp_path, state)
    (tmp_path / "1" / "meta.json").write_text("{")
    for _ in range(2):  # also when the same command is given again
        with Checkpoints(tmp_path, CheckpointConfig(), warn=lambda _: None) as checkpoints:
            with pytest.raises(CheckpointError, match="none of its checkpoints can be read"):
                checkpoints.restore_latest(like(state), META)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_truncation_and_deletion_is_found(state, tmp_path):
    """1,000 of them, in every file, the manifest included."""
    save(tmp_path, state)
    folder, rng = tmp_path / "1", random.Random(0)
    assert not damage(folder, 1)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    missed = []
    for attempt in range(1000):
        path = files[attempt % len(files)]
        before, kind = path.read_bytes(), ("flip", "flip", "cut", "gone")[attempt // len(files) % 4]
        if not before and kind in ("flip", "cut"):
            kind = "gone"
        if kind == "flip":
            flip(path, rng.randrange(8 * len(before)))
        elif kind == "cut":
            path.write_bytes(before[:rng.randrange(len(before))])
        else:
            path.unlink()
        if not damage(folder, 1):
            missed.append((path.name, kind))
        path.write_bytes(before)
    assert not missed and not damage(folder, 1)
    flip(max(files, key=lambda path: path.stat().st_size), 999)
    assert not damage(folder, 1, hashes=False), "sizes alone would have missed it"


def test_arrays_are_held_to_their_fingerprints(state, tmp_path, monkeypatch):
    """What Orbax gives back is compared too, not only the files: here the reader is at fault."""
    save(tmp_path, state)
    original = ocp.Checkpointer.restore

    def wrong(self, *args, **kwargs):
        restored = original(self, *args, **kwargs)
        restored["params"]["embed_VD"] = restored["params"]["embed_VD"].at[3, 1].add(1e-7)
        return restored
    monkeypatch.setattr(ocp.Checkpointer, "restore", wrong)
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="embed_VD has fingerprint"):
            checkpoints.restore(1, like(state))


def test_fingerprints_do_not_depend_on_the_mesh_and_see_every_bit(state):
    whole = fingerprints(state)
    for sizes in ((2, 2, 2), (1, 4, 1)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
        assert fingerprints(jax.device_put(state, shardings(state, mesh))) == whole
    rng = np.random.default_rng(0)
    x = rng.normal(size=(33, 17)).astype(np.float32)
    right = fingerprints({"x": x})
    for _ in range(200):
        other = x.copy()
        other.view(np.uint32)[rng.integers(33), rng.integers(17)] ^= np.uint32(1 << rng.integers(32))
        assert fingerprints({"x": other})["x"][0] != right["x"][0]
    x[2, 3], x[4, 5] = np.nan, np.inf
    assert fingerprints({"x": x})["x"][1] == 2


def test_copies_that_differ_are_found():
    mesh = make_mesh(MeshConfig(4, 1, 1), jax.devices()[:4])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = [np.zeros(5, np.float32) for _ in range(4)]
    values[2][1] = 1e-30
    array = jax.make_array_from_single_device_arrays(
        (5,), whole, [jax.device_put(v, d) for v, d in zip(values, jax.devices(), strict=False)])
    with jax.set_mesh(mesh):
        found = unequal_copies({"w": array, "right": jax.device_put(np.ones(3), whole)})
    assert len(found) == 1 and found[0].startswith("w on") and "2" in found[0]


def test_a_state_that_is_not_finite_is_never_saved(state, tmp_path):
    bad = jax.tree.map(lambda x: x, state)
    bad.params["embed_VD"] = bad.params["embed_VD"].at[0, 0].set(np.nan)
    save(tmp_path, state)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(NonFiniteError, match=r"params/embed_VD \(1 elements\)"):
            checkpoints.save(2, bad, META)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_failed_saves_are_survived_so_many_times_in_a_row(state, tmp_path, monkeypatch):
    told = []

    def full(*_):
        raise OSError(28, "No space left on device")
    with Checkpoints(tmp_path, CheckpointConfig(failures=2), warn=told.append) as checkpoints:
        checkpoints.save(1, state, META)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr("lmjax.checkpoint.manifest.seal", full)
            checkpoints.save(2, state, META)
            checkpoints.save(3, state, META)
            assert "No space left" in told[0] and "step 1 and older ones are intact" in told[0]
            checkpoints.save(4, state, META)
        checkpoints.save(5, state, META)  # there is room again, just in time: two have failed in a row, then step 4
        told.clear()


def test_too_many_failed_saves_end_the_run(state, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("lmjax.checkpoint.manifest.seal", full)
    with pytest.raises(CheckpointError, match="No space left.*no earlier one exists"):
        with Checkpoints(tmp_path, CheckpointConfig(failures=1), warn=lambda _: None) as checkpoints:
            checkpoints.save(1, state, META)
            checkpoints.save(2, state, META)
            checkpoints.save(3, state, META)
            raise AssertionError("the third save did not tell that two have failed")
    assert not list(tmp_path.glob("[0-9]*"))


def test_a_save_is_left_out_while_an_earlier_one_is_slow(state, tmp_path, monkeypatch):
    told, go = [], threading.Event()
    original = manifest.seal

    def slow(*args):
        go.wait(30)
        original(*args)
    monkeypatch.setattr("lmjax.checkpoint.manifest.seal", slow)
    with Checkpoints(tmp_path, CheckpointConfig(patience=0.01), warn=told.append) as checkpoints:
        checkpoints.save(1, state, META)
        checkpoints.save(2, state, META)
        threading.Timer(0.3, go.set).start()
        checkpoints.save(3, state, META, last=True)
    assert len(told) == 1 and "step 2 is not saved: step 1 is still being written" in told[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"], "the last one is waited for"


def test_what_was_left_half_done_is_cleared_and_strange_names_are_let_be(state, tmp_path):
    save(tmp_path, state)
    for name in ("saving-7", "deleting-3", "2.bak", "notes", "007"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore_latest(like(state), META)[1]["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["007", "1", "2.bak", "notes"]


def test_the_last_good_one_goes_only_when_the_next_is_sealed(state, tmp_path, monkeypatch):
    save(tmp_path, state, keep=1)
    monkeypatch.setattr("lmjax.checkpoint.manifest.seal", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output")))
    with pytest.raises(CheckpointError, match="step 1 and older ones are intact"):
        save(tmp_path, state, steps=(2,), keep=1)
    assert not damage(tmp_path / "1", 1)


def test_missing_folder_for_reading(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoints(tmp_path / "nothing", CheckpointConfig(), read_only=True)


def test_problems():
    assert len(CheckpointConfig(0, 0, -1).problems()) == 3
    assert "multiple" in CheckpointConfig(every=5, keep_every=7).problems()[0]


def test_the_command_says_what_is_damaged(state, tmp_path, capsys):
    save(tmp_path / "run" / "checkpoints", state, steps=(1, 2))
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 0
    assert "step 2: verified" in capsys.readouterr().out
    flip(max((tmp_path / "run" / "checkpoints" / "2").rglob("d/*"), key=lambda path: path.stat().st_size), 100)
    assert main(["checkpoint", "list", str(tmp_path / "run")]) == 0, "sizes are right"
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 4
    out = capsys.readouterr().out
    assert "step 2: damaged: state/" in out and "step 1: verified" in out and "1 of 2 damaged" in out
    assert main(["checkpoint", "verify", str(tmp_path)]) == 4
    assert "has no checkpoints" in capsys.readouterr().err
