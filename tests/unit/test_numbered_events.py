"""Numbered events through the bookkeeper: what is missing shows, and late ones count once."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from meterd.core.accounts import Agreement
from meterd.core.changes import Change
from meterd.core.sequences import AHEAD_MS, PRODUCERS_MAX, Sequences
from meterd.errors import NotFound, Refused
from meterd.sources import Deliveries
from meterd.store.identities import Identities
from tests.fakes import WINDOW_MS, FakeClock, FakeStore, adopt, make_bookkeeper

WINDOW_S = WINDOW_MS // 1000


class Books:
    """A bookkeeper with real identities, and a producer that numbers what it sends."""

    def __init__(self):
        self.clock = FakeClock()
        self.store = FakeStore()
        self.books = make_bookkeeper(
            self.store, clock=self.clock, identities=Identities(entries_max=10_000)
        )
        self.changes = []
        commit = self.store.commit
        self.store.commit = lambda change: (self.changes.append(change), commit(change))[1]
        self.born = self.clock.wall()

    def event(self, number, *, run=0, timed=True, **fields):
        """One delivery. Number `n` of the first run was made `n` seconds after the start."""
        ms = self.born + (run * 10_000 + number) * 1000
        said = {
            "id": f"e{run}-{number}",
            "source": "svc",
            "agreement": "a",
            "meter": "calls",
            "quantity": 1,
            "sequence": str(number),
        }
        if timed:
            said["time"] = (datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms)).isoformat()
        return json.dumps({**said, **fields}).encode()

    def record(self, *payloads):
        """One batch; how many were accepted, known, and why others were not."""
        recorded = self.books.record("s", Deliveries(payloads=list(payloads)))
        reasons = [rejection.reason for rejection in recorded.rejections]
        return recorded.accepted, recorded.duplicates, reasons

    def send(self, *numbers, **fields):
        """The same of numbers."""
        return self.record(*[self.event(number, **fields) for number in numbers])

    async def pass_window(self):
        """Wait until every identity is forgotten."""
        self.clock.advance(2 * WINDOW_S)
        await self.books.tidy()

    @property
    def it(self):
        """What is known of the producer."""
        return self.books.sequences.producer("svc")

    @property
    def events(self):
        """How many were charged."""
        return self.books.ledger.accounts["a"].events


@pytest.fixture
async def world():
    """Books with one agreement."""
    made = Books()
    await made.books.bind(Agreement("a", "stream", "p", (("main", "esc_a"),)), "test")
    await adopt(made.books, made.clock, "esc_a")
    return made


async def test_events_without_a_number_leave_no_trace_of_producers(world):
    """And such as is no number is taken for none."""
    assert (2, 0, []) == world.send(1, 2, sequence="")
    assert (1, 0, []) == world.send(3, sequence="c0ffee")

    assert 0 == len(world.books.sequences)
    assert all(not change.producers for change in world.changes)


async def test_producer_is_written_in_the_commit_of_its_usage(world):
    """So that no kill comes between the two."""
    world.send(1, 2, 4)
    change = world.changes[-1]

    assert 1 == len(change.counters)
    assert (world.it.row,) == change.producers
    assert ((1, 2), (4, 4)) == change.producers[0].intervals


async def test_number_is_no_part_of_the_content(world):
    """An event that comes again with another spelling of it, or another one, is a duplicate."""
    world.send(1, 2)
    assert (0, 3, []) == world.record(
        world.event(1, sequence=1), world.event(1, sequence="001"), world.event(1, sequence="")
    )
    assert (0, 1, []) == world.record(world.event(2, sequence=3))

    assert [(1, 3)] == list(world.it.row.intervals)


async def test_rejected_event_is_missing_until_it_is_tried_again(world):
    """It was not charged, so its number was not seen."""
    world.send(1)
    assert (0, 0, ["unknown_agreement"]) == world.send(2, agreement="b")
    world.send(3)
    assert 1 == world.books.sequences.missing

    await world.books.bind(Agreement("b", "stream", "p", (("main", "esc_b"),)), "test")
    recorded = await world.books.replay(1)
    assert 1 == recorded.accepted
    assert 0 == world.books.sequences.missing
    assert world.it.row == world.changes[-1].producers[0]


async def test_rejected_event_is_missing_until_it_is_thrown_away(world):
    """A person has decided that nobody waits for it, and that is written down with it."""
    world.send(1)
    world.send(2, meter="teapots")
    world.record(b"{")
    world.send(9, meter="teapots", sequence="x")
    world.send(9, meter="teapots")
    world.send(4, meter="teapots", timed=False)
    world.send(5)
    assert 3 == world.books.sequences.missing

    await world.books.discard(1, "ada", "a typing error")
    assert [(3, 4)] == list(world.it.gaps())
    assert (world.it.row,) == world.changes[-1].producers
    assert (1,) == world.changes[-1].dead_letters_gone
    for letter in (2, 3, 4):
        await world.books.discard(letter, "ada", "of no number that is missing")
        assert () == world.changes[-1].producers
    await world.books.discard(5, "ada", "a typing error")
    assert [(3, 3)] == list(world.it.gaps())


async def test_late_event_that_was_counted_is_a_duplicate(world):
    """Long after its identity was forgotten, alone and in a batch."""
    world.send(1, 2, 3)
    await world.pass_window()

    assert (0, 1, []) == world.send(2)
    assert (1, 2, []) == world.send(1, 3, 4)
    assert 4 == world.events


async def test_late_event_that_is_missing_is_charged_once(world):
    """Whenever it comes, and however often."""
    world.send(1, 2, 5)
    await world.pass_window()

    assert (2, 1, []) == world.send(3, 3, 4)
    assert (0, 2, []) == world.send(3, 4)
    assert 0 == world.books.sequences.missing
    await world.pass_window()
    assert (0, 2, []) == world.send(3, 4)
    assert (1, 0, []) == world.send(6)
    assert 6 == world.events


async def test_late_event_is_known_by_its_identity_as_long_as_that_is_remembered(world):
    """With other content it is a conflict."""
    world.send(1, 5)
    await world.pass_window()
    world.send(3)

    assert (0, 0, ["conflict"]) == world.send(3, meter="tokens", quantity=9)


async def test_two_late_events_of_one_number_are_one(world):
    """The number tells which event it is, where the identity is forgotten."""
    world.send(1, 5)
    await world.pass_window()

    assert (1, 1, []) == world.record(world.event(3), world.event(3, id="other"))


async def test_late_event_that_nothing_is_known_of_waits_for_a_person(world):
    """Below the first number, of an unknown producer, without a number, or of an unclear run."""
    world.send(4, 5)
    await world.pass_window()

    assert (0, 0, ["late"] * 4) == world.record(
        world.event(3),
        world.event(4, source="other"),
        world.event(4, sequence=""),
        world.event(4, sequence="four"),
    )
    details = {letter.event_id: letter.detail for letter in world.store.letters.values()}
    assert "is older than the dedupe window, and its number does not tell" in details["e0-3"]

    # A number that comes again, new: the numbers are in use twice.
    assert (1, 0, []) == world.send(5, run=50)
    await world.pass_window()
    assert (0, 0, ["late"]) == world.send(6, run=50)


async def test_late_event_is_refused_for_its_own_faults(world):
    """A number makes nothing good."""
    world.send(1, 5)
    await world.pass_window()

    reasons = ["unknown_meter", "bad_quantity"]
    assert (0, 0, reasons) == world.record(
        world.event(2, meter="teapots"), world.event(3, meter="tokens", quantity="-1")
    )
    assert 3 == world.books.sequences.missing


async def test_late_event_of_a_closed_agreement_is_refused_and_stays_missing(world):
    """Twice in one batch it is refused twice."""
    world.send(1, 5)
    escrow = world.books.ledger.escrows["esc_a"]
    world.books.ledger.put(replace(escrow, status=type(escrow.status)("closed")))
    await world.pass_window()

    assert (0, 0, ["closed", "closed"]) == world.send(3, 3)
    assert (0, 1, []) == world.send(5)


async def test_letter_that_was_counted_meanwhile_is_a_duplicate_when_it_is_tried_again(world):
    """Its identity is forgotten; its number is not."""
    world.send(1)
    world.send(2, agreement="b")
    await world.books.bind(Agreement("b", "stream", "p", (("main", "esc_b"),)), "test")
    world.send(2, agreement="b")
    await world.pass_window()
    recorded = await world.books.replay(1)

    assert (0, 1) == (recorded.accepted, recorded.duplicates)
    assert 1 == world.books.ledger.accounts["b"].events


async def test_letter_that_is_tried_again_is_counted_where_its_number_tells_nothing(world):
    """A person has asked for it; and a second one of the same event is its duplicate."""
    world.send(4, 5)
    await world.pass_window()
    world.send(3)
    world.send(3)

    assert 1 == (await world.books.replay(1)).accepted
    assert 1 == (await world.books.replay(2)).duplicates
    assert [(4, 5)] == list(world.it.row.intervals)


async def test_letter_without_a_time_fills_the_gap_that_it_left(world):
    """It was made before it was received."""
    world.send(1, timed=False)
    world.send(2, timed=False, agreement="b")
    world.clock.advance(60)
    world.send(3, timed=False)
    await world.books.bind(Agreement("b", "stream", "p", (("main", "esc_b"),)), "test")
    await world.books.replay(1)

    assert [(1, 3)] == list(world.it.row.intervals)


async def test_redelivery_without_a_time_is_no_number_of_the_run_that_is_under_way(world):
    """It may be of the run before."""
    world.send(1, 2, 30, timed=False)
    world.clock.advance(60)
    world.send(1, run=1, timed=False)
    assert (0, 1, []) == world.send(30, timed=False)

    assert (2, [(1, 1)]) == (world.it.run, list(world.it.row.intervals))


async def test_producer_that_begins_anew_is_told_of_once(world):
    """And one that uses numbers twice, with the next command."""
    world.clock.advance(20_000)
    with capture_logs() as logs:
        world.send(1, 2)
        world.send(1, 2, run=1)
        world.send(3, run=1)
        assert [("numbers_anew", "svc")] == [(log["action"], log["producer"]) for log in logs]
        assert (2, True) == (world.it.run, world.it.exact)
        for place in range(3):
            world.send(2, id=f"twice {place}", run=1)
    assert (5, False) == (world.it.run, world.it.exact)
    assert ["numbers_anew", "numbers_twice"] == [log["action"] for log in logs]
    assert "meterd producers" == logs[-1]["next"]


async def test_person_gives_up_what_is_missing_of_a_producer(world):
    """With the reason in the journal; only where something is missing."""
    world.send(1, 2, 9)
    await world.books.give_up("svc", "ada", "the broker lost its disk")

    assert (0, 6) == (world.books.sequences.missing, world.books.sequences.given_up)
    assert (world.it.row,) == world.changes[-1].producers
    entry = world.store.entries[-1]
    said = (entry.actor, entry.action, entry.subject, entry.detail)
    assert ("ada", "numbers_given_up", "svc", "6: the broker lost its disk") == said
    with pytest.raises(Refused, match="nothing of svc is missing"):
        await world.books.give_up("svc", "ada", "again")
    with pytest.raises(NotFound, match="meterd producers"):
        await world.books.give_up("other", "ada", "again")


async def test_forgotten_producer_leaves_the_disk_in_the_commit_in_which_it_is_forgotten(world):
    """And nothing is believed of new ones for what was made before."""
    limited = Sequences(producers_max=1)
    world.books.sequences = limited
    world.send(1)
    world.send(1, source="other")
    change = world.changes[-1]

    assert ("svc",) == change.producers_gone
    assert ["other"] == [row.source for row in change.producers]
    assert world.clock.wall() + AHEAD_MS == change.numbers_from
    assert Change().numbers_from is None
    assert PRODUCERS_MAX > 1
