"""Sources: order, policies for bad bytes, and errors that name file, line and fix."""

import gzip
import hashlib
import json
import subprocess
import sys
import warnings
from collections import Counter

import pytest

from lmjax.data.sources import (
    SourceConfig,
    documents,
    file_manifest,
    source_files,
    source_key,
    stdlib_files,
)
from lmjax.errors import DataError


def texts(source, skipped=None):
    return [document.text for document in documents(source, Counter() if skipped is None else skipped)]


@pytest.fixture
def folder(tmp_path):
    for name, content in {"b.txt": b"second", "a/z.md": "fürst".encode(), ".git/x": b"\xff", "empty.py": b"",
                          "c.txt": b"\xef\xbb\xbfmarked\r\n"}.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "in"


def test_text_files_come_in_path_order_with_empty_ones_counted(folder):
    skipped = Counter()
    found = list(documents(SourceConfig("text", str(folder)), skipped))
    assert [tuple(document) for document in found] == [
        ("fürst", "a/z.md"), ("second", "b.txt"), ("marked\r\n", "c.txt")]
    assert skipped == {"empty": 1}
    with pytest.warns(UserWarning, match="1 documents of zero length") as caught:
        list(documents(SourceConfig("text", str(folder))))
    assert len(caught) == 1
    assert texts(SourceConfig("text", str(folder / "b.txt"))) == ["second"]
    assert texts(SourceConfig("text", str(folder / "*.txt"))) == ["second", "marked\r\n"]
    assert [file.name for file in source_files(SourceConfig("text", str(folder / "**" / "*.*")))] == [
        "a/z.md", "b.txt", "c.txt", "empty.py"]


