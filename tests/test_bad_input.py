"""Every row of docs/errors.md: bad input gives one line that names what, where and the fix, and loses nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, state_hash, write_config

from lmjax.cli import main
from lmjax.data import load_manifest, load_tokenizer

QUICK = ("--mesh.data=8", "--optim.warmup_steps=1", "--checkpoint.every=2", "--evals.every=0")
FAST = (*QUICK, "--steps=4")


def snapshot(folder: Path) -> dict:
    """Every file below a folder, the lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and p.name != "run.lock"} if folder.exists() else {}


def fails(capsys, args, code, *words):
    """The command ends with `code` and one line on stderr that has all the words."""
    assert main([str(a) for a in args]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lmjax: ")]
    assert len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", str(write_config(folder)), *FAST]) == 0
    return folder


# ---- text --------------------------------------------------------------------------------------------


def test_no_document_at_all(config, capsys):
    text = config.parent / "text"
    shutil.rmtree(text)
    text.mkdir()
    fails(capsys, ["train", config, *FAST], 3, text)
    (text / "empty.txt").write_text("")
    fails(capsys, ["train", config, *FAST], 3, text)


def test_a_missing_corpus_is_known_from_the_config(config, capsys):
    shutil.rmtree(config.parent / "text")
    fails(capsys, ["train", config, *FAST], 2, "data.sources[0].path")


def test_zero_length_documents_are_left_out_and_counted(config, capsys):
    (config.parent / "text" / "nothing.txt").write_text("")
    assert main(["train", str(config), *FAST]) == 0
    (folder,) = (p for p in (config.parent / "data").iterdir() if (p / "manifest.json").exists())
    assert sum(s["documents"] for s in json.loads((folder / "manifest.json").read_text())["splits"].values()) == 40


def test_bytes_that_are_not_utf8(config, capsys):
    (config.parent / "text" / "000.txt").write_bytes(b"good, then \xff bad")
    fails(capsys, ["train", config, *FAST], 3, "000.txt", "11", "encoding_errors")
    assert main(["train", str(config), *FAST, "--data.sources[0].encoding_errors=skip"]) == 0


def test_bad_lines_are_refused_or_left_out_within_a_budget(config, capsys):
    text = config.parent / "text"
    lines = [json.dumps({"text": file.read_text()}) for file in sorted(text.glob("*.txt"))]
    (config.parent / "x.jsonl").write_text("\n".join([*lines[:9], "{torn", '{"other": 1}', *lines[9:]]))
    config.write_text(config.read_text().replace('SourceConfig("text", ', 'SourceConfig("jsonl", ').replace(
        str(text), str(config.parent / "x.jsonl")))
    fails(capsys, ["train", config, *FAST], 3, "x.jsonl:10", "not valid JSON", "on_bad_record")
    skip = "--data.sources[0].on_bad_record=skip"
    fails(capsys, ["train", config, *FAST, skip, "--data.sources[0].max_bad_records=1"], 3, "x.jsonl:10", "x.jsonl:11",
          "max_bad_records = 1")
    assert main(["train", str(config), *FAST, skip]) == 0
    assert load_manifest(prepared(config)).skipped == {"malformed": 1, "no_field": 1}


# ---- shards and tokenizers -----------------------------------------------------------------------------


def prepared(config: Path) -> Path:
    return next(p for p in (config.parent / "data").iterdir() if (p / "manifest.json").exists())


def test_truncated_shard(config, capsys):
    assert main(["train", str(config), *FAST]) == 0
    folder = prepared(config)
    run = snapshot(config.parent / "runs")
    shard = next(folder.glob("train-*.tokens.npy"))
    shard.write_bytes(shard.read_bytes()[:-7])
    text = config.read_text().replace("SourceConfig(\"text\", ", "SourceConfig(\"shards\", ").replace(
        str(config.parent / "text"), str(folder))
    config.write_text(text)
    fails(capsys, ["train", config, *FAST], 3, shard.name)
    assert snapshot(config.parent / "runs") == run


def test_changed_shard(config, capsys):
    """The size is right and one bit is not: told by hash, before anything is compiled."""
    assert main(["data", "prepare", str(config.parent / "text"), "--out", str(config.parent / "shards"),
                 "--validation-fraction", "0.2"]) == 0
    config.write_text(config.read_text().replace('SourceConfig("text", ', 'SourceConfig("shards", ').replace(
        str(config.parent / "text"), str(config.parent / "shards")))
    (shard,) = (config.parent / "shards").glob("train-*.tokens.npy")
    data = bytearray(shard.read_bytes())
    data[-4] ^= 1
    shard.write_bytes(data)
    fails(capsys, ["train", config, *FAST], 3, shard.name, "sha256", "lmjax data prepare")
    assert not list((config.parent / "runs").rglob("checkpoints/*"))
    assert main(["train", str(config), *FAST, "--data.verify=sizes"]) == 0, "what is not looked at is not seen"


def test_shard_cut_short_during_the_run(config, capsys, monkeypatch):
    from lmjax.data import Batches

    original = Batches.batch

    def cutting(self, step, *args, **kwargs):
        if step == 2:
            with next(prepared(config).glob("train-*.tokens.npy")).open("r+b") as shard:
                shard.truncate(200)
        return original(self, step, *args, **kwargs)

    monkeypatch.setattr(Batches, "batch", cutting)
    fails(capsys, ["train", config, *FAST], 3, "train-00000.tokens.npy", "whole when the run began")
    assert (config.parent / "runs" / "tiny" / "checkpoints" / "2").is_dir(), "what was saved before is still there"


def test_manifest_that_names_files_elsewhere(config, capsys):
    assert main(["train", str(config), *FAST]) == 0
    path = prepared(config) / "manifest.json"
    path.write_text(path.read_text().replace('"train-00000.tokens.npy"', '"../../train-00000.tokens.npy"'))
    fails(capsys, ["train", config, *FAST], 3, path, "no name of a shard")


def test_token_id_beyond_the_vocabulary(config, capsys):
    assert main(["data", "prepare", str(config.parent / "text"),
                 "--out", str(config.parent / "shards"), "--validation-fraction", "0.2"]) == 0
    folder = config.parent / "shards"
    for shard in folder.glob("*.tokens.npy"):
        tokens = np.load(shard)
        tokens[10::50] = 999
        np.save(shard, tokens)
    config.write_text(config.read_text().replace('SourceConfig("text", ', 'SourceConfig("shards", ').replace(
        str(config.parent / "text"), str(folder)))
    fails(capsys, ["train", config, *FAST, "--data.verify=sizes"], 3, "999", "tokens.npy")


def test_tokenizer_of_another_size(config, capsys):
    fails(capsys, ["train", config, *FAST, "--model.vocab_size=200"], 2, "model.vocab_size=200", "257", "bytes")


def test_shards_of_another_tokenizer(config, capsys):
    assert main(["tokenizer", "train", str(config.parent / "text"),
                 "--vocab-size", "300", "--out", str(config.parent / "t.json")]) == 0
    assert load_tokenizer(str(config.parent / "t.json")).vocab_size <= 300
    assert main(["data", "prepare", str(config.parent / "text"),
                 "--out", str(config.parent / "shards"), "--validation-fraction", "0.2",
                 "--tokenizer", str(config.parent / "t.json")]) == 0
    assert load_manifest(config.parent / "shards").tokenizer["vocab_size"] <= 300
    config.write_text(config.read_text().replace('SourceConfig("text", ', 'SourceConfig("shards", ').replace(
        str(config.parent / "text"), str(config.parent / "shards")))
    fails(capsys, ["train", config, *FAST], 3, "tokenizer", "bytes")


# ---- batches and rows ------------------------------------------------------------------------------------


def test_batch_with_all_weights_zero(config, capsys):
    """Documents of no token at all but their ends: with k = 2 and a context of 1 some batch loses everything."""
    import lmjax.train.loop as train_module

    original = train_module.Batches.batch

    def silent(self, step, rows=None):
        batch = original(self, step, rows)
        return batch | {"weights": np.zeros_like(batch["weights"])} if step == 2 else batch

    train_module.Batches.batch = silent
    try:
        fails(capsys, ["train", config, *FAST], 3, "step 3", "weight 0")
    finally:
        train_module.Batches.batch = original
    steps = [int(p.name) for p in (config.parent / "runs" / "tiny" / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps == [2], "what was saved before is still there"


def test_sequence_longer_than_positions(config, capsys):
    fails(capsys, ["train", config, *FAST, "--seq_len=128"], 2, "seq_len=128", "model.max_seq_len=64")
    assert not (config.parent / "runs").exists(), "refused before anything is written"


# ---- disks and folders -----------------------------------------------------------------------------------


def test_full_disk(trained, tmp_path):
    """No file may grow beyond 30 kB, which is what a full disk looks like to the checkpoint writer."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    before = state_hash(tmp_path / "runs" / "tiny", 4)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    small = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
             "from lmjax.cli import main; sys.exit(main())")
    done = subprocess.run(
        [sys.executable, "-c", small, "train", str(trained / "tiny.py"), *QUICK, "--steps=6",
         f"--run_root={tmp_path / 'runs'}"], env=env, capture_output=True, text=True, timeout=240)
    print(done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("lmjax: ")]
    assert done.returncode == 4 and len(errors) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "could not be written" in errors[0] and "step 4 and older ones are intact" in errors[0]
    assert state_hash(tmp_path / "runs" / "tiny", 4) == before


def test_foreign_run_folder(config, capsys):
    run = config.parent / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("mine")
    fails(capsys, ["train", config, *FAST], 4, run, "not a run of lmjax")
    assert snapshot(run) == {"thesis.txt": b"mine"}


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that even root cannot write")
def test_folder_that_cannot_be_written(config, capsys):
    fails(capsys, ["train", config, *FAST, "--run_root=/proc"], 4, "/proc/tiny", "cannot be written")


def test_checkpoint_of_another_model(trained, tmp_path, capsys):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    before = snapshot(tmp_path / "runs")
    fails(capsys, ["train", trained / "tiny.py", *FAST, f"--run_root={tmp_path / 'runs'}", "--model.d_ff=64"],
          4, "model.d_ff: the checkpoint has 0, this run has 64", "--name")
    assert snapshot(tmp_path / "runs") == before


def test_two_trainers_in_one_folder(trained, capsys):
    import fcntl

    with open(trained / "runs" / "tiny" / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(capsys, ["train", trained / "tiny.py", *FAST], 4, "another process is training")


@pytest.mark.parametrize("command", [["eval"], ["generate"], ["report"]])
def test_missing_run(command, tmp_path, capsys):
    code = main([*command, str(tmp_path / "nothing")])
    lines = capsys.readouterr().err.splitlines()
    assert code in (2, 4) and len(lines) == 1 and "nothing" in lines[0]


def test_run_without_checkpoints(trained, tmp_path, capsys):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoints")
    (tmp_path / "runs" / "tiny" / "checkpoints").mkdir()
    fails(capsys, ["generate", tmp_path / "runs" / "tiny", "--prompt", "the"], 4, "no complete checkpoint")
    fails(capsys, ["generate", trained / "runs" / "tiny", "--step", "3"], 4, "no checkpoint of step 3")


def test_generate_refuses_what_it_cannot_do(trained, capsys):
    run = trained / "runs" / "tiny"
    for args, word in ((["--min-p", "2"], "generate.min_p=2.0"), (["--dry", "-1"], "generate.dry_multiplier=-1.0"),
                       (["--stop", ""], "--stop ''"), (["--beams", "2"], "--temperature 0"),
                       (["--cache-dtype", "int4"], "cache.dtype='int4'"), (["--draft", "x", "--stream"], "--stream"),
                       (["--repetition-penalty", "0"], "generate.repetition_penalty=0.0")):
        fails(capsys, ["generate", run, *args], 2, word)
    fails(capsys, ["generate", run, "--prompt", "the " * 20], 3, "prompt 0", "max_seq_len is 64")


def test_generate_in_every_way(trained, capsys):
    """On a real run: greedy gives the same text streamed or whole, alone or with a draft."""
    run = str(trained / "runs" / "tiny")
    texts = []
    for args in (["--no-stream"], ["--stream"], ["--draft", run], ["--cache-dtype", "float32"]):
        assert main(["generate", run, "--prompt", "the", "--max-new-tokens", "8", "--temperature", "0", *args]) == 0
        texts.append([line for line in capsys.readouterr().out.splitlines() if "proposed" not in line])
    assert texts[0][1].startswith("the") and all(text == texts[0] for text in texts)


def test_prompts_that_do_not_fit(config, capsys):
    args = [arg for arg in FAST if not arg.startswith("--evals")]
    fails(capsys, ["train", config, *args, f"--evals.prompts={('the ' * 20,)}"], 3, "evals.prompts: prompt 0",
          "max_seq_len is 64")
    assert not list((config.parent / "runs").rglob("checkpoints/*"))


def test_loss_that_is_not_a_number(config, capsys):
    fails(capsys, ["train", config, *QUICK, "--optim.clip_norm=0", "--optim.learning_rate=10", "--steps=40",
                   "--optim.weight_decay=10", "--optim.b2=0"], 5, "step ", "learning_rate")


def test_unknown_commands(capsys):
    fails(capsys, ["trian", "x"], 2, "did you mean `lmjax train`")
    fails(capsys, ["data", "prepar"], 2, "lmjax data prepare")
    fails(capsys, ["train", "nothing.py"], 2, "nothing.py", "no such config file")
    fails(capsys, ["train", "configs/quickstart.py", "--devices", "4"], 2, "--dry-run")


# ---- configs as JSON -------------------------------------------------------------------------------------------


def test_the_config_of_a_run_is_a_config(trained, tmp_path, capsys):
    saved = trained / "runs" / "tiny" / "config.json"
    assert main(["train", str(saved), "--name=again", f"--run_root={tmp_path}"]) == 0
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == json.loads(saved.read_text()) | {"name": "again", "run_root": str(tmp_path)}
    assert state_hash(tmp_path / "again", 4) == state_hash(trained / "runs" / "tiny", 4), "and the same run"


def test_mistakes_in_a_json_config_are_told_at_once(trained, tmp_path, capsys):
    value = json.loads((trained / "runs" / "tiny" / "config.json").read_text())
    value["stepz"] = 3
    value["model"]["num_layers"] = "two"
    value["data"]["sources"][0]["wieght"] = 1
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert main(["train", str(tmp_path / "x.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"lmjax: {tmp_path / 'x.json'}: ") for line in lines)
    for words in (("data.sources[0].wieght", "data.sources[0].weight"), ("stepz", "steps"),
                  ("model.num_layers='two'", "expected int")):
        assert any(all(word in line for word in words) for line in lines), words
    for text, word in (("{", "not valid JSON"), ('{"seed": 1, "seed": 2}', "seed"), ('{"seed": NaN}', "NaN"),
                       ("[]", "expected RunConfig"), ("[" * 10**5, "not valid JSON"), ("\ud800", "x.json")):
        (tmp_path / "x.json").write_text(text, errors="surrogatepass")
        fails(capsys, ["train", tmp_path / "x.json"], 2, word, "x.json")
