"""Releases of all agreements, newest first, and a person's word on one that is in doubt."""

from __future__ import annotations

import msgspec
from aiohttp import web

from meterd.api.auth import ACTOR
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.views import agreement_of, agreement_view, release_view
from meterd.api.wire import (
    Call,
    json_answer,
    page_answer,
    read_command,
    read_filter,
    read_id,
    read_page,
    read_reason,
)
from meterd.core.settlement import Escrow, ReleaseStatus
from meterd.errors import NotFound

EXAMPLE = '{"landed": true, "reason": "seen in the service\'s own history"}'


class Resolution(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/releases/{id}/resolve`."""

    landed: bool
    reason: str = ""


class Releases:
    """The room of `/v1/releases`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bookkeeper = parts.bookkeeper
        self._ledger = parts.bookkeeper.ledger

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [
            Call("GET", "/v1/releases", Scope.READ, self._list),
            Call("POST", "/v1/releases/{id}/resolve", Scope.ADMIN, self._resolve),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        page = read_page(request)
        status = read_filter(request, "status")
        if status is not None and status not in tuple(ReleaseStatus):
            raise Problem(400, "bad-query", f"status: one of {', '.join(ReleaseStatus)}")
        releases = await self._bookkeeper.store.releases(
            escrow=read_filter(request, "escrow"),
            agreement=read_filter(request, "agreement"),
            status=status,
            limit=page.limit + 1,
            before=page.cursor or None,
        )
        shown = releases[: page.limit]
        escrows = self._ledger.escrows
        views = [release_view(release, agreement_of(escrows, release)) for release in shown]
        return page_answer(views, shown[-1].id if len(releases) > page.limit else None)

    async def _resolve(self, request: web.Request) -> web.Response:
        release_id = read_id(request)
        resolution = await read_command(request, Resolution, example=EXAMPLE)
        reason = read_reason(resolution.reason)
        escrow = self._escrow_of(release_id)
        await self._bookkeeper.resolve(escrow.id, request[ACTOR], reason, landed=resolution.landed)
        return json_answer(agreement_view(self._parts, self._ledger.accounts[escrow.agreement]))

    def _escrow_of(self, release_id: str) -> Escrow:
        """Find the escrow whose open release this is. Raises `NotFound`."""
        for escrow in self._ledger.escrows.values():
            if escrow.release is not None and escrow.release.id == release_id:
                return escrow
        raise NotFound(f"no open release is named {release_id}; list them: meterd releases")
