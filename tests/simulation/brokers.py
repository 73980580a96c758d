"""Two brokers as bad as real ones: a stream read by position, a session of acked messages.

Both forget what they had not synced when they are restarted, and tell a producer "done" only once
it is synced: until then the producer keeps it and sends it again. Both lose their connections now
and then. What a daemon acknowledges they may throw away.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meterd.core.events import Reason
from meterd.errors import SourceUnavailable
from meterd.sources import Deliveries, Fault
from tests.simulation.events import Event

Told = Callable[[str, Sequence[Event]], None]  # The broker was told "done" of these by meterd.


class Broker:
    """What the two have in common: connections, being away, and producers that wait for a sync."""

    name = ""

    def __init__(self, rng: random.Random, trace: Callable[[str], None], told: Told) -> None:
        self.up = True
        self.epoch = 0  # Of the connection that is valid.
        self.limit = rng.choice((2, 5, 20))  # Deliveries in one read.
        self._rng = rng
        self._trace = trace
        self._told = told
        self._unsynced: list[Event] = []
        self._changed = asyncio.Event()

    @property
    def quiet(self) -> bool:
        """Whether every producer knows that its events are safe."""
        return not self._unsynced

    def publish(self, event: Event) -> None:
        """Take an event from a producer, who keeps it until a sync."""
        self._unsynced.append(event)
        if self.up:
            self._enter(event)
        self._trace(f"{self.name} gets {event}")
        self.wake()

    def wake(self) -> None:
        """Let a read that waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def drop(self) -> None:
        """Lose every connection."""
        self.epoch += 1
        self.wake()

    def sync(self) -> None:
        """Make durable what is here; its producers are told."""
        if self.up:
            self._keep()
            self._unsynced.clear()

    def stop(self) -> None:
        """Go away, and forget what was not synced."""
        self._trace(f"{self.name} stops")
        self.up = False
        self.drop()
        self._forget()

    def start(self) -> None:
        """Come back; producers send again what they were not told to be safe."""
        if self.up:
            return
        self._trace(f"{self.name} starts")
        self.up = True
        again = list(self._unsynced)
        self._rng.shuffle(again)
        for event in again:
            self._enter(event)
        self.wake()

    def check(self, epoch: int) -> None:
        """Raise `SourceUnavailable` when a connection is gone."""
        if not self.up or epoch != self.epoch:
            raise SourceUnavailable(f"{self.name} lost the connection")

    async def changed(self) -> None:
        """Wait until something happens here."""
        await self._changed.wait()

    def _enter(self, event: Event) -> None: ...

    def _keep(self) -> None: ...

    def _forget(self) -> None: ...


class StreamBroker(Broker):
    """A stream: entries have numbers, readers go on behind a position, old entries are trimmed."""

    name = "redis"

    def __init__(self, rng: random.Random, trace: Callable[[str], None], told: Told) -> None:
        super().__init__(rng, trace, told)
        self.run = 0  # Another one after each restart.
        self.entries: list[tuple[int, Event]] = []
        self._last = 0
        self._marker = 0  # The group's last delivered id: what lies before may be trimmed.
        self._synced: tuple[list[tuple[int, Event]], int, int] = ([], 0, 0)

    def ack(self, number: int) -> None:
        """Move the group's marker."""
        done = [event for place, event in self.entries if self._marker < place <= number]
        self._told(self.name, done)
        self._marker = max(self._marker, number)

    def trim(self) -> None:
        """Throw away what the group has behind it."""
        self.entries = [entry for entry in self.entries if entry[0] > self._marker]

    def _enter(self, event: Event) -> None:
        self._last += 1
        self.entries.append((self._last, event))

    def _keep(self) -> None:
        self._synced = (list(self.entries), self._last, self._marker)

    def _forget(self) -> None:
        self.run += 1
        entries, self._last, self._marker = self._synced
        self.entries = list(entries)


