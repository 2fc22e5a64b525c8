"""Faults of storage: damaged checkpoints; disks that are full, slow, read-only or gone; folders that vanish."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from lmjax.chaos.lab import EVERY, Lab, Outcome, expect, files_of, kill, newest
from lmjax.checkpoint import manifest


def _stopped(lab: Lab, goal: int = 3 * EVERY + 1) -> tuple[str, Path, int]:
    """(name, newest checkpoint, steps done) of a run that was killed with some checkpoints behind it."""
    name = lab.name()
    attempt = lab.start(name)
    lab.reach(attempt, goal)
    lab.until(attempt, lambda: len(manifest.numbered(lab.runs / name / "checkpoints")) >= 2)
    kill(attempt)
    attempt.wait()
    return name, newest(lab.runs / name), lab.step(name)


def _damaged(lab: Lab, harm: Callable[[Path], str]) -> Outcome:
    """Harm is done to the newest checkpoint: it must be named, set aside, and not be used."""
    name, folder, reached = _stopped(lab)
    what = harm(folder)
    found = manifest.damage(folder, int(folder.name))
    expect(bool(found), f"{what}: `lmjax checkpoint verify` finds nothing wrong")
    at = time.monotonic()
    outcome = lab.recover(name, at, reached, bound=3 * EVERY)
    aside = list((lab.runs / name / "checkpoints").glob(f"damaged-{folder.name}-*"))
    expect(len(aside) == 1, f"{what}: it was not set aside")
    expect("damaged (" in (lab.folder / f"{name}-0.log").read_text(), "nothing was said")
    return outcome


def flipped_bit(lab: Lab) -> Outcome:
    def harm(folder: Path) -> str:
        path = max(files_of(folder / "state"), key=lambda p: p.stat().st_size)
        return flip(path, lab.rng.randrange(8 * path.stat().st_size))
    return _damaged(lab, harm)


def flipped_bit_anywhere(lab: Lab) -> Outcome:
    def harm(folder: Path) -> str:
        path = lab.rng.choice([p for p in files_of(folder) if p.stat().st_size])
        return flip(path, lab.rng.randrange(8 * path.stat().st_size))
    return _damaged(lab, harm)


def truncated(lab: Lab) -> Outcome:
    def harm(folder: Path) -> str:
        path = lab.rng.choice([p for p in files_of(folder) if p.stat().st_size])
        os.truncate(path, lab.rng.randrange(path.stat().st_size))
        return f"{path.name} truncated"
    return _damaged(lab, harm)


def deleted(lab: Lab) -> Outcome:
    def harm(folder: Path) -> str:
        path = lab.rng.choice(files_of(folder))
        path.unlink()
        return f"{path.name} deleted"
    return _damaged(lab, harm)


def emptied(lab: Lab) -> Outcome:
    """A step's folder with nothing in it, which Orbax alone would take for the newest checkpoint."""
    def harm(folder: Path) -> str:
        shutil.rmtree(folder)
        folder.mkdir()
        return "emptied"
    return _damaged(lab, harm)


def power_cut(lab: Lab) -> Outcome:
    """What was written last was never synced: the newest step has its names, and zeros for contents."""
    def harm(folder: Path) -> str:
        for path in files_of(folder):
            path.write_bytes(bytes(path.stat().st_size))
        return "zeros"
    return _damaged(lab, harm)


def strays(lab: Lab) -> Outcome:
    """Folders that are no checkpoints: leftovers, copies, other tools' names."""
    name, folder, reached = _stopped(lab)
    for stray in ("9999.bak", "saving-9999", "deleting-3", "99999.orbax-checkpoint-tmp", "0099", "latest", "-5"):
        (folder.parent / stray).mkdir()
        (folder.parent / stray / "state").write_text("?")
    (folder.parent / "7777").write_text("a file")
    return lab.recover(name, time.monotonic(), reached)


def flip(path: Path, bit: int) -> str:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {path.name} flipped"


