"""The paid service of the demo: customers who use it, and its own account of what they used.

Its account is kept in decimals of the standard library and knows nothing of meterd's ledger, so
that the two can disagree.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal
from typing import Any, Protocol

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from redis.asyncio import Redis
from redis.exceptions import RedisError

from meterd.demo.stage import PAYER_KEY, Stage
from meterd.errors import MeterdError
from meterd.sdk import AsyncMeter

QUANTUM = Decimal("0.000001")
PUBLISH_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 20.0
HOLD_S = 60  # Longer than any restart.
PAYER = "agent_payer"

Event = dict[str, object]


@dataclass(slots=True)
class Customer:
    """One customer: what he uses, over which transport it is told, and what it comes to."""

    name: str
    plan: str
    transport: str
    deposit: str
    burst: int  # Calls at a time, at most.
    forgetful: bool = False  # His part of the service sends each event twice.
    roles: tuple[str, ...] = ("main",)  # Of his escrows, each with the deposit.
    agreement: str = ""
    escrows: dict[str, str] = field(default_factory=dict)
    events: int = 0
    used: Decimal = Decimal(0)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def payable(self) -> Decimal:
        """What must have been released in the end: the used amount, cut at the quantum."""
        return self.used.quantize(QUANTUM, ROUND_FLOOR)

    async def visit(self, way: Transport, gate: Gate, rng: random.Random) -> None:  # noqa: ARG002
        """Come to the service once. The gate is for those who are asked for money first."""
        events = self.use(rng)
        if events:
            await way.send(events + events if self.forgetful else events)

    async def leave(self, way: Transport) -> None:
        """Do what is done when the time is over, before the agreement is closed."""

    def use(self, rng: random.Random) -> list[Event]:
        """Use the service some times; the usage events that the service tells."""
        events: list[Event] = []
        for _ in range(rng.randint(1, self.burst)):
            events += self._call(rng)
        self.events += len(events)
        return events

    def _call(self, rng: random.Random) -> list[Event]:
        if self.plan == "calls":
            self.used += Decimal("0.001")
            return [self._event("calls", 1)]
        if self.plan == "speech":
            seconds = Decimal(rng.randint(36, 1800)) / 100
            self.used += seconds * Decimal("0.36") / 3600
            return [self._event("seconds", str(seconds))]
        tokens = {"input": rng.randint(50, 3000), "output": rng.randint(20, 800)}
        self.used += Decimal("0.0005") * tokens["input"] / 1000
        self.used += Decimal("0.002") * tokens["output"] / 1000
        return [
            self._event("tokens", count, {"kind": kind, "model": "m-large"})
            for kind, count in tokens.items()
        ]

    def _event(self, meter: str, quantity: object, dimensions: object = None) -> Event:
        event = self._told("", meter=meter, quantity=quantity)
        if dimensions is not None:
            event["dimensions"] = dimensions
        return event

    def _told(self, kind: str, **fields: object) -> Event:
        """An event with its id and time; of a kind, where it has one."""
        event: Event = {
            "id": f"{self.name.lower()}-{next(self.numbers)}",
            "source": "demo-service",
            "escrow_id": self.agreement,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **fields,
        }
        if kind:
            event["type"] = kind
        return event


class Transport(Protocol):
    """One way to meterd.

    `send` returns when the broker, or meterd itself, has taken the events over.
    """

    async def send(self, events: list[Event]) -> None:
        """Send usage events, again and again with the same ids until they are taken over."""


class Gate:
    """`POST /v1/authorize`: a call is reserved before it is served, and captured afterwards."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def reserve(self, agreement: str, meter: str) -> str:
        """Reserve one unit; the hold, or "" where the answer is no."""
        body = {"agreement": agreement, "meter": meter, "quantity": 1, "hold": HOLD_S}
        answer = await self._ask("/v1/authorize", body)
        return str(answer.get("hold", ""))

    async def capture(self, hold: str) -> None:
        """Turn a hold into usage; once more is no more usage. Raises `MeterdError`."""
        answer = await self._ask(f"/v1/holds/{hold}/capture", {})
        if "accepted" not in answer:
            raise MeterdError(f"hold {hold} is lost")

    async def _ask(self, path: str, body: object) -> Any:
        """Ask until answered: a daemon that was killed meanwhile has forgotten nothing."""
        url = f"{self._stage.addresses.daemon}{path}"
        while True:
            with contextlib.suppress(MeterdError):
                return await self._stage.call("POST", url, body, allowed=(402, 404))
            await asyncio.sleep(0.2)


class HttpTransport:
    """`POST /v1/events`, or another path: the answer means that the events are on the disk."""

    path = "/v1/events"

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def send(self, events: list[Event]) -> None:
        """Send until answered; a daemon that was killed meanwhile knows the ids again."""
        url = f"{self._stage.addresses.daemon}{self.path}"
        while True:
            with contextlib.suppress(MeterdError):
                await self._stage.call("POST", url, self._body(events))
                return
            await asyncio.sleep(0.2)

    def _body(self, events: list[Event]) -> object:
        return events


class OpenMeterTransport(HttpTransport):
    """OpenMeter's ingest call, as its clients make it."""

    path = "/api/v1/events"


