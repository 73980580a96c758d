"""`GET /v1/status`: is money flowing, how much is at risk, what should a person do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from meterd.api.overview import Attention, Figures
from meterd.api.parts import Parts
from meterd.api.settings import Scope
from meterd.api.views import Document, source_view
from meterd.api.wire import Call, iso_time, json_answer
from meterd.core import advice
from meterd.core.money import format_amount, format_exact
from meterd.core.settlement import EscrowStatus, ReleaseStatus


class Status:
    """The room of `/v1/status`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._stored_release_at: int | None = (
            None  # The last one before this start; None: not asked yet.
        )

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [Call("GET", "/v1/status", Scope.READ, self._get)]

    async def _get(self, _: web.Request) -> web.Response:
        return json_answer(await self.document())

    async def document(self) -> Document:
        """Say it all, as it is now."""
        parts = self._parts
        figures = await parts.overview.refresh()
        released_at = await self._released_at()
        now = parts.bookkeeper.clock.wall()
        instruments, store = parts.instruments, parts.bookkeeper.store
        blocked = self._blocked()
        return {
            "version": parts.version,
            "now": iso_time(now),
            "started_at": iso_time(parts.started_at),
            "flow": {
                "word": self._word(figures),
                "blocked": blocked,
                "next": advice.against(blocked),
                "last_event_at": iso_time(instruments.last_event_at),
                "last_release_at": iso_time(released_at),
                "settlement_lag_s": figures.lag_ms // 1000,
            },
            "needs_a_person": self._needs_a_person(figures, blocked),
            "totals": _totals(figures),
            "events": {
                "accepted": instruments.accepted,
                "duplicates": instruments.duplicates,
                "rejected": instruments.rejected,
                "pending": parts.bookkeeper.pending,
            },
            "agreements": {"total": figures.agreements, "by_state": figures.states},
            "releases_in_doubt": figures.releases_in_doubt,
            "releases_escalated": figures.releases_escalated,
            "frozen": _attention(figures.frozen),
            "in_doubt": _attention(figures.doubtful),
            "exhausted": _attention(figures.exhausted),
            "paused": _attention(figures.paused),
            "sources": [source_view(state) for state in parts.intake.states.values()],
            "store": {"writable": store.writable, "bytes": parts.store_bytes()},
            "dead_letters": parts.bookkeeper.dead_letters,
            "missing_events": parts.bookkeeper.sequences.missing,
            "incomplete_producers": parts.bookkeeper.sequences.incomplete,
        }

    def _blocked(self) -> str:
        """Why nothing is released anywhere; a full disk is the first of the reasons."""
        full = not self._parts.bookkeeper.store.writable
        return advice.DISK_FULL if full else self._parts.settler.blocked()

    def _needs_a_person(self, figures: Figures, blocked: str) -> bool:
        """Whether something waits for somebody to act, and not only for time to pass."""
        frozen = figures.states.get(EscrowStatus.FROZEN.value, 0)
        return bool(frozen or figures.exhausted or blocked in advice.FOR_A_PERSON)

    def _word(self, figures: Figures) -> str:
        """Say in a word how money flows, the worst first."""
        states = self._parts.intake.states.values()
        if not self._parts.bookkeeper.store.writable:
            return "stopped"
        if self._parts.settler.blocked():
            return "blocked"
        if figures.states.get(EscrowStatus.FROZEN.value) or figures.exhausted:
            return "needs_a_person"
        if not all(state.connected for state in states):
            return "waiting_for_sources"
        return "flowing" if figures.accrued else "idle"

    async def _released_at(self) -> int:
        """When the last release was confirmed, wall ms; 0: never."""
        if self._stored_release_at is None:
            confirmed = await self._parts.bookkeeper.store.releases(
                status=ReleaseStatus.CONFIRMED.value, limit=1
            )
            self._stored_release_at = confirmed[0].history[-1][0] if confirmed else 0
        return max(self._stored_release_at, self._parts.instruments.last_release_at)


def _totals(figures: Figures) -> dict[str, Any]:
    return {
        "accrued": format_exact(figures.accrued),
        "released": format_amount(figures.released),
        "unsettled": format_amount(figures.unsettled),
        "headroom": format_amount(figures.headroom),
        "in_doubt": format_amount(figures.in_doubt),
        "uncollectible": format_amount(figures.uncollectible),
        "reconciliation_difference": format_amount(figures.difference),
    }


def _attention(items: Sequence[Attention]) -> list[dict[str, Any]]:
    return [
        {
            "agreement": item.agreement,
            "escrow": item.escrow,
            "state": item.state,
            "reason": item.reason,
            "amount": format_amount(item.amount),
            "next": item.next,
        }
        for item in items
    ]
