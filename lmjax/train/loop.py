"""The training loop, top to bottom: processes, data, mesh, model, state, restore, step, loop.

The loop is the same for every objective and every mesh. Its state is (step, params, opt_state, guard); batch and
randomness are functions of (config, seed, step), so continuing is `restore` and `range(step, steps)`.
"""

import contextlib
import functools
import os
import time
from pathlib import Path

import jax
import numpy as np

from lmjax import hosts
from lmjax.axes import count_slices, make_mesh
from lmjax.checkpoint import Checkpoints, abstract, save_json, versions
from lmjax.config import RunConfig, fit_vocabulary, from_json, injection, protection, to_json, validate
from lmjax.data import Batches, Corpus, Injection, prepare_all, validation_batches
from lmjax.decode.generate import check, generate
from lmjax.errors import CheckpointError, NonFiniteError, Stopped
from lmjax.evals.perplexity import evaluate, make_eval_step
from lmjax.interop.load import initial_params
from lmjax.lease import open_folder
from lmjax.loader import Loader, local_rows
from lmjax.log import RunLog, read_metrics, summary
from lmjax.models import Decoder
from lmjax.objectives import pretrain
from lmjax.optim import make_optimizer
from lmjax.phases import Phases, goodput
from lmjax.plan import make_batch, make_plan
from lmjax.state import fresh_state, graphdef, make_init, run_once, shardings
from lmjax.step import make_train_step
from lmjax.train.compiling import end_profile, start_compiling
from lmjax.train.meter import Meter
from lmjax.train.repair import GoBack, Lineage, cause, rechecked
from lmjax.train.stopping import StopSignals
from lmjax.train.words import environment, say_preparing, say_resume, say_start, say_used


