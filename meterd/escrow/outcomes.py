"""How an answer of the escrow service is read: bytes, a status and headers in, a fact out.

The contract leaves open what fields are called, whether money is a string or a number, and what an
answer to a release says. The rule kept here: where an answer can be taken in two ways, the way that
pays later is taken. Nothing raises; nonsense is a value too, and so is a hostile answer: at most 64
KiB, 8 levels deep, numbers of at most 24 characters, and no number ever becomes a float.

An answer to a release, by its status (first) and its body (second):

| status                  | body                | kind        | because                           |
|-------------------------|---------------------|-------------|-----------------------------------|
| 2xx                     | evidence (below)    | CONFIRMED   | the core compares the figures     |
| 2xx                     | anything else       | DOUBT       | a bare 2xx names no amount        |
| 400 422                 | documented error    | DECLINED    | the service itself refused        |
| 402                     | documented error    | EMPTY       |                                   |
| 403                     | documented error    | FORBIDDEN   | of this escrow alone              |
| 404                     | documented error    | MISSING     |                                   |
| 409                     | documented error    | CONFLICT    | a reading decides                 |
| 400 402 403 404 409 422 | anything else       | DOUBT       | a proxy's page, or a firewall's:  |
|                         |                     |             | some filter *answers* with a 403, |
|                         |                     |             | when the money has moved          |
| 401                     | whatever it is      | KEY_REFUSED | said before a request is passed   |
| 429                     | whatever it is      | LIMITED     | on, by whoever says it            |
| 3xx 408 5xx, all others | whatever it is      | DOUBT       |                                   |

A documented error is a JSON object with `error`: a text, or an object with a `code` or `message`
that is a text.

Evidence of a payment, in a body that names no other escrow, no other release and no error:

| the body has                                         | it is taken for                         |
|------------------------------------------------------|-----------------------------------------|
| `released_total`, `total_released`                   | the total released so far               |
| a released figure (`FIELDS`) beside what remains     | the same; it must add up to the total   |
| the total and what remains alone                     | the same, by subtraction                |
| a released figure alone                              | the same; or this release's amount,     |
|                                                      | where it is what was asked and is not   |
|                                                      | the total from before                   |
| `gross_amount`, `amount_gross`, `gross`; also in     | this release's amount; if it is not     |
| `release` and in our line of `releases`              | what was asked, a doubt                 |
| `amount` beside what remains                         | the escrow's total, never the amount    |
| `amount` without what remains, exactly what was      | an echo: enough with a 200 or 201, not  |
| asked                                                | with a 202                              |
| `amount` without what remains, anything else         | nothing: it may be net of the fee       |
| `net_amount`, `fee`, ...                             | nothing                                 |

A status that puts the payment off ("queued", "pending") leaves only the totals to count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal, NoReturn

from meterd.core.money import AMOUNT_DIGITS_MAX, MICROS, format_amount
from meterd.core.settlement import ENDED, LIVE, WINDING, Answer, AnswerKind, Reading, Release

BODY_BYTES_MAX = 64 * 1024
DEPTH_MAX = 8
NUMBER_CHARS_MAX = 24  # A double needs 24 at most: sign, 17 digits, point, exponent.
EXCERPT_CHARS_MAX = 200
WAIT_S_MAX = 24 * 3600.0  # A longer wait is a mistake of the service; the core caps it further.

AMOUNT_MAX: int = 10**AMOUNT_DIGITS_MAX * MICROS

ESCROW_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z", re.ASCII)
RELEASE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z", re.ASCII)
NO_ERROR = "without the documented error"
MEMO_PREFIX = "meterd "  # What a release's memo begins with; its id follows.

# Words in a 2xx that deny the payment, and words that put it off: an escrow may be "pending", a
# payment as well.
DENIALS = frozenset({"failed", "declined", "rejected", "error", "denied"})
NOT_YET = frozenset({"accepted", "pending", "processing", "queued", "scheduled", "submitted"})

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
    "deadline": ("auto_release_at", "deadline", "expires_at"),
}
WRAPPERS = ("escrow", "data")  # Some services put the document one level down.
ROWS = ("releases", "release_history")
LISTS = ("escrows", "items", "data")
CURSORS = ("next_cursor", "cursor", "next")
CURSOR = re.compile(r"[!-~]{1,256}\Z", re.ASCII)

KNOWN_WORDS = LIVE | WINDING | ENDED | {"disputed"}
GONE_BACK = frozenset({"refunded", "expired", "cancelled"})
DONE_WORDS = frozenset(
    {"completed", "complete", "confirmed", "released", "settled", "succeeded", "success", "paid"}
)

UnreadKind = Literal["key_refused", "forbidden", "missing", "limited", "unavailable", "nonsense"]

# --------------------------------------------------------------------------------------------------
# Facts


@dataclass(frozen=True, slots=True)
class Received:
    """What came back: a head, and what could be read of the body; `flaw`: why not all of it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    flaw: str = ""


