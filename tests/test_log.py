"""The step line, metrics.jsonl with resume, the writers, and the summary of a run."""

import json
import math
import os
import pty
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from lmjax import records
from lmjax.errors import CheckpointError
from lmjax.log import (
    LogConfig,
    RunLog,
    format_bytes,
    format_count,
    format_duration,
    format_step,
    format_summary,
    printable,
    read_metrics,
    summary,
)

ROOT = Path(__file__).parents[1]
STEP = dict(
    loss=3.2141, grad_norm=0.8123, lr=9.8e-4, tokens=120 * 8192, tokens_per_second=18240.0, mfu=None,
    memory_bytes=1.2 * 2**30, data_wait=0.003,
)  # fmt: skip


def run_steps(folder: Path, first: int, last: int, resume: int = 0, every: int = 10) -> None:
    with RunLog(folder, LogConfig(every=every), 30, resume) as log:
        log.write("start", resume, time=1.7e9 + resume, devices="1 x CPU", parameters=1000)
        for step in range(first, last + 1):
            log.train(
                step, {**STEP, "tokens": 100 * step, "loss": 5 - step / 10, "seconds": float(step - resume)}
            )


# ---- formatting --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, text",
    [(0, "0"), (950, "950"), (999.4, "999"), (999.6, "1.0k"), (18_240, "18.2k"), (999_960, "1.0M"),
     (3.4e6, "3.4M"), (5.6e9, "5.6B"), (2e12, "2.0T"), (None, "n/a"), (math.nan, "n/a"), (-1500, "-1.5k")],
)  # fmt: skip
def test_format_count(n, text):
    assert format_count(n) == text


@pytest.mark.parametrize(
    "n, text",
    [(0, "0 B"), (812, "812 B"), (1024, "1.0 KiB"), (1.2 * 2**30, "1.2 GiB"), (812 * 2**20, "812 MiB"),
     (1023.6 * 2**20, "1.0 GiB"), (3 * 2**40, "3.0 TiB"), (None, "n/a")],
)  # fmt: skip
def test_format_bytes(n, text):
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    "s, text",
    [(0, "0s"), (4.23, "4.2s"), (9.96, "10s"), (12.3, "12s"), (59.6, "1m00s"), (192, "3m12s"),
     (3599.7, "1h00m"),
     (7500, "2h05m"),
     (266_400, "3d02h"), (None, "n/a"), (math.inf, "n/a")],
)  # fmt: skip
def test_format_duration(s, text):
    assert format_duration(s) == text


def test_step_line_lines_up_and_fits():
    early = format_step({**STEP, "loss": 10.826, "grad_norm": 12.34, "mfu": 0.41}, 1, 2000)
    later = format_step({**STEP, "data_wait": 0.12, "memory_bytes": 812 * 2**20}, 1999, 2000)
    for label in ("loss", "gnorm", "lr", "tok/s", "mfu", "mem", "wait", "eta"):
        assert early.index(label) == later.index(label), label
    assert len(early) <= 101 and len(later) <= 101
    assert early.startswith("step    1/2000  loss 10.83  gnorm 12.3 lr 9.8e-4")
    # 1880 steps of 8192 tokens at 18240 tok/s
    assert format_step(STEP, 120, 2000).endswith("eta 14m04s")


def test_step_line_never_invents_a_number():
    line = format_step({"loss": math.nan, "mfu": None}, 5, 10)
    assert "loss   nan" in line and "mfu n/a" in line and "mem    n/a" in line and "eta n/a" in line
    assert "loss 1e-05" in format_step({"loss": 1e-5}, 5, 10)  # and not 0.000
    assert "dropped" not in format_step(
        {**STEP, "loss_kept": 3.2, "loss_dropped": math.nan, "kept_fraction": 1.0}, 1, 9
    )
    assert "(kept 3.20 dropped 3.35)" in format_step(
        {**STEP, "loss_kept": 3.2, "loss_dropped": 3.35, "kept_fraction": 0.75}, 1, 9
    )


def test_printable_removes_what_steers_a_terminal():
    assert printable("a\tb\n\x1b[31mred\x00\x9b\x7f é") == "a\tb\n\ufffd[31mred\ufffd\ufffd\ufffd é"


