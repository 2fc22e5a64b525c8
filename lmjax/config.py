"""The config of a run: one tree of typed dataclasses, from a Python or JSON file plus dotted overrides.

    # configs/example.py
    from lmjax.config import *
    def get_config() -> RunConfig: ...

A config file follows ml_collections' convention (a function get_config), so it also works with
`ml_collections.config_flags`; paths such as `data.sources[0].path` are its `config_path`s. What lives here:
loading, overriding, checking types and fields against each other. Each section's own dataclass stands beside
the code that uses it. Every problem is found before the first one is reported.

A .py config is code and is executed: run only what you trust. The JSON form, as in RUN/config.json, is data.
"""

import ast
import dataclasses
import difflib
import importlib.util
import re
import typing
from pathlib import Path
from typing import Any

import jax
from ml_collections.config_flags import config_path

from lmjax.axes import MeshConfig, abstract_mesh, batch_ways
from lmjax.checkpoint import CheckpointConfig
from lmjax.data import CanaryConfig, DataConfig, Injection, Protect, SourceConfig, Tokenizer
from lmjax.data.inject import room_problems
from lmjax.decode.generate import SampleConfig
from lmjax.errors import ConfigError
from lmjax.guard import GuardConfig
from lmjax.log import LogConfig
from lmjax.losses.goldfish import GoldfishConfig, equal_steps
from lmjax.models import ComputeConfig, DecoderConfig, MoEConfig, RopeScaling, preset
from lmjax.nn.context import context_problem
from lmjax.nn.pipeline import pipeline_problems
from lmjax.objectives.pretrain import PretrainConfig
from lmjax.optim import OptimConfig
from lmjax.phases import LimitsConfig
from lmjax.plain import build, not_finite, problems, read_json, shown

__all__ = [
    "CanaryConfig", "CheckpointConfig", "ComputeConfig", "DataConfig", "DecoderConfig", "EvalConfig",
    "GoldfishConfig", "GuardConfig", "LimitsConfig", "LogConfig", "MeshConfig", "MoEConfig", "OptimConfig",
    "PretrainConfig", "RopeScaling", "RunConfig", "SampleConfig", "SourceConfig", "preset",
]


@dataclasses.dataclass
class EvalConfig:
    """every: steps between evaluations on the validation split (also at step 0 and at the end); 0 never.
    batches: at most so many; 0 for the whole split. prompts: texts to continue, at each evaluation; on a CPU not with
    random weights."""

    every: int = 500
    batches: int = 0
    prompts: tuple[str, ...] = ()
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def problems(self, prefix: str = "evals") -> list[str]:
        bad = [f"{prefix}.{name}={getattr(self, name)}: must not be negative" for name in ("every", "batches")
               if getattr(self, name) < 0]
        return bad + self.sample.problems(f"{prefix}.sample")


CPU_TOKENS = 2048  # of a micro-batch on a CPU: more do not stay near its caches, fewer are slower (docs/performance.md)


