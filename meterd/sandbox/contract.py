"""The calls of the contract, without their paths: who may ask, what it does, what is answered.

The rule kept here: one way for every call, in numbered steps, with the fault drawn before the money
moves and played out after it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from meterd.core.money import format_amount
from meterd.sandbox import ledger, wire
from meterd.sandbox.faults import Call, Phase, Rule
from meterd.sandbox.ledger import (
    REFUNDS,
    RELEASES,
    Act,
    Ask,
    Code,
    Deadline,
    Decision,
    Escrow,
    Kind,
    Operation,
    Refusal,
    Terms,
    Wallet,
)
from meterd.sandbox.misdelivery import Reply, deliver, plain, refusal
from meterd.sandbox.service import Service, new_escrow_id
from meterd.sandbox.settings import SandboxSettings
from meterd.sandbox.wire import BadRequest

LIST_MAX = 100
LIST_DEFAULT = 50
LIST_BYTES_MAX = 56 * 1024  # Clients read at most 64 KiB.
REQUESTS_KEPT = 100_000  # In memory: enough for a test run, no more than some tens of MiB.
RATE_WINDOW_MS = 60_000
RATES_KEPT = 10_000

STATUS_OF: Mapping[Code, int] = {
    Code.ESCROW_NOT_FOUND: 404,
    Code.FORBIDDEN: 403,
    Code.AMOUNT_BELOW_MINIMUM: 400,
    Code.AMOUNT_TOO_LARGE: 400,
    Code.SAME_AGENT: 400,
    Code.INSUFFICIENT_FUNDS: 402,
    Code.INSUFFICIENT_REMAINING: 402,
    Code.ALREADY_RELEASED: 409,
    Code.ALREADY_REFUNDED: 409,
    Code.ESCROW_EXPIRED: 409,
    Code.ESCROW_DISPUTED: 409,
    Code.NOT_DISPUTED: 409,
    Code.FAUCET_TAKEN: 409,
    Code.REPEATED: 409,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the contract, read."""

    call: Call
    agent: str
    escrow_id: str | None
    key: str | None
    fields: Mapping[str, Any]
    query: Mapping[str, str]
    payer: str | None = None  # Whose wallet it is about.
    payee: str | None = None  # Whom that wallet pays.
    once: bool = False  # Its key counts once, whatever the settings say.

    @property
    def about(self) -> str | None:
        """What it is about, as faults and counts name it: an escrow's id, or a payer's."""
        return self.escrow_id or self.payer

    @property
    def place(self) -> str | None:
        """Where its key counts, as `Operation.place`."""
        return self.payee or self.escrow_id

    @property
    def owner(self) -> str:
        """The agent that stands in the log for it: who asks, but for a debit who pays."""
        return self.payer or self.agent

    @property
    def escrow(self) -> str:
        """The id in the path; only for calls that have one."""
        assert self.escrow_id is not None
        return self.escrow_id


@dataclass(slots=True)
class Arrival:
    """That a request came, whatever became of it: the sandbox counts how often a row was sent.

    Noted when it comes; `fault` and `status` follow, and stay None if the answer never got so far.
    """

    time_ms: int
    call: Call
    escrow_id: str | None
    key: str | None
    fault: str | None = None
    status: int | None = None


READS = frozenset({Call.GET, Call.LIST, Call.WALLET})
HONOURING = frozenset({Call.CREATE, Call.RELEASE, Call.RELEASE_PARTIAL, Call.REFUND, Call.DEBIT})
KIND_OF: Mapping[Call, Kind] = {
    Call.CREATE: Kind.CREATE,
    Call.RELEASE: Kind.RELEASE,
    Call.RELEASE_PARTIAL: Kind.RELEASE_PARTIAL,
    Call.REFUND: Kind.REFUND,
    Call.DEBIT: Kind.DEBIT,
}
LIMITED = frozenset({Call.RELEASE, Call.RELEASE_PARTIAL, Call.DEBIT, Call.CREATE})


