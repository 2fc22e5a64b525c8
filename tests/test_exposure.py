"""Exposure: the arithmetic against brute force, the scoring against plain logits, and two small runs with canaries, of
which one is kept from remembering them by the goldfish loss."""

import argparse
import csv
import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import random_model, write_corpus
from scipy import integrate, stats
from test_report import Page

from lmjax.audit import canaries as audited
from lmjax.audit.exposure import (
    CHANCE,
    Fit,
    exact_exposure,
    fit_skew_normal,
    fitted_exposure,
    rank_among,
    sampled_exposure,
)
from lmjax.audit.store import Parts
from lmjax.cli import main
from lmjax.config import (
    CanaryConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    GoldfishConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SourceConfig,
)
from lmjax.data import ByteTokenizer, Injection, train_bpe
from lmjax.data.canaries import make_canaries, written
from lmjax.errors import CheckpointError, ConfigError
from lmjax.interop.load import Opened
from lmjax.runs import all_devices
from lmjax.train import train

# ---- arithmetic ------------------------------------------------------------------------------------------


def test_ranks_are_those_of_a_sorted_list():
    rng = np.random.default_rng(0)
    bits = rng.normal(20, 3, 1000)
    order = np.sort(bits).tolist()
    for i in range(0, 1000, 37):
        others = np.delete(bits, i)
        assert rank_among(bits[i], others) == order.index(bits[i]) + 1
        assert exact_exposure(bits[i], others) == math.log2(1000) - math.log2(order.index(bits[i]) + 1)
    assert exact_exposure(0.0, bits[1:]) == math.log2(1000) and exact_exposure(99.0, bits[1:]) == 0


def test_by_chance_it_is_log2_e():
    """Over all |R| secrets of any model exposure averages log2 |R| - log2(|R|!) / |R|, which goes to log2 e."""
    bits = np.random.default_rng(1).normal(20, 3, 3000)
    mean = np.mean([exact_exposure(bits[i], np.delete(bits, i)) for i in range(len(bits))])
    assert mean == pytest.approx(math.log2(3000) - math.lgamma(3001) / math.log(2) / 3000)
    assert mean == pytest.approx(CHANCE, abs=0.01) == pytest.approx(1.4427, abs=0.01)


def test_a_model_that_cannot_tell_secrets_apart_has_no_secret():
    same = np.full(999, 7.0)
    assert exact_exposure(7.0, same) == pytest.approx(1.0, abs=0.01)
    # Known wrong: a rank that counts those in front only calls it fully exposed.
    assert math.log2(1000) - math.log2(1 + (same < 7.0).sum()) == math.log2(1000)


def test_a_sample_estimates_it_up_to_its_ceiling():
    rng = np.random.default_rng(2)
    everything = stats.skewnorm.rvs(3, 30, 6, size=100_000, random_state=3)
    sample = rng.choice(everything, 2000, replace=False)
    fit = fit_skew_normal(sample)
    assert fit.distance < 0.03
    for quantile, near in ((0.5, 0.1), (0.1, 0.2), (0.02, 0.4)):
        own = float(np.quantile(everything, quantile))
        exact = exact_exposure(own, everything)
        assert sampled_exposure(own, sample) == pytest.approx(exact, abs=near)
        assert fitted_exposure(own, fit, 100_001) == pytest.approx(exact, abs=near)
    # Beyond the sample one of them ends at log2(m + 1), and the other goes on to log2 |R| and no farther.
    own = float(stats.skewnorm.ppf(2.0**-15, 3, 30, 6))
    assert sampled_exposure(own, sample) == math.log2(2001)
    assert fitted_exposure(own, fit, 2**40) == pytest.approx(15, abs=2)
    assert fitted_exposure(-1e4, fit, 10**12) == math.log2(10**12) and fitted_exposure(1e4, fit, 10**12) == 0


@pytest.mark.parametrize("shape", [-4.0, 0.0, 3.0])
def test_the_tail_of_the_fit_is_its_integral(shape):
    for z in (-6.0, -1.0, 0.5):
        top = 2 * stats.norm.pdf(z) * stats.norm.cdf(shape * z)
        area = integrate.quad(lambda t, a=shape, b=top: 2 * stats.norm.pdf(t) * stats.norm.cdf(a * t) / b, z - 12, z,
                              points=[z - 2, z - 0.5, z - 0.1], epsabs=0, limit=200)[0] * top
        assert fitted_exposure(10 + 2 * z, Fit(shape, 10, 2, 0, 1), 2**1000) == pytest.approx(-math.log2(area), 1e-6)


