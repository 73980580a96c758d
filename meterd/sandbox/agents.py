"""`/mcp` of the escrow service: four tools of the contract, for agents.

The rules kept here: everything and an amount are two different arguments of `escrow_release`, and
an amount that is left out, zero or empty never means everything. What moves money names an id that
the agent has chosen, and an id counts once, whatever the settings say of the contract's keys: it
is stored with the movement, so that it survives a restart too.

The service meters nothing, so there are no `meter_*` tools here. Faults on request are those of the
contract's own calls; a tool goes through none of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

import msgspec
from aiohttp import web

from meterd.errors import StoreFailed
from meterd.logs import get_logger
from meterd.mcp import asgi
from meterd.mcp.door import Door, NotInstalled
from meterd.mcp.tools import Tool, one_line
from meterd.sandbox import wire
from meterd.sandbox.contract import LIST_MAX, Asked, Contract
from meterd.sandbox.faults import Call
from meterd.sandbox.misdelivery import plain, refusal
from meterd.sandbox.wire import BadRequest

log = get_logger(__name__)

NAME = "meterd-sandbox"
VERSION = "1"  # Of these tools; the service has no other.
LISTED_DEFAULT = 20
NO_FIELDS = frozenset({"id", "escrow_id", "full"})  # Of the body of the contract's call.
INSTRUCTIONS = """\
An escrow service with made-up money, for development. A payer locks an amount for a provider, and
releases it in parts or as a whole. All money is USDC as decimal texts such as "10.00", never
numbers. What moves money names an id that you choose: when a call was cut off or you do not know
what came of it, call the same tool again with the same id and the same arguments; nothing is locked
or paid twice."""

_Id = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[!-~]{1,255}$",
        description="Chosen by you, a new one for each new wish. Use the same one when you retry.",
    ),
]
_Amount = Annotated[
    str,
    msgspec.Meta(description='USDC above 0 with at most 6 decimals, as a text: "0.01".'),
]
_Escrow = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9_-]{1,64}$", description="The escrow_id of escrow_create's answer."
    ),
]
_Memo = Annotated[str | None, msgspec.Meta(description="At most 280 printable characters.")]


class Create(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The arguments of `escrow_create`."""

    id: _Id
    to_agent_id: Annotated[str, msgspec.Meta(description="The provider: who is paid.")]
    amount: Annotated[
        str, msgspec.Meta(description='What is locked, at least 1 USDC, as a text: "10.00".')
    ]
    memo: _Memo = None
    auto_release_hours: Annotated[
        int | None, msgspec.Meta(description="The deadline, in whole hours from now.")
    ] = None
    on_deadline: Annotated[
        str | None,
        msgspec.Meta(description='Who gets the rest then: "release" or "refund".'),
    ] = None


