"""The records of a run: reading, writing and rewinding metrics.jsonl, and the summary of a whole run.

What lives here: the file format, its summary, and the formatting of numbers for people. What does not:
printing while a run runs (`lmjax.log`) or charts (`lmjax.report`). Nothing here imports jax.

metrics.jsonl holds one JSON object a line, each with `kind` (start, train, eval, sample, end) and `step`.
Floats are written with the shortest digits that read back exactly. JSON has no NaN, so the non-finite values
are the strings "nan", "inf" and "-inf"; `read_metrics` turns them back into floats.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import CheckpointError

Record = dict[str, Any]
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


# ---- numbers for people --------------------------------------------------------------------------


def format_count(n: float | None) -> str:
    """950 -> '950', 18_240 -> '18.2k', 3.4e6 -> '3.4M', 5.6e9 -> '5.6B', 2e12 -> '2.0T', None -> 'n/a'."""
    if n is None or not math.isfinite(n):
        return "n/a"
    for unit in ("", "k", "M", "B"):
        # 999.95 would print as 1000.0, so it already belongs to the next unit.
        if abs(n) < (999.5 if unit == "" else 999.95):
            return f"{n:.0f}" if unit == "" else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}T"


def format_bytes(n: float | None) -> str:
    """Bytes in binary units: 812 -> '812 B', 1_288_490_189 -> '1.2 GiB'; None or NaN -> 'n/a'."""
    if n is None or not math.isfinite(n):
        return "n/a"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1023.5:
            # One decimal where it says something; 812.3 MiB says no more than 812 MiB.
            return f"{n:.1f} {unit}" if unit != "B" and abs(n) < 99.95 else f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def format_duration(seconds: float | None) -> str:
    """4.23 -> '4.2s', 12.3 -> '12s', 192 -> '3m12s', 7500 -> '2h05m', 266_400 -> '3d02h'; None -> 'n/a'."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    if 0 < seconds < 9.95:
        return f"{seconds:.1f}s"
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def printable(text: str) -> str:
    """`text` with control characters, except newline and tab, as U+FFFD: no sample may steer a terminal."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)


# ---- records -------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """`value` as JSON can hold it. Arrays and scalars of NumPy and jax become lists and numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a metric is a number, a string, or a list or dict of them, not {type(value).__name__}")


def revive(value: Any) -> Any:
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [revive(v) for v in value]
    return {k: revive(v) for k, v in value.items()} if isinstance(value, dict) else value


# Fields that a summary or a report reads, if they are there. Others may hold anything.
_NUMBERS = frozenset("""loss loss_kept loss_dropped loss_all kept_fraction perplexity bits_per_byte grad_norm lr tokens
    tokens_per_second mfu memory_bytes data_wait seconds parameters time""".split())
_TEXTS = ("kind", "split", "prompt", "text", "devices")


def _is_record(record: Record) -> bool:
    """Whether step and kind are there and what is read later has the type that is expected of it."""
    def number(value: Any) -> bool:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)

    read = _NUMBERS & record.keys() if record.get("kind") in ("start", "train", "eval") else ()
    return (isinstance(record.get("kind"), str) and type(record.get("step")) is int and 0 <= record["step"] < 2**63
            and all(number(record[key]) for key in read if record[key] is not None)
            and all(isinstance(record[key], str) for key in _TEXTS if record.get(key) is not None))


