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

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

from meterd.core.money import format_amount
from meterd.core.settlement import ENDED, LIVE, WINDING, Answer, AnswerKind, Reading, Release
from meterd.escrow.documents import (
    FIELDS,
    Mask,
    Nonsense,
    Number,
    Received,
    agreed,
    documented_error,
    json_of,
    named_money,
    named_text,
    object_of,
    try_document,
    unwrapped,
)

WAIT_S_MAX = 24 * 3600.0  # A longer wait is a mistake of the service; the core caps it further.

ESCROW_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z", re.ASCII)
RELEASE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z", re.ASCII)
NO_ERROR = "without the documented error"
MEMO_PREFIX = "meterd "  # What a release's memo begins with; its id follows.

# Words in a 2xx that deny the payment, and words that put it off: an escrow may be "pending", a
# payment as well.
DENIALS = frozenset({"failed", "declined", "rejected", "error", "denied"})
NOT_YET = frozenset({"accepted", "pending", "processing", "queued", "scheduled", "submitted"})

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
class Unread:
    """A reading that gave nothing, and why.

    `retry_after` is in seconds, where the service asked for a wait.
    """

    kind: UnreadKind
    detail: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """One escrow of a list. Its creator is its payer, who wrote the memo; times are wall ms."""

    reading: Reading
    memo: str | None
    creator: str | None = None
    created_at: int | None = None  # None: the service gave none, or one that is no time.

    @property
    def id(self) -> str:
        """The escrow's id."""
        return self.reading.escrow

    @property
    def total(self) -> int:
        """What it was funded with, in micros."""
        return self.reading.total

    @property
    def provider(self) -> str | None:
        """Who is paid from it."""
        return self.reading.provider

    @property
    def status(self) -> str:
        """The service's own word, as a reading has it."""
        return self.reading.status

    @property
    def deadline(self) -> int | None:
        """When the service acts by itself."""
        return self.reading.deadline


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked of the service in a creation; the amount in micros."""

    provider: str
    amount: int
    memo: str


@dataclass(frozen=True, slots=True)
class Created:
    """A new escrow, as the answer to its creation shows it."""

    escrow: Listed


@dataclass(frozen=True, slots=True)
class CreateFailed:
    """No escrow that we know of. DOUBT: there may be one, and the list shows it by its memo."""

    kind: AnswerKind
    detail: str
    retry_after: float | None = None  # Seconds.


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; `skipped` entries made no sense, `cursor` goes on behind it."""

    escrows: tuple[Listed, ...]
    skipped: int
    cursor: str | None


# --------------------------------------------------------------------------------------------------
# Answers


Figures = tuple[int | None, int | None]
Evidence = Callable[[Mapping[str, object], bool], Figures]


def answer_to_release(release: Release, received: Received, mask: Mask, wall: int) -> Answer:
    """What an answer means for this release, by the table at the top.

    `wall` is milliseconds; never raises.
    """

    def evidence(document: Mapping[str, object], echo_counts: bool) -> Figures:
        return _evidence(release, document, echo_counts=echo_counts)

    return answer_by_evidence(received, mask, wall, evidence)


def answer_by_evidence(received: Received, mask: Mask, wall: int, evidence: Evidence) -> Answer:
    """What an answer to a call that pays means, by the first table at the top; never raises.

    `evidence` looks into the body of a 2xx: this call's gross amount and the total paid, at least
    one of them, or `Nonsense`. It is told whether an echo of the amount counts.
    """
    if not 200 <= received.status < 300:
        return answer_to_refusal(received, mask, wall)
    document, why_not = try_document(received)
    if why_not:
        return Answer(AnswerKind.DOUBT, f"{received.status} {why_not}")
    try:
        amount, released = evidence(document, received.status in (200, 201))
    except Nonsense as error:
        return Answer(AnswerKind.DOUBT, mask.excerpt(f"{received.status} {error}"))
    said = [f"released {format_amount(released)} so far"] if released is not None else []
    said += [f"amount {format_amount(amount)}"] if amount is not None else []
    detail = f"{received.status} {', '.join(said)}"
    return Answer(AnswerKind.CONFIRMED, detail, amount=amount, released=released)


