from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from meterd.core.settlement import AnswerKind, Reading, Release, ReleaseStatus
from meterd.errors import Refused
from meterd.escrow.client import EscrowApi, EscrowClient, EscrowPaths, Listing
from meterd.escrow.outcomes import Created, CreateFailed, Unread
from meterd.sandbox.server import API, SandboxSettings, running

PROVIDER, PAYER = "pf_live_sandbox_provider", "pf_live_sandbox_payer"
ASKED = 100_000


@dataclass
class World:
    """The escrow service, the client under test, and the payer's own hand on the service."""

    origin: str
    client: EscrowClient
    payer: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        async with self.payer.request(method, self.origin + path, json=body) as response:
            answer = await response.json()
            assert response.status < 300, answer
            return answer

    async def escrow(self, memo: str = "m") -> str:
        body = {"to_agent_id": "agent_provider", "amount": "10.00", "memo": memo}
        answer = await self.call("POST", f"{API}/escrow", body)
        escrow_id: str = answer["escrow_id"]
        return escrow_id

    async def fault(self, kind: str, **told: Any) -> None:
        await self.call("POST", "/_faults", {"kind": kind, **told})

    async def paid(self, escrow: str) -> list[str]:
        """The truth: the amounts of the releases in the service's own log."""
        log = await self.call("GET", f"/_operations?kind=release_partial&escrow_id={escrow}")
        return [row["amount"] for row in log["operations"]]

    async def arrived(self, escrow: str, call: str = "release_partial") -> int:
        """How many such calls came, whatever became of them."""
        log = await self.call("GET", f"/_requests?call={call}&escrow_id={escrow}")
        count: int = log["count"]
        return count

    async def moved(self, kind: str) -> list[str]:
        """The truth of another kind of call, over all escrows."""
        log = await self.call("GET", f"/_operations?kind={kind}")
        return [row["amount"] for row in log["operations"]]

    async def read(self, escrow: str) -> Reading:
        got = await self.client.read(escrow)
        assert isinstance(got, Reading), got
        return got


@contextlib.asynccontextmanager
async def world(data_file: Path, key: str = PROVIDER, **changes: Any) -> AsyncIterator[World]:
    settings = SandboxSettings(data_file, listen="127.0.0.1:0")
    async with running(settings) as origin:
        api = EscrowApi(origin + API, key, **{"request_timeout_s": 10.0, **changes})
        headers = {"Authorization": f"Bearer {PAYER}"}
        async with EscrowClient(api) as client, aiohttp.ClientSession(headers=headers) as payer:
            yield World(origin, client, payer)


@pytest.fixture
async def here(tmp_path):
    async with world(tmp_path / "sandbox.db") as made:
        yield made


def release(escrow: str, amount: int = ASKED, before: int = 0) -> Release:
    name = f"rel_{secrets.token_hex(12)}"
    return Release(name, escrow, amount, before, ReleaseStatus.SENT, "amount", 0, 0, ())


async def test_release_is_paid_once_and_confirmed_gross(here):
    """A release pays what was asked, and its answer has the gross amount and the total."""
    escrow = await here.escrow()
    first, second = release(escrow), release(escrow, 1, ASKED)

    answers = [await here.client.release_partial(row) for row in (first, second)]

    assert [(row.kind, row.amount, row.released) for row in answers] == [
        (AnswerKind.CONFIRMED, ASKED, ASKED),
        (AnswerKind.CONFIRMED, 1, ASKED + 1),
    ]
    assert await here.paid(escrow) == ["0.10", "0.000001"]
    got = await here.read(escrow)
    assert (got.released, got.remaining, got.total) == (100_001, 9_899_999, 10_000_000)
    assert got.release_ids == {first.id, second.id}
    assert (got.provider, got.currency) == ("agent_provider", "USDC")


