"""The benchmarks' harness with contenders that report fixed numbers, and each command in its smallest form.

Nothing here depends on how quick this machine is.
"""

import json
import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest

from lmjax.bench.cases import SHAPES, Case, tokens
from lmjax.bench.output import table
from lmjax.bench.rounds import ROOT, Contender, Result, figures, ratios, run_rounds, spread
from lmjax.bench.train import NEEDS, compare
from lmjax.cli import main
from lmjax.errors import ConfigError

FIXED = """
import json, sys
name, log, fail_at, *seconds = sys.argv[1:]
print(json.dumps({"ready": True, "import_rss": 10, "import_cpu_seconds": 1, "start_cpu_seconds": 2,
                  "facts": {"kind": name}}), flush=True)
for number, line in enumerate(sys.stdin):
    if number == int(fail_at):
        sys.exit("its disk is full")
    open(log, "a").write(name)
    s, steps = float(seconds[number]), json.loads(line)["steps"]
    print(json.dumps({"seconds": s * steps, "cpu_seconds": 2 * s * steps, "idle_cpu_seconds": 0, "steps": steps,
                      "loss": s}), flush=True)
print(json.dumps({"end": True, "peak_rss": 1000}), flush=True)
"""


def fixed(name, log, seconds, fail_at=-1) -> Contender:
    """A contender that reports the given seconds of a step, round by round."""
    return Contender(name, (sys.executable, "-c", FIXED, name, str(log), str(fail_at), *map(str, seconds)))


def silent(_):
    pass


# ---- rounds --------------------------------------------------------------------------------------------


def test_rounds_alternate_and_ratios_are_taken_within_a_round(tmp_path):
    # The machine is ten times slower in round 2 and, for B alone, in round 3.
    log = tmp_path / "log"
    results = run_rounds([fixed("A", log, [1, 10, 1]), fixed("B", log, [2, 20, 30])], 3, 5, say=silent)
    assert log.read_text() == "ABABAB"
    assert ratios(results, "A")["B"]["wall"] == {"median": 2.0, "q1": 2.0, "q3": 16.0, "min": 2.0}
    found = figures(results["B"])
    assert found["seconds"]["median"] == 20 and found["cpu_seconds"]["min"] == 4
    assert found["peak_rss"] == 1000 and found["import_rss"] == 10 and found["kind"] == "B" and found["loss"] == 30
    # What would be wrong: the ratio of the medians, which the noise decides.
    assert found["seconds"]["median"] / figures(results["A"])["seconds"]["median"] == 20


def test_without_turns_one_ends_before_the_next_begins(tmp_path):
    log = tmp_path / "log"
    run_rounds([fixed("A", log, [1, 1]), fixed("B", log, [1, 1])], 2, 1, alternate=False, say=silent)
    assert log.read_text() == "AABB"


@pytest.mark.parametrize("bad, why", [
    (("-c", "import nothing_of_this_name"), "No module named 'nothing_of_this_name'"),
    (("-c", "print('hello', flush=True)"), "broke the protocol with 'hello"),
    (("-c", "from lmjax.bench.child import serve\nserve(lambda s: __import__('no_such_package'))"),
     "no_such_package is not installed"),
    (("-c", "from lmjax.bench.child import serve\nserve(lambda s: 1 / 0)"), "ZeroDivisionError: division by zero"),
    (("-c", "from lmjax.bench.child import serve\nserve(lambda s: lambda n: [][n])"), "IndexError"),
])
def test_a_contender_that_fails_does_not_end_the_others(tmp_path, bad, why):
    contenders = [Contender("bad", (sys.executable, *bad), install="pip install it"),
                  fixed("good", tmp_path / "log", [1, 1])]
    heard = []
    results = run_rounds(contenders, 2, 1, say=heard.append)
    assert why in results["bad"].failed and any(why in line for line in heard)
    assert figures(results["bad"]) == {"failed": results["bad"].failed, "install": "pip install it"}
    assert len(results["good"].rounds) == 2 and not results["good"].failed
    assert ratios(results, "good") == {} and ratios(results, "bad") == {}


