"""Both escrow clients against the real sandbox, a process of its own, and its failures.

Every test runs with the client that waits and with the one that is awaited.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from meterd.sdk import (
    AsyncEscrowClient,
    BadAmount,
    Conflict,
    Done,
    Escrow,
    EscrowClient,
    EscrowError,
    InDoubt,
    KeyRefused,
    Limited,
    NotFound,
    NotSent,
    Refused,
    Unavailable,
    new_key,
)
from tests.documents import ROOT, Block, blocks
from tests.processes import PAYER_KEY, PROVIDER_KEY, Sandbox, call, free_port

D = Decimal


class Waited:
    """An awaited client as one that waits: each call is run to its end in a loop of its own."""

    def __init__(self, client: AsyncEscrowClient, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def run(*args: Any, **named: Any) -> Any:
            async def called() -> Any:
                return await method(*args, **named)

            return self._runner.run(called())

        return run

    def list(self, agent_id: str) -> Iterator[Escrow]:
        escrows = self._client.list(agent_id)
        while (found := self._runner.run(_next(escrows))) is not None:
            yield found


async def _next(escrows: AsyncIterator[Escrow]) -> Escrow | None:
    async for escrow in escrows:
        return escrow
    return None


@contextmanager
def opened(sort: str, base_url: str, key: str, **options: Any) -> Iterator[Any]:
    """A client of this sort."""
    if sort == "blocking":
        with EscrowClient(base_url, key, **options) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        awaited = AsyncEscrowClient(base_url, key, **options)
        runner.run(awaited.__aenter__())
        yield Waited(awaited, runner)
        runner.run(awaited.__aexit__(None, None, None))


@dataclass
class World:
    """The sandbox, and clients of its payer."""

    sandbox: Sandbox
    sort: str
    stack: ExitStack
    payer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.payer = self.client()

    def client(self, key: str = PAYER_KEY, base_url: str = "", **options: Any) -> Any:
        url = base_url or self.sandbox.api
        return self.stack.enter_context(opened(self.sort, url, key, **options))

    def lock(self, memo: str = "a test", amount: str = "10.00") -> str:
        escrow_id: str = self.payer.lock("agent_provider", amount, memo).id
        return escrow_id

    def moved(self, escrow_id: str) -> list[tuple[str, str]]:
        """The truth: what the service's own log has beside the creation."""
        log = call("GET", f"{self.sandbox.base}/_operations?escrow_id={escrow_id}")
        return [(r["kind"], r["amount"]) for r in log["operations"] if r["kind"] != "create"]

    def arrived(self, escrow_id: str) -> int:
        """How many requests that move money came for an escrow, whatever became of them."""
        log = call("GET", f"{self.sandbox.base}/_requests?escrow_id={escrow_id}")
        count: int = log["count"]
        return count


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as started:
        yield started


@pytest.fixture(params=["blocking", "asynchronous"])
def here(request: pytest.FixtureRequest, sandbox: Sandbox) -> Iterator[World]:
    call("DELETE", f"{sandbox.base}/_faults")
    with ExitStack() as stack:
        yield World(sandbox, request.param, stack)


# -- The contract ----------------------------------------------------------------------------------


def test_lock_holds_the_amount_and_comes_back_as_an_escrow(here: World) -> None:
    """Exact decimals, the memo, the deadline in UTC, and the status as the service has it."""
    before = datetime.now(UTC)

    escrow = here.payer.lock("agent_provider", D("2.5"), "spec:42", auto_release_hours=168)

    assert (escrow.status, escrow.memo, escrow.currency) == ("funded", "spec:42", "USDC")
    assert (escrow.total, escrow.released, escrow.remaining) == (D("2.50"), D(0), D("2.50"))
    assert escrow.provider == "agent_provider"
    assert escrow.deadline >= before + timedelta(hours=168, seconds=-1)
    assert escrow.deadline.tzinfo is UTC
    assert here.payer.status(escrow.id) == escrow


