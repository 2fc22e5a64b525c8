"""What `lmjax plan` found, as a page to read and as JSON: memory, work, messages, times, money.

What lives here: words and columns. What does not: where the figures come from (`aot`, `work`, `roofline`).
"""

import dataclasses

from lmjax.axes import abstract_mesh
from lmjax.config import RunConfig
from lmjax.log import format_bytes, format_count, format_duration
from lmjax.nn.attention import choose_attention
from lmjax.nn.context import choose_context
from lmjax.plan.aot import Compiled, TooLarge
from lmjax.plan.machine import HOST_RATE, Machine
from lmjax.plan.roofline import Times, Work, efficiencies, message_seconds
from lmjax.plan.state import pipelined, schedule_of

ADVICE = ("lower batch_size or raise accumulate, compute.remat=full or =offload, split more (mesh.fsdp, mesh.tensor), "
          "or a larger slice")


@dataclasses.dataclass(frozen=True)
class Planned:
    """One config on one machine. params, moments: bytes of the state on a device. activations: {remat: bytes}, a rough
    count. compiled: None without a compiler, and why_not says why. times: of the roofline, with the compiler's messages
    where there are any. second: seconds by the compiler's own cycles, or None."""

    config: RunConfig
    machine: Machine
    mesh: dict[str, int]
    num_params: int
    params: int
    moments: int
    activations: dict[str, float]
    work: Work
    times: Times
    compiled: Compiled | TooLarge | None
    why_not: str = ""
    second: float | None = None
    price: float | None = None

    @property
    def fits(self) -> bool | None:
        """None where only a compiler could tell."""
        capacity = self.machine.chip.hbm / self.machine.chip.devices
        if isinstance(self.compiled, TooLarge) or 2 * self.params + self.moments > capacity:
            return False
        return None if self.compiled is None else self.compiled.total <= capacity

    @property
    def tokens(self) -> int:
        return self.config.batch_size * self.config.seq_len

    def money(self, seconds: float) -> float | None:
        """Dollars for a billion tokens at so many seconds a step."""
        return self.price and self.price * self.machine.chips * seconds / 3600 / self.tokens * 1e9


def page(p: Planned) -> str:
    c, chip = p.config, p.machine.chip
    likely = p.times.step[1]
    axes = " x ".join(f"{name}={size}" for name, size in p.mesh.items() if size > 1) or "one device"
    attention = choose_attention(c.compute.attention, c.seq_len, c.compute.dtype, chip.kind)[0]
    if c.mesh.context > 1:
        attention = f"{choose_context(c.compute.context, c.seq_len)[0]} over context"
    tokens = p.tokens / p.machine.chips
    lines = [
        f"{c.name} on {p.machine}: {p.machine.chips:,} chips, mesh {axes}",
        f"model        {p.num_params:,} parameters ({format_count(p.num_params)}), {c.compute.dtype}, remat "
        f"{c.compute.remat}, attention {attention}" + (
            f", {c.model.moe.experts_per_token} of {c.model.moe.num_experts} experts a token ({c.compute.experts})"
            if c.model.moe else ""),
        f"batch        {c.batch_size:,} rows x {c.seq_len:,} = {format_count(p.tokens)} tokens a step, {tokens:,.0f} a "
        f"chip" + (f", in {c.accumulate} micro-batches" if c.accumulate > 1 else ""),
        *pipelined(c, abstract_mesh(c.mesh, p.machine.num_devices)),
        "", *_memory(p),
        "", "work of one chip in one step",
        f"  FLOPs      {p.work.model_flops:.3g} of the model, {p.work.flops:.3g} with what is computed again"
        + (" and in the bubble" if p.mesh["pipeline"] > 1 else ""),
        f"  bytes      {format_bytes(p.work.hbm)} to and from memory, by count of what the products read and write",
        "", *_messages(p),
        "", *_times(p),
    ]
    rate = p.tokens / likely
    lines += ["", f"whole run    {format_count(rate)} tokens/s, {format_duration(likely * c.total_steps)} for "
              f"{c.total_steps:,} steps ({format_count(p.tokens * c.total_steps)} tokens)"]
    if p.price is not None:
        low, mid, high = (p.money(s) for s in p.times.step)
        lines.append(f"money        ${mid:,.2f} for a billion tokens (${low:,.2f} to ${high:,.2f}) at ${p.price:g} a "
                     f"chip and hour, ${mid * p.tokens * c.total_steps / 1e9:,.0f} for the run")
    return "\n".join([*lines, "", *_assumptions(p)])