# (fault, told, kind of the answer, how often money moved)
FAULTS: tuple[tuple[str, dict[str, Any], AnswerKind, int], ...] = (
    ("error_500_before", {}, AnswerKind.DOUBT, 0),
    ("error_500_after", {}, AnswerKind.DOUBT, 1),
    ("error_500_after", {"status": 503}, AnswerKind.DOUBT, 1),
    ("close_before", {}, AnswerKind.DOUBT, 0),
    ("close_after", {}, AnswerKind.DOUBT, 1),
    ("close_during_answer", {}, AnswerKind.DOUBT, 1),
    ("html_page", {}, AnswerKind.DOUBT, 1),
    ("html_page", {"status": 200}, AnswerKind.DOUBT, 1),
    ("html_page", {"status": 404}, AnswerKind.DOUBT, 1),
    ("html_page", {"status": 403}, AnswerKind.DOUBT, 1),
    ("truncated_json", {}, AnswerKind.DOUBT, 1),
    ("empty_200", {}, AnswerKind.DOUBT, 1),
    ("empty_object_200", {}, AnswerKind.DOUBT, 1),
    ("wrong_escrow_id", {}, AnswerKind.DOUBT, 1),
    ("endless_body", {}, AnswerKind.DOUBT, 1),
    ("released_above_total", {}, AnswerKind.DOUBT, 1),
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
)


@pytest.mark.parametrize("row", FAULTS, ids=[f"{n}-{row[0]}" for n, row in enumerate(FAULTS)])
async def test_release_that_meets_a_fault_leaves_once_and_is_read_right(here, row):
    """Whatever the service does, one request arrives, and what is not certain is a doubt."""
    kind, told, expected, moved = row
    escrow = await here.escrow()
    await here.fault(kind, call="release_partial", **told)

    answer = await here.client.release_partial(release(escrow))

    assert answer.kind is expected, answer
    assert await here.arrived(escrow) == 1
    assert await here.paid(escrow) == ["0.10"] * moved
    assert PROVIDER not in answer.detail


async def test_reading_after_a_doubt_shows_what_landed(here):
    """A release that was paid behind a 500 is in the next reading, by its total and by its id."""
    escrow = await here.escrow()
    row = release(escrow)
    await here.fault("error_500_after", call="release_partial")

    await here.client.release_partial(row)

    got = await here.read(escrow)
    assert (got.released, got.release_ids) == (ASKED, {row.id})


@pytest.mark.parametrize("told", [{}, {"status": 200}, {"status": 500}])
async def test_release_that_lands_late_is_never_taken_for_done(here, told):
    """What was only taken note of is not confirmed as paid, even with a 200."""
    escrow = await here.escrow()
    row = release(escrow)
    await here.fault("land_late", seconds=60, **told)

    answer = await here.client.release_partial(row)

    assert answer.kind is not AnswerKind.CONFIRMED or answer.released == row.before
    assert answer.amount is None
    assert (await here.read(escrow)).released == 0
    await here.call("POST", "/_clock", {"advance_s": 61})
    assert (await here.read(escrow)).released == ASKED


async def test_answer_after_the_time_out_is_a_doubt(tmp_path):
    """A release whose answer comes too late was paid all the same."""
    async with world(tmp_path / "sandbox.db", request_timeout_s=0.3) as here:
        escrow = await here.escrow()
        await here.fault("delay_answer", call="release_partial", seconds=30)

        answer = await here.client.release_partial(release(escrow))

        assert answer.kind is AnswerKind.DOUBT
        assert await here.paid(escrow) == ["0.10"]


async def test_wait_that_the_service_asks_for_is_handed_on(here):
    """Retry-After comes through; the core decides how much of it is believed."""
    escrow = await here.escrow()
    await here.fault("rate_limit", call="*", count=2, retry_after="17")

    answer = await here.client.release_partial(release(escrow))
    got = await here.client.read(escrow)

    assert isinstance(got, Unread)
    assert (answer.retry_after, got.retry_after, got.kind) == (17.0, 17.0, "limited")


