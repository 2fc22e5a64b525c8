"""Layers split over the mesh axis `pipeline`: the schedule, and a stack of layers made to run by it.

Device s of the P on the axis, a stage, holds some of the layers. A batch is cut into M micro-batches; while stage s
works on one, stage s - 1 works on the next, and after each tick every stage hands its result to the one behind it,
round and round (GPipe, arXiv 1811.06965). With R repeats the layers are cut in R P chunks, stage s has the chunks s,
s + P, s + 2 P, …, and a micro-batch goes round R times (interleaved stages, Narayanan et al. 2021, arXiv 2104.04473).
Micro-batches come in groups of P, as many as go round at once, so that none ever waits for its turn:

    tick t on stage s: u = t - s, the u-th thing that the stage does, 0 <= u < M R
                       micro-batch  (u div P R) P + u mod P        repeat  (u div P) mod R

There are M R + P - 1 ticks, in P - 1 of which a stage has nothing to do: the bubble.

`pipeline` is a transformation: it takes the weights of all layers and a function that runs a stack of them one after
another, which knows of no pipeline, and gives the same numbers. Stages are a dimension S of arrays, split over the
axis, and the function is mapped over it (`jax.vmap`), so that all other mesh axes mean inside of it what they always
do. The backward pass is the derivative of the loop over ticks: the same schedule, backwards. It keeps what the layers
keep (their `remat`), of all M micro-batches, beside one copy of the stack's input. What lives elsewhere: the layers,
and what is before and after them (`lmjax.models.decoder`).

    S  stages    M  micro-batches    n  layers of a chunk    R  repeats
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmjax.axes import activation_spec, batch_ways, constrain

AXIS = "pipeline"
ENOUGH = 4  # turns of a stage per stage: the bubble is then below a fifth (GPipe, section 2.3: negligible)
ROWS = "batch_size / (accumulate x replica x data x fsdp x expert)"
Run = Callable[[Any, jax.Array, Any, Callable], tuple[jax.Array, Any]]


class Schedule(NamedTuple):
    """Who does what when, by the three numbers that it follows from: P, R and M."""

    stages: int
    repeats: int
    micro: int

    @property
    def ticks(self) -> int:
        return self.micro * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its time in which a stage has nothing to do."""
        return (self.stages - 1) / self.ticks

    def at(self, tick: jax.Array | int, stage: jax.Array | int) -> tuple:
        """(micro-batch, repeat, whether there is anything to do) of a stage; the first two always exist."""
        turn = tick - stage
        busy = (turn >= 0) & (turn < self.micro * self.repeats)
        turn = jnp.clip(turn, 0, self.micro * self.repeats - 1)
        group, lap = turn // (self.stages * self.repeats), turn // self.stages % self.repeats
        return group * self.stages + turn % self.stages, lap, busy


# ---- which schedule --------------------------------------------------------------------------------------------------


def choose_micro(asked: int, rows: int, stages: int, repeats: int) -> tuple[int, str]:
    """(M, reason, in words for the start of a run); M is 0 where there is no such number.

    asked: compute.pipeline_microbatches. rows: of a batch, on the devices that hold one copy of the model.
    """
    if asked:
        return (0 if asked % stages or rows % asked else asked), "set by compute.pipeline_microbatches"
    able = [m for m in range(stages, rows + 1, stages) if rows % m == 0]
    if not able:
        return 0, f"{rows} rows are no multiple of {stages}"
    enough = [m for m in able if m * repeats >= ENOUGH * stages]
    if enough:
        return enough[0], f"the fewest that give each stage {ENOUGH} x {stages} turns"
    return able[-1], f"as many as {rows} rows on each copy of the model allow"