def _bar(used: float, capacity: float, width: int = 40) -> str:
    return "#" * min(round(width * used / capacity), width) + "." * max(width - round(width * used / capacity), 0)


def _memory(p: Planned) -> list[str]:
    capacity = p.machine.chip.hbm / p.machine.chip.devices
    each = "device (half a chip)" if p.machine.chip.devices == 2 else "chip"
    lines = [f"memory of one {each}, of {format_bytes(capacity)}"]

    def row(name: str, value: float, note: str = "") -> str:
        return f"  {name:<13}{format_bytes(value):>10}  {value / capacity:>4.0%}" + (f"  {note}" if note else "")

    lines += [row("parameters", p.params), row("optimizer", p.moments)]
    done = p.compiled
    if isinstance(done, Compiled):
        rest = done.argument - p.params - p.moments
        lines += [row("batch, rest", max(rest, 0)),
                  row("temporaries", done.temp + done.new, "activations, gathered weights and "
                      f"{format_bytes(p.params)} of float32 gradients"),
                  row("program", done.code),
                  row("together", done.total, f"[{_bar(done.total, capacity)}]")]
        lines.append("  fits" if p.fits else f"  DOES NOT FIT: {ADVICE}")
        if p.config.compute.attention == "cudnn":
            lines.append("  (compiled with attention=blockwise: cuDNN's needs its library, which is not here)")
    elif isinstance(done, TooLarge):
        lines.append("  DOES NOT FIT, says the compiler" + (
            f": {format_bytes(done.used)} of {format_bytes(done.limit)}, {format_bytes(done.used - done.limit)} too "
            "much" if done.used and done.limit else ""))
        lines += [f"    {format_bytes(size):>10}  {shape}  {name[-70:]}" for size, shape, name in done.largest]
        kept = ", ".join(f"{format_bytes(size)} with {remat}" for remat, size in p.activations.items())
        lines += [f"  activations, by arithmetic: {kept} (compute.remat={p.config.compute.remat})",
                  f"  what helps: {ADVICE}"]
    else:
        state = 2 * p.params + p.moments
        lines += [row("gradients", p.params), row("together", state, f"[{_bar(state, capacity)}]"),
                  "  " + ("DOES NOT FIT even without activations" if p.fits is False else
                          "activations come on top; only a compiler knows them") + f": {p.why_not}"]
    return lines


def _messages(p: Planned) -> list[str]:
    compiled = isinstance(p.compiled, Compiled)
    found = p.compiled.program.collectives if compiled else p.work.messages
    lines = ["collectives of one step, as compiled" if compiled else "collectives of one step, by arithmetic"]
    small, timed = 0, []
    for message in found:
        if message.bytes * message.count < 1e6:
            small += round(message.count)
        else:
            timed.append((message_seconds(message, p.machine), message))
    for seconds, m in sorted(timed, key=lambda pair: -pair[0])[:12]:
        lines.append(f"  {m.kind:<19}{m.count:>7,.0f} x {format_bytes(m.bytes):>9}  {m.axis} ({m.group} chips)  "
                     f"{seconds * 1e3:,.1f} ms")
    if not timed:
        lines.append("  none that matter")
    return lines + ([f"  and {len(timed) - 12} more kinds"] if len(timed) > 12 else []) + (
        [f"  and {small:,} of less than 1 MB"] if small else [])


