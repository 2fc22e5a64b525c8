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
    R  rows, behind the layers
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# The order of devices in the mesh: `tensor` varies fastest, so that its traffic, the heaviest, stays between
# neighbours; `replica` varies slowest, so that only its one all-reduce a step crosses a data-centre network. `pipeline`
# comes next to it: a device of a stage sends one micro-batch of activations at a time to one device of the next stage,
# which is less than all that axes inside of it send, and works across hosts.
MESH_AXES = ("replica", "pipeline", "data", "fsdp", "expert", "context", "tensor")

# Letter -> mesh axis (or axes). A letter that is not listed is never split. An axis splits one dimension of an array,
# the first that asks for it: `expert` splits the experts where there are any, and is more of `fsdp` to all other
# weights; rows of the batch are split over it too, or its devices would all compute the same outside of the experts.
# (MaxText does both by its default rules, and torchtitan takes its expert axis out of the data-parallel ones.) Weights
# are split over `context` as well: its devices need every weight for their tokens, as those of `fsdp` do, and otherwise
# each would hold a copy. Stacked layers are split over `pipeline`, whose devices run the layers that they hold
# (`lmjax.nn.pipeline`), of the same rows. The output matrix is the same on all of them, so behind the layers they share
# the rows: R.
BATCH_AXES = ("replica", "data", "fsdp", "expert")
WEIGHT_RULES = {"L": "pipeline", "E": "expert", "D": ("fsdp", "expert", "context"), "N": "tensor", "K": "tensor",
                "F": "tensor", "V": "tensor"}
ACTIVATION_RULES = {"B": BATCH_AXES, "R": (*BATCH_AXES, "pipeline"), "T": "context", "N": "tensor", "K": "tensor",
                    "F": "tensor", "V": "tensor"}
