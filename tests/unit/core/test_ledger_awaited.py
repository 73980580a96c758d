"""A period ends while meterd locks the next escrow: its fee waits for it, and nobody lapses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core.accounts import Agreement
from meterd.core.ledger import AWAITED_MS, Ledger
from meterd.core.settlement import EscrowStatus
from tests.unit.core.books import METERS, NOW
from tests.unit.core.test_ledger_early_ends import FEE, HOUR, WEEKLY

END = NOW + 168 * HOUR


@pytest.mark.parametrize(
    ("total", "status"),
    [(FEE - 1, EscrowStatus.ACTIVE), (FEE - 1, EscrowStatus.ADOPTING), (0, EscrowStatus.ADOPTING)],
)
def test_fee_waits_for_the_escrow_that_is_awaited(total, status):
    """It is looked for again a little later, and is owed once the money is there."""
    ledger = Ledger({"weekly": WEEKLY}, METERS)
    ledger.bind(Agreement("a", "weekly", "payer", (("main", "esc_a"),)), NOW)
    put(ledger, total, status)
    ledger.awaited.add("a")

    touched, lapsed = ledger.end_periods(END, 0)
    assert (0, [], 0) == (len(touched.accounts), lapsed, ledger.accounts["a"].owed)
    assert END + AWAITED_MS == ledger.next_period_end

    put(ledger, FEE, EscrowStatus.ACTIVE)
    touched, lapsed = ledger.end_periods(END + AWAITED_MS, 0)
    assert (1, [], FEE) == (len(touched.accounts), lapsed, ledger.accounts["a"].owed)


def put(ledger, total, status):
    escrow = replace(ledger.escrows["esc_a"], status=status, total=total, remaining=total)
    ledger.put(escrow)
