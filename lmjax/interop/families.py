"""Families of Hugging Face models: config.json <-> DecoderConfig, each with its table of names.

A family is two functions, `read` and `write`, the defaults that its class in transformers has for keys that a file
leaves out, and a table of `names`. A setting that a DecoderConfig cannot express is refused by name (`settings`).
`choose` finds the family that a model of ours can be written as: the one whose `write` reads back as the same model.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from lmjax.errors import CheckpointError
from lmjax.interop import names
from lmjax.interop.settings import Settings
from lmjax.models import DecoderConfig, MoEConfig, RopeScaling
from lmjax.nn.rope import rope_magnitude

# Their activation -> ours, and back. What they call gelu_new is GPT-2's tanh form as well.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
               "gelu": "gelu", "relu2": "relu2"}
ACTIVATIONS_THERE = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu2": "relu2"}

LOCAL, GLOBAL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """model_type and architecture: what transformers calls it. bodies: prefixes under which the tensors of the body
    are found in files; the first is that of the table."""

    model_type: str
    architecture: str
    table: tuple[names.Row, ...]
    defaults: dict[str, Any]
    read: Callable[[Settings], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    bodies: tuple[str, ...] = ("model.", "")


# ---- parts that families share ---------------------------------------------------------------------------------


def _body(s: Settings, **more: Any) -> DecoderConfig:
    """The keys that every family but GPT-2 has."""
    s.must_be("attention_bias", False)
    for key in ("use_bidirectional_attention", "add_cross_attention", "is_encoder_decoder"):
        s.must_be(key, False)
    longest, scaling = s.int("max_position_embeddings"), more.get("rope_scaling")
    if scaling is not None and scaling.kind == "dynamic":  # there, the length at which it begins to grow
        longest = dynamic_limit(scaling)
    return DecoderConfig(
        vocab_size=s.int("vocab_size"), num_layers=s.int("num_hidden_layers"), d_model=s.int("hidden_size"),
        num_heads=s.int("num_attention_heads"), num_kv_heads=s.int("num_key_value_heads", or_=0),
        head_dim=s.int("head_dim", or_=0), d_ff=s.int("intermediate_size"),
        max_seq_len=longest, norm_eps=s.float("rms_norm_eps"),
        tied=s.bool("tie_word_embeddings"), **more)


def _write_body(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "num_hidden_layers": c.num_layers, "hidden_size": c.d_model,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "intermediate_size": c.d_ff, "max_position_embeddings": _longest_there(c), "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied}


def dynamic_limit(scaling: RopeScaling) -> int:
    """Tokens for which a file with dynamic scaling is meant: it names only where the scaling begins."""
    return round(scaling.factor * scaling.original_len)


def _longest_there(c: DecoderConfig) -> int:
    """max_position_embeddings."""
    if c.rope_scaling is None or c.rope_scaling.kind != "dynamic":
        return c.max_seq_len
    if c.max_seq_len != dynamic_limit(c.rope_scaling):
        raise CheckpointError(
            f"model.max_seq_len={c.max_seq_len}: a Hugging Face config with dynamic scaling has no room for it and is "
            f"read back with factor x original_len; set it to {dynamic_limit(c.rope_scaling)}")
    return c.rope_scaling.original_len


def _scaling(rope: Settings, longest: int) -> RopeScaling | None:
    """A section such as {"rope_type": "llama3", "factor": 8.0, …}; None for plain RoPE. longest: the model's
    max_position_embeddings."""
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    rope.unused("rope_type", "type", "rope_theta")
    rope.must_be("partial_rotary_factor", 1.0)
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", rope.float("factor"))
    elif kind == "llama3":
        scaling = RopeScaling("llama3", rope.float("factor"), rope.float("low_freq_factor"),
                              rope.float("high_freq_factor"), rope.int("original_max_position_embeddings"))
    elif kind == "dynamic":
        rope.must_be("original_max_position_embeddings", longest)  # which transformers would not look at
        scaling = RopeScaling("dynamic", rope.float("factor"), original_len=longest)
    elif kind == "yarn":
        scaling = _yarn(rope, longest)
    elif kind != "default":
        rope.problems.append(f"{rope.prefix}rope_type={kind!r}: is not supported; supported are default, linear, "
                             "llama3, dynamic and yarn")
        return None
    rope.done()
    return scaling


def _yarn(rope: Settings, longest: int) -> RopeScaling:
    """As transformers 5 reads it: a missing factor is how much longer the model is than it was, and the attention
    factor is the one given, or the quotient of those of mscale and mscale_all_dim, or 0.1 ln factor + 1."""
    original = rope.int("original_max_position_embeddings", or_=longest)
    factor = rope.float("factor", or_=longest / max(original, 1))
    given = rope.values.get("attention_factor") is not None
    attention = rope.float("attention_factor", or_=0.0)
    scales = [rope.float(key, or_=0.0) for key in ("mscale", "mscale_all_dim")]
    if given and attention <= 0:
        rope.problem("attention_factor", "must be above 0; leave it out for 0.1 ln factor + 1")
    elif not given and all(scales) and factor > 1:
        above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
        attention = above / below
    rope.must_be("truncate", True)
    return RopeScaling("yarn", factor, original_len=original, beta_fast=rope.float("beta_fast", or_=32.0) or 32.0,
                       beta_slow=rope.float("beta_slow", or_=1.0) or 1.0, attention_factor=attention)


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    assert scaling.kind != "ntk", "is another theta: see `without_ntk`"
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= {"low_freq_factor": scaling.low_freq, "high_freq_factor": scaling.high_freq,
                    "original_max_position_embeddings": scaling.original_len}
    if scaling.kind == "yarn":
        written |= {"original_max_position_embeddings": scaling.original_len, "beta_fast": scaling.beta_fast,
                    "beta_slow": scaling.beta_slow}
        if scaling.attention_factor:
            written["attention_factor"] = scaling.attention_factor
    return written


def _rope(s: Settings) -> dict[str, Any]:
    """Fields of plain RoPE: `rope_theta` and `rope_scaling` (transformers up to 4), or `rope_parameters` (5)."""
    key = "rope_scaling" if s.values.get("rope_scaling") else "rope_parameters"
    s.unused("rope_scaling", "rope_parameters")
    s.must_be("partial_rotary_factor", 1.0)
    rope = s.section(key)
    theta = rope.float("rope_theta", or_=s.float("rope_theta", or_=10_000.0))
    return {"rope_theta": theta, "rope_scaling": _scaling(rope, s.int("max_position_embeddings"))}


def _windows(s: Settings, default: list[str]) -> tuple[int, ...]:
    """The window of each layer, as the shortest pattern that repeats: from `layer_types`, or the family's default."""
    kinds = s.strings("layer_types", or_=default)
    window = s.int("sliding_window", or_=0)
    if unknown := sorted({str(kind) for kind in kinds} - {LOCAL, GLOBAL}):
        s.problem("layer_types", f"{', '.join(unknown)} is not supported; supported are {LOCAL}, {GLOBAL}")
    if len(kinds) != len(default):
        s.problem("layer_types", f"names {len(kinds)} layers of {len(default)}")
    if LOCAL in kinds and window < 1:
        s.problem("sliding_window", f"must be at least 1 where layers are {LOCAL}")
    return shortest_period([window if kind == LOCAL else 0 for kind in kinds])


