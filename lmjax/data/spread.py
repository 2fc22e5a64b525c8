"""Preparing a corpus on several machines that share a folder: the driver, and what each worker does.

What lives here: `prepare_spread`, which gives the folder that `prepare` gives, byte for byte; the two tasks that it
hands out by number, and the scratch folder through which driver and workers talk. What does not: who calls the tasks
(an `Engine`, such as `beam.BeamEngine`), and the rules of cutting and reading (`survey`, `prepare`).

  survey  number of a file   -> its sha256, and 24 bytes for each of its documents
  write   number of a shard  -> its two files, made by `workers.write_shard`

Between the two the driver computes threshold and cuts. A task's answer, or its error, is a small JSON file, so an
engine has nothing to bring back, and a worker's error reaches the user in its own words. A worker that does not find
the scratch folder, or finds `stop` in it, does nothing: the work was stopped, or the folder is not shared, which the
driver notices.
"""

import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lmjax.data.manifest import Manifest, locked, read_shard, write_atomically
from lmjax.data.prepare import (
    SHARD_BYTES,
    Progress,
    Recorder,
    check_request,
    clear_leftovers,
    finish,
    finished_manifest,
    finished_shards,
    identity_of,
    make_folder,
    start,
    threshold_of,
)
from lmjax.data.sources import SourceConfig, SourceFile, check_outside, source_files, source_key
from lmjax.data.survey import RANGE, Range, Survey, file_list, ranges, read_range, skipped_documents, survey_file
from lmjax.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, tokenizer_from_json
from lmjax.data.workers import shard_name, write_array, write_shard
from lmjax.errors import DataError

LATE = 90  # seconds in which a network file system shows this machine what another one wrote
_LOOK = 0.5  # seconds between two looks for answers
_PATIENCE = 10  # seconds for which a stopped run waits for the shards that were begun


class Engine(Protocol):
    """Calls `work(task, folder, number)` at least once for each number, anywhere and in any order."""

    def run(self, task: str, folder: str, numbers: Sequence[int]) -> None:
        """Returns when all calls have. DataError: the engine itself failed."""

    def cancel(self) -> None:
        """Asks a `run` in another thread to end soon."""


def prepare_spread(
    source: SourceConfig, tokenizer_for: Callable[[str], Tokenizer], out: str | Path, engine: Engine, *,
    validation_fraction: float = 0.02,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
    surveyed: Callable[[int, int], None] | None = None,
    late: float = LATE,
) -> Manifest:
    """`prepare.prepare` with reading, splitting and tokenising handed to an engine; same bytes, same errors.

    Driver and workers must see `out`, and the source, under the same paths. `tokenizer_for` is called once with the
    `source_key`. `surveyed` is told (files done, files). A shard that is finished is kept, one that is damaged made
    again; the survey is made anew each time.

    DataError: as `prepare`; kind "hf"; an address in place of a folder; a tokenizer class that is not ours; no answer
    from a worker within `late` seconds after the engine has ended.
    """
    check_request(source, validation_fraction, 0, shard_bytes)
    _check_shared(source, out)
    out = Path(os.path.abspath(out))  # links stay: on another machine they may lead elsewhere
    check_outside(source, out)
    files = [SourceFile(file.name, Path(os.path.abspath(file.path)), file.size) for file in source_files(source)]
    if found := source.problems("source."):
        raise DataError("; ".join(found))
    make_folder(out)
    with locked(out):
        clear_leftovers(out)
        # A name that no earlier run had: workers of a killed one, still alive elsewhere, find theirs gone and stop.
        scratch = out / f"spread-{secrets.token_hex(8)}.tmp"
        for folder in (scratch / "marks", scratch / "answers"):
            folder.mkdir(parents=True)
        try:
            surveys = _survey(source, files, scratch, engine, surveyed, late)
            listed = file_list(files, surveys)
            key = source_key(source, listed)
            tokenizer = tokenizer_for(key)
            identity = identity_of(key, tokenizer, validation_fraction, shard_bytes)
            records = finished_shards(out, identity)
            if manifest := finished_manifest(out, records):
                return manifest
            skipped = skipped_documents(source, surveys)
            threshold = threshold_of(_measures(scratch, len(files)), validation_fraction, source)
            start(out, identity, tokenizer, listed, records)
            with Recorder(out, records, progress, sum(survey.bytes for survey in surveys)) as recorder:
                _write(tokenizer, out, scratch, threshold, shard_bytes, len(files), recorder, engine, late)
                recorder.forget_others()
            return finish(out, identity, source, tokenizer, records, skipped)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _check_shared(source: SourceConfig, out: str | Path) -> None:
    if source.kind == "hf":
        raise DataError(f"source hf {source.path}: has rows but no files that workers could share out; prepare it "
                        "without --beam, or write it as Parquet and give kind = \"parquet\"")
    for what, path in (("out", str(out)), ("path", source.path)):
        if re.match(r"\w\w+:/", path):
            raise DataError(f"{what} = {path}: is an address, and only folders are read and written; mount it (NFS, "
                            "Filestore, Cloud Storage FUSE) under the same path on every machine, and give that")


