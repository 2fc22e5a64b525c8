"""Where documents come from.

What lives here: text files, JSONL, Parquet, Hugging Face datasets and the standard library's own source, each
as a stream of documents in an order that depends on nothing but the content. What does not: tokens
(`prepare`) and weights between sources (`mixture`).

Order is by path, then by line or row. Zero-length documents are left out and counted, since they would be
nothing but two specials. Names beginning with "." are not looked into.
"""

import difflib
import glob
import gzip
import hashlib
import json
import math
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.data.policy import ENCODING, RECORDS, BadRecord, Policy, left_out, skipped_line
from lmjax.errors import DataError

KINDS = ("pystdlib", "text", "jsonl", "parquet", "hf", "shards")
_FIELD_KINDS = ("jsonl", "parquet", "hf")
# Which files of a folder are looked at; a file or glob given by name may end in anything.
_SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"), "parquet": (".parquet",)}
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip",
                "turtledemo", "encodings", "__pycache__"}


@dataclass
class SourceConfig:
    """One corpus.

    kind            pystdlib | text | jsonl | parquet | hf | shards (a folder made by `lmjax data prepare`)
    path            file, folder or glob; for hf the Hub name or a folder made by `save_to_disk`
    field           the column that holds the text (jsonl, parquet, hf)
    weight          share of training rows, relative to the other sources
    split, subset   which split and configuration of a dataset (hf only)
    encoding_errors for bytes that are no UTF-8: error | replace (with U+FFFD) | skip (the document)
    on_bad_record   for lines and rows that cannot be used (malformed JSON, no such field, text that is no string, bytes
                    that encoding_errors = "error" refuses): error | skip
    max_bad_records how many of them "skip" leaves out before it is an error after all
    goldfish        may the goldfish loss drop targets of this source?
    where           jsonl only: "NAME" reads the records whose field NAME is true (JSON's true, or any value that is not
                    false, null, 0 or empty), "!NAME" the others, also those that have no such field
    """

    kind: str = "pystdlib"
    path: str = ""
    field: str = "text"
    weight: float = 1.0
    split: str = "train"
    subset: str = ""
    encoding_errors: str = "error"
    on_bad_record: str = "error"
    max_bad_records: int = 100
    goldfish: bool = True
    where: str = ""

    def problems(self, prefix: str = "") -> list[str]:
        """Everything wrong with this config, one line each, each beginning with `prefix` and the field."""
        found = []
        if self.kind not in KINDS:
            near = difflib.get_close_matches(str(self.kind), KINDS, 1, 0.0)[0]
            return [f"{prefix}kind = {self.kind!r}: unknown, did you mean {near!r}? One of "
                    f"{', '.join(KINDS)}"]
        if self.kind == "pystdlib" and self.path:
            found.append(f"{prefix}path = {self.path!r}: kind \"pystdlib\" reads no path; remove it or set "
                         "kind")
        elif self.kind != "pystdlib" and not self.path:
            found.append(f"{prefix}path: is empty, kind {self.kind!r} needs one")
        elif self.kind not in ("pystdlib", "hf") and not _exists(self.path):
            found.append(f"{prefix}path = {self.path!r}: no such file, folder or glob match")
        if self.encoding_errors not in ENCODING:
            found.append(f"{prefix}encoding_errors = {self.encoding_errors!r}: must be one of "
                         f"{', '.join(ENCODING)}")
        elif self.encoding_errors != "error" and self.kind in ("hf", "shards"):
            found.append(f"{prefix}encoding_errors = {self.encoding_errors!r}: has no effect on kind "
                         f"{self.kind!r}; remove it")
        found += self._bad_record_problems(prefix)
        if not isinstance(self.weight, int | float) or not (self.weight > 0 and math.isfinite(self.weight)):
            found.append(f"{prefix}weight = {self.weight!r}: must be a finite number above 0; remove the "
                         "source to leave it out")
        if self.kind in _FIELD_KINDS and not self.field:
            found.append(f"{prefix}field: is empty, kind {self.kind!r} needs the name of the text column")
        if self.kind not in _FIELD_KINDS and self.field != "text":
            found.append(f"{prefix}field = {self.field!r}: has no effect on kind {self.kind!r}; remove it")
        for name, value, default in (("split", self.split, "train"), ("subset", self.subset, "")):
            if self.kind != "hf" and value != default:
                found.append(f"{prefix}{name} = {value!r}: has an effect on kind \"hf\" only; remove it")
        if self.where and self.kind != "jsonl":
            found.append(f"{prefix}where = {self.where!r}: has an effect on kind \"jsonl\" only; remove it")
        elif self.where == "!":
            found.append(f"{prefix}where = '!': give the name of a field, such as '!protect'")
        return found


    def _bad_record_problems(self, prefix: str) -> list[str]:
        found = []
        if self.on_bad_record not in RECORDS:
            found.append(f"{prefix}on_bad_record = {self.on_bad_record!r}: must be one of {', '.join(RECORDS)}")
        elif self.on_bad_record != "error" and self.kind in ("pystdlib", "shards"):
            found.append(f"{prefix}on_bad_record = {self.on_bad_record!r}: has no effect on kind {self.kind!r}; remove "
                         "it")
        if self.max_bad_records < 0:
            found.append(f"{prefix}max_bad_records = {self.max_bad_records}: must not be negative")
        if self.on_bad_record == "error" and self.max_bad_records != SourceConfig.max_bad_records:
            found.append(f"{prefix}max_bad_records = {self.max_bad_records}: has no effect with on_bad_record = "
                         "\"error\"; remove it, or set on_bad_record = \"skip\"")
        return found


