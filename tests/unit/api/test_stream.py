"""The live stream over HTTP, on a real bookkeeper."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from dataclasses import dataclass

import pytest

from meterd.api import hub, stream
from meterd.core.settlement import AnswerKind
from tests.unit.api.conftest import World

USAGE = {"agreement": "esc_1", "meter": "tokens"}


@dataclass
class Event:
    """One event as a client reads it."""

    id: str
    kind: str
    data: dict


class Ear:
    """A client of the stream."""

    def __init__(self, response) -> None:
        self._response = response
        self.headers = response.headers

    async def next(self, *kinds: str) -> Event:
        """Wait for the next event of one of these kinds."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(10):
            async for line in self._response.content:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                elif "event" in fields and (not kinds or fields["event"] in kinds):
                    data = json.loads(fields["data"])
                    return Event(fields.get("id", ""), fields["event"], data)
                else:
                    fields = {}
        raise EOFError

    async def rest(self) -> bytes:
        """Read to the end."""
        async with asyncio.timeout(10):
            return await self._response.content.read()


@contextlib.asynccontextmanager
async def listening(world: World, query: str = "", **headers: str):
    """Listen for the length of a block."""
    url = f"{world.base}/v1/stream{query}"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with world.session.get(url, headers=named) as response:
        assert response.status == 200, await response.read()
        yield Ear(response)


async def use(world: World, number: int, agreement: str = "esc_1", quantity: int = 1000) -> None:
    """Send an event that is accepted."""
    event = {**USAGE, "agreement": agreement, "id": f"e-{number}", "quantity": quantity}
    assert (await world.post("/v1/events", event)).json["accepted"] == 1


async def test_listener_hears_of_usage_once_for_many_events(world):
    """A hundred events in one batch are one accrual, with the sums as they stand."""
    async with listening(world) as ear:
        start = await ear.next("start")
        events = [{**USAGE, "id": f"e-{n}", "quantity": 1000} for n in range(100)]
        await world.post("/v1/events", events)
        heard = await ear.next()

    assert ("text/event-stream", "no-store") == (
        ear.headers["Content-Type"],
        ear.headers["Cache-Control"],
    )
    assert (1, 0) == (start.data["agreements"], start.data["dead_letters"])
    assert ("accrual", "esc_1", "0.20", 100) == (
        heard.kind,
        heard.data["agreement"],
        heard.data["accrued"],
        heard.data["events"],
    )


async def test_listener_hears_of_each_state_of_a_release_and_of_escrows(world):
    """That it is intended and what came of it, each once; then a freeze."""
    await use(world, 1)
    async with listening(world) as ear:
        await ear.next("start")
        await world.release("esc_1", "rel_1", AnswerKind.CONFIRMED)
        await world.post("/v1/agreements/esc_1/freeze", {"reason": "a test"})
        releases = [await ear.next("release") for _ in range(2)]
        frozen = await ear.next("state")

    assert ["intended", "confirmed"] == [each.data["status"] for each in releases]
    assert {("rel_1", "esc_1", "0.002")} == {
        (each.data["id"], each.data["agreement"], each.data["amount"]) for each in releases
    }
    assert ("esc_1", "frozen") == (frozen.data["escrow"], frozen.data["state"])


async def test_listener_hears_of_sources_and_dead_letters(world):
    """What wants a person is told when it changes."""
    async with listening(world) as ear:
        await ear.next("start")
        await world.post("/v1/events", {**USAGE, "id": "e-1", "meter": "?", "quantity": 1})

        assert 1 == (await ear.next("dead_letters")).data["count"]


async def test_listener_of_one_agreement_hears_of_no_other(world):
    """The filter takes the agreement's or its escrow's id; one that is unknown is refused."""
    await world.bind("esc_2")
    async with listening(world, "?agreement=esc_2") as ear:
        await ear.next("start")
        await use(world, 1)
        await use(world, 2, "esc_2")
        heard = await ear.next()

    assert "esc_2" == heard.data["agreement"]
    assert 404 == (await world.get("/v1/stream?agreement=nobody")).status


