"""The text of a compiled program, walked once: its computations, how often each instruction runs, and on which devices.

What lives here: what the text says, for whoever counts something in it. What does not: what is counted: collectives and
their bytes (`lmjax.collectives`), a TPU's cycles and kernels (`lmjax.plan.hlo`). Nothing here imports jax.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
         "ragged-all-to-all")
BITS = {"pred": 8, "bf16": 16, "token": 0}  # others end with their bits: f32, s8, u4, f8e4m3fn

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?(?P<sign>%?)(?P<name>[\w.\-]+) (?P<type>\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|bf16|[a-z]\d+(?:e\d+m\d+\w*)?|c64|c128)\[([\d,<= ]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation|called_computations|"
                     r"branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


class Instruction(NamedTuple):
    """type: of the result. rest: everything after the opening parenthesis of the operands."""

    name: str
    type: str
    op: str
    rest: str

    @property
    def kind(self) -> str | None:
        """Of a collective, at its start where it is asynchronous; None of everything else."""
        kind = self.op.removesuffix("-start")
        return kind if kind in KINDS else None


@dataclasses.dataclass(frozen=True)
class Module:
    """bodies: instructions of each computation. devices: that it was compiled for; 1 where the text does not say."""

    bodies: dict[str, list[Instruction]]
    entry: str
    devices: int


class Run(NamedTuple):
    """An instruction that runs `times` in one call of the program. exact: whether that is certain. where: the
    computation that it stands in. owner: the same, where what is fused or runs beside something else counts as part of
    its caller. turns: of a loop, how often it runs its body each time."""

    instruction: Instruction
    times: int
    exact: bool
    where: str
    owner: str
    turns: int


def read(text: str) -> Module:
    """A module from `compiled.as_text()`. Kernels' source may stand between instructions, over many lines.

    Raises ValueError for a text without an entry computation.
    """
    bodies: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line[:1] in (" ", "\t"):
            if current is not None and (found := _INSTRUCTION.match(line)):
                current.append(Instruction(*found.groups()))
        elif (head := _COMPUTATION.match(line.rstrip())) and (head["entry"] or head["sign"] or head["type"]):
            current = bodies.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation; give compiled.as_text()")
    devices = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    return Module(bodies, entry, math.prod(map(int, devices)))


def fold(module: Module, visit: Callable[[Run, list[float]], float]) -> float:
    """The sum of `visit` over the instructions of the entry computation. A visit gets the sums of the computations that
    its instruction calls, each for one turn, and so may pass on, multiply or ignore them. What a reduction or a
    collective applies to numbers is not looked into, nor the condition of a loop; of a conditional every branch is."""
    def body(name: str, times: int, exact: bool, owner: str) -> float:
        total = 0.0
        for line in module.bodies.get(name, ()):
            turns, sure = trip_count(line, module) if line.op == "while" else (1, True)
            inner = [body(called, times * turns, exact and sure, called if line.op in ("while", "call") else owner)
                     for called in _called(line)]
            total += visit(Run(line, times, exact, name, owner, turns), inner)
        return total

    return body(module.entry, 1, True, module.entry)


def sent(run: Run) -> tuple:
    """The same for all instructions that are one collective. One that TPUs run beside products stands in the text
    several times, as start, middle and end, each in what is fused with it: with one chain_id, or else one channel and
    size. (Channels alone do not tell: those of `jax.shard_map` are all the same.)"""
    line = run.instruction
    chain, channel = (re.search(rf'\b{name}="?(\d+)', line.rest) for name in ("chain_id", "channel_id"))
    if chain:
        return line.kind, run.owner, "chain", chain[1]
    if channel and run.where != run.owner:
        return line.kind, run.owner, "channel", channel[1], sum(array_bytes(line.type))
    return line.kind, run.where, "name", line.name


def _called(line: Instruction) -> list[str]:
    if line.kind or (line.op != "call" and "to_apply=" in line.rest):
        return []
    return [name for names in _CALLED.findall(line.rest) for name in re.findall(r"[\w.\-]+", names)]


def trip_count(loop: Instruction, module: Module) -> tuple[int, bool]:
    """(how often a while loop runs, whether that is certain): what XLA notes of it (known_trip_count), or else the
    constant that its condition compares the counter with, or 1. Counters are taken to go from 0 by 1, which windowed
    products ("collective matmul") break."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1]), True
    condition = re.search(r"condition=%?([^\s,)]+)", loop.rest)
    lines = {line.name: line for line in module.bodies.get(condition[1], ())} if condition else {}
    for line in lines.values():
        if line.op == "compare" and re.search(r"direction=(LT|GT)", line.rest):
            for operand in re.findall(r"%([^\s,)]+)", line.rest.partition(")")[0]):
                constant = lines.get(operand)
                if constant is not None and constant.op == "constant":
                    number = re.match(r"(\d+)\)", constant.rest)
                    return int(number[1]) if number else 1, False
    return 1, False


def array_bytes(type_text: str) -> list[int]:
    """Bytes of each array that a type names, without padding: bf16[4,8]{1,0} is 64."""
    return [math.prod(int(n.strip(" <=")) for n in shape.split(",") if n.strip()) * (
        BITS[dtype] if dtype in BITS else int(re.match(r"[a-z](\d+)", dtype)[1])) // 8
        for dtype, shape in _ARRAY.findall(type_text)]


# ---- who takes part ------------------------------------------------------------------------------------


def groups_of(rest: str, devices: int) -> np.ndarray:
    """int [groups, devices of a group]; of a permutation [pairs, 2]. Where none is said, all devices are one group."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        pairs = re.findall(r"\{(\d+),(\d+)\}", found[1])
        return np.array(pairs, int) if pairs else np.zeros((1, 2), int)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, order, turn = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        ids = np.arange(math.prod(order)).reshape(order)
        return (ids.transpose(turn) if turn else ids).reshape(shape)
    if (found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", rest)):
        groups = [[int(n) for n in part.split(",") if n] for part in re.findall(r"\{([\d,]*)\}", found[1])]
        return np.array(groups, int)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
                          r"\{([^}]*)\}", rest):
        return _mesh_groups(*found.groups())
    return np.arange(max(devices, 1))[None]


def _mesh_groups(mesh: str, order: str | None, turn: str | None, axes: str) -> np.ndarray:
    """Groups along axes of a mesh that the text names: 'a'=2,'b'=4, then 'a', or 'b':(2)2, the part of size 2 of b that
    has a factor 2 before it."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        ids = ids.reshape([int(n) for n in order.split(",")])
        ids = (ids.transpose([int(n) for n in turn.split(",")]) if turn else ids).reshape(-1)
    parts = {name: [(1, size)] for name, size in sizes.items()}  # name -> (factor before, size) of each part
    inside = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        first, wide = (int(before), int(size)) if before else (1, sizes[name])
        inside.append((name, first))
        edges = sorted({edge for b, s in parts[name] for edge in (b, b * s)} | {first, first * wide})
        parts[name] = [(low, high // low) for low, high in zip(edges, edges[1:], strict=False)] or [(1, 1)]
    flat = [(name, before, size) for name in sizes for before, size in parts[name]]
    chosen = [i for i, (name, before, size) in enumerate(flat) if (name, before) in inside]
    others = [i for i in range(len(flat)) if i not in chosen]
    group = math.prod(flat[i][2] for i in chosen)
    return ids.reshape([size for *_, size in flat]).transpose(*others, *chosen).reshape(-1, group)


def axes_along(groups: np.ndarray, mesh: Mapping[str, int] | None) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    if not mesh or groups.max() >= math.prod(mesh.values()):
        return ()
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)
