"""The escrow contract without a network: requests to be sent, and what their answers mean.

The rule kept here: both clients send the same bytes and read the same answers, since neither of
them writes or reads any. A shell is given a `Look` or a `Move`, carries it to the service, and
hands what came of it (`Received`, or `Lost`) to its `read`, which returns or raises one of
`meterd.sdk.errors`.

How an answer is read is `meterd.escrow.outcomes`'s: the daemon and this client never disagree about
what was paid.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Generic, NoReturn, TypeVar
from urllib.parse import quote

from meterd.core.money import format_amount
from meterd.core.settlement import Answer, AnswerKind, Reading, Release, ReleaseStatus
from meterd.errors import ConfigurationError
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
from meterd.escrow.line import AGENT_ID, ServiceApi, wall_ms
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

TIMEOUT_S = 30.0  # As in the daemon.
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
class Look(Generic[T]):
    """A GET behind the service's address, and how its answer is read.

    read  gives what the answer means, or raises one of `meterd.sdk.errors`.
    """

    path: str
    query: Mapping[str, str]
    read: Callable[[Received | Lost], T]


@dataclass(frozen=True, slots=True)
class Move(Generic[T]):
    """A POST that moves money, to be put once; `read` is that of a `Look`."""

    path: str
    document: Mapping[str, object]
    key: str
    read: Callable[[Received | Lost], T]


@dataclass(frozen=True, slots=True)
class _Intent:
    """What a call is to move, for its errors. `micros` is None for everything that is left."""

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
# Requests


class Contract:
    """The contract as one service speaks it: where it is, and with which key.

    Raises `BadArgument` for an address to which no key may be sent: https is wanted, http for
    loopback alone.
    """

    def __init__(self, base_url: str, api_key: str, timeout_s: float) -> None:
        if not isinstance(base_url, str) or not isinstance(api_key, str):
            raise BadArgument("base_url and api_key are texts")
        if not timeout_s > 0:
            raise BadArgument("timeout_s must be more than 0 seconds")
        try:
            self.api = ServiceApi(base_url, api_key, request_timeout_s=timeout_s)
        except ConfigurationError as error:
            said = "; ".join(f"{m.key.rpartition('.')[2]} {m.message}" for m in error.mistakes)
            raise BadArgument(said) from None
        self.mask = Mask(api_key)

    def lock(
        self,
        to: str,
        amount: Amount,
        memo: str,
        auto_release_hours: int | None,
        idempotency_key: str | None,
    ) -> Move[Escrow]:
        """`POST /escrow`."""
        micros = micros_to_lock(amount)
        body: dict[str, object] = {
            "to_agent_id": _agent(to, "to"),
            "amount": format_amount(micros),
            "memo": self._memo(memo),
        }
        if auto_release_hours is not None:
            body["auto_release_hours"] = _hours(auto_release_hours)
        intent = _Intent("lock", None, micros, _key(idempotency_key), memo)
        wanted = Wanted(to, micros, memo)
        return self._move("/escrow", body, intent, lambda came: self._locked(intent, wanted, came))

    def release_partial(
        self,
        escrow_id: str,
        amount: Amount,
        memo: str | None,
        idempotency_key: str | None,
        released_before: Amount | None,
    ) -> Move[Done]:
        """`POST /escrow/:id/release-partial`."""
        micros = micros_of(amount)
        intent = _Intent("release_partial", _id(escrow_id), micros, _key(idempotency_key))
        before = None if released_before is None else figure_of(released_before)
        body = {"amount": format_amount(micros), "memo": self._release_memo(memo, intent)}
        return self._move(
            f"{_path(escrow_id)}/release-partial",
            body,
            intent,
            lambda came: self._released_part(intent, before, came),
        )

    def release_all(self, escrow_id: str, idempotency_key: str | None) -> Move[Done]:
        """`POST /escrow/:id/release`."""
        intent = _Intent("release_all", _id(escrow_id), None, _key(idempotency_key))
        return self._move(
            f"{_path(escrow_id)}/release", {}, intent, lambda came: self._released_all(intent, came)
        )

    def refund_part(
        self, escrow_id: str, amount: Amount, idempotency_key: str | None
    ) -> Move[Done]:
        """`POST /escrow/:id/refund` with an amount."""
        micros = micros_of(amount)
        intent = _Intent("refund_part", _id(escrow_id), micros, _key(idempotency_key))
        body = {"amount": format_amount(micros)}
        return self._move(
            f"{_path(escrow_id)}/refund", body, intent, lambda came: self._refunded(intent, came)
        )

    def refund_all(self, escrow_id: str, idempotency_key: str | None) -> Move[Done]:
        """`POST /escrow/:id/refund` without an amount."""
        intent = _Intent("refund_all", _id(escrow_id), None, _key(idempotency_key))
        return self._move(
            f"{_path(escrow_id)}/refund", {}, intent, lambda came: self._refunded(intent, came)
        )

    def status(self, escrow_id: str) -> Look[Escrow]:
        """`GET /escrow/:id`."""
        _id(escrow_id)
        return Look(_path(escrow_id), {}, lambda came: self._status(escrow_id, came))

    def list(self, agent_id: str) -> Walk:
        """`GET /escrow?agent_id=`, page by page."""
        _agent(agent_id, "agent_id")
        query = {"agent_id": agent_id, "limit": str(PAGE_ESCROWS)}

        def page(cursor: str | None) -> Look[Page]:
            at = query if cursor is None else query | {"cursor": cursor}
            return Look("/escrow", at, self._page)

        return Walk(page)

    def _move(
        self,
        path: str,
        document: Mapping[str, object],
        intent: _Intent,
        read: Callable[[Received], T],
    ) -> Move[T]:
        def answered(came: Received | Lost) -> T:
            if isinstance(came, Received):
                return read(came)
            if came.left:
                raise intent.doubt(f"no answer: {came.flaw}")
            raise NotSent(f"{intent} was not sent: {came.flaw}; ask again, with the same key")

        return Move(path, document, intent.key, answered)

    def _memo(self, memo: object) -> str:
        if not isinstance(memo, str) or not memo or self.mask.excerpt(memo) != memo:
            raise BadArgument(
                f"memo must be a text of 1 to {MEMO_CHARS_MAX} printable characters, without "
                "blanks at its ends or two in a row, and without the API key: "
                "it is how the escrow is found again"
            )
        return memo

    def _release_memo(self, memo: str | None, intent: _Intent) -> str:
        """The caller's, or one by which the service's history shows the key."""
        if memo is None:
            return f"{MEMO_PREFIX}{intent.key}"
        if self._memo(memo).startswith(MEMO_PREFIX):
            raise BadArgument(
                f"memo must not begin with {MEMO_PREFIX!r}: that is how meterd marks its own"
            )
        return memo

    # -- Answers to what moves money ---------------------------------------------------------------

    def _locked(self, intent: _Intent, wanted: Wanted, came: Received) -> Escrow:
        found = answer_to_create(wanted, came, self.mask, 0.0, wall_ms())
        if isinstance(found, CreateFailed):
            self._fail(intent, came, found)
        return _shown(found.escrow)

    def _released_part(self, intent: _Intent, before: int | None, came: Received) -> Done:
        """Done: the answer names the amount or the key, or its total is what was to be expected."""
        assert intent.escrow_id is not None
        assert intent.micros is not None
        answer = answer_to_release(_as_release(intent, before), came, self.mask, wall_ms())
        if answer.kind is not AnswerKind.CONFIRMED:
            self._fail(intent, came, answer)
        expected = None if before is None else before + intent.micros
        if answer.released is not None and answer.released < intent.micros:
            raise intent.doubt(f"{answer.detail}: less than was asked", status=came.status)
        if answer.amount is None and expected is None:
            raise intent.doubt(
                f"{answer.detail}, which does not show this release: hand over released_before",
                status=came.status,
            )
        if answer.amount is None and answer.released != expected:
            raise intent.doubt(f"{answer.detail}: not what it was to be", status=came.status)
        return self._done(intent, came)

    def _released_all(self, intent: _Intent, came: Received) -> Done:
        assert intent.escrow_id is not None
        answer = answer_to_release_rest(intent.escrow_id, came, self.mask, wall_ms())
        if answer.kind is not AnswerKind.CONFIRMED:
            self._fail(intent, came, answer)
        return self._done(intent, came)

    def _refunded(self, intent: _Intent, came: Received) -> Done:
        """Done: the service took the request. It need not have sent anything back yet."""
        if not 200 <= came.status < 300:
            self._fail(intent, came, answer_to_refusal(came, self.mask, wall_ms()))
        try:
            _check_refund(intent, object_of(came))
        except Nonsense as error:
            detail = self.mask.excerpt(f"{came.status} {error}")
            raise intent.doubt(detail, status=came.status) from None
        return self._done(intent, came)

    def _done(self, intent: _Intent, came: Received) -> Done:
        assert intent.escrow_id is not None
        escrow = self._escrow(came)
        if escrow is not None and not _possible(escrow):
            raise intent.doubt(f"{came.status} its figures are impossible", status=came.status)
        return Done(intent.escrow_id, intent.amount, intent.key, escrow)

    def _fail(self, intent: _Intent, came: Received, failed: Answer | CreateFailed) -> NoReturn:
        """Raise what the kind of a failure stands for."""
        code = self._code(came)
        said = f"{intent} was refused: {failed.detail}"
        match failed.kind:
            case AnswerKind.DECLINED | AnswerKind.EMPTY | AnswerKind.FORBIDDEN:
                raise Refused(said, status=came.status, code=code)
            case AnswerKind.MISSING:
                raise NotFound(said, status=came.status, code=code)
            case AnswerKind.KEY_REFUSED:
                raise KeyRefused(f"{said}; check the API key", status=came.status, code=code)
            case AnswerKind.LIMITED:
                wait = failed.retry_after
                raise Limited(said, status=came.status, code=code, retry_after=wait)
            case AnswerKind.CONFLICT:
                raise intent.doubt(failed.detail, kind=Conflict, status=came.status, code=code)
            case _:
                raise intent.doubt(failed.detail, status=came.status, code=code)

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
        found = answer_to_read(came, self.mask, 0.0, wall_ms())
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
        found = answer_to_list(came, self.mask, 0.0, wall_ms())
        if isinstance(found, Unread):
            self._fail_to_read("list", came, found)
        return found

    def _fail_to_read(self, what: str, came: Received, found: Unread) -> NoReturn:
        code = self._code(came)
        said = f"{what}: {found.detail}"
        match found.kind:
            case "missing":
                raise NotFound(said, status=came.status, code=code)
            case "forbidden":
                raise Refused(said, status=came.status, code=code)
            case "key_refused":
                raise KeyRefused(f"{said}; check the API key", status=came.status, code=code)
            case "limited":
                wait = found.retry_after
                raise Limited(said, status=came.status, code=code, retry_after=wait)
            case _:
                raise Unavailable(said, status=came.status, code=code)

    def _escrow(self, came: Received) -> Escrow | None:
        """The escrow that a 2xx shows; None: it shows too little."""
        found = answer_to_read(replace(came, status=200), self.mask, 0.0, wall_ms())
        if isinstance(found, Unread):
            return None
        memo = unwrapped(object_of(came), "escrow").get("memo")
        return _shown(Listed(found, self.mask.excerpt(memo) if isinstance(memo, str) else None))


class Walk:
    """The way through a list: while there is a `look`, read it and `take` what came."""

    def __init__(self, page: Callable[[str | None], Look[Page]]) -> None:
        self._page = page
        self._pages = 0
        self._skipped = 0
        self._cursors: set[str] = set()
        self.look: Look[Page] | None = page(None)

    def take(self, page: Page) -> tuple[Escrow, ...]:
        """The escrows of a page. Raises `Unavailable` for a list that leads in a circle."""
        self._pages += 1
        self._skipped += page.skipped
        cursor = page.cursor
        if cursor is not None and (cursor in self._cursors or self._pages == PAGES_MAX):
            raise Unavailable("list: its pages have no end; no part of it can be relied on")
        self._cursors.add(cursor or "")
        self.look = None if cursor is None else self._page(cursor)
        return tuple(_shown(listed) for listed in page.escrows)

    def end(self) -> None:
        """Raise `Unavailable` when something was left out: a part is never taken for the whole."""
        if self._skipped:
            raise Unavailable(
                f"list: {self._skipped} of its entries make no sense; the others were handed over"
            )


# --------------------------------------------------------------------------------------------------
# Reading


def _as_release(intent: _Intent, before: int | None) -> Release:
    """The call as the reader of answers knows one; what it does not look at is empty."""
    assert intent.escrow_id is not None
    assert intent.micros is not None
    return Release(
        id=intent.key,
        escrow=intent.escrow_id,
        amount=intent.micros,
        before=before or 0,
        status=ReleaseStatus.SENT,
        why="",
        units=0,
        created_at=0,
        history=(),
    )


def _check_refund(intent: _Intent, document: Mapping[str, object]) -> None:
    """Raise `Nonsense` unless the body says of this escrow that its refund was taken."""
    body = unwrapped(document, "escrow")
    words_of_success(document, body)
    if named_text(body, "escrow") != intent.escrow_id:
        raise Nonsense("the body does not name the escrow")
    refund = document.get("refund")
    said = refund.get("amount") if isinstance(refund, dict) else None
    if intent.micros is not None and isinstance(said, str) and read_money(said) != intent.micros:
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


def _path(escrow_id: str) -> str:
    return f"/escrow/{quote(escrow_id, safe='')}"


def _id(escrow_id: object) -> str:
    if not isinstance(escrow_id, str) or ESCROW_ID.match(escrow_id) is None:
        raise BadArgument("an escrow's id is 1 to 64 of A-Za-z0-9_-, such as esc_1")
    return escrow_id


def _agent(agent_id: object, name: str) -> str:
    if not isinstance(agent_id, str) or AGENT_ID.match(agent_id) is None:
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
