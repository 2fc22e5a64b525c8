"""When a run is asked to stop: signals, and the agreement of several processes on one step."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Turns the first SIGTERM or Ctrl-C into a wish to stop at the next step; a second one ends at once.

    For the loop only: before it there is nothing to save, and preparing a corpus should end when told to. With several
    processes a signal to any of them counts: JAX's coordinator then names a step that all will reach, and it also
    passes on the notices of clouds that are about to take a machine back.

    name: of the signal that came, or "".
    """

    def __init__(self):
        self.name = ""
        self._before = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame) -> None:
        if self._alone:
            self.name = signal.Signals(number).name
            self.__exit__()
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # the one that JAX's coordinator listens to

    def due(self, step: int) -> bool:
        """Whether to stop after this step. Every process must ask, after every step."""
        if not self._alone and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
        return bool(self.name)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
