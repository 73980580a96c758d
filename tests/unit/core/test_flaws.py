"""Every word of the decoder that a person would not understand, said anew."""

from __future__ import annotations

import msgspec
import pytest

from meterd.core import events
from meterd.core.flaws import json_flaw

SAID: dict[bytes, str] = {
    # Something else than an event.
    b"null": "an event: it must be an object, and is null",
    b"[]": "an event: it must be an object, and is a list",
    b"17": "an event: it must be an object, and is a number",
    b"1.5": "an event: it must be an object, and is a number with a point",
    b"true": "an event: it must be an object, and is true or false",
    b'"x"': "an event: it must be an object, and is a text",
    # A field of another type.
    b'{"id": 1}': "id: it must be a text, and is a number",
    b'{"id": null}': "id: it must be a text, and is null",
    b'{"id": {}}': "id: it must be a text, and is an object",
    b'{"dimensions": []}': "dimensions: it must be an object, and is a list",
    b'{"dimensions": {"a": 1}}': "dimensions, a value of it: it must be a text, and is a number",
    b'{"price": 0.5}': (
        'price: it must be a whole number or a text such as "0.5", and is a number with a point'
    ),
    b'{"time": 5}': "time: it must be a text such as 2026-11-23T12:00:00Z, and is a number",
    b'{"time": "x"}': "time: write a time with its zone, such as 2026-11-23T12:00:00Z",
    b'{"time": "2026-11-23T12:00:00"}': (
        "time: write a time with its zone, such as 2026-11-23T12:00:00Z"
    ),
    # No JSON.
    b"": "no JSON: it breaks off before its end",
    b'{"id": "x': "no JSON: it breaks off before its end",
    b'{"quantity": NaN}': "no JSON: invalid character at byte 13: NaN}",
    b'{"id" "x"}': "no JSON: expected ':' at byte 6: \"x\"}",
    b'{"id": "x"}{"id": "y", "meter": "tokens"}': (
        'no JSON: trailing characters at byte 12: "id": "y", "meter": '
    ),
    b'{"id": "x\x00"}': 'no JSON: invalid character at byte 9: \x00"}',
    b'{"id": "\xff"}': "a text in it is not valid UTF-8",
    b'{"x": "\xe9\xff", "id" 5}': "no JSON: expected ':' at byte 17: 5}",
    b"{" + b'"x":[' * 1 + b"[" * 60_000: "it is nested too deeply",
    b"9" * 5000: "a number in it has too many digits",
    # What programs send by mistake, whatever is behind it.
    b"\xef\xbb\xbf{}": "it begins with a byte order mark; send plain UTF-8",
    b"\xff\xfe{\x00": "it begins with a byte order mark; send plain UTF-8",
    b"\xfe\xff\x00{": "it begins with a byte order mark; send plain UTF-8",
    b"\x1f\x8b\x08\x00": "it is compressed (gzip); send it as it is",
}


def _error(document: bytes) -> Exception:
    try:
        msgspec.json.decode(document, type=events._RawEvent)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return error
    raise AssertionError("it can be read")


@pytest.mark.parametrize("document", SAID, ids=lambda document: repr(document[:30]))
def test_person_is_told_in_these_words_what_is_wrong(document):
    """The field or the place, what is there, and what is wanted."""
    assert SAID[document] == json_flaw(_error(document), document)


def test_unknown_words_of_the_decoder_are_passed_on():
    """A later version may say something new: better its words than none."""
    assert "Something new" == json_flaw(msgspec.DecodeError("Something new"), b"{}")
    said = json_flaw(msgspec.ValidationError("Expected `bytes`, got `ext` - at `$.data`"), b"{}")

    assert "data: it must be bytes, and is ext" == said
    said = json_flaw(msgspec.ValidationError("Expected `array | null`, got `str` - at `$.x`"), b"")

    assert "x: it must be a list or null, and is a text" == said


def test_what_is_no_event_is_called_by_its_name():
    """Or by none, where the sentence has named it before."""
    error = _error(b"[]")

    assert "the body: it must be an object, and is a list" == json_flaw(error, b"[]", "the body")
    assert "it must be an object, and is a list" == json_flaw(error, b"[]", "")


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    limit: int | str | None = None


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"{}", "id is missing"),
        (b'{"id": "x", "colour": 1}', "there is no field colour here"),
        (
            b'{"id": "x", "limit": true}',
            'limit: it must be a whole number or a text such as "0.5", and is true or false',
        ),
    ],
)
def test_strict_reader_names_the_field(document, said):
    """Commands are read so: what is misspelt is told."""
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.json.decode(document, type=_Strict)

    assert said == json_flaw(refused.value, document)


def test_place_behind_the_end_shows_no_excerpt():
    """There is nothing to show, nor among blanks."""
    error = msgspec.DecodeError("JSON is malformed: invalid character (byte 9)")

    assert "no JSON: invalid character at byte 9" == json_flaw(error, b"{}")
    assert "no JSON: invalid character at byte 9" == json_flaw(error, b"{}".ljust(30))
