"""The whole path as processes, killed again and again: every sum agrees in the end.

Real Redis, real Mosquitto, the sandbox and the daemon. Producers send over three transports at
once, some events more than once; the daemon dies by SIGKILL at random moments, and so do the
brokers. The test keeps its own sum, in another way than the daemon.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import paho.mqtt.client as paho
import pytest
import redis.asyncio

from tests.processes import Daemon, Sandbox, free_port, wait_until
from tests.servers import MosquittoServer, RedisServer

EVENTS = 20_000
CI_KILLS = 12  # The other 18 of CI's 30 strike at exact system calls: test_kill_points.py.
SOAK_KILLS = 2000
PRICES = {  # By plan and kind: USDC for one unit, as the configuration below says.
    ("stream", ""): Decimal("0.001"),
    ("tokens", "input"): Decimal("0.0005") / 1000,
    ("tokens", "output"): Decimal("0.002") / 1000,
}
CONFIG = """
[daemon]
data_dir = "{data_dir}"

[http]
listen = "127.0.0.1:{port}"

[escrow]
base_url = "{escrow}"
api_key = "{key}"
in_doubt_quarantine = "1s"
observe_gap = "200ms"
min_interval = "50ms"
request_timeout = "5s"
voids_per_day = 1000
doubts_max = 1000
release_max = "0.25"

[[sources]]
kind = "redis"
name = "redis"
url = "{redis}"
batch = 200

[[sources]]
kind = "mqtt"
name = "mqtt"
port = {mqtt}
batch = 200

[meters.units]
[meters.tokens]

[plans.stream]
pattern = "streaming"
rates = [{{ meter = "units", price = "0.001" }}]
settle = {{ units = "100", interval = "2s", min_release = "0.000001" }}

