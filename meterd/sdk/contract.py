"""The escrow contract without a network: questions to be sent, and what their answers mean.

The rule kept here: both clients send the same bytes and read the same answers, since neither of
them writes or reads any. A shell is given a `Question`, carries it to the service once, and hands
what came of it (`Received`, or `Lost`) to `Question.read`, which returns or raises one of
`meterd.sdk.errors`.

How an answer is read is `meterd.escrow.outcomes`'s: the daemon and this client never disagree about
what was paid.
"""

from __future__ import annotations

import ipaddress
import json
import random
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Generic, Literal, NoReturn, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from meterd.core.money import format_amount
from meterd.core.settlement import Answer, AnswerKind, Reading, Release, ReleaseStatus
from meterd.escrow.documents import (
    EXCERPT_CHARS_MAX,
    Mask,
    Nonsense,
    Received,
    named_text,
    object_of,
    read_money,
    try_document,
    unwrapped,
)
from meterd.escrow.outcomes import (
    ESCROW_ID,
    MEMO_PREFIX,
    RELEASE_ID,
    CreateFailed,
    Listed,
    Page,
    Unread,
    Wanted,
    answer_to_create,
    answer_to_list,
    answer_to_read,
    answer_to_refusal,
    answer_to_release,
    answer_to_release_rest,
    words_of_success,
)
from meterd.sdk.amounts import decimal_of, figure_of, micros_of, micros_to_lock
from meterd.sdk.errors import (
    BadArgument,
    Conflict,
    InDoubt,
    KeyRefused,
    Limited,
    NotFound,
    NotSent,
    Refused,
    Unavailable,
)

TIMEOUT_S = 30.0
PAGE_ESCROWS = 50
PAGES_MAX = 1000  # Fifty thousand escrows of one agent; a list without an end is a mistake.
# A memo longer than this would come back cut off, and could not be found in a list.
MEMO_CHARS_MAX = EXCERPT_CHARS_MAX

# A reading is put three times, with these pauses in between, each shortened at random, up to half.
PAUSES_S = (0.4, 1.2)
RETRY_AFTER_MAX_S = 5.0  # A longer wait is the caller's to decide.

T = TypeVar("T")
Amount = str | Decimal

# --------------------------------------------------------------------------------------------------
# Facts


@dataclass(frozen=True, slots=True)
class Escrow:
    """An escrow as the service shows it. Money in USDC, exact, gross of the service's fee.

    id            the escrow's id.
    status        the service's own word, in small letters where it is a known one: live are funded,
                  locked, active, pending, working, partially_released; completed, complete and
                  awaiting_release wind down; disputed is frozen; released, refunded, expired and
                  cancelled have ended. Others are kept as they came.
    total         what it was funded with.
    released      what its provider was paid so far.
    remaining     what is still in it.
    refunded      what went back to its payer.
    currency      "USDC"; None: the service did not say.
    provider      the agent who is paid from it; None: the service did not say.
    deadline      when the service acts by itself, in UTC; None: it gave no time.
    memo          what its payer wrote; None: the service did not say.
    release_keys  idempotency keys of releases that the service's own history shows as done, as far
                  as it keeps one: those that begin with `rel_`, or stand in a memo of this client.
    """

    id: str
    status: str
    total: Decimal
    released: Decimal
    remaining: Decimal
    refunded: Decimal
    currency: str | None = None
    provider: str | None = None
    deadline: datetime | None = None
    memo: str | None = None
    release_keys: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Done:
    """What the service confirmed of a call that moves money.

    escrow_id  the escrow that it was moved from.
    amount     what was asked for, in USDC, gross; None: everything that was left.
    key        the idempotency key that was sent.
    escrow     the escrow as the answer shows it; None: it shows too little.
    """

    escrow_id: str
    amount: Decimal | None
    key: str
    escrow: Escrow | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """No head of an answer came. `left`: a byte of the question may have left this machine."""

    left: bool
    flaw: str


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """One request, whole, and how its answer is read.

    target   path and query, behind the host.
    headers  all that are not the connection's own; they hold the API key.
    read     gives what the answer means, or raises one of `meterd.sdk.errors`.
    """

    method: Literal["GET", "POST"]
    target: str
    read: Callable[[Received | Lost], T]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Move:
    """A call that moves money, for its errors. `micros` is None for everything that is left."""

    call: str
    escrow_id: str | None
    micros: int | None
    key: str
    memo: str = ""

    @property
    def amount(self) -> Decimal | None:
        return None if self.micros is None else decimal_of(self.micros)

    def doubt(
        self,
        detail: str,
        *,
        kind: type[InDoubt] = InDoubt,
        status: int | None = None,
        code: str | None = None,
    ) -> InDoubt:
        return kind(
            f"{self} may or may not have been carried out ({detail}). {self._next_step()}",
            status=status,
            code=code,
            call=self.call,
            escrow_id=self.escrow_id,
            amount=self.amount,
            key=self.key,
        )

    def __str__(self) -> str:
        sum_of = "everything" if self.micros is None else format_amount(self.micros)
        of_escrow = "" if self.escrow_id is None else f" of {self.escrow_id}"
        return f"{self.call}{of_escrow}, {sum_of},"

    def _next_step(self) -> str:
        if self.escrow_id is None:
            return (
                f"Before you do anything else, look for the memo {self.memo!r} in list(agent_id)."
            )
        return (
            f"Before you do anything else, read status({self.escrow_id!r}), and again some minutes "
            "later: it may still land."
        )