class Document(NamedTuple):
    """One text and a name for messages: a relative path, `file:line`, or `dataset[row]`."""

    text: str
    name: str


class SourceFile(NamedTuple):
    """A local file that a source reads: path below its root with "/", where it is, bytes."""

    name: str
    path: Path
    size: int


def documents(source: SourceConfig, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Streams the documents of a source, always in the same order.

    Documents left out or altered are counted in `skipped` under "empty" (zero length), "undecodable" and "replaced"
    (encoding_errors; the latter are kept), "malformed", "no_field" and "wrong_type" (on_bad_record = "skip"). Without
    a `skipped` counter one warning at the end reports them. DataError: anything unreadable, naming file and line, row
    or byte; more bad records than max_bad_records; a source without a single document.
    """
    if found := source.problems("source."):
        raise DataError("; ".join(found))
    counts: Counter[str] = Counter() if skipped is None else skipped
    policy = Policy(source.encoding_errors, source.on_bad_record, source.max_bad_records, counts)
    if source.kind == "shards":
        raise DataError(f"{source.path}: kind \"shards\" holds tokens, not documents; read it with "
                        "lmjax.data.Tokens")
    some = False
    for document in _read_hf(source, policy) if source.kind == "hf" else _read_files(source, policy):
        if document.text:
            some = True
            yield document
        else:
            counts["empty"] += 1
    if not some:
        raise no_document(source, counts)
    if skipped is None and counts:
        warnings.warn(f"source {source.kind} {source.path}: " + skipped_line(counts), stacklevel=2)


def no_document(source: SourceConfig, counts: Mapping[str, int]) -> DataError:
    """The error of a source without a single document."""
    left = "".join(f", {count} {reason}" for reason, count in sorted(counts.items()))
    return DataError(f"source {source.kind} {source.path}: holds no document{left}; check the path and the files")


def file_documents(source: SourceConfig, file: SourceFile, policy: Policy,
                   places: Sequence[int] | None = None) -> Iterator[tuple[int, Document]]:
    """The documents of one of a source's files, those of zero length too, each with its place in the file.

    The place is 0 for a file that is one document, the first byte of its line (before compression) in JSONL, its row
    in Parquet. With `places`, ascending, only the documents there are read. DataError: as `documents`.
    """
    readers = {"pystdlib": _read_text, "text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    return readers[source.kind](source, file, policy, places)


def _read_files(source: SourceConfig, policy: Policy) -> Iterator[Document]:
    for file in source_files(source):
        for _, document in file_documents(source, file, policy):
            yield document


def check_budget(source: SourceConfig, skipped: dict[str, int]) -> None:
    """DataError where a prepared folder lacks more bad records than the config now allows."""
    count = left_out(skipped, source.encoding_errors)
    if source.kind != "shards" and count > source.max_bad_records:
        raise DataError(f"source {source.kind} {source.path}: {count} bad records were left out "
                        f"({skipped_line(skipped)}), more than max_bad_records = {source.max_bad_records}; look at the "
                        "data, or raise it")


def source_files(source: SourceConfig) -> list[SourceFile]:
    """The local files of a source, sorted by name; [] for a dataset of the Hub. DataError: none found."""
    if source.kind == "pystdlib":
        return stdlib_files()
    root = Path(source.path).expanduser()
    if source.kind == "hf" and not root.is_dir():
        return []
    if root.is_dir():
        paths = [path for path in _walk(root) if path.name.endswith(_SUFFIXES.get(source.kind, ("",)))]
    elif root.is_file():
        root, paths = root.parent, [root]
    else:
        paths = [Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file()]
        root = _common_folder(paths)
    files = [SourceFile(path.relative_to(root).as_posix(), path, path.stat().st_size) for path in paths]
    if not files:
        endings = " or ".join(_SUFFIXES.get(source.kind, ()))
        raise DataError(f"source {source.kind} {source.path}: no {endings or 'file'} found there; check the "
                        "path")
    return sorted(files)


def stdlib_files() -> list[SourceFile]:
    """The running Python's own library: every .py whose top-level name belongs to it, without its tests.

    Left out, so that the corpus depends on the Python release and not on the machine: third-party folders,
    build configuration, and the parts that distributions cut off (IDLE, lib2to3, ensurepip, turtledemo).
    `encodings` is left out because most of it is tables of characters, which a small model learns to recite.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        parts = Path(folder).relative_to(root).parts
        ours = [name for name in (*folders, *names) if name not in _NOT_LIBRARY
                and (parts or name.removesuffix(".py") in sys.stdlib_module_names)]
        folders[:] = [name for name in folders if name in ours]  # site-packages may hold many times as many files
        for name in names:
            if name in ours and name.endswith(".py"):
                path = Path(folder, name)
                files.append(SourceFile("/".join((*parts, name)), path, path.stat().st_size))
    if not files:
        raise DataError(f"source pystdlib: {root} holds no .py files (a stripped or zipped Python); use "
                        "kind = \"text\"")
    return sorted(files)


def check_outside(source: SourceConfig, out: Path) -> None:
    """DataError where what is written to `out` would become part of the source's own folder."""
    root = Path(source.path).expanduser()
    if not source.path or source.kind == "shards" or not root.is_dir():
        return
    if out.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{out}: lies inside the source folder {source.path}, so the corpus would hold its "
                        "own shards; choose another output folder (out or cache_dir)")


