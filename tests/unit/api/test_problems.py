from __future__ import annotations

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
