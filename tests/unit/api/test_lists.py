"""Every list of the API is a page with a limit, and its pages together are the list."""

from __future__ import annotations

import pytest

from meterd.api import openapi
from meterd.api.wire import LIMIT_MAX
from meterd.core.openings import Opening, OpeningStatus
from meterd.core.settlement import AnswerKind

LISTS = {
    "/v1/agreements": 5,
    "/v1/agreements/esc_1/usage": 2,
    "/v1/agreements/esc_1/releases": 3,
    "/v1/agreements/esc_1/receipts": 3,
    "/v1/releases": 3,
    "/v1/holds": 5,
    "/v1/openings": 5,
    "/v1/dead-letters": 5,
    "/v1/journal": None,
    "/v1/plans": 2,
}
WALKED_ELSEWHERE = {"/v1/producers"}  # By the tests of its own room.


def opening(number: int) -> Opening:
    return Opening(
        id=f"opn_{number}",
        agreement=f"new-{number}",
        plan="stream",
        payer="",
        role="main",
        amount=1,
        provider="agent",
        hours=None,
        memo=f"memo {number}",
        why="asked",
        status=OpeningStatus.INTENDED,
        created_at=1,
        changed_at=1,
        escrow="",
        detail="",
    )


@pytest.fixture
async def full(world):
    """A daemon with some of everything that can be listed."""
    for number in range(2, 6):
        await world.bind(f"esc_{number}")
    for number in range(3):
        event = {"id": f"e-{number}", "agreement": "esc_1", "meter": "tokens", "quantity": 10**6}
        await world.post("/v1/events", event)
        await world.release("esc_1", f"rel_{number}", AnswerKind.CONFIRMED)
    event = {"id": "e-c", "agreement": "esc_1", "meter": "calls", "quantity": 1}
    await world.post("/v1/events", event)
    ask = {"agreement": "esc_1", "meter": "calls", "quantity": 1, "hold": 60}
    for number in range(5):
        await world.post("/v1/authorize", ask)
        await world.post("/v1/events", {"id": f"bad-{number}", "meter": "?", "quantity": 1})
    world.opener.unfinished = [opening(number) for number in range(5)]
    return world


def test_every_list_is_in_the_table():
    """A list that is added without its pages being walked through fails here."""
    listed = {
        name.removeprefix("GET ").replace("{id}", "esc_1")
        for name, one in openapi.CALLS.items()
        if name.startswith("GET ") and "limit" in (one.query or {})
    }

    assert listed - WALKED_ELSEWHERE == set(LISTS)


def test_every_answer_with_items_takes_a_limit():
    """What answers with a page is asked for as one."""
    unbounded = [
        name
        for name, one in openapi.CALLS.items()
        if "items" in str(one.answers.get(200, "")) and "array" in str(one.answers[200])
        if name.startswith("GET ") and "next" in str(one.answers[200])
        if "limit" not in (one.query or {})
    ]

    assert unbounded == []


@pytest.mark.parametrize("path", LISTS)
async def test_pages_of_one_are_the_list(full, path):
    """Nothing is left out and nothing comes twice; the last page says so."""
    whole = (await full.get(f"{path}?limit={LIMIT_MAX}")).json
    found, cursor = [], ""
    for _ in range(200):
        page = (await full.get(f"{path}?limit=1&cursor={cursor}")).json
        assert len(page["items"]) <= 1
        found += page["items"]
        cursor = page["next"]
        if cursor is None:
            break

    assert whole["next"] is None
    assert len(found) == len(whole["items"]) == (LISTS[path] or len(found)) > 0
    assert [_name(each) for each in found] == [_name(each) for each in whole["items"]]


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize(
    "query", ["limit=0", f"limit={LIMIT_MAX + 1}", "limit=x", "limit=", "limit=-1", "cursor=%20"]
)
async def test_limit_and_cursor_that_are_none_are_refused(full, path, query):
    """As a problem that names the parameter."""
    reply = await full.get(f"{path}?{query}")

    assert (400, "application/problem+json") == (reply.status, reply.headers["Content-Type"])
    assert query.split("=")[0] in reply.json["detail"]


def _name(item) -> str:
    return str(item.get("id") or item.get("number") or item.get("meter") or item.get("name"))