class Contract:
    """The calls of the contract on one service."""

    def __init__(self, settings: SandboxSettings, service: Service) -> None:
        self._settings = settings
        self._service = service
        self._books = service.books
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._rates: dict[str, deque[int]] = {}
        self.arrivals: deque[Arrival] = deque(maxlen=REQUESTS_KEPT)

    async def answer(self, call: Call, request: web.Request) -> web.StreamResponse:
        """Answer one request of the contract."""
        # 1. Who asks, and for what.
        agent = self.agent(request)
        if agent is None:
            return plain(refusal(401, "unauthorized", "missing or unknown API key"))
        try:
            asked = await _read(call, agent, request)
            act = None if call in READS else self._act(asked)
        except BadRequest as error:
            return plain(refusal(400, error.code, error.text))
        now_ms = self._service.catch_up()
        arrival = Arrival(now_ms, call, asked.about, asked.key)
        if act is not None:
            self.arrivals.append(arrival)
        # 2. What goes wrong with it.
        if self._too_often(asked, now_ms):
            arrival.status = 429
            return plain(refusal(429, "rate_limited", "too many requests"))
        fault = await self._fault(asked)
        arrival.fault = fault.kind if fault is not None else None
        # 3. What it does.
        if act is None:
            reply = await self._read_reply(asked)
        else:
            reply = await self._carry_out(asked, act, fault)
        # 4. What the asker gets to see.
        response = await deliver(request, reply, fault)
        arrival.status = response.status
        return response

    async def ask(self, asked: Asked) -> Reply:
        """Do what a tool asks for: a call without a fault, answered as it is meant."""
        try:
            act = None if asked.call in READS else self._act(asked)
        except BadRequest as error:
            return refusal(400, error.code, error.text)
        now_ms = self._service.catch_up()
        if act is None:
            return await self._read_reply(asked)
        arrival = Arrival(now_ms, asked.call, asked.about, asked.key)
        self.arrivals.append(arrival)
        if self._too_often(asked, now_ms):
            reply = refusal(429, "rate_limited", "too many requests")
        else:
            reply = await self._once(asked, act, "answered")
        arrival.status = reply.status
        return reply

    def agent(self, request: web.Request) -> str | None:
        """Whose key a request shows; None: nobody's."""
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        return self._settings.keys.get(key) if scheme == "Bearer" else None

    def _too_often(self, asked: Asked, now_ms: int) -> bool:
        """Whether the limit of a minute is used up: by escrow, by payer, by agent for creations."""
        most = self._settings.rate_limit_per_minute
        if most is None or asked.call not in LIMITED:
            return False
        if len(self._rates) > RATES_KEPT:
            self._rates.clear()
        times = self._rates.setdefault(asked.escrow_id or f"{asked.call} {asked.owner}", deque())
        while times and times[0] <= now_ms - RATE_WINDOW_MS:
            times.popleft()
        if len(times) >= most:
            return True
        times.append(now_ms)
        return False

    async def _fault(self, asked: Asked) -> Rule | None:
        faults = self._service.faults
        repeat = False
        if faults.wants_repeats and asked.key is not None:
            repeat = await self._earlier(asked) is not None
        return faults.pick(Phase.REQUEST, asked.call, asked.about, repeat=repeat)

    async def _earlier(self, asked: Asked) -> Operation | None:
        assert asked.key is not None
        return await self._service.store.operation_by_key(
            asked.key, asked.owner, asked.escrow_id, asked.payee
        )

    async def _carry_out(self, asked: Asked, act: Act, fault: Rule | None) -> Reply:
        """Move the money, or not, or later, or twice."""
        if fault is None:
            return await self._once(asked, act, "answered")
        if fault.kind == "land_late":
            await self._land_late(asked, act, fault)
            return self._present(asked)
        if not fault.moves:
            return self._present(asked)
        before = self._standing(asked)
        reply = await self._once(asked, act, fault.kind)
        if fault.kind == "duplicate_delivery":
            await self._once(asked, act, fault.kind)
        if before is not None and "status_lag" in fault.told:
            self._service.hide(before, fault.ms("status_lag"))
        return reply

    async def _once(self, asked: Asked, act: Act, outcome: str) -> Reply:
        """Carry the request out; where keys are honoured, only if its key is new."""
        if asked.key is None or not self._honours(asked):
            return self._reply(await self._service.perform(act, outcome))
        scope = f"{asked.owner} {asked.place} {asked.key}"
        # Two requests with one key wait for each other, or both would find the key unused.
        lock = self._locks.setdefault(scope, asyncio.Lock())
        async with lock:
            earlier = await self._earlier(asked)
            if earlier is None:
                return self._reply(await self._service.perform(act, outcome))
            return self._repeated(asked, earlier)

    async def _land_late(self, asked: Asked, act: Act, fault: Rule) -> None:
        """Let it take effect later; where keys are honoured, only if its key is new by then too."""
        if asked.key is None or not self._honours(asked):
            self._service.land_late(act, fault.ms("seconds"), fault.kind)
        elif await self._earlier(asked) is None:
            unused = partial(self._unless_used, asked, act)
            self._service.land_late(unused, fault.ms("seconds"), fault.kind)

    def _unless_used(self, asked: Asked, act: Act, outcome: str, now_ms: int) -> Decision:
        if self._service.has_booked(asked.owner, asked.place, asked.key):
            return Refusal(Code.REPEATED, "this was asked for before")
        return act(outcome, now_ms)

    def _honours(self, asked: Asked) -> bool:
        if asked.call not in HONOURING:
            return False
        return (
            asked.once
            or self._settings.honour_idempotency
            or self._service.faults.honours(asked.call, asked.about)
        )

    def _repeated(self, asked: Asked, earlier: Operation) -> Reply:
        """The answer to a request that was carried out before under the same key."""
        same = earlier.kind is KIND_OF[asked.call]
        if same and "amount" in asked.fields and asked.call is not Call.RELEASE:
            same = earlier.gross == wire.read_amount(asked.fields)
        if same and asked.call is Call.CREATE:
            provider = self._books.escrows[earlier.escrow_id or ""].provider
            same = provider == asked.fields["to_agent_id"]
        if not same:
            return refusal(409, "idempotency_key_reused", "this key stands for another request")
        if earlier.escrow_id is None:
            payer, payee = earlier.agent, earlier.payee or ""
            level = ledger.debited(self._books, payer, payee)
            return _debited(earlier, self._books.wallets[payer], level)
        return self._moved(self._books.escrows[earlier.escrow_id], earlier)

    def _standing(self, asked: Asked) -> Escrow | Wallet | None:
        """What the request is about, as it stands; None: there is no such thing."""
        if asked.payer is not None and asked.payer in self._books.wallets:
            return ledger.wallet(self._books, asked.payer)
        return self._books.escrows.get(asked.escrow_id or "")

    def _present(self, asked: Asked) -> Reply:
        """What could be said although nothing was done: the escrow or wallet as it stands."""
        standing = self._standing(asked)
        if isinstance(standing, Wallet):
            return Reply(200, wire.wallet_answer(standing, asked.payee or asked.agent))
        return Reply(200, {} if standing is None else wire.escrow_answer(standing))

    def _reply(self, decision: Decision) -> Reply:
        if isinstance(decision, Refusal):
            return refused(decision)
        if decision.escrow is not None:
            return self._moved(decision.escrow, decision.operation)
        operation = decision.operation
        assert operation is not None
        balance = decision.wallets[operation.agent]
        if operation.payee is not None:
            return _debited(operation, balance, decision.debited)
        return Reply(200, _granted(operation, balance))

    def _moved(self, escrow: Escrow, operation: Operation | None) -> Reply:
        document = wire.escrow_answer(escrow)
        if operation is not None and operation.kind in RELEASES:
            document["release"] = wire.release_answer(operation)
        if operation is not None and operation.kind in REFUNDS:
            document["refund"] = {"amount": format_amount(operation.gross)}
        created = operation is not None and operation.kind is Kind.CREATE
        return Reply(201 if created else 200, document)

    async def _read_reply(self, asked: Asked) -> Reply:
        try:
            return await self._READERS[asked.call](self, asked)
        except BadRequest as error:
            return refusal(400, error.code, error.text)

    async def _get(self, asked: Asked) -> Reply:
        escrow = ledger.readable(self._books, asked.escrow, asked.agent)
        if isinstance(escrow, Refusal):
            return refused(escrow)
        view = self._view(asked.call, asked.escrow)
        shown = await self._service.shown(escrow, view, self._service.now_ms())
        releases = self._service.history(shown)
        return Reply(200, {**wire.escrow_answer(shown), "releases": releases})

    def _view(self, call: Call, escrow_id: str) -> Rule | None:
        return self._service.faults.pick(Phase.VIEW, call, escrow_id, repeat=False)

    async def _list(self, asked: Asked) -> Reply:
        """The agent's escrows, oldest first.

        `next_cursor` goes on behind the last one, null at the end.
        """
        agent = wire.read_agent(asked.query, "agent_id", asked.agent)
        if agent != asked.agent:
            return refusal(403, "forbidden", "this key belongs to another agent")
        limit = wire.read_whole(asked.query.get("limit"), "limit", LIST_DEFAULT, LIST_MAX)
        start = wire.read_whole(asked.query.get("cursor"), "cursor", 0, 1 << 53)
        status = asked.query.get("status")
        ids = self._books.by_agent.get(agent, [])
        page: list[dict[str, Any]] = []
        size, position = 0, start
        while position < len(ids) and len(page) < max(limit, 1):
            escrow = self._books.escrows[ids[position]]
            if status is None or status == escrow.status:
                view = self._view(asked.call, escrow.escrow_id)
                escrow = await self._service.shown(escrow, view, self._service.now_ms())
                line = wire.escrow_answer(escrow)
                size += len(msgspec.json.encode(line))
                if size > LIST_BYTES_MAX:
                    break
                page.append(line)
            position += 1
        following = str(position) if position < len(ids) else None
        return Reply(200, {"escrows": page, "next_cursor": following})

    async def _wallet(self, asked: Asked) -> Reply:
        payer, payee = asked.payer, asked.payee
        assert payer is not None
        assert payee is not None
        if payer not in self._books.wallets:
            return refusal(404, "agent_not_found", "there is no such agent")
        view = self._view(asked.call, payer)
        wallet = await self._service.shown_wallet(payer, view, self._service.now_ms())
        debits = self._service.debits(wallet, payee)
        return Reply(200, {**wire.wallet_answer(wallet, payee), "debits": debits})

    _READERS: Mapping[Call, Callable[[Contract, Asked], Awaitable[Reply]]] = {
        Call.GET: _get,
        Call.LIST: _list,
        Call.WALLET: _wallet,
    }

    def _act(self, asked: Asked) -> Act:
        """What a request that moves money would do. Raises `BadRequest`."""
        ask = Ask(asked.agent, wire.read_memo(asked.fields), asked.key)
        return self._ACTS[asked.call](self, asked, ask)

    def _create(self, asked: Asked, ask: Ask) -> Act:
        now_ms = self._service.now_ms()
        terms = Terms(
            escrow_id="",
            provider=wire.read_agent(asked.fields, "to_agent_id"),
            amount=wire.read_amount(asked.fields),
            deadline_ms=wire.read_deadline(asked.fields, now_ms),
            on_deadline=wire.read_direction(asked.fields, Deadline(self._settings.deadline)),
        )

        def act(outcome: str, at_ms: int) -> Decision:
            # The id is made here, so that a request delivered twice makes two escrows.
            # Its hours run from the moment at which it is made.
            deadline_ms = wire.read_deadline(asked.fields, at_ms)
            fresh = replace(terms, escrow_id=new_escrow_id(), deadline_ms=deadline_ms)
            return ledger.create(self._books, fresh, replace(ask, outcome=outcome), at_ms)

        return act

    def _release(self, asked: Asked, ask: Ask) -> Act:
        return lambda outcome, now: ledger.release_all(
            self._books, asked.escrow, replace(ask, outcome=outcome), now
        )

    def _release_partial(self, asked: Asked, ask: Ask) -> Act:
        gross = wire.read_amount(asked.fields)
        return lambda outcome, now: ledger.release_part(
            self._books, asked.escrow, gross, replace(ask, outcome=outcome), now
        )

    def _refund(self, asked: Asked, ask: Ask) -> Act:
        # Asked by presence: an amount of null or "" must never become "everything".
        if "amount" not in asked.fields:
            return lambda outcome, now: ledger.refund_all(
                self._books, asked.escrow, replace(ask, outcome=outcome), now
            )
        gross = wire.read_amount(asked.fields)
        return lambda outcome, now: ledger.refund_part(
            self._books, asked.escrow, gross, replace(ask, outcome=outcome), now
        )

    def _dispute(self, asked: Asked, ask: Ask) -> Act:
        return lambda _, __: ledger.dispute(self._books, asked.escrow, ask)

    def _resolve(self, asked: Asked, ask: Ask) -> Act:
        resolution = asked.fields.get("resolution")
        if resolution == "release":
            return lambda outcome, now: ledger.resolve_release(
                self._books, asked.escrow, replace(ask, outcome=outcome), now
            )
        if resolution == "refund":
            return lambda outcome, now: ledger.resolve_refund(
                self._books, asked.escrow, replace(ask, outcome=outcome), now
            )
        if resolution == "resume":
            return lambda _, __: ledger.resolve_resume(self._books, asked.escrow, ask)
        raise BadRequest("invalid_resolution", 'resolution: "release", "refund" or "resume"')

    def _debit(self, asked: Asked, ask: Ask) -> Act:
        payer, payee = asked.payer, asked.payee
        assert payer is not None
        assert payee is not None
        gross = wire.read_amount(asked.fields)
        return lambda outcome, now: ledger.debit(
            self._books, payee, gross, replace(ask, agent=payer, outcome=outcome), now
        )

    def _faucet(self, asked: Asked, ask: Ask) -> Act:
        agent = wire.read_agent(asked.fields, "agent_id", asked.agent)
        return lambda outcome, now: ledger.grant(
            self._books,
            ledger.FAUCET_GRANT,
            Kind.FAUCET,
            replace(ask, agent=agent, outcome=outcome),
            now,
        )

    _ACTS: Mapping[Call, Callable[[Contract, Asked, Ask], Act]] = {
        Call.CREATE: _create,
        Call.RELEASE: _release,
        Call.RELEASE_PARTIAL: _release_partial,
        Call.REFUND: _refund,
        Call.DISPUTE: _dispute,
        Call.RESOLVE: _resolve,
        Call.DEBIT: _debit,
        Call.FAUCET: _faucet,
    }


