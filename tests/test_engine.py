"""Continuous batching: each row's tokens are those of `generate` alone, whoever else comes and goes; nothing wedges."""

import dataclasses
import functools
import queue
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import TINY, random_model

from lmjax.axes import MeshConfig, make_mesh
from lmjax.data import load_tokenizer
from lmjax.decode.generate import SampleConfig, complete
from lmjax.errors import ConfigError, NonFiniteError
from lmjax.interop.load import Opened
from lmjax.serve import batch as module
from lmjax.serve.batch import Batch, Row
from lmjax.serve.engine import Closed, Engine, Job, QueueFull
from lmjax.state import shardings

VOCAB, EOS, POISON = 257, 256, 257  # the model has a row more than the tokenizer: it is never drawn
CONFIG = dataclasses.replace(TINY, vocab_size=VOCAB + 1, tied=False, max_seq_len=600, windows=(20, 0))


@functools.cache
def opened() -> Opened:
    """Random weights, far from any symmetry; the embedding of token POISON is NaN."""
    graphdef, state = nnx.split(random_model(CONFIG, seed=3, spread=0.5))
    params = nnx.to_pure_dict(state)
    params["embed_VD"] = params["embed_VD"].at[POISON].set(np.nan)
    return Opened("here", CONFIG, graphdef, params, None, load_tokenizer("bytes"))


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


# Greedy, filtered, one that outgrows the first room, penalised, and a plain one. Where a sampled row comes first, the
# others use its programs, which is most of what these tests cost.
ROWS = [
    ("a first prompt", SampleConfig(20, 0.0)), ("b", SampleConfig(9, 1.2, top_k=20, min_p=0.01)),
    ("a model that learns what it reads " * 7, SampleConfig(40, 0.9, top_p=0.9)),
    ("who", SampleConfig(12, 1.0, repetition_penalty=1.3, no_repeat_ngram=2, dry_multiplier=0.8)),
    ("and now", SampleConfig(15, 1.0))]


@functools.cache
def together():
    return complete(opened().graphdef, opened().params, [ids(text) for text, _ in ROWS], [c for _, c in ROWS],
                    key=jax.random.key(9), vocab_size=VOCAB, eos_id=EOS, logprobs=3)


def alone(i: int):
    """What `generate` makes of a row. All are made together to compile less: test_generate.py holds that to be the same
    as one by one."""
    return together()[i]


def row(i: int) -> Row:
    return Row(ids(ROWS[i][0]), ROWS[i][1], seed=9, index=i, logprobs=i == 3)


def run(batch: Batch, rows: list[Row], steps: int = 5) -> None:
    """Each row enters as soon as a slot is free."""
    waiting = list(rows)
    while waiting or any(batch.rows):
        while waiting and batch.free:
            batch.admit(waiting.pop(0))
        batch.advance(steps)
        for slot, one in enumerate(batch.rows):
            if one is not None and one.done:
                batch.release(slot)


@functools.cache
def the_batch() -> Batch:
    o = opened()
    return Batch(o.graphdef, o.params, slots=2, context=600, vocab_size=VOCAB, stop_ids=[EOS], breakers=lambda: [10])


def test_a_row_is_what_it_is_alone():
    """Five rows of unlike settings through two slots; the batch grows and gains processors while rows are in it."""
    batch, rows = the_batch(), [row(i) for i in range(len(ROWS))]
    rooms = set()
    advance, batch.advance = batch.advance, lambda steps: (advance(steps), rooms.add((batch.room, batch._needs)))
    run(batch, [rows[i] for i in (1, 0, 2, 3, 4)])
    del batch.advance
    for i, one in enumerate(rows):
        np.testing.assert_array_equal([t for t in one.tokens if t != EOS], alone(i).tokens)
        assert one.done and not one.bad
    np.testing.assert_allclose(rows[3].token_logprobs[:len(alone(3).tokens)], alone(3).logprobs, atol=1e-5)
    np.testing.assert_array_equal(np.array(rows[3].top_ids)[:len(alone(3).tokens), :3], alone(3).top_ids)
    assert len({room for room, _ in rooms} - {0}) > 1, "no row has outgrown its room"
    assert len({needs for _, needs in rooms}) > 1, "no processors were gained"
    assert batch.room == 0 and batch._state is None, "an empty batch holds no memory"
    assert len({tuple(one.tokens[:5]) for one in rows}) == len(rows), "rows that are alike test nothing"


