"""Prepared folders: the same bytes whatever happens on the way, and damage that is named and repaired."""

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lmjax.data import commands, workers
from lmjax.data.manifest import load_manifest
from lmjax.data.prepare import held_out, holdout_threshold, prepare, training_documents
from lmjax.data.shards import Tokens
from lmjax.data.sources import SourceConfig, documents
from lmjax.data.tokenizers import ByteTokenizer, train_bpe
from lmjax.errors import ConfigError, DataError

BYTES = ByteTokenizer()
SMALL = {"validation_fraction": 0.2, "shard_bytes": 300}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"document {n} " + "wörd " * (n % 17)}) for n in range(60)]
    (folder / "x.jsonl").write_text("\n".join([*lines, '{"text": ""}', lines[7]]))
    return SourceConfig("jsonl", str(folder))


@pytest.fixture(scope="module")
def clean(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("clean") / "out"
    prepare(source, BYTES, out, workers=1, **SMALL)
    return out


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
            if path.name != ".lock"}


def test_the_folder_holds_every_document_once(source, clean):
    manifest = load_manifest(clean)
    texts = [document.text for document in documents(source, Counter())]
    found = []
    for name, split in manifest.splits.items():
        assert len(split.shards) > 1
        for shard in split.shards:
            tokens = np.load(clean / shard.file, mmap_mode="r", allow_pickle=False)
            offsets = np.load(clean / shard.offsets_file, mmap_mode="r", allow_pickle=False)
            assert tokens.dtype == np.uint16 and offsets.dtype == np.int64
            for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
                assert tokens[begin] == BYTES.bos_id and tokens[end - 1] == BYTES.eos_id
                found.append((name, BYTES.decode(tokens[begin:end])))
    assert sorted(text for _, text in found) == sorted(texts)
    assert len({name for name, text in found if text == texts[7]}) == 1  # its copy is on the same side
    assert manifest.documents == len(texts) == 61 and manifest.skipped == {"empty": 1}
    assert manifest.bytes == sum(len(text.encode()) for text in texts) == manifest.tokens - 2 * 61
    held = manifest.splits["validation"].bytes / manifest.bytes
    assert abs(held - 0.2) < 0.05
    trained = sorted(text for name, text in found if name == "train")
    assert sorted(training_documents(source, 0.2)) == trained


def test_workers_do_not_change_a_byte(source, clean, tmp_path):
    prepare(source, BYTES, tmp_path / "out", workers=2, **SMALL)
    assert content(tmp_path / "out") == content(clean)


def test_the_comparison_catches_another_shard_size(source, clean, tmp_path):
    prepare(source, BYTES, tmp_path / "out", workers=1, validation_fraction=0.2, shard_bytes=301)
    assert content(tmp_path / "out") != content(clean)


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from lmjax.data import ByteTokenizer, SourceConfig, prepare

def die(progress):
    if progress.documents > 20:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(SourceConfig("jsonl", {source!r}), ByteTokenizer(), {out!r}, workers={workers}, progress=die,
        validation_fraction=0.2, shard_bytes=300)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("count", [1, 2])
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(source, clean, tmp_path, count):
    out = tmp_path / "out"
    script = tmp_path / "run.py"
    path = [entry for entry in sys.path if entry]
    script.write_text(KILLED.format(path=path, out=str(out), source=source.path, workers=count))
    # Workers inherit stderr, so reading it to its end also waits until the last of them has gone.
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    with pytest.raises(DataError, match="unfinished; run the same"):
        load_manifest(out)
    recorded = (out / "progress.jsonl").read_bytes().count(b"\n") - 1
    assert recorded >= 2
    with (out / "progress.jsonl").open("ab") as log:
        log.write(b'{"file": "train-0')  # as if killed inside a line
    (out / "train-00099.tokens.npy.tmp123").write_bytes(b"left over")
    seen = []
    prepare(source, BYTES, out, workers=1, progress=seen.append, **SMALL)
    assert seen[-1].kept == recorded and 0 < seen[-1].new_tokens < seen[-1].tokens
    assert content(out) == content(clean)


