"""The release protocol, exhausted in small numbers: see explore.py for what is tried.

`pytest tests/model -rP` prints how many states each world has, and the shortest way to be paid
twice in each weaker protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from meterd.core import settlement
from meterd.core.settlement import (
    Answered,
    AnswerKind,
    Closing,
    EscrowStatus,
    ReleaseStatus,
    Restarted,
    Resume,
)
from tests.model.explore import Explorer, Found, World, rules

MILLION = 1_000_000

# Each world, and how many states it has at least: one that lost some is explored no more.
EXACT = {
    "calls as late and readings as old as the quarantine": (
        World(rules(voids=2), used_max=5, total=5),
        79_000,
    ),
    "a longer quarantine, more money": (
        World(rules(3, voids=1), used_max=6, total=6, late=3, stale=3),
        209_000,
    ),
    "many voids": (World(rules(1), used_max=2, total=2, late=1, stale=1), 8_400),
    "an escrow that runs dry": (
        World(rules(3, voids=1), used_max=7, total=6, late=3, stale=3),
        340_000,
    ),
    "an agreement that closes": (
        World(rules(3, voids=1), used_max=5, total=5, late=3, stale=3, closing=True),
        164_000,
    ),
    "a service that honours keys": (
        World(rules(2, honoured=True, voids=1), used_max=3, total=3),
        41_000,
    ),
    "a person who freezes, resumes and says what became of a release": (
        World(rules(voids=1), used_max=3, total=3, person=True),
        63_000,
    ),
}
DOUBTFUL = {
    "somebody else releases, and the escrow freezes": (
        World(rules(voids=1), used_max=4, total=4, foreign_max=2),
        210_000,
    ),
    "somebody else releases, and it counts as payment": (
        World(rules(voids=1, credit=True), used_max=4, total=4, foreign_max=1),
        85_000,
    ),
    "an old backup is restored": (
        World(rules(voids=2), used_max=4, total=4, restores_max=1),
        57_000,
    ),
    "an old backup is restored twice, and what it does not know counts as payment": (
        World(rules(voids=1, credit=True), used_max=4, total=4, restores_max=2),
        52_000,
    ),
    "one reading is older than all that is allowed": (
        World(rules(voids=2), used_max=4, total=4, ancient_max=1),
        78_000,
    ),
}
BROKEN = World(rules(1, voids=1), used_max=4, late=5, stale=4, total=6)
STRICT = World(rules(1, strict=True), used_max=5, late=6, stale=5, total=6)
BROKEN_STATES, STRICT_STATES = 452_000, 166_000


def explore(world: World, least: int = 1) -> Found:
    """Explore a whole world, and say how large it was."""
    found = Explorer(world).run()
    print(
        f"{found.states:,} states, {found.moves:,} moves, {found.frozen:,} states frozen;", end=" "
    )
    print(f"overpaid {found.overpaid}, dead ends {found.stuck}")
    assert found.states >= least, found
    return found


def test_worlds_have_more_than_a_million_states_together():
    """Each test below holds its world to its number."""
    worlds = [*EXACT.values(), *DOUBTFUL.values()]
    total = sum(least for _, least in worlds) + BROKEN_STATES + STRICT_STATES
    print(f"{total:,} states at least in {len(worlds) + 2} worlds")

    assert total > MILLION


@pytest.mark.parametrize("name", EXACT)
def test_table_never_overpays_and_never_gets_stuck_while_the_assumptions_hold(name):
    """Whatever is lost, late, old or killed: never more than used, and a kind world pays the rest.

    Frozen are only those escrows in which a person must say what became of a release, since the
    voids of the day are used up, or which a person froze.
    """
    found = explore(*EXACT[name])

    assert (0, 0, 0) == (found.overpaid, found.closed_short, found.stuck), found
    assert (0, 0) == (found.needless, found.beside), found


@pytest.mark.parametrize("name", DOUBTFUL)
def test_table_never_pays_more_than_used_of_its_own_when_the_figures_are_not_its_own(name):
    """A foreign release, a backup or an ancient reading makes it pay less or freeze, never more."""
    found = explore(*DOUBTFUL[name])

    assert (0, 0, 0, 0) == (found.overpaid, found.closed_short, found.stuck, found.beside), found


def test_table_overpays_by_one_release_at_most_when_calls_and_readings_break_their_word():
    """Without A4 and A5 one void may be wrong; then the escrow is frozen."""
    found = explore(BROKEN, BROKEN_STATES)

    assert BROKEN.rules.release_max == found.overpaid, found


@pytest.mark.parametrize("strict", [False, True])
def test_table_overpays_by_one_release_at_most_when_a_young_backup_forgets_a_call(strict):
    """A backup that does not know of a call under way is as good as a second daemon: A1 is broken.

    Not even `strict` can help where the doubt itself is forgotten.
    """
    kept = rules(voids=1, strict=strict)
    world = World(kept, used_max=4, total=4, restores_max=1, restores_early=True)
    found = explore(world)

    assert kept.release_max == found.overpaid, found


def test_strict_table_never_overpays_whatever_the_network_does():
    """With `strict` no release is given up without a person."""
    found = explore(STRICT, STRICT_STATES)

    assert (0, 0) == (found.overpaid, found.stuck), found


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "world",
    [
        World(rules(4, voids=2), used_max=7, total=7, late=4, stale=4),
        World(rules(2, voids=2), used_max=5, total=5, foreign_max=2, closing=True),
        World(rules(2, voids=1), used_max=4, total=4, person=True, closing=True),
    ],
    ids=["quarantine of four ticks", "foreign and closing", "person and closing"],
)
def test_table_never_overpays_in_much_larger_worlds(world):
    """The same as above in millions of states more."""
    found = explore(world, MILLION)

    assert (0, 0, 0, 0) == (found.overpaid, found.closed_short, found.stuck, found.beside), found


# --------------------------------------------------------------------------------------------------
# Weaker protocols. Each plants one mistake that other designs make around the table.

Plant = Callable[[pytest.MonkeyPatch], None]
Row = Callable[..., Any]


def row(kind: type, wrap: Callable[..., Any]) -> Plant:
    """Replace one row of the table; `wrap` is handed the real one first."""
    return lambda patch: patch.setitem(
        settlement._TABLE, kind, partial(wrap, settlement._TABLE[kind])
    )


def piece(name: str, wrap: Callable[..., Any]) -> Plant:
    """Replace a piece of the table; `wrap` is handed the real one first."""
    return lambda patch: patch.setattr(settlement, name, partial(wrap, getattr(settlement, name)))


def together(*plants: Plant) -> Plant:
    """Several of them make one mistake."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        for one in plants:
            one(patch)

    return plant