def train(config: RunConfig, profile: int = 0) -> Path:
    """Runs or continues a run to its last step; returns its folder. profile: steps to trace, 0 for none.

    Raises ConfigError, DataError, HostsError or CheckpointError for what a user can mend, before any step where it can
    be known; NonFiniteError if too many updates in a row had to be skipped; CorruptionError if a device computes
    wrongly. A phase that is stuck ends the process (`lmjax.phases`).
    """
    started = time.perf_counter()
    with Phases(config.limits) as phases, contextlib.ExitStack() as stack:

        # ---- Checks that need neither data nor memory -------------------------------------------------
        if config.compute.deterministic:
            deterministic_gpus()
        with phases("connect"):
            hosts.start(config.limits.connect or 300.0)
            devices = jax.devices()
        validate(config, len(devices), count_slices(devices))
        steps = config.total_steps
        is_main = hosts.is_main()
        folder = config.folder
        stack.enter_context(open_folder(folder, holds=is_main))
        phases.folder = folder
        with phases("connect"):
            hosts.same_everywhere({"config": to_json(config), "versions": versions()})
        stack.enter_context(jax.default_matmul_precision(
            "highest" if config.compute.dtype == "float32" else "default"))  # or TPUs and GPUs round to bfloat16

        # ---- Data -------------------------------------------------------------------------------------
        with phases("prepare"):
            corpus = prepare_all(config.data, progress=say_preparing if is_main else None,
                                 tell=print if is_main else None)
            canaries = injection(config, corpus.tokenizer)
            hosts.same_everywhere(corpus_fingerprints(corpus, canaries))
        tokenizer = corpus.tokenizer
        config = fit_vocabulary(config, config.data.tokenizer, tokenizer.vocab_size)
        if config.evals.every and config.evals.prompts:
            check(config.model, eval_prompts(config, tokenizer),
                  [config.evals.sample] * len(config.evals.prompts), tokenizer.vocab_size, what="evals.prompts: prompt")
        batches = Batches(corpus, "train", config.batch_size, config.seq_len, config.seed, protect=protection(config))
        lineage = Lineage(folder)

        # ---- Mesh, model, optimizer -------------------------------------------------------------------
        mesh = make_mesh(config.mesh)
        stack.enter_context(jax.set_mesh(mesh))
        tx, schedule = make_optimizer(config.optim, steps)
        build = functools.partial(Decoder, config.model, compute=config.compute)
        model_def = graphdef(build)
        plan = make_plan(config, tx, mesh)

        # ---- State: restored, or born on the mesh; the train step is compiled meanwhile ---------------
        meta = {"config": to_json(config), "versions": versions(), "corpus": corpus_fingerprints(corpus, canaries)}
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.checkpoint))
        placed = shardings(plan.state, mesh, config.mesh.zero1)
        like = abstract(plan.state, placed)
        with phases("restore"):
            restored = checkpoints.restore_latest(like, meta, renew=renew)
        first = 0
        if restored is not None:
            state, saved_meta = restored
            first = int(saved_meta["step"])
            if first > steps:
                raise CheckpointError(f"{folder}: is at step {first}, past steps={steps}; raise --steps "
                                      "or give this run another name (--name=…)")
        loss = functools.partial(pretrain.loss, config.objective)
        parts, _ = config.micro_batches(len(devices))
        train_step = make_train_step(loss, model_def, tx, schedule, seed=config.seed, accumulate=parts,
                                     shardings=placed, sigmas=config.guard.sigmas, zero1=config.mesh.zero1)
        if restored is None and config.init_from:
            with phases("init"):
                params = initial_params(config.init_from, config.model, tokenizer, mesh)
        compiling = None
        if first < steps:
            with phases("compile"):
                compiling = start_compiling(train_step, like, make_batch(config, mesh))
        if restored is None:
            with phases("init"):
                if config.init_from:
                    state = run_once(lambda params: fresh_state(params, tx, config.guard), params, out_shardings=placed)
                else:
                    init = make_init(build, tx, config.guard)
                    state = run_once(init, jax.random.key(config.seed), out_shardings=placed)

        # ---- What the user sees first -----------------------------------------------------------------
        log = stack.enter_context(RunLog(folder, config.log, steps, first, is_main))
        checkpoints.warn = log.say
        if is_main:
            phases.account(first)
            save_json(folder / "config.json", to_json(config))
            save_json(folder / "environment.json", environment(devices))
            tokenizer.save(folder / "tokenizer.json")
        say_start(log, config, plan, corpus, batches, canaries, devices)
        for note in corpus.notes:
            log.say(note)
        if restored is not None:
            say_resume(log, config, saved_meta, first)
        if first < steps:
            log.write("start", first, time=time.time(), devices=f"{len(devices)} x {devices[0].device_kind}",
                      parameters=plan.num_params, flops_per_token=plan.flops_per_token)

        # ---- Evaluation -------------------------------------------------------------------------------
        eval_step = make_eval_step(model_def, np.pad(
            tokenizer.token_bytes(), (0, config.model.vocab_size - tokenizer.vocab_size)))

        def evaluate_and_sample(step: int, params) -> None:
            held_out = validation_batches(corpus, config.batch_size, config.seq_len, config.evals.batches,
                                          rows=local_rows(mesh, config.batch_size))
            values = evaluate(eval_step, params, held_out, mesh, config.batch_size)
            log.write("eval", step, split="validation", **values)
            log.say(f"step {step}: validation loss {values['loss']:.4f}  perplexity {values['perplexity']:.4g}  "
                    f"bits/byte {values['bits_per_byte']:.4f}  ({values['tokens']:,} tokens)")
            if not step and not config.init_from and devices[0].platform == "cpu":
                return  # random weights write noise, and a CPU takes a while to compile the programs that write it
            for prompt, text in sample_texts(config, model_def, params, tokenizer, step):
                log.write("sample", step, prompt=prompt, text=text)
                log.say(f"--- sample at step {step} ---\n{prompt}{text}\n---")

        if first == 0 and config.evals.every:
            with phases("evaluate"):
                evaluate_and_sample(0, state.params)

        # ---- The loop ---------------------------------------------------------------------------------
        meter = Meter(config, plan, devices, started, first)
        guard = config.guard

        def look(pending, loader) -> None:
            """Takes in the metrics of a step; ends or turns back a run whose updates are skipped again and again."""
            meter.flush(pending, log, loader)
            if meter.in_row < guard.in_row:
                return
            if len(lineage.jumps) < guard.rewinds:
                raise GoBack
            step = meter.first_bad + guard.in_row - 2  # the index of the step that was looked at last
            with phases("evaluate"), jax.transfer_guard("allow"):
                with Loader(batch_of, mesh, config.batch_size, step, step + 1) as again:
                    one = next(iter(again))[1]
                why = cause(loss, model_def, state.params, one, config.seed, step, placed.params)
            raise NonFiniteError(f"step {meter.first_bad}: from here on {guard.in_row} updates in a row were skipped; "
                                 f"of step {step + 1}, {why}; lower optim.learning_rate, set optim.clip_norm or "
                                 "guard.rewinds (or raise guard.sigmas, if the loss is right), and run the same "
                                 "command again")

        def batch_of(step: int, rows: slice) -> dict[str, np.ndarray]:
            batch = batches.batch(lineage.batch(step), rows)
            if canaries is not None:  # by the step and not by the batch: a jump over batches leaves none out
                batch = canaries.put_in(batch, step, rows)
            if config.objective.goldfish.scheduled:
                batch["step"] = np.full(len(batch["tokens"]), step, np.int32)
            return batch

        while first < steps:
            pending = None  # metrics are fetched one step late, so that the host never makes the device wait
            try:
                with StopSignals() as stop, jax.transfer_guard("disallow"), \
                        Loader(batch_of, mesh, config.batch_size, first, steps) as loader:
                    for step, batch in phases.each("data", loader):
                        if compiling:
                            log.say("compiling the train step …")
                            with phases("compile"):
                                train_step, compiling = compiling(log), None
                        if step == first:
                            meter.restart(first)
                        if profile and step == first + 2:
                            jax.profiler.start_trace(folder / "profile", create_perfetto_trace=True)
                        done = step + 1
                        with phases("step"):
                            if guard.recheck and done % guard.recheck == 0:
                                with jax.transfer_guard("allow"):
                                    state, metrics = rechecked(train_step, state, batch, done, log.say)
                            else:
                                state, metrics = train_step(state, batch)
                            look(pending, loader)
                            pending, phases.step = (done, metrics), done
                        if profile and done in (first + 2 + profile, steps) and done > first + 2:
                            with meter.paused():
                                end_profile(metrics, folder / "profile", log)
                            profile = 0

                        stops = stop.due(done)
                        evaluates = config.evals.every and (done % config.evals.every == 0 or done == steps)
                        saves = done % config.checkpoint.every == 0 or done == steps or stops
                        if evaluates or saves:
                            with phases("step"):
                                look(pending, loader)  # so that the log is never behind a checkpoint
                            pending = None
                            with meter.paused(), jax.transfer_guard("allow"):
                                if evaluates:
                                    with phases("evaluate"):
                                        evaluate_and_sample(done, state.params)
                                if saves:
                                    with phases("save"):
                                        log.sync()
                                        checkpoints.save(done, state, meta, last=bool(stops or done == steps))
                        if stops and done < steps:
                            with phases("save"):
                                checkpoints.wait()
                            raise Stopped(f"{stop.name}: saved step {done} of {steps}; the same command "
                                          "continues", stop.name)
                break
            except GoBack:
                with phases("restore"):
                    state, first = go_back(checkpoints, lineage, config, like, meta, meter, log)
                phases.step = first
            except Exception as error:
                raise hosts.peer_lost(error, f"step {phases.step + 1}: ") or error from None
        with phases("save"):
            checkpoints.wait()

        # ---- The end ----------------------------------------------------------------------------------
        if first == steps and (folder / "summary.json").exists():
            more = "" if canaries else " Raise --steps to train on."  # their counts are of the steps that there were
            log.say(f"{folder} is complete at step {first}; nothing to do.{more}")
        elif is_main:
            phases.write(force=True)
            say_used(log, batches, lineage.ranges(steps))
            commands = [f"lmjax generate {folder} --prompt '…'"]
            log.close(summary(read_metrics(folder), folder, commands, goodput(folder)))
    return folder


