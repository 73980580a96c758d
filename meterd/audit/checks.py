"""Every invariant of money that a store can be held to without asking anybody.

Each function is one invariant or one family of them, in the words of the specification: what an
agreement owes follows from its counters; what an escrow paid follows from its releases; no release
was sent twice; nothing was paid that was not used. Amounts are micros, quantities nanos, prices
picos; what is owed is a fraction of USDC and is rounded nowhere but where it is compared.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

from meterd.audit.bills import reckon
from meterd.audit.books import OWN, Agreement, Books, Escrow, Release
from meterd.audit.findings import Findings
from meterd.audit.usage import check_usage, may_shrink
from meterd.core.money import MICROS, format_amount, format_exact

OPEN = frozenset({"intended", "sent", "in_doubt", "escalated"})
LANDED = frozenset({"confirmed", "late"})

# The release table's legal moves, copied from its specification and not from its code. A status
# that leads nowhere is final. A daemon that starts finds an open release in doubt: again and again.
MOVES = {
    "": {"intended"},
    "intended": {"sent", "not_sent", "in_doubt"},
    "sent": {"confirmed", "declined", "not_sent", "in_doubt"},
    "in_doubt": {"in_doubt", "confirmed", "void", "escalated", "sent"},
    "escalated": {"confirmed", "void"},
    "void": {"late"},
}
REPEATED = "repeated with the same key"


def check_books(books: Books, findings: Findings) -> None:
    """Check all that is in the books, and fill in `books.accrued`."""
    _check_cards(books, findings)
    check_usage(books, findings)
    reckon(books, findings)
    _check_agreements(books, findings)
    for release in books.releases.values():
        _check_release(books, release, findings)
    for escrow in books.escrows.values():
        _check_escrow(books, escrow, findings)
    for agreement in books.agreements.values():
        _check_paid(books, agreement, findings)


# -- What is owed --------------------------------------------------------------------------------


def _check_cards(books: Books, findings: Findings) -> None:
    """A card is named by its content, so no price can change behind what it priced."""
    for card in books.cards.values():
        name = hashlib.sha256(card.text.encode()).hexdigest()[:16]
        findings.expect(
            name == card.id, "card", f"card {card.id}", f"its rates make it card {name}: changed"
        )


def _check_agreements(books: Books, findings: Findings) -> None:
    """An agreement's stored sums are those of its counters."""
    events: dict[str, int] = {}
    units: dict[str, int] = {}
    for counter in books.counters:
        own = counter.events - counter.shared
        events[counter.agreement] = events.get(counter.agreement, 0) + own
        used = 0 if counter.meter in OWN else counter.quantity
        units[counter.agreement] = units.get(counter.agreement, 0) + used
        findings.expect(
            counter.agreement in books.agreements,
            "references",
            counter.row,
            f"there is no agreement {counter.agreement}",
        )
    for name, agreement in books.agreements.items():
        row = f"agreement {name}"
        accrued = books.accrued.setdefault(name, Fraction(0))
        findings.expect(
            agreement.accrued == accrued,
            "accrued",
            row,
            f"{format_exact(agreement.accrued)} USDC is stored, its counters are worth"
            f" {format_exact(accrued)}",
        )
        for word, stored, counted in (
            ("events", agreement.events, events.get(name, 0)),
            ("nanos of units", agreement.units, units.get(name, 0)),
        ):
            findings.expect(
                stored == counted,
                "counters",
                row,
                f"{stored} {word} are stored, its counters have {counted}",
            )
        for _, escrow in agreement.escrows:
            bound = books.escrows.get(escrow)
            findings.expect(
                bound is not None and bound.agreement == name,
                "references",
                row,
                f"its escrow {escrow} is not stored as its own",
            )


# -- What was released ---------------------------------------------------------------------------


