"""`lmjax data overlap` and `lmjax data dedup`: arguments in, a report out. The work is in `overlap` and `dedup`."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lmjax.data.dedup import Found, dedup
from lmjax.data.manifest import write_atomically
from lmjax.data.overlap import UNITS, Side, cutter, jsonl, overlap, without, write_rest
from lmjax.data.sources import KINDS, SourceConfig, documents
from lmjax.data.tokenizers import load_tokenizer
from lmjax.errors import ConfigError


def run_overlap(args: list[str]) -> int:
    """`lmjax data overlap A B`. Raises ConfigError for wrong options, DataError for corpora that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="lmjax data overlap", allow_abbrev=False,
        description="Find the n-grams that two corpora share, exactly, and on request write A without them: A is what "
                    "a model will be trained on, B what it will be tested on. Text is compared without case, accents, "
                    "layout and punctuation. B is held in memory, in parts if need be; A is streamed.")
    parser.add_argument("a", metavar="A", help="file, folder or glob of text, JSONL or Parquet")
    parser.add_argument("b", metavar="B", help="the same")
    _add_common(parser)
    parser.add_argument("--n", type=int, default=13, metavar="N", help="units in a row (default: %(default)s)")
    parser.add_argument("--unit", choices=UNITS, default="words")
    parser.add_argument("--tokenizer", default="", help="for --unit tokens: bytes, a tokenizer.json or a Hub id")
    parser.add_argument("--no-normalise", action="store_true", help="compare words or characters as they are")
    parser.add_argument("--memory", type=float, default=1.0, metavar="GB",
                        help="for the index of B; if it does not fit, A is read several times (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.0, metavar="S",
                        help="--remove and --cut touch documents of which at least this share of units is shared "
                             "(default: any)")
    parser.add_argument("--remove", type=Path, metavar="OUT", help="write A without these documents, as JSONL")
    parser.add_argument("--cut", type=Path, metavar="OUT", help="write A without the shared stretches, as JSONL")
    given = parser.parse_args(args)
    a, b = _source(given, given.a), _source(given, given.b)
    bad = _problems(a, "A") + _problems(b, "B") + _outputs(given, ("remove", "cut", "json"))
    if given.n < 1:
        bad.append(f"--n {given.n}: must be at least 1")
    if not given.memory > 0:
        bad.append(f"--memory {given.memory}: must be above 0 GB")
    if not 0 <= given.threshold <= 1:
        bad.append(f"--threshold {given.threshold}: must be from 0 to 1")
    if given.threshold and not (given.remove or given.cut):
        bad.append(f"--threshold {given.threshold}: has no effect without --remove or --cut")
    if (given.unit == "tokens") != bool(given.tokenizer):
        bad.append(f"--unit {given.unit}, --tokenizer {given.tokenizer!r}: tokens need a tokenizer, and nothing else "
                   "does")
    if given.unit == "tokens" and given.no_normalise:
        bad.append("--no-normalise: has no effect on tokens; remove it")
    _raise(bad)
    tokenizer = load_tokenizer(given.tokenizer) if given.tokenizer else None
    began = time.monotonic()
    side_a, side_b = overlap(a, b, cutter(given.unit, not given.no_normalise, tokenizer), given.n,
                             int(given.memory * 2**30), _teller())
    print(f"compared      {given.n}-grams of {given.unit}, {time.monotonic() - began:.1f} s")
    for name, side, path in (("A", side_a, given.a), ("B", side_b, given.b)):
        print(_side_line(name, side, path))
    _top(side_a)
    if given.json:
        settings = {"n": given.n, "unit": given.unit, "normalised": not given.no_normalise and given.unit != "tokens"}
        _write_json(given.json, settings | {name: side.summary() | {"hits": [asdict(hit) for hit in side.hits]}
                                            for name, side in (("a", side_a), ("b", side_b))})
    for out, cut_out in ((given.remove, False), (given.cut, True)):
        if out:
            count, size = write_rest(a, side_a.hits, out, given.threshold, cut_out)
            print(f"written       {out}: {count:,} documents, {size:,} characters")
    return 0


def _side_line(name: str, side: Side, path: str) -> str:
    s = side.summary()
    short = f", {s['too_short']:,} too short for one" if s["too_short"] else ""
    return (f"{name:<13} {path}: {s['documents_with_overlap']:,} of {s['documents']:,} documents overlap, "
            f"{s['units_shared']:,} of {s['units']:,} units ({s['share']:.2%}){short}")


def _top(side: Side, count: int = 10) -> None:
    for hit in sorted(side.hits, key=lambda hit: (-hit.share, hit.number))[:count]:
        print(f"  {hit.share:7.2%}  {hit.name}  ({hit.shared:,} of {hit.units:,} units, {len(hit.spans):,} stretches)")


