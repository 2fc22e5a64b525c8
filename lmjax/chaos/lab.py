"""Runs to be broken: real processes of `lmjax train` on a tiny model, their progress, and what they end with.

Every run here has the same config, so its end is known: the fingerprint of every array, and the loss and gradient norm
of every step, of a run that nobody disturbed. What lives here: starting, waiting, comparing. What does not: faults.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lmjax.checkpoint import manifest
from lmjax.errors import UserError
from lmjax.records import read_metrics

CONFIG = '''
from lmjax.config import *

def get_config():
    return RunConfig(
        run_root={root!r}, steps={steps}, batch_size=8, seq_len=32,
        model=DecoderConfig(num_layers=1, d_model=32, num_heads=2, max_seq_len=64),
        objective=PretrainConfig(GoldfishConfig("hash", k=3, context=4)),
        data=DataConfig(sources=(SourceConfig("text", {text!r}),), validation_fraction=0.2,
                        cache_dir={cache!r}, workers=1),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=5), evals=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every={every}, keep=3), log=LogConfig(every=1),
        limits=LimitsConfig(connect={connect}, compile=120, data=60, step=60, save=60, restore=60),
    )
'''
WORDS = "the a model learns what it reads and forgets what it never saw again under some loss".split()
STEPS, EVERY = 240, 12
CONNECT = 60  # seconds for processes to find each other
STEPS_OF_SEVERAL = 72  # of runs with more than one process, whose steps take longer


class Broken(AssertionError):
    """A promise that was not kept; says which."""


def expect(right: bool, what: str) -> None:
    if not right:
        raise Broken(what)


@dataclasses.dataclass
class Outcome:
    """Of one injected fault: steps that were done again, seconds from the fault to the first new step (NaN where that
    means nothing)."""

    repeated: int = 0
    recovery: float = float("nan")


class Attempt:
    """The processes of one start of a run."""

    def __init__(self, processes: Sequence[subprocess.Popen], logs: Sequence[Path], run: Path):
        self.processes, self.logs, self.run, self.began = list(processes), list(logs), run, time.monotonic()

    def alive(self) -> bool:
        return any(p.poll() is None for p in self.processes)

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.logs)

    def send(self, number: int, which: int | None = None) -> None:
        for i, process in enumerate(self.processes):
            if which in (None, i) and process.poll() is None:
                process.send_signal(number)

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit codes. Raises Broken where a process does not end in time; none is left behind."""
        until = time.monotonic() + seconds
        while self.alive() and time.monotonic() < until:
            time.sleep(0.01)
        late = [p.pid for p in self.processes if p.poll() is None]
        self.end()
        expect(not late, f"process {late} still ran {seconds:g} s later:\n{self.output()[-1500:]}")
        return [p.returncode for p in self.processes]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


