"""`GET /v1/stream`: accruals, releases and changes of state as server-sent events.

The rule kept here: an event is a help to whoever shows things and never the record of them. Sums
are told as they stand, not as differences, so that a missed one does no harm; who missed more than
is kept is told to read afresh (`reset`). A client that reads too slowly is sent away.
"""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web

from meterd.api.hub import Fallen, Hub
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.wire import Call, read_filter
from meterd.errors import NotFound

HEARTBEAT_S = 15.0
WRITE_S = 10.0  # A client that takes nothing for so long is sent away.
LOOK_S = 1.0  # How often it is looked whether the client is still there.
SECONDS_MAX = 86_400
BEAT = b": still here\n\n"
RETRY = b"retry: 2000\n\n"
BYE = b"event: bye\ndata: {}\n\n"
HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream",
    hdrs.CACHE_CONTROL: "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Accel-Buffering": "no",  # nginx would keep the events until it has some kilobytes.
}


class Stream:
    """The room of `/v1/stream`."""

    def __init__(self, parts: Parts) -> None:
        self._ledger = parts.bookkeeper.ledger
        self._hub = Hub(parts)

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [Call("GET", "/v1/stream", Scope.READ, self._stream)]

    async def close(self, _: web.Application) -> None:
        """End all streams."""
        self._hub.close()

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        agreement, seconds = self._wanted(request), _seconds(request)
        with self._hub.listening() as ear:
            response = web.StreamResponse(headers=HEADERS)
            await response.prepare(request)
            given = request.headers.get("Last-Event-ID", "")
            place = self._hub.place_of(given) if given else None
            greeting = b""
            if place is None:
                place = self._hub.last
                greeting = self._hub.greeting("reset" if given else "start")
            try:
                await _write(response, RETRY + greeting)
                async with asyncio.timeout(seconds):
                    await self._tell(request, response, ear, place, agreement)
            except TimeoutError:
                pass  # The wanted seconds are over.
            except (ConnectionError, Fallen):
                _hang_up(request)
            return response

    def _wanted(self, request: web.Request) -> str | None:
        name = read_filter(request, "agreement")
        if name is None:
            return None
        account = self._ledger.account(name)
        if account is None:
            raise NotFound(f"there is no agreement {name}; list them: meterd agreements")
        return account.agreement.id

    async def _tell(
        self,
        request: web.Request,
        response: web.StreamResponse,
        ear: asyncio.Event,
        place: int,
        agreement: str | None,
    ) -> None:
        """Write what happens, and a sign of life when nothing does."""
        loop = asyncio.get_running_loop()
        wrote = loop.time()
        while not self._hub.closed:
            ear.clear()
            text, place = self._hub.since(place, agreement)
            if not text and loop.time() - wrote >= HEARTBEAT_S:
                text = BEAT
            if text:
                await _write(response, text)
                wrote = loop.time()
            elif request.transport is None or request.transport.is_closing():
                return
            else:
                await _heard(ear)
        await _write(response, BYE)


async def _heard(ear: asyncio.Event) -> None:
    """Wait for something new, but not for long."""
    try:
        async with asyncio.timeout(LOOK_S):
            await ear.wait()
    except TimeoutError:
        return


async def _write(response: web.StreamResponse, text: bytes) -> None:
    """Write; a client that does not read raises `ConnectionError`."""
    try:
        async with asyncio.timeout(WRITE_S):
            await response.write(text)
    except TimeoutError:
        raise ConnectionAbortedError("the client does not read") from None


def _hang_up(request: web.Request) -> None:
    """Drop a client at once, with all that is still to be written to it."""
    if request.transport is not None:
        request.transport.abort()


def _seconds(request: web.Request) -> int | None:
    """Read after how many seconds the stream shall end; None: never. Raises `Problem`."""
    text = request.query.get("seconds")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= SECONDS_MAX):
        raise Problem(400, "bad-query", f"seconds: a whole number from 0 to {SECONDS_MAX}")
    return int(text)
