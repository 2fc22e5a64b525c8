"""Every file that is read, damaged in every way: what was in it or one typed error, no hang, and nothing written
elsewhere or left as if it were whole."""

import contextlib
import gzip
import json
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fuzzing import LARGE, as_text, changed_bytes, changed_json, examples, soon
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import RunConfig, read_run_config, to_json
from lmjax.data import DataConfig, SourceConfig, Tokens, documents, load_manifest, load_tokenizer, prepare, prepare_all
from lmjax.data.tokenizers import ByteTokenizer, train_bpe
from lmjax.errors import DataError, UserError
from lmjax.interop import families
from lmjax.interop.hf import read_hf, read_json
from lmjax.interop.load import what_is
from lmjax.interop.safetensors import TensorFile, write_tensors
from lmjax.records import format_summary, read_metrics, rewind, summary
from lmjax.report import write_report
from lmjax.report.runs import read_runs


@dataclass
class Reader:
    """A file in a folder of its own, what reads it, and the errors that it may end in."""

    file: Path
    read: object
    good: bytes = b""
    value: object = None  # of a file that is JSON
    errors: tuple = field(default=(UserError,))

    def __post_init__(self):
        self.good = self.file.read_bytes()
        if self.file.suffix == ".json":
            self.value = json.loads(self.good)


def source_reader(folder, name, content, kind, **more):
    folder.mkdir()
    (folder / name).write_bytes(content)

    def read():
        for policy in ("error", "skip"):
            for document in documents(SourceConfig(kind, str(folder / name), on_bad_record=policy, **more), Counter()):
                document.text.encode()
    return Reader(folder / name, read)


def prepared(folder, texts=("one text", "another text", "a third one", "four", "five", "six six")):
    (folder / "text").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    prepare(SourceConfig("text", str(folder / "text")), ByteTokenizer(), folder / "out", validation_fraction=0.3,
            workers=1, shard_bytes=20)
    return folder / "out"


def shard_reader(folder, file):
    out = prepared(folder)
    whole = {name: Tokens(out, name).read(0, 10**6) for name in ("train", "validation")}

    def read():
        with contextlib.suppress(DataError):  # the sizes differ, say
            for name, wanted in whole.items():
                tokens = Tokens(out, name)
                found = tokens.read(0, len(tokens))
                assert found[0].min() >= 0 and found[0].max() < 257 and len(found[0]) == len(wanted[0])
        corpus = prepare_all(DataConfig((SourceConfig("shards", str(out)),), cache_dir=str(folder / "cache")))
        for name, wanted in whole.items():  # its hashes are right, so it is what it was
            tokens = Tokens(out, name, corpus.manifests[0])
            for a, b in zip(tokens.read(0, 10**6), wanted, strict=True):
                np.testing.assert_array_equal(a, b)
    return Reader(out / file, read)


