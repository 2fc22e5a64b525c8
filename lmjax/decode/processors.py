"""Logit processors: pure functions on logits [B, V] whose settings are arrays [B], so one batch mixes them.

What lives here: the settings of one request, each processor, and the one order in which they are composed:

    repetition, frequency and presence penalties -> no-repeat n-gram -> DRY       (all rows)
    -> temperature -> top-k -> top-p -> min-p -> typical                          (rows that are sampled)
    -> watermark                                                                  (rows that have one)

Each step sees what the one before left; a token that is ruled out has -inf. Processors that no row of the batch
uses are not in the compiled program at all: `Active` says which are. The loop that calls them is
`lmjax.decode.generate`. Formulas and sources: docs/decoding.md.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.decode.watermark import Marker, Marks


@dataclasses.dataclass(unsafe_hash=True)
class SampleConfig:
    """How one row is continued. Every default but temperature and top_p leaves the distribution as it is."""

    max_new_tokens: int = 128
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 0.95  # keep the likeliest tokens whose probabilities reach p; 1: all
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the likeliest; 0: all
    typical_p: float = 1.0  # keep the tokens of nearly average surprise whose probabilities reach p; 1: all
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen; 1: none
    frequency_penalty: float = 0.0  # subtracted for each time a token was generated
    presence_penalty: float = 0.0  # subtracted once from tokens that were generated
    no_repeat_ngram: int = 0  # no n-gram occurs twice; 0: they may
    dry_multiplier: float = 0.0  # DRY: what a repetition of dry_allowed_length tokens costs; 0: none
    dry_base: float = 1.75  # and by which factor each further token raises it
    dry_allowed_length: int = 2
    stop_loops: int = 0  # end a row whose newest tokens have gone round one cycle so often; 0: go on
    loop_period: int = 64  # tokens of the longest cycle that stop_loops looks for

    def problems(self, prefix: str = "sample") -> list[str]:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
            "temperature": (0 <= self.temperature < np.inf, "must not be negative; 0 is greedy"),
            "top_k": (self.top_k >= 0, "must not be negative; 0 keeps all"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "must be from 0 to 1; 0 keeps all"),
            "typical_p": (0 < self.typical_p <= 1, "must be above 0 and at most 1; 1 keeps all"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "must be above 0; 1 is none"),
            "frequency_penalty": (np.isfinite(self.frequency_penalty), "must be a number; 0 is none"),
            "presence_penalty": (np.isfinite(self.presence_penalty), "must be a number; 0 is none"),
            "no_repeat_ngram": (self.no_repeat_ngram >= 0, "must not be negative; 0 lets them repeat"),
            "dry_multiplier": (0 <= self.dry_multiplier < np.inf, "must not be negative; 0 is none"),
            "dry_base": (1 <= self.dry_base < np.inf, "must be at least 1"),
            "dry_allowed_length": (self.dry_allowed_length >= 1, "must be at least 1"),
            "stop_loops": (self.stop_loops == 0 or self.stop_loops >= 2, "must be at least 2 times round; 0 goes on"),
            "loop_period": (self.loop_period >= 1, "must be at least 1"),
        }
        return [f"{prefix}.{name}={getattr(self, name)}: {rule}" for name, (right, rule) in rules.items() if not right]


@dataclasses.dataclass(frozen=True)
class Active:
    """Which processors some row of the batch uses. Static: each combination is a program of its own."""

    repetition: bool = False
    counts: bool = False  # frequency or presence penalties
    ngram: bool = False
    dry: bool = False
    sample: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    typical: bool = False
    marks: Marks | None = None  # watermarks; set by who has them
    loops: int = 0  # longest cycle that some row is stopped for, rounded up so that few programs are compiled

    @property
    def history(self) -> bool:
        """Whether a row's logits depend on its earlier tokens otherwise than through the model."""
        return self.repetition or self.counts or self.ngram or self.dry


def active(configs: Sequence[SampleConfig]) -> Active:
    drawn = [c for c in configs if c.temperature > 0]  # filters do nothing to a greedy row
    return Active(
        repetition=any(c.repetition_penalty != 1 for c in configs),
        counts=any(c.frequency_penalty != 0 or c.presence_penalty != 0 for c in configs),
        ngram=any(c.no_repeat_ngram > 0 for c in configs), dry=any(c.dry_multiplier > 0 for c in configs),
        sample=bool(drawn), top_k=any(c.top_k > 0 for c in drawn), top_p=any(c.top_p < 1 for c in drawn),
        min_p=any(c.min_p > 0 for c in drawn), typical=any(c.typical_p < 1 for c in drawn),
        loops=max((1 << (c.loop_period - 1).bit_length() for c in configs if c.stop_loops), default=0))


