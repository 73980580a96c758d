"""Breadth-first through every state that one escrow and its service can reach, in small numbers.

What is explored is the table that the daemon runs, `settlement.step`, and not a copy of it. Around
it stands a world that is as bad as its `World` says: usage comes at any moment, the process dies at
any moment, calls are lost, refused or land late, answers are lost, readings are old, somebody else
releases. Each of these is one action, and every action is tried in every state.

Time goes in ticks, and all moments are kept relative to now, so that the states are finitely many.
A dead process is a state like any other: what had not been committed when it died is a state that
was reached before, from which the process dies as well.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from meterd.core.settlement import (
    UNKNOWN_OUTCOME,
    Answer,
    Answered,
    AnswerKind,
    Closing,
    Due,
    Escrow,
    EscrowStatus,
    Go,
    Input,
    NotAllowed,
    Observed,
    Reading,
    Release,
    ReleaseStatus,
    Repeat,
    Restarted,
    Rules,
    Send,
    step,
)

TICK = 1.0
CALLS_MAX = 2  # Repetitions stop here: a third call under way shows nothing that two do not.
CERTAIN_NO = (
    AnswerKind.LIMITED,
    AnswerKind.EMPTY,
)  # The others of the kind stop the escrow as well.


class Weakness(enum.StrEnum):
    """Mistakes that other designs make, planted around the table to see that they are found."""

    NONE = "none"
    RETRY_ON_TIMEOUT = "retry on time-out"
    NO_JOURNAL = "no journal"
    FAILURE_IS_NO = "an unknown outcome taken for a refusal"


@dataclass(frozen=True)
class World:
    """How bad the world is, in ticks and in units of money."""

    rules: Rules
    used_max: int = 3
    total: int = 3
    late: int = 2  # A call lands so many ticks after it was sent at the latest.
    stale: int = 2  # A reading is younger than this.
    foreign_max: int = 0  # What somebody else may release.
    closing: bool = False
    weakness: Weakness = Weakness.NONE


def rules(
    quarantine: int = 2, *, voids: int = 9, strict: bool = False, honoured: bool = False
) -> Rules:
    """Rules in ticks, for amounts of one and two units."""
    return Rules(
        quarantine=quarantine * TICK,
        observe_gap=TICK,
        send_deadline=0.0,
        min_interval=0.0,
        voids_per_day=voids,
        release_max=2,
        strict=strict,
        honoured=honoured,
    )


@dataclass(frozen=True, slots=True)
class Call:
    """A request under way. Calls of one release have one key."""

    key: int
    amount: int
    left: int  # In so many ticks it is gone.


@dataclass(frozen=True, slots=True)
class Outside:
    """What is true whether or not meterd knows it."""

    used: int = 0
    paid: int = 0
    foreign: int = 0
    past: tuple[tuple[int, int], ...] = ()  # Earlier values of `paid`: how long ago they ended.
    calls: tuple[Call, ...] = ()
    landed: frozenset[int] = frozenset()
    key: int = -1  # Of the open release.


Node = tuple[int, Outside]
Move = tuple[str, Node]


@dataclass(slots=True)
class Found:
    """What an exploration has seen."""

    states: int = 0
    overpaid: int = 0  # The worst.
    frozen: int = 0
    closed_short: int = 0
    stuck: int = 0
    trace: list[str] = field(default_factory=list)  # The shortest way to the first overpayment.


class Explorer:
    """One exploration. Escrow states are numbered, and each (state, input) is stepped only once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._escrows: list[Escrow] = []
        self._numbers: dict[Escrow, int] = {}
        self._steps: dict[tuple[int, object, int], tuple[int, bool] | None] = {}
        self._ticks: dict[int, int] = {}

    # -- The walk ----------------------------------------------------------------------------------

    def run(self, states_max: int, *, stop_at_overpayment: bool = False) -> Found:
        """Visit every reachable state, up to a limit, and say what was seen."""
        found = Found()
        start = (self._number(self._adopted()), Outside())
        parents: dict[Node, tuple[Node, str] | None] = {start: None}
        waiting = deque([start])
        while waiting and len(parents) < states_max:
            node = waiting.popleft()
            self._look(node, found)
            if found.overpaid and not found.trace:
                found.trace = _way(parents, node)
                if stop_at_overpayment:
                    break
            for name, after in self._moves(node):
                if after not in parents:
                    parents[after] = (node, name)
                    waiting.append(after)
        found.states = len(parents)
        if not found.overpaid:
            found.stuck = self._stuck(parents)
        return found

    def _look(self, node: Node, found: Found) -> None:
        escrow, outside = self._escrows[node[0]], node[1]
        ours = outside.paid - outside.foreign
        found.overpaid = max(found.overpaid, ours - outside.used)
        found.frozen += escrow.status is EscrowStatus.FROZEN
        payable = min(outside.used, self._world.total) - outside.paid
        found.closed_short += escrow.status is EscrowStatus.CLOSED and payable > 0

    def _stuck(self, nodes: dict[Node, tuple[Node, str] | None]) -> int:
        """Count the states from which a world that is kind from now on does not get all paid."""
        good: set[Node] = set()
        stuck = 0
        for node in nodes:
            way: list[Node] = []
            while node not in good:
                way.append(node)
                escrow, outside = self._escrows[node[0]], node[1]
                rest = min(outside.used, self._world.total) - outside.paid
                if escrow.release is None and rest <= 0:
                    break
                if escrow.status is EscrowStatus.FROZEN or len(way) > 100:
                    stuck += escrow.status is not EscrowStatus.FROZEN
                    break
                node = self._kindly(node)  # noqa: PLW2901  # The walk goes on from the next one.
            good.update(way)
        return stuck

    def _kindly(self, node: Node) -> Node:
        """What happens next when nothing more goes wrong: the settler's visit, then a tick."""
        eid, outside = node
        release = self._escrows[eid].release
        moves = dict(self._moves(node))
        if release is not None and release.status is ReleaseStatus.INTENDED:
            return moves.get("go") or moves["go, too late"]
        if release is not None and release.status is ReleaseStatus.SENT:
            wanted = ["answer: done", f"land {outside.key}", "answer: lost"]
            return next(moves[name] for name in wanted if name in moves)
        read = moves[f"read {outside.paid}"]
        paid = dict(self._moves(read)).get("due")
        if paid is not None:
            return paid
        return self._tick(read)

    # -- Escrow states -----------------------------------------------------------------------------

    def _adopted(self) -> Escrow:
        escrow = Escrow("e", "a", "main")
        for mono in (-TICK, 0.0):
            observed = Observed(self._reading(0, mono), mono, 0, 0)
            escrow, _ = step(escrow, observed, self._world.rules)
        assert escrow.status is EscrowStatus.ACTIVE
        return escrow

    def _reading(self, released: int, mono: float = 0.0) -> Reading:
        total = self._world.total
        return Reading("e", "active", total, released, total - released, 0, "USDC", "p", None, mono)

    def _number(self, escrow: Escrow) -> int:
        """Name an escrow's state, with all that no decision depends on taken out of it."""
        plain = replace(
            escrow,
            reason="",
            settled_at=0,
            units_settled=0,
            failures=0,
            next_mono=max(0.0, escrow.next_mono),
            release=None if escrow.release is None else _plain(escrow.release, "open"),
            voids=tuple(_plain(void, f"void {n}") for n, void in enumerate(escrow.voids)),
        )
        number = self._numbers.setdefault(plain, len(self._escrows))
        if number == len(self._escrows):
            self._escrows.append(plain)
        return number

    def _step(self, eid: int, name: str, event: Input, extra: int = 0) -> tuple[int, bool] | None:
        """Step one state: the next one, and whether a call leaves. None: it is not allowed."""
        key = eid, name, extra
        if key not in self._steps:
            before = self._escrows[eid]
            try:
                after, effects = step(before, event, self._world.rules)
            except NotAllowed:
                self._steps[key] = None
            else:
                if before.release is not None and after.release is not None:
                    assert before.release.amount == after.release.amount, "one unfinished release"
                sends = any(isinstance(effect, Send) for effect in effects)
                self._steps[key] = self._number(after), sends
        return self._steps[key]

    def _later(self, eid: int) -> int:
        if eid not in self._ticks:
            self._ticks[eid] = self._number(_aged(self._escrows[eid], self._world.rules))
        return self._ticks[eid]

    # -- Actions -----------------------------------------------------------------------------------

    def _moves(self, node: Node) -> Iterator[Move]:
        """Everything that can happen next."""
        yield from self._world_moves(node)
        release = self._escrows[node[0]].release
        if release is not None and release.status is ReleaseStatus.SENT:
            yield from self._answers(node)
        elif release is not None and release.status is ReleaseStatus.INTENDED:
            yield from self._go(node)
        else:
            yield from self._visits(node)

    def _world_moves(self, node: Node) -> Iterator[Move]:
        eid, outside = node
        yield "tick", self._tick(node)
        yield "crash", self._crash(node)
        if (
            outside.used < self._world.used_max
            and self._escrows[eid].status is not EscrowStatus.CLOSED
        ):
            yield "use", (eid, replace(outside, used=outside.used + 1))
        for call in outside.calls:
            yield f"land {call.key}", (eid, self._landed(outside, call))
        if outside.foreign < self._world.foreign_max and outside.paid < self._world.total:
            grown = _paid(outside, 1)
            yield "foreign release", (eid, replace(grown, foreign=outside.foreign + 1))

    def _visits(self, node: Node) -> Iterator[Move]:
        """The settler reads, and asks for a release or a repetition."""
        eid, outside = node
        for released in sorted({outside.paid, *(value for value, _ in outside.past)}):
            observed = Observed(self._reading(released), 0.0, 0, outside.used)
            after = self._step(eid, "read", observed, released * 100 + outside.used)
            assert after is not None
            yield f"read {released}", self._settle(after[0], outside)
        due = Due(outside.used, "amount", "open", 0, 0.0, 0)
        after = self._step(eid, "due", due, outside.used)
        if after is not None and after[0] != eid:
            yield "due", self._settle(after[0], _new_key(outside))
        if self._world.closing and not self._escrows[eid].closing:
            after = self._step(eid, "close", Closing())
            assert after is not None
            yield "close", (after[0], outside)
        release = self._escrows[eid].release
        few = len(outside.calls) < CALLS_MAX
        if self._world.rules.honoured and release is not None and few:
            after = self._step(eid, "repeat", Repeat(0.0, 0))
            if after is not None and after[1]:
                yield from self._leave(after[0], outside)

    def _go(self, node: Node) -> Iterator[Move]:
        eid, outside = node
        after = self._step(eid, "go", Go(0.0, 0))
        assert after is not None
        if after[1]:
            yield from self._leave(after[0], outside)
        else:
            yield "go, too late", self._settle(after[0], outside)

    def _leave(self, eid: int, outside: Outside) -> Iterator[Move]:
        """The call leaves, or fails before its first byte."""
        release = self._escrows[eid].release
        assert release is not None
        call = Call(outside.key, release.amount, self._world.late)
        yield "go", (eid, replace(outside, calls=tuple(sorted((*outside.calls, call), key=_order))))
        yield "go, not sent", self._answer(eid, outside, Answer(AnswerKind.NOT_SENT, ""))

    def _answers(self, node: Node) -> Iterator[Move]:
        eid, outside = node
        release = self._escrows[eid].release
        assert release is not None
        if outside.key in outside.landed:
            done = Answer(AnswerKind.CONFIRMED, "", release.amount)
            yield "answer: done", self._answer(eid, outside, done)
        if self._world.weakness is Weakness.RETRY_ON_TIMEOUT:
            yield from self._retry(eid, outside)
        yield "answer: lost", self._lost(eid, outside)
        newest = max(
            (call for call in outside.calls if call.key == outside.key),
            key=lambda call: call.left,
            default=None,
        )
        if newest is not None:  # Refused: this call will not land.
            calls = list(outside.calls)
            calls.remove(newest)
            refused = replace(outside, calls=tuple(calls))
            for kind in CERTAIN_NO:
                yield f"answer: {kind}", self._answer(eid, refused, Answer(kind, ""))

    def _retry(self, eid: int, outside: Outside) -> Iterator[Move]:
        """A blind second call, with the same amount and nothing to tell it from the first."""
        release = self._escrows[eid].release
        assert release is not None
        again = _new_key(outside)
        if len(outside.calls) < CALLS_MAX:
            call = Call(again.key, release.amount, self._world.late)
            yield "retry", (eid, replace(again, calls=(*again.calls, call)))

    def _lost(self, eid: int, outside: Outside) -> Node:
        kind = AnswerKind.DOUBT
        if self._world.weakness is Weakness.FAILURE_IS_NO:
            kind = AnswerKind.NOT_SENT
        return self._answer(eid, outside, Answer(kind, ""))

    def _answer(self, eid: int, outside: Outside, answer: Answer) -> Node:
        after = self._step(eid, f"answered {answer.kind}", Answered(answer, 0.0, 0))
        assert after is not None
        return self._settle(after[0], outside)

    def _crash(self, node: Node) -> Node:
        eid, outside = node
        key = eid, "crash", 0
        if key not in self._steps:
            escrow = self._escrows[eid]
            if self._world.weakness is Weakness.NO_JOURNAL:
                escrow = replace(escrow, release=None)
            after, _ = step(escrow, Restarted(0.0, 0), self._world.rules)
            self._steps[key] = self._number(after), False
        after_crash = self._steps[key]
        assert after_crash is not None
        return self._settle(after_crash[0], outside)

    def _settle(self, eid: int, outside: Outside) -> Node:
        """Forget the open release's key once it is finished, and keys that can land no more."""
        release = self._escrows[eid].release
        key = outside.key if release is not None else -1
        return eid, _renumbered(replace(outside, key=key))

    # -- The world's side --------------------------------------------------------------------------

    def _landed(self, outside: Outside, call: Call) -> Outside:
        calls = list(outside.calls)
        calls.remove(call)
        rest = replace(outside, calls=tuple(calls))
        repeated = self._world.rules.honoured and call.key in outside.landed
        if repeated or outside.paid + call.amount > self._world.total:
            return _renumbered(rest)
        landed = _paid(rest, call.amount)
        return _renumbered(replace(landed, landed=landed.landed | {call.key}))

    def _tick(self, node: Node) -> Node:
        eid, outside = node
        past = tuple((value, age + 1) for value, age in outside.past if age + 1 < self._world.stale)
        calls = tuple(replace(call, left=call.left - 1) for call in outside.calls if call.left > 0)
        return self._later(eid), _renumbered(replace(outside, past=past, calls=calls))


