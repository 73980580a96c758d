from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from meterd.core.changes import Change, JournalEntry
from meterd.errors import NotFound, Refused, StoreCorrupt, StoreLocked
from meterd.store import restore as room
from meterd.store.lock import DirectoryLock
from meterd.store.restore import restore
from meterd.store.sqlite import SqliteStore


def opened(directory: Path) -> SqliteStore:
    return SqliteStore.open(directory, entries_max=1000)


def position(number: int) -> Change:
    """A change that overwrites the one before, and journals its number."""
    entry = JournalEntry(number, "ops", "bound", "a", str(number))
    return Change(positions=(("s", str(number)),), journal=(entry,))


@pytest.fixture
async def copy(tmp_path: Path) -> Path:
    """A copy that was made after the first of three commits; then the daemon was killed."""
    store = opened(tmp_path / "live")
    await store.commit(position(1))
    await store.backup(tmp_path / "copy.db")
    await store.commit(position(2))
    await store.commit(position(3))
    shutil.copytree(tmp_path / "live", tmp_path / "data")
    await store.close()

    assert (tmp_path / "data" / "meterd.db-wal").stat().st_size > 0
    return tmp_path / "copy.db"


async def content(directory: Path) -> tuple[str, list[str]]:
    """The position, and the actions of the journal, oldest first."""
    store = opened(directory)
    try:
        state = store.load()
        entries = await store.journal()
        return state.positions["s"], [each.entry.action for each in entries][::-1]
    finally:
        await store.close()


async def put_back(file: Path, directory: Path) -> room.Restored:
    return await asyncio.to_thread(restore, file, directory, entries_max=1000)


async def test_copy_takes_the_place_of_a_store_whose_daemon_was_killed(tmp_path, copy):
    """The log of the old store does not undo it, and the act is the last in the journal."""
    data = tmp_path / "data"
    done = await put_back(copy, data)

    assert ("1", ["bound", "store_restored"]) == await content(data)
    assert data / "meterd.db" == done.database
    assert done.database.stat().st_mode & 0o777 == 0o600
    assert not (data / "meterd.restoring").exists()


async def test_restore_is_undone_with_the_file_that_it_kept(tmp_path, copy):
    """What was there is kept together with its log: no commit of it is lost."""
    data = tmp_path / "data"
    done = await put_back(copy, data)
    store = opened(data)
    await store.commit(position(9))
    await store.close()
    again = await put_back(done.kept, data)

    assert ("3", ["bound", "bound", "bound", "store_restored"]) == await content(data)
    assert again.kept not in {None, done.kept}


async def test_copy_is_put_where_no_store_was(tmp_path, copy):
    """A new machine: there is nothing to keep."""
    done = await put_back(copy, tmp_path / "new" / "place")

    assert done.kept is None
    assert ("1", ["bound", "store_restored"]) == await content(tmp_path / "new" / "place")


def spoilt(tmp_path: Path, how: str, copy: Path) -> Path:
    """A file that must not be put in place of a store."""
    file = tmp_path / f"{how}.db"
    match how:
        case "no database":
            file.write_text("hello, this is no database " * 100)
        case "empty":
            file.touch()
        case "damaged":
            data = bytearray(copy.read_bytes())
            data[4096:] = os.urandom(len(data) - 4096)
            file.write_bytes(data)
        case "with another's log":
            shutil.copyfile(copy, file)
            shutil.copyfile(tmp_path / "data" / "meterd.db-wal", tmp_path / f"{how}.db-wal")
        case "the store itself":
            return tmp_path / "data" / "meterd.db"
    return file


@pytest.mark.parametrize(
    "how", ["no database", "empty", "damaged", "with another's log", "the store itself", "missing"]
)
async def test_file_that_is_no_whole_copy_is_refused_and_nothing_is_replaced(tmp_path, copy, how):
    """The store that was there goes on as if nothing had been typed."""
    file, data = spoilt(tmp_path, how, copy), tmp_path / "data"
    with pytest.raises(NotFound if how == "missing" else Refused, match=str(file)):
        await put_back(file, data)

    assert ("3", ["bound"] * 3) == await content(data)
    assert not list(data.glob("*replaced*"))


