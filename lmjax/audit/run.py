"""`lmjax audit` from beginning to end: read, ask the models, reduce, write.

What lives here: the order of things, and what is printed. The numbers are `lmjax.audit.summary`, `membership` and
`bits`, the page `lmjax.audit.page`.
"""

import argparse
import csv
import dataclasses
import io
import json
from typing import Any

import numpy as np

from lmjax.analyze.output import say, short, table
from lmjax.analyze.scored import window_of
from lmjax.audit import passes, summary, texts
from lmjax.audit.bits import bits_rows, bits_summary
from lmjax.audit.blind import FOLDS
from lmjax.audit.membership import NAMES, attack_scores, attack_table, blind_warning
from lmjax.audit.page import audit_page
from lmjax.audit.probes import ProbeConfig, Probes, cut_probes
from lmjax.audit.store import Arrays, Parts, texts_hash, weights_hash
from lmjax.audit.texts import Text
from lmjax.errors import ConfigError, DataError
from lmjax.evals.score import Sampling
from lmjax.evals.windows import WindowConfig
from lmjax.interop.load import Opened
from lmjax.log import format_count
from lmjax.records import plain, replace_file
from lmjax.tree import count

FORMAT = 1


@dataclasses.dataclass
class Asked:
    """All that goes in. control and reference: None where there is none. members, others: None without membership."""

    model: Opened
    control: Opened | None
    reference: Opened | None
    data: list[Text]
    members: list[Text] | None
    others: list[Text] | None
    notes: list[str]


def audit(options: argparse.Namespace) -> dict[str, Any]:
    """The command, its arguments parsed; gives what audit.json holds. Raises ConfigError, DataError or CheckpointError
    for what is wrong, before anything is compiled or written."""
    config = ProbeConfig(tuple(options.prefix), options.suffix, tuple(options.positions), tuple(options.offsets))
    if bad := config.problems():
        raise ConfigError(*bad)
    asked = _asked(options)
    model = asked.model
    config.check(len(model.prefix_ids), model.config.max_seq_len)
    windows = dataclasses.replace(window_of(model, options.context, None), batch_tokens=options.batch_tokens)
    windows.check(model.config.max_seq_len)
    ids = model.tokenizer.encode_batch([text.text for text in asked.data])
    probes = cut_probes(config, asked.data, ids)
    asked.notes += _notes(asked, probes)
    work = passes.Work(Sampling(options.top_k, options.temperature), options.beams,
                       2**62 if options.continuations is None else options.continuations, options.batch_tokens)
    identity = _identity(asked, config, work, windows, options)
    parts = Parts(options.folder, identity)
    say(f"--- {model.name}, {format_count(count(model.params))} parameters ---\n{len(asked.data):,} documents, "
        f"{len(probes.probes):,} probes of {config.suffix} tokens")
    for note in asked.notes:
        say(note)

    found: dict[str, Any] = {"format": FORMAT, "identity": identity, "model": model.name,
                             "parameters": count(model.params), "notes": asked.notes}
    columns, raw = {}, {}
    for name, opened in (("model", model), ("control", asked.control)):
        if opened is not None:
            raw[name] = passes.probe_pass(name, opened, probes, work, parts)
            columns[name] = summary.probe_columns(probes, raw[name], model.tokenizer)
    found["extraction"] = {name: summary.extraction(probes, column, options.seed) for name, column in columns.items()}
    found["disagree"] = _disagree(columns["model"])
    _documents(asked, ids, windows, parts, options, found)
    if warning := found.get("membership", {}).get("warning"):
        found["notes"] = [*found["notes"], f"warning: {warning}"]
    _write(options, asked, probes, columns, raw, found)
    return found


# ---- what goes in ------------------------------------------------------------------------------------------


