"""The train step made into a program, and its profile."""

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


def compile_step(train_step, state, batch, log: RunLog, options: dict | None = None):
    """The step compiled ahead of its first call, so that compile time is told and paid once."""
    began = time.perf_counter()
    if options is None:
        options = xla_options(jax.tree.leaves(state)[0].sharding.mesh.devices.flatten())
    with jax.transfer_guard("allow"):
        compiled = compile_lowered(train_step.lower(state, batch), options, log.say)
    release_freed_memory()
    analysis = compiled.memory_analysis()
    temp = f", {format_bytes(analysis.temp_size_in_bytes)} of temporaries a device" if analysis else ""
    log.say(f"compiled in {format_duration(time.perf_counter() - began)}{temp}")
    return compiled


def end_profile(metrics, folder: Path, log: RunLog) -> None:
    """Waits for the step that is running, then writes the trace."""
    jax.block_until_ready(metrics)
    jax.profiler.stop_trace()
    log.say(f"profile written to {folder}: open it with `xprof {folder}` (pip install xprof), or its "
            "perfetto_trace.json.gz at https://ui.perfetto.dev")