@pytest.mark.parametrize("used", ["live", "data"])
async def test_restore_is_refused_while_somebody_has_the_store_or_the_copy(tmp_path, copy, used):
    """Neither is a store replaced under its daemon, nor a file copied that somebody writes to."""
    lock = DirectoryLock.take(tmp_path / used)
    try:
        with pytest.raises(StoreLocked, match=f"process {os.getpid()}"):
            await put_back(tmp_path / "live" / "meterd.db", tmp_path / "data")
    finally:
        lock.release()

    assert ("3", ["bound"] * 3) == await content(tmp_path / "data")


class PowerCut(BaseException):
    """The command ends here, as by SIGKILL."""


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Cut the swap off before its n-th act on the directory; how many acts there were."""
    done = 0

    def guard(real):
        def act(*arguments, **named):
            nonlocal done
            done += 1
            if done == step:
                raise PowerCut
            return real(*arguments, **named)

        return act

    swapped = room._swapped

    def swap(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(room.os, "link", guard(os.link))
            patch.setattr(Path, "replace", guard(Path.replace))
            patch.setattr(Path, "unlink", guard(Path.unlink))
            patch.setattr(room, "sync_directory", guard(room.sync_directory))
            return swapped(*arguments)

    monkeypatch.setattr(room, "_swapped", swap)
    return lambda: done


@pytest.mark.parametrize("step", range(1, 9))
async def test_restore_that_is_cut_off_leaves_the_old_store_or_the_copy_or_a_refusal(
    tmp_path, copy, monkeypatch, step
):
    """Whatever it leaves loses nothing silently, and the same command typed again ends it."""
    data = tmp_path / "data"
    with monkeypatch.context() as patch:
        acts = cut_at(patch, step)
        with pytest.raises(PowerCut):
            await put_back(copy, data)
        assert acts() == step
    shutil.copytree(data, tmp_path / "look")
    try:
        found = await content(tmp_path / "look")
    except StoreCorrupt as error:
        found = "refused" if "Type: meterd restore FILE" in str(error) else str(error)

    assert found in [("3", ["bound"] * 3), ("1", ["bound", "store_restored"]), "refused"]
    assert (found == "refused") == (step in {5, 6})  # The name is the copy's, the log is not.

    await put_back(copy, data)

    assert ("1", ["bound", "store_restored"]) == await content(data)


async def test_swap_has_no_more_acts_than_are_cut_above(tmp_path, copy, monkeypatch):
    """An act that is added to the swap must be cut, too."""
    acts = cut_at(monkeypatch, 0)
    await put_back(copy, tmp_path / "data")

    assert acts() == 8


@pytest.mark.parametrize("database", ["a copy", "one that was stopped", "empty", "gone"])
async def test_store_is_refused_when_the_log_beside_it_is_another_ones(tmp_path, copy, database):
    """A copy that was put back by hand beside an old log; SQLite alone would mix the two."""
    file = tmp_path / "data" / "meterd.db"
    if database == "a copy":
        shutil.copyfile(copy, file)
    elif database == "one that was stopped":  # As by unpacking a copy of the whole directory.
        shutil.copyfile(tmp_path / "live" / "meterd.db", file)
    else:
        os.truncate(file, 0)
        if database == "gone":
            file.unlink()
    before = (tmp_path / "data" / "meterd.db-wal").read_bytes()
    with pytest.raises(StoreCorrupt, match="Type: meterd restore FILE"):
        opened(tmp_path / "data")

    assert before == (tmp_path / "data" / "meterd.db-wal").read_bytes()


async def test_copy_without_a_log_beside_it_is_opened_as_before(tmp_path, copy):
    """Put back by hand and with care it needs no command."""
    shutil.copyfile(copy, tmp_path / "data" / "meterd.db")
    (tmp_path / "data" / "meterd.db-wal").unlink()

    assert ("1", ["bound"]) == await content(tmp_path / "data")
