"""How an escrow is paid exactly once through a call that cannot be repeated: the state table.

Theory of operation. `release-partial` is a delta call: sent twice, it pays twice, and the network
loses answers. So

1. a release is *intended* before it is sent, and sent at most once in its life. There is no retry;
   there is "read what the service released, then intend a new one";
2. the amount comes by level: what should have been released so far, less what the service says it
   released. Lost local state, an old backup or somebody else's release make the next payment
   smaller, never double;
3. an unknown outcome counts as paid until a reading shows that it landed, or until the quarantine
   has passed twice (the call may land for as long, and a reading may be as old) and two readings
   apart show that it did not. One that lands even later is booked as `late` and freezes the escrow.

`step(state, input, rules) -> (state, effects)` is all of it. It is pure: the daemon, the simulation
and the model checker drive this very function. Its caller owes it three things: the new state and
every `Record` are durable before any other effect is carried out; `Send` is carried out at most
once; inputs of one escrow come one at a time.

Amounts are integers of micros. `mono` is seconds of a monotonic clock that starts anew with the
process, `wall` is milliseconds since the epoch. Doubt, what is it good for? Where this file has to
choose between paying late and paying twice, it pays late.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from meterd.core.money import format_amount

# --------------------------------------------------------------------------------------------------
# Facts


class EscrowStatus(enum.StrEnum):
    """Where an escrow stands. People are also shown `exhausted` and `closing`: see `word`."""

    ADOPTING = "adopting"
    ACTIVE = "active"
    PAUSED = "paused"
    CLOSED = "closed"
    FROZEN = "frozen"


class ReleaseStatus(enum.StrEnum):
    """Where a release stands. Found `intended` after a restart it is in doubt: it may have left."""

    INTENDED = "intended"
    SENT = "sent"
    IN_DOUBT = "in_doubt"
    ESCALATED = "escalated"
    CONFIRMED = "confirmed"
    DECLINED = "declined"
    NOT_SENT = "not_sent"
    VOID = "void"
    LATE = "late"


UNFINISHED = frozenset(
    {
        ReleaseStatus.INTENDED,
        ReleaseStatus.SENT,
        ReleaseStatus.IN_DOUBT,
        ReleaseStatus.ESCALATED,
    }
)
WALLET = "wallet"  # The role of a payer's wallet, drawn on like an escrow.
UNKNOWN_OUTCOME = frozenset({ReleaseStatus.IN_DOUBT, ReleaseStatus.ESCALATED})

# A right to release is given by a person; asking for it more often changes nothing.
FORBIDDEN_WAIT_S = 10.0

# What the service's own words mean (escrow-api.md, "states").
LIVE = frozenset({"funded", "locked", "active", "pending", "working", "partially_released"})
WINDING = frozenset({"completed", "complete", "awaiting_release"})
ENDED = frozenset({"released", "refunded", "expired", "cancelled"})


@dataclass(frozen=True, slots=True)
class Release:
    """One call of release-partial. `history` holds (wall ms, status, detail), oldest first."""

    id: str
    escrow: str
    amount: int
    before: int  # What the service had released when this was intended.
    status: ReleaseStatus
    why: str  # Which threshold asked for it.
    units: int  # The agreement's units so far, in nanos, when it was intended.
    created_at: int
    history: tuple[tuple[int, str, str], ...]
    # Not stored: they are measured with the monotonic clock of this process.
    since_mono: float = 0.0  # When it was intended or, in doubt, when the doubt began.
    sightings: int = 0  # Readings behind the quarantine that did not show it.
    sighted_mono: float = 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What `GET /escrow/:id` said, as exact integers. `mono` is when its request was sent."""

    escrow: str
    status: str
    total: int
    released: int
    remaining: int
    refunded: int
    currency: str | None
    provider: str | None
    deadline: int | None  # Wall ms; None: the service gave none.
    mono: float
    # Ids of ours in the service's own history, where it has one.
    release_ids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Escrow:
    """All that meterd knows of one escrow. What stands under "Not stored" lives for one process."""

    id: str
    agreement: str
    role: str
    status: EscrowStatus = EscrowStatus.ADOPTING
    reason: str = ""
    closing: bool = False
    total: int = 0
    baseline: int = 0  # Released before meterd adopted it.
    settled: int = 0  # Released by meterd and known to have landed.
    # Released by somebody else and accepted as payment, by policy or by a person.
    credited: int = 0
    observed: int = 0
    remaining: int = 0
    service_status: str = ""
    provider: str | None = None
    deadline: int | None = None
    quarantine_factor: int = 1  # Grows when the world showed that the quarantine was too short.
    units_settled: int = 0  # The agreement's units when the last release was confirmed, in nanos.
    settled_at: int = 0  # When that was, wall ms.
    # What is left is to be refunded once the escrow is closed; taken back when it has been.
    refund: bool = False
    release: Release | None = None
    voids: tuple[Release, ...] = ()  # Releases given up as absent: any of them may still land.
    # Not stored.
    reading: Reading | None = None
    # A deviation seen once, and when; the second sight decides.
    suspicion: tuple[str, float] | None = None
    low_since: float | None = None  # Since when the service shows less than was released.
    next_mono: float = 0.0  # No release before this: pacing, and what a 429 asked for.
    failures: int = 0  # Calls in a row that were certainly not done.

    @property
    def expected(self) -> int:
        """What the service should show as released, when nothing is open."""
        return self.baseline + self.settled + self.credited

    @property
    def refillable(self) -> bool:
        """Whether its total may change: a wallet's payer fills it up, an escrow has no top-up."""
        return self.role == WALLET

    @property
    def held(self) -> int:
        """What may or may not have been paid."""
        return self.release.amount if self.release is not None else 0

    def payable(self, owed: int) -> int:
        """How much of `owed`, what meterd accrued in whole micros, may be asked for now; >= 0."""
        level = min(self.baseline + owed, self.total)
        missing = level - max(self.observed, self.expected) - self.held
        return max(0, min(missing, self.remaining))

    def unsettled(self, owed: int) -> int:
        """Owed and not known to be paid, whether or not the escrow can still pay it."""
        return self.baseline + owed - max(self.observed, self.expected)

    @property
    def word(self) -> str:
        """The state as a person sees it."""
        if self.status is EscrowStatus.ACTIVE and self.total > 0 and self.remaining == 0:
            return "exhausted"
        if self.status is EscrowStatus.ACTIVE and self.closing:
            return "closing"
        return self.status.value


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that the table needs, from `[escrow]` of the configuration. In seconds."""

    quarantine: float = 900.0
    observe_gap: float = 10.0
    send_deadline: float = 5.0
    min_interval: float = 2.0
    voids_per_day: int = 1
    release_max: int = 1_000_000_000
    quantum: int = 1
    wallet_minimum: int = 1  # Micros.
    strict: bool = False
    honoured: bool = False  # The service promises to honour idempotency keys.
    credit_foreign: bool = False
    provider: str | None = None  # The agent that must be the escrow's payee; None: not checked.
    currency: str = "USDC"


class AnswerKind(enum.StrEnum):
    """What an answer to a release means (escrow-api.md, "How an answer is read")."""

    CONFIRMED = "confirmed"
    DECLINED = "declined"  # 400, 422: a person must look.
    MISSING = "missing"  # 404.
    EMPTY = "empty"  # 402.
    KEY_REFUSED = "key_refused"  # 401.
    FORBIDDEN = "forbidden"  # 403: this escrow is not ours to release, or not now.
    LIMITED = "limited"  # 429.
    NOT_SENT = "not_sent"
    CONFLICT = "conflict"  # 409: a reading decides.
    DOUBT = "doubt"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one release call: the gross `amount` and the total `released`, if given."""

    kind: AnswerKind
    detail: str
    amount: int | None = None
    released: int | None = None
    retry_after: float | None = None  # Seconds.


