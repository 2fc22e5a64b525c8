"""Speculative decoding: greedy is the target's greedy, and samples have the target's distribution."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import TINY, random_model

from lmjax.decode.generate import SampleConfig, generate
from lmjax.decode.speculative import speculate
from lmjax.errors import ConfigError, NonFiniteError

V = 6
CONFIG = dataclasses.replace(TINY, vocab_size=V, windows=(4, 0), max_seq_len=128, tied=False)


@functools.cache
def models():
    """The target and a draft of one layer, unlike it: (graphdef, params) of each."""
    def parts(config, seed):
        graphdef, state = nnx.split(random_model(config, seed, spread=1.0))
        return graphdef, nnx.to_pure_dict(state)
    return parts(CONFIG, 1), parts(dataclasses.replace(CONFIG, num_layers=1), 2)


def run(prompts, target=None, draft=None, seed=0, eos_id=-1, proposals=3, rows=None, **config):
    prompts = [np.asarray(p) for p in prompts]
    return speculate(*(target or models()[0]), *(draft or models()[1]), prompts, SampleConfig(**config),
                     key=jax.random.key(seed), vocab_size=V, eos_id=eos_id, proposals=proposals, rows=rows)


PROMPTS = [[1, 2, 3, 4, 5, 1, 2], [0], [5, 5, 5]]


@functools.cache
def greedy(which):
    return generate(*models()[which], [np.asarray(p) for p in PROMPTS], SampleConfig(20, 0.0), key=jax.random.key(0),
                    vocab_size=V)


def test_greedy_is_the_targets_greedy():
    result = run(PROMPTS, max_new_tokens=20, temperature=0.0)
    right, small = greedy(0), greedy(1)
    for ours, tokens in zip(result.completions, right, strict=True):
        np.testing.assert_array_equal(ours.tokens, tokens)
        assert ours.finish == "length"
    assert any(not np.array_equal(a, b) for a, b in zip(small, right, strict=True)), "the draft must differ"
    assert 0 < result.acceptance < 1 and result.proposed % 3 == 0 and result.rounds < 19


def test_the_target_as_its_own_draft_is_always_accepted():
    result = run(PROMPTS, draft=models()[0], max_new_tokens=20, temperature=0.0)
    assert result.acceptance == 1.0 and result.rounds == 5  # 1 token of the prefill, then 4 a round


N, WINDOW = 4000, 3


@functools.cache
def sampled(kind):
    """int [N, 3] new tokens after one prompt, each row with a key of its own."""
    prompts, config = [[1, 2, 3]] * N, {"max_new_tokens": WINDOW, "temperature": 3.0, "top_p": 0.97}
    if kind == "speculative":
        return np.stack([c.tokens for c in run(prompts, proposals=2, **config).completions])
    params = models()[0] if kind == "target" else models()[1]
    return np.stack(generate(*params, [np.asarray(p) for p in prompts], SampleConfig(**config),
                             key=jax.random.key(7), vocab_size=V))


def difference(a, b):
    """(chi-square of two samples of whole continuations, the rarest left out, and its freedom)."""
    code = V ** np.arange(WINDOW)
    a, b = (np.bincount(x @ code, minlength=V**WINDOW).astype(float) for x in (a, b))
    kept = a + b >= 10
    return ((a - b)[kept] ** 2 / (a + b)[kept]).sum(), kept.sum() - 1


def test_samples_have_the_targets_distribution():
    value, freedom = difference(sampled("speculative"), sampled("target"))
    limit = freedom + 4 * (2 * freedom) ** 0.5
    assert freedom > 20 and value < limit
    assert difference(sampled("draft"), sampled("target"))[0] > 3 * limit, "the draft's own samples must be seen"


def test_rows_do_not_disturb_each_other_and_stop():
    args = {"max_new_tokens": 30, "temperature": 1.0, "eos_id": 4, "seed": 3}
    together = run(PROMPTS, **args).completions
    alone = [run([p], rows=[row], **args).completions[0] for row, p in enumerate(PROMPTS)]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert a.finish == b.finish and 4 not in a.tokens
    assert any(c.finish == "stop" for c in together)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="penalties"):
        run(PROMPTS, repetition_penalty=1.2)
    with pytest.raises(ConfigError, match="proposals=0"):
        run(PROMPTS, proposals=0)


def broken(which):
    graphdef, params = models()[which]
    return graphdef, params | {"embed_VD": params["embed_VD"] * np.nan}


def test_a_broken_target_is_told_and_a_broken_draft_costs_time_only():
    with pytest.raises(NonFiniteError, match="row 0"):
        run(PROMPTS, target=broken(0), max_new_tokens=20, temperature=0.0)
    result = run(PROMPTS, draft=broken(1), max_new_tokens=20, temperature=0.0)
    assert result.acceptance < 0.5
    for ours, tokens in zip(result.completions, greedy(0), strict=True):
        np.testing.assert_array_equal(ours.tokens, tokens)