def test_a_contender_that_dies_between_rounds_and_one_that_cannot_start(tmp_path):
    contenders = [fixed("dies", tmp_path / "log", [1, 1, 1], fail_at=1), Contender("none", ("/no/such/program",)),
                  fixed("good", tmp_path / "log", [1, 1, 1])]
    results = run_rounds(contenders, 3, 1, say=silent)
    assert "exit code 1: its disk is full" in results["dies"].failed and len(results["dies"].rounds) == 1
    assert "No such file" in results["none"].failed
    assert len(results["good"].rounds) == 3


def test_what_a_contender_prints_does_not_reach_the_protocol():
    noisy = """
        import os
        from lmjax.bench.child import serve
        def prepare(session):
            print("a library says hello")
            os.system("echo so does another process")
            session.imported()
            return lambda steps: print("again") or {"loss": 0.5}
        serve(prepare)
        """
    results = run_rounds([Contender("noisy", (sys.executable, "-c", textwrap.dedent(noisy)))], 1, 1, say=silent)
    assert not results["noisy"].failed
    found = figures(results["noisy"])
    assert found["loss"] == 0.5 and found["peak_rss"] >= found["import_rss"] > 2**20
    assert found["seconds"]["median"] >= 0 and found["cpu_seconds"]["median"] >= 0


HANGS = """
import os, sys, threading
import lmjax.bench.child as child
if sys.argv[1] == "wrong":
    child.die_with_parent = lambda: None
def prepare(session):
    print(os.getpid(), file=open(sys.argv[2], "w"), flush=True)
    threading.Event().wait()
child.serve(prepare)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
@pytest.mark.parametrize("variant", ["right", "wrong"])
def test_children_end_with_their_parent_however_it_ends(tmp_path, variant):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    parent = ("import sys\nfrom lmjax.bench.rounds import Contender, run_rounds\n"
              "run_rounds([Contender('hangs', (sys.executable, '-c', *sys.argv[1:]))], 1, 1)")
    process = subprocess.Popen([sys.executable, "-c", parent, HANGS, variant, str(fifo)], cwd=ROOT)
    child = os.pidfd_open(int(fifo.read_text()))
    try:
        process.kill()
        process.wait()
        ended, _, _ = select.select([child], [], [], 20 if variant == "right" else 0.2)
        assert bool(ended) == (variant == "right")
    finally:
        if variant == "wrong":
            signal.pidfd_send_signal(child, signal.SIGKILL)
        os.close(child)


def test_spread_and_table():
    assert spread([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "min": 3.0}
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0}
    assert table([("a", "bb"), ("ccc", "1")]) == "a    bb\nccc   1"


def test_figures_of_a_contender_without_rounds_are_never_asked_of_it():
    assert ratios({"A": Result("A"), "B": Result("B")}, "A") == {}


# ---- cases ---------------------------------------------------------------------------------------------


def test_tokens_follow_their_formula():
    x = tokens(64, batch=3, seq_len=20, count=2).astype(int)
    noise = (x[..., 1:] - 5 * x[..., :-1] - 7) % 64
    assert x.shape == (2, 3, 21) and noise.min() >= 0 and noise.max() == 3
    assert ((x[..., 1:] - 4 * x[..., :-1] - 7) % 64).max() > 3  # another formula is seen to be another


def test_a_case_is_what_it_says(tmp_path):
    from lmjax.bench.ours import make_case

    case = make_case("baseline", dtype="float32")
    assert (case.batch, case.seq_len, case.parameters) == (8, 512, 8_390_912)
    assert case.matrix_weights == 8_390_912 - 8192 * 256 - 9 * 256  # without the embedding and the norms
    assert case.flops_full == 6 * case.matrix_weights + 12 * 4 * 256 * 512
    assert case.flops_causal == 6 * case.matrix_weights + 12 * 4 * 256 * 513 / 2
    case.save(tmp_path)
    again = Case.load(tmp_path)
    assert again.flops_causal == case.flops_causal and again.model["windows"] == [0]


def test_every_shape_is_one_that_a_run_accepts():
    from lmjax.bench.ours import make_case, run_config
    from lmjax.config import validate

    for name in SHAPES:
        case = make_case(name, dtype="bfloat16")
        validate(run_config(case), 1)
    assert make_case("gpt2-124m", dtype="float32").parameters == 124_475_904  # 50,304 rows of vocabulary
    assert make_case("llama3-8b", dtype="float32").same_weights is False


def test_a_peer_that_computes_something_else_is_seen():
    case = Case("tiny", {}, 2, 32, "float32", "none", parameters=1000)
    ours = {"first_steps": [{"loss": 4.0, "grad_norm": 50.0}, {"loss": 3.9, "grad_norm": 40.0}]}
    same = {"first_steps": [{"loss": 4.00001, "grad_norm": 50.0001}, {"loss": 3.9, "grad_norm": 40.0}],
            "same_weights": True}
    assert compare(case, ours, same)["same"]
    wrong = {"first_steps": [{"loss": 4.0, "grad_norm": 50.01}, {"loss": 3.9, "grad_norm": 40.0}], "same_weights": True}
    assert not compare(case, ours, wrong)["same"] and "NOT the same" in compare(case, ours, wrong)["words"]
    assert compare(case, ours, {"first_steps": same["first_steps"], "same_weights": False}) is None
    assert not compare(case, ours, {"first_steps": same["first_steps"], "parameters": 999})["same_size"]


def test_the_parts_of_a_step_do_its_floating_point_operations():
    """The floor's products, counted as often as the parts say, are the FLOPs of the model."""
    from lmjax.bench.ours import make_case
    from lmjax.bench.step import list_parts, matrix_products

    case = make_case("tiny", dtype="float32", model_fields={"num_kv_heads": 1, "windows": (8, 0)})
    flops = {m.name: m.flops for m in matrix_products(case)}
    total = sum(p.times * n * flops[name] for p in list_parts(case) for name, n in p.floor.items())
    assert total == pytest.approx(case.flops_causal * case.batch * case.seq_len, rel=1e-9)
    assert total != pytest.approx(case.flops_full * case.batch * case.seq_len, rel=1e-3)


