"""The rows of a store as plain facts, read by rule: a row that cannot be read is a finding.

Only what the auditor works with is read, and every number is looked at before it is believed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

from meterd.audit.findings import Findings

T = TypeVar("T")
Pairs = tuple[tuple[str, str], ...]
Row = tuple[Any, ...]

# Meters that no usage event can name, and what their counters stand for.
PERIOD = "meterd.period"  # A period that has ended.
MILESTONE = "meterd.milestone"  # A tranche that was reached.
OUTCOME = "meterd.outcome"  # A score.
OWN = frozenset({PERIOD, MILESTONE, OUTCOME})
MODELS = frozenset({"standard", "graduated", "volume", "package", "percentage", "dynamic"})


@dataclass(frozen=True, slots=True)
class Tier:
    """Up to and including `up_to` nanos (None: no end), picos for `per` units, and flat picos."""

    up_to: int | None
    price: int
    flat: int


@dataclass(frozen=True, slots=True)
class Rate:
    """Picos of a USDC for `per` units of a meter, where the dimensions are as in `where`.

    `free_units` in nanos; `minimum` and `maximum` of a period in micros, None where there is none.
    """

    meter: str
    price: int
    per: int
    where: Pairs
    model: str
    tiers: tuple[Tier, ...]
    free_units: int
    minimum: int | None
    maximum: int | None
    role: str


@dataclass(frozen=True, slots=True)
class Card:
    """A stored rate card."""

    id: str
    text: str
    rates: tuple[Rate, ...]


@dataclass(frozen=True, slots=True)
class Counter:
    """Usage in nanos."""

    agreement: str
    card: str
    meter: str
    dimensions: Pairs
    quantity: int
    events: int
    period: int
    amount: int  # 10^-21 USDC.
    number: int  # 0 in a store of version 1.
    shared: int  # Of the events, those that are counted at another counter already.

    @property
    def row(self) -> str:
        """The row as a person finds it."""
        where = "".join(f", {name} = {value}" for name, value in self.dimensions)
        when = f", period {self.period}" if self.period else ""
        return f"counter ({self.agreement}, card {self.card}, {self.meter}{where}{when})"


@dataclass(frozen=True, slots=True)
class Sample:
    """What `count` events of a counter said, each `quantity` nanos."""

    counter: int
    key: str
    quantity: int
    count: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """An agreement and its stored sums."""

    id: str
    escrows: Pairs
    closing: bool
    accrued: Fraction
    events: int
    units: int
    period: int


@dataclass(frozen=True, slots=True)
class Escrow:
    """An escrow; all amounts in micros."""

    id: str
    agreement: str
    role: str
    status: str
    service_status: str
    provider: str | None
    total: int
    baseline: int
    settled: int
    credited: int
    observed: int
    remaining: int
    units_settled: int

    @property
    def adopted(self) -> bool:
        """Whether two readings have made its baseline; before that its figures mean nothing."""
        return self.total > 0

    @property
    def expected(self) -> int:
        """What the service should show as released, when nothing is open."""
        return self.baseline + self.settled + self.credited


@dataclass(frozen=True, slots=True)
class Move:
    """One line of a release's history; `at` in wall ms."""

    at: int
    status: str
    detail: str


@dataclass(frozen=True, slots=True)
class Release:
    """A release with its history, oldest line first."""

    number: int
    id: str
    escrow: str
    amount: int
    before: int
    status: str
    units: int
    created_at: int
    changed_at: int
    history: tuple[Move, ...]


@dataclass(slots=True)
class Books:
    """Everything that was read, by its key."""

    cards: dict[str, Card] = field(default_factory=dict)
    counters: list[Counter] = field(default_factory=list)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    escrows: dict[str, Escrow] = field(default_factory=dict)
    releases: dict[str, Release] = field(default_factory=dict)
    accrued: dict[str, Fraction] = field(default_factory=dict)  # By agreement, as recomputed.
    owed: dict[str, dict[str, Fraction]] = field(default_factory=dict)  # The same, by role.
    samples: dict[int, list[Sample]] = field(default_factory=dict)  # By the counter's number.
    taken_back: dict[str, int] = field(default_factory=dict)  # Events, by agreement.
    # Agreements that may have owed more at an earlier time; None: not looked at yet.
    shrinking: set[str] | None = None
    voids: int = 0  # That were accepted, done or not.
    version: int = 0  # The form of the tables.

    def roles_of(self, agreement: str) -> list[str]:
        """The roles that an agreement draws on, each once."""
        return list(dict(self.agreements[agreement].escrows))

    def releases_of(self, escrow: str) -> list[Release]:
        """The releases of an escrow, oldest first."""
        return self._grouped().get(escrow, [])

    def _grouped(self) -> dict[str, list[Release]]:
        if not self._by_escrow:
            for release in sorted(self.releases.values(), key=lambda row: row.number):
                self._by_escrow.setdefault(release.escrow, []).append(release)
        return self._by_escrow

    _by_escrow: dict[str, list[Release]] = field(default_factory=dict)