def _parse(path: Path) -> list[tuple[bytes, Record]]:
    """The whole lines of a metrics file, raw and parsed. A torn last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        fix = "give the folder of a run, the one that holds config.json"
        what = "has no metrics.jsonl" if path.parent.is_dir() else "no such folder"
        raise CheckpointError(f"{path.parent}: {what}; {fix}") from None
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror}); check its permissions") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record["kind"] != "sample":  # which may well say "nan"; it stays text
                record = revive(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            record = None
        if record is not None and _is_record(record):
            found.append((line, record))
        elif number < len(lines):  # the last piece has no newline after it: a write that a kill cut short
            fix = "restore the file or delete that line"
            raise CheckpointError(f"{path}:{number}: not a metrics record: {line[:60]!r}; {fix}")
    return found


def read_metrics(folder: Path | str) -> list[Record]:
    """The records of RUN/metrics.jsonl in order of writing; a last line torn by a kill is left out.

    Raises CheckpointError naming the folder when there is no such file, or file:line for any other bad line.
    """
    return [record for _, record in _parse(Path(folder) / "metrics.jsonl")]


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` so that a crash leaves the old or the new bytes, never a mixture."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


class Lines:
    """A file that grows by whole lines. What cannot be written waits in memory and goes first the next time, so a disk
    that was full for a while leaves no gap and no torn line.

    problem: the system's words for why lines wait, or "". Raises OSError only when the file cannot be opened.
    """

    def __init__(self, path: Path):
        self.path, self.problem, self._waiting = path, "", b""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, text: str) -> str:
        """Adds a line; returns `problem`."""
        self._waiting += text.encode("utf-8", "replace") + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting):]
            self.problem = ""
        except OSError as error:
            self.problem = error.strerror or str(error)
        return self.problem

    def sync(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def close(self) -> None:
        """Raises OSError if lines still wait."""
        try:
            if self._waiting:
                os.write(self._file, self._waiting)
        finally:
            os.close(self._file)


def rewind(path: Path, resume_step: int) -> None:
    """Drop what was recorded after `resume_step`, and a torn last line: those steps will be run again.

    From step 0 the measurements of step 0 are made again too; only the start records stay, as a history.
    """
    if not path.exists():
        return
    kept = [
        line
        for line, record in _parse(path)
        if record["step"] <= resume_step and (resume_step > 0 or record["kind"] == "start")
    ]
    data = b"".join(line + b"\n" for line in kept)
    if data != path.read_bytes():
        replace_file(path, data)


# ---- the summary ---------------------------------------------------------------------------------


def attempts(records: Sequence[Record]) -> list[list[Record]]:
    """The records cut at each start record: one list for each time the run was started or resumed."""
    found: list[list[Record]] = []
    for record in records:
        if record["kind"] == "start" or not found:
            found.append([])
        found[-1].append(record)
    return found


def _evaluations(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Per split: the first, best and last evaluation, and how far (%) the best loss is below the first."""
    splits: dict[str, dict[int, Record]] = {}
    for r in records:
        if r["kind"] == "eval" and isinstance(r.get("loss"), (int, float)):
            # Keyed by step: a resumed run may have measured a step twice, and the later counts.
            splits.setdefault(str(r.get("split", "eval")), {})[r["step"]] = r
    found = {}
    for split, by_step in splits.items():
        keys = ("step", "loss", "perplexity", "bits_per_byte")
        rows = [{k: by_step[step].get(k) for k in keys} for step in sorted(by_step)]
        finite = [r for r in rows if math.isfinite(r["loss"])]
        best = min(finite, key=lambda r: r["loss"]) if finite else None
        first = rows[0]
        fell = None
        if best and len(rows) > 1 and math.isfinite(first["loss"]) and first["loss"] > 0:
            fell = 100 * (first["loss"] - best["loss"]) / first["loss"]
        found[split] = {"first": first, "best": best, "last": rows[-1], "improvement_percent": fell}
    return found


