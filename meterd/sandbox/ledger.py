"""The rules of the escrow service: who may move which money, and how things stand afterwards.

The rule kept here: decide is pure and returns either a `Change` or a `Refusal`; `apply` cannot
refuse. All money is in whole micros of USDC, time is in milliseconds since 1970 and is handed in.
Nothing here knows HTTP or the disk.

What every change keeps, and `apply` checks:

    amount  = released + refunded + remaining              for each escrow
    granted = wallets + remaining + fees                   for all of them together
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from meterd.core.money import MICROS, format_amount
from meterd.errors import InvariantBroken

ESCROW_MIN = MICROS  # The contract: an escrow holds at least 1 USDC.
AMOUNT_MAX = 10**9 * MICROS  # A thousand million USDC; every sum then fits SQLite's 64 bits.
SUPPLY_MAX = 10**12 * MICROS  # All the play money there may be, for the same reason.
FAUCET_GRANT = MICROS  # One free dollar for a new agent.
BPS = 10_000


class Status(StrEnum):
    """How an escrow stands, in the words of the wire."""

    FUNDED = "funded"
    PARTIALLY_RELEASED = "partially_released"
    DISPUTED = "disputed"
    RELEASED = "released"
    REFUNDED = "refunded"
    EXPIRED = "expired"


FINAL = frozenset({Status.RELEASED, Status.REFUNDED, Status.EXPIRED})


class Deadline(StrEnum):
    """Who gets the remainder when the deadline has passed: the provider or the creator."""

    RELEASE = "release"
    REFUND = "refund"


class Kind(StrEnum):
    """What an operation did; each of them moved money."""

    OPENING = "opening"
    FAUCET = "faucet"
    GRANT = "grant"
    DEBIT = "debit"
    CREATE = "create"
    RELEASE = "release"
    RELEASE_PARTIAL = "release_partial"
    REFUND = "refund"
    AUTO_RELEASE = "auto_release"
    AUTO_REFUND = "auto_refund"
    FOREIGN_RELEASE = "foreign_release"
    RESOLVED_RELEASE = "resolved_release"
    RESOLVED_REFUND = "resolved_refund"


GRANTS = frozenset({Kind.OPENING, Kind.FAUCET, Kind.GRANT})
RELEASES = frozenset(
    {
        Kind.RELEASE,
        Kind.RELEASE_PARTIAL,
        Kind.AUTO_RELEASE,
        Kind.FOREIGN_RELEASE,
        Kind.RESOLVED_RELEASE,
    }
)
REFUNDS = frozenset({Kind.REFUND, Kind.AUTO_REFUND, Kind.RESOLVED_REFUND})


class Code(StrEnum):
    """Why a request was refused, in the words of the wire's `error` field."""

    ESCROW_NOT_FOUND = "escrow_not_found"
    FORBIDDEN = "forbidden"
    AMOUNT_BELOW_MINIMUM = "amount_below_minimum"
    AMOUNT_TOO_LARGE = "amount_too_large"
    SAME_AGENT = "same_agent"
    INSUFFICIENT_FUNDS = "insufficient_funds"
    INSUFFICIENT_REMAINING = "insufficient_remaining"
    ALREADY_RELEASED = "already_released"
    ALREADY_REFUNDED = "already_refunded"
    ESCROW_EXPIRED = "escrow_expired"
    ESCROW_DISPUTED = "escrow_disputed"
    NOT_DISPUTED = "not_disputed"
    FAUCET_TAKEN = "faucet_taken"
    REPEATED = "repeated"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing was done, and why. The text is for people and never repeats what was sent."""

    code: Code
    text: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Who asks, what was written beside it, and what the asker got to see of the answer."""

    agent: str
    memo: str | None = None
    key: str | None = None
    outcome: str = "answered"


@dataclass(frozen=True, slots=True)
class Terms:
    """What the creator lays down for a new escrow.

    Amount in micros, deadline in milliseconds since 1970.
    """

    escrow_id: str
    provider: str
    amount: int
    deadline_ms: int | None
    on_deadline: Deadline


