"""The room of `/mcp`: what an agent may look at and do, as tools of the Model Context Protocol.

The rule kept here: a tool does what a call of the API does, behind the same guard, and says the
same sentences. Looking takes the scope `read`, without which nobody comes in; what changes
something takes `admin` as well, asked for at each call. No tool reaches the escrow service past the
ledger: an agent may have meterd settle what usage has earned, and no tool releases more than that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from meterd.api.agent_tools import (
    CHANGING,
    INSTRUCTIONS,
    TEXTS,
    Create,
    Listed,
    Nothing,
    One,
    QuoteOf,
    Release,
    UsageOf,
)
from meterd.api.agreements import Agreements
from meterd.api.auth import ACTOR, SCOPES, scope_missing
from meterd.api.openings import Openings, Order
from meterd.api.overview import balance
from meterd.api.parts import Parts
from meterd.api.plans import QUOTE_EXAMPLE, Plans, Question
from meterd.api.problems import Problem, sentence
from meterd.api.settings import Scope
from meterd.api.status import Status
from meterd.api.views import Document, release_view
from meterd.api.wire import Call, Page, is_id, read_reason
from meterd.core.money import BadNumber, format_amount, parse_amount
from meterd.errors import NotFound, Refused
from meterd.logs import get_logger
from meterd.mcp import asgi
from meterd.mcp.door import BODY_BYTES_MAX, PATH, Door, NotInstalled
from meterd.mcp.tools import Tool

log = get_logger(__name__)

RELEASES_SHOWN = 10
OPENINGS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as the guard has found it."""

    actor: str
    scopes: frozenset[Scope]


