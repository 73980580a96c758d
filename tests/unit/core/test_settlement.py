"""The state table: one row for each of its edges, and a machine that does its worst to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meterd.core.settlement import (
    UNFINISHED,
    UNKNOWN_OUTCOME,
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

ACTIVE, PAUSED, FROZEN, CLOSED, ADOPTING = (
    EscrowStatus.ACTIVE,
    EscrowStatus.PAUSED,
    EscrowStatus.FROZEN,
    EscrowStatus.CLOSED,
    EscrowStatus.ADOPTING,
)
TOTAL = 1_000
WALL = 1_795_000_000_000
DAY_MS = 86_400_000
RULES = Rules(quarantine=900.0, observe_gap=10.0, release_max=500)
PATIENCE = 2 * RULES.quarantine
FRESH = Escrow("e", "a", "main")


def reading(released, mono, **fields):
    """What the service says; consistent unless told otherwise."""
    total = fields.pop("total", TOTAL)
    refunded = fields.pop("refunded", 0)
    plain = Reading(
        escrow="e",
        status="active",
        total=total,
        released=released,
        remaining=total - released - refunded,
        refunded=refunded,
        currency="USDC",
        provider="prov",
        deadline=None,
        mono=mono,
    )
    return replace(plain, **fields)


@dataclass
class Case:
    """One escrow, driven by hand: keeps the effects of the last step and the log of all records."""

    rules: Rules = RULES
    state: Escrow = FRESH
    mono: float = 0.0
    wall: int = WALL
    owed: int = 0
    effects: tuple = ()
    records: list = field(default_factory=list)
    serial: int = 0

    def do(self, event):
        """One step."""
        self.state, self.effects = step(self.state, event, self.rules)
        self.records += [one.release for one in self.effects if isinstance(one, Record)]
        return self

    def later(self, seconds):
        """Let time pass on both clocks."""
        self.mono += seconds
        self.wall += int(seconds * 1000)
        return self

    def read(self, released, **fields):
        """Take a reading, made now."""
        taken = reading(released, fields.pop("at", self.mono), **fields)
        return self.do(Observed(taken, self.mono, self.wall, self.owed))

    def ask(self, owed, why="amount"):
        """Something is due."""
        self.owed = owed
        self.serial += 1
        return self.do(Due(owed, why, f"rel_{self.serial}", owed * 7, self.mono, self.wall))

    def go(self):
        """The intention is durable."""
        return self.do(Go(self.mono, self.wall))

    def answer(self, kind, **fields):
        """The call came back."""
        return self.do(Answered(Answer(kind, "said", **fields), self.mono, self.wall))

    @property
    def blocked(self):
        """Why nothing was intended."""
        return "; ".join(one.reason for one in self.effects if isinstance(one, Blocked))

    @property
    def alarms(self):
        """What a person is told."""
        return [one.action for one in self.effects if isinstance(one, Alarm)]

    @property
    def sent(self):
        """What leaves."""
        return [one.release for one in self.effects if isinstance(one, Send)]

    @property
    def status(self):
        """Of the escrow and of its open release."""
        return self.state.status, None if self.state.release is None else self.state.release.status

    @property
    def last(self):
        """The status of the release that was recorded last."""
        return self.records[-1].status


def adopted(released=0, **fields):
    """An escrow behind its adoption, just read."""
    case = Case(**fields)
    case.read(released).later(10).read(released)
    assert case.status == (ACTIVE, None)
    return case


def intended(owed=100, **fields):
    """With an intention that is to be made durable."""
    return adopted(**fields).ask(owed)


def sent(owed=100, **fields):
    """With a call under way."""
    return intended(owed, **fields).go()


def doubtful(owed=100, **fields):
    """With a call whose answer was lost."""
    return sent(owed, **fields).answer(AnswerKind.DOUBT)


def void(owed=100, **fields):
    """With a release that was given up."""
    return doubtful(owed, **fields).later(PATIENCE).read(0).later(10).read(0)


# -- adopting -> active ----------------------------------------------------------------------------


def test_escrow_is_adopted_when_two_equal_readings_apart_agree():
    """What was released before is the baseline."""
    case = adopted(30)

    assert (30, 30, 970, TOTAL) == (
        case.state.baseline,
        case.state.observed,
        case.state.remaining,
        case.state.total,
    )
    assert "active" == case.state.word
    assert WALL + 10_000 == case.state.settled_at


@pytest.mark.parametrize(
    "drive",
    [
        lambda case: case.read(0),
        lambda case: case.read(0).later(9).read(0),
        lambda case: case.read(0).later(10).read(5),
        lambda case: case.read(0, status="disputed").later(10).read(0),
        lambda case: case.read(0).later(10).read(0, status="completed").later(10).read(0),
        lambda case: case.read(0).do(Unreadable("down", 5)).later(10).read(0),
        lambda case: case.read(0).do(Restarted(0, WALL)).later(10).read(0),
        lambda case: case.read(0).later(10).read(0, currency="EUR"),
        lambda case: case.read(0).later(10).read(0, escrow="f"),
        lambda case: case.read(0).later(10).read(0, remaining=5),
    ],
    ids=[
        *("one reading", "too near", "not equal", "not live", "live no more", "unreadable"),
        *("restarted", "currency", "another escrow", "sums"),
    ],
)
def test_escrow_is_not_adopted_when_its_readings_are_not_two_equal_ones_apart(drive):
    """It waits for better ones, and intends nothing."""
    case = drive(Case())

    assert (ADOPTING, None) == case.status
    assert "adopting" in case.ask(100).blocked


@pytest.mark.parametrize("word", ["refunded", "expired", "released", "cancelled"])
@pytest.mark.parametrize(("owed", "alarms"), [(0, []), (7, ["uncollectible"])])
def test_escrow_that_ended_before_it_was_adopted_is_closed(word, owed, alarms):
    """Two equal readings apart say so; usage that will never be paid is told to a person."""
    case = Case(owed=owed).read(0, status=word)
    assert (ADOPTING, None) == case.status
    assert f"first reading taken: the service says '{word}'" == case.state.reason
    case.later(9).read(0, status=word)
    assert (ADOPTING, None) == case.status
    case.later(1).read(0, status=word)

    assert (CLOSED, None) == case.status
    reason = f"it ended before it was adopted: the service says '{word}'"
    assert (reason, word) == (case.state.reason, case.state.service_status)
    assert alarms == case.alarms
    told = [one.detail for one in case.effects if isinstance(one, Alarm)]
    assert [f"{reason}, with 0.000007 USDC unpaid"] * len(alarms) == told


def test_escrow_that_once_seemed_ended_is_still_adopted():
    """One reading of it may have come from a confused replica: both ways need two."""
    case = Case().read(0, status="expired").later(10).read(0).later(10).read(0)
    assert (ACTIVE, None) == case.status

    case = Case().read(0)
    assert "first reading taken" == case.state.reason
    case.later(10).read(0, status="expired")
    assert (ADOPTING, None) == case.status


@pytest.mark.parametrize(
    "flaw",
    [
        {"currency": "EUR"},
        {"escrow": "f"},
        {"remaining": 5},
        {"provider": "thief"},
        {"total": -5, "remaining": -5},
        {"released": -1, "remaining": TOTAL + 1},
        {"remaining": -1, "refunded": TOTAL + 1},
        {"remaining": TOTAL + 1, "refunded": -1},
    ],
)
def test_escrow_is_frozen_when_two_readings_apart_have_the_same_flaw(flaw):
    """While it is adopted, or later; and a flaw seen once stops releases at once."""
    rules = replace(RULES, provider="prov")
    for case in (Case(rules), adopted(rules=rules)):
        before = case.state.status
        shown = {"released": 0, **flaw}
        case.read(**shown).later(9).read(**shown)
        assert (before, None) == case.status
        assert case.ask(100).blocked
        case.later(1).read(**shown)

        assert (FROZEN, None) == case.status
        assert ["escrow_frozen"] == case.alarms


# -- -> intended -----------------------------------------------------------------------------------


def test_release_is_intended_when_every_guard_holds():
    """Recorded before anything else, and confirmed before it is sent."""
    case = intended(100)

    assert (ACTIVE, ReleaseStatus.INTENDED) == case.status
    assert (Record(case.state.release), Confirm()) == case.effects
    assert (100, 0, 100, 700) == (
        case.state.release.amount,
        case.state.release.before,
        case.state.held,
        case.state.release.units,
    )
    assert 0 == case.state.payable(100)


@pytest.mark.parametrize(
    ("case", "owed", "amount"),
    [
        (adopted(), 1, 1),
        (adopted(), 500, 500),
        (adopted(), 501, 500),
        (adopted(900), 500, 100),
        (adopted(900, rules=replace(RULES, quantum=30)), 500, 90),
        (adopted(rules=replace(RULES, quantum=30)), 100, 90),
    ],
    ids=["one", "the most", "over the most", "what is left", "quanta left", "whole quanta"],
)
def test_amount_is_what_is_missing_to_what_is_owed_in_its_limits(case, owed, amount):
    """By level: never more than owed, than one call may move, and than is left."""
    assert amount == replace_case(case).ask(owed).state.release.amount


BLOCKED = {
    "adopting": (Case(), "adopting"),
    "paused": (adopted().read(0, status="disputed"), "paused"),
    "unreadable": (adopted().do(Unreadable("down", 10)), "down"),
    "frozen": (adopted().do(Freeze("stop")), "frozen"),
    "closed": (adopted().read(0, status="expired"), "closed"),
    "open": (intended(), "open"),
    "in doubt": (doubtful().read(0), "open"),
    "no reading": (adopted().do(Restarted(0, WALL)), "fresh"),
    "an old reading": (adopted().later(5.1), "fresh"),
    "a flaw": (adopted().read(0, total=9).read(0, provider="thief"), "fresh"),
    "a surplus": (adopted().read(1), "deviation"),
    "less than released": (adopted(5).read(4), "less"),
    "paced": (sent().answer(AnswerKind.CONFIRMED, amount=100).read(100), "paced"),
    "near the deadline": (
        adopted().read(0, deadline=WALL + 10_000 + 900_000 - 1),
        "deadline",
    ),
    "nothing is owed": (adopted().read(0), "nothing", 0),
    "less than a quantum": (adopted(rules=replace(RULES, quantum=30)), "nothing"),
    "all refunded": (adopted().read(0, refunded=TOTAL), "nothing"),
}


@pytest.mark.parametrize("row", BLOCKED.values(), ids=BLOCKED)
def test_nothing_is_intended_when_a_guard_does_not_hold(row):
    """The state stays, and the reason is said."""
    made, why, owed = row if len(row) == 3 else (*row, 25)
    before = made.state
    case = replace_case(made).ask(owed)

    assert why in case.blocked
    assert before == case.state


def replace_case(case):
    """A copy, so that rows do not share one."""
    return replace(case, records=list(case.records))


def test_release_may_be_intended_up_to_a_quarantine_before_the_deadline():
    """At that moment itself still."""
    case = adopted().read(0, deadline=WALL + 10_000 + 900_000).ask(10)

    assert ReleaseStatus.INTENDED is case.state.release.status


# -- -> sent, not_sent -----------------------------------------------------------------------------


def test_wallet_is_asked_for_no_less_than_its_service_takes():
    """What is below the minimum is gathered, not asked for and refused."""
    drive = adopted()
    drive.state = replace(drive.state, role=WALLET)
    drive.rules = replace(drive.rules, wallet_minimum=100)
    drive.ask(99)
    below = drive.state.release
    drive.ask(100)

    assert below is None
    assert drive.state.release.amount == 100


def test_intended_release_is_sent_once():
    """Then an answer is waited for, and nothing can send it again."""
    case = sent()

    assert (ACTIVE, ReleaseStatus.SENT) == case.status
    assert [case.state.release] == case.sent
    with pytest.raises(NotAllowed):
        case.go()
    with pytest.raises(NotAllowed):
        case.do(Repeat(case.mono, WALL))


@pytest.mark.parametrize(
    "drive",
    [
        lambda case: case.later(5.1).go(),
        lambda case: case.do(Freeze("stop")).go(),
        lambda case: case.do(Unreadable("down", 10)).go(),
        lambda case: case.go().answer(AnswerKind.NOT_SENT),
    ],
    ids=[
        "too late",
        "frozen meanwhile",
        "paused meanwhile",
        "the call failed before its first byte",
    ],
)
def test_release_is_not_sent_when_it_can_be_sure_that_nothing_left(drive):
    """The amount is unsettled again, and the next try waits a little."""
    case = drive(intended())

    assert case.state.release is None
    assert ReleaseStatus.NOT_SENT is case.last
    assert not case.sent
    assert 100 == case.state.payable(100)
    assert case.state.next_mono > case.mono


def test_wait_grows_with_each_call_that_is_not_sent_and_is_forgotten_when_one_lands():
    """1, 2, 4 … 300 seconds."""
    case, waits = adopted(), []
    for _ in range(12):
        case.read(0).ask(100).go().answer(AnswerKind.NOT_SENT)
        waits.append(case.state.next_mono - case.mono)
        case.later(waits[-1])
    assert [2.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0, 300.0] == waits
    case.read(0).ask(100).go().answer(AnswerKind.CONFIRMED, amount=100)

    assert 0 == case.state.failures


# -- -> confirmed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figures", "status"),
    [
        ({"amount": 100}, ReleaseStatus.CONFIRMED),
        ({"released": 100}, ReleaseStatus.CONFIRMED),
        ({"amount": 100, "released": 100}, ReleaseStatus.CONFIRMED),
        ({"amount": 99, "released": 100}, ReleaseStatus.IN_DOUBT),
        ({}, ReleaseStatus.IN_DOUBT),
        ({"amount": 99}, ReleaseStatus.IN_DOUBT),
        ({"amount": 101}, ReleaseStatus.IN_DOUBT),
        ({"released": 99}, ReleaseStatus.IN_DOUBT),
        ({"amount": 100, "released": 101}, ReleaseStatus.IN_DOUBT),
        ({"amount": 100, "released": 0}, ReleaseStatus.IN_DOUBT),
    ],
)
def test_done_answer_confirms_only_when_its_figures_are_as_expected(figures, status):
    """A bare 2xx, or one with another figure, is in doubt and a reading decides."""
    case = sent().answer(AnswerKind.CONFIRMED, **figures)

    assert status is case.last
    settled = 100 if status is ReleaseStatus.CONFIRMED else 0
    assert (settled, 0) == (case.state.settled, case.state.payable(100))


def test_confirmed_release_needs_a_new_reading_and_its_pace_before_the_next():
    """`units_settled` is what the agreement had used when it was intended."""
    case = sent().answer(AnswerKind.CONFIRMED, amount=100)

    assert (700, 100, 900) == (
        case.state.units_settled,
        case.state.observed,
        case.state.remaining,
    )
    assert "fresh" in case.ask(150).blocked
    assert "paced" in case.read(100).ask(150).blocked
    assert 50 == case.later(2).read(100).ask(150).state.release.amount


# -- -> declined -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status", "alarm"),
    [
        (AnswerKind.DECLINED, FROZEN, "escrow_frozen"),
        (AnswerKind.MISSING, PAUSED, "release_missing"),
        (AnswerKind.KEY_REFUSED, PAUSED, "release_key_refused"),
        (AnswerKind.FORBIDDEN, PAUSED, "release_forbidden"),
        (AnswerKind.EMPTY, ACTIVE, None),
        (AnswerKind.LIMITED, ACTIVE, None),
    ],
)
def test_documented_refusal_gives_the_amount_back(kind, status, alarm):
    """It is declined and unsettled again; what becomes of the escrow depends on the answer."""
    case = sent().answer(kind)

    assert (status, None) == case.status
    assert ReleaseStatus.DECLINED is case.last
    assert 100 == case.state.payable(100)
    assert ([] if alarm is None else [alarm]) == case.alarms
    if status is PAUSED:
        assert (ACTIVE, None) == case.read(0).status


@pytest.mark.parametrize(
    "kind", [AnswerKind.MISSING, AnswerKind.KEY_REFUSED, AnswerKind.FORBIDDEN, AnswerKind.EMPTY]
)
def test_refusal_of_a_release_under_way_leaves_a_frozen_escrow_frozen(kind):
    """A person froze it while the call was out: only a person lets it go on."""
    case = sent().do(Freeze("stop")).answer(kind)

    assert (FROZEN, None) == case.status
    assert "stop" == case.state.reason
    assert (FROZEN, None) == case.read(0).status


def test_release_that_was_forbidden_waits_for_its_own_escrow_alone():
    """Ten seconds at least: a right is given by a person, and not sooner for being asked more."""
    case = sent().answer(AnswerKind.FORBIDDEN).later(9.9).read(0)
    assert "paced" in case.ask(100).blocked

    case.later(0.1).read(0).ask(100)
    assert ReleaseStatus.INTENDED is case.last


def test_conflict_answer_is_decided_by_a_reading():
    """409 says only that something was there before."""
    assert ReleaseStatus.IN_DOUBT is sent().answer(AnswerKind.CONFLICT).last


@pytest.mark.parametrize(
    ("retry_after", "wait"), [(None, 4.0), (60.0, 60.0), (1e9, 300.0), (0.0, 2.0), (-5.0, 2.0)]
)
def test_limited_release_waits_as_long_as_the_service_asks_within_reason(retry_after, wait):
    """Never shorter than the pace, never longer than five minutes, and no outage cuts it short."""
    case = sent().answer(AnswerKind.LIMITED, retry_after=retry_after)
    assert case.mono + wait == case.state.next_mono
    case.do(Unreadable("down", case.mono))

    assert case.mono + max(wait, 2.0) == case.state.next_mono


# -- -> in_doubt and out of it ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [intended, sent, doubtful])
def test_open_release_is_in_doubt_after_a_restart(make):
    """Its call may have left, and the quarantine begins anew."""
    case = make()
    case.mono = 0.0
    case.do(Restarted(0.0, case.wall))

    assert (ACTIVE, ReleaseStatus.IN_DOUBT) == case.status
    assert ["release_in_doubt"] == case.alarms
    assert 0 == case.state.payable(100)
    case.later(PATIENCE - 1).read(0).later(10).read(0)
    assert ReleaseStatus.IN_DOUBT is case.state.release.status


def test_restart_with_nothing_open_changes_nothing_that_is_stored():
    """Start, stop: the same."""
    case = adopted(5)
    before = case.state
    case.do(Restarted(0.0, WALL))

    assert replace(before, reading=None, next_mono=0.0) == case.state
    assert () == case.effects


def test_doubt_is_confirmed_as_soon_as_a_reading_shows_it():
    """Also by the service's own history, also when more than that has moved."""
    for case in (
        doubtful().read(100),
        doubtful().read(150),
        doubtful().read(0, release_ids=frozenset({"rel_1"})),
        doubtful().do(Freeze("stop")).read(100),
    ):
        assert ReleaseStatus.CONFIRMED is case.last
        assert (100, None) == (case.state.settled, case.state.release)