# --------------------------------------------------------------------------------------------------
# Inputs


@dataclass(frozen=True, slots=True)
class Observed:
    """A reading has come in."""

    reading: Reading
    mono: float
    wall: int
    owed: int  # floor(accrued) of the agreement, so that overpayment is seen.


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A reading was tried and gave nothing: the service is down, refuses or does not know it."""

    reason: str
    mono: float


@dataclass(frozen=True, slots=True)
class Due:
    """Something asks for a release: `owed` is what should have been released by meterd in all."""

    owed: int
    why: str
    release_id: str
    units: int
    mono: float
    wall: int


@dataclass(frozen=True, slots=True)
class Go:
    """The intention is durable, and asks whether its call may leave now."""

    mono: float
    wall: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The call came back, or did not."""

    answer: Answer
    mono: float
    wall: int


@dataclass(frozen=True, slots=True)
class Restarted:
    """The process has started and found this escrow in the store."""

    mono: float
    wall: int


@dataclass(frozen=True, slots=True)
class Repeat:
    """Send the release in doubt again with the same key: only where the service honours keys."""

    mono: float
    wall: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A person says what became of the release in doubt."""

    landed: bool
    reason: str
    mono: float
    wall: int


@dataclass(frozen=True, slots=True)
class Freeze:
    """A person, or a deviation seen elsewhere, stops this escrow."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """A person has looked: go on from what the service shows now."""

    reason: str
    wall: int = 0


@dataclass(frozen=True, slots=True)
class Closing:
    """Settle to the last quantum, then close."""


Input = (
    Observed
    | Unreadable
    | Due
    | Go
    | Answered
    | Restarted
    | Repeat
    | Resolved
    | Freeze
    | Resume
    | Closing
)

# --------------------------------------------------------------------------------------------------
# Effects


@dataclass(frozen=True, slots=True)
class Record:
    """This row must be durable, with the new state, before any other effect is carried out."""

    release: Release


@dataclass(frozen=True, slots=True)
class Confirm:
    """An intention was made: when it is durable, ask `Go`."""


@dataclass(frozen=True, slots=True)
class Send:
    """Make the call, once."""

    release: Release


@dataclass(frozen=True, slots=True)
class Blocked:
    """Nothing was intended, and why: for status and logs."""

    reason: str


@dataclass(frozen=True, slots=True)
class Alarm:
    """A person must know."""

    action: str
    detail: str


Effect = Record | Confirm | Send | Blocked | Alarm
Effects = tuple[Effect, ...]
Outcome = tuple[Escrow, Effects]


class NotAllowed(Exception):
    """The input makes no sense in this state; the message tells a person what to do instead."""


# --------------------------------------------------------------------------------------------------
# The table


def step(state: Escrow, event: Input, rules: Rules) -> Outcome:
    """Answer one input: the next state, and what to carry out once it is durable.

    Raises only `NotAllowed`.
    """
    return _TABLE[type(event)](state, event, rules)


def _restarted(state: Escrow, event: Restarted, _: Rules) -> Outcome:
    """What the dead process measured is worth nothing: an open release is in doubt from now on."""
    state = replace(
        state, reading=None, suspicion=None, low_since=None, next_mono=event.mono, failures=0
    )
    if state.release is None:
        return state, ()
    if state.release.status is ReleaseStatus.ESCALATED:
        return state, ()
    return _doubt(state, "found after a restart", event.mono, event.wall)


def _observed(state: Escrow, event: Observed, rules: Rules) -> Outcome:
    """Take a reading: resolve a doubt, look for deviations, follow the service's own state."""
    reading = event.reading
    misfit = _misfit(state, reading, rules)
    if misfit:
        return _suspect(replace(state, reading=None), misfit, event, rules)
    if state.status is EscrowStatus.ADOPTING:
        return _adopt(state, event, rules)
    if state.reading is not None and reading.mono < state.reading.mono:
        return state, ()  # Overtaken by a later reading.
    state = replace(
        state,
        reading=reading,
        total=reading.total if state.refillable and state.total else state.total,
        observed=reading.released,
        remaining=reading.remaining,
        service_status=reading.status,
        deadline=reading.deadline,
    )
    if state.status is EscrowStatus.CLOSED:
        return state, ()
    if state.release is not None:
        return _resolve(state, event, rules)
    return _compare(state, event, rules)


