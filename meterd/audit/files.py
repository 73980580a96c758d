"""Opening a store without leaving a trace: no lock is kept, no byte is written beside it.

The rule kept here: what is read stood still while it was read. A directory with a daemon on it is
refused, and one on which a daemon starts meanwhile is not reported on.

SQLite reads a write-ahead log only with files of its own beside it. So a directory whose daemon was
killed is read from a private copy; one that was closed well, and a backup, are read where they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meterd.errors import NotFound, Refused, StoreCorrupt, StoreLocked

DATABASE = "meterd.db"
LOCK = "meterd.lock"
APPLICATION_ID = 0x6D747264
VERSIONS = range(1, 3)  # The forms of the tables that this auditor can read.


@dataclass(frozen=True, slots=True)
class Store:
    """An open store. `is_copy`: a backup, not the directory that a daemon runs on."""

    connection: sqlite3.Connection
    is_copy: bool


@contextlib.contextmanager
def opened(place: Path) -> Iterator[Store]:
    """Open a state directory or a backup file for reading. Raises as `audit` says."""
    file, directory = _found(place)
    if directory is not None:
        _refuse_daemon(directory)
    before = _traces(file)
    with contextlib.ExitStack() as stack:
        try:
            connection = stack.enter_context(contextlib.closing(_connected(file, stack)))
            _recognise(connection, file)
            yield Store(connection, directory is None)
        except sqlite3.Error as error:
            _refuse_change(file, before, directory)
            raise StoreCorrupt(
                f"{file} cannot be read ({error}): keep it for a look, restore a backup"
            ) from error
        _refuse_change(file, before, directory)


def _found(place: Path) -> tuple[Path, Path | None]:
    """The database, and its directory where that is one that a daemon runs on."""
    file = place / DATABASE if place.is_dir() else place
    if not file.is_file():
        raise NotFound(f"there is no {file}; name a state directory or a file of meterd backup")
    own = place.is_dir() or (file.parent / LOCK).exists()
    return file, file.parent if own else None


def _refuse_daemon(directory: Path) -> None:
    """Look whether somebody holds the directory's lock; it is not kept, so that one may start."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # No daemon has run here yet.
    except OSError as error:
        raise Refused(f"{directory} cannot be read ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreLocked(
            f"{directory} is in use by {_holder(os.pread(descriptor, 4096, 0))}: stop that daemon"
            " first; or take a copy, meterd backup FILE, and look at it: meterd verify --backup"
            " FILE"
        ) from None
    finally:
        os.close(descriptor)


def _holder(text: bytes) -> str:
    try:
        said = json.loads(text)
        return f"process {int(said['pid'])} on {said['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _connected(file: Path, stack: contextlib.ExitStack) -> sqlite3.Connection:
    """Connect to the file itself where it is whole, else to a copy of it and its log."""
    log = file.with_name(file.name + "-wal")
    try:
        if not (log.exists() and log.stat().st_size):
            return _connect(file, "mode=ro&immutable=1")
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="meterd-verify-"))
        copy = Path(folder, DATABASE)
        shutil.copyfile(file, copy)
        shutil.copyfile(log, copy.with_name(DATABASE + "-wal"))
    except OSError as error:
        raise Refused(
            f"{file} cannot be read or copied ({error.strerror}); TMPDIR says where copies go"
        ) from None
    return _connect(copy, "mode=rw")


def _connect(file: Path, options: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{file.resolve().as_uri()}?{options}", uri=True)
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _recognise(connection: sqlite3.Connection, file: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise StoreCorrupt(f"{file} is no store of meterd")
    if version not in VERSIONS:
        raise StoreCorrupt(f"{file} was written by another meterd (version {version}): use that")


_Traces = list[tuple[int, int, int] | None]


def _traces(file: Path) -> _Traces:
    """What changes when somebody writes to the store."""
    found: _Traces = []
    for name in (file.name, f"{file.name}-wal"):
        try:
            stat = file.with_name(name).stat()
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except FileNotFoundError:
            found.append(None)
    return found


def _refuse_change(file: Path, before: _Traces, directory: Path | None) -> None:
    """What was read while somebody wrote says nothing."""
    if directory is not None:
        _refuse_daemon(directory)
    if _traces(file) != before:
        raise StoreLocked(f"{file} changed while it was read: try again when nothing writes to it")
