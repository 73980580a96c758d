"""The auditor on receipts: each change in a store's receipts is named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meterd.audit import audit
from meterd.core.settlement import AnswerKind
from meterd.receipts import Notary, canonical
from meterd.store.sqlite import SqliteStore
from tests.unit.test_audit import Stage


@pytest.fixture
async def state(tmp_path: Path) -> Path:
    """A store with a release from before there were receipts, and three with one each."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    for number in range(4):
        if number == 1:
            stage.books.notary = Notary(Ed25519PrivateKey.generate(), {})
        await stage.use("a", 1)
        await stage.release("a", AnswerKind.CONFIRMED)
    await stage.store.close()
    return tmp_path / "state"


@contextlib.contextmanager
def shell(state: Path):
    """A sqlite3 shell, with the rules of the table put back behind it."""
    with contextlib.closing(sqlite3.connect(state / "meterd.db", isolation_level=None)) as file:
        rules = file.execute("SELECT name, sql FROM sqlite_schema WHERE name LIKE 'receipt_%'")
        rules = [(name, sql) for name, sql in rules if sql]
        for name, _ in rules:
            file.execute(f"DROP TRIGGER {name}")
        yield file
        for _, sql in rules:
            file.execute(sql)


def rewrite(file, number: int, /, **members: object) -> None:
    """Change a statement, with a hash that fits it."""
    (text,) = file.execute("SELECT statement FROM receipt WHERE number = ?", [number]).fetchone()
    text = canonical({**json.loads(text), **members})
    values = text.decode(), hashlib.sha256(text).digest(), number
    file.execute("UPDATE receipt SET statement = ?, hash = ? WHERE number = ?", values)


CHANGES = {
    "statement": (
        lambda file: file.execute("UPDATE receipt SET statement = '{}' WHERE number = 2"),
        "receipt 2 of a",
    ),
    "number": (lambda file: rewrite(file, 2, number=7), "receipt 2 of a"),
    "chain": (lambda file: rewrite(file, 1, accrued="9.00"), "receipt 2 of a"),
    "amount": (lambda file: rewrite(file, 3, release={"amount": "5.00"}), "receipt 3 of a"),
    "no amount": (lambda file: rewrite(file, 3, release=None), "receipt 3 of a"),
    "release": (
        lambda file: file.execute("UPDATE receipt SET release = 'rel_x' WHERE number = 3"),
        "receipt 3 of a",
    ),
    "gap": (lambda file: file.execute("DELETE FROM receipt WHERE number = 2"), "receipt 3 of a"),
}


def test_receipts_that_nobody_touched_agree(state):
    """Those from before there were receipts need none."""
    found = audit(state)

    assert [] == found.findings.breaks
    assert 3 == found.findings.checked["receipts"]


@pytest.mark.parametrize("name", CHANGES)
def test_changed_receipt_is_named(state, name):
    """Whatever is changed, the first row that shows it."""
    change, row = CHANGES[name]
    with shell(state) as file:
        change(file)

    assert ("receipts", row) in [
        (each.invariant, each.row) for each in audit(state).findings.breaks
    ]


def test_paid_release_whose_receipt_is_gone_is_named(state):
    """The last of a chain leaves no gap; its release does."""
    with shell(state) as file:
        (release,) = file.execute("SELECT release FROM receipt WHERE number = 3").fetchone()
        file.execute("DELETE FROM receipt WHERE number = 3")
    found = [(each.invariant, each.row) for each in audit(state).findings.breaks]

    assert [("receipts", f"release {release}")] == found


@pytest.mark.parametrize("rule", ["receipt_stays", "receipt_kept"])
def test_rule_that_the_table_has_lost_is_named(state, rule):
    """The file itself refuses to change a receipt or to forget one."""
    with contextlib.closing(sqlite3.connect(state / "meterd.db", isolation_level=None)) as file:
        act = "UPDATE receipt SET at = 0" if rule == "receipt_stays" else "DELETE FROM receipt"
        with pytest.raises(sqlite3.IntegrityError, match="a receipt"):
            file.execute(act)
        file.execute(f"DROP TRIGGER {rule}")

    assert ("guards", rule) in [(each.invariant, each.row) for each in audit(state).findings.breaks]


async def test_store_knows_where_each_chain_ends(state):
    """So a restart goes on behind it; receipts are listed in their order."""
    store = SqliteStore.open(state, entries_max=100)
    heads = store.load().receipts
    rows = await store.receipts("a", limit=2, after=1)
    await store.close()

    assert {"a": (3, rows[-1].hash)} == heads
    assert [2, 3] == [row.number for row in rows]