def _check_release(books: Books, release: Release, findings: Findings) -> None:
    row = f"release {release.id}"
    findings.expect(
        release.amount > 0, "amount", row, f"{release.amount} micros: must be more than 0"
    )
    for detail in (*_illegal_moves(release), *_wrong_times(release)):
        findings.broke("release history", row, detail)
    escrow = books.escrows.get(release.escrow)
    if escrow is None:
        findings.broke("references", row, f"there is no escrow {release.escrow}")
        return
    findings.expect(
        release.before + release.amount <= escrow.total,
        "amount",
        row,
        f"{format_amount(release.amount)} behind {format_amount(release.before)} is more than the"
        f" escrow's total of {format_amount(escrow.total)}",
    )
    agreement = books.agreements.get(escrow.agreement)
    findings.expect(
        agreement is None or release.units <= agreement.units or may_shrink(books, agreement.id),
        "counters",
        row,
        f"it was intended at {release.units} nanos of units, more than were ever counted",
    )


def _illegal_moves(release: Release) -> list[str]:
    """Where a history leaves the table; each row is sent at most once but for repeats by key."""
    wrong = []
    before, doubted, sent = "", False, 0
    for move in release.history:
        status, detail = move.status, move.detail
        if status not in MOVES.get(before, set()):
            wrong.append(f"{before or 'nothing'} -> {status} is no legal move")
        if doubted and status in {"declined", "not_sent"}:
            wrong.append(f"in doubt, then {status}: a refused repetition proves nothing")
        if status == "sent" and not (doubted and detail == REPEATED):
            sent += 1
        doubted = doubted or status == "in_doubt"
        before = status
    if sent > 1:
        wrong.append(f"sent {sent} times")
    if before != release.status:
        wrong.append(f"it is {release.status}, its history ends with {before or 'nothing'}")
    return wrong


def _wrong_times(release: Release) -> list[str]:
    """By `changed_at` a void is remembered, so that one that lands late is known again."""
    if not release.history:
        return []
    stored = release.created_at, release.changed_at
    told = release.history[0].at, release.history[-1].at
    if stored == told:
        return []
    return [f"stored as of {stored[0]} and {stored[1]}, its history is of {told[0]} to {told[1]}"]


def _check_escrow(books: Books, escrow: Escrow, findings: Findings) -> None:
    """What an escrow paid is the sum of its releases, and is what was read of the service."""
    row = f"escrow {escrow.id}"
    releases = books.releases_of(escrow.id)
    landed = sum(release.amount for release in releases if release.status in LANDED)
    findings.expect(
        escrow.settled == landed,
        "settled",
        row,
        f"{format_amount(escrow.settled)} is stored, its confirmed and late releases are"
        f" {format_amount(landed)}",
    )
    unfinished = [release for release in releases if release.status in OPEN]
    findings.expect(
        len(unfinished) <= 1,
        "one open release",
        row,
        f"{len(unfinished)} are: {', '.join(release.id for release in unfinished[:10])}",
    )
    for release in unfinished:
        findings.expect(
            escrow.status != "closed" and (release.status != "escalated" or _is_frozen(escrow)),
            "release history",
            f"release {release.id}",
            f"it is {release.status} while its escrow is {escrow.status}",
        )
    findings.expect(
        not escrow.adopted or escrow.observed + escrow.remaining <= escrow.total,
        "total",
        row,
        f"released {format_amount(escrow.observed)} + remaining {format_amount(escrow.remaining)}"
        f" is more than its total of {format_amount(escrow.total)}",
    )
    agreement = books.agreements.get(escrow.agreement)
    findings.expect(
        agreement is not None and escrow.id in {name for _, name in agreement.escrows},
        "references",
        row,
        f"agreement {escrow.agreement} does not name it as its own"
        if agreement is not None
        else f"there is no agreement {escrow.agreement}",
    )
    confirmed = [release.units for release in releases if release.status == "confirmed"]
    findings.expect(
        escrow.units_settled == (confirmed[-1] if confirmed else 0),
        "settled",
        row,
        f"{escrow.units_settled} nanos of units are stored as settled, its last confirmed release"
        f" was of {confirmed[-1] if confirmed else 0}",
    )
    if escrow.adopted and not unfinished:
        _check_level(escrow, findings)


