"""The escrow service over real HTTP: its contract, each of its faults, and a kill -9 at work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from meterd.core.money import format_amount, parse_amount
from meterd.errors import ConfigurationError, StoreFailed, StoreLocked
from meterd.sandbox import store
from meterd.sandbox.server import API, SandboxSettings, build, running, serve
from meterd.sandbox.store import Store

PAYER, PROVIDER, STRANGER = "key-payer", "key-provider", "key-stranger"
KEYS = {PAYER: "payer", PROVIDER: "provider", STRANGER: "stranger"}


@dataclass(frozen=True, slots=True)
class Got:
    """One answer: its status, its text, and its JSON document where it is one."""

    status: int
    text: str
    headers: Any

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Client:
    """One user of the service; keys are chosen call by call, redirects are not followed."""

    def __init__(self, origin: str, session: aiohttp.ClientSession) -> None:
        self.origin = origin
        self._session = session

    async def ask(
        self, method: str, path: str, body: Any = None, key: str | None = PROVIDER, **headers: str
    ) -> Got:
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) else None
        async with self._session.request(
            method,
            self.origin + path,
            data=data,
            json=None if data is not None else body,
            headers=named,
            allow_redirects=False,
        ) as answer:
            return Got(answer.status, (await answer.read()).decode(), answer.headers)

    async def get(self, path: str, key: str | None = PROVIDER) -> Got:
        return await self.ask("GET", API + path, key=key)

    async def post(
        self, path: str, body: Any = None, key: str | None = PROVIDER, **headers: str
    ) -> Got:
        return await self.ask("POST", API + path, body, key, **headers)

    async def create(self, amount: str = "10.00", **fields: Any) -> str:
        got = await self.post(
            "/escrow", {"to_agent_id": "provider", "amount": amount, **fields}, PAYER
        )
        assert got.status == 201, got.text
        return str(got.json["escrow_id"])

    async def release(self, escrow_id: str, amount: str = "0.01", **headers: str) -> Got:
        return await self.post(
            f"/escrow/{escrow_id}/release-partial", {"amount": amount}, **headers
        )

    async def released(self, escrow_id: str) -> str:
        return str((await self.get(f"/escrow/{escrow_id}")).json["released_amount"])

    async def fault(self, kind: str, **fields: Any) -> Got:
        got = await self.ask("POST", "/_faults", {"kind": kind, **fields}, key=None)
        assert got.status in (200, 201), got.text
        return got

    async def advance(self, seconds: float) -> None:
        got = await self.ask("POST", "/_clock", {"advance_s": seconds}, key=None)
        assert got.status == 200, got.text

    async def operations(self, escrow_id: str, **query: str) -> list[dict[str, Any]]:
        path = f"/_operations?escrow_id={escrow_id}" + "".join(
            f"&{k}={v}" for k, v in query.items()
        )
        return list((await self.ask("GET", path, key=None)).json["operations"])

    async def paid(self, escrow_id: str) -> list[str]:
        """The truth: gross amounts of every release, in order."""
        operations = await self.operations(escrow_id)
        return [op["amount"] for op in operations if "release" in op["kind"]]


@pytest.fixture
def settings(tmp_path: Path) -> SandboxSettings:
    return SandboxSettings(data_file=tmp_path / "sandbox.db", listen="127.0.0.1:0", keys=KEYS)


@contextlib.asynccontextmanager
async def client_of(settings: SandboxSettings) -> AsyncIterator[Client]:
    async with running(settings) as origin, aiohttp.ClientSession() as session:
        yield Client(origin, session)


@pytest.fixture
async def client(settings: SandboxSettings) -> AsyncIterator[Client]:
    async with client_of(settings) as one:
        yield one


# The contract.


async def test_payer_creates_an_escrow_and_reads_it_back(client):
    """Every field of the contract is there; money is a decimal string, gross."""
    got = await client.post(
        "/escrow",
        {"to_agent_id": "provider", "amount": "10", "memo": "m", "auto_release_hours": 24},
        PAYER,
    )
    escrow = got.json

    assert got.status == 201
    assert len(escrow["escrow_id"]) == 28
    assert escrow["escrow_id"].startswith("esc_")
    assert escrow["auto_release_at"].endswith("Z")
    expected = {
        "status": "funded",
        "amount": "10.00",
        "released_amount": "0.00",
        "remaining": "10.00",
        "refunded_amount": "0.00",
        "fee": "0.00",
        "currency": "USDC",
        "memo": "m",
        "from_agent_id": "payer",
        "to_agent_id": "provider",
    }
    assert expected == {name: escrow[name] for name in expected}
    read = (await client.get(f"/escrow/{escrow['escrow_id']}")).json
    assert read == {**escrow, "releases": []}


async def test_either_party_releases_a_part_and_the_history_names_it(client):
    """Memo and key come back with each release, so that a client can find its own."""
    escrow_id = await client.create()

    first = await client.release(escrow_id, "1.50", Idempotency_Key="k-1")
    await client.post(
        f"/escrow/{escrow_id}/release-partial", {"amount": "0.000001", "memo": "tiny"}, PAYER
    )

    assert first.json["release"]["net_amount"] == "1.485"
    escrow = (await client.get(f"/escrow/{escrow_id}")).json
    assert (
        *(escrow["status"], escrow["released_amount"], escrow["remaining"], escrow["fee"]),
    ) == ("partially_released", "1.500001", "8.499999", "0.015")
    assert [(r["gross_amount"], r["idempotency_key"], r["memo"]) for r in escrow["releases"]] == [
        ("1.50", "k-1", None),
        ("0.000001", None, "tiny"),
    ]
    assert (await client.get("/wallet/provider")).json["balance"] == "10001.485001"


async def test_a_release_and_a_refund_of_everything_end_an_escrow(client):
    """Empty bodies, whole remainders."""
    first, second = await client.create(), await client.create()
    await client.release(first, "4")

    released = await client.post(f"/escrow/{first}/release", {})
    part = await client.post(f"/escrow/{second}/refund", {"amount": "4"}, PAYER)
    rest = await client.post(f"/escrow/{second}/refund", None, PAYER)

    assert (
        *(released.json["status"], released.json["released_amount"], released.json["remaining"]),
    ) == ("released", "10.00", "0.00")
    assert (part.json["status"], part.json["remaining"]) == ("funded", "6.00")
    assert (rest.json["status"], rest.json["refunded_amount"]) == ("refunded", "10.00")


@pytest.mark.parametrize(
    ("resolution", "status"),
    [("release", "released"), ("refund", "refunded"), ("resume", "funded")],
)
async def test_a_dispute_stops_everything_until_it_is_resolved(client, resolution, status):
    """Releases are refused meanwhile; each resolution leads on."""
    escrow_id = await client.create()
    await client.post(f"/escrow/{escrow_id}/dispute", {}, PAYER)

    refused = await client.release(escrow_id)
    resolved = await client.post(
        f"/escrow/{escrow_id}/dispute/resolve", {"resolution": resolution}, PAYER
    )

    assert (refused.status, refused.json["error"]) == (409, "escrow_disputed")
    assert resolved.json["status"] == status


async def test_the_list_is_paged_and_bounded_and_only_for_its_agent(client):
    """Each escrow exactly once over all pages; another agent's list is refused."""
    made = [await client.create("1", memo="é" * 280) for _ in range(7)]

    seen, cursor, pages = [], "0", 0
    while cursor is not None:
        page = await client.get(f"/escrow?agent_id=provider&limit=3&cursor={cursor}")
        seen += [escrow["escrow_id"] for escrow in page.json["escrows"]]
        cursor, pages = page.json["next_cursor"], pages + 1
    other = await client.get("/escrow?agent_id=provider", STRANGER)

    assert (made, 3) == (seen, 3)
    assert other.status == 403


