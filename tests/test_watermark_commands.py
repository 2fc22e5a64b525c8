"""`lmjax watermark …`: secrets from files and the environment only, detection without JAX, edits and measures."""

import json
import stat
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from lmjax.cli import main
from lmjax.decode.marks import KEY_VARIABLE, Watermark, watermark_of, words_of
from lmjax.evals.ranking import auc
from lmjax.watermark.roc import EDITS, edit, measure_scheme, repeated, table, tpr_at

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def key(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    path = tmp_path / "key"
    path.write_bytes(SECRET + b"\n")
    return str(path)


def marked_text(scheme="gumbel", length=120):
    """ASCII in which each letter is the one whose word scores best of eight drawn ones."""
    w, rng, text = Watermark(scheme, SECRET), np.random.default_rng(0), list(b"once")
    for _ in range(length):
        letters = rng.integers(97, 123, 8)
        words = words_of(w, np.tile(text[-4:], (8, 1)), letters)
        text.append(int(letters[words.argmin()]))
    return bytes(text).decode()


def said(capsys, *args):
    assert main([str(a) for a in args]) == 0
    return capsys.readouterr().out


def refused(capsys, *args):
    code = main([str(a) for a in args])
    error = capsys.readouterr().err
    assert "0123456789" not in error, "a secret is never shown"
    return code, error


def test_a_new_secret_is_for_its_owner(tmp_path, capsys):
    path = tmp_path / "new"
    said(capsys, "watermark", "key", path)
    assert len(path.read_text().strip()) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_text()
    assert refused(capsys, "watermark", "key", path)[0] == 2 and path.read_text() == before


@pytest.mark.parametrize("scheme", ["kgw", "gumbel"])
def test_detect(key, capsys, tmp_path, scheme):
    file = tmp_path / "text"
    file.write_text(marked_text(scheme))
    args = ("watermark", "detect", "bytes", "--scheme", scheme, "--key-file", key)
    found = json.loads(said(capsys, *args, "--file", file, "--json"))
    assert found["tokens"] == 124 and found["scored"] <= 120 and found["p_value"] < 1e-9
    assert f"p-value    {found['p_value']:.2g}" in said(capsys, *args, "--text", marked_text(scheme))
    assert json.loads(said(capsys, *args, "--file", file, "--json", "--context", "3"))["p_value"] > 1e-3


def test_the_secret_in_the_environment_is_the_same(key, capsys, monkeypatch):
    args = ("watermark", "detect", "bytes", "--scheme", "gumbel", "--text", marked_text(), "--json")
    by_file = said(capsys, *args, "--key-file", key)
    monkeypatch.setenv(KEY_VARIABLE, SECRET.decode())
    assert said(capsys, *args) == by_file
    code, error = refused(capsys, *args, "--key-file", key)
    assert code == 2 and "is set too" in error


def test_detection_needs_no_jax(key):
    code = (f"import sys; from lmjax.cli import main; main(['watermark', 'detect', 'bytes', '--scheme', 'kgw', "
            f"'--key-file', {key!r}, '--text', 'some text that nobody marked']); "
            "print([m for m in ('jax', 'flax', 'scipy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "p-value" in done.stdout


@pytest.mark.parametrize("args,code,words", [
    (("--scheme", "best"), 2, "choose one of kgw"),
    (("--scheme", "gumbel", "--gamma", "0.5"), 2, "--gamma 0.5: has no effect with --scheme gumbel"),
    (("--scheme", "kgw", "--layers", "3"), 2, "--layers 3: has no effect"),
    (("--scheme", "kgw", "--gamma", "2"), 2, "gamma=2.0"),
    (("--scheme", "kgw", "--context", "0"), 2, "context=0"),
    (("--scheme", "kgw", "--context", "9"), 3, "9 tokens"),
    (("--scheme", "kgw", "--key-file", "nowhere"), 2, "nowhere: cannot read"),
])
def test_what_detect_refuses(key, capsys, args, code, words):
    got, error = refused(capsys, "watermark", "detect", "bytes", "--text", "9 letters", "--key-file", key, *args)
    assert got == code and words in error and error.count("\n") == 1


def test_bad_secrets_and_texts(key, capsys, tmp_path):
    got, error = refused(capsys, "watermark", "detect", "bytes", "--text", "x", "--scheme", "kgw")
    assert got == 2 and KEY_VARIABLE in error
    short = tmp_path / "short"
    short.write_bytes(b"0123456789\n")
    assert "has 10 bytes" in refused(capsys, "watermark", "detect", "bytes", "--scheme", "kgw", "--key-file", short)[1]
    (tmp_path / "text").write_bytes(b"ab\xff")
    got, error = refused(capsys, "watermark", "detect", "bytes", "--scheme", "kgw", "--key-file", key, "--file",
                         tmp_path / "text")
    assert got == 3 and "byte 2" in error
    assert "no such command" in refused(capsys, "watermark", "find")[1]


def test_generate_hands_the_watermark_on(key, capsys, monkeypatch):
    import lmjax.runs

    requests = []
    monkeypatch.setattr(lmjax.runs, "generate_from_run", lambda path, request, *rest: requests.append(request))
    args = ("generate", "somewhere", "--watermark", "kgw", "--watermark-key-file", key)
    said(capsys, *args, "--watermark-gamma", "0.5", "--watermark-context", "2")
    assert requests[0].watermark == Watermark("kgw", SECRET, 2, 0.5)
    said(capsys, "generate", "somewhere")
    assert requests[1].watermark is None
    for bad, words in ((("--watermark-layers", "3"), "--watermark-layers 3: has no effect with --watermark kgw"),
                       (("--watermark", ""), "--watermark-key-file")):
        assert words in refused(capsys, *args, *bad)[1]
    assert watermark_of("") is None


# ---- Edits and measures --------------------------------------------------------------------------------


def test_edits():
    tokens, other, rng = np.arange(1000), np.full(1500, -1), np.random.default_rng(0)
    for kind, rates in EDITS.items():
        for rate in rates:
            out = edit(tokens, kind, rate, rng, other)
            kept = out[out >= 0]
            size = {"delete": 1 - rate, "crop": 1 - rate, "insert": 1 + rate}.get(kind, 1) * 1000
            share = {"insert": 1.0}.get(kind, 1 - rate)
            assert abs(len(out) - size) < 60 and abs(len(kept) - share * 1000) < 60, (kind, rate)
            assert (np.diff(kept) > 0).all()
            if kind in ("dilute", "crop"):
                assert (np.diff(kept) == 1).all()
            if kind == "substitute":
                assert (kept == tokens[out >= 0]).all()


def test_measures():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 200), rng.integers(0, 9, 300) - 2
    brute = np.mean([(x > y) + (x == y) / 2 for x in a for y in b])
    assert auc(a, b) == pytest.approx(brute) and auc(b, a) == pytest.approx(1 - brute)
    assert tpr_at(np.array([1.0, 5.0]), np.arange(101) / 25) == 0.5
    assert repeated(np.tile(np.arange(4), 2)) == pytest.approx(0.2) and repeated(np.arange(9)) == 0


def test_a_scheme_is_measured():
    texts = [np.frombuffer(marked_text(length=80).encode(), np.uint8).astype(np.int64)] * 4
    plain = [np.random.default_rng(i).integers(97, 123, 84) for i in range(12)]
    result = measure_scheme(texts, [Watermark("gumbel", SECRET)] * 4, plain, None, 0)
    rows = {(kind, rate): rest for kind, rate, *rest in result["edits"]}
    assert rows["none", 0.0][0] == 1.0 and rows["none", 0.0][2] < -8 and result["false_positives"] < 0.04
    assert rows["none", 0.0][2] < rows["substitute", 0.1][2] < rows["substitute", 0.5][2]
    wrong = measure_scheme(texts, [Watermark("gumbel", SECRET[::-1])] * 4, plain, None, 0)
    assert wrong["edits"][0][2] < 1.0 or wrong["edits"][0][4] > -2
    shown = table({"none": {"nats": 1.0, "repeated": 0.0}, "gumbel": result | {"nats": 1.0, "repeated": 0.0}})
    assert "| substitute 10% |" in shown and shown.count("\n") == 5 + 2 + len(result["edits"])
