"""The power is cut anywhere in the store's own sequence of writes, and any of its calls fails.

A real process runs the real store on the real SQLite library while strace writes down each system
call that changes the data directory, with its bytes, and each "durable" that the process tells.
From that record come the disks that a power cut may leave: what was fsynced is there; of what was
not, any part, each write whole, absent, or torn and garbled at the borders of sectors; names that
the directory was not fsynced for come and go. On each of them the store is opened as after a start.

Why not through a VFS of apsw: apsw brings its own SQLite, of another version than the one that
meterd runs on, and a VFS sees neither the reserve, nor the lock, nor the fsyncs of the directory,
which the store makes itself. The record is of what a daemon really does.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from meterd.store.identities import digest
from meterd.store.sqlite import SqliteStore

pytestmark = pytest.mark.soak  # Not yet seen to pass again and again within the time of CI.

ROOT = Path(__file__).parents[2]
SECTOR = 512
CUTS = 4000
SOAK_CUTS = 1_000_000
CHANGES = 160
FAILING_CALLS = ("pwrite64", "fdatasync", "fsync", "ftruncate", "fallocate", "unlink")

# Change n holds counter = n, position = n, settled = n, a journal entry, event n, and an odd n the
# intention of a release that the next one confirms. `main` commits several at a time, in two lives.
COMMON = """
import asyncio, ctypes, os, random, sys, threading
from fractions import Fraction
from pathlib import Path
from meterd.core.changes import *
from meterd.core.settlement import Escrow, Release, ReleaseStatus
from meterd.errors import MeterdError
from meterd.store import sqlite
from meterd.store.identities import digest
from meterd.store.sqlite import SqliteStore

def tell(text):
    os.write(1, f"{text}\\n".encode())

def first():
    row = AgreementRow("a", "p", "payer", "api", (), False, 0, Fraction(0), 0, 0, 0)
    return Change(cards=(CardRow("c", "{}"),), agreements=(row,))

