from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core.openings import Opening, OpeningStatus, Wish
from meterd.errors import Refused
from tests.fakes import NOW_MS

ROW = Opening(
    id="open_1",
    agreement="job-1",
    plan="stream",
    payer="ann",
    role="main",
    amount=10_000_000,
    provider="me",
    hours=None,
    memo="stream agreement=job-1 open_1",
    why="asked",
    status=OpeningStatus.IN_DOUBT,
    created_at=NOW_MS,
    changed_at=NOW_MS,
    detail="no answer",
)


async def order(world, **fields):
    return await world.post("/v1/agreements", {"plan": "stream", **fields})


async def test_a_body_is_handed_on_with_exact_amounts(world):
    """What is left out is left to the plan and the configuration."""
    world.opener.answer = "esc_1"
    await order(world)
    await order(world, id="a", payer="ann", provider="me", deposit="2.5", next=True)

    assert [
        Wish("stream"),
        Wish("stream", "a", "ann", "me", 2_500_000, next=True),
    ] == [wish for wish, _ in world.opener.wishes]


async def test_an_agreement_that_is_open_is_shown(world):
    """201 when it was made, 200 when it was there."""
    world.opener.answer = "esc_1"
    made = await order(world)
    known = await order(world, id="esc_1")
    following = await order(world, id="esc_1", next=True)

    assert (201, 200, 201) == (made.status, known.status, following.status)
    assert "esc_1" == made.json["id"]


async def test_what_is_in_doubt_is_202_with_what_is_waited_for(world):
    """So it is for an agreement that is not there yet, and for the next escrow of one that is."""
    world.opener.unfinished = [ROW, replace(ROW, id="open_2", agreement="esc_1")]
    new = await order(world, id="job-1")
    following = await order(world, id="esc_1", next=True)

    assert (202, 202) == (new.status, following.status)
    assert ("job-1", "opening") == (new.json["id"], new.json["state"])
    assert [("open_1", "in_doubt", "10.00", None)] == [
        (row["id"], row["status"], row["amount"], row["escrow"]) for row in new.json["openings"]
    ]
    assert ["open_2"] == [row["id"] for row in following.json["openings"]]


async def test_openings_are_listed(world):
    """With all that helps to find their escrow at the service."""
    world.opener.unfinished = [ROW]
    listed = (await world.get("/v1/openings")).json

    assert listed["next"] is None
    assert (ROW.memo, "ann", "me", "no answer") == tuple(
        listed["items"][0][name] for name in ("memo", "payer", "provider", "detail")
    )


async def test_a_refusal_is_told_as_it_is(world):
    """409, with the key to write."""
    world.opener.answer = Refused("write escrow.payer_api_key_file")
    refused = await order(world)

    assert (409, "write escrow.payer_api_key_file") == (refused.status, refused.json["detail"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"plan": "gold"}, "there is no such plan; known: model, stream"),
        ({"id": "a/b"}, "an id has 1 to 128"),
        ({"id": "x" * 129}, "an id has 1 to 128"),
        ({"payer": "a\nb"}, "payer: at most 256 printable characters"),
        ({"provider": "x" * 257}, "provider: at most 256 printable characters"),
        ({"deposit": "0"}, "deposit: an amount above 0"),
        ({"deposit": "-1"}, "deposit:"),
        ({"deposit": "1e3"}, "deposit:"),
        ({"deposit": "1000000.000001"}, "deposit: an amount above 0"),
        ({"deposit": 1.5}, "deposit"),
        ({"next": True}, "next: name the agreement"),
        ({"amount": "1"}, "amount"),
    ],
)
async def test_a_body_that_makes_no_sense_locks_nothing(world, fields, says):
    """Each mistake is named; money is a text."""
    refused = await order(world, **fields)

    assert 400 == refused.status
    assert says in refused.json["detail"]
    assert [] == world.opener.wishes
