"""Usage events as they arrive, their reading by rule, and why a delivery may accrue nothing.

A whole batch is joined into one JSON array and decoded by one typed call. Only when that call
refuses is the batch decoded one by one, so that a bad event never spoils its batch and a good batch
never pays for the possibility.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import msgspec

from meterd.core import money
from meterd.core.flaws import json_flaw

EVENT_BYTES_MAX = 64 * 1024
ID_CHARS_MAX = 256
NAME_CHARS_MAX = 128
DIMENSIONS_MAX = 32
NO_DATA = msgspec.Raw(b"")


class Reason(enum.StrEnum):
    """Why a delivery accrues nothing. The values are seen in metrics, dead letters and answers."""

    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    BAD_QUANTITY = "bad_quantity"
    NO_ID = "no_id"
    UNKNOWN_TYPE = "unknown_type"
    UNKNOWN_AGREEMENT = "unknown_agreement"
    UNKNOWN_METER = "unknown_meter"
    NO_RATE = "no_rate"
    CLOSED = "closed"
    REACHED = "reached"  # A tranche or an outcome that was there before, under another id.
    OUT_OF_ORDER = "out_of_order"
    BAD_SIGNATURE = "bad_signature"
    NOT_ALLOWED = "not_allowed"  # Its sender may not send it, or is nobody who is known.
    OVER_CAP = "over_cap"  # More than the agreement may accrue in one event, minute, day or life.
    BAD_PRICE = "bad_price"
    UNKNOWN_EVENT = "unknown_event"  # Nothing that a `meterd.void` could take back.
    CONFLICT = "conflict"
    LATE = "late"
    EARLY = "early"
    MISMATCH = "mismatch"
    RETAINED = "retained"
    QOS = "qos"


@dataclass(frozen=True, slots=True)
class Rejection:
    """One delivery that accrues nothing: its place in the batch, its id if readable, and why."""

    index: int
    id: str
    reason: Reason
    detail: str


class UsageEvent(msgspec.Struct, gc=False, omit_defaults=True):
    """One usage event in bare JSON, after decoding and before it is known to be good.

    `quantity` is as it came: `quantity_nanos` reads it. `time` is aware, or None for "on arrival".
    `value` is what a meter of `unique` values looks at, `price` what a dynamic rate charges a unit
    of the quantity, in USDC. `hold` is the reservation that this usage captures. `voids`, `name`,
    `score` and `signature` belong to the special types.

    The last fields are those of a CloudEvent that a bare event does not have; `meterd.core.feeds`
    brings them to the others. `sequence` is the producer's own number of the event.
    """

    id: str = ""
    source: str = ""
    agreement: str = ""
    escrow_id: str = ""
    meter: str = ""
    quantity: int | str = ""
    time: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    dimensions: dict[str, str] = {}
    type: str = ""
    value: str = ""
    price: int | str = ""
    voids: str = ""
    name: str = ""
    score: int | str = ""
    hold: str = ""
    signature: str = ""
    specversion: str = ""
    subject: str | None = ""  # What a CloudEvent leaves out may be null, too.
    datacontenttype: str | None = ""
    data: msgspec.Raw = NO_DATA
    data_base64: str | None = ""
    sequence: int | str = ""


class _RawEvent(UsageEvent, gc=False):
    """The same event with the texts of its numbers, which may be JSON numbers with a point."""

    quantity: msgspec.Raw = msgspec.Raw(b"")  # type: ignore[assignment]
    score: msgspec.Raw = msgspec.Raw(b"")  # type: ignore[assignment]


Decoded = UsageEvent | Rejection


class EventDecoder:
    """Reads batches of bare JSON.

    Payloads of different producers stand in one array, so a crafted payload (half an object here,
    two there) could shift its neighbours' places. A number that nobody outside can know is put
    between them: a batch in which it does not come back at every second place is read one by one
    instead.
    """

    def __init__(self, sentinel: int) -> None:
        self._sentinel = sentinel
        self._separator = b",%d," % sentinel
        self._fast = msgspec.json.Decoder(list[UsageEvent | int])
        self._exact = msgspec.json.Decoder(list[_RawEvent | int])
        self._one = msgspec.json.Decoder(_RawEvent)
        self._fields = msgspec.json.Decoder(dict[str, msgspec.Raw])

    def decode(self, payloads: Sequence[bytes]) -> Sequence[Decoded]:
        """Decode payloads, in order: each is a `UsageEvent` or a `Rejection` that says why."""
        if sum(map(len, payloads)) <= EVENT_BYTES_MAX or max(map(len, payloads)) <= EVENT_BYTES_MAX:
            for decoder in (self._fast, self._exact):
                events = self._together(decoder, payloads)
                if events is not None:
                    return events
        return [self._alone(index, payload) for index, payload in enumerate(payloads)]

    def _together(
        self,
        decoder: msgspec.json.Decoder[list[UsageEvent | int]]
        | msgspec.json.Decoder[list[_RawEvent | int]],
        payloads: Sequence[bytes],
    ) -> list[UsageEvent] | None:
        joined = b"[" + self._separator.join(payloads) + b"]"
        try:
            items = decoder.decode(joined)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            return None
        between = items[1::2]
        if len(items) != 2 * len(payloads) - 1 or between.count(self._sentinel) != len(between):
            return None
        events = items[::2]
        if int in set(map(type, events)):
            return None
        # The line above has seen that no number is among them.
        return events  # type: ignore[return-value]

    def _alone(self, index: int, payload: bytes) -> Decoded:
        if len(payload) > EVENT_BYTES_MAX:
            detail = f"{len(payload)} bytes; an event may have {EVENT_BYTES_MAX}"
            return Rejection(index, "", Reason.TOO_LARGE, detail)
        try:
            return self._one.decode(payload)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            flaw = printable(json_flaw(error, payload))
            return Rejection(index, self._id(payload), Reason.MALFORMED, flaw)

    def _id(self, payload: bytes) -> str:
        """Read the id of an event whose other fields are wrong; "" if there is none to read."""
        try:
            return printable(msgspec.json.decode(self._fields.decode(payload)["id"], type=str))
        except (msgspec.MsgspecError, ValueError, KeyError, RecursionError):
            return ""


def quantity_nanos(quantity: int | str | msgspec.Raw) -> int:
    """Read a JSON integer, a decimal text or raw JSON as nanos. Raises `money.BadNumber`."""
    if type(quantity) is int:
        if 0 < quantity <= money.QUANTITY_MAX:
            return quantity * money.NANOS
        raise money.BadNumber("a quantity must be greater than 0 and at most 1e15")
    text = _number_text(quantity)
    if not text:
        raise money.BadNumber("there is no quantity")
    return money.parse_quantity(text)


def data_nanos(quantity: int | str | msgspec.Raw) -> int:
    """Read a quantity out of the data of a typed event as nanos: there 0 is 0.

    Raises `money.BadNumber`.
    """
    if quantity == 0:
        return 0
    if isinstance(quantity, str) and not money.parse_scaled(quantity, money.QUANTITY_DECIMALS):
        return 0
    return quantity_nanos(quantity)


def score_nanos(score: int | str | msgspec.Raw) -> int:
    """Read a score from 0 to 1 as nanos. Raises `money.BadNumber`."""
    text = str(score) if type(score) is int else _number_text(score)
    if not text:
        raise money.BadNumber("there is no score")
    nanos = money.parse_scaled(text, money.QUANTITY_DECIMALS)
    if nanos > money.NANOS:
        raise money.BadNumber("a score is from 0 to 1")
    return nanos


def _number_text(number: int | str | msgspec.Raw) -> str:
    if isinstance(number, str):
        return number
    assert isinstance(number, msgspec.Raw)
    raw = bytes(number)
    return _text(raw) if raw[:1] == b'"' else _ascii(raw)


def _text(raw: bytes) -> str:
    """Read a JSON text; as raw JSON it was passed over, so that nobody has looked inside yet."""
    try:
        return msgspec.json.decode(raw, type=str)
    except (msgspec.MsgspecError, ValueError):
        raise money.BadNumber("a text that is no UTF-8") from None


def _ascii(raw: bytes) -> str:
    return raw.decode("ascii", "replace")


def name_flaw(text: str, what: str, chars_max: int) -> str:
    """Say why a text cannot be an id or a name; "" when it can."""
    if len(text) > chars_max:
        return f"{what} has {len(text)} characters; {chars_max} are allowed"
    if not text.isprintable():
        return f"{what} has control characters"
    return ""


def printable(text: str, chars_max: int = 200) -> str:
    """Cut and escape a text from outside, for answers and logs."""
    cut = text[:chars_max]
    return cut if cut.isprintable() else cut.encode("unicode_escape").decode("ascii")[:chars_max]
