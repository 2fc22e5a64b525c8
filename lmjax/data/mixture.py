"""From a data config to batches that are a pure function of (corpus, seed, step).

What lives here: preparing every source of a run (or finding it prepared), weighted mixtures, the global
shuffle, and validation batches. What does not: rows (`rows`) and moving batches to devices (the loader).

Legend: B rows of the global batch, b rows of this host, T tokens of a row.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lmjax.data.canaries import CanaryConfig
from lmjax.data.manifest import Manifest, damage, load_manifest, write_atomically
from lmjax.data.policy import skipped_line
from lmjax.data.prepare import SHARD_BYTES, Progress, prepare, training_documents
from lmjax.data.protect import Marks, Protect
from lmjax.data.rows import Rows, padding
from lmjax.data.shards import Tokens
from lmjax.data.sources import SourceConfig, check_budget, check_outside, source_key
from lmjax.data.tokenizers import MAX_BPE, Tokenizer, load_tokenizer, train_bpe
from lmjax.data.verify import POLICIES, verify_hashes
from lmjax.errors import DataError

_WEIGHTS_APART = 1e6
_TOLD = 20  # damaged shards that are spelt out
_REPAIRED = "warning: {}; made anew from the text, but look at the disk"
BPE_TRAINING_BYTES = 64 << 20  # more text changes a small vocabulary very little


@dataclass
class DataConfig:
    """The data of a run.

    sources              corpora, mixed by their weights
    tokenizer            bytes | bpe (trained on the training documents) | path of a tokenizer.json | Hub id
    bpe_vocab_size       vocabulary for tokenizer = "bpe", the specials included
    validation_fraction  share of each source that is held out
    cache_dir            where prepared folders are kept
    workers              processes for preparing; 0 for every core
    verify               at every start hold each shard against its sha256 ("hashes"), or look at sizes only ("sizes",
                         for a corpus that is too large to read, or lies on storage that checks itself)
    canaries             texts with a secret that training holds a known number of times; None for none
    """

    sources: tuple[SourceConfig, ...] = field(default_factory=lambda: (SourceConfig(),))
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    validation_fraction: float = 0.02
    cache_dir: str = "data"
    workers: int = 0
    verify: str = "hashes"
    canaries: CanaryConfig | None = None

    def problems(self, prefix: str = "") -> list[str]:
        """Everything wrong with this config, one line each."""
        found = [problem for index, source in enumerate(self.sources)
                 for problem in source.problems(f"{prefix}sources[{index}].")]
        if not self.sources:
            found.append(f"{prefix}sources: is empty; give at least one, SourceConfig() is the standard "
                         "library")
        if not self.tokenizer:
            found.append(f"{prefix}tokenizer: is empty; give \"bytes\", \"bpe\", a path or a Hub id")
        if self.tokenizer == "bpe" and not 257 <= self.bpe_vocab_size <= MAX_BPE:
            found.append(f"{prefix}bpe_vocab_size = {self.bpe_vocab_size}: must be from 257 to {MAX_BPE}")
        if self.tokenizer != "bpe" and self.bpe_vocab_size != DataConfig.bpe_vocab_size:
            found.append(f"{prefix}bpe_vocab_size = {self.bpe_vocab_size}: has no effect on tokenizer "
                         f"{self.tokenizer!r}; remove it or set tokenizer = \"bpe\"")
        only_shards = self.sources and all(source.kind == "shards" for source in self.sources)
        if self.tokenizer == "bpe" and only_shards:
            found.append(f"{prefix}tokenizer = 'bpe': there is no text to train it on, every source is "
                         "shards; set it to the tokenizer.json in their folder")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"{prefix}validation_fraction = {self.validation_fraction}: must be in [0, 1)")
        if not 0 <= self.workers <= 1024:
            found.append(f"{prefix}workers = {self.workers}: must be from 0 (every core) to 1024")
        if self.verify not in POLICIES:
            found.append(f"{prefix}verify = {self.verify!r}: must be one of {', '.join(POLICIES)}")
        weights = [source.weight for source in self.sources if source.weight > 0]
        if weights and max(weights) / min(weights) > _WEIGHTS_APART:
            found.append(f"{prefix}sources: weights from {min(weights):g} to {max(weights):g} lie more than "
                         f"{_WEIGHTS_APART:g} times apart; remove the source that is hardly ever read")
        if not self.cache_dir:
            found.append(f"{prefix}cache_dir: is empty; give a folder")
        return found + (self.canaries.problems(f"{prefix}canaries.") if self.canaries else [])


@dataclass(frozen=True)
class Corpus:
    """Prepared sources, in the order of the config. `reused` tells which were found finished.

    `notes`: what a run should tell of them at its start, one line each: what was verified, left out or repaired.
    """

    tokenizer: Tokenizer
    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]
    fingerprint: str
    reused: tuple[bool, ...]
    notes: tuple[str, ...] = ()

    def tokens(self, split: str) -> list[Tokens]:
        """Each source's stream of a split that holds any tokens."""
        opened = (Tokens(folder, split, manifest)
                  for folder, manifest in zip(self.folders, self.manifests, strict=True))
        return [tokens for tokens in opened if len(tokens)]


