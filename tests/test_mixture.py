"""Batches: a pure function of (corpus, seed, step), a true permutation each epoch, equal on any hosts."""

import json
from pathlib import Path

import numpy as np
import pytest

from lmjax.data.mixture import Batches, DataConfig, prepare_all, rows_of_sources, validation_batches
from lmjax.data.rows import Rows
from lmjax.data.shards import Tokens
from lmjax.data.sources import SourceConfig
from lmjax.errors import DataError


def write(folder, name, count):
    path = folder / f"{name}.jsonl"
    rng = np.random.default_rng(len(name))
    texts = [f"{name} {rng.integers(10**9)} " + " ".join(map(str, rng.integers(10**9, size=n % 5)))
             for n in range(count)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write(folder, "small", 40)
    write(folder, "large", 300)
    return folder


def config(place, *names, **more):
    weights = more.pop("weights", [1.0] * len(names))
    sources = tuple(SourceConfig("jsonl", str(place / f"{name}.jsonl"), weight=weight)
                    for name, weight in zip(names, weights, strict=True))
    return DataConfig(sources, cache_dir=str(place / "cache"), workers=1, validation_fraction=0.1, **more)


@pytest.fixture(scope="module")
def large(place):
    return prepare_all(config(place, "large"))


@pytest.fixture(scope="module")
def both(place):
    return prepare_all(config(place, "small", "large", weights=[3.0, 1.0]))


def rows_of(corpus, seq_len, index=0):
    rows = Rows(Tokens(corpus.folders[index], "train"), seq_len)
    return {rows[number]["tokens"].tobytes() + rows[number]["targets"].tobytes(): number
            for number in range(len(rows))}


def order(corpus, batches, count, index=0):
    """Row numbers in the order in which batches give them; the text makes each row unlike all others."""
    known = rows_of(corpus, batches.seq_len, index)
    found = []
    for step in range(count // batches.batch_size):
        batch = batches.batch(step)
        found += [known[row.tobytes() + target.tobytes()]
                  for row, target in zip(batch["tokens"], batch["targets"], strict=True)]
    return np.array(found)


def test_every_epoch_is_another_permutation(large):
    batches = Batches(large, "train", 1, 24, seed=1)
    count = batches.rows_per_epoch
    assert count > 300 and len(rows_of(large, 24)) == count
    epochs = order(large, batches, 3 * count).reshape(3, count)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    for first, second in ((epochs[0], epochs[1]), (epochs[1], epochs[2])):
        assert (first == second).mean() < 0.05
    assert batches.epoch(count) == 1.0 and batches.epoch(0) == 0.0
    # Neighbouring seeds share nothing either, not even shifted by an epoch.
    other = order(large, Batches(large, "train", 1, 24, seed=2), count)
    assert (other == epochs[0]).mean() < 0.05 and (other == epochs[1]).mean() < 0.05


def quality(numbers):
    """(serial correlation, correlation with the place, share of steps to the very next row)."""
    return (abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]),
            abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]), np.mean(np.diff(numbers) == 1))


def test_the_shuffle_is_global(large):
    for seed in range(4):
        batches = Batches(large, "train", 1, 24, seed=seed)
        serial, place, runs = quality(order(large, batches, batches.rows_per_epoch))
        assert serial < 0.2 and place < 0.2 and runs < 0.03


def test_the_shuffle_check_catches_no_shuffle_and_a_windowed_one(large):
    batches = Batches(large, "train", 1, 24, seed=0, shuffle=False)
    straight = order(large, batches, batches.rows_per_epoch)
    np.testing.assert_array_equal(straight, np.arange(batches.rows_per_epoch))
    assert max(quality(straight)) > 0.9
    rng = np.random.default_rng(0)
    windows = np.concatenate([rng.permutation(window) for window in np.array_split(straight, 20)])
    assert quality(windows)[1] > 0.9


