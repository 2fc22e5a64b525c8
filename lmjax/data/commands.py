"""`lmjax data …` and `lmjax tokenizer …`: arguments in, a summary on the terminal out.

What lives here: argparse, the progress bar and the summaries. What does not: the work (`prepare`, `mixture`,
`tokenizers`) and printing of errors, which `lmjax.cli` does in one line.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lmjax.data.manifest import Manifest, load_manifest
from lmjax.data.mixture import DataConfig, prepared_folder, resolve_tokenizer
from lmjax.data.policy import ENCODING, RECORDS, skipped_line
from lmjax.data.prepare import SHARD_BYTES, prepare
from lmjax.data.prepare import Progress as Finished
from lmjax.data.shards import Tokens
from lmjax.data.sources import KINDS, SourceConfig, documents, source_key
from lmjax.data.tokenizers import MAX_BPE, Tokenizer, load_tokenizer, train_bpe
from lmjax.errors import ConfigError


def run_prepare(args: list[str]) -> int:
    """`lmjax data prepare`: a corpus becomes a folder of token shards."""
    parser = argparse.ArgumentParser(
        prog="lmjax data prepare",
        description="Turn a corpus into token shards with a manifest. Without PATH the corpus "
                    "is "
                    "the standard library of this Python, which needs no download. A run that was stopped "
                    "goes "
                    "on where it was when the same command is given again.")
    _add_source(parser)
    parser.add_argument("--tokenizer", default="bytes", help="bytes | bpe (trained on this corpus) | path "
                                                             "of a "
                        "tokenizer.json | Hub id (default: bytes)")
    parser.add_argument("--bpe-vocab-size", type=int, default=DataConfig.bpe_vocab_size, metavar="N",
                        help="vocabulary for --tokenizer bpe (default: %(default)s)")
    parser.add_argument("--validation-fraction", type=float, metavar="F",
                        default=DataConfig.validation_fraction,
                        help="share of the text to hold out (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write (default: a name made from the corpus, "
                                                 "below "
                        "--cache-dir, where training finds it again)")
    parser.add_argument("--cache-dir", default=DataConfig.cache_dir, metavar="DIR",
                        help="folder of prepared corpora (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: every core)")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N",
                        help="text in one shard; needs --out (default: %(default)s)")
    parser.add_argument("--beam", default="", metavar="RUNNER",
                        help="on several machines, by Apache Beam: direct | dataflow | flink | spark | portable; needs "
                             "--out, which all of them see under that path, as they do PATH")
    parser.add_argument("--beam-option", action="append", default=[], metavar="KEY=VALUE",
                        help="an option of Beam's, such as direct_num_workers=4 (repeatable)")
    given = parser.parse_args(args)
    _raise_problems(_beam_problems(given))
    if given.shard_bytes != SHARD_BYTES and given.out is None:
        raise ConfigError("--shard-bytes: other shards than the default need --out, since training would not "
                          "look for them below --cache-dir")
    source = _source(given)
    cfg = DataConfig((source,), given.tokenizer, given.bpe_vocab_size, given.validation_fraction,
                     given.cache_dir, given.workers)
    _raise_problems(cfg.problems("--"))
    if given.beam:
        return _prepare_on_beam(given, source, cfg)
    key = source_key(source)
    tokenizer = resolve_tokenizer(cfg, [key])
    out = given.out or prepared_folder(cfg, source, tokenizer, key)
    with progress_bar(f"{source.kind} -> {tokenizer.name}") as progress:
        manifest = prepare(source, tokenizer, out, validation_fraction=given.validation_fraction,
                           workers=given.workers, shard_bytes=given.shard_bytes, progress=progress, key=key)
    print(describe(manifest, out))
    return 0


def _beam_problems(given: argparse.Namespace) -> list[str]:
    found = []
    if given.beam and given.out is None:
        found.append(f"--beam {given.beam}: needs --out, a folder that every worker sees under the same path")
    if given.beam and given.workers:
        found.append(f"--workers {given.workers}: has no effect with --beam; give the runner's own option, such as "
                     f"--beam-option direct_num_workers={given.workers}")
    if given.beam_option and not given.beam:
        found.append(f"--beam-option {given.beam_option[0]}: has no effect without --beam")
    return found


def _prepare_on_beam(given: argparse.Namespace, source: SourceConfig, cfg: DataConfig) -> int:
    from lmjax.data.beam import BeamEngine
    from lmjax.data.spread import prepare_spread

    title = f"{source.kind} -> {cfg.tokenizer}"
    with progress_bar(title) as progress:
        manifest = prepare_spread(source, lambda key: resolve_tokenizer(cfg, [key]), given.out,
                                  BeamEngine(given.beam, given.beam_option), progress=progress,
                                  validation_fraction=given.validation_fraction, shard_bytes=given.shard_bytes,
                                  surveyed=_told_sometimes(title))
    print(describe(manifest, given.out))
    return 0


def _told_sometimes(title: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def surveyed(done: int, files: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{title}: {done:,} of {files:,} files surveyed", file=sys.stderr, flush=True)

    return surveyed


def run_inspect(args: list[str]) -> int:
    """`lmjax data inspect`: what a prepared folder holds, and whether it is whole."""
    parser = argparse.ArgumentParser(prog="lmjax data inspect", description="Show a prepared folder: counts, "
                                     "tokenizer, the first documents as text; read every shard and compare "
                                     "it with the manifest.")
    parser.add_argument("folder", type=Path, help="folder made by `lmjax data prepare`")
    parser.add_argument("--documents", type=int, default=2, metavar="N",
                        help="documents of each split to print (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=400, metavar="N",
                        help="characters of each to print (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="do not read the shards to check their "
                                                                 "hashes")
    given = parser.parse_args(args)
    manifest = load_manifest(given.folder)
    print(describe(manifest, given.folder))
    splits = [Tokens(given.folder, name, manifest) for name in manifest.splits]
    if not given.no_verify:
        for tokens in splits:
            tokens.verify(hashes=True)
        print(f"verified      {sum(len(tokens.shards) for tokens in splits)} shards: hashes, offsets, token "
              "ids")
    tokenizer = load_tokenizer(str(given.folder))
    for tokens in splits:
        for number in range(min(given.documents, tokens.documents)):
            ids = tokens.document(number)
            text = tokenizer.decode(ids)
            more = f" … {len(text) - given.characters:,} more" if len(text) > given.characters else ""
            print(f"\n--- {tokens.split} document {number}: {len(ids):,} tokens, {len(text):,} characters")
            print(printable(text[:given.characters]) + more)
    return 0


def run_tokenizer_train(args: list[str]) -> int:
    """`lmjax tokenizer train`: a byte-level BPE from a corpus."""
    parser = argparse.ArgumentParser(
        prog="lmjax tokenizer train",
        description="Train a byte-level BPE and write tokenizer.json. Without PATH it is trained on the "
                    "standard "
                    "library of this Python. Held-out documents are used too: for a run whose validation "
                    "must not "
                    "be seen, set tokenizer = \"bpe\" in its config instead.")
    _add_source(parser)
    parser.add_argument("--vocab-size", type=int, default=DataConfig.bpe_vocab_size, metavar="N",
                        help="tokens, of which 257 are bytes and <|document|> (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("tokenizer.json"), help="file to write (default: "
                                                                                 "%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    given = parser.parse_args(args)
    if not 257 <= given.vocab_size <= MAX_BPE:
        raise ConfigError(f"--vocab-size {given.vocab_size}: must be from 257 to {MAX_BPE}")
    if given.out.exists() and not given.force:
        raise ConfigError(f"--out {given.out}: exists already; choose another name or give --force")
    source = _source(given)
    _raise_problems(source.problems("--"))
    began = time.monotonic()
    skipped: Counter[str] = Counter()
    tokenizer = train_bpe((document.text for document in documents(source, skipped)), given.vocab_size)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(given.out)
    print(f"trained       {tokenizer.vocab_size:,} tokens in {time.monotonic() - began:.1f} s")
    print(_describe_tokenizer(tokenizer, given.out))
    if skipped:
        print(f"note          {skipped_line(skipped)}")
    return 0


def run_tokenizer_show(args: list[str]) -> int:
    """`lmjax tokenizer show`: what a tokenizer is, and how it cuts a text."""
    parser = argparse.ArgumentParser(prog="lmjax tokenizer show", description="Describe a tokenizer and "
                                                                              "show how "
                                     "it cuts a text.")
    parser.add_argument("tokenizer", nargs="?", default="bytes", help="bytes | path | Hub id (default: "
                                                                      "bytes)")
    parser.add_argument("--text", default="def add(a, b):\n    return a + b  # 12345\n", help="text to cut")
    given = parser.parse_args(args)
    tokenizer = load_tokenizer(given.tokenizer)
    ids = tokenizer.encode(given.text)
    size = len(given.text.encode())
    print(_describe_tokenizer(tokenizer, given.tokenizer))
    print(f"the text      {size} bytes, {len(ids)} tokens, {size / max(1, len(ids)):.2f} bytes per token")
    print(" ".join(f"{printable(tokenizer.decode([index]))!r}:{index}" for index in ids.tolist()))
    return 0


def run_overlap(args: list[str]) -> int:
    from lmjax.data.corpora import run_overlap

    return run_overlap(args)


def run_dedup(args: list[str]) -> int:
    from lmjax.data.corpora import run_dedup

    return run_dedup(args)


def describe(manifest: Manifest, folder: Path) -> str:
    """A prepared folder in a few lines for people."""
    source, tokenizer = manifest.source, manifest.tokenizer
    what = source["kind"] + (f" of Python {source['python']}" if "python" in source else f" {source['path']}")
    lines = [f"where         {folder}", f"source        {what}",
             f"tokenizer     {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, {manifest.dtype}"]
    for name, split in manifest.splits.items():
        ratio = f"{split.bytes / split.tokens:.2f} bytes per token, " if split.tokens else ""
        lines.append(f"{name:<13} {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} "
                     "bytes, "
                     f"{ratio}{len(split.shards)} shards")
    if manifest.skipped:
        lines.append(f"note          {skipped_line(manifest.skipped)}")
    return "\n".join([*lines, f"fingerprint   {manifest.fingerprint}"])


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[Finished], None]]:
    """A rich bar on a terminal; one line every ten seconds in a log. Gives the callback for `prepare`."""
    if not sys.stderr.isatty():
        yield _plain_progress(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[counts]}"),
               TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, counts="")

        def update(now: Finished) -> None:
            bar.update(task, completed=now.bytes, total=now.total_bytes or None, counts=_counts(now))

        yield update


def _plain_progress(title: str) -> Callable[[Finished], None]:
    last = time.monotonic()

    def update(now: Finished) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{title}: {_counts(now)}", file=sys.stderr, flush=True)

    return update


def _counts(now: Finished) -> str:
    # Shards found finished cost no time, so they do not count for the rate.
    rate = f", {_short(now.new_tokens / now.seconds)} tok/s" if now.new_tokens and now.seconds > 0 else ""
    kept = f", {now.kept} shards kept" if now.kept else ""
    return f"{now.documents:,} docs, {_short(now.tokens)} tokens{rate}{kept}"


def _short(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default="", metavar="PATH", help="file, folder, glob or dataset "
                                                                            "name")
    parser.add_argument("--kind", choices=[kind for kind in KINDS if kind != "shards"],
                        help="what PATH is (default: told by its ending, else text)")
    parser.add_argument("--field", default="text", help="column of the text in jsonl, parquet, hf (default: "
                                                        "text)")
    parser.add_argument("--split", default="train", help="split of a dataset, hf only (default: train)")
    parser.add_argument("--subset", default="", help="configuration of a dataset, hf only")
    parser.add_argument("--where", default="", metavar="NAME",
                        help="jsonl: only records whose field NAME is true; !NAME: only the others")
    parser.add_argument("--encoding-errors", choices=ENCODING, default="error",
                        help="for bytes that are no UTF-8 (default: error)")
    parser.add_argument("--on-bad-record", choices=RECORDS, default="error",
                        help="for lines and rows that cannot be used (default: error)")
    parser.add_argument("--max-bad-records", type=int, default=SourceConfig.max_bad_records, metavar="N",
                        help="so many are left out with --on-bad-record skip (default: %(default)s)")


def _source(given: argparse.Namespace) -> SourceConfig:
    kind = given.kind or _guess_kind(given.path)
    return SourceConfig(kind, given.path, given.field, 1.0, given.split, given.subset, given.encoding_errors,
                        given.on_bad_record, given.max_bad_records, where=given.where)


def _guess_kind(path: str) -> str:
    if not path:
        return "pystdlib"
    if path.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")):
        return "jsonl"
    return "parquet" if path.endswith(".parquet") else "text"


def _raise_problems(found: list[str]) -> None:
    if found:
        raise ConfigError(*(problem.replace("--sources[0].", "--") for problem in found))


def _describe_tokenizer(tokenizer: Tokenizer, where: object) -> str:
    sizes = tokenizer.token_bytes()
    return (f"tokenizer     {tokenizer.name} ({where}), {tokenizer.vocab_size:,} tokens, longest "
            f"{sizes.max()} bytes\n"
            f"bos, eos      {tokenizer.bos_id}, {tokenizer.eos_id}\nfingerprint   {tokenizer.fingerprint}")


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters but line breaks and tabs become escapes."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]
                   for letter in text)
