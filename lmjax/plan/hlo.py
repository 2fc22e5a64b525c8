"""What a compiler wrote, as messages for the roofline, and the cycles that a TPU's compiler expects.

What lives here: counting, over the walk of `lmjax.hlo`, which knows loops and who takes part in a collective. What does
not: seconds (`lmjax.plan.roofline`), or the collectives of any program with their exact bytes (`lmjax.collectives`).
Nothing here imports jax.
"""

import dataclasses
import math
import re

import numpy as np

from lmjax import hlo
from lmjax.hlo import Instruction, Run, fold, read, sent
from lmjax.plan.roofline import Message


@dataclasses.dataclass
class Program:
    """collectives: one Message a kind, axis and size. cycles: of one step. kernels: custom calls by target, with how
    often each runs; a compiler knows no cycles of those."""

    collectives: list[Message]
    cycles: float
    kernels: dict[str, float]


def groups_of(rest: str, num_devices: int) -> tuple[int, ...]:
    """The devices of the first group, in the order of the mesh."""
    groups = hlo.groups_of(rest, num_devices)
    if "source_target_pairs" in rest:
        groups = groups[groups[:, 0] != groups[:, 1]] if (groups[:, 0] != groups[:, 1]).any() else groups
    return tuple(int(device) for device in groups[0])  # a pair may have sent to itself


def axes_of(group: tuple[int, ...], mesh: dict[str, int]) -> str:
    """The mesh axes along which a group's devices differ, such as "data + fsdp"; the last axis varies fastest."""
    return " + ".join(hlo.axes_along(np.array([group]), mesh)) or "none"


def whole_bytes(line: Instruction, kind: str, group: int) -> float:
    """Bytes of the whole array of a collective (lmjax.plan.roofline's V) from its result's type."""
    total = sum(hlo.array_bytes(line.type))
    if line.op.endswith("-start"):  # inputs and outputs both stand in the type; of all-reduce only the latter
        total = {"all-gather": total / (1 + 1 / group), "reduce-scatter": total / (1 + group),
                 "all-reduce": total}.get(kind, total / 2)
    return total * group if kind == "reduce-scatter" else total


def read_program(text: str, mesh: dict[str, int]) -> Program:
    """mesh: axis sizes in the mesh's order."""
    num_devices = math.prod(mesh.values())
    seen: dict[tuple, Message] = {}
    kernels: dict[str, float] = {}

    def visit(run: Run, inner: list[float]) -> float:
        line, kind = run.instruction, run.instruction.kind
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
        cycles = float(estimate[1]) if estimate else 0.0
        if kind:
            group = groups_of(line.rest, num_devices)
            stride = abs(group[1] - group[0]) if len(group) > 1 else 1
            message = Message(kind, axes_of(group, mesh), whole_bytes(line, kind, len(group)), len(group),
                              max(stride, 1), run.times)
            if sent(run) not in seen or seen[sent(run)].count < run.times:
                seen[sent(run)] = message
        elif line.op == "while":
            return cycles + run.turns * sum(inner)
        elif line.op == "custom-call":
            target = re.search(r'custom_call_target="([^"]+)"', line.rest)
            if target and "tpu_custom_call" in target[1]:
                kernels[target[1]] = kernels.get(target[1], 0.0) + run.times
        if estimate or not inner:  # what was called is in the estimate
            return cycles
        return max(inner) if line.op == "conditional" else sum(inner)

    cycles = fold(read(text), visit)
    merged: dict[tuple, float] = {}
    for message in seen.values():
        key = (message.kind, message.axis, message.bytes, message.group, message.stride)
        merged[key] = merged.get(key, 0.0) + message.count
    messages = [Message(*key, count) for key, count in merged.items()]
    return Program(sorted(messages, key=lambda m: -m.bytes * m.count), cycles, kernels)
