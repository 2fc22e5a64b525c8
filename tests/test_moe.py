"""A mixture of experts on one device: routing, experts, losses and balance against NumPy; decoding; what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import QUICK, TINY, packed_batch, random_model

from lmjax import flops
from lmjax.config import RunConfig, ignored, validate
from lmjax.errors import ConfigError
from lmjax.losses.router import router_loss
from lmjax.models import Decoder, MoEConfig, preset
from lmjax.nn import grouped
from lmjax.nn.moe import experts, reference_experts, route, router_sums
from lmjax.objectives import pretrain
from lmjax.optim import OptimConfig, by_sign, make_optimizer
from lmjax.step import gradient_sums
from lmjax.tree import global_norm, named_leaves

N, D, F, E = 40, 8, 12, 5
MOE = dataclasses.replace(TINY, moe=MoEConfig(4, 2, 24))
SHALLOW = dataclasses.replace(MOE, num_layers=1)


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


# ---- the grouped product ---------------------------------------------------------------------------------------

SIZES = {"uneven": [3, 0, 17, 1, 9], "all to one": [0, 0, 30, 0, 0], "one row": [0, 1, 0, 0, 0], "none": [0] * 5,
         "full": [8, 8, 8, 8, 8]}


def looped(x, w, sizes):
    """float64, a row at a time; zeros after the last group."""
    y, row = np.zeros((len(x), w.shape[2])), 0
    for e, size in enumerate(sizes):
        y[row:row + size] = np.float64(x[row:row + size]) @ np.float64(w[e])
        row += size
    return y


@pytest.mark.parametrize("implementation", ["blocks", "ragged"])
@pytest.mark.parametrize("block", [4, 64])
def test_grouped_products_and_their_gradients(implementation, block, monkeypatch):
    monkeypatch.setattr(grouped, "BLOCK", block)
    x, w, dy = normal(N, D), normal(E, D, F), normal(N, F)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(x, w, sizes, dy):
        rows = (jnp.arange(N) < jnp.sum(sizes))[:, None]
        y, pull = jax.vjp(lambda x, w: jnp.where(rows, grouped.grouped_matmul(x, w, sizes, implementation), 0), x, w)
        return y, *pull(dy)

    for name, sizes in SIZES.items():
        y, dx, dw = both(x, w, jnp.asarray(sizes, jnp.int32), dy)
        total = sum(sizes)
        np.testing.assert_allclose(y, looped(x, w, sizes), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(dx[:total], looped(dy, w.swapaxes(1, 2), sizes)[:total], atol=1e-5, err_msg=name)
        ends = np.cumsum(sizes)
        for e in range(E):
            rows = slice(ends[e] - sizes[e], ends[e])
            np.testing.assert_allclose(dw[e], np.float64(x[rows]).T @ dy[rows], atol=2e-5, err_msg=name)


def test_a_block_that_counts_the_next_groups_rows_would_be_seen(monkeypatch):
    """The known-wrong gradient: a group's last block without its end."""
    plan = grouped._plan
    monkeypatch.setattr(grouped, "_plan", lambda sizes, rows: (*plan(sizes, rows)[:4], jnp.full(99, rows)))
    x, w, sizes = normal(N, D), normal(E, D, F), jnp.asarray(SIZES["uneven"], jnp.int32)
    dw = jax.grad(lambda w: jnp.sum(grouped._blocks(x, w, sizes)[:30]))(w)
    assert np.abs(dw[0] - x[:3].sum(0)[:, None]).max() > 0.1


# ---- experts ---------------------------------------------------------------------------------------------------

CHOICES = {
    "random": np.stack([np.random.default_rng(i).permutation(E)[:2] for i in range(N)]),
    "one expert gets none": np.stack([np.random.default_rng(i).permutation(E - 1)[:2] for i in range(N)]),
    "all to two": np.tile([3, 1], (N, 1)),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", [*CHOICES, "one token"])
def test_experts_equal_the_dense_loop(case, gated):
    choice = CHOICES.get(case, np.array([[2, 0]]))
    x, share = normal(len(choice), D), np.abs(normal(len(choice), 2))
    args = (x, share, normal(E, D, F, seed=1), normal(E, D, F, seed=2) if gated else None, normal(E, F, D))

    def run(f, args):
        y, pull = jax.vjp(lambda x, share, up, gate, down: f(x, choice, share, up, gate, down, "silu"), *args)
        return y, pull(normal(*y.shape, seed=3))

    wanted = jax.jit(functools.partial(run, reference_experts), compiler_options=QUICK)(args)
    for implementation in ("blocks", "ragged"):
        ours = jax.jit(functools.partial(run, functools.partial(experts, implementation=implementation)),
                       compiler_options=QUICK)(args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), ours, wanted)