@dataclass(frozen=True, slots=True)
class Escrow:
    """One escrow as it stands.

    Amounts in micros. `released` is gross, `fee` is what was kept of it.
    """

    number: int  # 1, 2, 3 ... in order of creation.
    escrow_id: str
    creator: str
    provider: str
    amount: int
    status: Status
    memo: str | None
    created_ms: int
    deadline_ms: int | None
    on_deadline: Deadline
    released: int = 0
    refunded: int = 0
    fee: int = 0
    releases: int = 0  # How many releases there were.
    seq: int = 0  # The last operation on it.

    @property
    def remaining(self) -> int:
        """What is still held for the two parties, in micros."""
        return self.amount - self.released - self.refunded


@dataclass(frozen=True, slots=True)
class Operation:
    """One movement of money that took place.

    `gross` and `fee` in micros. These are the truth about what was paid.
    """

    seq: int  # 1, 2, 3 ... without a gap.
    time_ms: int
    kind: Kind
    escrow_id: str | None
    agent: str
    gross: int
    fee: int
    memo: str | None
    key: str | None
    outcome: str
    payee: str | None = None  # Of a debit alone.

    @property
    def place(self) -> str | None:
        """Where its key counts: in its escrow, with its payee for a debit; a creation has none."""
        return None if self.kind is Kind.CREATE else self.payee or self.escrow_id


@dataclass(frozen=True, slots=True)
class Wallet:
    """A wallet as it stands. `debited`: by payee, what each debited from it in all; in micros."""

    agent: str
    balance: int
    debited: Mapping[str, int]
    seq: int  # The last operation of all when it stood like this.


@dataclass(frozen=True, slots=True)
class Change:
    """What a decision does.

    The escrow and the wallets as they stand afterwards, and the movement if there is one.
    """

    escrow: Escrow | None
    wallets: Mapping[str, int] = field(default_factory=dict)
    operation: Operation | None = None
    debited: int = 0  # Of a debit: what its payee has debited from its payer in all.


Decision = Change | Refusal


@dataclass(slots=True)
class Books:
    """All that the service knows: balances and remainders in micros. Changed by `apply` alone."""

    fee_bps: int
    wallet_minimum: int = 0  # The smallest debit, in micros.
    escrows: dict[str, Escrow] = field(default_factory=dict)
    wallets: dict[str, int] = field(default_factory=dict)
    # By payer, then payee. An inner one is replaced, never changed: states of the past keep it.
    debited: dict[str, Mapping[str, int]] = field(default_factory=dict)
    faucet_taken: set[str] = field(default_factory=set)
    by_agent: dict[str, list[str]] = field(default_factory=dict)  # Escrow ids, oldest first.
    seq: int = 0
    supply: int = 0  # What was ever granted.


def grant(books: Books, gross: int, kind: Kind, ask: Ask, now_ms: int) -> Decision:
    """Make play money for the agent of `ask`; the faucet gives to each agent once."""
    agent = ask.agent
    if kind is Kind.FAUCET and agent in books.faucet_taken:
        return Refusal(Code.FAUCET_TAKEN, "the faucet gives to each agent once")
    if books.supply + gross > SUPPLY_MAX:
        return Refusal(Code.AMOUNT_TOO_LARGE, "there is no more play money")
    wallets = {agent: books.wallets.get(agent, 0) + gross}
    operation = _operation(books, ask, now_ms, kind=kind, gross=gross)
    return Change(None, wallets, operation)


def debit(books: Books, payee: str, gross: int, ask: Ask, now_ms: int) -> Decision:
    """Move an amount from the wallet of `ask.agent` to another, at once and without a fee."""
    payer = ask.agent
    if payer == payee:
        return Refusal(Code.SAME_AGENT, "an agent cannot pay itself")
    if gross < books.wallet_minimum:
        least = format_amount(books.wallet_minimum)
        return Refusal(Code.AMOUNT_BELOW_MINIMUM, f"a debit is of at least {least} USDC")
    if gross > books.wallets.get(payer, 0):
        return Refusal(Code.INSUFFICIENT_FUNDS, "the wallet holds less than this amount")
    wallets = {
        payer: books.wallets[payer] - gross,
        payee: books.wallets.get(payee, 0) + gross,
    }
    operation = _operation(books, ask, now_ms, kind=Kind.DEBIT, gross=gross, payee=payee)
    return Change(None, wallets, operation, debited(books, payer, payee) + gross)


