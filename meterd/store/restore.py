"""Putting a copy in the place of a store: whole or not at all, and what was there is kept.

The rule kept here: at every instant the directory holds the store that was there, the copy, or what
`SqliteStore.open` refuses to open. A restore that was cut off is typed again.

Theory of operation. SQLite reads whatever lies beside a database as `-wal` into it, and whose log
that is cannot be told from the log. So the copy is made ready in a directory of its own, as one
file whose header says that no log belongs to it. Then it takes the database's name by one rename,
and only when that is on the disk the old log goes. Between the two the daemon finds a log beside a
database that can have none, and refuses (`foreign_log`). The other order, log first, would leave a
store that has forgotten its last commits and does not know it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from meterd.core.changes import Change, JournalEntry
from meterd.errors import MeterdError, NotFound, Refused
from meterd.store.lock import LOCK_NAME, DirectoryLock
from meterd.store.schema import APPLICATION_ID
from meterd.store.sqlite import DATABASE_NAME, SqliteStore, foreign_log, sync_directory

WORK_NAME = "meterd.restoring"
BESIDE = ("-wal", "-journal")  # What SQLite would read into a database; `-shm` it makes anew.
ACTOR = "command line"


@dataclass(frozen=True, slots=True)
class Restored:
    """The database that is in place now, and the file that keeps what was there before."""

    database: Path
    kept: Path | None


def restore(file: Path, data_dir: Path, *, entries_max: int) -> Restored:
    """Put a copy of a store in the place of the one in a directory, while no daemon runs on it.

    Raises `NotFound`; `StoreLocked`, which names who holds a directory; `Refused` where the file is
    no whole store, or something cannot be written: then nothing was replaced.
    """
    file = file.absolute()
    if not file.is_file():
        raise NotFound(f"there is no file {file}; name one that meterd backup made")
    try:
        with contextlib.ExitStack() as stack:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _locked(data_dir, stack)
            work = data_dir / WORK_NAME
            shutil.rmtree(work, ignore_errors=True)  # Of one that was cut off.
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            work.mkdir(mode=0o700)
            _copy(file, data_dir, work / DATABASE_NAME)
            at = datetime.now(UTC)
            kept = f"{DATABASE_NAME}.replaced-{at:%Y%m%dT%H%M%S.%fZ}"
            there = (data_dir / DATABASE_NAME).exists()
            detail = f"the store before it is kept as {kept}" if there else "there was no store"
            wall_ms = int(at.timestamp() * 1000)
            entry = JournalEntry(wall_ms, ACTOR, "store_restored", str(file), detail)
            _make_ready(work, entry, entries_max, file)
            return Restored(*_swapped(work / DATABASE_NAME, data_dir, kept if there else ""))
    except OSError as error:
        raise Refused(f"{file} cannot be put into {data_dir}: {error}") from error


def _locked(directory: Path, stack: contextlib.ExitStack) -> None:
    """Hold a directory's lock; its file belongs to whom the directory does, or no daemon starts."""
    stack.callback(DirectoryLock.take(directory).release)
    _give(directory / LOCK_NAME, directory)


def _give(file: Path, directory: Path) -> None:
    """Root restores for the user that the daemon runs as."""
    owner = directory.stat()
    if os.geteuid() == 0:
        os.chown(file, owner.st_uid, owner.st_gid)


def _copy(file: Path, data_dir: Path, target: Path) -> None:
    """Copy a store and what belongs to it, while nobody writes to it."""
    if (data_dir / DATABASE_NAME).exists() and file.samefile(data_dir / DATABASE_NAME):
        raise Refused(f"{file} is what would be replaced; name a copy of it")
    if foreign_log(file):
        raise Refused(
            f"{file}-wal lies beside {file} and belongs to another file: move it away, then try"
            " again"
        )
    with contextlib.ExitStack() as stack:
        if (file.parent / LOCK_NAME).exists() and not file.parent.samefile(data_dir):
            _locked(file.parent, stack)
        for suffix in ("", *BESIDE):
            source = file.with_name(file.name + suffix)
            if source.exists():
                part = target.with_name(target.name + suffix)
                part.touch(0o600)  # For its owner alone, whoever may read the copy.
                shutil.copyfile(source, part)


def _make_ready(work: Path, entry: JournalEntry, entries_max: int, file: Path) -> None:
    """Open the copy as a daemon would, write down the restore, and leave one file on the disk."""
    database = work / DATABASE_NAME
    try:
        # Of an empty file the store would make a new one.
        if _answer(database, "PRAGMA application_id") != APPLICATION_ID:
            raise Refused(f"{database} is no store of meterd")
        asyncio.run(_journalled(work, entry, entries_max))
        if (found := _answer(database, "PRAGMA integrity_check(1)")) != "ok":
            raise Refused(f"{database} is damaged: {found}")
        if _answer(database, "PRAGMA journal_mode = DELETE") != "delete":
            raise Refused(f"{database} does not let go of its log")
    except (MeterdError, sqlite3.Error) as error:
        said = str(error).replace(str(database), str(file)).replace(str(work), str(file))
        raise Refused(f"{file} cannot be put back, and nothing was replaced: {said}") from error
    with database.open("rb") as ready:
        os.fsync(ready.fileno())


def _answer(database: Path, question: str) -> int | str:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        (answer,) = connection.execute(question).fetchone()
    assert isinstance(answer, int | str)
    return answer


async def _journalled(work: Path, entry: JournalEntry, entries_max: int) -> None:
    store = SqliteStore.open(work, entries_max=entries_max)
    try:
        store.load()
        await store.commit(Change(journal=(entry,)))
    finally:
        await store.close()


def _swapped(ready: Path, data_dir: Path, kept: str) -> tuple[Path, Path | None]:
    """Give the copy the database's name, then take the old log away; both stay under new names."""
    database = data_dir / DATABASE_NAME
    if kept:
        for suffix in ("", *BESIDE):
            old = data_dir / f"{DATABASE_NAME}{suffix}"
            if old.exists():
                os.link(old, data_dir / f"{kept}{suffix}")
    _give(ready, data_dir)
    # A half-made first transaction, which nobody was told of; SQLite would roll it back into the
    # copy.
    (data_dir / f"{DATABASE_NAME}-journal").unlink(missing_ok=True)
    ready.replace(database)
    sync_directory(data_dir)
    for suffix in ("-wal", "-shm"):
        (data_dir / f"{DATABASE_NAME}{suffix}").unlink(missing_ok=True)
    sync_directory(data_dir)
    return database, data_dir / kept if kept else None
