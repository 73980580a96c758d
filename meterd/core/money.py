"""Exact money and quantities: integers with a named scale, and the one place that rounds.

| what                | scale                            | Python type |
|---------------------|----------------------------------|-------------|
| amount of USDC      | micros, 0.000001 USDC            | `int`       |
| quantity            | nanos, 0.000000001 of its unit   | `int`       |
| price               | picos, 0.000000000001 USDC       | `int`       |
| owed, before a floor| USDC / denominator of a rate card| `Fraction`  |

Texts are read by rule, never by `Decimal(text)` or `float(text)`: those accept NaN, underscores,
full-width digits and exponents of a million. Nothing in here, and nothing that calls it, holds
money in a float.
"""

from __future__ import annotations

import re
from fractions import Fraction

AMOUNT_DECIMALS = 6  # USDC has six; it is also the quantum of the escrow service.
QUANTITY_DECIMALS = 9
PRICE_DECIMALS = 12

MICROS: int = 10**AMOUNT_DECIMALS
NANOS: int = 10**QUANTITY_DECIMALS
PICOS: int = 10**PRICE_DECIMALS

QUANTITY_MAX = 10**15  # In units. Larger is a bug of the producer, not a bill.
PRICE_MAX = 10**6  # In USDC. In picos it still fits 64 bits, which is what JSON writers promise.
AMOUNT_DIGITS_MAX = 15

# ASCII digits only: `\d` and `str.isdigit` take full-width and Arabic digits too.
_PLAIN = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,24})?\Z", re.ASCII)
_LONG = re.compile(r"[0-9]+(?:\.[0-9]+)?\Z", re.ASCII)


class BadNumber(ValueError):
    """A text that is no plain, non-negative decimal within its limits; the message says why."""


def parse_scaled(text: str, decimals: int) -> int:
    """Read a plain non-negative decimal text as an integer of 10^-decimals units.

    Raises `BadNumber` for anything else: signs, exponents, blanks, more than 16 digits before the
    point or more than `decimals` significant ones behind it.
    """
    if _PLAIN.match(text) is None:
        if _LONG.match(text):
            raise BadNumber("more than 16 digits before the point, or 24 behind it")
        raise BadNumber("not a plain decimal such as 12 or 0.000001")
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    if len(fraction) > decimals:
        raise BadNumber(f"more than {decimals} decimals")
    return int(whole + fraction.ljust(decimals, "0"))


def parse_amount(text: str) -> int:
    """Read an amount of USDC, such as "10.00", as micros. Raises `BadNumber`."""
    return parse_scaled(text, AMOUNT_DECIMALS)


def parse_price(text: str) -> int:
    """Read a price in USDC, at most 1e6 with at most 12 decimals, as picos. Raises `BadNumber`."""
    picos = parse_scaled(text, PRICE_DECIMALS)
    if picos > PRICE_MAX * PICOS:
        raise BadNumber("a price may be at most 1e6 USDC")
    return picos


def parse_quantity(text: str) -> int:
    """Read a quantity, > 0, at most 1e15 and with 9 decimals, as nanos. Raises `BadNumber`."""
    nanos = parse_scaled(text, QUANTITY_DECIMALS)
    if nanos == 0:
        raise BadNumber("a quantity must be greater than 0")
    if nanos > QUANTITY_MAX * NANOS:
        raise BadNumber("a quantity may be at most 1e15")
    return nanos


def format_scaled(value: int, decimals: int, *, places_min: int = 0) -> str:
    """Write an integer of 10^-decimals units plainly, with at least `places_min` decimals."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    whole, fraction = divmod(value, 10**decimals)
    digits = str(fraction).rjust(decimals, "0").rstrip("0") if decimals else ""
    digits = digits.ljust(places_min, "0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def format_amount(micros: int) -> str:
    """Write micros as the wire wants them: "0.000002", "10.00"; never an exponent."""
    return format_scaled(micros, AMOUNT_DECIMALS, places_min=2)


def format_quantity(nanos: int) -> str:
    """Write nanos of a unit in plain notation: "1532", "0.5"."""
    return format_scaled(nanos, QUANTITY_DECIMALS)


def format_price(picos: int) -> str:
    """Write picos of USDC in plain notation."""
    return format_scaled(picos, PRICE_DECIMALS)


EXACT_DECIMALS_SHOWN = 24


def format_exact(usdc: Fraction) -> str:
    """Write an exact amount of USDC for display; one like a third is cut off at 24 decimals."""
    scaled = usdc.numerator * 10**EXACT_DECIMALS_SHOWN // usdc.denominator
    return format_scaled(scaled, EXACT_DECIMALS_SHOWN, places_min=2)


def floor_to_quantum(usdc: Fraction, quantum: int = 1) -> int:
    """Round an exact amount of USDC down to whole quanta; the answer is in micros.

    This is the only rounding of money in meterd. What it cuts off is the residual: it stays in
    `accrued` and is paid when later usage has made a whole quantum of it.
    """
    micros: int = usdc.numerator * MICROS // usdc.denominator
    return micros // quantum * quantum
