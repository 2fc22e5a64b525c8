"""Overlap and copies: planted ones are all found, nothing else is, whatever the hash, the memory or the layout."""

import json

import numpy as np
import pytest

from lmjax.cli import main
from lmjax.data import SourceConfig, ngrams, train_bpe
from lmjax.data.dedup import dedup, jaccard, repeated, shingle_set
from lmjax.data.ngrams import Index, covered
from lmjax.data.overlap import cutter, overlap, without

VOCABULARY = [f"w{i}" for i in range(400)]


def text(rng, count):
    return " ".join(rng.choice(VOCABULARY, count))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return SourceConfig("jsonl", str(path))


def brute(a: list[list], b: list[list], n: int) -> list[list[bool]]:
    """Of each unit of A, whether it lies in an n-gram of B."""
    grams = {tuple(d[i:i + n]) for d in b for i in range(len(d) - n + 1)}
    found = []
    for d in a:
        mask = [False] * len(d)
        for i in range(len(d) - n + 1):
            if tuple(d[i:i + n]) in grams:
                mask[i:i + n] = [True] * n
        found.append(mask)
    return found


# ---- The index -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [None, 1, 5])
def test_index_equals_brute_force_even_where_hashes_collide(weak, monkeypatch):
    if weak:
        right = ngrams.window_hashes
        monkeypatch.setattr(ngrams, "window_hashes", lambda ids, n: right(ids, n) % np.uint64(weak))
    rng = np.random.default_rng(0)
    for n in (1, 2, 4):
        a, b = ([list(rng.integers(0, 6, rng.integers(0, 12))) for _ in range(30)] for _ in range(2))
        index = Index(n)
        for d in b:
            index.add(d)
        index.build()
        for d, wanted in zip(a, brute(a, b, n), strict=True):
            grams = index.find(d)
            assert covered(np.flatnonzero(grams >= 0), n, len(d)).tolist() == wanted
            for i in np.flatnonzero(grams >= 0):
                at = index.first[grams[i]]
                assert [index.numbers[u] for u in d[i:i + n]] == index.ids[at:at + n].tolist()
        distinct = {tuple(d[i:i + n]) for d in b for i in range(len(d) - n + 1)}
        assert len(index.first) == len(distinct) and index.gram.max(initial=-1) == len(distinct) - 1


# ---- Overlap -------------------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path):
    """A with passages of B in other case and layout: (A, B, {document of A: document of B}, texts of A)."""
    rng = np.random.default_rng(1)
    b = [text(rng, 40) for _ in range(20)]
    a, where = [], {}
    for i in range(60):
        words = text(rng, 80).split()
        if i % 3 == 0:
            number = int(rng.integers(20))
            start, size, at = int(rng.integers(0, 20)), int(rng.integers(13, 21)), int(rng.integers(0, 60))
            words[at:at] = b[number].upper().split()[start:start + size]
            where[i] = number
        a.append((", " if i % 2 else "\n  ").join(words))
    return write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b), where, a


@pytest.mark.parametrize("memory", [1 << 30, 48 * 100])
def test_recall_of_planted_overlaps_is_one_and_nothing_else_is_found(planted, memory):
    a, b, where, texts = planted
    side_a, side_b = overlap(a, b, cutter("words"), 13, memory)
    assert {hit.number for hit in side_a.hits} == set(where)
    assert {hit.number for hit in side_b.hits} == set(where.values())
    assert (side_a.documents, side_b.documents) == (60, 20) and side_b.units == 800
    for hit in side_a.hits:
        start, end = min(hit.spans)[0], max(hit.spans)[1]
        assert 13 <= hit.shared <= 22 and texts[hit.number][start:end].split()[0].strip(",").lower() in VOCABULARY


def test_every_unit_equals_brute_force(tmp_path):
    rng = np.random.default_rng(2)
    texts_a, texts_b = ([" ".join(rng.choice(["ab", "ba", "aab", "é"], 30)) for _ in range(10)] for _ in range(2))
    a, b = write(tmp_path / "a.jsonl", texts_a), write(tmp_path / "b.jsonl", texts_b)
    bpe = train_bpe(texts_a, 262)
    for cut in (cutter("words"), cutter("words", False), cutter("characters"), cutter("characters", False),
                cutter("tokens", tokenizer=bpe)):
        side_a, side_b = overlap(a, b, cut, 5, 48 * 70)
        words_a, words_b = ([list(cut(t).words) for t in texts] for texts in (texts_a, texts_b))
        for side, mine, other in ((side_a, words_a, words_b), (side_b, words_b, words_a)):
            wanted = [sum(mask) for mask in brute(mine, other, 5)]
            assert {hit.number: hit.shared for hit in side.hits} == {i: s for i, s in enumerate(wanted) if s}


