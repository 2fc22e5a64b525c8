"""Plans of pipelines: work and messages by hand, against the collectives of compiled train steps, and whole plans."""

import dataclasses
import json
from pathlib import Path

import pytest

from lmjax.axes import MeshConfig
from lmjax.config import ComputeConfig, RunConfig, load_config, preset
from lmjax.errors import ConfigError
from lmjax.models import DecoderConfig, MoEConfig
from lmjax.nn.pipeline import Schedule
from lmjax.plan import aot, search
from lmjax.plan.machine import parse_machine
from lmjax.plan.make import make, split_of
from lmjax.plan.page import page, to_json
from lmjax.plan.roofline import Message, step_times
from lmjax.plan.work import Split, activation_bytes, analytic

ROOT = Path(__file__).resolve().parent.parent
BIG = ROOT / "configs" / "llama3_70b_v5p512.py"
SMALL = preset("llama2-7b", num_layers=4, d_model=256, num_heads=2, num_kv_heads=1, head_dim=128, d_ff=512,
               vocab_size=1000)
BLOCK, HEAD, KEYS = 256 * 128 * (2 + 1 + 1 + 2) + 3 * 256 * 512, 256 * 1000, (64 + 1) / 2


# ---- by hand ---------------------------------------------------------------------------------------------


def test_work_by_hand():
    """Two stages of two layers, four micro-batches, so five ticks; on two devices each."""
    tokens, split = 16 * 64 / 4, Split(1, 2, pipeline=2)
    assert split.size == 4 and Split(2, 2, pipeline=2, replica=3).size == 24
    for remat, products, scores in (("full", 8, 22), ("none", 6, 18)):
        work = analytic(SMALL, split, 16, 64, remat, schedule=Schedule(2, 1, 4))
        assert work.model_flops == tokens * (6 * (4 * BLOCK + HEAD) + 4 * 12 * 256 * KEYS)
        assert work.flops == tokens * (5 / 4 * 4 * (products * BLOCK + scores * 256 * KEYS) + 6 * HEAD)
        assert work.model_flops == analytic(SMALL, Split(1, 4), 16, 64, remat).model_flops
    # Twice as many micro-batches: nine ticks of half the rows, and what each of them reads is read more often.
    often = analytic(SMALL, split, 16, 64, "none", schedule=Schedule(2, 1, 8))
    weights = 2 * (9 - 5) * (2 * (2 + 2 + 3) * BLOCK + 2 * 4 * BLOCK / 2)
    rows = tokens * 4 * (9 / 8 - 5 / 4) * 2 * 3 * (6 * 256 + 2 * 256 + 2 * 128 + 3 * 512)
    assert often.hbm - work.hbm == pytest.approx(weights + rows, rel=1e-9)
    twice = analytic(SMALL, split, 16, 64, "none", schedule=Schedule(2, 2, 4))
    assert twice.flops == often.flops


def test_messages_by_hand():
    split, schedule = Split(2, 2, 2, pipeline=2), Schedule(2, 2, 4)
    x = 2 * 16 * 64 * 256 / 4  # bytes of a copy's activations, of rows that data and fsdp split
    found = {(m.kind, m.axis, m.bytes, m.count): m for m in analytic(
        SMALL, split, 16, 64, "none", schedule=schedule).messages}

    def expect(kind, axis, size, group, stride, count):
        assert found.pop((kind, axis, size, count)) == Message(kind, axis, size, group, stride, count)
    runs = 9  # of a layer on a device: chunks of one, in nine ticks
    expect("all-gather", "fsdp (blocks)", 2 * BLOCK / 2, 2, 2, 2 * runs)
    expect("reduce-scatter", "fsdp (blocks)", 2 * BLOCK / 2, 2, 2, runs)
    expect("all-gather", "fsdp (vocabulary)", 2 * 2 * HEAD / 2, 2, 2, 2)
    expect("reduce-scatter", "fsdp (vocabulary)", 2 * 2 * HEAD / 2, 2, 2, 1)
    expect("all-reduce", "data (gradients)", 2 * BLOCK / 4, 2, 4, runs)  # in every tick, in bfloat16
    expect("all-reduce", "data (gradients)", 4 * 2 * HEAD / 4, 2, 4, 1)
    expect("all-reduce", "tensor (activations)", x / 4, 2, 1, 4 * runs)
    expect("collective-permute", "pipeline (activations)", x / 4, 2, 8, 2 * 9)
    for kind in ("reduce-scatter", "all-gather", "all-reduce"):
        expect(kind, "pipeline (ends)", x, 2, 8, 1)
    expect("all-reduce", "pipeline (gradients)", 4 * HEAD / 4, 2, 8, 1)
    for each in (2, 4):  # weights one way, float32 gradients the other
        expect("all-to-all", "pipeline (chunks)", each * 2 * BLOCK / 4, 2, 8, 1)
    assert not found
    # Of copies in two slices, stages lie between.
    (apart,) = (m for m in analytic(SMALL, Split(1, 2, pipeline=2, replica=2), 16, 64, "none",
                                    schedule=Schedule(2, 1, 4)).messages if m.axis[:4] == "data" and m.count > 1)
    assert apart.group * apart.stride == 8
    halves = [m for m in analytic(SMALL, split, 32, 64, "none", 2, schedule=schedule).messages if "activ" in m.axis]
    assert [(m.bytes, m.count) for m in halves] == [(x / 2, 4 * runs), (x / 4, 4 * 9)]  # tensor's are not cut so