class Release(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The arguments of `escrow_release`: exactly one of `amount` and `full`."""

    id: _Id
    escrow_id: _Escrow
    amount: _Amount | None = None
    full: Annotated[bool, msgspec.Meta(description="true: all that remains in the escrow.")] = False
    memo: _Memo = None


class One(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `escrow_status`."""

    escrow_id: _Escrow


class Listed(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `escrow_list`."""

    limit: Annotated[
        int, msgspec.Meta(ge=1, le=LIST_MAX, description="How many to show at most.")
    ] = LISTED_DEFAULT
    cursor: Annotated[
        str | None, msgspec.Meta(description='The "next_cursor" of the page before.')
    ] = None
    status: Annotated[
        str | None, msgspec.Meta(description='Only those that stand so, such as "funded".')
    ] = None


class Refused(Exception):
    """The service has refused; the message is its own sentence."""


class Agents:
    """The tools on one contract; a caller is an agent's id."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._door = Door(NAME, VERSION, INSTRUCTIONS, self._tools(), _explain)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of `/mcp`; the key is asked for as in every call of the contract."""
        agent = self._contract.agent(request)
        if agent is None:
            return plain(refusal(401, "unauthorized", "missing or unknown API key"))
        if not asgi.is_json(request):
            return plain(refusal(415, "content_type", "send Content-Type: application/json"))
        try:
            return await self._door.answer(request, agent)
        except NotInstalled as error:
            return _not_installed(str(error))

    def _tools(self) -> list[Tool[str]]:
        created = '{"id": "order-1", "to_agent_id": "agent_provider", "amount": "10.00"}'
        released = '{"id": "pay-1", "escrow_id": "esc_1", "amount": "0.01"}'
        return [
            _tool("escrow_create", Create, created, self._create),
            _tool("escrow_release", Release, released, self._release),
            _tool("escrow_status", One, '{"escrow_id": "esc_1"}', self._show),
            _tool("escrow_list", Listed, '{"limit": 20}', self._list),
        ]

    async def _create(self, agent: str, asked: Create) -> Mapping[str, Any]:
        return await self._moved(Call.CREATE, agent, None, asked)

    async def _release(self, agent: str, asked: Release) -> Mapping[str, Any]:
        if (asked.amount is not None) == asked.full:
            raise Refused('give exactly one of amount, such as "0.01", and full: true')
        call = Call.RELEASE if asked.full else Call.RELEASE_PARTIAL
        return await self._moved(call, agent, asked.escrow_id, asked)

    async def _show(self, agent: str, asked: One) -> Mapping[str, Any]:
        return await self._said(Asked(Call.GET, agent, asked.escrow_id, None, {}, {}))

    async def _list(self, agent: str, asked: Listed) -> Mapping[str, Any]:
        given = {"limit": str(asked.limit), "cursor": asked.cursor, "status": asked.status}
        query = {name: value for name, value in given.items() if value is not None}
        return await self._said(Asked(Call.LIST, agent, None, None, {}, query))

    async def _moved(
        self, call: Call, agent: str, escrow: str | None, asked: Create | Release
    ) -> Mapping[str, Any]:
        """Have money moved, once for an id."""
        given = msgspec.to_builtins(asked)
        fields = {name: value for name, value in given.items() if name not in NO_FIELDS}
        key = wire.read_key(asked.id)
        return await self._said(Asked(call, agent, escrow, key, fields, {}, once=True))

    async def _said(self, asked: Asked) -> Mapping[str, Any]:
        reply = await self._contract.ask(asked)
        if reply.status >= 400:
            raise Refused(f"{reply.document['error']}: {reply.document['message']}")
        return reply.document


CHANGING = frozenset({"escrow_create", "escrow_release"})
# By tool: its title and its text, which an agent reads before it decides.
TEXTS: Mapping[str, tuple[str, str]] = {
    "escrow_create": (
        "Lock money for a provider",
        one_line("""
            Lock an amount out of your wallet in a new escrow for a provider. Choose an id for this
            wish. When you retry, after an error, a time-out or a lost answer, reuse the same id:
            the escrow that it has locked is answered again, and no second one is locked. The same
            id with another amount or provider is refused.
        """),
    ),
    "escrow_release": (
        "Pay the provider out of an escrow",
        one_line("""
            Pay the provider an amount, or with full: true all that remains. Give exactly one of the
            two; an amount that is left out or empty never means everything. This cannot be undone.
            Choose an id for this payment. When you retry, reuse the same id: it is paid once. A new
            id pays again.
        """),
    ),
    "escrow_status": (
        "One escrow",
        one_line("""
            Show an escrow: what was locked, released and refunded, what remains, and its newest
            releases. Changes nothing.
        """),
    ),
    "escrow_list": (
        "Your escrows, page by page",
        one_line("""
            List the escrows that you have locked or are paid from, oldest first. "next_cursor" asks
            for the next page, null at the end. Changes nothing.
        """),
    ),
}


def _tool(
    name: str,
    takes: type[msgspec.Struct],
    example: str,
    answer: Callable[[str, Any], Awaitable[Mapping[str, Any]]],
) -> Tool[str]:
    title, text = TEXTS[name]
    return Tool(name, title, text, takes, example, answer, changes=name in CHANGING)


def _explain(error: Exception, tool: Tool[Any]) -> str:
    """Say why a tool failed. A commit that failed has stopped the service by itself."""
    if isinstance(error, Refused | BadRequest):
        return str(error)
    if isinstance(error, StoreFailed):
        return "the sandbox's file could not be written; make room, then restart it"
    log.error("A tool of /mcp failed.", action="tool_failed", tool=tool.name, exc_info=error)
    return "the sandbox made a mistake; its log says which"


def _not_installed(sentence: str) -> web.Response:
    document = {
        "type": "urn:meterd:problem:not-installed",
        "title": "Not Implemented",
        "status": 501,
        "detail": sentence,
    }
    return web.Response(
        status=501, body=msgspec.json.encode(document), content_type="application/problem+json"
    )
