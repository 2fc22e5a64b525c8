"""`lmjax score` and `lmjax analyze`: what the commands print and write, and pages that no text can break out of."""

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers import random_model, write_corpus
from test_report import Page

from lmjax.analyze.heatmap import LEVELS, STATISTICS, level
from lmjax.analyze.loops import loops_page
from lmjax.cli import main
from lmjax.data import ByteTokenizer, train_bpe
from lmjax.errors import ConfigError
from lmjax.evals.positions import by_stretch, extended, losses_by_position, restarted, stretches
from lmjax.evals.score import score_documents
from lmjax.evals.windows import WindowConfig
from lmjax.interop.hf import write_hf
from lmjax.interop.load import open_model
from lmjax.models import ComputeConfig, DecoderConfig, RopeScaling

HOSTILE = ("</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"' é \x00\x1b[31m\u202e ]]> "
           "<!-- 日本 -->\n\n  x")
CONFIG = DecoderConfig(vocab_size=320, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, max_seq_len=64,
                       norm_eps=1e-5)


def params_of(config: DecoderConfig) -> dict:
    return nnx.to_pure_dict(nnx.split(random_model(config, spread=0.5))[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models with and without a bos in front of every text, and texts."""
    root = tmp_path_factory.mktemp("analyze")
    bpe = train_bpe(["the model reads what it wrote, and writes 1234 things it read"], 280)
    write_hf(root / "bytes", CONFIG, params_of(CONFIG), ByteTokenizer(), add_bos=True)
    write_hf(root / "bpe", CONFIG, params_of(CONFIG), bpe)
    write_corpus(root / "text", 6)
    (root / "hostile.txt").write_text(HOSTILE, newline="")
    return root


def score(folder: Path, model: str, *args: str, out: str = "out") -> tuple[dict, list[list[str]], str]:
    """(JSON, CSV, HTML) of a call."""
    files = {kind: folder / f"{out}.{kind}" for kind in ("json", "csv", "html")}
    written = [arg for kind, path in files.items() for arg in (f"--{kind}", str(path))]
    assert main(["score", str(folder / model), *args, *written]) == 0
    with files["csv"].open(newline="") as lines:
        return json.loads(files["json"].read_text()), list(csv.reader(lines)), files["html"].read_text()


# ---- score -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, given", [("bytes", 0), ("bpe", 1)])
def test_files_say_what_the_pass_gave(folder, model, given, capsys):
    found, lines, _ = score(folder, model, "--file", str(folder / "text"), "--text", HOSTILE)
    assert len(found["texts"]) == 7
    opened = open_model(folder / model)
    ids = opened.encode(HOSTILE)
    (stats,) = score_documents(opened.graphdef, opened.params, [ids], WindowConfig(64))
    tokens = found["texts"][0]["tokens"]
    assert "".join(tokens["text"]) == HOSTILE and found["texts"][0]["exact"]
    assert tokens["id"] == opened.tokenizer.encode(HOSTILE).tolist()
    assert tokens["surprisal"][:given] == [None] * given and None not in tokens["surprisal"][given:]
    np.testing.assert_allclose(tokens["surprisal"][given:], stats["surprisal"], rtol=1e-4)
    assert tokens["rank"][given:] == stats["rank"].tolist()
    assert [len(top) for top in tokens["top_ids"][given:]] == [5] * len(stats["rank"])
    nats = sum(n for text in found["texts"] for n in text["tokens"]["surprisal"] if n is not None)
    size = sum(b for text in found["texts"] for b in text["tokens"]["bytes"][given:])
    assert found["totals"]["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    if not given:
        assert size == len(HOSTILE.encode()) + sum(f.stat().st_size for f in (folder / "text").iterdir())
    heading, *rows = lines
    assert len(rows) == sum(len(text["tokens"]["id"]) for text in found["texts"])
    assert "".join(row[heading.index("text")] for row in rows[:len(ids) if given else len(ids) - 1]) == HOSTILE
    assert sum(float(row[heading.index("surprisal")] or 0) for row in rows) == pytest.approx(nats, rel=1e-4)
    said = capsys.readouterr().out
    assert f"perplexity      {found['totals']['perplexity']:,.4g} " in said and "000.txt" in said
    assert "\x1b" not in said and "\x00" not in said


class Reader(HTMLParser):
    """The text of each token of the page, as a browser reads it."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tokens, self.inside, self.paragraph = [], False, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "p":
            self.paragraph = ("class", "text") in attrs
        if tag == "i" and self.paragraph:
            self.inside = True
            self.tokens.append(["", dict(attrs)["class"]])

    def handle_endtag(self, tag):
        if tag == "i":
            self.inside = False
        if tag == "p":
            self.paragraph = False

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1][0] += data


def test_no_text_breaks_out_of_the_page(folder):
    _, _, html = score(folder, "bytes", "--file", str(folder / "hostile.txt"), "--text", HOSTILE)
    assert not Page(html).faults() and not re.search(r"url\(|@import", html)
    assert "default-src 'none'" in html and html.count("<script>") == 1
    shown = "".join(text for text, _ in Reader(html).tokens)
    clean = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert shown == clean + clean, "the page must show the text, all of it and nothing else"
    assert Page(html.replace("&lt;img", "<img")).faults(), "the check must see what is not escaped"


def test_colours_are_those_of_the_numbers(folder):
    found, _, html = score(folder, "bpe", "--text", "the model wrote é\r\n" * 40)
    tokens, shown = found["texts"][0]["tokens"], Reader(html).tokens
    assert len(shown) == len(tokens["id"]) and shown[0][1] == "g"
    for s in STATISTICS:
        levels = level(s, np.array(tokens[s.key][1:], float))
        assert all(f"{s.letter}{n}" in classes.split() for n, (_, classes) in zip(levels, shown[1:], strict=True))
        assert len(s.edges) == LEVELS - 1 and f"#by-{s.letter}:checked~main .{s.letter}{LEVELS - 1}{{" in html
    half = [i for i, text in enumerate(tokens["text"]) if not text]
    assert half and all("b" in shown[i][1].split() for i in half)
    blocks = re.findall(r'<script type="application/json" class="tokens">(.*?)</script>', html)
    data = json.loads(blocks[0])
    assert data["s"][0] is None and data["s"][5] == pytest.approx(tokens["surprisal"][5], abs=1e-3)
    words = json.loads(re.search(r'id="vocabulary">(.*?)</script>', html)[1])
    assert {str(i) for top in data["t"][1:] for i in top} <= set(words) and words[str(tokens["id"][5])]
    assert "Along the text" in html and "Most surprising tokens" in html


def test_a_large_text_is_cut_on_the_page_and_nowhere_else(folder, monkeypatch):
    monkeypatch.setattr("lmjax.analyze.heatmap.PAGE_TOKENS", 50)
    found, _, html = score(folder, "bytes", "--text", "the model " * 20, "--stride", "16", "--context", "32")
    assert found["totals"]["tokens"] == 200 and len(Reader(html).tokens) == 50
    assert "the first 50 of 200 tokens" in html and found["least_context"] == 17
    limited, _, _ = score(folder, "bytes", "--text", "the é model " * 20, "--text", "b", "--limit", "5")
    assert limited["totals"]["tokens"] == 5 and limited["texts"][0]["tokens"]["text"] == [*"the ", ""]


@pytest.mark.parametrize("args, words", [
    ([], "nothing to score"), (["--text", ""], "--text number 1 is empty"),
    (["--text", "a", "--limit", "0"], "--limit 0"),
    (["--text", "a", "--context", "65"], "max_seq_len=64"), (["--text", "a", "--stride", "99"], "stride=99"),
    (["--text", "a", "--step", "3"], "no training run"), (["--file", "missing.txt"], "no such file"),
    (["--text", "a", "--html", "no/such/page.html"], "its folder does not exist"), (["--text", "\ud800"], "surrogate"),
])
def test_mistakes_get_one_line(folder, args, words, capsys):
    assert main(["score", str(folder / "bytes"), *args]) in (2, 3)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and words in error[0]


# ---- loops -----------------------------------------------------------------------------------------------


def test_loops_of_a_model(folder, capsys):
    out = folder / "loops.json"
    args = ["analyze", "loops", str(folder / "bytes"), "--prompt", "the ", "--file", str(folder / "text"), "--prompts",
            "3", "--kinds", "text,random", "--new", "30", "--prompt-tokens", "8", "--json", str(out), "--html",
            str(folder / "loops.html")]
    assert main(args) == 0
    found = json.loads(out.read_text())
    by_kind = {row["kind"]: row for row in found["results"]}
    assert by_kind["text"]["count"] == 4 and by_kind["random"]["count"] == 3
    for row in found["results"]:
        looping = [one for one in row["continuations"] if one["cycle"]]
        assert row["looping"] == pytest.approx(len(looping) / row["count"])
        assert sum(row["periods"].values()) == len(looping)
        for one in looping:  # bytes: the text is as long as its tokens, but for bytes that are no character
            assert one["cycle"]["repeats"] >= 3 and one["cycle"]["onset"] < one["tokens"] <= 30
    assert "looping" in capsys.readouterr().out
    page = Page((folder / "loops.html").read_text())
    assert "Looping continuations" in page.words and not page.faults()
    settings = {"model": HOSTILE, "new": 3, "repeats": 3, "seq_rep_of_text": None}
    one = dict(by_kind["text"]["continuations"][0], prompt=HOSTILE, text=HOSTILE)
    assert not Page(loops_page(settings, [dict(by_kind["text"], continuations=[one])])).faults()


@pytest.mark.parametrize("args, words", [
    (["--kinds", "text"], "held no text out"), (["--kinds", "ngram"], "'ngram' is not known"),
    (["--steps", "3"], "no training run"), (["--new", "64", "--kinds", "random"], "max_seq_len=64"),
    (["--kinds", "random", "--prompt", "a"], "no effect without"), (["--repeats", "1"], "--repeats 1"),
])
def test_loops_mistakes_get_one_line(folder, args, words, capsys):
    assert main(["analyze", "loops", str(folder / "bytes"), *args]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and words in error[0]


# ---- positions -------------------------------------------------------------------------------------------


def test_each_way_to_extend_is_what_it_says():
    assert stretches(16, 64, 2) == [8, 16, 24, 32, 40, 48, 56, 64] and stretches(16, 40, 1) == [16, 32, 40]
    plain = dataclasses.replace(CONFIG, max_seq_len=16)
    params, compute = params_of(plain), ComputeConfig()
    rows, ends = np.random.default_rng(0).integers(0, 320, (2, 49)).astype(np.int32), [16, 32, 48]
    losses = {kind: losses_by_position(extended(plain, kind, 3.0, 16, 48), compute, params, rows, ends)
              for kind in ("none", "ntk", "dynamic", "yarn")}
    again = restarted(plain, compute, params, rows, 16)
    # Up to the trained length, no extension and the dynamic one are the model itself; later, all are different.
    for same in (losses["dynamic"], again):
        np.testing.assert_allclose(same[:, :16], losses["none"][:, :16], rtol=1e-5)
    assert all(np.abs(losses[kind] - losses["none"])[:, :16].max() > 1e-3 for kind in ("ntk", "yarn"))
    last = [values[:, 32:] for values in (losses["none"], losses["ntk"], losses["yarn"], again)]
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(last) for b in last[:i])
    # The last stretch of dynamic is NTK with the factor of the whole row; the one before has a smaller factor.
    np.testing.assert_allclose(losses["dynamic"][:, 32:], losses["ntk"][:, 32:], rtol=1e-4, atol=1e-5)
    assert np.abs(losses["dynamic"] - losses["ntk"])[:, 16:32].max() > 1e-4
    two = dataclasses.replace(plain, max_seq_len=48, rope_scaling=RopeScaling("ntk", 2.0))
    at_two = losses_by_position(two, compute, params, rows[:, :33], [32])
    np.testing.assert_allclose(losses["dynamic"][:, 16:32], at_two[:, 16:], rtol=1e-4, atol=1e-5)
    mean, error = by_stretch(losses["none"], ends)
    assert mean[1] == pytest.approx(losses["none"][:, 16:32].mean(), rel=1e-6) and (error > 0).all()
    assert np.isnan(by_stretch(losses["none"][:1], ends)[1]).all()
    for wrong in (dataclasses.replace(plain, positions="learned"), two, dataclasses.replace(plain, windows=(8,))):
        with pytest.raises(ConfigError, match="extend"):
            extended(wrong, "yarn", 4.0, 16, 64)


def test_positions_of_a_model(folder, capsys, monkeypatch):
    monkeypatch.setattr("lmjax.analyze.positions.EXTENSIONS", ("none", "yarn"))  # each compiles programs of its own
    (folder / "long.txt").write_text("the model learns what it reads. " * 20)
    args = ["analyze", "positions", str(folder / "bytes"), "--trained", "16", "--file", str(folder / "long.txt"),
            "--rows", "4", "--buckets", "1", "--factor", "2", "--json", str(folder / "p.json"), "--html",
            str(folder / "p.html")]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "16 to 31" in said and "restart" in said and "yarn" in said
    found = json.loads((folder / "p.json").read_text())
    assert found["ends"] == [16, 32] and found["rows"] == 4
    none, again = (found["results"][kind]["mean"] for kind in ("none", "restart"))
    beyond = next(line for line in said.splitlines() if line.startswith("from 16 on")).split()
    assert beyond[3:5] == [f"{again[1]:.3f}", f"{none[1]:.3f}"]
    assert none[0] == pytest.approx(again[0], rel=1e-6) and none[1] != pytest.approx(again[1], rel=1e-4)
    assert not Page((folder / "p.html").read_text()).bad
    assert main([*args[:5], "--file", str(folder / "hostile.txt"), "--trained", "64"]) == 3
    assert "no text has 257 tokens" in capsys.readouterr().err
    assert main(["analyze", "positions", str(folder / "bytes")]) == 2
    assert main(["analyze", "sideways"]) == 2 and main(["analyze"]) == 0
    assert "loops MODEL" in capsys.readouterr().out
