"""The decoder against Hugging Face transformers: logits, loss and gradients of a tiny model of each family.

The other side was computed once by `goldens/make_hf_goldens.py`, which shares with this file the tokens and
the formula of the weights, and nothing of the decoder. Every comparison is also run with settings that are
wrong in one way, and must fail by far. Reading real checkpoints is `lmjax.interop`, not tested here: the name
mapping below is deliberately its own.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.make_hf_goldens import PATH, POSITIONS, tokens, weight

from lmjax.models import ComputeConfig, Decoder, DecoderConfig, MoEConfig, RopeScaling
from lmjax.nn import attention

TOLERANCE = 2e-5  # of the largest element; float32 differs by 1e-6 or so, a wrong setting by 1e-3 and more
QUICK = {"xla_backend_optimization_level": 0}  # LLVM's level; all here runs once, so compiling is the cost
GOLDENS = json.loads(PATH.read_text())
IDS = jnp.asarray(tokens())

_BASE = DecoderConfig(vocab_size=64, num_layers=3, d_model=48, num_heads=4, num_kv_heads=2, head_dim=16,
                      d_ff=80, max_seq_len=32)
_GEMMA = dataclasses.replace(_BASE, norm_eps=1e-6, post_norms=True, activation="gelu_tanh", scale_embed=True,
                             query_scale=24**-0.5)
CONFIGS = {
    "gpt2": dataclasses.replace(
        _BASE, num_kv_heads=0, head_dim=0, d_ff=0, norm="layernorm", norm_eps=1e-5, positions="learned",
        gated=False, activation="gelu_tanh", biases=True),
    "llama3": dataclasses.replace(
        _BASE, norm_eps=1e-5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), tied=False),
    "smollm2": dataclasses.replace(_BASE, norm_eps=1e-5, rope_theta=1e5),
    "qwen2": dataclasses.replace(_BASE, norm_eps=1e-6, biases=True, rope_theta=1e6, tied=False),
    "qwen3": dataclasses.replace(_BASE, norm_eps=1e-6, qk_norm=True, rope_theta=1e6),
    "mistral": dataclasses.replace(_BASE, norm_eps=1e-5, windows=(8,), tied=False),
    "gemma2": dataclasses.replace(_GEMMA, windows=(8, 0), attention_softcap=5.0, logit_softcap=3.0),
    "gemma3": dataclasses.replace(
        _GEMMA, num_layers=5, num_kv_heads=1, qk_norm=True, rope_theta=1e6, rope_local_theta=1e4,
        rope_scaling=RopeScaling("linear", 8.0), windows=(8, 8, 0)),
    "mixtral": dataclasses.replace(_BASE, norm_eps=1e-5, tied=False, moe=MoEConfig(4, 2, 80)),
    "qwen3_moe": dataclasses.replace(_BASE, norm_eps=1e-6, qk_norm=True, rope_theta=1e6, tied=False,
                                     moe=MoEConfig(6, 3, 40, renormalise=False)),
}

# The same weights under settings that are wrong in one way.
WRONG = [
    ("gpt2", {"activation": "gelu"}), ("gpt2", {"query_scale": 1.0}),
    ("llama3", {"rope_scaling": None}), ("llama3", {"rope_scaling": RopeScaling("linear", 8.0)}),
    ("llama3", {"rope_theta": 5e5}), ("llama3", {"norm_eps": 1e-3}), ("llama3", {"tied": True}),
    ("smollm2", {"rope_theta": 1e4}),
    ("qwen2", {"biases": False}), ("qwen2", {"tied": True}),
    ("qwen3", {"qk_norm": False}), ("qwen3", {"rope_theta": 1e4}),
    ("mistral", {"windows": (0,)}), ("mistral", {"windows": (7,)}), ("mistral", {"windows": (9,)}),
    ("gemma2", {"attention_softcap": 0.0}), ("gemma2", {"logit_softcap": 0.0}),
    ("gemma2", {"scale_embed": False}), ("gemma2", {"query_scale": 0.0}),
    ("gemma2", {"windows": (0, 8)}), ("gemma2", {"post_norms": False}),
    ("gemma3", {"rope_local_theta": 0.0}), ("gemma3", {"rope_scaling": None}),
    ("gemma3", {"rope_theta": 1e4}), ("gemma3", {"windows": (8,)}),
    ("mixtral", {"moe": MoEConfig(4, 1, 80)}), ("mixtral", {"moe": MoEConfig(4, 2, 80, renormalise=False)}),
    ("mixtral", {"moe": MoEConfig(4, 2, 80, router="sigmoid")}), ("qwen3_moe", {"moe": MoEConfig(6, 3, 40)}),
    ("qwen3_moe", {"moe": MoEConfig(6, 4, 40, renormalise=False)}),
]


# --- the same weights in both layouts -------------------------------------------------------------------

def whole(w: np.ndarray) -> np.ndarray:
    return w


def turned(w: np.ndarray) -> np.ndarray:
    return w.T


def of_each(w: np.ndarray) -> np.ndarray:
    return w.swapaxes(1, 2)


def _parts(name: str, c: DecoderConfig):
    """A Hugging Face name -> [(our path, part of the tensor in our layout as a function of the whole)]."""
    D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
    norm = "scale_D" if name.endswith("weight") else "bias_D"
    if "wte" in name or "embed_tokens" in name:
        return [("embed_VD", whole)]
    if "wpe" in name:
        return [("position_PD", whole)]
    if "lm_head" in name:
        return [("out_VD", whole)]
    if name.rsplit(".", 1)[0] in ("model.norm", "transformer.ln_f"):
        return [(f"final_norm/{norm}", whole)]
    gemma = c.post_norms
    norms = {"ln_1": "attention_norm", "ln_2": "mlp_norm", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "attention_post_norm" if gemma else "mlp_norm",
             "pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_post_norm"}
    module = ".".join(name.split(".")[3:-1])
    if module in norms:
        return [(f"blocks/{norms[module]}/{norm}", whole)]
    bias = name.endswith("bias")
    if module == "attn.c_attn":  # q, k and v side by side in the columns
        shape, end = ((N, H), "NH") if bias else ((D, N, H), "DNH")
        return [(f"blocks/attention/{x}_{end.replace('N', 'N' if x == 'q' else 'K')}",
                 lambda w, i=i: np.split(w, 3, axis=-1)[i].reshape(shape)) for i, x in enumerate("qkv")]
    if bias and module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        x, heads = module[10], N if module[10] == "q" else K
        return [(f"blocks/attention/{x}_{'N' if x == 'q' else 'K'}H", lambda w: w.reshape(heads, H))]
    return {
        "attn.c_proj": [("blocks/attention/o_D", whole) if bias else
                        ("blocks/attention/o_NHD", lambda w: w.reshape(N, H, D))],
        "mlp.c_fc": [("blocks/mlp/up_F" if bias else "blocks/mlp/up_DF", whole)],
        "mlp.c_proj": [("blocks/mlp/down_D" if bias else "blocks/mlp/down_FD", whole)],
        "self_attn.q_proj": [("blocks/attention/q_DNH", lambda w: w.T.reshape(D, N, H))],
        "self_attn.k_proj": [("blocks/attention/k_DKH", lambda w: w.T.reshape(D, K, H))],
        "self_attn.v_proj": [("blocks/attention/v_DKH", lambda w: w.T.reshape(D, K, H))],
        "self_attn.o_proj": [("blocks/attention/o_NHD", lambda w: w.T.reshape(N, H, D))],
        "self_attn.q_norm": [("blocks/attention/q_scale_H", whole)],
        "self_attn.k_norm": [("blocks/attention/k_scale_H", whole)],
        "mlp.up_proj": [("blocks/mlp/up_DF", turned)],
        "mlp.gate_proj": [("blocks/mlp/gate_DF", turned)],
        "mlp.down_proj": [("blocks/mlp/down_FD", turned)],
        "mlp.gate": [("blocks/mlp/router_DE", turned)],
        "mlp.experts": [("blocks/mlp/down_EFD", of_each)] if name.endswith("down_proj") else [
            ("blocks/mlp/gate_EDF", lambda w: of_each(np.split(w, 2, axis=1)[0])),
            ("blocks/mlp/up_EDF", lambda w: of_each(np.split(w, 2, axis=1)[1]))],
    }[module]


def _layer(name: str) -> int | None:
    return int(name.split(".")[2]) if ".h." in name or ".layers." in name else None


def our_weights(case: str, one_plus: bool = True) -> dict[str, np.ndarray]:
    """Path -> array, blocks stacked over layers. Gemma's norms multiply by 1 + w: ours hold the sum."""
    config, found = CONFIGS[case].filled(), {}
    for name, shape in GOLDENS[case]["shapes"].items():
        array = weight(case, name, tuple(shape))
        if one_plus and case.startswith("gemma") and "norm" in name:
            array = 1 + array
        for path, part in _parts(name, config):
            found.setdefault(path, {})[_layer(name)] = part(array)
    return {path: arrays[None] if None in arrays else np.stack([arrays[i] for i in range(config.num_layers)])
            for path, arrays in found.items()}