@pytest.mark.parametrize("code, words", [
    ("raise SystemExit(3)", "its worker process died with exit status 3"),
    ("import sys\nfor line in sys.stdin: print('{\"error\": \"disk full\"}', flush=True)", "disk full"),
])
def test_a_failing_worker_is_named_and_leaves_no_process(source, tmp_path, monkeypatch, code, words):
    started = []
    start = subprocess.Popen

    def remember(*args, **kwargs):
        started.append(start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", code])
    monkeypatch.setattr(workers.subprocess, "Popen", remember)
    with pytest.raises(DataError, match=words):
        prepare(source, BYTES, tmp_path / "out", workers=2, **SMALL)
    assert len(started) == 2 and all(process.returncode is not None for process in started)


def test_a_finished_folder_is_left_alone(source, clean):
    before = {path.name: path.stat().st_mtime_ns for path in clean.iterdir() if path.name != ".lock"}
    seen = []
    prepare(source, BYTES, clean, workers=1, progress=seen.append, **SMALL)
    assert before == {path.name: path.stat().st_mtime_ns for path in clean.iterdir() if path.name != ".lock"}
    assert seen == []


@pytest.mark.parametrize("damage, words", [
    ("cut", "truncated shard, 100 bytes found"), ("gone", "is missing"), ("flip", "bytes have changed"),
    ("id", "id 300.*vocabulary has 257"),
])
def test_damage_is_named_and_repaired(source, tmp_path, damage, words):
    out = tmp_path / "out"
    prepare(source, BYTES, out, workers=1, **SMALL)
    before = content(out)
    path = out / "train-00001.tokens.npy"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:100])
    elif damage == "gone":
        path.unlink()
    else:
        data[-4:-2] = (300 if damage == "id" else 99).to_bytes(2, "little")
        path.write_bytes(data)
    with pytest.raises(DataError, match=rf"train-00001.tokens.npy.*{words}.*again") as caught:
        Tokens(out, "train").verify(hashes=damage != "id")
    assert "\n" not in str(caught.value)
    seen = []
    prepare(source, BYTES, out, workers=1, progress=seen.append, **SMALL)
    assert content(out) == before and seen[-1].kept == sum(name.endswith("tokens.npy") for name in before) - 1


