"""`lmjax reproduce NAME`: the list of experiments, and where their results go. Each is a file beside this one, with

    add_arguments(parser)                   its own options
    run(options, say) -> (result, table, svg)   a JSON object, Markdown, and the figure; say(line) tells of progress
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from lmjax.data.manifest import write_atomically
from lmjax.errors import ConfigError

EXPERIMENTS = {
    "capacity": "bits that a decoder memorises of random tokens, per parameter",
    "dp-sgd": "differential privacy beside goldfish, under the same questions (needs the extra privacy)",
    "goldfish": "masks of k = 2 to 128 against recitation of repeated passages, and their cost",
    "known-texts": "what a published model recites of famous passages and licences, beside text it never saw",
    "membership-law": "F1 of membership inference by tokens per parameter, on small models of real text",
    "near-duplicates": "goldfish masks on copies with other line breaks, case and tokens: what leaks, what it costs",
    "onset": "memorisation and held-out loss as real text outgrows what a model can hold (double descent)",
    "product-hash": "how the published goldfish hash degenerates as its context grows, on real text",
}


def run_reproduce(args: list[str]) -> int:
    """Raises ConfigError for an unknown experiment or a wrong option."""
    if not args or args[0] in ("-h", "--help", "help"):
        print("usage: lmjax reproduce NAME [--out FOLDER] …\n")
        print("\n".join(f"  {name:<17} {what}" for name, what in EXPERIMENTS.items()))
        print("\nEach writes NAME.json, NAME.md and NAME.svg; `lmjax reproduce NAME --help` has its options.")
        return 0
    name = args[0]
    if name not in EXPERIMENTS:
        raise ConfigError(f"lmjax reproduce {name}: no such experiment; choose one of {', '.join(EXPERIMENTS)}")
    experiment = importlib.import_module(f"lmjax.reproduce.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"lmjax reproduce {name}", description=experiment.__doc__,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="FOLDER",
                        help="where the results go (default: %(default)s)")
    experiment.add_arguments(parser)
    options = parser.parse_args(args[1:])
    result, table, svg = experiment.run(options, lambda line: print(line, file=sys.stderr, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", table + "\n"), (".svg", svg)):
        write_atomically(options.out / f"{name}{ending}", text.encode())
    print(table)
    print(f"\nwritten: {options.out}/{name}.json, .md, .svg")
    return 0
