from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from meterd.mcp import asgi

LIMIT = 1000

Serve = Callable[[asgi.App], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve an ASGI application behind the bridge; the address."""
    async with AsyncExitStack() as stack:

        async def make(app: asgi.App) -> str:
            async def answer(request: web.Request) -> web.StreamResponse:
                try:
                    return await asgi.answer(app, request, "somebody", LIMIT)
                except asgi.BrokenApp as error:
                    return web.Response(status=599, text=str(error))
                except LookupError:
                    return web.Response(status=598)

            outside = web.Application()
            outside.router.add_route("*", "/{tail:.*}", answer)
            runner = web.AppRunner(outside, handler_cancellation=False, shutdown_timeout=2.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return f"http://127.0.0.1:{runner.addresses[0][1]}"

        yield make


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def piece(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Keeps:
    """An application that keeps what it was told and answers in one piece."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.scope: asgi.Scope = {}
        self.told: list[Any] = []
        self._answers = answers or (start(200, (b"content-type", b"text/x")), piece(b"said"))

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        self.scope = scope
        self.told.append(await receive())
        for answer in self._answers:
            await send(answer)


async def test_app_gets_the_request_and_the_client_its_answer(serve, session):
    """Method, path, query, headers and the whole body; status, headers and the whole body."""
    app = Keeps(
        start(207, (b"Content-Type", b"text/x"), (b"X-One", b"1"), (b"X-One", b"2")),
        piece(b"said"),
    )
    address = await serve(app)
    async with session.post(f"{address}/a%20b?c=d%26", data=b"asked") as answer:
        body = await answer.read()

    assert (answer.status, body) == (207, b"said")
    assert answer.headers["Content-Type"] == "text/x"
    assert answer.headers.getall("X-One") == ["1", "2"]
    assert app.told == [{"type": "http.request", "body": b"asked", "more_body": False}]
    wanted = {
        "type": "http",
        "method": "POST",
        "path": "/a b",
        "raw_path": b"/a%20b",
        "query_string": b"c=d%26",
        "scheme": "http",
        "http_version": "1.1",
    }
    assert wanted.items() <= app.scope.items()
    assert app.scope[asgi.CALLER] == "somebody"


async def test_headers_reach_the_app_in_small_letters_and_without_secrets(serve, session):
    """The guard has read the token; nothing behind it needs to see it."""
    app = Keeps()
    headers = {"X-Other": "seen", "Authorization": "Bearer secret", "Cookie": "a=secret"}
    async with session.post(await serve(app), headers=headers):
        pass

    assert (b"x-other", b"seen") in app.scope["headers"]
    assert b"secret" not in b" ".join(b"".join(pair) for pair in app.scope["headers"])


async def test_an_answer_without_a_body_has_none(serve, session):
    """As the protocol answers a notification."""
    async with session.post(await serve(Keeps(start(202), piece(b"")))) as answer:
        assert (answer.status, await answer.read()) == (202, b"")


async def test_pieces_are_streamed_as_they_come(serve, session):
    """The first one arrives while the app still waits to say the second."""
    go_on = asyncio.Event()

    async def app(_: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        await receive()
        await send(start(200, (b"content-type", b"text/event-stream")))
        await send(piece(b"one", more=True))
        await go_on.wait()
        await send(piece(b"two", more=True))
        await send(piece(b""))

    async with session.get(await serve(app)) as answer:
        assert await answer.content.readexactly(3) == b"one"
        go_on.set()
        assert await answer.read() == b"two"
    assert answer.headers["Content-Type"] == "text/event-stream"


async def test_a_body_that_says_it_is_too_long_is_refused_unread(serve, session):
    """The app is never asked."""
    app = Keeps()
    async with session.post(await serve(app), data=b"x" * (LIMIT + 1)) as answer:
        assert answer.status == 413
    assert app.told == []


async def test_a_body_that_turns_out_too_long_is_refused(serve, session):
    """Chunks do not say how many will come."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 100

    app = Keeps()
    async with session.post(await serve(app), data=chunks()) as answer:
        assert answer.status == 413
    assert app.told == []


async def test_a_body_as_long_as_the_limit_is_taken(serve, session):
    """The limit itself is allowed."""
    app = Keeps()
    async with session.post(await serve(app), data=b"x" * LIMIT) as answer:
        assert answer.status == 200
    assert len(app.told[0]["body"]) == LIMIT


async def test_app_that_listens_on_hears_that_its_answer_is_out(serve, session):
    """A task that waits for the end of the request is not left behind."""
    heard: list[Any] = []

    async def app(_: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        async def listen() -> None:
            await receive()
            heard.append(await receive())

        async with asyncio.TaskGroup() as group:
            group.create_task(listen())
            await send(start())
            await send(piece(b"done"))

    async with session.get(await serve(app)) as answer:
        assert await answer.read() == b"done"
    assert heard == [{"type": "http.disconnect"}]


async def test_app_hears_that_its_client_is_gone(serve):
    """It can stop what nobody waits for; what it still says is an error of the line."""
    begun, ended = asyncio.Event(), asyncio.Event()
    heard: list[Any] = []

    async def app(_: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        await receive()
        begun.set()
        heard.append(await receive())
        try:
            await send(start())
            await send(piece(b"too late", more=True))
        except OSError as error:
            heard.append(type(error))
        finally:
            ended.set()
        raise ConnectionResetError

    address = await serve(app)
    port = int(address.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await begun.wait()
    writer.close()
    async with asyncio.timeout(20):
        await ended.wait()

    assert heard == [{"type": "http.disconnect"}, ConnectionResetError]


@pytest.mark.parametrize(
    "answers",
    [
        (start(),),
        (piece(b"x"),),
        (start(), start()),
        (start(), piece(b"x"), piece(b"y")),
        ({"type": "http.response.trailers"},),
    ],
)
async def test_app_that_breaks_the_rules_is_no_answer(serve, session, answers):
    """It is said inside, and no half of an answer goes out."""
    async with session.get(await serve(Keeps(*answers))) as answer:
        assert answer.status == 599


async def test_app_that_says_nothing_is_no_answer(serve, session):
    """Coming back is not answering."""

    async def app(_: asgi.Scope, __: asgi.Receive, ___: asgi.Send) -> None:
        pass

    async with session.get(await serve(app)) as answer:
        assert answer.status == 599


async def test_what_the_app_raises_is_raised(serve, session):
    """Whoever has called the bridge knows what to make of it."""

    async def app(_: asgi.Scope, __: asgi.Receive, ___: asgi.Send) -> None:
        raise LookupError

    async with session.get(await serve(app)) as answer:
        assert answer.status == 598