def test_release_partial_pays_exactly_the_amount(here: World) -> None:
    """A part is paid gross, once, and the answer and the status show it by its key."""
    escrow_id, key = here.lock(), new_key()

    done = here.payer.release_partial(escrow_id, "0.01", idempotency_key=key)
    here.payer.release_partial(escrow_id, D("0.000001"), "the smallest", released_before="0.01")

    assert done == Done(escrow_id, D("0.01"), key, done.escrow)
    assert done.escrow.released == D("0.01")
    assert here.moved(escrow_id) == [("release_partial", "0.01"), ("release_partial", "0.000001")]
    read = here.payer.status(escrow_id)
    assert (read.released, read.remaining) == (D("0.010001"), D("9.989999"))
    assert read.status == "partially_released"
    assert key in read.release_keys


def test_release_all_pays_the_rest_and_ends_the_escrow(here: World) -> None:
    """What a part has left goes to the provider."""
    escrow_id = here.lock()
    here.payer.release_partial(escrow_id, "2.50")

    done = here.payer.release_all(escrow_id)

    assert (done.amount, done.escrow.status, done.escrow.remaining) == (None, "released", D(0))
    assert here.moved(escrow_id) == [("release_partial", "2.50"), ("release", "7.50")]


def test_refund_of_a_part_and_of_all_are_two_calls(here: World) -> None:
    """A part is a part, and the rest is asked for by name."""
    escrow_id = here.lock()

    part = here.payer.refund_part(escrow_id, "0.50")
    rest = here.payer.refund_all(escrow_id)

    assert (part.amount, part.escrow.refunded) == (D("0.50"), D("0.50"))
    assert (rest.amount, rest.escrow.remaining) == (None, D(0))
    assert here.moved(escrow_id) == [("refund", "0.50"), ("refund", "9.50")]


def test_list_goes_to_the_last_page(here: World) -> None:
    """More escrows than one page holds are all handed over, each with its memo."""
    memos = {here.lock(f"{here.sort}:{number}", "1.00"): number for number in range(60)}

    listed = {escrow.id: escrow for escrow in here.payer.list("agent_payer")}

    assert memos.keys() <= listed.keys()
    assert {listed[name].memo for name in memos} == {f"{here.sort}:{n}" for n in range(60)}
    assert all(isinstance(escrow.total, Decimal) for escrow in listed.values())


# -- What is refused before anything is sent -------------------------------------------------------


@pytest.mark.parametrize("amount", [0, 0.01, "0", "0.00", D(0), "-1", D("-0.01"), None, "", True])
@pytest.mark.parametrize("method", ["release_partial", "refund_part"])
def test_amount_that_cannot_be_meant_never_leaves(here: World, method: str, amount: Any) -> None:
    """Nothing arrives at the service, above all no release of everything."""
    escrow_id = here.lock()

    with pytest.raises(BadAmount):
        getattr(here.payer, method)(escrow_id, amount)

    assert here.arrived(escrow_id) == 0
    assert here.moved(escrow_id) == []


# -- Failures --------------------------------------------------------------------------------------

# (fault, told, what release_partial raises; None: done; how often money moved)
FAULTS: tuple[tuple[str, dict[str, Any], type[EscrowError] | None, int], ...] = (
    ("error_500_before", {}, InDoubt, 0),
    ("error_500_after", {}, InDoubt, 1),
    ("close_before", {}, InDoubt, 0),
    ("close_after", {}, InDoubt, 1),
    ("close_during_answer", {}, InDoubt, 1),
    ("html_page", {}, InDoubt, 1),
    ("html_page", {"status": 200}, InDoubt, 1),
    ("html_page", {"status": 403}, InDoubt, 1),
    ("html_page", {"status": 404}, InDoubt, 1),
    ("truncated_json", {}, InDoubt, 1),
    ("empty_200", {}, InDoubt, 1),
    ("empty_object_200", {}, InDoubt, 1),
    ("wrong_escrow_id", {}, InDoubt, 1),
    ("endless_body", {}, InDoubt, 1),
    ("released_above_total", {}, InDoubt, 1),
    ("echo_key_in_error", {}, InDoubt, 0),
    ("redirect", {}, InDoubt, 0),
    ("redirect", {"status": 308}, InDoubt, 0),
    ("conflict_409", {}, Conflict, 0),
    ("rate_limit", {}, Limited, 0),
    ("unauthorized_401", {}, KeyRefused, 0),
    ("land_late", {"seconds": 600}, InDoubt, 0),
    ("land_late", {"seconds": 600, "status": 200}, InDoubt, 0),
    ("numbers_instead_of_strings", {}, None, 1),
    ("float_noise", {}, None, 1),
    ("float_noise", {"direction": "down"}, None, 1),
    ("extra_fields", {}, None, 1),
)