def _misfit(state: Escrow, reading: Reading, rules: Rules) -> str:
    """Say what in a reading contradicts itself or what never changes; empty when nothing does."""
    adopted = state.total > 0  # One that was frozen before has nothing yet that could change.
    checks = (
        (reading.escrow != state.id, f"the service answered for another escrow, {reading.escrow}"),
        (
            reading.currency is not None and reading.currency != rules.currency,
            f"the currency is {reading.currency}, not {rules.currency}",
        ),
        (
            rules.provider is not None
            and reading.provider is not None
            and reading.provider != rules.provider,
            f"the provider is {reading.provider}, not {rules.provider}",
        ),
        (
            adopted and state.provider != reading.provider,
            f"the provider changed from {state.provider} to {reading.provider}",
        ),
        (
            adopted and state.total != reading.total and not state.refillable,
            "the total of the escrow changed",
        ),
        (
            reading.released + reading.remaining + reading.refunded != reading.total,
            "released + remaining + refunded is not the total",
        ),
        (reading.released > reading.total, "more was released than the total"),
        (
            min(reading.released, reading.remaining, reading.refunded) < 0,
            "a figure of the escrow is below zero",
        ),
    )
    return next((text for wrong, text in checks if wrong), "")


def _adopt(state: Escrow, event: Observed, rules: Rules) -> Outcome:
    """Two equal readings apart make the baseline; the service may lag behind its own writes.

    As many show that the escrow has ended before it could be adopted: nothing will ever be paid.
    """
    reading, first = event.reading, state.reading
    if reading.status not in LIVE | ENDED:
        held = replace(state, reason=f"the service says {reading.status!r}", reading=None)
        return held, (Blocked(held.reason),)
    same = first is not None and _figures(first) == _figures(reading)
    ended = reading.status in ENDED
    if first is None or not same or ended != (first.status in ENDED):
        said = f": the service says {reading.status!r}" if ended else ""
        return replace(state, reading=reading, reason=f"first reading taken{said}"), ()
    if reading.mono - first.mono < rules.observe_gap:
        return state, ()
    if ended:
        why = f"it ended before it was adopted: the service says {reading.status!r}"
        closed = replace(
            state, status=EscrowStatus.CLOSED, reason=why, service_status=reading.status
        )
        lost = (Alarm("uncollectible", f"{why}, with {_usdc(event.owed)} unpaid"),)
        return closed, lost if event.owed > 0 else ()
    adopted = replace(
        state,
        status=EscrowStatus.ACTIVE,
        reason="",
        total=reading.total,
        baseline=reading.released,
        observed=reading.released,
        remaining=reading.remaining,
        service_status=reading.status,
        provider=reading.provider,
        deadline=reading.deadline,
        settled_at=event.wall,
        reading=reading,
        suspicion=None,
    )
    return adopted, ()


