"""Every call of a whole cycle fails, once or from then on: the store ends or waits, and never lies.

The cycle: found a store, bind, a batch, an intention, its outcome, each with a checkpoint behind
it, close, open again, close. Each of its calls is made to fail in turn, of SQLite (read, write,
fsync, truncate, delete, open, size, access) and of the store's own (directory, lock, reserve,
names); a write that fails has written half. Then the store is opened on the files as a restarted
process finds them, and on what a power cut would leave of them: after an fsync that failed these
are not the same.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest

from meterd.errors import StoreFailed
from meterd.store import sqlite
from tests.power.disk import Disk
from tests.power.life import last_change
from tests.power.memory import Machine, Rig
from tests.power.run import commit, open_store, sound

pytestmark = pytest.mark.timeout(1800)  # Seconds of one core, which a busy machine may not have.

BATCHES = ((1,), (2, 3, 4), (5,), (6,))  # Bind, usage, an intention, its outcome.
CUTS = 2  # After each failure.
ROOM = {"write", "create", "allocate", "mkdir"}  # The calls that a full disk refuses.
FOUNDING = {"mkdir", "sync_parent"}
KINDS = {*ROOM, "sync", "sync_names", "sync_parent", "truncate", "unlink"}
KINDS |= {"open", "read", "size", "access"}
# Calls whose failure the store may survive, because nothing that was told rests on them: the text
# that explains the lock, and the reserve, without which it says that there is no room.
HARMLESS = {
    ("truncate", "meterd.lock"),
    ("write", "meterd.lock"),
    ("allocate", "meterd.reserve"),
    ("truncate", "meterd.reserve"),
    ("sync", "meterd.reserve"),
    # SQLite's own fsync of the directory for a new log, which it does not look at. The store does
    # it again before it can tell anything.
    ("sync_names", "meterd.db-journal"),
    ("sync_names", "meterd.db-wal"),
}
# In closing, when all is in the database: SQLite tidies up and tells nobody what failed.
TIDYING = {
    ("unlink", "meterd.db-wal"),
    ("unlink", "meterd.db-journal"),
    ("sync", "meterd.db-journal"),
    ("size", "meterd.db-journal"),
}


@dataclass
class Failing:
    """The k-th call that it looks at fails, or all from the k-th on until there is room again."""

    k: int
    code: int
    lasting: bool
    kinds: set[str] | None = None  # None: every kind.
    seen: int = 0
    room: bool = False
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, kind: str, name: str) -> int:
        if self.room or not (self.kinds is None or kind in self.kinds):
            return 0
        self.seen += 1
        if self.seen == self.k or (self.lasting and self.seen > self.k):
            self.failed.append((kind, name))
            return self.code
        return 0

    def make_room(self) -> None:
        self.room = True


async def cycle(rig: Rig, on_retry: Callable[[], None], stages: list[str]) -> None:
    """One whole cycle, which says how far it came. Raises what ended it."""
    stages.append("opening")
    store = open_store(rig)
    store._wake.on_retry = on_retry
    try:
        first = last_change(store)
        stages.append("working")
        for batch in BATCHES:
            await commit(store, [first + number for number in batch])

            assert store.writable  # Again, if the disk was full.
        stages.append("closing")
    finally:
        await store.close()
    if store.failure is not None:
        raise store.failure
    stages.append("opening again")
    store = open_store(rig)
    try:
        assert first + BATCHES[-1][-1] == last_change(store)
        stages.append("closing again")
    finally:
        await store.close()
    if store.failure is not None:
        raise store.failure
    stages.append("whole")


@dataclass(frozen=True, slots=True)
class Ran:
    """How a cycle with a failure went."""

    failed: tuple[str, str]  # The first call that was made to fail.
    harmless: bool  # And every one behind it.
    stage: str  # How far it came.
    error: StoreFailed | None
    told_after: int  # Tellings after the first failure that is not harmless.
    sound: bool  # Of what was told all is there, for a process and after power cuts.
    again: str  # How far it came with room, in a second cycle where the first one failed.


def run(rig: Rig, machine: Machine, failing: Failing) -> tuple[str, StoreFailed | None, bool, int]:
    """Run a cycle: its last stage, its error, if all failures were harmless, tellings after one."""
    marks: list[int] = []

    def fault(kind: str, name: str) -> int:
        code = failing(kind, name)
        tidying = stages[-1].startswith("closing") and (kind, name) in TIDYING
        if code and not tidying and (kind, name) not in HARMLESS:
            marks.append(len(machine.calls))
        return code

    rig.machine, machine.fault = machine, fault
    stages: list[str] = []
    error = None
    try:
        asyncio.run(cycle(rig, failing.make_room, stages))
    except StoreFailed as caught:
        error = caught
    machine.fault = None
    after = machine.calls[marks[0] :] if marks else []
    return stages[-1], error, not marks, sum(call.kind == "told" for call in after)


def copied(machine: Machine) -> Machine:
    return Machine({name: bytearray(data) for name, data in machine.files.items()})


def starts(rig: Rig) -> Iterator[tuple[str, Callable[[], tuple[Machine, Disk]]]]:
    """Where a cycle begins: with nothing, or with what a killed process left."""
    yield "new", lambda: (Machine(), Disk())

    async def killed() -> Machine:
        store = open_store(rig)
        for n in range(1, 9):
            await commit(store, [n])
        left = rig.machine.killed()
        await store.close()
        return left

    rig.machine = Machine()
    left = asyncio.run(killed())
    yield "used", lambda: (copied(left), Disk(left.files, 8))


def every_k(
    rig: Rig, seed: int, code: int, kinds: set[str] | None, *, lasting: bool
) -> Iterator[Ran]:
    """Run the cycle for each k, and hold what is left against what was told."""
    rng = random.Random(seed)
    with mock.patch.object(sqlite, "WAL_BYTES_MAX", 0):  # A checkpoint behind each commit.
        for name, start in list(starts(rig))[lasting:]:  # What lasts is tried on a used store.
            for k in range(1, 10_000):
                machine, disk = start()
                failing = Failing(k, code, lasting, kinds)
                stage, error, harmless, told_after = run(rig, machine, failing)
                if not failing.failed:
                    break
                for call in machine.calls:
                    disk.run(call)
                where = f"{name}, k = {k}: {failing.failed[0]}, {stage}, {error!r}"
                left = [copied(machine).files, *(disk.cut(rng) for _ in range(CUTS))]
                sounds = [sound(rig, files, disk.told, where) for files in left]
                again = stage
                if error is not None and code == errno.ENOSPC:
                    again, *_ = run(rig, machine, Failing(0, 0, lasting=False))
                yield Ran(failing.failed[0], harmless, stage, error, told_after, all(sounds), again)


def every(rig: Rig, seed: int, code: int, kinds: set[str] | None, *, lasting: bool) -> list[Ran]:
    """All of them, after saying how many there were."""
    runs = list(every_k(rig, seed, code, kinds, lasting=lasting))
    counts = collections.Counter(ran.failed[0] for ran in runs)
    how = "from then on" if lasting else "once"
    print(f"{errno.errorcode[code]} {how}: {len(runs)} k, {CUTS * len(runs)} cuts; {dict(counts)}")
    return runs


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_io_error_of_any_call_ends_the_store_and_loses_nothing_that_was_told(rig, seed, lasting):
    """For each k: the store fails and tells no more, and a new start finds all that it told."""
    runs = every(rig, seed, errno.EIO, None, lasting=lasting)
    ends = [ran for ran in runs if not ran.harmless]

    assert {ran.failed[0] for ran in runs} >= KINDS - (FOUNDING if lasting else set())
    assert [] == [ran for ran in runs if not ran.sound]
    assert [] == [ran for ran in ends if ran.error is None or ran.told_after]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "until there is room"])
def test_full_disk_at_any_call_makes_the_store_wait_and_loses_nothing_that_was_told(
    rig, seed, lasting
):
    """For each k: a store at work waits, then goes on; a start or a close may fail, once."""
    runs = every(rig, seed, errno.ENOSPC, ROOM, lasting=lasting)
    at_work = [ran for ran in runs if ran.stage in ("working", "whole")]
    others = [ran for ran in runs if ran not in at_work]

    assert {ran.failed[0] for ran in runs} >= ROOM - (FOUNDING if lasting else set())
    assert [] == [ran for ran in runs if not ran.sound or ran.again != "whole"]
    assert [] == [ran for ran in at_work if (ran.stage, ran.error) != ("whole", None)]
    assert {"create", "mkdir", "write"} >= {ran.failed[0] for ran in others}


def test_failing_calls_find_a_store_that_goes_on_after_an_io_error(rig, seed):
    """The failures have teeth: who takes a failed fsync for a full disk tells on."""
    with mock.patch.object(sqlite, "_is_full", return_value=True):
        runs = every(rig, seed, errno.EIO, {"sync"}, lasting=False)

    assert [ran for ran in runs if not ran.harmless and ran.told_after]
