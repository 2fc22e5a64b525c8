"""PyTorch's side of `lmjax bench train`: the same decoder in plain torch, and Transformers' own.

    python tests/benchmarks/peers/torch_llama.py torch-eager|torch-compile|transformers CASE

A plain pre-norm decoder as one would write it today (fused SDPA attention, RMSNorm or LayerNorm, SwiGLU or GELU),
trained as nanoGPT does: autocast for bfloat16, clipping by global norm, fused AdamW, `torch.compile` of model and
loss. It covers what the shapes of `lmjax.bench.cases` have, and refuses the rest. Weights come from the case, so
that the first loss can be compared with ours. Needs torch and NumPy, and transformers for its model.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lmjax.bench.cases import WARMUP, Case, tokens
from lmjax.bench.child import Session, serve

COVERED = {"post_norms": False, "qk_norm": False, "rope_scaling": None, "attention_softcap": 0.0,
           "logit_softcap": 0.0, "scale_embed": False}


# ---- the plain model -----------------------------------------------------------------------------------


def rope(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns pairs (x_i, x_{i+H/2}); q is [B, N, T, H], the tables [T, H]."""
    a, b = q.chunk(2, dim=-1)
    return (q * cos + torch.cat([-b, a], dim=-1) * sin).to(q.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def norm(m: dict) -> nn.Module:
    if m["norm"] == "rmsnorm":
        return RMSNorm(m["d_model"], m["norm_eps"])
    return nn.LayerNorm(m["d_model"], eps=m["norm_eps"], bias=m["biases"])


class Attention(nn.Module):
    def __init__(self, m: dict):
        super().__init__()
        self.m, D, H, bias = m, m["d_model"], m["head_dim"], m["biases"]
        self.q, self.o = nn.Linear(D, m["num_heads"] * H, bias), nn.Linear(m["num_heads"] * H, D, bias)
        self.k, self.v = (nn.Linear(D, m["num_kv_heads"] * H, bias) for _ in range(2))

    def forward(self, x, tables, mask):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.m["head_dim"]).transpose(1, 2) for f in (self.q, self.k, self.v))
        if tables is not None:
            q, k = rope(q, *tables), rope(k, *tables)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           scale=self.m["query_scale"], enable_gqa=q.shape[1] != k.shape[1])
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, m: dict):
        super().__init__()
        D, width, bias = m["d_model"], m["d_ff"], m["biases"]
        self.act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[
            m["activation"]]
        self.up, self.down = nn.Linear(D, width, bias), nn.Linear(width, D, bias)
        self.gate = nn.Linear(D, width, bias) if m["gated"] else None

    def forward(self, x):
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, m: dict):
        super().__init__()
        self.attention_norm, self.mlp_norm = norm(m), norm(m)
        self.attention, self.mlp = Attention(m), MLP(m)

    def forward(self, x, tables, mask):
        x = x + self.attention(self.attention_norm(x), tables, mask)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """`loss(tokens, targets)` is what is trained: the mean cross-entropy of [B, T] targets."""

    def __init__(self, m: dict, remat: str):
        super().__init__()
        D = m["d_model"]
        self.remat = remat != "none"
        self.embed = nn.Embedding(m["vocab_size"], D)
        self.position = nn.Embedding(m["max_seq_len"], D) if m["positions"] == "learned" else None
        self.blocks = nn.ModuleList(Block(m) for _ in range(m["num_layers"]))
        self.final_norm = norm(m)
        self.head = nn.Linear(D, m["vocab_size"], bias=False)
        if m["tied"]:
            self.head.weight = self.embed.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        index = torch.arange(m["max_seq_len"])
        self.tables, self.mask = None, None
        if self.position is None:
            H = m["head_dim"]
            angles = torch.outer(index.float(), 1.0 / m["rope_theta"] ** (torch.arange(0, H, 2) / H))
            angles = torch.cat([angles, angles], dim=-1)
            self.tables = (angles.cos(), angles.sin())
        if m["windows"][0]:
            distance = index[:, None] - index[None, :]
            self.mask = (distance >= 0) & (distance < m["windows"][0])

    def place(self, T: int, device: str) -> "Decoder":
        """Weights and tables on the device; tables cut to T tokens."""
        self.tables = self.tables and tuple(t[:T].to(device) for t in self.tables)
        self.mask = None if self.mask is None else self.mask[:T, :T].contiguous().to(device)
        return self.to(device)

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = (checkpoint(block, x, self.tables, self.mask, use_reentrant=False) if self.remat
                 else block(x, self.tables, self.mask))
        return self.head(self.final_norm(x))

    def loss(self, tokens, targets):
        return F.cross_entropy(self(tokens).float().flatten(0, 1), targets.flatten())


# ---- Transformers' model -------------------------------------------------------------------------------


