"""The meter against a real daemon: both of them are killed, and the sum is exact all the same."""

from __future__ import annotations

import asyncio
import base64
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meterd.sdk import AsyncGate, AsyncMeter, Gate, Meter, NotAnswered
from tests.acceptance.stage import PLANS, Node, configuration
from tests.processes import Sandbox

# However much is told while a slow machine starts a daemon, the escrow outlasts it.
CHEAP = PLANS.replace('"0.001"', '"0.000000001"')
SEEN = ("missing_events", "incomplete_producers")
# Tells quantities that are its own numbers, and writes each down once `emit` has returned.
PROGRAM = """
import os, sys, time
from meterd.sdk import Meter

url, spool, life, events = sys.argv[1:5]
meter = Meter(url, source="program", spool=spool, batch_events=50)
for number in range(1, int(events) + 1):
    meter.emit("esc", "units", number, id=f"{life}-{number}")
    os.write(1, b"%d\\n" % number)
    time.sleep(0.0005)
assert meter.flush(60)
meter.close()
os.write(1, b"end\\n")
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with (
        Sandbox(tmp_path / "sandbox") as sandbox,
        Node(tmp_path, configuration(sandbox, plans=CHEAP)) as running,
    ):
        running.wait_ready()
        running.bind(sandbox.lock("900.00"), "lazy", "esc")
        yield running


def used(node: Node) -> tuple[int, int]:
    """How much was used, in units, and by how many events."""
    (row,) = node.get("/v1/agreements/esc/usage")["items"]
    return int(row["quantity"]), row["events"]


def kill_and_start(node: Node, pause_s: float) -> None:
    node.kill()
    time.sleep(pause_s)
    node.start()
    node.wait_ready()


def test_daemon_that_is_killed_while_programs_tell_counts_each_event_once(
    node: Node, tmp_path: Path
) -> None:
    """One program waits, one awaits, one has no spool; the daemon dies five times."""
    rng = random.Random(20_261_125)
    told: list[int] = []
    over = threading.Event()

    def wait(meter: Meter, first: int) -> None:
        for number in range(first, 10**9):
            if over.is_set():
                break
            meter.emit("esc", "units", number)
            told.append(number)
            time.sleep(0.001)
        assert meter.flush(60)
        meter.close()

    async def awaited() -> None:
        async with AsyncMeter(node.url, source="c", spool=tmp_path / "c") as meter:
            for number in range(1, 10**9):
                if over.is_set():
                    break
                meter.emit("esc", "units", number)
                told.append(number)
                await asyncio.sleep(0.001)
            assert await meter.aflush(60)

    meters = [Meter(node.url, source="a", spool=tmp_path / "a"), Meter(node.url, source="b")]
    threads = [threading.Thread(target=wait, args=(each, 1000)) for each in meters]
    threads.append(threading.Thread(target=lambda: asyncio.run(awaited())))
    for thread in threads:
        thread.start()
    for _ in range(5):
        time.sleep(rng.uniform(0.1, 0.5))
        kill_and_start(node, rng.uniform(0, 0.3))
    over.set()
    for thread in threads:
        thread.join()

    assert len(told) > 1000
    assert used(node) == (sum(told), len(told))
    assert node.get("/v1/dead-letters")["items"] == []


class Life:
    """One life of the program, and what it wrote down."""

    def __init__(self, node: Node, spool: Path, name: str, events: int) -> None:
        words = [node.url, str(spool), name, str(events)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        self.numbers: list[int] = []
        self.ended = False

    def read(self, lines: int) -> None:
        """Read so many lines, or to its end."""
        assert self.process.stdout is not None
        while len(self.numbers) < lines and (line := self.process.stdout.readline()):
            self.note(line)

    def note(self, line: bytes) -> None:
        if line == b"end\n":
            self.ended = True
        elif line.endswith(b"\n"):
            self.numbers.append(int(line))

    def kill(self) -> None:
        """SIGKILL, and read what is left in the pipe."""
        self.process.send_signal(signal.SIGKILL)
        out, _ = self.process.communicate()
        for line in out.splitlines(keepends=True):
            self.note(line)


def counted(node: Node) -> int:
    rows = node.get("/v1/agreements/esc/usage")["items"]
    return rows[0]["events"] if rows else 0


@pytest.mark.parametrize("daemon", ["away", "there", "killed"])
def test_program_that_is_killed_leaves_a_spool_from_which_each_event_is_counted_once(
    node: Node, tmp_path: Path, daemon: str
) -> None:
    """What `emit` returned for is counted; of the rest at most the one event under way."""
    rng = random.Random(daemon)
    spool, lives = tmp_path / "spool", list[Life]()
    if daemon == "away":
        node.kill()
    for number in range(6):
        life = Life(node, spool, f"life{number}", 10**6)
        life.read(rng.randint(1, 400))
        if daemon == "killed":
            kill_and_start(node, 0)
            life.read(len(life.numbers) + rng.randint(1, 100))
        life.kill()
        lives.append(life)
    if daemon == "away":
        node.start()
        node.wait_ready()
    last = Life(node, spool, "last", 10)
    last.read(10**9)
    assert last.process.wait(60) == 0
    assert last.process.stdout is not None
    last.process.stdout.close()
    lives.append(last)

    total, events = used(node)
    least = sum(len(life.numbers) for life in lives)
    assert last.ended
    assert least > 200
    assert least <= events <= least + 6
    # Each life told 1, 2, 3, ... and nothing in between may be missing.
    surplus = total - sum(sum(life.numbers) for life in lives)
    next_numbers = sorted(len(life.numbers) + 1 for life in lives[:-1])
    assert surplus in sums_of(next_numbers, events - least)
    assert list(spool.glob("*.spool")) == []
    assert node.get("/v1/dead-letters")["items"] == []


def sums_of(numbers: list[int], count: int) -> set[int]:
    """The sums of every choice of so many of these numbers."""
    found: dict[int, set[int]] = {0: {0}}
    for number in numbers:
        for size, sums in sorted(found.items(), reverse=True):
            found.setdefault(size + 1, set()).update(one + number for one in sums)
    return found.get(count, set())


def test_meter_that_closes_without_a_daemon_leaves_its_events_to_the_next_process(
    node: Node, tmp_path: Path
) -> None:
    """Over a restart of both, with their ids and times."""
    node.kill()
    meter = Meter(node.url, spool=tmp_path / "spool")
    ids = [meter.emit("esc", "units", 3) for _ in range(50)]
    assert meter.close(0.2) == 50
    node.start()
    node.wait_ready()
    with Meter(node.url, spool=tmp_path / "spool") as successor:
        assert successor.flush()
        successor.emit("esc", "units", 3, id=ids[0], time=None)
        assert successor.flush()

    # The last one has an id that is known, and another time: a conflict, and no usage.
    assert used(node) == (150, 50)
    assert [one["reason"] for one in node.get("/v1/dead-letters")["items"]] == ["conflict"]


def test_hold_is_asked_for_again_and_captured_while_the_daemon_dies(
    node: Node, tmp_path: Path
) -> None:
    """One hold for one piece of work, and its usage once."""
    with (
        Meter(node.url, spool=tmp_path / "spool") as meter,
        Gate(node.url, meter=meter) as gate,
    ):
        with gate.hold("esc", "units", 10) as hold:
            again = gate.authorize("esc", "units", 10, hold=60, key="mine")
            assert gate.authorize("esc", "units", 10, hold=60, key="mine").hold == again.hold
            node.kill()
            hold.capture(7)
        node.start()
        node.wait_ready()
        assert meter.flush(30)
        gate.void(again.hold)

    assert used(node) == (7, 1)
    assert node.get("/v1/holds")["items"] == []


def test_numbered_events_show_the_daemon_that_nothing_is_missing(
    node: Node, tmp_path: Path
) -> None:
    """A gap would be a lost event."""
    for _ in range(3):
        with Meter(node.url, source="svc-a", spool=tmp_path / "spool", numbered=True) as meter:
            for _ in range(20):
                meter.emit("esc", "units")
            assert meter.flush()

    assert used(node) == (60, 60)
    assert {name: node.get("/v1/status")[name] for name in SEEN} == dict.fromkeys(SEEN, 0)
    late = {"id": "by-hand", "agreement": "esc", "meter": "units", "quantity": 1}
    node.send({**late, "source": "svc-a", "sequence": 63})
    assert node.get("/v1/status")["missing_events"] == 2


async def test_meter_and_gate_speak_over_a_unix_socket(tmp_path: Path) -> None:
    """Of both sorts."""
    with tempfile.TemporaryDirectory() as short, Sandbox(tmp_path / "sandbox") as sandbox:
        url = f"unix:{short}/m.sock"
        node = Node(tmp_path, configuration(sandbox).replace("@listen@", url))
        with node:
            node.wait_logged("listening")
            with Meter(url, "no-matter") as meter, Gate(url) as gate:
                meter.emit("nobody", "units")
                assert await asyncio.to_thread(meter.flush)
                assert gate.authorize("nobody", "units").reason == "there is no agreement 'nobody'"
            async with AsyncGate(url) as awaited:
                assert not (await awaited.authorize("nobody", "units")).allowed


async def test_meter_and_gates_sign_what_they_send(tmp_path: Path) -> None:
    """Meterd takes nothing unsigned of this producer; what is sent again is signed again."""
    token, secret = "a-token-of-the-producer-0123", f"whsec_{base64.b64encode(bytes(32)).decode()}"
    scopes = 'scopes = ["ingest", "gate", "admin", "read"]'
    rest = f"""