def _order(call: Call) -> tuple[int, int, int]:
    return call.key, call.left, call.amount


def _paid(outside: Outside, amount: int) -> Outside:
    past = (*outside.past, (outside.paid, 0))
    return replace(outside, paid=outside.paid + amount, past=past)


def _new_key(outside: Outside) -> Outside:
    return replace(outside, key=max((outside.key, *(call.key for call in outside.calls))) + 1)


def _renumbered(outside: Outside) -> Outside:
    """Count the keys that matter from 0, and forget the others."""
    keys = sorted({call.key for call in outside.calls} | ({outside.key} - {-1}))
    new = {key: number for number, key in enumerate(keys)}
    calls = [replace(call, key=new[call.key]) for call in outside.calls]
    return replace(
        outside,
        calls=tuple(sorted(calls, key=_order)),
        landed=frozenset(new[key] for key in outside.landed if key in new),
        key=new.get(outside.key, -1),
    )


def _plain(release: Release, name: str) -> Release:
    doubted = any(status == ReleaseStatus.IN_DOUBT.value for _, status, _ in release.history)
    history = ((0, ReleaseStatus.IN_DOUBT.value, ""),) if doubted else ((0, "", ""),)
    unknown = release.status in UNKNOWN_OUTCOME
    return replace(
        release,
        id=name,
        why="",
        units=0,
        created_at=0,
        history=history,
        since_mono=release.since_mono if unknown or name == "open" else 0.0,
        sighted_mono=release.sighted_mono if release.sightings and name == "open" else 0.0,
    )


def _aged(escrow: Escrow, rules_: Rules) -> Escrow:
    """The same state one tick later; what is older than anything asks for stays as it is."""
    floor = -(2 * rules_.quarantine * escrow.quarantine_factor + rules_.observe_gap + TICK)
    older = partial(_older, floor=floor)
    release, suspicion = escrow.release, escrow.suspicion
    if release is not None:
        release = replace(
            release,
            since_mono=older(release.since_mono),
            sighted_mono=older(release.sighted_mono) if release.sightings else 0.0,
        )
    return replace(
        escrow,
        release=release,
        reading=None,  # A reading of an earlier tick is not fresh: nothing is decided by it.
        suspicion=None if suspicion is None else (suspicion[0], older(suspicion[1])),
        low_since=None if escrow.low_since is None else older(escrow.low_since),
        next_mono=max(0.0, escrow.next_mono - TICK),
    )


def _older(moment: float, floor: float) -> float:
    return max(floor, moment - TICK)


def _way(parents: dict[Node, tuple[Node, str] | None], node: Node) -> list[str]:
    names: list[str] = []
    here = parents[node]
    while here is not None:
        names.append(here[1])
        here = parents[here[0]]
    return names[::-1]
