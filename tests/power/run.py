"""Lives of the unchanged store on a machine in memory, in an order that a seed decides.

The rule kept here: a change counts as told at the very moment at which the store's writer hands its
future to the event loop, the earliest at which anybody could rely on it. The writer is a real
thread, but the next batch is put in only when it waits, so one seed gives one sequence of calls
(but for the random salts of SQLite's log).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

from xxhash import xxh3_64_intdigest

from meterd.store import sqlite
from meterd.store.sqlite import SqliteStore
from tests.power.disk import Call, Disk, Files
from tests.power.life import ENTRIES_MAX, change, check, last_change
from tests.power.memory import Machine, Rig

CHANGES = 24  # In the two lives of one record.
BATCHES = (1, 1, 2, 5, 9)
WAL_SIZES = (0, 30_000, 100_000)  # At which it is checkpointed: always, often, seldom.


class Wake(threading.Condition):
    """The writer's bell, which tells when the writer waits."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = threading.Event()
        self.on_retry: Callable[[], None] = lambda: None

    def wait(self, timeout: float | None = None) -> bool:
        """With a time-out: without room, until the next try."""
        if timeout is None:
            self.idle.set()
        elif timeout > 0:
            self.on_retry()
            timeout = 0.001
        return super().wait(timeout)


def open_store(rig: Rig) -> SqliteStore:
    """Open the store that lies on the machine, and have the record say what it tells."""
    machine = rig.machine
    store = SqliteStore.open(rig.place, entries_max=ENTRIES_MAX)
    store._wake = Wake()
    on_loop = store._on_loop

    def recorded(call: Callable[..., None], *arguments: object) -> None:
        if call == store._resolve:
            last = arguments[0][-1].change.positions[0][1]
            machine.calls.append(Call("told", data=last.encode()))
        on_loop(call, *arguments)

    store._on_loop = recorded
    return store


async def commit(store: SqliteStore, numbers: Sequence[int]) -> None:
    """Commit changes in one batch, and wait until the writer is idle. Raises what ended it."""
    with store._wake:
        store._wake.idle.clear()
        futures = [store.commit(change(store, number)) for number in numbers]
    await asyncio.gather(*futures)
    while not store._wake.idle.wait(0.01) and store._thread.is_alive():
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # What the writer told last is taken in.
    if store.failure is not None:
        raise store.failure


async def live(rig: Rig, rng: random.Random, upto: int, *, closes: bool) -> None:
    """Open, commit, and close or be killed; the next life finds what this one has left."""
    store = open_store(rig)
    n = last_change(store)
    while n < upto:
        numbers = range(n + 1, 1 + min(upto, n + rng.choice(BATCHES)))
        await commit(store, numbers)
        n = numbers[-1]
    after = rig.machine if closes else rig.machine.killed()
    await store.close()
    rig.machine = after


@dataclass(frozen=True, slots=True)
class Recorded:
    """What lay on the disk and was told before, and the calls since."""

    image: Files | None
    told: int
    calls: list[Call]

    def disk(self) -> Disk:
        return Disk(self.image, self.told)


def record(rig: Rig, rng: random.Random, image: Files | None, told: int) -> Recorded:
    """Two lives, one behind the other, without a power cut in between."""
    left = image and {name: bytearray(data) for name, data in image.items()}
    rig.machine = Machine(left)
    calls: list[Call] = []
    for upto in (told + CHANGES // 2, told + CHANGES):
        machine = rig.machine
        with mock.patch.object(sqlite, "WAL_BYTES_MAX", rng.choice(WAL_SIZES)):
            asyncio.run(live(rig, rng, upto, closes=rng.random() < 0.5))
        calls += machine.calls
        machine.calls = []  # One that was closed goes on.
    return Recorded(image, told, calls)


def records(rig: Rig, seed: int) -> Iterator[Recorded]:
    """Lives of one store, for ever: each record begins on what a power cut of the last one left."""
    rng = random.Random(seed)
    image, told = None, 0
    while True:
        recorded = record(rig, rng, image, told)
        yield recorded
        disk = recorded.disk()
        for call in recorded.calls[: rng.randrange(len(recorded.calls))]:
            disk.run(call)
        image, told = disk.cut(rng), disk.told


@dataclass(slots=True)
class Tally:
    """How many cuts were made, and what came of them."""

    cuts: int = 0
    lost: int = 0
    kinds: set[str] = field(default_factory=set)
    images: set[int] = field(default_factory=set)  # Hashes of the disks that the cuts left.

    def __str__(self) -> str:
        return f"{self.cuts} cuts, {len(self.images)} different disks, {self.lost} with a loss"

    def cut(self, rig: Rig, rng: random.Random, recorded: Recorded, cuts: int) -> None:
        """Cut at so many random moments of a record, and look at what each has left."""
        moments = sorted(rng.randrange(len(recorded.calls) + 1) for _ in range(cuts))
        disk, done = recorded.disk(), 0
        for moment in moments:
            for call in recorded.calls[done:moment]:
                disk.run(call)
                self.kinds.add(call.kind)
            done = moment
            files = disk.cut(rng)
            self.cuts += 1
            self.images.add(hash(tuple((n, xxh3_64_intdigest(d)) for n, d in files.items())))
            where = f"cut behind call {moment}/{len(recorded.calls)}"
            self.lost += not sound(rig, files, disk.told, where)


def sound(rig: Rig, files: Files, told: int, where: str) -> bool:
    """Whether the store opens on these files and has all that was told; prints why not."""
    rig.machine = Machine(files)
    try:
        with looking(rig) as store:
            check(store, told)
    except Exception:  # noqa: BLE001  # However it fails.
        print(f"{where}, told {told}: {traceback.format_exc(limit=-1)}")
        return False
    return True


@contextlib.contextmanager
def looking(rig: Rig) -> Iterator[SqliteStore]:
    """Open the store for a look."""
    store = SqliteStore.open(rig.place, entries_max=ENTRIES_MAX)
    try:
        yield store
    finally:
        store._connection.drop()
        store._lock.release()
