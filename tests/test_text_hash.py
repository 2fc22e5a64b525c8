"""The mask of words: what the normaliser folds, and that copies lose the same words however they are laid out."""

import shutil
import unicodedata
import zlib

import numpy as np
import pytest
from helpers import state_hash, write_config

from lmjax.config import load_config
from lmjax.data import Batches, DataConfig, Protect, SourceConfig, documents, prepare_all, train_bpe
from lmjax.data.normal import letters, units
from lmjax.data.protect import NEVER, Marks, plain_pieces, token_values
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.hashing import fmix32
from lmjax.records import read_metrics
from lmjax.reproduce.lab import Stream
from lmjax.train import train

K = np.uint32(2**32 // 4)
WORDS = ("amber birch cobalt dune elm fjord gale hazel iris jade kelp lotus maple north ocean plum quartz reed "
         "sand tide umber vale willow yarrow zinc straße naïve Ёлка 東京").split()


def prose(count: int, seed: int = 0, words=WORDS) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"{rng.choice(words)}{rng.integers(100)}" for _ in range(count))


# ---- The normaliser ------------------------------------------------------------------------------------


def test_folding():
    found = units("Straße  ﬁn\u00ad al, na\u0308ive DON’T x_y 東京 ＡＢ")
    assert found.words == ["strasse", "fin", "al", "naive", "don", "t", "x", "y", "東", "京", "ab"]
    text = "a" * 50 + " b"
    assert [len(word) for word in units(text).words] == [24, 24, 2, 1]


def test_every_normal_form_gives_the_same_words_at_the_same_places():
    text = "Él está— ﬃ Ångström ①② が 한국어 İstanbul ǅ x\u0301\u0323y"
    wanted = units(text)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        other = unicodedata.normalize(form, text)
        found = units(other)
        assert found.words == wanted.words, form
        for word, start, end in zip(*found, strict=True):
            assert "".join(units(other[start:end]).words) == word


def test_places_are_in_order_and_letters_agree_with_words():
    for text in ("abc ﬃx", "e\u0301a \u200bb", "", "—", prose(50)):
        found, single = units(text), letters(text)
        assert (found.starts[1:] >= found.ends[:-1]).all() or "ﬃ" in text
        assert (found.ends >= found.starts).all()
        assert "".join(found.words) == "".join(single.words)


# ---- The mask ------------------------------------------------------------------------------------------


def brute(text: str, context: int, seed: int) -> dict[int, int]:
    """{word number: value}, written with Python's integers."""
    words = units(text).words
    keys = [(zlib.crc32(word.encode()) * 0x9E3779B1 + seed + 1) % 2**32 for word in words]
    mix = [int(x) for x in fmix32(np.array(keys, np.uint32))]
    values = {}
    for i in range(context, len(words)):
        total = sum(mix[i - j] * pow(0x01000193, j, 2**32) for j in range(1, context + 1)) % 2**32
        values[i] = int(fmix32(np.array([total ^ seed], np.uint32))[0])
    return values


def test_values_are_the_formula():
    text = prose(60)
    data = [bytes([b]) for b in text.encode()]
    values = token_values(data, 5, 7)
    offsets = np.cumsum([0] + [len(c.encode()) for c in text])
    found = units(text)
    wanted = brute(text, 5, 7)
    for i in range(len(found.words)):
        of_word = values[offsets[found.starts[i]]:offsets[found.ends[i]]]
        assert (of_word == wanted.get(i, NEVER)).all()


def hidden_words(text: str, pieces: list[bytes], context: int = 5) -> list[bool]:
    """Of each word, is a token that holds a part of it dropped?"""
    drop = token_values(pieces, context, 0) < K
    of_byte = np.repeat(drop, [len(p) for p in pieces])
    offsets = np.cumsum([0] + [len(c.encode()) for c in text])
    found = units(text)
    return [bool(of_byte[offsets[a]:offsets[b]].any()) for a, b in zip(found.starts, found.ends, strict=True)]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([prose(3000, seed) for seed in range(3)], 500)


def pieces_of(tokenizer, text):
    pieces = plain_pieces(tokenizer)
    return [pieces[i] for i in tokenizer.encode(text)]


def test_copies_lose_the_same_words(bpe):
    text = prose(300, words=WORDS[:-1])
    wanted = hidden_words(text, pieces_of(bpe, text))
    assert 0.18 < np.mean(wanted) < 0.33
    rng = np.random.default_rng(0)
    copies = [text.replace(" ", "\n"), text.upper(), text.replace(" ", ", "), unicodedata.normalize("NFD", text),
              "".join(c if c != " " or rng.random() < 0.7 else "\n    > " for c in text)]
    for copy in copies:
        for tokenizer in (bpe, ByteTokenizer()):
            assert hidden_words(copy, pieces_of(tokenizer, copy)) == wanted
    text = prose(300)  # with words that nothing sets apart, so that tokens may hold several: then more is dropped
    wanted = hidden_words(text, pieces_of(ByteTokenizer(), text))
    more = hidden_words(text, pieces_of(bpe, text))
    assert all(b for a, b in zip(wanted, more, strict=True) if a) and sum(more) < 1.15 * sum(wanted)
    cut = [text.encode()[i:i + 3] for i in range(0, len(text.encode()), 3)]  # tokens that hold parts of two words
    both = hidden_words(text, cut)
    assert all(b for a, b in zip(wanted, both, strict=True) if a), "no part of a dropped word may be supervised"


