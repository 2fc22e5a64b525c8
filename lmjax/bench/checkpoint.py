"""`lmjax bench checkpoint`: how long a save stalls the loop, when it is complete, and how long a restore takes.

The state is a decoder's with its AdamW moments, 12 bytes a parameter, and the steps are real ones on a small batch.
"""

import argparse
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from lmjax.bench.child import peak_rss
from lmjax.bench.output import between, finish, machine, mib, say
from lmjax.bench.rounds import spread
from lmjax.errors import ConfigError

STATE_BYTES = 12  # a parameter: weight and two moments in float32
NEEDS = {"memory": 60, "disk": 26}  # bytes a parameter: the peak of 100M, measured (57); two checkpoints of STATE_BYTES

DESCRIPTION = """Saves of a training state while steps go on: the stall is how long `save` keeps the loop; the step
after it may have to wait for copies as well; complete is when the checkpoint is on disk. Then a restore, from files
that the system may still hold in memory. Sizes: --params=100M, --params=1B; what does not fit is skipped, and says
so."""


def run(args: list[str]) -> int:
    options = parse(args)
    where = machine()
    found: dict[str, Any] = {}
    for params in options.params:
        name = f"{params / 1e6:,.0f}M" if params >= 1e6 else f"{params:,}"
        lacking = does_not_fit(params, Path(options.folder or tempfile.gettempdir()))
        if lacking:
            say(f"{name}: skipped, {lacking}")
            found[name] = {"skipped": lacking}
            continue
        with tempfile.TemporaryDirectory(prefix="lmjax-bench-", dir=options.folder) as folder:
            found[name] = measure(params, options.saves, Path(folder) / "checkpoints")
        report(name, found[name])
    finish("checkpoint", vars(options), where, sizes=found)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench checkpoint", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=_sizes, default=[100_000_000], metavar="N,N",
                        help="parameters, such as 100M,1B (default 100M)")
    parser.add_argument("--saves", type=int, default=3, help="default %(default)s")
    parser.add_argument("--folder", metavar="DIR",
                        help="where to write (default: where the system keeps temporary files)")
    parser.add_argument("--smoke", action="store_true", help="a tiny state, one save: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.params, options.saves = [100_000], 1
    if options.saves < 1:
        raise ConfigError(f"--saves={options.saves}: must be at least 1")
    if options.folder and not Path(options.folder).is_dir():
        raise ConfigError(f"--folder={options.folder}: no such folder; make it first")
    return options


def _sizes(text: str) -> list[int]:
    """'100M,1B' -> [100_000_000, 1_000_000_000]."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", part.strip().upper())
        if not match or not float(match[1]):
            raise argparse.ArgumentTypeError(f"{part!r}: a number of parameters is like 500K, 100M or 1.5B")
        found.append(round(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]]))
    return found


def does_not_fit(params: int, folder: Path) -> str:
    """Why a state of so many parameters cannot be tried here, or ""."""
    for what, have in (("memory", available_memory()), ("disk", shutil.disk_usage(folder).free)):
        need = NEEDS[what] * params
        if have < need:
            return f"it needs about {need / 2**30:,.0f} GiB of {what} and {have / 2**30:,.1f} GiB are free"
    return ""


def available_memory() -> float:
    """Bytes that are free or can be freed; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def model_fields(params: int) -> dict[str, int]:
    """A decoder of about so many parameters: 12 D^2 a layer and a tied vocabulary."""
    vocab, width = (32768, 2048 if params >= 400_000_000 else 768) if params >= 40_000_000 else (256, 64)
    layers = max(1, round((params - vocab * width) / (12 * width**2)))
    return {"vocab_size": vocab, "d_model": width, "num_layers": layers, "num_heads": width // 64, "d_ff": 0,
            "tied": True}


def measure(params: int, saves: int, folder: Path) -> dict[str, Any]:
    """The figures of one size; seconds and bytes."""
    import jax

    from lmjax.bench.ours import make_case, open_training
    from lmjax.checkpoint import CheckpointConfig, Checkpoints, abstract, quiet_storage

    quiet_storage()
    case = make_case("baseline", dtype="float32", batch=1, seq_len=32, model_fields=model_fields(params))
    with open_training(case) as training:
        batch, _, _ = training.compile()
        training.advance(batch)
        training.fetch()
        before = peak_rss()
        alone = [step_seconds(training) for _ in range(3)]
        stall, after, complete = [], [], []
        with Checkpoints(folder, CheckpointConfig(every=1, keep=1)) as checkpoints:
            for step in range(1, saves + 1):
                began = time.perf_counter()
                checkpoints.save(step, training.state, {"bench": params})
                stall.append(time.perf_counter() - began)
                after.append(step_seconds(training))
                checkpoints.wait()
                complete.append(time.perf_counter() - began)
        with_save = peak_rss()
        size = sum(path.stat().st_size for path in (folder / str(saves)).rglob("*") if path.is_file())
        like = abstract(jax.eval_shape(lambda: training.state), jax.tree.map(lambda x: x.sharding, training.state))
        training.state = None
        with Checkpoints(folder, CheckpointConfig(), read_only=True) as checkpoints:
            began = time.perf_counter()
            restored, _ = checkpoints.restore_latest(like, {"bench": params})
            jax.block_until_ready(restored)
            restore = time.perf_counter() - began
    return {"parameters": case.parameters, "state_bytes": STATE_BYTES * case.parameters, "step_seconds": spread(alone),
            "stall_seconds": spread(stall), "step_after_save_seconds": spread(after),
            "complete_seconds": spread(complete), "restore_seconds": restore, "disk_bytes": size,
            "peak_rss_training": before, "peak_rss_saving": with_save, "peak_rss_restoring": peak_rss()}


def step_seconds(training: Any) -> float:
    """One step, to its end."""
    began = time.perf_counter()
    training.advance()
    training.fetch()
    return time.perf_counter() - began


def report(name: str, v: dict[str, Any]) -> None:
    slower = v["step_after_save_seconds"]["median"] - v["step_seconds"]["median"]
    say(f"{name}: {v['parameters']:,} parameters, a state of {mib(v['state_bytes'])}\n"
        f"  save returns after     {between(v['stall_seconds'])} s\n"
        f"  the step after it      {between(v['step_after_save_seconds'])} s, {slower:+.2f} s against one alone\n"
        f"  complete on disk after {between(v['complete_seconds'])} s, {mib(v['disk_bytes'])}\n"
        f"  restore                {v['restore_seconds']:.2f} s\n"
        f"  peak RSS               {mib(v['peak_rss_training'])} training, {mib(v['peak_rss_saving'])} saving, "
        f"{mib(v['peak_rss_restoring'])} restoring")
