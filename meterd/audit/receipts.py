"""Receipts in a store: their chain, and that each is about a release as the table has it.

Signatures are not looked at here: `meterd verify FILE` does, with the receipts that a payer has.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3

from meterd.audit.books import Books
from meterd.audit.findings import Findings
from meterd.core.money import format_amount

PAID = frozenset({"confirmed", "late"})


def check_receipts(connection: sqlite3.Connection, books: Books, findings: Findings) -> None:
    """Each receipt follows the one before, and each paid release since the first has one."""
    last: dict[str, tuple[int, str]] = {}
    told: dict[str, str] = {}
    query = "SELECT agreement, number, release, statement, hash FROM receipt ORDER BY 1, 2"
    for agreement, number, release, text, hash_ in connection.execute(query):
        row = f"receipt {number} of {agreement}"
        before, head = last.get(agreement, (0, "0" * 64))
        flaw = _flaw(text, agreement, number, head)
        if hashlib.sha256(text.encode()).digest() != hash_:
            flaw = "its hash is not that of its statement"
        if number != before + 1:
            flaw = f"receipt {before + 1} is missing before it"
        if release and not flaw:
            flaw = _misfit(books, release, json.loads(text))
            told[release] = agreement
        if flaw:
            findings.broke("receipts", row, flaw)
        last[agreement] = number, hash_.hex()
        findings.checked["receipts"] += 1
    _check_whole(books, told, findings)


def _flaw(text: str, agreement: str, number: int, head: str) -> str:
    try:
        statement = json.loads(text)
        said = statement["agreement"], statement["number"], statement["previous"]
    except (ValueError, TypeError, KeyError):
        return "its statement cannot be read"
    wanted = agreement, number, head
    return "" if said == wanted else f"it says {said}, and {wanted} was expected"


def _misfit(books: Books, release_id: str, statement: dict[str, object]) -> str:
    release = books.releases.get(release_id)
    if release is None or release.status not in PAID:
        return f"release {release_id} is not among those that were paid"
    said = statement.get("release")
    amount = said.get("amount") if isinstance(said, dict) else None
    if amount != format_amount(release.amount):
        return f"it says {amount} and release {release_id} is {format_amount(release.amount)}"
    return ""


def _check_whole(books: Books, told: dict[str, str], findings: Findings) -> None:
    """Those from before there were receipts have none; from an agreement's first on, all have."""
    first: dict[str, int] = {}
    for release_id, agreement in told.items():
        if release_id in books.releases:
            number = books.releases[release_id].number
            first[agreement] = min(number, first.get(agreement, number))
    for release in books.releases.values():
        escrow = books.escrows.get(release.escrow)
        if escrow is None or release.status != "confirmed" or release.id in told:
            continue
        if escrow.agreement in first and release.number > first[escrow.agreement]:
            findings.broke("receipts", f"release {release.id}", "it was paid and has no receipt")