def shortest_period(values: list[int]) -> tuple[int, ...]:
    """(512, 0) of [512, 0, 512, 0, 512]."""
    return next((tuple(values[:p]) for p in range(1, len(values)) if all(
        values[i] == values[i % p] for i in range(len(values)))), tuple(values))


def _layer_types(c: DecoderConfig) -> list[str]:
    return [LOCAL if c.windows[i % len(c.windows)] else GLOBAL for i in range(c.num_layers)]


def _layers(s: Settings) -> range:
    return range(s.int("num_hidden_layers"))


# ---- GPT-2 -----------------------------------------------------------------------------------------------------


def _read_gpt2(s: Settings) -> DecoderConfig:
    s.must_be("scale_attn_weights", True)
    s.must_be("scale_attn_by_inverse_layer_idx", False)
    s.must_be("add_cross_attention", False)
    return DecoderConfig(
        vocab_size=s.int("vocab_size"), num_layers=s.int("n_layer"), d_model=s.int("n_embd"),
        num_heads=s.int("n_head"), d_ff=s.int("n_inner", or_=0), max_seq_len=s.int("n_positions"), norm="layernorm",
        norm_eps=s.float("layer_norm_epsilon"), positions="learned", gated=False,
        activation=s.one_of("activation_function", ACTIVATIONS), biases=True, tied=s.bool("tie_word_embeddings"))


