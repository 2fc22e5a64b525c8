"""Watermarks in the sampler: rows, streams and batches stay as they are, secrets stay out of programs, all is found."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import TINY, random_model

from lmjax.axes import MeshConfig, make_mesh
from lmjax.decode import generate as module
from lmjax.decode import processors
from lmjax.decode.generate import SampleConfig, generate, stream
from lmjax.decode.marks import Watermark
from lmjax.decode.processors import active, choose
from lmjax.decode.watermark import Marks, marker, marks, settings_of
from lmjax.decode.write import TextRequest
from lmjax.errors import ConfigError
from lmjax.state import shardings
from lmjax.watermark.detect import detect

V = 96
SECRET = b"a secret of sixteen bytes or more"
SAMPLE = SampleConfig(80, 1.0, top_p=0.98)
MARKS = [Watermark("kgw", SECRET), None, Watermark("gumbel", SECRET, context=2),
         Watermark("tournament", SECRET, context=3, layers=20)]
PROMPTS = [np.asarray(p) for p in ([5, 9, 2, 7, 7, 1, 3], [4], [11, 12, 13], [8, 8])]


@functools.cache
def model():
    config = dataclasses.replace(TINY, vocab_size=V, tied=False, max_seq_len=160)
    graphdef, state = nnx.split(random_model(config, seed=3, spread=0.3))
    return graphdef, nnx.to_pure_dict(state)


def run(prompts, config=SAMPLE, seed=0, how=generate, **options):
    return how(*model(), prompts, config, key=jax.random.key(seed), vocab_size=V, **options)


@functools.cache
def together():
    """Four rows with unlike prompts and watermarks, one without, in one batch."""
    return run(PROMPTS, watermark=MARKS)


def test_every_row_is_found_by_its_own_secret_and_scheme():
    for row, w in enumerate(MARKS):
        for other in MARKS:
            if other is None:
                continue
            p = detect(together()[row], other).p_value
            assert p < 1e-5 if other is w else p > 1e-3, (row, other, p)
            assert detect(together()[row], dataclasses.replace(other, secret=SECRET + b".")).p_value > 1e-3


def test_a_row_is_the_same_alone_and_beside_others():
    alone = run(PROMPTS[3:], rows=[3], watermark=MARKS[3])[0]
    np.testing.assert_array_equal(alone, together()[3])
    turned = run(PROMPTS[::-1], rows=[3, 2, 1, 0], watermark=MARKS[::-1])
    for a, b in zip(turned, together()[::-1], strict=True):
        np.testing.assert_array_equal(a, b)
    swapped = run(PROMPTS, watermark=[MARKS[2], None, MARKS[0], MARKS[3]])
    np.testing.assert_array_equal(swapped[1], together()[1])
    assert not np.array_equal(swapped[2], together()[2])


def test_a_row_without_has_the_plain_samplers_tokens():
    plain = run(PROMPTS)
    np.testing.assert_array_equal(plain[1], together()[1])
    assert not any(np.array_equal(plain[row], together()[row]) for row in (0, 2, 3))


def test_streams_give_the_tokens_of_one_call():
    pieces = list(run(PROMPTS, how=stream, watermark=MARKS, chunk=32))
    assert len(pieces) > 2
    for done, right in zip(pieces[-1], together(), strict=True):
        np.testing.assert_array_equal(done.tokens, right)


def test_a_mesh_gives_the_same_tokens():
    """Rows split over data, vocabulary over tensor: the words are those of each id all the same."""
    graphdef, params = model()
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        out = generate(graphdef, jax.device_put(params, shardings(params, mesh)), PROMPTS, SAMPLE, vocab_size=V,
                       key=jax.random.key(0), watermark=MARKS)
    for a, b in zip(out, together(), strict=True):
        np.testing.assert_array_equal(a, b)


def compiled_programs():
    return module._advance._cache_size(), module._prefill._cache_size()


def test_no_secret_is_in_a_program_and_no_watermark_where_none_is():
    """Another secret compiles nothing, so none is a constant; no watermark is the program that there was before."""
    run(PROMPTS)
    before = compiled_programs()
    run(PROMPTS, watermark=[None] * 4)
    assert compiled_programs() == before
    together()
    before = compiled_programs()
    other = run(PROMPTS, watermark=[w and dataclasses.replace(w, secret=SECRET[::-1]) for w in MARKS])
    assert compiled_programs() == before and not np.array_equal(other[2], together()[2])
    assert marks([None, MARKS[0]]) == Marks(4, True, False, 0) != marks(MARKS) == Marks(4, True, True, 20)
    assert marks([None]) is None


def test_a_greedy_row_takes_kgw():
    configs = [dataclasses.replace(SAMPLE, temperature=0.0), *[SAMPLE] * 3]
    mixed = run(PROMPTS, configs, watermark=MARKS)
    assert detect(mixed[0], MARKS[0]).p_value < 1e-4
    faint = [dataclasses.replace(MARKS[0], delta=1e-6), *MARKS[1:]]
    assert detect(run(PROMPTS, configs, watermark=faint)[0], MARKS[0]).p_value > 1e-3
    for row in (1, 2, 3):
        np.testing.assert_array_equal(mixed[row], together()[row])


def test_gumbel_is_drawn_by_the_secret_until_a_context_returns():
    """The seed says nothing, except for the tokens before a whole context and those after a repeated one."""
    cool = [SAMPLE, SAMPLE, dataclasses.replace(SAMPLE, temperature=0.35), SAMPLE]
    one, two = (run(PROMPTS, cool, seed=seed, watermark=MARKS) for seed in (1, 2))
    row = [*PROMPTS[2], *one[2]]
    contexts = [tuple(row[i - 2:i]) for i in range(3, len(row))]
    first = next(i for i, c in enumerate(contexts) if c in contexts[:i])
    np.testing.assert_array_equal(one[2][:first], two[2][:first])
    assert first > 3 and not np.array_equal(one[2], two[2]), "a repeated context is drawn freely"
    assert not np.array_equal(one[3][:10], two[3][:10]), "a tournament leaves the seed something to say"
    swapped = [MARKS[0], MARKS[2], None, MARKS[3]]  # a prompt of one token is no context of two
    assert len({run(PROMPTS, seed=seed, watermark=swapped)[1][0] for seed in range(4)}) > 1


def test_filters_come_first():
    """A token that top-k rules out is never promoted, however high delta is."""
    n, strong = 64, Watermark("kgw", SECRET, context=1, delta=50.0)
    logits = np.random.default_rng(0).normal(size=(n, V)).astype(np.float32)
    tokens, ones = np.arange(n, dtype=np.int32)[:, None], np.ones(n, np.int32)
    step = marker(settings_of([strong] * n), marks([strong]), tokens, ones, ones, V)
    best = np.argsort(-logits)[:, :4]
    for k, inside in ((4, True), (0, False)):
        config = SampleConfig(temperature=1.0, top_p=1.0, top_k=k)
        chosen = choose(logits, processors.settings_of([config] * n), active([config]),
                        jax.random.split(jax.random.key(0), n), step)
        assert (np.asarray(chosen)[:, None] == best).any(1).all() == inside


@pytest.mark.parametrize("watermark,config,words", [
    (MARKS[:1], SAMPLE, "1 for 4 prompts"), (MARKS[2], SampleConfig(4, 0.0), "'gumbel'.*temperature 0"),
    (MARKS, [SAMPLE] * 3 + [SampleConfig(4, 0.0)], "'tournament'.*temperature 0"),
    (Watermark("kgw", b"short"), SAMPLE, "secret: has 5 bytes"),
    (Watermark("kgw", SECRET, gamma=1.0), SAMPLE, "gamma=1.0")])
def test_refused(watermark, config, words):
    with pytest.raises(ConfigError, match=words):
        run(PROMPTS, config, watermark=watermark)


def test_requests():
    request = TextRequest(sample=SAMPLE, watermark=MARKS[2])
    assert not request.problems() and "secret of" not in repr(request)
    assert "--draft cannot be used with --watermark" in request.problems(draft=True)[0]
    greedy = dataclasses.replace(request, sample=dataclasses.replace(SampleConfig(4), temperature=0.0), beams=2)
    assert len(greedy.problems()) == 2
