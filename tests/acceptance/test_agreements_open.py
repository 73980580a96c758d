"""The lives of agreements: opened, found, renewed, rolled over, and past their deadlines."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.stage import (
    Node,
    clear_faults,
    configuration,
    move_clock,
    paid,
    until,
)
from tests.processes import PAYER_KEY, Sandbox, call

PAYER = "agent_payer"
PROVIDER = "agent_provider"
WEEK_MS = 7 * 24 * 3600 * 1000
OPENABLE = """
[plans.stream]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { amount = "0.01" }
deposit = "2.00"
memo = "inference_stream:s1"

[plans.rolling]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { amount = "0.01" }
deposit = "1.00"
at_close = "leave"
renew = true

[plans.weekly]
pattern = "subscription"
fee = "5.00"
renew = true

[plans.brief]
pattern = "subscription"
fee = "1.00"
period = "5s"
renew = true

[plans.mixed]
pattern = "hybrid"
fee = "1.00"
deposit = "2.00"
rates = [{ meter = "units", price = "0.01", free_units = 10 }]
settle = { amount = "0.05" }
"""
UNRENEWED = OPENABLE.replace("renew = true", "")  # Renewing takes the payer's key.
WITH_PAYER = f"""
agent_id = "{PROVIDER}"
payer_api_key = "{PAYER_KEY}"
discover_interval = "200ms"
"""
DISCOVER = """
[[discover]]
memo = "inference_stream:*"
plan = "stream"
"""

MakeNode = Callable[..., Node]


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox of the test's own."""
    with Sandbox(tmp_path / "service") as service:
        yield service


@pytest.fixture
def make_node(tmp_path: Path, sandbox: Sandbox) -> Iterator[MakeNode]:
    """Start daemons that may lock for the payer; those that still run end with the test."""
    with contextlib.ExitStack() as stack:

        def make(*, escrow: str = WITH_PAYER, rest: str = "", **given: str) -> Node:
            plans = OPENABLE if "payer_api_key" in escrow else UNRENEWED
            text = configuration(sandbox, escrow=escrow, rest=rest, plans=plans, **given)
            node = stack.enter_context(Node(tmp_path, text))
            node.wait_ready()
            return node

        yield make


def escrows_of_payer(sandbox: Sandbox) -> list[Any]:
    """All escrows that the payer has locked, by the service's own list."""
    url = f"{sandbox.api}/escrow?agent_id={PAYER}&limit=50"
    return list(call("GET", url, key=PAYER_KEY)["escrows"])


def lock(sandbox: Sandbox, amount: str, memo: str, **fields: object) -> str:
    """Lock an escrow as the payer does it himself."""
    body = {"to_agent_id": PROVIDER, "amount": amount, "memo": memo, **fields}
    return str(call("POST", f"{sandbox.api}/escrow", body, PAYER_KEY)["escrow_id"])


def open_it(node: Node, plan: str, name: str = "", **fields: object) -> Any:
    """Open an agreement; the answer's status and document."""
    body = {"plan": plan, **({"id": name} if name else {}), **fields}
    answer = node.ask("POST", "/v1/agreements", body)
    return answer.status, answer.json


def wait_open(node: Node, name: str) -> Any:
    """Wait until an agreement is bound and its escrows are adopted."""
    return until(
        lambda: found if (found := node.agreement(name)).get("state") == "active" else None,
        lambda: f"{name} to be open: {node.agreement(name)}",
    )


def restart(node: Node) -> None:
    """Start a daemon that has ended on the same state."""
    node.start()
    node.wait_ready()


# -- Opening -------------------------------------------------------------------------------------


