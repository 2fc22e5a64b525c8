"""Faults inside a run: numbers that are not finite, spikes, devices that compute wrongly, phases that hang, other
machines, processes that do not fit together."""

import json
import os
import socket
import time

import numpy as np

from lmjax.chaos.kills import TWO
from lmjax.chaos.lab import EVERY, STEPS, Lab, Outcome, expect, kill
from lmjax.checkpoint import manifest
from lmjax.records import read_metrics


def _skipped(lab: Lab, name: str) -> int:
    return max(int(r["skipped"]) for r in read_metrics(lab.runs / name) if r["kind"] == "train")


def _again(lab: Lab, name: str, fault: str, *overrides: str) -> None:
    """The same faulty run killed in the middle and continued: the same bits."""
    other = lab.name()
    attempt = lab.start(other, *overrides, fault=fault)
    lab.reach(attempt, lab.rng.randint(EVERY, STEPS - EVERY))
    kill(attempt)
    attempt.wait()
    lab.finish(other, *overrides, fault=fault)
    expect(lab.end_of(other) == lab.end_of(name), "killed and continued, the faulty run ends with other bits")


def nan_gradient(lab: Lab) -> Outcome:
    """One batch gives NaN: its update is skipped, and nothing that is not finite is ever saved."""
    name, step = lab.name(), lab.rng.randint(20, STEPS - 20)
    attempt = lab.finish(name, fault=f"nan@{step}")
    expect(f"step {step + 1}: the update is skipped" in attempt.output(), "the step was not told")
    expect(_skipped(lab, name) == 1, f"{_skipped(lab, name)} updates were skipped, not 1")
    last = [r for r in read_metrics(lab.runs / name) if r["kind"] == "train"][-1]
    expect(bool(np.isfinite(last["loss"])) and last["loss"] < 4, f"it ends with a loss of {last['loss']}")
    _again(lab, name, f"nan@{step}")
    return Outcome()


