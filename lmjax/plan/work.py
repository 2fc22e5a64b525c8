"""What one step of a run is for one chip, by arithmetic on the model's shapes: FLOPs, bytes, messages.

What lives here: the formulas, with no compiler. What does not: times (`lmjax.plan.roofline`), or what the compiler
really does (`lmjax.plan.hlo`). Model FLOPs are those of `lmjax.flops`.
"""

import dataclasses
import math

from lmjax import flops
from lmjax.models import DecoderConfig
from lmjax.plan.roofline import Message, Work

BF16, F32, INT32 = 2, 4, 4
STATE = 3 * F32  # weight and two moments of AdamW


@dataclasses.dataclass(frozen=True)
class Split:
    """Sizes of the mesh axes; in the mesh `expert` and `context` stand between fsdp and tensor, which varies fastest.
    data: that of `replica` too."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    @property
    def size(self) -> int:
        return self.data * self.shards

    @property
    def shards(self) -> int:
        """Parts of a weight: `expert` and `context` are more of fsdp to those that are no expert's."""
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
             accumulate: int = 1, *, all_keys: bool = False, ring: bool = True, padding: float = 1.0) -> Work:
    """The step of a bfloat16 run on each of split.size chips.

    remat as `ComputeConfig.remat`, or the share of a block's forward products that is computed again. all_keys: count
    attention's model FLOPs over whole rows, as PaLM does and MaxText did until July 2025, in place of the keys that a
    causal query sees. ring: how keys go over `context`, else they are gathered (`lmjax.nn.context`). padding: rows that
    experts compute over rows that were chosen; 1 here, a recipe's capacity factor where tokens are dropped.
    """
    c = model.filled()
    w = matrix_weights(c)
    layers, tokens = c.num_layers, batch_size * seq_len / split.size
    windows = [c.windows[i % len(c.windows)] for i in range(layers)]
    seen = sum(flops.mean_keys(seq_len, window) for window in windows)  # keys of a query, summed over the layers
    counted = layers * seq_len if all_keys else seen
    wide = c.num_heads * c.head_dim
    model_flops = tokens * (6.0 * (layers * w.met + w.head) + 12 * wide * counted)

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
                + 6.0 * w.head + (12 + scores) * wide * seen + 4 * wide * seen * attends)

    here = (w.common + w.experts / split.expert) / split.tensor  # of a block, once gathered
    gathers = 2 if split.shards > split.tensor else 1  # written once a gather, or cast once
    read = (2 + gathers) * (layers * here + w.head / split.tensor)
    read += layers * ((3 + again) * w.common + (3 + again_experts) * w.experts / split.expert) / split.tensor
    hbm = accumulate * BF16 * (read + (3 + again) * w.head / split.tensor)
    embed = 0 if c.tied else w.head
    hbm += (2 * STATE + F32) * (layers * w.block + w.head + embed) / split.shards
    rows = tokens * split.tensor  # tokens of the group that shares them
    moved = 6 * c.d_model + (2 * wide + 2 * c.num_kv_heads * c.head_dim + (inner + 1) * _dense_ff(c)) / split.tensor
    moved = (3 + again) * moved + (3 + again_experts) * _expert_rows(c, split, 4, inner + 1)
    hbm += rows * layers * BF16 * moved + rows * c.vocab_size / split.tensor * F32 * 4
    host = 2.0 * BF16 * layers * rows * c.d_model if remat == "offload" else 0.0  # inputs of blocks, there and back
    summed = 0.0 if remat == "named" else again  # what attention adds is kept, the MLP's sum is not needed again
    messages = _messages(c, split, rows, summed, accumulate, remat != "none", attends, ring)
    return Work(model_flops, tokens * computed, hbm, tuple(messages), host)


def _dense_ff(c: DecoderConfig) -> int:
    """Width inside the MLP that every token takes; 0 for a mixture without one."""
    return c.moe.shared_d_ff if c.moe else c.d_ff


def _expert_rows(c: DecoderConfig, split: Split, models: int, experts: int) -> float:
    """Numbers for each token of a device: `models` of D and `experts` of an expert's F in each row of a grouped
    product. Rows are as many as if every choice of the devices that share experts fell on this one (`lmjax.nn.moe`)."""
    if c.moe is None:
        return 0.0
    return split.expert * c.moe.experts_per_token * (models * c.d_model + experts * c.moe.d_ff / split.tensor)


def _messages(c: DecoderConfig, split: Split, rows: float, again: float, accumulate: int, recomputes: bool,
              attends: bool, ring: bool):
    """recomputes, attends: whether the backward pass runs experts, and attention, or what leads to them, again."""
    w = matrix_weights(c)
    layers, d, t, e = c.num_layers, split.data, split.tensor, split.expert
    embed, over = 0 if c.tied else w.head, split.shards // t  # `over`: devices that a weight is gathered from
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
    if d > 1:
        yield Message("all-reduce", "data (gradients)", F32 * (layers * w.block + w.head + embed) / split.shards, d,
                      split.shards)
    if t > 1:  # after attention and after the MLP, each in the forward and, for their inputs, in the backward pass
        for wider, count in ((1, 2), (e, 2)) if c.moe and e > 1 else ((1, 4),):
            yield Message("all-reduce", "tensor (activations)", BF16 * rows * wider * c.d_model, t, 1,
                          layers * count * (1 + again / 2))
    if e > 1:
        yield from _expert_messages(c, split, e * rows, recomputes)
    if split.context > 1:
        yield from _context_messages(c, split, rows, attends, ring)


def _expert_messages(c: DecoderConfig, split: Split, tokens: float, recomputes: bool):
    """Tokens of the devices that share experts, with their choices and shares, and back; the gradients of both."""
    layers, choices, stride = c.num_layers, c.moe.experts_per_token, split.tensor * split.context
    x = BF16 * c.d_model
    for kind, each, count in (("all-gather", x + (INT32 + F32) * choices, 1 + recomputes), ("all-gather", x, 1),
                              ("reduce-scatter", x, 1), ("reduce-scatter", x + F32 * choices, 1)):
        yield Message(kind, "expert (tokens)", tokens * each, split.expert, stride, layers * count)


def _context_messages(c: DecoderConfig, split: Split, rows: float, recomputes: bool, ring: bool):
    """Keys and values of each layer, forward and backward, and their float32 gradients, once; at the two ends of the
    model, tokens to the zig-zag order and back."""
    ways, layers, t = split.context, c.num_layers, split.tensor
    heads = math.lcm(c.num_kv_heads, t) // t  # of a device; fewer than there are devices are repeated
    numbers = 2 * heads * c.head_dim * rows
    passes = 2 + recomputes
    if ring:
        yield Message("collective-permute", "context (ring)", BF16 * numbers, ways, t, layers * passes * (ways - 1))
        yield Message("collective-permute", "context (ring)", F32 * numbers, ways, t, layers * ways)
    else:
        yield Message("all-gather", "context (keys)", BF16 * ways * numbers, ways, t, layers * passes)
        yield Message("reduce-scatter", "context (keys)", F32 * ways * numbers, ways, t, layers)
    yield Message("collective-permute", "context (order)", BF16 * rows * c.d_model, ways, t, 2)


def activation_bytes(model: DecoderConfig, split: Split, batch_size: int, seq_len: int, remat: str,
                     accumulate: int = 1) -> float:
    """About what the backward pass finds kept on a chip: bfloat16 inputs of blocks ("full"; on the host for
    "offload"), with what attention reads and gives ("named"), with every product's result ("dots"), or with what lies
    between those as well ("none"), and the one layer that is being worked on.
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
    return c.num_layers * kept + 2 * everything + gathered
