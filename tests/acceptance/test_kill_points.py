"""The daemon is killed at exact system calls, stopped, copied and set back: exact, or frozen.

Real Redis, real Mosquitto, the sandbox and the daemon. strace ends the daemon at the n-th call of a
kind, before that call has any effect: at each write and fsync of the store, and at each piece that
goes out to a broker, a producer or the escrow service, from the first call of the start to the last
of a cycle. All lives share one history, and every sum is checked after the last one, since what was
lost, doubled or overpaid in any of them would stay so.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import redis

from tests.processes import Daemon, Sandbox, call, free_port, wait_until
from tests.servers import MosquittoServer, RedisServer

PRICE = Decimal("0.001001")
QUANTUM = Decimal("0.000001")
RELEASE_MAX = Decimal("0.25")
QUARANTINE_S = 1
# The store's calls, and those by which anything leaves the process. `openat` and others change
# nothing that a later call does not make visible.
KILLED_AT = (
    "pwrite64",
    "fdatasync",
    "fsync",
    "ftruncate",
    "fallocate",
    "sendto",
    "sendmsg",
    "connect",
)
FAILING = (  # Errors of the disk, by the calls that may meet them.
    ("pwrite64", "EIO"),
    ("fdatasync", "EIO"),
    ("pwrite64", "ENOSPC"),
    ("pwrite64", "ENOSPC"),
)
CI_KILLS = 18  # The other 12 of CI's 30 strike at random moments: test_crash.py.
CYCLE_CALLS = 120  # Of one kind in one thread; a life makes more only by beginning over.
MEASURED_S = 3.0  # Some cycles.
LIFE_S_MAX = 20.0  # Where a machine is so busy that a life makes fewer calls than the measured one.
AFTER_S = 0.7  # How long a life goes on behind an error that did not end it.
HELD = 3
STOP_S = 2.5  # Longer than the quarantine and the client's time-out together.
CONFIG = """
[daemon]
data_dir = "{data_dir}"
drain_timeout = "5s"

[http]
listen = "127.0.0.1:{port}"

[escrow]
base_url = "{escrow}"
api_key = "{key}"
request_timeout = "1s"
in_doubt_quarantine = "{quarantine}s"
observe_gap = "200ms"
min_interval = "50ms"
voids_per_day = 1000
doubts_max = 1000
release_max = "{release_max}"
strict = {strict}

[meters.units]

[plans.stream]
pattern = "streaming"
rates = [{{ meter = "units", price = "{price}" }}]
settle = {{ units = "50", interval = "300ms", min_release = "0.000001" }}
"""
AGREEMENT = '\n[[agreements]]\nid = "{id}"\nplan = "stream"\nescrows = {{ main = "{escrow}" }}\n'
SOURCES = """
[[sources]]
kind = "redis"
name = "redis"
url = "{redis}"
block = "200ms"

[[sources]]
kind = "mqtt"
name = "mqtt"
port = {mqtt}
topic = "meterd/usage/{{agreement}}/{{meter}}"
"""


# Runs the daemon, and has it stop itself (SIGSTOP, as any suspended machine) where the bytes of a
# release are about to leave: behind every check, before the write.
HOLDER = """
import os, signal, socket, sys
from meterd.__main__ import main
send, left = socket.socket.send, [int(sys.argv.pop(1))]
def held(self, data, *flags):
    if left[0] and bytes(data[:5]) == b"POST ":
        left[0] -= 1
        os.kill(os.getpid(), signal.SIGSTOP)
    return send(self, data, *flags)
