"""Presets: parameter counts against the published ones and a closed formula, without allocating anything.

That the decoder computes what the published models do is `test_hf_parity.py`.
"""

import dataclasses

import pytest
from flax import nnx

from lmjax import tree
from lmjax.axes import MeshConfig, abstract_mesh
from lmjax.config import OptimConfig, RunConfig
from lmjax.errors import ConfigError
from lmjax.models import PRESETS, Decoder, DecoderConfig, RopeScaling, preset
from lmjax.optim import make_optimizer
from lmjax.plan import describe, make_plan

# Exact parameters, shared matrices counted once. Each was also counted in a meta-device model of Hugging Face
# transformers 5.23 built from the same config.json. Gemma 3 from 4B on: the language model alone.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
TINY = {"tiny-100k": 1e5, "tiny-1m": 1e6, "tiny-3m": 3e6, "tiny-10m": 1e7, "tiny-30m": 3e7, "tiny-100m": 1e8}


def parameters(config: DecoderConfig) -> int:
    """Counted on the shapes of the model itself."""
    return tree.count(nnx.state(nnx.eval_shape(lambda: Decoder(config))))


def formula(c: DecoderConfig, active: bool = False) -> int:
    """The same number from the config alone."""
    D, N, H, L = c.d_model, c.num_heads, c.head_dim or c.d_model // c.num_heads, c.num_layers
    K, F = c.num_kv_heads or N, c.filled().d_ff
    norm = 2 * D if c.biases else D
    matrices = 3 if c.gated else 2
    mlp = matrices * D * F
    if c.moe:  # all experts and the router, or with `active`, those of one token
        m = c.filled().moe
        mlp = (m.experts_per_token if active else m.num_experts) * matrices * D * m.d_ff + D * m.num_experts
    block = 2 * D * H * (N + K) + mlp + (4 if c.post_norms else 2) * norm
    block += (N * H + 2 * K * H + D + F + D) * c.biases + 2 * H * c.qk_norm
    embedding = c.vocab_size * D * (1 if c.tied else 2)
    embedding += c.max_seq_len * D if c.positions == "learned" else 0
    return embedding + L * block + norm


def test_every_preset_has_a_number():
    assert set(PRESETS) == set(PUBLISHED) | set(TINY) | {"tiny-moe-1m"}


@pytest.mark.parametrize("name, billions", [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.35), ("tiny-moe-1m", 0.0013)])
def test_parameters_that_a_token_meets(name, billions):
    """Published: 12.9B of 46.7B (arXiv 2401.04088, section 1), and 3.3B of 30.5B (the model card of Qwen3-30B-A3B)."""
    config = PRESETS[name] if PRESETS[name].vocab_size else preset(name, vocab_size=2048)
    run = RunConfig(model=config, seq_len=1024)
    plan = make_plan(run, make_optimizer(OptimConfig(), 1)[0], abstract_mesh(MeshConfig(), 1))
    assert plan.num_params == formula(config)
    assert plan.active_params == formula(config, active=True) == pytest.approx(billions * 1e9, rel=0.03)
    c = config.filled()
    matrices = formula(config, active=True) - c.num_layers * (2 * c.d_model + 2 * c.head_dim * c.qk_norm) - c.d_model
    matrices -= 0 if c.tied else c.vocab_size * c.d_model  # the input embedding is looked up
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * (1024 + 1) / 2
    assert plan.flops_per_token == pytest.approx(6 * matrices + attention, rel=1e-9)
    assert f"a token meets {plan.active_params:,}" in describe(plan, run)
    if name == "tiny-moe-1m":
        dense = preset("tiny-1m", vocab_size=2048)
        assert formula(config, active=True) - formula(dense) == 5 * 128 * 8, "the MLP's size, and a router"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    config = preset(name)
    assert config.problems() == []
    assert parameters(config) == PUBLISHED[name] == formula(config)


