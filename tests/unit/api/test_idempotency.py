"""`Idempotency-Key` on the calls that change something."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from meterd.api import idempotency
from meterd.core.keys import KEPT_MS
from meterd.errors import Unavailable
from tests.unit.api.test_auth import SETTINGS, TOKENS, Scope, bearer

FREEZE = "/v1/agreements/esc_1/freeze"
WHY = {"reason": "a test"}


async def send(world, path, body, key="k-1", **more):
    """Post with a key."""
    headers = {"Idempotency-Key": key, **more}
    return await world.post(path, body, headers=headers)


async def test_call_that_is_sent_again_gets_the_answer_of_the_first(world):
    """The same bytes; the work is done once, and the journal says so once."""
    first = await send(world, FREEZE, WHY)
    await world.post("/v1/agreements/esc_1/resume", WHY)
    again = await send(world, FREEZE, WHY)

    assert (200, 200, first.body) == (first.status, again.status, again.body)
    assert (None, "true") == (
        first.headers.get("Idempotency-Replayed"),
        again.headers["Idempotency-Replayed"],
    )
    assert "active" == (await world.get("/v1/agreements/esc_1")).json["state"]
    assert 1 == [each.action for each in world.store.entries].count("escrow_frozen")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (FREEZE, {"reason": "another"}),
        (f"{FREEZE}?x=1", WHY),
        ("/v1/agreements/esc_1/settle", WHY),
    ],
)
async def test_key_with_another_request_is_refused(world, path, body):
    """Another body, address or call: 422, and nothing is done."""
    await send(world, FREEZE, WHY)
    refused = await send(world, path, body)

    assert (422, "urn:meterd:problem:key-reused") == (refused.status, refused.json["type"])


async def test_key_of_a_call_that_is_still_running_is_refused(world):
    """409 with a time to come again; another body even then 422."""
    world.store.hold()
    first = asyncio.create_task(send(world, FREEZE, WHY))
    while not world.store.waiting:
        await asyncio.sleep(0.01)
    running, other = await send(world, FREEZE, WHY), await send(world, FREEZE, {"reason": "x"})
    world.store.let_go()

    assert (409, "urn:meterd:problem:key-in-use") == (running.status, running.json["type"])
    assert "1" == running.headers["Retry-After"]
    assert 422 == other.status
    assert 200 == (await first).status


async def test_keys_of_two_tokens_are_two_keys(make_world):
    """Nobody is answered with what another one asked for."""
    tokens = (*SETTINGS.tokens, replace(SETTINGS.tokens[-1], name="other", text="t" * 32))
    world = await make_world(replace(SETTINGS, tokens=tokens))
    await world.bind()
    ours = await send(world, FREEZE, WHY, **bearer(TOKENS[Scope.ADMIN]))
    theirs = await send(world, FREEZE, {"reason": "x"}, **bearer("t" * 32))

    assert 200 == ours.status
    assert "Idempotency-Replayed" not in theirs.headers
    assert 422 != theirs.status


async def test_key_of_a_refused_call_is_free_again(world):
    """What was refused has done nothing: it may be put right under the same key."""
    bad = await send(world, FREEZE, {"reason": ""})
    gone = await send(world, "/v1/agreements/nobody/freeze", WHY)
    good = await send(world, FREEZE, WHY)

    assert [400, 404, 200] == [bad.status, gone.status, good.status]


async def test_key_of_a_call_that_may_have_done_something_is_kept(world):
    """503: the same request may come again, another one may not."""
    world.opener.answer = Unavailable("the service is away")
    body = {"plan": "stream", "id": "job-1"}
    away = await send(world, "/v1/agreements", body)
    world.opener.answer = "esc_1"
    again = await send(world, "/v1/agreements", body)

    assert [503, 201] == [away.status, again.status]


async def test_key_is_forgotten_after_a_day(world):
    """Then it is a new one."""
    await send(world, FREEZE, WHY)
    world.clock.advance(KEPT_MS / 1000)

    assert "Idempotency-Replayed" not in (await send(world, FREEZE, {"reason": "x"})).headers


async def test_key_is_in_the_commit_of_the_work_and_in_that_of_the_answer(world):
    """Never in one of neither: so a crash leaves the work without its key at no moment."""
    written = []
    commit = world.store.commit

    def noting(change):
        written.append((bool(change.journal), [row.status for row in change.keys]))
        return commit(change)

    world.store.commit = noting
    await send(world, "/v1/agreements/esc_1/settle", WHY)

    assert [(True, [0]), (False, [202])] == written


async def test_agreement_that_is_opened_without_an_id_is_named_by_its_key(world):
    """A crash before the answer makes no second one."""
    world.opener.answer = Unavailable("killed")
    for _ in range(2):
        await send(world, "/v1/agreements", {"plan": "stream"})
    await send(world, "/v1/agreements", {"plan": "stream"}, key="k-2")
    first, again, other = (wish.agreement for wish, _ in world.opener.wishes)

    assert first == again != other
    assert first.startswith("agr_")


async def test_next_escrow_is_not_locked_again_when_its_work_had_begun(world):
    """After a crash between the work and its answer: what was made is shown."""
    body = {"plan": "stream", "id": "esc_1", "next": True}
    await send(world, "/v1/agreements", body)
    (row,) = list(world.bookkeeper.keys._owners["http"].rows.values())
    world.bookkeeper.keys.put(replace(row, status=0, body=b"", kind=""), row.at)
    again = await send(world, "/v1/agreements", body)

    assert [True, False] == [wish.next for wish, _ in world.opener.wishes]
    assert 200 == again.status


async def test_long_answer_is_not_kept(world, monkeypatch):
    """Memory is bounded; the call runs again."""
    monkeypatch.setattr(idempotency, "BODY_BYTES_MAX", 10)
    await send(world, "/v1/agreements/esc_1/settle", WHY)
    again = await send(world, "/v1/agreements/esc_1/settle", WHY)

    assert 202 == again.status
    assert "Idempotency-Replayed" not in again.headers


async def test_answer_without_a_body_is_replayed(world):
    """204 as well."""
    await world.post("/v1/events", {"id": "bad", "meter": "?", "quantity": 1})
    headers = {"Idempotency-Key": "k-1"}
    path = "/v1/dead-letters/1?reason=a+test"
    first = await world.call("DELETE", path, headers=headers)
    again = await world.call("DELETE", path, headers=headers)

    assert (204, 204, "true") == (
        first.status,
        again.status,
        again.headers["Idempotency-Replayed"],
    )


async def test_key_of_a_call_that_changes_nothing_is_not_looked_at(world):
    """Events have ids of their own; questions may be asked again."""
    event = {"id": "e-1", "agreement": "esc_1", "meter": "calls", "quantity": 1}
    first, again = await send(world, "/v1/events", event), await send(world, "/v1/events", event)

    assert (1, 1) == (first.json["accepted"], again.json["duplicates"])
    assert 200 == (await world.get("/v1/status", headers={"Idempotency-Key": ""})).status


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "a\tb", "ä"])
async def test_key_that_is_none_is_refused(world, key):
    """Before anything is done."""
    refused = await send(world, FREEZE, WHY, key=key)

    assert (400, "urn:meterd:problem:bad-key") == (refused.status, refused.json["type"])
    assert "active" == (await world.get("/v1/agreements/esc_1")).json["state"]
