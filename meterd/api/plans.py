"""`GET /v1/plans`: the prices and thresholds that this daemon runs with, as loaded."""

from __future__ import annotations

from aiohttp import web

from meterd.api.parts import Parts
from meterd.api.settings import Scope
from meterd.api.views import plan_view
from meterd.api.wire import Call, page_answer, read_page


class Plans:
    """The room of `/v1/plans`."""

    def __init__(self, parts: Parts) -> None:
        self._ledger = parts.bookkeeper.ledger

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [Call("GET", "/v1/plans", Scope.READ, self._list)]

    async def _list(self, request: web.Request) -> web.Response:
        page = read_page(request)
        names = [name for name in sorted(self._ledger.plans) if name > page.cursor]
        shown = names[: page.limit]
        views = [plan_view(self._ledger.plans[name]) for name in shown]
        return page_answer(views, shown[-1] if len(names) > page.limit else None)