def _seconds(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _times(p: Planned) -> list[str]:
    t, likely = p.times, efficiencies(p.machine.name)[1]
    fast, mid, slow = t.step
    lines = ["time of one step, by roofline",
             f"  products   {_seconds(t.compute)} at the whole peak, {_seconds(t.products)} at "
             f"{likely:.0%}",
             f"  memory     {_seconds(t.memory)}",
             f"  network    {_seconds(t.network)} beside the products, {_seconds(t.exposed)} between "
             "them",
             *([f"  host       {_seconds(t.host)} for {format_bytes(p.work.host)} of activations there and back"]
               if t.host else []),
             f"  step       {_seconds(mid)} ({_seconds(fast)} to {_seconds(slow)}), limited by "
             f"{t.limit}",
             f"  MFU        {t.mfu[1]:.0%} ({t.mfu[2]:.0%} to {t.mfu[0]:.0%})"]
    if p.second:
        ideal = p.work.model_flops / p.machine.chip.peak
        kernels = sum(p.compiled.program.kernels.values())
        lines.append(f"  compiler   {_seconds(p.second)} by its own estimated cycles"
                     + (f", with {kernels:,.0f} runs of kernels at the likely share" if kernels else "")
                     + f": MFU {ideal / p.second:.0%}, {p.second / mid - 1:+.0%} from the roofline")
    return lines


def _assumptions(p: Planned) -> list[str]:
    chip, (best, likely, worst) = p.machine.chip, efficiencies(p.machine.name)
    return [f"assumed      peak {chip.peak / 1e12:,.0f} TFLOP/s and {chip.hbm_rate / 1e12:.2f} TB/s a chip; "
            f"{chip.link / 1e9:.0f} GB/s a link one way, {chip.network / 1e9:.2f} GB/s a chip beyond"
            + (f", {HOST_RATE / 1e9:.0f} GB/s to the host" if p.work.host else "") + "; products at "
            f"{best:.0%}, {likely:.0%} or {worst:.0%} of the peak; no latency, no input or checkpoint stalls. Nothing "
            "here is a measurement; docs/planning.md says how far off it was for runs that were."]


def to_json(p: Planned) -> dict:
    """Every figure of the page. Bytes are of a device, seconds of a step."""
    done = p.compiled
    schedule = schedule_of(p.config, abstract_mesh(p.config.mesh, p.machine.num_devices))
    return {
        "config": p.config.name, "machine": str(p.machine), "chips": p.machine.chips, "mesh": p.mesh, "fits": p.fits,
        "parameters": p.num_params, "tokens_per_step": p.tokens,
        "pipeline": schedule._asdict() | {"bubble": schedule.bubble} if schedule.stages > 1 else None,
        "bytes": {"capacity": p.machine.chip.hbm / p.machine.chip.devices, "parameters": p.params,
                  "optimizer": p.moments} | (
            {"arguments": done.argument, "temporaries": done.temp, "total": done.total}
            if isinstance(done, Compiled) else {}),
        "work": {"model_flops": p.work.model_flops, "flops": p.work.flops, "bytes": p.work.hbm,
                 "host_bytes": p.work.host},
        "collectives": [dataclasses.asdict(m) for m in (
            done.program.collectives if isinstance(done, Compiled) else p.work.messages)],
        "seconds": dict(zip(("fast", "likely", "slow"), p.times.step, strict=True)) | {"compiler": p.second},
        "mfu": dict(zip(("fast", "likely", "slow"), p.times.mfu, strict=True)),
        "dollars_per_billion_tokens": p.money(p.times.step[1]),
        "compiled": done is not None, "compile_cpu_seconds": getattr(done, "cpu_seconds", None),
        "estimated_cycles": done.program.cycles if isinstance(done, Compiled) else None,
        "why_not_compiled": p.why_not or None,
    }