socket.socket.send = held
sys.exit(main())
"""


class TracedDaemon(Daemon):
    """A daemon that strace kills, holds up or fails at its n-th system call of a kind."""

    injection = ""
    trace = Path(os.devnull)
    holds = 0  # Releases before whose write it stops itself.

    def start(self) -> None:
        """Start, under strace where there is an injection, and do not wait."""
        words = self._command[self._command.index("run") :]
        begin = ["-c", HOLDER, str(self.holds)] if self.holds else ["-m", "meterd"]
        self._command = [*self._under(), sys.executable, *begin, *words]
        super().start()

    def _under(self) -> list[str]:
        if not self.injection:
            return []
        program = strace()
        name = self.injection.partition(":")[0]
        # -D: the process that was started is the daemon itself, and strace is its guest. Without
        # --seccomp-bpf, under which strace 6.1 injects nothing.
        options = ["-D", "-f", "-qq", "-o", str(self.trace), "-e", f"trace={name}"]
        return [program, *options, "-e", f"inject={self.injection}"]

    def let_go(self) -> None:
        """Have strace leave it alone from now on."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        tracer = re.search(r"^TracerPid:\t(\d+)$", status, re.MULTILINE)
        assert tracer is not None
        os.kill(int(tracer[1]), signal.SIGTERM)  # It lets go of its host and ends.

    @property
    def failed_once(self) -> bool:
        """Whether a call has met its error. One that was killed leaves no such line."""
        return "(INJECTED)" in self.trace.read_text() if self.trace.is_file() else False

    @property
    def stopped(self) -> bool:
        """Whether it stands still."""
        assert self._process is not None
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        return stat.rpartition(") ")[2].startswith("T")

    @property
    def alive(self) -> bool:
        """Whether it lives."""
        return self._process is not None and self._process.poll() is None


