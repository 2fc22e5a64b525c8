"""Against transformers itself: its files give its logits here, ours give ours there. Needs torch and transformers
(the extra "interop-test"); without them the stored tensors of `test_interop` and `test_hf_parity` have to do."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from goldens.make_hf_goldens import CASES, tokens, weight
from test_interop import same_bytes

from lmjax.axes import MeshConfig, make_mesh
from lmjax.data import load_tokenizer, train_bpe
from lmjax.interop.hf import SINGLE, read_hf, write_hf
from lmjax.interop.safetensors import TensorFile
from lmjax.models import Decoder
from lmjax.state import graphdef

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # absolute, of logits up to 12; measured: below 2e-5
QUICK = {"xla_backend_optimization_level": 0}


def theirs(case: str):
    """A model of transformers with the random weights of the goldens."""
    config_class, model_class, fields = CASES[case]
    config = getattr(transformers, config_class)(**fields, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(case, name, tuple(parameter.shape))))
    return model


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens().astype(np.int64))).logits.numpy().copy()


def our_logits(config, params) -> np.ndarray:
    graph = graphdef(functools.partial(Decoder, config))
    return np.asarray(jax.jit(lambda p: nnx.merge(graph, p)(tokens()), compiler_options=QUICK)(params))


@pytest.mark.parametrize("case", CASES)
def test_logits_there_and_back(case, tmp_path):
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    config, params = read_hf(tmp_path / "theirs")
    wanted = their_logits(model)
    error = np.abs(our_logits(config, params) - wanted).max()
    print(f"{case}: largest difference of logits {error:.1e}, of logits up to {np.abs(wanted).max():.1f}")
    assert error < TOLERANCE
    out = write_hf(tmp_path / "ours", config, params, max_shard_bytes=100_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32)
    assert type(back) is type(model) and np.array_equal(their_logits(back), wanted)
    assert same_bytes(read_hf(out)[1], params)
    swapped = dict(params, embed_VD=params["embed_VD"][::-1])
    assert np.abs(our_logits(config, swapped) - wanted).max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_have_their_own_tensors_byte_for_byte(case, tmp_path):
    """The files of transformers, read and written: the same names, shapes and bytes, and placed on a mesh alike."""
    theirs(case).save_pretrained(tmp_path / "theirs")
    config, params = read_hf(tmp_path / "theirs")
    ours, wanted = (TensorFile(folder / SINGLE) for folder in (write_hf(tmp_path / "ours", config, params),
                                                              tmp_path / "theirs"))
    assert ours.entries.keys() == wanted.entries.keys()
    assert sum(".experts.1." in name for name in wanted.entries) == 3 * config.num_layers
    for name in wanted.entries:
        assert ours.read(name).tobytes() == wanted.read(name).tobytes(), name
    mesh = make_mesh(MeshConfig(1, 2, 2, expert=2))
    split = read_hf(tmp_path / "theirs", mesh=mesh)[1]
    up = split["blocks"]["mlp"]["up_EDF"]
    E, D, F = config.moe.num_experts // 2, config.d_model // 2, config.moe.d_ff // 2
    assert up.sharding.shard_shape(up.shape) == (3, E, D, F) and same_bytes(split, params)


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8}
SCALINGS = {
    "yarn": (YARN, 32), "yarn, attention factor": (YARN | {"attention_factor": 1.5}, 32),
    "yarn, betas": (YARN | {"beta_fast": 1.0, "beta_slow": 0.05}, 32),
    "yarn, mscale": (YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, 32),
    "yarn, nothing said": ({"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}, 8),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}, 8),
    "dynamic, within": ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}, 64),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_context_extension_there_and_back(case, tmp_path):
    """Rows of 24 tokens, where the model was made for 8."""
    section, longest = SCALINGS[case]
    class_, model_class, fields = CASES["llama3"]
    fields = fields | {"rope_parameters": dict(section), "max_position_embeddings": longest}
    CASES["scaled"] = class_, model_class, fields
    try:
        model = theirs("scaled")
    finally:
        del CASES["scaled"]
    model.save_pretrained(tmp_path / "theirs")
    config, params = read_hf(tmp_path / "theirs")
    wanted = their_logits(model)
    error = np.abs(our_logits(config, params) - wanted).max()
    print(f"{case}: largest difference of logits {error:.1e}, of logits up to {np.abs(wanted).max():.1f}")
    assert error < TOLERANCE
    out = write_hf(tmp_path / "ours", config, params)
    back = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32)
    assert np.abs(their_logits(back) - wanted).max() < TOLERANCE  # of mscale, the attention factor that it makes
    plain = dataclasses.replace(config, rope_scaling=None)
    changed = np.abs(our_logits(plain, params) - wanted).max()
    assert changed > 100 * TOLERANCE if case != "dynamic, within" else changed < TOLERANCE


def test_tokenizer_there_and_back(tmp_path):
    """The tokenizer of an exported run: the same ids there, bos in front, and the chat template."""
    tokenizer = train_bpe(["the model reads what it wrote, and writes 1234 things it read"], 280)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    model = theirs("smollm2")
    model.save_pretrained(tmp_path / "theirs")
    config, params = read_hf(tmp_path / "theirs")
    out = write_hf(tmp_path / "ours", config, params, tokenizer, add_bos=True)
    there = transformers.AutoTokenizer.from_pretrained(out)
    text = "it writes the 1234 things, é 😀\n  and reads"
    ids = tokenizer.encode(text).tolist()
    assert there(text).input_ids == [tokenizer.bos_id, *ids] and there(text, add_special_tokens=False).input_ids == ids
    assert there.decode(ids) == text and there.eos_token_id == tokenizer.eos_id
    assert there.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi;"
    assert load_tokenizer(str(out)).fingerprint == tokenizer.fingerprint
