"""What the train step's devices send each other, held in a golden file; the reader of HLO, on texts made by hand."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # python tests/test_collectives.py writes the golden anew; with names, of these meshes
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import conftest  # noqa: F401  (eight fake devices, before JAX looks for any)

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, packed_batch

from lmjax.axes import MESH_AXES, MeshConfig, make_mesh
from lmjax.checkpoint import abstract
from lmjax.collectives import Collective, collectives, differences, summary
from lmjax.loader import to_global
from lmjax.models import ComputeConfig, Decoder, DecoderConfig, MoEConfig
from lmjax.objectives import pretrain
from lmjax.optim import OptimConfig, make_optimizer
from lmjax.plan.hlo import read_program
from lmjax.state import fresh_state, shardings
from lmjax.step import make_train_step

GOLDEN = Path(__file__).resolve().parent / "goldens" / "collectives.json"
AGAIN = "if that is meant, `python tests/test_collectives.py` writes the golden anew; read the diff"

MODEL = DecoderConfig(vocab_size=64, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, max_seq_len=64)
PAIRS = {
    "replica": {"replica": 8}, "data": {"data": 8}, "fsdp": {"fsdp": 8}, "tensor": {"tensor": 4},
    "context gather": {"context": 8, "method": "gather"}, "context ring": {"context": 8, "method": "ring"},
    "data zero1": {"data": 8, "zero1": True},
    "data fsdp": {"data": 2, "fsdp": 4}, "data tensor": {"data": 2, "tensor": 4},
    "fsdp tensor": {"fsdp": 2, "tensor": 4},
    "replica fsdp": {"replica": 2, "fsdp": 4}, "fsdp context ring": {"fsdp": 2, "context": 4, "method": "ring"},
    "data context gather": {"data": 2, "context": 4, "method": "gather"},
    "context tensor ring": {"context": 4, "tensor": 2, "method": "ring"},
    "fsdp accumulate": {"fsdp": 8, "accumulate": 2},
    "pipeline": {"pipeline": 4, "layers": 4}, "pipeline repeats": {"pipeline": 2, "layers": 4, "repeats": 2},
    "pipeline data": {"pipeline": 4, "data": 2, "layers": 4}, "pipeline fsdp": {"pipeline": 4, "fsdp": 2, "layers": 4},
    "pipeline tensor": {"pipeline": 4, "tensor": 2, "layers": 4}, "expert": {"expert": 8, "experts": 8},
    "pipeline expert": {"pipeline": 2, "expert": 4, "layers": 4, "experts": 8},
}
QUICKLY = ("data", "fsdp", "context ring")  # the others take minutes together


def of_train_step(method: str = "auto", zero1: bool = False, accumulate: int = 1, layers: int = 3, repeats: int = 1,
                  experts: int = 0, **sizes: int) -> dict:
    """The summary of a train step of MODEL, scanned layers, 16 rows of 64 tokens, on such a mesh."""
    config = MeshConfig(**({"data": 1} | sizes), zero1=zero1)
    mesh = make_mesh(config, jax.devices()[:int(np.prod(list(sizes.values())))])
    tx, schedule = make_optimizer(OptimConfig(), 10)
    like = dataclasses.replace(MODEL, num_layers=layers, moe=MoEConfig(experts, 2, 16) if experts else None)
    compute = ComputeConfig(layers="scan", context=method, pipeline_repeats=repeats)
    model = nnx.eval_shape(lambda: Decoder(like, compute=compute))
    graphdef, params = nnx.split(model)
    state = jax.eval_shape(functools.partial(fresh_state, tx=tx), nnx.to_pure_dict(params))
    placed = shardings(state, mesh, zero1)
    batch = to_global(packed_batch(0, 16, 64), slice(0, 16), mesh, 16)
    step = make_train_step(functools.partial(pretrain.loss, pretrain.PretrainConfig()), graphdef, tx, schedule, seed=0,
                           accumulate=accumulate, shardings=placed, zero1=zero1)
    with jax.set_mesh(mesh):
        text = step.lower(abstract(state, placed), batch).compile(compiler_options=QUICK).as_text()
    records = collectives(text, dict(mesh.shape))
    assert all(c.exact for c in records), "a loop whose turns XLA does not know"
    return summary(records)


@pytest.mark.parametrize("name", [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow)
                                  for name in PAIRS])
def test_the_train_step_sends_what_it_did(name):
    golden = json.loads(GOLDEN.read_text())
    if golden["jax"] != jax.__version__:
        pytest.skip(f"the golden is of jax {golden['jax']}, and another XLA chooses other collectives")
    changed = differences(golden["meshes"][name], of_train_step(**PAIRS[name]))
    assert not changed, f"{name}:\n  " + "\n  ".join(changed) + f"\n{AGAIN}"


def test_what_each_axis_is_for():
    """Of the golden: pure data parallelism gathers nothing, and the ring moves more than the order's ends."""
    meshes = json.loads(GOLDEN.read_text())["meshes"]
    assert meshes.keys() == PAIRS.keys(), AGAIN
    for name in ("replica", "data"):
        assert set(meshes[name]) == {f"all-reduce over {name}"}
    assert any(name.startswith("all-gather") for name in meshes["fsdp"])
    assert "collective-permute over context" in meshes["context ring"]
    ring, gather = (sum(v["bytes"] for k, v in meshes[f"context {how}"].items() if k.startswith("collective-permute"))
                    for how in ("ring", "gather"))
    assert ring > 4 * gather
    # 16 micro-batches on 4 stages: 19 ticks, and as many in the backward pass, of [1, 64, 32] float32.
    sent = meshes["pipeline"]["collective-permute over pipeline"]
    assert sent == {"count": 2 * 19, "bytes": 2 * 19 * 64 * 32 * 4}
    assert not any("all-to-all" in kind for kind in meshes["pipeline"])


