"""What a person on call sees and types, in every trouble that a real service can make.

Each trouble must show on one screen what is wrong, what it costs and what to type, must be in the
log with the same command and in the metrics, and the command must help.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.stage import Node, clear_faults, configuration, paid, until
from tests.processes import Sandbox

# One void a day, so that the second doubt of an escrow wants a person.
SETTINGS = 'in_doubt_quarantine = "600ms"\nvoids_per_day = 1'


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    with Sandbox(tmp_path / "sandbox") as sandbox:
        yield sandbox


@pytest.fixture
def node(tmp_path: Path, sandbox: Sandbox) -> Iterator[Node]:
    with Node(tmp_path, configuration(sandbox, escrow=SETTINGS)) as node:
        node.wait_ready()
        yield node


def bound(node: Node, sandbox: Sandbox, name: str) -> str:
    """An agreement of this name on an escrow of its own; the escrow."""
    escrow = sandbox.lock("1.00")
    node.bind(escrow, "stream", name)
    return escrow


def used(node: Node, name: str, quantity: int, event: str) -> None:
    event_of = {"id": event, "agreement": name, "meter": "units", "quantity": quantity}
    assert node.send(event_of)["accepted"] == 1


def shown(node: Node, name: str) -> list[str]:
    """The lines of `meterd status` about one agreement: what, why and the command."""
    lines = node.type("status").stdout.splitlines()
    places = [place for place, line in enumerate(lines) if re.match(rf"\w+ {name}( |$)", line)]
    return [line.strip() for line in lines[places[0] : places[0] + 3]] if places else []


def wait_shown(node: Node, name: str, state: str) -> list[str]:
    """Wait until the screen shows an agreement in this trouble."""

    def listed() -> bool:
        status = node.get("/v1/status")
        lists = ("frozen", "in_doubt", "exhausted", "paused")
        found = [item for kind in lists for item in status[kind] if item["agreement"] == name]
        return any(item["state"] == state for item in found)

    until(listed, lambda: f"{name} to be {state}: {node.get('/v1/status')}")
    return until(
        lambda: lines if (lines := shown(node, name)) and lines[0].split()[0] == state else None,
        lambda: f"{name} to be {state} on:\n{node.type('status').stdout}",
    )


def metric(node: Node, name: str) -> float:
    text = node.ask("GET", "/metrics").raw.decode()
    (value,) = re.findall(rf"^meterd_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def wait_metric(node: Node, name: str, value: float) -> None:
    until(lambda: metric(node, name) == value, lambda: f"{name}: {metric(node, name)}")


def told(node: Node, action: str, name: str) -> list[str]:
    """The commands that the log named for an agreement with this action."""
    return [line["next"] for line in node.logged(action) if line["agreement"] == name]


def test_a_doubt_is_waited_for_and_an_escalated_one_is_resolved_by_hand(
    node: Node, sandbox: Sandbox
) -> None:
    """The first shows a command that looks, the second one that decides, and what it means."""
    escrow = bound(node, sandbox, "doubted")
    sandbox.fault(kind="close_before", call="release_partial", escrow_id=escrow, count=2)
    used(node, "doubted", 20, "e1")
    doubt = wait_shown(node, "doubted", "in_doubt")
    waited = node.type("status").returncode
    escalated = wait_shown(node, "doubted", "escalated")
    wait_metric(node, "releases_escalated", 1)
    wait_metric(node, "escrows_frozen", 1)
    code = node.type("status").returncode
    release = node.agreement("doubted")["release"]["id"]
    looked = node.type("resolve", release, "--absent", "--reason", "looked", "--dry-run")
    still = node.agreement("doubted")["release"]["status"]
    resolved = node.type("resolve", release, "--absent", "--reason", "looked")
    frozen = wait_shown(node, "doubted", "frozen")
    until(
        lambda: node.type("resume", "doubted", "--reason", "looked").returncode == 0,
        lambda: node.agreement("doubted"),
    )
    node.wait_agreement("doubted", released="0.02", state="active", in_doubt="0.00")

    assert doubt[0] == "in_doubt doubted  0.02 USDC may or may not be paid"
    assert "if none does, it is given up and paid anew in" in doubt[1]
    assert doubt[2] == "> meterd releases doubted"
    assert escalated[0] == "escalated doubted  0.02 USDC may or may not be paid"
    assert escalated[2] == f"> meterd resolve {release} --landed|--absent --reason TEXT"
    assert code == 3
    assert waited in {0, 3}  # It may have been escalated meanwhile.
    assert (looked.returncode, still) == (0, "escalated")
    assert "pays it twice" in looked.stdout
    assert resolved.returncode == 0, resolved.stderr
    assert frozen[2] == "> meterd resume doubted --reason TEXT"
    assert "meterd releases doubted" in told(node, "release_in_doubt", "doubted")
    assert escalated[2].removeprefix("> ") in told(node, "escrow_frozen", "doubted")
    assert paid(sandbox, escrow) == Decimal("0.02")


def test_a_release_that_lands_late_is_called_so_and_resumed(node: Node, sandbox: Sandbox) -> None:
    """With its amount: what one mistake of the world cost."""
    escrow = bound(node, sandbox, "belated")
    sandbox.fault(kind="land_late", call="release_partial", escrow_id=escrow, seconds=4)
    used(node, "belated", 20, "e1")
    until(lambda: len(sandbox.operations(escrow)) == 2, "the first call to land, paid anew")
    used(node, "belated", 20, "e2")
    late = wait_shown(node, "belated", "late")
    wait_metric(node, 'releases_total{outcome="late"}', 1)
    resumed = node.type("resume", "belated", "--reason", "told the service")
    used(node, "belated", 20, "e3")
    node.wait_agreement("belated", released="0.06", state="active")

    assert late[0] == "late belated  0.02 USDC landed late"
    assert "landed after it was given up" in late[1]
    assert late[2] == "> meterd resume belated --reason TEXT"
    assert late[2].removeprefix("> ") in told(node, "escrow_frozen", "belated")
    assert resumed.returncode == 0, resumed.stderr
    assert paid(sandbox, escrow) == Decimal("0.06")


def test_a_foreign_release_shows_what_resuming_takes_for_true(node: Node, sandbox: Sandbox) -> None:
    """Before it is done, with both figures and the difference."""
    escrow = bound(node, sandbox, "foreign")
    sandbox.fault(kind="foreign_release", escrow_id=escrow, amount="0.004")
    used(node, "foreign", 20, "e1")
    frozen = wait_shown(node, "foreign", "frozen")
    looked = node.type("resume", "foreign", "--reason", "it was us", "--dry-run")
    state = node.agreement("foreign")["state"]
    node.type("resume", "foreign", "--reason", "it was us")
    node.wait_agreement("foreign", released="0.02", state="active")

    assert frozen[0] == "frozen foreign  0.016 USDC earned and not paid"
    assert "0.004 USDC more were released than meterd asked for" in frozen[1]
    assert "shows 0.004 USDC released, meterd knows of 0" in looked.stdout
    assert "The 0.004 beyond that are taken as payment" in looked.stdout
    assert (looked.returncode, state) == (0, "frozen")
    assert paid(sandbox, escrow) == Decimal("0.016")


def test_what_the_service_does_not_let_be_paid_is_shown_with_its_words(
    node: Node, sandbox: Sandbox
) -> None:
    """A dispute, a deposit that is used up, an escrow that is not there: none of them is silent."""
    dispute = bound(node, sandbox, "disputed")
    sandbox.fault(kind="dispute", escrow_id=dispute)
    used(node, "disputed", 20, "e1")
    bound(node, sandbox, "dry")
    used(node, "dry", 1500, "e2")
    node.ask("PUT", "/v1/agreements/nowhere", {"plan": "stream", "escrows": {"main": "esc_none"}})
    paused = wait_shown(node, "disputed", "paused")
    exhausted = wait_shown(node, "dry", "exhausted")
    unadopted = wait_shown(node, "nowhere", "adopting")
    wait_metric(node, "escrows_paused", 1)
    wait_metric(node, "escrows_exhausted", 1)

    assert paused == [
        "paused disputed  0.02 USDC earned and not paid",
        "the service says 'disputed'",
        "> meterd agreements disputed",
    ]
    assert exhausted[0] == "exhausted dry  0.50 USDC used beyond what is left"
    assert exhausted[2] == "> meterd bind NEW_ESCROW --plan stream"
    assert "404" in unadopted[1]
    assert unadopted[2] == "> meterd check --live"
    assert told(node, "escrow_paused", "disputed") == ["meterd agreements disputed"]


def test_a_refused_key_needs_a_person_and_says_what_helps(node: Node, sandbox: Sandbox) -> None:
    """The second line of the screen is what to do, and the exit code is 3."""
    bound(node, sandbox, "unpaid")
    sandbox.fault(kind="unauthorized_401", count=1000)
    used(node, "unpaid", 20, "e1")
    status = until(
        lambda: done if (done := node.type("status")).stdout.startswith("Nothing is") else None,
        lambda: node.type("status").stdout,
    )
    refusals = metric(node, 'alarms_total{action="key_refused"}')
    clear_faults(sandbox)

    assert refusals >= 1
    assert status.returncode == 3
    assert "the escrow service refuses the key" in status.stdout.splitlines()[0]
    assert "meterd check --live" in status.stdout.splitlines()[1]
    assert node.logged("key_refused")[0]["next"] == "meterd check --live"


def test_a_daemon_that_starts_with_something_frozen_says_so(node: Node, sandbox: Sandbox) -> None:
    """What a person froze yesterday is in today's log."""
    bound(node, sandbox, "cold")
    node.type("freeze", "cold", "--reason", "asking the customer")
    node.stop()
    node.start()
    node.wait_ready()
    (found,) = node.wait_logged("found_frozen")
    lines = wait_shown(node, "cold", "frozen")

    assert (found["escrows"], found["next"]) == (1, "meterd status")
    assert lines[1] == "http: asking the customer"


