"""The power is cut anywhere in the store's own sequence of writes, and any of its calls fails.

A real process runs the real store on the real SQLite library while strace writes down each system
call that changes the data directory, with its bytes, and each "durable" that the process tells.
From that record come the disks that a power cut may leave: what was fsynced is there; of what was
not, any part, each write whole, absent, or torn and garbled at the borders of sectors; names that
the directory was not fsynced for come and go. On each of them the store is opened as after a start.

What this rig sees that the one on a machine in memory (tests/power/) does not, and the other way
round, stands in tests/power/test_power_cuts.py. In short: here it is really the kernel that is
asked, by the SQLite that meterd runs on; there are far more cuts, and faults at any call.

strace needs the right to trace other processes. Where the system gives it to nobody, as in some
containers, these tests are left out and say so; without the program they fail.
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
from pathlib import Path

import pytest

from meterd.store.sqlite import SqliteStore
from tests.power.disk import Call, Disk
from tests.power.life import ENTRIES_MAX, check

ROOT = Path(__file__).parents[2]
CUTS = 4000
SOAK_CUTS = 1_000_000
CHANGES = 160
SAMPLE = 3  # Of so many k of failing calls one is tried in CI.
FAILING_CALLS = ("pwrite64", "fdatasync", "fsync", "ftruncate", "fallocate", "unlink")

COMMON = """
import asyncio, ctypes, os, random, sys, threading
from pathlib import Path
from meterd.errors import MeterdError
from meterd.store import sqlite
from meterd.store.sqlite import SqliteStore
from tests.power.life import ENTRIES_MAX, change, last_change

def tell(text):
    os.write(1, f"{text}\\n".encode())
"""
RECORDED = (
    COMMON
    + """
async def life(path, chance, upto):
    store = SqliteStore.open(path, entries_max=ENTRIES_MAX)
    n = last_change(store)
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
    store = SqliteStore.open(path, entries_max=ENTRIES_MAX)
    n = last_change(store) + 1
    await store.commit(change(store, n))  # From here on there is a writer.
    go(store._thread.native_id)
    sqlite.WAL_BYTES_MAX = 0  # Each commit is followed by a checkpoint.
    for _ in range(3):
        n += 1
        await store.commit(change(store, n))
        tell(n)
    await store.close()

async def opening(path):
    go(threading.get_native_id())
    store = SqliteStore.open(path, entries_max=ENTRIES_MAX)
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


@pytest.fixture(autouse=True, scope="module")
def _tracing() -> None:
    """Leave these tests out where no process may trace another, and for that reason alone."""
    command = [strace_program(), "-f", "-qq", "-o", os.devnull, "true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if "not permitted" in tried.stderr:
        pytest.skip(f"the system lets no process trace another (ptrace): {tried.stderr.strip()}")

    assert 0 == tried.returncode, tried.stderr


# -- The record -----------------------------------------------------------------------------------


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


# -- What must hold -------------------------------------------------------------------------------


def look(directory: Path, told: int) -> int:
    """Open what is left and check it; the last change that is there."""
    store = SqliteStore.open(directory, entries_max=ENTRIES_MAX)
    try:
        return check(store, told)
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
            for name, content in disk.cut(rng).items():
                (directory / name).write_bytes(content)
            try:
                look(directory, disk.told)
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


@pytest.mark.timeout(
    1800
)  # Twenty seconds of one core, which a busy machine may not have for long.
def test_power_cut_anywhere_loses_nothing_that_was_told(tmp_path):
    """Thousands of cuts: the store opens, nothing told is lost, and no change is halved."""
    seed = _seed()
    calls = record(tmp_path, seed)
    kinds = {call.kind for call in calls}

    assert {"create", "write", "truncate", "sync", "sync_names", "unlink", "told"} == kinds
    assert 0 == cut_everywhere(calls, random.Random(seed), CUTS)

    print(f"{CUTS} cuts over {len(calls)} calls, 0 with a loss")


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
@pytest.mark.parametrize("every", [SAMPLE, pytest.param(1, marks=pytest.mark.soak)])
def test_any_call_of_a_cycle_may_fail_and_nothing_told_is_lost(
    tmp_path, nursery, used_store, stage, error, every
):
    """For each k, or one in so many: the process ends or goes on, and all that it told is there."""
    began = time.monotonic()
    runs: dict[str, int] = {}
    before = {"founding": 0, "opening": 10, "cycle": 11}[stage]
    for call in FAILING_CALLS:
        for k in range(random.randint(1, every), 200, every):
            path = tmp_path / f"{call}-{k}"
            if stage != "founding":
                used_store(path)
            trace = tmp_path / "trace"
            told, code = nursery.run(stage, path, f"{call}:error={error}:when={k}", trace)
            injected = "INJECTED" in trace.read_text()
            numbers = [int(line) for line in told if line.isdigit()]

            assert told[-1:] == ["whole"] or (code == 70 and told[-1].startswith("error Store"))
            assert look(path, max(numbers, default=before)) <= before + 3

            shutil.rmtree(path)
            if not injected:
                break
            runs[call] = runs.get(call, 0) + 1
    print(f"{stage}, {error}: {sum(runs.values())} k, {runs}, {time.monotonic() - began:.1f} s")

    assert sum(runs.values()) > 0
