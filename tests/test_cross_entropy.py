"""The chunked loss against float64 formulas, the naive loss, and known-wrong variants of itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK
from jax.sharding import NamedSharding

from lmjax.axes import ACTIVATION_RULES, WEIGHT_RULES, MeshConfig, make_mesh, spec
from lmjax.collectives import collectives
from lmjax.losses import cross_entropy as module
from lmjax.losses.cross_entropy import cross_entropy, naive_cross_entropy

B, T, D, V = 3, 37, 16, 101
ALL = {"z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 5.0}
TERMS = [{}, {"z_loss": 1e-2}, {"label_smoothing": 0.1}, {"softcap": 5.0}, ALL]


def inputs(scale: float = 1.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = (scale * rng.normal(size=(V, D))).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = (rng.random((B, T)) > 0.3).astype(np.float32) * rng.uniform(0.5, 2, (B, T)).astype(np.float32)
    return x, head, targets, weights


def float64_reference(x, head, targets, weights, z_loss=0.0, label_smoothing=0.0, softcap=0.0):
    """(sum, dx, dhead) by the formulas of the module's docstring, in float64, written out with loops' algebra."""
    x, head, w = x.astype(np.float64), head.astype(np.float64), weights.astype(np.float64)
    raw = x @ head.T
    z = softcap * np.tanh(raw / softcap) if softcap else raw
    top = z.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(z - top).sum(-1, keepdims=True)))[..., 0]
    zy = np.take_along_axis(z, targets[..., None], -1)[..., 0]
    loss = (1 - label_smoothing) * (lse - zy) + label_smoothing * (lse - z.mean(-1)) + z_loss * lse**2
    hot = np.eye(head.shape[0])[targets]
    dz = np.exp(z - lse[..., None]) * (1 + 2 * z_loss * lse[..., None])
    dz += -label_smoothing / head.shape[0] - (1 - label_smoothing) * hot
    dz *= w[..., None]
    if softcap:
        dz *= 1 - (z / softcap) ** 2
    return (w * loss).sum(), dz @ head, np.einsum("btv,btd->vd", dz, x)


def chunked(x, head, targets, weights, chunk=5, **terms):
    """(sum, dx, dhead) with about `chunk` columns at a time; 37 columns do not divide evenly."""
    f = functools.partial(cross_entropy, chunk_bytes=4 * V * B * chunk, **terms)
    value, grads = jax.jit(jax.value_and_grad(lambda x, h: f(x, h, targets, weights)[0], (0, 1)))(x, head)
    return value, *grads


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_value_and_gradients_equal_float64(terms, chunk):
    args = inputs()
    for ours, exact in zip(chunked(*args, chunk=chunk, **terms), float64_reference(*args, **terms), strict=True):
        assert np.abs(np.asarray(ours) - exact).max() <= 2e-6 * np.abs(exact).max()


@pytest.mark.parametrize("wrong", TERMS[1:])
def test_leaving_a_term_out_would_be_seen(wrong):
    args = inputs()
    exact = float64_reference(*args, **wrong)
    for ours, right in zip(chunked(*args), exact, strict=True):
        assert np.abs(np.asarray(ours) - right).max() > 1e-3 * np.abs(right).max()


def test_naive_agrees_and_second_result_is_pure_cross_entropy():
    x, head, targets, weights = inputs()
    total, nll = cross_entropy(x, head, targets, weights, chunk_bytes=4 * V * B * 4, **ALL)
    naive_total, naive_nll = naive_cross_entropy(x, head, targets, weights, **ALL)
    np.testing.assert_allclose(total, naive_total, rtol=1e-6)
    np.testing.assert_allclose(nll, naive_nll, rtol=1e-5, atol=1e-6)
    assert nll.shape == (B, T)
    pure = float64_reference(x, head, targets, np.ones_like(weights), softcap=ALL["softcap"])[0]
    np.testing.assert_allclose(np.sum(nll), pure, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_bfloat16_inputs_keep_float32_logits(scale):
    """f32 inputs cannot show a bfloat16 logit; large logits in bfloat16 inputs can."""
    x, head, targets, weights = inputs(scale)
    xb, hb = jnp.asarray(x, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    exact = float64_reference(*(np.asarray(a, np.float64) for a in (xb, hb)), targets, weights)
    total, dx, dhead = chunked(xb, hb.astype(jnp.float32), targets, weights)
    assert abs(float(total) - exact[0]) <= 1e-5 * abs(exact[0])
    for ours, right in ((dx, exact[1]), (dhead, exact[2])):
        assert np.abs(np.asarray(ours, np.float64) - right).max() <= 1e-2 * np.abs(right).max()
    # The known-wrong way: logits rounded to bfloat16 before the softmax.
    z = jnp.einsum("btd,vd->btv", xb, hb)
    wrong = -jnp.sum(weights * jnp.take_along_axis(
        jax.nn.log_softmax(z.astype(jnp.float32)), targets[..., None], -1)[..., 0])
    assert abs(float(wrong) - exact[0]) > 1e-5 * abs(exact[0])


def test_labels_out_of_range_and_zero_weights_are_silent():
    x, head, targets, weights = inputs()
    bad = targets.copy()
    bad[0, :5], bad[1, :5] = -100, V + 7
    silenced = weights.copy()
    silenced[:2, :5] = 0
    for a, b in zip(chunked(x, head, bad, weights), chunked(x, head, targets, silenced), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for value in chunked(x, head, targets, np.zeros_like(weights)):
        assert np.all(np.asarray(value) == 0)


def test_negative_weights_push_away():
    """A weight of -1 (an advantage, say) is a weight like any other."""
    x, head, targets, weights = inputs()
    for a, b in zip(chunked(x, head, targets, -weights), chunked(x, head, targets, weights), strict=True):
        np.testing.assert_allclose(a, -np.asarray(b), rtol=1e-6)


def test_upstream_scale_reaches_the_gradient():
    x, head, targets, weights = inputs()
    once = jax.grad(lambda h: cross_entropy(x, h, targets, weights)[0])(head)
    scaled = jax.grad(lambda h: 0.25 * cross_entropy(x, h, targets, weights)[0])(head)
    np.testing.assert_allclose(scaled, 0.25 * once, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunks", [1, 4])
def test_hidden_states_are_turned_for_the_heads_gradient(chunks):
    """On one device: XLA's CPU backend multiplies that faster, and would undo it where there is one chunk."""
    x, head, targets, weights = inputs()
    rows = B * T // chunks + 1
    gradient = jax.jit(jax.grad(lambda head: cross_entropy(x, head, targets, weights, chunk_bytes=4 * V * rows)[0]))
    text = gradient.lower(head).compile().as_text()
    sums = [line for line in text.splitlines() if " dot(" in line and f"f32[{D},{V}]" in line]
    assert len(sums) == 1 and "lhs_contracting_dims={1}" in sums[0]


