from __future__ import annotations

import pytest


@pytest.fixture
async def acted(world):
    """A world in which an agreement was bound, frozen, resumed and frozen again."""
    for act, reason in (("freeze", "odd usage"), ("freeze", "still odd")):
        await world.post(f"/v1/agreements/esc_1/{act}", {"reason": reason})
    return world


async def test_the_journal_is_listed_newest_first_in_pages(acted):
    """Each entry once, by following `next`: who, what, to what and why."""
    first = (await acted.get("/v1/journal?limit=2")).json
    second = (await acted.get(f"/v1/journal?limit=2&cursor={first['next']}")).json
    entries = first["items"] + second["items"]

    assert [entry["number"] for entry in entries] == [3, 2, 1]
    assert [entry["action"] for entry in entries] == [
        "escrow_frozen",
        "escrow_frozen",
        "agreement_bound",
    ]
    assert (entries[0]["actor"], entries[0]["subject"]) == ("http", "esc_1")
    assert entries[0]["detail"] == "still odd"
    assert entries[0]["at"].endswith("Z")
    assert len(entries[0]["hash"]) == 64
    assert second["next"] is None


async def test_a_page_of_the_journal_that_ends_with_its_first_entry_is_the_last(acted):
    """Numbers have no gaps, so nobody is sent to look behind number 1."""
    page = (await acted.get("/v1/journal?limit=3")).json

    assert ([entry["number"] for entry in page["items"]], page["next"]) == ([3, 2, 1], None)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=many", "cursor=x", "cursor=-1"])
async def test_a_page_of_the_journal_has_its_limits(acted, query):
    """A list is bounded, and its cursor is one that was handed out."""
    assert (await acted.get(f"/v1/journal?{query}")).status == 400