# ---- commands ------------------------------------------------------------------------------------------


def last_line(capsys) -> dict:
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"bench", "settings", "versions", "machine"} <= found.keys()
    assert {"cores", "cpu", "load_average"} <= found["machine"].keys()
    return found


@pytest.mark.parametrize("command", ["train", "step", "loss", "data", "start", "checkpoint"])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", command, "--help"])
    assert ended.value.code == 0 and "--smoke" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    assert main(["bench"]) == 0 and "usage: lmjax bench" in capsys.readouterr().out
    assert main(["bench", "speed"]) == 2 and "no such benchmark" in capsys.readouterr().err
    assert main(["bench", "train", "--against=tensorflow"]) == 2
    assert "choose from torch-eager" in capsys.readouterr().err
    assert main(["bench", "train", "--rounds=0"]) == 2 and "--rounds=0" in capsys.readouterr().err
    for args in (["loss", "--rounds=0"], ["data", "--text-mb=0"], ["start", "--config=none.py"],
                 ["checkpoint", "--folder=/no/such/folder"]):
        with pytest.raises(ConfigError):
            from lmjax.bench.commands import run_bench

            run_bench(args)


def test_help_of_bench_imports_no_jax():
    code = ("import sys; from lmjax.cli import main; main(['bench', '--help']); "
            "print('jax' in sys.modules, 'numpy' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False False\n")


@pytest.mark.slow
def test_bench_step(capsys):
    assert main(["bench", "step", "--smoke"]) == 0
    found = last_line(capsys)
    assert found["parts"].keys() >= {"embedding", "attention: core", "mlp", "loss", "optimizer"}
    assert found["parts"]["mlp"].keys() >= {"ms", "share", "floor_ms", "gap_ms", "cpu_ms"}
    assert found["host"].keys() >= {"dispatch_ms", "loop_ms", "target_ms", "met"}
    assert found["whole_step_ms"]["median"] > 0 and found["floor_ms"] > 0


def test_bench_loss(capsys):
    assert main(["bench", "loss", "--smoke", "--no-torch"]) == 0
    result = last_line(capsys)["vocabularies"]["64"]
    chunked, naive = result["contenders"]["chunked 1 MiB"], result["contenders"]["naive"]
    assert chunked["loss"] == pytest.approx(naive["loss"], rel=1e-5) and naive["peak_rss"] >= naive["before_bytes"] > 0
    assert result["ratios"].keys() == {"chunked 1 MiB"}


