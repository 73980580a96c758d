"""Rates and rate cards: what usage costs, as exact integers over one denominator.

A card brings all its rates to one denominator, 10^21 x the least common multiple of their `per`: a
quantity in nanos times a price in picos is an integer of 10^-21 USDC, and dividing by `per` is
multiplying by what is missing to the common multiple. So a charge is a sum of integer products, and
nothing is rounded before money moves.

`RateCard.charge` is the whole of it, from scratch: usage of one period in, exact USDC by role out.
A rate that is *linear* (standard, percentage, dynamic; no free units, no minimum, no maximum) needs
only the difference that a batch makes; for any other the charge of the whole line is worked out
anew, once for each batch that touches it.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import msgspec

from meterd.core.money import MICROS, NANOS, PICOS, format_amount, format_price, format_quantity

Dimensions = tuple[tuple[str, str], ...]
# Stands for each value of a dimension that no rate names: a million models make one counter.
OTHER = "other"
# Meters of meterd's own, which usage events cannot name. Each is a counter like any other, so that
# what is owed stays a function of counters.
PERIOD_METER = "meterd.period"  # One for each period that has ended: it carries the fee.
MILESTONE_METER = "meterd.milestone"  # One for each tranche that was reached, by its `name`.
OUTCOME_METER = "meterd.outcome"  # The score.
OWN_METERS = frozenset({PERIOD_METER, MILESTONE_METER, OUTCOME_METER})
MAIN = "main"
# 10^-21 USDC: a quantity in nanos times a price in picos.
ATTOS = NANOS * PICOS


class Model(enum.StrEnum):
    """How a rate computes. The names are the field's (Lago, OpenMeter, Stripe)."""

    STANDARD = "standard"  # So much for `per` units.
    GRADUATED = "graduated"  # Each unit at the price of the tier that it falls in.
    VOLUME = "volume"  # All units at the price of the tier that the last one falls in.
    PACKAGE = "package"  # So much for each package of `per` units that was begun.
    PERCENTAGE = "percentage"  # A share of the quantity, which is an amount of USDC.
    DYNAMIC = "dynamic"  # The event brings its own price, up to a cap.


LINEAR = frozenset({Model.STANDARD, Model.PERCENTAGE, Model.DYNAMIC})


