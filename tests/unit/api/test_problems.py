from __future__ import annotations

import asyncio
import json

import pytest

from meterd.errors import InvariantBroken

MEMBERS = {"type", "title", "status", "detail", "instance"}


async def bad_json(world):
    return await world.post("/v1/events", b"{")


async def unknown_path(world):
    return await world.get("/v1/nothing?secret=1")


async def unknown_method(world):
    return await world.call("PATCH", "/v1/status")


async def not_found(world):
    return await world.get("/v1/agreements/nobody")


async def refused(world):
    return await world.post("/v1/agreements/esc_1/resume", {"reason": "x"})


async def too_large(world):
    return await world.post("/v1/events", b" " * (4 * 1024 * 1024 + 1))


async def too_large_a_command(world):
    return await world.call("PUT", "/v1/agreements/x", b" " * 70_000)


async def compressed(world):
    return await world.post("/v1/events", b"x", headers={"Content-Encoding": "gzip"})


async def unready(world):
    world.store.writable = False
    return await world.get("/readyz")


ERRORS = (
    (bad_json, 400),
    (unknown_path, 404),
    (unknown_method, 405),
    (not_found, 404),
    (refused, 409),
    (too_large, 413),
    (too_large_a_command, 413),
    (compressed, 415),
    (unready, 503),
)


@pytest.mark.parametrize(("ask", "status"), ERRORS)
async def test_every_error_is_a_problem(world, ask, status):
    """RFC 9457 with all of its members, whoever refused."""
    answer = await ask(world)

    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert set(answer.json) >= MEMBERS
    assert answer.json["status"] == status
    assert "?" not in answer.json["instance"]
    assert answer.json["detail"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_wrong_method_names_the_right_ones(world):
    """405 carries Allow."""
    assert (await unknown_method(world)).headers["Allow"] == "GET"


async def test_a_mistake_of_ours_on_a_question_is_500_and_the_daemon_goes_on(world, monkeypatch):
    """A GET changes nothing, so nothing need end; no trace leaves."""

    async def broken(**_):
        raise RuntimeError("a secret inside")

    monkeypatch.setattr(world.store, "releases", broken)
    answer = await world.get("/v1/releases")

    assert (answer.status, answer.json["type"]) == (500, "urn:meterd:problem:internal")
    assert b"secret" not in answer.body
    assert world.fatal == []


async def test_a_broken_invariant_is_fatal_even_on_a_question(world, monkeypatch):
    """A sum that does not add up ends the process."""

    async def broken(**_):
        raise InvariantBroken("2 is not 3")

    monkeypatch.setattr(world.store, "releases", broken)
    answer = await world.get("/v1/releases")

    assert answer.status == 503
    assert [type(error) for error in world.fatal] == [InvariantBroken]


async def raw(world, text: bytes) -> bytes:
    """What comes back for bytes that no client would send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(world.base.rpartition(":")[2]))
    writer.write(text)
    try:
        async with asyncio.timeout(10):
            return await reader.read(10_000)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"SECRET nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: SECRET" + b"x" * 20_000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: SECRET\r\n\r\n", 400),
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: SECRET\r\nConnection: close\r\n\r\n",
            417,
        ),
    ],
)
async def test_what_is_no_request_is_answered_as_a_problem_too(world, text, status):
    """Before any room is asked; nothing of what was sent is repeated."""
    head, _, body = (await raw(world, text)).partition(b"\r\n\r\n")
    document = json.loads(body)

    assert f" {status} ".encode() in head.splitlines()[0]
    assert b"application/problem+json" in head
    assert set(document) == MEMBERS
    assert document["status"] == status
    assert b"SECRET" not in body


async def test_expectation_of_100_continue_is_met(world):
    """Clients send it with long bodies."""
    event = b'{"id": "e-1", "agreement": "esc_1", "meter": "calls", "quantity": 1}'
    head = (
        b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(event)
    )
    said = await raw(world, head + event)

    assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert b'"accepted":1' in said
