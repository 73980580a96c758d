"""What a given usage costs under a plan, with its working, line by line.

The rule kept here: the charge of a line is the rate card's own; the working beside it is only words
about it, and its steps add up to the same number (a test holds them against each other).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from meterd.core.meters import Aggregation, Meter
from meterd.core.money import (
    MICROS,
    NANOS,
    PICOS,
    floor_to_quantum,
    format_amount,
    format_exact,
    format_price,
    format_quantity,
)
from meterd.core.plans import Plan
from meterd.core.pricing import ATTOS, PERIOD_METER, Dimensions, Model, Rate, RateCard, Usage


@dataclass(frozen=True, slots=True)
class Use:
    """Usage to be priced: nanos of a meter. `price` in picos, where the rate is dynamic."""

    meter: str
    quantity: int
    dimensions: Mapping[str, str]
    price: int | None = None
    value: str = ""  # What a meter of unique values tells apart.


@dataclass(frozen=True, slots=True)
class QuoteLine:
    """One line: exact USDC, the steps that lead to it, and the escrow's role that pays it."""

    meter: str
    rate: str
    quantity: int
    working: tuple[str, ...]
    charge: Fraction
    role: str


@dataclass(frozen=True, slots=True)
class Quote:
    """The price of a usage. `total` is exact; `payable` is what would be released of it, micros."""

    plan: str
    card: str
    lines: tuple[QuoteLine, ...]
    total: Fraction
    payable: int


class Unpriced(Exception):
    """A part of the usage has no price under the plan; the message says which and why."""


def quote(
    plan: Plan, meters: Mapping[str, Meter], usage: Sequence[Use], at: int, *, ended: bool
) -> Quote:
    """Price the usage of one period at a moment, wall ms. `ended`: with fee and minimums.

    Raises `Unpriced`.
    """
    card = plan.card_at(at)
    used: dict[tuple[str, Dimensions], Usage] = {}
    values: dict[tuple[str, Dimensions], set[str]] = {}
    for use in usage:
        place = card.match(use.meter, use.dimensions)
        if place is None:
            known = ", ".join(sorted(name for name in card.meters if name in meters))
            raise Unpriced(
                f"plan {plan.name} has no rate for {use.meter[:80]!r} with these dimensions; "
                f"its meters: {known or 'none'}"
            )
        amount = _amount(card.rates[place], use)
        key = use.meter, card.priced(use.meter, use.dimensions)
        before = used.get(key, Usage(0))
        meter = meters.get(use.meter) or Meter(use.meter)
        quantity = _together(meter, before.quantity, use, values.setdefault(key, set()))
        used[key] = Usage(quantity, before.amount + amount)
    if ended and card.match(PERIOD_METER, {}) is not None:
        used[PERIOD_METER, ()] = Usage(NANOS)
    amounts = _amounts(card, used)
    lines = tuple(
        QuoteLine(
            line.rate.meter,
            line.rate.words,
            line.quantity,
            working(line.rate, line.quantity, amounts[line.place], ended=ended),
            Fraction(line.charge, card.denominator),
            line.rate.role,
        )
        for line in card.lines(used)
    )
    total = sum((line.charge for line in lines), Fraction(0))
    return Quote(plan.name, card.id, lines, total, floor_to_quantum(total))


def _amount(rate: Rate, use: Use) -> int:
    if rate.model is not Model.DYNAMIC:
        return 0
    if use.price is None or use.price > rate.price:
        raise Unpriced(
            f"{use.meter} brings its own price: at most {format_price(rate.price)} USDC a unit"
        )
    return use.quantity * use.price


def _together(meter: Meter, before: int, use: Use, values: set[str]) -> int:
    """What a meter shows after one more use."""
    if meter.aggregation is Aggregation.MAX:
        return max(before, use.quantity)
    if meter.aggregation is Aggregation.LATEST:
        return use.quantity
    if meter.aggregation is Aggregation.UNIQUE and use.value:
        values.add(use.value)
        return len(values) * NANOS
    return before + use.quantity


