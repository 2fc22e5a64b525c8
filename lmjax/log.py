"""What a run says while it runs: the step line, the live bar, log.txt, metrics.jsonl and other writers.

What lives here: the settings, the step line, and `RunLog`, the one object that the training loop talks to.
What does not: computing metrics (`lmjax.train`), the records themselves and the summary (`lmjax.records`; its
public names are given here too), or charts (`lmjax.report`). Nothing here imports jax.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.errors import CheckpointError
from lmjax.records import (
    Lines,
    Record,
    format_bytes,
    format_count,
    format_duration,
    format_summary,
    plain,
    printable,
    read_metrics,
    replace_file,
    revive,
    rewind,
    summary,
)

__all__ = [
    "LogConfig",
    "RunLog",
    "eta_seconds",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_step",
    "format_summary",
    "printable",
    "read_metrics",
    "summary",
]


@dataclass
class LogConfig:
    """How often a run speaks, and where its numbers go besides metrics.jsonl."""

    every: int = 10  # steps between step lines
    tensorboard: bool = False  # event files in RUN/tensorboard
    wandb: bool = False  # Weights & Biases; its own WANDB_* variables apply
    wandb_project: str = "lmjax"

    def problems(self, prefix: str = "log") -> list[str]:
        """Every problem of these settings, one line each; `prefix` is the dotted name of this section."""
        at = f"{prefix.rstrip('.')}." if prefix else ""
        found = []
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            found.append(f"{at}every = {self.every!r}: must be a whole number of steps, at least 1")
        if self.tensorboard and not _installed("tensorboardX"):
            found.append(f"{at}tensorboard = true: needs tensorboardX; pip install 'lmjax[tensorboard]'")
        if self.wandb and not _installed("wandb"):
            found.append(f"{at}wandb = true: needs wandb; pip install 'lmjax[wandb]'")
        if self.wandb and not str(self.wandb_project).strip():
            found.append(f"{at}wandb_project = {self.wandb_project!r}: must name a project, such as 'lmjax'")
        return found


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ---- the step line -------------------------------------------------------------------------------


def _significant(x: float | None, width: int) -> str:
    """A number in at most `width` characters where that can be done without lying about its size."""
    if x is None:
        return "n/a"
    if not math.isfinite(x):
        return str(float(x))
    digits = max(0, width - 1 - len(str(int(abs(x)))))
    text = f"{x:.{digits}f}"
    # A tiny loss or gradient norm must not be shown as 0.00.
    return f"{x:.0e}" if len(text) > width or (x != 0 and float(text) == 0) else text


def _percent(x: float | None) -> str:
    return "n/a" if x is None or not math.isfinite(x) else f"{100 * x:.0f}%"


def eta_seconds(values: Mapping[str, Any], step: int, total: int) -> float | None:
    """Seconds left: `eta_seconds` when given, else (total - step) * tokens per step / tokens_per_second."""
    if values.get("eta_seconds") is not None:
        return values["eta_seconds"]
    tokens, rate = values.get("tokens"), values.get("tokens_per_second")
    if not (tokens and rate and step > 0) or not math.isfinite(rate):
        return None
    return max(0, total - step) * (tokens / step) / rate


def _step_columns(values: Mapping[str, Any], step: int, total: int) -> list[tuple[str, str]]:
    """The columns of a step line, each with its rich style and its trailing space."""
    get = values.get
    loss = get("loss")
    bad = loss is not None and not math.isfinite(loss)
    line = [
        (f"step {step:>{len(str(total))}}/{total}  ", "dim"),
        (f"loss {_significant(loss, 5):>5}  ", "bold red" if bad else "bold"),
    ]
    # Without dropped tokens, kept and dropped would only repeat the loss.
    if get("loss_dropped") is not None and (get("kept_fraction") is None or get("kept_fraction") < 1):
        kept, dropped = _significant(get("loss_kept"), 4), _significant(get("loss_dropped"), 4)
        line.append((f"(kept {kept:>4} dropped {dropped:>4})  ", "magenta"))
    lr = get("lr")
    rate = "n/a" if lr is None else "0" if lr == 0 else f"{lr:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    memory = format_bytes(get("memory_bytes")).replace(" ", "")
    waiting = (get("data_wait") or 0) > 0.1
    return line + [
        (f"gnorm {_significant(get('grad_norm'), 4):>4} ", "cyan"),
        (f"lr {rate:>6}  ", "cyan"),
        (f"{format_count(get('tokens_per_second')):>5} tok/s ", "green"),
        (f"mfu {_percent(get('mfu')):>3} ", "green"),
        (f"mem {memory:>6} ", "dim"),
        (f"wait {_percent(get('data_wait')):>3}  ", "yellow" if waiting else "dim"),
        (f"eta {format_duration(eta_seconds(values, step, total))}", "dim"),
    ]


def format_step(values: Mapping[str, Any], step: int, total: int) -> str:
    """One step as one line of fixed columns: about 100 characters, and 26 more with kept and dropped losses.

    Reads loss, loss_kept, loss_dropped, kept_fraction (losses in nats per token), grad_norm, lr, tokens,
    tokens_per_second, mfu and data_wait (fractions), memory_bytes. What is missing or None reads `n/a`.
    """
    return "".join(text for text, _ in _step_columns(values, step, total)).rstrip()


# ---- other writers -------------------------------------------------------------------------------


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, cfg: LogConfig, resume_step: int):
        module = importlib.import_module("tensorboardX")
        # purge_step hides what an earlier attempt logged beyond the step we resume from.
        purge = resume_step + 1 if resume_step else None
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, group: str, step: int, record: Record) -> None:
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.writer.add_scalar(f"{group}/{key}", value, step)
            elif isinstance(value, str) and group == "sample" and key == "text":
                self.writer.add_text("sample", f"{record.get('prompt', '')}{value}", step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    name = "Weights & Biases"

    def __init__(self, folder: Path, cfg: LogConfig, resume_step: int):
        wandb = importlib.import_module("wandb")
        # The id stays in the run folder, so that a resumed run continues the same page.
        note = folder / "wandb_id.txt"
        run_id = note.read_text().strip() if note.exists() else None
        where = {"project": cfg.wandb_project, "name": folder.name, "dir": str(folder)}
        self.run = wandb.init(**where, id=run_id, resume="allow")
        note.write_text(self.run.id)
        # Our own step axis: W&B's internal one never goes back, and a resumed run does.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, group: str, step: int, record: Record) -> None:
        values = {f"{group}/{k}": v for k, v in record.items() if isinstance(v, (int, float, str))}
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


# ---- the run's voice -----------------------------------------------------------------------------


class RunLog:
    """Everything a run says. Use it in a `with` block, so that the terminal is given back after an exception.

    Only the main process speaks: with is_main=False every method does nothing and no file is touched.
    Raises CheckpointError when the folder cannot be written or its metrics.jsonl is damaged. Once it is open, a disk
    that fills up is told and waited for.
    """

    def __init__(
        self, folder: Path | str, cfg: LogConfig, total_steps: int, resume_step: int = 0, is_main: bool = True
    ):
        self.folder, self.every, self.total, self.is_main = Path(folder), cfg.every, total_steps, is_main
        self.step = resume_step
        self._printed: int | None = None  # the last step line, in units of `every`
        self._live = self._metrics = self._text = None
        self._mute = False
        self._writers: list[Any] = []
        if not is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rewind(self.folder / "metrics.jsonl", resume_step)
            self._metrics = Lines(self.folder / "metrics.jsonl")
            self._text = Lines(self.folder / "log.txt")
        except OSError as e:
            fix = "check the path, its permissions and the free space"
            raise CheckpointError(f"{folder}: cannot write the run's log ({e.strerror}); {fix}") from None
        for wanted, kind in ((cfg.tensorboard, _TensorBoard), (cfg.wandb, _Wandb)):
            if wanted:
                self._outside(
                    kind.name, lambda k=kind: self._writers.append(k(self.folder, cfg, resume_step))
                )
        if sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            self._live = _Bar(total_steps, resume_step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record to metrics.jsonl (flushed) and to the other writers. Prints nothing."""
        if self._metrics is None:
            return
        record = {"kind": kind, "step": int(step), **plain(values)}
        self._append(self._metrics, json.dumps(record, allow_nan=False))
        if kind in ("train", "eval", "sample"):
            group = str(record.get("split", "eval")) if kind == "eval" else kind
            numbers = revive(plain(values)) if kind != "sample" else plain(values)
            for writer in list(self._writers):
                if not self._outside(writer.name, lambda w=writer: w.write(group, int(step), numbers)):
                    self._writers.remove(writer)

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a train step; print its line at the first, the last and each `every` steps in between."""
        if self._metrics is None:
            return
        self.write("train", step, **values)
        self.step = int(step)
        numbers = revive(plain(values))
        if self._live:
            self._live.move(self.step, numbers)
        if self._printed != self.step // self.every or self.step >= self.total:
            self._printed = self.step // self.every
            columns = _step_columns(numbers, self.step, self.total)
            self._print(format_step(numbers, self.step, self.total), columns)

    def say(self, text: str) -> None:
        """Print `text` above the live bar, without control characters, and append it to log.txt."""
        if self._metrics is not None:
            self._print(printable(text))

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Stop the bar, close the files. Given a summary: write summary.json, an end record and print it."""
        if self._metrics is None:
            return
        if self._live:
            self._live.stop()
            self._live = None
        if summary is not None:
            record = plain(summary)
            text = json.dumps(record, indent=2, allow_nan=False) + "\n"
            replace_file(self.folder / "summary.json", text.encode())
            self.write("end", self.step, **{k: v for k, v in record.items() if k not in ("kind", "step")})
            self._print(format_summary(revive(record)))
        for writer in self._writers:
            self._outside(writer.name, writer.close)
        self._metrics.close()
        self._text.close()
        self._metrics = None

    def _print(self, text: str, columns: Sequence[tuple[str, str]] | None = None) -> None:
        self._append(self._text, text)
        self._show(text, columns)

    def _append(self, lines: Lines, text: str) -> None:
        """A disk that is full, or gone, ends no run: lines wait in memory until they can be written."""
        before, now = lines.problem, lines.append(text)
        if now != before:
            self._show(f"{lines.path}: cannot be written ({now}); its lines wait in memory" if now else
                       f"{lines.path}: written again")

    def sync(self) -> None:
        """What was recorded so far is on the disk when this returns, unless the disk is full."""
        if self._metrics is not None:
            self._metrics.sync()

    def go_back(self, step: int) -> None:
        """Drops what was recorded after `step`: a run that goes back does those steps again."""
        self.step, self._printed = step, None
        if self._metrics is not None:
            self._metrics.close()
            rewind(self.folder / "metrics.jsonl", step)
            self._metrics = Lines(self.folder / "metrics.jsonl")

    def _show(self, text: str, columns: Sequence[tuple[str, str]] | None = None) -> None:
        if self._live:
            self._live.print(text, columns)
        elif not self._mute:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            try:
                print(text.encode(encoding, "replace").decode(encoding), flush=True)
            except OSError:
                # The reader of our pipe went away (`| head`): log.txt goes on, and so does the run.
                self._mute = True

    def _outside(self, name: str, action: Any) -> bool:
        """Run a third party's code. Its failure is told once, turns that writer off, and never ends a run."""
        try:
            action()
        except Exception as e:  # noqa: BLE001
            warnings.warn(f"{name} failed and is off for the rest of this run: {e!r}", stacklevel=3)
            return False
        return True


class _Bar:
    """The live bar of a terminal, with rich. rich itself honours NO_COLOR."""

    def __init__(self, total: int, step: int):
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("{task.percentage:>3.0f}%"),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed}/{task.total}  {task.fields[rate]}  eta {task.fields[eta]}"),
            transient=True,
            expand=True,
        )
        self.task = self.progress.add_task("train", total=total, completed=step, rate="", eta="n/a")
        self.progress.start()

    def move(self, step: int, values: Mapping[str, Any]) -> None:
        eta = format_duration(eta_seconds(values, step, int(self.progress.tasks[0].total)))
        rate = f"{format_count(values.get('tokens_per_second'))} tok/s"
        self.progress.update(self.task, completed=step, rate=rate, eta=eta)

    def print(self, text: str, columns: Sequence[tuple[str, str]] | None) -> None:
        from rich.text import Text

        # The bar already tells the time left, so the line leaves its last column out.
        line = Text.assemble(*columns[:-1]) if columns else Text(text)
        self.progress.console.print(line, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self.progress.stop()
