"""Caps and the velocity breaker in earnest: a daemon, the sandbox, and people who look."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.stage import PLANS, Node, configuration, paid, until
from tests.processes import Sandbox

CAPPED = """
[plans.capped]
pattern = "streaming"
rates = [{ meter = "units", price = "0.01" }]
settle = { amount = "0.01" }
caps = { event_max = "0.05", lifetime_max = "0.20" }

[plans.watched]
pattern = "streaming"
rates = [{ meter = "units", price = "0.01" }]
settle = { amount = "0.01" }
caps = { velocity_max = "0.10", velocity_window = "1h" }
"""


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """An escrow service."""
    with Sandbox(tmp_path / "sandbox") as running:
        yield running


@pytest.fixture
def node(tmp_path: Path, sandbox: Sandbox) -> Iterator[Node]:
    """A daemon with a capped and a watched plan."""
    with Node(tmp_path, configuration(sandbox, plans=PLANS + CAPPED)) as running:
        running.wait_ready()
        yield running


def event(escrow: str, event_id: str, quantity: int) -> dict[str, Any]:
    """One event of so many cents."""
    return {"id": event_id, "escrow_id": escrow, "meter": "units", "quantity": quantity}


def test_what_is_over_a_cap_is_kept_and_counts_once_the_cap_is_raised(
    node: Node, sandbox: Sandbox
) -> None:
    """A dead letter with the key to raise; after SIGHUP a replay takes it, and it is paid."""
    escrow = sandbox.lock("1.00")
    node.bind(escrow, "capped")
    answer = node.send(event(escrow, "a", 5), event(escrow, "b", 6), event(escrow, "c", 4))
    letters = node.get("/v1/dead-letters?reason=over_cap")["items"]
    node.config.write_text(node.config.read_text().replace('event_max = "0.05"', 'event_max = "1"'))
    text = node.config.read_text().replace('lifetime_max = "0.20"', 'lifetime_max = "1.00"')
    node.config.write_text(text)
    node.signal(signal.SIGHUP)
    node.wait_logged("reloaded")
    replayed = node.type("dead-letters", "replay", "--all", "--reason", "over_cap")

    assert (answer["accepted"], [one["reason"] for one in answer["rejected"]]) == (2, ["over_cap"])
    assert "raise event_max of plans.capped.caps" in answer["rejected"][0]["detail"]
    assert [letter["event_id"] for letter in letters] == ["b"]
    assert replayed.returncode == 0, replayed.stderr
    until(lambda: paid(sandbox, escrow) == Decimal("0.15"), node.log_tail)


def test_the_life_of_an_agreement_is_bounded_across_a_crash(node: Node, sandbox: Sandbox) -> None:
    """Twenty cents, however they come, and whatever happens to the daemon meanwhile."""
    escrow = sandbox.lock("1.00")
    node.bind(escrow, "capped")
    for number in range(3):
        node.send(event(escrow, f"before-{number}", 5))
    node.kill()
    node.start()
    node.wait_ready()
    late = [node.send(event(escrow, f"after-{number}", 5))["accepted"] for number in range(3)]

    assert late == [1, 0, 0]
    until(lambda: paid(sandbox, escrow) == Decimal("0.20"), node.log_tail)


def test_usage_that_comes_too_fast_is_metered_and_paid_when_a_person_agrees(
    node: Node, sandbox: Sandbox
) -> None:
    """Frozen in the very commit, told with the next command, kept through a crash; then resumed."""
    escrow = sandbox.lock("2.00")
    node.bind(escrow, "watched")
    node.send(event(escrow, "slow", 5))
    until(lambda: paid(sandbox, escrow) == Decimal("0.05"), node.log_tail)
    node.send(event(escrow, "fast", 20))
    node.kill()
    node.start()
    node.wait_ready()
    node.send(event(escrow, "more", 20))
    shown = node.wait_state(escrow, "frozen")
    status = node.type("status")
    alarms = node.ask("GET", "/metrics").raw.decode()
    journal = [
        entry for entry in node.get("/v1/journal")["items"] if entry["action"] == "escrow_frozen"
    ]
    unpaid = paid(sandbox, escrow)
    logged = node.logged("velocity_exceeded")

    assert unpaid == Decimal("0.05")
    assert Decimal(shown["accrued"]) == Decimal("0.45")
    assert status.returncode == 3
    assert f"meterd resume {escrow}" in " ".join(status.stdout.split())
    assert "velocity_max" in logged[0]["event"]
    assert logged[0]["next"].startswith(f"meterd resume {escrow}")
    assert 'meterd_alarms_total{action="velocity_exceeded"}' in alarms
    assert (journal[0]["actor"], "velocity_max" in journal[0]["detail"]) == ("meterd", True)

    until(
        lambda: node.type("resume", escrow, "--reason", "a real customer").returncode == 0,
        node.log_tail,
    )
    until(lambda: paid(sandbox, escrow) == Decimal("0.45"), node.log_tail)
    node.send(event(escrow, "slow-again", 10))
    until(lambda: paid(sandbox, escrow) == Decimal("0.55"), node.log_tail)
    node.send(event(escrow, "fast-again", 1))
    node.wait_state(escrow, "frozen")
    node.stop()
    books = node.type("verify")
    assert books.returncode == 0, books.stdout


def test_a_new_escrow_is_no_way_around_a_persons_look(node: Node, sandbox: Sandbox) -> None:
    """Bound while the agreement is stopped, it is stopped too, and nothing is paid from it."""
    first, second = sandbox.lock("1.00"), sandbox.lock("1.00")
    node.bind(first, "watched")
    node.send(event(first, "fast", 150))
    node.wait_state(first, "frozen")
    body = {"plan": "watched", "escrows": {"main": [first, second]}}
    bound = node.ask("PUT", f"/v1/agreements/{first}", body)
    node.send(event(first, "more", 10))
    states = {one["id"]: one["status"] for one in node.agreement(first)["escrows"]}

    assert bound.status < 300, bound.raw
    assert states == {first: "frozen", second: "frozen"}
    assert paid(sandbox, first) == paid(sandbox, second) == 0