class StreamSource:
    """Reads the stream from a position that meterd stores itself."""

    name = "redis"
    kind = "redis"
    address = "redis://simulated"

    def __init__(self, broker: StreamBroker) -> None:
        self._broker = broker
        self._epoch = -1
        self._at = 0

    async def connect(self, position: str | None) -> Sequence[str]:
        broker = self._broker
        await asyncio.sleep(broker._rng.random() * 0.1)
        if not broker.up:
            raise SourceUnavailable("redis is away")
        broker.epoch += 1
        self._epoch = broker.epoch
        run, _, number = (position or f"{broker.run}:0").partition(":")
        self._at = int(number)
        if int(run) != broker.run:
            self._at = 0  # Numbers may have been given twice: read again what is there.
            return ["the stream's server was restarted"]
        return []

    async def read(self) -> Deliveries:
        broker = self._broker
        while True:
            broker.check(self._epoch)
            found = [entry for entry in broker.entries if entry[0] > self._at][: broker.limit]
            if found:
                break
            await broker.changed()
        self._at = found[-1][0]
        events = [event for _, event in found]
        return Deliveries(
            payloads=[event.payload for event in events],
            ids=[f"{broker.run}-{number}" for number, _ in found],
            fields=[dict(event.fields) for event in events],
            position=f"{broker.run}:{self._at}",
            receipt=(self._epoch, self._at),
        )

    async def ack(self, deliveries: Deliveries) -> None:
        epoch, number = deliveries.receipt  # type: ignore[misc]
        if self._broker._rng.random() < 0.5:
            await asyncio.sleep(self._broker._rng.random() * 0.02)
        self._broker.check(epoch)
        self._broker.ack(number)

    async def lag(self) -> int | None:
        self._broker.check(self._epoch)
        return sum(1 for number, _ in self._broker.entries if number > self._at)

    async def close(self) -> None:
        self._epoch = -1


@dataclass(frozen=True)
class Receipt:
    """The packets of one read, in the connection that they came by."""

    epoch: int
    numbers: tuple[int, ...]


class SessionBroker(Broker):
    """A session at QoS 1: a message stays until it is acked, and comes again on a reconnect."""

    name = "mqtt"

    def __init__(self, rng: random.Random, trace: Callable[[str], None], told: Told) -> None:
        super().__init__(rng, trace, told)
        self.messages: dict[int, Event] = {}
        self.disorder = ""  # Set when acknowledgements do not come in the order of the messages.
        self._last = 0
        self._acked = 0
        self._synced: dict[int, Event] = {}

    def connected(self) -> int:
        """Begin a connection; everything comes again."""
        self.epoch += 1
        self._acked = 0
        return self.epoch

    def ack(self, numbers: Sequence[int]) -> None:
        """Forget messages."""
        for number in numbers:
            if number <= self._acked:
                self.disorder = f"mqtt: {number} was acknowledged behind {self._acked}"
            self._acked = max(self._acked, number)
        self._told(self.name, [self.messages[one] for one in numbers if one in self.messages])
        for number in numbers:
            self.messages.pop(number, None)

    def _enter(self, event: Event) -> None:
        self._last += 1
        self.messages[self._last] = event

    def _keep(self) -> None:
        self._synced = dict(self.messages)

    def _forget(self) -> None:
        self.messages = dict(self._synced)


class SessionSource:
    """Reads the session's messages; what their topic says goes beside the payload."""

    name = "mqtt"
    kind = "mqtt"
    address = "mqtt://simulated"

    def __init__(self, broker: SessionBroker) -> None:
        self._broker = broker
        self._epoch = -1
        self._at = 0

    async def connect(self, _: str | None) -> Sequence[str]:
        await asyncio.sleep(self._broker._rng.random() * 0.1)
        if not self._broker.up:
            raise SourceUnavailable("mqtt is away")
        self._epoch = self._broker.connected()
        self._at = 0
        return []

    async def read(self) -> Deliveries:
        broker = self._broker
        while True:
            broker.check(self._epoch)
            found = [entry for entry in broker.messages.items() if entry[0] > self._at]
            if found:
                break
            await broker.changed()
        found = found[: broker.limit]
        self._at = found[-1][0]
        events = [event for _, event in found]
        return Deliveries(
            payloads=[event.payload for event in events],
            fields=[dict(event.fields) for event in events],
            faults={
                place: Fault(Reason.RETAINED, "a retained message")
                for place, event in enumerate(events)
                if event.retained
            },
            receipt=Receipt(self._epoch, tuple(number for number, _ in found)),
        )

    async def ack(self, deliveries: Deliveries) -> None:
        receipt = deliveries.receipt
        assert isinstance(receipt, Receipt)
        if self._broker._rng.random() < 0.5:
            await asyncio.sleep(self._broker._rng.random() * 0.02)
        self._broker.check(receipt.epoch)
        self._broker.ack(receipt.numbers)

    async def lag(self) -> int | None:
        return None

    async def close(self) -> None:
        self._epoch = -1
