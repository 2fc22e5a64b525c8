"""Logit processors: each equals a brute-force NumPy version row by row, compositions too, and draws follow them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK

from lmjax.decode import processors
from lmjax.decode.processors import (
    Active,
    SampleConfig,
    active,
    choose,
    filtered,
    likeliest,
    penalise,
    remember,
    remember_prompt,
    settings_of,
)

V, B, S, WIDTH = 50, 40, 24, 16
BREAKERS = np.zeros(V, bool)
BREAKERS[3] = True


# ---- Brute force: one row, float64, no array tricks --------------------------------------------------------


def brute_penalties(z, c, prompt, new):
    """The logits of one row after penalties, n-grams and DRY."""
    z, row = z.astype(np.float64).copy(), [*prompt, *new]
    for token in set(row):
        z[token] = z[token] / c.repetition_penalty if z[token] > 0 else z[token] * c.repetition_penalty
    for token in set(new):
        z[token] -= c.frequency_penalty * new.count(token) + c.presence_penalty
    n = c.no_repeat_ngram
    if n:
        for i in range(len(row) - n + 1):
            if row[i:i + n - 1] == row[len(row) - n + 1:]:
                z[row[i + n - 1]] = -np.inf
    costs = np.zeros(V)
    for i in range(1, len(row)):  # a repetition that token row[i] would prolong
        match = 0
        while match < i and row[i - 1 - match] == row[len(row) - 1 - match] and row[i - 1 - match] != 3:
            match += 1
        if c.dry_multiplier and match >= c.dry_allowed_length:
            costs[row[i]] = max(costs[row[i]], c.dry_multiplier * c.dry_base ** (match - c.dry_allowed_length))
    return z - costs


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def brute_best(z, score, p):
    """Tokens in order of score until their probabilities reach p."""
    probs, kept, mass = softmax(z), [], 0.0
    for token in np.argsort(-score):
        if mass >= p:
            break
        kept.append(token)
        mass += probs[token]
    return np.where(np.isin(np.arange(V), kept), z, -np.inf)


def brute_filters(z, c):
    z = z.astype(np.float64) / c.temperature
    if c.top_k:
        z = np.where(np.isin(np.arange(V), np.argsort(-z)[:c.top_k]), z, -np.inf)
    if c.top_p < 1:
        z = brute_best(z, z, c.top_p)
    if c.min_p:
        probs = softmax(z)
        z = np.where(probs >= c.min_p * probs.max(), z, -np.inf)
    if c.typical_p < 1:
        probs = softmax(z)
        surprise = -np.log(np.where(probs > 0, probs, 1))
        entropy = (probs * surprise).sum()
        z = brute_best(z, np.where(probs > 0, -np.abs(surprise - entropy), -np.inf), c.typical_p)
    return z


# ---- Settings that differ from row to row ------------------------------------------------------------------


def random_configs(*names):
    """One config a row: the named fields random and on, some rows left off, all else neutral."""
    rng = np.random.default_rng(len(names))
    values = {"temperature": lambda: rng.uniform(0.3, 2), "top_k": lambda: int(rng.integers(1, 20)),
              "top_p": lambda: rng.uniform(0.05, 0.99), "min_p": lambda: rng.uniform(0.01, 0.5),
              "typical_p": lambda: rng.uniform(0.05, 0.95), "repetition_penalty": lambda: rng.uniform(0.5, 2),
              "frequency_penalty": lambda: rng.uniform(-1, 1), "presence_penalty": lambda: rng.uniform(-1, 1),
              "no_repeat_ngram": lambda: int(rng.integers(1, 4)), "dry_multiplier": lambda: rng.uniform(0.1, 2),
              "dry_base": lambda: rng.uniform(1, 2), "dry_allowed_length": lambda: int(rng.integers(1, 4))}
    neutral = SampleConfig(temperature=1.0, top_p=1.0)
    return [dataclasses.replace(neutral, **{n: float(np.float32(values[n]())) if n not in (
        "top_k", "no_repeat_ngram", "dry_allowed_length") else values[n]() for n in names}) if row % 8 else neutral
        for row in range(B)]


LOGITS = (np.random.default_rng(0).normal(size=(B, V)) * 2.5).astype(np.float32)
EVERYTHING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@pytest.mark.parametrize("names", [("temperature",), ("top_k",), ("top_p",), ("min_p",), ("typical_p",), EVERYTHING],
                         ids="+".join)
def test_filters_equal_brute_force(names):
    configs = random_configs(*names)
    run = jax.jit(filtered, static_argnums=2, compiler_options=QUICK)
    ours = np.asarray(run(LOGITS, settings_of(configs), active(configs)))
    right = np.stack([brute_filters(z, c) for z, c in zip(LOGITS, configs, strict=True)])
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(right))
    np.testing.assert_allclose(ours[np.isfinite(ours)], right[np.isfinite(right)], rtol=1e-6)
    moved = [dataclasses.replace(c) for c in np.roll(configs, 1)]  # each row with its neighbour's settings
    wrong = np.stack([brute_filters(z, c) for z, c in zip(LOGITS, moved, strict=True)])
    assert not np.array_equal(ours, wrong.astype(np.float32))


def rows_of_text():
    """(prompts, new tokens): short alphabets, so that repetitions are everywhere; lengths differ."""
    rng = np.random.default_rng(2)
    rows = [list(map(int, rng.integers(0, rng.integers(2, 8), rng.integers(1, WIDTH + 1)))) for _ in range(B)]
    return rows, [list(map(int, rng.integers(0, 4, 6))) for _ in range(B)]


@functools.cache
def remembered(uses: Active):
    """(history, tokens, lengths) after the prompts and 6 more tokens, one at a time."""
    prompts, new = rows_of_text()
    tokens, lengths = np.zeros((B, S), np.int32), np.array([len(p) for p in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = prompt
    start = jax.jit(remember_prompt, static_argnums=(0, 3, 4), compiler_options=QUICK)
    step = jax.jit(remember, compiler_options=QUICK)
    history = start(uses, tokens, lengths, WIDTH, V, BREAKERS)
    for i in range(6):
        column = np.array([row[i] for row in new], np.int32)
        tokens[np.arange(B), lengths] = column
        history = step(history, jnp.asarray(tokens), lengths, column, np.ones(B, bool), BREAKERS)
        lengths = lengths + 1
    return history, tokens, lengths


@pytest.mark.parametrize("names", [
    ("repetition_penalty",), ("frequency_penalty", "presence_penalty"), ("no_repeat_ngram",),
    ("dry_multiplier", "dry_base", "dry_allowed_length"),
    ("repetition_penalty", "frequency_penalty", "no_repeat_ngram", "dry_multiplier")], ids="+".join)
def test_penalties_equal_brute_force(names):
    configs = random_configs(*names)
    history, tokens, lengths = remembered(active(configs))
    run = jax.jit(penalise, static_argnums=2, compiler_options=QUICK)
    ours = np.asarray(run(LOGITS, settings_of(configs), active(configs), history, tokens, lengths))
    prompts, new = rows_of_text()
    right = np.stack([brute_penalties(*row) for row in zip(LOGITS, configs, prompts, new, strict=True)])
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(right))
    np.testing.assert_allclose(ours[np.isfinite(ours)], right[np.isfinite(right)], rtol=1e-4, atol=1e-5)
    later = [[*n[1:], n[0]] for n in new]  # the same tokens in another order: only counts may stay equal
    wrong = np.stack([brute_penalties(*row) for row in zip(LOGITS, configs, prompts, later, strict=True)])
    sums = names in (("repetition_penalty",), ("frequency_penalty", "presence_penalty"))
    assert np.allclose(np.where(np.isfinite(ours), ours, 0), np.where(np.isfinite(wrong), wrong, 0), atol=1e-4) == sums


def test_long_repetitions_cost_nothing_where_dry_is_off():
    """1.75^200 is infinite in float32, and 0 times that would be NaN."""
    n = 200
    logits, tokens = jnp.zeros((2, V)), jnp.full((2, n + 1), 7)
    matches = jnp.broadcast_to(jnp.arange(n + 1), (2, n + 1))
    out = processors.dry(logits, matches, tokens, jnp.full(2, n + 1), jnp.asarray([0.0, 0.8]),
                         jnp.full(2, 1.75), jnp.full(2, 2))
    np.testing.assert_array_equal(out[0], 0)
    assert out[1, 7] <= -1e29 and np.isfinite(out).all() and 1.75**n > 3.5e38


def test_a_bias_is_added_before_everything():
    configs = [SampleConfig(repetition_penalty=2.0)]
    settings = settings_of(configs) | {"logit_bias": jnp.full((1, V), 3.0)}
    history = processors.History(jnp.ones((1, V), bool), None, None, None)
    out = penalise(jnp.full((1, V), -1.0), settings, active(configs), history, jnp.zeros((1, 4), int), jnp.asarray([4]))
    np.testing.assert_array_equal(out, (-1 + 3) / 2)


def test_rows_that_are_done_remember_nothing():
    configs = random_configs("repetition_penalty", "frequency_penalty", "no_repeat_ngram", "dry_multiplier")
    history, tokens, lengths = remembered(active(configs))
    more = remember(history, jnp.asarray(tokens), lengths, np.zeros(B, np.int32), np.arange(B) < 5, BREAKERS)
    for old, new in zip(jax.tree.leaves(history), jax.tree.leaves(more), strict=True):
        np.testing.assert_array_equal(old[5:], new[5:])
    assert not np.array_equal(history.counts_BV[:5], more.counts_BV[:5])


def chi_square(counts, p):
    kept = p > 0
    n = counts.sum()
    assert counts[~kept].sum() == 0
    return ((counts[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum(), kept.sum() - 1


@pytest.mark.parametrize("config", [
    SampleConfig(temperature=0.7, top_k=8, top_p=1.0), SampleConfig(temperature=1.3, top_p=0.9, min_p=0.02),
    SampleConfig(temperature=1.0, top_p=1.0, typical_p=0.8)], ids=["top_k", "top_p+min_p", "typical"])
def test_sampled_frequencies(config):
    """Chi-square of 20,000 draws, each with the key of its own row, against the brute-force distribution."""
    n, z = 20_000, LOGITS[1]
    keys = jax.random.split(jax.random.key(0), n)
    draws = jax.jit(choose, static_argnums=2, compiler_options=QUICK)(
        jnp.broadcast_to(z, (n, V)), settings_of([config] * n), active([config]), keys)
    counts = np.bincount(draws, minlength=V)
    value, freedom = chi_square(counts, softmax(brute_filters(z, config)))
    limit = freedom + 4 * (2 * freedom) ** 0.5  # beyond 99.9 % for each freedom here
    assert 2 <= freedom and value < limit
    hotter = dataclasses.replace(config, temperature=config.temperature * 1.2)
    p = softmax(np.where(np.isfinite(brute_filters(z, config)), z / hotter.temperature, -np.inf))
    assert chi_square(counts, p)[0] > limit, "a wrong temperature must be seen"


def test_greedy_and_sampled_rows_in_one_batch():
    configs = [SampleConfig(temperature=0.0 if row % 2 else 1.0, top_p=1.0) for row in range(B)]
    keys = jax.random.split(jax.random.key(0), B)
    tokens = np.asarray(choose(jnp.asarray(LOGITS), settings_of(configs), active(configs), keys))
    np.testing.assert_array_equal(tokens[1::2], LOGITS[1::2].argmax(1))
    assert np.any(tokens[::2] != LOGITS[::2].argmax(1))


def test_likeliest_is_the_first_of_equals():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -2.0, -jnp.inf], [jnp.nan, 1.0, 2.0]])
    np.testing.assert_array_equal(likeliest(logits)[:2], [1, 1])
    assert 0 <= int(likeliest(logits)[2]) < 3


def test_what_no_row_uses_is_not_compiled():
    def lines(configs):
        return len(str(jax.make_jaxpr(filtered, static_argnums=2)(LOGITS, settings_of(configs), active(configs))))
    plain = [SampleConfig(temperature=1.0, top_p=1.0)]
    assert active(plain) == Active(sample=True) and active([SampleConfig(temperature=0.0, top_k=5)]) == Active()
    assert lines(plain * B) < lines([SampleConfig(top_p=0.9)] * B) / 4


def test_tokens_of_equal_score_stay_together():
    z = jnp.asarray([[1.0, 1.0, 0.0, -1.0]])
    assert np.isfinite(processors.top_k(z, jnp.asarray([1]))).sum() == 2
    assert np.isfinite(processors.top_p(z, jnp.asarray([0.01]))).sum() == 2


def test_problems():
    bad = SampleConfig(0, -1.0, -1, 0.0, 2.0, 0.0, 0.0, np.inf, np.nan, -1, -1.0, 0.5, 0)
    assert len(bad.problems()) == 13 and not SampleConfig().problems()
    assert SampleConfig(temperature=float("nan")).problems() == [
        "sample.temperature=nan: must not be negative; 0 is greedy"]
