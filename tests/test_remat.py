"""What each `compute.remat` keeps, computes again and gives: the numbers of "none", whatever is kept.

`python tests/test_remat.py` prints the table of docs/performance.md.
"""

import dataclasses
import functools
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import conftest  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, TINY, packed_batch, random_model

from lmjax.axes import MeshConfig, make_mesh
from lmjax.loader import to_global
from lmjax.models import ComputeConfig, Decoder, DecoderConfig
from lmjax.models.decoder import REMAT
from lmjax.objectives import pretrain
from lmjax.plan.work import Split, activation_bytes, analytic
from lmjax.state import shardings
from lmjax.step import gradient_sums
from lmjax.tree import named_leaves

LOSS = functools.partial(pretrain.loss, pretrain.PretrainConfig())
GATED = DecoderConfig(vocab_size=64, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=96,
                      max_seq_len=64)
ROWS, LENGTH = 4, 32


def gradients(remat: str, sizes: dict | None = None, layers: str = "scan", attention: str = "reference",
              config: DecoderConfig = TINY) -> dict[str, np.ndarray]:
    graphdef, params = nnx.split(random_model(config, remat=remat, layers=layers, attention=attention))
    params, batch = nnx.to_pure_dict(params), packed_batch(0, ROWS, LENGTH)
    mesh = make_mesh(MeshConfig(**({"data": 1} | (sizes or {}))),
                     jax.devices()[:int(np.prod(list((sizes or {}).values()), dtype=int))])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh))
        placed = to_global(batch, slice(0, ROWS), mesh, ROWS)
        f = jax.jit(lambda p, b: gradient_sums(LOSS, graphdef, p, b, jax.random.key(0)))
        return named_leaves(jax.device_get(f.lower(params, placed).compile(compiler_options=QUICK)(params, placed)))


CASES = {"scanned": {}, "unrolled": {"layers": "unroll"}, "fsdp and tensor": {"sizes": {"fsdp": 2, "tensor": 2}},
         "context": {"sizes": {"context": 2}, "attention": "auto"}, "blockwise": {"attention": "blockwise"}}


@pytest.mark.parametrize("case", [case if case in ("scanned", "fsdp and tensor") else
                                  pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_gives_the_numbers_of_none(case):
    """Gradients and metrics within 1e-6 of the largest number of each; on a CPU "offload" runs, too."""
    right = gradients("none", **CASES[case])
    for remat in ("named", "offload", *(("full", "dots") if case == "scanned" else ())):
        for name, found in gradients(remat, **CASES[case]).items():
            assert np.abs(found - right[name]).max() <= 1e-6 * max(np.abs(right[name]).max(), 1e-3), (remat, name)


def kept_arrays(remat: str, attention: str = "reference", config: DecoderConfig = GATED) -> list[tuple[int, ...]]:
    """Shapes of what the forward pass hands to the backward pass of the layers, one of each of them, weights aside."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, compute=ComputeConfig(
        remat=remat, layers="scan", attention=attention))))
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)

    def back(params):
        return jax.vjp(lambda p: nnx.merge(graphdef, p).hidden(tokens), params)[1]
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(back, params))]
    return sorted(s[1:] for s in shapes if s[:1] == (config.num_layers,) and s not in weights and len(s) > 2)


def test_named_keeps_what_it_says():
    D, N, K, H = GATED.d_model, GATED.num_heads, GATED.num_kv_heads, GATED.head_dim
    rows = (ROWS, LENGTH)
    assert kept_arrays("full") == kept_arrays("offload") == [(*rows, D)]
    assert kept_arrays("named") == sorted([(*rows, D)] * 2 + [(*rows, K, H)] * 2 + [(*rows, N, H)] * 2)


def test_the_plan_counts_what_is_kept():
    """`activation_bytes`, in bfloat16, less the one layer that is being worked on, is what JAX keeps, in numbers."""
    for remat in ("full", "named"):
        numbers = sum(int(np.prod(shape)) for shape in kept_arrays(remat))
        one, two = (activation_bytes(dataclasses.replace(GATED, num_layers=n), Split(), ROWS, LENGTH, remat)
                    for n in (1, 2))
        assert two - one == 2 * numbers, remat
    policies = ("offload", "full", "named", "dots", "none")
    sizes = [activation_bytes(GATED, Split(1, 4), 8, 64, remat) for remat in policies]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5 and set(REMAT) == set(policies)


def test_the_plan_counts_what_is_computed_again_and_sent_to_the_host():
    model, split = GATED.filled(), Split(2, 2, 2)
    work = {remat: analytic(model, split, 8, 64, remat) for remat in REMAT}
    tokens = 8 * 64 / split.size
    assert work["named"].flops - work["none"].flops == pytest.approx(tokens * 2 * 3 * 2 * 32 * 96)  # gate and up
    assert work["offload"].flops == work["full"].flops > work["named"].flops > work["dots"].flops
    assert work["offload"].host == 2 * 2 * 3 * tokens * split.tensor * 32 and work["full"].host == 0
    sums = {remat: next(m.count for m in w.messages if m.axis.startswith("tensor")) for remat, w in work.items()}
    assert sums["named"] == sums["none"] < sums["full"]


def count_of(primitive: str, jaxpr) -> int:
    """How many equations of a jaxpr and of those inside of it have a primitive and a result that somebody takes."""
    found = 0
    for eqn in jaxpr.eqns:
        if all(type(v).__name__ == "DropVar" for v in eqn.outvars):  # JAX shows that type in no public place
            continue
        found += eqn.primitive.name == primitive
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += count_of(primitive, inner) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize("remat,runs", [("full", 4), ("named", 3)])
def test_named_does_not_run_the_kernel_again(remat, runs):
    """Splash: once forward, twice backward (dq, dk and dv); and once more where its results are not kept."""
    config = DecoderConfig(vocab_size=64, num_layers=1, d_model=32, num_heads=2, head_dim=128, max_seq_len=128)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, compute=ComputeConfig(
        remat=remat, layers="scan", attention="splash"))))
    def total(p):
        return nnx.merge(graphdef, p).hidden(jnp.zeros((1, 128), jnp.int32)).sum()
    assert count_of("pallas_call", jax.make_jaxpr(jax.grad(total))(params).jaxpr) == runs


@pytest.mark.parametrize("remat,runs", [("full", 3), ("named", 2)])
def test_named_does_not_gather_the_keys_for_scores_again(remat, runs):
    """Rows over `context`: their keys are gathered forward and backward, and once more where lse is not kept."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(TINY, compute=ComputeConfig(
        remat=remat, layers="scan", context="gather"))))
    def total(p):
        return nnx.merge(graphdef, p).hidden(jnp.zeros((ROWS, LENGTH), jnp.int32)).sum()
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])):
        jaxpr = jax.make_jaxpr(jax.grad(total))(params).jaxpr
    assert count_of("all_gather", jaxpr) == 3 * runs  # keys, values, documents


