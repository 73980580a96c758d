"""Fakes that behave and can fail on cue: a clock, a store, identities, a settler."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meterd.bookkeeper import Bookkeeper, Facts
from meterd.core.accounts import Entry
from meterd.core.changes import (
    AgreementRow,
    Change,
    DeadLetter,
    JournalEntry,
    MarkBlock,
    ReceiptRow,
    Taken,
    TakenBlock,
)
from meterd.core.events import EventDecoder
from meterd.core.ledger import HOUR_MS, Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.openings import Opening, Wish
from meterd.core.plans import Pattern, Plan, Settle
from meterd.core.pricing import Rate, RateCard
from meterd.core.settlement import Escrow, Observed, Reading, Release, Rules
from meterd.store import taken

NOW_MS = 1_795_435_200_000  # 2026-11-23T12:00:00Z.
WINDOW_MS = 72 * HOUR_MS


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self, wall_ms: int = NOW_MS) -> None:
        self.wall_ms = wall_ms
        self.mono_s = 1000.0

    def mono(self) -> float:
        return self.mono_s

    def wall(self) -> int:
        return self.wall_ms

    def advance(self, seconds: int) -> None:
        """Let both clocks go on."""
        self.mono_s += seconds
        self.wall_ms += seconds * 1000


@dataclass(frozen=True)
class FakeJournalled:
    """An entry as a store hands it out."""

    number: int
    entry: JournalEntry
    hash: bytes = bytes(32)


class FakeStore:
    """Keeps what a store keeps, in memory. `hold` makes commits wait, `fail` makes them fail."""

    def __init__(self) -> None:
        self.writable = True
        self.commits = 0
        self.agreements: dict[str, AgreementRow] = {}
        self.escrows: dict[str, Escrow] = {}
        self.entries: list[JournalEntry] = []
        self.receipt_rows: list[ReceiptRow] = []
        self.blocks: list[TakenBlock] = []
        self.letters: dict[int, DeadLetter] = {}
        self._releases: dict[str, Release] = {}
        self._held: list[tuple[Change, asyncio.Future[None]]] | None = None
        self._error: BaseException | None = None

    def hold(self) -> None:
        """Let no commit become durable until `let_go`."""
        self._held = []

    def let_go(self) -> None:
        """Make what waited durable, in order."""
        held, self._held = self._held or [], None
        for change, future in held:
            self._write(change, future)

    def fail(self, error: BaseException) -> None:
        """Make every further commit fail with this."""
        self._error = error

    async def receipts(
        self, agreement: str, *, limit: int = 100, after: int = 0
    ) -> list[ReceiptRow]:
        mine = [row for row in self.receipt_rows if row.agreement == agreement]
        return [row for row in mine if row.number > after][:limit]

    async def find_taken(self, digest: bytes) -> list[Taken]:
        return [
            one
            for block in self.blocks
            for one in taken.search(digest[:8], block.data, wide=block.wide)
        ]

    async def backup(self, path: Path) -> None:
        """Write a file that is no database: what is in it is the real store's to test."""
        await asyncio.to_thread(path.write_bytes, b"copy")

    @property
    def waiting(self) -> int:
        """How many commits wait."""
        return len(self._held or ())

    def commit(self, change: Change) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._held is not None:
            self._held.append((change, future))
        else:
            self._write(change, future)
        return future

    def _write(self, change: Change, future: asyncio.Future[None]) -> None:
        if self._error is not None:
            future.set_exception(self._error)
            return
        self.commits += 1
        self.agreements.update({row.id: row for row in change.agreements})
        self.escrows.update({row.id: row for row in change.escrows})
        self._releases.update({row.id: row for row in change.releases})
        self.letters.update({row.number: row for row in change.dead_letters})
        for number in change.dead_letters_gone:
            self.letters.pop(number, None)
        self.entries.extend(change.journal)
        self.receipt_rows.extend(change.receipts)
        self.blocks.extend(change.taken)
        future.set_result(None)

    async def releases(
        self,
        *,
        escrow: str | None = None,
        agreement: str | None = None,
        status: str | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> list[Release]:
        newest_first = list(reversed(self._releases.values()))
        if before is not None:
            ids = [release.id for release in newest_first]
            newest_first = newest_first[ids.index(before) + 1 :] if before in ids else []
        return [
            release
            for release in newest_first
            if escrow in {None, release.escrow}
            and agreement in {None, self.escrows[release.escrow].agreement}
            and status in {None, release.status.value}
        ][:limit]

    async def dead_letters(
        self, *, limit: int = 100, before: int | None = None, reason: str | None = None
    ) -> list[DeadLetter]:
        return [
            self.letters[number]
            for number in sorted(self.letters, reverse=True)
            if (before is None or number < before) and reason in {None, self.letters[number].reason}
        ][:limit]

    async def dead_letter(self, number: int) -> DeadLetter | None:
        return self.letters.get(number)

    async def journal(self, *, limit: int = 100, before: int | None = None) -> list[FakeJournalled]:
        end = len(self.entries) if before is None else before - 1
        numbers = range(end, max(0, end - limit), -1)
        return [FakeJournalled(number, self.entries[number - 1]) for number in numbers]


class FakeIdentities:
    """Remembers identities in a dict. `fail` makes the next look-up raise."""

    def __init__(self) -> None:
        self.bucket_min = 0
        self._known: dict[bytes, int] = {}
        self._error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Raise this at the next look-up."""
        self._error = error

    def digest(self, source: str, event_id: str) -> bytes:
        return hashlib.blake2b(f"{source}\0{event_id}".encode(), digest_size=16).digest()

    def fingerprint(self, content: bytes) -> int:
        return zlib.crc32(content)

    def find(self, digests: bytes) -> Sequence[int]:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return [
            self._known.get(digests[start : start + 16], -1) for start in range(0, len(digests), 16)
        ]

    def add(
        self, digests: bytes, prints: Sequence[int], buckets: Sequence[int]
    ) -> tuple[MarkBlock, ...]:
        for place, fingerprint in enumerate(prints):
            self._known[digests[place * 16 : place * 16 + 16]] = fingerprint
        return (MarkBlock(buckets[0], len(prints), digests),)

    def pack(
        self,
        bucket: int,
        digests: bytes,
        counters: Sequence[int],
        quantities: Sequence[int],
        extras: Mapping[int, tuple[int, str]],
    ) -> tuple[TakenBlock, ...]:
        return taken.pack(bucket, digests, counters, quantities, extras)

    def expire(self, bucket_min: int) -> bool:
        return bucket_min < 0  # Nothing is ever forgotten.

    def shrink(self) -> int | None:
        return None


class FakeOpener:
    """Keeps what it was asked for, and answers with what it was told to."""

    def __init__(self) -> None:
        self.unfinished: list[Opening] = []
        self.wishes: list[tuple[Wish, str]] = []
        self.answer: str | Exception = ""

    async def open(self, wish: Wish, actor: str) -> str:
        self.wishes.append((wish, actor))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or wish.agreement


class FakeSettler:
    """Only says what stands against releases."""

    def __init__(self) -> None:
        self.reason = ""

    def blocked(self) -> str:
        return self.reason


class NoFacts:
    """Wants to know nothing."""

    def batch(self, source: str, entry: Entry, sums: Mapping[str, int]) -> None: ...

    def committed(self, seconds: float) -> None: ...

    def released(self, release: Release, seconds: float) -> None: ...

    def paid(self, seconds: float) -> None: ...

    def alarm(self, action: str) -> None: ...

    def gate(self, *, allowed: bool, seconds: float) -> None: ...


METERS = {
    "tokens": Meter("tokens", Aggregation.SUM, "token"),
    "calls": Meter("calls", Aggregation.COUNT, "call"),
}


def make_plans() -> dict[str, Plan]:
    """`stream` sells calls at 0.001, tokens at 0.002 a thousand; `model` wants a model."""
    stream = RateCard((Rate("calls", 10**9), Rate("tokens", 2 * 10**9, 1000)))
    model = RateCard((Rate("tokens", 10**9, 1, (("model", "large"),)),))
    settle = Settle(amount=500_000)
    return {
        "stream": Plan("stream", Pattern.STREAMING, stream, settle),
        "model": Plan("model", Pattern.PAY_PER_TOKEN, model, settle),
    }


def make_bookkeeper(
    store: FakeStore,
    *,
    facts: Facts | None = None,
    clock: FakeClock | None = None,
    identities: FakeIdentities | None = None,
) -> Bookkeeper:
    """A real bookkeeper on fakes, without an agreement."""
    return Bookkeeper(
        Ledger(make_plans(), METERS),
        store,
        FakeIdentities() if identities is None else identities,
        Rules(observe_gap=1.0, quarantine=60.0),
        clock or FakeClock(),
        facts or NoFacts(),
        decoder=EventDecoder(sentinel=7_777_777_777_777),
        window_ms=WINDOW_MS,
        positions={},
        dead_letters=0,
        dead_letter_next=1,
    )


async def adopt(
    bookkeeper: Bookkeeper, clock: FakeClock, escrow: str, *, total: int = 10_000_000
) -> None:
    """Let the escrow be read twice, so that it is active; `total` in micros."""
    reading = reading_of(escrow, total=total, mono=clock.mono())
    for _ in range(2):
        clock.advance(2)
        reading = replace(reading, mono=clock.mono())
        await bookkeeper.step(escrow, Observed(reading, clock.mono(), clock.wall(), 0))


def reading_of(escrow: str, *, total: int, mono: float, released: int = 0) -> Reading:
    """What the service says of an escrow that is in order."""
    return Reading(
        escrow=escrow,
        status="active",
        total=total,
        released=released,
        remaining=total - released,
        refunded=0,
        currency="USDC",
        provider="provider-1",
        deadline=None,
        mono=mono,
    )