async def _read(call: Call, agent: str, request: web.Request) -> Asked:
    body = b"" if call in READS else await request.read()
    asked = Asked(
        call=call,
        agent=agent,
        escrow_id=request.match_info.get("escrow_id"),
        key=wire.read_key(request.headers.get("Idempotency-Key")),
        fields=wire.read_object(body),
        query={**request.query, **request.match_info},
    )
    if call is Call.WALLET:
        return replace(asked, payer=asked.query["agent"], payee=agent)
    if call is Call.DEBIT:
        # The payee is the asker, unless the asker is the payer and names one.
        return replace(
            asked,
            payer=wire.read_agent(asked.fields, "agent_id"),
            payee=wire.read_agent(asked.fields, "to_agent_id", agent),
        )
    return asked


def _granted(operation: Operation, balance: int) -> dict[str, Any]:
    """What was put into a wallet or taken out of it, and what it holds then."""
    return {
        "operation_id": f"op_{operation.seq}",
        "agent_id": operation.agent,
        "amount": format_amount(operation.gross),
        "currency": "USDC",
        "balance": format_amount(balance),
        "memo": operation.memo,
    }


def _debited(operation: Operation, balance: int, level: int) -> Reply:
    """The answer to a debit; `level` is what its payee has debited in all."""
    return Reply(
        200,
        {
            **_granted(operation, balance),
            "to_agent_id": operation.payee,
            "debited": format_amount(level),
            "debit": wire.debit_answer(operation),
        },
    )


def refused(decision: Refusal) -> Reply:
    """A refusal of the ledger as the wire shows it."""
    return refusal(STATUS_OF[decision.code], decision.code, decision.text)
