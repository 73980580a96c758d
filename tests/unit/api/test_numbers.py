"""Producers over the API: what is missing can be seen, and given up with a reason."""

from __future__ import annotations

import pytest


async def send(world, *numbers, source="svc"):
    """Numbered events of one producer, a batch."""
    events = [
        {
            "id": f"e{number}",
            "source": source,
            "agreement": "esc_1",
            "meter": "calls",
            "sequence": number,
        }
        for number in numbers
    ]
    answer = await world.post("/v1/events", events)
    assert (answer.status, answer.json["accepted"]) == (200, len(numbers)), answer.json


async def test_what_is_missing_of_a_producer_is_shown_by_range(world):
    """With its highest number, since when, and what was given up."""
    await send(world, 1, 2)
    await send(world, 5, 9)
    (one,) = (await world.get("/v1/producers")).json["items"]

    assert [[3, 4], [6, 8]] == one["missing_ranges"]
    assert ("svc", 1, 9, 5, 0, 1, True) == tuple(
        one[name] for name in ("source", "first", "last", "missing", "given_up", "runs", "exact")
    )
    assert one["last_at"].endswith("Z")
    assert one["missing_since"] == one["last_at"]


async def test_producer_of_which_nothing_is_missing_has_no_range(world):
    """And no time."""
    await send(world, 1, 2)
    (one,) = (await world.get("/v1/producers")).json["items"]

    assert ([], 0, None) == (one["missing_ranges"], one["missing"], one["missing_since"])


async def test_ranges_have_a_limit_and_the_lowest_are_shown(world):
    """The count stays whole."""
    await send(world, *range(0, 100, 2))
    (one,) = (await world.get("/v1/producers")).json["items"]

    assert (20, [1, 1], 49) == (
        len(one["missing_ranges"]),
        one["missing_ranges"][0],
        one["missing"],
    )


async def test_producers_are_listed_by_name_in_pages(world):
    """Each once, by following `next`; with `missing=true` those alone of which something is."""
    for name in ("urn:c", "a/b", "ä", "whole"):
        await send(world, 1, source=name)
        if name != "whole":
            await send(world, 3, source=name)
    found, path = [], "/v1/producers?limit=3"
    page = (await world.get(path)).json
    found += page["items"]
    page = (await world.get(f"{path}&cursor={page['next']}")).json
    found += page["items"]
    missing = (await world.get("/v1/producers?missing=true&limit=3")).json

    assert ["a/b", "urn:c", "whole", "ä"] == [one["source"] for one in found]
    assert page["next"] is None
    assert ["a/b", "urn:c", "ä"] == [one["source"] for one in missing["items"]]
    assert missing["next"] is None


@pytest.mark.parametrize("query", ["missing=yes", "limit=0", "cursor=a"])
async def test_page_of_producers_is_asked_for_in_its_form(world, query):
    """What is wrong is named."""
    assert (await world.get(f"/v1/producers?{query}")).status == 400


async def test_person_gives_up_what_is_missing(world):
    """The status and the metrics count it no more; the journal says who and why."""
    await send(world, 1, 4)
    status = (await world.get("/v1/status")).json
    assert (2, 1) == (status["missing_events"], status["incomplete_producers"])
    body = {"source": "svc", "reason": "the broker lost its disk"}
    answer = await world.post("/v1/producers/give-up", body)

    assert (200, {"source": "svc", "given_up": 2}) == (answer.status, answer.json)
    status = (await world.get("/v1/status")).json
    assert (0, 0) == (status["missing_events"], status["incomplete_producers"])
    entry = (await world.get("/v1/journal")).json["items"][0]
    assert ("numbers_given_up", "svc") == (entry["action"], entry["subject"])
    assert "2: the broker lost its disk" == entry["detail"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"source": "svc", "reason": "why"}, 409),
        ({"source": "nobody", "reason": "why"}, 404),
        ({"source": "svc"}, 400),
        ({"reason": "why"}, 400),
        ({"source": "svc", "reason": "why", "all": True}, 400),
    ],
)
async def test_giving_up_needs_something_missing_and_a_reason(world, body, status):
    """Nothing is given up by mistake."""
    await send(world, 1, 2)

    assert status == (await world.post("/v1/producers/give-up", body)).status
