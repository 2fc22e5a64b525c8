"""Canaries in training: as often as was asked for, in their own documents, whoever reads the rows; and nothing else."""

import dataclasses

import numpy as np
import pytest
from helpers import state_hash, write_config, write_corpus

from lmjax import checkpoint as checkpoint_module
from lmjax.config import ignored, load_config, validate
from lmjax.data import Batches, DataConfig, Protect, SourceConfig, prepare_all, validation_batches
from lmjax.data.canaries import ALPHABETS, WORDS, CanaryConfig, make_canaries, other_secrets, written
from lmjax.data.inject import Injection, overlaid
from lmjax.data.protect import plain_pieces, token_values
from lmjax.data.rows import cut, padding
from lmjax.errors import CheckpointError, ConfigError
from lmjax.hashing import NEVER
from lmjax.losses.goldfish import hash_keep
from lmjax.train import dry_run
from lmjax.train.loop import train

STEPS, B, T = 40, 8, 64
CANARIES = CanaryConfig("{name} is {secret}.", length=3, repeats=(0, 1, 3, 9), per_repeat=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canaries")
    write_corpus(folder / "text")
    write_corpus(folder / "more", 12)
    sources = (SourceConfig("text", str(folder / "text")), SourceConfig("text", str(folder / "more"), goldfish=False))
    return prepare_all(DataConfig(sources, validation_fraction=0.2, cache_dir=str(folder / "data"), workers=1))


def injected(corpus, config=CANARIES, protect=None, steps=STEPS):
    return Injection(config, corpus.tokenizer, steps, B, T, protect)


def all_batches(corpus, injection, hosts=1, protect=None):
    """Every batch of the run, put together from what so many hosts read."""
    batches = Batches(corpus, "train", B, T, seed=3, protect=protect)
    size = B // hosts
    for step in range(STEPS):
        parts = []
        for host in range(hosts):
            rows = slice(host * size, (host + 1) * size)
            part = batches.batch(step, rows)
            parts.append(injection.put_in(part, step, rows) if injection else part)
        yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def occurrences(batch, ids):
    """(row, token) of each place where a row, its last target included, spells these ids, found by brute force."""
    streams = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
    return [(b, at) for b, stream in enumerate(streams) for at in range(T + 2 - len(ids))
            if np.array_equal(stream[at:at + len(ids)], ids)]


# ---- texts -----------------------------------------------------------------------------------------------


def test_texts_are_a_function_of_the_config():
    found = make_canaries(CANARIES)
    assert [canary.count for canary in found] == [0, 0, 1, 1, 3, 3, 9, 9]
    assert len({canary.name for canary in found}) == len(found) == len({canary.id for canary in found})
    for canary in found:
        assert canary.text == f"{canary.name} is {canary.text[canary.start:canary.stop]}."
        assert canary.text[canary.start:canary.stop] == "".join(map(str, canary.secret))
    assert found == make_canaries(dataclasses.replace(CANARIES)) != make_canaries(dataclasses.replace(CANARIES, seed=1))
    # More canaries, or other counts, do not change those that there were.
    more = make_canaries(dataclasses.replace(CANARIES, repeats=(2, 9, 1), per_repeat=4))
    assert set(found[2:4] + found[6:]) < set(more)
    # NumPy promises the raw stream of Philox: these texts may never change, or old runs could not be audited.
    assert make_canaries(CanaryConfig())[0].text == "The access code of Podeka Zumini is 616168."


def test_secrets_are_uniform_and_so_are_the_others():
    many = CanaryConfig(length=1, repeats=(1,), per_repeat=5000)
    counts = np.bincount([canary.secret[0] for canary in make_canaries(many)], minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-square of 9 degrees: p = 0.001
    assert len(WORDS) == len(set(WORDS)) == 64
    for kind, length in (("digits", 2), ("letters", 1), ("words", 1)):
        config = CanaryConfig(secret=kind, length=length)
        canary = make_canaries(config)[0]
        every = other_secrets(config, canary, config.secrets)
        whole = {tuple(row) for row in every.tolist()} | {canary.secret}
        assert len(every) == config.secrets - 1 and len(whole) == config.secrets
        some = other_secrets(config, canary, config.secrets - 1)
        assert {tuple(row) for row in some.tolist()} == whole - {canary.secret}, "all but one's own, each once"
        text, start, stop = written(config, "Somebody", canary.secret)
        assert text[start:stop] == ALPHABETS[kind][1].join(ALPHABETS[kind][0][i] for i in canary.secret)
    large = CanaryConfig(length=32)
    one, two = (other_secrets(large, canary, 500) for canary in make_canaries(large)[:2])
    assert len(np.unique(one, axis=0)) == 500 and not np.array_equal(one, two)


# ---- where they stand ------------------------------------------------------------------------------------


def test_each_occurs_exactly_as_often_as_asked_on_any_number_of_hosts(corpus):
    injection = injected(corpus)
    whole = list(all_batches(corpus, injection))
    found = {canary.id: [(step, *place) for step, batch in enumerate(whole) for place in occurrences(batch, ids)]
             for canary, ids in zip(injection.canaries, injection.ids, strict=True)}
    assert [len(found[canary.id]) for canary in injection.canaries] == [0, 0, 1, 1, 3, 3, 9, 9]
    assert len({place[:2] for places in found.values() for place in places}) == CANARIES.occurrences, "one a row"
    for part, batch in zip(all_batches(corpus, injection, hosts=4), whole, strict=True):
        assert part.keys() == batch.keys() and all(np.array_equal(part[name], batch[name]) for name in batch)
    # The j-th of nine comes in the j-th ninth of the run (within one stretch between occurrences).
    for canary in injection.canaries[-2:]:
        steps = np.array([step for step, *_ in found[canary.id]])
        assert (np.abs((steps + 0.5) / STEPS * 9 - np.arange(9) - 0.5) < 0.5 + 9 / CANARIES.occurrences).all()
    # What each step has seen, from the plan alone.
    for step in (0, 1, 17, STEPS):
        assert injection.counts(step).tolist() == [sum(at < step for at, *_ in found[c.id]) for c in injection.canaries]
    # Known wrong: rows numbered within a host put the same canaries into every host's part.
    batches = Batches(corpus, "train", B, T, seed=3)
    wrong = [injection.put_in(batches.batch(s, slice(4, 8)), s, slice(0, 4)) for s in range(STEPS)]
    assert any(not np.array_equal(part["tokens"], batch["tokens"][4:])
               for part, batch in zip(wrong, whole, strict=True))


def test_a_row_with_a_canary_is_cut_as_if_it_had_been_read_so(corpus):
    """Against a plain loop over tokens and their documents; rows without one keep their bits."""
    injection = injected(corpus)
    touched = 0
    for step, (batch, plain) in enumerate(zip(all_batches(corpus, injection), all_batches(corpus, None), strict=True)):
        where = {int(row) - step * B: n for n, row in enumerate(injection.rows_N) if step * B <= row < step * B + B}
        for b in range(B):
            if b not in where:
                assert all(np.array_equal(batch[name][b], plain[name][b]) for name in plain)
                continue
            touched += 1
            ids, at = injection.ids[injection.which_N[where[b]]], int(injection.at_N[where[b]])
            stream = [*plain["tokens"][b], plain["targets"][b, -1]]
            document, number = [], 0
            for t, token in enumerate(stream):  # documents begin with bos, but where eos, the same id, comes before
                number += t > 0 and token == 256 and stream[t - 1] == 256
                document.append(("text", number))
            stream[at:at + len(ids)], document[at:at + len(ids)] = ids, [("canary", 0)] * len(ids)
            segment = position = 0
            for t in range(T):
                begins = t == 0 or document[t] != document[t - 1]
                segment, position = segment + begins, 0 if begins else position + 1
                row = {name: batch[name][b, t] for name in batch}
                assert row == {"tokens": stream[t], "targets": stream[t + 1], "segments": segment,
                               "positions": position, "weights": float(document[t] == document[t + 1])}
            canary = batch["weights"][b, at:at + len(ids) - 1]
            assert canary.all() and len(canary) == len(ids) - 1, "everything but bos is learned, eos included"
            assert at == 0 or batch["weights"][b, at - 1] == 0, "bos is never predicted"
    assert touched == CANARIES.occurrences
    for batch in validation_batches(corpus, B, T):
        assert not any(occurrences(batch, ids) for ids in injection.ids)


def test_a_short_row_takes_one_at_its_end(corpus):
    ids = injected(corpus).ids[0]
    row = cut(np.arange(6, dtype=np.int32), np.zeros(6, int), T)
    out = overlaid(row, ids, 30)
    assert out["tokens"][:6].tolist() == list(range(6)) and out["weights"][:5].all() and not out["weights"][5]
    assert out["tokens"][6:5 + len(ids)].tolist() == ids[:-1].tolist() and out["targets"][4 + len(ids)] == ids[-1]
    assert not out["segments"][5 + len(ids):].any()
    with pytest.raises(AssertionError):
        overlaid(padding(8) | {"segments": np.ones(8, np.int32)}, ids, 3)


def test_first_and_last_bound_the_steps(corpus):
    injection = injected(corpus, dataclasses.replace(CANARIES, first=0.5, last=0.75))
    assert not injection.counts(20).any() and injection.counts(30).tolist() == [0, 0, 1, 1, 3, 3, 9, 9]
    assert "26 occurrences in steps 21 to 30" in str(injection)


# ---- goldfish --------------------------------------------------------------------------------------------


def test_goldfish_of_tokens_sees_a_canary_as_a_document(corpus):
    injection = injected(corpus)
    checked = 0
    for batch in all_batches(corpus, injection):
        keep = hash_keep(batch["tokens"], batch["segments"], k=2, context=4)
        for ids in injection.ids:
            alone = hash_keep(ids[None, :-1], k=2, context=4)[0]
            assert not alone.all()
            for b, at in occurrences(batch, ids):
                assert np.array_equal(keep[b, at:at + len(ids) - 1], alone)
                checked += 1
    assert checked == CANARIES.occurrences


@pytest.mark.parametrize("text", [True, False])
def test_marks_are_those_of_the_canary_whatever_source_it_stands_in(corpus, text):
    """Sources that goldfish leaves alone, and words as the canary alone has them."""
    protect = Protect((True, False), text, context=2)
    injection = injected(corpus, protect=protect)
    pieces = plain_pieces(corpus.tokenizer)
    checked = 0
    rows = zip(all_batches(corpus, injection, protect=protect), all_batches(corpus, None, protect=protect), strict=True)
    for batch, plain in rows:
        same = np.ones((B, T), bool)
        for ids in injection.ids:
            alone = token_values([pieces[i] for i in ids], 2, 0) if text else np.zeros(len(ids), np.uint32)
            assert not text or (alone != NEVER).any()
            for b, at in occurrences(batch, ids):
                assert np.array_equal(batch["goldfish"][b, at:at + len(ids) - 1], alone[1:])
                same[b, max(at - 1, 0):at + len(ids) - 1] = False
                checked += 1
        assert np.array_equal(batch["goldfish"][same], plain["goldfish"][same])
    assert checked == CANARIES.occurrences


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change,word", [
    ({"format": "no fields"}, "{name} once and {secret} once"), ({"format": "{secret} {name}"}, "must come before"),
    ({"format": "{name} {secret}" * 2}, "once"), ({"format": "{name}{secret}" + "x" * 2000}, "2,014 characters"),
    ({"secret": "hex"}, "digits, letters, words"), ({"length": 0}, "from 1 to 32"), ({"repeats": (0,)}, "above 0"),
    ({"repeats": ()}, "above 0"), ({"repeats": (1, -1)}, "from 0"), ({"repeats": (1, 1)}, "given twice"),
    ({"per_repeat": 0}, "per_repeat = 0"), ({"repeats": (100_000,), "per_repeat": 11}, "1,100,000 occurrences"),
    ({"first": 0.5, "last": 0.5}, "shares of the run"), ({"last": float("nan")}, "shares of the run"),
    ({"seed": -1}, "seed = -1"),
])
def test_wrong_settings_are_refused(change, word):
    data = DataConfig(canaries=dataclasses.replace(CANARIES, **change))
    (problem,) = data.problems("data.")
    assert problem.startswith("data.canaries.") and word in problem


