"""Canaries: made-up texts, each with a secret, that are put into training a known number of times, so that what a model
remembers of them can be measured (Carlini et al. 2019, "The Secret Sharer", arXiv 1802.08232).

What lives here: their config, their texts, and the other secrets that one might have been drawn instead. What does not:
where in a run they stand (`inject`), and exposure (`lmjax.audit.exposure`).

Texts are a function of the config alone, and are drawn from the raw stream of Philox, which NumPy keeps the same over
its versions: an audit years later finds the texts of the run.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

NAME, SECRET = "{name}", "{secret}"
MAX_OCCURRENCES = 1_000_000  # they are held in memory, on every host
MAX_REPEAT, MAX_EACH, MAX_LENGTH, MAX_FORMAT = 100_000, 10_000, 32, 1_000

WORDS = (
    "acorn amber anchor apple arrow basin beacon birch bottle bridge bronze candle canyon carpet castle cedar chalk "
    "cherry circle copper cotton crane crystal dragon eagle ember falcon feather forest garden ginger glacier hammer "
    "harbor hazel honey island ivory jacket jungle kettle ladder lantern lemon magnet maple marble meadow mirror "
    "needle orange paper pepper planet pocket ribbon river saddle silver spider thunder tunnel velvet walnut"
).split()
# What a secret is made of, and what stands between.
ALPHABETS = {"digits": (list("0123456789"), ""), "letters": (list("abcdefghijklmnopqrstuvwxyz"), ""),
             "words": (WORDS, " ")}
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = 6  # of a name: 70^6, about 10^11 of them, all equally long


@dataclass
class CanaryConfig:
    """Texts that a run is to remember, or not.

    format      the text: {name} is made up and tells canaries apart, {secret} comes after it and is what is asked for
    secret      what it is drawn from, each part uniformly: digits | letters (a to z) | words (of 64)
    length      so many of them; there are |R| = 10^length, 26^length or 64^length secrets
    repeats     how often a canary occurs in the run; 0: never, which is the control
    per_repeat  so many different canaries for each of `repeats`
    first, last the share of the run between which they occur; 0 and 1: from its beginning to its end
    seed        of the texts and of their places
    """

    format: str = "The access code of {name} is {secret}."
    secret: str = "digits"
    length: int = 6
    repeats: tuple[int, ...] = (0, 1, 4, 16, 64)
    per_repeat: int = 8
    first: float = 0.0
    last: float = 1.0
    seed: int = 0

    @property
    def occurrences(self) -> int:
        """Of all canaries together."""
        return sum(self.repeats) * self.per_repeat

    @property
    def secrets(self) -> int:
        """|R|: how many secrets there are."""
        return len(ALPHABETS[self.secret][0]) ** self.length

    def problems(self, prefix: str = "") -> list[str]:
        """Everything wrong with this config, one line each, each beginning with `prefix` and the field."""
        found = []
        if [self.format.count(field) for field in (NAME, SECRET)] != [1, 1]:
            found.append(f"{prefix}format = {self.format!r:.200}: must hold {NAME} once and {SECRET} once")
        elif self.format.index(NAME) > self.format.index(SECRET):
            found.append(f"{prefix}format = {self.format!r:.200}: {NAME} must come before {SECRET}, which is asked for "
                         "given what stands before it")
        if len(self.format) > MAX_FORMAT:
            found.append(f"{prefix}format: has {len(self.format):,} characters; at most {MAX_FORMAT:,}")
        if self.secret not in ALPHABETS:
            found.append(f"{prefix}secret = {self.secret!r}: must be one of {', '.join(ALPHABETS)}")
        if not 1 <= self.length <= MAX_LENGTH:
            found.append(f"{prefix}length = {self.length}: must be from 1 to {MAX_LENGTH}")
        wrong = [count for count in self.repeats if not 0 <= count <= MAX_REPEAT]
        if not any(self.repeats) or wrong:
            found.append(f"{prefix}repeats = {self.repeats}: give numbers from 0 to {MAX_REPEAT:,}, one of them above "
                         "0; to put nothing in, leave canaries out")
        elif len(set(self.repeats)) < len(self.repeats):
            found.append(f"{prefix}repeats = {self.repeats}: a number is given twice; raise per_repeat instead")
        if not 1 <= self.per_repeat <= MAX_EACH:
            found.append(f"{prefix}per_repeat = {self.per_repeat}: must be from 1 to {MAX_EACH:,}")
        elif not wrong and self.occurrences > MAX_OCCURRENCES:
            found.append(f"{prefix}repeats and per_repeat make {self.occurrences:,} occurrences; at most "
                         f"{MAX_OCCURRENCES:,}")
        if not 0 <= self.first < self.last <= 1:
            found.append(f"{prefix}first = {self.first:g}, {prefix}last = {self.last:g}: must be shares of the run, "
                         "the first one smaller")
        if not 0 <= self.seed < 2**32:
            found.append(f"{prefix}seed = {self.seed}: must be from 0 to 2^32 - 1")
        return found


@dataclass(frozen=True)
class Canary:
    """secret: its parts, as indices into their alphabet. start, stop: where in the text it stands. count: how often
    the whole run holds it."""

    id: str
    name: str
    secret: tuple[int, ...]
    text: str
    start: int
    stop: int
    count: int


def make_canaries(config: CanaryConfig) -> list[Canary]:
    """The canaries of a config, those of one count together, no two with the same name."""
    taken: set[str] = set()
    found = []
    for count in config.repeats:
        # A canary does not change where other counts are added or more canaries of its own.
        secrets = drawn(config, "secret", count, (config.per_repeat, config.length))
        names = raw(config.seed, "name", count, config.per_repeat * 2)
        for number in range(config.per_repeat):
            name = _name(int(names[2 * number]), int(names[2 * number + 1]), taken)
            secret = tuple(secrets[number].tolist())
            text, start, stop = written(config, name, secret)
            found.append(Canary(f"canary-{count}-{number}", name, secret, text, start, stop, count))
    return found


def written(config: CanaryConfig, name: str, secret: tuple[int, ...]) -> tuple[str, int, int]:
    """(text, where its secret begins, where it ends)."""
    parts, between = ALPHABETS[config.secret]
    before, _, after = config.format.partition(SECRET)
    before = before.replace(NAME, name)
    inner = between.join(parts[i] for i in secret)
    return before + inner + after, len(before), len(before) + len(inner)


def other_secrets(config: CanaryConfig, canary: Canary, most: int) -> np.ndarray:
    """Secrets that the canary might have had instead, int [n, length], in no order that means anything: all |R| - 1 of
    them where |R| <= most, else `most` different ones, drawn uniformly, another sample for each canary."""
    base, own = len(ALPHABETS[config.secret][0]), np.array(canary.secret)
    if config.secrets <= most:
        every = np.stack(np.unravel_index(np.arange(config.secrets), (base,) * config.length), axis=1)
        return every[(every != own).any(axis=1)]
    size = 2 * most
    while True:
        rows = drawn(config, f"candidates {canary.id}", size, (size, config.length))
        rows = rows[(rows != own).any(axis=1)]
        _, first = np.unique(rows, axis=0, return_index=True)
        if len(first) >= most:
            return rows[np.sort(first)[:most]]
        size *= 2


# ---- draws -----------------------------------------------------------------------------------------------


def raw(seed: int, what: Any, number: int, n: int) -> np.ndarray:
    """uint64 [n], uniform; another stream for each (seed, what, number)."""
    digest = hashlib.sha256(f"canaries {seed} {what} {number}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(n)


def drawn(config: CanaryConfig, what: str, number: int, shape: tuple[int, int]) -> np.ndarray:
    """int64 of a shape: indices into the alphabet of the secrets."""
    base = len(ALPHABETS[config.secret][0])
    return (raw(config.seed, what, number, shape[0] * shape[1]) % np.uint64(base)).astype(np.int64).reshape(shape)


def _name(value: int, step: int, taken: set[str]) -> str:
    """Two made-up words, such as "Rilona Tagebu", that no other canary has."""
    syllables = len(_CONSONANTS) * len(_VOWELS)
    while True:
        rest, text = value % syllables**_SYLLABLES, ""
        for _ in range(_SYLLABLES):
            rest, one = divmod(rest, syllables)
            text += _CONSONANTS[one // len(_VOWELS)] + _VOWELS[one % len(_VOWELS)]
        name = f"{text[:len(text) // 2]} {text[len(text) // 2:]}".title()
        if name not in taken:
            taken.add(name)
            return name
        value += step | 1
