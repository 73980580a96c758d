"""What a receipt says: usage, price and what was released, of one agreement at one moment.

Pure: who signs and keeps it stands elsewhere. A statement holds texts and whole numbers alone, so
that every language writes it in the same bytes; money and quantities are decimal strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from meterd.core.accounts import Account, Counter
from meterd.core.ledger import Ledger
from meterd.core.money import format_amount, format_exact, format_quantity
from meterd.core.settlement import Release, ReleaseStatus

FORM = 1  # Of the statement; another one has another number.
RELEASE, LATE, CLOSE = "release", "late", "close"
# A release in one of these states has been paid.
KINDS = {ReleaseStatus.CONFIRMED: RELEASE, ReleaseStatus.LATE: LATE}


@dataclass(slots=True)
class _Sum:
    """Usage of one meter under one rate card."""

    unit: str
    quantity: int = 0
    events: int = 0
    # None: the price is that of a whole line, tiers for instance, and no counter's own.
    charge: Fraction | None = Fraction(0)

    def add(self, counter: Counter) -> None:
        """Take one counter in."""
        self.quantity += counter.quantity
        self.events += counter.events
        if counter.line is not None or self.charge is None:
            self.charge = None
        else:
            said = counter.amount if counter.dynamic else counter.quantity
            self.charge += Fraction(said * counter.weight, counter.account.denominator)


def statement(
    ledger: Ledger, account: Account, kind: str, at: int, release: Release | None
) -> dict[str, Any]:
    """State where an agreement stands; `release` is the one that was just paid."""
    paid = sum(escrow.expected - escrow.baseline for escrow in ledger.escrows_of(account))
    return {
        "form": FORM,
        "kind": kind,
        "agreement": account.agreement.id,
        "plan": account.plan.name,
        "payer": account.agreement.payer,
        "at": at,
        "release": None if release is None else _release(release),
        "usage": _usage(account),
        "events": account.events,
        "accrued": format_exact(account.accrued),
        "released": format_amount(paid),
    }


def _release(release: Release) -> dict[str, str]:
    amount = format_amount(release.amount)
    return {"id": release.id, "escrow": release.escrow, "amount": amount, "why": release.why}


def _usage(account: Account) -> list[dict[str, Any]]:
    """Add the counters up by meter and rate card: as many lines as there are prices."""
    sums: dict[tuple[str, str], _Sum] = {}
    for counter in account.counters.values():
        key = counter.meter.name, counter.card
        if key not in sums:
            sums[key] = _Sum(counter.meter.unit)
        sums[key].add(counter)
    return [
        {
            "meter": meter,
            "card": card,
            "unit": each.unit,
            "quantity": format_quantity(each.quantity),
            "events": each.events,
            "accrued": None if each.charge is None else format_exact(each.charge),
        }
        for (meter, card), each in sorted(sums.items())
    ]
