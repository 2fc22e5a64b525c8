"""Metrics of the steps: fetched one step late, checked, and logged with speed, memory and waits."""

import contextlib
import resource
import sys
import time

import jax

from lmjax import flops
from lmjax.config import RunConfig
from lmjax.errors import DataError
from lmjax.loader import Loader
from lmjax.log import RunLog


class Meter:
    """Turns fetched metrics into step records, adds speed, memory and waits, and counts skipped updates.

    in_row: updates skipped one after another up to the last step that was looked at. first_bad: the step of the first
    of them.
    """

    def __init__(self, config: RunConfig, plan, devices, started: float, first: int):
        self.config, self.started = config, started
        self.tokens_per_step = config.batch_size * config.seq_len
        peak = flops.peak(devices[0].device_kind, config.compute.dtype)
        self.peak = peak and peak * len(devices) / plan.flops_per_token  # tokens/s at 100 % MFU
        self.device, self.last = jax.local_devices()[0], first
        self.in_row = self.first_bad = 0
        self.restart(first)

    def restart(self, first: int) -> None:
        self.clock, self.idle, self.waited, self.last = time.perf_counter(), 0.0, 0.0, first

    @contextlib.contextmanager
    def paused(self):
        """Time in here is not training time."""
        began = time.perf_counter()
        yield
        self.idle += time.perf_counter() - began

    def flush(self, pending, log: RunLog, loader: Loader) -> None:
        """Waits for the metrics of one step, checks them, and logs them where the step is due or was skipped."""
        if pending is None:
            return
        step, metrics = pending
        values = metrics.fetch()
        in_row = int(values.pop("skipped_in_row"))
        if in_row:
            self.first_bad = step if in_row == 1 else self.first_bad
            log.say(f"step {step}: the update is skipped: loss {values.get('loss', float('nan')):.4g}, gradient norm "
                    f"{values['grad_norm']:.4g} ({in_row} in a row, {int(values['skipped'])} in all)")
        self.in_row = in_row
        if values["weight"] == 0:
            raise DataError(f"step {step}: every target of the batch has weight 0, so there is nothing to learn "
                            "from; look at the data with `lmjax data inspect`, or raise batch_size or "
                            "objective.goldfish.k under another --name")
        if not in_row and step % self.config.log.every and step not in (1, self.config.total_steps):
            return
        now = time.perf_counter()
        seconds = max(now - self.clock - self.idle, 1e-9)
        rate = (step - self.last) * self.tokens_per_step / seconds
        values["targets"] = values.pop("weight")
        values["skipped"] = int(values["skipped"])
        log.train(step, values | {
            "tokens": step * self.tokens_per_step, "tokens_per_second": rate,
            "mfu": self.peak and rate / self.peak, "memory_bytes": memory_bytes(self.device),
            "data_wait": min((loader.waited - self.waited) / seconds, 1.0), "seconds": now - self.started})
        self.clock, self.idle, self.waited, self.last = now, 0.0, loader.waited, step


def memory_bytes(device: jax.Device) -> int:
    """Peak bytes on the device, or of this process where the device is the CPU."""
    stats = device.memory_stats() or {}
    scale = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
