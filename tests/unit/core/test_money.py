"""Exact money: what is read, what is refused, and the one rounding."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core import money
from meterd.core.money import BadNumber

GOOD = [
    ("0", 0),
    ("0.000001", 1),
    ("10.00", 10_000_000),
    ("007.5", 7_500_000),
    ("1.000000000000000000000000", 1_000_000),  # Zeros behind the last decimal say nothing.
    ("9999999999999999", 9_999_999_999_999_999_000_000),
]

BAD = [
    "",
    " ",
    "-1",
    "+1",
    ".5",
    "1.",
    "1e3",
    "1E3",
    "NaN",
    "sNaN",
    "Infinity",
    "1_000",
    "0x10",
    " 5",
    "5\n",
    "1,5",
    "1.2.3",
    "١٢",
    "\uff11\uff12",
    "\u00b2",
    "1e1000000",
    "12345678901234567",
    "0.0000001",
    "1." + "0" * 25,
    "9" * 5_000,
    "0." + "3" * 1_000_000,
]


@pytest.mark.parametrize(("text", "micros"), GOOD)
def test_amount_is_read_exactly_when_it_is_a_plain_decimal(text, micros):
    """A plain decimal becomes the integer that it is."""
    assert micros == money.parse_amount(text)


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text[:20]).replace("\\", "/"))
def test_amount_is_refused_when_it_is_anything_else(text):
    """No sign, exponent, blank, other digit or seventh decimal gets through."""
    with pytest.raises(BadNumber):
        money.parse_amount(text)


@pytest.mark.parametrize(
    ("text", "nanos"),
    [
        ("0.000000001", 1),
        ("1532", 1532 * 10**9),
        ("1000000000000000", 10**24),
        ("12.500", 12_500_000_000),
    ],
)
def test_quantity_is_read_exactly_when_it_is_in_its_limits(text, nanos):
    """Nine decimals and 1e15 are still in."""
    assert nanos == money.parse_quantity(text)


@pytest.mark.parametrize("text", ["0", "0.000", "1000000000000000.1", "0.0000000001", "-1"])
def test_quantity_is_refused_when_it_is_out_of_its_limits(text):
    """Nothing, too much and too fine are refused."""
    with pytest.raises(BadNumber):
        money.parse_quantity(text)


def test_price_is_read_with_twelve_decimals_and_has_a_limit_that_json_can_hold():
    """The dearest price still fits 64 bits in picos, and a dearer one is refused."""
    assert 1 == money.parse_price("0.000000000001")
    assert 10**18 == money.parse_price("1000000")
    with pytest.raises(BadNumber, match="1e6"):
        money.parse_price("1000000.000000000001")


@pytest.mark.parametrize(
    ("micros", "text"),
    [(2, "0.000002"), (0, "0.00"), (10_000_000, "10.00"), (1_230_000, "1.23"), (-5, "-0.000005")],
)
def test_amount_is_written_plainly(micros, text):
    """Never an exponent, always two decimals."""
    assert text == money.format_amount(micros)


@given(st.integers(0, 10**21), st.sampled_from([6, 9, 12]))
def test_number_comes_back_as_it_was_when_it_is_written_and_read(value, decimals):
    """Writing and reading are each other's inverse."""
    text = money.format_scaled(value, decimals, places_min=2)

    assert value == money.parse_scaled(text, decimals)


def test_quantity_and_price_are_written_without_needless_decimals():
    """A whole number has no point."""
    assert "1532" == money.format_quantity(1532 * 10**9)
    assert "0.5" == money.format_quantity(5 * 10**8)
    assert "0.000002" == money.format_price(2 * 10**6)
    assert "7" == money.format_scaled(7, 0)


def test_exact_amount_is_cut_off_for_display_when_no_decimals_can_hold_it():
    """A third is shown with 24 threes."""
    assert "0." + "3" * 24 == money.format_exact(Fraction(1, 3))
    assert "2.50" == money.format_exact(Fraction(5, 2))


@given(st.fractions(0, 10**9), st.integers(1, 10**7))
def test_floor_takes_the_most_whole_quanta_that_are_owed(usdc, quantum):
    """What is cut off is less than one quantum, and never negative."""
    micros = money.floor_to_quantum(usdc, quantum)
    rest = usdc * money.MICROS - micros

    assert 0 == micros % quantum
    assert 0 <= rest < quantum


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (money.parse_amount, "1e3", "not a plain decimal such as 12 or 0.000001"),
        (money.parse_amount, "0.0000001", "more than 6 decimals"),
        (money.parse_amount, "1" * 17, "more than 16 digits before the point, or 24 behind it"),
        (
            money.parse_amount,
            "1." + "1" * 25,
            "more than 16 digits before the point, or 24 behind it",
        ),
        (money.parse_amount, "1" * 17 + "\n", "not a plain decimal such as 12 or 0.000001"),
        (money.parse_amount, "-" + "1" * 17, "not a plain decimal such as 12 or 0.000001"),
        (money.parse_amount, "1" * 17 + ".", "not a plain decimal such as 12 or 0.000001"),
        (money.parse_amount, "\uff11" * 17, "not a plain decimal such as 12 or 0.000001"),
        (money.parse_price, "1000001", "a price may be at most 1e6 USDC"),
        (money.parse_quantity, "0", "a quantity must be greater than 0"),
        (money.parse_quantity, "1000000000000001", "a quantity may be at most 1e15"),
    ],
)
def test_refusal_says_in_these_words_what_is_wrong(read, text, said):
    """They stand in answers and dead letters."""
    with pytest.raises(BadNumber) as refused:
        read(text)

    assert said == str(refused.value)


def test_floor_is_exact_where_a_float_would_not_be():
    """One micro below 10^21 of them, in whole micros unless another quantum is asked for."""
    assert 10**21 - 1 == money.floor_to_quantum(Fraction(10**21 - 1, 10**6))
    assert 7 == money.floor_to_quantum(Fraction(7, 10**6))


def test_zeros_alone_are_cut_off_behind_a_number():
    """No other character is taken for one, in reading and in writing."""
    assert "0.1" == money.format_scaled(100_000, 6)
    with pytest.raises(BadNumber):
        money.parse_scaled("1.X0", 6)
