"""The auditor and the backup beside a real daemon: killed, looked at, copied, restored."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.stage import Node, configuration, paid, until
from tests.processes import Sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    with Sandbox(tmp_path / "sandbox") as sandbox:
        yield sandbox


@pytest.fixture
def node(tmp_path: Path, sandbox: Sandbox) -> Iterator[Node]:
    with Node(tmp_path, configuration(sandbox)) as node:
        node.wait_ready()
        yield node


def use_and_pay(node: Node, sandbox: Sandbox, escrow: str, first: int, last: int) -> None:
    """Post events of ten units each, and wait until each was paid: one release for one event."""
    for number in range(first, last + 1):
        before = paid(sandbox, escrow)
        node.use(escrow, 10, f"e{number}")
        until(lambda before=before: paid(sandbox, escrow) > before, f"event {number} to be paid")
    released = {"released": f"{paid(sandbox, escrow).normalize():f}"}
    node.wait_agreement(escrow, **released, in_doubt="0.00")


def verified(node: Node, *words: str) -> tuple[int, Any]:
    """Type `meterd verify`; its exit code and its document."""
    done = node.type("verify", "--json", *words)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def breaks(document: Any) -> list[tuple[str, str]]:
    return [(each["invariant"], each["row"]) for each in document["breaks"]]


def restore(node: Node, backup: Path) -> None:
    """Restore as `meterd backup` says to."""
    done = node.type("restore", str(backup))

    assert (done.returncode, done.stderr) == (0, "")
    assert "meterd verify --live" in done.stdout


def test_auditor_agrees_with_a_killed_daemon_and_with_the_service(
    node: Node, sandbox: Sandbox
) -> None:
    """After each of several kills, amid usage and releases, every sum agrees, both ways."""
    escrow = node.bind(sandbox.lock("10.00"), "stream")
    lazy = node.bind(sandbox.lock("1.00"), "lazy")
    for round_ in range(4):
        for number in range(8):
            node.use(escrow, 10, f"{round_}-{number}")
            node.use(lazy, "0.25", f"{round_}-lazy-{number}")
        node.kill()
        code, offline = verified(node)
        live_code, live = verified(node, "--live")

        assert (code, offline["breaks"]) == (0, [])
        assert (live_code, live["breaks"]) == (0, [])
        assert offline["events"] == 16 * (round_ + 1)
        assert live["checked"]["escrows asked"] == 2
        node.start()
        node.wait_ready()
    node.wait_agreement(escrow, released="0.32", in_doubt="0.00")
    node.stop()
    code, document = verified(node, "--live")

    assert (code, document["breaks"]) == (0, [])
    assert (document["accrued"], document["released"]) == ("0.328", "0.32")
    checked = document["checked"]
    found = checked["releases found in the service's history"]
    older = checked["releases older than the history shown"]  # The service shows the newest alone.
    assert found > 0
    assert document["releases"]["confirmed"] == found + older


def test_auditor_refuses_a_running_daemons_directory(node: Node) -> None:
    """Exit 2, with the way to look all the same."""
    done = node.type("verify")

    assert done.returncode == 2
    assert f"process {node.pid}" in done.stderr
    assert "meterd backup" in done.stderr


def test_auditor_shows_what_somebody_else_released(node: Node, sandbox: Sandbox) -> None:
    """The store alone agrees; held against the service, the difference is told to the quantum."""
    escrow = node.bind(sandbox.lock("10.00"), "stream")
    use_and_pay(node, sandbox, escrow, 1, 2)
    node.kill()
    sandbox.fault(kind="foreign_release", escrow_id=escrow, amount="0.004")
    code, offline = verified(node)
    live_code, live = verified(node, "--live")

    assert (code, offline["breaks"]) == (0, [])
    assert live_code == 3
    assert breaks(live) == [("service", f"escrow {escrow}")]
    assert "0.004 more than the 0.02 that the store knows of" in live["breaks"][0]["detail"]
    assert "0.004 of it beyond all usage" in live["breaks"][0]["detail"]


def test_auditor_shows_a_call_that_was_carried_out_twice(node: Node, sandbox: Sandbox) -> None:
    """One row, sent once, paid twice by what lies in between: seen by the service's own figure."""
    escrow = node.bind(sandbox.lock("10.00"), "stream")
    sandbox.fault(kind="duplicate_delivery", call="release_partial", escrow_id=escrow)
    node.use(escrow, 20, "e1")
    until(lambda: len(sandbox.operations(escrow)) == 2, "both deliveries")
    node.kill()
    code, document = verified(node, "--live")

    assert code == 3
    assert ("service", f"escrow {escrow}") in breaks(document)
    assert "0.02 of it beyond all usage" in " ".join(each["detail"] for each in document["breaks"])