def debited(books: Books, payer: str, payee: str) -> int:
    """What a payee has debited from a payer in all, in micros."""
    return books.debited.get(payer, {}).get(payee, 0)


def wallet(books: Books, agent: str) -> Wallet:
    """The wallet of an agent whom the books know."""
    return Wallet(agent, books.wallets[agent], books.debited.get(agent, {}), books.seq)


def create(books: Books, terms: Terms, ask: Ask, now_ms: int) -> Decision:
    """Lock an amount out of the asker's wallet for the provider."""
    if terms.amount < ESCROW_MIN:
        return Refusal(Code.AMOUNT_BELOW_MINIMUM, "an escrow holds at least 1.00 USDC")
    if terms.provider == ask.agent:
        return Refusal(Code.SAME_AGENT, "creator and provider must be two agents")
    if terms.amount > books.wallets.get(ask.agent, 0):
        return Refusal(Code.INSUFFICIENT_FUNDS, "the wallet holds less than this amount")
    escrow = Escrow(
        number=len(books.escrows) + 1,
        escrow_id=terms.escrow_id,
        creator=ask.agent,
        provider=terms.provider,
        amount=terms.amount,
        status=Status.FUNDED,
        memo=ask.memo,
        created_ms=now_ms,
        deadline_ms=terms.deadline_ms,
        on_deadline=terms.on_deadline,
        seq=books.seq + 1,
    )
    wallets = {ask.agent: books.wallets[ask.agent] - terms.amount}
    operation = _operation(
        books, ask, now_ms, kind=Kind.CREATE, gross=terms.amount, escrow_id=escrow.escrow_id
    )
    return Change(escrow, wallets, operation)


def release_all(books: Books, escrow_id: str, ask: Ask, now_ms: int) -> Decision:
    """Pay the whole remainder to the provider."""
    escrow = _open_to(books, escrow_id, ask.agent)
    if isinstance(escrow, Refusal):
        return escrow
    return _release(books, escrow, escrow.remaining, ask, now_ms, kind=Kind.RELEASE)


def release_part(books: Books, escrow_id: str, gross: int, ask: Ask, now_ms: int) -> Decision:
    """Pay an amount, in micros and greater than 0, to the provider."""
    escrow = _open_to(books, escrow_id, ask.agent)
    if isinstance(escrow, Refusal):
        return escrow
    if gross > escrow.remaining:
        return Refusal(Code.INSUFFICIENT_REMAINING, "the escrow holds less than this amount")
    return _release(books, escrow, gross, ask, now_ms, kind=Kind.RELEASE_PARTIAL)


def refund_all(books: Books, escrow_id: str, ask: Ask, now_ms: int) -> Decision:
    """Give the whole remainder back to the creator."""
    escrow = _open_to(books, escrow_id, ask.agent)
    if isinstance(escrow, Refusal):
        return escrow
    return _refund(books, escrow, escrow.remaining, ask, now_ms, kind=Kind.REFUND)


def refund_part(books: Books, escrow_id: str, gross: int, ask: Ask, now_ms: int) -> Decision:
    """Give an amount, in micros and greater than 0, back to the creator."""
    escrow = _open_to(books, escrow_id, ask.agent)
    if isinstance(escrow, Refusal):
        return escrow
    if gross > escrow.remaining:
        return Refusal(Code.INSUFFICIENT_REMAINING, "the escrow holds less than this amount")
    return _refund(books, escrow, gross, ask, now_ms, kind=Kind.REFUND)


def dispute(books: Books, escrow_id: str, ask: Ask) -> Decision:
    """Stop every movement of this escrow, its deadline too, until the dispute is resolved."""
    escrow = _open_to(books, escrow_id, ask.agent)
    if isinstance(escrow, Refusal):
        return escrow
    return Change(replace(escrow, status=Status.DISPUTED))


def resolve_release(books: Books, escrow_id: str, ask: Ask, now_ms: int) -> Decision:
    """End a dispute for the provider, who gets the remainder."""
    escrow = _disputed(books, escrow_id, ask.agent)
    if isinstance(escrow, Refusal):
        return escrow
    return _release(books, escrow, escrow.remaining, ask, now_ms, kind=Kind.RESOLVED_RELEASE)


