"""What happens to a record that cannot be used: it ends the work, or it is left out and counted, within a budget.

What lives here: the decision, the counts and their words. What does not: finding such records (`sources`). A record
is a file of kind text, a line of JSONL, a row of Parquet or of a dataset. A file that is broken as a whole (a gzip cut
short, a Parquet file without its end) is no record: how much it lacks is not known, so it always ends the work.
"""

from collections import Counter
from collections.abc import Mapping

from lmjax.errors import DataError

ENCODING = ("error", "replace", "skip")
RECORDS = ("error", "skip")
# What `on_bad_record` decides about. "undecodable" is one of them where encoding_errors is "error".
BAD = {"malformed": "left out as malformed JSON", "no_field": "left out without the text field",
       "wrong_type": "left out, their text field being no string"}
_WORDS = BAD | {"empty": "of zero length left out", "undecodable": "left out for bytes that are no UTF-8",
                "replaced": "kept with U+FFFD for bytes that are no UTF-8"}


class BadRecord(Exception):
    """A record that cannot be used: `reason` is one of BAD or "undecodable"; the message names the place and the
    fix."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Policy:
    """The settings of one source with the counts of one pass over it.

    encoding: error | replace | skip. records: error | skip. budget: bad records that "skip" may leave out.
    """

    def __init__(self, encoding: str, records: str, budget: int, counts: Counter[str]) -> None:
        self.encoding, self.records, self.budget, self.counts = encoding, records, budget, counts
        self.first: list[str] = []  # where the first three bad records are, and what they lack
        self.left_out = 0

    def decode(self, data: bytes, where: str) -> str | None:
        """Text of `data`; None where it is left out. DataError as `bad`."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            found = (f"{where}: byte {error.start} is 0x{data[error.start]:02x}, which is no UTF-8; convert the file, "
                     "or set encoding_errors = \"replace\" or \"skip\"")
        return data.decode("utf-8", errors="replace") if self._replaces(found) else None

    def whole(self, text: str, where: str) -> str | None:
        r"""JSON can spell half a character ("\ud800"), which UTF-8 cannot hold: the same policy applies."""
        try:
            text.encode("utf-8")
            return text
        except UnicodeEncodeError as error:
            found = (f"{where}: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which "
                     "UTF-8 cannot hold; correct it, or set encoding_errors = \"replace\" or \"skip\"")
        # Via UTF-16, since two halves that belong together make one good character.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if self._replaces(
            found) else None

    def _replaces(self, problem: str) -> bool:
        if self.encoding == "error":
            self.bad(BadRecord("undecodable", problem))
        else:
            self.counts["replaced" if self.encoding == "replace" else "undecodable"] += 1
        return self.encoding == "replace"

    def bad(self, record: BadRecord) -> None:
        """Counts a bad record. DataError: the policy is "error", or the budget is used up."""
        if self.records == "error":
            raise DataError(f"{record}, or set on_bad_record = \"skip\"")
        self.counts[record.reason] += 1
        self.left_out += 1
        if len(self.first) < 3:
            self.first.append(str(record).partition(";")[0])
        if self.left_out > self.budget:
            raise too_many(self.first, self.left_out, self.budget)


def too_many(first: list[str], count: int, budget: int) -> DataError:
    """The error of `count` bad records, one more than allowed; `first` names up to three of them."""
    return DataError(f"{'; '.join(first)}{'; …' if count > 3 else ''}: more than max_bad_records = {budget} bad "
                     "records; look at the data, or raise it")


def left_out(counts: Mapping[str, int], encoding: str) -> int:
    """Bad records among what a pass counted: those that the budget is for."""
    return sum(counts.get(reason, 0) for reason in (*BAD, *(("undecodable",) if encoding == "error" else ())))


def skipped_line(counts: Mapping[str, int]) -> str:
    """What was counted, in words; "" for nothing."""
    return ", ".join(f"{counts[reason]:,} documents {text}" for reason, text in _WORDS.items() if counts.get(reason))
