"""What a compiler wrote, read back from a program's text: collectives, and the cycles that a TPU's compiler expects.

What lives here: parsing, with loop bodies counted as often as they run. What does not: seconds (`lmjax.plan.roofline`),
and who takes part in a collective (`lmjax.collectives`, which counts those of any program, without a TPU's cycles).
Nothing here imports jax.

A loop's trip count is what XLA notes of it (known_trip_count), or else the constant that its condition compares the
counter with; counters are taken to go from 0 by 1, which windowed products ("collective matmul") break. A collective
that TPUs run beside a product stands in the text several times, as start, middle and end, with one channel: it is
counted once.
"""

import dataclasses
import math
import re

import numpy as np

from lmjax import collectives
from lmjax.collectives import KINDS
from lmjax.plan.roofline import Message

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "bf16": 16,
        "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([^\s,)}]+)")


@dataclasses.dataclass
class Instruction:
    name: str
    type: str
    op: str
    rest: str


@dataclasses.dataclass
class Program:
    """collectives: one Message a kind, axis and size. cycles: of one step. kernels: custom calls by target, with how
    often each runs; a compiler knows no cycles of those."""

    collectives: list[Message]
    cycles: float
    kernels: dict[str, float]


def array_bytes(type_text: str) -> int:
    """Bytes of all arrays that a type names, without padding: bf16[4,8]{1,0} is 64."""
    return sum(math.prod(int(d) for d in dims.split(",") if d) * BITS.get(kind, 0) // 8
               for kind, dims in _SHAPE.findall(type_text))


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({name: instructions}, name of the entry). Kernels' source may stand between instructions, over many lines."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            current.append(Instruction(*match.groups()))
    return found, entry


def trip_count(loop: Instruction, parts: dict[str, list[Instruction]]) -> int:
    """How often a while loop runs; 1 where it cannot be told."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([^\s,)]+)", loop.rest)
    lines = {i.name: i for i in parts.get(condition[1], [])} if condition else {}
    for line in lines.values():
        direction = re.search(r"direction=(LT|GT)", line.rest)
        if line.op == "compare" and direction:
            for operand in re.findall(r"%([^\s,)]+)", line.rest.partition(")")[0]):
                constant = lines.get(operand)
                if constant is not None and constant.op == "constant":
                    number = re.match(r"(\d+)\)", constant.rest)
                    return int(number[1]) if number else 1
    return 1


def groups_of(rest: str, num_devices: int) -> tuple[int, ...]:
    """The devices of the first group, in the order of the mesh."""
    groups = collectives.groups_of(rest, num_devices)
    if "source_target_pairs" in rest:
        groups = groups[groups[:, 0] != groups[:, 1]] if (groups[:, 0] != groups[:, 1]).any() else groups
    return tuple(int(device) for device in groups[0])  # a pair may have sent to itself


def axes_of(group: tuple[int, ...], mesh: dict[str, int]) -> str:
    """The mesh axes along which a group's devices differ, such as "data + fsdp"; the last axis varies fastest."""
    return " + ".join(collectives.axes_along(np.array([group]), mesh)) or "none"


def whole_bytes(line: Instruction, kind: str, group: int) -> float:
    """Bytes of the whole array of a collective (lmjax.plan.roofline's V) from its result's type."""
    total = array_bytes(line.type)
    if line.op.endswith("-start"):  # inputs and outputs both stand in the type; of all-reduce only the latter
        total = {"all-gather": total / (1 + 1 / group), "reduce-scatter": total / (1 + group),
                 "all-reduce": total}.get(kind, total / 2)
    return total * group if kind == "reduce-scatter" else total


def read_program(text: str, mesh: dict[str, int]) -> Program:
    """mesh: axis sizes in the mesh's order."""
    parts, entry = computations(text)
    num_devices = math.prod(mesh.values())
    seen: dict[tuple, tuple[Message, float]] = {}
    kernels: dict[str, float] = {}

    def visit(name: str, times: float, owner: str) -> float:
        cycles = 0.0
        for line in parts.get(name, []):
            kind = line.op.removesuffix("-start")
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
            if estimate:
                cycles += int(estimate[1])
            if kind in KINDS:
                group = groups_of(line.rest, num_devices)
                stride = abs(group[1] - group[0]) if len(group) > 1 else 1
                channel = re.search(r"channel_id=(\d+)", line.rest)
                message = Message(kind, axes_of(group, mesh), whole_bytes(line, kind, len(group)), len(group),
                                  max(stride, 1), times)
                key = (kind, owner, channel[1] if channel else line.name)
                if key not in seen or seen[key].count < times:
                    seen[key] = message
            elif line.op == "while":
                trips = trip_count(line, parts)
                body = re.search(r"body=%?([^\s,)]+)", line.rest)[1]
                cycles += trips * visit(body, times * trips, body)
            elif line.op == "custom-call":
                target = re.search(r'custom_call_target="([^"]+)"', line.rest)
                if target and "tpu_custom_call" in target[1]:
                    kernels[target[1]] = kernels.get(target[1], 0.0) + times
            elif line.op in ("fusion", "call", "conditional", "async-start"):
                called = _CALLED.findall(line.rest)
                if branches := re.search(r"branch_computations=\{([^}]*)\}", line.rest):
                    called += re.findall(r"%?([^\s,]+)", branches[1])
                inner = [visit(c, times, owner if line.op != "call" else c) for c in called]
                if not estimate and inner:
                    cycles += max(inner) if line.op == "conditional" else sum(inner)
        return cycles

    total = visit(entry, 1.0, entry)
    merged: dict[tuple, float] = {}
    for message in seen.values():
        key = (message.kind, message.axis, message.bytes, message.group, message.stride)
        merged[key] = merged.get(key, 0.0) + message.count
    messages = [Message(*key, count) for key, count in merged.items()]
    return Program(sorted(messages, key=lambda m: -m.bytes * m.count), total, kernels)
