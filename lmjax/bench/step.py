"""`lmjax bench step`: where the time of a train step goes, and how far each part is from its matrix products.

Each part is compiled alone, forward and backward, from the functions that the model is made of, at the shapes of the
model; each distinct matrix product is timed alone too, and their sum is the floor: a step that did nothing else. All
are timed in turns, round by round. Parts compiled alone cannot share passes over memory with their neighbours, so
their sum may be a little more than the whole step. Nothing is compared with other libraries here (`train` does).
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from lmjax.bench.cases import SHAPES
from lmjax.bench.output import finish, machine, say, table
from lmjax.bench.rounds import spread
from lmjax.errors import ConfigError
from lmjax.flops import mean_keys

DESCRIPTION = """Where the time of a train step goes. The floor of a part is the time of its matrix products alone,
measured on this machine; the gap is the rest. Host overhead is what Python costs a step: until a compiled step of a
tiny model returns, and, in the real loop, the CPU time of everything but waiting for the device. Target: under 1 ms."""

HOST_TARGET_MS = 1.0
TURN = 0.05  # seconds that a short call is repeated for in its turn


@dataclasses.dataclass(frozen=True)
class Part:
    """times: how often a step does it. floor: {matrix product: how often in one of them}, forward and backward."""

    name: str
    times: int
    floor: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class MatMul:
    """b products [m, k] x [k, n], as one compiled call."""

    name: str
    m: int
    k: int
    n: int
    b: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.b * self.m * self.k * self.n


def run(args: list[str]) -> int:
    options = parse(args)
    where = machine()
    import jax

    from lmjax.bench.ours import make_case, open_training

    case = make_case(options.shape, dtype=options.dtype, batch=options.batch, seq_len=options.seq_len)
    say(f"{case.shape}: {case.parameters:,} parameters, {case.batch} x {case.seq_len} tokens, {case.dtype}, on "
        f"{case.device}")
    with open_training(case) as training:
        batch, compile_seconds, _ = training.compile()
        training.advance(batch)
        training.fetch()
        matmuls = matrix_products(case)
        parts, of_parts = list_parts(case), part_calls(case, training)
        say(f"step compiled in {compile_seconds:.1f} s; {len(matmuls)} matrix products and {len(parts)} parts, "
            f"{options.rounds} rounds")
        calls = {f"matmul {m.name}": matmul_call(m, case.dtype) for m in matmuls}
        calls |= of_parts | {"whole step": lambda: (training.advance(), training.fetch())}
        took = by_turns(calls, options.rounds)
        host = {"dispatch_ms": tiny_dispatch(options.host_steps)} | loop_host(training, options.rounds + 2)
    report(case, matmuls, parts, took, host, vars(options), where, jax.__version__)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmjax bench step", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="baseline", choices=SHAPES, metavar="NAME",
                        help=f"{', '.join(SHAPES)} (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=0, help="rows (default: the shape's)")
    parser.add_argument("--seq-len", type=int, default=0, help="tokens of a row (default: the shape's)")
    parser.add_argument("--host-steps", type=int, default=200, help="steps of the tiny model (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="shape tiny, one round: does it all work?")
    options = parser.parse_args(args)
    if options.smoke:
        options.shape, options.rounds, options.host_steps = "tiny", 1, 5
    for name, low in (("rounds", 1), ("host_steps", 1), ("batch", 0), ("seq_len", 0)):
        if getattr(options, name) < low:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: must be at least {low}")
    return options


def by_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{call: {"wall", "cpu"}}, ms of each time it ran: once a turn, or again for TURN seconds where it is short. The
    first time of a turn is not counted: it compiles, or memory and caches went to the others meanwhile."""
    for call in calls.values():
        call()
    took: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            call()
            until = time.perf_counter() + TURN
            while True:
                began, cpu = time.perf_counter(), time.process_time()
                call()
                ended = time.perf_counter()
                took[name]["wall"].append(1e3 * (ended - began))
                took[name]["cpu"].append(1e3 * (time.process_time() - cpu))
                if ended > until:
                    break
        say(f"  round {number + 1}/{rounds}: whole step {took['whole step']['wall'][-1]:,.1f} ms")
    return took