@pytest.mark.parametrize("row", FAULTS, ids=[f"{n}-{row[0]}" for n, row in enumerate(FAULTS)])
def test_release_that_meets_a_fault_leaves_once_and_says_what_is_known(
    here: World, row: tuple[str, dict[str, Any], type[EscrowError] | None, int]
) -> None:
    """One request arrives whatever happens, and no error has the key in it."""
    kind, told, expected, moved = row
    escrow_id, key = here.lock(), new_key()
    here.payer.release_partial(escrow_id, "0.05")
    here.sandbox.fault(kind=kind, call="release_partial", **told)

    if expected is None:
        here.payer.release_partial(escrow_id, "0.10", idempotency_key=key)
    else:
        with pytest.raises(EscrowError) as raised:
            here.payer.release_partial(escrow_id, "0.10", idempotency_key=key)
        assert type(raised.value) is expected, raised.value
        assert PAYER_KEY not in f"{raised.value!r} {vars(raised.value)}"

    assert here.arrived(escrow_id) == 2
    assert here.moved(escrow_id)[1:] == [("release_partial", "0.10")] * moved


# (method, the sandbox's name of the call, what it is called with behind an escrow's id)
CALLS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("lock", "create", ("agent_provider", "1.00", "a doubt")),
    ("release_all", "release", ()),
    ("refund_part", "refund", ("0.10",)),
    ("refund_all", "refund", ()),
)
DOUBTS = ("error_500_after", "close_after", "empty_200", "empty_object_200", "truncated_json")


@pytest.mark.parametrize("kind", DOUBTS)
@pytest.mark.parametrize("row", CALLS, ids=[row[0] for row in CALLS])
def test_every_call_that_moves_money_is_put_once_and_its_doubt_names_it(
    here: World, row: tuple[str, str, tuple[Any, ...]], kind: str
) -> None:
    """The error has the call, the escrow, the amount and the key that the catcher needs."""
    method, name, args = row
    escrow_id, key = here.lock(), new_key()
    args = args if method == "lock" else (escrow_id, *args)
    here.sandbox.fault(kind=kind, call=name)

    with pytest.raises(InDoubt) as raised:
        getattr(here.payer, method)(*args, idempotency_key=key)

    doubt = raised.value
    sent = call("GET", f"{here.sandbox.base}/_requests?idempotency_key={key}")
    assert sent["count"] == 1
    assert (doubt.call, doubt.key) == (method, key)
    assert doubt.escrow_id == (None if method == "lock" else escrow_id)
    assert doubt.amount == {"lock": D("1.00"), "refund_part": D("0.10")}.get(method)
    assert "Before you do anything else" in str(doubt)


def test_doubt_is_resolved_by_reading_the_escrow(here: World) -> None:
    """What landed behind a 500 stands in the next reading, by its amount and by its key."""
    escrow_id = here.lock()
    here.sandbox.fault(kind="error_500_after", call="release_partial")

    with pytest.raises(InDoubt) as raised:
        here.payer.release_partial(escrow_id, "0.10")
    read = here.payer.status(escrow_id)

    assert read.released == D("0.10")
    assert raised.value.key in read.release_keys


def test_lock_in_doubt_is_found_by_its_memo(here: World) -> None:
    """The escrow nobody was told of stands in the list."""
    memo = f"lost:{here.sort}"
    here.sandbox.fault(kind="close_after", call="create")

    with pytest.raises(InDoubt, match=memo):
        here.payer.lock("agent_provider", "1.00", memo)

    found = [escrow for escrow in here.payer.list("agent_payer") if escrow.memo == memo]
    assert [escrow.total for escrow in found] == [D("1.00")]


