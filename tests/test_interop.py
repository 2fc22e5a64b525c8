"""Hugging Face folders in and out, without transformers: names, streaming, refusals, round trips.

The tensors, and the config.json that transformers writes for them, are those of `goldens/make_hf_goldens.py`; where
each belongs is said by `test_hf_parity`, whose mapping is its own. Settings: `test_interop_settings`. Against
transformers itself: `test_interop_torch`.
"""

import dataclasses
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.make_hf_goldens import weight
from helpers import TINY, write_config
from test_hf_parity import CONFIGS, GOLDENS, our_weights

from lmjax import load
from lmjax.axes import MeshConfig, make_mesh, weight_spec
from lmjax.checkpoint import CheckpointConfig, Checkpoints
from lmjax.cli import main
from lmjax.config import RunConfig, to_json
from lmjax.data import ByteTokenizer, load_tokenizer, train_bpe
from lmjax.errors import CheckpointError, ConfigError
from lmjax.interop import families, names
from lmjax.interop.hf import INDEX, SINGLE, read_hf, write_hf
from lmjax.interop.load import initial_params, open_model
from lmjax.interop.safetensors import TensorFile, write_tensors
from lmjax.models import Decoder, preset
from lmjax.state import abstract_params
from lmjax.tree import named_leaves

# The experts of a layer stand in one tensor in transformers' memory, and apart in files: `test_interop_torch`.
CASES = [case for case, config in CONFIGS.items() if not config.moe]


def tensors(case: str) -> dict[str, np.ndarray]:
    return {name: weight(case, name, tuple(shape)) for name, shape in GOLDENS[case]["shapes"].items()}


