"""The store in a process of its own that is killed, or whose disk fails for real."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meterd.core.changes import State
from meterd.errors import StoreLocked
from meterd.store.identities import digest
from meterd.store.sqlite import SqliteStore

ROOT = Path(__file__).parents[2]
KILLS = 15

# Commits changes 1, 2, 3, ..., several under way at a time, and prints the number of each one when
# it is durable. Change n holds counter = n, position = n, a journal entry and event n.
WRITER = """
import asyncio, os, resource, sys
from fractions import Fraction
from pathlib import Path
from meterd.core.changes import *
from meterd.errors import MeterdError
from meterd.store.identities import digest
from meterd.store.sqlite import SqliteStore

def tell(text):
    os.write(1, f"{text}\\n".encode())

async def main(path, limit, last):
    store = SqliteStore.open(Path(path), entries_max=100_000)
    store.on_writable = lambda writable: tell(f"writable {writable}")
    number = int(store.load().positions.get("s", 0))
    tell(f"open {number}")
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    row = AgreementRow("a", "p", "payer", "api", (), False, 0, Fraction(0), 0, 0, 0)
    await store.commit(Change(cards=(CardRow("c", "{}"),), agreements=(row,)))
    room = asyncio.Semaphore(8)

    def durable(future, number):
        room.release()
        if future.exception() is None:
            tell(number)

    while number < last and not store.failed.is_set():
        await room.acquire()
        number += 1
        marks = store.identities.add(digest("s", str(number)), [number], [number // 500])
        future = store.commit(Change(
            counters=(CounterRow("a", "c", "m", (), number, number, number=1),),
            positions=(("s", str(number)),),
            marks=marks,
            journal=(JournalEntry(number, "a", "b", "c", "d"),),
        ))
        future.add_done_callback(lambda future, number=number: durable(future, number))
    await store.close()
    if store.failure is not None:
        raise store.failure
    tell("closed")

try:
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
except MeterdError as error:
    tell(f"error {type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


@contextlib.contextmanager
def writer(path: Path, *, limit: int = 0, last: int = 10**9, under: tuple[str, ...] = ()):
    command = [*under, sys.executable, "-c", WRITER, str(path), str(limit), str(last)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def strace(injection: str) -> tuple[str, ...]:
    """Run under strace, which makes chosen system calls fail."""
    program = shutil.which("strace")
    if program is None:
        raise FileNotFoundError("strace is not installed; these tests need it")
    call = injection.partition(":")[0]
    quiet = "-f", "-qq", "-o", "/dev/null"
    return program, *quiet, "-e", f"trace={call}", "-e", f"inject={injection}"


def numbers(lines: list[str]) -> list[int]:
    return [int(line) for line in lines if line.strip().isdigit()]


async def found(path: Path) -> tuple[State, list[int], int]:
    """What the store holds: its state, the events it knows, and how long its journal is."""
    store = SqliteStore.open(path, entries_max=100_000)
    try:
        state = store.load()
        last = int(state.positions.get("s", 0))
        asked = b"".join(digest("s", str(number)) for number in range(1, last + 2))
        newest = await store.journal(limit=1)
        return state, store.identities.find(asked), newest[0].number if newest else 0
    finally:
        await store.close()


def assert_whole(path: Path, told: int) -> int:
    """Everything told is there, every change is whole, and nothing is there beyond the last one."""
    state, known, entries = asyncio.run(found(path))
    last = int(state.positions.get("s", 0))

    assert told <= last
    assert [last] * min(last, 1) == [row.quantity for row in state.counters]
    assert [*range(1, last + 1), -1] == known
    assert last == entries
    return last


def test_store_holds_everything_it_called_durable_when_killed(tmp_path):
    """Killed with -9 again and again in mid-commit, no durable change is lost or halved."""
    chance = random.Random(20)
    told = 0
    for _ in range(KILLS):
        with writer(tmp_path) as process:
            lines = [process.stdout.readline() for _ in range(chance.randrange(1, 400))]
            process.kill()
            lines += process.stdout.readlines()

        assert lines[0] == f"open {told}\n"

        seen = numbers(lines)

        assert seen == list(range(told + 1, told + 1 + len(seen)))

        told = assert_whole(tmp_path, max(seen, default=told))

    assert told > KILLS


def test_lock_dies_with_its_process(tmp_path):
    """A second process is refused with the first one's id while that lives, and not afterwards."""
    with writer(tmp_path) as first:
        first.stdout.readline()
        with writer(tmp_path) as second:
            refusal = second.stdout.read()

            assert (2, True) == (second.wait(), f"process {first.pid} on" in refusal)
        with pytest.raises(StoreLocked, match=str(first.pid)):
            SqliteStore.open(tmp_path, entries_max=10)
        first.kill()
        first.wait()
        with writer(tmp_path, last=0) as third:
            assert "closed" in third.stdout.read()


def test_failed_fsync_ends_the_process_and_nothing_told_is_lost(tmp_path):
    """One EIO from fdatasync: exit 70, and no further change is called durable."""
    with writer(tmp_path, under=strace("fdatasync:error=EIO:when=40")) as process:
        lines = process.stdout.readlines()
        code = process.wait()
    told = numbers(lines)

    assert 70 == code
    assert "IOERR" in lines[-1]
    assert told == list(range(1, len(told) + 1))
    assert_whole(tmp_path, len(told))


def test_write_beyond_the_limit_of_file_size_ends_the_process(tmp_path):
    """A write beyond RLIMIT_FSIZE is an I/O error: exit 70, and nothing told is lost."""
    with writer(tmp_path, limit=3_000_000) as process:
        lines = process.stdout.readlines()
        code = process.wait()

    assert 70 == code
    assert "IOERR" in lines[-1]
    assert_whole(tmp_path, max(numbers(lines)))


def test_store_waits_for_room_and_goes_on_when_the_disk_was_full(tmp_path):
    """ENOSPC from real writes: not writable, then writable, and every change is there."""
    injection = "pwrite64:error=ENOSPC:when=250..255"
    with writer(tmp_path, last=300, under=strace(injection)) as process:
        lines = process.stdout.readlines()
        code = process.wait()
    news = [line.strip() for line in lines if line.startswith("writable")]

    assert (0, "closed\n") == (code, lines[-1])
    assert ["writable False", "writable True"] == news
    assert list(range(1, 301)) == numbers(lines)
    assert 300 == assert_whole(tmp_path, 300)