def test_reading_before_the_answer_decides_nothing():
    """It may have been made before the call."""
    assert ReleaseStatus.SENT is sent().read(100).state.release.status


def test_doubt_is_void_when_two_late_readings_apart_do_not_show_it():
    """A call may land for one quarantine, and a reading may be one quarantine old."""
    case = doubtful()
    case.later(PATIENCE - 1).read(0).later(11).read(0)
    assert 1 == case.state.release.sightings
    case.later(9).read(0)
    assert ReleaseStatus.IN_DOUBT is case.state.release.status
    case.later(1).read(0)

    assert (ReleaseStatus.VOID, (ACTIVE, None)) == (case.last, case.status)
    assert ["rel_1"] == [one.id for one in case.state.voids]
    assert 100 == case.ask(100).state.release.amount


def test_call_that_lands_as_late_as_it_may_is_not_paid_again_by_the_oldest_readings():
    """It lands a quarantine after it was sent; readings show what was true a quarantine before."""
    case = doubtful()
    sent_at = case.mono
    landed_at = sent_at + RULES.quarantine
    while case.mono < landed_at + RULES.quarantine:
        case.read(100 if case.mono - RULES.quarantine >= landed_at else 0).ask(100)
        assert case.state.release is not None
        assert "rel_1" == case.state.release.id
        case.later(50)

    assert ReleaseStatus.CONFIRMED is case.read(100).last


