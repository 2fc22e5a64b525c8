"""A mixture of experts in place of an MLP: which experts a token goes to, and what they compute. No token is dropped.

    y_t = sum over the A experts e that t has chosen of share_te * expert_e(x_t)

What lives here: the config, routing, the experts on one device and over a mesh, and the sums that the losses of the
router are made of. The products of rows with their own expert's matrix are `lmjax.nn.grouped`, the losses
`lmjax.losses.router`, the weights `lmjax.models.experts`.

    N  tokens    A  experts that a token has chosen    R  rows, one for each token and choice: R = N A

Routers: softmax over all experts, the largest A, renormalised to 1 (Mixtral, arXiv 2401.04088, section 2.1: the same
numbers as a softmax over the A largest logits) or not; or sigmoid (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.axes import activation_spec, constrain, gathered_spec
from lmjax.nn.grouped import choose_experts, grouped_matmul
from lmjax.nn.mlp import ACTIVATIONS

ROUTERS = ("softmax", "sigmoid")
MOST_EXPERTS = 2**14


@dataclasses.dataclass(unsafe_hash=True)
class MoEConfig:
    """Experts in place of the MLP of every layer.

    d_ff: width of one expert; 0: that of the MLP over experts_per_token, so that a token costs what it did.
    shared_d_ff: width of an MLP that every token takes beside its experts (DeepSeekMoE, arXiv 2401.06066,
    section 3.2); 0: none. router: how scores come from logits. renormalise: the shares of a token are divided by
    their sum. scale: and then multiplied by this. balance: a number for each expert is added to the scores for the
    choice alone, and moves by optim.balance_rate against the expert's load (arXiv 2408.15664).
    """

    num_experts: int = 8
    experts_per_token: int = 2
    d_ff: int = 0
    shared_d_ff: int = 0
    router: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    balance: bool = False

    def filled(self, d_ff: int) -> "MoEConfig":
        """A copy with d_ff set, for a model whose MLP would be `d_ff` wide."""
        return dataclasses.replace(self, d_ff=self.d_ff or -(-d_ff // max(self.experts_per_token, 1)))

    def problems(self, prefix: str = "moe") -> list[str]:
        bad = [f"{prefix}.{name}={getattr(self, name)}: must be from {low} to {high:,}" for name, low, high in (
            ("num_experts", 1, MOST_EXPERTS), ("experts_per_token", 1, MOST_EXPERTS), ("d_ff", 0, 2**22),
            ("shared_d_ff", 0, 2**22)) if not low <= getattr(self, name) <= high]
        if not bad and self.experts_per_token > self.num_experts:
            bad.append(f"{prefix}.experts_per_token={self.experts_per_token}: there are {self.num_experts} experts "
                       f"({prefix}.num_experts); lower it")
        if self.router not in ROUTERS:
            bad.append(f"{prefix}.router={self.router!r}: choose one of {', '.join(ROUTERS)}")
        if not 0 < self.scale <= 1000:
            bad.append(f"{prefix}.scale={self.scale}: must be above 0 and at most 1000")
        return bad


# ---- routing -----------------------------------------------------------------------------------------------------


class Routed(NamedTuple):
    """logits, scores: float32, of every expert. choice: int32 ids of the chosen ones, the highest first; among
    equals the lower id. share: what each counts for, float32."""

    logits_BTE: jax.Array
    scores_BTE: jax.Array
    choice_BTA: jax.Array
    share_BTA: jax.Array


class RouterSums(NamedTuple):
    """What the losses of a router need, summed over tokens with their weights, float32.

    counts: choices of each expert. probs: scores of each expert, those of a token divided by their sum. z: logsumexp
    of the logits, squared. weight: of the tokens. pull: 0, whose gradient by the balance of an expert is its count
    less the mean count.
    """

    counts_E: jax.Array
    probs_E: jax.Array
    z: jax.Array
    weight: jax.Array
    pull: jax.Array


def route(x_BTD: jax.Array, router_DE: jax.Array, config: MoEConfig, balance_E: jax.Array | None = None) -> Routed:
    """The experts of each token; in float32 whatever x is, since a rounding can change a choice."""
    logits_BTE = constrain(jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), router_DE), "BT_")
    scores_BTE = jax.nn.sigmoid(logits_BTE) if config.router == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)
    wanted_BTE = jax.lax.stop_gradient(scores_BTE if balance_E is None else scores_BTE + balance_E)
    choice_BTA = _highest(wanted_BTE, config.experts_per_token)
    # A masked sum, not a gather: its gradient is no scatter, and it stays local where rows are split over devices.
    share_BTA = jnp.sum(jnp.where(_hot(choice_BTA, config.num_experts), scores_BTE[..., None, :], 0), axis=-1)
    if config.renormalise:
        share_BTA = share_BTA / (jnp.sum(share_BTA, axis=-1, keepdims=True) + 1e-20)
    return Routed(logits_BTE, scores_BTE, choice_BTA, share_BTA * config.scale)


def _highest(wanted_BTE: jax.Array, choices: int) -> jax.Array:
    """Each device looks at its own rows: left to itself, XLA gathers the scores of the whole batch for a top_k."""
    mesh = jax.sharding.get_abstract_mesh()

    def local(wanted_BTE):
        return jax.lax.top_k(wanted_BTE, choices)[1]

    if mesh.empty or mesh.size == 1:
        return local(wanted_BTE)
    rows = activation_spec("BT_", wanted_BTE.shape, mesh)
    return jax.shard_map(local, in_specs=rows, out_specs=rows)(wanted_BTE)


def _hot(choice_BTA: jax.Array, num_experts: int) -> jax.Array:
    return choice_BTA[..., None] == jnp.arange(num_experts)


def router_sums(routed: Routed, weights_BT: jax.Array, balance_E: jax.Array | None = None) -> RouterSums:
    """Over the whole batch, whichever devices hold it. weights_BT: float32; a token of weight 0 is not counted."""
    weights_BT = jax.lax.stop_gradient(weights_BT)
    scores_BTE = routed.scores_BTE / jnp.sum(routed.scores_BTE, axis=-1, keepdims=True)
    hot_BTAE = _hot(routed.choice_BTA, scores_BTE.shape[-1])
    counts_E = jnp.sum(jnp.where(hot_BTAE, weights_BT[..., None, None], 0.0), axis=(0, 1, 2))
    z = jnp.sum(weights_BT * jnp.square(jax.nn.logsumexp(routed.logits_BTE, axis=-1)))
    pull = jnp.float32(0)
    if balance_E is not None:
        pull = jnp.sum((balance_E - jax.lax.stop_gradient(balance_E)) * (counts_E - jnp.mean(counts_E)))
    return RouterSums(counts_E, jnp.einsum("BT,BTE->E", weights_BT, scores_BTE), z, jnp.sum(weights_BT), pull)


# ---- experts -----------------------------------------------------------------------------------------------------


def reference_experts(x_ND: jax.Array, choice_NA: jax.Array, share_NA: jax.Array, up_EDF: jax.Array,
                      gate_EDF: jax.Array | None, down_EFD: jax.Array, activation: str) -> jax.Array:
    """Every expert on every token, and what it is worth to each: E / A times the work. What `experts` must equal."""
    y_ND = jnp.zeros_like(x_ND)
    for e in range(up_EDF.shape[0]):
        h_NF = x_ND @ up_EDF[e]
        h_NF = ACTIVATIONS[activation](h_NF) if gate_EDF is None else ACTIVATIONS[activation](x_ND @ gate_EDF[e]) * h_NF
        share_N = jnp.sum(jnp.where(choice_NA == e, share_NA, 0), axis=-1)
        y_ND = y_ND + share_N[:, None].astype(x_ND.dtype) * (h_NF @ down_EFD[e])
    return y_ND


def experts(x_ND: jax.Array, choice_NA: jax.Array, share_NA: jax.Array, up_EDF: jax.Array,
            gate_EDF: jax.Array | None, down_EFD: jax.Array, activation: str, implementation: str,
            first: jax.Array | int = 0) -> jax.Array:
    """Rows sorted by expert, one product a group, and back: [N, D] in x's dtype.

    first: the id of the first expert whose weights are here; choices of experts elsewhere add nothing. The sort is
    stable and everything after it gathers and adds in a fixed order, so the bits do not depend on the device.
    """
    (N, A), E = choice_NA.shape, up_EDF.shape[0]
    here_R = choice_NA.reshape(N * A) - first
    here_R = jnp.where((here_R >= 0) & (here_R < E), here_R, E)  # those of others stand last
    order_R = jnp.argsort(here_R, stable=True)
    place_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(N * A, dtype=order_R.dtype), unique_indices=True)
    sizes_E = jnp.sum(here_R[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    mine_R1 = (jnp.arange(N * A) < jnp.sum(sizes_E))[:, None]  # what a product leaves in other rows is not said

    def times(x, w):
        return grouped_matmul(x, w.astype(x.dtype), sizes_E, implementation)

    x_RD = jnp.where(mine_R1, _spread(x_ND, order_R, place_R, A), 0)
    act = ACTIVATIONS[activation]
    if gate_EDF is None:
        h_RF = act(times(x_RD, up_EDF))
    else:
        h_RF = jax.checkpoint(lambda gate, up: act(gate) * up)(times(x_RD, gate_EDF), times(x_RD, up_EDF))
    y_RD = jnp.where(mine_R1, times(h_RF, down_EFD), 0)
    y_NAD = _collect(y_RD, order_R, place_R).reshape(N, A, -1)
    return jnp.einsum("NAD,NA->ND", y_NAD, share_NA.astype(x_ND.dtype),
                      preferred_element_type=jnp.float32).astype(x_ND.dtype)


# Both are permutations, but JAX would differentiate them by adding into zeros in an order that a GPU does not promise.

@jax.custom_vjp
def _collect(y_RD, order_R, place_R):
    return y_RD[place_R]


_collect.defvjp(lambda y, order, place: (y[place], order), lambda order, dy: (dy[order], None, None))


def _spread(x_ND, order_R, place_R, A):
    """Row r is the token of the r-th choice in order."""
    @jax.custom_vjp
    def spread(x_ND, order_R, place_R):
        return x_ND[order_R // A]

    def backward(place_R, dx_RD):
        dx_NAD = dx_RD[place_R].reshape(-1, A, dx_RD.shape[-1])
        return jnp.sum(dx_NAD, axis=1, dtype=jnp.float32).astype(dx_RD.dtype), None, None

    spread.defvjp(lambda x, order, place: (x[order // A], place), backward)
    return spread(x_ND, order_R, place_R)


def _of_one_stage(f):
    """f, which gives one array, for a pipeline (`lmjax.nn.pipeline`): it is mapped over stages (`jax.vmap`) inside of a
    `shard_map` that gives each device one of them, so it is called on that one. JAX would map its loops, whose length
    depends on the tokens, and cannot there. What is mapped so is differentiated afterwards; without, it cannot be."""
    one = jax.custom_batching.custom_vmap(f)

    @one.def_vmap
    def call(stages, mapped, *args):
        assert stages == 1, "a device has one stage"
        return f(*jax.tree.map(lambda a, mapped: a[0] if mapped else a, args, tuple(mapped)))[None], True

    return one


def mixture(x_BTD: jax.Array, routed: Routed, up_EDF: jax.Array, gate_EDF: jax.Array | None, down_EFD: jax.Array,
            activation: str, implementation: str = "auto", by_stage: bool = False) -> jax.Array:
    """What the chosen experts add up to, [B, T, D] in x's dtype, on one device or a mesh. by_stage: whether the call is
    mapped over the stages of a pipeline.

    On a mesh, where experts are split over an axis, each device gathers the tokens of the devices that share the
    experts with it, runs them through its own, and adds and scatters the sums back: nothing is dropped, shapes are
    known beforehand, and the cost does not depend on the load: 2 (p - 1) / p x B T D activations over the axis of
    size p (`docs/moe.md`). Where feed-forward widths are split, each device adds its part.
    """
    implementation, _ = choose_experts(implementation)
    weights = tuple(w for w in (up_EDF, down_EFD, gate_EDF) if w is not None)
    choice, share = routed.choice_BTA, routed.share_BTA

    def run(x_BTD, choice_BTA, share_BTA, weights, first):
        D, A = x_BTD.shape[-1], choice_BTA.shape[-1]
        up, down, gate = (*weights, None)[:3]
        y_ND = experts(x_BTD.reshape(-1, D), choice_BTA.reshape(-1, A), share_BTA.reshape(-1, A), up, gate, down,
                       activation, implementation, first)
        return y_ND.reshape(x_BTD.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(x_BTD, choice, share, weights, 0)
    if by_stage:
        run = _of_one_stage(run)

    rows = activation_spec("BT_", x_BTD.shape, mesh)  # what is chosen is whole in its last dimension too
    up_spec, down_spec = gathered_spec("EDF", up_EDF.shape, mesh), gathered_spec("EFD", down_EFD.shape, mesh)
    over, within = up_spec[0], up_spec[2]  # mesh axes that split experts, and each expert
    batch_axes = tuple(axis for part in rows for axis in (part if isinstance(part, tuple) else (part,)) if axis)
    every = tuple(dict.fromkeys((*batch_axes, *(axis for axis in (over, within) if axis))))
    gathers = over in batch_axes

    def shard(x, choice, share, *weights):
        def vary(arrays, axes):  # from here on each device has a part or a copy of its own
            missing = tuple(axis for axis in every if axis not in axes)
            return tuple(jax.lax.pcast(a, missing, to="varying") for a in arrays) if missing else arrays

        first = jax.lax.axis_index(over) * weights[0].shape[0] if over else 0
        if gathers:
            x, choice, share = (jax.lax.all_gather(a, over, axis=0, tiled=True) for a in (x, choice, share))
        y = run(*vary((x, choice, share), batch_axes), vary(weights, (over, within)), first)
        if within:
            y = jax.lax.psum(y, within)
        if gathers:
            return jax.lax.psum_scatter(y, over, scatter_dimension=0, tiled=True)
        return jax.lax.psum(y, over) if over else y

    specs = (up_spec, down_spec, up_spec)[:len(weights)]
    return jax.shard_map(shard, in_specs=(rows, rows, rows, *specs), out_specs=rows)(x_BTD, choice, share, *weights)