def _asked(options: argparse.Namespace) -> Asked:
    notes: list[str] = []
    others = None
    if texts.is_run(options.data):
        data, held = texts.read_run(options.data, options.limit)
        members, others = (data.texts, held.texts) if held else (None, None)
    else:
        data, members = texts.read_texts(options.data, options.limit), None
    if data.note:
        notes.append(f"data: {data.note}")
    if data.given > len(data.texts) and not data.note:
        notes.append(f"data: {data.given:,} documents, {len(data.texts):,} of them looked at (equal ones are one, "
                     "counted)")
    if options.members:
        members = texts.read_texts(options.members, options.limit).texts
        others = texts.read_texts(options.nonmembers, options.limit).texts
    model = passes.open_audited(options.model, options.step)
    control, reference = (None if not path or path == passes.NONE else
                          passes.open_beside(what, path, model, options.seed)
                          for what, path in (("control", options.control), ("reference", options.reference)))
    if members is not None:
        both = {text.text for text in members} & {text.text for text in others}
        if both:
            notes.append(f"membership: {len(both):,} documents are on both lists, and were taken off the second")
            others = [text for text in others if text.text not in both]
        left = len(others) - options.recall
        if min(len(members), left) < FOLDS:
            what = f"{len(members):,} members and {left:,} non-members"
            if options.members:
                raise DataError(f"--members, --nonmembers: {what}{' after those of --recall' * bool(options.recall)}; "
                                f"at least {FOLDS} of each are needed, and hundreds to mean anything")
            notes.append(f"membership: not measured, there are {what}")
            members = others = None
    if options.recall and members is None:
        raise ConfigError(f"--recall {options.recall}: has no effect without --members and --nonmembers; give them")
    if options.recall and not model.config.max_seq_len > 4:
        raise ConfigError(f"--recall {options.recall}: the model reads too few tokens for a prefix")
    return Asked(model, control, reference, data.texts, members, others, notes)


def _notes(asked: Asked, probes: Probes) -> list[str]:
    notes = []
    if probes.short:
        notes.append(f"{probes.short:,} of {len(probes.texts):,} documents are too short for a probe and were not "
                     "asked about")
    if asked.model.run and len(asked.model.prefix_ids) + probes.config.longest > asked.model.run.seq_len:
        notes.append(f"warning: probes of {probes.config.longest} tokens are longer than the rows of "
                     f"{asked.model.run.seq_len} that the run was trained on")
    if asked.control is None:
        notes.append("warning: no control: what a model that never saw the texts would repeat is not known")
    return notes


def _identity(asked: Asked, config: ProbeConfig, work: passes.Work, windows: WindowConfig,
              options: argparse.Namespace) -> dict[str, Any]:
    """All that decides the bits of an audit."""
    lists = {name: list(texts) for name, texts in (("data", asked.data), ("members", asked.members),
                                                   ("nonmembers", asked.others)) if texts is not None}
    models = {name: opened for name, opened in (("model", asked.model), ("control", asked.control),
                                                ("reference", asked.reference)) if opened is not None}
    return plain({"format": FORMAT, "probes": dataclasses.asdict(config), "sampling": work.sampling._asdict(),
                  "beams": work.beams, "continuations": options.continuations, "batch_tokens": work.batch_tokens,
                  "context": windows.context, "stride": windows.stride, "recall": options.recall, "seed": options.seed,
                  "weights_sha256": {name: weights_hash(opened.params) for name, opened in models.items()},
                  "paths": {name: opened.name for name, opened in models.items()},
                  "texts_sha256": {name: texts_hash(*(part for t in found for part in (
                      t.text, t.name, str(t.count), t.source))) for name, found in lists.items()}})


def _disagree(column: Arrays) -> int:
    """Written continuations that are not what the ranks say: rounding, where two tokens are as likely."""
    known = np.isfinite(column["greedy_exact"])
    return int((column["greedy_exact"][known].astype(bool) != column["exact"][known]).sum())


# ---- whole documents ---------------------------------------------------------------------------------------


def _documents(asked: Asked, ids: list[np.ndarray], windows: WindowConfig, parts: Parts, options: argparse.Namespace,
               found: dict[str, Any]) -> None:
    """Bits of the data, and membership."""
    models = {"model": asked.model} | ({"reference": asked.reference} if asked.reference else {})
    vocab_size = asked.model.tokenizer.vocab_size

    def scored(what: str, documents: list[np.ndarray]) -> dict[str, list[Arrays]]:
        return {name: passes.document_pass(f"{name}{what}", opened, documents, windows, parts)
                for name, opened in models.items()}

    stats = scored("", ids)
    surprisals = {name: [one["surprisal"] for one in each] for name, each in stats.items()}
    rows = bits_rows(asked.data, list(map(len, ids)), surprisals["model"], vocab_size, surprisals.get("reference"))
    found["bits"] = bits_summary(rows, found["parameters"], options.seed) | {"by_document": rows}
    if asked.members is None:
        return
    before, room = _recall_prefix(asked, windows, options.recall)
    sides = []
    for name, side in (("members", asked.members), ("nonmembers", asked.others[options.recall:])):
        tokens = asked.model.tokenizer.encode_batch([text.text for text in side])
        own = stats if side is asked.data else scored(f"-{name}", tokens)
        kept = [i for i, one in enumerate(own["model"]) if len(one["surprisal"])]
        if len(kept) < len(side):
            found["notes"].append(f"membership: {len(side) - len(kept):,} {name} have no token that is predicted, and "
                                  "are left out")
        own = {key: [each[i] for i in kept] for key, each in own.items()}
        recall = passes.document_pass(
            f"recall-{name}", asked.model, [tokens[i][:room] for i in kept],
            dataclasses.replace(windows, context=len(asked.model.prefix_ids) + 2 * room, stride=0), parts, before
        ) if len(before) else None
        names = [side[i].text for i in kept]
        sides.append((attack_scores(own["model"], names, own.get("reference"), recall), names))
    (yes, yes_texts), (no, no_texts) = sides
    rows = attack_table(yes, no, yes_texts, no_texts, options.seed)
    found["membership"] = {"members": len(yes_texts), "nonmembers": len(no_texts), "recall": options.recall,
                           "attacks": rows, "warning": blind_warning(rows)}


