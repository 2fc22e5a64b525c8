"""The report: ticks, thinning, one page from one or several runs, and text that tries to break out of it."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import lmjax.report.page as page_module
from lmjax.errors import CheckpointError
from lmjax.log import LogConfig, RunLog, read_metrics, summary
from lmjax.report import run_report, write_report
from lmjax.report.charts import Axis, Series, downsample, format_tick, line_chart, log_ticks, nice_ticks
from lmjax.report.runs import differing

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'\x00\x1b[31m\ud800\u202e ]]> <!-- -->"
)


def make_run(
    folder: Path, steps=200, seed=0, goldfish=True, nan_from=None, resume=None, lr=1e-3, text="f(x):\n    ok"
):
    """A run as the training loop would write it, with curves that look like training."""
    rng = np.random.default_rng(seed)
    for first, last in [(0, steps)] if resume is None else [(0, resume), (resume, steps)]:
        with RunLog(folder, LogConfig(every=1000), steps, first) as log:
            log.write("start", first, time=1.79e9 + first, devices="8 x TFRT_CPU", parameters=10_642_176)
            if first == 0:
                log.write("eval", 0, split="validation", loss=5.5, perplexity=244.7, bits_per_byte=4.2)
            for step in range(first + 10, last + 1, 10):
                loss = 1.5 + 4 * math.exp(-step / 60) + 0.05 * rng.normal()
                if nan_from and step >= nan_from:
                    loss = math.nan
                values = dict(loss=loss, grad_norm=1 + rng.random(), lr=lr * (1 - step / (steps + 1)),
                              tokens=step * 8192, tokens_per_second=18e3 + rng.normal() * 500, mfu=None,
                              memory_bytes=1.2 * 2**30, data_wait=0.01, seconds=step * 0.4)  # fmt: skip
                if goldfish:
                    values |= dict(
                        loss_kept=loss, loss_dropped=loss + 0.1, loss_all=loss + 0.02, kept_fraction=0.75
                    )
                log.train(step, values)
                if step % 50 == 0:
                    log.write(
                        "eval", step, split="validation", loss=loss + 0.1, perplexity=9.0, bits_per_byte=1.7
                    )
                    log.write("sample", step, prompt="def ", text=text)
            if last == steps:
                log.close(summary(read_metrics(folder), folder))
    config = {
        "seed": seed,
        "optim": {"lr": lr, "betas": [0.9, 0.95]},
        "data": {"sources": [{"kind": "text"}]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.12.1", "note": HOSTILE}))
    return folder


class Page(HTMLParser):
    """What a browser's parser sees: the tags and attributes, the text and the scripts."""

    VOID = {"meta", "input", "br", "path"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.stack, self.text, self.scripts, self.bad = [], [], [], [], []
        self.feed(text)
        self.close()
        self.words = " ".join("".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.bad.append(tag)

    def handle_data(self, data):
        inside = self.stack[-1] if self.stack else ""
        if inside == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif inside != "style":
            self.text.append(data)

    def faults(self) -> list[str]:
        """Everything that would make this page unsafe or not self-contained."""
        found = [f"closed wrongly: {t}" for t in self.bad] + [f"left open: {t}" for t in self.stack]
        for tag, attrs in self.tags:
            if tag in ("img", "link", "iframe", "object", "base", "form", "a"):
                found.append(f"<{tag}>")
            found += [f"{tag} {k}" for k in attrs if k.startswith("on") or k in ("src", "href", "srcset")]
        programs = [s for attrs, s in self.scripts if attrs.get("type") != "application/json"]
        found += [] if len(programs) == 1 else [f"{len(programs)} scripts"]
        return found


def report(*folders: Path) -> tuple[str, Page]:
    out = write_report(folders, folders[0].parent / "page.html")
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


# ---- charts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 2000, [0, 500, 1000, 1500, 2000]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.03, 0.11, [0, 0.05, 0.1]),
     (3.1, 3.2, [3.1, 3.12, 3.14, 3.16, 3.18, 3.2]), (1e-9, 3e-9, [1e-9, 1.5e-9, 2e-9, 2.5e-9, 3e-9]),
     (5, 5, [5])],
)  # fmt: skip
def test_nice_ticks(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)
    assert all(len(repr(float(t))) < 9 for t in nice_ticks(low, high))  # no 0.30000000000000004


def test_log_ticks():
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(1, 20) == [1, 2, 5, 10, 20]
    assert len(log_ticks(1e-30, 1e30)) <= 8
    assert log_ticks(1.1, 1.4) == pytest.approx([1.1, 1.2, 1.3, 1.4])


@pytest.mark.parametrize(
    "v, text",
    [
        (0, "0"),
        (0.0003, "3e-4"),
        (1.5e-9, "1.5e-9"),
        (0.05, "0.05"),
        (3.5, "3.5"),
        (1500, "1.5k"),
        (2e6, "2M"),
    ],
)
def test_format_tick(v, text):
    assert format_tick(v) == text