# ---- the driver -----------------------------------------------------------------------------------------

def _survey(source: SourceConfig, files: list[SourceFile], scratch: Path, engine: Engine,
            tell: Callable[[int, int], None] | None, late: float) -> list[Survey]:
    _write_json(scratch / "source.json", {"source": asdict(source),
                                          "files": [[file.name, str(file.path), file.size] for file in files]})
    found: dict[int, Survey] = {}

    def take(number: int, answer: dict[str, Any]) -> None:
        found[number] = Survey(**answer)
        if tell is not None:
            tell(len(found), len(files))

    _hand_out(engine, "survey", scratch, range(len(files)), take, late)
    return [found[number] for number in range(len(files))]


def _write(tokenizer: Tokenizer, out: Path, scratch: Path, threshold: int, shard_bytes: int, files: int,
           recorder: Recorder, engine: Engine, late: float) -> None:
    if type(tokenizer) not in (ByteTokenizer, HFTokenizer):
        raise DataError(f"tokenizer {tokenizer.name}: is a {type(tokenizer).__name__}, which workers cannot rebuild; "
                        "use the byte tokenizer or a tokenizer.json")
    marks = (_marks(scratch, number) for number in range(files))
    missing = [found.row() for found in ranges(marks, threshold, shard_bytes)
               if not recorder.keeps(shard_name(found.split, found.index))]
    write_array(scratch / "ranges.npy", np.array(missing, RANGE))
    _write_json(scratch / "write.json", {"definition": tokenizer.to_json(), "name": tokenizer.name, "out": str(out),
                                         "config": tokenizer.special_names(), "threshold": threshold})
    _hand_out(engine, "write", scratch, range(len(missing)), lambda _, answer: recorder.add(read_shard(answer)), late)


def _measures(scratch: Path, files: int) -> Iterator[tuple[int, int]]:
    """(bytes, position) of each document in order, one file in memory at a time."""
    for number in range(files):
        marks = _marks(scratch, number)
        yield from zip(marks["size"].tolist(), marks["position"].tolist(), strict=True)


def _hand_out(engine: Engine, task: str, scratch: Path, numbers: Sequence[int],
              take: Callable[[int, dict[str, Any]], None], late: float) -> None:
    """Has an engine do every number of a task, and gives each answer to `take` while others are still being made.

    DataError: that of the task with the lowest number; the engine's; answers that never came.
    """
    if not numbers:
        return
    failures: list[BaseException] = []

    def run() -> None:
        try:
            engine.run(task, str(scratch), numbers)
        except BaseException as error:  # handed to the thread that waits
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    waiting, errors, last = set(numbers), dict[int, str](), time.monotonic()
    try:
        while waiting:
            ended = not thread.is_alive()  # asked first: what was written before the end is then seen below
            for number, answer in _answers(scratch, task, waiting):
                waiting.remove(number)
                last = time.monotonic()
                if "error" in answer:
                    errors[number] = answer["error"]
                    (scratch / "stop").touch()  # what was begun is finished and recorded, nothing else begun
                else:
                    take(number, answer)
            if ended and (failures or errors or time.monotonic() - last > late):
                break
            if ended:
                time.sleep(min(_LOOK, late))
            else:
                thread.join(_LOOK)
                last = time.monotonic()
        thread.join()
    except BaseException:
        with suppress(OSError):
            (scratch / "stop").touch()
        engine.cancel()
        thread.join(_PATIENCE)
        for number, answer in _answers(scratch, task, waiting):  # finished while nobody looked
            if "error" not in answer:
                with suppress(KeyboardInterrupt, Exception):  # the first one is what is told
                    take(number, answer)
        raise
    if errors:
        raise DataError(errors[min(errors)])
    if failures:
        raise failures[0]
    if waiting:
        raise DataError(f"{scratch.parent}: no answer to {len(waiting):,} of {len(numbers):,} tasks ({task}), though "
                        "the runner has ended; make this the same folder, writable, on every worker, and give the same "
                        "command again")


