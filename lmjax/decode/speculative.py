"""Speculative decoding: a small draft model proposes tokens, the target checks them all in one step.

The output has exactly the target's distribution (Leviathan et al. 2022, arXiv 2211.17192, theorem in appendix A.1):
a proposed token x is accepted with probability min(1, p(x) / q(x)); at the first that is not, one token is drawn
from max(p - q, 0), normalised; if all are accepted, one more is drawn from p. Temperature and the filters are applied
to both, so p and q are what would be sampled; a temperature of 0 makes them one-hot, and the output greedy. Rows
accept each for itself. Penalties, n-gram rules and DRY would change from token to token inside a proposal and are
refused.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.decode.generate import Completion, bucket, cast_once, check, padded, row_keys
from lmjax.decode.processors import Active, SampleConfig, active, filtered, likeliest, settings_of
from lmjax.errors import ConfigError, NonFiniteError
from lmjax.models.cached import last_hidden, next_logits
from lmjax.nn.cache import Cache, CacheConfig


@dataclasses.dataclass
class Speculation:
    """completions: one a prompt. proposed, accepted: draft tokens over all rows and rounds."""

    completions: list[Completion]
    rounds: int
    proposed: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """The share of proposed tokens that the target accepted."""
        return self.accepted / max(self.proposed, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
    """As `generate.State`, with two caches; both hold all tokens of a row but the last."""

    round: jax.Array
    tokens_BS: jax.Array
    starts_B: jax.Array
    lengths_B: jax.Array
    done_B: jax.Array
    bad_B: jax.Array
    target: Cache
    draft: Cache
    proposed: jax.Array
    accepted: jax.Array


def speculate(graphdef: nnx.GraphDef, params, draft_graphdef: nnx.GraphDef, draft_params,
              prompts: Sequence[np.ndarray], config: SampleConfig | Sequence[SampleConfig], *, key: jax.Array,
              vocab_size: int, eos_id: int = -1, stop_ids: Sequence[int] = (), rows: Sequence[int] | None = None,
              cache: CacheConfig | None = None, proposals: int = 4) -> Speculation:
    """Continues every prompt by the target, `proposals` draft tokens at a time.

    Both models must share one vocabulary. Other arguments and errors are those of `generate.complete`; ConfigError
    also for settings whose logits depend on earlier tokens, and for proposals below 1.
    """
    model, small = nnx.merge(graphdef, params), nnx.merge(draft_graphdef, draft_params)
    configs = [config] * len(prompts) if isinstance(config, SampleConfig) else list(config)
    cache, uses = cache or CacheConfig(), active(configs)
    bad = [f"proposals={proposals}: must be at least 1"] if proposals < 1 else []
    if uses.history:
        bad.append("penalties, no_repeat_ngram and dry_multiplier cannot be used with a draft model; set them to their "
                   "defaults or decode without one")
    if uses.loops:
        bad.append("stop_loops cannot be used with a draft model; set it to 0 or decode without one")
    if min(m.config.vocab_size for m in (model, small)) < vocab_size:
        bad.append(f"draft model: its vocabulary of {small.config.vocab_size} or the model's of "
                   f"{model.config.vocab_size} is smaller than the tokenizer's {vocab_size}")
    if bad:
        raise ConfigError(*bad)
    for one in (model, small):
        check(one.config, prompts, configs, vocab_size, cache)
    tokens, lengths = padded(prompts)
    most = max(c.max_new_tokens for c in configs)
    stops = np.array([eos_id, *stop_ids], np.int32)
    weights, draft_weights = cast_once(graphdef, params), cast_once(draft_graphdef, draft_params)
    keys = row_keys(key, range(len(prompts)) if rows is None else rows)
    state = _run(weights, draft_weights, tokens, lengths, keys, settings_of(configs), stops, graphs=(
        graphdef, draft_graphdef), active=uses, cache=cache, vocab_size=vocab_size, proposals=proposals,
        slots=bucket(tokens.shape[1] + most + proposals + 1))
    return _read(state, stops)


@functools.partial(jax.jit, static_argnames=("graphs", "active", "cache", "vocab_size", "proposals", "slots"))
def _run(weights, draft_weights, tokens_BT, lengths_B, keys_B, settings, stops, *, graphs, active: Active,
         cache: CacheConfig, vocab_size: int, proposals: int, slots: int) -> _State:
    models = [nnx.merge(graph, w[0]) for graph, w in zip(graphs, (weights, draft_weights), strict=True)]
    heads = [m.head_VD if w[1] is None else w[1] for m, w in zip(models, (weights, draft_weights), strict=True)]
    (B, T), G = tokens_BT.shape, proposals
    rows_B = jnp.arange(B)

    def logits_of(i, x_ND):
        return next_logits(models[i], x_ND, heads[i])[:, :vocab_size]

    def probs_of(logits_BV):
        """float32 [B, V]: what a row of these logits is sampled from."""
        greedy_BV = jax.nn.one_hot(likeliest(logits_BV), vocab_size)
        if not active.sample:
            return greedy_BV
        return jnp.where(settings["temperature"][:, None] > 0,
                         jax.nn.softmax(filtered(logits_BV, settings, active), axis=1), greedy_BV)

    def draw(probs_BV, keys_B):
        return jax.vmap(jax.random.categorical)(keys_B, jnp.log(probs_BV)).astype(jnp.int32)

    def key_of(round, what):
        return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, round), what))(keys_B)

    def append(s: _State, new_BC, count_B, finite_B) -> _State:
        """Writes the first count_B of new_BC to the rows that are not done, up to a stop token or the limit."""
        C = new_BC.shape[1]
        index_C = jnp.arange(C)
        stop_BC = jnp.any(new_BC[:, :, None] == stops, axis=2) & (index_C < count_B[:, None])
        until_B = jnp.min(jnp.where(stop_BC, index_C + 1, C + 1), axis=1)
        left_B = settings["max_new_tokens"] - (s.lengths_B - s.starts_B)
        count_B = jnp.where(s.done_B, 0, jnp.minimum(jnp.minimum(count_B, until_B), left_B))
        at_BC = jnp.where(index_C < count_B[:, None], s.lengths_B[:, None] + index_C, slots)
        bad_B = s.bad_B | (~s.done_B & ~finite_B)
        return dataclasses.replace(
            s, tokens_BS=s.tokens_BS.at[rows_B[:, None], at_BC].set(new_BC), lengths_B=s.lengths_B + count_B,
            done_B=s.done_B | bad_B | ((count_B == until_B) & (until_B <= C)) | (count_B == left_B), bad_B=bad_B)

    def round_(s: _State) -> _State:
        live_B = (~s.done_B).astype(jnp.int32)
        last_B = jnp.take_along_axis(s.tokens_BS, s.lengths_B[:, None] - 1, axis=1)[:, 0]

        def propose(i, carry):
            token_B, draft, tokens_BC, q_GBV = carry
            x_B1D, draft = models[1].extend(token_B[:, None], live_B, draft)
            q_BV = probs_of(logits_of(1, x_B1D[:, 0]))
            token_B = draw(q_BV, key_of(s.round, i))
            return (token_B, draft, jax.lax.dynamic_update_slice(tokens_BC, token_B[:, None], (0, i + 1)),
                    jax.lax.dynamic_update_slice(q_GBV, q_BV[None], (i, 0, 0)))

        tokens_BC = jnp.zeros((B, G + 1), jnp.int32).at[:, 0].set(last_B)
        token_B, draft, tokens_BC, q_GBV = jax.lax.fori_loop(
            0, G, propose, (last_B, s.draft, tokens_BC, jnp.zeros((G, B, vocab_size))))
        _, draft = models[1].extend(token_B[:, None], live_B, draft)  # so that its cache has the last proposal too

        x_BCD, target = models[0].extend(tokens_BC, live_B * (G + 1), s.target)
        logits_CBV = jnp.stack([logits_of(0, x_BCD[:, i]) for i in range(G + 1)])
        p_CBV = jax.vmap(probs_of)(logits_CBV)
        at = lambda probs, i: probs[i, rows_B, tokens_BC[:, i + 1]]  # noqa: E731
        ratio_BG = jnp.stack([at(p_CBV, i) / jnp.maximum(at(q_GBV, i), 1e-30) for i in range(G)], axis=1)
        chance_BG = jax.vmap(lambda key: jax.random.uniform(key, (G,)))(key_of(s.round, G))
        agreed_B = jnp.sum(jnp.cumprod(chance_BG < ratio_BG, axis=1), axis=1)

        p_BV = p_CBV[agreed_B, rows_B]
        q_BV = jnp.where((agreed_B < G)[:, None], q_GBV[jnp.minimum(agreed_B, G - 1), rows_B], 0.0)
        rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
        rest_BV = jnp.where(jnp.sum(rest_BV, axis=1, keepdims=True) > 0, rest_BV, p_BV)  # p = q, to rounding
        new_BC = jnp.roll(tokens_BC, -1, axis=1).at[rows_B, agreed_B].set(draw(rest_BV, key_of(s.round, G + 1)))

        finite_B = jnp.all(jnp.isfinite(jnp.max(logits_CBV, axis=2)), axis=0)
        s = dataclasses.replace(s, round=s.round + 1, proposed=s.proposed + G * jnp.sum(live_B),
                                accepted=s.accepted + jnp.sum(agreed_B * live_B))
        s = append(s, new_BC, agreed_B + 1, finite_B)
        known_B = s.lengths_B - 1  # of what was proposed, the caches forget what was not taken
        return dataclasses.replace(s, target=Cache(target.stacks, known_B), draft=Cache(draft.stacks, known_B))

    hiddens, caches = zip(*(m.extend(tokens_BT, lengths_B, m.new_cache(B, slots, cache, chunk=G + 1), empty=True)
                            for m in models), strict=True)
    first_BV = logits_of(0, last_hidden(hiddens[0], lengths_B))
    zero = jnp.zeros((), jnp.int32)
    tokens_BS = jnp.zeros((B, slots), jnp.int32).at[:, :T].set(tokens_BT)
    off_B = jnp.zeros(B, bool)
    state = _State(zero, tokens_BS, lengths_B, lengths_B, off_B, off_B, *caches, zero, zero)
    first_B = draw(probs_of(first_BV), key_of(0, G + 2))
    state = append(state, first_B[:, None], jnp.ones(B, jnp.int32), jnp.isfinite(jnp.max(first_BV, axis=1)))
    return jax.lax.while_loop(lambda s: ~jnp.all(s.done_B), round_, state)


def _read(state: _State, stops: np.ndarray) -> Speculation:
    tokens, starts, lengths, bad = jax.device_get((state.tokens_BS, state.starts_B, state.lengths_B, state.bad_B))
    if bad.any():
        raise NonFiniteError(f"row {int(np.flatnonzero(bad)[0])}: logits are not finite; the weights hold NaN or "
                             "infinities, or activations overflow; use another checkpoint, or compute in float32")

    def completion(row):
        stopped = tokens[row, lengths[row] - 1] in stops
        return Completion(tokens[row, starts[row]:lengths[row] - stopped].copy(), "stop" if stopped else "length")

    return Speculation([completion(row) for row in range(len(tokens))], int(state.round), int(state.proposed),
                       int(state.accepted))
