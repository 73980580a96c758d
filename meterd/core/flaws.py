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
_WANTED: Mapping[str, str] = {  # Where more can be said than what kind of value it is.
    "int | str": 'a whole number or a text such as "0.5"',
    "int | str | null": 'a whole number or a text such as "0.5"',
    "datetime | null": f"a text such as {TIME_EXAMPLE}",
}
_WHOLE: Mapping[str, str] = {
    "Input data was truncated": "no JSON: it breaks off before its end",
    "Number out of range": "a number in it has too many digits",
}
_NAMED: Mapping[re.Pattern[str], str] = {
    re.compile(r"Object missing required field `(.+?)`.*"): "{0} is missing",
    re.compile(r"Object contains unknown field `(.+?)`.*"): "there is no field {0} here",
    re.compile(r"(?:Invalid RFC3339|Expected `datetime` with a timezone).+ - at `\$\.?(.+)`"): (
        f"{{0}}: write a time with its zone, such as {TIME_EXAMPLE}"
    ),
}
_SYNTAX = re.compile(r"JSON is malformed: (.+) \(byte ([0-9]+)\)")
_TYPE = re.compile(r"Expected `(.+)`, got `(.+?)`(?: - at `\$\.?(.*)`)?")


def json_flaw(error: Exception, document: bytes, what: str = "an event") -> str:
    """Say why a document cannot be read; `error` is what the decoder raised over it.

    `what` should have been there, where something else than an object is; "" names nothing.
    """
    for beginning, words in _BEGINNINGS.items():
        if document.startswith(beginning):
            return words
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "a text in it is not valid UTF-8"
    return _said(str(error), document, what)


def _said(text: str, document: bytes, what: str) -> str:
    for pattern, words in _NAMED.items():
        if named := pattern.fullmatch(text):
            return words.format(named[1])
    if syntax := _SYNTAX.fullmatch(text):
        at = int(syntax[2])
        return f"no JSON: {syntax[1]} at byte {at}{_excerpt(document, at)}"
    if wrong := _TYPE.fullmatch(text):
        place = wrong[3].replace("[...]", ", a value of it") if wrong[3] else what
        kinds = [_FOUND.get(kind, kind) for kind in wrong[1].split(" | ")]
        wanted = _WANTED.get(wrong[1], " or ".join(kinds))
        found = _FOUND.get(wrong[2], wrong[2])
        return f"{place}{': ' if place else ''}it must be {wanted}, and is {found}"
    return _WHOLE.get(text, text)


def _excerpt(document: bytes, at: int) -> str:
    """What stands at a place, so that it can be found without counting."""
    found = document[at : at + EXCERPT_BYTES].decode("utf-8", "replace")
    return f": {found}" if found.strip() else ""