async def test_a_page_of_the_list_stays_below_what_clients_read(client):
    """64 KiB, whatever the memos are."""
    await asyncio.gather(*(client.create("1", memo="\U0001f600" * 280) for _ in range(60)))

    page = await client.get("/escrow?limit=1000")

    assert len(page.text.encode()) < 64 * 1024
    assert page.json["next_cursor"] is not None


async def test_wallets_are_debited_and_the_faucet_gives_once(client):
    """The amount goes to the asker; who has nothing pays nothing."""
    debited = await client.post("/wallet/debit", {"agent_id": "payer", "amount": "0.01"})
    too_much = await client.post("/wallet/debit", {"agent_id": "payer", "amount": "999999"})
    first = await client.post("/faucet", {"agent_id": "newcomer"})
    second = await client.post("/faucet", {"agent_id": "newcomer"})

    assert (debited.status, debited.json["balance"]) == (200, "9999.99")
    assert (await client.get("/wallet/provider")).json["balance"] == "10000.01"
    assert (too_much.status, too_much.json["error"]) == (402, "insufficient_funds")
    assert (first.status, first.json["balance"]) == (200, "1.00")
    assert (second.status, second.json["error"]) == (409, "faucet_taken")
    assert (await client.get("/wallet/nobody")).status == 404


async def test_a_wallet_tells_each_payee_what_it_has_debited(client):
    """The level and the history are of the payee that asks; the balance is of the payer."""
    body = {"agent_id": "payer", "amount": "0.02", "memo": "m"}
    first = await client.post("/wallet/debit", body, Idempotency_Key="k-1")
    await client.post("/wallet/debit", {**body, "amount": "0.03"}, STRANGER)
    second = await client.post("/wallet/debit", {**body, "amount": "0.01"})

    assert (first.json["debited"], second.json["debited"]) == ("0.02", "0.03")
    assert first.json["debit"]["gross_amount"] == "0.02"
    wallet = (await client.get("/wallet/payer")).json
    assert (wallet["balance"], wallet["debited"], wallet["to_agent_id"]) == (
        "9999.94",
        "0.03",
        "provider",
    )
    assert [(d["gross_amount"], d["memo"], d["idempotency_key"]) for d in wallet["debits"]] == [
        ("0.02", "m", "k-1"),
        ("0.01", "m", None),
    ]
    assert (await client.get("/wallet/payer", STRANGER)).json["debited"] == "0.03"
    assert (await client.get("/wallet/payer", PAYER)).json["debited"] == "0.00"


async def test_a_wallet_shows_no_more_debits_than_clients_read(client):
    """The history is bounded; the level is of all of them."""
    body = {"agent_id": "payer", "amount": "0.01", "memo": "\U0001f600" * 280}
    for _ in range(25):
        await client.post("/wallet/debit", body)

    got = await client.get("/wallet/payer")

    assert (len(got.json["debits"]), got.json["debited"]) == (20, "0.25")
    assert len(got.text.encode()) < 64 * 1024


