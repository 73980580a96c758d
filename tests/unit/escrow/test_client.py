from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from meterd.core.settlement import Answer, AnswerKind, Reading, Release, ReleaseStatus
from meterd.errors import ConfigurationError, Refused, Unavailable
from meterd.escrow.client import EscrowApi, EscrowClient, EscrowPaths, Listing
from meterd.escrow.documents import BODY_BYTES_MAX
from meterd.escrow.outcomes import Created, CreateFailed, Unread

KEY = "pf_live_0a1B2c3D4e5F6g7H8i9J"
RELEASE = Release("rel_77", "esc_1", 2, 0, ReleaseStatus.SENT, "amount", 0, 0, ())
ESCROW = {
    "escrow_id": "esc_1",
    "status": "funded",
    "amount": "10.00",
    "released_amount": "0.000002",
    "remaining": "9.999998",
}


def api(origin: str, **changes: Any) -> EscrowApi:
    return EscrowApi(**{"base_url": f"{origin}/api/v1", "api_key": KEY, **changes})


@dataclass
class Calls:
    """What `EscrowClient` told its observer."""

    seen: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, call: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append((call, code))


# --- a service that speaks HTTP -------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving(handler: Handler, **changes: Any) -> AsyncIterator[EscrowClient]:
    """A client of a service that answers every path and method with one handler."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        origin = f"http://127.0.0.1:{server.port}"
        observe = changes.pop("observe", Calls())
        mono = changes.pop("mono", asyncio.get_running_loop().time)
        async with EscrowClient(api(origin, **changes), observe=observe, mono=mono) as client:
            yield client


@dataclass
class Recorder:
    """A handler that keeps what was asked and answers with what it was told."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append((request.method, request.path_qs, dict(request.headers), body))
        return web.json_response(self.body or ESCROW, status=self.status, headers=self.headers)


async def test_release_is_asked_as_the_contract_has_it():
    """A release is one POST with a plain decimal text, the memo and the key of its row."""
    service = Recorder()
    async with serving(service) as client:
        answer = await client.release_partial(RELEASE)

    [(method, path, headers, body)] = service.asked
    assert (method, path) == ("POST", "/api/v1/escrow/esc_1/release-partial")
    assert body == b'{"amount": "0.000002", "memo": "meterd rel_77"}'
    assert headers["Idempotency-Key"] == "rel_77"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    assert headers["Connection"] == "close"
    assert headers["Accept-Encoding"] == "identity"
    assert answer == Answer(AnswerKind.CONFIRMED, "200 released 0.000002 so far", released=2)


async def test_names_of_paths_and_header_are_those_of_the_settings():
    """Another deployment's paths and header are used as they are configured."""
    service = Recorder()
    paths = EscrowPaths(status="/e/{id}/state", release_partial="/pay/{id}")
    async with serving(service, paths=paths, idempotency_header="X-Once") as client:
        await client.release_partial(RELEASE)
        await client.read("esc_1")

    assert [row[:2] for row in service.asked] == [
        ("POST", "/api/v1/pay/esc_1"),
        ("GET", "/api/v1/e/esc_1/state"),
    ]
    assert service.asked[0][2]["X-Once"] == "rel_77"


@pytest.mark.parametrize("amount", [0, -1])
async def test_release_of_nothing_is_refused_before_anything_is_sent(amount):
    """Zero never reaches a service that might take it for everything."""
    service = Recorder()
    nothing = Release("rel_1", "esc_1", amount, 0, ReleaseStatus.SENT, "", 0, 0, ())
    async with serving(service) as client:
        with pytest.raises(ValueError, match="more than 0"):
            await client.release_partial(nothing)

    assert service.asked == []


@pytest.mark.parametrize("escrow", ["", "../admin", "a/b", "a b", "a\r\nb", "é", "x" * 65, "a%2f"])
async def test_id_that_cannot_stand_in_an_address_is_never_sent(escrow):
    """An id of other characters names no escrow, and no request is made of it."""
    service = Recorder()
    odd = Release("rel_1", escrow, 1, 0, ReleaseStatus.SENT, "", 0, 0, ())
    async with serving(service) as client:
        got = await client.read(escrow)
        with pytest.raises(ValueError, match="id"):
            await client.release_partial(odd)

    assert isinstance(got, Unread)
    assert (got.kind, service.asked) == ("missing", [])


