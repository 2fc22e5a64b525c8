"""From documents to token shards.

What lives here: which document is held out, cutting the stream into shards, and picking up where a killed run
stopped. What does not: reading documents (`sources`), tokenising in parallel (`workers`), the folder's format
(`manifest`), reading tokens back (`shards`).

One process reads documents in order, decides their split and gathers them into plans of about `shard_bytes`
of text; workers tokenise whole plans and write one shard each. So a shard is a function of the source, the
tokenizer and `shard_bytes` only, and any shard can be made again alone. Every finished shard is recorded in
`progress.jsonl`; the manifest comes last.
"""

import hashlib
import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data.manifest import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    Manifest,
    Shard,
    Split,
    damage,
    load_manifest,
    locked,
    manifest_fingerprint,
    read_shard,
    write_atomically,
    write_manifest,
)
from lmjax.data.sources import SourceConfig, check_outside, documents, file_manifest, source_files, source_key
from lmjax.data.tokenizers import Tokenizer
from lmjax.data.workers import Plan, make_shards, shard_name, token_dtype
from lmjax.errors import DataError

SHARD_BYTES = 8 << 20
_COUNTED = 20_000  # documents; with more of them chance comes near enough to the wanted share


@dataclass(frozen=True)
class Progress:
    """Finished so far. `kept` counts shards found finished, which `new_tokens` (for a rate) leaves out.

    `total_bytes` is 0 where it cannot be known.
    """

    documents: int
    tokens: int
    new_tokens: int
    bytes: int
    total_bytes: int
    kept: int
    seconds: float


def prepare(
    source: SourceConfig,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    validation_fraction: float = 0.02,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
    key: str = "",
) -> Manifest:
    """Writes a corpus as token shards into the folder `out` and returns its manifest.

    Each document is stored as bos, tokens, eos. Which documents are held out depends on their text alone
    (`holdout_threshold`). The folder's bytes do not depend on `workers` (0: every core), nor on how often
    the run was killed on the way. A finished folder of the same corpus is verified by its hashes, and only
    damaged shards are made again. `key` saves reading the files twice when `source_key` is already known.

    DataError: unreadable input; a folder that holds something else (it is left alone); no document for one
    of the splits; a worker that died.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction = {validation_fraction}: must be in [0, 1)")
    if workers < 0 or shard_bytes < 1:
        raise DataError(f"workers = {workers}, shard_bytes = {shard_bytes}: must be >= 0 and >= 1")
    if source.kind == "shards":
        raise DataError(f"source shards {source.path}: is already prepared; use it as a source of a run")
    out = Path(out)
    check_outside(source, out)
    files = file_manifest(source) if not key or source.kind == "pystdlib" else None
    identity = {
        "format": FORMAT, "source_key": key or source_key(source, files),
        "tokenizer": tokenizer.fingerprint, "validation_fraction": validation_fraction,
        "shard_bytes": shard_bytes,
    }
    _check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); choose another folder") from None
    with locked(out):
        records = _finished_shards(out, identity)
        if (out / MANIFEST).is_file():
            manifest = load_manifest(out)
            if len(records) == sum(len(split.shards) for split in manifest.splits.values()):
                return manifest
        threshold = holdout_threshold(source, validation_fraction)
        _start(out, identity, tokenizer, file_manifest(source) if files is None else files, records)
        skipped = _make_shards(source, tokenizer, out, threshold, workers, shard_bytes, records, progress)
        return _finish(out, identity, source, tokenizer, records, skipped)


def held_out(text: str, threshold: int) -> bool:
    """Whether a document belongs to the validation split. Equal texts always fall on the same side."""
    return _position(text) < threshold


def holdout_threshold(source: SourceConfig, validation_fraction: float) -> int:
    """The number below which a document's hash puts it into validation.

    Hashes order documents at random, the same way for every tokenizer and seed. Up to _COUNTED documents the
    threshold is the one whose held-out share of bytes comes nearest to the fraction, since chance alone can
    miss it by far and even leave a split empty; beyond that it is fraction * 2^64. DataError: fewer than two
    different documents.
    """
    plain = int(validation_fraction * 2**64)
    if not plain:
        return 0
    sizes: Counter[int] = Counter()
    low, high = 2**64, -1
    for count, document in enumerate(documents(source, Counter()), 1):
        position = _position(document.text)
        low, high = min(low, position), max(high, position)
        if count <= _COUNTED:
            sizes[position] += len(document.text.encode())
        elif low < plain <= high:
            return plain
    if low == high:
        raise DataError(f"source {source.kind} {source.path}: holds one distinct document, so none can be "
                        "held out; set validation_fraction = 0, or cut the text into several files or JSONL "
                        "lines")
    positions = sorted(sizes)
    held = np.cumsum([sizes[position] for position in positions])
    best = int(np.argmin(np.abs(held[:-1] - validation_fraction * held[-1])))  # the last one always trains
    return positions[best] + 1


def training_documents(source: SourceConfig, validation_fraction: float) -> Iterator[str]:
    """The texts that are not held out, in order: what a tokenizer may be trained on."""
    threshold = holdout_threshold(source, validation_fraction)
    for document in documents(source, Counter()):
        if not held_out(document.text, threshold):
            yield document.text


def _position(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"lmjax split").digest()
    return int.from_bytes(digest, "big")


# ---- the folder -----------------------------------------------------------------------------------------

def _check_folder(out: Path) -> None:
    """A folder with someone else's files is never written to."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose a folder")
    if out.is_dir() and not (out / MANIFEST).exists() and not (out / PROGRESS).exists():
        ours = (".lock", "tokenizer.json", "tokenizer_config.json", "files.json")
        names = (path.name for path in out.iterdir())
        names = sorted(name for name in names if name not in ours and ".tmp" not in name)
        if names:
            raise DataError(f"{out}: holds other files ({', '.join(names[:3])}); choose an empty or new "
                            "folder")