@pytest.mark.parametrize(("minimum", "status"), [(10_000, 400), (0, 200)])
async def test_the_smallest_debit_is_a_setting(settings, minimum, status):
    """What is below it is refused and moves nothing."""
    async with client_of(replace(settings, wallet_minimum=minimum)) as client:
        got = await client.post("/wallet/debit", {"agent_id": "payer", "amount": "0.009999"})
        level = (await client.get("/wallet/payer")).json["debited"]

    assert got.status == status
    assert level == ("0.00" if status == 400 else "0.009999")
    assert status == 200 or got.json["error"] == "amount_below_minimum"


NEW = {"to_agent_id": "provider", "amount": "10.00"}
PART = "/escrow/{id}/release-partial"
REFUSALS = [
    # (what, method, path, body, key, status, error)
    ("no key", "GET", "/escrow/{id}", None, None, 401, "unauthorized"),
    ("wrong key", "POST", PART, {"amount": "1"}, "other", 401, "unauthorized"),
    ("key of a stranger", "POST", PART, {"amount": "1"}, STRANGER, 403, "forbidden"),
    ("read by a stranger", "GET", "/escrow/{id}", None, STRANGER, 403, "forbidden"),
    (
        "below a dollar",
        "POST",
        "/escrow",
        {**NEW, "amount": "0.99"},
        PAYER,
        400,
        "amount_below_minimum",
    ),
    (
        "creation without amount",
        "POST",
        "/escrow",
        {"to_agent_id": "a"},
        PAYER,
        400,
        "amount_required",
    ),
    ("creation without provider", "POST", "/escrow", {"amount": "1"}, PAYER, 400, "invalid_agent"),
    (
        "creation for oneself",
        "POST",
        "/escrow",
        {**NEW, "to_agent_id": "payer"},
        PAYER,
        400,
        "same_agent",
    ),
    (
        "bad provider",
        "POST",
        "/escrow",
        {**NEW, "to_agent_id": "../a"},
        PAYER,
        400,
        "invalid_agent",
    ),
    (
        "bad deadline",
        "POST",
        "/escrow",
        {**NEW, "auto_release_hours": 0},
        PAYER,
        400,
        "invalid_deadline",
    ),
    ("poor payer", "POST", "/escrow", {**NEW, "amount": "10001"}, PAYER, 402, "insufficient_funds"),
    ("no amount", "POST", PART, {}, PROVIDER, 400, "amount_required"),
    ("amount null", "POST", PART, {"amount": None}, PROVIDER, 400, "invalid_amount"),
    ("amount empty", "POST", PART, {"amount": ""}, PROVIDER, 400, "invalid_amount"),
    ("amount zero", "POST", PART, {"amount": "0.00"}, PROVIDER, 400, "invalid_amount"),
    ("amount negative", "POST", PART, {"amount": "-1"}, PROVIDER, 400, "invalid_amount"),
    ("amount a float", "POST", PART, {"amount": 0.01}, PROVIDER, 400, "invalid_amount"),
    ("amount an integer", "POST", PART, {"amount": 1}, PROVIDER, 400, "invalid_amount"),
    ("seven decimals", "POST", PART, {"amount": "0.0000001"}, PROVIDER, 400, "invalid_amount"),
    ("an exponent", "POST", PART, {"amount": "2e-06"}, PROVIDER, 400, "invalid_amount"),
    (
        "over-release",
        "POST",
        PART,
        {"amount": "10.000001"},
        PROVIDER,
        402,
        "insufficient_remaining",
    ),
    (
        "refund of null",
        "POST",
        "/escrow/{id}/refund",
        {"amount": None},
        PAYER,
        400,
        "invalid_amount",
    ),
    (
        "over-refund",
        "POST",
        "/escrow/{id}/refund",
        {"amount": "11"},
        PAYER,
        402,
        "insufficient_remaining",
    ),
    (
        "unknown escrow",
        "POST",
        "/escrow/esc_no/release-partial",
        {"amount": "1"},
        PROVIDER,
        404,
        "escrow_not_found",
    ),
    ("reading an unknown one", "GET", "/escrow/esc_no", None, PROVIDER, 404, "escrow_not_found"),
    (
        "resolving no dispute",
        "POST",
        "/escrow/{id}/dispute/resolve",
        {"resolution": "resume"},
        PAYER,
        409,
        "not_disputed",
    ),
    (
        "nonsense resolution",
        "POST",
        "/escrow/{id}/dispute/resolve",
        {},
        PAYER,
        400,
        "invalid_resolution",
    ),
    ("no JSON", "POST", PART, b"{", PROVIDER, 400, "invalid_json"),
    ("a list", "POST", PART, b"[]", PROVIDER, 400, "invalid_json"),
    ("deep nesting", "POST", PART, b"[" * 60_000, PROVIDER, 400, "invalid_json"),
    ("too large a body", "POST", PART, b" " * 70_000, PROVIDER, 413, "request_entity_too_large"),
    ("unknown path", "POST", "/nothing", {}, PROVIDER, 404, "not_found"),
    ("wrong method", "DELETE", "/escrow/{id}", None, PROVIDER, 405, "method_not_allowed"),
    ("bad cursor", "GET", "/escrow?cursor=-1", None, PROVIDER, 400, "invalid_query"),
]


@pytest.mark.parametrize("row", REFUSALS, ids=[row[0] for row in REFUSALS])
async def test_a_bad_request_gets_its_documented_refusal_and_moves_nothing(client, row):
    """Status and `{error, message}`; the log has nothing but the creation."""
    _, method, path, body, key, status, error = row
    escrow_id = await client.create()

    got = await client.ask(method, API + path.replace("{id}", escrow_id), body, key)

    assert (status, error) == (got.status, got.json["error"])
    assert set(got.json) == {"error", "message"}
    assert [op["kind"] for op in await client.operations(escrow_id)] == ["create"]


