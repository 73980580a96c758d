"""How one event's quantity becomes what is added to a counter."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.meters import Aggregation, Meter, Sample, Samples
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


@pytest.mark.parametrize(
    ("aggregation", "nanos"),
    [
        (Aggregation.SUM, 0),
        (Aggregation.MAX, 0),
        (Aggregation.LATEST, 0),
        (Aggregation.COUNT, NANOS),
        (Aggregation.UNIQUE, NANOS),
    ],
)
def test_typed_event_says_nothing_by_zero_and_is_one_where_events_are_counted(aggregation, nanos):
    """Whatever else stands in its data is read as a quantity is."""
    meter = Meter("m", aggregation)

    assert meter.measure_fed(0) == nanos
    assert meter.measure_fed("2.5") == (nanos or 5 * NANOS // 2)


@pytest.mark.parametrize("quantity", [1, 7, 2**70, "", "x", msgspec.Raw(b"true")])
def test_count_meter_adds_one_for_each_event(quantity):
    """A counting meter does not look at the quantity."""
    assert NANOS == CALLS.measure(quantity)


# -- Samples ---------------------------------------------------------------------------------------

PEAK = Meter("peak", Aggregation.MAX)
USERS = Meter("users", Aggregation.UNIQUE)
SEATS = Meter("seats", Aggregation.LATEST)
T0 = 1_795_000_000_000


def naive_reading(aggregation, said):
    """What a meter shows of (nanos, value, time, id, source), worked out from all of them."""
    if not said:
        return 0
    if aggregation is Aggregation.MAX:
        return max(nanos for nanos, *_ in said)
    if aggregation is Aggregation.UNIQUE:
        return NANOS * len({value for _, value, *_ in said})
    return max(said, key=lambda one: one[2:])[0]


_said = st.tuples(
    st.integers(1, 5).map(lambda units: units * NANOS),
    st.sampled_from(["ada", "bob", "eve"]),
    st.integers(T0, T0 + 2),
    st.sampled_from(["1", "2", "2 b"]),
    st.sampled_from(["s", "b s", "t"]),
)


@given(st.sampled_from([PEAK, USERS, SEATS]), st.lists(_said, unique_by=lambda one: one[3:]),
       st.data())  # fmt: skip
def test_samples_show_what_all_events_say_in_any_order_and_with_any_taken_back(meter, said, data):
    """The greatest, the number of different ones, the latest: as if what is gone never came."""
    samples, there = Samples(meter.aggregation), []
    for one in data.draw(st.permutations(said)):
        nanos, value, at, event_id, source = one
        quantity = NANOS if meter is USERS else nanos
        samples.add(meter.sample_key(quantity, value, at, event_id, source), quantity)
        there.append(one)
        if data.draw(st.booleans()):
            gone = there.pop(data.draw(st.integers(0, len(there) - 1)))
            quantity = NANOS if meter is USERS else gone[0]
            samples.add(meter.sample_key(quantity, *gone[1:]), quantity, -1)

        assert samples.quantity == naive_reading(meter.aggregation, there)
        rows = list(samples.known.values())
        assert Samples.of(meter.aggregation, rows).quantity == samples.quantity


def test_unique_meter_counts_values_whatever_quantity_stands_in_the_event():
    """Its event says who, not how much."""
    assert USERS.measure("") == NANOS
    assert not USERS.additive


def test_sample_that_is_gone_is_written_as_gone():
    """So that a store that has its row puts it right."""
    samples = Samples(Aggregation.MAX)
    samples.add("5", 5)

    assert samples.add("5", 5, -1) == Sample("5", 5, 0)
    assert Samples.of(Aggregation.MAX, [Sample("5", 5, 0)]).quantity == 0


def test_event_is_taken_back_no_more_often_than_it_came():
    """The invariant behind credit: nobody gets back what was never counted."""
    with pytest.raises(
        AssertionError, match=r"^a sample is taken back once for each time that it came$"
    ):
        Samples(Aggregation.MAX).add("5", 5, -1)


def test_latest_is_told_by_time_then_id_and_two_sources_are_two_events():
    """An id is unique within its source alone."""
    key = SEATS.sample_key
    keys = [
        key(5, "", 9, "z", "s"),
        key(5, "", 10, "a", "s"),
        key(5, "", 10, "a", "t"),
        key(5, "", 10, "a b", "s"),
    ]

    assert sorted(keys) == keys
    assert len(set(keys)) == 4
