"""The part of the standard library's `sqlite3` that the store uses, on a VFS of apsw.

The rule kept here: the store's code runs as it is. It gets real rows, the standard library's own
exception classes with the codes that it would have got, and no more: what it does not use today is
not here, and asking for it fails. Rows are fetched when a statement is run and not when they are
asked for, which the store does not see: it drops or drains every cursor at once.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import apsw

# By primary result code, as the standard library's module does it; all others: DatabaseError.
_OPERATIONAL = "ERROR PERM ABORT BUSY LOCKED READONLY INTERRUPT IOERR FULL CANTOPEN PROTOCOL SCHEMA"
_CLASSES: dict[int, type[sqlite3.Error]] = {
    **{getattr(sqlite3, f"SQLITE_{n}"): sqlite3.OperationalError for n in _OPERATIONAL.split()},
    sqlite3.SQLITE_TOOBIG: sqlite3.DataError,
    sqlite3.SQLITE_CONSTRAINT: sqlite3.IntegrityError,
    sqlite3.SQLITE_MISMATCH: sqlite3.IntegrityError,
    sqlite3.SQLITE_MISUSE: sqlite3.InterfaceError,
    sqlite3.SQLITE_RANGE: sqlite3.InterfaceError,
    sqlite3.SQLITE_INTERNAL: sqlite3.InternalError,
}


def _translated(error: apsw.Error) -> sqlite3.Error:
    code = getattr(error, "extendedresult", getattr(error, "result", apsw.SQLITE_ERROR))
    translated = _CLASSES.get(code & 0xFF, sqlite3.DatabaseError)(str(error))
    translated.sqlite_errorcode = code
    translated.sqlite_errorname = str(
        apsw.mapping_extended_result_codes.get(code) or apsw.mapping_result_codes[code & 0xFF]
    )
    return translated


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except apsw.Error as error:
        raise _translated(error) from error


class Cursor:
    """The rows of one statement."""

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = iter(rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self._rows

    def fetchone(self) -> tuple[Any, ...] | None:
        return next(self._rows, None)

    def fetchall(self) -> list[tuple[Any, ...]]:
        return list(self._rows)


class Connection:
    """A connection in autocommit mode, `isolation_level=None`: the store begins and commits."""

    def __init__(self, path: str, vfs: str, cached_statements: int) -> None:
        with _translating():
            self._db = apsw.Connection(path, vfs=vfs, statementcachesize=cached_statements)

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def execute(self, text: str, values: Sequence[Any] = ()) -> Cursor:
        try:
            return Cursor(self._db.execute(text, values).fetchall())
        except apsw.Error as error:
            raise _translated(error) from error

    def executescript(self, text: str) -> Cursor:
        return self.execute(text)

    def backup(self, target: Connection) -> None:
        with _translating(), target._db.backup("main", self._db, "main") as backup:
            while not backup.done:
                backup.step()

    def drop(self) -> None:
        """Close without the checkpoint that closing a WAL does: for one who only looked."""
        self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._db.close()

    def close(self) -> None:
        with contextlib.suppress(apsw.Error):  # SQLite tells nobody what failed in closing.
            self._db.close()


def module(vfs: str) -> SimpleNamespace:
    """What stands for the module `sqlite3` in the store."""

    def connect(
        path: object,
        *,
        isolation_level: None,
        timeout: int = 0,
        check_same_thread: bool = True,
        cached_statements: int = 128,
    ) -> Connection:
        assert isolation_level is None
        assert timeout == 0
        return Connection(str(path), vfs, cached_statements)

    version = apsw.sqlite_lib_version()
    names = {name: getattr(sqlite3, name) for name in dir(sqlite3) if name.startswith("SQLITE_")}
    names |= {n: getattr(sqlite3, n) for n in ("Error", "DatabaseError", "OperationalError")}
    return SimpleNamespace(
        **names,
        connect=connect,
        sqlite_version=version,
        sqlite_version_info=tuple(map(int, version.split("."))),
    )