def test_the_bubble_takes_time():
    """Where products are all that counts, the step is longer by the bubble, and no more."""
    model, machine = dataclasses.replace(SMALL, num_layers=64), parse_machine("v5p:4x4x4")
    quick = [step_times(dataclasses.replace(analytic(model, split, 4096, 64, schedule=schedule), messages=()), machine)
             for split, schedule in ((Split(1, 64), Schedule(1, 1, 1)), (Split(1, 16, pipeline=4), Schedule(4, 1, 8)))]
    head = 6 * HEAD * 4096 * 64 / 64 / machine.chip.peak
    assert (quick[1].compute - head) / (quick[0].compute - head) == pytest.approx(11 / 8)
    kept = [activation_bytes(model, split, 4096, 64, "full", schedule=schedule) for split, schedule in (
        (Split(1, 64), Schedule(1, 1, 1)), (Split(1, 16, pipeline=4), Schedule(4, 1, 8)))]
    full = 64 * 2 * 4096 * 64 / 64 * 256  # inputs of all blocks, bfloat16
    assert kept[0] > full and kept[1] > 11 / 8 * full + 2 * full / 64 * 4


# ---- against compiled programs ---------------------------------------------------------------------------

GOLDEN = DecoderConfig(vocab_size=64, num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, max_seq_len=64)
MESHES = {  # of tests/test_collectives.py
    "pipeline": (Split(pipeline=4), Schedule(4, 1, 16)), "pipeline repeats": (Split(pipeline=2), Schedule(2, 2, 4)),
    "pipeline data": (Split(2, pipeline=4), Schedule(4, 1, 8)),
    "pipeline fsdp": (Split(1, 2, pipeline=4), Schedule(4, 1, 8)),
}


def planned_bytes(split: Split, schedule: Schedule, kind: str, *axes: str) -> float:
    """CPUs compute the golden in float32, and have no reduce-scatter of what the compiler adds up."""
    total = 0.0
    for m in analytic(GOLDEN, split, 16, 64, "none", schedule=schedule).messages:
        if m.kind.replace("reduce-scatter", "all-reduce") == kind and m.axis in axes:
            weights = "gradients" in m.axis and m.count == 1  # in float32 anyway; of chunks, one of two is
            total += m.bytes * m.count * (1 if weights else 4 / 3 if "chunks" in m.axis else 2)
    return total


@pytest.mark.parametrize("name", MESHES)
def test_messages_are_those_of_the_golden(name):
    """tests/goldens/collectives.json: 16 rows of 64 tokens, four layers, tied."""
    golden = json.loads((ROOT / "tests" / "goldens" / "collectives.json").read_text())["meshes"][name]
    split, schedule = MESHES[name]

    def found(kind, axis):
        return golden[f"{kind} over {axis}"]["bytes"]

    def planned(kind, *axes):
        return planned_bytes(split, schedule, kind, *axes)
    assert planned("collective-permute", "pipeline (activations)") == found("collective-permute", "pipeline")
    # Where fsdp splits the embedding, the compiler looks tokens up on 1/p of the rows, and gathers what was found.
    gathered = planned("all-gather", "pipeline (ends)") * (2 if name == "pipeline fsdp" else 1)
    assert gathered == pytest.approx(found("all-gather", "pipeline"), rel=0.02)
    ends = ("pipeline (ends)",) if name == "pipeline data" else ("pipeline (ends)", "pipeline (gradients)")
    assert planned("all-reduce", *ends) == pytest.approx(found("all-reduce", "pipeline"), rel=0.01)
    if name == "pipeline repeats":
        assert planned("all-to-all", "pipeline (chunks)") == found("all-to-all", "pipeline")
    if name == "pipeline data":  # 11 ticks; scales of norms are not counted
        assert planned("all-reduce", "data (gradients)") == pytest.approx(found("all-reduce", "data"), rel=0.01)
        assert 4 * 9216 < found("all-reduce", "data") / 10  # the known-wrong variant: once a step
    if name == "pipeline fsdp":
        assert planned("all-reduce", "fsdp (blocks)") == pytest.approx(found("all-reduce", "fsdp"), rel=0.02)


