"""Usage events from a Redis stream: entries in, one JSON document each out, acked after the commit.

Two ways to read, and one rule for both: nothing is told to Redis before the batch is committed.

*exclusive* (one daemon on the stream). XREAD from the position that the store keeps in the same
commit as the usage. Redis keeps no pending list for us, which makes it three times as fast as a
group. The group's last-delivered id is moved along after each commit, for no other reason than that
the usual tools then show how far meterd is.

*group* (several daemons on the stream). XREADGROUP, XACK after the commit, XAUTOCLAIM for what a
dead daemon left pending. After every connect our own pending entries come first: what was under way
when the connection broke is in there.

A position from the store is a claim about a stream that others may trim, delete, recreate or
restore from a backup. `resume` holds that claim against what Redis says on connecting, and
`entries_lost` holds it against the stream's own count of entries ever added: the lag that Redis
reports does not see what was trimmed away. What both do not see: entries deleted in the middle of
the stream, until everything behind them has been read.

The bytes of an entry are only looked at where they have to be put together; what they mean is not
known in here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from meterd.core.events import Reason
from meterd.errors import ConfigurationError, Mistake, SourceUnavailable
from meterd.sources import PROOF_PREFIX, Deliveries, Fault, Proof

EVENT_FIELD = b"event"
DIMENSIONS_FIELD = "dimensions"
DATA_FIELD = "data"
DIMENSION_PREFIX = "dimensions."

# While a stream that is trimmed too early goes on losing entries, a person is told once in this
# time. Telling means one reconnect, and a reconnect for every batch would make the loss larger.
LOSS_REPORT_INTERVAL_S = 60

CANCEL_AGAIN_S = 0.1

# [id, [name, value, ...]], or [id, None] for one that was deleted while it was pending.
Entry = Sequence[Any]


@dataclass(frozen=True, slots=True)
class RedisStreamSettings:
    """Where the stream is and how it is read. `url` may hold a password and is never shown."""

    name: str
    url: str = field(repr=False)
    stream: str = "meterd:usage"
    group: str = "meterd"
    mode: Literal["exclusive", "group"] = "exclusive"
    consumer: str = ""  # Group mode: this daemon's own name in the group; "" is the host's name.
    batch: int = 5000
    block_ms: int = 5000
    connect_timeout_s: float = 5.0
    answer_timeout_s: float = 10.0  # An answer later than this means a dead connection.
    claim_idle_s: float = 60.0  # Group mode: what is pending for longer belongs to a dead daemon.
    claim_interval_s: float = 15.0
    rescan_margin_s: int = 60


# What is known about a stream and a place in it -------------------------------------------------

EntryId = tuple[int, int]
START: EntryId = (0, 0)


def parse_id(text: str) -> EntryId:
    """Read "1700000000000-3" (or "1700000000000"), comparable as in Redis. Raises `ValueError`."""
    milliseconds, _, sequence = text.partition("-")
    return int(milliseconds), int(sequence or "0")


def format_id(entry_id: EntryId) -> str:
    """Write an entry id as Redis does."""
    return f"{entry_id[0]}-{entry_id[1]}"


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a stream: its last entry read, the server's run, and the count of entries so far.

    `counted` is None where the server does not count (before Redis 7) or the count has to be found
    anew.
    """

    entry_id: EntryId
    run_id: str = ""
    counted: int | None = None

    def __str__(self) -> str:
        counted = "" if self.counted is None else self.counted
        return f"{format_id(self.entry_id)}|{self.run_id}|{counted}"

    def counting(self, more: int) -> Position:
        """The same place with `more` entries counted."""
        counted = None if self.counted is None else self.counted + more
        return Position(self.entry_id, self.run_id, counted)

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read what `str` wrote; a bare entry id will do. Raises `ValueError`."""
        entry_id, _, rest = text.partition("|")
        run_id, _, counted = rest.partition("|")
        return cls(parse_id(entry_id), run_id, int(counted) if counted else None)


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What XINFO STREAM says: `added` is None before Redis 7, `first` where the stream is empty."""

    length: int
    last: EntryId
    first: EntryId | None
    added: int | None

    @classmethod
    def of(cls, reply: Sequence[Any]) -> StreamFacts:
        """Read the raw reply, a flat list of names and values."""
        facts = dict(zip(reply[::2], reply[1::2], strict=True))
        first = facts[b"first-entry"]
        return cls(
            length=facts[b"length"],
            last=parse_id(facts[b"last-generated-id"].decode()),
            first=parse_id(first[0].decode()) if first else None,
            added=facts.get(b"entries-added"),
        )

    def waiting(self, at: EntryId) -> int | None:
        """How many entries stand behind `at`; None where only walking through them would tell."""
        if at >= self.last:
            return 0
        if self.first is None or self.first > at:
            return self.length
        return None


