"""Sampling: prefill a key/value cache with the prompts, then one compiled loop over new tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

PROMPT_BUCKET = 32  # prompts are padded to a multiple, so that new prompts seldom recompile


@dataclasses.dataclass(unsafe_hash=True)
class SampleConfig:
    """temperature 0 is greedy. top_k: keep the k likeliest tokens, 0 for all. top_p: keep the likeliest
    tokens whose probabilities reach p (Holtzman et al. 2019, arXiv 1904.09751), 1 for all."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95

    def problems(self, prefix: str = "sample") -> list[str]:
        bad = []
        if self.max_new_tokens < 1:
            bad.append(f"{prefix}.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not self.temperature >= 0:
            bad.append(f"{prefix}.temperature={self.temperature}: must not be negative; 0 is greedy")
        if self.top_k < 0:
            bad.append(f"{prefix}.top_k={self.top_k}: must not be negative; 0 keeps all")
        if not 0 < self.top_p <= 1:
            bad.append(f"{prefix}.top_p={self.top_p}: must be above 0 and at most 1")
        return bad


def filter_logits(logits_BV: jax.Array, config: SampleConfig) -> jax.Array:
    """Temperature, then top-k, then top-p; tokens that are ruled out get -inf. Not for temperature 0."""
    logits_BV = logits_BV / config.temperature
    if config.top_k and config.top_k < logits_BV.shape[-1]:
        kth = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if config.top_p < 1:
        descending = jnp.sort(logits_BV, axis=-1, descending=True)
        probs = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of strictly likelier tokens
        lowest = jnp.min(jnp.where(before < config.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < lowest, -jnp.inf, logits_BV)
    return logits_BV


def _sample(logits_BV: jax.Array, keys_B: jax.Array, config: SampleConfig) -> jax.Array:
    if config.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, config))


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "vocab_size", "eos_id"))
def _generate(params, prompts_BT, valid_BT, key, *, graphdef, config: SampleConfig, vocab_size: int,
              eos_id: int) -> jax.Array:
    model = nnx.merge(graphdef, params)
    B, T = prompts_BT.shape
    new = config.max_new_tokens
    # A row's randomness depends on its index and on nothing else in the batch.
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))

    def choose(hidden_BTD, n):
        logits_BV = model.logits(hidden_BTD[:, -1:])[:, 0]
        # Rows of the output matrix beyond the tokenizer's size stand for nothing.
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)
        keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, n))(keys_B)
        return _sample(logits_BV, keys, config).astype(jnp.int32)

    def body(carry):
        n, tokens_B, done_B, out_BN, cache = carry
        out_BN = out_BN.at[:, n].set(jnp.where(done_B, eos_id, tokens_B))
        done_B = done_B | (tokens_B == eos_id)
        hidden, cache = model.extend(tokens_B[:, None], jnp.ones((B, 1), bool), cache)
        return n + 1, choose(hidden, n + 1), done_B, out_BN, cache

    hidden, cache = model.extend(prompts_BT, valid_BT, model.new_cache(B, T + new))
    out_BN = jnp.full((B, new), eos_id, jnp.int32)
    carry = (0, choose(hidden, 0), jnp.zeros(B, bool), out_BN, cache)
    return jax.lax.while_loop(lambda c: (c[0] < new) & ~jnp.all(c[2]), body, carry)[3]


def generate(graphdef: nnx.GraphDef, params, prompts: list[np.ndarray], config: SampleConfig, *, key: jax.Array,
             vocab_size: int, eos_id: int) -> list[np.ndarray]:
    """New tokens for each prompt, up to config.max_new_tokens, without the end-of-document id.

    prompts: lists of token ids of any lengths, none empty. The same key and row give the same tokens.
    """
    assert all(len(p) for p in prompts), "a prompt needs at least one token; begin with the tokenizer's bos"
    width = -(-max(len(p) for p in prompts) // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    valid = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt):] = prompt
        valid[row, width - len(prompt):] = True
    out = np.asarray(_generate(params, jnp.asarray(tokens), jnp.asarray(valid), key, graphdef=graphdef,
                               config=config, vocab_size=vocab_size, eos_id=eos_id))
    ends = [np.flatnonzero(row == eos_id) for row in out]
    return [row[: end[0]] if len(end) else row for row, end in zip(out, ends, strict=True)]
