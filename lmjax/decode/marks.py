"""Watermarks, the part that needs no JAX: the settings of one, its secret, and the pseudo-random words of both sides.

The words are a keyed function of (key, the h tokens before, token id). Everything below `Watermark` is written with
operators on uint32 arrays alone, so the generator runs it on JAX arrays and the detector on NumPy arrays, with the same
bits. What does not live here: what the words do to logits (`lmjax.decode.watermark`), and what they say about a text
(`lmjax.watermark.detect`).

The function is Threefry-4x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
doi 10.1145/2063384.2063405) under a key of 128 bits. It passes statistical test batteries and no attack is known to us,
but it is a cut-down Threefish made for simulation, and nobody has vetted it as a cipher. Read "docs/watermarks.md"
before a secret depends on it.
"""

import dataclasses
import hashlib
import hmac
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import ConfigError

SCHEMES = ("kgw", "gumbel", "tournament")
KEY_VARIABLE = "LMJAX_WATERMARK_KEY"
MIN_SECRET = 16  # bytes
VERSION = b"lmjax watermark 1"  # another way to make words gets another number, so that nobody mixes the two

_USED_BY = {"gamma": ("kgw",), "delta": ("kgw",), "layers": ("tournament",)}


@dataclasses.dataclass(frozen=True)
class Watermark:
    """How one row is marked. Generator and detector need the same scheme, secret, context, and gamma or layers.

    scheme: "kgw" (green list, distorts), "gumbel" or "tournament" (each text alone has the model's distribution).
    secret: at least 16 bytes, never shown. context: tokens before that the words depend on. gamma: share of the
    vocabulary that is green. delta: what a green token's logit gains, in nats. layers: of the tournament.
    """

    scheme: str
    secret: bytes = dataclasses.field(repr=False)
    context: int = 4
    gamma: float = 0.25
    delta: float = 2.0
    layers: int = 30

    def problems(self, prefix: str = "watermark") -> list[str]:
        rules = {
            "scheme": (self.scheme in SCHEMES, f"choose one of {', '.join(SCHEMES)}"),
            "context": (1 <= self.context <= 16, "must be from 1 to 16 tokens"),
            "gamma": (2**-16 <= self.gamma <= 1 - 2**-16, "must be above 0 and below 1"),
            "delta": (0 < self.delta < np.inf, "must be above 0"),
            "layers": (1 <= self.layers <= 32, "must be from 1 to 32"),
        }
        bad = [f"{prefix}.{name}={getattr(self, name)!r}: {rule}" for name, (right, rule) in rules.items() if not right]
        if len(self.secret) < MIN_SECRET:
            bad.append(f"{prefix}.secret: has {len(self.secret)} bytes and needs {MIN_SECRET}; "
                       "`lmjax watermark key FILE` makes one")
        return bad

    @property
    def threshold(self) -> int:
        """A word below it is green."""
        return round(self.gamma * 2**32)

    def key(self) -> np.ndarray:
        """uint32 [4]: HMAC-SHA256 of the secret over scheme and context length, so that no two share words."""
        label = b"|".join((VERSION, self.scheme.encode(), str(self.context).encode()))
        return np.frombuffer(hmac.digest(self.secret, label, hashlib.sha256)[:16], "<u4").astype(np.uint32)


def watermark_of(scheme: str, key_file: str = "", prefix: str = "--watermark-", **settings: Any) -> Watermark | None:
    """The watermark of a command line; None where `scheme` is "". Settings that are None have their defaults.

    prefix: of the flags, for messages. Raises ConfigError for settings out of range or of no use to the scheme, and as
    `read_secret` does.
    """
    flag = prefix.removesuffix("-") if prefix != "--" else "--scheme"
    given = {name: value for name, value in settings.items() if value is not None}
    if not scheme:
        given |= {"key-file": key_file} if key_file else {}
        if given:
            raise ConfigError(*(f"{prefix}{name} {value}: has no effect without {flag}; leave it out"
                                for name, value in given.items()))
        return None
    if scheme not in SCHEMES:
        raise ConfigError(f"{flag} {scheme}: choose one of {', '.join(SCHEMES)}")
    bad = [f"{prefix}{name} {value}: has no effect with {flag} {scheme}; leave it out"
           for name, value in given.items() if scheme not in _USED_BY.get(name, SCHEMES)]
    bad += Watermark(scheme, bytes(MIN_SECRET), **given).problems()
    if bad:
        raise ConfigError(*bad)
    return Watermark(scheme, read_secret(key_file, f"{prefix}key-file"), **given)


