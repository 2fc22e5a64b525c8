"""Tokenizers: exact round trips, specials that text cannot reach, byte counts, deterministic training."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lmjax.data.tokenizers import DOCUMENT, ByteTokenizer, HFTokenizer, json_with_bos, load_tokenizer, train_bpe
from lmjax.errors import DataError

TEXTS = [
    "def add(first, second):\n        return first + second  # 1234567\n\n\n    x = 'ä€😀'\r\n\tif x:\n" * 4,
    "class Point:\n    def add(self, other):\n        return Point(self.x + other.x)\n" * 4,
    "\x00\x7f\u2028 zero width\u200b 東京 नमस्ते 12 345 6789",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 320)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


@pytest.mark.parametrize("text", [*TEXTS, "", " ", "\n", "a" * 1000, f"x{DOCUMENT}y", "e\u0301"])
def test_round_trip_and_byte_counts_are_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_the_byte_count_check_catches_a_count_of_characters(bpe):
    ids = bpe.encode(TEXTS[0])
    wrong_V = np.array([len(bpe.decode([index])) for index in range(bpe.vocab_size)])
    assert wrong_V[ids].sum() != len(TEXTS[0].encode())


def test_text_that_spells_a_special_stays_text(tokenizer):
    ids = tokenizer.encode(f"a {DOCUMENT} b")
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids


def test_the_special_check_catches_a_tokenizer_that_parses_specials(bpe):
    parsing = tokenizers.Tokenizer.from_str(bpe.to_json())
    assert bpe.eos_id in parsing.encode(f"a {DOCUMENT} b").ids


def test_decode_never_raises_inside_the_vocabulary(tokenizer):
    text = tokenizer.decode(np.arange(tokenizer.vocab_size))
    assert "\ufffd" in text and DOCUMENT not in text
    for index in range(tokenizer.vocab_size):
        tokenizer.decode([index])
    assert tokenizer.decode([tokenizer.bos_id]) == "" == tokenizer.decode([])


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_decode_outside_the_vocabulary_says_which_id(tokenizer, bad):
    with pytest.raises(DataError, match=rf"id {bad} at position 1 .*{tokenizer.vocab_size}"):
        tokenizer.decode([1, bad])


def test_batch_equals_one_by_one(tokenizer):
    for one, many in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(tokenizer.encode(one), many)


def test_bytes_are_the_bytes_and_agree_with_the_library():
    byte = ByteTokenizer()
    assert byte.vocab_size == 257 and byte.bos_id == byte.eos_id == 256
    assert byte.encode("hé").tolist() == [104, 195, 169]
    library = HFTokenizer(tokenizers.Tokenizer.from_str(byte.to_json()))
    for text in TEXTS:
        np.testing.assert_array_equal(byte.encode(text), library.encode(text))
    np.testing.assert_array_equal(byte.token_bytes(), library.token_bytes())
    assert library.decode(range(257)) == byte.decode(range(257))


def test_lone_surrogates_are_named(tokenizer):
    with pytest.raises(DataError, match=r"character 2 is the lone surrogate U\+D800"):
        tokenizer.encode("ab\ud800")


def test_save_and_load_keep_the_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(path))
        assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_training_is_deterministic_across_processes(bpe):
    code = ("import sys; sys.path[:0] = %r; from tests.test_tokenizers import TEXTS, train_bpe;"
            "print(train_bpe(TEXTS, 320).fingerprint)" % [path for path in sys.path if path])
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           timeout=60)
    assert other.stdout.strip() == bpe.fingerprint
    assert train_bpe([*TEXTS[:2], "something else something else"], 320).fingerprint != bpe.fingerprint


def test_training_keeps_numbers_short_and_indentation_whole(bpe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        big = train_bpe(["1234567 " * 50 + "x:\n        return 1\n" * 50], 400)
    pieces = [big.decode([index]) for index in range(big.vocab_size)]
    assert max(len(piece) for piece in pieces if piece.strip().isdigit()) == 3
    assert "\n        " in pieces
    assert bpe.vocab_size == 320 and bpe.bos_id == bpe.eos_id


def test_training_refuses_what_cannot_work():
    with pytest.raises(DataError, match="256.*at least 257"):
        train_bpe(TEXTS, 256)
    with pytest.raises(DataError, match="no text"):
        train_bpe([], 300)
    with pytest.warns(UserWarning, match="too few repeated pieces for 5000"):
        train_bpe(["abc abc"], 5000)


def word_level(*special, flagged=True):
    names = ["a", "b", *special]
    vocabulary = {name: index for index, name in enumerate(names)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_tokens([tokenizers.AddedToken(name, special=flagged) for name in special])
    return inner


def test_specials_are_found_by_name_or_config(tmp_path):
    both = HFTokenizer(word_level("<s>", "</s>"))
    assert (both.bos_id, both.eos_id) == (2, 3)
    one = HFTokenizer(word_level("<|endoftext|>"))
    assert one.bos_id == one.eos_id == 2
    with pytest.raises(DataError, match="tokenizer_config.json"):
        HFTokenizer(word_level("<strange>"))
    word_level("<strange>", "</s>").save(str(tmp_path / "tokenizer.json"))
    names = {"eos_token": {"content": "<strange>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    named = load_tokenizer(str(tmp_path))
    assert named.bos_id == named.eos_id == 2
    again = tmp_path / "again"
    again.mkdir()
    named.save(again / "tokenizer.json")
    assert load_tokenizer(str(again)).fingerprint == named.fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(DataError, match="'<gone>', which the vocabulary"):
        load_tokenizer(str(tmp_path))


def test_an_unflagged_special_and_stored_padding_are_defused():
    inner = word_level("</s>", flagged=False)
    inner.enable_padding(length=9)
    inner.enable_truncation(1)
    assert inner.encode("a </s>").ids != HFTokenizer(inner).encode("a </s>").tolist()
    assert 2 not in HFTokenizer(inner).encode("a b</s>").tolist()
    assert len(HFTokenizer(inner).encode("a")) <= 2


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="holds no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    bad = tmp_path / "bad.json"
    unknown = '{"model": {"type": "?"}}'
    for content, words in (("{", "not valid JSON"), ("{}", "no \"model\""), (unknown, "can read")):
        bad.write_text(content)
        with pytest.raises(DataError, match=words) as caught:
            load_tokenizer(str(bad))
        assert "\n" not in str(caught.value) and "bad.json" in str(caught.value)


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataError, match="org/name.*no network.*\"bytes\"") as caught:
        load_tokenizer("org/name")
    assert "\n" not in str(caught.value)


def test_hub_files_are_read_with_their_config(monkeypatch, tmp_path):
    import huggingface_hub

    word_level("<strange>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<strange>"}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / name))
    assert load_tokenizer("org/name").name == "org/name"


def test_holes_in_the_vocabulary_count():
    holes = HFTokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 9}, unk_token="a")))
    assert holes.vocab_size == 10
    assert isinstance(holes.decode(range(10)), str)
    assert holes.token_bytes().tolist() == [1] + [0] * 9


def test_bos_for_other_libraries_changes_neither_ids_nor_fingerprint(tmp_path):
    """What an export adds is seen by `tokenizers`, and is not taken for another tokenizer here."""
    for tokenizer in (ByteTokenizer(), train_bpe(["some text of some words"], 260)):
        (tmp_path / "tokenizer.json").write_text(json_with_bos(tokenizer))
        again = HFTokenizer(tmp_path)
        assert again.fingerprint == tokenizer.fingerprint and again.prefix_ids == (tokenizer.bos_id,)
        assert again.encode("some").tolist() == tokenizer.encode("some").tolist()
        there = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("some").ids
        assert there == [tokenizer.bos_id, *again.encode("some").tolist()]
        assert json_with_bos(again) == again.to_json() != tokenizer.to_json()


def test_a_definition_that_makes_the_library_panic(tmp_path):
    definition = json.loads(train_bpe(["some text, some more text"], 262).to_json())
    definition["model"]["continuing_subword_prefix"] = "x" * 80  # longer than what is merged
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(DataError, match="not a tokenizer.json that"):
        load_tokenizer(str(tmp_path))