def prepare_all(cfg: DataConfig, progress: Callable[[Progress], None] | None = None, *,
                part: tuple[int, int] = (0, 1), tell: Callable[[str], None] | None = None) -> Corpus:
    """Prepares every source of the config below its `cache_dir`, or finds it there, and verifies what it found.

    A finished folder is reused. With `verify = "hashes"` each shard of it is held against the manifest's sha256; a
    shard below `cache_dir` that is damaged is made anew from its text, which is there, and that is noted. `part`
    (index, count): hash a share only, where `count` hosts start together. `tell` gets lines of progress.
    `fingerprint` names the data of a run: tokenizer, shards and weights.

    DataError: see `prepare`; also shards made by another tokenizer, damaged ones in a source of kind shards, and more
    bad records than `max_bad_records`.
    """
    if found := cfg.problems():
        raise DataError("; ".join(found))
    for source in cfg.sources:
        check_outside(source, Path(cfg.cache_dir))
    keys = [source_key(source) if source.kind != "shards" else "" for source in cfg.sources]
    tokenizer = resolve_tokenizer(cfg, keys)
    folders = [Path(source.path) if source.kind == "shards" else prepared_folder(cfg, source, tokenizer, key)
               for source, key in zip(cfg.sources, keys, strict=True)]
    notes: list[str] = []
    manifests = [_open_shards(source, tokenizer) if source.kind == "shards" else _whole(folder, notes)
                 for source, folder in zip(cfg.sources, folders, strict=True)]
    notes += _verify(cfg, folders, manifests, part, tell)
    reused = tuple(manifest is not None for manifest in manifests)
    for index, (source, key) in enumerate(zip(cfg.sources, keys, strict=True)):
        if manifests[index] is None:
            manifests[index] = prepare(source, tokenizer, folders[index], workers=cfg.workers, progress=progress,
                                       validation_fraction=cfg.validation_fraction, key=key)
        check_budget(source, manifests[index].skipped)
        if counts := skipped_line(manifests[index].skipped):
            notes.append(f"source {source.kind} {source.path}: {counts}".replace(" :", ":"))
    weights = tuple(float(source.weight) for source in cfg.sources)
    what = [tokenizer.fingerprint, weights, [manifest.fingerprint for manifest in manifests]]
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return Corpus(tokenizer, tuple(folders), tuple(manifests), weights, fingerprint, reused, tuple(notes))


def _verify(cfg: DataConfig, folders: list[Path], manifests: list[Manifest | None], part: tuple[int, int],
            tell: Callable[[str], None] | None) -> list[str]:
    """Hashes what was found finished; a damaged folder's manifest becomes None. Returns what to tell."""
    found = [(index, folder, manifest) for index, (folder, manifest) in
             enumerate(zip(folders, manifests, strict=True)) if manifest is not None]
    if not found:
        return []  # prepared a moment ago, and hashed while written
    if cfg.verify == "sizes":
        return ["data.verify='sizes': only the sizes of shards were looked at, so changed bytes would be trained on"]
    verified = verify_hashes([(folder, manifest) for _, folder, manifest in found], part, tell)
    bad = [(found[number][0], problem) for number, problem in verified.damaged]
    if given := [problem for index, problem in bad if cfg.sources[index].kind == "shards"]:
        more = [f"… and {len(given) - _TOLD:,} more shards"] if len(given) > _TOLD else []
        raise DataError(*(f"{problem}; bring the file back from a copy, or run its `lmjax data prepare` again, which "
                          "makes only this shard anew" for problem in given[:_TOLD]), *more)
    for index, _ in bad:
        manifests[index] = None
    return [_REPAIRED.format(problem) for _, problem in bad] or [str(verified)]


