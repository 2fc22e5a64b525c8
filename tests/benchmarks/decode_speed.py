"""Greedy decoding at the shape of SmolLM2-135M against Transformers' `generate`, both with random weights in float32.

    python tests/benchmarks/decode_speed.py [--batch 1 8] [--rounds 7] [--new 64]

Each contender lives in a process of its own and they take turns, so that both see the same machine. A round is
`new` tokens after a prompt of 32, prefill included; the first round of each, which compiles, is left out. Printed:
milliseconds a step (median and least), processor milliseconds, the ratio of each pair, the share of a round during
which other processes had the processor, and bytes of weights read a second against a plain sum over as many bytes.
Needs torch and transformers beside lmjax. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
         "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": True}
WEIGHTS = 134_515_008


def ours(batch: int, new: int):
    import jax
    import numpy as np
    from flax import nnx

    from lmjax.decode.generate import SampleConfig, generate
    from lmjax.models import Decoder, preset

    graphdef, state = nnx.split(Decoder(preset("smollm2-135m")))
    params = nnx.to_pure_dict(state)
    prompts = list(np.random.default_rng(0).integers(1, 49152, (batch, 32)))
    config = SampleConfig(max_new_tokens=new, temperature=0.0)
    return lambda: generate(graphdef, params, prompts, config, key=jax.random.key(0), vocab_size=49152)


def theirs(batch: int, new: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 49152, (batch, 32))

    def run():
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new,
                                  max_new_tokens=new, use_cache=True)
    return run


def bandwidth(batch: int, new: int):
    import numpy as np

    data = np.ones(WEIGHTS, np.float32)
    return lambda: data.sum()


def busy() -> float:
    """Seconds that all processors have worked since the machine started."""
    with open("/proc/stat") as file:
        fields = [int(x) for x in file.readline().split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def serve(name: str, batch: int, new: int) -> None:
    """A contender: one round for each line that comes in."""
    run = {"lmjax": ours, "transformers": theirs, "sum": bandwidth}[name](batch, new)
    for _ in sys.stdin:
        began, used, all_used = time.perf_counter(), time.process_time(), busy()
        run()
        seconds, own = time.perf_counter() - began, time.process_time() - used
        others = max(busy() - all_used - own, 0.0) / seconds / os.cpu_count()
        print(json.dumps({"ms": 1e3 * seconds, "cpu_ms": 1e3 * own, "others": others,
                          "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


def measure(batch: int, new: int, rounds: int) -> dict:
    names = ("lmjax", "transformers", "sum")
    children = {name: subprocess.Popen([sys.executable, __file__, "--serve", name, "--batch", str(batch), "--new",
                                        str(new)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=os.environ | {"JAX_PLATFORMS": "cpu"}) for name in names}
    found = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, child in children.items():
            print(file=child.stdin, flush=True)
            found[name].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()
    for name in ("lmjax", "transformers"):
        for one in found[name]:
            one["ms"], one["cpu_ms"] = one["ms"] / new, one["cpu_ms"] / new
    result = {"batch": batch, "new": new}
    for name in names:
        kept = found[name][1:]
        result[name] = {"ms": statistics.median(r["ms"] for r in kept), "least_ms": min(r["ms"] for r in kept),
                        "cpu_ms": statistics.median(r["cpu_ms"] for r in kept),
                        "others": statistics.median(r["others"] for r in kept), "rss_mb": kept[-1]["rss_mb"]}
    pairs = zip(found["lmjax"][1:], found["transformers"][1:], strict=True)
    result["ratio"] = statistics.median(t["ms"] / o["ms"] for o, t in pairs)
    result["gb_per_s"] = 4 * WEIGHTS / result["lmjax"]["ms"] / 1e6
    result["sum_gb_per_s"] = 4 * WEIGHTS / result["sum"]["ms"] / 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.batch[0], options.new)
    results = []
    for batch in options.batch:
        r = measure(batch, options.new, options.rounds)
        results.append(r)
        for name in ("lmjax", "transformers"):
            one = r[name]
            print(f"batch {batch}: {name:13} {one['ms']:6.1f} ms/step (least {one['least_ms']:.1f}, processor "
                  f"{one['cpu_ms']:.1f}, others {one['others']:.0%}), peak {one['rss_mb']:.0f} MB")
        print(f"batch {batch}: {r['ratio']:.2f} x as fast; weights at {r['gb_per_s']:.1f} GB/s, a plain sum on one "
              f"core at {r['sum_gb_per_s']:.1f}", flush=True)
    print(json.dumps({"command": "decode_speed", "cores": os.cpu_count(), "results": results}))


if __name__ == "__main__":
    main()
