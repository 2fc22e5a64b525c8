"""Text in, text out: what `lmjax generate` does with a model and a tokenizer, by any of the decoding methods.

What lives here: a request in words, which settings go together, and printing as it goes. The methods themselves are
`generate`, `beam` and `speculative`; opening runs is `lmjax.runs`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from lmjax.decode.beam import beam_search
from lmjax.decode.generate import complete, stream
from lmjax.decode.marks import Watermark
from lmjax.decode.processors import SampleConfig, active
from lmjax.decode.speculative import speculate
from lmjax.decode.watermark import problems as watermark_problems
from lmjax.errors import ConfigError
from lmjax.nn.cache import CacheConfig

DRY_BREAKERS = ("\n", ":", '"', "*")  # over which DRY sees no repetition, as in its first description


@dataclasses.dataclass
class TextRequest:
    """prompts are continued together. stop: strings that end a text. beams 0: sample
    (or greedy); more: beam search. proposals: tokens that a draft model proposes at a time, where one is given."""

    prompts: tuple[str, ...] = ("",)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    seed: int = 0
    stop: tuple[str, ...] = ()
    beams: int = 0
    length_penalty: float = 1.0
    proposals: int = 4
    stream: bool = False
    watermark: Watermark | None = None

    def problems(self, draft: bool = False) -> list[str]:
        bad = self.sample.problems("generate") + self.cache.problems("cache")
        if not 0 <= self.seed < 2**32:
            bad.append(f"--seed {self.seed}: must be from 0 to 2^32 - 1")
        if "" in self.stop:
            bad.append("--stop '': an empty string would end every text at once; leave it out")
        if self.beams < 0:
            bad.append(f"--beams {self.beams}: must not be negative; 0 samples")
        if draft and self.proposals < 1:
            bad.append(f"--proposals {self.proposals}: must be at least 1")
        if self.sample.temperature == 0:
            default = SampleConfig()
            bad += [f"generate.{name}={getattr(self.sample, name)} has no effect with --temperature 0; leave it out"
                    for name in ("top_k", "top_p", "min_p", "typical_p")
                    if getattr(self.sample, name) != getattr(default, name)]
        if self.beams > 0 and (self.sample.temperature != 0 or active([self.sample]).history):
            bad.append("--beams draws nothing and takes no penalties: give --temperature 0 with it and leave them out")
        for one, name in ((self.beams > 0, "--beams"), (draft, "--draft")):
            bad += [f"{name} cannot be used with {other}; leave one out" for on, other in (
                (self.stop, "--stop"), (self.stream, "--stream"), (self.watermark, "--watermark")) if one and on]
        if self.watermark is not None:
            bad += watermark_problems([self.watermark], [self.sample.temperature])
        if self.sample.stop_loops and (self.beams > 0 or draft):
            bad.append(f"--stop-loops cannot be used with {'--beams' if self.beams > 0 else '--draft'}; leave one out")
        if not self.sample.stop_loops and self.sample.loop_period != SampleConfig().loop_period:
            bad.append(f"--loop-period {self.sample.loop_period} has no effect without --stop-loops; leave it out")
        if self.beams > 0 and draft:
            bad.append("--beams cannot be used with --draft; leave one out")
        if not self.beams and self.length_penalty != 1:
            bad.append(f"--length-penalty {self.length_penalty} has no effect without --beams; leave it out")
        return bad


def write(request: TextRequest, graphdef: nnx.GraphDef, params, tokenizer: Any, ids: list[np.ndarray],
          say: Callable[[str], None], draft: tuple[nnx.GraphDef, Any] | None = None) -> None:
    """Says every prompt with its continuation, by calls of `say` with pieces of text. ids: of the prompts, begun as
    the model's texts begin.

    Raises ConfigError for settings that do not go together, and what `generate.complete` raises.
    """
    if problems := request.problems(draft is not None):
        raise ConfigError(*problems)
    common = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "cache": request.cache}
    key = jax.random.key(request.seed)
    if request.beams:
        found = beam_search(graphdef, params, ids, beams=request.beams, length_penalty=request.length_penalty,
                            max_new_tokens=request.sample.max_new_tokens, **common)
        for prompt, beams in zip(request.prompts, found, strict=True):
            for beam in beams:
                say(f"{prompt}{tokenizer.decode(beam.tokens)}\n--- score {beam.score:.4f} ---\n")
        return
    if draft is not None:
        result = speculate(graphdef, params, *draft, ids, request.sample, key=key, proposals=request.proposals,
                           **common)
        for prompt, done in zip(request.prompts, result.completions, strict=True):
            say(f"{prompt}{tokenizer.decode(done.tokens)}\n")
        say(f"--- accepted {result.accepted} of {result.proposed} proposed tokens ({result.acceptance:.0%}) ---\n")
        return
    common |= {"key": key, "stop_strings": request.stop, "text_of": tokenizer.decode,
               "watermark": request.watermark}
    if request.sample.dry_multiplier:
        common["dry_breakers"] = breakers(tokenizer)
    if not request.stream:
        whole = complete(graphdef, params, ids, request.sample, **common)
        for prompt, done in zip(request.prompts, whole, strict=True):
            say(f"{prompt}{done.text}\n")
        return
    for row, prompt in enumerate(request.prompts):  # one after another: a row's tokens do not depend on the others
        say(prompt)
        for piece in new_text(stream(graphdef, params, ids[row:row + 1], request.sample, rows=[row], **common)):
            say(piece)
        say("\n")


def new_text(pieces: Iterator[list]) -> Iterator[str]:
    """Of a stream of one row: the text that each piece adds, leaving out characters that are not whole yet."""
    said = 0
    for (row,) in pieces:
        text = row.text if row.finish else row.text.rstrip("\ufffd")
        if len(text) > said:
            yield text[said:]
            said = len(text)


def breakers(tokenizer: Any) -> list[int]:
    """Ids of the tokens whose text holds one of DRY_BREAKERS."""
    return [i for i in range(tokenizer.vocab_size) if any(b in tokenizer.decode([i]) for b in DRY_BREAKERS)]
