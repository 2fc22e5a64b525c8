"""Configs: loading, overrides, types, cross-field checks, and goldens of every recipe in configs/."""

import dataclasses
import json
from pathlib import Path

import pytest

from lmjax.axes import MeshConfig
from lmjax.config import (
    DataConfig,
    DecoderConfig,
    PretrainConfig,
    RunConfig,
    SourceConfig,
    fit_vocabulary,
    from_json,
    ignored,
    load_config,
    protection,
    to_json,
    validate,
)
from lmjax.errors import ConfigError
from lmjax.losses.goldfish import GoldfishConfig
from lmjax.nn.moe import MoEConfig
from lmjax.train import dry_run

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.py"))
QUICKSTART = ROOT / "configs" / "quickstart.py"


def problems(*overrides, config=QUICKSTART, devices=8):
    with pytest.raises(ConfigError) as caught:
        validate(load_config(config, overrides), devices)
    return caught.value.problems


@pytest.mark.parametrize("key,nearest", [
    ("--stepz=1", "--steps"), ("--model.dmodel=1", "--model.d_model"), ("--d_model=1", "--model.d_model"),
    ("--optim.lr=1", "--optim."), ("--objective.goldfish.kk=3", "--objective.goldfish.k"),
    ("--data.sources[0].kind2=text", "--data.sources[0].kind"), ("--model=3", "--model.vocab_size"),
])
def test_unknown_keys_get_the_nearest_name(key, nearest):
    (problem,) = problems(key)
    assert key.split("=")[0] in problem and nearest in problem


@pytest.mark.parametrize("override,word", [
    ("--steps=8.5", "whole number"), ("--steps=abc", "whole number"), ("--steps=", "whole number"),
    ("--optim.learning_rate=fast", "number"), ("--model.tied=maybe", "true or false"),
    ("--model.windows=a,b", "expected int"), ("--steps", "--key=value"), ("--steps=None", "whole number"),
])
def test_wrong_types_are_refused(override, word):
    (problem,) = problems(override)
    assert word in problem


def test_overrides_take_effect_with_their_types():
    config = load_config(QUICKSTART, ["--steps=7", "--model.windows=(8, 0)", "--model.tied=false",
                                      "--optim.learning_rate=1", "--data.sources[0].weight=2",
                                      "--evals.prompts=def f(a, b):", "--model.rope_scaling={'kind': 'linear'}"])
    assert (config.steps, config.model.windows, config.model.tied) == (7, (8, 0), False)
    assert config.optim.learning_rate == 1.0 and type(config.optim.learning_rate) is float
    assert config.data.sources[0].weight == 2.0 and config.evals.prompts == ("def f(a, b):",)
    assert config.model.rope_scaling.kind == "linear"
    assert load_config(QUICKSTART).steps != 7, "a config is made anew each time"


def test_every_problem_is_reported_at_once():
    assert len(problems("--stepz=1", "--seed=x", "--steps=1", "--steps=2")) == 3
    found = problems("--steps=0", "--mesh.fsdp=3", "--optim.schedule=cosin", "--seq_len=99999",
                     "--model.norm=rms", "--objective.goldfish.k=1", "--name=../evil", "--log.every=0",
                     "--checkpoint.keep=0", "--optim.learning_rate=nan")
    for word in ("steps=0", "fsdp=3", "cosin", "seq_len=99999", "norm", "k=1", "../evil", "every", "keep=0",
                 "learning_rate=nan"):
        assert any(word in p for p in found), word


