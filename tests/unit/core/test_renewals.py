from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core.accounts import Agreement
from meterd.core.ledger import Ledger
from meterd.core.meters import Meter
from meterd.core.plans import BASE, OVERAGE, Pattern, Plan, Version
from meterd.core.pricing import PERIOD_METER, Rate, RateCard
from meterd.core.renewals import amount_for, hours_for, lacking
from meterd.core.settlement import Escrow, EscrowStatus

NOW = 1_795_000_000_000
HOUR = 3_600_000
WEEK = 7 * 24 * HOUR
AHEAD = HOUR
FEE = 5_000_000
MICROS = 10**6
USAGE = Rate("units", 10**9)
WEEKLY = Plan(
    "weekly",
    Pattern.SUBSCRIPTION,
    RateCard((Rate(PERIOD_METER, 5 * 10**12),)),
    period=WEEK,
    deposits=(("main", FEE),),
    auto_release_hours=168,
    renew=True,
)
STREAM = Plan(
    "stream", Pattern.STREAMING, RateCard((USAGE,)), deposits=(("main", MICROS),), renew=True
)
MIXED = replace(
    WEEKLY,
    name="mixed",
    pattern=Pattern.HYBRID,
    card=RateCard((Rate(PERIOD_METER, 5 * 10**12, role=BASE), Rate("units", 10**9, role=OVERAGE))),
    deposits=((BASE, FEE), (OVERAGE, MICROS)),
)
METERS = {"units": Meter("units")}


def books(plan, *escrows, used=0):
    """An agreement with these escrows, of which so many units are used."""
    ledger = Ledger({plan.name: plan}, METERS)
    pairs = tuple((escrow.role, escrow.id) for escrow in escrows)
    ledger.bind(Agreement("a", plan.name, "ann", pairs), NOW)
    for escrow in escrows:
        ledger.put(escrow)
    account = ledger.accounts["a"]
    account.numerator = used * account.denominator // 1000
    if account.by_role is not None:
        account.by_role[OVERAGE] = account.numerator
    return ledger, account


def escrow(name="e1", total=FEE, *, left=None, role="main", deadline=None, **fields):
    """An adopted escrow."""
    left = total if left is None else left
    state = Escrow(name, "a", role, EscrowStatus.ACTIVE, total=total, deadline=deadline, **fields)
    return replace(state, remaining=left, observed=total - left, settled=total - left)


def wanted(ledger, account, now):
    return list(lacking(ledger, account, now, AHEAD))


def test_a_renewal_is_asked_for_when_the_running_period_ends_soon():
    """An hour before, not earlier; and with the next fee held, not at all."""
    ledger, account = books(WEEKLY, escrow())
    used = escrow(total=2 * FEE, left=FEE)
    held, rich = books(WEEKLY, used, escrow("e2")), books(WEEKLY, escrow(total=2 * FEE))

    assert [] == wanted(ledger, account, NOW + WEEK - AHEAD - 1)
    assert [("main", "renewal")] == wanted(ledger, account, NOW + WEEK - AHEAD)
    assert [[], []] == [wanted(*one, NOW + WEEK - 1) for one in (held, rich)]


def test_what_a_deadline_takes_before_the_next_period_ends_holds_no_fee():
    """An escrow that the service empties at the period's end cannot pay for the next period."""
    twice = escrow(total=2 * FEE, deadline=NOW + WEEK)
    ledger, account = books(WEEKLY, twice)
    half = escrow(total=2 * FEE, left=FEE, deadline=NOW + WEEK)
    lasting = books(WEEKLY, half, escrow("e2", deadline=NOW + 2 * WEEK))

    assert [("main", "renewal")] == wanted(ledger, account, NOW + WEEK - AHEAD)
    assert [] == wanted(*lasting, NOW + WEEK - AHEAD)


