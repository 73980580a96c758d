"""`/healthz`, `/readyz`, `/metrics`: what supervisors and scrapers ask, free of secrets.

Alive: the loop runs. Ready: the store takes commits and every source is connected. An escrow
service that is away makes meterd owe longer, not less ready: usage is still taken.
"""

from __future__ import annotations

from aiohttp import hdrs, web

from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.wire import Call, json_answer


class Health:
    """The room of the three."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [
            Call("GET", "/healthz", None, self._alive),
            Call("GET", "/readyz", None, self._ready),
            Call("GET", "/metrics", None, self._metrics),
        ]

    async def _alive(self, _: web.Request) -> web.Response:
        return json_answer({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.Response:
        reasons = self._reasons()
        degraded = self._parts.settler.blocked()
        if reasons:
            members = {"reasons": reasons, "degraded": degraded}
            raise Problem(503, "not-ready", "; ".join(reasons), members=members)
        return json_answer({"status": "ready", "degraded": degraded})

    def _reasons(self) -> list[str]:
        writable = self._parts.bookkeeper.store.writable
        reasons = [] if writable else ["the store takes no commits: the disk is full"]
        reasons += [
            f"source {state.name} is not connected"
            for state in self._parts.intake.states.values()
            if not state.connected
        ]
        return reasons

    async def _metrics(self, request: web.Request) -> web.Response:
        """Answer with every series; the sums over all agreements are at most some seconds old."""
        await self._parts.overview.refresh()
        accept = request.headers.get(hdrs.ACCEPT, "")
        body, content_type = self._parts.instruments.exposition(accept)
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})