def pipeline_problems(rows: int, layers: int, period: int, stages: int, repeats: int, asked: int) -> list[str]:
    """What does not fit together, with the fix, one line each. rows, asked: as in `choose_micro`; period: layers n and
    n + period are alike."""
    if stages == 1:
        return []
    bad, chunks = [], stages * repeats
    if layers % chunks:
        bad.append(f"mesh.pipeline={stages} x compute.pipeline_repeats={repeats} = {chunks} chunks do not divide "
                   f"model.num_layers={layers}; choose sizes that do")
    elif layers // chunks % period:
        bad.append(f"mesh.pipeline={stages} x compute.pipeline_repeats={repeats}: chunks of {layers // chunks} layers "
                   f"are no multiple of the {period} of model.windows, and stages must be alike; use fewer stages or "
                   "repeats")
    if asked % stages:
        bad.append(f"compute.pipeline_microbatches={asked}: must be a multiple of mesh.pipeline={stages}, or 0")
    elif asked and rows % asked:
        bad.append(f"compute.pipeline_microbatches={asked} does not divide the {rows} rows that a copy of the model "
                   f"has, {ROWS}; choose one that does, or 0")
    elif not choose_micro(asked, rows, stages, repeats)[0]:
        bad.append(f"mesh.pipeline={stages} needs as many micro-batches, and a copy of the model has {rows} rows, "
                   f"{ROWS}; make that a multiple of {stages}: raise batch_size, or lower accumulate or an axis")
    return bad


