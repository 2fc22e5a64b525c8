"""Watermarks on the device: three schemes, each a pure function from logits [B, V] and words [B, V] to logits [B, V].

The words are pseudo-random numbers of (secret key, the row's last h tokens, token id), see `lmjax.decode.marks`. A
watermark is the last thing before the draw, after temperature and filters, so that the filters see the model's own
distribution, a token that was ruled out stays out, and `gumbel` and `tournament` leave the very distribution that would
have been sampled. Formulas, sources and limits: docs/watermarks.md. Finding them again: `lmjax.watermark`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.decode.marks import Watermark, context_key, word_blocks


@dataclasses.dataclass(frozen=True)
class Marks:
    """What of watermarks some row of the batch uses. Static; no secret is in a compiled program."""

    context: int  # the longest
    kgw: bool
    gumbel: bool
    layers: int  # of the deepest tournament


def marks(watermarks: Sequence[Watermark | None]) -> Marks | None:
    """None where no row is marked."""
    used = [w for w in watermarks if w is not None]
    if not used:
        return None
    return Marks(max(w.context for w in used), any(w.scheme == "kgw" for w in used),
                 any(w.scheme == "gumbel" for w in used),
                 max((w.layers for w in used if w.scheme == "tournament"), default=0))


def settings_of(watermarks: Sequence[Watermark | None]) -> dict[str, np.ndarray]:
    """Arrays [B]; a scheme does nothing to the rows of others: their delta, gumbel and layers are 0."""
    def column(dtype, scheme, value):
        return np.array([value(w) if w is not None and scheme in ("", w.scheme) else 0 for w in watermarks], dtype)

    return {"key_B4": np.stack([np.zeros(4, np.uint32) if w is None else w.key() for w in watermarks]),
            "context_B": column(np.int32, "", lambda w: w.context),
            "threshold_B": column(np.uint32, "kgw", lambda w: w.threshold),
            "delta_B": column(np.float32, "kgw", lambda w: w.delta),
            "gumbel_B": column(bool, "gumbel", lambda w: True),
            "layers_B": column(np.int32, "tournament", lambda w: w.layers)}


def problems(watermarks: Sequence[Watermark | None], temperatures: Sequence[float]) -> list[str]:
    """What is wrong with the watermarks of some rows, given the rows' temperatures."""
    bad = [line for w in dict.fromkeys(watermarks) if w is not None for line in w.problems()]
    if len(watermarks) != len(temperatures):
        return [*bad, f"watermark: {len(watermarks)} for {len(temperatures)} prompts; give one for all or one for each"]
    greedy = {w.scheme for w, t in zip(watermarks, temperatures, strict=True) if w is not None and t == 0}
    return bad + [f"watermark.scheme={scheme!r}: marks by how it draws, and temperature 0 draws nothing; raise the "
                  "temperature, or use 'kgw'" for scheme in sorted(greedy - {"kgw"})]


# ---- The words of a step -------------------------------------------------------------------------------


def last_tokens(tokens_BS: jax.Array, lengths_B: jax.Array, count: int) -> jax.Array:
    """int32 [B, count]: each row's last tokens, the last one first; before the row's beginning, its first token."""
    at_BH = jnp.maximum(lengths_B[:, None] - 1 - jnp.arange(count), 0)
    return jnp.take_along_axis(tokens_BS, at_BH, axis=1)


