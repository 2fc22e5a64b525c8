"""The programs of a run: with which options of XLA they are compiled, and when; the profile of a step."""

import concurrent.futures
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lmjax.log import RunLog, format_bytes, format_duration
from lmjax.process import release_freed_memory


def xla_options(devices: list) -> dict[str, Any]:
    """Options of XLA that are known to help on these devices: overlap of communication with computation for more than
    one GPU; on a single CPU the order of operations that needs least memory (docs/performance.md)."""
    match devices[0].platform, len(devices) > 1:
        case "gpu", True:
            return {"xla_gpu_enable_latency_hiding_scheduler": True}
        case "cpu", False:
            return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return {}


def compile_lowered(lowered, options: dict[str, Any], say: Callable[[str], None]):
    """The program, with these options of XLA; one that this XLA does not know is told and left out."""
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if not options or "No such compile option" not in str(error):
            raise
        say(f"this XLA lacks one of {', '.join(options)}; compiling without")
        return lowered.compile()


def start_compiling(train_step, state, batch, options: dict | None = None) -> Callable[[RunLog], Any]:
    """Traces the step for a state and a batch like these (arrays, or shapes with shardings) and begins to compile it,
    while the caller goes on. What it returns waits for the program, says what it took, and gives it.

    On a GPU it is compiled only then: the compiler measures kernels there, beside which nothing may run. A process ends
    only when its compiler has.
    """
    began = time.perf_counter()
    devices = jax.tree.leaves(state)[0].sharding.mesh.devices.flatten()
    options = xla_options(devices) if options is None else options
    lowered, notes = train_step.lower(state, batch), []  # here: the mesh and the precision are this thread's
    traced = time.perf_counter() - began

    def work():
        began = time.perf_counter()
        with jax.transfer_guard("allow"):
            compiled = compile_lowered(lowered, options, notes.append)
        return compiled, traced + time.perf_counter() - began

    wait = work
    if devices[0].platform != "gpu":
        pool = concurrent.futures.ThreadPoolExecutor(1, "compile")
        wait = pool.submit(work).result
        pool.shutdown(wait=False)

    def finish(log: RunLog):
        compiled, seconds = wait()
        release_freed_memory()
        analysis = compiled.memory_analysis()
        temp = f", {format_bytes(analysis.temp_size_in_bytes)} of temporaries a device" if analysis else ""
        for line in [*notes, f"compiled in {format_duration(seconds)}{temp}"]:
            log.say(line)
        return compiled

    return finish


def end_profile(metrics, folder: Path, log: RunLog) -> None:
    """Waits for the step that is running, then writes the trace."""
    jax.block_until_ready(metrics)
    jax.profiler.stop_trace()
    log.say(f"profile written to {folder}: open it with `xprof {folder}` (pip install xprof), or its "
            "perfetto_trace.json.gz at https://ui.perfetto.dev")
