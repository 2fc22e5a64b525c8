"""What a prepared folder says about itself: `manifest.json`, and `progress.jsonl` until it is finished.

What lives here: the manifest's dataclasses, reading, writing and hashing. What does not: making shards
(`prepare`) and reading tokens (`shards`).

A folder holds, for each split, `train-00000.tokens.npy` (1-D uint16 or uint32) and `train-00000.offsets.npy`
(int64 [documents + 1], where each document begins), both plain `.npy`; the tokenizer as `tokenizer.json`; the
list of source files as `files.json`. Nothing in it depends on time, machine or number of workers.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmjax.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.jsonl"


@dataclass(frozen=True)
class Shard:
    """One shard: names, hashes and sizes (bytes) of its two files; tokens, documents, UTF-8 bytes of text."""

    file: str
    sha256: str
    size: int
    offsets_file: str
    offsets_sha256: str
    offsets_size: int
    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class Split:
    """One split, and its shards in order."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The whole description of a prepared folder.

    `identity` is what decides whether a folder may be resumed: source key, tokenizer fingerprint, held-out
    fraction, bytes a shard. `fingerprint` is a sha256 over the tokenizer and every shard's hashes.
    """

    format: int
    source: dict[str, Any]
    identity: dict[str, Any]
    tokenizer: dict[str, Any]
    dtype: str
    splits: dict[str, Split]
    skipped: dict[str, int]
    fingerprint: str

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def bytes(self) -> int:
        return sum(split.bytes for split in self.splits.values())


def load_manifest(folder: str | Path) -> Manifest:
    """Reads a prepared folder's manifest. Shards are not touched.

    DataError: no such folder, not a prepared folder, an unfinished one, another format version, or damage.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; make it with `lmjax data prepare`")
    if not path.is_file():
        if (folder / PROGRESS).is_file():
            raise DataError(f"{folder}: its preparation is unfinished; run the same `lmjax data prepare` "
                            "again, it keeps the finished shards")
        raise DataError(f"{folder}: not a prepared folder (no {MANIFEST}); make one with `lmjax data "
                        "prepare`")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); remove the folder and prepare it again") from None
    if version != FORMAT:
        raise DataError(f"{path}: format version {version!r}, but this lmjax reads {FORMAT}; prepare the "
                        "corpus again in another folder")
    try:
        splits = {name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                  for name, split in value["splits"].items()}
        return Manifest(**{**value, "splits": splits})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); remove the folder and prepare it again") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def manifest_fingerprint(tokenizer_fingerprint: str, splits: dict[str, Split]) -> str:
    """sha256 hex over the tokenizer and the hashes of every shard, split by split in name order."""
    lines = [tokenizer_fingerprint]
    for name in sorted(splits):
        lines += [f"{name} {shard.sha256} {shard.offsets_sha256}" for shard in splits[name].shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def damage(folder: Path, shard: Shard, hashes: bool) -> str:
    """What is wrong with a shard's two files, in one line; "" if nothing. Reads them only if `hashes`."""
    for name, size, sha256 in ((shard.file, shard.size, shard.sha256),
                               (shard.offsets_file, shard.offsets_size, shard.offsets_sha256)):
        path = folder / name
        if not path.is_file():
            return f"{path}: the shard is missing ({size} bytes expected)"
        found = path.stat().st_size
        if found != size:
            kind = "truncated" if found < size else "too long"
            return f"{path}: {kind} shard, {found} bytes found, {size} expected"
        if hashes:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{path}: its bytes have changed (sha256 differs from the manifest)"
    return ""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside, syncs, renames: after a crash the file is the old one or the new one, never a part."""
    beside = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}); make room or check permissions, "
                        "then run again, finished shards are kept") from None


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time prepare a folder; a second one waits, then finds it finished.

    The lock ends with its process, however that ends. Where the file system has no locks, two processes do
    the same work twice and write the same bytes.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
