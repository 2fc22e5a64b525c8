"""Moving weights through a table of names: from a source of tensors onto the mesh, and back out.

Reading goes tensor by tensor: each is taken from its source (a view of the file, or one dequantised tensor), put in
our layout, cast, and placed with the sharding that training would give it; layers are set into their stack one by one,
in place. So the peak above the parameters themselves is about one tensor. Which files there are is not known here.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lmjax.axes import weight_spec
from lmjax.errors import CheckpointError
from lmjax.interop.names import Row
from lmjax.models import Decoder, DecoderConfig
from lmjax.state import abstract_params
from lmjax.tree import from_dict, named_leaves

SHOWN = 20  # problems of one kind that are spelt out


class Source(Protocol):
    """Tensors by the names of a table."""

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


def used_rows(table: tuple[Row, ...], config: DecoderConfig) -> list[Row]:
    """The rows whose weight this model has."""
    ours = named_leaves(_abstract(config))
    rows = [row for row in table if row.ours in ours]
    assert {row.ours for row in rows} == set(ours), f"the table lacks {set(ours) - {row.ours for row in rows}}"
    return rows


def expected(rows: list[Row], config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the rows speak of, layer after layer."""
    shapes = {}
    for stacked, group in itertools.groupby(rows, key=lambda row: row.stacked):
        group = list(group)
        for layer in range(config.num_layers) if stacked else (None,):
            shapes |= {name: row.shape(config) for row in group for name, _ in row.at(layer, config)}
    return shapes


# ---- in --------------------------------------------------------------------------------------------------------


def check(source: Source, rows: list[Row], config: DecoderConfig) -> None:
    """Raises CheckpointError with every tensor that is missing, unexpected or of another shape."""
    wanted, there = expected(rows, config), source.shapes
    problems = [f"{name} is missing" for name in wanted if name not in there]
    problems += [f"{name} is unexpected" for name in there if name not in wanted]
    problems += [f"{name} has the shape {list(there[name])}, expected {list(shape)}"
                 for name, shape in wanted.items() if name in there and tuple(there[name]) != shape]
    if problems:
        more = len(problems) - SHOWN
        tail = [f"and {more} more tensors that do not fit"] if more > 0 else []
        raise CheckpointError(*(f"{source.where}: {problem}" for problem in problems[:SHOWN] + tail))


def read_params(source: Source, table: tuple[Row, ...], config: DecoderConfig, *, dtype: Any = jnp.float32,
                mesh: Mesh | None = None) -> dict:
    """The parameters of Decoder(config), cast to `dtype`, sharded over the mesh (None: whole, on the first device).

    Raises CheckpointError where the tensors are not those of this model, before any is read.
    """
    rows = used_rows(table, config)
    check(source, rows, config)
    like = _abstract(config)
    wanted, found = named_leaves(like), {}
    for row in rows:
        shape, sharding = wanted[row.ours].shape, _sharding(row.ours, wanted[row.ours].shape, mesh)
        if not row.stacked:
            found[row.ours] = _place(row.to_ours(source.read(row.there), config), dtype, sharding)
            continue
        stack = jnp.zeros(shape, dtype, device=sharding)
        for layer in range(config.num_layers):
            for name, at in row.at(layer, config):
                weight = row.to_ours(source.read(name), config)
                start = np.array(at + (0,) * (len(shape) - len(at)), np.int32)
                stack = _setter(sharding)(stack, _place(weight, dtype, _below(sharding, len(at))), start)
        found[row.ours] = stack
    return from_dict(like, found)


def _place(weight: np.ndarray, dtype: Any, sharding: Sharding) -> jax.Array:
    """Each device gets its part of the view, copied and cast; no other part is read."""
    return jax.make_array_from_callback(
        weight.shape, sharding, lambda index: np.array(weight[index], dtype, order="C"))


@functools.cache
def _setter(sharding: Sharding):
    def put(stack, weight, start):
        weight = weight.reshape((1,) * (stack.ndim - weight.ndim) + weight.shape)
        return jax.lax.dynamic_update_slice(stack, weight, tuple(start))

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _sharding(name: str, shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, weight_spec(name.rpartition("/")[2], shape, mesh))


def _below(sharding: Sharding, depth: int) -> Sharding:
    """Of one layer of a stack, or of one expert of a layer: without its first dimensions."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[depth:]))
    return sharding


# ---- out -------------------------------------------------------------------------------------------------------


def tensors(params: dict, rows: list[Row], config: DecoderConfig, wanted: list[str]) -> Iterator[np.ndarray]:
    """The tensors called `wanted` in their layout, made one by one."""
    leaves = named_leaves(params)
    by_name: dict[str, list[tuple[Row, tuple[int, ...]]]] = {}
    for row in rows:
        for layer in range(config.num_layers) if row.stacked else (None,):
            for name, at in row.at(layer, config):
                by_name.setdefault(name, []).append((row, at))
    for name in wanted:
        parts = [row.to_theirs(np.asarray(leaves[row.ours][at] if at else leaves[row.ours]), config)
                 for row, at in by_name[name]]
        yield parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _abstract(config: DecoderConfig) -> dict:
    return abstract_params(functools.partial(Decoder, config))
