"""One model as it is served: its engine, tokenizer, chat template and limits, and requests turned into jobs.

No HTTP here (`app`), and no device (`batch`).
"""

import dataclasses
import functools
import secrets
import time
from collections.abc import Callable

import numpy as np

from lmjax.data.chat import ChatTemplate
from lmjax.data.pieces import token_pieces
from lmjax.errors import DataError
from lmjax.interop.load import Opened
from lmjax.serve.batch import Row
from lmjax.serve.engine import Engine, Job, Update
from lmjax.serve.protocol import Limits, Request, RequestError


@dataclasses.dataclass
class Served:
    """template None: chats are refused, and no_template says why. name: by which clients call the model."""

    opened: Opened
    engine: Engine
    name: str
    template: ChatTemplate | None = None
    no_template: str = ""
    limits: Limits = dataclasses.field(default_factory=Limits)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        return token_pieces(self.opened.tokenizer)

    def check_name(self, name: str | None) -> None:
        """Raises RequestError where a client means another model."""
        if name not in (None, self.name):
            raise RequestError(f"model={name[:100]!r}: is not here; this server has {self.name!r}", "model", status=404,
                               code="model_not_found")

    def prompts(self, request: Request) -> list[np.ndarray]:
        """int32 ids of each prompt. Raises RequestError for one that the model cannot continue."""
        field = "messages" if request.chat else "prompt"
        if request.logprobs >= 0:
            _ = self.pieces  # made here, in a thread of the pool, and not while the others' answers wait
        try:
            if request.chat:
                if self.template is None:
                    raise RequestError(self.no_template, "messages", code="no_chat_template")
                prompts = [self.template.ids(request.messages)]
            else:
                prompts = [self._ids(prompt) for prompt in request.prompts]
        except DataError as error:
            raise RequestError(str(error), field) from None
        for prompt in prompts:
            length, wanted, most = len(prompt), request.max_tokens, self.engine.context
            if not length:
                raise RequestError(f"{field}: gives no token at all; send a text", field)
            if length + max(wanted, 1) > most:
                raise RequestError(
                    f"{field}: {length} tokens" + (f" and {wanted} new ones" if wanted else "") + f" do not fit into "
                    f"the context of {most}; shorten it" + (" or lower max_tokens" if wanted else ""), field,
                    code="context_length_exceeded")
        return prompts

    def _ids(self, prompt: str | list[int]) -> np.ndarray:
        if isinstance(prompt, str):
            return self.opened.encode(prompt)
        vocab_size = self.opened.tokenizer.vocab_size
        for at, token in enumerate(prompt):
            if not 0 <= token < vocab_size:
                raise RequestError(f"prompt: id {token} at position {at} is outside the vocabulary [0, {vocab_size}); "
                                   "use this model's tokenizer", "prompt")
        return np.array(prompt, np.int32)

    def jobs(self, request: Request, prompts: list[np.ndarray], push: Callable[[int, Update], None]) -> list[Job]:
        """A job for each choice, in the order of their indices. push(index, update) is called by the engine."""
        # One seed for a whole request: choices differ by their index in it.
        seed = secrets.randbits(32) if request.seed is None else request.seed
        end = time.monotonic() + self.limits.seconds
        jobs = []
        for prompt in prompts:
            for _ in range(request.n):
                i = len(jobs)
                config = dataclasses.replace(
                    request.sample, max_new_tokens=request.max_tokens or self.engine.context - len(prompt))
                row = Row(prompt, config, seed, i, request.logprobs >= 0, request.bias)
                jobs.append(Job(row, functools.partial(push, i), request.stop, request.stream, end))
        return jobs