@pytest.mark.parametrize("overrides,word", [
    (["--batch_size=6"], "multiple of 8"), (["--batch_size=8", "--accumulate=2"], "multiple of 16"),
    (["--mesh.tensor=8"], "num_heads"), (["--mesh.data=-1", "--mesh.fsdp=-1"], "both -1"),
    (["--mesh.data=3"], "there are 8"), (["--objective.goldfish.context=5000"], "nothing is ever dropped"),
    (["--checkpoint.keep_every=7"], "multiple of"), (["--optim.warmup_steps=100000"], "warmup_steps"),
    (["--model.num_heads=5"], "does not divide d_model"), (["--model.num_kv_heads=4"], "num_kv_heads"),
    (["--mesh.fsdp=0"], "at least 1"), (["--run_root=gs://bucket/x"], "run_root"),
    (["--evals.sample.max_new_tokens=512"], "max_new_tokens"), (["--optim.eps=0"], "eps=0"),
    (["--data.validation_fraction=0"], "evals.every=0"), (["--data.validation_fraction=2"], "validation_fraction"),
])
def test_cross_field_checks(overrides, word):
    assert any(word in p for p in problems(*overrides)), problems(*overrides)


def test_wrong_types_in_a_python_config(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("from lmjax.config import *\ndef get_config():\n"
                    "    return RunConfig(steps='many', optim=OptimConfig(learning_rate=1, clip_norm=None))\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(caught.value.problems) == 2 and "steps='many'" in caught.value.problems[0]


@pytest.mark.parametrize("text,word", [("x = 1", "get_config"), ("def get_config(): return 3", "not a RunConfig"),
                                       ("def get_config(:", "SyntaxError"),
                                       ("from lmjax.config import *\ndef get_config(): return RunConfig(stepz=1)",
                                        "stepz")])
def test_files_that_are_no_config(tmp_path, text, word):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError, match=word):
        load_config(tmp_path / "c.py")


def test_missing_file_names_a_near_one():
    with pytest.raises(ConfigError, match="quickstart.py"):
        load_config(ROOT / "configs" / "quickstat.py")


def test_settings_without_effect_are_told():
    assert not ignored(load_config(QUICKSTART))
    odd = load_config(QUICKSTART, ["--objective.goldfish.strategy=static", "--objective.goldfish.context=5",
                                   "--model.windows=(4,)", "--model.rope_scaling={'kind': 'linear'}",
                                   "--optim.decay_fraction=0.5", "--evals.every=0"])
    for word in ("context=5", "rope_scaling", "decay_fraction", "prompts"):
        assert any(word in text for text in ignored(odd)), word
    assert ignored(load_config(QUICKSTART, ["--model.windows=(1,2,3,4,5,6)"]))


def test_equal_supervised_makes_a_run_longer():
    more = ["--objective.goldfish.equal_supervised=true", "--steps=900"]
    config = load_config(QUICKSTART, more)
    assert (config.steps, config.total_steps) == (900, 1200)
    assert "900 steps made 1,200" in dry_run(config, 1) and "about 921.6k of 1.2M targets" in dry_run(config, 1)
    assert load_config(QUICKSTART, [*more, "--objective.goldfish.strategy=none"]).total_steps == 900
    assert ignored(load_config(QUICKSTART, [*more, "--objective.goldfish.strategy=none"]))
    sources = (SourceConfig(weight=3.0), SourceConfig(weight=1.0, goldfish=False))
    mixed = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    assert mixed.protected_share == 0.75 and mixed.total_steps == 1108  # 900 / (1 - 3/16)
    assert protection(mixed).sources == (True, False) and protection(config) is None
    assert protection(load_config(QUICKSTART, ["--objective.goldfish.strategy=text_hash"])).text
    spared = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources[1:]))
    assert any("no source has goldfish=True" in line for line in ignored(spared))
    late = load_config(QUICKSTART, ["--objective.goldfish.start=9999"])
    assert any("nothing is ever" in line for line in ignored(late))


@pytest.mark.parametrize("fields, parts", [
    ({}, 2), ({"batch_size": 16}, 4), ({"batch_size": 7}, 1), ({"batch_size": 6, "seq_len": 1024}, 3),
    ({"batch_size": 2, "seq_len": 8192}, 2), ({"batch_size": 4, "seq_len": 64}, 1), ({"accumulate": 8}, 8),
    ({"objective": PretrainConfig(GoldfishConfig("random"))}, 1), ({"model": DecoderConfig(moe=MoEConfig())}, 1)])