@functools.cache
def strace() -> str:
    """The program. Says so where it is missing, which is a failure, or may not trace here."""
    program = shutil.which("strace")
    if program is None:
        raise FileNotFoundError("strace is not installed; these tests need it")
    tried = subprocess.run([program, "-qq", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(
            "NOT SHOWN: nothing was killed at exact system calls, since this machine lets no"
            f" process trace another (a container needs SYS_PTRACE): {tried.stderr.strip()}"
        )
    return program


class Stage:
    """Servers, the daemon's configuration, and the test's own count of distinct events."""

    def __init__(
        self, path: Path, stack: ExitStack, *, sources: bool, strict: bool = False
    ) -> None:
        self.path = path
        self.sandbox = stack.enter_context(Sandbox(path / "sandbox"))
        self.escrows = {name: self.sandbox.lock("100.00") for name in ("a", "b")}
        self.sent: collections.Counter[str] = collections.Counter()
        self.units: collections.Counter[str] = collections.Counter()
        # Events of HTTP producers that nobody has acknowledged yet.
        self.waiting: list[dict[str, object]] = []
        self._strict = strict
        self._sources = ""
        if sources:
            redis_server = stack.enter_context(RedisServer())
            mosquitto = stack.enter_context(MosquittoServer())
            self.stream = stack.enter_context(redis.Redis(port=redis_server.port))
            self.producer = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
            self.producer.connect("127.0.0.1", mosquitto.port)
            self.producer.loop_start()
            stack.callback(self.producer.loop_stop)
            stack.callback(self.producer.disconnect)
            self._sources = SOURCES.format(redis=redis_server.url, mqtt=mosquitto.port)

    def daemon(self, name: str = "meterd") -> TracedDaemon:
        """A daemon with a data directory and a port of its own, for the same escrows."""
        port = free_port()
        text = CONFIG.format(
            data_dir=self.path / name,
            port=port,
            escrow=self.sandbox.api,
            key=self.sandbox.provider_key,
            quarantine=QUARANTINE_S,
            release_max=RELEASE_MAX,
            strict=str(self._strict).lower(),
            price=PRICE,
        )
        for agreement, escrow in self.escrows.items():
            text += AGREEMENT.format(id=agreement, escrow=escrow)
        (self.path / f"{name}.toml").write_text(text + self._sources)
        return TracedDaemon(self.path / f"{name}.toml", port)

    def event(self, agreement: str, quantity: int) -> dict[str, object]:
        """A new event, counted as sent."""
        self.sent[agreement] += 1
        self.units[agreement] += quantity
        return {
            "id": f"{agreement}-{self.sent[agreement]}",
            "agreement": agreement,
            "meter": "units",
            "quantity": quantity,
        }

    def owed(self, agreement: str) -> Decimal:
        """What was used, at its price."""
        return self.units[agreement] * PRICE

    def paid(self, agreement: str) -> Decimal:
        """What the service's own log says was released."""
        rows = self.sandbox.operations(self.escrows[agreement])
        return sum((Decimal(row["amount"]) for row in rows), Decimal(0))

    async def close(self, daemon: Daemon) -> None:
        """Everything counted, closed, and paid to the last quantum; no release paid twice."""
        await until(daemon, "counted", lambda row: row["events"] == self.sent[row["id"]])
        for agreement in self.escrows:
            body = {"reason": "the test ends"}
            call("POST", f"{daemon.url}/v1/agreements/{agreement}/close", body)
        await until(daemon, "closed", lambda row: row["state"] == "closed")
        for agreement, row in agreements(daemon).items():
            usage = call("GET", f"{daemon.url}/v1/agreements/{agreement}/usage")["items"]
            rows = self.sandbox.operations(self.escrows[agreement])
            keys = [operation["idempotency_key"] for operation in rows]

            assert [Decimal(self.units[agreement])] == [Decimal(line["quantity"]) for line in usage]
            assert self.owed(agreement) == Decimal(row["accrued"])
            assert self.owed(agreement).quantize(QUANTUM, ROUND_FLOOR) == self.paid(agreement)
            assert len(keys) == len(set(keys))

        # A broker may deliver again, for want of an ack, what was counted before the close.
        letters = call("GET", f"{daemon.url}/v1/dead-letters?limit=1000")["items"]

        assert {letter["reason"] for letter in letters} <= {"closed"}


def agreements(daemon: Daemon) -> dict[str, Any]:
    """What a daemon says of each agreement."""
    page = call("GET", f"{daemon.url}/v1/agreements?limit=100")
    return {row["id"]: row for row in page["items"]}


async def until(
    daemon: Daemon, what: str, true: Callable[[Mapping[str, Any]], bool], seconds: float = 60
) -> None:
    """Wait until it is true of every agreement."""

    async def all_true() -> bool:
        rows = await asyncio.to_thread(agreements, daemon)
        return all(true(row) for row in rows.values())

    try:
        await wait_until(all_true, seconds)
    except AssertionError:
        raise AssertionError(f"{what} is not so: {agreements(daemon)}") from None


def _seed() -> int:
    seed = int(os.environ.get("METERD_SEED", random.SystemRandom().randrange(2**32)))
    print(f"METERD_SEED={seed}")
    return seed


def _post(daemon: Daemon, event: Mapping[str, object]) -> bool:
    """Send one event; False when it has to be sent again."""
    try:
        answer = call("POST", f"{daemon.url}/v1/events", event)
    except (OSError, ValueError):  # Refused, reset, cut off, or 503.
        return False

    assert [] == answer["rejected"]
    return True


async def _live(
    stage: Stage, daemon: TracedDaemon, rng: random.Random, over: Callable[[], bool], most: float
) -> None:
    """Feed one life over three transports until it ends, or is over."""
    deadline = time.monotonic() + most
    while daemon.alive and not over() and time.monotonic() < deadline:
        for name in stage.escrows:
            event = stage.event(name, rng.randrange(1, 40))
            transport = rng.choice(("redis", "mqtt", "http"))
            if transport == "redis":
                stage.stream.xadd("meterd:usage", {"event": json.dumps(event)})
            elif transport == "mqtt":
                info = stage.producer.publish(
                    f"meterd/usage/{name}/units", json.dumps(event), qos=1
                )
                await asyncio.to_thread(info.wait_for_publish, 10)
            else:
                stage.waiting.append(event)
        for event in list(stage.waiting):
            if not await asyncio.to_thread(_post, daemon, event):
                break
            stage.waiting.remove(event)
        await asyncio.sleep(0.05)


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Point:
    """The n-th call of a kind in a thread, and what befalls it: SIGKILL, or an error."""

    call: str
    number: int
    error: str = ""

    @property
    def injection(self) -> str:
        """In the words of strace."""
        what = f"error={self.error}" if self.error else "signal=KILL"
        return f"{self.call}:{what}:when={self.number}"


@dataclass
class Lives:
    """How lives under strace have ended."""

    killed: int = 0  # At their point.
    failed: int = 0  # Ended themselves, with exit code 70, after an error of the disk.
    went_on: int = 0  # After an error of the disk.
    missed: list[Point] = field(default_factory=list)  # They never made that call.

    def __str__(self) -> str:
        """One line for a report."""
        return (
            f"{self.killed} lives killed at exact system calls; after an error of the disk"
            f" {self.failed} ended with 70 and {self.went_on} went on; {len(self.missed)} points"
            f" not reached: {self.missed}"
        )


async def _begin(stage: Stage, daemon: TracedDaemon) -> None:
    """Live for the first time: bind and subscribe, so that the broker keeps what is published."""
    daemon.wait_ready()
    await until(daemon, "adopted", lambda row: row["state"] == "active")
    daemon.kill()


async def _calls_of_a_cycle(
    stage: Stage, daemon: TracedDaemon, rng: random.Random
) -> dict[str, int]:
    """How often one thread makes each call, at most, from a start through some cycles."""
    daemon.trace = stage.path / "trace"
    daemon.injection = f"{','.join(KILLED_AT)}:delay_enter=0"
    daemon.start()
    daemon.wait_ready()
    await _live(stage, daemon, rng, _never, MEASURED_S)
    daemon.kill()
    by_thread: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in daemon.trace.read_text().splitlines():
        if found := re.match(r"(\d+) +(\w+)\(", line):
            by_thread[found[2], found[1]] += 1
    most: dict[str, int] = {}
    for (name, _), times in by_thread.items():
        most[name] = max(times, most.get(name, 0))
    return {name: min(times, CYCLE_CALLS) for name, times in most.items()}


async def _live_until(
    stage: Stage, daemon: TracedDaemon, point: Point, rng: random.Random, lives: Lives
) -> None:
    """One life with one point."""
    daemon.injection = point.injection
    daemon.trace = stage.path / f"trace-{point.call}-{point.number}-{point.error or 'KILL'}"
    daemon.trace.unlink(missing_ok=True)
    daemon.start()
    await _live(stage, daemon, rng, lambda: daemon.failed_once, LIFE_S_MAX)
    if daemon.failed_once:
        await _live(stage, daemon, rng, _never, AFTER_S)
    if alive := daemon.alive:
        daemon.kill()
    code = daemon.wait()
    if daemon.failed_once:
        assert alive or code == 70, f"{point}: {code}\n{daemon.log_tail()}"
        lives.failed += not alive
        lives.went_on += alive
    elif alive:
        lives.missed.append(point)
    else:
        assert -signal.SIGKILL == code, f"{point}: {daemon.log_tail()}"
        lives.killed += 1


async def _lives(
    stage: Stage, daemon: TracedDaemon, points: Sequence[Point], rng: random.Random
) -> Lives:
    """Live once for each point, then in peace, and close the books."""
    lives = Lives()
    for point in points:
        await _live_until(stage, daemon, point, rng, lives)
    daemon.injection = ""
    daemon.start()
    daemon.wait_ready()
    for event in stage.waiting:
        assert _post(daemon, event)
    await stage.close(daemon)
    daemon.stop()
    return lives


async def test_daemon_killed_or_failed_at_exact_calls_pays_what_was_used(tmp_path):
    """A seeded sample of the calls of a start and of the cycles behind it, one life for each."""
    rng = random.Random(_seed())
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=True)
        daemon = stack.enter_context(stage.daemon())
        await _begin(stage, daemon)
        most = await _calls_of_a_cycle(stage, daemon, rng)
        # Each kind has its share: the first calls are the start's, the others a cycle's.
        kinds = [*most, *rng.choices(list(most), k=max(0, CI_KILLS - len(most)))]
        points = [Point(name, 1 + rng.randrange(most[name])) for name in kinds]
        points += [Point(name, 1 + rng.randrange(most[name]), error) for name, error in FAILING]
        rng.shuffle(points)
        lives = await _lives(stage, daemon, points, rng)
        print(f"{lives}. Calls in a thread: {most}")

        assert lives.killed >= CI_KILLS - 2


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
async def test_daemon_killed_or_failed_at_every_call_of_a_cycle_pays_what_was_used(tmp_path):
    """Each call of a start and of the cycles behind it, some hundred lives."""
    rng = random.Random(_seed())
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=True)
        daemon = stack.enter_context(stage.daemon())
        await _begin(stage, daemon)
        most = await _calls_of_a_cycle(stage, daemon, rng)
    kinds = [*((name, "") for name in most), *dict.fromkeys(FAILING)]
    every = [Point(name, n, error) for name, error in kinds for n in range(1, most[name] + 1)]
    killed = 0
    for first in range(0, len(every), 40):
        path = tmp_path / str(first)
        path.mkdir()
        with ExitStack() as stack:
            stage = Stage(path, stack, sources=True)
            daemon = stack.enter_context(stage.daemon())
            await _begin(stage, daemon)
            lives = await _lives(stage, daemon, every[first : first + 40], rng)
        killed += lives.killed
        print(f"{first} of {len(every)}: {lives}")
    print(f"{killed} lives killed at exact system calls; {most}")


