"""What the system is told about this process: huge pages and kept programs before it starts (for the command line
only; an import of lmjax changes nothing), and memory that compiling has left behind."""

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
import zlib
from pathlib import Path

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def on_huge_pages() -> None:
    """Starts this command again, in place, with glibc giving large arrays huge pages; returns if it already does.

    XLA's CPU client allocates what a step needs anew at every step, and on pages of 4 KiB the system then spends a
    sixth of the time clearing and mapping them (docs/performance.md). The setting is glibc's own
    (GLIBC_TUNABLES, in its manual under "Memory Allocation Tunables") and is read once, when a process starts, so
    the process is replaced by itself: same arguments, same process id. Other C libraries ignore it. A value that is
    already set is left alone, so GLIBC_TUNABLES=glibc.malloc.hugetlb=0 switches this off.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or not sys.executable:
        return
    os.environ.update(HUGE_PAGES)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled_programs() -> None:
    """Tells JAX, not yet imported, where to keep what it compiles, so that the next start of the same run is quick.

    The folder is the user's own (0700: it holds machine code), under $XDG_CACHE_HOME or ~/.cache, one for each kind
    of processor, since code for one may not run on another. JAX_COMPILATION_CACHE_DIR, where set, is taken instead;
    set it to nothing to keep nothing. A folder that cannot be made only costs the time.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        if os.environ["JAX_COMPILATION_CACHE_DIR"]:
            drop_damaged(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
        return
    kind = hashlib.sha256((platform.machine() + _processor()).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmjax" / "compiled" / kind
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    drop_damaged(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def drop_damaged(folder: Path) -> None:
    """Removes kept programs that are not whole. JAX writes them in place, so a kill may leave half of one; it then
    warns and compiles at every start, and never writes that entry again. Each is looked at once, after it was written.
    """
    marker = folder / "checked"
    with contextlib.suppress(OSError):
        since = marker.stat().st_mtime if marker.exists() else 0.0
        fresh = [path for path in folder.glob("*-cache") if path.stat().st_mtime >= since]
        if fresh:
            marker.touch()
        for path in fresh:
            data = path.read_bytes()
            if data[:1] != b"\x78":  # not zlib: with another compressor installed, JAX uses that
                continue
            try:
                zlib.decompress(data)
            except zlib.error:
                path.unlink()


def release_freed_memory() -> None:
    """Gives freed memory back to the system, after compiling: XLA leaves 150-250 MiB in glibc's free lists, which the
    step's own temporaries, mapped anew each time, can never use. Does nothing with other C libraries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _processor() -> str:
    """Model and instruction sets, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