def test_micro_batches_of_a_cpu(fields, parts):
    """Of at least 2,048 tokens where the rows allow, and only where they add up to the batch."""
    config = RunConfig(**fields)
    assert config.micro_batches(1, "cpu")[0] == parts
    assert config.micro_batches(2, "cpu")[0] == config.micro_batches(1, "tpu")[0] == (config.accumulate or 1)


def test_json_round_trip():
    config = load_config(QUICKSTART, ["--model.rope_scaling={'kind': 'linear'}", "--mesh.fsdp=2"])
    assert from_json(json.loads(json.dumps(to_json(config))), "here") == config
    with pytest.raises(ConfigError, match="here.*no field nosuch"):
        from_json({"nosuch": 1}, "here")


@pytest.mark.parametrize("value,words", [
    ({"data": {"sources": {}}}, "data.sources={}: expected a tuple"), ({"model": 3}, "model=3: expected DecoderConfig"),
    ({"model": {"rope_scaling": []}}, "model.rope_scaling"), ({"optim": {"eps": 10**400}}, "optim.eps.*63 bits"),
    ({"name": "a\0"}, "name.*U.0000"), ({"name": "\ud800"}, "name.*U.D800"),
    ({"model": {"windows": [0, "a"]}}, r"\[1\]")])
def test_plain_values_of_the_wrong_kind(value, words):
    with pytest.raises(ConfigError, match=words):
        from_json(value, "here")


def test_vocabulary_fits_the_tokenizer():
    assert fit_vocabulary(RunConfig(), "bytes", 257).model.vocab_size == 320
    given = dataclasses.replace(RunConfig(), model=dataclasses.replace(RunConfig().model, vocab_size=300))
    assert fit_vocabulary(given, "bytes", 257).model.vocab_size == 300
    with pytest.raises(ConfigError, match="vocab_size=300.*512"):
        fit_vocabulary(given, "mine", 512)


def test_sections_stay_small():
    """A config that needs more than 26 fields wants another section or another file."""
    def walk(cls):
        assert len(dataclasses.fields(cls)) <= 26, cls
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.type):
                walk(field.type)
    walk(RunConfig)


def test_mesh_sizes():
    assert MeshConfig(-1, 2, 2).sizes(8) == (1, 1, 2, 2, 1, 1, 2)
    assert MeshConfig(2, -1, 1).sizes(6) == (1, 1, 2, 3, 1, 1, 1)
    assert MeshConfig(1, 1, 1).problems(8) and not MeshConfig().problems(8)


@pytest.mark.parametrize("path", [p for p in RECIPES if "path/to/shards" in p.read_text()], ids=lambda p: p.stem)
def test_recipes_say_that_their_data_is_to_be_named(path):
    with pytest.raises(ConfigError) as caught:
        dry_run(load_config(path), 256)
    assert any("data.sources[0].path = 'path/to/shards': no such file" in text for text in caught.value.problems)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_golden_configs(path):
    """The resolved config, mesh, every parameter's shape and sharding on 8 devices, as text in git.

    If a change is meant: `python tests/test_config.py` writes the goldens anew; read the diff.
    """
    golden = ROOT / "tests" / "goldens" / f"{path.stem}.txt"
    assert golden.read_text() == golden_text(path), f"{golden} differs; see this test's docstring"


def golden_text(path: Path) -> str:
    context = min(load_config(path).mesh.context, 2)
    config = load_config(path, ["--mesh.fsdp=4", f"--mesh.context={context}", "--batch_size=64", "--accumulate=1"])
    if config.data.sources[0].kind != "shards":
        return dry_run(config, 8) + "\n"
    # Its shards are named by whoever runs the recipe; a dry run looks for them.
    return f"{config.data}\n{dry_run(dataclasses.replace(config, data=DataConfig()), 8)}\n"


if __name__ == "__main__":
    for recipe in RECIPES:
        (ROOT / "tests" / "goldens").mkdir(exist_ok=True)
        (ROOT / "tests" / "goldens" / f"{recipe.stem}.txt").write_text(golden_text(recipe))