def test_a_deadline_before_the_periods_end_brings_the_renewal_forward():
    """The period is ended before its escrow's deadline, and the next one must be there by then."""
    soon = NOW + WEEK - 10 * HOUR
    ledger, account = books(WEEKLY, escrow(deadline=soon))
    empty = books(WEEKLY, escrow(left=0, deadline=soon))

    last = books(WEEKLY, escrow(left=1, deadline=soon))

    assert [("main", "renewal")] == wanted(ledger, account, soon - AHEAD)
    assert [("main", "renewal")] == wanted(*last, soon - AHEAD)
    assert [] == wanted(*empty, soon - AHEAD)
    assert [] == wanted(ledger, account, soon), "it has taken what it takes"


def test_the_fee_of_the_next_period_is_that_of_its_own_version():
    """A fee that rises wants an escrow that holds the new one."""
    dear = RateCard((Rate(PERIOD_METER, 8 * 10**12),))
    plan = replace(WEEKLY, later=(Version(NOW + WEEK, dear),))
    ledger, account = books(plan, escrow(total=2 * FEE))

    assert [("main", "renewal")] == wanted(ledger, account, NOW + WEEK - AHEAD)


def test_a_fee_that_begins_or_ends_with_a_later_period_is_no_fee_of_the_next_one():
    """Only what the next period itself costs is held for it."""
    free = RateCard((Rate(PERIOD_METER, 0), USAGE))
    begins = replace(WEEKLY, card=free, later=(Version(NOW + WEEK, WEEKLY.card),))
    ends = replace(WEEKLY, later=(Version(NOW + 2 * WEEK, free),))
    soon = NOW + WEEK - AHEAD

    assert [("main", "renewal")] == wanted(*books(begins, escrow(left=FEE - 1)), soon)
    assert [] == wanted(*books(begins, escrow(left=FEE)), soon)
    assert [("main", "renewal")] == wanted(*books(ends, escrow()), soon)


def test_a_fee_is_held_in_whole_micros_as_it_is_owed():
    """What is below a micro is never owed, and no escrow is asked for its sake."""
    card = RateCard((Rate(PERIOD_METER, 5 * 10**12 + 1),))
    ledger, account = books(replace(WEEKLY, card=card), escrow(total=2 * FEE))

    assert [] == wanted(ledger, account, NOW + WEEK - AHEAD)


def test_a_stream_rolls_over_below_a_fifth_of_its_deposit():
    """Exactly a fifth is enough; one unit less is not."""
    enough, low = (
        books(STREAM, escrow(total=MICROS), used=800),
        books(STREAM, escrow(total=MICROS), used=801),
    )

    assert [] == wanted(*enough, NOW)
    assert [("main", "rollover")] == wanted(*low, NOW)


def test_a_stream_without_a_deposit_rolls_over_below_a_fifth_of_its_last_escrow():
    """As much as the last one held is what the next one will hold."""
    plan = replace(STREAM, deposits=())

    assert [] == wanted(*books(plan, escrow(total=MICROS), used=800), NOW)
    assert [("main", "rollover")] == wanted(*books(plan, escrow(total=MICROS), used=801), NOW)


def test_a_stream_rolls_over_before_a_deadline_takes_its_escrow():
    """Money that is gone within the hour is not headroom."""
    ledger, account = books(STREAM, escrow(total=MICROS, deadline=NOW + AHEAD))

    assert [("main", "rollover")] == wanted(ledger, account, NOW)
    assert [] == wanted(ledger, account, NOW - 1)


def test_nothing_is_asked_for_while_an_escrow_is_being_read_or_the_agreement_ends():
    """One that is not read yet may hold anything; a closing agreement needs no more."""
    low = escrow(total=MICROS)
    unread = books(STREAM, low, Escrow("e2", "a", "main"), used=900)
    closing = books(STREAM, low, used=900)
    closing[0].close(closing[1])

    assert [[], []] == [wanted(*one, NOW) for one in (unread, closing)]


def test_an_agreement_whose_escrows_are_all_spent_goes_on_and_one_that_was_refunded_does_not():
    """A payer who took his money back is not asked for more of it."""
    spent, smallest = escrow(total=MICROS, left=0), escrow(total=1, left=0)
    refunded = replace(escrow(total=MICROS, left=100), remaining=0)
    unread = Escrow("e1", "a", "main")
    states = (spent, smallest, refunded, unread)
    ended = [books(STREAM, one, used=1000) for one in states]
    for (ledger, _), one in zip(ended, states, strict=True):
        ledger.put(replace(one, status=EscrowStatus.CLOSED))

    rollover = [("main", "rollover")]
    assert [rollover, rollover, [], []] == [wanted(*one, NOW) for one in ended]


