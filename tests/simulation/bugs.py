"""Bugs of the kind that other designs have, planted one at a time: the simulation must find each.

A bug replaces a piece of meterd for one run, from here; nothing in meterd itself knows of it. Each
is a function that is handed `put(owner, name, value)`.
"""

from __future__ import annotations

import asyncio
import contextlib

# ruff: noqa: ARG005  # A planted piece takes what the real one takes.
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import meterd.app
from meterd.bookkeeper import Bookkeeper, Recorded
from meterd.core import accounts, events, ledger, sequences, settlement
from meterd.core.changes import Change
from meterd.core.meters import Aggregation
from meterd.core.settlement import (
    Answer,
    Answered,
    AnswerKind,
    Closing,
    EscrowStatus,
    Go,
    Observed,
    Record,
    ReleaseStatus,
    Restarted,
    Send,
)
from meterd.escrow import outcomes
from meterd.intake import Intake
from meterd.settler import Settler
from meterd.store.identities import Identities
from meterd.store.sqlite import SqliteStore

Put = Callable[[Any, str, Any], None]
BUGS: dict[str, Callable[[Put], None]] = {}


def bug(plant: Callable[[Put], None]) -> Callable[[Put], None]:
    """Enter a bug under its docstring."""
    assert plant.__doc__ is not None
    BUGS[plant.__doc__.rstrip(".")] = plant
    return plant


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant a bug, and take it out again."""
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, attribute: str, value: Any) -> None:
        undo.append((owner, attribute, owner.__dict__[attribute]))
        setattr(owner, attribute, value)

    def put_row(owner: Any, attribute: Any, value: Any) -> None:
        if isinstance(owner, dict):
            row = owner[attribute]
            undo.append((owner, attribute, row))
            owner[attribute] = value
        else:
            put(owner, attribute, value)

    try:
        BUGS[name](put_row)
        yield
    finally:
        for owner, attribute, value in reversed(undo):
            if isinstance(owner, dict):
                owner[attribute] = value
            else:
                setattr(owner, attribute, value)


def _in_table(put: Any, kind: type, wrap: Callable[..., Any]) -> None:
    """Replace one row of the state table."""
    original = settlement._TABLE[kind]
    put(settlement._TABLE, kind, lambda *given: wrap(original, *given))


# -- Commit, then ack ----------------------------------------------------------------------------


@bug
def ack_first(put: Put) -> None:
    """A delivery is acknowledged before its commit."""

    async def acks(self: Intake, source: Any, waiting: Any) -> None:
        while (item := await waiting.get()) is not None:
            await source.ack(item[1])

    put(Intake, "_acks", acks)


@bug
def answer_first(put: Put) -> None:
    """An HTTP request is answered before its commit."""

    async def submit(self: Intake, source: str, deliveries: Any) -> Recorded:
        return self._bookkeeper.record(source, deliveries)

    put(Intake, "submit", submit)


@bug
def ack_lost_batch(put: Put) -> None:
    """A batch whose commit failed is acknowledged all the same."""

    async def acks(self: Intake, source: Any, waiting: Any) -> None:
        while (item := await waiting.get()) is not None:
            recorded, deliveries = item
            await asyncio.wait({recorded.durable})
            await source.ack(deliveries)
            recorded.durable.result()

    put(Intake, "_acks", acks)


@bug
def acks_in_pairs(put: Put) -> None:
    """Acknowledgements leave in another order than the deliveries came."""

    async def acks(self: Intake, source: Any, waiting: Any) -> None:
        while (item := await waiting.get()) is not None:
            pair = [item]
            with contextlib.suppress(TimeoutError):
                pair.append(await asyncio.wait_for(waiting.get(), 0.5))
            if pair[-1] is None:
                pair.pop()
            for recorded, deliveries in reversed(pair):
                await asyncio.shield(recorded.durable)
                await source.ack(deliveries)

    put(Intake, "_acks", acks)


@bug
def promise_before_commit(put: Put) -> None:
    """The store says "durable" before it has committed."""
    original = SqliteStore._write

    def write(self: Any, jobs: Any) -> None:
        for job in jobs:
            if not job.future.done():
                job.future.set_result(None)
        asyncio.get_running_loop().call_later(0.2, late, self, jobs)

    def late(self: Any, jobs: Any) -> None:
        with contextlib.suppress(Exception):
            original(self, jobs)

    put(SqliteStore, "_write", write)


# -- One commit for the whole effect -------------------------------------------------------------


def _two_commits(put: Put, split: Callable[[Change], tuple[Change, Change]]) -> None:
    original = Bookkeeper._commit

    def commit(self: Any, change: Change, deliveries: int = 0) -> Any:
        if not deliveries:
            return original(self, change)
        first, second = split(change)
        original(self, first)
        done = asyncio.get_running_loop().create_future()

        def later() -> None:
            original(self, second, deliveries).add_done_callback(tell)

        def tell(future: Any) -> None:
            if not done.done():
                done.set_result(None) if future.exception() is None else done.set_exception(
                    future.exception()
                )

        asyncio.get_running_loop().call_later(0.05, later)
        return done

    put(Bookkeeper, "_commit", commit)


@bug
def position_first(put: Put) -> None:
    """The source's position is committed before what was read."""
    _two_commits(put, lambda one: (Change(positions=one.positions), replace(one, positions=())))


