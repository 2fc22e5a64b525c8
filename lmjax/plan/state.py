"""What a run will be, before anything is allocated: parameters, shardings, bytes and FLOPs.

All of it is arithmetic on shapes. Activations are not counted: their peak depends on the compiler.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from lmjax import flops
from lmjax.axes import batch_sharding, batch_ways
from lmjax.config import RunConfig, protection
from lmjax.log import format_bytes, format_count
from lmjax.losses.goldfish import dropped_steps
from lmjax.models import Decoder
from lmjax.nn.pipeline import Schedule, choose_micro
from lmjax.state import TrainState, make_init, shardings
from lmjax.tree import count, named_leaves


@dataclasses.dataclass
class Plan:
    """state: the TrainState as shapes. flops_per_token: training FLOPs, forward and backward. active_params: those
    that one token meets, all but the experts that it has not chosen."""

    mesh: Mesh | AbstractMesh
    state: TrainState
    flops_per_token: float
    active_params: int

    @property
    def num_params(self) -> int:
        return count(self.state.params)


def make_plan(config: RunConfig, tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh) -> Plan:
    """The plan of a run whose model.vocab_size is set."""
    state = jax.eval_shape(make_init(lambda key: Decoder(config.model, key), tx, config.guard),
                           jax.random.key(0))
    c = config.model.filled()
    met = {name: math.prod(leaf.shape) * (flops.used_share(name, c.moe.num_experts, c.moe.experts_per_token)
                                          if c.moe else 1) for name, leaf in named_leaves(state.params).items()}
    matrices = sum(size for name, size in met.items()
                   if name.startswith("blocks/") and re.search(r"_(E?D[A-Z]+|[A-Z]+D)$", name))
    matrices += c.vocab_size * c.d_model  # the output matrix; the input embedding is only looked up
    windows = [c.windows[i % len(c.windows)] for i in range(c.num_layers)]
    per_token = flops.per_token(matrices, c.num_heads, c.head_dim, windows, config.seq_len)
    return Plan(mesh, state, per_token, round(sum(met.values())))


def make_batch(config: RunConfig, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of a global batch as shapes with shardings (`lmjax.objectives.pretrain` says what they are)."""
    def field(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape), *shape[1:]))

    rows, whole = config.batch_size, (config.batch_size, config.seq_len)
    batch = {name: field("int32", *whole) for name in ("tokens", "targets", "segments", "positions")}
    batch["weights"] = field("float32", *whole)
    if protection(config):
        batch["goldfish"] = field("uint32", *whole)
    if config.objective.goldfish.scheduled:
        batch["step"] = field("int32", rows)
    return batch


def bytes_per_device(tree: Any, placed: Any) -> int:
    """Of a tree whose leaves have the shardings of the tree `placed`."""
    return sum(math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, s in zip(
        jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True))


def parameter_table(plan: Plan) -> str:
    """One line a weight: name, shape, how it is split, elements, bytes on a device."""
    rows = [("parameter", "shape", "sharding", "elements", "per device")]
    placed = named_leaves(shardings(plan.state.params, plan.mesh))
    for name, leaf in named_leaves(plan.state.params).items():
        shard = math.prod(placed[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        split = ", ".join("·" if s is None else "+".join(s) if isinstance(s, tuple) else s
                          for s in placed[name].spec)
        whole = all(s is None for s in placed[name].spec)
        rows.append((name, " x ".join(map(str, leaf.shape)), "replicated" if whole else f"({split})",
                     f"{math.prod(leaf.shape):,}", format_bytes(shard)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.rjust(w) if i > 2 else cell.ljust(w)
                               for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in rows)


def supervised(config: RunConfig) -> list[str]:
    """One line on how many of its targets a run with goldfish is trained on; none for a run without."""
    fish, steps, tokens = config.objective.goldfish, config.total_steps, config.batch_size * config.seq_len
    if fish.strategy == "none":
        return []
    kept = (steps - config.protected_share * dropped_steps(fish, steps)) * tokens
    longer = f"; {config.steps:,} steps made {steps:,} (equal_supervised)" if fish.equal_supervised else ""
    return [f"supervised   about {format_count(kept)} of {format_count(tokens * steps)} targets, goldfish drops the "
            f"rest{longer}"]


def schedule_of(config: RunConfig, mesh: Mesh | AbstractMesh) -> Schedule:
    """Who does what when on a mesh, of a config that was found to fit it; Schedule(1, 1, 1) without stages."""
    if mesh.shape["pipeline"] == 1:
        return Schedule(1, 1, 1)
    return Schedule(mesh.shape["pipeline"], config.compute.pipeline_repeats, _micro(config, mesh)[0])


def _micro(config: RunConfig, mesh: Mesh | AbstractMesh) -> tuple[int, str]:
    rows = config.batch_size // (batch_ways(mesh) * max(config.accumulate, 1))
    return choose_micro(config.compute.pipeline_microbatches, rows, mesh.shape["pipeline"],
                        config.compute.pipeline_repeats)


def pipelined(config: RunConfig, mesh: Mesh | AbstractMesh) -> list[str]:
    """One line on the stages of the layers and what they cost; none for a run without."""
    schedule = schedule_of(config, mesh)
    stages, repeats, micro = schedule
    if stages == 1:
        return []
    each = config.model.num_layers // (stages * repeats)
    layers = f"{each} layer{'s' * (each > 1)}"
    turns = f"{stages} stages, each {repeats} times with {layers}" if repeats > 1 else f"{stages} stages of {layers}"
    return [f"pipeline     {turns}; {micro} micro-batches ({_micro(config, mesh)[1]}); bubble {schedule.bubble:.1%} of "
            "a stage's time"]


def describe(plan: Plan, config: RunConfig) -> str:
    """The numbers of a plan, for the start of a run and for --dry-run."""
    tokens = config.batch_size * config.seq_len
    placed = shardings(plan.state, plan.mesh, config.mesh.zero1)
    params = bytes_per_device(plan.state.params, placed.params)
    moments = bytes_per_device(plan.state.opt_state, placed.opt_state)
    axes = " x ".join(f"{name}={size}" for name, size in plan.mesh.shape.items())
    active = f"; a token meets {plan.active_params:,} ({format_count(plan.active_params)})" if config.model.moe else ""
    return "\n".join([
        f"mesh         {axes} ({plan.mesh.size} device{'s' if plan.mesh.size > 1 else ''})",
        f"parameters   {plan.num_params:,} ({format_count(plan.num_params)}), float32{active}",
        f"state/device {format_bytes(params)} weights + {format_bytes(moments)} optimizer"
        f"{' (split over data, ZeRO-1)' if config.mesh.zero1 else ''} "
        f"+ {format_bytes(params)} gradients; activations come on top",
        f"batch        {config.batch_size} rows x {config.seq_len} = {tokens:,} tokens a step, "
        f"{format_count(tokens * config.total_steps)} in {config.total_steps:,} steps",
        *pipelined(config, plan.mesh),
        *supervised(config),
        f"FLOPs        {format_count(plan.flops_per_token)} a token (6 x matrix weights + attention), "
        f"{plan.flops_per_token * tokens * config.total_steps:.2e} in all",
    ])
