"""Our side of `bench train`: a run's own step, optimizer, state and loader, without its folder.

    python -m lmjax.bench.ours --make CASE     writes what other contenders need to begin alike
    python -m lmjax.bench.ours CASE            a contender (see `child`)

Everything is what `lmjax.train` uses, put together in the same order, on one device: the others use one too.
`open_training` is also what `bench step` looks into.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmjax.bench.cases import SHAPES, SHARED_WEIGHTS, WARMUP, Case, tokens
from lmjax.bench.child import Session, serve
from lmjax.process import release_freed_memory


def make_case(shape: str, *, dtype: str, batch: int = 0, seq_len: int = 0, remat: str = "",
              attention: str = "auto", model_fields: dict[str, Any] | None = None) -> Case:
    """A shape on this machine, with every number filled in; 0 and "" stand for the shape's own. model_fields:
    fields of DecoderConfig that are to be other than the shape's."""
    import jax

    from lmjax import flops
    from lmjax.axes import abstract_mesh
    from lmjax.models import DecoderConfig, preset
    from lmjax.optim import make_optimizer
    from lmjax.plan import make_plan

    s = SHAPES[shape]
    fields = s.model | (model_fields or {})
    model = preset(s.preset, **fields) if s.preset else DecoderConfig(**fields)
    platform = jax.default_backend()
    seq_len = seq_len or s.seq_len
    if seq_len > model.max_seq_len:
        model = dataclasses.replace(model, max_seq_len=seq_len)
    case = Case(shape, dataclasses.asdict(model.filled()), batch or s.batch[platform != "cpu"], seq_len, dtype,
                remat or s.remat, attention, platform=platform, device=jax.devices()[0].device_kind)
    config = run_config(case)
    plan = make_plan(config, make_optimizer(config.optim, config.steps)[0], abstract_mesh(config.mesh, 1))
    c = config.model.filled()
    windows = [c.windows[i % len(c.windows)] for i in range(c.num_layers)]
    attention_flops = flops.per_token(0, c.num_heads, c.head_dim, windows, seq_len)
    case.parameters = plan.num_params
    case.matrix_weights = round((plan.flops_per_token - attention_flops) / 6)
    case.flops_causal = plan.flops_per_token
    case.flops_full = 6.0 * case.matrix_weights + 12.0 * c.num_layers * c.num_heads * c.head_dim * seq_len
    case.peak_flops = flops.peak(case.device, dtype) or 0.0
    case.same_weights = case.parameters <= SHARED_WEIGHTS
    return case


def run_config(case: Case):
    """The RunConfig of a case."""
    from lmjax.config import ComputeConfig, DecoderConfig, OptimConfig, RunConfig

    model = DecoderConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in case.model.items()})
    return RunConfig(
        name="bench", steps=1_000_000, batch_size=case.batch, seq_len=case.seq_len, model=model,
        compute=ComputeConfig(dtype=case.dtype, remat=case.remat, attention=case.attention),
        optim=OptimConfig(schedule="constant", warmup_steps=0, **case.optim))


@dataclasses.dataclass
class Training:
    """What a loop needs. step: the compiled train step (None until `compile`). batches: the loader's."""

    config: Any
    mesh: Any
    tx: Any
    state: Any
    jitted: Any
    loader: Any
    batches: Iterator
    step: Any = None
    pending: Any = None

    def compile(self) -> tuple[Any, float, int]:
        """Compiles for the first batch; returns (that batch, seconds, bytes of temporaries)."""
        import time

        from lmjax.train.compiling import compile_lowered, xla_options

        _, batch = next(self.batches)
        began = time.perf_counter()
        lowered = self.jitted.lower(self.state, batch)
        self.step = compile_lowered(lowered, xla_options(self.mesh.devices.flatten()),
                                    functools.partial(print, file=sys.stderr))  # stdout is the protocol's
        release_freed_memory()
        analysis = self.step.memory_analysis()
        return batch, time.perf_counter() - began, getattr(analysis, "temp_size_in_bytes", 0)

    def advance(self, batch: Any = None) -> dict[str, float] | None:
        """One step as the loop takes it; returns the metrics of the step before, fetched once this one runs."""
        import jax

        if batch is None:
            _, batch = next(self.batches)
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.step(self.state, batch)
        before, self.pending = self.fetch(), metrics
        return before

    def fetch(self) -> dict[str, float] | None:
        """The metrics that are pending, once their step is done."""
        metrics, self.pending = self.pending, None
        return None if metrics is None else metrics.fetch()


