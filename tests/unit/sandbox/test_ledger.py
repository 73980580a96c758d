"""The rules of the escrow: conservation under any order of requests, and who is refused what."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meterd.core.money import MICROS
from meterd.errors import InvariantBroken
from meterd.sandbox import ledger
from meterd.sandbox.ledger import (
    Ask,
    Books,
    Change,
    Code,
    Deadline,
    Escrow,
    Kind,
    Refusal,
    Status,
    Terms,
)

PAYER, PROVIDER, STRANGER = "payer", "provider", "stranger"
NOW_MS = 1_800_000_000_000


def funded(amount: int = 10 * MICROS) -> Books:
    """Books with one escrow, `e1`, of this amount and 90 USDC left in the payer's wallet."""
    books = Books(fee_bps=100)
    granted = ledger.grant(books, amount + 90 * MICROS, Kind.OPENING, Ask(PAYER), NOW_MS)
    assert isinstance(granted, Change)
    ledger.apply(books, granted)
    made = ledger.create(books, terms(amount), Ask(PAYER), NOW_MS)
    assert isinstance(made, Change)
    ledger.apply(books, made)
    return books


def terms(amount: int, escrow_id: str = "e1") -> Terms:
    return Terms(escrow_id, PROVIDER, amount, None, Deadline.RELEASE)


def done(books: Books, decision: Change | Refusal) -> Escrow:
    assert isinstance(decision, Change), decision
    ledger.apply(books, decision)
    assert decision.escrow is not None
    return decision.escrow


def test_a_release_pays_the_provider_the_amount_less_one_percent():
    """Released is gross; the fee is taken from the payee."""
    books = funded()

    escrow = done(books, ledger.release_part(books, "e1", 1_000_000, Ask(PROVIDER), NOW_MS))

    assert (escrow.released, escrow.fee) == (1_000_000, 10_000)
    assert books.wallets[PROVIDER] == 990_000


def test_a_release_of_a_single_micro_costs_no_fee():
    """A fee is rounded down, never up to more than its share."""
    books = funded()

    escrow = done(books, ledger.release_part(books, "e1", 1, Ask(PROVIDER), NOW_MS))

    assert (escrow.released, escrow.fee, books.wallets[PROVIDER]) == (1, 0, 1)


def test_parts_that_add_up_to_the_amount_end_the_escrow_as_released():
    """The last micro changes the status, not an earlier one."""
    books = funded(2 * MICROS)

    first = done(books, ledger.release_part(books, "e1", 1_999_999, Ask(PAYER), NOW_MS))
    last = done(books, ledger.release_part(books, "e1", 1, Ask(PAYER), NOW_MS))

    assert (first.status, last.status) == (Status.PARTIALLY_RELEASED, Status.RELEASED)


def test_a_partial_refund_leaves_the_status_and_a_full_one_ends_the_escrow():
    """A refund of a part is no end."""
    books = funded()

    part = done(books, ledger.refund_part(books, "e1", 1 * MICROS, Ask(PAYER), NOW_MS))
    rest = done(books, ledger.refund_all(books, "e1", Ask(PAYER), NOW_MS))

    assert (part.status, rest.status) == (Status.FUNDED, Status.REFUNDED)
    assert rest.refunded == 10 * MICROS


@pytest.mark.parametrize(
    ("direction", "status", "to_provider"),
    [
        (Deadline.RELEASE, Status.RELEASED, 9_900_000),
        (Deadline.REFUND, Status.EXPIRED, 0),
    ],
)
def test_a_deadline_pays_out_the_remainder_as_it_says(direction, status, to_provider):
    """One direction pays the provider less the fee, the other gives everything back."""
    books = funded()

    escrow = done(books, ledger.reach_deadline(books, "e1", direction, Ask("service"), NOW_MS))

    assert (escrow.status, escrow.remaining) == (status, 0)
    assert books.wallets.get(PROVIDER, 0) == to_provider


def test_a_resumed_dispute_goes_on_where_it_stood():
    """Before the first release that is funded, later partially released."""
    books = funded()
    done(books, ledger.release_part(books, "e1", 5, Ask(PAYER), NOW_MS))
    done(books, ledger.dispute(books, "e1", Ask(PAYER)))

    resumed = done(books, ledger.resolve_resume(books, "e1", Ask(PAYER)))

    assert resumed.status is Status.PARTIALLY_RELEASED


