"""Configs and command lines of every kind: a run's config or one typed error, at once, and never a traceback."""

import contextlib
import json
import os
import resource

import pytest
from fuzzing import LARGE, as_text, changed_bytes, changed_json, examples, odd_texts, odd_values, soon
from hypothesis import given
from hypothesis import strategies as st

from lmjax import cli
from lmjax.config import RunConfig, _names, from_json, ignored, load_config, to_json, validate
from lmjax.errors import ConfigError, UserError
from lmjax.train import dry_run

CODES = {0, 2, 3, 4, 5, 130, 143}  # docs/errors.md
NAMES = _names(RunConfig())
DEFAULT = json.loads(json.dumps(to_json(RunConfig())))
VALUES = odd_texts | st.integers().map(str) | st.floats().map(str) | odd_values.map(ascii) | st.sampled_from(
    [str(v) for v in (0, -1, 1, 7, 10**9, 2**31, 2**64, 1e-9)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to be in, with a little of everything; what is in it must still be all there afterwards."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "inside").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("some text, then more text")
    (folder / "text" / "b.txt").write_text("another text")
    (folder / "config.json").write_text(json.dumps(DEFAULT))
    (folder / "config.py").write_text("from lmjax.config import *\ndef get_config():\n    return RunConfig()\n")
    before, peak = os.getcwd(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.chdir(folder / "inside")
    yield folder
    os.chdir(before)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 2 << 20, f"an example took {grown} KiB"
    assert {path.name for path in folder.iterdir()} <= {"inside", "text", "config.json", "config.py", "x.json", "x.py",
                                                        "__pycache__"}


def check(path, overrides=(), plan=False):
    """What every config must come to: itself again through JSON, or a ConfigError of one line a problem."""
    with soon():
        try:
            config = load_config(path, overrides)
            validate(config, 8)
        except ConfigError as error:
            assert error.problems and all(problem.strip() for problem in error.problems)
            return None
        ignored(config)
        assert from_json(json.loads(json.dumps(to_json(config))), "again") == config
        if plan and config.data.tokenizer in ("bytes", "bpe"):
            with contextlib.suppress(UserError):
                dry_run(config, 8)
        return config


def check_overrides(place, overrides, plan=False):
    return check(place / "config.json", [f"--{key}={value}" for key, value in overrides], plan)


overrides_of_any_kind = st.lists(st.tuples(st.sampled_from(NAMES) | odd_texts, VALUES), max_size=5)
# Values of which many go together, so that plans are reached, up to sizes that nothing could hold.
SIZES = {
    "steps": "1 500 2147483647",
    "batch_size": "8 64 1073741824",
    "seq_len": "1 512 2048 1000000000",
    "accumulate": "1 2 8",
    "model.vocab_size": "0 257 268435456 1e9",
    "model.num_layers": "1 7 10000 10001 1000000000",
    "model.d_model": "64 256 262144 -8",
    "model.num_heads": "1 4 16384",
    "model.num_kv_heads": "0 1 2 16384",
    "model.head_dim": "0 2 3 16384",
    "model.d_ff": "0 1 4194304 5000000",
    "model.max_seq_len": "2048 2147483647",
    "model.windows": "() (0,) (8,0) 5 (2147483648,)",
    "model.gated": "True False",
    "model.biases": "True False",
    "model.norm": "rmsnorm layernorm batchnorm",
    "model.positions": "rope learned",
    "model.tied": "True False",
    "model.rope_theta": "1 1e308 inf 0",
    "model.rope_scaling": "{'kind':'yarn'} {'kind':'ntk'} {'kind':'linear','factor':1e308}",
    "model.post_norms": "True",
    "model.qk_norm": "True",
    "compute.layers": "scan unroll auto",
    "compute.remat": "full dots named offload",
    "mesh.data": "-1 8 1 1000000000",
    "mesh.fsdp": "1 2 8 -1",
    "mesh.tensor": "1 2 4 3",
    "optim.schedule": "wsd linear constant",
    "optim.warmup_steps": "0 1 1000",
    "optim.decay": "() ('a',) ('a{99999999999}',) ('(',)",
    "optim.clip_norm": "0 1e9",
    "objective.goldfish.strategy": "hash static random hash_table",
    "data.tokenizer": "bpe",
    "data.bpe_vocab_size": "300 9999999",
}
sizes = st.lists(st.sampled_from(sorted(SIZES)).flatmap(
    lambda key: st.tuples(st.just(key), st.sampled_from(SIZES[key].split()))), max_size=4)


class TestConfigs:
    few = 120

    def test_overrides(self, place):
        def run(overrides):
            check_overrides(place, overrides)

        examples(self.few)(given(overrides_of_any_kind)(run))()

    def test_sizes_and_their_plan(self, place):
        """Huge sizes are refused, or cheap: nothing is allocated for a plan, and nothing counts to 10^9."""
        ran = []
        examples(self.few // 3)(given(sizes)(lambda o: ran.append(check_overrides(place, o, plan=True))))()
        assert any(ran) and not all(ran)

    def test_changed_json_configs(self, place):
        def run(value):
            (place / "x.json").write_text(as_text(value), encoding="utf-8")
            check(place / "x.json")

        examples(self.few)(given(changed_json(DEFAULT))(run))()

    def test_changed_bytes_of_a_config(self, place):
        def run(data):
            (place / "x.json").write_bytes(data)
            check(place / "x.json")

        examples(self.few)(given(changed_bytes(json.dumps(DEFAULT).encode()))(run))()

    def test_python_configs_and_their_names(self, place):
        def run(name):
            with contextlib.suppress(ConfigError):
                load_config(name)
            (place / "x.py").write_text(f"def get_config(): return {ascii(name)}\n")
            with pytest.raises(ConfigError):
                load_config(place / "x.py")

        examples(self.few // 2)(given(odd_texts)(run))()


@pytest.mark.slow
class TestConfigsAtLength(TestConfigs):
    few = LARGE


def test_the_guards_catch_what_they_should(place, monkeypatch):
    """Known wrong: a check that raises something else, and one that takes the sizes at their word."""
    import lmjax.config as module

    original = module.build
    monkeypatch.setattr(module, "build", lambda value, wanted: original(value, wanted) if value != 7 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check(place / "config.json", ["--model.windows=7", "--steps=7"])
    with pytest.raises(AssertionError, match="no answer"), soon(1):
        sum(1 for _ in range(10**9))


# ---- command lines -------------------------------------------------------------------------------------------

# Flags of each command; "N", "F" and "T" stand for whole numbers, numbers and texts of every kind.
FLAGS = {
    "train": "--dry-run --devices=N --profile=N --steps=N --name=T --model.d_model=N --mesh.fsdp=N --seed=N",
    "eval": "--batches=N --step=N",
    "generate": "--prompt=T --step=N --max-new-tokens=N --stop=T --seed=N --no-stream --temperature=F --top-k=N"
                " --top-p=F --min-p=F --typical=F --repetition-penalty=F --dry=F --beams=N --draft=T"
                " --cache-dtype=T --sinks=N",
    "export": "--dtype=T --max-shard-bytes=F --step=N",
    "report": "--out=T --title=T",
    "data prepare": "--kind=T --field=T --out=out --tokenizer=T --validation-fraction=F --workers=1 --split=T"
                    " --subset=T --encoding-errors=skip --on-bad-record=skip --max-bad-records=N"
                    " --bpe-vocab-size=N",
    "data inspect": "--documents=N --characters=N --no-verify",
    "tokenizer train": "--vocab-size=N --out=t.json --force --kind=T --field=T --on-bad-record=T",
    "tokenizer show": "--text=T",
    "bench": "--smoke", "no-such": "--help", "": "--help",
}
PLACES = ["../config.json", "../config.py", "../text", "../text/a.txt", "nothing", ".", "..", "", "t.json", "out"]
# No system hands over a U+0000, and half characters only to a stderr that can write them.
typed = odd_texts.filter(lambda text: "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text))
MEANT = {"N": st.sampled_from("0 1 2 -1 300 1000000000".split()),
         "F": st.sampled_from("0 0.5 1 -1 nan inf 1e999".split()),
         "T": st.sampled_from(["bytes", "jsonl", "text", "float32", "the ", *PLACES])}


@st.composite
def arguments(draw):
    """A command, something in the place of each argument, and some of its flags."""
    command = draw(st.sampled_from(sorted(FLAGS)))
    args = command.split() + draw(st.lists(st.sampled_from(PLACES) | typed, max_size=2))
    for flag in draw(st.lists(st.sampled_from(FLAGS[command].split()), max_size=4)):
        name, equals, kind = flag.partition("=")
        value = draw(MEANT[kind] | typed if draw(st.integers(0, 3)) == 0 else MEANT[kind]) if kind in MEANT else kind
        args.append(f"{name}{equals}{value}")
    return args + draw(st.lists(typed, max_size=1)) if draw(st.integers(0, 9)) == 0 else args


def run_command(place, args, capsys):
    """main() gives a documented code, no traceback, and one line a problem; nothing appears outside this folder."""
    if args[:1] == ["train"]:
        args = [*args, "--dry-run"]  # to train is for other tests
    if args[:1] == ["bench"]:
        args = ["bench", *args[1:], "--no-such-flag"]
    outside = sorted(os.listdir(place))
    with soon():
        try:
            code = cli.main(list(args))
        except SystemExit as exit:  # argparse has said what is wrong
            code = exit.code or 0
    said = capsys.readouterr()
    assert code in CODES, (args, code)
    assert "Traceback" not in said.out + said.err, args
    assert code == 0 or said.err.strip(), f"{args}: ends with {code} and no word"
    for line in said.err.splitlines():  # argparse echoes what was typed; our own lines escape it
        assert not line.startswith("lmjax: ") or (line.isprintable() and len(line) < 3000), line
    assert sorted(os.listdir(place)) == outside, args


class TestCommands:
    few = 150

    def test_command_lines(self, place, capsys, monkeypatch):
        from lmjax.data import sources

        small = [sources.SourceFile(f"{n}.py", place / "text" / f"{n}.txt", 20) for n in "ab"]
        monkeypatch.setattr(sources, "stdlib_files", lambda: small)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        def run(args):
            run_command(place, args, capsys)

        examples(self.few)(given(arguments())(run))()


@pytest.mark.slow
class TestCommandsAtLength(TestCommands):
    few = LARGE


def test_a_command_that_fails_wrongly_is_seen(place, capsys, monkeypatch):
    def broken(args):
        raise KeyError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "report", broken)
    with pytest.raises(KeyError):
        run_command(place, ["report"], capsys)
    monkeypatch.setitem(cli.COMMANDS, "report", lambda args: 1)
    with pytest.raises(AssertionError):
        run_command(place, ["report"], capsys)