def test_a_mask_of_tokens_does_not(bpe):
    from lmjax.losses.goldfish import hash_keep

    text = prose(300)
    masks = []
    for copy in (text, text.replace(" ", "\n")):
        pieces, ids = pieces_of(bpe, copy), bpe.encode(copy)
        drop = ~hash_keep(ids[None], k=4, context=13)[0]
        of_byte = np.repeat(np.concatenate([[False], drop[:-1]]), [len(p) for p in pieces])
        masks.append(of_byte[np.cumsum([0] + [len(c.encode()) for c in copy])[units(copy).starts]])
    assert (masks[0] & masks[1]).mean() < 0.15 < masks[0].mean()


def test_rate_on_real_text():
    """About 1/k of the tokens: of prose and code, of bytes and BPE."""
    texts = [d.text for _, d in zip(range(25), documents(SourceConfig()), strict=False)]
    bpe = train_bpe(texts, 2000)
    for tokenizer in (ByteTokenizer(), bpe):
        values = np.concatenate([token_values(pieces_of(tokenizer, text), 5, 0) for text in texts])
        known = values != NEVER
        assert known.mean() > 0.97
        for k in (3, 4, 8):
            assert abs((values[known] < 2**32 // k).mean() * k - 1) < 0.12, (tokenizer.name, k)


def test_causal(bpe):
    """What comes after a word does not decide whether it is dropped."""
    text = prose(80)
    whole = hidden_words(text, pieces_of(bpe, text))
    for count in (20, 50):
        head = text[:units(text).ends[count - 1]]
        assert hidden_words(head, pieces_of(bpe, head)) == whole[:count]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_the_mask_of_a_document_does_not_depend_on_rows(name, bpe):
    tokenizer = ByteTokenizer() if name == "bytes" else bpe
    texts = [prose(200, seed) for seed in range(4)] + ["x" * 120 + " " + prose(60, 9)]
    stream = Stream([tokenizer.encode(text) for text in texts], tokenizer)
    pieces = plain_pieces(tokenizer)
    wanted = np.concatenate([token_values([pieces[i] for i in stream.ids[stream.numbers == d]], 5, 3)
                             for d in range(len(texts))])
    marks = Marks(Protect((True,), True, 5, 3), 0, tokenizer)
    for seq_len in (7, 64, 100):
        for start in range(0, len(stream) - 1, seq_len):
            row = marks.row(stream, start, seq_len)
            rest = wanted[start + 1:start + 1 + seq_len]
            usual = stream.numbers[start + 1:start + 1 + seq_len] < 4
            np.testing.assert_array_equal(row[:len(rest)][usual], rest[usual])
            # A run of letters longer than what is read before a row: some targets are kept, never others dropped.
            assert ((row[:len(rest)] == rest) | (row[:len(rest)] == NEVER)).all()
            assert (row[len(rest):] == NEVER).all()


# ---- In a batch ----------------------------------------------------------------------------------------


def test_gating_by_source_and_by_document(tmp_path):
    lines = [f'{{"text": "{prose(40, i)}", "protect": {"true" if i % 3 else "false"}}}' for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "a.jsonl")
    sources = (SourceConfig("jsonl", path, where="protect"),
               SourceConfig("jsonl", path, where="!protect", goldfish=False))
    assert [len(list(documents(s))) for s in sources] == [40, 20]
    corpus = prepare_all(DataConfig(sources, validation_fraction=0.0, cache_dir=str(tmp_path / "data")))
    plain = Batches(corpus, "train", 4, 64, 0).batch(0)
    assert "goldfish" not in plain, "no array where nothing needs it"
    for text in (False, True):
        protect = Protect((True, False), text, 5)
        batches = Batches(corpus, "train", 4, 64, 0, protect=protect)
        for step in range(4):
            batch = batches.batch(step)
            assert batch["goldfish"].dtype == np.uint32
            never = (batch["goldfish"] == NEVER).all(axis=1)
            assert 0 < never.sum() < 4, "rows of both sources, half each"
            assert (batch["goldfish"][~never] == 0).all() != text
            assert all((batch[name] == plain[name]).all() for name in plain) or step


def test_bad_where():
    assert any("jsonl" in p for p in SourceConfig(where="x").problems())
    assert any("name of a field" in p for p in SourceConfig("jsonl", "/", where="!").problems())


def test_a_run_with_all_of_it(tmp_path):
    """Words hashed, a schedule, as many supervised targets as without, micro-batches; and it resumes to the bit."""
    fish = {"strategy": "text_hash", "k": 2, "context": 2, "start": 2, "k_final": 4, "anneal_steps": 2,
            "equal_supervised": "true"}
    config = load_config(write_config(tmp_path), [
        "--steps=6", "--batch_size=32", "--accumulate=2", "--evals.every=0", "--optim.warmup_steps=2",
        *(f"--objective.goldfish.{name}={value}" for name, value in fish.items())])
    assert config.total_steps == 8  # 0 0 1/2 3/8 1/4 1/4 1/4 … dropped: 6.375 targets' worth are kept, 5.625 in 7
    run = train(config)
    records = [r for r in read_metrics(run) if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, 9))
    wanted = np.array([0, 0, 1 / 2, 3 / 8, *[1 / 4] * 4])
    dropped = 1 - np.array([r["kept_fraction"] for r in records])
    np.testing.assert_array_equal(dropped[:2], 0)
    np.testing.assert_allclose(dropped[2:], wanted[2:], atol=0.12)  # 16 words make few contexts
    whole = state_hash(run, 8)
    shutil.rmtree(run / "checkpoints" / "8")
    (run / "summary.json").unlink()
    train(config)
    assert state_hash(run, 8) == whole