@dataclass(frozen=True, slots=True)
class Unread:
    """A reading that gave nothing, and why.

    `retry_after` is in seconds, where the service asked for a wait.
    """

    kind: UnreadKind
    detail: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """One escrow of a list, with the memo of its payer."""

    reading: Reading
    memo: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; `skipped` entries made no sense, `cursor` goes on behind it."""

    escrows: tuple[Listed, ...]
    skipped: int
    cursor: str | None


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
# Answers


def answer_to_release(release: Release, received: Received, mask: Mask, wall: int) -> Answer:
    """What an answer means for this release, by the table at the top.

    `wall` is milliseconds; never raises.
    """
    status = received.status
    document, why_not = _try_document(received)
    error = _documented_error(document)
    detail = mask.excerpt(f"{status} {error or why_not or NO_ERROR}")
    if 200 <= status < 300:
        return _answer_to_2xx(release, status, document, why_not, mask)
    if status in _WHOEVER_SAYS_IT:
        return Answer(_WHOEVER_SAYS_IT[status], detail, retry_after=_wait(received, wall))
    if status in _DOCUMENTED and error is not None:
        return Answer(_DOCUMENTED[status], detail)
    return Answer(AnswerKind.DOUBT, detail)


_WHOEVER_SAYS_IT = {401: AnswerKind.KEY_REFUSED, 429: AnswerKind.LIMITED}
_DOCUMENTED = {
    400: AnswerKind.DECLINED,
    402: AnswerKind.EMPTY,
    403: AnswerKind.FORBIDDEN,
    404: AnswerKind.MISSING,
    409: AnswerKind.CONFLICT,
    422: AnswerKind.DECLINED,
}


def answer_to_read(received: Received, mask: Mask, mono: float, wall: int) -> Reading | Unread:
    """What `GET /escrow/:id` said. `mono` is when its request was sent; never raises.

    The reading is as the service has it: another escrow's id, or figures that do not add up, are
    for the core to see.
    """
    if received.status != 200:
        return _unread(received, mask, wall)
    try:
        return _reading(_escrow_document(_document(received)), mask, mono)
    except Nonsense as error:
        return Unread("nonsense", mask.excerpt(f"200 {error}"))


def answer_to_list(received: Received, mask: Mask, mono: float, wall: int) -> Page | Unread:
    """What one page of `GET /escrow?agent_id=` said.

    Never raises. Entries that make no sense are counted.
    """
    if received.status != 200:
        return _unread(received, mask, wall)
    try:
        document = _json(received)
        rows, cursor = _rows_and_cursor(document)
    except Nonsense as error:
        return Unread("nonsense", mask.excerpt(f"200 {error}"))
    listed = tuple(_listed(rows, mask, mono))
    return Page(listed, len(rows) - len(listed), cursor)


def error_text(received: Received) -> str | None:
    """The documented error of an answer, code and message; None: there is none.

    Not masked; never raises.
    """
    return _documented_error(_try_document(received)[0])


def _unread(received: Received, mask: Mask, wall: int) -> Unread:
    """Why a reading gave nothing.

    A GET moves nothing, so only an alarm depends on how exact this is.
    """
    status = received.status
    document, why_not = _try_document(received)
    error = _documented_error(document)
    kind = _UNREAD.get(status, "unavailable")
    if error is None and status not in _WHOEVER_SAYS_IT:
        kind = "unavailable"  # A proxy's page, or a stranger's: the service itself said nothing.
    detail = mask.excerpt(f"{status} {error or why_not or NO_ERROR}")
    return Unread(kind, detail, _wait(received, wall))


_UNREAD: Mapping[int, UnreadKind] = {
    401: "key_refused",
    403: "forbidden",  # Of this escrow: one wrong binding must not stop all the others.
    404: "missing",
    410: "missing",
    429: "limited",
}

# --------------------------------------------------------------------------------------------------
# Evidence of a payment


def _answer_to_2xx(
    release: Release, status: int, document: Mapping[str, object], why_not: str, mask: Mask
) -> Answer:
    if why_not:
        return Answer(AnswerKind.DOUBT, f"{status} {why_not}")
    try:
        amount, released = _evidence(release, document, echo_counts=status in (200, 201))
    except Nonsense as error:
        return Answer(AnswerKind.DOUBT, mask.excerpt(f"{status} {error}"))
    said = [f"released {format_amount(released)} so far"] if released is not None else []
    said += [f"amount {format_amount(amount)}"] if amount is not None else []
    detail = f"{status} {', '.join(said)}"
    return Answer(AnswerKind.CONFIRMED, detail, amount=amount, released=released)


def _evidence(
    release: Release, document: Mapping[str, object], *, echo_counts: bool
) -> tuple[int | None, int | None]:
    """This release's gross amount and the total released, at least one of them.

    Raises `Nonsense`.
    """
    # 1. What contradicts a payment whatever the figures say.
    if document.get("error") or document.get("success") is False or document.get("ok") is False:
        raise Nonsense("the body speaks of an error")
    body = _escrow_document(document)
    _same_escrow(release, document, body)
    rows = _release_rows(release, document, body)
    words = {str(part.get("status")).lower() for part in (document, body)}
    if words & DENIALS:
        raise Nonsense("the body says that it failed")
    echo_counts = echo_counts and not words & NOT_YET
    # 2. Amounts that can only be this release's.
    amount = _agreed("gross", *(_money(row, "gross") for row in rows))
    if amount is not None and amount != release.amount:
        raise Nonsense(f"the body's gross amount is {format_amount(amount)}, not what was asked")
    amount = None if words & NOT_YET else amount
    # 3. The total released.
    released = _agreed("released_total", *(_money(row, "released_total") for row in rows))
    if released is None:
        released, echo = _released(release, body)
        amount = amount if amount is not None or not echo_counts else echo
    if amount is None and released is None:
        amount = _echo(release, rows) if echo_counts else None
    if amount is None and released is None:
        raise Nonsense("the body names neither the amount nor the total released")
    return amount, released


def _same_escrow(
    release: Release, document: Mapping[str, object], body: Mapping[str, object]
) -> None:
    for named in (document, body):
        escrow = _text(named, "escrow")
        if escrow is not None and escrow != release.escrow:
            raise Nonsense("the body is about another escrow")


def _release_rows(
    release: Release, document: Mapping[str, object], body: Mapping[str, object]
) -> list[Mapping[str, object]]:
    """What may speak of this release: the body, its `release`, our line of its history."""
    rows = [body] if body is document else [document, body]
    for part in tuple(rows):
        nested = part.get("release")
        if isinstance(nested, dict):
            if _our_id(nested) not in (None, release.id):
                raise Nonsense("the body is about another release")
            rows += [nested] if _done(nested) else []
        rows += [row for row in _history(part) if _our_id(row) == release.id and _done(row)]
    return rows


def _released(release: Release, body: Mapping[str, object]) -> tuple[int | None, int | None]:
    """The total released by an escrow's own figures, or what looks like an echo of the amount."""
    total, released = _money(body, "total"), _money(body, "released")
    remaining, refunded = _money(body, "remaining"), _money(body, "refunded") or 0
    expected = release.before + release.amount
    if remaining is None:
        if released == release.amount and released not in (release.before, expected):
            return None, released
        return released, None
    if released is None:
        derived = None if total is None else total - remaining - refunded
        return (derived if derived is not None and derived >= 0 else None), None
    adds_up = total is None or released + remaining + refunded == total
    # An `amount` that is what was asked, beside the total that was expected, is this release's.
    if adds_up or (total == release.amount and released == expected):
        return released, None
    raise Nonsense("the escrow's figures in the body do not add up")


