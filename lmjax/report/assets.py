"""The style and the script of a report page, inlined into it so that it needs no network.

What lives here: CSS (light and dark, from the reader's system) and a small script for the chart readout and
the sample slider. What does not: any content. The page says everything without the script too.
"""

# The curve colours follow Okabe and Ito (2008), which stay apart for colour-blind readers; the light set is
# darkened and the dark set lightened where the original would not stand out from its page.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #fff; --ink: #1c1d20; --soft: #5d6068; --line: #e3e3de; --shade: #f3f3ef;
  --c0: #0072b2; --c1: #d55e00; --c2: #00805e; --c3: #b0508a; --c4: #b07800; --c5: #2a8fc7; --c6: #6b4fbb;
  --c7: #555;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141518; --card: #1b1d21; --ink: #ececea; --soft: #a0a3ab; --line: #303239; --shade: #22242a;
    --c0: #5ab4f0; --c1: #ff8c42; --c2: #2fc79c; --c3: #e694c3; --c4: #ecb740; --c5: #8fd3ff;
    --c6: #b7a1f5; --c7: #bbb;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1120px; padding: 40px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
header { margin-bottom: 28px; }
h1 { margin: 0 0 4px; font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 20px; letter-spacing: -0.01em; }
h3 { margin: 0 0 8px; font-size: 15px; font-weight: 600; }
p { margin: 0 0 8px; }
header p, .note, .x-label, .caption { color: var(--soft); }
code, pre, kbd {
  font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
code, kbd { font-size: 0.9em; }

.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 1px; overflow: hidden;
  border: 1px solid var(--line); border-radius: 10px; background: var(--line);
}
.tiles div { padding: 14px 16px 12px; background: var(--card); }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 23px; line-height: 1.35; font-weight: 600; letter-spacing: -0.01em; }
.tiles dd small {
  display: block; color: var(--soft); font-size: 12.5px; font-weight: 400; letter-spacing: 0;
}
dl { margin: 0; }
.account { display: flex; height: 22px; margin: 4px 0 12px; overflow: hidden; border-radius: 5px; gap: 1px; }
.account i { min-width: 1px; }

.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px; margin-top: 18px; }
figure, .card {
  margin: 0; padding: 18px 20px 12px; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card);
}
figure { position: relative; min-width: 0; }
figcaption { font-weight: 600; }
figcaption small { color: var(--soft); font-weight: 400; font-size: 13px; }
.hero .plot { height: 380px; }
.plot { position: relative; height: 210px; margin: 10px 8px 26px 48px; touch-action: pan-y; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.7; stroke-linejoin: round; }
svg .line, svg .dash { stroke-width: 1.4; }
svg .dots { stroke-width: 2.2; }
svg .dash { stroke-dasharray: 5 3; }
svg .dot { stroke-width: 6; stroke-linecap: round; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4; }
.plot span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap; }
.plot .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 9px); transform: translateX(-50%); }
.x-label { margin: -4px 0 4px; text-align: center; font-size: 12px; }
.note { font-size: 13px; }
.empty { padding: 40px 0; text-align: center; color: var(--soft); }
.cursor {
  position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); opacity: 0.6; display: none;
}
.readout {
  position: absolute; top: 6px; display: none; padding: 7px 10px; border: 1px solid var(--line);
  border-radius: 7px;
  background: var(--card); box-shadow: 0 3px 12px rgb(0 0 0 / 14%); font-size: 12.5px; line-height: 1.5;
  white-space: nowrap; pointer-events: none; z-index: 2;
}
.readout table { border-spacing: 0; }
.readout td { padding: 0 0 0 10px; border: 0; text-align: right; }
.readout td:first-child { padding: 0; text-align: left; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 0; padding: 0; list-style: none;
  font-size: 13px;
}
.legend i {
  display: inline-block; width: 20px; margin-right: 7px; vertical-align: middle; border-top: 2px solid;
}
.legend i.dash { border-top-style: dashed; }
.legend i.dots { position: relative; border-top-width: 2.5px; }
.legend i.dots::after {
  content: ""; position: absolute; left: 6px; top: -5px; width: 8px; height: 8px; border-radius: 50%;
  background: currentColor;
}
.axis { position: absolute; opacity: 0; }
.axis + label {
  float: right; margin-left: 6px; padding: 1px 9px; border: 1px solid var(--line); border-radius: 99px;
  color: var(--soft); font-size: 12.5px; cursor: pointer;
}
.axis:checked + label { border-color: var(--soft); color: var(--ink); }
.axis:focus-visible + label { outline: 2px solid var(--c0); outline-offset: 1px; }
#axis-linear:checked ~ .logarithmic, #axis-log:checked ~ .linear { display: none; }

