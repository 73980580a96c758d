"""The gate as a middleware of aiohttp: asked before a request, told after it.

The rule kept here: what is not paid for is not served, and what was served is told once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from meterd.sdk.gate import AsyncGate
from meterd.sdk.meter import Meter
from meterd.sdk.serving import Refusal, Serving, Usage
from meterd.sdk.usage import Quantity

USAGE = web.RequestKey("meterd_usage", Usage)


def gate(
    ask: AsyncGate,
    meter: Meter,
    name: str = "calls",
    *,
    agreement: str | Callable[[web.Request], str | None],
    quantity: Quantity = 1,
    dimensions: Mapping[str, str] | None = None,
    hold: int | None = None,
    only: Callable[[web.Request], bool] | None = None,
) -> Middleware:
    """Make a middleware that serves what the gate allows, and tells the meter what was served.

    ask         the gate.
    meter       whom usage is told.
    name        the meter of the plan that a request counts for.
    agreement   who pays: a header that your own proxy sets, or a function of the request.
    quantity    what a request counts, and what the gate is asked for, with these `dimensions`. A
                handler reports what it really used: `request[USAGE].add(1312)`.
    hold        set its price aside for so many seconds while it is served; None: ask only.
    only        which requests are paid for; None: all.

    A no is a 402, no answer (with `on_unreachable="deny"`) a 503, both as problem documents. Told
    is what was answered with a status below 400, what a client did not wait for, and whatever the
    handler reported.
    """
    serving = Serving(ask, meter, name, quantity, dimensions or {}, hold)

    @web.middleware
    async def gated(request: web.Request, handler: Handler) -> web.StreamResponse:
        if only is not None and not only(request):
            return await handler(request)
        named = request.headers.get(agreement) if isinstance(agreement, str) else agreement(request)
        usage = await serving.admit(named)
        if isinstance(usage, Refusal):
            return web.Response(status=usage.status, body=usage.body, headers=usage.headers)
        request[USAGE] = usage
        served = False
        try:
            response = await handler(request)
            served = response.status < 400
        except web.HTTPException as error:
            served = error.status < 400
            raise
        except (asyncio.CancelledError, ConnectionError):
            served = True  # The client went away: the work was done for it.
            raise
        finally:
            await serving.over(usage, served=served)
        return response

    return gated


def closing(ask: AsyncGate, meter: Meter) -> Callable[[web.Application], AsyncIterator[None]]:
    """Close both when the application ends: `app.cleanup_ctx.append(closing(gate, meter))`."""

    async def closed(_: web.Application) -> AsyncIterator[None]:
        yield
        await ask.aclose()
        await asyncio.to_thread(meter.close)

    return closed