def _write_gpt2(c: DecoderConfig) -> dict[str, Any]:
    activation = {"gelu_tanh": "gelu_new"}.get(c.activation) or ACTIVATIONS_THERE[c.activation]
    return {"vocab_size": c.vocab_size, "n_layer": c.num_layers, "n_embd": c.d_model, "n_head": c.num_heads,
            "n_inner": c.d_ff, "n_positions": c.max_seq_len, "layer_norm_epsilon": c.norm_eps,
            "activation_function": activation, "tie_word_embeddings": c.tied}


# ---- Llama, Mistral, Qwen --------------------------------------------------------------------------------------


def _read_llama(s: Settings) -> DecoderConfig:
    s.must_be("mlp_bias", False)
    s.must_be("rope_interleaved", False)
    return _body(s, activation=s.one_of("hidden_act", ACTIVATIONS), **_rope(s))


def _write_llama(c: DecoderConfig) -> dict[str, Any]:
    return _write_body(c) | {"hidden_act": ACTIVATIONS_THERE[c.activation], "rope_theta": c.rope_theta,
                             "rope_scaling": _write_scaling(c.rope_scaling)}


def _read_mistral(s: Settings) -> DecoderConfig:
    return _unscaled_windows(s, _body(s, activation=s.one_of("hidden_act", ACTIVATIONS),
                                      windows=(s.int("sliding_window", or_=0),), **_rope(s)))


def _write_mistral(c: DecoderConfig) -> dict[str, Any]:
    return _write_llama(c) | {"sliding_window": max(c.windows) or None}


def _read_qwen(s: Settings, **more: Any) -> DecoderConfig:
    local = s.bool("use_sliding_window") and s.values["sliding_window"] is not None
    first = s.int("max_window_layers", or_=0)
    windows = _windows(s, [LOCAL if local and i >= first else GLOBAL for i in _layers(s)])
    if any(windows) and not local:
        s.problem("use_sliding_window", f"must be true where layers are {LOCAL}")
    return _unscaled_windows(s, _body(s, activation=s.one_of("hidden_act", ACTIVATIONS), windows=windows, **_rope(s),
                                      **more))


def _write_qwen(c: DecoderConfig) -> dict[str, Any]:
    return _write_llama(c) | {"use_sliding_window": any(c.windows), "sliding_window": max(c.windows) or None,
                              "max_window_layers": c.num_layers, "layer_types": _layer_types(c)}


def _unscaled_windows(s: Settings, config: DecoderConfig) -> DecoderConfig:
    """Here RoPE scaling is for layers without a window (as in Gemma 3); there, for all."""
    if config.rope_scaling and any(config.windows):
        s.problem("rope_scaling", "is not supported together with sliding windows")
    return config


# ---- mixtures of experts ---------------------------------------------------------------------------------------


