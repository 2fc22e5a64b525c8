"""Plans for GPUs that are not there: what XLA is told of them, and, with JAX's CUDA plug-in, a step for eight."""

import dataclasses
import importlib.util
import re

import pytest

from lmjax.config import ComputeConfig, DecoderConfig, MeshConfig, RunConfig
from lmjax.plan import aot, gpus
from lmjax.plan.machine import CHIPS, parse_machine
from lmjax.plan.make import compilable, make
from lmjax.plan.page import page


def test_a_gpu_is_told_as_the_roofline_knows_it():
    names = [name for name, chip in CHIPS.items() if chip.kind == "gpu"]
    assert set(names) == set(gpus._GPUS)
    for name in names:
        text = gpus.target(parse_machine(f"{name}:8"))
        told = {key: float(value) for key, value in re.findall(r"(\w+): ([\d.]+)", text)}
        assert told["device_memory_size"] == CHIPS[name].hbm and told["memory_bandwidth"] == CHIPS[name].hbm_rate
        # Tensor cores do 16 times the bfloat16 multiply-adds of the float32 units.
        rate = told["core_count"] * told["fpus_per_core"] * 2 * told["clock_rate_ghz"] * 1e9
        assert 16 * rate == pytest.approx(CHIPS[name].peak, rel=0.1)
        assert text.count("{") == text.count("}")
    assert [gpus.topology(parse_machine(f"h100:{n}")) for n in (1, 4, 8, 32)] == ["1x1x1", "1x1x4", "1x1x8", "1x4x8"]


def test_without_the_plugin_the_plan_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "cuda" in name else find(name))
    assert "pip install jax-cuda13-plugin" in aot.missing(parse_machine("h100:8"))
    assert "pip install jax-cuda13-plugin" in page(make(_config(), parse_machine("h100:8")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not aot.missing(parse_machine("h200:8"))


def test_cudnn_is_not_asked_of_a_compiler_that_has_none():
    config = dataclasses.replace(_config(), compute=ComputeConfig("bfloat16", attention="cudnn"))
    assert compilable(config).compute.attention == "blockwise" and config.compute.attention == "cudnn"
    assert compilable(_config()) is not config and compilable(_config()) == _config()


def _config() -> RunConfig:
    return RunConfig(batch_size=16, seq_len=256, compute=ComputeConfig("bfloat16", layers="scan"),
                     mesh=MeshConfig(1, 8), model=DecoderConfig(vocab_size=512, num_layers=3, d_model=128, num_heads=4))


@pytest.mark.slow
def test_a_step_is_compiled_for_eight_h100():
    if why := aot.missing(parse_machine("h100:8")):
        pytest.skip(why)
    planned = make(_config(), parse_machine("h100:8"))
    state = planned.params + planned.moments
    assert state <= planned.compiled.argument < 1.05 * state + 2**20 and planned.fits and planned.second is None
    found = {m.kind for m in planned.compiled.program.collectives}
    assert {m.axis for m in planned.compiled.program.collectives} == {"fsdp"}
    assert "all-gather" in found and found & {"reduce-scatter", "all-reduce"}
    assert "as compiled" in page(planned)
