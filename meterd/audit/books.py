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


@dataclass(frozen=True, slots=True)
class Rate:
    """Picos of a USDC for `per` units of a meter, where the dimensions are as in `where`."""

    meter: str
    price: int
    per: int
    where: Pairs


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

    @property
    def row(self) -> str:
        """The row as a person finds it."""
        where = "".join(f", {name} = {value}" for name, value in self.dimensions)
        return f"counter ({self.agreement}, card {self.card}, {self.meter}{where})"


@dataclass(frozen=True, slots=True)
class Agreement:
    """An agreement and its stored sums."""

    id: str
    escrows: Pairs
    closing: bool
    accrued: Fraction
    events: int
    units: int


@dataclass(frozen=True, slots=True)
class Escrow:
    """An escrow; all amounts in micros."""

    id: str
    agreement: str
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

    books.cards = {card.id: card for card in rows("card", "id, text", _card)}
    columns = "agreement, card, meter, dimensions, quantity, events"
    books.counters = list(rows("counter", columns, _counter))
    columns = "id, escrows, closing, accrued, events, units"
    books.agreements = {row.id: row for row in rows("agreement", columns, _agreement)}
    columns = (
        "id, agreement, status, service_status, provider, total, baseline, settled, credited,"
        " observed, remaining, units_settled"
    )
    books.escrows = {row.id: row for row in rows("escrow", columns, _escrow)}
    columns = "id, number, escrow, amount, before, status, units, created_at, changed_at, history"
    books.releases = {row.id: row for row in rows("release", columns, _release)}
    return books


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
    rates = tuple(
        Rate(
            text(rate["meter"]),
            whole(rate["price"]),
            whole(rate["per"]),
            tuple((text(name), text(value)) for name, value in rate["where"]),
        )
        for rate in json.loads(text(row[1]))
    )
    for rate in rates:
        if rate.price < 0 or rate.per < 1:
            raise ValueError("a rate with a negative price, or for less than one unit")
    return Card(text(row[0]), text(row[1]), rates)


def _counter(row: Row) -> Counter:
    agreement, card, meter, dimensions, quantity, events = row
    return Counter(
        text(agreement),
        text(card),
        text(meter),
        _pairs(dimensions),
        whole(quantity),
        whole(events),
    )


def _agreement(row: Row) -> Agreement:
    name, escrows, closing, accrued, events, units = row
    numerator, _, denominator = text(accrued).partition("/")
    return Agreement(
        text(name),
        _pairs(escrows),
        bool(whole(closing)),
        Fraction(whole(numerator), whole(denominator)),
        whole(events),
        whole(units),
    )


def _escrow(row: Row) -> Escrow:
    name, agreement, status, service_status, provider, *figures = row
    return Escrow(
        text(name),
        text(agreement),
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