def test_the_sort_is_stable_and_ties_go_to_the_lower_expert():
    routed = route(jnp.zeros((1, 6, D)), normal(D, E), MoEConfig(E, 3))
    assert np.array_equal(routed.choice_BTA[0], np.tile([0, 1, 2], (6, 1)))
    np.testing.assert_allclose(routed.share_BTA, 1 / 3, rtol=1e-6)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", ["mixtral", "qwen", "raw", "deepseek"])
def test_routers(kind):
    x, router, balance = normal(2, 7, D), normal(D, E), np.array([0, 3, 0, -3, 0], np.float32)
    config = {"mixtral": MoEConfig(E, 2), "qwen": MoEConfig(E, 2), "raw": MoEConfig(E, 2, renormalise=False),
              "deepseek": MoEConfig(E, 2, router="sigmoid", scale=2.5, balance=True)}[kind]
    routed = route(x, router, config, balance if config.balance else None)
    logits = np.float64(x) @ router
    if kind == "deepseek":  # the bias chooses and does not count
        scores = 1 / (1 + np.exp(-logits))
        best = np.argsort(-(scores + balance), axis=-1, kind="stable")[..., :2]
        picked = np.take_along_axis(scores, best, -1)
        share = 2.5 * picked / picked.sum(-1, keepdims=True)
        assert np.all(best[..., 0] == 1), "the balance decides"
    else:
        best = np.argsort(-logits, axis=-1, kind="stable")[..., :2]
        if kind == "mixtral":  # softmax over the chosen logits
            share = softmax(np.take_along_axis(logits, best, -1))
        else:
            share = np.take_along_axis(softmax(logits), best, -1)
            share = share / share.sum(-1, keepdims=True) if kind == "qwen" else share
    assert np.array_equal(routed.choice_BTA, best)
    np.testing.assert_allclose(routed.share_BTA, share, rtol=1e-5)


# ---- losses and balance ----------------------------------------------------------------------------------------


def test_router_losses_against_numpy():
    x, router, weights = normal(3, 6, D), normal(D, E), np.abs(normal(3, 6)) * (normal(3, 6, seed=1) > 0)
    config = MoEConfig(E, 2)

    def loss(router, x=x, weights=weights):
        sums = router_sums(route(x, router, config), weights)
        return router_loss(sums.counts_E[None], sums.probs_E[None], sums.z[None], sums.weight, 2, balance=0.3, z=0.2)

    (total, metrics), W = loss(router), weights.sum()

    def numpy_loss(router, best):
        logits = np.float64(x) @ np.float64(router)
        f, p = np.zeros(E), np.zeros(E)
        for b, t in np.ndindex(3, 6):
            for e in best[b, t]:
                f[e] += weights[b, t] / (2 * W)
            p += weights[b, t] * softmax(logits[b, t]) / W
        z = np.sum(weights * np.log(np.exp(logits).sum(-1)) ** 2) / W
        return E * np.sum(f * p), z, f

    best = np.argsort(-(np.float64(x) @ router), -1)[..., :2]
    balance, z, f = numpy_loss(router, best)
    assert float(total) == pytest.approx(W * (0.3 * balance + 0.2 * z), rel=1e-5)
    told = {name: float(s) / float(w) for name, (s, w) in metrics.items()}
    entropy = -sum(v * np.log(v) for v in f if v) / np.log(E)
    assert told == pytest.approx({"router_balance": balance, "router_z": z, "router_busiest": f.max(),
                                  "router_entropy": entropy}, rel=1e-5)
    grad, step = jax.grad(lambda r: loss(r)[0])(router), normal(D, E, seed=9) * 1e-4
    up, down = (numpy_loss(router + s * step, best) for s in (1, -1))  # f is a constant of the loss
    slope = W * (0.3 * (up[0] - down[0]) + 0.2 * (up[1] - down[1])) / 2
    assert float(jnp.sum(grad * step)) == pytest.approx(slope, rel=1e-3)
    padded = loss(router, np.concatenate([x, 9 * x], 1), np.concatenate([weights, 0 * weights], 1))[0]
    assert float(padded) == pytest.approx(float(total), rel=1e-6), "tokens without weight do not count"


def test_even_load_is_one_and_collapse_is_the_number_of_experts():
    one, told = router_loss(jnp.full((1, 4), 6.0), jnp.full((1, 4), 3.0), jnp.zeros(1), jnp.float32(12), 2, balance=1,
                            z=0)
    assert float(one) / 12 == pytest.approx(1) and float(told["router_entropy"][0]) / 12 == pytest.approx(1)
    all_to_one = jnp.asarray([[12.0, 0, 0, 0]])
    worst, told = router_loss(all_to_one, all_to_one, jnp.zeros(1), jnp.float32(12), 1, balance=1, z=0)
    assert float(worst) / 12 == pytest.approx(4) and float(told["router_entropy"][0]) == 0


