"""The embedded store: one SQLite file that holds, after a kill -9, everything called durable.

The rule kept here: a future given out by `commit` is done after the fsync that holds its change,
never before, and in the order in which the changes came. When the disk's word can no longer be
trusted, no future is ever done again: each fails with `StoreFailed`, and the process must end and
start from the disk.

Theory of operation. One thread owns the one connection. It takes all changes that wait, lays them
on top of one another (of a counter that changed in ten of them the last row is written) and commits
them together, so that the price of `synchronous=FULL` is shared by all. Reads wait in the same line
and see everything that was put before them; without room they go first, and see what is on the
disk.

Three kinds of failure, and only three:

- *No room* (SQLITE_FULL): nothing is lost and nothing is done; the changes wait. A reserve file of
  1 MiB is given up, so that the outcome of a call that is under way can still be written, change by
  change. `writable` is False until the reserve could be made again.
- *Anything else the disk says* (I/O error, read-only, corrupt), and any row that the database
  refuses: the end. SQLite goes on answering "ok" after a failed fsync, so the first failure must be
  the last. For the same reason it does not checkpoint by itself here: it would keep a failed fsync
  of a checkpoint to itself.
- *Another daemon*, or another program with the file open: `StoreLocked`, at start.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from meterd.core.changes import (
    CardRow,
    Change,
    DeadLetter,
    JournalEntry,
    KeyRow,
    MarkBlock,
    ReceiptRow,
    State,
    Taken,
)
from meterd.core.openings import Opening
from meterd.core.settlement import UNFINISHED, Escrow, Release
from meterd.errors import (
    MeterdError,
    NotFound,
    Refused,
    StoreCorrupt,
    StoreFailed,
    StoreLocked,
)
from meterd.store import schema, taken
from meterd.store.identities import Identities, join
from meterd.store.lock import DirectoryLock

T = TypeVar("T")
Query = Callable[[sqlite3.Connection], T]

DATABASE_NAME = "meterd.db"
RESERVE_NAME = "meterd.reserve"
RESERVE_BYTES = 1024 * 1024
CHANGES_MAX = 512  # In one commit: bounds how long the first of them waits for the last.
WAL_BYTES_MAX = 16 * 1024 * 1024  # Then it is checkpointed: a few dozen commits of large batches.
LIST_MAX = 1000  # Rows in one answer.
RETRY_S_MIN = 0.1
RETRY_S_MAX = 5.0
VOIDS_KEPT_MS = 30 * 24 * 3600 * 1000  # A release given up longer ago will not land any more.
SMALL_BLOCK = 2048  # Blocks of fewer identities are joined ...
JOIN_AT = 64  # ... when so many of like size lie in one hour.
JOIN_ANYWAY_AT = 4096  # New blocks after which they are joined even if there is no idle moment.

_PRAGMAS: Sequence[tuple[str, int | str, int | str]] = (
    # EXCLUSIVE stands before WAL: no second connection, and no shared memory file beside it.
    ("locking_mode", "EXCLUSIVE", "exclusive"),
    ("journal_mode", "WAL", "wal"),
    ("synchronous", "FULL", 2),
    ("wal_autocheckpoint", 0, 0),
    ("foreign_keys", "ON", 1),
    ("trusted_schema", "OFF", 0),
    ("cell_size_check", "ON", 1),
    ("temp_store", "MEMORY", 2),
    ("cache_size", -16384, -16384),
    ("busy_timeout", 0, 0),
)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True, slots=True)
class Journalled:
    """A journal entry with its number, from 1 without gaps, and its hash."""

    number: int
    entry: JournalEntry
    hash: bytes


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store weighs, and how its last commit went."""

    bytes: int  # Of the database and its WAL.
    waiting: int  # Changes and reads in line.
    last_commit_seconds: float
    last_commit_changes: int


class _Write:
    """A change and the promise that hangs on it."""

    __slots__ = ("change", "future")

    def __init__(self, change: Change, future: asyncio.Future[None]) -> None:
        self.change = change
        self.future = future


class _Read:
    """A question and the promise of its answer."""

    __slots__ = ("future", "query")

    def __init__(self, query: Query[object], future: asyncio.Future[object]) -> None:
        self.query = query
        self.future = future


