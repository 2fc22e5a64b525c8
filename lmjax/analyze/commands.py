"""The arguments of `lmjax score` and `lmjax analyze …`; nothing is imported before it is asked for."""

import argparse
from pathlib import Path

from lmjax.errors import ConfigError

MODEL = "a run folder, a Hugging Face folder or a GGUF file"
USAGE = """usage: lmjax analyze COMMAND [options]

  loops MODEL       share of greedy continuations that end in a cycle, by checkpoint of a run
  positions MODEL   loss by position, to four times the trained length, under each way to extend the context

`lmjax analyze COMMAND --help` says more; what it means: docs/surprise.md.
"""


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lmjax {command}", description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    return parser


def _at_least(low: int, **values: int | None) -> None:
    """Raises ConfigError for the first values that are below."""
    bad = [f"--{name.replace('_', '-')} {value}: must be at least {low}" for name, value in values.items()
           if value is not None and value < low]
    if bad:
        raise ConfigError(*bad)


def run_score(args: list[str]) -> int:
    parser = _parser("score", """Surprisal, entropy, varentropy, rank and normalised surprise of every token of
a text; perplexity and bits per byte. Formulas: docs/surprise.md.

A text longer than --context is read through a window that slides by --stride: each token is predicted once, from
context - stride + 1 tokens or more, except near the beginning.""")
    parser.add_argument("--text", action="append", default=[], help="a text to score (repeatable)")
    parser.add_argument("--file", action="append", default=[], metavar="F",
                        help="a text file, .jsonl or .parquet (field text), or a folder of text (repeatable)")
    parser.add_argument("--step", type=int, default=0, help="another checkpoint of a run than the newest")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many tokens")
    parser.add_argument("--context", type=int, metavar="N", help="the most tokens that a prediction sees (default: the "
                        "rows of the run; of other models what they take, at most 1,024)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between two windows (default: half of context)")
    parser.add_argument("--top", type=int, default=5, metavar="N",
                        help="likeliest tokens to keep for --html and --json (default %(default)s)")
    parser.add_argument("--html", type=Path, metavar="OUT", help="one self-contained page to read")
    parser.add_argument("--json", type=Path, metavar="OUT", help="everything")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="one line a token")
    options = parser.parse_args(args)
    if not options.text and not options.file:
        raise ConfigError("lmjax score: there is nothing to score; give --text TEXT or --file F")
    _at_least(1, limit=options.limit, context=options.context, stride=options.stride)
    _at_least(0, top=options.top)
    from lmjax.analyze.score import score

    score(options)
    return 0


def run_loops(args: list[str]) -> int:
    parser = _parser("analyze loops", """Continue prompts greedily and look whether the end repeats: the shortest cycle
that the last tokens go through at least --repeats times. Of a run, every checkpoint that it kept is asked,
and its initial weights, step 0.

Kinds of prompts: text (the beginnings of held-out documents; --prompt and --file instead give your own), random
(10 random tokens), ngrams (1 to 4 random tokens repeated to 100). Protocol: docs/surprise.md.""")
    parser.add_argument("--kinds", default="", metavar="A,B", help="of text, random, ngrams (default: all that there "
                        "is text for)")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt (repeatable)")
    parser.add_argument("--file", action="append", default=[], metavar="F", help="files whose texts begin prompts")
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="of each kind (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N",
                        help="that a prompt takes from a document (default %(default)s)")
    parser.add_argument("--new", type=int, metavar="N", help="tokens to write (default: 1,000, or what the model has "
                        "room for)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="times round (default %(default)s)")
    parser.add_argument("--max-period", type=int, default=0, metavar="N", help="longest cycle; 0 is any")
    parser.add_argument("--steps", default="", metavar="A,B", help="of a run: only these checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--json", type=Path, metavar="OUT", help="everything, with the continuations")
    parser.add_argument("--html", type=Path, metavar="OUT", help="one self-contained page with charts")
    options = parser.parse_args(args)
    _at_least(1, prompts=options.prompts, prompt_tokens=options.prompt_tokens, new=options.new)
    _at_least(2, repeats=options.repeats)
    _at_least(0, max_period=options.max_period, seed=options.seed)
    from lmjax.analyze.loops import loops

    loops(options)
    return 0


def run_positions(args: list[str]) -> int:
    parser = _parser("analyze positions", """Loss by position, to --factor times the trained length, of the same
weights under each way to extend the context of rotary positions: none, linear, ntk, dynamic, yarn, llama3.
Nothing is trained. "restart" begins anew every trained length: what a model without extension can do.""")
    parser.add_argument("--factor", type=float, default=4.0, metavar="S", help="(default %(default)g)")
    parser.add_argument("--trained", type=int, metavar="N", help="the trained length (default: the rows of the run, or "
                        "the model's max_seq_len)")
    parser.add_argument("--file", action="append", default=[], metavar="F",
                        help="text to read (default: what the run held out)")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="rows of text at most (default %(default)s)")
    parser.add_argument("--buckets", type=int, default=2, metavar="N",
                        help="stretches that each trained length is told in (default %(default)s)")
    parser.add_argument("--step", type=int, default=0, help="another checkpoint of a run than the newest")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--html", type=Path, metavar="OUT", help="one self-contained page with the chart")
    options = parser.parse_args(args)
    _at_least(1, rows=options.rows, buckets=options.buckets, trained=options.trained)
    if not 1 < options.factor < 1e6:
        raise ConfigError(f"--factor {options.factor:g}: must be above 1")
    from lmjax.analyze.positions import positions

    positions(options)
    return 0


def run_analyze(args: list[str]) -> int:
    """Raises ConfigError for an unknown sub-command or a wrong option."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    commands = {"loops": run_loops, "positions": run_positions}
    if args[0] not in commands:
        raise ConfigError(f"lmjax analyze {args[0]}: no such command; see `lmjax analyze --help`")
    return commands[args[0]](args[1:])
