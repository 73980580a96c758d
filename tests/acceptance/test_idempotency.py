"""Calls that are sent again with their key, when the daemon was killed in between."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from tests.acceptance.stage import Node, configuration
from tests.acceptance.test_agreements_open import (
    OPENABLE,
    WITH_PAYER,
    escrows_of_payer,
)
from tests.processes import Sandbox


@pytest.fixture
def sandbox(tmp_path: Path):
    with Sandbox(tmp_path / "sandbox") as server:
        yield server


@pytest.fixture
def node(tmp_path: Path, sandbox: Sandbox):
    text = configuration(sandbox, escrow=WITH_PAYER, plans=OPENABLE)
    with Node(tmp_path, text) as daemon:
        daemon.wait_ready()
        yield daemon


def die(node: Node) -> None:
    """SIGKILL, and start again."""
    node.kill()
    node.start()
    node.wait_ready()


def begin_only(node: Node) -> None:
    """Kill it, and leave the store as a kill between the work and its answer leaves it."""
    node.kill()
    with contextlib.closing(sqlite3.connect(node.data_dir / "meterd.db")) as file, file:
        changed = file.execute("UPDATE key SET status = 0, kind = '', body = x''").rowcount
    assert changed
    node.start()
    node.wait_ready()


def post(node: Node, path: str, body: object, key: str):
    """Post with a key."""
    return node.ask("POST", path, body, Idempotency_Key=key)


def test_hold_of_a_key_is_one_when_the_daemon_is_killed(node, sandbox):
    """Its caller heard no answer and asks again: one amount is set aside."""
    escrow = sandbox.lock("10.00")
    node.bind(escrow, "stream", "customer-1")
    ask = {"agreement": "customer-1", "meter": "units", "quantity": 1000, "hold": 600}
    first = post(node, "/v1/authorize", ask, "call-1")
    die(node)
    node.wait_state("customer-1", "active")
    again = post(node, "/v1/authorize", ask, "call-1")
    other = post(node, "/v1/authorize", {**ask, "quantity": 999}, "call-1")
    holds = node.get("/v1/holds")["items"]

    assert (200, 200, 422) == (first.status, again.status, other.status)
    assert first.json["hold"] == again.json["hold"]
    assert ["1.00"] == [each["amount"] for each in holds]


def test_agreement_of_a_key_is_opened_once_when_the_daemon_is_killed(node, sandbox):
    """Answered or not: the payer's money is locked once, also for its next escrow."""
    made = post(node, "/v1/agreements", {"plan": "rolling"}, "open-1")
    name = made.json["id"]
    die(node)
    replayed = post(node, "/v1/agreements", {"plan": "rolling"}, "open-1")
    begin_only(node)
    again = post(node, "/v1/agreements", {"plan": "rolling"}, "open-1")
    more = {"plan": "rolling", "id": name, "next": True}
    second = post(node, "/v1/agreements", more, "open-2")
    begin_only(node)
    post(node, "/v1/agreements", more, "open-2")

    assert (201, 201, 200, 201) == (
        made.status,
        replayed.status,
        again.status,
        second.status,
    )
    assert "true" == replayed.headers["Idempotency-Replayed"]
    assert made.raw == replayed.raw
    assert name == again.json["id"]
    assert 2 == len(escrows_of_payer(sandbox))


def test_answer_of_an_act_is_replayed_when_the_daemon_is_killed(node, sandbox):
    """The act itself is done once: its journal has one entry."""
    escrow = sandbox.lock("10.00")
    node.bind(escrow, "stream", "customer-1")
    reason = {"reason": "a test"}
    first = post(node, "/v1/agreements/customer-1/freeze", reason, "act-1")
    die(node)
    again = post(node, "/v1/agreements/customer-1/freeze", reason, "act-1")
    entries = node.get("/v1/journal?limit=1000")["items"]

    assert (200, 200, first.raw) == (first.status, again.status, again.raw)
    assert 1 == [each["action"] for each in entries].count("escrow_frozen")
