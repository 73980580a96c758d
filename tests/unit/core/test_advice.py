from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core import advice
from meterd.core.settlement import Escrow, EscrowStatus, Release, ReleaseStatus, Rules

ACTIVE = Escrow(
    "esc_1", "agr", "main", EscrowStatus.ACTIVE, total=100, baseline=0, remaining=50, observed=50
)
RULES = Rules(quarantine=900)


def release(status, *moves):
    """A release with this status, intended at 100 s."""
    history = tuple((0, word, "told so") for word in (*moves, status))
    return Release(
        "rel_1", "esc_1", 7, 0, ReleaseStatus(status), "amount", 0, 0, history, since_mono=100
    )


def escrow(status="active", reason="", **fields):
    """An escrow in this state."""
    return replace(ACTIVE, status=EscrowStatus(status), reason=reason, **fields)


RESOLVE = "meterd resolve rel_1 --landed|--absent --reason TEXT"
TROUBLES = {
    "in order": (ACTIVE, "", ""),
    "under way": (escrow(release=release("sent")), "", ""),
    "closing": (escrow(closing=True), "", ""),
    "closed": (escrow("closed"), "", ""),
    "being adopted": (escrow("adopting", "first reading taken"), "", ""),
    "cannot be adopted": (
        escrow("adopting", "the service says 'disputed'"),
        "adopting",
        "meterd agreements agr",
    ),
    "cannot be read": (escrow("adopting", "404", failures=3), "adopting", "meterd check --live"),
    "paused": (escrow("paused", "down"), "paused", "meterd check --live"),
    "in dispute": (
        escrow("paused", "the service says 'disputed'"),
        "paused",
        "meterd agreements agr",
    ),
    "exhausted": (escrow(remaining=0), "exhausted", "meterd bind NEW_ESCROW --plan stream"),
    "in doubt": (escrow(release=release("in_doubt")), "in_doubt", "meterd releases agr"),
    "paused and in doubt": (
        escrow("paused", "down", release=release("in_doubt")),
        "in_doubt",
        "meterd releases agr",
    ),
    "frozen": (escrow("frozen", "odd"), "frozen", "meterd resume agr --reason TEXT"),
    "frozen and in doubt": (
        escrow("frozen", "odd", release=release("in_doubt")),
        "frozen",
        RESOLVE,
    ),
    "escalated": (escrow("frozen", "rel_1", release=release("escalated")), "escalated", RESOLVE),
    "late": (
        escrow("frozen", "release rel_1 landed late", voids=(release("late"),)),
        "late",
        "meterd resume agr --reason TEXT",
    ),
    "late once, frozen for another reason": (
        escrow("frozen", "odd", voids=(release("late"),)),
        "frozen",
        "meterd resume agr --reason TEXT",
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_each_state_has_its_word_and_its_command(name):
    """What needs a person gets a command that acts; what decides itself, one that looks."""
    state, word, command = TROUBLES[name]

    assert word == advice.trouble(state, state.word)
    assert command == advice.next_command("agr", state, state.word, "stream")


def test_the_amount_that_landed_late_is_told():
    """Only where that is why the escrow is frozen."""
    state, _, _ = TROUBLES["late"]

    assert (7, 0) == (advice.late(state), advice.late(ACTIVE))


DOUBTS = {
    "none": (ACTIVE, RULES, 100, ""),
    "not yet": (escrow(release=release("sent")), RULES, 100, ""),
    "young": (escrow(release=release("in_doubt")), RULES, 160, "given up and paid anew in 29 min"),
    "nearly over": (escrow(release=release("in_doubt")), RULES, 1801, "paid anew in 99 s"),
    "over": (escrow(release=release("in_doubt")), RULES, 1900, "readings decide now"),
    "four times as long": (
        escrow(release=release("in_doubt"), quarantine_factor=4),
        RULES,
        100,
        "in 2 h",
    ),
    "strict": (
        escrow(release=release("in_doubt")),
        replace(RULES, strict=True),
        100,
        "if none does, a person is asked in 30 min",
    ),
    "honoured": (
        escrow(release=release("in_doubt")),
        replace(RULES, honoured=True),
        100,
        "made again with its key",
    ),
    "frozen": (escrow("frozen", release=release("in_doubt")), RULES, 100, "never given up"),
    "escalated": (
        escrow("frozen", release=release("escalated")),
        RULES,
        100,
        "look for rel_1 at the escrow service",
    ),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubt_says_when_it_ends(name):
    """And by what: a reading, time, or a person."""
    state, rules, mono, said = DOUBTS[name]
    told = advice.doubt(state, rules, mono)

    assert said in told
    assert bool(said) == bool(told)


@pytest.mark.parametrize(
    ("blocked", "said"),
    [
        ("", ""),
        (advice.STOPPING, ""),
        (advice.DISK_FULL, "make room"),
        (advice.KEY_REFUSED, "meterd check --live"),
        ("3 releases came into doubt one after the other", "goes on by itself"),
    ],
)
def test_what_stands_against_all_releases_says_what_helps(blocked, said):
    """Where time alone helps, it says so."""
    assert said in advice.against(blocked)
    assert bool(said) == bool(advice.against(blocked))