async def test_reading_is_stamped_with_the_time_of_its_request():
    """A reading is as old as its request, not as its answer."""
    ticks = iter(range(100, 200))
    async with serving(Recorder(), mono=lambda: next(ticks)) as client:
        got = await client.read("esc_1")

    assert isinstance(got, Reading)
    assert (got.mono, got.released, got.remaining) == (100, 2, 9_999_998)


async def test_readings_share_a_connection_and_releases_never_do():
    """Readings keep their connection; each release comes over a new one."""
    peers: list[tuple[str, Any]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.append((request.method, request.transport.get_extra_info("peername")))
        return web.json_response(ESCROW)

    async with serving(handler) as client:
        for _ in range(3):
            await client.read("esc_1")
            await client.release_partial(RELEASE)

    gets = {peer for method, peer in peers if method == "GET"}
    posts = {peer for method, peer in peers if method == "POST"}
    assert (len(peers), len(gets), len(posts)) == (6, 1, 3)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed(status):
    """A redirect is a doubt for a release and no reading, and nothing is asked where it leads."""
    service = Recorder(status, headers={"Location": "/api/v1/escrow/esc_2/release"})
    async with serving(service) as client:
        answer = await client.release_partial(RELEASE)
        got = await client.read("esc_1")

    assert isinstance(got, Unread)
    assert (answer.kind, got.kind) == (AnswerKind.DOUBT, "unavailable")
    assert [row[0] for row in service.asked] == ["POST", "GET"]


async def test_proxy_of_the_environment_is_not_used(monkeypatch):
    """The key goes to the service and to nobody in between."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    async with serving(Recorder()) as client:
        answer = await client.release_partial(RELEASE)

    assert answer.kind is AnswerKind.CONFIRMED


async def test_cookies_of_the_service_are_not_kept():
    """What one answer sets is not sent with the next request."""
    service = Recorder(headers={"Set-Cookie": "session=1"})
    async with serving(service) as client:
        await client.read("esc_1")
        await client.read("esc_1")

    assert all("Cookie" not in row[2] for row in service.asked)


async def test_wait_is_taken_from_a_real_answer():
    """Retry-After arrives through the client."""
    service = Recorder(429, {"error": "rate_limited"}, {"Retry-After": "3"})
    async with serving(service) as client:
        answer = await client.release_partial(RELEASE)
        got = await client.read("esc_1")

    assert answer == Answer(AnswerKind.LIMITED, "429 rate_limited", retry_after=3.0)
    assert got == Unread("limited", "429 rate_limited", 3.0)


@pytest.mark.parametrize("declared", [True, False])
async def test_answer_without_an_end_is_cut_off(declared):
    """No more than 64 KiB is read, whether or not the length was told before."""
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        if declared:
            response.content_length = 1 << 30
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 30:
                await response.write(b'{"x":"' + b"a" * 65_530)
                sent += 65_536
        return response

    async with serving(handler) as client:
        answer = await client.release_partial(RELEASE)
        got = await client.read("esc_1")

    assert answer == Answer(AnswerKind.DOUBT, "200 the body is longer than 64 KiB")
    assert got == Unread("nonsense", "200 the body is longer than 64 KiB")
    assert sent < 1 << 30


async def test_answer_of_64_kib_is_read_whole():
    """The limit itself is allowed."""
    body = b'{"released_total":"0.000002"}'.ljust(BODY_BYTES_MAX)

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body)

    async with serving(handler) as client:
        answer = await client.release_partial(RELEASE)

    assert answer.kind is AnswerKind.CONFIRMED


async def test_compressed_answer_is_not_unpacked():
    """A small answer cannot become a large one."""

    async def handler(_: web.Request) -> web.StreamResponse:
        packed = b"\x1f\x8b\x08\x00" + b"\x00" * 60
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    async with serving(handler) as client:
        answer = await client.release_partial(RELEASE)

    assert answer == Answer(AnswerKind.DOUBT, "200 the body is no JSON")


async def test_late_answer_is_a_doubt_and_no_reading():
    """When the time is over, a release may have happened; a reading did not."""
    asked = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.Event().wait()
        return web.Response()

    calls = Calls()
    async with serving(handler, request_timeout_s=0.2, observe=calls) as client:
        answer = await client.release_partial(RELEASE)
        got = await client.read("esc_1")

    assert asked.is_set()
    assert answer == Answer(AnswerKind.DOUBT, "no answer: no whole answer within 0.2 s")
    assert got == Unread("unavailable", "no whole answer within 0.2 s")
    assert calls.seen == [("release_partial", "no_answer"), ("read", "no_answer")]


@pytest.mark.parametrize(
    ("status", "kind"), [(200, AnswerKind.DOUBT), (401, AnswerKind.KEY_REFUSED)]
)
async def test_body_that_never_ends_is_read_by_its_status(status, kind):
    """A head whose body hangs is decided by the status where that is enough, else it is a doubt."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        await response.write(b"{")
        await asyncio.Event().wait()
        return response

    async with serving(handler, request_timeout_s=0.2) as client:
        answer = await client.release_partial(RELEASE)

    assert answer == Answer(kind, f"{status} no whole answer within 0.2 s")


async def test_cancelled_release_is_raised_to_the_caller():
    """A cancellation on the way is neither swallowed nor turned into an answer."""
    asked = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.Event().wait()
        return web.Response()

    async with serving(handler) as client:
        task = asyncio.create_task(client.release_partial(RELEASE))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert task.cancelled()


async def test_calls_are_counted_with_their_status():
    """The observer is told each call once, by name and status."""
    calls = Calls()
    service = Recorder(404, {"error": "escrow_not_found"})
    async with serving(service, observe=calls) as client:
        await client.read("esc_1")
        await client.release_partial(RELEASE)
        await client.list_escrows("agent_provider")

    assert calls.seen == [("read", "404"), ("release_partial", "404"), ("list", "404")]


# --- lists ----------------------------------------------------------------------------------------


async def test_list_is_read_page_by_page():
    """The cursor of each page leads to the next, and the agent is named in each request."""
    queries: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        queries.append(dict(request.query))
        number = len(queries)
        row = ESCROW | {"escrow_id": f"esc_{number}", "memo": f"memo {number}"}
        cursor = f"c/{number}&x=1" if number < 3 else None
        return web.json_response({"escrows": [row, {}], "next_cursor": cursor})

    async with serving(handler) as client:
        listing = await client.list_escrows("agent:1")

    assert isinstance(listing, Listing)
    assert [(row.reading.escrow, row.memo) for row in listing.escrows] == [
        ("esc_1", "memo 1"),
        ("esc_2", "memo 2"),
        ("esc_3", "memo 3"),
    ]
    assert (listing.skipped, listing.complete) == (3, True)
    assert [query.get("cursor") for query in queries] == [None, "c/1&x=1", "c/2&x=1"]
    assert {query["agent_id"] for query in queries} == {"agent:1"}


async def test_list_that_goes_in_a_circle_is_nonsense():
    """A cursor that leads back to its page ends the reading."""
    service = Recorder(body={"escrows": [], "next_cursor": "again"})
    async with serving(service) as client:
        got = await client.list_escrows("agent_1")

    assert isinstance(got, Unread)
    assert (got.kind, len(service.asked)) == ("nonsense", 2)


async def test_list_without_an_end_is_cut_off_and_says_so():
    """Pages are bounded; what was read of more of them is not called complete."""
    asked = 0

    async def handler(_: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return web.json_response({"escrows": [ESCROW], "next_cursor": str(asked)})

    async with serving(handler) as client:
        listing = await client.list_escrows("agent_1")

    assert isinstance(listing, Listing)
    assert (asked, len(listing.escrows), listing.complete) == (200, 200, False)


async def test_list_of_no_agent_is_refused():
    """An agent's id is checked before it is asked for."""
    async with serving(Recorder()) as client:
        with pytest.raises(ValueError, match="agent"):
            await client.list_escrows("a b")


# --- creations and the rest -----------------------------------------------------------------------

CREATED = ESCROW | {"released_amount": "0.00", "remaining": "10.00", "memo": "stream esc_k1"}
WANTED = ("agent:payee", 10_000_000, "stream esc_k1")


async def test_creation_is_asked_as_the_contract_has_it():
    """One POST with a plain decimal text, the memo and the key; hours only where there are some."""
    service = Recorder(201, CREATED)
    async with serving(service) as client:
        made = [await client.create(*WANTED, hours, "esc_k1") for hours in (None, 168)]

    assert all(isinstance(one, Created) and one.escrow.id == "esc_1" for one in made)
    assert [row[:2] for row in service.asked] == [("POST", "/api/v1/escrow")] * 2
    assert service.asked[0][3] == (
        b'{"to_agent_id": "agent:payee", "amount": "10.00", "memo": "stream esc_k1"}'
    )
    assert service.asked[1][3].endswith(b', "auto_release_hours": 168}')
    assert service.asked[0][2]["Idempotency-Key"] == "esc_k1"
    assert service.asked[0][2]["Connection"] == "close"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"amount": 0}, "more than 0"),
        ({"amount": -1}, "more than 0"),
        ({"amount": 1.0}, "whole micros"),
        ({"amount": True}, "whole micros"),
        ({"amount": "10.00"}, "whole micros"),
        ({"to_agent_id": "a b"}, "agent"),
        ({"to_agent_id": ".."}, "agent"),
        ({"memo": ""}, "memo"),
        ({"memo": "m" * 201}, "memo"),
        ({"memo": "a\nb"}, "memo"),
        ({"memo": "two  blanks"}, "memo"),
        ({"memo": f"my {KEY}"}, "memo"),
        ({"auto_release_hours": 0}, "hours"),
        ({"auto_release_hours": 1.5}, "hours"),
        ({"auto_release_hours": True}, "hours"),
        ({"key": "a b"}, "key"),
        ({"key": "k" * 65}, "key"),
    ],
    ids=str,
)
async def test_creation_that_makes_no_sense_is_refused_before_anything_is_sent(changed, words):
    """An amount that is no whole number above 0 locks nothing; a memo is one that comes back."""
    service = Recorder(201, CREATED)
    asked = {"to_agent_id": "agent", "amount": 10, "memo": "m", "auto_release_hours": 1, "key": "k"}
    async with serving(service) as client:
        with pytest.raises(ValueError, match=words) as caught:
            await client.create(**{**asked, **changed})

    assert service.asked == []
    assert KEY not in str(caught.value)