class HuggingFace(nn.Module):
    """LlamaForCausalLM, MistralForCausalLM where there is a window, or GPT2LMHeadModel."""

    def __init__(self, m: dict, remat: str):
        super().__init__()
        self.inner = hugging_face(m)
        if remat != "none":
            self.inner.gradient_checkpointing_enable()

    def place(self, T: int, device: str) -> "HuggingFace":
        return self.to(device)

    def loss(self, tokens, targets):
        logits = self.inner(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def hugging_face(m: dict) -> nn.Module:
    import transformers as hf

    if m["positions"] == "learned":
        return hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=m["vocab_size"], n_positions=m["max_seq_len"], n_embd=m["d_model"], n_layer=m["num_layers"],
            n_head=m["num_heads"], n_inner=m["d_ff"], activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, layer_norm_epsilon=m["norm_eps"], attn_implementation="sdpa", use_cache=False))
    window = m["windows"][0]
    kind, config, more = (hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": window}) if window else (
        hf.LlamaForCausalLM, hf.LlamaConfig, {})
    return kind(config(
        vocab_size=m["vocab_size"], hidden_size=m["d_model"], intermediate_size=m["d_ff"],
        num_hidden_layers=m["num_layers"], num_attention_heads=m["num_heads"], head_dim=m["head_dim"],
        num_key_value_heads=m["num_kv_heads"], max_position_embeddings=m["max_seq_len"], rms_norm_eps=m["norm_eps"],
        tie_word_embeddings=m["tied"], attn_implementation="sdpa", use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": m["rope_theta"]}, **more))


# ---- weights -------------------------------------------------------------------------------------------


def plain_names(m: dict) -> dict[str, tuple[str, bool]]:
    """Our path in a block -> (name in a plain block, whether the matrix is turned: torch keeps [out, in])."""
    names = {"attention_norm/scale_D": ("attention_norm.weight", False), "mlp_norm/scale_D": ("mlp_norm.weight", False)}
    for ours, theirs in (("q_DNH", "q"), ("k_DKH", "k"), ("v_DKH", "v"), ("o_NHD", "o")):
        names[f"attention/{ours}"] = (f"attention.{theirs}.weight", True)
    for ours, theirs in (("up_DF", "up"), ("gate_DF", "gate"), ("down_FD", "down")):
        names[f"mlp/{ours}"] = (f"mlp.{theirs}.weight", True)
    for ours, theirs in (("q_NH", "q"), ("k_KH", "k"), ("v_KH", "v"), ("o_D", "o")):
        names[f"attention/{ours}"] = (f"attention.{theirs}.bias", False)
    for ours, theirs in (("up_F", "up"), ("down_D", "down")):
        names[f"mlp/{ours}"] = (f"mlp.{theirs}.bias", False)
    for n in ("attention_norm", "mlp_norm"):
        names[f"{n}/bias_D"] = (f"{n}.bias", False)
    return names


def torch_weights(case: Case, folder: str) -> dict[str, np.ndarray]:
    """Our weights by the names of the plain model."""
    saved, m = np.load(Path(folder) / "weights.npz", allow_pickle=False), case.model
    out = {"embed.weight": saved["embed_VD"], "final_norm.weight": saved["final_norm/scale_D"],
           "head.weight": saved["embed_VD" if m["tied"] else "out_VD"]}
    if "position_PD" in saved:
        out["position.weight"] = saved["position_PD"]
    if "final_norm/bias_D" in saved:
        out["final_norm.bias"] = saved["final_norm/bias_D"]
    for ours, (theirs, turned) in plain_names(m).items():
        if f"blocks/{ours}" not in saved:
            continue
        for i, w in enumerate(saved[f"blocks/{ours}"]):
            if turned:
                w = w.reshape(-1, w.shape[-1]).T if ours.endswith("D") else w.reshape(w.shape[0], -1).T
            out[f"blocks.{i}.{theirs}"] = w if turned or w.ndim == 1 else w.reshape(-1)
    return out


def hf_weights(plain: dict[str, np.ndarray], m: dict) -> dict[str, np.ndarray]:
    """The plain model's weights by Transformers' names."""
    def block(theirs: dict[str, str], prefix: str, i: int) -> dict[str, np.ndarray]:
        return {f"{prefix}.{i}.{t}": plain[f"blocks.{i}.{p}"] for p, t in theirs.items() if f"blocks.{i}.{p}" in plain}

    out: dict[str, np.ndarray] = {"lm_head.weight": plain["head.weight"]}
    if m["positions"] != "learned":
        names = {"attention_norm.weight": "input_layernorm.weight",
                 "mlp_norm.weight": "post_attention_layernorm.weight"}
        names |= {f"attention.{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"}
        names |= {f"mlp.{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
        out |= {"model.embed_tokens.weight": plain["embed.weight"], "model.norm.weight": plain["final_norm.weight"]}
        for i in range(m["num_layers"]):
            out |= block(names, "model.layers", i)
        return out
    out |= {"transformer.wte.weight": plain["embed.weight"], "transformer.wpe.weight": plain["position.weight"]}
    for i in range(m["num_layers"]):
        for kind in ("weight", "bias"):
            turn = np.transpose if kind == "weight" else np.asarray  # its Conv1D keeps [in, out]
            parts = [plain[f"blocks.{i}.attention.{x}.{kind}"] for x in "qkv"]
            out[f"transformer.h.{i}.attn.c_attn.{kind}"] = turn(np.concatenate(parts))
            for p, t in (("attention.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
                out[f"transformer.h.{i}.{t}.{kind}"] = turn(plain[f"blocks.{i}.{p}.{kind}"])
        out |= block({f"{n}_norm.{k}": f"{t}.{k}" for n, t in (("attention", "ln_1"), ("mlp", "ln_2"))
                      for k in ("weight", "bias")}, "transformer.h", i)
    return out | {f"transformer.ln_f.{k}": plain[f"final_norm.{k}"] for k in ("weight", "bias")}


def load(model: nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Copies every weight; one that is missing or left over is an error."""
    params = dict(model.named_parameters(remove_duplicate=False))
    assert params.keys() == weights.keys(), sorted(params.keys() ^ weights.keys())
    with torch.no_grad():
        for name, value in weights.items():
            params[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))


# ---- training ------------------------------------------------------------------------------------------


def optimizer(model: nn.Module, optim: dict) -> torch.optim.Optimizer:
    """Fused AdamW; matrices decay."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": optim["weight_decay"]},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim["learning_rate"], betas=(optim["b1"], optim["b2"]), eps=optim["eps"],
                             fused=True)


def exact_norm(model: nn.Module) -> float:
    """Norm of all gradients, added up in float64: what `clip_grad_norm_` returns on a CPU loses digits in float32."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in model.parameters()]
    return torch.stack(norms).norm().item()


def prepare(kind: str, folder: str, session: Session):
    if kind == "transformers":
        import transformers

        session.facts["transformers"] = transformers.__version__
    session.imported()
    case = Case.load(folder)
    m = case.model
    odd = [f"{name}={m[name]}" for name, value in COVERED.items() if m[name] != value]
    if odd or len(set(m["windows"])) > 1:
        raise ValueError(f"the torch peers have no {', '.join(odd) or 'mixed windows'}")
    device = "cuda" if case.platform == "gpu" else "cpu"
    torch.manual_seed(0)
    model = (HuggingFace if kind == "transformers" else Decoder)(m, case.remat)
    if case.same_weights:
        weights = torch_weights(case, folder)
        if kind == "transformers":
            load(model.inner, hf_weights(weights, m))
        else:
            load(model, weights)
        del weights
    model = model.place(case.seq_len, device).train()
    opt = optimizer(model, case.optim)
    loss_of = torch.compile(model.loss) if kind == "torch-compile" else model.loss
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=case.dtype == "bfloat16")
    # Two halves of each batch as int64, which is what the embedding and the loss want; on a GPU from pinned memory.
    data = [torch.from_numpy(x.astype(np.int64)) for x in tokens(m["vocab_size"], case.batch, case.seq_len)]
    data = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in data]
    if device == "cuda":
        data = [tuple(t.pin_memory() for t in pair) for pair in data]
    done = 0

    def step(measure: bool = False):
        nonlocal done
        x, y = (t.to(device, non_blocking=True) for t in data[done % len(data)])
        done += 1
        with autocast:
            loss = loss_of(x, y)
        loss.backward()
        grad_norm = exact_norm(model) if measure else 0.0
        torch.nn.utils.clip_grad_norm_(model.parameters(), case.optim["clip_norm"])
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.detach(), grad_norm

    first = [{"loss": a.item(), "grad_norm": b} for a, b in (step(measure=True) for _ in range(WARMUP))]
    session.facts |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "first_steps": first,
                      "same_weights": case.same_weights}
    if device == "cuda":
        session.last = lambda: {"peak_device_bytes": torch.cuda.max_memory_allocated()}

    def run(steps: int) -> dict[str, float]:
        pending, value = None, 0.0
        for _ in range(steps):
            loss, _ = step()
            if pending is not None:
                value = pending.item()
            pending = loss
        value = pending.item()
        if device == "cuda":
            torch.cuda.synchronize()
        return {"loss": value}

    return run


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("torch-eager", "torch-compile", "transformers"):
        print(__doc__, file=sys.stderr)
        return 2
    serve(lambda session: prepare(sys.argv[1], sys.argv[2], session))
    return 0


if __name__ == "__main__":
    sys.exit(main())
