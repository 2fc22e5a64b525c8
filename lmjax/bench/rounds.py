"""Rounds by turns: A B C A B C …, each contender a process of its own, so that a noisy machine does not decide.

Every child builds and warms up once, one after another; then each runs one round in turn, and ratios are taken
within a round, between two measurements that are neighbours in time. What is reported of a ratio is the median over
rounds and its quartiles. A contender that cannot start, or dies, is reported as such and does not end the others.
The child's side of the protocol is `child`.
"""

import json
import os
import queue
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT = 1800.0  # seconds: torch.compile of a large model takes minutes
ROUND_LIMIT = 1800.0


@dataclass(frozen=True)
class Contender:
    """command: argv of a process that calls `child.serve`. install: how to get what it needs."""

    name: str
    command: tuple[str, ...]
    install: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What a contender has said. rounds: one dict each, with seconds, cpu_seconds, steps and its own facts.
    failed: why there are no (more) rounds, or ""."""

    name: str
    ready: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    install: str = ""


class _Failed(Exception):
    """A contender is out; the message says why, for a person."""


class _Child:
    """One contender's process. Ctrl-C reaches the parent only, which ends its children in `kill`."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._errors = tempfile.TemporaryFile()
        env = os.environ | contender.env
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(contender.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=self._errors, env=env, text=True, start_new_session=True)
        except OSError as error:
            self._errors.close()
            raise _Failed(f"{contender.command[0]}: {error.strerror}") from None
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def hear(self, limit: float) -> dict[str, Any]:
        """The next line. Raises _Failed: it reports an error, is silent for `limit` seconds, or is gone."""
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            raise _Failed(f"said nothing for {limit:.0f} s") from None
        if line is None:
            raise _Failed(f"ended with exit code {self._process.wait()}: {self._last_words()}")
        try:
            said = json.loads(line)
        except json.JSONDecodeError:
            raise _Failed(f"broke the protocol with {line[:80]!r}") from None
        if "error" in said:
            missing = said.get("missing")
            raise _Failed(f"{missing} is not installed ({said['error']})" if missing else said["error"])
        return said

    def run(self, steps: int, limit: float) -> dict[str, Any]:
        """One round."""
        try:
            self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone; `hear` says how
        return self.hear(limit)

    def finish(self, limit: float) -> dict[str, Any]:
        """Ends the child politely and returns its last line."""
        self._process.stdin.close()
        return self.hear(limit)

    def kill(self) -> None:
        """Ends the child and whatever it has started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except OSError:
            pass
        self._process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else "it said nothing"


def run_rounds(contenders: Sequence[Contender], rounds: int, steps: int, *, alternate: bool = True,
               say: Callable[[str], None] = print) -> dict[str, Result]:
    """{name: Result} of every contender, failed ones too, in the given order.

    alternate False runs each to its end before the next one starts, where two do not fit into memory at once;
    rounds of one number are then not neighbours in time.
    """
    results = {c.name: Result(c.name, install=c.install) for c in contenders}
    groups = [list(contenders)] if alternate else [[c] for c in contenders]
    for group in groups:
        _run_group(group, rounds, steps, results, say)
    return results


def _run_group(contenders: list[Contender], rounds: int, steps: int, results: dict[str, Result],
               say: Callable[[str], None]) -> None:
    children: dict[str, _Child] = {}

    def guarded(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except _Failed as failure:
            results[name].failed = str(failure)
            if name in children:
                children.pop(name).kill()
            say(f"  {name}: {failure}")

    def start(contender: Contender) -> None:
        child = children[contender.name] = _Child(contender)
        began = time.perf_counter()
        ready = results[contender.name].ready = child.hear(START_LIMIT)
        ready["start_seconds"] = time.perf_counter() - began
        say(f"  {contender.name}: ready after {ready['start_seconds']:.1f} s")

    def one_round(name: str) -> None:
        said = children[name].run(steps, ROUND_LIMIT)
        results[name].rounds.append(said)

    def finish(name: str) -> None:
        results[name].end = children[name].finish(ROUND_LIMIT)

    try:
        for contender in contenders:
            guarded(contender.name, lambda c=contender: start(c))
        for number in range(rounds):
            for name in list(children):
                guarded(name, lambda n=name: one_round(n))
            took = (f"{r.name} {1e3 * last['seconds'] / last['steps']:,.1f}" for r in results.values()
                    if r.name in children for last in r.rounds[-1:])
            say(f"  round {number + 1}/{rounds}, ms a step: {'  '.join(took)}")
        for name in list(children):
            guarded(name, lambda n=name: finish(n))
    finally:
        for child in children.values():
            child.kill()


# ---- figures -------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"median", "q1", "q3", "min"} of at least one value; quartiles include the ends, as few rounds need."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": q1, "q3": q3, "min": min(values)}


def figures(result: Result) -> dict[str, Any]:
    """What the JSON line says of a contender: seconds and CPU-seconds of a step, memory in bytes, its own facts."""
    facts = dict(result.ready.get("facts", {}))
    if result.failed:
        return {"failed": result.failed, **({"install": result.install} if result.install else {}), **facts}
    per_step = {"seconds": [r["seconds"] / r["steps"] for r in result.rounds],
                "cpu_seconds": [r["cpu_seconds"] / r["steps"] for r in result.rounds]}
    out: dict[str, Any] = {name: spread(values) for name, values in per_step.items()}
    out |= {"rounds": len(result.rounds), "peak_rss": result.end["peak_rss"],
            **{key: result.ready[key] for key in ("import_rss", "import_cpu_seconds", "start_seconds",
                                                  "start_cpu_seconds")},
            "idle_cpu_seconds": sum(r["idle_cpu_seconds"] for r in result.rounds)}
    end = {k: v for k, v in result.end.items() if k not in ("end", "peak_rss")}
    known = ("seconds", "cpu_seconds", "idle_cpu_seconds", "steps")
    last = {k: v for k, v in result.rounds[-1].items() if k not in known} if result.rounds else {}
    return out | facts | last | end


def ratios(results: dict[str, Result], ours: str) -> dict[str, dict[str, Any]]:
    """{peer: {"wall", "cpu"}}: the peer's time over ours, round by round; above 1 we are the quicker ones."""
    base = results[ours]
    out = {}
    for name, result in results.items():
        pairs = list(_pairs(base, result))
        if name == ours or base.failed or result.failed or not pairs:
            continue
        out[name] = {kind: spread([theirs[key] / max(mine[key], 1e-9) for mine, theirs in pairs])
                     for kind, key in (("wall", "seconds"), ("cpu", "cpu_seconds"))}
    return out


def _pairs(a: Result, b: Result) -> Iterator[tuple[dict, dict]]:
    """The rounds of one number. Both ran the same steps."""
    return zip(a.rounds, b.rounds, strict=False)

