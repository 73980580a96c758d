"""What the escrow service takes for an amount, a memo, a key; everything else is a 400."""

from __future__ import annotations

import pytest

from meterd.sandbox import wire
from meterd.sandbox.ledger import Deadline
from meterd.sandbox.wire import BadRequest


@pytest.mark.parametrize(
    ("text", "micros"),
    [("0.000001", 1), ("1", 1_000_000), ("10.00", 10_000_000), ("1000000000", 10**15)],
)
def test_a_plain_decimal_string_is_read_exactly(text, micros):
    """Up to six decimals, up to a thousand million."""
    assert micros == wire.read_amount({"amount": text})


BAD_AMOUNTS = [
    *(None, True, 0, 1, -1, 0.01, 2e-06, [], {}, ["1.00"]),
    *("", "0", "0.00", "0.000000", "-1", "+1", "1e1", "2e-06", "1E5", "NaN", "Infinity", "sNaN"),
    *("0.0000001", "1.0000000", "1000000000.000001", "9" * 16, "9" * 5000, "1_000", " 5\n", "5\n"),
    *(
        "0x10",
        "\uff11\uff12",
        ".5",
        "5.",
        "1,5",
        "1.2.3",
        "\x00",
        "1" + "0" * 30,
        "0." + "0" * 10**5,
    ),
]


@pytest.mark.parametrize("amount", BAD_AMOUNTS, ids=lambda amount: repr(amount)[:20])
def test_what_is_no_plain_decimal_string_is_refused(amount):
    """Numbers too: who sends numbers sends floats sooner or later."""
    with pytest.raises(BadRequest) as caught:
        wire.read_amount({"amount": amount})

    assert caught.value.code == "invalid_amount"


def test_a_missing_amount_is_named():
    """Missing is something else than wrong."""
    with pytest.raises(BadRequest) as caught:
        wire.read_amount({})

    assert caught.value.code == "amount_required"


@pytest.mark.parametrize(
    "body",
    [
        *(b"null", b"[]", b'"str"', b"1", b"{", b'{"a":1}x', b"{}{}", b"\xef\xbb\xbf{}", b"\xff"),
        *(b'{"a":NaN}', b"[" * 50_000, "{}".encode("utf-16"), b'{"memo":"\\ud800"}', b" "),
    ],
    ids=lambda body: repr(body)[:20],
)
def test_a_body_that_is_no_json_object_is_refused(body):
    """Whatever it is, the answer is one kind of refusal."""
    with pytest.raises(BadRequest) as caught:
        wire.read_object(body)

    assert caught.value.code == "invalid_json"


def test_an_empty_body_is_an_empty_object():
    """Calls without parameters may leave the body out."""
    assert wire.read_object(b"") == {}


@pytest.mark.parametrize("memo", [1, "x" * 281, "a\nb", "a\x00b", ["x"]])
def test_a_memo_that_could_break_a_line_is_refused(memo):
    """Control characters and endless texts stay out of the log."""
    with pytest.raises(BadRequest):
        wire.read_memo({"memo": memo})


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256, "a\r\nb"])
def test_a_key_of_other_than_visible_characters_is_refused(key):
    """An idempotency key is a header's plain text."""
    with pytest.raises(BadRequest):
        wire.read_key(key)


@pytest.mark.parametrize("hours", [0, -1, 1.5, "1", True, 10**9])
def test_a_deadline_is_a_whole_number_of_hours(hours):
    """From one hour to a year."""
    with pytest.raises(BadRequest):
        wire.read_deadline({"auto_release_hours": hours}, 0)


def test_a_deadline_counts_from_now():
    """No field, no deadline."""
    assert wire.read_deadline({"auto_release_hours": 2}, 5) == 7_200_005
    assert wire.read_deadline({}, 5) is None
    assert wire.read_direction({"on_deadline": "refund"}, Deadline.RELEASE) is Deadline.REFUND


def test_a_time_is_written_in_utc_with_milliseconds():
    """ISO 8601 with a Z."""
    assert wire.iso_time(1_795_435_200_123) == "2026-11-23T12:00:00.123Z"
