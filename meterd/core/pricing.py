"""Rates and rate cards: what a quantity costs, as exact integers over one denominator.

A card brings all its rates to one denominator, 10^21 x the least common multiple of their `per`: a
quantity in nanos times a price in picos is an integer of 10^-21 USDC, and dividing by `per` is
multiplying by what is missing to the common multiple. So a charge is one integer multiplication,
and the sum of charges in any order and any batching is the charge of the sum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import msgspec

from meterd.core.money import NANOS, PICOS, format_price

Dimensions = tuple[tuple[str, str], ...]
# Stands for each value of a dimension that no rate names: a million models make one counter.
OTHER = "other"


class Rate(msgspec.Struct, frozen=True):
    """The price, in picos for `per` units, of one meter where dimensions are as in `where`."""

    meter: str
    price: int
    per: int = 1
    where: Dimensions = ()

    def matches(self, dimensions: Mapping[str, str]) -> bool:
        """Whether this rate prices an event with these dimensions; a missing one is empty."""
        return all(dimensions.get(name, "") == value for name, value in self.where)

    @property
    def words(self) -> str:
        """The rate as a person reads it."""
        per = "" if self.per == 1 else f" per {self.per}"
        where = "".join(f", {name} = {value}" for name, value in self.where)
        return f"{self.meter}: {format_price(self.price)} USDC{per}{where}"


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
        """The card as JSON, for the store."""
        return msgspec.json.encode(self.rates).decode()

    @cached_property
    def id(self) -> str:
        """A name made of the content: the same rates are the same card."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def denominator(self) -> int:
        """Charges of this card are integers of 1 / denominator USDC."""
        return NANOS * PICOS * math.lcm(*(rate.per for rate in self.rates))

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """What one nano of quantity costs under each rate, in 1 / denominator USDC."""
        common = math.lcm(*(rate.per for rate in self.rates))
        return tuple(rate.price * (common // rate.per) for rate in self.rates)

    @cached_property
    def meters(self) -> frozenset[str]:
        """The meters that this card prices."""
        return frozenset(rate.meter for rate in self.rates)

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

    def charge(self, usage: Mapping[tuple[str, Dimensions], int]) -> Fraction:
        """Price cumulative usage, nanos by (meter, priced dimensions), from scratch: exact USDC."""
        numerator = 0
        for (meter, dimensions), nanos in usage.items():
            place = self.match(meter, dict(dimensions))
            assert place is not None, f"no rate for counted usage of {meter}"
            numerator += self.weights[place] * nanos
        return Fraction(numerator, self.denominator)


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
