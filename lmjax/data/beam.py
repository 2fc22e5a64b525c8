"""Apache Beam as the engine of `spread`: `lmjax data prepare --beam RUNNER`, an optional extra.

What lives here: a pipeline that calls `spread.work` for each number, Beam's options, and its errors in one line. What
does not: anything about corpora (`spread`, `survey`). Beam is imported when an engine is made, never before. It
sends workers two strings and a number; their code is lmjax, installed there.
"""

import io
import logging
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from typing import Any

from lmjax.data.spread import work
from lmjax.errors import ConfigError, DataError

# The plain DirectRunner would rather start Prism, a program that it fetches from the network.
RUNNERS = {"direct": "apache_beam.runners.portability.fn_api_runner.FnApiRunner", "dataflow": "DataflowRunner",
           "flink": "FlinkRunner", "spark": "SparkRunner", "portable": "PortableRunner"}
# The others learn some of their options from a job server, so only these can be checked here.
_ALL_KNOWN = ("direct", "dataflow")


class BeamEngine:
    """A `spread.Engine` on a Beam runner; `options` are pipeline options as "key=value", or "key" for a switch.

    ConfigError: no apache-beam; an unknown runner or option, or one that Beam refuses.
    """

    def __init__(self, runner: str, options: Sequence[str] = ()) -> None:
        if runner not in RUNNERS:
            raise ConfigError(f"--beam {runner}: must be one of {', '.join(RUNNERS)}")
        self._name, self._result = runner, None
        level = logging.root.manager.disable
        try:
            logging.disable(logging.WARNING)  # it tells which of its own extras are not there
            import apache_beam  # noqa: F401
        except ImportError:
            raise ConfigError(f"--beam {runner}: needs the package apache-beam; run: pip install "
                              "'lmjax[beam]'") from None
        finally:
            logging.disable(level)
        _check_options(runner, options)
        self._flags = [f"--{option}" for option in options]
        if runner == "direct":
            logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what it has to say comes as an exception too
        self._pipeline()  # Beam looks at the options as a whole

    def _pipeline(self) -> Any:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        try:
            return beam.Pipeline(runner=RUNNERS[self._name], options=PipelineOptions(self._flags))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--beam {self._name}: {_last_line(error)}; see --beam-option") from None

    def run(self, task: str, folder: str, numbers: Sequence[int]) -> None:
        """DataError: the job failed or was cancelled. What a task itself finds wrong is no failure of the job."""
        import apache_beam as beam

        pipeline = self._pipeline()
        # Create alone may be fused with what follows, and would then run on one worker.
        _ = (pipeline | "numbers" >> beam.Create(list(numbers)) | "spread" >> beam.Reshuffle()
             | task >> beam.Map(_call, task, folder))
        try:
            self._result = pipeline.run()
            state = self._result.wait_until_finish()
        except Exception as error:  # whatever a runner has; a page of its frames helps nobody
            raise DataError(f"the Beam runner {self._name} failed ({task}): {_last_line(error)}; give the same command "
                            "again, finished shards are kept") from None
        if str(state) != "DONE":
            raise DataError(f"the Beam job ended as {state} ({task}); give the same command again, finished shards are "
                            "kept")

    def cancel(self) -> None:
        with suppress(Exception):  # runners on this machine cannot; their workers stop by themselves
            self._result.cancel()


def _call(number: int, task: str, folder: str) -> None:
    work(task, folder, number)


def _check_options(runner: str, options: Sequence[str]) -> None:
    from apache_beam.options.pipeline_options import PipelineOptions

    bad = [f"--beam-option {option}: must be KEY=VALUE, such as direct_num_workers=4, without dashes"
           for option in options if not re.fullmatch(r"[A-Za-z]\w*(=.*)?", option, re.DOTALL)]
    bad += [f"--beam-option {option}: --beam names the runner" for option in options
            if option.partition("=")[0] == "runner"]
    if not bad:
        said = io.StringIO()  # argparse ends a program, after a page of usage
        try:
            with redirect_stderr(said):
                known = set(PipelineOptions([]).get_all_options())
                given = PipelineOptions([f"--{option}" for option in options]).get_all_options(
                    drop_default=True, retain_unknown_options=True)
        except (SystemExit, ValueError) as error:
            why = said.getvalue().strip().rpartition("error: ")[2] or _last_line(error)
            raise ConfigError(f"--beam-option {' '.join(options)}: {why}") from None
        if runner in _ALL_KNOWN:
            bad = [f"--beam-option {name}: Beam has no such option" for name in given if name not in known]
        if runner == "direct" and "direct_num_workers" in given and "direct_running_mode" not in given:
            bad.append(f"--beam-option direct_num_workers={given['direct_num_workers']}: has no effect in one process; "
                       "add --beam-option direct_running_mode=multi_processing")
    if bad:
        raise ConfigError(*bad)


def _last_line(error: BaseException) -> str:
    """What an error says in the end: Beam's carry the frames of the worker before it, and the step's name after it."""
    lines = re.sub(r"\[while running [^\]]*\]", "", str(error)).split("\n")
    kept = [line.strip() for line in lines if line.strip()]
    return f"{type(error).__name__}: {(kept or ['no message'])[-1]}"[:500]
