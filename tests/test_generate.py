"""Generation: greedy equals stepwise argmax, rows are independent, streams and stops are exact, meshes agree."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, TINY, random_model

from lmjax.axes import MeshConfig, make_mesh
from lmjax.decode import generate as module
from lmjax.decode.generate import SampleConfig, bucket, complete, generate, stream
from lmjax.errors import ConfigError, DataError, NonFiniteError
from lmjax.nn.cache import CacheConfig
from lmjax.state import shardings


@functools.cache
def model(**changes):
    """(model, graphdef, params), far from its first weights, so that it is not sure of anything."""
    model = random_model(dataclasses.replace(TINY, tied=False, **changes), seed=3, spread=0.5)
    graphdef, state = nnx.split(model)
    return model, graphdef, nnx.to_pure_dict(state)


def arguments(prompts, seed=0, eos_id=63, vocab_size=64, **config):
    options = {name: config.pop(name) for name in list(config) if name not in SampleConfig.__dataclass_fields__}
    return ([*model()[1:], [np.asarray(p) for p in prompts], options.pop("configs", SampleConfig(**config))],
            {"key": jax.random.key(seed), "vocab_size": vocab_size, "eos_id": eos_id} | options)


def run(prompts, **kwargs):
    args, options = arguments(prompts, **kwargs)
    return generate(*args, **options)


PROMPTS = [[5, 9, 2, 7, 7, 1], [4], [11, 12, 13]]
GREEDY = {"max_new_tokens": 12, "temperature": 0.0}
MIXED = [SampleConfig(12, 0.0), SampleConfig(9, 1.2, top_k=20, repetition_penalty=1.3),
         SampleConfig(12, 0.9, top_p=0.9, min_p=0.01, no_repeat_ngram=2)]


def test_greedy_equals_argmax_of_the_whole_row():
    prompt = PROMPTS[0]
    out = run([prompt], **GREEDY)[0]
    row = np.zeros((1, 32), np.int32)  # what comes after a position does not reach it
    row[0, :6 + len(out)] = [*prompt, *out]
    best = np.asarray(jnp.argmax(jax.jit(lambda m, t: m(t), compiler_options=QUICK)(model()[0], row)[0], -1))
    np.testing.assert_array_equal(out, best[5:5 + len(out)])
    assert len(out) == 12 or best[5 + len(out)] == 63
    assert len(set(out)) > 3, "a model that repeats itself tests nothing"


@functools.cache
def together():
    """[three rows of unlike settings in one batch]"""
    return run(PROMPTS, configs=MIXED, eos_id=-1)


def test_a_row_is_the_same_alone_and_anywhere():
    """Its prompt, settings, seed and its index in the request decide, not its place or its neighbours."""
    order = [2, 0, 1]
    turned = run([PROMPTS[i] for i in order], configs=[MIXED[i] for i in order], eos_id=-1, rows=order)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(turned[place], together()[i])
    assert [len(row) for row in together()] == [12, 9, 12]
    longer = [[1] * 30, [2] * 20, PROMPTS[2]]  # another bucket, too
    np.testing.assert_array_equal(run(longer, configs=MIXED, eos_id=-1)[2], together()[2])
    other = run(PROMPTS, configs=MIXED, eos_id=-1, rows=[0, 2, 1])
    assert not np.array_equal(other[2], together()[2]), "another index must give another draw"
    np.testing.assert_array_equal(other[0], together()[0])  # but a greedy row has no draw


def test_seeds():
    assert not np.array_equal(run(PROMPTS, configs=MIXED, eos_id=-1, seed=1)[1], together()[1])


def test_the_stream_gives_the_tokens_of_one_call():
    args, options = arguments(PROMPTS, configs=MIXED, eos_id=-1)
    pieces = list(stream(*args, **options, chunk=5))
    assert [len(p[0].tokens) for p in pieces] == [1, 5, 10, 12]
    for piece in pieces:
        for done, right in zip(piece, together(), strict=True):
            np.testing.assert_array_equal(done.tokens, right[:len(done.tokens)])
    assert [done.finish for done in pieces[-1]] == ["length"] * 3 and pieces[1][0].finish == ""


def test_several_stop_tokens_end_rows():
    free = run(PROMPTS, **GREEDY, eos_id=-1)
    stops = [int(free[0][4]), int(free[1][6])]
    args, options = arguments(PROMPTS, **GREEDY, eos_id=stops[0], stop_ids=[stops[1]])
    for done, right in zip(complete(*args, **options), free, strict=True):
        ends = np.flatnonzero(np.isin(right, stops))
        assert done.finish == ("stop" if len(ends) else "length")
        np.testing.assert_array_equal(done.tokens, right[:ends[0]] if len(ends) else right)


def letters(ids):
    return "".join(f"{i:02}" for i in ids)  # two characters a token, so that strings begin inside of one


def test_stop_strings_cut_exactly(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)
    free = run(PROMPTS, **GREEDY, eos_id=-1)
    text = letters(free[0])
    stop = text[9:13]  # the second half of token 4, token 5, the first half of token 6
    at = text.index(stop)
    args, options = arguments(PROMPTS, **GREEDY, eos_id=-1, text_of=letters, stop_strings=(stop, "never"))
    done = complete(*args, **options)[0]
    assert done.finish == "string" and done.text == text[:at]
    np.testing.assert_array_equal(done.tokens, free[0][:-(-(at + 4) // 2)])
    said = [piece[0].text for piece in stream(*args, **options, chunk=1)]
    assert said[-1] == text[:at] and all(text[:at].startswith(s) for s in said), "a stop string was shown"
    assert any(s != text[:2 * (i + 1)] for i, s in enumerate(said[:-1])), "its beginning must be held back"


def test_log_probabilities():
    args, options = arguments(PROMPTS[:1], max_new_tokens=5, temperature=1.5, repetition_penalty=2.0, eos_id=-1,
                              logprobs=3)
    done = complete(*args, **options)[0]
    row = np.concatenate([PROMPTS[0], done.tokens]).astype(np.int32)
    logp = np.asarray(jax.nn.log_softmax(model()[0](jnp.asarray(row[None]))[0]))[5:-1]
    np.testing.assert_allclose(done.logprobs, logp[np.arange(5), done.tokens], atol=1e-4)
    np.testing.assert_array_equal(done.top_ids, np.argsort(-logp)[:, :3])
    np.testing.assert_allclose(done.top_logprobs, -np.sort(-logp)[:, :3], atol=1e-4)
    assert done.logprobs.shape == (5,) and np.abs(done.logprobs - done.top_logprobs[:, 0]).max() > 1e-3


def test_never_leaves_the_vocabulary():
    out = run([[5]] * 8, max_new_tokens=40, temperature=5.0, top_p=1.0, vocab_size=10, eos_id=3)
    assert all((row < 10).all() and 3 not in row for row in out)
    assert any(len(row) < 40 for row in out) and len({tuple(row) for row in out}) == 8


def test_new_prompts_seldom_compile():
    run([PROMPTS[0]], **GREEDY)
    before = module._prefill._cache_size(), module._advance._cache_size()
    for length in (1, 7, 16):
        run([[1] * length], **GREEDY)
        run([[2] * length], max_new_tokens=10, temperature=0.0, seed=4)
    assert (module._prefill._cache_size(), module._advance._cache_size()) == before
    sizes = [bucket(n) for n in range(1, 2000)]
    assert all(size >= n for n, size in enumerate(sizes, 1)) and len(set(sizes)) < 26
    assert all(size <= max(16 + n, 1.25 * n) for n, size in enumerate(sizes, 1))


@pytest.mark.parametrize("cache", [CacheConfig("bfloat16"), CacheConfig("int8"), CacheConfig(window=6, sinks=2)])
def test_cache_kinds(cache):
    """Small caches change little; a window of 6 changes what is seen, as it should."""
    free, small = run(PROMPTS, **GREEDY, eos_id=-1), run(PROMPTS, **GREEDY, eos_id=-1, cache=cache)
    same = np.mean([a[0] == b[0] for a, b in zip(free, small, strict=True)])
    assert same == 1.0  # the first token hardly depends on the cache's kind
    assert any(not np.array_equal(a, b) for a, b in zip(free, small, strict=True)) or not cache.window


@functools.cache
def compiled_step(apart: bool) -> tuple[str, tuple[int, ...]]:
    """(the program of the loop over new tokens of three rows, the shape of a stack of keys)"""
    graphdef, params = model()[1:]
    program = module.Program(graphdef, module.active([SampleConfig(temperature=0.0)]), CacheConfig(), 64, 48, -1)
    fixed = (module.settings_of([SampleConfig(temperature=0.0)] * 3), np.full(16, -1, np.int32), None)
    tokens, lengths = module.padded([np.asarray(p) for p in PROMPTS])
    keys = module.row_keys(jax.random.key(0), range(3))
    prepared = module.cast_once(graphdef, params)[1] if apart else module.Prepared()
    state = jax.eval_shape(functools.partial(module._prefill, program=program), params, prepared, tokens, lengths, keys,
                           *fixed)
    text = module._advance.lower(params, prepared, state, np.zeros(3, bool), np.int32(9), *fixed,
                                 program=program).compile().as_text()
    return text, state.cache.stacks[0].k_LBKSH.shape


@pytest.mark.parametrize("apart", [True, False])
def test_the_loop_copies_no_cache(apart):
    """The compiled step writes its one slot in place: no copy of a stack of keys and values, inside or out."""
    text, shape = compiled_step(apart)
    stack = ",".join(map(str, shape))
    lines = [line for line in text.splitlines() if f"f32[{stack}]" in line]
    assert any("scatter" in line or "dynamic-update-slice" in line for line in lines), "the shape was not found"
    assert not [line for line in lines if " copy(" in line]


def test_the_loop_copies_no_weights():
    """Neither a stack of matrices nor a slice of one is in the program; with stacked layers both are."""
    D, F = TINY.d_model, TINY.filled().d_ff
    stacked, apart = (re.findall(rf" = f32\[(?:\d+,)?{D},{F}\]\S* (\S+)\(", compiled_step(apart)[0])
                      for apart in (False, True))
    assert any("slice" in kind or "fusion" in kind for kind in stacked)
    assert apart and set(apart) <= {"parameter", "get-tuple-element", "bitcast"}


@functools.cache
def one_device():
    return run(PROMPTS + [[8, 8]], configs=[*MIXED, MIXED[1]], eos_id=-1)


@pytest.mark.parametrize("sizes", [(4, 1, 2), (1, 4, 2)])
def test_every_mesh_gives_the_same_tokens(sizes):
    graphdef, params = model()[1:]
    mesh = make_mesh(MeshConfig(*sizes))
    args, options = arguments(PROMPTS + [[8, 8]], configs=[*MIXED, MIXED[1]], eos_id=-1)
    with jax.set_mesh(mesh):
        args[1] = jax.device_put(params, shardings(params, mesh))
        out = generate(*args, **options)
        program = module.Program(graphdef, module.active(MIXED), CacheConfig(), 64, 48, -1)
        tokens, lengths = module.padded(args[2])
        state = module._prefill(args[1], module.Prepared(), tokens, lengths, module.row_keys(options["key"], range(4)),
                                module.settings_of([*MIXED, MIXED[1]]), np.array([-1] * 16, np.int32), None,
                                program=program)
    for a, b in zip(out, one_device(), strict=True):
        np.testing.assert_array_equal(a, b)
    stack = state.cache.stacks[0].k_LBKSH  # rows over data and fsdp, heads over tensor
    assert stack.sharding.shard_shape(stack.shape) == (2, 1, 1, stack.shape[3], 8)


def test_a_mesh_of_one_device_gives_the_same_tokens():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    args, options = arguments(PROMPTS + [[8, 8]], configs=[*MIXED, MIXED[1]], eos_id=-1)
    with jax.set_mesh(mesh):
        args[1] = jax.device_put(args[1], shardings(args[1], mesh))
        assert module.cast_once(*args[:2])[1].layers is not None
        out = generate(*args, **options)
    for a, b in zip(out, one_device(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_casts_once_and_is_near():
    half = nnx.split(random_model(dataclasses.replace(TINY, tied=False), seed=3, spread=0.5, dtype="bfloat16"))
    params, prepared = module.cast_once(half[0], nnx.to_pure_dict(half[1]))
    assert params["blocks"]["attention"]["q_DNH"].dtype == prepared.head_VD.dtype == jnp.bfloat16
    assert prepared.layers[1]["attention"]["q_DNH"].dtype == jnp.bfloat16
    assert params["embed_VD"].dtype == params["final_norm"]["scale_D"].dtype == jnp.float32
    args, options = arguments(PROMPTS[:1], max_new_tokens=4, temperature=0.0)
    full = complete(*args, **options, logprobs=0)[0]
    near = complete(half[0], nnx.to_pure_dict(half[1]), args[2], args[3], **options, logprobs=0)[0]
    assert 0 < abs(full.logprobs[0] - near.logprobs[0]) < 0.2


@pytest.mark.parametrize("options,error,words", [
    ({"prompts": [[1], []], "max_new_tokens": 4}, DataError, "prompt 1 is empty.*bos"),
    ({"prompts": [[1, 2, 64]]}, DataError, "prompt 0: id 64 at position 2 is outside"),
    ({"prompts": [[-1]]}, DataError, "id -1 at position 0"),
    ({"prompts": [[1] * 60], "max_new_tokens": 5}, DataError, "60 tokens and 5 new ones make 65.*max_seq_len is 64"),
    ({"prompts": []}, ConfigError, "there are none"),
    ({"top_p": 1.5}, ConfigError, "top_p=1.5"),
    ({"configs": [SampleConfig()] * 2}, ConfigError, "2 for 1 prompts"),
    ({"stop_strings": ("a",)}, ConfigError, "text_of"),
    ({"stop_strings": ("",), "text_of": letters}, ConfigError, "empty"),
    ({"logprobs": 65}, ConfigError, "logprobs=65"),
    ({"cache": CacheConfig("float64")}, ConfigError, "cache.dtype='float64'"),
])
def test_bad_requests(options, error, words):
    with pytest.raises(error, match=words):
        run(**({"prompts": [[1]]} | options))


def test_weights_that_are_not_numbers():
    args, options = arguments(PROMPTS, **GREEDY)
    args[1] = args[1] | {"embed_VD": args[1]["embed_VD"].at[9].set(np.nan)}  # a token of the first prompt only
    with pytest.raises(NonFiniteError, match="row 0: the logits of new token 0"):
        generate(*args, **options)