def _echo(release: Release, rows: list[Mapping[str, object]]) -> int | None:
    """An `amount` alone that is exactly what was asked; any other may be net, or a total."""
    for row in rows:
        if _money(row, "remaining") is None and _money(row, "total") == release.amount:
            return release.amount
    return None


# --------------------------------------------------------------------------------------------------
# Readings


def _reading(body: Mapping[str, object], mask: Mask, mono: float) -> Reading:
    """An escrow's own figures. Raises `Nonsense` when one is missing or unreadable."""
    escrow = _text(body, "escrow")
    if escrow is None or ESCROW_ID.match(escrow) is None or mask.excerpt(escrow) != escrow:
        raise Nonsense("the body names no escrow")
    status = _status(body, mask)
    currency, provider = _text(body, "currency"), _text(body, "provider")
    total, released = _money(body, "total"), _money(body, "released")
    remaining, refunded = _money(body, "remaining"), _money(body, "refunded")
    released = _agreed("released", released, _money(body, "released_total"))
    if total is None:
        raise Nonsense("the body has no total")
    if released is None:
        if remaining is None:
            raise Nonsense("the body says neither what was released nor what remains")
        released = total - remaining - (refunded or 0)
    if refunded is None:
        # Where the rest went back, a service without a field for it is not contradicting itself.
        gone = total - released - (remaining or 0)
        refunded = max(0, gone) if status in GONE_BACK else 0
    return Reading(
        escrow=escrow,
        status=status,
        total=total,
        released=released,
        remaining=total - released - refunded if remaining is None else remaining,
        refunded=refunded,
        currency=None if currency is None else mask.excerpt(currency).upper(),
        provider=None if provider is None else mask.excerpt(provider),
        deadline=_deadline(body),
        mono=mono,
        release_ids=_release_ids(body),
    )