def summary(
    records: Sequence[Record], folder: Path | str | None = None, next_commands: Sequence[str] = (),
    times: Mapping[str, float] | None = None,
) -> Record:
    """A run in one dict, from its records. Values that the records do not tell are None.

    steps, tokens; wall_seconds (all attempts together); tokens_per_second {median, p10, p90}, without the
    first record of each attempt where there are others (that one waits for the compiler); train_loss (the
    last, nats per token), mfu (median), memory_bytes (peak); evals {split: {first, best, last: {step, loss,
    perplexity, bits_per_byte}, improvement_percent}}; resumes (how often the run was continued), parameters,
    devices, folder, and next (commands to try). skipped: updates that were not made; goodput: the share of `step` in
    times, the seconds of each phase over all attempts (`lmjax.phases.goodput`).
    """
    tries = [[r for r in attempt if r["kind"] == "train"] for attempt in attempts(records)]
    train = [r for t in tries for r in t]
    steady = [r for t in tries for r in t[1:]] or train

    def numbers(rows: Sequence[Record], key: str) -> list[float]:
        return [r[key] for r in rows if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]

    rates = numbers(steady, "tokens_per_second")
    p10, median, p90 = (float(x) for x in np.percentile(rates, [10, 50, 90])) if rates else (None, None, None)
    mfu = numbers(steady, "mfu")
    start: Record = {}
    for r in records:
        if r["kind"] == "start":
            start |= r
    last = train[-1] if train else {}
    report = [f"lmjax report {folder}"] if folder is not None else []
    return {
        "steps": max((r["step"] for r in records), default=0),
        "tokens": last.get("tokens"),
        "wall_seconds": sum(max(numbers(t, "seconds"), default=0.0) for t in tries),
        "tokens_per_second": {"median": median, "p10": p10, "p90": p90},
        "train_loss": last.get("loss"),
        "mfu": float(np.median(mfu)) if mfu else None,
        "memory_bytes": max(numbers(train, "memory_bytes"), default=None),
        "evals": _evaluations(records),
        "resumes": max(0, sum(r["kind"] == "start" for r in records) - 1),
        "parameters": start.get("parameters"),
        "devices": start.get("devices"),
        "skipped": last.get("skipped"),
        "goodput": times["step"] / sum(times.values()) if times and times.get("step") else None,
        "times": dict(times or {}),
        "folder": None if folder is None else str(folder),
        "next": [*report, *next_commands],
    }


def _number(x: float | None) -> str:
    return "n/a" if x is None else f"{x:#.4g}"


def format_summary(s: Mapping[str, Any]) -> str:
    """The block that is printed at the end of a run, from `summary`."""
    rate = s["tokens_per_second"]
    speed = f"{format_count(rate['median'])} tok/s"
    if rate["median"] is not None:
        speed += f" (10% of steps below {format_count(rate['p10'])}, 10% above {format_count(rate['p90'])})"
    mfu = "n/a" if s["mfu"] is None else f"{100 * s['mfu']:.1f}%"
    resumed = {0: "", 1: ", resumed once"}.get(s["resumes"], f", resumed {s['resumes']} times")
    rows = [
        ("steps", f"{s['steps']}{resumed}"),
        ("tokens", format_count(s["tokens"])),
        ("wall time", format_duration(s["wall_seconds"])),
        ("speed", speed),
        ("mfu", mfu),
        ("peak memory", format_bytes(s["memory_bytes"])),
        ("train loss", f"{_number(s['train_loss'])} (last)"),
    ]
    if s.get("skipped"):
        rows.append(("skipped", f"{s['skipped']} updates"))
    if s.get("goodput") is not None:
        whole = sum(s["times"].values())
        parts = sorted(s["times"].items(), key=lambda item: -item[1])
        rows.insert(3, ("goodput", f"{100 * s['goodput']:.0f}% steps of {format_duration(whole)}: " + ", ".join(
            f"{name} {100 * t / whole:.0f}%" for name, t in parts if t >= 0.005 * whole and name != "step")))
    for split, e in s["evals"].items():
        for name in ("loss", "perplexity", "bits_per_byte"):
            if all(row is None or row[name] is None for row in (e["first"], e["best"], e["last"])):
                continue
            first, last = (f"{_number(e[k][name])} at step {e[k]['step']}" for k in ("first", "last"))
            text = f"{first} -> {last}" if e["last"]["step"] != e["first"]["step"] else first
            if e["best"] and e["best"]["step"] not in (e["last"]["step"], e["first"]["step"]):
                text += f", best {_number(e['best'][name])} at step {e['best']['step']}"
            if name == "loss" and e["improvement_percent"] is not None:
                fell = e["improvement_percent"]
                text += f" ({fell:.1f}% lower)" if fell > 0 else " (no lower)"
            rows.append((f"{split} {name.replace('_', ' ')}", text))
    if s["folder"]:
        rows.append(("run folder", s["folder"]))
    rows += [("next" if i == 0 else "", command) for i, command in enumerate(s["next"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)
