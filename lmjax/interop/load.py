"""Opening a model, wherever it comes from: a run folder, a Hugging Face folder or a GGUF file.

    from lmjax import load
    model, tokenizer = load("runs/quickstart")
    logits = model(tokenizer.encode("Once upon a time")[None])

Reads, and never writes. What the kinds of files hold is said in `hf` and `gguf`; training runs are read here.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from lmjax.checkpoint import CheckpointConfig, Checkpoints, abstract
from lmjax.config import RunConfig, read_run_config
from lmjax.data import Tokenizer, load_tokenizer
from lmjax.errors import CheckpointError, ConfigError
from lmjax.interop import families
from lmjax.interop.gguf import is_gguf, read_gguf
from lmjax.interop.hf import INDEX, PICKLES, SINGLE, read_hf, read_json
from lmjax.models import ComputeConfig, Decoder, DecoderConfig
from lmjax.state import abstract_params, graphdef, shardings

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class Opened:
    """The weights of a model on the devices, and what is needed to use them.

    path: what was opened. config: the model's. tokenizer: None for a Hugging Face folder without a tokenizer.json.
    prefix_ids: what stands before every text. run, meta: of the training run and its checkpoint, else None and {}.
    """

    path: Path
    config: DecoderConfig
    graphdef: nnx.GraphDef
    params: dict
    mesh: Mesh | None
    tokenizer: Tokenizer | None
    prefix_ids: tuple[int, ...] = ()
    run: RunConfig | None = None
    meta: dict = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def name(self) -> str:
        """The path, and the step of a run: for headings."""
        return f"{self.path} at step {self.step}" if self.run else str(self.path)

    def model(self) -> Decoder:
        return nnx.merge(self.graphdef, self.params)

    def encode(self, prompt: str) -> np.ndarray:
        """A prompt's ids, begun as this model's texts begin; never empty. Raises CheckpointError without tokenizer."""
        if self.tokenizer is None:
            raise CheckpointError(f"{self.path}: has no tokenizer.json; put the model's beside its weights")
        ids = np.concatenate([np.array(self.prefix_ids, np.int32), self.tokenizer.encode(prompt)])
        return ids if len(ids) else np.array([self.tokenizer.bos_id], np.int32)


class Loaded(NamedTuple):
    """A model and its tokenizer. The model is a pytree that holds its parameters: `jax.grad` and `jax.jit` take it
    as it is, and `flax.nnx.split(model)` gives them apart."""

    model: Decoder
    tokenizer: Tokenizer | None


def load(path: str | Path, *, mesh: Mesh | None = None, dtype: str = "", step: int = 0) -> Loaded:
    """(model, tokenizer) of a run folder, a Hugging Face folder or a GGUF file.

    mesh: the weights are split over it as in training; None: whole, on the first device. dtype: of weights and
    activations, "float32" or "bfloat16" (logits are float32 always); "" is float32, but activations of a run are what
    they were in training. step: of a run; 0 for the newest checkpoint. Raises ConfigError where the path is none of
    the three, CheckpointError for what cannot be read.
    """
    opened = open_model(path, mesh=mesh, dtype=dtype, step=step)
    return Loaded(opened.model(), opened.tokenizer)


def open_model(path: str | Path, *, mesh: Mesh | None = None, dtype: str = "", step: int = 0) -> Opened:
    """What `load` gives, in the parts that compiled programs take. The arguments and errors are those of `load`."""
    try:
        path = Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such user; write the path out") from None
    if dtype and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    kind = what_is(path)
    if kind == "run":
        return open_run(path, mesh=mesh, dtype=dtype, step=step)
    if step:
        raise ConfigError(f"step={step}: {path} is no training run, so it has no steps")
    dtype = dtype or "float32"
    if kind == "gguf":
        config, params, tokenizer = read_gguf(path, dtype=jnp.dtype(dtype), mesh=mesh)
    else:
        config, params = read_hf(path, dtype=jnp.dtype(dtype), mesh=mesh)
        tokenizer = load_tokenizer(str(path)) if (path / "tokenizer.json").is_file() else None
    build = functools.partial(Decoder, config, compute=ComputeConfig(dtype=dtype))
    return Opened(path, config, graphdef(build), params, mesh, tokenizer, tokenizer.prefix_ids if tokenizer else ())


def initial_params(path: str, config: DecoderConfig, tokenizer: Tokenizer, mesh: Mesh) -> dict:
    """The weights that a run begins with, for a model and a tokenizer that are the run's.

    Raises ConfigError with every field in which the models differ (max_seq_len may, where no weight depends on it),
    or where the tokenizers do.
    """
    opened = open_model(path, mesh=mesh)
    here, there = dataclasses.asdict(families.meaning(config)), dataclasses.asdict(families.meaning(opened.config))
    if config.positions == "rope":
        here["max_seq_len"] = there["max_seq_len"]
    problems = [f"model.{name}={here[name]!r}: the model of init_from={path!r} has {there[name]!r}; set it to that"
                for name in here if here[name] != there[name]]
    if opened.tokenizer is not None and opened.tokenizer.fingerprint != tokenizer.fingerprint:
        problems.append(f"data.tokenizer gives {tokenizer.name} ({tokenizer.vocab_size:,} tokens), and the model of "
                        f"init_from={path!r} knows {opened.tokenizer.name} ({opened.tokenizer.vocab_size:,}); set "
                        "data.tokenizer to its folder (of a GGUF file, after `lmjax export`)")
    if problems:
        raise ConfigError(*problems)
    return opened.params


def what_is(path: Path) -> str:
    """"run", "hf" or "gguf". Raises ConfigError that says what was looked for."""
    if path.is_file():
        if is_gguf(path):
            return "gguf"
        if path.suffix in PICKLES:
            raise ConfigError(f"{path}: is not read, because {path.suffix} files can run code when opened; save the "
                              "model with save_pretrained(folder), which writes safetensors, and give the folder")
        if path.suffix == ".safetensors":
            raise ConfigError(f"{path}: give the folder that holds it and its config.json")
        raise ConfigError(f"{path}: is not a GGUF file; give one, or the folder of a run or of a Hugging Face model")
    if (path / "config.json").is_file():
        # A run's config.json is a RunConfig; a Hugging Face model's names its model_type.
        return "hf" if "model_type" in read_json(path / "config.json") else "run"
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; give a run folder, the folder of a Hugging Face model, or "
                          "a GGUF file (models are not downloaded)")
    raise ConfigError(f"{path}: not a model: looked for config.json (a run, or a Hugging Face model with {SINGLE} or "
                      f"{INDEX}), and it is no GGUF file")


def open_run(folder: str | Path, *, mesh: Mesh | None = None, dtype: str = "", step: int = 0) -> Opened:
    """The newest or the given checkpoint of a run. It does not matter on which mesh it was trained.

    The arguments are those of `load`. Raises ConfigError for a
    folder that is not a run, CheckpointError where there is no such checkpoint.
    """
    folder = Path(folder)
    config = read_run_config(folder)
    bad = config.model.problems() + config.compute.problems()
    if not config.model.vocab_size:
        bad.append("model.vocab_size=0: a run saves the size that it took from its tokenizer")
    if bad:
        raise ConfigError(*(f"{folder / 'config.json'}: {problem}; not a run's, or damaged: restore it from a copy"
                            for problem in bad))
    build = functools.partial(Decoder, config.model, compute=ComputeConfig(dtype=dtype) if dtype else config.compute)
    params = abstract_params(build)
    whole = SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda _: whole, params) if mesh is None else shardings(params, mesh)
    with Checkpoints(folder / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{folder}: has no complete checkpoint yet; train it first")
        if step and step not in steps:
            raise CheckpointError(f"{folder}: has no checkpoint of step {step}; it has {steps}")
        step = step or steps[0]
        params = checkpoints.restore(step, {"params": abstract(params, placed)})["params"]
        meta = checkpoints.meta(step)
    if dtype:
        params = jax.tree.map(lambda weight: weight.astype(dtype), params)
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    # In training every document begins with bos, whatever the tokenizer's maker did.
    return Opened(folder, config.model, graphdef(build), params, mesh, tokenizer, (tokenizer.bos_id,), config, meta)
