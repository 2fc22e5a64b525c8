"""Finding other processes: what the environment says, what is refused, and two real ones."""

import json

import pytest

from lmjax.errors import HostsError
from lmjax.hosts import detected, explicit, gather_text, same_everywhere

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


@pytest.mark.parametrize("environment,kind", [
    ({}, ""), ({"SLURM_NTASKS": "1"}, ""), ({"SLURM_NTASKS": "16", "SLURM_PROCID": "3"}, "Slurm"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"), ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"), ({"JOBSET_NAME": "run"}, "JobSet"),
])
def test_clusters_that_jax_detects(environment, kind, monkeypatch):
    monkeypatch.setattr("lmjax.hosts.Path.exists", lambda self: False)  # no TPU in this machine
    assert detected(environment) == kind


def test_one_process_agrees_with_itself():
    assert gather_text("x") == ["x"]
    same_everywhere({"config": {"a": 1}})


def test_what_differs_is_named(monkeypatch):
    mine, other = {"config": {"optim": {"lr": 1.0}, "seed": 0}}, {"config": {"optim": {"lr": 2.0}, "seed": 0}}
    monkeypatch.setattr("lmjax.hosts.gather_text", lambda text: [text, json.dumps(other, sort_keys=True)])
    with pytest.raises(HostsError, match=r"config.optim.lr: 1.0 on process 0, 2.0 on process 1; give"):
        same_everywhere(mine)