def write_folder(folder, config: dict, tensors: dict, dtype=np.float32):
    """A folder as transformers would leave it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / SINGLE, {name: t.shape for name, t in tensors.items()}, np.dtype(dtype), tensors.values())
    return folder


@pytest.fixture
def golden(tmp_path):
    def make(case: str, **changes):
        return write_folder(tmp_path / case, GOLDENS[case]["config"] | changes, tensors(case))
    return make


def host(params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}


def same_bytes(a, b) -> bool:
    a, b = host(a), host(b)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


def problems(error) -> str:
    return "\n".join(error.value.problems)


# ---- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_finds_its_place(case, golden):
    config, params = read_hf(golden(case))
    expected = dataclasses.replace(CONFIGS[case], max_seq_len=config.max_seq_len)
    assert families.meaning(config) == families.meaning(expected)
    assert same_bytes(params, our_weights(case))


@pytest.mark.parametrize("case, name, wrong", [
    ("gpt2", "blocks/attention/q_DNH", {"third": 1}),  # k in place of q
    ("llama3", "blocks/attention/q_DNH", {"axes": "HN D"}), ("llama3", "blocks/attention/k_DKH", {"pairs": True}),
    ("gemma2", "final_norm/scale_D", {"plus": 0}), ("llama3", "blocks/mlp/up_DF",
                                                    {"there": "model.layers.{layer}.mlp.gate_proj.weight"}),
])
def test_a_wrong_row_would_be_seen(case, name, wrong):
    config, golden = CONFIGS[case], our_weights(case)
    family, _ = families.choose(config)
    row = next(row for row in family.table if row.ours == name)
    first = golden[name][0] if row.stacked else golden[name]
    tensor = tensors(case)[row.there.format(layer=0)]
    assert np.array_equal(row.to_ours(tensor, config), first)
    row = dataclasses.replace(row, **wrong)
    assert not np.array_equal(row.to_ours(tensors(case)[row.there.format(layer=0)], config), first)


def test_tables_cover_every_weight_once():
    """Of each family, and both directions of every row are inverse."""
    gguf = dataclasses.replace(preset("smollm2-135m"), vocab_size=64, num_layers=1)
    for config, table in [(gguf, names.GGUF_LLAMA), *((c, families.choose(c)[0].table) for c in CONFIGS.values())]:
        leaves = named_leaves(abstract_params(lambda key, config=config: Decoder(config, key)))
        for name, leaf in leaves.items():
            (row,) = [row for row in table if row.ours == name]
            shape = leaf.shape[len(row.at(0, config)[0][1]):] if row.stacked else leaf.shape
            ours = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
            there = row.to_theirs(ours, config)
            if row.third is not None:
                there = np.concatenate([there] * 3, axis=-1)
            assert there.shape == row.shape(config)
            assert np.array_equal(row.to_ours(there, config), ours)


@pytest.mark.parametrize("case, old, new", [
    ("gpt2", "transformer.", ""), ("smollm2", "model.", ""),  # files of the body alone
    ("gemma3", "model.", "language_model.model."), ("gemma3", "model.", "model.language_model."),
    ("gemma3", "model.", "language_model."),
])
def test_other_prefixes(case, old, new, tmp_path):
    renamed = {name.replace(old, new, 1): tensor for name, tensor in tensors(case).items()}
    if case == "gemma3":
        renamed["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    folder = write_folder(tmp_path / "m", GOLDENS[case]["config"], renamed)
    if case == "gemma3":
        with pytest.warns(UserWarning, match="1 tensors that see pictures"):
            assert same_bytes(read_hf(folder)[1], our_weights(case))
    else:
        assert same_bytes(read_hf(folder)[1], our_weights(case))


def test_what_is_no_weight_is_passed_over(tmp_path):
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    assert read_hf(write_folder(tmp_path / "a", GOLDENS["llama3"]["config"], tensors("llama3") | more))
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    assert read_hf(write_folder(tmp_path / "b", GOLDENS["gpt2"]["config"], tensors("gpt2") | mask))


def test_a_tied_output_matrix_must_be_the_embedding(tmp_path):
    all_of = tensors("smollm2")
    embed = all_of["model.embed_tokens.weight"]
    folder = write_folder(tmp_path / "m", GOLDENS["smollm2"]["config"], all_of | {"lm_head.weight": embed})
    assert same_bytes(read_hf(folder)[1], our_weights("smollm2"))
    write_folder(folder, GOLDENS["smollm2"]["config"], all_of | {"lm_head.weight": embed + 1})
    with pytest.raises(CheckpointError, match="lm_head.weight differs"):
        read_hf(folder)


def test_dtypes(golden, tmp_path):
    """A bfloat16 or float16 file is read into float32 exactly; `dtype` casts on the way in."""
    for kind in (jnp.bfloat16, np.float16):
        cast = {name: t.astype(kind) for name, t in tensors("smollm2").items()}
        folder = write_folder(tmp_path / np.dtype(kind).name, GOLDENS["smollm2"]["config"], cast, kind)
        exact = {name: t.astype(kind).astype(np.float32) for name, t in our_weights("smollm2").items()}
        assert same_bytes(read_hf(folder)[1], exact)
    params = read_hf(golden("smollm2"), dtype=jnp.bfloat16)[1]
    assert same_bytes(params, {name: t.astype(jnp.bfloat16) for name, t in our_weights("smollm2").items()})


def test_sharded_onto_the_mesh(golden):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    config, params = read_hf(golden("llama3"), mesh=mesh)
    for name, leaf in named_leaves(params).items():
        wanted = weight_spec(name.rpartition("/")[2], leaf.shape, mesh)
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, wanted), leaf.ndim), name
    assert len({str(s.index) for s in params["blocks"]["mlp"]["up_DF"].addressable_shards}) == 8
    assert same_bytes(params, our_weights("llama3"))


# ---- tensors that do not fit -----------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    some = tensors("llama3")
    del some["model.layers.1.mlp.up_proj.weight"]
    some["model.layers.9.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    some["model.norm.weight"] = np.ones(47, np.float32)
    folder = write_folder(tmp_path / "m", GOLDENS["llama3"]["config"], some)
    with pytest.raises(CheckpointError) as error:
        read_hf(folder)
    assert [line.removeprefix(f"{folder}: ") for line in error.value.problems] == [
        "model.layers.1.mlp.up_proj.weight is missing", "model.layers.9.mlp.up_proj.weight is unexpected",
        "model.norm.weight has the shape [47], expected [48]"]


def header_of(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + length]), data[8 + length:]


def with_header(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _shifted(data: bytes) -> bytes:
    header, rest = header_of(data)
    header["model.norm.weight"]["data_offsets"][1] += 4
    return with_header(header, rest)


def _quantised(data: bytes) -> bytes:
    header, rest = header_of(data)
    header["model.norm.weight"]["dtype"] = "I32"
    return with_header(header, rest)


@pytest.mark.parametrize("damage, words", [
    (lambda d: d[:-100], "truncated"), (lambda d: d + b"x", "too long"), (lambda d: d[:5], "not a whole"),
    (lambda d: d[:100], "not a whole"), (lambda d: b"", "not a whole"), (lambda d: b"PK\x03\x04" + d, "not a whole"),
    (lambda d: d[:8] + b"[" + d[9:], "header"), (_shifted, "model.norm.weight claims"), (_quantised, "is I32"),
    (lambda d: with_header({"a": {"dtype": "F32"}}, b""), "header"),
    (lambda d: with_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "header"),
])
def test_a_damaged_file_is_one_clear_line(damage, words, golden):
    path = golden("llama3") / SINGLE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=words) as error:
        read_hf(path.parent)
    assert len(error.value.problems) == 1 and str(path) in problems(error)


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[1]", "expected an object"), ("\xff", "JSON")])
def test_a_damaged_config_is_one_clear_line(text, words, golden):
    path = golden("llama3") / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=words):
        read_hf(path.parent)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", ""])
def test_an_index_names_plain_files_beside_it_only(name, golden):
    folder = golden("llama3")
    shutil.copy(folder / SINGLE, folder.parent / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="plain name"):
        read_hf(folder)


def test_shards_that_are_missing_or_disagree(golden):
    folder = golden("llama3")
    config, params = read_hf(folder)
    out = write_hf(folder / "out", config, params, max_shard_bytes=30_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 and same_bytes(read_hf(out)[1], params)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError) as error:
        read_hf(out)
    assert "stands in" in problems(error) and "has no such tensor" in problems(error)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"1 of {len(shards)} shards are missing: {shards[0].name}"):
        read_hf(out)


# ---- writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_round_trip_has_identical_bytes(case, golden):
    """Out and in again: parameters and, the second time, files. In Gemma scales of 1/2 and more are exact."""
    config, params = read_hf(golden(case))
    if config.post_norms:
        params = jax.tree.map(lambda x: jnp.maximum(x, 0.5) if x.ndim < 3 else x, params)
    out = write_hf(golden(case) / "out", config, params, max_shard_bytes=60_000)
    back, again = read_hf(out)
    assert families.meaning(back) == families.meaning(config) and same_bytes(params, again)
    twice = write_hf(out / "twice", back, again, max_shard_bytes=60_000)
    files = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert files == {p.name: p.read_bytes() for p in twice.iterdir()} and INDEX in files
    changed = dict(params, embed_VD=params["embed_VD"].at[3, 2].multiply(1 + 2**-20))
    assert not same_bytes(changed, again)


def test_bfloat16_is_the_nearest_and_half_the_size(golden):
    config, params = read_hf(golden("qwen2"))
    out = write_hf(golden("qwen2") / "out", config, params, dtype="bfloat16")
    assert same_bytes(read_hf(out)[1], jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    assert abs((out / SINGLE).stat().st_size / (golden("qwen2") / SINGLE).stat().st_size - 0.5) < 0.05
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_nothing_is_written_over_and_nothing_half_stays(golden, monkeypatch):
    config, params = read_hf(golden("smollm2"))
    out = golden("smollm2") / "out"
    for words, change in (("dtype='int8'", {"dtype": "int8"}), ("max_shard_bytes=0", {"max_shard_bytes": 0})):
        with pytest.raises(CheckpointError, match=words):
            write_hf(out, config, params, **change)
    monkeypatch.setattr("lmjax.interop.hf.save_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match="No space left"):
        write_hf(out, config, params)
    assert not list(out.parent.glob("out*"))
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        write_hf(out, config, params)
    assert list(out.iterdir()) == []


def test_a_scaled_embedding_is_multiplied_in(tmp_path):
    """The tiny presets fit no family as they are; what is written gives the same logits."""
    config = dataclasses.replace(preset("tiny-100k"), vocab_size=64, num_layers=1)
    model = Decoder(config, seed=1)
    out = write_hf(tmp_path / "out", config, host_tree(model))
    tokens = jnp.arange(24).reshape(2, 12)
    there, _ = load(out)
    assert there.config.tied is False and json.loads((out / "config.json").read_text())["model_type"] == "qwen3"
    run = jax.jit(lambda m: m(tokens), compiler_options={"xla_backend_optimization_level": 0})
    assert np.array_equal(run(model), run(there))
    there.embed_VD[...] = model.embed_VD[...]  # without the scale
    assert not np.allclose(run(model), run(there))


def host_tree(model) -> dict:
    from flax import nnx

    return nnx.to_pure_dict(nnx.split(model)[1])


def test_the_safetensors_library_agrees(golden):
    library = pytest.importorskip("safetensors.numpy")
    path = golden("gpt2") / SINGLE
    theirs, ours = library.load_file(path), TensorFile(path)
    assert theirs.keys() == ours.entries.keys()
    assert all(np.array_equal(theirs[name], ours.read(name)) for name in theirs)
    library.save_file(theirs, path)  # other order, other header
    assert same_bytes(read_hf(path.parent)[1], our_weights("gpt2"))


# ---- opening by path -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with checkpoints of steps 3 and 7, as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    tokenizer = train_bpe(["the model reads what it wrote and writes what it read"], 270)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save(folder / "tokenizer.json")
    config = RunConfig(model=dataclasses.replace(TINY, vocab_size=320))
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    with Checkpoints(folder / "checkpoints", CheckpointConfig(keep=9)) as checkpoints:
        for step in (3, 7):
            checkpoints.save(step, {"params": host_tree(Decoder(config.model, seed=step))}, {})
    return folder


def test_load_a_run(run):
    tokens = jnp.arange(12).reshape(2, 6)
    model, tokenizer = load(run)
    assert same_bytes(host_tree(model), host_tree(Decoder(model.config, seed=7)))
    assert same_bytes(host_tree(load(run, step=3).model), host_tree(Decoder(model.config, seed=3)))
    assert model(tokens).shape == (2, 6, 320) and tokenizer.decode(tokenizer.encode("read it")) == "read it"
    half = load(run, dtype="bfloat16").model
    assert half.embed_VD[...].dtype == half.hidden(tokens).dtype == jnp.bfloat16
    assert half(tokens).dtype == jnp.float32
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    assert load(run, mesh=mesh).model.embed_VD[...].sharding.mesh == mesh
    with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
        load(run, step=4)


def test_export_keeps_tokenizer_and_template(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--step", "3"]) == 0
    assert "at step 3" in capsys.readouterr().out
    (model, tokenizer), (_, original) = load(out), load(run)
    assert same_bytes(host_tree(model), host_tree(Decoder(TINY_RUN, seed=3)))
    assert tokenizer.fingerprint == original.fingerprint and tokenizer.chat_template == "{{ messages }}"
    # A run's texts begin with bos, and so the exported folder says.
    assert tokenizer.prefix_ids == (tokenizer.bos_id,) and original.prefix_ids == ()
    assert open_model(run).encode("a").tolist() == open_model(out).encode("a").tolist()
    assert main(["export", str(run), str(out)]) == 4 and "exists" in capsys.readouterr().err
    assert main(["generate", str(out), "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"--- {out} ---")
    assert main(["eval", str(out)]) == 2 and "held no data out" in capsys.readouterr().err


TINY_RUN = dataclasses.replace(TINY, vocab_size=320)


@pytest.mark.parametrize("name, make, words", [
    ("nowhere", lambda p: None, "no such file or folder"),
    ("empty", lambda p: p.mkdir(), "looked for config.json"),
    ("x.bin", lambda p: p.write_bytes(b"\x80"), "can run code"), ("x.pt", lambda p: p.write_bytes(b"\x80"), "can run"),
    ("x.safetensors", lambda p: p.write_bytes(b""), "give the folder"), ("x.txt", lambda p: p.write_bytes(b""), "GGUF"),
])
def test_a_path_that_is_no_model(name, make, words, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / name)


def test_arguments_that_do_not_fit(golden, run):
    with pytest.raises(ConfigError, match="no steps"):
        load(golden("smollm2"), step=3)
    with pytest.raises(ConfigError, match="dtype='int4'"):
        load(golden("smollm2"), dtype="int4")
    assert load(golden("smollm2")).tokenizer is None
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        open_model(golden("smollm2")).encode("a")


def test_pickles_are_refused_by_name(golden):
    folder = golden("smollm2")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is not read, because such files can run code"):
        load(folder)


def test_importing_lmjax_imports_no_jax():
    import subprocess
    import sys

    code = "import sys, lmjax; print('jax' in sys.modules, hasattr(lmjax, 'lod'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


# ---- as initial weights ----------------------------------------------------------------------------------------


def test_initial_params_are_those_of_the_path_or_refused(run, tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    tokenizer = load_tokenizer(str(run))
    params = initial_params(str(run), TINY_RUN, tokenizer, mesh)
    assert same_bytes(params, host_tree(Decoder(TINY_RUN, seed=7)))
    longer = dataclasses.replace(TINY_RUN, max_seq_len=1024)  # RoPE: no weight depends on it
    assert same_bytes(initial_params(str(run), longer, tokenizer, mesh), params)
    other = dataclasses.replace(TINY_RUN, d_ff=64, rope_theta=5.0)
    with pytest.raises(ConfigError) as error:
        initial_params(str(run), other, load_tokenizer("bytes"), mesh)
    text = problems(error)
    assert "model.d_ff=64: the model of init_from=" in text and "model.rope_theta=5.0" in text
    assert "data.tokenizer gives bytes (257 tokens)" in text and "max_seq_len" not in text


def test_a_run_begins_with_them_once(tmp_path):
    """At step 0, and never again: a second command with the path gone goes on from the checkpoint."""
    config = write_config(tmp_path)
    vocab = dataclasses.replace(TINY, vocab_size=320, qk_norm=False, num_kv_heads=0, d_ff=0)
    params = host_tree(Decoder(vocab, seed=5))
    write_hf(tmp_path / "start", vocab, params, ByteTokenizer())
    args = ["train", str(config), f"--init_from={tmp_path / 'start'}", "--data.tokenizer=bytes",
            "--model.vocab_size=320", "--mesh.data=8", "--evals.every=0", "--optim.warmup_steps=0",
            "--optim.learning_rate=1e-9", "--steps=1"]
    assert main(args) == 0
    trained = host(open_model(tmp_path / "runs" / "tiny").params)
    assert all(np.allclose(trained[name], leaf, atol=1e-6) for name, leaf in host(params).items())
    random = host_tree(Decoder(vocab, seed=0))
    assert not np.allclose(trained["embed_VD"], random["embed_VD"], atol=1e-6)
    shutil.rmtree(tmp_path / "start")
    assert main([*args[:-1], "--steps=2"]) == 0