async def test_rest_is_asked_for_without_an_amount_at_a_path_of_its_own():
    """An empty object to `refund` and to `release`, each with its key; nobody else asks there."""
    service = Recorder(body=CREATED | {"remaining": "0.00", "released_amount": "10.00"})
    async with serving(service) as client:
        refunded = await client.refund_rest("esc_1", "close_1")
        released = await client.release_rest("esc_1", "close_2")

    assert [(row[0], row[1], row[3]) for row in service.asked] == [
        ("POST", "/api/v1/escrow/esc_1/refund", b"{}"),
        ("POST", "/api/v1/escrow/esc_1/release", b"{}"),
    ]
    keys = [row[2]["Idempotency-Key"] for row in service.asked]
    assert (keys, refunded.kind, released.kind) == (
        ["close_1", "close_2"],
        AnswerKind.CONFIRMED,
        AnswerKind.CONFIRMED,
    )


@pytest.mark.parametrize("call", ["refund_rest", "release_rest"])
@pytest.mark.parametrize(
    ("escrow", "key"), [("../x", "k"), ("", "k"), ("esc_1", ""), ("esc_1", "\n")]
)
async def test_rest_of_what_cannot_stand_in_an_address_is_refused(call, escrow, key):
    """Nothing is sent for an id or a key of other characters."""
    service = Recorder()
    async with serving(service) as client:
        with pytest.raises(ValueError, match="id or a key"):
            await getattr(client, call)(escrow, key)

    assert service.asked == []