def resolve_refund(books: Books, escrow_id: str, ask: Ask, now_ms: int) -> Decision:
    """End a dispute for the creator, who gets the remainder back."""
    escrow = _disputed(books, escrow_id, ask.agent)
    if isinstance(escrow, Refusal):
        return escrow
    return _refund(books, escrow, escrow.remaining, ask, now_ms, kind=Kind.RESOLVED_REFUND)


def resolve_resume(books: Books, escrow_id: str, ask: Ask) -> Decision:
    """End a dispute and let the escrow go on as before."""
    escrow = _disputed(books, escrow_id, ask.agent)
    if isinstance(escrow, Refusal):
        return escrow
    status = Status.PARTIALLY_RELEASED if escrow.released else Status.FUNDED
    return Change(replace(escrow, status=status))


def reach_deadline(
    books: Books, escrow_id: str, direction: Deadline, ask: Ask, now_ms: int
) -> Decision:
    """Pay out the remainder as the deadline says.

    Refused when the escrow has ended or is disputed.
    """
    escrow = _open(books, escrow_id)
    if isinstance(escrow, Refusal):
        return escrow
    if direction is Deadline.RELEASE:
        return _release(books, escrow, escrow.remaining, ask, now_ms, kind=Kind.AUTO_RELEASE)
    return _refund(books, escrow, escrow.remaining, ask, now_ms, kind=Kind.AUTO_REFUND)


def release_by_other(
    books: Books, escrow_id: str, gross: int | None, ask: Ask, now_ms: int
) -> Decision:
    """Pay an amount (None: the remainder) to the provider as if somebody else had asked."""
    escrow = _open(books, escrow_id)
    if isinstance(escrow, Refusal):
        return escrow
    amount = escrow.remaining if gross is None else gross
    if amount > escrow.remaining:
        return Refusal(Code.INSUFFICIENT_REMAINING, "the escrow holds less than this amount")
    return _release(books, escrow, amount, ask, now_ms, kind=Kind.FOREIGN_RELEASE)


def apply(books: Books, change: Change) -> None:
    """Bring a decided change into the books.

    Raises `InvariantBroken` when money would appear or vanish.
    """
    before = _held(books, change)
    operation, escrow = change.operation, change.escrow
    if operation is not None:
        _apply_operation(books, operation)
    if escrow is not None:
        _apply_escrow(books, escrow)
    books.wallets.update(change.wallets)
    granted = operation.gross if operation is not None and operation.kind in GRANTS else 0
    if _held(books, change) != before + granted:
        raise InvariantBroken("a change of the sandbox makes or loses money")


def _apply_operation(books: Books, operation: Operation) -> None:
    if operation.seq != books.seq + 1:
        raise InvariantBroken("the sandbox's operations are out of order")
    books.seq = operation.seq
    if operation.kind in GRANTS:
        books.supply += operation.gross
    if operation.kind is Kind.FAUCET:
        books.faucet_taken.add(operation.agent)
    if operation.payee is not None:
        payer, payee = operation.agent, operation.payee
        level = debited(books, payer, payee) + operation.gross
        books.debited[payer] = {**books.debited.get(payer, {}), payee: level}


def _apply_escrow(books: Books, escrow: Escrow) -> None:
    if min(escrow.released, escrow.refunded, escrow.remaining, escrow.fee) < 0:
        raise InvariantBroken("an escrow of the sandbox holds less than nothing")
    if escrow.escrow_id not in books.escrows:
        for agent in (escrow.creator, escrow.provider):
            books.by_agent.setdefault(agent, []).append(escrow.escrow_id)
    books.escrows[escrow.escrow_id] = escrow


def _held(books: Books, change: Change) -> int:
    """What the places that the change touches hold together.

    Wallets, the escrow's remainder and its fees.
    """
    held = sum(books.wallets.get(agent, 0) for agent in change.wallets)
    if change.escrow is not None:
        escrow = books.escrows.get(change.escrow.escrow_id)
        held += escrow.remaining + escrow.fee if escrow is not None else 0
    return held


