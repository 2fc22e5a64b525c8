"""Watermarks: words equal on both sides, schemes equal brute force and distort as promised, p-values are exact."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import QUICK

from lmjax.decode import marks as words_module
from lmjax.decode import watermark as device
from lmjax.decode.marks import SCHEMES, Watermark, threefry4x32, words_of
from lmjax.watermark.detect import detect, log_binomial_tail, log_gamma_tail, scored_positions

SECRET = b"a secret of sixteen bytes or more"
V = 50


def mark(scheme="gumbel", secret=SECRET, **settings):
    return Watermark(scheme, secret, **settings)


def compiled(function, *static):
    return jax.jit(function, static_argnums=static, compiler_options=QUICK)


# ---- The words -----------------------------------------------------------------------------------------

# Published known answers of Threefry-4x32-20 (Random123, tests/kat_vectors): block, key, output.
PI = [int(word, 16) for word in "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 082efa98 ec4e6c89".split()]
KNOWN = [([0] * 4, [0] * 4, "9c6ca96a e17eae66 fc10ecd4 5256a7d8"),
         ([2**32 - 1] * 4, [2**32 - 1] * 4, "2a881696 57012287 f6c7446e a16a6732"),
         (PI[:4], PI[4:], "59cd1dbb b8879579 86b5d00c ac8b6d84")]


def hexadecimal(words):
    return " ".join(f"{int(word[0]):08x}" for word in words)


def test_known_answers(monkeypatch):
    loop = compiled(lambda key, block: threefry4x32(key, block, jax.lax.fori_loop))
    for block, key, answer in KNOWN:
        key, block = ([np.array([word], np.uint32) for word in four] for four in (key, block))
        assert hexadecimal(threefry4x32(key, block)) == hexadecimal(loop(key, block)) == answer
    monkeypatch.setattr(words_module, "_ROTATIONS", words_module._ROTATIONS[::-1])
    assert hexadecimal(threefry4x32(key, block)) != answer


MIXED = [mark("kgw"), None, mark("gumbel", context=1), mark("tournament", context=3, layers=7), mark("kgw", context=6)]


def rows(alphabet=V, length=24, seed=0):
    return np.random.default_rng(seed).integers(0, alphabet, (len(MIXED), length)).astype(np.int32)


def test_device_and_detector_have_the_same_bits():
    tokens, lengths = rows(), np.array([24, 9, 5, 17, 6], np.int32)
    words = np.asarray(compiled(device.step_words, 1, 4)(device.settings_of(MIXED), 6, tokens, lengths, V))
    assert words.dtype == np.uint32 and words.shape == (len(MIXED), V)
    for row, w in enumerate(MIXED):
        if w is None:
            continue
        context = tokens[row, lengths[row] - w.context:lengths[row]]
        contexts = np.tile(context, (V, 1))
        np.testing.assert_array_equal(words[row], words_of(w, contexts, np.arange(V)))
        for wrong in (dataclasses.replace(w, secret=SECRET + b"."), dataclasses.replace(
                w, scheme="kgw" if w.scheme != "kgw" else "gumbel")):
            assert np.mean(words[row] == words_of(wrong, contexts, np.arange(V))) < 0.1
        contexts[:, 0] += 1  # one other token, the furthest
        assert np.mean(words[row] == words_of(w, contexts, np.arange(V))) < 0.1


def test_words_are_uniform_and_independent_of_each_other():
    n = 40_000
    contexts = np.stack([np.arange(n) // 200] * 4, axis=1)
    words = words_of(mark(), contexts, np.arange(n) % 200)
    assert len(np.unique(words)) > 0.9999 * n
    for shift in range(0, 32, 8):
        counts = np.bincount(words >> shift & 255, minlength=256)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    u = words.reshape(200, 200) / 2**32
    near = np.corrcoef(u[:, :-1].reshape(-1), u[:, 1:].reshape(-1))[0, 1]
    assert abs(near) < 4 / n**0.5 and abs(np.corrcoef(u[:-1].reshape(-1), u[1:].reshape(-1))[0, 1]) < 4 / n**0.5
    green = np.mean(words < mark("kgw").threshold)
    assert abs(green - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5


def test_a_secret_is_not_shown():
    assert "secret of" not in repr(mark()) and "secret" not in str(mark("kgw").problems())
    assert not np.array_equal(mark("kgw").key(), mark("gumbel").key())


# ---- The schemes ---------------------------------------------------------------------------------------


def random_words(n, seed=0, vocab=V):
    return np.random.default_rng(seed).integers(0, 2**32, (n, vocab), dtype=np.uint32)


LOGITS = np.random.default_rng(5).normal(size=(1, V)).astype(np.float32) * 2
P = np.exp(LOGITS[0].astype(np.float64)) / np.exp(LOGITS[0].astype(np.float64)).sum()


def test_kgw_adds_delta_to_green_tokens():
    words = random_words(3)
    ours = device.kgw(jnp.tile(LOGITS, (3, 1)), words, np.uint32([2**30, 2**31, 2**31]), np.float32([2.0, 0.5, 0.0]))
    right = LOGITS + np.array([[2.0], [0.5], [0.0]]) * (words / 2**32 < np.array([[0.25], [0.5], [0.5]]))
    np.testing.assert_allclose(ours, right, rtol=1e-6)


def test_gumbel_is_aaronsons_rule():
    words = random_words(500)
    ours = np.asarray(compiled(device.gumbel)(np.tile(LOGITS, (500, 1)), words))
    r = 1 - (words + 0.5) / 2**32
    np.testing.assert_array_equal(ours.argmax(1), (r ** (1 / P)).argmax(1))
    assert (np.isfinite(ours).sum(1) == 1).all()
    assert np.mean(ours.argmax(1) == (r * P).argmax(1)) < 0.9


def test_extreme_words_do_not_choose_what_was_ruled_out():
    only = np.where(np.arange(V) == 7, 0.0, -np.inf)[None].astype(np.float32)
    for word in (0, 2**32 - 1):
        words = np.full((1, V), word, np.uint32)
        assert np.argmax(device.gumbel(only, words)) == 7
        left = np.asarray(device.tournament(only, words, np.array([32]), 32))
        assert left[0, 7] == 0.0 and np.isneginf(np.delete(left[0], 7)).all()


def test_the_tournament_is_a_tournament():
    """Two layers by enumeration: four candidates from p, pairs decided by g_1, then winners by g_2, ties by a coin."""
    p, words = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0b10, 0b01, 0b11, 0b00], np.uint32)
    g = (words[:, None] >> np.arange(2)) & 1

    def play(a, b, layer):
        """{winner: chance}"""
        if g[a, layer] == g[b, layer]:
            return [(a, 0.5), (b, 0.5)]
        return [(a if g[a, layer] else b, 1.0)]

    right = np.zeros(4)
    for a, b, c, d in itertools.product(range(4), repeat=4):
        for (x, cx), (y, cy) in itertools.product(play(a, b, 0), play(c, d, 0)):
            for winner, chance in play(x, y, 1):
                right[winner] += p[a] * p[b] * p[c] * p[d] * cx * cy * chance
    logits = np.log(p)[None].astype(np.float32)
    ours = np.exp(device.tournament(logits, words[None], np.array([2]), 5)[0])
    np.testing.assert_allclose(ours, right, rtol=1e-5)
    assert not np.allclose(np.exp(device.tournament(logits, words[None], np.array([1]), 5)[0]), right, rtol=1e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_distortion(scheme):
    """Over secrets, gumbel and tournament draw from the model's distribution (chi-square); kgw does not."""
    n = 20_000
    words, logits = random_words(n, seed=3), np.tile(LOGITS, (n, 1))
    if scheme == "kgw":
        marked = device.kgw(logits, words, np.full(n, 2**30, np.uint32), np.full(n, 2.0, np.float32))
    elif scheme == "gumbel":
        marked = compiled(device.gumbel)(logits, words)
    else:
        marked = compiled(device.tournament, 3)(logits, words, np.full(n, 30), 30)
        # Rounding must neither grow over the layers nor make a probability negative.
        np.testing.assert_allclose(np.exp(marked).sum(1), 1, atol=1e-5)
    counts = np.bincount(jax.random.categorical(jax.random.key(1), jnp.asarray(marked)), minlength=V)
    assert (scipy.stats.chisquare(counts, n * P).pvalue > 1e-3) == (scheme != "kgw")