# ---- the reader ----------------------------------------------------------------------------------------

TEXT = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %move = f32[8]{0} collective-permute(%x), channel_id=2, source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %move)
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %w = (s32[], f32[8]{0}) while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %g = bf16[2,16]{1,0:T(8,128)} all-gather(%y), channel_id=3, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %x)
}

ENTRY %main (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[4]{0}, f32[4]{0}) all-reduce(%a, %b), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %r = f32[2]{0} reduce-scatter(%a), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %ags = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ags)
  ROOT %c = f32[8]{0} fusion(%arg), kind=kLoop, calls=%add
}
"""


def test_reads_loops_groups_and_pairs():
    found = collectives(TEXT, {"a": 2, "b": 2, "c": 2})
    assert found == [
        Collective("all-gather", 64, 4, ("a", "b"), 1),  # of an asynchronous pair, once
        Collective("all-gather", 64, 2, ("b",), 5), Collective("all-reduce", 32, 4, ("b", "c"), 1),
        Collective("collective-permute", 32, 2, ("b",), 15), Collective("reduce-scatter", 64, 8, ("a", "b", "c"), 1)]
    assert found[2].wire_bytes == 2 * 32 * 3 / 4 and found[3].wire_bytes == 15 * 32
    assert summary(found)["all-gather over b"] == {"count": 5, "bytes": 320}


@pytest.mark.parametrize("groups,axes", [
    ("{{0,4},{1,5},{2,6},{3,7}}", ("a",)), ("[4,2]<=[8]", ("c",)), ("[2,4]<=[2,2,2]T(1,0,2)", ("a", "c")),
    ("mesh['x'=2,'y'=4] {'x'}", ("a",)), ("mesh['x'=2,'y'=4] {'y'}", ("b", "c")),
    ("mesh['x'=2,'y'=4] {'y':(1)2}", ("b",)), ("mesh['x'=2,'y'=4] {'x','y':(2)2}", ("a", "c")),
    ("{}", ("a", "b", "c")), ("mesh['x'=8] {'x'}", ("a", "b", "c")),
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", ("a",))])
def test_every_way_to_write_groups(groups, axes):
    text = "HloModule m, num_partitions=8\n\nENTRY %m (a: f32[8]) -> f32[8] {\n"
    text += f"  ROOT %r = f32[8] all-reduce(%a), replica_groups={groups}, x=y\n}}"
    (found,) = collectives(text, {"a": 2, "b": 2, "c": 2})
    assert (found.axes, found.group) == (axes, 2 ** len(axes))


def test_loops_of_unknown_length_are_not_taken_for_certain():
    text = TEXT.replace('"known_trip_count":{"n":"3"}', "")
    (move,) = (c for c in collectives(text, None) if c.kind == "collective-permute")
    assert (move.count, move.exact, move.axes) == (5, False, ())


def test_one_channel_may_be_of_several_collectives_and_several_lines_of_one():
    """`jax.shard_map` gives all of its collectives one channel; what TPUs run beside products has one chain_id, and a
    kernel's source stands among its lines."""
    gather = "f32[16]{0} all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}"
    chained = gather + ', frontend_attributes={chain_id="3"}'
    text = f"""HloModule m, num_partitions=8

%start (a: f32[4]) -> f32[16] {{
  ROOT %g.1 = {chained}
}}

%beside (a: f32[4]) -> f32[16] {{
  ROOT %g.2 = {chained}
}}

ENTRY %main (arg: f32[4]) -> f32[16] {{
  %keys = {gather}
  %values = {gather}
  %kernel = f32[8]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", config={{"custom":{{"body":"
module {{
}}
"}}}}
  %one = f32[16]{{0}} fusion(%a), kind=kCustom, calls=%start
  ROOT %two = f32[16]{{0}} fusion(%one), kind=kOutput, calls=%beside
}}
"""
    for found in (text, text.replace(', frontend_attributes={chain_id="3"}', "")):
        assert [c.count for c in collectives(found, {"a": 2, "b": 4})] == [3]
        (message,) = read_program(found, {"a": 2, "b": 4}).collectives
        assert (message.count, message.bytes, message.axis) == (3, 64, "b")
    each = text.replace('chain_id="3"', 'chain_id="4"', 1)  # the known-wrong variant: nothing says that they are one
    assert [c.count for c in collectives(each, None)] == [4]


