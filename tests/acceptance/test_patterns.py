"""The whole life of each billing pattern: from the first use to the end, on real escrows.

Each life has a daemon and an escrow service of its own, as processes over HTTP, and is told by
configuration alone. The service's own log of what moved is the judge, to the last micro.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.acceptance.stage import Node, configuration, move_clock, until
from tests.processes import PAYER_KEY, Sandbox, call

PAYER = "agent_payer"
MakeNode = Callable[..., Node]


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """A service of the life's own."""
    with Sandbox(tmp_path / "service") as service:
        yield service


@pytest.fixture
def make_node(tmp_path: Path, sandbox: Sandbox) -> Iterator[MakeNode]:
    """Start a daemon on plans and agreements; at the end it is killed, and the auditor agrees."""
    nodes: list[Node] = []
    with contextlib.ExitStack() as stack:

        def make(plans: str, *agreements: str, **tables: str) -> Node:
            rest = "\n".join((tables.pop("rest", ""), *agreements))
            text = configuration(sandbox, plans=plans, rest=rest, **tables)
            node = stack.enter_context(Node(tmp_path, text))
            node.wait_ready()
            nodes.append(node)
            return node

        yield make
        for node in nodes:
            node.kill()
            audit = node.type("verify", "--live", "--json")
            assert audit.returncode == 0, (audit.stdout, audit.stderr)


def agreement(name: str, plan: str, **escrows: object) -> str:
    """An agreement of the configuration."""
    by_role = ", ".join(f"{role} = {json.dumps(ids)}" for role, ids in escrows.items())
    return (
        f'[[agreements]]\nid = "{name}"\nplan = "{plan}"\npayer = "{PAYER}"\n'
        f"escrows = {{ {by_role} }}\n"
    )


def moved(sandbox: Sandbox, escrow: str) -> list[tuple[str, str]]:
    """All that left an escrow, by the service's own log: what and how much, oldest first."""
    rows = call("GET", f"{sandbox.base}/_operations?escrow_id={escrow}")["operations"]
    return [(row["kind"], row["amount"]) for row in rows if row["kind"] != "create"]


def released(*amounts: str) -> list[tuple[str, str]]:
    """The same, where meterd released these amounts."""
    return [("release_partial", amount) for amount in amounts]


def debits(sandbox: Sandbox) -> list[str]:
    """All that left the payer's wallet by debits."""
    url = f"{sandbox.base}/_operations?kind=debit&agent_id={PAYER}"
    return [row["amount"] for row in call("GET", url)["operations"]]


def wait_moved(sandbox: Sandbox, escrow: str, expected: list[tuple[str, str]]) -> None:
    """Wait until exactly this has left an escrow."""
    until(
        lambda: moved(sandbox, escrow) == expected,
        lambda: f"{escrow} to have moved {expected}: {moved(sandbox, escrow)}",
    )


def event(owner: str, event_id: str, **fields: object) -> dict[str, object]:
    """One event of an agreement. Ids are of one source, so no two agreements may share one."""
    return {"id": event_id, "agreement": owner, **fields}


def units(name: str, event_id: str, quantity: object, **fields: object) -> dict[str, object]:
    """One event that uses units."""
    return event(name, event_id, meter="units", quantity=quantity, **fields)


def calls(name: str, prefix: str, number: int) -> list[dict[str, object]]:
    """So many single calls."""
    return [event(name, f"{prefix}-{n}", meter="calls", quantity=1) for n in range(number)]


def take(node: Node, *events: dict[str, object]) -> None:
    """Send events that must all be accepted."""
    assert node.send(*events) == {"accepted": len(events), "duplicates": 0, "rejected": []}


def reasons(node: Node, *events: dict[str, object]) -> list[str]:
    """Send events of which none is accepted; why."""
    answer = node.send(*events)
    assert answer["accepted"] == 0, answer
    return [one["reason"] for one in answer["rejected"]]


