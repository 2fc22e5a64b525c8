"""Chips and how they are joined: published figures, and the name of a topology such as v5p:8x8x4 taken apart.

What lives here: figures with their sources, and bandwidths that follow from a shape. What does not: any time
(`lmjax.plan.roofline`). Nothing here imports jax.

Sources. TPU peaks, memory and topologies: Google Cloud's documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"
and "TPU7x" (cloud.google.com/tpu/docs/<name>). Links and data-centre network: "How to Scale Your Model" (Austin et al.
2025, jax-ml.github.io/scaling-book), chapter "How to Think About TPUs", tables of specifications: bytes/s of a link one
way (4.5e10 on v4 and v5e, 9e10 on v5p, v6e and 7x), and 6.25e9 of network a chip (v5e 3.125e9, v6e and 7x 12.5e9).
NVIDIA: data sheets of A100 (80 GB SXM), H100 SXM and H200 SXM; NVLink is their "600" and "900 GB/s", of which half goes
out; the network is one 200 Gb/s (DGX A100) or 400 Gb/s (DGX H100, H200) adapter a GPU. Clocks of the matrix units:
v4 1.05 GHz (arXiv 2304.01433, table 4); v5e 1.5, v5p and v6e 1.75 GHz are what the peak implies: peak / (2 x 128 x 128
x units), with 4, 8 and (of 256 x 256) 4.
"""

import dataclasses
import difflib
import math
import re

from lmjax.errors import ConfigError

GIB = 2**30
# Bytes/s between a chip and its host's memory, one way, for activations that wait there. An assumption, the same for
# every chip: about 16 lanes of PCIe 3.0 (15.75e9 by its standard), of which newer hosts have two or four times.
HOST_RATE = 1.5e10


@dataclasses.dataclass(frozen=True)
class Chip:
    """peak: bfloat16 FLOP/s. hbm: bytes that a program may use. hbm_rate: bytes/s. link: bytes/s one way of one link.
    network: bytes/s a chip out of its slice (TPU) or host (GPU). clock: Hz. largest: slice. devices: JAX devices
    of a chip. ring: the size from which on (and, where `multiples`, at whose multiples) a dimension of a
    slice closes to a ring. kind: platform."""

    kind: str
    peak: float
    hbm: float
    hbm_rate: float
    link: float
    network: float
    clock: float = 0.0
    largest: tuple[int, ...] = (8,)
    ring: int = 16
    multiples: bool = False
    devices: int = 1


CHIPS = {
    "v4": Chip("tpu", 275e12, 32 * GIB, 1.2e12, 4.5e10, 6.25e9, 1.05e9, (16, 16, 16), 4, True),
    "v5e": Chip("tpu", 197e12, 15.75 * GIB, 8.19e11, 4.5e10, 3.125e9, 1.5e9, (16, 16)),
    "v5p": Chip("tpu", 459e12, 95 * GIB, 2.765e12, 9e10, 6.25e9, 1.75e9, (16, 16, 24), 4, True),
    "v6e": Chip("tpu", 918e12, 31.25 * GIB, 1.64e12, 9e10, 12.5e9, 1.75e9, (16, 16)),
    "tpu7x": Chip("tpu", 2307e12, 192 * GIB, 7.38e12, 9e10, 12.5e9, 0.0, (16, 16, 36), 4, True, 2),
    "a100": Chip("gpu", 312e12, 80e9, 2.039e12, 300e9, 25e9),
    "h100": Chip("gpu", 989.4e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Chip("gpu", 989.4e12, 141e9, 4.8e12, 450e9, 50e9),
}
# Slices that stand in the tables of the pages above, in any order of their dimensions; three-dimensional ones of whole
# cubes (multiples of 4) up to the largest exist as well.
COMMON = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16",
           "16x16x16"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
            "16x16x24"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
              "16x16x16", "16x16x36"),
}
HOST_GPUS = 8
NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "trillium": "v6e", "v7x": "tpu7x", "v7": "tpu7x",
         "ironwood": "tpu7x", "tpu7": "tpu7x", "v4p": "v4"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """`slices` slices of a shape; for GPUs the shape is (how many,), in hosts of eight."""

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}" + (f" x {self.slices} slices" * (self.slices > 1))

    def rings(self) -> list[tuple[int, float]]:
        """(size, bytes/s out of a chip along it) of every dimension of a TPU slice above 1: both ways where it closes
        to a ring, else one way at the ends, which is what counts."""
        c = self.chip
        closed = [size >= c.ring and (not c.multiples or size % c.ring == 0) for size in self.shape]
        return [(size, c.link * (2 if ring else 1)) for size, ring in zip(self.shape, closed, strict=True) if size > 1]

    def rate(self, group: int, stride: int = 1) -> float:
        """Bytes/s that one chip can send to a group of `group` chips, `stride` apart in the order of the mesh.

        TPUs: the group covers dimensions of the slice, fastest first, from `stride` on, and all their links carry; a
        part of a dimension is a line, not a ring, and one link carries. GPUs: NVLink within a host, else the network.
        """
        if group <= 1:
            return math.inf
        c = self.chip
        if c.kind == "gpu":
            return c.link if group * stride <= HOST_GPUS else c.network
        if group * stride > math.prod(self.shape) * c.devices:
            return c.network
        rate, inner, outer = 0.0, 1, c.devices
        for size, along in reversed(self.rings()):
            inner, outer = outer, outer * size
            if stride < outer and group * stride > inner:
                covered = min(outer, group * stride) // max(inner, stride)
                rate += along if covered == size else c.link if covered > 1 else 0.0
        return rate or c.link


