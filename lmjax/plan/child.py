"""The process that compiles: `python -m lmjax.plan.child`, one JSON line in, JSON lines out, for `lmjax.plan.aot`.

In: {"config", "platform", "topology", "slices", "hlo"}, and for GPUs "target". Out: {"stage": words} while it works,
then {"done": figures} or {"error": text}. The program's text goes to the file `hlo`. It ends when stdin does, so it
never outlives who asked. The step is the one that `lmjax.train` makes; only its devices are described instead of
present, and nothing is ever run.
"""

import functools
import json
import os
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr: stdout carries the protocol alone

    def say(**line) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    try:
        say(done=compile_step(asked, lambda words: say(stage=words)))
    except Exception as error:  # told to the parent, which knows what to make of it
        say(error=f"{type(error).__name__}: {error}")
    out.flush()
    os._exit(0)


def described_devices(asked: dict):
    """The devices of a machine that is not there."""
    from jax.experimental import topologies

    if asked["platform"] == "cuda":
        return topologies.get_topology_desc(platform="cuda", topology_name="", topology=asked["topology"],
                                            target_config=asked["target"]).devices
    more = {"num_slices": asked["slices"]} if asked["slices"] > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=asked["topology"], **more).devices


def compile_step(asked: dict, say) -> dict:
    """Figures of the compiled train step; bytes are of one device."""
    began = time.process_time()
    say("importing")
    import jax

    from lmjax.axes import make_mesh
    from lmjax.checkpoint import abstract
    from lmjax.config import from_json
    from lmjax.models import Decoder
    from lmjax.objectives import pretrain
    from lmjax.optim import make_optimizer
    from lmjax.plan.state import make_batch, make_plan
    from lmjax.state import graphdef, shardings
    from lmjax.step import make_train_step

    config = from_json(asked["config"], "config")
    say("describing the machine")
    devices = described_devices(asked)
    mesh = make_mesh(config.mesh, devices)
    tx, schedule = make_optimizer(config.optim, config.total_steps)
    state = make_plan(config, tx, mesh).state
    placed = shardings(state, mesh, config.mesh.zero1)
    step = make_train_step(functools.partial(pretrain.loss, config.objective),
                           graphdef(functools.partial(Decoder, config.model, compute=config.compute)), tx, schedule,
                           seed=config.seed, accumulate=config.accumulate, shardings=placed,
                           sigmas=config.guard.sigmas, zero1=config.mesh.zero1)
    say("tracing the train step")
    precision = "highest" if config.compute.dtype == "float32" else "default"
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        traced = step.trace(abstract(state, placed), make_batch(config, mesh))
        lowered = traced.lower(lowering_platforms=(asked["platform"],))
    say("compiling")
    compiled = lowered.compile()
    say("reading the program")
    memory = compiled.memory_analysis()
    Path(asked["hlo"]).write_text(compiled.as_text())
    return {"devices": len(devices), "device_kind": devices[0].device_kind, "cpu_seconds": time.process_time() - began,
            "mesh": dict(mesh.shape),
            **{name: getattr(memory, f"{name}_size_in_bytes")
               for name in ("argument", "output", "alias", "temp", "generated_code")}}


if __name__ == "__main__":
    main()
