"""`lmjax bench serve`: continuous batching against `generate` request by request, in one process and by turns.

The engine is measured without HTTP, which costs well under a millisecond a request beside it. Weights are random and
prompts are bytes: what they say does not change what they cost. Every request asks for the same number of tokens.
"""

import argparse
import queue
import time
from collections.abc import Callable

import numpy as np

from lmjax.bench.decode import model_config
from lmjax.bench.output import between, finish, machine, say, table
from lmjax.errors import ConfigError

DESCRIPTION = """Requests of one prompt each, answered in three ways that take turns: by generate, one after another; by
the engine of `lmjax serve`, one after another; and by the engine, so many at once. Programs are compiled before."""


def run(args: list[str]) -> int:
    options = parse(args)
    where = machine()
    say(f"{options.preset}, {options.requests} requests of {options.prompt} + {options.new} tokens, "
        f"{options.concurrent} at once")
    ways = contenders(options)
    for answer in ways.values():
        answer()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, answer in ways.items():
            start = time.perf_counter()
            answer()
            seconds[name].append(time.perf_counter() - start)
    first = np.array(seconds[next(iter(ways))])
    rows, found = [("way", "seconds", "requests/s", "tokens/s", "x as quick")], {}
    for name, measured in seconds.items():
        took, gain = _quartiles(np.array(measured)), _quartiles(first / np.array(measured))
        rows.append((name, between(took), f"{options.requests / took['median']:.2f}",
                     f"{options.requests * options.new / took['median']:.1f}", between(gain)))
        found[name] = {"seconds": took, "gain": gain}
    say(table(rows) + "\nMedians (quartiles); x as quick: against the first line within a round.")
    finish("serve", vars(options), where, ways=found)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench serve", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--preset", default="smollm2-135m", help="default %(default)s")
    for name, default, about in (("requests", 16, "requests of a round"), ("concurrent", 8, "slots of the engine"),
                                 ("prompt", 32, "tokens of a prompt"), ("new", 32, "new tokens of each"),
                                 ("rounds", 5, "rounds")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about} (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny one, one round: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.preset, options.requests, options.concurrent, options.rounds = "tiny-1m", 3, 2, 1
        options.prompt = options.new = 4
    for name in ("requests", "concurrent", "prompt", "new", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}={getattr(options, name)}: must be at least 1")
    return options


def _quartiles(values: np.ndarray) -> dict[str, float]:
    q1, median, q3 = (float(x) for x in np.percentile(values, [25, 50, 75]))
    return {"q1": q1, "median": median, "q3": q3}


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Each answers all requests once."""
    from pathlib import Path

    import jax
    from flax import nnx

    from lmjax.data import ByteTokenizer
    from lmjax.decode.generate import SampleConfig, generate
    from lmjax.interop.load import Opened
    from lmjax.models import ComputeConfig, Decoder
    from lmjax.serve.batch import Row
    from lmjax.serve.engine import Engine, Job

    config = model_config(options.preset)
    graphdef, state = nnx.split(Decoder(config, compute=ComputeConfig()))
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = -1  # nothing ends a text early
    opened = Opened(Path(options.preset), config, graphdef, nnx.to_pure_dict(state), None, tokenizer)
    prompts = list(np.random.default_rng(0).integers(0, 256, (options.requests, options.prompt)).astype(np.int32))
    sample = SampleConfig(max_new_tokens=options.new, temperature=0.0)

    def alone() -> None:
        for prompt in prompts:
            out = generate(graphdef, opened.params, [prompt], sample, key=jax.random.key(0), vocab_size=257)
            assert len(out[0]) == options.new

    def engine(at_once: int) -> Callable[[], None]:
        engine = Engine(opened, slots=at_once, max_queue=options.requests)
        engine.start()

        def answer() -> None:
            updates: queue.Queue = queue.Queue()
            engine.submit([Job(Row(prompt, sample), updates.put) for prompt in prompts])
            for _ in prompts:
                assert updates.get().generated == options.new
        return answer

    return {"generate, one by one": alone, "engine, 1 at once": engine(1),
            f"engine, {options.concurrent} at once": engine(options.concurrent)}
