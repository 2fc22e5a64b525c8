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

from lmjax.data.manifest import Manifest, load_manifest, write_atomically
from lmjax.data.prepare import SHARD_BYTES, Progress, prepare, training_documents
from lmjax.data.rows import Rows, padding
from lmjax.data.shards import Tokens
from lmjax.data.sources import SourceConfig, check_outside, source_key
from lmjax.data.tokenizers import Tokenizer, load_tokenizer, train_bpe
from lmjax.errors import DataError

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
    """

    sources: tuple[SourceConfig, ...] = field(default_factory=lambda: (SourceConfig(),))
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    validation_fraction: float = 0.02
    cache_dir: str = "data"
    workers: int = 0

    def problems(self, prefix: str = "") -> list[str]:
        """Everything wrong with this config, one line each."""
        found = [problem for index, source in enumerate(self.sources)
                 for problem in source.problems(f"{prefix}sources[{index}].")]
        if not self.sources:
            found.append(f"{prefix}sources: is empty; give at least one, SourceConfig() is the standard "
                         "library")
        if not self.tokenizer:
            found.append(f"{prefix}tokenizer: is empty; give \"bytes\", \"bpe\", a path or a Hub id")
        if self.tokenizer == "bpe" and not 257 <= self.bpe_vocab_size <= 2**20:
            found.append(f"{prefix}bpe_vocab_size = {self.bpe_vocab_size}: must be from 257 to {2**20}")
        if self.tokenizer != "bpe" and self.bpe_vocab_size != DataConfig.bpe_vocab_size:
            found.append(f"{prefix}bpe_vocab_size = {self.bpe_vocab_size}: has no effect on tokenizer "
                         f"{self.tokenizer!r}; remove it or set tokenizer = \"bpe\"")
        only_shards = self.sources and all(source.kind == "shards" for source in self.sources)
        if self.tokenizer == "bpe" and only_shards:
            found.append(f"{prefix}tokenizer = 'bpe': there is no text to train it on, every source is "
                         "shards; set it to the tokenizer.json in their folder")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"{prefix}validation_fraction = {self.validation_fraction}: must be in [0, 1)")
        if self.workers < 0:
            found.append(f"{prefix}workers = {self.workers}: must be 0 (every core) or more")
        if not self.cache_dir:
            found.append(f"{prefix}cache_dir: is empty; give a folder")
        return found


@dataclass(frozen=True)
class Corpus:
    """Prepared sources, in the order of the config. `reused` tells which were found finished."""

    tokenizer: Tokenizer
    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]
    fingerprint: str
    reused: tuple[bool, ...]

    def tokens(self, split: str) -> list[Tokens]:
        """Each source's stream of a split that holds any tokens."""
        opened = (Tokens(folder, split, manifest)
                  for folder, manifest in zip(self.folders, self.manifests, strict=True))
        return [tokens for tokens in opened if len(tokens)]


def prepare_all(cfg: DataConfig, progress: Callable[[Progress], None] | None = None) -> Corpus:
    """Prepares every source of the config below its `cache_dir`, or finds it there.

    A finished folder is reused after a look at its file sizes; a damaged one is repaired. `fingerprint` names
    the data of a run: tokenizer, shards and weights. DataError: see `prepare`; also shards made by another
    tokenizer.
    """
    if found := cfg.problems():
        raise DataError("; ".join(found))
    for source in cfg.sources:
        check_outside(source, Path(cfg.cache_dir))
    keys = [source_key(source) if source.kind != "shards" else "" for source in cfg.sources]
    tokenizer = resolve_tokenizer(cfg, keys)
    folders, manifests, reused = [], [], []
    for source, key in zip(cfg.sources, keys, strict=True):
        if source.kind == "shards":
            folder, manifest, old = Path(source.path), _open_shards(source, tokenizer), True
        else:
            folder = prepared_folder(cfg, source, tokenizer, key)
            manifest = _whole(folder)
            old = manifest is not None
            if manifest is None:
                manifest = prepare(source, tokenizer, folder, validation_fraction=cfg.validation_fraction,
                                   workers=cfg.workers, progress=progress, key=key)
        folders.append(folder)
        manifests.append(manifest)
        reused.append(old)
    weights = tuple(float(source.weight) for source in cfg.sources)
    what = [tokenizer.fingerprint, weights, [manifest.fingerprint for manifest in manifests]]
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return Corpus(tokenizer, tuple(folders), tuple(manifests), weights, fingerprint, tuple(reused))


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

    DataError: batch_size < 1, a seed outside [0, 2^32), or a source without tokens in the split.
    """

    def __init__(self, corpus: Corpus, split: str, batch_size: int, seq_len: int, seed: int,
                 shuffle: bool = True) -> None:
        if batch_size < 1 or not 0 <= seed < 2**32:
            raise DataError(f"batch_size = {batch_size}, seed = {seed}: must be >= 1 and in [0, 2^32)")
        import grain  # here, since it takes a second and preparing does not need it

        self.batch_size, self.seq_len = batch_size, seq_len
        self._rows = [Rows(Tokens(folder, split, manifest), seq_len)
                      for folder, manifest in zip(corpus.folders, corpus.manifests, strict=True)]
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

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows `rows` (default all B) of the global batch of a step: arrays [b, T] as in `rows.cut`."""
        if step < 0:
            raise IndexError(f"step = {step} is negative")
        wanted = range(self.batch_size)[rows or slice(None)]
        return _stack([self._dataset[step * self.batch_size + row] for row in wanted])


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


def _whole(folder: Path) -> Manifest | None:
    """The manifest of a finished folder whose files have the right sizes; None if there is work to do."""
    if not (folder / "manifest.json").is_file():
        return None
    manifest = load_manifest(folder)
    try:
        for split in manifest.splits:
            Tokens(folder, split, manifest)
    except DataError:
        return None
    return manifest


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
