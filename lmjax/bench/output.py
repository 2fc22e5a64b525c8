"""What every benchmark prints: a table for people, then one line of JSON with everything, and the machine it was.

Nothing here measures. Reading the machine costs no import of JAX.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("lmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def machine() -> dict[str, Any]:
    """Cores that this process may use, the processor's name, the load before we began, memory in bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": cores, "cpu": _cpu_name(), "system": platform.platform(),
            "load_average": [round(x, 2) for x in os.getloadavg()], "niceness": os.nice(0), **_memory()}


def versions() -> dict[str, str]:
    """Python and our packages; contenders tell their own."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> dict[str, int]:
    try:
        return {"memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    except (ValueError, OSError):
        return {}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w)
                               for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in rows)


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def between(value: dict[str, float], digits: int = 2) -> str:
    """'1.23 (1.20-1.31)': a median with its quartiles."""
    return f"{value['median']:,.{digits}f} ({value['q1']:,.{digits}f}-{value['q3']:,.{digits}f})"


def say(text: str) -> None:
    """A line that is seen at once, also in a pipe."""
    print(text, flush=True)


def finish(command: str, settings: dict[str, Any], where: dict[str, Any], **result: Any) -> None:
    """The last line of stdout: everything, as one JSON object. `where` is `machine()` from before the work."""
    print(json.dumps({"bench": command, "settings": settings, "versions": versions(), "machine": where, **result}),
          flush=True)
