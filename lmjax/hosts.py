"""Several processes as one run: how they find each other, and how they agree.

Every process gives the same command. On TPU VMs, Slurm, Open MPI and Kubernetes jobs JAX finds out by itself who is
there; elsewhere three environment variables say it:

    LMJAX_COORDINATOR=HOST:PORT  LMJAX_PROCESSES=4  LMJAX_PROCESS=0 … 3

What lives here: starting `jax.distributed`, and small collectives on text and truth values. What does not: anything
about meshes (`lmjax.axes`) or data (`lmjax.loader`). With one process, nothing here communicates.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lmjax.errors import CheckpointError, HostsError, UserError

VARIABLES = ("LMJAX_COORDINATOR", "LMJAX_PROCESSES", "LMJAX_PROCESS")
HEARTBEAT_SECONDS = 20  # a peer that is silent for so long is dead; JAX's own default is 100
# Environments in which JAX's cluster detection works (jax/_src/clusters), by what they set.
CLUSTERS = {"SLURM_NTASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI", "MEGASCALE_COORDINATOR_ADDRESS": "multislice",
            "JOBSET_NAME": "JobSet", "TPU_WORKER_HOSTNAMES": "Cloud TPU"}


def explicit(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator, processes, process) as our variables say; None where none is set. Raises HostsError."""
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not given:
        return None
    if missing := [name for name in VARIABLES if name not in given]:
        raise HostsError(f"{', '.join(given)} without {', '.join(missing)}: set all three, or none")
    address, count, index = (given[name] for name in VARIABLES)
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise HostsError(f"LMJAX_COORDINATOR={address}: give HOST:PORT of process 0, such as 10.0.0.1:8476")
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise HostsError(f"LMJAX_PROCESSES={count}, LMJAX_PROCESS={index}: whole numbers, the second from 0 to one "
                         "below the first")
    return address, int(count), int(index)


def detected(environment: Mapping[str, str]) -> str:
    """The kind of cluster that started more than one process; "" for none."""
    for name, kind in CLUSTERS.items():
        value = environment.get(name, "")
        if value and not (name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE") and value == "1") and not (
                name == "TPU_WORKER_HOSTNAMES" and "," not in value):
            return kind
    # A TPU VM says nothing in its environment; its metadata server tells JAX whether it is one of several.
    return "TPU VM" if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists() else ""


def start(seconds: float) -> None:
    """Joins the other processes, if there are any. To be called once, before a device is asked for.

    seconds: how long to wait for them. Raises HostsError, in time, on every process that is there.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    given = explicit(os.environ)
    kind = "" if given else detected(os.environ)
    if given is None and not kind:
        return
    arguments: dict = {}
    if given:
        address, count, index = given
        arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
        host, _, port = address.rpartition(":")
        if index == 0:
            if host in ("localhost", "127.0.0.1"):  # all on this machine: nobody else need reach it
                arguments["coordinator_bind_address"] = f"127.0.0.1:{port}"
            _check_free(host, int(port))
    try:
        jax.distributed.initialize(initialization_timeout=int(seconds), heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                                   shutdown_timeout_seconds=60, **arguments)
    except Exception as error:  # jaxlib raises several kinds
        where = f"process {given[2]} of {given[1]}, coordinator {given[0]}" if given else kind
        text = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise HostsError(f"{where}: the processes did not find each other within {seconds:g} s ({text}); start all of "
                         "them, with the same coordinator, and see that its port is open") from None


def _check_free(host: str, port: int) -> None:
    """gRPC would abort the process where the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1" if host in ("localhost", "127.0.0.1") else "", port))
        except OSError as error:
            raise HostsError(f"LMJAX_COORDINATOR={host}:{port}: the port cannot be used ({error.strerror}); "
                             "choose another") from None


def is_main() -> bool:
    """Whether this process writes what is written once."""
    import jax

    return jax.process_index() == 0


def gather_bytes(data: bytes) -> list[bytes]:
    """What every process gave, in order of processes. Every process must call it."""
    if not several():
        return [data]
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    with jax.transfer_guard("allow"):
        lengths = np.asarray(multihost_utils.process_allgather(np.array([len(data)], np.int32))).reshape(-1)
        if not lengths.max():
            return [b""] * len(lengths)
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[:len(data)] = np.frombuffer(data, np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]


def gather_text(text: str) -> list[str]:
    return [data.decode() for data in gather_bytes(text.encode())]


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    return any(gather_text("x" if flag else ""))


def from_main(ask: Callable[[], str]) -> str:
    """What process 0 answers; the others do not ask. A UserError there is raised everywhere."""
    if not several():
        return ask()
    answer, problem = "", None
    if is_main():
        try:
            answer = "=" + ask()
        except UserError as error:
            answer, problem = "!" + str(error), error
    answer = gather_text(answer)[0]
    if problem is not None:
        raise problem
    if answer.startswith("!"):
        raise CheckpointError(f"process 0: {answer[1:]}")
    return answer[1:]


def several() -> bool:
    """Whether this process has joined others. Asks for no device, and imports nothing."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def peer_lost(error: Exception) -> bool:
    """Whether an error is how this process learns that another one is gone."""
    import jax

    return several() and not isinstance(error, UserError) and (
        isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error))


def leave(code: int) -> None:
    """Ends this process, and waits for nobody that may never come.

    An ordinary exit waits for the threads of a save that has failed, and, with several processes, five minutes for the
    others, who wait for this one. Those that end together, done or stopped, say goodbye first; one that fails goes at
    once, and the others see that it is gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if several():
        import jax

        if code in (0, 130, 143):
            jax.distributed.shutdown()
        elif is_main():
            time.sleep(2)  # it holds the coordinator: others that fail for the same reason say so first
    os._exit(code)


def same_everywhere(value: Mapping) -> None:
    """Raises HostsError on every process if they were not all given the same JSON value; names what differs."""
    texts = gather_text(json.dumps(value, sort_keys=True))
    for index, text in enumerate(texts):
        if text != texts[0]:
            mine, other = (_flat(json.loads(t)) for t in (texts[0], text))
            names = [name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)]
            told = "; ".join(f"{n}: {mine.get(n)!r} on process 0, {other.get(n)!r} on process {index}"
                             for n in names[:5])
            raise HostsError(f"the processes of this run differ: {told}; give all of them the same code, command and "
                             "files")


def _flat(value, prefix: str = "") -> dict:
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, item in value.items()
            for name, leaf in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}
