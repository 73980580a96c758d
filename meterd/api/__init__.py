"""The HTTP face of meterd: events in, questions, acts of persons, health and the dashboard.

`build` puts the rooms together. On its way to a room a request passes, in this order: the clock of
the metrics, the form in which errors are answered, the look at what is sent (no compressed bodies),
the guard of the door, and the producer that it comes from.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from meterd import __version__
from meterd.api import openapi, pages, problems, protocol
from meterd.api.agents import Agents
from meterd.api.agreements import Agreements
from meterd.api.auth import Guard
from meterd.api.backup import Backup
from meterd.api.dead_letters import DeadLetters
from meterd.api.events import Events
from meterd.api.gate import Gate
from meterd.api.health import Health
from meterd.api.idempotency import Keyed
from meterd.api.journal import Journal
from meterd.api.numbers import Numbers
from meterd.api.openings import Openings
from meterd.api.otlp import GZIP, Otlp
from meterd.api.otlp import PATHS as OTLP_PATHS
from meterd.api.overview import Overview
from meterd.api.parts import Instruments, IntakeView, OpenerView, Parts, SettlerView
from meterd.api.plans import Plans
from meterd.api.problems import Problem
from meterd.api.protocol import Runner
from meterd.api.releases import Releases
from meterd.api.senders import Senders
from meterd.api.settings import ApiSettings, ApiToken, Scope
from meterd.api.status import Status
from meterd.api.stream import Stream
from meterd.api.wire import Call
from meterd.bookkeeper import Bookkeeper

__all__ = ["ApiSettings", "ApiToken", "Overview", "Scope", "build", "runner"]

KEEPALIVE_S = 75.0
UNKNOWN_ROUTE = "unknown"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


def build(
    settings: ApiSettings,
    bookkeeper: Bookkeeper,
    intake: IntakeView,
    *,
    settler: SettlerView,
    opener: OpenerView,
    overview: Overview,
    instruments: Instruments,
    store_bytes: Callable[[], int],
    fatal: Callable[[BaseException], None],
) -> web.Application:
    """Make the application.

    `fatal` is called, once or more, with an error behind which the process must end; the request
    itself is answered 503.
    """
    parts = Parts(
        settings=settings,
        bookkeeper=bookkeeper,
        intake=intake,
        settler=settler,
        opener=opener,
        overview=overview,
        instruments=instruments,
        store_bytes=store_bytes,
        fatal=fatal,
        version=__version__,
        started_at=bookkeeper.clock.wall(),
    )
    scopes: dict[web.AbstractRoute, Scope | None] = {}
    app = web.Application(
        middlewares=[
            _observed(instruments),
            problems.middleware(
                fatal, body_limit=settings.body_limit, retry_after_s=settings.retry_after_s
            ),
            _plain_bodies,
            Guard(settings.tokens, scopes).middleware(),
            Senders(bookkeeper, scopes).middleware(),
            Keyed(bookkeeper, scopes).middleware(),
        ],
        client_max_size=settings.body_limit,
    )
    stream = Stream(parts)
    app.on_shutdown.append(stream.close)
    for call in _calls(parts, stream):
        route = app.router.add_route(
            call.method, call.path, call.answer, expect_handler=protocol.expected
        )
        scopes[route] = call.scope
    return app


def runner(app: web.Application, *, shutdown_timeout: float) -> web.AppRunner:
    """Make the runner with the options that the API relies on.

    `cleanup` lets requests under way finish, so long.
    """
    return Runner(
        app,
        access_log=None,  # No line for each event; the metrics count.
        auto_decompress=False,  # A compressed body is refused, and not unpacked to be dropped.
        handler_cancellation=False,  # A client that hangs up does not undo what it asked for.
        keepalive_timeout=KEEPALIVE_S,
        shutdown_timeout=shutdown_timeout,
    )


def _calls(parts: Parts, stream: Stream) -> list[Call]:
    rooms = (
        Events,
        Otlp,
        Gate,
        Agreements,
        Openings,
        Releases,
        DeadLetters,
        Numbers,
        Journal,
        Plans,
        Backup,
        Status,
        Agents,
        Health,
    )
    calls = [*pages.calls(), *(call for room in rooms for call in room(parts).calls())]
    calls += stream.calls()
    return [*calls, openapi.call_for(calls)]


def _observed(instruments: Instruments) -> Middleware:
    @web.middleware
    async def observed(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.perf_counter()
        response = await handler(request)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
        resource = request.match_info.route.resource
        route = UNKNOWN_ROUTE if resource is None else resource.canonical
        method = request.method if request.method in METHODS else "other"
        # How long somebody listens is not how long an answer takes.
        streams = response.content_type == openapi.EVENTS
        seconds = 0.0 if streams else time.perf_counter() - began
        instruments.http(route, method, response.status, seconds)
        return response

    return observed


@web.middleware
async def _plain_bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse compressed bodies unread: some kilobytes of them can be gigabytes of zeros.

    Exporters of OpenTelemetry may send gzip, which their room unpacks up to the limit of a body.
    """
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "").strip().lower()
    taken = {GZIP} if request.path in OTLP_PATHS.values() else set()
    if encoding not in {"", "identity"} | taken:
        headers = {"Accept-Encoding": ", ".join([*taken, "identity"])}
        raise Problem(415, "content-encoding", "send the body uncompressed", headers=headers)
    return await handler(request)