def settings_of(configs: Sequence[SampleConfig]) -> dict[str, np.ndarray]:
    """{field: float32 or int32 [B]}, by the names of SampleConfig."""
    return {field.name: np.asarray([getattr(c, field.name) for c in configs],
                                   np.int32 if field.type in (int, "int") else np.float32)
            for field in dataclasses.fields(SampleConfig)}


# ---- What the penalties remember -----------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class History:
    """Grows by one token a step, at a cost of O(B S) and B writes; fields that no processor needs are None."""

    seen_BV: jax.Array | None  # bool: the token is in the prompt or was generated
    counts_BV: jax.Array | None  # int32: times generated
    ngram_BS: jax.Array | None  # int32: see `suffix_lengths`
    dry_BS: jax.Array | None  # the same, with matches that end at breakers


def suffix_lengths(before_BS: jax.Array, tokens_BS: jax.Array, lengths_B: jax.Array, token_B: jax.Array,
                   breaks_B: jax.Array | None = None) -> jax.Array:
    """int32 [B, S]: for each index i, how many tokens up to and with i equal the last tokens of the row.

    before_BS: the same before `token_B` was appended at index lengths_B; tokens_BS: the row, that token
    included. breaks_B: the token is a breaker, which no match may contain.
    """
    longer_BS = jnp.pad(before_BS[:, :-1], ((0, 0), (1, 0))) + 1
    equal_BS = (tokens_BS == token_B[:, None]) & (jnp.arange(tokens_BS.shape[1]) < lengths_B[:, None])
    if breaks_B is not None:
        equal_BS &= ~breaks_B[:, None]
    return jnp.where(equal_BS, longer_BS, 0)


def remember_prompt(active: Active, tokens_BS: jax.Array, lengths_B: jax.Array, width: int, vocab: int,
                    breakers_V: jax.Array | None) -> History:
    """The history after the prompts, which are the first lengths_B of at most `width` tokens of tokens_BS."""
    B, S = tokens_BS.shape
    rows_B1, real_BT = jnp.arange(B)[:, None], jnp.arange(width) < lengths_B[:, None]
    outside = jnp.where(real_BT, tokens_BS[:, :width], vocab)  # writes beyond the vocabulary are dropped
    seen_BV = jnp.zeros((B, vocab), bool).at[rows_B1, outside].set(True) if active.repetition else None
    counts_BV = jnp.zeros((B, vocab), jnp.int32) if active.counts else None

    def matches(breakers_V):
        def step(t, m_BS):
            token_B, at_B = tokens_BS[:, t], jnp.full(B, t)
            breaks = None if breakers_V is None else breakers_V[token_B]
            longer = suffix_lengths(m_BS, tokens_BS, at_B, token_B, breaks)
            return jnp.where((t < lengths_B)[:, None], longer, m_BS)
        return jax.lax.fori_loop(0, width, step, jnp.zeros((B, S), jnp.int32))

    return History(seen_BV, counts_BV, matches(None) if active.ngram else None,
                   matches(breakers_V) if active.dry else None)


def remember(history: History, tokens_BS: jax.Array, lengths_B: jax.Array, token_B: jax.Array, live_B: jax.Array,
             breakers_V: jax.Array | None) -> History:
    """The history with token_B, written at index lengths_B of tokens_BS, in the rows that are live."""
    rows_B = jnp.arange(token_B.shape[0])
    h, new = history, {}
    if h.seen_BV is not None:
        new["seen_BV"] = h.seen_BV.at[rows_B, token_B].max(live_B)
    if h.counts_BV is not None:
        new["counts_BV"] = h.counts_BV.at[rows_B, token_B].add(live_B.astype(jnp.int32))
    for name, breakers in (("ngram_BS", None), ("dry_BS", breakers_V)):
        if getattr(h, name) is not None:
            breaks = None if breakers is None else breakers[token_B]
            longer = suffix_lengths(getattr(h, name), tokens_BS, lengths_B, token_B, breaks)
            new[name] = jnp.where(live_B[:, None], longer, getattr(h, name))
    return dataclasses.replace(h, **new)


