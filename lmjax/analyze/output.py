"""What the commands of this room share: texts from files, tables, progress, files that are written.

Nothing here computes anything about a model.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmjax.data import Document, SourceConfig, documents
from lmjax.errors import ConfigError
from lmjax.log import format_count, format_duration, printable


def read_files(paths: Sequence[str]) -> Iterator[Document]:
    """The documents of text files, .jsonl and .parquet. Raises DataError for what cannot be read."""
    for path in paths:
        name = path.removesuffix(".gz")
        kind = "jsonl" if name.endswith(".jsonl") else "parquet" if name.endswith(".parquet") else "text"
        yield from documents(SourceConfig(kind, path))


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first `left` of them to the left; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i < left else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)


def visible(text: str) -> str:
    """One line in which every white space can be seen: ' a\\n' -> '␣a↵'."""
    for there, shown in (("\r\n", "↵"), ("\n", "↵"), ("\r", "␍"), ("\t", "⇥"), (" ", "␣")):
        text = text.replace(there, shown)
    return printable(text)


def say(text: str = "") -> None:
    """A line that is seen at once, also in a pipe."""
    print(text, flush=True)


class Progress:
    """Tokens done, said on stderr: in place on a terminal, else now and then."""

    def __init__(self, what: str, total: int | None = None):
        self.what, self.total = what, total
        self.began = self.said = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said < (0.2 if self.terminal else 20):
            return
        self.said = now
        rate = done / (now - self.began)
        left = ""
        if self.total:
            left = f" of {format_count(self.total)}, {format_duration((self.total - done) / rate)} left"
        line = f"{self.what} {format_count(done)} tokens{left}  {format_count(rate)} tok/s"
        print(f"\r\x1b[2K{line}" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr,
              flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def writable(*paths: Path | None) -> None:
    """Raises ConfigError where a file cannot be made, before the work and not after it."""
    bad = []
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            bad.append(f"{path}: is a folder; give the name of a file in it")
        elif not path.parent.is_dir():
            bad.append(f"{path}: its folder does not exist; make it, or give another name")
    if bad:
        raise ConfigError(*bad)


def write_text(path: Path, text: str) -> None:
    """Raises OSError, which the command line tells in one line."""
    path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    say(f"wrote {path}")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False) + "\n")


def short(value: float | None, digits: int = 3) -> str:
    """A number for a table; '' for None."""
    return "" if value is None else f"{value:,.{digits}f}"
