"""The arguments of `lmjax plan`; nothing is imported before it is asked for."""

import argparse
import json
import sys
from pathlib import Path

from lmjax.errors import ConfigError


def run_plan(args: list[str]) -> int:
    """Raises ConfigError for everything that a user can mend."""
    parser = argparse.ArgumentParser(
        prog="lmjax plan", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""What a config would need and how fast it could be on a machine that is not here: the real train
step is compiled for it by libtpu, which needs no TPU, and its memory, collectives and times are shown.

Any field of the config is set with --key=value, as in `lmjax train`. Formulas, sources and how far off the times were
for runs that others have published: docs/planning.md.""")
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="such as configs/llama3_8b_v5p128.py")
    parser.add_argument("--topology", metavar="T", help="v5p:4x4x8, v5e:16x16, v6e:16x16, tpu7x:4x4x4, h100:8, …")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="that many slices (default %(default)s)")
    parser.add_argument("--price", type=float, metavar="USD", help="dollars for a chip and hour")
    parser.add_argument("--json", type=Path, metavar="OUT", help="every figure")
    parser.add_argument("--no-compile", action="store_true", help="arithmetic alone: state, roofline")
    parser.add_argument("--limit", type=float, default=900, metavar="S",
                        help="seconds that a compilation may take (default %(default)g)")
    parser.add_argument("--search", action="store_true", help="try batch, remat and mesh; show what fits and how fast")
    parser.add_argument("--minutes", type=float, default=20, metavar="M",
                        help="with --search: compile for at most so long (default %(default)g)")
    parser.add_argument("--validate", action="store_true", help="the roofline against published runs; needs no CONFIG")
    options, overrides = parser.parse_known_args(args)
    if options.validate:
        from lmjax.plan.published import table

        print(table())
        return 0
    if not options.config or not options.topology:
        raise ConfigError("lmjax plan: give a CONFIG and a --topology, such as `lmjax plan configs/llama3_8b_v5p128.py "
                          "--topology v5p:4x4x4`, or --validate")
    bad = [f"--{name}={getattr(options, name)}: must be above 0 and finite" for name in ("price", "limit", "minutes")
           if getattr(options, name) is not None and not 0 < getattr(options, name) < float("inf")]
    if bad:
        raise ConfigError(*bad)
    from lmjax.plan.machine import parse_machine

    machine = parse_machine(options.topology, options.slices)
    from lmjax.config import load_config

    config = load_config(options.config, overrides)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if options.search:
        from lmjax.plan.search import search

        print(search(config, machine, minutes=options.minutes, compiles=not options.no_compile, say=say))
        return 0
    from lmjax.plan import page
    from lmjax.plan.make import make

    planned = make(config, machine, compiles=not options.no_compile, price=options.price, limit=options.limit, say=say)
    print(page.page(planned))
    if options.json:
        from lmjax.records import replace_file

        replace_file(options.json, (json.dumps(page.to_json(planned), indent=2) + "\n").encode())
    return 0 if planned.fits is not False else 1