def test_contexts_that_came_before():
    """Against a search in Python, over texts of two letters; the prompt's contexts do not count."""
    tokens, starts, s = rows(alphabet=2, length=12), np.array([1, 3, 5, 4, 2]), device.settings_of(MIXED)
    run = compiled(device.is_fresh, 1)
    outcomes = []
    for length in range(5, 13):
        ours = np.asarray(run(s, 6, tokens, starts, np.full(5, length)))
        for row, w in enumerate(MIXED):
            if w is None or length < w.context:
                continue
            before = [tuple(tokens[row, end - w.context:end])
                      for end in range(max(starts[row], w.context), length)]
            now = tuple(tokens[row, length - w.context:length])
            assert ours[row] == (now not in before), (row, length)
            outcomes.append(bool(ours[row]))
    assert {True, False} == set(outcomes)
    np.testing.assert_array_equal(device.has_context(s, np.full(5, 3)), [False, False, True, True, False])


# ---- Detection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,p", [(1, 0.25), (7, 0.5), (200, 0.25), (6000, 0.5), (60_000, 0.25)])
def test_tails_equal_scipy(n, p):
    for k in sorted({0, 1, n // 8, int(n * p), int(n * p) + 1, min(n, int(n * p + 8 * n**0.5)), n}):
        right = scipy.stats.binom.logsf(k - 1, n, p)
        if np.isfinite(right):  # SciPy underflows where ours does not
            assert log_binomial_tail(k, n, p) == pytest.approx(right, rel=1e-7, abs=1e-10)
        assert log_binomial_tail(k, n, p) <= 0
    assert log_binomial_tail(n + 1, n, p) == -np.inf
    for s in (0.1, n / 2, n, n + 5 * n**0.5, n * 1.5):
        right = scipy.stats.gamma.logsf(s, n)
        if np.isfinite(right):
            assert log_gamma_tail(s, n) == pytest.approx(right, rel=1e-7, abs=1e-9)
    assert log_binomial_tail(n, n, p) == pytest.approx(n * np.log(p))
    assert log_gamma_tail(float(n), n) != pytest.approx(scipy.stats.gamma.logsf(n, n + 1), rel=1e-3)


@functools.cache
def null_p_values(scheme, loops, dedup):
    """p-values of texts of 60 random tokens, `loops` times over, each for another secret."""
    rng = np.random.default_rng(1)
    return np.array([detect(np.tile(rng.integers(0, V, 60), loops), mark(scheme, rng.bytes(16)), dedup=dedup).p_value
                     for _ in range(600)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loops", [1, 5])
def test_p_values_are_uniform_without_a_watermark(scheme, loops):
    p = null_p_values(scheme, loops, True)
    if scheme == "gumbel":  # continuous; the others' p-values are discrete and at least uniform
        assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-3
    assert np.mean(p <= 0.2) > 0.1, "nor may they be all large"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_deduplication_repetitions_are_taken_for_a_watermark(scheme):
    assert np.mean(null_p_values(scheme, 5, True) < 0.01) < 0.03
    assert np.mean(null_p_values(scheme, 5, False) < 0.01) > 0.05


def test_what_is_scored():
    text = np.array([1, 2, 3, 1, 2, 3, 1, 2, 4])
    for scheme, right in (("gumbel", [2, 3, 4]), ("tournament", [2, 3, 4]), ("kgw", [2, 3, 4, 8])):
        np.testing.assert_array_equal(scored_positions(text, mark(scheme, context=2)), right)
    assert detect(text[:2], mark(context=2)).p_value == 1.0 and detect(text[:2], mark(context=2)).scored == 0
    found = detect(text, mark("kgw", context=2))
    assert found.values.sum() == found.score and found.tokens == 9 and found.expected == 1.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_marked_text_is_found_and_only_with_its_secret(scheme):
    """A memoryless model of 2.5 nats, 120 tokens, no network: the words of NumPy, the schemes of JAX."""
    w, rng, text = mark(scheme, context=2), np.random.default_rng(0), [1, 2]
    run = compiled(lambda key, words: jax.random.categorical(key, {
        "kgw": lambda: device.kgw(LOGITS, words, jnp.uint32([w.threshold]), jnp.float32([w.delta])),
        "gumbel": lambda: device.gumbel(LOGITS, words),
        "tournament": lambda: device.tournament(LOGITS, words, jnp.int32([w.layers]), w.layers)}[scheme]())[0])
    for i in range(120):
        words = words_of(w, np.tile(text[-2:], (V, 1)), np.arange(V))[None]
        text.append(int(run(jax.random.key(i), words)))
    found = detect(text, w)
    assert found.log10_p < -5 and found.z > 4
    assert found.p_value == pytest.approx(10 ** found.log10_p)
    for other in (dataclasses.replace(w, secret=rng.bytes(20)), dataclasses.replace(w, context=3),
                  *(dataclasses.replace(w, scheme=s) for s in SCHEMES if s != scheme)):
        assert detect(text, other).p_value > 1e-3
    assert detect(rng.permutation(text), w).p_value > 1e-3


def test_problems():
    bad = Watermark("best", b"short", 0, 0.0, -1.0, 40)
    assert [line.split("=")[0].split(":")[0] for line in bad.problems()] == [
        f"watermark.{name}" for name in ("scheme", "context", "gamma", "delta", "layers", "secret")]
    assert not mark().problems()