def _finished_shards(out: Path, identity: dict[str, Any]) -> dict[str, Shard]:
    """Recorded shards whose files still have their hashes. DataError: the folder holds another corpus."""
    found: list[Shard] = []
    theirs: dict[str, Any] | None = None
    if (out / MANIFEST).is_file():
        manifest = load_manifest(out)
        theirs = manifest.identity
        found = [shard for split in manifest.splits.values() for shard in split.shards]
    elif (out / PROGRESS).is_file():
        for line in (out / PROGRESS).read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                if theirs is None:
                    theirs = dict(record["identity"])
                else:
                    found.append(read_shard(record))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a line torn by a kill: its shard is made again
        if not found:
            return {}  # it stopped before its first shard, so there is nothing to keep from being replaced
    if theirs is not None and theirs != identity:
        fields = [f"{name} {theirs.get(name)!r} there, {identity.get(name)!r} asked"
                  for name in identity if theirs.get(name) != identity[name]]
        raise DataError(f"{out}: holds a different corpus ({'; '.join(fields)}); choose another folder, "
                        "nothing was changed")
    return {shard.file: shard for shard in found if not damage(out, shard, hashes=True)}


def _start(out: Path, identity: dict[str, Any], tokenizer: Tokenizer, files: list[dict[str, Any]],
           records: dict[str, Shard]) -> None:
    for path in out.glob("*.tmp*"):
        path.unlink(missing_ok=True)  # left by a killed run; the lock keeps living ones out
    lines = [{"identity": identity}] + [asdict(shard) for shard in records.values()]
    write_atomically(out / PROGRESS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_atomically(out / "tokenizer.json", tokenizer.to_json().encode())
    tokenizer.save(out / "tokenizer.json")  # also the names of its specials, where they are unusual
    if files:
        write_atomically(out / "files.json", (json.dumps(files, indent=0) + "\n").encode())


def _finish(out: Path, identity: dict[str, Any], source: SourceConfig, tokenizer: Tokenizer,
            records: dict[str, Shard], skipped: dict[str, int]) -> Manifest:
    splits = {}
    for name in ("train", "validation"):
        shards = tuple(records[file] for file in sorted(records, key=_natural) if file.startswith(f"{name}-"))
        splits[name] = Split(sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards),
                             sum(shard.bytes for shard in shards), shards)
    described = {"kind": source.kind, "path": Path(source.path).name if source.kind != "hf" else source.path,
                 "field": source.field, "split": source.split, "subset": source.subset,
                 "encoding_errors": source.encoding_errors, "on_bad_record": source.on_bad_record,
                 "key": identity["source_key"]}
    if source.where:
        described["where"] = source.where
    if source.kind == "pystdlib":
        described["python"] = platform.python_version()
    manifest = Manifest(
        format=FORMAT, source=described, identity=identity,
        tokenizer={"name": tokenizer.name, "fingerprint": tokenizer.fingerprint,
                   "vocab_size": tokenizer.vocab_size,
                   "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id},
        dtype=token_dtype(tokenizer).name, splits=splits, skipped=skipped,
        fingerprint=manifest_fingerprint(tokenizer.fingerprint, splits),
    )
    write_manifest(out, manifest)
    (out / PROGRESS).unlink(missing_ok=True)
    return manifest


def _natural(name: str) -> tuple[int, str]:
    return int(re.findall(r"-(\d+)\.", name)[0]), name


# ---- the work -------------------------------------------------------------------------------------------

def _make_shards(
    source: SourceConfig, tokenizer: Tokenizer, out: Path, threshold: int, workers: int,
    shard_bytes: int, records: dict[str, Shard], progress: Callable[[Progress], None] | None,
) -> dict[str, int]:
    """Makes every shard that `records` lacks, adds it there, and returns what `documents` skipped."""
    skipped: Counter[str] = Counter()
    exact = source.kind in ("pystdlib", "text")
    total = sum(file.size for file in source_files(source)) if exact else 0
    old, began = set(records), time.monotonic()
    needed: set[str] = set()
    done: Counter[str] = Counter()

    def count(shard: Shard) -> None:
        done.update(documents=shard.documents, tokens=shard.tokens, bytes=shard.bytes,
                    new=0 if shard.file in old else shard.tokens)
        if progress is not None:
            progress(Progress(done["documents"], done["tokens"], done["new"], done["bytes"], total, len(old),
                              time.monotonic() - began))

    def missing() -> Iterator[Plan]:
        for plan in _plans(source, threshold, shard_bytes, skipped):
            file = shard_name(plan.split, plan.index)
            needed.add(file)
            if file in old:
                count(records[file])
            else:
                yield plan

    with (out / PROGRESS).open("ab") as log:
        for shard in make_shards(missing(), tokenizer, out, workers or _cores()):
            records[shard.file] = shard
            log.write((json.dumps(asdict(shard)) + "\n").encode())
            log.flush()
            os.fsync(log.fileno())
            count(shard)
    for file in set(records) - needed:
        del records[file]
    return dict(sorted(skipped.items()))


def _plans(source: SourceConfig, threshold: int, shard_bytes: int, skipped: Counter[str]) -> Iterator[Plan]:
    """Cuts the stream into whole documents of about `shard_bytes` of text for each shard."""
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    sizes, indices = Counter[str](), Counter[str]()
    for document in documents(source, skipped):
        split = "validation" if held_out(document.text, threshold) else "train"
        texts[split].append(document.text)
        sizes[split] += len(document.text.encode())
        if sizes[split] >= shard_bytes:
            yield Plan(split, indices[split], texts[split])
            texts[split], sizes[split] = [], 0
            indices[split] += 1
    for split, rest in texts.items():
        if rest:
            yield Plan(split, indices[split], rest)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
