"""The escrow service over HTTP: the contract under `/api/v1`, `/mcp`, and the sandbox's controls.

The rule kept here: the service listens on loopback alone, since its controls ask for no key.

Controls, each both at `/_name` and at `/api/v1/_name`: `_faults`, `_clock`, `_operations`,
`_totals`, `_requests`, `_wallet`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial

from aiohttp import web

from meterd.errors import StoreFailed
from meterd.mcp.door import PATH as MCP_PATH
from meterd.sandbox import wire
from meterd.sandbox.agents import Agents
from meterd.sandbox.contract import Contract
from meterd.sandbox.controls import Controls
from meterd.sandbox.faults import Call
from meterd.sandbox.misdelivery import Reply, plain, refusal
from meterd.sandbox.service import Service
from meterd.sandbox.settings import DEVELOPMENT_KEYS, SandboxSettings, check
from meterd.sandbox.store import Store
from meterd.sandbox.wire import BadRequest

__all__ = ["API", "DEVELOPMENT_KEYS", "FAILED", "SandboxSettings", "build", "running", "serve"]

API = "/api/v1"
SHUTDOWN_TIMEOUT_S = 0.5  # A request that waits longer than this waits for a fault.

_CALLS = (
    ("POST", "/escrow", Call.CREATE),
    ("GET", "/escrow", Call.LIST),
    ("GET", "/escrow/{escrow_id}", Call.GET),
    ("POST", "/escrow/{escrow_id}/release", Call.RELEASE),
    ("POST", "/escrow/{escrow_id}/release-partial", Call.RELEASE_PARTIAL),
    ("POST", "/escrow/{escrow_id}/refund", Call.REFUND),
    ("POST", "/escrow/{escrow_id}/dispute", Call.DISPUTE),
    ("POST", "/escrow/{escrow_id}/dispute/resolve", Call.RESOLVE),
    ("POST", "/wallet/debit", Call.DEBIT),
    ("GET", "/wallet/{agent}", Call.WALLET),
    ("POST", "/faucet", Call.FAUCET),
)


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What aiohttp refuses by itself, an unknown path or too large a body, is said in JSON too."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        code = (error.reason or "error").lower().replace(" ", "_")
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return plain(refusal(error.status, code, error.reason or "", **headers))


_CONTRACT = web.AppKey("contract", Contract)
_CONTROLLED = web.AppKey("controls", Controls)
_AGENTS = web.AppKey("agents", Agents)
FAILED = web.AppKey("failed", asyncio.Event)

_CONTROLS: tuple[tuple[str, str, Callable[[Controls, web.Request], Awaitable[Reply]]], ...] = (
    ("GET", "/_operations", Controls.operations),
    ("GET", "/_totals", Controls.totals),
    ("GET", "/_requests", Controls.requests),
    ("GET", "/_faults", Controls.faults),
    ("POST", "/_faults", Controls.add_fault),
    ("DELETE", "/_faults", Controls.clear_faults),
    ("GET", "/_clock", Controls.clock),
    ("POST", "/_clock", Controls.move_clock),
    ("POST", "/_wallet", Controls.fill_wallet),
)


async def _answer_call(call: Call, request: web.Request) -> web.StreamResponse:
    return await request.app[_CONTRACT].answer(call, request)


async def _answer_control(
    control: Callable[[Controls, web.Request], Awaitable[Reply]], request: web.Request
) -> web.StreamResponse:
    try:
        return plain(await control(request.app[_CONTROLLED], request))
    except BadRequest as error:
        return plain(refusal(400, error.code, error.text))


async def _answer_agent(request: web.Request) -> web.StreamResponse:
    return await request.app[_AGENTS].answer(request)


def build(settings: SandboxSettings) -> web.Application:
    """The application: opens its file when it starts up and closes it when it is cleaned up.

    Raises `ConfigurationError` for settings that make no sense; on start-up `StoreLocked`,
    `StoreCorrupt` or `StoreFailed`. `app[FAILED]` is set when a commit has failed: nothing more is
    answered and the process must end.
    """
    check(settings)
    app = web.Application(middlewares=[_errors_as_json], client_max_size=wire.BODY_BYTES_MAX)
    app[FAILED] = asyncio.Event()
    for method, path, call in _CALLS:
        app.router.add_route(method, API + path, partial(_answer_call, call))
    for method, path, control in _CONTROLS:
        for prefix in ("", API):
            app.router.add_route(method, prefix + path, partial(_answer_control, control))
    app.router.add_post(MCP_PATH, _answer_agent)
    app.cleanup_ctx.append(partial(_life, settings))
    return app


async def _life(settings: SandboxSettings, app: web.Application) -> AsyncIterator[None]:
    """From the opening of the file to its closing; a failure while opening leaves nothing open."""
    store = Store.open(settings.data_file, app[FAILED])
    try:
        service = Service.load(store, settings.fee_bps, settings.wallet_minimum)
        await service.open_wallets(frozenset(settings.keys.values()), settings.opening_balance)
        app[_CONTRACT] = Contract(settings, service)
        app[_CONTROLLED] = Controls(service, app[_CONTRACT])
        app[_AGENTS] = Agents(app[_CONTRACT])
        yield
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def _listening(settings: SandboxSettings) -> AsyncIterator[tuple[str, web.Application]]:
    host, port = check(settings)
    app = build(settings)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
        bound_host, bound_port = runner.addresses[0][:2]
        named = f"[{bound_host}]" if ":" in bound_host else bound_host
        yield f"http://{named}:{bound_port}", app
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def running(settings: SandboxSettings) -> AsyncIterator[str]:
    """Serve inside this event loop; yields the origin, such as "http://127.0.0.1:40123".

    The contract is under `API` there, the controls are at its root.
    """
    async with _listening(settings) as (origin, _):
        yield origin


async def serve(settings: SandboxSettings, ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called with the origin once requests are taken.

    Raises as `build`, `OSError` when the address is taken, and `StoreFailed` when a commit failed
    meanwhile.
    """
    with _stop_signals() as stopped:
        async with _listening(settings) as (origin, app):
            if ready is not None:
                ready(origin)
            waits = [
                asyncio.create_task(stopped.wait(), name="sandbox-stop"),
                asyncio.create_task(app[FAILED].wait(), name="sandbox-failed"),
            ]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            if app[FAILED].is_set():
                raise StoreFailed(
                    "the sandbox's file could not be written; make room, then restart"
                )


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set while this is open."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        yield stopped
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
