"""The only door to the money: ledger, identities and store in step, or the process stops.

Whatever changes the ledger comes through here: a batch of deliveries, a step of a settlement, a
person's act. Each is decided and applied in memory at once, without an await in between, and handed
to the store as one change. Nobody is told "done" before that change is durable; changes become
durable in the order in which they were made. While a commit is under way memory is ahead of the
disk, so a commit that fails ends the process, and the next one starts from the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from meterd.core import advice
from meterd.core.accounts import (
    Account,
    Agreement,
    Charged,
    Counter,
    Entry,
    ResolvedBatch,
    Touched,
)
from meterd.core.caps import NO_CAPS, PLAN
from meterd.core.changes import (
    AgreementRow,
    Change,
    DeadLetter,
    Hold,
    JournalEntry,
    KeyRow,
    MarkBlock,
    ProducerRow,
    ReceiptRow,
    Taken,
    TakenBlock,
    VoidRow,
)
from meterd.core.events import EVENT_BYTES_MAX, Decoded, EventDecoder, Reason, Rejection
from meterd.core.holds import Ask, Holds, Verdict
from meterd.core.keys import Keys
from meterd.core.ledger import HOUR_MS, OUTCOME_TYPE, VOID_TYPE, Conflict, Ledger, contents
from meterd.core.meters import Meter
from meterd.core.money import format_amount
from meterd.core.openings import Opening
from meterd.core.plans import AtClose, Plan
from meterd.core.sequences import (
    Counted,
    Known,
    Noted,
    Sequences,
    number_of,
    take_numbers,
    time_of,
)
from meterd.core.settlement import (
    LIVE,
    Alarm,
    Closing,
    Effect,
    Effects,
    Escrow,
    EscrowStatus,
    Freeze,
    Input,
    NotAllowed,
    Record,
    Release,
    ReleaseStatus,
    Resolved,
    Restarted,
    Resume,
    Rules,
    step,
)
from meterd.core.statements import CLOSE, KINDS, statement
from meterd.core.thresholds import due, next_look
from meterd.errors import InvariantBroken, NotFound, Refused
from meterd.logs import get_logger
from meterd.producers import Producer, Producers, kept, taken_out
from meterd.receipts import Notary
from meterd.signatures import outcome_flaw
from meterd.sources import Deliveries

log = get_logger(__name__)

# A caller who is denied may ask again and again: a wallet is read for it so often at most.
REFILL_LOOK_S = 2.0
# The source of usage that captures a hold by its id.
HOLD_SOURCE = "hold"
RACING = "velocity_exceeded"
FROZEN = "escrow_frozen"
# No source is named so: control characters are refused. Marks an event that was taken back.
_VOIDED = "\x01voided"
_TOO_OLD = "is older than the dedupe window, and its number does not tell whether it is new"
# No id is written so either. Marks what an event added to its second counter, and so on.
_PART = "\x02"


@dataclass(slots=True)
class Begun:
    """A call with an `Idempotency-Key`: the first commit of its work holds the key as well."""

    row: KeyRow
    written: bool = False


BEGUN: ContextVar[Begun | None] = ContextVar("begun", default=None)


class Clock(Protocol):
    """Where the time comes from; the simulation has its own."""

    def mono(self) -> float:
        """Seconds that only grow, for durations."""

    def wall(self) -> int:
        """Milliseconds since the epoch, for periods and deadlines."""


class Store(Protocol):
    """What makes changes durable."""

    writable: bool

    def commit(self, change: Change) -> asyncio.Future[None]:
        """Write a change behind all those before it; done when it is on the disk.

        Fails with `StoreFailed`.
        """

    async def releases(
        self,
        *,
        escrow: str | None = None,
        agreement: str | None = None,
        status: str | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> list[Release]:
        """List releases, newest first."""

    async def dead_letters(
        self, *, limit: int = 100, before: int | None = None, reason: str | None = None
    ) -> list[DeadLetter]:
        """List dead letters, newest first."""

    async def dead_letter(self, number: int) -> DeadLetter | None:
        """Find one dead letter."""

    async def receipts(
        self, agreement: str, *, limit: int = 100, after: int = 0
    ) -> Sequence[ReceiptRow]:
        """List an agreement's receipts, oldest first, with numbers above `after`."""

    async def find_taken(self, digest: bytes) -> list[Taken]:
        """Find what the event of an identity added; more than one: it cannot be told which."""

    async def backup(self, path: Path) -> None:
        """Copy everything into a new file, as of one moment. Raises `Refused`."""

    async def journal(self, *, limit: int = 100, before: int | None = None) -> Sequence[Journalled]:
        """List journal entries, newest first, with numbers below `before`."""


class Journalled(Protocol):
    """A journal entry with its number, from 1 without gaps, and the hash that chains it."""

    @property
    def number(self) -> int:
        """Its place in the journal."""

    @property
    def entry(self) -> JournalEntry:
        """What was done, by whom, to what and why."""

    @property
    def hash(self) -> bytes:
        """Over the hash before and this entry."""


class Identities(Protocol):
    """The memory of seen events. Hours before `bucket_min` are forgotten, for ever."""

    bucket_min: int

    def digest(self, source: str, event_id: str) -> bytes:
        """Make 16 bytes of an identity."""

    def fingerprint(self, content: bytes) -> int:
        """Make 32 bits of an event's content."""

    def find(self, digests: bytes) -> Sequence[int]:
        """For each packed digest, the fingerprint under which it is known, or -1."""

    def add(
        self, digests: bytes, prints: Sequence[int], buckets: Sequence[int]
    ) -> tuple[MarkBlock, ...]:
        """Remember identities; the blocks are what the same commit must hold."""

    def pack(
        self,
        bucket: int,
        digests: bytes,
        counters: Sequence[int],
        quantities: Sequence[int],
        extras: Mapping[int, tuple[int, str]],
    ) -> tuple[TakenBlock, ...]:
        """Pack what events added; by place, `extras` are an amount and a sample's key."""

    def expire(self, bucket_min: int) -> bool:
        """Forget the hours before; whether there was anything to forget."""

    def shrink(self) -> int | None:
        """Where the limit of entries moves the window's start to; None: it is not reached."""


class Facts(Protocol):
    """Who wants to know what happened: the metrics."""

    def batch(self, source: str, entry: Entry, sums: Mapping[str, int]) -> None:
        """A batch was applied; `sums` is the quantity for each meter, in nanos."""

    def committed(self, seconds: float) -> None:
        """A batch is durable, so long after its first event happened."""

    def released(self, release: Release, seconds: float) -> None:
        """A release came to an outcome."""

    def paid(self, seconds: float) -> None:
        """Usage was paid, so long after the oldest of it came."""

    def gate(self, *, allowed: bool, seconds: float) -> None:
        """The gate has answered, so long after it was asked."""

    def alarm(self, action: str) -> None:
        """Something happened that a person must know."""


