"""Finding other processes: what the environment says, what is refused, and what JAX's own detection makes of it."""

import importlib.util
import json
import socket

import jax
import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster
from jax.experimental import multihost_utils

from lmjax import hosts
from lmjax.errors import HostsError, PeerLostError
from lmjax.hosts import METHODS, bind_address, detected, explicit, gather_text, local_devices, same_everywhere

ALL = {"LMJAX_COORDINATOR": "10.0.0.1:8476", "LMJAX_PROCESSES": "4", "LMJAX_PROCESS": "3"}


def test_explicit():
    assert explicit({}) is None and explicit({"LMJAX_COORDINATOR": ""}) is None
    assert explicit(ALL) == ("10.0.0.1:8476", 4, 3)


@pytest.mark.parametrize("change,word", [
    ({"LMJAX_PROCESS": ""}, "without LMJAX_PROCESS"),
    ({"LMJAX_COORDINATOR": "10.0.0.1"}, "give HOST:PORT"),
    ({"LMJAX_COORDINATOR": ":1234"}, "give HOST:PORT"),
    ({"LMJAX_COORDINATOR": "host:99999"}, "give HOST:PORT"),
    ({"LMJAX_PROCESS": "4"}, "from 0 to one below"),
    ({"LMJAX_PROCESSES": "two"}, "whole numbers"),
])
def test_what_cannot_be_right_is_named(change, word):
    with pytest.raises(HostsError, match=word):
        explicit(ALL | change)


# What each launcher's process number 5 of 8 (or of as many) finds in its environment.
SLURM = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
         "SLURM_STEP_NODELIST": "gpu[007-008,012],login1", "SLURM_STEP_NUM_TASKS": "8",
         "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
BATCH = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}  # sbatch's own script: no srun
OMPI5 = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
         "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
OMPI4 = OMPI5 | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
GKE = {"TPU_WORKER_HOSTNAMES": "h0.s,h1.s,h2.s,h3.s", "TPU_WORKER_ID": "1"}
SLICES = GKE | {"MEGASCALE_COORDINATOR_ADDRESS": "run-slice-job-0-0.run", "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1"}
XPK = {"JAX_COORDINATOR_ADDRESS": "run-slice-job-0-0.run", "JAX_COORDINATOR_PORT": "6002", "NNODES": "8",
       "NODE_RANK": "5", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "5"}