.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td {
  padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
}
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
td { overflow-wrap: anywhere; }
.numbers td { white-space: nowrap; }
.swatch { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 3px; }
.numbers td:first-child { color: var(--soft); }
.numbers td b { font-weight: 600; }
td small { color: var(--soft); }

details { margin: 10px 0 0; }
details.card { margin-top: 10px; padding: 0; }
details.card > summary { padding: 12px 20px; }
details.card > :not(summary) { margin: 0 20px 14px; width: calc(100% - 40px); }
summary { cursor: pointer; font-weight: 600; }
.fields td:first-child { width: 34%; color: var(--soft); }
.fields td { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
.samples { margin-bottom: 18px; }
.slider { display: none; align-items: center; gap: 14px; margin: 0 0 12px; }
.slider.on { display: flex; }
.slider input { flex: 1; min-width: 0; accent-color: var(--c0); }
.slider output { min-width: 6.5em; font-weight: 600; text-align: right; }
pre {
  margin: 0 0 12px; padding: 12px 14px; border-radius: 7px; background: var(--shade); font-size: 13px;
  line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; unicode-bidi: isolate;
}
pre b { font-weight: 600; color: var(--c0); }
.at h3 { margin-top: 6px; }
.attempts { margin: 0; padding-left: 20px; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }

@media (max-width: 760px) {
  body { padding: 24px 14px 48px; }
  h1 { font-size: 24px; }
  .charts { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tiles dd { font-size: 19px; }
  .hero .plot { height: 260px; }
  figure, .card { padding: 14px 12px 10px; }
  .plot { margin-left: 38px; }
}
@media print { .slider.on, .axis + label { display: none; } figure { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";

// Charts: under the pointer, the nearest recorded step of each curve and its value.
for (const chart of document.querySelectorAll(".chart")) {
  const source = chart.querySelector("script[type='application/json']");
  if (!source) continue;
  const { x: [low, high, log], label, series } = JSON.parse(source.textContent);
  const plot = chart.querySelector(".plot");
  const cursor = chart.querySelector(".cursor");
  const readout = chart.querySelector(".readout");
  const place = (v) => (log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low));
  const nearest = (xs, v) => {
    let a = 0, b = xs.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < v) a = m; else b = m; }
    return Math.abs(xs[a] - v) <= Math.abs(xs[b] - v) ? a : b;
  };
  const digits = (v) => v === null ? "not finite"
    : Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en")
    : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2) : String(Number(v.toPrecision(4)));

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = log ? low * Math.pow(high / low, part) : low + part * (high - low);
    const points = series.map((s) => ({ s, i: nearest(s.x, wanted) }));
    const steps = points.map((p) => p.s.x[p.i]);
    const step = steps.reduce((p, q) => (Math.abs(q - wanted) < Math.abs(p - wanted) ? q : p));
    const table = document.createElement("table");
    const row = (name, value, colour) => {
      const tr = table.insertRow();
      const cell = tr.insertCell();
      if (colour !== null) {
        const mark = document.createElement("i");
        mark.className = "swatch";
        mark.style.background = `var(--c${colour})`;
        cell.append(mark);
      }
      cell.append(name);
      tr.insertCell().textContent = value;
    };
    row(label, step.toLocaleString("en"), null);
    for (const { s, i } of points) {
      const at = s.x[i] === step ? "" : ` (at ${s.x[i].toLocaleString("en")})`;
      row(s.name, digits(s.y[i]) + at, s.c);
    }
    readout.replaceChildren(table);
    const left = place(step) * box.width;
    cursor.style.display = readout.style.display = "block";
    cursor.style.left = `${left}px`;
    const width = readout.offsetWidth;
    const beside = left + 14 + width > box.width ? left - 14 - width : left + 14;
    readout.style.left = `${Math.min(Math.max(beside, -40), Math.max(-40, box.width - width))}px`;
  });
  plot.addEventListener("pointerleave", () => { cursor.style.display = readout.style.display = "none"; });
}

// Samples: one step at a time, chosen with a slider. Without this script all steps are listed.
for (const group of document.querySelectorAll(".samples")) {
  const steps = [...group.querySelectorAll(".at")];
  const slider = group.querySelector(".slider");
  if (steps.length < 2) continue;
  const input = slider.querySelector("input");
  const output = slider.querySelector("output");
  const show = () => {
    steps.forEach((e, i) => { e.hidden = i !== Number(input.value); });
    output.textContent = `step ${Number(steps[input.value].dataset.step).toLocaleString("en")}`;
  };
  slider.classList.add("on");
  for (const e of steps) e.querySelector("h3").hidden = true;
  input.addEventListener("input", show);
  show();
}
"""
