"""`lmjax checkpoint verify | list`: what a run's checkpoints are worth, before anything depends on them."""

from pathlib import Path

from lmjax.checkpoint import manifest
from lmjax.errors import CheckpointError
from lmjax.records import format_bytes


def run(folder: str, hashes: bool) -> int:
    """Prints one line for each checkpoint; returns 4 if any is damaged. Raises CheckpointError where there is none."""
    checkpoints = Path(folder) / "checkpoints"
    steps = manifest.numbered(checkpoints)
    if not steps:
        raise CheckpointError(f"{folder}: has no checkpoints; give the folder of a run that has saved one")
    damaged = 0
    for step in steps:
        where = checkpoints / str(step)
        why = manifest.damage(where, step, hashes)
        damaged += bool(why)
        if why:
            print(f"step {step}: damaged: {why}", flush=True)
            continue
        files = manifest.read_manifest(where)["files"]
        size = sum(size for size, _ in files.values())
        print(f"step {step}: {'verified' if hashes else 'complete'}, {len(files)} files, {format_bytes(size)}",
              flush=True)
    aside = sorted(path.name for path in checkpoints.iterdir() if path.name.startswith("damaged-"))
    if aside:
        print(f"set aside earlier: {', '.join(aside)}")
    if damaged:
        print(f"{damaged} of {len(steps)} damaged; training goes on from the newest that verifies and sets newer ones "
              "aside")
    return 4 if damaged else 0
