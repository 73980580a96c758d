"""Reading what a service sends: bytes in, exact figures and short texts out.

The rule kept here: nothing is trusted and nothing is rounded. A body has at most 64 KiB, 8 levels
and numbers of at most 24 characters; no number ever becomes a float, and no text of a service
reaches a log without passing `Mask`. What a figure means is in `outcomes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from meterd.core.money import AMOUNT_DIGITS_MAX, MICROS

BODY_BYTES_MAX = 64 * 1024
DEPTH_MAX = 8
NUMBER_CHARS_MAX = 24  # A double needs 24 at most: sign, 17 digits, point, exponent.
EXCERPT_CHARS_MAX = 200

AMOUNT_MAX: int = 10**AMOUNT_DIGITS_MAX * MICROS

# The names under which live services were seen to give each figure, the likeliest first.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "escrow": ("escrow_id", "id", "escrowId"),
    "total": ("amount", "amount_usd", "amount_usdc"),
    "released": ("released", "released_amount", "amount_released"),
    "released_total": ("released_total", "total_released"),
    "remaining": ("remaining", "remaining_amount"),
    "refunded": ("refunded", "refunded_amount", "amount_refunded"),
    "gross": ("gross_amount", "amount_gross", "gross"),
    "currency": ("currency", "asset"),
    "provider": ("to_agent_id", "provider", "provider_id", "payee"),
    "creator": ("from_agent_id", "creator", "creator_id", "payer"),
    "deadline": ("auto_release_at", "deadline", "expires_at"),
    "created": ("created_at", "createdAt", "created"),
    # Of a wallet.
    "payer": ("agent_id", "agentId", "from_agent_id", "payer"),
    "balance": ("balance", "available", "available_balance"),
    "debited": ("debited", "debited_total", "total_debited"),
}
WRAPPERS = ("escrow", "wallet", "data")  # Some services put the document one level down.


@dataclass(frozen=True, slots=True)
class Received:
    """What came back: a head, and what could be read of the body; `flaw`: why not all of it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    flaw: str = ""


class Nonsense(ValueError):
    """The answer cannot be read.

    The message says why and never repeats it. Does not leave this package.
    """


class Number(str):
    """A JSON number as the characters that came: it has not been a float and never becomes one."""

    __slots__ = ()


class Mask:
    """Makes texts of the service fit for logs: short, printable, without a part of the key."""

    # Twelve characters in a row are no coincidence; shorter parts of a key of usual length open
    # nothing.
    _PART_CHARS = 12
    _SCANNED_CHARS = 4096
    _LOOKS_SECRET = re.compile(r"(?i)\bbearer\s+\S+|\bpf_(live|test)_[\w-]*")

    def __init__(self, key: str) -> None:
        self._key = key.lower()
        self._width = min(self._PART_CHARS, len(key))
        starts = range(len(key) - self._width + 1) if key else ()
        self._parts = frozenset(self._key[start : start + self._width] for start in starts)

    def excerpt(self, text: str) -> str:
        """At most 200 printable characters of `text`, with `***` for what belongs to the key."""
        text = self._LOOKS_SECRET.sub("***", self._without_key(text[: self._SCANNED_CHARS]))
        printable = "".join(char if char.isprintable() else " " for char in text)
        printable = " ".join(printable.split())
        if len(printable) <= EXCERPT_CHARS_MAX:
            return printable
        return printable[: EXCERPT_CHARS_MAX - 1] + "…"

    def _without_key(self, text: str) -> str:
        if not self._parts:
            return text
        # Some capital letters change their length when lowered; then the whole text is not worth
        # the risk.
        lowered = text.lower()
        if len(lowered) != len(text):
            text = lowered
        pieces, position, hidden_to = [], 0, 0
        while position < len(text):
            if lowered[position : position + self._width] in self._parts:
                if position >= hidden_to:
                    pieces.append("***")
                hidden_to = position + self._width
            elif position >= hidden_to:
                pieces.append(text[position])
            position += 1
        return "".join(pieces)


# --------------------------------------------------------------------------------------------------
# Fields


def unwrapped(document: Mapping[str, object], name: str) -> Mapping[str, object]:
    """The body that has a `name` (`escrow`, `payer`): this one, or what it wraps."""
    if named_text(document, name) is not None:
        return document
    for wrapper in WRAPPERS:
        inner = document.get(wrapper)
        if isinstance(inner, dict) and inner:
            return unwrapped(inner, name)
    return document


def named_text(body: Mapping[str, object], field: str) -> str | None:
    """The first text, or number as text, under a field's names; None: there is none."""
    for name in FIELDS[field]:
        value = body.get(name)
        if isinstance(value, str) and value and value.isprintable():
            return str(value)
    return None


