"""The loop stop: a row ends once its newest tokens have gone round the same cycle often enough.

    stop_loops   times that the cycle must have gone round; 0: never end for that
    loop_period  tokens of the longest cycle that counts

Both are settings of a row (`SampleConfig`). What lives here: how the cycles are counted on the device, one token at a
time. It finds what `lmjax.evals.loops.tail_cycle` finds in the new tokens; prompts do not count.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lmjax.axes import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Loops:
    """equal_BP: int32: how many of the newest tokens equal the one p + 1 before them. looped_B: bool: ended by this."""

    equal_BP: jax.Array
    looped_B: jax.Array


def no_loops(batch: int, longest: int) -> Loops:
    """Before the first new token; cycles of up to `longest` tokens."""
    return Loops(jnp.zeros((batch, longest), jnp.int32), jnp.zeros(batch, bool))


def count_loops(loops: Loops, tokens_BS: jax.Array, starts_B: jax.Array, lengths_B: jax.Array, token_B: jax.Array,
                live_B: jax.Array, times_B: jax.Array, period_B: jax.Array) -> Loops:
    """With token_B, which stands at index lengths_B of tokens_BS in the rows that are live. Costs O(P) a row.

    The last m tokens have period p where m - p tokens equal the one p before: they go round m // p times.
    """
    periods_P = 1 + jnp.arange(loops.equal_BP.shape[1], dtype=jnp.int32)
    before_BP = lengths_B[:, None] - periods_P
    earlier_BP = jnp.take_along_axis(tokens_BS, jnp.maximum(before_BP, 0), axis=1)
    equal_BP = (earlier_BP == token_B[:, None]) & (before_BP >= starts_B[:, None])
    equal_BP = jnp.where(live_B[:, None], jnp.where(equal_BP, loops.equal_BP + 1, 0), loops.equal_BP)
    enough_BP = (equal_BP >= (times_B[:, None] - 1) * periods_P) & (periods_P <= period_B[:, None])
    ends_B = live_B & (times_B > 0) & jnp.any(enough_BP, axis=1)
    return Loops(constrain(equal_BP, "BP"), constrain(loops.looped_B | ends_B, "B"))
