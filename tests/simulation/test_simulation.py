"""The real daemon in virtual time: thousands of seeded runs, and the bugs that they must find.

METERD_SEED=n repeats one run, METERD_SEEDS=n sets how many are made.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from typing import Any

import pytest

from tests.simulation.bugs import BUGS, planted
from tests.simulation.run import simulate

BLOCK = 100
SEEDS = int(os.environ.get("METERD_SEEDS", "1000"))
ONE = os.environ.get("METERD_SEED")
BLOCKS = range(0, SEEDS, BLOCK)
SOAK_SEEDS = int(os.environ.get("METERD_SEEDS", "100000"))
BUG_SEEDS = 500
SOAK_FROM = 10_000_000  # Other seeds than those of CI.

REACHED = [
    # Escrows, by the words that a person sees.
    ("escrow", "adopting", "active"),
    ("escrow", "adopting", "frozen"),
    ("escrow", "active", "paused"),
    ("escrow", "paused", "active"),
    ("escrow", "active", "exhausted"),
    ("escrow", "active", "closing"),
    ("escrow", "active", "frozen"),
    ("escrow", "paused", "frozen"),
    ("escrow", "closing", "paused"),
    ("escrow", "closing", "closed"),
    ("escrow", "closing", "exhausted"),
    ("escrow", "exhausted", "closed"),
    ("escrow", "closing", "frozen"),
    ("escrow", "active", "closed"),
    ("escrow", "paused", "closed"),
    ("escrow", "frozen", "active"),
    ("escrow", "frozen", "closing"),
    ("escrow", "frozen", "adopting"),
    # Releases.
    ("release", "none", "intended"),
    ("release", "intended", "sent"),
    ("release", "intended", "not_sent"),
    ("release", "intended", "in_doubt"),
    ("release", "sent", "confirmed"),
    ("release", "sent", "declined"),
    ("release", "sent", "not_sent"),
    ("release", "sent", "in_doubt"),
    ("release", "in_doubt", "confirmed"),
    ("release", "in_doubt", "void"),
    ("release", "in_doubt", "escalated"),
    ("release", "in_doubt", "sent"),
    ("release", "escalated", "confirmed"),
    ("release", "escalated", "void"),
    ("release", "void", "late"),
    # The rows of "Deviations".
    ("frozen", "late void"),
    ("frozen", "foreign"),
    ("alarm", "foreign_release_credited"),
    ("frozen", "overpaid"),
    ("frozen", "low"),
    ("lie", "amount"),
    ("frozen", "part"),
    ("frozen", "sum"),
    ("frozen", "total"),
    ("frozen", "currency"),
    ("frozen", "provider"),
    ("frozen", "other escrow"),
    ("frozen", "history"),
    ("deviation", "counter broken"),
    ("deviation", "journal broken"),
    ("deviation", "circuit open"),
    ("frozen", "void of the day"),
    ("frozen", "strict"),
    ("frozen", "declined"),
]


def run(seed: int) -> Counter[Any]:
    """One run; a failure says how to repeat it."""
    try:
        return simulate(seed).counts
    except Exception as error:
        error.add_note(
            f"repeat it: METERD_SEED={seed} python -m pytest {os.path.relpath(__file__)} -k repeat"
        )
        raise


@cache
def block(first: int) -> Counter[Any]:
    """The runs of one block, added up."""
    return sum((run(seed) for seed in range(first, first + BLOCK)), Counter())


@pytest.mark.skipif(ONE is not None, reason="one seed is asked for")
@pytest.mark.parametrize("first", BLOCKS)
def test_daemon_keeps_every_promise_when_everything_around_it_fails(first):
    """Faults, then calm, then the books close; `tests/simulation/run.py` holds the promises."""
    assert 0 < block(first)["crash"]


@pytest.mark.skipif(ONE is not None, reason="one seed is asked for")
@pytest.mark.timeout(0)  # When it is run alone it makes all the runs of the test above.
def test_simulation_reaches_every_edge_of_the_state_table_and_every_deviation():
    """A simulation that never came somewhere has proved nothing of it."""
    counts = sum((block(first) for first in BLOCKS), Counter())
    print(*(f"{counts[edge]:>8} {' '.join(edge)}" for edge in REACHED), sep="\n")

    assert [] == [edge for edge in REACHED if not counts[edge]]


def test_same_seed_repeats_the_same_run_to_the_last_step():
    """One number is all that is needed to see a failure again."""
    for seed in range(12):
        assert simulate(seed).hash.digest() == simulate(seed).hash.digest()


def test_one_seed_can_be_repeated():
    """METERD_SEED=n makes this run alone, with its trace."""
    sim = simulate(int(ONE or 0), keep_trace=True)
    assert sim.lines is not None
    print(*sim.lines, sep="\n")

    assert sim.lines


@pytest.mark.skipif(ONE is not None, reason="one seed is asked for")
@pytest.mark.parametrize("name", BUGS)
def test_simulation_finds_a_planted_bug_within_500_seeds(name):
    """A simulation that could not find these would prove nothing."""
    assert found(name) < BUG_SEEDS


def found(name: str) -> int:
    """The first seed that does not survive a bug."""
    with planted(name):
        for seed in range(BUG_SEEDS):
            try:
                simulate(seed)
            except Exception:  # noqa: BLE001  # Whatever ends the run has found it.
                return seed
    return BUG_SEEDS


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_daemon_keeps_every_promise_for_as_long_as_there_is_patience():
    """The same as above, with other seeds and many more of them."""
    for seed in range(SOAK_FROM, SOAK_FROM + SOAK_SEEDS):
        run(seed)
