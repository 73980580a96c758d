"""A life of the store whose every change can be told from its neighbours, and what must hold of it.

The rule kept here: change n is bound to n in every table at once (position, counter, accrued sum,
settled, journal, identity, dead letter, and an odd n intends the release that the next one
confirms), so a store that holds a half of one, or lacks one before another, cannot pass `check`.
"""

from __future__ import annotations

from fractions import Fraction

from meterd.core.changes import AgreementRow, CardRow, Change, CounterRow, DeadLetter, JournalEntry
from meterd.core.ledger import Ledger
from meterd.core.meters import Meter
from meterd.core.money import NANOS
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Rate, RateCard
from meterd.core.settlement import Escrow, Release, ReleaseStatus
from meterd.store.identities import digest
from meterd.store.sqlite import SqliteStore

ENTRIES_MAX = 100_000
PRICE = Fraction(1, 1000)
CARD = RateCard((Rate("m", 10**9),))
PLANS = {"p": Plan("p", Pattern.STREAMING, CARD)}
METERS = {"m": Meter("m")}
LETTER_EVERY = 3


def change(store: SqliteStore, n: int) -> Change:
    """Change n, from 1; the first one binds the agreement besides."""
    odd = n % 2
    status = ReleaseStatus.INTENDED if odd else ReleaseStatus.CONFIRMED
    letters = () if n % LETTER_EVERY else (_letter(n),)
    return Change(
        cards=(CardRow(CARD.id, CARD.text),) if n == 1 else (),
        agreements=(
            AgreementRow("a", "p", "payer", "api", (("main", "e"),), False, 0, n * PRICE, n, n, 0),
        ),
        counters=(CounterRow("a", CARD.id, "m", (), n * NANOS, n, number=1),),
        positions=(("s", str(n)),),
        marks=store.identities.add(digest("s", str(n)), [n], [n // 50]),
        escrows=(Escrow("e", "a", "main", settled=n),),
        releases=(Release(f"r{n - 1 + odd}", "e", 7, 0, status, "units", 0, 1, ()),),
        dead_letters=letters,
        dead_letters_gone=tuple(letter.number - LETTER_EVERY for letter in letters),
        journal=(JournalEntry(n, "a", "b", "c", "d" * (n * 37 % 700)),),
    )


def _letter(n: int) -> DeadLetter:
    return DeadLetter(n, "s", str(n), "bad", "d", b"p" * (n % 90), "", (), n)


def last_change(store: SqliteStore) -> int:
    """The number of the last change that the store holds."""
    return int(store.load(now_ms=0).positions.get("s", 0))


def check(store: SqliteStore, told: int) -> int:
    """All that was told is there, each change is whole, and the file is sound; the last change.

    `SqliteStore.open` has followed the journal's chain by now.
    """
    state = store.load(now_ms=0)
    last = int(state.positions.get("s", 0))
    asked = b"".join(digest("s", str(number)) for number in range(1, last + 2))
    known = [*range(1, last + 1), -1]
    once = [last] * min(last, 1)
    rows = list(store._connection.execute("PRAGMA integrity_check"))
    accounts = Ledger.restore(PLANS, METERS, state).accounts.values()  # Prices the counters anew.

    assert told <= last
    assert [("ok",)] == rows
    assert [n * NANOS for n in once] == [row.quantity for row in state.counters]
    assert [n * PRICE for n in once] == [account.accrued for account in accounts]
    assert once == [row.settled for row in state.escrows]
    assert [f"r{n}" if n % 2 else None for n in once] == [
        row.release and row.release.id for row in state.escrows
    ]
    assert min(last // LETTER_EVERY, 1) == state.dead_letters
    assert known == store.identities.find(asked)
    assert last == store._heads.journal
    return last
