"""Finished (or running) runs and models of others, put to use: evaluated, asked to write, or exported.

Opening them is `lmjax.interop.load`. Nothing is ever written into a run folder.
"""

import gzip
from pathlib import Path

import jax
import numpy as np

from lmjax.axes import MeshConfig, make_mesh
from lmjax.data import Corpus, prepare_all, validation_batches
from lmjax.decode.write import TextRequest, write
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
    for note in corpus.notes:
        if note.startswith("warning"):
            print(note)
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


def generate_from_run(path: str, request: TextRequest, step: int, draft: str = "") -> None:
    """Prints continuations of the prompts by a run, a Hugging Face folder or a GGUF file, with its own tokenizer.
    draft: a model, of any of these kinds, that proposes.

    Raises ConfigError where settings do not go together or the two tokenizers differ.
    """
    if problems := request.problems(bool(draft)):
        raise ConfigError(*problems)
    opened = open_model(path, mesh=all_devices(), step=step)
    ids = [opened.encode(prompt) for prompt in request.prompts]
    small = open_model(draft, mesh=opened.mesh) if draft else None
    if small and (small.tokenizer is None or small.tokenizer.fingerprint != opened.tokenizer.fingerprint):
        raise ConfigError(f"--draft {draft}: its tokenizer is not that of {path}; a draft model must share the "
                          "vocabulary")

    def say(text: str) -> None:
        print(printable(text), end="", flush=True)

    say(f"--- {opened.name} ---\n")
    with jax.set_mesh(opened.mesh):
        write(request, opened.graphdef, opened.params, opened.tokenizer, ids, say,
              (small.graphdef, small.params) if small else None)


def export(path: str, out: str, dtype: str, max_shard_bytes: int, step: int) -> None:
    """Writes a model as a Hugging Face folder. Raises CheckpointError as `write_hf` does."""
    opened = open_model(path, mesh=all_devices(), step=step)
    folder = write_hf(out, opened.config, opened.params, opened.tokenizer, dtype=dtype,
                      max_shard_bytes=max_shard_bytes, add_bos=bool(opened.prefix_ids))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{opened.name}: written to {folder} ({format_bytes(size)} in {dtype})")