# Moments of the optimizer under `zero1`. `data` comes last, so that what is gathered after an update is one block of
# the weight.
ZERO1_RULES = WEIGHT_RULES | {"D": ("fsdp", "expert", "context", "data")}


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the mesh axes. At most one may be -1: it takes the devices that are left.

    data: replicas of the weights. fsdp: weights and optimizer state split over this axis, gathered when
    used (ZeRO-3). tensor: heads, feed-forward and vocabulary split over this axis (Megatron). replica: as data, across
    slices or hosts that a slower network joins. context: the tokens of each row split over this axis
    (`lmjax.nn.context`), and weights as over fsdp. zero1: optimizer state split over data, though weights are not
    (ZeRO, arXiv 1910.02054, section 5.1). expert: experts split over this axis, which is one more of fsdp to everything
    else. pipeline: the layers split over this axis, each stage of them working on another micro-batch
    (`lmjax.nn.pipeline`).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    replica: int = 1
    context: int = 1
    zero1: bool = False
    expert: int = 1
    pipeline: int = 1

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Axis sizes in the order of MESH_AXES, with -1 filled in. Call `problems` first: this one asserts."""
        sizes = [getattr(self, name) for name in MESH_AXES]
        if -1 in sizes:
            sizes[sizes.index(-1)] = num_devices // math.prod(s for s in sizes if s != -1)
        assert math.prod(sizes) == num_devices, (sizes, num_devices)
        return tuple(sizes)

    def problems(self, num_devices: int, prefix: str = "mesh", slices: int = 1) -> list[str]:
        """Everything that is wrong with these sizes on so many devices of so many slices, one line each."""
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
        filled = dict(zip(MESH_AXES, self.sizes(num_devices), strict=True))
        if filled["replica"] % slices:
            bad.append(f"{prefix}.replica={filled['replica']}: must be a multiple of the {slices} slices, so that no "
                       f"other axis crosses the network between them; set {prefix}.replica={slices}")
        return bad


def count_slices(devices: Sequence[Any]) -> int:
    """How many TPU slices these devices are of; 1 for every other kind."""
    return len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1


def device_grid(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the shape of the mesh: neighbours of the fast network along the inner axes, and the slices of a
    TPU, or the processes of GPU hosts where `replica` is a multiple of them, along the outermost one.

    devices: anything with the attributes that `jax.experimental.mesh_utils` looks at.
    """
    replica, inner = sizes[0], tuple(sizes[1:])
    slices = count_slices(devices)
    processes = len({d.process_index for d in devices}) if devices[0].platform in ("gpu", "cuda", "rocm") else 1
    groups = slices if slices > 1 else processes
    if groups > 1 and replica % groups == 0:
        return mesh_utils.create_hybrid_device_mesh(
            (replica // groups, *inner), (groups, *(1 for _ in inner)), devices, process_is_granule=slices == 1,
            allow_split_physical_axes=True)
    # An axis may be a part of a dimension of a TPU slice: two stages of v5p:4x8x8, say. (`jax.make_mesh` refuses that.)
    return mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes of MESH_AXES; axes of size 1 are always present."""
    devices = jax.devices() if devices is None else devices
    return Mesh(device_grid(config.sizes(len(devices)), devices), MESH_AXES,
                axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The same mesh with no device behind it, for planning."""
    return AbstractMesh(config.sizes(num_devices), MESH_AXES,
                        axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(letters: str, shape: Sequence[int], rules: dict, mesh: Mesh | AbstractMesh) -> P:
    """The spec of an array. Of the axes of a letter, the first ones that together divide the dimension are used, and
    that no dimension before it has taken."""
    parts, taken = [], set()
    for letter, size in zip(letters, shape, strict=True):
        names = rules.get(letter, ())
        used, ways = [], 1
        for name in (names,) if isinstance(names, str) else names:
            if name in taken or mesh.shape[name] == 1:
                continue
            ways *= mesh.shape[name]
            if size % ways:
                break
            used.append(name)
        taken.update(used)
        parts.append(tuple(used) if len(used) > 1 else used[0] if used else None)
    return P(*parts)


def weight_letters(name: str, ndim: int) -> str:
    """The letters of a weight named `<what>_<LETTERS>`, with L in front where layers are stacked."""
    letters = name.rpartition("_")[2]
    if not letters.isupper() or ndim not in (len(letters), len(letters) + 1):
        return ""
    return letters if ndim == len(letters) else "L" + letters


def weight_spec(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: dict | None = None) -> P:
    """The sharding of a weight (or of its gradient or optimizer moment) by its name; rules: WEIGHT_RULES, or a table
    like it.

    Vectors (norm scales, most biases) and anything not named by letters are replicated: they are small, and
    gathering them layer by layer costs more than it saves.
    """
    letters = weight_letters(name, len(shape))
    if len(letters.replace("L", "")) < 2:
        return P()
    return spec(letters, shape, rules or WEIGHT_RULES, mesh)


def activation_spec(letters: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The sharding of an activation, for code that says itself what each device does (`jax.shard_map`)."""
    return spec(letters, shape, ACTIVATION_RULES, mesh)


def gathered_spec(letters: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The sharding of a weight at the moment of use: its D is gathered, what else is split stays so."""
    return spec(letters.replace("D", "_"), shape, WEIGHT_RULES, mesh)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pins the sharding of an activation by its letters; does nothing outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(letters, x.shape, mesh))


def platform() -> str:
    """Of the devices of the mesh that is set: `lmjax plan` sets one of chips that are not there. Without one, of this
    process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def context_ways() -> int:
    """Into how many parts the mesh that is set splits the tokens of a row; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def batch_sharding(mesh: Mesh | AbstractMesh, ndim: int = 2, length: int = 0) -> NamedSharding:
    """Rows over the axes of a batch; tokens over context where it divides a row's length; everything else whole."""
    tokens = "context" if length and length % mesh.shape["context"] == 0 else None
    return NamedSharding(mesh, P(BATCH_AXES, *[tokens, *[None] * (ndim - 2)][:ndim - 1]))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)