def prepared_folder(cfg: DataConfig, source: SourceConfig, tokenizer: Tokenizer, key: str = "") -> Path:
    """Where `prepare_all` keeps a source: `<kind>-<tokenizer>-<hash of all that decides its bytes>`."""
    what = [key or source_key(source), tokenizer.fingerprint, cfg.validation_fraction, SHARD_BYTES]
    short = re.sub(r"[^\w.]+", "_", tokenizer.name)[:24]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return Path(cfg.cache_dir) / f"{source.kind}-{short}-{digest[:12]}"


def resolve_tokenizer(cfg: DataConfig, keys: list[str] | None = None) -> Tokenizer:
    """The tokenizer of a config. "bpe" is trained once on the training documents and kept in `cache_dir`.

    Training reads BPE_TRAINING_BYTES of text, an equal share from the beginning of each source.
    """
    if cfg.tokenizer != "bpe":
        return load_tokenizer(cfg.tokenizer)
    texts = [source for source in cfg.sources if source.kind != "shards"]
    known = [key for key in keys or [] if key] or [source_key(source) for source in texts]
    what = [known, cfg.bpe_vocab_size, cfg.validation_fraction, BPE_TRAINING_BYTES]
    name = f"bpe{cfg.bpe_vocab_size}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"
    path = Path(cfg.cache_dir) / "tokenizers" / f"{name}.json"
    if path.is_file():
        return _stored_bpe(path, cfg.bpe_vocab_size)
    trained = train_bpe(_training_text(texts, cfg.validation_fraction), cfg.bpe_vocab_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be made ({error.strerror}); choose another "
                        "cache_dir") from None
    write_atomically(path, trained.to_json().encode())
    return _stored_bpe(path, cfg.bpe_vocab_size)


def _stored_bpe(path: Path, vocab_size: int) -> Tokenizer:
    tokenizer = load_tokenizer(str(path))
    tokenizer.name = f"bpe{vocab_size}"
    return tokenizer


class Batches:
    """Random access to the batches of a split; nothing is remembered between calls.

    Each source is shuffled over all of its rows, with a new permutation every epoch, and repeated without
    end; sources are interleaved by weight (exact to 1% of the smallest weight). Built from Grain's
    MapDataset, so row r of step s is always the same whoever asks for it: hosts that take different rows of
    a step together hold exactly the batch that one host would.

    `protect` adds the field `goldfish`. DataError: batch_size < 1, a seed outside [0, 2^32), or a source without tokens
    in the split.
    """

    def __init__(self, corpus: Corpus, split: str, batch_size: int, seq_len: int, seed: int,
                 shuffle: bool = True, protect: Protect | None = None) -> None:
        if batch_size < 1 or not 0 <= seed < 2**32:
            raise DataError(f"batch_size = {batch_size}, seed = {seed}: must be >= 1 and in [0, 2^32)")
        import grain  # here, since it takes a second and preparing does not need it

        self.batch_size, self.seq_len = batch_size, seq_len
        self._rows = [Rows(Tokens(folder, split, manifest), seq_len,
                           marks=Marks(protect, index, corpus.tokenizer) if protect else None)
                      for index, (folder, manifest) in enumerate(zip(corpus.folders, corpus.manifests, strict=True))]
        self._weights = corpus.weights
        streams = []
        for index, rows in enumerate(self._rows):
            stream = grain.MapDataset.source(rows)
            if shuffle:
                stream = stream.shuffle(seed=_shuffle_seed(seed, index))
            streams.append(stream.repeat(None))
        single = len(streams) == 1
        self._dataset = streams[0] if single else grain.MapDataset.mix(streams, weights=self._weights)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources together."""
        return sum(len(rows) for rows in self._rows)

    def epoch(self, step: int) -> float:
        """Rows read before `step`, as a multiple of all rows. Weighted sources go round at other rates."""
        return step * self.batch_size / self.rows_per_epoch

    def source_epochs(self, step: int) -> tuple[float, ...]:
        """How often each source has been read before `step`."""
        total = sum(self._weights)
        return tuple(step * self.batch_size * weight / total / len(rows)
                     for weight, rows in zip(self._weights, self._rows, strict=True))

    def used(self, step: int) -> tuple["SourceUse", ...]:
        """What the steps before `step` have read of each source, exactly: a pure function of the step."""
        counts = rows_of_sources(step * self.batch_size, self._weights)
        return tuple(SourceUse(str(rows.tokens.folder), count, count * min(self.seq_len, len(rows.tokens) - 1),
                               count / len(rows)) for rows, count in zip(self._rows, counts, strict=True))

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows `rows` (default all B) of the global batch of a step: arrays [b, T] as in `rows.cut`."""
        if step < 0:
            raise IndexError(f"step = {step} is negative")
        wanted = range(self.batch_size)[rows or slice(None)]
        return _stack([self._dataset[step * self.batch_size + row] for row in wanted])