def _refuse(text: str, why: str, near: list[str]) -> ConfigError:
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(f"--topology={text}: {why}{hint}")


def parse_machine(text: str, slices: int = 1) -> Machine:
    """The machine that `v5p:8x8x4` or `h100:8` names. Raises ConfigError with the nearest names that exist."""
    name, _, size = text.strip().lower().partition(":")
    if name not in CHIPS:
        near = [NAMES[name]] if name in NAMES else difflib.get_close_matches(name, CHIPS, n=2, cutoff=0.4)
        raise _refuse(text, f"no such chip; known are {', '.join(CHIPS)}", [f"{n}:{size or _example(n)}" for n in near])
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", size):
        raise _refuse(text, "give the shape of the slice, or the number of GPUs", [f"{name}:{_example(name)}"])
    if not 1 <= slices <= 1024:
        raise ConfigError(f"--slices={slices}: give 1 to 1024")
    shape = tuple(map(int, size.split("x")))
    if chip.kind == "gpu":
        if slices > 1:
            raise ConfigError(f"--slices={slices}: slices are of TPUs; give the number of GPUs, such as "
                              f"--topology={name}:{HOST_GPUS * slices}")
        if len(shape) > 1 or (shape[0] > HOST_GPUS and shape[0] % HOST_GPUS):
            raise _refuse(text, f"give the number of GPUs: up to {HOST_GPUS}, or whole hosts of {HOST_GPUS}",
                          [f"{name}:{max(HOST_GPUS, math.prod(shape) // HOST_GPUS * HOST_GPUS)}"])
        return Machine(name, shape)
    known = {tuple(sorted(map(int, common.split("x")))) for common in COMMON[name]}
    cubes = chip.multiples and len(shape) == 3 and all(n % 4 == 0 for n in shape) and all(
        n <= most for n, most in zip(sorted(shape), sorted(chip.largest), strict=True))
    if tuple(sorted(shape)) not in known and not cubes:
        raise _refuse(text, f"there is no such {name} slice", _nearest_shapes(name, shape))
    return Machine(name, shape, slices)


def _example(name: str) -> str:
    return COMMON[name][-4] if name in COMMON else "8"


def _nearest_shapes(name: str, shape: tuple[int, ...]) -> list[str]:
    """The two slices of nearest size; of equal ones the first."""
    chips = math.prod(shape)

    def far(size: str) -> float:
        return abs(math.log(math.prod(map(int, size.split("x"))) / chips))
    return [f"{name}:{size}" for size in sorted(COMMON[name], key=far)[:2]]