def test_remove_and_cut(planted, tmp_path, capsys):
    a, b, where, texts = planted
    out, cut, report = tmp_path / "out.jsonl", tmp_path / "cut.jsonl", tmp_path / "report.json"
    outputs = ["--remove", str(out), "--cut", str(cut), "--json", str(report)]
    assert main(["data", "overlap", a.path, b.path, *outputs]) == 0
    assert f"{len(where)} of 60 documents overlap" in capsys.readouterr().out
    kept = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert kept == [t for i, t in enumerate(texts) if i not in where]
    for path, count in ((out, 60 - len(where)), (cut, 60)):
        side, _ = overlap(SourceConfig("jsonl", str(path)), b, cutter("words"), 13)
        assert side.documents == count and not side.hits
    found = json.loads(report.read_text())
    assert found["a"]["documents_with_overlap"] == len(where) and found["n"] == 13
    hit = found["a"]["hits"][0]
    assert without(texts[hit["number"]], hit["spans"]) in [json.loads(x)["text"] for x in cut.read_text().splitlines()]


@pytest.mark.parametrize("more,words", [
    (["--n", "0"], "--n 0"), (["--unit", "tokens"], "tokenizer"), (["--tokenizer", "bytes"], "tokenizer"),
    (["--memory", "0"], "--memory"), (["--threshold", "2"], "--threshold"), (["--threshold", "0.5"], "no effect"),
    (["--remove", "A"], "exists already"), (["--remove", "x", "--cut", "x"], "file of its own")])
def test_bad_options(tmp_path, more, words, capsys):
    path = str(tmp_path / "a.jsonl")
    write(tmp_path / "a.jsonl", ["some words"])
    assert main(["data", "overlap", path, path, *[path if m == "A" else m for m in more]]) == 2
    assert words in capsys.readouterr().err
    assert main(["data", "overlap", path, str(tmp_path / "nosuch")]) == 2
    assert "B: path" in capsys.readouterr().err


# ---- Copies --------------------------------------------------------------------------------------------


def test_exact_and_near_copies(tmp_path):
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(3)
    texts = [text(rng, 120) for _ in range(80)]
    copies = {}
    for i in range(0, 40, 2):
        words = texts[i].split()
        for j in rng.choice(len(words), 2, replace=False):
            words[j] = "changed"
        copies[len(texts)] = i
        texts.append(" ".join(words))
    for i in (1, 3, 5):
        copies[len(texts)] = i
        texts.append(texts[i].upper().replace(" ", "\n"))
    copies[len(texts)] = 0
    texts.append(texts[80].title())  # an exact copy of a near copy
    source = write(tmp_path / "a.jsonl", texts)
    found = dedup(source, near=0.6)
    truth = {(i, j) for j, i in copies.items()}
    assert {(c.of, c.number) for c in found.copies} <= truth, "no false positives"
    assert len(found.copies) >= 0.95 * len(copies)
    assert [c.rule for c in found.copies].count("exact") == 4
    assert found == dedup(source, near=0.6)
    for c in found.copies:
        if c.rule == "near":
            a, b = (shingle_set([w.lower() for w in texts[i].split()], 5) for i in (c.of, c.number))
            assert c.similarity == jaccard(a, b) >= 0.6
    assert {c.number for c in dedup(source).copies} == {100, 101, 102, 103}


def test_repeated_bytes_equal_brute_force():
    pytest.importorskip("pydivsufsort")
    rng = np.random.default_rng(4)
    for least in (1, 2, 3, 8):
        for _ in range(30):
            data = rng.choice(np.array([97, 98, 255], np.uint8), rng.integers(1, 60), p=[0.48, 0.48, 0.04])
            raw, wanted, seen = data.tobytes(), np.zeros(len(data), bool), set()
            for i in range(len(raw) - least + 1):
                window = raw[i:i + least]
                if b"\xff" in window:
                    continue
                if window in seen:
                    wanted[i:i + least] = True
                seen.add(window)
            np.testing.assert_array_equal(repeated(data, least), wanted)


def test_substring_and_the_command(tmp_path, capsys):
    pytest.importorskip("pydivsufsort")
    rng = np.random.default_rng(5)
    licence = text(rng, 60) + " ünïcode"
    texts = [f"{text(rng, 30)} {licence} {text(rng, 30)}" for _ in range(4)] + [text(rng, 30)]
    source = write(tmp_path / "a.jsonl", texts)
    out, report = tmp_path / "out.jsonl", tmp_path / "r.json"
    assert main(["data", "dedup", source.path, "--substring", "100", "--out", str(out), "--json", str(report)]) == 0
    assert "3 documents stand earlier" in capsys.readouterr().out
    kept = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert kept[0] == texts[0] and kept[4] == texts[4]
    assert all(licence not in t and len(t) >= len(texts[1]) - len(licence) - 12 for t in kept[1:4])
    assert len(json.loads(report.read_text())["cut"]) == 3
    assert main(["data", "dedup", source.path, "--substring", "3"]) == 2
    assert main(["data", "dedup", source.path, "--near", "7"]) == 2
