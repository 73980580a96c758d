"""The power is cut anywhere in the life of the store, and nothing that was told is lost.

Two rigs look at this, and each sees what the other does not.

*This one* runs the unchanged store in this process on a machine in memory: SQLite through a VFS of
apsw, the store's own calls (directory, lock, reserve, fsyncs of names) through stand-ins. A cut
costs about two milliseconds, so there are tens of thousands in CI and a million in `make soak`;
stores live on after a cut and are cut again; and a fault can be put at any call, reads among them,
exactly (test_failing_calls.py). It does not see what SQLite's own layer for unix does with the
system (which calls it makes of a write, whether it fsyncs the directory: the machine only imitates
that), and it runs the SQLite that apsw brings, not the one that meterd runs on.

*The recorded system calls* (tests/integration/test_power_loss.py) are those of a real process with
the SQLite that Python brings, on a real file system, down to the last fsync. That rig sees what is
really asked of the kernel. It is slower, needs strace, and fails only calls that change something.

Both rest on the same model of what a cut leaves (tests/power/disk.py) and on the same changes and
the same look at what is left (tests/power/life.py): all that was told is there, each change is
whole, `PRAGMA integrity_check` is content, the journal's chain holds, and the ledger restores.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from unittest import mock

import pytest

from meterd.errors import MeterdError
from meterd.store import schema, sqlite
from meterd.store.sqlite import SqliteStore
from tests.power.memory import Machine, Rig
from tests.power.run import Tally, records

CUTS = 20_000
SOAK_CUTS = 1_000_000
CUTS_OF_A_RECORD = 250
CUTS_TO_FIND = 1_000
RECORDS_OF_A_STORE = 4


def cut_stores(rig: Rig, seed: int, cuts: int) -> Tally:
    """Cut the lives of store after store, until there were so many cuts."""
    tally = Tally()
    while tally.cuts < cuts:
        rng = random.Random(seed)
        for recorded, _ in zip(records(rig, seed), range(RECORDS_OF_A_STORE), strict=False):
            tally.cut(rig, rng, recorded, min(CUTS_OF_A_RECORD, cuts - tally.cuts))
        seed += 1
    print(tally)
    return tally


@pytest.mark.timeout(1800)  # Half a minute of one core, which a busy machine may not have for long.
def test_power_cut_anywhere_loses_nothing_that_was_told(rig, seed):
    """Twenty thousand cuts, of stores that are new and of stores that were cut before."""
    tally = cut_stores(rig, seed, CUTS)
    every = {"mkdir", "sync_parent", "create", "write", "truncate", "sync", "sync_names", "unlink"}

    assert 0 == tally.lost
    assert CUTS == tally.cuts
    assert every | {"told"} == tally.kinds


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_a_million_power_cuts_lose_nothing_that_was_told(rig, seed):
    """The same, a million times."""
    assert 0 == cut_stores(rig, seed, SOAK_CUTS).lost


# -- What the cuts would find ---------------------------------------------------------------------


def synchronous(name: str, value: int) -> contextlib.AbstractContextManager[object]:
    pragmas = [
        (pragma, name, value) if pragma == "synchronous" else (pragma, *rest)
        for pragma, *rest in sqlite._PRAGMAS
    ]
    return mock.patch.object(sqlite, "_PRAGMAS", pragmas)


def told_too_early() -> contextlib.AbstractContextManager[object]:
    write = SqliteStore._write

    def early(store, jobs):
        store._on_loop(store._resolve, jobs, 0.0, len(jobs))
        write(store, jobs)

    return mock.patch.object(SqliteStore, "_write", early)


def journal_apart() -> contextlib.AbstractContextManager[object]:
    write = schema.Rows._write_journal

    def apart(rows, connection, heads):
        connection.execute("COMMIT")
        connection.execute("BEGIN IMMEDIATE")
        write(rows, connection, heads)

    return mock.patch.object(schema.Rows, "_write_journal", apart)


WEAK: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "it does not fsync its commits": lambda: synchronous("NORMAL", 1),
    "it never fsyncs": lambda: synchronous("OFF", 0),
    "it tells before it commits": told_too_early,
    "it commits the journal apart": journal_apart,
    "it does not fsync names": lambda: mock.patch.object(sqlite, "sync_directory"),
    "the disk does not do its fsyncs": lambda: mock.patch.object(Machine, "sync"),
}


@pytest.mark.parametrize("weakness", WEAK)
def test_power_cuts_find_a_store_that_is_weak_because(rig, seed, weakness):
    """The cuts have teeth: each of these is found by a twentieth of them."""
    with WEAK[weakness]():
        try:
            lost = cut_stores(rig, seed, CUTS_TO_FIND).lost
        except MeterdError as error:  # It could not even go on after a cut.
            print(f"found in going on: {error!r}")
            lost = 1

    assert lost > 0