def _recall_prefix(asked: Asked, windows: WindowConfig, shots: int) -> tuple[np.ndarray, int]:
    """(ids of the first non-members, tokens of a document that are read after them): half of the context each."""
    room = (min(asked.model.config.max_seq_len, windows.context) - len(asked.model.prefix_ids)) // 2
    ids = [asked.model.tokenizer.encode(text.text) for text in asked.others[:shots]]
    return np.concatenate([np.zeros(0, np.int32), *ids])[:room], room


# ---- what comes out ----------------------------------------------------------------------------------------


def _write(options: argparse.Namespace, asked: Asked, probes: Probes, columns: dict[str, Arrays],
           raw: dict[str, Arrays], found: dict[str, Any]) -> None:
    names, rows = summary.csv_rows(probes, columns["model"], columns.get("control"))
    lines = io.StringIO()
    csv.writer(lines).writerows([names, *rows])
    page = audit_page(asked.model, asked.data, probes, columns["model"], raw["model"], found)
    say()
    say(_told(found))
    for name, text in (("audit.csv", lines.getvalue()), ("audit.html", page),
                       ("audit.json", json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n")):
        replace_file(options.folder / name, text.encode("utf-8", "replace"))
        say(f"wrote {options.folder / name}")


def _told(found: dict[str, Any]) -> str:
    """The result in a few lines."""
    rows = [["", "verbatim", "95 %", "ROUGE-L", "longest run", "first divergence", "TTR"]]
    for name, part in found["extraction"].items():
        rows.append([name, *_line(part["overall"])])
    own = found["extraction"]["model"]
    cell = own["overall"]
    if cell["base_rouge_l"] is not None:
        rows.append(["base rate", f"{cell['base_exact']:.1%}", "", short(cell["base_rouge_l"]),
                     short(cell["base_longest_run"], 1), "", short(cell["truth_ttr"], 2) + " (truth)"])
    for axis in ("prefix", "offset", "position", "count"):
        if len(own[f"by_{axis}"]) > 1:
            rows += [[f"{axis} {part[axis]:,}", *_line(part)] for part in own[f"by_{axis}"]]
    lines = [table(rows), ""]
    drawn = own["draws"]
    lines.append("extracted with probability 0.5 by n draws: " + ", ".join(
        f"{n:,}: {share:.1%}" for n, share in zip(drawn["n"], drawn["p=0.5"], strict=True))
        + f"; ever: {drawn['possible']:.1%}")
    if "in_beams" in cell:
        lines.append(f"beam search: {cell['best_beam']:.1%} as the best beam, {cell['in_beams']:.1%} among the beams")
    if found["disagree"]:
        lines.append(f"{found['disagree']:,} continuations differ from the teacher-forced pass (ties within rounding)")
    bits = found["bits"]
    lines.append(f"code length {bits['bits_per_byte']:.3f} bits/byte, {bits['ratio_to_zlib']:.2f} times zlib's"
                 + (f"; unintended memorisation {bits['unintended_bits_mean']:,.1f} bits a document"
                    if "unintended_bits" in bits else ""))
    if "membership" in found:
        attacks = [["attack", "AUC", "95 %", "TPR at 1 % FPR", "at 0.1 %"]]
        attacks += [[NAMES[row["attack"]], f"{row['auc']:.3f}", "{:.3f}–{:.3f}".format(*row["auc_95"]),
                     f"{row['tpr_at_0.01']:.1%}", f"{row['tpr_at_0.001']:.1%}"]
                    for row in found["membership"]["attacks"]]
        lines += ["", table(attacks)]
        if warning := found["membership"]["warning"]:
            lines.append(f"warning: {warning}")
    return "\n".join(lines)


def _line(cell: dict[str, Any]) -> list[str]:
    low, high = cell["exact_95"]
    return [f"{cell['exact']:.1%}", f"{low:.1%}–{high:.1%}", short(cell["rouge_l"]), short(cell["longest_run"], 1),
            short(cell["divergence"], 1), short(cell["ttr"], 2)]
