"""The loop that reads: deliveries -> bookkeeper -> commit -> ack, for each source, for ever.

Reading, deciding and committing overlap: while one batch is on its way to the disk the next is read
and decided. Acks go out in the order of the batches, each behind its own commit. A source that
breaks is connected again with back-off, however long it takes; what was read and not acked comes
again and is a duplicate then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import stamina

from meterd.bookkeeper import Bookkeeper, Recorded
from meterd.core.changes import Hold
from meterd.errors import SourceUnavailable, Unavailable
from meterd.logs import get_logger
from meterd.producers import CALLER
from meterd.sources import Deliveries, Source

log = get_logger(__name__)

T = TypeVar("T")

OVERLAP = 2  # Batches under way between reading and ack: one being decided, one being committed.
BACKOFF_MAX_S = 15.0
STEADY_S = 10.0  # A connection that held for so long was a good one: the next try comes at once.
LOOK_AT_DISK_S = 0.5  # A commit that takes longer may be waiting for room on the disk.


@dataclass(slots=True)
class SourceState:
    """What status, readiness and metrics say of a source. Times in wall ms."""

    name: str
    kind: str
    address: str
    connected: bool = False
    since: int = 0  # Of the last change of `connected`.
    error: str = "not connected yet"
    warning: str = ""  # The last gap or reset that the source saw.
    lag: int | None = None
    unacked: int = 0


class Intake:
    """All sources of one daemon, and the door for those that bring their own answer (HTTP)."""

    def __init__(
        self, bookkeeper: Bookkeeper, sources: Sequence[Source], *, pending_max: int
    ) -> None:
        self.sources = list(sources)
        self.states = {
            source.name: SourceState(source.name, source.kind, source.address) for source in sources
        }
        self._bookkeeper = bookkeeper
        self._pending_max = pending_max
        self._stopping = asyncio.Event()

    async def submit(self, source: str, deliveries: Deliveries) -> Recorded:
        """Record deliveries whose answer is their ack: they are durable when this returns.

        Raises `Unavailable` when meterd is stopping, its disk is full, or too much waits already.
        A disk that is found full by these very deliveries may still take them later: sent again
        they are duplicates then.
        """
        self._admit()
        deliveries.producer = deliveries.producer or CALLER.get()
        return await self._durable(self._bookkeeper.record(source, deliveries))

    async def capture(self, hold: Hold, quantity: str) -> Recorded:
        """Record what a hold's work really used. Raises `Unavailable`, as `submit` does."""
        self._admit()
        recorded = self._bookkeeper.capture(hold, quantity, CALLER.get())
        return await self._durable(recorded)

    def _admit(self) -> None:
        """Let deliveries in that somebody waits for, or raise `Unavailable`."""
        if self._stopping.is_set():
            raise Unavailable("meterd is stopping; send this again to the next one")
        if not self._bookkeeper.store.writable:
            raise Unavailable("the disk is full; send this again later")
        if self._bookkeeper.pending > self._pending_max:
            raise Unavailable("too many events wait for their commit; send this again later")

    async def _durable(self, recorded: Recorded) -> Recorded:
        """Wait until it is on the disk."""
        while not recorded.durable.done():
            # Unlike an await of it, this leaves the commit alone when the caller is cancelled.
            await asyncio.wait((recorded.durable,), timeout=LOOK_AT_DISK_S)
            if not recorded.durable.done() and not self._bookkeeper.store.writable:
                raise Unavailable("the disk is full; send this again later")
        recorded.durable.result()
        return recorded

    def stop(self) -> None:
        """Read no more. `run` returns when what was read is committed and acked."""
        self._stopping.set()

    async def run(self, source: Source) -> None:
        """Keep one source going until `stop`. Raises only what must end the process."""
        clock, breaks = self._bookkeeper.clock, 0
        while not self._stopping.is_set():
            await self._until_stop(self._connect(source))
            if self._stopping.is_set():
                break
            connected_at = clock.mono()
            with contextlib.suppress(SourceUnavailable):
                await self._flow(source)
            # Some brokers let us in and break off at once (a right that is missing, a second client
            # with our id): without a pause both sides would do nothing else.
            breaks = 0 if clock.mono() - connected_at > STEADY_S else min(breaks + 1, 10)
            pause = min(BACKOFF_MAX_S, 0.05 * 2**breaks) if breaks > 1 else 0.0
            await self._until_stop(asyncio.sleep(pause))
        await source.close()
        self._down(source, "stopped")

    async def _connect(self, source: Source) -> None:
        """Connect, however long it takes, and say so."""
        attempts = stamina.retry_context(
            on=SourceUnavailable,
            attempts=None,
            timeout=None,
            wait_initial=0.2,
            wait_max=BACKOFF_MAX_S,
        )
        async for attempt in attempts:
            with attempt:
                try:
                    position = self._bookkeeper.positions.get(source.name)
                    warnings = await source.connect(position)
                except SourceUnavailable as error:
                    self._down(source, str(error))
                    raise
        state = self.states[source.name]
        state.connected, state.error = True, ""
        state.since = self._bookkeeper.clock.wall()
        log.info(f"Connected to {source.address}.", action="source_connected", source=source.name)
        for warning in warnings:
            state.warning = warning
            log.warning(warning, action="source_gap", source=source.name)

    async def _flow(self, source: Source) -> None:
        """Read until the connection is gone or `stop`. Raises `SourceUnavailable`."""
        waiting: asyncio.Queue[tuple[Recorded, Deliveries] | None] = asyncio.Queue(OVERLAP - 1)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._acks(source, waiting), name=f"ack {source.name}")
                await self._reads(source, waiting)
                await waiting.put(None)
        except* SourceUnavailable as errors:
            error = errors.exceptions[0]
            self._down(source, str(error))
            log.warning(str(error), action="source_down", source=source.name)
            raise SourceUnavailable(str(error)) from None

    async def _reads(
        self, source: Source, waiting: asyncio.Queue[tuple[Recorded, Deliveries] | None]
    ) -> None:
        state = self.states[source.name]
        while not self._stopping.is_set():
            deliveries = await self._until_stop(source.read())
            if deliveries is None:
                return
            recorded = self._bookkeeper.record(source.name, deliveries)
            state.unacked += recorded.received
            await waiting.put((recorded, deliveries))

    async def _acks(
        self, source: Source, waiting: asyncio.Queue[tuple[Recorded, Deliveries] | None]
    ) -> None:
        state = self.states[source.name]
        while (item := await waiting.get()) is not None:
            recorded, deliveries = item
            await asyncio.shield(recorded.durable)
            await source.ack(deliveries)
            state.unacked -= recorded.received

    async def _until_stop(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Wait for work that may be cancelled without loss, or for `stop`, which gives None."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
        if not task.done():
            with contextlib.suppress(asyncio.CancelledError, SourceUnavailable):
                await task
            return None
        return task.result()

    def _down(self, source: Source, reason: str) -> None:
        state = self.states[source.name]
        if state.connected or not state.since:
            state.since = self._bookkeeper.clock.wall()
        if state.error != reason and not state.connected and not self._stopping.is_set():
            log.warning(
                f"Waiting for {source.address}: {reason}",
                action="source_waiting",
                source=source.name,
            )
        state.connected, state.error, state.unacked, state.lag = False, reason, 0, None

    async def watch_lag(self, interval_s: float) -> None:
        """Ask each connected source for its lag, for as long as the daemon runs."""
        while True:
            await asyncio.sleep(interval_s)
            for source in self.sources:
                state = self.states[source.name]
                if state.connected:
                    with contextlib.suppress(SourceUnavailable):
                        state.lag = await source.lag()
