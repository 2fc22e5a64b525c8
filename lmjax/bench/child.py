"""The child's side of a benchmark: be ready, run rounds when told, say what they took.

    def prepare(session):
        import torch
        session.imported()                  # from here on, memory is the contender's own
        …                                   # build, compile, warm up
        session.facts["torch"] = torch.__version__
        def run(steps): …                   # returns a dict of facts; everything is done when it returns
        return run

    serve(prepare)

One line of JSON in, {"steps": n}; one step that is not counted, then n; one line of JSON out. Standard library
only, so that any interpreter can be a contender. What contenders print goes to stderr: stdout carries the protocol
alone. The parent's side is `rounds`.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

Run = Callable[[int], dict[str, Any]]
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def peak_rss() -> int:
    """The most bytes of memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT


class Session:
    """What a contender tells about itself. facts: for the ready line. last: makes more of them for the end."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.last: Callable[[], dict[str, Any]] = dict
        self.imported()

    def imported(self) -> None:
        """Call once everything is imported and nothing is built yet."""
        self.import_rss, self.import_cpu_seconds = peak_rss(), time.process_time()


def serve(prepare: Callable[[Session], Run]) -> None:
    """Runs a contender until stdin ends. A package that is missing, or any other error, becomes one line."""
    die_with_parent()
    out = _claim_stdout()
    session = Session()
    try:
        run = prepare(session)
    except ImportError as error:
        _say(out, error=str(error), missing=error.name or "a package")
        return
    except Exception as error:
        traceback.print_exc()
        _say(out, error=f"{type(error).__name__}: {error}".splitlines()[0])
        return
    _say(out, ready=True, import_rss=session.import_rss, import_cpu_seconds=session.import_cpu_seconds,
         start_cpu_seconds=time.process_time(), facts=session.facts)
    before = time.process_time()
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        idle = time.process_time() - before
        try:
            run(1)  # not counted: while others had their turn, this one's memory and caches went to them
            wall, cpu = time.perf_counter(), time.process_time()
            extra = run(steps)
        except Exception as error:
            traceback.print_exc()
            _say(out, error=f"{type(error).__name__}: {error}".splitlines()[0])
            return
        before = time.process_time()
        _say(out, seconds=time.perf_counter() - wall, cpu_seconds=before - cpu, idle_cpu_seconds=idle,
             steps=steps, **extra)
    _say(out, end=True, peak_rss=peak_rss(), **session.last())


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends, however that ends. Elsewhere the end of stdin has to
    do: it is seen after the round that is running."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it went while we asked
            os._exit(1)


def _claim_stdout() -> TextIO:
    """The real stdout for the protocol alone; everything else that is printed, from C too, goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def _say(out: TextIO, **line: Any) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()