def step_words(s: dict, longest: int, tokens_BS: jax.Array, lengths_B: jax.Array, vocab: int) -> jax.Array:
    """uint32 [B, V]: the words of every token, given the last context_B tokens of each row."""
    last_BH = last_tokens(tokens_BS, lengths_B, longest).astype(jnp.uint32)
    key = tuple(s["key_B4"].T)
    for position in range(longest):
        longer = context_key(key, position, last_BH[:, position], jax.lax.fori_loop)
        key = tuple(jnp.where(position < s["context_B"], new, old) for new, old in zip(longer, key, strict=True))
    counters_1C = jnp.arange(-(-vocab // 4), dtype=jnp.uint32)[None]
    words = word_blocks(tuple(k[:, None] for k in key), counters_1C, jax.lax.fori_loop)
    return jnp.stack(words, axis=-1).reshape(tokens_BS.shape[0], -1)[:, :vocab]


def has_context(s: dict, lengths_B: jax.Array) -> jax.Array:
    """bool [B]: the row is marked and is long enough to have a whole context, its prompt counted."""
    return (s["context_B"] > 0) & (lengths_B >= s["context_B"])


def is_fresh(s: dict, longest: int, tokens_BS: jax.Array, starts_B: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """bool [B]: no earlier new token of the row was drawn after the same context.

    A repeated context would repeat its words, and then the draws depend on each other: the text would have another
    distribution, and Gumbel's would loop for ever. SynthID's repeated-context masking; here over the whole row.
    """
    last_BH = last_tokens(tokens_BS, lengths_B, longest)
    index_S = jnp.arange(tokens_BS.shape[1])
    same_BS = (index_S >= starts_B[:, None] - 1) & (index_S < lengths_B[:, None] - 1)
    same_BS &= index_S >= s["context_B"][:, None] - 1  # shorter ones were never marked
    for j in range(longest):
        equal_BS = jnp.roll(tokens_BS, j, axis=1) == last_BH[:, j:j + 1]
        same_BS &= equal_BS | (j >= s["context_B"][:, None])
    return ~jnp.any(same_BS, axis=1)


# ---- The schemes ---------------------------------------------------------------------------------------


def kgw(logits_BV: jax.Array, words_BV: jax.Array, threshold_B: jax.Array, delta_B: jax.Array) -> jax.Array:
    """logit + delta for green tokens, those whose word is below threshold = gamma 2^32 (arXiv 2301.10226).

    Each token is green by itself with probability gamma; the paper fixes the number of green tokens instead.
    """
    return logits_BV + jnp.where(words_BV < threshold_B[:, None], delta_B[:, None], 0.0)


def gumbel(logits_BV: jax.Array, words_BV: jax.Array) -> jax.Array:
    """0 for argmin_v E_v / p_v, E_v = -log(1 - q_v) exponential, and -inf for all others (Aaronson 2022).

    q = word / 2^32. It is Aaronson's argmax r_v^(1/p_v) with r = 1 - q: floats are fine near 0, where winners are.
    """
    q_BV = jnp.clip(words_BV.astype(jnp.float32), 0.5, 2.0**32 - 2.0**8) * 2.0**-32
    race_BV = logits_BV - jnp.log(-jnp.log1p(-q_BV))
    best_B1 = jnp.max(race_BV, axis=1, keepdims=True)
    index_V = jnp.arange(race_BV.shape[1])
    first_B1 = jnp.min(jnp.where(race_BV == best_B1, index_V, race_BV.shape[1]), axis=1, keepdims=True)
    return jnp.where(index_V == first_B1, 0.0, -jnp.inf)


def tournament(logits_BV: jax.Array, words_BV: jax.Array, layers_B: jax.Array, deepest: int) -> jax.Array:
    """log p after `layers` rounds of p_v <- p_v (1 + g_v - sum_u g_u p_u); g of round l is bit l of the word.

    The distribution of the winner among 2^layers candidates drawn from p, in which pairs are decided by g and ties by
    a coin: SynthID-Text's non-distortionary tournament (Dathathri et al. 2024, doi 10.1038/s41586-024-08025-4).
    """
    def round_(layer, p_BV):
        g_BV = ((words_BV >> layer.astype(jnp.uint32)) & jnp.uint32(1)).astype(jnp.float32)
        # 1 - sum g p as a share: a difference could fall below 0, and its rounding errors would grow layer by layer.
        ones_B1 = jnp.sum(g_BV * p_BV, axis=1, keepdims=True)
        zeros_B1 = jnp.sum((1 - g_BV) * p_BV, axis=1, keepdims=True)
        factor_BV = g_BV + zeros_B1 / (zeros_B1 + ones_B1)
        return jnp.where((layer < layers_B)[:, None], p_BV * factor_BV, p_BV)

    p_BV = jax.lax.fori_loop(0, deepest, round_, jax.nn.softmax(logits_BV, axis=1))
    return jnp.where((layers_B > 0)[:, None], jnp.log(p_BV), logits_BV)


@dataclasses.dataclass
class Marker:
    """The watermarks of one step of a batch; made once a step, used on greedy and on sampled rows' logits."""

    s: dict
    marks: Marks
    words_BV: jax.Array
    whole_B: jax.Array  # rows with a whole context
    fresh_B: jax.Array | None  # of these, rows whose context is new

    def greedy(self, logits_BV: jax.Array) -> jax.Array:
        """KGW is all that can mark a row that is not drawn."""
        if not self.marks.kgw:
            return logits_BV
        return kgw(logits_BV, self.words_BV, self.s["threshold_B"], jnp.where(self.whole_B, self.s["delta_B"], 0.0))

    def sampled(self, logits_BV: jax.Array) -> jax.Array:
        """Each row's own scheme; a row has one at most, so their order says nothing."""
        logits_BV = self.greedy(logits_BV)
        if self.marks.layers:
            layers_B = jnp.where(self.fresh_B, self.s["layers_B"], 0)
            logits_BV = tournament(logits_BV, self.words_BV, layers_B, self.marks.layers)
        if self.marks.gumbel:
            on_B1 = (self.s["gumbel_B"] & self.fresh_B)[:, None]
            logits_BV = jnp.where(on_B1, gumbel(logits_BV, self.words_BV), logits_BV)
        return logits_BV


def marker(s: dict, marks: Marks, tokens_BS: jax.Array, starts_B: jax.Array, lengths_B: jax.Array,
           vocab: int) -> Marker:
    """For rows of which the first lengths_B tokens are known, the first starts_B of them the prompt."""
    whole_B, fresh_B = has_context(s, lengths_B), None
    if marks.gumbel or marks.layers:
        fresh_B = whole_B & is_fresh(s, marks.context, tokens_BS, starts_B, lengths_B)
    return Marker(s, marks, step_words(s, marks.context, tokens_BS, lengths_B, vocab), whole_B, fresh_B)