def test_on_a_mesh():
    """Weights and rows split over four devices; a row enters while another runs."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    params = jax.device_put(opened().params, shardings(opened().params, mesh))
    rows = [row(1), row(4), row(1)]
    with jax.set_mesh(mesh):
        run(Batch(opened().graphdef, params, slots=2, context=600, vocab_size=VOCAB, stop_ids=[EOS]), rows)
    for one, i in zip(rows, (1, 4, 1), strict=True):
        np.testing.assert_array_equal([t for t in one.tokens if t != EOS], alone(i).tokens)


def test_a_wrong_insertion_would_be_seen(monkeypatch):
    """Known wrong: rows that always enter slot 0 on the device; and keys that are not the row's."""
    insert = module._insert
    monkeypatch.setattr(module, "_insert", lambda state, one, slot: insert(state, one, np.int32(0)))
    rows = [row(1), row(4)]
    batch = the_batch()
    batch.admit(rows[0])
    batch.admit(rows[1])
    batch.advance(5)
    batch.clear()
    assert rows[0].tokens[:6] != alone(1).tokens[:6].tolist()
    other = dataclasses.replace(row(1), index=2, tokens=[])
    monkeypatch.undo()
    run(batch, [other])
    assert other.tokens[:8] != alone(1).tokens[:8].tolist()


def test_nan_stays_in_its_row():
    """A row whose logits are not finite ends alone, and leaves nothing in the slot for the next one."""
    bad, good, later = Row(np.array([POISON, 3], np.int32), SampleConfig(20, 1.0)), row(4), row(1)
    batch = the_batch()
    run(batch, [good, bad, later])
    assert bad.bad and bad.done and not good.bad and not later.bad
    for one, i in ((good, 4), (later, 1)):
        np.testing.assert_array_equal([t for t in one.tokens if t != EOS], alone(i).tokens)


def test_logit_bias():
    """-100 rules a token out and +100 makes it the only one, in that row alone."""
    free = alone(4).tokens
    biased, plain, without = row(4), row(4), row(4)
    biased.bias, without.bias = {65: 100.0}, {int(free[0]): -100.0}
    run(the_batch(), [biased, plain, without])
    assert set(biased.tokens) == {65} and len(biased.tokens) == 15
    np.testing.assert_array_equal([t for t in plain.tokens if t != EOS], free)
    assert free[0] != without.tokens[0]


# ---- the scheduler -------------------------------------------------------------------------------------


class Ear:
    """Hears the updates of a job."""

    def __init__(self, one: Row, **kwargs):
        self.heard: queue.Queue = queue.Queue()
        self.job = Job(one, self.heard.put, **kwargs)

    def final(self):
        while not (update := self.heard.get(timeout=60)).final:
            pass
        return update


@pytest.fixture(scope="module")
def engine():
    engine = Engine(opened(), slots=2, max_queue=40, chunk=5)
    engine._batch = the_batch()  # compiled already
    engine.start()
    yield engine
    engine.stop()
    assert not engine._thread.is_alive()


