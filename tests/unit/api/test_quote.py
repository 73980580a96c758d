"""`POST /v1/quote`: the price of a usage with its working, over HTTP."""

from __future__ import annotations

LINE = {"meter": "tokens", "quantity": 1500}


async def test_quote_prices_a_usage_line_by_line(world):
    """The plan `stream`: 0.002 for 1,000 tokens, 0.001 a call. Nothing is counted by it."""
    usage = [LINE, {"meter": "calls", "quantity": "3"}]
    reply = await world.post("/v1/quote", {"plan": "stream", "usage": usage})

    assert 200 == reply.status
    assert ("0.006", "0.006") == (reply.json["total"], reply.json["payable"])
    assert [["3 x 0.001 = 0.003"], ["1500 x 0.002 / 1000 = 0.003"]] == [
        line["working"] for line in reply.json["lines"]
    ]
    assert "0.00" == (await world.get("/v1/agreements/esc_1")).json["accrued"]


async def test_quote_says_what_has_no_price(world):
    """Each is a problem with a sentence."""
    bad = [
        {"plan": "gold", "usage": [LINE]},
        {"plan": "stream", "usage": [{**LINE, "meter": "teapots"}]},
        {"plan": "stream", "usage": [{**LINE, "quantity": "1e3"}]},
        {"plan": "stream", "usage": [{**LINE, "price": 0.1}]},
        {"plan": "stream", "usage": [LINE] * 1001},
    ]
    replies = [await world.post("/v1/quote", body) for body in bad]

    assert [400] * len(bad) == [reply.status for reply in replies]
    assert all(reply.json["detail"] for reply in replies)