@pytest.mark.parametrize(
    ("end", "error"), [("release", "already_released"), ("refund", "already_refunded")]
)
async def test_an_ended_escrow_answers_409(client, end, error):
    """Whatever is asked of it then."""
    escrow_id = await client.create()
    await client.post(f"/escrow/{escrow_id}/{end}", {}, PAYER)

    answers = [
        await client.release(escrow_id),
        await client.post(f"/escrow/{escrow_id}/release", {}),
    ]

    assert [(409, error)] * 2 == [(got.status, got.json["error"]) for got in answers]


# Time.


@pytest.mark.parametrize(
    ("fields", "status", "released"),
    [
        ({}, "released", "10.00"),
        ({"on_deadline": "release"}, "released", "10.00"),
        ({"on_deadline": "refund"}, "expired", "1.00"),
    ],
)
async def test_a_deadline_pays_when_the_clock_passes_it(client, fields, status, released):
    """Not a second earlier."""
    escrow_id = await client.create(auto_release_hours=2, **fields)
    await client.release(escrow_id, "1.00")

    await client.advance(7100)
    before = (await client.get(f"/escrow/{escrow_id}")).json
    await client.advance(200)
    after = (await client.get(f"/escrow/{escrow_id}")).json

    assert before["status"] == "partially_released"
    assert (status, released) == (after["status"], after["released_amount"])


async def test_a_deadline_in_a_dispute_waits_for_its_resolution(client):
    """Resumed, the escrow ends at once."""
    escrow_id = await client.create(auto_release_hours=1)
    await client.post(f"/escrow/{escrow_id}/dispute", {}, PAYER)
    await client.advance(4000)

    disputed = (await client.get(f"/escrow/{escrow_id}")).json["status"]
    await client.post(f"/escrow/{escrow_id}/dispute/resolve", {"resolution": "resume"}, PAYER)

    assert disputed == "disputed"
    assert (await client.get(f"/escrow/{escrow_id}")).json["status"] == "released"


async def test_the_other_direction_is_a_setting(settings):
    """`deadline = "refund"` gives the remainder back."""
    async with client_of(replace(settings, deadline="refund")) as client:
        escrow_id = await client.create(auto_release_hours=1)
        await client.advance(3700)

        assert (await client.get(f"/escrow/{escrow_id}")).json["status"] == "expired"


async def test_a_limit_of_a_minute_is_kept_for_each_escrow(settings):
    """429 without Retry-After, and none once the minute is over."""
    async with client_of(replace(settings, rate_limit_per_minute=2)) as client:
        first, second = await client.create(), await client.create()

        answers = [await client.release(first) for _ in range(3)]
        other = await client.release(second)
        await client.advance(61)
        later = await client.release(first)

        assert [got.status for got in answers] == [200, 200, 429]
        assert "Retry-After" not in answers[2].headers
        assert (other.status, later.status) == (200, 200)


@pytest.mark.parametrize(
    "body", [{}, {"advance_s": "5"}, {"advance_s": 1e300}, {"advance_s": 10**10}]
)
async def test_a_clock_is_not_moved_by_nonsense(client, body):
    """400, and the time is as it was."""
    got = await client.ask("POST", "/_clock", body, key=None)

    assert got.status == 400


async def test_the_clock_is_told_and_may_be_turned_back(client):
    """A day back is a day back."""
    before = (await client.ask("GET", "/_clock", key=None)).json["now"]
    await client.advance(-86_400)

    after = (await client.ask("GET", "/_clock", key=None)).json["now"]

    assert after < before


async def test_a_wallet_is_filled_by_control(client):
    """Play money for as large an escrow as a test wants, within what there is."""
    filled = await client.ask(
        "POST", "/_wallet", {"agent_id": "payer", "amount": "90000"}, key=None
    )
    bad = await client.ask("POST", "/_wallet", {"agent_id": "payer", "amount": 5}, key=None)

    assert (filled.status, filled.json["balance"]) == (200, "100000.00")
    assert (bad.status, bad.json["error"]) == (400, "invalid_amount")
    await client.create("100000")


# The log and its sums.


async def test_the_log_is_what_the_escrows_say(client):
    """Sum of operations = released, refunded and fee; granted = wallets + remaining + fees."""
    ids = [await client.create() for _ in range(3)]
    await asyncio.gather(*(client.release(ids[n % 3], f"0.{n + 1:06}") for n in range(30)))
    await client.post(f"/escrow/{ids[0]}/refund", {"amount": "2"}, PAYER)
    await client.post(f"/escrow/{ids[1]}/release", {})
    await client.fault("foreign_release", escrow_id=ids[2], amount="0.5")

    totals = (await client.ask("GET", "/_totals", key=None)).json
    for escrow_id in ids:
        paid = sum(map(parse_amount, await client.paid(escrow_id)))
        of_one = (await client.ask("GET", f"/_totals?escrow_id={escrow_id}", key=None)).json
        assert await client.released(escrow_id) == format_amount(paid) == of_one["released_amount"]

    by_kind = totals["operations"]
    releases = [kind for kind in by_kind if "release" in kind]
    amount = {kind: parse_amount(line["amount"]) for kind, line in by_kind.items()}
    assert by_kind["release_partial"]["count"] == 30
    assert parse_amount(totals["released_amount"]) == sum(amount[kind] for kind in releases)
    assert parse_amount(totals["refunded_amount"]) == amount["refund"]
    held = ("wallets", "remaining", "fee")
    assert amount["opening"] == sum(parse_amount(totals[name]) for name in held)


