"""Finished (or running) runs and models of others, put to use: evaluated, asked to write, or exported.

Opening them is `lmjax.interop.load`. Nothing is ever written into a run folder.
"""

import gzip
from pathlib import Path

import jax
import numpy as np

from lmjax.axes import MeshConfig, make_mesh
from lmjax.data import Corpus, prepare_all, validation_batches
from lmjax.decode.generate import SampleConfig, generate
from lmjax.errors import ConfigError, DataError
from lmjax.evals.perplexity import evaluate, make_eval_step
from lmjax.interop.hf import write_hf
from lmjax.interop.load import open_model, open_run, what_is
from lmjax.log import format_bytes, printable


def all_devices() -> jax.sharding.Mesh:
    """Weights split over every device here."""
    return make_mesh(MeshConfig(data=1, fsdp=-1))


def evaluate_run(folder: str, batches: int, step: int) -> None:
    """Prints the held-out numbers of a run. Raises DataError where its corpus is no longer what it was."""
    if (kind := what_is(Path(folder))) != "run":
        raise ConfigError(f"{folder}: is no training run ({kind}), so it held no data out; measure it with lm-eval, "
                          "see docs/interop.md")
    opened = open_run(folder, mesh=all_devices(), step=step)
    corpus = prepare_all(opened.run.data)
    if corpus.fingerprint != opened.meta["corpus"]["fingerprint"]:
        raise DataError(f"{folder}: was trained on other data than data.sources give now (fingerprint "
                        f"{opened.meta['corpus']['fingerprint'][:12]}, now {corpus.fingerprint[:12]}); bring the old "
                        "files or Python version back")
    vocab_size = opened.config.vocab_size
    table = np.pad(corpus.tokenizer.token_bytes(), (0, vocab_size - corpus.tokenizer.vocab_size))
    size = -(-opened.run.batch_size // opened.mesh.size) * opened.mesh.size
    with jax.set_mesh(opened.mesh):
        values = evaluate(make_eval_step(opened.graphdef, table), opened.params,
                          validation_batches(corpus, size, opened.run.seq_len, batches), opened.mesh, size)
    print(f"{opened.name}: validation loss {values['loss']:.4f} nats/token, perplexity "
          f"{values['perplexity']:.4g}, {values['bits_per_byte']:.4f} bits/byte "
          f"({values['tokens']:,} tokens, {values['bytes']:,} bytes)")
    if not batches:
        text = held_out_text(corpus)
        print(f"gzip -9 of the same text: {8 * len(gzip.compress(text, 9)) / len(text):.4f} bits/byte")


def held_out_text(corpus: Corpus) -> bytes:
    """The held-out documents one after another, at most the first 64 million tokens of each source."""
    return "".join(corpus.tokenizer.decode(tokens.read(0, min(len(tokens), 64_000_000))[0])
                   for tokens in corpus.tokens("validation")).encode()


def generate_from_run(path: str, prompts: list[str], sample: SampleConfig, seed: int, step: int) -> None:
    """Prints continuations of the prompts by a run, a Hugging Face folder or a GGUF file, with its own tokenizer."""
    problems = sample.problems("generate")
    if not 0 <= seed < 2**32:
        problems.append(f"--seed {seed}: must be from 0 to 2^32 - 1")
    if problems:
        raise ConfigError(*problems)
    opened = open_model(path, mesh=all_devices(), step=step)
    ids = [opened.encode(prompt) for prompt in prompts]
    tokenizer = opened.tokenizer
    longest = max(len(p) for p in ids) + sample.max_new_tokens
    if longest > opened.config.max_seq_len:
        raise DataError(f"prompt and new tokens make {longest} tokens, and model.max_seq_len is "
                        f"{opened.config.max_seq_len}; shorten the prompt or lower --max-new-tokens")
    with jax.set_mesh(opened.mesh):
        outs = generate(opened.graphdef, opened.params, ids, sample, key=jax.random.key(seed),
                        vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    for prompt, out in zip(prompts, outs, strict=True):
        print(f"--- {opened.name} ---\n{printable(prompt + tokenizer.decode(out))}")


def export(path: str, out: str, dtype: str, max_shard_bytes: int, step: int) -> None:
    """Writes a model as a Hugging Face folder. Raises CheckpointError as `write_hf` does."""
    opened = open_model(path, mesh=all_devices(), step=step)
    folder = write_hf(out, opened.config, opened.params, opened.tokenizer, dtype=dtype,
                      max_shard_bytes=max_shard_bytes, add_bos=bool(opened.prefix_ids))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{opened.name}: written to {folder} ({format_bytes(size)} in {dtype})")
