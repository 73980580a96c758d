"""What readers are shown: the present, or a state of the past where a fault asks for it.

The rule kept here: only states that once were true are shown, so a stale reading is old but never
wrong in itself.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from meterd.sandbox.faults import Rule

PAST_MAX = 16  # Older states kept of each thing while nobody asked for stale readings.
PAST_MAX_WANTED = 4096  # While somebody did.

T = TypeVar("T")


class Views(Generic[T]):
    """The views of things of one sort, by name: escrows by their id, wallets by their agent."""

    def __init__(self) -> None:
        self._past: dict[str, deque[tuple[int, T]]] = {}  # (until when, the state), oldest first.
        self._lags: dict[str, tuple[int, T]] = {}  # (until when, the state that is shown).

    def keep(self, name: str, before: T, until_ms: int, *, wanted: bool) -> None:
        """Remember a state that ends now; many of them where stale readings are `wanted`."""
        past = self._past.setdefault(name, deque())
        past.append((until_ms, before))
        while len(past) > (PAST_MAX_WANTED if wanted else PAST_MAX):
            past.popleft()

    def hide(self, name: str, before: T, until_ms: int) -> None:
        """Show this state for a while, whatever happens."""
        self._lags[name] = (until_ms, before)

    def hide_nothing(self) -> None:
        """Show everything as it stands again."""
        self._lags.clear()

    def shown(self, name: str, present: T, view: Rule | None, now_ms: int) -> T:
        """The state that a reading gets."""
        lag_until_ms, lagging = self._lags.get(name, (0, present))
        if now_ms < lag_until_ms:
            return lagging
        past = self._past.get(name)
        if view is None or not past:
            return present
        if view.kind == "backwards_read":
            return past[-1][1]
        wanted_ms = now_ms - view.ms("seconds")
        return next((state for until_ms, state in past if until_ms > wanted_ms), present)
