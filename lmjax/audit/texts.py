"""The documents that are audited: from files, or from what a run was trained on and what it held out.

What lives here: reading, merging equal documents, taking an even share. What does not: tokens (`lmjax.audit.probes`).
A line of .jsonl may say, beside `text`, its `id`, `count` (how often the model saw it) and `source`.
"""

import dataclasses
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmjax.analyze.output import read_files
from lmjax.data import Corpus, Tokens, prepare_all
from lmjax.errors import DataError
from lmjax.interop.load import Opened, open_run, what_is

RUN_LIMIT = 500  # documents of a run that are looked at where no limit is given
_TOLD = 10


@dataclasses.dataclass(frozen=True)
class Text:
    """count: how often the model saw it, as far as is known; 0 for a document that was held out."""

    text: str
    name: str
    count: int = 1
    source: str = ""


class Texts(NamedTuple):
    """texts: merged, `given` before. note: what a reader should know of where they come from, or ""."""

    texts: list[Text]
    given: int
    note: str = ""


def read_texts(path: str, limit: int | None = None) -> Texts:
    """Documents of a text file, a folder of text, .jsonl(.gz) or .parquet; equal ones become one, their counts added
    up. limit: at most so many different ones, evenly spread. Raises DataError for what cannot be read or is empty."""
    if path.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
        found = list(_jsonl(Path(path)))
    else:
        found = [Text(document.text, document.name) for document in read_files([path])]
    if not found:
        raise DataError(f"{path}: holds no document; give a file with text")
    return Texts(_even(_merged(found), limit), len(found))


def read_run(path: str, limit: int | None = None) -> tuple[Texts, Texts | None]:
    """What a run was trained on, and what it held out of the same sources (None: nothing).

    Documents are decoded from the token shards that the run was trained on. Raises DataError where those are not what
    they were.
    """
    opened = open_run(path)
    corpus = prepare_all(opened.run.data)
    if corpus.fingerprint != opened.meta["corpus"]["fingerprint"]:
        raise DataError(f"{path}: was trained on other data than its data.sources give now; bring the old files or "
                        "Python version back, or give the documents as a file")
    share = RUN_LIMIT if limit is None else limit
    note = f"an even share of at most {share:,} documents of each split of {path} (--limit)"
    trained, held = (_split(corpus, split, share) for split in ("train", "validation"))
    return (Texts(trained, len(trained), note),
            Texts([dataclasses.replace(t, count=0) for t in held], len(held), note) if held else None)


def is_run(path: str) -> bool:
    """Whether a path is a run folder, as opposed to text."""
    return (Path(path) / "config.json").is_file() and what_is(Path(path)) == "run"


def goldfish_of(opened: Opened):
    """The GoldfishConfig that a run was trained with; None for another model, or one without."""
    if opened.run is None or opened.run.objective.goldfish.strategy == "none":
        return None
    return opened.run.objective.goldfish


def _split(corpus: Corpus, split: str, limit: int) -> list[Text]:
    found = []
    for folder, manifest in zip(corpus.folders, corpus.manifests, strict=True):
        if split not in manifest.splits:
            continue
        tokens = Tokens(folder, split, manifest)
        kind, path = manifest.source["kind"], manifest.source["path"]
        source = f"{kind} {Path(path).name}".strip()
        share = max(1, limit // len(corpus.folders))
        for number in _spread(tokens.documents, share):
            found.append(Text(corpus.tokenizer.decode(tokens.document(number)), f"{source} {split}:{number}", 1,
                              source))
    return _merged([text for text in found if text.text])


def _jsonl(path: Path) -> Iterator[Text]:
    """One object a line. Raises DataError that names every bad line, up to _TOLD."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a .jsonl file with a field text") from None
    bad: list[str] = []
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        text = _record(line, f"{path}:{number}", f"{path.name}:{number}")
        if isinstance(text, str):
            bad.append(text)
        elif text.text:
            found.append(text)
    if bad:
        more = [f"… and {len(bad) - _TOLD:,} more lines"] if len(bad) > _TOLD else []
        raise DataError(*bad[:_TOLD], *more)
    yield from found


def _record(line: bytes, where: str, name: str) -> Text | str:
    """A line as a Text, or what is wrong with it."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"{where}: JSON that cannot be read ({error}); correct or remove the line"
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        return f'{where}: needs a string in the field text, like {{"text": "…", "count": 3}}'
    count = value.get("count", 1)
    if type(count) is not int or not 0 <= count < 2**53:
        return f"{where}: count={count!r:.40}: must be a whole number from 0; it says how often the model saw the text"
    name, source = value.get("id", name), value.get("source", "")
    if not isinstance(name, str | int) or not isinstance(source, str):
        return f"{where}: id must be a string or a number, and source a string"
    return Text(value["text"], str(name), count, source)


def _merged(texts: Sequence[Text]) -> list[Text]:
    """Equal documents as one, with the sum of their counts and the name of the first."""
    found: dict[str, Text] = {}
    for text in texts:
        first = found.get(text.text)
        found[text.text] = text if first is None else dataclasses.replace(first, count=first.count + text.count)
    return list(found.values())


def _spread(count: int, limit: int) -> list[int]:
    return list(range(count)) if count <= limit else (np.arange(limit) * count // limit).tolist()


def _even(texts: list[Text], limit: int | None) -> list[Text]:
    return texts if limit is None else [texts[i] for i in _spread(len(texts), limit)]