# ---- config ------------------------------------------------------------------------------------


def test_problems_are_all_told(monkeypatch):
    assert LogConfig().problems("log") == []
    monkeypatch.setattr("lmjax.log._installed", lambda package: False)
    found = LogConfig(every=0, tensorboard=True, wandb=True, wandb_project=" ").problems("log")
    assert [p.split(" ")[0] for p in found] == [
        "log.every",
        "log.tensorboard",
        "log.wandb",
        "log.wandb_project",
    ]
    assert "pip install 'lmjax[tensorboard]'" in found[1] and "pip install 'lmjax[wandb]'" in found[2]
    assert LogConfig(every=True).problems("log.")[0].startswith("log.every = True")


# ---- metrics.jsonl -----------------------------------------------------------------------------


def test_values_round_trip_exactly(tmp_path):
    values = {
        "a": np.float32(0.1), "b": 1 / 3, "c": np.int64(2**60), "d": math.nan, "e": -math.inf, "f": None,
        "g": np.array([0.5, np.inf]), "h": np.float64("nan"), "i": True, "j": {"x": np.array(2.5)},
    }  # fmt: skip
    with RunLog(tmp_path, LogConfig(), 10) as log:
        log.write("train", 3, **values)
        log.write("sample", 3, prompt="inf", text="nan\u2028\ud800 </script>")
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    train, sample = read_metrics(tmp_path)
    assert train["a"] == float(np.float32(0.1)) and train["b"] == 1 / 3 and train["c"] == 2**60
    assert (
        math.isnan(train["d"]) and train["e"] == -math.inf and train["f"] is None and math.isnan(train["h"])
    )
    assert train["g"] == [0.5, math.inf] and train["i"] is True and train["j"] == {"x": 2.5}
    assert sample["prompt"] == "inf" and sample["text"] == "nan\u2028\ud800 </script>"
    with pytest.raises(TypeError, match="not object"):
        records.plain({"x": object()})


def test_resume_drops_what_will_run_again_and_a_torn_line(tmp_path):
    run_steps(tmp_path, 1, 20)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "ab") as f:
        f.write(b'{"kind": "train", "step": 21, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(21))
    run_steps(tmp_path, 11, 15, resume=10)
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path)] == (
        [("start", 0)]
        + [("train", s) for s in range(1, 11)]
        + [("start", 10)]
        + [("train", s) for s in range(11, 16)]
    )
    # What is kept is kept byte for byte.
    kept = b"".join(before.splitlines(keepends=True)[:11])
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(kept)
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_without_rewinding_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("lmjax.log.rewind", lambda path, step: None)
    run_steps(tmp_path, 1, 20)
    run_steps(tmp_path, 11, 15, resume=10)
    steps = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert steps != list(range(1, 16))


def test_restart_from_zero_keeps_only_the_history(tmp_path):
    with RunLog(tmp_path, LogConfig(), 30) as log:
        log.write("start", 0, time=1.0)
        log.write("eval", 0, split="validation", loss=5.0)
    run_steps(tmp_path, 1, 2)
    assert [r["kind"] for r in read_metrics(tmp_path)] == ["start", "start", "train", "train"]


@pytest.mark.parametrize("bad", [b"{oops", b"[1]", b'{"kind": "train"}', b'{"kind": "train", "step": 1.5}'])
def test_a_bad_line_is_named(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "start", "step": 0}\n' + bad + b"\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not a metrics record"):
        read_metrics(tmp_path)
    # Without its newline the same bytes are what a kill leaves behind, and are left out.
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "start", "step": 0}\n' + bad)
    assert len(read_metrics(tmp_path)) == 1