async def test_the_log_is_paged(client):
    """`after` goes on behind `next`, to the end."""
    escrow_id = await client.create()
    for _ in range(4):
        await client.release(escrow_id)

    seen, after = [], 0
    while after is not None:
        path = f"/_operations?escrow_id={escrow_id}&limit=2&after={after}"
        page = (await client.ask("GET", path, key=None)).json
        seen += [op["kind"] for op in page["operations"]]
        after = page["next"]

    assert seen == ["create"] + ["release_partial"] * 4


async def test_every_post_is_counted_whatever_became_of_it(client):
    """The sandbox knows how often a release row was sent."""
    escrow_id = await client.create()
    await client.fault("error_500_before")
    await client.release(escrow_id, Idempotency_Key="row-1")
    await client.release(escrow_id, Idempotency_Key="row-1")

    got = (await client.ask("GET", "/_requests?idempotency_key=row-1", key=None)).json

    assert [(line["fault"], line["status"]) for line in got["requests"]] == [
        ("error_500_before", 500),
        (None, 200),
    ]


# Idempotency keys.


async def test_by_default_a_repeated_key_pays_again(client):
    """No idempotency may be assumed; the log shows the key twice."""
    escrow_id = await client.create()
    for _ in range(2):
        await client.release(escrow_id, Idempotency_Key="k")

    keys = [op["idempotency_key"] for op in await client.operations(escrow_id)]

    assert keys == [None, "k", "k"]


@pytest.mark.parametrize("how", ["setting", "fault"])
async def test_where_keys_are_honoured_a_repeat_pays_once(settings, how, monkeypatch):
    """One release comes back to twenty at once; another amount under the key is refused."""
    look_up = Store.operation_by_key

    async def slow_look_up(*args: Any) -> Any:
        found = await look_up(*args)
        await asyncio.sleep(0.01)  # A slow disk: all twenty are under way before the first pays.
        return found

    monkeypatch.setattr(Store, "operation_by_key", slow_look_up)
    async with client_of(replace(settings, honour_idempotency=how == "setting")) as client:
        if how == "fault":
            await client.fault("honour_idempotency")
        escrow_id = await client.create()

        answers = await asyncio.gather(
            *(client.release(escrow_id, "0.5", Idempotency_Key="k") for _ in range(20))
        )
        other = await client.release(escrow_id, "0.6", Idempotency_Key="k")

        assert {200} == {got.status for got in answers}
        assert len({got.json["release"]["release_id"] for got in answers}) == 1
        assert (other.status, other.json["error"]) == (409, "idempotency_key_reused")
        assert await client.paid(escrow_id) == ["0.50"]


@pytest.mark.parametrize("order", ["retry first", "late first"])
async def test_where_keys_are_honoured_what_lands_late_pays_no_second_time(settings, order):
    """Whether the retry or the lost request arrives first, one of them moves nothing."""
    async with client_of(replace(settings, honour_idempotency=True)) as client:
        escrow_id = await client.create()
        await client.fault("land_late", seconds=60, status=504)
        await client.release(escrow_id, Idempotency_Key="k")

        if order == "late first":
            await client.advance(61)
        retry = await client.release(escrow_id, Idempotency_Key="k")
        await client.advance(61)

        assert (
            (await client.ask("GET", "/_requests", key=None)).json["requests"][-2]["status"],
            retry.status,
        ) == (504, 200)
        assert await client.paid(escrow_id) == ["0.01"]


async def test_where_keys_are_honoured_a_debit_is_made_once_for_each_payer_and_payee(settings):
    """The key counts between two agents; late, repeated or at once, one debit moves money."""
    async with client_of(replace(settings, honour_idempotency=True)) as client:
        body = {"agent_id": "payer", "amount": "0.5"}
        await client.create("1", memo="the payer used this key too")
        await client.fault("land_late", call="debit", escrow_id="payer", seconds=60, status=504)
        await client.post("/wallet/debit", body, Idempotency_Key="k")

        answers = await asyncio.gather(
            *(client.post("/wallet/debit", body, Idempotency_Key="k") for _ in range(20))
        )
        other = await client.post("/wallet/debit", {**body, "amount": "1"}, Idempotency_Key="k")
        stranger = await client.post("/wallet/debit", body, STRANGER, Idempotency_Key="k")
        await client.advance(61)

        assert {(got.status, got.json["debited"]) for got in answers} == {(200, "0.50")}
        assert len({got.json["debit"]["debit_id"] for got in answers}) == 1
        assert (other.status, other.json["error"]) == (409, "idempotency_key_reused")
        assert stranger.json["debited"] == "0.50"
        log = await client.ask("GET", "/_operations?kind=debit&agent_id=payer", key=None)
        assert [(op["to_agent_id"], op["amount"]) for op in log.json["operations"]] == [
            ("provider", "0.50"),
            ("stranger", "0.50"),
        ]


async def test_a_request_is_counted_while_its_answer_is_still_held_back(client):
    """A row that was sent was sent, whether or not an answer ever comes."""
    escrow_id = await client.create()
    await client.fault("delay_answer", call="release_partial", seconds=600)
    held = asyncio.create_task(client.release(escrow_id, Idempotency_Key="k"))
    while not await client.paid(escrow_id):
        pass  # Each look is a request of its own.

    got = (await client.ask("GET", "/_requests?idempotency_key=k", key=None)).json

    assert [(r["fault"], r["status"]) for r in got["requests"]] == [("delay_answer", None)]
    held.cancel()


