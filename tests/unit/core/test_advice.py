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


SAID = "release rel_1: told so; "
SHOWN = f"{SAID}confirmed as soon as a reading shows it; if none does, "
DOUBT = escrow(release=release("in_doubt"))
DOUBTS = {
    "none": (ACTIVE, RULES, 100, ""),
    "not yet": (escrow(release=release("sent")), RULES, 100, ""),
    "young": (DOUBT, RULES, 160, f"{SHOWN}it is given up and paid anew in 29 min"),
    "of two minutes": (DOUBT, RULES, 1780, f"{SHOWN}it is given up and paid anew in 2 min"),
    "nearly over": (DOUBT, RULES, 1780.5, f"{SHOWN}it is given up and paid anew in 119 s"),
    "at its last second": (DOUBT, RULES, 1899, f"{SHOWN}it is given up and paid anew in 1 s"),
    "over": (
        DOUBT,
        RULES,
        1900,
        f"{SAID}readings decide now: confirmed if one shows it, else it is given up and paid anew",
    ),
    "four times as long": (
        escrow(release=release("in_doubt"), quarantine_factor=4),
        RULES,
        100,
        f"{SHOWN}it is given up and paid anew in 2 h",
    ),
    "four times as long, a second later": (
        escrow(release=release("in_doubt"), quarantine_factor=4),
        RULES,
        101,
        f"{SHOWN}it is given up and paid anew in 119 min",
    ),
    "strict": (DOUBT, replace(RULES, strict=True), 100, f"{SHOWN}a person is asked in 30 min"),
    "honoured": (
        DOUBT,
        replace(RULES, honoured=True),
        100,
        f"{SAID}the same call is made again with its key until it is answered",
    ),
    "frozen": (
        escrow("frozen", release=release("in_doubt")),
        RULES,
        100,
        f"{SAID}frozen, it is confirmed when a reading shows it, and never given up",
    ),
    "escalated": (
        escrow("frozen", release=release("escalated")),
        RULES,
        100,
        f"{SAID}look for rel_1 at the escrow service and say what became of it",
    ),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubt_says_when_it_ends(name):
    """And by what: a reading, time, or a person."""
    state, rules, mono, said = DOUBTS[name]

    assert said == advice.doubt(state, rules, mono)


@pytest.mark.parametrize(
    ("blocked", "said"),
    [
        ("", ""),
        ("meterd is stopping", ""),
        ("the disk is full", "make room on the disk of daemon.data_dir; it goes on by itself"),
        (
            "the escrow service refuses the key",
            "put escrow.api_key right and start meterd again; look: meterd check --live",
        ),
        (
            "3 releases came into doubt one after the other",
            "nothing: it goes on by itself; what is in doubt: meterd releases",
        ),
    ],
)
def test_what_stands_against_all_releases_says_what_helps(blocked, said):
    """Where time alone helps, it says so."""
    assert said == advice.against(blocked)


def test_a_full_disk_and_a_refused_key_wait_for_a_person():
    """Many doubts do not: time is enough."""
    assert {"the disk is full", "the escrow service refuses the key"} == advice.FOR_A_PERSON