def test_vocabulary_is_never_whole():
    """No array of [tokens, V] or larger in the compiled gradient; the naive loss has one."""
    x, head, targets, weights = inputs()

    def biggest(f):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, h: f(x, h, targets, weights)[0], (0, 1)))(x, head)
        sizes = []
        def walk(j):
            for eqn in j.eqns:
                sizes.extend(v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
                for value in jax.tree.leaves(list(eqn.params.values()),
                                             is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")):
                    if hasattr(value, "jaxpr"):
                        walk(value.jaxpr)
                    elif hasattr(value, "eqns"):
                        walk(value)
        walk(jaxpr.jaxpr)
        return max(sizes)

    assert biggest(functools.partial(cross_entropy, chunk_bytes=4 * V * B * 4)) < B * T * V / 5
    assert biggest(naive_cross_entropy) >= B * T * V


# ---- on a mesh -----------------------------------------------------------------------------------------

MESHES = [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "tensor": 2},
          {"expert": 4, "fsdp": 2}, {"replica": 2, "fsdp": 2, "context": 2}]
CHUNK = 4 * 64 * 3  # bytes of the logits of three tokens, with the vocabulary whole


def mesh_inputs(rows: int = 8, vocab: int = 64):
    """x [rows, 20, 16], head, targets, and weights of which some devices have next to none."""
    rng = np.random.default_rng(1)
    x, head = rng.normal(size=(rows, 20, 16)).astype(np.float32), rng.normal(size=(vocab, 16)).astype(np.float32)
    targets = rng.integers(-1, vocab + 1, (rows, 20)).astype(np.int32)  # labels out of range too
    weights = rng.uniform(-1, 2, (rows, 20)) * (rng.random((rows, 20)) < np.linspace(0, 1, rows)[:, None])
    return x, head, targets, weights.astype(np.float32)


def compiled(args, sizes=None, **options):
    """(compiled ((total, nll), (dx, dhead)), mesh) on so many devices; on one where sizes is None."""
    def loss(x, head, targets, weights):
        return cross_entropy(x, head, targets, weights, chunk_bytes=CHUNK, **options)
    f = jax.value_and_grad(loss, (0, 1), has_aux=True)
    if sizes is None:
        return jax.jit(f).lower(*args).compile(compiler_options=QUICK), None
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)), jax.devices()[:int(np.prod(list(sizes.values())))])
    letters = ("BTD", "VD", "BT", "BT")
    with jax.set_mesh(mesh):
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec(
            name, a.shape, WEIGHT_RULES if name == "VD" else ACTIVATION_RULES, mesh)))
            for a, name in zip(args, letters, strict=True)]
        return jax.jit(f).lower(*placed).compile(compiler_options=QUICK), mesh