@contextlib.contextmanager
def open_training(case: Case) -> Iterator[Training]:
    """Mesh, optimizer, state and loader of a case, in the order of `lmjax.train`. The loader's thread runs inside."""
    import jax

    from lmjax.axes import make_mesh
    from lmjax.loader import Loader
    from lmjax.models import Decoder
    from lmjax.objectives import pretrain
    from lmjax.optim import make_optimizer
    from lmjax.plan import make_plan
    from lmjax.state import graphdef, make_init, run_once, shardings
    from lmjax.step import make_train_step

    config = run_config(case)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    precision = "highest" if case.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision), jax.set_mesh(mesh):
        tx, schedule = make_optimizer(config.optim, config.steps)
        init = functools.partial(Decoder, config.model, compute=config.compute)
        placed = shardings(make_plan(config, tx, mesh).state, mesh)
        state = run_once(make_init(init, tx), jax.random.key(config.seed), out_shardings=placed)
        jitted = make_train_step(functools.partial(pretrain.loss, config.objective), graphdef(init), tx, schedule,
                                 seed=config.seed, accumulate=config.micro_batches(1)[0], shardings=placed)
        with Loader(rows_of(case), mesh, case.batch, 0, config.steps) as loader:
            yield Training(config, mesh, tx, state, jitted, loader, iter(loader))


def rows_of(case: Case):
    """(step, rows) -> the five fields of a packed batch, here one document a row."""
    import numpy as np

    x = tokens(case.model["vocab_size"], case.batch, case.seq_len)
    ones = np.ones((case.batch, case.seq_len), np.int32)
    same = {"segments": ones, "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
            "weights": ones.astype(np.float32)}

    def rows(step: int, wanted: slice) -> dict[str, np.ndarray]:
        one = x[step % len(x)]
        batch = {"tokens": one[:, :-1], "targets": one[:, 1:], **same}
        return {name: value[wanted] for name, value in batch.items()}

    return rows


def write_weights(case: Case, folder: Path) -> None:
    """Our initial weights by their path names, float32."""
    import jax
    import numpy as np

    from lmjax.models import Decoder
    from lmjax.optim import make_optimizer
    from lmjax.state import make_init, run_once
    from lmjax.tree import named_leaves

    config = run_config(case)
    init = make_init(lambda key: Decoder(config.model, key), make_optimizer(config.optim, 1)[0])
    params = run_once(lambda key: init(key).params, jax.random.key(config.seed))
    np.savez(folder / "weights.npz", **{k: np.asarray(v) for k, v in named_leaves(params).items()})


def prepare(folder: str, stack: contextlib.ExitStack, session: Session):
    """The contender: build, compile, warm up; then rounds of the loop, until `stack` is closed."""
    import jax
    import jaxlib

    import lmjax.plan  # noqa: F401  with it come all rooms that training needs
    import lmjax.step  # noqa: F401

    session.imported()
    case = Case.load(folder)
    training = stack.enter_context(open_training(case))
    batch, seconds, temporaries = training.compile()
    training.advance(batch)
    first = [training.fetch()]
    for _ in range(WARMUP - 1):
        training.advance()
        first.append(training.fetch())
    session.facts |= {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "compile_seconds": seconds,
                      "temporary_bytes": temporaries,
                      "first_steps": [{"loss": m["loss"], "grad_norm": m["grad_norm"]} for m in first]}
    session.last = lambda: device_memory(jax.devices()[0])

    def run(steps: int) -> dict[str, Any]:
        waited = training.loader.waited
        for _ in range(steps):
            training.advance()
        metrics = training.fetch()
        return {"loss": metrics["loss"], "data_wait_seconds": training.loader.waited - waited}

    return run


def device_memory(device) -> dict[str, int]:
    """{"peak_device_bytes"} where the device counts them; a CPU does not, its memory is the process's."""
    stats = device.memory_stats() or {}
    return {"peak_device_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="CASE")
    parser.add_argument("--make", default="", metavar="JSON", help="arguments of make_case")
    parser.add_argument("--no-weights", action="store_true", help="with --make: do not write them")
    args = parser.parse_args()
    if not args.make:
        with contextlib.ExitStack() as stack:
            serve(functools.partial(prepare, args.folder, stack))
        return
    case = make_case(**json.loads(args.make))
    case.same_weights &= not args.no_weights
    if case.same_weights:
        write_weights(case, Path(args.folder))
    case.save(Path(args.folder))


if __name__ == "__main__":
    sys.exit(main())
