"""The one train step: jitted, donated, the same for every objective, optimizer and mesh.

Gradients are sums over tokens; they are divided once, by the weight of the whole global batch, after every
micro-batch and every device has been added. Randomness is fold_in(key(seed), step).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax.axes import WEIGHT_RULES, ZERO1_RULES, constrain, weight_spec
from lmjax.guard import judge
from lmjax.optim import losses_alone
from lmjax.state import TrainState
from lmjax.tree import global_norm, map_with_name

Loss = Callable[[nnx.Module, dict[str, jax.Array], jax.Array], tuple[jax.Array, jax.Array, dict]]


def _micro_batches(batch: dict[str, jax.Array], accumulate: int) -> dict[str, jax.Array]:
    """[B, T] -> [A, B / A, T]. Micro-batch a takes rows a, a + A, …, so each device keeps its own rows."""
    def split(x):
        x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
        return jnp.moveaxis(constrain(x, ("B_T" + "_" * x.ndim)[:x.ndim]), 1, 0)
    return jax.tree.map(split, batch)


def _split_gradients(grads: Any, zero1: bool) -> Any:
    """Gradients split like their weights, or like the optimizer's moments; as they are outside a mesh.

    Said rather than left to the compiler, which may keep the sums of a scan over micro-batches whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return grads
    rules = ZERO1_RULES if zero1 else WEIGHT_RULES
    return map_with_name(lambda name, g: jax.lax.with_sharding_constraint(
        g, weight_spec(name.rpartition("/")[2], g.shape, mesh, rules)), grads)


def gradient_sums(loss: Loss, graphdef: nnx.GraphDef, params: Any, batch: dict[str, jax.Array],
                  key: jax.Array, accumulate: int = 1, zero1: bool = False) -> tuple[Any, jax.Array, dict]:
    """(sum of gradients, sum of weights, {metric: (sum, weight)}) over the batch, all in float32.

    Gradients are split over the mesh like their weights; with zero1 over data too, like the optimizer's moments.
    """

    def micro(batch, key):
        def total(params):
            value, weight, metrics = loss(nnx.merge(graphdef, params), batch, key)
            return value, (weight, metrics)
        grads, (weight, metrics) = jax.grad(total, has_aux=True)(params)
        return _split_gradients(grads, zero1), weight, metrics

    if accumulate == 1:
        return micro(batch, key)

    def add(sums, numbered):
        index, part = numbered
        return jax.tree.map(jnp.add, sums, micro(part, jax.random.fold_in(key, index))), None

    parts = _micro_batches(batch, accumulate)
    shapes = jax.eval_shape(micro, jax.tree.map(lambda x: x[0], parts), key)
    grads, *sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zeros = (_split_gradients(grads, zero1), *sums)
    return jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))[0]


def _where(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the update is good, else `old`; the schedule's count of steps goes on either way."""
    def is_schedule(x):
        return isinstance(x, optax.ScaleByScheduleState)
    return jax.tree.map(lambda n, o: n if is_schedule(n) else jnp.where(good, n, o), new, old, is_leaf=is_schedule)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """The (sum, weight) of each metric of a step as one array, float32 [names, 2], on every device: to fetch two
    scalars of each took the host longer than all else that it does in a step."""

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sums: jax.Array

    def fetch(self) -> dict[str, float]:
        """sum / weight of each metric whose weight is not 0; waits for the step."""
        with jax.transfer_guard_device_to_host("allow"):  # what jax.device_get is for, in half of its time
            sums = np.asarray(self.sums)
        return {name: float(s) / float(w) for name, (s, w) in zip(self.names, sums, strict=True) if w}


def make_train_step(loss: Loss, graphdef: nnx.GraphDef, tx: optax.GradientTransformation,
                    schedule: optax.Schedule, *, seed: int, accumulate: int, shardings: TrainState,
                    sigmas: float = 0.0, zero1: bool = False
                    ) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """train_step(state, batch) -> (state, metrics); `state` is donated.

    A batch whose weights are all zero gives zero gradients, not NaN. An update that `lmjax.guard` calls bad is not
    made: weights and moments stay, the step and the learning rate's schedule go on. zero1: `shardings` splits the
    moments over data; then gradients are scattered there, each device updates its part, and new weights are gathered.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, weight, metrics = gradient_sums(loss, graphdef, state.params, batch, key, accumulate, zero1)
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-8), grads)
        norm = global_norm(losses_alone(grads))
        total, share = metrics["loss"]
        good, guard = judge(sigmas, state.guard, total / jnp.maximum(share, 1e-8), norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = _where(good, optax.apply_updates(state.params, updates), state.params)
        opt_state = _where(good, opt_state, state.opt_state)
        one = jnp.float32(1)
        metrics |= {"weight": (weight, one), "grad_norm": (norm, one), "param_norm": (global_norm(params), one),
                    "lr": (jnp.asarray(schedule(state.step), jnp.float32), one),
                    "skipped": (guard.skipped.astype(jnp.float32), one),
                    "skipped_in_row": (guard.in_row.astype(jnp.float32), one)}
        told = Metrics(tuple(metrics), jnp.stack([jnp.stack(pair) for pair in metrics.values()]))
        return TrainState(state.step + 1, params, opt_state, guard), told

    mesh = jax.tree.leaves(shardings)[0].mesh
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