def less_than_before():
    """A release in doubt over a baseline that the service shows no more."""
    return adopted(5).ask(100).go().answer(AnswerKind.DOUBT).later(PATIENCE).read(4)


ESCALATIONS = {
    "strict": lambda: (
        doubtful(rules=replace(RULES, strict=True)).later(PATIENCE).read(0).later(10).read(0)
    ),
    "a part of it": lambda: doubtful().later(PATIENCE).read(50),
    "less than before": less_than_before,
    "a second void in a day": lambda: (
        void().ask(100).go().answer(AnswerKind.DOUBT).later(PATIENCE).read(0).later(10).read(0)
    ),
}


@pytest.mark.parametrize("make", ESCALATIONS.values(), ids=ESCALATIONS)
def test_doubt_is_escalated_when_only_a_person_can_say(make):
    """The escrow is frozen, the amount stays held, and a restart changes neither."""
    case = make()

    assert (FROZEN, ReleaseStatus.ESCALATED) == case.status
    assert ["escrow_frozen"] == case.alarms
    held = case.state
    case.do(Restarted(case.mono, case.wall)).later(PATIENCE).read(0).later(10).read(0)
    assert (FROZEN, ReleaseStatus.ESCALATED) == case.status
    assert held.held == case.state.held
    with pytest.raises(NotAllowed, match="meterd resolve"):
        case.do(Resume("go"))


