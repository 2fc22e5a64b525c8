"""The errors that a user can cause, each a ValueError with a documented exit code.

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
    """Training produced a NaN or an infinity; the last good checkpoint is intact."""

    exit_code = 5