def test_a_program_opens_an_agreement_uses_it_and_is_paid(make_node, sandbox):
    """One call locks what the plan says, binds it, and usage of it is paid."""
    node = make_node()

    status, opened = open_it(node, "stream", "job-1")
    wait_open(node, "job-1")
    node.use("job-1", 50, "u1")
    escrow = opened["escrows"][0]["id"]
    until(lambda: paid(sandbox, escrow) == Decimal("0.05"), "the usage to be paid")

    (shown,) = escrows_of_payer(sandbox)
    assert (status, shown["escrow_id"], Decimal(shown["amount"])) == (201, escrow, 2)
    assert shown["memo"].startswith("inference_stream:s1 agreement=job-1 open_")
    assert opened["payer"] == PAYER


def test_a_program_that_asks_twice_locks_once(make_node, sandbox):
    """With an id the call may be repeated: what is open is shown, and nothing more is locked."""
    node = make_node()
    first = open_it(node, "stream", "job-1")
    second = open_it(node, "stream", "job-1")

    assert (201, 200) == (first[0], second[0])
    assert 1 == len(escrows_of_payer(sandbox))
    assert 409 == open_it(node, "rolling", "job-1")[0]


def test_a_person_opens_by_command_with_another_deposit(make_node, sandbox):
    """`meterd open` does what the API does, and says the escrow and the next command."""
    node = make_node()
    done = node.type("open", "stream", "--id", "job-2", "--deposit", "3.50")

    (shown,) = escrows_of_payer(sandbox)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"job-2 is open under stream: {shown['escrow_id']}. Look:")
    assert Decimal("3.50") == Decimal(shown["amount"])


def test_a_hybrid_agreement_is_opened_with_both_its_escrows(make_node, sandbox):
    """The fee and the overage are locked apart, each with its own amount, and bound by role."""
    node = make_node()
    status, opened = open_it(node, "mixed", "both")

    roles = {escrow["role"]: escrow["id"] for escrow in opened["escrows"]}
    amounts = {one["escrow_id"]: Decimal(one["amount"]) for one in escrows_of_payer(sandbox)}
    assert status == 201
    assert {roles["base"]: 1, roles["overage"]: 2} == amounts


def test_a_payer_that_runs_meterd_locks_with_its_own_key(make_node, sandbox):
    """Without a payer's key the daemon's own locks, once the provider and the payer are named."""
    node = make_node(escrow="", key=PAYER_KEY)
    nobody = open_it(node, "stream", "own")
    unnamed = open_it(node, "stream", "own", provider=PROVIDER)
    status, _ = open_it(node, "stream", "own", provider=PROVIDER, payer=PAYER)

    (shown,) = escrows_of_payer(sandbox)
    assert "escrow.agent_id" in nobody[1]["detail"]
    assert "escrow.payer_api_key_file" in unnamed[1]["detail"]
    assert (409, 409, 201) == (nobody[0], unnamed[0], status)
    assert PROVIDER == shown["to_agent_id"]


def test_an_agreement_whose_second_escrow_is_refused_goes_on_from_the_first(make_node, sandbox):
    """What is locked already waits for the rest: asked for again, only the rest is locked."""
    node = make_node()
    sandbox.fault(kind="rate_limit", call="create", skip=1)
    refused = open_it(node, "mixed", "both")
    node.kill()
    restart(node)
    again = open_it(node, "mixed", "both")

    assert (409, 201) == (refused[0], again[0])
    assert "is locked and waits for it" in refused[1]["detail"]
    assert [1, 2] == sorted(Decimal(one["amount"]) for one in escrows_of_payer(sandbox))


# -- Crashes and lost answers --------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["close_after", "error_500_after", "truncated_json"])
def test_an_answer_is_lost_and_the_escrow_is_found_in_the_list(make_node, sandbox, fault):
    """Nobody is told "open" before it is known; the list shows it, and it is never locked twice."""
    node = make_node()
    sandbox.fault(kind=fault, call="create")
    status, opening = open_it(node, "stream", "job-3")
    wait_open(node, "job-3")

    (shown,) = escrows_of_payer(sandbox)
    assert (202, "opening") == (status, opening["state"])
    assert shown["escrow_id"] == node.agreement("job-3")["escrows"][0]["id"]
    assert [] == node.get("/v1/openings")["items"]


