"""`lmjax bench data`: tokens per second through tokenise, prepare, shuffle, pack and load, on a real corpus.

The corpus is the source of Python's standard library, as in `configs/quickstart.py`. The loader's rate is set against
what a train step on this machine takes, and a consumer of ten times that pace shows how long it would wait.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmjax.bench.cases import SHAPES
from lmjax.bench.output import between, finish, machine, say, table
from lmjax.bench.rounds import spread
from lmjax.errors import ConfigError

PACE = 10  # times this machine's training rate
CONSUMED = 15.0  # seconds that a consumer goes on for, where the batches last

DESCRIPTION = f"""Tokens per second of each stage from text to batches, on the standard library's source. Then the wait:
a consumer takes batches at {PACE} times the rate at which this machine trains the shape, and the share of a step that
it waits is measured, once with the host's cores idle in between, as beside an accelerator, and once with all of them
busy."""


def run(args: list[str]) -> int:
    options = parse(args)
    where = machine()
    from lmjax.data import SourceConfig, documents

    source = SourceConfig(kind="pystdlib")
    texts, size = [], 0
    for document in documents(source):
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= options.text_mb * 1e6:
            break
    stages: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="lmjax-bench-") as folder:
        tokenizers = tokenise(texts, size, options, stages)
        corpora = prepare_stages(texts, tokenizers, options, Path(folder), stages)
        load_stages(corpora, options, stages)
        consumer = consume(corpora["one source"], options, stages["loader: one source"]["tokens_per_second"]["median"])
    rows = [("stage", "tokens/s", "MB/s of text")]
    rows += [(name, between(v["tokens_per_second"], 0), f"{v['bytes_per_second'] / 1e6:,.1f}" if v["bytes_per_second"]
              else "") for name, v in stages.items()]
    say("\n" + table(rows))
    c = consumer
    say(f"training {options.shape} here takes {c['train_tokens_per_second']:,.0f} tokens/s; the loader gives "
        f"{c['loader_over_train']:,.0f} times that")
    for name, wait in c["waits"].items():
        say(f"at {PACE} x that pace, {name}: {wait['share']:.2%} of a step is spent waiting for data "
            f"({wait['pace']:,.1f} x was reached)")
    finish("data", vars(options), where, text_bytes=size, documents=len(texts), stages=stages, consumer=consumer)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench data", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="quickstart", choices=SHAPES, metavar="NAME",
                        help="whose rows, batch and train step are taken (default %(default)s, the smallest real one "
                             "and so the hungriest)")
    parser.add_argument("--text-mb", type=float, default=8.0, help="of the corpus (default %(default)s)")
    parser.add_argument("--bpe-vocab", type=int, default=2048, help="default %(default)s")
    parser.add_argument("--workers", type=_numbers, default=[1, 2], metavar="N,N", help="of prepare (default 1,2)")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--batches", type=int, default=300, help="that are loaded a round (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of training, for its rate (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.shape, options.text_mb, options.bpe_vocab, options.workers = "tiny", 0.2, 300, [1]
        options.rounds, options.batches, options.steps = 1, 5, 2
    for name in ("rounds", "batches", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}={getattr(options, name)}: must be at least 1")
    if options.text_mb < 0.1:
        raise ConfigError(f"--text-mb={options.text_mb}: must be at least 0.1, or there is too little to cut into rows")
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(name: str, stages: dict, rounds: int, text_bytes: int, work: Callable[[int], int]) -> None:
    """Times work(round), which returns how many tokens it made. text_bytes 0: the stage reads no text."""
    rates, seconds = [], []
    for number in range(rounds):
        began = time.perf_counter()
        count = work(number)
        seconds.append(time.perf_counter() - began)
        rates.append(count / seconds[-1])
    stages[name] = {"tokens_per_second": spread(rates), "seconds": spread(seconds), "tokens": count,
                    "bytes_per_second": text_bytes / spread(seconds)["median"]}
    say(f"  {name}: {stages[name]['tokens_per_second']['median']:,.0f} tokens/s")


# ---- stages --------------------------------------------------------------------------------------------


def tokenise(texts: list[str], size: int, options: argparse.Namespace, stages: dict) -> dict[str, Any]:
    """Both tokenizers, over all texts in this process."""
    from lmjax.data import ByteTokenizer, train_bpe

    began = time.perf_counter()
    bpe = train_bpe(texts, options.bpe_vocab)
    say(f"  a BPE of {options.bpe_vocab} tokens trained on {size / 1e6:.1f} MB in {time.perf_counter() - began:.1f} s")
    tokenizers = {"bytes": ByteTokenizer(), "bpe": bpe}
    for name, tokenizer in tokenizers.items():
        measure(f"tokenise: {name}", stages, options.rounds, size,
                lambda _, t=tokenizer: sum(len(ids) for ids in t.encode_batch(texts)))
    return tokenizers


def prepare_stages(texts: list[str], tokenizers: dict, options: argparse.Namespace, folder: Path,
                   stages: dict) -> dict[str, Any]:
    """Text files to shards, with each number of workers; returns corpora of one and of two sources."""
    from lmjax.data import Corpus, SourceConfig, prepare

    sources = []
    for part in range(2):  # two halves, so that there is something to mix
        path = folder / f"text{part}"
        path.mkdir()
        for number, text in enumerate(texts[part::2]):
            (path / f"{number:05d}.txt").write_text(text, encoding="utf-8")
        sources.append(SourceConfig(kind="text", path=str(path)))
    numbers = itertools.count()

    def make(source, workers: int) -> tuple[Path, Any]:
        out = folder / f"shards{next(numbers)}"
        return out, prepare(source, tokenizers["bpe"], out, workers=workers)

    half = sum(len(text.encode()) for text in texts[::2])
    for workers in options.workers:
        measure(f"prepare: {workers} worker{'s' if workers > 1 else ''}", stages, options.rounds, half,
                lambda _, w=workers: sum(s.tokens for s in make(sources[0], w)[1].splits.values()))
    made = [make(source, options.workers[-1]) for source in sources]
    folders, manifests = zip(*made, strict=True)
    return {name: Corpus(tokenizers["bpe"], folders[:n], manifests[:n], weights=(1.0, 3.0)[:n], fingerprint="bench",
                         reused=(False,) * n)
            for name, n in (("one source", 1), ("mixture of two", 2))}


def load_stages(corpora: dict[str, Any], options: argparse.Namespace, stages: dict) -> None:
    """Shuffle, mix and pack alone; then the same through the loader's thread onto the device."""
    import jax

    from lmjax.axes import MeshConfig, make_mesh
    from lmjax.data import Batches
    from lmjax.loader import Loader

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch, seq_len = SHAPES[options.shape].batch[0], SHAPES[options.shape].seq_len
    for name, corpus in corpora.items():
        batches = Batches(corpus, "train", batch, seq_len, 0)

        def pack(number: int, batches=batches) -> int:
            for step in range(options.batches):
                batches.batch(number * options.batches + step)
            return options.batches * batch * seq_len

        def load(number: int, batches=batches) -> int:
            first = number * options.batches
            with Loader(batches.batch, mesh, batch, first, first + options.batches) as loader:
                for _, value in loader:
                    jax.block_until_ready(value)
            return options.batches * batch * seq_len

        measure(f"shuffle, pack: {name}", stages, options.rounds, 0, pack)
        measure(f"loader: {name}", stages, options.rounds, 0, load)