class Watcher(Protocol):
    """Who shows what happens while it happens: the live stream."""

    def accrued(self, accounts: Iterable[Account]) -> None:
        """Usage of these was counted, or taken back."""

    def released(self, release: Release) -> None:
        """A release is in a new state, and durable."""

    def moved(self, escrow: Escrow) -> None:
        """An escrow is in another state, or new."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of some deliveries. Nobody may be told before `durable` is done."""

    received: int
    accepted: int
    duplicates: int
    rejections: Sequence[Rejection]
    durable: asyncio.Future[None]


class Bookkeeper:
    """Owner of the ledger. All methods run on the event loop's thread."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        identities: Identities,
        rules: Rules,
        clock: Clock,
        facts: Facts,
        *,
        decoder: EventDecoder,
        window_ms: int,
        positions: Mapping[str, str],
        dead_letters: int,
        dead_letter_next: int,
        holds: Sequence[Hold] = (),
        voids: Sequence[VoidRow] = (),
        void_next: int = 1,
        sequences: Sequences | None = None,
        producers: Producers | None = None,
    ) -> None:
        self.ledger = ledger
        self.producers = producers or Producers()  # Another one after a reload.
        self.store = store
        self.rules = rules
        self.clock = clock
        self.positions = dict(positions)
        self.dead_letters = dead_letters
        self.pending = 0  # Deliveries that are applied and not yet durable.
        self.keys = Keys()
        self.notary: Notary | None = None  # None: no receipts are made.
        self.watcher: Watcher | None = None  # None: nobody watches.
        self.due_changed = asyncio.Event()
        self._due: dict[str, None] = {}  # Escrows that want a visit, oldest first.
        # Escrows that a person wants settled, whatever the thresholds say, and what was owed then.
        self._asked: dict[str, int] = {}
        # (wall ms, escrow): when time alone may make something due.
        self._looks: list[tuple[int, str]] = []
        self._look_at: dict[str, int] = {}
        self._identities = identities
        self._facts = facts
        self._decoder = decoder
        self._window_ms = window_ms
        self._dead_letter_next = dead_letter_next
        self._letters_lock = asyncio.Lock()
        self.holds = Holds(holds)
        self.sequences = Sequences() if sequences is None else sequences
        self._holds_gone: list[str] = []  # Expired, and still to be taken off the disk.
        self._voids = deque(voids)
        self._void_next = void_next
        self._voids_changed = asyncio.Event()

    # -- Deliveries
    # ------------------------------------------------------------------------------------------

    def record(
        self, source: str, deliveries: Deliveries, *, replaces: DeadLetter | None = None
    ) -> Recorded:
        """Account for deliveries: each is accepted, a duplicate or a rejection.

        With `replaces` the one delivery is a dead letter that is tried again: it is gone when it is
        no more rejected.
        """
        now = self.clock.wall()
        # 1. Read.
        senders = self._senders(source, deliveries, now, replaces) if self.producers else None
        decoded = self._decoder.decode(deliveries.payloads)
        if deliveries.fields is not None or deliveries.faults:
            decoded = [
                _with_address(index, event, deliveries, fills=not _signs(senders, index))
                for index, event in enumerate(decoded)
            ]
        # 2. Find counters and identities.
        oldest = 0 if replaces is not None else self._oldest(now)
        resolved = self.ledger.resolve(decoded, deliveries.ids, source, oldest, now)
        if senders is not None:
            _refuse_foreign(resolved, senders)
            _limit(resolved, senders)
        numbers = take_numbers(resolved.events)
        digest, fingerprint = self._identities.digest, self._identities.fingerprint
        digests = [digest(event.source, event.id) for event in resolved.events]
        prints = [fingerprint(content) for content in contents(resolved.events)]
        known = self._identities.find(b"".join(digests))
        known = self._judge_late(resolved, numbers, prints, known, replaces, now)
        voided = self._look_up_voids(resolved, digests) if resolved.special else {}
        if resolved.special:
            self._refuse_unsigned(resolved)
        # 3. Decide and apply.
        entry = self.ledger.decide(resolved, digests, prints, known, now)
        buckets = resolved.buckets
        if replaces is not None:
            buckets = [now // HOUR_MS] * len(buckets)
        marks = self._mark(entry, digests, prints, buckets)
        taken = self._take(resolved, entry, digests, now // HOUR_MS)
        voids = self._void(entry, voided, now)
        if voids:
            marks += self._identities.add(
                b"".join(voided[id(event)] for event in entry.voids),
                [0] * len(voids),
                [now // HOUR_MS] * len(voids),
            )
        noted = self._note_numbers(resolved, entry, numbers, replaces, now)
        touched = self.ledger.apply(entry, now)
        received = len(deliveries.payloads)
        if entry.accepted + entry.duplicates + len(entry.rejections) != received:
            raise InvariantBroken(f"{received} deliveries came, and not each has one verdict")
        # 4. Hand over to the store.
        letters = self._letters(source, deliveries, entry.rejections, now, replaces, senders)
        gone = (replaces.number,) if replaces is not None and not letters else ()
        self.dead_letters += 0 if replaces is not None else len(letters)
        self.dead_letters -= len(gone)
        if deliveries.position is not None:
            self.positions[source] = deliveries.position
        closing = [escrow for account in entry.closes for escrow in self._close_escrows(account)]
        stopped = self._stop_racing(entry)
        change = replace(
            touched.change(),
            marks=marks,
            taken=taken,
            voids=voids,
            holds_gone=self._captured(resolved, entry),
            dead_letters=tuple(letters),
            dead_letters_gone=gone,
            positions=() if deliveries.position is None else ((source, deliveries.position),),
            escrows=(*closing, *stopped),
            journal=self._stops(stopped),
            producers=noted.kept,
            producers_gone=noted.gone,
            numbers_from=noted.numbers_from,
        )
        happened = None if replaces is not None else _happened(resolved, entry, now)
        durable = self._commit(change, received, happened)
        # 5. Tell.
        self._facts.batch(source, entry, _by_meter(entry))
        if self.watcher is not None:
            self.watcher.accrued(touched.accounts)
        for account in touched.accounts:
            self._look(account, now)
        self._tell_stopped(stopped)
        return Recorded(received, entry.accepted, entry.duplicates, entry.rejections, durable)

    def _mark(
        self, entry: Entry, digests: list[bytes], prints: list[int], buckets: list[int]
    ) -> tuple[MarkBlock, ...]:
        if entry.fresh is not None:
            chosen = [place for place, fresh in enumerate(entry.fresh) if fresh]
            digests = [digests[place] for place in chosen]
            prints = [prints[place] for place in chosen]
            buckets = [buckets[place] for place in chosen]
        if not digests:
            return ()
        return self._identities.add(b"".join(digests), prints, buckets)

    def _take(
        self, resolved: ResolvedBatch, entry: Entry, digests: Sequence[bytes], bucket: int
    ) -> tuple[TakenBlock, ...]:
        """Note what each accepted event added, so that it can be taken back."""
        counters, quantities = resolved.counters, resolved.quantities
        if resolved.parts:
            return self._take_parts(resolved, entry, digests, bucket)
        if entry.fresh is None and not resolved.amounts and not resolved.keys:
            if not counters:
                return ()
            numbers = [counter.number for counter in counters if counter is not None]
            return self._identities.pack(bucket, b"".join(digests), numbers, quantities, {})
        chosen = [
            place
            for place, counter in enumerate(counters)
            if counter is not None and (entry.fresh is None or entry.fresh[place])
        ]
        if not chosen:
            return ()
        extras = {
            index: (resolved.amounts.get(place, 0), resolved.keys.get(place, ""))
            for index, place in enumerate(chosen)
            if place in resolved.amounts or place in resolved.keys
        }
        return self._identities.pack(
            bucket,
            b"".join(digests[place] for place in chosen),
            [counters[place].number for place in chosen],  # type: ignore[union-attr]
            [quantities[place] for place in chosen],
            extras,
        )

    def _take_parts(
        self, resolved: ResolvedBatch, entry: Entry, digests: Sequence[bytes], bucket: int
    ) -> tuple[TakenBlock, ...]:
        """Note the same of a batch in which an event may have added to several counters.

        The first of them is found under the event's own digest, the others under `_part_id`.
        """
        keys: list[bytes] = []
        taken: list[Charged] = []
        for place, counter in enumerate(resolved.counters):
            if entry.fresh is not None and not entry.fresh[place]:
                continue
            if counter is not None:
                amount, sample = resolved.amounts.get(place, 0), resolved.keys.get(place, "")
                keys.append(digests[place])
                taken.append(Charged(counter, resolved.quantities[place], amount, sample))
            for number, part in enumerate(resolved.parts.get(place, ())):
                event = resolved.events[place]
                part_id = _part_id(event.id, number)
                keys.append(self._identities.digest(event.source, part_id))
                taken.append(part)
        if not taken:
            return ()
        extras = {
            index: (part.amount, part.key)
            for index, part in enumerate(taken)
            if part.amount or part.key
        }
        return self._identities.pack(
            bucket,
            b"".join(keys),
            [part.counter.number for part in taken],
            [part.quantity for part in taken],
            extras,
        )

    def _judge_late(
        self,
        resolved: ResolvedBatch,
        numbers: Mapping[int, int],
        prints: Sequence[int],
        known: Sequence[int],
        replaces: DeadLetter | None,
        now: int,
    ) -> Sequence[int]:
        """Tell by their numbers which events that are too old were counted before.

        Those that were not are new; where the numbers do not tell, an event waits for a person. One
        that a person tries again is counted unless its number shows that it was.
        """
        if not resolved.late and (replaces is None or not numbers):
            return known
        oldest = self._oldest(now)
        verdicts = list(known)
        new: set[tuple[str, int | None]] = set()
        for place, (index, event) in enumerate(zip(resolved.indices, resolved.events, strict=True)):
            at, number = time_of(event), numbers.get(place)
            if at is None or at >= oldest or known[place] >= 0:
                continue
            says = Known.UNKNOWN
            if number is not None:
                says = self.sequences.judge(event.source, number, at)
            if says is Known.SEEN or (event.source, number) in new:
                verdicts[place] = prints[place]
            elif index in resolved.refused:
                continue
            elif says is Known.MISSING:
                new.add((event.source, number))
            elif replaces is None:
                resolved.refused[index] = Reason.LATE, f"{event.time} {_TOO_OLD}"
        return verdicts

    def _note_numbers(
        self,
        resolved: ResolvedBatch,
        entry: Entry,
        numbers: Mapping[int, int],
        replaces: DeadLetter | None,
        now: int,
    ) -> Noted:
        """Note the numbers of what is counted now or was before; a rejected one stays missing."""
        if not numbers:
            return Noted()
        rejected = {rejection.index for rejection in entry.rejections}
        counted: dict[str, list[Counted]] = {}
        for place, number in numbers.items():
            fresh = entry.fresh is None or entry.fresh[place]
            event = resolved.events[place]
            at = time_of(event)
            # When an event without a time came first, nobody knows any more.
            if resolved.indices[place] in rejected or (at is None and not fresh):
                continue
            if replaces is not None:
                at, fresh = at or replaces.received_at, False
            counted.setdefault(event.source, []).append((number, now if at is None else at, fresh))
        noted = self.sequences.note(counted, now)
        for name in noted.began:
            if self.sequences.is_exact(name):
                log.info("A producer numbers anew.", action="numbers_anew", producer=name)
        for name in noted.blurred:
            log.warning(
                "A producer uses numbers twice: its late events wait for a person.",
                action="numbers_twice",
                producer=name,
                next="meterd producers",
            )
        return noted

    def _letters(
        self,
        source: str,
        deliveries: Deliveries,
        rejections: Sequence[Rejection],
        now: int,
        replaces: DeadLetter | None,
        senders: Sequence[Producer | None] | None,
    ) -> list[DeadLetter]:
        letters = []
        for rejection in rejections:
            index = rejection.index
            if replaces is None:
                number = self._dead_letter_next
                self._dead_letter_next += 1
            else:
                number = replaces.number
            fields = dict(deliveries.fields[index]) if deliveries.fields is not None else {}
            if senders is not None:
                fields |= kept(senders[index], deliveries.proofs.get(index))
            letters.append(
                DeadLetter(
                    number=number,
                    source=source,
                    event_id=rejection.id,
                    reason=rejection.reason.value,
                    detail=rejection.detail,
                    # A broker may hand over megabytes: what is too large is kept in part.
                    payload=bytes(deliveries.payloads[index][:EVENT_BYTES_MAX]),
                    transport_id=deliveries.ids[index] if deliveries.ids is not None else "",
                    fields=tuple(fields.items()),
                    received_at=now if replaces is None else replaces.received_at,
                )
            )
        return letters

    def _senders(
        self, source: str, deliveries: Deliveries, now: int, replaces: DeadLetter | None
    ) -> list[Producer | None]:
        """Tell who sent each delivery; what waited at a broker may be as old as the memory."""
        age_max = self._window_ms if replaces is None else None
        return self.producers.senders(source, deliveries, now, age_max)

    # -- Holds --------------------------------------------------------------------------------

    async def authorize(
        self,
        account: Account,
        ask: Ask,
        *,
        hold_ms: int | None = None,
        hold_id: str | None = None,
    ) -> tuple[Verdict, Hold | None]:
        """Say whether a call may be served; with `hold_ms`, set its price aside for so long.

        The verdict and the hold are one step; the hold is durable when this returns. `hold_id`: its
        id, which no live hold has; None: a new one is made.
        """
        asked = self.clock.mono()
        now = self.clock.wall()
        self._expire_holds(now)
        verdict = self.holds.judge(self.ledger, account, ask, now)
        if not verdict.allowed:
            self._look_for_refill(account)
        if hold_ms is None or not verdict.allowed:
            self._facts.gate(allowed=verdict.allowed, seconds=self.clock.mono() - asked)
            return verdict, None
        hold = Hold(
            id=hold_id or f"hold_{secrets.token_hex(12)}",
            agreement=account.agreement.id,
            amount=verdict.needed,
            meter=ask.meter,
            dimensions=tuple(sorted(ask.dimensions.items())),
            quantity=ask.quantity,
            created_at=now,
            expires_at=now + hold_ms,
        )
        self.holds.add(hold)
        await self._durable(Change(holds=(hold,)))
        self._facts.gate(allowed=True, seconds=self.clock.mono() - asked)
        return verdict, hold

    def live_hold(self, hold_id: str) -> Hold | None:
        """Find a hold that is live now."""
        self._expire_holds(self.clock.wall())
        return self.holds.get(hold_id)

    async def authorized(self, account: Account, hold: Hold) -> Verdict:
        """Say once more what was said when a live hold was made; it is durable at the return."""
        ask = Ask(hold.meter, hold.quantity, dict(hold.dimensions))
        room = self.holds.judge(self.ledger, account, ask, self.clock.wall()).headroom
        await self._durable(Change())  # The hold itself may still be on its way to the disk.
        return Verdict(
            allowed=True,
            needed=hold.amount,
            headroom=None if room is None else room + hold.amount,
        )

    def _look_for_refill(self, account: Account) -> None:
        """Read a payer's wallet again, now that the gate denies: he may have filled it up."""
        for escrow in self._open_escrows(account):
            reading = escrow.reading
            old = reading is None or self.clock.mono() - reading.mono >= REFILL_LOOK_S
            if escrow.refillable and old:
                self.visit(escrow.id)

    def capture(self, hold: Hold, quantity: str, producer: str = "") -> Recorded:
        """Record what a hold's work really used, as a usage event with the hold's id.

        Captured again with the same quantity it is a duplicate. `producer`: who says so, if known.
        """
        event = {
            "id": hold.id,
            "source": HOLD_SOURCE,
            "agreement": hold.agreement,
            "meter": hold.meter,
            "quantity": quantity,
            "dimensions": dict(hold.dimensions),
            "hold": hold.id,
        }
        payloads = [msgspec.json.encode(event)]
        return self.record(HOLD_SOURCE, Deliveries(payloads, producer=producer))

    def was_captured(self, hold_id: str) -> bool:
        """Whether usage was recorded for this hold, so that a repeated capture can be answered."""
        return self._identities.find(self._identities.digest(HOLD_SOURCE, hold_id))[0] >= 0

    async def void_hold(self, hold: Hold) -> None:
        """Free what a hold has set aside: its work was not done."""
        self.holds.remove(hold.id)
        await self._durable(Change(holds_gone=(hold.id,)))

    def _captured(self, resolved: ResolvedBatch, entry: Entry) -> tuple[str, ...]:
        """Free the holds that accepted usage names."""
        gone = []
        for place, hold_id in resolved.holds.items():
            hold = self.holds.get(hold_id)
            event = resolved.events[place]
            mine = hold is not None and hold.agreement == event.agreement
            if mine and (entry.fresh is None or entry.fresh[place]):
                self.holds.remove(hold_id)
                gone.append(hold_id)
        return tuple(gone)

    def _expire_holds(self, now: int) -> tuple[str, ...]:
        """Free the holds that nobody captured in time; their rows go with the next tidying."""
        self._holds_gone += [hold.id for hold in self.holds.expire(now)]
        return tuple(self._holds_gone)

    def _refuse_unsigned(self, resolved: ResolvedBatch) -> None:
        """Refuse outcomes without their evaluator's signature, where the plan knows its key."""
        for index, counter, event in zip(
            resolved.indices, resolved.counters, resolved.events, strict=True
        ):
            if counter is None or event.type != OUTCOME_TYPE or index in resolved.refused:
                continue
            key = counter.account.plan.outcome_key
            if key is None:
                continue
            score = str(event.score)
            flaw = outcome_flaw(key, event.agreement, event.id, score, event.signature)
            if flaw:
                resolved.refused[index] = Reason.BAD_SIGNATURE, flaw

    # -- Events that are taken back ------------------------------------------------------------

    def _look_up_voids(self, resolved: ResolvedBatch, digests: Sequence[bytes]) -> dict[int, bytes]:
        """Refuse voids of what is not there; for the others, the mark that each leaves.

        The mark is an identity of its own, so that an event is taken back once, whatever the ids of
        the voids. Keyed by the event's object.
        """
        found: dict[int, bytes] = {}
        earlier: set[bytes] = set()
        for place, event in enumerate(resolved.events):
            if event.type == VOID_TYPE and resolved.indices[place] not in resolved.refused:
                target = self._identities.digest(event.source, event.voids)
                mark = self._identities.digest(f"{event.source}{_VOIDED}", event.voids)
                there, gone = self._identities.find(target + mark)
                if there < 0 and target not in digests[:place]:
                    why = f"no event {event.voids[:80]!r} of {event.source} is remembered"
                    resolved.refused[resolved.indices[place]] = Reason.UNKNOWN_EVENT, why
                elif gone >= 0 or mark in earlier:
                    why = f"event {event.voids[:80]!r} was taken back already"
                    resolved.refused[resolved.indices[place]] = Reason.UNKNOWN_EVENT, why
                else:
                    found[id(event)] = mark
                    earlier.add(mark)
        return found

    def _void(self, entry: Entry, voided: Mapping[int, bytes], now: int) -> tuple[VoidRow, ...]:
        """Number the accepted voids: each is durable before its event is looked for."""
        rows = []
        for event in entry.voids:
            assert id(event) in voided, "a void without a mark has been refused"
            rows.append(VoidRow(self._void_next, event.agreement, event.source, event.voids, now))
            self._void_next += 1
        if rows:
            self._voids.extend(rows)
            self._voids_changed.set()
        return tuple(rows)

    async def take_back_voided(self) -> None:
        """Take the events of accepted voids back, for as long as the daemon runs.

        What was paid for them already becomes a credit: the next releases are smaller.
        """
        while True:
            while self._voids:
                await self._take_back(self._voids[0])
                self._voids.popleft()
            self._voids_changed.clear()
            await self._voids_changed.wait()

    async def _take_back(self, void: VoidRow) -> None:
        parts = [(counter, taken) async for counter, taken in self._find_taken(void)]
        now = self.clock.wall()
        if not parts:
            detail = (
                f"event {void.voids[:80]!r} of {void.source} is not among this agreement's usage"
            )
            log.error(
                f"Nothing was taken back: {detail}.",
                action="void_failed",
                agreement=void.agreement,
                next=f"meterd agreements {void.agreement}",
            )
            self._facts.alarm("void_failed")
            entry = self._journal("meterd", "void_failed", void.agreement, detail)
            await self._durable(Change(voids_gone=(void.number,), journal=(entry,)))
            return
        touched = Touched()
        for number, (counter, one) in enumerate(parts):
            self.ledger.take_back(
                counter, one.quantity, one.amount, one.sample, touched, shared=number > 0
            )
        entry = self._journal("meterd", "event_taken_back", void.agreement, void.voids)
        change = replace(touched.change(), voids_gone=(void.number,), journal=(entry,))
        await self._durable(change)
        self._look(self.ledger.accounts[void.agreement], now)

    async def _find_taken(self, void: VoidRow) -> AsyncIterator[tuple[Counter, Taken]]:
        """Find what the event of a void added, counter by counter; nothing where that is unclear.

        Whatever is not found of a later part was never there: all parts are of one commit.
        """
        for number in itertools.count():
            digest = self._identities.digest(void.source, _part_id(void.voids, number))
            found = await self.store.find_taken(digest)
            counter = self.ledger.counter(found[0].counter) if len(found) == 1 else None
            if counter is None or counter.account.agreement.id != void.agreement:
                return
            yield counter, found[0]

    def _commit(
        self, change: Change, deliveries: int = 0, happened: int | None = None
    ) -> asyncio.Future[None]:
        """Hand a change to the store. `happened`: when the first event of the batch did."""
        begun = BEGUN.get()
        if begun is not None and not begun.written:
            begun.written = True
            change = replace(change, keys=(begun.row,))
        future = self.store.commit(change)
        if deliveries:
            self.pending += deliveries

            def settled(done: asyncio.Future[None]) -> None:
                self.pending -= deliveries
                if happened is not None and not done.cancelled() and done.exception() is None:
                    self._facts.committed((self.clock.wall() - happened) / 1000)

            future.add_done_callback(settled)
        return future

    async def keep_answer(self, row: KeyRow) -> None:
        """Remember the answer of a call with a key; durable at the return."""
        gone = self.keys.put(row, self.clock.wall())
        await self._durable(Change(keys=(row,), keys_gone=tuple(gone)))

    async def forget_key(self, row: KeyRow) -> None:
        """Forget a key whose call was refused after all."""
        self.keys.forget(row.owner, row.key)
        await self._durable(Change(keys_gone=((row.owner, row.key),)))

    def _oldest(self, now: int) -> int:
        """From when on events are taken: never from an hour whose identities are forgotten."""
        return max(now - self._window_ms, self._identities.bucket_min * HOUR_MS)

    async def tidy(self) -> None:
        """Forget identities that left the window; shrink it, visibly, at the limit of entries."""
        now = self.clock.wall()
        bucket = (now - self._window_ms) // HOUR_MS
        shrunk = self._identities.shrink()
        if shrunk is not None and shrunk > bucket:
            bucket = shrunk
            self._window_ms = now - shrunk * HOUR_MS
            log.warning(
                "The dedupe window shrinks: its limit of entries is reached.",
                action="dedupe_window_shrunk",
                window_hours=self._window_ms // HOUR_MS,
            )
            self._facts.alarm("dedupe_window_shrunk")
        if self._identities.expire(bucket):
            await self._commit(Change(marks_from=bucket))
        gone = self._expire_holds(now)
        if gone:
            await self._commit(Change(holds_gone=gone))
            del self._holds_gone[: len(gone)]

    # -- Dead letters
    # ----------------------------------------------------------------------------------------

    async def replay(self, number: int) -> Recorded:
        """Try a dead letter again, as it came; a late one is priced now, as a person asked.

        Raises `NotFound`.
        """
        async with self._letter(number) as letter:
            fields, producer, proof = taken_out(dict(letter.fields))
            deliveries = Deliveries(
                payloads=[letter.payload],
                ids=[letter.transport_id] if letter.transport_id else None,
                fields=[fields] if fields else None,
                proofs={} if proof is None else {0: proof},
                producer=producer,
            )
            recorded = self.record(letter.source, deliveries, replaces=letter)
            await asyncio.shield(recorded.durable)
            return recorded

    async def discard(self, number: int, actor: str, reason: str) -> None:
        """Throw a dead letter away, for a reason that is journalled. Raises `NotFound`."""
        async with self._letter(number) as letter:
            self.dead_letters -= 1
            entry = self._journal(actor, "dead_letter_discarded", f"dead letter {number}", reason)
            change = Change(dead_letters_gone=(number,), journal=(entry,))
            await self._durable(replace(change, producers=self._awaited_no_more(letter)))

    def _awaited_no_more(self, letter: DeadLetter) -> tuple[ProducerRow, ...]:
        """Note that nobody waits for the number of a discarded letter."""
        event = self._decoder.decode([letter.payload])[0]
        if isinstance(event, Rejection):
            return ()
        number = number_of(event.sequence)
        if number is None:
            return ()
        at = time_of(event) or letter.received_at
        source, now = event.source or letter.source, self.clock.wall()
        row = self.sequences.discard(source, number, at, now)
        return () if row is None else (row,)

    async def give_up(self, source: str, actor: str, reason: str) -> int:
        """Wait no more for what is missing of a producer; how many events these were.

        Raises `NotFound`, `Refused`.
        """
        producer = self.sequences.producer(source)
        if producer is None:
            raise NotFound(f"{source!r} numbers no events; see who does: meterd producers")
        missing = producer.missing
        row = self.sequences.give_up(source)
        if row is None:
            raise Refused(f"nothing of {source} is missing")
        entry = self._journal(actor, "numbers_given_up", source, f"{missing}: {reason}")
        await self._durable(Change(producers=(row,), journal=(entry,)))
        return missing

    @contextlib.asynccontextmanager
    async def _letter(self, number: int) -> AsyncIterator[DeadLetter]:
        """Take a dead letter in hand, alone: two at once would count it as gone twice."""
        async with self._letters_lock:
            letter = await self.store.dead_letter(number)
            if letter is None:
                raise NotFound(f"there is no dead letter {number}; list them: meterd dead-letters")
            yield letter

    # -- Agreements and persons
    # ------------------------------------------------------------------------------

    async def bind(self, agreement: Agreement, actor: str) -> Account:
        """Bind escrows to a plan. Binding again what is bound changes nothing. Raises `Refused`."""
        try:
            change = self.ledger.bind(agreement, self.clock.wall())
        except Conflict as conflict:
            raise Refused(str(conflict)) from None
        account = self.ledger.accounts[agreement.id]
        if change == Change():
            await self._durable(change)  # The first binding may still be on its way to the disk.
            return account
        detail = f"plan {agreement.plan}, escrows {dict(agreement.escrows)}"
        entries = [self._journal(actor, "agreement_bound", agreement.id, detail)]
        if account.is_racing:  # A new escrow is no way around a person's look.
            stopped = self._stop(account)
            entries += self._stops(stopped)
            change = replace(change, escrows=(*change.escrows, *stopped))
        await self._durable(replace(change, journal=tuple(entries)))
        for escrow in change.escrows:
            self._moved(escrow)
            self.visit(escrow.id)
        return account

    async def note_openings(
        self, openings: Sequence[Opening], actor: str, action: str, subject: str, detail: str
    ) -> None:
        """Write down where openings stand, with an entry of the journal; durable at the return."""
        entry = self._journal(actor, action, subject, detail)
        await self._durable(Change(openings=tuple(openings), journal=(entry,)))

    def alarm(self, action: str) -> None:
        """Count, for the metrics, something that a person must know."""
        self._facts.alarm(action)

    async def close(self, account: Account, actor: str, reason: str = "") -> None:
        """Settle an agreement to the last quantum and close it."""
        touched = self.ledger.close(account, self.clock.wall())
        escrows = self._close_escrows(account)
        entry = self._journal(actor, "agreement_closing", account.agreement.id, reason)
        await self._durable(replace(touched.change(), escrows=tuple(escrows), journal=(entry,)))
        for escrow in escrows:
            self._moved(escrow)
        self._visit_all(account)

    def _moved(self, escrow: Escrow) -> None:
        if self.watcher is not None:
            self.watcher.moved(escrow)

    def _stop_racing(self, entry: Entry) -> list[Escrow]:
        """Freeze what is left of the agreements that this batch has made accrue too fast."""
        racing = {account: None for account, _ in entry.spent if account.is_racing}
        return [escrow for account in racing for escrow in self._stop(account)]

    def _stops(self, stopped: Sequence[Escrow]) -> tuple[JournalEntry, ...]:
        """Journal them as the freeze that they are: whoever checks the books looks for it."""
        return tuple(self._journal("meterd", FROZEN, one.id, one.reason) for one in stopped)

    def _tell_stopped(self, stopped: Sequence[Escrow]) -> None:
        for escrow in stopped:
            self._alarm(escrow.id, Alarm(RACING, escrow.reason))

    def _stop(self, account: Account) -> list[Escrow]:
        """Freeze what is left of an agreement that accrues too fast, until a person has looked."""
        caps = account.plan.caps or NO_CAPS
        limit, span = format_amount(caps.velocity or 0), advice.span(caps.window / 1000)
        why = (
            f"more than {limit} USDC within {span} (plans.{account.plan.name}.caps.velocity_max):"
            " nothing is paid until a person agrees"
        )
        going = [
            one for one in self._open_escrows(account) if one.status is not EscrowStatus.FROZEN
        ]
        return [self._put(escrow.id, Freeze(why))[0] for escrow in going]

    def _close_escrows(self, account: Account) -> list[Escrow]:
        """Mark what is left of an agreement's escrows as closing."""
        escrows = [escrow.id for escrow in self._open_escrows(account)]
        return [self._put(escrow, Closing())[0] for escrow in escrows]

    def _open_escrows(self, account: Account) -> list[Escrow]:
        escrows = self.ledger.escrows_of(account)
        return [escrow for escrow in escrows if escrow.status is not EscrowStatus.CLOSED]

    def _visit_all(self, account: Account) -> None:
        for escrow in self._open_escrows(account):
            self.visit(escrow.id)

    async def settle(self, account: Account, actor: str, reason: str = "") -> None:
        """Release what is unsettled now, whatever the thresholds say."""
        entry = self._journal(actor, "settlement_asked", account.agreement.id, reason)
        await self._durable(Change(journal=(entry,)))
        for escrow in self._open_escrows(account):
            self._asked[escrow.id] = self.ledger.owed_on(account, escrow)
        self._visit_all(account)

    async def backup(self, path: Path, actor: str) -> None:
        """Copy the store into a new file. Raises `Refused`.

        Journal first: a copy that is restored one day says in its last entry what it is.
        """
        entry = self._journal(actor, "backup_asked", str(path), "")
        await self._durable(Change(journal=(entry,)))
        await self.store.backup(path)

    async def freeze(self, account: Account, actor: str, reason: str) -> None:
        """Make no more releases on an agreement's escrows. Raises `Refused`."""
        event = Freeze(f"{actor}: {reason}")
        await self._act(self._open_or_first(account), event, actor, "escrow_frozen", reason)

    async def resume(self, account: Account, actor: str, reason: str) -> None:
        """Go on from what the service shows now. Raises `Refused`."""
        frozen = [
            escrow.id
            for escrow in self.ledger.escrows_of(account)
            if escrow.status is EscrowStatus.FROZEN
        ]
        windows = account.windows.get(PLAN) if account.is_racing else None
        before = None if windows is None else replace(windows)
        if windows is not None:  # From now on, so that usage of a moment later stops nothing.
            windows.begin(self.clock.wall())
        try:
            event = Resume(reason, self.clock.wall())
            await self._act(
                frozen or self._open_or_first(account), event, actor, "escrow_resumed", reason
            )
            if windows is not None:
                await self._durable(Change(agreements=(account.row,)))
        except Refused:
            if before is not None:
                account.windows[PLAN] = before
            raise
        finally:
            # Where a reading is missing or too old to resume on, the next try shall find a new one.
            for escrow in frozen:
                self.visit(escrow)

    async def resolve(self, escrow: str, actor: str, reason: str, *, landed: bool) -> None:
        """Say what became of an escrow's release in doubt. Raises `Refused`."""
        event = Resolved(landed, reason, self.clock.mono(), self.clock.wall())
        action = "release_landed" if landed else "release_absent"
        await self._act([escrow], event, actor, action, reason)
        self.visit(escrow)

    def _open_or_first(self, account: Account) -> list[str]:
        """The escrows that a person's act is meant for; where all are closed, one that says so."""
        return [escrow.id for escrow in self._open_escrows(account)] or [account.escrow]

    async def _act(
        self, escrows: Sequence[str], event: Input, actor: str, action: str, reason: str
    ) -> None:
        for escrow in escrows:
            entry = self._journal(actor, action, escrow, reason)
            try:
                await self.step(escrow, event, entry)
            except NotAllowed as error:
                raise Refused(str(error)) from None

    async def reload(self, plans: Mapping[str, Plan], meters: Mapping[str, Meter]) -> None:
        """Take changed plans and meters. Raises `Refused`, having changed nothing."""
        try:
            change = self.ledger.reload(plans, meters)
        except Conflict as conflict:
            raise Refused(str(conflict)) from None
        if change != Change():
            await self._durable(change)

    def _journal(self, actor: str, action: str, subject: str, detail: str) -> JournalEntry:
        return JournalEntry(self.clock.wall(), actor, action, subject, detail)

    # -- Settlement
    # ------------------------------------------------------------------------------------------

    async def step(
        self, escrow: str, event: Input, journal: JournalEntry | None = None
    ) -> Sequence[Effect]:
        """Drive an escrow's state table one step; what is to be carried out, once it is durable.

        Raises `NotAllowed` as the table does.
        """
        before = self.ledger.escrows[escrow]
        account = self.ledger.accounts[before.agreement]
        after, effects = self._put(escrow, event)
        if self._wants_refund(account, before, after):
            after = replace(after, refund=True)
            self.ledger.put(after)
        if after.status is EscrowStatus.CLOSED and before.status is not EscrowStatus.CLOSED:
            effects = self._collectible(account, after, effects)
        entries = [journal] if journal is not None else []
        entries += [
            self._journal("meterd", effect.action, escrow, effect.detail)
            for effect in effects
            if isinstance(effect, Alarm)
        ]
        since = account.unsettled_since
        change = Change(
            agreements=self._interval(account, after, effects),
            escrows=() if stored(before) == stored(after) else (after,),
            releases=tuple(effect.release for effect in effects if isinstance(effect, Record)),
            receipts=self._receipts(account, before, after, effects),
            journal=tuple(entries),
        )
        if change != Change():
            await self._durable(change)
        self._tell(escrow, effects, since)
        if after.word != before.word:
            self._moved(after)
        asked = self._asked.get(escrow)
        if asked is not None and after.total and not after.held and not after.payable(asked):
            del self._asked[escrow]  # All that was owed when it was asked for is paid.
        return [effect for effect in effects if not isinstance(effect, Record | Alarm)]

    def _receipts(
        self, account: Account, before: Escrow, after: Escrow, effects: Effects
    ) -> tuple[ReceiptRow, ...]:
        """Make a receipt of each release that was paid, and one of the agreement's end."""
        if self.notary is None:
            return ()
        wanted: list[tuple[str, Release | None]] = [
            (KINDS[effect.release.status], effect.release)
            for effect in effects
            if isinstance(effect, Record) and effect.release.status in KINDS
        ]
        ended = EscrowStatus.CLOSED in {after.status} - {before.status}
        if ended and self.ledger.is_closed(account):
            wanted.append((CLOSE, None))
        now = self.clock.wall()
        return tuple(
            self.notary.receipt(statement(self.ledger, account, kind, now, release))
            for kind, release in wanted
        )

    def _put(self, escrow: str, event: Input) -> tuple[Escrow, Effects]:
        after, effects = step(self.ledger.escrows[escrow], event, self.rules)
        self.ledger.put(after)
        return after, effects

    def _wants_refund(self, account: Account, before: Escrow, after: Escrow) -> bool:
        """Whether this step has settled an escrow for good, and its plan returns the rest."""
        closed = after.status is EscrowStatus.CLOSED and before.status is not EscrowStatus.CLOSED
        left = after.remaining > 0 and after.service_status in LIVE and not after.refillable
        return closed and left and account.plan.at_close is AtClose.REFUND

    def _collectible(self, account: Account, ended: Escrow, effects: Effects) -> Effects:
        """Usage that an ended escrow leaves unpaid is lost only where no other one can pay it.

        Those that are left are looked at: from now on they owe it.
        """
        others = [escrow for escrow in self._open_escrows(account) if escrow.role == ended.role]
        for escrow in others:
            self.visit(escrow.id)
        if not others or not any(_is_loss(effect) for effect in effects):
            return effects
        rest = tuple(effect for effect in effects if not _is_loss(effect))
        lost = self.ledger.uncovered(account, ended.role)
        if lost > 0:
            detail = f"{ended.reason}: no escrow can pay {format_amount(lost)} USDC of its usage"
            return (*rest, Alarm("uncollectible", detail))
        log.info(
            f"{ended.reason}; what it left unpaid is drawn on the next one.",
            action="usage_moved_on",
            agreement=account.agreement.id,
            escrow=ended.id,
        )
        return rest

    async def refunded(self, escrow: str) -> None:
        """The rest of a closed escrow was asked back, or there is none: nothing more to do."""
        after = replace(self.ledger.escrows[escrow], refund=False)
        self.ledger.put(after)
        entry = self._journal("meterd", "refund_asked", escrow, "the rest goes to the payer")
        await self._durable(Change(escrows=(after,), journal=(entry,)))

    def _interval(
        self, account: Account, escrow: Escrow, effects: Effects
    ) -> tuple[AgreementRow, ...]:
        landed = [
            effect.release.amount
            for effect in effects
            if isinstance(effect, Record) and effect.release.status is ReleaseStatus.CONFIRMED
        ]
        # A piece of `release_max` leaves usage behind that is as old as before: its interval runs
        # on, so that the next piece is due at once and not an interval later.
        left = escrow.payable(self.ledger.owed_on(account, escrow)) > 0
        if not landed or (left and landed[0] >= self.rules.release_max):
            return ()
        row = self.ledger.settled_from(account, self.clock.wall())
        return () if row is None else (row,)

    def _tell(self, escrow: str, effects: Effects, since: int) -> None:
        """Tell what a step has done. `since`: when the oldest usage came that was unpaid before."""
        for effect in effects:
            if isinstance(effect, Alarm):
                self._alarm(escrow, effect)
            elif isinstance(effect, Record):
                release = effect.release
                seconds = (self.clock.wall() - release.created_at) / 1000
                self._facts.released(release, seconds)
                if since and release.status is ReleaseStatus.CONFIRMED:
                    self._facts.paid((self.clock.wall() - since) / 1000)
                if self.watcher is not None:
                    self.watcher.released(release)

    def _alarm(self, escrow: str, alarm: Alarm) -> None:
        """Tell a person, with the command to type next."""
        state = self.ledger.escrows[escrow]
        account = self.ledger.accounts[state.agreement]
        name, plan = account.agreement.id, account.plan.name
        log.error(
            alarm.detail,
            action=alarm.action,
            agreement=name,
            escrow=escrow,
            next=advice.next_command(name, state, state.word, plan) or f"meterd agreements {name}",
        )
        self._facts.alarm(alarm.action)

    async def start(self) -> None:
        """Step every escrow over the restart: what was open is in doubt now."""
        event = Restarted(self.clock.mono(), self.clock.wall())
        for escrow in list(self.ledger.escrows):
            if self.ledger.escrows[escrow].status is not EscrowStatus.CLOSED:
                await self.step(escrow, event)
        now = self.clock.wall()
        for account in self.ledger.accounts.values():
            self._look(account, now)
        escrows = self.ledger.escrows.values()
        frozen = sum(state.status is EscrowStatus.FROZEN for state in escrows)
        if frozen:
            log.warning(
                "Escrows are frozen and wait for a person.",
                action="found_frozen",
                escrows=frozen,
                next="meterd status",
            )

    def visit(self, escrow: str) -> None:
        """Ask for a visit of the settler to this escrow, now."""
        self._due[escrow] = None
        self.due_changed.set()

    def account_of(self, escrow: str) -> Account:
        """Find the account that an escrow is drawn on for."""
        return self.ledger.accounts[self.ledger.escrows[escrow].agreement]

    def owed_on(self, escrow: str) -> int:
        """What an escrow should have released by meterd in all, micros."""
        return self.ledger.owed_on(self.account_of(escrow), self.ledger.escrows[escrow])

    def due(self, escrow_id: str) -> str:
        """Name the threshold that asks for a release of this escrow now; "" when none does."""
        escrow, account = self.ledger.escrows[escrow_id], self.account_of(escrow_id)
        why = self._threshold(account, escrow, self.clock.wall())
        if not why and escrow.payable(self._asked.get(escrow_id, 0)) >= self.rules.quantum:
            why = "asked"
        return why

    def _threshold(self, account: Account, escrow: Escrow, now: int) -> str:
        standing = self.ledger.standing(account, escrow)
        pace = int(self.rules.min_interval * 1000)
        return due(account.plan.settle, escrow, standing, now, self.margin, pace)

    @property
    def margin(self) -> int:
        """How long before a deadline, in ms, what is due must leave: a doubt takes this long."""
        return int(self.rules.quarantine * 2000) + 60_000

    def take_due(self) -> list[str]:
        """Hand out the escrows that want a visit, and those that time alone made due."""
        now = self.clock.wall()
        while self._looks and self._looks[0][0] <= now:
            at, escrow = heapq.heappop(self._looks)
            if self._look_at.get(escrow) == at:
                del self._look_at[escrow]
                self._due[escrow] = None
        taken = list(self._due)
        self._due.clear()
        self.due_changed.clear()
        return taken

    @property
    def next_look(self) -> int | None:
        """When, in wall ms, time alone may make something due or end a period."""
        moments = [self._looks[0][0]] if self._looks else []
        ends = self.ledger.next_period_end
        return min([*moments, ends] if ends is not None else moments, default=None)

    def _look(self, account: Account, now: int) -> None:
        """Note, after usage or a release, whether something is due or when it will be."""
        for name in account.escrow_ids:
            self._look_at_escrow(account, self.ledger.escrows[name], now)

    def _look_at_escrow(self, account: Account, escrow: Escrow, now: int) -> None:
        """Look at one, if it is active with nothing open; the settler's own clock visits others."""
        if escrow.status is not EscrowStatus.ACTIVE or escrow.release is not None:
            return
        if self._threshold(account, escrow, now):
            self.visit(escrow.id)
            return
        standing = self.ledger.standing(account, escrow)
        at = next_look(account.plan.settle, escrow, standing, self.margin)
        if at is not None and self._look_at.get(escrow.id) != at:
            self._look_at[escrow.id] = at
            heapq.heappush(self._looks, (at, escrow.id))
            if self._looks[0][0] == at:
                self.due_changed.set()  # The settler sleeps until another moment.

    def look_again(self, escrow: str) -> None:
        """The settler is done with a visit: note when this escrow wants the next one."""
        self._look_at_escrow(
            self.account_of(escrow), self.ledger.escrows[escrow], self.clock.wall()
        )

    async def end_periods(self) -> None:
        """End the periods that are over: their fees are owed from now on, and durable."""
        touched, lapsed = self.ledger.end_periods(self.clock.wall(), self.margin)
        if not touched.accounts:
            return
        escrows = [escrow for account in lapsed for escrow in self._close_escrows(account)]
        entries = [
            self._journal("meterd", "agreement_lapsed", account.agreement.id, "nobody renewed it")
            for account in lapsed
        ]
        change = touched.change()
        await self._durable(replace(change, escrows=tuple(escrows), journal=tuple(entries)))
        if self.watcher is not None:
            self.watcher.accrued(touched.accounts)
        for account in touched.accounts:
            self._look(account, self.clock.wall())
        for account in lapsed:
            log.warning(
                "No escrow holds the fee of the period that ended: the agreement is closed.",
                action="agreement_lapsed",
                agreement=account.agreement.id,
                next="bind a new escrow under another id",
            )
            self._visit_all(account)

    async def _durable(self, change: Change) -> None:
        """Wait for a commit; a caller that is cancelled meanwhile does not cancel it."""
        await asyncio.shield(self._commit(change))