def _figures(reading: Reading) -> tuple[int, int, int, int]:
    return reading.total, reading.released, reading.remaining, reading.refunded


def _resolve(state: Escrow, event: Observed, rules: Rules) -> Outcome:
    """A reading may show that the release landed or, late enough and twice, that it did not."""
    release = state.release
    assert release is not None
    if release.status not in UNKNOWN_OUTCOME:
        return state, ()  # Its answer is still to come; the reading may be from before it.
    landed = (
        event.reading.released >= release.before + release.amount
        or release.id in event.reading.release_ids
    )
    if landed:
        return _landed(state, "seen in a reading", event.mono, event.wall)
    if release.status is ReleaseStatus.ESCALATED or state.status is EscrowStatus.FROZEN:
        return state, ()
    # The call may land for one quarantine yet, and a reading may be one quarantine old: only from
    # two of them on must a reading show whatever landed.
    patience = 2 * rules.quarantine * state.quarantine_factor
    if event.reading.mono - release.since_mono < patience:
        return state, ()
    return _absent(state, release, event, rules)


def _absent(state: Escrow, release: Release, event: Observed, rules: Rules) -> Outcome:
    """Seen absent twice, a release is void, unless that is a person's to say."""
    if event.reading.released != release.before:
        return _escalate(state, "the service shows a part of it, or another release", event.wall)
    if release.sightings == 0:
        seen = replace(release, sightings=1, sighted_mono=event.reading.mono)
        return replace(state, release=seen), ()
    if event.reading.mono - release.sighted_mono < rules.observe_gap:
        return state, ()
    if rules.strict:
        return _escalate(state, "absent, and strict = true leaves it to a person", event.wall)
    day_ago = event.wall - 24 * 3600 * 1000
    recent = sum(1 for void in state.voids if void.history[-1][0] > day_ago)
    if recent >= rules.voids_per_day:
        return _escalate(state, "absent, but this escrow had its void of the day", event.wall)
    void = _enter(release, ReleaseStatus.VOID, "absent after the quarantine", event.wall)
    state = replace(state, release=None, voids=(*state.voids, void), next_mono=event.mono)
    return state, (Record(void),)


def _compare(state: Escrow, event: Observed, rules: Rules) -> Outcome:
    """With nothing open, hold the service's figure against what meterd knows."""
    difference = state.observed - state.expected
    if difference >= 0:
        state = replace(state, low_since=None)
    elif state.low_since is None:
        state = replace(state, low_since=event.reading.mono)
    if difference == 0:
        return _level(state, event, rules)
    if state.status is EscrowStatus.FROZEN:
        return state, ()
    if state.service_status in ENDED:
        # What the service paid out by itself at the end (a deadline, a hand) is payment too.
        state = replace(state, credited=state.credited + max(0, difference))
        return _follow(state, event, rules)
    if difference > 0:
        return _surplus(state, event, rules, difference)
    if not _low_for_long(state, rules):
        return state, (Blocked("the service shows less than was released"),)
    return _freeze(state, f"the service shows {_usdc(-difference)} less than was released")


def _low_for_long(state: Escrow, rules: Rules) -> bool:
    """Whether a reading's age can no longer be why the service shows less than was released."""
    if state.low_since is None or state.reading is None:
        return False
    return state.reading.mono - state.low_since > rules.quarantine * state.quarantine_factor