def _answers(scratch: Path, task: str, waiting: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers that have come, each once: its file goes, so that the folder stays quick to list."""
    with os.scandir(scratch / "answers") as entries:
        names = [entry.name for entry in entries]
    for name in sorted(names):
        found = re.fullmatch(rf"{task}-([0-9]+)\.json", name)
        if found and int(found[1]) in waiting:
            yield int(found[1]), json.loads((scratch / "answers" / name).read_bytes())
        if found:
            (scratch / "answers" / name).unlink(missing_ok=True)


# ---- a worker -------------------------------------------------------------------------------------------

def work(task: str, folder: str, number: int) -> None:
    """One task; its answer lies in the scratch folder `folder`. Doing it again, or twice at once, changes nothing."""
    scratch = Path(folder)
    with suppress(_Gone):
        try:
            answer = {"survey": _survey_one, "write": _write_one}[task](scratch, number)
        except DataError as error:
            answer = {"error": str(error)}
        except FileNotFoundError:
            _still_there(scratch)
            raise
        try:
            _write_json(scratch / "answers" / f"{task}-{number}.json", answer)
        except DataError:
            _still_there(scratch)
            raise


class _Gone(Exception):
    """Nobody waits for the answer any more."""


def _still_there(scratch: Path) -> None:
    if not (scratch / "answers").is_dir():  # a folder goes after what is in it
        raise _Gone


def _still_wanted(scratch: Path) -> None:
    _still_there(scratch)
    if (scratch / "stop").exists():
        raise _Gone


def _survey_one(scratch: Path, number: int) -> dict[str, Any]:
    _still_wanted(scratch)
    source, files = _source(scratch)
    survey, marks = survey_file(source, files[number])
    write_array(scratch / "marks" / f"{number}.npy", marks)
    return asdict(survey)


def _write_one(scratch: Path, number: int) -> dict[str, Any]:
    _still_wanted(scratch)
    source, files = _source(scratch)
    tokenizer, out, threshold = _setup(scratch)
    wanted = Range.of(np.load(scratch / "ranges.npy", mmap_mode="r", allow_pickle=False)[number])
    plan = read_range(source, files, lambda file: _marks(scratch, file), threshold, wanted)
    _still_wanted(scratch)
    return asdict(write_shard(plan, tokenizer, out))


@lru_cache(maxsize=2)
def _source(scratch: Path) -> tuple[SourceConfig, list[SourceFile]]:
    value = json.loads((scratch / "source.json").read_bytes())
    return SourceConfig(**value["source"]), [SourceFile(name, Path(path), size) for name, path, size in value["files"]]


@lru_cache(maxsize=2)
def _setup(scratch: Path) -> tuple[Tokenizer, Path, int]:
    value = json.loads((scratch / "write.json").read_bytes())
    tokenizer = tokenizer_from_json(value["definition"], value["name"], value["config"])
    return tokenizer, Path(value["out"]), value["threshold"]


def _marks(scratch: Path, number: int) -> np.ndarray:
    return np.load(scratch / "marks" / f"{number}.npy", mmap_mode="r", allow_pickle=False)


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value).encode())
