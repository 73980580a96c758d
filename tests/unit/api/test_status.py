from __future__ import annotations

import pytest

from meterd.core.settlement import AnswerKind
from tests.unit.api.conftest import source_state

USAGE = {"id": "a", "escrow_id": "esc_1", "meter": "tokens", "quantity": 1000}


async def test_status_tells_in_one_document_whether_money_flows(world):
    """Totals, sources, store, dead letters, and when the last event and release were."""
    world.intake.states["mqtt"] = source_state()
    await world.post("/v1/events", USAGE)
    await world.post("/v1/events", {**USAGE, "id": "b", "meter": "none"})
    await world.release("esc_1", "rel_1", AnswerKind.CONFIRMED)
    status = (await world.get("/v1/status")).json

    assert status["totals"] == {
        "accrued": "0.002",
        "released": "0.002",
        "unsettled": "0.00",
        "headroom": "9.998",
        "in_doubt": "0.00",
        "uncollectible": "0.00",
        "reconciliation_difference": "0.00",
    }
    assert status["events"] == {"accepted": 1, "duplicates": 0, "rejected": 1, "pending": 0}
    assert status["agreements"] == {"total": 1, "by_state": {"active": 1}}
    assert status["flow"]["word"] == "flowing"
    assert status["flow"]["last_event_at"] is not None
    assert status["flow"]["last_release_at"] is not None
    assert (status["dead_letters"], status["store"]) == (1, {"writable": True, "bytes": 4096})
    assert status["sources"][0]["connected"] is True
    assert status["started_at"] == "2026-11-23T12:00:00.000Z"


async def frozen(world):
    await world.post("/v1/agreements/esc_1/freeze", {"reason": "dispute"})


async def blocked(world):
    world.settler.reason = "the disk is full"


async def disconnected(world):
    world.intake.states["mqtt"] = source_state(connected=False)


async def full(world):
    world.store.writable = False


async def nothing(world):
    pass


async def used(world):
    await world.post("/v1/events", USAGE)


WORDS = (
    (nothing, "idle"),
    (used, "flowing"),
    (disconnected, "waiting_for_sources"),
    (frozen, "needs_a_person"),
    (blocked, "blocked"),
    (full, "stopped"),
)


@pytest.mark.parametrize(("happen", "word"), WORDS)
async def test_one_word_says_how_money_flows(world, happen, word):
    """The worst counts."""
    await happen(world)

    assert (await world.get("/v1/status")).json["flow"]["word"] == word


async def test_what_is_frozen_is_listed_with_its_reason_and_the_next_command(world):
    """A person sees at once what to do."""
    await frozen(world)
    [item] = (await world.get("/v1/status")).json["frozen"]

    assert (item["agreement"], item["reason"]) == ("esc_1", "http: dispute")
    assert item["next"] == "meterd resume esc_1 --reason TEXT"


async def test_lists_in_status_are_bounded(make_world):
    """Fifty frozen agreements are counted, and twenty of them shown."""
    world = await make_world()
    for number in range(50):
        await world.bind(f"esc_{number}")
        await world.post(f"/v1/agreements/esc_{number}/freeze", {"reason": "x"})
    status = (await world.get("/v1/status")).json

    assert (len(status["frozen"]), status["agreements"]["by_state"]) == (20, {"frozen": 50})


async def test_plans_show_prices_and_thresholds(world):
    """Prices are decimal texts; a threshold that is not used is null."""
    plans = {plan["name"]: plan for plan in (await world.get("/v1/plans")).json["items"]}

    assert set(plans) == {"model", "stream"}
    tokens = plans["stream"]["rates"][1]
    assert (tokens["meter"], tokens["price"], tokens["per"]) == ("tokens", "0.002", 1000)
    assert plans["stream"]["settle"]["amount"] == "0.50"
    assert plans["stream"]["settle"]["interval_ms"] is None
    assert plans["model"]["rates"][0]["where"] == {"model": "large"}
