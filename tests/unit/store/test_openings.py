from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace

import pytest

from meterd.core.changes import Change
from meterd.core.openings import Opening, OpeningStatus
from meterd.errors import StoreFailed
from meterd.store.sqlite import SqliteStore
from tests.unit.store.test_sqlite import BASE, NOW, tamper

OPENING = Opening(
    id="open_1",
    agreement="job-1",
    plan="stream",
    payer="ann",
    role="main",
    amount=10_000_000,
    provider="me",
    hours=24,
    memo="stream agreement=job-1 open_1",
    why="asked",
    status=OpeningStatus.INTENDED,
    created_at=NOW,
    changed_at=NOW,
)
LOCKED = replace(OPENING, status=OpeningStatus.LOCKED, escrow="esc_9", detail="answered")


@contextlib.asynccontextmanager
async def running(path):
    store = SqliteStore.open(path, entries_max=1000)
    try:
        yield store
    finally:
        await store.close()


async def loaded(path, *changes):
    """Commit changes, and load what a restarted daemon finds."""
    async with running(path) as store:
        for change in changes:
            await store.commit(change)
    async with running(path) as store:
        return store.load(now_ms=NOW)


async def refused(path, *rows):
    """Commit rows one after the other; why the last one is refused."""
    store = SqliteStore.open(path, entries_max=1000)
    for row in rows[:-1]:
        await store.commit(Change(openings=(row,)))
    with pytest.raises(StoreFailed) as caught:
        await store.commit(Change(openings=rows[-1:]))
    await store.close()
    return str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        OPENING,
        replace(OPENING, status=OpeningStatus.IN_DOUBT, detail="no answer", hours=None),
        replace(OPENING, status=OpeningStatus.ABSENT, changed_at=NOW + 1),
        LOCKED,
    ],
)
async def test_an_opening_whose_escrow_is_not_bound_comes_back_as_it_was(tmp_path, row):
    """Whatever could still be bound is found after a restart."""
    state = await loaded(tmp_path, Change(openings=(OPENING,)), Change(openings=(row,)))

    assert [row] == state.openings
    assert (frozenset({"job-1"}) if row is LOCKED else frozenset()) == state.opened


async def test_an_opening_that_is_done_stays_on_the_disk_and_is_not_loaded(tmp_path):
    """What failed asks for nothing; what is bound says that meterd has opened the agreement."""
    failed = replace(OPENING, id="open_2", memo="m2", status=OpeningStatus.FAILED)
    bound = replace(LOCKED, agreement="a", escrow="esc_a")
    state = await loaded(tmp_path, replace(BASE, openings=(failed, bound)))
    with contextlib.closing(sqlite3.connect(tmp_path / "meterd.db")) as store:
        (rows,) = store.execute("SELECT count(*) FROM opening").fetchone()

    assert ([], {"a"}, 2) == (state.openings, state.opened, rows)


async def test_a_second_unfinished_opening_of_a_role_is_refused(tmp_path):
    """While one may have locked an escrow the database takes no second."""
    again = replace(OPENING, id="open_2", memo="m2")
    doubt = replace(OPENING, status=OpeningStatus.IN_DOUBT)

    assert "opening" in await refused(tmp_path / "a", OPENING, again)
    assert "opening" in await refused(tmp_path / "b", OPENING, doubt, again)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"amount": 1}, "never changes what was asked for"),
        ({"memo": "other"}, "never changes what was asked for"),
        ({"provider": "you"}, "never changes what was asked for"),
        ({"escrow": "esc_9"}, "CHECK"),
        ({"status": OpeningStatus.LOCKED}, "CHECK"),
    ],
)
async def test_an_opening_is_what_was_asked_for(tmp_path, changes, why):
    """Its escrow is named when it is locked, and only then; the rest never changes."""
    assert why in await refused(tmp_path, OPENING, replace(OPENING, **changes))


async def test_an_opening_of_nothing_is_refused_and_none_is_ever_deleted(tmp_path):
    """An amount of zero is nobody's wish; and what locked money stays written down."""
    await loaded(tmp_path / "a", Change(openings=(OPENING,)))

    assert "amount > 0" in await refused(tmp_path / "b", replace(OPENING, amount=0))
    with pytest.raises(sqlite3.IntegrityError):
        tamper(tmp_path / "a", "DELETE FROM opening")