def test_any_step_can_be_read_alone_and_again(large, both):
    for corpus in (large, both):
        one, two = (Batches(corpus, "train", 4, 16, seed=5) for _ in range(2))
        forward = [one.batch(step) for step in range(30)]
        for step in (29, 3, 17, 3, 0):
            for name, value in two.batch(step).items():
                np.testing.assert_array_equal(value, forward[step][name])
        far = two.batch(10**9)
        assert far["tokens"].shape == (4, 16)
    different = Batches(large, "train", 4, 16, seed=6).batch(0)
    assert (different["tokens"] != Batches(large, "train", 4, 16, seed=5).batch(0)["tokens"]).any()
    with pytest.raises(IndexError):
        one.batch(-1)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_hold_the_global_batch(both, hosts):
    whole = Batches(both, "train", 8, 16, seed=0)
    share = 8 // hosts
    for step in (0, 7, 100):
        expected = whole.batch(step)
        parts = [Batches(both, "train", 8, 16, seed=0).batch(step, slice(host * share, (host + 1) * share))
                 for host in range(hosts)]
        for name, value in expected.items():
            joined = np.concatenate([part[name] for part in parts])
            assert joined.dtype == value.dtype
            np.testing.assert_array_equal(joined, value)
            if hosts > 1 and name == "tokens":  # hosts that all read the same rows would be noticed
                assert (np.concatenate([parts[0][name]] * hosts) != value).any()


def test_weights_are_shares_of_rows(both):
    batches = Batches(both, "train", 8, 16, seed=0)
    small, large = rows_of(both, 16, 0), rows_of(both, 16, 1)
    counts = np.zeros(2)
    for step in range(100):
        batch = batches.batch(step)
        for row, target in zip(batch["tokens"], batch["targets"], strict=True):
            key = row.tobytes() + target.tobytes()
            counts += [key in small, key in large]
    assert counts[0] / counts.sum() == pytest.approx(0.75, abs=0.02)
    epochs = batches.source_epochs(100)
    assert epochs[0] == pytest.approx(600 / len(Rows(both.tokens("train")[0], 16)), rel=1e-6)
    assert epochs[0] > epochs[1]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (3.0, 1.0), (0.7, 0.29, 0.01), (1.0, 2.5, 1e-3, 7.0)])
def test_rows_of_sources_is_the_rule_of_grain(weights):
    import grain

    streams = [grain.MapDataset.source(range(10)).map(lambda _, index=index: index).repeat(None)
               for index in range(len(weights))]
    mixed = streams[0] if len(weights) == 1 else grain.MapDataset.mix(streams, weights=weights)
    seen = [0] * len(weights)
    wrong = 0  # known wrong: each source's share of the weights, rounded
    for count in range(700):
        assert rows_of_sources(count, weights) == tuple(seen), count
        wrong += [round(count * weight / sum(weights)) for weight in weights] != seen
        seen[mixed[count]] += 1
    assert wrong > 10 or len(set(weights)) == 1


def test_what_was_used_of_each_source(both):
    batches = Batches(both, "train", 4, 16, seed=1)
    known = [set(rows_of(both, 16, index)) for index in range(2)]
    seen = [0, 0]
    for step in range(12):
        for use, rows, count in zip(batches.used(step), batches._rows, seen, strict=True):
            assert (use.rows, use.tokens, use.epochs) == (count, count * 16, count / len(rows))
        batch = batches.batch(step)
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            seen[0 if tokens.tobytes() + targets.tobytes() in known[0] else 1] += 1
    assert seen == [use.rows for use in batches.used(12)] and abs(seen[0] - 36) <= 1
    assert [use.folder for use in batches.used(0)] == [str(folder) for folder in both.folders]


