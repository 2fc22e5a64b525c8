"""Beam search: the likeliest continuations found by keeping the best `beams` prefixes at every step.

A continuation of n new tokens, its stop token counted, scores (sum of log-probabilities) / n^alpha. That is
Transformers' `length_penalty`; GNMT's ((5 + n) / 6)^alpha (arXiv 1609.08144, eq. 14) is not offered. alpha 0 looks
for the likeliest text, larger ones for longer texts. With as many beams as there are prefixes it is an exhaustive
search. Nothing is drawn, and no logit processor is applied. Each step reorders the cache, which costs a copy of it.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.decode.generate import SampleConfig, bucket, cast_once, check, padded
from lmjax.errors import ConfigError, NonFiniteError
from lmjax.models.cached import Prepared, last_hidden, next_logits
from lmjax.nn.cache import Cache, CacheConfig


@dataclasses.dataclass
class Beam:
    """One finished continuation. tokens: without the stop token. logprob: sum over all of its tokens, the stop
    token's included; score = logprob / n^alpha. finish: "stop" or "length"."""

    tokens: np.ndarray
    score: float
    logprob: float
    finish: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
    """K running prefixes and the K best finished continuations of each row, both best first."""

    step: jax.Array  # new tokens of the running prefixes
    tokens_BKN: jax.Array
    sums_BK: jax.Array  # float32 sum of log-probabilities; -inf where there is no such prefix
    logits_BKV: jax.Array
    cache: Cache  # of B K rows
    best_tokens_BKN: jax.Array
    best_scores_BK: jax.Array  # -inf where nothing has finished
    best_lengths_BK: jax.Array  # new tokens, the stop token counted
    bad_B: jax.Array


def beam_search(graphdef: nnx.GraphDef, params, prompts: Sequence[np.ndarray], *, beams: int, max_new_tokens: int,
                vocab_size: int, eos_id: int = -1, stop_ids: Sequence[int] = (), length_penalty: float = 1.0,
                cache: CacheConfig | None = None) -> list[list[Beam]]:
    """The best `beams` continuations of each prompt, best first (fewer where fewer exist).

    Arguments and errors are those of `generate.complete`; ConfigError too for beams below 1 or more than the
    vocabulary could fill. A row ends when nothing that still runs can beat its worst finished one.
    """
    model = nnx.merge(graphdef, params)
    cache = cache or CacheConfig()
    if beams < 1:
        raise ConfigError(f"beams={beams}: must be at least 1; 1 is greedy")
    if not np.isfinite(length_penalty):
        raise ConfigError(f"length_penalty={length_penalty}: must be a number; 0 favours no length")
    config = SampleConfig(max_new_tokens, temperature=0.0)
    check(model.config, prompts, [config] * len(prompts), vocab_size, cache)
    tokens, lengths = padded(prompts)
    stops = np.array([eos_id, *stop_ids], np.int32)
    params, prepared = cast_once(graphdef, params)
    state = _search(params, prepared, tokens, lengths, stops, np.float32(length_penalty), graphdef=graphdef,
                    beams=beams, room=bucket(max_new_tokens), max_new=np.int32(max_new_tokens), vocab_size=vocab_size,
                    config=cache)
    return _read(state, stops, length_penalty)


@functools.partial(jax.jit, static_argnames=("graphdef", "beams", "room", "vocab_size", "config"))
def _search(params, prepared: Prepared, tokens_BT, lengths_B, stops, alpha, *, graphdef, beams: int, room: int,
            max_new, vocab_size: int, config: CacheConfig) -> _State:
    model = nnx.merge(graphdef, params)
    (B, T), K = tokens_BT.shape, beams

    def logits_of(x_ND):
        logits_NV = next_logits(model, x_ND, prepared.head_VD)
        return jnp.where(jnp.arange(logits_NV.shape[1]) < vocab_size, logits_NV, -jnp.inf)

    hidden, cache = model.extend(tokens_BT, lengths_B, model.new_cache(B, bucket(T + room), config), empty=True)
    first_BV = logits_of(last_hidden(hidden, lengths_B))
    state = _State(
        jnp.zeros((), jnp.int32), jnp.zeros((B, K, room), jnp.int32),
        jnp.full((B, K), -jnp.inf).at[:, 0].set(0.0), jnp.repeat(first_BV[:, None], K, axis=1),
        _rows(cache, jnp.repeat(jnp.arange(B), K)), jnp.zeros((B, K, room), jnp.int32), jnp.full((B, K), -jnp.inf),
        jnp.zeros((B, K), jnp.int32), jnp.zeros(B, bool))

    def body(s: _State) -> _State:
        s, parents_BK, token_BK = _grow(s, stops, alpha, max_new)
        rows = (jnp.arange(B)[:, None] * K + parents_BK).reshape(-1)
        x_N1D, cache = model.extend(token_BK.reshape(-1, 1), jnp.ones(B * K, jnp.int32), _rows(s.cache, rows),
                                     layers=prepared.layers)
        return dataclasses.replace(s, cache=cache, logits_BKV=logits_of(x_N1D[:, 0]).reshape(B, K, -1))

    def more(s: _State):
        # A sum only falls as tokens are added, so this is the most that a running prefix can still score.
        length = jnp.where(alpha > 0, max_new, s.step + 1).astype(jnp.float32)
        hope_B = jnp.max(s.sums_BK, axis=1) / length ** alpha
        return (s.step < max_new) & jnp.any((hope_B > s.best_scores_BK[:, -1]) & ~s.bad_B)

    return jax.lax.while_loop(more, body, state)