@dataclass(frozen=True)
class SourceUse:
    """Of one source: its folder, rows read, targets in them (the beginnings of documents, which weigh nothing,
    included), and epochs: how often each row was read, on average."""

    folder: str
    rows: int
    tokens: int
    epochs: float


def rows_of_sources(count: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """How many of the first `count` rows of a mixture come from each source.

    Grain's rule in closed form (grain/_src/python/dataset/transformations/mix.py): with whole proportions p, scaled
    so that the smallest is 100, source i takes what floor(rest * (P - p_i) / P) leaves, P being the sum of p_i, p_i+1,
    ….
    """
    if len(weights) == 1:
        return (count,)
    proportions = [int(weight * (100 / min(weights))) for weight in weights]
    total, rest, taken = sum(proportions), count, []
    for proportion in proportions:
        left = rest * (total - proportion) // total
        taken.append(rest - left)
        rest, total = left, total - proportion
    return tuple(taken)


def validation_batches(
    corpus: Corpus, batch_size: int, seq_len: int, limit_batches: int = 0, source: int | None = None,
    rows: slice | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of arrays [B, T] over the held-out split, in order, each token predicted exactly once.

    Sources come one after another (or only number `source`), each filled up with rows of weight 0, so shapes
    never change and the weights of a source sum to its tokens - documents. `limit_batches` > 0 takes that
    many batches of each source, spread evenly over it. `rows` is this host's part of each batch. DataError:
    none of the sources has held-out tokens.
    """
    chosen = range(len(corpus.folders)) if source is None else [source]
    streams = [Tokens(corpus.folders[index], "validation", corpus.manifests[index]) for index in chosen]
    if not any(len(tokens) for tokens in streams):
        raise DataError(f"{corpus.folders[0]}: no held-out tokens; set validation_fraction above 0")
    return _in_order([tokens for tokens in streams if len(tokens)], batch_size, seq_len, limit_batches, rows)


def _in_order(streams: list[Tokens], batch_size: int, seq_len: int, limit_batches: int,
              rows: slice | None) -> Iterator[dict[str, np.ndarray]]:
    for tokens in streams:
        all_rows = Rows(tokens, seq_len, keep_tail=True)
        count = -(-len(all_rows) // batch_size)
        picked = np.arange(count)
        if 0 < limit_batches < count:
            picked = np.arange(limit_batches) * count // limit_batches
        for batch in picked.tolist():
            wanted = range(batch * batch_size, (batch + 1) * batch_size)[rows or slice(None)]
            yield _stack([all_rows[row] if row < len(all_rows) else padding(seq_len) for row in wanted])


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _shuffle_seed(seed: int, source: int) -> int:
    # Grain adds the epoch to the seed, so neighbouring seeds would share permutations: spread them first.
    return int.from_bytes(hashlib.sha256(f"shuffle {seed} {source}".encode()).digest()[:4], "big")


def _whole(folder: Path, notes: list[str]) -> Manifest | None:
    """The manifest of a finished folder whose files have the right sizes; None if there is work to do."""
    if not (folder / "manifest.json").is_file():
        return None
    manifest = load_manifest(folder)
    problems = [damage(folder, shard, hashes=False) for split in manifest.splits.values() for shard in split.shards]
    notes += [_REPAIRED.format(problem) for problem in problems if problem]
    return None if any(problems) else manifest


def _open_shards(source: SourceConfig, tokenizer: Tokenizer) -> Manifest:
    manifest = load_manifest(source.path)
    theirs = manifest.tokenizer
    if theirs["fingerprint"] != tokenizer.fingerprint:
        raise DataError(f"source shards {source.path}: made with tokenizer {theirs['name']!r} of "
                        f"{theirs['vocab_size']} tokens, but this run uses {tokenizer.name!r} of "
                        f"{tokenizer.vocab_size}; set tokenizer = "
                        f"{os.path.join(source.path, 'tokenizer.json')!r} or prepare the text again")
    for split in manifest.splits:
        Tokens(source.path, split, manifest)
    return manifest


def _training_text(sources: list[SourceConfig], validation_fraction: float) -> Iterator[str]:
    """An equal share of BPE_TRAINING_BYTES from each source, from its beginning."""
    for source in sources:
        left = BPE_TRAINING_BYTES // len(sources)
        for text in training_documents(source, validation_fraction):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break