REFUSED = [
    (
        "below 1 USDC",
        Code.AMOUNT_BELOW_MINIMUM,
        lambda b, a: ledger.create(b, terms(999_999), a, 0),
    ),
    (
        "an empty wallet",
        Code.INSUFFICIENT_FUNDS,
        lambda b, a: ledger.create(b, terms(10**12), a, 0),
    ),
    ("unknown escrow", Code.ESCROW_NOT_FOUND, lambda b, a: ledger.release_part(b, "no", 1, a, 0)),
    (
        "more than remaining",
        Code.INSUFFICIENT_REMAINING,
        lambda b, a: ledger.release_part(b, "e1", 10 * MICROS + 1, a, 0),
    ),
    (
        "refund of more than remaining",
        Code.INSUFFICIENT_REMAINING,
        lambda b, a: ledger.refund_part(b, "e1", 10 * MICROS + 1, a, 0),
    ),
    ("no dispute to resolve", Code.NOT_DISPUTED, lambda b, a: ledger.resolve_resume(b, "e1", a)),
    ("paying itself", Code.SAME_AGENT, lambda b, a: ledger.debit(b, PAYER, 1, a, 0)),
    ("debit of too much", Code.INSUFFICIENT_FUNDS, lambda b, a: ledger.debit(b, "x", 10**12, a, 0)),
]