def ask(node: Node, name: str, meter: str, quantity: object = 1, **fields: object) -> Any:
    """Ask whether a call may be served; the answer's status and document."""
    body = {"agreement": name, "meter": meter, "quantity": quantity, **fields}
    answer = node.ask("POST", "/v1/authorize", body)
    return answer.status, answer.json


def serve(node: Node, name: str, meter: str, used: object = None) -> None:
    """Serve one call as a paid service does: reserve, work, capture what was really used."""
    status, answer = ask(node, name, meter, hold=60)
    assert status == 200, answer
    body = {} if used is None else {"quantity": used}
    captured = node.ask("POST", f"/v1/holds/{answer['hold']}/capture", body)
    assert captured.json == {"accepted": 1, "duplicates": 0, "rejected": []}


def close(node: Node, name: str) -> Any:
    """Send the event that closes an agreement, and wait until it is."""
    take(node, event(name, f"{name}-close", type="meterd.close"))
    return node.wait_state(name, "closed")


def restart(node: Node) -> None:
    """Kill the daemon as a power cut would, and start it on the same state."""
    node.kill()
    node.start()
    node.wait_ready()


def within(node: Node, name: str, seconds: float) -> str:
    """A moment so long after an agreement was opened: the time of an event says its period."""
    opened = datetime.fromisoformat(node.agreement(name)["opened_at"])
    return (opened + timedelta(seconds=seconds)).isoformat()


# -- Pay per call ----------------------------------------------------------------------------------

PER_CALL = """
[plans.calls]
pattern = "pay_per_call"
rates = [{ meter = "calls", price = "0.001" }]
"""
ON_WALLET = agreement("calls", "calls", wallet=PAYER)


def test_micro_fees_are_gathered_until_the_wallet_takes_them(make_node, sandbox):
    """Twelve calls of 0.001 are one debit of 0.01; less than the minimum never is one."""
    node = make_node(PER_CALL, ON_WALLET)
    node.wait_state("calls", "active")
    for _ in range(9):
        serve(node, "calls", "calls")
    _, unused = ask(node, "calls", "calls", hold=60)
    voided = node.ask("POST", f"/v1/holds/{unused['hold']}/void", {})
    before = node.requests("wallet_read")
    node.ask("POST", "/v1/agreements/calls/settle", {"reason": "a person asks too early"})
    until(lambda: node.requests("wallet_read") > before, "a reading of the wallet")
    early = debits(sandbox)
    serve(node, "calls", "calls")
    until(lambda: debits(sandbox) == ["0.01"], lambda: debits(sandbox))
    serve(node, "calls", "calls")
    restart(node)
    serve(node, "calls", "calls")
    closed = close(node, "calls")

    assert (voided.status, early) == (200, [])
    assert (closed["accrued"], closed["released"]) == ("0.012", "0.01")
    assert (closed["uncollectible"], closed["holds"]) == ("0.002", "0.00")
    assert debits(sandbox) == ["0.01"]
    assert ask(node, "calls", "calls")[0] == 402


def test_a_hold_outlives_the_daemon_and_a_captured_or_expired_one_does_not(make_node, sandbox):
    """Killed in the middle of a call: what was set aside still is, and is captured once."""
    sandbox.lock("9999.985")  # What is left of the payer's play money is 0.015.
    node = make_node(PER_CALL, ON_WALLET)
    node.wait_state("calls", "active")
    _, kept = ask(node, "calls", "calls", 10, hold=600)
    _, short = ask(node, "calls", "calls", 4, hold=1)
    _, done = ask(node, "calls", "calls", hold=600)
    path = f"/v1/holds/{done['hold']}/capture"
    assert node.ask("POST", path, {}).json["accepted"] == 1
    restart(node)
    listed = [hold["id"] for hold in node.get("/v1/holds")["items"]]
    again = node.ask("POST", path, {}).json
    denied = ask(node, "calls", "calls", 5)[0]
    until(lambda: ask(node, "calls", "calls", 4)[0] == 200, "the short hold to expire")
    captured = node.ask("POST", f"/v1/holds/{kept['hold']}/capture", {}).json
    left = node.agreement("calls")

    assert kept["hold"] in listed
    assert done["hold"] not in listed
    assert (again["accepted"], again["duplicates"]) == (0, 1)
    assert denied == 402
    assert node.ask("POST", f"/v1/holds/{short['hold']}/capture", {}).status == 404
    assert (captured["accepted"], left["holds"], left["accrued"]) == (1, "0.00", "0.002")