def nan_for_good(lab: Lab) -> Outcome:
    """From one batch on everything is NaN: the run ends with a report, and what it saved is good."""
    name, step = lab.name(), lab.rng.randint(2 * EVERY, STEPS // 2)
    attempt = lab.start(name, "--guard.in_row=8", fault=f"nan@{step},100000")
    codes = attempt.wait()
    text = attempt.output()
    expect(codes == [5], f"exit code {codes}, 5 expected:\n{text[-1500:]}")
    expect(f"step {step + 1}: from here on 8 updates in a row were skipped" in text, "the first bad step was not named")
    expect("gradients that are not finite" in text and "Traceback" not in text, f"no cause was named:\n{text[-800:]}")
    reached = lab.step(name)
    return lab.recover(name, time.monotonic(), reached, bound=2 * EVERY + 8) if _kept(lab, name, step) else Outcome()


def _kept(lab: Lab, name: str, step: int) -> bool:
    """The checkpoints verify. True where the newest is from before the fault, so that mended data give the same end."""
    folder = lab.runs / name / "checkpoints"
    steps = manifest.numbered(folder)
    expect(bool(steps) and not any(manifest.verify(folder).values()), "a checkpoint does not verify")
    return steps[0] <= step


def spike(lab: Lab) -> Outcome:
    """Gradients 10,000 times too large for three batches: outliers, skipped on the device."""
    name, step = lab.name(), lab.rng.randint(100, STEPS - 30)
    options = ("--guard.sigmas=6", "--guard.window=64")
    attempt = lab.finish(name, *options, fault=f"spike@{step},{step + 2}")
    expect(_skipped(lab, name) >= 3, f"{_skipped(lab, name)} updates were skipped")
    expect(f"step {step + 1}: the update is skipped" in attempt.output(), "the step was not told")
    _again(lab, name, f"spike@{step},{step + 2}", *options)
    return Outcome()


def spike_that_stays(lab: Lab) -> Outcome:
    """A long stretch of bad batches: the run goes back to an older checkpoint and jumps over them; killed on the way
    and continued, it takes the same way."""
    name, step = lab.name(), lab.rng.randint(100, 120)
    options = ("--guard.in_row=6", "--guard.rewinds=2", "--guard.rewind_steps=20", "--guard.rewind_jump=60",
               "--checkpoint.keep=10")
    attempt = lab.finish(name, *options, fault=f"nan@{step},{step + 25}")
    text = attempt.output()
    expect("and jumping over 60 batches (1 of 2 times)" in text, f"it did not go back:\n{text[-1500:]}")
    jumps = json.loads((lab.runs / name / "lineage.json").read_text())["jumps"]
    expect(len(jumps) == 1 and jumps[0][0] <= step - 20, f"it went back to {jumps}")
    expect(_skipped(lab, name) == 0, "skips are still counted after the stretch was jumped over")
    _again(lab, name, f"nan@{step},{step + 25}", *options)
    return Outcome()


def wrong_copy(lab: Lab) -> Outcome:
    """A bit flips in one device's copy of a weight: found at the next check, and the device is named."""
    name = lab.name()
    attempt = lab.start(name, "--guard.recheck=10", "--mesh.data=2", fault="flipped-weight@50")
    codes = attempt.wait()
    text = attempt.output()
    expect(codes == [7], f"exit code {codes}, 7 expected:\n{text[-1200:]}")
    expect("copies of an array differ between devices: params/final_norm/scale_D on" in text, "the array was not named")
    at = time.monotonic()
    lab.finish(name, "--guard.recheck=10", "--mesh.data=2")
    lab.same(name, "--mesh.data=2")
    return Outcome(0, time.monotonic() - at)


def wrong_once(lab: Lab) -> Outcome:
    """A step comes out wrong once: run again it does not, and the right result is kept."""
    name, step = lab.name(), 10 * lab.rng.randint(3, 15)
    attempt = lab.finish(name, "--guard.recheck=10", fault=f"wrong-once@{step}")
    expect("a transient fault of a device" in attempt.output(), "nothing was said")
    lab.same(name)
    return Outcome()


def wrong_always(lab: Lab) -> Outcome:
    """A step comes out differently each time: the run ends before anything of it is saved."""
    name, step = lab.name(), 10 * lab.rng.randint(3, 15)
    attempt = lab.start(name, "--guard.recheck=10", fault=f"wrong-once@{step},3")
    codes = attempt.wait()
    expect(codes == [7] and "three results" in attempt.output(), f"exit code {codes}:\n{attempt.output()[-1200:]}")
    return lab.recover(name, time.monotonic(), lab.step(name))


# ---- phases that hang ----------------------------------------------------------------------------------


def _stuck(lab: Lab, fault: str, option: str, phase: str, code: int = 6, limit: float = 3) -> Outcome:
    name = lab.name()
    attempt = lab.start(name, option, fault=fault)
    step = int(fault.partition("@")[2]) - 2
    lab.reach(attempt, step)
    began = time.monotonic()
    codes = attempt.wait(60)
    took = time.monotonic() - began
    text = attempt.output()
    expect(codes == [code], f"exit code {codes}, {code} expected:\n{text[-1500:]}")
    expect("most recent call first" in text, "no stacks were printed")
    if code == 6:
        expect(f"the phase '{phase}' takes longer than limits.{phase}={limit:g}" in text, "the phase was not named")
    expect(took < limit + 5 + 3, f"it took {took:.1f} s to end, with a limit of {limit:g}")  # 3 s: a loaded machine
    return lab.recover(name, time.monotonic(), lab.step(name))


def hang(lab: Lab) -> Outcome:
    return _stuck(lab, f"hang@{lab.rng.randint(20, 80)}", "--limits.step=3", "step")


def freeze(lab: Lab) -> Outcome:
    return _stuck(lab, f"freeze@{lab.rng.randint(20, 80)}", "--limits.step=3", "step", code=1)


def stuck_data(lab: Lab) -> Outcome:
    return _stuck(lab, f"stuck-data@{lab.rng.randint(20, 80)}", "--limits.data=3", "data")


def hang_of_one(lab: Lab) -> Outcome:
    """One process of two hangs in Python: both end, in time."""
    name = lab.name()
    attempt = lab.start(name, "--limits.step=3", **TWO, fault=f"hang@{lab.rng.randint(20, 60)}", faulty=1)
    codes = attempt.wait(60)
    expect(all(code != 0 for code in codes) and 6 in codes, f"exit codes {codes}")
    return lab.recover(name, time.monotonic(), lab.step(name), **TWO)


def lost_data(lab: Lab) -> Outcome:
    """A read fails: the run ends with the code for data, and never with 0."""
    name = lab.name()
    attempt = lab.start(name, fault=f"lost-data@{lab.rng.randint(20, 80)}")
    codes = attempt.wait()
    expect(codes == [3] and "could not be read" in attempt.output(), f"exit code {codes}:\n{attempt.output()[-800:]}")
    return lab.recover(name, time.monotonic(), lab.step(name))


def broken_loader(lab: Lab) -> Outcome:
    """An exception in the loader's thread of one process ends both, and not with 0."""
    name = lab.name()
    attempt = lab.start(name, **TWO, fault=f"broken-loader@{lab.rng.randint(20, 60)}", faulty=1)
    codes = attempt.wait(60)
    expect(all(code != 0 for code in codes), f"exit codes {codes}")
    expect("the loader has a bug" in attempt.output(), "the bug was not told")
    return lab.recover(name, time.monotonic(), lab.step(name), **TWO)


# ---- other machines, and processes that do not fit -----------------------------------------------------


def other_devices(lab: Lab) -> Outcome:
    """Continued on other meshes, 2 -> 4 -> 1 devices -> 2 processes: the same batches, losses equal within rounding."""
    name = lab.name()
    _, history = lab.reference()
    ways = [({"devices": 2}, ()), ({"devices": 4}, ("--mesh.fsdp=4",)), ({"devices": 1}, ("--mesh.fsdp=1",))]
    for goal, (options, overrides) in zip((40, 100, 190), ways, strict=True):
        attempt = lab.start(name, *overrides, **options)
        lab.reach(attempt, goal)
        kill(attempt)
        attempt.wait()
    at = time.monotonic()
    lab.finish(name, f"--steps={STEPS}", **TWO)
    record = lab.end_of(name)[1]
    right, found = (np.array([json.loads(line)[1] for line in lines]) for lines in (history, record))
    worst = float(np.max(np.abs(right - found)))
    expect(len(found) == len(right) and worst < 2e-3, f"losses differ by up to {worst:.2g}")
    return Outcome(0, time.monotonic() - at)


def other_config(lab: Lab) -> Outcome:
    """Two processes with different learning rates: both refuse, and say which field differs."""
    name = lab.name()
    attempt = lab.start(name, **TWO, each=lambda i: [f"--optim.learning_rate={1e-3 * (i + 1)}"])
    codes = attempt.wait(60)
    expect(codes == [8, 8], f"exit codes {codes}:\n{attempt.output()[-1200:]}")
    expect(attempt.output().count("optim.learning_rate: 0.001 on process 0, 0.002 on process 1") == 2,
           "the field was not named on both")
    lab.finish(name, **TWO)
    lab.same(name, **TWO)
    return Outcome()


def missing_process(lab: Lab) -> Outcome:
    """One of two processes is never started: the other gives up in time."""
    name = lab.name()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    attempt = lab.start(name, "--limits.connect=5", environment={
        "LMJAX_COORDINATOR": f"127.0.0.1:{port}", "LMJAX_PROCESSES": "2", "LMJAX_PROCESS": "0"})
    codes = attempt.wait(60)
    expect(codes[0] not in (0, None), f"exit codes {codes}")
    took = time.monotonic() - attempt.began
    expect(took < 45, f"it took {took:.0f} s")
    lab.finish(name, **TWO)
    lab.same(name, **TWO)
    return Outcome()


def port_taken(lab: Lab) -> Outcome:
    """Another program listens on the coordinator's port."""
    name = lab.name()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        attempt = lab.start(name, "--limits.connect=5", environment={
            "LMJAX_COORDINATOR": f"127.0.0.1:{port}", "LMJAX_PROCESSES": "2", "LMJAX_PROCESS": "0"})
        codes = attempt.wait(60)
    text = attempt.output()
    expect(codes == [8] and "the port cannot be used" in text, f"exit codes {codes}:\n{text[-800:]}")
    lab.finish(name)
    lab.same(name)
    return Outcome()


def shard_damaged(lab: Lab) -> Outcome:
    """A bit of the prepared data flips between two starts: told, and made anew from the text, which is there."""
    name, reached, shard, before = _with_another_token(lab)
    outcome = lab.recover(name, time.monotonic(), reached)
    expect("its bytes have changed" in (lab.folder / f"{name}-0.log").read_text(), "nothing was said")
    expect(shard.read_bytes() == before, "the shard was not made anew")
    return outcome


def given_shard_damaged(lab: Lab) -> Outcome:
    """The same where the run was given shards, and there is no text to make them from: refused."""
    lab.reference()
    shards = next((lab.folder / "data").rglob("train-*.tokens.npy")).parent
    options = ("--data.sources[0].kind=shards", f"--data.sources[0].path={shards}")
    name, reached, shard, before = _with_another_token(lab, *options)
    try:
        attempt = lab.start(name, *options)
        codes, text = attempt.wait(), attempt.output()
        expect(codes == [3] and "its bytes have changed" in text and "bring the file back" in text,
               f"exit code {codes}:\n{text[-800:]}")
    finally:
        shard.write_bytes(before)
    lab.finish(name, *options)
    lab.same(name)
    return Outcome()


def _with_another_token(lab: Lab, *options: str) -> tuple:
    """(name, steps done, shard, its right bytes) of a run that was killed before one bit of its data flipped."""
    name = lab.name()
    attempt = lab.start(name, *options)
    lab.reach(attempt, 2 * EVERY)
    kill(attempt)
    attempt.wait()
    shard = next((lab.folder / "data").rglob("train-*.tokens.npy"))
    before = shard.read_bytes()
    data = bytearray(before)
    data[200 + 2 * lab.rng.randrange((len(data) - 200) // 2)] ^= 1  # another token, and a valid one
    shard.write_bytes(data)
    return name, lab.step(name), shard, before


def secrets(lab: Lab) -> Outcome:
    """Secrets of the environment are in no file and no line of a run, also not of one that ends with stacks."""
    name, canary = lab.name(), f"canary-{os.urandom(8).hex()}"
    attempt = lab.start(name, "--limits.step=3", fault="hang@30", environment={
        "HF_TOKEN": canary, "WANDB_API_KEY": canary, "AWS_SECRET_ACCESS_KEY": canary})
    attempt.wait(60)
    found = [str(p) for p in (*(lab.runs / name).rglob("*"), *attempt.logs)
             if p.is_file() and canary.encode() in p.read_bytes()]
    expect(not found, f"the canary is in {found}")
    return lab.recover(name, time.monotonic(), lab.step(name))
