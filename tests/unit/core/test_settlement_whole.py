"""Each edge of the state table as a whole: the very state it leads to, and the very effects.

The other tests of the table look at what an edge is for. These look at all of it, words and times
too: what a person reads, and what must not be touched on the way.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core.settlement import (
    WALLET,
    Alarm,
    Answer,
    Answered,
    AnswerKind,
    Blocked,
    Closing,
    Confirm,
    Due,
    Escrow,
    EscrowStatus,
    Freeze,
    Go,
    NotAllowed,
    Observed,
    Reading,
    Record,
    Release,
    ReleaseStatus,
    Repeat,
    Resolved,
    Restarted,
    Resume,
    Rules,
    Send,
    Unreadable,
    step,
)

W, M = 5_000, 100.0  # Wall ms and monotonic seconds of what happens.
RULES = Rules(
    quarantine=30.0,
    observe_gap=10.0,
    send_deadline=5.0,
    min_interval=2.0,
    release_max=400,
    quantum=10,
    provider="prov",
)
HONOURED = replace(RULES, honoured=True)
SHOWN = Reading(
    escrow="e",
    status="active",
    total=1_000,
    released=280,
    remaining=720,
    refunded=0,
    currency="USDC",
    provider="prov",
    deadline=None,
    mono=99.0,
)
ACTIVE = Escrow(
    id="e",
    agreement="a",
    role="main",
    status=EscrowStatus.ACTIVE,
    total=1_000,
    baseline=50,
    settled=200,
    credited=30,
    observed=280,
    remaining=720,
    service_status="active",
    provider="prov",
    units_settled=7,
    settled_at=4,
    reading=SHOWN,
    next_mono=10.0,
    failures=2,
)
FRESH = Escrow("e", "a", "main")
FROZEN = replace(ACTIVE, status=EscrowStatus.FROZEN, reason="why")
INTENDED = Release(
    id="r",
    escrow="e",
    amount=100,
    before=280,
    status=ReleaseStatus.INTENDED,
    why="amount",
    units=70,
    created_at=3,
    history=((3, "intended", "amount"),),
    since_mono=98.0,
)


def moved(release, status, detail, wall=W, **changes):
    """A release one status on."""
    history = (*release.history, (wall, status.value, detail))
    return replace(release, status=status, history=history, **changes)


SENT = moved(INTENDED, ReleaseStatus.SENT, "", 4)
DOUBTED = moved(SENT, ReleaseStatus.IN_DOUBT, "lost", 4, since_mono=20.0)
SIGHTED = replace(DOUBTED, sightings=1, sighted_mono=85.0)
VOID = moved(DOUBTED, ReleaseStatus.VOID, "absent", 4)
OTHER_VOID = replace(VOID, id="v", amount=33)


def seen(released=280, mono=99.5, **fields):
    """A reading that adds up unless it is told otherwise."""
    made = replace(SHOWN, released=released, remaining=1_000 - released, mono=mono)
    return replace(made, **fields)


def observed(reading, owed=230):
    """It comes in."""
    return Observed(reading, M, W, owed)


def with_(release, **fields):
    """The escrow with this release open."""
    return replace(ACTIVE, release=release, **fields)


def after(state, reading, **fields):
    """The escrow as a reading shows it."""
    return replace(
        state,
        reading=reading,
        observed=reading.released,
        remaining=reading.remaining,
        service_status=reading.status,
        deadline=reading.deadline,
        **fields,
    )


def said(kind, **fields):
    """The call came back."""
    return Answered(Answer(kind, "said so", **fields), M, W)


DUE = Due(530, "units", "new", 90, M, W)
NEW = Release(
    "new", "e", 300, 280, ReleaseStatus.INTENDED, "units", 90, W, ((W, "intended", "units"),), M
)
PATIENT = seen(mono=95.0)
ACTED = {
    "restarted": (
        replace(ACTIVE, suspicion=("x", 1.0), low_since=3.0),
        Restarted(M, W),
        replace(ACTIVE, reading=None, next_mono=M, failures=0),
        (),
    ),
    "restarted with an escalated release": (
        with_(replace(DOUBTED, status=ReleaseStatus.ESCALATED)),
        Restarted(M, W),
        with_(
            replace(DOUBTED, status=ReleaseStatus.ESCALATED), reading=None, next_mono=M, failures=0
        ),
        (),
    ),
    "restarted with a sent release": (
        with_(SENT),
        Restarted(M, W),
        with_(
            doubt := moved(SENT, ReleaseStatus.IN_DOUBT, "found after a restart", since_mono=M),
            reading=None,
            next_mono=M,
            failures=0,
        ),
        (Record(doubt), Alarm("release_in_doubt", "r: found after a restart")),
    ),
    "due": (ACTIVE, DUE, replace(ACTIVE, release=NEW), (Record(NEW), Confirm())),
    "closing": (ACTIVE, Closing(), replace(ACTIVE, closing=True), ()),
    "closed with a rest": (
        replace(ACTIVE, closing=True),
        replace(DUE, owed=235),
        replace(ACTIVE, closing=True, status=EscrowStatus.CLOSED, reason="settled"),
        (Alarm("uncollectible", "closed with 0.000005 USDC unpaid"),),
    ),
    "closed without a rest": (
        replace(ACTIVE, closing=True),
        replace(DUE, owed=230),
        replace(ACTIVE, closing=True, status=EscrowStatus.CLOSED, reason="settled"),
        (),
    ),
    "closed with a micro": (
        replace(ACTIVE, closing=True),
        replace(DUE, owed=231),
        replace(ACTIVE, closing=True, status=EscrowStatus.CLOSED, reason="settled"),
        (Alarm("uncollectible", "closed with 0.000001 USDC unpaid"),),
    ),
    "nothing to release": (
        ACTIVE,
        replace(DUE, owed=239),
        ACTIVE,
        (Blocked("nothing can be released"),),
    ),
    "go": (
        with_(INTENDED),
        Go(M, W),
        with_(sent := moved(INTENDED, ReleaseStatus.SENT, ""), next_mono=M + 2.0),
        (Send(sent),),
    ),
    "go at the last moment": (
        with_(punctual := replace(INTENDED, since_mono=95.0)),
        Go(M, W),
        with_(sent := moved(punctual, ReleaseStatus.SENT, ""), next_mono=M + 2.0),
        (Send(sent),),
    ),
    "go when frozen": (
        with_(INTENDED, status=EscrowStatus.FROZEN),
        Go(M, W),
        with_(None, status=EscrowStatus.FROZEN, reading=None, failures=3, next_mono=M + 4.0),
        (Record(moved(INTENDED, ReleaseStatus.NOT_SENT, "the escrow is frozen")),),
    ),
    "go too late": (
        with_(replace(INTENDED, since_mono=94.0)),
        Go(M, W),
        with_(None, reading=None, failures=3, next_mono=M + 4.0),
        (
            Record(
                moved(
                    replace(INTENDED, since_mono=94.0),
                    ReleaseStatus.NOT_SENT,
                    "the intention took too long to be durable",
                )
            ),
        ),
    ),
    "confirmed": (
        with_(SENT, low_since=1.0),
        said(AnswerKind.CONFIRMED, amount=100),
        with_(
            None,
            settled=300,
            observed=380,
            remaining=620,
            units_settled=70,
            settled_at=W,
            reading=None,
            failures=0,
            next_mono=M,
        ),
        (Record(moved(SENT, ReleaseStatus.CONFIRMED, "said so")),),
    ),
    "confirmed with another amount": (
        with_(SENT),
        said(AnswerKind.CONFIRMED, amount=99),
        with_(
            doubt := moved(
                SENT,
                ReleaseStatus.IN_DOUBT,
                "the answer's amount is not what was asked",
                since_mono=M,
            ),
            reading=None,
        ),
        (
            Record(doubt),
            Alarm("release_in_doubt", "r: the answer's amount is not what was asked"),
        ),
    ),
    "answered with a doubt": (
        with_(replace(SENT, sightings=1)),
        said(AnswerKind.CONFLICT),
        with_(doubt := moved(SENT, ReleaseStatus.IN_DOUBT, "said so", since_mono=M), reading=None),
        (Record(doubt), Alarm("release_in_doubt", "r: said so")),
    ),
    "declined": (
        with_(SENT),
        said(AnswerKind.DECLINED),
        with_(
            None,
            reading=None,
            failures=3,
            next_mono=M + 16.0,
            status=EscrowStatus.FROZEN,
            reason="the service declined a release: said so",
        ),
        (
            Record(moved(SENT, ReleaseStatus.DECLINED, "said so")),
            Alarm("escrow_frozen", "the service declined a release: said so"),
        ),
    ),
    "missing": (
        with_(SENT),
        said(AnswerKind.MISSING),
        with_(
            None,
            reading=None,
            failures=3,
            next_mono=M + 16.0,
            status=EscrowStatus.PAUSED,
            reason="said so",
        ),
        (
            Record(moved(SENT, ReleaseStatus.DECLINED, "said so")),
            Alarm("release_missing", "said so"),
        ),
    ),
    "limited": (
        with_(SENT),
        said(AnswerKind.LIMITED, retry_after=299.0),
        with_(None, reading=None, failures=3, next_mono=M + 299.0),
        (Record(moved(SENT, ReleaseStatus.DECLINED, "said so")),),
    ),
    "limited for very long, after many failures": (
        with_(SENT, failures=15),
        said(AnswerKind.LIMITED, retry_after=301.0),
        with_(None, reading=None, failures=16, next_mono=M + 300.0),
        (Record(moved(SENT, ReleaseStatus.DECLINED, "said so")),),
    ),
    "repetition refused": (
        with_(repeated := moved(DOUBTED, ReleaseStatus.SENT, "again"), failures=16),
        said(AnswerKind.DECLINED),
        with_(
            doubt := moved(repeated, ReleaseStatus.IN_DOUBT, "said so", since_mono=M),
            reading=None,
            failures=16,
            next_mono=M + 300.0,
        ),
        (Record(doubt), Alarm("release_in_doubt", "r: said so")),
    ),
    "not sent": (
        with_(SENT),
        said(AnswerKind.NOT_SENT),
        with_(None, reading=None, failures=3, next_mono=M + 4.0),
        (Record(moved(SENT, ReleaseStatus.NOT_SENT, "said so")),),
    ),
    "not sent, after many failures": (
        with_(SENT, failures=16, next_mono=1e6),
        said(AnswerKind.NOT_SENT),
        with_(None, reading=None, failures=16, next_mono=1e6),
        (Record(moved(SENT, ReleaseStatus.NOT_SENT, "said so")),),
    ),
    "resolved as landed": (
        with_(DOUBTED),
        Resolved(True, "looked", M, W),
        with_(
            None,
            settled=300,
            observed=380,
            remaining=620,
            units_settled=70,
            settled_at=W,
            reading=None,
            failures=0,
            next_mono=M,
        ),
        (Record(moved(DOUBTED, ReleaseStatus.CONFIRMED, "a person says it landed: looked")),),
    ),
    "resolved as absent": (
        with_(DOUBTED, voids=(OTHER_VOID,)),
        Resolved(False, "looked", M, W),
        with_(
            None,
            voids=(
                OTHER_VOID,
                gone := moved(DOUBTED, ReleaseStatus.VOID, "a person says it is absent: looked"),
            ),
        ),
        (Record(gone),),
    ),
    "frozen by a person": (
        ACTIVE,
        Freeze("a person says so"),
        replace(ACTIVE, status=EscrowStatus.FROZEN, reason="a person says so"),
        (),
    ),
    "resumed": (
        replace(FROZEN, observed=300, suspicion=("x", 1.0), low_since=2.0),
        Resume("looked", W),
        replace(ACTIVE, observed=300, reason="", credited=50, failures=0),
        (Alarm("escrow_resumed", "looked"),),
    ),
    "resumed before it was adopted": (
        replace(
            FRESH,
            status=EscrowStatus.FROZEN,
            reason="why",
            reading=SHOWN,
            observed=9,
            suspicion=("x", 1.0),
            low_since=2.0,
            failures=3,
        ),
        Resume("looked", W),
        FRESH,
        (Alarm("escrow_resumed", "looked"),),
    ),
    "resumed with a void in the history": (
        replace(
            FROZEN,
            voids=(OTHER_VOID, VOID),
            reading=replace(SHOWN, release_ids=frozenset({"r"})),
            observed=380,
        ),
        Resume("looked", W),
        replace(
            ACTIVE,
            reading=replace(SHOWN, release_ids=frozenset({"r"})),
            observed=380,
            settled=300,
            failures=0,
            voids=(
                OTHER_VOID,
                late := moved(VOID, ReleaseStatus.LATE, "in the service's history at a resume"),
            ),
        ),
        (Record(late), Alarm("escrow_resumed", "looked")),
    ),
    "unreadable": (
        replace(ACTIVE, failures=3),
        Unreadable("it is down", M),
        replace(
            ACTIVE,
            status=EscrowStatus.PAUSED,
            reason="it is down",
            reading=None,
            failures=4,
            next_mono=M + 8.0,
        ),
        (),
    ),
    "unreadable again and again": (
        replace(ACTIVE, status=EscrowStatus.PAUSED, reason="x", failures=16),
        Unreadable("it is down", M),
        replace(
            ACTIVE,
            status=EscrowStatus.PAUSED,
            reason="it is down",
            reading=None,
            failures=16,
            next_mono=M + 300.0,
        ),
        (),
    ),
    "unreadable before it is adopted": (
        FRESH,
        Unreadable("it is down", M),
        replace(FRESH, reason="it is down", failures=1, next_mono=M + 1.0),
        (),
    ),
    "unreadable when frozen": (
        FROZEN,
        Unreadable("it is down", M),
        replace(FROZEN, reading=None, failures=3, next_mono=M + 4.0),
        (),
    ),
}

SEEN = {
    "first": (FRESH, SHOWN, replace(FRESH, reading=SHOWN, reason="first reading taken"), ()),
    "adopted": (
        replace(FRESH, reading=seen(mono=80.0), suspicion=("x", 1.0), reason="y"),
        seen(mono=90.0, deadline=77),
        replace(
            FRESH,
            status=EscrowStatus.ACTIVE,
            total=1_000,
            baseline=280,
            observed=280,
            remaining=720,
            service_status="active",
            provider="prov",
            deadline=77,
            settled_at=W,
            reading=seen(mono=90.0, deadline=77),
        ),
        (),
    ),
    "adopted by one that is not live": (
        replace(FRESH, reading=SHOWN),
        seen(status="disputed"),
        replace(FRESH, reason="the service says 'disputed'"),
        (Blocked("the service says 'disputed'"),),
    ),
    "level": (
        replace(ACTIVE, suspicion=("x", 1.0), low_since=2.0),
        seen(),
        after(ACTIVE, seen()),
        (),
    ),
    "level, with another deadline and a part refunded": (
        ACTIVE,
        seen(deadline=77, refunded=20, remaining=700),
        after(ACTIVE, seen(deadline=77, refunded=20, remaining=700)),
        (),
    ),
    "a wallet that was filled up": (
        replace(ACTIVE, role=WALLET),
        seen(total=1_500, remaining=1_220),
        after(replace(ACTIVE, role=WALLET, total=1_500), seen(total=1_500, remaining=1_220)),
        (),
    ),
    "a wallet that was frozen before it was adopted": (
        Escrow("e", "a", WALLET, EscrowStatus.FROZEN, reason="why"),
        seen(),
        after(Escrow("e", "a", WALLET, EscrowStatus.FROZEN, reason="why"), seen()),
        (),
    ),
    "an escrow of one micro whose provider has changed": (
        replace(ACTIVE, total=1, provider="other"),
        seen(1, total=1, remaining=0),
        replace(
            ACTIVE,
            total=1,
            provider="other",
            reading=None,
            suspicion=("the provider changed from other to prov", 99.5),
        ),
        (Blocked("the provider changed from other to prov"),),
    ),
    "live again": (
        replace(ACTIVE, status=EscrowStatus.PAUSED, reason="x"),
        seen(),
        after(ACTIVE, seen(), failures=0),
        (),
    ),
    "wound up": (
        ACTIVE,
        seen(status="completed"),
        after(
            ACTIVE,
            seen(status="completed"),
            status=EscrowStatus.PAUSED,
            reason="the service says 'completed'",
        ),
        (Alarm("escrow_paused", "the service says 'completed'"),),
    ),
    "ended": (
        ACTIVE,
        seen(status="refunded"),
        after(
            ACTIVE,
            seen(status="refunded"),
            status=EscrowStatus.CLOSED,
            reason="the service says 'refunded'",
        ),
        (),
    ),
    "less, once": (
        ACTIVE,
        seen(270),
        after(ACTIVE, seen(270), low_since=99.5),
        (Blocked("the service shows less than was released"),),
    ),
    "less for the quarantine": (
        replace(ACTIVE, low_since=69.5),
        seen(270),
        after(ACTIVE, seen(270), low_since=69.5),
        (Blocked("the service shows less than was released"),),
    ),
    "less for longer": (
        replace(ACTIVE, low_since=69.4),
        seen(270),
        after(
            ACTIVE,
            seen(270),
            low_since=69.4,
            status=EscrowStatus.FROZEN,
            reason="the service shows 0.00001 USDC less than was released",
        ),
        (Alarm("escrow_frozen", "the service shows 0.00001 USDC less than was released"),),
    ),
    "less for not so long as the grown quarantine": (
        replace(ACTIVE, low_since=19.5, quarantine_factor=4),
        seen(270),
        after(ACTIVE, seen(270), low_since=19.5, quarantine_factor=4),
        (Blocked("the service shows less than was released"),),
    ),
    "a misfit once": (
        ACTIVE,
        seen(remaining=1),
        replace(
            ACTIVE,
            reading=None,
            suspicion=("released + remaining + refunded is not the total", 99.5),
        ),
        (Blocked("released + remaining + refunded is not the total"),),
    ),
    "a misfit twice": (
        replace(ACTIVE, suspicion=("released + remaining + refunded is not the total", 89.5)),
        seen(remaining=1),
        replace(
            ACTIVE,
            reading=None,
            suspicion=("released + remaining + refunded is not the total", 89.5),
            status=EscrowStatus.FROZEN,
            reason="released + remaining + refunded is not the total",
        ),
        (Alarm("escrow_frozen", "released + remaining + refunded is not the total"),),
    ),
    "a misfit when frozen": (FROZEN, seen(remaining=1), replace(FROZEN, reading=None), ()),
    "overtaken": (ACTIVE, seen(mono=98.0), ACTIVE, ()),
    "landed": (
        with_(DOUBTED),
        seen(380),
        replace(
            after(ACTIVE, seen(380)),
            reading=None,
            settled=300,
            units_settled=70,
            settled_at=W,
            failures=0,
            next_mono=M,
        ),
        (Record(moved(DOUBTED, ReleaseStatus.CONFIRMED, "seen in a reading")),),
    ),
    "absent for less than the patience": (
        with_(DOUBTED),
        seen(mono=79.9),
        with_(DOUBTED),
        (),
    ),
    "absent for the first time": (
        with_(replace(DOUBTED, since_mono=39.5)),
        seen(),
        after(with_(replace(DOUBTED, since_mono=39.5, sightings=1, sighted_mono=99.5)), seen()),
        (),
    ),
    "absent for the second time": (
        with_(SIGHTED, voids=()),
        seen(),
        after(
            with_(
                None,
                voids=(gone := moved(SIGHTED, ReleaseStatus.VOID, "absent after the quarantine"),),
                next_mono=M,
            ),
            seen(),
        ),
        (Record(gone),),
    ),
    "a part of it": (
        with_(DOUBTED),
        seen(300),
        after(
            with_(
                part := moved(
                    DOUBTED,
                    ReleaseStatus.ESCALATED,
                    "the service shows a part of it, or another release",
                ),
                status=EscrowStatus.FROZEN,
                reason="release r needs a person: "
                "the service shows a part of it, or another release",
            ),
            seen(300),
        ),
        (
            Record(part),
            Alarm(
                "escrow_frozen",
                "release r needs a person: the service shows a part of it, or another release",
            ),
        ),
    ),
    "more, once": (
        ACTIVE,
        seen(290),
        after(ACTIVE, seen(290), suspicion=("more was released than meterd asked for", 99.5)),
        (Blocked("more was released than meterd asked for"),),
    ),
    "a void that landed": (
        replace(
            ACTIVE,
            voids=(VOID, OTHER_VOID),
            suspicion=("more was released than meterd asked for", 89.5),
        ),
        seen(313),
        after(
            ACTIVE,
            seen(313),
            voids=(
                VOID,
                late := moved(OTHER_VOID, ReleaseStatus.LATE, "landed after it was given up"),
            ),
            settled=233,
            quarantine_factor=4,
            status=EscrowStatus.FROZEN,
            reason="release v landed after it was given up",
        ),
        (Record(late), Alarm("escrow_frozen", "release v landed after it was given up")),
    ),
}


@pytest.mark.parametrize(("state", "event", "expected", "effects"), ACTED.values(), ids=ACTED)
def test_edge_leads_to_this_very_state(state, event, expected, effects):
    """Nothing else is touched, and nothing else is carried out."""
    assert (expected, effects) == step(state, event, RULES)


@pytest.mark.parametrize(("state", "reading", "expected", "effects"), SEEN.values(), ids=SEEN)
def test_reading_leads_to_this_very_state(state, reading, expected, effects):
    """Nothing else is touched, and nothing else is carried out."""
    assert (expected, effects) == step(state, observed(reading), RULES)


def test_repetition_leads_to_this_very_state():
    """The same release, sent again and paced anew."""
    sent = moved(DOUBTED, ReleaseStatus.SENT, "repeated with the same key")

    assert (with_(sent, next_mono=M + 2.0), (Send(sent),)) == step(
        with_(DOUBTED), Repeat(M, W), HONOURED
    )
    paced = with_(DOUBTED, next_mono=M + 1)
    assert (paced, (Blocked("paced"),)) == step(paced, Repeat(M, W), HONOURED)
    frozen = with_(DOUBTED, status=EscrowStatus.FROZEN)
    assert (frozen, (Blocked("frozen"),)) == step(frozen, Repeat(M, W), HONOURED)


@pytest.mark.parametrize(
    ("state", "event", "rules", "text"),
    [
        (ACTIVE, Go(M, W), RULES, "there is no intended release to send"),
        (with_(SENT), Go(M, W), RULES, "there is no intended release to send"),
        (
            ACTIVE,
            said(AnswerKind.DOUBT),
            RULES,
            "there is no sent release that this could answer",
        ),
        (
            with_(INTENDED),
            said(AnswerKind.DOUBT),
            RULES,
            "there is no sent release that this could answer",
        ),
        (
            with_(DOUBTED),
            Repeat(M, W),
            RULES,
            'a release is repeated only with idempotency = "honoured"',
        ),
        (with_(SENT), Repeat(M, W), HONOURED, "there is no release in doubt to repeat"),
        (ACTIVE, Repeat(M, W), HONOURED, "there is no release in doubt to repeat"),
        (
            with_(SENT),
            Resolved(True, "x", M, W),
            RULES,
            "this escrow has no release in doubt",
        ),
        (ACTIVE, Resolved(True, "x", M, W), RULES, "this escrow has no release in doubt"),
        (
            replace(ACTIVE, status=EscrowStatus.CLOSED),
            Freeze("x"),
            RULES,
            "the escrow is closed: nothing is sent any more",
        ),
        (ACTIVE, Resume("x"), RULES, "the escrow is active, not frozen"),
        (
            replace(FROZEN, reading=None),
            Resume("x"),
            RULES,
            "the service has not been read since: wait for a reading",
        ),
        (
            replace(FROZEN, release=DOUBTED),
            Resume("x"),
            RULES,
            "release r is in doubt: meterd resolve r --landed|--absent --reason TEXT",
        ),
        (
            replace(FROZEN, observed=270, low_since=99.0),
            Resume("x"),
            RULES,
            (
                "the service shows less than was released, which may be an old reading: "
                "wait until it has done so for longer than escrow.in_doubt_quarantine"
            ),
        ),
    ],
)
def test_input_that_makes_no_sense_is_refused_with_these_words(state, event, rules, text):
    """A person reads them, and some of them are a command to type."""
    with pytest.raises(NotAllowed) as refused:
        step(state, event, rules)

    assert text == str(refused.value)


@pytest.mark.parametrize(
    ("changes", "event", "text"),
    [
        ({"status": EscrowStatus.PAUSED, "reason": "x"}, DUE, "paused: x"),
        ({"release": SENT}, DUE, "a release is open"),
        ({"reading": None}, DUE, "no fresh reading"),
        ({}, replace(DUE, mono=104.1), "no fresh reading"),
        (
            {"reading": seen(status="completed"), "service_status": "completed"},
            DUE,
            "the service says 'completed'",
        ),
        ({"suspicion": ("x", 1.0)}, DUE, "a deviation is being looked at"),
        ({"observed": 279}, DUE, "the service shows less than was released"),
        ({"observed": 281}, DUE, "the service shows more than was released"),
        ({"next_mono": 100.1}, DUE, "paced"),
        (
            {"deadline": 34_999},
            DUE,
            "so near to the deadline that a doubt could not be resolved",
        ),
    ],
)
def test_guard_says_in_these_words_why_nothing_is_intended(changes, event, text):
    """They stand in the status and in the log."""
    state = replace(ACTIVE, **changes)

    assert (state, (Blocked(text),)) == step(state, event, RULES)


@pytest.mark.parametrize(
    ("changes", "event"),
    [({}, replace(DUE, mono=104.0)), ({"next_mono": M}, DUE), ({"deadline": 35_000}, DUE)],
)
def test_guard_lets_pass_what_is_just_in_time(changes, event):
    """The last moment still counts."""
    _, effects = step(replace(ACTIVE, **changes), event, RULES)

    assert Confirm() in effects


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"escrow": "f"}, "the service answered for another escrow, f"),
        ({"currency": "EUR"}, "the currency is EUR, not USDC"),
        ({"provider": "thief"}, "the provider is thief, not prov"),
        ({"provider": None}, "the provider changed from prov to None"),
        ({"total": 1_001, "remaining": 721}, "the total of the escrow changed"),
        ({"remaining": 721}, "released + remaining + refunded is not the total"),
        ({"released": 1_001, "remaining": -1}, "more was released than the total"),
        ({"released": -1, "remaining": 1_001}, "a figure of the escrow is below zero"),
    ],
)
def test_misfit_is_named_in_these_words(fields, text):
    """They become the reason of a frozen escrow."""
    state = replace(ACTIVE, reading=None, suspicion=(text, 99.5))

    assert (state, (Blocked(text),)) == step(ACTIVE, observed(seen(**fields)), RULES)


CREDITING = replace(RULES, credit_foreign=True)
STRICT = replace(RULES, strict=True)
MORE = ("more was released than meterd asked for", 89.5)
DAY_MS = 24 * 3600 * 1000


def frozen_for(reason, state, reading, **fields):
    """Frozen by a reading, and the alarm that tells of it."""
    frozen = after(state, reading, status=EscrowStatus.FROZEN, reason=reason, **fields)
    return frozen, (Alarm("escrow_frozen", reason),)


def escalated_for(detail, release, reading, wall=W, **fields):
    """Left to a person by a reading: the record, and the alarm."""
    raised = moved(release, ReleaseStatus.ESCALATED, detail, wall)
    frozen, alarms = frozen_for(
        f"release r needs a person: {detail}", with_(raised, **fields), reading
    )
    return frozen, (Record(raised), *alarms)


def void_at(wall):
    """One given up at this moment."""
    return replace(OTHER_VOID, history=((wall, "void", "x"),))


RULED = {
    "somebody else's release is credited": (
        CREDITING,
        replace(ACTIVE, suspicion=MORE),
        observed(seen(290), 240),
        after(ACTIVE, seen(290), credited=40),
        (
            Alarm(
                "foreign_release_credited",
                "0.00001 USDC more were released than meterd asked for",
            ),
        ),
    ),
    "somebody else's release freezes": (
        RULES,
        replace(ACTIVE, suspicion=MORE),
        observed(seen(290), 240),
        *frozen_for(
            "somebody else released: 0.00001 USDC more were released than meterd asked for",
            ACTIVE,
            seen(290),
            suspicion=MORE,
        ),
    ),
    "an overpayment freezes though it would be credited": (
        CREDITING,
        replace(ACTIVE, suspicion=MORE),
        observed(seen(290), 239),
        *frozen_for(
            "overpaid by 0.000001 USDC: 0.00001 USDC more were released than meterd asked for",
            ACTIVE,
            seen(290),
            suspicion=MORE,
        ),
    ),
    "more, not yet apart": (
        RULES,
        replace(ACTIVE, suspicion=(MORE[0], 89.6)),
        observed(seen(290)),
        after(ACTIVE, seen(290), suspicion=(MORE[0], 89.6)),
        (Blocked(MORE[0]),),
    ),
    "a void by its id": (
        RULES,
        replace(ACTIVE, voids=(VOID,), suspicion=MORE, quarantine_factor=4),
        observed(seen(290, release_ids=frozenset({"r"}))),
        after(
            ACTIVE,
            seen(290, release_ids=frozenset({"r"})),
            voids=(moved(VOID, ReleaseStatus.LATE, "landed after it was given up"),),
            settled=300,
            quarantine_factor=16,
            status=EscrowStatus.FROZEN,
            reason="release r landed after it was given up",
        ),
        (
            Record(moved(VOID, ReleaseStatus.LATE, "landed after it was given up")),
            Alarm("escrow_frozen", "release r landed after it was given up"),
        ),
    ),
    "a void in the history alone": (
        RULES,
        replace(ACTIVE, voids=(VOID,)),
        observed(seen(release_ids=frozenset({"r"}))),
        after(
            ACTIVE,
            seen(release_ids=frozenset({"r"})),
            voids=(VOID,),
            suspicion=("the service's history shows release r, its totals do not", 99.5),
        ),
        (Blocked("the service's history shows release r, its totals do not"),),
    ),
    "a booked one in the history": (
        RULES,
        replace(ACTIVE, voids=(replace(VOID, status=ReleaseStatus.LATE),)),
        observed(seen(release_ids=frozenset({"r"}))),
        after(
            ACTIVE,
            seen(release_ids=frozenset({"r"})),
            voids=(replace(VOID, status=ReleaseStatus.LATE),),
        ),
        (),
    ),
    "absent, but strict": (
        STRICT,
        with_(SIGHTED),
        observed(seen()),
        *escalated_for("absent, and strict = true leaves it to a person", SIGHTED, seen()),
    ),
    "absent, but one too many": (
        RULES,
        with_(SIGHTED, voids=(void_at(DAY_MS + 1),)),
        Observed(seen(), M, 2 * DAY_MS, 230),
        *escalated_for(
            "absent, but this escrow had its void of the day",
            SIGHTED,
            seen(),
            wall=2 * DAY_MS,
            voids=(void_at(DAY_MS + 1),),
        ),
    ),
    "absent, a day after the last": (
        RULES,
        with_(SIGHTED, voids=(void_at(DAY_MS),)),
        Observed(seen(), M, 2 * DAY_MS, 230),
        after(
            with_(
                None,
                voids=(
                    void_at(DAY_MS),
                    moved(SIGHTED, ReleaseStatus.VOID, "absent after the quarantine", 2 * DAY_MS),
                ),
                next_mono=M,
            ),
            seen(),
        ),
        (Record(moved(SIGHTED, ReleaseStatus.VOID, "absent after the quarantine", 2 * DAY_MS)),),
    ),
    "absent, the second of two a day": (
        replace(RULES, voids_per_day=2),
        with_(SIGHTED, voids=(void_at(W),)),
        observed(seen()),
        after(
            with_(
                None,
                voids=(
                    void_at(W),
                    moved(SIGHTED, ReleaseStatus.VOID, "absent after the quarantine"),
                ),
                next_mono=M,
            ),
            seen(),
        ),
        (Record(moved(SIGHTED, ReleaseStatus.VOID, "absent after the quarantine")),),
    ),
    "absent twice, not yet apart": (
        RULES,
        with_(replace(SIGHTED, sighted_mono=89.6)),
        observed(seen()),
        after(with_(replace(SIGHTED, sighted_mono=89.6)), seen()),
        (),
    ),
    "absent, the quarantine has grown": (
        RULES,
        with_(DOUBTED, quarantine_factor=4),
        observed(seen()),
        after(with_(DOUBTED, quarantine_factor=4), seen()),
        (),
    ),
    "absent when frozen": (
        RULES,
        replace(FROZEN, release=SIGHTED),
        observed(seen()),
        after(replace(FROZEN, release=SIGHTED), seen()),
        (),
    ),
    "its answer is still to come": (
        RULES,
        with_(SENT),
        observed(seen(380)),
        after(with_(SENT), seen(380)),
        (),
    ),
    "ended with a rest": (
        RULES,
        ACTIVE,
        observed(seen(status="expired"), 231),
        after(
            ACTIVE,
            seen(status="expired"),
            status=EscrowStatus.CLOSED,
            reason="the service says 'expired'",
        ),
        (Alarm("uncollectible", "ended with 0.000001 USDC unsettled"),),
    ),
    "wound up again": (
        RULES,
        after(
            ACTIVE,
            seen(status="completed"),
            status=EscrowStatus.PAUSED,
            reason="the service says 'completed'",
        ),
        observed(seen(status="completed")),
        after(
            ACTIVE,
            seen(status="completed"),
            status=EscrowStatus.PAUSED,
            reason="the service says 'completed'",
        ),
        (),
    ),
    "of the same moment": (RULES, ACTIVE, observed(seen(mono=99.0)), ACTIVE, ()),
    "frozen, and level": (RULES, FROZEN, observed(seen()), after(FROZEN, seen()), ()),
    "frozen, and more": (RULES, FROZEN, observed(seen(290)), after(FROZEN, seen(290)), ()),
    "closed": (
        RULES,
        replace(ACTIVE, status=EscrowStatus.CLOSED),
        observed(seen(290)),
        after(replace(ACTIVE, status=EscrowStatus.CLOSED), seen(290)),
        (),
    ),
    "ended though more was released": (
        RULES,
        ACTIVE,
        observed(seen(290, status="released"), 240),
        after(
            ACTIVE,
            seen(290, status="released"),
            status=EscrowStatus.CLOSED,
            reason="the service says 'released'",
            credited=ACTIVE.credited + 10,
        ),
        (),
    ),
    "ended though less was released": (
        RULES,
        ACTIVE,
        observed(seen(279, status="released")),
        after(
            ACTIVE,
            seen(279, status="released"),
            status=EscrowStatus.CLOSED,
            reason="the service says 'released'",
            low_since=99.5,
        ),
        (),
    ),
    "a single micro more was released": (
        RULES,
        ACTIVE,
        observed(seen(281)),
        after(ACTIVE, seen(281), suspicion=("more was released than meterd asked for", 99.5)),
        (Blocked("more was released than meterd asked for"),),
    ),
    "first, but ended": (
        RULES,
        FRESH,
        observed(seen(status="expired")),
        replace(
            FRESH,
            reading=seen(status="expired"),
            reason="first reading taken: the service says 'expired'",
        ),
        (),
    ),
    "ended before it was adopted": (
        RULES,
        replace(FRESH, reading=seen(mono=80.0, status="expired")),
        observed(seen(mono=90.0, status="expired"), 1),
        replace(
            FRESH,
            reading=seen(mono=80.0, status="expired"),
            status=EscrowStatus.CLOSED,
            service_status="expired",
            reason="it ended before it was adopted: the service says 'expired'",
        ),
        (
            Alarm(
                "uncollectible",
                "it ended before it was adopted: the service says 'expired', "
                "with 0.000001 USDC unpaid",
            ),
        ),
    ),
    "not adopted before the gap": (
        RULES,
        replace(FRESH, reading=seen(mono=80.0)),
        observed(seen(mono=89.9)),
        replace(FRESH, reading=seen(mono=80.0)),
        (),
    ),
    "key refused": (
        RULES,
        with_(SENT),
        said(AnswerKind.KEY_REFUSED),
        with_(
            None,
            reading=None,
            failures=3,
            next_mono=M + 16.0,
            status=EscrowStatus.PAUSED,
            reason="said so",
        ),
        (
            Record(moved(SENT, ReleaseStatus.DECLINED, "said so")),
            Alarm("release_key_refused", "said so"),
        ),
    ),
    "at most release_max": (
        RULES,
        ACTIVE,
        replace(DUE, owed=700),
        with_(replace(NEW, amount=400)),
        (Record(replace(NEW, amount=400)), Confirm()),
    ),
    "at most what remains": (
        RULES,
        replace(ACTIVE, total=500, remaining=220, reading=seen(total=500, remaining=220)),
        replace(DUE, owed=700),
        replace(
            ACTIVE,
            total=500,
            remaining=220,
            reading=seen(total=500, remaining=220),
            release=replace(NEW, amount=220),
        ),
        (Record(replace(NEW, amount=220)), Confirm()),
    ),
}


@pytest.mark.parametrize(
    ("rules", "state", "event", "expected", "effects"), RULED.values(), ids=RULED
)
def test_edge_under_its_rules_leads_to_this_very_state(rules, state, event, expected, effects):
    """Nothing else is touched, and nothing else is carried out."""
    assert (expected, effects) == step(state, event, rules)


@pytest.mark.parametrize(
    ("fields", "landed"),
    [
        ({"amount": 100}, True),
        ({"released": 380}, True),
        ({"amount": 100, "released": 380}, True),
        ({"amount": 100, "released": 381}, False),
        ({"amount": 101, "released": 380}, False),
        ({"amount": 101}, False),
        ({"released": 379}, False),
        ({}, False),
    ],
)
def test_confirmation_counts_when_all_that_it_says_fits(fields, landed):
    """The amount, the total, or both; nothing said is nothing confirmed."""
    state, _ = step(with_(SENT), said(AnswerKind.CONFIRMED, **fields), RULES)

    assert (state.release is None) is landed
    assert state.settled == (300 if landed else 200)


def test_payable_is_what_is_missing_to_the_level():
    """From the baseline, within the total, less what was released or may have been."""
    assert 300 == ACTIVE.payable(530)
    assert 720 == ACTIVE.payable(10_000)
    assert 200 == with_(SENT).payable(530)
    assert 0 == ACTIVE.payable(0)
    assert 290 == replace(ACTIVE, observed=290).payable(530)
    assert 5 == replace(ACTIVE, remaining=5).payable(530)
    assert 300 == ACTIVE.unsettled(530)
    assert -280 + 50 == ACTIVE.unsettled(0)
