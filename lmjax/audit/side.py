"""Probes side by side, as HTML: the source coloured by surprise, and what the model wrote, marked where it is the same.

What lives here: which probes are shown and how. Everything is escaped.
"""

import numpy as np

from lmjax.audit.metrics import PAD
from lmjax.audit.page_assets import EDGES, LEVELS
from lmjax.audit.probes import Probes
from lmjax.audit.store import Arrays
from lmjax.audit.summary import by_document
from lmjax.data import Tokenizer
from lmjax.evals.spans import token_spans
from lmjax.interop.load import Opened
from lmjax.report.charts import escape

SHOWN = 24  # probes on the page
PREFIX = 64  # tokens of a prefix that are shown


def key(goldfish: bool) -> str:
    """What colours and lines mean."""
    levels = "".join(f'<i class="h{n}">&nbsp;</i>' for n in range(1, LEVELS))
    dropped = '<span><i class="sw-d">never trained on (goldfish)</i></span>' if goldfish else ""
    return (f'<p class="key"><span><i>expected</i>{levels}<i>surprising</i>(edges at '
            f'{", ".join(f"{edge:g}" for edge in EDGES)} nats)</span><span><i class="sw-y">same token as the source</i>'
            f'</span><span><i class="sw-first">first that is not</i></span>{dropped}</p>')


def chosen(probes: Probes, columns: Arrays) -> list[int]:
    """Indices of the probes to show: the most extracted ones, one a document, then an even sample of the rest."""
    order, seen, first, rest = by_document(probes, columns), set(), [], []
    for i in order:
        document = probes.probes[i].document
        (rest if document in seen else first).append(i)
        seen.add(document)
    most = 2 * SHOWN // 3
    head, tail = first[:most], first[most:]
    few = SHOWN - len(head)
    tail = tail if len(tail) <= few else [tail[j * len(tail) // few] for j in range(few)]
    return head + tail + rest[:max(0, SHOWN - len(head) - len(tail))]


def examples(model: Opened, probes: Probes, columns: Arrays, raw: Arrays, dropped: list) -> str:
    """The section of the page. dropped: of each document which tokens goldfish dropped, or None."""
    indices = chosen(probes, columns)
    sizes = model.tokenizer.token_bytes()
    out = [_probe(model.tokenizer, probes, i, columns, raw, dropped, sizes) for i in indices]
    if len(indices) < len(probes.probes):
        out.append(f'<p class="note">{len(indices)} of {len(probes.probes):,} probes: the most extracted one of each '
                   "document, then an even sample; audit.csv has the numbers of all.</p>")
    return "".join(out)


def _probe(tokenizer: Tokenizer, probes: Probes, i: int, columns: Arrays, raw: Arrays, dropped: list,
           sizes: np.ndarray) -> str:
    probe, S = probes.probes[i], probes.config.suffix
    text = probes.texts[probe.document]
    spans = token_spans(tokenizer, probes.ids[probe.document], text.text, sizes)
    before = spans.pieces[max(probe.start - min(probe.prefix, PREFIX), 0):probe.start]
    cut = "… " if probe.prefix > PREFIX else ""
    truth = probes.suffix(probe)
    marks = [None] * S if dropped[probe.document] is None else dropped[probe.document][probe.start:probe.start + S]
    source = "".join(_token(piece, [f"h{level}" if level else "", "d" if mark else ""], f"{nats:.2f} nats")
                     for piece, level, mark, nats in zip(
                         spans.pieces[probe.start:probe.start + S],
                         np.searchsorted(EDGES, raw["surprisal"][i], side="right").tolist(), marks,
                         raw["surprisal"][i].tolist(), strict=True))
    exact, at = bool(columns["exact"][i]), int(columns["divergence"][i])
    verdict = "verbatim" if exact else f"verbatim for {at} of {S} tokens"
    seen = "held out" if text.count == 0 else f"seen {text.count:,} ×" if text.count != 1 else ""
    facts = [f"{probe.prefix} tokens shown", f"offset {probe.offset}" if probe.offset else "", seen,
             f"{columns['nats'][i] / np.log(2):.1f} bits", _drawn(columns["log_p"][i]),
             f"ROUGE-L {columns['rouge_l'][i]:.2f}" if np.isfinite(columns["rouge_l"][i]) else ""]
    return (f'<section class="probe"><header><b>{escape(text.name)}</b><span>'
            f'{escape(" · ".join(fact for fact in facts if fact))}</span>'
            f'<span class="verdict{" yes" if exact else ""}">{verdict}</span></header>'
            f'<p class="shown">{cut}{escape("".join(before))}</p><div class="sides">'
            f'<div class="side"><h4>Source</h4><p>{source}</p></div>'
            f'<div class="side"><h4>Model</h4><p>{_written(tokenizer, raw, i, truth, sizes)}</p></div></div></section>')


def _drawn(log_p: float) -> str:
    return "never drawn" if not np.isfinite(log_p) else f"p = {np.exp(log_p):.2g}" if log_p > -300 else "p < 1e-130"


def _written(tokenizer: Tokenizer, raw: Arrays, i: int, truth: np.ndarray, sizes: np.ndarray) -> str:
    if not raw["written"][i]:
        return '<i class="x">not written (--continuations)</i>'
    ids = raw["greedy"][i]
    ids = ids[ids != PAD]
    pieces = token_spans(tokenizer, ids, tokenizer.decode(ids), sizes).pieces
    same = ids == truth[:len(ids)]
    first = len(ids) if same.all() else int(np.argmin(same))
    out = [_token(piece, ["y" if hit else "x", "first" if at == first else ""])
           for at, (piece, hit) in enumerate(zip(pieces, same.tolist(), strict=True))]
    if len(ids) < len(truth):
        out.append('<i class="x first">(ended)</i>')
    return "".join(out)


def _token(piece: str, classes: list[str], title: str = "") -> str:
    classes = [name for name in [*classes, "n" if piece.startswith(("\n", "\r\n")) else ""] if name]
    name = f' class="{" ".join(classes)}"' if classes else ""
    about = f' title="{title}"' if title else ""
    return f"<i{name}{about}>{escape(piece.replace(chr(13), ''))}</i>"
