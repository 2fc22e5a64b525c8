"""One trainer at a time in a run folder, also where the folder is shared by machines.

On one machine the operating system's lock on run.lock decides, and lets go however the process ends. Between machines
locks are not to be trusted, so lease.json says who trains (host, boot, process) and changes every few seconds while it
does. A lease of another machine is over when it has been watched for a while and did not change: nobody's clock is
compared with anybody else's.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: run folders are not locked there
    fcntl = None

from lmjax.errors import CheckpointError

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0  # a holder on another machine whose lease does not change for so long is dead


@contextlib.contextmanager
def open_folder(folder: Path, holds: bool = True) -> Iterator[None]:
    """Makes the run folder and holds it. holds: false for processes of the same run that do not lead.

    Raises CheckpointError for a folder that is not a run's, cannot be written, or is held by another run.
    """
    try:
        if folder.exists() and (not folder.is_dir() or (
                any(folder.iterdir()) and not (folder / "run.lock").exists())):
            raise CheckpointError(f"{folder}: exists and is not a run of lmjax; give this run another name "
                                  "(--name=…) or move it away")
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "run.lock", "a")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); check its permissions and the "
                              "free space, or set --run_root=…") from None
    with lock:
        if not holds:
            yield
            return
        locked = False
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                raise CheckpointError(f"{folder}: another process is training in it{_who(folder)}; wait for it, or "
                                      "give this run another name (--name=…)") from None
            except OSError:
                pass  # a file system without locks: the lease alone decides
        with _lease(folder, locked):
            yield


@contextlib.contextmanager
def _lease(folder: Path, locked: bool) -> Iterator[None]:
    path = folder / "lease.json"
    mine = {"host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid(), "began": time.time_ns(), "beat": 0}
    there = _read(path)
    if there and held(path, there, locked):
        raise CheckpointError(f"{folder}: another process is training in it{_who(folder)}; wait for it, or give this "
                              "run another name (--name=…)")
    try:
        _write(path, mine)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); check its permissions and the "
                              "free space, or set --run_root=…") from None
    ours = threading.Event()

    def beat() -> None:
        while not ours.wait(BEAT_SECONDS):
            mine["beat"] += 1
            with contextlib.suppress(OSError):  # a full or absent disk is told by whoever needs it
                _write(path, mine)

    threading.Thread(target=beat, name="lease", daemon=True).start()
    try:
        yield
    finally:
        ours.set()
        with contextlib.suppress(OSError):
            if (_read(path) or {}).get("began") == mine["began"]:
                path.unlink()


def held(path: Path, lease: dict, locked: bool, watch: float = SILENT_SECONDS) -> bool:
    """Whether the holder of a lease is at work. locked: this process has the lock that holders on this machine keep."""
    if (lease.get("host"), lease.get("boot")) == (socket.gethostname(), boot_id()):
        return not locked and _runs(lease.get("pid"))
    until = time.monotonic() + watch
    while time.monotonic() < until:
        time.sleep(min(1.0, watch))
        if _read(path) != lease:
            return True
    return False


def _runs(pid) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, TypeError, OverflowError):
        return False
    except PermissionError:
        pass
    return int(pid) != os.getpid()


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _who(folder: Path) -> str:
    lease = _read(folder / "lease.json")
    return f" (process {lease.get('pid')} on {lease.get('host')})" if lease else ""


def _read(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write(path: Path, lease: dict) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(lease))
    beside.replace(path)