def test_a_wallet_whose_debits_get_lost_is_debited_exactly(make_node, sandbox):
    """Refused, unanswered, late: each ten calls are one debit of 0.01 in the end."""
    node = make_node(PER_CALL, ON_WALLET)
    node.wait_state("calls", "active")
    faults: list[dict[str, object]] = [
        {"kind": "error_500_before"},
        {"kind": "error_500_after"},
        {"kind": "close_before"},
        {"kind": "close_after"},
        {"kind": "land_late", "seconds": 0.3},
        {"kind": "html_page"},
        {"kind": "empty_200"},
        {"kind": "rate_limit", "retry_after": 0},
        {"kind": "conflict_409"},
    ]
    for number, fault in enumerate(faults, start=1):
        sandbox.fault(**fault, call="debit", escrow_id=PAYER)
        take(node, *calls("calls", f"round {number}", 10))
        node.wait_agreement("calls", released=f"{Decimal('0.01') * number:f}", in_doubt="0.00")
    struck = [rule["struck"] for rule in call("GET", f"{sandbox.base}/_faults")["faults"]]
    closed = close(node, "calls")

    assert struck == [1] * len(faults)
    assert debits(sandbox) == ["0.01"] * len(faults)
    assert (closed["released"], closed["uncollectible"]) == ("0.09", "0.00")


def test_a_wallet_that_runs_dry_denies_and_pays_when_it_is_filled(make_node, sandbox):
    """The gate stops at the last micro; usage that comes all the same is kept, and paid later."""
    sandbox.lock("9999.985")  # What is left of the payer's play money is 0.015.
    node = make_node(PER_CALL, ON_WALLET)
    node.wait_state("calls", "active")
    for _ in range(10):
        serve(node, "calls", "calls")
    node.wait_agreement("calls", released="0.01")
    for _ in range(5):
        serve(node, "calls", "calls")
    denied = ask(node, "calls", "calls")
    take(node, *calls("calls", "unasked", 5))
    dry = node.agreement("calls")
    call("POST", f"{sandbox.base}/_wallet", {"agent_id": PAYER, "amount": "1.00"})
    until(lambda: ask(node, "calls", "calls")[0] == 200, "the gate to see that it was filled")
    node.wait_agreement("calls", released="0.02", uncollectible="0.00")

    assert (denied[0], denied[1]["missing"]) == (402, "0.001")
    assert dry["uncollectible"] == "0.005"
    assert debits(sandbox) == ["0.01", "0.01"]


def test_calls_that_draw_on_an_escrow_are_paid_to_the_last(make_node, sandbox):
    """An escrow has no minimum: at the close the rest below the threshold is released too."""
    escrow = sandbox.lock("1.00")
    plans = f'{PER_CALL}draws_on = "escrow"\nsettle = {{ amount = "0.01" }}\n'
    node = make_node(plans, agreement("calls", "calls", main=escrow))
    node.wait_state("calls", "active")
    for _ in range(10):
        serve(node, "calls", "calls")
    node.wait_agreement("calls", released="0.01")
    for _ in range(2):
        serve(node, "calls", "calls")
    close(node, "calls")

    assert moved(sandbox, escrow) == released("0.01", "0.002")
    assert sandbox.status(escrow)["status"] == "partially_released"


# -- Pay per token ---------------------------------------------------------------------------------

