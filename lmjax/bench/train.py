"""`lmjax bench train`: tokens per second of the same model in lmjax and in what else one would use.

The parent only: it decides who takes part, runs them by turns and prints. Our contender is `ours`; the others stand
in `tests/benchmarks/peers/` of a checkout, and each can have an interpreter of its own.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmjax.bench.cases import SHAPES, Case
from lmjax.bench.output import between, finish, machine, mib, say, table
from lmjax.bench.rounds import ROOT, Contender, Result, figures, ratios, run_rounds
from lmjax.errors import ConfigError
from lmjax.process import HUGE_PAGES

PEERS = ROOT / "tests" / "benchmarks" / "peers"
OURS = "lmjax"
NEEDS = {"torch-eager": ("torch",), "torch-compile": ("torch",), "transformers": ("torch", "transformers"),
         "maxtext": ("maxtext",)}
INSTALL = {name: "pip install -r tests/benchmarks/requirements.txt" for name in NEEDS} | {
    "maxtext": "in a Python >= 3.12 of its own: pip install -r tests/benchmarks/requirements-maxtext.txt, then "
               "--maxtext-python=PATH"}
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative: first loss and gradient norm of a peer against ours

DESCRIPTION = """Train steps of the same model, batch, dtype and optimizer, by turns, in processes of their own.

Each contender takes the same tokens through forward, cross-entropy, backward, clipping and AdamW, and fetches its
loss one step late. Where the model is not too large all begin with our initial weights, and the loss and gradient
norm of the first step are compared. FLOPs of a token: 6 x matrix weights + 12 L d T (PaLM, appendix B), and the same
with only the keys that a causal query sees.