def _grow(s: _State, stops, alpha, max_new):
    """One token more: (the state, each new prefix's parent, its token)."""
    B, K, V = s.logits_BKV.shape
    bad_B = s.bad_B | ~jnp.all(jnp.isfinite(jnp.max(s.logits_BKV, axis=2)), axis=1)
    sums_BKV = s.sums_BK[:, :, None] + jax.nn.log_softmax(s.logits_BKV, axis=2)
    # So many that K remain when every prefix has lost all of its stop tokens.
    count = min(K * (1 + stops.shape[0]), K * V)
    sums_BC, index_BC = jax.lax.top_k(sums_BKV.reshape(B, K * V), count)
    parents_BC, token_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
    tokens_BCN = jnp.take_along_axis(s.tokens_BKN, parents_BC[:, :, None], axis=1).at[:, :, s.step].set(token_BC)
    stop_BC = jnp.any(token_BC[:, :, None] == stops, axis=2)

    length = s.step + 1
    ends_BC = stop_BC | (length >= max_new)
    scores_BC = jnp.where(ends_BC, sums_BC / length.astype(jnp.float32) ** alpha, -jnp.inf)
    all_scores = jnp.concatenate([s.best_scores_BK, scores_BC], axis=1)
    best_BK, at_BK = jax.lax.top_k(all_scores, K)
    pick = lambda old, new: jnp.take_along_axis(  # noqa: E731
        jnp.concatenate([old, new], axis=1), at_BK.reshape(B, K, *[1] * (old.ndim - 2)), axis=1)
    best_tokens = pick(s.best_tokens_BKN, tokens_BCN)
    best_lengths = pick(s.best_lengths_BK, jnp.full((B, count), length))

    sums_BK, at_BK = jax.lax.top_k(jnp.where(stop_BC, -jnp.inf, sums_BC), K)
    take = lambda x: jnp.take_along_axis(x, at_BK.reshape(B, K, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
    parents_BK, token_BK = take(parents_BC), take(token_BC)
    return dataclasses.replace(
        s, step=length, tokens_BKN=take(tokens_BCN), sums_BK=sums_BK, best_tokens_BKN=best_tokens,
        best_scores_BK=best_BK, best_lengths_BK=best_lengths, bad_B=bad_B), parents_BK, token_BK


def _rows(cache: Cache, rows) -> Cache:
    """The cache of other rows, in their order."""
    return Cache(jax.tree.map(lambda x: jnp.take(x, rows, axis=1), cache.stacks), jnp.take(cache.lengths_B, rows))


def _read(state: _State, stops: np.ndarray, alpha: float) -> list[list[Beam]]:
    tokens, scores, lengths, bad = jax.device_get(
        (state.best_tokens_BKN, state.best_scores_BK, state.best_lengths_BK, state.bad_B))
    if bad.any():
        raise NonFiniteError(f"row {int(np.flatnonzero(bad)[0])}: logits are not finite; the weights hold NaN or "
                             "infinities, or activations overflow; use another checkpoint, or compute in float32")

    def beam(row, k):
        n = int(lengths[row, k])
        stopped = tokens[row, k, n - 1] in stops
        return Beam(tokens[row, k, :n - stopped].copy(), float(scores[row, k]), float(scores[row, k]) * n ** alpha,
                    "stop" if stopped else "length")

    return [[beam(row, k) for k in range(tokens.shape[1]) if np.isfinite(scores[row, k])]
            for row in range(len(tokens))]
