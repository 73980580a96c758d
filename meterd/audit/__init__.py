"""The auditor: it works out again, by itself, every sum of money that a state directory holds.

The rule kept here: nothing is shared with what it audits. It reads the file with plain SQL, prices
with fractions, has its own copy of the release table's legal moves and its own hash chain, and
imports neither ledger, pricing nor settlement. Where both come to the same figure, two ways that
know nothing of one another came to it. It is written to be read, not to be fast.

It changes nothing and needs no daemon and no network. What the escrow service says is brought in by
the caller (`Audit.hold_against`), so that the comparison too is made of figures alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meterd.audit.books import Books, read_books
from meterd.audit.checks import check_books
from meterd.audit.files import opened
from meterd.audit.findings import Break, Findings
from meterd.audit.records import check_records
from meterd.audit.service import Shown, compare

__all__ = ["Audit", "Books", "Break", "Findings", "Shown", "audit"]


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found in one store. `is_copy`: it is a backup, the service may be further on."""

    place: Path
    is_copy: bool
    books: Books
    findings: Findings

    @property
    def escrows(self) -> list[str]:
        """The escrows that the service is to be asked for."""
        return sorted(self.books.escrows)

    def hold_against(self, answers: Mapping[str, Shown | str]) -> None:
        """Hold the store against what the service said; a text says why it said nothing."""
        compare(self.books, answers, self.findings, is_copy=self.is_copy)


def audit(place: Path) -> Audit:
    """Audit a state directory on which no daemon runs, or a backup file.

    Raises `StoreLocked` when a daemon runs on it, `NotFound` when there is no store,
    `StoreCorrupt` when the file cannot be read as one, `Refused` when there is no room to read it.
    """
    findings = Findings()
    with opened(place) as store:
        books = read_books(store.connection, findings)
        check_books(books, findings)
        check_records(store.connection, books, findings)
    return Audit(place, store.is_copy, books, findings)