def test_answer_after_the_time_out_is_a_doubt(here: World) -> None:
    """A release whose answer comes too late was paid all the same."""
    escrow_id = here.lock()
    here.sandbox.fault(kind="delay_answer", call="release_partial", seconds=30)

    with pytest.raises(InDoubt, match=r"within 0\.3 s"):
        here.client(timeout_s=0.3).release_partial(escrow_id, "0.10")

    assert here.moved(escrow_id) == [("release_partial", "0.10")]


def test_refusals_have_the_code_of_the_service(here: World) -> None:
    """Too much, an escrow that is not there, one that has ended, and a key of nobody's."""
    escrow_id, ended = here.lock(), here.lock()
    here.payer.release_all(ended)
    # (client, escrow, amount) -> (type, status, code)
    rows = [
        (here.payer, escrow_id, "10.01", Refused, 402, "insufficient_remaining"),
        (here.payer, "esc_unknown", "0.01", NotFound, 404, "escrow_not_found"),
        (here.payer, ended, "0.01", Conflict, 409, "already_released"),
        (here.client("pf_live_nobody"), escrow_id, "0.01", KeyRefused, 401, "unauthorized"),
    ]

    for client, escrow, amount, kind, status, code in rows:
        with pytest.raises(EscrowError) as raised:
            client.release_partial(escrow, amount)
        assert type(raised.value) is kind
        assert (raised.value.status, raised.value.code) == (status, code)
        with pytest.raises(kind) if kind in (NotFound, KeyRefused) else ExitStack():
            client.status(escrow)


def test_wait_that_the_service_asks_for_is_handed_on(here: World) -> None:
    """Seconds of Retry-After, or None where there are none."""
    escrow_id = here.lock()
    here.sandbox.fault(kind="rate_limit", call="*", count=2, retry_after="17")

    with pytest.raises(Limited) as moving:
        here.payer.release_partial(escrow_id, "0.01")
    with pytest.raises(Limited) as reading:
        here.payer.status(escrow_id)

    assert (moving.value.retry_after, reading.value.retry_after) == (17.0, 17.0)


def test_nothing_that_listens_is_not_sent(here: World) -> None:
    """A refused connection promises that nothing was asked, for a release and for a reading."""
    nobody = here.client(base_url=f"http://127.0.0.1:{free_port()}/api/v1")

    with pytest.raises(NotSent):
        nobody.release_partial("esc_1", "0.01")
    with pytest.raises(NotSent):
        nobody.status("esc_1")


def test_failed_tls_is_not_sent(here: World) -> None:
    """The key has not left, since nobody proved who they are."""
    secure = here.client(base_url=here.sandbox.api.replace("http:", "https:"))

    with pytest.raises(NotSent):
        secure.release_partial("esc_1", "0.01")


