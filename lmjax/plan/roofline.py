"""From work to time: FLOPs, bytes and messages of one step on one chip, and the range of times that follows.

What lives here: arithmetic on figures. What does not: where the figures come from (`lmjax.plan.machine` for the chip,
`lmjax.plan.work` for the run, `lmjax.plan.hlo` for what the compiler made of it). Nothing here imports jax.

A message over a group of g chips, each sending at most r bytes/s into it, takes (Austin et al. 2025, "How to Scale Your
Model", chapter "Sharded Matrices", on a ring; V is the whole array)

    all-gather, reduce-scatter    V (g - 1) / g / r
    all-reduce                    twice that
    all-to-all of V on each chip  V n / 4 / r along the longest ring, of n chips; V (g - 1) / g / r on a switch
    collective-permute            V / r

Latency is left out: it counts where messages are small, so small models on many chips come out too fast.
"""

import dataclasses

from lmjax.plan.machine import HOST_GPUS, HOST_RATE, Machine

# Shares of the peak that matrix products reach when they wait for nothing: (best, likely, worst). The likely ones are
# fitted to the published runs of lmjax.plan.published, chip by chip (`lmjax plan --validate` fits them again and shows
# what is left over). H200 has that of H100, whose products it shares; chips without a published run have about the
# mean. Best and worst are a sixth away, about the spread of those runs.
EFFICIENCY = {"v5e": 0.78, "v5p": 0.79, "v6e": 0.60, "h100": 0.44, "h200": 0.44}
OTHERS, SPREAD = 0.65, 1 / 6
# Beside those of `tensor`, messages that the next product waits for: tokens on their way to experts, and activations on
# theirs to the next stage. By the names that `lmjax.plan.work` gives them, and of an axis in a compiled program.
AWAITED = ("expert", "expert (tokens)", "pipeline", "pipeline (activations)", "pipeline (ends)", "pipeline (chunks)")


@dataclasses.dataclass(frozen=True)
class Message:
    """count collectives a step. bytes: of the whole array in one of them, V above (all-to-all:
    on one chip). group chips, `stride` apart in the
    order of the mesh; axis: in words."""

    kind: str
    axis: str
    bytes: float
    group: int
    stride: int = 1
    count: float = 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    """One step on one chip. model_flops: what MFU counts. flops: what is computed, recomputation too. hbm: bytes to
    and from memory. host: to and from the host's memory."""

    model_flops: float
    flops: float
    hbm: float
    messages: tuple[Message, ...] = ()
    host: float = 0.0


def message_seconds(message: Message, machine: Machine) -> float:
    """Seconds of all `count` of them."""
    if message.group <= 1:
        return 0.0
    rate, g = machine.rate(message.group, message.stride), message.group
    if message.kind == "collective-permute":  # from one chip to the next, by one link, unless it leaves the slice
        inside = message.stride < (HOST_GPUS if machine.chip.kind == "gpu" else machine.num_devices // machine.slices)
        rate = machine.chip.link if inside else machine.chip.network
    if message.kind == "all-to-all" and machine.chip.kind == "tpu":
        rate = min(rate, 2 * machine.chip.link) * 4 / min(g, max(machine.shape)) * (g - 1) / g
    share = {"all-reduce": 2 * (g - 1) / g, "collective-permute": 1.0}.get(message.kind, (g - 1) / g)
    return message.count * message.bytes * share / rate


def efficiencies(name: str) -> tuple[float, float, float]:
    """(best, likely, worst) share of the peak of a chip."""
    likely = EFFICIENCY.get(name, OTHERS)
    return min(likely * (1 + SPREAD), 0.97), likely, likely * (1 - SPREAD)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step: products at the whole peak (compute) and at the likely share of it (products), memory, network
    that products can hide and that they cannot (exposed), activations to the host and back; step: (fast, likely,
    slow); mfu: of those."""

    compute: float
    products: float
    memory: float
    network: float
    exposed: float
    host: float
    step: tuple[float, float, float]
    mfu: tuple[float, float, float]

    @property
    def limit(self) -> str:
        """The longest part of the likely time, in words."""
        parts = {"matrix products": self.products, "memory": self.memory, "network": self.network + self.exposed,
                 "link to the host": self.host}
        return max(parts, key=parts.get)


def step_times(work: Work, machine: Machine, shares: tuple[float, float, float] | None = None) -> Times:
    """fast: memory, network and host wholly behind the products. likely: but for messages that the next product waits
    for, those of `tensor` and AWAITED. slow: every message and every byte of the host waited for."""
    best, likely, worst = shares or efficiencies(machine.name)
    compute = work.flops / machine.chip.peak
    memory = work.hbm / machine.chip.hbm_rate
    seconds = {m: message_seconds(m, machine) for m in work.messages}
    exposed = sum(s for m, s in seconds.items()
                  if m.axis.startswith("tensor") or m.axis in AWAITED)
    network = sum(seconds.values()) - exposed
    host = work.host / HOST_RATE
    step = (max(compute / best, memory, network + exposed, host),
            max(compute / likely + exposed, memory, network + exposed, host),
            max(compute / worst, memory) + network + exposed + host)
    ideal = work.model_flops / machine.chip.peak
    return Times(compute, compute / likely, memory, network, exposed, host, step, tuple(ideal / s for s in step))
