"""The ledger under plans with periods, versions, tranches, scores and prices that events bring."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction

import pytest

from meterd.core.accounts import Agreement
from meterd.core.changes import CardRow
from meterd.core.events import EventDecoder
from meterd.core.ledger import Conflict, Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import NANOS, PICOS
from meterd.core.plans import BASE, OVERAGE, Pattern, PeriodEnd, Plan, Settle, Version
from meterd.core.pricing import (
    MILESTONE_METER,
    OUTCOME_METER,
    PERIOD_METER,
    Model,
    Rate,
    RateCard,
    Tier,
)
from meterd.core.settlement import EscrowStatus
from tests.unit.core.books import NOW, SENTINEL, Till, usage

HOUR = 3_600_000
MINUTE = 60_000
METERS = {
    meter.name: meter
    for meter in (
        Meter("tokens"),
        Meter("calls", Aggregation.COUNT),
        Meter("peak", Aggregation.MAX),
        Meter("users", Aggregation.UNIQUE),
        Meter("seats", Aggregation.LATEST),
    )
}
FEE = Rate(PERIOD_METER, 5 * PICOS, role=BASE)
OVER = Rate("tokens", PICOS // 100, role=OVERAGE, free_units=1000 * NANOS)
TIERS = (Tier(10 * NANOS, PICOS // 10), Tier(None, PICOS // 100))


def subscription(*rates, **fields):
    """A plan with a period of an hour and a fee of 5."""
    card = RateCard((Rate(PERIOD_METER, 5 * PICOS), *rates))
    return Plan("p", Pattern.SUBSCRIPTION, card, period=HOUR, **fields)


def iso(at):
    """A time as an event has it."""
    seconds, ms = divmod(at, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{ms:03d}Z"


def replace_role(rate, role):
    """The same rate drawn on another role."""
    return Rate(rate.meter, rate.price, free_units=rate.free_units, role=role)


def till(plan, *escrows, total=0, meters=None):
    """A ledger with one agreement under a plan, opened at `NOW`."""
    ledger = Ledger({plan.name: plan}, meters or METERS)
    pairs = escrows or tuple((role, f"esc_{role}") for role in plan.roles)
    ledger.bind(Agreement("a", plan.name, "payer", pairs), NOW)
    for escrow in list(ledger.escrows.values()):
        ledger.put(replace(escrow, status=EscrowStatus.ACTIVE, total=total, remaining=total))
    return Till(ledger)


def account(of):
    return of.books.accounts["a"]


def ends(of, at, margin=0):
    """End the periods that are over; the agreements that lapsed."""
    touched, lapsed = of.books.end_periods(at, margin)
    of.keep(touched)
    return [each.agreement.id for each in lapsed]


def agrees(of):
    """Whether a restart would find the same in every figure."""
    restored = of.restored()
    mine, theirs = account(of), restored.accounts["a"]
    assert theirs.row == mine.row
    assert {role: theirs.owed_by(role) for role in mine.plan.roles} == {
        role: mine.owed_by(role) for role in mine.plan.roles
    }
    assert restored.totals().accrued == of.books.totals().accrued == mine.accrued
    return True


# -- Periods ---------------------------------------------------------------------------------------


def test_fee_is_owed_once_its_period_has_ended_and_not_before():
    """To the millisecond; and once, however often somebody looks."""
    books = till(subscription())
    ends(books, NOW + HOUR - 1)
    before = account(books).accrued
    ends(books, NOW + HOUR)
    ends(books, NOW + HOUR)

    assert (before, account(books).accrued) == (0, 5)
    assert account(books).period == 1
    assert account(books).unsettled_since == NOW + HOUR
    assert books.books.next_period_end == NOW + 2 * HOUR
    assert agrees(books)


def test_periods_that_ended_while_nobody_looked_end_one_after_the_other():
    """A daemon that was down for three hours owes three fees."""
    books = till(subscription())
    ends(books, NOW + 3 * HOUR + 1)

    assert (account(books).accrued, account(books).period) == (15, 3)
    assert agrees(books)


def test_counters_belong_to_the_period_of_the_events_own_time():
    """What comes late is counted where it was used: free units are those of its own period."""
    books = till(subscription(replace_role(OVER, "main")))
    books.take([usage("x", 1001), usage("y", 1001, time=iso(NOW - HOUR // 2))], now=NOW + 1)
    ends(books, NOW + HOUR)
    books.take([usage("z", 5, time=iso(NOW + 1))], now=NOW + HOUR + 1)
    books.take([usage("w", 5)], now=NOW + HOUR + 1)

    assert {row.period for row in books.rows.values() if row.meter == "tokens"} == {0, 1}
    assert account(books).accrued == 5 + Fraction(1007, 100)
    assert agrees(books)


def test_minimum_is_made_up_at_the_end_of_its_period_even_without_usage():
    """And usage that comes late for an ended period is within its minimum."""
    books = till(subscription(Rate("tokens", PICOS, minimum=3_000_000)))
    ends(books, NOW + HOUR)
    empty = account(books).accrued
    books.take([usage("x", 2, time=iso(NOW + 1))], now=NOW + HOUR + 1)
    within = account(books).accrued
    books.take([usage("y", 2, time=iso(NOW + 1))], now=NOW + HOUR + 1)

    assert (empty, within, account(books).accrued) == (8, 8, 9)
    assert agrees(books)


def test_close_ends_the_running_period_and_nothing_later():
    """Its fee and minimums are owed; time alone ends no further period."""
    books = till(subscription(Rate("tokens", PICOS, minimum=3_000_000)))
    books.keep(books.books.close(account(books)))
    books.keep(books.books.close(account(books)))
    ends(books, NOW + 9 * HOUR)

    assert (account(books).accrued, account(books).period) == (8, 0)
    assert agrees(books)


def test_agreement_lapses_when_its_escrows_cannot_hold_the_fee():
    """Nobody renewed it: it is closed instead of owing what nobody has locked."""
    books = till(subscription(), total=7_000_000)
    first = ends(books, NOW + HOUR)
    second = ends(books, NOW + 2 * HOUR)

    assert (first, second) == ([], ["a"])
    assert account(books).closing
    assert account(books).accrued == 5
    assert ends(books, NOW + 3 * HOUR) == []
    assert agrees(books)


def test_close_in_a_period_that_nobody_locked_owes_no_fee():
    """It is closed by hand as it would have lapsed by itself."""
    books = till(subscription(), total=7_000_000)
    ends(books, NOW + HOUR)
    books.keep(books.books.close(account(books)))

    assert account(books).closing
    assert account(books).accrued == 5
    assert agrees(books)


def test_agreement_that_is_renewed_goes_on():
    """The next escrow holds the next fee."""
    books = till(subscription(), total=7_000_000)
    ends(books, NOW + HOUR)
    both = (("main", "esc_main"), ("main", "esc_2"))
    books.books.bind(Agreement("a", "p", "payer", both), NOW)
    fresh = books.books.escrows["esc_2"]
    books.books.put(
        replace(fresh, status=EscrowStatus.ACTIVE, total=5_000_000, remaining=5 * 10**6)
    )

    assert ends(books, NOW + 2 * HOUR) == []
    assert account(books).accrued == 10


def test_period_without_a_fee_needs_no_cover():
    """An escrow of nothing is enough where a period costs nothing by itself."""
    free = subscription()
    plan = replace(free, card=RateCard((Rate(PERIOD_METER, 0), Rate("tokens", PICOS))))
    books = till(plan, total=1)

    assert ends(books, NOW + HOUR) == []
    assert account(books).period == 1


def test_period_of_a_plan_without_a_rate_for_it_only_counts_on():
    """There is nothing to be owed for its end."""
    plan = replace(subscription(), card=RateCard((Rate("tokens", PICOS),)))
    books = till(plan)
    ends(books, NOW + HOUR)

    assert (account(books).accrued, account(books).period) == (0, 1)


def test_fee_is_owed_before_the_deadline_that_would_take_its_money():
    """With the margin that a doubt may need; where the service itself pays, at the period's end."""
    deadline, margin = NOW + HOUR - MINUTE, 20 * MINUTE
    released = till(subscription(settle=Settle(before_deadline=5 * MINUTE)), total=5_000_000)
    auto = till(subscription(period_end=PeriodEnd.AUTO), total=5_000_000)
    for books in (released, auto):
        escrow = books.books.escrows["esc_main"]
        books.books.put(replace(escrow, deadline=deadline))
        ends(books, deadline - margin - 1, margin)
        assert account(books).accrued == 0
        ends(books, deadline - margin, margin)

    assert account(released).accrued == 5
    assert account(auto).accrued == 0