class OtlpTransport(HttpTransport):
    """What an exporter of OpenTelemetry sends: here the events are spans."""

    path = "/v1/traces"

    def _body(self, events: list[Event]) -> object:
        return {"resourceSpans": [{"scopeSpans": [{"spans": events}]}]}


class SdkTransport:
    """The SDK's meter: whoever tells waits for nobody, and a spool keeps what meterd has not."""

    def __init__(self, stage: Stage) -> None:
        spool = stage.data_dir.with_name("usage-spool")
        self._meter = AsyncMeter(stage.addresses.daemon, spool=spool)
        # That meterd is down says the picture; a warning beside it would tear it.
        logging.getLogger("meterd.sdk").setLevel(logging.ERROR)

    async def send(self, events: list[Event]) -> None:
        """Tell; the meter brings it to meterd, again and again with the same ids."""
        for event in events:
            self._meter.tell(event)

    async def close(self) -> None:
        """Bring what is left. Raises `MeterdError`."""
        if left := await self._meter.aclose(CLOSE_TIMEOUT_S):
            raise MeterdError(f"{left} events of the SDK wait in its spool")


class RedisTransport:
    """`XADD`: one entry for each event, its JSON in the field `event`."""

    def __init__(self, port: int) -> None:
        self._client = Redis(host="127.0.0.1", port=port)

    async def send(self, events: list[Event]) -> None:
        """Send until the server has answered."""
        while True:
            with contextlib.suppress(RedisError, OSError):
                async with self._client.pipeline(transaction=False) as pipeline:
                    for event in events:
                        pipeline.xadd("meterd:usage", {"event": msgspec.json.encode(event)})
                    await pipeline.execute()
                return
            await asyncio.sleep(0.2)

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()


class MqttTransport:
    """QoS 1 to `meterd/usage/{escrow_id}/{meter}`."""

    def __init__(self, port: int) -> None:
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="demo-service")
        self._client.username_pw_set("demo-service")
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    async def send(self, events: list[Event]) -> None:
        """Send, and wait for each PUBACK."""
        sent = [
            self._client.publish(
                f"meterd/usage/{event['escrow_id']}/{event['meter']}",
                msgspec.json.encode(event),
                qos=1,
            )
            for event in events
        ]
        for message in sent:
            await asyncio.to_thread(message.wait_for_publish, PUBLISH_TIMEOUT_S)

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()


@contextlib.asynccontextmanager
async def transports(stage: Stage) -> AsyncIterator[dict[str, Transport]]:
    """Open the ways that the stage has; HTTP stands in for those it has not."""
    http = HttpTransport(stage)
    ways: dict[str, Transport] = {"http": http, "redis": http, "mqtt": http}
    ways |= {"openmeter": OpenMeterTransport(stage), "otlp": OtlpTransport(stage)}
    async with contextlib.AsyncExitStack() as stack:
        if stage.addresses.redis_port is not None:
            redis = RedisTransport(stage.addresses.redis_port)
            stack.push_async_callback(redis.close)
            ways["redis"] = redis
        if stage.addresses.mqtt_port is not None:
            mqtt = MqttTransport(stage.addresses.mqtt_port)
            stack.callback(mqtt.close)
            ways["mqtt"] = mqtt
        meter = SdkTransport(stage)
        stack.push_async_callback(meter.close)
        yield {**ways, "sdk": meter}


async def open_agreements(stage: Stage, customers: list[Customer]) -> None:
    """Each customer locks a deposit for the provider; the provider binds it to a plan."""
    for customer in customers:
        for role in customer.roles:
            customer.escrows[role] = await _lock(stage, customer, role)
        binding = {
            "plan": customer.plan,
            "payer": customer.name,
            "escrows": customer.escrows,
        }
        customer.agreement = customer.escrows[customer.roles[0]]
        url = f"{stage.addresses.daemon}/v1/agreements/{customer.agreement}"
        await stage.call("PUT", url, binding)


async def _lock(stage: Stage, customer: Customer, role: str) -> str:
    if role == "wallet":
        return PAYER  # A wallet is not locked.
    body = {
        "to_agent_id": "agent_provider",
        "amount": customer.deposit,
        "memo": f"demo:{customer.name}",
    }
    url = f"{stage.addresses.escrow}/api/v1/escrow"
    return str((await stage.call("POST", url, body, PAYER_KEY))["escrow_id"])


async def serve(
    customer: Customer, way: Transport, gate: Gate, until: asyncio.Event, seed: int
) -> None:
    """Serve one customer until the demo's time is over."""
    rng = random.Random(seed)  # noqa: S311 - believable traffic, no secret.
    while not until.is_set():
        await customer.visit(way, gate, rng)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.05, 0.6)):
                await until.wait()


def bad_event(customer: Customer) -> Event:
    """An event that no bill can be made of: it must end as a dead letter and disturb nobody."""
    return {
        "id": f"{customer.name.lower()}-broken",
        "source": "demo-service",
        "escrow_id": customer.agreement,
        "meter": "calls",
        "quantity": -5,
        "time": "yesterday",
    }
