"""`GET /v1/journal`: who did what to the money, when and why, the newest first.

The journal is only ever added to and its entries are chained; `meterd verify` follows the chain.
Reasons and names of persons stand in it, therefore it takes the scope of those who act.
"""

from __future__ import annotations

from aiohttp import web

from meterd.api.parts import Parts
from meterd.api.settings import Scope
from meterd.api.views import journal_view
from meterd.api.wire import Call, page_answer, read_page


class Journal:
    """The room of `/v1/journal`."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.bookkeeper.store

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [Call("GET", "/v1/journal", Scope.ADMIN, self._list)]

    async def _list(self, request: web.Request) -> web.Response:
        page = read_page(request)
        found = await self._store.journal(limit=page.limit, before=page.number or None)
        # Numbers have no gaps: behind number 1 there is nothing.
        last = found[-1].number if found else 1
        following = str(last) if len(found) == page.limit and last > 1 else None
        return page_answer([journal_view(entry) for entry in found], following)
