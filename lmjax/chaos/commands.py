"""`lmjax chaos`: goes through the catalogue and prints the table: fault, tries, survived, work repeated, time lost."""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from lmjax.chaos.catalogue import FAULTS, Fault
from lmjax.chaos.disks import Skip
from lmjax.chaos.lab import Broken, Lab, Outcome
from lmjax.errors import ConfigError
from lmjax.records import format_duration

DESCRIPTION = """Injects real faults into small training runs on this machine: kills, full disks, flipped bits, NaNs,
hangs. Every run must end with the bits of one that nobody disturbed. A full round takes about half an hour; the exit
code is 0 only if every fault was survived. docs/reliability.md says what is promised about each."""


def run_chaos(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmjax chaos", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="only these (default: all; --list names them)")
    parser.add_argument("--list", action="store_true", help="names and promises; breaks nothing")
    parser.add_argument("--tries", type=int, default=0, metavar="N", help="of each fault (default: as listed)")
    parser.add_argument("--minutes", type=float, default=0, metavar="M", help="stop after so many (default: when done)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="where runs live and stay (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every try to this file too")
    options = parser.parse_args(args)
    by_name = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in options.faults if name not in by_name]:
        raise ConfigError(f"lmjax chaos {unknown[0]}: no such fault; `lmjax chaos --list` names them")
    if options.tries < 0 or options.minutes < 0:
        raise ConfigError(f"--tries={options.tries} --minutes={options.minutes}: must not be negative; 0 is the "
                          "default")
    chosen = [by_name[name] for name in options.faults] or list(FAULTS)
    if options.list:
        for fault in chosen:
            print(f"{fault.name:<22}{fault.tries * fault.each:>4} x  {fault.what}: {fault.promise}")
        return 0
    if options.folder and options.folder.exists() and any(options.folder.iterdir()):
        raise ConfigError(f"--folder={options.folder}: is not empty; give a new one")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="lmjax-chaos-"))
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    try:
        rows = round_of(chosen, Lab(folder, options.seed), options.tries, until)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n" + table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1, allow_nan=True) + "\n")
    return 0 if all(not row["broken"] for row in rows) else 1


def round_of(faults: list[Fault], lab: Lab, tries: int, until: float) -> list[dict]:
    """One row for each fault."""
    rows = []
    for fault in faults:
        row = {"name": fault.name, "what": fault.what, "promise": fault.promise, "tries": 0, "survived": 0,
               "repeated": [], "recovery": [], "broken": [], "skipped": ""}
        rows.append(row)
        began = time.monotonic()
        for _ in range(tries or fault.tries):
            if time.monotonic() > until:
                row["skipped"] = row["skipped"] or "no time left"
                break
            problem, outcome = attempt(fault, lab)
            if problem is None:
                row["skipped"] = outcome
                break
            row["tries"] += fault.each
            if problem:
                row["broken"].append(problem)
            else:
                row["survived"] += fault.each
                row["repeated"].append(outcome.repeated)
                row["recovery"].append(outcome.recovery)
            clean(lab)
        told = f"skipped: {row['skipped']}" if row["skipped"] and not row["tries"] else (
            f"{row['survived']} of {row['tries']} survived")
        print(f"{fault.name:<22} {told:<24} {format_duration(time.monotonic() - began):>7}", flush=True)
        for problem in row["broken"]:
            print(f"    {problem}", flush=True)
    return rows


def attempt(fault: Fault, lab: Lab) -> tuple[str | None, Outcome | str]:
    """("", outcome), (what was not kept, …), or (None, why it cannot be tried here)."""
    try:
        return "", fault.run(lab)
    except Skip as why:
        return None, str(why)
    except Broken as broken:
        return str(broken), Outcome()


def clean(lab: Lab) -> None:
    """Runs that are done with; the undisturbed ones stay."""
    for run in lab.runs.glob("run*"):
        shutil.rmtree(run, ignore_errors=True)


def table(rows: list[dict]) -> str:
    """The whole round, in Markdown."""
    lines = ["| fault | times | survived | steps repeated, at most | back after, median | promise |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        if not row["tries"]:
            lines.append(f"| {row['what']} | 0 | – | – | – | {row['skipped']} |")
            continue
        times = [t for t in row["recovery"] if t == t]
        lines.append(f"| {row['what']} | {row['tries']} | {row['survived']} | {max(row['repeated'], default=0)} | "
                     f"{f'{statistics.median(times):.1f} s' if times else '–'} | {row['promise']} |")
    tries, survived = sum(row["tries"] for row in rows), sum(row["survived"] for row in rows)
    kinds = sum(row["tries"] > 0 for row in rows)
    lines.append(f"\n{tries} faults of {kinds} kinds injected, {tries - survived} not survived.")
    return "\n".join(lines)