def test_balance_moves_against_the_load_and_nothing_else_sees_it():
    config = dataclasses.replace(SHALLOW, moe=MoEConfig(4, 2, 24, router="sigmoid", balance=True))
    model = random_model(config)
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    batch = jax.tree.map(jnp.asarray, packed_batch(0))
    loss = functools.partial(pretrain.loss, pretrain.PretrainConfig(router_balance=0.0, router_z=0.0))
    run = jax.jit(lambda p, a: gradient_sums(loss, graph, p, batch, jax.random.key(0), a), static_argnums=1,
                  compiler_options=QUICK)
    grads = run(params, 1)[0]
    halves, _, _ = run(params, 2)
    pull = np.asarray(grads["blocks"]["mlp"]["balance_E"])
    fields = (batch[name] for name in ("tokens", "segments", "positions", "weights"))
    sums = jax.jit(lambda m, *a: m.hidden_and_router(*a)[1], compiler_options=QUICK)(model, *fields)
    counts = np.asarray(sums.counts_E)
    assert not np.any(sums.pull), "the term that carries it adds nothing"
    np.testing.assert_allclose(counts.sum(1), 2 * batch["weights"].sum(), rtol=1e-5)
    np.testing.assert_allclose(pull, counts - counts.mean(1, keepdims=True), atol=1e-3)
    np.testing.assert_allclose(halves["blocks"]["mlp"]["balance_E"], pull, atol=1e-3)  # micro-batches only add
    tx, _ = make_optimizer(OptimConfig(balance_rate=0.01, warmup_steps=0), 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["mlp"]["balance_E"], -0.01 * np.sign(pull), rtol=1e-6)
    louder = jax.tree.map(lambda g: g, grads)
    louder["blocks"]["mlp"]["balance_E"] = 1e6 * grads["blocks"]["mlp"]["balance_E"]
    again, _ = tx.update(louder, tx.init(params), params)  # clipping does not hear it
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(again), strict=True))
    plain = by_sign(optax.sgd(1.0), 0.5).update({"w": jnp.ones(2), "balance_E": jnp.zeros(2)}, (None, None))[0]
    assert np.array_equal(plain["w"], [-1, -1]) and not np.any(plain["balance_E"]), "no load, no move"


def test_accumulation_adds_up():
    """z exactly; the balance of a step is the mean of its micro-batches' by weight, as documented."""
    graph, params = nnx.split(random_model(SHALLOW))
    params, batch = nnx.to_pure_dict(params), jax.tree.map(jnp.asarray, packed_batch(0))

    def run(batch, accumulate, **coefficients):
        loss = functools.partial(pretrain.loss, pretrain.PretrainConfig(**coefficients))
        return jax.jit(lambda p: gradient_sums(loss, graph, p, batch, jax.random.key(0), accumulate),
                       compiler_options=QUICK)(params)

    whole, parts = (run(batch, a, router_balance=0.0, router_z=0.5)[0] for a in (1, 2))
    for name, g in named_leaves(whole).items():
        np.testing.assert_allclose(named_leaves(parts)[name], g, atol=2e-4 * float(global_norm(whole)), err_msg=name)
    halves = [run({k: v[a::2] for k, v in batch.items()}, 1, router_balance=0.5)[2]["router_balance"] for a in (0, 1)]
    (total, _), (one, _) = (run(batch, a, router_balance=0.5)[2]["router_balance"] for a in (2, 1))
    assert float(total) == pytest.approx(sum(float(s) for s, _ in halves), rel=1e-5)
    assert abs(float(total) / float(one) - 1) > 1e-5, "which is not the balance of the whole batch"


# ---- the model -------------------------------------------------------------------------------------------------