# One number more or less in one row, in each table that money rests on.
TAMPERED = {
    "UPDATE counter SET quantity = quantity + 1": ("accrued", "agreement @escrow@"),
    "UPDATE agreement SET accrued = '1/1000'": ("accrued", "agreement @escrow@"),
    "UPDATE escrow SET settled = settled - 1": ("settled", "escrow @escrow@"),
    "UPDATE escrow SET observed = observed + 1": ("level", "escrow @escrow@"),
    "UPDATE release SET before = before + 1": ("level", "release @release@"),
    "UPDATE release SET history = replace(history, 'sent', 'void')": (
        "release history",
        "release @release@",
    ),
    "UPDATE journal SET detail = 'nothing' WHERE number = 1": ("journal", "journal 1"),
    "DELETE FROM mark_block": ("marks", "mark_block"),
    "UPDATE dead_letter SET number = 9": ("dead letters", "dead_letter 9"),
}


def test_auditor_names_the_row_that_was_changed_in_a_daemons_own_store(
    node: Node, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Exit 3, with the invariant and the row, whichever table it stands in."""
    escrow = node.bind(sandbox.lock("10.00"), "stream")
    use_and_pay(node, sandbox, escrow, 1, 1)
    node.send({"id": "x", "agreement": "nobody", "meter": "units", "quantity": 1})
    (release,) = (each["id"] for each in node.releases(escrow))
    node.stop()
    untouched = verified(node)[0]
    found = {}
    for number, statement in enumerate(TAMPERED):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(node.data_dir, copy)
        with contextlib.closing(sqlite3.connect(copy / "meterd.db", isolation_level=None)) as other:
            for rule in ("release_stays", "journal_stays"):
                other.execute(f"DROP TRIGGER {rule}")
            assert other.execute(statement).rowcount == 1
        code, document = verified(node, "--data-dir", str(copy))
        found[statement] = (code, breaks(document))

    assert untouched == 0
    for statement, (invariant, row) in TAMPERED.items():
        code, named = found[statement]
        placed = row.replace("@escrow@", escrow).replace("@release@", release)
        assert code == 3, statement
        assert (invariant, placed) in named, statement


def test_auditor_that_reaches_no_service_does_not_say_that_it_agrees(
    node: Node, sandbox: Sandbox
) -> None:
    """Exit 1: nothing is broken, and not everything was compared."""
    node.bind(sandbox.lock("10.00"), "stream")
    node.stop()
    sandbox.stop()
    code, document = verified(node, "--live")

    assert (code, document["broken"], document["not_asked"]) == (1, 0, 1)


def test_backup_of_a_running_daemon_is_whole_and_journalled(
    node: Node, sandbox: Sandbox, tmp_path: Path
) -> None:
    """It agrees by itself; against the service, what came later is a note."""
    escrow = node.bind(sandbox.lock("10.00"), "stream")
    use_and_pay(node, sandbox, escrow, 1, 2)
    copy = tmp_path / "copy.db"
    done = node.type("backup", str(copy))
    use_and_pay(node, sandbox, escrow, 3, 3)
    code, document = verified(node, "--backup", str(copy))
    live_code, live = verified(node, "--backup", str(copy), "--live")

    assert (done.returncode, done.stderr) == (0, "")
    assert f"meterd restore {copy}" in done.stdout
    assert (code, document["released"], document["backup"]) == (0, "0.02", True)
    assert document["checked"]["journal entries"] == 2  # It was bound, and a backup was asked for.
    assert (live_code, live["breaks"]) == (0, [])
    assert "0.01 more" in " ".join(live["notes"])
    assert copy.stat().st_mode & 0o777 == 0o600


def test_backup_refuses_what_is_no_new_file(node: Node, tmp_path: Path) -> None:
    """Nothing is written over, and a refused copy leaves nothing behind."""
    taken = tmp_path / "taken.db"
    taken.write_text("mine")
    refusals = {
        "copy.db": 2,
        str(taken): 1,
        str(tmp_path / "none" / "copy.db"): 1,
        str(tmp_path / "up" / ".." / "copy.db"): 1,
        str(node.data_dir / "meterd.db-wal"): 1,
        str(node.data_dir / "meterd.db-journal"): 1,
    }
    codes = {path: node.type("backup", path).returncode for path in refusals}

    assert codes == refusals
    assert taken.read_text() == "mine"
    assert not (tmp_path / "copy.db").exists()


def test_backup_wants_the_scope_admin(sandbox: Sandbox, tmp_path: Path) -> None:
    """Whoever may only look cannot have files written."""
    reader, admin = "r" * 32, "a" * 32
    tokens = f"""
[[http.tokens]]
name = "reader"
token = "{reader}"
scopes = ["read", "ingest", "gate"]
[[http.tokens]]
name = "admin"
token = "{admin}"
scopes = ["admin"]
"""
    copy = tmp_path / "copy.db"
    with Node(tmp_path, configuration(sandbox, rest=tokens)) as node:
        node.wait_ready()
        refused = node.type("backup", str(copy), env={"METERD_TOKEN": reader})
        written_by_reader = copy.exists()
        done = node.type("backup", str(copy), env={"METERD_TOKEN": admin})

    assert (refused.returncode, written_by_reader) == (1, False)
    assert (done.returncode, copy.exists()) == (0, True)


def test_older_backup_that_is_restored_pays_nothing_twice(
    node: Node, sandbox: Sandbox, tmp_path: Path
) -> None:
    """The escrow freezes; resumed, and all usage sent again, exactly the usage is paid."""
    escrow = node.bind(sandbox.lock("10.00"), "stream")
    use_and_pay(node, sandbox, escrow, 1, 2)
    copy = tmp_path / "copy.db"
    assert node.type("backup", str(copy)).returncode == 0
    use_and_pay(node, sandbox, escrow, 3, 5)
    refused = node.type("restore", str(copy))
    node.kill()  # What it leaves beside its database must not undo the restore.
    restore(node, copy)
    code, document = verified(node, "--live")

    assert refused.returncode == 2
    assert f"process {node.pid}" in refused.stderr
    assert code == 3  # Three releases that this store does not know.
    assert len(breaks(document)) == 4
    node.start()
    node.wait_ready()
    node.wait_state(escrow, "frozen")
    for number in range(1, 7):  # Those in the backup are duplicates; the last one is new.
        event = {"id": f"e{number}", "escrow_id": escrow, "meter": "units", "quantity": 10}
        node.send(event)

    assert paid(sandbox, escrow) == Decimal("0.05")
    resumed = node.type("resume", escrow, "--reason", "a backup was restored")
    assert resumed.returncode == 0, resumed.stderr
    until(lambda: paid(sandbox, escrow) >= Decimal("0.06"), "the last event to be paid")
    node.wait_agreement(escrow, released="0.06", in_doubt="0.00")
    node.stop()
    code, document = verified(node, "--live")

    assert paid(sandbox, escrow) == Decimal("0.06")
    assert (code, document["breaks"]) == (0, [])
    assert (document["accrued"], document["credited"]) == ("0.06", "0.03")