def test_a_command_whose_outcome_is_unknown_ends_with_three(make_node, sandbox):
    """A script that opens an agreement learns that it is not open yet, and what happens next."""
    node = make_node()
    sandbox.fault(kind="close_after", call="create")
    done = node.type("open", "stream", "--id", "job-8")
    wait_open(node, "job-8")

    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("Nobody knows yet whether the escrow of job-8 was locked")


def test_no_key_of_the_payer_is_said_anywhere(make_node, sandbox):
    """A service that echoes the key in its refusal does not get it into log, answer or store."""
    node = make_node()
    sandbox.fault(kind="echo_key_in_error", call="create", status=400)
    status, refused = open_it(node, "stream", "job-9")
    node.stop()

    files = [path.read_bytes() for path in node.data_dir.iterdir() if path.is_file()]
    said = [json.dumps(refused).encode(), node.log_tail(1000).encode(), *files]
    assert status in (202, 409)
    assert not any(PAYER_KEY.encode() in text for text in said)


def test_a_request_that_never_arrived_is_given_up_after_two_quarantines(make_node, sandbox):
    """No list shows it for long enough: it is absent, a person opens again, and one is locked."""
    node = make_node()
    sandbox.fault(kind="close_before", call="create")
    status, _ = open_it(node, "stream", "job-4")
    (said,) = node.wait_logged("opening_absent")
    again = open_it(node, "stream", "job-4")

    assert (202, 201) == (status, again[0])
    assert said["next"] == "meterd open stream --id job-4"
    assert 1 == len(escrows_of_payer(sandbox))


def test_a_daemon_killed_while_the_answer_is_on_its_way_finds_the_escrow(make_node, sandbox):
    """Killed behind the call and before its record: the next start reads the list and binds."""
    node = make_node()
    sandbox.fault(kind="delay_answer", call="create", seconds=0.8)
    with contextlib.suppress(OSError):
        body = {"plan": "stream", "id": "job-5"}
        node.ask("POST", "/v1/agreements", body, timeout=0.3)
    until(lambda: len(escrows_of_payer(sandbox)) == 1, "the escrow to be locked")
    node.kill()
    restart(node)
    wait_open(node, "job-5")

    assert 1 == len(escrows_of_payer(sandbox))


def test_a_daemon_killed_between_intention_and_call_locks_nothing_by_itself(make_node, sandbox):
    """An intention on the disk may have left: it is looked for, given up, and never sent again."""
    node = make_node()
    node.stop()
    intend(node, "job-6")
    restart(node)
    node.wait_logged("opening_absent")
    absent = escrows_of_payer(sandbox)
    status, _ = open_it(node, "stream", "job-6")

    assert ([], 201) == (absent, status)
    assert 1 == len(escrows_of_payer(sandbox))


def test_an_escrow_that_is_locked_after_it_was_given_up_is_bound_and_said(make_node, sandbox):
    """A request that lands later than the quarantine is no hidden escrow: it is drawn on too."""
    node = make_node()
    node.stop()
    memo = intend(node, "job-7")
    restart(node)
    node.wait_logged("opening_absent")
    late = lock(sandbox, "2.00", memo)
    node.wait_logged("opening_late")
    wait_open(node, "job-7")

    assert late == node.agreement("job-7")["escrows"][0]["id"]


def intend(node: Node, agreement: str) -> str:
    """Leave an intention in a stopped daemon's store, as a crash before the call does; its memo."""
    memo = f"inference_stream:s1 agreement={agreement} open_{agreement}"
    values = (f"open_{agreement}", agreement, memo, PROVIDER)
    with contextlib.closing(sqlite3.connect(node.data_dir / "meterd.db")) as store:
        store.execute(
            "INSERT INTO opening (id, agreement, plan, payer, role, amount, memo, provider, hours,"
            " why, status, created_at, changed_at, escrow, detail) VALUES"
            " (?, ?, 'stream', '', 'main', 2000000, ?, ?, NULL, 'asked', 'intended', 1, 1, '', '')",
            values,
        )
        store.commit()
    return memo


