"""The dog whistle's parts: the base language, texts and their KL, gradients of each player, judges that can hear."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK

from lmjax.cli import main
from lmjax.evals.ranking import auc
from lmjax.watermark import judges, whistle
from lmjax.watermark.judges import Row, adversary_auc, hand_row, ngram_scores, table
from lmjax.watermark.whistle import PROMPT, V, WhistleConfig, plain, write_texts

CONFIG = WhistleConfig(steps=1, batch=8, length=24, texts=96, judge_steps=2)


@functools.cache
def world():
    return judges.new_world(CONFIG)


def test_the_base_model_is_that_of_the_counts():
    letters = np.array([1, 2, 3] * 50 + [1, 2, 4])
    p = np.exp(whistle.base_model(letters))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    assert p[1, 2].argmax() == 3 and 0.9 < p[1, 2, 3] < 0.98 < p[2, 3, 1] and abs(p[9, 9] - 1 / V).max() < 1e-6
    assert len(world().letters) > 100_000 and world().letters.max() < V


def test_plain_texts_follow_the_base_model():
    text = world().free[0]
    tokens, base = np.asarray(text.tokens_BS), np.asarray(world().base)
    np.testing.assert_array_equal(np.asarray(text.letters_BTV).argmax(-1), tokens[:, PROMPT:])
    surprise = -base[tokens[:, PROMPT - 2:-2], tokens[:, PROMPT - 1:-1], tokens[:, PROMPT:]]
    np.testing.assert_allclose(text.surprise_BT, surprise, rtol=1e-4)
    assert float(jnp.abs(text.kl_B).max()) < 1e-5
    entropy = -(np.exp(base) * base).sum(-1)[tokens[:, PROMPT - 2:-2], tokens[:, PROMPT - 1:-1]]
    assert abs(surprise.mean() - entropy.mean()) < 0.1


def test_each_player_moves_only_what_is_its_own():
    """The generator's gradient flows through letters; judges' through their own weights, not into the texts."""
    rng = np.random.default_rng(0)
    w, judge, keys = whistle.keyed_network(rng, 0.3), whistle.keyed_network(rng, 1.0), whistle.signs(rng, 8)
    starts, key = whistle.prompts(world().letters, 8, rng), jax.random.key(0)

    def heard(w, stop):
        text = write_texts(world().base, starts, keys, 12, key, whistle.learned(w, keys))
        text = jax.lax.stop_gradient(text) if stop else text
        free = write_texts(world().base, starts, keys, 12, key, plain)
        return whistle.keyed_cross_entropy(judge, text, free)

    grad = jax.jit(jax.grad(heard), static_argnums=1, compiler_options=QUICK)
    size = lambda grads: sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(grads))  # noqa: E731
    assert size(grad(w, False)) > 1e-3 and size(grad(w, True)) == 0.0


def test_a_hand_made_row():
    """A strong green list is heard with the key, not with another, and by n-grams of one key; its KL is not 0."""
    row = hand_row(world(), "strong", scheme="kgw", delta=4.0, context=1)
    assert row.keyed > 0.95 and 0.3 < row.wrong_key < 0.7 and row.one_key > 0.8 and row.kl > 0.2
    assert "| strong | " in table([row])


def test_n_grams_hear_what_is_there():
    rng = np.random.default_rng(0)
    free, marked = rng.integers(0, V, (2, 200, 30))
    marked = np.where(rng.random(marked.shape) < 0.3, 7, marked)
    for n in (1, 2):
        assert auc(*(ngram_scores(marked[:100], free[:100], x[100:], n) for x in (marked, free))) > 0.95
        assert 0.3 < auc(*(ngram_scores(free[:50], free[50:100], x, n) for x in (free[100:150], free[150:]))) < 0.7


def test_nobody_hears_nothing():
    again = judges.World(CONFIG, world().base, world().letters, []).texts(
        5, lambda numbers: (np.zeros((len(numbers), whistle.SIGNS), np.float32), plain))
    assert 0.2 < adversary_auc(again, world().free, CONFIG) < 0.8


def test_players_are_trained():
    generator, detector = whistle.train_players(dataclasses.replace(CONFIG, steps=2), world().base, world().letters,
                                                0.1, 1.0)
    first = whistle.keyed_network(np.random.default_rng(CONFIG.seed), 0.1)
    assert not np.array_equal(generator["out"], first["out"]) and set(detector) == set(first)


def test_command(monkeypatch, capsys, tmp_path):
    row = Row("kgw", 0.9, 0.5, 0.5, 0.6, 0.1, 0.01)
    monkeypatch.setattr(judges, "hand_row", lambda world, name, **settings: dataclasses.replace(row, name=name))
    monkeypatch.setattr(judges, "learned_row", lambda *_: row)
    monkeypatch.setattr(judges, "new_world", lambda config: None)
    assert main(["watermark", "whistle", "--out", str(tmp_path / "out.json")]) == 0
    assert "| gumbel | 0.900 | 0.500 | 0.500 | 0.600 | 0.100 | +1.0% |" in capsys.readouterr().out
    assert "one_key" in (tmp_path / "out.json").read_text()
    assert main(["watermark", "whistle", "--texts", "2"]) == 2


@pytest.mark.parametrize("changes", [{"steps": 0}, {"texts": 3}, {"budgets": (0.0,)}])
def test_problems(changes):
    assert len(dataclasses.replace(CONFIG, **changes).problems()) == 1 and not CONFIG.problems()
