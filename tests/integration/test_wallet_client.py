"""The wallet's client against the sandbox's own process, over HTTP, with each of its faults."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from meterd.core.settlement import (
    WALLET,
    Answered,
    AnswerKind,
    Due,
    Escrow,
    Go,
    Observed,
    Reading,
    Release,
    ReleaseStatus,
    Rules,
    step,
)
from meterd.errors import Refused
from meterd.escrow.outcomes import Unread
from meterd.escrow.wallet import WalletApi, WalletClient, WalletPaths
from tests.processes import PAYER_KEY, PROVIDER_KEY, Sandbox, call

OPENING = 10_000_000_000
ASKED = 20_000


@dataclass
class World:
    """The sandbox as a process, the client under test, and a payer whom nobody else knows."""

    sandbox: Sandbox
    client: WalletClient
    payer: str

    async def ask(self, method: str, path: str, body: Any = None, key: str = "") -> Any:
        return await asyncio.to_thread(call, method, self.sandbox.base + path, body, key)

    async def fault(self, kind: str, **told: Any) -> None:
        await self.ask("POST", "/_faults", {"kind": kind, "escrow_id": self.payer, **told})

    async def paid(self) -> list[str]:
        """The truth: the amounts of the debits in the service's own log."""
        log = await self.ask("GET", f"/_operations?kind=debit&agent_id={self.payer}")
        return [row["amount"] for row in log["operations"]]

    async def arrived(self) -> int:
        """How many debits were asked for, whatever became of them."""
        log = await self.ask("GET", f"/_requests?call=debit&escrow_id={self.payer}")
        count: int = log["count"]
        return count

    async def read(self) -> Reading:
        got = await self.client.read(self.payer)
        assert isinstance(got, Reading), got
        return got


def client_of(sandbox: Sandbox, key: str = PROVIDER_KEY, **changes: Any) -> WalletClient:
    return WalletClient(WalletApi(sandbox.api, key, **{"request_timeout_s": 10.0, **changes}))