def test_margin_before_a_deadline_holds_after_a_restart_too():
    """What is read back from a store is looked at with the margin of today."""
    deadline, margin = NOW + HOUR - MINUTE, 20 * MINUTE
    books = till(subscription(settle=Settle(before_deadline=5 * MINUTE)), total=5_000_000)
    books.books.put(replace(books.books.escrows["esc_main"], deadline=deadline))
    ledger = books.restored()
    ledger.end_periods(NOW, margin)

    assert ledger.next_period_end == deadline - margin


# -- Versions --------------------------------------------------------------------------------------


def test_event_is_priced_by_its_own_time_in_whatever_order_it_comes():
    """One that comes late has the price of its day."""
    old, new = RateCard((Rate("tokens", PICOS),)), RateCard((Rate("tokens", 3 * PICOS),))
    plan = Plan("p", Pattern.STREAMING, old, later=(Version(NOW + 1000, new),))
    books = till(plan)
    later = NOW + 2000
    books.take([usage("x", 1, time=iso(NOW + 1000))], now=later)
    books.take([usage("y", 1, time=iso(NOW + 999)), usage("z", 1)], now=later)

    assert account(books).accrued == 3 + 1 + 3
    assert {row.card for row in books.rows.values()} == {old.id, new.id}
    assert agrees(books)


