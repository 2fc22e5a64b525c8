"""What the server counts, and the Prometheus text format of it.

https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4). The engine's thread writes and others
read single numbers, so nothing is locked. Times are in seconds.
"""

import bisect
import collections
import dataclasses

BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many observations are at most each of BOUNDS."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS, value)] += 1
        self.sum += value


@dataclasses.dataclass
class Metrics:
    """One server's, since its start."""

    rejected: int = 0  # for want of room in the queue
    prompt_tokens: int = 0
    generated_tokens: int = 0
    chunks: int = 0
    busy_slots: int = 0  # summed over chunks: / chunks is how full the batch is
    finished: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # rows by reason
    responses: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by (path, status)
    queue_seconds: Histogram = dataclasses.field(default_factory=Histogram)
    first_token_seconds: Histogram = dataclasses.field(default_factory=Histogram)
    request_seconds: Histogram = dataclasses.field(default_factory=Histogram)

    def render(self, *, slots: int, running: int, waiting: int) -> str:
        lines: list[str] = []

        def say(name: str, kind: str, about: str, values) -> None:
            lines.append(f"# HELP lmjax_{name} {about}")
            lines.append(f"# TYPE lmjax_{name} {kind}")
            lines.extend(f"lmjax_{name}{labels} {value}" for labels, value in values)

        say("slots", "gauge", "Rows that are decoded together at most.", [("", slots)])
        say("running_rows", "gauge", "Rows in a slot.", [("", running)])
        say("waiting_rows", "gauge", "Rows in the queue.", [("", waiting)])
        say("rejected_requests_total", "counter", "Requests that found the queue full.", [("", self.rejected)])
        say("prompt_tokens_total", "counter", "Tokens of prompts prefilled.", [("", self.prompt_tokens)])
        say("generated_tokens_total", "counter", "New tokens.", [("", self.generated_tokens)])
        say("chunks_total", "counter", "Times that the batch was advanced.", [("", self.chunks)])
        say("busy_slots_total", "counter", "Rows in a slot, summed over chunks.", [("", self.busy_slots)])
        say("finished_rows_total", "counter", "Rows by why they ended.",
            [(f'{{reason="{reason}"}}', n) for reason, n in sorted(self.finished.items())])
        say("http_responses_total", "counter", "Responses by path and status.",
            [(f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(self.responses.items())])
        for name, histogram, about in (
                ("queue_seconds", self.queue_seconds, "From a request to its slot."),
                ("first_token_seconds", self.first_token_seconds, "From a request to its first token."),
                ("request_seconds", self.request_seconds, "From a request to its end.")):
            total, values = 0, []
            for bound, count in zip([*map(str, BOUNDS), "+Inf"], histogram.counts, strict=True):
                total += count
                values.append((f'_bucket{{le="{bound}"}}', total))
            say(name, "histogram", about, [*values, ("_sum", histogram.sum), ("_count", total)])
        return "\n".join(lines) + "\n"