def test_axis_places_values_and_refuses_what_a_logarithm_cannot_show():
    assert Axis(0, 10).place(np.array([0, 5, 10])).tolist() == [0, 0.5, 1]
    placed = Axis(1, 100, True).place(np.array([1, 10, 100, 0, -1]))
    assert placed[:3] == pytest.approx([0, 0.5, 1]) and np.isnan(placed[3:]).all()


def test_downsample_keeps_extremes_order_and_gaps():
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[[12_345, 54_321]] = 50, -50
    y[70_000:80_000] = np.nan
    a, b = downsample(x, y, 1000)
    assert len(a) <= 1000 and (np.diff(a) > 0).all() and a[0] == 0 and a[-1] == x[-1]
    assert {(12_345.0, 50.0), (54_321.0, -50.0)} <= set(zip(a.tolist(), b.tolist(), strict=True))
    assert np.isnan(b[(a > 70_200) & (a < 79_800)]).all() and np.isnan(b).any()
    assert np.array_equal(b[np.isfinite(b)], y[a[np.isfinite(b)].astype(int)])
    # The known-wrong way, every n-th point, misses a spike.
    assert 50 not in y[:: len(y) // 1000]
    same = downsample(x[:10], y[:10], 1000)
    assert np.array_equal(same[0], x[:10])


def svg_of(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", chart, re.S)[0])


def test_line_chart_draws_a_gap_at_nan_and_says_so():
    y = np.array([1.0, 2.0, math.nan, 3.0, math.inf, 4.0])
    chart = line_chart("Loss", [Series("a<b", np.arange(6.0), y)])
    curve = next(p for p in svg_of(chart) if p.get("class") == "line").get("d")
    assert curve.count("M") == 3 and curve.count("L") == 1 and "nan" not in curve
    assert "a&lt;b: 2 values not finite, first at step 2" in chart
    dots = next(p for p in svg_of(chart) if p.get("class") == "dot").get("d")
    assert dots.count("M") == 2  # the two points without a neighbour
    whole = line_chart("Loss", [Series("a", np.arange(6.0), np.arange(6.0))])
    assert (
        "not finite" not in whole
        and next(p for p in svg_of(whole) if p.get("class") == "line").get("d").count("M") == 1
    )


def test_line_chart_of_nothing():
    nothing = np.zeros(0)
    assert "nothing to draw" in line_chart("Loss", [])
    assert "nothing to draw" in line_chart("Loss", [Series("a", np.arange(2.0), np.full(2, np.nan))])
    assert "nothing to draw" in line_chart("Loss", [Series("a", nothing, nothing)], log_x=True, log_y=True)
    # Step 0 has no place on a logarithmic axis, and a loss of 0 neither.
    chart = line_chart(
        "Loss", [Series("a", np.arange(4.0), np.array([9.0, 0, 2, 1]))], log_x=True, log_y=True
    )
    assert next(p for p in svg_of(chart) if p.get("class") == "line").get("d").startswith("M631 ")


# ---- pages -------------------------------------------------------------------------------------


def test_one_run(tmp_path):
    text, page = report(make_run(tmp_path / "night-1", resume=100))
    assert page.faults() == []
    for words in ("night-1", "10.6M", "finished at step 200", "from 5.500 at step 0", "resumed once", "n/a",
                  "train, dropped tokens", "train, kept tokens", "validation", "optim.lr",
                  "data.sources.0.kind",
                  "continued from step 100 at 2026-09-21", "8 x TFRT_CPU", "def f(x)", "3.12.1"):  # fmt: skip
        assert words in page.words, words
    assert len(text) < 100_000
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text and "@import" not in text
    for path in [a["d"] for tag, a in page.tags if tag == "path"]:
        assert re.fullmatch(r"[MLHVh0-9 -]*", path), path


def test_the_policy_allows_exactly_the_pages_own_script(tmp_path):
    import base64
    import hashlib

    _, page = report(make_run(tmp_path / "run"))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    (program,) = [s for attrs, s in page.scripts if attrs.get("type") != "application/json"]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def hostile_run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "a<b>&'\"</script>", text=HOSTILE)
    config = {"name": HOSTILE, HOSTILE: 1}
    (folder / "config.json").write_text(json.dumps(config))
    with RunLog(folder, LogConfig(), 200, 200) as log:
        log.write("start", 200, devices=HOSTILE)
        log.write("eval", 200, split=HOSTILE, loss=2.0)
        log.write("sample", 200, prompt=HOSTILE, text=HOSTILE)
    return folder


def test_text_of_a_run_stays_text(tmp_path):
    text, page = report(hostile_run(tmp_path), make_run(tmp_path / "other"))
    assert page.faults() == []
    assert "<img" not in text and "\x00" not in text and "\x1b" not in text
    assert "</script><script>alert(1)</script><img src=x onerror=alert(2)>" in page.words
    for attrs, data in page.scripts:
        if attrs.get("type") == "application/json":
            assert json.loads(data)["series"]


def test_an_unescaped_page_would_be_caught(tmp_path, monkeypatch):
    folder = hostile_run(tmp_path)
    monkeypatch.setattr(page_module, "escape", lambda value: str(value).replace("\ud800", ""))
    _, page = report(folder)
    assert "<img>" in page.faults() and "img onerror" in page.faults()


def test_three_runs_show_what_differs(tmp_path):
    runs = [
        make_run(tmp_path / "a", seed=0),
        make_run(tmp_path / "b", seed=1, lr=6e-4, goldfish=False),
        make_run(tmp_path / "c", seed=2, goldfish=False, nan_from=120),
    ]
    text, page = report(*runs)
    assert page.faults() == [] and "3 runs compared" in page.words
    table = re.search(r"<table class=\"fields\"><tr><th>differs.*?</table>", text)[0]
    assert "optim.lr" in table and "seed" in table and "betas" not in table and "0.0006" in table
    assert "c train: 9 values not finite, first at step 120" in page.words
    assert "nan last record, step 200" in page.words
    assert page.words.count("last record, step 200") == 3


def test_differing_is_as_strict_as_json():
    assert differing([{"a": 1, "b": 2}, {"a": 1.0, "c": None}]) == {"a": [1, 1.0], "b": [2, None]}
    assert differing([{"a": True}, {"a": 1}]) == {"a": [True, 1]}
    assert differing([{"a": [1, 2]}, {"a": [1, 2]}]) == {}


@pytest.mark.parametrize(
    "lines",
    [
        ['{"kind": "train", "step": 1, "loss": 3.0, "lr": 0.001}'],
        ['{"kind": "train", "step": 1, "loss": "nan"}'],
        ['{"kind": "eval", "step": 0, "split": "validation", "loss": 3.0}'],
        ['{"kind": "start", "step": 0}'],
        [],
    ],
)
def test_a_run_that_has_hardly_begun(tmp_path, lines):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(x + "\n" for x in lines))
    _, page = report(tmp_path / "run")
    assert page.faults() == [] and "no end recorded" in page.words and "no config.json" in page.words


