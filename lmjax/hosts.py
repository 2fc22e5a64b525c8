"""Several processes as one run: how they find each other, and how they agree.

Every process gives the same command. On TPU VMs, GKE's TPU pods, Slurm and Open MPI JAX finds out by itself who is
there; elsewhere three environment variables say it:

    LMJAX_COORDINATOR=HOST:PORT  LMJAX_PROCESSES=4  LMJAX_PROCESS=0 … 3

Where something else numbers the processes (NUMBERED), the first is enough. LMJAX_PROCESSES=1 alone says that this
process is the whole run, whatever it runs in.

What lives here: starting `jax.distributed`, and small collectives on text and truth values. What does not: anything
about meshes (`lmjax.axes`) or data (`lmjax.loader`). With one process, nothing here communicates.
"""

import errno
import ipaddress
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from lmjax.errors import CheckpointError, HostsError, PeerLostError, UserError

VARIABLES = ("LMJAX_COORDINATOR", "LMJAX_PROCESSES", "LMJAX_PROCESS")
HEARTBEAT_SECONDS = 20  # a peer that is silent for so long is dead; JAX's own default is 100
# Who else tells a process how many there are, and which it is. The last is what XPK gives to GPU workloads.
NUMBERED = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("SLURM_NTASKS", "SLURM_PROCID"), ("NNODES", "NODE_RANK"))
# What `detected` answers -> the name of JAX's way to find out (jax/_src/clusters); None leaves it to JAX.
METHODS = {"Open MPI": "ompi", "Open MPI with mpi4py": "mpi4py", "Slurm": "slurm", "multislice": None,
           "Cloud TPU": "gketpu", "TPU VM": "gcetpu", "Kubernetes": None}


def explicit(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator, processes, process) as our variables, or XPK's, say; None where none is set. Raises HostsError."""
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if given == {"LMJAX_PROCESSES": "1"}:
        return "", 1, 0
    if not given and all(environment.get(name) for name in ("JAX_COORDINATOR_ADDRESS", *NUMBERED[-1])):
        host, colon, port = environment["JAX_COORDINATOR_ADDRESS"].partition(":")
        given = {VARIABLES[0]: f"{host}:{port or environment.get('JAX_COORDINATOR_PORT', '')}"}
    if given.keys() == {VARIABLES[0]}:
        for names in NUMBERED:
            if all(environment.get(name) for name in names):
                given |= {ours: environment[name] for ours, name in zip(VARIABLES[1:], names, strict=True)}
                break
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
    """The kind of cluster that started more than one process, a key of METHODS; "" for none.

    Raises HostsError where there is one that JAX could not make out.
    """
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":  # before Slurm, which may be what started mpirun's helpers
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return "Open MPI"
        if find_spec("mpi4py"):
            return "Open MPI with mpi4py"
        raise HostsError("Open MPI 5 does not tell its processes where process 0 is: pip install mpi4py, or start "
                         "them with mpirun -x LMJAX_COORDINATOR=HOST:PORT")
    if environment.get("SLURM_NTASKS", "1") != "1":
        if environment.get("SLURM_STEP_NODELIST") and (
                environment.get("SLURM_STEP_NUM_TASKS") in (None, environment["SLURM_NTASKS"])):
            return "Slurm"
        raise HostsError(f"SLURM_NTASKS={environment['SLURM_NTASKS']}, but this process was not started by srun: give "
                         "srun lmjax train … (launch/slurm.sh does), or set LMJAX_PROCESSES=1 to train with one")
    if "tpu" in (environment.get("JAX_PLATFORMS") or "tpu") and (kind := _tpus(environment)):
        return kind
    # JAX asks Kubernetes, which needs its package and the right to; launch/gke.sh says all three variables instead.
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment and find_spec("kubernetes"):
        return "Kubernetes"
    return ""


