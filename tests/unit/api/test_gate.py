"""The gate and its holds over HTTP, on a real bookkeeper."""

from __future__ import annotations

import asyncio

from tests.unit.api.conftest import World

USAGE = {"agreement": "esc_1", "meter": "tokens"}  # 0.002 for 1,000, of an escrow of 10.00.
MILLI = 500  # So many tokens cost 0.001.


SHOWN = ("accrued", "holds", "headroom")


async def ask(world: World, quantity=1, hold=None, **more):
    """Ask the gate; the whole reply."""
    body = {**USAGE, "quantity": quantity * MILLI, **more}
    return await world.post("/v1/authorize", body if hold is None else {**body, "hold": hold})


async def test_gate_allows_what_the_escrow_can_pay_and_says_what_is_missing(world):
    """An answer changes nothing: asked twice, it is the same."""
    fits, again, too_much = [await ask(world, number) for number in (10_000, 10_000, 10_001)]

    assert (200, 200, 402) == (fits.status, again.status, too_much.status)
    assert {"allowed": True, "headroom": "10.00", "needed": "10.00"} == fits.json == again.json
    assert ("0.001", False) == (too_much.json["missing"], too_much.json["allowed"])
    assert "headroom" in too_much.json["reason"]


async def test_concurrent_holds_never_promise_the_same_cent_twice(world):
    """A hundred callers want 0.2 each of 10.00: fifty get it."""
    replies = await asyncio.gather(*(ask(world, 200, hold=60) for _ in range(100)))
    allowed = [reply for reply in replies if reply.status == 200]

    assert 50 == len(allowed) == len({reply.json["hold"] for reply in allowed})
    assert "10.00" == (await world.get("/v1/agreements/esc_1")).json["holds"]
    assert "0.00" == (await world.get("/v1/agreements/esc_1")).json["headroom"]
    assert 402 == (await ask(world)).status


async def test_hold_is_captured_with_the_actual_quantity_once(world):
    """What was held and not used is free again; the same capture again is a duplicate."""
    hold = (await ask(world, 1000, hold=60)).json["hold"]
    path = f"/v1/holds/{hold}/capture"
    first = await world.post(path, {"quantity": str(700 * MILLI)})
    again = await world.post(path, {"quantity": str(700 * MILLI)})
    agreement = (await world.get("/v1/agreements/esc_1")).json

    assert (1, 1) == (first.json["accepted"], again.json["duplicates"])
    assert ("0.70", "0.00", "9.30") == tuple(agreement[k] for k in SHOWN)


async def test_hold_is_voided_or_expires(world):
    """In both cases its amount is free, and it is not there any more."""
    first = (await ask(world, 6000, hold=60)).json["hold"]
    assert 402 == (await ask(world, 6000)).status
    assert 200 == (await world.post(f"/v1/holds/{first}/void")).status
    assert 404 == (await world.post(f"/v1/holds/{first}/void")).status
    second = (await ask(world, 6000, hold=5)).json["hold"]
    listed = (await world.get("/v1/holds")).json["items"]
    world.clock.advance(5)

    assert [second] == [one["id"] for one in listed]
    assert 200 == (await ask(world, 6000)).status
    assert 404 == (await world.post(f"/v1/holds/{second}/capture", {"quantity": 1})).status


async def test_usage_event_may_capture_a_hold(world):
    """The event counts, and what was set aside for it is free."""
    hold = (await ask(world, 1000, hold=60)).json["hold"]
    event = {"id": "x", **USAGE, "quantity": 1, "hold": hold}
    await world.post("/v1/events", event)

    assert "0.00" == (await world.get("/v1/agreements/esc_1")).json["holds"]
    assert [] == (await world.get("/v1/holds")).json["items"]


async def test_gate_refuses_what_has_no_price_and_whom_it_does_not_know(world):
    """An unknown agreement is the caller's mistake; an unknown meter is refused with a reason."""
    unknown = await world.post("/v1/authorize", {**USAGE, "agreement": "nobody"})
    no_meter = await world.post("/v1/authorize", {**USAGE, "meter": "teapots"})
    bad = [
        await world.post("/v1/authorize", {**USAGE, **fields})
        for fields in ({"quantity": 0}, {"quantity": "1e5"}, {"hold": 0}, {"hold": -1}, {"x": 1})
    ]

    assert (404, 402) == (unknown.status, no_meter.status)
    assert "teapots" in no_meter.json["reason"]
    assert [400] * 5 == [reply.status for reply in bad]


async def keyed(world, key, quantity=1000, hold=60, **more):
    """Ask for a hold with a key; the whole reply."""
    body = {**USAGE, "quantity": quantity * MILLI, "hold": hold, **more}
    return await world.post("/v1/authorize", body, headers={"Idempotency-Key": key})


async def test_hold_that_is_asked_for_again_with_its_key_is_the_same_one(world):
    """One hold, one amount set aside, and the same words; quotes around the key are no part."""
    first, again = await keyed(world, "a-1"), await keyed(world, '"a-1"')
    at_once = await asyncio.gather(*(keyed(world, "a-2") for _ in range(20)))

    assert first.json == again.json
    assert 1 == len({reply.json["hold"] for reply in at_once})
    assert "2.00" == (await world.get("/v1/agreements/esc_1")).json["holds"]
    assert first.json["hold"] != at_once[0].json["hold"]


async def test_key_of_a_hold_is_refused_with_another_request(world):
    """Another quantity, dimension or time to live is another request."""
    await keyed(world, "a-1")
    others = [
        await keyed(world, "a-1", quantity=999),
        await keyed(world, "a-1", hold=61),
        await keyed(world, "a-1", dimensions={"model": "m"}),
    ]

    assert [422] * 3 == [reply.status for reply in others]
    assert {"urn:meterd:problem:key-reused"} == {reply.json["type"] for reply in others}


async def test_key_of_a_captured_hold_makes_no_other_one(world):
    """The work was paid for; a voided hold's key is free again."""
    first = (await keyed(world, "a-1")).json["hold"]
    await world.post(f"/v1/holds/{first}/capture", {})
    second = (await keyed(world, "a-2")).json["hold"]
    await world.post(f"/v1/holds/{second}/void")

    assert 409 == (await keyed(world, "a-1")).status
    assert 200 == (await keyed(world, "a-2")).status


async def test_key_that_is_none_is_refused(world):
    """Empty, too long, not printable or not ASCII."""
    replies = [await keyed(world, key) for key in ("", '""', "x" * 256, "a\tb", "ä")]

    assert [400] * 5 == [reply.status for reply in replies]
    assert {"urn:meterd:problem:bad-key"} == {reply.json["type"] for reply in replies}