# ---- The processors ------------------------------------------------------------------------------------


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Tokens that were seen: logit / penalty where it is positive, logit x penalty where it is negative."""
    penalty_B1 = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1), logits_BV)


def count_penalties(logits_BV: jax.Array, counts_BV: jax.Array, frequency_B: jax.Array,
                    presence_B: jax.Array) -> jax.Array:
    """logit - frequency x count - presence x [count > 0]; counts are of generated tokens."""
    return logits_BV - frequency_B[:, None] * counts_BV - presence_B[:, None] * (counts_BV > 0)


def _followers(matches_BS: jax.Array, tokens_BS: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(match length [B, S], the token that followed it [B, S]); 0 where nothing has followed yet."""
    has_next = jnp.arange(tokens_BS.shape[1]) < lengths_B[:, None] - 1
    return jnp.where(has_next, matches_BS, 0), jnp.roll(tokens_BS, -1, axis=1)


def no_repeat_ngram(logits_BV: jax.Array, matches_BS: jax.Array, tokens_BS: jax.Array, lengths_B: jax.Array,
                    size_B: jax.Array) -> jax.Array:
    """-inf for every token that would complete an n-gram of size_B that the row has already."""
    length_BS, next_BS = _followers(matches_BS, tokens_BS, lengths_B)
    real_BS = jnp.arange(tokens_BS.shape[1]) < lengths_B[:, None]
    # An n-gram of one token is completed by any token that was seen: the first one has nothing before it.
    single_BS = (size_B == 1)[:, None] & real_BS
    ban_BS = (size_B > 1)[:, None] & (length_BS >= size_B[:, None] - 1)
    rows_B1, vocab = jnp.arange(tokens_BS.shape[0])[:, None], logits_BV.shape[1]
    logits_BV = logits_BV.at[rows_B1, jnp.where(ban_BS, next_BS, vocab)].set(-jnp.inf)
    return logits_BV.at[rows_B1, jnp.where(single_BS, tokens_BS, vocab)].set(-jnp.inf)


def dry(logits_BV: jax.Array, matches_BS: jax.Array, tokens_BS: jax.Array, lengths_B: jax.Array,
        multiplier_B: jax.Array, base_B: jax.Array, allowed_B: jax.Array) -> jax.Array:
    """logit - multiplier x base^(n - allowed) for a token that would prolong a repetition of n >= allowed tokens."""
    length_BS, next_BS = _followers(matches_BS, tokens_BS, lengths_B)
    over_BS = length_BS - allowed_B[:, None]
    cost_BS = multiplier_B[:, None] * base_B[:, None] ** jnp.clip(over_BS, 0, 1000).astype(jnp.float32)
    rows_B1, vocab = jnp.arange(tokens_BS.shape[0])[:, None], logits_BV.shape[1]
    on_B1 = (multiplier_B > 0)[:, None]  # a long repetition costs infinity, and 0 times that is NaN
    at_BS = jnp.where((over_BS >= 0) & on_B1, next_BS, vocab)
    cost_BV = jnp.zeros_like(logits_BV).at[rows_B1, at_BS].max(jnp.minimum(cost_BS, 1e30))
    return logits_BV - cost_BV


def temperature(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """logits / temperature; rows of temperature 0 stay, as they are not sampled."""
    return logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]


