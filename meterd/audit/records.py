"""What a store holds besides money: the file itself, the marks of events, dead letters.

These are walked row by row and not kept. The marks are ten million and more: their keys are sorted
in one array, to see whether an identity was taken twice.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import numpy as np
import numpy.typing as npt

from meterd.audit.books import Books
from meterd.audit.findings import BREAKS_MAX, Findings
from meterd.audit.journal import check_journal
from meterd.audit.receipts import check_receipts
from meterd.audit.usage import check_holds, check_taken

MARK_BYTES = 20  # Eight of key, eight of rest, four of fingerprint.
# What the database itself refuses, whatever the code above it does.
GUARDS = frozenset(
    {"release_unfinished", "release_stays", "release_kept", "journal_stays", "journal_kept"}
)
GUARDS_OF_2 = frozenset({"receipt_stays", "receipt_kept"})

Settings = dict[str, Any]
Keys = npt.NDArray[np.uint64]


def check_records(connection: sqlite3.Connection, books: Books, findings: Findings) -> None:
    """Check all that stands in rows of its own."""
    settings: Settings = dict(connection.execute("SELECT name, value FROM setting"))
    _check_file(connection, findings)
    _check_guards(connection, GUARDS | GUARDS_OF_2 if books.version > 1 else GUARDS, findings)
    _check_numbers(books, findings)
    check_journal(connection, settings, books, findings)
    _check_marks(connection, settings, books, findings)
    _check_dead_letters(connection, findings)
    if books.version > 1:
        check_taken(connection, settings.get("marks_from", 0), books, findings)
        check_holds(connection, findings)
        check_receipts(connection, books, findings)


def _check_file(connection: sqlite3.Connection, findings: Findings) -> None:
    """The pages, the indices and the database's own rules, as SQLite itself sees them."""
    for (said,) in connection.execute(f"PRAGMA integrity_check({BREAKS_MAX})"):
        findings.expect(said == "ok", "file", "SQLite's integrity_check", str(said))
    for table, rowid, parent, _ in connection.execute("PRAGMA foreign_key_check"):
        findings.broke("references", f"{table} {rowid or ''}".strip(), f"it names no {parent}")


def _check_guards(
    connection: sqlite3.Connection, guards: frozenset[str], findings: Findings
) -> None:
    """One open release an escrow, fixed amounts, a journal that only grows: rules of the file."""
    there = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
    for name in sorted(guards - there):
        findings.broke("guards", name, "this rule of the database was taken away")


def _check_numbers(books: Books, findings: Findings) -> None:
    """A release is never deleted, so their numbers have no gap."""
    numbers = sorted(release.number for release in books.releases.values())
    for place, number in enumerate(numbers, start=1):
        if number != place:
            findings.broke("release kept", f"release number {place}", "it is gone")
            return


# -- Marks of events -----------------------------------------------------------------------------


def _check_marks(
    connection: sqlite3.Connection, settings: Settings, books: Books, findings: Findings
) -> None:
    """Blocks are whole and in order, no identity stands twice, and there is one for each event."""
    first = settings.get("marks_from", 0)
    parts: list[Keys] = []
    marks = 0
    for number, bucket, count, data in connection.execute(
        "SELECT number, bucket, count, data FROM mark_block"
    ):
        row = f"mark_block {number}"
        if count < 1 or len(data) != count * MARK_BYTES:
            findings.broke("marks", row, f"{len(data)} bytes cannot hold {count} identities")
            continue
        keys = np.frombuffer(data, "<u8", count)
        findings.expect(
            not np.any(keys[1:] < keys[:-1]), "marks", row, "its identities are not in order"
        )
        findings.expect(
            bucket >= first, "marks", row, f"hour {bucket} is older than {first}, from where marks"
            " are kept"
        )  # fmt: skip
        marks += count
        parts.append(keys)
    findings.checked["identities"] = marks
    if parts:
        _check_distinct(connection, parts, findings)
    _check_count(books, marks, findings, forgotten="marks_from" in settings)


def _check_distinct(connection: sqlite3.Connection, parts: list[Keys], findings: Findings) -> None:
    """Equal keys are rare and may belong to two identities: only for them the rest is looked at."""
    keys = np.concatenate(parts)
    keys.sort()
    twice = np.unique(keys[1:][keys[1:] == keys[:-1]])
    if not len(twice):
        return
    seen: dict[bytes, int] = {}
    query = "SELECT number, count, data FROM mark_block ORDER BY number"
    for number, count, data in connection.execute(query):
        if len(data) != count * MARK_BYTES:
            continue
        for place in np.flatnonzero(np.isin(np.frombuffer(data, "<u8", count), twice)).tolist():
            rest = 8 * (count + place)
            identity = data[8 * place : 8 * place + 8] + data[rest : rest + 8]
            if identity in seen:
                findings.broke(
                    "marks",
                    f"mark_block {number}",
                    f"identity {identity.hex()} stands in block {seen[identity]} too: an event may"
                    " have been counted twice",
                )
            seen[identity] = number


def _check_count(books: Books, marks: int, findings: Findings, *, forgotten: bool) -> None:
    """One mark for each counted event; more of them only for requests to close.

    An event that was taken back keeps its mark, and each void has two: its own, and one that says
    that this event was taken back. Where marks have left the window there are fewer, and then only
    "not more" can be said.
    """
    events = sum(counter.events - counter.shared for counter in books.counters)
    events += sum(books.taken_back.values()) + 2 * books.voids
    closing = any(agreement.closing for agreement in books.agreements.values())
    findings.expect(
        forgotten or marks >= events,
        "marks",
        "mark_block",
        f"{marks} identities for {events} counted events: some were counted without one",
    )
    findings.expect(
        closing or marks <= events,
        "marks",
        "mark_block",
        f"{marks} identities for {events} counted events: some were taken and not counted",
    )


# -- Dead letters --------------------------------------------------------------------------------


def _check_dead_letters(connection: sqlite3.Connection, findings: Findings) -> None:
    """Each has its number once, and the next one is above all of them."""
    used = connection.execute(
        "SELECT seq FROM sqlite_sequence WHERE name = 'dead_letter'"
    ).fetchone()
    following = 1 + (used[0] if used is not None else 0)
    before = 0
    for (number,) in connection.execute("SELECT number FROM dead_letter ORDER BY number"):
        row = f"dead_letter {number}"
        findings.expect(before < number, "dead letters", row, "its number is not its own")
        findings.expect(
            number < following, "dead letters", row, f"the next one would be {following}"
        )
        before = number
        findings.checked["dead letters"] += 1