def test_bytes_that_are_no_utf8_follow_the_policy(folder):
    (folder / "bad.txt").write_bytes(b"ab\xffcd")
    with pytest.raises(DataError, match=r"bad.txt: byte 2 is 0xff.*encoding_errors") as caught:
        texts(SourceConfig("text", str(folder)))
    assert "\n" not in str(caught.value)
    for policy, kept, reason in (("replace", 4, "replaced"), ("skip", 3, "undecodable")):
        skipped = Counter()
        found = texts(SourceConfig("text", str(folder), encoding_errors=policy), skipped)
        assert len(found) == kept and skipped[reason] == 1
        assert ("ab\ufffdcd" in found) == (policy == "replace")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_lines_are_documents(tmp_path, suffix):
    lines = ['\ufeff{"text": "one\\nline", "n": 1}', "", '{"text": ""}', '{"text": "two \\ud83d\\ude00"}']
    data = "\r\n".join(lines).encode()
    (tmp_path / f"x{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    skipped = Counter()
    found = [tuple(document) for document in documents(SourceConfig("jsonl", str(tmp_path)), skipped)]
    assert found == [("one\nline", f"x{suffix}:1"), ("two 😀", f"x{suffix}:4")]
    assert skipped == {"empty": 1}


@pytest.mark.parametrize("line, words", [
    (b"{bad", "not valid JSON at column 2"),
    (b"[1]", "a JSON list"),
    (b'{"body": "x", "id": 1}', "no field 'text'; set field to one of 'body', 'id'"),
    (b'{"text": 3}', "is a int, not a string"),
    (b'{"text": "\xff"}', "byte 10 is 0xff"),
    (b'{"text": "a\\ud800"}', r"character 1 is the lone surrogate U\+D800"),
    (b'{"text": ' + b"1" * 5000 + b"}", "JSON that cannot be read"),
    (b'{"text": ' + b"[" * 200_000, "JSON"),
])
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:2: .*{words}") as caught:
        texts(SourceConfig("jsonl", str(tmp_path / "x.jsonl")))
    assert "\n" not in str(caught.value)


def test_surrogates_follow_the_policy(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "good"}\n')
    path = str(tmp_path / "x.jsonl")
    assert texts(SourceConfig("jsonl", path, encoding_errors="replace")) == ["a\ufffdb", "good"]
    assert texts(SourceConfig("jsonl", path, encoding_errors="skip")) == ["good"]


def test_cut_off_gzip_is_named(tmp_path):
    data = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "x.jsonl.gz").write_bytes(data[:len(data) // 2])
    with pytest.raises(DataError, match="x.jsonl.gz: damaged gzip"):
        texts(SourceConfig("jsonl", str(tmp_path)))


def test_parquet_rows_are_documents(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = arrow.array([b"one", b"", None, b"t\xffo"], arrow.binary()).cast(arrow.large_binary())
    body = arrow.Array.from_buffers(arrow.large_string(), 4, raw.buffers())
    table = arrow.table({"body": body, "n": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "x.parquet")
    path = str(tmp_path / "x.parquet")
    skipped = Counter()
    replaced = SourceConfig("parquet", path, "body", encoding_errors="replace")
    assert texts(replaced, skipped) == ["one", "t\ufffdo"]
    assert skipped == {"empty": 2, "replaced": 1}
    with pytest.raises(DataError, match="row 3: byte 1 is 0xff"):
        texts(SourceConfig("parquet", path, "body"))
    with pytest.raises(DataError, match="no field 'text'; set field to one of 'body', 'n'"):
        texts(SourceConfig("parquet", path))
    with pytest.raises(DataError, match="'n' is int64, not a string"):
        texts(SourceConfig("parquet", path, "n"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(DataError, match="x.parquet: cannot be read as Parquet"):
        texts(SourceConfig("parquet", path, "body"))


def test_saved_datasets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["one", "", "two"], "n": [1, 2, 3]})
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(str(tmp_path / "both"))
    both = str(tmp_path / "both")
    assert texts(SourceConfig("hf", both)) == ["one", "two"]
    assert texts(SourceConfig("hf", both, split="test")) == ["two"]
    assert source_key(SourceConfig("hf", both)) != source_key(SourceConfig("hf", both, split="test"))
    with pytest.raises(DataError, match="no split 'dev'; set split to one of train, test"):
        texts(SourceConfig("hf", both, split="dev"))
    with pytest.raises(DataError, match="no field 'body'"):
        texts(SourceConfig("hf", both, "body"))
    with pytest.raises(DataError, match="is a int"):
        texts(SourceConfig("hf", both, "n"))


def test_a_missing_optional_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"'pyarrow'; run: pip install 'lmjax\[datasets\]'"):
        texts(SourceConfig("parquet", str(tmp_path)))


def test_a_source_without_documents_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match="holds no document, 1 empty"):
        texts(SourceConfig("text", str(tmp_path / "empty.txt")))
    with pytest.raises(DataError, match=r"no \.jsonl or .* found"):
        texts(SourceConfig("jsonl", str(tmp_path)))
    with pytest.raises(DataError, match="path = .*: no such file"):
        texts(SourceConfig("text", str(tmp_path / "none")))


def test_every_problem_is_found_at_once(tmp_path):
    assert SourceConfig().problems("p.") == []
    assert "did you mean 'jsonl'" in SourceConfig("json").problems("p.")[0]
    wrong = SourceConfig("text", str(tmp_path / "none"), "body", -1.0, "test", "x", "ignore")
    found = wrong.problems("data.sources[0].")
    assert [line.removeprefix("data.sources[0].").split()[0] for line in found] == [
        "path", "encoding_errors", "weight", "field", "split", "subset"]
    assert SourceConfig(weight=float("nan")).problems() and SourceConfig(weight=float("inf")).problems()
    assert SourceConfig("hf").problems()[0].startswith("path: is empty")
    assert SourceConfig(path="x").problems()[0].startswith("path = 'x'")


def test_the_key_follows_content_and_not_place(folder, tmp_path):
    source = SourceConfig("text", str(folder))
    key = source_key(source)
    assert key == source_key(source, file_manifest(source))
    folder.rename(tmp_path / "moved")
    moved = SourceConfig("text", str(tmp_path / "moved"))
    assert source_key(moved) == key
    assert source_key(SourceConfig("text", moved.path, encoding_errors="skip")) != key
    (tmp_path / "moved" / "b.txt").write_bytes(b"Second")  # the same size
    assert source_key(moved) != key


def test_the_standard_library_is_a_corpus():
    files = stdlib_files()
    names = [file.name for file in files]
    assert names == sorted(names) and len(names) > 300
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("site-packages", "test", "idlelib"))
    assert 8e6 < sum(file.size for file in files) < 16e6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = next(documents(SourceConfig()))
    assert first.name == "__future__.py" and "incompatible" in first.text
    listed = {file["name"]: file for file in file_manifest(SourceConfig())}
    argparse = next(file for file in files if file.name == "argparse.py")
    assert listed["argparse.py"]["sha256"] == hashlib.sha256(argparse.path.read_bytes()).hexdigest()


def test_stray_modules_do_not_enter_the_standard_library(tmp_path, monkeypatch):
    for name in ("argparse.py", "mine.py", "json/tests/x.py", "json/scanner.py", "site-packages/json.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert [file.name for file in stdlib_files()] == ["argparse.py", "json/scanner.py"]


def test_the_room_needs_no_jax():
    code = "import sys, lmjax.data, lmjax.data.commands; print('jax' in sys.modules)"
    path = json.dumps([entry for entry in sys.path if entry])
    found = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {code}"],
                           capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "False"


BAD_LINES = {"malformed": b"{broken", "no_field": b'{"other": 1}', "wrong_type": b'{"text": 7}',
             "undecodable": b'{"text": "\xff"}'}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_records_are_left_out_within_a_budget(tmp_path, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + (BAD_LINES[reason] + b"\n") * 3 + b'{"text": "fine"}\n')
    with pytest.raises(DataError, match="x.jsonl:2.*on_bad_record"):
        list(documents(SourceConfig("jsonl", str(path)), Counter()))
    counts = Counter()
    source = SourceConfig("jsonl", str(path), on_bad_record="skip", max_bad_records=3)
    assert [d.text for d in documents(source, counts)] == ["good", "fine"] and counts == {reason: 3}
    with pytest.raises(DataError, match="x.jsonl:2.*x.jsonl:3.*x.jsonl:4: more than|more than max_bad_records = 2"):
        list(documents(SourceConfig("jsonl", str(path), on_bad_record="skip", max_bad_records=2), Counter()))


def test_what_encoding_errors_leaves_out_has_no_budget(folder):
    source = SourceConfig("text", str(folder), encoding_errors="skip", on_bad_record="skip", max_bad_records=0)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    counts = Counter()
    assert list(documents(source, counts)) and counts["undecodable"] == 1


def test_a_file_that_is_broken_as_a_whole_is_no_record(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 5000)[:-30])
    with pytest.raises(DataError, match="damaged gzip"):
        list(documents(SourceConfig("jsonl", str(tmp_path / "x.jsonl.gz"), on_bad_record="skip"), Counter()))


def test_settings_of_bad_records_that_do_not_go_together(tmp_path):
    for more, word in (({"on_bad_record": "ignore"}, "must be one of error, skip"),
                       ({"max_bad_records": -1}, "negative"),
                       ({"max_bad_records": 5}, "has no effect"),
                       ({"kind": "pystdlib", "path": "", "on_bad_record": "skip"}, "has no effect on kind")):
        source = SourceConfig(**{"kind": "text", "path": str(tmp_path)} | more)
        assert any(word in problem for problem in source.problems()), more
