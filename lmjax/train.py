"""The training loop, top to bottom: mesh, data, model, state, restore, step, loop.

The loop is the same for every objective and every mesh. Its state is (step, params, opt_state); batch and
randomness are functions of (config, seed, step), so continuing is `restore` and `range(step, steps)`.
"""

import contextlib
import functools
import json
import math
import os
import platform
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

try:
    import fcntl
except ImportError:  # not a POSIX system: run folders are not locked there
    fcntl = None

from lmjax import flops
from lmjax.axes import abstract_mesh, make_mesh
from lmjax.checkpoint import Checkpoints, abstract, flatten, save_json, versions
from lmjax.config import RunConfig, fit_vocabulary, ignored, to_json, validate
from lmjax.data import Batches, Corpus, Progress, load_tokenizer, prepare_all, validation_batches
from lmjax.decode.generate import check, generate
from lmjax.errors import CheckpointError, DataError, NonFiniteError, Stopped
from lmjax.evals.perplexity import evaluate, make_eval_step
from lmjax.interop.load import initial_params
from lmjax.loader import Loader, local_rows
from lmjax.log import RunLog, format_bytes, format_count, format_duration, read_metrics, summary
from lmjax.models import Decoder
from lmjax.models.decoder import scan_layers
from lmjax.nn.attention import choose_attention
from lmjax.objectives import pretrain
from lmjax.optim import make_optimizer
from lmjax.plan import describe, make_plan, parameter_table
from lmjax.process import release_freed_memory
from lmjax.state import fresh_state, graphdef, make_init, shardings
from lmjax.step import make_train_step