def test_many_more_requests_than_slots(engine):
    """Twelve threads ask at unlike times; all get what they would have got alone, in pieces that only grow."""
    some = (1, 4, 2)
    ears = [Ear(row(some[i % 3]), stream=i % 2 == 0) for i in range(12)]
    threads = [threading.Thread(target=engine.submit, args=([ear.job],)) for ear in ears]
    for thread in threads:
        thread.start()
    for i, ear in enumerate(ears):
        update = ear.final()
        expected = alone(some[i % 3])
        np.testing.assert_array_equal(update.completion.tokens, expected.tokens)
        assert update.completion.finish == expected.finish
        assert update.generated == len(expected.tokens) + (expected.finish == "stop")
        assert ear.heard.empty(), "nothing follows the last update"
    assert engine.metrics.busy_slots > engine.metrics.chunks, "nothing ran together"
    assert not engine.busy


def test_stop_strings_end_a_row(engine):
    text = opened().tokenizer.decode(alone(2).tokens)
    at = next(i for i in range(10, len(text) - 2) if text.find(text[i:i + 2]) == i and "\ufffd" not in text[i:i + 2])
    ear = Ear(row(2), stop=(text[at:at + 2],), stream=True)
    engine.submit([ear.job])
    update = ear.final()
    assert update.completion.finish == "string" and update.completion.text == text[:at]
    assert update.generated == len(update.completion.tokens) < len(alone(2).tokens)


def test_failures_reach_who_waits_and_nobody_else(engine, monkeypatch):
    """NaN, a deadline, a client that leaves, and a device that fails: each ends its rows, and the next is answered."""
    bad = Ear(Row(np.array([POISON], np.int32), SampleConfig(9, 1.0)))
    late = Ear(row(1), deadline=time.monotonic() - 1)
    gone = Ear(row(2))
    good = Ear(row(4))
    engine.submit([bad.job, late.job, gone.job, good.job])
    engine.cancel([gone.job])
    assert (bad.final().error, late.final().error, gone.final().error) == ("non_finite", "timeout", "cancelled")
    np.testing.assert_array_equal(good.final().completion.tokens, alone(4).tokens)

    def broken(*_):
        raise RuntimeError("out of memory, say")
    with monkeypatch.context() as patch:
        patch.setattr(engine._batch, "advance", broken)
        ears = [Ear(row(1)), Ear(row(4))]
        engine.submit([ear.job for ear in ears])
        assert [ear.final().error for ear in ears] == ["failed", "failed"]
    after = Ear(row(4))
    engine.submit([after.job])
    np.testing.assert_array_equal(after.final().completion.tokens, alone(4).tokens)
    assert engine.metrics.finished["failed"] == 2 and engine.alive


def test_the_queue_is_bounded(engine):
    with pytest.raises(QueueFull) as error:
        engine.submit([Ear(row(0)).job for _ in range(41)])
    assert 1 <= error.value.retry_after <= 60 and engine.metrics.rejected == 1
    assert not engine.busy, "all or none"


def test_stopping():
    """What runs is finished within the patience; what is left ends, and later ones are refused."""
    for patience, expected in ((60.0, ""), (0.0, "shutdown")):
        engine = Engine(opened(), slots=2, chunk=5)
        engine._batch = the_batch()
        ear = Ear(row(2))
        engine.submit([ear.job])
        engine.start()
        engine.stop(patience)
        assert ear.final().error == expected and not engine.alive
        with pytest.raises(Closed):
            engine.submit([Ear(row(0)).job])


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError) as error:
        Engine(opened(), slots=0, context=601, max_queue=0)
    for words in ("--slots 0: must be at least 1", "--max-queue 0", "--context 601: from 2 to the model's max_seq_len"):
        assert words in str(error.value)
    small = dataclasses.replace(opened(), config=dataclasses.replace(CONFIG, vocab_size=200))
    with pytest.raises(ConfigError, match="257 tokens and the model's vocabulary 200"):
        Engine(small)
    params = {**opened().params, "embed_VD": opened().params["embed_VD"] * np.nan}
    engine = Engine(dataclasses.replace(opened(), params=params), slots=2)
    with pytest.raises(NonFiniteError, match="not finite after one token"):
        engine.warm_up()
