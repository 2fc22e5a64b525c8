"""`lmjax watermark …`: arguments in, a few lines out. What the sub-commands do is in the files beside this one."""

import argparse
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from lmjax.errors import ConfigError, DataError

USAGE = """usage: lmjax watermark COMMAND …

  key FILE           make a secret, readable by you alone
  detect TOKENIZER   score a text for a watermark: exact p-value
  roc MODEL          how well each scheme is found after edits, on texts of a model
  whistle            a watermark that is learned against an adversary, beside the hand-made ones

`lmjax generate --watermark …` puts one in. What each promises: docs/watermarks.md.
"""


def run_watermark(args: list[str]) -> int:
    """Raises ConfigError for an unknown sub-command or a wrong option."""
    commands = {"key": run_key, "detect": run_detect, "roc": run_roc, "whistle": run_whistle}
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if args[0] not in commands:
        raise ConfigError(f"lmjax watermark {args[0]}: no such command; see `lmjax watermark --help`")
    return commands[args[0]](args[1:])


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"lmjax watermark {name}", description=description, allow_abbrev=False)


def run_key(args: list[str]) -> int:
    parser = _parser("key", "Write 32 random bytes as hexadecimal to a new file that only you can read.")
    parser.add_argument("file", metavar="FILE")
    path = Path(parser.parse_args(args).file).expanduser()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already, and text marked with a lost secret cannot be found again; choose "
                          "another name") from error
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    print(f"a new secret is in {path}; whoever has it can find, forge and remove the watermark")
    return 0


def run_detect(args: list[str]) -> int:
    parser = _parser("detect", "Score a text for a watermark. The p-value is the chance that a text made without the "
                               "secret scores as high. Scheme, context, gamma and layers are those of the generator.")
    parser.add_argument("tokenizer", metavar="MODEL_OR_TOKENIZER",
                        help="bytes, a tokenizer.json, a run or Hugging Face folder, a Hub id, or a GGUF file")
    parser.add_argument("--scheme", required=True, help="kgw, gumbel or tournament")
    parser.add_argument("--key-file", default="", metavar="FILE",
                        help="the secret (default: the environment variable LMJAX_WATERMARK_KEY)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--file", default=None, help="the text, UTF-8 (default: standard input)")
    group.add_argument("--text", default=None, help="the text itself")
    parser.add_argument("--context", type=int, metavar="H", help="earlier tokens that decide (default 4)")
    parser.add_argument("--gamma", type=float, metavar="G", help="kgw: share of green tokens (default 0.25)")
    parser.add_argument("--layers", type=int, metavar="N", help="tournament: its depth (default 30)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of words")
    given = parser.parse_args(args)
    from lmjax.decode.marks import watermark_of
    from lmjax.watermark.detect import detect

    mark = watermark_of(given.scheme, given.key_file, "--", context=given.context, gamma=given.gamma,
                        layers=given.layers)
    if mark is None:
        raise ConfigError("--scheme: is empty; choose kgw, gumbel or tournament")
    text = _text(given)
    tokens = _tokenizer(given.tokenizer).encode(text)
    found = detect(tokens, mark)
    if not found.scored:
        raise DataError(f"the text has {found.tokens} tokens; with --context {mark.context} the first "
                        f"{mark.context} are not scored, so give more text")
    if given.json:
        print(json.dumps(found.summary() | {"context": mark.context}))
        return 0
    print(f"scheme     {mark.scheme}, context {mark.context}\n"
          f"tokens     {found.tokens:,}, of which {found.scored:,} are scored (repetitions count once)\n"
          f"score      {found.score:,.1f}; without the watermark {found.expected:,.1f} on average (z {found.z:+.1f})\n"
          f"p-value    {_power(found.log10_p)}, the chance of such a score in a text made without the secret")
    return 0


def _power(log10: float) -> str:
    """10^log10 with two digits, also where a float would be 0."""
    if log10 > -300:
        return f"{10 ** log10:.2g}"
    whole = int(log10 // 1)
    return f"{10 ** (log10 - whole):.1f}e{whole}"


def _text(given: argparse.Namespace) -> str:
    if given.text is not None:
        return given.text
    where = given.file or "standard input"
    try:
        raw = Path(given.file).expanduser().read_bytes() if given.file else sys.stdin.buffer.read()
        return raw.decode()
    except OSError as error:
        raise DataError(f"--file {where}: {error.strerror}; give a file of text") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is no UTF-8; convert the text first") from error


def _tokenizer(name: str) -> Any:
    """Only a GGUF file needs JAX: there the tokenizer is inside of a model."""
    from lmjax.data import load_tokenizer

    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".json":
        from lmjax.interop.load import open_model

        return open_model(path).tokenizer
    return load_tokenizer(name)


def run_roc(args: list[str]) -> int:
    parser = _parser("roc", "Let a model write texts with each watermark and without, edit them, and say how many "
                            "are still found where 1 % of unmarked texts are found too. Every text has a secret of its "
                            "own.")
    parser.add_argument("model", metavar="MODEL", help="a run folder, a Hugging Face folder or a GGUF file")
    parser.add_argument("--texts", type=int, default=64, help="for each scheme (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="of each text (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="texts written at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.8, help="(default %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="(default %(default)s)")
    parser.add_argument("--context", type=int, default=4, help="earlier tokens that decide (default %(default)s)")
    parser.add_argument("--out", default="", metavar="FILE", help="write all figures as JSON")
    given = vars(parser.parse_args(args))
    model, out = given.pop("model"), given.pop("out")
    from lmjax.interop.load import open_model
    from lmjax.runs import all_devices
    from lmjax.watermark.roc import RocConfig, measure, table

    config = RocConfig(**given)
    if problems := config.problems():
        raise ConfigError(*problems)
    opened = open_model(model, mesh=all_devices())
    result = measure(opened, config, lambda line: print(line, file=sys.stderr, flush=True))
    print(table(result))
    if out:
        Path(out).write_text(json.dumps(given | {"model": Path(model).name, "schemes": result}, indent=1) + "\n")
    return 0


def run_whistle(args: list[str]) -> int:
    from lmjax.watermark.judges import run

    return run(args)
