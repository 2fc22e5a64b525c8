"""`lmjax bench start`: what one waits for before anything trains.

Commands and imports in turns; the quickstart's own command until its first step, with nothing prepared, with its data
prepared, and with JAX's persistent compile cache filled; compile time by depth. Run as a module it compiles one depth
and prints it: `python -m lmjax.bench.start DEPTH SHAPE`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lmjax.bench.output import between, finish, machine, mib, say, table
from lmjax.bench.rounds import ROOT, spread
from lmjax.errors import ConfigError

COMMANDS = {
    "python alone": ["-c", "pass"],
    "lmjax --help": ["-m", "lmjax", "--help"],
    "import lmjax": ["-c", "import lmjax"],
    "import jax": ["-c", "import jax"],
    "import lmjax.models": ["-c", "import lmjax.models"],
    "import lmjax.train": ["-c", "import lmjax.train"],
}
# What is there already -> target in seconds.
FIRST_STEP = {"nothing prepared": 15.0, "data prepared": 15.0, "data prepared, programs compiled before": 5.0}
LIMIT = 1800.0

DESCRIPTION = """Seconds until something happens. First step: the command of the quickstart, unchanged but for its
folders, is started and timed until its first train step is recorded (the evaluation before it included), then ended.
Once with nothing prepared; then with the corpus prepared and an empty compile cache; then with both."""


def run(args: list[str]) -> int:
    options = parse(args)
    where = machine()
    if not Path(options.config).is_file():
        raise ConfigError(f"--config={options.config}: no such file; run in a checkout of lmjax, or name a config")
    commands: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": [], "rss": []} for name in COMMANDS}
    for number in range(options.rounds):
        for name, argv in COMMANDS.items():
            for key, value in timed([sys.executable, *argv]).items():
                commands[name][key].append(value)
        say(f"  round {number + 1}/{options.rounds} of commands and imports")
    found = {name: {"seconds": spread(v["wall"]), "cpu_seconds": spread(v["cpu"]), "peak_rss": max(v["rss"])}
             for name, v in commands.items()}
    rows = [("", "seconds", "CPU-s", "peak RSS")]
    rows += [(name, between(v["seconds"]), f"{v['cpu_seconds']['median']:.2f}", mib(v["peak_rss"]))
             for name, v in found.items()]
    say("\n" + table(rows) + "\n")
    first = {} if options.no_first_step else first_steps(options)
    depths = compile_by_depth(options)
    finish("start", vars(options), where, commands=found, first_step=first, compile_by_depth=depths)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench start", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of commands and imports (default %(default)s)")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"), metavar="CONFIG.py",
                        help="whose first step is waited for (default: the quickstart)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a field of that config (repeatable), such as data.sources[0].path=…")
    parser.add_argument("--depths", type=_numbers, default=[2, 8, 32], metavar="N,N", help="layers (default 2,8,32)")
    parser.add_argument("--shape", default="baseline", metavar="NAME", help="whose depth is changed (default baseline)")
    parser.add_argument("--no-first-step", action="store_true", help="leave the config's first step out")
    parser.add_argument("--smoke", action="store_true", help="one round, no first step, tiny: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.rounds, options.no_first_step, options.depths, options.shape = 1, True, [1], "tiny"
    if options.rounds < 1 or min(options.depths) < 1:
        raise ConfigError(f"--rounds={options.rounds} --depths={options.depths}: must be at least 1")
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def environment(**more: str) -> dict[str, str]:
    """This process's, with the package importable."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | more


def timed(argv: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of a command that must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ConfigError(f"{' '.join(argv)}: ended with exit code {process.returncode}; run it to see why")
    return {"wall": seconds, "cpu": usage.ru_utime + usage.ru_stime,
            "rss": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


# ---- the first step ------------------------------------------------------------------------------------


def first_steps(options: argparse.Namespace) -> dict[str, Any]:
    """{what was ready: {"seconds", "cpu_seconds", "target_seconds"}}; one run readies the next."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="lmjax-bench-") as text:
        folder = Path(text)
        for number, (name, target) in enumerate(FIRST_STEP.items()):
            cache = folder / ("compiled" if number else "compiled while preparing")
            took = found[name] = until_first_step(options, folder, f"run{number}", cache) | {"target_seconds": target}
            say(f"first step, {name}: {took['seconds']:.1f} s (target {target:g}), {took['cpu_seconds']:.1f} CPU-s")
    return found


def until_first_step(options: argparse.Namespace, folder: Path, name: str, cache: Path) -> dict[str, float]:
    """Starts the config's own command and ends it when its first train record is written. `cache` is where JAX
    keeps every compiled program, the quick ones too."""
    env = environment(JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    metrics = folder / "runs" / name / "metrics.jsonl"
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "lmjax", "train", options.config, f"--name={name}", f"--run_root={folder / 'runs'}",
             f"--data.cache_dir={folder / 'data'}", *(f"--{field}" for field in options.set)],
            env=env, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            for _ in process.stdout:  # the run says a line just after it has written the record
                seconds = time.perf_counter() - began
                if metrics.is_file() and '"kind": "train"' in metrics.read_text():
                    break
            else:
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise ConfigError(f"{options.config}: ended before its first step ({last[0]})")
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except OSError:
                pass
            usage = os.wait4(process.pid, 0)[2]
            process.returncode = -signal.SIGKILL
            process.stdout.close()
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


# ---- compile time --------------------------------------------------------------------------------------


def compile_by_depth(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to trace and compile the train step of a shape at each depth, in processes of their own."""
    found = {}
    for depth in options.depths:
        done = subprocess.run([sys.executable, "-m", "lmjax.bench.start", str(depth), options.shape], text=True,
                              capture_output=True, env=environment(), timeout=LIMIT)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise ConfigError(f"--shape={options.shape} --depths={depth}: cannot be compiled ({last[0]})")
        found[str(depth)] = json.loads(done.stdout.splitlines()[-1])
        say(f"{depth} layers: the train step compiles in {found[str(depth)]['seconds']:.1f} s, "
            f"{found[str(depth)]['cpu_seconds']:.1f} CPU-s")
    return found


def compile_one(depth: int, shape: str) -> dict[str, float]:
    from lmjax.bench.ours import make_case, open_training

    with open_training(make_case(shape, dtype="float32", model_fields={"num_layers": depth})) as training:
        before = time.process_time()
        _, seconds, _ = training.compile()
        return {"seconds": seconds, "cpu_seconds": time.process_time() - before}


if __name__ == "__main__":
    print(json.dumps(compile_one(int(sys.argv[1]), sys.argv[2])))