shapes: baseline (4 layers, d 256, 4 heads of 64, SwiGLU 1024, vocabulary 8192 untied, RoPE, 8 x 512), window (128),
gqa (1 key/value head), vocab32k, vocab128k, gpt2-124m (1024), llama-1b (2048), llama3-8b (8192), tiny."""


def run(args: list[str]) -> int:
    options = parse(args)
    where = machine()
    wanted = options.against.split(",") if options.against is not None else installed(options)
    wanted = [name for name in wanted if name]
    unknown = [name for name in wanted if name not in NEEDS]
    if unknown:
        raise ConfigError(f"--against: {unknown[0]!r} is not a peer; choose from {', '.join(NEEDS)}")
    with tempfile.TemporaryDirectory(prefix="lmjax-bench-") as folder:
        case = make_case(options, Path(folder))
        alternate = case.platform == "cpu" if options.turns == "auto" else options.turns == "yes"
        contenders = [contender(name, options, case, folder, alternate) for name in (OURS, *wanted)]
        say(headline(case, [c.name for c in contenders], options, alternate))
        results = run_rounds(contenders, options.rounds, options.steps, alternate=alternate, say=say)
    settings = {**vars(options), "against": wanted, "alternate": alternate}
    report(case, results, settings, where)
    return 0 if not results[OURS].failed else 1


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench train", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="baseline", choices=SHAPES, metavar="NAME", help="default %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="of products and activations; weights stay float32 (default %(default)s)")
    parser.add_argument("--against", metavar="A,B", help=f"of {','.join(NEEDS)}; '' is nobody "
                                                         "(default: those that are installed)")
    parser.add_argument("--rounds", type=int, default=7, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="of a round (default %(default)s)")
    parser.add_argument("--batch", type=int, default=0, help="rows (default: the shape's)")
    parser.add_argument("--seq-len", type=int, default=0, help="tokens of a row (default: the shape's)")
    parser.add_argument("--remat", default="", choices=("", "none", "dots", "named", "full", "offload"),
                        help="default: the shape's; peers know none and full, which they take for the others too")
    parser.add_argument("--attention", default="auto", help="compute.attention of ours (default %(default)s)")
    parser.add_argument("--turns", default="auto", choices=("auto", "yes", "no"),
                        help="yes: all stay in memory and take turns, round by round; no: one after another; auto: "
                             "yes on CPUs, no on GPUs, whose memory one contender may fill")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                        help="begin with equal weights and compare the first step (default: yes; models above 500M "
                             "parameters are too large for it)")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH",
                        help="the interpreter of the torch peers (default: this one)")
    parser.add_argument("--maxtext-python", default=sys.executable, metavar="PATH",
                        help="MaxText's interpreter, 3.12 or newer (default: this one)")
    parser.add_argument("--smoke", action="store_true", help="shape tiny, one round of one step: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.shape, options.rounds, options.steps = "tiny", 1, 1
    for name, low in (("rounds", 1), ("steps", 1), ("batch", 0), ("seq_len", 0)):
        if getattr(options, name) < low:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: must be at least {low}")
    return options


def installed(options: argparse.Namespace) -> list[str]:
    """Peers whose packages are there. Another interpreter, being named, is taken at its word."""
    found = []
    for name, packages in NEEDS.items():
        python = options.maxtext_python if name == "maxtext" else options.torch_python
        if python != sys.executable or all(importlib.util.find_spec(p) for p in packages):
            found.append(name)
    left = sorted(set(NEEDS) - set(found))
    if left:
        say(f"not compared with, since not installed: {', '.join(left)}")
        for line in dict.fromkeys(f"  {INSTALL[name]}" for name in left):
            say(line)
    return found


def make_case(options: argparse.Namespace, folder: Path) -> Case:
    """Writes the case in a process of its own, so that this one never holds a device."""
    wanted = {"shape": options.shape, "dtype": options.dtype, "batch": options.batch, "seq_len": options.seq_len,
              "remat": options.remat, "attention": options.attention}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", "lmjax.bench.ours", str(folder), "--make", json.dumps(wanted),
                           *([] if options.check else ["--no-weights"])],
                          env=os.environ | {"PYTHONPATH": path}, text=True, capture_output=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ConfigError(f"--shape={options.shape}: the case cannot be made ({last[0]})")
    return Case.load(folder)


def contender(name: str, options: argparse.Namespace, case: Case, folder: str, alternate: bool) -> Contender:
    """How each one is started."""
    if name == OURS:
        env = {}
        if case.platform == "gpu":  # JAX would take 3/4 of the memory: too much beside others, too little alone
            key, value = (("XLA_PYTHON_CLIENT_PREALLOCATE", "false") if alternate
                          else ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"))
            env = {key: os.environ.get(key, value)}
        env |= {key: os.environ.get(key, value) for key, value in HUGE_PAGES.items()}  # as `lmjax train` does
        return Contender(name, (sys.executable, "-m", "lmjax.bench.ours", folder), env=env)
    if name == "maxtext":
        return Contender(name, (options.maxtext_python, str(PEERS / "maxtext_run.py"), folder), INSTALL[name])
    return Contender(name, (options.torch_python, str(PEERS / "torch_llama.py"), name, folder), INSTALL[name])


def headline(case: Case, names: list[str], options: argparse.Namespace, alternate: bool) -> str:
    turns = "by turns" if alternate else "one after another"
    return (f"{case.shape}: {case.parameters:,} parameters, {case.batch} x {case.seq_len} tokens, {case.dtype}, remat "
            f"{case.remat}, on {case.device}\n{', '.join(names)}; {options.rounds} rounds of {options.steps} steps, "
            f"{turns}")


# ---- what is printed -----------------------------------------------------------------------------------


def report(case: Case, results: dict[str, Result], settings: dict, where: dict) -> None:
    tokens = case.batch * case.seq_len
    found = {name: figures(result) for name, result in results.items()}
    for values in found.values():
        if "failed" not in values:
            values |= rates(case, tokens, values)
    checks = {name: compare(case, found[OURS], values) for name, values in found.items() if name != OURS}
    over = ratios(results, OURS)
    gpu = case.platform == "gpu"
    rows = [("", "tokens/s", "ms a step", "CPU-s a step", "x ours", "x ours, CPU",
             "MFU" if case.peak_flops else "GFLOP/s", "device peak" if gpu else "peak RSS", "of it imports")]
    for name, v in found.items():
        if "failed" in v:
            continue
        milli = {k: 1e3 * x for k, x in v["seconds"].items()}
        ratio = over.get(name, {})
        rows.append((name, f"{v['tokens_per_second']:,.0f}", between(milli, 1), f"{v['cpu_seconds']['median']:.2f}",
                     between(ratio["wall"]) if ratio else "1", f"{ratio['cpu']['median']:.2f}" if ratio else "1",
                     f"{v['mfu_full']:.1%} ({v['mfu_causal']:.1%})" if case.peak_flops
                     else f"{v['flops_per_second'] / 1e9:,.0f}",
                     mib(v.get("peak_device_bytes", 0) if gpu else v["peak_rss"]), mib(v["import_rss"])))
    say("\n" + table(rows))
    peak = f"; in brackets with causal keys only; of {case.peak_flops / 1e12:,.1f} TFLOP/s" if case.peak_flops else ""
    say("x ours: a peer's time over ours within a round, median (quartiles); above 1, lmjax is quicker.\n"
        f"FLOPs of a token: 6 x matrix weights + 12 L d T{peak}")
    for name, v in found.items():
        if "failed" in v:
            say(f"{name} did not run: {v['failed']}" + (f"; to install it: {v['install']}" if "install" in v else ""))
    for name, check in checks.items():
        if check:
            say(f"check {name}: {check['words']}")
    finish("train", settings, where, case=vars(case), contenders=found, ratios=over, checks=checks)


def rates(case: Case, tokens: int, values: dict[str, Any]) -> dict[str, float]:
    """Tokens and FLOPs per second by the median step, and by the median CPU-second."""
    rate = tokens / values["seconds"]["median"]
    out = {"tokens_per_second": rate, "tokens_per_cpu_second": tokens / max(values["cpu_seconds"]["median"], 1e-9),
           "flops_per_second": rate * case.flops_full}
    if case.peak_flops:
        out |= {"mfu_full": rate * case.flops_full / case.peak_flops,
                "mfu_causal": rate * case.flops_causal / case.peak_flops}
    return out


def compare(case: Case, ours: dict, theirs: dict) -> dict[str, Any] | None:
    """Do a peer and ours compute the same thing? Loss and gradient norm of the first step, from equal weights; the
    losses of the next ones show whether the optimizers agree. None where it cannot be known."""
    a, b = ours.get("first_steps"), theirs.get("first_steps")
    if not a or not b or not theirs.get("same_weights"):
        if "parameters" not in theirs:
            return None
        equal = theirs["parameters"] == case.parameters
        return {"same_size": equal, "words": f"weights of its own, {'as many as ours' if equal else 'NOT as many'}: "
                                             f"{theirs['parameters']:,} parameters"}
    error = {key: abs(a[0][key] - b[0][key]) / abs(a[0][key]) for key in ("loss", "grad_norm")}
    later = max(abs(x["loss"] - y["loss"]) / abs(x["loss"]) for x, y in zip(a, b, strict=True))
    same = max(error.values()) <= CLOSE[case.dtype]
    return {"same": same, "tolerance": CLOSE[case.dtype], **error, "later_losses": later,
            "words": f"{'the same' if same else 'NOT the same'} as ours: first loss {b[0]['loss']:.6f} (relative "
                     f"difference {error['loss']:.1e}), gradient norm {b[0]['grad_norm']:.6f} "
                     f"({error['grad_norm']:.1e}); losses of {len(a)} steps within {later:.1e}"}
