"""`lmjax bench decode`: greedy decoding with a cache at a preset's shape, against Transformers' `generate`.

Run as a module it is one contender: `python -m lmjax.bench.decode JSON` (see `child`). Transformers' side is
`tests/benchmarks/peers/hf_decode.py`. Weights are random: what they say does not change what reading them costs.
"""

import argparse
import json
import sys
from typing import Any

from lmjax.bench.child import Session, peak_rss, serve
from lmjax.bench.output import between, finish, machine, mib, say, table
from lmjax.bench.rounds import ROOT, Contender, figures, ratios, run_rounds
from lmjax.errors import ConfigError

PEER = ROOT / "tests" / "benchmarks" / "peers" / "hf_decode.py"
OURS, THEIRS, READ = "lmjax", "transformers", "reading the weights"

DESCRIPTION = """Greedy decoding of random prompts in processes that take turns; a step is one new token of every row,
prefill included. "reading the weights" adds up as many bytes as the weights have: the floor of a step for few rows."""


def run(args: list[str]) -> int:
    options = parse(args)
    where = machine()
    found: dict[str, Any] = {}
    for batch in options.batch:
        say(f"{options.preset}, {batch} x ({options.prompt} + {options.new}) tokens, {options.dtype}")
        results = run_rounds(contenders(options, batch), options.rounds, options.new, say=say)
        found[str(batch)] = {"contenders": {name: figures(r) for name, r in results.items()},
                             "ratios": ratios(results, OURS)}
    rows = [("rows", "contender", "tokens/s", "ms a step", "CPU-ms a step", "x ours", "peak", "of it before")]
    for batch, result in found.items():
        rows += lines(int(batch), result)
    say("\n" + table(rows) + "\nx ours: a peer's time over ours within a round, median (quartiles); above 1, lmjax is "
        "quicker.")
    for result in found.values():
        for name, v in result["contenders"].items():
            if "failed" in v:
                say(f"{name} did not run: {v['failed']}")
    finish("decode", vars(options), where, batches=found)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench decode", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m", help="default %(default)s")
    parser.add_argument("--batch", default="1,8", metavar="N,N", help="rows (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a row (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default %(default)s")
    parser.add_argument("--smoke", action="store_true", help="a tiny one, one round: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.preset, options.batch, options.prompt, options.new, options.rounds = "tiny-1m", "2", 4, 4, 1
    try:
        options.batch = [int(part) for part in options.batch.split(",")]
    except ValueError:
        raise ConfigError(f"--batch={options.batch}: give whole numbers, such as 1,8") from None
    for name, value in (("batch", min(options.batch)), ("prompt", options.prompt), ("new", options.new),
                        ("rounds", options.rounds)):
        if value < 1:
            raise ConfigError(f"--{name}={value}: must be at least 1")
    return options


def contenders(options: argparse.Namespace, batch: int) -> list[Contender]:
    from lmjax.interop.families import choose

    config = model_config(options.preset)
    case = {"preset": options.preset, "vocab_size": config.vocab_size, "batch": batch, "prompt": options.prompt,
            "new": options.new, "dtype": options.dtype, "hf": choose(config)[1]}
    text = json.dumps(case)
    ours = (sys.executable, "-m", "lmjax.bench.decode")
    return [Contender(OURS, (*ours, text)), Contender(THEIRS, (sys.executable, str(PEER), text),
                                                      "pip install -r tests/benchmarks/requirements.txt"),
            Contender(READ, (*ours, json.dumps(case | {"read": True})))]


def model_config(name: str):
    """A preset as both sides can express it: the tiny ones come without a vocabulary, and scale their embeddings."""
    from lmjax.models import preset

    return preset(name, **({"vocab_size": 512, "scale_embed": False} if name.startswith("tiny") else {}))


def lines(batch: int, result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's lines of one number of rows."""
    out = []
    for name, v in result["contenders"].items():
        if "failed" in v:
            continue
        over, step = result["ratios"].get(name), v["seconds"]
        rate = f"{batch / step['median']:,.0f}" if name != READ else ""
        out.append((str(batch), name, rate, between({k: 1e3 * x for k, x in step.items()}, 1),
                    f"{1e3 * v['cpu_seconds']['median']:.0f}", between(over["wall"]) if over else "1",
                    mib(v["peak_rss"]), mib(v["before_bytes"])))
    return out


def prepare(case: dict[str, Any], session: Session):
    """The contender. A round of n steps is n // new whole generations, at least one."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lmjax.decode.generate import SampleConfig, generate
    from lmjax.models import ComputeConfig, Decoder

    session.imported()
    model = Decoder(model_config(case["preset"]), compute=ComputeConfig(case["dtype"]))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    V, new = case["vocab_size"], case["new"]
    prompts = list(np.random.default_rng(0).integers(1, V, (case["batch"], case["prompt"])))
    config, key = SampleConfig(max_new_tokens=new, temperature=0.0), jax.random.key(0)
    session.facts |= {"jax": jax.__version__, "before_bytes": peak_rss()}
    total = jax.jit(lambda params: sum(jnp.sum(w) for w in jax.tree.leaves(params)))

    def one() -> None:
        if case.get("read"):
            for _ in range(new):
                jax.block_until_ready(total(params))
        else:
            out = generate(graphdef, params, prompts, config, key=key, vocab_size=V)
            assert all(len(row) == new for row in out)

    def run(steps: int) -> dict[str, float]:
        for _ in range(max(steps // new, 1)):
            one()
        return {}

    one()
    return run


if __name__ == "__main__":
    serve(lambda session: prepare(json.loads(sys.argv[1]), session))