def test_a_distribution_that_does_not_fit_is_seen():
    rng = np.random.default_rng(4)
    bad = fit_skew_normal(np.concatenate([rng.normal(10, 1, 1000), rng.normal(30, 1, 1000)]))
    good = fit_skew_normal(rng.normal(10, 1, 2000))
    assert bad.distance > 0.1 and bad.p < 1e-6 and good.distance < 0.03 and good.p > 0.05
    flat = fit_skew_normal(np.full(100, 5.0))
    assert flat.distance == 1 and flat.p == 0


# ---- scoring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_scores_are_the_code_lengths_of_whole_texts(kind, tmp_path):
    """Every secret of a format, one at a time, from plain logits in float64; the rank follows."""
    config = CanaryConfig("the code of {name} is {secret}, is it?", length=2, repeats=(0, 1), per_repeat=1)
    texts = [written(config, canary.name, (i, j))[0] for canary in make_canaries(config)
             for i in range(10) for j in range(10)]
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe(texts, 300)
    model = random_model(DecoderConfig(vocab_size=320, num_layers=1, d_model=32, num_heads=2, max_seq_len=64))
    graphdef, params = nnx.split(model)
    opened = Opened(tmp_path, model.config, graphdef, nnx.to_pure_dict(params), all_devices(), tokenizer,
                    (tokenizer.bos_id,))
    injection = Injection(config, tokenizer, 10, 8, 64)
    options = argparse.Namespace(candidates=100, batch_tokens=4096)
    scored = audited.score_canaries(opened, injection, options, Parts(tmp_path / "out", {}))
    logits_of = jax.jit(lambda ids: model(ids))
    for canary, ids, got in zip(injection.canaries, injection.ids, scored, strict=True):
        right = {}
        for i in range(10):
            for j in range(10):
                encoded = tokenizer.encode(written(config, canary.name, (i, j))[0])
                whole = np.concatenate([[tokenizer.bos_id], encoded, [tokenizer.eos_id]])
                padded = np.pad(whole, (0, 64 - len(whole)))  # what follows is not seen
                logits = np.asarray(logits_of(padded[None]), np.float64)[0, :len(whole) - 1]
                shifted = logits - logits.max(axis=1, keepdims=True)
                log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
                right[i, j] = -log_p[np.arange(len(whole) - 1), whole[1:]].sum() / np.log(2)
        own = right.pop(canary.secret)
        assert got["own"] == pytest.approx(own, rel=1e-5) and len(got["others"]) == 99
        np.testing.assert_allclose(np.sort(got["others"]), np.sort(list(right.values())), rtol=1e-5)
        assert rank_among(float(got["own"]), got["others"]) == 1 + sum(bits < own for bits in right.values())
        where = audited.secret_tokens(tokenizer, canary, ids)
        spelt = tokenizer.decode(ids[where])
        assert canary.text[canary.start:canary.stop] in spelt and tokenizer.decode(ids[:where.start]) + spelt + (
            tokenizer.decode(ids[where.stop:])) == canary.text
        assert canary.text[canary.start:canary.stop] not in tokenizer.decode(ids[where][1:])
    # Done once, nothing is scored again.
    again = audited.score_canaries(None, injection, argparse.Namespace(candidates=100), Parts(tmp_path / "out", {}))
    assert all(np.array_equal(a["others"], b["others"]) for a, b in zip(again, scored, strict=True))


# ---- whole runs ------------------------------------------------------------------------------------------


