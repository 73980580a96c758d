"""Producers that number their events: what is missing of each, and waiting for it no more.

A list of gaps has a limit like every other list; the lowest ones, which were missed first, stand in
it. A source may be any text, so it is never part of a path.
"""

from __future__ import annotations

from itertools import islice

import msgspec
from aiohttp import web

from meterd.api.auth import ACTOR
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.views import Document
from meterd.api.wire import (
    Call,
    iso_time,
    json_answer,
    page_answer,
    read_command,
    read_page,
    read_reason,
)
from meterd.core.sequences import Producer

RANGES_MAX = 20
WORDS = {"true": True, "false": False}
GIVE_UP_EXAMPLE = '{"source": "svc-a", "reason": "the broker lost its disk"}'


class GiveUp(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/producers/give-up`."""

    source: str
    reason: str = ""


class Numbers:
    """The room of `/v1/producers`."""

    def __init__(self, parts: Parts) -> None:
        self._bookkeeper = parts.bookkeeper

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [
            Call("GET", "/v1/producers", Scope.READ, self._list),
            Call("POST", "/v1/producers/give-up", Scope.ADMIN, self._give_up),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        page = read_page(request)
        producers = self._bookkeeper.sequences.producers()
        if _only_incomplete(request):
            producers = [producer for producer in producers if producer.missing]
        end = page.number + page.limit
        following = str(end) if end < len(producers) else None
        shown = producers[page.number : end]
        return page_answer([producer_view(producer) for producer in shown], following)

    async def _give_up(self, request: web.Request) -> web.Response:
        command = await read_command(request, GiveUp, example=GIVE_UP_EXAMPLE)
        reason = read_reason(command.reason)
        given_up = await self._bookkeeper.give_up(command.source, request[ACTOR], reason)
        return json_answer({"source": command.source, "given_up": given_up})


def producer_view(producer: Producer) -> Document:
    """Show a producer's run. Numbers are whole; `missing_ranges` are its lowest gaps."""
    return {
        "source": producer.source,
        "first": producer.firsts[0],
        "last": producer.last,
        "last_at": iso_time(producer.latest),
        "missing": producer.missing,
        "missing_ranges": [list(gap) for gap in islice(producer.gaps(), RANGES_MAX)],
        "missing_since": iso_time(producer.missing_since),
        "given_up": producer.given_up,
        "runs": producer.run,
        "exact": producer.exact,
    }


def _only_incomplete(request: web.Request) -> bool:
    text = request.query.get("missing", "false")
    if text not in WORDS:
        raise Problem(400, "bad-query", "missing: true or false")
    return WORDS[text]