# -- Discovery -----------------------------------------------------------------------------------


def test_an_escrow_whose_memo_fits_is_found_and_bound(make_node, sandbox):
    """A payer locks by itself; the provider's meterd binds it without a word from anybody."""
    node = make_node(rest=DISCOVER)
    found = lock(sandbox, "1.00", "inference_stream:abc")
    other = lock(sandbox, "1.00", "something else")
    wait_open(node, found)
    node.use(found, 20, "u1")
    until(lambda: paid(sandbox, found) == Decimal("0.02"), "the usage to be paid")

    assert (PAYER, "stream") == (node.agreement(found)["payer"], node.agreement(found)["plan"])
    assert 404 == node.ask("GET", f"/v1/agreements/{other}").status
    entries = node.get("/v1/journal")["items"]
    assert ["discovery"] == [e["actor"] for e in entries if e["action"] == "agreement_bound"]


def test_a_second_escrow_of_the_same_payer_continues_its_agreement(make_node, sandbox):
    """Usage passes the border between two escrows without losing or doubling a unit."""
    node = make_node(rest=DISCOVER)
    first = lock(sandbox, "1.00", "inference_stream:abc")
    wait_open(node, first)
    second = lock(sandbox, "1.00", "inference_stream:abc again")
    until(
        lambda: [e["status"] for e in node.agreement(first)["escrows"]] == ["active", "active"],
        lambda: node.agreement(first),
    )
    for number in range(30):
        node.use(first, 47, f"u{number}")
    node.wait_agreement(first, accrued="1.41", released="1.41", unsettled="0.00")

    assert (Decimal(1), Decimal("0.41")) == (paid(sandbox, first), paid(sandbox, second))


def test_an_escrow_that_could_belong_to_two_agreements_is_left_alone(make_node, sandbox):
    """Nothing is guessed: a person is told, and the word agreement=ID in a memo decides."""
    node = make_node(rest=DISCOVER)
    lock(sandbox, "1.00", "inference_stream:a agreement=first")
    lock(sandbox, "1.00", "inference_stream:b agreement=second")
    wait_open(node, "first")
    wait_open(node, "second")
    unclear = lock(sandbox, "1.00", "inference_stream:c")
    named = lock(sandbox, "1.00", "inference_stream:d agreement=second")
    (said,) = node.wait_logged("escrow_not_bound")
    until(lambda: len(node.agreement("second")["escrows"]) == 2, "the named one to be bound")

    assert said["escrow"] == unclear
    assert "more than one under stream: first, second" in said["event"]
    assert named == node.agreement("second")["escrows"][1]["id"]
    assert 404 == node.ask("GET", f"/v1/agreements/{unclear}").status


def test_a_list_that_fails_changes_nothing(make_node, sandbox):
    """It is said once, and the next list that comes is taken."""
    sandbox.fault(kind="error_500_before", call="list", count=1000)
    node = make_node(rest=DISCOVER)
    found = lock(sandbox, "1.00", "inference_stream:abc")
    node.wait_logged("list_failed")
    clear_faults(sandbox)
    wait_open(node, found)

    assert 1 == len(node.logged("list_failed"))


# -- Rollover and renewal ------------------------------------------------------------------------


def test_a_stream_that_runs_low_goes_on_by_an_escrow_that_meterd_locks(make_node, sandbox):
    """Below a fifth of the deposit the next one is locked, once; what is paid is what was used."""
    node = make_node()
    _, opened = open_it(node, "rolling", "roll")
    wait_open(node, "roll")
    first = opened["escrows"][0]["id"]
    node.use("roll", 790, "u1")
    node.wait_agreement("roll", released="0.79")
    before = len(escrows_of_payer(sandbox))
    node.use("roll", 30, "u2")
    until(
        lambda: [e["status"] for e in node.agreement("roll")["escrows"]] == ["active", "active"],
        lambda: node.agreement("roll"),
    )
    for number in range(10):
        node.use("roll", 41, f"v{number}")
    node.wait_agreement("roll", accrued="1.23", released="1.23", unsettled="0.00")

    second = node.agreement("roll")["escrows"][1]["id"]
    assert (1, 2) == (before, len(escrows_of_payer(sandbox)))
    assert (Decimal(1), Decimal("0.23")) == (paid(sandbox, first), paid(sandbox, second))


