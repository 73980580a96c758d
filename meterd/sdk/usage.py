"""A usage event as the SDK writes it: made once, with its id and its time, and never changed.

The rule kept here: what meterd would refuse for its form is refused where it is told, as long as
the program can still be corrected; and a quantity is exact, or no quantity.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec

from meterd.core.money import NANOS, QUANTITY_DECIMALS, QUANTITY_MAX, BadNumber, parse_scaled
from meterd.core.money import format_quantity as text_of_nanos
from meterd.sdk.failures import BadUsage

Quantity = int | str | Decimal

EVENT_BYTES_MAX = 64 * 1024  # As meterd has it.
ID_CHARS_MAX = 256
NAME_CHARS_MAX = 128
DIMENSIONS_MAX = 32
HOW = 'write an int, a Decimal or a decimal text, such as 12 or "0.25"'
DIGITS_MAX = 64

__all__ = ["Quantity", "Rejected", "encode", "event_of", "nanos_of", "new_id", "text_of_nanos"]


@dataclass(frozen=True, slots=True)
class Rejected:
    """One event that meterd, or the meter itself, did not take for usage.

    id      the event's.
    reason  meterd's word, such as "unknown_meter" or "late": it is kept as a dead letter, for a
            person; "not_sent": it is in `event` and nowhere else.
    detail  a sentence.
    event   the event as it was sent.
    """

    id: str
    reason: str
    detail: str
    event: dict[str, Any]


_last_ms = 0
_ids = threading.Lock()


def new_id() -> str:
    """A new id: 48 bits of wall ms, never smaller than the one before, and 80 random bits, in hex.

    Such ids sort by time, which costs meterd's index least, and nobody makes the same one twice.
    """
    global _last_ms  # noqa: PLW0603  # One clock for all meters of a process.
    with _ids:
        _last_ms = max(_last_ms, time.time_ns() // 1_000_000)
        return f"{_last_ms:012x}{secrets.token_hex(10)}"


def nanos_of(quantity: object) -> int:
    """Read a quantity from 0 to 1e15 with at most 9 decimals as nanos. Raises `BadUsage`."""
    if type(quantity) is int:
        if 0 <= quantity <= QUANTITY_MAX:
            return quantity * NANOS
        raise BadUsage("a quantity is from 0 to 1e15")
    if isinstance(quantity, Decimal):
        return _of_decimal(quantity)
    if not isinstance(quantity, str):
        kind = type(quantity).__name__
        raise BadUsage(f"a quantity of type {kind} is not exact or no quantity: {HOW}")
    try:
        nanos = parse_scaled(quantity, QUANTITY_DECIMALS)
    except BadNumber as error:
        raise BadUsage(f"a quantity: {error}: {HOW}") from None
    if nanos > QUANTITY_MAX * NANOS:
        raise BadUsage("a quantity is from 0 to 1e15")
    return nanos


def _of_decimal(quantity: Decimal) -> int:
    if not quantity.is_finite() or quantity < 0 or quantity > QUANTITY_MAX:
        raise BadUsage("a quantity is from 0 to 1e15")
    # Before any arithmetic: an exponent of a million would be worked out digit by digit.
    if len(quantity.as_tuple().digits) > DIGITS_MAX or quantity.adjusted() < -DIGITS_MAX:
        raise BadUsage(f"a quantity has at most {QUANTITY_DECIMALS} decimals")
    numerator, denominator = quantity.as_integer_ratio()
    nanos, rest = divmod(numerator * NANOS, denominator)
    if rest:
        raise BadUsage(f"a quantity has at most {QUANTITY_DECIMALS} decimals")
    return nanos


def event_of(
    agreement: str,
    meter: str,
    quantity: Quantity,
    *,
    dimensions: Mapping[str, str] | None,
    id: str | None,  # noqa: A002  # Its name in the event.
    time: datetime | None,
    hold: str,
    price: Quantity | None,
    value: str,
) -> dict[str, Any]:
    """Make an event. Raises `BadUsage`."""
    nanos = nanos_of(quantity)
    if nanos == 0:
        raise BadUsage("a quantity of 0 is no usage; tell of what was used")
    event: dict[str, Any] = {
        "agreement": _name(agreement, "agreement", NAME_CHARS_MAX),
        "meter": _name(meter, "meter", NAME_CHARS_MAX),
        "quantity": text_of_nanos(nanos),
    }
    if id is not None:
        event["id"] = id
    if time is not None:
        event["time"] = _moment(time)
    if dimensions:
        event["dimensions"] = _dimensions(dimensions)
    if price is not None:
        event["price"] = str(price)
    if hold:
        event["hold"] = _name(hold, "hold", NAME_CHARS_MAX)
    if value:
        event["value"] = value
    return event


def completed(event: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Give an event its id, its time and its source where it has none. Raises `BadUsage`."""
    own = dict(event)
    own["id"] = _name(own["id"], "id", ID_CHARS_MAX) if "id" in own else new_id()
    own.setdefault("time", _moment(datetime.now(UTC)))
    if source:
        own.setdefault("source", source)
    return own


def encode(event: Mapping[str, Any]) -> bytes:
    """Write an event as the line that is kept and sent. Raises `BadUsage`."""
    try:
        payload = msgspec.json.encode(event)
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise BadUsage(f"the event is no JSON: {error}") from None
    if len(payload) > EVENT_BYTES_MAX:
        raise BadUsage(f"the event has {len(payload)} bytes; meterd takes {EVENT_BYTES_MAX}")
    return payload


def _moment(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise BadUsage("time: give it a time zone, such as datetime.now(UTC)")
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _name(text: object, what: str, chars_max: int) -> str:
    if not isinstance(text, str) or not 0 < len(text) <= chars_max or not text.isprintable():
        raise BadUsage(f"{what}: 1 to {chars_max} printable characters")
    return text


def _dimensions(dimensions: Mapping[str, str]) -> dict[str, str]:
    if len(dimensions) > DIMENSIONS_MAX:
        raise BadUsage(f"at most {DIMENSIONS_MAX} dimensions")
    for name, value in dimensions.items():
        _name(name, "a dimension's name", NAME_CHARS_MAX)
        if value != "":
            _name(value, f"the dimension {name}", NAME_CHARS_MAX)
    return dict(dimensions)
