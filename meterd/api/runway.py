"""How long an agreement's headroom lasts at the pace of its latest usage.

The rule kept here: it costs the path of the events nothing. A point, the sum accrued at a moment,
is noted when somebody asks, at most one a minute, and two are kept. The pace is what was accrued
since the later one that is a minute old or older; of an agreement that was not asked for since the
daemon started, since it was opened.
"""

from __future__ import annotations

from fractions import Fraction

from meterd.core.accounts import Account
from meterd.core.money import MICROS

APART_MS = 60_000
SECONDS_MAX = 100 * 365 * 86_400  # Longer than that nobody looks ahead.

Point = tuple[int, Fraction]  # Wall ms, and what was accrued by then.


class Runways:
    """The two points of each agreement that was asked for."""

    def __init__(self) -> None:
        self._points: dict[str, tuple[Point, Point]] = {}

    def seconds(self, account: Account, headroom: int | None, now: int) -> int | None:
        """How long `headroom`, in micros, lasts; None: nothing is known, or nothing is used."""
        since, accrued = self._since(account, now)
        used = account.accrued - accrued
        if headroom is None or used <= 0 or now <= since:
            return None
        lasts = Fraction(max(0, headroom), MICROS) * (now - since) / (used * 1000)
        return min(int(lasts), SECONDS_MAX)

    def _since(self, account: Account, now: int) -> Point:
        """Find the point to measure from, and note where things stand."""
        name, here = account.agreement.id, (now, account.accrued)
        known = self._points.get(name)
        if known is None:
            older, newer = (account.opened_at, Fraction(0)), here
        else:
            older, newer = known
            if now - newer[0] >= APART_MS:
                older, newer = newer, here
        self._points[name] = older, newer
        return older
