"""The manifest of a checkpoint: what makes a folder of files a checkpoint, and how damage is found.

Orbax keeps no checksum of array data, does not sync its metadata, and takes an empty folder for a checkpoint. So a
step is sealed here: every file hashed (SHA-256) and synced, `manifest.json` written last, the folder synced and only
then renamed to its number. A folder is a checkpoint if its manifest verifies, and never otherwise.

manifest.json is one JSON object in canonical form: format, step, files {path: [bytes, sha256]}, arrays {name: [dtype,
shape, fingerprint]}, config and corpus (SHA-256 of what meta.json says of them), and sha256, of all the rest. What
lives here: files and hashes. What does not: arrays on devices (`fingerprint`), saving and restoring (`store`).
Nothing here imports jax.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmjax.errors import CheckpointError

FORMAT = 2
NAME = "manifest.json"
META = "meta.json"
THREADS = 4  # hashing lets other Python threads run


def canonical(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, and a newline at the end."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def seal(folder: Path, step: int, arrays: dict[str, list], meta: dict) -> None:
    """Makes a folder of written arrays a checkpoint in all but its name: meta.json, hashes, syncs, manifest.json.

    arrays: {name: [dtype, shape, fingerprint]}. Raises OSError where the disk does.
    """
    write_synced(folder / META, canonical(meta))
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                   if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor(THREADS) as threads:
        files = dict(zip(names, threads.map(lambda name: hash_synced(folder / name), names), strict=True))
    body = {"format": FORMAT, "step": step, "files": files, "arrays": arrays,
            "config": digest(meta.get("config")), "corpus": digest(meta.get("corpus"))}
    write_synced(folder / NAME, canonical(body | {"sha256": digest(body)}))
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync_folder(path)


def hash_synced(path: Path) -> list:
    """[bytes, sha256] of a file, which is on the disk when this returns."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return [size, hashlib.file_digest(file, "sha256").hexdigest()]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a step's folder. Raises CheckpointError where it is missing, or not what was written."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"it has no {NAME}, so it was never finished") from None
    except OSError as error:
        raise CheckpointError(f"{NAME} cannot be read ({error.strerror})") from None
    try:
        value = json.loads(data)
        told = value.pop("sha256")
        right = digest(value) == told and canonical(value | {"sha256": told}) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        right = False
    if not right:
        raise CheckpointError(f"{NAME} is damaged")
    if value["format"] != FORMAT:
        raise CheckpointError(f"has format {value['format']}, this lmjax reads {FORMAT}")
    return value


def damage(folder: Path, step: int, hashes: bool = True) -> str:
    """What is wrong with a checkpoint, in one line; "" if nothing. Reads every file, or only sizes without `hashes`."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    if manifest["step"] != step:
        return f"its manifest is that of step {manifest['step']}"

    def check(item: tuple[str, list]) -> str:
        name, (size, sha256) = item
        try:
            with (folder / name).open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return f"{name} has {found} bytes, not {size}"
                if hashes and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{name} has changed (its SHA-256 is another)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return ""

    with ThreadPoolExecutor(THREADS) as threads:
        return next((problem for problem in threads.map(check, manifest["files"].items()) if problem), "")


def numbered(folder: Path) -> list[int]:
    """Steps that have a folder, whole or not, newest first. Other names are not looked at."""
    try:
        found = [path.name for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted((int(name) for name in found if name.isascii() and name.isdigit() and str(int(name)) == name),
                  reverse=True)


def verify(folder: Path, steps: Iterable[int] | None = None) -> dict[int, str]:
    """{step: what is wrong with it, or ""} of a run's checkpoints, newest first. Reads everything, changes nothing."""
    return {step: damage(folder / str(step), step) for step in (numbered(folder) if steps is None else steps)}


# ---- the disk ------------------------------------------------------------------------------------------


def write_synced(path: Path, data: bytes) -> None:
    """Writes beside, syncs, renames: after a crash or a power cut the file is the old one or the new one."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns. Does nothing where folders cannot be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