def stored(escrow: Escrow) -> Escrow:
    """The part of an escrow's state that its row holds; releases have rows of their own."""
    return replace(
        escrow,
        release=None,
        voids=(),
        reading=None,
        suspicion=None,
        low_since=None,
        next_mono=0.0,
        failures=0,
    )


def _is_loss(effect: Effect) -> bool:
    return isinstance(effect, Alarm) and effect.action == "uncollectible"


def _signs(senders: Sequence[Producer | None] | None, index: int) -> bool:
    """Whether a delivery's sender has signed it, and not its address."""
    sender = None if senders is None else senders[index]
    return sender is not None and bool(sender.keys)


def _refuse_foreign(resolved: ResolvedBatch, senders: Sequence[Producer | None]) -> None:
    """Refuse usage of agreements that are not its sender's to tell."""
    known: dict[tuple[str, str], bool] = {}
    for index, event in zip(resolved.indices, resolved.events, strict=True):
        sender = senders[index]
        if sender is None or not sender.agreements:
            continue
        key = sender.name, event.agreement
        if key not in known:
            known[key] = sender.may_send_for(event.agreement)
        if not known[key]:
            detail = f"{sender.name} may not send usage of {event.agreement}: see its agreements"
            resolved.refused[index] = Reason.NOT_ALLOWED, detail