def entries_lost(stream: StreamFacts, at: Position) -> int:
    """How many entries left the stream before they were read, as far as its own count shows.

    Negative: the stream counts fewer than were read from it, so it is another one.
    """
    if stream.added is None or at.counted is None:
        return 0
    if stream.added < at.counted:
        return stream.added - at.counted
    waiting = stream.waiting(at.entry_id)
    return 0 if waiting is None else stream.added - at.counted - waiting


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where reading goes on, how many entries were lost, and what a person should know."""

    start: Position
    lost: int = 0
    warnings: tuple[str, ...] = ()


def resume(
    position: Position | None, stream: StreamFacts, run_id: str, margin_s: int
) -> Resumption:
    """Decide where to go on: behind the position, or `margin_s` seconds before where in doubt.

    Reading some entries twice costs nothing, since every one is known by its id; leaving some out
    loses usage.
    """
    if position is None:
        counted = None if stream.added is None else stream.added - stream.length
        return Resumption(Position(START, run_id, counted))

    lost = max(0, entries_lost(stream, position))
    warnings = (_loss_sentence(lost),) if lost else ()
    doubt = _doubt(position, stream, run_id)
    if not doubt:
        start = Position(position.entry_id, run_id, position.counted).counting(lost)
        return Resumption(start, lost, warnings)
    # What is read twice must not be counted twice: the count is taken up anew when all is read.
    start = Position(_earlier(min(position.entry_id, stream.last), margin_s), run_id)
    again = f"{doubt}; reading again from {format_id(start.entry_id)}, without counting twice"
    return Resumption(start, lost, (again, *warnings))


def _doubt(position: Position, stream: StreamFacts, run_id: str) -> str:
    """Why this may not be the stream that the position is about; empty when nothing says so."""
    if stream.last < position.entry_id:
        return (
            f"its last entry {format_id(stream.last)} stands before the position "
            f"{format_id(position.entry_id)}: it was deleted, recreated or restored from a backup"
        )
    if entries_lost(stream, position) < 0:
        return (
            f"it counts {stream.added} entries where {position.counted} were read: "
            "it was recreated or restored from a backup"
        )
    if position.run_id and run_id and position.run_id != run_id:
        return "the server was restarted, or another one answers"
    return ""


def _earlier(entry_id: EntryId, margin_s: int) -> EntryId:
    return max(0, entry_id[0] - margin_s * 1000), 0


def _loss_sentence(lost: int) -> str:
    return (
        f"{lost} entries left it (trimmed or deleted) before they were read: their usage is lost; "
        "raise MAXLEN of the producers' XADD"
    )


# From entries to payloads -----------------------------------------------------------------------


class EntryIds(Sequence[str]):
    """The entries' ids as text, decoded when asked for: most events bring an id of their own."""

    __slots__ = ("raw",)

    def __init__(self, raw: list[bytes]) -> None:
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [raw.decode() for raw in self.raw[index]]
        return self.raw[index].decode()


