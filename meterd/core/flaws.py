"""What is wrong with a JSON document, in words for the person who reads a dead letter.

The decoder speaks to programmers ("Expected `str`, got `int` - at `$.id`"). The rule kept here: a
sentence names the field or the place, and says what stands there and what is wanted. What the
decoder may say besides is passed on as it is. An excerpt may hold anything: whoever shows a
sentence cuts and escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

EXCERPT_BYTES = 20
TIME_EXAMPLE = "2026-11-23T12:00:00Z"

_MARK = "it begins with a byte order mark; send plain UTF-8"
# What programs send that compress their bodies, or write texts as Windows does.
_BEGINNINGS: Mapping[bytes, str] = {
    b"\xef\xbb\xbf": _MARK,
    b"\xff\xfe": _MARK,
    b"\xfe\xff": _MARK,
    b"\x1f\x8b": "it is compressed (gzip); send it as it is",
}
_FOUND: Mapping[str, str] = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number with a point",
    "int": "a number",
    "object": "an object",
    "str": "a text",
}
_WANTED: Mapping[str, str] = {
    **_FOUND,
    "int | str": 'a whole number or a text such as "0.5"',
    "datetime | null": f"a text such as {TIME_EXAMPLE}",
}
_SYNTAX = re.compile(r"JSON is malformed: (.+) \(byte ([0-9]+)\)")
_TYPE = re.compile(r"Expected `(.+)`, got `(.+?)`(?: - at `\$\.?(.*)`)?")
_TIME = re.compile(r"(Invalid RFC3339|Expected `datetime` with a timezone).+ - at `\$\.?(.+)`")


def json_flaw(error: Exception, document: bytes) -> str:
    """Say why a document cannot be read; `error` is what the decoder raised over it."""
    for beginning, words in _BEGINNINGS.items():
        if document.startswith(beginning):
            return words
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "a text in it is not valid UTF-8"
    return _said(str(error), document)


def _said(text: str, document: bytes) -> str:
    if text == "Input data was truncated":
        return "no JSON: it breaks off before its end"
    if text == "Number out of range":
        return "a number in it has too many digits"
    if syntax := _SYNTAX.fullmatch(text):
        place = int(syntax[2])
        return f"no JSON: {syntax[1]} at byte {place}{_excerpt(document, place)}"
    if time := _TIME.fullmatch(text):
        return f"{time[2]}: write a time with its zone, such as {TIME_EXAMPLE}"
    if wrong := _TYPE.fullmatch(text):
        where = wrong[3].replace("[...]", ", a value of it") if wrong[3] else "an event"
        wanted = _WANTED.get(wrong[1], wrong[1])
        return f"{where}: it must be {wanted}, and is {_FOUND.get(wrong[2], wrong[2])}"
    return text


def _excerpt(document: bytes, place: int) -> str:
    """What stands at a place, so that it can be found without counting."""
    found = document[place : place + EXCERPT_BYTES].decode("utf-8", "replace")
    return f": {found}" if found.strip() else ""