def split_schedule(rows: int, layers: int, period: int, repeats: int, asked: int) -> Schedule | None:
    """The schedule of a batch of so many rows on the mesh that is set; None without stages, or where the rows do not
    allow it (a prompt, say): then every device runs all layers, which is slower and as right."""
    mesh = jax.sharding.get_abstract_mesh()
    stages = mesh.shape.get(AXIS, 1)
    if stages == 1 or rows % (ways := batch_ways(mesh)):
        return None
    if pipeline_problems(rows // ways, layers, period, stages, repeats, asked):
        return None
    return Schedule(stages, repeats, choose_micro(asked, rows // ways, stages, repeats)[0])


# ---- the transformation ----------------------------------------------------------------------------------------------


def pipeline(run: Run, params_L: Any, x_BTD: jax.Array, about_B: Any, schedule: Schedule) -> tuple[jax.Array, Any]:
    """`run(params_L, x_BTD, about_B, pick)` by stages: (x after all layers, sums), the same numbers.

    run: (weights of a stack of layers, each with a leading dimension, x, about, pick) -> (x, sums); it runs them in
    their order and applies pick to the weights of one layer where it uses them, inside of what the backward pass
    recomputes. sums: a pytree [L, …] of what each layer has added up over its rows; None where there is none.
    about_B: pytree [B, …] of what layers know of each row beside x; no gradient flows to it. The mesh that is set has
    schedule.stages stages, and the numbers fit together (`pipeline_problems`).
    """
    stages, repeats, micro = schedule
    stage_S = jnp.arange(stages)

    def tick(carry, t):
        coming_SBTD, held_SMBTD = carry

        def one(stage, params_nR, coming_BTD, held_MBTD):
            """What one stage does."""
            batch, repeat, busy = schedule.at(t, stage)
            mine_BTD, rest_MBTD = _take(held_MBTD, batch)
            x_BTD = jnp.where((stage == 0) & (repeat == 0), mine_BTD, coming_BTD)
            x_BTD = jnp.where(busy, x_BTD, 0)  # what a bubble computes is never used, and must not be NaN
            y_BTD, sums_n = run(params_nR, x_BTD, jax.tree.map(lambda a: a[batch], about_MB),
                                (lambda w_R: w_R[0]) if repeats == 1 else (lambda w_R: w_R[repeat]))
            # What is held at the end is what the last stage has put there in the last repeat.
            return y_BTD, rest_MBTD.at[batch].set(y_BTD), sums_n

        y_SBTD, held_SMBTD, sums_Sn = jax.vmap(one, spmd_axis_name=AXIS)(stage_S, params_SnR, coming_SBTD, held_SMBTD)
        return (_to_next(y_SBTD, stages), held_SMBTD), sums_Sn

    params_SnR = jax.tree.map(functools.partial(_by_stage, stages=stages, repeats=repeats), params_L)
    about_MB = jax.tree.map(lambda a: _pin(_cut(a, micro), None), about_B)
    x_MBTD = _pin(_cut(x_BTD, micro), None)
    held_SMBTD = _pin(jnp.broadcast_to(x_MBTD, (stages, *x_MBTD.shape)), AXIS, None)
    start = jnp.zeros_like(held_SMBTD[:, 0]), held_SMBTD
    (_, held_SMBTD), sums_tSn = jax.lax.scan(tick, start, jnp.arange(schedule.ticks))
    last_S = (stage_S == stages - 1).reshape(-1, 1, 1, 1, 1)
    x_MBTD = _pin(jnp.sum(jnp.where(last_S, held_SMBTD, 0), axis=0), AXIS)
    return constrain(_join(x_MBTD), "RTD"), jax.tree.map(functools.partial(_all_ticks, schedule), sums_tSn)


def _all_ticks(schedule: Schedule, sums_tSn: jax.Array) -> jax.Array:
    """[t, S, n, …] -> [L, …]: of each layer the sum over all micro-batches, without what was computed in a bubble."""
    stages, repeats, _ = schedule
    _, lap_tS, busy_tS = schedule.at(jnp.arange(schedule.ticks)[:, None], jnp.arange(stages))
    mine_tSR = busy_tS[..., None] & (lap_tS[..., None] == jnp.arange(repeats))
    mine_tSR = mine_tSR.reshape(*mine_tSR.shape, *[1] * (sums_tSn.ndim - 2))
    sums_SRn = jnp.sum(jnp.where(mine_tSR, sums_tSn[:, :, None], 0), axis=0)
    return jnp.swapaxes(sums_SRn, 0, 1).reshape(-1, *sums_tSn.shape[3:])  # chunk r P + s, and its layers


# After the loop M is split over the axis, so that behind the layers the devices of all stages share the rows, in the
# order that the rows of the batch have as well.


def _cut(a: jax.Array, micro: int) -> jax.Array:
    """[B, …] -> [M, B / M, …]: to each micro-batch each device gives as many of its own rows."""
    ways = batch_ways(jax.sharding.get_abstract_mesh())
    return jnp.swapaxes(a.reshape(ways, micro, -1, *a.shape[1:]), 0, 1).reshape(micro, -1, *a.shape[1:])


def _join(a: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    ways = batch_ways(jax.sharding.get_abstract_mesh())
    return jnp.swapaxes(a.reshape(a.shape[0], ways, -1, *a.shape[2:]), 0, 1).reshape(-1, *a.shape[2:])


def _spec(x: jax.Array, *lead: str | None) -> P:
    """Of an array [..., B, T, …]: first dimensions as said, rows and tokens as in every layer."""
    shape, mesh = x.shape[len(lead):], jax.sharding.get_abstract_mesh()
    return P(*lead, *activation_spec(("BT" + "_" * len(shape))[:len(shape)], shape, mesh))


def _pin(x: jax.Array, *lead: str | None) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, _spec(x, *lead))


def _by_stage(w_L: jax.Array, stages: int, repeats: int) -> jax.Array:
    """[L, …] -> [S, n, R, …]: chunk r P + s is that of stage s in repeat r."""
    w_SnR = jnp.moveaxis(w_L.reshape(repeats, stages, -1, *w_L.shape[1:]), 0, 2)
    return jax.lax.with_sharding_constraint(w_SnR, P(AXIS, *[P.UNCONSTRAINED] * (w_SnR.ndim - 1)))


def _to_next(y_SBTD: jax.Array, stages: int) -> jax.Array:
    """What stage s has goes to stage s + 1, and of the last one to the first."""
    spec = _spec(y_SBTD, AXIS)
    return jax.shard_map(lambda y: jax.lax.ppermute(y, AXIS, [(s, (s + 1) % stages) for s in range(stages)]),
                         in_specs=spec, out_specs=spec)(y_SBTD)


@jax.custom_vjp
def _take(held_M: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(one of the things held, the others); what the second has in the place of the first must be overwritten. The
    derivative puts one thing in its place, where JAX's own would add an array of zeros as large as all of them."""
    return held_M[index], held_M


_take.defvjp(lambda held_M, index: (_take(held_M, index), index),
             lambda index, d: (d[1].at[index].set(d[0]), None))
