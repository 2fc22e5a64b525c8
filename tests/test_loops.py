"""Cycles at the end of a sequence against brute force, and the loop stop of the sampler against them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, TINY, random_model

from lmjax.axes import MeshConfig, make_mesh
from lmjax.decode import generate as module
from lmjax.decode.generate import Program, complete
from lmjax.decode.loops import count_loops, no_loops
from lmjax.decode.processors import SampleConfig, active
from lmjax.decode.speculative import speculate
from lmjax.decode.write import TextRequest
from lmjax.errors import ConfigError
from lmjax.evals.loops import Cycle, repeated_ngram, seq_rep, summarise, tail_cycle, z_function
from lmjax.nn.cache import CacheConfig


def brute_cycle(ids, min_repeats, max_period=0):
    """The shortest cycle at the end, as the words say it: by writing it out again and again."""
    for period in range(1, len(ids) + 1):
        if max_period and period > max_period:
            return None
        repeats = 1
        while list(ids[-period * (repeats + 1):]) == list(ids[-period:]) * (repeats + 1):
            repeats += 1
        if repeats >= min_repeats:
            onset = len(ids) - period * repeats
            while onset and ids[onset - 1] == ids[onset - 1 + period]:
                onset -= 1  # a part of a round before the whole ones
            return Cycle(period, repeats, onset)
    return None


def sequences(count, longest=24, symbols=3, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        head = rng.integers(0, symbols, rng.integers(0, longest))
        cycle = rng.integers(0, symbols, rng.integers(1, 7))
        yield np.concatenate([head, np.resize(cycle, rng.integers(0, longest))]).astype(np.int32)


def test_tail_cycles_are_those_of_brute_force():
    found = 0
    for i, ids in enumerate(sequences(3000)):
        repeats, longest = 2 + i % 3, (0, 2, 5)[i % 7 % 3]
        cycle = tail_cycle(ids, repeats, longest)
        assert cycle == brute_cycle(ids, repeats, longest), ids
        found += cycle is not None
        z = z_function(ids)
        assert all(z[j] == next((k for k in range(len(ids) - j) if ids[k] != ids[j + k]), len(ids) - j)
                   for j in range(len(ids)))
    assert 300 < found < 2700, "both answers must be seen"
    assert tail_cycle([1, 2, 1, 2, 1], 2) == Cycle(2, 2, 0)  # the last round need not end where the first began
    assert tail_cycle([5, 1, 1, 1]) == Cycle(1, 3, 1) and tail_cycle([1, 1, 1, 5]) is None
    assert tail_cycle([]) is None
    with pytest.raises(ValueError, match="min_repeats=1"):
        tail_cycle([1, 2], 1)


def test_repeated_ngrams():
    assert seq_rep([1, 2, 3, 4, 5, 6]) == 0 == seq_rep([1, 2])
    assert seq_rep([7] * 10, 4) == pytest.approx(1 - 1 / 7)
    assert seq_rep([1, 2, 1, 2, 1], 2) == pytest.approx(0.5)
    for ids in sequences(200, seed=3):
        for n in (1, 2, 4):
            grams = [tuple(ids[i:i + n].tolist()) for i in range(len(ids) - n + 1)]
            assert seq_rep(ids, n) == pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0)


def test_summary():
    values = summarise([[1, 2, 3, 4], [9, 5, 5, 5, 5], [1, 2] * 4, []])
    assert values["looping"] == 0.5 and values["periods"] == {1: 1, 2: 1} and values["period"] == 1.5
    assert values["onset"] == 0.5 and values["count"] == 4
    assert summarise([[1, 2]])["period"] is None and summarise([])["looping"] == 0
    prompt = repeated_ngram(np.random.default_rng(0), 3, 20, range(100))
    assert tail_cycle(prompt).period == 3 and len(prompt) == 20


# ---- the sampler's stop ----------------------------------------------------------------------------------


def first_stop(new, times, longest):
    """How many new tokens a row keeps."""
    return next((k for k in range(1, len(new) + 1) if times and tail_cycle(new[:k], times, longest)), len(new))


def test_the_device_counts_as_numpy_does():
    rows = list(sequences(64, seed=5))
    width = max(len(row) for row in rows)
    rng = np.random.default_rng(1)
    starts, times, longest = rng.integers(0, 6, 64), rng.choice([0, 2, 3, 4], 64), rng.choice([1, 2, 5, 8], 64)
    rows = [np.concatenate([rng.integers(0, 3, s), row]) for s, row in zip(starts, rows, strict=True)]
    tokens = np.zeros((64, width + 6), np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = row
    lengths = np.array([len(row) for row in rows])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(tokens, starts, times, longest):
        def step(t, carry):
            loops, ends = carry
            at = starts + t
            live = (at < lengths) & ~loops.looped_B
            token = jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1)[:, None], 1)[:, 0]
            loops = count_loops(loops, tokens, starts, at, token, live, times, longest)
            return loops, ends + live
        return jax.lax.fori_loop(0, width, step, (no_loops(64, 8), jnp.zeros(64, jnp.int32)))

    loops, kept = jax.device_get(run(tokens, starts, times, longest))
    wanted = [first_stop(row[s:], n, p) for row, s, n, p in zip(rows, starts, times, longest, strict=True)]
    np.testing.assert_array_equal(kept, wanted)
    assert 10 < loops.looped_B.sum() < 60
    _, whole = jax.device_get(run(tokens, 0 * starts, times, longest))  # prompts would count
    assert (whole - starts != wanted).any()


@functools.cache
def model():
    graphdef, params = nnx.split(random_model(dataclasses.replace(TINY, max_seq_len=128), seed=3))
    return graphdef, nnx.to_pure_dict(params)


PROMPTS = [np.array(p, np.int32) for p in ([7] * 12, [3, 9, 3, 9, 3, 9], [5, 2, 40], [1, 2, 3])]
CONFIGS = [SampleConfig(48, temperature=0, stop_loops=3, loop_period=8), SampleConfig(48, temperature=0),
           SampleConfig(48, temperature=0, stop_loops=5, loop_period=30),
           SampleConfig(48, temperature=1, stop_loops=2, loop_period=1)]


def run(configs, **options):
    return complete(*model(), PROMPTS, configs, key=jax.random.key(0), vocab_size=64, **options)


def test_rows_end_where_they_loop():
    free = run([dataclasses.replace(c, stop_loops=0) for c in CONFIGS])
    stopped = run(CONFIGS)
    for c, whole, row in zip(CONFIGS, free, stopped, strict=True):
        keep = first_stop(whole.tokens, c.stop_loops, c.loop_period)
        np.testing.assert_array_equal(row.tokens, whole.tokens[:keep])
        assert row.finish == ("loop" if c.stop_loops and tail_cycle(row.tokens, c.stop_loops, c.loop_period)
                              else "length")
    assert {row.finish for row in stopped} == {"loop", "length"}
    with_logprobs = run(CONFIGS, logprobs=0)
    assert [len(row.logprobs) for row in with_logprobs] == [len(row.tokens) for row in stopped]
    eos = int(stopped[0].tokens[-1])  # the very token that completes the cycle
    assert run(CONFIGS, eos_id=eos)[0].finish == "stop"


def test_a_mesh_stops_the_same_rows():
    mesh = make_mesh(MeshConfig(data=4, fsdp=1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = run(CONFIGS)
    for a, b in zip(found, run(CONFIGS), strict=True):
        assert a.finish == b.finish
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_without_the_stop_nothing_of_it_is_compiled():
    assert active([SampleConfig()]).loops == 0 and active(CONFIGS).loops == 32

    def state(configs):
        program = Program(model()[0], active(configs), CacheConfig(), 64, 32, -1)
        prompts = jnp.ones((4, 16), jnp.int32), jnp.full(4, 3)
        keys = module.row_keys(jax.random.key(0), range(4))
        return jax.eval_shape(functools.partial(module._prefill, program=program), model()[1],
                              module.Prepared(None, None), *prompts, keys, module.settings_of(configs),
                              np.full(16, -1, np.int32), None)

    assert state([SampleConfig()] * 4).loops is None and state(CONFIGS).loops.equal_BP.shape == (4, 32)


def test_mistakes_are_told():
    assert "stop_loops=1" in SampleConfig(stop_loops=1).problems()[0]
    assert "loop_period=0" in SampleConfig(loop_period=0).problems()[0]
    sample = SampleConfig(temperature=0, top_p=0.95, stop_loops=3)
    assert any("--stop-loops" in p for p in TextRequest(sample=sample, beams=2).problems())
    assert any("--stop-loops" in p for p in TextRequest(sample=sample).problems(draft=True))
    assert any("no effect without --stop-loops" in p for p in TextRequest(
        sample=SampleConfig(loop_period=3)).problems())
    assert not TextRequest(sample=sample).problems()
    with pytest.raises(ConfigError, match="stop_loops"):
        speculate(*model(), *model(), PROMPTS, CONFIGS, key=jax.random.key(0), vocab_size=64)