def run_dedup(args: list[str]) -> int:
    """`lmjax data dedup PATH`. Raises ConfigError for wrong options, DataError for a corpus that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="lmjax data dedup", allow_abbrev=False,
        description="Find copies within a corpus: documents with the same words (always), near copies (--near), equal "
                    "stretches of text (--substring); and on request write it without them. The first copy is kept.")
    parser.add_argument("path", metavar="PATH", help="file, folder or glob of text, JSONL or Parquet")
    _add_common(parser)
    parser.add_argument("--near", type=float, default=0.0, metavar="J",
                        help="also documents whose sets of --n words have this Jaccard similarity, such as 0.8")
    parser.add_argument("--n", type=int, default=5, metavar="N", help="words of --near (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of --near's permutations (default: %(default)s)")
    parser.add_argument("--substring", type=int, default=0, metavar="BYTES",
                        help="also stretches of at least so many bytes that stand earlier, such as 200")
    parser.add_argument("--out", type=Path, metavar="OUT", help="write what is kept, as JSONL")
    given = parser.parse_args(args)
    source = _source(given, given.path)
    bad = _problems(source, "PATH") + _outputs(given, ("out", "json"))
    if not 0 <= given.near <= 1:
        bad.append(f"--near {given.near}: a similarity from 0 (off) to 1")
    if given.n < 1:
        bad.append(f"--n {given.n}: must be at least 1")
    if not 0 <= given.seed < 2**32:
        bad.append(f"--seed {given.seed}: must be from 0 to 2^32 - 1")
    if not given.near and (given.n != 5 or given.seed != 1):
        bad.append("--n, --seed: have no effect without --near")
    if given.substring and given.substring < 8:
        bad.append(f"--substring {given.substring}: at least 8 bytes, or 0 for none")
    _raise(bad)
    began = time.monotonic()
    found = dedup(source, near=given.near, n=given.n, substring=given.substring, seed=given.seed, tell=_teller())
    rules = Counter(copy.rule for copy in found.copies)
    cut = sum(end - start for spans in found.spans.values() for start, end in spans)
    print(f"read          {len(found.names):,} documents, {time.monotonic() - began:.1f} s")
    print(f"exact         {rules['exact']:,} copies")
    if given.near:
        print(f"near          {rules['near']:,} copies of similarity {given.near} or more")
    if given.substring:
        print(f"substring     {cut:,} characters in {len(found.spans):,} documents stand earlier")
    if given.json:
        _write_json(given.json, _dedup_report(found, given))
    if given.out:
        count = _write_kept(source, found, given.out)
        print(f"written       {given.out}: {count:,} documents")
    return 0


def _dedup_report(found: Found, given: argparse.Namespace) -> dict:
    clusters: dict[int, list[dict]] = {}
    for copy in found.copies:
        clusters.setdefault(copy.of, []).append(
            {"number": copy.number, "name": copy.name, "rule": copy.rule, "similarity": round(copy.similarity, 6)})
    return {"near": given.near, "n": given.n, "substring": given.substring, "documents": len(found.names),
            "clusters": [{"kept": number, "name": found.names[number], "left_out": copies}
                         for number, copies in sorted(clusters.items())],
            "cut": [{"number": number, "name": found.names[number], "spans": spans}
                    for number, spans in found.spans.items()]}


def _write_kept(source: SourceConfig, found: Found, out: Path) -> int:
    count, left_out = 0, found.left_out
    with jsonl(out) as write:
        for number, document in enumerate(documents(source)):
            text = without(document.text, found.spans.get(number, []))
            if number not in left_out and text.strip():
                write(text, document.name)
                count += 1
    return count


# ---- What both share -----------------------------------------------------------------------------------


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=[kind for kind in KINDS if kind not in ("shards", "hf", "pystdlib")],
                        help="what the files are (default: told by their ending, else text)")
    parser.add_argument("--field", default="text", help="column of the text in jsonl and parquet (default: text)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")


def _source(given: argparse.Namespace, path: str) -> SourceConfig:
    plain = path.removesuffix(".gz")
    kind = given.kind or ("jsonl" if plain.endswith((".jsonl", ".ndjson")) else
                          "parquet" if plain.endswith(".parquet") else "text")
    return SourceConfig(kind, path, given.field if kind in ("jsonl", "parquet") else "text")


def _problems(source: SourceConfig, name: str) -> list[str]:
    return [f"{name}: {problem}" for problem in source.problems()]


def _outputs(given: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """No file is written over, nor two results into one."""
    paths = {name: getattr(given, name) for name in names if getattr(given, name)}
    bad = [f"--{name} {path}: exists already; choose another name" for name, path in paths.items() if path.exists()]
    if len({path.resolve() for path in paths.values()}) < len(paths):
        bad.append(f"{', '.join('--' + name for name in paths)}: give each a file of its own")
    return bad


def _raise(bad: list[str]) -> None:
    if bad:
        raise ConfigError(*bad)


def _write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(value) + "\n").encode())


def _teller() -> Callable[[str], None]:
    """Progress on stderr: at once on a terminal, else a line every ten seconds."""
    last = [time.monotonic()]

    def tell(line: str) -> None:
        if sys.stderr.isatty() or time.monotonic() - last[0] >= 10:
            last[0] = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return tell
