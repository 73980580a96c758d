"""Prices worked out naively, in fractions and by the words of the specification."""

from __future__ import annotations

import math
from fractions import Fraction

from meterd.core.money import NANOS, PICOS
from meterd.core.pricing import Model

USDC = Fraction(1, PICOS)


def naive_charge(rate, units, brought, *, ended):
    """Price all units of one rate in a period; `brought`: the sum of the events' own prices."""
    billed = max(Fraction(0), units - Fraction(rate.free_units, NANOS))
    charge = _MODELS[rate.model](rate, billed, brought)
    if ended and rate.minimum is not None:
        charge = max(charge, Fraction(rate.minimum, 10**6))
    return charge if rate.maximum is None else min(charge, Fraction(rate.maximum, 10**6))


def _standard(rate, billed, _):
    return billed / rate.per * rate.price * USDC


def _package(rate, billed, _):
    return math.ceil(billed / rate.per) * rate.price * USDC


def _volume(rate, billed, _):
    charge = Fraction(0)
    for tier in reversed(rate.tiers):
        if billed and (tier.up_to is None or billed <= Fraction(tier.up_to, NANOS)):
            charge = billed / rate.per * tier.price * USDC + tier.flat * USDC
    return charge


def _graduated(rate, billed, _):
    charge = Fraction(0)
    for above, tier in zip((None, *rate.tiers), rate.tiers, strict=False):
        low = Fraction(above.up_to, NANOS) if above is not None else Fraction(0)
        high = billed if tier.up_to is None else min(billed, Fraction(tier.up_to, NANOS))
        if high > low:
            charge += (high - low) / rate.per * tier.price * USDC + tier.flat * USDC
    return charge


_MODELS = {
    Model.STANDARD: _standard,
    Model.PERCENTAGE: _standard,
    Model.DYNAMIC: lambda rate, _, brought: brought / rate.per,
    Model.PACKAGE: _package,
    Model.VOLUME: _volume,
    Model.GRADUATED: _graduated,
}
