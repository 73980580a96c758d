"""A bridge: one aiohttp request is answered by an ASGI application.

The rule kept here: the application gets what HTTP carries and no secret. The headers that bring
tokens stay outside; who calls stands in the scope, as the guard of the door has found it. The body
is read whole before the application is asked, up to a limit, so that nobody makes it wait for bytes
that never come. What it answers in one piece goes out in one piece; what it streams is streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from aiohttp import hdrs, web

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

Dressed = TypeVar("Dressed", bound=web.StreamResponse)

CALLER = "meterd.caller"  # In the scope: who calls, as the guard has found it.
SECRETS = frozenset({"authorization", "cookie", "proxy-authorization"})
# These belong to a connection, and aiohttp writes them for its own.
_PER_CONNECTION = frozenset({"connection", "content-length", "keep-alive", "transfer-encoding"})
_LOOK_S = 1.0  # How often a waiting application looks whether its client is still there.


class BrokenApp(Exception):
    """The application broke the rules of ASGI; the message says which."""


async def answer(
    app: App, request: web.Request, caller: object, body_limit: int
) -> web.StreamResponse:
    """Have a request answered.

    Raises `HTTPRequestEntityTooLarge`, `BrokenApp`, and whatever the application raises before it
    has begun to answer.
    """
    exchange = _Exchange(request, await _body(request, body_limit))
    try:
        await app(_scope(request, caller), exchange.receive, exchange.send)
    finally:
        exchange.finished.set()
    return exchange.response()


class _Exchange:
    """What goes to and fro between the application and one client."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self.finished = asyncio.Event()
        self._request = request
        self._body: bytes | None = body  # None: the application has it.
        self._status = 0  # 0: the answer has not begun.
        self._headers: list[tuple[str, str]] = []
        self._response: web.StreamResponse | None = None

    async def receive(self) -> MutableMapping[str, Any]:
        """Hand out the body, once; afterwards only that the client is gone or has its answer."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        while not self.finished.is_set() and not self._gone():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self.finished.wait()
        return {"type": "http.disconnect"}

    async def send(self, told: MutableMapping[str, Any]) -> None:
        """Take the beginning or a piece of the answer. Raises `OSError` when nobody listens."""
        if told["type"] == "http.response.start":
            self._begin(told)
        elif told["type"] == "http.response.body":
            await self._piece(bytes(told.get("body", b"")), more=bool(told.get("more_body")))
        else:
            raise BrokenApp(f"{told['type']} is no part of an answer")

    def response(self) -> web.StreamResponse:
        """The whole answer. Raises `BrokenApp`."""
        if self._response is None or not self.finished.is_set():
            raise BrokenApp("the application came back without an answer")
        return self._response

    def _begin(self, told: MutableMapping[str, Any]) -> None:
        if self._status:
            raise BrokenApp("an answer begins once")
        self._status = int(told["status"])
        for raw_name, raw_value in told.get("headers", ()):
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            if name.lower() not in _PER_CONNECTION:
                self._headers.append((name, value))

    async def _piece(self, body: bytes, *, more: bool) -> None:
        if not self._status or self.finished.is_set():
            raise BrokenApp("a piece of an answer stands between its beginning and its end")
        if self._response is None and not more:
            self._response = self._dressed(web.Response(status=self._status, body=body or None))
        else:
            await self._stream(body, more=more)
        if not more:
            self.finished.set()

    async def _stream(self, body: bytes, *, more: bool) -> None:
        if self._gone():
            raise ConnectionResetError("the client is gone")
        if self._response is None:
            self._response = self._dressed(web.StreamResponse(status=self._status))
            await self._response.prepare(self._request)
        if body:
            await self._response.write(body)
        if not more:
            await self._response.write_eof()

    def _dressed(self, response: Dressed) -> Dressed:
        for name, value in self._headers:
            response.headers.add(name, value)
        return response

    def _gone(self) -> bool:
        transport = self._request.transport
        return transport is None or transport.is_closing()


async def _body(request: web.Request, limit: int) -> bytes:
    body = bytearray()
    declared = request.content_length or 0
    if declared <= limit:
        async for piece in request.content.iter_any():
            body += piece
            if len(body) > limit:
                break
    if max(declared, len(body)) > limit:
        raise web.HTTPRequestEntityTooLarge(limit, max(declared, len(body)))
    return bytes(body)


def _scope(request: web.Request, caller: object) -> Scope:
    """Describe a request as ASGI has it; header names in small letters."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": f"{request.version.major}.{request.version.minor}",
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.rel_url.raw_path.encode("ascii", "replace"),
        "query_string": request.rel_url.raw_query_string.encode("ascii", "replace"),
        "root_path": "",
        "headers": [
            (name.lower(), value)
            for name, value in request.raw_headers
            if name.decode("latin-1").lower() not in SECRETS
        ],
        "client": None,
        "server": None,
        CALLER: caller,
    }


def is_json(request: web.Request) -> bool:
    """Whether a request says that its body is JSON, the only type that `/mcp` takes."""
    given = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0]
    return given.strip().lower() == "application/json"