PER_TOKEN = """
[plans.tokens]
pattern = "pay_per_token"
rates = [
  { meter = "tokens", price = "0.010", per = 1000, where = { model = "large", kind = "output" } },
  { meter = "tokens", price = "0.012", per = 1000, where = { model = "large", kind = "thought" } },
  { meter = "tokens", price = "0.0005", per = 1000, where = { kind = "cached" } },
  { meter = "tokens", price = "0.004", per = 1000, where = { model = "large" } },
  { meter = "tokens", price = "0.002", per = 1000 },
]
settle = { amount = "0.50", escrow_percent = 10 }
"""


def test_tokens_are_paid_by_model_and_kind(make_node, sandbox):
    """The first rate that matches counts; the first threshold that is reached pays."""
    escrow = sandbox.lock("1.00")
    node = make_node(PER_TOKEN, agreement("job", "tokens", main=escrow))
    node.wait_state("job", "active")

    def tokens(event_id: str, quantity: int, **dimensions: str) -> dict[str, object]:
        fields = {"meter": "tokens", "quantity": quantity, "dimensions": dimensions}
        return event("job", event_id, **fields)

    take(
        node,
        tokens("e1", 2000, model="large", kind="output"),  # 0.020
        tokens("e2", 1000, model="large", kind="thought"),  # 0.012
        tokens("e3", 10_000, model="large", kind="input"),  # 0.040
        tokens("e4", 2000, model="large", kind="cached"),  # 0.001
        tokens("e5", 4000, model="small", kind="cached"),  # 0.002
        tokens("e6", 12_001, model="small", kind="input"),  # 0.024002
    )
    before = node.agreement("job")
    take(node, tokens("e7", 499, model="small", kind="output"))  # 0.000998
    node.wait_agreement("job", released="0.10")
    take(node, tokens("e8", 1), tokens("e9", 1, kind="cached"))  # 0.000002 and 0.0000005
    closed = close(node, "job")

    assert (before["accrued"], before["released"]) == ("0.099002", "0.00")
    assert moved(sandbox, escrow) == released("0.10", "0.000002")
    assert [one["why"] for one in node.releases("job")] == ["close", "escrow_percent"]
    assert closed["accrued"] == "0.1000025"


# -- Subscription ----------------------------------------------------------------------------------

WEEKLY = """
[plans.weekly]
pattern = "subscription"
fee = "1.00"
period = "4s"

[plans.limited]
pattern = "subscription"
fee = "1.00"
period = "1h"
quota = { meter = "calls", units = 3 }

[plans.late]
pattern = "subscription"
fee = "1.00"
period = "1h"
quota = { meter = "calls", units = 3 }
settle = { before_deadline = "0s" }
"""


def test_a_subscription_is_renewed_by_the_next_escrow_and_lapses_without_one(make_node, sandbox):
    """Each period's fee is released at its end, from the oldest escrow, over a power cut too."""
    first, second, third, only = (sandbox.lock("1.00") for _ in range(4))
    agreements = (
        agreement("renewed", "weekly", main=first),
        agreement("lapsing", "weekly", main=only),
    )
    node = make_node(WEEKLY, *agreements)
    for name in ("renewed", "lapsing"):
        node.wait_state(name, "active")
    node.ask("PUT", "/v1/agreements/renewed", _on(first, second))
    node.ask("PUT", "/v1/agreements/renewed", _on(first, second, third))
    wait_moved(sandbox, first, released("1.00"))
    restart(node)
    lapsed = node.wait_state("lapsing", "closed")
    wait_moved(sandbox, second, released("1.00"))
    wait_moved(sandbox, third, released("1.00"))
    renewed = node.wait_state("renewed", "closed")

    assert moved(sandbox, first) == moved(sandbox, only) == released("1.00")
    assert (lapsed["accrued"], lapsed["uncollectible"]) == ("1.00", "0.00")
    assert (renewed["accrued"], renewed["released"]) == ("3.00", "3.00")
    assert ask(node, "lapsing", "calls")[0] == 402
    assert len(node.logged("agreement_lapsed")) == 2


def _on(*escrows: str) -> dict[str, object]:
    return {"plan": "weekly", "escrows": {"main": list(escrows)}}