async def _post_until_told(stage: Stage, daemon: Daemon, rng: random.Random, times: int) -> None:
    """Send events one after the other, each again until it is answered."""
    for _ in range(times):
        for name in stage.escrows:
            event = stage.event(name, rng.randrange(20, 99))
            while not await asyncio.to_thread(_post, daemon, event):
                await asyncio.sleep(0.1)
        await asyncio.sleep(rng.uniform(0, 0.2))


async def test_daemon_stopped_at_work_for_longer_than_the_quarantine_pays_what_was_used(tmp_path):
    """SIGSTOP at any moment, then on again: the sums are exact."""
    rng = random.Random(_seed())
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=False)
        daemon = stack.enter_context(stage.daemon())
        daemon.wait_ready()
        async with asyncio.TaskGroup() as group:
            group.create_task(_post_until_told(stage, daemon, rng, 20))
            for _ in range(3):
                await asyncio.sleep(rng.uniform(0.2, 1.0))
                daemon.signal(signal.SIGSTOP)
                await asyncio.sleep(STOP_S)
                daemon.signal(signal.SIGCONT)
        await stage.close(daemon)
        daemon.stop()


async def test_daemon_stopped_between_check_and_write_pays_what_was_used(tmp_path):
    """It stands still past the quarantine with a release in hand, then sends it: still exact."""
    rng = random.Random(_seed())
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=False)
        daemon = stage.daemon()
        daemon.holds = HELD
        stack.enter_context(daemon)
        daemon.wait_ready()

        async def stopped() -> bool:
            return daemon.stopped

        async with asyncio.TaskGroup() as group:
            group.create_task(_post_until_told(stage, daemon, rng, 4))
            for _ in range(HELD):
                await wait_until(stopped, 30)
                await asyncio.sleep(STOP_S)
                daemon.signal(signal.SIGCONT)
        await stage.close(daemon)
        daemon.stop()