def _amounts(card: RateCard, used: Mapping[tuple[str, Dimensions], Usage]) -> list[int]:
    amounts = [0] * len(card.rates)
    for (meter, dimensions), usage in used.items():
        place = card.match(meter, dict(dimensions))
        assert place is not None, "usage without a rate was refused"
        amounts[place] += usage.amount
    return amounts


def working(rate: Rate, quantity: int, amount: int, *, ended: bool) -> tuple[str, ...]:
    """Say how a line's charge comes about, a step each."""
    steps: list[str] = []
    billed = max(0, quantity - rate.free_units)
    if rate.free_units:
        free = format_quantity(min(quantity, rate.free_units))
        steps.append(f"{format_quantity(quantity)} - {free} free = {format_quantity(billed)}")
    steps += _STEPS[rate.model](rate, billed, amount)
    charge = _plain(rate, billed, amount)
    if ended and rate.minimum is not None and charge < Fraction(rate.minimum, MICROS):
        steps.append(f"at least {format_amount(rate.minimum)}")
        charge = Fraction(rate.minimum, MICROS)
    if rate.maximum is not None and charge > Fraction(rate.maximum, MICROS):
        steps.append(f"at most {format_amount(rate.maximum)}")
    return tuple(steps)


def _plain(rate: Rate, billed: int, amount: int) -> Fraction:
    """The charge before minimum and maximum, from the parts that the steps show."""
    if rate.model is Model.DYNAMIC:
        return Fraction(amount, ATTOS * rate.per)
    if rate.model is Model.PACKAGE:
        return Fraction(rate.price, PICOS) * -(-billed // (rate.per * NANOS))
    if not rate.tiers:
        return Fraction(billed * rate.price, ATTOS * rate.per)
    return sum((_part(rate, part) for part in _parts(rate, billed)), Fraction(0))


@dataclass(frozen=True, slots=True)
class _Part:
    quantity: int
    price: int
    flat: int


def _parts(rate: Rate, billed: int) -> list[_Part]:
    if rate.model is Model.VOLUME:
        tier = next(tier for tier in rate.tiers if tier.up_to is None or billed <= tier.up_to)
        return [_Part(billed, tier.price, tier.flat)]
    parts, below = [], 0
    for tier in rate.tiers:
        if billed <= below:
            break
        end = billed if tier.up_to is None else min(billed, tier.up_to)
        parts.append(_Part(end - below, tier.price, tier.flat))
        below = end
    return parts


def _part(rate: Rate, part: _Part) -> Fraction:
    return Fraction(part.quantity * part.price, ATTOS * rate.per) + Fraction(part.flat, PICOS)


def _times(rate: Rate, quantity: int, price: int) -> str:
    per = "" if rate.per == 1 else f" / {rate.per}"
    return f"{format_quantity(quantity)} x {format_price(price)}{per}"


def _standard(rate: Rate, billed: int, _: int) -> list[str]:
    result = format_exact(Fraction(billed * rate.price, ATTOS * rate.per))
    return [f"{_times(rate, billed, rate.price)} = {result}"]


def _tiered(rate: Rate, billed: int, _: int) -> list[str]:
    steps = []
    for part in _parts(rate, billed):
        flat = f" + {format_price(part.flat)}" if part.flat else ""
        product = _times(rate, part.quantity, part.price)
        steps.append(f"{product}{flat} = {format_exact(_part(rate, part))}")
    return steps


def _package(rate: Rate, billed: int, _: int) -> list[str]:
    packages = -(-billed // (rate.per * NANOS))
    result = format_exact(Fraction(rate.price, PICOS) * packages)
    begun = f"{format_quantity(billed)} / {rate.per}, begun: {packages}"
    return [begun, f"{packages} x {format_price(rate.price)} = {result}"]


def _dynamic(rate: Rate, _: int, amount: int) -> list[str]:
    return [f"the events' own prices: {format_exact(Fraction(amount, ATTOS * rate.per))}"]


_STEPS = {
    Model.STANDARD: _standard,
    Model.PERCENTAGE: _standard,
    Model.GRADUATED: _tiered,
    Model.VOLUME: _tiered,
    Model.PACKAGE: _package,
    Model.DYNAMIC: _dynamic,
}
