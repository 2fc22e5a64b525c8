"""Killed and started again by the same command, a run ends with the bits of one that was never interrupted."""

import contextlib
import json
import random
import signal
import time

import pytest
from helpers import command, state_hash, write_config

from lmjax import checkpoint as checkpoint_module
from lmjax.config import load_config
from lmjax.records import read_metrics
from lmjax.train import train

KILLS = 5


def history(run):
    """(step, loss, grad norm) of each train record and (step, loss) of each evaluation, as exact text."""
    keys = ("kind", "step", "loss", "grad_norm", "text")
    return [json.dumps({k: r.get(k) for k in keys}) for r in read_metrics(run)
            if r["kind"] in ("train", "eval", "sample")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    config = write_config(tmp_path_factory.mktemp("whole"))
    process = command(config, "--mesh.fsdp=2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    run = config.parent / "runs" / "tiny"
    return state_hash(run, 40), history(run), config


def test_five_kills_change_no_bit(uninterrupted, tmp_path):
    """kill -9 at random moments after the first step: while it computes, evaluates, samples and saves."""
    config = write_config(tmp_path)
    run = tmp_path / "runs" / "tiny"
    rng = random.Random(0)
    done = 0
    for _ in range(KILLS):
        process = command(config, "--mesh.fsdp=2")
        goal = done + rng.randint(2, 7)  # steps that this attempt may take, so that each one gets somewhere
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            try:
                done = max(r["step"] for r in read_metrics(run) if r["kind"] == "train")
            except (ValueError, OSError):
                done = 0
            if done >= goal:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, f"ended by itself before the kill:\n{output}"
    process = command(config, "--mesh.fsdp=2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "continuing from step" in output
    assert state_hash(run, 40) == uninterrupted[0]
    assert history(run) == uninterrupted[1]


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    _, before, config = uninterrupted
    process = command(config, "--mesh.fsdp=2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "complete at step 40" in output, output
    run = config.parent / "runs" / "tiny"
    assert state_hash(run, 40) == uninterrupted[0] and history(run) == before


def test_a_resume_that_loses_the_moments_would_be_seen(tmp_path, monkeypatch):
    """The known-wrong resume: right weights, zero optimizer state."""
    path = write_config(tmp_path)

    def run(name, stop=40):
        overrides = [f"--name={name}", "--mesh.fsdp=2", "--mesh.data=4"]
        config = load_config(path, overrides)
        if stop < 40:  # stop as a kill would: the config, and with it the schedule, still says 40
            original = checkpoint_module.Checkpoints.save

            def save_and_stop(self, step, state, meta, **kwargs):
                original(self, step, state, meta, **kwargs)
                if step == stop:
                    raise KeyboardInterrupt
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint_module.Checkpoints, "save", save_and_stop)
                with pytest.raises(KeyboardInterrupt):
                    train(config)
        else:
            train(config)
        return config.folder

    whole, right = state_hash(run("whole"), 40), None
    run("right", stop=20)
    right = state_hash(run("right"), 40)
    assert right == whole
    run("wrong", stop=20)
    original = checkpoint_module.Checkpoints.restore

    def forgetful(self, step, like, **kwargs):
        import jax
        import jax.numpy as jnp

        state = original(self, step, like, **kwargs)
        state.opt_state = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim else x, state.opt_state)
        return state

    monkeypatch.setattr(checkpoint_module.Checkpoints, "restore", forgetful)
    assert state_hash(run("wrong"), 40) != whole


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_first(uninterrupted, tmp_path, number, code):
    """SIGTERM and Ctrl-C save at the next step, whatever the checkpoint interval, and say so."""
    config = write_config(tmp_path)
    run = tmp_path / "runs" / "tiny"
    process = command(config, "--mesh.fsdp=2", "--checkpoint.every=40")
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ValueError, OSError):
            if any(r["kind"] == "train" and r["step"] >= 3 for r in read_metrics(run)):
                break
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code and "the same command continues" in output, output
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()] != []
    process = command(config, "--mesh.fsdp=2", "--checkpoint.every=40")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "continuing from step" in output, output
    assert state_hash(run, 40) == uninterrupted[0] and history(run) == uninterrupted[1]


def test_the_optimizer_may_change_between_attempts(tmp_path, capsys):
    """What a diverging run is told to do must work: clip, lower the rate, give the same command again."""
    path = write_config(tmp_path)
    first = ["--mesh.data=8", "--steps=8", "--optim.clip_norm=0"]
    train(load_config(path, first))
    train(load_config(path, ["--mesh.data=8", "--steps=12", "--optim.clip_norm=0.5", "--optim.learning_rate=1e-3"]))
    said = capsys.readouterr().out
    assert "continuing from step 8" in said and "optim.clip_norm was 0.0 and is 0.5" in said