def named_money(body: Mapping[str, object], field: str) -> int | None:
    """Micros under a field's names, which must agree.

    `true` and `null` are no figures. Raises `Nonsense`.
    """
    values = (body.get(name) for name in FIELDS[field])
    return agreed(field, *(read_money(value) for value in values if isinstance(value, str)))


def agreed(field: str, *figures: int | None) -> int | None:
    """The one figure that all agree on; None: there is none. Raises `Nonsense`."""
    known = {figure for figure in figures if figure is not None}
    if len(known) > 1:
        raise Nonsense(f"the body has two figures for {field}")
    return next(iter(known), None)


_MONEY = re.compile(r"(-?)([0-9]+)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]{1,2}))?\Z", re.ASCII)
_NOISE_DENOMINATOR = 1000  # A thousandth of a micro, 1e-9 USDC.


def read_money(text: str) -> int:
    """Read an amount as the service writes it, as micros. Raises `Nonsense`.

    Floats of other people leave noise (14.850000000000001, -1.7e-15): what is nearer than 1e-9 USDC
    to a whole micro is that micro. Anything between two micros is nonsense: USDC has none of it.
    """
    match = _MONEY.match(text) if len(text) <= NUMBER_CHARS_MAX else None
    if match is None:
        raise Nonsense("an amount is no plain number")
    sign, whole, fraction, exponent = match.groups(default="")
    power = int(exponent or "0") - len(fraction)
    scaled = int(whole + fraction) * MICROS * _ten_to(power)
    unit = _ten_to(-power)
    micros: int = (2 * scaled + unit) // (2 * unit)
    if abs(scaled - micros * unit) * _NOISE_DENOMINATOR > unit:
        raise Nonsense("an amount has more than 6 decimals")
    if sign and micros:
        raise Nonsense("an amount is below 0")
    if micros >= AMOUNT_MAX:
        raise Nonsense("an amount is too large to be true")
    return micros


def _ten_to(power: int) -> int:
    """Ten to a power; 1 for those below 0."""
    return int("1" + "0" * max(power, 0))


# --------------------------------------------------------------------------------------------------
# Documents


def error_text(received: Received) -> str | None:
    """The documented error of an answer, code and message; None: there is none.

    Not masked; never raises.
    """
    return documented_error(try_document(received)[0])


def documented_error(document: Mapping[str, object]) -> str | None:
    """The error as the contract documents it, for people; None: this is not one."""
    error, message = document.get("error"), document.get("message")
    if isinstance(error, dict):
        code, message = error.get("code"), error.get("message")
        error = code if isinstance(code, str) else message
    if not isinstance(error, str) or not error.strip():
        return None
    return f"{error}: {message}" if isinstance(message, str) and message != error else error


def try_document(received: Received) -> tuple[Mapping[str, object], str]:
    """The body's object, or an empty one and why there is none."""
    try:
        return object_of(received), ""
    except Nonsense as error:
        return {}, str(error)


def object_of(received: Received) -> Mapping[str, object]:
    """The body's object. Raises `Nonsense`."""
    document = json_of(received)
    if not isinstance(document, dict):
        raise Nonsense("the body is no JSON object")
    return document


def json_of(received: Received) -> object:
    """The body as JSON within the limits, numbers as `Number`. Raises `Nonsense`."""
    if received.flaw:
        raise Nonsense(received.flaw)
    if len(received.body) > BODY_BYTES_MAX:
        raise Nonsense("the body is longer than 64 KiB")
    if not received.body.strip():
        raise Nonsense("the body is empty")
    _check_depth(received.body)
    try:
        return json.loads(
            received.body.decode("utf-8"),
            parse_float=_number,
            parse_int=_number,
            parse_constant=_no_constant,
            object_pairs_hook=_object,
        )
    except Nonsense:
        raise
    except ValueError as error:
        raise Nonsense("the body is no JSON") from error


# A string without an end runs to the end of the body, so that this stays linear.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _check_depth(body: bytes) -> None:
    """Refuse deep nesting before the decoder recurses into it."""
    depth = 0
    for bracket in _STRING.sub(b"", body).translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH_MAX:
            raise Nonsense(f"the body is nested deeper than {DEPTH_MAX}")


def _number(text: str) -> Number:
    if len(text) > NUMBER_CHARS_MAX:
        raise Nonsense(f"the body has a number of more than {NUMBER_CHARS_MAX} characters")
    return Number(text)


def _no_constant(_: str) -> NoReturn:
    raise Nonsense("the body has NaN or Infinity for a number")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Two values under one name are two answers: which one counts is not for us to guess."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Nonsense("the body has one name twice")
    return made
