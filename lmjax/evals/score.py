"""How a model sees each token of a text: surprisal, entropy, varentropy, rank, and the likeliest token.

With p the model's prediction and y the token that came,

    surprisal    s = -ln p(y)                     nats
    entropy      H = -sum p ln p                  nats: the surprisal that the model itself expects
    varentropy   V = sum p (-ln p - H)^2          nats^2: its variance
    normalised   z = (s - H) / sqrt V             how far s is from what was expected, in standard deviations
    rank         tokens that are likelier than y, and those just as likely with a smaller id; 0: the likeliest

(z is Min-K%++'s token score with the sign turned, arXiv 2404.02936.) What lives here: these numbers for a batch, in
one compiled pass that never holds [tokens, vocabulary], their sums, and a generator that runs documents of any length
through it. How documents are cut into rows is `lmjax.evals.windows`; whatever can be reduced from these numbers needs
no pass of its own. Legend of letters: `lmjax.axes`.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lmjax.axes import batch_ways, constrain
from lmjax.errors import DataError, NonFiniteError
from lmjax.evals.windows import Row, WindowConfig, cut_windows, pack, stack
from lmjax.loader import local_rows, to_global
from lmjax.losses.cross_entropy import CHUNK_BYTES

STATS = ("surprisal", "entropy", "varentropy", "rank", "top_id", "top_logprob")
TOP = ("top_ids", "top_logprobs")  # of the n likeliest, where asked for
SAMPLED = "sampled"  # of a sampling scheme, where asked for
SIGMA_FLOOR = 1e-4  # nats; below it float32 cannot tell sqrt V from 0

Stats = dict[str, np.ndarray]


class Sampling(NamedTuple):
    """A sampling scheme: logits over `temperature`, then the top_k likeliest (0: all of them), renormalised."""

    top_k: int = 40
    temperature: float = 1.0


# ---- one batch -----------------------------------------------------------------------------------------


def logit_stats(z_BTV: jax.Array, targets_BT: jax.Array, top: int = 0,
                sampling: Sampling | None = None) -> dict[str, jax.Array]:
    """{name of STATS: [B, T]} of float32 logits; with top > 0 also TOP, [B, T, top]; with a scheme also SAMPLED [B, T],
    ln of the probability that it draws the target, -inf where it never does. Targets are in [0, V)."""
    z_BTV = z_BTV - jnp.max(z_BTV, axis=-1, keepdims=True)
    ids_BTV = jax.lax.broadcasted_iota(jnp.int32, z_BTV.shape, 2)
    log_sum_BT1 = jnp.log(jnp.sum(jnp.exp(z_BTV), axis=-1, keepdims=True))
    surprise_BTV = log_sum_BT1 - z_BTV  # -ln p of every token
    p_BTV = jnp.exp(-surprise_BTV)
    # Every summand of H and V is positive, so that nothing cancels: E[x^2] - H^2 would lose all digits of a small V.
    entropy_BT1 = jnp.sum(p_BTV * surprise_BTV, axis=-1, keepdims=True)
    varentropy_BT = jnp.sum(p_BTV * jnp.square(surprise_BTV - entropy_BT1), axis=-1)
    # The token is picked with a masked sum, which stays local where the vocabulary is split over devices.
    y_BT1 = targets_BT[..., None]
    z_y_BT1 = jnp.sum(jnp.where(ids_BTV == y_BT1, z_BTV, 0.0), axis=-1, keepdims=True)
    before_BTV = (z_BTV > z_y_BT1) | ((z_BTV == z_y_BT1) & (ids_BTV < y_BT1))
    best_BT = jnp.min(jnp.where(z_BTV == 0, ids_BTV, z_BTV.shape[-1] - 1), axis=-1)  # the first of equals
    found = {"surprisal": (log_sum_BT1 - z_y_BT1)[..., 0], "entropy": entropy_BT1[..., 0], "varentropy": varentropy_BT,
             "rank": jnp.sum(before_BTV, axis=-1, dtype=jnp.int32), "top_id": best_BT,
             "top_logprob": -log_sum_BT1[..., 0]}
    if top:
        best, ids = jax.lax.top_k(z_BTV, top)
        found |= {"top_ids": ids, "top_logprobs": best - log_sum_BT1}
    if sampling:
        kept = jax.lax.top_k(z_BTV, sampling.top_k)[0] if 0 < sampling.top_k < z_BTV.shape[-1] else z_BTV
        drawn_BT = z_y_BT1[..., 0] / sampling.temperature - jax.nn.logsumexp(kept / sampling.temperature, axis=-1)
        found[SAMPLED] = jnp.where(found["rank"] < (sampling.top_k or z_BTV.shape[-1]), drawn_BT, -jnp.inf)
    return found


def token_stats(graphdef: nnx.GraphDef, params, batch: dict[str, jax.Array], *, top: int = 0,
                sampling: Sampling | None = None, chunk_bytes: int = CHUNK_BYTES) -> dict[str, jax.Array]:
    """{name of STATS: [B, T]}, TOP [B, T, top] where top > 0, SAMPLED [B, T] of a scheme: at each place, about
    targets_BT there.

    graphdef, params: `nnx.split` of a Decoder, params as pure dictionaries, sharded or not (call it inside
    `jax.set_mesh` then). batch: `tokens` and `targets`, int32 [B, T], targets in [0, V); `segments` and `positions` as
    the decoder takes them, or left out for one document a row. Other keys are not looked at: every place is scored, and
    the caller knows which ones count. rank, top_id and top_ids are int32, the rest float32, in nats.
    """
    used = {name: batch[name] for name in ("tokens", "targets", "segments", "positions") if name in batch}
    return _token_stats(params, used, graphdef=graphdef, top=top, sampling=sampling, chunk_bytes=chunk_bytes)


@functools.partial(jax.jit, static_argnames=("graphdef", "top", "sampling", "chunk_bytes"))
def _token_stats(params, batch, *, graphdef, top, sampling, chunk_bytes):
    model = nnx.merge(graphdef, params)
    x_BTD = model.hidden(batch["tokens"], batch.get("segments"), batch.get("positions"))
    B, T, _ = x_BTD.shape
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    columns = max(1, chunk_bytes * devices // (4 * model.config.vocab_size * B))
    chunks = math.ceil(T / columns)
    pad = -T % chunks

    def split(a):  # [B, T, …] -> [chunks, B, T / chunks, …]: rows, which are split over devices, are never cut
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, chunks, -1, *a.shape[2:]), 1, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 1).reshape(B, T + pad, *a.shape[3:])[:, :T]

    def one(chunk):
        x, targets = chunk
        return logit_stats(constrain(model.logits(x), "BTV"), targets, top, sampling)

    return jax.tree.map(join, jax.lax.map(one, (split(x_BTD), split(batch["targets"]))))


def normalised(stats: Stats) -> np.ndarray:
    """z = (s - H) / sqrt V, with sqrt V at least SIGMA_FLOOR; 0 for a uniform prediction, where s = H and V = 0."""
    sigma = np.maximum(np.sqrt(stats["varentropy"]), SIGMA_FLOOR)
    return (stats["surprisal"] - stats["entropy"]) / sigma


# ---- sums ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Totals:
    """Sums over tokens, in float64. bytes: UTF-8 bytes of the text that the scored tokens stand for."""

    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    entropy: float = 0.0
    normalised: float = 0.0
    likeliest: int = 0

    def add(self, stats: Stats, text_bytes: int) -> "Totals":
        """Counts these tokens in; gives itself."""
        self.tokens += len(stats["surprisal"])
        self.bytes += int(text_bytes)
        self.nats += float(stats["surprisal"].sum(dtype=np.float64))
        self.entropy += float(stats["entropy"].sum(dtype=np.float64))
        self.normalised += float(normalised(stats).sum(dtype=np.float64))
        self.likeliest += int((stats["rank"] == 0).sum())
        return self

    def values(self) -> dict[str, float | int | None]:
        """Means a token (surprisal, entropy: nats; normalised; top1: share of tokens of rank 0), perplexity =
        exp(mean surprisal), bits_per_byte = bits of all tokens / bytes. None where there is nothing to divide by."""
        def mean(total: float) -> float | None:
            return total / self.tokens if self.tokens else None

        loss = mean(self.nats)
        return {"tokens": self.tokens, "bytes": self.bytes, "surprisal": loss,
                "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
                "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else None,
                "entropy": mean(self.entropy), "normalised": mean(self.normalised), "top1": mean(self.likeliest)}


# ---- documents of any length ---------------------------------------------------------------------------


@dataclasses.dataclass
class _Open:
    """A document on its way: its numbers so far, and how many are missing."""

    stats: Stats
    missing: int


def score_documents(graphdef: nnx.GraphDef, params, documents: Iterable[np.ndarray], windows: WindowConfig, *,
                    mesh: Mesh | None = None, top: int = 0, sampling: Sampling | None = None,
                    progress: Callable[[int], None] | None = None) -> Iterator[Stats]:
    """For each document of ids [n], in order: {name of STATS: [n - 1]} about its ids from the second on, and what else
    `token_stats` gives.

    Documents are read as they are needed, at most a few batches ahead. Those longer than `windows.context` are read
    through a window that slides by `windows.stride`, so that each token is predicted once, from at least
    context - stride + 1 tokens unless the document has fewer before it. Short ones share rows, and see only themselves.
    mesh: rows are split over it; call it inside `jax.set_mesh(mesh)`. progress: called with the tokens scored so far.

    Raises ConfigError for windows that cannot be, DataError for an empty document or an id outside the vocabulary,
    NonFiniteError where the model gives no numbers.
    """
    config = nnx.merge(graphdef, params).config
    windows.check(config.max_seq_len)
    ways = batch_ways(mesh) if mesh is not None else 1
    # Frequencies that depend on the length of a row would change with its neighbours.
    alone = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
    opened: collections.deque[_Open] = collections.deque()
    pending: tuple | None = None  # fetched one batch late, so that the device never waits for the host
    done = 0
    for group in _groups(documents, windows, opened, config.vocab_size, top, sampling):
        for rows, width in pack(group, windows, ways, alone):
            batch = stack(rows, width)
            if mesh is not None:
                batch = to_global(batch, local_rows(mesh, len(rows)), mesh, len(rows))
            ready, pending = pending, (rows, token_stats(graphdef, params, batch, top=top, sampling=sampling))
            done = _collect(ready, done, progress)
            while len(opened) > 1 and not opened[0].missing:
                yield opened.popleft().stats
    done = _collect(pending, done, progress)
    while opened:
        assert not opened[0].missing
        yield opened.popleft().stats


def _groups(documents: Iterable[np.ndarray], windows: WindowConfig, opened: collections.deque, vocab_size: int,
            top: int, sampling: Sampling | None) -> Iterator[list]:
    """Windows of a few batches at a time, and opens their documents."""
    group, tokens = [], 0
    for number, ids in enumerate(documents):
        ids = np.asarray(ids, np.int32)
        if not len(ids):
            raise DataError(f"document {number} is empty; begin it with the tokenizer's bos token, or leave it out")
        if ids.min() < 0 or ids.max() >= vocab_size:
            at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
            raise DataError(f"document {number}: id {ids[at]} at position {at} is outside the vocabulary [0, "
                            f"{vocab_size}); use the tokenizer that the model was trained with")
        n = len(ids) - 1
        document = _Open({name: np.zeros(n, np.int32 if name in ("rank", "top_id") else np.float32) for name in STATS},
                         n)
        if top:
            document.stats |= {"top_ids": np.zeros((n, top), np.int32), "top_logprobs": np.zeros((n, top), np.float32)}
        if sampling:
            document.stats[SAMPLED] = np.zeros(n, np.float32)
        opened.append(document)
        group += cut_windows(ids, windows.context, windows.stride, document)
        tokens += n
        if tokens >= 4 * windows.batch_tokens:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _collect(ready: tuple[list[Row], dict] | None, done: int, progress: Callable[[int], None] | None) -> int:
    """Writes the numbers of a batch to its documents; gives the tokens scored so far."""
    if ready is None:
        return done
    rows, stats = ready
    stats = {name: np.asarray(value) for name, value in jax.device_get(stats).items()}
    for index, row in enumerate(rows):
        for window, at in row.placed:
            part = slice(at + window.skip, at + len(window.ids) - 1)
            into = slice(window.first, window.first + part.stop - part.start)
            document = window.document
            for name, value in stats.items():
                document.stats[name][into] = value[index, part]
            if not np.isfinite(document.stats["surprisal"][into]).all():
                raise NonFiniteError("score: the surprisal of a token is not finite; the weights hold NaN or "
                                     "infinities, or activations overflow; use another checkpoint, or float32")
            document.missing -= part.stop - part.start
            done += part.stop - part.start
    if progress:
        progress(done)
    return done