def _read_mixtral(s: Settings) -> DecoderConfig:
    s.unused("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # of their training alone
    config = _read_mistral(s)
    moe = MoEConfig(s.int("num_local_experts"), s.int("num_experts_per_tok"), config.d_ff)
    return dataclasses.replace(config, d_ff=0, moe=moe)


def _write_mixtral(c: DecoderConfig) -> dict[str, Any]:
    m = c.moe or MoEConfig()
    return _write_mistral(c) | {"intermediate_size": m.d_ff, "num_local_experts": m.num_experts,
                                "num_experts_per_tok": m.experts_per_token}


def _read_qwen3_moe(s: Settings) -> DecoderConfig:
    s.unused("output_router_logits", "router_aux_loss_coef")
    s.must_be("decoder_sparse_step", 1)
    s.must_be("mlp_only_layers", [])  # here every layer has experts, or none
    # The models' own files say num_experts, transformers 5 writes num_local_experts.
    moe = MoEConfig(s.int("num_local_experts", or_=s.int("num_experts")), s.int("num_experts_per_tok"),
                    s.int("moe_intermediate_size"), renormalise=s.bool("norm_topk_prob"))
    return _read_qwen(s, qk_norm=True, moe=moe)


def _write_qwen3_moe(c: DecoderConfig) -> dict[str, Any]:
    m = c.moe or MoEConfig()
    return _write_qwen(c) | {"num_experts": m.num_experts, "num_experts_per_tok": m.experts_per_token,
                             "moe_intermediate_size": m.d_ff, "norm_topk_prob": m.renormalise,
                             "decoder_sparse_step": 1, "mlp_only_layers": []}


# ---- Gemma -----------------------------------------------------------------------------------------------------


def _read_gemma2(s: Settings) -> DecoderConfig:
    default = [GLOBAL if i % 2 else LOCAL for i in _layers(s)]
    s.unused("hidden_act", "sliding_window_size")
    return _unscaled_windows(s, _body(
        s, activation=s.one_of("hidden_activation", ACTIVATIONS), windows=_windows(s, default), post_norms=True,
        scale_embed=True, attention_softcap=s.float("attn_logit_softcapping", or_=0.0),
        logit_softcap=s.float("final_logit_softcapping", or_=0.0), query_scale=_query_scale(s), **_rope(s)))


def _write_gemma2(c: DecoderConfig) -> dict[str, Any]:
    return _write_body(c) | {
        "hidden_activation": ACTIVATIONS_THERE[c.activation], "sliding_window": max(c.windows) or None,
        "layer_types": _layer_types(c), "attn_logit_softcapping": c.attention_softcap or None,
        "final_logit_softcapping": c.logit_softcap or None, "query_pre_attn_scalar": round(c.query_scale**-2),
        "rope_theta": c.rope_theta, "rope_scaling": _write_scaling(c.rope_scaling)}


def _read_gemma3(s: Settings) -> DecoderConfig:
    pattern = s.int("sliding_window_pattern", or_=6)
    default = [LOCAL if (i + 1) % max(pattern, 1) else GLOBAL for i in _layers(s)]
    s.unused("hidden_act")
    s.must_be("attn_logit_softcapping", 0.0)
    return _body(s, activation=s.one_of("hidden_activation", ACTIVATIONS), windows=_windows(s, default),
                 post_norms=True, qk_norm=True, scale_embed=True, query_scale=_query_scale(s),
                 logit_softcap=s.float("final_logit_softcapping", or_=0.0), **_rope_gemma3(s))


def _rope_gemma3(s: Settings) -> dict[str, Any]:
    """RoPE of global layers (scaled) and of local ones."""
    both = s.section("rope_parameters")
    everywhere, local = both.section(GLOBAL), both.section(LOCAL)
    both.done()
    scaling = s.section("rope_scaling") if s.values.get("rope_scaling") else everywhere
    s.unused("rope_scaling")
    theta = everywhere.float("rope_theta", or_=s.float("rope_theta", or_=1_000_000.0))
    local_theta = local.float("rope_theta", or_=s.float("rope_local_base_freq", or_=10_000.0))
    longest = s.int("max_position_embeddings")
    if _scaling(local, longest):
        s.problems.append(f"{local.prefix}rope_type: scaling is not supported in layers with a window")
    return {"rope_theta": theta, "rope_local_theta": local_theta, "rope_scaling": _scaling(scaling, longest)}


def _write_gemma3(c: DecoderConfig) -> dict[str, Any]:
    written = _write_gemma2(c) | {"rope_local_base_freq": c.rope_local_theta, "attn_logit_softcapping": None}
    pattern = len(c.windows)
    if c.windows == (max(c.windows),) * (pattern - 1) + (0,):
        written["sliding_window_pattern"] = pattern  # for readers that do not know layer_types
    return written


def _query_scale(s: Settings) -> float:
    return max(s.float("query_pre_attn_scalar"), 1e-9) ** -0.5


# ---- the families ----------------------------------------------------------------------------------------------

_LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
              num_attention_heads=32, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-6,
              tie_word_embeddings=False)
_QWEN = _LLAMA | dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
                      max_position_embeddings=32768, use_sliding_window=False, sliding_window=4096,
                      max_window_layers=28)
_GEMMA = dict(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
              num_attention_heads=8, num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh",
              max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True, query_pre_attn_scalar=256,
              sliding_window=4096)

FAMILIES = {family.model_type: family for family in (
    Family("llama", "LlamaForCausalLM", names.LLAMA, _LLAMA, _read_llama, _write_llama),
    Family("gpt2", "GPT2LMHeadModel", names.GPT2,
           dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, activation_function="gelu_new",
                layer_norm_epsilon=1e-5, tie_word_embeddings=True),
           _read_gpt2, _write_gpt2, ("transformer.", "")),
    Family("mistral", "MistralForCausalLM", names.LLAMA,
           _LLAMA | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072,
                         sliding_window=4096),
           _read_mistral, _write_mistral),
    Family("qwen2", "Qwen2ForCausalLM", names.LLAMA, _QWEN, lambda s: _read_qwen(s, biases=True), _write_qwen),
    Family("qwen3", "Qwen3ForCausalLM", names.LLAMA, _QWEN | dict(head_dim=128),
           lambda s: _read_qwen(s, qk_norm=True), _write_qwen),
    Family("mixtral", "MixtralForCausalLM", names.MIXTRAL,
           _LLAMA | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072,
                         rms_norm_eps=1e-5, sliding_window=None, num_local_experts=8, num_experts_per_tok=2),
           _read_mixtral, _write_mixtral),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", names.QWEN3_MOE,
           _QWEN | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_key_value_heads=4,
                        decoder_sparse_step=1, moe_intermediate_size=768, num_experts_per_tok=8, num_experts=128,
                        norm_topk_prob=False),
           _read_qwen3_moe, _write_qwen3_moe),
    Family("gemma2", "Gemma2ForCausalLM", names.GEMMA,
           _GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0), _read_gemma2, _write_gemma2),
    Family("gemma3_text", "Gemma3ForCausalLM", names.GEMMA,
           _GEMMA | dict(vocab_size=262208, max_position_embeddings=131072), _read_gemma3, _write_gemma3,
           ("model.", "language_model.model.", "model.language_model.", "language_model.", "")),
)}


