"""Who may train in a folder: locks on this machine, watched leases between machines."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from lmjax import lease
from lmjax.errors import CheckpointError
from lmjax.lease import boot_id, held, open_folder

ELSEWHERE = {"host": "another-machine", "boot": "b", "pid": 1, "began": 5, "beat": 3}


def test_the_lease_says_who_and_goes_away(tmp_path):
    with open_folder(tmp_path / "run"):
        there = json.loads((tmp_path / "run" / "lease.json").read_text())
        assert there["pid"] == os.getpid() and there["boot"] == boot_id()
    assert not (tmp_path / "run" / "lease.json").exists()


def test_a_second_trainer_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    code = ("import sys, time; from pathlib import Path; from lmjax.lease import open_folder\n"
            "with open_folder(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    with pytest.raises(CheckpointError, match=rf"another process is training in it \(process {process.pid} on "):
        with open_folder(tmp_path / "run"):
            pass
    process.kill()
    process.communicate()
    with open_folder(tmp_path / "run"):  # at once, although its lease is still there
        pass


def test_a_lease_of_another_machine_is_watched(tmp_path, monkeypatch):
    path = tmp_path / "lease.json"
    path.write_text(json.dumps(ELSEWHERE))
    assert not held(path, ELSEWHERE, locked=True, watch=0.2), "silent: its machine is gone"

    def beat():
        time.sleep(0.05)
        path.write_text(json.dumps(ELSEWHERE | {"beat": 4}))
    threading.Thread(target=beat).start()
    assert held(path, ELSEWHERE, locked=True, watch=0.5), "it changes, so somebody trains"


def test_without_locks_the_process_decides(tmp_path):
    mine = {"host": lease.socket.gethostname(), "boot": boot_id(), "began": 1}
    parent = os.getppid()
    assert held(tmp_path / "x", mine | {"pid": parent}, locked=False)
    assert not held(tmp_path / "x", mine | {"pid": parent}, locked=True)
    assert not held(tmp_path / "x", mine | {"pid": 2**22 + 7}, locked=False)


def test_a_garbled_lease_does_not_stop_a_run(tmp_path):
    with open_folder(tmp_path / "run"):
        pass
    (tmp_path / "run" / "lease.json").write_text("{")
    with open_folder(tmp_path / "run"):
        pass