def test_a_long_run_stays_small(tmp_path):
    text, page = report(make_run(tmp_path / "long", steps=30_000))
    assert page.faults() == [] and len(text) < 300_000
    assert "12 of 600 sampled steps" in page.words


# ---- the command -------------------------------------------------------------------------------


def test_command_writes_where_it_says(tmp_path, capsys, monkeypatch):
    a, b = make_run(tmp_path / "x" / "run", steps=20), make_run(tmp_path / "y" / "run", steps=20)
    capsys.readouterr()
    assert run_report([str(a)]) == 0 and (a / "report.html").exists()
    assert f"wrote {a / 'report.html'} (" in capsys.readouterr().out
    assert run_report([str(a), str(b), "--out", str(tmp_path / "deep" / "c.html")]) == 0
    # Two folders of one name are told apart by their paths.
    assert (
        str(a) in (tmp_path / "deep" / "c.html").read_text()
        and str(b) in (tmp_path / "deep" / "c.html").read_text()
    )
    monkeypatch.chdir(tmp_path)
    assert run_report(["x/run", "y/run"]) == 0 and (tmp_path / "report.html").exists()
    first = (a / "report.html").read_bytes()
    run_report([str(a)])
    assert (a / "report.html").read_bytes() == first


def test_command_names_the_mistake(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder; give the folder of a run"):
        run_report([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: has no metrics.jsonl") as e:
        run_report([str(tmp_path / "empty")])
    assert "\n" not in str(e.value) and not list((tmp_path / "empty").iterdir())
    run = make_run(tmp_path / "run", steps=20)
    with pytest.raises(CheckpointError, match="cannot write the report .*--out"):
        run_report([str(run), "--out", str(run / "config.json" / "x.html")])
    (run / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        run_report([str(run)])
    (run / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: holds a list"):
        run_report([str(run)])


def test_help_is_there():
    code = "from lmjax.report import run_report; run_report(['--help'])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: lmjax report" in done.stdout and "--out FILE" in done.stdout


def test_picture_of_the_losses(tmp_path):
    """The SVG parses, has a curve for each loss, survives NaN, and tells each final value."""
    import xml.etree.ElementTree as ET

    from lmjax.report.figure import loss_figure

    lines = [{"kind": "train", "step": s, "loss": 5 / s, "loss_kept": 5 / s, "loss_dropped": 6 / s}
             for s in range(1, 60)]
    lines[7]["loss_kept"] = "nan"
    lines += [{"kind": "eval", "step": 0, "loss": 7.0, "split": "validation"},
              {"kind": "eval", "step": 59, "loss": 1.25, "split": "validation"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    svg = ET.fromstring(loss_figure(tmp_path, "<run> & co"))
    assert len(svg.findall(".//{*}polyline")) == 3
    texts = [t.text for t in svg.findall(".//{*}text")]
    assert "<run> & co" in texts and "validation 1.25" in texts
    (tmp_path / "metrics.jsonl").write_text("")
    ET.fromstring(loss_figure(tmp_path, "nothing yet"))
