"""What devices send each other in a compiled program: the collectives of an HLO text, counted and measured.

Pure text: `compiled.as_text()` of JAX, of a CPU, GPU or TPU, whole or after it was written to a file, walked by
`lmjax.hlo`. What is said of them elsewhere: docs/scale.md, and tests/goldens/collectives.json, which holds those of the
train step.
"""

import dataclasses
from collections.abc import Mapping

from lmjax.hlo import Run, array_bytes, axes_along, fold, groups_of, read, sent


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
    count as often as XLA knows that they turn, else as their condition says, not `exact`; of a conditional every branch
    counts. Raises ValueError for a text without an entry computation.
    """
    module = read(hlo)
    each: dict[tuple, tuple[int, tuple]] = {}

    def visit(run: Run, inner: list[float]) -> float:
        record = _collective(run, mesh, module.devices)
        if record and (sent(run) not in each or each[sent(run)][0] < run.times):
            each[sent(run)] = run.times, (*record, run.exact)
        return 0.0

    fold(module, visit)
    found: dict[tuple, int] = {}
    for times, key in each.values():
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


def _collective(run: Run, mesh: Mapping[str, int] | None,
                devices: int) -> tuple[str, int, int, tuple[str, ...]] | None:
    """(kind, bytes, group, axes) of an instruction; None where it sends nothing, as the end of an asynchronous pair."""
    line, kind = run.instruction, run.instruction.kind
    if kind is None:
        return None
    groups = groups_of(line.rest, devices)
    group = groups.shape[1] if kind != "collective-permute" else 2
    if group == 1 or (kind == "collective-permute" and (groups[:, 0] == groups[:, 1]).all()):
        return None
    sizes = array_bytes(line.type)
    total = sum(sizes)
    if line.op.endswith("-start") and line.type.startswith("("):
        # (operands, results, …): gathered results are `group` times the operands, the others as large as them
        if kind == "all-gather":
            total = total * group // (group + 1)
        elif kind == "collective-permute":
            total = max(sizes)
    if kind == "reduce-scatter":
        total *= group
    return kind, total, group, axes_along(groups, mesh)
