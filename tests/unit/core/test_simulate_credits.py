"""A price that falls while usage waits to be paid, and what a long simulation tells on its way."""

from __future__ import annotations

import pytest

from meterd.core import simulate
from meterd.core.plans import Settle
from tests.unit.core.test_simulate import METERS, PLANS, SERVICE, STREAM, T, used


@pytest.mark.parametrize(
    ("owed", "waits"),
    [
        # The one part that waits becomes smaller.
        ([(0, 100), (5, 55), (6, 65)], [(7_000, 55), (1_000, 10)]),
        # The newest part is smaller than the credit: it goes, and something of the one before.
        ([(0, 90), (4, 100), (5, 55), (6, 65)], [(7_000, 55), (1_000, 10)]),
        # By a micro only.
        ([(0, 90), (4, 100), (5, 89), (6, 99)], [(7_000, 89), (1_000, 10)]),
        # It is larger: what waits longest keeps its place in the row.
        ([(0, 40), (4, 100), (5, 55), (6, 65)], [(7_000, 40), (3_000, 15), (1_000, 10)]),
        # It is as large, and nothing of it stays behind.
        ([(0, 55), (4, 100), (5, 55), (6, 65)], [(7_000, 55), (1_000, 10)]),
    ],
)
def test_credit_is_taken_from_the_newest_usage_that_waits(owed, waits):
    """So what is left has waited since its own time, and every micro of it is paid once."""
    steps = [step(second, micros) for second, micros in owed]
    second, micros = owed[-1]
    steps.append(step(second, micros, closing=True))
    curve = simulate.Curve("a", STREAM, ("main",), 10**15, steps)

    life = simulate.settle(curve, Settle(), SERVICE)

    assert waits == life.waits
    assert (micros, 0) == (life.charged, life.unpaid)


def step(second, owed, closing=False):
    return simulate.Step(T + second * 1_000, (owed,), 0, closing=closing, usage=not closing)


def test_progress_is_told_on_the_way_and_adds_up_to_all_events(monkeypatch):
    """At the first moment behind so many events, and once at the end for the rest."""
    monkeypatch.setattr(simulate, "EVENTS_AT_ONCE", 2)
    told = []
    past = used((0, 1), (1, 1), (1, 1), (2, 1), (3, 1), (4, 1))

    priced = simulate.price(PLANS, METERS, {"a": "stream"}, past, progress=told.append)

    assert [3, 2, 1] == told
    assert len(past) == sum(told) == priced.events
