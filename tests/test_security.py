"""What lmjax never does: run what it reads, open what lies elsewhere, keep secrets, or listen."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, write_config

from lmjax.config import load_config, to_json

FILES = sorted((ROOT / "lmjax").rglob("*.py"))


# ---- code ---------------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "torch", "pty"}
NAMES = {"eval", "exec", "compile"}  # as plain names; re.compile and jit(...).compile are others
ATTRIBUTES = {"exec_module", "serialize_executable", "deserialize_and_load", "from_pretrained"}
CALLS = {("os", "system"), ("os", "popen"), ("pickle", "load"), ("torch", "load"), ("yaml", "load")}
TRUE = {"allow_pickle", "trust_remote_code", "shell", "enable_custom_ops"}
ALLOWED = {("config.py", "exec_module")}  # a .py config is code, as docs/security.md says


def risks(text: str) -> set[str]:
    """What in a Python file could run something that it reads."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.add(node.module)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & ATTRIBUTES
        elif isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Name) and f.id in NAMES:
                found.add(f.id)
            if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and (f.value.id, f.attr) in CALLS:
                found.add(f"{f.value.id}.{f.attr}")
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg in TRUE and not (isinstance(keyword.value, ast.Constant) and value is False):
                    found.add(keyword.arg)
    return found


def test_nothing_that_is_read_is_run():
    found = {(path.name, risk) for path in FILES for risk in risks(path.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "import torch.serialization", "eval('1')", "exec(open('x').read())",
    "compile('1', '', 'eval')", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=trusted)", "torch.load(f)",
    "yaml.load(f)", "os.system('x')", "subprocess.run('x', shell=True)", "load(x, trust_remote_code=True)",
    "spec.loader.exec_module(m)", "experimental.serialize_executable.serialize(c)"])
def test_the_check_sees_each_of_them(line):
    assert risks(line)
    assert not risks("re.compile('x'); jitted.lower(1).compile(); np.load(f, allow_pickle=False); import json")


def test_a_json_config_runs_nothing(tmp_path):
    """An audit hook sees every exec, compile, import and process while a config full of code is loaded."""
    config = to_json(load_config(write_config(tmp_path)))
    code = "__import__('pathlib').Path('owned').touch()"
    config["name"], config["model"]["norm"] = code, f"!!python/object/apply:os.system ['{code}']"
    config["evals"]["prompts"] = ["{{ ''.__class__.__mro__[1].__subclasses__() }}", code]
    (tmp_path / "x.json").write_text(json.dumps(config))
    (tmp_path / "x.py").write_text(f"{code}\nfrom lmjax.config import *\ndef get_config(): return RunConfig()\n")
    script = """
import os, sys
from lmjax.config import load_config
watched, seen = ("exec", "compile", "import", "subprocess.Popen", "os.system", "os.exec", "socket.connect"), []
sys.addaudithook(lambda event, args: seen.append(event) if event in watched else None)
for path in sys.argv[1:]:
    load_config(path)  # once before, for imports that come late
    seen.clear()
    load_config(path)
    print(sorted(set(seen)), os.path.exists("owned"))
"""
    done = subprocess.run([sys.executable, "-B", "-c", script, *(str(tmp_path / name) for name in ("x.json", "x.py"))],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=240)
    # The second is known to be code, so the hook must see it.
    assert done.stdout.splitlines() == ["[] False", "['compile', 'exec'] True"], done.stdout + done.stderr


# ---- a run: no secrets, no listener, no rights that the umask takes ----------------------------------------------

CANARIES = {"HF_TOKEN": "hf_canary-0123456789", "WANDB_API_KEY": "canarywandb0123456789abcdef",
            "AWS_SECRET_ACCESS_KEY": "canaryaws/0123456789+abcdef", "GITHUB_TOKEN": "ghp_canary0123456789",
            "DB_PASSWORD": "canary-password", "LMJAX_NOTE": "canary-of-any-name"}

# Runs a command and writes, from inside its loop, where this process listens.
WATCHED = """
import os, sys

def listening():
    mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")}
    found = []
    for name in ("tcp", "tcp6"):
        if os.path.exists(f"/proc/self/net/{name}"):
            for line in open(f"/proc/self/net/{name}").read().splitlines()[1:]:
                local, state, inode = line.split()[1], line.split()[3], line.split()[9]
                if state == "0A" and f"socket:[{inode}]" in mine:
                    found.append(local)
    return found

def note():
    with open(sys.argv[1], "w") as file:
        file.write(" ".join(listening()))

if sys.argv[2] == "listen":
    import socket
    server = socket.create_server(("127.0.0.1", 0))
    note()
    sys.exit(0)

from lmjax.cli import main
from lmjax.data import Batches
original = Batches.batch

def batch(self, step, *args, **kwargs):
    if step == 2:
        note()
    return original(self, step, *args, **kwargs)

Batches.batch = batch
os.umask(0o077)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run in a process of its own, with secrets in its environment: (folder, everything it printed)."""
    folder = tmp_path_factory.mktemp("secrets")
    config = write_config(folder)
    args = ["train", str(config), "--steps=4", "--checkpoint.every=2", "--evals.every=2", "--optim.warmup_steps=1"]
    env = os.environ | CANARIES | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", WATCHED, str(folder / "listening"), *args], env=env, cwd=folder,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout + done.stderr


