"""Beam search equals the enumeration of every continuation on a tiny vocabulary, and greedy with one beam."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, TINY, random_model

from lmjax.decode.beam import beam_search
from lmjax.errors import ConfigError, DataError

V, NEW, STOP = 4, 3, 2
PROMPTS = [np.array([0, 3, 1]), np.array([3])]


@functools.cache
def model():
    model = random_model(dataclasses.replace(TINY, vocab_size=V, num_layers=1, tied=False), spread=1.0)
    graphdef, state = nnx.split(model)
    return model, graphdef, nnx.to_pure_dict(state)


def search(beams, alpha=1.0, eos_id=STOP, prompts=PROMPTS, new=NEW):
    return beam_search(*model()[1:], prompts, beams=beams, max_new_tokens=new, vocab_size=V, eos_id=eos_id,
                       length_penalty=alpha)


@functools.cache
def enumeration(row):
    """{continuation, the stop token included: its log-probability}"""
    prompt, found = list(PROMPTS[row]), {}
    paths = np.array(list(itertools.product(range(V), repeat=NEW)))
    ids = np.concatenate([np.tile(prompt, (len(paths), 1)), paths], axis=1).astype(np.int32)
    logits = jax.jit(lambda m, t: m(t), compiler_options=QUICK)(model()[0], jnp.asarray(ids))
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    for path, p in zip(paths, logp, strict=True):
        end = next((i + 1 for i, token in enumerate(path) if token == STOP), NEW)
        found[tuple(int(t) for t in path[:end])] = sum(p[len(prompt) - 1 + i, path[i]] for i in range(end))
    return found


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, -1.0])
def test_equals_enumeration(alpha):
    """16 beams hold every prefix of two tokens out of four, so the search is exhaustive."""
    for row, beams in enumerate(search(V ** (NEW - 1), alpha)):
        ranked = sorted(((logp / len(path) ** alpha, path) for path, logp in enumeration(row).items()), reverse=True)
        for ours, (score, path) in zip(beams, ranked, strict=False):
            assert ours.score == pytest.approx(score, abs=1e-5)
            assert ours.logprob == pytest.approx(enumeration(row)[path], abs=1e-4)
            stopped = path[-1] == STOP
            assert ours.finish == ("stop" if stopped else "length")
            np.testing.assert_array_equal(ours.tokens, path[:len(path) - stopped])
        scores = [beam.score for beam in beams]
        other = sorted((logp / len(path) ** (alpha + 1) for path, logp in enumeration(row).items()), reverse=True)
        assert len(scores) == 16 and not np.allclose(scores, other[:16], atol=1e-3), "a wrong length penalty passes"


def test_one_beam_is_greedy_and_more_are_no_worse():
    for row, ((one,), few) in enumerate(zip(search(1, 0.0), search(3, 0.0), strict=True)):
        path = []
        while len(path) < NEW and (not path or path[-1] != STOP):
            paths = {p[len(path)]: logp for p, logp in sorted(
                (p, sum_of(row, p[:len(path) + 1])) for p in enumeration(row) if p[:len(path)] == tuple(path)
                 and len(p) > len(path))}
            path.append(max(paths, key=paths.get))
        np.testing.assert_array_equal(one.tokens, [t for t in path if t != STOP])
        assert len(few) == 3 and few[0].score >= one.score - 1e-6
        assert [b.score for b in few] == sorted((b.score for b in few), reverse=True)


def sum_of(row, prefix):
    """Log of the probability of all continuations that begin so."""
    return np.log(sum(np.exp(logp) for path, logp in enumeration(row).items() if path[:len(prefix)] == prefix))


def test_without_a_stop_token_all_have_full_length():
    assert all(len(b.tokens) == NEW and b.finish == "length" for row in search(3, eos_id=-1) for b in row)


def test_problems():
    with pytest.raises(ConfigError, match="beams=0"):
        search(0)
    with pytest.raises(ConfigError, match="length_penalty=nan"):
        search(2, np.nan)
    with pytest.raises(DataError, match="empty"):
        search(2, prompts=[np.array([], int)])
