from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.settlement import Answer, AnswerKind, Reading, Release, ReleaseStatus
from meterd.errors import ConfigurationError, Refused, Unavailable
from meterd.escrow.documents import Mask, Received
from meterd.escrow.outcomes import Unread
from meterd.escrow.wallet import (
    WalletApi,
    WalletClient,
    WalletPaths,
    answer_to_debit,
    answer_to_wallet,
)

KEY = "pf_live_0a1B2c3D4e5F6g7H8i9J"
MASK = Mask(KEY)
WALL = 1_795_000_000_000
# Asked: 0.10; debited before: 0.20; so 0.30 after it.
DEBIT = Release("rel_77", "agent:payer", 100_000, 200_000, ReleaseStatus.SENT, "amount", 0, 0, ())
OK, DOUBT = AnswerKind.CONFIRMED, AnswerKind.DOUBT
ERROR = {"error": "some_code", "message": "some words"}

WALLET = {
    "agent_id": "agent:payer",
    "to_agent_id": "agent_provider",
    "balance": "9.70",
    "debited": "0.30",
    "currency": "usdc",
    "debits": [{"debit_id": "deb_2", "memo": "meterd rel_77", "idempotency_key": "rel_77"}],
}
DEBITED = {
    "operation_id": "op_2",
    "agent_id": "agent:payer",
    "amount": "0.10",
    "balance": "9.70",
    "debited": "0.30",
    "memo": "meterd rel_77",
    "debit": {"debit_id": "deb_2", "gross_amount": "0.10", "memo": "meterd rel_77"},
}


def changed(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (document | changes).items() if value != "absent"}


def as_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def read(body: Any, status: int = 200) -> Reading | Unread:
    return answer_to_wallet(Received(status, {"Retry-After": "9"}, as_bytes(body)), MASK, 5.0, WALL)


def ask(body: Any, status: int = 200) -> Answer:
    return answer_to_debit(
        DEBIT, Received(status, {"Retry-After": "9"}, as_bytes(body)), MASK, WALL
    )


# --- readings -------------------------------------------------------------------------------------


def test_wallet_is_read_as_an_escrow_whose_total_moves_with_its_payer():
    """The level is what was debited, the rest is the balance, and nothing has a deadline."""
    assert read(WALLET) == Reading(
        escrow="agent:payer",
        status="active",
        total=10_000_000,
        released=300_000,
        remaining=9_700_000,
        refunded=0,
        currency="USDC",
        provider="agent_provider",
        deadline=None,
        mono=5.0,
        release_ids=frozenset({"rel_77"}),
    )


@pytest.mark.parametrize(
    "body",
    [
        {"wallet": WALLET},
        {"data": {"wallet": WALLET}},
        changed(WALLET, balance=9.7, debited=0.30000000000000004),
        changed(WALLET, debited="absent", total_debited="0.3"),
        changed(WALLET, balance="absent", available_balance="9.70"),
        changed(WALLET, agent_id="absent", agentId="agent:payer"),
        changed(WALLET, status="ACTIVE", amount="5", id="wal_1"),
    ],
    ids=range(7),
)
def test_wallet_is_read_whatever_its_fields_are_called(body):
    """Names, numbers and wrappers as live services have them."""
    got = read(body)

    assert isinstance(got, Reading), got
    assert (got.escrow, got.released, got.remaining, got.status) == (
        *("agent:payer", 300_000, 9_700_000, "active"),
    )


