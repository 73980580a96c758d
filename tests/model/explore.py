"""Breadth-first through every state that one escrow and its service can reach, in small numbers.

What is explored is the table that the daemon runs, `settlement.step`, and not a copy of it. Around
it stands a world that is as bad as its `World` says: usage comes at any moment, the process dies at
any moment, calls are lost, refused or land late, answers are lost, readings are old, somebody else
releases, an old backup is restored, a person freezes and resumes. Each of these is one action, and
every action is tried in every state.

Time goes in ticks, and all moments are kept relative to now, so that the states are finitely many.
A dead process is a state like any other: what had not been committed when it died is a state that
was reached before, from which the process dies as well.

A state is two numbers, one of what meterd knows (an `Escrow`) and one of what is true (an
`Outside`), in one integer. Both sides are small and met again and again: each is stepped once and
looked up ever after, and that is what makes millions of states a matter of seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

from meterd.core.settlement import (
    UNKNOWN_OUTCOME,
    Answer,
    Answered,
    AnswerKind,
    Closing,
    Due,
    Escrow,
    EscrowStatus,
    Freeze,
    Go,
    Input,
    NotAllowed,
    Observed,
    Reading,
    Release,
    ReleaseStatus,
    Repeat,
    Resolved,
    Restarted,
    Resume,
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
PATIENCE = 200  # Kind moves after which a state counts as a dead end.


@dataclass(frozen=True)
class World:
    """How bad the world is, in ticks and in units of money."""

    rules: Rules
    used_max: int = 3
    total: int = 3
    late: int = 2  # A call lands so many ticks after it was sent at the latest.
    stale: int = 2  # A reading is younger than this,
    ancient_max: int = 0  # but for so many in all, which may be as old as the escrow.
    foreign_max: int = 0  # What somebody else may release.
    restores_max: int = 0  # How often a backup from before the first release is put back:
    restores_early: bool = False  # even while something is under way that it does not know of.
    closing: bool = False
    person: bool = False  # Freezes, resumes, and resolves by what is true.
    retries: bool = False  # A weakness that lies outside the table: a call is repeated blindly.


def rules(
    quarantine: int = 2,
    *,
    voids: int = 9,
    strict: bool = False,
    honoured: bool = False,
    credit: bool = False,
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
        credit_foreign=credit,
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
    ancient: int = 0  # Readings older than allowed, so far.
    restores: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """As much of what is true as decides what can happen to the escrow next."""

    used: int
    paid: int
    readings: tuple[tuple[int, bool], ...]  # What a reading may show; whether it is ancient.
    done: bool  # The open release has landed,
    lands: bool  # or may yet.
    few: bool  # Another call may be under way beside those that are.
    restores: int
    quiet: bool  # Nothing is under way and no reading is old.


Node = int  # The number of the escrow, above SHIFT the number of the outside.
SHIFT = 24
MASK = (1 << SHIFT) - 1
# What a move does to the outside: a name and its argument, looked up by this pair.
Op = tuple[str, int]
SAME, KEEP, FORGET, NEW = (("same", 0), ("keep", 0), ("forget", 0), ("new", 0))
Move = tuple[str, int, Op]  # What happens, the next escrow, and what it does outside.


@dataclass(slots=True)
class Found:
    """What an exploration has seen."""

    states: int = 0
    moves: int = 0
    overpaid: int = 0  # The worst.
    frozen: int = 0
    needless: int = 0  # Ways into frozen without a person or a doubt that only he can end.
    beside: int = 0  # Ways to intend a release while another is open.
    closed_short: int = 0
    stuck: int = 0
    trace: list[str] = field(default_factory=list)  # The shortest way to the first overpayment.


class Explorer:
    """One exploration."""

    def __init__(self, world: World) -> None:
        self._inside = Inside(world)
        self._outside = Around(world)
        self._world = world

    # -- The walk ----------------------------------------------------------------------------------

    def run(self, *, stop: bool = False) -> Found:
        """Visit every reachable state and say what was seen; `stop` at the first overpayment."""
        found = Found()
        start = self._node(self._inside.start, self._outside.start)
        parents: dict[Node, Node] = {start: -1}
        row = [start]
        while row and not (stop and found.trace):
            for node in row:
                if self._over(node) > found.overpaid:
                    found.overpaid = self._over(node)
                    found.trace = found.trace or self._way(parents, node)
            row = self._next_row(row, parents, found)
        found.states = len(parents)
        if not stop:
            self._judge(parents, found)
        return found

    def _over(self, node: Node) -> int:
        return self._outside.over[node & MASK]

    def _next_row(self, row: list[Node], parents: dict[Node, Node], found: Found) -> list[Node]:
        """Take every move from every state of one distance, and give the states of the next."""
        inside, outside = self._inside, self._outside
        views, effects = outside.views, outside.effects
        uses, closed, moves = outside.uses, inside.closed, inside.moves
        new: list[Node] = []
        taken = 0
        for node in row:
            eid, oid = node >> SHIFT, node & MASK
            view = views[oid]
            choices = moves[eid].get(view)
            if choices is None:
                choices = inside.choices(eid, outside.view(view), view)
            done = effects[oid]
            for _, escrow, op in choices:
                around = done.get(op)
                if around is None:
                    around = outside.carry_out(oid, op)
                after = escrow << SHIFT | around
                if after not in parents:
                    parents[after] = node
                    new.append(after)
            base = eid << SHIFT
            around_moves = outside.moves_of(oid)
            for _, around in around_moves:
                after = base | around
                if after not in parents:
                    parents[after] = node
                    new.append(after)
            used = uses[oid]
            if used >= 0 and not closed[eid]:
                after = base | used
                if after not in parents:
                    parents[after] = node
                    new.append(after)
            taken += len(choices) + len(around_moves)
        found.moves += taken
        return new

    def _judge(self, nodes: dict[Node, Node], found: Found) -> None:
        """Count what must not be, over all that was visited."""
        rest, inside = self._outside.rest, self._inside
        found.needless, found.beside = inside.needless, inside.beside
        for node in nodes:
            eid = node >> SHIFT
            found.frozen += inside.frozen[eid]
            found.closed_short += inside.closed[eid] and rest[node & MASK] > 0
        if not found.overpaid:
            found.stuck = self._stuck(nodes)

    def _stuck(self, nodes: dict[Node, Node]) -> int:
        """Count the states from which a world that is kind from now on does not get all paid."""
        inside, rest = self._inside, self._outside.rest
        person = self._world.person
        good: set[Node] = set()
        stuck = 0
        for first in nodes:
            node, way = first, []
            while node not in good:
                way.append(node)
                eid = node >> SHIFT
                frozen = inside.frozen[eid]
                if rest[node & MASK] <= 0 and not inside.open[eid] and not (person and frozen):
                    break
                if (frozen and not person) or len(way) > PATIENCE:
                    stuck += not frozen or person
                    break
                node = self._kindly(node)
            good.update(way)
        return stuck

    def _kindly(self, node: Node) -> Node:
        """What happens next when nothing more goes wrong: the settler's visit, then a tick."""
        eid, oid = node >> SHIFT, node & MASK
        view = self._outside.view(self._outside.views[oid])
        release = self._inside.escrows[eid].release
        moves = self._named(node)
        if release is not None and release.status is ReleaseStatus.INTENDED:
            return moves.get("go") or moves["go, too late"]
        if release is not None and release.status is ReleaseStatus.SENT:
            own = f"land {self._outside.outsides[oid].key}"
            return next(
                moves[name] for name in ("answer: done", own, "answer: lost") if name in moves
            )
        after = self._named(moves[f"read {view.paid}"])
        wanted = ["due"]
        if self._inside.frozen[eid] and view.quiet:
            wanted = ["a person says landed", "a person says absent", "resume"]
        return next(after[name] for name in (*wanted, "tick") if name in after)

    # -- Moves -------------------------------------------------------------------------------------

    @staticmethod
    def _node(eid: int, oid: int) -> Node:
        return eid << SHIFT | oid

    def _named(self, node: Node) -> dict[str, Node]:
        """Everything that can happen next, by name: for traces and kind worlds."""
        eid, oid = node >> SHIFT, node & MASK
        view = self._outside.views[oid]
        found = {
            name: self._node(escrow, self._outside.carry_out(oid, op))
            for name, escrow, op in self._inside.choices(eid, self._outside.view(view), view)
        }
        for name, around in self._outside.moves_of(oid):
            found[name] = self._node(eid, around)
        if self._outside.uses[oid] >= 0 and not self._inside.closed[eid]:
            found["use"] = self._node(eid, self._outside.uses[oid])
        return found

    def _way(self, parents: dict[Node, Node], node: Node) -> list[str]:
        """How the walk came to a state, in words."""
        names: list[str] = []
        while (parent := parents[node]) >= 0:
            names.append(next(name for name, to in self._named(parent).items() if to == node))
            node = parent
        return names[::-1]


