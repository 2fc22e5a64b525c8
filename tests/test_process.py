"""What the command sets before JAX starts: huge pages by starting itself again, and the folder of compiled programs."""

import os
import stat
import subprocess
import sys
import zlib

import pytest

from lmjax.process import drop_damaged

PRINT = "import os, sys; from lmjax import process; {}; print(os.environ.get('{}'), sys.argv[1:])"


def run(call: str, name: str, **env) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "JAX_COMPILATION_CACHE_DIR")}
    return subprocess.run([sys.executable, "-c", PRINT.format(call, name), "a b", "--c"], env=kept | env,
                          capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_huge_pages_keep_the_arguments_and_what_is_set():
    assert run("process.on_huge_pages()", "GLIBC_TUNABLES") == "glibc.malloc.hugetlb=1 ['a b', '--c']"
    kept = run("process.on_huge_pages()", "GLIBC_TUNABLES", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert kept == "glibc.malloc.hugetlb=0 ['a b', '--c']"


def test_compiled_programs_are_kept_in_the_users_own_folder(tmp_path):
    call, name = "process.keep_compiled_programs()", "JAX_COMPILATION_CACHE_DIR"
    folder = run(call, name, XDG_CACHE_HOME=str(tmp_path)).split(" ")[0]
    assert folder.startswith(str(tmp_path)) and stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert run(call, name, JAX_COMPILATION_CACHE_DIR="") == "['a b', '--c']", "set to nothing: nothing is kept"
    (tmp_path / "file").touch()
    assert run(call, name, XDG_CACHE_HOME=str(tmp_path / "file")).startswith("None"), "cannot be made: goes on without"


def test_half_a_program_is_dropped(tmp_path):
    whole = zlib.compress(os.urandom(5000))
    flipped = whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]
    for name, data in (("a", whole), ("half", whole[:2000]), ("flip", flipped), ("zstd", b"\x28\xb5\x2f\xfd")):
        (tmp_path / f"{name}-cache").write_bytes(data)
    (tmp_path / "notes").write_bytes(b"\x78 no program")
    drop_damaged(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a-cache", "zstd-cache", "notes", "checked"}
    drop_damaged(tmp_path / "nothing")
