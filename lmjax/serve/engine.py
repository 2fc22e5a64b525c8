"""The scheduler: one thread that owns the device, a bounded queue in front of it, and jobs that report as they go.

What lives here: who gets a slot and when, deadlines, cancellation, stop strings, and what is counted. The device's
side is `batch`; HTTP is `app`. Between two chunks of decoding the thread looks for what has changed: rows that are
done, given up or out of time leave their slots, and waiting ones are prefilled into them, first come first served.

No exception leaves the thread: a row with logits that are not finite fails alone, and where the device itself fails,
the rows that were on it do and the next ones begin with an empty batch.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lmjax.decode.generate import Completion, _completion
from lmjax.decode.processors import SampleConfig
from lmjax.decode.write import breakers
from lmjax.errors import ConfigError, NonFiniteError
from lmjax.interop.load import Opened
from lmjax.nn.cache import CacheConfig
from lmjax.serve.batch import Batch, Row
from lmjax.serve.metrics import Metrics

LOG = logging.getLogger(__name__)
FINISHED = ("stop", "string", "loop", "length")
NOT_FINITE = ("the weights hold NaN or infinities, or activations overflow; use another checkpoint, or compute in "
              "float32")


class QueueFull(Exception):
    """There is no room to wait in. retry_after: seconds after which there probably is."""

    def __init__(self, retry_after: int):
        super().__init__("queue full")
        self.retry_after = retry_after


class Closed(Exception):
    """The engine is shutting down."""


@dataclasses.dataclass
class Update:
    """How a row stands. completion: so far, its finish "" while it goes on; None before the first token. generated:
    tokens so far, the stop token included. error: "" or why the row ended without being finished: "non_finite",
    "timeout", "cancelled", "shutdown" or "failed"."""

    completion: Completion | None
    generated: int
    error: str = ""

    @property
    def final(self) -> bool:
        return bool(self.error) or (self.completion is not None and self.completion.finish in FINISHED)


@dataclasses.dataclass(eq=False)
class Job:
    """One row and who wants to hear of it.

    push is called in the engine's thread, with every update where `stream`, else with the final one alone; it must
    return at once. After a final update nothing follows. deadline: by `time.monotonic`.
    """

    row: Row
    push: Callable[[Update], None]
    stop: tuple[str, ...] = ()
    stream: bool = False
    deadline: float = float("inf")
    cancelled: bool = False
    submitted: float = 0.0
    started: float = 0.0
    slot: int = -1


class Engine:
    """Continues jobs by a model, `slots` of them at a time, in a thread of its own (`start`, `stop`).

    context: most tokens of a row, prompt and new ones; 0 for the model's. stop_ids: beside the tokenizer's eos.
    chunk: steps between two looks at the queue, and so the longest that a slot is kept after its client is gone.
    Raises ConfigError for settings that cannot be, or a tokenizer that is not the model's.
    """

    def __init__(self, opened: Opened, *, slots: int = 8, context: int = 0, max_queue: int = 256, chunk: int = 8,
                 cache: CacheConfig | None = None, stop_ids: Sequence[int] = ()):
        opened.encode("")  # says it now if there is no tokenizer
        tokenizer, limit = opened.tokenizer, opened.config.max_seq_len
        bad = [f"{name} {value}: must be at least 1" for name, value in (
            ("--slots", slots), ("--max-queue", max_queue), ("--chunk", chunk)) if value < 1]
        if not 0 <= context <= limit or context == 1:
            bad.append(f"--context {context}: from 2 to the model's max_seq_len of {limit}, or 0 for that")
        if tokenizer.vocab_size > opened.config.vocab_size:
            bad.append(f"{opened.path}: its tokenizer has {tokenizer.vocab_size} tokens and the model's vocabulary "
                       f"{opened.config.vocab_size}; put the model's own tokenizer.json there")
        bad += (cache or CacheConfig()).problems("--cache")
        if bad:
            raise ConfigError(*bad)
        self.context, self.slots, self.max_queue = context or limit, slots, max_queue
        self.tokenizer, self.metrics = tokenizer, Metrics()
        self._mesh, self._chunk = opened.mesh, chunk
        self._stops = np.unique([tokenizer.eos_id, *stop_ids])
        make = lambda: Batch(  # noqa: E731
            opened.graphdef, opened.params, slots=slots, context=self.context, vocab_size=tokenizer.vocab_size,
            stop_ids=self._stops, cache=cache, breakers=lambda: breakers(tokenizer))
        self._batch = self._on_mesh(make)
        self._wait: collections.deque[Job] = collections.deque()
        self._live: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._closed = self._ending = False  # takes no more; ends what is there
        self._seconds = 1.0  # that a job holds a slot, a moving average
        self._thread = threading.Thread(target=self._run, name="lmjax-engine", daemon=True)

    def warm_up(self) -> None:
        """Compiles what most requests need, before `start`. Raises NonFiniteError for weights that cannot answer."""
        row = Row(np.array([self.tokenizer.bos_id], np.int32), SampleConfig(max_new_tokens=2, temperature=1.0))

        def work():
            self._batch.admit(row)
            self._batch.advance(1)
            self._batch.clear()
        self._on_mesh(work)
        if row.bad:
            raise NonFiniteError(f"logits are not finite after one token: {NOT_FINITE}")

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience: float = 0.0) -> None:
        """Takes no more jobs, gives those that are there `patience` seconds, then ends the rest as "shutdown"."""
        end = time.monotonic() + patience
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self.busy and time.monotonic() < end and self._thread.is_alive():
                self._changed.wait(min(0.1, max(end - time.monotonic(), 0.0)))
            self._ending = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        return len(self._wait)

    @property
    def running(self) -> int:
        return len(self._live)

    @property
    def busy(self) -> bool:
        return bool(self._wait or self._live)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts the rows of one request into the queue, all or none. Raises QueueFull or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._wait) + len(jobs) > self.max_queue:
                self.metrics.rejected += 1
                turns = (len(self._wait) + self.slots) / self.slots
                raise QueueFull(int(min(max(turns * self._seconds, 1), 60)))
            for job in jobs:
                job.submitted = time.monotonic()
            self._wait += jobs
            self._changed.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their slots are free within a chunk. Jobs that are over are left alone."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify_all()

    # ---- the thread --------------------------------------------------------------------------------------

    def _on_mesh(self, work: Callable):
        if self._mesh is None:
            return work()
        with jax.set_mesh(self._mesh):
            return work()

    def _run(self) -> None:
        self._on_mesh(self._loop)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self.busy and not self._closed:
                    self._changed.wait()
                if not self.busy:
                    return
            try:
                self._turn()
            except Exception:  # the device, or a bug of ours; whoever waits must hear of it
                LOG.exception("the batch failed; its rows end and the next ones begin with an empty batch")
                for job in list(self._live.values()):
                    self._end(job, "failed")
                self._live.clear()
                self._batch.clear()

    def _turn(self) -> None:
        """One look at the queue, and one chunk."""
        self._sweep()
        while self._batch.free:
            with self._changed:
                job = self._wait.popleft() if self._wait else None
            if job is None:
                break
            self._admit(job)
        if self._live:
            busy, before = len(self._live), sum(job.row.length for job in self._live.values())
            self._batch.advance(self._chunk)
            self.metrics.chunks += 1
            self.metrics.busy_slots += busy
            self.metrics.generated_tokens += sum(job.row.length for job in self._live.values()) - before
            for job in list(self._live.values()):
                self._report(job)

    def _sweep(self) -> None:
        """Ends the jobs that nobody waits for, or that have had their time."""
        now = time.monotonic()
        with self._changed:
            waiting = list(self._wait)
        for job in [*waiting, *self._live.values()]:
            if job.cancelled or now > job.deadline or self._ending:
                self._end(job, "cancelled" if job.cancelled else "shutdown" if self._ending else "timeout")

    def _admit(self, job: Job) -> None:
        job.started = time.monotonic()
        self.metrics.queue_seconds.observe(job.started - job.submitted)
        self._live[-1] = job  # so that a failure finds it
        slot = self._batch.admit(job.row)
        del self._live[-1]
        self.metrics.prompt_tokens += len(job.row.prompt)
        self.metrics.generated_tokens += len(job.row.tokens)
        self.metrics.first_token_seconds.observe(time.monotonic() - job.submitted)
        job.slot = slot
        if slot >= 0:
            self._live[slot] = job
        self._report(job)

    def _report(self, job: Job) -> None:
        row = job.row
        if row.bad:
            self._end(job, "non_finite")
            return
        if not (row.done or job.stream or job.stop):
            return
        done = self._completion(job)
        update = Update(done, _generated(done, row))
        if update.final:
            self._leave(job, "stop" if done.finish == "string" else done.finish)
        if update.final or job.stream:
            self._push(job, update)

    def _completion(self, job: Job) -> Completion:
        row = job.row
        scores = [np.array(row.token_logprobs, np.float32), np.array(row.top_ids), np.array(row.top_logprobs)]
        return _completion(np.array(row.tokens, np.int32), 0, len(row.tokens), row.done, row.looped, self._stops,
                           job.stop, self.tokenizer.decode, scores if row.logprobs else [])

    def _end(self, job: Job, error: str) -> None:
        self._leave(job, error)
        self._push(job, Update(None, len(job.row.tokens), error))

    def _leave(self, job: Job, reason: str) -> None:
        """Out of the queue or the slot, and into the books."""
        with self._changed:
            if job in self._wait:
                self._wait.remove(job)
            self._changed.notify_all()
        if self._live.pop(job.slot, None) is job and job.slot >= 0:
            self._batch.release(job.slot)
        now = time.monotonic()
        if job.started:
            self._seconds += 0.1 * (now - job.started - self._seconds)
        self.metrics.finished[reason] += 1
        self.metrics.request_seconds.observe(now - job.submitted)

    def _push(self, job: Job, update: Update) -> None:
        try:
            job.push(update)
        except Exception:  # an event loop that is closed, say; the others go on
            LOG.exception("nobody could be told of an update")


def _generated(done: Completion, row: Row) -> int:
    """Tokens that count as generated: those given, and the stop token."""
    return len(done.tokens) + (done.finish == "stop")
