"""config.json of Hugging Face and DecoderConfig, either way: published ones, both forms, RoPE's scalings, refusals."""

import dataclasses
import math

import numpy as np
import pytest
from test_hf_parity import CONFIGS, GOLDENS
from test_interop import CASES, problems

from lmjax.errors import CheckpointError
from lmjax.interop import families
from lmjax.models import DecoderConfig, RopeScaling, preset
from lmjax.nn.rope import rope_frequencies

_META = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, torch_dtype="bfloat16", use_cache=True)
REAL = {  # config.json as published
    "gpt2-124m": dict(
        model_type="gpt2", activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1,
        bos_token_id=50256, embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05,
        n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1, summary_activation=None,
        summary_first_dropout=0.1, task_specific_params={"text-generation": {"do_sample": True}}, vocab_size=50257),
    "llama3.1-8b": dict(
        _META, model_type="llama", hidden_size=4096, intermediate_size=14336, max_position_embeddings=131072,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_theta=500000.0, tie_word_embeddings=False, vocab_size=128256, eos_token_id=[128001, 128008],
        rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"}),
    "smollm2-135m": dict(
        _META, model_type="llama", hidden_size=576, intermediate_size=1536, is_llama_config=True,
        max_position_embeddings=8192, num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3,
        rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        vocab_size=49152),
    "mistral-7b": dict(
        model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336, num_key_value_heads=8,
        max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32, rms_norm_eps=1e-05,
        rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False, vocab_size=32000),
    "qwen3-0.6b": dict(
        model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=1024,
        intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16,
        num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936),
    "gemma2-2b": dict(
        model_type="gemma2", attention_bias=False, attn_logit_softcapping=50.0, cache_implementation="hybrid",
        final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", hidden_size=2304, intermediate_size=9216, max_position_embeddings=8192,
        num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4, query_pre_attn_scalar=256,
        rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096, vocab_size=256000),
    "gemma3-1b": dict(
        model_type="gemma3_text", attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912, num_key_value_heads=1,
        max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26, query_pre_attn_scalar=256,
        rms_norm_eps=1e-06, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
        sliding_window_pattern=6, vocab_size=262144),
    "gemma3-4b": dict(  # the rest is the default of its class
        model_type="gemma3", mm_tokens_per_image=256, vision_config={"model_type": "siglip_vision_model"},
        text_config=dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
                         rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024)),
}


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_the_presets(name):
    _, config = families.read_config(REAL[name], "config.json")
    assert families.meaning(config) == families.meaning(preset(name))
    wrong = dataclasses.replace(preset(name), norm_eps=1e-3)
    assert families.meaning(config) != families.meaning(wrong)


@pytest.mark.parametrize("case", CASES)
def test_both_forms_of_a_config_say_the_same(case):
    """What transformers 5 writes (`rope_parameters`), and what we write (the older form) and read back."""
    family, config = families.read_config(GOLDENS[case]["config"], "new")
    chosen, written = families.choose(config)
    assert chosen is family and "rope_parameters" not in written
    assert families.meaning(families.read_config(written, "old")[1]) == families.meaning(config)