class Agents:
    """The room of `/mcp`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger = parts.bookkeeper.ledger
        self._agreements = Agreements(parts)
        self._openings = Openings(parts)
        self._plans = Plans(parts)
        self._status = Status(parts)
        self._door = Door("meterd", parts.version, INSTRUCTIONS, self._tools(), self._explain)

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [Call("POST", PATH, Scope.READ, self._answer)]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if not asgi.is_json(request):
            raise Problem(415, "content-type", "send the message as Content-Type: application/json")
        caller = Caller(request[ACTOR], request[SCOPES])
        try:
            return await self._door.answer(request, caller)
        except NotInstalled as error:
            raise Problem(501, "not-installed", str(error)) from None
        except web.HTTPRequestEntityTooLarge:
            detail = f"at most {BODY_BYTES_MAX} bytes here"
            raise Problem(413, "body-too-large", detail) from None
        except (web.RequestPayloadError, ConnectionError):
            raise
        except Exception as error:
            # No tool is behind it, see `Door.answer`: nothing is ahead of the disk.
            log.error("The protocol of /mcp failed.", action="mcp_failed", exc_info=error)
            raise Problem(500, "internal", "meterd made a mistake; its log says which") from None

    def _explain(self, error: Exception, tool: Tool[Any]) -> str:
        """Say why a tool failed; a mistake of meterd's own ends the process, as in every call."""
        return sentence(error, self._parts.fatal, f"{PATH} {tool.name}", changes=tool.changes)

    # -- Escrows -----------------------------------------------------------------------------------

    async def _create(self, caller: Caller, asked: Create) -> Document:
        _needs_admin(caller)
        order = Order(
            plan=asked.plan,
            id=asked.id,
            payer=asked.payer,
            provider=asked.provider,
            deposit=asked.deposit,
        )
        known = asked.id in self._ledger.accounts
        repeated = known or bool(self._openings.waiting(asked.id))
        document, status = await self._openings.open(order, caller.actor)
        if status == 202:
            said = "nobody knows yet whether it is locked: ask escrow_status, with this id"
        else:
            said = "it was there before; nothing was locked" if known else "it is locked"
        return {"repeated": repeated, "said": said, **document}

    async def _release(self, caller: Caller, asked: Release) -> Document:
        """Settle what usage has earned, as `POST /v1/agreements/{id}/settle`.

        An amount is a condition and no order: it is compared with what is unsettled. Asked again
        with the same amount, what was paid meanwhile is no more unsettled, and nothing is paid.
        """
        _needs_admin(caller)
        if (asked.amount is not None) == asked.everything_accrued:
            detail = 'give exactly one of amount, such as "0.50", and everything_accrued: true'
            raise Problem(400, "bad-body", detail)
        account = self._agreements.find(_id(asked.id))
        if asked.amount is not None:
            wanted, unsettled = _amount(asked.amount), balance(self._ledger, account).unsettled
            if wanted != unsettled:
                raise Refused(
                    f"{format_amount(unsettled)} USDC is unsettled, not {format_amount(wanted)}:"
                    " nothing was done. meterd releases what usage has earned, no more and no less:"
                    " name that amount, or everything_accrued: true"
                )
        reason = read_reason(asked.reason, needed=False)
        await self._agreements.settle(account, caller.actor, reason)
        said = "what is unsettled is being released; escrow_status shows what came of it"
        return {"said": said, **self._agreements.view(account)}

    async def _show(self, _: Caller, asked: One) -> Document:
        name = _id(asked.id)
        account = self._ledger.account(name)
        waiting = self._openings.waiting(name if account is None else account.agreement.id)
        if account is None:
            if not waiting:
                raise NotFound(f"there is no agreement {name}; list them: escrow_list")
            return {"id": name, "state": "opening", "openings": waiting}
        own = account.agreement.id
        store = self._parts.bookkeeper.store
        releases = await store.releases(agreement=own, limit=RELEASES_SHOWN)
        return {
            **self._agreements.view(account),
            "openings": waiting,
            "releases": [release_view(release, own) for release in releases],
        }

    async def _list(self, _: Caller, asked: Listed) -> Document:
        for name in ("state", "plan"):
            text = getattr(asked, name)
            if text is not None:
                _id(text, name)
        page = _page(asked.limit, asked.cursor)
        items, following = await self._agreements.page(page, asked.state, asked.plan)
        rows = self._parts.opener.unfinished
        opening = [] if asked.cursor else [row.agreement for row in rows[:OPENINGS_SHOWN]]
        return {"items": items, "next": following, "opening": opening}

    # -- Meters ------------------------------------------------------------------------------------

    async def _meter_status(self, _: Caller, __: Nothing) -> Document:
        return await self._status.document()

    async def _usage(self, _: Caller, asked: UsageOf) -> Document:
        account = self._agreements.find(_id(asked.id))
        items, following = self._agreements.usage(account, _page(asked.limit, asked.cursor))
        shown = self._agreements.view(account)
        kept = {name: shown[name] for name in ("id", "plan", "events", "accrued", "period")}
        return {**kept, "items": items, "next": following}

    async def _quote(self, _: Caller, asked: QuoteOf) -> Document:
        try:
            question = msgspec.convert(msgspec.to_builtins(asked), Question)
        except msgspec.ValidationError:
            detail = 'at: a time with its zone, such as "2026-11-23T12:00:00Z"'
            raise Problem(400, "bad-body", detail) from None
        return self._plans.quote(question)

    def _tools(self) -> list[Tool[Caller]]:
        """Make the tools out of their texts."""
        plan = '{"id": "customer-1", "plan": "stream"}'
        everything = '{"id": "customer-1", "everything_accrued": true}'
        one = '{"id": "customer-1"}'
        return [
            _tool("escrow_create", Create, plan, self._create),
            _tool("escrow_release", Release, everything, self._release),
            _tool("escrow_status", One, one, self._show),
            _tool("escrow_list", Listed, '{"limit": 20}', self._list),
            _tool("meter_status", Nothing, "{}", self._meter_status),
            _tool("meter_usage", UsageOf, one, self._usage),
            _tool("meter_quote", QuoteOf, QUOTE_EXAMPLE, self._quote),
        ]


def _tool(
    name: str,
    takes: type[msgspec.Struct],
    example: str,
    answer: Callable[[Caller, Any], Awaitable[Document]],
) -> Tool[Caller]:
    title, text = TEXTS[name]
    return Tool(name, title, text, takes, example, answer, changes=name in CHANGING)


def _needs_admin(caller: Caller) -> None:
    if Scope.ADMIN not in caller.scopes:
        raise scope_missing(Scope.ADMIN)


def _id(text: str, name: str = "id") -> str:
    if not is_id(text):
        raise Problem(400, "bad-id", f"{name}: 1 to 128 letters, digits, _ . : or -")
    return text


def _page(limit: int, cursor: str) -> Page:
    if cursor and not is_id(cursor):
        raise Problem(400, "bad-query", "cursor: give back the next of the page before")
    return Page(limit, cursor)


def _amount(text: str) -> int:
    try:
        amount = parse_amount(text)
    except BadNumber as error:
        raise Problem(400, "bad-body", f"amount: {error}") from None
    if amount <= 0:
        raise Problem(400, "bad-body", 'amount: more than 0, such as "0.50"')
    return amount
