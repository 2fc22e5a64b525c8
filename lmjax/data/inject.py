"""Where in a run the canaries stand, and the rows of a batch with them in it.

What lives here: the schedule and the overlay, both pure functions of (config, step). What does not: texts (`canaries`)
and the rows that they are put into (`mixture`), which are those of a run without canaries.

An occurrence takes the place of tokens of a training row, as a document of its own, bos to eos: with a segment and
positions of its own, its bos never predicted. What follows it goes on as a row does that begins within a document:
it sees nothing of what stood before. At most one occurrence a row; validation is read elsewhere and holds none.

Schedule: the rows of the steps between `first` and `last` are cut into as many stretches as there are occurrences, and
one comes into each, into a row drawn at random. Of a canary that occurs r times the j-th occurrence comes in the j-th
r-th of these rows. So counts are exact, however many hosts read the rows and however often a run was killed.
"""

import hashlib
import math
from dataclasses import asdict

import numpy as np

from lmjax.data.canaries import CanaryConfig, make_canaries, raw
from lmjax.data.protect import Protect, plain_pieces, token_values
from lmjax.data.rows import cut
from lmjax.data.tokenizers import Tokenizer
from lmjax.errors import ConfigError
from lmjax.hashing import NEVER

MOST = 0.1  # of the run's tokens: with more of them it would be a run on canaries


def step_range(config: CanaryConfig, steps: int) -> tuple[int, int]:
    """[from, to): the steps that may hold canaries."""
    return math.floor(config.first * steps), math.ceil(config.last * steps)


def room_problems(config: CanaryConfig, steps: int, batch_size: int, prefix: str = "") -> list[str]:
    """What can be known before there is a tokenizer: whether there are enough rows."""
    start, stop = step_range(config, steps)
    rows = (stop - start) * batch_size
    if config.occurrences <= rows:
        return []
    return [f"{prefix}repeats = {config.repeats}: {config.per_repeat} canaries each make {config.occurrences:,} "
            f"occurrences, and there are {rows:,} rows for them (one a row, steps {start + 1:,} to {stop:,}); lower "
            "repeats or per_repeat, or train longer"]


