"""Finished (or running) runs, opened for use: evaluated, or asked to write.

Reads a run folder and never writes into it.
"""

import dataclasses
import functools
import gzip
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lmjax.axes import MeshConfig, make_mesh
from lmjax.checkpoint import CheckpointConfig, Checkpoints, abstract
from lmjax.config import RunConfig, read_run_config
from lmjax.data import Corpus, load_tokenizer, prepare_all, validation_batches
from lmjax.decode.generate import SampleConfig, generate
from lmjax.errors import CheckpointError, ConfigError, DataError
from lmjax.evals.perplexity import evaluate, make_eval_step
from lmjax.log import printable
from lmjax.models import Decoder
from lmjax.state import abstract_params, graphdef, shardings


@dataclasses.dataclass
class Opened:
    """The weights of one checkpoint of a run, on all devices here, and what is needed to use them."""

    folder: Path
    config: RunConfig
    graphdef: nnx.GraphDef
    params: dict
    meta: dict
    mesh: jax.sharding.Mesh

    @property
    def step(self) -> int:
        return self.meta["step"]


def open_run(folder: str | Path, step: int = 0) -> Opened:
    """The newest or the given checkpoint of a run. It does not matter on which mesh it was trained.

    Raises ConfigError for a folder that is not a run, CheckpointError where there is no such checkpoint.
    """
    folder = Path(folder)
    config = read_run_config(folder)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    build = functools.partial(Decoder, config.model, compute=config.compute)
    params = abstract_params(build)
    like = {"params": abstract(params, shardings(params, mesh))}
    with Checkpoints(folder / "checkpoints", CheckpointConfig(), read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{folder}: has no complete checkpoint yet; train it first")
        if step and step not in steps:
            raise CheckpointError(f"{folder}: has no checkpoint of step {step}; it has {steps}")
        step = step or steps[0]
        return Opened(folder, config, graphdef(build), checkpoints.restore(step, like)["params"],
                      checkpoints.meta(step), mesh)


def evaluate_run(folder: str, batches: int, step: int) -> None:
    """Prints the held-out numbers of a run. Raises DataError where its corpus is no longer what it was."""
    run = open_run(folder, step)
    corpus = prepare_all(run.config.data)
    if corpus.fingerprint != run.meta["corpus"]["fingerprint"]:
        raise DataError(f"{folder}: was trained on other data than data.sources give now (fingerprint "
                        f"{run.meta['corpus']['fingerprint'][:12]}, now {corpus.fingerprint[:12]}); bring the old "
                        "files or Python version back")
    vocab_size = run.config.model.vocab_size
    table = np.pad(corpus.tokenizer.token_bytes(), (0, vocab_size - corpus.tokenizer.vocab_size))
    size = -(-run.config.batch_size // run.mesh.size) * run.mesh.size
    with jax.set_mesh(run.mesh):
        values = evaluate(make_eval_step(run.graphdef, table), run.params,
                          validation_batches(corpus, size, run.config.seq_len, batches), run.mesh, size)
    print(f"{folder} at step {run.step}: validation loss {values['loss']:.4f} nats/token, perplexity "
          f"{values['perplexity']:.4g}, {values['bits_per_byte']:.4f} bits/byte "
          f"({values['tokens']:,} tokens, {values['bytes']:,} bytes)")
    if not batches:
        text = held_out_text(corpus)
        print(f"gzip -9 of the same text: {8 * len(gzip.compress(text, 9)) / len(text):.4f} bits/byte")


def held_out_text(corpus: Corpus) -> bytes:
    """The held-out documents one after another, at most the first 64 million tokens of each source."""
    return "".join(corpus.tokenizer.decode(tokens.read(0, min(len(tokens), 64_000_000))[0])
                   for tokens in corpus.tokens("validation")).encode()


def generate_from_run(folder: str, prompts: list[str], sample: SampleConfig, seed: int, step: int) -> None:
    """Prints continuations of the prompts, with the tokenizer that the run kept."""
    problems = sample.problems("generate")
    if not 0 <= seed < 2**32:
        problems.append(f"--seed {seed}: must be from 0 to 2^32 - 1")
    if problems:
        raise ConfigError(*problems)
    run = open_run(folder, step)
    tokenizer = load_tokenizer(str(run.folder / "tokenizer.json"))
    ids = [np.concatenate([[tokenizer.bos_id], tokenizer.encode(p)]) for p in prompts]
    longest = max(len(p) for p in ids) + sample.max_new_tokens
    if longest > run.config.model.max_seq_len:
        raise DataError(f"prompt and new tokens make {longest} tokens, and model.max_seq_len is "
                        f"{run.config.model.max_seq_len}; shorten the prompt or lower --max-new-tokens")
    with jax.set_mesh(run.mesh):
        outs = generate(run.graphdef, run.params, ids, sample, key=jax.random.key(seed),
                        vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    for prompt, out in zip(prompts, outs, strict=True):
        print(f"--- {folder} at step {run.step} ---\n{printable(prompt + tokenizer.decode(out))}")