@pytest.mark.soak
async def test_daemon_held_up_in_the_call_that_sends_pays_what_was_used(tmp_path):
    """The very call that sends a release waits past the quarantine, then goes out: still exact.

    strace holds the call itself: a SIGSTOP that it injects there is not ended by SIGCONT. Not every
    call is held, since a reading that is held gives nothing, and no release would follow it.
    """
    rng = random.Random(_seed())
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=False)
        daemon = stage.daemon()
        first, step = rng.randrange(20, 40), rng.randrange(7, 12)
        microseconds = int(STOP_S * 1_000_000)
        daemon.injection = f"sendto:delay_enter={microseconds}:when={first}+{step}"
        daemon.trace = tmp_path / "trace"
        daemon = stack.enter_context(daemon)
        daemon.wait_ready()

        def held() -> int:
            lines = daemon.trace.read_text().splitlines()
            return sum('"POST ' in line and "(DELAYED)" in line for line in lines)

        deadline = time.monotonic() + 90
        while not held():
            assert time.monotonic() < deadline, "no release was held up"
            await _post_until_told(stage, daemon, rng, 1)
        daemon.let_go()
        await stage.close(daemon)
        daemon.stop()


async def _use(stage: Stage, daemons: Sequence[Daemon], quantity: int) -> None:
    """One event for each agreement, told to each of the daemons at the same time."""
    for name in stage.escrows:
        event = stage.event(name, quantity)
        told = await asyncio.gather(
            *(asyncio.to_thread(_post, daemon, event) for daemon in daemons)
        )

        assert all(told)