class Injection:
    """The canaries of a run. canaries: their texts; ids: of each, int32, bos and eos included.

    `protect` is that of the batches: canaries are subject to the goldfish loss, whatever source's row they stand in.
    ConfigError: they do not fit into rows of `seq_len` tokens, or are more than MOST of the run.
    """

    def __init__(self, config: CanaryConfig, tokenizer: Tokenizer, steps: int, batch_size: int, seq_len: int,
                 protect: Protect | None = None) -> None:
        self.config, self.steps, self.batch_size, self.seq_len = config, steps, batch_size, seq_len
        self.canaries = make_canaries(config)
        bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
        self.ids = [np.concatenate([bos, ids, eos]).astype(np.int32)
                    for ids in tokenizer.encode_batch([canary.text for canary in self.canaries])]
        self.tokens = sum(len(ids) * canary.count for ids, canary in zip(self.ids, self.canaries, strict=True))
        self._check()
        self.rows_N, self.which_N, self.at_N = self._places()
        self._marks = None if protect is None else self._goldfish(protect, tokenizer)

    @property
    def share(self) -> float:
        """Of the tokens of the run."""
        return self.tokens / (self.steps * self.batch_size * self.seq_len)

    @property
    def identity(self) -> str:
        """For checkpoints: a run goes on with the canaries that it began with, or not at all."""
        digest = hashlib.sha256(repr((asdict(self.config), self.steps, self.batch_size, self.seq_len)).encode())
        for array in (self.rows_N, self.which_N, self.at_N, *self.ids):
            digest.update(np.ascontiguousarray(array, "<i8").tobytes())
        return f"{self.config.occurrences:,} occurrences over {self.steps:,} steps ({digest.hexdigest()[:16]})"

    def __str__(self) -> str:
        """For the card at the start of a run."""
        return f"{words(self.config, self.steps)}: {self.tokens:,} tokens, {self.share:.2%} of the run"

    def counts(self, step: int) -> np.ndarray:
        """int [canaries]: how often each occurs before `step`."""
        seen = int(np.searchsorted(self.rows_N, step * self.batch_size))
        return np.bincount(self.which_N[:seen], minlength=len(self.canaries))

    def put_in(self, batch: dict[str, np.ndarray], step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """The batch [b, T] that rows `rows` (default all B) of a step are, with its canaries. `batch` stays as it was.
        """
        wanted = range(self.batch_size)[rows or slice(None)]
        first = step * self.batch_size
        low, high = np.searchsorted(self.rows_N, [first + wanted.start, first + wanted.stop])
        if low == high:
            return batch
        batch = {name: value.copy() for name, value in batch.items()}
        for n in range(low, high):
            b, which = int(self.rows_N[n]) - first - wanted.start, int(self.which_N[n])
            row = overlaid({name: value[b] for name, value in batch.items()}, self.ids[which], int(self.at_N[n]),
                           None if self._marks is None else self._marks[which])
            for name, value in row.items():
                batch[name][b] = value
        return batch

    def _check(self) -> None:
        longest = max(range(len(self.ids)), key=lambda i: len(self.ids[i]))
        bad = []
        if len(self.ids[longest]) > self.seq_len + 1:
            bad.append(f"data.canaries.format: {self.canaries[longest].text!r:.200} is {len(self.ids[longest])} tokens "
                       f"with bos and eos, and a row has room for {self.seq_len + 1}; shorten it, or raise seq_len")
        if self.share > MOST:
            bad.append(f"data.canaries: {self.config.occurrences:,} occurrences are {self.tokens:,} tokens, "
                       f"{self.share:.0%} of the run, and at most {MOST:.0%} may be; lower repeats or per_repeat, or "
                       "train longer")
        bad += room_problems(self.config, self.steps, self.batch_size, "data.canaries.")
        if bad:
            raise ConfigError(*bad)

    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each occurrence, by row: the row of the run, int64; the canary; the token of the row where it begins."""
        config, N = self.config, self.config.occurrences
        start, stop = (step * self.batch_size for step in step_range(config, self.steps))
        whole, rest = divmod(stop - start, N)
        edges = start + np.arange(N + 1) * whole + np.arange(N + 1) * rest // N
        draws = raw(config.seed, "row", 0, N)
        rows_N = edges[:-1] + (draws % np.diff(edges).astype(np.uint64)).astype(np.int64)
        count_C = np.array([canary.count for canary in self.canaries])
        which_N = np.repeat(np.arange(len(count_C)), count_C)
        nth_N = np.arange(N) - np.repeat(np.cumsum(count_C) - count_C, count_C)
        jitter_N = (raw(config.seed, "order", 0, N) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        which_N = which_N[np.argsort((nth_N + jitter_N) / count_C[which_N], kind="stable")]
        room_N = self.seq_len + 2 - np.array([len(ids) for ids in self.ids])[which_N]
        at_N = (raw(config.seed, "place", 0, N) % room_N.astype(np.uint64)).astype(np.int64)
        return rows_N, which_N, at_N

    def _goldfish(self, protect: Protect, tokenizer: Tokenizer) -> list[np.ndarray]:
        """The `goldfish` entries of each canary's tokens, its bos included."""
        if not protect.text:
            return [np.zeros(len(ids), np.uint32) for ids in self.ids]
        pieces = plain_pieces(tokenizer)
        return [token_values([pieces[i] for i in ids], protect.context, protect.seed) for ids in self.ids]


def overlaid(row: dict[str, np.ndarray], ids_n: np.ndarray, at: int, marks_n: np.ndarray | None = None
             ) -> dict[str, np.ndarray]:
    """A row [T] as `rows.cut` gives it, with a document in the place of its tokens [at, at + n), n <= T + 1 - at. In a
    row that ends before, the document comes at its end. marks_n: the document's entries of the field `goldfish`; the
    others stay those of their own documents."""
    T = len(row["tokens"])
    inputs = int(np.count_nonzero(row["segments"]))  # the rest is padding
    tokens = np.append(row["tokens"][:inputs], row["targets"][inputs - 1])
    # The last target is of the last input's document, or the first token of another.
    document = np.append(row["segments"][:inputs], row["segments"][inputs - 1] + (row["weights"][inputs - 1] == 0))
    at = min(at, len(tokens))
    here = slice(at, at + len(ids_n))
    assert here.stop <= T + 1, "the document does not fit"
    short = max(here.stop - len(tokens), 0)
    tokens, document = np.pad(tokens, (0, short)), np.pad(document, (0, short))
    tokens[here], document[here] = ids_n, -1
    out = cut(tokens.astype(np.int32), document, T)
    if "goldfish" in row:
        assert marks_n is not None, "the batch is made for goldfish, and the canaries are not"
        values_T1 = np.append(np.uint32(NEVER), row["goldfish"])  # of each token, not of each target
        values_T1[here] = marks_n
        out["goldfish"] = values_T1[1:]
    return out


def words(config: CanaryConfig, steps: int) -> str:
    """How many canaries, and when."""
    start, stop = step_range(config, steps)
    return (f"{len(config.repeats) * config.per_repeat:,} texts, {config.occurrences:,} occurrences in steps "
            f"{start + 1:,} to {stop:,}")
