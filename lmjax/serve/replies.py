"""Answers as OpenAI's HTTP interface has them, from completions; pure functions, and the progress of a stream.

https://platform.openai.com/docs/api-reference/completions and …/chat. Log-probabilities are natural, of the model
itself, before penalties, temperature and filters. Bytes that are no UTF-8 are shown as `bytes:\\xe2\\x80`.
"""

import codecs
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from lmjax.decode.generate import Completion
from lmjax.serve.protocol import Request

FINISH = {"stop": "stop", "string": "stop", "loop": "stop", "length": "length", "": None}
LOWEST = -9999.0  # JSON has no infinity


def to_json(value: Any) -> bytes:
    """UTF-8; lone surrogates, which a request may have in it, become question marks."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Head:
    """What every object of one answer says."""

    id: str
    created: int
    model: str

    def of(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens}


def completion_body(head: Head, request: Request, done: Sequence[Completion], echoes: Sequence[str],
                    pieces: Sequence[bytes], used: dict[str, int]) -> dict[str, Any]:
    choices = [{"index": i, "text": echo + d.text, "finish_reason": FINISH[d.finish],
                "logprobs": completion_logprobs(d, 0, len(d.tokens), len(echo), request.logprobs, pieces)}
               for i, (d, echo) in enumerate(zip(done, echoes, strict=True))]
    return head.of("text_completion") | {"choices": choices, "usage": used}


def chat_body(head: Head, request: Request, done: Sequence[Completion], pieces: Sequence[bytes],
              used: dict[str, int]) -> dict[str, Any]:
    choices = [{"index": i, "message": {"role": "assistant", "content": d.text, "refusal": None},
                "finish_reason": FINISH[d.finish],
                "logprobs": chat_logprobs(d, 0, len(d.tokens), request.logprobs, pieces)}
               for i, d in enumerate(done)]
    return head.of("chat.completion") | {"choices": choices, "usage": used}


# ---- streams -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """What of one row has been said: characters and tokens, or anything at all."""

    characters: int = 0
    tokens: int = 0
    begun: bool = False

    def news(self, done: Completion, text_of: Callable | None) -> tuple[str, int, int]:
        """(new text, first and last + 1 of the tokens that go with it). Characters that are not whole yet wait.

        text_of: the tokenizer's decode, to find the tokens of text that is held back; None where tokens do not matter.
        """
        text = done.text if done.finish else done.text.rstrip("\ufffd")
        new, before = text[self.characters:], self.tokens
        self.characters = max(self.characters, len(text))
        self.tokens = len(done.tokens)
        if text_of is not None and not done.finish:
            low, high = before, len(done.tokens) + 1  # decode(tokens[:low]) is said already
            while high - low > 1:
                middle = (low + high) // 2
                whole = len(text_of(done.tokens[:middle]).rstrip("\ufffd")) <= self.characters
                low, high = (middle, high) if whole else (low, middle)
            self.tokens = low
        return new, before, self.tokens


def completion_chunk(head: Head, index: int, text: str, finish: str, logprobs: dict | None) -> dict[str, Any]:
    return head.of("text_completion") | {"choices": [
        {"index": index, "text": text, "finish_reason": FINISH[finish], "logprobs": logprobs}]}


def chat_chunk(head: Head, index: int, delta: dict[str, str], finish: str, logprobs: dict | None) -> dict[str, Any]:
    return head.of("chat.completion.chunk") | {"choices": [
        {"index": index, "delta": delta, "finish_reason": FINISH[finish], "logprobs": logprobs}]}


def usage_chunk(head: Head, chat: bool, used: dict[str, int]) -> dict[str, Any]:
    return head.of("chat.completion.chunk" if chat else "text_completion") | {"choices": [], "usage": used}


# ---- log-probabilities -------------------------------------------------------------------------------------


def shown(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def completion_logprobs(done: Completion, start: int, end: int, offset: int, top: int,
                        pieces: Sequence[bytes]) -> dict[str, Any] | None:
    """Of tokens start to end. top: so many likeliest ones and the chosen; -1: none at all. offset: characters before
    the row's first token."""
    if top < 0:
        return None
    decoder, offsets = codecs.getincrementaldecoder("utf-8")("replace"), []
    for token in done.tokens[:end]:
        offsets.append(offset)
        offset += len(decoder.decode(pieces[token]))
    best = []
    for i in range(start, end):
        likeliest = {shown(pieces[t]): _finite(p) for t, p in
                     zip(done.top_ids[i][:top], done.top_logprobs[i][:top], strict=True)}
        best.append(likeliest | {shown(pieces[done.tokens[i]]): _finite(done.logprobs[i])})
    return {"tokens": [shown(pieces[t]) for t in done.tokens[start:end]],
            "token_logprobs": [_finite(p) for p in done.logprobs[start:end]], "top_logprobs": best,
            "text_offset": offsets[start:end]}


def chat_logprobs(done: Completion, start: int, end: int, top: int, pieces: Sequence[bytes]) -> dict[str, Any] | None:
    if top < 0:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": shown(pieces[token]), "logprob": _finite(logprob), "bytes": list(pieces[token])}
    return {"refusal": None, "content": [
        entry(done.tokens[i], done.logprobs[i]) | {"top_logprobs": [
            entry(t, p) for t, p in zip(done.top_ids[i][:top], done.top_logprobs[i][:top], strict=True)]}
        for i in range(start, end)]}


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST)