def test_a_quota_is_held_at_the_gate(make_node, sandbox):
    """What is used and what is set aside count together; usage itself costs nothing."""
    escrow = sandbox.lock("1.00")
    node = make_node(WEEKLY, agreement("sub", "limited", main=escrow))
    node.wait_state("sub", "active")
    serve(node, "sub", "calls")
    serve(node, "sub", "calls")
    _, last = ask(node, "sub", "calls", hold=60)
    denied = ask(node, "sub", "calls")
    node.ask("POST", f"/v1/holds/{last['hold']}/void", {})
    freed = ask(node, "sub", "calls")
    take(node, *calls("sub", "more", 2))
    beyond = ask(node, "sub", "calls")
    used = node.agreement("sub")["accrued"]
    closed = close(node, "sub")

    assert (denied[0], freed[0], beyond[0]) == (402, 200, 402)
    assert "quota" in denied[1]["reason"]
    assert (used, closed["accrued"]) == ("0.00", "1.00")
    assert moved(sandbox, escrow) == released("1.00")


def test_a_fee_is_released_before_the_services_own_deadline(make_node, sandbox):
    """A deadline inside the period ends it early, and who has paid is served on until its end."""
    # The service's clock is behind, so that an hour of its ends 66 s from now. The margin before a
    # deadline is twice the quarantine and a minute.
    move_clock(sandbox, 66 - 3600)
    escrow = _lock_for_an_hour(sandbox)
    node = make_node(WEEKLY, agreement("sub", "late", main=escrow))
    wait_moved(sandbox, escrow, released("1.00"))
    paid = node.wait_agreement("sub", released="1.00", accrued="1.00")
    served, answer = ask(node, "sub", "calls")

    assert paid["state"] != "closed"
    assert (served, answer) == (200, answer)
    assert sandbox.status(escrow)["status"] == "released"


def test_a_fee_that_the_service_pays_by_itself_is_taken_as_payment(make_node, sandbox):
    """With at_period_end = "auto" the service's own release at the deadline is the payment."""
    plans = WEEKLY.replace('period = "4s"', 'period = "6s"\nat_period_end = "auto"')
    escrow = _lock_for_an_hour(sandbox)
    settings = 'on_deadline = "provider"'
    node = make_node(plans, agreement("sub", "weekly", main=escrow), escrow=settings)
    node.wait_state("sub", "active")
    move_clock(sandbox, 3601)
    wait_moved(sandbox, escrow, [("auto_release", "1.00")])
    closed = node.wait_state("sub", "closed")
    paid = node.wait_agreement("sub", accrued="1.00")

    assert moved(sandbox, escrow) == [("auto_release", "1.00")]
    assert (closed["escrows"][0]["status"], paid["released"]) == ("closed", "1.00")
    assert (paid["unsettled"], paid["uncollectible"]) == ("0.00", "0.00")
    assert node.releases("sub") == []


def _lock_for_an_hour(sandbox: Sandbox) -> str:
    body = {"to_agent_id": "agent_provider", "amount": "1.00", "auto_release_hours": 1}
    return str(call("POST", f"{sandbox.api}/escrow", body, PAYER_KEY)["escrow_id"])


# -- Milestone -------------------------------------------------------------------------------------

PROJECT = """
[plans.project]
pattern = "milestone"
deposit = "10.00"
tranches = [
  { name = "draft", amount = "2.50" },
  { name = "build", amount = "5.00" },
  { name = "launch", amount = "2.50" },
]
"""


def reach(name: str, event_id: str, tranche: str) -> dict[str, object]:
    """One milestone."""
    return event(name, event_id, type="meterd.milestone", name=tranche)


