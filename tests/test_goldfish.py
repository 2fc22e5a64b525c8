"""Goldfish masks: published golden values, statistics, causality, and the holes that they must not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from lmjax.losses.goldfish import (
    GoldfishConfig,
    drop_rate,
    dropped_steps,
    equal_steps,
    hash_keep,
    hash_table_keep,
    keep_mask,
    reference_table,
)


def ids(rows=4, length=4000, vocab=50257, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


# ---- the published mask --------------------------------------------------------------------------------


def published_drop(targets, k, h):
    """The published rule, written with 64-bit integers: product window, table, threshold."""
    key = np.multiply.reduce(sliding_window_view(targets.astype(np.int64), h, axis=1), axis=2, dtype=np.int64)
    drop = np.zeros(targets.shape, bool)
    drop[:, h - 1:] = reference_table()[np.mod(key, 1_000_003)] < 1 / k
    return drop


def test_reference_table_golden_values():
    np.testing.assert_array_equal(reference_table()[:3], np.float32([0.23368388, 0.44126403, 0.7411477]))
    assert reference_table().shape == (1_000_003,)


@pytest.mark.parametrize("h,k", [(4, 4), (13, 4), (13, 3), (50, 50)])
@pytest.mark.parametrize("vocab", [256, 50257, 131072])
def test_hash_table_equals_the_published_mask(h, k, vocab):
    tokens = ids(vocab=vocab)
    right = ~published_drop(tokens, k, h)
    np.testing.assert_array_equal(hash_table_keep(tokens, k=k, context=h), right)
    jitted = jax.jit(lambda t: hash_table_keep(t, k=k, context=h))(jnp.asarray(tokens))
    np.testing.assert_array_equal(jitted, right)


def test_a_32_bit_product_would_be_seen():
    tokens = ids()
    key = np.multiply.reduce(sliding_window_view(tokens, 13, axis=1), axis=2, dtype=np.int32)
    wrong = np.zeros(tokens.shape, bool)
    wrong[:, 12:] = reference_table()[np.mod(key, 1_000_003)] < 1 / 4
    assert (wrong != published_drop(tokens, 4, 13)).mean() > 0.1


# ---- our hash ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 50])
@pytest.mark.parametrize("h,vocab", [(1, 50257), (4, 256), (4, 50257), (13, 256), (13, 50257), (50, 256), (50, 50257)])
def test_rate_and_independence(k, h, vocab):
    tokens = ids(rows=8, length=25_000, vocab=vocab)
    drop = ~hash_keep(tokens, k=k, context=h)[:, h:]
    n, p = drop.size, 1 / k
    contexts = min(n, vocab**h)
    assert abs(drop.mean() - p) < 4 * np.sqrt(p * (1 - p) / contexts) + 1e-4
    after = drop[:, 1:][drop[:, :-1]].mean()
    assert abs(after - p) < 5 * np.sqrt(p * (1 - p) / (contexts * p)) + 1e-3, "drops come in clumps"


def test_numpy_and_jit_give_the_same_bits():
    tokens = ids(rows=2, length=999)
    segments = np.cumsum(np.random.default_rng(1).random(tokens.shape) < 0.02, axis=1).astype(np.int32)
    for k, h, seed in ((4, 13, 0), (3, 1, 7), (50, 50, 2**31)):
        jitted = jax.jit(lambda t, s, k=k, h=h, seed=seed: hash_keep(t, s, k=k, context=h, seed=seed))(
            jnp.asarray(tokens), jnp.asarray(segments))
        np.testing.assert_array_equal(jitted, hash_keep(tokens, segments, k=k, context=h, seed=seed))


def test_depends_on_the_h_tokens_before_the_target_and_on_nothing_else():
    tokens, h = ids(rows=1, length=400), 13
    base = hash_keep(tokens, k=2, context=h)
    for t in (200, 201, 250):
        changed = tokens.copy()
        changed[0, t] += 1
        differs = np.flatnonzero(hash_keep(changed, k=2, context=h)[0] != base[0])
        # Position t + j holds the target after token t + j: token t is in its context for j = 0 … h - 1.
        assert len(differs) and differs.min() >= t and differs.max() < t + h
    swapped = tokens.copy()
    swapped[0, [200, 201]] = swapped[0, [201, 200]]
    assert (hash_keep(swapped, k=2, context=h) != base).any(), "the order of the context must matter"
    product = hash_table_keep(tokens, k=2, context=h)[0, 202:210]
    np.testing.assert_array_equal(product, hash_table_keep(swapped, k=2, context=h)[0, 202:210])


def test_a_passage_loses_the_same_tokens_wherever_it_is_packed():
    passage, h = ids(rows=1, length=100, seed=5)[0], 8
    rows, segments = ids(rows=2, length=300, seed=6), np.ones((2, 300), np.int32)
    for row, start in ((0, 17), (1, 150)):
        rows[row, start:start + 100] = passage
        segments[row, start:] = 2
        segments[row, start + 100:] = 3
    keep = hash_keep(rows, segments, k=3, context=h)
    np.testing.assert_array_equal(keep[0, 17:117], keep[1, 150:250])
    assert not keep[0, 17:117].all()
    # Without document boundaries the first h - 1 positions depend on the neighbours.
    blind = hash_keep(rows, None, k=3, context=h)
    assert (blind[0, 17:117] != blind[1, 150:250]).any()
    assert keep[0, 17:17 + h - 1].all(), "too little context in this document: kept"


def test_zero_ids_do_not_clump():
    """An id 0 makes a product hash 0 for h windows; ours must not care."""
    tokens = ids(rows=8, length=20_000, vocab=40)  # 2.5 % zeros
    h, k = 13, 4
    near_zero = np.zeros(tokens.shape, bool)
    near_zero[:, h:] = (sliding_window_view(tokens, h, axis=1) == 0).any(axis=2)[:, 1:]
    ours = ~hash_keep(tokens, k=k, context=h)
    assert abs(ours[near_zero].mean() - 1 / k) < 0.01
    published = ~hash_table_keep(tokens, k=k, context=h)
    assert abs(published[near_zero].mean() - 1 / k) > 0.2, "the published hash has this hole"


def test_seed_changes_the_mask():
    tokens = ids(rows=1)
    a, b = (hash_keep(tokens, k=4, context=13, seed=s) for s in (0, 1))
    assert 0.3 < (a != b).mean() < 0.45  # 2 * 1/4 * 3/4


# ---- all strategies ------------------------------------------------------------------------------------


def test_strategies():
    tokens = jnp.asarray(ids(rows=4, length=1000))
    key = jax.random.key(0)
    assert keep_mask(GoldfishConfig("none"), tokens, tokens).all()
    static = np.asarray(keep_mask(GoldfishConfig("static", k=4), tokens, tokens))
    assert not static[:, ::4].any() and static[:, 1::4].all()
    random = [np.asarray(keep_mask(GoldfishConfig("random", k=4), tokens, tokens, key=k))
              for k in (key, key, jax.random.key(1))]
    assert (random[0] == random[1]).all() and (random[0] != random[2]).any()
    assert abs(1 - random[0].mean() - 0.25) < 0.03


def test_rows_shorter_than_the_context_are_kept_whole():
    tokens = ids(rows=2, length=5)
    assert hash_keep(tokens, k=2, context=13).all() and hash_table_keep(tokens, k=2, context=13).all()


@pytest.mark.parametrize("config,word", [(GoldfishConfig("hsh"), "strategy"), (GoldfishConfig(k=1), "k=1"),
                                         (GoldfishConfig(context=0), "context")])
def test_problems(config, word):
    assert any(word in p for p in config.problems())


# ---- schedules and gates -------------------------------------------------------------------------------


SCHEDULED = GoldfishConfig("hash", k=4, start=10, k_final=8, anneal_steps=20)


def test_the_rate_of_a_schedule():
    rates = [float(drop_rate(SCHEDULED, step)) for step in (0, 9, 10, 20, 30, 1000)]
    np.testing.assert_allclose(rates, [0, 0, 1 / 4, 3 / 16, 1 / 8, 1 / 8])
    for config in (SCHEDULED, GoldfishConfig("hash", k=4), GoldfishConfig("hash", k=3, start=7),
                   GoldfishConfig("hash", k=8, k_final=2, anneal_steps=5)):
        for steps in (0, 1, 9, 11, 30, 31, 200):
            assert dropped_steps(config, steps) == pytest.approx(sum(float(drop_rate(config, t)) for t in range(steps)))


def test_equal_steps_is_the_least_that_is_enough():
    for k in (2, 3, 4, 50):
        for steps in (1, 3, 9, 1000, 10**9):
            assert equal_steps(GoldfishConfig("hash", k=k), steps) == -(-steps * k // (k - 1))
    for share in (0.3, 1.0):
        for steps in (5, 40, 300):
            n = equal_steps(SCHEDULED, steps, share)
            kept = [m - share * dropped_steps(SCHEDULED, m) for m in (n - 1, n)]
            assert kept[0] < steps <= kept[1] + 1e-9
    assert equal_steps(GoldfishConfig("none"), 7) == 7


@pytest.mark.parametrize("strategy", ["hash", "hash_table", "text_hash", "random"])
def test_a_schedule_is_a_function_of_the_step_inside_jit(strategy):
    tokens = jnp.asarray(ids(rows=2, length=4000))
    marks = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, tokens.shape, np.uint32))
    config = GoldfishConfig(strategy, k=4, start=10, k_final=16, anneal_steps=20)
    keep = jax.jit(lambda step: keep_mask(config, tokens, tokens, key=jax.random.key(0), step=step,
                                          marks_BT=marks if strategy == "text_hash" else None))
    masks = [np.asarray(keep(jnp.int32(step))) for step in (0, 9, 10, 20, 30, 99)]
    np.testing.assert_allclose([1 - m.mean() for m in masks], [0, 0, 1 / 4, 5 / 32, 1 / 16, 1 / 16], atol=0.02)
    assert keep._cache_size() == 1, "the threshold is a traced value"
    for more, fewer in ((2, 3), (3, 4), (4, 5)):
        assert not (masks[more] & ~masks[fewer]).any(), "what a larger k drops, a smaller one drops too"
    if strategy != "random":
        constant = keep_mask(GoldfishConfig(strategy, k=4), tokens, tokens,
                             marks_BT=marks if strategy == "text_hash" else None)
        np.testing.assert_array_equal(masks[2], constant)


def test_unprotected_targets_are_kept():
    tokens = ids(rows=4, length=1000)
    marks = np.zeros(tokens.shape, np.uint32)
    marks[::2] = 2**32 - 1
    for strategy in ("hash", "hash_table", "static"):
        config = GoldfishConfig(strategy, k=2, context=5)
        keep = keep_mask(config, tokens, tokens, marks_BT=marks)
        assert keep[::2].all()
        np.testing.assert_array_equal(keep[1::2], keep_mask(config, tokens, tokens)[1::2])
    static = [keep_mask(GoldfishConfig("static", k=4, start=5), tokens, tokens, step=np.int32(s)) for s in (4, 5)]
    assert static[0].all() and not static[1][:, ::4].any()


@pytest.mark.parametrize("config,word", [
    (GoldfishConfig("hash", k_final=8), "set both"), (GoldfishConfig("hash", anneal_steps=8), "set both"),
    (GoldfishConfig("hash", k_final=1, anneal_steps=8), "k_final=1"), (GoldfishConfig(start=-1), "start=-1"),
    (GoldfishConfig("static", k_final=8, anneal_steps=8), "another strategy")])
def test_problems_of_schedules(config, word):
    assert any(word in p for p in config.problems())
