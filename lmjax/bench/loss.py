"""`lmjax bench loss`: the chunked cross-entropy against the naive one, forward and backward, time and peak memory.

Run as a module it is one contender: `python -m lmjax.bench.loss JSON` (see `child`). Torch's own cross-entropy, where
torch is installed, is `tests/benchmarks/peers/torch_loss.py`.
"""

import argparse
import importlib.util
import json
import sys
from typing import Any

from lmjax.bench.child import Session, peak_rss, serve
from lmjax.bench.output import between, finish, machine, mib, say, table
from lmjax.bench.rounds import ROOT, Contender, figures, ratios, run_rounds
from lmjax.errors import ConfigError

PEER = ROOT / "tests" / "benchmarks" / "peers" / "torch_loss.py"
NAIVE, TORCH = "naive", "torch"

DESCRIPTION = """The gradients of the cross-entropy by hidden states and output matrix, in processes of their own that
take turns. Chunked never holds [tokens, vocabulary]; naive does. Peak memory is the process's (a GPU's own where there
is one); what was there before the first step, Python and libraries and inputs, is told apart."""


def run(args: list[str]) -> int:
    options = parse(args)
    where = machine()
    found: dict[str, Any] = {}
    for vocab in options.vocab:
        say(f"vocabulary {vocab:,}: {options.rows} x {options.seq_len} tokens, width {options.width}, {options.dtype}")
        results = run_rounds(contenders(options, vocab), options.rounds, 1, alternate=not options.no_turns, say=say)
        found[str(vocab)] = {"contenders": {name: figures(r) for name, r in results.items()},
                             "ratios": ratios(results, NAIVE)}
    rows = [("vocabulary", "loss", "ms", "CPU-s", "x naive's time", "peak", "of it before", "x naive's memory")]
    for vocab, result in found.items():
        rows += lines(vocab, result)
    say("\n" + table(rows))
    for result in found.values():
        for name, v in result["contenders"].items():
            if "failed" in v:
                say(f"{name} did not run: {v['failed']}")
    finish("loss", vars(options), where, vocabularies=found)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench loss", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="default %(default)s")
    parser.add_argument("--seq-len", type=int, default=512, help="default %(default)s")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states (default %(default)s)")
    parser.add_argument("--vocab", type=_numbers, default=[8192, 32768, 131072], metavar="V,V",
                        help="default 8192,32768,131072")
    parser.add_argument("--chunk-mib", type=_numbers, default=[16, 32, 64, 256], metavar="N,N",
                        help="float32 logits of a chunk, in MiB (default 16,32,64,256; training takes 32)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--no-turns", action="store_true", help="one after another: where two do not fit into memory")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out, though it is installed")
    parser.add_argument("--smoke", action="store_true", help="a tiny one, one round: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.rows, options.seq_len, options.width, options.vocab, options.chunk_mib, options.rounds = (
            2, 16, 8, [64], [1], 1)
    for name in ("rows", "seq_len", "width", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: must be at least 1")
    return options


def _numbers(text: str) -> list[int]:
    """'8,16' -> [8, 16]."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least 1")
    return values


def contenders(options: argparse.Namespace, vocab: int) -> list[Contender]:
    shape = {"rows": options.rows, "seq_len": options.seq_len, "vocab": vocab, "width": options.width,
             "dtype": options.dtype}
    found = [Contender(name, (sys.executable, "-m", "lmjax.bench.loss", json.dumps(shape | {"chunk_mib": chunk})),
                       env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
             for name, chunk in [(f"chunked {n} MiB", n) for n in options.chunk_mib] + [(NAIVE, 0)]]
    if not options.no_torch and importlib.util.find_spec("torch"):
        found.append(Contender(TORCH, (sys.executable, str(PEER), json.dumps(shape)),
                               "pip install -r tests/benchmarks/requirements.txt"))
    return found


def lines(vocab: str, result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's lines of one vocabulary."""
    out, peaks = [], {}
    for name, v in result["contenders"].items():
        if "failed" not in v:
            peaks[name] = v.get("peak_device_bytes", v["peak_rss"])
    for name, peak in peaks.items():
        v, over = result["contenders"][name], result["ratios"].get(name)
        out.append((f"{int(vocab):,}", name, between({k: 1e3 * x for k, x in v["seconds"].items()}, 1),
                    f"{v['cpu_seconds']['median']:.2f}", between(over["wall"]) if over else "1", mib(peak),
                    mib(v["before_bytes"]), f"{peak / peaks[NAIVE]:.2f}" if NAIVE in peaks else "n/a"))
    return out


def prepare(shape: dict[str, Any], session: Session):
    """The contender. chunk_mib 0 is the naive loss."""
    import jax
    import jax.numpy as jnp

    from lmjax.bench.ours import device_memory
    from lmjax.losses.cross_entropy import cross_entropy, naive_cross_entropy

    session.imported()
    chunk = shape["chunk_mib"]
    options = {"chunk_bytes": chunk * 2**20} if chunk else {}
    loss = cross_entropy if chunk else naive_cross_entropy
    B, T, V = shape["rows"], shape["seq_len"], shape["vocab"]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (B, T, shape["width"]), shape["dtype"])
    head = 0.02 * jax.random.normal(keys[1], (V, shape["width"]))
    targets, weights = jax.random.randint(keys[2], (B, T), 0, V), jnp.ones((B, T))
    step = jax.jit(jax.value_and_grad(lambda x, head, targets, weights: loss(x, head, targets, weights, **options)[0],
                                      (0, 1))).lower(x, head, targets, weights).compile()
    session.facts |= {"jax": jax.__version__, "before_bytes": peak_rss()}
    session.last = lambda: device_memory(jax.devices()[0])
    jax.block_until_ready(step(x, head, targets, weights))

    def run(steps: int) -> dict[str, float]:
        for _ in range(steps):
            value, _ = jax.block_until_ready(step(x, head, targets, weights))
        return {"loss": float(value) / (B * T)}

    return run


if __name__ == "__main__":
    serve(lambda session: prepare(json.loads(sys.argv[1]), session))