def test_wallet_that_says_how_it_stands_is_taken_at_its_word():
    """A word that meterd does not know stops payments, as with an escrow."""
    got = read(changed(WALLET, status="suspended"))

    assert isinstance(got, Reading)
    assert got.status == "suspended"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (changed(WALLET, debited="absent"), "meterd cannot pay exactly from such a wallet"),
        (changed(WALLET, debited=None), "meterd cannot pay exactly from such a wallet"),
        (changed(WALLET, balance="absent"), "no balance"),
        (changed(WALLET, agent_id="absent"), "names no agent"),
        (changed(WALLET, agent_id="../x"), "names no agent"),
        (changed(WALLET, agent_id=KEY), "names no agent"),
        (changed(WALLET, balance="-1"), "below 0"),
        (changed(WALLET, debited="0.0000001"), "more than 6 decimals"),
        (changed(WALLET, debited_total="0.31"), "two figures for debited"),
        (changed(WALLET, status={"word": "active"}), "no status"),
        (b"<html>", "no JSON"),
        (b"", "empty"),
    ],
    ids=range(12),
)
def test_wallet_that_cannot_be_paid_from_exactly_is_nonsense(body, words):
    """Without the service's own cumulative figure nothing is read, and the reason is said whole."""
    got = read(body)

    assert isinstance(got, Unread)
    assert got.kind == "nonsense"
    assert words in got.detail
    assert not got.detail.endswith("…")
    assert KEY not in got.detail


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, b"", "key_refused"),
        (403, ERROR, "forbidden"),
        (404, ERROR, "missing"),
        (404, b"<html>", "unavailable"),
        (429, b"", "limited"),
        (503, WALLET, "unavailable"),
    ],
)
def test_reading_that_gave_nothing_says_why(status, body, kind):
    """The same kinds as those of an escrow, and the wait that was asked for."""
    got = read(body, status)

    assert isinstance(got, Unread)
    assert (got.kind, got.retry_after) == (kind, 9.0)


# --- answers to a debit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "amount", "level"),
    [
        (DEBITED, 100_000, 300_000),
        ({"debited": "0.30"}, None, 300_000),
        ({"debited": "0.25"}, None, 250_000),  # Another level: the core compares.
        ({"debited": "0.10"}, 100_000, None),  # Not a level that can be, so this debit's amount.
        ({"amount": "0.10"}, 100_000, None),
        ({"amount": "0.10", "balance": "3"}, 100_000, None),
        ({"wallet": WALLET, "success": True}, None, 300_000),
        ({"debit": {"gross_amount": "0.10"}}, 100_000, None),
        ({"debits": [{"memo": "meterd rel_77", "gross_amount": "0.1"}]}, 100_000, None),
        ({"debited_total": "0.30", "status": "pending"}, None, 300_000),
        ({"debited": 0.30000000000000004, "amount": 0.1}, None, 300_000),
    ],
    ids=range(11),
)
def test_debit_is_confirmed_by_its_amount_or_by_the_level(body, amount, level):
    """The figures are handed on; the core compares them with what it expected."""
    answer = ask(body)

    assert (answer.kind, answer.amount, answer.released) == (OK, amount, level), answer


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"success": True},
        {"balance": "9.70"},
        {"amount": "0.099"},
        {"amount": "0.099", "fee": "0.001", "net_amount": "0.10"},
        {"gross_amount": "0.20"},
        {"gross_amount": "0.20", "debited": "0.30", "status": "queued"},
        {"debit": {"gross_amount": "0.20"}, "debited": "0.30"},
        {"amount": "0.10", "status": "queued"},
        {"debited": "0.10", "status": "queued"},
        changed(DEBITED, agent_id="agent_other"),
        changed(DEBITED, memo="meterd rel_78"),
        changed(DEBITED, debit={"memo": "meterd rel_78", "gross_amount": "0.10"}),
        changed(DEBITED, success=False),
        changed(DEBITED, error="x"),
        changed(DEBITED, status="failed"),
        {"debits": [{"memo": "meterd rel_78", "gross_amount": "0.10"}]},
        {"debits": [{"memo": "meterd rel_77", "gross_amount": "0.1", "status": "queued"}]},
        {"debited": "x"},
        b"",
        b"<html>",
    ],
    ids=range(21),
)
def test_answer_that_is_no_evidence_is_a_doubt(body):
    """A bare success, a net amount, another debit, another payer: a reading decides."""
    assert ask(body).kind is DOUBT


def test_echo_of_an_amount_counts_only_where_it_was_done():
    """A 202 took note of it."""
    assert ask({"amount": "0.10"}, 201).kind is OK
    assert ask({"amount": "0.10"}, 202).kind is DOUBT
    assert ask({"debited": "0.30"}, 202).kind is OK


def test_first_debit_of_all_is_confirmed_by_its_level():
    """Where the amount is the level too, it is the level."""
    first = Release("rel_1", "agent:payer", 100_000, 0, ReleaseStatus.SENT, "", 0, 0, ())
    answer = answer_to_debit(first, Received(200, {}, b'{"debited":"0.10"}'), MASK, WALL)

    assert (answer.kind, answer.amount, answer.released) == (OK, None, 100_000)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, AnswerKind.DECLINED),
        (402, AnswerKind.EMPTY),
        (403, AnswerKind.FORBIDDEN),
        (404, AnswerKind.MISSING),
        (409, AnswerKind.CONFLICT),
        (429, AnswerKind.LIMITED),
        (500, DOUBT),
        (307, DOUBT),
    ],
)
def test_refusal_of_a_debit_is_read_as_that_of_a_release(status, kind):
    """One table for all that pays."""
    assert ask(ERROR, status).kind is kind