async def test_listener_who_comes_back_hears_what_he_missed(world):
    """By the id of the last event that he has: nothing is left out, nothing comes twice."""
    async with listening(world) as ear:
        start = await ear.next("start")
    await world.post("/v1/agreements/esc_1/freeze", {"reason": "a test"})
    async with listening(world, Last_Event_ID=start.id) as ear:
        missed = await ear.next()
    async with listening(world, Last_Event_ID=missed.id) as ear:
        await world.post("/v1/agreements/esc_1/resume", {"reason": "a test"})
        behind = await ear.next("state", "reset")

    assert ("state", "frozen") == (missed.kind, missed.data["state"])
    assert ("state", "active") == (behind.kind, behind.data["state"])


@pytest.mark.parametrize("given", ["nonsense", "0000-1", "ffffffff-1", "-", "x" * 300])
async def test_listener_whose_last_event_is_not_known_is_told_to_read_afresh(world, given):
    """Of another process, or no id at all."""
    async with listening(world, Last_Event_ID=given) as ear:
        assert "reset" == (await ear.next()).kind


async def test_listener_who_missed_more_than_is_kept_is_told_to_read_afresh(
    make_world, monkeypatch
):
    """The ring is bounded, whatever happens meanwhile."""
    monkeypatch.setattr(hub, "RING_MAX", 4)
    world = await make_world()
    await world.bind()
    async with listening(world) as ear:
        start = await ear.next("start")
        for _ in range(3):
            await world.post("/v1/agreements/esc_1/freeze", {"reason": "a test"})
            await world.post("/v1/agreements/esc_1/resume", {"reason": "a test"})
    async with listening(world, Last_Event_ID=start.id) as ear:
        assert "reset" == (await ear.next()).kind


async def test_listener_says_when_the_stream_shall_end(world):
    """For scripts; without a number, or with one that is none, it is refused."""
    async with listening(world, "?seconds=0") as ear:
        assert b"event: start" in await ear.rest()
    refused = [await world.get(f"/v1/stream?seconds={text}") for text in ("", "-1", "1.5", "99999")]

    assert [400] * 4 == [reply.status for reply in refused]


async def test_silent_stream_has_a_sign_of_life(world, monkeypatch):
    """Proxies hang up on silence; a comment is no event."""
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.0)
    async with listening(world, "?seconds=1") as ear:
        assert b"\n: still here\n\n" in await ear.rest()


async def test_no_more_listen_than_there_is_room_for(world, monkeypatch):
    """The one too many is told to come later; when one leaves, there is room again."""
    monkeypatch.setattr(hub, "LISTENERS_MAX", 1)
    async with listening(world) as ear:
        await ear.next("start")
        refused = await world.get("/v1/stream")
    for _ in range(100):
        again = await world.get("/v1/stream?seconds=0")
        if again.status == 200:
            break
        await asyncio.sleep(0.05)

    assert (503, "urn:meterd:problem:too-many-listeners") == (refused.status, refused.json["type"])
    assert 200 == again.status


async def test_listener_who_does_not_read_is_sent_away(world, monkeypatch):
    """His place is free, his connection closed, and the books have gone on."""
    monkeypatch.setattr(stream, "WRITE_S", 0.3)
    loop = asyncio.get_running_loop()
    port = int(world.base.rpartition(":")[2])
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while world.bookkeeper.watcher is None:
            await asyncio.sleep(0.01)
        watcher = world.bookkeeper.watcher
        escrow = world.bookkeeper.ledger.escrows["esc_1"]
        async with asyncio.timeout(20):
            while watcher._ears:
                for _ in range(1000):
                    watcher.moved(escrow)
                await asyncio.sleep(0.02)
    await use(world, 1)

    assert len(watcher._ring) <= hub.RING_MAX


async def test_books_tell_nobody_when_nobody_has_listened_for_a_while(world, monkeypatch):
    """Then they are as quick as if there were no stream."""
    monkeypatch.setattr(hub, "LINGER_S", 0.1)
    async with listening(world) as ear:
        await ear.next("start")
        assert world.bookkeeper.watcher is not None
    async with asyncio.timeout(10):
        while world.bookkeeper.watcher is not None:
            await asyncio.sleep(0.05)


async def test_stream_ends_with_the_daemon(world):
    """A stop waits for nobody who listens: he is told, and the stream ends in order."""
    async with listening(world) as ear:
        await ear.next("start")
        stop = asyncio.create_task(world.runner.cleanup())
        rest = await ear.rest()
        await stop

    assert rest.endswith(b"event: bye\ndata: {}\n\n")
