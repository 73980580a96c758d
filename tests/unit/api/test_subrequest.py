"""The gate's question as proxies ask it."""

from __future__ import annotations

import pytest

QUERY = "/v1/authorize?agreement=esc_1&meter=tokens&quantity=500"
HEADERS = {"X-Meterd-Agreement": "esc_1", "X-Meterd-Meter": "tokens", "X-Meterd-Quantity": "500"}


async def test_proxy_asks_by_the_query_or_by_headers_and_gets_the_same_answer(world):
    """The figures stand in headers, for a proxy reads no body; asking changes nothing."""
    by_query = await world.get(QUERY)
    by_headers = await world.get("/v1/authorize", headers=HEADERS)

    assert (200, 200) == (by_query.status, by_headers.status)
    assert {"allowed": True, "headroom": "10.00", "needed": "0.001"} == by_query.json
    assert by_query.json == by_headers.json
    assert "10.00" == by_query.headers["X-Meterd-Headroom"]
    assert "0.001" == by_headers.headers["X-Meterd-Needed"]
    assert "X-Meterd-Reason" not in by_query.headers


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"X-Meterd-Quantity": "5000001"}, "headroom"),
        ({"X-Meterd-Agreement": "esc_9"}, "no such agreement"),
        ({"X-Meterd-Agreement": "esc_1&quantity=0"}, "no such agreement"),
        ({"X-Meterd-Agreement": ""}, "names no agreement"),
        ({"X-Meterd-Meter": "nonsense"}, "nonsense"),
    ],
)
async def test_what_may_not_be_served_is_a_403_with_its_reason_in_a_header(world, changed, reason):
    """A proxy knows no 402, and takes a 404 for a mistake of its own."""
    answer = await world.get("/v1/authorize", headers={**HEADERS, **changed})

    assert 403 == answer.status
    assert reason in answer.headers["X-Meterd-Reason"]
    assert reason in answer.json["reason"]
    assert answer.json["allowed"] is False


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/authorize", {}),
        ("/v1/authorize?agreement=esc_1", {}),
        (QUERY, HEADERS),
        (f"{QUERY}&quantity=0", {}),
        (f"{QUERY}&dimension.kind=a&dimension.kind=b", {}),
        (f"{QUERY}&hold=60", {}),
        ("/v1/authorize", {**HEADERS, "X-Meterd-Quantity": "-1"}),
        ("/v1/authorize", {**HEADERS, "X-Meterd-Quantity": "1e3"}),
        ("/v1/authorize", {**HEADERS, "X-Meterd-Dimensions": "kind"}),
        ("/v1/authorize", {**HEADERS, "X-Meterd-Dimensions": "kind=a, kind=b"}),
        ("/v1/authorize", {**HEADERS, "X-Meterd-Dimensions": f"kind={'a' * 129}"}),
    ],
)
async def test_question_that_makes_no_sense_is_the_proxys_own_mistake(world, path, headers):
    """400 and not 403: nobody's headroom is the reason."""
    assert 400 == (await world.get(path, headers=headers)).status


async def test_dimensions_are_asked_for_by_either_way(world):
    """They decide the price."""
    by_query = await world.get(f"{QUERY}&dimension.kind=output&dimension.model=m")
    headers = {**HEADERS, "X-Meterd-Dimensions": "kind=output, model=m"}
    by_headers = await world.get("/v1/authorize", headers=headers)

    assert by_query.status == by_headers.status == 200
    assert by_query.json == by_headers.json
