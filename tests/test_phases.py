"""The account of a run's time, and the watchdog: real processes that hang, in Python and in C."""

import json
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from lmjax.phases import LimitsConfig, Phases, attempts, goodput


def test_every_second_belongs_to_one_phase(tmp_path):
    began = time.monotonic()
    with Phases() as phases:
        phases.folder = tmp_path
        inside = sum(phases.seconds.values())
        phases.account(3)
        for _ in phases.each("data", range(3)):
            time.sleep(0.01)
            with phases("step"):
                time.sleep(0.02)
                with phases("evaluate"):
                    time.sleep(0.03)
        phases.step = 6
        wall = time.monotonic() - began
    line = attempts(tmp_path)[-1]
    assert line["first"] == 3 and line["step"] == 6
    assert abs(sum(line["seconds"].values()) - (line["now"] - line["began"])) < 0.05
    seconds = line["seconds"]
    assert seconds["evaluate"] >= 0.09 and 0.06 <= seconds["step"] <= wall - seconds["evaluate"]
    assert inside == 0


def test_lost_work_and_down_time_over_attempts(tmp_path):
    lines = [{"began": 100.0, "now": 140.0, "first": 0, "step": 20, "seconds": {"start": 10.0, "step": 30.0}},
             {"began": 150.0, "now": 190.0, "first": 12, "step": 30, "seconds": {"start": 4.0, "step": 36.0}}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "time.jsonl").write_text('{"torn": \n' + text + '{"began": 1')
    assert goodput(tmp_path) == {"start": 14.0, "step": 18.0 + 36.0, "lost": 12.0, "down": 10.0}
    assert sum(goodput(tmp_path).values()) == 190 - 100
    assert goodput(tmp_path / "nothing") == {}


HANG = {
    "python": "import time; time.sleep(60)",
    "lock held": "import ctypes; ctypes.PyDLL(None).sleep(60)",  # no other Python thread runs meanwhile
}


@pytest.mark.parametrize("kind,code", [("python", 6), ("lock held", 1)])
def test_a_stuck_phase_is_named_with_stacks_and_ended(tmp_path, kind, code):
    program = (f"from pathlib import Path\nfrom lmjax.phases import LimitsConfig, Phases\n"
               f"def the_culprit():\n    {HANG[kind]}\n"
               f"with Phases(LimitsConfig(data=1)) as phases:\n    phases.folder = Path({str(tmp_path)!r})\n"
               f"    with phases('data'): the_culprit()\n")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert done.returncode == code, done.stderr
    assert "the_culprit" in done.stderr
    assert time.monotonic() - began < 30  # of which Python's start is a part; limit + 5 s, on a loaded machine
    if kind == "python":
        assert "the phase 'data' takes longer than limits.data=1" in done.stderr
        assert "the_culprit" in next(tmp_path.glob("stuck-*.txt")).read_text()


def test_without_a_limit_nothing_is_ended():
    with Phases(LimitsConfig(data=0)) as phases:
        with phases("data"):
            time.sleep(0.7)


def test_problems():
    assert not LimitsConfig().problems()
    assert len(LimitsConfig(step=-1, data=0.5, save=float("nan")).problems()) == 3
