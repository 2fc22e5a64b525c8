"""The errors that a user can cause or meet, each a ValueError with a documented exit code.

What lives here: one class per kind of mistake. What does not: anything about our own bugs (those are
`assert`s) or about how an error is printed (`lmjax.cli` prints one line and exits with `exit_code`).

A message names the field or file, its value, and the fix, in one line.
"""


class UserError(ValueError):
    """A mistake in what the user gave us. Subclasses say where; `problems` holds everything found, not only the
    first."""

    exit_code = 2

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("\n".join(problems))


class ConfigError(UserError):
    """A config that cannot run."""


class DataError(UserError):
    """A corpus, shard, tokenizer or batch that cannot be used."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or run folder that is missing, damaged, read-only or of another run."""

    exit_code = 4


class Stopped(UserError):
    """A signal asked the run to stop, and it did, at a step that is saved."""

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.exit_code = {"SIGINT": 130, "SIGTERM": 143}[name]


class NonFiniteError(UserError):
    """Training went on producing NaNs, infinities or spikes; the last good checkpoint is intact."""

    exit_code = 5


STUCK = 6  # exit code of a phase that ran past its limit (`lmjax.phases`); it ends the process, so it is no exception


class CorruptionError(UserError):
    """The same step gave other bits when it was run again: a device computes wrongly."""

    exit_code = 7


class PeerLostError(UserError):
    """Another process of the run is gone. Starting all of them again continues."""

    exit_code = 9


class HostsError(UserError):
    """Processes that do not find each other, or that were started with different configs or versions."""

    exit_code = 8