def read_books(connection: sqlite3.Connection, findings: Findings) -> Books:
    """Read all tables that hold money."""
    books = Books()

    def rows(table: str, columns: str, make: Callable[[Row], T]) -> Iterator[T]:
        return _rows(connection, findings, table, columns, make)

    (books.version,) = connection.execute("PRAGMA user_version").fetchone()
    later = books.version > 1
    books.cards = {card.id: card for card in rows("card", "id, text", _card)}
    columns = "agreement, card, meter, dimensions, quantity, events"
    columns += ", period, amount, number, shared" if later else ", 0, 0, 0, 0"
    books.counters = list(rows("counter", columns, _counter))
    columns = "id, escrows, closing, accrued, events, units" + (", period" if later else ", 0")
    books.agreements = {row.id: row for row in rows("agreement", columns, _agreement)}
    columns = (
        "id, agreement, role, status, service_status, provider, total, baseline, settled, credited,"
        " observed, remaining, units_settled"
    )
    books.escrows = {row.id: row for row in rows("escrow", columns, _escrow)}
    columns = "id, number, escrow, amount, before, status, units, created_at, changed_at, history"
    books.releases = {row.id: row for row in rows("release", columns, _release)}
    if later:
        for sample in rows("sample", "counter, key, quantity, count", _sample):
            books.samples.setdefault(sample.counter, []).append(sample)
        _read_voids(connection, books)
    return books


def _read_voids(connection: sqlite3.Connection, books: Books) -> None:
    """Count the events that were taken back: what the journal says, whose chain is looked at."""
    (pending,) = connection.execute("SELECT count(*) FROM void").fetchone()
    query = "SELECT count(*) FROM journal WHERE action = 'void_failed'"
    (failed,) = connection.execute(query).fetchone()
    query = "SELECT subject, count(*) FROM journal WHERE action = 'event_taken_back' GROUP BY 1"
    books.taken_back = dict(connection.execute(query))
    books.voids = pending + failed + sum(books.taken_back.values())


def _rows(
    connection: sqlite3.Connection,
    findings: Findings,
    table: str,
    columns: str,
    make: Callable[[Row], T],
) -> Iterator[T]:
    query = f"SELECT {columns} FROM {table}"  # noqa: S608  # Names of this file alone.
    for row in connection.execute(query):
        try:
            yield make(row)
        except (ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError) as error:
            findings.broke("readable", f"{table} {row[0]}", f"the row cannot be read: {error}")


# -- Rows to facts -------------------------------------------------------------------------------


def whole(value: object) -> int:
    """Read a whole number: an integer, or its digits as text. Raises `ValueError`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and value.isascii():
        return int(value)
    raise ValueError(f"{value!r} is no whole number")


def text(value: object) -> str:
    """Read a text. Raises `TypeError`."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _pairs(value: object) -> Pairs:
    return tuple((text(name), text(other)) for name, other in json.loads(text(value)))


def _card(row: Row) -> Card:
    rates = tuple(map(_rate, json.loads(text(row[1]))))
    for rate in rates:
        if rate.price < 0 or rate.per < 1 or rate.free_units < 0:
            raise ValueError("a rate with a negative price, or for less than one unit")
        if rate.model not in MODELS:
            raise ValueError(f"{rate.model} is no way to charge")
        if rate.model in ("graduated", "volume"):
            _look_at_tiers(rate.tiers)
    return Card(text(row[0]), text(row[1]), rates)


def _rate(rate: dict[str, Any]) -> Rate:
    return Rate(
        text(rate["meter"]),
        whole(rate["price"]),
        whole(rate["per"]),
        tuple((text(name), text(value)) for name, value in rate["where"]),
        text(rate.get("model", "standard")),
        tuple(
            Tier(_maybe(tier["up_to"]), whole(tier["price"]), whole(tier.get("flat", 0)))
            for tier in rate.get("tiers", ())
        ),
        whole(rate.get("free_units", 0)),
        _maybe(rate.get("minimum")),
        _maybe(rate.get("maximum")),
        text(rate.get("role", "main")),
    )


def _maybe(value: object) -> int | None:
    return None if value is None else whole(value)


def _look_at_tiers(tiers: tuple[Tier, ...]) -> None:
    """Raise `ValueError` where tiers are no ladder with an open end."""
    ends = [tier.up_to for tier in tiers]
    closed = [end for end in ends[:-1] if end is not None]
    if not ends or ends[-1] is not None or len(closed) < len(ends) - 1:
        raise ValueError("the last of its tiers, and no other, has no end")
    if sorted(set(closed)) != closed or any(tier.price < 0 or tier.flat < 0 for tier in tiers):
        raise ValueError("its tiers are out of order, or cost less than nothing")


def _counter(row: Row) -> Counter:
    agreement, card, meter, dimensions, *figures = row
    return Counter(
        text(agreement),
        text(card),
        text(meter),
        _pairs(dimensions),
        *map(whole, figures),
    )


def _sample(row: Row) -> Sample:
    counter, key, quantity, count = row
    return Sample(whole(counter), text(key), whole(quantity), whole(count))


def _agreement(row: Row) -> Agreement:
    name, escrows, closing, accrued, events, units, period = row
    numerator, _, denominator = text(accrued).partition("/")
    return Agreement(
        text(name),
        _pairs(escrows),
        bool(whole(closing)),
        Fraction(whole(numerator), whole(denominator)),
        whole(events),
        whole(units),
        whole(period),
    )


def _escrow(row: Row) -> Escrow:
    name, agreement, role, status, service_status, provider, *figures = row
    return Escrow(
        text(name),
        text(agreement),
        text(role),
        text(status),
        text(service_status),
        None if provider is None else text(provider),
        *map(whole, figures),
    )


def _release(row: Row) -> Release:
    name, number, escrow, amount, before, status, units, created_at, changed_at, history = row
    return Release(
        whole(number),
        text(name),
        text(escrow),
        whole(amount),
        whole(before),
        text(status),
        whole(units),
        whole(created_at),
        whole(changed_at),
        tuple(
            Move(whole(at), text(word), text(detail))
            for at, word, detail in json.loads(text(history))
        ),
    )
