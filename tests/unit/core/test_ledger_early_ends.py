"""Periods that end early, for a deadline's sake: who is served, and what a close still costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core.accounts import Agreement
from meterd.core.events import UsageEvent
from meterd.core.holds import Ask, Holds
from meterd.core.ledger import Ledger
from meterd.core.money import NANOS
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import PERIOD_METER, Rate, RateCard
from meterd.core.settlement import EscrowStatus
from tests.unit.core.books import METERS, NOW

HOUR = 3_600_000
FEE = 5 * 10**6
CARD = RateCard((Rate(PERIOD_METER, 5 * 10**12), Rate("tokens", 0)))
WEEKLY = Plan("weekly", Pattern.SUBSCRIPTION, CARD, period=168 * HOUR)


@pytest.fixture
def books():
    """A subscription of five a week on one escrow that holds just that, until the week's end."""
    ledger = Ledger({"weekly": WEEKLY}, METERS)
    ledger.bind(Agreement("a", "weekly", "payer", (("main", "esc_a"),)), NOW)
    put(ledger, total=FEE, remaining=FEE, deadline=NOW + 168 * HOUR)
    return ledger


def put(ledger, **figures):
    escrow = replace(ledger.escrows["esc_a"], status=EscrowStatus.ACTIVE, **figures)
    ledger.put(escrow)


def judge(ledger, at):
    return Holds().judge(ledger, ledger.accounts["a"], Ask("tokens", NANOS), at)


def test_payer_is_served_until_the_end_of_the_period_that_ended_early(books):
    """The fee is taken before the service's deadline; the week that it paid for goes on."""
    early = NOW + 168 * HOUR - 900_000
    books.end_periods(early, 60_000)
    put(books, remaining=0, observed=FEE, settled=FEE)

    assert 1 == books.accounts["a"].period
    assert judge(books, early).allowed
    assert judge(books, NOW + 168 * HOUR - 1).allowed
    assert not judge(books, NOW + 168 * HOUR).allowed


def test_payer_is_denied_in_a_period_that_no_escrow_can_pay(books):
    """Not by a micro less than the fee."""
    put(books, total=FEE - 1, remaining=FEE - 1)

    assert "the payer must renew" in judge(books, NOW).reason


@pytest.mark.parametrize("by_event", [False, True])
@pytest.mark.parametrize("renewed", [False, True])
def test_payer_closes_between_the_early_end_and_the_real_one(books, renewed, by_event):
    """He owes the one fee, and none for a period that has not begun."""
    early = NOW + 168 * HOUR - 900_000
    books.end_periods(early, 60_000)
    if renewed:
        put(books, total=2 * FEE, remaining=2 * FEE)
    if by_event:
        close = UsageEvent(id="x", agreement="a", type="meterd.close")
        resolved = books.resolve([close], None, "s", 0, early)
        books.apply(books.decide(resolved, [b"x"], [1], [-1]), early)
    else:
        books.close(books.accounts["a"], early)

    assert books.accounts["a"].closing
    assert FEE == books.accounts["a"].owed


def test_payer_who_closes_in_a_period_owes_it(books):
    """From its first moment on."""
    put(books, total=2 * FEE, remaining=2 * FEE)
    books.end_periods(NOW + 168 * HOUR, 60_000)
    books.close(books.accounts["a"], NOW + 168 * HOUR)

    assert 2 * FEE == books.accounts["a"].owed