[plans.tokens]
pattern = "pay_per_token"
rates = [
    {{ meter = "tokens", price = "0.0005", per = 1000, where = {{ kind = "input" }} }},
    {{ meter = "tokens", price = "0.002", per = 1000, where = {{ kind = "output" }} }},
]
settle = {{ amount = "0.05", interval = "2s", min_release = "0.000001" }}
"""


@dataclass
class Workload:
    """Distinct events, and what they must add up to."""

    rng: random.Random
    agreements: dict[str, str]  # Escrow id -> plan.
    numbers: Iterator[int] = field(default_factory=itertools.count)
    counted: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    distinct: Counter[str] = field(default_factory=Counter)

    def event(self, transport: str) -> dict[str, object]:
        escrow, plan = self.rng.choice(list(self.agreements.items()))
        quantity = self.rng.randint(1, 2000 if plan == "tokens" else 3)
        kind = self.rng.choice(("input", "output")) if plan == "tokens" else ""
        self.counted[escrow, plan, kind] += quantity
        self.distinct[escrow] += 1
        event: dict[str, object] = {
            "id": f"{transport}-{next(self.numbers)}",
            "escrow_id": escrow,
            "meter": "tokens" if plan == "tokens" else "units",
            "quantity": quantity,
        }
        if kind:
            event["dimensions"] = {"kind": kind}
        return event

    def batches(self, transport: str, events: int, size: int) -> Iterator[list[dict[str, object]]]:
        """Cut into batches; about every tenth event comes twice, at once or in the next one."""
        again: list[dict[str, object]] = []
        for _ in range(events // size):
            fresh = [self.event(transport) for _ in range(size)]
            repeated = [event for event in fresh if self.rng.random() < 0.1]
            batch = fresh + repeated[::2] + again
            again = repeated[1::2]
            self.rng.shuffle(batch)
            yield batch
        if again:
            yield again

    def owed(self, escrow: str) -> Decimal:
        return sum(
            (
                PRICES[plan, kind] * quantity
                for (of, plan, kind), quantity in self.counted.items()
                if of == escrow
            ),
            Decimal(0),
        )


async def _feed_redis(server: RedisServer, workload: Workload, events: int) -> None:
    client = redis.asyncio.Redis.from_url(server.url)
    async with client:
        for batch in workload.batches("redis", events, 100):
            async with client.pipeline(transaction=False) as pipeline:
                for event in batch:
                    if "dimensions" in event or workload.rng.random() < 0.5:
                        pipeline.xadd("meterd:usage", {"event": json.dumps(event)})
                    else:
                        pipeline.xadd("meterd:usage", event)
                await pipeline.execute()
            await asyncio.sleep(workload.rng.uniform(0, 0.3))


async def _feed_mqtt(server: MosquittoServer, workload: Workload, events: int) -> None:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    try:
        for batch in workload.batches("mqtt", events, 100):
            sent = [
                client.publish(
                    f"meterd/usage/{event['escrow_id']}/{event['meter']}", json.dumps(event), qos=1
                )
                for event in batch
            ]
            for info in sent:
                await asyncio.to_thread(info.wait_for_publish, 30)
            await asyncio.sleep(workload.rng.uniform(0, 0.3))
    finally:
        client.disconnect()
        client.loop_stop()


async def _feed_http(url: str, workload: Workload, events: int) -> None:
    """A producer that sends again, with the same ids, until it is told that all is durable."""
    async with aiohttp.ClientSession() as session:
        for batch in workload.batches("http", events, 50):
            while not await _post(session, url, batch):
                await asyncio.sleep(0.1)
            await asyncio.sleep(workload.rng.uniform(0, 0.1))


async def _post(session: aiohttp.ClientSession, url: str, batch: list[dict[str, object]]) -> bool:
    try:
        async with session.post(f"{url}/v1/events", json=batch) as response:
            if response.status != 200:
                return False
            answer = await response.json()
    except (aiohttp.ClientError, ConnectionError):
        return False

    assert answer["rejected"] == []
    return True


async def _kill_again_and_again(daemon: Daemon, rng: random.Random, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(rng.uniform(0.05, 2.0))
        daemon.kill()
        daemon.start()
        if rng.random() < 0.7:  # Else it is killed while it starts.
            await asyncio.to_thread(daemon.wait_ready)


@dataclass(frozen=True)
class World:
    """All the processes, and what the producers send."""

    daemon: Daemon
    sandbox: Sandbox
    redis: RedisServer
    mosquitto: MosquittoServer
    workload: Workload
    session: aiohttp.ClientSession

    async def settle(self) -> None:
        """All is counted, closed and paid, exactly; the daemon stops in order."""
        self.daemon.wait_ready()
        # Behind what was sent before, so that no repetition comes for a closed agreement.
        await _feed_all(self, [self.workload.event(name) for name in ("mqtt", "redis")])
        await wait_until(lambda: _equal(self._counted, dict(self.workload.distinct)), 60)
        for escrow in self.workload.agreements:
            url = f"{self.daemon.url}/v1/agreements/{escrow}/close"
            async with self.session.post(url, json={"reason": "the test ends"}) as response:
                assert response.status < 300
        try:
            await wait_until(self._closed, 60)
        except AssertionError:
            print(json.dumps(await self._page(), indent=1))
            raise
        await _check_sums(self.session, self.daemon, self.sandbox, self.workload)
        await _check_drained(self.session, self.daemon, self.redis)
        self.daemon.stop()

        assert self.daemon.returncode == 0

    async def connected(self) -> bool:
        """Whether every source is."""
        async with self.session.get(f"{self.daemon.url}/readyz") as response:
            return response.status == 200

    async def _page(self) -> list[dict[str, Any]]:
        async with self.session.get(f"{self.daemon.url}/v1/agreements?limit=100") as response:
            return list((await response.json())["items"])

    async def _counted(self) -> dict[str, int]:
        return {row["id"]: row["events"] for row in await self._page()}

    async def _closed(self) -> bool:
        return all(row["state"] == "closed" for row in await self._page())


@asynccontextmanager
async def _world(path: Path, rng: random.Random) -> AsyncIterator[World]:
    """Everything started, six agreements bound."""
    with (
        RedisServer() as redis_server,
        MosquittoServer() as mosquitto,
        Sandbox(path / "sandbox") as sandbox,
    ):
        port = free_port()
        agreements = {
            sandbox.lock("20.00", memo=f"agreement {number}"): plan
            for number, plan in enumerate(["stream", "tokens"] * 3)
        }
        config = CONFIG.format(
            data_dir=path / "state",
            port=port,
            escrow=sandbox.api,
            key=sandbox.provider_key,
            redis=redis_server.url,
            mqtt=mosquitto.port,
        )
        for escrow, plan in agreements.items():
            config += f'\n[[agreements]]\nplan = "{plan}"\nescrows = {{ main = "{escrow}" }}\n'
        (path / "meterd.toml").write_text(config)
        async with aiohttp.ClientSession() as session:
            with Daemon(path / "meterd.toml", port) as daemon:
                daemon.wait_ready()
                workload = Workload(rng, agreements)
                yield World(daemon, sandbox, redis_server, mosquitto, workload, session)


def _seed() -> int:
    seed = int(os.environ.get("METERD_SEED", random.SystemRandom().randrange(2**32)))
    print(f"METERD_SEED={seed}")
    return seed


async def _killed_again_and_again(path: Path, seed: int) -> int:
    """Kill the daemon under load, then settle; how many kills."""
    rng = random.Random(seed)
    async with _world(path, rng) as world:
        daemon, workload = world.daemon, world.workload
        async with asyncio.TaskGroup() as group:
            group.create_task(_feed_redis(world.redis, workload, EVENTS * 2 // 5))
            group.create_task(_feed_mqtt(world.mosquitto, workload, EVENTS * 3 // 10))
            group.create_task(_feed_http(daemon.url, workload, EVENTS * 3 // 10))
            group.create_task(_kill_again_and_again(daemon, rng, CI_KILLS))

        assert sum(workload.distinct.values()) == EVENTS

        await world.settle()
        return daemon.kills


async def test_daemon_killed_at_random_moments_pays_exactly_what_was_used(tmp_path: Path) -> None:
    """No kill loses a unit, counts one twice, or pays a quantum too much or too little."""
    kills = await _killed_again_and_again(tmp_path, _seed())
    print(f"{kills} kills at random moments: nothing lost, doubled or overpaid")

    assert kills == CI_KILLS


@pytest.mark.soak
@pytest.mark.timeout(8 * 3600)
async def test_daemon_killed_two_thousand_times_pays_exactly_what_was_used(tmp_path: Path) -> None:
    """The same, from seed after seed, on a new store each time."""
    seed, kills = _seed(), 0
    while kills < SOAK_KILLS:
        path = tmp_path / str(seed)
        path.mkdir()
        kills += await _killed_again_and_again(path, seed)
        print(f"METERD_SEED={seed}: {kills} kills in all, nothing lost, doubled or overpaid")
        shutil.rmtree(path)
        seed += 1


async def _feed_all(world: World, events: Sequence[dict[str, object]]) -> None:
    """Publish over MQTT with QoS 1, and the same into Redis, each until its broker has taken it."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.reconnect_delay_set(1, 1)
    client.connect("127.0.0.1", world.mosquitto.port)
    client.loop_start()
    stream = redis.asyncio.Redis.from_url(world.redis.url)
    try:
        for event in events:
            if str(event["id"]).startswith("mqtt"):
                await _published(client, event)
            else:
                await _added(stream, event)
    finally:
        await stream.aclose()
        client.disconnect()
        client.loop_stop()