@dataclasses.dataclass
class RunConfig:
    """One training run. Its folder is run_root/name; the same command continues it."""

    name: str = "run"
    run_root: str = "runs"
    steps: int = 1000
    batch_size: int = 8  # rows of the global batch
    seq_len: int = 512  # tokens of a row
    accumulate: int = 0  # micro-batches that a step is cut into, to save memory; 0: `micro_batches` chooses
    seed: int = 0
    init_from: str = ""  # initial weights: a run folder, a Hugging Face folder or a GGUF file; "": random ones
    model: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    objective: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    evals: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    limits: LimitsConfig = dataclasses.field(default_factory=LimitsConfig)

    @property
    def folder(self) -> Path:
        return Path(self.run_root) / self.name

    @property
    def total_steps(self) -> int:
        """Steps of the run: `steps`, or more with objective.goldfish.equal_supervised."""
        fish = self.objective.goldfish
        return equal_steps(fish, self.steps, self.protected_share) if fish.equal_supervised else self.steps

    def micro_batches(self, devices: int, platform: str | None = None) -> tuple[int, str]:
        """(how many a step is cut into, reason) on so many devices of a platform, by default this process's. Where
        `accumulate` leaves the choice, more than one only if their sum is the whole batch's to rounding, as a balance
        of experts and a mask drawn anew are not."""
        if self.accumulate:
            return self.accumulate, "set by accumulate"
        if (platform or jax.default_backend()) != "cpu" or devices > 1:
            return 1, "the batch at once"
        if self.model.moe or self.objective.goldfish.strategy == "random":
            return 1, "the batch at once: experts are balanced, or targets drawn, in each"
        most = min(self.batch_size, self.batch_size * self.seq_len // CPU_TOKENS, 1024)  # a short search
        parts = next((n for n in range(most, 1, -1) if self.batch_size % n == 0), 1)
        return parts, f"{self.batch_size // parts * self.seq_len:,} tokens each, near a CPU's caches"

    @property
    def protected_share(self) -> float:
        """The share of training rows whose source the goldfish loss may drop targets of."""
        total = sum(source.weight for source in self.data.sources)
        return sum(source.weight for source in self.data.sources if source.goldfish) / total


# ---- checks across fields ------------------------------------------------------------------------------


def validate(config: RunConfig, num_devices: int, slices: int = 1, platform: str | None = None) -> None:
    """Raises ConfigError with every problem that can be known before data and devices are touched. slices: of TPUs,
    that the devices are of. platform: "cpu", "gpu" or "tpu", where it is not this process's."""
    c, platform = config, platform or jax.default_backend()
    bad = []
    for name, low in (("steps", 1), ("batch_size", 1), ("seq_len", 1), ("accumulate", 0)):
        if not low <= getattr(c, name) < 2**31:
            bad.append(f"{name}={getattr(c, name)}: must be at least {low} and below 2^31")
    if not 0 <= c.seed < 2**32:
        bad.append(f"seed={c.seed}: must be from 0 to 2^32 - 1")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", c.name):
        bad.append(f"name={c.name!r}: it names a folder; use letters, digits, '.', '_' and '-'")
    mesh_problems = c.mesh.problems(num_devices, slices=slices)
    bad += (c.model.problems() + c.compute.problems() + c.objective.problems() + c.data.problems("data.")
            + c.optim.problems(c.steps) + mesh_problems + c.evals.problems() + c.checkpoint.problems()
            + c.log.problems("log") + c.guard.problems() + c.limits.problems())
    if c.seq_len > c.model.max_seq_len:
        bad.append(f"seq_len={c.seq_len} is longer than model.max_seq_len={c.model.max_seq_len}; "
                   "shorten the rows or raise model.max_seq_len")
    if c.objective.goldfish.strategy in ("hash", "hash_table") and c.objective.goldfish.context >= c.seq_len:
        bad.append(f"objective.goldfish.context={c.objective.goldfish.context}: must be shorter than "
                   f"seq_len={c.seq_len}, or nothing is ever dropped")
    if c.compute.attention == "cudnn":
        needs = {"an NVIDIA GPU": platform == "gpu",
                 "compute.dtype=bfloat16": c.compute.dtype == "bfloat16",
                 "model.attention_softcap=0": not c.model.attention_softcap}
        bad += [f"compute.attention='cudnn' needs {need}; use 'auto'" for need, met in needs.items() if not met]
    if c.compute.attention == "splash":
        needs = {"a TPU": platform == "tpu", "seq_len to be a multiple of 128": c.seq_len % 128 == 0}
        bad += [f"compute.attention='splash' needs {need}; use 'auto'" for need, met in needs.items() if not met]
    if "://" in c.run_root:
        bad.append(f"run_root={c.run_root!r}: must be a folder of this machine, not an address")
    if c.evals.prompts and c.evals.sample.max_new_tokens >= c.model.max_seq_len:
        bad.append(f"evals.sample.max_new_tokens={c.evals.sample.max_new_tokens}: a prompt and its new tokens must "
                   f"fit into model.max_seq_len={c.model.max_seq_len}; lower it")
    if c.evals.every and not c.data.validation_fraction and any(s.kind != "shards" for s in c.data.sources):
        bad.append("data.validation_fraction=0 holds nothing out to evaluate on; raise it, or set evals.every=0")
    canaries = c.data.canaries
    if canaries and c.steps > 0 and c.batch_size > 0 and not c.data.problems() and not c.objective.problems():
        bad += room_problems(canaries, c.total_steps, c.batch_size, "data.canaries.")
    bad += [f"{name}={value}: must be a finite number" for name, value in not_finite(c)
            if not any(problem.startswith(f"{name}=") for problem in bad)]
    if not mesh_problems and not c.model.problems():
        bad += _mesh_problems(c, num_devices)
    if bad:
        raise ConfigError(*bad)


def _mesh_problems(c: RunConfig, num_devices: int) -> list[str]:
    """What the mesh must divide."""
    mesh = abstract_mesh(c.mesh, num_devices)
    model, ways, micro = c.model.filled(), batch_ways(mesh), max(c.accumulate, 1)
    bad = []
    if c.batch_size > 0 and c.batch_size % (ways * micro):
        bad.append(f"batch_size={c.batch_size} must be a multiple of {ways * micro}: replica x data x fsdp x "
                   f"expert = {ways} parts x accumulate={micro} micro-batches")
    moe = model.moe
    widths = {"moe.d_ff": moe.d_ff, "moe.shared_d_ff": moe.shared_d_ff} if moe else {"d_ff": model.d_ff}
    for axis, sizes in (("tensor", {"num_heads": model.num_heads, **widths}), ("fsdp", {"d_model": model.d_model}),
                        ("expert", {"moe.num_experts": moe.num_experts} if moe else {})):
        for name, size in sizes.items():
            if size % mesh.shape[axis]:
                bad.append(f"mesh.{axis}={mesh.shape[axis]} does not divide model.{name}={size}; "
                           "choose sizes that do")
    context = mesh.shape["context"]
    if c.seq_len > 0 and (problem := context_problem(c.seq_len, context)):
        bad.append(problem)
    if context > 1 and c.compute.attention in ("reference", "splash", "cudnn"):
        bad.append(f"compute.attention={c.compute.attention!r} does not split rows over mesh.context={context}; use "
                   "'auto', or mesh.context=1")
    split = mesh.shape["fsdp"] * mesh.shape["expert"]
    if mesh.shape["expert"] > 1 and model.d_model % split and not model.d_model % mesh.shape["fsdp"]:
        bad.append(f"mesh.fsdp x mesh.expert={split} does not divide model.d_model={model.d_model}: outside of the "
                   "experts both split it; choose sizes that do")
    if not bad and not c.compute.problems() and c.batch_size > 0:
        bad += pipeline_problems(c.batch_size // (ways * micro), model.num_layers,
                                 min(len(model.windows), model.num_layers), mesh.shape["pipeline"],
                                 c.compute.pipeline_repeats, c.compute.pipeline_microbatches)
    if mesh.shape["expert"] > 1 and not moe:
        bad.append(f"mesh.expert={mesh.shape['expert']}: the model has no experts; set model.moe, or mesh.fsdp to it")
    return bad


def protection(c: RunConfig) -> Protect | None:
    """What the data pipeline has to add to batches for the goldfish loss; None for nothing."""
    fish, sources = c.objective.goldfish, tuple(source.goldfish for source in c.data.sources)
    if fish.strategy == "none" or (fish.strategy != "text_hash" and all(sources)):
        return None
    return Protect(sources, fish.strategy == "text_hash", fish.context, fish.seed)


def injection(c: RunConfig, tokenizer: Tokenizer) -> Injection | None:
    """The canaries of a run; None for none. Raises ConfigError where they do not fit."""
    if c.data.canaries is None:
        return None
    return Injection(c.data.canaries, tokenizer, c.total_steps, c.batch_size, c.seq_len, protection(c))


def ignored(c: RunConfig) -> list[str]:
    """Settings that have no effect in this config, one line each; a run warns of them."""
    fish, default = c.objective.goldfish, GoldfishConfig()
    when = ("start", "k_final", "anneal_steps", "equal_supervised")
    uses = {"none": (), "hash": ("k", "context", "seed", *when), "text_hash": ("k", "context", "seed", *when),
            "hash_table": ("k", "context", *when), "static": ("k", *when), "random": ("k", *when)}[fish.strategy]
    found = [f"objective.goldfish.{name}={getattr(fish, name)} has no effect with strategy={fish.strategy!r}"
             for name in ("k", "context", "seed", *when)
             if name not in uses and getattr(fish, name) != getattr(default, name)]
    if fish.strategy == "none":
        found += [f"data.sources[{i}].goldfish=False has no effect with strategy='none'"
                  for i, source in enumerate(c.data.sources) if not source.goldfish]
    elif not any(source.goldfish for source in c.data.sources) and not c.data.canaries:
        found.append(f"objective.goldfish.strategy={fish.strategy!r} has no effect: no source has goldfish=True")
    if fish.strategy != "none" and fish.start >= c.total_steps:
        found.append(f"objective.goldfish.start={fish.start}: the run has {c.total_steps} steps, so nothing is ever "
                     "dropped")
    if len(c.model.windows) > c.model.num_layers:
        found.append(f"model.windows has {len(c.model.windows)} entries for {c.model.num_layers} layers; the last "
                     "ones have no effect")
    if c.model.rope_scaling and (c.model.positions != "rope" or all(c.model.windows)):
        found.append("model.rope_scaling has no effect: no layer without a window has rotary positions")
    if c.optim.schedule != "wsd" and c.optim.decay_fraction != OptimConfig().decay_fraction:
        found.append(f"optim.decay_fraction has no effect with schedule={c.optim.schedule!r}")
    if c.compute.context != "auto" and c.mesh.context == 1:
        found.append(f"compute.context={c.compute.context!r} has no effect with mesh.context=1")
    found += [f"compute.{name}={getattr(c.compute, name)} has no effect with mesh.pipeline=1"
              for name in ("pipeline_microbatches", "pipeline_repeats")
              if c.mesh.pipeline == 1 and getattr(c.compute, name) != getattr(ComputeConfig(), name)]
    if c.mesh.zero1 and c.mesh.data == 1:
        found.append("mesh.zero1 has no effect with mesh.data=1: there is nothing to split the optimizer's state over")
    if c.model.moe is None:
        for section, name, default in (("objective", "router_balance", PretrainConfig()),
                                       ("objective", "router_z", PretrainConfig()),
                                       ("compute", "experts", ComputeConfig())):
            value = getattr(getattr(c, section), name)
            if value != getattr(default, name):
                found.append(f"{section}.{name}={value} has no effect: the model has no experts (model.moe)")
    elif c.model.moe.d_ff and c.model.d_ff:
        found.append(f"model.d_ff={c.model.d_ff} has no effect: every layer's MLP is model.moe, whose d_ff is "
                     f"{c.model.moe.d_ff}")
    if c.optim.balance_rate != OptimConfig().balance_rate and not (c.model.moe and c.model.moe.balance):
        found.append(f"optim.balance_rate={c.optim.balance_rate} has no effect without model.moe.balance")
    if not c.evals.every and c.evals.prompts:
        found.append("evals.prompts have no effect with evals.every=0")
    return found


def fit_vocabulary(config: RunConfig, tokenizer_name: str, vocab_size: int) -> RunConfig:
    """The config with model.vocab_size set (0: the tokenizer's, rounded up to a multiple of 64).

    Raises ConfigError where the model's vocabulary is smaller than the tokenizer's.
    """
    have = config.model.vocab_size
    if have == 0:
        model = dataclasses.replace(config.model, vocab_size=-(-vocab_size // 64) * 64)
        return dataclasses.replace(config, model=model)
    if have < vocab_size:
        raise ConfigError(f"model.vocab_size={have} is smaller than the {vocab_size} tokens of data.tokenizer="
                          f"{tokenizer_name!r}; raise it, or set 0 to take the tokenizer's")
    return config


# ---- loading and overriding ----------------------------------------------------------------------------


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The RunConfig of a Python or JSON file, with overrides such as `--model.d_model=512` applied. A .py file is
    executed; of a .json file, such as RUN/config.json, nothing is.

    Raises ConfigError for a missing file, a file without get_config, unknown or repeated keys (with the
    nearest name) and wrong types; all of them at once.
    """
    path = Path(path)
    config = from_json(read_json(path), str(path)) if path.suffix == ".json" and path.is_file() else _run_file(path)
    bad, seen = [], set()
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        if not equals:
            bad.append(f"{override!r}: an override is --key=value, such as --steps=100")
        elif key in seen:
            bad.append(f"--{key} is given twice; give it once")
        else:
            seen.add(key)
            bad += _override(config, key, text)
    bad += _type_problems(config, "")
    if bad:
        raise ConfigError(*bad)
    return config


def _run_file(path: Path) -> RunConfig:
    if path.suffix != ".py" or not path.is_file():
        beside = [p.name for ending in ("*.py", "*.json") for p in path.parent.glob(ending)]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give a .py file, see configs/, or a .json one"
        raise ConfigError(f"{path}: no such config file{hint}")
    spec = importlib.util.spec_from_file_location("lmjax_run_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever a user's own code raises
        raise ConfigError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}; a config file defines "
                          "get_config() -> RunConfig with the fields of lmjax.config") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not a RunConfig")
    return config


def _names(config: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a config."""
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        names.append(name)
        if dataclasses.is_dataclass(value):
            names += _names(value, name + ".")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                names += _names(item, f"{name}[{i}].") if dataclasses.is_dataclass(item) else []
    return names


def _override(config: RunConfig, key: str, text: str) -> list[str]:
    """Sets one key from text; returns the problems."""
    names = _names(config)
    if key not in names:
        by_last = [n for n in names if n.rpartition(".")[2] == key.rpartition(".")[2]]
        near = by_last[:1] or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        return [f"--{key}: no such key" + (f"; did you mean --{near[0]}?" if near else "; see --dry-run")]
    wanted = config_path.get_type(key, config, normalize=False)
    if dataclasses.is_dataclass(wanted):
        return [f"--{key} is a section; set one of its fields, such as --{key}."
                f"{dataclasses.fields(wanted)[0].name}=…"]
    try:
        value = _parse(text, wanted)
    except ValueError as error:
        return [f"--{key}={text}: {error}"]
    config_path.set_value(key, config, value)
    return []


def _parse(text: str, wanted: Any) -> Any:
    """Text as a value of the wanted type. Raises ValueError that says what was expected."""
    if wanted is str:
        return text
    if wanted is bool:
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in values:
            raise ValueError("expected true or false")
        return values[text.lower()]
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            raise ValueError(f"expected {'a whole number' if wanted is int else 'a number'}") from None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if typing.get_origin(wanted) is tuple and not isinstance(value, (tuple, list)):
        value = (value,)
    try:
        return build(value, wanted)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _type_problems(config: Any, prefix: str) -> list[str]:
    """Wrong types anywhere in a config that Python code has built."""
    bad = []
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        try:
            built = build(value, hints[field.name])
        except TypeError as error:
            bad.append(f"{name}={shown(value)}: {error}")
            continue
        if dataclasses.is_dataclass(value):
            bad += _type_problems(value, name + ".")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                bad += _type_problems(item, f"{name}[{i}].") if dataclasses.is_dataclass(item) else []
        elif built is not value and type(value) is int:
            setattr(config, field.name, built)  # an int where a float is meant
    return bad


def to_json(config: RunConfig) -> dict:
    """Nested plain dictionaries, as written to config.json and into checkpoints."""
    return dataclasses.asdict(config)


def from_json(value: Any, where: str) -> RunConfig:
    """The inverse of to_json. Raises ConfigError naming `where`, with every problem."""
    if bad := problems(value, RunConfig):
        raise ConfigError(*(f"{where}: {problem}" for problem in bad))
    return build(value, RunConfig)


def read_run_config(folder: Path) -> RunConfig:
    """The resolved config of a run folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: not a run folder (it has no config.json); give one below runs/")
    return from_json(read_json(path), str(path))
