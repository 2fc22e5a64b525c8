"""What one step of a run is for one chip, by arithmetic on the model's shapes: FLOPs, bytes, messages.

What lives here: the formulas, with no compiler. What does not: times (`lmjax.plan.roofline`), or what the compiler
really does (`lmjax.plan.hlo`). Model FLOPs are those of `lmjax.flops`.
"""

import dataclasses
import math

from lmjax import flops
from lmjax.models import DecoderConfig
from lmjax.nn.pipeline import Schedule
from lmjax.plan.roofline import Message, Work

BF16, F32, INT32 = 2, 4, 4
STATE = 3 * F32  # weight and two moments of AdamW
WHOLE = Schedule(1, 1, 1)  # without stages, all layers run once, on all rows


@dataclasses.dataclass(frozen=True)
class Split:
    """Sizes of the mesh axes. In the mesh their order is replica, pipeline, data, fsdp, expert, context, tensor, which
    varies fastest."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    pipeline: int = 1
    replica: int = 1

    @property
    def size(self) -> int:
        return self.copies * self.pipeline * self.shards

    @property
    def copies(self) -> int:
        """Of each weight."""
        return self.replica * self.data

    @property
    def shards(self) -> int:
        """Parts of a weight of a stage: `expert` and `context` are more of fsdp to those that are no expert's."""
        return self.fsdp * self.expert * self.context * self.tensor


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of matrices. common: of a block, that every token meets. experts: of all experts of a block; chosen: of
    those that one token meets. head: of the output matrix."""

    common: int
    experts: int
    chosen: int
    head: int

    @property
    def block(self) -> int:
        return self.common + self.experts

    @property
    def met(self) -> int:
        return self.common + self.chosen


def matrix_weights(c: DecoderConfig) -> Weights:
    """c is filled."""
    common, head = c.d_model * c.head_dim * 2 * (c.num_heads + c.num_kv_heads), c.vocab_size * c.d_model
    matrices, moe = 3 if c.gated else 2, c.moe
    if moe is None:
        return Weights(common + matrices * c.d_model * c.d_ff, 0, 0, head)
    expert = matrices * c.d_model * moe.d_ff
    common += c.d_model * (moe.num_experts + matrices * moe.shared_d_ff)
    return Weights(common, moe.num_experts * expert, moe.experts_per_token * expert, head)


def analytic(model: DecoderConfig, split: Split, batch_size: int, seq_len: int, remat: str | float = "full",
             accumulate: int = 1, *, all_keys: bool = False, ring: bool = True, padding: float = 1.0,
             schedule: Schedule = WHOLE) -> Work:
    """The step of a bfloat16 run on each of split.size chips.

    remat as `ComputeConfig.remat`, or the share of a block's forward products that is computed again. all_keys: count
    attention's model FLOPs over whole rows, as PaLM does and MaxText did until July 2025, in place of the keys that a
    causal query sees. ring: how keys go over `context`, else they are gathered (`lmjax.nn.context`). padding: rows that
    experts compute over rows that were chosen; 1 here, a recipe's capacity factor where tokens are dropped. schedule:
    of a pipeline of split.pipeline stages, which computes in its bubble too.
    """
    assert schedule.stages == split.pipeline, (schedule, split)
    c = model.filled()
    w = matrix_weights(c)
    layers, tokens = c.num_layers, batch_size * seq_len / split.size
    windows = [c.windows[i % len(c.windows)] for i in range(layers)]
    seen = sum(flops.mean_keys(seq_len, window) for window in windows)  # keys of a query, summed over the layers
    counted = layers * seq_len if all_keys else seen
    wide = c.num_heads * c.head_dim
    model_flops = tokens * (6.0 * (layers * w.met + w.head) + 12 * wide * counted)
    idle = _with_bubble(schedule)
    runs = layers / schedule.stages * schedule.micro * idle  # of a layer on this chip, in each pass

    # Attention kernels make the scores anew in the backward pass, once for dq and once for dk and dv: seven products
    # for the four that are counted; over `context` once for all. Recomputation adds the block's forward pass ("full",
    # "offload"), the products into the MLP's inside ("named"), or attention's ("dots"), and then that of experts too:
    # their grouped products are none of the dots that are kept.
    inner = 2 if c.gated else 1  # matrices into the MLP's inside, beside the one out of it
    again, again_experts = (remat, remat) if isinstance(remat, float) else {
        "full": (1.0, 1.0), "offload": (1.0, 1.0), "dots": (0.0, 1.0),
        "named": (inner * c.d_model * _dense_ff(c) / w.common, inner / (inner + 1))}.get(remat, (0.0, 0.0))
    attends = remat not in ("none", "named")  # whether the backward pass runs attention's forward pass again
    scores = 6 if split.context == 1 else 2
    computed = ((6 + 2 * again) * layers * w.common + (6 + 2 * again_experts) * layers * w.chosen * padding
                + (12 + scores) * wide * seen + 4 * wide * seen * attends) * idle + 6.0 * w.head

    here = (w.common + w.experts / split.expert) / split.tensor  # of a block, once gathered
    gathers = 2 if split.shards > split.tensor else 1  # written once a gather, or cast once
    read = (2 + gathers) * (runs * here + w.head / split.tensor)
    read += runs * ((3 + again) * w.common + (3 + again_experts) * w.experts / split.expert) / split.tensor
    hbm = accumulate * BF16 * (read + (3 + again) * w.head / split.tensor)
    embed = 0 if c.tied else w.head
    hbm += (2 * STATE + F32) * (layers / split.pipeline * w.block + w.head + embed) / split.shards
    if split.pipeline > 1:  # gradients are added up, tick by tick
        hbm += accumulate * 2 * F32 * runs * w.block / split.shards
    rows = tokens * split.tensor  # tokens of the group that shares them; behind the layers, where stages share them too
    moved = 6 * c.d_model + (2 * wide + 2 * c.num_kv_heads * c.head_dim + (inner + 1) * _dense_ff(c)) / split.tensor
    moved = (3 + again) * moved + (3 + again_experts) * _expert_rows(c, split, 4, inner + 1)
    hbm += rows * layers * idle * BF16 * moved + rows * c.vocab_size / split.tensor * F32 * 4
    host = 2.0 * BF16 * layers * idle * rows * c.d_model if remat == "offload" else 0.0  # blocks' inputs, to and fro
    summed = 0.0 if remat == "named" else again  # what attention adds is kept, the MLP's sum is not needed again
    messages = _messages(c, split, schedule, rows, summed, accumulate, remat != "none", attends, ring)
    return Work(model_flops, tokens * computed, hbm, tuple(messages), host)


def _with_bubble(schedule: Schedule) -> float:
    """What a stage's layers compute over what is of use: 1 without stages."""
    return schedule.ticks / (schedule.micro * schedule.repeats)