def test_void_of_another_day_does_not_count():
    """One a day is allowed."""
    case = void()
    case.wall += DAY_MS
    case.read(0).ask(100).go().answer(AnswerKind.DOUBT).later(PATIENCE).read(0).later(10).read(0)

    assert (ReleaseStatus.VOID, 2) == (case.last, len(case.state.voids))


def test_release_is_not_intended_on_the_word_of_a_reading_that_ends_a_doubt():
    """The reading that shows a release absent may speak of a dispute as well."""
    case = doubtful().later(PATIENCE).read(0).later(10).read(0, status="disputed")
    assert ReleaseStatus.VOID is case.last

    assert "disputed" in case.ask(100).blocked
    assert (PAUSED, None) == case.read(0, status="disputed").status


@pytest.mark.parametrize("landed", [True, False])
@pytest.mark.parametrize("make", [doubtful, ESCALATIONS["strict"]])
def test_person_resolves_a_doubt(make, landed):
    """The word is kept with the release."""
    case = make()
    case.do(Resolved(landed, "saw it", case.mono, case.wall))

    assert (ReleaseStatus.CONFIRMED if landed else ReleaseStatus.VOID) is case.last
    assert "saw it" in case.records[-1].history[-1][2]
    assert case.state.release is None
    assert (100 if landed else 0) == case.state.settled
    with pytest.raises(NotAllowed):
        case.do(Resolved(landed, "again", case.mono, case.wall))


# -- idempotency = "honoured" ----------------------------------------------------------------------

HONOURED = replace(RULES, honoured=True)


def test_doubt_is_repeated_with_the_same_release_where_keys_are_honoured():
    """Instead of the quarantine, at the usual pace."""
    case = doubtful(rules=HONOURED)
    assert "paced" in case.do(Repeat(case.mono, WALL)).blocked
    case.later(2).do(Repeat(case.mono + 2, WALL))

    assert [case.records[0].id] == [one.id for one in case.sent]
    assert ReleaseStatus.CONFIRMED is case.answer(AnswerKind.CONFIRMED, amount=100).last