# ---- the consumer --------------------------------------------------------------------------------------


def consume(corpus: Any, options: argparse.Namespace, loader_rate: float) -> dict[str, Any]:
    """How long a consumer of PACE times this machine's training rate waits."""
    from lmjax.bench.ours import make_case, open_training
    from lmjax.data import Batches
    from lmjax.loader import Loader

    case = make_case(options.shape, dtype="float32")
    with open_training(case) as training:
        mesh = training.mesh
        batch, _, _ = training.compile()
        training.advance(batch)
        training.fetch()
        began = time.perf_counter()
        for _ in range(options.steps):
            training.advance()
        training.fetch()
        rate = options.steps * case.batch * case.seq_len / (time.perf_counter() - began)
    pace = case.batch * case.seq_len / (PACE * rate)
    waits = {}
    count = min(options.batches, max(20, int(CONSUMED / pace)))
    batches = Batches(corpus, "train", case.batch, case.seq_len, 0)
    for name, work in (("host idle", time.sleep), ("host busy", keep_busy)):
        with Loader(batches.batch, mesh, case.batch, 0, count) as loader:
            taken = iter(loader)
            next(taken)  # the thread's start is not the consumer's wait
            loader.waited, began = 0.0, time.perf_counter()
            for _ in taken:
                work(pace)
            seconds = time.perf_counter() - began
        reached = (count - 1) * case.batch * case.seq_len / seconds / rate
        waits[name] = {"share": loader.waited / seconds, "pace": reached, "seconds_per_step": pace}
    return {"train_tokens_per_second": rate, "loader_over_train": loader_rate / rate, "waits": waits}


def keep_busy(seconds: float) -> None:
    """Matrix products on every core that NumPy takes; the interpreter's lock is free while they run."""
    import numpy as np

    a = np.ones((256, 256), np.float32)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        a @ a