def test_offload_reaches_the_host_of_a_tpu():
    """Lowered for TPUs: each block's input goes to pinned host memory and comes back; nothing does otherwise."""
    batch = {k: jnp.asarray(v) for k, v in packed_batch(0, ROWS, LENGTH).items()}
    text = {}
    for remat in ("full", "offload"):
        graphdef, params = nnx.split(nnx.eval_shape(lambda r=remat: Decoder(TINY, compute=ComputeConfig(
            remat=r, layers="scan"))))
        f = jax.jit(lambda p, g=graphdef: gradient_sums(LOSS, g, p, batch, jax.random.key(0)))
        text[remat] = f.trace(params).lower(lowering_platforms=("tpu",)).as_text()
    assert text["offload"].count("annotate_device_placement") >= 2 and "pinned_host" in text["offload"]
    assert "annotate_device_placement" not in text["full"]


# ---- the table -------------------------------------------------------------------------------------------


def row(remat: str) -> str:
    """Bytes that XLA's CPU backend plans for the temporaries of a loss and its gradients; nothing is run."""
    config, rows, length = DecoderConfig(vocab_size=8192, num_layers=16, d_model=512, num_heads=8, num_kv_heads=4,
                                         max_seq_len=1024).filled(), 4, 1024
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, compute=ComputeConfig(
        remat=remat, layers="scan", attention="blockwise"))))
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in packed_batch(0, rows, length).items()}
    f = jax.jit(lambda p, b: gradient_sums(LOSS, graphdef, p, b, jax.random.key(0)))
    temporaries = f.lower(params, batch).compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes
    deeper = dataclasses.replace(config, num_layers=17)
    kept = (activation_bytes(deeper, Split(), rows, length, remat)
            - activation_bytes(config, Split(), rows, length, remat)) / 2
    again = analytic(config, Split(), rows, length, remat).flops / analytic(config, Split(), rows, length, "none").flops
    return f"| `{remat}` | {kept / rows / length:,.0f} | {temporaries / 2**20:,.0f} MiB | {again - 1:.0%} |"


if __name__ == "__main__":
    print("| remat | numbers kept of a token in a layer | temporaries | FLOPs computed again |\n|---|---|---|---|")
    for remat in ("none", "dots", "named", "full", "offload"):
        print(row(remat), flush=True)
