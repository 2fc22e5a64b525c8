"""Faults that end processes, politely or not: whatever dies, the same command must end the run with the same bits."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lmjax.chaos.lab import CONNECT, EVERY, STEPS, STEPS_OF_SEVERAL, Attempt, Lab, Outcome, expect, kill, resumed_at

TWO, FOUR = {"processes": 2, "devices": 2}, {"processes": 4, "devices": 4}


def _kill_at_random(lab: Lab, which, **options) -> Outcome:
    """One kill at a moment that is uniform over the steps of an attempt, its start included one time in five."""
    name = lab.name()
    attempt = lab.start(name, **options)
    starting = lab.rng.random() < 0.2  # or restores, or compiles
    if starting:
        time.sleep(lab.rng.random() * 3)
    else:
        lab.reach(attempt, lab.rng.randint(1, (STEPS_OF_SEVERAL if options else STEPS) * 3 // 4))
        time.sleep(lab.rng.random() * 0.1)
    reached = lab.step(name)
    at = kill(attempt, which)
    # A survivor must see that its peer is gone, and leave by itself. One that had not come yet is missed after
    # limits.connect.
    attempt.wait(CONNECT + 10 if starting else 40)
    return lab.recover(name, at, max(reached, lab.step(name)), **options)


def kill_single(lab: Lab) -> Outcome:
    return _kill_at_random(lab, None)


def kill_rank_of_two(lab: Lab) -> Outcome:
    return _kill_at_random(lab, 1, **TWO)


def kill_leader_of_two(lab: Lab) -> Outcome:
    return _kill_at_random(lab, 0, **TWO)


def kill_rank_of_four(lab: Lab) -> Outcome:
    return _kill_at_random(lab, lab.rng.randrange(4), **FOUR)


def kill_all_of_four(lab: Lab) -> Outcome:
    return _kill_at_random(lab, None, **FOUR)


def kill_while_saving(lab: Lab) -> Outcome:
    """While a checkpoint is being written or sealed."""
    name = lab.name()
    attempt = lab.start(name)
    lab.reach(attempt, lab.rng.randint(EVERY, STEPS // 2))
    folder = lab.runs / name / "checkpoints"
    lab.until(attempt, lambda: any(folder.glob("saving-*")), pause=0.0005)
    time.sleep(lab.rng.random() * 0.1)
    reached, at = lab.step(name), kill(attempt)
    attempt.wait()
    return lab.recover(name, at, reached)


def kill_five_times(lab: Lab) -> Outcome:
    """Five kills in one run, a few steps apart: repairs of repairs."""
    name, repeated, at = lab.name(), 0, time.monotonic()
    for goal in (20, 50, 90, 130, 180):
        attempt = lab.start(name)
        lab.reach(attempt, goal)
        time.sleep(lab.rng.random() * 0.05)
        at = kill(attempt)
        attempt.wait()
        repeated = lab.step(name)
    return lab.recover(name, at, repeated)


def _polite(lab: Lab, number: int, code: int, which=None, **options) -> Outcome:
    name = lab.name()
    attempt = lab.start(name, f"--checkpoint.every={10 * STEPS}", **options)
    lab.reach(attempt, lab.rng.randint(2, (STEPS_OF_SEVERAL if options else STEPS) // 2))
    at = time.monotonic()
    attempt.send(number, which)
    codes = attempt.wait(40)
    expect(codes == [code] * len(codes), f"exit codes {codes}, {code} expected:\n{attempt.output()[-1500:]}")
    expect("the same command continues" in attempt.output(), "nothing was said")
    reached = lab.step(name)
    outcome = lab.recover(name, at, reached, bound=0, **options)
    expect((resumed_at(lab.runs / name) or (0, 0))[1] == reached, "it did not continue where it stopped")
    return outcome


def terminate(lab: Lab) -> Outcome:
    return _polite(lab, signal.SIGTERM, 143)


def interrupt(lab: Lab) -> Outcome:
    return _polite(lab, signal.SIGINT, 130)


def terminate_one_of_two(lab: Lab) -> Outcome:
    return _polite(lab, signal.SIGTERM, 143, lab.rng.randrange(2), **TWO)


def terminate_twice(lab: Lab) -> Outcome:
    """The second signal comes while the last checkpoint is written, and ends at once."""
    name = lab.name()
    attempt = lab.start(name, fault="slow-disk@50")
    lab.reach(attempt, lab.rng.randint(2 * EVERY, STEPS // 2))
    attempt.send(signal.SIGTERM)
    time.sleep(0.1 + 0.3 * lab.rng.random())
    at = time.monotonic()
    attempt.send(signal.SIGTERM)
    codes = attempt.wait(10)
    expect(codes[0] in (-signal.SIGTERM, 143), f"exit code {codes[0]}")
    return lab.recover(name, at, lab.step(name))


def stop_rank(lab: Lab) -> Outcome:
    """SIGSTOP: a process that is there and does nothing. Its peer must end by itself."""
    name = lab.name()
    attempt = lab.start(name, **TWO)
    lab.reach(attempt, lab.rng.randint(2, STEPS_OF_SEVERAL // 2))
    at = time.monotonic()
    attempt.send(signal.SIGSTOP, 1)
    leader = Attempt(attempt.processes[:1], attempt.logs[:1], attempt.run)
    leader.wait(60)
    took = time.monotonic() - at
    reached = lab.step(name)
    attempt.end()
    expect(took < 30, f"the peer of a stopped process went on for {took:.0f} s")
    return lab.recover(name, at, reached, **TWO)


def orphans(lab: Lab) -> Outcome:
    """kill -9 of a process that prepares data with workers: none of them may stay."""
    name = lab.name()
    text = lab.folder / f"{name}-text"
    text.mkdir()
    for i in range(400):
        (text / f"{i}.txt").write_text(f"one two three {i} " * 20_000)
    command = [sys.executable, "-m", "lmjax", "data", "prepare", str(text), "--kind", "text", "--out",
               str(lab.folder / name), "--workers", "2", "--shard-bytes", "200000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=lab.folder)
    until, children = time.monotonic() + 60, []
    while len(children) < 2:
        children = _children(process.pid)
        expect(process.poll() is None, "preparing ended by itself")
        expect(time.monotonic() < until, "no worker was started in a minute")
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(5)
    left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    expect(not left, f"workers {left} are alive 5 s after their parent")
    shutil.rmtree(text)
    return Outcome()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def out_of_memory(lab: Lab) -> Outcome:
    """The address space of a running process is cut to what it has: its next large allocation fails."""
    import resource

    name = lab.name()
    attempt = lab.start(name, "--limits.save=10", "--limits.step=10", "--limits.data=10")
    lab.reach(attempt, lab.rng.randint(EVERY, STEPS // 3))
    resource.prlimit(attempt.processes[0].pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    at = time.monotonic()
    codes = attempt.wait(90)
    expect(codes[0] != 0, "a process without memory claims to have finished")
    return lab.recover(name, at, lab.step(name))