def _is_frozen(escrow: Escrow) -> bool:
    return escrow.status == "frozen"


def _check_level(escrow: Escrow, findings: Findings) -> None:
    """With nothing open, what was read is baseline + settled + credited.

    The other way round it may be an old reading, unless the escrow is frozen for it; and a service
    that has ended an escrow may have paid the rest of it to whom it liked.
    """
    difference = escrow.observed - escrow.expected
    if difference == 0:
        return
    figures = (
        f"{format_amount(escrow.observed)} was read as released, baseline"
        f" {format_amount(escrow.baseline)} + settled {format_amount(escrow.settled)} + credited"
        f" {format_amount(escrow.credited)} is {format_amount(escrow.expected)}"
    )
    if escrow.status == "closed" or (difference < 0 and not _is_frozen(escrow)):
        why = "it is closed" if escrow.status == "closed" else "a later reading decides"
        findings.note(f"escrow {escrow.id}: {figures}; {why}")
        return
    findings.broke("level", f"escrow {escrow.id}", figures)


def _check_paid(books: Books, agreement: Agreement, findings: Findings) -> None:
    """Never more released than used: by meterd, nor, with what was credited, by anybody."""
    named = [books.escrows[name] for _, name in agreement.escrows if name in books.escrows]
    roles = books.roles_of(agreement.id)
    for role in roles:
        row = f"agreement {agreement.id}" + (f", {role}" if len(roles) > 1 else "")
        escrows = [escrow for escrow in named if escrow.role == role or len(roles) == 1]
        _check_paid_of(books, row, owed_of(books, agreement.id, role), escrows, findings)


def _check_paid_of(
    books: Books, row: str, owed: int, escrows: list[Escrow], findings: Findings
) -> None:
    """The same for all escrows of one role together: which of them paid what is no matter."""
    # What the service lost, and a person accepted as lost, may be paid again.
    paid = sum(escrow.settled + min(0, escrow.credited) for escrow in escrows)
    held = sum(held_of(books, escrow.id) for escrow in escrows)
    if paid + held > owed and escrows and may_shrink(books, escrows[0].agreement):
        findings.note(
            f"{row}: released {format_amount(paid)} + in doubt {format_amount(held)} is more than"
            f" the {format_amount(owed)} accrued: what was paid before usage was taken back, or"
            " became cheaper, is credit"
        )
        return
    findings.expect(
        paid + held <= owed,
        "released <= used",
        row,
        f"released {format_amount(paid)} + in doubt {format_amount(held)} is"
        f" {format_amount(paid + held - owed)} more than the {format_amount(owed)} accrued",
    )
    if any(escrow.status == "closed" for escrow in escrows):
        return
    # One that was frozen before it was adopted shows what was released before, and by others.
    escrows = [escrow for escrow in escrows if escrow.adopted]
    baseline = sum(escrow.baseline for escrow in escrows)
    observed = sum(escrow.observed for escrow in escrows)
    credited = sum(max(0, escrow.credited) for escrow in escrows)
    findings.expect(
        observed <= baseline + owed + credited,
        "overpaid",
        row,
        f"{format_amount(observed)} was read as released, baseline {format_amount(baseline)} +"
        f" accrued {format_amount(owed)} + credited {format_amount(credited)} is"
        f" {format_amount(baseline + owed + credited)}",
    )


def owed_of(books: Books, agreement: str, role: str | None = None) -> int:
    """What an agreement owes in whole micros, by the auditor's own sum.

    With a role, the part that is drawn on its escrows, where there is more than one.
    """
    accrued = books.accrued.get(agreement, Fraction(0))
    roles = books.owed.get(agreement, {})
    named = books.agreements.get(agreement)
    if role is not None and named is not None and len(dict(named.escrows)) > 1:
        accrued = roles.get(role, Fraction(0))
    micros: int = accrued.numerator * MICROS // accrued.denominator
    return micros


def held_of(books: Books, escrow: str) -> int:
    """What may or may not have been paid, in micros."""
    return sum(release.amount for release in books.releases_of(escrow) if release.status in OPEN)