def test_change_of_plan_never_prices_again_what_was_accrued_in_tiers():
    """The old tier stays half full, the new one begins empty."""
    plan = Plan("p", Pattern.STREAMING, RateCard((tiered(),)))
    books = till(plan)
    books.take([usage("x", 12)])
    before = account(books).accrued
    other = replace(plan, card=RateCard((tiered(maximum=10**6),)))
    change = books.books.reload({"p": other}, METERS)
    after = account(books).accrued
    books.take([usage("y", 20)])

    assert before == after == Fraction("1.02")
    assert [row.id for row in change.cards] == [other.card.id]
    assert account(books).accrued == Fraction("2.02")
    assert agrees(books)


def tiered(**fields):
    return Rate("tokens", 0, model=Model.GRADUATED, tiers=TIERS, **fields)


@pytest.mark.parametrize("change", [{"period": 2 * HOUR}, {"card": RateCard((FEE,))}])
def test_reload_refuses_another_period_or_other_roles_of_a_plan_in_use(change):
    """Counters are of periods that were, and money is locked by role."""
    plan = subscription()
    books = till(plan)

    with pytest.raises(Conflict, match="write a plan of another name"):
        books.books.reload({"p": replace(plan, **change)}, METERS)


@pytest.mark.parametrize(
    ("meter", "other"),
    [
        ("peak", Aggregation.SUM),
        ("peak", Aggregation.LATEST),
        ("tokens", Aggregation.UNIQUE),
    ],
)
def test_meter_in_use_keeps_its_aggregation(meter, other):
    """A sum has no samples, and samples of one kind say nothing to another: nothing is guessed."""
    plan = Plan("p", Pattern.STREAMING, RateCard((Rate("peak", PICOS), Rate("tokens", PICOS))))
    books = till(plan)
    books.take([usage("x", 9, meter=meter), usage("y", 10, meter=meter)])
    changed = {**METERS, meter: Meter(meter, other)}

    with pytest.raises(Conflict, match=f"{meter} is in use"):
        books.books.reload({"p": plan}, changed)
    with pytest.raises(Conflict, match="counted otherwise"):
        books.restored(meters=changed)
    books.books.reload({"p": plan}, {})
    assert account(books).accrued == (10 if meter == "peak" else 19)