def test_milestones_are_paid_in_any_order_and_each_once(make_node, sandbox):
    """Three tranches are the whole deposit; a second event for one is refused under another id."""
    escrow = sandbox.lock("10.00")
    node = make_node(PROJECT, agreement("site", "project", main=escrow))
    node.wait_state("site", "active")
    take(node, reach("site", "m1", "launch"))
    wait_moved(sandbox, escrow, released("2.50"))
    restart(node)
    again = node.send(reach("site", "m1", "launch"))
    twice = reasons(node, reach("site", "m2", "launch"))
    unknown = reasons(node, reach("site", "m3", "party"))
    take(node, reach("site", "m4", "build"))
    wait_moved(sandbox, escrow, released("2.50", "5.00"))
    take(node, reach("site", "m5", "draft"))
    wait_moved(sandbox, escrow, released("2.50", "5.00", "2.50"))

    assert again == {"accepted": 0, "duplicates": 1, "rejected": []}
    assert (twice, unknown) == (["reached"], ["unknown_meter"])
    assert sandbox.status(escrow)["status"] == "released"


def test_ordered_milestones_wait_for_their_turn(make_node, sandbox):
    """One that comes too early is refused and taken later under the same id."""
    escrow = sandbox.lock("10.00")
    node = make_node(f"{PROJECT}ordered = true\n", agreement("site", "project", main=escrow))
    node.wait_state("site", "active")
    early = reasons(node, reach("site", "m2", "build"), reach("site", "m3", "launch"))
    take(node, reach("site", "m1", "draft"), reach("site", "m2", "build"))
    wait_moved(sandbox, escrow, released("7.50"))
    closed = close(node, "site")

    assert early == ["out_of_order", "out_of_order"]
    assert (closed["accrued"], closed["released"]) == ("7.50", "7.50")
    assert moved(sandbox, escrow) == released("7.50")


# -- Streaming -------------------------------------------------------------------------------------

STREAM = """
[plans.stream]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { units = 100, interval = "2s" }
"""


def test_a_stream_is_paid_in_batches_and_its_rest_refunded(make_node, sandbox):
    """By count, by time, with the rest carried over a power cut; at the close nothing is left."""
    escrow = sandbox.lock("10.00")
    node = make_node(STREAM, agreement("job", "stream", main=escrow))
    node.wait_state("job", "active")
    take(node, units("job", "u1", 100))
    wait_moved(sandbox, escrow, released("0.10"))
    take(node, units("job", "u2", 37))
    wait_moved(sandbox, escrow, released("0.10", "0.037"))
    take(node, units("job", "u3", "4.9996"))  # Below min_release: no interval pays it.
    restart(node)
    kept = node.agreement("job")["unsettled"]
    take(node, units("job", "u4", "95.0009"))
    wait_moved(sandbox, escrow, released("0.10", "0.037", "0.10"))
    sandbox.fault(kind="error_500_before", call="refund", escrow_id=escrow)
    take(node, units("job", "u5", 3))
    closed = close(node, "job")
    last = [*released("0.10", "0.037", "0.10", "0.003"), ("refund", "9.76")]
    wait_moved(sandbox, escrow, last)

    assert kept == "0.004999"
    assert (closed["accrued"], closed["released"]) == ("0.2400005", "0.24")
    whys = [one["why"] for one in node.releases("job")]
    assert (whys[0], whys[2], whys[3]) == ("close", "interval", "units")
    assert sandbox.status(escrow)["status"] == "refunded"
    assert reasons(node, units("job", "u6", 1)) == ["closed"]


# -- Performance -----------------------------------------------------------------------------------

EVALUATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ANSWER = f"""
[plans.answer]
pattern = "performance"
deposit = "10.00"
steps = [{{ score = "0.9", share = "1" }}, {{ score = "0.7", share = "0.70" }}]

[plans.judged]
pattern = "performance"
deposit = "10.00"
steps = [{{ score = "0.9", share = "1" }}, {{ score = "0.7", share = "0.70" }}]
outcome_key = "{EVALUATOR.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()}"
"""


def outcome(name: str, event_id: str, score: object, **fields: object) -> dict[str, object]:
    """One outcome."""
    return event(name, event_id, type="meterd.outcome", score=score, **fields)


