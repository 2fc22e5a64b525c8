"""Rows: every token predicted once, no row that looks across a document's border, reads across shards."""

import json

import numpy as np
import pytest

from lmjax.data.prepare import prepare
from lmjax.data.rows import Rows, cut, padding
from lmjax.data.shards import Tokens
from lmjax.data.sources import SourceConfig
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.errors import DataError

FIELDS = {"tokens": np.int32, "targets": np.int32, "segments": np.int32, "positions": np.int32,
          "weights": np.float32}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    texts = ["x" * (1 + n * 7 % 23) for n in range(40)]
    lines = [json.dumps({"text": f"{n}{text}"}) for n, text in enumerate(texts)]
    (folder / "x.jsonl").write_text("\n".join(lines))
    prepare(SourceConfig("jsonl", str(folder / "x.jsonl")), ByteTokenizer(), folder / "out",
            validation_fraction=0.1, workers=1, shard_bytes=50)
    return Tokens(folder / "out", "train")


def whole(tokens):
    """The stream and its document numbers, read without `Tokens`."""
    stream, numbers, count = [], [], 0
    for shard in tokens.shards:
        stream.append(np.load(tokens.folder / shard.file).astype(np.int32))
        lengths = np.diff(np.load(tokens.folder / shard.offsets_file))
        numbers.append(np.repeat(np.arange(count, count + len(lengths)), lengths))
        count += len(lengths)
    return np.concatenate(stream), np.concatenate(numbers)


def reference_row(stream, numbers, start, length):
    """The definition, token by token."""
    row = {name: np.zeros(length, dtype) for name, dtype in FIELDS.items()}
    segment, position = 1, 0
    for offset, at in enumerate(range(start, min(start + length, len(stream) - 1))):
        if offset and numbers[at] != numbers[at - 1]:
            segment, position = segment + 1, 0
        row["tokens"][offset], row["targets"][offset] = stream[at], stream[at + 1]
        row["segments"][offset], row["positions"][offset] = segment, position
        row["weights"][offset] = float(numbers[at] == numbers[at + 1])
        position += 1
    return row


def test_reads_cross_shards(tokens):
    stream, numbers = whole(tokens)
    assert len(tokens.shards) > 5 and len(tokens) == len(stream) and tokens.documents == numbers[-1] + 1
    rng = np.random.default_rng(0)
    for begin, end in [(0, len(stream) + 9), (5, 5), (len(stream), len(stream) + 1),
                       *np.sort(rng.integers(0, len(stream) + 1, (200, 2)), axis=1).tolist()]:
        found, document = tokens.read(begin, end)
        assert found.dtype == np.int32 and document.dtype == np.int64
        np.testing.assert_array_equal(found, stream[begin:end])
        np.testing.assert_array_equal(document, numbers[begin:end])
    for number in range(tokens.documents):
        np.testing.assert_array_equal(tokens.document(number), stream[numbers == number])
    with pytest.raises(IndexError):
        tokens.read(-1, 3)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 10_000])
@pytest.mark.parametrize("keep_tail", [False, True])
def test_rows_follow_the_definition(tokens, seq_len, keep_tail):
    stream, numbers = whole(tokens)
    rows = Rows(tokens, seq_len, keep_tail)
    for index in range(len(rows)):
        row, expected = rows[index], reference_row(stream, numbers, index * seq_len, seq_len)
        for name, dtype in FIELDS.items():
            assert row[name].dtype == dtype and row[name].shape == (seq_len,)
            np.testing.assert_array_equal(row[name], expected[name], err_msg=f"{name} of row {index}")
    with pytest.raises(IndexError):
        rows[len(rows)]


def total_weight(tokens, cut_row, seq_len):
    stream, numbers = whole(tokens)
    count = -(-(len(stream) - 1) // seq_len)
    return sum(cut_row(stream[i * seq_len:][:seq_len + 1], numbers[i * seq_len:][:seq_len + 1], seq_len)
               ["weights"].sum() for i in range(count))


@pytest.mark.parametrize("seq_len", [1, 3, 16, 10_000])
def test_every_token_but_bos_is_predicted_exactly_once(tokens, seq_len):
    rows = Rows(tokens, seq_len, keep_tail=True)
    found = sum(float(rows[index]["weights"].sum()) for index in range(len(rows)))
    assert found == len(tokens) - tokens.documents == total_weight(tokens, cut, seq_len)


def test_the_identity_catches_rows_that_predict_bos(tokens):
    def wrong(tokens_n, document_n, seq_len):
        return cut(tokens_n, document_n, seq_len) | {"weights": np.ones(len(tokens_n) - 1, np.float32)}

    assert total_weight(tokens, wrong, 16) != len(tokens) - tokens.documents


def test_the_identity_catches_rows_that_do_not_overlap_by_one(tokens):
    def wrong(tokens_n, document_n, seq_len):
        return cut(tokens_n[:seq_len], document_n[:seq_len], seq_len)

    assert total_weight(tokens, wrong, 16) != len(tokens) - tokens.documents


def test_bos_is_never_a_weighted_target_nor_a_row_ever_mixed(tokens):
    for index in range(len(rows := Rows(tokens, 32, keep_tail=True))):
        row = rows[index]
        # bos and eos share an id: as a target, bos follows eos as input.
        assert not row["weights"][(row["tokens"] == 256) & (row["targets"] == 256)].any()
        assert (row["positions"][row["tokens"] == 256] == 0).sum() >= (np.diff(row["segments"]) == 1).sum()
        assert (np.diff(row["segments"][row["segments"] > 0]) >= 0).all()


def test_short_and_empty_splits(tokens, tmp_path):
    rows = Rows(tokens, len(tokens) * 2)
    assert len(rows) == 1
    row = rows[0]
    assert (row["segments"] == 0).sum() == len(tokens) + 1
    assert not row["weights"][row["segments"] == 0].any() and not row["tokens"][row["segments"] == 0].any()
    empty = padding(5)
    assert {name: value.dtype for name, value in empty.items()} == FIELDS
    (tmp_path / "x.txt").write_text("hello")
    source = SourceConfig("text", str(tmp_path / "x.txt"))
    prepare(source, ByteTokenizer(), tmp_path / "out", validation_fraction=0.0)
    with pytest.raises(DataError, match="'validation' has no tokens"):
        Rows(Tokens(tmp_path / "out", "validation"), 4)
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        Tokens(tmp_path / "out", "test")
    with pytest.raises(DataError, match="seq_len = 0"):
        Rows(tokens, 0)


def test_many_shards_need_few_file_handles(tokens, monkeypatch):
    monkeypatch.setattr("lmjax.data.shards._OPEN_SHARDS", 2)
    fresh = Tokens(tokens.folder, "train")
    np.testing.assert_array_equal(fresh.read(0, len(fresh))[0], whole(tokens)[0])
    assert len(fresh._files._values) == 2
