from __future__ import annotations

from decimal import Decimal, localcontext
from enum import StrEnum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.money import format_amount
from meterd.sdk.amounts import AMOUNT_MAX, decimal_of, figure_of, micros_of, micros_to_lock
from meterd.sdk.errors import BadAmount

# (amount, micros)
GOOD: tuple[tuple[Any, int], ...] = (
    ("0.01", 10_000),
    ("10", 10_000_000),
    ("10.00", 10_000_000),
    ("0.000001", 1),
    ("0.0000010", 1),
    (Decimal("0.01"), 10_000),
    (Decimal("1E+1"), 10_000_000),
    (Decimal("2E-6"), 2),
    (Decimal("0.00000100000000000"), 1),
    (Decimal("999999999999999.999999"), AMOUNT_MAX - 1),
)


@pytest.mark.parametrize(("amount", "micros"), GOOD)
def test_amount_that_is_exact_is_taken_as_it_is(amount: Any, micros: int) -> None:
    """Texts and decimals of at most six decimals, however they are written."""
    assert micros_of(amount) == micros


class Word(StrEnum):
    """A text of another type."""

    CENT = "0.01"


# (amount, a word of what is said)
BAD: tuple[tuple[Any, str], ...] = (
    (0.01, "float"),
    (float("nan"), "float"),
    (True, "bool"),
    (5, "int"),
    (0, "int"),
    (None, "NoneType"),
    (b"1", "bytes"),
    (Fraction(1, 2), "Fraction"),
    ("", "not a plain decimal"),
    ("0", "is 0"),
    ("0.00", "is 0"),
    ("-0.01", "not a plain decimal"),
    ("2e-06", "not a plain decimal"),
    (" 0.01", "not a plain decimal"),
    ("0.01\n", "not a plain decimal"),
    ("1_0", "not a plain decimal"),
    ("NaN", "not a plain decimal"),
    ("Infinity", "not a plain decimal"),
    ("\uff11", "not a plain decimal"),
    ("0.0000001", "more than 6 decimals"),
    ("1000000000000000", "below"),
    (Decimal(0), "is 0"),
    (Decimal("-0"), "is 0"),
    (Decimal("0E+999999"), "is 0"),
    (Decimal("-0.01"), "below 0"),
    (Decimal("NaN"), "no number"),
    (Decimal("sNaN"), "no number"),
    (Decimal("-Infinity"), "no number"),
    (Decimal("1E+999999"), "below"),
    (Decimal("1E-999999"), "more than 6 decimals"),
    (Decimal("1E+15"), "below"),
    (Decimal("0.0000001"), "more than 6 decimals"),
    (Decimal("1.0000001"), "more than 6 decimals"),
    (Decimal(1) / Decimal(3), "more than 6 decimals"),
    (Decimal("1." + "0" * 100), "more than 6 decimals"),
)


@pytest.mark.parametrize(("amount", "said"), BAD, ids=[repr(row[0])[:40] for row in BAD])
def test_amount_that_cannot_be_meant_is_refused_with_what_to_write(amount: Any, said: str) -> None:
    """As a `ValueError` too, for those who catch that."""
    with pytest.raises(BadAmount, match=said) as raised:
        micros_of(amount)

    assert isinstance(raised.value, ValueError)


def test_text_of_another_type_is_a_text() -> None:
    """An enumeration of texts is what its text is."""
    assert micros_of(Word.CENT) == 10_000


@pytest.mark.parametrize("amount", ["0.999999", Decimal("0.5")])
def test_escrow_of_less_than_one_is_refused(amount: Any) -> None:
    """The contract's own minimum."""
    with pytest.raises(BadAmount, match=r"at least 1\.00"):
        micros_to_lock(amount)

    assert micros_to_lock("1.00") == 1_000_000


def test_figure_may_be_zero_and_nothing_else_that_is_wrong() -> None:
    """What was released before may be nothing; a float it may not be."""
    assert (figure_of("0"), figure_of(Decimal(0)), figure_of("0.01")) == (0, 0, 10_000)
    with pytest.raises(BadAmount):
        figure_of(0.0)


@given(st.integers(1, AMOUNT_MAX - 1), st.integers(1, 28))
def test_amount_comes_back_exactly_whatever_the_context_is(micros: int, precision: int) -> None:
    """Neither way rounds, not even where the caller's decimals have one digit."""
    with localcontext() as context:
        context.prec = precision
        made = decimal_of(micros)

        assert (micros_of(made), micros_of(format_amount(micros))) == (micros, micros)
