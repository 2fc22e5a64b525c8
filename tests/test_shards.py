"""Shards: verified by their hashes at a start, read without maps, and never trusted about where they lie."""

import dataclasses
import errno
import json
import os
import shutil
import threading

import numpy as np
import pytest

from lmjax.data import DataConfig, SourceConfig, prepare, prepare_all
from lmjax.data.manifest import load_manifest, manifest_fingerprint, read_shard
from lmjax.data.shards import Tokens
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.verify import verify_hashes
from lmjax.errors import DataError


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    (folder / "text").mkdir()
    for n in range(30):
        (folder / "text" / f"{n:02d}.txt").write_text(f"document {n}: " + "abc " * n)
    prepare(SourceConfig("text", str(folder / "text")), ByteTokenizer(), folder / "out", validation_fraction=0.1,
            workers=1, shard_bytes=300)
    return folder


@pytest.fixture
def folder(clean, tmp_path):
    """A copy of the prepared folder, to be damaged."""
    return shutil.copytree(clean / "out", tmp_path / "out")


def config(folder, **more):
    return DataConfig((SourceConfig("shards", str(folder)),), cache_dir=str(folder.parent / "cache"), **more)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---- hashes at the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokens", "offsets"])
def test_a_changed_shard_is_refused_by_hash_and_passes_by_size(folder, kind):
    corpus = prepare_all(config(folder))
    assert "have their sha256" in corpus.notes[0]
    file = folder / f"train-00001.{kind}.npy"
    flip(file)
    with pytest.raises(DataError, match=rf"{file.name}: its bytes have changed .*prepare"):
        prepare_all(config(folder))
    # The known-wrong check: sizes alone do not see it. That it was not looked for is told.
    by_size = prepare_all(config(folder, verify="sizes"))
    assert by_size.fingerprint == corpus.fingerprint and "sizes" in by_size.notes[0]


def test_every_damaged_shard_is_told_at_once(folder):
    for number in (0, 2):
        flip(folder / f"train-{number:05d}.tokens.npy")
    with pytest.raises(DataError) as caught:
        prepare_all(config(folder))
    assert len(caught.value.problems) == 2


def test_damage_below_the_cache_is_repaired_and_told(clean, tmp_path):
    cfg = DataConfig((SourceConfig("text", str(clean / "text")),), cache_dir=str(tmp_path), validation_fraction=0.1,
                     workers=1)
    first = prepare_all(cfg)
    assert first.notes == () and first.reused == (False,)
    file = first.folders[0] / "train-00000.tokens.npy"
    whole = file.read_bytes()
    for harm in (lambda: flip(file), lambda: file.write_bytes(whole[:-4]), file.unlink):
        harm()
        again = prepare_all(cfg)
        assert file.read_bytes() == whole and again.fingerprint == first.fingerprint and again.reused == (False,)
        assert len(again.notes) == 1 and file.name in again.notes[0] and "made anew" in again.notes[0]
    assert prepare_all(cfg).reused == (True,)


@pytest.mark.parametrize("hosts", [1, 2, 3, 50])
def test_hosts_together_hash_everything_once(folder, hosts):
    manifest = load_manifest(folder)
    shares = [verify_hashes([(folder, manifest)], (host, hosts)) for host in range(hosts)]
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    assert sum(share.shards for share in shares) == len(shards)
    assert sum(share.bytes for share in shares) == sum(shard.size + shard.offsets_size for shard in shards)
    flip(folder / "train-00002.tokens.npy")
    shares = [verify_hashes([(folder, manifest)], (host, hosts)) for host in range(hosts)]
    assert sum(len(share.damaged) for share in shares) == 1


def test_progress_is_told(folder, monkeypatch):
    monkeypatch.setattr("lmjax.data.verify._SECONDS", -1.0)
    lines = []
    prepare_all(config(folder), tell=lines.append)
    assert "100%" in lines[-1] and len(lines) == sum(
        len(split.shards) for split in load_manifest(folder).splits.values())


def test_an_unknown_policy_is_refused(folder):
    assert any("verify = 'none'" in problem for problem in config(folder, verify="none").problems())


# ---- reading ---------------------------------------------------------------------------------------------


def test_a_shard_cut_short_while_it_is_read_is_an_error_and_no_signal(folder):
    tokens = Tokens(folder)
    before = tokens.read(0, 50)[0]
    assert len(before) == 50
    file = folder / tokens.shards[0].file
    with file.open("r+b") as shard:
        shard.truncate(140)
    with pytest.raises(DataError, match=rf"{file.name}: ends at byte 140, .*whole when the run began"):
        tokens.read(0, 50)


