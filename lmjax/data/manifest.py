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
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmjax.errors import DataError

FORMAT = 1
DTYPES = ("uint16", "uint32")  # of token ids
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
        value = json.loads(path.read_bytes())
        version = value["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({_short(error)}); remove the folder and prepare it again") from None
    if version != FORMAT:
        raise DataError(f"{path}: format version {version!r:.40}, but this lmjax reads {FORMAT}; prepare the "
                        "corpus again in another folder")
    try:
        return _manifest(value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({_short(error)}); remove the folder and prepare it again") from None


def _short(error: Exception) -> str:
    return " ".join(repr(error).split())[:200]


def _manifest(value: dict[str, Any]) -> Manifest:
    """A manifest from JSON, every field looked at. Raises ValueError, KeyError or TypeError where one is wrong."""
    splits = {name: Split(**{**split, "shards": tuple(read_shard(shard) for shard in split["shards"])})
              for name, split in value["splits"].items()}
    manifest = Manifest(**{**value, "splits": splits})
    for name, split in splits.items():
        for what in ("tokens", "documents", "bytes"):
            total = sum(getattr(shard, what) for shard in split.shards)
            if type(getattr(split, what)) is not int or getattr(split, what) != total:
                raise ValueError(f"split {name!r}: {what}={getattr(split, what)!r}, but its shards have {total}")
    files = [file for split in splits.values() for s in split.shards for file in (s.file, s.offsets_file)]
    if len(set(files)) < len(files):
        raise ValueError("it names a file twice")
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype={manifest.dtype!r} is none of {', '.join(DTYPES)}")
    _check_texts(manifest)
    if manifest.fingerprint != manifest_fingerprint(manifest.tokenizer["fingerprint"], splits):
        raise ValueError("its fingerprint is not that of its shards: it was changed by hand")
    return manifest


def _check_texts(manifest: Manifest) -> None:
    """The parts that are told, not used to find files."""
    t, counts = manifest.tokenizer, manifest.skipped
    if not all(type(t[name]) is str for name in ("name", "fingerprint")) or not all(
            type(t[name]) is int for name in ("vocab_size", "bos_id", "eos_id")):
        raise ValueError("tokenizer: a field has the wrong type")
    if not 0 < t["vocab_size"] <= 2**32:
        raise ValueError(f"tokenizer: vocab_size={t['vocab_size']}")
    if not all(type(count) is int and count >= 0 for count in counts.values()):
        raise ValueError("skipped: not counts")
    if type(manifest.identity) is not dict or not all(
            type(manifest.source[name]) is str for name in ("kind", "path")):
        raise ValueError("source or identity: a field has the wrong type")


def read_shard(value: dict[str, Any]) -> Shard:
    """A shard from JSON. Raises ValueError for a field of a wrong type, and for a name that is not one of a file in
    the folder itself, such as "../x": what a manifest says never leads out of its folder."""
    shard = Shard(**value)
    for name, hint in Shard.__annotations__.items():
        found = getattr(shard, name)
        if type(found) is not hint or (hint is int and not 0 <= found < 2**62):
            raise ValueError(f"{name}={str(found)[:60]!r} is no {hint.__name__} from 0")
    for name, kind in ((shard.file, "tokens"), (shard.offsets_file, "offsets")):
        if not re.fullmatch(rf"[A-Za-z0-9_]+-[0-9]{{1,9}}\.{kind}\.npy", name):
            raise ValueError(f"{name[:60]!r} is no name of a shard's {kind} in this folder")
    return shard


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
            try:
                with path.open("rb") as file:
                    same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
            except OSError as error:
                return f"{path}: cannot be read ({error.strerror})"
            if not same:
                return f"{path}: its bytes have changed (sha256 differs from the manifest)"
    return ""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside, syncs, renames: after a crash the file is the old one or the new one, never a part."""
    # Random, since on a shared folder two machines can have a process of this number, and both write this file.
    beside = path.with_name(f"{path.name}.tmp{os.getpid()}-{secrets.token_hex(4)}")
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
