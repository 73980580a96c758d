"""What is due: at which moment an agreement's unsettled usage asks to be released, and why.

Pure looks at facts; nothing here decides an amount (that is `settlement.Escrow.payable`) or whether
a call may be made (that is `settlement.step`).
"""

from __future__ import annotations

from dataclasses import dataclass

from meterd.core.plans import Settle
from meterd.core.settlement import Escrow, EscrowStatus


@dataclass(frozen=True, slots=True)
class Standing:
    """What the thresholds look at, besides the escrow: micros, nanos of units, and wall ms."""

    owed: int
    units: int
    unsettled_since: int  # 0: nothing is unsettled.


def due(settle: Settle, escrow: Escrow, standing: Standing, wall: int, margin: int) -> str:
    """Name the threshold that asks for a release at `wall`; "" when none does.

    `margin` is how long, in ms, a doubt may take to be resolved: what is due before the deadline is
    due that much earlier.
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