def holding(folder: Path, words) -> list[str]:
    """Files that hold one of the words, whatever kind of file it is."""
    return [f"{path}: {word}" for path in folder.rglob("*") if path.is_file() for word in words
            if word.encode() in path.read_bytes()]


def test_no_secret_of_the_environment_is_kept_or_printed(run):
    folder, printed = run
    words = [*CANARIES.values(), "canary"]
    assert not holding(folder, words) and not [word for word in words if word in printed]
    kept = {path.name for path in (folder / "runs" / "tiny").rglob("*")}
    assert {"config.json", "environment.json", "metrics.jsonl", "meta.json"} <= kept, "there was something to look into"
    # Known wrong: the whole environment beside the run, as some tools write it.
    (folder / "planted.json").write_text(json.dumps(dict(os.environ | CANARIES)))
    assert len(holding(folder, CANARIES.values())) == len(CANARIES)
    (folder / "planted.json").unlink()


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs /proc")
def test_a_run_on_one_machine_listens_nowhere(run, tmp_path):
    folder, _ = run
    assert (folder / "listening").read_text() == ""
    subprocess.run([sys.executable, "-c", WATCHED, str(tmp_path / "seen"), "listen"], check=True, timeout=120,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "seen").read_text().startswith("0100007F:"), "the check sees a socket that is there"


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_the_umask_holds_for_everything_that_is_written(run):
    folder, _ = run
    written = [p for root in ("runs", "data") for p in (folder / root).rglob("*")]
    assert len(written) > 20
    assert not [str(p) for p in written if stat.S_IMODE(p.stat().st_mode) & 0o077]


# ---- what is in git ----------------------------------------------------------------------------------------------

SECRETS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----", "AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}\b", "Hugging Face token": r"\bhf_[A-Za-z]{30,}\b",
    "Slack token": r"\bxox[abpors]-[A-Za-z0-9-]{10,}", "Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{24,}", "PyPI token": r"\bpypi-[A-Za-z0-9_-]{50,}",
    "W&B key": r"(?i)wandb[^\n]{0,20}\b[0-9a-f]{40}\b", "password in an address": r"[a-z]+://[^/\s:@{}<]+:[^/\s:@{}<]{6,}@",
}


def secrets_in(paths) -> list[str]:
    found = []
    for path in paths:
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path}: {what}" for what, pattern in SECRETS.items() if re.search(pattern, text)]
    return found


@pytest.mark.slow
def test_no_secret_is_in_git():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(paths) > 50
    assert not secrets_in(paths)


# Put together here, so that this file holds none of them.
PLANTED = ["-----BEGIN RSA " + "PRIVATE KEY-----", "AKIA" + "ABCDEFGHIJKLMNOP", "gh" + "p_" + "a1" * 18,
           "h" + "f_" + "aB" * 17, "xox" + "b-1234567890-abc", "AI" + "za" + "b" * 35,
           "s" + "k-" + "ab1_" * 8, "py" + "pi-" + "a" * 60,
           "WANDB_API_KEY=" + "0a" * 20, "https://user:" + "secret99@host/x"]


@pytest.mark.parametrize("secret", PLANTED)
def test_a_planted_secret_is_found(secret, tmp_path):
    (tmp_path / "x.py").write_text(f"key = '{secret}'  # oh no\n")
    assert len(secrets_in([tmp_path / "x.py"])) == 1
    (tmp_path / "x.py").write_text("hf_hub_download, sk-learn, AKIA, https://host/x, 0123456789abcdef0123456789abcdef")
    assert not secrets_in([tmp_path / "x.py"])


# ---- known vulnerabilities -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_dependency_has_a_known_vulnerability(tmp_path):
    """Our own dependencies, as they are installed here, by `pip-audit` (extra "audit")."""
    if importlib.util.find_spec("pip_audit") is None:
        pytest.skip("pip-audit is not installed: pip install 'lmjax[audit]'")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w.-]+", line).group() for line in project["dependencies"]]
    (tmp_path / "r.txt").write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in names))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", "-r", str(tmp_path / "r.txt"), "--no-deps", "--disable-pip",
             "--progress-spinner=off", "--format=json", "--timeout=10"], capture_output=True, text=True, timeout=300)
        found = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        pytest.skip("the service that knows vulnerabilities does not answer")
    audited = [entry for entry in found if "skip_reason" not in entry]
    if not audited:
        pytest.skip(f"the service that knows vulnerabilities knows none of {', '.join(names)}")
    assert not {entry["name"]: [v["id"] for v in entry["vulns"]] for entry in audited if entry["vulns"]}
