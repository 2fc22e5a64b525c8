"""What is asked of a model: the numbers of every token of probes and documents, and its own continuations.

What lives here: opening the models, cutting the work into batches that do not depend on what is already done, and
running them. Every number comes from `lmjax.evals.score`, every continuation from `lmjax.decode`; what follows from
them is a reduction (`lmjax.audit.summary`) and needs no pass.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from lmjax.analyze.output import Progress
from lmjax.audit.metrics import PAD
from lmjax.audit.probes import Probes
from lmjax.audit.store import Arrays, Parts
from lmjax.decode.beam import beam_search
from lmjax.decode.generate import SampleConfig, complete
from lmjax.errors import CheckpointError, ConfigError
from lmjax.evals.score import SAMPLED, Sampling, normalised, score_documents
from lmjax.evals.windows import WindowConfig
from lmjax.interop.load import Opened, open_model
from lmjax.models import Decoder
from lmjax.runs import all_devices
from lmjax.state import random_params

SUFFIX_STATS = ("surprisal", "entropy", "rank", SAMPLED)
DOCUMENT_STATS = ("surprisal", "normalised")
RANDOM, NONE = "random", "none"


# ---- models ------------------------------------------------------------------------------------------------


def open_audited(path: str, step: int) -> Opened:
    """The model, on all devices. Raises CheckpointError where it has no tokenizer."""
    opened = open_model(path, mesh=all_devices(), step=step)
    if opened.tokenizer is None:
        raise CheckpointError(f"{path}: has no tokenizer.json, so no text can be turned into its tokens; put the "
                              "model's own beside its weights")
    return opened


def open_beside(what: str, path: str, model: Opened, seed: int) -> Opened:
    """A control or a reference: another model with the same vocabulary; "random": this one, never trained, with the
    weights that the seed gives. Raises ConfigError where tokens mean something else."""
    if path == RANDOM and not Path(path).exists():
        build = functools.partial(Decoder, model.config, compute=model.model().compute)
        params = random_params(build, model.mesh, seed)
        return dataclasses.replace(model, params=params, path=Path(f"{RANDOM} weights"), run=None, meta={})
    opened = open_model(path, mesh=model.mesh)
    if opened.tokenizer is None or opened.tokenizer.fingerprint != model.tokenizer.fingerprint:
        name = "none" if opened.tokenizer is None else opened.tokenizer.name
        raise ConfigError(f"--{what} {path}: its tokenizer ({name}) is not that of {model.path} "
                          f"({model.tokenizer.name}); give a model with the same vocabulary")
    if opened.prefix_ids != model.prefix_ids:
        raise ConfigError(f"--{what} {path}: its texts begin with {list(opened.prefix_ids)}, those of {model.path} "
                          f"with {list(model.prefix_ids)}; give a model that begins texts alike")
    return opened


# ---- probes ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """sampling: scheme of (n, p)-extraction. beams: 0 for none. continued: of how many probes of each cell the model's
    continuation is written. batch_tokens: about as many are on the devices at a time."""

    sampling: Sampling = Sampling()
    beams: int = 0
    continued: int = 2**62
    batch_tokens: int = 4096


def batches(probes: Probes, work: Work) -> list[tuple[list[int], list[int]]]:
    """(indices of probes, those among them that are continued) of each batch: neighbours of equal lengths."""
    out: list[tuple[list[int], list[int]]] = []
    cells: dict[tuple[int, int], list[int]] = {}
    for index, probe in enumerate(probes.probes):
        cells.setdefault((probe.offset, probe.prefix), []).append(index)
    for (offset, prefix), indices in cells.items():
        rows = max(1, work.batch_tokens // (offset + prefix + probes.config.suffix))
        rows = 2 ** (min(rows, 64).bit_length() - 1)
        written = set(indices if work.continued >= len(indices) else
                      [indices[i * len(indices) // work.continued] for i in range(work.continued)])
        for at in range(0, len(indices), rows):
            part = indices[at:at + rows]
            out.append((part, [index for index in part if index in written]))
    return out


def probe_pass(name: str, opened: Opened, probes: Probes, work: Work, parts: Parts, beams: bool = True) -> Arrays:
    """Of every probe: SUFFIX_STATS [n, S], `written` bool [n], `greedy` int32 [n, S] (PAD where not written or after
    an end), and with beams `in_beams`, `best_beam` bool [n]. Batches that `parts` has are not computed again."""
    S, n = probes.config.suffix, len(probes.probes)
    found: Arrays = {key: np.zeros((n, S), np.int32 if key == "rank" else np.float32) for key in SUFFIX_STATS}
    found |= {"greedy": np.full((n, S), PAD, np.int32), "written": np.zeros(n, bool)}
    work = work if beams else dataclasses.replace(work, beams=0)
    if work.beams:
        found |= {"in_beams": np.zeros(n, bool), "best_beam": np.zeros(n, bool)}
    total = sum(probe.offset + probe.prefix + S for probe in probes.probes)
    progress, done = Progress(f"{name}: probes,", total), 0
    for number, (indices, written) in enumerate(batches(probes, work)):
        part = parts.get(f"{name}-probes-{number:06}")
        if part is None:
            part = parts.put(f"{name}-probes-{number:06}", _probe_batch(opened, probes, indices, written, work))
        for key in SUFFIX_STATS:
            found[key][indices] = part[key]
        found["greedy"][written], found["written"][written] = part["greedy"], True
        for key in ("in_beams", "best_beam"):
            if key in found:
                found[key][indices] = part[key]
        done += sum(probes.probes[i].offset + probes.probes[i].prefix + S for i in indices)
        progress(done)
    progress.clear()
    return found


def _probe_batch(opened: Opened, probes: Probes, indices: list[int], written: list[int], work: Work) -> Arrays:
    S = probes.config.suffix
    chosen = [probes.probes[i] for i in indices]
    suffixes = np.stack([probes.suffix(probe) for probe in chosen])
    prompts = [probes.prompt(probe, opened.prefix_ids) for probe in chosen]
    texts = [np.concatenate([prompt, suffix]) for prompt, suffix in zip(prompts, suffixes, strict=True)]
    windows = WindowConfig(len(texts[0]), 0, work.batch_tokens)
    vocab_size = opened.tokenizer.vocab_size
    with jax.set_mesh(opened.mesh):
        scored = list(score_documents(opened.graphdef, opened.params, texts, windows, mesh=opened.mesh,
                                      sampling=work.sampling))
        out = {key: np.stack([stats[key][-S:] for stats in scored]) for key in SUFFIX_STATS}
        out["greedy"] = np.full((len(written), S), PAD, np.int32)
        if written:
            rows = [prompts[indices.index(i)] for i in written]
            rows += rows[-1:] * (len(indices) - len(rows))  # few different shapes are ever compiled
            wanted = SampleConfig(max_new_tokens=S, temperature=0.0, top_p=1.0)
            for row, completion in enumerate(complete(opened.graphdef, opened.params, rows, wanted,
                                                      key=jax.random.key(0), vocab_size=vocab_size,
                                                      eos_id=opened.tokenizer.eos_id)[:len(written)]):
                out["greedy"][row, :len(completion.tokens)] = completion.tokens
        if work.beams:
            hits = []
            for prompt, suffix in zip(prompts, suffixes, strict=True):
                (best,) = beam_search(opened.graphdef, opened.params, [prompt], beams=work.beams, max_new_tokens=S,
                                      vocab_size=vocab_size, eos_id=opened.tokenizer.eos_id, length_penalty=0.0)
                hits.append([np.array_equal(beam.tokens, suffix) for beam in best])
            out["in_beams"], out["best_beam"] = np.array([any(h) for h in hits]), np.array([h[0] for h in hits])
    return out


# ---- documents ---------------------------------------------------------------------------------------------


def document_pass(name: str, opened: Opened, documents: Sequence[np.ndarray], windows: WindowConfig, parts: Parts,
                  before: Sequence[int] = ()) -> list[dict[str, np.ndarray]]:
    """Of each document's tokens, DOCUMENT_STATS: of all of them where texts begin with something, else of those from
    the second on. before: ids that every document is read after, which are not counted."""
    begins = np.asarray(opened.prefix_ids, np.int32)
    texts = [np.concatenate([begins, np.asarray(before, np.int32), ids]).astype(np.int32) for ids in documents]
    skip = max(len(begins) - 1, 0) + len(before)
    found: list[dict[str, np.ndarray]] = []
    progress, done = Progress(f"{name}: documents,", sum(map(len, texts))), 0
    for number, group in enumerate(_groups(texts, 4 * windows.batch_tokens)):
        part = parts.get(f"{name}-documents-{number:06}")
        if part is None:
            with jax.set_mesh(opened.mesh):
                scored = list(score_documents(opened.graphdef, opened.params, [texts[i] for i in group], windows,
                                              mesh=opened.mesh))
            for stats in scored:
                stats["normalised"] = normalised(stats)
            part = parts.put(f"{name}-documents-{number:06}",
                             {key: np.concatenate([stats[key] for stats in scored]) for key in DOCUMENT_STATS})
        ends = np.cumsum([len(texts[i]) - 1 for i in group])
        for i, end in zip(group, ends, strict=True):
            first = end - (len(texts[i]) - 1)
            found.append({key: part[key][first + skip:end] for key in DOCUMENT_STATS})
            done += len(texts[i])
        progress(done)
    progress.clear()
    return found


def _groups(texts: Sequence[np.ndarray], tokens: int) -> list[list[int]]:
    """Neighbours of about so many tokens together."""
    groups: list[list[int]] = []
    room = 0
    for index, ids in enumerate(texts):
        if room <= 0:
            groups.append([])
            room = tokens
        groups[-1].append(index)
        room -= len(ids)
    return groups