def _level(state: Escrow, event: Observed, rules: Rules) -> Outcome:
    """The totals are as expected; the service's history may still say otherwise."""
    shown = [
        void.id
        for void in state.voids
        if void.status is ReleaseStatus.VOID and void.id in event.reading.release_ids
    ]
    if shown:
        text = f"the service's history shows release {shown[0]}, its totals do not"
        return _suspect(state, text, event, rules)
    return _follow(replace(state, suspicion=None), event, rules)


_SURPLUS = "more was released than meterd asked for"


def _surplus(state: Escrow, event: Observed, rules: Rules, difference: int) -> Outcome:
    """More was released than meterd knows of: a void that landed late, or somebody else."""
    void = next(
        (
            void
            for void in state.voids
            if void.status is ReleaseStatus.VOID
            and (void.amount == difference or void.id in event.reading.release_ids)
        ),
        None,
    )
    # The suspicion names no amount: one that grows from reading to reading must not stay a first
    # sight.
    if not _seen_twice(state, _SURPLUS, event, rules):
        return _note(state, _SURPLUS, event)
    text = f"{_usdc(difference)} more were released than meterd asked for"
    if void is not None:
        late = _enter(void, ReleaseStatus.LATE, "landed after it was given up", event.wall)
        voids = tuple(late if row.id == void.id else row for row in state.voids)
        state = replace(
            state,
            voids=voids,
            settled=state.settled + void.amount,
            quarantine_factor=state.quarantine_factor * 4,
            suspicion=None,
        )
        frozen, effects = _freeze(state, f"release {void.id} landed after it was given up")
        return frozen, (Record(late), *effects)
    if state.observed > state.baseline + max(event.owed, state.settled):
        over = state.observed - state.baseline - event.owed
        return _freeze(state, f"overpaid by {_usdc(over)}: {text}")
    if rules.credit_foreign:
        credited = replace(state, credited=state.credited + difference, suspicion=None)
        return credited, (Alarm("foreign_release_credited", text),)
    return _freeze(state, f"somebody else released: {text}")


def _follow(state: Escrow, event: Observed, _: Rules) -> Outcome:
    """Follow the service's own word for the escrow's state."""
    word = state.service_status
    if state.status is EscrowStatus.FROZEN:
        return state, ()
    if word in LIVE:
        active = replace(state, status=EscrowStatus.ACTIVE, reason="", failures=0)
        return (state if state.status is EscrowStatus.ACTIVE else active), ()
    if word in ENDED:
        closed = replace(state, status=EscrowStatus.CLOSED, reason=f"the service says {word!r}")
        if state.unsettled(event.owed) > 0:
            lost = state.unsettled(event.owed)
            return closed, (Alarm("uncollectible", f"ended with {_usdc(lost)} unsettled"),)
        return closed, ()
    paused = replace(state, status=EscrowStatus.PAUSED, reason=f"the service says {word!r}")
    return paused, ((Alarm("escrow_paused", paused.reason),) if paused != state else ())


def _unreadable(state: Escrow, event: Unreadable, _: Rules) -> Outcome:
    """Nothing is sent while nothing can be read; a good reading ends the pause."""
    failures = min(state.failures + 1, 16)
    wait = min(300.0, 2.0 ** (failures - 1))
    next_mono = max(state.next_mono, event.mono + wait)
    state = replace(state, reading=None, failures=failures, next_mono=next_mono)
    if state.status is EscrowStatus.ACTIVE:
        return replace(state, status=EscrowStatus.PAUSED, reason=event.reason), ()
    if state.status in (EscrowStatus.PAUSED, EscrowStatus.ADOPTING):
        return replace(state, reason=event.reason), ()
    return state, ()


def _due(state: Escrow, event: Due, rules: Rules) -> Outcome:
    """Intend a release, if every guard holds."""
    blocked = _guard(state, event, rules)
    if blocked:
        return state, (Blocked(blocked),)
    amount = min(state.payable(event.owed), rules.release_max)
    amount = amount // rules.quantum * rules.quantum
    if state.refillable and amount < rules.wallet_minimum:
        amount = 0  # A wallet's service takes no less, not even at the end.
    if amount <= 0:
        if state.closing:
            rest = state.unsettled(event.owed)
            lost = (
                (Alarm("uncollectible", f"closed with {_usdc(rest)} unpaid"),) if rest > 0 else ()
            )
            return replace(state, status=EscrowStatus.CLOSED, reason="settled"), lost
        return state, (Blocked("nothing can be released"),)
    release = Release(
        id=event.release_id,
        escrow=state.id,
        amount=amount,
        before=state.observed,
        status=ReleaseStatus.INTENDED,
        why=event.why,
        units=event.units,
        created_at=event.wall,
        history=((event.wall, ReleaseStatus.INTENDED.value, event.why),),
        since_mono=event.mono,
    )
    return replace(state, release=release), (Record(release), Confirm())


