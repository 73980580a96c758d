"""What one commit holds: the effects of a batch, a settlement step or a person's act, as rows.

Counters and states are written as they are afterwards, never as differences, so that writing a
change twice is writing it once. Changes are committed in the order in which they were made; several
may share one commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from meterd.core.openings import Opening
from meterd.core.settlement import Escrow, Release


@dataclass(frozen=True, slots=True)
class AgreementRow:
    """An agreement and its sums; `units` and `unsettled_since` serve the thresholds."""

    id: str
    plan: str
    payer: str
    origin: str  # "config" or "api": who bound it.
    escrows: tuple[tuple[str, str], ...]  # (role, escrow id)
    closing: bool
    opened_at: int  # Wall ms.
    accrued: Fraction  # Exact USDC.
    events: int
    units: int  # Nanos of all its meters together, meterd's own apart.
    unsettled_since: int  # Wall ms of the oldest usage that no release was intended for; 0: none.
    period: int = 0  # The number of the running one; those before it have ended.
    spent: str = ""  # What was accrued in the windows of caps: see `caps.windows_text`.


@dataclass(frozen=True, slots=True)
class CounterRow:
    """Usage of one agreement by period, card, meter and priced dimensions: the five are its key."""

    agreement: str
    # The rate card that priced it: a changed plan counts on a new card, so nothing is re-priced.
    card: str
    meter: str
    dimensions: tuple[tuple[str, str], ...]  # Sorted by name.
    quantity: int  # Nanos.
    events: int
    period: int = 0
    amount: int = 0  # Of dynamic rates: the events' quantity x price, in 10^-21 USDC.
    number: int = 0  # A short name, from 1, by which taken events remember their counter.
    shared: int = 0  # How many of the events fed another counter first, and count there.


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What events of a counter said whose meter is not additive. A count of 0: taken back."""

    counter: int  # Its number.
    key: str
    quantity: int  # Nanos.
    count: int


@dataclass(frozen=True, slots=True)
class TakenBlock:
    """What the events of one hour's batch added, packed by `store.taken`."""

    bucket: int  # Hours since the epoch.
    wide: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """What one event added to one counter: nanos, 10^-21 USDC of a dynamic rate, a sample's key."""

    counter: int  # Its number.
    quantity: int
    amount: int
    sample: str


@dataclass(frozen=True, slots=True)
class VoidRow:
    """An accepted `meterd.void` whose event is still to be taken back."""

    number: int
    agreement: str
    source: str
    voids: str  # The id of the event that is taken back.
    at: int  # Wall ms.


@dataclass(frozen=True, slots=True)
class Hold:
    """Headroom set aside before the work is done, in micros. Key: id."""

    id: str
    agreement: str
    amount: int
    meter: str
    dimensions: tuple[tuple[str, str], ...]  # Sorted by name.
    quantity: int  # Nanos, as it was asked for.
    created_at: int  # Wall ms.
    expires_at: int  # Wall ms.


@dataclass(frozen=True, slots=True)
class ProducerRow:
    """A producer that numbers its events, as `core.sequences` knows it. Key: source."""

    source: str
    run: int  # From 1: how often its numbers have begun.
    intervals: tuple[tuple[int, int], ...]  # First and last of the numbers counted, ascending.
    since: int  # Wall ms, like the two below.
    latest: int
    exact: bool
    missing_since: int
    given_up: int  # How many numbers nobody waits for any more.


@dataclass(frozen=True, slots=True)
class CardRow:
    """A rate card, kept for ever: what was accrued under it can always be recomputed. Key: id."""

    id: str  # Made of its content.
    text: str  # JSON.


@dataclass(frozen=True, slots=True)
class MarkBlock:
    """Identities of accepted events whose time lies in one hour, packed by `store.identities`."""

    bucket: int  # Hours since the epoch.
    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A rejected delivery, kept whole. The store's owner gives `number`, each one once."""

    number: int
    source: str
    event_id: str
    reason: str
    detail: str
    payload: bytes
    # The transport's own id, and what its address said, so that a replay reads the same event.
    transport_id: str
    fields: tuple[tuple[str, str], ...]
    received_at: int  # Wall ms.


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    """A receipt, kept for ever. Key: agreement and number."""

    agreement: str
    number: int  # From 1 without gaps.
    at: int  # Wall ms.
    release: str  # The id of the release that it is for; "" of one that closes.
    statement: str  # Canonical JSON: what is hashed and signed.
    hash: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class KeyRow:
    """What an `Idempotency-Key` stands for. Key: owner and key.

    A status of 0: the call's work has begun, and no answer was given.
    """

    owner: str  # The name of the token.
    key: str
    fingerprint: bytes  # Of the request.
    at: int  # Wall ms.
    status: int = 0
    kind: str = ""  # The answer's content type.
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """An act that a person or a program must be able to look up later."""

    at: int  # Wall ms.
    actor: str
    action: str
    subject: str
    detail: str


@dataclass(frozen=True, slots=True)
class Change:
    """One commit, or a part of one. Everything in it becomes durable together, or nothing of it."""

    cards: tuple[CardRow, ...] = ()
    agreements: tuple[AgreementRow, ...] = ()
    counters: tuple[CounterRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    holds: tuple[Hold, ...] = ()
    holds_gone: tuple[str, ...] = ()
    marks: tuple[MarkBlock, ...] = ()
    taken: tuple[TakenBlock, ...] = ()
    voids: tuple[VoidRow, ...] = ()
    voids_gone: tuple[int, ...] = ()
    dead_letters: tuple[DeadLetter, ...] = ()
    dead_letters_gone: tuple[int, ...] = ()
    positions: tuple[tuple[str, str], ...] = ()  # (source, position)
    escrows: tuple[Escrow, ...] = ()
    releases: tuple[Release, ...] = ()
    receipts: tuple[ReceiptRow, ...] = ()
    keys: tuple[KeyRow, ...] = ()
    keys_gone: tuple[tuple[str, str], ...] = ()  # (owner, key)
    openings: tuple[Opening, ...] = ()
    producers: tuple[ProducerRow, ...] = ()
    producers_gone: tuple[str, ...] = ()
    journal: tuple[JournalEntry, ...] = ()
    marks_from: int | None = None  # Forget identities of earlier hours.
    # Wall ms: until then, events were counted whose producers' numbers are not remembered.
    numbers_from: int | None = None


@dataclass(slots=True)
class State:
    """All that a daemon finds in its store when it starts (identities apart)."""

    cards: list[CardRow] = field(default_factory=list)
    agreements: list[AgreementRow] = field(default_factory=list)
    counters: list[CounterRow] = field(default_factory=list)
    samples: list[SampleRow] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    voids: list[VoidRow] = field(default_factory=list)
    void_next: int = 1
    # With `release` (the open one) and `voids` filled in.
    escrows: list[Escrow] = field(default_factory=list)
    # Those whose escrow is not bound: unfinished, absent, or locked a moment before a crash.
    openings: list[Opening] = field(default_factory=list)
    opened: frozenset[str] = frozenset()  # Agreements that meterd itself has locked an escrow for.
    keys: list[KeyRow] = field(default_factory=list)
    # The number and the hash of each agreement's last receipt.
    receipts: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    positions: dict[str, str] = field(default_factory=dict)
    producers: list[ProducerRow] = field(default_factory=list)
    numbers_from: int = 0
    dead_letters: int = 0  # How many there are.
    dead_letter_next: int = 1
