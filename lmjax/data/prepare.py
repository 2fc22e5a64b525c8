"""From documents to token shards.

What lives here: which document is held out, cutting the stream into shards, and picking up where a killed run
stopped. What does not: reading documents (`sources`), tokenising in parallel (`workers`), the same on several
machines (`spread`), the folder's format (`manifest`), reading tokens back (`shards`).

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
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
    check_request(source, validation_fraction, workers, shard_bytes)
    out = Path(out)
    check_outside(source, out)
    files = file_manifest(source) if not key or source.kind == "pystdlib" else None
    identity = identity_of(key or source_key(source, files), tokenizer, validation_fraction, shard_bytes)
    make_folder(out)
    with locked(out):
        records = finished_shards(out, identity)
        if manifest := finished_manifest(out, records):
            return manifest
        threshold = holdout_threshold(source, validation_fraction)
        clear_leftovers(out)
        start(out, identity, tokenizer, file_manifest(source) if files is None else files, records)
        skipped = _make_shards(source, tokenizer, out, threshold, workers, shard_bytes, records, progress)
        return finish(out, identity, source, tokenizer, records, skipped)


def held_out(text: str, threshold: int) -> bool:
    """Whether a document belongs to the validation split. Equal texts always fall on the same side."""
    return position(text) < threshold


def holdout_threshold(source: SourceConfig, validation_fraction: float) -> int:
    """The number below which a document's hash puts it into validation: `threshold_of` of the source's documents."""
    marks = ((len(document.text.encode()), position(document.text)) for document in documents(source, Counter()))
    return threshold_of(marks, validation_fraction, source)


def threshold_of(marks: Iterable[tuple[int, int]], validation_fraction: float, source: SourceConfig) -> int:
    """The threshold from (UTF-8 bytes, position) of the documents of `source`, in their order.

    Hashes order documents at random, the same way for every tokenizer and seed. Up to _COUNTED documents the
    threshold is the one whose held-out share of bytes comes nearest to the fraction, since chance alone can
    miss it by far and even leave a split empty; beyond that it is fraction * 2^64. No more of `marks` is read than
    that needs. DataError: fewer than two different documents.
    """
    plain = int(validation_fraction * 2**64)
    if not plain:
        return 0
    sizes: Counter[int] = Counter()
    low, high = 2**64, -1
    for count, (size, where) in enumerate(marks, 1):
        low, high = min(low, where), max(high, where)
        if count <= _COUNTED or len(sizes) < 2:  # however many copies of one document come first
            sizes[where] += size
        if count > _COUNTED and low < plain <= high:
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


def position(text: str) -> int:
    """The 64-bit hash of a text that decides its split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"lmjax split").digest()
    return int.from_bytes(digest, "big")


class Cutter:
    """Which shard of its split each document of the stream goes to: whole documents of about `shard_bytes` of text,
    the one that reaches it being the last."""

    def __init__(self, shard_bytes: int) -> None:
        self._shard_bytes = shard_bytes
        self._sizes, self._indices = Counter[str](), Counter[str]()

    def add(self, split: str, size: int) -> tuple[int, bool]:
        """The number of the shard that takes the next document, of `size` bytes, and whether that makes it full."""
        index = self._indices[split]
        self._sizes[split] += size
        full = self._sizes[split] >= self._shard_bytes
        if full:
            self._sizes[split] = 0
            self._indices[split] += 1
        return index, full


# ---- the folder -----------------------------------------------------------------------------------------

def check_request(source: SourceConfig, validation_fraction: float, workers: int, shard_bytes: int) -> None:
    """DataError for settings with which no folder can be made."""
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction = {validation_fraction}: must be in [0, 1)")
    if workers < 0 or shard_bytes < 1:
        raise DataError(f"workers = {workers}, shard_bytes = {shard_bytes}: must be >= 0 and >= 1")
    if source.kind == "shards":
        raise DataError(f"source shards {source.path}: is already prepared; use it as a source of a run")


def identity_of(key: str, tokenizer: Tokenizer, validation_fraction: float, shard_bytes: int) -> dict[str, Any]:
    """What decides whether a folder may be resumed; `key` is the `source_key`."""
    return {"format": FORMAT, "source_key": key, "tokenizer": tokenizer.fingerprint,
            "validation_fraction": validation_fraction, "shard_bytes": shard_bytes}