_ENDED: Mapping[Status, Refusal] = {
    Status.RELEASED: Refusal(Code.ALREADY_RELEASED, "the escrow was released"),
    Status.REFUNDED: Refusal(Code.ALREADY_REFUNDED, "the escrow was refunded"),
    Status.EXPIRED: Refusal(Code.ESCROW_EXPIRED, "the escrow's deadline has passed"),
    Status.DISPUTED: Refusal(Code.ESCROW_DISPUTED, "the escrow is disputed"),
}


def _party(books: Books, escrow_id: str, agent: str) -> Escrow | Refusal:
    escrow = books.escrows.get(escrow_id)
    if escrow is None:
        return Refusal(Code.ESCROW_NOT_FOUND, "there is no such escrow")
    if agent not in (escrow.creator, escrow.provider):
        return Refusal(Code.FORBIDDEN, "this key belongs to neither party of the escrow")
    return escrow


def _open(books: Books, escrow_id: str) -> Escrow | Refusal:
    escrow = books.escrows.get(escrow_id)
    if escrow is None:
        return Refusal(Code.ESCROW_NOT_FOUND, "there is no such escrow")
    return _ENDED.get(escrow.status, escrow)


def _open_to(books: Books, escrow_id: str, agent: str) -> Escrow | Refusal:
    escrow = _party(books, escrow_id, agent)
    return escrow if isinstance(escrow, Refusal) else _ENDED.get(escrow.status, escrow)


def _disputed(books: Books, escrow_id: str, agent: str) -> Escrow | Refusal:
    escrow = _party(books, escrow_id, agent)
    if isinstance(escrow, Escrow) and escrow.status is not Status.DISPUTED:
        return Refusal(Code.NOT_DISPUTED, "the escrow is not disputed")
    return escrow


def readable(books: Books, escrow_id: str, agent: str) -> Escrow | Refusal:
    """The escrow, if this agent is a party of it."""
    return _party(books, escrow_id, agent)


def _release(
    books: Books, escrow: Escrow, gross: int, ask: Ask, now_ms: int, *, kind: Kind
) -> Change:
    """The provider gets the gross amount less the fee, rounded down to a micro."""
    fee = gross * books.fee_bps // BPS
    after = replace(
        escrow,
        released=escrow.released + gross,
        fee=escrow.fee + fee,
        status=Status.RELEASED if gross == escrow.remaining else Status.PARTIALLY_RELEASED,
        releases=escrow.releases + 1,
        seq=books.seq + 1,
    )
    wallets = {escrow.provider: books.wallets.get(escrow.provider, 0) + gross - fee}
    operation = _operation(
        books, ask, now_ms, kind=kind, gross=gross, fee=fee, escrow_id=escrow.escrow_id
    )
    return Change(after, wallets, operation)


def _refund(
    books: Books, escrow: Escrow, gross: int, ask: Ask, now_ms: int, *, kind: Kind
) -> Change:
    """The creator gets the amount back; a part of the remainder leaves the status as it is."""
    ended = Status.EXPIRED if kind is Kind.AUTO_REFUND else Status.REFUNDED
    after = replace(
        escrow,
        refunded=escrow.refunded + gross,
        status=ended if gross == escrow.remaining else escrow.status,
        seq=books.seq + 1,
    )
    wallets = {escrow.creator: books.wallets.get(escrow.creator, 0) + gross}
    operation = _operation(books, ask, now_ms, kind=kind, gross=gross, escrow_id=escrow.escrow_id)
    return Change(after, wallets, operation)


def _operation(
    books: Books,
    ask: Ask,
    now_ms: int,
    *,
    kind: Kind,
    gross: int,
    fee: int = 0,
    escrow_id: str | None = None,
    payee: str | None = None,
) -> Operation:
    return Operation(
        seq=books.seq + 1,
        time_ms=now_ms,
        kind=kind,
        escrow_id=escrow_id,
        agent=ask.agent,
        gross=gross,
        fee=fee,
        memo=ask.memo,
        key=ask.key,
        outcome=ask.outcome,
        payee=payee,
    )


Act = Callable[[str, int], Decision]
"""A request that was read and waits to be decided.

Called with the outcome to note and with `now_ms`.
"""
