"""`lmjax audit` on a model that was made to memorise some documents and not others: it finds exactly those."""

import csv
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import random_model, write_config
from test_report import Page

from lmjax.audit import passes, texts
from lmjax.audit.probes import ProbeConfig, cut_probes, dropped_by_goldfish
from lmjax.audit.store import Parts
from lmjax.audit.texts import Text
from lmjax.cli import main
from lmjax.data import ByteTokenizer, train_bpe
from lmjax.errors import ConfigError, DataError
from lmjax.interop.hf import write_hf
from lmjax.losses.goldfish import GoldfishConfig, hash_keep
from lmjax.models import DecoderConfig

CONFIG = DecoderConfig(vocab_size=320, num_layers=1, d_model=64, num_heads=4, num_kv_heads=4, max_seq_len=128,
                       norm_eps=1e-5)
LETTERS, SIZE, EACH = "abcdefghijklmnop ", 56, 12
PREFIX, SUFFIX = 16, 24


def made_up(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), SIZE)) for _ in range(count)]


def memorised(documents: list[str], steps: int = 600) -> dict:
    """The weights of a small model after so many steps of Adam on these documents."""
    graph, params = nnx.split(random_model(CONFIG))
    params, tokenizer = nnx.to_pure_dict(params), ByteTokenizer()
    ids = np.stack([np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)]) for text in documents])
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(params):
        logits = nnx.merge(graph, params)(ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @jax.jit
    def run(state):
        def step(state, _):
            updates, rest = optimiser.update(jax.grad(loss)(state[0]), state[1])
            return (optax.apply_updates(state[0], updates), rest), None
        return jax.lax.scan(step, state, length=steps)[0][0]

    return run((params, optimiser.init(params)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that knows the members by heart, and both lists as .jsonl, the members marked as seen four times."""
    root = tmp_path_factory.mktemp("audit")
    members, others = made_up(EACH, 0), made_up(EACH, 1)
    params = memorised(members)
    write_hf(root / "model", CONFIG, params, ByteTokenizer(), add_bos=True)
    fresh = nnx.to_pure_dict(nnx.split(random_model(CONFIG, 2))[1])
    write_hf(root / "fresh", CONFIG, fresh, ByteTokenizer(), add_bos=True)
    bpe = train_bpe(["another vocabulary than that of bytes"], 280)
    write_hf(root / "bpe", CONFIG, fresh, bpe)
    write_hf(root / "mute", CONFIG, fresh)
    rows = [{"text": text, "id": f"in{i}", "count": 4} for i, text in enumerate(members)]
    rows += [{"text": text, "id": f"out{i}", "count": 0, "source": "<script>x"} for i, text in enumerate(others)]
    for name, part in (("all", rows), ("in", rows[:EACH]), ("out", rows[EACH:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def audit(folder: Path, out: str, *args: str, model: str = "model", data: str = "all.jsonl") -> int:
    return main(["audit", str(folder / model), "--data", str(folder / data), "--folder", str(folder / out),
                 "--prefix", str(PREFIX), "--suffix", str(SUFFIX), *args])


@pytest.fixture(scope="module")
def found(folder) -> dict:
    """audit.json of everything at once."""
    assert audit(folder, "out", "--members", str(folder / "in.jsonl"), "--nonmembers", str(folder / "out.jsonl"),
                 "--reference", str(folder / "fresh"), "--recall", "2", "--beams", "2") == 0
    return json.loads((folder / "out" / "audit.json").read_text())


def test_it_finds_what_was_memorised_and_nothing_else(found):
    own, control = (found["extraction"][name] for name in ("model", "control"))
    never, seen = own["by_count"]
    assert (never["count"], seen["count"]) == (0, 4)
    assert seen["exact"] == 1 and never["exact"] == 0 and control["overall"]["exact"] == 0
    assert seen["rouge_l"] == 1 and never["rouge_l"] < 0.6 and seen["exact_95"][0] > 0.7
    assert own["overall"]["base_exact"] == 0 and own["overall"]["base_rouge_l"] < 0.6
    assert own["survival"][0] == 1 and own["survival"][-1] == 0.5
    assert own["draws"]["p=0.5"][-1] == 0.5 == own["draws"]["possible"] and control["draws"]["p=0.5"][-1] == 0
    assert seen["best_beam"] == seen["in_beams"] == 1 and never["in_beams"] == 0
    assert found["disagree"] == 0


def test_membership_and_bits_agree_with_it(found):
    table = {row["attack"]: row for row in found["membership"]["attacks"]}
    assert set(table) == {"loss", "zlib", "zlib_mean", "reference", "min_k", "min_k_pp", "recall", "blind", "length"}
    assert all(table[name]["auc"] == 1 for name in ("loss", "zlib", "reference", "min_k", "min_k_pp"))
    assert table["length"]["auc"] == 0.5 and 0.2 < table["blind"]["auc"] < 0.8 and not found["membership"]["warning"]
    assert found["membership"]["nonmembers"] == EACH - 2
    bits = {row["name"]: row for row in found["bits"]["by_document"]}
    # What is learned by heart costs next to nothing; a fresh model pays for every byte of it.
    assert all(bits[f"in{i}"]["unintended_bits"] > 300 > 10 * bits[f"in{i}"]["bits"] for i in range(EACH))
    assert found["bits"]["unintended_bits"] == pytest.approx(sum(row["unintended_bits"] for row in bits.values()))


def test_the_table_has_a_row_for_each_probe(folder, found):
    with (folder / "out" / "audit.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * EACH
    for row in rows:
        seen = row["document"].startswith("in")
        assert row["exact"] == row["greedy_exact"] == str(int(seen)) and (row["count"] == "4") == seen
        assert (row["divergence"] == str(SUFFIX)) == seen and row["control_exact"] == "0"
        assert float(row["rouge_l"]) >= float(row["divergence"]) / SUFFIX - 1e-9


def test_the_page_shows_it_and_no_text_breaks_out(folder, found):
    page = (folder / "out" / "audit.html").read_text()
    assert not Page(page).faults()
    assert Page(page.replace("&lt;script&gt;x", "<script>x")).faults(), "the check must see what is not escaped"
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "<script>x" not in page and "&lt;script&gt;x" in page
    assert page.count('class="verdict yes"') >= EACH and "Membership inference" in page and "in0" in page


def test_stopped_anywhere_it_ends_with_the_same_bits(folder, found, monkeypatch, capsys):
    whole = [(folder / "out" / f"audit.{kind}").read_bytes() for kind in ("json", "csv", "html")]
    args = ["--members", str(folder / "in.jsonl"), "--nonmembers", str(folder / "out.jsonl"),
            "--reference", str(folder / "fresh"), "--recall", "2", "--beams", "2"]
    shutil.copytree(folder / "out", folder / "again")
    parts = sorted((folder / "again" / "parts").glob("*.npz"))
    assert len(parts) > 6
    for part in parts[::2]:
        part.unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:100])  # what a disk may do
    done = []
    put = Parts.put
    monkeypatch.setattr(Parts, "put", lambda self, name, arrays: (done.append(name), put(self, name, arrays))[1])
    assert audit(folder, "again", *args) == 0
    assert len(done) == len(parts[::2]) + 1
    assert whole == [(folder / "again" / f"audit.{kind}").read_bytes() for kind in ("json", "csv", "html")]
    assert audit(folder, "again") == 2  # another audit does not mix with this one
    assert "holds another audit" in capsys.readouterr().err


@pytest.mark.parametrize("args, code, words", [
    (["--suffix", "60"], 3, "a probe needs 76"),
    (["--prefix", "100", "--suffix", "60"], 2, "the model reads 128"),
    (["--prefix", "0", "--suffix", "0"], 2, "--suffix 0"),
    (["--prefix", "8", "8"], 2, "given twice"),
    (["--control", "bpe"], 2, "its tokenizer"),
    (["--reference", "bpe"], 2, "its tokenizer"),
    (["--members", "in.jsonl"], 2, "go together"),
    (["--members", "few.jsonl", "--nonmembers", "out.jsonl"], 3, "at least 5 of each"),
    (["--recall", "2"], 2, "has no effect"),
    (["--data", "empty.jsonl"], 3, "holds no document"),
    (["--data", "bad.jsonl"], 3, "bad.jsonl:3"),
    (["--data", "missing.jsonl"], 3, "missing.jsonl"),
    (["--temperature", "0"], 2, "--temperature 0"),
    (["--beams", "-1", "--limit", "0"], 2, "--limit 0"),
    (["--folder", "model"], 2, "holds other files"),
    (["--folder", "no/where"], 2, "does not exist"),
])
def test_mistakes_are_told_before_any_work(folder, args, code, words, capsys, monkeypatch):
    (folder / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "bad.jsonl").write_text('{"text": 3}\n{"text": "x", "count": -1}\n{"text": "x"\n')
    monkeypatch.chdir(folder)
    monkeypatch.setattr(passes, "probe_pass", lambda *a: pytest.fail("work was begun"))
    given = dict(zip(("--data", "--folder", "--prefix", "--suffix"), ("all.jsonl", "wrong", "16", "24"), strict=True))
    for name in given.keys() & set(args):
        given.pop(name)
    assert main(["audit", "model", *[part for pair in given.items() for part in pair], *args]) == code
    told = capsys.readouterr().err
    assert words in told and all(line.startswith("lmjax: ") for line in told.splitlines())
    assert not (folder / "wrong").exists()


def test_a_model_without_a_tokenizer_cannot_be_asked(folder, capsys):
    assert audit(folder, "wrong", model="mute") == 4
    assert "tokenizer.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_audited_on_its_own_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(write_config(tmp_path))]) == 0
    asked = ["--data", "runs/tiny", "--folder", "out", "--prefix", "16", "--suffix", "12"]
    assert main(["audit", "runs/tiny", *asked]) == 0
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    sizes = found["membership"]["members"], found["membership"]["nonmembers"]
    assert sum(sizes) == 40 and sizes[1] >= 5 and found["bits"]["documents"] == sizes[0]
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "never trained on (goldfish)" in page and re.search(r'<i class="(h\d )?d"', page) and "k = 3" in page


# ---- probes ------------------------------------------------------------------------------------------------


def test_probes_of_one_place_ask_for_the_same_suffix():
    ids = [np.arange(100 * i, 100 * i + n) for i, n in enumerate((30, 9, 12, 40))]
    probes = cut_probes(ProbeConfig((4, 6), 5, (0, 10), (0, 3)), [Text("", str(i)) for i in range(4)], ids)
    assert probes.short == 1 and len(probes.probes) == (2 + 0 + 1 + 2) * 2 * 2
    for probe in probes.probes:
        own = ids[probe.document]
        assert probe.start in (6, 16)
        np.testing.assert_array_equal(probes.suffix(probe), own[probe.start:probe.start + 5])
        prompt = probes.prompt(probe, (7,))
        assert prompt[0] == 7 and len(prompt) == 1 + probe.offset + probe.prefix
        np.testing.assert_array_equal(prompt[1 + probe.offset:], own[probe.start - probe.prefix:probe.start])
        # What stands before is of the next document, whose tokens are in the next hundred.
        assert set(prompt[1:1 + probe.offset] // 100) <= {(probe.document + 1) % 4}
    with pytest.raises(DataError, match="no other"):
        cut_probes(ProbeConfig((4,), 5, (0,), (3,)), [Text("", "x")], ids[:1])
    with pytest.raises(ConfigError, match="at least 1"):
        ProbeConfig((0,), 5).check(0, 100)


def test_dropped_tokens_are_those_of_training():
    rng = np.random.default_rng(0)
    ids, config = rng.integers(0, 50, 300).astype(np.int32), GoldfishConfig("hash", k=3, context=4)
    row = np.concatenate([rng.integers(0, 50, 20), [1], ids])[None].astype(np.int32)  # packed after another document
    segments = np.concatenate([np.full(20, 1), np.full(301, 2)])[None].astype(np.int32)
    keep = hash_keep(row[:, :-1], segments[:, :-1], k=3, context=4)[0, 20:]
    np.testing.assert_array_equal(dropped_by_goldfish(config, (1,), ids), ~keep)
    assert 0.25 < (~keep).mean() < 0.42
    assert dropped_by_goldfish(GoldfishConfig("static"), (1,), ids) is None


def test_equal_documents_are_one_and_counted(tmp_path):
    lines = ['{"text": "b", "id": 7}', '{"text": "a", "count": 2}', '{"text": "b", "count": 5}', '{"text": ""}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    read = texts.read_texts(str(tmp_path / "x.jsonl"))
    assert [(t.text, t.name, t.count) for t in read.texts] == [("b", "7", 6), ("a", "x.jsonl:2", 2)]
    assert [t.text for t in texts.read_texts(str(tmp_path / "x.jsonl"), 1).texts] == ["b"]


def test_batches_are_of_equal_lengths_and_continue_an_even_share():
    ids = [np.arange(40) for _ in range(70)]
    probes = cut_probes(ProbeConfig((4, 8), 5), [Text("", str(i)) for i in range(70)], ids)
    found = passes.batches(probes, passes.Work(continued=10, batch_tokens=260))
    assert sorted(i for part, _ in found for i in part) == list(range(140))
    assert all(len({probes.probes[i].prefix for i in part}) == 1 and set(written) <= set(part)
               for part, written in found)
    assert max(len(part) for part, _ in found) == 16  # 260 tokens hold 20 rows of 13: the power of two below
    assert sum(len(written) for _, written in found) == 20