@pytest.mark.parametrize("kind", [kind for kind in AnswerKind if kind is not AnswerKind.CONFIRMED])
def test_refused_repetition_leaves_the_first_call_in_doubt(kind):
    """That the second call did nothing says nothing of the first."""
    case = doubtful(rules=HONOURED).later(2)
    case.do(Repeat(case.mono, WALL)).answer(kind, retry_after=60.0)

    assert (ACTIVE, ReleaseStatus.IN_DOUBT) == case.status
    assert 0 == case.state.payable(100)
    assert case.mono + 60 == case.state.next_mono


def test_repetition_is_refused_where_it_has_no_place():
    """Without the promise of the service, without a doubt, and on a frozen escrow."""
    with pytest.raises(NotAllowed, match="honoured"):
        doubtful().do(Repeat(99, WALL))
    with pytest.raises(NotAllowed, match="in doubt"):
        adopted(rules=HONOURED).do(Repeat(99, WALL))
    frozen = doubtful(rules=HONOURED).do(Freeze("stop")).do(Repeat(99, WALL))
    assert "frozen" == frozen.blocked
    escalated = doubtful(rules=HONOURED).later(PATIENCE).read(50)
    assert ReleaseStatus.ESCALATED is escalated.state.release.status
    assert "frozen" == escalated.do(Repeat(1e9, WALL)).blocked


# -- The service's own state -----------------------------------------------------------------------


@pytest.mark.parametrize("word", ["disputed", "completed", "awaiting_release", "banana"])
def test_escrow_is_paused_while_the_service_says_anything_but_live(word):
    """A person is told once, and a live reading ends it."""
    case = adopted().read(0, status=word)
    assert ((PAUSED, None), ["escrow_paused"]) == (case.status, case.alarms)
    assert [] == case.later(1).read(0, status=word).alarms

    assert (ACTIVE, None) == case.read(0, status="partially_released").status


@pytest.mark.parametrize("word", ["released", "refunded", "expired", "cancelled"])
@pytest.mark.parametrize(
    ("owed", "released", "alarms"),
    [(0, 0, []), (100, 0, ["uncollectible"]), (100, TOTAL, [])],
)
def test_escrow_is_closed_when_the_service_has_ended_it(word, owed, released, alarms):
    """What can no more be collected is said; nothing is sent to it any more."""
    case = adopted(owed=owed).read(released, status=word)

    assert ((CLOSED, None), alarms) == (case.status, case.alarms)
    assert "closed" in case.ask(200).blocked
    assert (CLOSED, None) == case.read(0).read(5, total=9).status
    with pytest.raises(NotAllowed):
        case.do(Freeze("stop"))


def test_escrow_is_paused_while_it_cannot_be_read():
    """Each failure makes the wait longer; a reading ends it."""
    case, waits = adopted(), []
    for _ in range(11):
        case.do(Unreadable("down", case.mono))
        waits.append(case.state.next_mono - case.mono)
        case.later(waits[-1])

    assert [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0] == waits
    assert (PAUSED, "down") == (case.state.status, case.state.reason)
    assert (ACTIVE, 0) == (case.read(0).state.status, case.state.failures)


@pytest.mark.parametrize("case", [Case(), adopted().do(Freeze("stop"))], ids=["adopting", "frozen"])
def test_escrow_that_is_not_active_stays_as_it_is_when_it_cannot_be_read(case):
    """There is nothing to pause."""
    case = replace_case(case)
    before = case.state.status

    assert before is case.do(Unreadable("down", 5)).state.status


def test_reading_that_was_overtaken_is_left_out():
    """Answers may come in another order than their requests."""
    case = adopted().later(5).read(0)
    newer = case.state
    case.read(0, at=case.mono - 1)

    assert newer == case.state


# -- Closing ---------------------------------------------------------------------------------------


def test_closing_escrow_is_settled_to_the_last_quantum_and_closed():
    """Also in several releases."""
    case = adopted().do(Closing())
    assert "closing" == case.state.word
    for amount in (500, 200):
        case.ask(700, "close").go()
        assert amount == case.state.release.amount
        case.answer(AnswerKind.CONFIRMED, amount=amount).later(2).read(case.state.observed)
    case.ask(700, "close")

    assert ((CLOSED, None), []) == (case.status, case.alarms)
    assert 700 == case.state.settled


def test_closing_escrow_says_what_stays_unpaid():
    """Owed above the deposit cannot be collected."""
    case = adopted(TOTAL).do(Closing())
    assert "exhausted" == case.state.word

    assert ["uncollectible"] == case.ask(100, "close").alarms
    assert "closed" == case.state.word


def test_closing_escrow_waits_for_what_is_in_doubt():
    """It is not closed over an open release."""
    case = doubtful().do(Closing()).read(0).ask(100, "close")

    assert (ACTIVE, ReleaseStatus.IN_DOUBT) == case.status


# -- Deviations ------------------------------------------------------------------------------------


def _twice(case, released, **fields):
    case.read(released, **fields)
    assert case.state.status is not FROZEN, "one sight may be an old reading"
    assert case.ask(case.owed + 50).blocked
    case.owed -= 50
    return case.later(10).read(released, **fields)


def test_void_that_lands_late_is_booked_and_freezes():
    """The quarantine was too short: it is four times as long from now on."""
    case = _twice(void(), 100)

    assert (FROZEN, None) == case.status
    assert (ReleaseStatus.LATE, 100, 4) == (
        case.last,
        case.state.settled,
        case.state.quarantine_factor,
    )
    assert [ReleaseStatus.LATE] == [one.status for one in case.state.voids]
    case.do(Resume("seen"))
    assert (0, 0) == (case.state.payable(100), case.state.credited)


