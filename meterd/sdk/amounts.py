"""Amounts of USDC between a caller's program and the wire: exact both ways, or refused.

The rule kept here: an amount that the caller may not have meant is never sent. A float has noise, a
zero is "everything" to some services, and 5 may be five dollars or five micros; none of them gets
as far as a request.
"""

from __future__ import annotations

from decimal import Decimal

from meterd.core.money import (
    AMOUNT_DECIMALS,
    AMOUNT_DIGITS_MAX,
    MICROS,
    BadNumber,
    format_amount,
    parse_amount,
)
from meterd.sdk.errors import BadAmount

LOCK_MIN: int = MICROS  # The contract's own: an escrow holds at least 1.00 USDC.
AMOUNT_MAX: int = 10**AMOUNT_DIGITS_MAX * MICROS
DECIMAL_DIGITS_MAX = 64  # More are no amount, and would take long to work out.

HOW = 'write a str or a Decimal in USDC, such as "0.01" or Decimal("0.01")'


def micros_of(amount: object) -> int:
    """An amount to be moved, in micros: a `str` or `Decimal` of USDC, above 0, at most 6 decimals.

    Raises `BadAmount`, which says what to write instead, for everything else.
    """
    micros = _exact(amount)
    if micros == 0:
        raise BadAmount(
            "the amount is 0, which some services take for everything; "
            "what is not to be moved is not asked for"
        )
    if micros >= AMOUNT_MAX:
        raise BadAmount(f"the amount must be below {format_amount(AMOUNT_MAX)} USDC")
    return micros


def micros_to_lock(amount: object) -> int:
    """An amount for a new escrow, in micros: as `micros_of`, and at least 1.00 USDC."""
    micros = micros_of(amount)
    if micros < LOCK_MIN:
        raise BadAmount(f"an escrow holds at least 1.00 USDC, not {format_amount(micros)}")
    return micros


def figure_of(amount: object) -> int:
    """A figure that the caller knows, in micros: as `micros_of`, and it may be 0."""
    return _exact(amount)


def decimal_of(micros: int) -> Decimal:
    """Micros as USDC, exactly, whatever the caller's decimal context is."""
    return Decimal(format_amount(micros))


def _exact(amount: object) -> int:
    if isinstance(amount, str):
        return _from_text(amount)
    if isinstance(amount, Decimal):
        return _from_decimal(amount)
    name = type(amount).__name__
    if isinstance(amount, float):
        raise BadAmount(f"the amount is a float, which is not exact: {HOW}")
    raise BadAmount(f"the amount is of type {name}: {HOW}")


def _from_text(amount: str) -> int:
    try:
        return parse_amount(amount)
    except BadNumber as error:
        verb = "has" if str(error).startswith("more") else "is"
        raise BadAmount(f"the amount {verb} {error}: {HOW}") from error


def _from_decimal(amount: Decimal) -> int:
    if not amount.is_finite():
        raise BadAmount(f"the amount is no number: {HOW}")
    if not amount:
        return 0
    if amount < 0:
        raise BadAmount(f"the amount is below 0: {HOW}")
    # Before any arithmetic: an exponent of a million would be worked out digit by digit.
    if amount.adjusted() > AMOUNT_DIGITS_MAX:
        raise BadAmount(f"the amount must be below {format_amount(AMOUNT_MAX)} USDC")
    if amount.adjusted() < -AMOUNT_DECIMALS or len(amount.as_tuple().digits) > DECIMAL_DIGITS_MAX:
        raise BadAmount(f"the amount has more than {AMOUNT_DECIMALS} decimals: {HOW}")
    numerator, denominator = amount.as_integer_ratio()
    micros, rest = divmod(numerator * MICROS, denominator)
    if rest:
        raise BadAmount(f"the amount has more than {AMOUNT_DECIMALS} decimals: {HOW}")
    return micros