class Tier(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tier: up to and including `up_to` nanos (None: no end), picos for `per` units.

    `flat` picos are charged once when the tier is entered (graduated) or is the one (volume).
    """

    up_to: int | None
    price: int
    flat: int = 0


class Rate(msgspec.Struct, frozen=True):
    """The price, in picos for `per` units, of one meter where dimensions are as in `where`.

    price       for `percentage` the share, in picos of one; for `dynamic` the cap on the event's.
    free_units  nanos of a period that cost nothing, before any tier.
    minimum, maximum
                of what the line is charged for a period, in micros; the minimum counts once the
                period has ended. None: there is none.
    role        of the escrow that the charge is drawn from.
    """

    meter: str
    price: int
    per: int = 1
    where: Dimensions = ()
    model: Model = Model.STANDARD
    tiers: tuple[Tier, ...] = ()
    free_units: int = 0
    minimum: int | None = None
    maximum: int | None = None
    role: str = MAIN

    def matches(self, dimensions: Mapping[str, str]) -> bool:
        """Whether this rate prices an event with these dimensions; a missing one is empty."""
        return all(dimensions.get(name, "") == value for name, value in self.where)

    @property
    def linear(self) -> bool:
        """Whether the charge of a sum is the sum of the charges."""
        bare = not self.free_units and self.minimum is None and self.maximum is None
        return bare and self.model in LINEAR

    @property
    def words(self) -> str:
        """The rate as a person reads it."""
        per = "" if self.per == 1 else f" per {self.per}"
        where = "".join(f", {name} = {value}" for name, value in self.where)
        return f"{self.meter}: {self._price_words(per)}{where}{self._limit_words()}"

    def _price_words(self, per: str) -> str:
        if self.model is Model.PERCENTAGE:
            return f"{format_price(self.price * 100)} % of the amount"
        if self.model is Model.DYNAMIC:
            return f"the event's price, at most {format_price(self.price)} USDC{per}"
        if self.model is Model.PACKAGE:
            return f"{format_price(self.price)} USDC for each {self.per} begun"
        if not self.tiers:
            return f"{format_price(self.price)} USDC{per}"
        return f"{self.model.value}, " + "; ".join(_tier_words(tier, per) for tier in self.tiers)

    def _limit_words(self) -> str:
        limits = (
            (self.free_units, f", the first {format_quantity(self.free_units)} free"),
            (self.minimum, f", at least {format_amount(self.minimum or 0)} a period"),
            (self.maximum is not None, f", at most {format_amount(self.maximum or 0)} a period"),
        )
        return "".join(words for wanted, words in limits if wanted)


def _tier_words(tier: Tier, per: str) -> str:
    up_to = "beyond" if tier.up_to is None else f"up to {format_quantity(tier.up_to)}"
    flat = f" + {format_price(tier.flat)}" if tier.flat else ""
    return f"{up_to} {format_price(tier.price)} USDC{per}{flat}"


_BARE = Rate("", 0)
_LATER_FIELDS = ("model", "tiers", "free_units", "minimum", "maximum", "role")


@dataclass(frozen=True, slots=True)
class Usage:
    """Cumulative usage of one meter and one set of priced dimensions in one period.

    `amount`: sum of quantity x price of the events, in 10^-21 USDC; only of dynamic rates.
    """

    quantity: int
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a bill: a rate, its usage in nanos, and its charge in 1 / denominator USDC."""

    place: int
    rate: Rate
    quantity: int
    charge: int


@dataclass(frozen=True)
class RateCard:
    """All the rates of one plan version. First match wins."""

    rates: tuple[Rate, ...]

    @classmethod
    def from_text(cls, text: str) -> RateCard:
        """Read a card as `text` wrote it."""
        return cls(msgspec.json.decode(text, type=tuple[Rate, ...]))

    @cached_property
    def text(self) -> str:
        """The card as JSON, for the store. What a rate does not use is left out."""
        return msgspec.json.encode([_plain(rate) for rate in self.rates]).decode()

    @cached_property
    def id(self) -> str:
        """A name made of the content: the same rates are the same card."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def common(self) -> int:
        """The least common multiple of what the prices are `per`."""
        return math.lcm(*(rate.per for rate in self.rates))

    @cached_property
    def denominator(self) -> int:
        """Charges of this card are integers of 1 / denominator USDC."""
        return ATTOS * self.common

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """What one nano costs under each rate that is linear, in 1 / denominator USDC.

        For a dynamic one, whose events bring the price: what 10^-21 USDC of their amount cost.
        """
        return tuple(
            (1 if rate.model is Model.DYNAMIC else rate.price) * (self.common // rate.per)
            for rate in self.rates
        )

    @cached_property
    def meters(self) -> frozenset[str]:
        """The meters that this card prices."""
        return frozenset(rate.meter for rate in self.rates)

    @cached_property
    def roles(self) -> frozenset[str]:
        """The roles of the escrows that this card draws from."""
        return frozenset(rate.role for rate in self.rates)

    @cached_property
    def _values(self) -> dict[str, dict[str, frozenset[str]]]:
        """For each meter, the dimensions that its rates ask for, and the values that they name."""
        found: dict[str, dict[str, set[str]]] = {meter: {} for meter in self.meters}
        for rate in self.rates:
            for name, value in rate.where:
                found[rate.meter].setdefault(name, set()).add(value)
        return {
            meter: {name: frozenset(values) for name, values in sorted(names.items())}
            for meter, names in found.items()
        }

    def priced(self, meter: str, dimensions: Mapping[str, str]) -> Dimensions:
        """Reduce an event's dimensions to what the price of this meter can depend on."""
        return tuple(
            (name, _reduced(dimensions.get(name, ""), values))
            for name, values in self._values[meter].items()
        )

    def match(self, meter: str, dimensions: Mapping[str, str]) -> int | None:
        """Find the place of the first rate that prices this; None: there is none."""
        for place, rate in enumerate(self.rates):
            if rate.meter == meter and rate.matches(dimensions):
                return place
        return None

    def line_charge(self, place: int, quantity: int, amount: int, *, ended: bool) -> int:
        """Price the whole usage of one rate in one period, in 1 / denominator USDC."""
        rate = self.rates[place]
        charge = _CHARGES[rate.model](self, rate, quantity, amount)
        if ended and rate.minimum is not None:
            charge = max(charge, rate.minimum * (self.denominator // MICROS))
        if rate.maximum is not None:
            charge = min(charge, rate.maximum * (self.denominator // MICROS))
        return charge

    def lines(self, usage: Mapping[tuple[str, Dimensions], Usage]) -> Iterator[Line]:
        """Work out the bill of one period, a line for each rate that has usage or a minimum."""
        quantities, amounts = [0] * len(self.rates), [0] * len(self.rates)
        touched = set()
        for (meter, dimensions), used in usage.items():
            place = self.match(meter, dict(dimensions))
            assert place is not None, f"no rate for counted usage of {meter}"
            quantities[place] += used.quantity
            amounts[place] += used.amount
            touched.add(place)
        ended = usage.get((PERIOD_METER, ()), Usage(0)).quantity > 0
        for place, rate in enumerate(self.rates):
            if place in touched or (ended and rate.minimum is not None):
                charge = self.line_charge(place, quantities[place], amounts[place], ended=ended)
                yield Line(place, rate, quantities[place], charge)

    def charge(self, usage: Mapping[tuple[str, Dimensions], Usage]) -> dict[str, Fraction]:
        """Price the usage of one period from scratch: exact USDC by the role that it is drawn on.

        The usage is by (meter, priced dimensions). Roles without a charge may be missing.
        """
        numerators: dict[str, int] = {}
        for line in self.lines(usage):
            role = line.rate.role
            numerators[role] = numerators.get(role, 0) + line.charge
        return {role: Fraction(value, self.denominator) for role, value in numerators.items()}


# -- The charge models: usage of one line to 1 / denominator USDC ---------------------------------


def _billed(rate: Rate, quantity: int) -> int:
    return max(0, quantity - rate.free_units)


def _linear(card: RateCard, rate: Rate, quantity: int, _: int) -> int:
    return _billed(rate, quantity) * rate.price * (card.common // rate.per)


def _dynamic(card: RateCard, rate: Rate, _: int, amount: int) -> int:
    return amount * (card.common // rate.per)


def _package(card: RateCard, rate: Rate, quantity: int, _: int) -> int:
    packages = -(-_billed(rate, quantity) // (rate.per * NANOS))
    return packages * rate.price * NANOS * card.common


def _graduated(card: RateCard, rate: Rate, quantity: int, _: int) -> int:
    billed, below, charge = _billed(rate, quantity), 0, 0
    for tier in rate.tiers:
        if billed <= below:
            break
        end = billed if tier.up_to is None else min(billed, tier.up_to)
        charge += (end - below) * tier.price * (card.common // rate.per)
        charge += tier.flat * NANOS * card.common
        below = end
    return charge


def _volume(card: RateCard, rate: Rate, quantity: int, _: int) -> int:
    billed = _billed(rate, quantity)
    tier = next(tier for tier in rate.tiers if tier.up_to is None or billed <= tier.up_to)
    # Usage of nothing costs nothing, but for a score: there zero is a result like any other.
    if not billed and rate.meter != OUTCOME_METER:
        return 0
    return billed * tier.price * (card.common // rate.per) + tier.flat * NANOS * card.common


_CHARGES = {
    Model.STANDARD: _linear,
    Model.PERCENTAGE: _linear,
    Model.DYNAMIC: _dynamic,
    Model.PACKAGE: _package,
    Model.GRADUATED: _graduated,
    Model.VOLUME: _volume,
}


def _plain(rate: Rate) -> dict[str, Any]:
    """A rate as the store keeps it: the first four fields always, the later ones where used."""
    fields: dict[str, Any] = {
        "meter": rate.meter,
        "price": rate.price,
        "per": rate.per,
        "where": rate.where,
    }
    for name in _LATER_FIELDS:
        value = getattr(rate, name)
        if value != getattr(_BARE, name):
            fields[name] = value
    return fields


def _reduced(value: str, named: frozenset[str]) -> str:
    """Replace a value that no rate names by one word that no rate names either.

    Were it a word that a rate names, what was counted under it would be priced by that rate.
    """
    if not value or value in named:
        return value
    word = OTHER
    while word in named:
        word += "*"
    return word
