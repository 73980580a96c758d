"""Faults: how rules are read, how often they strike, and what they make of an answer."""

from __future__ import annotations

import msgspec
import pytest

from meterd.sandbox.faults import Call, Faults, Phase, spoiled
from meterd.sandbox.wire import BadRequest

ANSWER = {
    "escrow_id": "esc_1",
    "amount": "14.85",
    "released_amount": "0.00",
    "remaining": "14.85",
    "release": {"gross_amount": "0.000002"},
    "releases": [{"fee": "0.01", "memo": "12.00"}],
}


def picks(faults: Faults, times: int, call: Call = Call.RELEASE_PARTIAL, escrow: str = "e") -> str:
    """One letter a request: x where a fault struck."""
    struck = (faults.pick(Phase.REQUEST, call, escrow, repeat=False) for _ in range(times))
    return "".join("." if rule is None else "x" for rule in struck)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "x....."),
        ({"count": 2}, "xx...."),
        ({"count": None}, "xxxxxx"),
        ({"skip": 3}, "...x.."),
        ({"skip": 1, "count": 2}, ".xx..."),
        ({"probability": 0}, "......"),
        ({"probability": 1, "count": 4}, "xxxx.."),
        ({"call": "get"}, "......"),
        ({"call": "release_partial", "escrow_id": "e"}, "x....."),
        ({"escrow_id": "other"}, "......"),
    ],
)
def test_a_rule_strikes_as_often_as_it_was_told(fields, expected):
    """Count, skip, probability and match, one changed at a time."""
    faults = Faults()
    faults.add({"kind": "error_500_before", **fields})

    assert expected == picks(faults, 6)


def test_the_same_seed_gives_the_same_faults():
    """A run can be repeated; another seed is another run."""
    runs = []
    for seed in (7, 7, 8):
        faults = Faults()
        faults.add({"kind": "close_after", "probability": 0.5, "seed": seed})
        runs.append(picks(faults, 64))

    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert set(runs[0]) == {"x", "."}


def test_a_spent_rule_stays_in_the_list():
    """A test can see that its fault took place."""
    faults = Faults()
    faults.add({"kind": "close_after"})
    picks(faults, 3)

    listed = faults.listed()

    assert [(r["kind"], r["left"], r["struck"]) for r in listed] == [("close_after", 0, 1)]
    faults.clear()
    assert faults.listed() == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "nonsense"},
        {"kind": 5},
        {"kind": "rate_limit", "seconds": 5},
        {"kind": "rate_limit", "retry_after": "a\r\nSet-Cookie: b"},
        {"kind": "close_after", "count": 0},
        {"kind": "close_after", "count": True},
        {"kind": "close_after", "call": "nonsense"},
        {"kind": "close_after", "probability": 2},
        {"kind": "close_after", "skip": -1},
        {"kind": "close_after", "moves": "yes"},
        {"kind": "close_after", "escrow_id": 5},
        {"kind": "delay_answer", "seconds": 10**9},
        {"kind": "redirect", "status": 99},
        {"kind": "float_noise", "direction": "sideways"},
        {"kind": "dispute"},
        {"kind": "foreign_release", "escrow_id": "e", "amount": 0.01},
    ],
    ids=str,
)
def test_a_rule_that_makes_no_sense_is_refused(fields):
    """A mistyped fault must not pass for calm."""
    with pytest.raises(BadRequest):
        Faults().add(fields)


def test_a_rule_for_repeats_waits_for_a_repeat():
    """A 409 on repeat lets the first request through."""
    faults = Faults()
    faults.add({"kind": "conflict_409", "on_repeat": True})

    first = faults.pick(Phase.REQUEST, Call.RELEASE_PARTIAL, "e", repeat=False)
    second = faults.pick(Phase.REQUEST, Call.RELEASE_PARTIAL, "e", repeat=True)

    assert first is None
    assert second is not None


@pytest.mark.parametrize(
    ("kind", "told", "expected"),
    [
        ("numbers_instead_of_strings", {}, b'"amount":14.85,'),
        ("numbers_instead_of_strings", {}, b'"gross_amount":0.000002}'),
        ("numbers_instead_of_strings", {}, b'[{"fee":0.01,"memo":"12.00"}]'),
        ("float_noise", {}, b'"amount":14.850000000000001,'),
        ("float_noise", {"direction": "down"}, b'"amount":14.849999999999998,'),
        ("float_noise", {}, b'"released_amount":0.0,'),
        ("extra_fields", {}, b'"api_version":"9","escrow_id":"esc_1"'),
        ("wrong_escrow_id", {}, b'"escrow_id":"esc_AAAAAAAAAAAAAAAAAAAAAAAA"'),
        ("released_above_total", {}, b'"released_amount":"15.85","remaining":"0.00"'),
    ],
)
def test_an_answer_is_spoiled_in_exactly_this_way(kind, told, expected):
    """The digits on the wire are the ones a client must cope with."""
    assert expected in msgspec.json.encode(spoiled(kind, ANSWER, told))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("numbers_instead_of_strings", b'"balance":9.98,"debited":0.02}'),
        ("float_noise", b'"debited":0.020000000000001}'),
        ("wrong_escrow_id", b'{"agent_id":"agent_AAAAAAAAAAAAAAAAAAAAAA",'),
        ("released_above_total", b'"debited":"1.02"}'),
    ],
)
def test_an_answer_about_a_wallet_is_spoiled_in_its_own_fields(kind, expected):
    """The faults of an escrow's answer have their like in a wallet's."""
    wallet = {"agent_id": "payer", "balance": "9.98", "debited": "0.02"}

    assert expected in msgspec.json.encode(spoiled(kind, wallet, {}))


def test_a_broken_figure_of_an_answer_without_figures_leaves_it_alone():
    """There is nothing in it that could be too much."""
    assert spoiled("released_above_total", {"error": "x"}, {}) == {"error": "x"}