def read_secret(key_file: str = "", flag: str = "--watermark-key-file") -> bytes:
    """The secret in a file, or in the environment variable LMJAX_WATERMARK_KEY; white space at its ends is dropped.

    flag: for messages, which never hold the secret. Raises ConfigError where there is neither, both, or fewer than 16
    bytes.
    """
    held = os.environ.get(KEY_VARIABLE, "")
    if key_file and held:
        raise ConfigError(f"{flag} {key_file}: {KEY_VARIABLE} is set too; unset it, or leave the file out")
    if not key_file and not held:
        raise ConfigError(f"a watermark needs a secret: give {flag}, or set {KEY_VARIABLE}; `lmjax watermark key FILE` "
                          "makes one")
    where = key_file or KEY_VARIABLE
    try:
        secret = (Path(key_file).expanduser().read_bytes() if key_file else os.fsencode(held)).strip()
    except OSError as error:
        raise ConfigError(f"{where}: cannot read the secret ({error.strerror}); `lmjax watermark key FILE` makes "
                          "one") from error
    if len(secret) < MIN_SECRET:
        raise ConfigError(f"{where}: the secret has {len(secret)} bytes and needs {MIN_SECRET}; `lmjax watermark key "
                          "FILE` makes one")
    return secret


# ---- The words: operators only, for JAX and NumPy alike ------------------------------------------------

# Of rounds 0 to 3 and of rounds 4 to 7; then again the first.
_ROTATIONS = (((10, 26), (11, 21), (13, 27), (23, 5)), ((6, 20), (17, 11), (25, 10), (18, 20)))
_PARITY = np.uint32(0x1BD11BDA)
_CONTEXT, _TOKENS = np.uint32(0), np.uint32(1)  # what a block is for

Words = tuple[Any, Any, Any, Any]  # four uint32 arrays of one shape
Loop = Callable[[int, int, Callable, Any], Any]  # jax.lax.fori_loop, or what follows


def plain_loop(start: int, stop: int, body: Callable, carry: Any) -> Any:
    for number in range(start, stop):
        carry = body(number, carry)
    return carry


def _word(number: Any) -> Any:
    return number.astype(np.uint32) if hasattr(number, "astype") else np.uint32(number)


def threefry4x32(key: Sequence[Any], block: Sequence[Any], loop: Loop = plain_loop) -> Words:
    """Threefry-4x32-20 of uint32 arrays of one shape, of at least one dimension. Source: the paper named above.

    loop: JAX needs `jax.lax.fori_loop`, since XLA takes minutes to compile 20 rounds one after another.
    """
    schedule = (*key, key[0] ^ key[1] ^ key[2] ^ key[3] ^ _PARITY)

    def four_rounds(number, carry):
        x, schedule = list(carry[0]), carry[1]
        odd = number % 2  # not used as an index: it may be an abstract value
        for i, ((even_0, even_1), (odd_0, odd_1)) in enumerate(zip(*_ROTATIONS, strict=True)):
            pairs = ((0, 1), (2, 3)) if i % 2 == 0 else ((0, 3), (2, 1))
            for (a, b), bits in zip(pairs, (even_0 + odd * (odd_0 - even_0), even_1 + odd * (odd_1 - even_1)),
                                    strict=True):
                left, right = _word(bits), _word(32 - bits)
                x[a] = x[a] + x[b]
                x[b] = ((x[b] << left) | (x[b] >> right)) ^ x[a]
        schedule = schedule[1:] + schedule[:1]  # the key is injected anew, one word on
        x = [word + k for word, k in zip(x, schedule, strict=False)]
        x[3] = x[3] + _word(number + 1)
        return tuple(x), schedule

    x = tuple(word + k for word, k in zip(block, schedule, strict=False))
    return loop(0, 5, four_rounds, (x, schedule))[0]


def context_key(key: Sequence[Any], position: int, tokens: Any, loop: Loop = plain_loop) -> Words:
    """The key after one more token of the context: a cascade from the last token back, `position` 0, 1, …

    tokens: uint32 array. The key of the next position is a block of this one, so each context has 128 bits of its own.
    """
    zero = tokens ^ tokens
    return threefry4x32(key, (tokens, zero + np.uint32(position), zero, zero + _CONTEXT), loop)


def word_blocks(key: Sequence[Any], counters: Any, loop: Loop = plain_loop) -> Words:
    """Words of the tokens 4 c, 4 c + 1, 4 c + 2 and 4 c + 3 for each c of `counters`, under the key of a context."""
    zero = counters ^ counters
    return threefry4x32(key, (counters, zero, zero, zero + _TOKENS), loop)


def words_of(mark: Watermark, contexts_NH: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """uint32 [N]: the word of each token after its context (h tokens, oldest first). NumPy: the detector's side."""
    key = tuple(mark.key()[:, None])
    for position in range(mark.context):
        key = context_key(key, position, contexts_NH[:, -1 - position].astype(np.uint32))
    tokens_N = tokens_N.astype(np.uint32)
    words_4N = np.stack(np.broadcast_arrays(*word_blocks(key, tokens_N >> np.uint32(2))))
    return np.take_along_axis(words_4N, (tokens_N & np.uint32(3))[None].astype(np.int64), axis=0)[0]
