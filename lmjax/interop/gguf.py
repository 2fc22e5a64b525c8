"""GGUF files: read, dequantised, with their tokenizer and chat template.

The `gguf` package (extra "gguf") reads the format and undoes the quantisation, one tensor at a time. Supported is the
architecture llama with a byte-level BPE, as converted by llama.cpp; everything else is refused by name. GGUF is not
written.
"""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmjax.data.tokenizers import Tokenizer, tokenizer_from_json
from lmjax.errors import CheckpointError
from lmjax.interop import weights
from lmjax.interop.names import GGUF_LLAMA
from lmjax.interop.settings import Settings
from lmjax.models import DecoderConfig, RopeScaling

MAGIC = b"GGUF"

# How text is cut before merging, by `tokenizer.ggml.pre`: regular expressions, applied one after another to what the
# ones before have cut, as llama.cpp does (src/llama-vocab.cpp).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
}
WHOLE_WORDS = ("llama-bpe",)  # a piece that is a token is taken whole, whatever the merges say
CONTROL, USER_DEFINED = 3, 4  # token types: specials, and pieces that were added later


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: str | Path, *, dtype: Any = jnp.float32,
              mesh: Mesh | None = None) -> tuple[DecoderConfig, dict, Tokenizer]:
    """(config, parameters, tokenizer) of a file, sharded over the mesh (None: whole, on the first device).

    Raises CheckpointError for another architecture or tokenizer, unknown settings, tensors that do not fit (all at
    once) and damaged files.
    """
    path = Path(path)
    file = _open(path)
    fields = _fields(file, path)
    config = _config(fields, path, {tensor.name for tensor in file.tensors})
    params = weights.read_params(_Tensors(file, path), GGUF_LLAMA, config, dtype=dtype, mesh=mesh)
    return config, params, _tokenizer(fields, path)


def _open(path: Path):
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path}: GGUF files are read with the package gguf; pip install 'lmjax[gguf]'") from None
    if not is_gguf(path):
        raise CheckpointError(f"{path}: not a GGUF file (it does not begin with {MAGIC.decode()}); fetch it again")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader trusts sizes and offsets: damage ends in many kinds of errors
        raise CheckpointError(f"{path}: damaged or truncated ({type(error).__name__}: "
                              f"{' '.join(str(error).split())[:100]}); fetch it again") from None


class _Tensors:
    """The tensors of a file, dequantised when read (a `weights.Source`)."""

    def __init__(self, file, path: Path):
        self.where = str(path)
        self._tensors = {tensor.name: tensor for tensor in file.tensors}
        # GGUF counts dimensions from the innermost.
        self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(f"{self.where}: {name} is quantised as {tensor.tensor_type.name}, which the package "
                                  "gguf cannot undo; give a file with another quantisation") from None
        return values.reshape(self.shapes[name])


def _fields(file, path: Path) -> dict[str, Any]:
    """Key -> value. Strings are decoded here, so the 100,000 of a vocabulary are not read twice."""
    try:
        return {key: field.contents() for key, field in file.fields.items() if not key.startswith("GGUF.")}
    except Exception as error:  # as in _open
        raise CheckpointError(f"{path}: its keys cannot be read ({type(error).__name__}); fetch it again") from None


# ---- settings --------------------------------------------------------------------------------------------------


def _config(fields: dict[str, Any], path: Path, tensors: set[str]) -> DecoderConfig:
    """The keys `llama.…` as a DecoderConfig; each is taken or refused."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: general.architecture={architecture!r} is not supported, only 'llama' is")
    if "rope_freqs.weight" in tensors:
        raise CheckpointError(f"{path}: rope_freqs.weight scales RoPE one frequency at a time (Llama 3.1 and later), "
                              "which is not supported; give the safetensors of this model")
    prefix = f"{architecture}."
    s = Settings({key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)},
                 prefix=prefix)
    heads, width = s.int("attention.head_count"), s.int("embedding_length")
    head_dim = s.int("attention.key_length", or_=width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        s.must_be(key, head_dim)
    for key in ("expert_count", "expert_used_count"):
        s.must_be(key, 0)
    vocab_size = s.int("vocab_size", or_=len(fields.get("tokenizer.ggml.tokens", ())))
    config = DecoderConfig(
        vocab_size=vocab_size, num_layers=s.int("block_count"), d_model=width, num_heads=heads,
        num_kv_heads=s.int("attention.head_count_kv", or_=0), head_dim=head_dim, d_ff=s.int("feed_forward_length"),
        max_seq_len=s.int("context_length"), norm_eps=_rounded(s.float("attention.layer_norm_rms_epsilon")),
        rope_theta=s.float("rope.freq_base", or_=10_000.0), rope_scaling=_scaling(s),
        tied="output.weight" not in tensors)
    s.done()
    if problems := s.problems or config.problems():
        raise CheckpointError(*(f"{path}: {problem}" for problem in problems))
    return config


def _scaling(s: Settings) -> RopeScaling | None:
    kind = s.values.get("rope.scaling.type", "none")
    s.unused("rope.scaling.type", "rope.scaling.original_context_length", "rope.scaling.finetuned")
    if kind == "linear":
        return RopeScaling("linear", s.float("rope.scaling.factor"))
    if kind != "none":
        s.problem("rope.scaling.type", "is not supported; supported are none and linear")
    return None


def _rounded(x: float) -> float:
    """1e-5 of the float32 9.999999747378752e-06, which is what was meant."""
    return float(f"{x:.7g}") if x and math.isfinite(x) else x


# ---- tokenizer -------------------------------------------------------------------------------------------------


def _tokenizer(fields: dict[str, Any], path: Path) -> Tokenizer:
    """A byte-level BPE with the file's vocabulary, merges, specials and chat template."""
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise CheckpointError(f"{path}: tokenizer.ggml.model={model!r} is not supported, only 'gpt2' (byte-level BPE) "
                              "is")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre={pre!r} is not supported; supported are "
                              f"{', '.join(PRE_TOKENIZERS)}")
    try:
        tokens = fields["tokenizer.ggml.tokens"]
        types = fields["tokenizer.ggml.token_type"]
        merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error.args[0]}, without which its text cannot be read") from None
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kind == CONTROL}
             for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (CONTROL, USER_DEFINED)]
    splits = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
              for regex in PRE_TOKENIZERS[pre]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": pre in WHOLE_WORDS, "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": merges},
    }
    return tokenizer_from_json(definition, path.stem, _specials(fields, tokens, pre), str(path))


def _specials(fields: dict[str, Any], tokens: list[str], pre: str) -> dict[str, Any]:
    """What a tokenizer_config.json would say."""
    said: dict[str, Any] = {"add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", pre in WHOLE_WORDS))}
    for name in ("bos", "eos"):
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and index < len(tokens):
            said[f"{name}_token"] = tokens[index]
    if template := fields.get("tokenizer.chat_template"):
        said["chat_template"] = template
    return said
