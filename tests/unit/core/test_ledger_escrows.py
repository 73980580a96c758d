"""Several escrows of one role: who owes what, whatever usage, releases and the service do."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meterd.core.accounts import Agreement, capacity, paid
from meterd.core.ledger import Ledger
from meterd.core.money import PICOS
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Rate, RateCard
from meterd.core.settlement import EscrowStatus, Release, ReleaseStatus
from tests.unit.core.books import METERS, NOW, Till, usage

# 0.0000004 a token: usage leaves a rest below a micro behind.
PLAN = Plan("p", Pattern.STREAMING, RateCard((Rate("tokens", 4 * PICOS // 10**7),)))
ONE = Plan("one", Pattern.STREAMING, RateCard((Rate("tokens", PICOS // 10**6),)))


class Escrows(RuleBasedStateMachine):
    """Usage, releases in any state, strangers, refunds and new escrows, in any order."""

    @initialize(total=st.integers(0, 40))
    def open(self, total):
        """The first escrow."""
        self.till = Till(Ledger({"p": PLAN}, METERS))
        self.books = self.till.books
        self.number = self.events = 0
        self.foreign = 0
        self.bind(total)

    @property
    def account(self):
        return self.books.accounts["a"]

    @property
    def escrows(self):
        return list(self.books.escrows_of(self.account))

    def one(self, place):
        return self.escrows[place % len(self.escrows)]

    def put(self, escrow, **changes):
        self.books.put(replace(escrow, **changes))

    @rule(total=st.integers(0, 40))
    def bind(self, total):
        """The payer locks another escrow."""
        self.number += 1
        name = f"esc_{self.number}"
        known = self.books.accounts["a"].agreement.escrows if self.number > 1 else ()
        self.books.bind(Agreement("a", "p", "payer", (*known, ("main", name))), NOW)
        self.put(
            self.books.escrows[name],
            status=EscrowStatus.ACTIVE,
            total=total + 5,
            baseline=5,
            observed=5,
            remaining=total,
        )

    @rule(quantity=st.integers(1, 60))
    def use(self, quantity):
        """Usage, a fraction of a micro or many."""
        self.events += 1
        self.till.take([usage(str(self.events), quantity)])

    @rule(place=st.integers(0, 9))
    def intend(self, place):
        """A release of all that this escrow should pay: never more than is owed in all."""
        escrow = self.one(place)
        amount = escrow.payable(self.books.owed_on(self.account, escrow))
        if escrow.release is not None or escrow.status is EscrowStatus.CLOSED or not amount:
            return
        release = Release("r", escrow.id, amount, escrow.observed, ReleaseStatus.SENT, "", 0, 0, ())
        self.put(escrow, release=release)
        after = sum(map(paid, self.escrows))
        assert after <= self.account.owed + self.foreign

    @rule(place=st.integers(0, 9), landed=st.booleans())
    def answer(self, place, landed):
        """It has landed, or it never will."""
        escrow = self.one(place)
        if escrow.release is None:
            return
        amount = escrow.release.amount if landed else 0
        amount = min(amount, escrow.remaining)
        self.put(
            escrow,
            release=None,
            settled=escrow.settled + amount,
            observed=escrow.observed + amount,
            remaining=escrow.remaining - amount,
        )

    @rule(place=st.integers(0, 9), amount=st.integers(1, 20), known=st.booleans())
    def stranger(self, place, amount, known):
        """Somebody else releases, and it counts as payment."""
        escrow = self.one(place)
        amount = min(amount, escrow.remaining)
        self.foreign += amount
        self.put(
            escrow,
            credited=escrow.credited + amount * known,
            observed=escrow.observed + amount,
            remaining=escrow.remaining - amount,
        )

    @rule(place=st.integers(0, 9), amount=st.integers(1, 20))
    def refund(self, place, amount):
        """The service gives a part back to the payer."""
        escrow = self.one(place)
        self.put(escrow, remaining=escrow.remaining - min(amount, escrow.remaining))

    @rule(place=st.integers(0, 9))
    def close(self, place):
        """Nothing more is paid from this one."""
        self.put(self.one(place), status=EscrowStatus.CLOSED, release=None)

    @invariant()
    def shares_are_never_more_than_owed(self):
        """All of them together, each up to what its escrow can hold."""
        shares = (
            min(capacity(escrow), self.books.owed_on(self.account, escrow))
            for escrow in self.escrows
        )

        assert sum(shares) <= self.account.owed

    @invariant()
    def oldest_is_drawn_on_first(self):
        """A later one is asked for money only where those before it cannot pay all."""
        before = 0
        for escrow in self.escrows:
            if self.books.owed_on(self.account, escrow) > paid(escrow):
                assert before < self.account.owed
            before += capacity(escrow)

    @invariant()
    def restart_changes_no_share(self):
        """It follows from what is stored."""
        restored = self.till.restored()
        for escrow in self.escrows:
            stored = replace(restored.escrows[escrow.id])
            mine = self.books.owed_on(self.account, escrow)
            assert restored.owed_on(restored.accounts["a"], stored) == mine

    def teardown(self):
        """Released to the end, all that is owed is paid, or all that the escrows can hold."""
        if not hasattr(self, "till"):
            return
        for place in range(len(self.escrows)):
            self.answer(place, landed=False)
        for _ in range(2):
            for place in range(len(self.escrows)):
                self.intend(place)
                self.answer(place, landed=True)
        there = sum(map(paid, self.escrows))
        most = sum(map(capacity, self.escrows))

        assert there >= min(self.account.owed, most)


TestEscrows = Escrows.TestCase
TestEscrows.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=5),
    st.lists(st.integers(1, 20), max_size=12),
    st.data(),
)
def test_border_between_escrows_loses_and_doubles_nothing(totals, quantities, data):
    """Whenever releases are made: each escrow is emptied before the next one is touched."""
    till = Till(Ledger({"one": ONE}, METERS))
    pairs = tuple(("main", f"esc_{n}") for n in range(len(totals)))
    till.books.bind(Agreement("a", "one", "payer", pairs), NOW)
    account = till.books.accounts["a"]
    for (_, name), total in zip(pairs, totals, strict=True):
        fresh = till.books.escrows[name]
        till.books.put(replace(fresh, status=EscrowStatus.ACTIVE, total=total, remaining=total))
    for number, quantity in enumerate(quantities):
        till.take([usage(str(number), quantity)])
        if data.draw(st.booleans()):
            settle(till.books, account)
    settle(till.books, account)
    settled = [escrow.settled for escrow in till.books.escrows_of(account)]

    rest, expected = sum(quantities), []
    for total in totals:
        expected.append(min(rest, total))
        rest -= expected[-1]
    assert settled == expected


def settle(books, account):
    """Release from each escrow what it owes."""
    for escrow in list(books.escrows_of(account)):
        amount = escrow.payable(books.owed_on(account, escrow))
        books.put(
            replace(
                escrow,
                settled=escrow.settled + amount,
                observed=escrow.observed + amount,
                remaining=escrow.remaining - amount,
            )
        )


def test_agreement_is_closed_when_all_its_escrows_are():
    """As long as one can be paid from, usage is taken."""
    till = Till(Ledger({"one": ONE}, METERS))
    till.books.bind(Agreement("a", "one", "payer", (("main", "1"), ("main", "2"))), NOW)
    for name, verdict in (("1", ""), ("2", "closed")):
        till.books.put(replace(till.books.escrows[name], status=EscrowStatus.CLOSED))
        assert till.verdicts([usage(name)]) == [verdict]


def test_escrow_that_was_not_read_yet_holds_nothing_back():
    """What it can hold is not known: the one behind it pays meanwhile, and nothing is doubled."""
    till = Till(Ledger({"one": ONE}, METERS))
    till.books.bind(Agreement("a", "one", "payer", (("main", "1"), ("main", "2"))), NOW)
    account = till.books.accounts["a"]
    second = replace(till.books.escrows["2"], status=EscrowStatus.ACTIVE, total=9, remaining=9)
    till.books.put(second)
    till.take([usage("x", 5)])
    settle(till.books, account)
    first = replace(till.books.escrows["1"], status=EscrowStatus.ACTIVE, total=9, remaining=9)
    till.books.put(first)

    assert till.books.escrows["2"].settled == 5
    assert till.books.owed_on(account, first) == 0


def test_escrow_of_another_role_is_refused_for_an_agreement_that_has_it():
    """A role is for life, and a closing agreement takes no further escrow."""
    till = Till(Ledger({"one": ONE, "p": PLAN}, METERS))
    asked = Agreement("a", "one", "payer", (("main", "1"),))
    till.books.bind(asked, NOW)
    other_role = replace(asked, escrows=(("base", "1"),))
    further = replace(asked, escrows=(("main", "1"), ("main", "2")))
    objection = till.books.objection
    till.books.close(till.books.accounts["a"])

    assert "in another role" in objection(other_role, till.books.plans)
    assert "closing" in objection(further, till.books.plans)
    assert objection(asked, till.books.plans) == ""
    assert "no escrow" in objection(Agreement("b", "p", "x", ()), till.books.plans)