def test_missing_metrics_says_how_to_fix(tmp_path):
    with pytest.raises(CheckpointError, match="has no metrics.jsonl; give the folder of a run"):
        read_metrics(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        read_metrics(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the run's log"):
        RunLog(tmp_path / "file", LogConfig(), 1)


def test_killed_process_loses_no_whole_record(tmp_path):
    code = (
        "import os, sys; from lmjax.log import *\n"
        "log = RunLog(sys.argv[1], LogConfig(), 100)\n"
        "for s in range(1, 41): log.train(s, {'loss': 1.0 / s})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, env=env()
    )
    assert done.returncode == -9
    assert [r["loss"] for r in read_metrics(tmp_path)] == [1.0 / s for s in range(1, 41)]


# ---- the console -------------------------------------------------------------------------------


def env(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


def test_plain_lines_one_per_every(tmp_path, capsys):
    run_steps(tmp_path, 1, 30, every=10)
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.match(r"step +(\d+)/30 ", x)[1]) for x in lines] == [1, 10, 20, 30]
    assert (tmp_path / "log.txt").read_text().splitlines() == lines
    assert len([r for r in read_metrics(tmp_path) if r["kind"] == "train"]) == 30


def test_another_host_does_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", LogConfig(tensorboard=True), 10, is_main=False) as log:
        log.write("start", 0)
        log.train(1, STEP)
        log.say("hello")
        log.close({"not": "a summary"})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def on_terminal(tmp_path: Path, **extra: str) -> str:
    """What a run writes to a real pseudo-terminal."""
    code = (
        "import sys; from lmjax.log import *\n"
        "with RunLog(sys.argv[1], LogConfig(every=1), 4) as log:\n"
        "    for s in range(1, 5): log.train(s, {'loss': 1.5, 'tokens': 8 * s, 'tokens_per_second': 1.0})\n"
        "    log.say('a word')"
    )
    main, other = pty.openpty()
    keep = {k: v for k, v in env(COLUMNS="120", **{"TERM": "xterm-256color", **extra}).items() if v}
    keep = {k: v for k, v in keep.items() if k != "NO_COLOR" or "NO_COLOR" in extra}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=keep, stdout=other, stderr=other
    ) as p:
        os.close(other)
        out = b""
        while True:
            try:
                piece = os.read(main, 4096)
            except OSError:  # Linux says EIO when the other end is closed
                break
            if not piece:
                break
            out += piece
    os.close(main)
    assert p.returncode == 0, out
    return out.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]m")


def test_terminal_has_colour_and_a_bar(tmp_path):
    out = on_terminal(tmp_path)
    assert COLOUR.search(out) and "100%" in out and "a word" in out
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1  # the cursor is given back
    assert "\x1b" not in (tmp_path / "log.txt").read_text()


def test_no_color_and_dumb_terminals_are_respected(tmp_path):
    quiet = on_terminal(tmp_path / "a", NO_COLOR="1")
    assert not COLOUR.search(quiet) and "100%" in quiet
    dumb = on_terminal(tmp_path / "b", TERM="dumb")
    assert "\x1b" not in dumb and [x[:4] for x in dumb.splitlines()] == ["step"] * 4 + ["a wo"]


def test_a_closed_pipe_does_not_end_the_run(tmp_path, monkeypatch):
    class Closed:
        encoding = "ascii"

        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Closed())
    run_steps(tmp_path, 1, 30)
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


# ---- other writers -----------------------------------------------------------------------------


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with RunLog(tmp_path, LogConfig(tensorboard=True), 10) as log:
        log.train(1, {"loss": 2.5, "mfu": None})
        log.write("eval", 1, split="validation", loss=3.5)
        log.write("sample", 1, prompt="def ", text="f():")
    raw = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    seen = {}
    while raw:  # TFRecord: length (8), checksum (4), payload, checksum (4)
        n = int.from_bytes(raw[:8], "little")
        for value in Event.FromString(raw[12 : 12 + n]).summary.value:
            seen[value.tag] = value.simple_value
        raw = raw[16 + n :]
    assert seen["train/loss"] == 2.5 and seen["validation/loss"] == 3.5 and "train/mfu" not in seen
    assert any(tag.startswith("sample") for tag in seen)


