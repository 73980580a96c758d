"""Past usage under plans and thresholds: what is owed, called and paid, and how long it takes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.events import Reason, UsageEvent
from meterd.core.meters import Aggregation, Meter
from meterd.core.plans import Pattern, Plan, Settle
from meterd.core.pricing import MILESTONE_METER, PERIOD_METER, Model, Rate, RateCard, Tier
from meterd.core.simulate import (
    Curve,
    Life,
    Paid,
    Past,
    Priced,
    Service,
    Spread,
    Step,
    outcome,
    price,
    settle,
    spread,
    without_share,
)

T = 1_795_000_000_000
PICOS = 10**12
METERS = {"units": Meter("units"), "peak": Meter("peak", Aggregation.MAX)}
STREAM = Plan("stream", Pattern.STREAMING, RateCard((Rate("units", PICOS // 1000),)))
DEAR = Plan("dear", Pattern.STREAMING, RateCard((Rate("units", PICOS // 100),)))
VOLUME = Plan(
    "volume",
    Pattern.STREAMING,
    RateCard(
        (
            Rate(
                "units",
                0,
                model=Model.VOLUME,
                tiers=(Tier(10 * 10**9, PICOS, 0), Tier(None, PICOS // 2, 0)),
            ),
        )
    ),
)
WEEKLY = Plan(
    "weekly",
    Pattern.HYBRID,
    RateCard(
        (
            Rate(PERIOD_METER, 2 * PICOS, role="base"),
            Rate("units", PICOS // 1000, role="overage"),
        )
    ),
    period=60_000,
)
CALLS = Plan(
    "calls", Pattern.PAY_PER_CALL, RateCard((Rate("units", PICOS // 1000, role="wallet"),))
)
PLANS = {plan.name: plan for plan in (STREAM, DEAR, VOLUME, WEEKLY, CALLS)}
SERVICE = Service(pace=2_000, latency=1_000)
PIECES = Service(1_000, 100, 100_000)  # A tenth of a USDC at most with each call.


def used(*events, agreement="a"):
    """Usage from (second, units)."""
    return [
        Past(
            T + second * 1_000,
            UsageEvent(
                id=f"{place}",
                agreement=agreement,
                meter="units",
                quantity=quantity,
                time=datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=T + second * 1_000),
            ),
        )
        for place, (second, quantity) in enumerate(events)
    ]


def curve_of(past, plan="stream", **options):
    """The curve of the one agreement."""
    (curve,) = price(PLANS, METERS, {"a": plan}, past, **options).curves
    return curve


def shown(life):
    """Releases as (second, micros, first word of why)."""
    return [((one.at - T) // 1000, one.amount, one.why.partition(":")[0]) for one in life.paid]


def test_usage_is_owed_from_its_own_time_on_by_the_ledger_of_the_daemon():
    """A step for each moment with usage, and one at the end, which closes."""
    curve = curve_of(used((0, 5), (10, 7)))

    assert (curve.agreement, curve.plan) == ("a", STREAM)
    assert drawn(curve) == [
        (0, (5_000,), False, True),
        (10, (12_000,), False, True),
        (10, (12_000,), True, False),
    ]


def drawn(curve):
    """Steps as (second, owed, closing, usage)."""
    return [((one.at - T) // 1000, one.owed, one.closing, one.usage) for one in curve.steps]


def test_past_without_usage_owes_nothing():
    """There is no agreement in it, and no event."""
    assert price(PLANS, METERS, {"a": "stream"}, []) == Priced()


def test_period_that_ends_with_an_event_ends_before_it():
    """The event is of the period that begins."""
    curve = curve_of(used((0, 5), (60, 5)), plan="weekly")

    assert drawn(curve) == [
        (0, (0, 5_000), False, True),
        (60, (2 * 10**6, 5_000), False, False),
        (60, (2 * 10**6, 10_000), False, True),
        (60, (4 * 10**6, 10_000), True, False),
    ]


def test_agreement_lapses_when_the_deposit_given_cannot_hold_the_next_fee():
    """As the daemon would: usage is taken, and no further fee is owed."""
    curve = curve_of(used((0, 5), (130, 5)), plan="weekly", deposit=3_000_000)

    assert drawn(curve) == [
        (0, (0, 5_000), False, True),
        (60, (2 * 10**6, 5_000), False, False),
        (120, (2 * 10**6, 5_000), True, False),
        (130, (2 * 10**6, 10_000), True, True),
        (130, (2 * 10**6, 10_000), True, False),
    ]


def test_tranche_is_owed_once_as_by_the_daemon():
    """The second one of its name is rejected, and counted by its reason."""
    rate = Rate(MILESTONE_METER, PICOS, where=(("name", "design"),))
    plans = {"project": Plan("project", Pattern.MILESTONE, RateCard((rate,)))}
    past = used((0, 1), (1, 1), (1, 1))
    for one in past:
        one.event.type, one.event.name = MILESTONE_METER, "design"

    found = price(plans, METERS, {"a": "project"}, past)

    assert (found.events, found.rejected) == (1, {Reason.REACHED: 2})
    assert found.curves[0].steps[-1].owed == (10**6,)


def test_each_threshold_is_paid_when_it_is_reached_and_the_rest_at_close():
    """Three hundred units in thirty seconds, a tenth of a USDC at a time."""
    curve = curve_of(used(*((second, 10) for second in range(31))))

    life = settle(curve, Settle(amount=100_000), SERVICE)

    assert shown(life) == [(9, 100_000, "amount"), (19, 100_000, "amount"), (29, 100_000, "amount"),
                           (31, 10_000, "close")]  # fmt: skip
    assert (life.charged, life.unpaid) == (310_000, 0)


def test_interval_is_paid_when_time_alone_makes_it_due():
    """Nothing happens at that moment but that it comes."""
    curve = curve_of(used((0, 20), (500, 1)))

    life = settle(curve, Settle(interval=60_000), SERVICE)

    assert shown(life) == [(60, 20_000, "interval"), (500, 1_000, "close")]


def test_interval_begins_anew_with_the_usage_behind_a_payment_of_all():
    """Time in which nothing was owed is no time that anybody waited."""
    curve = curve_of(used((0, 20), (500, 20), (900, 1)))

    life = settle(curve, Settle(interval=60_000), SERVICE)

    assert shown(life) == [(60, 20_000, "interval"), (560, 20_000, "interval"),
                           (900, 1_000, "close")]  # fmt: skip


def steps(*owed):
    """A curve of one role by hand, from (ms, micros); it closes long after the last of them."""
    found = [Step(T + at, (micros,), 0, closing=False, usage=True) for at, micros in owed]
    found.append(Step(T + 1_000_000, (owed[-1][1],), 0, closing=True, usage=False))
    return Curve("a", STREAM, ("main",), 10**15, found)


@pytest.mark.parametrize("later", [[(60_500, 40_000)], [(60_500, 20_001), (70_000, 40_000)]])
def test_interval_begins_anew_with_a_payment_that_leaves_something_unpaid(later):
    """Usage came while the call was on its way, be it a micro: what it left is due next."""
    life = settle(steps((0, 20_000), *later), Settle(interval=60_000), SERVICE)

    assert shown(life) == [(60, 20_000, "interval"), (121, 20_000, "interval")]


def test_units_are_counted_from_the_payment_before():
    """Twenty units each time; a call that could not ask for all has settled none of them."""
    curve = curve_of(used(*((10 * place, 10) for place in range(7))))
    life = settle(curve, Settle(units=20 * 10**9), SERVICE)

    assert shown(life) == [(10, 20_000, "units"), (30, 20_000, "units"), (50, 20_000, "units"),
                           (60, 10_000, "close")]  # fmt: skip
    whole = settle(curve_of(used((0, 100), (50, 10), (100, 10))), Settle(units=100 * 10**9), PIECES)
    assert shown(whole) == [(0, 100_000, "units"), (100, 20_000, "close")]


@pytest.mark.parametrize(("pace", "later", "kept"), [(2_000, 108, 10_000), (20_000, 102, 40_000)])
def test_exposure_is_bounded_with_what_bursts_have_shown(pace, later, kept):
    """Half of the bound is kept until a hundred windows were seen, then what a burst may earn.

    Five thousand micros each seven seconds: ten thousand in a window, and more the longer a call
    has to wait for the one before it.
    """
    curve = steps(*((7_000 * place, 5_000 * (place + 1)) for place in range(125)))
    bounded = replace(STREAM, settle=Settle(exposure_max=100_000))
    priced = price({"stream": bounded}, METERS, {"a": "stream"}, used((0, 5), (7, 5)))

    life = settle(curve, Settle(exposure_max=100_000), Service(pace=pace, latency=1_000))

    calls = shown(life)
    assert calls[:9] == [(70 * n + 63, 50_000, "adaptive") for n in range(9)]
    assert calls[9] == (7 * (later - 1), 100_000 - kept, "adaptive")
    assert outcome([life], 0).whys == (("adaptive", len(calls) - 1), ("close", 1))
    assert priced.curves[0].steps[-1].owed == (10_000,)


def test_calls_keep_their_pace():
    """Usage that is due at every moment waits for the pace between two calls."""
    curve = curve_of(used(*((second, 100) for second in range(10))))

    life = settle(curve, Settle(amount=1), Service(pace=4_000, latency=500))

    assert [second for second, *_ in shown(life)] == [0, 4, 8, 12]


def test_money_that_is_there_at_once_lets_the_next_call_go_at_its_pace():
    """A service without latency is the same with other waits."""
    curve = curve_of(used(*((second, 100) for second in range(10))))

    life = settle(curve, Settle(amount=1), Service(pace=4_000, latency=0))

    assert [second for second, *_ in shown(life)] == [0, 4, 8, 12]
    assert life.unpaid == 0


def test_step_without_a_figure_for_each_role_is_a_mistake():
    """Usage that is owed to nobody would be missing from every sum."""
    curve = curve_of(used((0, 5)), plan="weekly")
    step = replace(curve.steps[0], owed=(5_000,))

    with pytest.raises(ValueError, match="shorter"):
        settle(replace(curve, steps=[step]), Settle(), SERVICE)


def test_large_amount_goes_in_pieces():
    """No call asks for more than the most that one may."""
    curve = curve_of(used((0, 250), (100, 1)))

    life = settle(curve, Settle(units=100 * 10**9), PIECES)

    assert shown(life) == [(0, 100_000, "units"), (1, 100_000, "units"), (2, 50_000, "units"),
                           (100, 1_000, "close")]  # fmt: skip
    assert life.waits == [(100, 100_000), (1_100, 100_000), (2_100, 50_000), (100, 1_000)]


def test_calls_ask_for_whole_quanta():
    """What is left below one stays unpaid, as with the real one."""
    curve = curve_of(used((0, 10), (60, 10)))

    life = settle(curve, Settle(amount=10_000), Service(quantum=3_000))

    assert shown(life) == [(0, 9_000, "amount"), (60, 9_000, "amount")]
    assert life.unpaid == 2_000


def test_last_micro_is_paid_from_an_escrow():
    """Only a wallet has a least amount."""
    life = settle(steps((0, 1)), Settle(), Service(wallet_minimum=10_000))

    assert shown(life) == [(1_000, 1, "close")]
    assert {"a"} == {life.agreement, *(one.agreement for one in life.paid)}


def test_money_that_arrives_with_new_usage_is_there_before_it():
    """So the exposure is never that of both."""
    life = settle(steps((0, 10_000), (1_000, 20_000)), Settle(amount=10_000), SERVICE)

    assert [(at - T, exposure) for at, exposure in life.points][:4] == [
        (0, 10_000),
        (1_000, 0),
        (1_000, 10_000),
        (3_000, 0),
    ]


def test_wallet_is_debited_of_no_less_than_its_minimum():
    """What is left below it at the close stays unpaid, as with the real one."""
    curve = curve_of(used((0, 12), (60, 8)), plan="calls")

    life = settle(curve, Settle(amount=10_000), Service(wallet_minimum=10_000))

    assert shown(life) == [(0, 12_000, "amount")]
    assert (life.charged, life.unpaid) == (20_000, 8_000)
    least = settle(curve, Settle(amount=10_000), Service(wallet_minimum=12_000))
    assert shown(least) == [(0, 12_000, "amount")]


def test_exposure_and_waits_are_those_of_a_sum_by_hand():
    """One payment of 0.03 after 10 s of 0.01 and 5 s of 0.02 more; it takes a second."""
    curve = curve_of(used((0, 10), (10, 20)))
    found = outcome([settle(curve, Settle(amount=30_000), SERVICE)], 100)

    assert found.exposure == Spread((10_000 * 10 + 30_000) // 11, 30_000, 30_000)
    assert found.wait == Spread((11_000 + 2 * 1_000) // 3, 11_000, 11_000)
    assert (found.releases, found.paid, found.fee) == (1, 30_000, 300)
    assert found.whys == (("amount", 1),)


def test_deposit_given_can_be_exhausted():
    """What it does not hold stays unpaid, and a share is a share of it."""
    curve = curve_of(used(*((second, 10) for second in range(100))), deposit=500_000)

    life = settle(curve, Settle(escrow_percent=20), SERVICE)

    assert [amount for _, amount, _ in shown(life)] == [100_000] * 5
    assert (life.charged, life.unpaid) == (1_000_000, 500_000)
    least = settle(replace(curve, total=250_000), Settle(amount=100_000), SERVICE)
    assert shown(least)[2:] == [(24, 50_000, "exhausted")], "nothing more will ever be due"


def test_share_of_an_escrow_without_an_end_is_one_of_its_deposit():
    """And of nothing where no deposit is known."""
    asked = Settle(amount=300_000, escrow_percent=25)

    assert without_share(asked, 1_000_001) == Settle(amount=250_001)
    assert without_share(asked, None) == Settle(amount=300_000)
    assert without_share(Settle(escrow_percent=25), None) == Settle()
    assert without_share(Settle(escrow_percent=25), 1_000_000) == Settle(amount=250_000)
    assert without_share(Settle(units=1), 4) == Settle(units=1)


def test_price_that_falls_with_the_quantity_is_a_credit():
    """Ten units at one USDC, twenty at a half: what was paid too early is paid with later usage."""
    curve = curve_of(used((0, 10), (100, 10), (200, 10)), plan="volume")

    life = settle(curve, Settle(amount=1), SERVICE)

    assert [step.owed for step in curve.steps] == [(10**7,), (10**7,), (15 * 10**6,), (15 * 10**6,)]
    assert sum(one.amount for one in life.paid) == life.charged == 15 * 10**6


def test_periods_end_between_events_and_their_fees_are_paid_from_their_own_escrow():
    """Each role is an escrow, with its own calls."""
    curve = curve_of(used((0, 100), (130, 100)), plan="weekly")

    life = settle(curve, Settle(amount=50_000), SERVICE)

    assert curve.roles == ("base", "overage")
    assert curve.steps[-1].owed == (6 * 10**6, 200_000)
    assert sorted(shown(life)) == [
        (0, 100_000, "amount"),
        (60, 2 * 10**6, "amount"),
        (120, 2 * 10**6, "amount"),
        (130, 100_000, "amount"),
        (130, 2 * 10**6, "close"),
    ]
    assert all(micros for _, micros in life.waits), (
        "a role that owes no more has no part that waits"
    )


def test_event_without_a_price_is_left_out_and_counted():
    """As the daemon would make a dead letter of it."""
    past = used((0, 10), (1, 10))
    past[1].event.meter = "calls"
    past += used((2, 1), agreement="b")

    found = price(PLANS, METERS, {"a": "stream"}, past)

    assert found.events == 1
    assert found.rejected == {Reason.UNKNOWN_METER: 1, Reason.UNKNOWN_AGREEMENT: 1}
    assert "calls" in found.example


def test_all_agreements_together_are_more_exposed_than_one():
    """The figures of one say what a payer owes; together is what the provider has at stake."""
    lives = [
        Life("a", points=[(0, 10), (10, 0)], waits=[(10, 10)], charged=10),
        Life("b", points=[(5, 20), (15, 0)], waits=[(10, 20)], charged=20),
    ]
    lives[1].paid = [Paid("b", 9, 10_050, "adaptive: much"), Paid("b", 9, 10_050, "amount")]

    found = outcome(lives, 100)

    assert found.exposure == Spread(15, 20, 20)
    assert found.together == Spread((10 * 5 + 30 * 5 + 20 * 5) // 15, 30, 30)
    assert found.points == ((0, 10), (5, 30), (10, 20), (15, 0))
    assert (found.charged, found.paid, found.fee) == (30, 20_100, 200), "each call its whole micros"
    assert found.whys == (("adaptive", 1), ("amount", 1))


def test_agreements_that_change_in_one_moment_change_one_after_the_other():
    """In their own order: what is at stake between them counts as the worst."""
    lives = [Life("a", points=[(0, 10), (5, 30)]), Life("b", points=[(0, 5), (5, 0)])]

    assert outcome(lives, 0).points == ((0, 10), (0, 15), (5, 35), (5, 30))


@pytest.mark.parametrize(
    ("weighed", "found"),
    [
        ([], Spread()),
        ([(5, 0)], Spread(5, 5, 5)),
        ([(1, 95), (100, 5)], Spread(5, 1, 100)),
        ([(1, 94), (100, 6)], Spread(6, 100, 100)),
        ([(1, 945), (100, 55)], Spread(6, 100, 100)),
        ([(1, 100), (7, 0)], Spread(1, 1, 7)),
    ],
)
def test_spread_weighs_by_time(weighed, found):
    """The percentile is the least value under which 95 of 100 parts of the time lie."""
    assert spread(weighed) == found


USES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 500)), min_size=1, max_size=60)
THRESHOLDS = st.builds(
    Settle,
    amount=st.none() | st.integers(1, 500_000),
    units=st.none() | st.integers(1, 500 * 10**9),
    interval=st.none() | st.integers(1, 100_000),
    exposure_max=st.none() | st.integers(1, 500_000),
    min_release=st.sampled_from([1, 10_000]),
)


@given(USES, THRESHOLDS, st.integers(0, 5_000), st.integers(0, 5_000))
def test_every_micro_is_paid_once_under_any_thresholds(draws, thresholds, pace, latency):
    """What is charged is the price of all usage, and after the close nothing is unpaid."""
    at, events = 0, []
    for after, quantity in draws:
        at += after
        events.append((at, quantity))
    curve = curve_of(used(*events))

    life = settle(curve, thresholds, Service(pace, latency, 200_000))

    total = sum(quantity for _, quantity in events) * 1_000
    assert life.charged == total == sum(one.amount for one in life.paid)
    assert sum(micros for _, micros in life.waits) == total
    assert life.points[-1][1] == life.unpaid == 0
    assert min(exposure for _, exposure in life.points) >= 0
    moments = [one.at for one in life.paid]
    assert all(later - before >= pace for before, later in pairwise(moments))
    assert life == settle(curve, thresholds, Service(pace, latency, 200_000))


@given(USES, THRESHOLDS)
def test_mean_exposure_times_the_time_is_the_mean_wait_times_the_money(draws, thresholds):
    """Little's law: two ways of counting the same area agree, so neither is miscounted."""
    at, steps, owed = T, [], 0
    for after, micros in draws:
        at, owed = at + after, owed + micros
        steps.append(Step(at, (owed,), 0, closing=False, usage=True))
    steps.append(Step(at, (owed,), 0, closing=True, usage=False))

    life = settle(Curve("a", STREAM, ("main",), 10**15, steps), thresholds, SERVICE)

    area = sum(
        exposure * (until - since) for (since, exposure), (until, _) in pairwise(life.points)
    )
    assert Fraction(area) == sum(wait * micros for wait, micros in life.waits)