# ---- Pieces of the loop --------------------------------------------------------------------------------


def go_back(checkpoints: Checkpoints, lineage: Lineage, config: RunConfig, like, meta: dict, meter: Meter,
            log: RunLog) -> tuple:
    """(state, step) of a checkpoint well before the first skipped update; the batches after it are jumped over."""
    guard = config.guard
    with contextlib.suppress(CheckpointError):  # a save that failed is not what we go back to
        checkpoints.wait()
    restored = checkpoints.restore_latest(like, meta, before=max(meter.first_bad - 1 - guard.rewind_steps, 0),
                                          renew=renew)
    if restored is None:
        raise NonFiniteError(f"step {meter.first_bad}: from here on {guard.in_row} updates in a row were skipped, and "
                             f"no checkpoint is {guard.rewind_steps} steps older to go back to; save more often "
                             "(checkpoint.every, checkpoint.keep), or lower optim.learning_rate")
    state, saved = restored
    first = int(saved["step"])
    for step in checkpoints.steps():
        if step > first:
            checkpoints.set_aside(step, "", name="left")
    lineage.jump(first, guard.rewind_jump, hosts.is_main())
    log.go_back(first)
    log.write("rewind", first, bad=meter.first_bad, batches=guard.rewind_jump)
    log.say(f"step {meter.first_bad}: from here on {guard.in_row} updates in a row were skipped; going back to step "
            f"{first} and jumping over {guard.rewind_jump} batches ({len(lineage.jumps)} of {guard.rewinds} times)")
    meter.in_row = 0
    return state, first


def renew(meta: dict) -> dict:
    """A checkpoint's meta with the config fields that its version did not know, at their defaults."""
    return meta | {"config": to_json(from_json(meta["config"], "checkpoint"))}


def deterministic_gpus() -> None:
    """XLA's switch for GPUs; to be set before the first device is asked for. Other devices ignore it."""
    flag = "--xla_gpu_deterministic_ops=true"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


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


def corpus_fingerprints(corpus: Corpus, canaries: Injection | None) -> dict:
    """What must be equal for a run to be continued on this data."""
    return {"fingerprint": corpus.fingerprint, "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
            "tokenizer_size": corpus.tokenizer.vocab_size} | ({"canaries": canaries.identity} if canaries else {})