async def test_refusals_of_the_service_are_declined(here):
    """Too much is refused as empty, an unknown escrow as missing, an ended one as a conflict."""
    escrow, ended = await here.escrow(), await here.escrow()
    await here.fault("expire", escrow_id=ended)

    answers = [
        await here.client.release_partial(release(escrow, 10_000_001)),
        await here.client.release_partial(release("esc_unknown")),
        await here.client.release_partial(release(ended)),
    ]

    assert [answer.kind for answer in answers] == [
        AnswerKind.EMPTY,
        AnswerKind.MISSING,
        AnswerKind.CONFLICT,
    ]
    assert (await here.read(ended)).status == "expired"


# (fault, told, kind of the failure; None: it is read all the same)
READ_FAULTS: tuple[tuple[str, dict[str, Any], str | None], ...] = (
    ("error_500_before", {}, "unavailable"),
    ("close_before", {"count": 2}, "unavailable"),
    ("close_before", {}, None),
    ("html_page", {}, "unavailable"),
    ("html_page", {"status": 200}, "nonsense"),
    ("truncated_json", {}, "nonsense"),
    ("empty_200", {}, "nonsense"),
    ("endless_body", {}, "nonsense"),
    ("redirect", {}, "unavailable"),
    ("unauthorized_401", {}, "key_refused"),
    ("rate_limit", {}, "limited"),
    ("numbers_instead_of_strings", {}, None),
    ("float_noise", {}, None),
    ("float_noise", {"direction": "down"}, None),
    ("extra_fields", {}, None),
)


@pytest.mark.parametrize("row", READ_FAULTS, ids=[f"{n}-{r[0]}" for n, r in enumerate(READ_FAULTS)])
async def test_reading_that_meets_a_fault_is_exact_or_says_why(here, row):
    """Numbers and noise are read exactly; what cannot be read is a value with its kind."""
    kind, told, expected = row
    escrow = await here.escrow()
    await here.client.release_partial(release(escrow, 14_850))
    await here.fault(kind, call="get", **told)

    got = await here.client.read(escrow)

    if isinstance(got, Unread):
        assert got.kind == expected, got
    else:
        assert expected is None
        assert (got.total, got.released, got.remaining) == (10_000_000, 14_850, 9_985_150)


async def test_reading_of_another_escrow_or_of_too_much_is_handed_on(here):
    """What contradicts itself reaches the core as the service said it."""
    escrow = await here.escrow()
    await here.fault("wrong_escrow_id", call="get")
    other = await here.read(escrow)
    await here.fault("released_above_total", call="get")
    above = await here.read(escrow)

    assert other.escrow == "esc_AAAAAAAAAAAAAAAAAAAAAAAA"
    assert (above.released, above.total, above.remaining) == (11_000_000, 10_000_000, 0)


async def test_key_that_the_service_echoes_is_not_in_any_text(here):
    """An error that repeats the key comes back without it."""
    escrow = await here.escrow()
    await here.fault("echo_key_in_error", count=3)

    texts = [
        (await here.client.release_partial(release(escrow))).detail,
        str(await here.client.read(escrow)),
        str(await here.client.list_escrows("agent_provider")),
    ]

    assert all("rejected header" in text for text in texts)
    assert PROVIDER not in " ".join(texts)


async def test_list_has_every_escrow_of_the_agent_with_its_memo(here):
    """More escrows than one page holds are all found."""
    escrows = {await here.escrow(f"inference_stream:{number}") for number in range(60)}

    listing = await here.client.list_escrows("agent_provider")

    assert isinstance(listing, Listing)
    assert {row.reading.escrow for row in listing.escrows} == escrows
    assert {row.memo for row in listing.escrows} == {f"inference_stream:{n}" for n in range(60)}
    assert (listing.skipped, listing.complete) == (0, True)


# --- creations ------------------------------------------------------------------------------------


@pytest.fixture
async def payers(tmp_path):
    """A client that holds the payer's key, so that it may lock escrows."""
    async with world(tmp_path / "sandbox.db", key=PAYER) as made:
        yield made


def unique() -> tuple[str, str]:
    """A memo that no other escrow has, and its key."""
    key = f"esc_{secrets.token_hex(12)}"
    return f"inference_stream {key}", key