@pytest.mark.parametrize("name", TINY)
def test_tiny_counts(name):
    config = preset(name, vocab_size=512)
    assert config.problems() == [] and PRESETS[name].vocab_size == 0
    assert parameters(config) == formula(config)
    outside = formula(config) - 512 * config.d_model
    assert abs(outside / TINY[name] - 1) < 0.1
    wider = dataclasses.replace(config, d_model=config.d_model * 5 // 4)
    outside = parameters(wider) - 512 * wider.d_model
    assert abs(outside / TINY[name] - 1) > 0.1, "the bound would miss a wrong width"


@pytest.mark.parametrize("name, changes", [
    ("gpt2-124m", {"tied": False}), ("gpt2-124m", {"biases": False}), ("gpt2-124m", {"vocab_size": 50304}),
    ("gpt2-355m", {"max_seq_len": 2048}), ("llama2-7b", {"tied": True}), ("llama3-8b", {"num_kv_heads": 0}),
    ("llama3.2-1b", {"d_ff": 0}), ("qwen3-0.6b", {"qk_norm": False}), ("qwen3-0.6b", {"head_dim": 0}),
    ("gemma2-2b", {"post_norms": False}), ("gemma2-9b", {"gated": False}),
    ("gemma3-4b", {"vocab_size": 262144}),
])
def test_a_wrong_architecture_is_seen(name, changes):
    config = preset(name, **changes)
    assert parameters(config) == formula(config) != PUBLISHED[name]


def test_figures_that_no_count_can_see():
    """Frequencies, windows, scales and caps, of layers as they stand in the models' own layer_types."""
    def windows(name):
        c = PRESETS[name]
        return [c.windows[i % len(c.windows)] for i in range(c.num_layers)]

    assert windows("gemma2-2b") == [4096, 0] * 13
    # 26 layers: globals at 5, 11, 17 and 23, and two local layers left over
    assert [i for i, w in enumerate(windows("gemma3-1b")) if w == 0] == [5, 11, 17, 23]
    assert set(windows("gemma3-1b")) == {512, 0} and set(windows("gemma3-27b")) == {1024, 0}
    assert set(windows("mistral-7b")) == {4096} and set(windows("mistral-7b-v0.3")) == {0}
    filled = {name: config.filled() for name, config in PRESETS.items()}
    scales = {"gemma2-2b": 256, "gemma2-9b": 256, "gemma2-27b": 144, "gemma3-4b": 256, "gemma3-27b": 168,
              "llama3-8b": 128, "llama3.2-1b": 64, "qwen3-0.6b": 128, "gpt2-1.5b": 64}
    for name, scale in scales.items():
        assert filled[name].query_scale == scale**-0.5, name
    thetas = {"llama2-7b": 1e4, "llama3-8b": 5e5, "llama3.2-1b": 5e5, "qwen3-8b": 1e6, "gemma2-9b": 1e4,
              "gemma3-1b": 1e6, "mistral-7b": 1e4, "mistral-7b-v0.3": 1e6, "smollm2-135m": 1e5,
              "smollm2-1.7b": 1.3e5}
    for name, theta in thetas.items():
        assert filled[name].rope_theta == theta, name
    assert filled["gemma3-4b"].rope_local_theta == 1e4 and filled["gemma2-9b"].rope_local_theta == 1e4
    scalings = {"llama3-8b": None, "llama3.1-8b": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
                "llama3.2-3b": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), "gemma3-1b": None,
                "gemma3-12b": RopeScaling("linear", 8.0)}
    for name, scaling in scalings.items():
        assert filled[name].rope_scaling == scaling, name
    for name, c in filled.items():
        gemma = name.startswith("gemma")
        assert (c.attention_softcap, c.logit_softcap) == ((50, 30) if "gemma2" in name else (0, 0)), name
        assert c.norm_eps == (1e-6 if gemma or "qwen3" in name or "tiny" in name else 1e-5), name
        assert c.post_norms == gemma and c.scale_embed == (gemma or "tiny" in name), name
        assert c.activation == ("gelu_tanh" if gemma or "gpt2" in name else "silu"), name
        assert c.qk_norm == any(x in name for x in ("qwen3", "gemma3", "tiny")), name


def test_preset_is_a_fresh_copy():
    first = preset("tiny-1m", vocab_size=512, windows=[64, 0])
    assert first.vocab_size == 512 and first.windows == (64, 0) and PRESETS["tiny-1m"].windows == (0,)
    second = preset("tiny-1m")
    second.d_model = 7
    assert preset("tiny-1m").d_model == PRESETS["tiny-1m"].d_model == 128


@pytest.mark.parametrize("name, changes, message", [
    ("gpt2-124M", {}, "model preset 'gpt2-124M' does not exist; did you mean 'gpt2-124m'?"),
    ("lama3-8b", {}, "model preset 'lama3-8b' does not exist; did you mean 'llama3-8b'?"),
    ("zzz", {}, "model preset 'zzz' does not exist; choose one of tiny-100k, "),
    ("tiny-1m", {"n_layers": 3}, "model.n_layers=3: no such field; did you mean 'num_layers'?"),
    ("tiny-1m", {"window": 3}, "model.window=3: no such field; did you mean 'windows'?"),
])
def test_unknown_names_are_one_line_with_the_nearest(name, changes, message):
    with pytest.raises(ConfigError) as raised:
        preset(name, **changes)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