def train(config: RunConfig, profile: int = 0) -> Path:
    """Runs or continues a run to its last step; returns its folder. profile: steps to trace, 0 for none.

    Raises ConfigError, DataError or CheckpointError for what a user can mend, before any step where it can
    be known, and NonFiniteError if the loss or a gradient stops being a number.
    """
    started = time.perf_counter()

    # ---- Checks that need neither data nor memory -----------------------------------------------------
    devices = jax.devices()
    validate(config, len(devices))
    is_main = jax.process_index() == 0
    folder = config.folder

    with contextlib.ExitStack() as stack:
        stack.enter_context(open_folder(folder))
        stack.enter_context(jax.default_matmul_precision(
            "highest" if config.compute.dtype == "float32" else "default"))  # or TPUs and GPUs round to bfloat16

        # ---- Data -------------------------------------------------------------------------------------
        corpus = prepare_all(config.data, progress=say_preparing if is_main else None)
        tokenizer = corpus.tokenizer
        config = fit_vocabulary(config, config.data.tokenizer, tokenizer.vocab_size)
        if config.evals.every and config.evals.prompts:
            check(config.model, eval_prompts(config, tokenizer),
                  [config.evals.sample] * len(config.evals.prompts), tokenizer.vocab_size, what="evals.prompts: prompt")
        batches = Batches(corpus, "train", config.batch_size, config.seq_len, config.seed)

        # ---- Mesh, model, optimizer -------------------------------------------------------------------
        mesh = make_mesh(config.mesh)
        stack.enter_context(jax.set_mesh(mesh))
        tx, schedule = make_optimizer(config.optim, config.steps)
        build = functools.partial(Decoder, config.model, compute=config.compute)
        model_def = graphdef(build)
        plan = make_plan(config, tx, mesh)

        # ---- State: restored, or born on the mesh -----------------------------------------------------
        meta = {"config": to_json(config), "versions": versions(), "corpus": corpus_fingerprints(corpus)}
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.checkpoint))
        placed = shardings(plan.state, mesh)
        restored = checkpoints.restore_latest(abstract(plan.state, placed), meta)
        if restored is None:
            if config.init_from:
                params = initial_params(config.init_from, config.model, tokenizer, mesh)
                state = jax.jit(functools.partial(fresh_state, tx=tx), out_shardings=placed)(params)
            else:
                state = jax.jit(make_init(build, tx), out_shardings=placed)(jax.random.key(config.seed))
            first = 0
        else:
            state, saved_meta = restored
            first = int(saved_meta["step"])
            if first > config.steps:
                raise CheckpointError(f"{folder}: is at step {first}, past steps={config.steps}; raise --steps "
                                      "or give this run another name (--name=…)")

        # ---- What the user sees first -----------------------------------------------------------------
        log = stack.enter_context(RunLog(folder, config.log, config.steps, first, is_main))
        checkpoints.warn = log.say
        if is_main:
            save_json(folder / "config.json", to_json(config))
            save_json(folder / "environment.json", environment(devices))
            tokenizer.save(folder / "tokenizer.json")
        say_start(log, config, plan, corpus, batches, devices)
        if restored is not None:
            say_resume(log, config, saved_meta, first)
        if first < config.steps:
            log.write("start", first, time=time.time(), devices=f"{len(devices)} x {devices[0].device_kind}",
                      parameters=plan.num_params, flops_per_token=plan.flops_per_token)

        # ---- The two compiled programs ----------------------------------------------------------------
        loss = functools.partial(pretrain.loss, config.objective)
        train_step = make_train_step(loss, model_def, tx, schedule, seed=config.seed,
                                     accumulate=config.accumulate, shardings=placed)
        eval_step = make_eval_step(model_def, np.pad(
            tokenizer.token_bytes(), (0, config.model.vocab_size - tokenizer.vocab_size)))

        def evaluate_and_sample(step: int, params) -> None:
            held_out = validation_batches(corpus, config.batch_size, config.seq_len, config.evals.batches,
                                          rows=local_rows(mesh, config.batch_size))
            values = evaluate(eval_step, params, held_out, mesh, config.batch_size)
            log.write("eval", step, split="validation", **values)
            log.say(f"step {step}: validation loss {values['loss']:.4f}  perplexity {values['perplexity']:.4g}  "
                    f"bits/byte {values['bits_per_byte']:.4f}  ({values['tokens']:,} tokens)")
            for prompt, text in sample_texts(config, model_def, params, tokenizer, step):
                log.write("sample", step, prompt=prompt, text=text)
                log.say(f"--- sample at step {step} ---\n{prompt}{text}\n---")

        if first == 0 and config.evals.every:
            evaluate_and_sample(0, state.params)

        # ---- The loop ---------------------------------------------------------------------------------
        meter = Meter(config, plan, devices, started, first)
        pending = None  # metrics are fetched one step late, so that the host never makes the device wait
        with StopSignals() as stop, jax.transfer_guard("disallow"), \
                Loader(batches.batch, mesh, config.batch_size, first, config.steps) as loader:
            for step, batch in loader:
                if step == first:
                    log.say("compiling the train step …")
                    train_step = compile_step(train_step, state, batch, log)
                    meter.restart()
                if profile and step == first + 2:
                    jax.profiler.start_trace(folder / "profile", create_perfetto_trace=True)
                state, metrics = train_step(state, batch)
                done = step + 1
                meter.flush(pending, log, loader)
                pending = (done, metrics)
                if profile and done in (first + 2 + profile, config.steps) and done > first + 2:
                    with meter.paused():
                        end_profile(metrics, folder / "profile", log)
                    profile = 0

                evaluates = config.evals.every and (done % config.evals.every == 0 or done == config.steps)
                saves = done % config.checkpoint.every == 0 or done == config.steps or stop.name
                if evaluates or saves:
                    meter.flush(pending, log, loader)  # so that nothing that is not finite is ever saved
                    pending = None
                    with meter.paused(), jax.transfer_guard("allow"):
                        if evaluates:
                            evaluate_and_sample(done, state.params)
                        if saves:
                            checkpoints.save(done, state, meta)
                if stop.name and done < config.steps:
                    checkpoints.wait()
                    raise Stopped(f"{stop.name}: saved step {done} of {config.steps}; the same command continues",
                                  stop.name)
        checkpoints.wait()

        # ---- The end ----------------------------------------------------------------------------------
        if first == config.steps and (folder / "summary.json").exists():
            log.say(f"{folder} is complete at step {first}; nothing to do. Raise --steps to train on.")
        elif is_main:
            commands = [f"lmjax generate {folder} --prompt '…'"]
            log.close(summary(read_metrics(folder), folder, commands))
    return folder


# ---- Pieces of the loop --------------------------------------------------------------------------------


