"""`lmjax report RUN [RUN...]`: one self-contained HTML page from run folders.

What lives here: the command. What does not: the page (`lmjax.report.page`) or its charts
(`lmjax.report.charts`).
Nothing here imports jax.
"""

import argparse
from pathlib import Path

from lmjax.errors import CheckpointError
from lmjax.records import format_bytes
from lmjax.report.figure import loss_figure
from lmjax.report.page import write_report

__all__ = ["run_report", "write_report"]


def run_report(args: list[str]) -> int:
    """The command: `args` are its arguments. Prints where the page is and returns 0.

    Raises CheckpointError for a folder that is not a run's or a page that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="lmjax report",
        description="Write one HTML page with curves, numbers, samples and config of one or several runs. "
        "The page holds everything it needs, so it opens without a network and can be sent as it is.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the page to write (default: RUN/report.html for one run, ./report.html for several)",
    )
    parser.add_argument("--svg", metavar="FILE", type=Path,
                        help="also write the loss curves of the first run as a picture, for a README or a paper")
    given = parser.parse_args(args)
    default = given.runs[0] / "report.html" if len(given.runs) == 1 else Path("report.html")
    # A folder that is not a run must not gain a report.html, so reading comes first (in write_report).
    out = write_report(given.runs, given.out or default)
    print(f"wrote {out} ({format_bytes(out.stat().st_size)}); open it in a browser")
    if given.svg:
        picture = loss_figure(given.runs[0], f"{given.runs[0].name}: loss, nats per token")
        try:
            given.svg.write_text(picture, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{given.svg}: cannot be written ({error.strerror}); give another --svg") from None
        print(f"wrote {given.svg}")
    return 0
