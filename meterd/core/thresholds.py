"""What is due: at which moment an agreement's unsettled usage asks to be released, and why.

Pure looks at facts; nothing here decides an amount (that is `settlement.Escrow.payable`) or whether
a call may be made (that is `settlement.step`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from meterd.core.money import format_amount
from meterd.core.plans import Settle
from meterd.core.settlement import Escrow, EscrowStatus

# How long usage may go on between the decision to release and the money's arrival, besides the
# pace between two calls: the intention's commit, the reading before it, and the call.
REACTION_MS = 5_000
# Bursts are measured over this time, the reaction and the usual pace between two calls, which is
# cut into parts. Wherever such a time begins, it touches one part more.
WINDOW_MS = REACTION_MS + 2_000
PART_MS = WINDOW_MS // 4
TOUCHED = 5
# From so many windows with usage on, the largest of them says what to expect of the next one.
WINDOWS_ENOUGH = 100


@dataclass(slots=True)
class Bursts:
    """The most that an agreement has earned within a window of time, in micros.

    Whatever is earned within any `WINDOW_MS` lies in five parts running, so it is at most `peak`.
    It lives for one process: after a restart nothing is known, and the reserve is the largest.
    """

    level: int = 0  # What was owed at the last look.
    earned: int = 0  # In the last parts, which are (number, micros), oldest first.
    parts: deque[tuple[int, int]] = field(default_factory=deque)
    peak: int = 0
    seen: int = 0  # How many windows had usage.

    def note(self, owed: int, wall: int) -> None:
        """Look at what is owed behind some usage, at a moment in wall ms."""
        grown, self.level = owed - self.level, owed
        if grown <= 0:
            return
        part, parts = wall // PART_MS, self.parts
        last, sofar = parts.pop() if parts else (-TOUCHED, 0)
        if part > last:
            self.seen += part // (TOUCHED - 1) != last // (TOUCHED - 1)
            parts.append((last, sofar))
            last, sofar = part, 0
        parts.append((last, sofar + grown))  # A clock that went back adds to the last one.
        self.earned += grown
        while parts[0][0] <= last - TOUCHED:
            self.earned -= parts.popleft()[1]
        self.peak = max(self.peak, self.earned)

    def expected(self, pace: int) -> int | None:
        """The most to expect while a release waits `pace` ms and is paid; None: too little known.

        In micros.
        """
        if self.seen < WINDOWS_ENOUGH:
            return None
        touched = -(-(REACTION_MS + pace) // PART_MS) + 1
        return self.peak * -(-touched // TOUCHED)


@dataclass(frozen=True, slots=True)
class Standing:
    """What the thresholds look at, besides the escrow: micros, nanos of units, and wall ms."""

    owed: int
    units: int
    unsettled_since: int  # 0: nothing is unsettled.
    bursts: Bursts | None = None  # Where a bound on the exposure asks for it.


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
    while a release is on its way is exposure too, so a reserve is kept for it, and a release is
    asked for when the unsettled usage leaves no more than that. All in micros and ms.

    The mean rate says nothing about the burst that comes next: calm usage near the bound, then a
    burst, would pass it. So the reserve is the most that was ever earned in such a time, see
    `Bursts`, and half of the bound as long as too little is known. Then the exposure stays under
    the bound

    - always, until enough is known, if no time of reaction and pace earns half of the bound;
    - afterwards, if none earns more than the reserve: a tenth of the bound, or what an earlier
      one has earned, whichever is more.

    The reserve is never above half of the bound, so a fixed amount of that half, which is what the
    same promise needs without a memory, makes at least as many calls.
    """
    kept = reserve(bound, standing.bursts, pace)
    if unsettled < max(bound - kept, 1):
        return ""
    elapsed = max(1, wall - standing.unsettled_since)
    each_hour = format_amount(unsettled * 3_600_000 // elapsed)
    return (
        f"adaptive: {format_amount(unsettled)} of {format_amount(bound)} at {each_hour} an hour,"
        f" {format_amount(kept)} kept for a burst"
    )


def reserve(bound: int, bursts: Bursts | None, pace: int) -> int:
    """How much of a bound is kept for what is earned while a release is on its way, micros.

    Rounded up, but never above half of the bound.
    """
    expected = None if bursts is None else bursts.expected(pace)
    if expected is None:
        return bound // 2
    return min(max(expected, -(-bound // 10)), bound // 2)


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
