"""The command `lmjax`: thin, and quick to say what it can do.

Each sub-command parses its arguments, then imports what it needs, so `lmjax --help` never waits for JAX.
A mistake of the user's ends in one line on stderr and the exit code of its class (`lmjax.errors`).
"""

import argparse
import sys
import traceback
from collections.abc import Callable

from lmjax.decode.flags import add_cache, add_sampling, cache_of, sample_of
from lmjax.errors import ConfigError, UserError
from lmjax.hosts import leave, several
from lmjax.process import keep_compiled_programs, on_huge_pages

USAGE = """usage: lmjax COMMAND …

  train CONFIG.py [--key=value …]   train, or continue, the run that a config describes
  plan CONFIG --topology T          what a config needs, and how fast it could be, on a machine that is not here
  eval RUN                          held-out loss, perplexity and bits per byte of a run
  score MODEL --text T | --file F   surprisal, entropy and rank of every token, also as a page to read
  analyze loops | positions         where a model loops; loss by position beyond the trained length
  audit MODEL --data D --folder O   what a model memorised of given texts, beside a control; also as a page
  audit exposure RUN --folder O     how much of its canaries a run remembers, by how often it saw them
  generate MODEL --prompt TEXT      continue a text with a trained model
  chat MODEL                        talk with a model in the terminal
  serve MODEL                       an HTTP endpoint like OpenAI's, with continuous batching
  export MODEL OUT                  write a model as a Hugging Face folder
  watermark detect | key | …        find a watermark; make a secret; measure the schemes
  report RUN [RUN …]                one self-contained HTML page about runs
  bench train | step | …            how fast this is, beside others and beside the hardware
  checkpoint verify | list RUN      are a run's checkpoints what was written?
  chaos                             break runs on this machine, and see whether they come through
  reproduce NAME                    experiments on memorisation, each ending in a table and a figure
  data prepare | inspect            turn a corpus into token shards; look into them
  data overlap | dedup              n-grams that two corpora share; copies and near-copies within one
  tokenizer train | show            train a byte-level BPE; look into a tokenizer

`lmjax COMMAND --help` says more. `lmjax train CONFIG.py --dry-run` shows what a run would be.
"""


MODEL = "a run folder, a Hugging Face folder or a GGUF file"


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"lmjax {command}", description=description, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def run_train(args: list[str]) -> int:
    parser = _parser("train", """Train the run that a config describes. If its folder already has checkpoints, the run
continues from the newest one; the same command always does the right thing.

Any field of the config is set with --key=value, e.g. --model.num_layers=8 --optim.learning_rate=3e-4
--mesh.fsdp=4 --name=mine. --dry-run lists every key with its value.""")
    parser.add_argument("config", metavar="CONFIG.py", help="such as configs/quickstart.py")
    parser.add_argument("--dry-run", action="store_true",
                        help="print config, mesh, shardings, bytes per device and FLOPs; allocate nothing")
    parser.add_argument("--devices", type=int, default=0, metavar="N",
                        help="with --dry-run: plan for N devices instead of those of this machine")
    parser.add_argument("--profile", type=int, nargs="?", const=3, default=0, metavar="N",
                        help="trace N steps (3), the third of this start and on, into the run folder's profile/")
    options, overrides = parser.parse_known_args(args)
    if options.devices < 0:
        raise ConfigError(f"--devices={options.devices}: give 1 or more")
    if options.devices and not options.dry_run:
        raise ConfigError("--devices is for --dry-run only; a real run uses the devices that are there")
    if options.profile < 0 or (options.profile and options.dry_run):
        raise ConfigError(f"--profile={options.profile}: give 1 or more steps, and a run that is not a --dry-run")
    from lmjax.config import load_config

    config = load_config(options.config, overrides)
    from lmjax import train
    from lmjax.checkpoint import quiet_storage

    quiet_storage()
    if options.dry_run:
        print(train.dry_run(config, options.devices))
    else:
        train.train(config, options.profile)
    return 0


def run_eval(args: list[str]) -> int:
    parser = _parser("eval", "Held-out loss, perplexity and bits per byte of the newest checkpoint of a run.")
    parser.add_argument("run", metavar="RUN", help="a run folder, such as runs/quickstart")
    parser.add_argument("--batches", type=int, default=0, help="at most so many batches (default: all)")
    parser.add_argument("--step", type=int, default=0, help="another checkpoint than the newest")
    options = parser.parse_args(args)
    from lmjax.runs import evaluate_run

    evaluate_run(options.run, options.batches, options.step)
    return 0


