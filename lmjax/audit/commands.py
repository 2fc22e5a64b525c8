"""The arguments of `lmjax audit`; nothing is imported before it is asked for."""

import argparse
from pathlib import Path

from lmjax.errors import ConfigError

MODEL = "a run folder, a Hugging Face folder or a GGUF file"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmjax audit", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""What a model has memorised of given texts: OUT/audit.json, audit.csv (one row a probe) and
audit.html. A probe is a prefix of a document; what is asked is whether the model goes on with the document's next
tokens. Always beside a control that never saw them and a base rate. Definitions: docs/audit.md.

`lmjax audit exposure RUN` asks a run about its canaries instead (a model folder of that name: ./exposure).

Stopped at any moment, the same command goes on where it was, and ends with the same bits.""")
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--data", required=True, metavar="FILE|FOLDER|RUN", help="text, a folder of text, .parquet, "
                        ".jsonl with text and perhaps id, count (times seen) and source; or a run: what it was trained "
                        "on, beside what it held out")
    parser.add_argument("--folder", required=True, type=Path, metavar="OUT", help="what is written goes here")
    parser.add_argument("--control", default="random", metavar="MODEL", help="a model that never saw the texts; "
                        "random: this one before training (default); none")
    parser.add_argument("--reference", metavar="MODEL", help="a model that knows the language and not these texts: for "
                        "memorisation in bits and the reference attack")
    probes = parser.add_argument_group("probes, in tokens")
    probes.add_argument("--prefix", type=int, nargs="+", default=[50], metavar="N", help="shown (default 50)")
    probes.add_argument("--suffix", type=int, default=50, metavar="N", help="asked for (default %(default)s)")
    probes.add_argument("--positions", type=int, nargs="+", default=[0], metavar="N",
                        help="where in a document the longest prefix begins (default 0)")
    probes.add_argument("--offsets", type=int, nargs="+", default=[0], metavar="N",
                        help="tokens of other documents before the prefix (default 0)")
    probes.add_argument("--limit", type=int, metavar="N", help="at most so many documents, evenly spread (default: "
                        "all; of a run 500)")
    probes.add_argument("--continuations", type=int, metavar="N", help="write the model's own continuation of at most "
                        "so many probes of each kind (default: all); shares of verbatim ones need none")
    scheme = parser.add_argument_group("extraction by drawing often (n, p), and by beam search")
    scheme.add_argument("--temperature", type=float, default=1.0, help="(default %(default)g)")
    scheme.add_argument("--top-k", type=int, default=40, metavar="K", help="0: no limit (default %(default)s)")
    scheme.add_argument("--beams", type=int, default=0, metavar="N", help="also search with so many beams (default 0)")
    members = parser.add_argument_group("membership inference")
    members.add_argument("--members", metavar="FILE", help="documents that were trained on")
    members.add_argument("--nonmembers", metavar="FILE", help="documents of the same kind that were not")
    members.add_argument("--recall", type=int, default=0, metavar="N", help="also ReCaLL, with the first N non-members "
                         "as its prefix; no attack is measured on those then")
    parser.add_argument("--context", type=int, metavar="N", help="the most tokens that a prediction sees in whole "
                        "documents (default: the rows of the run; of other models what they take, at most 1,024)")
    parser.add_argument("--step", type=int, default=0, help="another checkpoint of a run than the newest")
    parser.add_argument("--seed", type=int, default=0, help="of the random control and of intervals")
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N",
                        help="that are on the devices at a time (default %(default)s)")
    return parser


def _exposure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmjax audit exposure", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""How much of its canaries (data.canaries) a run remembers, by how often it was trained on them:
OUT/exposure.json, exposure.csv (one row a canary), exposure.html, and canaries.jsonl for `lmjax audit RUN --data`.
Exposure is how far the model prefers a canary's own secret to those that it might have had instead, in bits.
Definitions: docs/audit.md.

Stopped at any moment, the same command goes on where it was, and ends with the same bits.""")
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--folder", required=True, type=Path, metavar="OUT", help="what is written goes here")
    parser.add_argument("--candidates", type=int, default=10_000, metavar="N", help="other secrets that each canary is "
                        "ranked among: all, where there are no more than N, else N drawn at random and a distribution "
                        "fitted to them (default %(default)s)")
    parser.add_argument("--step", type=int, default=0, help="another checkpoint than the newest")
    parser.add_argument("--seed", type=int, default=0, help="of intervals")
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N",
                        help="that are on the devices at a time (default %(default)s)")
    return parser


def run_exposure(args: list[str]) -> int:
    """`lmjax audit exposure`. Raises ConfigError for options that cannot be, all of them at once."""
    options = _exposure_parser().parse_args(args)
    bad = _too_low(candidates=(options.candidates, 20), step=(options.step, 0), seed=(options.seed, 0),
                   batch_tokens=(options.batch_tokens, 1)) + _folder_problems(options.folder)
    if bad:
        raise ConfigError(*bad)
    from lmjax.audit.canaries import exposure

    exposure(options)
    return 0


def _too_low(**values: tuple[int | None, int]) -> list[str]:
    """One line for each option (value, the least that it may be) below it."""
    return [f"--{name.replace('_', '-')} {value}: must be at least {low}" for name, (value, low) in values.items()
            if value is not None and value < low]


def _folder_problems(folder: Path) -> list[str]:
    if folder.name in ("", ".", ".."):
        return [f"--folder {folder}: give the name of a new folder"]
    if not folder.parent.is_dir():
        return [f"--folder {folder}: {folder.parent} does not exist; make it, or give another name"]
    return []


def run_audit(args: list[str]) -> int:
    """Raises ConfigError for options that do not go together, all of them at once."""
    if args[:1] == ["exposure"]:
        return run_exposure(args[1:])
    options = _parser().parse_args(args)
    bad = _too_low(limit=(options.limit, 1), continuations=(options.continuations, 0), top_k=(options.top_k, 0),
                   beams=(options.beams, 0), recall=(options.recall, 0), context=(options.context, 2),
                   step=(options.step, 0), seed=(options.seed, 0), batch_tokens=(options.batch_tokens, 1))
    if not 0.01 <= options.temperature <= 100:
        bad.append(f"--temperature {options.temperature:g}: must be from 0.01 to 100; greedy extraction is always told")
    if bool(options.members) != bool(options.nonmembers):
        bad.append("--members and --nonmembers go together; give both, of the same kind of text")
    bad += _folder_problems(options.folder)
    if bad:
        raise ConfigError(*bad)
    from lmjax.audit.run import audit

    audit(options)
    return 0
