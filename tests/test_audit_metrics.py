"""The arithmetic of an audit: overlaps, draws, intervals, attacks and bits, against brute force in float64."""

import itertools
import math
import zlib
from fractions import Fraction

import numpy as np
import pytest

from lmjax.audit import metrics
from lmjax.audit.bits import bits_rows, bits_summary, code_bits
from lmjax.audit.blind import blind_scores
from lmjax.audit.intervals import Z95, bootstrap_mean, bootstrap_pairs, tpr_at_fpr, wilson
from lmjax.audit.membership import attack_scores, attack_table, blind_warning, lowest_mean
from lmjax.audit.texts import Text
from lmjax.evals.ranking import auc

RNG = np.random.default_rng(0)


def pairs(n: int = 300, size: int = 9, kinds: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of short sequences, some of which ended early."""
    a, b = RNG.integers(0, kinds, (2, n, size))
    for row, end in zip(a, RNG.integers(0, size + 3, n), strict=True):
        row[end:] = metrics.PAD
    return a, b


def real(row: list[int]) -> list[int]:
    return [x for x in row if x != metrics.PAD]


def by_recursion(a: list[int], b: list[int]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + by_recursion(a[1:], b[1:])
    return max(by_recursion(a[1:], b), by_recursion(a, b[1:]))


def test_the_longest_common_subsequence_is_that_of_the_definition():
    a, b = pairs(60, 6)
    wanted = [by_recursion(real(s), list(t)) for s, t in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_array_equal(metrics.lcs(a, b), wanted)
    same_place = (a == b).sum(axis=1)  # a wrong one: it misses what is shifted
    assert (same_place < metrics.lcs(a, b)).any() and (same_place <= metrics.lcs(a, b)).all()


def test_the_longest_run_is_found_wherever_it_is():
    a, b = pairs()

    def brute(s, t):
        s = real(s)
        return max((j - i for i, j in itertools.combinations(range(len(s) + 1), 2)
                    if any(s[i:j] == t[k:k + j - i] for k in range(len(t)))), default=0)

    np.testing.assert_array_equal(metrics.longest_run(a, b), [brute(s, t) for s, t in zip(a.tolist(), b.tolist(),
                                                                                         strict=True)])
    assert metrics.longest_run(a[:, :1] * 0 + metrics.PAD, a[:, :1] * 0 + metrics.PAD).max() == 0  # padding is no token


def test_divergence_and_type_token_ratio():
    same = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    assert metrics.divergence(same).tolist() == [2, 4, 0]
    a, _ = pairs()
    wanted = [len(set(real(row))) / max(len(real(row)), 1) for row in a.tolist()]
    np.testing.assert_allclose(metrics.type_token_ratio(a), wanted)


def test_rouge_on_words_has_its_published_example():
    # Lin (2004), section 3: S1 against S2 and S3; LCS 3 of 4 and 2 of 4 words.
    found = metrics.rouge_words(["police kill the gunman", "the gunman kill police", "", "don't", "Ärger, ÄRGER!"],
                                ["police killed the gunman"] * 3 + ["don t", "ärger ärger"])
    np.testing.assert_allclose(found, [3 / 4, 2 / 4, 0, 1, 1])


def test_the_base_rate_never_pairs_a_document_with_itself():
    for documents in ([0, 0, 1, 1, 2], [0, 1], list(range(9)) * 3, [0, 0, 0, 1, 1, 1]):
        documents = np.array(documents)
        order = metrics.other_document(documents)
        assert sorted(order) == list(range(len(documents))) and (documents[order] != documents).all()
    assert metrics.other_document(np.array([0, 0])) is None
    assert metrics.other_document(np.array([0, 0, 0, 1])) is None


def test_draws_needed_are_those_of_the_formula():
    for p_z, p in itertools.product([1e-6, 0.01, 0.3, 0.9, 0.999999], [0.1, 0.5, 0.99]):
        n = 10 ** metrics.log10_draws(np.array([math.log(p_z)]), p)[0]
        if n > 1 + 1e-9:
            assert 1 - (1 - p_z) ** n == pytest.approx(p, rel=1e-8)
        else:
            assert p_z >= p * (1 - 1e-9)
    # Far below what 1 - p_z can tell in float64, where log(1 - p_z) would say 0: n = ln 2 / p_z.
    tiny = metrics.log10_draws(np.array([-200.0, -35.0, -34.9, -np.inf, 0.0]), 0.5)
    assert tiny[0] == pytest.approx((math.log(math.log(2)) + 200) / math.log(10), rel=1e-12)
    assert tiny[1] > tiny[2] and tiny[1] - tiny[2] < 0.05 and tiny[3] == np.inf and tiny[4] == 0
    assert math.log(1 - math.exp(-200.0)) == 0  # the formula as it is written would divide by this


# ---- intervals ---------------------------------------------------------------------------------------------


def test_wilson_solves_its_equation():
    for hits, n in ((1, 10), (5, 10), (37, 1000), (999, 1000)):
        for bound in wilson(hits, n):  # both ends p of (share - p)^2 = z^2 p (1 - p) / n
            assert (hits / n - bound) ** 2 == pytest.approx(Z95**2 * bound * (1 - bound) / n, rel=1e-9)
    assert wilson(0, 0) == (0, 1) and wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    np.testing.assert_allclose(wilson(0, 10), (0, 0.27753), atol=1e-5)  # published: R, binom.confint


def test_bootstrap_draws_documents_and_not_probes():
    values = np.repeat(RNG.normal(size=40), 25)
    low, high = bootstrap_mean(values, np.repeat(np.arange(40), 25))
    standard = values[::25].std() / math.sqrt(40)
    assert (high - low) / (2 * Z95 * standard) == pytest.approx(1, abs=0.15)
    wrong = bootstrap_mean(values, np.arange(1000))  # as if the copies were new observations
    assert wrong[1] - wrong[0] < (high - low) / 3
    assert bootstrap_mean(values, np.repeat(np.arange(40), 25)) == (low, high)
    assert bootstrap_mean(np.ones(3), np.zeros(3)) == (1, 1)


def test_auc_is_the_share_of_pairs():
    for kinds in (3, 1000):
        yes, no = RNG.integers(1, kinds + 1, 30).astype(float), RNG.integers(0, kinds, 41).astype(float)
        wanted = sum((Fraction(int(a > b)) + Fraction(int(a == b), 2)) for a in yes for b in no) / (30 * 41)
        assert auc(yes, no) == pytest.approx(float(wanted), rel=1e-12)
    low, high = bootstrap_pairs(auc, yes, no)
    assert low < auc(yes, no) < high


def test_tpr_lets_no_more_false_alarms_through():
    yes, no = RNG.integers(3, 40, 200).astype(float), RNG.integers(0, 30, 150).astype(float)
    for rate in (0.0, 0.001, 0.01, 0.1, 0.5, 1.0):
        best = max((float((yes > t).mean()) for t in [-1, *no] if (no > t).mean() <= rate), default=0.0)
        assert tpr_at_fpr(yes, no, rate) == best
    assert tpr_at_fpr(np.ones(5), np.ones(5), 0.01) == 0  # ties are no detection


# ---- membership --------------------------------------------------------------------------------------------


def documents(n: int, seed: int, mean: float = 2.0) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    rng = np.random.default_rng(seed)
    stats = [{"surprisal": rng.gamma(2, mean / 2, size).astype(np.float32), "normalised": rng.normal(size=size).astype(
        np.float32)} for size in rng.integers(3, 40, n)]
    return stats, ["".join(rng.choice(list("abcdefgh "), 60)) for _ in range(n)]


def test_attacks_are_their_definitions():
    stats, texts = documents(20, 1)
    reference, _ = documents(20, 1, 3.0)
    recall = [{"surprisal": one["surprisal"][:3] * 1.5} for one in stats]
    found = attack_scores(stats, texts, reference, recall)
    for i, (one, text) in enumerate(zip(stats, texts, strict=True)):
        s, z = one["surprisal"].astype(np.float64), one["normalised"].astype(np.float64)
        k = max(1, int(len(s) * 0.2))
        packed = len(zlib.compress(text.encode()))
        wanted = {"loss": -s.mean(), "zlib": -s.sum() / packed, "zlib_mean": -s.mean() / packed,
                  "reference": reference[i]["surprisal"].astype(np.float64).mean() - s.mean(),
                  "min_k": np.sort(-s)[:k].mean(), "min_k_pp": np.sort(-z)[:k].mean(), "recall": 1.5}
        assert {name: value[i] for name, value in found.items()} == pytest.approx(wanted, rel=1e-6)
    assert lowest_mean(np.array([3.0, 1.0])) == 1.0  # of fewer than five tokens, one is still looked at


def test_attacks_rank_and_the_blind_one_sees_only_text():
    (low, same), (high, others) = documents(80, 1, 1.0), documents(80, 2, 2.0)
    rows = attack_table(attack_scores(low, same), attack_scores(high, others), same, others)
    table = {row["attack"]: row for row in rows}
    assert table["loss"]["auc"] > 0.9 and table["loss"]["auc_95"][0] > 0.8
    assert 0.35 < table["blind"]["auc"] < 0.65 and not blind_warning(rows)
    shifted = [text.replace("a", "x") for text in others]  # another kind of text: no model needs to be asked
    rows = attack_table(attack_scores(low, same), attack_scores(low, shifted), same, shifted)
    table = {row["attack"]: row for row in rows}
    assert table["loss"]["auc"] == pytest.approx(0.5) and table["blind"]["auc"] > 0.95
    assert "blind: character n-grams" in blind_warning(rows)


def test_the_blind_attack_is_cross_validated():
    """Fitted to the very texts that it scores it would tell any two lists apart."""
    _, texts = documents(60, 3)
    yes, no = blind_scores(texts[:30], texts[30:])
    assert auc(yes, no) < 0.75
    again = blind_scores(texts[:30], texts[30:])
    np.testing.assert_array_equal(yes, again[0])
    assert auc(*blind_scores(texts[:30] * 2, texts[30:] * 2)) > 0.9  # leaking copies across folds would be seen


# ---- bits --------------------------------------------------------------------------------------------------


def test_bits_are_code_lengths():
    s = np.array([0.5, 1.0, 2.5])
    assert code_bits(s, 3, 64) == pytest.approx(4 / math.log(2))
    assert code_bits(s, 4, 64) == pytest.approx(4 / math.log(2) + 6)  # a first token that nothing predicts
    texts = [Text("a" * 99, "x", 3), Text("hello", "y")]
    rows = bits_rows(texts, [4, 3], [s, s], 64, [2 * s, s / 2])
    assert [row["unintended_bits"] for row in rows] == pytest.approx([4 / math.log(2), 0.0])  # never negative
    assert rows[0]["zlib_bits"] == 8 * len(zlib.compress(b"a" * 99, 9)) and rows[0]["count"] == 3
    total = bits_summary(rows, 1000)
    assert total["unintended_bits"] == pytest.approx(4 / math.log(2))
    assert total["unintended_bits_per_parameter"] == pytest.approx(4 / math.log(2) / 1000)
    assert total["bits_per_byte"] == pytest.approx((rows[0]["bits"] + rows[1]["bits"]) / 104)