def new_key() -> str:
    """A new idempotency key, such as "rel_5b0c…": make it and keep it before the call."""
    return f"rel_{secrets.token_hex(16)}"


def pause_before_next(error: Exception, looks: int) -> float | None:
    """Seconds until a reading that failed so is put again, after `looks` times; None: it is not.

    Written out here: a library for it would log and count on its own in other people's programs.
    """
    if looks > len(PAUSES_S) or not isinstance(error, NotSent | Unavailable | Limited):
        return None
    if isinstance(error, Limited) and error.retry_after is not None:
        return error.retry_after if error.retry_after <= RETRY_AFTER_MAX_S else None
    return PAUSES_S[looks - 1] * random.uniform(0.5, 1)  # noqa: S311 - No secret.


# --------------------------------------------------------------------------------------------------
# Questions


class Contract:
    """The contract as one service speaks it: where it is, and with which key.

    Raises `BadArgument` for an address to which no key may be sent: https is wanted, http for
    loopback alone.
    """

    def __init__(self, base_url: str, api_key: str, timeout_s: float) -> None:
        if not isinstance(base_url, str) or not _safe_address(base_url):
            raise BadArgument(
                "base_url must be https (http for loopback alone), without user, ? and #, "
                "such as https://escrow.example/api/v1"
            )
        if not isinstance(api_key, str) or _KEY.match(api_key) is None:
            raise BadArgument("api_key must be 1 to 512 visible characters")
        if not timeout_s > 0:
            raise BadArgument("timeout_s must be more than 0 seconds")
        parts = urlsplit(base_url)
        self.secure = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.secure else 80)
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self.timeout_s = timeout_s
        self.mask = Mask(api_key)
        self._prefix = parts.path.rstrip("/")
        self._headers = {
            "Authorization": f"Bearer {api_key}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "meterd-sdk",
        }

    def lock(
        self,
        to: str,
        amount: Amount,
        memo: str,
        auto_release_hours: int | None,
        idempotency_key: str | None,
    ) -> Question[Escrow]:
        """`POST /escrow`."""
        micros = micros_to_lock(amount)
        body: dict[str, object] = {
            "to_agent_id": _agent(to, "to"),
            "amount": format_amount(micros),
            "memo": self._memo(memo),
        }
        if auto_release_hours is not None:
            body["auto_release_hours"] = _hours(auto_release_hours)
        move = _Move("lock", None, micros, _key(idempotency_key), memo)
        wanted = Wanted(to, micros, memo)
        return self._post("/escrow", body, move, lambda came: self._locked(move, wanted, came))

    def release_partial(
        self,
        escrow_id: str,
        amount: Amount,
        memo: str | None,
        idempotency_key: str | None,
        released_before: Amount | None,
    ) -> Question[Done]:
        """`POST /escrow/:id/release-partial`."""
        move = _Move("release_partial", _id(escrow_id), micros_of(amount), _key(idempotency_key))
        before = None if released_before is None else figure_of(released_before)
        body = {"amount": format_amount(micros_of(amount)), "memo": self._release_memo(memo, move)}
        return self._post(
            f"{_path(escrow_id)}/release-partial",
            body,
            move,
            lambda came: self._released_part(move, before, came),
        )

    def release_all(self, escrow_id: str, idempotency_key: str | None) -> Question[Done]:
        """`POST /escrow/:id/release`."""
        move = _Move("release_all", _id(escrow_id), None, _key(idempotency_key))
        return self._post(
            f"{_path(escrow_id)}/release", {}, move, lambda came: self._released_all(move, came)
        )

    def refund_part(
        self, escrow_id: str, amount: Amount, idempotency_key: str | None
    ) -> Question[Done]:
        """`POST /escrow/:id/refund` with an amount."""
        micros = micros_of(amount)
        move = _Move("refund_part", _id(escrow_id), micros, _key(idempotency_key))
        body = {"amount": format_amount(micros)}
        return self._post(
            f"{_path(escrow_id)}/refund", body, move, lambda came: self._refunded(move, came)
        )

    def refund_all(self, escrow_id: str, idempotency_key: str | None) -> Question[Done]:
        """`POST /escrow/:id/refund` without an amount."""
        move = _Move("refund_all", _id(escrow_id), None, _key(idempotency_key))
        return self._post(
            f"{_path(escrow_id)}/refund", {}, move, lambda came: self._refunded(move, came)
        )

    def status(self, escrow_id: str) -> Question[Escrow]:
        """`GET /escrow/:id`."""
        _id(escrow_id)
        return self._get(_path(escrow_id), lambda came: self._status(escrow_id, came))

    def list(self, agent_id: str) -> Walk:
        """`GET /escrow?agent_id=`, page by page."""
        _agent(agent_id, "agent_id")
        query = {"agent_id": agent_id, "limit": str(PAGE_ESCROWS)}

        def page(cursor: str | None) -> Question[Page]:
            at = query if cursor is None else query | {"cursor": cursor}
            return self._get(f"/escrow?{urlencode(at)}", self._page)

        return Walk(page)

    def _get(self, path: str, read: Callable[[Received | Lost], T]) -> Question[T]:
        return Question("GET", self._prefix + path, read, self._headers)

    def _post(
        self,
        path: str,
        body: Mapping[str, object],
        move: _Move,
        read: Callable[[Received], T],
    ) -> Question[T]:
        headers = {
            **self._headers,
            "Content-Type": "application/json",
            "Idempotency-Key": move.key,
        }

        def answered(came: Received | Lost) -> T:
            if isinstance(came, Received):
                return read(came)
            if came.left:
                raise move.doubt(f"no answer: {came.flaw}")
            raise NotSent(f"{move} was not sent: {came.flaw}; ask again, with the same key")

        return Question("POST", self._prefix + path, answered, headers, json.dumps(body).encode())

    def _memo(self, memo: object) -> str:
        if not isinstance(memo, str) or not memo or self.mask.excerpt(memo) != memo:
            raise BadArgument(
                f"memo must be a text of 1 to {MEMO_CHARS_MAX} printable characters, without "
                "blanks at its ends or two in a row, and without the API key: "
                "it is how the escrow is found again"
            )
        return memo

    def _release_memo(self, memo: str | None, move: _Move) -> str:
        """The caller's, or one by which the service's history shows the key."""
        if memo is None:
            return f"{MEMO_PREFIX}{move.key}"
        if self._memo(memo).startswith(MEMO_PREFIX):
            raise BadArgument(
                f"memo must not begin with {MEMO_PREFIX!r}: that is how meterd marks its own"
            )
        return memo

    # -- Answers to what moves money ---------------------------------------------------------------

    def _locked(self, move: _Move, wanted: Wanted, came: Received) -> Escrow:
        found = answer_to_create(wanted, came, self.mask, 0.0, _wall())
        if isinstance(found, CreateFailed):
            self._fail(move, came, found)
        return _shown(found.escrow)

    def _released_part(self, move: _Move, before: int | None, came: Received) -> Done:
        """Done: the answer names the amount or the key, or its total is what was to be expected."""
        assert move.escrow_id is not None
        assert move.micros is not None
        answer = answer_to_release(_as_release(move, before), came, self.mask, _wall())
        if answer.kind is not AnswerKind.CONFIRMED:
            self._fail(move, came, answer)
        expected = None if before is None else before + move.micros
        if answer.released is not None and answer.released < move.micros:
            raise move.doubt(f"{answer.detail}: less than was asked", status=came.status)
        if answer.amount is None and expected is None:
            raise move.doubt(
                f"{answer.detail}, which does not show this release: hand over released_before",
                status=came.status,
            )
        if answer.amount is None and answer.released != expected:
            raise move.doubt(f"{answer.detail}: not what it was to be", status=came.status)
        return self._done(move, came)

    def _released_all(self, move: _Move, came: Received) -> Done:
        assert move.escrow_id is not None
        answer = answer_to_release_rest(move.escrow_id, came, self.mask, _wall())
        if answer.kind is not AnswerKind.CONFIRMED:
            self._fail(move, came, answer)
        return self._done(move, came)

    def _refunded(self, move: _Move, came: Received) -> Done:
        """Done: the service took the request. It need not have sent anything back yet."""
        if not 200 <= came.status < 300:
            self._fail(move, came, answer_to_refusal(came, self.mask, _wall()))
        try:
            _check_refund(move, object_of(came))
        except Nonsense as error:
            detail = self.mask.excerpt(f"{came.status} {error}")
            raise move.doubt(detail, status=came.status) from None
        return self._done(move, came)

    def _done(self, move: _Move, came: Received) -> Done:
        assert move.escrow_id is not None
        escrow = self._escrow(came)
        if escrow is not None and not _possible(escrow):
            raise move.doubt(f"{came.status} its figures are impossible", status=came.status)
        return Done(move.escrow_id, move.amount, move.key, escrow)

    def _fail(self, move: _Move, came: Received, failed: Answer | CreateFailed) -> NoReturn:
        """Raise what the kind of a failure stands for."""
        code = self._code(came)
        said = f"{move} was refused: {failed.detail}"
        match failed.kind:
            case AnswerKind.DECLINED | AnswerKind.EMPTY:
                raise Refused(said, status=came.status, code=code)
            case AnswerKind.MISSING:
                raise NotFound(said, status=came.status, code=code)
            case AnswerKind.KEY_REFUSED:
                raise KeyRefused(f"{said}; check the API key", status=came.status, code=code)
            case AnswerKind.LIMITED:
                wait = failed.retry_after
                raise Limited(said, status=came.status, code=code, retry_after=wait)
            case AnswerKind.CONFLICT:
                raise move.doubt(failed.detail, kind=Conflict, status=came.status, code=code)
            case _:
                raise move.doubt(failed.detail, status=came.status, code=code)

    def _code(self, came: Received) -> str | None:
        """The service's word for an error: `error`, or `error.code`."""
        error = try_document(came)[0].get("error")
        word = error.get("code") if isinstance(error, dict) else error
        return self.mask.excerpt(word) if isinstance(word, str) and word else None

    # -- Answers to readings -----------------------------------------------------------------------

    def _status(self, escrow_id: str, came: Received | Lost) -> Escrow:
        what = f"status({escrow_id!r})"
        if isinstance(came, Lost):
            raise _unread(what, came)
        found = answer_to_read(came, self.mask, 0.0, _wall())
        if isinstance(found, Unread):
            self._fail_to_read(what, came, found)
        escrow = self._escrow(came)
        if escrow is None or escrow.id != escrow_id:
            raise Unavailable(f"{what}: the answer is about another escrow", status=came.status)
        if not _possible(escrow):
            raise Unavailable(f"{what}: the answer's figures are impossible", status=came.status)
        return escrow

    def _page(self, came: Received | Lost) -> Page:
        if isinstance(came, Lost):
            raise _unread("list", came)
        found = answer_to_list(came, self.mask, 0.0, _wall())
        if isinstance(found, Unread):
            self._fail_to_read("list", came, found)
        return found

    def _fail_to_read(self, what: str, came: Received, found: Unread) -> NoReturn:
        code = self._code(came)
        said = f"{what}: {found.detail}"
        match found.kind:
            case "missing":
                raise NotFound(said, status=came.status, code=code)
            case "key_refused" | "forbidden":
                raise KeyRefused(f"{said}; check the API key", status=came.status, code=code)
            case "limited":
                wait = found.retry_after
                raise Limited(said, status=came.status, code=code, retry_after=wait)
            case _:
                raise Unavailable(said, status=came.status, code=code)

    def _escrow(self, came: Received) -> Escrow | None:
        """The escrow that a 2xx shows; None: it shows too little."""
        found = answer_to_read(replace(came, status=200), self.mask, 0.0, _wall())
        if isinstance(found, Unread):
            return None
        memo = unwrapped(object_of(came), "escrow").get("memo")
        return _shown(Listed(found, self.mask.excerpt(memo) if isinstance(memo, str) else None))


