"""Making shards from plans, here or in worker processes.

What lives here: tokenising a plan into one shard's two files, and the processes that do it side by side. What
does not: which documents a plan holds and what is recorded about its shard (`prepare`).

A worker is a plain `python` that reads one JSON line for each plan and answers with one: nothing is inherited
from this process but the import path, so it works the same from a script without a `__main__` guard, from a
notebook and beside JAX's threads. It ends when its input does, also when this process was killed.
"""

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.manifest import Shard, write_atomically
from lmjax.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, tokenizer_from_json
from lmjax.errors import DataError

COMMAND = [sys.executable, "-c", "from lmjax.data.workers import serve; serve()"]
_ENCODE_BYTES = 256 << 10  # text given to the tokenizer at once: bounds memory inside a shard


class Plan(NamedTuple):
    """The documents of one shard, whole and in order."""

    split: str
    index: int
    texts: list[str]


def make_shards(plans: Iterator[Plan], tokenizer: Tokenizer, out: Path, workers: int) -> Iterator[Shard]:
    """Writes the shard of each plan into `out` and gives them in order.

    DataError: one from `plans` (after the shards begun before it), or a worker that died.
    """
    # Fewer are not worth starting processes: the tokenizer's own threads share each shard.
    enough = min(workers + 2, 4)
    first = list(itertools.islice(plans, enough)) if workers > 1 else []
    few, plans = len(first) < enough, itertools.chain(first, plans)
    del first  # or its texts would stay in memory
    if few or type(tokenizer) not in (ByteTokenizer, HFTokenizer):  # only those can be rebuilt there
        for plan in plans:
            yield write_shard(plan, tokenizer, out)
        return
    processes = [_start(tokenizer, out) for _ in range(workers)]
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    for process in processes:
        idle.put(process)
    try:
        with ThreadPoolExecutor(workers) as threads:
            yield from _in_order(plans, threads, idle, workers)
    finally:
        for process in processes:
            process.terminate()
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):  # what a dead worker did not read
                process.stdin.close()


def write_shard(plan: Plan, tokenizer: Tokenizer, out: Path) -> Shard:
    """Tokenises a plan as bos, tokens, eos for each document and writes its two files."""
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    bos, eos = np.array([tokenizer.bos_id]), np.array([tokenizer.eos_id])
    for texts in _by_bytes(plan.texts):
        for ids in tokenizer.encode_batch(texts):
            pieces += [bos, ids, eos]
            lengths.append(len(ids) + 2)
    tokens = np.concatenate(pieces)
    if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
        raise DataError(f"tokenizer {tokenizer.name}: gave id {tokens.max()}, outside its vocabulary of "
                        f"{tokenizer.vocab_size}; correct its tokenizer.json")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    name = shard_name(plan.split, plan.index)
    offsets_name = name.replace(".tokens.", ".offsets.")
    offsets_hash, offsets_size = write_array(out / offsets_name, offsets)
    tokens_hash, tokens_size = write_array(out / name, tokens.astype(token_dtype(tokenizer)))
    return Shard(name, tokens_hash, tokens_size, offsets_name, offsets_hash, offsets_size, len(tokens),
                 len(lengths), sum(len(text.encode()) for text in plan.texts))


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.tokens.npy"


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Two bytes where every id fits, else four; little-endian on every machine."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")


def write_array(path: Path, array: np.ndarray) -> tuple[str, int]:
    """Writes an array as .npy, atomically; returns sha256 hex and bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    data = buffer.getvalue()
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest(), len(data)


def _by_bytes(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- this side ------------------------------------------------------------------------------------------

def _start(tokenizer: Tokenizer, out: Path) -> subprocess.Popen[bytes]:
    # The processes are the parallelism: without this, each would start a thread for every core.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false",
                                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    _send(process, {"definition": tokenizer.to_json(), "name": tokenizer.name,
                    "config": tokenizer.special_names(), "out": str(out.resolve())})
    return process


def _in_order(
    plans: Iterator[Plan], threads: ThreadPoolExecutor, idle: SimpleQueue[subprocess.Popen[bytes]],
    workers: int,
) -> Iterator[Shard]:
    pending: deque[Future[Shard]] = deque()
    failure: DataError | None = None
    while failure is None:
        try:
            plan = next(plans, None)
        except DataError as error:
            failure = error  # what was begun is finished and recorded first
            break
        if plan is None:
            break
        pending.append(threads.submit(_ask, idle, plan))
        if len(pending) > workers + 1:  # bounds the text held in memory
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
    if failure is not None:
        raise failure


def _ask(idle: SimpleQueue[subprocess.Popen[bytes]], plan: Plan) -> Shard:
    process = idle.get()
    try:
        _send(process, plan._asdict())
        answer = process.stdout.readline()
    finally:
        idle.put(process)
    if not answer:
        raise DataError(f"{shard_name(plan.split, plan.index)}: its worker process died with exit status "
                        f"{process.wait()} (out of memory?); run again with fewer workers, finished shards "
                        "are kept")
    value = json.loads(answer)
    if "error" in value:
        raise DataError(value["error"])
    return Shard(**value)


def _send(process: subprocess.Popen[bytes], value: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # the worker is gone; reading its answer says so
        process.stdin.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        process.stdin.flush()


# ---- the worker's side ----------------------------------------------------------------------------------

def serve() -> None:
    """Answers plans on standard input with shards on standard output until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one decides
    lines, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = json.loads(lines.readline())
    tokenizer = tokenizer_from_json(setup["definition"], setup["name"], setup["config"])
    for line in lines:
        try:
            answer = asdict(write_shard(Plan(**json.loads(line)), tokenizer, Path(setup["out"])))
        except DataError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