# --------------------------------------------------------------------------------------------------
# What meterd knows


class Inside:
    """The escrow's states, numbered; each is stepped once with each input that can come to it."""

    def __init__(self, world: World) -> None:
        self._world = world
        # A person may make more voids than the day allows; the further ones decide nothing.
        self._voids_max = world.rules.voids_per_day + 1
        self._observed = cache(self._make_observed)
        self._numbers: dict[Escrow, int] = {}
        self.escrows: list[Escrow] = []
        self.closed: list[bool] = []
        self.frozen: list[bool] = []
        self.open: list[bool] = []
        self.moves: list[dict[int, Sequence[Move]]] = []  # By the number of the view.
        self._steps: list[dict[Input, tuple[int, bool] | None]] = []
        self._ticks: dict[int, int] = {}
        self.needless = 0
        self.beside = 0
        self.start = self._number(self._adopted())

    def choices(self, eid: int, view: View, number: int) -> Sequence[Move]:
        """Everything that can happen to a state, but for what happens outside alone."""
        if number not in self.moves[eid]:
            self.moves[eid][number] = tuple(self._choices(eid, view))
        return self.moves[eid][number]

    def _choices(self, eid: int, view: View) -> Iterator[Move]:
        if eid not in self._ticks:
            self._ticks[eid] = self._number(_aged(self.escrows[eid], self._world.rules))
        yield "tick", self._ticks[eid], ("tick", 0)
        yield self._settled("crash", eid, Restarted(0.0, 0))
        if view.restores < self._world.restores_max and (view.quiet or self._world.restores_early):
            old = self._allowed(self.start, Restarted(0.0, 0))[0]
            yield "an old backup is restored", old, ("restore", 0)
        release = self.escrows[eid].release
        if self._world.person:
            yield from self._person(eid, view)
        if release is not None and release.status is ReleaseStatus.SENT:
            yield from self._answers(eid, release, view)
        elif release is not None and release.status is ReleaseStatus.INTENDED:
            after, sends = self._allowed(eid, Go(0.0, 0))
            if sends:
                yield from self._leaves(after, view)
            else:
                yield "go, too late", after, self._key(after)
        else:
            yield from self._visits(eid, release, view)

    def _visits(self, eid: int, release: Release | None, view: View) -> Iterator[Move]:
        """The settler reads, and asks for a release or a repetition."""
        for released, ancient in view.readings:
            after, _ = self._allowed(eid, self._observed(released, view.used))
            name = f"read {released}, of long ago" if ancient else f"read {released}"
            yield (
                name,
                after,
                ("ancient", self._key(after) is KEEP) if ancient else self._key(after),
            )
        after, _ = self._allowed(eid, Due(view.used, "amount", "open", 0, 0.0, 0))
        if after != eid:
            new = self.open[after] and self.escrows[after].release != release
            yield "due", after, NEW if new else self._key(after)
        if self._world.closing and not self.escrows[eid].closing:
            yield "close", self._allowed(eid, Closing())[0], SAME
        if self._world.rules.honoured and release is not None and view.few:
            stepped = self._step(eid, Repeat(0.0, 0))
            if stepped is not None and stepped[1]:
                yield from self._leaves(stepped[0], view)

    def _leaves(self, eid: int, _: View) -> Iterator[Move]:
        """The call leaves, or fails before its first byte."""
        release = self.escrows[eid].release
        assert release is not None
        yield "go", eid, ("leave", release.amount)
        yield self._answered("go, not sent", eid, AnswerKind.NOT_SENT)

    def _answers(self, eid: int, release: Release, view: View) -> Iterator[Move]:
        if view.done:
            yield self._answered("answer: done", eid, AnswerKind.CONFIRMED, release.amount)
        if self._world.retries and view.few:
            yield "retry", eid, ("retry", release.amount)
        yield self._answered("answer: lost", eid, AnswerKind.DOUBT)
        if view.lands:  # Refused: this call will not land.
            for kind in CERTAIN_NO:
                name, after, op = self._answered(f"answer: {kind}", eid, kind)
                yield name, after, ("refuse", op is KEEP)

    def _answered(self, name: str, eid: int, kind: AnswerKind, amount: int | None = None) -> Move:
        return self._settled(name, eid, Answered(Answer(kind, "", amount), 0.0, 0))

    def _person(self, eid: int, view: View) -> Iterator[Move]:
        """Somebody who sees the service's own log, and does nothing that it does not bear out."""
        escrow = self.escrows[eid]
        if escrow.status not in (EscrowStatus.FROZEN, EscrowStatus.CLOSED):
            yield self._settled("freeze", eid, Freeze("a person"))
        if self._step(eid, Resume("seen")) is not None:
            yield self._settled("resume", eid, Resume("seen"))
        doubt = escrow.release is not None and escrow.release.status in UNKNOWN_OUTCOME
        if doubt and view.done:
            landed = Resolved(landed=True, reason="", mono=0.0, wall=0)
            yield self._settled("a person says landed", eid, landed)
        elif doubt and not view.lands:
            absent = Resolved(landed=False, reason="", mono=0.0, wall=0)
            yield self._settled("a person says absent", eid, absent)

    # -- Steps -------------------------------------------------------------------------------------

    def _settled(self, name: str, eid: int, event: Input) -> Move:
        after, _ = self._allowed(eid, event)
        return name, after, self._key(after)

    def _key(self, eid: int) -> Op:
        """Whether the open release's key is remembered: not once it is finished."""
        return KEEP if self.open[eid] else FORGET

    def _allowed(self, eid: int, event: Input) -> tuple[int, bool]:
        stepped = self._step(eid, event)
        assert stepped is not None, (self.escrows[eid], event)
        return stepped

    def _step(self, eid: int, event: Input) -> tuple[int, bool] | None:
        """Step one state: the next one, and whether a call leaves. None: it is not allowed."""
        known = self._steps[eid]
        if event not in known:
            known[event] = self._make_step(self.escrows[eid], event)
        return known[event]

    def _make_step(self, before: Escrow, event: Input) -> tuple[int, bool] | None:
        try:
            after, effects = step(before, event, self._world.rules)
        except NotAllowed:
            return None
        sends = any(isinstance(effect, Send) for effect in effects)
        froze = after.status is EscrowStatus.FROZEN is not before.status
        asked = after.release is not None and after.release.status is ReleaseStatus.ESCALATED
        self.needless += froze and not asked and not isinstance(event, Freeze)
        self.beside += (
            isinstance(event, Due)
            and before.release is not None
            and after.release not in (None, before.release)
        )
        return self._number(after), sends

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
            voids=tuple(
                _plain(void, f"void {n}") for n, void in enumerate(escrow.voids[: self._voids_max])
            ),
        )
        number = self._numbers.setdefault(plain, len(self.escrows))
        if number == len(self.escrows):
            self.escrows.append(plain)
            self.closed.append(plain.status is EscrowStatus.CLOSED)
            self.frozen.append(plain.status is EscrowStatus.FROZEN)
            self.open.append(plain.release is not None)
            self.moves.append({})
            self._steps.append({})
        return number

    def _adopted(self) -> Escrow:
        escrow = Escrow("e", "a", "main")
        for mono in (-TICK, 0.0):
            observed = Observed(self._reading(0, mono), mono, 0, 0)
            escrow, _ = step(escrow, observed, self._world.rules)
        assert escrow.status is EscrowStatus.ACTIVE
        return escrow

    def _make_observed(self, released: int, used: int) -> Observed:
        return Observed(self._reading(released), 0.0, 0, used)

    def _reading(self, released: int, mono: float = 0.0) -> Reading:
        total = self._world.total
        return Reading("e", "active", total, released, total - released, 0, "USDC", "p", None, mono)


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