def run_on(args, sizes=None, **options):
    program, mesh = compiled(args, sizes, **options)
    if mesh is not None:
        args = [jax.device_put(a, s) for a, s in zip(args, program.input_shardings[0], strict=True)]
    return [np.asarray(a, np.float64) for a in jax.tree.leaves(jax.device_get(program(*args)))]


@pytest.fixture(scope="module")
def one_device():
    return run_on(mesh_inputs(), **ALL)


def worst(right, found):
    return max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(right, found, strict=True))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_numbers_of_one_device(one_device, sizes):
    """Loss, loss of each token, and both gradients, with every term: 1e-6 of the largest number of each."""
    assert worst(one_device, run_on(mesh_inputs(), sizes, **ALL)) < 1e-6


@pytest.mark.parametrize("rows,vocab,sizes", [(6, 64, {"data": 2, "fsdp": 4}), (3, 64, {"fsdp": 4, "context": 2}),
                                              (8, 100, {"data": 1, "tensor": 8})])
def test_what_does_not_divide_is_whole_on_every_device(rows, vocab, sizes):
    args = mesh_inputs(rows, vocab)
    assert worst(run_on(args), run_on(args, sizes)) < 1e-6


def head_traffic(program, mesh, axes) -> dict[str, int]:
    """{kind: how often} of what is as large as the float32 head [64, 16] without what `tensor` splits, along any of
    these axes."""
    found = {}
    for c in collectives(program.as_text(), dict(mesh.shape)):
        if set(c.axes) & set(axes) and c.bytes * mesh.shape["tensor"] >= 4 * 64 * 16:
            found[c.kind] = found.get(c.kind, 0) + c.count
    return found


@pytest.mark.parametrize("sizes,expected", [
    ({"data": 8}, {"all-reduce": 1}), ({"fsdp": 8}, {"all-gather": 1, "reduce-scatter": 1}),
    ({"context": 4, "tensor": 2}, {"all-gather": 1, "reduce-scatter": 1})], ids=str)
def test_the_head_is_gathered_once_and_its_gradient_sent_once(sizes, expected, monkeypatch):
    """However many chunks there are: of 20 tokens a device, seven; `count` has the turns of loops in it."""
    axes = set(sizes) - {"tensor"}
    assert head_traffic(*compiled(mesh_inputs(), sizes), axes) == expected
    # The known-wrong way, a sum over the devices in every chunk, is seen.
    own = module.product

    def sent(spec, *args):
        return jax.lax.psum(own(spec, *args), tuple(axes)) if spec.startswith("ND,NV") else own(spec, *args)

    monkeypatch.setattr(module, "product", sent)
    assert head_traffic(*compiled(mesh_inputs(), sizes), axes)["all-reduce"] >= 7


def test_chunks_of_a_mesh_have_enough_tokens():
    place = module._Place(("data",), ("tensor",))
    assert module._chunks(8192, 128_256, 0, module._Place()) == 127  # 65 tokens, 32 MiB
    assert module._chunks(8192, 128_256, 0, place) == 8 and module._chunks(100, 128_256, 0, place) == 1
    assert module._chunks(8192, 2048, 0, place) == 2  # 32 MiB are more tokens
    assert module._chunks(8192, 128_256, 2**25, place) == 127  # what is asked for is done
