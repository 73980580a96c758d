"""What is due: at which moment an agreement's unsettled usage asks to be released, and why.

Pure looks at facts; nothing here decides an amount (that is `settlement.Escrow.payable`) or whether
a call may be made (that is `settlement.step`).
"""

from __future__ import annotations

from dataclasses import dataclass

from meterd.core.money import format_amount
from meterd.core.plans import Settle
from meterd.core.settlement import Escrow, EscrowStatus


@dataclass(frozen=True, slots=True)
class Standing:
    """What the thresholds look at, besides the escrow: micros, nanos of units, and wall ms."""

    owed: int
    units: int
    unsettled_since: int  # 0: nothing is unsettled.


# How long usage may go on between the decision to release and the money's arrival, besides the
# pace between two calls: the intention's commit, the reading before it, and the call.
REACTION_MS = 5_000


def due(
    settle: Settle, escrow: Escrow, standing: Standing, wall: int, margin: int, pace: int = 0
) -> str:
    """Name the threshold that asks for a release at `wall`; "" when none does.

    `margin` is how long, in ms, a doubt may take to be resolved: what is due before the deadline is
    due that much earlier. `pace` is how long, in ms, a release waits for the one before it.
    """
    payable = escrow.payable(standing.owed)
    if escrow.closing and escrow.status is not EscrowStatus.CLOSED:
        return "close"  # Even with nothing payable: the state table then closes the escrow.
    if payable <= 0:
        return ""
    early = _deadline_at(settle, escrow, margin)
    if early is not None and wall >= early:
        return "deadline"
    if payable < settle.min_release:
        return ""
    if settle.exposure_max is not None:
        adapted = adaptive(settle.exposure_max, payable, standing, wall, pace)
        if adapted:
            return adapted
    percent = settle.escrow_percent
    reached = (
        (settle.amount is not None and payable >= settle.amount, "amount"),
        (
            settle.units is not None and standing.units - escrow.units_settled >= settle.units,
            "units",
        ),
        (percent is not None and payable * 100 >= escrow.total * percent, "escrow_percent"),
        (
            settle.interval is not None
            and standing.unsettled_since > 0
            and wall >= _interval_at(settle, standing),
            "interval",
        ),
        (payable == escrow.remaining, "exhausted"),
    )
    return next((name for yes, name in reached if yes), "")


def adaptive(bound: int, unsettled: int, standing: Standing, wall: int, pace: int) -> str:
    """Say why the exposure asks for a release now; "" when it may grow on.

    The fewest calls under a bound are made by waiting as long as the bound allows. What is earned
    while a release is on its way is exposure too, so it is asked for when unsettled and what usage
    at today's rate adds in that time reach the bound. The rate is the mean since the oldest
    unsettled usage. All in micros and ms.
    """
    elapsed = max(1, wall - standing.unsettled_since)
    growth = unsettled * (REACTION_MS + pace) // elapsed if standing.unsettled_since else 0
    # A burst a moment old says little about the rate: half of the bound is always left to use.
    threshold = max(bound - growth, bound // 2, 1)
    if unsettled < threshold:
        return ""
    each_hour = format_amount(unsettled * 3_600_000 // elapsed)
    return f"adaptive: {format_amount(unsettled)} of {format_amount(bound)} at {each_hour} an hour"


def next_look(settle: Settle, escrow: Escrow, standing: Standing, margin: int) -> int | None:
    """When, in wall ms, time alone may make something due; None: never."""
    if escrow.status is EscrowStatus.CLOSED or escrow.payable(standing.owed) <= 0:
        return None
    moments = [
        moment
        for moment in (
            _deadline_at(settle, escrow, margin),
            # Under `min_release` an interval asks for nothing when it ends: a look would find
            # nothing.
            _interval_at(settle, standing)
            if settle.interval is not None
            and standing.unsettled_since > 0
            and escrow.payable(standing.owed) >= settle.min_release
            else None,
        )
        if moment is not None
    ]
    return min(moments, default=None)


def _deadline_at(settle: Settle, escrow: Escrow, margin: int) -> int | None:
    if escrow.deadline is None:
        return None
    return escrow.deadline - max(settle.before_deadline, margin)


def _interval_at(settle: Settle, standing: Standing) -> int:
    """An interval runs from the oldest unsettled usage: a first event is not paid alone."""
    assert settle.interval is not None
    return standing.unsettled_since + settle.interval