def test_tokens_of_experts_are_sent_in_each_tick():
    """The same golden, with experts: five ticks of two layers, so ten runs of a layer."""
    golden = json.loads((ROOT / "tests" / "goldens" / "collectives.json").read_text())["meshes"]["pipeline expert"]
    model, schedule = dataclasses.replace(GOLDEN, moe=MoEConfig(8, 2, 16)), Schedule(2, 1, 4)
    messages = [m for m in analytic(model, Split(pipeline=2, expert=4), 16, 64, "none", schedule=schedule).messages
                if m.axis in ("expert (tokens)", "expert (blocks)")]
    group, head = 4 * 64, 4 * 64 * 32  # tokens of a tick on the four devices that share experts; bytes of the head
    numbers = {kind: sum(m.bytes * m.count for m in messages if m.kind == kind and "tokens" in m.axis)
               for kind in ("all-gather", "reduce-scatter")}
    assert {m.count for m in messages if "tokens" in m.axis} == {10}
    # In float32 twice, but for choices and shares, which are of four bytes anyway.
    scattered, gathered = (2 * numbers[kind] - 10 * group * 2 * four for kind, four in (
        ("reduce-scatter", 4), ("all-gather", 8)))
    assert scattered + head == golden["reduce-scatter over expert"]["bytes"]
    weights = sum(2 * m.bytes * m.count for m in messages if m.axis == "expert (blocks)" and m.kind == "all-gather")
    assert gathered + weights == pytest.approx(golden["all-gather over expert"]["bytes"], rel=0.02)


@pytest.mark.slow
def test_messages_are_those_of_a_tpus_program():
    """Two layers a stage, four stages, 16 micro-batches: what crosses the network in each of 19 ticks."""
    machine = parse_machine("v5p:2x2x4")
    if why := aot.missing(machine):
        pytest.skip(why)
    config = RunConfig(batch_size=64, seq_len=1024, mesh=MeshConfig(2, 2, pipeline=4),
                       compute=ComputeConfig("bfloat16", "full", layers="scan"),
                       model=DecoderConfig(vocab_size=8192, num_layers=8, d_model=1024, num_heads=8, d_ff=2816,
                                           tied=False))
    planned = make(config, machine)
    found: dict[tuple, float] = {}
    for m in planned.compiled.program.collectives:
        found[m.kind, m.axis] = found.get((m.kind, m.axis), 0.0) + m.bytes * m.count

    def bytes_of(kind, axis):
        return sum(m.bytes * m.count for m in planned.work.messages if m.kind == kind and m.axis == axis)
    assert found["collective-permute", "pipeline"] == pytest.approx(
        bytes_of("collective-permute", "pipeline (activations)"), rel=0.01)
    gathered = bytes_of("all-gather", "fsdp (blocks)")
    assert gathered < found["all-gather", "fsdp"] < 1.15 * gathered  # some twice in the backward pass
    assert found["all-reduce", "data"] == pytest.approx(38 * 12_845_056, rel=0.01)
    # Added up in each tick, by all-reduces; those that the compiler joins have one channel, and may be read as one.
    scattered = bytes_of("reduce-scatter", "fsdp (blocks)")
    assert 0.8 * scattered < found["all-reduce", "fsdp"] < 1.1 * scattered
    assert "as compiled" in page(planned) and planned.compiled.argument > planned.params + planned.moments


# ---- plans -----------------------------------------------------------------------------------------------


def with_stages(**sizes) -> RunConfig:
    return dataclasses.replace(load_config(BIG), mesh=MeshConfig(**({"data": 1} | sizes)))


def test_a_pipeline_is_planned():
    machine = parse_machine("v5p:4x8x8")
    plain, planned = (make(config, machine, compiles=False) for config in (
        load_config(BIG), with_stages(fsdp=64, pipeline=4)))
    assert planned.mesh["pipeline"] == 4 and split_of(planned.config, 256) == Split(1, 64, pipeline=4)
    vocabulary = 4 * 2 * 128256 * 8192 / 256  # of float32; all stages have it
    assert planned.params == pytest.approx(plain.params + 3 * vocabulary, rel=0.01)
    assert planned.work.model_flops == plain.work.model_flops
    assert planned.work.flops == pytest.approx(plain.work.flops * 11 / 8, rel=0.02)
    text = page(planned)
    assert "4 stages of 20 layers; 8 micro-batches" in text and "bubble 27.3%" in text and "in the bubble" in text
    assert "pipeline (activations)" in text and "bubble" not in page(plain)
    assert to_json(planned)["pipeline"] == {"stages": 4, "repeats": 1, "micro": 8, "bubble": 3 / 11}
    assert to_json(plain)["pipeline"] is None
    with pytest.raises(ConfigError, match=r"mesh.pipeline=3"):
        make(with_stages(fsdp=-1, pipeline=3), parse_machine("h100:24"), compiles=False)


def test_search_keeps_the_stages():
    config = load_config(ROOT / "configs" / "llama32_1b_v5e16.py")
    config = dataclasses.replace(config, mesh=MeshConfig(1, -1, pipeline=4))
    found = list(search.candidates(config, parse_machine("v5e:4x4")))
    assert {c.mesh.pipeline for c in found} == {4} and {c.mesh.fsdp for c in found} == {1, 2, 4}
    trial = search.Trial(make(found[0], parse_machine("v5e:4x4"), compiles=False), 0.0)
    assert trial.settings.startswith("pipeline=4 data=4, 1 rows a device")
    with pytest.raises(ConfigError, match=r"--search: mesh.pipeline=-1"):
        search.search(dataclasses.replace(config, mesh=MeshConfig(1, 4, pipeline=-1)), parse_machine("v5e:4x4"),
                      minutes=1, compiles=False, say=lambda _: None)
