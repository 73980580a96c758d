"""The gate and its holds: may this call be served, and what is set aside while it is.

The rule kept here: an answer is given from memory at once; with a hold it is given when the hold is
on the disk. A refusal is an answer and no error of the caller, but it has a status of its own (402)
so that the simplest of proxies can act on it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from meterd.api import subrequest
from meterd.api.idempotency import hold_id_of, read_key, used_otherwise
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.wire import (
    Call,
    iso_time,
    json_answer,
    page_answer,
    read_command,
    read_id,
    read_page,
)
from meterd.core.accounts import Account
from meterd.core.changes import Hold
from meterd.core.events import DIMENSIONS_MAX, NAME_CHARS_MAX, quantity_nanos
from meterd.core.holds import Ask, Verdict
from meterd.core.money import BadNumber, format_amount, format_quantity
from meterd.errors import NotFound

HOLD_SECONDS_MAX = 86_400
ASK_EXAMPLE = '{"agreement": "customer-1", "meter": "tokens", "quantity": 1500, "hold": 60}'
CAPTURE_EXAMPLE = '{"quantity": "1312"}'


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/authorize`. `hold`: seconds to set the price aside; none: no hold."""

    agreement: str
    meter: str
    quantity: int | str = 1
    dimensions: dict[str, str] = {}
    hold: int | None = None