# ---- the floor -----------------------------------------------------------------------------------------


def matrix_products(case) -> list[MatMul]:
    """Every distinct product of a step, forward and backward, once each. For y = x W the backward pass has
    dx = dy W^T and dW = x^T dy. Attention is timed over all keys, and counted for those that are seen."""
    m = case.model
    D, H, F, V = m["d_model"], m["head_dim"], m["d_ff"], m["vocab_size"]
    N, K, tokens, T = m["num_heads"], m["num_kv_heads"], case.batch * case.seq_len, case.seq_len
    found = []
    for name, width in {"q, o": N * H, "k, v": K * H, "mlp": F, "head": V}.items():
        found += [MatMul(f"{name} [D -> {width}]", tokens, D, width),
                  MatMul(f"{name} [{width} -> D]", tokens, width, D),
                  MatMul(f"{name} weights", D, tokens, width)]
    return found + [MatMul("scores", T, H, T, case.batch * N), MatMul("mix", T, T, H, case.batch * N)]


def matmul_call(m: MatMul, dtype: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    a, b = normal((m.b, m.m, m.k), dtype), normal((m.b, m.k, m.n), dtype)
    out = jnp.zeros((m.b, m.m, m.n), dtype)
    if m.b == 1:
        a, b, out = a[0], b[0], out[0]
    # The old result's memory is used again, as a step does; else the clock would hold its first touch too.
    product = jax.jit(lambda a, b, out: jnp.matmul(a, b, preferred_element_type=a.dtype), donate_argnums=2,
                      keep_unused=True)

    def call():
        nonlocal out
        out = jax.block_until_ready(product(a, b, out))

    return call


def normal(shape: tuple[int, ...], dtype: Any):
    """Random numbers; what is constant or equal a compiler may work out beforehand."""
    import jax

    return jax.random.normal(jax.random.key(math.prod(shape)), shape, dtype)


def projections(width: int, name: str, times: float = 1) -> dict[str, float]:
    """The three products of `times` weights between D and width."""
    return {f"{name} [D -> {width}]": times, f"{name} [{width} -> D]": times, f"{name} weights": times}


# ---- the parts -----------------------------------------------------------------------------------------


def list_parts(case) -> list[Part]:
    """The step cut at the model's own seams. Not in it: residual additions, and what XLA would fuse across."""
    m = case.model
    L, N, K, H = m["num_layers"], m["num_heads"], m["num_kv_heads"], m["head_dim"]
    windows = layer_windows(case)
    cores = []
    for window in dict.fromkeys(windows):
        seen = mean_keys(case.seq_len, window) / case.seq_len
        cores.append(Part(core_name(window), windows.count(window), {"scores": 2 * seen, "mix": 4 * seen}))
    return [
        Part("embedding", 1),
        Part("norms", 2 * L + 1),
        Part("attention: projections, RoPE", L,
             add(projections(N * H, "q, o", 2), projections(K * H, "k, v", 2))),
        *cores,
        Part("mlp", L, projections(m["d_ff"], "mlp", 3 if m["gated"] else 2)),
        Part("loss", 1, projections(m["vocab_size"], "head")),
        Part("optimizer", 1),
    ]


def layer_windows(case) -> list[int]:
    windows = case.model["windows"]
    return [windows[i % len(windows)] for i in range(case.model["num_layers"])]


def core_name(window: int) -> str:
    return "attention: core" + (f", window {window}" if window else "")


def part_calls(case, training) -> dict[str, Callable[[], Any]]:
    """{name of a part: runs one of it, to its end}."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lmjax.losses.cross_entropy import cross_entropy
    from lmjax.models import Decoder
    from lmjax.nn.attention import self_attention

    model = Decoder(training.config.model, compute=training.config.compute)
    c, shape, dtype = model.config, (case.batch, case.seq_len), jnp.dtype(case.dtype)
    graph, stacked = nnx.split(model.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda a: a[0], stacked))
    _, batch = next(training.batches)
    x = normal((*shape, c.d_model), dtype)
    heads, kv = (normal((*shape, n, c.head_dim), dtype) for n in (c.num_heads, c.num_kv_heads))

    def embed(batch, table):
        return table[batch["tokens"]].astype(dtype)

    def project(batch, attention, x, y):
        return attention.qkv(x, model.rotations(batch["positions"])[c.windows[0] > 0]), attention.out(y)

    def core(window, batch, q, k, v):
        return self_attention(q, k, v, batch["segments"], scale=c.query_scale, softcap=c.attention_softcap,
                              window=window, implementation=training.config.compute.attention)

    def loss(batch, x, head):
        return cross_entropy(x, head, batch["targets"], batch["weights"], softcap=c.logit_softcap)[0]

    return {
        "embedding": backward(embed, batch, model.embed_VD[...]),
        "norms": backward(lambda _, norm, x: norm(x), batch, block.mlp_norm, x),
        "attention: projections, RoPE": backward(project, batch, block.attention, x, heads),
        **{core_name(window): backward(functools.partial(core, window), batch, heads, kv, kv)
           for window in layer_windows(case)},
        "mlp": backward(lambda _, mlp, x: mlp(x), batch, block.mlp, x),
        "loss": backward(loss, batch, x, model.head_VD),
        "optimizer": optimizer_call(training),
    }


def backward(f: Callable, batch: Any, *args: Any) -> Callable[[], Any]:
    """f(batch, *args) and its gradients by all args, compiled, for a random cotangent. Everything is an argument of
    the program: what it closed over would be a constant, and be worked out while it is compiled."""
    import jax

    cotangent = jax.tree.map(lambda s: normal(s.shape, s.dtype), jax.eval_shape(f, batch, *args))

    @jax.jit
    def both(batch, cotangent, *args):
        out, pull = jax.vjp(functools.partial(f, batch), *args)
        return out, pull(cotangent)

    return lambda: jax.block_until_ready(both(batch, cotangent, *args))


def add(*floors: dict[str, float]) -> dict[str, float]:
    """Counts by name, added up: two kinds of projection may have the same width."""
    total: dict[str, float] = {}
    for floor in floors:
        for name, times in floor.items():
            total[name] = total.get(name, 0) + times
    return total


def optimizer_call(training) -> Callable[[], Any]:
    """Clipping, AdamW and the new weights, with the state donated as in the step."""
    import jax
    import jax.numpy as jnp
    import optax

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, grads):
        updates, opt_state = training.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    grads = jax.tree.map(jnp.ones_like, training.state.params)
    kept = jax.tree.map(jnp.copy, (training.state.params, training.state.opt_state))

    def call():
        nonlocal kept
        kept = jax.block_until_ready(update(*kept, grads))

    return call


# ---- the host ------------------------------------------------------------------------------------------


def tiny_dispatch(steps: int) -> dict[str, float]:
    """ms until a compiled step of a tiny model has returned: what Python and JAX's dispatch cost."""
    import jax

    from lmjax.bench.ours import make_case, open_training

    with open_training(make_case("tiny", dtype="float32")) as training:
        batch, _, _ = training.compile()
        times = []
        for _ in range(steps):
            jax.block_until_ready(training.state)
            began = time.perf_counter()
            training.state, _ = training.step(training.state, batch)
            times.append(1e3 * (time.perf_counter() - began))
    return spread(times)


def loop_host(training, steps: int) -> dict[str, dict[str, float]]:
    """What each step of the real loop costs its thread beside waiting for the device: taking a batch, dispatching,
    fetching metrics that are ready; "loop_ms" of CPU time and "loop_wall_ms". Beside an accelerator the two are the
    same; where the device is this CPU, the thread waits for a core while all of them compute, which is in the second.
    """
    import jax

    times: dict[str, list[float]] = {"loop_ms": [], "loop_wall_ms": []}
    clocks = {"loop_ms": time.thread_time, "loop_wall_ms": time.perf_counter}
    training.advance()
    for _ in range(steps):
        began = {name: clock() for name, clock in clocks.items()}
        _, batch = next(training.batches)
        with jax.transfer_guard("disallow"):
            training.state, metrics = training.step(training.state, batch)
        waiting = {name: clock() for name, clock in clocks.items()}
        jax.block_until_ready(training.pending)
        waited = {name: clock() - waiting[name] for name, clock in clocks.items()}
        training.fetch()
        training.pending = metrics
        for name, clock in clocks.items():
            times[name].append(1e3 * (clock() - began[name] - waited[name]))
    training.fetch()
    return {name: spread(values) for name, values in times.items()}


# ---- what is printed -----------------------------------------------------------------------------------


def report(case, matmuls: list[MatMul], parts: list[Part], took: dict[str, dict[str, list[float]]], host: dict,
           settings: dict, where: dict, jax_version: str) -> None:
    """Tables and JSON. The tables take each call's quickest time: others on the machine can only add to it."""
    ms = {name: spread(values["wall"]) | {"cpu": statistics.median(values["cpu"])} for name, values in took.items()}
    best = {name: value["min"] for name, value in ms.items()}
    rate = {m.name: m.flops / best[f"matmul {m.name}"] / 1e6 for m in matmuls}
    say("\nquickest times\n" + table([("matrix product", "m", "k", "n", "ms", "GFLOP/s")] + [
        (m.name + (f" x {m.b}" if m.b > 1 else ""), f"{m.m:,}", f"{m.k:,}", f"{m.n:,}",
         f"{best[f'matmul {m.name}']:,.2f}", f"{rate[m.name]:,.0f}") for m in matmuls]))
    whole = best["whole step"]
    lines, rows = {}, [("part", "times", "ms", "share", "floor ms", "gap ms", "CPU ms")]

    def row(name: str, times: str, took: float, floor: float, cpu: float) -> tuple[str, ...]:
        figures = f"{took:,.1f}", f"{took / whole:.1%}", f"{floor:,.1f}", f"{took - floor:,.1f}", f"{cpu:,.1f}"
        return name, times, *figures

    for part in parts:
        total, cpu = part.times * best[part.name], part.times * ms[part.name]["cpu"]
        floor = part.times * sum(n * best[f"matmul {name}"] for name, n in part.floor.items())
        lines[part.name] = {"times": part.times, "ms": total, "share": total / whole, "floor_ms": floor,
                            "gap_ms": total - floor, "cpu_ms": cpu, "one_call_ms": ms[part.name]}
        rows.append(row(part.name, str(part.times), total, floor, cpu))
    total, floor, cpu = (sum(line[key] for line in lines.values()) for key in ("ms", "floor_ms", "cpu_ms"))
    rows += [row("sum of parts", "", total, floor, cpu), row("whole step", "1", whole, floor, ms["whole step"]["cpu"])]
    say("\n" + table(rows))
    worst = host["loop_ms"]["median"]
    met = worst < HOST_TARGET_MS
    say(f"host: a compiled step of a tiny model returns after {host['dispatch_ms']['median']:.3f} ms; the loop's own "
        f"work is {worst:.3f} ms of CPU time a step, the median (target under {HOST_TARGET_MS:g} ms: "
        f"{'met' if met else 'missed'}), and takes {host['loop_wall_ms']['median']:.3f} ms")
    tokens = case.batch * case.seq_len
    finish("step", settings, where, case=vars(case), jax=jax_version,
           matmuls={m.name: {"m": m.m, "k": m.k, "n": m.n, "batch": m.b, "gflops": rate[m.name],
                             "ms": ms[f"matmul {m.name}"]} for m in matmuls},
           parts=lines, whole_step_ms=ms["whole step"], sum_of_parts_ms=total, floor_ms=floor,
           floor_share=floor / whole, gap_ms=whole - floor,
           host=host | {"target_ms": HOST_TARGET_MS, "met": met}, tokens_per_second=1e3 * tokens / whole,
           model_gflops=case.flops_causal * tokens / whole / 1e6,
           floor_gflops=case.flops_causal * tokens / floor / 1e6)