def change(store, n):
    marks = store.identities.add(digest("s", str(n)), [n], [n // 50])
    odd = n % 2
    status = ReleaseStatus.INTENDED if odd else ReleaseStatus.CONFIRMED
    release = Release(f"r{n - 1 + odd}", "e", 7, 0, status, "units", 0, 1, ())
    return Change(
        counters=(CounterRow("a", "c", "m", (), n, n, number=1),),
        positions=(("s", str(n)),),
        marks=marks,
        escrows=(Escrow("e", "a", "main", settled=n),),
        releases=(release,),
        journal=(JournalEntry(n, "a", "b", "c", "d" * (n % 700)),),
    )
"""
RECORDED = (
    COMMON
    + """
async def life(path, chance, upto):
    store = SqliteStore.open(path, entries_max=100_000)
    n = int(store.load().positions.get("s", 0))
    await store.commit(first())
    while n < upto:
        futures = []
        for _ in range(chance.choice((1, 1, 2, 5, 9))):
            if n < upto:
                n += 1
                futures.append((n, store.commit(change(store, n))))
        for number, future in futures:
            await future
            tell(number)
    await store.close()

path, seed, changes, weak = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
sqlite.WAL_BYTES_MAX = 100_000  # So that it is checkpointed some times.
if weak:
    sqlite._PRAGMAS = [
        (name, weak, {"NORMAL": 1, "OFF": 0}[weak]) if name == "synchronous" else (name, *rest)
        for name, *rest in sqlite._PRAGMAS
    ]
chance = random.Random(seed)
for upto in (changes // 2, changes):
    asyncio.run(life(path, chance, upto))
"""
)
# Imports once, then makes one child for each line "STAGE PATH": it tells the thread to look at,
# waits for "go", and runs one cycle: open (a new one when founding) and close, or commits, each
# with a checkpoint behind it.
NURSERY = (
    COMMON
    + """
def attachable():
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, any.

def go(thread):
    tell(f"ready {thread}")
    assert os.read(0, 3) == b"go\\n"

async def cycle(path):
    store = SqliteStore.open(path, entries_max=100_000)
    n = int(store.load().positions.get("s", 0))
    await store.commit(first())
    go(store._thread.native_id)
    sqlite.WAL_BYTES_MAX = 0  # Each commit is followed by a checkpoint.
    for _ in range(3):
        n += 1
        await store.commit(change(store, n))
        tell(n)
    await store.close()

async def opening(path):
    go(threading.get_native_id())
    store = SqliteStore.open(path, entries_max=100_000)
    store.load()
    await store.close()

def child(stage, path):
    attachable()
    try:
        asyncio.run((cycle if stage == "cycle" else opening)(Path(path)))
        tell("whole")
        code = 0
    except MeterdError as error:
        tell(f"error {type(error).__name__}: {error}")
        code = error.exit_code
    os._exit(code)

while line := os.read(0, 4096).decode():
    stage, path = line.split()
    pid = os.fork()
    if not pid:
        child(stage, path)
    tell(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")
"""
)


def strace_program() -> str:
    program = shutil.which("strace")
    if program is None:
        raise FileNotFoundError("strace is not installed; these tests need it")
    return program


# -- The record -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it returned: what it was, on which name, and with what."""

    kind: str  # create, write, truncate, sync, sync_names, unlink, or told.
    name: str = ""
    at: int = 0
    data: bytes = b""


_LINE = re.compile(r"(\d+) +(.*)")
_UNFINISHED = re.compile(r"(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FILE = re.compile(r"(\d+)<([^>]*)>")


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _path(text: str) -> str:
    return _bytes(text).decode() if text.startswith("\\x") else text


def _whole_lines(trace: Path) -> Iterator[str]:
    """Calls that another thread interrupted, put together; each where it returned."""
    begun: dict[str, str] = {}
    with trace.open() as lines:
        for line in lines:
            found = _LINE.match(line)
            assert found is not None
            thread, text = found.groups()
            if cut := _UNFINISHED.match(text):
                begun[thread] = cut[1]
            elif rest := _RESUMED.match(text):
                yield begun.pop(thread) + rest[1]
            else:
                yield text


def read_record(trace: Path, directory: Path) -> list[Call]:
    """The calls that change the directory, and what the process told, in the order of returning."""
    calls = []
    for line in _whole_lines(trace):
        found = _CALL.match(line)
        if found is not None and not found[3].startswith("-"):
            calls += _read_call(found[1], found[2], directory)
    return calls


def _read_call(kind: str, arguments: str, directory: Path) -> Iterator[Call]:
    texts = [_bytes(text) for text in _TEXT.findall(arguments)]
    if kind in ("openat", "unlink"):
        path = Path(texts[0].decode())
        if path.parent == directory and (kind == "unlink" or "O_CREAT" in arguments):
            yield Call("unlink" if kind == "unlink" else "create", path.name)
        return
    file = _FILE.match(arguments)
    assert file is not None, f"{kind} is not understood: the record would be wrong"
    if kind == "write":
        if file[1] == "1":
            yield Call("told", data=texts[0])
        return
    path = Path(_path(file[2]))
    last = arguments.rpartition(", ")[2]
    if path == directory:
        yield Call("sync_names")
    elif path.parent == directory and kind == "pwrite64":
        yield Call("write", path.name, int(last), texts[0])
    elif path.parent == directory:
        at = int(last) if kind == "ftruncate" else 0
        yield Call("truncate" if kind == "ftruncate" else "sync", path.name, at)


def record(directory: Path, seed: int, changes: int = CHANGES, weak: str = "") -> list[Call]:
    """Run the store under strace. `weak` is a setting of `synchronous` that is not enough."""
    data_dir = directory / "recorded"
    data_dir.mkdir(parents=True)
    trace = directory / "trace"
    traced = "trace=pwrite64,write,fdatasync,fsync,ftruncate,unlink,openat,rename,link"
    command = [strace_program(), "-f", "-qq", "-y", "-xx", "-s", "10000000", "-o", str(trace)]
    script = [sys.executable, "-c", RECORDED, str(data_dir), str(seed), str(changes), weak]
    subprocess.run([*command, "-e", traced, *script], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    calls = read_record(trace, data_dir)
    trace.unlink()
    return calls


# -- The disk -------------------------------------------------------------------------------------


@dataclass
class File:
    """What a power cut cannot take, and what was written since."""

    synced: bytearray = field(default_factory=bytearray)
    since: list[Call] = field(default_factory=list)

    def settle(self) -> None:
        for call in self.since:
            _apply(self.synced, call, call.data)
        self.since.clear()

    def remains(self, rng: random.Random) -> bytearray:
        """One of the contents that a cut may leave."""
        content = bytearray(self.synced)
        keep = rng.choice((0.0, 0.5, 0.5, 0.9, 1.0))  # Of the writes; the rest is torn or absent.
        for call in self.since:
            if rng.random() < keep:
                _apply(content, call, call.data)
            elif call.kind == "write" and rng.random() < 0.5:
                for at, data in _sectors(call):
                    if rng.random() < 0.5:
                        garbled = rng.random() < 0.05
                        part = Call("write", call.name, at)
                        _apply(content, part, rng.randbytes(len(data)) if garbled else data)
        return content


def _apply(content: bytearray, call: Call, data: bytes) -> None:
    if call.kind == "truncate":
        del content[call.at :]
        content += bytes(call.at - len(content))
        return
    content += bytes(max(0, call.at - len(content)))
    content[call.at : call.at + len(data)] = data


def _sectors(call: Call) -> Iterator[tuple[int, bytes]]:
    """A write in the pieces that the disk takes whole."""
    at, end = call.at, call.at + len(call.data)
    while at < end:
        stop = min(end, (at // SECTOR + 1) * SECTOR)
        yield at, call.data[at - call.at : stop - call.at]
        at = stop


class Disk:
    """The data directory as the calls so far have made it, and what a cut would leave of it."""

    def __init__(self) -> None:
        self.told = 0
        self._files: dict[str, File] = {}  # As the running process sees them.
        self._named: dict[str, File] = {}  # As the directory was last fsynced.

    def run(self, call: Call) -> None:
        match call.kind:
            case "told":
                self.told = int(call.data)
            case "create":
                self._files.setdefault(call.name, File())
            case "unlink":
                self._files.pop(call.name, None)
            case "sync":
                self._files[call.name].settle()
            case "sync_names":
                self._named = dict(self._files)
            case _:
                self._files[call.name].since.append(call)

    def cut(self, directory: Path, rng: random.Random) -> None:
        """Write one of the directories that a cut at this moment may leave."""
        for name in sorted(self._files.keys() | self._named.keys()):
            views = [view.get(name) for view in (self._files, self._named)]
            file = views[0] if views[0] is views[1] else rng.choice(views)
            if file is not None:
                (directory / name).write_bytes(file.remains(rng))


# -- What must hold -------------------------------------------------------------------------------


def check(directory: Path, told: int) -> int:
    """Open it: all that was told is there, each change is whole, and nothing is corrupt."""
    store = SqliteStore.open(directory, entries_max=100_000)  # Follows the journal's chain, too.
    try:
        state = store.load()
        last = int(state.positions.get("s", 0))
        asked = b"".join(digest("s", str(number)) for number in range(1, last + 2))
        known = [*range(1, last + 1), -1]
        open_release = f"r{last}" if last % 2 else None
        rows = list(store._connection.execute("PRAGMA integrity_check"))

        assert told <= last
        assert [("ok",)] == rows
        assert [last] * min(last, 1) == [row.quantity for row in state.counters]
        assert [last] * min(last, 1) == [row.settled for row in state.escrows]
        assert [open_release] * min(last, 1) == [
            row.release and row.release.id for row in state.escrows
        ]
        assert known == store.identities.find(asked)
        assert last == store._heads.journal
        return last
    finally:
        store._connection.close()
        store._lock.release()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of stores are opened in it."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="power-") as directory:
        yield Path(directory)


def cut_everywhere(calls: Sequence[Call], rng: random.Random, cuts: int) -> int:
    """Cut at so many moments, spread over all calls; how many changes were lost of those told."""
    moments = sorted(rng.randrange(len(calls) + 1) for _ in range(cuts))
    disk, done, lost = Disk(), 0, 0
    with scratch() as place:
        for number, moment in enumerate(moments):
            for call in calls[done:moment]:
                disk.run(call)
            done = moment
            directory = place / str(number)
            directory.mkdir()
            disk.cut(directory, rng)
            try:
                check(directory, disk.told)
            except Exception as error:  # noqa: BLE001  # However it fails.
                print(
                    f"cut {number} behind call {moment}/{len(calls)}, told {disk.told}: {error!r}"
                )
                lost += 1
            shutil.rmtree(directory)
    return lost


def _seed() -> int:
    seed = int(os.environ.get("METERD_SEED", random.SystemRandom().randrange(2**32)))
    print(f"METERD_SEED={seed}")
    return seed


def test_power_cut_anywhere_loses_nothing_that_was_told(tmp_path):
    """Thousands of cuts: the store opens, nothing told is lost, and no change is halved."""
    seed = _seed()
    calls = record(tmp_path, seed)
    kinds = {call.kind for call in calls}

    assert {"create", "write", "truncate", "sync", "sync_names", "unlink", "told"} == kinds
    assert 0 == cut_everywhere(calls, random.Random(seed), CUTS)


@pytest.mark.parametrize("weak", ["NORMAL", "OFF"])
def test_power_cuts_find_a_store_that_does_not_sync_its_commits(tmp_path, weak):
    """The test has teeth: with less than synchronous = FULL what was told is lost."""
    seed = _seed()
    calls = record(tmp_path, seed, weak=weak)

    assert cut_everywhere(calls, random.Random(seed), 200) > 0


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_a_million_power_cuts_lose_nothing_that_was_told(tmp_path):
    """The same, a million times, over records of many lives."""
    first = _seed()
    for number in range(100):
        print(f"METERD_SEED={first + number}")
        calls = record(tmp_path / str(number), first + number, changes=CHANGES * 2)

        assert 0 == cut_everywhere(calls, random.Random(first + number), SOAK_CUTS // 100)


# -- Calls that fail ------------------------------------------------------------------------------


class Nursery:
    """A process that has all imports behind it and makes a child for each run."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        self._lines = iter(self._process.stdout.readline, b"")

    def run(self, stage: str, path: Path, injection: str, trace: Path) -> tuple[list[str], int]:
        """One cycle whose k-th call fails; what it told, and its exit code."""
        self._say(f"{stage} {path}")
        ready, thread = self._line().split()

        assert "ready" == ready

        call = injection.partition(":")[0]
        options = ["-o", str(trace), "-e", f"trace={call}", "-e", f"inject={injection}"]
        command = [strace_program(), *options, "-p", thread]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            try:
                assert tracer.stderr is not None
                attached = tracer.stderr.readline()

                assert "attached" in attached, attached

                self._say("go")
                told = []
                while not (line := self._line()).startswith("exit "):
                    told.append(line)
            finally:
                tracer.terminate()
        return told, int(line.split()[1])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())

    def _line(self) -> str:
        return next(self._lines).decode().strip()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def used_store(tmp_path) -> Callable[[Path], None]:
    """Make copies of a store that has had two lives."""
    record(tmp_path / "used", 7, changes=10)

    def copy(path: Path) -> None:
        shutil.copytree(tmp_path / "used" / "recorded", path)

    return copy


@pytest.mark.parametrize("stage", ["founding", "opening", "cycle"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_every_call_of_a_cycle_may_fail_and_nothing_told_is_lost(
    tmp_path, nursery, used_store, stage, error
):
    """For each k: the process ends with its error or goes on, and all that it told is there."""
    began = time.monotonic()
    failed: dict[str, int] = {}
    before = 0 if stage == "founding" else 10
    for call in FAILING_CALLS:
        for k in range(1, 200):
            path = tmp_path / f"{call}-{k}"
            if stage != "founding":
                used_store(path)
            trace = tmp_path / "trace"
            told, code = nursery.run(stage, path, f"{call}:error={error}:when={k}", trace)
            injected = "INJECTED" in trace.read_text()
            numbers = [int(line) for line in told if line.isdigit()]

            assert told[-1:] == ["whole"] or (code == 70 and told[-1].startswith("error Store"))
            assert check(path, max(numbers, default=before)) <= before + 3

            shutil.rmtree(path)
            if not injected:
                break
            failed[call] = k
    print(f"{stage}, {error}: {failed} in {time.monotonic() - began:.1f} s")

    assert sum(failed.values()) > 0