NAMES = st.sampled_from([*WALLET, *DEBITED, "gross_amount", "status", "error", "wallet", "data"])
LEAVES = st.none() | st.booleans() | st.text(max_size=8) | st.integers() | st.floats(allow_nan=True)
VALUES = st.recursive(
    LEAVES | st.sampled_from(["0.10", "0.30", "agent:payer", "meterd rel_77", 0.1, 0.3]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)


@given(st.integers(100, 999), VALUES)
def test_no_answer_raises_and_no_other_amount_is_confirmed(status, value):
    """Whatever a service sends, it becomes a value, and an amount is the one that was asked."""
    answer = ask(value, status)

    assert isinstance(read(value, status), Reading | Unread)
    if answer.kind is OK:
        assert answer.amount in (None, DEBIT.amount)
        assert answer.amount is not None or answer.released is not None


# --- the client -----------------------------------------------------------------------------------


@dataclass
class Recorder:
    """A service that keeps what was asked and answers with what it was told."""

    status: int = 200
    body: Any = None
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append((request.method, request.raw_path, dict(request.headers), body))
        return web.json_response(self.body, status=self.status)


@contextlib.asynccontextmanager
async def serving(handler: Any, **changes: Any) -> AsyncIterator[WalletClient]:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    calls = changes.pop("observe", lambda *_: None)
    async with TestServer(app) as server:
        api = WalletApi(f"http://127.0.0.1:{server.port}/api/v1", KEY, **changes)
        async with WalletClient(api, observe=calls) as client:
            yield client


async def test_debit_is_asked_as_the_contract_has_it():
    """One POST that names the payer, with a plain decimal text, the memo and the key of its row."""
    service = Recorder(body=DEBITED)
    calls: list[tuple[str, str]] = []
    async with serving(service, observe=lambda *seen: calls.append(seen[:2])) as client:
        answer = await client.debit(DEBIT)

    [(method, path, headers, body)] = service.asked
    assert (method, path) == ("POST", "/api/v1/wallet/debit")
    assert body == b'{"agent_id": "agent:payer", "amount": "0.10", "memo": "meterd rel_77"}'
    assert headers["Idempotency-Key"] == "rel_77"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Connection"] == "close"
    assert (answer.kind, calls) == (OK, [("debit", "200")])


async def test_wallet_is_asked_for_by_its_payer():
    """The path of the settings, with the payer in it."""
    service = Recorder(body=WALLET)
    async with serving(service, paths=WalletPaths(status="/w/{id}/state")) as client:
        got = await client.read("agent:payer")

    assert isinstance(got, Reading)
    assert [row[:2] for row in service.asked] == [("GET", "/api/v1/w/agent:payer/state")]


@pytest.mark.parametrize("agent", ["", ".", "..", "../admin", "a/b", "a b", "é", "x" * 65, "a%2f"])
async def test_agent_that_cannot_stand_in_an_address_is_never_asked_for(agent):
    """No wallet belongs to it, and nothing is sent."""
    service = Recorder(body=WALLET)
    odd = Release("rel_1", agent, 100_000, 0, ReleaseStatus.SENT, "", 0, 0, ())
    async with serving(service) as client:
        got = await client.read(agent)
        with pytest.raises(ValueError, match="id"):
            await client.debit(odd)

    assert isinstance(got, Unread)
    assert (got.kind, service.asked) == ("missing", [])


@pytest.mark.parametrize("amount", [0, -1])
async def test_debit_of_nothing_is_refused_before_anything_is_sent(amount):
    """Zero never reaches a service that might take it for everything."""
    service = Recorder(body=DEBITED)
    nothing = Release("rel_1", "agent", amount, 0, ReleaseStatus.SENT, "", 0, 0, ())
    async with serving(service) as client:
        with pytest.raises(ValueError, match="more than 0"):
            await client.debit(nothing)

    assert service.asked == []


@pytest.mark.parametrize(("minimum", "asked"), [(100_001, 0), (100_000, 1)])
async def test_debit_below_the_minimum_is_declined_before_anything_is_sent(minimum, asked):
    """What the service would refuse is not asked for, and a person learns which key to change."""
    service = Recorder(body=DEBITED)
    async with serving(service, minimum_micros=minimum) as client:
        answer = await client.debit(DEBIT)

    assert len(service.asked) == asked
    assert answer.kind is (OK if asked else AnswerKind.DECLINED)
    assert asked or "raise min_release" in answer.detail


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def test_debit_knows_whether_it_left():
    """Nobody listening is certain; an answer that does not come is a doubt."""

    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        return web.Response()

    async with WalletClient(WalletApi(f"http://127.0.0.1:{closed_port()}", KEY)) as client:
        unsent, unread = await client.debit(DEBIT), await client.read("agent")
    async with serving(hang, request_timeout_s=0.2) as client:
        doubt = await client.debit(DEBIT)

    assert (unsent.kind, doubt.kind) == (AnswerKind.NOT_SENT, DOUBT)
    assert isinstance(unread, Unread)
    assert unread.kind == "unavailable"


# --- the probe ------------------------------------------------------------------------------------

POOR = (402, {"error": "insufficient_funds"})
NO_ROUTE = (404, {"error": "not_found"})


@contextlib.asynccontextmanager
async def probing(get: Any, post: Any, other: Any = NO_ROUTE) -> AsyncIterator[WalletClient]:
    async def handler(request: web.Request) -> web.StreamResponse:
        known = request.path.endswith("/debit")
        status, body = get if request.method == "GET" else post if known else other
        return web.json_response(body, status=status)

    async with serving(handler) as client:
        yield client


async def test_probe_finds_a_wallet_that_can_be_paid_from():
    """The figures and the way the call refuses an agent that is made up, for a person."""
    async with probing((200, WALLET), POOR) as client:
        found = await client.probe("agent:payer")

    assert found == (
        "the key reads the wallet of agent:payer: 9.70 left, 0.30 debited so far; "
        "/wallet/debit exists: 402 insufficient_funds"
    )


async def test_probe_debits_only_an_agent_that_is_made_up():
    """The payer itself is read and never debited, not even by a probe."""
    service = Recorder(404, {"error": "not_found"})
    async with serving(service) as client:
        with pytest.raises(Refused):
            await client.probe("agent:payer")
        await client._probe_call("/wallet/debit", "agent_meterd_probe_1")

    posts = [json.loads(body) for method, _, _, body in service.asked if method == "POST"]
    assert [(post["agent_id"], post["amount"]) for post in posts] == [
        ("agent_meterd_probe_1", "0.01")
    ]


@pytest.mark.parametrize(
    ("get", "post", "error", "words"),
    [
        ((200, changed(WALLET, debited="absent")), POOR, Refused, "cannot pay exactly"),
        ((401, {"error": f"bad {KEY}"}), POOR, Refused, r"wallet\.api_key"),
        ((403, ERROR), POOR, Refused, "may not read"),
        ((404, ERROR), POOR, Refused, "payer of the agreement"),
        ((503, ERROR), POOR, Unavailable, "some words"),
        ((200, WALLET), NO_ROUTE, Refused, r"wallet\.paths\.debit"),
        ((200, WALLET), (200, DEBITED), Refused, "does not exist"),
        ((200, WALLET), (500, {"x": 1}), Refused, "without the documented error"),
    ],
)
async def test_probe_refuses_a_wallet_that_must_not_be_used(get, post, error, words):
    """What cannot be paid from exactly is refused in words that say what to do, without the key."""
    async with probing(get, post) as client:
        with pytest.raises(error, match=words) as caught:
            await client.probe("agent:payer")

    assert KEY not in str(caught.value)


def test_every_mistake_of_the_settings_is_told_at_once():
    """One error lists all of them under the wallet's keys, and none shows the key."""
    with pytest.raises(ConfigurationError) as caught:
        WalletApi(
            "http://example.com",
            f"{KEY}\n",
            paths=WalletPaths(debit="/debit/{id}", status="/wallet"),
            minimum_micros=0,
        )

    assert [mistake.key for mistake in caught.value.mistakes] == [
        "wallet.base_url",
        "wallet.api_key",
        "wallet.paths",
        "wallet.paths",
        "wallet.minimum",
    ]
    assert KEY not in str(caught.value)
    assert KEY not in repr(WalletApi("https://example.com", KEY))
