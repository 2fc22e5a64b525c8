"""The experiments on real text: masks over repeated passages, the text grid and its two readings, known texts. Their
arithmetic against brute force; the experiments themselves, small, are slow tests."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.cli import main
from lmjax.losses.goldfish import GoldfishConfig
from lmjax.models import Decoder
from lmjax.reproduce import dp_sgd, goldfish, known_texts, membership_law, onset, seeds, text_grid
from lmjax.reproduce.famous import PASSAGES
from lmjax.reproduce.figure import Curve, Panel, panels
from lmjax.reproduce.lab import Lab

# (parameters, sequences of 64 tokens, F1 predicted, F1 observed): arXiv 2505.24832, the validation of the law.
VALIDATION = ((1_556_075_200, 170_654_583, 0.55, 0.5461), (1_556_075_200, 18_851_574, 0.95, 0.9585),
              (123_702_528, 13_566_442, 0.55, 0.5344), (123_702_528, 1_498_634, 0.95, 0.9798))


# ---- masks over repeated passages ------------------------------------------------------------------------


def _rows(first: int, count: int) -> dict[str, np.ndarray]:
    tokens = np.arange(count * 97).reshape(count, 97) % 911 + first
    return {"tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32),
            "segments": np.ones((count, 96), np.int32), "positions": np.tile(np.arange(96, dtype=np.int32), (count, 1)),
            "weights": np.ones((count, 96), np.float32)}


def test_every_passage_comes_equally_often_and_only_a_mask_of_what_precedes_is_the_same_each_time():
    rest, passages = _rows(1000, 30), _rows(0, goldfish.PASSAGES)
    names = {row.tobytes(): i for i, row in enumerate(passages["tokens"])}
    steps = goldfish.PASSAGES * 4 // goldfish.REPEATED
    masks = {}
    for name in ("none", "k=4", "static k=4", "random k=4"):
        batches = goldfish._batches(rest, passages, goldfish.MASKS[name], steps, seed=3)
        assert len(batches) == steps and all(len(b["tokens"]) == 8 for b in batches)
        seen = {i: [] for i in range(goldfish.PASSAGES)}
        for batch in batches:
            for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
                if tokens.tobytes() in names:
                    seen[names[tokens.tobytes()]].append(weights)
        assert {len(each) for each in seen.values()} == {4}
        masks[name] = seen
    assert all(np.all(w) for each in masks["none"].values() for w in each)
    for name in ("k=4", "static k=4"):
        assert all(np.array_equal(w, each[0]) for each in masks[name].values() for w in each)
    shares = [np.mean(each[0] == 0) for each in masks["k=4"].values()]
    assert 0.1 < np.mean(shares) < 0.35
    together = [np.all(np.array(each) == 0, axis=0).mean() for each in masks["random k=4"].values()]
    assert np.mean(together) < 0.02, "what a random mask hides is shown another time"
    control = goldfish._batches(rest, None, GoldfishConfig("none"), 5, seed=3)
    assert not any(tokens.tobytes() in names for batch in control for tokens in batch["tokens"])


def test_expected_tokens_before_a_wrong_one_are_those_of_a_simulation():
    rng = np.random.default_rng(0)
    for k in (2, 4, 32):
        dropped = rng.random((20_000, 48)) < 1 / k
        first = np.where(dropped.any(1), dropped.argmax(1), 48)
        assert goldfish.expected(k, 48) == pytest.approx(first.mean(), rel=0.03)
        assert goldfish.expected(k, 48) == pytest.approx((k - 1) * (1 - (1 - 1 / k) ** 48))


def test_a_table_and_a_figure_of_goldfish():
    models = []
    for seed in (0, 1):
        for name in (goldfish.CONTROL, *goldfish.MASKS):
            for steps in (100, 133) if name.startswith("k=") else (100,):
                models.append({"mask": name, "seed": seed, "steps": steps, "verbatim": [48, 0], "rouge_l": [1.0, 0.5],
                               "auc": 0.9, "held_out": 4.0 + (steps > 100)})
    result = {"passages": 2, "repeats": 50, "steps": 100, "prefix": 32, "suffix": 48, "seeds": 2, "models": models}
    lines = goldfish.table(result).splitlines()
    assert len(lines) == 4 + 1 + len(goldfish.MASKS)
    assert "| k=4 | 50% (50% to 50%) | 0.0% | 0.75" in lines[-6] and "5.000" in lines[-6]
    svg = goldfish.figure(result)
    assert svg.count("<polyline") == 7 + 6 + 3 and svg.count(">(1 - 1/k)^n<") == 1


def test_a_legend_names_each_curve_once_and_leaves_out_the_nameless():
    one = Panel("a", "x", [Curve("same", [1.0], [0.5], 0), Curve("", [1.0], [0.5], 1)], [1.0])
    two = Panel("b", "x", [Curve("same", [1.0], [0.5], 0), Curve("other", [1.0], [0.5], 2)], [1.0])
    svg = panels([one, two], "t")
    assert svg.count(">same<") == svg.count(">other<") == 1 and "></text>" not in svg


# ---- differential privacy --------------------------------------------------------------------------------


def _clipped_grad(function, l2_clip_norm, batch_argnums):
    """What jax-privacy's is documented to be, as a loop over rows."""
    def clipped(params, batch, *rest, is_padding_example):
        total = jax.tree.map(jax.numpy.zeros_like, params)
        for i in range(len(is_padding_example)):
            own = jax.grad(function)(params, jax.tree.map(lambda a, i=i: a[i:i + 1], batch), *rest)
            norm = np.sqrt(1e-30) + jax.numpy.sqrt(sum(jax.numpy.sum(g**2) for g in jax.tree.leaves(own)))
            scale = jax.numpy.where(is_padding_example[i], 0.0, jax.numpy.minimum(1.0, l2_clip_norm / norm))
            total = jax.tree.map(lambda t, g, scale=scale: t + scale * g, total, own)
        return total
    return clipped


