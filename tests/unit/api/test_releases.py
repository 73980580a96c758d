from __future__ import annotations

import pytest

from meterd.core.settlement import AnswerKind

USAGE = {"id": "a", "escrow_id": "esc_1", "meter": "tokens", "quantity": 1000}


@pytest.fixture
async def doubtful(world):
    """A world in which release `rel_2` of 0.002 is in doubt, after a confirmed `rel_1` of 0.002."""
    await world.post("/v1/events", USAGE)
    await world.release("esc_1", "rel_1", AnswerKind.CONFIRMED)
    await world.post("/v1/events", {**USAGE, "id": "b"})
    await world.release("esc_1", "rel_2", AnswerKind.DOUBT)
    return world


async def test_releases_are_listed_newest_first_in_pages(doubtful):
    """Each once, by following `next`."""
    first = (await doubtful.get("/v1/releases?limit=1")).json
    second = (await doubtful.get(f"/v1/releases?limit=1&cursor={first['next']}")).json

    assert [first["items"][0]["id"], second["items"][0]["id"]] == ["rel_2", "rel_1"]
    assert second["next"] is None


async def test_releases_are_filtered_by_status(doubtful):
    """Those in doubt are what a person looks for; an unknown word is a problem."""
    found = (await doubtful.get("/v1/releases?status=in_doubt")).json
    unknown = await doubtful.get("/v1/releases?status=lost")

    assert [item["id"] for item in found["items"]] == ["rel_2"]
    assert unknown.status == 400


@pytest.mark.parametrize(
    ("landed", "status", "released"), [(True, "confirmed", "0.004"), (False, "void", "0.002")]
)
async def test_a_person_resolves_a_doubt(doubtful, landed, status, released):
    """Landed counts as paid, absent goes back to unsettled; both are journalled."""
    answer = await doubtful.post(
        "/v1/releases/rel_2/resolve", {"landed": landed, "reason": "asked the service"}
    )
    [release] = (await doubtful.get("/v1/releases?limit=1")).json["items"]

    assert (answer.status, answer.json["released"], answer.json["in_doubt"]) == (
        200,
        released,
        "0.00",
    )
    assert release["status"] == status
    assert doubtful.store.entries[-1].detail == "asked the service"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"landed": True},
        {"landed": "yes", "reason": "x"},
        {"landed": 1, "reason": "x"},
        {"reason": "x"},
    ],
)
async def test_a_resolution_says_landed_and_why(doubtful, body):
    """No default decides about money."""
    answer = await doubtful.post("/v1/releases/rel_2/resolve", body)

    assert answer.status == 400


@pytest.mark.parametrize("release_id", ["rel_1", "rel_9"])
async def test_only_an_open_release_can_be_resolved(doubtful, release_id):
    """What is finished stays what it is."""
    body = {"landed": True, "reason": "x"}

    assert (await doubtful.post(f"/v1/releases/{release_id}/resolve", body)).status == 404


async def test_status_shows_the_doubt_and_when_it_ends(doubtful):
    """What resolves itself is listed with a command that looks, and none that decides."""
    status = (await doubtful.get("/v1/status")).json
    [listed] = status["in_doubt"]

    assert (status["totals"]["in_doubt"], status["releases_in_doubt"]) == ("0.002", 1)
    assert (listed["state"], listed["amount"]) == ("in_doubt", "0.002")
    assert "release rel_2: told so" in listed["reason"]
    assert "if none does, it is given up and paid anew in" in listed["reason"]
    assert listed["next"] == "meterd releases esc_1"
    assert status["needs_a_person"] is False
