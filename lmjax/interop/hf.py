"""Hugging Face folders: config.json, safetensors (one file, or shards with an index) and tokenizer, in and out.

Reading streams (`weights`), refuses what it cannot express (`families`), and trusts nothing in the folder: no
pickle is opened, no code of the model's is run, and an index can only name files beside it. Writing goes to a
temporary folder that is renamed when it is whole, and never over something.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmjax.checkpoint import save_json
from lmjax.data import Tokenizer
from lmjax.data.tokenizers import json_with_bos
from lmjax.errors import CheckpointError
from lmjax.interop import families, weights
from lmjax.interop.safetensors import TensorFile, write_tensors
from lmjax.models import DecoderConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")

# Tensors that hold no weights: tables of RoPE and causal masks that old versions saved, and the half that sees.
NO_WEIGHTS = re.compile(r"(\.rotary_emb\.inv_freq|(^|\.)h\.\d+\.attn\.(bias|masked_bias))$")
VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


# ---- in --------------------------------------------------------------------------------------------------------


def read_hf(folder: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> tuple[DecoderConfig, dict]:
    """(config, parameters) of a model in a folder, sharded over the mesh (None: whole, on the first device).

    Raises CheckpointError for settings that we cannot express, for tensors that are missing, unexpected or
    mis-shaped (all at once), and for damaged files.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json; give the folder of a Hugging Face model")
    family, config = families.read_config(read_json(path), str(path))
    source = Folder(folder, family, config)
    return config, weights.read_params(source, family.table, config, dtype=dtype, mesh=mesh)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{path}: not valid JSON ({why}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected an object; fetch it again")
    return value


class Folder:
    """The tensors of a folder under the names of the family's table (a `weights.Source`)."""

    def __init__(self, folder: Path, family: families.Family, config: DecoderConfig):
        self.where = str(folder)
        found = _tensor_files(folder)
        embed, head = (next(row.there for row in family.table if row.ours == ours) for ours in ("embed_VD", "out_VD"))
        # Some files hold the body alone, or below another prefix than the table's.
        standard = family.bodies[0]
        body = next((prefix for prefix in family.bodies if prefix + embed.removeprefix(standard) in found), standard)
        self._files, left_out = {}, 0
        for name, file in found.items():
            if VISION.match(name):
                left_out += 1
            elif name in (head, f"language_model.{head}"):
                self._files[head] = (file, name)
            elif not NO_WEIGHTS.search(name):
                known = standard + name.removeprefix(body) if name.startswith(body) else name
                self._files[known] = (file, name)
        if left_out:
            warnings.warn(f"{folder}: {left_out} tensors that see pictures are left out; the text model is read",
                          stacklevel=2)
        if config.tied and head in self._files:
            if not _equal(self.read(head), self.read(embed)):
                raise CheckpointError(f"{folder}: {head} differs from {embed} although tie_word_embeddings is true; "
                                      "set it to false in config.json if the output matrix is one of its own")
            del self._files[head]
        self.shapes = {name: file.entries[inside].shape for name, (file, inside) in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        file, inside = self._files[name]
        return file.read(inside)


def _equal(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> bool:
    return a.shape == b.shape and all(
        np.array_equal(a[i:i + rows], b[i:i + rows]) for i in range(0, a.shape[0], rows))


def _tensor_files(folder: Path) -> dict[str, TensorFile]:
    """Every tensor of a folder and the file that holds it."""
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}" + _pickles_here(folder))
        file = TensorFile(folder / SINGLE)
        return dict.fromkeys(file.entries, file)
    path = folder / INDEX
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{path}: has no weight_map of tensor to file; fetch it again")
    shards = sorted(set(listed.values()))
    for name in shards:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII):
            raise CheckpointError(f"{path}: names the shard {name!r}, which is not the plain name of a .safetensors "
                                  "file beside it; nothing else is opened")
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:5])}"
                              f"{', …' if len(missing) > 5 else ''}; fetch them again")
    found: dict[str, TensorFile] = {}
    problems = []
    for file in (TensorFile(folder / name) for name in shards):
        problems += [f"{path}: {name} stands in {found[name].path.name} and in {file.path.name}"
                     for name in file.entries if name in found]
        found |= dict.fromkeys(file.entries, file)
    problems += [f"{path}: says that {name} is in {shard}, which has no such tensor" for name, shard in listed.items()
                 if name not in found]
    if problems:
        raise CheckpointError(*problems[:weights.SHOWN])
    return found