def test_a_condition_tells_turns_but_not_for_certain():
    text = TEXT.replace('"known_trip_count":{"n":"3"}', "").replace("ENTRY", """%c (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY""")
    (move,) = (c for c in collectives(text, None) if c.kind == "collective-permute")
    assert (move.count, move.exact) == (5 * 7, False)


def test_differences_are_lines_and_other_texts_are_refused():
    before = summary(collectives(TEXT, {"a": 8}))
    after = summary(collectives(TEXT.replace("f32[4]{0}, f32[4]{0}) all-reduce", "f32[8]{0}) all-reduce"), {"a": 8}))
    assert not differences(before, after) and not differences(before, before)
    after = summary(collectives(TEXT.replace("f32[2]{0} reduce", "f32[3]{0} reduce"), {"a": 8}))
    assert differences(before, after) == ["reduce-scatter over a: 1 times, 64 bytes -> 1 times, 96 bytes"]
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("hello")


if __name__ == "__main__":
    asked, golden = sys.argv[1:] or list(PAIRS), json.loads(GOLDEN.read_text())
    assert asked == list(PAIRS) or golden["jax"] == jax.__version__, "with another JAX, write all of them"
    meshes = {name: values for name, values in golden["meshes"].items() if name in PAIRS}
    for name in asked:
        print(name, flush=True)
        meshes[name] = of_train_step(**PAIRS[name])
        for kind, values in meshes[name].items():
            print(f"    {kind}: {values['count']} times, {values['bytes']:,} bytes", flush=True)
    assert all(axis in " ".join(PAIRS) for axis in MESH_AXES)
    meshes = {name: meshes[name] for name in PAIRS if name in meshes}
    GOLDEN.write_text(json.dumps({"jax": jax.__version__, "meshes": meshes}, indent=1) + "\n")