def flips_by_the_hundred(lab: Lab) -> Outcome:
    """Many at once, against the verification alone: each must be found, and the whole folder verify again after."""
    name, folder, _ = _stopped(lab)
    files = [p for p in files_of(folder) if p.stat().st_size]
    for _ in range(100):
        path = lab.rng.choice(files)
        before, kind = path.read_bytes(), lab.rng.choice(["flip", "truncate", "delete"])
        if kind == "flip":
            flip(path, lab.rng.randrange(8 * len(before)))
        elif kind == "truncate":
            os.truncate(path, lab.rng.randrange(len(before)))
        else:
            path.unlink()
        expect(bool(manifest.damage(folder, int(folder.name))), f"{kind} of {path.name} was not found")
        path.write_bytes(before)
    expect(not manifest.damage(folder, int(folder.name)), "the folder does not verify after it was mended")
    return Outcome()


# ---- disks ---------------------------------------------------------------------------------------------


def full_disk(lab: Lab) -> Outcome:
    """The run's folder is on a disk with no room left; after some steps there is room again."""
    name = lab.name()
    with Disk(lab.folder / f"disk-{name}", megabytes=48) as disk:
        root = f"--run_root={disk.path}"
        attempt = lab.start(name, root, "--checkpoint.failures=1000", fault="slow-disk@2")
        run = disk.path / name
        lab.until(attempt, lambda: len(manifest.numbered(run / "checkpoints")) >= 2)
        disk.fill()
        log = attempt.logs[0]
        lab.until(attempt, lambda: "training goes on" in log.read_text(errors="replace"))
        at = time.monotonic()
        told = log.read_text(errors="replace")
        expect("No space left on device" in told, "the reason was not said")
        kept = manifest.numbered(run / "checkpoints")
        expect(bool(kept) and not manifest.damage(run / "checkpoints" / str(kept[0]), kept[0]), "no checkpoint is left")
        disk.free()
        codes = attempt.wait()
        expect(codes == [0], f"ended with {codes}:\n{attempt.output()[-1500:]}")
        recovered = time.monotonic() - at
        shutil.copytree(run, lab.runs / name)
    lab.same(name)
    return Outcome(0, recovered)


class Disk:
    """A small disk of its own: a tmpfs where this process may mount one, else a folder with a limit on file sizes."""

    def __init__(self, path: Path, megabytes: int):
        self.path, self.megabytes = path, megabytes

    def __enter__(self) -> "Disk":
        self.path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.megabytes}m", "tmpfs", str(self.path)],
                              capture_output=True)
        if done.returncode:
            self.path.rmdir()
            raise Skip("needs the right to mount a tmpfs (root)")
        return self

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.path / "filler").open("wb") as file:
            while True:
                file.write(bytes(1 << 14))
                file.flush()

    def free(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)

    def __exit__(self, *_) -> None:
        subprocess.run(["umount", "-l", str(self.path)], capture_output=True)
        shutil.rmtree(self.path, ignore_errors=True)


class Skip(Exception):
    """A fault that cannot be injected on this machine; says why."""


def _survives(lab: Lab, fault: str, word: str) -> Outcome:
    """The fault comes and goes while the run goes on; the end is right all the same."""
    name = lab.name()
    attempt = lab.finish(name, fault=fault)
    expect(word in attempt.output(), f"nothing was said of it:\n{attempt.output()[-1500:]}")
    lab.same(name)
    return Outcome()


def sync_error(lab: Lab) -> Outcome:
    first = lab.rng.randint(20, 120)
    return _survives(lab, f"fsync-fails@{first}", "Input/output error")


def rename_error(lab: Lab) -> Outcome:
    first = lab.rng.randint(2, 12)
    return _survives(lab, f"rename-fails@{first}", "could not be saved")


def slow_disk(lab: Lab) -> Outcome:
    """Every sync takes 60 ms: saves take seconds; training leaves some out rather than to stand still."""
    name = lab.name()
    attempt = lab.finish(name, "--checkpoint.patience=0.2", fault="slow-disk@60")
    expect("is not saved: step" in attempt.output(), "no save was left out")
    lab.same(name)
    return Outcome()