def run_config(folder, name: str, goldfish: GoldfishConfig) -> RunConfig:
    return RunConfig(
        name=name, run_root=str(folder / "runs"), steps=200, batch_size=16, seq_len=40,
        model=DecoderConfig(num_layers=1, d_model=64, num_heads=4, max_seq_len=64),
        objective=PretrainConfig(goldfish),
        data=DataConfig((SourceConfig("text", str(folder / "text")),), cache_dir=str(folder / "data"), workers=1,
                        validation_fraction=0.1,
                        canaries=CanaryConfig("{name} {secret}", length=2, repeats=(0, 64), per_repeat=8)),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=20), evals=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=100, keep=2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, exposure.json by run): one run that may remember, one trained with every second target dropped."""
    folder = tmp_path_factory.mktemp("exposure")
    write_corpus(folder / "text", 60)
    found = {}
    for name, goldfish in (("free", GoldfishConfig()), ("goldfish", GoldfishConfig("hash", k=2, context=4))):
        run = train(run_config(folder, name, goldfish))
        assert main(["audit", "exposure", str(run), "--folder", str(folder / name)]) == 0
        found[name] = json.loads((folder / name / "exposure.json").read_text())
    return folder, found


def test_what_was_repeated_is_exposed_and_what_was_never_seen_is_not(runs):
    _, found = runs
    never, often = found["free"]["by_count"]
    assert (never["count"], never["seen"], often["count"], often["seen"]) == (0, 0, 64, 64)
    assert found["free"]["exact"] and found["free"]["ceiling"] == math.log2(100)
    assert often["exposure"] > 0.95 * math.log2(100) and often["extracted"] > 0.9
    assert 0.4 < never["exposure"] < 2.8 and never["extracted"] < 0.2  # 1.44 and four standard errors of 0.4 or so
    hidden = found["goldfish"]["by_count"][1]
    assert hidden["exposure"] < 0.8 * often["exposure"] and hidden["extracted"] < 0.6
    assert found["goldfish"]["by_count"][0]["exposure"] < 2.8


def test_its_files_agree_and_the_audit_takes_them(runs, capsys):
    folder, found = runs
    with (folder / "free" / "exposure.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 16 and [float(row["exposure"]) for row in rows] == [
        row["exposure"] for row in found["free"]["canaries"]]
    page = (folder / "free" / "exposure.html").read_text()
    assert not Page(page).faults()
    assert found["free"]["canaries"][0]["text"] in page
    texts = [json.loads(line) for line in (folder / "free" / "canaries.jsonl").read_text().splitlines()]
    assert [text["count"] for text in texts] == [0] * 8 + [64] * 8
    # The names are 13 bytes, a space follows, and the secret is the suffix.
    assert main(["audit", str(folder / "runs" / "free"), "--data", str(folder / "free" / "canaries.jsonl"), "--folder",
                 str(folder / "extraction"), "--prefix", "14", "--suffix", "2", "--control", "none",
                 "--continuations", "0"]) == 0
    audit = json.loads((folder / "extraction" / "audit.json").read_text())["extraction"]["model"]
    assert [(cell["count"], cell["exact"]) for cell in audit["by_count"]] == [
        (cell["count"], cell["extracted"]) for cell in found["free"]["by_count"]]
    assert "64 x" in page and capsys.readouterr().out


def test_an_earlier_checkpoint_and_a_sample(runs, capsys):
    """Half of the run; and fewer candidates than there are secrets, of which 19 are too few for anything."""
    folder, found = runs
    assert main(["audit", "exposure", str(folder / "runs" / "free"), "--folder", str(folder / "half"), "--step",
                 "100"]) == 0
    half = json.loads((folder / "half" / "exposure.json").read_text())
    assert half["by_count"][1]["seen"] == 32 and "step 100 of 200: 256 of 512 occurrences are past" in half["notes"][0]
    said = capsys.readouterr().out
    assert "so far" in said and "32.0" in said
    assert main(["audit", "exposure", str(folder / "runs" / "free"), "--folder", str(folder / "no"), "--candidates",
                 "19"]) == 2
    assert not (folder / "no").exists()
    assert main(["audit", "exposure", str(folder / "runs" / "free"), "--folder", str(folder / "some"), "--candidates",
                 "50"]) == 0
    some = json.loads((folder / "some" / "exposure.json").read_text())
    never, often = some["by_count"]
    assert not some["exact"] and some["sample_ceiling"] == math.log2(51)
    assert often["exposure_sampled"] > 0.95 * math.log2(51) and often["exposure"] > often["exposure_sampled"]
    for row, exact in zip(some["canaries"], found["free"]["canaries"], strict=True):
        if row["count"] == 0:
            assert row["exposure_sampled"] == pytest.approx(exact["exposure"], abs=2)
    assert never["fit_distance"] < 0.3 and not Page((folder / "some" / "exposure.html").read_text()).faults()


def test_what_has_no_canaries_is_refused(runs, tmp_path):
    folder, _ = runs
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / "free", run)
    config = json.loads((run / "config.json").read_text())
    for change, error, words in ((None, ConfigError, "trained without canaries"),
                                 ({"seed": 1}, CheckpointError, "other canaries")):
        changed = change and config["data"]["canaries"] | change
        (run / "config.json").write_text(json.dumps(config | {"data": config["data"] | {"canaries": changed}}))
        with pytest.raises(error, match=words):
            audited.exposure(argparse.Namespace(run=str(run), step=0))
