"""Agreements: what each owes and was paid, its usage and releases, and what a person may do to it.

Acts are durable when they are answered; 202 says that what was asked for has begun and is not done
yet. Acts that stop or restart payments want a reason, which is journalled with the name of the
token.
"""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from meterd.api.auth import ACTOR
from meterd.api.overview import balance, spokesman, state_word
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.views import Document, agreement_view, counter_view, receipt_view, release_view
from meterd.api.wire import (
    Call,
    Page,
    is_escrow_id,
    json_answer,
    page_answer,
    printable,
    read_command,
    read_filter,
    read_id,
    read_page,
    read_reason,
)
from meterd.core.accounts import Account, Agreement
from meterd.core.settlement import EscrowStatus
from meterd.errors import NotFound, Refused

LOOKED_AT_MAX = 500  # Agreements between two breaths of the loop, while a filter searches.
PAYER_CHARS_MAX = 256
ROLES = ("main", "base", "overage", "wallet")
BIND_EXAMPLE = '{"plan": "stream", "escrows": {"main": "esc_1"}}'
REASON_EXAMPLE = '{"reason": "checked with the payer"}'


class Binding(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `PUT /v1/agreements/{id}`.

    Without escrows, the agreement's id is its escrow's.
    """

    plan: str
    payer: str | None = None
    escrows: dict[str, str | list[str]] | None = None


class Why(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an act."""

    reason: str = ""


class Agreements:
    """The room of `/v1/agreements`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bookkeeper = parts.bookkeeper
        self._ledger = parts.bookkeeper.ledger
        self._overview = parts.overview

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        one = "/v1/agreements/{id}"
        return [
            Call("GET", "/v1/agreements", Scope.READ, self._list),
            Call("GET", one, Scope.READ, self._get),
            Call("GET", f"{one}/usage", Scope.READ, self._usage),
            Call("GET", f"{one}/releases", Scope.READ, self._releases),
            Call("GET", f"{one}/receipts", Scope.READ, self._receipts),
            Call("GET", "/v1/receipts/key", Scope.READ, self._key),
            Call("PUT", one, Scope.ADMIN, self._bind),
            Call("POST", f"{one}/settle", Scope.ADMIN, self._settle),
            Call("POST", f"{one}/close", Scope.ADMIN, self._close),
            Call("POST", f"{one}/freeze", Scope.ADMIN, self._freeze),
            Call("POST", f"{one}/resume", Scope.ADMIN, self._resume),
        ]

    # -- Looking -----------------------------------------------------------------------------------

    async def _list(self, request: web.Request) -> web.Response:
        state, plan = read_filter(request, "state"), read_filter(request, "plan")
        return page_answer(*await self.page(read_page(request), state, plan))

    async def page(
        self, page: Page, state: str | None, plan: str | None
    ) -> tuple[list[Document], str | None]:
        """Show a page of the agreements, and the next one's cursor."""
        found = await self._search(page, state, plan)
        shown = found[: page.limit]
        following = shown[-1].agreement.id if len(found) > page.limit else None
        return [self.view(account) for account in shown], following

    async def _search(self, page: Page, state: str | None, plan: str | None) -> list[Account]:
        """Find one agreement more than the page holds: it tells whether there is a next one."""
        found: list[Account] = []
        for place, name in enumerate(self._overview.ids_after(page.cursor)):
            account = self._ledger.accounts[name]
            wanted = plan is None or account.plan.name == plan
            if wanted and (state is None or self._word(account) == state):
                found.append(account)
                if len(found) > page.limit:
                    break
            if place % LOOKED_AT_MAX == LOOKED_AT_MAX - 1:
                await asyncio.sleep(0)
        return found

    async def _get(self, request: web.Request) -> web.Response:
        return self._shown(self._account(request))

    async def _usage(self, request: web.Request) -> web.Response:
        page = self.usage(self._account(request), read_page(request))
        return page_answer(*page)

    def usage(self, account: Account, page: Page) -> tuple[list[Document], str | None]:
        """Show a page of an agreement's counters, and the next one's cursor."""
        counters = [account.counters[key] for key in sorted(account.counters, key=_by_meter)]
        end = page.number + page.limit
        views = [counter_view(counter) for counter in counters[page.number : end]]
        return views, str(end) if end < len(counters) else None

    async def _releases(self, request: web.Request) -> web.Response:
        account, page = self._account(request), read_page(request)
        releases = await self._bookkeeper.store.releases(
            agreement=account.agreement.id,
            status=read_filter(request, "status"),
            limit=page.limit + 1,
            before=page.cursor or None,
        )
        shown = releases[: page.limit]
        views = [release_view(release, account.agreement.id) for release in shown]
        return page_answer(views, shown[-1].id if len(releases) > page.limit else None)

    async def _receipts(self, request: web.Request) -> web.Response:
        """List them oldest first: the order in which they are chained."""
        account, page = self._account(request), read_page(request)
        rows = await self._bookkeeper.store.receipts(
            account.agreement.id, limit=page.limit + 1, after=page.number
        )
        shown = rows[: page.limit]
        following = str(shown[-1].number) if len(rows) > page.limit else None
        return page_answer([receipt_view(row) for row in shown], following)

    async def _key(self, _: web.Request) -> web.Response:
        notary = self._bookkeeper.notary
        if notary is None:
            raise NotFound("this daemon makes no receipts")
        return json_answer({"algorithm": "Ed25519", "key": notary.public})

    # -- Acting ------------------------------------------------------------------------------------

    async def _bind(self, request: web.Request) -> web.Response:
        """Bind escrows to a plan.

        The same again changes nothing; another payer or plan is taken over.
        """
        name = read_id(request)
        binding = await read_command(request, Binding, example=BIND_EXAMPLE)
        known = self._ledger.accounts.get(name)
        agreement = _agreement(name, binding, known)
        if agreement.plan not in self._ledger.plans:
            plans = ", ".join(sorted(self._ledger.plans)) or "none"
            raise Problem(400, "unknown-plan", f"there is no such plan; known: {plans}")
        account = await self._bookkeeper.bind(agreement, request[ACTOR])
        status = 200 if known is not None else 201
        return self._shown(account, status)

    async def _settle(self, request: web.Request) -> web.Response:
        account = self._account(request)
        await self.settle(account, request[ACTOR], await _reason(request, needed=False))
        return self._shown(account, 202)

    async def settle(self, account: Account, actor: str, reason: str) -> None:
        """Begin to release what is unsettled. Raises `Refused`, and as the bookkeeper does."""
        if self._ledger.is_closed(account):
            raise Refused(f"agreement {account.agreement.id} is closed: nothing is sent any more")
        escrow = spokesman(self._ledger, account)
        if escrow.status is EscrowStatus.FROZEN:
            command = f"meterd resume {account.agreement.id} --reason TEXT"
            raise Refused(f"it is frozen ({escrow.reason}); when that is put right: {command}")
        await self._bookkeeper.settle(account, actor, reason)

    async def _close(self, request: web.Request) -> web.Response:
        """Close; once more changes nothing."""
        account = self._account(request)
        reason = await _reason(request, needed=False)
        if self._ledger.is_closed(account):
            return self._shown(account)
        await self._bookkeeper.close(account, request[ACTOR], reason)
        return self._shown(account, 202)

    async def _freeze(self, request: web.Request) -> web.Response:
        account = self._account(request)
        reason = await _reason(request)
        await self._bookkeeper.freeze(account, request[ACTOR], reason)
        return self._shown(account)

    async def _resume(self, request: web.Request) -> web.Response:
        account = self._account(request)
        reason = await _reason(request)
        await self._bookkeeper.resume(account, request[ACTOR], reason)
        return self._shown(account)

    # -- Finding -----------------------------------------------------------------------------------

    def _account(self, request: web.Request) -> Account:
        return self.find(read_id(request))

    def find(self, name: str) -> Account:
        """Find an agreement by its own or its escrow's id. Raises `NotFound`."""
        account = self._ledger.account(name)
        if account is None:
            raise NotFound(f"there is no agreement {name}; list them: meterd agreements")
        return account

    def _word(self, account: Account) -> str:
        return state_word(spokesman(self._ledger, account), balance(self._ledger, account))

    def view(self, account: Account) -> Document:
        """Show an agreement, with what is set aside for work under way."""
        return agreement_view(self._parts, account)

    def _shown(self, account: Account, status: int = 200) -> web.Response:
        return json_answer(self.view(account), status)


async def _reason(request: web.Request, *, needed: bool = True) -> str:
    why = await read_command(request, Why, example=REASON_EXAMPLE)
    return read_reason(why.reason, needed=needed)


def _agreement(name: str, binding: Binding, known: Account | None) -> Agreement:
    """Read a binding.

    What it leaves out stays as it is; who bound the agreement first stays its origin.
    """
    pairs = _pairs(name, binding, known)
    if not pairs or not all(is_escrow_id(escrow) and role in ROLES for role, escrow in pairs):
        detail = (
            f"escrows: by role ({', '.join(ROLES)}) one id or a list, each with 1 to 64 letters, "
            f"digits, _ or -; such as {BIND_EXAMPLE}"
        )
        raise Problem(400, "bad-body", detail)
    payer = binding.payer
    if payer is None:
        payer = known.agreement.payer if known is not None else ""
    if len(payer) > PAYER_CHARS_MAX or not payer.isprintable():
        detail = f"payer: at most {PAYER_CHARS_MAX} printable characters"
        raise Problem(400, "bad-body", detail)
    origin = known.agreement.origin if known is not None else "api"
    plan = printable(binding.plan, 128)
    return Agreement(name, plan, payer, pairs, origin)


def _pairs(name: str, binding: Binding, known: Account | None) -> tuple[tuple[str, str], ...]:
    """List the escrows of a binding as (role, id)."""
    if binding.escrows is None:
        return known.agreement.escrows if known is not None else (("main", name),)
    return tuple(
        (role, escrow)
        for role, ids in sorted(binding.escrows.items())
        for escrow in ([ids] if isinstance(ids, str) else ids)
    )


def _by_meter(key: tuple[int, str, str, tuple[tuple[str, str], ...]]) -> tuple[object, ...]:
    period, card, meter, dimensions = key
    return -period, meter, dimensions, card
