"""Probes: a piece of a document as a prompt, and the suffix that the model is held against. NumPy only.

What lives here: where probes are cut, what stands before them, and which of their tokens goldfish dropped. All prefix
lengths of a place ask for the same suffix: only how much is shown of what precedes it differs, so that curves by
prefix length compare like with like.

    context   [what every text begins with] [offset: tokens of other documents] [prefix] [suffix]
    document          position ->| longest prefix                  |  suffix  |
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmjax.audit.texts import Text
from lmjax.errors import ConfigError, DataError
from lmjax.losses.goldfish import GoldfishConfig, keep_mask


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """In tokens. prefixes: lengths that are shown. suffix: asked for. positions: where in a document the longest prefix
    begins. offsets: tokens of other documents that stand before the prefix, since recall fades with the distance from
    the beginning of the context (Xu et al. 2025, arXiv 2505.13171)."""

    prefixes: tuple[int, ...] = (50,)
    suffix: int = 50
    positions: tuple[int, ...] = (0,)
    offsets: tuple[int, ...] = (0,)

    @property
    def longest(self) -> int:
        return max(self.offsets) + max(self.prefixes) + self.suffix

    def problems(self) -> list[str]:
        bad = []
        for name, values, low in (("--prefix", self.prefixes, 1), ("--positions", self.positions, 0),
                                  ("--offsets", self.offsets, 0), ("--suffix", (self.suffix,), 1)):
            if not values or min(values) < low:
                bad.append(f"{name} {' '.join(map(str, values))}: each must be at least {low}")
            elif len(set(values)) < len(values):
                bad.append(f"{name} {' '.join(map(str, values))}: one is given twice; give it once")
        return bad

    def check(self, begins: int, max_seq_len: int) -> None:
        """Raises ConfigError for probes that the model cannot read. begins: tokens that every text begins with."""
        bad = self.problems()
        if not bad and begins + self.longest > max_seq_len:
            bad.append(f"--offsets {max(self.offsets)}, --prefix {max(self.prefixes)} and --suffix {self.suffix} make "
                       f"{begins + self.longest} tokens, and the model reads {max_seq_len}; shorten one of them")
        if bad:
            raise ConfigError(*bad)


class Probe(NamedTuple):
    """document: its index. start: of the suffix, in tokens of the document."""

    document: int
    start: int
    prefix: int
    offset: int


@dataclasses.dataclass
class Probes:
    """All probes, those of equal lengths together. ids: of each document, without what texts begin with. short:
    documents that no probe fits into."""

    config: ProbeConfig
    texts: list[Text]
    ids: list[np.ndarray]
    probes: list[Probe]
    short: int

    def suffix(self, probe: Probe) -> np.ndarray:
        return self.ids[probe.document][probe.start:probe.start + self.config.suffix]

    def prompt(self, probe: Probe, begins: Sequence[int]) -> np.ndarray:
        """What the model reads before the suffix."""
        shown = self.ids[probe.document][probe.start - probe.prefix:probe.start]
        return np.concatenate([np.asarray(begins, np.int32), self._before(probe), shown]).astype(np.int32)

    def _before(self, probe: Probe) -> np.ndarray:
        """The beginnings of the documents that follow, one after another, round and round."""
        pieces, left, at = [np.zeros(0, np.int32)], probe.offset, probe.document
        while left:
            at = (at + 1) % len(self.ids)
            if at != probe.document:
                pieces.append(self.ids[at][:left])
                left -= len(pieces[-1])
        return np.concatenate(pieces)


def cut_probes(config: ProbeConfig, texts: list[Text], ids: list[np.ndarray]) -> Probes:
    """Probes of every document, at every position that fits, with every prefix length and offset.

    Raises DataError where no document is long enough, or where offsets have no other document to take tokens from.
    """
    need = max(config.prefixes) + config.suffix
    places = [(document, position + max(config.prefixes)) for document, tokens in enumerate(ids)
              for position in config.positions if position + need <= len(tokens)]
    if not places:
        longest = max(len(tokens) for tokens in ids)
        raise DataError(f"the longest of {len(ids):,} documents has {longest:,} tokens, and a probe needs "
                        f"{min(config.positions) + need:,} (--positions, --prefix and --suffix together); shorten them")
    if max(config.offsets) and sum(len(tokens) > 0 for tokens in ids) < 2:
        raise DataError("--offsets puts tokens of other documents before a prefix, and there is no other; give more "
                        "documents, or leave --offsets out")
    probes = [Probe(document, start, prefix, offset) for offset in config.offsets for prefix in config.prefixes
              for document, start in places]
    return Probes(config, texts, ids, probes, len(ids) - len({document for document, _ in places}))


def dropped_by_goldfish(config: GoldfishConfig, begins: Sequence[int], ids: np.ndarray) -> np.ndarray | None:
    """bool [n]: which tokens of a document were never trained on, wherever it stood in a row, except within the first
    `context` tokens of a row. None for masks that depend on the place ("static") or the step ("random")."""
    if config.strategy not in ("hash", "hash_table"):
        return None
    begins = np.asarray(begins if len(begins) else [0], np.int32)
    whole = np.concatenate([begins, ids]).astype(np.int32)[None]
    keep = keep_mask(config, whole[:, :-1], whole[:, 1:])
    return ~keep[0, len(begins) - 1:]
