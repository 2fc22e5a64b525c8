"""Text in, text out: what is said is the same however it is decoded and printed; wrong mixtures are refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import TINY, random_model

from lmjax.data.tokenizers import ByteTokenizer
from lmjax.decode.generate import Completion, generate
from lmjax.decode.processors import SampleConfig
from lmjax.decode.write import TextRequest, breakers, new_text, write
from lmjax.errors import ConfigError

TOKENIZER = ByteTokenizer()
SAMPLE = SampleConfig(24, 1.0, top_p=1.0)


@functools.cache
def model(seed=1):
    graphdef, state = nnx.split(random_model(dataclasses.replace(TINY, vocab_size=320, tied=False), seed, spread=0.5))
    return graphdef, nnx.to_pure_dict(state)


def said(draft=None, **fields):
    """(all the text, the pieces that it came in)"""
    pieces = []
    request = TextRequest(**{"prompts": ("ab",), "sample": SAMPLE} | fields)
    ids = [np.array([256, *prompt.encode()]) for prompt in request.prompts]
    write(request, *model(), TOKENIZER, ids, pieces.append, draft)
    return "".join(pieces), pieces


def test_the_text_is_that_of_the_tokens():
    ids = [np.array([256, *prompt.encode()]) for prompt in ("ab", "c")]
    out = generate(*model(), ids, SAMPLE, key=jax.random.key(3), vocab_size=257, eos_id=256)
    right = [prompt + TOKENIZER.decode(o) + "\n" for prompt, o in zip(("ab", "c"), out, strict=True)]
    assert said(prompts=("ab", "c"), seed=3)[0] == "".join(right)
    streamed, pieces = said(prompts=("ab", "c"), seed=3, stream=True)
    assert streamed == "".join(right) and len(pieces) > 6
    assert said(prompts=("ab", "c"), seed=4)[0] != streamed


def test_stops_and_penalties():
    text = said()[0]
    assert said(stop=(text[10:12],))[0] == text[:text.index(text[10:12], 2)] + "\n"
    firm = dataclasses.replace(SAMPLE, no_repeat_ngram=1, dry_multiplier=0.8)
    body = said(sample=firm)[0]
    tokens = body[2:-1].replace("\ufffd", "")
    assert len(set(tokens)) == len(tokens) and "a" not in tokens


def test_beams_and_draft():
    greedy = dataclasses.replace(SampleConfig(8), temperature=0.0)
    beams = said(sample=greedy, beams=3, prompts=("ab", "c"))[0]
    assert beams.count("--- score -") == 6
    plain = said(sample=greedy)[0]
    drafted = said(sample=greedy, draft=model(2))[0]
    assert drafted.startswith(plain) and "proposed tokens" in drafted


def test_characters_that_are_not_whole_are_held_back():
    texts = ["a", "a\ufffd", "aé", "aé\ufffd"]
    rows = [[Completion(np.zeros(i), "" if i < 3 else "length", text)] for i, text in enumerate(texts)]
    assert list(new_text(iter(rows))) == ["a", "é", "\ufffd"]


def test_breakers():
    assert breakers(TOKENIZER) == sorted(map(ord, '\n:"*'))


@pytest.mark.parametrize("fields,words", [
    ({"sample": SampleConfig(top_p=0.0)}, ["generate.top_p=0.0"]),
    ({"seed": -1}, ["--seed -1"]), ({"stop": ("",)}, ["--stop ''"]), ({"beams": -1}, ["--beams -1"]),
    ({"beams": 2}, ["--temperature 0"]),
    ({"beams": 2, "sample": SampleConfig(temperature=0.0, presence_penalty=1.0)}, ["takes no penalties"]),
    ({"beams": 2, "sample": SampleConfig(temperature=0.0), "stop": ("x",), "stream": True}, ["--stop", "--stream"]),
    ({"sample": SampleConfig(temperature=0.0, top_k=5, min_p=0.1)},
     ["generate.top_k=5 has no effect", "generate.min_p=0.1"]),
    ({"length_penalty": 2.0}, ["--length-penalty 2.0 has no effect"]),
])
def test_what_is_refused(fields, words):
    with pytest.raises(ConfigError) as caught:
        said(**fields)
    assert len(caught.value.problems) == len(words)
    for word, problem in zip(words, caught.value.problems, strict=True):
        assert word in problem


def test_a_draft_goes_with_few_things():
    with pytest.raises(ConfigError) as caught:
        said(draft=model(2), stop=("x",), stream=True, proposals=0)
    assert len(caught.value.problems) == 3
