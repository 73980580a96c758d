"""The gate as an ASGI middleware, for FastAPI, Starlette and their likes; it imports none of them.

The rule kept here: what is not paid for is not served, and what was served is told once, also when
the client goes away in the middle of a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from meterd.sdk.gate import AsyncGate
from meterd.sdk.meter import Meter
from meterd.sdk.serving import Refusal, Serving
from meterd.sdk.usage import Quantity

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ENDS = frozenset({"lifespan.shutdown.complete", "lifespan.shutdown.failed"})


class GateMiddleware:
    """Serves what the gate allows, and tells the meter what was served.

    gate        the gate; it is closed, as the meter is, when the application ends.
    meter       whom usage is told.
    name        the meter of the plan that a request counts for.
    agreement   who pays: a header that your own proxy sets, or a function of the ASGI scope.
    quantity    what a request counts, and what the gate is asked for, with these `dimensions`. A
                handler reports what it really used: `request.state.usage.add(1312)`.
    hold        set its price aside for so many seconds while it is served; None: ask only.
    only        which requests are paid for, by their scope; None: all.

    A no is a 402, no answer (with `on_unreachable="deny"`) a 503, both as problem documents. Told
    is what began to be answered with a status below 400, and whatever the handler reported.
    """

    def __init__(
        self,
        app: App,
        gate: AsyncGate,
        meter: Meter,
        name: str = "calls",
        *,
        agreement: str | Callable[[Scope], str | None],
        quantity: Quantity = 1,
        dimensions: Mapping[str, str] | None = None,
        hold: int | None = None,
        only: Callable[[Scope], bool] | None = None,
    ) -> None:
        self._app = app
        self._gate = gate
        self._meter = meter
        self._serving = Serving(gate, meter, name, quantity, dimensions or {}, hold)
        self._agreement = agreement
        self._only = only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._closing(send))
            return
        if scope["type"] != "http" or (self._only is not None and not self._only(scope)):
            await self._app(scope, receive, send)
            return
        usage = await self._serving.admit(self._named(scope))
        if isinstance(usage, Refusal):
            await _refuse(usage, send)
            return
        scope.setdefault("state", {})["usage"] = usage
        begun: list[int] = []

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            await self._serving.over(usage, served=bool(begun) and begun[0] < 400)

    def _named(self, scope: Scope) -> str | None:
        if not isinstance(self._agreement, str):
            return self._agreement(scope)
        wanted = self._agreement.lower().encode("latin-1")
        found = [value for name, value in scope["headers"] if name.lower() == wanted]
        return found[0].decode("latin-1") if len(found) == 1 else None

    def _closing(self, send: Send) -> Send:
        async def closed(message: Message) -> None:
            if message["type"] in _ENDS:
                await self._gate.aclose()
                await asyncio.to_thread(self._meter.close)
            await send(message)

        return closed


async def _refuse(refusal: Refusal, send: Send) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    length = (b"content-length", str(len(refusal.body)).encode())
    start = {"type": "http.response.start", "status": refusal.status, "headers": [*headers, length]}
    await send(start)
    await send({"type": "http.response.body", "body": refusal.body})