def test_a_rollover_whose_answer_is_lost_is_found_and_not_locked_again(make_node, sandbox):
    """An unknown outcome counts as locked: the daemon, killed meanwhile too, locks one escrow."""
    node = make_node()
    open_it(node, "rolling", "roll")
    wait_open(node, "roll")
    sandbox.fault(kind="close_after", call="create")
    node.use("roll", 900, "u1")
    until(lambda: len(escrows_of_payer(sandbox)) == 2, "the next escrow to be locked")
    node.kill()
    restart(node)
    node.use("roll", 300, "u2")
    node.wait_agreement("roll", accrued="1.20", released="1.20")

    assert 2 == len(escrows_of_payer(sandbox))
    assert Decimal("1.2") == sum(paid(sandbox, e["escrow_id"]) for e in escrows_of_payer(sandbox))


def test_a_subscription_is_renewed_and_billed_over_a_restart(make_node, sandbox):
    """Two weeks pass while the daemon is down and up: two fees, each from its own escrow."""
    node = make_node()
    open_it(node, "weekly", "sub")
    wait_open(node, "sub")
    assert 1 == len(escrows_of_payer(sandbox))
    pass_time(node, "sub", WEEK_MS - 30_000)
    until(lambda: len(escrows_of_payer(sandbox)) == 2, "the second week's escrow")
    until(
        lambda: [e["status"] for e in node.agreement("sub")["escrows"]] == ["active", "active"],
        lambda: node.agreement("sub"),
    )
    pass_time(node, "sub", 60_000)
    node.wait_agreement("sub", period=1, accrued="5.00", released="5.00")
    pass_time(node, "sub", WEEK_MS)
    node.wait_agreement("sub", period=2, accrued="10.00", released="10.00")

    first, second = (e["id"] for e in node.agreement("sub")["escrows"][:2])
    assert (Decimal(5), Decimal(5)) == (paid(sandbox, first), paid(sandbox, second))


def test_periods_that_end_while_the_daemon_is_down_are_billed_once_each(make_node, sandbox):
    """Timers come from stored times: killed now and then, each period has its fee and escrow."""
    node = make_node()
    open_it(node, "brief", "quick")
    for _ in range(3):
        until(lambda: is_covered(node.agreement("quick")), lambda: node.agreement("quick"))
        ends = datetime.fromisoformat(node.agreement("quick")["period_ends"])
        node.kill()
        until(lambda ends=ends: datetime.now(UTC) > ends, "the period to be over")
        restart(node)
    until(lambda: is_covered(node.agreement("quick")), lambda: node.agreement("quick"))
    node.ask("POST", "/v1/agreements/quick/close", {"reason": "the test ends"})
    node.wait_state("quick", "closed")

    bill = node.agreement("quick")
    locked = escrows_of_payer(sandbox)
    released = sum(Decimal(one["released_amount"]) for one in locked)
    assert bill["period"] + 1 == Decimal(bill["accrued"]) == released
    assert bill["uncollectible"] == "0.00"
    assert all(Decimal(one["released_amount"]) <= 1 for one in locked)
    assert [] == node.logged("agreement_lapsed")


def is_covered(agreement: Any) -> bool:
    """Whether the running period's escrow is there and adopted."""
    states = [escrow["status"] for escrow in agreement.get("escrows", ())]
    return len(states) > agreement.get("period", 0) and "adopting" not in states


