"""launch/: every documented command by its dry run, what cannot be right, exit codes, signals, and real processes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, write_config

from lmjax.records import read_metrics

LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
CONFIG = str(ROOT / "configs" / "quickstart.py")


def environment(folder: Path, **more: str) -> dict:
    """Ours without JAX's flags and clusters; programs in folder/bin come first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LMJAX_", "XLA_", "SLURM_", "OMPI_"))}
    return kept | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(folder)} | more


def program(folder: Path, name: str, text: str) -> None:
    """An executable bash script in folder/bin."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def launch(folder: Path, script: str, *args: str, **more: str) -> subprocess.CompletedProcess:
    with subprocess.Popen([LAUNCH / script, *args], env=environment(folder, **more), cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output = process.communicate(timeout=900)
        finally:
            process.terminate()  # it would pass that on; nothing is left behind
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


# ---- Every script, and every command of the README ------------------------------------------------------


def test_shellcheck(tmp_path):
    checker = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    if not Path(checker).exists():
        pytest.skip("shellcheck is not installed")

    def check(*paths):
        return subprocess.run([checker, "-x", "-P", LAUNCH, *paths], capture_output=True, text=True)
    done = check(*sorted(LAUNCH.glob("*.sh")))
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.sh"
    wrong.write_text("#!/usr/bin/env bash\nrm -rf $1/runs\n")
    assert "SC2086" in check(wrong).stdout


def documented() -> list[list[str]]:
    """The commands in the README's bash blocks, as words, with what runs them left away."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


LAUNCHED = [words for words in documented() if any(w.startswith("launch/") for w in words)]


@pytest.mark.parametrize("words", LAUNCHED, ids=" ".join)
def test_documented_commands_have_a_dry_run(words, tmp_path):
    at = next(i for i, w in enumerate(words) if w.startswith("launch/"))
    done = launch(tmp_path, words[at].removeprefix("launch/"), "--dry-run", *words[at + 1:])
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())  # nothing was done
    config = next((w for w in words if w.endswith(".py")), "")
    assert config in done.stdout and (not config or words[-1] in done.stdout)  # all of it arrives, to the last word


@pytest.mark.parametrize("script", ["local.sh", "restart.sh", "tpu.sh", "gpu.sh", "slurm.sh", "gke.sh"])
def test_help_is_the_comment_on_top(script, tmp_path):
    done = launch(tmp_path, script, "--help")
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and "set -u" not in done.stdout


def test_all_launchers_are_documented():
    scripts = {f"launch/{path.name}" for path in LAUNCH.glob("*.sh")} - {"launch/shared.sh"}
    assert {w for words in LAUNCHED for w in words if w.startswith("launch/")} == scripts
    others = [words for words in documented() if words not in LAUNCHED]
    assert all("lmjax train configs/quickstart.py" in " ".join(words) for words in others), others


@pytest.mark.parametrize("command,word", [
    ("local.sh", "whole number"), ("local.sh 0 x.py", "N=0"), ("local.sh 2", "config"), ("local.sh 2 x.py", "no such"),
    ("local.sh --gpus --devices=2 2 " + CONFIG, "one GPU"), ("local.sh --nodes=2 2 x.py", "--nodes=2: no such option"),
    ("restart.sh", "no command"), ("restart.sh --few=a true", "exit codes"), ("restart.sh --limit=0 true", "--limit=0"),
    ("tpu.sh", "give create"), ("tpu.sh run", "name of the TPU"), ("tpu.sh create t", "type is missing"),
    ("tpu.sh create t v99-8", "--version"), ("tpu.sh create a,b v4-8", "one name"), ("tpu.sh stop t now", "too many"),
    ("tpu.sh run t;reboot x.py", "letters"), ("tpu.sh --slices=2 run t x.py", "t-0,t-1"), ("tpu.sh exec t", "command"),
    ("gpu.sh start a", "give copy"), ("gpu.sh run", "hosts"), ("gpu.sh run -oProxyCommand=x x.py", "letters"),
    ("gpu.sh run a", "config"), ("slurm.sh x.py", "not a Slurm job"), ("slurm.sh --nodes=2 x.py", "Slurm's own"),
    ("gke.sh run", "NAME"), ("gke.sh run n x.py", "--image"), ("gke.sh --image=i --claim=c run n x.py", "--tpu"),
    ("gke.sh --image=i --claim=c --tpu=t --topology=4 run n x.py", "4x4"), ("gke.sh --tpu=t logs n", "is for run"),
    ("gke.sh --image=i --claim=c --tpu=t --topology=3x3 run n x.py", "does not divide"),
    ("gke.sh --image=i --claim=c --tpu=t --gpu=g run n x.py", "one kind"),
])
def test_what_cannot_be_right_is_one_line(command, word, tmp_path):
    script, *args = command.split()
    done = launch(tmp_path, script, *args)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and word in done.stderr, done.stderr


