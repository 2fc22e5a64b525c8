"""Tries batch, rematerialisation and mesh, and shows which settings fit and how fast each would be.

What lives here: which settings are tried, in which order, and the table. What does not: a single plan
(`lmjax.plan.make`). What does not divide, or whose state and activations cannot fit by far, is left out before a
compiler is asked; the rest is compiled in the order of the roofline's speed until time is up.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

from lmjax.axes import MeshConfig, abstract_mesh
from lmjax.config import RunConfig
from lmjax.errors import ConfigError
from lmjax.log import format_bytes, format_count, format_duration
from lmjax.models.decoder import REMAT
from lmjax.plan.aot import Compiled, missing
from lmjax.plan.machine import Machine
from lmjax.plan.make import abstract_run, make, resolve
from lmjax.plan.page import Planned

BATCHES = (1, 2, 4, 8, 16, 32)  # rows of a device, or of the devices that share rows
MOST_TOKENS = 2**17  # of a device
HOPELESS = 1.5  # an estimate so many times the memory is not worth compiling


@dataclasses.dataclass(frozen=True)
class Trial:
    """estimate: bytes by arithmetic."""

    plan: Planned
    estimate: float

    @property
    def settings(self) -> str:
        c = self.plan.config
        axes = " ".join(f"{n}={s}" for n, s in self.plan.mesh.items() if s > 1) or "one device"
        rows = c.batch_size * c.mesh.context // self.plan.machine.num_devices or 1
        where = "a device" if c.mesh.context == 1 else f"on {c.mesh.context} devices"
        return f"{axes}, {rows} rows {where}, remat {c.compute.remat}"

    @property
    def rate(self) -> float:
        return self.plan.tokens / self.plan.times.step[1]

    @property
    def used(self) -> float:
        done = self.plan.compiled
        return done.total if isinstance(done, Compiled) else self.estimate

    @property
    def fits(self) -> bool | None:
        return self.plan.fits


def candidates(config: RunConfig, machine: Machine) -> Iterator[RunConfig]:
    """Configs with other meshes, batches and remat; those that a mesh cannot divide are for `make` to refuse. `context`
    stays what it is, as it follows from the length of rows, and so does `pipeline`."""
    devices, context, pipeline = machine.num_devices, config.mesh.context, config.mesh.pipeline
    inside = devices // machine.slices // (context * pipeline)  # only `replica` crosses slices
    most = config.model.moe.num_experts if config.model.moe else 1
    for tensor, expert in itertools.product((1, 2, 4, 8, 16), (e for e in (1, 2, 4, 8, 16) if e <= most)):
        rest = inside // (tensor * expert)
        for fsdp in sorted({rest, max(rest // 4, 1)} if rest else ()):
            if inside % (tensor * expert * fsdp):
                continue
            mesh = MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor, replica=machine.slices, expert=expert,
                              context=context, pipeline=pipeline)
            for rows in BATCHES:
                if rows * config.seq_len // context > MOST_TOKENS:
                    continue
                for remat in REMAT:
                    yield dataclasses.replace(config, mesh=mesh, batch_size=rows * devices // context, accumulate=1,
                                              compute=dataclasses.replace(config.compute, remat=remat))


def trials(config: RunConfig, machine: Machine) -> list[Trial]:
    """Every setting that is allowed and not hopeless, by arithmetic alone, fastest first."""
    found, capacity = [], machine.chip.hbm / machine.chip.devices
    known = None  # what is tried differs elsewhere
    for candidate in candidates(config, machine):
        try:
            candidate = resolve(candidate, machine)
            known = known or abstract_run(candidate, abstract_mesh(MeshConfig(), 1))
            plan = make(candidate, machine, compiles=False, known=known)
        except ConfigError:
            continue  # does not divide
        activations = plan.activations[plan.config.compute.remat]
        trial = Trial(plan, 2 * plan.params + plan.moments + activations)
        if trial.fits is not False and trial.estimate <= HOPELESS * capacity:
            found.append(trial)
    return sorted(found, key=lambda t: -t.rate)


def search(config: RunConfig, machine: Machine, *, minutes: float, compiles: bool, say: Callable[[str], None],
           clock: Callable[[], float] = time.monotonic) -> str:
    """The table of settings, fastest first; `minutes` bound the compiling. Raises ConfigError where nothing is left."""
    began = clock()
    open_ended = [f"--search: mesh.{name}=-1: stays what it is while others are tried; give it a size"
                  for name in ("context", "pipeline") if getattr(config.mesh, name) == -1]
    if open_ended:
        raise ConfigError(*open_ended)
    found = trials(config, machine)
    if not found:
        raise ConfigError(f"--search: no mesh, batch or remat of {config.name} comes near to fitting {machine}; take a "
                          "larger slice or a smaller model")
    say(f"{len(found)} settings are worth a try")
    why_not, done = missing(machine) if compiles else "not asked for (--no-compile)", []
    if not why_not:
        for i, trial in enumerate(found):
            left = minutes * 60 - (clock() - began)
            if left <= 0:
                break
            say(f"{i + 1} of {len(found)}: {trial.settings}, {format_duration(left)} left")
            try:
                plan = make(trial.plan.config, machine, limit=left, say=lambda line: say("  " + line))
            except ConfigError as error:
                say(f"  {error}")
                continue
            done.append(Trial(plan, trial.estimate))
            say(f"  {'fits' if plan.fits else 'does not fit'}")
    rest = [t for t in found if all(t.settings != d.settings for d in done)]
    return table(done + rest, machine, why_not)


def frontier(tried: list[Trial]) -> list[Trial]:
    """Those than which no other that may fit is faster in no more memory, or as fast in less."""
    able = [t for t in tried if t.fits is not False]

    def beats(o: Trial, t: Trial) -> bool:
        return o.rate >= t.rate and o.used <= t.used and (o.rate, o.used) != (t.rate, t.used)
    return [t for t in able if not any(beats(o, t) for o in able)]


def table(tried: list[Trial], machine: Machine, why_not: str) -> str:
    """Compiled settings first in each of: the frontier, and what else was compiled."""
    best = {id(t) for t in frontier(tried)}
    shown = sorted((t for t in tried if id(t) in best or t.plan.compiled), key=lambda t: -t.rate)[:24]
    lines = [f"{'settings':<56}{'memory':>11}  {'fits':<10}{'step':>8}  {'MFU':>4}  {'tokens/s':>9}"]
    for t in shown:
        fits = {True: "yes", False: "no", None: "perhaps"}[t.fits]
        step, mark = format_duration(t.plan.times.step[1]), "  *" if id(t) in best else ""
        lines.append(f"{t.settings:<56}{format_bytes(t.used):>11}  {fits:<10}{step:>8}  {t.plan.times.mfu[1]:>4.0%}  "
                     f"{format_count(t.rate):>9}{mark}")
    compiled = sum(t.plan.compiled is not None for t in tried)
    lines += ["", "* nothing else that may fit is faster in no more memory. "
              f"{compiled} of {len(tried)} settings compiled for {machine}" + (f": {why_not}" if why_not else "")
              + "; \"perhaps\": memory by arithmetic only."]
    return "\n".join(lines)
