"""Style of the page of `lmjax audit`, beside that of the report. The page has no script of its own.

Orange is Okabe and Ito's (2008) and gets stronger with surprise; what a model repeated is blue. Both are told by
lightness and by lines as well, so that the page reads in grey.
"""

LEVELS = 8
EDGES = (0.1, 0.5, 1.0, 2.0, 4.0, 6.0, 9.0)  # nats, between LEVELS levels of colour

AUDIT_STYLE = """
:root { --hot: 213 94 0; --said: 0 114 178; }
@media (prefers-color-scheme: dark) { :root { --hot: 255 122 30; --said: 70 160 235; } }
body { max-width: 1080px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.tiles dd small { overflow-wrap: anywhere; }
.warn { margin: 16px 0 0; padding: 10px 16px; border-left: 3px solid var(--c1); background: var(--card);
  border-radius: 0 8px 8px 0; }
.aside { margin: 14px 0 0; padding: 0 0 0 18px; color: var(--soft); font-size: 13.5px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 14px; color: var(--soft); font-size: 13px; }
.key i { font-style: normal; padding: 1px 5px; border-radius: 3px; color: var(--ink); }
.probe { margin: 0 0 16px; padding: 16px 18px 14px; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); break-inside: avoid; }
.probe header { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; margin: 0 0 10px; }
.probe header b { overflow-wrap: anywhere; }
.probe header span { color: var(--soft); font-size: 13px; }
.probe .verdict { margin-left: auto; padding: 1px 10px; border-radius: 99px; border: 1px solid var(--line);
  font-size: 12.5px; color: var(--ink); }
.probe .verdict.yes { border-color: rgb(var(--said)); background: rgb(var(--said) / 0.16); }
.shown, .side p {
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; unicode-bidi: isolate;
  font: 13.5px/1.75 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.shown { max-height: 9.2em; overflow-y: auto; margin-bottom: 12px; padding-bottom: 12px; color: var(--soft);
  border-bottom: 1px dashed var(--line); }
.sides { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px; }
.side h4 { margin: 0 0 5px; font-size: 12.5px; font-weight: 600; color: var(--soft); }
.side i { font-style: normal; border-radius: 2px; padding: 0.12em 0; }
.side i.n::before { content: "\\21b5"; color: var(--soft); opacity: 0.55; font-size: 0.75em; }
.side i.d { text-decoration: underline double var(--c2); text-underline-offset: 3px; }
.side i.y { background: rgb(var(--said) / 0.2); }
.side i.x { color: var(--soft); }
.side i.first { border-left: 2px solid var(--c1); padding-left: 2px; }
.sw-d { text-decoration: underline double var(--c2); text-underline-offset: 3px; }
.sw-y { background: rgb(var(--said) / 0.2); }
.sw-first { border-left: 2px solid var(--c1); }
.wide { grid-column: 1 / -1; }
dl.how { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 18px; font-size: 13.5px; }
dl.how dt { font-weight: 600; }
dl.how dd { margin: 0; color: var(--soft); }
@media (max-width: 760px) { .sides, .charts { grid-template-columns: minmax(0, 1fr); } .probe { padding: 12px; }
  dl.how { grid-template-columns: minmax(0, 1fr); gap: 0; } dl.how dd { margin-bottom: 8px; } }
@media print { body { max-width: none; } .shown { max-height: none; }
  .side i { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
""" + "".join(f".h{n}{{background:rgb(var(--hot)/{0.06 + 0.62 * (n / (LEVELS - 1))**1.2:.2f})}}"
              for n in range(1, LEVELS))
