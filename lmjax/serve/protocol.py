"""Requests as OpenAI's HTTP interface has them: JSON to checked dataclasses, by pure functions.

What lives here: which fields there are, their types and limits, and the error for each that is wrong. Every field is
done, or refused by name; none is ignored in silence. Tokens and replies are `replies` and `app`.

Fields of OpenAI's that say what is the case anyway (`tools: []`, `response_format: {"type": "text"}`) are taken; with
any other value they are refused. Sampling has more settings than OpenAI's: those of `SampleConfig`, by their names.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from lmjax.data.chat import ROLES
from lmjax.decode.processors import SampleConfig


class RequestError(Exception):
    """A request that cannot be done, as the client is told of it. param: the field. retry_after: in seconds."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None,
                 retry_after: int = 0):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        by_status = {401: "authentication_error", 429: "rate_limit_error"}
        return by_status.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for. rows: prompts times n. seconds: from its arrival to its end."""

    body_bytes: int = 1 << 20
    rows: int = 64
    stops: int = 4
    stop_length: int = 256
    seconds: float = 600.0


@dataclasses.dataclass
class Request:
    """A request that is right in itself. prompts: texts or lists of ids; () for a chat, which has messages. max_tokens
    0: as many as there is room for. logprobs -1: none, else of the chosen token and of so many of the likeliest."""

    model: str | None
    prompts: tuple[str | list[int], ...]
    messages: list[dict[str, Any]]
    sample: SampleConfig  # its max_new_tokens means nothing yet
    max_tokens: int
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: int = -1
    echo: bool = False
    bias: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def chat(self) -> bool:
        return not self.prompts


def parse_json(body: bytes) -> dict[str, Any]:
    """The object of a body. Raises RequestError."""

    def no_constant(name: str):
        raise ValueError(f"{name} is not JSON")
    try:
        value = json.loads(body.decode(), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:150]
        raise RequestError(f"the body is not valid JSON ({why}); send one object", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {type(value).__name__}; send an object", code="invalid_json")
    return value


# ---- fields ------------------------------------------------------------------------------------------------


class Fields:
    """The fields of an object, taken one by one; `done` refuses what is left."""

    def __init__(self, values: dict[str, Any]):
        self._left = dict(values)

    def take(self, name: str, default: Any, right: Callable[[Any], bool], wanted: str) -> Any:
        """The value of a field; null and absence are its default."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not right(value):
            raise RequestError(f"{name}={_shown(value)}: must be {wanted}", name)
        return value

    def whole(self, name: str, default: Any, low: int, high: int | None = None) -> Any:
        wanted = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"
        return self.take(name, default, lambda v: type(v) is int and low <= v and (high is None or v <= high), wanted)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        return float(self.take(name, default, lambda v: _is_number(v) and low <= v <= high,
                               f"a number from {low:g} to {high:g}"))

    def flag(self, name: str) -> bool:
        return self.take(name, False, lambda v: type(v) is bool, "true or false")

    def text(self, name: str) -> str | None:
        return self.take(name, None, lambda v: isinstance(v, str), "a string")

    def only(self, name: str, *allowed: Any) -> None:
        """A field that we cannot do, but for values that ask for nothing."""
        value = self._left.pop(name, None)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            way_out = f"; leave it out{' or send ' + json.dumps(allowed[0]) if allowed else ''}"
            raise RequestError(f"{name}={_shown(value)}: is not supported by this server{way_out}", name,
                               code="unsupported_field")

    def done(self) -> None:
        if self._left:
            name = next(iter(self._left))
            raise RequestError(f"{_shown(name)}: is no field of this request; leave it out", name[:100],
                               code="unknown_field")


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


# ---- requests ----------------------------------------------------------------------------------------------