def _guard(state: Escrow, event: Due, rules: Rules) -> str:
    """Say why no release may be intended now; empty when one may."""
    reading = state.reading
    too_late = None if state.deadline is None else state.deadline - int(rules.quarantine * 1000)
    checks: tuple[tuple[bool, str], ...] = (
        (state.status is not EscrowStatus.ACTIVE, f"{state.status.value}: {state.reason}"),
        (state.release is not None, "a release is open"),
        (
            reading is None or event.mono - reading.mono > rules.send_deadline,
            "no fresh reading",
        ),
        (
            reading is not None and reading.status not in LIVE,
            f"the service says {state.service_status!r}",
        ),
        (state.suspicion is not None, "a deviation is being looked at"),
        (state.observed < state.expected, "the service shows less than was released"),
        (state.observed > state.expected, "the service shows more than was released"),
        (event.mono < state.next_mono, "paced"),
        (
            too_late is not None and event.wall > too_late,
            "so near to the deadline that a doubt could not be resolved",
        ),
    )
    return next((text for wrong, text in checks if wrong), "")


def _go(state: Escrow, event: Go, rules: Rules) -> Outcome:
    """The intention is durable. Its call leaves now, or never."""
    release = state.release
    if release is None or release.status is not ReleaseStatus.INTENDED:
        raise NotAllowed("there is no intended release to send")
    if state.status is not EscrowStatus.ACTIVE:
        return _unsent(state, f"the escrow is {state.status.value}", event.mono, event.wall)
    if event.mono - release.since_mono > rules.send_deadline:
        return _unsent(state, "the intention took too long to be durable", event.mono, event.wall)
    sent = replace(
        release,
        status=ReleaseStatus.SENT,
        history=(*release.history, (event.wall, ReleaseStatus.SENT.value, "")),
    )
    return replace(state, release=sent, next_mono=event.mono + rules.min_interval), (Send(sent),)


def _answered(state: Escrow, event: Answered, rules: Rules) -> Outcome:
    """Book what the answer means. Whatever is not certain is in doubt."""
    release, answer = state.release, event.answer
    if release is None or release.status is not ReleaseStatus.SENT:
        raise NotAllowed("there is no sent release that this could answer")
    if answer.kind is AnswerKind.CONFIRMED:
        as_asked = answer.amount == release.amount
        as_summed = answer.released == release.before + release.amount
        said = (answer.amount is None or as_asked, answer.released is None or as_summed)
        if (as_asked or as_summed) and all(said):
            return _landed(state, answer.detail, event.mono, event.wall)
        return _doubt(state, "the answer's amount is not what was asked", event.mono, event.wall)
    if _was_in_doubt(release):
        # A refused repetition says nothing of the call before it, which may have landed.
        state, effects = _doubt(state, answer.detail, event.mono, event.wall)
        return _held_off(state, event, rules), effects
    if answer.kind is AnswerKind.NOT_SENT:
        return _unsent(state, answer.detail, event.mono, event.wall)
    if answer.kind in _DECLINED:
        return _declined(state, event, rules)
    return _doubt(state, answer.detail, event.mono, event.wall)


def _was_in_doubt(release: Release) -> bool:
    return any(status == ReleaseStatus.IN_DOUBT.value for _, status, _ in release.history)


def _held_off(state: Escrow, event: Answered, rules: Rules) -> Escrow:
    """Wait as long as the service asked, else longer with each failure; the pace at least."""
    failures = min(state.failures + 1, 16)
    wait = event.answer.retry_after
    if wait is None:
        wait = rules.min_interval * 2**failures
    if event.answer.kind is AnswerKind.FORBIDDEN:
        wait = max(wait, FORBIDDEN_WAIT_S)
    next_mono = max(state.next_mono, event.mono + min(wait, 300.0))
    return replace(state, failures=failures, next_mono=next_mono)


# Answers that certainly moved nothing, and what they do to the escrow.
_DECLINED: dict[AnswerKind, EscrowStatus | None] = {
    AnswerKind.DECLINED: EscrowStatus.FROZEN,
    AnswerKind.MISSING: EscrowStatus.PAUSED,
    AnswerKind.KEY_REFUSED: EscrowStatus.PAUSED,
    AnswerKind.FORBIDDEN: EscrowStatus.PAUSED,
    AnswerKind.EMPTY: None,  # The next reading shows how little is left.
    AnswerKind.LIMITED: None,
}