class Lab:
    """A folder with a corpus, a config and runs."""

    def __init__(self, folder: Path, seed: int = 0, without: str = ""):
        self.folder, self.rng, self.without = folder, random.Random(seed), without
        self.runs = folder / "runs"
        self._ends: dict[tuple, tuple] = {}
        self._names = 0
        text = folder / "text"
        text.mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        for i in range(40):
            (text / f"{i:03}.txt").write_text(" ".join(rng.choices(WORDS, k=rng.randint(20, 120))) + ".\n")
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG.format(root=str(self.runs), text=str(text), cache=str(folder / "data"),
                                             steps=STEPS, every=EVERY, connect=CONNECT))

    # ---- starting --------------------------------------------------------------------------------------

    def name(self) -> str:
        self._names += 1
        return f"run{self._names}"

    def start(self, name: str, *overrides: str, processes: int = 1, devices: int = 2, fault: str = "",
              faulty: int | None = None, environment: dict | None = None,
              each: Callable[[int], Sequence[str]] = lambda _: ()) -> Attempt:
        """`lmjax train` in `processes` processes that share `devices` devices. fault: for `child`, in every process or
        in the one that `faulty` says; each: further overrides of one process."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LMJAX_", "JAX_", "XLA_"))}
        env |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}"}
        env |= environment or {}
        port = free_port()
        started, logs, given = [], [], " ".join(overrides)
        standard = [] if "--mesh." in given else ["--mesh.fsdp=2"]
        standard += [f"--steps={STEPS_OF_SEVERAL}"] if processes > 1 and "--steps=" not in given else []
        for i in range(processes):
            own = env | ({"LMJAX_COORDINATOR": f"127.0.0.1:{port}", "LMJAX_PROCESSES": str(processes),
                          "LMJAX_PROCESS": str(i)} if processes > 1 and "LMJAX_COORDINATOR" not in env else {})
            logs.append(self.folder / f"{name}-{i}.log")
            command = [sys.executable, "-m", "lmjax.chaos.child", fault if faulty in (None, i) else "", self.without,
                       "train", str(self.config), f"--name={name}", *standard, *overrides, *each(i)]
            with logs[-1].open("w") as log:
                started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT,
                                                stdin=subprocess.DEVNULL, cwd=self.folder))
        return Attempt(started, logs, self.runs / name)

    def finish(self, name: str, *overrides: str, seconds: float = 240.0, **options) -> Attempt:
        """Gives the same command (again); it must end the run."""
        attempt = self.start(name, *overrides, **options)
        codes = attempt.wait(seconds)
        expect(codes == [0] * len(codes), f"the same command ended with {codes}:\n{attempt.output()[-2500:]}")
        return attempt

    # ---- watching --------------------------------------------------------------------------------------

    def step(self, name: str) -> int:
        """The last step on record; 0 for none."""
        with contextlib.suppress(UserError, OSError):
            return max((r["step"] for r in read_metrics(self.runs / name) if r["kind"] == "train"), default=0)
        return 0

    def until(self, attempt: Attempt, condition: Callable[[], bool], seconds: float = 120.0,
              pause: float = 0.002) -> None:
        """Waits for a condition while the run is alive. Raises Broken if it ends or takes too long."""
        until = time.monotonic() + seconds
        while not condition():
            if not attempt.alive():
                raise Broken(f"the run ended by itself, with {[p.returncode for p in attempt.processes]}:\n"
                             f"{attempt.output()[-2500:]}")
            expect(time.monotonic() < until, f"nothing happened for {seconds:g} s:\n{attempt.output()[-1500:]}")
            time.sleep(pause)

    def reach(self, attempt: Attempt, step: int) -> None:
        name = attempt.run.name
        self.until(attempt, lambda: self.step(name) >= step, pause=0.005)

    # ---- comparing -------------------------------------------------------------------------------------

    def end_of(self, name: str) -> tuple:
        """(fingerprint of every array, loss and gradient norm of every step, as exact text) of a finished run."""
        folder = newest(self.runs / name)
        why = manifest.damage(folder, int(folder.name))
        expect(not why, f"the last checkpoint: {why}")
        arrays = manifest.read_manifest(folder)["arrays"]
        keys = ("step", "loss", "grad_norm", "skipped")
        history = [json.dumps([r.get(k) for k in keys]) for r in read_metrics(self.runs / name) if r["kind"] == "train"]
        return arrays, history

    def reference(self, *overrides: str, **options) -> tuple:
        """The end of the same run when nobody disturbs it; made once."""
        key = (*overrides, *sorted((k, str(v)) for k, v in options.items()))
        if key not in self._ends:
            name, self.without, kept = f"reference{len(self._ends)}", "", self.without
            self.finish(name, *overrides, **options)
            self._ends[key], self.without = self.end_of(name), kept
            steps = int(newest(self.runs / name).name)
            expect(len(self._ends[key][1]) == steps, "the undisturbed run has not recorded every step")
        return self._ends[key]

    def same(self, name: str, *overrides: str, **options) -> None:
        """The run ended with the bits, and the record of every step, of one that nobody disturbed."""
        arrays, history = self.reference(*overrides, **options)
        found, record = self.end_of(name)
        wrong = [n for n in arrays if found.get(n) != arrays[n]]
        expect(not wrong, f"{len(wrong)} of {len(arrays)} arrays differ from the undisturbed run's, first {wrong[:3]}")
        odd = [(a, b) for a, b in zip(record, history, strict=False) if a != b][:2]
        expect(record == history, f"the record differs: {odd}, {len(record)} steps, {len(history)} expected")

    def recover(self, name: str, fault_at: float, reached: int, *overrides: str, bound: int = 2 * EVERY,
                **options) -> Outcome:
        """Gives the same command, which must end the run with the right bits; what that cost."""
        attempt = self.start(name, *overrides, **options)
        first: list[float] = []
        start = resumed_at(self.runs / name)

        def moved() -> bool:
            new = resumed_at(self.runs / name)
            if not first and new != start and self.step(name) > (new or (0, 0))[1]:
                first.append(time.monotonic())
            return not attempt.alive()
        self.until_over(attempt, moved)
        codes = [p.returncode for p in attempt.processes]
        expect(codes == [0] * len(codes), f"the same command ended with {codes}:\n{attempt.output()[-2500:]}")
        self.same(name, *overrides, **options)
        resumed = (resumed_at(self.runs / name) or (0, 0))[1]
        repeated = max(0, reached - resumed)
        expect(repeated <= bound, f"{repeated} steps were done again, more than {bound}")
        return Outcome(repeated, (first[0] if first else time.monotonic()) - fault_at)

    def until_over(self, attempt: Attempt, condition: Callable[[], bool], seconds: float = 240.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                attempt.end()
                raise Broken(f"not finished after {seconds:g} s:\n{attempt.output()[-1500:]}")
            time.sleep(0.02)


def resumed_at(run: Path) -> tuple[int, int] | None:
    """(how many starts, step of the last one), by the run's record."""
    with contextlib.suppress(UserError, OSError):
        starts = [r["step"] for r in read_metrics(run) if r["kind"] == "start"]
        return (len(starts), starts[-1]) if starts else None
    return None


def newest(run: Path) -> Path:
    """The newest checkpoint's folder."""
    steps = manifest.numbered(run / "checkpoints")
    expect(bool(steps), "there is no checkpoint")
    return run / "checkpoints" / str(steps[0])


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill(attempt: Attempt, which: int | None = None) -> float:
    attempt.send(signal.SIGKILL, which)
    return time.monotonic()
