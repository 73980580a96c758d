"""Quotes: the price with its working."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.meters import Aggregation, Meter
from meterd.core.money import MICROS, NANOS, PICOS
from meterd.core.plans import Pattern, Plan, Version
from meterd.core.pricing import MAIN, PERIOD_METER, Model, Rate, RateCard, Tier, Usage
from meterd.core.quotes import Unpriced, Use, quote, working

CENT = PICOS // 100
METERS = {"calls": Meter("calls"), "seats": Meter("seats", Aggregation.MAX)}
TIERS = (Tier(100 * NANOS, CENT), Tier(None, CENT // 2, CENT * 10))


def plan(*rates, **fields):
    """A plan of these rates."""
    return Plan("p", Pattern.STREAMING, RateCard(rates), **fields)


def use(quantity, meter="calls", **fields):
    return Use(meter, quantity * NANOS, fields.pop("dimensions", {}), **fields)


@pytest.mark.parametrize(
    ("rate", "quantity", "steps", "total"),
    [
        (Rate("calls", CENT), 3, ("3 x 0.01 = 0.03",), "0.03"),
        (Rate("calls", CENT, 1000), 500, ("500 x 0.01 / 1000 = 0.005",), "0.005"),
        (
            Rate("calls", CENT, free_units=1000 * NANOS),
            1500,
            ("1500 - 1000 free = 500", "500 x 0.01 = 5.00"),
            "5",
        ),
        (
            Rate("calls", 0, model=Model.GRADUATED, tiers=TIERS),
            150,
            ("100 x 0.01 = 1.00", "50 x 0.005 + 0.1 = 0.35"),
            "1.35",
        ),
        (
            Rate("calls", 0, model=Model.VOLUME, tiers=TIERS),
            150,
            ("150 x 0.005 + 0.1 = 0.85",),
            "0.85",
        ),
        (
            Rate("calls", CENT, 100, model=Model.PACKAGE),
            101,
            ("101 / 100, begun: 2", "2 x 0.01 = 0.02"),
            "0.02",
        ),
        (Rate("calls", CENT, model=Model.PERCENTAGE), 50, ("50 x 0.01 = 0.50",), "0.5"),
        (Rate("calls", CENT, maximum=MICROS), 500, ("500 x 0.01 = 5.00", "at most 1.00"), "1"),
        (Rate("calls", CENT, minimum=MICROS), 5, ("5 x 0.01 = 0.05", "at least 1.00"), "1"),
    ],
)
def test_quote_shows_the_steps_that_lead_to_the_charge(rate, quantity, steps, total):
    """One line for each rate; the period has ended, so that a minimum counts."""
    quoted = quote(plan(rate, Rate(PERIOD_METER, 0)), METERS, [use(quantity)], 0, ended=True)

    assert steps == quoted.lines[0].working
    assert Fraction(total) == quoted.total == quoted.lines[0].charge
    assert Fraction(total) * MICROS == quoted.payable


def test_quote_of_a_dynamic_rate_takes_the_prices_of_the_events():
    """Up to the plan's cap, and never without one."""
    dynamic = plan(Rate("calls", CENT, model=Model.DYNAMIC))
    quoted = quote(dynamic, METERS, [use(2, price=CENT), use(3, price=CENT // 2)], 0, ended=False)

    assert Fraction("0.035") == quoted.total
    for bad in (use(1), use(1, price=CENT + 1)):
        with pytest.raises(Unpriced, match=r"0\.01"):
            quote(dynamic, METERS, [bad], 0, ended=False)


def test_quote_shows_each_dynamic_rate_the_amount_of_its_own_events():
    """Rates of one meter stand apart by their dimensions, and so do the prices that came."""
    rates = (
        Rate("calls", CENT, where=(("kind", "dear"),), model=Model.DYNAMIC),
        Rate("calls", CENT, model=Model.DYNAMIC),
    )
    usage = [use(2, price=CENT, dimensions={"kind": "dear"}), use(3, price=CENT // 2)]
    quoted = quote(plan(*rates), METERS, usage, 0, ended=False)

    assert [Fraction("0.02"), Fraction("0.015")] == [line.charge for line in quoted.lines]
    assert ["0.02", "0.015"] == [line.working[-1].split(": ")[-1] for line in quoted.lines]


def test_quote_adds_the_fee_when_the_period_has_ended():
    """The fee is a line like any other; what it covers is free."""
    hybrid = plan(
        Rate(PERIOD_METER, 5 * PICOS, role="base"),
        Rate("calls", CENT, free_units=1000 * NANOS, role="overage"),
    )
    ended, running = (
        quote(hybrid, METERS, [use(1200)], 0, ended=ended).total for ended in (True, False)
    )

    assert (Fraction(7), Fraction(2)) == (ended, running)


def test_quote_follows_the_aggregation_of_the_meter():
    """The highest of what is used at once, the last of what is there, and different values."""
    meters = {
        "seats": Meter("seats", Aggregation.MAX),
        "disk": Meter("disk", Aggregation.LATEST),
        "users": Meter("users", Aggregation.UNIQUE),
    }
    rates = plan(*(Rate(name, PICOS) for name in meters))
    usage = [
        *(use(n, "seats") for n in (2, 7, 3)),
        *(use(n, "disk") for n in (9, 4)),
        *(use(1, "users", value=name) for name in ("a", "b", "a")),
    ]

    assert Fraction(7 + 4 + 2) == quote(rates, meters, usage, 0, ended=False).total


def test_quote_takes_the_version_in_force_and_refuses_what_has_no_price():
    """A price of later counts later; a meter without a rate is named."""
    versions = plan(
        Rate("calls", CENT), later=(Version(1000, RateCard((Rate("calls", 2 * CENT),))),)
    )
    totals = [quote(versions, METERS, [use(1)], at, ended=False).total for at in (999, 1000)]

    assert [Fraction(1, 100), Fraction(2, 100)] == totals
    with pytest.raises(Unpriced, match="its meters: calls"):
        quote(versions, METERS, [use(1, "teapots")], 0, ended=False)


@given(
    st.builds(
        Rate,
        st.just("calls"),
        st.integers(0, 10**13),
        st.sampled_from([1, 3, 1000]),
        model=st.sampled_from([Model.STANDARD, Model.GRADUATED, Model.VOLUME, Model.PACKAGE]),
        tiers=st.just(TIERS),
        free_units=st.sampled_from([0, 7 * NANOS]),
        minimum=st.sampled_from([None, 10]),
        maximum=st.sampled_from([None, 2 * MICROS]),
    ),
    st.integers(8 * NANOS, 10**13),
    st.booleans(),
)
def test_steps_say_minimum_and_maximum_where_the_charge_is_theirs(rate, nanos, ended):
    """The words about a line and the line's charge never disagree."""
    if rate.model in (Model.STANDARD, Model.PACKAGE):
        rate = replace_tiers(rate)
    card = RateCard((rate, Rate(PERIOD_METER, 0)))
    used = {("calls", ()): Usage(nanos), (PERIOD_METER, ()): Usage(NANOS if ended else 0)}
    charge = card.charge(used)[MAIN]
    words = working(rate, nanos, 0, ended=ended)

    assert ("at most" in words[-1]) <= (charge == Fraction(rate.maximum or 0, MICROS))
    assert ("at least" in words[-1]) <= (charge == Fraction(rate.minimum or 0, MICROS))


def replace_tiers(rate):
    """The same rate without tiers."""
    return Rate(
        rate.meter,
        rate.price,
        rate.per,
        model=rate.model,
        free_units=rate.free_units,
        minimum=rate.minimum,
        maximum=rate.maximum,
    )


@pytest.mark.parametrize(
    ("rate", "units", "amount", "limit"),
    [
        (Rate("calls", CENT, minimum=100), 0, 0, "at least 0.0001"),
        (Rate("calls", CENT, minimum=10_000), 1, 0, None),
        (Rate("calls", CENT, maximum=20_000), 2, 0, None),
        (Rate("calls", CENT, maximum=20_000), 3, 0, "at most 0.02"),
        (Rate("calls", CENT, 10, model=Model.PACKAGE, maximum=20_000), 20, 0, None),
        (Rate("calls", CENT, 10, model=Model.PACKAGE, maximum=20_000), 21, 0, "at most 0.02"),
        (Rate("calls", CENT, 10, model=Model.PACKAGE, minimum=20_000), 11, 0, None),
        (Rate("calls", CENT, 10, model=Model.PACKAGE, minimum=20_000), 10, 0, "at least 0.02"),
        (Rate("calls", CENT, 2, model=Model.DYNAMIC, maximum=10_000), 9, 2 * CENT, None),
        (
            Rate("calls", CENT, 2, model=Model.DYNAMIC, maximum=9_999),
            9,
            2 * CENT,
            "at most 0.009999",
        ),
        (
            Rate("calls", CENT, 2, model=Model.DYNAMIC, minimum=10_001),
            9,
            2 * CENT,
            "at least 0.010001",
        ),
    ],
)
def test_limit_is_named_where_it_is_the_charge_and_not_where_it_is_met(rate, units, amount, limit):
    """To the micro: whoever pays just the minimum by usage alone is not told of it."""
    steps = working(rate, units * NANOS, amount * NANOS, ended=True)

    assert limit == (steps[-1] if steps[-1].startswith("at ") else None)


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (Model.GRADUATED, ("100 x 0.01 = 1.00",)),
        (Model.VOLUME, ("100 x 0.01 = 1.00",)),
    ],
)
def test_last_unit_of_a_tier_is_shown_in_it(model, steps):
    """The next tier is not entered, and its fee not named."""
    assert steps == working(Rate("calls", 0, model=model, tiers=TIERS), 100 * NANOS, 0, ended=False)


def test_usage_within_what_is_free_is_shown_as_nothing():
    """Not as less than nothing, and not as a bit."""
    rate = Rate("calls", CENT, free_units=10 * NANOS)

    assert ("4 - 4 free = 0", "0 x 0.01 = 0.00") == working(rate, 4 * NANOS, 0, ended=False)


def test_quote_names_plan_card_and_each_line():
    """Whoever reads it finds what it rests on."""
    hybrid = plan(Rate(PERIOD_METER, PICOS, role="base"), Rate("calls", CENT, role="overage"))
    quoted = quote(hybrid, METERS, [use(2), use(3)], 0, ended=True)

    assert ("p", hybrid.card.id) == (quoted.plan, quoted.card)
    assert [
        (PERIOD_METER, f"{PERIOD_METER}: 1 USDC", NANOS, "base"),
        ("calls", "calls: 0.01 USDC", 5 * NANOS, "overage"),
    ] == [(line.meter, line.rate, line.quantity, line.role) for line in quoted.lines]


def test_quote_of_nothing_is_an_exact_nought():
    """It is a fraction like any other, for whoever formats it."""
    quoted = quote(plan(Rate("calls", CENT)), METERS, [], 0, ended=False)

    assert isinstance(quoted.total, Fraction)
    assert (0, 0, ()) == (quoted.total, quoted.payable, quoted.lines)


def test_quote_says_whole_which_meters_a_plan_prices():
    """In their order, and none where there is none; a long name is cut."""
    rates = Rate("seats", CENT), Rate("calls", CENT), Rate("elsewhere", CENT)
    for meters, known in ((METERS, "calls, seats"), ({}, "none")):
        with pytest.raises(Unpriced) as refused:
            quote(plan(*rates), meters, [use(1, "t" * 99)], 0, ended=False)
        head = f"plan p has no rate for {'t' * 80!r} with these dimensions"
        assert f"{head}; its meters: {known}" == str(refused.value)


def test_quote_keeps_the_values_of_two_meters_apart_and_adds_up_what_is_no_set():
    """The same value is one of each; for a sum a value means nothing."""
    meters = {name: Meter(name, Aggregation.UNIQUE) for name in ("users", "hosts")}
    rates = plan(*(Rate(name, PICOS) for name in ("users", "hosts", "calls")))
    usage = [
        use(1, name, value=value)
        for name, value in (("users", "a"), ("users", "b"), ("hosts", "a"))
    ]
    usage += [use(3, value="a"), use(4, value="a")]

    lines = quote(rates, {**meters, **METERS}, usage, 0, ended=False).lines

    assert [2 * NANOS, NANOS, 7 * NANOS] == [line.quantity for line in lines]


def test_quote_adds_up_the_own_prices_of_all_events_of_a_rate():
    """Whatever else tells the events apart, the rate's steps show what they bring together."""
    rates = plan(
        Rate("calls", CENT, where=(("kind", "x"), ("size", "s"))),
        Rate("calls", CENT, model=Model.DYNAMIC),
    )
    usage = [use(2, price=CENT, dimensions=where) for where in ({"size": "s"}, {"kind": "x"}, {})]

    (line,) = quote(rates, METERS, usage, 0, ended=False).lines

    assert Fraction(6, 100) == line.charge
    assert line.working[-1].endswith(": 0.06")