@pytest.fixture
def world(monkeypatch):
    """Sets an environment, with packages and device files, in place of this machine's."""
    def make(environment, packages=(), files=()):
        for name in list(hosts.os.environ):
            if name.startswith(("SLURM", "OMPI", "TPU", "MEGASCALE", "LMJAX", "JAX_PLATFORMS", "JAX_COORD", "KUBE")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("lmjax.hosts.find_spec", lambda name: name in packages or None)
        monkeypatch.setattr("lmjax.hosts.Path.exists", lambda self: str(self) in files)
        return environment
    return make


@pytest.mark.parametrize("environment,packages,files,kind", [
    ({}, (), (), ""), (SLURM, (), (), "Slurm"), ({"SLURM_NTASKS": "1"}, (), (), ""),
    (OMPI4, (), (), "Open MPI"), (OMPI4 | SLURM, (), (), "Open MPI"), (OMPI5, ("mpi4py",), (), "Open MPI with mpi4py"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, (), (), ""),
    (GKE, (), (), "Cloud TPU"), (SLICES, (), (), "multislice"), ({"TPU_WORKER_HOSTNAMES": "localhost"}, (), (), ""),
    ({"TPU_WORKER_HOSTNAMES": "h0", "MEGASCALE_NUM_SLICES": "2"}, (), (), "multislice"),
    ({}, ("libtpu",), ("/dev/vfio/0",), "TPU VM"), ({}, ("libtpu",), ("/dev/accel0",), "TPU VM"),
    ({}, (), ("/dev/vfio/0",), ""),  # a GPU that is passed on to a guest
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, ("libtpu",), ("/dev/vfio/0",), ""),
    ({"TPU_SKIP_MDS_QUERY": "1"}, ("libtpu",), ("/dev/accel0",), ""),
    (GKE | {"JAX_PLATFORMS": "cpu"}, ("libtpu",), ("/dev/accel0",), ""),
    ({"JOB_COMPLETION_INDEX": "5", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ("kubernetes",), (), "Kubernetes"),
    ({"JOB_COMPLETION_INDEX": "5", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOBSET_NAME": "run"}, (), (), ""),
])
def test_clusters(environment, packages, files, kind, world):
    assert detected(world(environment, packages, files)) == kind and (not kind or kind in METHODS)


@pytest.mark.parametrize("environment,word", [
    (BATCH, "not started by srun"), (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, "not started by srun"),
    (OMPI5, "pip install mpi4py"), (OMPI5 | SLURM, "pip install mpi4py"),
])
def test_clusters_that_jax_could_not_make_out(environment, word, world):
    with pytest.raises(HostsError, match=word):
        detected(world(environment))


def jax_finds(kind: str) -> tuple:
    """What JAX's own detection makes of the environment: its part of jax.distributed.initialize."""
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, METHODS[kind], 5)
    return (*found[:3], found[3] and list(found[3]))


@pytest.mark.parametrize("environment,kind,expected", [
    (SLURM, "Slurm", ("gpu007:61586", 8, 5, [1])),  # 4242 % 4096 + 61440
    (OMPI4, "Open MPI", ("10.96.0.1:62624", 8, 5, [1])),  # 1531576320 / 4096 % 4096 + 61440
    (GKE, "Cloud TPU", ("h0.s:8482", 4, 1, None)),
    (SLICES, "multislice", ("run-slice-job-0-0.run:8482", 8, 5, None)),
])
def test_what_jax_makes_of_them(environment, kind, expected, world, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", "TPU_WORKER_ID" in environment)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    world(environment)
    assert jax_finds(kind) == expected


def test_a_tpu_vm_by_its_metadata(world, monkeypatch):
    """The slice's second worker of four, in both forms that the metadata server has."""
    server = {"agent-worker-number": "1", "tpu-env": "ACCELERATOR_TYPE: 'v4-32'\nMEGASCALE_NUM_SLICES: '2'\n"
              "MEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.1.0.2:8080'\n"}
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (server[key], 200))
    world({}, ("libtpu",), ("/dev/accel0",))
    for endpoints in ("t0,t1,t2,t3", ",".join(f"w:{i}:10.1.0.{i + 2}" for i in range(4))):
        server["worker-network-endpoints"] = endpoints
        assert jax_finds(detected({})) == ("10.1.0.2:8482", 8, 5, None)


def test_jax_sees_no_jobset(world):
    """…on GPUs, which is why launch/gke.sh says all three variables itself."""
    if importlib.util.find_spec("kubernetes"):
        pytest.skip("with its package, JAX asks the cluster")
    world(XPK | {"JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "slice-job"})
    with pytest.warns(UserWarning, match="jax.k8s"):
        assert clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 5) == (None,) * 4


@pytest.mark.parametrize("environment,expected", [
    (XPK, ("run-slice-job-0-0.run:6002", 8, 5)),
    (XPK | {"JAX_COORDINATOR_ADDRESS": "a.b:3389"}, ("a.b:3389", 8, 5)),
    (XPK | ALL, ("10.0.0.1:8476", 4, 3)),  # ours come first
    (SLURM | {"LMJAX_COORDINATOR": "10.1.0.7:8476"}, ("10.1.0.7:8476", 8, 5)),
    (OMPI5 | {"LMJAX_COORDINATOR": "10.1.0.7:8476"}, ("10.1.0.7:8476", 8, 5)),
    (SLURM | {"LMJAX_PROCESSES": "1"}, ("", 1, 0)),  # alone, whatever it runs in
    (SLURM, None), ({"NNODES": "8", "NODE_RANK": "5"}, None), ({"JAX_COORDINATOR_ADDRESS": "a.b:3389"}, None),
])
def test_others_may_number_the_processes(environment, expected):
    assert explicit(environment) == expected


@pytest.mark.parametrize("environment,expected", [
    ({}, []), (SLURM, [1]), (OMPI4, [1]),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, []),  # one process for a node has all of its GPUs
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1"}, []), (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,4"}, [1]),
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, []),  # --gpus-per-task=1: each sees one, and calls it 0
    (OMPI4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
    (SLURM | {"JAX_LOCAL_DEVICE_IDS": "2"}, None),
])
def test_gpus_of_a_process(environment, expected):
    assert local_devices(environment) == expected