# Faults.


BROKEN = [
    # (kind, what it is told, status, text in the answer, times paid)
    ("error_500_before", {}, 500, '"error":"internal_error"', 0),
    ("error_500_after", {}, 500, '"error":"internal_error"', 1),
    ("error_500_after", {"status": 503}, 503, '"error":"internal_error"', 1),
    ("rate_limit", {}, 429, '"error":"rate_limited"', 0),
    ("conflict_409", {}, 409, '"error":"conflict"', 0),
    ("unauthorized_401", {}, 401, '"error":"unauthorized"', 0),
    ("html_page", {"status": 200}, 200, "<!DOCTYPE html>", 1),
    ("html_page", {"status": 502, "moves": False}, 502, "<!DOCTYPE html>", 0),
    ("empty_200", {}, 200, "", 1),
    ("empty_200", {"moves": False}, 200, "", 0),
    ("empty_object_200", {}, 200, "{}", 1),
    ("numbers_instead_of_strings", {}, 200, '"remaining":9.99,', 1),
    ("float_noise", {}, 200, '"remaining":9.990000000000001,', 1),
    ("extra_fields", {}, 200, '"api_version":"9"', 1),
    ("wrong_escrow_id", {}, 200, '"escrow_id":"esc_AAAAAAAAAAAAAAAAAAAAAAAA"', 1),
    ("echo_key_in_error", {}, 500, "Bearer key-provider", 0),
    ("released_above_total", {}, 200, '"released_amount":"11.00"', 1),
    ("redirect", {"status": 301}, 301, '"error":"moved"', 0),
    ("redirect", {"status": 302}, 302, '"error":"moved"', 0),
    ("redirect", {"status": 307}, 307, '"error":"moved"', 0),
    ("redirect", {"status": 308}, 308, '"error":"moved"', 0),
    ("delay_answer", {"seconds": 0.01}, 200, '"released_amount":"0.01"', 1),
    ("duplicate_delivery", {}, 200, '"released_amount":"0.01"', 2),
    ("land_late", {"seconds": 60, "status": 202}, 202, '"released_amount":"0.00"', 0),
]


@pytest.mark.parametrize("row", BROKEN, ids=lambda row: f"{row[0]}-{row[1]}")
async def test_a_fault_strikes_once_and_the_log_knows_what_was_paid(client, row):
    """The answer lies as it was told to; then all is well again."""
    kind, told, status, text, times = row
    escrow_id = await client.create()
    await client.fault(kind, call="release_partial", escrow_id=escrow_id, **told)

    got = await client.release(escrow_id)
    paid = await client.operations(escrow_id, kind="release_partial")
    after = await client.release(escrow_id)

    assert status == got.status
    assert text in got.text
    assert [kind] * times == [op["outcome"] for op in paid]
    assert (after.status, after.json["status"]) == (200, "partially_released")


CUT = [("close_before", 0), ("close_after", 1), ("close_during_answer", 1), ("land_late", 0)]


@pytest.mark.parametrize(("kind", "times"), CUT, ids=[row[0] for row in CUT])
async def test_a_connection_is_cut_before_or_after_the_money_moved(client, kind, times):
    """The asker sees the same error each time."""
    escrow_id = await client.create()
    await client.fault(kind, call="release_partial")

    with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError)):
        await client.release(escrow_id)

    assert await client.paid(escrow_id) == ["0.01"] * times


async def test_half_a_document_arrives_as_a_whole_answer(client):
    """Truncated JSON, with a Content-Length that fits."""
    escrow_id = await client.create()
    await client.fault("truncated_json", call="release_partial")

    got = await client.release(escrow_id)

    with pytest.raises(json.JSONDecodeError):
        _ = got.json
    assert await client.paid(escrow_id) == ["0.01"]


async def test_a_body_without_end_goes_on_until_the_reader_leaves(client, settings):
    """More than any limit a client could have set; the service is well afterwards."""
    escrow_id = await client.create()
    await client.fault("endless_body", call="get")
    url = f"{client.origin}{API}/escrow/{escrow_id}"
    headers = {"Authorization": f"Bearer {PAYER}"}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        beginning = await answer.content.readexactly(1 << 20)

    assert beginning.startswith(b'{"escrow_id":"')
    assert await client.released(escrow_id) == "0.00"


@pytest.mark.parametrize("value", ["5", "0", "-1", "99999999999999999999", "soon"])
async def test_a_429_tells_any_retry_after(client, value):
    """Absurd ones too."""
    escrow_id = await client.create()
    await client.fault("rate_limit", retry_after=value)

    got = await client.release(escrow_id)

    assert (429, value) == (got.status, got.headers["Retry-After"])


async def test_a_request_lands_later_than_the_next_reading(client):
    """Lost now, paid in a minute, without anybody asking again."""
    escrow_id = await client.create()
    await client.fault("land_late", seconds=60)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await client.release(escrow_id)

    before = await client.released(escrow_id)
    await client.advance(61)

    assert (before, await client.released(escrow_id)) == ("0.00", "0.01")
    assert (await client.operations(escrow_id))[-1]["outcome"] == "land_late"


async def test_a_409_on_repeat_lets_the_first_request_through(client):
    """The second with the same key is told so."""
    escrow_id = await client.create()
    await client.fault("conflict_409", on_repeat=True)

    answers = [await client.release(escrow_id, Idempotency_Key=k) for k in ("a", "b", "a")]

    assert [got.status for got in answers] == [200, 200, 409]


