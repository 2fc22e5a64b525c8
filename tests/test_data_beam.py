"""Corpora prepared on Beam's direct runner: byte for byte the folder of `prepare`. Skipped without apache-beam.

It takes two minutes to install, so the README's test command does without; the rest of the logic is in test_spread.py.

    pip install -e '.[test,beam]' && python -m pytest tests/test_data_beam.py
"""

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("apache_beam")

from test_spread import BYTES, KINDS, SMALL, content, corpus  # noqa: E402

from lmjax.cli import main  # noqa: E402
from lmjax.data import spread, survey  # noqa: E402
from lmjax.data.beam import BeamEngine  # noqa: E402
from lmjax.data.manifest import load_manifest  # noqa: E402
from lmjax.data.prepare import prepare  # noqa: E402
from lmjax.data.spread import prepare_spread  # noqa: E402
from lmjax.errors import ConfigError, DataError  # noqa: E402

WORKERS = {
    "one": [],
    "three": ["direct_num_workers=3", "direct_running_mode=multi_threading"],
    "processes": ["direct_num_workers=2", "direct_running_mode=multi_processing"],
}


def on_beam(source, out, options=(), **changes):
    return prepare_spread(source, lambda key: BYTES, out, BeamEngine("direct", options), **{**SMALL, **changes})


@pytest.fixture
def source(tmp_path):
    return corpus("jsonl", tmp_path / "in")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, tmp_path, monkeypatch):
    source = corpus(kind, tmp_path / "in", monkeypatch)
    prepare(source, BYTES, tmp_path / "one", workers=1, **SMALL)
    on_beam(source, tmp_path / "beam")
    assert content(tmp_path / "beam") == content(tmp_path / "one")


@pytest.mark.parametrize("workers", WORKERS)
def test_every_way_to_work(workers, tmp_path):
    source = corpus("bad jsonl", tmp_path / "in")
    prepare(source, BYTES, tmp_path / "one", workers=1, **SMALL)
    manifest = on_beam(source, tmp_path / "beam", WORKERS[workers])
    assert content(tmp_path / "beam") == content(tmp_path / "one")
    assert manifest.skipped == {"empty": 1, "malformed": 1, "no_field": 1, "wrong_type": 1}


def test_the_comparison_catches_boundaries_off_by_one(source, tmp_path, monkeypatch):
    class Late(survey.Cutter):
        """Every shard but the first of a split begins one document late."""

        def add(self, split, size):
            index, full = super().add(split, getattr(self, split, 0))
            setattr(self, split, size)
            return index, full

    prepare(source, BYTES, tmp_path / "one", workers=1, **SMALL)
    monkeypatch.setattr(survey, "Cutter", Late)
    on_beam(source, tmp_path / "beam")
    assert content(tmp_path / "beam") != content(tmp_path / "one")


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from lmjax.data import ByteTokenizer, SourceConfig
from lmjax.data.beam import BeamEngine
from lmjax.data.spread import prepare_spread

def die(progress):
    if progress.documents > 20:
        os.kill(os.getpid(), signal.{signal})

prepare_spread(SourceConfig("jsonl", {source!r}), lambda key: ByteTokenizer(), {out!r}, BeamEngine("direct"),
               validation_fraction=0.2, shard_bytes=300, progress=die)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_stopped_in_the_middle_and_given_again(source, tmp_path, name):
    prepare(source, BYTES, tmp_path / "one", workers=1, **SMALL)
    out = tmp_path / "out"
    script = tmp_path / "run.py"
    path = [entry for entry in sys.path if entry]
    script.write_text(KILLED.format(path=path, out=str(out), source=source.path, signal=name))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=300, text=True)
    assert ended.returncode == -getattr(signal, name), ended.stderr
    assert bool(list(out.glob("*.tmp"))) == (name == "SIGKILL")  # Ctrl-C has the time to tidy up
    with pytest.raises(DataError, match="unfinished; run the same"):
        load_manifest(out)
    recorded = (out / "progress.jsonl").read_bytes().count(b"\n") - 1
    seen = []
    on_beam(source, out, progress=seen.append)
    assert recorded > 1 and seen[-1].kept == recorded and content(out) == content(tmp_path / "one")


def test_the_command_and_an_error_in_one_line(source, tmp_path, capsys):
    given = ["data", "prepare", source.path, "--kind", "jsonl", "--beam", "direct", "--shard-bytes", "300",
             "--cache-dir", str(tmp_path / "cache")]
    bpe = ["--tokenizer", "bpe", "--bpe-vocab-size", "270"]
    assert main([*given, *bpe, "--out", str(tmp_path / "beam"), "--beam-option", "job_name=mine"]) == 0
    assert "bpe270" in capsys.readouterr().out
    here = [word for word in given if word not in ("--beam", "direct")]
    assert main([*here, *bpe, "--out", str(tmp_path / "one"), "--workers", "1"]) == 0
    assert content(tmp_path / "beam") == content(tmp_path / "one")
    capsys.readouterr()
    (tmp_path / "in" / "a.jsonl").write_text("{broken")
    assert main([*given, "--out", str(tmp_path / "other")]) == 3
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "a.jsonl:1: not valid JSON" in shown


def test_a_runner_that_fails_is_one_line_too(source, tmp_path, monkeypatch):
    def fail(*given):
        raise RuntimeError("no such thing\nas this")

    monkeypatch.setattr(spread, "survey_file", fail)
    with pytest.raises(DataError, match="the Beam runner direct failed .survey.: RuntimeError: .*as this.*") as found:
        on_beam(source, tmp_path / "out")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("options, words", [
    (["direct_num_wokers=3"], "direct_num_wokers: Beam has no such option"),
    (["direct_num_workers=3"], "no effect in one process; add .*direct_running_mode=multi_processing"),
    (["direct_num_workers=many"], "argument --direct_num_workers: invalid int value: 'many'$"),
    (["--direct_num_workers=3"], "must be KEY=VALUE"),
    (["runner=FlinkRunner"], "--beam names the runner"),
])
def test_options_are_checked_before_any_work(options, words):
    with pytest.raises(ConfigError, match=words):
        BeamEngine("direct", options)
