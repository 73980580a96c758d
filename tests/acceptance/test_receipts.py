"""Receipts of a real daemon: as many as paid releases, also when it is killed, checked offline."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from tests.acceptance.stage import Node, configuration, meterd
from tests.processes import Sandbox

ROUNDS = 6


@pytest.fixture
def sandbox(tmp_path: Path):
    with Sandbox(tmp_path / "sandbox") as server:
        yield server


def pages(node: Node, name: str) -> list[dict]:
    """All receipts of an agreement, page by page."""
    found, cursor = [], ""
    while cursor is not None:
        page = node.get(f"/v1/agreements/{name}/receipts?limit=3&cursor={cursor}")
        found += page["items"]
        cursor = page["next"]
    return found


def verify(file: Path, *words: str):
    """Type `meterd verify FILE`; its exit code and its document."""
    done = meterd("verify", str(file), "--json", *words)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def test_every_paid_release_has_one_receipt_when_the_daemon_is_killed(sandbox, tmp_path):
    """Killed after each usage, at moments nobody chose: one chain, no gap, no fork."""
    escrow = sandbox.lock("10.00")
    with Node(tmp_path, configuration(sandbox)) as node:
        node.wait_ready()
        node.bind(escrow, "stream", "customer-1")
        for number in range(ROUNDS):
            node.use(escrow, 20, f"e-{number}")
            node.kill()
            node.start()
            node.wait_ready()
        node.wait_agreement("customer-1", released=f"0.{2 * ROUNDS:02}")
        key = node.get("/v1/receipts/key")["key"]
        receipts = pages(node, "customer-1")
        releases = node.releases("customer-1")
        kept = tmp_path / "receipts.json"
        kept.write_text(json.dumps(receipts))
        mode = (node.data_dir / "receipts.key").stat().st_mode
    code, found = verify(kept, "--key", key)
    audited = meterd("verify", "--data-dir", str(node.data_dir), "--json")

    paid = [each["id"] for each in reversed(releases) if each["status"] == "confirmed"]
    assert paid == [each["statement"]["release"]["id"] for each in receipts]
    assert (0, True) == (code, found["agrees"])
    assert f"0.{2 * ROUNDS:02}" == found["chains"][0]["released"]
    assert 0o600 == stat.S_IMODE(mode)
    assert 0 == audited.returncode, audited.stdout
    assert len(receipts) == json.loads(audited.stdout)["checked"]["receipts"]


def test_payer_finds_a_changed_receipt_a_gap_and_another_key(sandbox, tmp_path):
    """Offline, with exit 3 and the first that breaks; the last receipt of all closes."""
    escrow = sandbox.lock("10.00")
    with Node(tmp_path, configuration(sandbox)) as node:
        node.wait_ready()
        node.bind(escrow, "stream", "customer-1")
        for number in range(1, 4):
            node.use(escrow, 20, f"e-{number}")
            node.wait_agreement("customer-1", released=f"0.0{2 * number}")
        node.ask("POST", "/v1/agreements/customer-1/close", {"reason": "the end"})
        node.wait_state("customer-1", "closed")
        receipts = pages(node, "customer-1")
    file = tmp_path / "receipts.json"
    file.write_text(json.dumps(receipts))
    shown = meterd("verify", str(file))
    file.write_text(json.dumps([*receipts[:1], *receipts[2:]]))
    gap = meterd("verify", str(file))
    receipts[1]["statement"]["accrued"] = "0.01"
    file.write_text(json.dumps(receipts))
    changed = meterd("verify", str(file))
    file.write_text("{}")
    none = meterd("verify", str(file))

    assert ["release"] * 3 + ["close"] == [each["statement"]["kind"] for each in receipts]
    assert 0 == shown.returncode, shown.stdout
    assert "receipts 1 to 4, accrued 0.06, released 0.06 USDC" in shown.stdout
    assert 3 == gap.returncode == changed.returncode
    assert "receipt 3 of customer-1: receipt 2 is missing" in gap.stdout
    assert "BROKEN     receipt 2 of customer-1: its hash should be" in changed.stdout
    assert 2 == none.returncode
    assert 2 == meterd("verify", str(file), "--key", "7").returncode
    assert 2 == meterd("verify", "--key", "0" * 64).returncode


def test_store_that_is_put_back_and_lives_on_shows_as_a_fork(sandbox, tmp_path):
    """The payer has both receipts of one number; the key outlives the restore."""
    escrow, other = sandbox.lock("10.00"), tmp_path / "copy.db"
    with Node(tmp_path, configuration(sandbox, escrow='on_foreign_release = "credit"')) as node:
        node.wait_ready()
        node.bind(escrow, "stream", "customer-1")
        node.use(escrow, 20, "e-1")
        node.wait_agreement("customer-1", released="0.02")
        assert 0 == node.type("backup", str(other)).returncode
        node.use(escrow, 30, "e-2")
        node.wait_agreement("customer-1", released="0.05")
        before = pages(node, "customer-1")
        node.stop()
        restored = node.type("restore", str(other), "--yes")
        assert 0 == restored.returncode, restored.stderr
        node.start()
        node.wait_ready()
        node.use(escrow, 70, "e-3")
        node.wait_agreement("customer-1", released="0.09")
        after = pages(node, "customer-1")
    file = tmp_path / "receipts.json"
    file.write_text(json.dumps([*before, *after]))
    code, found = verify(file)

    assert before[0] == after[0]
    assert before[1]["statement"]["key"] == after[1]["statement"]["key"]
    assert 3 == code
    assert "a fork" in found["chains"][0]["broken"]