async def test_stale_readings_lag_behind_the_writes(client):
    """A reading shows the escrow as it was some seconds ago, history included."""
    escrow_id = await client.create()
    await client.fault("stale_reads", seconds=10)
    await client.release(escrow_id)

    stale = (await client.get(f"/escrow/{escrow_id}")).json
    await client.advance(11)

    assert (stale["released_amount"], stale["status"], stale["releases"]) == ("0.00", "funded", [])
    assert await client.released(escrow_id) == "0.01"


async def test_a_reading_goes_backwards_once(client):
    """Forward, back, forward again."""
    escrow_id = await client.create()
    await client.release(escrow_id)
    await client.release(escrow_id)
    before = await client.released(escrow_id)
    await client.fault("backwards_read")

    assert [before, "0.01", "0.02"] == [
        before,
        await client.released(escrow_id),
        await client.released(escrow_id),
    ]


async def test_a_500_after_the_payment_may_hide_it_for_a_while(client):
    """Status then still says funded, until the lag is over or the faults are cleared."""
    escrow_id = await client.create()
    await client.fault("error_500_after", call="release_partial", status_lag=30)
    await client.release(escrow_id)

    hidden = (await client.get(f"/escrow/{escrow_id}")).json
    await client.advance(31)

    assert (hidden["status"], hidden["released_amount"]) == ("funded", "0.00")
    assert await client.released(escrow_id) == "0.01"


async def test_a_307_that_is_followed_pays_and_the_log_shows_it(client):
    """Without a location it points back to the same call."""
    escrow_id = await client.create()
    await client.fault("redirect", call="release_partial")

    got = await client.release(escrow_id)
    assert await client.paid(escrow_id) == []
    await client.ask("POST", got.headers["Location"], {"amount": "0.01"})

    assert await client.paid(escrow_id) == ["0.01"]


async def test_a_redirect_may_lead_elsewhere(client):
    """The location is as told."""
    escrow_id = await client.create()
    await client.fault("redirect", location="http://127.0.0.1:9/elsewhere")

    got = await client.release(escrow_id)

    assert got.headers["Location"] == "http://127.0.0.1:9/elsewhere"


OTHERS = [
    ("foreign_release", {"amount": "0.50"}, "partially_released", "0.50", "0.00"),
    ("foreign_release", {}, "released", "10.00", "0.00"),
    ("refund", {}, "refunded", "0.00", "10.00"),
    ("refund", {"amount": "3"}, "funded", "0.00", "3.00"),
    ("dispute", {}, "disputed", "0.00", "0.00"),
    ("expire", {}, "expired", "0.00", "10.00"),
    ("auto_release", {}, "released", "10.00", "0.00"),
]


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: f"{row[0]}-{row[1]}")
async def test_another_hand_moves_the_escrow_at_once(client, row):
    """By the service, by a person, by the other party: it is done when the fault is posted."""
    kind, told, *expected = row
    escrow_id = await client.create()

    await client.fault(kind, escrow_id=escrow_id, **told)

    escrow = (await client.get(f"/escrow/{escrow_id}")).json
    fields = ("status", "released_amount", "refunded_amount")
    assert expected == [escrow[name] for name in fields]


async def test_another_hand_on_an_unknown_escrow_is_told_so(client):
    """404, as for anybody."""
    got = await client.ask("POST", "/_faults", {"kind": "expire", "escrow_id": "esc_no"}, key=None)

    assert (got.status, got.json["error"]) == (404, "escrow_not_found")


async def test_faults_are_listed_and_cleared(client):
    """After DELETE all is well."""
    escrow_id = await client.create()
    await client.fault("error_500_before", count=None)
    listed = (await client.ask("GET", "/_faults", key=None)).json["faults"]

    await client.ask("DELETE", "/_faults", key=None)

    assert [(rule["kind"], rule["left"]) for rule in listed] == [("error_500_before", None)]
    assert (await client.release(escrow_id)).status == 200


async def test_a_mistyped_fault_is_refused_with_what_is_allowed(client):
    """It must not pass for calm."""
    got = await client.ask("POST", "/_faults", {"kind": "error_500"}, key=None)

    assert (got.status, got.json["error"]) == (400, "unknown_fault")
    assert "error_500_before" in got.json["message"]


# Life.


async def test_everything_is_there_after_a_restart(settings):
    """Escrows, wallets, history, clock and deadlines."""
    async with client_of(settings) as client:
        escrow_id = await client.create(auto_release_hours=2)
        await client.release(escrow_id, "1", Idempotency_Key="k")
        await client.post("/wallet/debit", {"agent_id": "payer", "amount": "1"}, STRANGER)
        await client.advance(3600)
        before = (await client.get(f"/escrow/{escrow_id}")).json
        wallet = (await client.get("/wallet/payer", STRANGER)).json

    async with client_of(settings) as client:
        after = (await client.get(f"/escrow/{escrow_id}")).json
        assert wallet == (await client.get("/wallet/payer", STRANGER)).json
        await client.advance(3601)
        ended = (await client.get(f"/escrow/{escrow_id}")).json

        assert before == after
        assert ended["status"] == "released"
        assert (await client.get("/wallet/payer")).json["balance"] == "9989.00"


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"listen": "0.0.0.0:8788"}, "sandbox.listen"),
        ({"listen": "192.0.2.1:8788"}, "sandbox.listen"),
        ({"listen": "example.com:8788"}, "sandbox.listen"),
        ({"listen": ":8788"}, "sandbox.listen"),
        ({"listen": "[::]:8788"}, "sandbox.listen"),
        ({"listen": "127.0.0.1"}, "sandbox.listen"),
        ({"listen": "127.0.0.1:99999"}, "sandbox.listen"),
        ({"keys": {}}, "sandbox.keys"),
        ({"deadline": "nobody"}, "sandbox.deadline"),
        ({"fee_bps": 10_001}, "sandbox.fee_bps"),
        ({"rate_limit_per_minute": 0}, "sandbox.rate_limit_per_minute"),
        ({"wallet_minimum": -1}, "sandbox.wallet_minimum"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, changed, key):
    """Above all an address that others could reach: the controls ask for no key."""
    with pytest.raises(ConfigurationError) as caught:
        build(replace(settings, **changed))

    assert [key] == [mistake.key for mistake in caught.value.mistakes]


