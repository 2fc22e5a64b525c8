"""Presets: the architectures of published models at their published sizes, and a ladder of tiny ones.

    preset("gpt2-124m")                       # a fresh DecoderConfig
    preset("tiny-1m", vocab_size=512)         # with fields changed

A family is one base config; each size is then one line of the table. Figures are those of the models' own
`config.json` on the Hugging Face hub, named in the comment above each family and read under our field names:
`query_pre_attn_scalar` s is query_scale s ** -0.5, `layer_types` is windows, `tie_word_embeddings` is tied,
`max_position_embeddings` is max_seq_len. Where a figure equals the default of DecoderConfig (head_dim =
d_model / num_heads, as many kv heads as heads) it is left out. No weights here, and no code that reads them.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from lmjax.errors import ConfigError
from lmjax.models.decoder import DecoderConfig
from lmjax.nn.moe import MoEConfig
from lmjax.nn.rope import RopeScaling


def _size(base: DecoderConfig, num_layers: int, d_model: int, num_heads: int, num_kv_heads: int = 0,
          d_ff: int = 0, **more: Any) -> DecoderConfig:
    """One line of the table: the figures that every size of a family has of its own."""
    return dataclasses.replace(base, num_layers=num_layers, d_model=d_model, num_heads=num_heads,
                               num_kv_heads=num_kv_heads, d_ff=d_ff, **more)


# openai-community/gpt2, gpt2-medium, gpt2-large, gpt2-xl ("gelu_new" is the tanh form; n_inner null: 4 D)
_GPT2 = DecoderConfig(vocab_size=50257, max_seq_len=1024, norm="layernorm", norm_eps=1e-5,
                      positions="learned", gated=False, activation="gelu_tanh", biases=True)

# meta-llama/Llama-2-7b-hf, -13b-hf, -70b-hf
_LLAMA2 = DecoderConfig(vocab_size=32000, max_seq_len=4096, norm_eps=1e-5, tied=False)

# meta-llama/Meta-Llama-3-8B, -70B
_LLAMA3 = DecoderConfig(vocab_size=128256, max_seq_len=8192, norm_eps=1e-5, rope_theta=500_000.0, tied=False)

# meta-llama/Llama-3.1-8B, -70B (rope_scaling: llama3, factor 8, low 1, high 4, original 8192)
_LLAMA31 = dataclasses.replace(_LLAMA3, max_seq_len=131072,
                               rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))

# meta-llama/Llama-3.2-1B, -3B (the same with factor 32, and tied)
_LLAMA32 = dataclasses.replace(_LLAMA31, tied=True, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192))

# Qwen/Qwen3-0.6B, -1.7B, -4B, -8B (only the 8B is untied)
_QWEN3 = DecoderConfig(vocab_size=151936, max_seq_len=40960, head_dim=128, norm_eps=1e-6, qk_norm=True,
                       rope_theta=1_000_000.0)

# google/gemma-2-2b, -9b, -27b; layer 0 has the window. The 9B's query_pre_attn_scalar is 256, its
# head_dim.
_GEMMA2 = DecoderConfig(vocab_size=256000, max_seq_len=8192, norm_eps=1e-6, post_norms=True,
                        windows=(4096, 0), activation="gelu_tanh", attention_softcap=50.0, logit_softcap=30.0,
                        scale_embed=True)

# google/gemma-3-270m, -1b-pt, and the text_config of -4b-pt, -12b-pt, -27b-pt (whose vocabulary of 262208 is
# padded by 64 for image tokens, and whose global layers have rope_scaling linear 8); five local layers, then
# one global (sliding_window_pattern 6); rope_local_base_freq 10000
_GEMMA3 = DecoderConfig(vocab_size=262144, max_seq_len=32768, head_dim=256, norm_eps=1e-6, post_norms=True,
                        qk_norm=True, rope_theta=1_000_000.0, rope_local_theta=10_000.0,
                        windows=(512,) * 5 + (0,), activation="gelu_tanh", scale_embed=True)
_GEMMA3_LONG = dataclasses.replace(_GEMMA3, vocab_size=262208, max_seq_len=131072, windows=(1024,) * 5 + (0,),
                                   rope_scaling=RopeScaling("linear", 8.0))

# mistralai/Mistral-7B-v0.1 (every layer has the window) and -v0.3 (no window, larger theta and vocabulary)
_MISTRAL = DecoderConfig(vocab_size=32000, max_seq_len=32768, norm_eps=1e-5, windows=(4096,), tied=False)
_MISTRAL03 = dataclasses.replace(_MISTRAL, vocab_size=32768, rope_theta=1_000_000.0, windows=(0,))

# mistralai/Mixtral-8x7B-v0.1 (intermediate_size is that of an expert)
_MIXTRAL = dataclasses.replace(_MISTRAL, windows=(0,), rope_theta=1_000_000.0, moe=MoEConfig(8, 2, 14336))

# Qwen/Qwen3-30B-A3B (norm_topk_prob; intermediate_size 6144 belongs to no layer)
_QWEN3_MOE = dataclasses.replace(_QWEN3, tied=False, moe=MoEConfig(128, 8, 768))

# HuggingFaceTB/SmolLM2-135M, -360M, -1.7B
_SMOLLM2 = DecoderConfig(vocab_size=49152, max_seq_len=8192, norm_eps=1e-5, rope_theta=100_000.0)

# Ours, for tests and laptops: Llama-like with qk_norm, tied. Named after the parameters outside of the
# embedding, which come within 10% of the name; d_ff is the default of DecoderConfig. Heads are 64 wide: narrower
# ones spend their time in softmax. Scaled embeddings learn faster here: 4.92 nats against 5.08 after 160 steps
# of configs/quickstart.py.
_TINY = DecoderConfig(vocab_size=0, max_seq_len=2048, qk_norm=True, scale_embed=True)

PRESETS: dict[str, DecoderConfig] = {
    #                             layers  width  heads  kv    ff
    "tiny-100k": _size(_TINY,          2,    64,     1),
    "tiny-1m": _size(_TINY,            5,   128,     2),
    "tiny-3m": _size(_TINY,            7,   192,     3),
    "tiny-10m": _size(_TINY,           8,   320,     5),
    "tiny-30m": _size(_TINY,           9,   512,     8),
    "tiny-100m": _size(_TINY,         14,   768,    12),

    # tiny-1m with eight experts a layer, of which two, together as wide as its MLP, serve a token
    "tiny-moe-1m": _size(_TINY,        5,   128,     2, moe=MoEConfig(8, 2)),

    "gpt2-124m": _size(_GPT2,         12,   768,    12),
    "gpt2-355m": _size(_GPT2,         24,  1024,    16),
    "gpt2-774m": _size(_GPT2,         36,  1280,    20),
    "gpt2-1.5b": _size(_GPT2,         48,  1600,    25),

    "llama2-7b": _size(_LLAMA2,       32,  4096,    32, 32, 11008),
    "llama2-13b": _size(_LLAMA2,      40,  5120,    40, 40, 13824),
    "llama2-70b": _size(_LLAMA2,      80,  8192,    64,  8, 28672),

    "llama3-8b": _size(_LLAMA3,       32,  4096,    32,  8, 14336),
    "llama3-70b": _size(_LLAMA3,      80,  8192,    64,  8, 28672),
    "llama3.1-8b": _size(_LLAMA31,    32,  4096,    32,  8, 14336),
    "llama3.1-70b": _size(_LLAMA31,   80,  8192,    64,  8, 28672),
    "llama3.2-1b": _size(_LLAMA32,    16,  2048,    32,  8,  8192),
    "llama3.2-3b": _size(_LLAMA32,    28,  3072,    24,  8,  8192),

    "qwen3-0.6b": _size(_QWEN3,       28,  1024,    16,  8,  3072),
    "qwen3-1.7b": _size(_QWEN3,       28,  2048,    16,  8,  6144),
    "qwen3-4b": _size(_QWEN3,         36,  2560,    32,  8,  9728),
    "qwen3-8b": _size(_QWEN3,         36,  4096,    32,  8, 12288, tied=False),

    "gemma2-2b": _size(_GEMMA2,       26,  2304,     8,  4,  9216, head_dim=256, query_scale=256**-0.5),
    "gemma2-9b": _size(_GEMMA2,       42,  3584,    16,  8, 14336, head_dim=256, query_scale=256**-0.5),
    "gemma2-27b": _size(_GEMMA2,      46,  4608,    32, 16, 36864, head_dim=128, query_scale=144**-0.5),

    "gemma3-270m": _size(_GEMMA3,     18,   640,     4,  1,  2048, query_scale=256**-0.5),
    "gemma3-1b": _size(_GEMMA3,       26,  1152,     4,  1,  6912, query_scale=256**-0.5),
    "gemma3-4b": _size(_GEMMA3_LONG,  34,  2560,     8,  4, 10240, query_scale=256**-0.5),
    "gemma3-12b": _size(_GEMMA3_LONG, 48,  3840,    16,  8, 15360, query_scale=256**-0.5),
    "gemma3-27b": _size(_GEMMA3_LONG, 62,  5376,    32, 16, 21504, head_dim=128, query_scale=168**-0.5),

    "mistral-7b": _size(_MISTRAL,     32,  4096,    32,  8, 14336),
    "mistral-7b-v0.3": _size(_MISTRAL03, 32, 4096,  32,  8, 14336),

    "mixtral-8x7b": _size(_MIXTRAL,   32,  4096,    32,  8),
    "qwen3-30b-a3b": _size(_QWEN3_MOE, 48, 2048,    32,  4),

    "smollm2-135m": _size(_SMOLLM2,   30,   576,     9,  3,  1536),
    "smollm2-360m": _size(_SMOLLM2,   32,   960,    15,  5,  2560),
    "smollm2-1.7b": _size(_SMOLLM2,   24,  2048,    32, 32,  8192, rope_theta=130_000.0),
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """A fresh copy of a preset with fields changed; the table itself is never handed out.

    Raises ConfigError for an unknown name or field, with the nearest known one. Values are not judged here:
    that is `DecoderConfig.problems`.
    """
    if name not in PRESETS:
        raise ConfigError(f"model preset {name!r} does not exist; {_nearest(name, PRESETS)}")
    fields = [field.name for field in dataclasses.fields(DecoderConfig)]
    unknown = [f"model.{field}={value!r}: no such field; {_nearest(field, fields)}"
               for field, value in changes.items() if field not in fields]
    if unknown:
        raise ConfigError(*unknown)
    return dataclasses.replace(PRESETS[name], **changes)


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else f"choose one of {', '.join(known)}"