def progress_reader(folder):
    out = prepared(folder)
    manifest = load_manifest(out)
    lines = [{"identity": manifest.identity}, *(vars(s) for split in manifest.splits.values() for s in split.shards)]
    (out / "manifest.json").unlink()
    (out / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read():
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        try:
            again = prepare(SourceConfig("text", str(folder / "text")), ByteTokenizer(), copy, validation_fraction=0.3,
                            workers=1, shard_bytes=20)
        except UserError:
            assert not (copy / "manifest.json").exists(), "left as if it were whole"
            raise
        assert again.fingerprint == manifest.fingerprint, "what was kept is not what would have been made"
        Tokens(copy).verify(hashes=True)
    return Reader(out / "progress.jsonl", read)


def tokenizer_reader(folder, file):
    folder.mkdir()
    train_bpe(["some text to learn from, some more text"] * 3, 262).save(folder / "tokenizer.json")
    config = {"bos_token": "<|document|>", "eos_token": {"content": "<|document|>"}, "chat_template": [{"name": "x"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def read():
        tokenizer = load_tokenizer(str(folder))
        ids = tokenizer.encode("some other text é")
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        tokenizer.decode(ids)
        tokenizer.token_bytes()
        tokenizer.to_json()
    return Reader(folder / file, read)


def metrics_reader(folder, file="metrics.jsonl"):
    folder.mkdir()
    measured = {"kind": "eval", "split": "validation", "perplexity": 148.4, "bits_per_byte": 7.0}
    records = [{"kind": "start", "step": 0, "time": 1.0, "devices": "1 x cpu", "parameters": 5},
               {"step": 0, "loss": 5.0} | measured]
    records += [{"kind": "train", "step": step, "loss": 4.0 / step, "tokens": 8 * step, "tokens_per_second": 3.5,
                 "seconds": float(step), "mfu": None, "grad_norm": "nan", "lr": 0.1} for step in (1, 2, 3)]
    records += [{"step": 3, "loss": 1.0} | measured, {"kind": "sample", "step": 3, "prompt": "x", "text": "y"},
                {"kind": "end", "step": 3, "tokens_per_second": {"median": 3.5}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name in ("config.json", "environment.json"):
        (folder / name).write_text(json.dumps({"optim": {"lr": 0.1}, "data": {"sources": [{"kind": "text"}]}}))

    def read():
        found = read_metrics(folder)
        format_summary(summary(found, folder))
        read_runs([folder])
        write_report([folder], folder.parent / "page.html")
        (folder / "again.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
        rewind(folder / "again.jsonl", 1)
    return Reader(folder / file, read)


def run_config_reader(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_json(RunConfig())))
    return Reader(folder / "config.json", lambda: (what_is(folder), read_run_config(folder)))


def hf_reader(folder, file):
    """A tiny Llama in two shards."""
    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "hidden_act": "silu",
              "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
              "max_position_embeddings": 32, "rope_theta": 1e4, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), f"{layer}input_layernorm.weight": (8,),
              f"{layer}post_attention_layernorm.weight": (8,), f"{layer}self_attn.q_proj.weight": (8, 8),
              f"{layer}self_attn.k_proj.weight": (4, 8), f"{layer}self_attn.v_proj.weight": (4, 8),
              f"{layer}self_attn.o_proj.weight": (8, 8), f"{layer}mlp.gate_proj.weight": (16, 8),
              f"{layer}mlp.up_proj.weight": (16, 8), f"{layer}mlp.down_proj.weight": (8, 16)}
    halves = dict(list(shapes.items())[:4]), dict(list(shapes.items())[4:])
    names = ["a.safetensors", "b.safetensors"]
    for name, half in zip(names, halves, strict=True):
        write_tensors(folder / name, half, np.dtype(ml_dtypes.bfloat16),
                      (np.ones(s, ml_dtypes.bfloat16) for s in half.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {n: name for name, half in zip(names, halves, strict=True) for n in half}}))

    def read():
        if file.endswith(".safetensors"):
            opened = TensorFile(folder / file)
            for name in opened.entries:
                with contextlib.suppress(UserError):
                    opened.read(name).sum()
        elif file == "config.json":
            what_is(folder)
            families.read_config(read_json(folder / file), file)
        else:
            read_hf(folder)
    return Reader(folder / file, read)


def gguf_reader(folder):
    from lmjax.interop.gguf import _config, _fields, _open, _Tensors, _tokenizer

    gguf = pytest.importorskip("gguf")
    folder.mkdir()
    path = folder / "x.gguf"
    out = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 1), ("context_length", 32), ("embedding_length", 8), ("feed_forward_length", 16),
                       ("attention.head_count", 2), ("vocab_size", 12)):
        out.add_uint32(f"llama.{key}", value)
    out.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(["<|e|>", *"abcdefghij", "ab"])
    out.add_token_types([3] + [1] * 11)
    out.add_token_merges(["a b"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    out.add_tensor("token_embd.weight", np.ones((12, 8), np.float32))
    for write in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        write()

    def read():
        file = _open(path)
        fields = _fields(file, path)
        tensors = _Tensors(file, path)
        for name in tensors.shapes:
            tensors.read(name)
        _config(fields, path, set(tensors.shapes))
        _tokenizer(fields, path)
    return Reader(path, read)


def parquet_reader(folder):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    parquet.write_table(arrow.table({"text": ["one", None, "three" * 50]}), folder / "seed.parquet")
    return source_reader(folder / "in", "x.parquet", (folder / "seed.parquet").read_bytes(), "parquet")


LINES = b"".join(json.dumps({"text": f"line {n} \u00e9", "n": n}).encode() + b"\n" for n in range(5))
READERS = {
    "text": lambda at: source_reader(at, "x.txt", "some text, é".encode(), "text"),
    "jsonl": lambda at: source_reader(at, "x.jsonl", LINES, "jsonl"),
    "gz": lambda at: source_reader(at, "x.jsonl.gz", gzip.compress(LINES, mtime=0), "jsonl"),
    "parquet": parquet_reader,
    "tokens": lambda at: shard_reader(at, "train-00000.tokens.npy"),
    "offsets": lambda at: shard_reader(at, "train-00000.offsets.npy"),
    "manifest": lambda at: shard_reader(at, "manifest.json"),
    "progress": progress_reader,
    "tokenizer": lambda at: tokenizer_reader(at, "tokenizer.json"),
    "tokenizer_config": lambda at: tokenizer_reader(at, "tokenizer_config.json"),
    "metrics": metrics_reader,
    "report_config": lambda at: metrics_reader(at, "config.json"),
    "run_config": run_config_reader,
    "hf_config": lambda at: hf_reader(at, "config.json"),
    "hf_index": lambda at: hf_reader(at, "model.safetensors.index.json"),
    "safetensors": lambda at: hf_reader(at, "a.safetensors"),
    "gguf": gguf_reader,
}
COST = {"metrics": 4, "report_config": 4, "hf_index": 4, "gguf": 4, "progress": 8, "manifest": 2, "parquet": 2}


def listing(folder, name):
    """What lies in a folder besides one file or folder in it."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(path.as_posix() for path in found if path.parts[0] != name)


def fuzz(name, place, few):
    made = READERS[name](place / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.read()  # as it is, it can be read
    beside = listing(place, name)
    ended = Counter()

    def run(data):
        if data == made.good:
            return
        made.file.write_bytes(data)
        try:
            with soon(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made.read()
            ended["read"] += 1
        except made.errors as error:
            assert str(error).strip()
            ended["refused"] += 1

    kinds = changed_bytes(made.good)
    if made.value is not None:
        kinds = kinds | changed_json(made.value).map(lambda value: as_text(value).encode())
    elif name in ("jsonl", "metrics", "progress"):
        lines = made.good.splitlines()
        kinds = kinds | st.integers(0, len(lines) - 1).flatmap(lambda at: changed_json(json.loads(lines[at])).map(
            lambda value: b"\n".join([*lines[:at], as_text(value).encode(), *lines[at + 1:], b""])))
    examples(few, COST.get(name, 1))(given(kinds)(run))()
    assert ended["refused"], "nothing was ever refused"
    assert listing(place, name) == beside


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name, tmp_path):
    fuzz(name, tmp_path, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_at_length(name, tmp_path):
    fuzz(name, tmp_path, LARGE)


def test_a_reader_that_trusts_its_file_is_seen(tmp_path, monkeypatch):
    """Known wrong: JSON taken as it comes, and a shard whose bytes nobody compares."""
    import lmjax.records as records

    monkeypatch.setattr(records, "_parse", lambda path: [
        (line, json.loads(line)) for line in path.read_bytes().splitlines()])
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        fuzz("metrics", tmp_path, 40)
    assert not isinstance(caught.value, UserError)
    monkeypatch.undo()
    monkeypatch.setattr("lmjax.data.verify.damage", lambda folder, shard, hashes: "")
    with pytest.raises(AssertionError, match="Mismatched"):
        fuzz("tokens", tmp_path, 400)