def build(case: str, changes: dict | None = None, one_plus: bool = True, **compute):
    """(graph, params): the model of a case, its params a pure dictionary of the golden's weights."""
    config = dataclasses.replace(CONFIGS[case], **(changes or {}))
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, compute=ComputeConfig(**compute))))
    weights = our_weights(case, one_plus)
    used = set()

    def fill(path, leaf):
        name = "/".join(str(k.key) for k in path)
        used.add(name)
        assert leaf.shape == (found := weights[name].shape), f"{name}: {leaf.shape}, golden {found}"
        return jnp.asarray(weights[name])

    params = jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state))
    assert changes or used == set(weights), f"no place for {set(weights) - used}"
    return graph, params


# --- the comparisons ------------------------------------------------------------------------------------

def error(ours, golden) -> float:
    """Largest difference over the largest golden element."""
    golden = np.asarray(golden)
    return float(np.abs(np.asarray(ours, np.float64) - golden).max() / np.abs(golden).max())


def logits_error(case: str, logits_BTV) -> float:
    return error(logits_BTV[:, np.asarray(POSITIONS)], GOLDENS[case]["logits"])


def run(graph, params):
    """((loss, logits), gradients) of the golden rows."""
    def loss_and_logits(params):
        logits = nnx.merge(graph, params)(IDS)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs, IDS[:, 1:, None], axis=-1)), logits

    return jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True), compiler_options=QUICK)(params)