def test_a_disk_that_fails_names_the_file(folder, monkeypatch):
    tokens = Tokens(folder)

    def failing(handle, size, at):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tokens.read(0, 5)
    monkeypatch.setattr("lmjax.data.shards._pread", failing)
    with pytest.raises(DataError, match="train-00000.tokens.npy: cannot be read any more .*Input/output error"):
        tokens.read(0, 5)


def test_reads_that_come_in_pieces_are_whole(clean, monkeypatch):
    expected = Tokens(clean / "out").read(0, 500)
    from lmjax.data import shards

    original = shards._pread
    monkeypatch.setattr(shards, "_pread", lambda handle, size, at: original(handle, min(size, 7), at))
    for found, wanted in zip(Tokens(clean / "out").read(0, 500), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    monkeypatch.setattr(shards, "_pread", shards._seek_and_read)
    for found, wanted in zip(Tokens(clean / "out").read(0, 500), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_threads_that_push_out_each_others_shards(clean, monkeypatch):
    monkeypatch.setattr("lmjax.data.shards._OPEN_SHARDS", 1)
    monkeypatch.setattr("lmjax.data.shards._KEPT_OFFSETS", 1)
    tokens = Tokens(clean / "out")
    whole = tokens.read(0, len(tokens))
    wrong = []

    def reader(seed):
        rng = np.random.default_rng(seed)
        for start in rng.integers(0, len(tokens) - 60, 150).tolist():
            for found, wanted in zip(tokens.read(start, start + 60), whole, strict=True):
                if not np.array_equal(found, wanted[start:start + 60]):
                    wrong.append(start)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_handles_are_closed(clean):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("needs /proc")
    tokens = Tokens(clean / "out")
    tokens.read(0, len(tokens))
    assert len(os.listdir("/proc/self/fd")) == before + len(tokens.shards)
    del tokens
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("array", [np.zeros(3, np.uint16), np.zeros(500, np.int64), np.zeros((1, 1), "O"),
                                   np.zeros((2, 2), np.uint16)])
def test_other_arrays_in_the_place_of_a_shard(folder, array):
    tokens = Tokens(folder)
    np.save(folder / tokens.shards[0].file, array, allow_pickle=True)
    with pytest.raises(DataError, match="the manifest says uint16"):
        tokens.read(0, 5)


def test_offsets_that_run_backwards(folder):
    tokens = Tokens(folder)
    path = folder / tokens.shards[0].offsets_file
    offsets = np.load(path)
    offsets[1] = offsets[2] + 1
    np.save(path, offsets)
    with pytest.raises(DataError, match="offsets do not run"):
        tokens.read(0, 5)


# ---- what a manifest may say --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../evil-00000.tokens.npy", "/etc/evil-00000.tokens.npy", "a/b-00000.tokens.npy",
                                  "..", "", "x-1.tokens.npy\n", "x-1.tokens.npy\0", "train-1.offsets.npy",
                                  "C:\\x-1.tokens.npy"])
def test_names_that_lead_out_of_the_folder_are_refused(folder, name):
    good = load_manifest(folder).splits["train"].shards[0]
    assert read_shard(dataclasses.asdict(good)) == good
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    value["splits"]["train"]["shards"][0]["file"] = name
    path.write_text(json.dumps(value))
    for use in (load_manifest, Tokens, lambda f: prepare_all(config(f))):
        with pytest.raises(DataError, match="manifest.json: damaged"):
            use(folder)


def test_a_manifest_changed_to_fit_its_damaged_shard_is_refused(folder):
    """Known wrong: whoever writes the new hash into the manifest, and stops there."""
    import hashlib

    flip(folder / "train-00000.tokens.npy")
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    shard = value["splits"]["train"]["shards"][0]
    shard["sha256"] = hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="changed by hand"):
        load_manifest(folder)
    splits = load_manifest_splits(value)
    value["fingerprint"] = manifest_fingerprint(value["tokenizer"]["fingerprint"], splits)
    path.write_text(json.dumps(value))
    assert load_manifest(folder).fingerprint == value["fingerprint"], "another corpus, which a run's meta tells apart"


def load_manifest_splits(value):
    from lmjax.data.manifest import Split

    return {name: Split(**{**split, "shards": tuple(read_shard(shard) for shard in split["shards"])})
            for name, split in value["splits"].items()}


@pytest.mark.parametrize("change", [
    {"dtype": "object"}, {"dtype": "float64"}, {"fingerprint": "x"}, {"splits": []}, {"skipped": {"empty": "x"}},
    {"tokenizer": {}}, {"source": {}}, {"extra": 1}, {"identity": 3},
    {"tokenizer": {"name": "x", "fingerprint": "y", "vocab_size": 10**30, "bos_id": 0, "eos_id": 0}}])
def test_damaged_manifests_are_refused(folder, change):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="manifest.json: damaged"):
        load_manifest(folder)
