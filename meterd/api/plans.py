"""Plans as loaded, and what a given usage costs under one of them, with its working."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from aiohttp import web

from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.views import Document, plan_view, quote_view
from meterd.api.wire import Call, json_answer, page_answer, read_command, read_page
from meterd.core.events import quantity_nanos
from meterd.core.money import BadNumber, parse_price
from meterd.core.quotes import Unpriced, Use, quote

LINES_MAX = 1_000
QUOTE_EXAMPLE = '{"plan": "stream", "usage": [{"meter": "tokens", "quantity": 1500}]}'


class Used(msgspec.Struct, forbid_unknown_fields=True):
    """One line of the usage to be priced."""

    meter: str
    quantity: int | str = 1
    dimensions: dict[str, str] = {}
    price: str | None = None
    value: str = ""


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/quote`. `ended`: the period is over, so fee and minimums are due."""

    plan: str
    usage: Annotated[list[Used], msgspec.Meta(max_length=LINES_MAX)] = []
    at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    ended: bool = True


class Plans:
    """The room of `/v1/plans`."""

    def __init__(self, parts: Parts) -> None:
        self._ledger = parts.bookkeeper.ledger
        self._clock = parts.bookkeeper.clock

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [
            Call("GET", "/v1/plans", Scope.READ, self._list),
            Call("POST", "/v1/quote", Scope.READ, self._quote),
        ]

    async def _quote(self, request: web.Request) -> web.Response:
        """Price a usage of one period; nothing is counted."""
        return json_answer(self.quote(await read_command(request, Question, example=QUOTE_EXAMPLE)))

    def quote(self, asked: Question) -> Document:
        """Answer a question. Raises `Problem`."""
        plan = self._ledger.plans.get(asked.plan)
        if plan is None:
            known = ", ".join(sorted(self._ledger.plans)) or "none"
            raise Problem(400, "unknown-plan", f"there is no such plan; known: {known}")
        at = self._clock.wall() if asked.at is None else int(asked.at.timestamp() * 1000)
        usage = [_use(used) for used in asked.usage]
        try:
            quoted = quote(plan, self._ledger.meters, usage, at, ended=asked.ended)
        except Unpriced as error:
            raise Problem(400, "unpriced", str(error)) from None
        return quote_view(quoted)

    async def _list(self, request: web.Request) -> web.Response:
        page = read_page(request)
        names = [name for name in sorted(self._ledger.plans) if name > page.cursor]
        shown = names[: page.limit]
        views = [plan_view(self._ledger.plans[name]) for name in shown]
        return page_answer(views, shown[-1] if len(names) > page.limit else None)


def _use(used: Used) -> Use:
    try:
        quantity = quantity_nanos(used.quantity)
        price = None if used.price is None else parse_price(used.price)
    except BadNumber as error:
        raise Problem(400, "bad-body", f"{used.meter[:80]}: {error}") from None
    return Use(used.meter, quantity, used.dimensions, price, used.value)
