"""Run folders, read for a report.

What lives here: the files of a run folder as one `Run`, and what differs between the configs of several. What
does not: the record format and the summary (`lmjax.records`), or anything of HTML (`lmjax.report.page`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.errors import CheckpointError
from lmjax.phases import goodput
from lmjax.records import Record, read_metrics, summary


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    name: str
    records: list[Record]
    summary: Record
    config: dict[str, Any]  # dotted name -> value
    environment: dict[str, Any]

    def rows(self, kind: str) -> list[Record]:
        """Records of a kind by step; where a step was recorded twice, the later one."""
        by_step = {(r.get("split"), r.get("prompt"), r["step"]): r for r in self.records if r["kind"] == kind}
        return sorted(by_step.values(), key=lambda r: r["step"])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read as JSON ({e}); restore it or delete it") from None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: holds a {type(found).__name__}, not an object; restore it or delete it"
        )
    return found


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """A nested dict (or list of dicts) with dotted names, such as `data.sources.0.kind`."""
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        value = {str(i): v for i, v in enumerate(value)}
    if not isinstance(value, dict) or (not value and name):
        return {name: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flatten(inner, f"{name}.{key}" if name else str(key))
    return out


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`. Raises CheckpointError for a folder that is missing, damaged or not a run's."""
    names = [f.resolve().name for f in folders]
    if len(set(names)) < len(names):  # a/run and b/run
        names = [str(f) for f in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        records = read_metrics(folder)
        config, environment = (_read_json(folder / f) for f in ("config.json", "environment.json"))
        told = summary(records, folder, times=goodput(folder))
        runs.append(Run(name, records, told, _flatten(config), _flatten(environment)))
    return runs


def differing(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The dotted names whose values differ between configs, each with its values; missing ones are None."""
    names = dict.fromkeys(name for c in configs for name in c)
    table = {name: [c.get(name) for c in configs] for name in names}
    # Compared as JSON, since 1 == 1.0 == True in Python but not in a config.
    return {k: v for k, v in table.items() if len({json.dumps(x, sort_keys=True) for x in v}) > 1}
