"""What a published model can recite: passages that everybody quotes and licences, beside text that it cannot have seen.

Three kinds of text go through `lmjax audit`: famous passages in the public domain; the licences that Python and lmjax's
own dependencies ship, word for word as millions of repositories do; and, as the control, lmjax's own docstrings, which
are English and technical too, and are in no corpus of the model. Fluency alone recites none of these; what a model gets
right of the control says how much of the rest is guessing.

    lmjax reproduce known-texts --model path/to/SmolLM2-135M-Instruct
"""

import argparse
import ast
import csv
import importlib.metadata
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import lmjax
from lmjax.audit.commands import run_audit
from lmjax.audit.intervals import wilson
from lmjax.data.manifest import write_atomically
from lmjax.errors import ConfigError
from lmjax.reproduce.famous import PASSAGES
from lmjax.reproduce.figure import Curve, Panel, panels

PREFIXES, SUFFIX, POSITIONS = (10, 25, 50), 50, (0, 100, 200, 400, 800, 1600)
KINDS = {"licence": "licences", "famous": "famous passages", "control": "control: cannot have been seen"}
# name -> (where a licence's text begins, where it ends or ""), in the first distribution that has both
LICENCES = {
    "Apache License 2.0": ("Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"),
    "MIT License": ("Permission is hereby granted, free of charge", "OTHER DEALINGS IN THE SOFTWARE"),
    "BSD 3-Clause License": ("Redistribution and use in source and binary forms", "POSSIBILITY OF SUCH DAMAGE"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL",
                        help="a Hugging Face folder or a GGUF file, such as SmolLM2-135M-Instruct")


def texts() -> list[dict[str, str]]:
    """Lines of the audited .jsonl: text, id and source, one of KINDS."""
    made = [{"id": name, "source": "licence", "text": text} for name, text in _licences()]
    made += [{"id": name, "source": "famous", "text": text} for name, text in PASSAGES.items()]
    root = Path(lmjax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        if len(text) > 600 and path.name != "known_texts.py":
            made.append({"id": str(path.relative_to(root.parent)), "source": "control", "text": text})
    return made


def _licences() -> Iterator[tuple[str, str]]:
    """(name, text) of LICENCES as packages ship them, and Python's own."""
    found = sorted((str(file), file) for one in importlib.metadata.distributions() for file in one.files or ()
                   if "licen" in file.name.lower() and ".dist-info" in str(file))
    wanted = dict(LICENCES)
    for _, file in found:
        try:
            text = file.locate().read_text()
        except (OSError, UnicodeDecodeError):
            continue
        for name, (begin, end) in list(wanted.items()):
            if begin in text and end in text[text.index(begin):] and len(text) < 13_000:
                start = text.index(begin)
                yield name, text[start:text.index(end, start) + len(end)]
                del wanted[name]
    own = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if own.is_file():
        text = own.read_text()
        start = text.find("1. This LICENSE AGREEMENT is between the Python Software Foundation")
        if start >= 0:
            yield "Python licence", text[start:start + 3000]


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict, str, str]:
    """The audit itself, with its page, is OUT/known-texts. Raises what `lmjax audit` raises."""
    lines = texts()
    if missing := [kind for kind in KINDS if not any(line["source"] == kind for line in lines)]:
        raise ConfigError(f"no {KINDS[missing[0]]} found on this machine; install lmjax with its dependencies")
    options.out.mkdir(parents=True, exist_ok=True)
    data, folder = options.out / "known-texts.jsonl", options.out / "known-texts"
    write_atomically(data, "".join(json.dumps(line) + "\n" for line in lines).encode())
    say(f"{len(lines)} texts: " + ", ".join(
        f"{sum(line['source'] == kind for line in lines)} {name}" for kind, name in KINDS.items()))
    run_audit([options.model, "--data", str(data), "--folder", str(folder), "--suffix", str(SUFFIX),
               "--prefix", *map(str, PREFIXES), "--positions", *map(str, POSITIONS)])
    with (folder / "audit.csv").open() as file:
        rows = list(csv.DictReader(file))
    audit = json.loads((folder / "audit.json").read_text())
    result = {"model": Path(audit["model"]).name, "parameters": audit["parameters"],
              "weights_sha256": audit["identity"]["weights_sha256"], "cells": cells(rows),
              "documents": documents(rows), "bits": bits(audit["bits"]["by_document"], lines)}
    return result, table(result), figure(result)


def _mean(rows: list[dict[str, str]], name: str) -> float:
    return float(np.mean([float(row[name]) for row in rows]))


def cells(rows: list[dict[str, str]]) -> list[dict]:
    """Of each kind and prefix length."""
    out = []
    for kind in KINDS:
        for prefix in PREFIXES:
            own = [row for row in rows if row["source"] == kind and int(row["prefix"]) == prefix]
            if not own:
                continue
            hits = sum(int(row["exact"]) for row in own)
            out.append({"kind": kind, "prefix": prefix, "probes": len(own), "exact": hits / len(own),
                        "exact_95": wilson(hits, len(own)), "untrained_exact": _mean(own, "control_exact")}
                       | {name: _mean(own, name) for name in ("rouge_l", "divergence", "base_rouge_l")}
                       | {"nats": _mean(own, "nats") / SUFFIX, "untrained_nats": _mean(own, "control_nats") / SUFFIX}
                       | {"extractable": float(np.mean([float(row["log10_draws_at_0.5"]) <= 6 for row in own]))})
    return out


def documents(rows: list[dict[str, str]]) -> list[dict]:
    """Of each text, with the longest prefix: probes, those recited, and the tokens right at best."""
    out, longest = [], str(max(PREFIXES))
    for name in dict.fromkeys(row["document"] for row in rows):
        own = [row for row in rows if row["document"] == name and row["prefix"] == longest]
        out.append({"document": name, "kind": own[0]["source"], "probes": len(own),
                    "recited": sum(int(row["exact"]) for row in own),
                    "most": max(int(float(row["divergence"])) for row in own)})
    return sorted(out, key=lambda d: (list(KINDS).index(d["kind"]), -d["recited"] / d["probes"], -d["most"]))


def bits(rows: list[dict], lines: list[dict[str, str]]) -> dict[str, float]:
    """Bits per byte of each kind, by the model."""
    kinds, out = {line["id"]: line["source"] for line in lines}, {}
    for kind in KINDS:
        own = [row for row in rows if kinds[row["name"]] == kind]
        out[kind] = sum(row["bits"] for row in own) / sum(row["bytes"] for row in own)
    return out


def table(result: dict) -> str:
    lines = [f"{result['model']}, {result['parameters']:,} parameters", "",
             f"| text | prefix | probes | next {SUFFIX} tokens recited | 95 % | ROUGE-L | by chance "
             "| tokens before the first wrong one | drawn within a million tries | nats a token |", "|---" * 10 + "|"]
    for c in result["cells"]:
        low, high = c["exact_95"]
        lines.append(f"| {KINDS[c['kind']]} | {c['prefix']} | {c['probes']} | {c['exact']:.0%} "
                     f"| {low:.0%} to {high:.0%} | {c['rouge_l']:.2f} | {c['base_rouge_l']:.2f} "
                     f"| {c['divergence']:.1f} | {c['extractable']:.0%} | {c['nats']:.2f} |")
    lines += ["", "Bits per byte: " + ", ".join(f"{KINDS[kind]} {value:.2f}" for kind, value in result["bits"].items()),
              "", f"With {max(PREFIXES)} tokens shown, the texts of which most was recited", "",
              f"| text | probes | recited | most tokens right of {SUFFIX} |", "|---" * 4 + "|"]
    for kind in KINDS:
        for d in [d for d in result["documents"] if d["kind"] == kind][:8 if kind != "control" else 3]:
            lines.append(f"| {d['document']} | {d['probes']} | {d['recited']} | {d['most']} |")
    return "\n".join(lines)


def figure(result: dict) -> str:
    ticks = [float(p) for p in PREFIXES]

    def curves(name: str) -> list[Curve]:
        return [Curve(KINDS[kind], ticks, [c[name] for c in result["cells"] if c["kind"] == kind], i)
                for i, kind in enumerate(KINDS)]

    return panels([Panel(f"share of suffixes of {SUFFIX} tokens recited", "tokens shown", curves("exact"), ticks, 1.0),
                   Panel("tokens before the first wrong one", "tokens shown", curves("divergence"), ticks),
                   Panel(f"nats a token of the next {SUFFIX}", "tokens shown", curves("nats"), ticks)],
                  f"What {result['model']} recites")
