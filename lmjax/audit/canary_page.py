"""The page of `lmjax audit exposure`: the curve, the table, and every canary with its secret.

What lives here: the content. The frame and the charts are the house's; it needs no network, and everything that came
from a config or a model is escaped.
"""

from pathlib import Path
from typing import Any

import numpy as np

from lmjax.analyze.page import figure, html_table, page
from lmjax.report.charts import NEUTRAL, Series, escape, line_chart

STYLE = """
body { max-width: 1080px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); }
.warn { margin: 16px 0 0; padding: 10px 16px; border-left: 3px solid var(--c1); background: var(--card);
  border-radius: 0 8px 8px 0; }
td:first-child, th:first-child { text-align: left; }
"""


def canary_page(found: dict[str, Any], rows: list[list[str]]) -> str:
    """The page as text. found: what exposure.json holds; rows: of the table, the heading first."""
    title = f"Exposure of the canaries of {Path(found['model']).name}"
    notes = "".join(f'<p class="warn">{escape(note.removeprefix("warning: "))}</p>' for note in found["notes"])
    among = (f"each ranked among all {found['secrets']:,} secrets that its format can hold" if found["exact"] else
             f"each beside {found['identity']['candidates']:,} of the {found['secrets']:.4g} secrets that its format "
             f"can hold: exposure from a skew-normal distribution fitted to them, and by the rank in the sample, which "
             f"cannot exceed {found['sample_ceiling']:.2f} bits")
    body = f"""<header><h1>{escape(title)}</h1><p>{len(found['canaries']):,} canaries, {among}</p></header>
{notes}
<main>
<div class="charts">{_exposure(found)}{_extracted(found)}</div>
<div style="margin-top:18px">{html_table(rows)}</div>
<p class="note" style="margin-top:12px">Exposure is log2 |R| − log2 rank (Carlini et al. 2019, arXiv 1802.08232):
{found['ceiling']:.2f} bits where the model prefers the canary's own secret to every other one,
{found['chance']:.2f} on average where it never saw it. Extracted: greedy decoding writes the secret after what stands
before it. Intervals are of 95 %, over canaries.</p>
<h2>Every canary</h2>
{html_table(_canaries(found))}
</main>
<footer><p>Made with <code>lmjax audit exposure</code>; this file needs no network and can be sent as it is.
Definitions: docs/audit.md.</p></footer>"""
    return page(f"{title} · lmjax audit", body, STYLE)


def _exposure(found: dict[str, Any]) -> str:
    seen = [cell for cell in found["by_count"] if cell["count"]]
    x = np.array([cell["count"] for cell in seen])
    curves = [Series("fitted" if not found["exact"] else "mean", x, np.array([cell["exposure"] for cell in seen]), 1,
                     "dots")]
    if not found["exact"]:
        curves.append(Series("by sample", x, np.array([cell["exposure_sampled"] for cell in seen]), 0, "dots"))
    for edge, name in ((0, "95 %"), (1, "")):
        curves.append(Series(name, x, np.array([cell["exposure_95"][edge] for cell in seen]), 1, "dash"))
    never = [cell for cell in found["by_count"] if not cell["count"]]
    flat = [("ceiling", found["ceiling"], NEUTRAL, "line"), ("chance", found["chance"], NEUTRAL, "dash")]
    flat += [("never in the run", never[0]["exposure"], 2, "line")] if never else []
    curves += [Series(name, x, np.full(len(x), value), colour, style) for name, value, colour, style in flat]
    legend = [Series(s.name, x[:0], x[:0], s.colour, s.style) for s in curves if s.name]
    chart = line_chart("Exposure", curves, x_label="times in the run", log_x=True, zero=True, legend=legend)
    return figure("Exposure", "bits, mean over canaries", chart)


def _extracted(found: dict[str, Any]) -> str:
    seen = [cell for cell in found["by_count"] if cell["count"]]
    x = np.array([cell["count"] for cell in seen])
    curves = [Series("extracted", x, np.array([100 * cell["extracted"] for cell in seen]), 1, "dots")]
    for edge, name in ((0, "95 %"), (1, "")):
        curves.append(Series(name, x, np.array([100 * cell["extracted_95"][edge] for cell in seen]), 1, "dash"))
    legend = [Series(s.name, x[:0], x[:0], s.colour, s.style) for s in curves if s.name]
    chart = line_chart("Extracted", curves, x_label="times in the run", log_x=True, zero=True, legend=legend)
    return figure("Extracted", "% of canaries whose secret greedy decoding writes", chart)


def _canaries(found: dict[str, Any]) -> list[list[str]]:
    rows = [["text", "in the run", "exposure", *([] if found["exact"] else ["by sample", "fit's distance"]),
             "extracted", "bits", "least of the others"]]
    for row in sorted(found["canaries"], key=lambda row: -row["exposure"]):
        more = [] if found["exact"] else [f"{row['exposure_sampled']:.2f}", f"{row['fit']['distance']:.3f}"]
        rows.append([row["text"], f"{row['count']:,} x", f"{row['exposure']:.2f}", *more,
                     "yes" if row["extracted"] else "", f"{row['bits']:.1f}", f"{row['least_other_bits']:.1f}"])
    return rows
