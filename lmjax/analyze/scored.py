"""Texts with the numbers of their tokens, in order, and how a token of one is spoken of.

What lives here: tokenizing, scoring and aligning as one stream. What is printed and written of it:
`lmjax.analyze.score` and `lmjax.analyze.heatmap`.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lmjax.analyze.output import visible
from lmjax.data import Document
from lmjax.evals.score import Stats, Totals, normalised, score_documents
from lmjax.evals.spans import Spans, token_spans
from lmjax.evals.windows import WindowConfig
from lmjax.interop.load import Opened

DEFAULT_CONTEXT = 1024


@dataclasses.dataclass
class Scored:
    """A text with its numbers. ids, spans: of its n tokens; given: how many of the first ones are not predicted (1
    where the model's texts begin with nothing, else 0); stats: of the others, also `normalised`."""

    name: str
    text: str
    ids: np.ndarray
    spans: Spans
    given: int
    stats: Stats
    totals: Totals


def window_of(opened: Opened, context: int | None, stride: int | None) -> WindowConfig:
    """The windows of a model: rows as in training, or at most DEFAULT_CONTEXT of what others take."""
    trained = opened.run.seq_len if opened.run else min(opened.config.max_seq_len, DEFAULT_CONTEXT)
    return WindowConfig(context or trained, stride or 0)


def scored_texts(opened: Opened, texts: Iterator[Document], windows: WindowConfig, top: int = 0,
                 limit: int | None = None, progress: Callable[[int], None] | None = None) -> Iterator[Scored]:
    """Each text with its numbers, in order; of all of them the first `limit` tokens. Texts are begun as the model's
    are, and none is ended: the end of a document is not predicted."""
    waiting: collections.deque[tuple[Document, np.ndarray, int]] = collections.deque()
    prefix = len(opened.prefix_ids)
    before = max(prefix, 1)  # ids that stand before what is counted
    sizes = opened.tokenizer.token_bytes() if opened.tokenizer else None

    def encoded():
        left = limit
        for document in texts:
            ids = whole = opened.encode(document.text)
            if left is not None:
                if left <= 0:
                    return
                ids = ids[:left + before]
                left -= len(ids) - before
            waiting.append((document, whole, len(ids)))
            yield ids

    with jax.set_mesh(opened.mesh):
        for stats in score_documents(opened.graphdef, opened.params, encoded(), windows, mesh=opened.mesh, top=top,
                                     progress=progress):
            document, whole, n = waiting.popleft()
            # The whole text is aligned, since a piece of it may end within a character.
            spans = token_spans(opened.tokenizer, whole[prefix:], document.text, sizes).first(n - prefix)
            ids, given = whole[prefix:n], before - prefix
            stats = {name: value[before - 1:] for name, value in stats.items()}
            stats["normalised"] = normalised(stats)
            totals = Totals().add(stats, int(spans.sizes[given:].sum()))
            yield Scored(document.name, document.text, ids, spans, given, stats, totals)


def most_surprising(done: Scored, count: int) -> list[int]:
    """Indices among the predicted tokens, the most surprising first."""
    return np.argsort(-done.stats["surprisal"], kind="stable")[:count].tolist()


def context_of(done: Scored, i: int, width: int = 28) -> tuple[str, str]:
    """Text before and after predicted token i, at most `width` characters each."""
    start = int(done.spans.starts[i + done.given])
    end = start + len(done.spans.pieces[i + done.given])
    return done.text[max(start - width, 0):start], done.text[end:end + width]


def shown(done: Scored, token: int) -> str:
    """A token on one line: its characters, or <e6> for bytes of a character that is not whole."""
    piece = done.spans.pieces[token]
    if piece or not done.spans.exact:
        return visible(piece)
    at = int(done.spans.sizes[:token].sum())
    return f"<{done.text.encode()[at:at + int(done.spans.sizes[token])].hex(' ')}>"
