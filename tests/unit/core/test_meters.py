"""How one event's quantity becomes what is added to a counter."""

from __future__ import annotations

import msgspec
import pytest

from meterd.core.meters import Aggregation, Meter
from meterd.core.money import NANOS, BadNumber

TOKENS = Meter("tokens", unit="token")
CALLS = Meter("calls", Aggregation.COUNT)


@pytest.mark.parametrize(
    ("quantity", "nanos"),
    [
        (12, 12 * NANOS),
        ("12", 12 * NANOS),
        ("0.5", NANOS // 2),
        (msgspec.Raw(b"12.0"), 12 * NANOS),
        (msgspec.Raw(b'"12"'), 12 * NANOS),
        (msgspec.Raw(b"0.000000001"), 1),
        (10**15, 10**15 * NANOS),
    ],
)
def test_sum_meter_adds_the_quantity_in_whatever_spelling(quantity, nanos):
    """An integer, a text and raw JSON of the same number measure the same."""
    assert nanos == TOKENS.measure(quantity)


@pytest.mark.parametrize(
    "quantity",
    [
        0,
        -1,
        10**15 + 1,
        2**70,
        "",
        "-1",
        "1e3",
        msgspec.Raw(b""),
        msgspec.Raw(b"1e3"),
        msgspec.Raw(b"true"),
        msgspec.Raw(b"null"),
        msgspec.Raw(b"[1]"),
        msgspec.Raw(b'"1e3"'),
        msgspec.Raw("\uff11".encode()),
    ],
)
def test_sum_meter_refuses_what_is_no_quantity(quantity):
    """What is no positive plain decimal is a `BadNumber`, and nothing else."""
    with pytest.raises(BadNumber):
        TOKENS.measure(quantity)


@pytest.mark.parametrize("quantity", [1, 7, 2**70, "", "x", msgspec.Raw(b"true")])
def test_count_meter_adds_one_for_each_event(quantity):
    """A counting meter does not look at the quantity."""
    assert NANOS == CALLS.measure(quantity)