@pytest.mark.parametrize(("code", "ask"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_request_against_the_rules_is_refused_and_changes_nothing(code, ask):
    """A refusal names its code and moves nothing."""
    books = funded()
    before = (dict(books.wallets), dict(books.escrows), books.seq)

    decision = ask(books, Ask(PAYER))

    assert isinstance(decision, Refusal)
    assert decision.code == code
    assert (books.wallets, books.escrows, books.seq) == before


def test_a_stranger_may_do_nothing_with_an_escrow():
    """Only its two parties may release, refund, dispute or read it."""
    books = funded()
    stranger = Ask(STRANGER)

    answers = [
        ledger.release_all(books, "e1", stranger, 0),
        ledger.release_part(books, "e1", 1, stranger, 0),
        ledger.refund_all(books, "e1", stranger, 0),
        ledger.dispute(books, "e1", stranger),
        ledger.readable(books, "e1", STRANGER),
    ]

    assert [a.code for a in answers if isinstance(a, Refusal)] == [Code.FORBIDDEN] * 5


ENDS = {
    Code.ALREADY_RELEASED: lambda b: ledger.release_all(b, "e1", Ask(PAYER), 0),
    Code.ALREADY_REFUNDED: lambda b: ledger.refund_all(b, "e1", Ask(PAYER), 0),
    Code.ESCROW_EXPIRED: lambda b: ledger.reach_deadline(b, "e1", Deadline.REFUND, Ask("s"), 0),
    Code.ESCROW_DISPUTED: lambda b: ledger.dispute(b, "e1", Ask(PAYER)),
}


@pytest.mark.parametrize("code", ENDS)
def test_an_ended_or_disputed_escrow_moves_no_more_money(code):
    """Whoever asks, the answer tells how the escrow ended."""
    books = funded()
    done(books, ENDS[code](books))

    answers = [
        ledger.release_part(books, "e1", 1, Ask(PROVIDER), 0),
        ledger.release_by_other(books, "e1", 1, Ask("service"), 0),
        ledger.refund_all(books, "e1", Ask(PAYER), 0),
    ]

    assert [code] * 3 == [a.code for a in answers if isinstance(a, Refusal)]


def test_a_change_that_makes_money_is_no_change():
    """The books check conservation themselves and do not go on without it."""
    books = funded()

    with pytest.raises(InvariantBroken):
        ledger.apply(books, Change(None, {PAYER: 10**15}))


AMOUNTS = st.integers(1, 30 * MICROS)
WHO = st.sampled_from([PAYER, PROVIDER, STRANGER])


class AnyOrder(RuleBasedStateMachine):
    """Any requests in any order: no money appears, none vanishes."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(fee_bps=100)
        self.released: dict[str, int] = {}

    def tried(self, decision: Change | Refusal) -> None:
        if isinstance(decision, Refusal):
            return
        ledger.apply(self.books, decision)
        operation = decision.operation
        if operation is not None and operation.kind in ledger.RELEASES:
            assert operation.escrow_id is not None
            so_far = self.released.get(operation.escrow_id, 0)
            self.released[operation.escrow_id] = so_far + operation.gross

    def any_id(self, pick: int) -> str:
        ids = list(self.books.escrows)
        return ids[pick % len(ids)] if ids else "none"

    @initialize(fee=st.integers(0, 10_000), money=st.integers(0, 300 * MICROS))
    def opens(self, fee, money):
        self.books.fee_bps = fee
        self.tried(ledger.grant(self.books, money + 1, Kind.OPENING, Ask(PAYER), 0))

    @rule(who=WHO)
    def faucet(self, who):
        self.tried(ledger.grant(self.books, ledger.FAUCET_GRANT, Kind.FAUCET, Ask(who), 0))

    @rule(amount=AMOUNTS, who=WHO)
    def create(self, amount, who):
        wanted = terms(amount, f"e{len(self.books.escrows)}")
        self.tried(ledger.create(self.books, wanted, Ask(who), 0))

    @rule(pick=st.integers(0, 9), amount=AMOUNTS, who=WHO)
    def release_part(self, pick, amount, who):
        self.tried(ledger.release_part(self.books, self.any_id(pick), amount, Ask(who), 0))

    @rule(pick=st.integers(0, 9), amount=AMOUNTS, who=WHO)
    def refund_part(self, pick, amount, who):
        self.tried(ledger.refund_part(self.books, self.any_id(pick), amount, Ask(who), 0))

    @rule(pick=st.integers(0, 9), who=WHO, release=st.booleans())
    def everything(self, pick, who, release):
        act = ledger.release_all if release else ledger.refund_all
        self.tried(act(self.books, self.any_id(pick), Ask(who), 0))

    @rule(pick=st.integers(0, 9), who=WHO)
    def dispute(self, pick, who):
        self.tried(ledger.dispute(self.books, self.any_id(pick), Ask(who)))

    @rule(pick=st.integers(0, 9), who=WHO, how=st.sampled_from(["release", "refund", "resume"]))
    def resolve(self, pick, who, how):
        escrow_id, ask = self.any_id(pick), Ask(who)
        if how == "resume":
            self.tried(ledger.resolve_resume(self.books, escrow_id, ask))
            return
        act = ledger.resolve_release if how == "release" else ledger.resolve_refund
        self.tried(act(self.books, escrow_id, ask, 0))

    @rule(pick=st.integers(0, 9), direction=st.sampled_from(Deadline))
    def deadline(self, pick, direction):
        escrow_id = self.any_id(pick)
        self.tried(ledger.reach_deadline(self.books, escrow_id, direction, Ask("service"), 0))

    @rule(pick=st.integers(0, 9), amount=st.none() | AMOUNTS)
    def foreign(self, pick, amount):
        escrow_id = self.any_id(pick)
        self.tried(ledger.release_by_other(self.books, escrow_id, amount, Ask("service"), 0))

    @rule(payer=WHO, payee=WHO, amount=AMOUNTS)
    def debit(self, payer, payee, amount):
        self.tried(ledger.debit(self.books, payee, amount, Ask(payer), 0))

    @invariant()
    def each_escrow_adds_up(self):
        for escrow in self.books.escrows.values():
            parts = (escrow.released, escrow.refunded, escrow.remaining)
            assert min(parts) >= 0
            assert sum(parts) == escrow.amount
            assert escrow.released == self.released.get(escrow.escrow_id, 0)
            assert (escrow.remaining == 0) == (escrow.status in ledger.FINAL)

    @invariant()
    def everything_granted_is_somewhere(self):
        books = self.books
        held = sum(books.wallets.values())
        held += sum(escrow.remaining + escrow.fee for escrow in books.escrows.values())
        assert held == books.supply
        assert all(balance >= 0 for balance in books.wallets.values())


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_debit_raises_the_level_of_its_payee_alone():
    """What one payee took from a payer says nothing of another."""
    books = funded()
    for payee, gross in ((PROVIDER, 3), ("other", 5), (PROVIDER, 4)):
        change = ledger.debit(books, payee, gross, Ask(PAYER), NOW_MS)
        assert isinstance(change, Change)
        ledger.apply(books, change)
        assert change.debited == ledger.debited(books, PAYER, payee)

    wallet = ledger.wallet(books, PAYER)
    assert (dict(wallet.debited), wallet.balance) == ({PROVIDER: 7, "other": 5}, 90 * MICROS - 12)


def test_a_state_of_a_wallet_does_not_change_with_the_next_debit():
    """A reading of the past stays what it was."""
    books = funded()
    before = ledger.wallet(books, PAYER)
    change = ledger.debit(books, PROVIDER, 3, Ask(PAYER), NOW_MS)
    assert isinstance(change, Change)
    ledger.apply(books, change)

    assert (dict(before.debited), before.balance) == ({}, 90 * MICROS)


def test_a_debit_below_the_minimum_is_refused():
    """The minimum itself is enough."""
    books = funded()
    books.wallet_minimum = 10

    refused = ledger.debit(books, PROVIDER, 9, Ask(PAYER), NOW_MS)

    assert isinstance(refused, Refusal)
    assert refused.code is Code.AMOUNT_BELOW_MINIMUM
    assert isinstance(ledger.debit(books, PROVIDER, 10, Ask(PAYER), NOW_MS), Change)
