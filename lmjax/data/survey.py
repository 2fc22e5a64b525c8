"""A corpus measured file by file, cut into shards from the measures alone, and read back shard by shard.

What lives here: what `prepare` decides with the whole stream of documents before it, decided from 24 bytes a document
instead, so that files can be read, and shards be made, in any order by anyone. What does not: who does it, and what is
written where (`spread`). The rules themselves (split, threshold, cutting) are those of `prepare`, not copies of them.
"""

import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.policy import Policy, too_many
from lmjax.data.prepare import Cutter, position
from lmjax.data.sources import SourceConfig, SourceFile, file_documents, no_document, sha256
from lmjax.data.workers import Plan
from lmjax.errors import DataError

# Of one document: the hash that decides its split, UTF-8 bytes of its text, its place (`sources.file_documents`).
MARK = np.dtype([("position", "<u8"), ("size", "<i8"), ("place", "<i8")])
RANGE = np.dtype([("held", "?"), ("index", "<i8"), ("first_file", "<i8"), ("first", "<i8"), ("last_file", "<i8"),
                  ("last", "<i8")])


@dataclass(frozen=True)
class Survey:
    """What was found in one file, besides the marks of its documents.

    sha256      of the file, or "" and `unreadable` says why there is none
    problem     the DataError that ends the work at this file, if there is one
    counts      of documents left out or altered, as `sources.documents` counts them
    first, left_out  up to three bad records in words, and how many there are
    bytes       of the text of its documents, UTF-8
    """

    sha256: str
    unreadable: str
    problem: str
    counts: dict[str, int]
    first: list[str]
    left_out: int
    documents: int
    bytes: int


class Range(NamedTuple):
    """A shard as a stretch of the stream: those of its documents from `first` to `last` that are of this split.

    Documents are (number of the file, number of the document in it), both included.
    """

    split: str
    index: int
    first: tuple[int, int]
    last: tuple[int, int]

    def row(self) -> tuple[Any, ...]:
        """As a row of RANGE."""
        return self.split == "validation", self.index, *self.first, *self.last

    @staticmethod
    def of(row: Any) -> "Range":
        held, index, first_file, first, last_file, last = row.tolist()
        return Range("validation" if held else "train", index, (first_file, first), (last_file, last))


def survey_file(source: SourceConfig, file: SourceFile) -> tuple[Survey, np.ndarray]:
    """Reads a file whole, and returns its survey and the marks [documents] of what it holds."""
    try:
        digest = sha256(file.path)
    except DataError as error:
        return Survey("", str(error), "", {}, [], 0, 0, 0), np.zeros(0, MARK)
    policy = Policy(source.encoding_errors, source.on_bad_record, source.max_bad_records, Counter())
    positions, sizes, places = array("Q"), array("q"), array("q")
    problem = ""
    try:
        for place, document in file_documents(source, file, policy):
            if not document.text:
                policy.counts["empty"] += 1
                continue
            positions.append(position(document.text))
            sizes.append(len(document.text.encode()))
            places.append(place)
    except DataError as error:
        problem = str(error)
    marks = np.zeros(len(sizes), MARK)
    for name, values in (("position", positions), ("size", sizes), ("place", places)):
        marks[name] = values
    return Survey(digest, "", problem, dict(policy.counts), policy.first, policy.left_out, len(sizes),
                  sum(sizes)), marks


def file_list(files: Sequence[SourceFile], surveys: Sequence[Survey]) -> list[dict[str, Any]]:
    """As `sources.file_manifest`. DataError: a file that cannot be read."""
    for survey in surveys:
        if survey.unreadable:
            raise DataError(survey.unreadable)
    return [{"name": file.name, "size": file.size, "sha256": survey.sha256}
            for file, survey in zip(files, surveys, strict=True)]


def skipped_documents(source: SourceConfig, surveys: Iterable[Survey]) -> dict[str, int]:
    """What reading all files in order counts. DataError: the first that this reading would have ended with."""
    counts: Counter[str] = Counter()
    first: list[str] = []
    budget, left_out, some = source.max_bad_records, 0, False
    for survey in surveys:
        first = [*first, *survey.first][:3]
        left_out += survey.left_out
        if left_out > budget:  # reading in order would have stopped at the first record beyond it
            raise too_many(first[:budget + 1], budget + 1, budget)
        if survey.problem:
            raise DataError(survey.problem)
        counts.update(survey.counts)
        some = some or survey.documents > 0
    if not some:
        raise no_document(source, counts)
    return dict(sorted(counts.items()))


def ranges(marks: Iterable[np.ndarray], threshold: int, shard_bytes: int) -> Iterator[Range]:
    """Cuts the stream into shards, from the marks of each file in order."""
    cutter = Cutter(shard_bytes)
    begun: dict[str, tuple[int, int]] = {}
    ends: dict[str, tuple[int, tuple[int, int]]] = {}
    for file, of_file in enumerate(marks):
        held = (of_file["position"] < np.uint64(threshold)).tolist()
        for number, (is_held, size) in enumerate(zip(held, of_file["size"].tolist(), strict=True)):
            split, here = "validation" if is_held else "train", (file, number)
            index, full = cutter.add(split, size)
            begun.setdefault(split, here)
            ends[split] = (index, here)
            if full:
                yield Range(split, index, begun.pop(split), here)
    for split, first in begun.items():
        yield Range(split, ends[split][0], first, ends[split][1])


def read_range(source: SourceConfig, files: Sequence[SourceFile], marks_of: Callable[[int], np.ndarray],
               threshold: int, wanted: Range) -> Plan:
    """The documents of one shard. DataError: a file is not what it was when it was surveyed."""
    texts: list[str] = []
    (first_file, first), (last_file, last) = wanted.first, wanted.last
    for number in range(first_file, last_file + 1):
        marks = marks_of(number)
        part = marks[first if number == first_file else 0:last + 1 if number == last_file else None]
        part = part[(part["position"] < np.uint64(threshold)) == (wanted.split == "validation")]
        if len(part):
            texts += _read_marked(source, files[number], part)
    return Plan(wanted.split, wanted.index, texts)


def _read_marked(source: SourceConfig, file: SourceFile, marks: np.ndarray) -> Iterator[str]:
    # All of these were good documents; one that is not now shows in the comparison, whatever the policy.
    policy = Policy(source.encoding_errors, "skip", sys.maxsize, Counter())
    found = file_documents(source, file, policy, marks["place"].tolist())
    for document, expected in zip_longest(found, marks["position"].tolist()):
        if document is None or expected is None or position(document[1].text) != expected:
            raise DataError(f"{file.path}: has changed while the corpus was prepared; run again when nothing writes to "
                            "it")
        yield document[1].text
