"""Corpora prepared by tasks in any order: byte for byte the folder of `prepare`, and its errors. Needs no Beam."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lmjax.data import commands, policy, spread, survey
from lmjax.data.manifest import load_manifest
from lmjax.data.prepare import Cutter, prepare
from lmjax.data.sources import SourceConfig, SourceFile, file_documents
from lmjax.data.spread import prepare_spread, work
from lmjax.data.tokenizers import ByteTokenizer, train_bpe
from lmjax.errors import ConfigError, DataError

BYTES = ByteTokenizer()
SMALL = {"validation_fraction": 0.2, "shard_bytes": 300}
SKIP = {"on_bad_record": "skip", "max_bad_records": 9}


class Shuffled:
    """An engine without Beam: three threads, numbers in another order, one of them twice."""

    def __init__(self):
        self.calls, self.cancelled = [], False

    def run(self, task, folder, numbers):
        numbers = [*numbers, numbers[0]]
        random.Random(len(numbers)).shuffle(numbers)
        self.calls += [(task, number) for number in numbers]
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda number: work(task, folder, number), numbers))

    def cancel(self):
        self.cancelled = True


def text(number):
    return f"document {number} " + "wörd " * (number * 7 % 17)


def line(number):
    return json.dumps({"text": text(number), "good": number % 3 > 0}, ensure_ascii=False)


def corpus(kind, folder, monkeypatch=None):
    """A small source of a kind, with what its reader has to get past."""
    folder.mkdir()
    if kind == "text":
        for number in range(30):
            (folder / f"{number}.txt").write_text("" if number == 4 else ("\ufeff" * (number == 5)) + text(number % 20))
        return SourceConfig(kind, str(folder))
    if kind == "bad text":
        for number in range(30):
            (folder / f"{number}.txt").write_bytes(text(number).encode() + b"\xff" * (number % 10 == 0))
        return SourceConfig("text", str(folder), encoding_errors="replace")
    if kind == "pystdlib":
        for name in ("abc", "json/decoder", "json/encoder", "ast", "string", "base64", "this", "queue", "sched", "cmd"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / f"{name}.py").write_text(f'"""{name}"""\n' + "x = 1\n" * len(name) * 5)
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
        return SourceConfig()
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        for name, numbers in (("a", range(40)), ("b", [3]), ("c", range(30, 60))):
            column = [None if number % 11 == 5 else text(number) for number in numbers]
            parquet.write_table(pyarrow.table({"other": column, "body": column}), folder / f"{name}.parquet",
                                row_group_size=7)
        return SourceConfig(kind, str(folder), "body")
    lines = [line(number) for number in range(50)]
    (folder / "sub").mkdir()
    (folder / "a.jsonl").write_text("\ufeff" + "\r\n".join([*lines[:20], "", '{"text": ""}', lines[7]]))
    (folder / "empty.jsonl").write_text("")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines[20:35]) + "\n")
    bad = ["{broken", '{"other": 1}', '{"text": 3}'] if kind == "bad jsonl" else []
    (folder / "sub" / "c.jsonl").write_text("\n".join([*lines[35:40], *bad, *lines[40:]]))
    if kind == "where":
        return SourceConfig("jsonl", str(folder), where="!good")
    return SourceConfig("jsonl", str(folder), **(SKIP if kind == "bad jsonl" else {}))


KINDS = ("text", "bad text", "pystdlib", "parquet", "jsonl", "bad jsonl", "where")


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def source(tmp_path):
    return corpus("jsonl", tmp_path / "in")


@pytest.fixture
def clean(source, tmp_path):
    prepare(source, BYTES, tmp_path / "clean", workers=1, **SMALL)
    return content(tmp_path / "clean")


def spread_out(source, out, engine=None, **changes):
    return prepare_spread(source, lambda key: BYTES, out, engine or Shuffled(), **{**SMALL, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_that_of_prepare(kind, tmp_path, monkeypatch):
    source = corpus(kind, tmp_path / "in", monkeypatch)
    expected = prepare(source, BYTES, tmp_path / "one", workers=1, **SMALL)
    assert spread_out(source, tmp_path / "many") == expected == load_manifest(tmp_path / "many")
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert len(expected.splits["train"].shards) > 2 and expected.splits["validation"].documents > 0
    assert bool(expected.skipped) == (kind != "pystdlib")


@pytest.mark.parametrize("changes", [
    {"validation_fraction": 0.0}, {"shard_bytes": 1}, {"shard_bytes": 10**9}, {"validation_fraction": 0.9}])
def test_other_settings(source, tmp_path, changes):
    prepare(source, BYTES, tmp_path / "one", workers=1, **{**SMALL, **changes})
    spread_out(source, tmp_path / "many", **changes)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_many_documents_and_a_bpe(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["lmjax.data.prepare"], "_COUNTED", 5)  # as if these were more than 20,000
    tokenizer = train_bpe([text(number) for number in range(20)], 270)
    prepare(source, tokenizer, tmp_path / "one", workers=1, **SMALL)
    keys = []
    prepare_spread(source, lambda key: keys.append(key) or tokenizer, tmp_path / "many", Shuffled(), **SMALL)
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert keys == [load_manifest(tmp_path / "one").identity["source_key"]]


@pytest.mark.parametrize("wrong", ["late", "split"])
def test_the_comparison_catches_boundaries_off_by_one(source, clean, tmp_path, monkeypatch, wrong):
    class Late(Cutter):
        """Every shard but the first of a split begins one document late."""

        def add(self, split, size):
            index, full = super().add(split, getattr(self, split, 0))
            setattr(self, split, size)
            return index, full

    if wrong == "late":
        monkeypatch.setattr(survey, "Cutter", Late)
    else:
        right = spread.threshold_of
        monkeypatch.setattr(spread, "threshold_of", lambda *given: right(*given) - 1)
    spread_out(source, tmp_path / "out")
    assert content(tmp_path / "out") != clean
    assert load_manifest(tmp_path / "out").documents == 51  # each of them is there once, only elsewhere


def test_cuts_are_those_of_a_plain_walk():
    rng = np.random.default_rng(0)
    for _ in range(30):
        files = [np.zeros(rng.integers(0, 9), survey.MARK) for _ in range(rng.integers(1, 6))]
        for marks in files:
            marks["position"] = rng.integers(0, 10, len(marks))
            marks["size"] = rng.integers(1, 50, len(marks))
        limit = int(rng.integers(1, 120))
        expected = {}
        for split, wanted in (("validation", True), ("train", False)):
            stream = [((file, number), int(mark["size"])) for file, marks in enumerate(files)
                      for number, mark in enumerate(marks) if (mark["position"] < 3) == wanted]
            index = 0
            while stream:
                count = next((n for n in range(1, len(stream)) if sum(size for _, size in stream[:n]) >= limit),
                             len(stream))
                expected[split, index] = (stream[0][0], stream[count - 1][0])
                stream, index = stream[count:], index + 1
        found = list(survey.ranges(files, 3, limit))
        assert {(cut.split, cut.index): (cut.first, cut.last) for cut in found} == expected
        rows = np.array([cut.row() for cut in found], survey.RANGE)
        assert [survey.Range.of(row) for row in rows] == found


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_place_is_enough_to_read_a_document_again(kind, tmp_path):
    source = corpus(kind, tmp_path / "in")
    for path in sorted(path for path in Path(source.path).rglob("*") if path.is_file()):
        file = SourceFile(path.name, path, 0)
        rule = policy.Policy("error", "error", 0, Counter())
        found = list(file_documents(source, file, rule))
        for step in (1, 3, 8):
            again = list(file_documents(source, file, rule, [place for place, _ in found[::step]]))
            assert [(place, document.text) for place, document in again] == [
                (place, document.text) for place, document in found[::step]]


def broken(kind, tmp_path):
    source = corpus("jsonl", tmp_path / "in")
    folder = Path(source.path)
    if kind == "a line":
        (folder / "a.jsonl").write_text(line(1) + "\n{broken\n" + line(2) + '\n{"text": 3}')
        (folder / "sub" / "c.jsonl").write_text("{broken too")
    elif kind == "gzip":
        data = (folder / "b.jsonl.gz").read_bytes()
        (folder / "b.jsonl.gz").write_bytes(data[:len(data) // 2])
    elif kind == "nothing":
        for path in folder.rglob("*.jsonl*"):
            path.unlink()
        (folder / "a.jsonl").write_text('{"text": ""}\n' * 3)
    elif kind == "copies":
        for path in folder.rglob("*.jsonl*"):
            path.unlink()
        (folder / "a.jsonl").write_text((line(1) + "\n") * 3)
    elif kind == "field":
        source.field = "body"
    elif kind == "no file":
        source.path = str(folder / "sub" / "*.txt")
    else:  # too many bad records, spread over files
        bad = "\n".join(["{broken", line(3)] * 2)
        for name in ("a.jsonl", "empty.jsonl", "sub/c.jsonl"):
            (folder / name).write_text(bad)
        source.on_bad_record, source.max_bad_records = "skip", int(kind)
    return source


@pytest.mark.parametrize("kind", ["a line", "gzip", "nothing", "copies", "field", "no file", "0", "1", "3", "5"])
def test_errors_are_those_of_prepare(kind, tmp_path):
    source = broken(kind, tmp_path)
    with pytest.raises(DataError) as expected:
        prepare(source, BYTES, tmp_path / "one", workers=1, **SMALL)
    with pytest.raises(DataError) as found:
        spread_out(source, tmp_path / "many")
    assert str(found.value) == str(expected.value)
    assert not (tmp_path / "many").exists() or content(tmp_path / "many") == {}


def test_stopped_in_the_middle_and_given_again(source, clean, tmp_path):
    out = tmp_path / "out"

    def stop(progress):
        if progress.documents > 20:
            raise KeyboardInterrupt

    engine = Shuffled()
    with pytest.raises(KeyboardInterrupt):
        spread_out(source, out, engine, progress=stop)
    assert engine.cancelled and not list(out.glob("*.tmp*"))
    with pytest.raises(DataError, match="unfinished; run the same"):
        load_manifest(out)
    recorded = (out / "progress.jsonl").read_bytes().count(b"\n") - 1
    (out / "spread-0123.tmp" / "marks").mkdir(parents=True)  # as a killed driver leaves it
    engine, seen = Shuffled(), []
    spread_out(source, out, engine, progress=seen.append)
    assert recorded > 1 and seen[-1].kept == recorded and content(out) == clean
    made = {number for task, number in engine.calls if task == "write"}
    assert len(made) == sum(name.endswith("tokens.npy") for name in clean) - recorded


def test_prepare_takes_over_what_a_spread_left(source, clean, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        spread_out(source, out, progress=lambda progress: (_ for _ in ()).throw(KeyboardInterrupt))
    (out / "spread-0123.tmp" / "marks").mkdir(parents=True)
    prepare(source, BYTES, out, workers=1, **SMALL)
    assert content(out) == clean


def test_damage_is_repaired_and_a_finished_folder_left_alone(source, clean, tmp_path):
    out = tmp_path / "out"
    spread_out(source, out)
    data = bytearray((out / "train-00001.tokens.npy").read_bytes())
    data[-4] ^= 1
    (out / "train-00001.tokens.npy").write_bytes(data)
    engine = Shuffled()
    spread_out(source, out, engine)
    assert content(out) == clean and {number for task, number in engine.calls if task == "write"} == {0}
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    spread_out(source, out)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    with pytest.raises(DataError, match="different corpus.*shard_bytes 300 there, 301 asked"):
        spread_out(source, out, shard_bytes=301)
    assert content(out) == clean


def test_workers_that_fail(source, clean, tmp_path):
    class Changing(Shuffled):
        def run(self, task, folder, numbers):
            if task == "write":
                path = Path(source.path) / "a.jsonl"
                path.write_text(path.read_text().replace("document 9", "document 8"))
            super().run(task, folder, numbers)

    class Elsewhere(Shuffled):
        def run(self, task, folder, numbers):
            super().run(task, folder + "x", numbers)

    class Dying(Shuffled):
        def run(self, task, folder, numbers):
            super().run(task, folder, numbers[:3])
            raise DataError("the cluster is gone")

    with pytest.raises(DataError, match="c.jsonl|no answer to 4 of 4 tasks .survey.*same folder"):
        spread_out(source, tmp_path / "out", Elsewhere(), late=0.1)
    with pytest.raises(DataError, match="the cluster is gone"):
        spread_out(source, tmp_path / "out", Dying())
    spread_out(source, tmp_path / "out")
    assert content(tmp_path / "out") == clean
    with pytest.raises(DataError, match="a.jsonl: has changed while the corpus was prepared"):
        spread_out(source, tmp_path / "other", Changing())
    assert not list((tmp_path / "other").glob("*.tmp*"))


def test_what_cannot_be_spread_is_refused(source, tmp_path):
    class Other(ByteTokenizer):
        pass

    with pytest.raises(DataError, match="hf.*without --beam"):
        spread_out(SourceConfig("hf", "some/dataset"), tmp_path / "out")
    with pytest.raises(DataError, match="out = gs://bucket/x: is an address"):
        spread_out(source, "gs://bucket/x")
    with pytest.raises(DataError, match="path = s3://bucket/x: is an address"):
        spread_out(SourceConfig("jsonl", "s3://bucket/x"), tmp_path / "out")
    with pytest.raises(DataError, match="already prepared"):
        spread_out(SourceConfig("shards", "x"), tmp_path / "out")
    with pytest.raises(DataError, match="lies inside the source folder"):
        spread_out(source, Path(source.path) / "out")
    with pytest.raises(DataError, match="Other, which workers cannot rebuild"):
        prepare_spread(source, lambda key: Other(), tmp_path / "out", Shuffled(), **SMALL)


@pytest.mark.parametrize("given, words", [
    (["--beam", "direct"], "--beam direct: needs --out"),
    (["--beam", "direct", "--out", "x", "--workers", "3"], "direct_num_workers=3"),
    (["--beam-option", "a=1"], "no effect without --beam"),
])
def test_options_that_do_not_fit(given, words):
    with pytest.raises(ConfigError, match=words):
        commands.run_prepare(given)


def test_without_beam_it_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"--beam direct: needs.*pip install 'lmjax\[beam\]'"):
        commands.run_prepare([source.path, "--kind", "jsonl", "--beam", "direct", "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--beam drect: must be one of direct, dataflow"):
        commands.run_prepare([source.path, "--kind", "jsonl", "--beam", "drect", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_beam_is_not_imported_unless_asked_for():
    code = "import sys, lmjax.data.beam, lmjax.data.commands; print('apache_beam' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_twenty_thousand_copies_before_the_first_other_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["lmjax.data.prepare"], "_COUNTED", 3)
    (tmp_path / "x.jsonl").write_text((line(1) + "\n") * 6 + line(2))
    source = SourceConfig("jsonl", str(tmp_path / "x.jsonl"))
    manifest = prepare(source, BYTES, tmp_path / "out", workers=1, validation_fraction=1e-9)
    assert min(split.documents for split in manifest.splits.values()) > 0
