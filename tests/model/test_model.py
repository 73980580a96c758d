"""The release protocol, exhausted in small numbers: see explore.py for what is tried."""

from __future__ import annotations

import pytest

from tests.model.explore import Explorer, Weakness, World, rules

EVERYTHING = 1_000_000  # More than any of these worlds has: the walk ends because nothing is left.

KEPT = {
    "calls as late and readings as old as the quarantine": World(rules(voids=2), used_max=4),
    "a longer quarantine, more money": World(
        rules(3, voids=1), used_max=5, total=5, late=3, stale=3
    ),
    "many voids": World(rules(1), used_max=2, total=2, late=1, stale=1),
    "an escrow that runs dry": World(rules(voids=2), used_max=5, total=3),
    "an agreement that closes": World(rules(voids=2), closing=True),
    "a service that honours keys": World(
        rules(1, honoured=True, voids=1), used_max=2, total=2, late=1, stale=1
    ),
}

WEAK = {
    "a call is repeated on time-out": World(rules(), weakness=Weakness.RETRY_ON_TIMEOUT),
    "a restart forgets the open release": World(rules(), weakness=Weakness.NO_JOURNAL),
    "an unknown outcome is taken for a refusal": World(rules(), weakness=Weakness.FAILURE_IS_NO),
    "it reconciles at once": World(rules(0), stale=0),
    "it waits once for what may take one quarantine twice": World(rules(1), late=2, stale=2),
    "it waits for the call and not for the reading": World(rules(1), late=0, stale=4),
}


@pytest.mark.parametrize("world", KEPT.values(), ids=KEPT)
def test_table_never_overpays_and_never_gets_stuck_while_the_assumptions_hold(world):
    """Whatever is lost, late, old or killed: never more than used, and a kind world pays the rest.

    Frozen states are those in which a person must say what became of a release that is absent,
    after the voids of the day are used up.
    """
    found = Explorer(world).run(EVERYTHING)

    assert (0, 0, 0) == (found.overpaid, found.closed_short, found.stuck), found


def test_table_never_pays_more_than_used_of_its_own_when_somebody_else_releases():
    """A foreign release makes meterd's next one smaller, or freezes the escrow."""
    found = Explorer(World(rules(voids=2), foreign_max=1)).run(EVERYTHING)

    assert 0 == found.overpaid, found


def test_table_overpays_by_one_release_at_most_when_calls_and_readings_break_their_word():
    """Without A4 and A5 one void may be wrong; then the escrow is frozen."""
    world = World(rules(1, voids=1), late=5, stale=4, total=6)
    found = Explorer(world).run(EVERYTHING)

    assert world.rules.release_max == found.overpaid, found


def test_strict_table_never_overpays_whatever_the_network_does():
    """With `strict` no release is given up without a person."""
    world = World(rules(1, strict=True), late=6, stale=5, used_max=4, total=6)
    found = Explorer(world).run(EVERYTHING)

    assert 0 == found.overpaid, found


@pytest.mark.parametrize("world", WEAK.values(), ids=WEAK)
def test_model_finds_the_overpayment_in_each_weaker_protocol(world):
    """A model that could not find these would prove nothing."""
    found = Explorer(world).run(EVERYTHING, stop_at_overpayment=True)

    assert found.overpaid > 0, found
    assert found.trace