# ---- What jax.distributed.initialize is given -----------------------------------------------------------


def started(monkeypatch, seconds: float = 30) -> dict:
    given: dict = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: given.update(arguments))
    hosts.start(seconds)
    return given


def test_start_says_what_is_known_and_no_more(world, monkeypatch):
    world(ALL)
    assert started(monkeypatch) == {
        "coordinator_address": "10.0.0.1:8476", "num_processes": 4, "process_id": 3, "local_device_ids": [],
        "coordinator_bind_address": None, "cluster_detection_method": "deactivate", "initialization_timeout": 30,
        "heartbeat_timeout_seconds": hosts.HEARTBEAT_SECONDS, "shutdown_timeout_seconds": 60}
    world(SLURM)
    given = started(monkeypatch, 0.5)
    assert (given["cluster_detection_method"], given["local_device_ids"]) == ("slurm", [1])
    assert given["initialization_timeout"] == 1 and "coordinator_address" not in given
    world(GKE)
    assert "local_device_ids" not in started(monkeypatch)
    for alone in ({}, {"LMJAX_PROCESSES": "1"}, SLURM | {"LMJAX_PROCESSES": "1"}):
        world(alone)
        assert started(monkeypatch) == {}


def test_without_deactivate_slurm_would_choose_the_gpu(world):
    """The reason for it: three variables of ours inside a Slurm job, and JAX adds SLURM_LOCALID as the only GPU."""
    world(SLURM)
    asked = clusters.ClusterEnv.auto_detect_unset_distributed_params("10.0.0.1:8476", 4, 3, None, None, 5)
    assert asked == ("10.0.0.1:8476", 4, 3, [1])


def test_failures_are_one_line(world, monkeypatch):
    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nand much more")
    world(ALL)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(HostsError, match="process 3 of 4, coordinator 10.0.0.1:8476: .* 7 s .DEADLINE") as caught:
        hosts.start(7)
    assert "\n" not in str(caught.value)


def test_process_0_listens_where_it_was_told(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address, expected in {f"127.0.0.1:{port}": f"127.0.0.1:{port}", f"localhost:{port}": f"127.0.0.1:{port}",
                              f"{socket.gethostname()}:{port}": None,  # it may mean 127.0.1.1 here, and here only
                              f"192.0.2.1:{port}": None}.items():  # an address that no interface of ours has
        assert bind_address(address) == expected
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        for address in (f"localhost:{port}", f"some.name:{port}"):
            with pytest.raises(HostsError, match=f":{port}: the port cannot be used .*choose another"):
                bind_address(address)
        monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:1")
        assert bind_address(f"localhost:{port}") is None  # JAX reads that one itself


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_a_peer_that_is_gone_is_no_bug_of_ours(kind, monkeypatch):
    def fail(array):
        raise kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nand more")
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(multihost_utils, "process_allgather", fail)
    with pytest.raises(PeerLostError, match="another one has died or left") as caught:
        gather_text("x")
    assert "\n" not in str(caught.value)


def test_one_process_agrees_with_itself():
    assert gather_text("x") == ["x"]
    same_everywhere({"config": {"a": 1}})


def test_what_differs_is_named(monkeypatch):
    mine, other = {"config": {"optim": {"lr": 1.0}, "seed": 0}}, {"config": {"optim": {"lr": 2.0}, "seed": 0}}
    monkeypatch.setattr("lmjax.hosts.gather_text", lambda text: [text, json.dumps(other, sort_keys=True)])
    with pytest.raises(HostsError, match=r"config.optim.lr: 1.0 on process 0, 2.0 on process 1; give"):
        same_everywhere(mine)