def run_generate(args: list[str]) -> int:
    parser = _parser("generate", """Continue texts with a model: the newest checkpoint of a run, or one of others.

Settings are applied in this order: penalties, no-repeat-ngram, DRY; then temperature, top-k, top-p, min-p,
typical; then the watermark. The same model, prompts, settings and seed give the same text. Formulas:
docs/decoding.md, docs/watermarks.md.""")
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--prompt", action="append", help="text to continue (repeatable; default: none)")
    parser.add_argument("--step", type=int, default=0, help="another checkpoint than the newest")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end before this text (repeatable)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=None,
                        help="print as it is written (default: on a terminal)")

    add_sampling(parser)
    group = parser.add_argument_group("watermark", "`lmjax watermark detect` finds it again with the same secret")
    _watermark_flags(group)

    group = parser.add_argument_group("other ways to decode")
    group.add_argument("--beams", type=int, default=0, metavar="N", help="beam search; needs --temperature 0")
    group.add_argument("--length-penalty", type=float, default=1.0, metavar="A",
                       help="beams score log-probability / length^A (default %(default)s)")
    group.add_argument("--draft", default="", metavar="RUN",
                       help="a small model that proposes tokens; the distribution stays the model's")
    group.add_argument("--proposals", type=int, default=4, metavar="N",
                       help="tokens that the draft proposes at a time (default %(default)s)")
    add_cache(parser)
    options = parser.parse_args(args)
    from lmjax.decode.marks import watermark_of
    from lmjax.decode.write import TextRequest
    from lmjax.runs import generate_from_run

    watermark = watermark_of(**{name.removeprefix("watermark_") if name != "watermark" else "scheme": value
                                for name, value in vars(options).items() if name.startswith("watermark")})
    prompts = tuple(options.prompt or [""])
    can_stream = len(prompts) == 1 and not options.beams and not options.draft
    request = TextRequest(prompts, sample_of(options), cache_of(options), options.seed,
                          tuple(options.stop), options.beams, options.length_penalty, options.proposals,
                          can_stream and sys.stdout.isatty() if options.stream is None else options.stream,
                          watermark)
    generate_from_run(options.model, request, options.step, options.draft)
    return 0


def _watermark_flags(group) -> None:
    group.add_argument("--watermark", default="", metavar="SCHEME", help="kgw, gumbel or tournament (default: none)")
    group.add_argument("--watermark-key-file", default="", metavar="FILE",
                       help="the secret, 16 bytes or more (default: the environment variable LMJAX_WATERMARK_KEY)")
    group.add_argument("--watermark-context", type=int, metavar="H", help="earlier tokens that decide (default 4)")
    group.add_argument("--watermark-gamma", type=float, metavar="G", help="kgw: share of green tokens (default 0.25)")
    group.add_argument("--watermark-delta", type=float, metavar="D", help="kgw: what their logits gain (default 2)")
    group.add_argument("--watermark-layers", type=int, metavar="N", help="tournament: its depth (default 30)")


def run_chat(args: list[str]) -> int:
    from lmjax.serve.commands import run_chat

    return run_chat(args)


def run_serve(args: list[str]) -> int:
    from lmjax.serve.commands import run_serve

    return run_serve(args)


def run_export(args: list[str]) -> int:
    parser = _parser("export", """Write a model as a Hugging Face folder: config, safetensors, tokenizer and
chat template. `transformers` opens it, and so does every MODEL argument here. Nothing is written over.""")
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default %(default)s)")
    parser.add_argument("--max-shard-bytes", type=float, default=5e9, metavar="BYTES",
                        help="a file is closed before it would grow beyond this (default %(default)g)")
    parser.add_argument("--step", type=int, default=0, help="another checkpoint of a run than the newest")
    options = parser.parse_args(args)
    if not 1 <= options.max_shard_bytes < 2**63:
        raise ConfigError(f"--max-shard-bytes={options.max_shard_bytes}: give 1 or more")
    from lmjax.runs import export

    export(options.model, options.out, options.dtype, int(options.max_shard_bytes), options.step)
    return 0


def run_score(args: list[str]) -> int:
    from lmjax.analyze.commands import run_score

    return run_score(args)


def run_analyze(args: list[str]) -> int:
    from lmjax.analyze.commands import run_analyze

    return run_analyze(args)


def run_audit(args: list[str]) -> int:
    from lmjax.audit.commands import run_audit

    return run_audit(args)


def run_report(args: list[str]) -> int:
    from lmjax.report import run_report

    return run_report(args)