class Capture(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a capture: what was really used; left out, what was asked for."""

    quantity: int | str | None = None


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a call that wants none."""


class Gate:
    """The room of `/v1/authorize` and `/v1/holds`."""

    def __init__(self, parts: Parts) -> None:
        self._bookkeeper = parts.bookkeeper
        self._intake = parts.intake

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [
            Call("POST", "/v1/authorize", Scope.GATE, self._authorize),
            Call("GET", "/v1/authorize", Scope.GATE, self._authorize_for_a_proxy),
            Call("GET", "/v1/holds", Scope.READ, self._list),
            Call("POST", "/v1/holds/{id}/capture", Scope.GATE, self._capture),
            Call("POST", "/v1/holds/{id}/void", Scope.GATE, self._void),
        ]

    async def _authorize(self, request: web.Request) -> web.Response:
        asked = await read_command(request, Asked, example=ASK_EXAMPLE)
        account = self._account(asked.agreement)
        if asked.hold is not None and not 0 < asked.hold <= HOLD_SECONDS_MAX:
            raise Problem(400, "bad-body", f"hold: 1 to {HOLD_SECONDS_MAX} seconds")
        ask, key = _ask(asked), read_key(request)
        if asked.hold is None:  # Nothing changes: a key has nothing to keep.
            verdict, hold = await self._bookkeeper.authorize(account, ask)
        else:
            hold_id = None if key is None else hold_id_of(request, key)
            verdict, hold = await self._set_aside(account, ask, asked.hold * 1000, hold_id)
        return json_answer(_answer(verdict, hold), 200 if verdict.allowed else 402)

    async def _authorize_for_a_proxy(self, request: web.Request) -> web.Response:
        """Answer as proxies understand it; nothing is set aside."""
        asked = Asked(**subrequest.question(request))
        if not asked.agreement:
            return subrequest.refusal(subrequest.NO_AGREEMENT)
        account = self._bookkeeper.ledger.account(asked.agreement)
        if account is None:
            return subrequest.refusal(subrequest.UNKNOWN_AGREEMENT)
        verdict, _ = await self._bookkeeper.authorize(account, _ask(asked))
        return subrequest.verdict(_answer(verdict, None))

    async def _set_aside(
        self, account: Account, ask: Ask, hold_ms: int, hold_id: str | None
    ) -> tuple[Verdict, Hold | None]:
        """Make a hold; asked for again with the same key, it is the same one.

        Its id is made of the key, so that a crash in between makes no second one.
        """
        books = self._bookkeeper
        known = None if hold_id is None else books.live_hold(hold_id)
        if known is not None:
            if not _is_for(known, account, ask, hold_ms):
                raise used_otherwise()
            return await books.authorized(account, known), known
        if hold_id is not None and books.was_captured(hold_id):
            raise Problem(409, "hold-ended", f"hold {hold_id} was captured; take a new key")
        return await books.authorize(account, ask, hold_ms=hold_ms, hold_id=hold_id)

    async def _capture(self, request: web.Request) -> web.Response:
        """Turn a hold into usage. Once more with the same quantity it is a duplicate."""
        hold_id = read_id(request)
        capture = await read_command(request, Capture, example=CAPTURE_EXAMPLE)
        hold = self._bookkeeper.holds.get(hold_id)
        if hold is None:
            if self._bookkeeper.was_captured(hold_id):
                return json_answer({"accepted": 0, "duplicates": 1, "rejected": []})
            raise _gone(hold_id)
        nanos = hold.quantity if capture.quantity is None else _nanos(capture.quantity)
        recorded = await self._intake.capture(hold, format_quantity(nanos))
        rejected = [
            {"id": one.id, "reason": one.reason.value, "detail": one.detail}
            for one in recorded.rejections
        ]
        counts = {"accepted": recorded.accepted, "duplicates": recorded.duplicates}
        return json_answer({**counts, "rejected": rejected})

    async def _void(self, request: web.Request) -> web.Response:
        hold_id = read_id(request)
        await read_command(request, Nothing, example="{}")
        hold = self._bookkeeper.holds.get(hold_id)
        if hold is None:
            raise _gone(hold_id)
        await self._bookkeeper.void_hold(hold)
        return json_answer(hold_view(hold))

    async def _list(self, request: web.Request) -> web.Response:
        page = read_page(request)
        holds = sorted((hold for hold in self._bookkeeper.holds if hold.id > page.cursor), key=_id)
        shown = holds[: page.limit]
        following = shown[-1].id if len(holds) > page.limit else None
        return page_answer([hold_view(hold) for hold in shown], following)

    def _account(self, name: str) -> Account:
        account = self._bookkeeper.ledger.account(name)
        if account is None:
            raise NotFound("there is no such agreement; list them: meterd agreements")
        return account


def hold_view(hold: Hold) -> dict[str, Any]:
    """Show a hold."""
    return {
        "id": hold.id,
        "agreement": hold.agreement,
        "meter": hold.meter,
        "dimensions": dict(hold.dimensions),
        "quantity": format_quantity(hold.quantity),
        "amount": format_amount(hold.amount),
        "created_at": iso_time(hold.created_at),
        "expires_at": iso_time(hold.expires_at),
    }


def _id(hold: Hold) -> str:
    return hold.id


def _gone(hold_id: str) -> NotFound:
    return NotFound(f"hold {hold_id} is not live: voided, expired or unknown; send a usage event")


def _ask(asked: Asked) -> Ask:
    names = (*asked.dimensions, *asked.dimensions.values())
    flawed = any(len(name) > NAME_CHARS_MAX or not name.isprintable() for name in names)
    if len(asked.dimensions) > DIMENSIONS_MAX or flawed:
        detail = f"at most {DIMENSIONS_MAX} dimensions of {NAME_CHARS_MAX} printable characters"
        raise Problem(400, "bad-body", detail)
    return Ask(asked.meter, _nanos(asked.quantity), asked.dimensions)


def _is_for(hold: Hold, account: Account, ask: Ask, hold_ms: int) -> bool:
    """Whether a hold was made by this very request."""
    dimensions = tuple(sorted(ask.dimensions.items()))
    wanted = account.agreement.id, ask.meter, ask.quantity, dimensions, hold_ms
    lasts = hold.expires_at - hold.created_at
    return wanted == (hold.agreement, hold.meter, hold.quantity, hold.dimensions, lasts)


def _nanos(quantity: int | str) -> int:
    try:
        return quantity_nanos(quantity)
    except BadNumber as error:
        raise Problem(400, "bad-body", f"quantity: {error}") from None


def _answer(verdict: Verdict, hold: Hold | None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "allowed": verdict.allowed,
        "headroom": None if verdict.headroom is None else format_amount(verdict.headroom),
        "needed": format_amount(verdict.needed),
    }
    if verdict.reason:
        answer["reason"] = verdict.reason
    if not verdict.allowed and verdict.headroom is not None:
        answer["missing"] = format_amount(max(0, verdict.needed - verdict.headroom))
    if hold is not None:
        answer["hold"] = hold.id
        answer["expires_at"] = iso_time(hold.expires_at)
    return answer
