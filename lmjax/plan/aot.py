"""Asks a child process to compile the train step for a machine that is not there, and waits, in bounded time.

What lives here: starting it, its progress, its limit, and its failures in words: what the compiler says when the step
does not fit becomes what is too large, by how much, and what to change. What does not: the compiling (`child`), or what
its figures mean (`page`). Nothing here imports jax.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lmjax.errors import ConfigError
from lmjax.plan import gpus
from lmjax.plan.hlo import Program, read_program
from lmjax.plan.machine import Machine

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
INSTALL = "pip install 'lmjax[tpu]'"
CUDA = "pip install jax-cuda13-plugin jax-cuda13-pjrt, of jax's version; no NVIDIA library is needed"
# Without the last, a second process that compiles at the same time fails on libtpu's lock.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes of one device; `new` are outputs that do not take the place of an argument. cpu_seconds: of the child."""

    mesh: dict[str, int]
    argument: int
    temp: int
    new: int
    code: int
    cpu_seconds: float
    program: Program

    @property
    def total(self) -> int:
        return self.argument + self.temp + self.new + self.code


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A step that does not fit. used, limit: bytes of one chip, None where the compiler does not say. largest: its
    largest allocations, (bytes, shape, operation)."""

    used: int | None
    limit: int | None
    largest: tuple[tuple[int, str, str], ...] = ()


def missing(machine: Machine) -> str:
    """Why nothing can be compiled for a machine here; "" if it can."""
    if machine.chip.kind == "gpu":
        return "" if importlib.util.find_spec("jax_cuda13_plugin") else f"JAX's CUDA plug-in is not installed ({CUDA})"
    if machine.name == "v4":
        return "libtpu describes a v4 chip as two devices, which is not how one trains on it"
    return "" if importlib.util.find_spec("libtpu") else f"libtpu is not installed ({INSTALL})"


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)", text).groups()
    return round(float(number) * UNITS.get(unit, 1))


def read_failure(text: str) -> TooLarge | None:
    """What a compiler's message says of memory; None if it is about something else."""
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    size = r"([\d.]+[KMGT]?)"
    used = re.search(rf"Used {size} of {size} hbm", text)
    if used is None:
        used = re.search(rf"\({size}\) exceeds available \w+ \({size}\)", text)
    largest = [(_bytes(m[1]), m[3].strip(), (m[2] or "").strip()) for m in re.finditer(
        rf'Size: {size}\s*\n(?:\s*Operator: op_name="([^"]*)"[^\n]*\n)?\s*Shape: ([^\n{{]*)', text)]
    return TooLarge(_bytes(used[1]) if used else None, _bytes(used[2]) if used else None, tuple(largest[:5]))


def compile_for(config: dict, machine: Machine, *, limit: float, say: Callable[[str], None]) -> Compiled | TooLarge:
    """The step of a config (its JSON form) compiled for a machine; `say` gets a line of progress now and then.

    Raises ConfigError where it takes longer than `limit` seconds, where the compiler does not know the machine, and for
    what it refuses otherwise.
    """
    shape = "x".join(map(str, machine.shape))
    asked = {"config": config, "slices": machine.slices, "topology": f"{machine.name}:{shape}", "platform": "tpu"}
    if machine.chip.kind == "gpu":
        asked |= {"topology": gpus.topology(machine), "platform": "cuda", "target": gpus.target(machine)}
    with tempfile.TemporaryDirectory(prefix="lmjax-plan-") as folder:
        asked["hlo"] = str(Path(folder) / "program.txt")
        done = _ask(asked, machine, limit, say, Path(folder) / "stderr.txt")
        if isinstance(done, TooLarge):
            return done
        program = read_program(Path(asked["hlo"]).read_text(), done["mesh"])
    return Compiled(done["mesh"], done["argument"], done["temp"], done["output"] - done["alias"],
                    done["generated_code"], done["cpu_seconds"], program)


def _ask(asked: dict, machine: Machine, limit: float, say: Callable[[str], None], errors: Path) -> dict | TooLarge:
    began, stage = time.monotonic(), "starting"
    with errors.open("wb") as stderr:
        child = subprocess.Popen([sys.executable, "-m", "lmjax.plan.child"], stdin=subprocess.PIPE, text=True,
                                 stdout=subprocess.PIPE, stderr=stderr, env=os.environ | ENVIRONMENT)
    timer = threading.Timer(limit, child.kill)
    ticker = _Ticker(lambda: say(f"{stage} … {time.monotonic() - began:.0f} s"))
    try:
        timer.start()
        ticker.start()
        child.stdin.write(json.dumps(asked) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            answer = json.loads(line)
            if "done" in answer:
                return answer["done"]
            if "error" in answer:
                return _failed(answer["error"], machine)
            stage = answer["stage"]
            say(f"{stage} … {time.monotonic() - began:.0f} s")
        child.wait()
        if time.monotonic() - began >= limit:
            raise ConfigError(f"--limit={limit:g}: the compiler was still at work ({stage}) after so many seconds; "
                              "raise it, or plan fewer different layers (a scanned model compiles one)")
        last = errors.read_text(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(f"--topology={machine}: the compiling process died with exit status {child.returncode} while "
                          f"{stage}" + (f" ({last[0][:200]})" if last else ""))
    finally:
        timer.cancel()
        ticker.stop()
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def _failed(text: str, machine: Machine) -> TooLarge:
    too_large = read_failure(text)
    if too_large is not None:
        return too_large
    first = " ".join(text.split())[:400]
    unknown = ("not found", "nvalid", "nsupported", "nknown", "recognized")
    if "opology" in text and any(word in text for word in unknown):
        raise ConfigError(f"--topology={machine}: the compiler knows no such machine ({first})")
    raise ConfigError(f"--topology={machine}: the compiler refuses this step: {first}")


class _Ticker:
    """Calls `tick` every ten seconds until it is stopped."""

    def __init__(self, tick: Callable[[], None]):
        self._tick, self._stopped = tick, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(10.0):
            self._tick()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
