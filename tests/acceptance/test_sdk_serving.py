"""The middlewares and `@metered` in real servers, before a real daemon; clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from aiohttp import web
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from meterd.sdk import AsyncGate, AsyncMeter, metered
from meterd.sdk.aiohttp import USAGE, closing, gate
from meterd.sdk.asgi import GateMiddleware
from tests.acceptance.stage import Node, configuration, until
from tests.processes import Sandbox, free_port

PLAN = """
[plans.served]
pattern = "streaming"
rates = [{ meter = "calls", price = "0.10" }, { meter = "tokens", price = "0.001" }]
settle = { amount = "1000" }
"""
PAYER = "X-Customer"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


@pytest.fixture(scope="module")
def node(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    here = tmp_path_factory.mktemp("daemon")
    with Node(here, configuration(sandbox, plans=PLAN)) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def customer(sandbox: Sandbox, node: Node) -> str:
    """A new customer with one dollar."""
    return node.bind(sandbox.lock("1.00"), "served")


class Served:
    """A service under one of the two frameworks, and what its streams have made."""

    def __init__(self, node: Node, spool: Path, **options: Any) -> None:
        self.meter = AsyncMeter(node.url, spool=spool, batch_wait_s=0)
        self.gate = AsyncGate(node.url, timeout_s=10, **options.pop("gate", {}))
        self.options = {"agreement": PAYER, **options}
        self.made = 0
        self.url = ""
        self.tokens = metered(self.meter, "tokens", agreement="customer")(self._tokens)

    async def _tokens(self, customer: str) -> AsyncIterator[str]:
        """A stream without an end."""
        assert customer
        while True:
            self.made += 1
            yield f"token-{self.made} " * 100
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def on_aiohttp(served: Served) -> AsyncIterator[None]:
    """The service as an application of aiohttp, in a real server."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"answer": 42})

    async def count(request: web.Request) -> web.Response:
        request[USAGE].add(int(request.query["tokens"]), meter="tokens")
        return web.json_response({})

    async def broken(_: web.Request) -> web.Response:
        raise ValueError("broken")

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async with contextlib.aclosing(served.tokens(request[USAGE].agreement)) as tokens:
            async for token in tokens:
                await response.write(token.encode())
        return response

    gated = gate(served.gate, served.meter, **served.options)
    app = web.Application(middlewares=[gated])
    app.cleanup_ctx.append(closing(served.gate, served.meter))
    app.router.add_get("/answer", answer)
    app.router.add_get("/count", count)
    app.router.add_get("/broken", broken)
    app.router.add_get("/stream", stream)
    app.router.add_get("/health", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield
    await runner.cleanup()


@contextlib.asynccontextmanager
async def on_fastapi(served: Served) -> AsyncIterator[None]:
    """The service as an application of FastAPI, in uvicorn, on a thread of its own."""
    app = FastAPI()
    app.add_middleware(GateMiddleware, gate=served.gate, meter=served.meter, **served.options)

    @app.get("/answer")
    async def answer() -> dict[str, int]:
        return {"answer": 42}

    @app.get("/count")
    async def count(request: Request, tokens: int) -> dict[str, int]:
        request.state.usage.add(tokens, meter="tokens")
        return {}

    @app.get("/broken")
    async def broken() -> None:
        raise ValueError("broken")

    @app.get("/stream")
    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(served.tokens(request.state.usage.agreement))

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {}

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        served.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", lifespan="on", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            await asyncio.sleep(0.01)
        yield
        server.should_exit = True
        await asyncio.to_thread(thread.join)


FRAMEWORKS = pytest.mark.parametrize("framework", [on_aiohttp, on_fastapi])


async def ask(served: Served, path: str, customer: str = "") -> tuple[int, Any, Any]:
    headers = {PAYER: customer} if customer else {}
    async with (
        aiohttp.ClientSession() as session,
        session.get(served.url + path, headers=headers) as response,
    ):
        body = await response.read()
        shown = json.loads(body) if "json" in response.content_type else body
        return response.status, response.headers, shown


def wait_used(node: Node, customer: str, **meters: str) -> None:
    """Wait until these quantities are counted, and no others."""

    def used() -> dict[str, str]:
        rows = node.get(f"/v1/agreements/{customer}/usage")["items"]
        return {row["meter"]: row["quantity"] for row in rows}

    until(lambda: used() == meters, lambda: f"{meters}: {used()}")


@FRAMEWORKS
@pytest.mark.parametrize("hold", [None, 60])
async def test_service_serves_what_is_paid_for_and_says_402_for_the_rest(
    node: Node, customer: str, tmp_path: Path, framework: Any, hold: int | None
) -> None:
    """Ten calls for a dollar, each counted; the eleventh is told what is missing."""
    served = Served(node, tmp_path, hold=hold)
    async with framework(served):
        for _ in range(10):
            status, _, answer = await ask(served, "/answer", customer)
            assert (status, answer) == (200, {"answer": 42})
            assert await served.meter.aflush()
        # An answer may be there before its event is told of.
        await asyncio.to_thread(wait_used, node, customer, calls="10")
        status, headers, problem = await ask(served, "/answer", customer)
        nobody, _, _ = await ask(served, "/answer")
        unknown, _, _ = await ask(served, "/answer", "somebody-else")

    assert (status, nobody, unknown) == (402, 402, 402)
    assert headers["Content-Type"] == "application/problem+json"
    assert problem["type"] == "urn:meterd:problem:payment-required"
    assert (Decimal(problem["headroom"]), Decimal(problem["needed"])) == (0, Decimal("0.10"))
    assert node.get("/v1/holds")["items"] == []


@FRAMEWORKS
@pytest.mark.parametrize("hold", [None, 60])
async def test_handler_reports_what_it_really_used_and_failures_cost_nothing(
    node: Node, customer: str, tmp_path: Path, framework: Any, hold: int | None
) -> None:
    """The report comes before the call; a 500 and a 404 are free, and so is what is not gated."""

    def paid(request: Any) -> bool:
        path = request["path"] if isinstance(request, dict) else request.path
        return path != "/health"

    served = Served(node, tmp_path, hold=hold, only=paid)
    async with framework(served):
        counted = [await ask(served, f"/count?tokens={n}", customer) for n in (100, 23, 0)]
        failed = [await ask(served, path, customer) for path in ("/broken", "/nowhere")]
        health, _, _ = await ask(served, "/health")

    assert [status for status, _, _ in counted] == [200, 200, 200]
    assert [status for status, _, _ in failed] == [500, 404]
    assert health == 200
    wait_used(node, customer, tokens="123")
    assert node.get("/v1/holds")["items"] == []


@FRAMEWORKS
@pytest.mark.parametrize("hold", [None, 60])
async def test_client_who_leaves_in_the_middle_of_a_stream_pays_for_what_was_made(
    node: Node, customer: str, tmp_path: Path, framework: Any, hold: int | None
) -> None:
    """To the last token that the service has made, and for the call."""
    served = Served(node, tmp_path, hold=hold)
    async with framework(served):
        async with aiohttp.ClientSession(headers={PAYER: customer}) as session:
            response = await session.get(f"{served.url}/stream")
            await response.content.readexactly(20_000)
            response.close()
        made = -1
        while made != served.made:  # Until the service has noticed.
            made = served.made
            await asyncio.sleep(0.2)

    assert made >= 10
    wait_used(node, customer, tokens=str(made), calls="1")
    assert node.get("/v1/holds")["items"] == []


@FRAMEWORKS
@pytest.mark.parametrize(("policy", "expected"), [("allow", 200), ("deny", 503)])
async def test_service_follows_its_owner_where_meterd_cannot_be_asked(
    node: Node, customer: str, tmp_path: Path, framework: Any, policy: str, expected: int
) -> None:
    """What is served then is counted all the same, as soon as meterd is back."""
    served = Served(node, tmp_path, gate={"on_unreachable": policy})
    real, served.gate._place = (
        served.gate._place,
        type(served.gate._place)(f"http://127.0.0.1:{free_port()}"),
    )
    async with framework(served):
        status, headers, _ = await ask(served, "/answer", customer)
        served.gate._place = real

    assert status == expected
    assert headers.get("Retry-After") == (None if policy == "allow" else "1")
    wait_used(node, customer, **({"calls": "1"} if policy == "allow" else {}))
