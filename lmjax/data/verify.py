"""Every shard of a run held against the sha256 in its manifest.

What lives here: hashing many files at once, with a share of them for each host, and what to say about it. What does
not: the manifest (`manifest`) and what follows from damage (`mixture`).
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lmjax.data.manifest import Manifest, damage

POLICIES = ("hashes", "sizes")
_SECONDS = 5.0  # between two lines of progress


@dataclass(frozen=True)
class Verified:
    """What was hashed: shards, bytes, seconds. damaged: (number of the folder, what is wrong in one line)."""

    shards: int
    bytes: int
    seconds: float
    damaged: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        rate = f", {self.bytes / self.seconds / 1e9:.1f} GB/s" if self.seconds > 0 else ""
        return f"{self.shards} shards ({self.bytes / 1e6:,.1f} MB) have their sha256 ({self.seconds:.1f} s{rate})"


def verify_hashes(folders: Sequence[tuple[Path, Manifest]], part: tuple[int, int] = (0, 1),
                  tell: Callable[[str], None] | None = None) -> Verified:
    """Hashes the shards of prepared folders, with a thread for each core: hashing lets go of the GIL.

    part (index, count): of all shards only every count-th, from the index-th on, so that `count` hosts together read
    everything once. tell: gets a line of progress every few seconds.
    """
    index, count = part
    assert 0 <= index < count, part
    work = [(number, folder, shard) for number, (folder, manifest) in enumerate(folders)
            for split in manifest.splits.values() for shard in split.shards][index::count]
    total = sum(shard.size + shard.offsets_size for _, _, shard in work)
    began = told = time.monotonic()
    damaged, done = [], 0
    with ThreadPoolExecutor(max(1, min(_cores(), len(work)))) as threads:
        problems = threads.map(lambda item: damage(item[1], item[2], hashes=True), work)
        for (number, _, shard), problem in zip(work, problems, strict=True):
            if problem:
                damaged.append((number, problem))
            done += shard.size + shard.offsets_size
            if tell is not None and time.monotonic() - told > _SECONDS:
                told = time.monotonic()
                tell(f"verifying shards  {done / max(total, 1):.0%} of {total / 1e9:.1f} GB")
    return Verified(len(work), total, time.monotonic() - began, tuple(damaged))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
