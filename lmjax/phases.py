"""What a run is doing, for how long, and for how long it may: the account of its time, and the watchdog.

Every second of a process belongs to one phase. A phase that takes longer than its limit is stuck (a hung peer, a
mount that has vanished, a data worker that never answers), and then nobody else will end it: its name and the stacks
of all threads are printed and kept in RUN/stuck-<pid>.txt, and the process ends with exit code 6.

The account goes to RUN/time.jsonl, one line every few seconds, so that a killed process has told nearly all of its
time; `goodput` turns the lines of all attempts into one table. Nothing here imports jax.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lmjax.errors import STUCK

GRACE = 3.0  # seconds after a limit at which a process whose Python cannot run any more is ended all the same
LINE_EVERY = 5.0  # seconds between lines of the account


@dataclasses.dataclass
class LimitsConfig:
    """Seconds after which a phase counts as stuck and ends the process, with every thread's stack; 0: never.

    connect: processes finding each other. compile: of the train step. data: one wait for a batch. step: one wait for
    a step's results. evaluate: one evaluation with its samples. save: starting a checkpoint, or waiting for the last.
    restore: verifying and reading a checkpoint.
    """

    connect: float = 300.0
    compile: float = 3600.0
    data: float = 600.0
    step: float = 600.0
    evaluate: float = 7200.0
    save: float = 1800.0
    restore: float = 3600.0

    def problems(self, prefix: str = "limits") -> list[str]:
        return [f"{prefix}.{f.name}={getattr(self, f.name)}: seconds, at least 1, or 0 for no limit"
                for f in dataclasses.fields(self)
                if not (getattr(self, f.name) == 0 or getattr(self, f.name) >= 1)]


class Phases:
    """The one clock of a run. Use as a context manager; inside it, `with phases("save"):`. Phases nest: the inner one
    gets the time, and its own limit counts."""

    used = False  # the time since the process began belongs to the first run in it

    def __init__(self, limits: LimitsConfig | None = None):
        self.limits = limits or LimitsConfig()
        self.seconds: dict[str, float] = {}
        self.folder: Path | None = None  # None until the run's folder is open
        self._accounts = False
        self.step = self.first = 0
        self._began = process_began() if not Phases.used else time.time()
        Phases.used = True
        self._stack: list[tuple[str, float | None]] = [("start", None)]  # (phase, deadline)
        self._since = time.monotonic() - (time.time() - self._began)
        self._lock = threading.Lock()
        self._armed = 0.0
        self._written = 0.0
        self._over = threading.Event()

    def __enter__(self) -> "Phases":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self.write(force=True)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        limit = getattr(self.limits, name, 0.0)
        self._switch(lambda: self._stack.append((name, time.monotonic() + limit if limit else None)))
        try:
            yield
        finally:
            self._switch(self._stack.pop)

    def account(self, step: int) -> None:
        """From now on the account goes to the folder: this attempt continues the run from `step`."""
        self.first = self.step = step
        self._accounts = True

    def each(self, name: str, things: Iterable) -> Iterator:
        """The things, with the waiting for each of them in a phase."""
        iterator, end = iter(things), object()
        while True:
            with self(name):
                thing = next(iterator, end)
            if thing is end:
                return
            yield thing

    def _switch(self, change: Callable[[], object]) -> None:
        with self._lock:
            now = time.monotonic()
            name = self._stack[-1][0]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self._since = now
            change()
            self._arm(now)

    def _arm(self, now: float) -> None:
        """A second watchdog, in C, for a process in which no Python runs any more: it needs no interpreter lock.

        Re-armed at most once a second, since that starts a thread.
        """
        deadline = self._stack[-1][1]
        if deadline is None:
            if self._armed:
                faulthandler.cancel_dump_traceback_later()
                self._armed = 0.0
        elif not self._armed or abs(deadline - self._armed) > 1:
            with contextlib.suppress(RuntimeError):  # no thread can be started: the other watchdog has to do
                faulthandler.dump_traceback_later(max(deadline - now, 0) + GRACE, exit=True, file=2)
            self._armed = deadline

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            name, deadline = self._stack[-1]
            if deadline is not None and time.monotonic() > deadline:
                self._end(name)
            with contextlib.suppress(Exception):  # no memory, say: the watchdog must outlive everything else
                self.write()

    def _end(self, name: str) -> None:
        limit = getattr(self.limits, name)
        text = (f"lmjax: stuck: the phase '{name}' takes longer than limits.{name}={limit:g} seconds, at step "
                f"{self.step}; this process ends, and the same command continues from the newest checkpoint\n")
        try:
            self._dump(os.dup(2), text)
            if self.folder is not None:  # it may be on the very mount that hangs, so it is not waited for
                path = self.folder / f"stuck-{os.getpid()}.txt"
                keep = threading.Thread(target=self._dump, args=(path, text), daemon=True)
                keep.start()
                keep.join(1.0)
        finally:  # also where no thread can be started any more
            os._exit(STUCK)

    @staticmethod
    def _dump(where: Path | int, text: str) -> None:
        with contextlib.suppress(OSError, ValueError), open(where, "w") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    # ---- the account -----------------------------------------------------------------------------------

    def write(self, force: bool = False) -> None:
        """Appends a line to time.jsonl when one is due. Never raises: a full disk must not end a run here."""
        now = time.monotonic()
        if not self._accounts or (not force and now - self._written < LINE_EVERY):
            return
        with self._lock:
            self._written = now
            seconds = dict(self.seconds)
            name = self._stack[-1][0]
            seconds[name] = seconds.get(name, 0.0) + now - self._since
        line = {"began": round(self._began, 3), "now": round(time.time(), 3), "first": self.first, "step": self.step,
                "seconds": {k: round(v, 3) for k, v in seconds.items()}}
        with contextlib.suppress(OSError), open(self.folder / "time.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def process_began() -> float:
    """Unix time at which this process started: before Python, and before it was replaced by itself."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


# ---- all attempts of a run -----------------------------------------------------------------------------


def attempts(folder: Path) -> list[dict]:
    """The last line of each attempt, oldest first; a torn line is passed over."""
    found: dict[float, dict] = {}
    try:
        lines = (folder / "time.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            found[record["began"]] = record
    return [found[began] for began in sorted(found)]


def goodput(folder: Path) -> dict[str, float]:
    """{class: seconds} of a run from its first start to its last sign of life; the sum is that whole time.

    Beside the phases: `lost`, steps that were done and, after a kill, done again; `down`, between two attempts, with
    what a killed one had not told any more. Goodput is the share of `step`.
    """
    lines = attempts(folder)
    total: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        total[name] = total.get(name, 0.0) + seconds

    for i, line in enumerate(lines):
        seconds = dict(line["seconds"])
        done = line["step"] - line["first"]
        again = max(0, line["step"] - lines[i + 1]["first"]) if i + 1 < len(lines) else 0
        if done > 0 and again:
            lost = seconds.get("step", 0.0) * min(again / done, 1.0)
            seconds["step"] = seconds.get("step", 0.0) - lost
            add("lost", lost)
        for name, value in seconds.items():
            add(name, value)
        if i + 1 < len(lines):
            add("down", max(0.0, lines[i + 1]["began"] - line["now"]))
    return total