def payment(micros: int, key: str) -> dict[str, object]:
    """The body that pays an amount, with the id that finds it again in the service's history."""
    assert micros > 0
    return {"amount": format_amount(micros), "memo": f"{MEMO_PREFIX}{key}"}


def answer_to_refusal(received: Received, mask: Mask, wall: int) -> Answer:
    """What an answer other than a 2xx means, whatever was asked: the rows of the first table."""
    status = received.status
    document, why_not = try_document(received)
    error = documented_error(document)
    detail = mask.excerpt(f"{status} {error or why_not or NO_ERROR}")
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
        return unread(received, mask, wall)
    try:
        return _reading(unwrapped(object_of(received), "escrow"), mask, mono)
    except Nonsense as error:
        return Unread("nonsense", mask.excerpt(f"200 {error}"))


def answer_to_list(received: Received, mask: Mask, mono: float, wall: int) -> Page | Unread:
    """What one page of `GET /escrow?agent_id=` said.

    Never raises. Entries that make no sense are counted.
    """
    if received.status != 200:
        return unread(received, mask, wall)
    try:
        document = json_of(received)
        rows, cursor = _rows_and_cursor(document)
    except Nonsense as error:
        return Unread("nonsense", mask.excerpt(f"200 {error}"))
    listed = tuple(_all_listed(rows, mask, mono))
    return Page(listed, len(rows) - len(listed), cursor)


def unread(received: Received, mask: Mask, wall: int) -> Unread:
    """Why a reading gave nothing.

    A GET moves nothing, so only an alarm depends on how exact this is.
    """
    status = received.status
    document, why_not = try_document(received)
    error = documented_error(document)
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


def _evidence(release: Release, document: Mapping[str, object], *, echo_counts: bool) -> Figures:
    """This release's gross amount and the total released, at least one of them.

    Raises `Nonsense`.
    """
    # 1. What contradicts a payment whatever the figures say.
    body = unwrapped(document, "escrow")
    words = words_of_success(document, body)
    _same_escrow(release.escrow, document, body)
    rows = _release_rows(release, document, body)
    echo_counts = echo_counts and not words & NOT_YET
    # 2. Amounts that can only be this release's.
    amount = gross_of(release, rows)
    amount = None if words & NOT_YET else amount
    # 3. The total released.
    released = agreed("released_total", *(named_money(row, "released_total") for row in rows))
    if released is None:
        released, echo = _released(release, body)
        amount = amount if amount is not None or not echo_counts else echo
    if amount is None and released is None:
        amount = _echo(release, rows) if echo_counts else None
    if amount is None and released is None:
        raise Nonsense("the body names neither the amount nor the total released")
    return amount, released


def gross_of(release: Release, rows: Iterable[Mapping[str, object]]) -> int | None:
    """The gross amount that all rows agree on. Raises `Nonsense` if it is not what was asked."""
    amount = agreed("gross", *(named_money(row, "gross") for row in rows))
    if amount is not None and amount != release.amount:
        raise Nonsense(f"the body's gross amount is {format_amount(amount)}, not what was asked")
    return amount


def words_of_success(*parts: Mapping[str, object]) -> frozenset[str]:
    """The statuses that a 2xx gives. Raises `Nonsense` when it speaks of a failure."""
    outer = parts[0]
    if outer.get("error") or outer.get("success") is False or outer.get("ok") is False:
        raise Nonsense("the body speaks of an error")
    words = frozenset(str(part.get("status")).lower() for part in parts)
    if words & DENIALS:
        raise Nonsense("the body says that it failed")
    return words


def _same_escrow(escrow: str, *parts: Mapping[str, object]) -> None:
    for part in parts:
        if named_text(part, "escrow") not in (None, escrow):
            raise Nonsense("the body is about another escrow")