def read_config(values: dict[str, Any], where: str) -> tuple[Family, DecoderConfig]:
    """The family and the model of a config.json.

    Raises CheckpointError with every key that is wrong, unknown or says something that we cannot express.
    """
    if values.get("model_type") == "gemma3" and isinstance(values.get("text_config"), dict):
        values = {"model_type": "gemma3_text"} | values["text_config"]  # the text half of a model that also sees
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(f"{where}: model_type={model_type!r} is not supported; supported are "
                              f"{', '.join(FAMILIES)}")
    s = Settings(values, family.defaults)
    config = family.read(s)
    s.done()
    if problems := s.problems or config.problems():
        raise CheckpointError(*(f"{where}: {problem}" for problem in dict.fromkeys(problems)))
    return family, config


def choose(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    """The family that expresses a model, and the keys of its config.json.

    Raises CheckpointError where none does, with the nearest one and the fields that would be lost.
    """
    wanted, nearest = meaning(config), None
    for family in FAMILIES.values():
        written = family.write(without_ntk(config.filled()))
        s = Settings(written, family.defaults)
        found = meaning(family.read(s))
        lost = [name for name, value in dataclasses.asdict(wanted).items()
                if dataclasses.asdict(found)[name] != value]
        if not lost and not s.problems:
            return family, {"model_type": family.model_type, "architectures": [family.architecture], **written}
        if nearest is None or len(lost) < len(nearest[1]):
            nearest = family.model_type, lost
    fields = ", ".join(f"model.{name}={getattr(wanted, name)!r}" for name in nearest[1])
    raise CheckpointError(f"no Hugging Face family expresses this model; the nearest, {nearest[0]}, has no {fields}")


def meaning(config: DecoderConfig) -> DecoderConfig:
    """The config with all that has no effect made the same, so that equal means equal numbers."""
    c = without_ntk(config.filled())
    c = dataclasses.replace(c, rope_scaling=_scaling_meaning(c.rope_scaling))
    windows = shortest_period([c.windows[i % len(c.windows)] for i in range(c.num_layers)])
    c = dataclasses.replace(c, windows=windows, query_scale=float(f"{c.query_scale:.12g}"),
                            d_ff=0 if c.moe else c.d_ff)
    if c.positions != "rope":
        return dataclasses.replace(c, rope_theta=0.0, rope_local_theta=0.0, rope_scaling=None)
    if not any(windows):
        c = dataclasses.replace(c, rope_local_theta=c.rope_theta)
    return dataclasses.replace(c, rope_scaling=None, rope_theta=c.rope_local_theta) if all(windows) else c


def without_ntk(c: DecoderConfig) -> DecoderConfig:
    """NTK scaling as what it is: another theta, in the layers that see all tokens. c: `filled`."""
    if c.rope_scaling is None or c.rope_scaling.kind != "ntk":
        return c
    theta = c.rope_theta * c.rope_scaling.factor ** (c.head_dim / (c.head_dim - 2))
    return dataclasses.replace(c, rope_theta=theta, rope_scaling=None)


def _scaling_meaning(scaling: RopeScaling | None) -> RopeScaling | None:
    """The same frequencies with the fields that its kind does not look at left at their defaults."""
    if scaling is None:
        return None
    used = {"linear": (), "llama3": ("low_freq", "high_freq", "original_len"), "dynamic": ("original_len",),
            "yarn": ("original_len", "beta_fast", "beta_slow")}[scaling.kind]
    kept = {name: getattr(scaling, name) for name in ("kind", "factor", *used)}
    return RopeScaling(**kept, attention_factor=rope_magnitude(scaling) if scaling.kind == "yarn" else 0.0)