async def _published(client: paho.Client, event: dict[str, object]) -> None:
    topic = f"meterd/usage/{event['escrow_id']}/{event['meter']}"
    while True:
        info = client.publish(topic, json.dumps(event), qos=1)
        try:
            while not info.is_published():
                await asyncio.sleep(0.001)
        except RuntimeError:  # Not connected: it may or may not go out later, so it goes again.
            await asyncio.sleep(0.1)
        else:
            return


async def _added(stream: redis.asyncio.Redis, event: dict[str, object]) -> None:
    while True:
        try:
            await stream.xadd("meterd:usage", {"event": json.dumps(event)})
        except (redis.exceptions.RedisError, OSError):
            await asyncio.sleep(0.1)
        else:
            return


async def test_brokers_killed_under_load_cost_nothing_when_the_producer_sends_again(
    tmp_path: Path,
) -> None:
    """Redis, and Mosquitto, which forgets its last second: what is sent again is counted once."""
    rng = random.Random(_seed())
    async with _world(tmp_path, rng) as world:
        await wait_until(world.connected, 30)
        events = [world.workload.event(name) for _ in range(1500) for name in ("mqtt", "redis")]

        async def kill(server: RedisServer | MosquittoServer, times: int) -> None:
            for _ in range(times):
                await asyncio.sleep(rng.uniform(0.3, 1.5))
                server.kill()
                await asyncio.sleep(rng.uniform(0, 0.5))
                await asyncio.to_thread(server.start)

        async with asyncio.TaskGroup() as group:
            group.create_task(_feed_all(world, events))
            group.create_task(kill(world.redis, 2))
            group.create_task(kill(world.mosquitto, 2))
        # The session may be among what Mosquitto forgot; without one it keeps nothing.
        await wait_until(world.connected, 60)
        await _feed_all(world, events)
        await world.settle()


async def _equal(read: object, expected: dict[str, int]) -> bool:
    return await read() == expected  # type: ignore[operator]


async def _check_sums(
    session: aiohttp.ClientSession, daemon: Daemon, sandbox: Sandbox, workload: Workload
) -> None:
    """Counters, accrued, and the service's own log against the test's own sum."""
    for escrow, plan in workload.agreements.items():
        async with session.get(f"{daemon.url}/v1/agreements/{escrow}/usage") as response:
            usage = await response.json()
        async with session.get(f"{daemon.url}/v1/agreements/{escrow}") as response:
            agreement = await response.json()
        counted = {
            row["dimensions"].get("kind", ""): Decimal(row["quantity"]) for row in usage["items"]
        }
        expected = {
            kind: Decimal(quantity)
            for (of, _, kind), quantity in workload.counted.items()
            if of == escrow
        }
        paid = sum((Decimal(row["amount"]) for row in sandbox.operations(escrow)), Decimal(0))
        owed = workload.owed(escrow)

        assert counted == expected, plan
        assert Decimal(agreement["accrued"]) == owed
        assert paid == owed.quantize(Decimal("0.000001"), rounding="ROUND_FLOOR")


async def _check_drained(
    session: aiohttp.ClientSession, daemon: Daemon, server: RedisServer
) -> None:
    async def drained() -> bool:
        async with session.get(f"{daemon.url}/v1/status") as response:
            status = await response.json()
        return all(row["unacked"] == 0 for row in status["sources"])

    await wait_until(drained, 20)

    async def group_at_the_end() -> bool:
        client = redis.asyncio.Redis.from_url(server.url)
        async with client:
            stream = await client.xinfo_stream("meterd:usage")
            groups = await client.xinfo_groups("meterd:usage")
        return [g["last-delivered-id"] for g in groups] == [stream["last-generated-id"]]

    await wait_until(group_at_the_end, 20)
    async with session.get(f"{daemon.url}/v1/status") as response:
        status = await response.json()

    assert status["dead_letters"] == 0