def test_longer_quarantine_holds_for_the_next_doubt():
    """Four times as long."""
    case = _twice(void(), 100).do(Resume("seen")).later(2)
    case.wall += DAY_MS
    case.read(100).ask(150).go().answer(AnswerKind.DOUBT)
    case.later(4 * PATIENCE - 1).read(100).later(10).read(100)
    assert ReleaseStatus.IN_DOUBT is case.state.release.status
    case.later(10).read(100)

    assert ReleaseStatus.VOID is case.last


def test_void_that_the_history_names_is_booked_though_somebody_else_released_too():
    """The id decides where the amount does not fit."""
    case = _twice(void(), 130, release_ids=frozenset({"rel_1"}))

    assert (FROZEN, ReleaseStatus.LATE, 100) == (case.state.status, case.last, case.state.settled)


def test_foreign_release_freezes():
    """Somebody else, a second daemon or a restored backup."""
    case = _twice(adopted(owed=100), 40)

    assert (FROZEN, None) == case.status
    assert "somebody else released: 0.00004 USDC more" in case.state.reason
    case.do(Resume("it was me"))
    assert ((ACTIVE, None), 40, 60) == (
        case.status,
        case.state.credited,
        case.state.payable(100),
    )


def test_foreign_release_freezes_even_when_it_grows_from_reading_to_reading():
    """A second daemon that goes on paying must not hide behind its own progress."""
    case = adopted(owed=100)
    for released in (10, 20, 30):
        case.read(released).later(5)

    assert FROZEN is case.state.status


def test_foreign_release_is_credited_where_the_policy_says_so():
    """It counts as payment, so that the next one is smaller."""
    case = _twice(adopted(owed=100, rules=replace(RULES, credit_foreign=True)), 40)

    assert ((ACTIVE, None), ["foreign_release_credited"]) == (case.status, case.alarms)
    assert 60 == case.read(40).ask(100).state.release.amount


@pytest.mark.parametrize("credit", [True, False])
def test_overpaid_escrow_is_frozen_with_the_amount(credit):
    """Whatever the policy for other people's releases is."""
    case = _twice(adopted(5, owed=30, rules=replace(RULES, credit_foreign=credit)), 45)

    assert FROZEN is case.state.status
    assert "overpaid by 0.00001 USDC" in case.state.reason


def test_surplus_that_is_gone_at_the_second_sight_was_none():
    """A replica may err."""
    case = adopted().read(5).later(5).read(0)

    assert ((ACTIVE, None), None) == (case.status, case.state.suspicion)


def test_escrow_that_shows_less_is_frozen_behind_the_quarantine():
    """The service lost a write or lies; until then it may be an old reading."""
    case = sent().answer(AnswerKind.CONFIRMED, amount=100)
    case.later(5).read(0)
    case.later(RULES.quarantine).read(0)
    assert (ACTIVE, None) == case.status
    assert "less" in case.ask(200).blocked
    case.later(1).read(0)

    assert (FROZEN, None) == case.status
    assert 0 == case.state.payable(100)


def test_escrow_that_shows_less_now_and_then_is_not_frozen():
    """It is long in one piece, or not at all: a right reading, or a surplus, ends it."""
    case = sent().answer(AnswerKind.CONFIRMED, amount=100)
    for released in (0, 100, 0, 130, 0):
        case.later(RULES.quarantine - 1).read(released)

    assert (ACTIVE, None) == case.status


def test_answer_with_another_amount_ends_frozen_when_the_service_did_pay_it():
    """In doubt first; the reading that shows what was really paid freezes."""
    more = sent().answer(AnswerKind.CONFIRMED, amount=130)
    assert ReleaseStatus.IN_DOUBT is more.last
    more.read(130).later(2)
    _twice(more, 130)
    less = sent().answer(AnswerKind.CONFIRMED, amount=70).later(PATIENCE).read(70)

    assert (FROZEN, None) == more.status
    assert (FROZEN, ReleaseStatus.ESCALATED) == less.status


@pytest.mark.parametrize("flaw", [{"total": 900}, {"provider": "thief"}, {"remaining": 1}])
def test_escrow_is_frozen_when_what_never_changes_has_changed(flaw):
    """Total, provider, and that the parts are the whole."""
    assert FROZEN is _twice(adopted(), 0, **flaw).state.status


def test_escrow_is_frozen_when_its_history_shows_a_release_that_its_totals_do_not():
    """Of a void, at the second sight; of a doubt, when its totals stay behind."""
    shown = frozenset({"rel_1"})
    assert FROZEN is _twice(void(), 0, release_ids=shown).state.status

    case = doubtful().read(0, release_ids=shown).later(1).read(0)
    assert ReleaseStatus.CONFIRMED is case.last
    assert FROZEN is case.later(RULES.quarantine + 1).read(0).state.status


# -- Frozen ----------------------------------------------------------------------------------------


def test_frozen_escrow_sends_nothing_until_a_person_resumes_it():
    """Neither readings nor restarts thaw it."""
    case = adopted().do(Freeze("a person")).read(0).later(10).read(5).do(Restarted(0, WALL))
    case.read(0, at=99).read(9, at=110, status="expired").read(0, total=5).read(0, total=5, at=200)
    assert ((FROZEN, None), "a person") == (case.status, case.state.reason)
    assert "frozen" in case.ask(100).blocked
    case.read(0).do(Resume("seen"))

    assert ((ACTIVE, None), ["escrow_resumed"]) == (case.status, case.alarms)


def test_frozen_escrow_settles_a_doubt_only_by_seeing_it_land():
    """That it is absent is a person's to say."""
    case = doubtful().do(Freeze("stop")).later(PATIENCE).read(0).later(10).read(0)

    assert (FROZEN, ReleaseStatus.IN_DOUBT) == case.status


def test_resume_is_refused_when_there_is_nothing_to_resume_from():
    """Not frozen, in doubt, or not read since."""
    with pytest.raises(NotAllowed, match="not frozen"):
        adopted().do(Resume("?"))
    with pytest.raises(NotAllowed, match="--landed"):
        doubtful().do(Freeze("stop")).do(Resume("?"))
    with pytest.raises(NotAllowed, match="reading"):
        adopted().do(Freeze("stop")).do(Restarted(0, WALL)).do(Resume("?"))