@contextlib.asynccontextmanager
async def world(sandbox: Sandbox) -> AsyncIterator[World]:
    payer = f"agent_{secrets.token_hex(8)}"
    async with client_of(sandbox) as client:
        made = World(sandbox, client, payer)
        await made.ask("POST", "/_wallet", {"agent_id": payer, "amount": "10000"})
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One process for many tests: each has a payer of its own, and the clock only moves on."""
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as sandbox:
        yield sandbox


@pytest.fixture
async def here(shared) -> AsyncIterator[World]:
    async with world(shared) as made:
        yield made


@pytest.fixture
async def mortal(tmp_path) -> AsyncIterator[World]:
    """A process that the test may kill."""
    with Sandbox(tmp_path) as sandbox:
        async with world(sandbox) as made:
            yield made


def release(here: World, amount: int = ASKED, before: int = 0) -> Release:
    name = f"rel_{secrets.token_hex(12)}"
    return Release(name, here.payer, amount, before, ReleaseStatus.SENT, "amount", 0, 0, ())


async def test_debit_is_paid_once_and_confirmed_by_level(here):
    """A debit pays what was asked, and its answer has the gross amount and the level."""
    first, second = release(here), release(here, 10_000, ASKED)

    answers = [await here.client.debit(row) for row in (first, second)]

    assert [(row.kind, row.amount, row.released) for row in answers] == [
        (AnswerKind.CONFIRMED, ASKED, ASKED),
        (AnswerKind.CONFIRMED, 10_000, ASKED + 10_000),
    ]
    assert await here.paid() == ["0.02", "0.01"]
    got = await here.read()
    assert (got.released, got.remaining, got.total) == (30_000, OPENING - 30_000, OPENING)
    assert (got.escrow, got.status, got.refunded, got.deadline) == (here.payer, "active", 0, None)
    assert got.release_ids == {first.id, second.id}
    assert (got.provider, got.currency) == ("agent_provider", "USDC")


async def test_total_of_a_wallet_follows_its_payer_and_the_level_does_not(here):
    """A top-up and money spent elsewhere change what remains, never what was debited."""
    await here.client.debit(release(here))

    await here.ask("POST", "/_wallet", {"agent_id": here.payer, "amount": "5"})
    topped_up = await here.read()
    await here.ask(
        "POST",
        "/api/v1/wallet/debit",
        {"agent_id": here.payer, "to_agent_id": "agent_other", "amount": "7"},
        PAYER_KEY,
    )
    spent = await here.read()

    assert (topped_up.released, spent.released) == (ASKED, ASKED)
    assert topped_up.total == OPENING + 5_000_000
    assert spent.total == OPENING - 2_000_000
    assert len(spent.release_ids) == 1


# (fault, told, kind of the answer, how often money moved)
FAULTS: tuple[tuple[str, dict[str, Any], AnswerKind, int], ...] = (
    ("error_500_before", {}, AnswerKind.DOUBT, 0),
    ("error_500_after", {}, AnswerKind.DOUBT, 1),
    ("error_500_after", {"status": 503}, AnswerKind.DOUBT, 1),
    ("close_before", {}, AnswerKind.DOUBT, 0),
    ("close_after", {}, AnswerKind.DOUBT, 1),
    ("close_during_answer", {}, AnswerKind.DOUBT, 1),
    ("land_late", {}, AnswerKind.DOUBT, 0),
    ("html_page", {}, AnswerKind.DOUBT, 1),
    ("html_page", {"status": 200}, AnswerKind.DOUBT, 1),
    ("html_page", {"status": 403}, AnswerKind.DOUBT, 1),
    ("truncated_json", {}, AnswerKind.DOUBT, 1),
    ("empty_200", {}, AnswerKind.DOUBT, 1),
    ("empty_object_200", {}, AnswerKind.DOUBT, 1),
    ("wrong_escrow_id", {}, AnswerKind.DOUBT, 1),
    ("endless_body", {}, AnswerKind.DOUBT, 1),
    ("echo_key_in_error", {}, AnswerKind.DOUBT, 0),
    ("redirect", {}, AnswerKind.DOUBT, 0),
    ("redirect", {"status": 308}, AnswerKind.DOUBT, 0),
    ("rate_limit", {}, AnswerKind.LIMITED, 0),
    ("conflict_409", {}, AnswerKind.CONFLICT, 0),
    ("unauthorized_401", {}, AnswerKind.KEY_REFUSED, 0),
    ("numbers_instead_of_strings", {}, AnswerKind.CONFIRMED, 1),
    ("float_noise", {}, AnswerKind.CONFIRMED, 1),
    ("float_noise", {"direction": "down"}, AnswerKind.CONFIRMED, 1),
    ("extra_fields", {}, AnswerKind.CONFIRMED, 1),
    ("duplicate_delivery", {}, AnswerKind.CONFIRMED, 2),
)


@pytest.mark.parametrize("row", FAULTS, ids=[f"{n}-{row[0]}" for n, row in enumerate(FAULTS)])
async def test_debit_that_meets_a_fault_leaves_once_and_is_read_right(here, row):
    """Whatever the service does, one request arrives, and what is not certain is a doubt."""
    kind, told, expected, moved = row
    asked = release(here)
    await here.fault(kind, call="debit", **told)

    answer = await here.client.debit(asked)

    assert answer.kind is expected, answer
    assert await here.arrived() == 1
    assert await here.paid() == ["0.02"] * moved
    assert PROVIDER_KEY not in answer.detail
    got = await here.read()
    assert got.released == ASKED * moved
    assert got.release_ids == ({asked.id} if moved else frozenset())


async def test_debit_paid_behind_a_500_may_be_hidden_for_a_while(here):
    """Readings lag behind the debit, then show it, by its level and by its id."""
    asked = release(here)
    await here.fault("error_500_after", call="debit", status_lag=60)

    answer = await here.client.debit(asked)
    hidden = await here.read()
    await here.ask("POST", "/_clock", {"advance_s": 61})
    seen = await here.read()

    assert answer.kind is AnswerKind.DOUBT
    assert (hidden.released, hidden.remaining, hidden.release_ids) == (0, OPENING, frozenset())
    assert (seen.released, seen.release_ids) == (ASKED, {asked.id})


@pytest.mark.parametrize("told", [{}, {"status": 200}, {"status": 202}, {"status": 500}])
async def test_debit_that_lands_late_is_never_taken_for_done(here, told):
    """What was only taken note of is not confirmed as paid, even with a 200."""
    asked = release(here)
    await here.fault("land_late", call="debit", seconds=60, **told)

    answer = await here.client.debit(asked)

    assert answer.kind is not AnswerKind.CONFIRMED or answer.released == asked.before
    assert answer.amount is None
    assert (await here.read()).released == 0
    await here.ask("POST", "/_clock", {"advance_s": 61})
    assert (await here.read()).released == ASKED


@pytest.mark.parametrize("fault", ["stale_reads", "backwards_read"])
async def test_reading_of_a_wallet_may_be_old_but_never_wrong_in_itself(here, fault):
    """An old reading has the level, the balance and the history of its own time."""
    first = release(here)
    await here.client.debit(first)
    await here.client.debit(release(here, 10_000, ASKED))
    told = {"seconds": 30} if fault == "stale_reads" else {}

    await here.fault(fault, call="wallet", **told)
    old = await here.read()

    expected = (ASKED, {first.id}) if fault == "backwards_read" else (0, frozenset())
    assert (old.released, old.release_ids) == expected
    assert (old.total, old.remaining) == (OPENING, OPENING - old.released)


async def test_level_above_what_was_debited_is_handed_on(here):
    """An answer whose level is not what was expected reaches the core as the service said it."""
    await here.fault("released_above_total", call="debit")

    answer = await here.client.debit(release(here))

    assert (answer.amount, answer.released) == (ASKED, ASKED + 1_000_000)


# (fault, told, kind of the failure; None: it is read all the same)
READ_FAULTS: tuple[tuple[str, dict[str, Any], str | None], ...] = (
    ("error_500_before", {}, "unavailable"),
    ("close_before", {"count": 2}, "unavailable"),
    ("close_before", {}, None),
    ("html_page", {"status": 200}, "nonsense"),
    ("truncated_json", {}, "nonsense"),
    ("empty_200", {}, "nonsense"),
    ("empty_object_200", {}, "nonsense"),
    ("endless_body", {}, "nonsense"),
    ("redirect", {}, "unavailable"),
    ("unauthorized_401", {}, "key_refused"),
    ("rate_limit", {"retry_after": "17"}, "limited"),
    ("numbers_instead_of_strings", {}, None),
    ("float_noise", {}, None),
    ("float_noise", {"direction": "down"}, None),
    ("extra_fields", {}, None),
)


@pytest.mark.parametrize("row", READ_FAULTS, ids=[f"{n}-{r[0]}" for n, r in enumerate(READ_FAULTS)])
async def test_reading_that_meets_a_fault_is_exact_or_says_why(here, row):
    """Numbers and noise are read exactly; what cannot be read is a value with its kind."""
    kind, told, expected = row
    await here.client.debit(release(here, 14_850))
    await here.fault(kind, call="wallet", **told)

    got = await here.client.read(here.payer)

    if isinstance(got, Unread):
        assert got.kind == expected, got
    else:
        assert expected is None
        assert (got.total, got.released, got.remaining) == (OPENING, 14_850, OPENING - 14_850)


async def test_refusals_of_the_service_are_declined(here):
    """Too much is refused as empty, a wallet of nobody is missing, a wrong key is told apart."""
    answers = [
        await here.client.debit(release(here, OPENING + 1)),
        await here.client.debit(replace(release(here), escrow="agent_nobody")),
    ]
    nobody = await here.client.read("agent_nobody")
    async with client_of(here.sandbox, "pf_live_somebody_else") as stranger:
        refused = [await stranger.debit(release(here)), await stranger.read(here.payer)]

    assert [answer.kind for answer in answers] == [AnswerKind.EMPTY, AnswerKind.EMPTY]
    assert isinstance(nobody, Unread)
    assert nobody.kind == "missing"
    assert [str(answer.kind) for answer in refused] == ["key_refused", "key_refused"]
    assert await here.paid() == []


async def test_debit_below_the_minimum_is_declined_on_both_sides(here):
    """The client does not ask for it; the service, asked by a careless client, refuses it."""
    careful = await here.client.debit(release(here, 9_999))
    arrived = await here.arrived()
    async with client_of(here.sandbox, minimum_micros=1) as client:
        careless = await client.debit(release(here, 9_999))

    assert (careful.kind, arrived) == (AnswerKind.DECLINED, 0)
    assert "below the wallet's minimum of 0.01" in careful.detail
    assert careless.kind is AnswerKind.DECLINED
    assert "a debit is of at least 0.01" in careless.detail
    assert await here.paid() == []


class Settlement:
    """The state table on one wallet, with a clock that moves 20 s with each input."""

    RULES = Rules(quarantine=30.0, observe_gap=0.0, send_deadline=3600.0, min_interval=0.0)

    def __init__(self, here: World) -> None:
        self.state = Escrow(here.payer, "agr", WALLET)
        self._here = here
        self._mono = 0.0

    def _tell(self, event: Observed | Due | Go | Answered) -> None:
        self.state, _ = step(self.state, event, self.RULES)

    async def observe(self, times: int) -> None:
        for _ in range(times):
            self._mono += 20.0
            reading = replace(await self._here.read(), mono=self._mono)
            self._tell(Observed(reading, self._mono, 0, ASKED))

    async def debit(self) -> None:
        self._mono += 20.0
        name = f"rel_{secrets.token_hex(8)}"
        self._tell(Due(ASKED, "amount", name, 0, self._mono, 0))
        self._tell(Go(self._mono, 0))
        assert self.state.release is not None
        answer = await self._here.client.debit(self.state.release)
        self._tell(Answered(answer, self._mono, 0))


@pytest.mark.parametrize("fault", ["error_500_after", "close_before", "land_late"])
async def test_state_table_settles_a_wallet_as_an_escrow_and_pays_once(here, fault):
    """Adopted by two readings, debited, in doubt, topped up: the level decides what is paid."""
    settlement = Settlement(here)
    await settlement.observe(3)
    await here.fault(fault, call="debit", **({"seconds": 60} if fault == "land_late" else {}))
    # 1. A debit gets lost in one way or another, and the payer tops up meanwhile.
    await settlement.debit()
    assert settlement.state.release is not None
    await here.ask("POST", "/_wallet", {"agent_id": here.payer, "amount": "5"})
    await here.ask("POST", "/_clock", {"advance_s": 61})
    # 2. Readings decide; what is missing after that is asked for once more.
    await settlement.observe(5)
    assert settlement.state.release is None
    if settlement.state.payable(ASKED):
        await settlement.debit()

    state = settlement.state
    assert (state.status.value, state.settled, state.payable(ASKED)) == ("active", ASKED, 0)
    assert await here.paid() == ["0.02"]


async def test_answer_after_the_time_out_is_a_doubt(here):
    """A debit whose answer comes too late was paid all the same."""
    await here.fault("delay_answer", call="debit", seconds=30)
    async with client_of(here.sandbox, request_timeout_s=0.3) as client:
        answer = await client.debit(release(here))

    assert answer.kind is AnswerKind.DOUBT
    assert await here.paid() == ["0.02"]


async def test_level_and_history_survive_a_kill_of_the_service(mortal):
    """What was answered is there after SIGKILL and a restart."""
    here = mortal
    asked = release(here)
    answer = await here.client.debit(asked)

    here.sandbox.kill()
    here.sandbox.start()
    await asyncio.to_thread(here.sandbox.wait_ready)

    got = await here.read()
    assert answer.kind is AnswerKind.CONFIRMED
    assert (got.released, got.remaining, got.release_ids) == (ASKED, OPENING - ASKED, {asked.id})


async def test_nothing_is_sent_where_nobody_listens(mortal):
    """A service that is down is certain: the debit may be asked again."""
    here = mortal
    here.sandbox.kill()

    answer = await here.client.debit(release(here))

    assert answer.kind is AnswerKind.NOT_SENT


async def test_probe_passes_the_sandbox_and_moves_nothing(here):
    """The contract's own service passes, and its log stays empty."""
    before = await here.ask("GET", "/_operations?kind=debit")

    found = await here.client.probe(here.payer)

    assert found.startswith(f"the key reads the wallet of {here.payer}: 10000.00 left, 0.00 debit")
    assert "/wallet/debit exists: 402 insufficient_funds" in found
    assert await here.ask("GET", "/_operations?kind=debit") == before


@pytest.mark.parametrize(
    ("agent", "changes", "words"),
    [
        ("agent_nobody", {}, "payer of the agreement"),
        ("agent_payer", {"key": "pf_live_somebody_else"}, r"wallet\.api_key"),
        ("agent_payer", {"paths": WalletPaths(debit="/wallet/x")}, r"wallet\.paths\.debit"),
    ],
)
async def test_probe_refuses_what_cannot_be_paid_from(shared, agent, changes, words):
    """A wrong payer, key or path is found before the first debit."""
    async with client_of(shared, **changes) as client:
        with pytest.raises(Refused, match=words):
            await client.probe(agent)