def parse_completion(body: dict[str, Any], limits: Limits, vocab_size: int) -> Request:
    """POST /v1/completions. Raises RequestError that names the field."""
    f = Fields(body)
    prompts = _prompts(f.take("prompt", None, lambda v: isinstance(v, (str, list)), "a string or a list"))
    logprobs = f.whole("logprobs", -1, 0, 5)
    echo = f.flag("echo")
    if echo and logprobs >= 0:
        raise RequestError("echo=true: log-probabilities of the prompt are not supported; leave echo or logprobs out",
                           "echo", code="unsupported_field")
    f.only("suffix", "")
    common = _common(f, limits, vocab_size)
    f.only("best_of", common["n"])
    max_tokens = f.whole("max_tokens", 16, 1)
    f.done()
    if len(prompts) * common["n"] > limits.rows:
        raise RequestError(f"n={common['n']}: {len(prompts)} prompts times n are more than the {limits.rows} texts "
                           "that one request may ask for", "n")
    return Request(prompts=prompts, messages=[], max_tokens=max_tokens, logprobs=logprobs, echo=echo, **common)


def parse_chat(body: dict[str, Any], limits: Limits, vocab_size: int) -> Request:
    """POST /v1/chat/completions. Raises RequestError that names the field."""
    f = Fields(body)
    messages = _messages(f.take("messages", None, lambda v: isinstance(v, list), "a list of messages"))
    wanted, top = f.flag("logprobs"), f.whole("top_logprobs", 0, 0, 20)
    if top and not wanted:
        raise RequestError(f"top_logprobs={top}: has no effect without logprobs=true; send that too, or leave it out",
                           "top_logprobs")
    for name, allowed in (("tools", [[]]), ("functions", [[]]), ("tool_choice", ["none", "auto"]),
                          ("function_call", ["none", "auto"]), ("response_format", [{"type": "text"}]),
                          ("modalities", [["text"]]), ("store", [False])):
        f.only(name, *allowed)
    for name in ("audio", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "reasoning_effort",
                 "safety_identifier", "service_tier", "verbosity", "web_search_options"):
        f.only(name)
    most = [f.whole(name, 0, 1) for name in ("max_completion_tokens", "max_tokens")]
    if all(most) and most[0] != most[1]:
        raise RequestError(f"max_tokens={most[1]}: max_completion_tokens says {most[0]}; send one of the two",
                           "max_tokens")
    common = _common(f, limits, vocab_size)
    f.done()
    return Request(prompts=(), messages=messages, max_tokens=max(most), logprobs=top if wanted else -1, **common)


def _common(f: Fields, limits: Limits, vocab_size: int) -> dict[str, Any]:
    f.text("user")  # OpenAI's identifier of an end user: changes nothing in an answer
    stream = f.flag("stream")
    options = f.take("stream_options", None, lambda v: isinstance(v, dict), "an object")
    if options is not None and not stream:
        raise RequestError("stream_options: has no effect without stream=true; leave it out", "stream_options")
    o = Fields(options or {})
    include_usage = o.flag("include_usage")
    o.only("include_obfuscation", False)
    o.done()
    return {"model": f.text("model"), "n": f.whole("n", 1, 1, limits.rows), "seed": f.whole("seed", None, 0, 2**32 - 1),
            "stop": _stops(f, limits), "stream": stream, "include_usage": include_usage, "sample": _sample(f),
            "bias": _bias(f, vocab_size)}


def _sample(f: Fields) -> SampleConfig:
    most = 2**31 - 1
    sample = SampleConfig(
        temperature=f.number("temperature", 1.0, 0, 100), top_p=f.number("top_p", 1.0, 0, 1),
        frequency_penalty=f.number("frequency_penalty", 0.0, -2, 2),
        presence_penalty=f.number("presence_penalty", 0.0, -2, 2),
        top_k=f.whole("top_k", 0, 0, most), min_p=f.number("min_p", 0.0, 0, 1),
        typical_p=f.number("typical_p", 1.0, 0, 1), repetition_penalty=f.number("repetition_penalty", 1.0, 0, 100),
        no_repeat_ngram=f.whole("no_repeat_ngram", 0, 0, most), dry_multiplier=f.number("dry_multiplier", 0.0, 0, 100),
        dry_base=f.number("dry_base", 1.75, 1, 100), dry_allowed_length=f.whole("dry_allowed_length", 2, 1, most),
        stop_loops=f.whole("stop_loops", 0, 0, most), loop_period=f.whole("loop_period", 64, 1, 4096))
    for problem in sample.problems(""):  # ".top_p=0.0: must be …"
        raise RequestError(problem[1:], problem[1:].partition("=")[0])
    return sample