def top_k(logits_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Keeps the k likeliest tokens, and those as likely as the last of them; 0 keeps all."""
    wanted_B = jnp.where(k_B > 0, k_B, logits_BV.shape[1])
    return _keep_best(logits_BV, logits_BV, lambda kept_BV: jnp.sum(kept_BV, axis=1) >= wanted_B, k_B > 0)


def top_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Keeps the smallest set of likeliest tokens whose probabilities reach p, the crossing token included."""
    return _keep_best(logits_BV, logits_BV, _reaches(logits_BV, p_B), p_B < 1)


def min_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Keeps tokens with probability >= p x that of the likeliest."""
    lowest_B1 = jnp.max(logits_BV, axis=1, keepdims=True) + jnp.log(p_B)[:, None]
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def typical(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Keeps the smallest set of tokens with |-log prob - entropy| least whose probabilities reach p."""
    logp_BV = jax.nn.log_softmax(logits_BV, axis=1)
    entropy_B1 = -jnp.sum(jnp.where(jnp.isfinite(logp_BV), jnp.exp(logp_BV) * logp_BV, 0.0), axis=1, keepdims=True)
    return _keep_best(logits_BV, -jnp.abs(-logp_BV - entropy_B1), _reaches(logits_BV, p_B), p_B < 1)


def _reaches(logits_BV: jax.Array, p_B: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Whether the probabilities of kept tokens reach p, in float32."""
    probs_BV = jax.nn.softmax(logits_BV, axis=1)
    return lambda kept_BV: jnp.sum(jnp.where(kept_BV, probs_BV, 0.0), axis=1) >= p_B


def _keep_best(logits_BV: jax.Array, score_BV: jax.Array, enough: Callable, on_B: jax.Array) -> jax.Array:
    """Keeps tokens whose score is at least the highest threshold for which enough tokens are kept.

    The threshold is found bit by bit: 32 sums over the vocabulary take a tenth of the time of one sort. Tokens of
    equal score stay or go together. Rows that are not `on_B` keep everything.
    """
    # A float's bits, turned so that unsigned integers order them as the floats are ordered.
    bits_BV = jax.lax.bitcast_convert_type(score_BV.astype(jnp.float32), jnp.uint32)
    order_BV = jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))

    def set_bit(i, threshold_B):
        higher_B = threshold_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(order_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(logits_BV.shape[0], jnp.uint32))
    return jnp.where((order_BV >= threshold_B[:, None]) | ~on_B[:, None], logits_BV, -jnp.inf)


# ---- All of them, in order -----------------------------------------------------------------------------


def penalise(logits_BV: jax.Array, s: dict, active: Active, history: History | None, tokens_BS: jax.Array,
             lengths_B: jax.Array) -> jax.Array:
    """The part for all rows: penalties, no-repeat n-gram, DRY. tokens_BS: each row so far, prompt included.

    s may hold "logit_bias", float32 [B, V], which is added first.
    """
    if "logit_bias" in s:
        logits_BV = logits_BV + s["logit_bias"]
    if active.repetition:
        logits_BV = repetition_penalty(logits_BV, history.seen_BV, s["repetition_penalty"])
    if active.counts:
        logits_BV = count_penalties(logits_BV, history.counts_BV, s["frequency_penalty"], s["presence_penalty"])
    if active.ngram:
        logits_BV = no_repeat_ngram(logits_BV, history.ngram_BS, tokens_BS, lengths_B, s["no_repeat_ngram"])
    if active.dry:
        logits_BV = dry(logits_BV, history.dry_BS, tokens_BS, lengths_B, s["dry_multiplier"], s["dry_base"],
                        s["dry_allowed_length"])
    return logits_BV


def filtered(logits_BV: jax.Array, s: dict, active: Active) -> jax.Array:
    """The part for rows that are sampled: temperature, then what each filter leaves. Softmax of it is sampled."""
    logits_BV = temperature(logits_BV, s["temperature"])
    for on, keep, name in ((active.top_k, top_k, "top_k"), (active.top_p, top_p, "top_p"),
                           (active.min_p, min_p, "min_p"), (active.typical, typical, "typical_p")):
        if on:
            logits_BV = keep(logits_BV, s[name])
    return logits_BV


def choose(logits_BV: jax.Array, s: dict, active: Active, keys_B: jax.Array,
           marker: Marker | None = None) -> jax.Array:
    """int32 [B]: the likeliest token where temperature is 0, else a draw from softmax(filtered logits).

    marker: the step's watermarks, applied last; where `active.marks` says that there are any.
    """
    best_B = likeliest(logits_BV if marker is None else marker.greedy(logits_BV))
    if not active.sample:
        return best_B
    kept_BV = filtered(logits_BV, s, active)
    kept_BV = kept_BV if marker is None else marker.sampled(kept_BV)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
    return jnp.where(s["temperature"] > 0, drawn_B, best_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """int32 [B]: argmax, the first of equals. Two plain reductions, which compilers make faster than one of pairs."""
    best_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
    index_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    first_B = jnp.min(jnp.where(logits_BV == best_B1, index_V, logits_BV.shape[1]), axis=1)
    return jnp.minimum(first_B, logits_BV.shape[1] - 1)  # a row of NaN equals nothing, itself included
