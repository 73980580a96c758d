"""Bad input ends as one rejection with a reason, whatever stands beside it in its batch."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meterd.core import events, money
from meterd.core.events import EVENT_BYTES_MAX, EventDecoder, Reason, Rejection, UsageEvent
from meterd.core.ledger import AHEAD_MAX_MS
from meterd.core.money import BadNumber
from tests.unit.core.books import NOW, SENTINEL, WINDOW, Till, usage

FIELDS = b'"id":"x","agreement":"a","meter":"tokens"'


def of(quantity):
    """One event whose quantity is this piece of JSON."""
    return b"{" + FIELDS + b',"quantity":' + quantity + b"}"


def with_(**fields):
    """One event with other fields."""
    return usage("x", **fields)


def when(wall):
    """RFC 3339 of wall ms."""
    return datetime.fromtimestamp(wall / 1000, UTC).isoformat()


DOCUMENTS = {
    "empty": (b"", "malformed"),
    "blank": (b"   ", "malformed"),
    "null": (b"null", "malformed"),
    "list": (b"[]", "malformed"),
    "list of an event": (b"[" + usage("x") + b"]", "malformed"),
    "text": (b'"str"', "malformed"),
    "number": (b"5", "malformed"),
    "sentinel": (str(SENTINEL).encode(), "malformed"),
    "true": (b"true", "malformed"),
    "empty object": (b"{}", "unknown_agreement"),
    "truncated": (usage("x")[:-5], "malformed"),
    "trailing garbage": (usage("x") + b"]", "malformed"),
    "two documents": (usage("x") + usage("y"), "malformed"),
    "two documents with a comma": (usage("x") + b"," + usage("y"), "malformed"),
    "byte order mark": (b"\xef\xbb\xbf" + usage("x"), "malformed"),
    "utf-16": (usage("x").decode().encode("utf-16"), "malformed"),
    "invalid utf-8": (with_(payer="?").replace(b"?", b"\xff"), ""),  # In a field nobody reads.
    "invalid utf-8 in the id": (b'{"id":"\xff","agreement":"a"}', "malformed"),
    "lone surrogate": (b'{"id":"\\ud800","agreement":"a"}', "malformed"),
    "raw NUL in a text": (b'{"id":"a\x00b","agreement":"a"}', "malformed"),
    "escaped NUL in the id": (with_(id="a\x00b"), "malformed"),
    "NUL behind it": (usage("x") + b"\x00", "malformed"),
    "100,000 brackets": (b"[" * 100_000, "too_large"),
    "60,000 brackets": (b"[" * 60_000, "malformed"),
    "60,000 brackets inside": (of(b"[" * 60_000), "malformed"),
    "60,000 brackets in a field nobody reads": (
        b"{" + FIELDS + b',"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        "malformed",
    ),
    "1 MiB + 1": (b" " * (2**20 + 1), "too_large"),
    "64 KiB + 1": (usage("x").ljust(EVENT_BYTES_MAX + 1), "too_large"),
    "64 KiB": (usage("x").ljust(EVENT_BYTES_MAX), ""),
    "gzip": (b"\x1f\x8b\x08\x00" + b"\x00" * 40, "malformed"),
    "duplicate keys": (of(b"5")[:-1] + b',"quantity":7}', ""),  # The last one counts.
    "3,000 unknown keys": (with_(**{f"k{n}": n for n in range(3_000)}), ""),
    "array for an object": (b'["x","a"]', "malformed"),
    "numbers for texts": (b'{"id":1,"agreement":2,"meter":3,"quantity":4}', "malformed"),
}

QUANTITIES = {
    "NaN": (b"NaN", "malformed"),
    "Infinity": (b"Infinity", "malformed"),
    "-Infinity": (b"-Infinity", "malformed"),
    '"NaN"': (b'"NaN"', "bad_quantity"),
    '"sNaN"': (b'"sNaN"', "bad_quantity"),
    "text that is no UTF-8": (b'"\xa4"', "bad_quantity"),
    "escaped digit": (b'"1\\u0030"', ""),
    "1e400": (b"1e400", "bad_quantity"),
    "1e999999999": (b"1e999999999", "bad_quantity"),
    '"1e1000000"': (b'"1e1000000"', "bad_quantity"),
    "1e2": (b"1e2", "bad_quantity"),
    "-1": (b"-1", "bad_quantity"),
    "-0": (b"-0", "bad_quantity"),
    "0": (b"0", "bad_quantity"),
    "0.0": (b"0.0", "bad_quantity"),
    "true": (b"true", "bad_quantity"),
    "null": (b"null", "bad_quantity"),
    "a list": (b"[1]", "bad_quantity"),
    "an object": (b'{"a":1}', "bad_quantity"),
    "empty text": (b'""', "bad_quantity"),
    "blanks": (b'" 5\\n"', "bad_quantity"),
    "underscore": (b'"1_000"', "bad_quantity"),
    "full-width digits": ('"\uff11\uff12"'.encode(), "bad_quantity"),
    "Arabic digits": ('"\u0661"'.encode(), "bad_quantity"),
    "hexadecimal": (b'"0x10"', "bad_quantity"),
    "leading zero": (b"01", "malformed"),
    "leading plus": (b"+1", "malformed"),
    "2^53+1": (b"9007199254740993", "bad_quantity"),
    "2^63-1": (b"9223372036854775807", "bad_quantity"),
    "2^63": (b"9223372036854775808", "bad_quantity"),
    "2^70": (b"1180591620717411303424", "bad_quantity"),
    "5,000 digits": (b"9" * 5_000, "bad_quantity"),
    "5,000 digits as text": (b'"' + b"9" * 5_000 + b'"', "bad_quantity"),
    "60,000 decimals": (b"0." + b"3" * 60_000, "bad_quantity"),
    "a million decimals": (b"0." + b"3" * 1_000_000, "too_large"),
    "30 decimals": (b"0." + b"3" * 30, "bad_quantity"),
    "10 decimals": (b"0.0000000001", "bad_quantity"),
    "9 decimals": (b"0.000000001", ""),
    "1e15": (b"1000000000000000", ""),
    "1e15 as a text": (b'"1000000000000000"', ""),
    "1e15 and a bit": (b"1000000000000000.000000001", "bad_quantity"),
    "text": (b'"12.5"', ""),
    "escaped text": (b'"\\u0031\\u0032"', ""),
}

IDENTITIES = {
    "no id": (b'{"agreement":"a","meter":"tokens","quantity":1}', "no_id"),
    "empty id": (with_(id=""), "no_id"),
    "null id": (with_(id=None), "malformed"),
    "long id": (with_(id="x" * 257), "malformed"),
    "longest id": (with_(id="x" * 256), ""),
    "60 KiB id": (with_(id="x" * 60_000), "malformed"),
    "64 KiB id": (with_(id="x" * 2**16), "too_large"),
    "60 KiB id and no agreement": (with_(id="x\n" * 20_000, agreement="?"), "unknown_agreement"),
    "CRLF in the id": (with_(id="x\r\nSet-Cookie: y"), "malformed"),
    "CRLF in the id and no agreement": (with_(id="x\r\ny", agreement="?"), "unknown_agreement"),
    "SQL in the id": (with_(id="'; DROP TABLE counter; --"), ""),
    "path in the id": (with_(id="../admin"), ""),
    "path as agreement": (with_(agreement="../admin"), "unknown_agreement"),
    "CRLF as agreement": (with_(agreement="a\r\n"), "unknown_agreement"),
    "60 KiB agreement": (with_(agreement="a" * 60_000), "unknown_agreement"),
    "unknown escrow": (with_(agreement="", escrow_id="esc_x"), "unknown_agreement"),
    "another's escrow": (with_(escrow_id="esc_b"), "mismatch"),
    "unknown escrow beside it": (with_(escrow_id="esc_x"), "mismatch"),
    "its own escrow": (with_(escrow_id="esc_a"), ""),
    "60 KiB source": (with_(source="s" * 60_000), "malformed"),
    "CRLF in the source": (with_(source="s\r\n"), "malformed"),
    "unknown meter": (with_(meter="gpus"), "unknown_meter"),
    "no meter": (with_(meter=""), "unknown_meter"),
    "CRLF in the meter": (with_(meter="tokens\r\n"), "unknown_meter"),
    "meter that the plan does not price": (with_(meter="unpriced"), "unknown_meter"),
    "no rate": (with_(agreement="b"), "no_rate"),
    "no rate for the value": (with_(agreement="b", dimensions={"kind": "x"}), "no_rate"),
    "unknown type": (with_(type="meterd.milestone"), "unknown_type"),
    "CRLF in the type": (with_(type="x\r\n" * 99), "unknown_type"),
    "33 dimensions": (with_(dimensions={f"d{n}": "" for n in range(33)}), "malformed"),
    "32 dimensions": (with_(dimensions={f"d{n}": "" for n in range(32)}), ""),
    "long priced dimension": (with_(dimensions={"kind": "k" * 129}), "malformed"),
    "NUL in a priced dimension": (with_(dimensions={"kind": "\0"}), "malformed"),
    "numbers as dimensions": (with_(dimensions={"kind": 1}), "malformed"),
    "nested dimensions": (with_(dimensions={"kind": {"a": "b"}}), "malformed"),
}

TIMES = {
    "1969": (with_(time="1969-12-31T23:59:59Z"), "late"),
    "year 1": (with_(time="0001-01-01T00:00:00+23:59"), "late"),
    "9999": (with_(time="9999-12-31T23:59:59Z"), "early"),
    "9999 and beyond": (with_(time="9999-12-31T23:59:59-23:59"), "early"),
    "a day ahead": (with_(time=when(NOW + 86_400_000)), "early"),
    "5 minutes ahead": (with_(time=when(NOW + AHEAD_MAX_MS)), ""),
    "5 minutes and a bit ahead": (with_(time=when(NOW + AHEAD_MAX_MS + 1)), "early"),
    "just inside the window": (with_(time=when(NOW - WINDOW)), ""),
    "just outside the window": (with_(time=when(NOW - WINDOW - 1)), "late"),
    "no time zone": (with_(time="2026-11-23T12:00:00"), "malformed"),
    "no time": (with_(time="2026-11-23"), "malformed"),
    "a number": (with_(time=NOW), "malformed"),
    "30 February": (with_(time="2026-02-30T12:00:00Z"), "malformed"),
    "leap second": (with_(time="2026-11-23T12:00:60Z"), "malformed"),
    "null": (with_(time=None), ""),
}

TABLE = {**DOCUMENTS, **IDENTITIES, **TIMES}
TABLE |= {f"quantity {name}": (of(raw), reason) for name, (raw, reason) in QUANTITIES.items()}


@pytest.mark.parametrize(("payload", "reason"), TABLE.values(), ids=TABLE)
def test_delivery_ends_as_one_event_or_one_rejection_with_a_reason(payload, reason):
    """Each row of the table has one verdict."""
    assert [reason] == Till().verdicts([payload])


@pytest.mark.parametrize(("payload", "reason"), TABLE.values(), ids=TABLE)
def test_bad_delivery_does_not_spoil_its_batch(payload, reason):
    """Its neighbours are counted as if it were not there, and its own verdict stays the same."""
    till = Till()
    good = [usage("good 1", 5), usage("good 2", "2.5", dimensions={"kind": "output"})]

    found = till.verdicts([good[0], payload, good[1]])

    assert ["", reason, ""] == found
    assert {5, 2.5} <= {row.quantity / 10**9 for row in till.rows.values()} or reason == ""


def test_whole_table_in_one_batch_gets_the_same_verdicts():
    """Verdicts do not depend on what else is in the batch."""
    payloads = [payload for payload, _ in TABLE.values()]
    ids = {name: number for number, name in enumerate(TABLE)}
    found = Till().verdicts(payloads)

    for name, (_, reason) in TABLE.items():
        # They share an id, so that of the good ones all but one are conflicts or duplicates.
        assert found[ids[name]] in ({"", "conflict"} if reason == "" else {reason}), name


SHIFTERS = {
    "bracket left open": [b'{"id":"e","x":[1', b'2],"agreement":"a"}'],
    "text left open": [b'{"id":"e","x":"', b'","agreement":"a"}'],
    "object left open": [b'{"id":"e","x":{"y":1', b'"z":2}}'],
    "two events in one and half in two": [
        usage("e1") + b",7," + usage("e2"),
        b'{"id":"e","x":[1',
        b'2],"agreement":"a"}',
    ],
    "end of the list": [b'{"id":"e"}]', b'[{"id":"e"}'],
    "nothing": [b"", b""],
    "a guess at the number between": [
        usage("e1") + b",12345," + usage("e2"),
        b'{"id":"e","x":[1',
        b'2],"agreement":"a"}',
    ],
}


@pytest.mark.parametrize("crafted", SHIFTERS.values(), ids=SHIFTERS)
def test_crafted_payloads_do_not_shift_their_neighbours(crafted):
    """Parts that fit together across payloads are still parts."""
    before, after = usage("before", 2), usage("after", 3)
    decoded = EventDecoder(SENTINEL).decode([before, *crafted, after])

    assert len(crafted) + 2 == len(decoded)
    assert ("before", 2) == (decoded[0].id, events.quantity_nanos(decoded[0].quantity) / 10**9)
    assert ("after", 3) == (decoded[-1].id, events.quantity_nanos(decoded[-1].quantity) / 10**9)
    assert all(isinstance(one, Rejection) for one in decoded[1:-1])
    assert list(range(1, len(crafted) + 1)) == [one.index for one in decoded[1:-1]]


_pieces = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b'"id":"q"',
        b"1",
        b"12.5",
        b"\\",
        b" ",
        b"\n",
        usage("p"),
        b",1,",
        b"null",
        b'"x":[',
        b"]}",
        b"\xff",
        b"\x00",
        b'{"id":"q","x":',
    ]
)


@given(st.lists(st.lists(_pieces, max_size=6).map(b"".join), max_size=6))
@example([b'{"id":"q","x":[1', b"2]}"])
@example([])
def test_batch_is_decoded_as_each_payload_alone(payloads):
    """Whatever the neighbours are, a payload means what it means alone."""
    together = EventDecoder(SENTINEL).decode(payloads)
    alone = [EventDecoder(SENTINEL).decode([payload])[0] for payload in payloads]

    assert [_plain(one) for one in alone] == [_plain(one) for one in together]


def _plain(one):
    if isinstance(one, Rejection):
        return one.reason, one.id, one.detail
    try:
        quantity = events.quantity_nanos(one.quantity)
    except events.money.BadNumber:
        quantity = None
    return one.id, one.agreement, quantity


@given(st.binary(max_size=200))
def test_noise_is_never_an_exception(noise):
    """Any bytes decode to an event or a rejection."""
    (one,) = EventDecoder(SENTINEL).decode([noise])

    assert isinstance(one, UsageEvent | Rejection)


def test_rejection_names_the_id_of_its_event_where_there_is_one_to_read():
    """Its producer finds the event by it, cut and escaped."""
    decode = EventDecoder(SENTINEL).decode

    assert "req-1" == decode([b'{"id":"req-1","time":"never"}'])[0].id
    assert "a\\nb" == decode([b'{"id":"a\\nb","time":"never"}'])[0].id
    assert 200 == len(decode([json.dumps({"id": "x" * 999, "time": 1}).encode()])[0].id)
    assert "" == decode([b'{"id":7,"time":"never"}'])[0].id


def test_large_batch_of_small_events_is_decoded_together():
    """The limit is one of each event, not of the batch."""
    payloads = [usage(f"e{n}") for n in range(2_000)]

    decoded = EventDecoder(SENTINEL).decode(payloads)

    assert sum(map(len, payloads)) > EVENT_BYTES_MAX
    assert [f"e{n}" for n in range(2_000)] == [event.id for event in decoded]


def test_reasons_are_the_words_that_people_see():
    """Metrics, dead letters and answers show the values."""
    assert "unknown_meter" == str(Reason.UNKNOWN_METER)


class Told(EventDecoder):
    """A decoder that tells how often it had to read one by one."""

    def __init__(self):
        super().__init__(SENTINEL)
        self.alone = 0

    def _alone(self, index, payload):
        self.alone += 1
        return super()._alone(index, payload)


@pytest.mark.parametrize(
    "batch",
    [
        [usage("a")],
        [usage("a"), usage("b")],
        [usage(str(number)) for number in range(7)],
        [usage("a", 1), usage("b", 1.5), usage("c", "2")],
        [usage("a").ljust(EVENT_BYTES_MAX), usage("b")],
        [usage("a").ljust(EVENT_BYTES_MAX)],
    ],
)
def test_good_batch_is_decoded_at_once(batch):
    """The promise of the fast way: a good batch never pays for the possibility of a bad one."""
    decoder = Told()

    assert len(batch) == len(decoder.decode(batch))
    assert 0 == decoder.alone


def test_batch_of_whole_numbers_costs_one_pass():
    """The exact decoder, which keeps each quantity's text, is not needed for them."""
    (whole, more) = EventDecoder(SENTINEL).decode([usage("a"), usage("b")])
    (exact,) = EventDecoder(SENTINEL).decode([usage("a", 1.5)])

    assert {UsageEvent} == {type(whole), type(more)}
    assert UsageEvent is not type(exact)