class Meter:
    """Turns fetched metrics into step records: checks that they are finite, adds speed, memory and waits."""

    def __init__(self, config: RunConfig, plan, devices, started: float, first: int):
        self.config, self.started = config, started
        self.tokens_per_step = config.batch_size * config.seq_len
        peak = flops.peak(devices[0].device_kind, config.compute.dtype)
        self.peak = peak and peak * len(devices) / plan.flops_per_token  # tokens/s at 100 % MFU
        self.device, self.last = devices[0], first
        self.restart()

    def restart(self) -> None:
        self.clock, self.idle, self.waited = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def paused(self):
        """Time in here is not training time."""
        began = time.perf_counter()
        yield
        self.idle += time.perf_counter() - began

    def flush(self, pending, log: RunLog, loader: Loader) -> None:
        """Waits for the metrics of one step, checks them, and logs them where the step is due."""
        if pending is None:
            return
        step, metrics = pending
        values = {name: float(s) / float(w) for name, (s, w) in jax.device_get(metrics).items() if w > 0}
        for name in ("loss", "grad_norm", "param_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise NonFiniteError(f"step {step}: {name} is {values[name]}; nothing of it was saved; lower "
                                     "optim.learning_rate or set optim.clip_norm, and run the same command again")
        if values["weight"] == 0:
            raise DataError(f"step {step}: every target of the batch has weight 0, so there is nothing to learn "
                            "from; look at the data with `lmjax data inspect`, or raise batch_size or "
                            "objective.goldfish.k under another --name")
        if step % self.config.log.every and step not in (1, self.config.steps):
            return
        now = time.perf_counter()
        seconds = max(now - self.clock - self.idle, 1e-9)
        rate = (step - self.last) * self.tokens_per_step / seconds
        values["targets"] = values.pop("weight")
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


# Options of XLA that are known to help, by platform: overlap of communication with computation, for more than one GPU.
XLA_OPTIONS = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}


def compile_step(train_step, state, batch, log: RunLog, options: dict | None = None):
    """The step compiled ahead of its first call, so that compile time is told and paid once. An option that this
    XLA does not know is told and left out."""
    began = time.perf_counter()
    devices = jax.tree.leaves(state)[0].sharding.mesh.devices.flatten()
    if options is None:
        options = dict(XLA_OPTIONS.get(devices[0].platform, {})) if len(devices) > 1 else {}
    with jax.transfer_guard("allow"):
        lowered = train_step.lower(state, batch)
        try:
            compiled = lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            if not options or "No such compile option" not in str(error):
                raise
            log.say(f"this XLA lacks one of {', '.join(options)}; compiling without")
            compiled = lowered.compile()
    release_freed_memory()
    analysis = compiled.memory_analysis()
    temp = f", {format_bytes(analysis.temp_size_in_bytes)} of temporaries a device" if analysis else ""
    log.say(f"compiled in {format_duration(time.perf_counter() - began)}{temp}")
    return compiled


def end_profile(metrics, folder: Path, log: RunLog) -> None:
    """Waits for the step that is running, then writes the trace."""
    jax.block_until_ready(metrics)
    jax.profiler.stop_trace()
    log.say(f"profile written to {folder}: open it with `xprof {folder}` (pip install xprof), or its "
            "perfetto_trace.json.gz at https://ui.perfetto.dev")


def sample_texts(config: RunConfig, model_def, params, tokenizer, step: int) -> list[tuple[str, str]]:
    """(prompt, continuation) for each of evals.prompts; a function of (seed, step)."""
    if not config.evals.prompts:
        return []
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    outs = generate(model_def, params, eval_prompts(config, tokenizer), config.evals.sample, key=key,
                    vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    return [(p, tokenizer.decode(out)) for p, out in zip(config.evals.prompts, outs, strict=True)]


def eval_prompts(config: RunConfig, tokenizer) -> list[np.ndarray]:
    """Token ids of evals.prompts, each with the document's beginning."""
    return [np.concatenate([[tokenizer.bos_id], tokenizer.encode(p)]) for p in config.evals.prompts]


def corpus_fingerprints(corpus: Corpus) -> dict:
    """What must be equal for a run to be continued on this data."""
    return {"fingerprint": corpus.fingerprint, "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
            "tokenizer_size": corpus.tokenizer.vocab_size}


def environment(devices) -> dict:
    return versions() | {"devices": f"{len(devices)} x {devices[0].device_kind}", "platform":
                         platform.platform(), "processes": jax.process_count(), "cpus": os.cpu_count()}


# ---- The run folder ------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_folder(folder: Path):
    """Makes the run folder and holds its lock, which the operating system lets go however the process ends.

    Refuses a folder that is not a run's, cannot be written, or is held by another process.
    """
    try:
        if folder.exists() and (not folder.is_dir() or (
                any(folder.iterdir()) and not (folder / "run.lock").exists())):
            raise CheckpointError(f"{folder}: exists and is not a run of lmjax; give this run another name "
                                  "(--name=…) or move it away")
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "run.lock", "a")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); check its permissions and the "
                              "free space, or set --run_root=…") from None
    with lock:
        if fcntl is not None and jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(f"{folder}: another process is training in it; wait for it, or give this "
                                      "run another name (--name=…)") from None
        yield


