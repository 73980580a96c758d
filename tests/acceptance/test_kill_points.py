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
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import redis

from tests.processes import Daemon, Sandbox, call, free_port, wait_until
from tests.servers import MosquittoServer, RedisServer

pytestmark = pytest.mark.soak  # Not yet seen to pass again and again within the time of CI.

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
CI_KILLS = 18
CYCLE_CALLS = 120  # Of one kind in one thread; a life makes more only by beginning over.
LIFE_S = 4.0
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


class TracedDaemon(Daemon):
    """A daemon that strace kills, or stops, at its n-th system call of a kind."""

    injection = ""
    trace = Path(os.devnull)

    def start(self) -> None:
        """Start, under strace where there is an injection, and do not wait."""
        plain = [
            sys.executable,
            "-m",
            "meterd",
            *self._command[self._command.index("meterd") + 1 :],
        ]
        self._command = [*self._under(), *plain]
        super().start()

    def _under(self) -> list[str]:
        if not self.injection:
            return []
        program = shutil.which("strace")
        if program is None:
            raise FileNotFoundError("strace is not installed; these tests need it")
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
    def alive(self) -> bool:
        """Whether it lives."""
        return self._process is not None and self._process.poll() is None


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

        assert 0 == call("GET", f"{daemon.url}/v1/status")["dead_letters"]


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


async def _live(stage: Stage, daemon: TracedDaemon, rng: random.Random) -> None:
    """Feed one life over three transports until it ends, or for as long as a cycle may take."""
    deadline = time.monotonic() + LIFE_S
    while daemon.alive and time.monotonic() < deadline:
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


async def _lives(stage: Stage, points: Sequence[tuple[str, int]], rng: random.Random) -> int:
    """Live once for each point; how many lives ended at theirs."""
    reached = 0
    daemon = stage.daemon()
    with daemon:  # The first life binds and subscribes, so that the broker keeps what is published.
        daemon.wait_ready()
        await until(daemon, "adopted", lambda row: row["state"] == "active")
        daemon.kill()
        for name, number in points:
            daemon.injection = f"{name}:signal=KILL:when={number}"
            daemon.start()
            await _live(stage, daemon, rng)
            if daemon.alive:
                daemon.kill()
            else:
                reached += daemon.wait() == -signal.SIGKILL
        daemon.injection = ""
        daemon.start()
        daemon.wait_ready()
        for event in stage.waiting:
            assert _post(daemon, event)
        await stage.close(daemon)
        daemon.stop()
    return reached


async def _calls_of_a_cycle(stage: Stage, rng: random.Random) -> dict[str, int]:
    """How often each call is made from the start of a life through some cycles, at most."""
    daemon = stage.daemon()
    daemon.trace = stage.path / "trace"
    daemon.injection = f"{','.join(KILLED_AT)}:delay_enter=0"
    with daemon:
        daemon.wait_ready()
        await _live(stage, daemon, rng)
        daemon.kill()
    by_thread: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in daemon.trace.read_text().splitlines():
        if found := re.match(r"(\d+) +(\w+)\(", line):
            by_thread[found[2], found[1]] += 1
    most: dict[str, int] = {}
    for (name, _), times in by_thread.items():
        most[name] = max(times, most.get(name, 0))
    return most


async def test_daemon_killed_at_exact_calls_pays_what_was_used(tmp_path):
    """A seeded sample of the calls of the start and of a cycle, one life for each."""
    seed = _seed()
    rng = random.Random(seed)
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=True)
        most = await _calls_of_a_cycle(stage, rng)
        # Each kind has its share: the first calls are the start's, the others a cycle's.
        kinds = [*most, *rng.choices(list(most), k=max(0, CI_KILLS - len(most)))]
        chosen = [(name, 1 + rng.randrange(min(most[name], CYCLE_CALLS))) for name in kinds]
        reached = await _lives(stage, chosen, rng)
        print(f"{most}; {reached} of {len(chosen)} lives ended at their point")

        assert reached > len(chosen) // 2


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
async def test_daemon_killed_at_every_call_of_a_cycle_pays_what_was_used(tmp_path):
    """Each call of the start and of the cycles behind it, some hundred lives."""
    seed = _seed()
    rng = random.Random(seed)
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack, sources=True)
        most = await _calls_of_a_cycle(stage, rng)
    every = [
        (name, n) for name, times in most.items() for n in range(1, min(times, CYCLE_CALLS) + 1)
    ]
    for first in range(0, len(every), 40):
        path = tmp_path / str(first)
        path.mkdir()
        with ExitStack() as stack:
            points = every[first : first + 40]
            reached = await _lives(Stage(path, stack, sources=True), points, rng)
            print(f"{points[0]} to {points[-1]}: {reached} of {len(points)}")


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


async def test_daemon_held_up_between_check_and_write_pays_what_was_used(tmp_path):
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