# --------------------------------------------------------------------------------------------------
# What is true


class Around:
    """The states of what is true, numbered; each change to each of them is reckoned once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._numbers: dict[Outside, int] = {}
        self._view_numbers: dict[View, int] = {}
        self._views: list[View] = []
        self.outsides: list[Outside] = []
        self.views: list[int] = []
        self.over: list[int] = []  # By how much meterd was paid more than was used.
        self.rest: list[int] = []  # How much is used, and could be paid, and is not.
        self.effects: list[dict[Op, int]] = []
        self._moves: list[Sequence[tuple[str, int]] | None] = []
        self.uses: list[int] = []  # The state after one more unit was used; -1: no more is.
        self.start = self._number(Outside())

    def view(self, number: int) -> View:
        """The view of a number."""
        return self._views[number]

    def moves_of(self, oid: int) -> Sequence[tuple[str, int]]:
        """What can happen without meterd."""
        known = self._moves[oid]
        if known is None:
            known = self._moves[oid] = tuple(self._own_moves(self.outsides[oid]))
        return known

    def _own_moves(self, outside: Outside) -> Iterator[tuple[str, int]]:
        for call in outside.calls:
            yield f"land {call.key}", self._number(self._landed(outside, call))
        if outside.foreign < self._world.foreign_max and outside.paid < self._world.total:
            grown = replace(_paid(outside, 1), foreign=outside.foreign + 1)
            yield "foreign release", self._number(grown)

    def carry_out(self, oid: int, op: Op) -> int:
        """What a move makes of it."""
        known = self.effects[oid].get(op)
        if known is None:
            known = self._number(self._after(self.outsides[oid], *op))
            self.effects[oid][op] = known
        return known

    def _after(self, outside: Outside, what: str, more: int) -> Outside:
        if what == "ancient":
            outside = replace(outside, ancient=outside.ancient + 1)
            what = "keep" if more else "forget"
        elif what == "restore":
            outside = replace(outside, restores=outside.restores + 1)
            what = "forget"
        changes: dict[str, Callable[[], Outside]] = {
            "same": lambda: outside,
            "tick": lambda: self._tick(outside),
            "keep": lambda: _renumbered(outside),
            "forget": lambda: _renumbered(replace(outside, key=-1)),
            "new": lambda: _renumbered(_new_key(outside)),
            "leave": lambda: self._with_call(outside, more),
            # With nothing to tell it from the first.
            "retry": lambda: self._with_call(_new_key(outside), more),
            "refuse": lambda: _renumbered(_without_newest(outside, keep=bool(more))),
        }
        return changes[what]()

    def _with_call(self, outside: Outside, amount: int) -> Outside:
        call = Call(outside.key, amount, self._world.late)
        return replace(outside, calls=tuple(sorted((*outside.calls, call), key=_order)))

    def _landed(self, outside: Outside, call: Call) -> Outside:
        calls = list(outside.calls)
        calls.remove(call)
        rest = replace(outside, calls=tuple(calls))
        repeated = self._world.rules.honoured and call.key in outside.landed
        if repeated or outside.paid + call.amount > self._world.total:
            return _renumbered(rest)
        landed = _paid(rest, call.amount)
        return _renumbered(replace(landed, landed=landed.landed | {call.key}))

    def _tick(self, outside: Outside) -> Outside:
        stale, ever = self._world.stale, outside.ancient < self._world.ancient_max
        past = tuple(
            (value, min(age + 1, stale))
            for value, age in outside.past
            if age + 1 < stale or (ever and value != outside.paid)
        )
        calls = tuple(replace(call, left=call.left - 1) for call in outside.calls if call.left > 0)
        return _renumbered(replace(outside, past=past, calls=calls))

    def _number(self, outside: Outside) -> int:
        if outside.past and outside.ancient >= self._world.ancient_max:
            young = tuple(shot for shot in outside.past if shot[1] < self._world.stale)
            outside = replace(outside, past=young)
        number = self._numbers.setdefault(outside, len(self.outsides))
        if number == len(self.outsides):
            assert number < MASK
            self.outsides.append(outside)
            self.over.append(outside.paid - outside.foreign - outside.used)
            self.rest.append(min(outside.used, self._world.total) - outside.paid)
            self.effects.append({})
            self._moves.append(None)
            self.views.append(self._view(outside))
            self.uses.append(-1)
            if outside.used < self._world.used_max:
                self.uses[number] = self._number(replace(outside, used=outside.used + 1))
        return number

    def _view(self, outside: Outside) -> int:
        young = {value for value, age in outside.past if age < self._world.stale} | {outside.paid}
        old = {value for value, _ in outside.past} - young
        view = View(
            used=outside.used,
            paid=outside.paid,
            readings=(
                *((value, False) for value in sorted(young)),
                *((value, True) for value in sorted(old)),
            ),
            done=outside.key in outside.landed,
            lands=any(call.key == outside.key for call in outside.calls),
            few=len(outside.calls) < CALLS_MAX,
            restores=outside.restores,
            quiet=not outside.calls and len(young) == 1,
        )
        number = self._view_numbers.setdefault(view, len(self._views))
        if number == len(self._views):
            self._views.append(view)
        return number


def _order(call: Call) -> tuple[int, int, int]:
    return call.key, call.left, call.amount


def _paid(outside: Outside, amount: int) -> Outside:
    past = (*outside.past, (outside.paid, 0))
    return replace(outside, paid=outside.paid + amount, past=past)


def _new_key(outside: Outside) -> Outside:
    return replace(outside, key=max((outside.key, *(call.key for call in outside.calls))) + 1)


def _without_newest(outside: Outside, *, keep: bool) -> Outside:
    """Refuse the newest call of the open release: it lands no more."""
    mine = [call for call in outside.calls if call.key == outside.key]
    calls = list(outside.calls)
    calls.remove(max(mine, key=lambda call: call.left))
    return replace(outside, calls=tuple(calls), key=outside.key if keep else -1)


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