def test_resume_does_not_take_an_old_reading_for_a_lost_write():
    """Right after a release the service may still show what was before it."""
    case = sent().answer(AnswerKind.CONFIRMED, amount=100).do(Freeze("stop")).read(0)
    with pytest.raises(NotAllowed, match="in_doubt_quarantine"):
        case.do(Resume("looks fine"))
    hidden = adopted(5).ask(100).go().answer(AnswerKind.DOUBT).do(Freeze("stop")).read(4)
    hidden.do(Resolved(False, "absent", hidden.mono, WALL))
    with pytest.raises(NotAllowed, match="in_doubt_quarantine"):
        hidden.do(Resume("the reading was taken while something was open"))
    case.later(RULES.quarantine + 1).read(0).do(Resume("the service lost it, pay again"))

    assert (-100, 100) == (case.state.credited, case.state.payable(100))


def test_escrow_frozen_before_it_was_adopted_is_adopted_after_it_is_resumed():
    """Its baseline is what two readings then agree on, and is counted once."""
    case = Case().read(30).do(Freeze("stop")).later(10).read(30).later(10).read(30)
    assert (FROZEN, None) == case.status
    case.do(Resume("go"))
    assert (ADOPTING, None) == case.status
    case.later(10).read(30).later(10).read(30)

    assert (ACTIVE, 30, 0) == (case.state.status, case.state.baseline, case.state.credited)
    assert 100 == case.ask(100).state.release.amount


def test_input_without_its_release_is_not_allowed():
    """An answer to nothing is a mistake of the caller."""
    for event in (Answered(Answer(AnswerKind.DOUBT, ""), 0, 0), Go(0, 0)):
        with pytest.raises(NotAllowed):
            adopted().do(event)
    with pytest.raises(NotAllowed):
        intended().answer(AnswerKind.CONFIRMED, amount=100)


# -- A machine that does its worst -----------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A request under way: it lands at some moment up to `until`, or never."""

    release: str
    amount: int
    until: float


