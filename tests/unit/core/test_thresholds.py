"""When a release is asked for, and when time alone may ask for one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core.plans import Settle
from meterd.core.settlement import Escrow, EscrowStatus, Release, ReleaseStatus
from meterd.core.thresholds import Standing, due, next_look

T = 1_000_000_000  # Now, wall ms.
MARGIN = 60_000
UNIT = 10**9

OPEN = Escrow("e", "a", "main", status=EscrowStatus.ACTIVE, total=1_000_000, remaining=1_000_000)
NEVER = Settle(min_release=100)
HELD = Release("r", "e", 900, 0, ReleaseStatus.IN_DOUBT, "", 0, 0, ())


def standing(owed, *, units=0, since=0):
    """What an agreement owes, in micros."""
    return Standing(owed, units * UNIT, since)


# Each row changes one column of the row above it, or of the first one of its group.
DUE = [
    ("nothing is asked for", NEVER, OPEN, standing(500_000), ""),
    ("below the amount", replace(NEVER, amount=1_000), OPEN, standing(999), ""),
    ("at the amount", replace(NEVER, amount=1_000), OPEN, standing(1_000), "amount"),
    (
        "at the amount, but settled",
        replace(NEVER, amount=1_000),
        replace(OPEN, settled=1, observed=1),
        standing(1_000),
        "",
    ),
    (
        "at the amount, but held",
        replace(NEVER, amount=1_000),
        replace(OPEN, release=HELD),
        standing(1_000),
        "",
    ),
    (
        "at the amount over the baseline",
        replace(NEVER, amount=1_000),
        replace(OPEN, baseline=50, observed=50, remaining=999_950),
        standing(1_000),
        "amount",
    ),
    ("below the units", replace(NEVER, units=100 * UNIT), OPEN, standing(500, units=99), ""),
    ("at the units", replace(NEVER, units=100 * UNIT), OPEN, standing(500, units=100), "units"),
    (
        "at the units, but settled",
        replace(NEVER, units=100 * UNIT),
        replace(OPEN, units_settled=UNIT),
        standing(500, units=100),
        "",
    ),
    ("below the interval", replace(NEVER, interval=1_000), OPEN, standing(500, since=T - 999), ""),
    (
        "at the interval",
        replace(NEVER, interval=1_000),
        OPEN,
        standing(500, since=T - 1_000),
        "interval",
    ),
    ("an interval of nothing", replace(NEVER, interval=1_000), OPEN, standing(500), ""),
    (
        "at the interval, below the least release",
        replace(NEVER, interval=1_000),
        OPEN,
        standing(99, since=T - 1_000),
        "",
    ),
    ("below the share", replace(NEVER, escrow_percent=10), OPEN, standing(99_999), ""),
    ("at the share", replace(NEVER, escrow_percent=10), OPEN, standing(100_000), "escrow_percent"),
    (
        "the first of two",
        replace(NEVER, amount=1, units=1),
        OPEN,
        standing(500, units=9),
        "amount",
    ),
    ("all that is left", NEVER, OPEN, standing(1_000_000), "exhausted"),
    ("more than is left", NEVER, OPEN, standing(2_000_000), "exhausted"),
    (
        "nothing is left",
        replace(NEVER, amount=1),
        replace(OPEN, remaining=0, observed=600, settled=600),
        standing(2_000_000),
        "",
    ),
    (
        "before the deadline's margin",
        replace(NEVER, before_deadline=1_000),
        replace(OPEN, deadline=T + MARGIN + 1),
        standing(1),
        "",
    ),
    (
        "at the deadline's margin, below the least release",
        replace(NEVER, before_deadline=1_000),
        replace(OPEN, deadline=T + MARGIN),
        standing(1),
        "deadline",
    ),
    (
        "at the plan's own margin",
        replace(NEVER, before_deadline=MARGIN + 5),
        replace(OPEN, deadline=T + MARGIN + 5),
        standing(1),
        "deadline",
    ),
    (
        "at the deadline with nothing to pay",
        NEVER,
        replace(OPEN, deadline=T),
        standing(0),
        "",
    ),
    ("closing", NEVER, replace(OPEN, closing=True), standing(1), "close"),
    ("closing with nothing to pay", NEVER, replace(OPEN, closing=True), standing(0), "close"),
    (
        "closed",
        NEVER,
        replace(OPEN, closing=True, status=EscrowStatus.CLOSED),
        standing(99),
        "",
    ),
]


@pytest.mark.parametrize(
    ("settle", "escrow", "owes", "why"), [row[1:] for row in DUE], ids=[row[0] for row in DUE]
)
def test_release_is_asked_for_by_the_first_threshold_that_is_reached(settle, escrow, owes, why):
    """Each row is one side of one threshold."""
    assert why == due(settle, escrow, owes, T, MARGIN)


LOOKS = [
    ("nothing that time decides", NEVER, OPEN, standing(500, since=T), None),
    ("an interval", replace(NEVER, interval=1_000), OPEN, standing(500, since=T), T + 1_000),
    ("an interval of nothing", replace(NEVER, interval=1_000), OPEN, standing(500), None),
    (
        "an interval below the least release",
        replace(NEVER, interval=1_000),
        OPEN,
        standing(99, since=T),
        None,
    ),
    (
        "a deadline below the least release",
        replace(NEVER, interval=1_000, before_deadline=0),
        replace(OPEN, deadline=T + 2 * MARGIN),
        standing(99, since=T),
        T + MARGIN,
    ),
    (
        "the earlier of two",
        replace(NEVER, interval=1_000, before_deadline=0),
        replace(OPEN, deadline=T + 2 * MARGIN),
        standing(500, since=T),
        T + 1_000,
    ),
    (
        "nothing to pay",
        replace(NEVER, interval=1_000),
        replace(OPEN, settled=500),
        standing(500, since=T),
        None,
    ),
    (
        "closed",
        replace(NEVER, interval=1_000),
        replace(OPEN, status=EscrowStatus.CLOSED),
        standing(500, since=T),
        None,
    ),
]


@pytest.mark.parametrize(
    ("settle", "escrow", "owes", "at"), [row[1:] for row in LOOKS], ids=[row[0] for row in LOOKS]
)
def test_next_look_is_when_time_alone_makes_something_due(settle, escrow, owes, at):
    """At that moment, and not a millisecond earlier, a threshold is reached."""
    assert at == next_look(settle, escrow, owes, MARGIN)
    if at is not None:
        assert "" == due(settle, escrow, owes, at - 1, MARGIN)
        assert due(settle, escrow, owes, at, MARGIN) in ("interval", "deadline")


def test_least_release_itself_is_released_and_looked_for():
    """The limit is in: at it, an interval that ends asks, and its end is a moment to look."""
    settle = replace(NEVER, interval=1_000)
    least = standing(100, since=T - 1_000)

    assert "interval" == due(settle, OPEN, least, T, MARGIN)
    assert T == next_look(settle, OPEN, least, MARGIN)


def test_interval_runs_from_the_first_moment_there_is():
    """0 alone says that nothing is unsettled."""
    settle = replace(NEVER, interval=1_000)

    assert "interval" == due(settle, OPEN, standing(500, since=1), 1_001, MARGIN)
    assert 1_001 == next_look(settle, OPEN, standing(500, since=1), MARGIN)


def test_deadline_is_looked_for_from_the_first_micro_on():
    """Nothing payable needs no look, and the least that can be paid does."""
    ending = replace(OPEN, deadline=T)

    assert next_look(NEVER, ending, standing(0), MARGIN) is None
    assert T - max(NEVER.before_deadline, MARGIN) == next_look(NEVER, ending, standing(1), MARGIN)
