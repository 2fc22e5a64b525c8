"""The page of `lmjax score`: texts to read, each token coloured by what the model thought of it.

What lives here: the content. Style and script of its own are `lmjax.analyze.heatmap_assets`; the house's look and the
charts are `lmjax.report`'s. The page needs no network and no script to be read: the statistic is chosen by CSS; the
script adds what is under the pointer. Everything that came from a text or a model is escaped.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.analyze.heatmap_assets import HEAT_SCRIPT, HEAT_STYLE
from lmjax.analyze.output import say, visible
from lmjax.analyze.page import page
from lmjax.analyze.scored import Scored, context_of, most_surprising, shown
from lmjax.data import Tokenizer
from lmjax.evals.score import Totals
from lmjax.evals.windows import WindowConfig
from lmjax.records import format_bytes
from lmjax.report.charts import Series, escape, format_tick, line_chart

PAGE_TOKENS = 20_000  # more than this makes a browser slow
RUNNING = 32  # tokens that a point of the curves averages
LEVELS = 12


class Statistic(NamedTuple):
    """letter: of its CSS classes. edges: between LEVELS levels of colour."""

    key: str
    letter: str
    title: str
    unit: str
    edges: tuple[float, ...]
    hint: str


STATISTICS = (
    Statistic("surprisal", "s", "Surprisal", "nats", (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10),
              "How unlikely the token was: −ln p."),
    Statistic("entropy", "e", "Entropy", "nats", (0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6),
              "How uncertain the model was before it saw the token: the surprisal that it expected."),
    Statistic("normalised", "z", "Normalised surprise", "standard deviations",
              (-1.5, -1, -0.75, -0.5, -0.25, 0.25, 0.75, 1.5, 2.5, 4, 6),
              "Surprisal less entropy, over its standard deviation: blue came as less of a surprise than the model "
              "expected, orange as more."),
    Statistic("rank", "r", "Rank", "likelier tokens", (1, 2, 3, 5, 10, 20, 50, 100, 300, 1000, 5000),
              "How many tokens the model thought likelier; 0 was its first choice."),
)


def write_page(path: Path, model: str, tokenizer: Tokenizer, texts: Sequence[Scored], totals: Totals,
               windows: WindowConfig, count: int) -> None:
    """Writes the page of the first PAGE_TOKENS tokens of these texts; `totals` and `count` are of all that were
    scored, and the page says where it shows less. Raises OSError where it cannot be written."""
    text = page_of(model, tokenizer, texts, totals, windows, count)
    path.write_text(text, encoding="utf-8", newline="\n")
    say(f"wrote {path} ({format_bytes(len(text.encode()))}); open it in a browser")


def page_of(model: str, tokenizer: Tokenizer, texts: Sequence[Scored], totals: Totals, windows: WindowConfig,
            count: int) -> str:
    """The page as text. Arguments: see `write_page`."""
    parts, left, shown_tokens = [], PAGE_TOKENS, 0
    for done in texts:
        if left <= 0:
            break
        tokens = min(len(done.ids), left)
        parts.append((done, tokens))
        left -= tokens
        shown_tokens += tokens - min(done.given, tokens)
    title = texts[0].name if len(texts) == 1 else f"{count:,} texts"
    part = ("" if shown_tokens >= totals.tokens else
            f" This page shows the first {shown_tokens:,} of {totals.tokens:,} tokens; the numbers above are of all.")
    sections = "".join(_section(done, tokens, index, len(parts) > 1) for index, (done, tokens) in enumerate(parts))
    vocabulary = _vocabulary(tokenizer, [done for done, _ in parts])
    data = json.dumps(vocabulary, separators=(",", ":")).replace("<", "\\u003c")
    picks = "".join(
        f'<input class="pick" type="radio" name="by" id="by-{s.letter}"{" checked" if not i else ""}>'
        for i, s in enumerate(STATISTICS))
    labels = "".join(f'<label for="by-{s.letter}">{s.title}</label>' for s in STATISTICS)
    mono = " checked" if _is_code(parts[0][0].text) else ""
    body = f"""<header><h1>{escape(title)}</h1><p>as <b>{escape(model)}</b> reads it</p></header>
{_tiles(totals)}
{picks}<input class="pick" type="checkbox" id="mono"{mono}>
<nav class="bar"><span class="choices">{labels}</span><label class="mono" for="mono">monospace</label></nav>
<main>
<div class="legends">{"".join(_histogram(s, parts) for s in STATISTICS)}</div>
{sections}
</main>
<aside id="card" hidden aria-live="polite"></aside>
<footer><p>{_reading(windows, texts)}{part}</p><p>Hover over a token, tap it, or move with the arrow keys. Made with
<code>lmjax score</code>; this file needs no network and can be sent as it is.</p></footer>
<script type="application/json" id="vocabulary">{data}</script>"""
    return page(f"{title} · lmjax score", body, HEAT_STYLE + _level_rules(), HEAT_SCRIPT)


def _reading(windows: WindowConfig, texts: Sequence[Scored]) -> str:
    given = "The first token of a text is given, not predicted. " if texts[0].given else ""
    return (f"{given}A prediction sees at most {windows.context:,} tokens; a longer text is read through a window that "
            f"slides by {windows.stride:,}, so each token beyond the first {windows.context:,} is predicted from at "
            f"least {windows.least_context:,}.")


def _tiles(totals: Totals) -> str:
    v = totals.values()

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    top1 = "–" if v["top1"] is None else f"{v['top1']:.0%}"
    tiles = (("Perplexity", number(v["perplexity"], 2), f"{number(v['surprisal'], 3)} nats a token"),
             ("Bits per byte", number(v["bits_per_byte"], 3), f"{v['bytes']:,} bytes of UTF-8"),
             ("Expected", number(v["entropy"], 3), "nats a token: mean entropy"),
             ("First choice", top1, "of tokens are the likeliest one"),
             ("Tokens", f"{v['tokens']:,}", "predicted"))
    return '<dl class="tiles">' + "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in tiles) + "</dl>"


# ---- levels of colour --------------------------------------------------------------------------------------


def level(statistic: Statistic, values: np.ndarray) -> np.ndarray:
    """int [n] in [0, LEVELS): values below the first edge are 0."""
    return np.searchsorted(statistic.edges, values, side="right")


def _level_rules() -> str:
    """CSS: the background of each level of each statistic, in effect where its radio button is on."""
    rules = []
    for s in STATISTICS:
        on = f"#by-{s.letter}:checked~"
        rules.append(f"{on}nav label[for=by-{s.letter}]{{background:var(--ink);color:var(--page);border-color:"
                     f"var(--ink)}}{on}main .of-{s.letter}{{display:block}}")
        neutral = int(level(s, np.array([0.0]))[0]) if s.key == "normalised" else 0
        for n in range(LEVELS):
            if n == neutral:
                continue
            colour = "hot" if n > neutral else "cold"
            share = (n - neutral) / (LEVELS - 1 - neutral) if n > neutral else (neutral - n) / neutral
            rules.append(f"{on}main .{s.letter}{n}{{background:rgb(var(--{colour})/{0.04 + 0.71 * share**1.3:.2f})}}")
        rules.append(f"{on}main .{s.letter}{LEVELS - 1}{{font-weight:600}}")
        rules.append(f"#by-{s.letter}:focus-visible~nav label[for=by-{s.letter}]{{outline:2px solid var(--c0);"
                     "outline-offset:2px}")
    return "".join(rules)


def _histogram(s: Statistic, parts: list[tuple[Scored, int]]) -> str:
    """How many tokens have each level: the legend of the colours as well."""
    values = np.concatenate([done.stats[s.key][:max(tokens - done.given, 0)] for done, tokens in parts])
    counts = np.bincount(level(s, values), minlength=LEVELS)
    tallest = max(int(counts.max()), 1)
    bars = []
    for n, count in enumerate(counts.tolist()):
        name = (f"below {s.edges[0]:g}" if not n else f"{s.edges[-1]:g} or more" if n == LEVELS - 1
                else f"{s.edges[n - 1]:g} to {s.edges[n]:g}")
        height = 100 * count / tallest
        bars.append(f'<li title="{name} {s.unit}: {count:,} tokens"><span style="height:{height:.1f}%"></span>'
                    f'<b class="{s.letter}{n}"></b><small>{"" if not n else format_tick(s.edges[n - 1])}</small></li>')
    mean = f"mean {values.mean():.2f}, median {np.median(values):.2f} {s.unit}" if len(values) else ""
    return (f'<figure class="legend-of of-{s.letter}"><figcaption>{s.title} <small>{s.unit}; {mean}</small>'
            f'</figcaption><p class="note">{s.hint}</p><ul class="bars">{"".join(bars)}</ul></figure>')


# ---- one text --------------------------------------------------------------------------------------------------


def _section(done: Scored, tokens: int, index: int, several: bool) -> str:
    heading = f"<h2>{escape(done.name)} <small>{_in_short(done)}</small></h2>" if several else ""
    return (f'<section>{heading}<p class="text" tabindex="0" role="group" aria-label="{escape(done.name)}">'
            f"{_spans(done, tokens)}</p>{_data(done, tokens)}{_curves(done, tokens)}{_peaks(done, tokens)}</section>")


def _in_short(done: Scored) -> str:
    v = done.totals.values()
    return "" if v["perplexity"] is None else f"perplexity {v['perplexity']:,.2f}, {v['tokens']:,} tokens"


def _spans(done: Scored, tokens: int) -> str:
    levels = [(s.letter, level(s, done.stats[s.key]).tolist()) for s in STATISTICS]
    out = []
    for i, piece in enumerate(done.spans.pieces[:tokens]):
        k = i - done.given
        classes = ["g"] if k < 0 else [f"{letter}{values[k]}" for letter, values in levels]
        if not piece:
            classes.append("b")  # bytes of a character that the next token completes
        elif piece.startswith(("\n", "\r\n")):
            classes.append("n")
        out.append(f'<i class="{" ".join(classes)}">{escape(piece.replace(chr(13), ""))}</i>')
    more = '<span class="more"> …</span>' if tokens < len(done.ids) else ""
    return "".join(out) + more


def _data(done: Scored, tokens: int) -> str:
    """What the card shows, by token, as a JSON block that no text can break out of. null for a given token."""
    n = max(tokens - done.given, 0)

    def column(values: np.ndarray, digits: int) -> list[Any]:
        return [None] * done.given + np.round(values[:n].astype(np.float64), digits).tolist()

    data: dict[str, Any] = {"id": done.ids[:tokens].tolist(), "s": column(done.stats["surprisal"], 3),
                            "e": column(done.stats["entropy"], 3), "z": column(done.stats["normalised"], 2),
                            "r": [None] * done.given + done.stats["rank"][:n].tolist()}
    if "top_ids" in done.stats:
        data["t"] = [None] * done.given + done.stats["top_ids"][:n].tolist()
        data["p"] = column(np.exp(done.stats["top_logprobs"]), 4)
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" class="tokens">{text}</script>'


def _vocabulary(tokenizer: Tokenizer, texts: Sequence[Scored]) -> dict[int, str]:
    """id -> how the card writes it, of every id that the page speaks of."""
    ids = {int(i) for done in texts for i in np.unique(np.concatenate(
        [done.ids, done.stats["top_ids"].ravel() if "top_ids" in done.stats else done.ids[:0]]))}
    names = {tokenizer.bos_id: tokenizer.special_names()["bos_token"],
             tokenizer.eos_id: tokenizer.special_names()["eos_token"]}

    def name(i: int) -> str:
        if i in names or i >= tokenizer.vocab_size:
            return names.get(i, f"(id {i}, unused)")
        text = tokenizer.decode([i])
        return visible(text).encode("utf-8", "replace").decode() if text else f"(id {i})"

    return {i: name(i) for i in sorted(ids)}


def _curves(done: Scored, tokens: int) -> str:
    """Surprisal and entropy along the text, averaged over RUNNING tokens."""
    n = tokens - done.given
    if n < 2 * RUNNING:
        return ""
    at = np.arange(RUNNING - 1, n) + 1 + done.given
    curves = []
    for colour, key in ((1, "surprisal"), (0, "entropy")):
        total = np.cumsum(np.concatenate([[0.0], done.stats[key][:n].astype(np.float64)]))
        curves.append(Series(key, at, (total[RUNNING:] - total[:-RUNNING]) / RUNNING, colour))
    chart = line_chart("Surprisal and entropy", curves, x_label="token", zero=True)
    return (f"<figure class='along'><figcaption>Along the text <small>nats a token, mean of the last {RUNNING} tokens"
            f"</small></figcaption>{chart}</figure>")


def _peaks(done: Scored, tokens: int, count: int = 12) -> str:
    """The tokens of highest surprisal, in their context: what the page says without its colours."""
    n = tokens - done.given
    if n < 2 * count:
        return ""
    rows = []
    for i in [i for i in most_surprising(done, len(done.stats["surprisal"])) if i < n][:count]:
        before, after = context_of(done, i, 36)
        z = done.stats["normalised"][i]
        rows.append(f'<tr><td class="around">{escape(visible(before))}<mark>{escape(shown(done, i + done.given))}'
                    f"</mark>{escape(visible(after))}</td><td>{done.stats['surprisal'][i]:.2f}</td>"
                    f"<td>{done.stats['entropy'][i]:.2f}</td><td>{z:+.2f}</td>"
                    f"<td>{done.stats['rank'][i]:,}</td></tr>")
    return ('<details class="card"><summary>Most surprising tokens</summary><div class="scroll"><table class="peaks">'
            "<tr><th>in its place</th><th>surprisal</th><th>entropy</th><th>normalised</th><th>rank</th></tr>"
            f'{"".join(rows)}</table></div></details>')


def _is_code(text: str) -> bool:
    """Whether many of the first lines are indented, as in source code and tables."""
    lines = [line for line in text[:4000].splitlines() if line.strip()]
    return sum(line.startswith(("  ", "\t")) for line in lines) > 0.2 * len(lines)