@pytest.mark.parametrize("case, changes, words", [
    ("llama3", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_parameters.rope_type='longrope'"),
    ("llama3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=False"),
    ("llama3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0}}, "attention_factor=0"),
    ("llama3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "finetuned": True}}, "finetuned=True"),
    ("llama3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast=32"),
    ("llama3", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
     "rope_scaling.original_max_position_embeddings=64"),
    ("llama3", {"attention_bias": True}, "attention_bias=True"), ("llama3", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama3", {"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast'"),
    ("llama3", {"quantization_config": {"bits": 4}}, "quantised"), ("llama3", {"auto_map": {"A": "b.C"}}, "never run"),
    ("llama3", {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
    ("llama3", {"hidden_size": "48"}, "hidden_size='48': expected a whole number"),
    ("llama3", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide"),
    ("llama3", {"model_type": "falcon"}, "model_type='falcon' is not supported; supported are llama"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("mistral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "together with sliding windows"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention is not supported"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"sliding_window": None}, "sliding_window"), ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit"),
])
def test_settings_that_cannot_be_expressed_are_refused_by_name(case, changes, words):
    with pytest.raises(CheckpointError) as error:
        families.read_config(GOLDENS[case]["config"] | changes, "config.json")
    assert words in problems(error)
    assert all(line.startswith("config.json: ") for line in error.value.problems)


def test_all_settings_are_told_at_once():
    changes = {"attention_bias": True, "hidden_act": "sine", "new_scale": 2, "rms_norm_eps": None}
    with pytest.raises(CheckpointError) as error:
        families.read_config(GOLDENS["llama3"]["config"] | changes, "config.json")
    assert [line.split()[1].split("=")[0] for line in sorted(error.value.problems)] == sorted(changes)


def test_windows_of_qwen_by_layer():
    config = GOLDENS["qwen3"]["config"] | dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    del config["layer_types"]
    assert families.read_config(config, "")[1].windows == (0, 0, 8)


def test_no_family_is_said_with_the_nearest():
    with pytest.raises(CheckpointError, match=r"nearest, \w+, has no model.windows=\(8, 16\)"):
        families.choose(dataclasses.replace(CONFIGS["gemma2"], num_layers=4, windows=(8, 16)))
    with pytest.raises(CheckpointError, match="model.attention_softcap=5.0"):
        families.choose(dataclasses.replace(CONFIGS["llama3"], attention_softcap=5.0))


# ---- RoPE ------------------------------------------------------------------------------------------------------


def test_rope_scaling_is_written_and_read():
    for scaling in (RopeScaling("linear", 4.0), RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
                    RopeScaling("yarn", 4.0, original_len=512),
                    RopeScaling("yarn", 4.0, original_len=512, beta_fast=20.0, beta_slow=2.0, attention_factor=1.25),
                    RopeScaling("dynamic", 4.0, original_len=512)):
        config = DecoderConfig(vocab_size=64, rope_scaling=scaling)
        _, written = families.choose(config)
        _, read = families.read_config(written, "")
        assert read.rope_scaling == scaling and read.max_seq_len == config.max_seq_len == 2048
        other = dataclasses.replace(config, rope_scaling=dataclasses.replace(scaling, factor=3.0))
        assert families.meaning(read) == families.meaning(config) != families.meaning(other)
    ignored = RopeScaling("linear", 4.0, original_len=512, beta_fast=8.0)  # fields of other kinds
    assert families.choose(DecoderConfig(vocab_size=64, rope_scaling=ignored))[1]["rope_scaling"]["factor"] == 4


def test_ntk_scaling_is_written_as_the_theta_that_it_is():
    config = DecoderConfig(vocab_size=64, rope_scaling=RopeScaling("ntk", 4.0))
    _, written = families.choose(config)
    assert written["rope_scaling"] is None and written["rope_theta"] == 10_000.0 * 4.0 ** (64 / 62)
    _, read = families.read_config(written, "")
    assert np.array_equal(rope_frequencies(64, read.rope_theta), rope_frequencies(64, 10_000.0, config.rope_scaling))


def test_dynamic_scaling_has_no_room_for_another_limit():
    config = DecoderConfig(vocab_size=64, max_seq_len=4096, rope_scaling=RopeScaling("dynamic", 4.0, original_len=512))
    with pytest.raises(CheckpointError, match="model.max_seq_len=4096.*set it to 2048"):
        families.choose(config)


def test_what_yarn_leaves_out_is_as_in_transformers():
    def read(longest=256, **section):
        there = GOLDENS["llama3"]["config"] | {"max_position_embeddings": longest, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4} | section}
        return families.read_config(there, "")[1].rope_scaling

    assert read(original_max_position_embeddings=64) == RopeScaling("yarn", 4.0, original_len=64)
    assert read(factor=2.0) == RopeScaling("yarn", 2.0, original_len=256)
    scales = read(factor=40.0, mscale=0.707, mscale_all_dim=1.0, original_max_position_embeddings=64)
    assert scales.attention_factor == pytest.approx((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1))
    assert read(factor=40.0, mscale=0.707).attention_factor == 0  # one of them alone is not looked at
    assert read(factor=2.0, beta_fast=None, beta_slow=0) == RopeScaling("yarn", 2.0, original_len=256)