async def test_a_second_service_on_the_same_file_is_refused(settings):
    """The first goes on undisturbed."""
    async with client_of(settings) as client:
        with pytest.raises(StoreLocked):
            async with running(settings):
                pass

        assert (await client.release(await client.create())).status == 200


async def test_a_disk_that_fails_ends_the_service(settings, monkeypatch):
    """Nothing is answered as done that is not durable; `serve` raises so that the process ends."""
    origins: asyncio.Queue[str] = asyncio.Queue()

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    serving = asyncio.create_task(serve(settings, origins.put_nowait))
    async with aiohttp.ClientSession() as session:
        client = Client(await origins.get(), session)
        escrow_id = await client.create()
        monkeypatch.setattr("meterd.sandbox.store._commit", fail)
        got = await client.release(escrow_id)

        assert got.status == 500
    with pytest.raises(StoreFailed):
        await serving


async def test_a_reading_shows_nothing_that_is_not_durable(settings, monkeypatch):
    """It waits for the commit of its own escrow; other escrows are read meanwhile."""
    begun, go_on, commit = asyncio.Event(), threading.Event(), store._commit
    loop = asyncio.get_running_loop()

    def held_commit(*args: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(60)
        commit(*args)

    async with client_of(settings) as client:
        escrow_id, other_id = await client.create(), await client.create()
        monkeypatch.setattr("meterd.sandbox.store._commit", held_commit)
        release = asyncio.create_task(client.release(escrow_id))
        await begun.wait()
        reading = asyncio.create_task(client.released(escrow_id))
        others = [await client.released(other_id) for _ in range(5)]
        answered_early = (release.done(), reading.done())
        go_on.set()

        assert (await release).status == 200
        assert await reading == "0.01"
        assert others == ["0.00"] * 5
        assert answered_early == (False, False)


PROGRAM = """
import asyncio, sys
from pathlib import Path
from meterd.sandbox import store
from meterd.sandbox.server import SandboxSettings, serve
keys = {"key-payer": "payer", "key-provider": "provider", "key-stranger": "stranger"}
settings = SandboxSettings(data_file=Path(sys.argv[1]), listen="127.0.0.1:0", keys=keys)
asyncio.run(serve(settings, lambda origin: print(origin, flush=True)))
"""


@contextlib.asynccontextmanager
async def service_process(
    settings: SandboxSettings,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    """The service as a process of its own; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, str(settings.data_file)),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        origin = (await process.stdout.readline()).decode().strip()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            yield process, Client(origin, session)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def release_until_killed(client: Client, escrow_id: str, answered: dict[str, str]) -> None:
    """Release one micro after the other and keep the id and key of everything that was answered."""
    number = 0
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        while True:
            key = f"{escrow_id}-{number}"
            got = await client.release(escrow_id, "0.000001", Idempotency_Key=key)
            assert got.status == 200
            answered[key] = got.json["released_amount"]
            number += 1


async def kill_when(
    process: asyncio.subprocess.Process, answered: dict[str, str], most: int
) -> None:
    while len(answered) < most:
        await asyncio.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)


async def test_everything_answered_survives_a_kill(settings):
    """Kill -9 in the middle of concurrent releases, five times: no answer without its operation."""
    ids: list[str] = []
    answered: dict[str, str] = {}
    for round_number in range(5):
        async with service_process(settings) as (process, client):
            fresh = [await client.create() for _ in range(8)]
            await asyncio.gather(
                kill_when(process, answered, len(answered) + 40 + 17 * round_number),
                *(release_until_killed(client, escrow_id, answered) for escrow_id in fresh),
            )
            ids += fresh

    async with client_of(settings) as client:
        for escrow_id in ids:
            operations = await client.operations(escrow_id, kind="release_partial")
            keys = {op["idempotency_key"] for op in operations}
            known = {key: shown for key, shown in answered.items() if key.startswith(escrow_id)}
            assert set(known) <= keys
            # One request at a time was under way for each escrow: at most one is there unanswered.
            assert len(operations) in (len(known), len(known) + 1)
            assert await client.released(escrow_id) == format_amount(len(operations))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_service_at_once_and_cleanly(settings, number):
    """Exit code 0, even while an answer is held back by a fault; what it moved is there."""
    async with service_process(settings) as (process, client):
        escrow_id = await client.create()
        await client.fault("delay_answer", call="release_partial", seconds=600)
        held = asyncio.create_task(client.release(escrow_id))
        while not await client.paid(escrow_id):
            pass  # Each look is a request of its own.
        process.send_signal(number)

        assert await asyncio.wait_for(process.wait(), 60) == 0
        with pytest.raises(aiohttp.ClientError):
            await held
    async with client_of(settings) as client:
        assert await client.paid(escrow_id) == ["0.01"]
