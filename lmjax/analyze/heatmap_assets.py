"""Style and script of the page of `lmjax score`, beside those of the report; the colours of levels are made there.

Orange and blue are Okabe and Ito's (2008), which colour-blind readers tell apart; a level is also told by its
lightness, so the page reads in grey as well.
"""

HEAT_STYLE = """
:root { --hot: 213 94 0; --cold: 0 114 178; }
@media (prefers-color-scheme: dark) { :root { --hot: 255 122 30; --cold: 70 160 235; } }
body { max-width: 900px; }
h2 small { color: var(--soft); font-weight: 400; font-size: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.pick { position: absolute; opacity: 0; pointer-events: none; }
.bar {
  position: sticky; top: 0; z-index: 3; display: flex; flex-wrap: wrap; gap: 8px 16px; margin: 22px -10px 0;
  padding: 10px; background: color-mix(in srgb, var(--page) 90%, transparent); backdrop-filter: blur(6px);
}
.bar .choices { display: flex; flex-wrap: wrap; gap: 6px; flex: 1; }
.bar { align-items: flex-start; }
.bar label {
  padding: 3px 13px; border: 1px solid var(--line); border-radius: 99px; font-size: 13.5px; cursor: pointer;
  background: var(--card);
}
.bar .mono { color: var(--soft); }
#mono:checked ~ nav .mono { color: var(--ink); border-color: var(--soft); }
#mono:focus-visible ~ nav .mono { outline: 2px solid var(--c0); outline-offset: 2px; }
.legend-of { display: none; margin: 8px 0 22px; padding-bottom: 6px; }
.legend-of .note { margin: 0 0 4px; }
.bars { display: flex; gap: 2px; margin: 0; padding: 0; list-style: none; }
.bars li { position: relative; flex: 1; min-width: 0; display: flex; flex-direction: column; height: 92px; }
.bars span { margin-top: auto; background: var(--soft); opacity: 0.45; border-radius: 2px 2px 0 0; min-height: 1px; }
.bars li { justify-content: flex-end; }
.bars b { flex: none; height: 12px; border: 1px solid var(--line); border-top: 0; }
.bars small { flex: none; height: 18px; color: var(--soft); font-size: 11.5px; transform: translateX(-50%);
  align-self: flex-start; }
.text {
  margin: 0 0 20px; padding: 26px 30px; border: 1px solid var(--line); border-radius: 10px; background: var(--card);
  font: 18px/1.75 Charter, "Bitstream Charter", "Source Serif 4", "Iowan Old Style", Georgia, serif;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; unicode-bidi: isolate; outline-offset: 3px;
}
#mono:checked ~ main .text {
  font: 14.5px/1.7 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.text i { font-style: normal; border-radius: 3px; padding: 0.14em 0; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; cursor: default; }
.text i:hover, .text i.at { box-shadow: 0 0 0 1.5px var(--ink); position: relative; }
.text i.n::before { content: "\\21b5"; color: var(--soft); opacity: 0.55; font-size: 0.75em; }
.text i.b { display: inline-block; width: 5px; height: 1.1em; margin-right: 1px; vertical-align: -0.2em;
  border-left: 1px dotted var(--soft); }
.text i.g { border-bottom: 1px dotted var(--soft); }
.more { color: var(--soft); }
.along { margin-bottom: 10px; }
.peaks td:first-child { width: 70%; }
.peaks th:not(:first-child), .peaks td:not(:first-child) { text-align: right; padding: 6px 0 6px 14px; }
.around { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px;
  white-space: pre-wrap; color: var(--soft); unicode-bidi: isolate; }
.around mark { padding: 1px 2px; border-radius: 3px; background: rgb(var(--hot) / 0.4); color: var(--ink); }
#card {
  position: absolute; z-index: 4; width: 270px; padding: 12px 14px; border: 1px solid var(--line); border-radius: 9px;
  background: var(--card); box-shadow: 0 6px 22px rgb(0 0 0 / 20%); font-size: 13px; pointer-events: none;
}
#card[hidden] { display: none; }
#card h3 { margin: 0 0 6px; font: 600 15px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
#card h3 small { color: var(--soft); font-weight: 400; font-size: 11.5px; }
#card dl { display: grid; grid-template-columns: 1fr auto; gap: 1px 12px; margin: 0 0 8px; }
#card dt { color: var(--soft); }
#card dd { margin: 0; text-align: right; }
#card ol { margin: 0; padding: 8px 0 0; border-top: 1px solid var(--line); list-style: none; }
#card li { position: relative; display: flex; justify-content: space-between; gap: 8px; padding: 1px 5px;
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px; }
#card li > * { position: relative; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#card li s { position: absolute; inset: 1px auto 1px 0; border-radius: 3px; background: rgb(var(--cold) / 0.22); }
#card li.it { font-weight: 700; }
@media (max-width: 860px) { .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tiles div:last-child { grid-column: 1 / -1; } }
@media (max-width: 760px) { .text { padding: 16px; font-size: 17px; } .bars li { height: 70px; } }
@media print {
  .bar, #card, footer p + p { display: none; }
  body { max-width: none; } .text, figure { border: 0; padding: 0; }
  .text i, .bars b, .bars span { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

HEAT_SCRIPT = """
// Heat map: what the model thought of the token under the pointer, or of the one that the arrow keys chose.
{
  const words = JSON.parse(document.getElementById("vocabulary").textContent);
  const card = document.getElementById("card");
  const make = (tag, text, name) => {
    const e = document.createElement(tag);
    if (text !== undefined) e.textContent = text;
    if (name) e.className = name;
    return e;
  };
  const percent = (p) => p >= 0.1 ? (100 * p).toFixed(0) + " %" : p >= 0.001 ? (100 * p).toPrecision(2) + " %"
    : p.toExponential(0);
  let current = null;

  const fill = (d, i) => {
    const title = make("h3", words[d.id[i]]);
    title.append(make("small", "  " + d.id[i]));
    if (d.s[i] === null) return [title, make("span", "given, not predicted")];
    const list = make("dl");
    for (const [name, value] of [
      ["surprisal", d.s[i].toFixed(3) + " nats, " + (d.s[i] / Math.LN2).toFixed(2) + " bits"],
      ["probability", percent(Math.exp(-d.s[i]))], ["entropy", d.e[i].toFixed(3) + " nats"],
      ["normalised", (d.z[i] >= 0 ? "+" : "") + d.z[i].toFixed(2)],
      ["rank", d.r[i] === 0 ? "0, first choice" : d.r[i].toLocaleString("en")],
    ]) list.append(make("dt", name), make("dd", value));
    const top = make("ol");
    (d.t ? d.t[i] : []).forEach((id, k) => {
      const row = make("li", undefined, id === d.id[i] ? "it" : "");
      const bar = make("s");
      bar.style.width = 100 * d.p[i][k] + "%";
      row.append(bar, make("span", words[id]), make("span", percent(d.p[i][k])));
      top.append(row);
    });
    return d.t ? [title, list, top] : [title, list];
  };
  const show = (tokens, d, i) => {
    if (current) current.classList.remove("at");
    current = tokens[i];
    current.classList.add("at");
    card.replaceChildren(...fill(d, i));
    card.hidden = false;
    const at = current.getClientRects()[0] || current.getBoundingClientRect();
    const width = card.offsetWidth, height = card.offsetHeight, wide = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(at.left - 20, wide - width - 8));
    const below = at.bottom + 8 + height < innerHeight || at.top < height + 70;
    card.style.left = left + scrollX + "px";
    card.style.top = (below ? at.bottom + 8 : at.top - 8 - height) + scrollY + "px";
  };
  const hide = () => {
    card.hidden = true;
    if (current) current.classList.remove("at");
    current = null;
  };
  for (const text of document.querySelectorAll(".text")) {
    const d = JSON.parse(text.parentNode.querySelector(".tokens").textContent);
    const tokens = [...text.querySelectorAll("i")];
    const index = new Map(tokens.map((e, i) => [e, i]));
    const point = (event) => { const i = index.get(event.target); if (i !== undefined) show(tokens, d, i); };
    text.addEventListener("pointerover", point);
    text.addEventListener("click", point);
    text.addEventListener("pointerleave", hide);
    text.addEventListener("blur", hide);
    text.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!by) return;
      event.preventDefault();
      const now = index.get(current);
      const next = now === undefined ? 0 : Math.max(0, Math.min(tokens.length - 1, now + by));
      show(tokens, d, next);
      tokens[next].scrollIntoView({ block: "nearest" });
    });
  }
}
"""
