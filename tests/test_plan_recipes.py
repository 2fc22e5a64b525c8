"""Every recipe of configs/ on the machine it is named after: it fits, and its collectives are those of its mesh.

The slow half needs libtpu (pip install 'lmjax[tpu]') and is skipped, with the reason, without. The rows of
docs/planning.md: `python tests/test_plan_recipes.py [--no-compile] [NAME …]`.
"""

import re
import sys
from pathlib import Path

import pytest

from lmjax.config import load_config
from lmjax.log import format_bytes, format_count, format_duration
from lmjax.plan.aot import Compiled, missing
from lmjax.plan.machine import parse_machine
from lmjax.plan.make import make

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {path.stem: re.search(r"--topology (\S+)", path.read_text())[1]
           for path in sorted((ROOT / "configs").glob("*.py")) if "--topology" in path.read_text()}


def plan(name: str, compiles: bool, say=lambda _: None):
    return make(load_config(ROOT / "configs" / f"{name}.py"), parse_machine(RECIPES[name]), compiles=compiles,
                limit=3600, say=say)


@pytest.mark.parametrize("name", RECIPES)
def test_by_arithmetic(name):
    planned = plan(name, compiles=False)
    assert planned.fits is not False
    assert planned.mesh["fsdp"] * planned.mesh["context"] == planned.machine.chips
    assert planned.times.limit == "matrix products"
    assert 0.25 < planned.times.mfu[1] < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_compiled(name):
    if why := missing(parse_machine(RECIPES[name])):
        pytest.skip(why)
    planned = plan(name, compiles=True)
    assert isinstance(planned.compiled, Compiled) and planned.fits
    c = planned.config
    layers, found = c.model.num_layers, planned.compiled.program.collectives
    if planned.machine.chips == 1:
        assert not found
        return
    large = [m for m in found if m.bytes * m.count > 1e8]
    axes = " + ".join(axis for axis in ("fsdp", "context") if planned.mesh[axis] > 1)  # of weights
    assert large and {m.axis for m in large} <= {axes, "context"}
    if any(m.kind == "collective-permute" for m in large):
        return  # a ring of keys; or a small slice, where gathers became loops of permutes
    # Each matrix of a block crosses the network three times, gathered forward and backward and as a gradient, and not a
    # fourth time. On v5p the compiler writes all three as all-reduces. Those of the head have fewer or other sizes.
    planned_sizes = {m.axis: m.bytes for m in planned.work.messages}
    block = sum(planned_sizes.get(f"{axes} ({what})", 0) for what in ("blocks", "experts"))
    moved = sum(m.bytes * m.count for m in found if m.count >= layers and m.bytes < block / 1.5)
    assert 0.9 < moved / (3 * layers * block * c.accumulate) < 1.3


def row(name: str, compiles: bool) -> str:
    """One line of the table in docs/planning.md."""
    p = plan(name, compiles, lambda line: print(line, file=sys.stderr))
    done = p.compiled
    memory = format_bytes(done.total) if isinstance(done, Compiled) else f"{format_bytes(2 * p.params + p.moments)} + ?"
    second = f"{p.work.model_flops / p.machine.chip.peak / p.second:.0%}" if p.second else "–"
    memory += f" of {format_bytes(p.machine.chip.hbm)}"
    return (f"| `{name}` | {p.machine} | {p.tokens // p.machine.chips:,} | {memory} | "
            f"{format_duration(p.times.step[1])} | {p.times.mfu[1]:.0%} ({p.times.mfu[2]:.0%}–{p.times.mfu[0]:.0%}) | "
            f"{second} | {format_count(p.tokens / p.times.step[1])} | {format_count(p.tokens * p.config.steps)} |")


if __name__ == "__main__":
    names = [a for a in sys.argv[1:] if not a.startswith("-")] or list(RECIPES)
    print("| recipe | machine | tokens a chip | memory | step | MFU, roofline | MFU, compiler | tokens/s | in all |")
    print("|---|---|---|---|---|---|---|---|---|")
    for recipe in names:
        print(row(recipe, "--no-compile" not in sys.argv), flush=True)