@functools.cache
def right(case: str):
    return run(*build(case, attention="reference"))


def wrong_logits(case: str, changes: dict | None = None, one_plus: bool = True):
    """Logits under other settings, op by op: the ops are compiled once for all variants of a case."""
    with jax.disable_jit():
        return nnx.merge(*build(case, changes, one_plus))(IDS)


def grad_norms(case: str, grads: dict) -> dict[str, float]:
    """The norm of each Hugging Face tensor's gradient, put together from ours."""
    config, norms = CONFIGS[case].filled(), {}
    for name in GOLDENS[case]["shapes"]:
        total = 0.0
        for path, _ in _parts(name, config):
            leaf = functools.reduce(lambda tree, key: tree[key], path.split("/"), grads)
            total += float(jnp.sum(jnp.square(leaf if _layer(name) is None else leaf[_layer(name)])))
        norms[name] = total**0.5
    return norms


def check(case: str, result) -> None:
    """Asserts that logits, loss and the norm of every tensor's gradient are the golden's."""
    (loss, logits), grads = result
    assert logits_error(case, logits) < TOLERANCE
    assert error(loss, GOLDENS[case]["loss"]) < TOLERANCE
    norms, golden = grad_norms(case, grads), GOLDENS[case]["grad_norms"]
    assert {name: norm for name, norm in golden.items() if error(norms[name], norm) > 5 * TOLERANCE} == {}


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_loss_and_gradients(case):
    check(case, right(case))


@pytest.mark.parametrize("case, remat", [("gpt2", "dots"), ("mistral", "full"), ("gemma2", "full")])
def test_blockwise_with_remat(case, remat, monkeypatch):
    # Blocks of 8 queries, so that rows of 24 take three and skip the keys that the window hides.
    monkeypatch.setattr(attention, "blockwise_attention",
                        functools.partial(attention.blockwise_attention, block=8))
    check(case, run(*build(case, attention="blockwise", remat=remat)))


@pytest.mark.parametrize("case, changes", WRONG, ids=lambda x: "-".join(x) if isinstance(x, dict) else x)
def test_a_wrong_setting_is_seen(case, changes):
    assert logits_error(case, wrong_logits(case, changes)) > 10 * TOLERANCE


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_a_norm_without_one_plus_w_is_seen(case):
    assert logits_error(case, wrong_logits(case, one_plus=False)) > 10 * TOLERANCE


def test_a_wrong_gradient_is_seen():
    """A gradient that is off by a thousandth, with logits and loss exact."""
    (loss, logits), grads = right("gpt2")
    grads = jax.tree.map(lambda g: g, grads)
    grads["blocks"]["mlp"]["up_DF"] *= 1.001
    with pytest.raises(AssertionError, match=r"mlp\.c_fc\.weight"):
        check("gpt2", ((loss, logits), grads))


@functools.cache
def _extend(case: str):
    """(model, params, jitted extend)"""
    graph, params = build(case)
    extend = jax.jit(lambda p, *args: nnx.merge(graph, p).extend(*args), compiler_options=QUICK)
    return nnx.merge(graph, params), params, extend


def through_cache(case: str, pad: int = 3, forget: int = 0):
    """Logits of the rows from a cache: 9 tokens and `pad` of padding, then 3 chunks of 5.

    The cache is wrongly told that it has seen `forget` tokens fewer after the first of them.
    """
    model, params, extend = _extend(case)
    cache, outs = model.new_cache(2, IDS.shape[1] + pad, chunk=9 + pad), []
    for start, stop in ((0, 9), (9, 14), (14, 19), (19, 24)):
        more = 9 + pad - stop if start == 0 else 0
        ids = jnp.pad(IDS[:, start:stop], ((0, 0), (0, more)))
        hidden, cache = extend(params, ids, jnp.full(2, stop - start), cache)
        outs.append(model.logits(hidden)[:, :stop - start])
        if start == 0:
            cache = dataclasses.replace(cache, lengths_B=cache.lengths_B - forget)
    return jnp.concatenate(outs, axis=1)


@pytest.mark.parametrize("case", ["gpt2", "gemma3"])
def test_cache(case):
    logits = through_cache(case)
    assert logits_error(case, logits) < TOLERANCE
    assert error(logits, right(case)[0][1]) < TOLERANCE
    assert logits_error(case, through_cache(case, forget=1)) > 10 * TOLERANCE, "padding that is seen passes"
