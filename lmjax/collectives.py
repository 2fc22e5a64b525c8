"""What devices send each other in a compiled program: the collectives of an HLO text, counted and measured.

Pure text: `compiled.as_text()` of JAX, of a CPU, GPU or TPU, whole or after it was written to a file. What is said of
them elsewhere: docs/scale.md, and tests/goldens/collectives.json, which holds those of the train step.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
         "ragged-all-to-all")
BITS = {"pred": 8, "bf16": 16, "token": 0}  # others end with their bits: f32, s8, u4, f8e4m3fn

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<result>\(.*?\)|\S+) (?P<op>[a-z][\w\-]*)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*\) -> .*)?\{$")
_ARRAY = re.compile(r"\b(pred|token|bf16|[a-z]\d+(?:e\d+m\d+\w*)?|c64|c128)\[([\d,<= ]*)\]")
_CALLED = re.compile(r"\b(to_apply|calls|body|condition|true_computation|false_computation|called_computations|"
                     r"branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, or several that are alike.

    bytes: of the larger of what goes in and what comes out on one device, once. group: devices that take part
    together. axes: the mesh axes that a group runs along; () where no mesh was given. count: how
    often it runs in one call of the program; exact: False where a loop around it has no known number of turns, and one
    was taken.
    """

    kind: str
    bytes: int
    group: int
    axes: tuple[str, ...]
    count: int
    exact: bool = True

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in all of its runs, by the ring algorithms: with g devices and n bytes, 2 n
        (g - 1) / g for an all-reduce, n (g - 1) / g where data are gathered, scattered or exchanged, n for a
        permutation."""
        share = (self.group - 1) / max(self.group, 1)
        times = {"all-reduce": 2 * share, "collective-permute": float(self.group > 1)}.get(self.kind, share)
        return self.count * self.bytes * times


def collectives(hlo: str, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """Every collective between devices that a call of the program runs; alike ones together, by name and bytes.

    hlo: the text of a compiled module. mesh: {axis: size}, outermost first, of the mesh it was compiled for. Loops
    count as often as XLA knows that they turn; of a conditional every branch counts. Raises ValueError for a text
    without an entry computation.
    """
    bodies, entry = _computations(hlo)
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation; give compiled.as_text()")
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", hlo.split("\n", 1)[0]))
    found: dict[tuple, int] = {}
    for line, times, exact in _runs(bodies, entry, 1, True):
        if record := _collective(line, mesh, devices):
            key = (*record, exact)
            found[key] = found.get(key, 0) + times
    return sorted((Collective(kind, size, group, axes, count, exact)
                   for (kind, size, group, axes, exact), count in found.items()),
                  key=lambda c: (c.kind, c.axes, -c.bytes, c.group))


def summary(records: list[Collective]) -> dict[str, dict[str, int]]:
    """{"kind over axis+axis": {"count": runs, "bytes": bytes x runs}}, for goldens and tables."""
    found: dict[str, dict[str, int]] = {}
    for c in records:
        entry = found.setdefault(f"{c.kind} over {'+'.join(c.axes) or 'nothing'}", {"count": 0, "bytes": 0})
        entry["count"] += c.count
        entry["bytes"] += c.count * c.bytes
    return dict(sorted(found.items()))


def differences(before: Mapping[str, dict], after: Mapping[str, dict]) -> list[str]:
    """One line for each collective of two summaries that is not the same."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        was, now = (side.get(name, {"count": 0, "bytes": 0}) for side in (before, after))
        if was != now:
            lines.append(f"{name}: {was['count']} times, {was['bytes']:,} bytes -> {now['count']} times, "
                         f"{now['bytes']:,} bytes")
    return lines


# ---- reading the text ----------------------------------------------------------------------------------


def _computations(hlo: str) -> tuple[dict[str, list[str]], str | None]:
    """({name: lines of its instructions}, name of the entry)."""
    bodies: dict[str, list[str]] = {}
    entry, lines = None, None
    for line in hlo.splitlines():
        if line[:1] not in (" ", "\t", "}", "") and (head := _COMPUTATION.match(line.rstrip())):
            lines = bodies.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies, entry


def _runs(bodies: dict[str, list[str]], name: str, times: int, exact: bool) -> Iterator[tuple[re.Match, int, bool]]:
    """(instruction, how often it runs, whether that is certain) below a computation."""
    for line in bodies.get(name, ()):
        if not (match := _INSTRUCTION.match(line)):
            continue
        yield match, times, exact
        op, rest = match["op"], match["rest"]
        if op.removesuffix("-start") in KINDS or op.removesuffix("-done") in KINDS:
            continue  # what it applies is the sum of two numbers
        turns = _TRIPS.search(rest) if op == "while" else None
        inner, sure = (times * int(turns[1]), exact) if turns else (times, exact and op != "while")
        for _, names in _CALLED.findall(rest):
            for called in re.findall(r"[\w.\-]+", names):
                yield from _runs(bodies, called, inner, sure)


def _collective(match: re.Match, mesh: Mapping[str, int] | None,
                devices: int) -> tuple[str, int, int, tuple[str, ...]] | None:
    """(kind, bytes, group, axes) of an instruction; None where it sends nothing, as the end of an asynchronous pair."""
    kind = match["op"].removesuffix("-start")
    if kind not in KINDS:
        return None
    rest = match["rest"]
    groups = groups_of(rest, devices)
    group = groups.shape[1] if kind != "collective-permute" else 2
    if group == 1 or (kind == "collective-permute" and (groups[:, 0] == groups[:, 1]).all()):
        return None
    sizes = [_bytes(dtype, shape) for dtype, shape in _ARRAY.findall(match["result"])]
    total = sum(sizes)
    if match["op"].endswith("-start") and match["result"].startswith("("):
        # (operands, results, …): gathered results are `group` times the operands, the others as large as them
        if kind == "all-gather":
            total = total * group // (group + 1)
        elif kind == "collective-permute":
            total = max(sizes)
    if kind == "reduce-scatter":
        total *= group
    return kind, total, group, axes_along(groups, mesh)


def _bytes(dtype: str, shape: str) -> int:
    bits = BITS.get(dtype) if dtype in BITS else int(re.match(r"[a-z](\d+)", dtype)[1])
    return math.prod(int(n.strip(" <=")) for n in shape.split(",") if n.strip()) * bits // 8


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
