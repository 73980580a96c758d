"""The real store on real SQLite, its writer run as steps of the loop instead of on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

from meterd.core.changes import Change, State
from meterd.errors import StoreFailed
from meterd.store.sqlite import JOIN_AT, SqliteStore, _fail, _Read, _Write
from tests.simulation.oracle import Verdicts


class _NoWait(threading.Condition):
    """Nobody is waited for: there is one thread."""

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        return False

    def wait_for(self, predicate: Any, timeout: float | None = None) -> bool:  # noqa: ARG002
        return bool(predicate())


def _disk_error(code: int, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code  # type: ignore[misc]
    return error


class InlineStore(SqliteStore):
    """`sim` says when a commit fails and when there is no room."""

    sim: Any = None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.batch: Verdicts | None = None  # What the change that comes next accounts for.
        self._batches: list[tuple[Change, Verdicts]] = []
        self._wake = _NoWait()
        self._armed = False

    def load(self, *, now_ms: int | None = None) -> State:  # noqa: ARG002
        return super().load(now_ms=self.sim.clock.wall())

    def commit(self, change: Change) -> asyncio.Future[None]:
        if self.batch is not None:
            self._batches.append((change, self.batch))
            self.batch = None
        return super().commit(change)

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.current_thread()

    def _submit(self, job: _Write | _Read) -> None:
        if self._thread is None:
            self._start()
        if self.failure is not None or self._stopping:
            _fail(job, self.failure or StoreFailed("the store is closed"))
            return
        self._queue.append(job)
        self._arm()

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            delay = self._retry_s if self._full else self.sim.commit_delay()
            asyncio.get_running_loop().call_later(delay, self._pump)

    def _pump(self) -> None:
        self._armed = False
        try:
            jobs = self._take() if self._queue else []
            if not jobs:
                if self._full or self._small_blocks >= JOIN_AT:
                    self._keep_house()
            elif isinstance(jobs[0], _Read):
                self._answer(jobs[0])
            else:
                self._write(jobs)
        except Exception as error:  # noqa: BLE001  # As on the thread.
            self._give_up(error)
            return
        if self._queue or self._full:
            self._arm()

    def _write(self, jobs: Any) -> None:
        super()._write(jobs)
        if not self._under_way and not any(job in self._queue for job in jobs):
            changes = [job.change for job in jobs]
            self._kept(changes)

    def _kept(self, changes: list[Change]) -> None:
        for change, batch in list(self._batches):
            if any(change is one for one in changes):
                self.sim.oracle.keep(batch)
                self._batches.remove((change, batch))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        if self.sim.disk_full:
            raise _disk_error(sqlite3.SQLITE_FULL, "database or disk is full")
        fault, self.sim.store_fault = self.sim.store_fault, ""
        self.sim.trace("commit" + fault)
        if fault == "before":
            raise _disk_error(sqlite3.SQLITE_IOERR, "disk I/O error")
        with super()._transaction():
            yield
        if fault == "after":  # It is on the disk, and nobody may know.
            self._kept([job.change for job in self._under_way if isinstance(job, _Write)])
            raise _disk_error(sqlite3.SQLITE_IOERR, "disk I/O error")

    def _make_reserve(self) -> bool:
        if self.sim is not None and self.sim.disk_full:
            return False
        self._reserve.touch()
        return True

    async def close(self) -> None:
        self._stopping = True
        while self._queue and self.failure is None:
            self._armed = True
            self._pump()
        await asyncio.sleep(0)
        self.abandon()

    def abandon(self) -> None:
        """Let go of the file, as a dying process does."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._lock.release()