async def test_creation_locks_what_was_asked_and_is_found_by_its_memo(payers):
    """The answer has the new escrow's facts; the list has the same, with payer and time."""
    memo, key = unique()

    made = await payers.client.create("agent_provider", 2_500_000, memo, 48, key)
    listing = await payers.client.list_escrows("agent_payer")

    assert isinstance(made, Created)
    assert isinstance(listing, Listing)
    [found] = listing.with_memo(memo)
    facts = [
        (one.id, one.total, one.memo, one.provider, one.creator, one.status, one.created_at)
        for one in (made.escrow, found)
    ]
    assert facts[0] == facts[1]
    assert facts[0][1:6] == (2_500_000, memo, "agent_provider", "agent_payer", "funded")
    assert made.escrow.deadline is not None
    assert made.escrow.created_at is not None
    assert made.escrow.deadline - made.escrow.created_at == 48 * 3_600_000
    assert await payers.moved("create") == ["2.50"]


# (fault, told, kind of the failure, escrows then)
CREATE_FAULTS: tuple[tuple[str, dict[str, Any], AnswerKind, int], ...] = (
    ("error_500_before", {}, AnswerKind.DOUBT, 0),
    ("error_500_after", {}, AnswerKind.DOUBT, 1),
    ("close_before", {}, AnswerKind.DOUBT, 0),
    ("close_after", {}, AnswerKind.DOUBT, 1),
    ("close_during_answer", {}, AnswerKind.DOUBT, 1),
    ("land_late", {}, AnswerKind.DOUBT, 0),
    ("land_late", {"status": 201}, AnswerKind.DOUBT, 0),
    ("html_page", {"status": 404}, AnswerKind.DOUBT, 1),
    ("truncated_json", {}, AnswerKind.DOUBT, 1),
    ("empty_200", {}, AnswerKind.DOUBT, 1),
    ("empty_object_200", {}, AnswerKind.DOUBT, 1),
    ("released_above_total", {}, AnswerKind.DOUBT, 1),
    ("endless_body", {}, AnswerKind.DOUBT, 1),
    ("redirect", {"status": 308}, AnswerKind.DOUBT, 0),
    ("rate_limit", {"retry_after": "7"}, AnswerKind.LIMITED, 0),
    ("conflict_409", {}, AnswerKind.CONFLICT, 0),
    ("unauthorized_401", {}, AnswerKind.KEY_REFUSED, 0),
)


@pytest.mark.parametrize(
    "row", CREATE_FAULTS, ids=[f"{n}-{r[0]}" for n, r in enumerate(CREATE_FAULTS)]
)
async def test_creation_that_meets_a_fault_leaves_once_and_the_list_decides(payers, row):
    """What is not certain is a doubt, and the list shows by the memo whether there is an escrow."""
    kind, told, expected, escrows = row
    memo, key = unique()
    await payers.fault(kind, call="create", **told)

    got = await payers.client.create("agent_provider", 1_000_000, memo, None, key)
    listing = await payers.client.list_escrows("agent_payer")

    assert isinstance(got, CreateFailed), got
    assert (got.kind, got.retry_after) == (expected, 7.0 if "retry_after" in told else None)
    assert PAYER not in got.detail
    assert isinstance(listing, Listing)
    assert len(listing.with_memo(memo)) == escrows
    assert (await payers.call("GET", "/_requests?call=create"))["count"] == 1


@pytest.mark.parametrize(
    "fault", ["numbers_instead_of_strings", "float_noise", "extra_fields", "delay_answer"]
)
async def test_creation_is_read_through_noise(payers, fault):
    """What only looks odd is a creation all the same."""
    memo, key = unique()
    told = {"seconds": 0.01} if fault == "delay_answer" else {}
    await payers.fault(fault, call="create", **told)

    made = await payers.client.create("agent_provider", 14_850_000, memo, None, key)

    assert isinstance(made, Created), made
    assert (made.escrow.total, made.escrow.deadline) == (14_850_000, None)


