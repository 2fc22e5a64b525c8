"""The experiments' parts against brute force; the experiments themselves, small, are slow tests."""

import json

import numpy as np
import pytest

from lmjax.cli import main
from lmjax.data import train_bpe
from lmjax.losses.goldfish import TABLE_SIZE, hash_table_keep
from lmjax.reproduce import lab, near_duplicates, product_hash
from lmjax.reproduce.figure import Curve, Panel, panels


def test_what_is_measured_is_the_mask_that_is_trained_with():
    ids = np.random.default_rng(0).integers(0, 4096, 5000)
    for context in (4, 13, 50):
        found = product_hash.measure(ids, context)
        for k in product_hash.KS:
            keep = hash_table_keep(ids[None].astype(np.int32), k=k, context=context)[0, context - 1:]
            assert found[f"published_{k}"]["rate"] == pytest.approx(1 - keep.mean(), abs=1e-12)
            gaps = [len(run) for run in "".join("01"[bool(b)] for b in keep).split("0")]
            assert found[f"published_{k}"]["longest_gap"] == max(gaps)


def test_zero_products_are_what_a_count_of_twos_predicts():
    """Uniform ids, with Python's unbounded integers; and a count of twos that forgot the id 0 would be seen."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 256, 100_000)
    for context in (4, 25, 50):
        keys = product_hash.published_keys(ids, context)
        for i in rng.integers(0, len(keys), 50):
            exact = 1
            for value in ids[i:i + context].tolist():
                exact *= value
            assert (int(keys[i]) - exact) % 2**64 == 0
        expected = product_hash.expected_zero(ids, context)
        assert (keys == 0).mean() == pytest.approx(expected, rel=0.1)
    assert product_hash.expected_zero(ids[ids > 0], 4) < 0.1 * product_hash.expected_zero(ids, 4)


def test_entropy_of_a_good_index_is_near_its_limit():
    ids = np.random.default_rng(2).integers(0, 50257, 200_000)
    assert product_hash.measure(ids, 4)["entropy"] > np.log2(200_000) - 1 > 16 and TABLE_SIZE == 1_000_003
    assert product_hash.measure(ids, 100)["entropy"] < 3, "the degenerate one is seen"


def test_copies_are_the_same_words_and_only_words_hide_them():
    from lmjax.data.normal import units

    passages, background, held_out = lab.prose(2, 75)
    assert not any(passage[:60] in " ".join(text.split()) for passage in passages for text in background + held_out)
    tokenizer = train_bpe(background[:10], 600)
    for kind in near_duplicates.KINDS:
        copies = near_duplicates.copies(passages[0], kind, 0)
        assert len({(text, cuts.tobytes()) for text, cuts in copies}) > 1
        for copy in copies:
            words = units(copy[0]).words
            assert words == units(passages[0]).words
            assert tokenizer.decode(near_duplicates.encode(copy, tokenizer)) == copy[0]
    hidden = near_duplicates.hidden_shares(passages, "all", tokenizer)
    assert hidden["text_hash"] > 0.15 and hidden["hash"] < 0.03 and hidden["hash_table"] < 0.03 and not hidden["none"]


def test_the_command_and_its_figure(tmp_path, capsys):
    assert main(["reproduce"]) == 0 and "product-hash" in capsys.readouterr().out
    assert main(["reproduce", "nosuch"]) == 2 and "near-duplicates" in capsys.readouterr().err
    assert main(["reproduce", "near-duplicates", "--seeds", "0", "--steps", "0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    small = ["--tokens", "20000", "--vocabularies", "257", "--out", str(tmp_path)]
    assert main(["reproduce", "product-hash", *small]) == 0
    rows = json.loads((tmp_path / "product-hash.json").read_text())["rows"]
    assert [row["context"] for row in rows] == list(product_hash.CONTEXTS)
    svg = (tmp_path / "product-hash.svg").read_text()
    assert svg.count("<polyline") == 6 and "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert "&lt;" in panels([Panel("<", "x", [Curve("a", [1.0], [0.5], 0)], [1.0])], "t")


@pytest.mark.slow
def test_near_duplicates_leak_without_a_mask_of_words(tmp_path):
    """One model of each kind, a few minutes."""
    assert main(["reproduce", "near-duplicates", "--seeds", "1", "--out", str(tmp_path)]) == 0
    models = {m["strategy"]: m for m in json.loads((tmp_path / "near-duplicates.json").read_text())["models"]}
    words = {name: np.mean(m["words_right"]) for name, m in models.items()}
    assert words["none"] > words["text_hash"] + 4 and words["hash"] > words["text_hash"]
