"""Who may ask: the Host header, the API key, and the size and kind of bodies. Plain ASGI, before any endpoint.

A page in a browser can send requests to 127.0.0.1, and by DNS rebinding even read the answers. So the Host header must
name this server, bodies must be declared as JSON (which a browser does not send across origins without asking first),
and no CORS header ever allows it.
"""

import asyncio
import hmac

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from lmjax.serve.metrics import Metrics
from lmjax.serve.protocol import RequestError
from lmjax.serve.replies import to_json

OPEN = ("/health", "/ready")  # answered without a key: they say nothing about the model

def host_of(header: str) -> str:
    """The host of a Host header, without its port; IPv6 without brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


class Gate:
    """Lets through what may pass; counts all answers. hosts: names that this server goes by; empty: any. api_key: ""
    for none."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], api_key: str, metrics: Metrics, paths: frozenset[str]):
        self._app, self._hosts, self._key = app, hosts, api_key.encode()
        self._metrics, self._paths = metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message):
            if message["type"] == "http.response.start":
                self._metrics.responses[path, message["status"]] += 1
            await send(message)

        if (refused := self._refusal(scope)) is not None:
            await answer_error(refused, counted)
        else:
            await self._app(scope, receive, counted)

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers = {name: value for name, value in scope["headers"] if name in (b"host", b"authorization")}
        host = host_of(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts and host not in self._hosts:
            return RequestError(f"Host {host[:100]!r}: is not a name of this server; call it by one, or start it with "
                                "--allow-host NAME", status=403, code="wrong_host")
        if self._key and scope["path"] not in OPEN:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                return RequestError("the API key is missing or wrong; send the header Authorization: Bearer KEY",
                                    status=401, code="invalid_api_key")
        return None


async def answer_error(error: RequestError, send: Send) -> None:
    body = to_json(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status >= 500:
        headers.append((b"x-should-retry", b"false"))  # OpenAI's clients would otherwise ask three times
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(scope: Scope, receive: Receive, limit: int, seconds: float = 30.0) -> bytes:
    """A request's body. Raises RequestError where it is too large, too slow or not declared as JSON, and
    ClientDisconnect."""
    headers = dict(scope["headers"])
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise RequestError("Content-Type: must be application/json", status=415, code="wrong_content_type")
    too_large = RequestError(f"the body is larger than {limit} bytes; send less", status=413, code="body_too_large")
    if headers.get(b"content-length", b"0").isdigit() and int(headers.get(b"content-length", b"0")) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {seconds:g} seconds; send it again", status=408,
                           code="slow_body") from None
