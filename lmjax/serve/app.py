"""The HTTP endpoints, as an ASGI application on Starlette.

    POST /v1/completions, /v1/chat/completions    GET /v1/models, /v1/models/NAME, /health, /ready, /metrics

What lives here: from a body to jobs, from updates to a body or a stream of events, and clients that leave. Parsing is
`protocol`, formatting `replies`, scheduling `engine`, access `access`.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lmjax.serve import replies
from lmjax.serve.access import Gate, answer_error, read_body
from lmjax.serve.engine import NOT_FINITE, Closed, QueueFull, Update
from lmjax.serve.metrics import CONTENT_TYPE
from lmjax.serve.protocol import Request, RequestError, parse_chat, parse_completion, parse_json
from lmjax.serve.served import Served

ENDS = {  # why a row ended without being finished: (status, message)
    "non_finite": (500, f"the model's logits are not finite: {NOT_FINITE}"),
    "timeout": (504, "the request did not finish in the time that this server allows; ask for fewer tokens"),
    "shutdown": (503, "the server is shutting down; ask again later"),
    "failed": (500, "the model failed on this request; the server goes on, and its log says more"),
    "cancelled": (499, "the client has gone"),
}
GRACE = 30.0  # seconds that a client has, after the request's own time, to take the rest of its answer


STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
          (b"x-accel-buffering", b"no")]


def make_app(served: Served, *, api_key: str = "", hosts: frozenset[str] = frozenset()) -> Gate:
    """The application. api_key: "" for none. hosts: names in the Host header that are let in; empty: any."""
    engine = served.engine
    model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "lmjax"}

    async def health(_) -> Response:
        return _json({"status": "alive"})

    async def ready(_) -> Response:
        return _json({"status": "ready"}) if engine.alive else _json({"status": "shutting down"}, 503)

    async def metrics(_) -> Response:
        text = engine.metrics.render(slots=engine.slots, running=engine.running, waiting=engine.waiting)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def models(_) -> Response:
        return _json({"object": "list", "data": [model]})

    async def one_model(request) -> Response:
        served.check_name(request.path_params["name"])
        return _json(model)

    async def wrong_path(request, error) -> Response:
        if error.status_code == 405:
            said = RequestError(f"{request.method} {request.url.path[:100]}: takes another method", status=405)
        else:
            said = RequestError(f"{request.url.path[:100]}: no such path; see docs/serving.md", status=404)
        return _json(said.body(), said.status)

    async def refused(_, error: RequestError) -> Response:
        return _json(error.body(), error.status)

    async def broken(*_) -> Response:
        return _json(RequestError("a fault of the server's; its log says more", status=500).body(), 500)

    routes = [Route("/v1/completions", Ask(served, parse_completion), methods=["POST"]),
              Route("/v1/chat/completions", Ask(served, parse_chat), methods=["POST"]),
              Route("/v1/models", models), Route("/v1/models/{name:path}", one_model),
              Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
    app = Starlette(routes=routes, exception_handlers={404: wrong_path, 405: wrong_path, RequestError: refused,
                                                       Exception: broken})
    paths = frozenset(route.path for route in routes)
    return Gate(app, hosts=hosts, api_key=api_key, metrics=engine.metrics, paths=paths)


def _json(value: dict, status: int = 200) -> Response:
    return Response(replies.to_json(value), status, media_type="application/json")


class Ask:
    """One of the two endpoints that continue something."""

    def __init__(self, served: Served, parse: Callable):
        self._served, self._parse = served, parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        served = self._served
        try:
            body = await read_body(scope, receive, served.limits.body_bytes)
            request = self._parse(parse_json(body), served.limits, served.opened.tokenizer.vocab_size)
            served.check_name(request.model)
            prompts = await run_in_threadpool(served.prompts, request)
            await self._answer(request, prompts, receive, send)
        except RequestError as error:
            await answer_error(error, send)
        except (ClientDisconnect, OSError):
            pass  # nobody is left to be told

    async def _answer(self, request: Request, prompts: list, receive: Receive, send: Send) -> None:
        """Waits for the jobs while watching the client; leaves none of them behind."""
        loop, updates = asyncio.get_running_loop(), asyncio.Queue()
        engine = self._served.engine

        def push(index: int, update: Update) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, (index, update))

        jobs = self._served.jobs(request, prompts, push)
        try:
            engine.submit(jobs)
        except QueueFull as full:
            raise RequestError("the server has as many requests as it can queue; ask again later", status=429,
                               code="queue_full", retry_after=full.retry_after) from None
        except Closed:
            raise _ended("shutdown") from None
        say = self._stream if request.stream else self._whole
        talk = asyncio.create_task(say(request, prompts, updates, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({talk, gone}, timeout=self._served.limits.seconds + GRACE,
                               return_when=asyncio.FIRST_COMPLETED)
            if talk.done():
                talk.result()
        finally:
            engine.cancel(jobs)
            talk.cancel()
            gone.cancel()
            await asyncio.gather(talk, gone, return_exceptions=True)

    def _head(self, request: Request) -> replies.Head:
        kind = "chatcmpl" if request.chat else "cmpl"
        return replies.Head(f"{kind}-{secrets.token_hex(12)}", int(time.time()), self._served.name)

    def _echoes(self, request: Request) -> list[str]:
        """What stands before each choice's text."""
        decode = self._served.opened.tokenizer.decode
        texts = [p if isinstance(p, str) else decode(p) for p in request.prompts] if request.echo else [
            "" for _ in request.prompts or [""]]
        return [text for text in texts for _ in range(request.n)]

    async def _whole(self, request: Request, prompts: list, updates: asyncio.Queue, send: Send) -> None:
        choices = len(prompts) * request.n
        final: dict[int, Update] = {}
        while len(final) < choices:
            index, update = await updates.get()
            if update.error:
                raise _ended(update.error)
            if update.final:
                final[index] = update
        done = [final[i].completion for i in range(choices)]
        used = replies.usage(sum(map(len, prompts)), sum(update.generated for update in final.values()))
        head, pieces = self._head(request), self._pieces(request)
        if request.chat:
            body = replies.chat_body(head, request, done, pieces, used)
        else:
            body = replies.completion_body(head, request, done, self._echoes(request), pieces, used)
        data = replies.to_json(body)
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]})
        await send({"type": "http.response.body", "body": data})

    async def _stream(self, request: Request, prompts: list, updates: asyncio.Queue, send: Send) -> None:
        """Server-sent events. Headers wait for the first update, so that what fails before it gets its status."""
        events = self._events(request, prompts, updates)
        first = await anext(events)
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await _event(send, first)
        try:
            async for event in events:
                await _event(send, event)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        except RequestError as error:  # the status is said already
            await send({"type": "http.response.body", "body": b"data: " + replies.to_json(error.body()) + b"\n\n"})

    async def _events(self, request: Request, prompts: list, updates: asyncio.Queue) -> AsyncIterator[dict]:
        head, echoes, pieces = self._head(request), self._echoes(request), self._pieces(request)
        text_of = self._served.opened.tokenizer.decode if request.logprobs >= 0 else None
        going = {i: replies.Progress() for i in range(len(prompts) * request.n)}
        generated = 0
        while going:
            index, update = await updates.get()
            if update.error:
                raise _ended(update.error)
            done, progress = update.completion, going[index]
            if request.chat and not progress.begun:
                yield replies.chat_chunk(head, index, {"role": "assistant", "content": ""}, "", None)
            text, start, end = progress.news(done, text_of)
            if not request.chat:
                said = replies.completion_logprobs(done, start, end, len(echoes[index]), request.logprobs, pieces)
                text = text if progress.begun else echoes[index] + text
            else:
                said = replies.chat_logprobs(done, start, end, request.logprobs, pieces)
            progress.begun = True
            if update.final:
                generated += update.generated
                del going[index]
            if text or update.final or (said and end > start):
                if request.chat:
                    yield replies.chat_chunk(head, index, {"content": text} if text or end > start else {},
                                             done.finish, said)
                else:
                    yield replies.completion_chunk(head, index, text, done.finish, said)
        if request.include_usage:
            yield replies.usage_chunk(head, request.chat, replies.usage(sum(map(len, prompts)), generated))

    def _pieces(self, request: Request) -> list[bytes]:
        return self._served.pieces if request.logprobs >= 0 else []


def _ended(error: str) -> RequestError:
    status, message = ENDS[error]
    return RequestError(message, status=status, code=error)


async def _event(send: Send, value: dict) -> None:
    await send({"type": "http.response.body", "body": b"data: " + replies.to_json(value) + b"\n\n",
                "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
