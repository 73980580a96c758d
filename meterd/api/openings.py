"""Opening agreements: the escrows that a plan needs are locked, and bound as soon as they are.

`POST /v1/agreements` is safe to repeat where it names an id: what is known or under way is not
locked again. 202 says that nobody knows yet whether an escrow was locked; it is looked for, and
`GET /v1/openings` lists what is waited for.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from meterd.api.auth import ACTOR
from meterd.api.idempotency import BEGUN_BEFORE, agreement_id_of, read_key
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.views import Document, agreement_view
from meterd.api.wire import (
    Call,
    is_id,
    iso_time,
    json_answer,
    page_answer,
    printable,
    read_command,
    read_page,
)
from meterd.core.money import MICROS, BadNumber, format_amount, parse_amount
from meterd.core.openings import Opening, Wish

OPEN_EXAMPLE = '{"plan": "stream", "id": "customer-1"}'
TEXT_CHARS_MAX = 256
DEPOSIT_MAX = 1_000_000 * MICROS  # As in the configuration: more is a slip of the keyboard.


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/agreements`.

    `deposit` is what usage draws on; `next` locks the next escrow of a known agreement.
    """

    plan: str
    id: str = ""
    payer: str = ""
    provider: str = ""
    deposit: str | None = None
    next: bool = False


class Openings:
    """The room of what is being locked."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger = parts.bookkeeper.ledger
        self._opener = parts.opener

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [
            Call("POST", "/v1/agreements", Scope.ADMIN, self._open),
            Call("GET", "/v1/openings", Scope.READ, self._list),
        ]

    async def _open(self, request: web.Request) -> web.Response:
        order = await read_command(request, Order, example=OPEN_EXAMPLE)
        key = read_key(request)
        if key is not None:
            # Its work had begun before a crash: what it made is bound or found again.
            order.next = order.next and not request.get(BEGUN_BEFORE, False)
            order.id = order.id or agreement_id_of(request, key)
        return json_answer(*await self.open(order, request[ACTOR]))

    async def open(self, order: Order, actor: str) -> tuple[Document, int]:
        """Lock and bind: the agreement, or what is waited for, and the status of the answer.

        Raises `Problem`, and as the opener does.
        """
        wish = _wish(order)
        if wish.plan not in self._ledger.plans:
            plans = ", ".join(sorted(self._ledger.plans)) or "none"
            raise Problem(400, "unknown-plan", f"there is no such plan; known: {plans}")
        known = wish.agreement in self._ledger.accounts
        agreement = await self._opener.open(wish, actor)
        account = self._ledger.accounts.get(agreement)
        waiting = self.waiting(agreement)
        if account is None or (waiting and wish.next):
            return {"id": agreement, "state": "opening", "openings": waiting}, 202
        return agreement_view(self._parts, account), 200 if known and not wish.next else 201

    def waiting(self, agreement: str) -> list[Document]:
        """Show the openings of an agreement whose escrow nothing draws on yet."""
        rows = self._opener.unfinished
        return [opening_view(row) for row in rows if row.agreement == agreement]

    async def _list(self, request: web.Request) -> web.Response:
        page, rows = read_page(request), self._opener.unfinished
        end = page.number + page.limit
        views = [opening_view(row) for row in rows[page.number : end]]
        return page_answer(views, str(end) if end < len(rows) else None)


def opening_view(row: Opening) -> Document:
    """Show an opening whose escrow is not bound."""
    return {
        "id": row.id,
        "agreement": row.agreement,
        "plan": row.plan,
        "role": row.role,
        "amount": format_amount(row.amount),
        "provider": row.provider,
        "payer": row.payer,
        "memo": row.memo,
        "why": row.why,
        "status": row.status.value,
        "escrow": row.escrow or None,
        "detail": row.detail,
        "created_at": iso_time(row.created_at),
        "changed_at": iso_time(row.changed_at),
    }


def _wish(order: Order) -> Wish:
    """Read what is asked for. Raises `Problem`."""
    for name in ("id", "payer", "provider"):
        text = getattr(order, name)
        if len(text) > TEXT_CHARS_MAX or not text.isprintable():
            detail = f"{name}: at most {TEXT_CHARS_MAX} printable characters"
            raise Problem(400, "bad-body", detail)
    if order.id and not is_id(order.id):
        raise Problem(400, "bad-id", "an id has 1 to 128 letters, digits, _ . : or -")
    if order.next and not order.id:
        raise Problem(400, "bad-body", "next: name the agreement, id, whose next escrow it is")
    plan = printable(order.plan, 128)
    return Wish(plan, order.id, order.payer, order.provider, _deposit(order.deposit), order.next)


def _deposit(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        amount = parse_amount(text)
    except BadNumber as error:
        raise Problem(400, "bad-body", f"deposit: {error}") from None
    if not 0 < amount <= DEPOSIT_MAX:
        raise Problem(400, "bad-body", 'deposit: an amount above 0, such as "10.00"')
    return amount