class Service(RuleBasedStateMachine):
    """One escrow at a service that keeps A1 to A5 and is as bad as they allow.

    The daemon's side is what bookkeeper and settler do: a commit before each effect, `Go` behind
    the intention, an answer for each call unless the process dies.
    """

    table = replace(RULES, release_max=40, voids_per_day=3)
    total = 120

    def __init__(self):
        super().__init__()
        self.case = Case(rules=self.table)
        self.used = 0
        self.paid = 7  # By somebody else, before meterd came: the baseline.
        self.past = [(-1e9, 7)]  # (since when, paid)
        self.foreign = 0
        self.calls = []
        self.landed = set()
        self.times_sent = {}
        for _ in range(2):
            self._read(self.paid)
            self.case.later(10)
        assert self.case.state.status is ACTIVE

    # -- The daemon

    def _read(self, released):
        self.case.owed = self.used
        self.case.read(released, total=self.total)

    @rule(age=st.sampled_from([0.0, 0.0, 0.5, 1.0]), times=st.integers(1, 3))
    def read(self, age, times):
        """Readings apart show what was true at some moment of the last quarantine."""
        for _ in range(times):
            if self.awaiting:
                return
            self._read(self._seen(age))
            self.wait(10.0)

    def _seen(self, age):
        then = self.case.mono - age * self.table.quarantine
        return [paid for since, paid in self.past if since <= then][-1]

    @precondition(lambda self: self._has(ReleaseStatus.IN_DOUBT))
    @rule(age=st.sampled_from([0.0, 1.0]), lands=st.booleans())
    def sit_out(self, age, lands):
        """A quarantine passes over a doubt, whose call may land at its very end."""
        if self.calls and lands:
            self.land(late=True, everything=True)
        else:
            self.wait(900.0)
        self.read(age, 3)

    @rule()
    def due(self):
        """The usual visit: a true reading, then an intention."""
        if self.awaiting:
            return
        self._read(self.paid)
        self.case.ask(self.used)

    @rule(
        units=st.integers(1, 40),
        answer=st.sampled_from(["lost", "lost", "done", "refused"]),
        age=st.sampled_from([0.0, 1.0]),
    )
    def pay(self, units, answer, age):
        """Usage, a visit and its call in one go, since that is what happens most."""
        self.use(units)
        self._person()
        self.wait(max(2.0, self.case.state.next_mono - self.case.mono))
        if not self.awaiting:
            self._read(self._seen(age))
            self.case.ask(self.used)
        if not self._has(ReleaseStatus.INTENDED):
            return
        self.go(lost=False)
        if answer == "done" and self._has(ReleaseStatus.SENT):
            self._land(self.calls[-1])
        if self._has(ReleaseStatus.SENT):
            kinds = {"done": AnswerKind.CONFIRMED, "refused": AnswerKind.LIMITED}
            self.answer(kinds.get(answer, AnswerKind.DOUBT), says_total=False)

    @rule()
    def due_without_reading(self):
        """An intention on whatever was read last."""
        if not self.awaiting:
            self.case.ask(self.used)

    @property
    def awaiting(self):
        """Whether an intention or a call is under way: no other input of the settler comes then."""
        release = self.case.state.release
        return release is not None and release.status not in UNKNOWN_OUTCOME

    def _has(self, status):
        release = self.case.state.release
        return release is not None and release.status is status

    @precondition(lambda self: self._has(ReleaseStatus.INTENDED))
    @rule(lost=st.booleans())
    def go(self, lost):
        """The call leaves, unless somebody froze the escrow; it may be lost on its way."""
        frozen = self.case.state.status is FROZEN
        self.case.go()
        assert not (frozen and self.case.sent), "frozen: nothing is sent"
        for release in self.case.sent:
            self.times_sent[release.id] = self.times_sent.get(release.id, 0) + 1
            if not lost:
                until = self.case.mono + self.table.quarantine
                self.calls.append(Call(release.id, release.amount, until))

    @precondition(lambda self: self._has(ReleaseStatus.SENT))
    @rule(
        kind=st.sampled_from([kind for kind in AnswerKind if kind is not AnswerKind.DECLINED]),
        says_total=st.booleans(),
    )
    def answer(self, kind, says_total):
        """An answer tells the truth (A3), or is lost."""
        release = self.case.state.release
        if release.id not in self.landed and kind is AnswerKind.CONFIRMED:
            kind = AnswerKind.DOUBT
        if kind not in (AnswerKind.DOUBT, AnswerKind.CONFIRMED, AnswerKind.CONFLICT):
            if release.id in self.landed:
                kind = AnswerKind.DOUBT
            else:
                self.calls = [call for call in self.calls if call.release != release.id]
        figures = {"amount": release.amount} if kind is AnswerKind.CONFIRMED else {}
        if figures and says_total:
            figures = {"released": release.before + release.amount}
        self.case.answer(kind, **figures)

    @rule()
    def restart(self):
        """Killed at this very step; the monotonic clock goes on, as it may."""
        self.case.do(Restarted(self.case.mono, self.case.wall))

    @precondition(lambda self: self.case.records)
    @rule()
    def unreadable(self):
        """The service is down for a reading."""
        if not self.awaiting:
            self.case.do(Unreadable("down", self.case.mono))

    @rule(seconds=st.sampled_from([0.5, 10.0, 890.0, 900.0, 1800.0]))
    def wait(self, seconds):
        """Time passes; calls that have not landed by their time never will."""
        self.case.later(seconds)
        self.calls = [call for call in self.calls if call.until >= self.case.mono]

    # -- Persons

    @precondition(lambda self: self.case.records)
    @rule()
    def freeze(self):
        """At any moment."""
        if self.case.state.status is not CLOSED:
            self.case.do(Freeze("a person"))

    @rule()
    def resume(self):
        """A person resolves truthfully what is in doubt, then resumes, where the table lets him."""
        self._person()

    def _person(self):
        case = self.case
        if case.state.status is not FROZEN or self.awaiting:
            return
        release = case.state.release
        if release is not None:
            if any(call.release == release.id for call in self.calls):
                return  # It is not decided yet: the person waits.
            landed = release.id in self.landed
            case.do(Resolved(landed, "looked", case.mono, case.wall))
        try:
            case.do(Resume("looked"))
        except NotAllowed:
            return

    # -- The world

    @rule(units=st.integers(1, 25))
    def use(self, units):
        """Usage comes, also more than the deposit covers."""
        if self.used < 150:
            self.used += units

    @precondition(lambda self: self.calls)
    @rule(late=st.booleans(), everything=st.booleans())
    def land(self, late, everything):
        """Calls take effect, perhaps at the last moment, or are refused since nothing is left."""
        if late:
            self.case.later(max(0.0, self.calls[0].until - self.case.mono))
        for call in list(self.calls) if everything else self.calls[:1]:
            self._land(call)

    def _land(self, call):
        self.calls.remove(call)
        if self.paid + call.amount <= self.total:
            self.landed.add(call.release)
            self._move(call.amount)

    def _move(self, amount):
        self.paid += amount
        self.past.append((self.case.mono, self.paid))

    @precondition(lambda self: len(self.case.records) > 4)
    @rule(amount=st.integers(1, 5))
    def foreign_release(self, amount):
        """Somebody else releases: A6 is not kept, and still nothing of meterd's is too much."""
        if self.foreign < 10 and self.paid + amount <= self.total:
            self.foreign += amount
            self._move(amount)

    # -- What must hold

    @invariant()
    def never_more_than_used(self):
        """What meterd released is never more than was used."""
        assert self.paid - 7 - self.foreign <= self.used

    @invariant()
    def at_most_one_unfinished(self):
        """The records of releases, laid on top of one another, have one open at most."""
        latest = {release.id: release.status for release in self.case.records}
        assert sum(status in UNFINISHED for status in latest.values()) <= 1

    @invariant()
    def each_sent_once(self):
        """Whatever happens."""
        assert all(times == 1 for times in self.times_sent.values())

    def teardown(self):
        """Faults over: within some visits everything payable is released."""
        self.calls = []
        for _ in range(60):
            self.case.later(1_000)
            if self._has(ReleaseStatus.SENT):
                done = self.case.state.release.id in self.landed
                amount = self.case.state.release.amount
                kind = AnswerKind.CONFIRMED if done else AnswerKind.DOUBT
                self.case.answer(kind, **({"amount": amount} if done else {}))
            elif self._has(ReleaseStatus.INTENDED):
                self.case.go()
            else:
                self.due()
                self._person()
            if self._has(ReleaseStatus.INTENDED):
                self.go(lost=False)
                for call in self.calls:
                    self.landed.add(call.release)
                    self._move(call.amount)
                self.calls = []
            self.never_more_than_used()
        payable = min(self.used + 7, self.total) - self.paid
        assert payable <= 0, (payable, self.case.state)


Service.TestCase.settings = settings(
    max_examples=400,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much],
)
TestService = Service.TestCase


def test_release_is_a_fact_that_cannot_be_changed():
    """Steps hand out new ones."""
    release = Release("r", "e", 1, 0, ReleaseStatus.INTENDED, "", 0, 0, ())
    with pytest.raises(AttributeError):
        release.amount = 2


def test_resumed_escrow_is_not_frozen_again_by_a_void_that_its_history_shows():
    """A person who resumes accepts what the history shows: it is booked, and the escrow goes on."""
    case = void(100)
    given_up = case.state.voids[0]
    case.do(Freeze("a person looks")).later(20)
    case.read(100, release_ids=frozenset({given_up.id}))
    case.do(Resume("it landed after all", case.wall))
    for _ in range(3):
        case.later(20).read(100, release_ids=frozenset({given_up.id}))

    assert ACTIVE is case.state.status
    assert (100, 0) == (case.state.settled, case.state.credited)
    assert ReleaseStatus.LATE is case.state.voids[0].status