@pytest.mark.slow
def test_bench_decode(capsys):
    assert main(["bench", "decode", "--smoke"]) == 0
    found = last_line(capsys)["batches"]["2"]
    assert found["contenders"]["lmjax"]["seconds"]["median"] > 0
    theirs = found["contenders"]["transformers"]
    assert "failed" in theirs or found["ratios"]["transformers"]["wall"]["median"] > 0
    assert main(["bench", "decode", "--batch=one"]) == 2 and "give whole numbers" in capsys.readouterr().err


def test_bench_serve(capsys):
    assert main(["bench", "serve", "--smoke"]) == 0
    ways = last_line(capsys)["ways"]
    assert list(ways) == ["generate, one by one", "engine, 1 at once", "engine, 2 at once"]
    assert all(way["seconds"]["median"] > 0 and way["gain"]["median"] > 0 for way in ways.values())
    assert main(["bench", "serve", "--new=0"]) == 2 and "--new=0: must be at least 1" in capsys.readouterr().err


def test_bench_checkpoint(capsys, tmp_path, monkeypatch):
    assert main(["bench", "checkpoint", "--smoke", f"--folder={tmp_path}"]) == 0
    found = last_line(capsys)["sizes"]["100,000"]
    assert found["disk_bytes"] > 0.5 * found["state_bytes"] and found["restore_seconds"] > 0
    assert found.keys() >= {"stall_seconds", "step_after_save_seconds", "complete_seconds"}
    assert not list(tmp_path.iterdir())  # nothing is left behind
    monkeypatch.setattr("lmjax.bench.checkpoint.available_memory", lambda: 2.0**30)
    assert main(["bench", "checkpoint", "--params=1B"]) == 0
    assert "56 GiB of memory and 1.0 GiB are free" in last_line(capsys)["sizes"]["1,000M"]["skipped"]


def test_bench_data(capsys):
    assert main(["bench", "data", "--smoke"]) == 0
    found = last_line(capsys)
    assert {"tokenise: bytes", "tokenise: bpe", "prepare: 1 worker", "shuffle, pack: one source",
            "loader: mixture of two"} <= found["stages"].keys()
    assert all(v["tokens_per_second"]["median"] > 0 for v in found["stages"].values())
    assert 0 <= found["consumer"]["waits"]["host idle"]["share"] <= 1


def test_bench_train_alone(capsys):
    assert main(["bench", "train", "--smoke", "--against="]) == 0
    found = last_line(capsys)
    ours = found["contenders"]["lmjax"]
    assert ours["tokens_per_second"] > 0 and len(ours["first_steps"]) == 3 and found["ratios"] == {}
    assert found["case"]["flops_full"] > found["case"]["flops_causal"] > 0


@pytest.mark.slow
def test_bench_train_against_torch(capsys):
    """The peers compute what we compute; needs tests/benchmarks/requirements.txt."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peers = [name for name in NEEDS if name != "maxtext"]
    for shape in ("tiny", "gqa", "window"):
        small = ["--rounds=1", "--steps=1"] + ([] if shape == "tiny" else ["--batch=1", "--seq-len=256"])
        assert main(["bench", "train", f"--shape={shape}", f"--against={','.join(peers)}", *small]) == 0
        checks = last_line(capsys)["checks"]
        assert checks.keys() == set(peers) and all(check["same"] for check in checks.values()), checks


@pytest.mark.slow
def test_bench_processes(capsys):
    assert main(["bench", "processes", "--smoke"]) == 0
    ways = last_line(capsys)["ways"]
    assert ways.keys() == {"1 process, 1 device", "1 process, 2 devices", "2 processes, 1 device each"}
    assert all(way["seconds"]["median"] > 0 for way in ways.values())
    assert main(["bench", "processes", "--smoke", "--set=model.d_model=7"]) == 2
    assert "does not divide d_model=7" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_start(capsys):
    assert main(["bench", "start", "--smoke"]) == 0
    found = last_line(capsys)
    assert found["commands"]["lmjax --help"]["seconds"]["median"] > 0 and found["compile_by_depth"]["1"]["seconds"] > 0
