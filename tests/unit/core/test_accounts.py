"""What follows from the facts of an account: its rows, what it owes, what an escrow can pay."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from meterd.core.accounts import Account, Agreement, Counter, Line, Touched, capacity, paid
from meterd.core.changes import AgreementRow, Change, CounterRow, SampleRow
from meterd.core.meters import Meter
from meterd.core.money import MICROS, NANOS, PICOS
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import OUTCOME_METER, Model, Rate, RateCard, Tier
from meterd.core.settlement import ENDED, Escrow, EscrowStatus, Release, ReleaseStatus

SCORE = {"price": 0, "model": Model.VOLUME, "tiers": (Tier(None, PICOS, PICOS),)}
CARD = RateCard((Rate(OUTCOME_METER, **SCORE), Rate(OUTCOME_METER, **SCORE, minimum=5 * MICROS)))
PLAN = Plan("p", Pattern.STREAMING, CARD)
ESCROWS = (("base", "e1"), ("overage", "e2"))


def account(**fields):
    """An agreement under it, whose sums are in thirds of a USDC."""
    agreement = Agreement("a", "p", "payer", ESCROWS, "config")
    return Account(agreement, PLAN, 17, fields.pop("denominator", 3), **fields)


# -- A line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "events", "ended", "usdc"),
    [
        (0, 0, False, 0),
        (0, 0, True, 0),
        (0, 1, False, 3),
        (0, 1, True, 3),
        (1, 0, False, 0),
        (1, 0, True, 5),
        (1, 1, False, 3),
        (1, 1, True, 5),
    ],
)
def test_line_without_an_event_costs_nothing_but_its_minimum_once_it_has_ended(
    place, events, ended, usdc
):
    """A score of 0 may cost something; one that was taken back, and none at all, do not."""
    of = account(denominator=7 * CARD.denominator)
    line = Line(of, CARD, place, quantity=2 * NANOS * events, events=events, ended=ended)

    assert usdc * of.denominator == line.work_out() == line.charge
    assert 0 == line.work_out(), "worked out again, nothing has changed"
    line.events = line.quantity = 0
    line.ended = False
    assert -usdc * of.denominator == line.work_out()


def test_line_of_prices_that_events_brought_costs_their_amount_up_to_its_maximum():
    """The quantity is in the amount already."""
    card = RateCard((Rate("tokens", PICOS, model=Model.DYNAMIC, maximum=2 * MICROS),))
    line = Line(account(denominator=card.denominator), card, 0, NANOS, NANOS * PICOS, 1)

    assert card.denominator == line.work_out()
    line.amount = 3 * NANOS * PICOS
    assert card.denominator == line.work_out()
    assert 2 * card.denominator == line.charge


# -- What an agreement owes -----------------------------------------------------------------------


def test_account_owes_whole_micros_of_its_exact_sum():
    """Two thirds of a USDC are 666666 micros; what is exact stays exact."""
    of = account(numerator=2)

    assert Fraction(2, 3) == of.accrued
    assert 666_666 == of.owed == of.owed_by("main") == of.owed_by("base")


def test_account_that_draws_on_several_roles_owes_on_each_its_part():
    """A role that nothing was charged to owes nothing, and a credit makes it less."""
    of = account(by_role={})
    of.grow("base", 5)
    of.grow("overage", 2)
    of.grow("base", -1)

    assert (6, {"base": 4, "overage": 2}) == (of.numerator, of.by_role)
    assert (1_333_333, 666_666, 0) == tuple(map(of.owed_by, ("base", "overage", "main")))
    alone = account()
    alone.grow("main", 5)
    assert (5, None) == (alone.numerator, alone.by_role)


def test_account_is_stored_with_all_its_sums():
    """Every figure in its own place."""
    sums = {"events": 4, "units": 9, "unsettled_since": 21, "closing": True, "period": 2}
    of = account(numerator=2, **sums)

    expected = AgreementRow(
        "a", "p", "payer", "config", ESCROWS, True, 17, Fraction(2, 3), 4, 9, 21, 2
    )
    assert expected == of.row
    assert ("e1", ("e1", "e2")) == (of.escrow, of.escrow_ids)


def test_counter_is_stored_with_all_that_it_counted():
    """Under the five that are its key; and a change holds each row once."""
    of = account()
    where = (("kind", "x"),)
    counter = Counter(
        of, 2, "card", Meter("tokens"), where, 8, 1, "base", quantity=5, amount=6, events=7
    )
    sample = SampleRow(8, "key", 5, 1)
    touched = Touched({counter: None}, [sample], {of: None})

    row = CounterRow("a", "card", "tokens", where, 5, 7, 2, 6, 8)
    assert row == counter.row
    assert Change(agreements=(of.row,), counters=(row,), samples=(sample,)) == touched.change()


# -- What an escrow can pay ----------------------------------------------------------------------

FACTS = {"total": 100, "baseline": 10, "settled": 20, "credited": 5}
ESCROW = Escrow("e1", "a", "main", EscrowStatus.ACTIVE, observed=35, remaining=60, **FACTS)
OPEN = Release("r", "e1", 7, 35, ReleaseStatus.SENT, "", 0, 0, ())


def test_escrow_has_paid_what_was_released_since_it_was_adopted_and_what_is_open():
    """By what the service shows or by what is expected of it, whichever is more."""
    assert 25 == paid(ESCROW)
    assert 32 == paid(replace(ESCROW, release=OPEN))
    assert (30, 25) == (paid(replace(ESCROW, observed=40)), paid(replace(ESCROW, observed=30)))


def test_escrow_can_pay_what_it_has_paid_and_what_remains():
    """What is open is a part of what remains, as long as the service does not show it."""
    assert 85 == capacity(ESCROW) == capacity(replace(ESCROW, release=OPEN))
    assert 25 == capacity(replace(ESCROW, remaining=0))


@pytest.mark.parametrize(
    "ended",
    [{"status": EscrowStatus.CLOSED}, *({"service_status": word} for word in sorted(ENDED))],
)
def test_escrow_that_has_ended_can_pay_what_it_paid(ended):
    """What is left in it is out of reach."""
    assert 25 == capacity(replace(ESCROW, **ended))
