"""What one step of a run is for one chip, by arithmetic on the model's shapes: FLOPs, bytes, messages.

What lives here: the formulas, with no compiler. What does not: times (`lmjax.plan.roofline`), or what the compiler
really does (`lmjax.plan.hlo`). Model FLOPs are those of `lmjax.flops`.
"""

import dataclasses

from lmjax import flops
from lmjax.models import DecoderConfig
from lmjax.plan.roofline import Message, Work

BF16, F32 = 2, 4
STATE = 3 * F32  # weight and two moments of AdamW


@dataclasses.dataclass(frozen=True)
class Split:
    """Sizes of the mesh axes, in the mesh's order: tensor varies fastest."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor


def matrix_weights(c: DecoderConfig) -> tuple[int, int]:
    """(weights of the matrices of one block, of the output matrix). c is filled."""
    attention = c.d_model * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    return attention + c.d_model * c.d_ff * (3 if c.gated else 2), c.vocab_size * c.d_model


def analytic(model: DecoderConfig, split: Split, batch_size: int, seq_len: int, remat: str | float = "full",
             accumulate: int = 1, *, all_keys: bool = False) -> Work:
    """The step of a bfloat16 run on each of split.size chips.

    remat as `ComputeConfig.remat`, or the share of a block's forward products that is computed again. all_keys: count
    attention's model FLOPs over whole rows, as PaLM does and MaxText did until July 2025, in place of the keys that a
    causal query sees.
    """
    c = model.filled()
    block, head = matrix_weights(c)
    layers, tokens = c.num_layers, batch_size * seq_len / split.size
    windows = [c.windows[i % len(c.windows)] for i in range(layers)]
    seen = sum(flops.mean_keys(seq_len, w) for w in windows)  # keys of a query, summed over the layers
    counted = layers * seq_len if all_keys else seen
    wide = c.num_heads * c.head_dim
    inner = c.d_model * c.d_ff * (2 if c.gated else 1)  # weights of the products into the MLP's inside
    model_flops = tokens * (6.0 * (layers * block + head) + 12 * wide * counted)

    # Attention kernels make the scores anew in the backward pass, once for dq and once for dk and dv: seven products
    # for the four that are counted. Recomputation adds the block's forward pass ("full", "offload"), attention's
    # ("dots"), or the products into the MLP's inside ("named").
    computed = 6.0 * (layers * block + head) + (12 + 6) * wide * seen
    again = remat if isinstance(remat, float) else {
        "full": 1.0, "offload": 1.0, "named": inner / block}.get(remat, 0.0)
    computed += 2.0 * again * layers * block + 4 * wide * seen * (remat not in ("none", "named"))

    passes = 3 + again
    weights = (layers * block + head) / split.tensor
    gathers = 2 if split.fsdp > 1 else 1  # written once a gather, or cast once
    hbm = accumulate * BF16 * weights * (gathers + passes + 2)
    shards = split.fsdp * split.tensor
    embed = 0 if c.tied else head
    hbm += (2 * STATE + F32) * (layers * block + head + embed) / shards
    rows = tokens * split.tensor  # tokens of the group that shares them
    moved = 6 * c.d_model + (2 * wide + 2 * c.num_kv_heads * c.head_dim + (3 if c.gated else 2) * c.d_ff) / split.tensor
    hbm += rows * layers * passes * BF16 * moved + rows * c.vocab_size / split.tensor * F32 * 4
    host = 2.0 * BF16 * layers * rows * c.d_model if remat == "offload" else 0.0  # inputs of blocks, there and back
    summed = 0.0 if remat == "named" else again  # what attention adds is kept, the MLP's sum is not needed again
    return Work(model_flops, tokens * computed, hbm, tuple(_messages(c, split, rows, summed, accumulate)), host)


def _messages(c: DecoderConfig, split: Split, rows: float, again: float, accumulate: int):
    block, head = matrix_weights(c)
    layers, d, f, t = c.num_layers, split.data, split.fsdp, split.tensor
    embed = 0 if c.tied else head
    if f > 1:  # weights are gathered for each pass; the recomputation shares its gather with the backward pass
        for what, size, count in (("blocks", block, layers), ("vocabulary", head + embed, 1)):
            yield Message("all-gather", f"fsdp ({what})", BF16 * size / t, f, t, 2 * count * accumulate)
            yield Message("reduce-scatter", f"fsdp ({what})", BF16 * size / t, f, t, count * accumulate)
    if d > 1:
        yield Message("all-reduce", "data (gradients)", F32 * (layers * block + head + embed) / (f * t), d, f * t)
    if t > 1:  # after attention and after the MLP, each in the forward and, for their inputs, in the backward pass
        yield Message("all-reduce", "tensor (activations)", BF16 * rows * c.d_model, t, 1,
                      layers * (4 + 2 * again))


def activation_bytes(model: DecoderConfig, split: Split, batch_size: int, seq_len: int, remat: str,
                     accumulate: int = 1) -> float:
    """About what the backward pass finds kept on a chip: bfloat16 inputs of blocks ("full"; on the host for
    "offload"), with what attention reads and gives ("named"), with every product's result ("dots"), or with what lies
    between those as well ("none"), and the one layer that is being worked on.
    Compilers keep more or less; this is for leaving out what is hopeless before one is asked."""
    c = model.filled()
    tokens = batch_size * seq_len / (split.data * split.fsdp) / accumulate
    wide = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    products = BF16 * tokens * (2 * c.d_model + (wide + (3 if c.gated else 2) * c.d_ff) / split.tensor)
    everything = products + BF16 * tokens * 4 * c.d_model
    named = BF16 * tokens * (2 * c.d_model + wide / split.tensor)
    full = BF16 * tokens * c.d_model
    kept = {"offload": 0, "full": full, "named": named, "dots": products, "none": everything}[remat]
    block, head = matrix_weights(c)
    gathered = BF16 * max(2 * block, head) / split.tensor if split.fsdp > 1 else 0
    return c.num_layers * kept + 2 * everything + gathered
