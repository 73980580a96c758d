"""The real daemon in virtual time: thousands of seeded runs, and the bugs that they must find.

METERD_SEED=n repeats one run, METERD_SEEDS=n sets how many are made. With `-rP` pytest prints what
was done, and how often each edge of the state table was walked. Under xdist the workers share the
blocks of seeds, however they are handed out.
"""

from __future__ import annotations

import fcntl
import os
import pickle
from collections import Counter
from typing import Any

import pytest

from tests.simulation.bugs import BUGS, planted
from tests.simulation.run import simulate

BLOCK = 100
SEEDS = int(os.environ.get("METERD_SEEDS", "2000"))
ONE = os.environ.get("METERD_SEED")
BLOCKS = range(0, SEEDS, BLOCK)
SOAK_SEEDS = int(os.environ.get("METERD_SEEDS", "100000"))
BUG_SEEDS = 500
SOAK_FROM = 10_000_000  # Other seeds than those of CI.

LEAST = 100  # How often each edge must be walked,
LEAST_IN = 2000  # in so many seeds.

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
    ("escrow", "paused", "closing"),
    ("escrow", "paused", "exhausted"),
    ("escrow", "exhausted", "paused"),
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
    ("release", "in_doubt", "in_doubt"),
    ("release", "escalated", "confirmed"),
    ("release", "escalated", "void"),
    ("release", "void", "late"),
    # The rows of "Deviations".
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
# What hardly ever happens however often it is tried, how often it must at least, and why.
RARE: dict[tuple[str, ...], int] = {
    # A person or an event closes what was bound a few seconds ago.
    ("escrow", "adopting", "closing"): 20,
    # The same, and nothing was used yet.
    ("escrow", "adopting", "closed"): 0,
    # Nothing is left to take from an exhausted escrow, so that little can go wrong with it.
    ("escrow", "exhausted", "frozen"): 10,
    ("escrow", "frozen", "exhausted"): 10,
    # A call must outlive two quarantines and two readings; that is in one scenario's power alone.
    ("frozen", "late void"): 50,
    # A reading from a replica shows money that is gone, for one reading.
    ("escrow", "exhausted", "active"): 0,
    ("escrow", "exhausted", "closing"): 0,
}


def run(seed: int) -> Counter[Any]:
    """One run; a failure says how to repeat it."""
    try:
        return simulate(seed).counts
    except Exception as error:
        error.add_note(
            f"repeat it: METERD_SEED={seed} python -m pytest {os.path.relpath(__file__)} -k repeat"
        )
        raise


@pytest.fixture(scope="session")
def block(tmp_path_factory):
    """The runs of one block, added up: made once, by whichever process asks first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # Which the workers have in common.

    def counted(first: int) -> Counter[Any]:
        with (shared / f"block-{first}").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # Until the file is closed: others wait for it.
            file.seek(0)
            known = file.read()
            if not known:
                known = pickle.dumps(run_block(first))
                file.write(known)
            return pickle.loads(known)

    return counted


def run_block(first: int) -> Counter[Any]:
    """Make the runs of one block."""
    counts: Counter[Any] = Counter()
    for seed in range(first, min(first + BLOCK, SEEDS)):
        counts.update(run(seed))
    return counts


@pytest.mark.skipif(ONE is not None, reason="one seed is asked for")
@pytest.mark.parametrize("first", BLOCKS)
def test_daemon_keeps_every_promise_when_everything_around_it_fails(first, block):
    """Faults, then calm, then the books close; `tests/simulation/run.py` holds the promises."""
    counts = block(first)

    assert 0 < counts["crash"]
    assert min(BLOCK, SEEDS - first) == counts["seed"]


@pytest.mark.skipif(ONE is not None, reason="one seed is asked for")
@pytest.mark.timeout(0)  # When it is run alone it makes all the runs of the test above.
def test_simulation_walks_every_edge_of_the_state_table_and_every_deviation_many_times(block):
    """A simulation that came somewhere once, by luck, has proved little of it."""
    counts = sum((block(first) for first in BLOCKS), Counter())
    print(figures(counts))
    print(*(f"{counts[edge]:>8} {' '.join(edge)}" for edge in [*REACHED, *RARE]), sep="\n")
    walked = {edge for edge in counts if edge[0] in ("escrow", "release", "frozen")}

    assert {} == {edge: counts[edge] for edge in REACHED if counts[edge] < bar(LEAST)}
    assert {} == {edge: counts[edge] for edge in RARE if counts[edge] < bar(RARE[edge])}
    assert set() == walked - {*REACHED, *RARE}
    assert bar(LEAST) < counts["late by number"]
    assert bar(LEAST) < counts["numbers whole"]


def bar(least: int) -> int:
    """What is asked of as many seeds as are made; at least one, where anything is asked."""
    return max(min(1, least), least * SEEDS // LEAST_IN)


def figures(counts: Counter[Any]) -> str:
    """What was done, in words that may be quoted."""
    events = {what: n for (kind, what), n in _pairs(counts) if kind == "events"}
    said = {
        "seeds": counts["seed"],
        "virtual hours": counts["virtual seconds"] // 3600,
        "steps of the loop": counts["steps"],
        "events delivered": sum(events.values()),
        "events accepted": events["accepted"],
        "events again": events["duplicates"],
        "events rejected": events["rejected"],
        "late events by number": counts["late by number"],
        "starts of the daemon": counts["start"],
        "crashes": counts["crash"],
        "failed commits": counts["over StoreFailed"],
        "full disks": counts["disk full"],
        "clock steps": counts["clock step"],
        "broker restarts": counts["broker restart"],
        "releases intended": counts["release", "none", "intended"],
        "releases in doubt": counts["alarm", "release_in_doubt"],
        "calls made": sum(n for (kind, _), n in _pairs(counts) if kind == "fate"),
        "violations": 0,  # The first one would have ended the run.
    }
    return "\n".join(f"{number:>12,} {what}" for what, number in said.items())


def _pairs(counts: Counter[Any]) -> list[tuple[tuple[str, str], int]]:
    return [(key, n) for key, n in counts.items() if isinstance(key, tuple) and len(key) == 2]


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
    seed = found(name)
    print(f"found by seed {seed}: {name}")

    assert seed < BUG_SEEDS


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
    counts: Counter[Any] = Counter()
    for seed in range(SOAK_FROM, SOAK_FROM + SOAK_SEEDS):
        counts.update(run(seed))
    print(figures(counts))

    assert SOAK_SEEDS == counts["seed"]