def pass_time(node: Node, agreement: str, ms: int) -> None:
    """Let time pass while a daemon is down: its agreement has been open for so much longer."""
    node.kill()
    with contextlib.closing(sqlite3.connect(node.data_dir / "meterd.db")) as store:
        store.execute(
            "UPDATE agreement SET opened_at = opened_at - ? WHERE id = ?", (ms, agreement)
        )
        store.commit()
    restart(node)


# -- Deadlines -----------------------------------------------------------------------------------


def locked_until(sandbox: Sandbox, direction: str) -> str:
    """An escrow whose service acts by itself in an hour."""
    return lock(sandbox, "1.00", "by hand", auto_release_hours=1, on_deadline=direction)


@pytest.mark.parametrize("policy", ["provider", "unknown"])
def test_a_service_that_pays_out_at_the_deadline_has_paid_the_usage(make_node, sandbox, policy):
    """The whole rest went to the provider: the escrow is closed, and nothing is owed any more."""
    escrow = locked_until(sandbox, "release")
    node = make_node(escrow=f'on_deadline = "{policy}"')
    node.bind(escrow, "stream")
    node.use(escrow, 5, "u1")  # Below every threshold.
    move_clock(sandbox, 3700)
    node.ask("POST", f"/v1/agreements/{escrow}/settle", {})
    node.wait_state(escrow, "closed")

    assert "0.00" == node.agreement(escrow)["uncollectible"]
    assert Decimal(1) == Decimal(sandbox.status(escrow)["released_amount"])


@pytest.mark.parametrize("policy", ["consumer", "unknown"])
def test_a_service_that_refunds_at_the_deadline_leaves_usage_uncollectible(
    make_node, sandbox, policy
):
    """What was not settled before is lost, and said: in the log, on the screen, in the metric."""
    escrow = locked_until(sandbox, "refund")
    node = make_node(escrow=f'on_deadline = "{policy}"')
    node.bind(escrow, "stream")
    node.use(escrow, 5, "u1")
    move_clock(sandbox, 3700)
    node.ask("POST", f"/v1/agreements/{escrow}/settle", {})
    node.wait_state(escrow, "closed")
    (said,) = node.wait_logged("uncollectible")

    metrics = node.ask("GET", "/metrics").raw.decode()
    assert "0.005 USDC" in said["event"]
    assert "0.005" == node.agreement(escrow)["uncollectible"]
    assert "meterd_uncollectible_usdc 0.005" in metrics
    assert Decimal(0) == paid(sandbox, escrow)


def test_usage_that_a_deadline_left_unpaid_is_paid_by_the_next_escrow(make_node, sandbox):
    """The service refunds the first escrow: what it did not pay is drawn on the second."""
    first, second = locked_until(sandbox, "refund"), lock(sandbox, "1.00", "by hand")
    node = make_node(escrow="")
    body = {"plan": "stream", "escrows": {"main": [first, second]}}
    node.ask("PUT", "/v1/agreements/pair", body)
    wait_open(node, "pair")
    node.use("pair", 5, "u1")
    move_clock(sandbox, 3700)
    node.ask("POST", "/v1/agreements/pair/settle", {})
    until(lambda: node.agreement("pair")["escrows"][0]["status"] == "closed", "the end of it")
    node.use("pair", 5, "u2")
    node.wait_agreement("pair", accrued="0.01", released="0.01", uncollectible="0.00")

    assert (Decimal(0), Decimal("0.01")) == (paid(sandbox, first), paid(sandbox, second))
    assert [] == node.logged("uncollectible")


def test_usage_is_settled_before_a_deadline_that_comes_near(make_node, sandbox):
    """Below every threshold, it is paid while the service still holds the money."""
    move_clock(sandbox, -3000)  # So that an hour's deadline is ten minutes away.
    escrow = locked_until(sandbox, "refund")
    node = make_node(escrow="")
    node.bind(escrow, "stream")
    node.use(escrow, 5, "u1")
    node.wait_agreement(escrow, released="0.005")

    assert Decimal("0.005") == paid(sandbox, escrow)