async def test_refusals_of_a_creation_are_told_apart(payers):
    """Too little is declined, too much is empty; nothing is locked."""
    answers = []
    for amount in (999_999, 10_001_000_000):
        memo, key = unique()
        answers.append(await payers.client.create("agent_provider", amount, memo, None, key))

    assert [answer.kind for answer in answers if isinstance(answer, CreateFailed)] == [
        AnswerKind.DECLINED,
        AnswerKind.EMPTY,
    ]
    assert await payers.moved("create") == []


# --- the rest of an escrow ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "status"), [("refund_rest", "refunded"), ("release_rest", "released")]
)
async def test_rest_goes_one_way_and_a_repeat_finds_nothing_left(here, call, status):
    """All that remains moves once; asked again, the service has nothing to move."""
    escrow = await here.escrow()
    await here.client.release_partial(release(escrow))
    ask = getattr(here.client, call)

    first = await ask(escrow, "close_1")
    again = await ask(escrow, "close_2")

    paid = ASKED if call == "refund_rest" else 10_000_000
    assert (first.kind, first.released) == (AnswerKind.CONFIRMED, paid)
    assert again.kind is AnswerKind.CONFLICT
    got = await here.read(escrow)
    assert (got.status, got.remaining, got.released) == (status, 0, paid)
    assert await here.moved(call.removesuffix("_rest")) == ["9.90"]


REST_FAULTS: tuple[tuple[str, AnswerKind, int], ...] = (
    ("error_500_before", AnswerKind.DOUBT, 0),
    ("error_500_after", AnswerKind.DOUBT, 1),
    ("close_after", AnswerKind.DOUBT, 1),
    ("land_late", AnswerKind.DOUBT, 0),
    ("truncated_json", AnswerKind.DOUBT, 1),
    ("empty_200", AnswerKind.DOUBT, 1),
    ("empty_object_200", AnswerKind.DOUBT, 1),
    ("wrong_escrow_id", AnswerKind.DOUBT, 1),
    ("redirect", AnswerKind.DOUBT, 0),
    ("rate_limit", AnswerKind.LIMITED, 0),
    ("unauthorized_401", AnswerKind.KEY_REFUSED, 0),
    ("float_noise", AnswerKind.CONFIRMED, 1),
)


@pytest.mark.parametrize("call", ["refund_rest", "release_rest"])
@pytest.mark.parametrize("row", REST_FAULTS, ids=[row[0] for row in REST_FAULTS])
async def test_rest_that_meets_a_fault_leaves_once_and_a_reading_decides(here, call, row):
    """One request arrives; what is not certain is a doubt, and a repeat moves nothing twice."""
    kind, expected, moved = row
    escrow, name = await here.escrow(), call.removesuffix("_rest")
    await here.fault(kind, call=name)

    answer = await getattr(here.client, call)(escrow, "close_1")

    assert answer.kind is expected, answer
    assert await here.arrived(escrow, name) == 1
    assert (await here.read(escrow)).remaining == (0 if moved else 10_000_000)
    await getattr(here.client, call)(escrow, "close_1")
    assert await here.moved(name) == ["10.00"]


# --- the probe ------------------------------------------------------------------------------------


async def test_probe_passes_the_sandbox_and_moves_nothing(here):
    """The contract's own service passes, and its log stays empty."""
    found = await here.client.probe()

    assert "release-partial exists" in found
    log = await here.call("GET", "/_operations?kind=release_partial")
    assert log["operations"] == []


async def test_probe_refuses_a_path_that_is_not_there(tmp_path):
    """A mistake in the path of release-partial is found before the first release."""
    paths = EscrowPaths(release_partial="/escrow/{id}/release_partial")
    async with world(tmp_path / "sandbox.db", paths=paths) as here:
        with pytest.raises(Refused, match=r"escrow\.paths\.release_partial"):
            await here.client.probe()


async def test_probe_refuses_a_wrong_key(tmp_path):
    """A key that the service does not know is told from a service that is down."""
    async with world(tmp_path / "sandbox.db", key="pf_live_somebody_else") as here:
        with pytest.raises(Refused, match=r"escrow\.api_key"):
            await here.client.probe()
