"""The service's file: what was saved is read back, one owner, and a failed commit is final."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from meterd.core.money import MICROS
from meterd.errors import StoreCorrupt, StoreFailed, StoreLocked
from meterd.sandbox import ledger
from meterd.sandbox.ledger import Ask, Books, Change, Deadline, Kind, Terms
from meterd.sandbox.store import HISTORY_MAX, Store


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return tmp_path / "sandbox.db"


def opened(data_file: Path) -> Store:
    return Store.open(data_file, asyncio.Event())


def booked(books: Books, decision: Change | ledger.Refusal) -> Change:
    assert isinstance(decision, Change)
    ledger.apply(books, decision)
    return decision


def some_life(books: Books, releases: int) -> list[Change]:
    changes = [
        booked(books, ledger.grant(books, 50 * MICROS, Kind.OPENING, Ask("payer"), 1)),
        booked(books, ledger.grant(books, MICROS, Kind.FAUCET, Ask("provider"), 1)),
        booked(
            books,
            ledger.create(
                books,
                Terms("e1", "provider", 20 * MICROS, 99, Deadline.REFUND),
                Ask("payer", "a memo", "key-0"),
                2,
            ),
        ),
    ]
    for number in range(releases):
        ask = Ask("provider", None, f"key-{number + 1}")
        changes.append(booked(books, ledger.release_part(books, "e1", 7, ask, 3 + number)))
    for number in range(2):
        ask = Ask("payer", None, f"debit-{number}")
        changes.append(booked(books, ledger.debit(books, "provider", 5, ask, 99)))
    return changes


async def test_everything_that_was_saved_is_read_back(data_file):
    """Books and newest releases are the same after a reopening."""
    store, books = opened(data_file), Books(100)
    commits = [store.save(change) for change in some_life(books, HISTORY_MAX + 5)]
    await asyncio.gather(*set(commits))
    await store.put_clock(-77)
    await store.close()

    again = opened(data_file)
    read, histories = again.load(100)
    clock = again.clock()
    await again.close()

    assert books == read
    assert [op.key for op in histories["e1"]] == [f"key-{n}" for n in range(6, HISTORY_MAX + 6)]
    assert [op.key for op in histories["payer", "provider"]] == ["debit-0", "debit-1"]
    assert read.debited == {"payer": {"provider": 10}}
    assert clock == -77


async def test_changes_that_come_together_share_a_commit(data_file):
    """Group commit: those who arrive while a commit is under way all wait for the next one."""
    store, books = opened(data_file), Books(100)
    commits = [store.save(change) for change in some_life(books, 50)]

    assert len(set(commits)) == 1
    await store.close()


async def test_the_log_can_be_narrowed_and_paged(data_file):
    """By escrow, by kind, behind a seq, and by an idempotency key."""
    store, books = opened(data_file), Books(100)
    for change in some_life(books, 5):
        store.save(change)

    page = await store.operations(after=4, limit=2, escrow_id="e1", kind="release_partial")
    by_key = await store.operation_by_key("key-2", "provider", "e1")
    by_other = await store.operation_by_key("key-2", "payer", "e1")
    await store.close()

    assert [operation.seq for operation in page] == [5, 6]
    assert by_key == page[0]
    assert by_other is None


async def test_a_second_owner_is_refused(data_file):
    """One file, one service; the message names the file."""
    store = opened(data_file)

    with pytest.raises(StoreLocked, match=r"sandbox\.db"):
        opened(data_file)
    await store.close()


def test_a_file_of_something_else_is_refused(data_file):
    """It is not overwritten."""
    data_file.write_bytes(b"these are my notes, not a database" * 100)

    with pytest.raises(StoreCorrupt):
        opened(data_file)
    assert data_file.read_bytes().startswith(b"these are my notes")


async def test_a_file_of_the_version_before_is_carried_over(data_file):
    """Its debits name no payee and count for none; new ones are counted."""
    store, books = opened(data_file), Books(100)
    for change in some_life(books, 1):
        store.save(change)
    await store.close()
    connection = sqlite3.connect(data_file)
    connection.executescript(
        "DROP INDEX debits; ALTER TABLE operations DROP COLUMN payee; PRAGMA user_version = 1;"
    )
    connection.close()

    again = opened(data_file)
    read, _ = again.load(100)
    before = dict(read.debited)
    again.save(booked(read, ledger.debit(read, "provider", 5, Ask("payer"), 100)))
    await again.close()
    last = opened(data_file)
    after, _ = last.load(100)
    await last.close()

    assert (before, after.debited) == ({}, {"payer": {"provider": 5}})
    assert after == read


def test_a_file_of_another_version_is_refused(data_file):
    """Its tables may mean something else."""
    connection = sqlite3.connect(data_file)
    connection.execute("PRAGMA user_version = 99")
    connection.close()

    with pytest.raises(StoreCorrupt):
        opened(data_file)


def test_a_directory_that_is_not_there_is_explained(tmp_path):
    """SQLite says which file; no traceback of its own."""
    with pytest.raises(StoreFailed):
        opened(tmp_path / "nowhere" / "sandbox.db")


async def test_a_failed_commit_is_final(data_file):
    """Those who wait get the failure, the owner is told, and nothing is saved any more."""
    failed = asyncio.Event()
    store, books = Store.open(data_file, failed), Books(100)
    await asyncio.get_running_loop().run_in_executor(
        store._thread, store._connection.execute, "PRAGMA query_only = ON"
    )
    change = some_life(books, 0)[0]

    with pytest.raises(StoreFailed):
        await store.save(change)
    with pytest.raises(StoreFailed):
        store.save(change)
    assert failed.is_set()
    await store.close()