def payloads_of(entries: Sequence[Entry]) -> tuple[list[bytes], dict[int, Fault]]:
    """The payload of each entry, and a fault for each that cannot be one JSON document."""
    plain = _plain(entries)
    if plain is not None:
        return plain, {}
    payloads, faults = [], {}
    for index, (_, fields) in enumerate(entries):
        payload, fault = payload_of(fields)
        payloads.append(payload)
        if fault is not None:
            faults[index] = fault
    return payloads, faults


def _plain(entries: Sequence[Entry]) -> list[bytes] | None:
    """The payloads of entries that all hold the single field `event`; None where one does not.

    That is the common case, and costs one turn of a list comprehension.
    """
    try:
        payloads = [payload for _, (name, payload) in entries if name == EVENT_FIELD]
    except (TypeError, ValueError):
        return None  # An entry with other than two items among its fields, or without fields.
    return payloads if len(payloads) == len(entries) else None


def proofs_of(entries: Sequence[Entry]) -> dict[int, Proof]:
    """How entries are signed, by their place: fields beside `event`."""
    proofs = {}
    for index, (_, fields) in enumerate(entries):
        if fields is not None and len(fields) > 2:
            names = (name.decode(errors="replace") for name in fields[::2])
            texts = (text.decode(errors="replace") for text in fields[1::2])
            proof = Proof.of(zip(names, texts, strict=False))
            if proof is not None:
                proofs[index] = proof
    return proofs


def _without_proof(fields: Sequence[bytes]) -> Sequence[bytes]:
    named = zip(fields[::2], fields[1::2], strict=False)
    rest = (pair for pair in named if not pair[0].startswith(PROOF_PREFIX.encode()))
    return [part for pair in rest for part in pair]


def payload_of(fields: Sequence[bytes] | None) -> tuple[bytes, Fault | None]:
    """One entry's payload: the bytes of `event`, or its flat fields as one JSON object."""
    if fields is None:
        detail = "the entry was deleted from the stream while it was pending"
        return b"", Fault(Reason.MALFORMED, detail)
    if len(fields) > 2 and len(fields) % 2 == 0:
        fields = _without_proof(fields)
    if len(fields) == 2 and fields[0] == EVENT_FIELD:
        return fields[1], None
    try:
        return msgspec.json.encode(_flat_object(fields)), None
    except ValueError as error:
        return _as_json(fields), Fault(Reason.MALFORMED, str(error))


def _flat_object(fields: Sequence[bytes]) -> dict[str, Any]:
    """The fields by name, as texts, dimensions gathered. Raises `ValueError` with the reason."""
    try:
        texts = [part.decode() for part in fields]
    except UnicodeDecodeError:
        raise ValueError("a field is not valid UTF-8") from None
    names = texts[::2]
    values: dict[str, Any] = dict(zip(names, texts[1::2], strict=True))
    if len(values) != len(names):
        raise ValueError("a field is given twice")
    if "event" in values:
        raise ValueError("the field event must stand alone")
    if "meter" not in values and "type" not in values:
        raise ValueError("there is neither a field event nor meter or type")
    dimensions = _take_dimensions(values)
    if dimensions:
        values[DIMENSIONS_FIELD] = dimensions
    if DATA_FIELD in values:  # A CloudEvent's: JSON in a field of its own.
        try:
            values[DATA_FIELD] = msgspec.json.decode(values[DATA_FIELD], type=msgspec.Raw)
        except (msgspec.DecodeError, RecursionError):
            raise ValueError("the field data is no JSON") from None
    return values


def _take_dimensions(values: dict[str, Any]) -> dict[str, Any]:
    dimensions: dict[str, Any] = {}
    if DIMENSIONS_FIELD in values:
        text = values.pop(DIMENSIONS_FIELD)
        try:
            dimensions.update(msgspec.json.decode(text, type=dict[str, msgspec.Raw]))
        except (msgspec.DecodeError, RecursionError):
            raise ValueError("the field dimensions is not a JSON object") from None
    for name in [name for name in values if name.startswith(DIMENSION_PREFIX)]:
        dimension = name.removeprefix(DIMENSION_PREFIX)
        if not dimension or dimension in dimensions:
            raise ValueError("a dimension has no name or is given twice")
        dimensions[dimension] = values.pop(name)
    return dimensions