@pytest.fixture
def private_step(monkeypatch):
    """make(clipped_grad) -> step(chosen, clip, sigma): what one step of plain descent takes off the weights, times the
    batch's size."""
    import optax

    class Tokenizer:
        vocab_size, bos_id, eos_id = 300, 0, 1

    monkeypatch.setattr(dp_sgd, "make_optimizer", lambda config, steps: (optax.sgd(1.0), None))
    monkeypatch.setattr(dp_sgd, "MOST", 3)
    rows = {name: values[:, :12] for name, values in _rows(0, 9).items()}
    rows["tokens"], rows["targets"] = rows["tokens"] % 300, rows["targets"] % 300
    lab = Lab(Tokenizer(), 12)

    def make(clipped_grad):
        train = dp_sgd.trainer(goldfish.Texts(lab, [], rows, rows, rows, rows), clipped_grad, 1)

        def step(chosen, clip, sigma):
            after = train(rows, [np.array(chosen)], clip, sigma, seed=0)
            return jax.tree.map(lambda a, b: np.asarray(a - b, np.float64) * dp_sgd.BATCH, lab.fresh(0), after)

        return step

    return make


def _size(tree) -> float:
    return float(np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree))))


def test_a_private_step_is_a_sum_of_clipped_gradients_and_noise_of_the_right_size(private_step):
    step = private_step(_clipped_grad)
    loose, plain = step([1, 4], 1e9, 0.0), step([1, 4], np.inf, 0.0)
    assert _size(loose) > 2 * 0.1, "there is something to clip"
    for a, b in zip(*map(jax.tree.leaves, (loose, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for chosen in ([1], [1, 4], [1, 4, 7]):
        assert _size(step(chosen, 0.1, 0.0)) <= len(chosen) * 0.1 * 1.001
    assert _size(step([1], 0.1, 0.0)) == pytest.approx(0.1, rel=1e-3)
    noise = jax.tree.leaves(step([], 0.1, 2.0))  # noise alone: padding adds nothing
    values = np.concatenate([leaf.ravel() for leaf in noise]) / 0.1
    assert values.std() == pytest.approx(2.0, rel=0.02) and abs(values.mean()) < 0.02
    shapes = [leaf.shape for leaf in noise]
    alike = [(a, b) for i, a in enumerate(noise) for b in noise[i + 1:] if a.shape == b.shape]
    assert len(set(shapes)) < len(shapes) and not any(np.allclose(a, b) for a, b in alike), "each leaf has its own"


def test_the_librarys_clipped_gradients_are_those_of_the_loop(private_step):
    privacy = pytest.importorskip("jax_privacy")
    ours, theirs = private_step(_clipped_grad), private_step(privacy.clipped_grad)
    for chosen in ([1, 4, 7], []):
        for a, b in zip(*(jax.tree.leaves(step(chosen, 0.1, 0.0)) for step in (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_table_and_a_figure_of_dp_sgd():
    kinds = ["no protection", "goldfish k=4", "clipped, no noise", "epsilon 64", "epsilon 8"]
    models = [{"kind": kind, "seed": seed, "verbatim": [48, 0], "rouge_l": [1.0, 0.5], "auc": 0.9, "held_out": 5.0 + i}
              for i, kind in enumerate(kinds) for seed in (0, 1)]
    result = {"rows": 324, "epochs": 20, "delta": 1e-4, "seeds": 2, "noise": {8.0: 1.04, 64.0: 0.42}, "kinds": kinds,
              "models": models}
    lines = dp_sgd.table(result).splitlines()
    assert len(lines) == 4 + len(kinds)
    assert lines[-1].startswith("| epsilon 8 | 1.04 | 50% (50% to 50%) | 0.75") and "9.00" in lines[-1]
    assert dp_sgd.figure(result).count("<polyline") == 2 * 4


def test_dp_sgd_without_its_library_says_what_to_install(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    assert main(["reproduce", "dp-sgd"]) == 2 and "pip install 'lmjax[privacy]'" in capsys.readouterr().err


# ---- the text grid ---------------------------------------------------------------------------------------


@pytest.fixture
def less_text(monkeypatch):
    """The topics alone: the standard library's docstrings take ten seconds to find."""
    monkeypatch.setattr(text_grid, "_docstrings", lambda: [])
    text_grid.sequences.cache_clear()
    yield
    text_grid.sequences.cache_clear()


def test_sequences_are_different_and_held_out_ones_are_no_members(less_text):
    rows = text_grid.sequences()
    assert len(rows) > 4000 and len(np.unique(rows, axis=0)) == len(rows) and rows.max() < text_grid.VOCABULARY
    small, large = (text_grid._data(seeds.Cell(text_grid.SMALL, n, 1)) for n in (32, 256))
    assert np.array_equal(small, large[:, :32]), "each seed's data grow, so that the largest is a reference for all"
    held = {row.tobytes() for row in rows[:text_grid.HELD_OUT]}
    assert not any(row.tobytes() in held for seed in large for row in seed)
    assert not np.array_equal(large[0], large[1])


def test_nats_and_recitation_are_those_of_float64(less_text):
    graphdef, params = nnx.split(Decoder(text_grid.SMALL.model, 0))
    rows = text_grid.sequences()[:40].copy()
    logits = np.asarray(nnx.merge(graphdef, params)(np.pad(rows[:, :-1], ((0, 0), (1, 0)))), np.float64)
    rows[7, 16:] = logits[7, 16:].argmax(-1)[0]  # one more right token than chance gives, and not yet recited
    nats, right = text_grid.per_sequence(graphdef, params, rows)
    logits = np.asarray(nnx.merge(graphdef, params)(np.pad(rows[:, :-1], ((0, 0), (1, 0)))), np.float64)
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, expected.sum(1), rtol=1e-5)
    assert np.array_equal(right, (logits.argmax(-1) == rows)[:, 16:].all(1))


def test_f1_is_that_of_calling_half_members():
    rng = np.random.default_rng(0)
    assert text_grid.balanced_f1(np.arange(10.0), 100 + np.arange(30.0)) == pytest.approx(1.0)
    assert text_grid.balanced_f1(100 + np.arange(30.0), np.arange(10.0)) == pytest.approx(0.0)
    members, others = rng.normal(0, 1, 4000), rng.normal(1, 1, 4000)
    both = np.concatenate([members, others])
    called = both <= np.median(both)
    hits = called[:4000].sum()
    precision, recall = hits / called.sum(), hits / 4000
    f1 = 2 * precision * recall / (precision + recall)
    assert text_grid.balanced_f1(members, others) == pytest.approx(f1, abs=1e-3)
    assert text_grid.balanced_f1(members[:500], others) == pytest.approx(0.69, abs=0.03), "sizes do not matter"
    assert text_grid.balanced_f1(rng.normal(0, 1, 9000), rng.normal(0, 1, 3000)) == pytest.approx(0.5, abs=0.02)


def test_the_corrected_law_gives_the_papers_own_rows():
    """... and the one that is printed, with capacity over data for x, does not."""
    for params, sequences, predicted, _ in VALIDATION:
        x = sequences * 64 / params
        assert membership_law.law(x, *membership_law.PAPER) == pytest.approx(predicted, abs=0.003)
        printed = (1 + 1.34 / (1 + math.exp(0.034 * (3.6 * params / sequences - 33.14)))) / 2
        assert abs(printed - predicted) > 0.003
    assert membership_law.law(1e6, *membership_law.PAPER) == pytest.approx(0.5)
    x = np.geomspace(0.1, 30, 12)
    found = membership_law.fit(x, membership_law.law(x, 1.2, -0.8, -1.5))
    np.testing.assert_allclose(found, (1.2, -0.8, -1.5), atol=1e-3)


def _record(sequences: int, nats: list[float], test: float) -> dict:
    return {"params": 1000, "sequences": sequences, "length": 32, "train": [1.0], "test": [test],
            "train_recited": [0.5], "test_recited": [0.0], "nats": [nats], "f1": [0.9], "auc": [0.9]}


def test_bits_held_are_those_that_the_reference_does_not_know():
    shape = [_record(2, [10.0, 30.0], 4.0), _record(4, [15.0, 20.0, 25.0, 40.0], 3.0)]
    first, last = onset.analysed(shape)
    assert first["held"] == [pytest.approx((5.0 + 0) / 2 / math.log(2) * 2 / 1000)]  # 20 - 30 is no debt
    assert first["net"] == [pytest.approx((5.0 - 10.0) / 2 / math.log(2) * 2 / 1000)]
    assert last["held"] == last["net"] == [0.0]
    assert first["offered"] == pytest.approx(2 * 3.0 * 32 / math.log(2) / 1000)
    assert last["share"] == pytest.approx(last["offered"] / first["held"][0])
    assert len(onset.table([first, last]).splitlines()) == 4 and "<polyline" in onset.figure([first, last])


@pytest.mark.slow
def test_one_grid_serves_two_experiments(tmp_path, capsys):
    assert main(["reproduce", "onset", "--size", "test", "--out", str(tmp_path)]) == 0
    assert "step 60 of 60" in capsys.readouterr().err
    assert main(["reproduce", "membership-law", "--size", "test", "--out", str(tmp_path)]) == 0
    assert "step" not in capsys.readouterr().err
    result = json.loads((tmp_path / "membership-law.json").read_text())
    few, many = result["records"]
    assert min(few["f1"]) > 0.95 > 0.8 > max(many["f1"]) > 0.5


@pytest.mark.slow
def test_goldfish_stops_what_a_random_mask_leaks(tmp_path, capsys):
    assert main(["reproduce", "goldfish", "--seeds", "0"]) == 2 and "give 1 or more" in capsys.readouterr().err
    assert main(["reproduce", "goldfish", "--seeds", "1", "--out", str(tmp_path)]) == 0
    models = json.loads((tmp_path / "goldfish.json").read_text())["models"]
    recited = {m["mask"]: np.mean(np.array(m["verbatim"]) == 48) for m in models if m["steps"] == 600}
    assert recited["none"] > 0.9 and recited["random k=4"] > 0.8
    assert recited["k=4"] == recited["k=2"] == recited[goldfish.CONTROL] == 0
    assert 0.05 < recited["k=32"] < 0.5 < recited["k=128"] < 0.9


# ---- known texts -----------------------------------------------------------------------------------------


def test_known_texts_are_of_three_kinds_and_long_enough():
    lines = known_texts.texts()
    kinds = {kind: [line for line in lines if line["source"] == kind] for kind in known_texts.KINDS}
    assert len(kinds["famous"]) == len(PASSAGES) == 18 and len(kinds["control"]) >= 20
    names = {line["id"] for line in kinds["licence"]}
    assert "Apache License 2.0" in names, "JAX ships it"
    assert all(len(line["text"].split()) >= 65 for line in lines)
    assert len({line["id"] for line in lines}) == len(lines)


def test_what_is_told_of_known_texts_is_counted_right():
    def row(kind, name, prefix, exact, divergence, draws="9"):
        return {"source": kind, "document": name, "prefix": str(prefix), "exact": str(exact), "rouge_l": "0.5",
                "divergence": str(divergence), "base_rouge_l": "0.1", "control_exact": "0", "nats": "100",
                "control_nats": "500", "log10_draws_at_0.5": draws}

    rows = [row("famous", "a", p, int(p == 50), 50 if p == 50 else 3, "2" if p == 50 else "inf") for p in (10, 25, 50)]
    rows += [row("famous", "b", p, 0, 7) for p in (10, 25, 50)] + [row("control", "c", p, 0, 1) for p in (10, 25, 50)]
    cells = {(c["kind"], c["prefix"]): c for c in known_texts.cells(rows)}
    assert len(cells) == 6 and cells["famous", 50]["exact"] == cells["famous", 50]["extractable"] == 0.5
    assert cells["famous", 10]["exact"] == 0 and cells["control", 50]["divergence"] == 1
    assert [(d["document"], d["recited"], d["most"]) for d in known_texts.documents(rows)] == [
        ("a", 1, 50), ("b", 0, 7), ("c", 0, 1)]
    lines = [{"id": n, "source": s, "text": ""} for n, s in (("a", "famous"), ("c", "control"), ("d", "licence"))]
    found = known_texts.bits([{"name": n, "bits": 8.0, "bytes": b} for n, b in (("a", 4), ("c", 2), ("d", 8))], lines)
    assert found == {"licence": 1.0, "famous": 2.0, "control": 4.0}


def test_each_experiment_has_its_options():
    from lmjax.reproduce.commands import EXPERIMENTS

    for name in EXPERIMENTS:
        with pytest.raises(SystemExit) as ended:
            main(["reproduce", name, "--help"])
        assert ended.value.code == 0
    assert jax.default_backend() == "cpu"
