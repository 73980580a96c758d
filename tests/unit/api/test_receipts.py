"""Receipts over HTTP, on a real bookkeeper."""

from __future__ import annotations

from meterd.core.settlement import AnswerKind
from meterd.receipts import check


async def use(world, number, quantity):
    """Count tokens, at 0.002 for 1,000."""
    event = {"id": f"e-{number}", "agreement": "esc_1", "meter": "tokens", "quantity": quantity}
    assert (await world.post("/v1/events", event)).json["accepted"] == 1


async def test_payer_reads_a_receipt_of_each_release_that_was_paid(world):
    """Usage, price and total, oldest first; one that was declined has none."""
    for number, kind in enumerate((AnswerKind.CONFIRMED, AnswerKind.CONFIRMED), 1):
        await use(world, number, 1_000_000)
        await world.release("esc_1", f"rel_{number}", kind)
    page = (await world.get("/v1/agreements/esc_1/receipts")).json
    key = (await world.get("/v1/receipts/key")).json["key"]
    first, second = (each["statement"] for each in page["items"])

    assert page["next"] is None
    assert not check(page["items"], [key]).broken
    assert ("release", "rel_1", "2.00") == (
        first["kind"],
        first["release"]["id"],
        first["release"]["amount"],
    )
    assert ("2.00", "4.00") == (first["released"], second["released"])
    (line,) = second["usage"]
    assert ("tokens", "token", "2000000", 2, "4.00") == (
        line["meter"],
        line["unit"],
        line["quantity"],
        line["events"],
        line["accrued"],
    )


async def test_payer_pages_through_receipts(world):
    """Each once, whatever the size of the pages."""
    for number in range(1, 4):
        await use(world, number, 1_000_000)
        await world.release("esc_1", f"rel_{number}", AnswerKind.CONFIRMED)
    found, cursor = [], ""
    while cursor is not None:
        page = (await world.get(f"/v1/agreements/esc_1/receipts?limit=1&cursor={cursor}")).json
        found += [each["number"] for each in page["items"]]
        cursor = page["next"]

    assert [1, 2, 3] == found
    assert 400 == (await world.get("/v1/agreements/esc_1/receipts?cursor=x")).status
    assert 404 == (await world.get("/v1/agreements/nobody/receipts")).status


async def test_release_that_was_not_paid_has_no_receipt(world):
    """Declined: nothing went."""
    await use(world, 1, 1_000_000)
    await world.release("esc_1", "rel_1", AnswerKind.DECLINED)

    assert [] == (await world.get("/v1/agreements/esc_1/receipts")).json["items"]
