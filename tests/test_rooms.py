"""Imports go downwards only; `lmjax --help` needs no JAX; the data room and the report never import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Room -> floor. A file may import its own room, and rooms of lower floors.
FLOORS = {
    "errors": 0, "axes": 0, "hlo": 0, "tree": 0, "process": 0, "hashing": 0,
    "collectives": 1, "hosts": 1, "records": 1, "lease": 1, "phases": 1, "guard": 1, "plain": 1,
    "nn": 1, "losses": 1.5, "data": 1, "optim": 1, "flops": 1, "log": 2,
    "models": 2, "loader": 2,
    "state": 3, "checkpoint": 3, "decode": 3, "objectives": 3,
    "config": 4,
    "step": 5, "evals": 5, "interop": 5, "plan": 5.5,  # between the step that it compiles and the loop that shows it
    "train": 6, "runs": 6, "report": 6,
    "serve": 7, "analyze": 7, "chaos": 7, "watermark": 7,
    "audit": 8, "bench": 8,
    "reproduce": 9,
    "cli": 10, "__main__": 11,
}
NO_JAX = ("errors", "hlo", "collectives", "process", "hashing", "lease", "phases", "records", "plain", "log", "data",
          "report", "cli")


def room(path: Path) -> str:
    return path.relative_to(ROOT / "lmjax").parts[0].removesuffix(".py")


def imports(path: Path):
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "lmjax":
                yield from (f"lmjax.{alias.name}" for alias in node.names)


def violations(path: Path, own: str, names) -> list[str]:
    found = []
    for name in names:
        parts = name.split(".")
        if parts[0] == "lmjax" and len(parts) > 1:
            other = parts[1]
            if other != own and FLOORS[other] >= FLOORS[own]:
                found.append(f"{path}: {own} imports {other}")
        if own in NO_JAX and parts[0] in ("jax", "flax", "optax", "orbax"):
            found.append(f"{path}: {own} imports {parts[0]}")
    return found


FILES = sorted(p for p in (ROOT / "lmjax").rglob("*.py") if p != ROOT / "lmjax" / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert not violations(path, room(path), imports(path))


def test_a_wrong_import_would_be_seen():
    assert violations(Path("x"), "losses", ["lmjax.models.decoder"])
    assert violations(Path("x"), "data", ["jax.numpy"])
    assert not violations(Path("x"), "models", ["lmjax.nn.norm", "lmjax.axes", "jax"])


def test_configs_import_the_config_only():
    for path in (ROOT / "configs").glob("*.py"):
        assert set(imports(path)) <= {"lmjax.config"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_open_with_a_docstring_and_stay_short(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} says nothing about what lives there"
    assert len(text.splitlines()) <= 500, f"{path} is long; would two rooms read better?"


def test_no_code_from_data():
    """No pickle, no eval or exec of text, no remote code, anywhere."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", "")
            assert not (isinstance(node, ast.Call) and name in ("eval", "exec")), path
            for keyword in getattr(node, "keywords", []):
                wrong = keyword.arg in ("allow_pickle", "trust_remote_code")
                assert not (wrong and getattr(keyword.value, "value", None) is True), path
        assert not set(imports(path)) & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, path


def test_help_imports_no_jax():
    code = ("import sys; from lmjax.cli import main; main(['--help']); "
            "print(sorted(m for m in sys.modules if m in ('jax', 'numpy', 'flax')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "usage: lmjax" in done.stdout