def test_used_counts_no_padding(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n{"text": "defg"}\n')
    corpus = prepare_all(DataConfig((SourceConfig("jsonl", str(tmp_path / "x.jsonl")),), workers=1,
                                    cache_dir=str(tmp_path / "c"), validation_fraction=0))
    (use,) = Batches(corpus, "train", 2, 64, seed=0).used(3)
    assert (use.rows, use.tokens, use.epochs) == (6, 6 * (3 + 4 + 4 - 1), 6.0)


def test_bad_records_are_counted_and_told(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n{"text": ""}\n{"tex": 1}\n{"text": 7}\n{\n{"text": "def"}\n')

    def cfg(**more):
        return DataConfig((SourceConfig("jsonl", str(tmp_path / "x.jsonl"), **more),), workers=1,
                          cache_dir=str(tmp_path / "c"), validation_fraction=0)

    with pytest.raises(DataError, match="x.jsonl:3: no field 'text'.*on_bad_record"):
        prepare_all(cfg())
    for more in ({}, {"max_bad_records": 3}):  # the second finds the folder finished
        corpus = prepare_all(cfg(on_bad_record="skip", **more))
        assert corpus.manifests[0].skipped == {"empty": 1, "malformed": 1, "no_field": 1, "wrong_type": 1}
        assert "1 documents left out as malformed JSON" in corpus.notes[-1] and "zero length" in corpus.notes[-1]
        assert corpus.manifests[0].documents == 2
    with pytest.raises(DataError, match="3 bad records were left out .*max_bad_records = 2"):
        prepare_all(cfg(on_bad_record="skip", max_bad_records=2))


def test_validation_predicts_each_held_out_token_once(both):
    for index, manifest in enumerate(both.manifests):
        split = manifest.splits["validation"]
        batches = list(validation_batches(both, 4, 10, source=index))
        assert {batch["tokens"].shape for batch in batches} == {(4, 10)}
        assert sum(float(batch["weights"].sum()) for batch in batches) == split.tokens - split.documents
        # Without the kept tail, tokens would be lost.
        tokens = Tokens(both.folders[index], "validation")
        length = next(length for length in range(10, 20) if (len(tokens) - 1) % length > 2)
        cut = Rows(tokens, length)
        assert sum(cut[row]["weights"].sum() for row in range(len(cut))) < split.tokens - split.documents
    together = list(validation_batches(both, 4, 10))
    assert len(together) == sum(len(list(validation_batches(both, 4, 10, source=index))) for index in (0, 1))
    assert len(list(validation_batches(both, 4, 10, limit_batches=1))) == 2
    parts = [list(validation_batches(both, 4, 10, rows=slice(host * 2, host * 2 + 2))) for host in (0, 1)]
    for whole, left, right in zip(together, *parts, strict=True):
        np.testing.assert_array_equal(whole["targets"], np.concatenate([left["targets"], right["targets"]]))


def test_limited_validation_is_spread_over_the_split(large):
    every = [batch["tokens"] for batch in validation_batches(large, 1, 10)]
    some = [batch["tokens"] for batch in validation_batches(large, 1, 10, limit_batches=3)]
    places = [next(place for place, batch in enumerate(every) if (batch == one).all()) for one in some]
    assert places == [0, len(every) // 3, 2 * len(every) // 3]


def test_held_out_text_is_never_trained_on(both):
    for folder in both.folders:
        split = {name: Tokens(folder, name) for name in ("train", "validation")}
        texts = {name: {both.tokenizer.decode(tokens.document(n)) for n in range(tokens.documents)}
                 for name, tokens in split.items()}
        assert texts["train"] and texts["validation"] and not texts["train"] & texts["validation"]


def test_preparing_again_reuses_and_repairs(place, tmp_path):
    write(tmp_path, "one", 50)
    cfg = config(tmp_path, "one")
    first = prepare_all(cfg)
    again = prepare_all(cfg)
    assert first.reused == (False,) and again.reused == (True,) and first.fingerprint == again.fingerprint
    shard = next(first.folders[0].glob("train-*.tokens.npy"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert prepare_all(cfg).reused == (False,) and shard.read_bytes() == whole
    write(tmp_path, "one", 51)
    changed = prepare_all(cfg)
    assert changed.folders != first.folders and changed.fingerprint != first.fingerprint


def test_bpe_is_trained_once_and_not_on_held_out_text(tmp_path):
    lines = [json.dumps({"text": f"plain words here {n}"}) for n in range(60)]
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    cfg = config(tmp_path, "one", tokenizer="bpe", bpe_vocab_size=280)
    first = prepare_all(cfg)
    stored = list((tmp_path / "cache" / "tokenizers").iterdir())
    again = prepare_all(cfg)
    assert len(stored) == 1 and again.reused == (True,)
    assert first.tokenizer.name == "bpe280" and first.tokenizer.vocab_size == 280
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    # A vocabulary trained on everything would be another one.
    from lmjax.data.tokenizers import train_bpe
    tokens = Tokens(first.folders[0], "train")
    trained = [first.tokenizer.decode(tokens.document(number)) for number in range(tokens.documents)]
    assert train_bpe(trained, 280).fingerprint == first.tokenizer.fingerprint
    everything = trained + ["held-out zebra zebra"] * 60
    assert train_bpe(everything, 280).fingerprint != first.tokenizer.fingerprint


def test_prepared_folders_are_sources_for_their_own_tokenizer_only(place, large):
    folder = str(large.folders[0])
    corpus = prepare_all(DataConfig((SourceConfig("shards", folder),), cache_dir=str(place / "cache")))
    assert corpus.manifests == large.manifests
    np.testing.assert_array_equal(Batches(corpus, "train", 2, 8, 0).batch(3)["tokens"],
                                  Batches(large, "train", 2, 8, 0).batch(3)["tokens"])
    other = config(place, "large", tokenizer="bpe", bpe_vocab_size=270)
    bpe = prepare_all(other)
    wrong = DataConfig((SourceConfig("shards", str(bpe.folders[0])),), cache_dir=str(place / "cache"))
    with pytest.raises(DataError, match="'bpe270' of 270 tokens.*'bytes' of 257; set tokenizer = '.*r.json'"):
        prepare_all(wrong)
    wrong.tokenizer = str(bpe.folders[0] / "tokenizer.json")
    assert prepare_all(wrong).tokenizer.vocab_size == 270


def test_a_token_outside_the_vocabulary_names_the_shard(tmp_path):
    write(tmp_path, "one", 30)
    corpus = prepare_all(config(tmp_path, "one"))
    path = next(corpus.folders[0].glob("train-*.tokens.npy"))
    tokens = np.load(path)
    tokens[7] = 999
    np.save(path, tokens)
    words = rf"{path.name}: token 7 is id 999, but the vocabulary has 257"
    with pytest.raises(DataError, match=words) as caught:
        for step in range(100):
            Batches(corpus, "train", 8, 16, seed=0).batch(step)
    assert "\n" not in str(caught.value)


def test_every_problem_of_a_config_is_found(place):
    assert DataConfig().problems("data.") == []
    wrong = DataConfig((SourceConfig("txt"), SourceConfig("text", "nowhere")), "bytes", 300, 1.0, "", -1)
    found = wrong.problems("data.")
    assert [line.removeprefix("data.").split()[0] for line in found] == [
        "sources[0].kind", "sources[1].path", "bpe_vocab_size", "validation_fraction", "workers",
        "cache_dir:"]
    assert DataConfig(tokenizer="bpe", bpe_vocab_size=200).problems()
    assert DataConfig(()).problems()
    with pytest.raises(DataError, match="batch_size = 0"):
        Batches(prepare_all(config(place, "small")), "train", 0, 8, 0)
    none = config(place, "small")
    none.validation_fraction = 0.0
    with pytest.raises(DataError, match="no held-out tokens"):
        validation_batches(prepare_all(none), 2, 8)
    assert Path(none.cache_dir).is_dir()


def test_weights_that_lie_too_far_apart(place):
    apart = config(place, "small", "large", weights=[1e-200, 1.0])
    assert any("times apart" in problem for problem in apart.problems())
    assert not config(place, "small", "large", weights=[1e-5, 1.0]).problems()
