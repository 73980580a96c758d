"""The tables of the embedded store, their versions, and the way of each fact to its row and back.

The rule kept here: the database itself refuses what must never be. A second unfinished release of
an escrow, an amount of zero, a release whose amount changes, a journal entry that is altered: no
code above has to be right for these. Numbers that may pass 64 bits are stored as INTEGER where they
fit and as decimal TEXT where they do not, never as REAL.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain

import msgspec

from meterd.core.changes import (
    AgreementRow,
    CardRow,
    Change,
    CounterRow,
    DeadLetter,
    Hold,
    JournalEntry,
    KeyRow,
    MarkBlock,
    ProducerRow,
    ReceiptRow,
    SampleRow,
    VoidRow,
)
from meterd.core.openings import Opening, OpeningStatus
from meterd.core.settlement import UNFINISHED, Escrow, EscrowStatus, Release, ReleaseStatus
from meterd.store import identities

APPLICATION_ID = 0x6D747264  # "mtrd": tells this file from any other database.
GENESIS = bytes(32)  # What the first journal entry is chained to.

Value = int | str | bytes | None
Row = tuple[Value, ...]


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _count(column: str) -> str:
    """A whole number >= 0 of any size: INTEGER, or decimal TEXT where that is too small."""
    digits = f"typeof({column}) = 'text' AND {column} NOT GLOB '*[^0-9]*'"
    whole = f"typeof({column}) = 'integer' AND {column} >= 0"
    return f"{column} ANY NOT NULL CHECK (({whole}) OR ({digits}))"


def _figure(column: str, null: str = " NOT NULL") -> str:
    """A whole number of any size and sign."""
    return f"{column} ANY{null} CHECK (typeof({column}) IN ('integer', 'text', 'null'))"


_UNFINISHED = _words(UNFINISHED)

_VERSION_1 = f"""
CREATE TABLE setting (name TEXT NOT NULL PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE card (
    id TEXT NOT NULL PRIMARY KEY CHECK (id <> ''), text TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE agreement (
    id TEXT NOT NULL PRIMARY KEY CHECK (id <> ''),
    plan TEXT NOT NULL,
    payer TEXT NOT NULL,
    origin TEXT NOT NULL CHECK (origin IN ('config', 'api')),
    escrows TEXT NOT NULL,
    closing INTEGER NOT NULL CHECK (closing IN (0, 1)),
    opened_at INTEGER NOT NULL,
    accrued TEXT NOT NULL CHECK (accrued GLOB '[0-9]*/[1-9]*'),
    events INTEGER NOT NULL CHECK (events >= 0),
    {_count("units")},
    unsettled_since INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE counter (
    agreement TEXT NOT NULL REFERENCES agreement (id) DEFERRABLE INITIALLY DEFERRED,
    card TEXT NOT NULL REFERENCES card (id) DEFERRABLE INITIALLY DEFERRED,
    meter TEXT NOT NULL,
    dimensions TEXT NOT NULL,
    {_count("quantity")},
    events INTEGER NOT NULL CHECK (events >= 0),
    PRIMARY KEY (agreement, card, meter, dimensions)
) STRICT, WITHOUT ROWID;

CREATE TABLE escrow (
    id TEXT NOT NULL PRIMARY KEY CHECK (id <> ''),
    agreement TEXT NOT NULL REFERENCES agreement (id) DEFERRABLE INITIALLY DEFERRED,
    role TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ({_words(EscrowStatus)})),
    reason TEXT NOT NULL,
    closing INTEGER NOT NULL CHECK (closing IN (0, 1)),
    {_figure("total")},
    {_figure("baseline")},
    {_count("settled")},
    {_figure("credited")},
    {_figure("observed")},
    {_figure("remaining")},
    service_status TEXT NOT NULL,
    provider TEXT,
    {_figure("deadline", "")},
    quarantine_factor INTEGER NOT NULL CHECK (quarantine_factor >= 1),
    {_count("units_settled")},
    settled_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX escrow_of_agreement ON escrow (agreement);

CREATE TABLE release (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE CHECK (id <> ''),
    escrow TEXT NOT NULL REFERENCES escrow (id) DEFERRABLE INITIALLY DEFERRED,
    amount INTEGER NOT NULL CHECK (amount > 0),
    {_figure("before")},
    status TEXT NOT NULL CHECK (status IN ({_words(ReleaseStatus)})),
    why TEXT NOT NULL,
    {_count("units")},
    created_at INTEGER NOT NULL,
    changed_at INTEGER NOT NULL,
    history TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX release_unfinished ON release (escrow) WHERE status IN ({_UNFINISHED});
CREATE INDEX release_absent ON release (escrow) WHERE status IN ('void', 'late');
CREATE INDEX release_of_escrow ON release (escrow, number);
CREATE INDEX release_by_status ON release (status, number);
CREATE TRIGGER release_stays BEFORE UPDATE ON release
WHEN new.escrow <> old.escrow OR new.amount <> old.amount OR new.before <> old.before
BEGIN SELECT RAISE(ABORT, 'a release never changes its escrow or amount'); END;
CREATE TRIGGER release_kept BEFORE DELETE ON release
BEGIN SELECT RAISE(ABORT, 'a release is never deleted'); END;

CREATE TABLE dead_letter (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    source TEXT NOT NULL,
    event_id TEXT NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL,
    payload BLOB NOT NULL,
    transport_id TEXT NOT NULL,
    fields TEXT NOT NULL,
    received_at INTEGER NOT NULL
) STRICT;
CREATE INDEX dead_letter_by_reason ON dead_letter (reason, number);

CREATE TABLE position (
    source TEXT NOT NULL PRIMARY KEY, position TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE mark_block (
    number INTEGER PRIMARY KEY,
    bucket INTEGER NOT NULL CHECK (bucket >= 0),
    count INTEGER NOT NULL CHECK (count > 0),
    data BLOB NOT NULL CHECK (length(data) = count * {identities.MARK_BYTES})
) STRICT;
CREATE INDEX mark_block_of_bucket ON mark_block (bucket, count);

CREATE TABLE journal (
    number INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL,
    hash BLOB NOT NULL CHECK (length(hash) = 32)
) STRICT;
CREATE TRIGGER journal_stays BEFORE UPDATE ON journal
BEGIN SELECT RAISE(ABORT, 'the journal is only ever added to'); END;
CREATE TRIGGER journal_kept BEFORE DELETE ON journal
BEGIN SELECT RAISE(ABORT, 'the journal is only ever added to'); END;
"""

_VERSION_2 = f"""
ALTER TABLE agreement ADD COLUMN period INTEGER NOT NULL DEFAULT 0 CHECK (period >= 0);
ALTER TABLE agreement ADD COLUMN spent TEXT NOT NULL DEFAULT '';
ALTER TABLE escrow ADD COLUMN refund INTEGER NOT NULL DEFAULT 0 CHECK (refund IN (0, 1));

CREATE TABLE counter_of_period (
    agreement TEXT NOT NULL REFERENCES agreement (id) DEFERRABLE INITIALLY DEFERRED,
    card TEXT NOT NULL REFERENCES card (id) DEFERRABLE INITIALLY DEFERRED,
    meter TEXT NOT NULL,
    dimensions TEXT NOT NULL,
    {_count("quantity")},
    events INTEGER NOT NULL CHECK (events >= 0),
    period INTEGER NOT NULL CHECK (period >= 0),
    {_count("amount")},
    number INTEGER NOT NULL UNIQUE CHECK (number > 0),
    PRIMARY KEY (agreement, period, card, meter, dimensions)
) STRICT, WITHOUT ROWID;
INSERT INTO counter_of_period
SELECT agreement, card, meter, dimensions, quantity, events, 0, 0, row_number() OVER ()
FROM counter;
DROP TABLE counter;
ALTER TABLE counter_of_period RENAME TO counter;

CREATE TABLE sample (
    counter INTEGER NOT NULL REFERENCES counter (number) DEFERRABLE INITIALLY DEFERRED,
    key TEXT NOT NULL,
    {_count("quantity")},
    count INTEGER NOT NULL CHECK (count >= 0),
    PRIMARY KEY (counter, key)
) STRICT, WITHOUT ROWID;

CREATE TABLE taken_block (
    number INTEGER PRIMARY KEY,
    bucket INTEGER NOT NULL CHECK (bucket >= 0),
    wide INTEGER NOT NULL CHECK (wide IN (0, 1)),
    data BLOB NOT NULL
) STRICT;
CREATE INDEX taken_block_of_bucket ON taken_block (bucket);

CREATE TABLE void (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    agreement TEXT NOT NULL REFERENCES agreement (id) DEFERRABLE INITIALLY DEFERRED,
    source TEXT NOT NULL,
    voids TEXT NOT NULL CHECK (voids <> ''),
    at INTEGER NOT NULL
) STRICT;

CREATE TABLE opening (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE CHECK (id <> ''),
    agreement TEXT NOT NULL,
    plan TEXT NOT NULL,
    payer TEXT NOT NULL,
    role TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount > 0),
    provider TEXT NOT NULL,
    hours INTEGER,
    memo TEXT NOT NULL UNIQUE,
    why TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ({_words(OpeningStatus)})),
    created_at INTEGER NOT NULL,
    changed_at INTEGER NOT NULL,
    escrow TEXT NOT NULL CHECK ((escrow <> '') = (status = 'locked')),
    detail TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX opening_unfinished ON opening (agreement, role)
WHERE status IN ('intended', 'in_doubt');
CREATE INDEX opening_by_status ON opening (status, number);
CREATE TRIGGER opening_stays BEFORE UPDATE ON opening
WHEN new.amount <> old.amount OR new.memo <> old.memo OR new.provider <> old.provider
BEGIN SELECT RAISE(ABORT, 'an opening never changes what was asked for'); END;
CREATE TRIGGER opening_kept BEFORE DELETE ON opening
BEGIN SELECT RAISE(ABORT, 'an opening is never deleted'); END;

CREATE TABLE receipt (
    agreement TEXT NOT NULL REFERENCES agreement (id) DEFERRABLE INITIALLY DEFERRED,
    number INTEGER NOT NULL CHECK (number > 0),
    at INTEGER NOT NULL,
    release TEXT NOT NULL,
    statement TEXT NOT NULL,
    hash BLOB NOT NULL CHECK (length(hash) = 32),
    signature BLOB NOT NULL CHECK (length(signature) = 64),
    PRIMARY KEY (agreement, number)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER receipt_stays BEFORE UPDATE ON receipt
BEGIN SELECT RAISE(ABORT, 'a receipt never changes'); END;
CREATE TRIGGER receipt_kept BEFORE DELETE ON receipt
BEGIN SELECT RAISE(ABORT, 'a receipt is never deleted'); END;

CREATE TABLE key (
    owner TEXT NOT NULL,
    key TEXT NOT NULL CHECK (key <> ''),
    fingerprint BLOB NOT NULL CHECK (length(fingerprint) = 32),
    at INTEGER NOT NULL,
    status INTEGER NOT NULL CHECK (status >= 0),
    kind TEXT NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (owner, key)
) STRICT, WITHOUT ROWID;

CREATE TABLE hold (
    id TEXT NOT NULL PRIMARY KEY CHECK (id <> ''),
    agreement TEXT NOT NULL REFERENCES agreement (id) DEFERRABLE INITIALLY DEFERRED,
    amount INTEGER NOT NULL CHECK (amount >= 0),
    meter TEXT NOT NULL,
    dimensions TEXT NOT NULL,
    {_count("quantity")},
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE producer (
    source TEXT NOT NULL PRIMARY KEY CHECK (source <> ''),
    run INTEGER NOT NULL CHECK (run > 0),
    intervals TEXT NOT NULL CHECK (intervals GLOB '[[][[][0-9]*'),
    since INTEGER NOT NULL,
    latest INTEGER NOT NULL,
    exact INTEGER NOT NULL CHECK (exact IN (0, 1)),
    missing_since INTEGER NOT NULL,
    {_count("given_up")}
) STRICT, WITHOUT ROWID;
-- Of what was counted before there was this table, no producer's numbers are known.
INSERT INTO setting SELECT 'numbers_from', (strftime('%s', 'now') + 300) * 1000
WHERE EXISTS (SELECT 1 FROM mark_block);
"""  # noqa: S608  # Names of this file alone.

# Each step leads from the version that is its place in this list to the next one. A step that has
# been published is never changed: stores exist that went up by it.
LADDER: Sequence[str] = (_VERSION_1, _VERSION_2)
VERSION = len(LADDER)

# -------------------------------------------------------------------------------------------------
# Writing rows

# How many rows one statement takes, instead of `executemany`. Each statement's step lets other
# threads run, and getting the interpreter back from a busy event loop may take its whole switch
# interval (5 ms): a thousand single rows took two seconds beside a busy loop, in statements of many
# rows 18 ms. The last one is filled up with its last row again, which an upsert does not mind.
_SIZES = (512, 128, 32, 8, 2, 1)


class Upsert:
    """Write rows whole, new or not: writing one twice is writing it once."""

    def __init__(self, table: str, columns: str, key: str, *, replace: bool = True) -> None:
        names = columns.split()
        values = f"({', '.join('?' * len(names))})"
        sets = ", ".join(f"{name} = excluded.{name}" for name in names if name not in key.split())
        act = f"UPDATE SET {sets}" if replace else "NOTHING"
        tail = f" ON CONFLICT ({', '.join(key.split())}) DO {act}"
        head = f"INSERT INTO {table} ({', '.join(names)}) VALUES "  # noqa: S608  # Names of this file alone.
        self._statements = {size: head + ", ".join([values] * size) + tail for size in _SIZES}

    def put(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
        """Write all rows."""
        done = 0
        while done < len(rows):
            left = len(rows) - done
            size = next(size for size in _SIZES if size < 2 * left)
            part = list(rows[done : done + size])
            part += part[-1:] * (size - len(part))
            connection.execute(self._statements[size], list(chain.from_iterable(part)))
            done += size


_AGREEMENT = (
    "id plan payer origin escrows closing opened_at accrued events units unsettled_since period"
    " spent"
)
_COUNTER = "agreement card meter dimensions quantity events period amount number"
_SAMPLE = "counter key quantity count"
_VOID = "number agreement source voids at"
_HOLD = "id agreement amount meter dimensions quantity created_at expires_at"
_PRODUCER = "source run intervals since latest exact missing_since given_up"
_ESCROW = (
    "id agreement role status reason closing total baseline settled credited observed remaining"
    " service_status provider deadline quarantine_factor units_settled settled_at refund"
)
_RELEASE = "id escrow amount before status why units created_at changed_at history"
_OPENING = (
    "id agreement plan payer role amount provider hours memo why status created_at changed_at"
    " escrow detail"
)
_RECEIPT = "agreement number at release statement hash signature"
_KEY = "owner key fingerprint at status kind body"
_DEAD_LETTER = "number source event_id reason detail payload transport_id fields received_at"
_JOURNAL = "number at actor action subject detail hash"

PUT_SETTING = Upsert("setting", "name value", "name")
PUT_MARKS = Upsert("mark_block", "number bucket count data", "number", replace=False)
_PUT_CARD = Upsert("card", "id text", "id", replace=False)
_PUT_AGREEMENT = Upsert("agreement", _AGREEMENT, "id")
_PUT_COUNTER = Upsert("counter", _COUNTER, "agreement period card meter dimensions")
_PUT_SAMPLE = Upsert("sample", _SAMPLE, "counter key")
_PUT_VOID = Upsert("void", _VOID, "number")
_PUT_HOLD = Upsert("hold", _HOLD, "id")
_PUT_PRODUCER = Upsert("producer", _PRODUCER, "source")
_PUT_ESCROW = Upsert("escrow", _ESCROW, "id")
_PUT_RELEASE = Upsert("release", _RELEASE, "id")
_PUT_OPENING = Upsert("opening", _OPENING, "id")
_PUT_RECEIPT = Upsert("receipt", _RECEIPT, "agreement number", replace=False)
_PUT_KEY = Upsert("key", _KEY, "owner key")
_PUT_DEAD_LETTER = Upsert("dead_letter", _DEAD_LETTER, "number")
_PUT_POSITION = Upsert("position", "source position", "source")
_PUT_JOURNAL = Upsert("journal", _JOURNAL, "number", replace=False)

AGREEMENT_COLUMNS = _AGREEMENT.replace(" ", ", ")
COUNTER_COLUMNS = _COUNTER.replace(" ", ", ")
SAMPLE_COLUMNS = _SAMPLE.replace(" ", ", ")
VOID_COLUMNS = _VOID.replace(" ", ", ")
HOLD_COLUMNS = _HOLD.replace(" ", ", ")
PRODUCER_COLUMNS = _PRODUCER.replace(" ", ", ")
ESCROW_COLUMNS = _ESCROW.replace(" ", ", ")
RELEASE_COLUMNS = _RELEASE.replace(" ", ", ")
OPENING_COLUMNS = _OPENING.replace(" ", ", ")
RECEIPT_COLUMNS = _RECEIPT.replace(" ", ", ")
KEY_COLUMNS = _KEY.replace(" ", ", ")
DEAD_LETTER_COLUMNS = _DEAD_LETTER.replace(" ", ", ")
JOURNAL_COLUMNS = _JOURNAL.replace(" ", ", ")


@dataclass(slots=True)
class Heads:
    """Where the numbered tables end: the next rows' numbers are known before the write."""

    marks: int = 0
    journal: int = 0
    journal_hash: bytes = GENESIS


@dataclass(slots=True)
class Rows:
    """Several changes as one: of rows that supersede one another the last is left."""

    cards: dict[str, CardRow] = field(default_factory=dict)
    agreements: dict[str, AgreementRow] = field(default_factory=dict)
    counters: dict[int, CounterRow] = field(default_factory=dict)
    samples: dict[tuple[int, str], SampleRow] = field(default_factory=dict)
    holds: dict[str, Hold | None] = field(default_factory=dict)  # None: gone.
    escrows: dict[str, Escrow] = field(default_factory=dict)
    releases: dict[str, Release] = field(default_factory=dict)
    receipts: list[ReceiptRow] = field(default_factory=list)
    keys: dict[tuple[str, str], KeyRow | None] = field(default_factory=dict)  # None: forgotten.
    openings: dict[str, Opening] = field(default_factory=dict)
    positions: dict[str, str] = field(default_factory=dict)
    marks: dict[int, list[MarkBlock]] = field(default_factory=dict)
    taken: dict[tuple[int, bool], list[bytes]] = field(default_factory=dict)
    voids: dict[int, VoidRow] = field(default_factory=dict)
    voids_gone: dict[int, None] = field(default_factory=dict)
    dead_letters: dict[int, DeadLetter] = field(default_factory=dict)
    dead_letters_gone: dict[int, None] = field(default_factory=dict)
    producers: dict[str, ProducerRow | None] = field(default_factory=dict)  # None: forgotten.
    journal: list[JournalEntry] = field(default_factory=list)
    marks_from: int | None = None
    numbers_from: int | None = None

    @classmethod
    def of(cls, changes: Iterable[Change]) -> Rows:
        """Lay changes on top of one another, in their order."""
        rows = cls()
        for change in changes:
            rows._add(change)
        return rows

    def _add(self, change: Change) -> None:  # noqa: C901  # A line for each kind of row.
        for card in change.cards:
            self.cards[card.id] = card
        for agreement in change.agreements:
            self.agreements[agreement.id] = agreement
        for counter in change.counters:
            self.counters[counter.number] = counter
        for sample in change.samples:
            self.samples[sample.counter, sample.key] = sample
        self.holds.update({hold.id: hold for hold in change.holds})
        self.holds.update(dict.fromkeys(change.holds_gone))
        for escrow in change.escrows:
            self.escrows[escrow.id] = escrow
        for release in change.releases:
            self.releases[release.id] = release
        self.receipts += change.receipts
        self.keys.update({(key.owner, key.key): key for key in change.keys})
        self.keys.update(dict.fromkeys(change.keys_gone))
        self.openings.update({opening.id: opening for opening in change.openings})
        self.positions.update(change.positions)
        for block in change.marks:
            if block.count:
                self.marks.setdefault(block.bucket, []).append(block)
        for taken in change.taken:
            self.taken.setdefault((taken.bucket, taken.wide), []).append(taken.data)
        self.voids.update({void.number: void for void in change.voids})
        self.voids_gone.update(dict.fromkeys(change.voids_gone))
        for letter in change.dead_letters:
            # Put and gone in one commit, it is still written: its number must count as used.
            self.dead_letters[letter.number] = letter
            self.dead_letters_gone.pop(letter.number, None)
        self.dead_letters_gone.update(dict.fromkeys(change.dead_letters_gone))
        self.producers.update({producer.source: producer for producer in change.producers})
        self.producers.update(dict.fromkeys(change.producers_gone))
        if change.numbers_from is not None:
            self.numbers_from = change.numbers_from
        self.journal += change.journal
        if change.marks_from is not None:
            self.marks_from = max(change.marks_from, self.marks_from or 0)

    def write(self, connection: sqlite3.Connection, heads: Heads) -> Heads:
        """Write everything inside the open commit; the heads as they are once it has succeeded."""
        _PUT_CARD.put(connection, [(card.id, card.text) for card in self.cards.values()])
        _PUT_AGREEMENT.put(connection, [_agreement(row) for row in self.agreements.values()])
        _PUT_COUNTER.put(connection, [_counter(row) for row in self.counters.values()])
        _PUT_SAMPLE.put(connection, [_sample(row) for row in self.samples.values()])
        holds = {name: hold for name, hold in self.holds.items() if hold is not None}
        _PUT_HOLD.put(connection, [_hold(row) for row in holds.values()])
        for name in self.holds.keys() - holds.keys():
            connection.execute("DELETE FROM hold WHERE id = ?", (name,))
        _PUT_ESCROW.put(connection, [_escrow(row) for row in self.escrows.values()])
        # What is finished goes first: it may make room for the escrow's next one.
        by_state = sorted(self.releases.values(), key=lambda row: row.status in UNFINISHED)
        _PUT_RELEASE.put(connection, [_release(row) for row in by_state])
        _PUT_RECEIPT.put(connection, [_receipt(row) for row in self.receipts])
        if self.keys:
            self._write_keys(connection)
        _PUT_OPENING.put(connection, [_opening(row) for row in self.openings.values()])
        _PUT_POSITION.put(connection, list(self.positions.items()))
        _PUT_DEAD_LETTER.put(connection, [_dead_letter(row) for row in self.dead_letters.values()])
        for number in self.dead_letters_gone:
            connection.execute("DELETE FROM dead_letter WHERE number = ?", (number,))
        blocks = [identities.join(of_hour) for of_hour in self.marks.values()]
        first = heads.marks + 1
        PUT_MARKS.put(
            connection,
            [(first + n, block.bucket, block.count, block.data) for n, block in enumerate(blocks)],
        )
        self._write_taken(connection)
        if self.producers:
            self._write_producers(connection)
        if self.marks_from is not None:
            connection.execute("DELETE FROM taken_block WHERE bucket < ?", (self.marks_from,))
            connection.execute("DELETE FROM mark_block WHERE bucket < ?", (self.marks_from,))
            PUT_SETTING.put(connection, [("marks_from", self.marks_from)])
        if self.numbers_from is not None:
            PUT_SETTING.put(connection, [("numbers_from", self.numbers_from)])
        heads = Heads(heads.marks + len(blocks), heads.journal, heads.journal_hash)
        if self.journal:
            self._write_journal(connection, heads)
        return heads

    def _write_keys(self, connection: sqlite3.Connection) -> None:
        kept = {name: row for name, row in self.keys.items() if row is not None}
        _PUT_KEY.put(connection, [_key(row) for row in kept.values()])
        for name in self.keys.keys() - kept.keys():
            connection.execute("DELETE FROM key WHERE owner = ? AND key = ?", name)

    def _write_taken(self, connection: sqlite3.Connection) -> None:
        for (bucket, wide), parts in self.taken.items():
            # Narrow ones are rows of one size behind one another; each wide one is a document.
            for data in parts if wide else [b"".join(parts)]:
                connection.execute(
                    "INSERT INTO taken_block (bucket, wide, data) VALUES (?, ?, ?)",
                    (bucket, int(wide), data),
                )
        _PUT_VOID.put(connection, [_void(row) for row in self.voids.values()])
        for number in self.voids_gone:
            connection.execute("DELETE FROM void WHERE number = ?", (number,))

    def _write_producers(self, connection: sqlite3.Connection) -> None:
        kept = {name: row for name, row in self.producers.items() if row is not None}
        _PUT_PRODUCER.put(connection, [_producer(row) for row in kept.values()])
        for name in self.producers.keys() - kept.keys():
            connection.execute("DELETE FROM producer WHERE source = ?", (name,))

    def _write_journal(self, connection: sqlite3.Connection, heads: Heads) -> None:
        rows: list[Row] = []
        for entry in self.journal:
            fields = journal_fields(entry)
            heads.journal += 1
            heads.journal_hash = chained(heads.journal_hash, fields)
            rows.append((heads.journal, *fields, heads.journal_hash))
        _PUT_JOURNAL.put(connection, rows)
        # The chain shows a changed entry; this shows that the last ones are missing.
        head = ("journal_number", heads.journal), ("journal_hash", heads.journal_hash)
        PUT_SETTING.put(connection, head)


# -------------------------------------------------------------------------------------------------
# Facts to rows

_INT_MAX = 2**63 - 1


def _number(value: int) -> int | str:
    return value if -_INT_MAX <= value <= _INT_MAX else str(value)


def _text(text: str) -> str:
    """Lone surrogates, which a text from outside may hold and no database takes, become "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _agreement(row: AgreementRow) -> Row:
    return (
        row.id,
        row.plan,
        row.payer,
        row.origin,
        _json(row.escrows),
        int(row.closing),
        row.opened_at,
        f"{row.accrued.numerator}/{row.accrued.denominator}",
        row.events,
        _number(row.units),
        row.unsettled_since,
        row.period,
        row.spent,
    )


def _counter(row: CounterRow) -> Row:
    dimensions = _json(row.dimensions) if row.dimensions else "[]"
    return (
        row.agreement,
        row.card,
        row.meter,
        dimensions,
        _number(row.quantity),
        row.events,
        row.period,
        _number(row.amount),
        row.number,
    )


def _sample(row: SampleRow) -> Row:
    return row.counter, _text(row.key), _number(row.quantity), row.count


def _void(row: VoidRow) -> Row:
    return row.number, row.agreement, _text(row.source), _text(row.voids), row.at


def _hold(row: Hold) -> Row:
    return (
        row.id,
        row.agreement,
        row.amount,
        _text(row.meter),
        _json(row.dimensions),
        _number(row.quantity),
        row.created_at,
        row.expires_at,
    )


def _producer(row: ProducerRow) -> Row:
    return (
        row.source,
        row.run,
        _json(row.intervals),
        row.since,
        row.latest,
        int(row.exact),
        row.missing_since,
        _number(row.given_up),
    )


def _escrow(row: Escrow) -> Row:
    return (
        row.id,
        row.agreement,
        row.role,
        row.status.value,
        _text(row.reason),
        int(row.closing),
        _number(row.total),
        _number(row.baseline),
        _number(row.settled),
        _number(row.credited),
        _number(row.observed),
        _number(row.remaining),
        _text(row.service_status),
        None if row.provider is None else _text(row.provider),
        None if row.deadline is None else _number(row.deadline),
        row.quarantine_factor,
        _number(row.units_settled),
        row.settled_at,
        int(row.refund),
    )


def _release(row: Release) -> Row:
    changed_at = row.history[-1][0] if row.history else row.created_at
    return (
        row.id,
        row.escrow,
        row.amount,
        _number(row.before),
        row.status.value,
        _text(row.why),
        _number(row.units),
        row.created_at,
        changed_at,
        _json([(at, status, _text(detail)) for at, status, detail in row.history]),
    )


def _receipt(row: ReceiptRow) -> Row:
    number, hash_, signature = row.number, row.hash, row.signature
    return row.agreement, number, row.at, row.release, row.statement, hash_, signature


def _key(row: KeyRow) -> Row:
    owner = _text(row.owner)
    return owner, row.key, row.fingerprint, row.at, row.status, row.kind, row.body


def _opening(row: Opening) -> Row:
    return (
        row.id,
        row.agreement,
        row.plan,
        _text(row.payer),
        row.role,
        row.amount,
        row.provider,
        row.hours,
        _text(row.memo),
        row.why,
        row.status.value,
        row.created_at,
        row.changed_at,
        row.escrow,
        _text(row.detail),
    )


def _dead_letter(row: DeadLetter) -> Row:
    return (
        row.number,
        row.source,
        _text(row.event_id),
        row.reason,
        _text(row.detail),
        row.payload,
        _text(row.transport_id),
        _json([(_text(name), _text(value)) for name, value in row.fields]),
        row.received_at,
    )


def journal_fields(entry: JournalEntry) -> tuple[int, str, str, str, str]:
    """The fields of an entry as they are stored and chained."""
    return entry.at, _text(entry.actor), entry.action, _text(entry.subject), _text(entry.detail)


def chained(before: bytes, fields: tuple[int, str, str, str, str]) -> bytes:
    """SHA-256 over the hash before and the fields as a compact JSON array in UTF-8."""
    return hashlib.sha256(before + msgspec.json.encode(fields)).digest()


# -------------------------------------------------------------------------------------------------
# Rows to facts

_pairs = msgspec.json.Decoder(tuple[tuple[str, str], ...])
_intervals = msgspec.json.Decoder(tuple[tuple[int, int], ...])
_history = msgspec.json.Decoder(tuple[tuple[int, str, str], ...])


def fraction(text: str) -> Fraction:
    """Read "numerator/denominator"."""
    numerator, _, denominator = text.partition("/")
    return Fraction(int(numerator), int(denominator))


def agreement_of(row: Sequence[object]) -> AgreementRow:
    """Read back an agreement, in the order of `AGREEMENT_COLUMNS`."""
    id_, plan, payer, origin, escrows, closing, opened_at, accrued, *rest = row
    events, units, since, period, spent = rest
    return AgreementRow(
        str(id_),
        str(plan),
        str(payer),
        str(origin),
        _pairs.decode(str(escrows)),
        bool(closing),
        _int(opened_at),
        fraction(str(accrued)),
        _int(events),
        _int(units),
        _int(since),
        _int(period),
        str(spent),
    )


def counter_of(row: Sequence[object]) -> CounterRow:
    """Read back a counter, in the order of `COUNTER_COLUMNS`."""
    agreement, card, meter, dimensions, quantity, events, period, amount, number = row
    return CounterRow(
        str(agreement),
        str(card),
        str(meter),
        () if dimensions == "[]" else _pairs.decode(str(dimensions)),
        _int(quantity),
        _int(events),
        _int(period),
        _int(amount),
        _int(number),
    )


def sample_of(row: Sequence[object]) -> SampleRow:
    """Read back a sample, in the order of `SAMPLE_COLUMNS`."""
    counter, key, quantity, count = row
    return SampleRow(_int(counter), str(key), _int(quantity), _int(count))


def void_of(row: Sequence[object]) -> VoidRow:
    """Read back a void, in the order of `VOID_COLUMNS`."""
    number, agreement, source, voids, at = row
    return VoidRow(_int(number), str(agreement), str(source), str(voids), _int(at))


def hold_of(row: Sequence[object]) -> Hold:
    """Read back a hold, in the order of `HOLD_COLUMNS`."""
    id_, agreement, amount, meter, dimensions, quantity, created_at, expires_at = row
    return Hold(
        str(id_),
        str(agreement),
        _int(amount),
        str(meter),
        _pairs.decode(str(dimensions)),
        _int(quantity),
        _int(created_at),
        _int(expires_at),
    )


def producer_of(row: Sequence[object]) -> ProducerRow:
    """Read back a producer, in the order of `PRODUCER_COLUMNS`."""
    source, run, intervals, since, latest, exact, missing_since, given_up = row
    return ProducerRow(
        str(source),
        _int(run),
        _intervals.decode(str(intervals)),
        _int(since),
        _int(latest),
        bool(exact),
        _int(missing_since),
        _int(given_up),
    )


def escrow_of(row: Sequence[object], release: Release | None, voids: tuple[Release, ...]) -> Escrow:
    """Read back an escrow, in the order of `ESCROW_COLUMNS`, with the releases that go with it."""
    provider, deadline = row[13], row[14]
    return Escrow(
        id=str(row[0]),
        agreement=str(row[1]),
        role=str(row[2]),
        status=EscrowStatus(str(row[3])),
        reason=str(row[4]),
        closing=bool(row[5]),
        total=_int(row[6]),
        baseline=_int(row[7]),
        settled=_int(row[8]),
        credited=_int(row[9]),
        observed=_int(row[10]),
        remaining=_int(row[11]),
        service_status=str(row[12]),
        provider=None if provider is None else str(provider),
        deadline=None if deadline is None else _int(deadline),
        quarantine_factor=_int(row[15]),
        units_settled=_int(row[16]),
        settled_at=_int(row[17]),
        refund=bool(row[18]),
        release=release,
        voids=voids,
    )


def release_of(row: Sequence[object]) -> Release:
    """Read back a release, in the order of `RELEASE_COLUMNS`."""
    id_, escrow, amount, before, status, why, units, created_at, _, history = row
    return Release(
        id=str(id_),
        escrow=str(escrow),
        amount=_int(amount),
        before=_int(before),
        status=ReleaseStatus(str(status)),
        why=str(why),
        units=_int(units),
        created_at=_int(created_at),
        history=_history.decode(str(history)),
    )


def opening_of(row: Sequence[object]) -> Opening:
    """Read back an opening, in the order of `OPENING_COLUMNS`."""
    id_, agreement, plan, payer, role, amount, provider, hours, *rest = row
    memo, why, status, created_at, changed_at, escrow, detail = rest
    return Opening(
        id=str(id_),
        agreement=str(agreement),
        plan=str(plan),
        payer=str(payer),
        role=str(role),
        amount=_int(amount),
        provider=str(provider),
        hours=None if hours is None else _int(hours),
        memo=str(memo),
        why=str(why),
        status=OpeningStatus(str(status)),
        created_at=_int(created_at),
        changed_at=_int(changed_at),
        escrow=str(escrow),
        detail=str(detail),
    )


def dead_letter_of(row: Sequence[object]) -> DeadLetter:
    """Read back a dead letter, in the order of `DEAD_LETTER_COLUMNS`."""
    number, source, event_id, reason, detail, payload, transport_id, fields, received_at = row
    assert isinstance(payload, bytes)
    return DeadLetter(
        _int(number),
        str(source),
        str(event_id),
        str(reason),
        str(detail),
        payload,
        str(transport_id),
        _pairs.decode(str(fields)),
        _int(received_at),
    )


def _int(value: object) -> int:
    assert isinstance(value, int | str)
    return int(value)
