"""What usage costs, worked out from the specification's words: six models, limits, periods, roles.

The rule kept here: nothing is taken over from the code that bills. Money is a fraction of USDC from
the first line to the last, quantities are fractions of a unit, and each model is the sentence that
stands in the specification. A bill is one rate's usage in one period of one agreement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from meterd.audit.books import OUTCOME, PERIOD, Books, Card, Counter, Rate
from meterd.audit.findings import Findings
from meterd.core.money import MICROS, NANOS, PICOS


@dataclass(slots=True)
class Bill:
    """One rate's usage in one period: units, and for prices that events bring their sum in USDC."""

    rate: Rate
    units: Fraction = Fraction(0)
    brought: Fraction = Fraction(0)
    events: int = 0
    ended: bool = False

    @property
    def charge(self) -> Fraction:
        """What it comes to, in USDC."""
        rate = self.rate
        charge = MODELS[rate.model](self) if self.events or rate.meter == PERIOD else Fraction(0)
        if self.ended and rate.minimum is not None:
            charge = max(charge, Fraction(rate.minimum, MICROS))
        if rate.maximum is not None:
            charge = min(charge, Fraction(rate.maximum, MICROS))
        return charge

    @property
    def chargeable(self) -> Fraction:
        """The units beyond those that cost nothing."""
        return max(Fraction(0), self.units - Fraction(self.rate.free_units, NANOS))


def reckon(books: Books, findings: Findings) -> None:
    """Fill in what each agreement owes, in all and by the role that it is drawn on."""
    for (agreement, period, card_id), counters in _grouped(books).items():
        card = books.cards.get(card_id)
        ended = any(counter.meter == PERIOD and counter.quantity > 0 for counter in counters)
        for bill in _bills(card, counters, findings, ended=ended) if card is not None else ():
            role = bill.rate.role
            owed = books.owed.setdefault(agreement, {})
            owed[role] = owed.get(role, Fraction(0)) + bill.charge
        if card is None:
            for counter in counters:
                findings.broke("counters", counter.row, "no stored rate prices it")
        findings.expect(
            period >= 0, "counters", counters[0].row, f"period {period} is before the first one"
        )
    for agreement, roles in books.owed.items():
        books.accrued[agreement] = sum(roles.values(), Fraction(0))


def _grouped(books: Books) -> dict[tuple[str, int, str], list[Counter]]:
    groups: dict[tuple[str, int, str], list[Counter]] = {}
    for counter in books.counters:
        groups.setdefault((counter.agreement, counter.period, counter.card), []).append(counter)
    return groups


def _bills(
    card: Card, counters: list[Counter], findings: Findings, *, ended: bool
) -> Iterator[Bill]:
    """Sort a period's counters under their rates; a rate with a minimum is billed without usage."""
    bills = [Bill(rate, ended=ended) for rate in card.rates]
    for counter in counters:
        place = place_of(card, counter)
        if place is None:
            findings.broke("counters", counter.row, "no stored rate prices it")
            continue
        bills[place].units += Fraction(counter.quantity, NANOS)
        bills[place].brought += Fraction(counter.amount, NANOS * PICOS)
        bills[place].events += counter.events
    yield from bills


def place_of(card: Card, counter: Counter) -> int | None:
    """The place of the first rate of a card that fits a counter."""
    dimensions = dict(counter.dimensions)
    for place, rate in enumerate(card.rates):
        fits = all(dimensions.get(name, "") == value for name, value in rate.where)
        if rate.meter == counter.meter and fits:
            return place
    return None


# -- The models ----------------------------------------------------------------------------------


def _usdc(picos: int) -> Fraction:
    return Fraction(picos, PICOS)


def _standard(bill: Bill) -> Fraction:
    """So much for `per` units; for a percentage the unit is a USDC and the price its share."""
    return bill.chargeable * _usdc(bill.rate.price) / bill.rate.per


def _dynamic(bill: Bill) -> Fraction:
    """Each event brought its own price for `per` units."""
    return bill.brought / bill.rate.per


def _package(bill: Bill) -> Fraction:
    """So much for each package of `per` units that was begun."""
    whole, rest = divmod(bill.chargeable, bill.rate.per)
    return _usdc(bill.rate.price) * (whole + (1 if rest else 0))


def _graduated(bill: Bill) -> Fraction:
    """Each unit at the price of its own tier; a tier's flat price once it has a unit in it."""
    charge, lower = Fraction(0), Fraction(0)
    for tier in bill.rate.tiers:
        upper = None if tier.up_to is None else Fraction(tier.up_to, NANOS)
        inside = bill.chargeable - lower if upper is None else min(bill.chargeable, upper) - lower
        if inside > 0:
            charge += inside * _usdc(tier.price) / bill.rate.per + _usdc(tier.flat)
        lower = bill.chargeable if upper is None else upper
    return charge


def _volume(bill: Bill) -> Fraction:
    """All units at the price of the tier that the last one reaches. A score of 0 is a score."""
    if not bill.chargeable and bill.rate.meter != OUTCOME:
        return Fraction(0)
    for tier in bill.rate.tiers:
        if tier.up_to is None or bill.chargeable <= Fraction(tier.up_to, NANOS):
            return bill.chargeable * _usdc(tier.price) / bill.rate.per + _usdc(tier.flat)
    raise AssertionError("a card whose last tier has an end is not read")


MODELS: dict[str, Callable[[Bill], Fraction]] = {
    "standard": _standard,
    "percentage": _standard,
    "dynamic": _dynamic,
    "package": _package,
    "graduated": _graduated,
    "volume": _volume,
}