def file_manifest(source: SourceConfig) -> list[dict[str, Any]]:
    """Name, size and sha256 of every local file of the source; [] for a dataset of the Hub."""
    return [{"name": file.name, "size": file.size, "sha256": sha256(file.path)}
            for file in source_files(source)]


def source_key(source: SourceConfig, files: list[dict[str, Any]] | None = None) -> str:
    """sha256 hex of what the source is: kind, settings that change documents, names and content of its files.

    Where the files lie does not matter. Local files are read once; `files` saves that if `file_manifest` was
    just called. A dataset of the Hub is known by its name, split, revision and row count.
    """
    what: dict[str, Any] = {"kind": source.kind, "files": file_manifest(source) if files is None else files}
    if source.kind in _FIELD_KINDS:
        what["field"] = source.field
    if source.kind not in ("hf", "shards"):
        what["encoding_errors"] = source.encoding_errors
    if source.on_bad_record != "error":
        what["on_bad_record"] = source.on_bad_record  # the budget changes no document
    if source.where:
        what["where"] = source.where
    if source.kind == "hf":
        what |= {"split": source.split, "subset": source.subset}
        if not what["files"]:
            what |= {"path": source.path, "revision": _hub_revision(_open_hf(source))}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


# ---- text -----------------------------------------------------------------------------------------------

def _read_text(source: SourceConfig, file: SourceFile, policy: Policy,
               places: Sequence[int] | None) -> Iterator[tuple[int, Document]]:
    text = policy.decode(read_bytes(file.path), str(file.path))
    if text is not None:
        yield 0, Document(text.removeprefix("\ufeff"), file.name)


# ---- jsonl ----------------------------------------------------------------------------------------------

def _read_jsonl(source: SourceConfig, file: SourceFile, policy: Policy,
                places: Sequence[int] | None) -> Iterator[tuple[int, Document]]:
    for number, (place, line) in enumerate(_lines(file.path, places), 1):
        where = f"{file.path}:{number}" if places is None else f"{file.path} byte {place}"
        text = policy.decode(line, where)
        if text is None or not text.strip("\ufeff \t\r\n"):
            continue
        try:
            record = _json_record(text.removeprefix("\ufeff"), source.field, where)
            if source.where and bool(record.get(source.where.removeprefix("!"))) == source.where.startswith("!"):
                continue
            value = policy.whole(record[source.field], where)
        except BadRecord as bad:
            policy.bad(bad)
            continue
        if value is not None:
            yield place, Document(value, f"{file.name}:{number}")


def _lines(path: Path, places: Sequence[int] | None) -> Iterator[tuple[int, bytes]]:
    """Lines, each with its first byte; with `places` those that begin there. A .gz is decompressed from its start."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            if places is None:
                place = 0
                for line in lines:
                    yield place, line
                    place += len(line)
            else:
                for place in places:
                    lines.seek(place)
                    yield place, lines.readline()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip ({error}); fetch or compress the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _json_record(line: str, field: str, where: str) -> dict[str, Any]:
    """The object of a line, whose `field` is a string."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord("malformed", f"{where}: not valid JSON at column {error.colno} ({error.msg}); one JSON object "
                        "a line is needed") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("malformed", f"{where}: JSON that cannot be read ({error}); correct or remove the line"
                        ) from None
    if not isinstance(value, dict):
        raise BadRecord("malformed", f"{where}: a JSON {type(value).__name__}, but one object a line is needed, like "
                        f'{{"{field}": "…"}}')
    if field not in value:
        names = ", ".join(map(ascii, list(value)[:20]))
        raise BadRecord("no_field", f"{where}: no field {field!r}; set field to one of {names or '(none)'}")
    if not isinstance(value[field], str):
        raise BadRecord("wrong_type", f"{where}: field {field!r} is a {type(value[field]).__name__}, not a string; "
                        "correct the line or choose another field")
    return value