Ask = Callable[[EscrowClient], Awaitable[Answer | Created | CreateFailed]]
PAYING: dict[str, Ask] = {
    "create": lambda client: client.create(*WANTED, None, "k"),
    "refund_rest": lambda client: client.refund_rest("esc_1", "k"),
    "release_rest": lambda client: client.release_rest("esc_1", "k"),
}


@pytest.mark.parametrize("call", PAYING)
async def test_call_that_pays_never_shares_a_connection(call):
    """Each comes over a new one, and none is sent where a redirect leads."""
    peers = []

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.append(request.transport.get_extra_info("peername"))
        return web.json_response(ESCROW, status=307, headers={"Location": "/api/v1/x"})

    async with serving(handler) as client:
        answers = [await PAYING[call](client) for _ in range(2)]

    assert len(set(peers)) == len(peers) == 2
    assert [getattr(answer, "kind", None) for answer in answers] == [AnswerKind.DOUBT] * 2


@pytest.mark.parametrize("call", PAYING)
async def test_call_that_pays_knows_whether_it_left(call):
    """Nobody listening is certain; a connection that ends after the request is a doubt."""
    calls = Calls()
    async with EscrowClient(api(f"http://127.0.0.1:{closed_port()}"), observe=calls) as client:
        unsent = await PAYING[call](client)
    async with broken(close_after_request) as (client, wire, _):
        doubt = await PAYING[call](client)

    kinds = [getattr(answer, "kind", None) for answer in (unsent, doubt)]
    assert kinds == [AnswerKind.NOT_SENT, AnswerKind.DOUBT]
    assert (wire.requests, calls.seen) == ([b"POST"], [(call, "not_sent")])