class Walk:
    """The way through a list: while there is a `question`, ask it and `take` what came."""

    def __init__(self, page: Callable[[str | None], Question[Page]]) -> None:
        self._page = page
        self._pages = 0
        self._skipped = 0
        self._cursors: set[str] = set()
        self.question: Question[Page] | None = page(None)

    def take(self, page: Page) -> tuple[Escrow, ...]:
        """The escrows of a page. Raises `Unavailable` for a list that leads in a circle."""
        self._pages += 1
        self._skipped += page.skipped
        cursor = page.cursor
        if cursor is not None and (cursor in self._cursors or self._pages == PAGES_MAX):
            raise Unavailable("list: its pages have no end; no part of it can be relied on")
        self._cursors.add(cursor or "")
        self.question = None if cursor is None else self._page(cursor)
        return tuple(_shown(listed) for listed in page.escrows)

    def end(self) -> None:
        """Raise `Unavailable` when something was left out: a part is never taken for the whole."""
        if self._skipped:
            raise Unavailable(
                f"list: {self._skipped} of its entries make no sense; the others were handed over"
            )


# --------------------------------------------------------------------------------------------------
# Reading


def _wall() -> int:
    """Milliseconds since 1970: for waits that the service gives as a date."""
    return time.time_ns() // 1_000_000