def _stops(f: Fields, limits: Limits) -> tuple[str, ...]:
    value = f.take("stop", [], lambda v: isinstance(v, (str, list)), "a string or a list of strings")
    stops = [value] if isinstance(value, str) else value
    if len(stops) > limits.stops:
        raise RequestError(f"stop: {len(stops)} strings; at most {limits.stops} are looked for", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= limits.stop_length:
            raise RequestError(f"stop={_shown(stop)}: must be strings of 1 to {limits.stop_length} characters", "stop")
    return tuple(stops)


def _bias(f: Fields, vocab_size: int) -> dict[int, float]:
    value = f.take("logit_bias", {}, lambda v: isinstance(v, dict), "an object of token id to number")
    if len(value) > 1024:
        raise RequestError(f"logit_bias: {len(value)} tokens; at most 1024 may be given", "logit_bias")
    for key, bias in value.items():
        if not (key.isdecimal() and key.isascii() and len(key) < 12 and int(key) < vocab_size):
            raise RequestError(f"logit_bias: {_shown(key)} is no token id of the vocabulary [0, {vocab_size})",
                               "logit_bias")
        if not _is_number(bias) or not -100 <= bias <= 100:
            raise RequestError(f"logit_bias: {_shown(bias)} of token {key} must be a number from -100 to 100",
                               "logit_bias")
    return {int(key): float(bias) for key, bias in value.items()}


def _prompts(value: Any) -> tuple[str | list[int], ...]:
    """OpenAI's four forms: a text, texts, ids, or lists of ids."""
    if value is None:
        raise RequestError("prompt: is missing; send a text", "prompt")
    are_ids = isinstance(value, list) and value and all(type(i) is int for i in value)
    prompts = [value] if isinstance(value, str) or are_ids else value
    if not prompts:
        raise RequestError("prompt: is empty; send a text", "prompt")
    for prompt in prompts:
        if isinstance(prompt, list) and not all(type(i) is int for i in prompt):
            raise RequestError(f"prompt={_shown(prompt)}: a list must hold texts, or token ids", "prompt")
        if not isinstance(prompt, (str, list)):
            raise RequestError(f"prompt={_shown(prompt)}: must be a text or a list of token ids", "prompt")
        if not prompt:
            raise RequestError("prompt: is empty; send a text", "prompt")
    return tuple(prompts)


def _messages(value: list | None) -> list[dict[str, Any]]:
    """Messages with their texts joined. Only texts are taken."""
    if not value:
        raise RequestError("messages: is missing or empty; send at least one", "messages")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RequestError(f"{where}={_shown(item)}: must be an object with role and content", where)
    left = {key: value for key, value in item.items() if value is not None}
    role, content = left.pop("role", None), left.pop("content", None)
    if role not in ROLES:
        raise RequestError(f"{where}.role={_shown(role)}: must be one of {', '.join(ROLES)}", f"{where}.role")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
                    and len(part) == 2):
                raise RequestError(f"{where}.content: holds {_shown(part)}; only parts of type text "
                                   "are supported", f"{where}.content", code="unsupported_field")
            parts.append(part["text"])
        content = "".join(parts)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content={_shown(content)}: must be a text", f"{where}.content")
    message = {"role": role, "content": content}
    if "name" in left:
        if not isinstance(left["name"], str):
            raise RequestError(f"{where}.name={_shown(left['name'])}: must be a text", f"{where}.name")
        message["name"] = left.pop("name")
    for name, nothing in (("tool_calls", []), ("refusal", ""), ("annotations", [])):
        if left.get(name) == nothing:
            del left[name]
    if left:
        name = next(iter(left))
        raise RequestError(f"{where}.{name[:100]}: is not supported by this server; leave it out",
                           f"{where}.{name[:100]}", code="unsupported_field")
    return message