_Job = _Write | _Read


class SqliteStore:
    """The store of one daemon. `open` and `load` block and come first; the loop calls all else.

    The hooks are called on the event loop: `on_commit(seconds, changes)` after each commit,
    `on_writable(bool)` when the disk is full and when it has room again, `on_failed(error)` once;
    then the process must end.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        lock: DirectoryLock,
        data_dir: Path,
        identities: Identities,
        heads: schema.Heads,
    ) -> None:
        self.identities = identities
        self.writable = True
        self.failed = asyncio.Event()
        self.failure: StoreFailed | None = None
        self.on_commit: Callable[[float, int], None] = _ignore
        self.on_writable: Callable[[bool], None] = _ignore
        self.on_failed: Callable[[StoreFailed], None] = _ignore
        self._connection = connection
        self._lock = lock
        self._data_dir = data_dir
        self._database = data_dir / DATABASE_NAME
        self._wal = data_dir / f"{DATABASE_NAME}-wal"
        self._reserve = data_dir / RESERVE_NAME
        self._heads = heads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # Shared with the writer thread, under `_wake`.
        self._wake = threading.Condition()
        self._queue: deque[_Write | _Read] = deque()
        self._stopping = False
        # The writer thread's own.
        self._under_way: list[_Write] | list[_Read] = []
        self._full = False
        self._retry_s = RETRY_S_MIN
        self._small_blocks = JOIN_AT  # Unknown after a start: look once.
        self._last = (0.0, 0)

    # -- Opening ----------------------------------------------------------------------------------

    @classmethod
    def open(cls, data_dir: Path, *, entries_max: int) -> SqliteStore:
        """Open or create the store in a directory and load the known identities.

        Raises `StoreLocked` when somebody else has it, `StoreCorrupt` when its content contradicts
        itself or is of a newer meterd, `StoreFailed` when the disk does not do what is needed.
        """
        if sqlite3.sqlite_version_info < (3, 37):
            raise StoreFailed(f"SQLite 3.37 or newer is needed, this is {sqlite3.sqlite_version}")
        with contextlib.ExitStack() as undo:
            try:
                _make_directory(data_dir)
                lock = DirectoryLock.take(data_dir)
                undo.callback(lock.release)
                _refuse_foreign_log(data_dir / DATABASE_NAME)
                _make_file(data_dir / DATABASE_NAME)
                connection = sqlite3.connect(
                    data_dir / DATABASE_NAME,
                    isolation_level=None,
                    timeout=0,
                    check_same_thread=False,  # `open` and `load` run before the writer thread does.
                    cached_statements=256,
                )
                undo.callback(connection.close)
                store = cls._started(connection, lock, data_dir, entries_max)
            except sqlite3.Error as error:
                raise _explained(error, data_dir) from error
            except OSError as error:
                raise StoreFailed(f"the data directory cannot be used: {error}") from error
            undo.pop_all()
            return store

    @classmethod
    def _started(
        cls, connection: sqlite3.Connection, lock: DirectoryLock, data_dir: Path, entries_max: int
    ) -> SqliteStore:
        _set_up(connection)
        _climb(connection)
        settings = dict(connection.execute("SELECT name, value FROM setting"))
        heads = _verify_journal(connection, settings)
        (marks,) = connection.execute("SELECT max(number) FROM mark_block").fetchone()
        heads.marks = marks or 0
        identities = Identities(entries_max, settings.get("marks_from", 0))
        identities.load(connection.execute("SELECT bucket, data FROM mark_block"))
        _give_memory_back()
        sync_directory(data_dir)
        store = cls(connection, lock, data_dir, identities, heads)
        if not store._make_reserve():
            store._full, store.writable = True, False
        return store

    def load(self, *, now_ms: int | None = None) -> State:
        """Read everything but the identities. Blocks; for the start, before the first `commit`."""
        assert self._thread is None
        now = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        try:
            return _state(self._connection, now)
        except sqlite3.Error as error:
            raise _explained(error, self._data_dir) from error

    # -- Asked on the event loop ------------------------------------------------------------------

    def commit(self, change: Change) -> asyncio.Future[None]:
        """Write a change behind all those before it; done when it is on the disk.

        Fails with `StoreFailed`. While the disk is full it just waits: see `writable`. The line has
        no limit of its own; who puts changes in bounds how many are not done.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._submit(_Write(change, future))
        return future

    async def releases(
        self,
        *,
        escrow: str | None = None,
        agreement: str | None = None,
        status: str | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> list[Release]:
        """List releases, newest first, at most 1,000, those made before release `before`.

        Raises `NotFound` when there is no such release.
        """
        wanted = _Wanted()
        wanted.equal("escrow", escrow)
        wanted.equal("status", status)
        if agreement is not None:
            wanted.that("escrow IN (SELECT id FROM escrow WHERE agreement = ?)", agreement)

        def query(connection: sqlite3.Connection) -> list[Release]:
            if before is not None:
                found = connection.execute("SELECT number FROM release WHERE id = ?", (before,))
                wanted.that("number < ?", _one(found, f"there is no release {before}")[0])
            rows = wanted.newest(connection, schema.RELEASE_COLUMNS, "release", limit)
            return [schema.release_of(row) for row in rows]

        return await self._ask(query)

    async def dead_letters(
        self, *, limit: int = 100, before: int | None = None, reason: str | None = None
    ) -> list[DeadLetter]:
        """List dead letters, newest first, at most 1,000, with numbers below `before`."""
        wanted = _Wanted()
        wanted.equal("reason", reason)
        wanted.below(before)

        def query(connection: sqlite3.Connection) -> list[DeadLetter]:
            rows = wanted.newest(connection, schema.DEAD_LETTER_COLUMNS, "dead_letter", limit)
            return [schema.dead_letter_of(row) for row in rows]

        return await self._ask(query)

    async def dead_letter(self, number: int) -> DeadLetter | None:
        """Find one dead letter."""
        wanted = _Wanted()
        wanted.that("number = ?", number)

        def query(connection: sqlite3.Connection) -> DeadLetter | None:
            rows = wanted.newest(connection, schema.DEAD_LETTER_COLUMNS, "dead_letter", 1)
            return next((schema.dead_letter_of(row) for row in rows), None)

        return await self._ask(query)

    async def journal(self, *, limit: int = 100, before: int | None = None) -> list[Journalled]:
        """List journal entries, newest first, at most 1,000, with numbers below `before`."""
        wanted = _Wanted()
        wanted.below(before)

        def query(connection: sqlite3.Connection) -> list[Journalled]:
            rows = wanted.newest(connection, schema.JOURNAL_COLUMNS, "journal", limit)
            return [Journalled(row[0], JournalEntry(*row[1:6]), row[6]) for row in rows]

        return await self._ask(query)

    async def receipts(
        self, agreement: str, *, limit: int = 100, after: int = 0
    ) -> list[ReceiptRow]:
        """List an agreement's receipts, oldest first, at most 1,000, with numbers above `after`."""
        text = (
            f"SELECT {schema.RECEIPT_COLUMNS} FROM receipt"  # noqa: S608  # No text from outside.
            " WHERE agreement = ? AND number > ? ORDER BY number LIMIT ?"
        )
        values = agreement, after, max(0, min(limit, LIST_MAX))
        return await self._ask(
            lambda connection: [ReceiptRow(*row) for row in connection.execute(text, values)]
        )

    async def find_taken(self, digest: bytes) -> list[Taken]:
        """Find what events of this identity added: one, unless two share the digest's first half.

        Looks through the blocks, newest first, some at a time, so that commits go on in between.
        """
        found: list[Taken] = []
        below: int | None = None
        while True:
            part, below = await self._ask(partial(_search_taken, digest[: taken.KEY_BYTES], below))
            found += part
            if below is None:
                return found

    async def backup(self, path: Path) -> None:
        """Copy the whole store, as of one moment, into a new file. Commits wait meanwhile.

        Raises `Refused` when the file exists or cannot be written.
        """
        await self._ask(lambda connection: _back_up(connection, path))

    def stats(self) -> StoreStats:
        """What the store weighs now, and how its last commit went."""
        seconds, changes = self._last
        weight = sum(_size(path) for path in (self._database, self._wal))
        return StoreStats(weight, len(self._queue), seconds, changes)

    async def close(self) -> None:
        """Finish what waits, checkpoint, and give up the lock.

        While the disk is full, what waits is tried once more and then fails.
        """
        if self._thread is not None:
            with self._wake:
                self._stopping = True
                self._wake.notify()
            await asyncio.to_thread(self._thread.join)
            await asyncio.sleep(0)  # Let the last futures be done before anybody looks.
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._lock.release()

    async def _ask(self, query: Query[T]) -> T:
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._submit(_Read(query, future))
        return await future  # type: ignore[return-value]  # It is the query's answer.

    def _submit(self, job: _Write | _Read) -> None:
        if self._thread is None:
            self._start()
        with self._wake:
            if self.failure is None and not self._stopping:
                self._queue.append(job)
                self._wake.notify()
                return
        _fail(job, self.failure or StoreFailed("the store is closed"))

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    # -- On the writer thread ---------------------------------------------------------------------

    def _work(self) -> None:
        """The writer thread's life: jobs in order, and housekeeping in between."""
        try:
            while (jobs := self._take()) is not None:
                if not jobs:
                    self._keep_house()
                elif isinstance(jobs[0], _Read):
                    self._answer(jobs[0])
                else:
                    self._write(jobs)
            if self._checkpoint():
                self._let_go_of_log()
        except BaseException as error:  # noqa: BLE001  # Whatever it is, memory and disk are no longer in step.
            self._give_up(error)

    def _take(self) -> list[_Write] | list[_Read] | None:
        """Wait for jobs: changes that go into one commit, or one read.

        An empty list: it is time to keep house. None: the end.
        """
        with self._wake:
            while not self._queue:
                if self._stopping:
                    return None
                if self._full or self._small_blocks >= JOIN_AT:
                    if not self._wake.wait(self._retry_s if self._full else 0) and not self._queue:
                        return []
                else:
                    self._wake.wait()
            if self._small_blocks >= JOIN_ANYWAY_AT:
                return []
            first = self._next_read() if self._full else self._queue[0]
            if isinstance(first, _Read):
                self._queue.remove(first)
                self._under_way = [first]
                return self._under_way
            # Without room each change is tried alone: perhaps a small one fits.
            self._under_way = list(self._next_writes(1 if self._full else CHANGES_MAX))
            return self._under_way

    def _next_read(self) -> _Read | None:
        """The first question in line: without room it does not wait for the changes before it.

        A person who asks what is wrong must have an answer, of what is on the disk.
        """
        return next((job for job in self._queue if isinstance(job, _Read)), None)

    def _next_writes(self, most: int) -> Iterator[_Write]:
        for _ in range(most):
            if not self._queue or isinstance(self._queue[0], _Read):
                return
            job = self._queue.popleft()
            assert isinstance(job, _Write)
            yield job

    def _write(self, jobs: list[_Write]) -> None:
        started = time.monotonic()
        rows = schema.Rows.of(job.change for job in jobs)
        try:
            with self._transaction():
                heads = rows.write(self._connection, self._heads)
        except sqlite3.OperationalError as error:
            if not _is_full(error):
                raise
            self._put_back(jobs)
            self._without_room()
            return
        self._heads = heads
        self._small_blocks += sum(
            1 for blocks in rows.marks.values() if sum(b.count for b in blocks) < SMALL_BLOCK
        )
        self._under_way = []
        self._last = (time.monotonic() - started, len(jobs))
        self._on_loop(self._resolve, jobs, *self._last)
        if self._full:
            self._keep_house()
        elif _size(self._wal) > WAL_BYTES_MAX and not self._checkpoint():
            self._without_room()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite has rolled back some failures by itself.
                self._connection.execute("ROLLBACK")
            raise

    def _answer(self, job: _Read) -> None:
        try:
            answer = job.query(self._connection)
        except MeterdError as error:
            self._on_loop(_fail, job, error)
        else:
            self._on_loop(_done, job, answer)
        self._under_way = []

    def _checkpoint(self) -> bool:
        """Bring the WAL into the database; False when there is no room: then it stays, durable."""
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.OperationalError as error:
            if not _is_full(error):
                raise
            return False
        return True

    def _let_go_of_log(self) -> None:
        """Say in the header that no log belongs to this file any more: see `foreign_log`.

        So a copy of a directory that was stopped in order is known as one. First it must be durable
        that the log is empty, or a power cut could bring it back beside that header.
        """
        try:
            with self._wal.open("rb") as log:
                os.fsync(log.fileno())
        except FileNotFoundError:
            return  # Nothing was ever written.
        try:
            self._connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        except sqlite3.OperationalError as error:
            if not _is_full(error):
                raise

    def _keep_house(self) -> None:
        """Without room: look whether there is some again. Else: join small blocks of identities."""
        if not self._full:
            self._join_blocks()
        elif self._make_reserve():
            self._full = False
            self._retry_s = RETRY_S_MIN
            self._on_loop(self._set_writable, True)
        else:
            self._retry_s = min(self._retry_s * 2, RETRY_S_MAX)

    # -- A full disk ------------------------------------------------------------------------------

    def _put_back(self, jobs: list[_Write]) -> None:
        with self._wake:
            self._queue.extendleft(reversed(jobs))
        self._under_way = []

    def _without_room(self) -> None:
        """Give up the reserve and try again at once; with none left, wait longer each time."""
        if not self._full:
            self._full = True
            self._on_loop(self._set_writable, False)
        if self._reserve.exists():
            self._reserve.unlink()
            return
        with self._wake:
            if self._stopping:
                raise StoreFailed(
                    "the disk is full, and what waits cannot be written: make room and start again"
                )
            self._wake.wait_for(lambda: self._stopping or self._next_read(), self._retry_s)
        self._retry_s = min(self._retry_s * 2, RETRY_S_MAX)

    def _make_reserve(self) -> bool:
        """Have the reserve file on the disk, really allocated; False when there is no room."""
        descriptor = os.open(self._reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            os.fsync(descriptor)
        except OSError:
            self._reserve.unlink(missing_ok=True)
            return False
        finally:
            os.close(descriptor)
        return True

    # -- Joining blocks ---------------------------------------------------------------------------

    def _join_blocks(self) -> None:
        """Join small blocks of one hour and of like size: events that come singly leave few rows.

        An identity is rewritten at most three times on its way into a block that is large enough.
        """
        rows = self._connection.execute(
            "SELECT bucket, count, number FROM mark_block WHERE count < ?", (SMALL_BLOCK,)
        )
        alike: dict[tuple[int, int], list[int]] = {}
        for bucket, count, number in rows:
            alike.setdefault((bucket, count.bit_length() // 4), []).append(number)
        self._small_blocks = 0
        for (bucket, _), numbers in alike.items():
            for first in range(0, len(numbers) - JOIN_AT + 1, JOIN_AT):
                if not self._join(bucket, numbers[first : first + JOIN_AT]):
                    return

    def _join(self, bucket: int, numbers: list[int]) -> bool:
        """Replace blocks of an hour by one; False when there is no room, which does no harm."""
        marks = ", ".join("?" * len(numbers))
        picked = f"FROM mark_block WHERE number IN ({marks})"
        number = self._heads.marks + 1
        try:
            with self._transaction():
                found = self._connection.execute(f"SELECT count, data {picked}", numbers)
                block = join([MarkBlock(bucket, count, data) for count, data in found])
                self._connection.execute(f"DELETE {picked}", numbers)
                row = (number, bucket, block.count, block.data)
                schema.PUT_MARKS.put(self._connection, [row])
        except sqlite3.OperationalError as error:
            if not _is_full(error):
                raise
            return False
        self._heads.marks = number
        return True

    # -- Ends -------------------------------------------------------------------------------------

    def _give_up(self, error: BaseException) -> None:
        """Fail everything that waits and everything that will come."""
        failure = error if isinstance(error, StoreFailed) else StoreFailed(_told(error))
        failure.__cause__ = None if failure is error else error
        with self._wake:
            self.failure = failure
            jobs = [*self._under_way, *self._queue]
            self._queue.clear()
        self._on_loop(self._tell_failure, jobs, failure)

    def _tell_failure(self, jobs: Sequence[_Job], failure: StoreFailed) -> None:
        self.writable = False
        for job in jobs:
            _fail(job, failure)
        self.failed.set()
        self.on_failed(failure)

    def _resolve(self, jobs: list[_Write], seconds: float, changes: int) -> None:
        for job in jobs:
            if not job.future.done():
                job.future.set_result(None)
        self.on_commit(seconds, changes)

    def _set_writable(self, writable: bool) -> None:
        self.writable = writable
        self.on_writable(writable)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody is left to be told.
            self._loop.call_soon_threadsafe(call, *arguments)


class _Wanted:
    """The conditions of a listing."""

    def __init__(self) -> None:
        self._conditions: list[str] = []
        self._values: list[int | str] = []

    def that(self, condition: str, value: int | str) -> None:
        """Add a condition with its one value."""
        self._conditions.append(condition)
        self._values.append(value)

    def equal(self, column: str, value: str | None) -> None:
        """Add "column is value", where one is given."""
        if value is not None:
            self.that(f"{column} = ?", value)

    def below(self, before: int | None) -> None:
        """Add "older than this number", where one is given."""
        if before is not None:
            self.that("number < ?", before)

    def newest(
        self, connection: sqlite3.Connection, columns: str, table: str, limit: int
    ) -> sqlite3.Cursor:
        """Ask."""
        where = f"WHERE {' AND '.join(self._conditions)} " if self._conditions else ""
        text = f"SELECT {columns} FROM {table} {where}ORDER BY number DESC LIMIT ?"  # noqa: S608  # No text from outside.
        return connection.execute(text, (*self._values, max(0, min(limit, LIST_MAX))))


# -------------------------------------------------------------------------------------------------
# Opening


def _make_directory(data_dir: Path) -> None:
    if data_dir.is_dir():
        return
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    sync_directory(data_dir.parent)


def _make_file(path: Path) -> None:
    """Create the database for its owner alone; SQLite gives its WAL the same rights."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def foreign_log(database: Path) -> bool:
    """Whether the log beside a database certainly belongs to another one.

    A store says in its header, durably and before its log has a byte, that it has one (bytes 18
    and 19). One that was closed in order and a file of `meterd backup` say that they have none, and
    an empty file says nothing: SQLite would lay the log over these, and delete it beside that.
    """
    log = database.with_name(f"{database.name}-wal")
    if not _size(log):
        return False
    if not _size(database):
        return True
    with database.open("rb") as file:
        if file.read(20)[18:20] != b"\1\1":
            return False
    return not _says_goodbye(log)


def _says_goodbye(log: Path) -> bool:
    """Whether the log itself brings the header that says there is none.

    If the log could not be deleted in closing, SQLite writes that header by way of it, and a power
    cut may leave both. The log's first page, page 1, lies behind 32 bytes of its own and 24 of the
    page's.
    """
    with log.open("rb") as file:
        start = file.read(76)
    return start[32:36] == b"\0\0\0\1" and start[74:] == b"\1\1"


def _refuse_foreign_log(database: Path) -> None:
    if foreign_log(database):
        raise StoreCorrupt(
            f"{database}-wal belongs to another file than {database}, which was put back by hand"
            " or is gone: it would undo or spoil it. Type: meterd restore FILE, with the copy that"
            " should be there; or put back the database that the log belongs to"
        )


def sync_directory(path: Path) -> None:
    """Make names durable: without it a power cut may take a new file that was itself fsynced."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_up(connection: sqlite3.Connection) -> None:
    """Set what durability rests on, and read back what each setting has become."""
    for name, value, expected in _PRAGMAS:
        connection.execute(f"PRAGMA {name} = {value}").fetchall()
        answered = connection.execute(f"PRAGMA {name}").fetchone()
        if answered != (expected,):
            raise StoreFailed(
                f"SQLite answered {answered} to {name} = {value}: this file system or this SQLite"
                " cannot keep the store; put data_dir on a local disk"
            )


def _give_memory_back() -> None:
    """Return what loading freed: it lies between what stays, so glibc does it only when asked.

    With ten million identities that is 140 MB. Without such a call nothing is lost.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _climb(connection: sqlite3.Connection) -> None:
    """Bring the tables up to this program's version, one committed step after the other."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != schema.APPLICATION_ID and tables:
        raise StoreCorrupt(f"{DATABASE_NAME} is the database of another program: move it away")
    if version > schema.VERSION:
        raise StoreCorrupt(
            f"the store was written by a newer meterd (version {version}, this one knows"
            f" {schema.VERSION}): install that meterd again, or restore a backup from before"
        )
    for number, step in enumerate(schema.LADDER[version:], version + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {step} PRAGMA application_id = {schema.APPLICATION_ID};"
            f" PRAGMA user_version = {number}; COMMIT;"
        )
    # A store that is up to date is written to as well: a disk that cannot be must show now.
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("COMMIT")


def _verify_journal(
    connection: sqlite3.Connection, settings: dict[str, int | bytes]
) -> schema.Heads:
    """Follow the chain to its end. Raises `StoreCorrupt`, which names the entry where it breaks."""
    heads = schema.Heads()
    rows = connection.execute(
        "SELECT number, hash, at, actor, action, subject, detail FROM journal ORDER BY number"
    )
    advice = "somebody changed the file; keep it for a look and restore a backup"
    for number, stored, *fields in rows:
        heads.journal += 1
        heads.journal_hash = schema.chained(heads.journal_hash, tuple(fields))
        if number != heads.journal or stored != heads.journal_hash:
            raise StoreCorrupt(f"the journal's chain breaks at entry {heads.journal}: {advice}")
    number, hash_ = settings.get("journal_number", 0), settings.get("journal_hash", schema.GENESIS)
    if (number, hash_) != (heads.journal, heads.journal_hash):
        raise StoreCorrupt(
            f"the journal ends at entry {heads.journal}, it should end at {number!r}: {advice}"
        )
    return heads


TAKEN_BLOCKS_AT_ONCE = 2_000


def _search_taken(
    key: bytes, below: int | None, connection: sqlite3.Connection
) -> tuple[list[Taken], int | None]:
    """Search some blocks with numbers below; what was found, and where to go on, None: nowhere."""
    rows = connection.execute(
        "SELECT number, wide, data FROM taken_block WHERE number < ? ORDER BY number DESC LIMIT ?",
        (2**62 if below is None else below, TAKEN_BLOCKS_AT_ONCE),
    ).fetchall()
    found = [one for _, wide, data in rows for one in taken.search(key, data, wide=bool(wide))]
    return found, rows[-1][0] if len(rows) == TAKEN_BLOCKS_AT_ONCE else None


def _state(connection: sqlite3.Connection, now_ms: int) -> State:
    state = State()
    execute = connection.execute
    state.cards = [CardRow(*row) for row in execute("SELECT id, text FROM card")]
    rows = execute(f"SELECT {schema.AGREEMENT_COLUMNS} FROM agreement")  # noqa: S608
    state.agreements = [schema.agreement_of(row) for row in rows]
    rows = execute(f"SELECT {schema.COUNTER_COLUMNS} FROM counter")  # noqa: S608
    state.counters = [schema.counter_of(row) for row in rows]
    rows = execute(f"SELECT {schema.SAMPLE_COLUMNS} FROM sample WHERE count > 0")  # noqa: S608
    state.samples = [schema.sample_of(row) for row in rows]
    rows = execute(f"SELECT {schema.HOLD_COLUMNS} FROM hold")  # noqa: S608
    state.holds = [schema.hold_of(row) for row in rows]
    rows = execute(f"SELECT {schema.VOID_COLUMNS} FROM void ORDER BY number")  # noqa: S608
    state.voids = [schema.void_of(row) for row in rows]
    last = execute("SELECT seq FROM sqlite_sequence WHERE name = 'void'").fetchone()
    state.void_next = 1 if last is None else last[0] + 1
    rows = execute(f"SELECT {schema.PRODUCER_COLUMNS} FROM producer")  # noqa: S608
    state.producers = [schema.producer_of(row) for row in rows]
    limit = execute("SELECT value FROM setting WHERE name = 'numbers_from'").fetchone()
    state.numbers_from = 0 if limit is None else limit[0]
    state.positions = dict(execute("SELECT source, position FROM position"))
    state.escrows = _escrows(connection, now_ms)
    rows = execute(f"SELECT {schema.KEY_COLUMNS} FROM key")  # noqa: S608
    state.keys = [KeyRow(*row) for row in rows]
    heads = execute("SELECT agreement, max(number), hash FROM receipt GROUP BY agreement")
    state.receipts = {agreement: (number, hash_) for agreement, number, hash_ in heads}
    state.openings, state.opened = _openings(connection)
    (state.dead_letters,) = execute("SELECT count(*) FROM dead_letter").fetchone()
    last = execute("SELECT seq FROM sqlite_sequence WHERE name = 'dead_letter'").fetchone()
    state.dead_letter_next = 1 if last is None else last[0] + 1
    return state


def _openings(connection: sqlite3.Connection) -> tuple[list[Opening], frozenset[str]]:
    """Those whose escrow nothing draws on yet, and the agreements that have had one locked."""
    unbound = connection.execute(
        f"SELECT {schema.OPENING_COLUMNS} FROM opening WHERE status IN ('intended', 'in_doubt',"  # noqa: S608
        " 'absent') OR (status = 'locked' AND escrow NOT IN (SELECT id FROM escrow))"
        " ORDER BY number"
    )
    opened = connection.execute("SELECT DISTINCT agreement FROM opening WHERE status = 'locked'")
    return [schema.opening_of(row) for row in unbound], frozenset(name for (name,) in opened)


def _escrows(connection: sqlite3.Connection, now_ms: int) -> list[Escrow]:
    select = f"SELECT {schema.RELEASE_COLUMNS} FROM release WHERE "  # noqa: S608
    unfinished = ", ".join(f"'{status}'" for status in sorted(UNFINISHED))
    releases = map(schema.release_of, connection.execute(f"{select} status IN ({unfinished})"))
    open_ = {release.escrow: release for release in releases}
    voids: dict[str, list[Release]] = {}
    recent = connection.execute(
        f"{select} status IN ('void', 'late') AND changed_at > ? ORDER BY number",
        (now_ms - VOIDS_KEPT_MS,),
    )
    for void in map(schema.release_of, recent):
        voids.setdefault(void.escrow, []).append(void)
    rows = connection.execute(f"SELECT {schema.ESCROW_COLUMNS} FROM escrow")  # noqa: S608
    return [schema.escrow_of(row, open_.get(row[0]), tuple(voids.get(row[0], ()))) for row in rows]


# -------------------------------------------------------------------------------------------------
# Small things


def _back_up(connection: sqlite3.Connection, path: Path) -> None:
    """Copy into a file beside the wanted one, then name it: what has that name is always whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        _make_file(partial)
        with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as target:
            connection.backup(target)
            target.execute("PRAGMA journal_mode = DELETE").fetchall()  # One file, without a WAL.
        descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(partial, path)  # Unlike a rename it never replaces a file.
        partial.unlink()
        sync_directory(path.parent)
    except FileExistsError:
        partial.unlink(missing_ok=True)
        raise Refused(f"{path} exists: name a new file") from None
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, sqlite3.DatabaseError) and _code(error) in _DAMAGED:
            raise
        raise Refused(f"the backup cannot be written: {error}") from error


def _one(cursor: sqlite3.Cursor, missing: str) -> tuple[int]:
    row: tuple[int] | None = cursor.fetchone()
    if row is None:
        raise NotFound(missing)
    return row


def _done(job: _Read, answer: object) -> None:
    if not job.future.done():
        job.future.set_result(answer)


def _fail(job: _Job, error: MeterdError) -> None:
    if not job.future.done():
        job.future.set_exception(error)
        job.future.exception()  # It counts as seen: `failed` tells of it, too.


def _ignore(*_: object) -> None:
    """Stand in for a hook that nobody set."""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code: the extended one without its upper bits."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_full(error: sqlite3.Error) -> bool:
    return _code(error) == sqlite3.SQLITE_FULL


def _told(error: BaseException) -> str:
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return f"the store failed ({name}: {error}); the process must end and start from the disk"


def _explained(error: sqlite3.Error, data_dir: Path) -> MeterdError:
    if _code(error) in _BUSY:
        return StoreLocked(
            f"another program has {data_dir / DATABASE_NAME} open (a sqlite3 shell?): close it"
        )
    if _code(error) in _DAMAGED:
        return StoreCorrupt(
            f"{data_dir / DATABASE_NAME} is damaged ({error}): keep it for a look, restore a backup"
        )
    return StoreFailed(f"{data_dir / DATABASE_NAME} cannot be opened: {error}")