def nothing(_: pytest.MonkeyPatch) -> None:
    """The mistake lies in the settings or outside the table."""


def forgets_release(original: Row, state: Any, event: Any, kept: Any) -> Any:
    return original(replace(state, release=None), event, kept)


def takes_intention_for_unsent(original: Row, state: Any, event: Any, kept: Any) -> Any:
    """What is stored says "intended" from the intention until the outcome, sent or not."""
    release = state.release
    if release is not None and release.status in (ReleaseStatus.INTENDED, ReleaseStatus.SENT):
        state, _ = settlement._unsent(state, "", event.mono, event.wall)
    return original(state, event, kept)


def takes_doubt_for(kind: AnswerKind) -> Callable[..., Any]:
    def answered(original: Row, state: Any, event: Any, kept: Any) -> Any:
        answer = event.answer
        if answer.kind is AnswerKind.DOUBT:
            answer = replace(answer, kind=kind, amount=state.release.amount)
        return original(state, replace(event, answer=answer), kept)

    return answered


def sees_nothing_open(original: Row, state: Any, event: Any, kept: Any) -> str:
    return original(replace(state, release=None), event, kept)


def wants_no_reading(_: Row, state: Any, __: Any, ___: Any) -> str:
    return "" if state.word == "active" and state.release is None else "blocked"


def pays_by_memory(patch: pytest.MonkeyPatch) -> None:
    def payable(self: Any, owed: int) -> int:
        return max(0, min(owed - self.settled, self.total) - self.held)

    patch.setattr(settlement.Escrow, "payable", payable)


def holds_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settlement.Escrow, "held", property(lambda _: 0))


def is_content_with_one_sighting(
    original: Row, state: Any, release: Any, event: Any, kept: Any
) -> Any:
    seen = replace(release, sightings=1, sighted_mono=-1000.0)
    return original(state, seen, event, kept)