class FakeRun:
    id = "abc123"

    def __init__(self, fails: bool):
        self.fails, self.rows, self.finished = fails, [], False

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, row):
        if self.fails:
            raise ConnectionError("no network")
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("fails", [False, True])
def test_wandb_continues_its_page_and_never_ends_a_run(tmp_path, monkeypatch, fails):
    run, calls = FakeRun(fails), []
    fake = types.SimpleNamespace(init=lambda **kw: calls.append(kw) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def attempt():
        with RunLog(tmp_path, LogConfig(wandb=True), 10) as log:
            log.train(1, STEP)
            log.train(2, STEP)

    if fails:
        with pytest.warns(UserWarning, match="Weights & Biases failed") as told:
            attempt()
        assert len(told) == 1
    else:
        attempt()
        attempt()
        assert [c["id"] for c in calls] == [None, "abc123"] and run.finished
        assert run.rows[0]["train/loss"] == STEP["loss"] and run.rows[0]["step"] == 1
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


# ---- the summary -------------------------------------------------------------------------------


def whole_run() -> list[dict]:
    rows = [{"kind": "start", "step": 0, "parameters": 1000, "devices": "1 x CPU"}]
    rows += [
        {
            "kind": "eval",
            "step": 0,
            "split": "validation",
            "loss": 5.0,
            "perplexity": 148.0,
            "bits_per_byte": 4.0,
        }
    ]
    for i, rate in enumerate([1.0, 100.0, 200.0, 300.0], 1):
        rows.append({"kind": "train", "step": i, "loss": 5.0 - i, "tokens": 10 * i, "tokens_per_second": rate,
                     "seconds": 2.0 * i, "memory_bytes": 50 - i, "mfu": None})  # fmt: skip
    rows.append(
        {
            "kind": "eval",
            "step": 4,
            "split": "validation",
            "loss": 2.0,
            "perplexity": 7.4,
            "bits_per_byte": 1.5,
        }
    )
    rows.append({"kind": "start", "step": 4})
    rows.append(
        {"kind": "train", "step": 5, "loss": math.nan, "tokens": 50, "tokens_per_second": 1.0, "seconds": 3.0}
    )
    rows.append(
        {
            "kind": "eval",
            "step": 5,
            "split": "validation",
            "loss": 2.5,
            "perplexity": 12.0,
            "bits_per_byte": 2.0,
        }
    )
    return rows


def test_summary():
    s = summary(whole_run(), "runs/x", ["lmjax sample runs/x"])
    assert (s["steps"], s["tokens"], s["wall_seconds"], s["memory_bytes"]) == (5, 50, 11.0, 49)
    # Both attempts' first records (1 tok/s, the compiler) are left out; with them the median would be 100.
    assert s["tokens_per_second"] == {"median": 200.0, "p10": 120.0, "p90": 280.0}
    assert s["mfu"] is None and math.isnan(s["train_loss"]) and s["resumes"] == 1 and s["parameters"] == 1000
    e = s["evals"]["validation"]
    assert (e["first"]["step"], e["best"]["step"], e["last"]["step"]) == (0, 4, 5)
    assert e["improvement_percent"] == pytest.approx(60.0)
    text = format_summary(s)
    assert "5.000 at step 0 -> 2.500 at step 5, best 2.000 at step 4 (60.0% lower)" in text
    assert "resumed once" in text and re.search(r"mfu +n/a", text) and "lmjax report runs/x" in text


def test_summary_of_next_to_nothing():
    for rows in ([], [{"kind": "start", "step": 0}], [{"kind": "train", "step": 1, "loss": 2.0}]):
        s = summary(rows)
        assert s["tokens_per_second"]["median"] is None and s["evals"] == {}
        assert "n/a" in format_summary(s)


def test_close_writes_the_summary_once(tmp_path, capsys):
    with RunLog(tmp_path, LogConfig(), 5) as log:
        log.train(5, STEP)
        log.close(summary(whole_run(), tmp_path))
        log.close({"ignored": True})
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["tokens"] == 50 and told["train_loss"] == "nan"
    assert [r["kind"] for r in read_metrics(tmp_path)] == ["train", "end"]
    assert "peak memory" in capsys.readouterr().out


def test_no_jax_and_no_rich_are_imported():
    code = "import sys, lmjax.log, lmjax.report; print({'jax', 'rich', 'wandb'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], env=env(), capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "set()"