def _release_rows(
    release: Release, document: Mapping[str, object], body: Mapping[str, object]
) -> list[Mapping[str, object]]:
    """What may speak of this release: the body, its `release`, our line of its history."""
    rows = [body] if body is document else [document, body]
    for part in tuple(rows):
        nested = part.get("release")
        if isinstance(nested, dict):
            if our_id(nested) not in (None, release.id):
                raise Nonsense("the body is about another release")
            rows += [nested] if is_done(nested) else []
        rows += [row for row in history(part, ROWS) if our_id(row) == release.id and is_done(row)]
    return rows


def _released(release: Release, body: Mapping[str, object]) -> Figures:
    """The total released by an escrow's own figures, or what looks like an echo of the amount."""
    total, released = named_money(body, "total"), named_money(body, "released")
    remaining, refunded = named_money(body, "remaining"), named_money(body, "refunded") or 0
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
        if named_money(row, "remaining") is None and named_money(row, "total") == release.amount:
            return release.amount
    return None


# --------------------------------------------------------------------------------------------------
# Creations, and the rest of an escrow


def answer_to_create(
    wanted: Wanted, received: Received, mask: Mask, mono: float, wall: int
) -> Created | CreateFailed:
    """Whether an escrow was created as it was wanted; never raises.

    Created: a 200 or 201 that names the new escrow and contradicts nothing. What it leaves out is
    taken as it was asked: a reading follows before anything is paid. Every other 2xx is a DOUBT.
    """
    if not 200 <= received.status < 300:
        refusal = answer_to_refusal(received, mask, wall)
        return CreateFailed(refusal.kind, refusal.detail, refusal.retry_after)
    if received.status not in (200, 201):
        return CreateFailed(AnswerKind.DOUBT, f"{received.status} it may be created later")
    try:
        return Created(_created(wanted, object_of(received), mask, mono))
    except Nonsense as error:
        return CreateFailed(AnswerKind.DOUBT, mask.excerpt(f"{received.status} {error}"))


def _created(wanted: Wanted, document: Mapping[str, object], mask: Mask, mono: float) -> Listed:
    body = unwrapped(document, "escrow")
    if words_of_success(document, body) & (NOT_YET - LIVE):
        raise Nonsense("the escrow may be created later")
    asked: dict[str, object] = {"status": "funded", "memo": wanted.memo}
    if named_money(body, "total") is None:
        asked["amount"] = Number(format_amount(wanted.amount))
    if named_money(body, "remaining") is None and named_money(body, "released") is None:
        asked["released"] = Number("0")
    listed = _listed(asked | {n: v for n, v in body.items() if v is not None}, mask, mono)
    if (listed.total, listed.reading.released) != (wanted.amount, 0):
        raise Nonsense("the body's amount is not what was asked")
    if listed.provider not in (None, wanted.provider):
        raise Nonsense("the body names another provider")
    if listed.memo != wanted.memo:
        raise Nonsense("the body has another memo")
    return listed


def answer_to_refund_rest(escrow: str, received: Received, mask: Mask, wall: int) -> Answer:
    """What an answer to a refund of the whole remainder means; never raises.

    CONFIRMED: the body says of this escrow that nothing remains, and does not say that it was paid
    out. A 2xx that says less is a DOUBT, also one that the service only took note of: a reading
    shows when it is done.
    """
    return _answer_to_rest(escrow, received, mask, wall, contrary=_PAID_OUT)


def answer_to_release_rest(escrow: str, received: Received, mask: Mask, wall: int) -> Answer:
    """What an answer to a release of the whole remainder means; as for a refund of it."""
    return _answer_to_rest(escrow, received, mask, wall, contrary=GONE_BACK)


_PAID_OUT = frozenset({"released", "completed", "complete", "paid"})


def _answer_to_rest(
    escrow: str, received: Received, mask: Mask, wall: int, *, contrary: frozenset[str]
) -> Answer:
    if not 200 <= received.status < 300:
        return answer_to_refusal(received, mask, wall)
    try:
        released = _nothing_remains(escrow, object_of(received), contrary)
    except Nonsense as error:
        return Answer(AnswerKind.DOUBT, mask.excerpt(f"{received.status} {error}"))
    return Answer(AnswerKind.CONFIRMED, f"{received.status} nothing remains", released=released)