def _as_release(move: _Move, before: int | None) -> Release:
    """The call as the reader of answers knows one; what it does not look at is empty."""
    assert move.escrow_id is not None
    assert move.micros is not None
    return Release(
        id=move.key,
        escrow=move.escrow_id,
        amount=move.micros,
        before=before or 0,
        status=ReleaseStatus.SENT,
        why="",
        units=0,
        created_at=0,
        history=(),
    )


def _check_refund(move: _Move, document: Mapping[str, object]) -> None:
    """Raise `Nonsense` unless the body says of this escrow that its refund was taken."""
    body = unwrapped(document, "escrow")
    words_of_success(document, body)
    if named_text(body, "escrow") != move.escrow_id:
        raise Nonsense("the body does not name the escrow")
    refund = document.get("refund")
    said = refund.get("amount") if isinstance(refund, dict) else None
    if move.micros is not None and isinstance(said, str) and read_money(said) != move.micros:
        raise Nonsense("the body shows a refund of another amount")


def _unread(what: str, lost: Lost) -> NotSent | Unavailable:
    if lost.left:
        return Unavailable(f"{what}: no answer: {lost.flaw}")
    return NotSent(f"{what} was not sent: {lost.flaw}")


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _shown(listed: Listed) -> Escrow:
    reading: Reading = listed.reading
    deadline = reading.deadline
    return Escrow(
        id=reading.escrow,
        status=reading.status,
        total=decimal_of(reading.total),
        released=decimal_of(reading.released),
        remaining=decimal_of(reading.remaining),
        refunded=decimal_of(reading.refunded),
        currency=reading.currency,
        provider=reading.provider,
        deadline=None if deadline is None else _EPOCH + timedelta(milliseconds=deadline),
        memo=listed.memo,
        release_keys=reading.release_ids,
    )


