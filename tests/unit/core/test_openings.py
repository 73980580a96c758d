from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core import openings
from meterd.core.openings import Found, Locked, Opening, OpeningStatus
from meterd.core.settlement import AnswerKind

WALL = 1_795_000_000_000
QUARANTINE, GAP = 900.0, 10.0
MEMO = "stream agreement=job-1 open_1"
OPENING = Opening(
    id="open_1",
    agreement="job-1",
    plan="stream",
    payer="",
    role="main",
    amount=10_000_000,
    provider="agent_provider",
    hours=None,
    memo=MEMO,
    why="asked",
    status=OpeningStatus.INTENDED,
    created_at=WALL,
    changed_at=WALL,
)
FOUND = Found("esc_1", MEMO, "agent_payer", "agent_provider", 10_000_000, live=True)


def in_doubt(mono: float = 100.0) -> Opening:
    return openings.answered(OPENING, AnswerKind.DOUBT, "no answer", mono, WALL)


def unseen(opening: Opening, mono: float) -> Opening:
    return openings.unseen(opening, mono, WALL + 1, quarantine=QUARANTINE, gap=GAP)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (AnswerKind.DECLINED, OpeningStatus.FAILED),
        (AnswerKind.MISSING, OpeningStatus.FAILED),
        (AnswerKind.EMPTY, OpeningStatus.FAILED),
        (AnswerKind.KEY_REFUSED, OpeningStatus.FAILED),
        (AnswerKind.FORBIDDEN, OpeningStatus.FAILED),
        (AnswerKind.LIMITED, OpeningStatus.FAILED),
        (AnswerKind.NOT_SENT, OpeningStatus.FAILED),
        (AnswerKind.CONFLICT, OpeningStatus.IN_DOUBT),
        (AnswerKind.CONFIRMED, OpeningStatus.IN_DOUBT),
        (AnswerKind.DOUBT, OpeningStatus.IN_DOUBT),
    ],
)
def test_only_an_answer_that_says_so_for_certain_means_that_nothing_is_locked(kind, status):
    """Whatever is not certain is in doubt, and counts as locked."""
    after = openings.answered(OPENING, kind, "what was said", 100.0, WALL + 5)

    assert status is after.status
    assert ("what was said", WALL + 5, "") == (after.detail, after.changed_at, after.escrow)


def test_an_opening_that_was_answered_is_not_answered_again():
    """It is sent once in its life."""
    with pytest.raises(AssertionError, match=r"^it is sent once, and answered once$"):
        openings.answered(in_doubt(), AnswerKind.DECLINED, "", 200.0, WALL)


def test_a_locked_escrow_tells_who_pays():
    """The creator is the payer, unless one was named."""
    locked = Locked("esc_1", "agent_payer")
    after = openings.landed(OPENING, locked, "answered", WALL + 1)
    named = openings.landed(replace(OPENING, payer="Ann"), locked, "answered", WALL + 1)

    shown = replace(
        OPENING,
        status=OpeningStatus.LOCKED,
        escrow="esc_1",
        payer="agent_payer",
        detail="answered",
        changed_at=WALL + 1,
    )
    assert shown == after
    assert "Ann" == named.payer


def test_an_intention_that_is_found_after_a_restart_is_in_doubt_from_then_on():
    """The clock of the dead process is worth nothing: the quarantine begins anew."""
    found = openings.restarted(OPENING, 7.0, WALL + 9)
    again = openings.restarted(replace(in_doubt(), sightings=1), 8.0, WALL + 9)

    assert (OpeningStatus.IN_DOUBT, 7.0, WALL + 9, "found after a restart") == (
        found.status,
        found.since_mono,
        found.changed_at,
        found.detail,
    )
    assert (OpeningStatus.IN_DOUBT, 8.0, 0) == (again.status, again.since_mono, again.sightings)


def test_two_whole_lists_apart_behind_two_quarantines_show_that_it_is_absent():
    """One list is not enough, nor are two at once, nor any before two quarantines."""
    doubt = in_doubt(100.0)
    early = unseen(doubt, 100.0 + 2 * QUARANTINE - 1)
    first = unseen(doubt, 100.0 + 2 * QUARANTINE)
    soon = unseen(first, first.sighted_mono + GAP - 1)
    second = unseen(first, first.sighted_mono + GAP)

    assert (doubt, 1, first) == (early, first.sightings, soon)
    assert OpeningStatus.IN_DOUBT is first.status
    why = "no list shows it, twice the quarantine after it was asked for"
    assert (OpeningStatus.ABSENT, WALL + 1, why) == (
        second.status,
        second.changed_at,
        second.detail,
    )
    assert second == unseen(second, 10**6)


def test_an_escrow_is_found_by_memo_amount_and_provider_the_oldest_first():
    """Somebody else's escrow with the same words is not taken for it."""
    double = replace(FOUND, escrow="esc_0", created_at=5)
    others = [
        replace(FOUND, memo=f"{MEMO} "),
        replace(FOUND, total=1),
        replace(FOUND, provider="agent_other"),
    ]

    assert [FOUND, double] == openings.find(OPENING, [double, *others, FOUND])


def test_a_memo_names_plan_agreement_and_key():
    """What the plan says stands first, so that a pattern of it still fits."""
    memo = openings.memo_of("inference_stream:s1", "job-1", "open_1")

    assert "inference_stream:s1 agreement=job-1 open_1" == memo
    assert "meterd agreement=job-1 open_1" == openings.memo_of("", "job-1", "open_1")
    assert "job-1" == openings.named_in(memo)


@pytest.mark.parametrize(
    ("memo", "named"),
    [
        ("agreement=a", "a"),
        ("x agreement=a.b:c-1 y", "a.b:c-1"),
        ("x", ""),
        ("disagreement=a", ""),
        ("agreement=", ""),
        ("agreement=a/b", ""),
        (f"agreement={'a' * 129}", ""),
    ],
)
def test_an_agreement_is_named_by_a_whole_word(memo, named):
    """What is no id is no name."""
    assert named == openings.named_in(memo)


@pytest.mark.parametrize(
    ("memo", "flaw"),
    [
        ("as it should be", ""),
        ("x" * 200, ""),
        ("x" * 201, "has 201 characters with agreement and key, 200 are read back"),
        ("two  blanks", "may hold single blanks and printable characters alone"),
        ("a\ttab", "may hold single blanks and printable characters alone"),
    ],
)
def test_a_memo_that_could_not_be_read_back_is_refused(memo, flaw):
    """The escrow is found by it: it must come back as it was sent."""
    assert flaw == openings.memo_flaw(memo)