def _tpus(environment: Mapping[str, str]) -> str:
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "multislice"
    if environment.get("TPU_PROCESS_ADDRESSES_PATH"):
        return "Cloud TPU"
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if names or "TPU_SKIP_MDS_QUERY" in environment:
        return "Cloud TPU" if "," in (names or "") else ""
    # A TPU VM says nothing in its environment; its metadata server tells JAX whether it is one of several.
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return "TPU VM" if chips and find_spec("libtpu") else ""


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this process: [] is all it can see, None what JAX says.

    Under Slurm and Open MPI JAX gives every process the one GPU of its local number, also where it is alone on its
    host and should have all, or where the cluster shows it no other.
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    alone = (re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
             if "OMPI_COMM_WORLD_SIZE" not in environment else environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1")
    local = environment.get("OMPI_COMM_WORLD_LOCAL_RANK") or environment.get("SLURM_LOCALID")
    if alone or not local or environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0:
        return []
    return [int(local)]


def start(seconds: float) -> None:
    """Joins the other processes, if there are any. To be called once, before a device is asked for.

    seconds: how long to wait for them. Raises HostsError, in time, on every process that is there.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    given = explicit(os.environ)
    kind = "" if given else detected(os.environ)
    if (given is None and not kind) or (given and given[1] == 1):
        return
    if given:
        address, count, index = given
        arguments = {"coordinator_address": address, "num_processes": count, "process_id": index,
                     "cluster_detection_method": "deactivate",  # or Slurm would still choose the GPUs
                     "coordinator_bind_address": bind_address(address) if index == 0 else None}
    else:
        arguments = {"cluster_detection_method": METHODS[kind]}
    if given or "Slurm" in kind or "MPI" in kind:
        arguments["local_device_ids"] = local_devices(os.environ)
    try:
        jax.distributed.initialize(initialization_timeout=max(1, int(seconds)), shutdown_timeout_seconds=60,
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **arguments)
    except Exception as error:  # jaxlib raises several kinds
        where = f"process {given[2]} of {given[1]}, coordinator {given[0]}" if given else kind
        text = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise HostsError(f"{where}: the processes did not find each other within {seconds:g} s ({text}); start all of "
                         "them, with the same coordinator, and see that its port is open") from None


def bind_address(address: str) -> str | None:
    """Where process 0 listens: on the interface that has the coordinator's address, where that is given in numbers (or
    is localhost). None is JAX's default, all of them: a host's name may mean another address on that host itself, and
    clouds translate addresses that no interface has. JAX_COORDINATOR_BIND_ADDRESS, where set, decides.

    Raises HostsError if the port is taken; gRPC would abort the process.
    """
    if os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return None
    host, _, port = address.rpartition(":")
    number = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        version = ipaddress.ip_address(number).version
    except ValueError:
        number, version = "", 4
    for here in (number, ""):
        with socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((here, int(port)))
                return address.replace("localhost", number) if here else None
            except OSError as error:
                if here and error.errno == errno.EADDRNOTAVAIL:
                    continue
                raise HostsError(f"LMJAX_COORDINATOR={address}: the port cannot be used ({error.strerror}); choose "
                                 "another") from None
    return None


def is_main() -> bool:
    """Whether this process writes what is written once."""
    import jax

    return jax.process_index() == 0


def gather_bytes(data: bytes) -> list[bytes]:
    """What every process gave, in order of processes. Every process must call it; PeerLostError if one is gone."""
    if not several():
        return [data]
    import numpy as np

    lengths = _gather(np.array([len(data)], np.int32)).reshape(-1)
    if not lengths.max():
        return [b""] * len(lengths)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[:len(data)] = np.frombuffer(data, np.uint8)
    rows = _gather(padded).reshape(len(lengths), -1)
    return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]


def _gather(array):
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    try:
        with jax.transfer_guard("allow"):
            return np.asarray(multihost_utils.process_allgather(array))
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX 0.12 raises the second
        raise peer_lost(error) or error from None


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


def peer_lost(error: Exception, where: str = "") -> PeerLostError | None:
    """What to raise where an error is how this process learns that another one is gone; None where it is not."""
    import jax

    # JAX 0.12 raises ValueError for some of them.
    if not several() or isinstance(error, UserError) or not (
            isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)):
        return None
    return PeerLostError(f"{where}the processes can no longer exchange data ({str(error).splitlines()[0][:160]}); "
                         "another one has died or left, see its log; start all of them again to continue")


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