def test_proxy_of_the_environment_is_not_asked(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key goes to the address that was given, whatever else is set on the machine."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)

    escrow_id = here.client().lock("agent_provider", "1.00", "no proxy").id

    assert here.client().status(escrow_id).total == D("1.00")


def test_answer_that_drips_without_end_is_given_up(here: World) -> None:
    """One time-out for the whole answer: bytes that keep coming do not hold the caller."""
    with _dripping() as base_url:
        client = here.client(base_url=base_url, timeout_s=1.0)

        with pytest.raises(InDoubt, match="within 1 s"):
            client.release_partial("esc_1", "0.01")


@contextmanager
def _dripping() -> Iterator[str]:
    """A server that sends one byte of an answer's head every 50 ms, for ever."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\nX-Filler: ")
                try:
                    while not over.wait(0.05):
                        peer.sendall(b"a")
                except OSError:
                    pass  # The client has given up.

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/api/v1"
        finally:
            over.set()
            thread.join()


# -- Readings --------------------------------------------------------------------------------------

# (fault, told, what status raises; None: it is read)
READ_FAULTS: tuple[tuple[str, dict[str, Any], type[EscrowError] | None], ...] = (
    ("error_500_before", {"count": 2}, None),
    ("error_500_before", {"count": 3}, Unavailable),
    ("close_before", {"count": 2}, None),
    ("html_page", {"status": 200, "count": 3}, Unavailable),
    ("truncated_json", {}, None),
    ("endless_body", {"count": 3}, Unavailable),
    ("redirect", {"count": 3}, Unavailable),
    ("wrong_escrow_id", {"count": 3}, Unavailable),
    ("released_above_total", {"count": 3}, Unavailable),
    ("unauthorized_401", {}, KeyRefused),
    ("rate_limit", {"retry_after": "0"}, None),
    ("numbers_instead_of_strings", {}, None),
    ("float_noise", {}, None),
    ("float_noise", {"direction": "down"}, None),
    ("extra_fields", {}, None),
)


@pytest.mark.parametrize("row", READ_FAULTS, ids=[f"{n}-{r[0]}" for n, r in enumerate(READ_FAULTS)])
def test_reading_that_meets_a_fault_is_asked_again_and_is_exact(
    here: World, row: tuple[str, dict[str, Any], type[EscrowError] | None]
) -> None:
    """A reading is put up to three times; what comes in the end is exact, or a typed error."""
    kind, told, expected = row
    escrow_id = here.lock()
    here.payer.release_partial(escrow_id, "0.01485")
    here.sandbox.fault(kind=kind, call="get", **told)

    if expected is None:
        read = here.payer.status(escrow_id)
        figures = (read.total, read.released, read.remaining)
        assert figures == (D("10.00"), D("0.01485"), D("9.98515"))
    else:
        with pytest.raises(EscrowError) as raised:
            here.payer.status(escrow_id)
        assert type(raised.value) is expected


def test_word_that_is_not_known_is_kept(here: World) -> None:
    """A disputed escrow is told as the service tells it."""
    escrow_id = here.lock()
    here.sandbox.fault(kind="dispute", escrow_id=escrow_id)

    assert here.payer.status(escrow_id).status == "disputed"


def test_provider_reads_what_the_payer_locked(here: World) -> None:
    """Both parties see the same escrow."""
    escrow_id = here.lock()

    assert here.client(PROVIDER_KEY).status(escrow_id) == here.payer.status(escrow_id)


def test_threads_may_share_the_client_that_waits(sandbox: Sandbox) -> None:
    """Releases side by side are each paid once."""
    call("DELETE", f"{sandbox.base}/_faults")
    client = EscrowClient(sandbox.api, PAYER_KEY)
    escrow_id = client.lock("agent_provider", "10.00", "threads").id

    def pay() -> None:
        for _ in range(10):
            client.release_partial(escrow_id, "0.01")

    threads = [threading.Thread(target=pay) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert client.status(escrow_id).released == D("0.40")


async def test_awaited_releases_run_side_by_side(sandbox: Sandbox) -> None:
    """In one task group, each is paid once."""
    call("DELETE", f"{sandbox.base}/_faults")
    async with AsyncEscrowClient(sandbox.api, PAYER_KEY) as client:
        escrow = await client.lock("agent_provider", "10.00", "tasks")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(20):
                tasks.create_task(client.release_partial(escrow.id, "0.01"))

        assert (await client.status(escrow.id)).released == D("0.20")


# -- The document ----------------------------------------------------------------------------------

DOCUMENT = ROOT / "docs" / "sdk.md"


EXAMPLES = [block for block in blocks(DOCUMENT) if "EscrowClient" in block.text]


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: f"line-{block.line}")
def test_examples_of_the_document_print_what_it_says(
    sandbox: Sandbox, tmp_path: Path, block: Block
) -> None:
    """Each is a whole program, which prints what stands behind `# ->`, in order."""
    call("DELETE", f"{sandbox.base}/_faults")
    program = tmp_path / "example.py"
    program.write_text(block.text.replace("http://127.0.0.1:8788", sandbox.base))

    ran = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )

    assert (ran.returncode, ran.stderr) == (0, "")
    printed = iter(ran.stdout.splitlines())
    missing = [text for text in block.expected if not any(text in line for line in printed)]
    assert missing == []
