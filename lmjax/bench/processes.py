"""`lmjax bench processes`: one run's step on the same cores, as one process with one device, one with several, and as
several processes with one device each.

Each is the config's own `lmjax train`, started anew in every round, by turns; what is read is the rate that it writes
down itself for the second half of its steps, which leaves starting and compiling out. Several processes need a network
of their own, here the machine's loopback, so this tells what the split costs where nothing is gained by it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lmjax.bench.output import between, finish, machine, say, table
from lmjax.bench.rounds import ROOT, spread
from lmjax.bench.start import environment
from lmjax.chaos.lab import free_port
from lmjax.errors import ConfigError
from lmjax.records import read_metrics

LIMIT = 1800.0  # seconds that a run may take

DESCRIPTION = """Seconds of a train step with the same cores and the same batches: one process with one CPU device, one
process with N, and N processes with one each. Whole runs of the config, by turns."""


def run(args: list[str]) -> int:
    options = parse(args)
    where, ways = machine(), contenders(options.processes)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="lmjax-bench-") as folder:
        for number in range(options.rounds):
            for name, (processes, devices) in ways.items():
                seconds[name].append(step_seconds(options, Path(folder), f"{number}-{processes}-{devices}", processes,
                                                  devices))
            say(f"  round {number + 1}/{options.rounds}: "
                + ", ".join(f"{name} {values[-1]:.3f} s a step" for name, values in seconds.items()))
    base = seconds[f"1 process, {options.processes} devices"]
    found = {name: {"seconds": spread(values), "ratio": spread([b / a for a, b in zip(base, values, strict=True)])}
             for name, values in seconds.items()}
    rows = [("", "seconds a step", f"over 1 process, {options.processes} devices")]
    rows += [(name, between(v["seconds"], 3), between(v["ratio"])) for name, v in found.items()]
    say("\n" + table(rows) + "\n")
    finish("processes", vars(options), where, ways=found)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench processes", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, metavar="N", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default %(default)s)")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"), metavar="CONFIG.py",
                        help="what is run (default: the quickstart)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a field of that config (repeatable), such as batch_size=64")
    parser.add_argument("--smoke", action="store_true", help="one round of a few steps: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.processes, options.rounds, options.steps = 2, 1, 4
    if options.processes < 2 or options.rounds < 1 or options.steps < 4:
        raise ConfigError(f"--processes={options.processes} --rounds={options.rounds} --steps={options.steps}: give at "
                          "least 2, 1 and 4")
    if not Path(options.config).is_file():
        raise ConfigError(f"--config={options.config}: no such file; run in a checkout of lmjax, or name a config")
    return options


def contenders(processes: int) -> dict[str, tuple[int, int]]:
    """name -> (processes, devices of each)."""
    return {"1 process, 1 device": (1, 1), f"1 process, {processes} devices": (1, processes),
            f"{processes} processes, 1 device each": (processes, 1)}


def step_seconds(options: argparse.Namespace, folder: Path, name: str, processes: int, devices: int) -> float:
    """Seconds of a step in the second half of a run. Raises ConfigError for a run that fails."""
    command = [sys.executable, "-m", "lmjax", "train", options.config, f"--name={name}",
               f"--run_root={folder / 'runs'}", f"--data.cache_dir={folder / 'data'}", f"--steps={options.steps}",
               "--evals.every=0", "--optim.warmup_steps=0", f"--checkpoint.every={options.steps}",
               f"--log.every={options.steps // 2}",
               *(f"--{field}" for field in options.set)]
    env = environment(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join(filter(None, [
        os.environ.get("XLA_FLAGS"), f"--xla_force_host_platform_device_count={devices}"])))
    if processes > 1:
        env |= {"LMJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "LMJAX_PROCESSES": str(processes)}
    logs = [tempfile.TemporaryFile() for _ in range(processes)]
    running = [subprocess.Popen(command, env=env | ({"LMJAX_PROCESS": str(i)} if processes > 1 else {}), stdout=log,
                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) for i, log in enumerate(logs)]
    try:
        for process in running:
            process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{options.config}: {processes} processes were not done after {LIMIT:g} s") from None
    finally:
        for process in running:
            process.kill()
            process.wait()
    for log, process in zip(logs, running, strict=True):
        log.seek(0)
        text = log.read().decode(errors="replace").strip()
        log.close()
        if process.returncode:
            raise ConfigError(f"{options.config}: a process of {processes} ended with exit code {process.returncode} "
                              f"({text[-300:]})")
    records = [r for r in read_metrics(folder / "runs" / name) if r["kind"] == "train"]
    return records[-1]["tokens"] / options.steps / records[-1]["tokens_per_second"]