def _settled(row: Mapping[str, Any]) -> bool:
    return Decimal(row["unsettled"]) < QUANTUM and row["release"] is None


async def test_copied_data_directory_started_elsewhere_costs_at_most_one_release(tmp_path):
    """Two daemons pay for the same usage: at worst one release too much, then both are frozen."""
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=False)
        first = stack.enter_context(stage.daemon())
        first.wait_ready()
        await _use(stage, [first], 100)
        await until(first, "settled", _settled)
        shutil.copytree(tmp_path / "meterd", tmp_path / "copy")
        second = stack.enter_context(stage.daemon("copy"))
        second.wait_ready()
        for _ in range(5):
            await _use(stage, [first, second], 200)

        def at_rest(row: Mapping[str, Any]) -> bool:
            return row["state"] == "frozen" or _settled(row)

        await until(first, "at rest", at_rest)
        await until(second, "at rest", at_rest)
        await _use(stage, [first, second], 200)  # Whoever has not looked since looks now.
        await until(first, "at rest", at_rest)
        await until(second, "at rest", at_rest)
        states = [agreements(daemon) for daemon in (first, second)]
        for name in stage.escrows:
            frozen = [rows[name]["state"] == "frozen" for rows in states]

            assert stage.paid(name) <= stage.owed(name) + RELEASE_MAX
            assert any(frozen)
            assert all(frozen) or stage.paid(name) <= stage.owed(name)


@pytest.mark.parametrize("strict", [False, True])
async def test_old_backup_restored_pays_nothing_and_freezes(tmp_path, strict):
    """The service shows what the backup does not know: frozen, and not a quantum too much."""
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=False, strict=strict)
        daemon = stack.enter_context(stage.daemon())
        daemon.wait_ready()
        await _use(stage, [daemon], 100)
        await until(daemon, "settled", _settled)
        daemon.stop()
        shutil.copytree(tmp_path / "meterd", tmp_path / "backup")
        daemon.start()
        daemon.wait_ready()
        await _use(stage, [daemon], 150)
        await until(daemon, "settled", _settled)
        daemon.kill()
        shutil.rmtree(tmp_path / "meterd")
        shutil.copytree(tmp_path / "backup", tmp_path / "meterd")
        paid = {name: stage.paid(name) for name in stage.escrows}
        daemon.start()
        daemon.wait_ready()
        await _use(stage, [daemon], 120)
        await until(daemon, "frozen", lambda row: row["state"] == "frozen")
        await _use(stage, [daemon], 500)
        await until(daemon, "counted", lambda row: row["events"] == 3)

        assert paid == {name: stage.paid(name) for name in stage.escrows}
        assert all(paid[name] <= stage.owed(name) for name in stage.escrows)
        daemon.stop()
