"""What only a sandbox has: the truth about what was paid, faults on request, a clock to be moved.

The rule kept here: the log and the totals are read from the file, so they tell what is durable.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from meterd.core.money import format_amount
from meterd.sandbox import ledger, wire
from meterd.sandbox.contract import Arrival, Contract, refused
from meterd.sandbox.faults import Phase
from meterd.sandbox.ledger import Ask, Kind, Refusal
from meterd.sandbox.misdelivery import Reply
from meterd.sandbox.service import Service
from meterd.sandbox.wire import BadRequest

OPERATIONS_MAX = 10_000
OPERATIONS_DEFAULT = 1_000
CLOCK_STEP_S_MAX = 10**11


class Controls:
    """What only a sandbox has.

    The truth about what was paid, faults on request, and a clock that can be moved.
    """

    def __init__(self, service: Service, contract: Contract) -> None:
        self._service = service
        self._contract = contract

    async def operations(self, request: web.Request) -> Reply:
        """The log, oldest first.

        `escrow_id`, `agent_id`, `kind`, `after` (a seq) and `limit` narrow it; `next` goes on.
        """
        query = request.query
        limit = wire.read_whole(query.get("limit"), "limit", OPERATIONS_DEFAULT, OPERATIONS_MAX)
        limit = max(limit, 1)
        self._service.catch_up()
        operations = await self._service.store.operations(
            after=wire.read_whole(query.get("after"), "after", 0, 1 << 53),
            limit=limit,
            escrow_id=query.get("escrow_id"),
            kind=query.get("kind"),
            agent_id=query.get("agent_id"),
        )
        return Reply(
            200,
            {
                "operations": [wire.operation_answer(operation) for operation in operations],
                "next": operations[-1].seq if len(operations) == limit else None,
            },
        )

    async def totals(self, request: web.Request) -> Reply:
        """Sums over everything, or over one `escrow_id`.

        By the log, and by the escrows' own figures.
        """
        self._service.catch_up()
        sums = await self._service.store.totals(request.query.get("escrow_id"))
        escrows, amount, released, refunded, fee = sums["escrows"]["sum"]
        agents, balance = sums["wallets"]["sum"]
        return Reply(
            200,
            {
                "operations": {
                    kind: {
                        "count": number,
                        "amount": format_amount(gross),
                        "fee": format_amount(fees),
                    }
                    for kind, (number, gross, fees) in sorted(sums["operations"].items())
                },
                "escrows": escrows,
                "amount": format_amount(amount),
                "released_amount": format_amount(released),
                "refunded_amount": format_amount(refunded),
                "remaining": format_amount(amount - released - refunded),
                "fee": format_amount(fee),
                "agents": agents,
                "wallets": format_amount(balance),
            },
        )

    async def requests(self, request: web.Request) -> Reply:
        """The POSTs of the contract since the start, refused and spoiled ones too; in memory."""
        query = request.query
        limit = wire.read_whole(query.get("limit"), "limit", OPERATIONS_DEFAULT, OPERATIONS_MAX)
        wanted = {
            name: query[name] for name in ("escrow_id", "idempotency_key", "call") if name in query
        }
        lines = (_arrival_line(arrival) for arrival in reversed(self._contract.arrivals))
        fitting = [line for line in lines if wanted.items() <= line.items()]
        return Reply(200, {"count": len(fitting), "requests": fitting[:limit][::-1]})

    async def faults(self, _: web.Request) -> Reply:
        """The rules that stand, and those that are spent."""
        return Reply(200, {"faults": self._service.faults.listed()})

    async def add_fault(self, request: web.Request) -> Reply:
        """Let something fail: one rule, or what another party does to an escrow now."""
        self._service.catch_up()
        rule = self._service.faults.add(wire.read_object(await request.read()))
        if rule.sort.phase is not Phase.NOW:
            return Reply(201, rule.listed())
        amount = wire.read_amount(rule.told) if "amount" in rule.told else None
        decision = await self._service.perform(self._service.act_by_other(rule, amount), rule.kind)
        if isinstance(decision, Refusal):
            return refused(decision)
        assert decision.escrow is not None
        return Reply(200, wire.escrow_answer(decision.escrow))

    async def clear_faults(self, _: web.Request) -> Reply:
        """Let everything go well again. What is under way to land late still lands."""
        self._service.faults.clear()
        self._service.hide_nothing()
        return Reply(200, {"faults": []})

    async def clock(self, _: web.Request) -> Reply:
        """The service's time."""
        return Reply(200, {"now": wire.iso_time(self._service.catch_up())})

    async def move_clock(self, request: web.Request) -> Reply:
        """Move the clock by `advance_s` seconds, either way.

        What is due then is done before the answer.
        """
        by_s = wire.read_object(await request.read()).get("advance_s")
        if not isinstance(by_s, int | float) or not abs(by_s) < CLOCK_STEP_S_MAX:
            raise BadRequest("invalid_clock", "advance_s is a number of seconds")
        if not await self._service.move_clock(round(by_s * 1000)):
            raise BadRequest("invalid_clock", "advance_s leads too far away")
        return Reply(200, {"now": wire.iso_time(self._service.now_ms())})

    async def fill_wallet(self, request: web.Request) -> Reply:
        """Give an agent play money: `agent_id`, `amount`."""
        fields = wire.read_object(await request.read())
        agent, gross = wire.read_agent(fields, "agent_id"), wire.read_amount(fields)
        books = self._service.books
        decision = await self._service.perform(
            lambda outcome, now: ledger.grant(
                books, gross, Kind.GRANT, Ask(agent, outcome=outcome), now
            ),
            "by_control",
        )
        if isinstance(decision, Refusal):
            return refused(decision)
        return Reply(200, {"agent_id": agent, "balance": format_amount(decision.wallets[agent])})


def _arrival_line(arrival: Arrival) -> dict[str, Any]:
    return {
        "time": wire.iso_time(arrival.time_ms),
        "call": arrival.call,
        "escrow_id": arrival.escrow_id,
        "idempotency_key": arrival.key,
        "fault": arrival.fault,
        "status": arrival.status,
    }