def test_bad_event_is_decoded_alone_with_its_neighbours():
    """One by one, and each once."""
    decoder = Told()
    decoder.decode([usage("a"), b"{", usage("b")])

    assert 3 == decoder.alone


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (
            b" " * (EVENT_BYTES_MAX + 1),
            Rejection(0, "", Reason.TOO_LARGE, "65537 bytes; an event may have 65536"),
        ),
        (
            b'{"x":' + b"[" * 60_000,
            Rejection(0, "", Reason.MALFORMED, "it is nested too deeply"),
        ),
        (b"{", Rejection(0, "", Reason.MALFORMED, "no JSON: it breaks off before its end")),
    ],
)
def test_rejection_says_in_these_words_what_is_wrong(payload, expected):
    """They stand in answers and dead letters."""
    assert [expected] == EventDecoder(SENTINEL).decode([payload])


@pytest.mark.parametrize(
    ("quantity", "said"),
    [
        (0, "a quantity must be greater than 0 and at most 1e15"),
        (10**15 + 1, "a quantity must be greater than 0 and at most 1e15"),
        ("", "there is no quantity"),
        (msgspec.Raw(b'"\xa4"'), "a text that is no UTF-8"),
        (msgspec.Raw(b"1e3"), "not a plain decimal such as 12 or 0.000001"),
        (msgspec.Raw(b"1\xa4"), "not a plain decimal such as 12 or 0.000001"),
    ],
)
def test_quantity_is_refused_with_these_words(quantity, said):
    """They stand in answers and dead letters."""
    with pytest.raises(BadNumber) as refused:
        events.quantity_nanos(quantity)

    assert said == str(refused.value)