def _pickles_here(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES) if folder.is_dir() else []
    return (f"; {names[0]} is not read, because such files can run code when opened: save the model again with "
            "save_pretrained(folder), which writes safetensors" if names else "")


# ---- out -------------------------------------------------------------------------------------------------------


def write_hf(out: str | Path, config: DecoderConfig, params: dict, tokenizer: Tokenizer | None = None, *,
             dtype: str = "float32", max_shard_bytes: int = 5_000_000_000, add_bos: bool | None = None) -> Path:
    """Writes a folder that `transformers` and `read_hf` open. Returns it.

    dtype: of the tensors in the files. max_shard_bytes: a file is closed before it would grow beyond it (a single
    larger tensor gets a file of its own). add_bos: whether tokenizers there put bos before a text; None: as the
    tokenizer's maker did. A model that scales its embedding and fits no family is written with the scale multiplied
    in and an output matrix of its own. Raises CheckpointError where `out` exists, or no family expresses the model.
    """
    out = Path(out)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"dtype={dtype!r}: choose float32, bfloat16 or float16")
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out}: exists; nothing is written over it, so give another folder")
    family, written, config, params = _expressible(config, params)
    part = out.with_name(f"{out.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        _write_tensor_files(part, family, config, params, np.dtype(jnp.dtype(dtype)), max_shard_bytes)
        if tokenizer is not None:
            _write_tokenizer(part, tokenizer, config, add_bos)
        specials = {"bos_token_id": tokenizer and tokenizer.bos_id, "eos_token_id": tokenizer and tokenizer.eos_id}
        save_json(part / "config.json", written | specials | {"torch_dtype": dtype})
        save_json(part / "generation_config.json", {"_from_model_config": True, **specials})
        part.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror}); mend that and export again") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _expressible(config: DecoderConfig, params: dict) -> tuple[families.Family, dict, DecoderConfig, dict]:
    """The family, the keys of its config.json, and the model as that family has it."""
    try:
        return *families.choose(config), config, params
    except CheckpointError:
        if not config.scale_embed:
            raise
    config = dataclasses.replace(config, scale_embed=False, tied=False)
    params = {**params, "embed_VD": params["embed_VD"] * config.d_model**0.5,
              "out_VD": params.get("out_VD", params["embed_VD"])}
    return *families.choose(config), config, params


def _write_tensor_files(folder: Path, family: families.Family, config: DecoderConfig, params: dict, dtype: np.dtype,
                        max_shard_bytes: int) -> None:
    rows = weights.used_rows(family.table, config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in weights.expected(rows, config).items():
        count = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + count > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + count, total + count
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shapes in zip(names, shards, strict=True):
        write_tensors(folder / name, shapes, dtype, weights.tensors(params, rows, config, list(shapes)))
    if len(shards) > 1:
        weight_map = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
        save_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: DecoderConfig, add_bos: bool | None) -> None:
    add_bos = bool(tokenizer.prefix_ids) if add_bos is None else add_bos
    text = json_with_bos(tokenizer) if add_bos else tokenizer.to_json()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    said: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_names(),
                            "add_bos_token": add_bos,
                            "clean_up_tokenization_spaces": False, "model_max_length": config.max_seq_len}
    if tokenizer.chat_template:
        said["chat_template"] = tokenizer.chat_template
    save_json(folder / "tokenizer_config.json", said)
