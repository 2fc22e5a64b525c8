"""Peak memory and time of the chunked cross-entropy against the naive one, forward and backward.

    python tests/benchmarks/loss_memory.py [--rows 8] [--seq-len 512] [--vocab 131072] [--width 256]

Each case runs in a process of its own, so that its peak resident memory is its own; alternating, twice each.
What a process needs before it computes (Python, JAX, the inputs) is told apart. The last line is JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

MIB = 1024  # ru_maxrss is in KiB on Linux


def one(case: str, rows: int, seq_len: int, vocab: int, width: int) -> dict:
    """Runs one case in this process."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jax
    import jax.numpy as jnp

    from lmjax.losses.cross_entropy import cross_entropy, naive_cross_entropy

    loss = {"chunked": cross_entropy, "naive": naive_cross_entropy}[case]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, seq_len, width))
    head = 0.02 * jax.random.normal(keys[1], (vocab, width))
    targets = jax.random.randint(keys[2], (rows, seq_len), 0, vocab)
    weights = jnp.ones((rows, seq_len))
    step = jax.jit(jax.value_and_grad(lambda x, h: loss(x, h, targets, weights)[0], (0, 1))).lower(
        x, head).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    times = []
    for _ in range(3):
        began = time.perf_counter()
        value, grads = jax.block_until_ready(step(x, head))
        times.append(time.perf_counter() - began)
    return {"case": case, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB,
            "before_mib": before, "seconds": min(times), "loss": float(value) / (rows * seq_len)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8), ("seq-len", 512), ("vocab", 131072), ("width", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--case", choices=["chunked", "naive"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = (args.rows, args.seq_len, args.vocab, args.width)
    if args.case:
        print(json.dumps(one(args.case, *shape)))
        return
    results = {"chunked": [], "naive": []}
    for case in ("chunked", "naive") * 2:
        flags = [f"--{n}={v}" for n, v in zip(("rows", "seq-len", "vocab", "width"), shape, strict=True)]
        done = subprocess.run([sys.executable, __file__, "--case", case, *flags], check=True, text=True,
                              capture_output=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results[case].append(result)
        print(f"{case:8} peak {result['peak_mib']:7,.0f} MiB (of it {result['before_mib']:,.0f} before the first "
              f"step)  {result['seconds']:6.2f} s  loss {result['loss']:.6f}", flush=True)
    middle = {c: {k: statistics.median(r[k] for r in rs) for k in ("peak_mib", "seconds")}
              for c, rs in results.items()}
    print(json.dumps({"rows": shape[0], "seq_len": shape[1], "vocab": shape[2], "width": shape[3], **middle,
                      "memory_ratio": middle["chunked"]["peak_mib"] / middle["naive"]["peak_mib"],
                      "time_ratio": middle["chunked"]["seconds"] / middle["naive"]["seconds"]}))


if __name__ == "__main__":
    main()
