"""Plans: versions in force at a time, periods, roles and tranches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.plans import BASE, OVERAGE, Pattern, Plan, Version
from meterd.core.pricing import MILESTONE_METER, PERIOD_METER, Rate, RateCard

CARDS = [RateCard((Rate("tokens", price),)) for price in (1, 2, 3)]
VERSIONED = Plan(
    "v", Pattern.STREAMING, CARDS[0], later=(Version(100, CARDS[1]), Version(200, CARDS[2]))
)
WEEKLY = Plan("w", Pattern.SUBSCRIPTION, RateCard((Rate(PERIOD_METER, 1),)), period=7)


@pytest.mark.parametrize(
    ("at", "card"), [(0, 0), (99, 0), (100, 1), (199, 1), (200, 2), (10**15, 2), (-5, 0)]
)
def test_event_is_priced_by_the_version_in_force_at_its_time(at, card):
    """A version begins with its very first millisecond."""
    assert VERSIONED.card_at(at) is CARDS[card]


def test_plan_knows_all_its_cards_oldest_first():
    """What was accrued under any of them can be priced again."""
    assert list(VERSIONED.cards) == CARDS


def test_time_decides_what_an_event_costs_where_there_are_versions_or_periods():
    """Only else may the spelling of an event be remembered with its counter."""
    assert VERSIONED.timed
    assert WEEKLY.timed
    assert not replace(VERSIONED, later=()).timed


@given(st.integers(-100, 10**6), st.integers(0, 10**6), st.integers(1, 1000))
def test_period_of_a_moment_ends_behind_it_and_the_one_before_does_not(opened, after, length):
    """Periods lie one behind the other from the opening on, without a gap."""
    plan = replace(WEEKLY, period=length)
    number = plan.period_at(opened, opened + after)

    assert isinstance(number, int)
    assert plan.period_ends(opened, number) > opened + after
    assert plan.period_ends(opened, number - 1) <= opened + after


def test_usage_from_before_the_opening_belongs_to_the_first_period():
    """Its agreement was bound late; it is owed all the same."""
    assert WEEKLY.period_at(100, 3) == 0


def test_life_without_periods_is_one_period_without_an_end():
    """Nothing ends by time alone."""
    assert VERSIONED.period_at(0, 10**15) == 0
    assert VERSIONED.period_ends(0, 0) is None


def test_roles_are_those_of_all_versions_in_a_fixed_order():
    """An agreement has an escrow for each of them from the beginning."""
    rates = (Rate("tokens", 1, role=OVERAGE), Rate(PERIOD_METER, 1, role=BASE))
    plan = Plan("h", Pattern.HYBRID, RateCard(rates[:1]), later=(Version(9, RateCard(rates)),))

    assert plan.roles == (BASE, OVERAGE)


def test_tranches_are_named_in_their_order():
    """`ordered` means the order of the configuration."""
    names = ("design", "build", "ship")
    rates = tuple(Rate(MILESTONE_METER, 1, where=(("name", name),)) for name in names)
    plan = Plan("m", Pattern.MILESTONE, RateCard((*rates, Rate("tokens", 1, where=(("a", "b"),)))))

    assert plan.tranches == names