ODD = "--data.sources[0].path=it's a \"b\" $(touch x) *"


@pytest.mark.parametrize("script,args", [("slurm.sh", []), ("local.sh", ["1"]), ("restart.sh", ["lmjax", "train"])])
def test_a_shell_reads_the_same_words(script, args, tmp_path):
    line = launch(tmp_path, script, "--dry-run", *args, CONFIG, ODD).stdout
    read = subprocess.run(["bash", "-c", f"printf '%s\n' {line}"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert read.splitlines()[-2:] == [CONFIG, ODD] and not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_takes_the_commands(tmp_path):
    def problems(command: str) -> list:
        done = subprocess.run(["gcloud", "meta", "lint-gcloud-commands", f"--command-string={command}"], text=True,
                              env=environment(tmp_path, CLOUDSDK_CONFIG=str(tmp_path)), capture_output=True)
        return [found["error_message"] for found in json.loads(done.stdout) if not found["success"]]
    seen = set()
    for words in (words for words in LAUNCHED if words[0] == "launch/tpu.sh"):
        for line in launch(tmp_path, "tpu.sh", "--dry-run", *words[1:]).stdout.splitlines():
            if line.startswith("gcloud") and (name := " ".join(line.split()[3:5])) not in seen:
                seen.add(name)
                assert not problems(re.sub(r"\$'.*'", "--command=x", line)), line
    assert len(seen) == 7 and problems("gcloud compute tpus tpu-vm ssh my-tpu --wurker=all")


# ---- Manifests ------------------------------------------------------------------------------------------


def manifest(folder: Path, *options: str) -> dict:
    done = launch(folder, "gke.sh", "--dry-run", *options, "--image=gcr.io/p/lmjax", "--claim=disk", "run", "mine",
                  "configs/quickstart.py", "--name=$(HOME) \"q\" \\")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def problems_of(found: dict) -> list[str]:
    """What JobSet's webhook, Kubernetes or XPK's clusters would not take, or would take wrongly."""
    spec = found["spec"]
    (job,) = spec["replicatedJobs"]
    inner = job["template"]["spec"]
    pod = inner["template"]["spec"]
    (container,) = pod["containers"]
    rules = inner["podFailurePolicy"]["rules"]
    limits = container["resources"]["limits"]
    checks = {
        "kind": (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet"),
        "names": re.fullmatch(r"[a-z][-a-z0-9]*", found["metadata"]["name"]) and job["name"] == "slice-job",
        "queue": "kueue.x-k8s.io/queue-name" in found["metadata"]["labels"],
        "indexed": inner["completionMode"] == "Indexed" and inner["completions"] == inner["parallelism"] > 0,
        "restarts": spec["failurePolicy"]["maxRestarts"] > 0 and inner["backoffLimit"] == 0,
        "policy": all(rule["name"] for rule in spec["failurePolicy"]["rules"]) and pod["restartPolicy"] == "Never",
        "codes": [rule["onExitCodes"]["values"] for rule in rules] == [[2, 3, 4, 5, 7]],
        "container": all(rule["onExitCodes"]["containerName"] == container["name"] for rule in rules),
        "volumes": {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]},
        "devices": set(limits) <= {"google.com/tpu", "nvidia.com/gpu"} and all(n > 0 for n in limits.values()),
        "command": container["command"] == ["lmjax", "train", "configs/quickstart.py", "--name=$$(HOME) \"q\" \\",
                                            "--run_root=/runs"],
        "tpus": "google.com/tpu" not in limits or "cloud.google.com/gke-tpu-topology" in pod["nodeSelector"],
        "gpus": "nvidia.com/gpu" not in limits or [e["name"] for e in container["env"]] == [
            "LMJAX_COORDINATOR", "LMJAX_PROCESSES", "LMJAX_PROCESS"],
    }
    return [name for name, right in checks.items() if not right]


def test_manifests(tmp_path):
    tpus = manifest(tmp_path, "--tpu=tpu-v6e-slice", "--topology=4x4", "--slices=2")
    gpus = manifest(tmp_path, "--gpu=nvidia-h100-80gb", "--nodes=4", "--priority=high", "--restarts=7")
    assert not problems_of(tpus) and not problems_of(gpus)
    (slices,), (hosts,) = (found["spec"]["replicatedJobs"] for found in (tpus, gpus))
    assert slices["replicas"] == 2 and slices["template"]["spec"]["parallelism"] == 4  # 16 chips, 4 of each node
    assert hosts["replicas"] == 1 and hosts["template"]["spec"]["parallelism"] == 4
    env = {e["name"]: e.get("value") for e in hosts["template"]["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["LMJAX_COORDINATOR"] == "mine-slice-job-0-0.mine:8476" and env["LMJAX_PROCESSES"] == "4"
    small = manifest(tmp_path, "--tpu=tpu-v5-lite-podslice", "--topology=1x1")["spec"]["replicatedJobs"][0]
    assert small["template"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] == 1

    inner = gpus["spec"]["replicatedJobs"][0]["template"]["spec"]
    inner["parallelism"], inner["template"]["spec"]["restartPolicy"] = 3, "OnFailure"
    assert problems_of(gpus) == ["indexed", "policy"]


# ---- restart.sh -----------------------------------------------------------------------------------------


def attempts(folder: Path, codes: list[int], *options: str) -> tuple[int, int, str]:
    """(exit code, attempts, what was said) of a command that ends with these codes, one after the other."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    program(folder, "lmjax", 'cd "$TMPDIR"; echo >> count; exit "$(sed -n "$(grep -c "" count)p" codes)"')
    program(folder, "sleep", '[[ $1 == 0.2 ]] && exec /bin/sleep 0.02; exit 0')  # nobody waits here
    (folder / "count").write_text("")
    done = launch(folder, "restart.sh", *options, "lmjax", "train", "x.py")
    return done.returncode, len((folder / "count").read_text()), done.stderr


@pytest.mark.parametrize("codes,options,end,count", [
    ([0], "", 0, 1), ([6, 9, 134, 137, 143, 0], "", 0, 6),
    ([2], "", 2, 1), ([3], "", 3, 1), ([4], "", 4, 1), ([5], "", 5, 1), ([7], "", 7, 1), ([8], "", 8, 1),
    ([130], "", 130, 1), ([137, 3], "", 3, 2),
    ([1] * 9, "", 1, 4), ([1, 1, 137, 1, 1, 0], "", 0, 6), ([8, 8, 0], "--few=1,8", 0, 3),
    ([143], "--stop=143", 143, 1), ([1] * 9, "--stop=1", 1, 1),
    ([139] * 9, "", 139, 4), ([137] * 9, "--limit=2", 137, 3), ([137] * 4 + [0], "--limit=2 --lasting=0", 0, 5),
])
def test_restarts_go_by_the_exit_code(codes, options, end, count, tmp_path):
    assert attempts(tmp_path, codes, *options.split())[:2] == (end, count)


def test_pauses_double_up_to_five_minutes(tmp_path):
    said = attempts(tmp_path, [137] * 9, "--limit=8")[2]
    assert re.findall(r"again in (\d+) s", said) == ["5", "10", "20", "40", "80", "160", "300", "300"]


WAITS = ('trap "echo saved >> $TMPDIR/said; exit 143" TERM; trap "echo saved >> $TMPDIR/said; exit 130" INT; '
         "echo ready; while :; do sleep 0.05; done")


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_loop_and_reaches_the_command_once(number, code, tmp_path):
    program(tmp_path, "lmjax", WAITS)
    process = subprocess.Popen([LAUNCH / "restart.sh", "lmjax"], env=environment(tmp_path), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(20) == code
    assert (tmp_path / "said").read_text() == "saved\n"


def test_ctrl_c_at_a_terminal_reaches_the_command_once(tmp_path):
    program(tmp_path, "lmjax", WAITS)
    code = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    process = subprocess.Popen([sys.executable, "-c", code, LAUNCH / "restart.sh", LAUNCH / "local.sh", "1", CONFIG],
                               env=environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    while b"ready" not in process.stdout.readline():
        pass
    process.stdin.write(b"\x03")
    process.stdin.flush()
    assert process.wait(20) == 130
    assert (tmp_path / "said").read_text() == "saved\n"


# ---- local.sh with processes that stand in for lmjax -----------------------------------------------------


@pytest.mark.parametrize("plan,code", [
    ("0) exit 0;; 1) exit 0", 0),
    ("0) exit 134;; 1) exit 3", 3),  # the data error is why the other one died
    ("0) exit 8;; 1) kill -KILL $$", 137),
    ("0) exit 1;; 1) kill -KILL $$", 137),
    ("0) exit 134;; 1) exit 1", 1),
    ("0) exec sleep 300;; 1) exit 3", 3),  # and is ended
    ("0) trap '' TERM; sleep 300;; 1) exit 6", 6),
])
def test_one_failure_ends_all_with_the_code_that_says_most(plan, code, tmp_path):
    program(tmp_path, "lmjax", f'echo "process $LMJAX_PROCESS of 2"; case $LMJAX_PROCESS in {plan};; esac')
    done = launch(tmp_path, "local.sh", "--grace=1", f"--logs={tmp_path / 'logs'}", "2", CONFIG)
    assert done.returncode == code, done.stderr
    assert done.stdout == "process 0 of 2\n"  # the stream of the first; files of both
    assert [path.read_text() for path in sorted((tmp_path / "logs").iterdir())] == [
        "process 0 of 2\n", "process 1 of 2\n"]


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_every_process_once(number, code, tmp_path):
    ready = 'until ((LMJAX_PROCESS)) || grep -qs ready "$TMPDIR/logs/process-1.log"; do sleep 0.05; done; '
    program(tmp_path, "lmjax", ready + WAITS)
    process = subprocess.Popen([LAUNCH / "local.sh", f"--logs={tmp_path / 'logs'}", "2", CONFIG],
                               env=environment(tmp_path), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(20) == code
    assert (tmp_path / "said").read_text() == "saved\n" * 2


# ---- slurm.sh with an srun that stays here ----------------------------------------------------------------


@pytest.mark.parametrize("code,waits", [(0, False), (3, False), (143, True)])
def test_a_slurm_job(code, waits, tmp_path):
    """Slurm runs a copy, from its own folder. After a SIGTERM the job waits for its end, or it is not requeued."""
    program(tmp_path, "srun", f'echo "srun $*"; exit {code}')
    program(tmp_path, "sleep", '[[ $1 == 0.2 ]] && exec /bin/sleep 0.02; echo "sleep $1"')
    copy = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
    done = subprocess.run([copy, "configs/quickstart.py", ODD], capture_output=True, text=True, cwd=tmp_path, env=(
        environment(tmp_path) | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}))
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == [
        f"srun --wait=60 --gpu-bind=none lmjax train configs/quickstart.py {ODD}", *["sleep 600"] * waits]


# ---- gpu.sh and tpu.sh with an ssh that stays here -------------------------------------------------------


@pytest.mark.parametrize("script,numbers", [("gpu.sh", ["0/2 at 10.0.0.1:8476", "1/2 at 10.0.0.1:8476"]),
                                            ("tpu.sh", ["/ at ", "/ at "])])
def test_other_hosts(script, numbers, tmp_path):
    """run, run again, stop: on two hosts that are folders."""
    program(tmp_path, "ssh", 'cd "$TMPDIR/$3" && exec bash -c "$4"')
    program(tmp_path, "gcloud", 'cd "$TMPDIR/$5" && exec bash -c "${7#--command=}"')  # … tpu-vm ssh NAME --worker=all
    for host in ("a", "b"):
        (tmp_path / host / "lmjax" / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / host / "lmjax" / "launch").symlink_to(LAUNCH)
    program(tmp_path, "lmjax", 'echo "$LMJAX_PROCESS/$LMJAX_PROCESSES at $LMJAX_COORDINATOR: $*"; ' + WAITS)
    run = (script, *(["--coordinator=10.0.0.1"] if script == "gpu.sh" else []), "run", "a,b", "x.py", ODD)
    first = launch(tmp_path, *run)
    assert first.returncode == 0, first.stderr
    logs = [tmp_path / host / "lmjax" / "train.log" for host in ("a", "b")]
    follow = subprocess.Popen(["tail", "-q", "-F", *logs], stdout=subprocess.PIPE, text=True)
    said: list[str] = []
    while sum("ready" in line for line in said) < 2:
        said.append(follow.stdout.readline())
    again = launch(tmp_path, *run)
    assert again.returncode == 4 and "already" in again.stderr
    assert launch(tmp_path, script, "stop", "a,b").returncode == 0
    pids = [int((tmp_path / host / "lmjax" / "train.pid").read_text()) for host in ("a", "b")]
    subprocess.run(["tail", *(f"--pid={pid}" for pid in pids), "-f", "/dev/null"], timeout=20, check=True)
    follow.terminate()
    assert sorted(line for line in said if " at " in line) == [f"{n}: train x.py {ODD}\n" for n in numbers]
    assert (tmp_path / "said").read_text() == "saved\n" * 2


def test_the_code_that_is_copied_is_all_of_it(tmp_path):
    """…without what git ignores, and the room lmjax/data with it."""
    program(tmp_path, "scp", f'cp "${{@:$#-1:1}}" "{tmp_path}/code.tgz"')
    program(tmp_path, "ssh", "exit 0")
    done = launch(tmp_path, "gpu.sh", "copy", "a")
    assert done.returncode == 0, done.stderr
    names = subprocess.run(["tar", "tzf", tmp_path / "code.tgz"], capture_output=True, text=True).stdout.split()
    assert {"./lmjax/data/rows.py", "./launch/restart.sh", "./pyproject.toml", "./configs/quickstart.py"} <= set(names)
    assert not [n for n in names if n.startswith(("./.git/", "./.venv", "./runs", "./build")) or "__pycache__" in n]


# ---- Real runs ------------------------------------------------------------------------------------------


class Runs:
    """A folder with a config, in which local.sh starts lmjax."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.config = folder, write_config(folder)
        program(folder, "lmjax", f'echo $$ > "$TMPDIR/pid-$LMJAX_PROCESS"; exec "{sys.executable}" -m lmjax "$@"')
        self.settings = (f"--steps={steps}", "--evals.every=0", "--checkpoint.every=12", "--optim.warmup_steps=2")

        self.variables = {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                          "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=3",
                          "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}

    def words(self, name: str, processes: int, *mesh: str, devices: int = 1) -> list[str]:
        return [f"--devices={devices}", f"--logs={self.folder / name}", str(processes), str(self.config),
                f"--name={name}", *self.settings, *mesh]

    def give(self, name: str, processes: int, *mesh: str, devices: int = 1) -> list[float]:
        """The losses of a run, one for each of its steps, all recorded once."""
        done = launch(self.folder, "local.sh", *self.words(name, processes, *mesh, devices=devices), **self.variables)
        assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]
        return self.losses(name)

    def losses(self, name: str) -> list[float]:
        """Since the last start."""
        records = read_metrics(self.folder / "runs" / name)
        start = max(i for i, record in enumerate(records) if record["kind"] == "start")
        trained = [record for record in records[start:] if record["kind"] == "train"]
        first = records[start]["step"] + 1
        assert [record["step"] for record in trained] == list(range(first, first + len(trained)))
        return [record["loss"] for record in trained]


def close(mine: list[float], other: list[float]) -> bool:
    assert mine and len(mine) == len(other)
    return all(abs(a - b) <= 2e-5 * abs(b) for a, b in zip(mine, other, strict=True))


def test_two_processes_give_the_losses_of_one(tmp_path):
    runs = Runs(tmp_path, steps=5)
    alone = runs.give("alone", 1)
    assert len(alone) == 5 and not close(alone[1:], alone[:-1])  # they move far more than what is allowed below
    assert close(runs.give("fsdp", 2, "--mesh.fsdp=2"), alone)
    assert close(runs.give("tensor", 2, "--mesh.tensor=2"), alone)


@pytest.mark.slow
def test_four_processes_and_their_checkpoint_elsewhere(tmp_path):
    runs = Runs(tmp_path, steps=18)
    alone = runs.give("alone", 1)
    assert close(runs.give("tensor", 4, "--mesh.tensor=4"), alone)
    assert close(runs.give("four", 4, "--mesh.fsdp=2", "--mesh.tensor=2"), alone)
    folder = tmp_path / "runs" / "four"
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "18")  # step 12 is left, written by four
    for devices, *mesh in ((1,), (2, "--mesh.fsdp=2"), (8, "--mesh.fsdp=4", "--mesh.tensor=2")):
        shutil.copytree(folder, tmp_path / "runs" / f"on{devices}")
        again = runs.give(f"on{devices}", 1, *mesh, devices=devices)
        assert len(again) == 6 and close(again, alone[12:]), devices


@pytest.mark.slow
@pytest.mark.parametrize("number,code", [(signal.SIGKILL, 137), (signal.SIGTERM, 143)])
def test_a_process_that_is_lost_is_found_again(number, code, tmp_path):
    """One of two dies, or is told to stop: all end, the loop starts them again, and the run ends as if nothing was."""
    runs = Runs(tmp_path, steps=100)
    whole = runs.give("whole", 2, "--mesh.fsdp=2")
    with subprocess.Popen([LAUNCH / "restart.sh", "--pause=0", LAUNCH / "local.sh",
                           *runs.words("two", 2, "--mesh.fsdp=2")], env=environment(tmp_path, **runs.variables),
                          cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not re.search(r"step +20/100", process.stdout.readline()):
            assert process.poll() is None
        os.kill(int((tmp_path / "pid-1").read_text()), number)
        output, said = process.communicate(timeout=900)
    assert process.returncode == 0 and said.count("again in") == 1, said + output[-3000:]
    assert f"ended with {code}; again in 0 s" in said, said
    again = runs.losses("two")
    assert len(again) < 100 and again == whole[-len(again):]  # to the last bit