def _possible(escrow: Escrow) -> bool:
    """Whether no figure is beyond the total. That they add up is the service's own affair."""
    figures = (escrow.released, escrow.remaining, escrow.refunded)
    return all(0 <= figure <= escrow.total for figure in figures)


# --------------------------------------------------------------------------------------------------
# Arguments

_KEY = re.compile(r"[!-~]{1,512}\Z", re.ASCII)
_AGENT_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z", re.ASCII)
_ADDRESS = re.compile(r"[!-~]{1,512}\Z", re.ASCII)


def _safe_address(base_url: str) -> bool:
    """Whether a key may be sent there: nobody listens on the way, and the host is plain to see."""
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if _ADDRESS.match(base_url) is None or set(base_url) & set("?#@\\") or not host:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _path(escrow_id: str) -> str:
    return f"/escrow/{quote(escrow_id, safe='')}"


def _id(escrow_id: object) -> str:
    if not isinstance(escrow_id, str) or ESCROW_ID.match(escrow_id) is None:
        raise BadArgument("an escrow's id is 1 to 64 of A-Za-z0-9_-, such as esc_1")
    return escrow_id


def _agent(agent_id: object, name: str) -> str:
    if not isinstance(agent_id, str) or _AGENT_ID.match(agent_id) is None:
        raise BadArgument(f"{name}: an agent's id is 1 to 64 of A-Za-z0-9_.:-")
    return agent_id


def _key(idempotency_key: object) -> str:
    """The caller's, or a new one. By presence: an empty key is a mistake and not "none"."""
    if idempotency_key is None:
        return new_key()
    if not isinstance(idempotency_key, str) or RELEASE_ID.match(idempotency_key) is None:
        raise BadArgument("idempotency_key is 1 to 64 of A-Za-z0-9_-; new_key() makes one")
    return idempotency_key


def _hours(auto_release_hours: object) -> int:
    if type(auto_release_hours) is not int or auto_release_hours < 1:
        raise BadArgument("auto_release_hours is a whole number from 1, or None for no deadline")
    return auto_release_hours