def test_a_score_says_how_much_of_the_deposit_is_earned(make_node, sandbox):
    """From 0.9 on all, from 0.7 on seven tenths, below nothing; the rest goes back to the payer."""
    scores: dict[str, tuple[object, list[tuple[str, str]]]] = {
        "best": ("0.9", released("10.00")),
        "good": ("0.899999999", [*released("7.00"), ("refund", "3.00")]),
        "fair": (0.7, [*released("7.00"), ("refund", "3.00")]),
        "poor": ("0.699999999", [("refund", "10.00")]),
        "none": (0, [("refund", "10.00")]),
    }
    escrows = {name: sandbox.lock("10.00") for name in scores}
    node = make_node(ANSWER, *(agreement(name, "answer", main=escrows[name]) for name in scores))
    for name in scores:
        node.wait_state(name, "active")
    answers = [
        node.send(outcome(name, f"{name}-1", score), outcome(name, f"{name}-2", "1"))
        for name, (score, _) in scores.items()
    ]
    for name, (_, expected) in scores.items():
        wait_moved(sandbox, escrows[name], expected)
        node.wait_state(name, "closed")

    refused = [[one["reason"] for one in answer["rejected"]] for answer in answers]
    late = reasons(node, outcome("poor", "poor-3", "1"))

    assert late == ["closed"]
    assert ([answer["accepted"] for answer in answers], refused) == ([1] * 5, [["reached"]] * 5)
    assert [moved(sandbox, escrows[name]) for name in scores] == [row for _, row in scores.values()]


def test_a_score_counts_only_with_its_evaluators_signature(make_node, sandbox):
    """Without it, or with that of another score, nothing is paid and nothing is closed."""
    escrow = sandbox.lock("10.00")
    node = make_node(ANSWER, agreement("job", "judged", main=escrow))
    node.wait_state("job", "active")

    def signed(text: str) -> str:
        return base64.b64encode(EVALUATOR.sign(text.encode())).decode()

    forged = outcome("job", "o1", "1", signature=signed("job.o1.0.75"))
    good = outcome("job", "o1", "0.750", signature=signed("job.o1.0.75"))
    unsigned = outcome("job", "o1", "1")
    refused = reasons(node, forged, unsigned)
    open_still = node.agreement("job")
    taken = node.send(forged, good, good)
    wait_moved(sandbox, escrow, [*released("7.00"), ("refund", "3.00")])

    assert refused == ["bad_signature", "bad_signature"]
    assert (open_still["accrued"], open_still["closing"]) == ("0.00", False)
    assert (taken["accepted"], taken["duplicates"], len(taken["rejected"])) == (1, 1, 1)
    assert node.send(good)["duplicates"] == 1


# -- Hybrid ----------------------------------------------------------------------------------------

HYBRID = """
[plans.mixed]
pattern = "hybrid"
fee = "5.00"
period = "1h"
deposit = "5.00"
rates = [{ meter = "units", price = "0.01", free_units = 1000 }]
settle = { amount = "0.50" }

[plans.short]
pattern = "hybrid"
fee = "5.00"
period = "6s"
deposit = "5.00"
rates = [{ meter = "units", price = "0.01", free_units = 1000 }]
settle = { amount = "0.50" }
"""


