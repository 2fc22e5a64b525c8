"""Per-token statistics against float64 NumPy, documents of every length against one plain pass, and the alignment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, TINY, random_model

from lmjax.axes import MeshConfig, make_mesh
from lmjax.data import ByteTokenizer, train_bpe
from lmjax.errors import ConfigError, DataError, NonFiniteError
from lmjax.evals.score import SAMPLED, STATS, Sampling, Totals, logit_stats, normalised, score_documents, token_stats
from lmjax.evals.spans import token_spans
from lmjax.evals.windows import WindowConfig, cut_windows, pack, stack
from lmjax.models import RopeScaling
from lmjax.state import shardings

V = 40


def brute(z, y):
    """One prediction, float64, as the definitions say it."""
    z = z.astype(np.float64)
    logp = z - z.max() - np.log(np.exp(z - z.max()).sum())
    p = np.exp(logp)
    entropy = -(p * logp).sum()
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    return {"surprisal": -logp[y], "entropy": entropy, "varentropy": (p * (-logp - entropy) ** 2).sum(),
            "rank": order.index(y), "top_id": order[0], "top_logprob": logp[order[0]], "top_ids": order[:3],
            "top_logprobs": logp[order[:3]]}


def logits(case: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, (4, 25, V))
    if case == "ties":
        z = np.round(z)
    if case == "peaked":
        z = 30 * z + 1000
    if case == "flat":
        z = 1e-3 * z
    return z.astype(np.float32)


@pytest.mark.parametrize("case", ["plain", "ties", "peaked", "flat"])
def test_every_statistic_is_that_of_float64(case):
    z, targets = logits(case), np.random.default_rng(1).integers(0, V, (4, 25))
    found = jax.device_get(logit_stats(jnp.asarray(z), jnp.asarray(targets), top=3))
    wanted = [[brute(z[b, t], targets[b, t]) for t in range(25)] for b in range(4)]
    for name, value in found.items():
        right = np.array([[row[name] for row in rows] for rows in wanted])
        if name in ("rank", "top_id", "top_ids"):
            np.testing.assert_array_equal(value, right, err_msg=name)
        else:
            np.testing.assert_allclose(value, right, rtol=1e-4 if name == "varentropy" else 2e-5, atol=2e-6 *
                                       (case != "flat"), err_msg=name)
    if case == "ties":  # ids must decide among equals: counting only the likelier ones is another number
        strictly = (z > np.take_along_axis(z, targets[..., None], -1)).sum(-1)
        assert (strictly != found["rank"]).any()
    if case == "flat":  # E[x^2] - H^2 in float32 would be wrong here
        logp = z - z.max(-1, keepdims=True)
        logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        naive = (np.exp(logp) * logp**2).sum(-1) - (np.exp(logp) * logp).sum(-1) ** 2
        right = np.array([[row["varentropy"] for row in rows] for rows in wanted])
        assert np.abs(naive - right).max() > 100 * np.abs(found["varentropy"] - right).max()


@pytest.mark.parametrize("sampling", [Sampling(V), Sampling(5), Sampling(5, 0.5), Sampling(0, 2.0), Sampling(1)])
@pytest.mark.parametrize("case", ["plain", "ties"])
def test_the_probability_under_a_scheme_is_that_of_the_tokens_it_keeps(case, sampling):
    z, targets = logits(case), np.random.default_rng(1).integers(0, V, (4, 25))
    targets[0] = z[0].argmax(axis=-1)  # so that some are among the likeliest
    found = jax.device_get(logit_stats(jnp.asarray(z), jnp.asarray(targets), sampling=sampling))[SAMPLED]

    def right(z, y):
        kept = sorted(range(V), key=lambda i: (-z[i], i))[:sampling.top_k or V]
        weights = np.exp((z.astype(np.float64) - z.max()) / sampling.temperature)
        with np.errstate(divide="ignore"):
            return np.log(weights[y] * (y in kept) / weights[kept].sum())

    wanted = np.array([[right(z[b, t], targets[b, t]) for t in range(25)] for b in range(4)])
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    assert np.isfinite(found[0]).all() and (sampling.top_k in (0, V) or np.isinf(found[1:]).any())


def test_known_numbers():
    """A uniform choice of 15 is no surprise; a 14 % choice at a bar is not called one either."""
    uniform = {k: v[0, 0] for k, v in logit_stats(jnp.zeros((1, 1, 15)), jnp.zeros((1, 1), int)).items()}
    assert uniform["surprisal"] == pytest.approx(2.70805, abs=1e-5) == uniform["entropy"]
    assert abs(float(normalised(jax.device_get(uniform)))) < 0.05  # 0 / 0, but for rounding
    bar = np.log(np.array([0.01] * 11 + [0.25] * 3 + [0.14], np.float32))[None, None]
    fanta = jax.device_get({k: v[0, 0] for k, v in logit_stats(jnp.asarray(bar), jnp.full((1, 1), 14)).items()})
    assert [round(float(fanta[k]), 3) for k in ("surprisal", "entropy", "varentropy")] == [1.966, 1.822, 0.997]
    assert float(normalised(fanta)) == pytest.approx(0.145, abs=1e-3) and fanta["rank"] == 3
    flat = {k: np.array([v]) for k, v in {"surprisal": 3.0, "entropy": 3.0, "varentropy": 0.0}.items()}
    assert normalised(flat) == 0


# ---- documents -----------------------------------------------------------------------------------------


@functools.cache
def parts(config=TINY, seed=1):
    model = random_model(config, seed, spread=0.5)
    return nnx.split(model)[0], nnx.to_pure_dict(nnx.split(model)[1])


def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, n).astype(np.int32) for n in lengths]


@functools.partial(jax.jit, static_argnames="graphdef", compiler_options=QUICK)
def all_logits(params, tokens_BT, *, graphdef):
    return nnx.merge(graphdef, params)(tokens_BT)


def alone(ids, graphdef, params):
    """The numbers of one document that fits, by one plain pass over all its logits."""
    z = np.asarray(all_logits(params, np.pad(ids[:-1], (0, 65 - len(ids)))[None], graphdef=graphdef))
    return [brute(z[0, t], ids[t + 1]) for t in range(len(ids) - 1)]


def close(found, wanted, **tolerance):
    for name in STATS:
        right = np.array([row[name] for row in wanted])
        np.testing.assert_allclose(found[name], right, **(tolerance or dict(rtol=1e-4, atol=2e-5)), err_msg=name)


def test_documents_that_share_rows_are_scored_as_alone():
    docs = documents(5, 40, 1, 2, 17, 33, 8, 64)
    found = list(score_documents(*parts(), docs, WindowConfig(64, batch_tokens=128)))
    assert [len(stats["surprisal"]) for stats in found] == [4, 39, 0, 1, 16, 32, 7, 63]
    for ids, stats in zip(docs, found, strict=True):
        close(stats, alone(ids, *parts()))
    rows, width = next(pack([w for ids in docs for w in cut_windows(ids, 64, 32)], WindowConfig(64)))
    assert max(len(row.placed) for row in rows) > 1, "nothing was packed, so nothing was shown"
    batch = stack(rows, width)
    wrong = token_stats(*parts(), {k: batch[k] for k in ("tokens", "targets", "positions")})  # without segments
    right = token_stats(*parts(), batch)
    assert np.abs(wrong["surprisal"] - right["surprisal"])[batch["segments"] > 1].max() > 0.1


@pytest.mark.parametrize("context,stride", [(16, 16), (16, 5), (16, 1), (7, 3)])
def test_windows_predict_each_token_once_with_enough_before_it(context, stride):
    for n in (1, 2, context, context + 1, context + 2, 40, 61):
        ids, seen = np.arange(n), []
        for w in cut_windows(ids, context, stride):
            assert len(w.ids) - 1 <= context
            new = w.ids[1 + w.skip:]
            assert list(new) == list(ids[1 + w.first:1 + w.first + len(new)])
            for k, target in enumerate(new):
                before = w.skip + k + 1  # inputs that its prediction sees
                assert before == target or before >= WindowConfig(context, stride).least_context
            seen += list(new)
        assert seen == list(range(1, n))


def test_long_documents_slide():
    (ids,), windows = documents(150), WindowConfig(32, 8, batch_tokens=64)
    (found,) = score_documents(*parts(), [ids], windows)
    wanted = []
    for w in cut_windows(ids, 32, 8):
        wanted += alone(w.ids, *parts())[w.skip:]
    close(found, wanted)
    (disjoint,) = score_documents(*parts(), [ids], WindowConfig(32, 32))
    assert np.abs(disjoint["surprisal"] - found["surprisal"]).max() > 0.1, "another stride is another context"


def test_a_mesh_and_small_chunks_change_nothing():
    docs, windows = documents(40, 12, 64, 30), WindowConfig(64, batch_tokens=256)
    wanted = list(score_documents(*parts(), docs, windows, top=2))
    graphdef, params = parts()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, params, shardings(params, mesh))
        found = list(score_documents(graphdef, placed, docs, windows, mesh=mesh, top=2))
    for a, b in zip(found, wanted, strict=True):
        for name in (*STATS, "top_logprobs"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-5, err_msg=name)
    batch = stack(*next(pack(cut_windows(docs[2], 64, 64), windows)))
    whole, cut = (token_stats(graphdef, params, batch, chunk_bytes=size) for size in (2**25, 4 * 64 * 7))
    for name in STATS:
        np.testing.assert_allclose(whole[name], cut[name], rtol=1e-5, atol=1e-5)


def test_no_array_holds_the_vocabulary_for_all_tokens():
    graphdef, params = parts()
    batch = {name: jnp.zeros((8, 60), jnp.int32) for name in ("tokens", "targets")}

    def largest(size):
        text = str(jax.make_jaxpr(lambda p: token_stats(graphdef, p, batch, chunk_bytes=size))(params))
        return "8,60,64" in text or "60,8,64" in text

    assert largest(2**25) and not largest(4 * 64 * 8 * 10)


def test_dynamic_rope_takes_a_row_for_each_document():
    config = dataclasses.replace(TINY, rope_scaling=RopeScaling("dynamic", 4.0, original_len=8))
    docs = documents(40, 10)
    found = list(score_documents(*parts(config), docs, WindowConfig(64)))
    for ids, stats in zip(docs, found, strict=True):
        z = np.asarray(all_logits(parts(config)[1], ids[None, :-1], graphdef=parts(config)[0]))
        close(stats, [brute(z[0, t], ids[t + 1]) for t in range(len(ids) - 1)])


def test_totals():
    docs, said = documents(30, 9), []
    found = list(score_documents(*parts(), docs, WindowConfig(64), progress=said.append))
    totals = Totals()
    for stats in found:
        totals.add(stats, 7)
    nats = np.concatenate([stats["surprisal"] for stats in found])
    values = totals.values()
    assert said[-1] == values["tokens"] == 37 and values["bytes"] == 14
    assert values["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / 14, rel=1e-5)
    assert Totals().values()["perplexity"] is None


def test_mistakes_are_told():
    graphdef, params = parts()
    for windows in (WindowConfig(65), WindowConfig(16, 17), WindowConfig(0)):
        with pytest.raises(ConfigError, match="context"):
            list(score_documents(graphdef, params, documents(5), windows))
    with pytest.raises(DataError, match="document 1 is empty"):
        list(score_documents(graphdef, params, documents(5, 0), WindowConfig(16)))
    with pytest.raises(DataError, match="document 0: id 64 at position 2"):
        list(score_documents(graphdef, params, [np.array([1, 2, 64])], WindowConfig(16)))
    broken = dict(params, embed_VD=params["embed_VD"].at[3, 3].set(jnp.nan))
    with pytest.raises(NonFiniteError):
        list(score_documents(graphdef, broken, documents(5), WindowConfig(16)))


# ---- alignment -----------------------------------------------------------------------------------------

TEXT = "it é writes 日本\r\n\tthe 👩‍👩‍👧 and\u2028 <b>it</b>  \n\n"


@functools.cache
def bpe():
    return train_bpe(["the model reads what it wrote, and writes 1234 things it read"], 280)


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_each_character_belongs_to_the_token_that_completes_it(name):
    tokenizer = bpe() if name == "bpe" else ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    spans = token_spans(tokenizer, ids, TEXT)
    assert spans.exact and "".join(spans.pieces) == TEXT and spans.sizes.sum() == len(TEXT.encode())
    ends = np.cumsum(spans.sizes)
    for i, end in enumerate(ends):  # brute force: the characters of the bytes so far
        whole = TEXT.encode()[:end].decode("utf-8", "ignore")
        assert "".join(spans.pieces[:i + 1]) == whole and spans.starts[i] == len("".join(spans.pieces[:i]))
    assert "" in spans.pieces and [tokenizer.decode([i]) for i in ids] != spans.pieces, "the naive way would do"


def test_other_tokenizers_are_aligned_by_what_they_decode_to():
    class Lower(ByteTokenizer):
        def decode(self, ids):
            return super().decode(ids).lower()

    text = "Ä日 B"
    spans = token_spans(Lower(), Lower().encode(text), text)
    assert not spans.exact and "".join(spans.pieces) == text.lower() and spans.pieces[0] == ""
    assert token_spans(Lower(), [], "").pieces == []
