"""An index of the n-grams of some documents, exact: what it finds is there, and what is there it finds.

What lives here: 64-bit hashes of windows, sorted, and every hit held against the units themselves, so that two n-grams
with one hash are never taken for each other. What does not: what a unit is (`normal`), and which documents (`overlap`).
Units are anything that can be a dictionary's key: folded words, characters, token ids.
"""

from collections.abc import Hashable, Sequence

import numpy as np

UNIT_BYTES = 48  # memory for a unit of an index while it is built, an upper bound; its distinct units come on top
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def window_hashes(ids_n: np.ndarray, n: int) -> np.ndarray:
    """uint64 hash of each window of n ids (int32): a polynomial of the mixed ids, mod 2^64."""
    count = len(ids_n) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    mixed = ids_n.astype(np.uint64) + _FACTOR
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    total = np.zeros(count, np.uint64)
    for j in range(n):
        total = total * _FACTOR + mixed[j:j + count]
    return total ^ (total >> np.uint64(29))


def covered(starts: np.ndarray, n: int, length: int) -> np.ndarray:
    """bool [length]: the units that lie in one of the windows [start, start + n)."""
    change = np.zeros(length + 1, np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, starts + n, -1)
    return np.cumsum(change)[:length] > 0


class Index:
    """The n-grams of documents, added one by one, then `build`, then `find`. Documents shorter than n have none."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.numbers: dict[Hashable, int] = {}  # unit -> id
        self._parts: list[np.ndarray] = []
        self.size = 0  # units

    def add(self, units: Sequence[Hashable]) -> None:
        numbers = self.numbers
        ids = np.fromiter((numbers.setdefault(unit, len(numbers)) for unit in units), np.int32, len(units))
        self._parts += [ids, np.array([-1], np.int32)]  # no window crosses a document's end
        self.size += len(ids) + 1

    def build(self) -> None:
        self.ids = np.concatenate(self._parts) if self._parts else np.empty(0, np.int32)
        self._parts = []
        whole = np.flatnonzero(_whole(self.ids, self.n))
        hashes = window_hashes(self.ids, self.n)[whole]
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], whole[order].astype(np.int64)
        new = np.ones(len(places), bool)  # the first of its n-gram
        same_hash = hashes[1:] == hashes[:-1]
        new[1:] = ~(same_hash & self._equal(places[1:], self.ids, places[:-1]))
        self._untangle(hashes, places, new, same_hash)
        self.gram = np.full(len(self.ids), -1, np.int64)  # of the window that begins there
        self.gram[places] = np.cumsum(new) - 1
        self.first, self.hashes = places[new], hashes[new]

    def _untangle(self, hashes: np.ndarray, places: np.ndarray, new: np.ndarray, same_hash: np.ndarray) -> None:
        """Where one hash has several n-grams, puts equal ones beside each other; chance makes that very rare."""
        for at in np.unique(np.searchsorted(hashes, hashes[1:][same_hash & new[1:]])).tolist():
            end = int(np.searchsorted(hashes, hashes[at], "right"))
            grams = [self.ids[p:p + self.n].tobytes() for p in places[at:end].tolist()]
            order = sorted(range(end - at), key=lambda i, grams=grams: (grams[i], i))
            places[at:end] = places[at:end][order]
            new[at:end] = [i == 0 or grams[order[i]] != grams[order[i - 1]] for i in range(end - at)]

    def find(self, units: Sequence[Hashable]) -> np.ndarray:
        """int64: of each window of `units`, the number of its n-gram in the index, or -1."""
        get = self.numbers.get
        ids = np.fromiter((get(unit, -1) for unit in units), np.int32, len(units))
        found = np.full(max(len(ids) - self.n + 1, 0), -1, np.int64)
        known = np.flatnonzero(_whole(ids, self.n))
        hashes = window_hashes(ids, self.n)[known]
        at = np.searchsorted(self.hashes, hashes)
        while len(known):  # once, but for n-grams that share a hash
            there = at < len(self.hashes)
            there[there] = self.hashes[at[there]] == hashes[there]
            known, at, hashes = known[there], at[there], hashes[there]
            hit = self._equal(known, ids, self.first[at])
            found[known[hit]] = at[hit]
            known, at, hashes = known[~hit], at[~hit] + 1, hashes[~hit]
        return found

    def _equal(self, places: np.ndarray, ids: np.ndarray, mine: np.ndarray) -> np.ndarray:
        same = np.ones(len(places), bool)
        for j in range(self.n):
            same &= ids[places + j] == self.ids[mine + j]
        return same


def _whole(ids: np.ndarray, n: int) -> np.ndarray:
    """bool, of each window of n: no id in it is -1."""
    missing = np.concatenate([[0], np.cumsum(ids < 0)])
    return missing[n:] == missing[:-n] if len(ids) >= n else np.empty(0, bool)
