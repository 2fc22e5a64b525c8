"""The quickstart from nothing, and what the README says of it. Minutes long: `python -m pytest -m slow`."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from lmjax.records import read_metrics


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    """Validation bits per byte end at least 35 % below those of the same model at step 0."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-m", "lmjax", "train", str(ROOT / "configs" / "quickstart.py")],
                          cwd=tmp_path, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "quickstart"
    evals = [r for r in read_metrics(run) if r["kind"] == "eval"]
    assert evals[0]["step"] == 0 and evals[-1]["bits_per_byte"] < 0.65 * evals[0]["bits_per_byte"]
    assert (run / "tokenizer.json").exists() and (run / "summary.json").exists()
    for args in (["report", str(run)], ["generate", str(run), "--prompt", "def ", "--max-new-tokens", "16"],
                 ["eval", str(run), "--batches", "4"]):
        done = subprocess.run([sys.executable, "-m", "lmjax", *args], cwd=tmp_path, env=env, capture_output=True,
                              text=True, timeout=600)
        assert done.returncode == 0 and done.stdout, done.stderr