class StopSignals:
    """Turns the first SIGTERM or Ctrl-C into a wish to stop at the next step; a second one ends at once.

    For the loop only: before it there is nothing to save, and preparing a corpus should end when told to.

    name: of the signal that came, or "".
    """

    def __init__(self):
        self.name = ""
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame) -> None:
        self.name = signal.Signals(number).name
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# ---- Words ---------------------------------------------------------------------------------------------


def say_preparing(done: Progress) -> None:
    """One line that rewrites itself on a terminal, and nothing in a log until the corpus is whole."""
    share = f"{done.bytes / done.total_bytes:.0%}  " if done.total_bytes else ""
    finished = done.bytes == done.total_bytes
    if sys.stdout.isatty() or finished:
        print(f"\rpreparing data  {share}{done.documents:,} documents, {format_count(done.tokens)} tokens",
              end="\n" if finished else "", flush=True)


def say_start(log: RunLog, config: RunConfig, plan, corpus: Corpus, batches: Batches, devices) -> None:
    """The card at the start of a run: what runs where, and why."""
    platform_name = devices[0].platform
    attention, why = choose_attention(config.compute.attention, config.seq_len)
    scanned, why_scanned = scan_layers(config.compute.layers, config.model.num_layers)
    peak = flops.peak(devices[0].device_kind, config.compute.dtype)
    mfu = "MFU against its bfloat16 peak" if peak else "MFU n/a: its peak in this dtype is not known"
    goldfish = config.objective.goldfish
    log.say("\n".join([
        f"lmjax {versions()['lmjax']}  jax {versions()['jax']}  run folder {config.folder}",
        f"devices      {len(devices)} x {devices[0].device_kind} ({platform_name}); {mfu}",
        describe(plan, config),
        f"compute      {config.compute.dtype}, remat {config.compute.remat}, attention {attention} ({why}), "
        f"{'scanned' if scanned else 'unrolled'} layers ({why_scanned})",
        f"data         {batches.rows_per_epoch:,} training rows, "
        f"{batches.epoch(config.steps):.2f} epochs; tokenizer "
        f"{corpus.tokenizer.name} ({corpus.tokenizer.vocab_size:,} tokens)",
        *([f"weights      initially those of {config.init_from}"] if config.init_from else []),
        f"objective    goldfish {goldfish.strategy}"
        + (f", one target in {goldfish.k} dropped" if goldfish.strategy != "none" else ""),
        "",
        parameter_table(plan),
        *(f"warning: {text}" for text in ignored(config)),
        "",
    ]))


CHANGES = {  # what it means to change these between a save and a resume
    "steps": "the schedule now ends there",
    "optim": "from here on, so the run is no longer what its config alone gives",
    "mesh": "the run goes on within rounding, not bit for bit",
    "compute": "the run goes on within rounding, not bit for bit",
}


def say_resume(log: RunLog, config: RunConfig, saved_meta: dict, first: int) -> None:
    """Says where a run continues, and which free settings differ from when it was saved."""
    log.say(f"continuing from step {first}")
    saved, now = saved_meta["config"], to_json(config)
    before, after = flatten(saved), flatten(now)
    for name in sorted(before.keys() | after.keys()):
        section = name.partition(".")[0]
        if section in CHANGES and before.get(name) != after.get(name):
            log.say(f"{name} was {before.get(name)} and is {after.get(name)}: {CHANGES[section]}")
    old = saved_meta["versions"]
    changed = [f"{k} {old.get(k)} -> {v}" for k, v in versions().items() if old.get(k) != v]
    if changed:
        log.say(f"versions differ ({', '.join(changed)}): the run goes on within rounding, not bit for bit")


def dry_run(config: RunConfig, num_devices: int = 0) -> str:
    """The resolved config, mesh, shardings, bytes and FLOPs, with nothing allocated and no data prepared.

    num_devices: plan for so many; 0 for those of this machine.
    """
    num_devices = num_devices or jax.device_count()
    validate(config, num_devices)
    name = config.data.tokenizer
    size = config.data.bpe_vocab_size if name == "bpe" else load_tokenizer(name).vocab_size
    config = fit_vocabulary(config, name, size)
    plan = make_plan(config, make_optimizer(config.optim, config.steps)[0], abstract_mesh(config.mesh, num_devices))
    return "\n".join([json.dumps(to_json(config), indent=2), "", describe(plan, config), "",
                      parameter_table(plan)])


