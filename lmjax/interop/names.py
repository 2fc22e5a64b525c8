"""The weights of other libraries by name: one line per weight, and what a line means.

    Row("model.layers.{layer}.self_attn.q_proj.weight", "blocks/attention/q_DNH", "NH D")

says that the tensor of that name is our `q_DNH` of that layer, and that its dimensions there are N x H in one, then D,
in the letters of `lmjax.axes`. Our own order stands in our name, so the row says how to reshape and transpose, both
ways. A table is a superset: rows for weights that a model does not have (biases, norms of q and k, an output matrix
of its own) are left out for it. Which settings a family has is said in `families`.
"""

import dataclasses
import math

import numpy as np

from lmjax.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """there: the tensor's name, {layer} and {expert} where there is one for each. ours: the path of the weight. axes:
    the dimensions there. third: q, k and v stand side by side in the last dimension, and this is the first, second or
    third. plus: ours is theirs plus this. pairs: the elements that RoPE turns together are neighbours there (half a
    head apart here).
    """

    there: str
    ours: str
    axes: str
    third: int | None = None
    plus: float = 0.0
    pairs: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.there

    def at(self, layer: int | None, config: DecoderConfig) -> list[tuple[str, tuple[int, ...]]]:
        """The tensors of a layer (None: where there are no layers), each with the place of it in our stack."""
        if layer is None:
            return [(self.there, ())]
        if not self.per_expert:
            return [(self.there.format(layer=layer), (layer,))]
        return [(self.there.format(layer=layer, expert=e), (layer, e)) for e in range(config.moe.num_experts)]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.there

    @property
    def _ours(self) -> str:
        """The letters of our weight, without those of which a tensor there holds one."""
        return self.ours.rpartition("_")[2].removeprefix("E" if self.per_expert else "")

    def shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """The shape of the tensor there."""
        size = sizes(config)
        dims = [math.prod(size[letter] for letter in axis) for axis in self.axes.split()]
        return (*dims[:-1], dims[-1] if self.third is None else 3 * dims[-1])

    def to_ours(self, tensor: np.ndarray, config: DecoderConfig) -> np.ndarray:
        """Their tensor in our layout: a view where there is nothing to add."""
        if self.third is not None:
            width = tensor.shape[-1] // 3
            tensor = tensor[..., self.third * width:(self.third + 1) * width]
        letters, split = self._letters(config)
        x = tensor.reshape(split)
        if self.pairs:
            at = letters.index("H")
            x = x.reshape(*split[:at], split[at] // 2, 2, *split[at + 1:]).swapaxes(at, at + 1).reshape(split)
        x = x.transpose([letters.index(letter) for letter in self._ours])
        return x.astype(np.float32) + np.float32(self.plus) if self.plus else x

    def to_theirs(self, weight: np.ndarray, config: DecoderConfig) -> np.ndarray:
        """The inverse of `to_ours`, of one third where there are thirds."""
        x = weight.astype(np.float32) - np.float32(self.plus) if self.plus else weight
        letters, split = self._letters(config)
        x = x.transpose([self._ours.index(letter) for letter in letters])
        if self.pairs:
            at = letters.index("H")
            x = x.reshape(*split[:at], 2, split[at] // 2, *split[at + 1:]).swapaxes(at, at + 1)
        shape = self.shape(config)
        return x.reshape(shape if self.third is None else (*shape[:-1], shape[-1] // 3))

    def _letters(self, config: DecoderConfig) -> tuple[str, tuple[int, ...]]:
        letters, size = self.axes.replace(" ", ""), sizes(config)
        return letters, tuple(size[letter] for letter in letters)


def sizes(config: DecoderConfig) -> dict[str, int]:
    """How long each dimension is, by its letter."""
    c = config.filled()
    return {"V": c.vocab_size, "P": c.max_seq_len, "D": c.d_model, "N": c.num_heads, "K": c.num_kv_heads,
            "H": c.head_dim, "F": c.moe.d_ff if c.moe else c.d_ff, "E": c.moe.num_experts if c.moe else 0}


# ---- Hugging Face ----------------------------------------------------------------------------------------------
# Matrices are nn.Linear's (outputs, inputs), but GPT-2's are Conv1D's (inputs, outputs).

GPT2 = (
    Row("transformer.wte.weight",                            "embed_VD",                       "V D"),
    Row("transformer.wpe.weight",                            "position_PD",                    "P D"),
    Row("transformer.h.{layer}.ln_1.weight",                 "blocks/attention_norm/scale_D",  "D"),
    Row("transformer.h.{layer}.ln_1.bias",                   "blocks/attention_norm/bias_D",   "D"),
    Row("transformer.h.{layer}.attn.c_attn.weight",          "blocks/attention/q_DNH",         "D NH", third=0),
    Row("transformer.h.{layer}.attn.c_attn.weight",          "blocks/attention/k_DKH",         "D KH", third=1),
    Row("transformer.h.{layer}.attn.c_attn.weight",          "blocks/attention/v_DKH",         "D KH", third=2),
    Row("transformer.h.{layer}.attn.c_attn.bias",            "blocks/attention/q_NH",          "NH", third=0),
    Row("transformer.h.{layer}.attn.c_attn.bias",            "blocks/attention/k_KH",          "KH", third=1),
    Row("transformer.h.{layer}.attn.c_attn.bias",            "blocks/attention/v_KH",          "KH", third=2),
    Row("transformer.h.{layer}.attn.c_proj.weight",          "blocks/attention/o_NHD",         "NH D"),
    Row("transformer.h.{layer}.attn.c_proj.bias",            "blocks/attention/o_D",           "D"),
    Row("transformer.h.{layer}.ln_2.weight",                 "blocks/mlp_norm/scale_D",        "D"),
    Row("transformer.h.{layer}.ln_2.bias",                   "blocks/mlp_norm/bias_D",         "D"),
    Row("transformer.h.{layer}.mlp.c_fc.weight",             "blocks/mlp/up_DF",               "D F"),
    Row("transformer.h.{layer}.mlp.c_fc.bias",               "blocks/mlp/up_F",                "F"),
    Row("transformer.h.{layer}.mlp.c_proj.weight",           "blocks/mlp/down_FD",             "F D"),
    Row("transformer.h.{layer}.mlp.c_proj.bias",             "blocks/mlp/down_D",              "D"),
    Row("transformer.ln_f.weight",                           "final_norm/scale_D",             "D"),
    Row("transformer.ln_f.bias",                             "final_norm/bias_D",              "D"),
    Row("lm_head.weight",                                    "out_VD",                         "V D"),
)

# Llama, Mistral, SmolLM2, Qwen2 (with biases of q, k and v) and Qwen3 (with norms of q and k).
LLAMA = (
    Row("model.embed_tokens.weight",                         "embed_VD",                       "V D"),
    Row("model.layers.{layer}.input_layernorm.weight",       "blocks/attention_norm/scale_D",  "D"),
    Row("model.layers.{layer}.self_attn.q_proj.weight",      "blocks/attention/q_DNH",         "NH D"),
    Row("model.layers.{layer}.self_attn.k_proj.weight",      "blocks/attention/k_DKH",         "KH D"),
    Row("model.layers.{layer}.self_attn.v_proj.weight",      "blocks/attention/v_DKH",         "KH D"),
    Row("model.layers.{layer}.self_attn.q_proj.bias",        "blocks/attention/q_NH",          "NH"),
    Row("model.layers.{layer}.self_attn.k_proj.bias",        "blocks/attention/k_KH",          "KH"),
    Row("model.layers.{layer}.self_attn.v_proj.bias",        "blocks/attention/v_KH",          "KH"),
    Row("model.layers.{layer}.self_attn.q_norm.weight",      "blocks/attention/q_scale_H",     "H"),
    Row("model.layers.{layer}.self_attn.k_norm.weight",      "blocks/attention/k_scale_H",     "H"),
    Row("model.layers.{layer}.self_attn.o_proj.weight",      "blocks/attention/o_NHD",         "D NH"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", "blocks/mlp_norm/scale_D",     "D"),
    Row("model.layers.{layer}.mlp.gate_proj.weight",         "blocks/mlp/gate_DF",             "F D"),
    Row("model.layers.{layer}.mlp.up_proj.weight",           "blocks/mlp/up_DF",               "F D"),
    Row("model.layers.{layer}.mlp.down_proj.weight",         "blocks/mlp/down_FD",             "D F"),
    Row("model.norm.weight",                                 "final_norm/scale_D",             "D"),
    Row("lm_head.weight",                                    "out_VD",                         "V D"),
)

# Every expert has tensors of its own in files, whatever transformers holds in memory.
QWEN3_MOE = (
    *(row for row in LLAMA if ".mlp." not in row.there),
    Row("model.layers.{layer}.mlp.gate.weight",              "blocks/mlp/router_DE",           "E D"),
    Row("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "blocks/mlp/gate_EDF",   "F D"),
    Row("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",   "blocks/mlp/up_EDF",     "F D"),
    Row("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", "blocks/mlp/down_EFD",   "D F"),
)
MIXTRAL = (
    *(row for row in LLAMA if ".mlp." not in row.there),
    Row("model.layers.{layer}.block_sparse_moe.gate.weight", "blocks/mlp/router_DE",           "E D"),
    Row("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", "blocks/mlp/gate_EDF", "F D"),
    Row("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "blocks/mlp/up_EDF",   "F D"),
    Row("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "blocks/mlp/down_EFD", "D F"),
)

# Gemma 2 and 3 name their norms differently, and multiply by 1 + weight.
GEMMA = (
    Row("model.embed_tokens.weight",                         "embed_VD",                       "V D"),
    Row("model.layers.{layer}.input_layernorm.weight",       "blocks/attention_norm/scale_D",  "D", plus=1),
    Row("model.layers.{layer}.self_attn.q_proj.weight",      "blocks/attention/q_DNH",         "NH D"),
    Row("model.layers.{layer}.self_attn.k_proj.weight",      "blocks/attention/k_DKH",         "KH D"),
    Row("model.layers.{layer}.self_attn.v_proj.weight",      "blocks/attention/v_DKH",         "KH D"),
    Row("model.layers.{layer}.self_attn.q_norm.weight",      "blocks/attention/q_scale_H",     "H", plus=1),
    Row("model.layers.{layer}.self_attn.k_norm.weight",      "blocks/attention/k_scale_H",     "H", plus=1),
    Row("model.layers.{layer}.self_attn.o_proj.weight",      "blocks/attention/o_NHD",         "D NH"),
    Row("model.layers.{layer}.post_attention_layernorm.weight",   "blocks/attention_post_norm/scale_D", "D", plus=1),
    Row("model.layers.{layer}.pre_feedforward_layernorm.weight",  "blocks/mlp_norm/scale_D",       "D", plus=1),
    Row("model.layers.{layer}.mlp.gate_proj.weight",         "blocks/mlp/gate_DF",             "F D"),
    Row("model.layers.{layer}.mlp.up_proj.weight",           "blocks/mlp/up_DF",               "F D"),
    Row("model.layers.{layer}.mlp.down_proj.weight",         "blocks/mlp/down_FD",             "D F"),
    Row("model.layers.{layer}.post_feedforward_layernorm.weight", "blocks/mlp_post_norm/scale_D",  "D", plus=1),
    Row("model.norm.weight",                                 "final_norm/scale_D",             "D", plus=1),
    Row("lm_head.weight",                                    "out_VD",                         "V D"),
)

# ---- GGUF ------------------------------------------------------------------------------------------------------
# llama.cpp stores the rows of q and k with the pairs of RoPE next to each other.

GGUF_LLAMA = (
    Row("token_embd.weight",                                 "embed_VD",                       "V D"),
    Row("blk.{layer}.attn_norm.weight",                      "blocks/attention_norm/scale_D",  "D"),
    Row("blk.{layer}.attn_q.weight",                         "blocks/attention/q_DNH",         "NH D", pairs=True),
    Row("blk.{layer}.attn_k.weight",                         "blocks/attention/k_DKH",         "KH D", pairs=True),
    Row("blk.{layer}.attn_v.weight",                         "blocks/attention/v_DKH",         "KH D"),
    Row("blk.{layer}.attn_output.weight",                    "blocks/attention/o_NHD",         "D NH"),
    Row("blk.{layer}.ffn_norm.weight",                       "blocks/mlp_norm/scale_D",        "D"),
    Row("blk.{layer}.ffn_gate.weight",                       "blocks/mlp/gate_DF",             "F D"),
    Row("blk.{layer}.ffn_up.weight",                         "blocks/mlp/up_DF",               "F D"),
    Row("blk.{layer}.ffn_down.weight",                       "blocks/mlp/down_FD",             "D F"),
    Row("output_norm.weight",                                "final_norm/scale_D",             "D"),
    Row("output.weight",                                     "out_VD",                         "V D"),
)
