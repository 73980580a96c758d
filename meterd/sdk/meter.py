"""The meters: programs tell what was used, and a thread of their own brings it to meterd.

The rule kept here: an event gets its id and its time when it is told, and keeps them, so that
whatever is sent again is a duplicate and never a second charge. To tell of an event waits for
nobody: neither for meterd nor for a network.

One thread sends, for programs that wait and for those that await alike: a loop that is busy delays
no event, and one that has ended loses none. It takes up to `batch_events` at a time, in the order
in which they were told, and goes on with the next when meterd has them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from meterd.sdk import delivery
from meterd.sdk.failures import BadUsage, NotKept, Unsent
from meterd.sdk.spool import Fsync, Memory, Numbers, Spool
from meterd.sdk.usage import Quantity, Rejected, completed, encode, event_of
from meterd.sdk.wire import Place, Wire

log = logging.getLogger("meterd.sdk")

URL = "http://127.0.0.1:8787"
WINDOW_S = 72 * 3600  # Meterd's `dedupe.window`: what is older waits there for a person.
FLUSH_EVERY_S = 1.0
CLOSE_S = 5.0
JOIN_S = 1.0
NOT_SENT = "not_sent"
OnRejected = Callable[[Rejected], None]


@dataclass(frozen=True, slots=True)
class _Options:
    """How a meter behaves; see `Meter`."""

    source: str
    spool: Path | None
    bytes_max: int
    fsync: Fsync
    numbered: bool
    batch_events: int
    batch_bytes: int
    batch_wait_s: float
    timeout_s: float
    when_full: str
    on_rejected: OnRejected | None

    def __post_init__(self) -> None:
        checks = (
            (self.fsync in {"never", "second", "each"}, 'fsync is "never", "second" or "each"'),
            (self.when_full in {"raise", "report"}, 'when_full is "raise" or "report"'),
            (1 <= self.batch_events <= 20_000, "batch_events is from 1 to 20000"),
            (0 < self.batch_bytes <= 4_000_000, "batch_bytes is from 1 to 4000000"),
            (self.bytes_max > 0, "bytes_max is more than 0"),
            (self.batch_wait_s >= 0, "batch_wait_s is 0 or more"),
            (self.timeout_s > 0, "timeout_s is more than 0"),
            (not self.numbered or self.spool is not None, "numbered=True wants a spool"),
            (not self.numbered or self.source != "", "numbered=True wants a source of its own"),
        )
        wrong = [what for right, what in checks if not right]
        if wrong:
            raise BadUsage("; ".join(wrong))


class _Open:
    """What a meter has open in one process: its queue, and the thread that empties it.

    `lock` guards the queue and the figures. `told` and `over` count events from the beginning, so
    that a flush knows what it waits for. A second thread flushes the spool to the disk: a request
    that hangs must not keep it from that.
    """

    def __init__(self, place: Place, options: _Options) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.options = options
        spool = None
        if options.spool is not None:
            spool = Spool(options.spool, options.bytes_max, options.fsync)
        self.spool = spool
        self.queue = spool or Memory(options.bytes_max)
        self.numbers: Numbers | None = None
        if options.numbered and spool is not None:
            try:
                self.numbers = Numbers(spool, options.source)
            except BaseException:
                spool.close()
                raise
        self.told = self.queue.pending
        self.over = 0
        self.closing = False
        self._waiting = 0  # So many wait for the queue to be empty: do not linger.
        self._ended = threading.Event()
        self._idle = True
        self._failures = 0
        self._wire = Wire(place, options.timeout_s)
        self._part = options.batch_events
        if spool is not None and spool.recovered:
            log.info("%d events of an earlier process wait in %s", spool.recovered, options.spool)
        self.thread = threading.Thread(target=self._run, name="meterd-meter", daemon=True)
        self.thread.start()
        if spool is not None and options.fsync == "second":
            threading.Thread(target=self._flush, name="meterd-spool", daemon=True).start()

    # -- Telling -----------------------------------------------------------------------------------

    def keep(self, event: dict[str, Any]) -> None:
        """Keep one event. Raises `BadUsage` and `NotKept`."""
        with self.lock:
            if self.closing:
                raise NotKept("the meter is closed")
            if self.numbers is None:
                self.queue.append(encode(event))
            else:
                number = self.numbers.last + 1
                self.queue.append(encode({**event, "sequence": number}))
                self.numbers.last = number
            self.told += 1
            if self._idle or self.queue.pending >= self.options.batch_events:
                self.changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all that was told so far is over; whether it is."""
        with self.lock:
            wanted = self.told
            self._waiting += 1
            self.changed.notify_all()
            try:
                return self.changed.wait_for(lambda: self.over >= wanted, timeout_s)
            finally:
                self._waiting -= 1

    def end(self, timeout_s: float) -> int:
        """Send what is left, for so long, and stop; how many events are left then."""
        self.wait(timeout_s)
        with self.lock:
            self.closing = True
            self.changed.notify_all()
        # A request that hangs is not waited for: what it carries stays, and may come twice.
        self.thread.join(JOIN_S)
        with self.lock:
            self._ended.set()
            left = self.queue.pending
            if self.numbers is not None:
                self.numbers.close()
            self.queue.close()
        return left

    # -- Sending, on the thread --------------------------------------------------------------------

    def _run(self) -> None:
        old = self.spool is not None and self.spool.recovered > 0
        while self._gather():
            try:
                with self.lock:
                    batch = self.queue.peek(self._part, self.options.batch_bytes)
                if batch and old:
                    _warn_of_age(batch[0])
                old = False
                if batch:
                    self._send(batch)
            except Exception as error:
                # A thread that ended here would keep every later event for ever.
                log.exception("the meter failed by a mistake of its own, and goes on")
                self._failed(str(error), None, b"{}")
        self._wire.close()

    def _gather(self) -> bool:
        """Wait for events, and a moment for more of them; False: it is over."""
        with self.lock:
            self._idle = True
            while not self.queue.pending and not self.closing:
                self.changed.wait()
            self._idle = False
            until = time.monotonic() + self.options.batch_wait_s
            while not self._hurries() and (left := until - time.monotonic()) > 0:
                self.changed.wait(left)
            return not self.closing

    def _hurries(self) -> bool:
        options, queue = self.options, self.queue
        many = queue.pending >= options.batch_events or queue.pending_bytes >= options.batch_bytes
        return self.closing or self._waiting > 0 or many

    def _send(self, batch: list[bytes]) -> None:
        reply = self._wire.post(delivery.PATH, delivery.body_of(batch))
        match delivery.read(reply, batch):
            case delivery.Taken(rejected):
                self._taken(len(batch), rejected)
            case delivery.TooMuch(why) if len(batch) > 1:
                self._part = max(1, len(batch) // 2)
                log.info("meterd refused %d events at once (%s); half of them", len(batch), why)
            case delivery.TooMuch(why):
                self._taken(1, (delivery.rejected(batch[0], NOT_SENT, why),))
            case delivery.Again(why, after_s):
                self._failed(why, after_s, batch[0])

    def _taken(self, count: int, rejected: tuple[Rejected, ...]) -> None:
        for one in rejected:
            report(one, self.options.on_rejected)
        if self._failures:
            log.info("meterd takes events again")
        self._failures = 0
        with self.lock:
            if self._ended.is_set():
                return
            if self.numbers is not None:
                self.numbers.keep()  # Where it fails, what was taken is sent again: a duplicate.
            self.queue.done(count)
            self.over += count
            self._part = min(self.options.batch_events, self._part * 2)
            self.changed.notify_all()

    def _failed(self, why: str, after_s: int | None, oldest: bytes) -> None:
        self._failures += 1
        if self._failures == 1:
            log.warning("meterd does not take events; they wait and are sent again: %s", why)
            _warn_of_age(oldest)
        now = time.monotonic()
        until = now + delivery.pause_s(self._failures, after_s)
        hurried = now + (after_s or delivery.PAUSE_FIRST_S)
        with self.lock:
            while not self.closing:
                # Who waits for a flush wants to know soon when meterd is back.
                left = (min(until, hurried) if self._waiting else until) - time.monotonic()
                if left <= 0:
                    return
                self.changed.wait(left)

    # -- Flushing to the disk, on a thread of its own ----------------------------------------------

    def _flush(self) -> None:
        assert self.spool is not None
        while not self._ended.wait(FLUSH_EVERY_S):
            with self.lock:
                copies = [] if self._ended.is_set() else self.spool.unflushed()
            for copy in copies:
                try:
                    os.fsync(copy)
                except OSError as error:
                    log.error("the spool %s cannot be flushed: %s", self.spool.directory, error)
                finally:
                    os.close(copy)


def report(one: Rejected, on_rejected: OnRejected | None) -> None:
    """Tell the program of an event that was not taken for usage: never silently."""
    if on_rejected is None:
        log.error("the event %s was not taken for usage: %s: %s", one.id, one.reason, one.detail)
        return
    try:
        on_rejected(one)
    except Exception:
        log.exception("on_rejected failed for the event %s (%s)", one.id, one.reason)


def _warn_of_age(oldest: bytes) -> None:
    """Warn of events that meterd will keep as `late`."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        at = datetime.fromisoformat(str(msgspec.json.decode(oldest)["time"]))
        age = (datetime.now(UTC) - at).total_seconds()
        if age > WINDOW_S:
            log.warning(
                "the oldest event that waits is %d hours old: meterd keeps what is older than its"
                " dedupe.window (72 hours) as late, for a person, and charges nothing for it",
                age // 3600,
            )


class Meter:
    """Tells meterd what was used. Threads share one; make one for a process and keep it.

    url           where meterd is: "http://127.0.0.1:8787", "https://…", "unix:/run/…/http.sock".
    token         its token with the scope `ingest`; "": meterd has no tokens.
    source        who tells, such as "svc-a": identity is (source, id). "": meterd's own name for
                  HTTP.
    spool         a directory for events that meterd has not taken yet. None: they are in memory
                  alone, and end with the process. Several processes may share a directory.
    bytes_max     how much may wait, in bytes.
    fsync         when the spool is flushed: "second", "each" (each event waits for the disk) or
                  "never". Without any of it, a process that is killed loses nothing of a spool;
                  this is about power that fails.
    numbered      give each event a `sequence`, so that meterd sees what is missing. Wants a spool,
                  and a source that no other process has.
    batch_events  at most so many events in a request,
    batch_bytes   at most so many bytes,
    batch_wait_s  and so long does the first of them wait for more, in seconds.
    timeout_s     for one request.
    when_full     where an event cannot be kept: "raise" `NotKept`, or "report" it as rejected with
                  the reason `not_sent`, where a lost event is better than a lost customer.
    on_rejected   called on the meter's thread for each event that was not taken for usage; None:
                  it is logged as an error under "meterd.sdk".
    trusted       send the token over plain http to another machine: the network is your own.
    tls           an `ssl.SSLContext`, for an authority of your own; None: the system's.
    secret        the key that each request is signed with, "whsec_…", where meterd knows this
                  producer by it.

    Raises `BadUsage` for options that cannot be meant. A child made by fork opens its own on its
    first event.
    """

    def __init__(
        self,
        url: str = URL,
        token: str = "",
        *,
        source: str = "",
        spool: str | os.PathLike[str] | None = None,
        bytes_max: int = 64 * 1024 * 1024,
        fsync: Fsync = "second",
        numbered: bool = False,
        batch_events: int = 1000,
        batch_bytes: int = 1024 * 1024,
        batch_wait_s: float = 0.05,
        timeout_s: float = 10.0,
        when_full: Literal["raise", "report"] = "raise",
        on_rejected: OnRejected | None = None,
        trusted: bool = False,
        tls: Any = None,
        secret: str = "",
    ) -> None:
        self._place = Place(url, token, trusted, tls, secret)
        self._options = _Options(
            source=source,
            spool=None if spool is None else Path(spool),
            bytes_max=bytes_max,
            fsync=fsync,
            numbered=numbered,
            batch_events=batch_events,
            batch_bytes=batch_bytes,
            batch_wait_s=batch_wait_s,
            timeout_s=timeout_s,
            when_full=when_full,
            on_rejected=on_rejected,
        )
        self._opening = threading.Lock()
        self._open: _Open | None = None
        self._closed = False

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Open the spool, and begin to send what an earlier process has left in it.

        The first event does it too. Raises `NotKept` where the spool cannot be used.
        """
        self._opened()

    def emit(
        self,
        agreement: str,
        meter: str,
        quantity: Quantity = 1,
        *,
        dimensions: Mapping[str, str] | None = None,
        id: str | None = None,  # noqa: A002  # Its name in the event.
        time: datetime | None = None,
        hold: str = "",
        price: Quantity | None = None,
        value: str = "",
    ) -> str:
        """Tell of usage; the event's id. With a spool it survives a kill from the return on.

        agreement   who pays: an agreement's id, or that of its escrow where there is one.
        meter       what was used.
        quantity    how much, in the meter's unit: above 0, at most 1e15, at most 9 decimals; an
                    `int`, a `Decimal` or a decimal text, never a float.
        dimensions  what the price looks at, such as {"model": "m-large", "kind": "output"}.
        id          your own, where you have one that is made once for this usage; None: a new one.
        time        when it was used, with a time zone; None: now.
        hold        the hold that this usage captures.
        price       USDC for a unit, where the plan's rate is dynamic.
        value       what a meter of unique values counts.

        Waits for nobody. Raises `BadUsage`, and `NotKept` where there is no room left (with
        `when_full="report"` it is handed to `on_rejected` instead).
        """
        event = event_of(
            agreement,
            meter,
            quantity,
            dimensions=dimensions,
            id=id,
            time=time,
            hold=hold,
            price=price,
            value=value,
        )
        return self.tell(event)

    def tell(self, event: Mapping[str, Any]) -> str:
        """Tell of any event that `POST /v1/events` takes, a `meterd.milestone` say; its id.

        `id`, `time` and `source` are set where they are missing. Raises as `emit`.
        """
        whole = completed(event, self._options.source)
        try:
            self._opened().keep(whole)
        except NotKept as error:
            if self._options.when_full == "raise":
                raise
            one = Rejected(str(whole["id"]), NOT_SENT, str(error), whole)
            report(one, self._options.on_rejected)
        return str(whole["id"])

    @property
    def pending(self) -> int:
        """How many events meterd has not taken yet."""
        opened = self._open
        if opened is None:
            return 0
        with opened.lock:
            return opened.queue.pending

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until meterd has taken all that was told so far; False: not within the time."""
        opened = self._open
        return opened is None or opened.wait(timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Send what is left, for so many seconds, and end; how many events stay in the spool.

        They are sent when a meter opens the spool again. Raises `Unsent`, with the events, where
        there is no spool for them.
        """
        with self._opening:
            self._closed = True
            opened, self._open = self._open, None
        if opened is None or opened.pid != os.getpid():
            return 0
        _live.discard(self)
        left = opened.end(timeout_s)
        if left and opened.spool is None:
            events = [msgspec.json.decode(one) for one in opened.queue.peek(left, 1 << 62)]
            raise Unsent(f"{left} events were not taken by meterd, and there is no spool", events)
        return left

    def _opened(self) -> _Open:
        opened = self._open
        if opened is not None and opened.pid == os.getpid():
            return opened
        with self._opening:
            if self._closed:
                raise NotKept("the meter is closed")
            opened = self._open
            if opened is None or opened.pid != os.getpid():
                if opened is not None and opened.spool is not None:
                    opened.spool.forsake()  # A child of fork: these events are the parent's.
                self._open = opened = _Open(self._place, self._options)
                _live.add(self)
            return opened


class AsyncMeter(Meter):
    """A meter for programs that await: `async with`, and an awaited `aflush` and `aclose`.

    `emit` and `tell` are the same: they wait for nobody, so there is nothing to await. With
    `fsync="each"` each would stop the event loop until the disk has answered, and is refused.
    """

    def __init__(self, url: str = URL, token: str = "", **options: Any) -> None:
        if options.get("fsync") == "each":
            raise BadUsage('fsync="each" would stop the event loop for each event; take "second"')
        super().__init__(url, token, **options)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.open)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aflush(self, timeout_s: float = 30.0) -> bool:
        """Wait until meterd has taken all that was told so far; as `flush`."""
        return await asyncio.to_thread(self.flush, timeout_s)

    async def aclose(self, timeout_s: float = CLOSE_S) -> int:
        """Send what is left, and end; as `close`."""
        return await asyncio.to_thread(self.close, timeout_s)


# Meters that were not closed are, when the program ends.
_live: set[Meter] = set()


@atexit.register
def _close_all() -> None:
    for meter in list(_live):
        try:
            meter.close()
        except Unsent as error:
            log.error("%s; the first is %s", error, error.events[0].get("id"))