def never_gives_up(_: Row, state: Any, *__: Any) -> Any:
    return state, ()


def closes_at_once(original: Row, state: Any, event: Any, kept: Any) -> Any:
    after, effects = original(state, event, kept)
    return replace(after, status=EscrowStatus.CLOSED), effects


def always(answer: object) -> Callable[..., Any]:
    return lambda *_: answer


HONOURED = World(rules(1, honoured=True, voids=1), used_max=2, total=2, late=1, stale=1)
PERSON = World(rules(voids=1), used_max=2, total=2, person=True)
BACKUP = World(rules(voids=1), used_max=2, total=2, restores_max=1)

WEAK: dict[str, tuple[Plant, World]] = {
    "a call is repeated on time-out": (nothing, World(rules(), retries=True)),
    "nothing is written down before the call": (row(Restarted, forgets_release), World(rules())),
    "an intention found at a restart is taken for unsent": (
        row(Restarted, takes_intention_for_unsent),
        World(rules()),
    ),
    "an unknown outcome is taken for a refusal": (
        row(Answered, takes_doubt_for(AnswerKind.NOT_SENT)),
        World(rules()),
    ),
    "it reconciles at once": (nothing, World(rules(0), stale=0)),
    "it waits once for what may take one quarantine twice": (
        nothing,
        World(rules(1), late=2, stale=2),
    ),
    "it waits for the call and not for the reading": (nothing, World(rules(1), late=0, stale=4)),
    "it waits for the reading and not for the call": (nothing, World(rules(1), late=4, stale=0)),
    "another release goes out beside the one in doubt": (
        piece("_guard", sees_nothing_open),
        World(rules()),
    ),
    "what is in doubt is not held": (
        together(piece("_guard", sees_nothing_open), holds_nothing),
        World(rules()),
    ),
    "the amount comes from memory and not from a reading": (
        together(piece("_guard", wants_no_reading), pays_by_memory),
        BACKUP,
    ),
    "one sighting makes a void": (
        piece("_absent", is_content_with_one_sighting),
        World(rules(voids=2), ancient_max=1),
    ),
    "a refused repetition is taken for a refusal of the first call": (
        piece("_was_in_doubt", always(answer=False)),
        HONOURED,
    ),
    "a resume accepts a reading that may be old": (
        piece("_low_for_long", always(answer=True)),
        PERSON,
    ),
    "a resume forgets the release in doubt": (row(Resume, forgets_release), PERSON),
}
TRACE_MAX = 20


@pytest.mark.parametrize("name", WEAK)
def test_model_finds_the_overpayment_in_each_weaker_protocol(name, monkeypatch):
    """A model that could not find these would prove nothing."""
    plant, world = WEAK[name]
    plant(monkeypatch)
    found = Explorer(world).run(stop=True)
    print(f"overpaid in {len(found.trace)} steps: {', '.join(found.trace)}")

    assert found.overpaid > 0, found
    assert 0 < len(found.trace) <= TRACE_MAX


@pytest.mark.parametrize("voids", [0, 1, 2])
def test_table_overpays_by_one_amount_for_each_void_of_a_day_where_calls_break_their_word(voids):
    """The limit of voids a day is what bounds the damage; it is 1 unless somebody asks for more."""
    found = explore(World(rules(1, voids=voids), used_max=1, late=6, stale=2, total=4))

    assert voids == found.overpaid, found


LOSING: dict[str, tuple[Plant, World]] = {
    "an agreement that closes does not wait for its last release": (
        row(Closing, closes_at_once),
        World(rules(voids=1), used_max=1, total=1, closing=True),
    ),
    "a release that is absent is never given up": (
        piece("_absent", never_gives_up),
        World(rules(voids=1), used_max=1, total=1, closing=True),
    ),
}


@pytest.mark.parametrize("name", LOSING)
def test_model_finds_what_is_never_paid_in_each_protocol_that_loses_money(name, monkeypatch):
    """Paying nothing would never overpay: the search for dead ends must find that too."""
    plant, world = LOSING[name]
    plant(monkeypatch)
    found = explore(world)

    assert found.closed_short + found.stuck > 0, found
