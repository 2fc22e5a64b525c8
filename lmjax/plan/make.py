"""A config and a machine made into a plan: checks, state, work, the compiler where there is one, times.

What lives here: the order of these. What does not: any of them (see the package's own docstring for which is where).
"""

import dataclasses
from collections.abc import Callable

from jax.sharding import AbstractMesh

from lmjax.axes import MESH_AXES, abstract_mesh
from lmjax.config import RunConfig, fit_vocabulary, to_json, validate
from lmjax.data import SourceConfig, load_tokenizer
from lmjax.models.decoder import REMAT
from lmjax.nn.attention import choose_attention
from lmjax.nn.context import choose_context
from lmjax.nn.grouped import choose_experts
from lmjax.optim import make_optimizer
from lmjax.plan.aot import Compiled, compile_for, missing
from lmjax.plan.machine import Machine
from lmjax.plan.page import Planned
from lmjax.plan.roofline import Work, efficiencies, step_times
from lmjax.plan.state import Plan, bytes_per_device, make_plan, schedule_of
from lmjax.plan.work import Split, activation_bytes, analytic
from lmjax.state import shardings


def resolve(config: RunConfig, machine: Machine) -> RunConfig:
    """The config as it would run on the machine: its vocabulary known, "auto" replaced by what it means there.

    Raises ConfigError with every problem, those of slices among them.
    """
    compute, devices = config.compute, machine.num_devices
    if compute.attention == "auto" and config.mesh.context == 1:
        chosen = choose_attention("auto", config.seq_len, compute.dtype, machine.chip.kind)[0]
        compute = dataclasses.replace(compute, attention=chosen)
    if compute.layers == "auto":
        compute = dataclasses.replace(compute, layers="scan")
    if config.model.moe and compute.experts == "auto":  # this process has another backend
        compute = dataclasses.replace(compute, experts=choose_experts("auto", machine.chip.kind)[0])
    config = dataclasses.replace(config, compute=compute,
                                 accumulate=config.micro_batches(devices, machine.chip.kind)[0])
    # A plan needs no data, so sources that are not there yet are no problem of it.
    without_data = dataclasses.replace(config.data, sources=(SourceConfig(),))
    validate(dataclasses.replace(config, data=without_data), devices, machine.slices, machine.chip.kind)
    if config.model.vocab_size:
        return config
    name = config.data.tokenizer
    size = config.data.bpe_vocab_size if name == "bpe" else load_tokenizer(name).vocab_size
    return fit_vocabulary(config, name, size)


def split_of(config: RunConfig, num_devices: int) -> Split:
    """The mesh as the roofline knows it. The config is a resolved one."""
    return Split(**dict(zip(MESH_AXES, config.mesh.sizes(num_devices), strict=True)))


def work_of(config: RunConfig, num_devices: int) -> Work:
    """`analytic` of a resolved config."""
    return analytic(config.model, split_of(config, num_devices), config.batch_size, config.seq_len,
                    config.compute.remat, config.accumulate,
                    ring=choose_context(config.compute.context, config.seq_len)[0] == "ring",
                    schedule=schedule_of(config, abstract_mesh(config.mesh, num_devices)))


def abstract_run(config: RunConfig, mesh: AbstractMesh) -> Plan:
    """`make_plan` with the config's own optimizer."""
    return make_plan(config, make_optimizer(config.optim, config.total_steps)[0], mesh)


def make(config: RunConfig, machine: Machine, *, compiles: bool = True, price: float | None = None,
         limit: float = 900.0, say: Callable[[str], None] = lambda _: None, known: Plan | None = None) -> Planned:
    """The plan of a config on a machine. compiles: False stays with arithmetic. price: dollars a chip and hour. limit:
    seconds that the compiler gets. known: `abstract_run` of the same model, optimizer and rows' length on any mesh."""
    config = resolve(config, machine)
    mesh = abstract_mesh(config.mesh, machine.num_devices)
    state = dataclasses.replace(known, mesh=mesh) if known else abstract_run(config, mesh)
    split = split_of(config, machine.num_devices)
    work = work_of(config, machine.num_devices)
    if machine.chip.devices > 1:  # figures of a chip, like its peak
        work = dataclasses.replace(work, **{name: getattr(work, name) * machine.chip.devices
                                            for name in ("model_flops", "flops", "hbm", "host")})
    activations = {remat: activation_bytes(config.model, split, config.batch_size, config.seq_len, remat,
                                           config.accumulate, schedule_of(config, mesh)) for remat in REMAT}
    why_not = missing(machine) if compiles else "not asked for (--no-compile)"
    compiled, second = None, None
    if not why_not:
        compiled = compile_for(to_json(compilable(config)), machine, limit=limit, say=say)
    times = step_times(work, machine)
    if isinstance(compiled, Compiled):
        messages = tuple(compiled.program.collectives)
        if machine.slices > 1:  # what crosses slices is not in the program as a collective: hosts send it
            messages += tuple(m for m in work.messages if m.axis.startswith("data"))
        times = step_times(dataclasses.replace(work, messages=messages), machine)
        second = compiler_seconds(compiled, config, machine, times.network + times.exposed)
    placed = shardings(state.state, mesh, config.mesh.zero1)
    params, moments = (bytes_per_device(getattr(state.state, part), getattr(placed, part))
                       for part in ("params", "opt_state"))
    return Planned(config, machine, dict(mesh.shape), state.num_params, params, moments, activations, work, times,
                   compiled, why_not, second, price)


def compilable(config: RunConfig) -> RunConfig:
    """What can be compiled without a GPU: cuDNN's attention needs its library, XLA's keeps as little."""
    if config.compute.attention != "cudnn":
        return config
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="blockwise"))


def compiler_seconds(compiled: Compiled, config: RunConfig, machine: Machine, network: float) -> float | None:
    """The compiler's cycles over the clock, with what they leave out: attention by kernels at the likely share of the
    peak, and the network where it takes longer than everything else."""
    if not machine.chip.clock or not compiled.program.cycles:
        return None
    if config.mesh.context > 1:  # blocks of scores that are skipped at run time have cycles as the others do
        return None
    if config.model.moe and config.compute.experts == "ragged":
        # No cycles for the kernels of ragged_dot, and for its gradients by the weights those of every row with every
        # expert, though the program says that it skips what is masked.
        return None
    seconds = compiled.program.cycles / machine.chip.clock
    if compiled.program.kernels:
        def flops(layers_of_attention: bool) -> float:
            model = config.model if layers_of_attention else dataclasses.replace(config.model, windows=(1,))
            return work_of(dataclasses.replace(config, model=model), machine.num_devices).flops
        seconds += (flops(True) - flops(False)) / (machine.chip.peak * efficiencies(machine.name)[1])
    return max(seconds, network)