def _status(body: Mapping[str, object], mask: Mask) -> str:
    """The service's own word: in small letters where meterd knows it, else as it is."""
    word = body.get("status")
    if not isinstance(word, str) or not word or isinstance(word, Number):
        raise Nonsense("the body has no status")
    if word.lower() in KNOWN_WORDS:
        return word.lower()
    return mask.excerpt(word) or "?"


def _deadline(body: Mapping[str, object]) -> int | None:
    """When the service acts by itself, wall ms: from ISO 8601, or seconds or ms since 1970.

    A time without an offset is UTC. One that cannot be read is nonsense, not "none": near a
    deadline nothing may be sent.
    """
    values = (body.get(name) for name in FIELDS["deadline"])
    text = next((value for value in values if value not in (None, "", False)), None)
    if text is None:
        return None
    if not isinstance(text, str):
        raise Nonsense("the deadline is no time")
    epoch = _EPOCH.match(text)
    if epoch is not None:
        whole = int(epoch[1])
        if whole >= _EPOCH_MS_FROM:
            return whole
        return whole * 1000 + int((epoch[2] or "").ljust(3, "0")[:3])
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        since = moment - _EPOCH_START
    except (ValueError, OverflowError) as error:
        raise Nonsense("the deadline is no time") from error
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


_EPOCH = re.compile(r"([0-9]{1,14})(?:\.([0-9]{1,9}))?\Z", re.ASCII)
_EPOCH_MS_FROM = 100_000_000_000  # In seconds that is the year 5138, in milliseconds 1973.
_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)


def _release_ids(body: Mapping[str, object]) -> frozenset[str]:
    """Ids of ours in the history, by key or memo.

    A line that does not say it was done is not counted.
    """
    ids = (_our_id(row) for row in _history(body) if _done(row))
    return frozenset(found for found in ids if found is not None)