def _declined(state: Escrow, event: Answered, rules: Rules) -> Outcome:
    release, answer = state.release, event.answer
    assert release is not None
    declined = _enter(release, ReleaseStatus.DECLINED, answer.detail, event.wall)
    state = _held_off(replace(state, release=None, reading=None), event, rules)
    status = _DECLINED[answer.kind]
    effects: Effects = (Record(declined),)
    if status is EscrowStatus.FROZEN:
        state, more = _freeze(state, f"the service declined a release: {answer.detail}")
        return state, (*effects, *more)
    if status is EscrowStatus.PAUSED:
        if state.status is not EscrowStatus.FROZEN:  # A person froze it meanwhile: his to undo.
            state = replace(state, status=status, reason=answer.detail)
        return state, (*effects, Alarm(f"release_{answer.kind.value}", answer.detail))
    return state, effects


def _repeat(state: Escrow, event: Repeat, rules: Rules) -> Outcome:
    """Where keys are honoured the same call is repeated instead of the quarantine."""
    release = state.release
    if not rules.honoured:
        raise NotAllowed('a release is repeated only with idempotency = "honoured"')
    if release is None or release.status not in UNKNOWN_OUTCOME:
        raise NotAllowed("there is no release in doubt to repeat")
    if state.status is EscrowStatus.FROZEN or event.mono < state.next_mono:
        return state, (Blocked("frozen" if state.status is EscrowStatus.FROZEN else "paced"),)
    sent = _enter(release, ReleaseStatus.SENT, "repeated with the same key", event.wall)
    state = replace(state, release=sent, next_mono=event.mono + rules.min_interval)
    return state, (Send(sent),)


def _resolved(state: Escrow, event: Resolved, _: Rules) -> Outcome:
    release = state.release
    if release is None or release.status not in UNKNOWN_OUTCOME:
        raise NotAllowed("this escrow has no release in doubt")
    if event.landed:
        return _landed(state, f"a person says it landed: {event.reason}", event.mono, event.wall)
    void = _enter(
        release, ReleaseStatus.VOID, f"a person says it is absent: {event.reason}", event.wall
    )
    return replace(state, release=None, voids=(*state.voids, void)), (Record(void),)


def _frozen_by(state: Escrow, event: Freeze, _: Rules) -> Outcome:
    if state.status is EscrowStatus.CLOSED:
        raise NotAllowed("the escrow is closed: nothing is sent any more")
    return replace(state, status=EscrowStatus.FROZEN, reason=event.reason), ()


def _resume(state: Escrow, event: Resume, rules: Rules) -> Outcome:
    """Accept the service's figure as it is; the level rule then pays only what is still missing.

    A void that the service's history shows is booked as landed: left open, the history would freeze
    the escrow again at the next reading, and a person could never get it out.
    """
    if state.status is not EscrowStatus.FROZEN:
        raise NotAllowed(f"the escrow is {state.status.value}, not frozen")
    if state.release is not None:
        raise NotAllowed(
            f"release {state.release.id} is in doubt: "
            f"meterd resolve {state.release.id} --landed|--absent --reason TEXT"
        )
    if state.reading is None:
        raise NotAllowed("the service has not been read since: wait for a reading")
    alarms = (Alarm("escrow_resumed", event.reason),)
    if state.total == 0:  # It was frozen before it was adopted: there is nothing to accept yet.
        fresh = replace(state, status=EscrowStatus.ADOPTING, reason="", reading=None, observed=0)
        return replace(fresh, suspicion=None, low_since=None, failures=0), alarms
    if state.observed < state.expected and not _low_for_long(state, rules):
        raise NotAllowed(
            "the service shows less than was released, which may be an old reading: "
            "wait until it has done so for longer than escrow.in_doubt_quarantine"
        )
    state, records = _book_shown(state, state.reading, event.wall)
    state = replace(
        state,
        status=EscrowStatus.ACTIVE,
        reason="",
        credited=state.credited + state.observed - state.expected,
        suspicion=None,
        low_since=None,
        failures=0,
    )
    return state, (*records, *alarms)


def _book_shown(state: Escrow, reading: Reading, wall: int) -> Outcome:
    """Book as late the voids that a reading's history shows; who resumes accepts them."""
    late = {
        void.id: _enter(void, ReleaseStatus.LATE, "in the service's history at a resume", wall)
        for void in state.voids
        if void.status is ReleaseStatus.VOID and void.id in reading.release_ids
    }
    voids = tuple(late.get(void.id, void) for void in state.voids)
    settled = state.settled + sum(void.amount for void in late.values())
    return replace(state, voids=voids, settled=settled), tuple(map(Record, late.values()))


