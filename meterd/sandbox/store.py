"""What the escrow service knows, on the disk: one file that holds everything that was answered.

The rule kept here: a `Saved` future is resolved after the commit that holds its change, never
before. Changes that arrive while a commit is under way wait together and go into the next one
(group commit), so that the price of `synchronous=FULL` is shared. One thread owns the one
connection; reads wait in the same line and see all before them. A failed commit is final: memory is
ahead of the disk then, and the process must end.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from meterd.errors import StoreCorrupt, StoreFailed, StoreLocked
from meterd.sandbox.ledger import (
    GRANTS,
    RELEASES,
    Books,
    Change,
    Deadline,
    Escrow,
    Kind,
    Operation,
    Status,
)

Saved = asyncio.Future[None]
T = TypeVar("T")
Histories = dict[str | tuple[str, str], list[Operation]]
"""By escrow id, and by (payer, payee)."""

VERSION = 2
HISTORY_MAX = 20  # Releases of an escrow, debits of a wallet: clients read no more than 64 KiB.

_DEBITS = "CREATE INDEX debits ON operations (agent_id, payee, seq) WHERE payee IS NOT NULL;"
_SCHEMA = f"""
CREATE TABLE settings (
    name TEXT PRIMARY KEY, value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE wallets (
    agent_id TEXT PRIMARY KEY, balance INTEGER NOT NULL CHECK (balance >= 0)
) STRICT, WITHOUT ROWID;
CREATE TABLE escrows (
    number INTEGER PRIMARY KEY,
    escrow_id TEXT NOT NULL UNIQUE,
    creator TEXT NOT NULL,
    provider TEXT NOT NULL CHECK (provider <> creator),
    amount INTEGER NOT NULL CHECK (amount > 0),
    status TEXT NOT NULL,
    memo TEXT,
    created_ms INTEGER NOT NULL,
    deadline_ms INTEGER,
    on_deadline TEXT NOT NULL,
    released INTEGER NOT NULL CHECK (released >= 0),
    refunded INTEGER NOT NULL CHECK (refunded >= 0),
    fee INTEGER NOT NULL CHECK (fee BETWEEN 0 AND released),
    releases INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    CHECK (released + refunded <= amount)
) STRICT;
CREATE TABLE operations (
    seq INTEGER PRIMARY KEY,
    time_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    escrow_id TEXT,
    agent_id TEXT NOT NULL,
    gross INTEGER NOT NULL CHECK (gross > 0),
    fee INTEGER NOT NULL CHECK (fee >= 0),
    memo TEXT,
    idempotency_key TEXT,
    outcome TEXT NOT NULL,
    payee TEXT
) STRICT;
CREATE INDEX operations_of_escrow ON operations (escrow_id, seq);
CREATE INDEX operations_by_key ON operations (idempotency_key) WHERE idempotency_key IS NOT NULL;
{_DEBITS}
PRAGMA user_version = {VERSION};
"""
# Of debits made before, nobody knows the payee any more: they count for none.
_FROM_1 = f"""
ALTER TABLE operations ADD COLUMN payee TEXT;
{_DEBITS}
PRAGMA user_version = 2;
"""

_PRAGMAS: Sequence[tuple[str, object]] = (
    # EXCLUSIVE stands before WAL: no second service, and no shared memory file beside it.
    ("locking_mode = EXCLUSIVE", "exclusive"),
    ("journal_mode = WAL", "wal"),
    ("synchronous = FULL", None),
)

_PUT_ESCROW = """
INSERT INTO escrows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (number) DO UPDATE SET status = excluded.status, released = excluded.released,
    refunded = excluded.refunded, fee = excluded.fee, releases = excluded.releases,
    seq = excluded.seq
"""
_PUT_OPERATION = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_WALLET = "INSERT OR REPLACE INTO wallets (agent_id, balance) VALUES (?, ?)"


class Store:
    """The file of one escrow service.

    Opened with `open`; everything else is called on the event loop.
    """

    def __init__(self, connection: sqlite3.Connection, failed: asyncio.Event) -> None:
        self._connection = connection
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-store")
        self._waiting: list[Change] = []
        self._next: Saved | None = None  # The commit that `_waiting` will be in.
        self._under_way: Saved | None = None
        self._committer: asyncio.Task[None] | None = None
        self._unsaved: dict[
            str, Saved
        ] = {}  # By escrow id: the commit that its newest state is in.
        self._failed = failed

    @classmethod
    def open(cls, data_file: Path, failed: asyncio.Event) -> Store:
        """Open or create the file.

        `failed` is set when a commit fails. Raises `StoreLocked`, `StoreCorrupt` or `StoreFailed`.
        """
        try:
            return cls(_connect(data_file), failed)
        except sqlite3.Error as error:
            raise _explained(error, data_file) from error
        except OSError as error:
            raise StoreFailed(f"cannot open {data_file}: {error.strerror}") from error

    def load(self, fee_bps: int) -> tuple[Books, Histories]:
        """Read everything.

        The books, and of each escrow its newest releases and of each payer and payee the newest
        debits, oldest first. Blocks; for the start.
        """
        try:
            return _books(self._connection, fee_bps), _histories(self._connection)
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise StoreCorrupt(f"the sandbox's file cannot be read: {error}") from error

    def save(self, change: Change) -> Saved:
        """Put a change in line; the future is resolved once it is durable.

        Others wait for the same future: await it shielded.
        It gets `StoreFailed` when the commit failed; nothing may be answered or saved after that.
        """
        if self._failed.is_set():
            raise StoreFailed("the sandbox's file could not be written; restart it")
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        self._waiting.append(change)
        if change.escrow is not None:
            self._unsaved[change.escrow.escrow_id] = self._next
        if self._committer is None:
            self._committer = asyncio.create_task(self._commit_all(), name="sandbox-commit")
        return self._next

    async def saved(self, escrow_id: str) -> None:
        """Wait until what memory says of this escrow is on the disk too."""
        commit = self._unsaved.get(escrow_id)
        if commit is not None:
            await asyncio.shield(commit)

    async def all_saved(self) -> None:
        """Wait until everything that was put in line so far is on the disk."""
        for commit in (self._under_way, self._next):
            if commit is not None:
                await asyncio.shield(commit)

    async def put_clock(self, offset_ms: int) -> None:
        """Keep how far the clock was moved."""
        await self._ask(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO settings (name, value) VALUES ('clock_offset_ms', ?)",
                (offset_ms,),
            )
        )

    def clock(self) -> int:
        """How far the clock was moved, in milliseconds. Blocks; for the start."""
        row = self._connection.execute(
            "SELECT value FROM settings WHERE name = 'clock_offset_ms'"
        ).fetchone()
        return int(row[0]) if row else 0

    async def operations(
        self,
        *,
        after: int,
        limit: int,
        escrow_id: str | None = None,
        kind: str | None = None,
        agent_id: str | None = None,
    ) -> list[Operation]:
        """At most `limit` durable operations with a seq above `after`, oldest first."""
        wanted = {"escrow_id": escrow_id, "kind": kind, "agent_id": agent_id}
        named = {name: value for name, value in wanted.items() if value is not None}
        where = "".join(f" AND {name} = :{name}" for name in named)
        sql = (
            f"SELECT * FROM operations"  # noqa: S608 - Names of our own.
            f" WHERE seq > :after{where}"
            " ORDER BY seq LIMIT :limit"
        )
        values = {**named, "after": after, "limit": limit}
        rows = await self._ask(lambda connection: connection.execute(sql, values).fetchall())
        return [_operation(row) for row in rows]

    async def operation_by_key(
        self, key: str, agent: str, escrow_id: str | None, payee: str | None = None
    ) -> Operation | None:
        """The first durable operation under this idempotency key that this agent asked for.

        For a debit: that took from this agent's wallet for `payee`. None: there is none.
        """
        sql = (
            "SELECT * FROM operations"
            " WHERE idempotency_key = ? AND agent_id = ? AND (?3 IS NULL OR escrow_id = ?3)"
            " AND payee IS ?4"
            " ORDER BY seq LIMIT 1"
        )
        row = await self._ask(
            lambda connection: connection.execute(sql, (key, agent, escrow_id, payee)).fetchone()
        )
        return None if row is None else _operation(row)

    async def totals(self, escrow_id: str | None) -> dict[str, dict[str, tuple[int, ...]]]:
        """Sums over the whole file, or one escrow, read at one instant; in micros.

        `operations`: by kind, (count, gross, fee). `escrows` and `wallets`: one row named `sum`:
        (count, amount, released, refunded, fee) and (count, balance).
        """
        return await self._ask(lambda connection: _totals(connection, escrow_id))

    async def close(self) -> None:
        """Commit what waits and close the file."""
        if self._committer is not None:
            await asyncio.wait([self._committer])
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
        self._thread.shutdown()

    async def _ask(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Run something on the connection behind all that is in line already."""
        await self.all_saved()
        loop = asyncio.get_running_loop()
        return await asyncio.shield(
            loop.run_in_executor(self._thread, lambda: read(self._connection))
        )

    async def _commit_all(self) -> None:
        """Commit until nobody waits.

        One such task runs at a time, so that commits keep the order of changes.
        """
        loop = asyncio.get_running_loop()
        while self._next is not None:
            changes, commit = self._waiting, self._next
            self._waiting, self._next, self._under_way = [], None, commit
            try:
                await loop.run_in_executor(self._thread, _commit, self._connection, changes)
            except sqlite3.Error as error:
                self._fail(commit, error)
                return
            self._forget(changes, commit)
            commit.set_result(None)
        self._under_way = None
        self._committer = None

    def _forget(self, changes: Iterable[Change], commit: Saved) -> None:
        for change in changes:
            escrow = change.escrow
            if escrow is not None and self._unsaved.get(escrow.escrow_id) is commit:
                del self._unsaved[escrow.escrow_id]

    def _fail(self, commit: Saved, error: sqlite3.Error) -> None:
        self._failed.set()
        for waiting in (commit, self._next):
            if waiting is not None:
                waiting.set_exception(StoreFailed(f"the sandbox's commit failed: {error}"))
                waiting.exception()  # It counts as seen, even if nobody waits.


def _connect(data_file: Path) -> sqlite3.Connection:
    created = not data_file.exists()
    connection = sqlite3.connect(
        data_file, timeout=0, isolation_level=None, check_same_thread=False
    )
    try:
        for pragma, expected in _PRAGMAS:
            _set_pragma(connection, pragma, expected)
        connection.execute("BEGIN IMMEDIATE")  # Takes the lock now, and keeps it.
        connection.execute("COMMIT")
        _create_tables(connection, data_file)
    except BaseException:
        connection.close()
        raise
    if created:
        _sync_directory(data_file.parent)
    return connection


def _set_pragma(connection: sqlite3.Connection, pragma: str, expected: object) -> None:
    row = connection.execute(f"PRAGMA {pragma}").fetchone()
    answer = row[0] if row else None
    if answer != expected:
        raise StoreFailed(f"SQLite answered {answer!r} to PRAGMA {pragma}")


def _create_tables(connection: sqlite3.Connection, data_file: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return
    if version == 1:
        connection.executescript(f"BEGIN IMMEDIATE;\n{_FROM_1}\nCOMMIT;")
        return
    if version != 0:
        raise StoreCorrupt(f"{data_file} was written by another version of the sandbox")
    connection.executescript(f"BEGIN IMMEDIATE;\n{_SCHEMA}\nCOMMIT;")


def _sync_directory(directory: Path) -> None:
    """A new file is not durable before the directory that names it is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: sqlite3.Error, data_file: Path) -> Exception:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreLocked(f"another sandbox uses {data_file}; stop it or name another file")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return StoreCorrupt(f"{data_file} is no file of the sandbox; name another file")
    return StoreFailed(f"cannot open {data_file}: {error}")


def _commit(connection: sqlite3.Connection, changes: Sequence[Change]) -> None:
    """One commit for all of them; of an escrow or a wallet only its newest state is written."""
    escrows = {c.escrow.escrow_id: c.escrow for c in changes if c.escrow is not None}
    wallets = {agent: balance for c in changes for agent, balance in c.wallets.items()}
    operations = [c.operation for c in changes if c.operation is not None]
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(_PUT_ESCROW, [_escrow_row(escrow) for escrow in escrows.values()])
    connection.executemany(_PUT_WALLET, wallets.items())
    connection.executemany(_PUT_OPERATION, [_operation_row(o) for o in operations])
    connection.execute("COMMIT")


def _escrow_row(e: Escrow) -> tuple[Any, ...]:
    return (
        *(e.number, e.escrow_id, e.creator, e.provider, e.amount, e.status, e.memo, e.created_ms),
        *(e.deadline_ms, e.on_deadline, e.released, e.refunded, e.fee, e.releases, e.seq),
    )


def _operation_row(o: Operation) -> tuple[Any, ...]:
    return (
        *(o.seq, o.time_ms, o.kind, o.escrow_id, o.agent, o.gross, o.fee, o.memo, o.key),
        *(o.outcome, o.payee),
    )


def _escrow(row: tuple[Any, ...]) -> Escrow:
    number, escrow_id, creator, provider, amount, status, memo, created, deadline, on, *rest = row
    return Escrow(
        *(number, escrow_id, creator, provider, amount, Status(status), memo, created, deadline),
        Deadline(on),
        *rest,
    )


def _operation(row: tuple[Any, ...]) -> Operation:
    seq, time_ms, kind, *rest = row
    return Operation(seq, time_ms, Kind(kind), *rest)


def _books(connection: sqlite3.Connection, fee_bps: int) -> Books:
    books = Books(fee_bps)
    for row in connection.execute("SELECT * FROM escrows ORDER BY number"):
        escrow = _escrow(row)
        books.escrows[escrow.escrow_id] = escrow
        for agent in (escrow.creator, escrow.provider):
            books.by_agent.setdefault(agent, []).append(escrow.escrow_id)
    books.wallets.update(connection.execute("SELECT agent_id, balance FROM wallets"))
    sums = connection.execute("SELECT kind, max(seq), sum(gross) FROM operations GROUP BY kind")
    for kind, seq, gross in sums.fetchall():
        books.seq = max(books.seq, seq)
        books.supply += gross if Kind(kind) in GRANTS else 0
    taken = connection.execute("SELECT agent_id FROM operations WHERE kind = ?", (Kind.FAUCET,))
    books.faucet_taken.update(agent for (agent,) in taken)
    for payer, payee, gross in connection.execute(_DEBITED):
        books.debited[payer] = {**books.debited.get(payer, {}), payee: gross}
    return books


_DEBITED = (
    "SELECT agent_id, payee, sum(gross) FROM operations WHERE payee IS NOT NULL GROUP BY 1, 2"
)


def _histories(connection: sqlite3.Connection) -> Histories:
    kinds = ", ".join(f"'{kind}'" for kind in sorted(RELEASES))
    histories: Histories = {}
    newest = (
        f"SELECT * FROM operations"  # noqa: S608 - Names of our own.
        f" WHERE escrow_id = ? AND kind IN ({kinds}) ORDER BY seq DESC LIMIT ?"
    )
    for (escrow_id,) in connection.execute("SELECT escrow_id FROM escrows WHERE releases > 0"):
        rows = connection.execute(newest, (escrow_id, HISTORY_MAX)).fetchall()
        histories[escrow_id] = [_operation(row) for row in reversed(rows)]
    newest = "SELECT * FROM operations WHERE agent_id = ? AND payee = ? ORDER BY seq DESC LIMIT ?"
    for payer, payee, _ in connection.execute(_DEBITED).fetchall():
        rows = connection.execute(newest, (payer, payee, HISTORY_MAX)).fetchall()
        histories[payer, payee] = [_operation(row) for row in reversed(rows)]
    return histories


def _totals(
    connection: sqlite3.Connection, escrow_id: str | None
) -> dict[str, dict[str, tuple[int, ...]]]:
    one = (escrow_id,)
    operations = connection.execute(
        "SELECT kind, count(*), sum(gross), sum(fee) FROM operations"
        " WHERE ?1 IS NULL OR escrow_id = ?1 GROUP BY kind",
        one,
    ).fetchall()
    escrows = connection.execute(
        "SELECT count(*), coalesce(sum(amount), 0), coalesce(sum(released), 0),"
        " coalesce(sum(refunded), 0), coalesce(sum(fee), 0)"
        " FROM escrows WHERE ?1 IS NULL OR escrow_id = ?1",
        one,
    ).fetchone()
    wallets = connection.execute(
        "SELECT count(*), coalesce(sum(balance), 0) FROM wallets"
    ).fetchone()
    return {
        "operations": {kind: tuple(sums) for kind, *sums in operations},
        "escrows": {"sum": tuple(escrows)},
        "wallets": {"sum": tuple(wallets)},
    }