def _dense_ff(c: DecoderConfig) -> int:
    """Width inside the MLP that every token takes; 0 for a mixture without one."""
    return c.moe.shared_d_ff if c.moe else c.d_ff


def _expert_rows(c: DecoderConfig, split: Split, models: int, experts: int) -> float:
    """Numbers for each token of a device: `models` of D and `experts` of an expert's F in each row of a grouped
    product. Rows are as many as if every choice of the devices that share experts fell on this one (`lmjax.nn.moe`)."""
    if c.moe is None:
        return 0.0
    return split.expert * c.moe.experts_per_token * (models * c.d_model + experts * c.moe.d_ff / split.tensor)


def _messages(c: DecoderConfig, split: Split, schedule: Schedule, rows: float, again: float, accumulate: int,
              recomputes: bool, attends: bool, ring: bool):
    """recomputes, attends: whether the backward pass runs experts, and attention, or what leads to them, again.

    A pipeline does in each tick what is done once without: it gathers weights, and reduces their gradients, over
    `data` and `replica` too, and then in the compute dtype (docs/planning.md has what a TPU's program does).
    """
    w = matrix_weights(c)
    d, t, e, stages = split.copies, split.tensor, split.expert, schedule.stages
    layers = c.num_layers / stages * schedule.micro * _with_bubble(schedule)  # runs of one
    ticks = rows * stages / schedule.micro  # tokens of a tick
    embed, over = 0 if c.tied else w.head, split.shards // t  # `over`: devices that a weight is gathered from
    apart = split.shards * (stages if split.replica > 1 else 1)  # copies of a weight; stages may lie between them
    name = " + ".join(n for n in ("fsdp", "expert", "context") if getattr(split, n) > 1)
    own = " + ".join(n for n in ("fsdp", "context") if getattr(split, n) > 1)  # experts are not gathered over `expert`
    # Weights are gathered for each pass; the recomputation shares its gather with the backward pass.
    for what, axes, size, group, stride, count in (
            ("blocks", name, w.common, over, t, layers),
            ("experts", own, w.experts / e, over // e, t * e if split.context == 1 else t, layers),
            ("vocabulary", name, w.head + embed, over, t, 1)):
        if group > 1 and size:
            for kind, passes in (("all-gather", 2), ("reduce-scatter", 1)):
                yield Message(kind, f"{axes} ({what})", BF16 * size / t, group, stride, passes * count * accumulate)
    if d > 1 and stages == 1:
        yield Message("all-reduce", "data (gradients)", F32 * (layers * w.block + w.head + embed) / split.shards, d,
                      apart)
    elif d > 1:
        yield Message("all-reduce", "data (gradients)", BF16 * w.block / split.shards, d, apart, layers * accumulate)
        yield Message("all-reduce", "data (gradients)", F32 * (w.head + embed) / split.shards, d, apart, accumulate)
    if t > 1:  # after attention and after the MLP, each in the forward and, for their inputs, in the backward pass
        for wider, count in ((1, 2), (e, 2)) if c.moe and e > 1 else ((1, 4),):
            yield Message("all-reduce", "tensor (activations)", BF16 * ticks * wider * c.d_model, t, 1,
                          layers * count * (1 + again / 2))
    if e > 1:
        yield from _expert_messages(c, split, layers, e * ticks, recomputes)
    if split.context > 1:
        yield from _context_messages(c, split, layers, ticks, rows, attends, ring)
    if stages > 1:
        yield from _stage_messages(c, split, schedule, ticks, accumulate)


def _stage_messages(c: DecoderConfig, split: Split, schedule: Schedule, tokens: float, accumulate: int):
    """What goes to the next stage, forward and backward, tokens in each tick. At the ends of the layers: the last
    stage's results to all, a part each, their gradients back, and those of what went in, added up. The gradient of the
    output matrix, which all stages use; and with repeats, weights of chunks from where they lie, and back."""
    w, p, stride = matrix_weights(c), schedule.stages, split.data * split.shards
    x = BF16 * tokens / accumulate * c.d_model
    yield Message("collective-permute", "pipeline (activations)", x, p, stride, 2 * schedule.ticks * accumulate)
    for kind in ("reduce-scatter", "all-gather", "all-reduce"):
        yield Message(kind, "pipeline (ends)", schedule.micro * x, p, stride, accumulate)
    yield Message("all-reduce", "pipeline (gradients)", F32 * w.head / split.shards, p, stride, accumulate)
    if schedule.repeats > 1:
        weights = c.num_layers / p * w.block / split.shards
        for each in (BF16, F32):
            yield Message("all-to-all", "pipeline (chunks)", each * weights, p, stride, accumulate)


def _expert_messages(c: DecoderConfig, split: Split, layers: float, tokens: float, recomputes: bool):
    """Tokens of the devices that share experts, with their choices and shares, and back; the gradients of both."""
    choices, stride = c.moe.experts_per_token, split.tensor * split.context
    x = BF16 * c.d_model
    for kind, each, count in (("all-gather", x + (INT32 + F32) * choices, 1 + recomputes), ("all-gather", x, 1),
                              ("reduce-scatter", x, 1), ("reduce-scatter", x + F32 * choices, 1)):
        yield Message(kind, "expert (tokens)", tokens * each, split.expert, stride, layers * count)


def _context_messages(c: DecoderConfig, split: Split, layers: float, tokens: float, rows: float, recomputes: bool,
                      ring: bool):
    """Keys and values of each layer, forward and backward, and their float32 gradients, once; at the two ends of the
    model, tokens to the zig-zag order and back."""
    ways, t = split.context, split.tensor
    heads = math.lcm(c.num_kv_heads, t) // t  # of a device; fewer than there are devices are repeated
    numbers = 2 * heads * c.head_dim * tokens
    passes = 2 + recomputes
    if ring:
        yield Message("collective-permute", "context (ring)", BF16 * numbers, ways, t, layers * passes * (ways - 1))
        yield Message("collective-permute", "context (ring)", F32 * numbers, ways, t, layers * ways)
    else:
        yield Message("all-gather", "context (keys)", BF16 * ways * numbers, ways, t, layers * passes)
        yield Message("reduce-scatter", "context (keys)", F32 * ways * numbers, ways, t, layers)
    yield Message("collective-permute", "context (order)", BF16 * rows * c.d_model, ways, t, 2)


def activation_bytes(model: DecoderConfig, split: Split, batch_size: int, seq_len: int, remat: str,
                     accumulate: int = 1, schedule: Schedule = WHOLE) -> float:
    """About what the backward pass finds kept on a chip: bfloat16 inputs of blocks ("full"; on the host for
    "offload"), with what attention reads and gives ("named"), with every product's result ("dots"), or with what lies
    between those as well ("none"), and the one layer that is being worked on; of stages, for all ticks, and what went
    into them, with its gradient.
    Compilers keep more or less; this is for leaving out what is hopeless before one is asked."""
    c = model.filled()
    tokens = batch_size * seq_len / (split.size / split.tensor) / accumulate
    wide = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    matrices = 3 if c.gated else 2
    products = BF16 * tokens * (2 * c.d_model + (wide + matrices * _dense_ff(c)) / split.tensor)
    everything = products + BF16 * tokens * (4 * c.d_model + _expert_rows(c, split, 3, matrices))
    named = BF16 * tokens * (2 * c.d_model + wide / split.tensor)
    full = BF16 * tokens * c.d_model
    kept = {"offload": 0, "full": full, "named": named, "dots": products, "none": everything}[remat]
    w = matrix_weights(c)
    here = w.common + w.experts / split.expert
    gathered = BF16 * max(2 * here, w.head) / split.tensor if split.shards > split.tensor else 0
    tick = schedule.stages / schedule.micro  # of a copy's tokens, those of a micro-batch
    held = 2 * full * schedule.stages if schedule.stages > 1 else 0
    return c.num_layers * kept * _with_bubble(schedule) + 2 * everything * tick + gathered + held
