"""The page of `lmjax audit`: what was repeated beside its source, how much, and what a control repeats.

What lives here: the content. The side by side of probes is `lmjax.audit.side`, the style `lmjax.audit.page_assets`, the
frame and the charts are the house's. The page needs no network and no script to be read, and everything that came from
a text or a model is escaped.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.analyze.page import figure, html_table, page
from lmjax.audit.membership import BLIND, NAMES
from lmjax.audit.page_assets import AUDIT_STYLE
from lmjax.audit.probes import Probes, dropped_by_goldfish
from lmjax.audit.side import examples, key
from lmjax.audit.store import Arrays
from lmjax.audit.summary import BINS
from lmjax.audit.texts import Text, goldfish_of
from lmjax.interop.load import Opened
from lmjax.records import format_count
from lmjax.report.charts import NEUTRAL, Series, escape, line_chart

COLOURS = {"model": 1, "control": 0, "base rate": 7}


def audit_page(model: Opened, texts: Sequence[Text], probes: Probes, columns: Arrays, raw: Arrays,
               found: dict[str, Any]) -> str:
    """The page as text. columns, raw: of the model (`summary.probe_columns`, `passes.probe_pass`); found: what
    audit.json holds."""
    fish = goldfish_of(model)
    seen = probes.config
    name = f"{model.path.name} at step {model.step}" if model.run else model.path.name
    title = f"What {name} memorised"
    warnings = [note.removeprefix("warning: ") for note in found["notes"] if note.startswith("warning")]
    others = [note for note in found["notes"] if not note.startswith("warning")]
    notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in warnings)
    notes += f'<ul class="aside">{"".join(f"<li>{escape(note)}</li>" for note in others)}</ul>' if others else ""
    body = f"""<header><h1>{escape(title)}</h1><p>{len(probes.probes):,} probes of {len(texts):,} documents: shown
{_list(seen.prefixes)} tokens, asked for the next {seen.suffix}; {format_count(found['parameters'])} parameters</p>
</header>
{_tiles(found)}{notes}
<main>
<h2>How much is repeated</h2>
<div class="charts">{_survival(found, fish)}{_rouge(found)}{_draws(found)}{_curves(found)}</div>
{_cells(found)}
<h2>Side by side</h2>
{key(fish is not None)}
{examples(model, probes, columns, raw, _dropped(model, fish, probes))}
{_membership(found)}
{_bits(found)}
<h2>How it was measured</h2>
{_how(found, probes, fish)}
</main>
<footer><p>Made with <code>lmjax audit</code>; this file needs no network and can be sent as it is. Definitions with
their sources: docs/audit.md.</p></footer>"""
    return page(f"{title} · lmjax audit", body, AUDIT_STYLE)


def _list(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _dropped(model: Opened, fish, probes: Probes) -> list[np.ndarray | None]:
    return [None if fish is None else dropped_by_goldfish(fish, model.prefix_ids, ids) for ids in probes.ids]


# ---- numbers ---------------------------------------------------------------------------------------------------


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}" if share < 0.0995 or share > 0.995 else f"{share:.0%}"


def _tiles(found: dict[str, Any]) -> str:
    own = found["extraction"]["model"]
    cell, control = own["overall"], found["extraction"].get("control", {}).get("overall")
    low, high = cell["exact_95"]
    beside = f"; control {_percent(control['exact'])}" if control else ""
    tiles = [("Verbatim", _percent(cell["exact"]), f"95 %: {_percent(low)} to {_percent(high)}{beside}")]
    if cell["rouge_l"] is not None:
        base = "" if cell["base_rouge_l"] is None else f"base rate {cell['base_rouge_l']:.2f}"
        beside = f"control {control['rouge_l']:.2f}; " if control and control["rouge_l"] is not None else ""
        tiles.append(("ROUGE-L", f"{cell['rouge_l']:.2f}", beside + base))
    at = own["draws"]["n"].index(1000)
    tiles.append(("In 1,000 draws", _percent(own["draws"]["p=0.5"][at]), "extracted with probability ½"))
    tiles.append(("Goes on for", f"{cell['divergence']:.1f}", "tokens before it leaves the source, on average"))
    bits = found["bits"]
    if "unintended_bits" in bits:
        tiles.append(("Unintended", f"{bits['unintended_bits_mean']:,.0f} bits", "a document, beyond the reference"))
    else:
        tiles.append(("Code length", f"{bits['ratio_to_zlib']:.2f} ×", "that of zlib, over whole documents"))
    if "membership" in found:
        best = max((row for row in found["membership"]["attacks"] if row["attack"] not in BLIND),
                   key=lambda row: row["auc"])
        blind = next(row for row in found["membership"]["attacks"] if row["attack"] == "blind")
        tiles.append(("Membership", f"{best['auc']:.2f}", f"AUC of {NAMES[best['attack']]}; without a model "
                      f"{blind['auc']:.2f}"))
    return '<dl class="tiles">' + "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{escape(note)}</small></dd></div>" for name, value, note in tiles
    ) + "</dl>"


# ---- charts ----------------------------------------------------------------------------------------------------


def _survival(found: dict[str, Any], fish) -> str:
    curves = []
    for name, part in found["extraction"].items():
        y = 100 * np.array(part["survival"])
        curves.append(Series(name, np.arange(len(y)), y, COLOURS[name]))
    t = np.arange(len(curves[0].x))
    if fish is not None and fish.strategy in ("hash", "hash_table"):
        curves.append(Series(f"if a dropped token is never guessed (k = {fish.k})", t, 100 * (1 - 1 / fish.k) ** t,
                             NEUTRAL, "dash"))
    chart = line_chart("Still verbatim", curves, x_label="tokens of the suffix", zero=True)
    return figure("Still verbatim", "% of probes whose first tokens are all the likeliest", chart)


def _rouge(found: dict[str, Any]) -> str:
    x = np.round(100 * (BINS[:-1] + BINS[1:]) / 2).astype(int)
    curves = [Series(name, x, 100 * np.array(part["rouge_l_histogram"]), COLOURS[name], "dots")
              for name, part in found["extraction"].items() if part["rouge_l_histogram"]]
    if not curves:
        return ""
    base = found["extraction"]["model"]["overall"]["base_rouge_l"]
    marks = [] if base is None else [100 * base]
    legend = [Series(s.name, x[:0], x[:0], s.colour, s.style) for s in curves]
    chart = line_chart("ROUGE-L", curves, x_label="ROUGE-L in %", zero=True, marks=marks, legend=legend)
    dotted = "" if base is None else "; dotted: mean against other documents"
    return figure("ROUGE-L of continuations", f"% of probes{dotted}", chart)


def _draws(found: dict[str, Any]) -> str:
    own = found["extraction"]["model"]["draws"]
    n = np.array(own["n"], np.float64)
    curves = [Series(f"model, {key}", n, 100 * np.array(own[key]), colour, style) for key, colour, style in (
        ("p=0.1", 4, "dash"), ("p=0.5", COLOURS["model"], "dots"), ("p=0.9", 3, "dash"))]
    if "control" in found["extraction"]:
        curves.append(Series("control, p=0.5", n, 100 * np.array(found["extraction"]["control"]["draws"]["p=0.5"]),
                             COLOURS["control"], "dots"))
    chart = line_chart("Extracted by drawing", curves, x_label="draws", log_x=True, zero=True)
    return figure("Extracted by n draws", "% of probes, with probability at least p", chart)


def _curves(found: dict[str, Any]) -> str:
    """Verbatim share by what varies, and ROUGE-L where it is known."""
    out = []
    for axis, label in (("count", "times seen"), ("prefix", "tokens shown"), ("offset", "tokens before the prefix"),
                        ("position", "position in the document")):
        if len(found["extraction"]["model"][f"by_{axis}"]) < 2:
            continue
        curves = []
        for name, part in found["extraction"].items():
            cells = part[f"by_{axis}"]
            x = np.array([cell[axis] for cell in cells], np.float64)
            curves.append(Series(name, x, 100 * np.array([cell["exact"] for cell in cells]), COLOURS[name], "dots"))
            if name == "model":
                curves += [Series(what, x, 100 * np.array([cell["exact_95"][i] for cell in cells]), 4, "dash")
                           for i, what in enumerate(("95 %, low", "95 %, high"))]
        chart = line_chart(f"Verbatim by {label}", curves, x_label=label, zero=True,
                           log_x=axis == "count" and min(curves[0].x) > 0 and max(curves[0].x) >= 8)
        out.append(figure(f"Verbatim by {label}", "% of probes", chart))
    return "".join(out)


# ---- tables ----------------------------------------------------------------------------------------------------


def _cells(found: dict[str, Any]) -> str:
    head = ["", "probes", "verbatim", "95 %", "control", "ROUGE-L", "words", "control", "base rate", "longest run",
            "TTR"]
    own, control = found["extraction"]["model"], found["extraction"].get("control")

    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def row(name: str, cell: dict, other: dict | None) -> list[str]:
        low, high = cell["exact_95"]
        return [name, f"{cell['probes']:,}", _percent(cell["exact"]), f"{_percent(low)} – {_percent(high)}",
                _percent(other["exact"]) if other else "", number(cell["rouge_l"]), number(cell["rouge_l_words"]),
                number(other["rouge_l"]) if other else "", number(cell["base_rouge_l"]), number(cell["longest_run"], 1),
                number(cell["ttr"])]

    rows = [head, row("all", own["overall"], control and control["overall"])]
    for axis in ("count", "prefix", "offset", "position", "source"):
        if len(own[f"by_{axis}"]) > 1:
            theirs = control[f"by_{axis}"] if control else [None] * len(own[f"by_{axis}"])
            rows += [row(f"{axis} {cell[axis] or ('–' if axis == 'source' else 0)}", cell, other)
                     for cell, other in zip(own[f"by_{axis}"], theirs, strict=True)]
    return f'<div style="margin-top:18px">{html_table(rows)}</div>'


def _membership(found: dict[str, Any]) -> str:
    if "membership" not in found:
        return ""
    part = found["membership"]
    rows = [["attack", "AUC", "95 %", "TPR at 1 % FPR", "95 %", "TPR at 0.1 % FPR", "95 %"]]
    for row in part["attacks"]:
        cells = [NAMES[row["attack"]], f"{row['auc']:.3f}", "{:.3f} – {:.3f}".format(*row["auc_95"])]
        for rate in ("0.01", "0.001"):
            cells += [f"{row[f'tpr_at_{rate}']:.1%}", "{:.1%} – {:.1%}".format(*row[f"tpr_at_{rate}_95"])]
        rows.append(cells)
    few = part["nonmembers"] < 1000
    rate = (f" With {part['nonmembers']:,} non-members, 0.1 % of them is none: that column asks for no false alarm at "
            "all.") if few else ""
    warning = f'<p class="warn">{escape(part["warning"])}</p>' if part["warning"] else ""
    return (f"<h2>Membership inference</h2><p>{part['members']:,} documents that were trained on against "
            f"{part['nonmembers']:,} that were not. The blind rows look at no model: where they do better than 0.5, "
            f"the lists differ in their text.{rate}</p>{warning}{html_table(rows)}")


def _bits(found: dict[str, Any]) -> str:
    part = found["bits"]
    known = "unintended_bits" in part
    key = (lambda row: -row["unintended_bits"]) if known else (lambda row: row["ratio_to_zlib"])
    rows = [["document", "times seen", "tokens", "bits", "zlib's bits", "ratio",
             *(["reference's bits", "unintended bits"] if known else [])]]
    for row in sorted(part["by_document"], key=key)[:12]:
        rows.append([row["name"][-60:], f"{row['count']:,}", f"{row['tokens']:,}", f"{row['bits']:,.0f}",
                     f"{row['zlib_bits']:,}", f"{row['ratio_to_zlib']:.2f}",
                     *([f"{row['reference_bits']:,.0f}", f"{row['unintended_bits']:,.0f}"] if known else [])])
    total = (f"{part['documents']:,} documents, {part['bytes']:,} bytes: {part['bits_per_byte']:.3f} bits a byte "
             f"against {part['zlib_bits_per_byte']:.3f} of zlib.")
    if known:
        low, high = part["unintended_bits_mean_95"]
        total += (f" Unintended memorisation: {part['unintended_bits_mean']:,.1f} bits a document (95 %: {low:,.1f} to "
                  f"{high:,.1f}), {part['unintended_bits']:,.0f} in all, "
                  f"{part['unintended_bits_per_parameter']:.3g} bits a parameter.")
    order = "the most memorised first" if known else "those that the model codes best first"
    return f"<h2>Memory in bits</h2><p>{total} Of all, {order}:</p>{html_table(rows)}"


def _how(found: dict[str, Any], probes: Probes, fish) -> str:
    sampling, paths = found["identity"]["sampling"], found["identity"]["paths"]
    control = paths.get("control", "none")
    items = [
        ("Verbatim", f"all {probes.config.suffix} tokens of the suffix are the model's likeliest ones, given the "
                     "prefix and the true tokens before: its greedy continuation is the suffix. Wilson interval."),
        ("Control", f"{control}; the same probes, never trained on."),
        ("Base rate", "a continuation against the suffix of another document."),
        ("ROUGE-L", "longest common subsequence of continuation and suffix over the tokens of the suffix; F1 for words."
                    " Greedy text that goes round in circles (a low TTR, different tokens over tokens) makes it small "
                    "without saying that nothing is remembered."),
        ("Draws", f"temperature {sampling['temperature']:g}, top-k {sampling['top_k'] or 'off'}; from the "
                  "probabilities of the true tokens, n ≥ ln(1 − p) / ln(1 − p_z), without drawing."),
        ("Colour", "surprisal −ln p of each true token, in nats."),
    ]
    if fish is not None:
        known = fish.strategy in ("hash", "hash_table")
        items.append(("Goldfish", f"trained with strategy {fish.strategy}, k = {fish.k}" + (
            f", context {fish.context}; which tokens were dropped follows from the text and is marked" if known else
            "; which tokens were dropped is no function of the text, so none is marked")))
    items.append(("Weights", " ".join(f"{name} {value[:16]}" for name, value in
                                      found["identity"]["weights_sha256"].items()) + " (sha256)"))
    return '<dl class="how">' + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in items) + "</dl>"