def _as_json(fields: Sequence[bytes]) -> bytes:
    # For a person to look at: a list keeps what an object could not, order and repetitions.
    return msgspec.json.encode([part.decode(errors="backslashreplace") for part in fields])


# The source -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Receipt:
    position: Position | None = None  # Exclusive mode.
    pending: tuple[bytes, ...] = ()  # Group mode.


def _raw(response: Any, **_: Any) -> Any:
    return response


async def _ask(client: Redis, *command: Any) -> Any:
    return await client.execute_command(*command)  # type: ignore[no-untyped-call]


class RedisStreamSource:
    """One Redis stream as a `Source`."""

    kind = "redis"

    def __init__(self, settings: RedisStreamSettings) -> None:
        self.name = settings.name
        self._settings = settings
        self._consumer = settings.consumer or socket.gethostname()
        self._options = _options_of(settings)
        self._secrets = _secrets_of(settings.url)
        self.address = _address_of(settings.url)
        self._where = f"stream {settings.stream} at {self.address}"
        self._reader: Redis | None = None  # Blocks in XREAD; never shared.
        self._control: Redis | None = None  # Everything that answers at once.
        self._task: asyncio.Task[Deliveries] | None = None
        self._was_connected = False
        # Exclusive mode.
        self._read_to = Position(START)
        self._acked_to = Position(START)
        self._lost = 0  # Entries found lost since the connect; not yet in any position's count.
        self._losses: list[str] = []
        self._loss_told_at: float | None = None
        # Group mode.
        self._own_pending: bytes | None = None  # How far our own pending list is read; None: done.
        self._claim_cursor = b"0-0"
        self._claim_at = 0.0

    # The five calls of a source.

    async def connect(self, position: str | None) -> Sequence[str]:
        """As `Source.connect`.

        In group mode Redis keeps the position; the one given is not used.
        """
        await self.close()
        settings = self._settings
        async with self._explained():
            async with asyncio.timeout(settings.connect_timeout_s):
                self._reader = self._client(settings.block_ms / 1000 + settings.answer_timeout_s)
                self._control = self._client(settings.answer_timeout_s)
                made = await self._ensure_group()
                warnings = (
                    await self._connect_exclusive(position)
                    if settings.mode == "exclusive"
                    else self._connect_group(made)
                )
            self._was_connected = True
            return [f"{self._where}: {text}" for text in warnings]

    async def read(self) -> Deliveries:
        """As `Source.read`. A read under way outlives a cancelled call and serves the next one."""
        if self._losses and self._may_tell_losses():
            await self.close()
            raise SourceUnavailable(f"{self._where}: {self._losses[-1]}; connecting again")
        if self._task is None:
            self._task = self._start_read()
        task = self._task
        await asyncio.wait([task])  # Unlike an await of it, this leaves it alone when cancelled.
        self._task = None
        if task.cancelled():
            raise SourceUnavailable(f"{self._where}: the connection was given up")
        deliveries = task.result()
        # A full batch says that more is waiting, so the next one is fetched while this one is
        # worked on. Otherwise not: that read would return with the first entry to arrive, and cut
        # what comes meanwhile into small batches.
        if len(deliveries.payloads) >= self._settings.batch:
            self._task = self._start_read()
        return deliveries

    async def ack(self, deliveries: Deliveries) -> None:
        """As `Source.ack`."""
        receipt = deliveries.receipt
        assert isinstance(receipt, _Receipt)
        async with self._explained():
            if receipt.position is not None:
                await self._follow(receipt.position)
            elif receipt.pending:
                await _ask(
                    self._connected(self._control),
                    "XACK",
                    self._settings.stream,
                    self._settings.group,
                    *receipt.pending,
                )

    async def lag(self) -> int | None:
        """Entries that are not acked yet; None where the server cannot say."""
        async with self._explained():
            control = self._connected(self._control)
            if self._settings.mode == "group":
                return await self._group_lag(control)
            stream = await self._stream_facts(control)
            at = self._acked_to
            waiting = stream.waiting(at.entry_id)
            if waiting is None and stream.added is not None and at.counted is not None:
                waiting = max(0, stream.added - at.counted)
            return waiting

    async def close(self) -> None:
        """As `Source.close`."""
        task, self._task = self._task, None
        await self._disconnect()
        # redis-py swallows a cancellation at some moments of a read; so the connection is gone
        # first, which ends the read as well, and the task is cancelled until it has ended.
        while task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_AGAIN_S)
        if task is not None and not task.cancelled():
            task.exception()  # Nobody else will ask for it.

    # Connecting.

    def _client(self, answer_timeout_s: float) -> Redis:
        # No retries and no time-out shorter than the block: redis-py would otherwise cut a quiet
        # read off after five seconds and repeat it ten times before it tells. The protocol is
        # pinned, since replies differ in shape.
        pool: ConnectionPool = ConnectionPool(
            **self._options,
            protocol=2,
            decode_responses=False,
            socket_timeout=answer_timeout_s,
            socket_connect_timeout=self._settings.connect_timeout_s,
            socket_keepalive=True,
            health_check_interval=0,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
        )
        client = Redis.from_pool(pool)
        for command in ("XREAD", "XREADGROUP", "XAUTOCLAIM", "XINFO STREAM", "XINFO GROUPS"):
            client.set_response_callback(command, _raw)
        return client

    async def _ensure_group(self) -> bool:
        """Make the stream and the group where they are missing; True when the group was."""
        create = ("XGROUP CREATE", self._settings.stream, self._settings.group, "0", "MKSTREAM")
        try:
            await _ask(self._connected(self._control), *create)
        except ResponseError as error:
            if str(error).startswith("BUSYGROUP"):
                return False
            raise
        return True

    async def _connect_exclusive(self, text: str | None) -> Sequence[str]:
        control = self._connected(self._control)
        try:
            position = None if text is None else Position.parse(text)
        except ValueError:
            raise SourceUnavailable(
                f"source {self.name}: the stored position is not one of a Redis stream; "
                "was the kind of this source changed? Give the new one another name"
            ) from None
        resumption = resume(
            position,
            await self._stream_facts(control),
            await _run_id(control),
            self._settings.rescan_margin_s,
        )
        start, told = resumption.start, resumption.warnings
        if not resumption.lost:
            # Either nothing was lost, or it was only seen while reading on: then it is told and
            # counted here.
            start, told = start.counting(self._lost), (*told, *self._losses)
        self._read_to = self._acked_to = start
        self._lost, self._losses = 0, []
        return told

    def _connect_group(self, made: bool) -> Sequence[str]:
        self._own_pending = b"0"
        self._claim_cursor = b"0-0"
        self._claim_at = time.monotonic()
        if made and self._was_connected:
            return ["the group was gone, and with it what was pending: reading from the start"]
        return []

    # Reading.

    def _start_read(self) -> asyncio.Task[Deliveries]:
        following = self._read_exclusive if self._settings.mode == "exclusive" else self._read_group
        return asyncio.create_task(following(), name=f"{self.name}-read")

    async def _read_exclusive(self) -> Deliveries:
        settings = self._settings
        after = format_id(self._read_to.entry_id)
        command = ("XREAD", "COUNT", settings.batch, "BLOCK", settings.block_ms)
        reply = None
        async with self._explained():
            while not reply:
                reader = self._connected(self._reader)
                reply = await _ask(reader, *command, "STREAMS", settings.stream, after)
                if not reply:
                    await self._look_whether_recreated(reader)
        entries = reply[0][1]
        last = parse_id(entries[-1][0].decode())
        position = replace(self._read_to.counting(len(entries)), entry_id=last)
        self._read_to = position
        return _deliveries(entries, _Receipt(position), str(position))

    async def _look_whether_recreated(self, reader: Redis) -> None:
        """Look, while nothing comes: XREAD would wait for ever behind ids that are gone."""
        stream = await self._stream_facts(reader)
        if stream.last < self._read_to.entry_id:
            raise SourceUnavailable(f"{self._where}: it was recreated; connecting again")

    async def _read_group(self) -> Deliveries:
        async with self._explained():
            while True:
                if self._own_pending is not None:
                    entries = await self._read_own_pending(self._own_pending)
                elif time.monotonic() >= self._claim_at:
                    entries = await self._claim()
                else:
                    entries = await self._read_as_group(b">", "BLOCK", self._settings.block_ms)
                if entries:
                    break
        return _deliveries(entries, _Receipt(pending=tuple(entry[0] for entry in entries)), None)

    async def _read_as_group(self, after: bytes, *block: str | int) -> Sequence[Entry]:
        settings = self._settings
        command = ("XREADGROUP", "GROUP", settings.group, self._consumer)
        options = ("COUNT", settings.batch, *block, "STREAMS", settings.stream, after)
        reply = await _ask(self._connected(self._reader), *command, *options)
        entries: Sequence[Entry] = reply[0][1] if reply else ()
        return entries

    async def _read_own_pending(self, after: bytes) -> Sequence[Entry]:
        entries = await self._read_as_group(after)
        self._own_pending = entries[-1][0] if entries else None
        return entries

    async def _claim(self) -> Sequence[Entry]:
        """Take over what others left pending; an entry deleted meanwhile comes without fields."""
        settings = self._settings
        command = ("XAUTOCLAIM", settings.stream, settings.group, self._consumer)
        options = (int(settings.claim_idle_s * 1000), self._claim_cursor, "COUNT", settings.batch)
        reply = await _ask(self._connected(self._reader), *command, *options)
        self._claim_cursor, entries, *deleted = reply
        if self._claim_cursor == b"0-0":
            self._claim_at = time.monotonic() + settings.claim_interval_s
        found = [entry for entry in entries if entry is not None]  # Redis 6: holes, no ids.
        return found + [[entry_id, None] for entry_id in (deleted[0] if deleted else ())]

    # After the commit.

    async def _follow(self, position: Position) -> None:
        """Move the group along to what is committed, and look whether the stream lost something."""
        settings = self._settings
        at = position.counting(self._lost)
        counted = () if at.counted is None else ("ENTRIESREAD", at.counted)
        setid = ("XGROUP SETID", settings.stream, settings.group, format_id(at.entry_id))
        async with self._connected(self._control).pipeline(transaction=False) as pipe:
            pipe.execute_command(*setid, *counted)
            pipe.execute_command("XINFO STREAM", settings.stream)
            _, reply = await pipe.execute()
        stream = StreamFacts.of(reply)
        self._acked_to = position
        lost = entries_lost(stream, at)
        if lost < 0 or stream.last < at.entry_id:
            raise SourceUnavailable(f"{self._where}: it was recreated; connecting again")
        if lost > 0:
            self._lost += lost
            self._losses.append(_loss_sentence(lost))
        elif at.counted is None and position == self._read_to and stream.last == at.entry_id:
            # Everything is read, so the count can be taken up again after a rescan.
            self._read_to = self._acked_to = replace(position, counted=stream.added)

    def _may_tell_losses(self) -> bool:
        now = time.monotonic()
        if self._loss_told_at is not None and now - self._loss_told_at < LOSS_REPORT_INTERVAL_S:
            return False
        self._loss_told_at = now
        return True

    async def _group_lag(self, control: Redis) -> int | None:
        for group in await _ask(control, "XINFO GROUPS", self._settings.stream):
            facts = dict(zip(group[::2], group[1::2], strict=True))
            if facts[b"name"] == self._settings.group.encode():
                lag = facts.get(b"lag")
                return None if lag is None else int(lag) + int(facts[b"pending"])
        return None

    async def _stream_facts(self, control: Redis) -> StreamFacts:
        return StreamFacts.of(await _ask(control, "XINFO STREAM", self._settings.stream))

    # Errors.

    def _connected(self, client: Redis | None) -> Redis:
        if client is None:
            raise SourceUnavailable(f"Redis at {self.address} is not connected")
        return client

    @contextlib.asynccontextmanager
    async def _explained(self) -> AsyncIterator[None]:
        """Whatever goes wrong in here: forget the connection, and tell a person what to do."""
        try:
            yield
        except SourceUnavailable:
            await self._forget()
            raise
        except (RedisError, OSError) as error:  # TimeoutError is an OSError.
            await self._forget()
            raise SourceUnavailable(self._explain(error)) from None

    async def _forget(self) -> None:
        # The read under way ends with us, and the next call of `read` hears of it; but it is this
        # very task that runs here when the read itself has failed, and then its error is what is
        # heard.
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        await self._disconnect()

    async def _disconnect(self) -> None:
        reader, self._reader = self._reader, None
        control, self._control = self._control, None
        for client in (reader, control):
            if client is not None:
                with contextlib.suppress(RedisError, OSError):
                    await client.aclose()

    def _explain(self, error: Exception) -> str:
        settings = self._settings
        text = str(error) or type(error).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        # Not `startswith`: a pipeline puts the number of the command before it.
        if "WRONGTYPE" in text:
            return (
                f"the key {settings.stream} at {self.address} does not hold a stream; give the "
                "source another `stream`, or look at what is there with "
                f"`redis-cli TYPE {settings.stream}`"
            )
        if any(words in text for words in ("NOGROUP", "requires the key to exist", "no such key")):
            return f"{self._where}: it was deleted, or its group {settings.group} was"
        if isinstance(error, NoPermissionError) or "NOPERM" in text:  # A pipeline keeps the word.
            return f"Redis at {self.address}: the ACL of its user lacks what meterd needs: {text}"
        if isinstance(error, TimeoutError) and not isinstance(error, RedisError):
            return f"Redis at {self.address}: no answer within {settings.connect_timeout_s} s"
        if f"Error {errno.ECONNREFUSED} " in text:
            return f"Redis at {self.address}: connection refused; is the server running there?"
        return f"Redis at {self.address}: {text}"