def read_only_disk(lab: Lab) -> Outcome:
    """From some save on the file system is read-only: a few failures are survived, then the run ends, cleanly."""
    name = lab.name()
    attempt = lab.start(name, fault=f"read-only@{lab.rng.randint(3, 6)}")
    codes = attempt.wait()
    expect(codes == [4], f"exit code {codes}, 4 expected:\n{attempt.output()[-1500:]}")
    text = attempt.output()
    expect("Read-only file system" in text and "Traceback" not in text, "the reason was not said")
    return lab.recover(name, time.monotonic(), lab.step(name), bound=6 * EVERY)


def dead_disk(lab: Lab) -> Outcome:
    """A sync that never comes back (a network mount without its server): the run ends within its limit."""
    name = lab.name()
    fault = f"dead-disk@{lab.rng.randint(20, 60)}"
    attempt = lab.start(name, "--limits.save=3", "--checkpoint.patience=600", fault=fault)
    log = attempt.logs[0]
    codes = attempt.wait(90)
    expect(codes == [6], f"exit code {codes}, 6 expected:\n{attempt.output()[-1500:]}")
    expect("the phase 'save' takes longer" in log.read_text(errors="replace"), "the phase was not named")
    return lab.recover(name, time.monotonic(), lab.step(name), bound=4 * EVERY)


def checkpoints_removed(lab: Lab) -> Outcome:
    """Somebody deletes the folder of checkpoints while the run goes on: later saves make it anew."""
    name = lab.name()
    attempt = lab.start(name)
    lab.reach(attempt, 2 * EVERY + lab.rng.randint(0, EVERY))
    folder = lab.runs / name / "checkpoints"
    gone = folder.with_name("gone")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    codes = attempt.wait()
    expect(codes == [0], f"ended with {codes}:\n{attempt.output()[-1500:]}")
    lab.same(name)
    return Outcome()


def torn_record(lab: Lab) -> Outcome:
    """metrics.jsonl ends in half a line, time.jsonl in garbage, and a dead process's lease is still there."""
    name, _, reached = _stopped(lab)
    run = lab.runs / name
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 9')
    with (run / "time.jsonl").open("ab") as file:
        file.write(b"\x00\xff{{{")
    (run / "lease.json").write_text('{"host": ')
    return lab.recover(name, time.monotonic(), reached)


def clock_jump(lab: Lab) -> Outcome:
    """Every file of the run is dated years ahead, older steps furthest: the newest step is still the highest."""
    name, folder, reached = _stopped(lab)
    for path in (lab.runs / name).rglob("*"):
        step = int(folder.name) if folder in path.parents or path == folder else 0
        ahead = time.time() + 86400 * (3650 - step)
        os.utime(path, (ahead, ahead))
    return lab.recover(name, time.monotonic(), reached)


def compiled_damaged(lab: Lab) -> Outcome:
    """A kept program is truncated, or one of its bits flipped: it is compiled again."""
    name, _, reached = _stopped(lab)
    lab.reference()
    kept = [p for p in files_of(lab.folder / "compiled") if "train_step" in p.name and not p.name.endswith("-atime")]
    if not kept:
        raise Skip("this JAX keeps no compiled CPU programs")
    for path in kept:
        if lab.rng.random() < 0.5:
            os.truncate(path, path.stat().st_size // 2)
        else:
            flip(path, lab.rng.randrange(8 * path.stat().st_size))
    outcome = lab.recover(name, time.monotonic(), reached)
    text = (lab.folder / f"{name}-0.log").read_text()
    expect("persistent compilation cache" not in text, "the damaged program was not cleared away")
    return outcome


def second_trainer(lab: Lab) -> Outcome:
    """The same command twice at the same time: the second is refused, the first does not notice."""
    name = lab.name()
    attempt = lab.start(name)
    lab.reach(attempt, lab.rng.randint(1, 20))
    attempt.send(signal.SIGSTOP)  # so that it is there for certain, however slow the second one starts
    second = lab.start(name)
    codes = second.wait()
    text = second.output()
    attempt.send(signal.SIGCONT)
    expect(codes == [4] and "another process is training in it" in text, f"the second ended with {codes}:\n{text}")
    codes = attempt.wait()
    expect(codes == [0], f"the first ended with {codes}")
    lab.same(name)
    return Outcome()