def run_watermark(args: list[str]) -> int:
    from lmjax.watermark.commands import run_watermark

    return run_watermark(args)


def run_bench(args: list[str]) -> int:
    from lmjax.bench.commands import run_bench

    return run_bench(args)


def run_checkpoint(args: list[str]) -> int:
    parser = _parser("checkpoint", """Look at the checkpoints of a run. `verify` reads every file and holds it to the
manifest; `list` looks at sizes only. Nothing is changed. Exit code 4 if any is damaged.""")
    parser.add_argument("what", choices=("verify", "list"))
    parser.add_argument("run", metavar="RUN", help="a run folder, such as runs/quickstart")
    options = parser.parse_args(args)
    from lmjax.checkpoint.commands import run

    return run(options.run, hashes=options.what == "verify")


def run_reproduce(args: list[str]) -> int:
    from lmjax.reproduce.commands import run_reproduce

    return run_reproduce(args)


def run_plan(args: list[str]) -> int:
    from lmjax.plan.commands import run_plan

    return run_plan(args)


def run_chaos(args: list[str]) -> int:
    from lmjax.chaos.commands import run_chaos

    return run_chaos(args)


def _group(name: str, commands: dict[str, str]) -> Callable[[list[str]], int]:
    """A command with sub-commands, each a function of lmjax.data.commands."""

    def run(args: list[str]) -> int:
        if not args or args[0] not in commands:
            choices = " | ".join(f"lmjax {name} {c}" for c in commands)
            if args and args[0] in ("-h", "--help"):
                print(f"usage: {choices}\n`lmjax {name} COMMAND --help` says more.")
                return 0
            raise ConfigError(f"lmjax {name}: which one? {choices}")
        from lmjax.data import commands as module

        return getattr(module, commands[args[0]])(args[1:])

    return run


COMPUTES = ("train", "eval", "score", "analyze", "audit", "generate", "chat", "serve", "export")
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": run_train,
    "plan": run_plan,
    "eval": run_eval,
    "score": run_score,
    "analyze": run_analyze,
    "audit": run_audit,
    "generate": run_generate,
    "chat": run_chat,
    "serve": run_serve,
    "export": run_export,
    "report": run_report,
    "watermark": run_watermark,
    "bench": run_bench,
    "checkpoint": run_checkpoint,
    "chaos": run_chaos,
    "reproduce": run_reproduce,
    "data": _group("data", {"prepare": "run_prepare", "inspect": "run_inspect", "overlap": "run_overlap",
                            "dedup": "run_dedup"}),
    "tokenizer": _group("tokenizer", {"train": "run_tokenizer_train", "show": "run_tokenizer_show"}),
}


def one_line(text: str) -> str:
    """A message with line breaks as spaces, other control characters escaped and an overlong middle left out: what a
    file or a name holds may neither steer the terminal, nor pretend to be another message, nor fill the screen."""
    text = text if len(text) <= 2000 else f"{text[:1200]} … {text[-600:]}"
    return "".join(c if c.isprintable() else " " if c in "\r\n\t" else ascii(c)[1:-1] for c in text)


def main(args: list[str] | None = None) -> int:
    is_process = args is None  # not a call from Python
    args = sys.argv[1:] if is_process else args
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if is_process and (args[0] in COMPUTES or args[:2] == ["bench", "step"]):
        on_huge_pages()
    if is_process and args[0] in COMPUTES:
        keep_compiled_programs()
    code = _run(args)
    if is_process and args[0] == "train":
        leave(code)
    return code


def _run(args: list[str]) -> int:
    """The exit code of a command; what a user can mend is one line on stderr."""
    try:
        if args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean `lmjax {near[0]}`?" if near else "see `lmjax --help`"
            raise ConfigError(f"lmjax {args[0]}: no such command; {hint}")
        if empty := [arg for arg in args if arg.startswith("--") and arg.endswith("=--")]:
            raise ConfigError(f"{empty[0]}: '--' is no value")  # argparse of some Pythons makes an empty list of it
        return COMMANDS[args[0]](args[1:])
    except UserError as error:
        for line in getattr(error, "problems", None) or (str(error),):
            print(f"lmjax: {one_line(line)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a disk that fills up under a log, say; what was written before stays
        what, why = one_line(str(error.filename or args[0])), one_line(str(error.strerror or error))
        print(f"lmjax: {what}: {why}; mend that and give the same command again", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print(f"\nlmjax: {args[0]} was stopped", file=sys.stderr)
        return 130
    except Exception:  # a bug of ours
        if not several():
            raise
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