# ---- parquet and datasets -------------------------------------------------------------------------------

def _read_parquet(source: SourceConfig, file: SourceFile, policy: Policy,
                  places: Sequence[int] | None) -> Iterator[tuple[int, Document]]:
    arrow, parquet = _import("pyarrow"), _import("pyarrow.parquet")
    row = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            _check_column(table.schema_arrow.names, source, str(file.path))
            kind = table.schema_arrow.field(source.field).type
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise DataError(f"{file.path}: field {source.field!r} is {kind}, not a string; choose "
                                "another field")
            wanted = None if places is None else set(places)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if wanted is not None and wanted.isdisjoint(range(row, row + rows)):
                    row += rows
                    continue
                for batch in table.iter_batches(columns=[source.field], batch_size=1024, row_groups=[group]):
                    # As bytes, so that our policy decides about what is no UTF-8.
                    for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                        if wanted is None or row in wanted:
                            text = policy.decode(value or b"", f"{file.path} row {row}")
                            if text is not None:
                                yield row, Document(text, f"{file.name}:{row}")
                        row += 1
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: cannot be read as Parquet after row {row} "
                        f"({' '.join(str(error).split())}); write or fetch the file again") from None


def _read_hf(source: SourceConfig, policy: Policy) -> Iterator[Document]:
    data = _open_hf(source)
    row = 0
    for batch in data.select_columns([source.field]).iter(batch_size=1024):
        for value in batch[source.field]:
            if value is None or isinstance(value, str):
                yield Document(value or "", f"{source.path}[{row}]")
            else:
                policy.bad(BadRecord("wrong_type", f"{source.path}: field {source.field!r} is a "
                                     f"{type(value).__name__} in row {row}, not a string; choose another field"))
            row += 1


def _open_hf(source: SourceConfig) -> Any:
    datasets = _import("datasets")
    try:
        folder = Path(source.path).expanduser()
        saved = any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
        if saved and not source.subset:
            data = datasets.load_from_disk(str(folder))
            if isinstance(data, dict):
                if source.split not in data:
                    raise DataError(f"{source.path}: no split {source.split!r}; set split to one of "
                                    f"{', '.join(data)}")
                data = data[source.split]
            elif source.split not in ("train", str(data.split)):
                raise DataError(f"{source.path}: no split {source.split!r}; this folder holds one split, "
                                "remove split")
        else:
            data = datasets.load_dataset(source.path, source.subset or None, split=source.split)
    except DataError:
        raise
    except Exception as error:  # offline, unknown name or split, damaged files, …
        raise DataError(f"source hf {source.path}: {type(error).__name__}: "
                        f"{' '.join(str(error).split())[:300]}; check path, subset, split and the "
                        "connection") from None
    _check_column(data.column_names, source, f"source hf {source.path}")
    return data


def _hub_revision(data: Any) -> dict[str, Any]:
    urls = sorted(data.info.download_checksums or {})  # these name the commit
    info = data.info
    return {"rows": len(data), "version": str(info.version), "config": info.config_name, "urls": urls}


def _check_column(names: Iterable[str], source: SourceConfig, where: str) -> None:
    if source.field not in names:
        raise DataError(f"{where}: no field {source.field!r}; set field to one of "
                        f"{', '.join(map(repr, names))}")


def _import(name: str) -> Any:
    package = name.split(".")[0]
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        raise DataError(f"this source needs the package {package!r}; run: pip install "
                        "'lmjax[datasets]'") from None


# ---- files ----------------------------------------------------------------------------------------------

def _exists(path: str) -> bool:
    try:
        expanded = Path(path).expanduser()
        return expanded.exists() or any(glob.iglob(str(expanded), recursive=True))
    except (OSError, ValueError, RuntimeError, re.error):  # too long, holds U+0000, no such user after "~", "[z-a]"
        return False


def _walk(root: Path) -> list[Path]:
    return [path for path in root.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)]


def _common_folder(paths: list[Path]) -> Path:
    parents = [path.parent.parts for path in paths]
    shared = [level[0] for level in zip(*parents, strict=False) if len(set(level)) == 1] if parents else []
    # Only the leading levels may agree; a later coincidence is not a common folder.
    while shared and any(parts[:len(shared)] != tuple(shared) for parts in parents):
        shared.pop()
    return Path(*shared)


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
