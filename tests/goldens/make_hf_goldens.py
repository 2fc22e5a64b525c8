"""Makes `hf_logits.json`: what Hugging Face transformers computes for a tiny model of each family.

    python tests/goldens/make_hf_goldens.py        # needs torch and transformers (made with 2.13 and 5.23)

Run it by hand when a family is added; the tests read only the JSON. The weights are not stored: `weight`
makes them from the tensor's name, here and in `tests/test_hf_parity.py`, which is why numpy is all that this
module imports at the top. Models are small but take every turn that the full-sized ones take: rows of 24
tokens with windows of 8, all three bands of the llama3 scaling, local and global layers with a depth that the
pattern does not divide, soft-caps low enough to bite, head_dim unlike d_model / num_heads.

The JSON holds per case: logits at POSITIONS of both rows, the mean cross-entropy of the next token, the norm
of its gradient for every tensor of the model by the tensor's name, the tensors' shapes, and the config.json that
transformers writes. Nothing of our own decoder is used.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("hf_logits.json")
POSITIONS = (0, 7, 8, 15, 23)  # around the window of 8, and the end

_SIZES = dict(vocab_size=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, intermediate_size=80, max_position_embeddings=256,
              attention_dropout=0.0, bos_token_id=None, eos_token_id=None, pad_token_id=None)
_LLAMA3 = dict(rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)

# case -> (class names in transformers, config)
CASES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(
        vocab_size=64, n_positions=32, n_embd=48, n_layer=3, n_head=4, activation_function="gelu_new",
        layer_norm_epsilon=1e-5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
        eos_token_id=None)),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", dict(
        _SIZES, rms_norm_eps=1e-5, rope_parameters=_LLAMA3, tie_word_embeddings=False)),
    "smollm2": ("LlamaConfig", "LlamaForCausalLM", dict(
        _SIZES, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100_000.0))),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", dict(
        _SIZES, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0))),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(
        _SIZES, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0))),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(
        _SIZES, rms_norm_eps=1e-5, tie_word_embeddings=False, sliding_window=8,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0))),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(
        _SIZES, rms_norm_eps=1e-6, tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
        layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(
        _SIZES, num_hidden_layers=5, num_key_value_heads=1, rms_norm_eps=1e-6, tie_word_embeddings=True,
        sliding_window=8, query_pre_attn_scalar=24,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1_000_000.0, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=10_000.0)),
        layer_types=["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(
        _SIZES, rms_norm_eps=1e-5, tie_word_embeddings=False, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0))),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(
        _SIZES, rms_norm_eps=1e-6, tie_word_embeddings=False, num_experts=6, num_experts_per_tok=3,
        moe_intermediate_size=40, norm_topk_prob=False,
        rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0))),
}


def tokens() -> np.ndarray:
    """int32 [2, 24]: the rows that every case is run on."""
    return np.random.RandomState(0).randint(0, 64, (2, 24)).astype(np.int32)


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that Hugging Face name, float32, a pure function of (case, name, shape).

    Matrices have std 1.5 / sqrt(fan in) (columns are inputs, but rows in GPT-2's Conv1D), so that scores and
    logits are large enough for a wrong scale or cap to show. Norm scales and biases are random as well.
    RandomState's stream is frozen by NumPy's compatibility policy.
    """
    draw = np.random.RandomState(zlib.crc32(f"{case}/{name}".encode())).standard_normal(shape)
    if "embed_tokens" in name or "lm_head" in name or "wte" in name or "wpe" in name:
        std, mean = (0.3, 0.0)
    elif len(shape) >= 2:  # three: of all experts
        std, mean = (1.5 / math.sqrt(shape[0 if case == "gpt2" else -1]), 0.0)
    else:  # Gemma's norms scale by 1 + w
        std, mean = (0.2, 0.0 if name.endswith("bias") or case.startswith("gemma") else 1.0)
    return (mean + std * draw).astype(np.float32)


def golden(case: str) -> dict:
    """One entry of the JSON, computed by transformers in float64 (its norms and rotations stay float32)."""
    import torch
    import transformers

    config_class, model_class, fields = CASES[case]
    config = getattr(transformers, config_class)(**fields, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(case, name, tuple(parameter.shape))))
    model.config._experts_implementation = "eager"  # the only one that takes float64
    model = model.double()
    ids = torch.from_numpy(tokens().astype(np.int64))
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), ids[:, 1:].reshape(-1))
    loss.backward()
    return {
        "logits": [[[_short(z) for z in row[t].tolist()] for t in POSITIONS] for row in logits.detach()],
        "loss": _short(loss.item()),
        "grad_norms": {name: _short(p.grad.norm().item()) for name, p in model.named_parameters()},
        "config": json.loads(config.to_json_string()) | {"architectures": [model_class]},
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
    }


def _short(x: float) -> float:
    return float(f"{x:.8g}")


if __name__ == "__main__":
    lines = [f"{json.dumps(case)}: {json.dumps(golden(case))}" for case in CASES]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, {len(lines)} cases")