def _nothing_remains(
    escrow: str, document: Mapping[str, object], contrary: frozenset[str]
) -> int | None:
    """The total released, where the body gives it and says that nothing remains.

    Raises `Nonsense`.
    """
    body = unwrapped(document, "escrow")
    words = words_of_success(document, body)
    _same_escrow(escrow, document, body)
    if named_money(body, "remaining") != 0:
        raise Nonsense("the body does not say that nothing remains")
    if words & NOT_YET:
        raise Nonsense("it was only taken note of")
    if str(body.get("status")).lower() in contrary:
        raise Nonsense("the body says that the rest went the other way")
    return agreed("released", *_released_figures(body))


def _released_figures(body: Mapping[str, object]) -> Figures:
    return named_money(body, "released"), named_money(body, "released_total")


# --------------------------------------------------------------------------------------------------
# Readings


def _reading(body: Mapping[str, object], mask: Mask, mono: float) -> Reading:
    """An escrow's own figures. Raises `Nonsense` when one is missing or unreadable."""
    escrow = named_text(body, "escrow")
    if escrow is None or ESCROW_ID.match(escrow) is None or mask.excerpt(escrow) != escrow:
        raise Nonsense("the body names no escrow")
    status = status_word(body, mask)
    currency, provider = named_text(body, "currency"), named_text(body, "provider")
    total = named_money(body, "total")
    remaining, refunded = named_money(body, "remaining"), named_money(body, "refunded")
    released = agreed("released", *_released_figures(body))
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
        release_ids=ids_of_ours(history(body, ROWS)),
    )


def status_word(body: Mapping[str, object], mask: Mask) -> str:
    """The service's own word: in small letters where meterd knows it, else as it is.

    Raises `Nonsense`.
    """
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
    moment = _moment(text)
    if moment is None:
        raise Nonsense("the deadline is no time")
    return moment


def _moment(text: str) -> int | None:
    """A time in any of these forms as wall ms; None: it is none."""
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
    except (ValueError, OverflowError):
        return None
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


_EPOCH = re.compile(r"([0-9]{1,14})(?:\.([0-9]{1,9}))?\Z", re.ASCII)
_EPOCH_MS_FROM = 100_000_000_000  # In seconds that is the year 5138, in milliseconds 1973.
_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)


def ids_of_ours(rows: Iterable[Mapping[str, object]]) -> frozenset[str]:
    """Ids of ours in a history, by key or memo.

    A line that does not say it was done is not counted.
    """
    ids = (our_id(row) for row in rows if is_done(row))
    return frozenset(found for found in ids if found is not None)


def history(body: Mapping[str, object], names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
    """The lines of the service's own history, under whichever of the names it stands."""
    for name in names:
        rows = body.get(name)
        if isinstance(rows, list):
            yield from (row for row in rows if isinstance(row, dict))


def is_done(row: Mapping[str, object]) -> bool:
    """Whether a line of the history does not say that it is still to come, or failed."""
    status = row.get("status")
    return status is None or (isinstance(status, str) and status.lower() in DONE_WORDS)


def our_id(row: Mapping[str, object]) -> str | None:
    """The id that meterd gave this release or debit; `release_id` is the service's own."""
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


def _all_listed(rows: list[object], mask: Mask, mono: float) -> Iterator[Listed]:
    for row in rows:
        if not isinstance(row, dict):
            continue
        try:
            yield _listed(row, mask, mono)
        except Nonsense:
            continue  # The caller learns how many there were.


def _listed(row: Mapping[str, object], mask: Mask, mono: float) -> Listed:
    """An escrow with what a payer finds it by. Raises `Nonsense`."""
    memo, creator = row.get("memo"), named_text(row, "creator")
    created = named_text(row, "created")
    return Listed(
        reading=_reading(row, mask, mono),
        memo=mask.excerpt(memo) if isinstance(memo, str) else None,
        creator=None if creator is None else mask.excerpt(creator),
        created_at=None if created is None else _moment(created),
    )


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