# --- the probe ------------------------------------------------------------------------------------


def service_of(answers: Callable[[str, str], tuple[int, Any]]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        status, body = answers(request.method, request.path)
        return web.json_response(body, status=status)

    return handler


NO_ESCROW = (404, {"error": "escrow_not_found", "message": "there is no such escrow"})


def contract(method: str, path: str) -> tuple[int, Any]:
    known = method == "GET" or path.endswith("/release-partial")
    return NO_ESCROW if known else (404, {"error": "Not Found", "message": f"{method} {path}"})


async def test_probe_finds_a_service_that_keeps_the_contract():
    """A service with release-partial is known by its words about an escrow that is not there."""
    async with serving(service_of(contract)) as client:
        found = await client.probe()

    assert found == (
        "the key reads, and /escrow/{id}/release-partial exists: "
        "404 escrow_not_found: there is no such escrow"
    )


async def test_probe_knows_a_path_that_ends_with_the_id():
    """The call that cannot exist is another call, not another escrow, whatever the path is like."""

    def answers(method: str, path: str) -> tuple[int, Any]:
        known = method == "GET" or path.count("/") == 4
        return NO_ESCROW if known else (404, {"error": "no_route"})

    paths = EscrowPaths(release_partial="/pay/{id}")
    async with serving(service_of(answers), paths=paths) as client:
        found = await client.probe()

    assert found.startswith("the key reads, and /pay/{id} exists")


async def test_probe_asks_only_for_escrows_that_are_made_up():
    """The probe's ids are random, and what it asks for is the smallest amount."""
    service = Recorder(*NO_ESCROW)
    async with serving(service) as client:
        with pytest.raises(Refused):
            await client.probe()

    ids = {path.split("/")[4] for _, path, _, _ in service.asked}
    [escrow] = ids
    assert escrow.startswith("esc_meterd_probe_")
    assert len(escrow) == 33
    posts = [body for method, _, _, body in service.asked if method == "POST"]
    assert all(body.startswith(b'{"amount": "0.000001"') for body in posts)


@pytest.mark.parametrize(
    ("get", "post", "error", "words"),
    [
        (NO_ESCROW, (404, {"error": "no_route", "message": "{path}"}), Refused, "not exist"),
        (NO_ESCROW, (404, {"message": "gone"}), Refused, "call that does not exist"),
        (NO_ESCROW, (200, {"success": True}), Refused, "answered 200"),
        (NO_ESCROW, (500, {"x": 1}), Refused, "without the documented error"),
        ((401, {"error": f"bad key {KEY}"}), NO_ESCROW, Refused, "refused the key"),
        ((200, ESCROW), NO_ESCROW, Refused, "does not exist"),
        ((503, {"error": "maintenance"}), NO_ESCROW, Unavailable, "maintenance"),
    ],
)
async def test_probe_refuses_a_service_that_must_not_be_used(get, post, error, words):
    """What does not keep the contract is refused in words that say what to do, without the key."""

    def answers(method: str, path: str) -> tuple[int, Any]:
        status, body = get if method == "GET" else post
        return status, {name: path if text == "{path}" else text for name, text in body.items()}

    async with serving(service_of(answers)) as client:
        with pytest.raises(error, match=words) as caught:
            await client.probe()

    assert KEY not in str(caught.value)


async def test_probe_says_when_nobody_answers():
    """A service that is down is no verdict on it."""
    async with EscrowClient(api(f"http://127.0.0.1:{closed_port()}")) as client:
        with pytest.raises(Unavailable, match="ClientConnectorError"):
            await client.probe()


# --- a wire that breaks ---------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Wire:
    """A TCP server that does one thing with each connection, and counts the requests it read."""

    act: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    requests: list[bytes] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.act(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def request(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head.split(b" ", 1)[0])
        if head.startswith(b"POST"):
            await reader.readuntil(b"}")


@contextlib.asynccontextmanager
async def broken(
    act: Callable[[Wire, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    scheme: str = "http",
    **changes: Any,
) -> AsyncIterator[tuple[EscrowClient, Wire, Calls]]:
    """A client of a TCP server that does as `act` has it."""
    wire = Wire(lambda reader, writer: act(wire, reader, writer))
    calls = Calls()
    server = await asyncio.start_server(wire, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        EscrowClient(api(f"{scheme}://127.0.0.1:{port}", **changes), observe=calls) as client,
    ):
        yield client, wire, calls


async def abort(_: Wire, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def close_after_request(
    wire: Wire, reader: asyncio.StreamReader, _: asyncio.StreamWriter
) -> None:
    await wire.request(reader)


def answering(raw: bytes) -> Any:
    async def act(wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await wire.request(reader)
        writer.write(raw)
        await writer.drain()

    return act


async def test_refused_connection_is_not_sent():
    """Where nobody listens nothing was sent, and the release may be asked again."""
    calls = Calls()
    origin = f"http://127.0.0.1:{closed_port()}"
    async with EscrowClient(api(origin), observe=calls) as client:
        answer = await client.release_partial(RELEASE)
        got = await client.read("esc_1")

    assert isinstance(got, Unread)
    assert (answer.kind, got.kind) == (AnswerKind.NOT_SENT, "unavailable")
    assert answer.detail.startswith("nothing was sent: ClientConnectorError")
    assert calls.seen == [("release_partial", "not_sent"), ("read", "not_sent")]


async def test_name_that_nobody_knows_is_not_sent():
    """A name without an address is a certain failure."""
    async with EscrowClient(api("https://escrow.invalid", request_timeout_s=10)) as client:
        answer = await client.release_partial(RELEASE)

    assert answer.kind is AnswerKind.NOT_SENT


async def test_tls_that_fails_is_not_sent():
    """A server that speaks no TLS gets no byte of the request."""

    async def plain(_: Wire, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()

    async with broken(plain, "https") as (client, wire, _):
        answer = await client.release_partial(RELEASE)

    assert (answer.kind, wire.requests) == (AnswerKind.NOT_SENT, [])


async def test_tls_that_hangs_is_not_sent_when_the_time_is_over():
    """A time-out before the first byte of the request is certain too."""

    async def hang(_: Wire, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    async with broken(hang, "https", request_timeout_s=0.2) as (client, _, calls):
        answer = await client.release_partial(RELEASE)

    assert answer.kind is AnswerKind.NOT_SENT
    assert calls.seen == [("release_partial", "not_sent")]


@pytest.mark.parametrize("act", [abort, close_after_request])
async def test_connection_that_ends_without_an_answer_is_a_doubt(act):
    """Once a byte may have left, no failure is certain, and the release is not asked again."""
    async with broken(act) as (client, wire, calls):
        answer = await client.release_partial(RELEASE)

    assert answer.kind is AnswerKind.DOUBT
    assert wire.requests in ([], [b"POST"])
    assert calls.seen == [("release_partial", "no_answer")]


async def test_reading_whose_connection_ends_is_asked_once_more():
    """A GET is asked twice at most; a POST never."""
    async with broken(close_after_request) as (client, wire, _):
        got = await client.read("esc_1")

    assert isinstance(got, Unread)
    assert (got.kind, wire.requests) == ("unavailable", [b"GET", b"GET"])


WHOLE = b'{"released_total":"0.000002"}'
HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        HEAD + b"Content-Length: 500\r\n\r\n" + WHOLE,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1d\r\n" + WHOLE + b"\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + WHOLE,
        HEAD + b"Content-Length: 2\r\n\r\n" + WHOLE,
        HEAD + b"Content-Length: -2\r\n\r\n" + WHOLE,
        HEAD + b"Content-Length: 29\r\nContent-Length: 30\r\n\r\n" + WHOLE,
        HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n" + WHOLE,
        HEAD + b"X: y\r\n" * 50_000 + b"\r\n" + WHOLE,
        HEAD,
        b"HTTP/1.1 20",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 \xff\xff\xff\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00" * 1000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + WHOLE,
    ],
    ids=range(17),
)
async def test_answer_that_is_broken_http_is_a_doubt(raw):
    """Whatever comes instead of a whole answer, a release that left is in doubt, and left once."""
    async with broken(answering(raw), request_timeout_s=2) as (client, wire, _):
        answer = await client.release_partial(RELEASE)
        got = await client.read("esc_1")

    assert answer.kind is AnswerKind.DOUBT, answer
    assert wire.requests.count(b"POST") == 1
    assert isinstance(got, Unread)
    assert KEY not in answer.detail + got.detail
    assert max(len(answer.detail), len(got.detail)) <= 220


@pytest.mark.parametrize("tail", [b"", b"Content-Length: 29\r\n"])
async def test_answer_that_ends_with_its_connection_is_whole(tail):
    """Without a length the end of the connection is the end of the body, as HTTP says."""
    async with broken(answering(HEAD + tail + b"\r\n" + WHOLE)) as (client, _, __):
        answer = await client.release_partial(RELEASE)

    assert (answer.kind, answer.released) == (AnswerKind.CONFIRMED, 2)


async def test_head_in_single_bytes_is_over_when_the_time_is():
    """A slow answer has the time-out of the whole, not one for each piece."""

    async def drip(wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await wire.request(reader)
        while True:
            writer.write(b"H")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with broken(drip, request_timeout_s=0.3) as (client, wire, _):
        answer = await client.release_partial(RELEASE)

    assert (answer.kind, wire.requests) == (AnswerKind.DOUBT, [b"POST"])


# --- settings -------------------------------------------------------------------------------------


def test_key_is_not_in_the_settings_text():
    """Settings can be logged."""
    assert KEY not in repr(api("https://escrow.example.com"))
    assert KEY not in str(api("https://escrow.example.com"))


@pytest.mark.parametrize(
    "url",
    [
        *("https://escrow.example.com/api/v1/", "https://escrow.example.com:8443"),
        *("http://127.0.0.1:8788", "http://127.9.9.9", "http://[::1]:8788/x", "http://localhost"),
    ],
)
def test_safe_address_is_taken(url):
    """Https anywhere, http on this machine alone."""
    assert EscrowApi(url, KEY).base_url == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *("", "escrow.example.com", "//escrow.example.com", "https://", "https:///x", "ftp://a"),
        *("http://escrow.example.com", "http://127.0.0.1.example.com", "http://10.0.0.1"),
        *("https://user@host", "https://user:pw@host", "https://host/x?y=1", "https://host/#a"),
        *("https://host:99999", "https://ho st", "https://host\r\nX: y", "https://host\\@evil"),
    ],
)
def test_address_that_would_leak_the_key_is_refused(url):
    """No address sends the key in the clear, and none looks like another one."""
    with pytest.raises(ConfigurationError, match=r"escrow\.base_url"):
        EscrowApi(url, KEY)


def test_every_mistake_of_the_settings_is_told_at_once():
    """One error lists all of them with their keys, and none shows the key."""
    with pytest.raises(ConfigurationError) as caught:
        EscrowApi(
            base_url="http://example.com",
            api_key=f"{KEY} and more\r\n",
            paths=EscrowPaths(status="/escrow", list="/e/{id}", release_partial="/a/../{id}"),
            idempotency_header="A: b",
            request_timeout_s=0,
            connections_max=0,
        )

    assert [mistake.key for mistake in caught.value.mistakes] == [
        "escrow.base_url",
        "escrow.api_key",
        "escrow.idempotency_header",
        "escrow.request_timeout",
        "escrow.connections_max",
        "escrow.paths",
        "escrow.paths",
    ]
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "paths",
    [
        EscrowPaths(release_partial="/escrow/{id}/release"),
        EscrowPaths(refund="/escrow/{id}/release"),
        EscrowPaths(refund="/escrow/{id}/release-partial"),
    ],
)
def test_paths_that_would_take_one_call_for_another_are_refused(paths):
    """Where a release of everything stands, nothing else may."""
    with pytest.raises(ConfigurationError, match="one of them pays all") as caught:
        api("https://escrow.example.com", paths=paths)

    assert KEY not in str(caught.value)
