"""The state of a run, step, params, opt_state and guard, and how it is born on a mesh.

There is no random state and no data position in it: both are functions of (seed, step).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from lmjax.axes import WEIGHT_RULES, ZERO1_RULES, weight_spec
from lmjax.guard import GuardConfig, GuardState, fresh_guard
from lmjax.tree import map_with_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """step: int32 scalar, steps done. params: nested dict of float32 arrays. opt_state: Optax's. guard: what is
    remembered to tell bad updates."""

    step: jax.Array
    params: Any
    opt_state: Any
    guard: GuardState


def shardings(tree: Any, mesh: Mesh | AbstractMesh, zero1: bool = False) -> Any:
    """A NamedSharding for every leaf, by the last part of its name: moments and gradients carry the names
    of their weights, so they are split like them. zero1: what is below `opt_state/` is split over data too."""
    def place(name, leaf):
        rules = ZERO1_RULES if zero1 and name.startswith("opt_state/") else WEIGHT_RULES
        return NamedSharding(mesh, weight_spec(name.rpartition("/")[2], leaf.shape, mesh, rules))
    return map_with_name(place, tree)


def run_once(function: Callable, *args, out_shardings: Any = None) -> Any:
    """function(*args) as one compiled program, for what runs once. On a CPU LLVM optimises it less: random weights took
    two to four times as long to compile otherwise, and are made as fast (docs/performance.md)."""
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(function, out_shardings=out_shardings, compiler_options=options)(*args)


def make_init(build: Callable[[jax.Array], nnx.Module], tx: optax.GradientTransformation,
              guard: GuardConfig | None = None) -> Callable[[jax.Array], TrainState]:
    """A function of a PRNG key that makes the state at step 0, the same bits on any mesh. `run_once` it
    with `shardings` as out_shardings, so that no weight ever exists whole on one device."""

    def init(key: jax.Array) -> TrainState:
        return fresh_state(nnx.to_pure_dict(nnx.split(build(key))[1]), tx, guard)

    return init


def fresh_state(params: Any, tx: optax.GradientTransformation, guard: GuardConfig | None = None) -> TrainState:
    """The state at step 0 of a run that begins with these weights."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), fresh_guard(guard or GuardConfig()))


def graphdef(build: Callable[[jax.Array], nnx.Module]) -> nnx.GraphDef:
    """The static part of the model: `nnx.merge(graphdef, params)` is the model. Allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))[0]


def abstract_params(build: Callable[[jax.Array], nnx.Module]) -> dict:
    """The weights as shapes. Allocates nothing."""
    return jax.eval_shape(lambda key: nnx.to_pure_dict(nnx.split(build(key))[1]), jax.random.key(0))


def random_params(build: Callable[[jax.Array], nnx.Module], mesh: Mesh, seed: int) -> dict:
    """The weights that a run with this seed begins with, on the mesh."""
    placed = shardings(abstract_params(build), mesh)
    with jax.set_mesh(mesh):
        return run_once(lambda key: nnx.to_pure_dict(nnx.split(build(key))[1]), jax.random.key(seed),
                        out_shardings=placed)