def test_another_corpus_is_never_overwritten(source, clean, tmp_path):
    before = content(clean)
    (tmp_path / "y.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    bpe = train_bpe(["word " * 20], 260)
    for other, tokenizer, words in ((SourceConfig("jsonl", str(tmp_path)), BYTES, "source_key"),
                                    (source, bpe, "tokenizer")):
        with pytest.raises(DataError, match=f"different corpus.*{words}.*another folder"):
            prepare(other, tokenizer, clean, workers=1, **SMALL)
    assert content(clean) == before
    with pytest.raises(DataError, match="lies inside the source folder"):
        prepare(SourceConfig("jsonl", str(tmp_path)), BYTES, tmp_path / "out", workers=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="holds other files .thesis.txt"):
        prepare(source, BYTES, tmp_path / "mine", workers=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_error_in_the_middle_keeps_finished_shards(source, tmp_path, monkeypatch):
    # Else the first look at a corpus this small finds the bad line before any work.
    monkeypatch.setattr(importlib.import_module("lmjax.data.prepare"), "_COUNTED", 5)
    lines = (Path(source.path) / "x.jsonl").read_bytes().split(b"\n")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.jsonl").write_bytes(b"\n".join([*lines[:50], b"{broken", *lines[51:]]))
    with pytest.raises(DataError, match="x.jsonl:51"):
        prepare(SourceConfig("jsonl", str(folder)), BYTES, tmp_path / "out", workers=2, **SMALL)
    out = tmp_path / "out"
    assert not (out / "manifest.json").exists()
    # Every shard that lies there is recorded, so that a next run can keep it.
    written = len(list(out.glob("*.tokens.npy")))
    assert written >= 2 and (out / "progress.jsonl").read_bytes().count(b"\n") == 1 + written


def test_manifest_errors(clean, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_manifest(tmp_path / "none")
    with pytest.raises(DataError, match="not a prepared folder"):
        load_manifest(tmp_path)
    value = json.loads((clean / "manifest.json").read_text())
    for change, words in (({"format": 99}, "version 99, but this lmjax reads 1"), ({"splits": 3}, "damaged")):
        (tmp_path / "manifest.json").write_text(json.dumps(value | change))
        with pytest.raises(DataError, match=words):
            load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        load_manifest(tmp_path)


def test_manifest_describes_the_tokenizer_and_no_place(clean, source):
    manifest = load_manifest(clean)
    assert manifest.tokenizer == {"name": "bytes", "fingerprint": BYTES.fingerprint, "vocab_size": 257,
                                  "bos_id": 256, "eos_id": 256}
    assert str(Path(source.path).parent) not in (clean / "manifest.json").read_text()
    assert manifest.fingerprint == load_manifest(clean).fingerprint


def test_both_splits_always_have_a_document(tmp_path):
    file = tmp_path / "x.jsonl"
    source = SourceConfig("jsonl", str(file))
    for count in range(2, 8):
        file.write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(count)))
        for fraction in (0.001, 0.5, 0.999):
            threshold = holdout_threshold(source, fraction)
            held = [held_out(document.text, threshold) for document in documents(source, Counter())]
            assert 0 < sum(held) < count
        assert holdout_threshold(source, 0.0) == 0
    file.write_text('{"text": "same"}\n' * 3)
    with pytest.raises(DataError, match="one distinct document.*validation_fraction = 0"):
        prepare(source, BYTES, tmp_path / "out", workers=1)
    manifest = prepare(source, BYTES, tmp_path / "out", workers=1, validation_fraction=0.0)
    assert manifest.splits["validation"].documents == 0 and manifest.documents == 3


def test_large_vocabularies_use_four_bytes(source, tmp_path):
    class Shifted(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size = 70_000

        def encode(self, text):
            return super().encode(text) + 69_000

    manifest = prepare(source, Shifted(), tmp_path / "out", workers=1)
    assert manifest.dtype == "uint32" and Tokens(tmp_path / "out").read(1, 2)[0][0] > 69_000


def test_commands_prepare_and_inspect(source, tmp_path, capsys):
    given = [source.path, "--kind", "jsonl", "--cache-dir", str(tmp_path / "cache"), "--workers", "1"]
    assert commands.run_prepare([*given, "--tokenizer", "bpe", "--bpe-vocab-size", "270"]) == 0
    shown = capsys.readouterr().out
    assert "bpe270" in shown and "train" in shown and "1 documents of zero length left out" in shown
    folder = next((tmp_path / "cache").glob("jsonl-bpe270-*"))
    assert commands.run_inspect([str(folder), "--documents", "1"]) == 0
    shown = capsys.readouterr().out
    assert "hashes, offsets, token ids" in shown and "wörd wörd" in shown
    with pytest.raises(ConfigError, match="--validation-fraction|validation_fraction"):
        commands.run_prepare([*given, "--validation-fraction", "2"])
    with pytest.raises(ConfigError, match="need --out"):
        commands.run_prepare([*given, "--shard-bytes", "10"])


def test_commands_tokenizer(source, tmp_path, capsys):
    out = tmp_path / "t.json"
    given = [source.path, "--kind", "jsonl", "--vocab-size", "270", "--out", str(out)]
    assert commands.run_tokenizer_train(given) == 0
    with pytest.raises(ConfigError, match="exists already"):
        commands.run_tokenizer_train(given)
    assert commands.run_tokenizer_show([str(out), "--text", "a\x1b[2J"]) == 0
    shown = capsys.readouterr().out
    assert "270 tokens" in shown and "\x1b" not in shown