def test_one_wide_expert_is_the_mlp():
    """A mixture of one expert has a share of 1; with the MLP's weights it is the MLP, and a shared one adds to it."""
    dense = random_model(dataclasses.replace(TINY, d_ff=24), spread=0.3)
    config = dataclasses.replace(TINY, moe=MoEConfig(1, 1, 24, shared_d_ff=24))
    graph = nnx.split(nnx.eval_shape(lambda: Decoder(config)))[0]
    params = nnx.to_pure_dict(nnx.split(dense)[1])
    mlp = params["blocks"]["mlp"]
    params["blocks"]["mlp"] = {
        "router_DE": jnp.ones((2, 32, 1)), "up_EDF": mlp["up_DF"][:, None], "gate_EDF": mlp["gate_DF"][:, None],
        "down_EFD": mlp["down_FD"][:, None] / 2, "shared_up_DF": mlp["up_DF"], "shared_gate_DF": mlp["gate_DF"],
        "shared_down_FD": mlp["down_FD"] / 2}
    tokens = packed_batch(0)["tokens"]
    run = jax.jit(lambda g, p: nnx.merge(g, p)(tokens), static_argnums=0, compiler_options=QUICK)
    np.testing.assert_allclose(run(graph, params), run(*nnx.split(dense)), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_equals_the_whole_rows(dtype):
    from lmjax.models.cached import matmul_weights

    model = random_model(MOE, spread=0.3, dtype=dtype)
    graph, params = nnx.split(model)
    params = matmul_weights(nnx.to_pure_dict(params), dtype)
    assert params["blocks"]["mlp"]["router_DE"].dtype == jnp.float32
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (3, 12)), jnp.int32)
    wanted = model(ids)

    @functools.partial(jax.jit, static_argnames="empty", compiler_options=QUICK)
    def extend(params, ids, counts, cache, empty=False):
        model = nnx.merge(graph, params)
        hidden, cache = model.extend(ids, counts, cache, empty)
        return model.logits(hidden), cache

    logits, cache = extend(params, ids[:, :8], jnp.full(3, 8), model.new_cache(3, 16), empty=True)
    for t in range(8, 12):
        more, cache = extend(params, ids[:, t:t + 1], jnp.ones(3, jnp.int32), cache)
        logits = jnp.concatenate([logits, more], axis=1)
    # In bfloat16 a rounding may choose another expert: the bound is of a few roundings, all along.
    assert np.abs(np.asarray(logits - wanted)).max() < (1e-5 if dtype == "float32" else 0.1) * np.abs(wanted).max()


def test_no_token_sees_the_future_through_the_router():
    model = random_model(MOE, spread=0.3)
    ids = jnp.asarray(packed_batch(0, 2, 16)["tokens"])
    run = jax.jit(lambda m, ids: m(ids), compiler_options=QUICK)
    base, other = run(model, ids), run(model, ids.at[:, 9].set((ids[:, 9] + 1) % 64))
    assert np.array_equal(base[:, :9], other[:, :9]) and not np.array_equal(base[:, 9], other[:, 9])


def test_what_a_token_meets():
    assert flops.used_share("blocks/mlp/up_EDF", 8, 2) == 0.25
    assert flops.used_share("blocks/mlp/router_DE", 8, 2) == flops.used_share("blocks/mlp/balance_E", 8, 2) == 1
    assert flops.used_share("embed_VD", 8, 2) == 1


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe, word", [
    (MoEConfig(0), "moe.num_experts=0"), (MoEConfig(4, 5), "experts_per_token=5: there are 4 experts"),
    (MoEConfig(router="top"), "router='top': choose one of softmax, sigmoid"), (MoEConfig(d_ff=-1), "moe.d_ff=-1"),
    (MoEConfig(scale=float("nan")), "moe.scale"),
])
def test_wrong_mixtures_are_refused(moe, word):
    (problem,) = dataclasses.replace(TINY, moe=moe).problems()
    assert word in problem


def test_biases_and_meshes_are_refused():
    assert "experts have none" in dataclasses.replace(MOE, biases=True, gated=False).problems()[0]

    def problems(**changes):
        with pytest.raises(ConfigError) as caught:
            validate(dataclasses.replace(RunConfig(model=preset("tiny-moe-1m")), **changes), 8)
        return "\n".join(caught.value.problems)

    mesh = dataclasses.replace
    assert "mesh.expert=3 does not divide model.moe.num_experts=8" in problems(
        mesh=mesh(RunConfig().mesh, expert=3)) or "no whole number" in problems(mesh=mesh(RunConfig().mesh, expert=3))
    few = preset("tiny-moe-1m", moe=MoEConfig(6, 2))
    assert "does not divide model.moe.num_experts=6" in problems(model=few, mesh=mesh(RunConfig().mesh, expert=4))
    assert "has no experts" in problems(model=preset("tiny-1m"), mesh=mesh(RunConfig().mesh, expert=4))


def test_settings_without_effect_are_told():
    dense = RunConfig(objective=pretrain.PretrainConfig(router_z=0.1), optim=OptimConfig(balance_rate=0.1))
    assert len(ignored(dense)) == 2 and all("no effect" in text for text in ignored(dense))
    assert not ignored(RunConfig(model=preset("tiny-moe-1m")))
    both = RunConfig(model=preset("tiny-moe-1m", d_ff=64, moe=MoEConfig(4, 2, 8)))
    assert "model.d_ff=64" in ignored(both)[0]