def _history(body: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    for name in ROWS:
        rows = body.get(name)
        if isinstance(rows, list):
            yield from (row for row in rows if isinstance(row, dict))


def _done(row: Mapping[str, object]) -> bool:
    status = row.get("status")
    return status is None or (isinstance(status, str) and status.lower() in DONE_WORDS)


def _our_id(row: Mapping[str, object]) -> str | None:
    """The id that meterd gave this release; `release_id` is the service's own."""
    memo, key = row.get("memo"), row.get("idempotency_key")
    if isinstance(memo, str) and memo.startswith(MEMO_PREFIX):
        found = memo.removeprefix(MEMO_PREFIX)
        return found if RELEASE_ID.match(found) else None
    if isinstance(key, str) and key.startswith("rel_") and RELEASE_ID.match(key):
        return key
    return None


def _rows_and_cursor(document: object) -> tuple[list[object], str | None]:
    """The entries of a list and where it goes on. Raises `Nonsense`."""
    if isinstance(document, list):
        return document, None
    if not isinstance(document, dict):
        raise Nonsense("the body is no list")
    rows = next((document[name] for name in LISTS if isinstance(document.get(name), list)), None)
    if rows is None:
        raise Nonsense("the body has no list of escrows")
    cursor = next((document[name] for name in CURSORS if document.get(name)), None)
    if cursor is not None and not (isinstance(cursor, str) and CURSOR.match(cursor)):
        raise Nonsense("the list's cursor cannot be read")
    return rows, cursor


def _listed(rows: list[object], mask: Mask, mono: float) -> Iterator[Listed]:
    for row in rows:
        if not isinstance(row, dict):
            continue
        try:
            reading = _reading(row, mask, mono)
        except Nonsense:
            continue  # The caller learns how many there were.
        memo = row.get("memo")
        yield Listed(reading, mask.excerpt(memo) if isinstance(memo, str) else None)


# --------------------------------------------------------------------------------------------------
# Fields


def _escrow_document(document: Mapping[str, object]) -> Mapping[str, object]:
    """The escrow of a body: the body itself, or what it wraps when it has no id of its own."""
    if _text(document, "escrow") is not None:
        return document
    for name in WRAPPERS:
        inner = document.get(name)
        if isinstance(inner, dict) and inner:
            return _escrow_document(inner)
    return document


def _text(body: Mapping[str, object], field: str) -> str | None:
    """The first text, or number as text, under a field's names; None: there is none."""
    for name in FIELDS[field]:
        value = body.get(name)
        if isinstance(value, str) and value and value.isprintable():
            return str(value)
    return None


def _money(body: Mapping[str, object], field: str) -> int | None:
    """Micros under a field's names, which must agree.

    `true` and `null` are no figures. Raises `Nonsense`.
    """
    values = (body.get(name) for name in FIELDS[field])
    return _agreed(field, *(read_money(value) for value in values if isinstance(value, str)))


def _agreed(field: str, *figures: int | None) -> int | None:
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


def _documented_error(document: Mapping[str, object]) -> str | None:
    """The error as the contract documents it, for people; None: this is not one."""
    error, message = document.get("error"), document.get("message")
    if isinstance(error, dict):
        code, message = error.get("code"), error.get("message")
        error = code if isinstance(code, str) else message
    if not isinstance(error, str) or not error.strip():
        return None
    return f"{error}: {message}" if isinstance(message, str) and message != error else error


def _try_document(received: Received) -> tuple[Mapping[str, object], str]:
    """The body's object, or an empty one and why there is none."""
    try:
        return _document(received), ""
    except Nonsense as error:
        return {}, str(error)


def _document(received: Received) -> Mapping[str, object]:
    document = _json(received)
    if not isinstance(document, dict):
        raise Nonsense("the body is no JSON object")
    return document


def _json(received: Received) -> object:
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


# --------------------------------------------------------------------------------------------------
# Waits


def _wait(received: Received, wall: int) -> float | None:
    """Seconds that the service asks us to wait, 0 to a day; None: it says nothing sensible."""
    headers = {name.lower(): value.strip() for name, value in received.headers.items()}
    wait = _retry_after(headers.get("retry-after", ""), wall)
    if wait is None and received.status == 429:
        for name in ("x-ratelimit-reset", "ratelimit-reset"):
            wait = _reset(headers.get(name, ""), wall) if wait is None else wait
    return None if wait is None else min(max(wait, 0.0), WAIT_S_MAX)


_SECONDS = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,9})?\Z", re.ASCII)


def _retry_after(text: str, wall: int) -> float | None:
    """Seconds, or an HTTP date."""
    if _SECONDS.match(text):
        return float(text)
    try:
        moment = parsedate_to_datetime(text[:64])
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return (moment - _EPOCH_START).total_seconds() - wall / 1000
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


def _reset(text: str, wall: int) -> float | None:
    """Seconds to go, or the moment in seconds or milliseconds since 1970."""
    if not _SECONDS.match(text):
        return None
    value = float(text)
    if value >= _EPOCH_MS_FROM:
        return (value - wall) / 1000
    return value - wall / 1000 if value >= 1_000_000_000 else value