def _limit(resolved: ResolvedBatch, senders: Sequence[Producer | None]) -> None:
    """Note the caps of each event's sender, where there are any."""
    for index in resolved.indices:
        sender = senders[index]
        if sender is not None and sender.caps is not None:
            resolved.limits[index] = sender.name, sender.caps


def _with_address(index: int, event: Decoded, deliveries: Deliveries, *, fills: bool) -> Decoded:
    """Bring in what the transport says of a delivery: its address, or that it is bad.

    An address fills nothing in where the payload is signed: it is not, and could be another's.
    """
    fault = deliveries.faults.get(index)
    if fault is not None:
        event_id = event.id if event.id.isprintable() else ""
        return Rejection(index, event_id[:200], fault.reason, fault.detail)
    if isinstance(event, Rejection) or deliveries.fields is None:
        return event
    for name, value in deliveries.fields[index].items():
        said = str(getattr(event, name))
        if said and said != value:
            detail = f"the address says {name} = {value[:80]}, the payload another"
            return Rejection(index, event.id[:200], Reason.MISMATCH, detail)
        if not said and fills:
            setattr(event, name, value)
    return event


def _part_id(event_id: str, number: int) -> str:
    """Under which id the parts of an event are found; no event has those behind the first."""
    return f"{event_id}{_PART}{number}" if number else event_id


def _happened(resolved: ResolvedBatch, entry: Entry, now: int) -> int | None:
    """When the first new event of a batch happened, by its own clock, or else came; None: none."""
    if not entry.accepted:
        return None
    place = 0 if entry.fresh is None else entry.fresh.index(True)
    at = time_of(resolved.events[place])
    return now if at is None else at


def _by_meter(entry: Entry) -> dict[str, int]:
    sums: dict[str, int] = {}
    for counter, quantity in entry.quantities.items():
        name = counter.meter.name
        sums[name] = sums.get(name, 0) + quantity
    return sums