def test_canaries_that_do_not_fit_are_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="72 tokens.*room for 65"):
        injected(corpus, dataclasses.replace(CANARIES, length=32, format="{name} says the thing at last: {secret}"))
    with pytest.raises(ConfigError, match="200 occurrences are 4,600 tokens, 22% of the run, and at most 10%"):
        injected(corpus, dataclasses.replace(CANARIES, repeats=(100,)))
    config = load_config(write_config(tmp_path), ["--data.canaries={'repeats': (100,), 'per_repeat': 4}"])
    with pytest.raises(ConfigError, match="400 occurrences, and there are 320 rows"):
        validate(config, 8)
    less = dataclasses.replace(config, data=dataclasses.replace(config.data, canaries=dataclasses.replace(
        CANARIES, repeats=(1, 2), length=2)))
    unprotected = dataclasses.replace(less.data, sources=(dataclasses.replace(less.data.sources[0], goldfish=False),))
    assert not ignored(dataclasses.replace(less, data=unprotected)), "goldfish still acts on the canaries"
    assert ignored(dataclasses.replace(less, data=dataclasses.replace(unprotected, canaries=None)))
    assert "6 occurrences in steps 1 to 40: 132 tokens, 1.29% of the run" in dry_run(less, 8)


# ---- whole runs ------------------------------------------------------------------------------------------


def test_a_run_with_canaries_resumes_with_its_bits_and_with_no_other_schedule(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path)
    canaries = "--data.canaries={'format': '{name}: {secret}', 'length': 2, 'repeats': (0, 5), 'per_repeat': 1}"
    common = ["--steps=6", "--checkpoint.every=3", "--evals.every=0", "--evals.prompts=()", canaries]

    def run(name, *more):
        config = load_config(path, [f"--name={name}", *common, *more])
        train(config)
        return config.folder

    whole = state_hash(run("whole"), 6)
    assert "5 occurrences in steps 1 to 6: " in capsys.readouterr().out
    original = checkpoint_module.Checkpoints.save

    def save_and_stop(self, step, state, meta, **kwargs):
        original(self, step, state, meta, **kwargs)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert state_hash(run("stopped"), 6) == whole
    # Counts are of a run of so many steps: it can neither be made longer nor be given other canaries.
    for change in (["--steps=8"], [canaries.replace("5)", "4)")]):
        with pytest.raises(CheckpointError, match="corpus.canaries: the checkpoint has '5 occurrences over 6 steps"):
            train(load_config(path, ["--name=whole", *[a for a in common if a.split("=")[0] != change[0].split("=")[0]],
                                     *change]))