def make_folder(out: Path) -> None:
    """Makes it unless it is there. DataError: it cannot be, or someone else's files are in it: never written to."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose a folder")
    if out.is_dir() and not (out / MANIFEST).exists() and not (out / PROGRESS).exists():
        ours = (".lock", "tokenizer.json", "tokenizer_config.json", "files.json")
        names = (path.name for path in out.iterdir())
        names = sorted(name for name in names if name not in ours and ".tmp" not in name)
        if names:
            raise DataError(f"{out}: holds other files ({', '.join(names[:3])}); choose an empty or new "
                            "folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); choose another folder") from None


def finished_manifest(out: Path, records: dict[str, Shard]) -> Manifest | None:
    """The manifest, if the folder has one and all of its shards are among `records`."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = load_manifest(out)
    whole = len(records) == sum(len(split.shards) for split in manifest.splits.values())
    return manifest if whole else None


def finished_shards(out: Path, identity: dict[str, Any]) -> dict[str, Shard]:
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


def clear_leftovers(out: Path) -> None:
    """Removes what a killed run was writing; the lock keeps living ones out."""
    for path in out.glob("*.tmp*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def start(out: Path, identity: dict[str, Any], tokenizer: Tokenizer, files: list[dict[str, Any]],
          records: dict[str, Shard]) -> None:
    """Writes all but the shards and the manifest."""
    lines = [{"identity": identity}] + [asdict(shard) for shard in records.values()]
    write_atomically(out / PROGRESS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_atomically(out / "tokenizer.json", tokenizer.to_json().encode())
    tokenizer.save(out / "tokenizer.json")  # also the names of its specials, where they are unusual
    if files:
        write_atomically(out / "files.json", (json.dumps(files, indent=0) + "\n").encode())


def finish(out: Path, identity: dict[str, Any], source: SourceConfig, tokenizer: Tokenizer,
           records: dict[str, Shard], skipped: dict[str, int]) -> Manifest:
    """Writes the manifest of all `records` and removes the log of progress."""
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

class Recorder:
    """Appends each finished shard to `progress.jsonl` and to `records`, and tells `progress`.

    `total`: bytes of text of the whole corpus, 0 where it cannot be known. `needed` ends as the shards of the corpus.
    """

    def __init__(self, out: Path, records: dict[str, Shard], progress: Callable[[Progress], None] | None,
                 total: int) -> None:
        self.old, self.needed, self._records = frozenset(records), set[str](), records
        self._progress, self._total, self._began = progress, total, time.monotonic()
        self._done: Counter[str] = Counter()
        self._log = (out / PROGRESS).open("ab")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self._log.close()

    def keeps(self, file: str) -> bool:
        """Notes that the corpus has this shard; true where it was found finished, and then counts it."""
        self.needed.add(file)
        if file in self.old:
            self._count(self._records[file])
        return file in self.old

    def add(self, shard: Shard) -> None:
        self._records[shard.file] = shard
        self._log.write((json.dumps(asdict(shard)) + "\n").encode())
        self._log.flush()
        os.fsync(self._log.fileno())
        self._count(shard)

    def forget_others(self) -> None:
        """Drops records of shards that the corpus does not have."""
        for file in set(self._records) - self.needed:
            del self._records[file]

    def _count(self, shard: Shard) -> None:
        done = self._done
        done.update(documents=shard.documents, tokens=shard.tokens, bytes=shard.bytes,
                    new=0 if shard.file in self.old else shard.tokens)
        if self._progress is not None:
            self._progress(Progress(done["documents"], done["tokens"], done["new"], done["bytes"], self._total,
                                    len(self.old), time.monotonic() - self._began))


def _make_shards(
    source: SourceConfig, tokenizer: Tokenizer, out: Path, threshold: int, workers: int,
    shard_bytes: int, records: dict[str, Shard], progress: Callable[[Progress], None] | None,
) -> dict[str, int]:
    """Makes every shard that `records` lacks, adds it there, and returns what `documents` skipped."""
    skipped: Counter[str] = Counter()
    exact = source.kind in ("pystdlib", "text")
    total = sum(file.size for file in source_files(source)) if exact else 0
    with Recorder(out, records, progress, total) as recorder:
        plans = _plans(source, threshold, shard_bytes, skipped)
        missing = (plan for plan in plans if not recorder.keeps(shard_name(plan.split, plan.index)))
        for shard in make_shards(missing, tokenizer, out, workers or _cores()):
            recorder.add(shard)
        recorder.forget_others()
    return dict(sorted(skipped.items()))


def _plans(source: SourceConfig, threshold: int, shard_bytes: int, skipped: Counter[str]) -> Iterator[Plan]:
    """Cuts the stream into whole documents of about `shard_bytes` of text for each shard."""
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    indices = Counter[str]()
    cutter = Cutter(shard_bytes)
    for document in documents(source, skipped):
        split = "validation" if held_out(document.text, threshold) else "train"
        texts[split].append(document.text)
        indices[split], full = cutter.add(split, len(document.text.encode()))
        if full:
            yield Plan(split, indices[split], texts[split])
            texts[split] = []
    for split, rest in texts.items():
        if rest:
            yield Plan(split, indices[split], rest)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
