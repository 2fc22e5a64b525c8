"""The decoder: one pre-norm transformer that covers GPT-2, Llama, Qwen2/3, Gemma 2/3, Mistral, Mixtral and SmolLM.

    x = embed(tokens)                         (+ learned positions, x embed_scale)
    x = x + attention(norm(x))                for each of L blocks
    x = x + mlp(norm(x))                      or a mixture of experts (`lmjax.nn.moe`)
    logits = norm(x) @ head                   (head = embed where tied)

Weights are named after their shapes (`q_DNH`), which is also how they are sharded (`lmjax.axes`). Blocks
are stacked: every weight of a block has a leading layer dimension, and one `lax.scan` runs them. Flax NNX
is used as a pytree library only: modules hold arrays and a static config, and are called under plain
`jax.jit` and `jax.grad`. Losses, sampling and sharding of batches live elsewhere; presets of published
models in `lmjax.models.presets`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lmjax.axes import constrain
from lmjax.models import cached
from lmjax.models.experts import MoE
from lmjax.models.initial import EMBED_STD, cast, full_weight, random_weight
from lmjax.nn.attention import KEPT, self_attention
from lmjax.nn.cache import Cache, CacheConfig
from lmjax.nn.context import choose_context, context_attention, from_zigzag, split_ways, to_zigzag
from lmjax.nn.linear import project
from lmjax.nn.mlp import ACTIVATIONS, feed_forward
from lmjax.nn.moe import MoEConfig, RouterSums
from lmjax.nn.norm import layer_norm, rms_norm
from lmjax.nn.pipeline import pipeline, split_schedule
from lmjax.nn.rope import RopeScaling, apply_rope, rope_frequencies, rope_magnitude, rotation

# Far beyond any model, so that a slip of the finger is told before something loops over it.
LARGEST = {"vocab_size": 2**28, "num_layers": 10_000, "d_model": 2**18, "num_heads": 2**14, "head_dim": 2**14,
           "d_ff": 2**22, "max_seq_len": 2**31 - 1}


@dataclasses.dataclass(unsafe_hash=True)
class DecoderConfig:
    """What the weights are and mean. How they are run (dtype, kernels) is `ComputeConfig`."""

    vocab_size: int = 0  # 0 in a run: the tokenizer's size, rounded up to a multiple of 64
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: as many as num_heads; 1: multi-query
    head_dim: int = 0  # 0: d_model / num_heads
    d_ff: int = 0  # 0: 4 x d_model, or 8/3 x d_model rounded up to a multiple of 64 where gated
    max_seq_len: int = 2048  # longest row; a hard limit where positions are learned
    norm: str = "rmsnorm"  # or "layernorm"
    norm_eps: float = 1e-6
    post_norms: bool = False  # also normalise what attention and MLP return (Gemma 2 and 3)
    qk_norm: bool = False  # RMSNorm over each head of q and k before RoPE
    positions: str = "rope"  # or "learned"
    rope_theta: float = 10_000.0
    rope_local_theta: float = 0.0  # of layers with a window; 0: rope_theta (Gemma 3 has its own)
    rope_scaling: RopeScaling | None = None  # of layers without a window
    windows: tuple[int, ...] = (0,)  # sliding window of each layer, repeated over depth; 0: all tokens
    gated: bool = True
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu2
    biases: bool = False  # on every projection and on layernorm; where gated, on q, k and v alone (Qwen2)
    tied: bool = True  # the output matrix is the embedding
    attention_softcap: float = 0.0  # 0: none
    logit_softcap: float = 0.0  # 0: none
    query_scale: float = 0.0  # scores are multiplied by it; 0: head_dim ** -0.5
    scale_embed: bool = False  # multiply embeddings by sqrt(d_model) (Gemma)
    moe: MoEConfig | None = None  # experts in place of every layer's MLP

    def __post_init__(self):
        self.windows = tuple(self.windows)

    def filled(self) -> "DecoderConfig":
        """A copy with every 0 that stands for a default replaced (vocab_size aside)."""
        d_ff = self.d_ff or (-(-8 * self.d_model // (3 * 64)) * 64 if self.gated else 4 * self.d_model)
        head_dim = self.head_dim or self.d_model // max(self.num_heads, 1)
        return dataclasses.replace(
            self, d_ff=d_ff, head_dim=head_dim, num_kv_heads=self.num_kv_heads or self.num_heads,
            rope_local_theta=self.rope_local_theta or self.rope_theta,
            query_scale=self.query_scale or max(head_dim, 1) ** -0.5,
            moe=self.moe and self.moe.filled(d_ff))

    def problems(self, prefix: str = "model") -> list[str]:
        """Everything that is wrong with these fields, one line each."""
        bad = []
        for name in ("num_layers", "d_model", "num_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                bad.append(f"{prefix}.{name}={getattr(self, name)}: must be at least 1")
        for name in ("vocab_size", "num_kv_heads", "head_dim", "d_ff", "rope_local_theta",
                     "attention_softcap", "logit_softcap", "query_scale"):
            if not getattr(self, name) >= 0:
                bad.append(f"{prefix}.{name}={getattr(self, name)}: must not be negative")
        for name, most in LARGEST.items():
            if getattr(self, name) > most:
                bad.append(f"{prefix}.{name}={getattr(self, name)}: must be at most {most:,}")
        if len(self.windows) > LARGEST["num_layers"]:
            bad.append(f"{prefix}.windows: has {len(self.windows):,} entries, at most {LARGEST['num_layers']:,} make "
                       "sense")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                bad.append(f"{prefix}.{name}={getattr(self, name)}: must be above 0")
        for name, choices in (("norm", ("rmsnorm", "layernorm")), ("positions", ("rope", "learned")),
                              ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in choices:
                bad.append(f"{prefix}.{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not self.windows or any(not 0 <= w < 2**31 for w in self.windows):
            bad.append(f"{prefix}.windows={str(self.windows)[:80]}: give at least one window, each 0 (all) or more")
        if self.rope_scaling:
            bad += self.rope_scaling.problems(f"{prefix}.rope_scaling")
        if self.moe:
            bad += self.moe.problems(f"{prefix}.moe")
            if self.biases and not self.gated:
                bad.append(f"{prefix}.biases=True: experts have none; set it to False, or {prefix}.gated=True, where "
                           "biases are those of q, k and v alone")
        if bad:
            return bad
        c = self.filled()
        if not self.head_dim and self.d_model % self.num_heads:
            bad.append(f"{prefix}.num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                       f"change one or set {prefix}.head_dim")
        if c.num_heads % c.num_kv_heads:
            bad.append(f"{prefix}.num_kv_heads={c.num_kv_heads} does not divide num_heads={c.num_heads}")
        if self.positions == "rope" and c.head_dim % 2:
            bad.append(f"{prefix}.head_dim={c.head_dim}: RoPE turns pairs, so it must be even")
        return bad


@dataclasses.dataclass(unsafe_hash=True)
class ComputeConfig:
    """How a model is run; never changes what its weights mean.

    dtype: of activations and matrix products ("float32" or "bfloat16"); weights, norms, softmax and loss
    stay float32. remat: what the backward pass recomputes: "none" keeps every layer's activations, "full" keeps
    only each block's input, "dots" keeps the outputs of matrix products, "named" keeps a block's input, queries, keys,
    values, attention's result and what it gives the residual stream, and computes the MLP again, "offload" is "full"
    with the inputs of blocks in the host's memory (docs/performance.md). attention: "auto", "reference",
    "blockwise", "splash" (TPUs, rows of a multiple of 128 tokens), or "cudnn" (NVIDIA GPUs, bfloat16, no
    soft-cap). layers: "scan" compiles one layer (or one period of the window pattern) and loops over it, "unroll"
    compiles them all, which a CPU runs a little faster; "auto" unrolls a few layers on a CPU. context: where
    mesh.context splits rows, "gather" brings the keys of a whole row to every device, "ring" sends them round; "auto"
    is the ring from 131,072 tokens a row on. experts: the product that a mixture of experts is made of, "ragged"
    (XLA's ragged_dot) or "blocks" (a loop over blocks of rows); "auto" takes blocks on a CPU. deterministic: GPUs give
    the same bits every time, a little slower (XLA's --xla_gpu_deterministic_ops); TPUs and CPUs always do.
    pipeline_microbatches: parts of a batch that follow each other through the stages of mesh.pipeline, a multiple of
    them; 0: as many as make the bubble small, if the rows allow. pipeline_repeats: how often each goes round, with so
    much smaller groups of layers on a stage: a smaller bubble, and more to send.
    """

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    layers: str = "auto"
    context: str = "auto"
    experts: str = "auto"
    deterministic: bool = False
    pipeline_microbatches: int = 0
    pipeline_repeats: int = 1

    def problems(self, prefix: str = "compute") -> list[str]:
        choices = {"dtype": ("float32", "bfloat16"), "remat": tuple(REMAT),
                   "attention": ("auto", "reference", "blockwise", "splash", "cudnn"),
                   "layers": ("auto", "scan", "unroll"), "context": ("auto", "gather", "ring"),
                   "experts": ("auto", "ragged", "blocks")}
        bad = [f"{prefix}.{name}={getattr(self, name)!r}: choose one of {', '.join(values)}"
               for name, values in choices.items() if getattr(self, name) not in values]
        return bad + [f"{prefix}.{name}={getattr(self, name)}: must be at least {low}"
                      for name, low in (("pipeline_microbatches", 0), ("pipeline_repeats", 1))
                      if getattr(self, name) < low]


INPUT = "input"  # name of a block's input, as KEPT
# name -> wrapper of (function, whether it runs inside a scan). A scan keeps XLA from merging what is recomputed
# with what was computed; outside of one, JAX has to.
REMAT = {
    "none": lambda f, scanned: f,
    "full": lambda f, scanned: jax.checkpoint(f, prevent_cse=not scanned),
    "dots": lambda f, scanned: jax.checkpoint(
        f, prevent_cse=not scanned, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "named": lambda f, scanned: jax.checkpoint(
        f, prevent_cse=not scanned, policy=jax.checkpoint_policies.save_only_these_names(KEPT)),
    "offload": lambda f, scanned: jax.checkpoint(
        f, prevent_cse=not scanned, policy=jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], offload_src="device",
            offload_dst="pinned_host")),
}


# The same for the layers of a stage, which run once a tick. What is made of weights alone, their slices and casts, is
# made again then rather than kept of every tick; and products have the stages as a batch dimension.
WEIGHTS_ALONE = ("convert_element_type", "dynamic_slice", "gather", "slice", "squeeze", "reshape", "transpose")
STAGE_REMAT = REMAT | {
    "none": lambda f, scanned: jax.checkpoint(
        f, prevent_cse=not scanned, policy=lambda prim, *_, **__: prim.name not in WEIGHTS_ALONE),
    "dots": lambda f, scanned: jax.checkpoint(
        f, prevent_cse=not scanned, policy=lambda prim, *_, **params: (
            prim.name == "dot_general" and len(params["dimension_numbers"][1][0]) <= 1)),
}


def scan_layers(layers: str, depth: int) -> tuple[bool, str]:
    """(whether to scan, reason): what "auto" means here, in words for the start of a run."""
    if layers != "auto":
        return layers == "scan", "set by compute.layers"
    if depth <= 8 and jax.default_backend() == "cpu":
        return False, f"{depth} layers on a CPU: no stacked activations to copy"
    return True, "one layer to compile, whatever the depth"


class Norm(nnx.Module):
    """RMSNorm or LayerNorm with its scale (and bias)."""

    def __init__(self, config: DecoderConfig):
        self.eps = config.norm_eps
        self.rms = config.norm == "rmsnorm"
        self.scale_D = full_weight((config.d_model,), 1.0)
        self.bias_D = full_weight((config.d_model,), 0.0, config.biases and not self.rms)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rms:
            return rms_norm(x, self.scale_D[...], self.eps)
        return layer_norm(x, self.scale_D[...], cast(self.bias_D, jnp.float32), self.eps)


class Attention(nnx.Module):
    """Projections around softmax attention. Std of the weights: 1/sqrt(fan in). What o writes into the
    residual stream begins as small as an embedding, over sqrt(2 L) (GPT-2, section 2.3): blocks that begin
    louder drown the embeddings, and a small model then learns far more slowly."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        c = config
        D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        self.config = c
        self.q_DNH = random_weight(key, "q_DNH", (D, N, H), D**-0.5)
        self.k_DKH = random_weight(key, "k_DKH", (D, K, H), D**-0.5)
        self.v_DKH = random_weight(key, "v_DKH", (D, K, H), D**-0.5)
        self.o_NHD = random_weight(key, "o_NHD", (N, H, D), EMBED_STD * (N * H * 2 * c.num_layers) ** -0.5)
        self.q_NH = full_weight((N, H), 0.0, c.biases)
        self.k_KH = full_weight((K, H), 0.0, c.biases)
        self.v_KH = full_weight((K, H), 0.0, c.biases)
        self.o_D = full_weight((D,), 0.0, c.biases and not c.gated)
        self.q_scale_H = full_weight((H,), 1.0, c.qk_norm)
        self.k_scale_H = full_weight((H,), 1.0, c.qk_norm)

    def qkv(self, x_BTD, cos_sin):
        """Queries, keys and values with norms and rotations applied, in x's dtype. cos_sin: of `rotation`, or None
        where positions are learned."""
        c, dtype = self.config, x_BTD.dtype

        def with_bias(weight, bias):
            y = project("BTD,DNH->BTNH", x_BTD, weight[...])
            return y if bias is None else y + cast(bias, dtype)

        q = with_bias(self.q_DNH, self.q_NH)
        k = with_bias(self.k_DKH, self.k_KH)
        v = with_bias(self.v_DKH, self.v_KH)
        if c.qk_norm:
            q = rms_norm(q, self.q_scale_H[...], c.norm_eps)
            k = rms_norm(k, self.k_scale_H[...], c.norm_eps)
        if cos_sin is not None:
            q, k = apply_rope(q, cos_sin), apply_rope(k, cos_sin)
        return q, k, v

    def out(self, y_BTNH):
        y_BTD = project("BTNH,NHD->BTD", y_BTNH, self.o_NHD[...])
        return y_BTD if self.o_D is None else y_BTD + cast(self.o_D, y_BTNH.dtype)


class MLP(nnx.Module):
    """Feed-forward weights; the same initialisation rule as Attention."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        c = config
        D, F = c.d_model, c.d_ff
        self.activation = c.activation
        self.up_DF = random_weight(key, "up_DF", (D, F), D**-0.5)
        self.gate_DF = random_weight(key, "gate_DF", (D, F), D**-0.5) if c.gated else None
        self.down_FD = random_weight(key, "down_FD", (F, D), EMBED_STD * (F * 2 * c.num_layers) ** -0.5)
        self.up_F = full_weight((F,), 0.0, c.biases and not c.gated)
        self.down_D = full_weight((D,), 0.0, c.biases and not c.gated)

    def __call__(self, x_BTD):
        up, gate, down, up_F, down_D = (
            cast(w, x_BTD.dtype) for w in (self.up_DF, self.gate_DF, self.down_FD, self.up_F, self.down_D))
        return feed_forward(x_BTD, up, down, self.activation, gate, up_F, down_D)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), where the MLP may be a mixture of experts."""

    def __init__(self, config: DecoderConfig, key: jax.Array, experts: str = "auto"):
        self.attention_norm, self.mlp_norm = Norm(config), Norm(config)
        self.attention_post_norm = Norm(config) if config.post_norms else None
        self.mlp_post_norm = Norm(config) if config.post_norms else None
        self.attention = Attention(config, jax.random.fold_in(key, 0))
        key = jax.random.fold_in(key, 1)
        self.mlp = MoE(config, key, experts) if config.moe else MLP(config, key)

    def __call__(self, x_BTD, cos_sin, attend, window: int, weights_BT=None, by_stage: bool = False):
        """`attend(q, k, v, window) -> (y_BTNH, extra)`; returns (x, extra, sums). sums: a mixture's `RouterSums` over
        tokens with these weights; None where there are none, or no mixture. by_stage: whether the call is mapped over
        the stages of a pipeline."""
        x_BTD = checkpoint_name(x_BTD, INPUT)
        q, k, v = checkpoint_name(self.attention.qkv(self.attention_norm(x_BTD), cos_sin), KEPT)
        y, extra = attend(q, k, v, window)
        y = self.attention.out(y)
        x_BTD = constrain(x_BTD + (self.attention_post_norm(y) if self.attention_post_norm else y), "BTD")
        x_BTD = checkpoint_name(x_BTD, KEPT)
        y = self.mlp_norm(x_BTD)
        y, sums = self.mlp(y, weights_BT, by_stage) if isinstance(self.mlp, MoE) else (self.mlp(y), None)
        x_BTD = constrain(x_BTD + (self.mlp_post_norm(y) if self.mlp_post_norm else y), "BTD")
        return x_BTD, extra, sums


class Decoder(nnx.Module):
    """A decoder-only language model.

        model = Decoder(preset("tiny-1m", vocab_size=257))
        logits_BTV = model(tokens_BT)                       # float32

    seed: an int or a PRNG key. The weights are float32 and do not depend on `compute` or on the mesh.
    """

    def __init__(self, config: DecoderConfig, seed: int | jax.Array = 0,
                 compute: ComputeConfig | None = None):
        c = config.filled()
        assert c.vocab_size > 0, "DecoderConfig.vocab_size must be set before the model is built"
        key = jax.random.key(seed) if isinstance(seed, int) else seed
        self.config = c
        self.compute = dataclasses.replace(compute or ComputeConfig())
        self.embed_VD = random_weight(key, "embed_VD", (c.vocab_size, c.d_model), EMBED_STD)
        self.position_PD = (random_weight(key, "position_PD", (c.max_seq_len, c.d_model), EMBED_STD)
                            if c.positions == "learned" else None)
        layer_keys = jax.random.split(jax.random.fold_in(key, 1), c.num_layers)
        self.blocks = nnx.vmap(lambda k: Block(c, k, self.compute.experts))(layer_keys)
        self.final_norm = Norm(c)
        self.out_VD = None if c.tied else random_weight(key, "out_VD", (c.vocab_size, c.d_model), c.d_model**-0.5)

    @property
    def head_VD(self) -> jax.Array:
        """The output matrix, float32 [V, D]: logits = hidden @ head.T."""
        return (self.embed_VD if self.out_VD is None else self.out_VD)[...]

    def hidden(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None,
               positions_BT: jax.Array | None = None) -> jax.Array:
        """Final hidden states [B, T, D] in the compute dtype, after the last norm.

        segments_BT: int ids of the documents packed in a row; tokens see only their own. None: one
        document a row. positions_BT: position of each token in its document; None: 0, 1, 2, …
        """
        return self.hidden_and_router(tokens_BT, segments_BT, positions_BT)[0]

    def hidden_and_router(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None,
                          positions_BT: jax.Array | None = None,
                          weights_BT: jax.Array | None = None) -> tuple[jax.Array, RouterSums | None]:
        """(`hidden`, what the losses of the routers need, of each layer, over tokens with these float32 weights).

        The second is None without weights and in models without experts.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        c, T = self.config, tokens_BT.shape[1]
        ways = split_ways(T)  # of a row's tokens over the mesh; the layers then see them in another order
        if ways > 1:
            tokens_BT, segments_BT, positions_BT, weights_BT = to_zigzag(
                (tokens_BT, segments_BT, positions_BT, weights_BT), ways)

        def run(params, x_BTD, about, pick=None):
            segments_BT, positions_BT, weights_BT = about

            def attend(q, k, v, window):
                terms = {"scale": c.query_scale, "softcap": c.attention_softcap, "window": window}
                if ways > 1:
                    method, _ = choose_context(self.compute.context, T)
                    return context_attention(q, k, v, segments_BT, ways=ways, method=method, **terms), None
                return self_attention(q, k, v, segments_BT, implementation=self.compute.attention, **terms), None

            return self._blocks(params, x_BTD, positions_BT, attend, weights_BT, pick)

        x_BTD, about = self._embed(tokens_BT, positions_BT), (segments_BT, positions_BT, weights_BT)
        params = nnx.split(self.blocks)[1]
        schedule = split_schedule(tokens_BT.shape[0], c.num_layers, min(len(c.windows), c.num_layers),
                                  self.compute.pipeline_repeats, self.compute.pipeline_microbatches)
        x_BTD, sums = pipeline(run, params, x_BTD, about, schedule) if schedule else run(params, x_BTD, about)
        x_BTD = self.final_norm(x_BTD)
        return from_zigzag(x_BTD, ways) if ways > 1 else x_BTD, sums

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None,
                 positions_BT: jax.Array | None = None) -> jax.Array:
        """Logits of the next token, float32 [B, T, V]."""
        return self.logits(self.hidden(tokens_BT, segments_BT, positions_BT))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states to float32 logits, soft-capped where the config says so."""
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, self.head_VD.astype(x_BTD.dtype),
                                preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits_BTV / cap) if cap else logits_BTV

    def new_cache(self, batch: int, slots: int, cache: CacheConfig | None = None, chunk: int = 1) -> Cache:
        """An empty key/value cache for rows of up to `slots` tokens, of which at most `chunk` are appended at once
        after the first call of `extend`."""
        return cached.new_cache(self.config, self.compute.dtype, batch, slots, cache, chunk)

    def extend(self, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache, empty: bool = False,
               layers: tuple[dict, ...] | None = None) -> tuple[jax.Array, Cache]:
        """Appends the first counts_B of T tokens to each row of a cache: (hidden [B, T, D], the longer cache).

        Prefill, with `empty`, and single steps are the same call; see `lmjax.models.cached.extend`.
        """
        return cached.extend(self, tokens_BT, counts_B, cache, empty, layers)

    def _embed(self, tokens_BT, positions_BT):
        dtype = jnp.dtype(self.compute.dtype)
        x_BTD = self.embed_VD[...][tokens_BT]
        if self.config.scale_embed:
            x_BTD = x_BTD * self.config.d_model**0.5
        if self.position_PD is not None:
            x_BTD = x_BTD + self.position_PD[...][positions_BT]
        return constrain(x_BTD.astype(dtype), "BTD")

    def rotations(self, positions_BT):
        """What RoPE turns by: (in layers that see all tokens, in layers with a window)."""
        c = self.config
        if c.positions != "rope":
            return None, None

        def turns(theta, scaling):
            return rotation(positions_BT, rope_frequencies(c.head_dim, theta, scaling, positions_BT),
                            rope_magnitude(scaling))

        everywhere = turns(c.rope_theta, c.rope_scaling)
        local = turns(c.rope_local_theta, None) if any(c.windows) else None
        return everywhere, local

    def _blocks(self, params, x_BTD, positions_BT, attend, weights_BT=None, pick=None):
        """(x, `RouterSums` of each layer) after a stack of layers: whole periods of the window pattern in a scan, what
        is left over after it.

        Windows stay static inside the scan's body, so that masked blocks are skipped. params: of all layers, or of
        those of a stage; then `pick` makes the weights of one layer of its part of them, and is recomputed with it.
        """
        graphdef = nnx.split(self.blocks)[0]
        windows, depth = self.config.windows, jax.tree.leaves(params)[0].shape[0]
        rotations = self.rotations(positions_BT)
        period = min(len(windows), depth)
        groups = depth // period if scan_layers(self.compute.layers, depth)[0] else 0

        def layer(x, params, i, scanned=True):
            def block(p, x):
                p = jax.tree.map(pick, p) if pick else p
                x, _, sums = nnx.merge(graphdef, p)(x, rotations[windows[i] > 0], attend, windows[i], weights_BT,
                                                    by_stage=pick is not None)
                return x, sums
            return (STAGE_REMAT if pick else REMAT)[self.compute.remat](block, scanned)(params, x)

        def group(x, stacked):
            outs = []
            for i, one in enumerate(_layers(stacked, period)):
                x, out = layer(x, one, i)
                outs.append(out)
            return x, jax.tree.map(lambda *o: jnp.stack(o), *outs)

        staged = isinstance(jnp.arange(1), jax.core.Tracer)  # inside a jit, even constants are traced

        @functools.cache
        def alone(i):  # layers that are alike are traced once; outside a jit this would compile them at every call
            run = functools.partial(layer, i=i, scanned=False)
            return jax.jit(run) if staged else run

        whole, parts = groups * period, []
        front, rest = _split(params, [whole, depth - whole]) if 0 < whole < depth else (params, params)
        if groups:
            stacked = jax.tree.map(lambda a: a.reshape(groups, period, *a.shape[1:]), front)
            x_BTD, outs = jax.lax.scan(group, x_BTD, stacked)
            parts.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), outs))
        for n, one in enumerate(_layers(rest, depth - whole) if whole < depth else (), whole):
            x_BTD, out = alone(n % period)(x_BTD, one)
            parts.append(jax.tree.map(lambda o: o[None], out))
        return x_BTD, jax.tree.map(lambda *o: jnp.concatenate(o), *parts)


def _split(stacked: dict, sizes: list[int]) -> list[dict]:
    """Stacks of so many layers each. By one split, whose gradient is one concatenation; the gradient of a slice is the
    whole stack, zero but for its layers, and they would all be added."""
    leaves, tree = jax.tree.flatten(stacked)
    return [tree.unflatten(part) for part in zip(*(jax.lax.split(a, sizes) for a in leaves), strict=True)]


def _layers(stacked: dict, depth: int) -> list[dict]:
    """The weights of each layer."""
    return [jax.tree.map(lambda a: a.squeeze(0), one) for one in _split(stacked, [1] * depth)]