def test_usage_beyond_the_base_is_drawn_on_its_own_budget_until_that_is_used_up(make_node, sandbox):
    """The border lies inside a batch and an event; unit 1,501 is denied, and lost if it comes."""
    base, overage = sandbox.lock("5.00"), sandbox.lock("5.00")
    node = make_node(HYBRID, agreement("team", "mixed", base=base, overage=overage))
    node.wait_state("team", "active")
    take(node, units("team", "u1", 990))
    covered = node.agreement("team")["accrued"]
    take(node, units("team", "u2", 5), units("team", "u3", 10), units("team", "u4", 5))
    beyond = node.agreement("team")["accrued"]
    take(node, units("team", "u5", 50))
    wait_moved(sandbox, overage, released("0.60"))
    status, _ = ask(node, "team", "units", 440, hold=60)
    full = ask(node, "team", "units", 1)
    take(node, units("team", "u6", 440))
    wait_moved(sandbox, overage, released("0.60", "4.40"))
    denied = ask(node, "team", "units", 1)
    take(node, units("team", "u7", 1))
    lost = node.agreement("team")
    closed = close(node, "team")

    assert (covered, beyond) == ("0.00", "0.10")
    assert (status, full[0], denied[0]) == (200, 402, 402)
    assert (lost["accrued"], lost["uncollectible"]) == ("5.01", "0.01")
    assert (closed["accrued"], closed["released"]) == ("10.01", "10.00")
    assert closed["uncollectible"] == "0.01"
    assert moved(sandbox, base) == released("5.00")
    assert moved(sandbox, overage) == released("0.60", "4.40")


def test_unused_overage_goes_back_at_the_close(make_node, sandbox):
    """The base is the provider's whatever was used; of the overage only what was used."""
    base, overage = sandbox.lock("5.00"), sandbox.lock("5.00")
    node = make_node(HYBRID, agreement("team", "mixed", base=base, overage=overage))
    node.wait_state("team", "active")
    take(node, units("team", "u1", "1020.5"))
    close(node, "team")
    wait_moved(sandbox, overage, [*released("0.205"), ("refund", "4.795")])

    assert moved(sandbox, base) == released("5.00")


def test_each_period_has_its_own_base_and_its_own_free_units(make_node, sandbox):
    """A late event of the first period is priced behind that period's usage; then nobody renews."""
    base, overage = sandbox.lock("5.00"), sandbox.lock("5.00")
    node = make_node(HYBRID, agreement("team", "short", base=base, overage=overage))
    node.wait_state("team", "active")
    first, second = within(node, "team", 1), within(node, "team", 7)
    take(node, units("team", "u1", 1010, time=first))
    wait_moved(sandbox, base, released("5.00"))
    take(node, units("team", "u2", 1000, time=second), units("team", "u3", 5, time=first))
    closed = node.wait_state("team", "closed")
    wait_moved(sandbox, overage, [*released("0.15"), ("refund", "4.85")])

    assert (closed["accrued"], closed["released"]) == ("5.15", "5.15")
    assert moved(sandbox, base) == released("5.00")


# -- Taking back -----------------------------------------------------------------------------------


def test_events_are_taken_back_before_and_after_they_were_paid(make_node, sandbox):
    """What was paid for one is credit: the next release is smaller, over power cuts too."""
    escrow = sandbox.lock("1.00")
    plans = STREAM.replace('units = 100, interval = "2s"', 'amount = "0.01"')
    node = make_node(plans, agreement("job", "stream", main=escrow))
    node.wait_state("job", "active")

    def void(event_id: str, voids: str) -> dict[str, object]:
        return event("job", event_id, type="meterd.void", voids=voids)

    take(node, units("job", "paid", 20))
    wait_moved(sandbox, escrow, released("0.02"))
    take(node, units("job", "open", "5.5"))
    restart(node)
    take(node, void("v1", "open"))
    node.wait_agreement("job", accrued="0.02")
    take(node, void("v2", "paid"))
    restart(node)
    credit = node.wait_agreement("job", accrued="0.00")
    refused = reasons(node, void("v3", "paid"), void("v4", "never"))
    take(node, units("job", "next", 50))
    wait_moved(sandbox, escrow, released("0.02", "0.03"))
    again = node.send(units("job", "paid", 20), void("v2", "paid"))
    closed = close(node, "job")
    wait_moved(sandbox, escrow, [*released("0.02", "0.03"), ("refund", "0.95")])

    assert (credit["released"], credit["unsettled"]) == ("0.02", "-0.02")
    assert refused == ["unknown_event", "unknown_event"]
    assert again == {"accepted": 0, "duplicates": 2, "rejected": []}
    assert (closed["accrued"], closed["released"]) == ("0.05", "0.05")
