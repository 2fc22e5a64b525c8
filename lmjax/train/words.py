"""What a run says about itself: at its start, when it continues, and before it exists (--dry-run)."""

import json
import os
import platform
import sys

import jax

from lmjax import flops
from lmjax.axes import abstract_mesh
from lmjax.checkpoint import flatten, versions
from lmjax.config import RunConfig, fit_vocabulary, ignored, injection, to_json, validate
from lmjax.data import Batches, Corpus, Injection, Progress, load_tokenizer
from lmjax.data.inject import words as canary_words
from lmjax.log import RunLog, format_count
from lmjax.models.decoder import scan_layers
from lmjax.nn.attention import choose_attention
from lmjax.nn.context import choose_context
from lmjax.nn.grouped import choose_experts
from lmjax.optim import make_optimizer
from lmjax.plan import describe, make_plan, parameter_table


def environment(devices) -> dict:
    return versions() | {"devices": f"{len(devices)} x {devices[0].device_kind}", "platform":
                         platform.platform(), "processes": jax.process_count(), "cpus": os.cpu_count()}


def say_preparing(done: Progress) -> None:
    """One line that rewrites itself on a terminal, and nothing in a log until the corpus is whole."""
    share = f"{done.bytes / done.total_bytes:.0%}  " if done.total_bytes else ""
    finished = done.bytes == done.total_bytes
    if sys.stdout.isatty() or finished:
        print(f"\rpreparing data  {share}{done.documents:,} documents, {format_count(done.tokens)} tokens",
              end="\n" if finished else "", flush=True)


def say_start(log: RunLog, config: RunConfig, plan, corpus: Corpus, batches: Batches, canaries: Injection | None,
              devices) -> None:
    """The card at the start of a run: what runs where, and why."""
    platform_name = devices[0].platform
    split = plan.mesh.shape["context"] > 1
    attention, why = (choose_context(config.compute.context, config.seq_len) if split else
                      choose_attention(config.compute.attention, config.seq_len, config.compute.dtype))
    chunks = plan.mesh.shape["pipeline"] * config.compute.pipeline_repeats if plan.mesh.shape["pipeline"] > 1 else 1
    scanned, why_scanned = scan_layers(config.compute.layers, config.model.num_layers // chunks)
    parts, why_parts = config.micro_batches(len(devices))
    moe = config.model.moe and config.model.filled().moe
    products, why_products = choose_experts(config.compute.experts)
    peak = flops.peak(devices[0].device_kind, config.compute.dtype)
    mfu = "MFU against its bfloat16 peak" if peak else "MFU n/a: its peak in this dtype is not known"
    goldfish = config.objective.goldfish
    log.say("\n".join([
        f"lmjax {versions()['lmjax']}  jax {versions()['jax']}  run folder {config.folder}",
        f"devices      {len(devices)} x {devices[0].device_kind} ({platform_name}); {mfu}",
        describe(plan, config),
        f"compute      {config.compute.dtype}, remat {config.compute.remat}, attention {attention} ({why}), "
        f"{'scanned' if scanned else 'unrolled'} layers ({why_scanned})",
        *([f"             {parts} micro-batches ({why_parts})"] if parts > 1 else []),
        *([f"experts      {moe.experts_per_token} of {moe.num_experts} a token, {moe.d_ff} wide, {moe.router} router; "
           f"{products} ({why_products})"] if moe else []),
        f"data         {batches.rows_per_epoch:,} training rows, "
        f"{batches.epoch(config.total_steps):.2f} epochs; tokenizer "
        f"{corpus.tokenizer.name} ({corpus.tokenizer.vocab_size:,} tokens)",
        *([f"canaries     {canaries}"] if canaries else []),
        *([f"weights      initially those of {config.init_from}"] if config.init_from else []),
        f"objective    goldfish {goldfish.strategy}{goldfish_words(config)}",
        "",
        parameter_table(plan),
        *(f"warning: {text}" for text in ignored(config)),
        *(["warning: compute.remat='offload' is as 'full' on a CPU, whose memory is the host's"]
          if config.compute.remat == "offload" and platform_name == "cpu" else []),
        "",
    ]))


def goldfish_words(config: RunConfig) -> str:
    """", one target in 4 dropped, from step 100 on, …"; "" without goldfish."""
    fish = config.objective.goldfish
    if fish.strategy == "none":
        return ""
    words = f", one target in {fish.k} dropped"
    if fish.anneal_steps:
        words += f", one in {fish.k_final} after {fish.anneal_steps:,} steps"
    if fish.start:
        words += f", nothing in the first {fish.start:,} steps"
    spared = [str(i) for i, source in enumerate(config.data.sources) if not source.goldfish]
    return words + (f"; not in data.sources {', '.join(spared)}" if spared else "")


def say_used(log: RunLog, batches: Batches, ranges: list[tuple[int, int]]) -> None:
    """What was read of each source: the batches of these ranges, which leave out what a run has jumped over."""
    parts = [(batches.used(start), batches.used(stop)) for start, stop in ranges]
    for i, last in enumerate(parts[-1][1]):
        rows, tokens, epochs = (sum(getattr(after[i], name) - getattr(before[i], name) for before, after in parts)
                                for name in ("rows", "tokens", "epochs"))
        log.say(f"read {rows:,} rows ({tokens:,} tokens, {epochs:.2f} epochs) of {last.folder}")


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
    tokenizer = None if name == "bpe" else load_tokenizer(name)
    size = tokenizer.vocab_size if tokenizer else config.data.bpe_vocab_size
    canaries = []
    if config.data.canaries:
        canaries = [f"canaries     {injection(config, tokenizer)}" if tokenizer else
                    f"canaries     {canary_words(config.data.canaries, config.total_steps)}; their tokens are counted "
                    "once the tokenizer is trained"]
    config = fit_vocabulary(config, name, size)
    tx, _ = make_optimizer(config.optim, config.total_steps)
    plan = make_plan(config, tx, abstract_mesh(config.mesh, num_devices))
    return "\n".join([json.dumps(to_json(config), indent=2), "", describe(plan, config), *canaries, "",
                      parameter_table(plan)])
