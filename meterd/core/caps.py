"""How much an agreement may accrue: in one event, a minute, a day and its life; and how fast.

The rule: what is over a cap is refused and kept, what is within it is taken, and the border is
exact. A minute and a day are UTC's, by the time of arrival: whoever could lie about the time of an
event could otherwise lie himself around a cap. What is taken back makes no room again, except in
the life of an agreement, which is what it has accrued.

Velocity refuses nothing: usage that comes faster is metered, and nothing of it is paid until a
person has looked. Its window begins with usage, ends after `window`, and begins anew when the
person lets the agreement go on; one that was passed ends by nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import msgspec

from meterd.core.money import MICROS

MINUTE_MS = 60_000
DAY_MS = 86_400_000
HOUR_MS = 3_600_000
PLAN = ""  # The windows of the plan itself; those of a producer have its name.


@dataclass(frozen=True, slots=True)
class Caps:
    """Limits in micros; None: no limit. `window` of the velocity in ms."""

    event: int | None = None
    minute: int | None = None
    day: int | None = None
    lifetime: int | None = None
    velocity: int | None = None
    window: int = HOUR_MS


NO_CAPS = Caps()


@dataclass(slots=True)
class Windows:
    """What was accrued under some caps, exact USDC, in the windows of now."""

    minute: int = 0  # Minutes since the epoch.
    in_minute: Fraction = Fraction(0)
    day: int = 0  # Days since the epoch.
    in_day: Fraction = Fraction(0)
    lifetime: Fraction = Fraction(0)
    since: int = 0  # When the velocity's window began, wall ms.
    in_window: Fraction = Fraction(0)

    def note(self, amount: Fraction, now: int, caps: Caps) -> None:
        """Add what a batch has accrued, at wall ms."""
        self.in_minute, self.in_day = self.of_minute(now) + amount, self.of_day(now) + amount
        self.minute, self.day = now // MINUTE_MS, now // DAY_MS
        self.lifetime += amount
        over = now - self.since >= caps.window or now < self.since
        if over and not self.is_racing(caps):
            self.since, self.in_window = now, Fraction(0)
        self.in_window += amount

    def of_minute(self, now: int) -> Fraction:
        """What was accrued in the minute of `now`, wall ms."""
        return self.in_minute if self.minute == now // MINUTE_MS else Fraction(0)

    def of_day(self, now: int) -> Fraction:
        """What was accrued in the day of `now`, wall ms."""
        return self.in_day if self.day == now // DAY_MS else Fraction(0)

    def is_racing(self, caps: Caps) -> bool:
        """Whether more was accrued in the velocity's window than may be paid unseen."""
        return caps.velocity is not None and self.in_window * MICROS > caps.velocity

    def begin(self, now: int) -> None:
        """Begin the velocity's window anew: a person has looked."""
        self.since, self.in_window = now, Fraction(0)


def windows_text(windows: Mapping[str, Windows]) -> str:
    """Write windows by their name as they are stored; "" for none."""
    if not windows:
        return ""
    rows = {
        name: [
            str(one.minute),
            str(one.in_minute),
            str(one.day),
            str(one.in_day),
            str(one.lifetime),
            str(one.since),
            str(one.in_window),
        ]
        for name, one in windows.items()
    }
    return msgspec.json.encode(rows).decode()


def windows_of(text: str) -> dict[str, Windows]:
    """Read what `windows_text` wrote."""
    if not text:
        return {}
    rows = msgspec.json.decode(text, type=dict[str, tuple[str, str, str, str, str, str, str]])
    return {
        name: Windows(
            int(minute),
            Fraction(in_minute),
            int(day),
            Fraction(in_day),
            Fraction(lifetime),
            int(since),
            Fraction(in_window),
        )
        for name, (minute, in_minute, day, in_day, lifetime, since, in_window) in rows.items()
    }