[[http.tokens]]
name = "svc-a"
token = "{token}"
{scopes}
[[http.tokens]]
name = "person"
token = "a-token-of-a-person-0123456"
{scopes}
[[producers]]
name = "svc-a"
token = "svc-a"
secret = "{secret}"
"""
    person = {"Authorization": "Bearer a-token-of-a-person-0123456"}
    with (
        Sandbox(tmp_path / "sandbox") as sandbox,
        Node(tmp_path, configuration(sandbox, rest=rest)) as node,
    ):
        node.wait_ready()
        body = {"plan": "lazy", "escrows": {"main": sandbox.lock("5.00")}}
        assert node.ask("PUT", "/v1/agreements/esc", body, **person).status == 201
        meter = Meter(node.url, token, spool=tmp_path / "spool", secret=secret)
        node.kill()
        meter.emit("esc", "units", 5)
        node.start()
        node.wait_ready()
        assert await asyncio.to_thread(meter.flush)
        meter.close()
        with Gate(node.url, token, secret=secret) as gate:
            assert gate.authorize("esc", "units").asked
        async with AsyncGate(node.url, token, secret=secret) as awaited:
            assert (await awaited.authorize("esc", "units")).asked
        with Gate(node.url, token) as unsigned, pytest.raises(NotAnswered, match="signature"):
            unsigned.authorize("esc", "units")
        usage = node.ask("GET", "/v1/agreements/esc/usage", **person).json["items"]

    assert [row["quantity"] for row in usage] == ["5"]