def _deliveries(entries: Sequence[Entry], receipt: _Receipt, position: str | None) -> Deliveries:
    payloads, faults, proofs = _plain(entries), dict[int, Fault](), dict[int, Proof]()
    if payloads is None:
        payloads, faults = payloads_of(entries)
        proofs = proofs_of(entries)
    return Deliveries(
        payloads,
        ids=EntryIds([entry[0] for entry in entries]),
        faults=faults,
        proofs=proofs,
        position=position,
        receipt=receipt,
    )


async def _run_id(control: Redis) -> str:
    try:
        info: Mapping[str, Any] = await _ask(control, "INFO", "server")
    except ResponseError:
        return ""  # Hosted services may forbid INFO; then a restart is not noticed by its run id.
    return str(info.get("run_id", ""))


# Options of redis-py in a URL's query that would undo a rule of this file.
OURS = {
    "protocol",
    "decode_responses",
    "health_check_interval",
    "retry_on_timeout",
    "retry_on_error",
}


def _options_of(settings: RedisStreamSettings) -> dict[str, Any]:
    """What the URL says, as redis-py's options, without those that are not its to say."""
    try:
        options: dict[str, Any] = dict(parse_url(settings.url))
    except ValueError:
        wanted = "write redis://host:6379/0, rediss://host:6379/0 or unix:///path"
        raise ConfigurationError([Mistake(f"sources.{settings.name}.url", wanted)]) from None
    return {
        key: value for key, value in options.items() if key not in OURS and "socket_" not in key
    }


def _address_of(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    host = parts.hostname or "localhost"
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{parts.port or 6379}{parts.path}"


def _secrets_of(url: str) -> tuple[str, ...]:
    parts = urlsplit(url)
    options = parse_qs(parts.query)
    words = {parts.password or "", unquote(parts.password or "")}
    words.update(options.get("password", ()), options.get("ssl_password", ()))
    return tuple(word for word in words if word)