def _closing(state: Escrow, _: Closing, __: Rules) -> Outcome:
    return replace(state, closing=True), ()


# --------------------------------------------------------------------------------------------------
# Moves that several inputs share


def _usdc(micros: int) -> str:
    return f"{format_amount(micros)} USDC"


def _enter(release: Release, status: ReleaseStatus, detail: str, wall: int) -> Release:
    entry = (wall, status.value, detail)
    return replace(release, status=status, history=(*release.history, entry))


def _landed(state: Escrow, detail: str, mono: float, wall: int) -> Outcome:
    release = state.release
    assert release is not None
    confirmed = _enter(release, ReleaseStatus.CONFIRMED, detail, wall)
    settled = state.settled + release.amount
    level = state.baseline + settled + state.credited
    state = replace(
        state,
        release=None,
        settled=settled,
        remaining=state.remaining - max(0, level - state.observed),
        observed=max(state.observed, level),
        units_settled=release.units,
        settled_at=wall,
        reading=None,  # The next intention wants a reading from after this one.
        failures=0,
        low_since=None,
        next_mono=max(state.next_mono, mono),
    )
    return state, (Record(confirmed),)


def _unsent(state: Escrow, detail: str, mono: float, wall: int) -> Outcome:
    release = state.release
    assert release is not None
    failures = min(state.failures + 1, 16)
    wait = min(300.0, 2.0 ** (failures - 1))
    next_mono = max(state.next_mono, mono + wait)
    state = replace(state, release=None, reading=None, failures=failures, next_mono=next_mono)
    return state, (Record(_enter(release, ReleaseStatus.NOT_SENT, detail, wall)),)


def _doubt(state: Escrow, detail: str, mono: float, wall: int) -> Outcome:
    release = state.release
    assert release is not None
    doubted = _enter(release, ReleaseStatus.IN_DOUBT, detail, wall)
    doubted = replace(doubted, since_mono=mono, sightings=0)
    return replace(state, release=doubted, reading=None), (
        Record(doubted),
        Alarm("release_in_doubt", f"{release.id}: {detail}"),
    )


def _escalate(state: Escrow, detail: str, wall: int) -> Outcome:
    release = state.release
    assert release is not None
    escalated = _enter(release, ReleaseStatus.ESCALATED, detail, wall)
    frozen, effects = _freeze(
        replace(state, release=escalated), f"release {release.id} needs a person: {detail}"
    )
    return frozen, (Record(escalated), *effects)


def _freeze(state: Escrow, reason: str) -> Outcome:
    frozen = replace(state, status=EscrowStatus.FROZEN, reason=reason)
    return frozen, (Alarm("escrow_frozen", reason),)


def _seen_twice(state: Escrow, text: str, event: Observed, rules: Rules) -> bool:
    """A deviation counts when two readings apart show it: a replica may go backwards once."""
    if state.suspicion is None or state.suspicion[0] != text:
        return False
    return event.reading.mono - state.suspicion[1] >= rules.observe_gap


def _note(state: Escrow, text: str, event: Observed) -> Outcome:
    """Remember a deviation's first sight; the same one seen again keeps its first time."""
    if state.suspicion is not None and state.suspicion[0] == text:
        return state, (Blocked(text),)
    return replace(state, suspicion=(text, event.reading.mono)), (Blocked(text),)


def _suspect(state: Escrow, text: str, event: Observed, rules: Rules) -> Outcome:
    if state.status in (EscrowStatus.FROZEN, EscrowStatus.CLOSED):
        return state, ()
    if _seen_twice(state, text, event, rules):
        return _freeze(state, text)
    return _note(state, text, event)


_TABLE: dict[type, Callable[[Escrow, object, Rules], Outcome]] = {
    # Each row takes its own input; `step` looks it up by type.
    Observed: _observed,  # type: ignore[dict-item]
    Unreadable: _unreadable,  # type: ignore[dict-item]
    Due: _due,  # type: ignore[dict-item]
    Go: _go,  # type: ignore[dict-item]
    Answered: _answered,  # type: ignore[dict-item]
    Restarted: _restarted,  # type: ignore[dict-item]
    Repeat: _repeat,  # type: ignore[dict-item]
    Resolved: _resolved,  # type: ignore[dict-item]
    Freeze: _frozen_by,  # type: ignore[dict-item]
    Resume: _resume,  # type: ignore[dict-item]
    Closing: _closing,  # type: ignore[dict-item]
}