# -- Roles -----------------------------------------------------------------------------------------


HYBRID = Plan("h", Pattern.HYBRID, RateCard((FEE, OVER)), period=HOUR)


def test_quota_border_inside_a_batch_is_paid_to_the_unit():
    """999 + 3: the first is the last free one, two are beyond."""
    books = till(HYBRID)
    books.take([usage("x", 999), usage("y", 3)])
    ends(books, NOW + HOUR)

    assert account(books).owed_by(OVERAGE) == 20_000
    assert account(books).owed_by(BASE) == 5_000_000
    assert account(books).owed == 5_020_000
    assert account(books).owed_by("nobody") == 0
    assert agrees(books)


def test_each_escrow_owes_what_is_drawn_on_its_role():
    """Usage beyond the quota never touches the money of the fee."""
    books = till(HYBRID, total=5_000_000)
    books.take([usage("x", 1500)])
    base, overage = (books.books.escrows[f"esc_{role}"] for role in (BASE, OVERAGE))
    owed = [books.books.owed_on(account(books), escrow) for escrow in (base, overage)]

    assert owed == [0, 5_000_000]
    assert books.books.standing(account(books), overage).owed == 5_000_000


# -- Tranches and scores ---------------------------------------------------------------------------

NAMES = ("design", "build", "ship")
PROJECT = Plan(
    "m",
    Pattern.MILESTONE,
    RateCard(tuple(Rate(MILESTONE_METER, PICOS * 5, where=(("name", n),)) for n in NAMES)),
)
CURVE = (Tier(NANOS // 2, 0, PICOS), Tier(None, 0, 9 * PICOS))
SCORE = Plan(
    "s",
    Pattern.PERFORMANCE,
    RateCard((Rate(OUTCOME_METER, 0, model=Model.VOLUME, tiers=CURVE),)),
)


def reached(event_id, name, **fields):
    """A milestone."""
    return usage(event_id, type=MILESTONE_METER, name=name, **fields)


def scored(event_id, score, **fields):
    """An outcome."""
    return usage(event_id, type=OUTCOME_METER, score=score, **fields)


def test_tranche_is_paid_once_whatever_the_ids():
    """In one batch or in two; delivered again it is a duplicate."""
    books = till(PROJECT)
    first = books.verdicts([reached("x", "build"), reached("y", "build"), reached("x", "build")])
    again = books.verdicts([reached("x", "build"), reached("z", "build")])

    assert (first, again) == (["", "reached", ""], ["", "reached"])
    assert (books.duplicates, account(books).accrued, account(books).units) == (2, 5, 0)
    assert agrees(books)


def test_tranches_come_in_any_order_unless_it_is_told():
    """In their order, also within one batch."""
    free, ordered = till(PROJECT), till(replace(PROJECT, ordered=True))
    batch = [reached("x", "build"), reached("y", "design"), reached("z", "build")]

    assert free.verdicts(batch) == ["", "", "reached"]
    assert ordered.verdicts(batch) == ["out_of_order", "", ""]
    assert ordered.verdicts([reached("x", "ship")]) == [""]
    assert ordered.verdicts([reached("x", "ship"), reached("v", "design")]) == ["", "reached"]
    assert agrees(ordered)


@pytest.mark.parametrize(("plan", "event"), [(PROJECT, reached), (SCORE, scored)])
def test_what_is_reached_once_is_reached_once_on_all_cards_together(plan, event):
    """A price that was changed meanwhile makes no second tranche and no second score."""
    books = till(replace(plan, ordered=True))
    what = "design" if plan is PROJECT else 1
    books.take([event("x", what)])
    before = account(books).accrued
    (rate, *others) = plan.card.rates
    fields = {"price": 7 * PICOS} if plan is PROJECT else {"tiers": (Tier(None, 0, PICOS),)}
    dearer = RateCard((Rate(rate.meter, **{"price": 0, **fields}, where=rate.where,
                            model=rate.model), *others))  # fmt: skip
    books.books.reload({plan.name: replace(plan, card=dearer, ordered=True)}, METERS)

    assert books.verdicts([event("y", what)]) == ["reached"]
    assert account(books).accrued == before
    if plan is PROJECT:
        assert books.verdicts([reached("z", "build")]) == [""]
    assert agrees(books)


def test_tranche_that_only_a_later_version_has_comes_behind_all_others():
    """Where an order is told, what it does not name is last."""
    extra = Rate(MILESTONE_METER, PICOS, where=(("name", "extra"),))
    later = Version(NOW, RateCard((*PROJECT.card.rates, extra)))
    books = till(replace(PROJECT, ordered=True, later=(later,)))
    batch = [reached(name, name) for name in ("extra", *NAMES)]

    assert books.verdicts(batch) == ["out_of_order", "", "", ""]
    assert books.verdicts(batch) == ["", "", "", ""]
    assert books.duplicates == 3


@pytest.mark.parametrize(
    ("plan", "event", "reason"),
    [
        (PROJECT, reached("x", "party"), "unknown_meter"),
        (PROJECT, scored("x", 1), "unknown_type"),
        (SCORE, scored("x", "1.1"), "bad_quantity"),
        (SCORE, scored("x", ""), "bad_quantity"),
        (SCORE, usage("x", type="meterd.void", voids=""), "malformed"),
    ],
)
def test_event_of_a_special_type_that_says_nothing_is_refused(plan, event, reason):
    """With its reason, and nothing is counted."""
    books = till(plan)

    assert books.verdicts([event]) == [reason]
    assert account(books).accrued == 0
    assert agrees(books)


@pytest.mark.parametrize(("score", "usdc"), [(0, 1), ("0.5", 1), ("0.500000001", 9), (1, 9)])
def test_score_is_paid_by_its_step_and_closes_its_agreement(score, usdc):
    """A score of 0 is a score, and there is only one."""
    books = till(SCORE)
    verdicts = books.verdicts([scored("x", score), scored("y", 1)])

    assert verdicts == ["", "reached"]
    assert account(books).accrued == usdc
    assert account(books).closing
    assert agrees(books)


def test_score_that_was_refused_costs_nothing_whatever_else_happens():
    """A curve that pays for 0 does not pay for no score at all."""
    books = till(SCORE)
    books.take([scored("x", 7)])
    both = (("main", "esc_main"), ("main", "esc_2"))
    books.books.bind(Agreement("a", "s", "payer", both), NOW)

    assert account(books).accrued == 0
    assert agrees(books)


def test_score_that_is_taken_back_costs_nothing():
    """As if it had never come."""
    books = till(SCORE)
    books.take([scored("x", 0)])
    books.take_back("x")

    assert (account(books).accrued, account(books).events) == (0, 0)
    assert agrees(books)


# -- Prices that events bring ----------------------------------------------------------------------

DYNAMIC = Plan(
    "d", Pattern.STREAMING, RateCard((Rate("tokens", 2 * PICOS, 10, model=Model.DYNAMIC),))
)


def test_event_brings_its_own_price_up_to_the_cap():
    """For `per` units; each with its own."""
    books = till(DYNAMIC)
    verdicts = books.verdicts(
        [
            usage("x", 5, price="0.5"),
            usage("y", "0.5", price=2),
            usage("z", 1, price="2.000000000001"),
            usage("w", 1),
            usage("v", 1, price="-1"),
            usage("u", 1, price=0),
        ]
    )

    assert verdicts == ["", "", "bad_price", "bad_price", "bad_price", ""]
    assert account(books).accrued == Fraction(25 + 10, 100)
    assert agrees(books)


def test_price_in_two_spellings_is_the_same_content():
    """Another price is another content."""
    books = till(DYNAMIC)
    verdicts = books.verdicts(
        [usage("x", 1, price="0.50"), usage("x", 1, price="0.5"), usage("x", 1, price="0.6")]
    )

    assert verdicts == ["", "", "conflict"]


def test_price_is_refused_where_the_plan_has_its_own():
    """Nobody shall think that it counts."""
    books = till(Plan("p", Pattern.STREAMING, RateCard((Rate("tokens", PICOS),))))
    books.take([usage("x")])

    assert books.verdicts([usage("y", price="0.5")]) == ["bad_price"]


def test_dynamic_rate_with_a_maximum_charges_no_more():
    """The limit is of the period, not of an event."""
    rate = Rate("tokens", 2 * PICOS, model=Model.DYNAMIC, maximum=3_000_000)
    books = till(Plan("p", Pattern.STREAMING, RateCard((rate,))))
    books.take([usage("x", 1, price=2), usage("y", 1, price=2)])
    most = account(books).accrued
    books.take_back("y")

    assert (most, account(books).accrued) == (3, 2)
    assert agrees(books)


# -- Taking back and coming again ------------------------------------------------------------------

EVERY = (
    Rate("tokens", PICOS // 7, 3, (("kind", "plain"),)),
    Rate("tokens", 0, where=(("kind", "tiers"),), model=Model.GRADUATED, tiers=TIERS),
    Rate("tokens", 2 * PICOS, where=(("kind", "priced"),), model=Model.DYNAMIC),
    *(Rate(name, PICOS) for name in ("calls", "peak", "users", "seats")),
)
EVENTS = {
    "plain": usage("plain", 5, dimensions={"kind": "plain"}),
    "tiers": usage("tiers", 15, dimensions={"kind": "tiers"}),
    "priced": usage("priced", 5, dimensions={"kind": "priced"}, price="1.5"),
    "calls": usage("calls", meter="calls"),
    "peak": usage("peak", 99, meter="peak"),
    "users": usage("users", meter="users", value="eve"),
    "seats": usage("seats", 99, meter="seats", time=iso(NOW + 1)),
}
OTHERS = [
    usage("1", 7, dimensions={"kind": "plain"}),
    usage("2", 7, dimensions={"kind": "tiers"}),
    usage("3", 7, dimensions={"kind": "priced"}, price="0.25"),
    usage("4", meter="calls"),
    usage("5", 7, meter="peak"),
    usage("6", meter="users", value="ada"),
    usage("7", 7, meter="seats"),
]


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("others", [OTHERS, []])
def test_event_that_is_taken_back_leaves_nothing_behind(name, others):
    """Charge, counter, samples and sums are what they would be without it."""
    plan = Plan("p", Pattern.STREAMING, RateCard(EVERY))
    books, without = till(plan), till(plan)
    books.take([EVENTS[name]])
    for each in others:
        books.take([each])
        without.take([each])
    full = account(books).accrued
    books.take_back(name)

    assert account(books).accrued == account(without).accrued < full
    assert (account(books).events, account(books).units) == (
        account(without).events,
        account(without).units,
    )
    assert agrees(books)


@pytest.mark.parametrize("value", ["", "x" * 257, "a\nb"])
def test_value_that_cannot_be_told_apart_is_refused(value):
    """A meter of unique values needs one that a person can read."""
    books = till(Plan("p", Pattern.STREAMING, RateCard(EVERY)))

    assert books.verdicts([usage("x", meter="users", value=value)]) == ["malformed"]


def test_event_that_comes_again_to_a_closed_agreement_is_a_duplicate_and_no_dead_letter():
    """It was paid; only what is new is refused."""
    books = till(PROJECT)
    books.take([reached("x", "build")])
    escrow = books.books.escrows["esc_main"]
    books.books.put(replace(escrow, status=EscrowStatus.CLOSED))
    verdicts = books.verdicts(
        [reached("x", "build"), reached("y", "ship"), reached("x", "ship"), usage("z", type="")]
    )

    assert verdicts == ["", "closed", "conflict", "unknown_meter"]
    assert books.duplicates == 1
    assert account(books).accrued == 5


def test_score_that_comes_again_is_a_duplicate_though_its_agreement_is_closed():
    """An outcome closes its agreement, and brokers deliver twice."""
    books = till(SCORE)
    books.take([scored("x", 1)])
    books.books.put(replace(books.books.escrows["esc_main"], status=EscrowStatus.CLOSED))

    assert books.verdicts([scored("x", "1.0")]) == [""]
    assert books.duplicates == 1


# -- Restoring -------------------------------------------------------------------------------------


def test_restore_refuses_a_counter_that_no_stored_rate_prices():
    """What it is worth could only be guessed."""
    books = till(PROJECT)
    books.take([reached("x", "build")])
    state = books.state([CardRow(PROJECT.card.id, "[]")])

    with pytest.raises(Conflict, match="no stored rate"):
        Ledger.restore({"m": PROJECT}, METERS, state)


def test_numbers_of_counters_go_on_behind_those_that_were_stored():
    """Taken events remember their counter by its number: none is given twice."""
    plan = Plan("p", Pattern.STREAMING, RateCard(EVERY))
    books = till(plan)
    books.take(OTHERS)
    restored = Till(books.restored(), rows=books.rows, samples=books.samples)
    restored.take([usage("x", 7, agreement="a", meter="peak"), EVENTS["users"]])
    numbers = [row.number for row in restored.rows.values()]

    assert len(numbers) == len(set(numbers)) == len(OTHERS)
    assert restored.books.counter(99) is None
    assert agrees(restored)


# -- What thresholds and holds look at -------------------------------------------------------------


def test_bound_on_the_exposure_looks_at_usage_and_not_at_fees():
    """A fee is no burst: it says nothing about how fast usage is earned."""
    plan = subscription(Rate("tokens", PICOS), settle=Settle(exposure_max=9_000_000))
    books = till(plan)
    books.take([usage("x", 3)])
    ends(books, NOW + HOUR)
    escrow = books.books.escrows["esc_main"]
    bursts = books.books.standing(account(books), escrow).bursts

    assert (bursts.peak, bursts.level) == (3_000_000, 8_000_000)


def test_uncovered_is_what_no_escrow_of_a_role_can_pay():
    """One that is not read yet may hold anything, so nothing is said while there is one."""
    books = till(HYBRID, total=5_000_000)
    books.take([usage("x", 1600)])
    short = books.books.uncovered(account(books), OVERAGE)
    escrow = books.books.escrows["esc_overage"]
    books.books.put(replace(escrow, status=EscrowStatus.ADOPTING))

    assert short == 1_000_000
    assert books.books.uncovered(account(books), BASE) == 0
    assert books.books.uncovered(account(books), OVERAGE) == 0


def test_event_names_the_hold_that_it_captures():
    """By its place among the events that may accrue."""
    books = till(Plan("p", Pattern.STREAMING, RateCard((Rate("tokens", PICOS),))))
    payloads = [usage("w", meter="none"), usage("x"), usage("y", hold="hold_1")]
    decoded = EventDecoder(SENTINEL).decode(payloads)

    assert books.books.resolve(decoded, None, "s", 0, NOW).holds == {1: "hold_1"}