@bug
def marks_first(put: Put) -> None:
    """Identities are committed before the counters that they changed."""
    _two_commits(put, lambda one: (Change(marks=one.marks), replace(one, marks=())))


@bug
def marks_last(put: Put) -> None:
    """Identities are committed after the counters that they changed."""
    _two_commits(put, lambda one: (replace(one, marks=()), Change(marks=one.marks)))


@bug
def letters_dropped(put: Put) -> None:
    """Rejected deliveries are not kept."""
    original = Bookkeeper._commit

    def commit(self: Any, change: Change, deliveries: int = 0) -> Any:
        return original(self, replace(change, dead_letters=()), deliveries)

    put(Bookkeeper, "_commit", commit)


# -- Counted once --------------------------------------------------------------------------------


@bug
def no_dedupe(put: Put) -> None:
    """Identities are not looked for."""
    put(Identities, "find", lambda self, digests: [-1] * (len(digests) // 16))


@bug
def duplicates_in_batch(put: Put) -> None:
    """Duplicates within one batch are counted."""
    original = ledger.Ledger.decide

    def decide(self: Any, resolved: Any, digests: Any, prints: Any, known: Any) -> Any:
        unlike = [bytes(digest) + bytes([place % 256]) for place, digest in enumerate(digests)]
        return original(self, resolved, unlike, prints, known)

    put(ledger.Ledger, "decide", decide)


@bug
def conflict_is_duplicate(put: Put) -> None:
    """The same id with other content is taken for a duplicate."""
    put(Identities, "fingerprint", staticmethod(lambda content: 7))


@bug
def applied_twice(put: Put) -> None:
    """Now and then a batch is applied twice."""
    original = ledger.Ledger.apply

    def apply(self: Any, entry: Any, wall: int) -> Any:
        if entry.duplicates:
            original(self, entry, wall)
        return original(self, entry, wall)

    put(ledger.Ledger, "apply", apply)


@bug
def marks_forgotten(put: Put) -> None:
    """A restart forgets the identities of the last hour."""
    original = Identities.load

    def load(self: Any, rows: Any) -> None:
        rows = list(rows)
        newest = max((bucket for bucket, _ in rows), default=0)
        original(self, [row for row in rows if row[0] < newest])

    put(Identities, "load", load)


@bug
def late_is_counted(put: Put) -> None:
    """Events from before the window, whose identities are forgotten, are counted."""
    put(Bookkeeper, "_oldest", lambda self, now: 0)


@bug
def numbers_not_kept(put: Put) -> None:
    """The numbers of a batch are not in its commit."""
    original = Bookkeeper._commit

    def commit(self: Any, change: Change, deliveries: int = 0) -> Any:
        return original(self, replace(change, producers=()), deliveries)

    put(Bookkeeper, "_commit", commit)


@bug
def numbers_ignored_when_late(put: Put) -> None:
    """A late event with a number is counted, whatever its number says."""
    put(sequences.Producer, "judge", lambda self, number, at: sequences.Known.MISSING)


@bug
def late_is_known(put: Put) -> None:
    """A late event below the producer's last number is taken for a duplicate."""

    def judge(self: Any, number: int, at: int) -> Any:
        return sequences.Known.SEEN if number <= self.last else sequences.Known.MISSING

    put(sequences.Producer, "judge", judge)


@bug
def rejected_is_seen(put: Put) -> None:
    """The number of a rejected event counts as seen, so that nobody waits for it."""
    original = Bookkeeper._note_numbers

    def note(self: Any, resolved: Any, entry: Any, *given: Any) -> Any:
        fresh = None if entry.fresh is None else [True] * len(entry.fresh)
        return original(self, resolved, replace(entry, rejections=[], fresh=fresh), *given)

    put(Bookkeeper, "_note_numbers", note)


@bug
def redelivery_begins_anew(put: Put) -> None:
    """A number that comes again is taken for a new beginning, even if its event is known."""
    original = sequences.Producer.count

    def count(self: Any, number: int, at: int, *, fresh: bool) -> None:
        original(self, number, at, fresh=True)

    put(sequences.Producer, "count", count)


@bug
def topic_ignored(put: Put) -> None:
    """What the transport knows of a delivery is ignored."""
    import meterd.bookkeeper

    put(meterd.bookkeeper, "_with_address", lambda index, event, deliveries: event)


# -- Exact money ---------------------------------------------------------------------------------


@bug
def rounded_up(put: Put) -> None:
    """What is owed is rounded up to the next micro."""

    def owed(self: Any) -> int:
        return -(-self.numerator * 10**6 // self.denominator)

    put(accounts.Account, "owed", property(owed))


@bug
def float_price(put: Put) -> None:
    """What is owed goes through a float and is rounded as floats are."""

    def owed(self: Any) -> int:
        return round(float(Fraction(self.numerator, self.denominator)) * 1e6)

    put(accounts.Account, "owed", property(owed))


@bug
def quantity_truncated(put: Put) -> None:
    """Parts of a unit are dropped."""
    original = ledger.Ledger.resolve

    def resolve(self: Any, *given: Any) -> Any:
        found = original(self, *given)
        found.quantities = [
            quantity if quantity < 10**9 else quantity // 10**9 * 10**9
            for quantity in found.quantities
        ]
        return found

    put(ledger.Ledger, "resolve", resolve)


@bug
def no_release_max(put: Put) -> None:
    """A release has no limit."""
    rules_of = meterd.app.rules_of
    put(meterd.app, "rules_of", lambda one: replace(rules_of(one), release_max=10**12))


# -- Intend, then pay, at most once --------------------------------------------------------------


@bug
def pay_first(put: Put) -> None:
    """A release is sent before its intention is durable."""
    original = Bookkeeper._durable

    async def durable(self: Any, change: Change) -> None:
        if change.releases:
            self._commit(change)
        else:
            await original(self, change)

    put(Bookkeeper, "_durable", durable)


@bug
def blind_retry(put: Put) -> None:
    """A call without an answer is made again."""
    original = Settler._carry_out

    async def carry_out(self: Any, escrow: str, effects: Any) -> None:
        service = self._service

        class Again:
            async def release_partial(self, release: Any, role: str) -> Answer:
                answer = await service.release_partial(release, role)
                if answer.kind is AnswerKind.DOUBT:
                    answer = await service.release_partial(release, role)
                return answer  # type: ignore[no-any-return]

        self._service = Again()
        try:
            await original(self, escrow, effects)
        finally:
            self._service = service

    put(Settler, "_carry_out", carry_out)


def _answers(put: Put, change: Callable[[Answer], Answer]) -> None:
    _in_table(
        put,
        Answered,
        lambda row, state, event, rules: row(
            state, replace(event, answer=change(event.answer)), rules
        ),
    )


@bug
def error_is_no(put: Put) -> None:
    """A 500 is taken for a refusal."""

    def change(answer: Answer) -> Answer:
        failed = answer.kind is AnswerKind.DOUBT and answer.detail[:1] == "5"
        return replace(answer, kind=AnswerKind.LIMITED) if failed else answer

    _answers(put, change)


@bug
def silence_is_no(put: Put) -> None:
    """No answer is taken for "not sent"."""

    def change(answer: Answer) -> Answer:
        silent = answer.kind is AnswerKind.DOUBT and answer.detail.startswith("no answer")
        return replace(answer, kind=AnswerKind.NOT_SENT) if silent else answer

    _answers(put, change)


@bug
def any_2xx_is_yes(put: Put) -> None:
    """A bare 2xx is taken for a payment, whatever was asked."""
    original = outcomes.answer_to_release

    def answer_to_release(release: Any, received: Any, mask: Any, wall: int) -> Answer:
        if 200 <= received.status < 400 or received.status == 409:
            return Answer(AnswerKind.CONFIRMED, "2xx", amount=release.amount)
        return original(release, received, mask, wall)

    put(outcomes, "answer_to_release", answer_to_release)


@bug
def conflict_is_yes(put: Put) -> None:
    """A 402 is taken for a payment."""

    def change(answer: Answer) -> Answer:
        if answer.kind is AnswerKind.EMPTY:
            return replace(answer, kind=AnswerKind.DECLINED)
        return answer

    original = settlement._TABLE[Answered]

    def row(state: Any, event: Any, rules: Any) -> Any:
        if event.answer.kind is AnswerKind.EMPTY:
            paid = Answer(AnswerKind.CONFIRMED, "402", amount=state.release.amount)
            return original(state, replace(event, answer=paid), rules)
        return original(state, replace(event, answer=change(event.answer)), rules)

    put(settlement._TABLE, Answered, row)  # type: ignore[arg-type]


def _void_at_once(state: Any, wall: int) -> Any:
    release = replace(
        state.release,
        status=ReleaseStatus.VOID,
        history=(*state.release.history, (wall, "void", "forgotten")),
    )
    return replace(state, release=None), (Record(release),)


@bug
def forgotten_at_restart(put: Put) -> None:
    """A restart forgets the open release."""

    def row(original: Any, state: Any, event: Any, rules: Any) -> Any:
        if state.release is not None:
            state, _ = original(state, event, rules)
            return _void_at_once(state, event.wall)
        return original(state, event, rules)

    _in_table(put, Restarted, row)


@bug
def doubt_not_held(put: Put) -> None:
    """What is in doubt is not held: a fresh reading decides at once."""
    rules_of = meterd.app.rules_of
    put(
        meterd.app,
        "rules_of",
        lambda one: replace(rules_of(one), quarantine=0.0, observe_gap=0.5, voids_per_day=99),
    )


@bug
def half_quarantine(put: Put) -> None:
    """The quarantine is waited for once, though a late call and an old reading may add up."""
    rules_of = meterd.app.rules_of

    def half(one: Any) -> Any:
        rules = rules_of(one)
        return replace(rules, quarantine=rules.quarantine / 2)

    put(meterd.app, "rules_of", half)


@bug
def doubt_counted_as_unpaid(put: Put) -> None:
    """The amount in doubt is not held: another release goes out beside it."""
    original = settlement._guard

    def row(row_: Any, state: Any, event: Any, rules: Any) -> Any:
        outcome, effects = row_(state, event, rules)
        if outcome.release is not None and outcome.release.status is ReleaseStatus.IN_DOUBT:
            voided, more = _void_at_once(outcome, event.wall)
            return voided, (*effects, *more)
        return outcome, effects

    put(settlement, "_guard", original)
    _in_table(put, Answered, row)


@bug
def edge_not_level(put: Put) -> None:
    """An amount comes from what accrued, without what the service says it released."""

    def payable(self: Any, owed: int) -> int:
        return max(0, min(owed - self.credited, self.remaining))

    put(settlement.Escrow, "payable", payable)


@bug
def baseline_ignored(put: Put) -> None:
    """What was released before meterd came counts as meterd's."""

    def payable(self: Any, owed: int) -> int:
        missing = min(owed, self.total) - max(self.observed, self.expected) - self.held
        return max(0, min(missing, self.remaining))

    put(settlement.Escrow, "payable", payable)


@bug
def late_not_booked(put: Put) -> None:
    """A void that lands late is taken for a stranger's release."""
    original = settlement._surplus

    def surplus(state: Any, *given: Any) -> Any:
        blind = replace(state, voids=())
        after, effects = original(blind, *given)
        return replace(after, voids=state.voids), effects

    put(settlement, "_surplus", surplus)


@bug
def foreign_ignored(put: Put) -> None:
    """A stranger's release is overlooked."""

    def surplus(state: Any, event: Any, rules: Any, difference: int) -> Any:
        return settlement._follow(
            replace(state, observed=state.expected, suspicion=None), event, rules
        )

    put(settlement, "_surplus", surplus)


@bug
def sends_frozen(put: Put) -> None:
    """A frozen escrow goes on paying."""
    original = settlement._guard

    def guard(state: Any, event: Any, rules: Any) -> str:
        return original(replace(state, status=EscrowStatus.ACTIVE), event, rules)

    put(settlement, "_guard", guard)
    _in_table(
        put,
        Go,
        lambda row, state, event, rules: _keep(
            row(replace(state, status=EscrowStatus.ACTIVE), event, rules), state
        ),
    )


def _keep(outcome: Any, state: Any) -> Any:
    after, effects = outcome
    return replace(after, status=state.status), effects


@bug
def thaws_at_restart(put: Put) -> None:
    """A restart forgets that an escrow is frozen."""

    def row(original: Any, state: Any, event: Any, rules: Any) -> Any:
        after, effects = original(state, event, rules)
        if after.status is EscrowStatus.FROZEN and after.total:
            after = replace(after, status=EscrowStatus.ACTIVE)
        return after, effects

    _in_table(put, Restarted, row)


@bug
def strict_ignored(put: Put) -> None:
    """`strict` is not obeyed."""
    rules_of = meterd.app.rules_of
    put(meterd.app, "rules_of", lambda one: replace(rules_of(one), strict=False))


@bug
def deadline_ignored(put: Put) -> None:
    """Calls are made up to the deadline, when a doubt could not be resolved any more."""
    original = settlement._guard

    def guard(state: Any, event: Any, rules: Any) -> str:
        return original(replace(state, deadline=None), event, rules)

    put(settlement, "_guard", guard)


@bug
def closes_short(put: Put) -> None:
    """An agreement is closed while its last release is open."""

    def row(original: Any, state: Any, event: Any, rules: Any) -> Any:
        after, effects = original(state, event, rules)
        if after.release is None and after.status is EscrowStatus.ACTIVE:
            after = replace(after, status=EscrowStatus.CLOSED, reason="settled")
        return after, effects

    _in_table(put, Closing, row)


@bug
def reading_confirms_anything(put: Put) -> None:
    """A reading that shows any more than before confirms a release in doubt."""
    original = settlement._resolve

    def resolve(state: Any, event: Any, rules: Any) -> Any:
        release = state.release
        if release.status is ReleaseStatus.IN_DOUBT:
            return settlement._landed(state, "seen", event.mono, event.wall)
        return original(state, event, rules)

    put(settlement, "_resolve", resolve)


__all__ = ["BUGS", "Aggregation", "Observed", "Send", "events", "planted"]