def test_two_escrows_that_nobody_draws_on_are_enough():
    """Where deadlines are shorter than asked for, not one is locked after another."""
    short = [escrow(f"e{n}", MICROS, deadline=NOW + 1) for n in range(2)]

    tiny = [escrow(f"e{n}", 1) for n in range(2)]

    assert [("main", "rollover")] == wanted(*books(STREAM, short[0]), NOW)
    assert [[], []] == [wanted(*books(STREAM, *pair), NOW) for pair in (short, tiny)]


def test_an_escrow_that_was_frozen_before_it_was_read_is_none_to_draw_on():
    """However many of them there are, a stream that runs low goes on by another one."""
    frozen = [Escrow(f"e{n}", "a", "main", EscrowStatus.FROZEN) for n in range(2)]

    assert [("main", "rollover")] == wanted(*books(STREAM, *frozen), NOW)


def test_a_hybrid_renews_its_fee_and_rolls_its_overage_over_each_by_itself():
    """Each role by its own rule."""
    base, overage = escrow(role=BASE), escrow("e2", MICROS, role=OVERAGE)
    fresh, used = books(MIXED, base, overage), books(MIXED, base, overage, used=900)

    assert [(BASE, "renewal")] == wanted(*fresh, NOW + WEEK - AHEAD)
    assert [(OVERAGE, "rollover")] == wanted(*used, NOW)


REFUNDED = replace(
    escrow(role=BASE, total=2 * FEE, left=FEE), remaining=0, status=EscrowStatus.CLOSED
)


@pytest.mark.parametrize(
    "base",
    [
        (Escrow("e1", "a", BASE),),
        (REFUNDED,),
        (escrow(role=BASE), escrow("e3", role=BASE)),
    ],
    ids=["being read", "refunded", "two spare"],
)
def test_a_role_that_asks_for_nothing_leaves_the_next_one_its_rollover(base):
    """Why one role waits is no reason for another."""
    overage = escrow("e2", MICROS, role=OVERAGE)

    assert [(OVERAGE, "rollover")] == wanted(*books(MIXED, *base, overage, used=900), NOW)


def test_a_plan_with_periods_and_no_fee_rolls_over():
    """There is no fee to be held."""
    plans = [
        replace(STREAM, period=WEEK),
        replace(STREAM, period=WEEK, card=RateCard((Rate(PERIOD_METER, 0), USAGE))),
    ]

    for plan in plans:
        ledger, account = books(plan, escrow(total=MICROS), used=900)
        assert [("main", "rollover")] == wanted(ledger, account, NOW)


def test_the_next_escrow_holds_the_plans_deposit_or_as_much_as_the_last():
    """A plan that says nothing goes on as it began."""
    free = replace(STREAM, deposits=())
    last = books(free, escrow(total=3), escrow("e2", 5), escrow("e3", 7))

    assert MICROS == amount_for(*books(STREAM, escrow(total=3)), "main")
    assert (7, 0) == (amount_for(*last, "main"), amount_for(*last, "base"))


@pytest.mark.parametrize(
    ("plan", "now", "hours"),
    [
        (STREAM, NOW, None),
        (replace(STREAM, auto_release_hours=24), NOW, 24),
        (WEEKLY, NOW + WEEK, 168),
        (WEEKLY, NOW + WEEK - 1, 169),
        (WEEKLY, NOW + WEEK - 2 * HOUR, 170),
        (WEEKLY, NOW + 2 * WEEK, 168),
    ],
)
def test_the_next_escrows_deadline_is_never_before_its_periods_end(plan, now, hours):
    """Locked ahead of time it has so much longer, or renewals would creep ahead."""
    _, account = books(plan, escrow())

    assert hours == hours_for(account, now)
