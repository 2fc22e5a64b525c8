"""Finished (or running) runs, opened for use: evaluated, or asked to write.

Reads a run folder and never writes into it.
"""

import functools
from pathlib import Path

import jax
import numpy as np

from lmjax.axes import MeshConfig, make_mesh
from lmjax.checkpoint import CheckpointConfig, Checkpoints, abstract
from lmjax.config import RunConfig, read_run_config
from lmjax.data import Tokenizer, prepare_all, validation_batches
from lmjax.decode.generate import SampleConfig, generate
from lmjax.errors import CheckpointError, ConfigError, DataError
from lmjax.evals.perplexity import evaluate, make_eval_step
from lmjax.models import Decoder
from lmjax.state import graphdef, shardings


def open_run(folder: str | Path, step: int = 0) -> tuple[RunConfig, object, dict, int, jax.sharding.Mesh]:
    """(config, graphdef, params, step, mesh) of the newest or the given checkpoint, on all devices here.

    Weights are split over as many devices as divide the model, so a run of a large mesh opens on a small one.
    """
    folder = Path(folder)
    config = read_run_config(folder)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    build = functools.partial(Decoder, config.model, compute=config.compute)
    model_def = graphdef(build)
    with Checkpoints(folder / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{folder}: has no complete checkpoint yet; train it first")
        if step and step not in steps:
            raise CheckpointError(f"{folder}: has no checkpoint of step {step}; it has {steps}")
        step = step or steps[0]
        from flax import nnx
        params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.split(build(jax.random.key(0)))[1]))
        like = {"params": abstract(params, shardings(params, mesh))}
        params = checkpoints.restore(step, like)["params"]
    return config, model_def, params, step, mesh


def run_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that a run was trained with."""
    return prepare_all(config.data).tokenizer


def evaluate_run(folder: str, batches: int, step: int) -> None:
    """Prints the held-out numbers of a run."""
    config, model_def, params, step, mesh = open_run(folder, step)
    corpus = prepare_all(config.data)
    table = np.pad(corpus.tokenizer.token_bytes(), (0, config.model.vocab_size - corpus.tokenizer.vocab_size))
    size = -(-config.batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh):
        values = evaluate(make_eval_step(model_def, table), params,
                          validation_batches(corpus, size, config.seq_len, batches), mesh)
    print(f"{folder} at step {step}: validation loss {values['loss']:.4f} nats/token, perplexity "
          f"{values['perplexity']:.4g}, {values['bits_per_byte']:.4f} bits/byte "
          f"({values['tokens']:,} tokens, {values['bytes']:,} bytes)")


def generate_from_run(folder: str, prompts: list[str], sample: SampleConfig, seed: int, step: int) -> None:
    """Prints continuations of the prompts."""
    problems = sample.problems("generate")
    if problems:
        raise ConfigError(*problems)
    config, model_def, params, step, mesh = open_run(folder, step)
    tokenizer = run_tokenizer(config)
    ids = [np.concatenate([[tokenizer.bos_id], tokenizer.encode(p)]) for p in prompts]
    longest = max(len(p) for p in ids) + sample.max_new_tokens
    if longest > config.model.max_seq_len:
        raise DataError(f"prompt and new tokens make {longest} tokens, and model.max_seq_len is "
                        f"{config.model.max_seq_len}; shorten the prompt or lower --max-new-tokens")
    with jax.set_mesh(mesh):
        outs = generate(model_def, params, ids, sample, seed=seed, vocab_size=tokenizer.vocab_size,
                        eos_id=tokenizer.eos_id)
    for prompt, out in zip(prompts, outs, strict=True):
        print(f"--- {folder} at step {step} ---\n{prompt}{tokenizer.decode(out)}")