def test_name_is_too_long_from_one_character_more_on():
    """The limit itself is in."""
    assert "" == events.name_flaw("x" * 5, "the meter", 5)
    assert "the meter has 6 characters; 5 are allowed" == events.name_flaw("x" * 6, "the meter", 5)
    assert "the meter has control characters" == events.name_flaw("\n", "the meter", 5)


def test_text_from_outside_is_escaped_only_where_it_must_be():
    """A letter that is no ASCII stays as it is; a line's end becomes two characters."""
    assert "é" == events.printable("é")
    assert "a\\n" == events.printable("a\nb", 3)


@pytest.mark.parametrize(
    ("quantity", "nanos"),
    [
        (0, 0),
        ("0", 0),
        ("0.0000000000", 0),
        (1, money.NANOS),
        ("0.000000001", 1),
        (msgspec.Raw(b"2.5"), 5 * money.NANOS // 2),
    ],
)
def test_zero_in_the_data_of_a_typed_event_is_zero(quantity, nanos):
    """It says that there was nothing; any other number is read as a quantity is."""
    assert events.data_nanos(quantity) == nanos


@pytest.mark.parametrize("quantity", [-1, "", "-0", "0.0000000001", "0e0", "x"])
def test_what_is_no_number_in_the_data_of_a_typed_event_is_refused(quantity):
    """As it is in a bare event."""
    with pytest.raises(BadNumber):
        events.data_nanos(quantity)


def test_largest_quantity_is_taken_in_either_spelling():
    """And not by one more."""
    largest = money.QUANTITY_MAX

    assert largest * money.NANOS == events.quantity_nanos(largest)
    assert largest * money.NANOS == events.quantity_nanos(str(largest))
    for more in (largest + 1, str(largest + 1)):
        with pytest.raises(BadNumber, match="at most 1e15"):
            events.quantity_nanos(more)


@pytest.mark.parametrize(
    ("score", "nanos"),
    [
        (0, 0),
        (1, money.NANOS),
        ("0", 0),
        ("0.000000001", 1),
        ("1.0", money.NANOS),
        (msgspec.Raw(b"0.5"), money.NANOS // 2),
        (msgspec.Raw(b'"0.75"'), 3 * money.NANOS // 4),
    ],
)
def test_score_is_read_from_0_to_1_in_each_spelling(score, nanos):
    """Both ends belong to it; 0 is a score, and none is none."""
    assert nanos == events.score_nanos(score)


@pytest.mark.parametrize(
    ("score", "text"),
    [
        ("", "there is no score"),
        (msgspec.Raw(b""), "there is no score"),
        (2, "a score is from 0 to 1"),
        ("1.000000001", "a score is from 0 to 1"),
        (-1, "not a plain decimal such as 12 or 0.000001"),
        ("0.0000000001", "more than 9 decimals"),
        (msgspec.Raw(b"1e-3"), "not a plain decimal such as 12 or 0.000001"),
    ],
)
def test_score_that_is_none_is_refused_in_these_words(score, text):
    """What is outside is no better than the best, nor worse than the worst."""
    with pytest.raises(BadNumber) as caught:
        events.score_nanos(score)

    assert text == str(caught.value)