def test_every_act_of_a_person_is_in_the_journal(
    node: Node, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Who, what, to what and why, newest first; and the auditor follows its chain."""
    escrow = bound(node, sandbox, "busy")
    copy = tmp_path / "copy.db"
    node.send({"id": "x", "agreement": "nobody", "meter": "units", "quantity": 1})
    for words in (
        ("freeze", "busy", "--reason", "odd"),
        ("resume", "busy", "--reason", "fine"),
        ("settle", "busy", "--reason", "the month is over"),
        ("dead-letters", "discard", "1", "--reason", "a test"),
        ("backup", str(copy)),
        ("close", "busy", "--reason", "it is over"),
    ):
        until(
            lambda words=words: node.type(*words).returncode == 0, f"{' '.join(words)} to be taken"
        )
    node.wait_state("busy", "closed")
    entries = journal_of(node)
    shown_to_people = node.type("journal", "--limit", "3").stdout
    node.stop()
    verified = node.type("verify", "--live")

    acts = [(entry["action"], entry["subject"], entry["detail"]) for entry in entries]
    assert acts.count(("escrow_frozen", escrow, "odd")) == 1
    own = {"escrow_resumed", "refund_asked"}  # What meterd writes down by itself.
    assert [act for act in acts if act[0] not in own] == [
        ("agreement_closing", "busy", "it is over"),
        ("backup_asked", str(copy), ""),
        ("dead_letter_discarded", "dead letter 1", "a test"),
        ("settlement_asked", "busy", "the month is over"),
        ("escrow_frozen", escrow, "odd"),
        ("agreement_bound", "busy", f"plan stream, escrows {{'main': '{escrow}'}}"),
    ]
    assert ("escrow_resumed", escrow, "fine") in acts
    assert {entry["actor"] for entry in entries} == {"http", "meterd"}
    numbers = [entry["number"] for entry in entries]
    assert numbers == list(range(len(entries), 0, -1))
    assert "agreement_closing" in shown_to_people
    assert verified.returncode == 0, verified.stdout


def journal_of(node: Node) -> list[Any]:
    """The whole journal, newest first, read in pages of two."""
    entries: list[Any] = []
    cursor = ""
    while cursor is not None:
        page = node.get(f"/v1/journal?limit=2&cursor={cursor}")
        entries += page["items"]
        cursor = page["next"]
    return entries
