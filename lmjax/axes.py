"""Mesh axes, and the one rule by which the name of an array says how it is sharded.

Every weight is named after its shape: `q_DNH` has the dimensions D, N and H of the legend below, so its
sharding is read off its name. A leading layer dimension L is added where layers are stacked. Activations
follow the same letters with a table of their own. No model and no optimizer lives here, and no model code
names a mesh axis.

    B  batch (rows)        D  model width         E  experts
    T  query time          N  query heads         V  vocabulary
    S  key time            K  key/value heads     P  learned positions
    H  head width          F  feed-forward width  L  layers
    G  query heads per key/value head (N = K G)    A  experts that a token has chosen
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# The order of devices in the mesh: `tensor` varies fastest, so that its traffic, the heaviest, stays
# between neighbours.
MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Letter -> mesh axis (or axes). A letter that is not listed is never split. An axis splits one dimension of an array,
# the first that asks for it: `expert` splits the experts where there are any, and is more of `fsdp` to all other
# weights; rows of the batch are split over it too, or its devices would all compute the same outside of the experts.
# MaxText does both by its default rules, and torchtitan takes its expert axis out of the data-parallel ones.
WEIGHT_RULES = {"E": "expert", "D": ("fsdp", "expert"), "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
ACTIVATION_RULES = {"B": ("data", "fsdp", "expert"), "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the mesh axes. At most one may be -1: it takes the devices that are left.

    data: replicas of the weights. fsdp: weights and optimizer state split over this axis, gathered when
    used (ZeRO-3). tensor: heads, feed-forward and vocabulary split over this axis (Megatron). expert: experts split
    over this axis, which is one more of fsdp to everything else.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Axis sizes with -1 filled in. Call `problems` first: this one asserts."""
        sizes = [getattr(self, name) for name in MESH_AXES]
        if -1 in sizes:
            sizes[sizes.index(-1)] = num_devices // math.prod(s for s in sizes if s != -1)
        assert math.prod(sizes) == num_devices, (sizes, num_devices)
        return tuple(sizes)

    def problems(self, num_devices: int, prefix: str = "mesh") -> list[str]:
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        bad = [f"{prefix}.{n}={s}: an axis size is at least 1, or -1 for the devices that are left"
               for n, s in sizes.items() if s < 1 and s != -1]
        free = [n for n, s in sizes.items() if s == -1]
        if len(free) > 1:
            bad.append(f"{prefix}: {' and '.join(free)} are both -1; give all but one a size")
        if bad:
            return bad
        fixed = math.prod(s for s in sizes.values() if s != -1)
        text = " x ".join(f"{n}={s}" for n, s in sizes.items())
        if free and num_devices % fixed:
            return [f"{prefix}: {text} leaves no whole number for {free[0]} on {num_devices} devices; "
                    f"choose sizes whose product {fixed} divides {num_devices}"]
        if not free and fixed != num_devices:
            return [f"{prefix}: {text} needs {fixed} devices but there are {num_devices}; "
                    f"set one axis to -1 to use what is there"]
        return []


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes of MESH_AXES; axes of size 1 are always present."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(config.sizes(len(devices)), MESH_AXES, devices=devices,
                         axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The same mesh with no device behind it, for planning."""
    return AbstractMesh(config.sizes(num_devices), MESH_AXES,
                        axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _spec(letters: str, shape: Sequence[int], rules: dict, mesh: Mesh | AbstractMesh) -> P:
    """The spec of an array; a dimension that its mesh axes do not divide is left whole."""
    parts, used = [], set()
    for letter, size in zip(letters, shape, strict=True):
        names = rules.get(letter, ())
        names = tuple(name for name in ((names,) if isinstance(names, str) else names)
                      if mesh.shape[name] > 1 and name not in used)
        ways = math.prod(mesh.shape[name] for name in names)
        parts.append(names if names and size % ways == 0 else None)
        used.update(parts[-1] or ())
    return P(*(part[0] if part and len(part) == 1 else part for part in parts))


def weight_letters(name: str, ndim: int) -> str:
    """The letters of a weight named `<what>_<LETTERS>`, with L in front where layers are stacked."""
    letters = name.rpartition("_")[2]
    if not letters.isupper() or ndim not in (len(letters), len(letters) + 1):
        return ""
    return letters if ndim == len(letters) else "L" + letters


def weight_spec(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The sharding of a weight (or of its gradient or optimizer moment) by its name.

    Vectors (norm scales, most biases) and anything not named by letters are replicated: they are small, and
    gathering them layer by layer costs more than it saves.
    """
    letters = weight_letters(name, len(shape))
    if len(letters.replace("L", "")) < 2:
        return P()
    return _spec(letters, shape, WEIGHT_RULES, mesh)


def activation_spec(letters: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The sharding of an activation, for code that says itself what each device does (`jax.shard_map`)."""
    return _spec(letters, shape, ACTIVATION_RULES, mesh)


def gathered_spec(letters: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The sharding of a weight at the moment of use: its D is gathered, what else is split stays so."""
    return _spec(letters.replace("D", "_"), shape, WEIGHT_RULES, mesh)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pins the sharding of an activation by its letters; does nothing outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(letters, x.shape, ACTIVATION_RULES, mesh))


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows over the axes of B, everything else whole."""
    return NamedSharding(mesh, P(ACTIVATION_RULES["B"], *[None] * (ndim - 1)))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in ACTIVATION_RULES["B"])
