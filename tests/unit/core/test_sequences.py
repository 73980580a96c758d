"""Producers' numbers: seen only what was counted, and missing only what surely never was."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meterd.core.changes import ProducerRow
from meterd.core.events import UsageEvent
from meterd.core.sequences import (
    AHEAD_MS,
    GAPS_MAX,
    OVERTAKEN_MS,
    PRODUCERS_MAX,
    Known,
    Sequences,
    number_of,
    take_numbers,
    time_of,
)

T0 = 1_795_435_200_000
MIN = 60_000
HOUR = 60 * MIN


class Books:
    """Sequences, and one producer that sends a number a minute."""

    def __init__(self, rows=(), **limits):
        self.sequences = Sequences(rows, **limits)
        self.noted = None

    def count(self, *numbers, source="p", at=None, fresh=True, wall=T0):
        """One batch. A number's own time is its minute."""
        events = [(number, T0 + number * MIN if at is None else at, fresh) for number in numbers]
        self.noted = self.sequences.note({source: events}, wall)
        return self

    @property
    def it(self):
        """The producer."""
        return self.sequences.producer("p")

    @property
    def runs(self):
        """Its intervals."""
        return list(zip(self.it.firsts, self.it.lasts, strict=True))

    def judge(self, number, at=None, source="p"):
        """What is known of a late event."""
        return self.sequences.judge(source, number, T0 + number * MIN if at is None else at)


def sums(books):
    """What is missing in all, of how many producers, and what was given up."""
    sequences = books.sequences
    return sequences.missing, sequences.incomplete, sequences.given_up


# -- Reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (0, 0),
        (7, 7),
        (10**18 - 1, 10**18 - 1),
        (10**18, None),
        (-1, None),
        ("0", 0),
        ("0007", 7),
        ("9" * 18, 10**18 - 1),
        ("0" * 17 + "1", 1),
        ("1" * 19, None),
        ("-1", None),
        ("1.0", None),
        ("", None),
        ("seven", None),
        ("²", None),
        ("٣", None),
        (" 1", None),
    ],
)
def test_number_is_a_whole_number_of_18_digits_at_most(said, number):
    """What is no such number carries no gap detection, and is no mistake."""
    assert number == number_of(said)


def test_numbers_are_taken_out_of_a_batch_by_place():
    """A number is no part of the content: what is left is the same with it and without it."""
    events = [UsageEvent(sequence=said) for said in ("", 7, "008", "abc", "")]

    assert {1: 7, 2: 8} == take_numbers(events)
    assert [""] * 5 == [event.sequence for event in events]


def test_batch_without_numbers_is_left_alone():
    """Most have none."""

    class Plain(UsageEvent):
        def __setattr__(self, name, value):
            raise AssertionError(f"{name} was written for nothing")

    assert {} == take_numbers([Plain(), Plain()])
    assert {} == take_numbers([])


def test_time_of_an_event_is_in_whole_milliseconds():
    """An event without a time has none."""
    moment = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=T0 + 5, microseconds=999)

    assert T0 + 5 == time_of(UsageEvent(time=moment))
    assert time_of(UsageEvent()) is None


# -- Gaps ----------------------------------------------------------------------------------------


def test_numbers_without_loss_are_one_interval_whatever_the_batches():
    """Two integers for ever."""
    books = Books().count(1, 2, 3).count(4).count(5, 6)

    assert [(1, 6)] == books.runs
    assert (0, 0, 0) == sums(books)
    assert 6 == books.it.last
    assert T0 + 6 * MIN == books.it.latest


def test_order_inside_a_batch_opens_no_gap():
    """A batch is looked at as a whole."""
    books = Books().count(1).count(4, 2, 3)

    assert [(1, 4)] == books.runs
    assert 0 == books.it.missing


def test_what_is_missing_shows_until_it_comes():
    """By range, with the moment when it was missed first."""
    books = Books().count(1, 2, wall=T0 + 1).count(5, wall=T0 + 2).count(9, 10, wall=T0 + 3)

    assert [(3, 4), (6, 8)] == list(books.it.gaps())
    assert (5, 1, 0) == sums(books)
    assert T0 + 2 == books.it.missing_since

    books.count(7, wall=T0 + 4)
    assert [(3, 4), (6, 6), (8, 8)] == list(books.it.gaps())
    assert (4, 1, 0) == sums(books)
    assert T0 + 2 == books.it.missing_since

    books.count(8).count(6).count(3).count(4)
    assert [(1, 10)] == books.runs
    assert (0, 0, 0) == sums(books)
    assert 0 == books.it.missing_since


def test_gap_is_filled_from_both_ends_and_in_the_middle():
    """An interval grows down, grows up, or stands alone."""
    books = Books().count(1).count(10)
    books.count(9)
    assert [(1, 1), (9, 10)] == books.runs
    books.count(2)
    assert [(1, 2), (9, 10)] == books.runs
    books.count(5)
    assert [(1, 2), (5, 5), (9, 10)] == books.runs
    books.count(4).count(6)
    assert [(1, 2), (4, 6), (9, 10)] == books.runs
    assert (3, 1, 0) == sums(books)


def test_what_comes_again_changes_nothing():
    """Duplicates are counted elsewhere; here they are known."""
    books = Books().count(1, 2, 3).count(2, 3, fresh=False).count(1, fresh=False, wall=T0 + 9)

    assert [(1, 3)] == books.runs
    assert books.it.exact
    assert 1 == books.it.run
    assert [] == books.noted.began


def test_new_event_and_its_copy_in_one_batch_are_no_new_beginning():
    """Whatever order they stand in."""
    books = Books().count(1)
    events = [(2, T0 + 2 * MIN, True), (2, T0 + 2 * MIN, False), (3, T0 + 3 * MIN, True)]
    noted = books.sequences.note({"p": events}, T0)

    assert [(1, 3)] == books.runs
    assert [] == noted.began


def test_two_new_events_of_one_number_in_one_batch_show_that_it_is_used_twice():
    """As they do in two batches."""
    books = Books().count(1).count(3, 3)

    assert (2, False, [(3, 3)]) == (books.it.run, books.it.exact, books.runs)


def test_duplicate_with_a_number_that_was_not_seen_is_counted():
    """A producer may send an event again under a new number: then nothing is missing."""
    books = Books().count(1, 2).count(3, fresh=False).count(4)

    assert [(1, 4)] == books.runs


def test_producer_is_met_by_a_new_event_alone():
    """What comes again was counted when its producer was not known, or was forgotten."""
    books = Books().count(7, fresh=False)

    assert books.it is None
    assert {} == books.noted.rows
    assert 0 == len(books.sequences)

    events = [(7, T0, False), (9, T0 + 9, True), (10, T0 + 10, True), (8, T0 + 8, False)]
    books.sequences.note({"p": events}, T0)
    assert [(9, 10)] == books.runs
    assert 1 == len(books.sequences)


def test_producer_that_is_met_begins_with_the_earliest_of_the_batch():
    """Of equal times, with the lowest number."""
    assert [(4, 5)] == Books().count(5, 4).runs
    assert [(4, 6)] == Books().count(6, 4, 5, at=T0).runs
    books = Books()
    books.sequences.note({"p": [(3, T0 + 9, True), (4, T0, True), (5, T0, True)]}, T0)
    assert [(4, 5)] == books.runs
    books = Books().count(6, 3, wall=T0 + 5)
    assert [(3, 3), (6, 6)] == books.runs
    assert (2, 1, 0) == sums(books)
    assert T0 + 5 == books.it.missing_since


def test_number_below_the_first_is_not_noted():
    """Whether those between were counted nobody knows: nothing is claimed of them."""
    books = Books().count(7, 8).count(4)

    assert [(7, 8)] == books.runs
    assert 0 == books.it.missing
    assert 1 == books.it.run


def test_producers_are_counted_each_for_itself():
    """A producer is what an event calls its source."""
    books = Books().count(1, 2).count(1, 4, source="a").count(6, source="a")

    assert ["a", "p"] == [one.source for one in books.sequences.producers()]
    assert (3, 1, 0) == sums(books)
    assert [(1, 1), (4, 4), (6, 6)] == list(books.noted.rows["a"].intervals)
    books.count(4)
    assert (4, 2, 0) == sums(books)
    assert books.sequences.producer("nobody") is None


def test_several_producers_of_one_batch_are_noted_together():
    """One call for each batch."""
    books = Books()
    noted = books.sequences.note({"a": [(1, T0, True)], "b": [(2, T0, True)]}, T0)

    assert {"a", "b"} == set(noted.rows)
    assert [(2, 2)] == list(noted.rows["b"].intervals)


# -- Beyond the window -----------------------------------------------------------------------------


def test_late_event_is_seen_missing_or_new_by_its_number():
    """Seen: counted before. In a gap, or above all: never counted."""
    books = Books().count(5, 6).count(9)

    assert [Known.SEEN] * 3 == [books.judge(number) for number in (5, 6, 9)]
    assert [Known.MISSING] * 4 == [books.judge(number) for number in (7, 8, 10, 400)]


def test_late_event_below_the_first_number_is_unknown():
    """It may have been counted before anybody looked at numbers."""
    books = Books().count(5, 6)

    assert Known.UNKNOWN is books.judge(4, at=T0 + 5 * MIN)
    assert Known.UNKNOWN is books.judge(5, source="nobody")


def test_late_event_from_before_the_run_is_unknown():
    """By its time it is of a numbering before."""
    books = Books().count(5, 6)

    assert Known.UNKNOWN is books.judge(5, at=T0 + 5 * MIN - 1)
    assert Known.UNKNOWN is books.judge(7, at=T0 + 5 * MIN - 1)
    assert Known.SEEN is books.judge(5, at=T0 + 5 * MIN)
    assert Known.MISSING is books.judge(7, at=T0 + 5 * MIN)


def test_seen_number_with_a_time_after_all_that_was_counted_is_unknown():
    """It is of a numbering that nobody has seen: taking it for a duplicate would lose it."""
    books = Books().count(1, 2, 3)

    assert Known.SEEN is books.judge(2, at=T0 + 3 * MIN)
    assert Known.UNKNOWN is books.judge(2, at=T0 + 3 * MIN + 1)
    assert Known.MISSING is books.judge(4, at=T0 + 9 * MIN)


def test_newest_event_is_the_newest_in_whatever_order_they_come():
    """A straggler does not take the time back, neither alone nor in a batch."""
    books = Books().count(1, 2, 9).count(4)
    assert T0 + 9 * MIN == books.it.latest
    books.count(10, at=T0)
    assert T0 + 9 * MIN == books.it.latest
    books.count(13, 12)
    assert T0 + 13 * MIN == books.it.latest
    books.count(11, at=T0 + 50 * MIN)
    assert T0 + 50 * MIN == books.it.latest


# -- Numbers that begin anew -----------------------------------------------------------------------


def later(books, *numbers, hours=1, **more):
    """Events of the next numbering, so many hours after the one before."""
    for number in numbers:
        books.count(number, at=T0 + hours * HOUR + number * MIN, **more)
    return books


@pytest.mark.parametrize("first", [0, 1])
def test_producer_that_begins_anew_has_a_new_run_and_the_old_gaps_are_given_up(first):
    """From then on the numbers of the new run are meant."""
    books = later(Books().count(0, 1, 2).count(5), first)

    assert (2, True, [(first, first)]) == (books.it.run, books.it.exact, books.runs)
    assert ["p"] == books.noted.began
    assert [] == books.noted.blurred
    assert (0, 0, 2) == sums(books)
    assert 2 == books.it.given_up
    assert 0 == books.it.missing_since
    books = later(books.count(9, at=T0 + HOUR + 9 * MIN), first, hours=2)
    assert 2 + 8 - first == books.it.given_up
    books = later(Books().count(0, 1, 2).count(5), first)
    begun = T0 + HOUR + first * MIN
    assert (begun, begun) == (books.it.since, books.it.latest)
    assert Known.UNKNOWN is books.judge(5)
    assert Known.SEEN is books.judge(first, at=begun)
    assert Known.MISSING is books.judge(5, at=T0 + HOUR + 5 * MIN)
    later(books, first + 1)
    assert [(first, first + 1)] == books.runs
    assert 2 == books.it.run


def test_producer_first_heard_in_the_middle_begins_anew_with_1_below_its_first_number():
    """The time shows it: an event that was only overtaken is older than the newest."""
    books = Books().count(7, 8).count(1)
    assert (1, [(7, 8)]) == (books.it.run, books.runs)

    later(books, 1)
    assert (2, True, [(1, 1)]) == (books.it.run, books.it.exact, books.runs)

    books = later(Books().count(7, 8), 2)
    assert (1, [(7, 8)]) == (books.it.run, books.runs)


def test_lower_number_of_the_time_of_the_newest_begins_nothing():
    """Younger it must be."""
    books = Books().count(7, 8).count(1, at=T0 + 8 * MIN)

    assert 1 == books.it.run


def test_number_in_a_gap_begins_nothing():
    """Neither 1 after 0 and 2, nor any other."""
    books = Books().count(0, 2)
    books.count(1, at=T0 + HOUR)

    assert (1, [(0, 2)]) == (books.it.run, books.runs)


@pytest.mark.parametrize("number", [2, 3])
def test_run_that_begins_in_the_middle_decides_nothing_about_late_events(number):
    """Two producers of one name, or a beginning that was overtaken: gaps show, nothing more."""
    books = later(Books().count(1, 2, 3), number)

    assert (2, False, [(number, number)]) == (books.it.run, books.it.exact, books.runs)
    assert ["p"] == books.noted.blurred
    later(books, 6)
    assert 5 - number == books.it.missing
    at = T0 + HOUR + 6 * MIN
    assert [Known.UNKNOWN] * 3 == [books.judge(other, at=at) for other in (number, 5, 9)]


def test_new_1_that_is_no_younger_than_the_newest_blurs_the_run():
    """It may be of another producer of this name."""
    books = Books().count(1, 2, 3)
    books.count(1, at=T0 + 3 * MIN)

    assert (2, False) == (books.it.run, books.it.exact)
    assert T0 + 3 * MIN == books.it.since


def test_blurred_run_begins_at_the_newest_event_and_is_told_once():
    """Nothing that is older is of it; a second blur is no news."""
    books = Books().count(1, 2, 9)
    books.count(2, at=T0 + 8 * MIN)
    assert (T0 + 9 * MIN, T0 + 9 * MIN) == (books.it.since, books.it.latest)
    assert ["p"] == books.noted.blurred

    books.count(2, at=T0 + 10 * MIN)
    assert ["p"] == books.noted.began
    assert [] == books.noted.blurred
    assert 3 == books.it.run


def test_clear_beginning_makes_a_blurred_producer_exact_again():
    """A 1 after everything else."""
    books = later(later(Books().count(1, 2, 3), 2), 1, 2, hours=2)

    assert (3, True, [(1, 2)]) == (books.it.run, books.it.exact, books.runs)


def test_stragglers_of_the_numbering_before_are_left_out_of_the_new_one():
    """They open no gap, fill none and begin nothing, new or known."""
    books = later(Books().count(1, 2).count(50), 1, 2, 3)
    for fresh in (True, False):
        for number in (2, 7, 40):
            books.count(number, fresh=fresh, at=T0 + number)
    books.count(30, 31)

    assert (2, [(1, 3)]) == (books.it.run, books.runs)
    assert T0 + HOUR + 3 * MIN == books.it.latest


def test_straggler_from_before_the_first_event_of_the_first_run_begins_nothing():
    """A numbering that nobody has seen came before; numbers that were not seen are counted."""
    books = Books().count(1, at=T0).count(2, 3)
    books.count(2, at=T0 - HOUR)
    assert (1, [(1, 3)]) == (books.it.run, books.runs)

    books.count(4, at=T0 - HOUR)
    assert [(1, 4)] == books.runs
    books.count(6, at=T0 - HOUR).count(5, at=T0 - HOUR)
    assert [(1, 6)] == books.runs


@pytest.mark.parametrize(
    ("early", "runs"),
    [(OVERTAKEN_MS, [(1, 2)]), (OVERTAKEN_MS + 1, [(1, 1)])],
)
def test_first_event_of_a_run_may_be_overtaken_by_a_second(early, runs):
    """Threads take number and time one after the other; what is older is of the run before."""
    books = later(Books().count(1, 2, 3), 1)
    books.count(2, at=books.it.since - early)

    assert runs == books.runs


def test_event_that_comes_again_belongs_to_the_run_of_its_own_time():
    """However short before the new beginning it was made: it is one of the old numbering's."""
    books = later(Books().count(1, 2, 3), 1)
    since = books.it.since
    books.count(2, fresh=False, at=since - 1).count(3, fresh=False, at=since)
    assert [(1, 1), (3, 3)] == books.runs

    books = later(Books().count(1, 2, 3), 1)
    books.sequences.note({"p": [(3, since - 1, False), (2, since, True)]}, T0)
    assert [(1, 2)] == books.runs


@pytest.mark.parametrize(
    ("early", "runs"),
    [(OVERTAKEN_MS, [(1, 3)]), (OVERTAKEN_MS + 1, [(1, 1), (3, 3)])],
)
def test_batch_with_a_straggler_is_looked_at_one_by_one(early, runs):
    """The earliest of a batch decides that."""
    books = later(Books().count(1, 2, 3), 1)
    since = books.it.since
    books.sequences.note({"p": [(3, since + MIN, True), (2, since - early, True)]}, T0)

    assert runs == books.runs


def test_end_and_beginning_in_one_batch_are_told_apart_by_time():
    """Whatever order they stand in."""
    books = Books().count(1, 2)
    old = [(number, T0 + number * MIN, True) for number in (3, 4)]
    new = [(number, T0 + HOUR + number * MIN, True) for number in (2, 1)]
    noted = books.sequences.note({"p": new + old}, T0)

    assert (2, True, [(1, 2)]) == (books.it.run, books.it.exact, books.runs)
    assert ["p"] == noted.began


def test_events_of_one_moment_are_counted_in_the_order_in_which_they_came():
    """Those without a time of their own have that of their arrival."""
    books = Books().count(1, 2)
    books.count(3, 4, 1, 2, at=T0 + HOUR)

    assert (2, [(1, 2)]) == (books.it.run, books.runs)


# -- Limits ----------------------------------------------------------------------------------------


def test_lowest_gap_is_given_up_beyond_the_limit():
    """Visibly: what lies below is unknown from then on, and counted as given up."""
    books = Books(gaps_max=2).count(1).count(4).count(6)
    assert (3, 1, 0) == sums(books)

    books.count(9)
    assert [(4, 4), (6, 6), (9, 9)] == books.runs
    assert (3, 1, 2) == sums(books)
    assert (3, 2) == (books.it.missing, books.it.given_up)
    assert [Known.UNKNOWN] * 3 == [books.judge(number) for number in (1, 2, 3)]
    assert Known.MISSING is books.judge(5)
    books.count(3)
    assert (3, 1, 2) == sums(books)

    books.count(11, 13, 15)
    assert [(11, 11), (13, 13), (15, 15)] == books.runs
    assert (2, 1, 6) == sums(books)


def test_producer_that_is_met_with_many_gaps_keeps_the_highest():
    """The limit holds from the first batch on."""
    books = Books(gaps_max=1).count(1, 3, 6)

    assert [(3, 3), (6, 6)] == books.runs
    assert (2, 1, 1) == sums(books)


def test_limits_are_a_thousand_gaps_and_ten_thousand_producers():
    """A row stays below 40 KiB, all of them in memory below what the daemon needs anyway."""
    books = Books().count(*range(0, 2 * GAPS_MAX + 4, 2))
    assert (1000, 1000) == (GAPS_MAX, books.it.missing)
    assert 1 == books.sequences.given_up

    assert 10_000 == PRODUCERS_MAX
    books = Books()
    books.sequences.note({f"p{n}": [(1, T0, True)] for n in range(PRODUCERS_MAX + 1)}, T0)
    assert 10_000 == len(books.sequences)
    assert books.sequences.producer("p0") is None


def test_producer_that_was_silent_for_longest_is_forgotten():
    """With what was missing of it, which is given up; and no earlier time is believed any more."""
    books = Books(producers_max=2).count(1, 4, source="a").count(1, source="b").count(6, source="a")
    assert books.noted.numbers_from is None
    books.count(1, 3, source="c", wall=T0 + 7)

    assert {"b": None} == {name: row for name, row in books.noted.rows.items() if row is None}
    assert ("b",) == books.noted.gone
    assert ["c"] == [row.source for row in books.noted.kept]
    assert T0 + 7 + AHEAD_MS == books.noted.numbers_from
    assert ["a", "c"] == [one.source for one in books.sequences.producers()]
    assert (4, 2, 0) == sums(books)

    books.count(1, source="d", wall=T0 + 6)
    assert T0 + 7 + AHEAD_MS == books.noted.numbers_from  # The clock was put back.
    assert {"a", "d"} == set(books.noted.rows)
    assert (1, 1, 3) == sums(books)

    books = Books(producers_max=1).count(1, 3, source="a").count(1, source="b")
    assert (0, 0, 1) == sums(books)


def test_batch_of_more_producers_than_there_may_be_leaves_rows_of_those_that_stay():
    """One that is met and forgotten in one batch is gone."""
    books = Books(producers_max=2)
    noted = books.sequences.note({name: [(1, T0, True)] for name in "abcd"}, T0)

    assert {"a": None, "b": None} == {name: noted.rows[name] for name in "ab"}
    assert {"c", "d"} == {name for name, row in noted.rows.items() if row is not None}


def test_producer_that_is_met_after_one_was_forgotten_is_not_believed_for_what_was_before():
    """It may be the one that was forgotten, whose numbers are known no more."""
    books = Books(producers_max=1).count(1, source="p").count(1, source="a", wall=T0 + 9)
    from_now = T0 + 9 + AHEAD_MS
    books.count(5)

    assert from_now == books.it.since
    assert Known.UNKNOWN is books.judge(6, at=from_now - 1)
    assert Known.MISSING is books.judge(6, at=from_now)

    later(books.count(1, source="b", wall=T0), 7)
    assert T0 + HOUR + 7 * MIN == books.it.since


def test_numbers_that_were_counted_before_there_was_a_memory_of_them_are_unknown():
    """A store that an older meterd has filled says until when that was."""
    books = Books()
    books.sequences = Sequences(numbers_from=T0 + HOUR)
    books.count(5, 6)

    assert T0 + HOUR == books.it.since
    assert Known.UNKNOWN is books.judge(7)
    assert Known.MISSING is books.judge(70)
    assert 0 == Books().count(1, at=0).it.since


def test_person_gives_up_what_is_missing():
    """The run goes on from its last interval; a second time there is nothing to give up."""
    books = Books().count(1).count(4, 5).count(9)
    row = books.sequences.give_up("p")

    assert ((9, 9),) == row.intervals
    assert (5, 0) == (row.given_up, row.missing_since)
    assert (0, 0, 5) == sums(books)
    assert 0 == books.it.missing_since
    assert books.sequences.give_up("p") is None
    assert books.sequences.give_up("nobody") is None


def test_person_throws_away_what_is_missing():
    """Nobody waits for that one event any more; above the last number nobody waits for one."""
    books = Books().count(1).count(4)
    row = books.sequences.discard("p", 3, T0 + 3 * MIN, T0)

    assert ((1, 1), (3, 4)) == row.intervals
    assert (1, 1, 0) == sums(books)
    assert books.sequences.discard("p", 5, T0 + 5 * MIN, T0) is None
    assert books.sequences.discard("nobody", 2, T0, T0) is None
    assert 0 == books.sequences.discard("p", 2, T0 + 2 * MIN, T0 + 1).missing_since
    assert [(1, 4)] == books.runs
    assert ((1, 4),) == books.sequences.discard("p", 4, T0 + 4 * MIN, T0).intervals

    books.count(6)
    assert ((1, 6),) == books.sequences.discard("p", 5, T0 - HOUR, T0).intervals
    later(books, 1, 3)
    assert books.sequences.discard("p", 2, books.it.since - 1, T0) is None
    assert books.sequences.discard("p", 2, T0 + 2 * MIN, T0) is None
    assert [(1, 1), (3, 3)] == books.runs


def test_producer_is_exact_until_its_numbers_are_used_twice():
    """Nobody who is not known is."""
    books = Books().count(1, 2)
    assert books.sequences.is_exact("p")
    assert not books.sequences.is_exact("nobody")
    assert not books.count(2, at=T0 + HOUR).sequences.is_exact("p")


# -- Storing ---------------------------------------------------------------------------------------


def test_producers_are_restored_as_they_were_stored():
    """The sums follow from the rows, and the one that was silent for longest comes first."""
    row = ProducerRow("p", 3, ((1, 4), (7, 7)), T0, T0 + 9, False, T0 + 2, 11)
    other = ProducerRow("a", 1, ((1, 1),), T0, T0 + 10, True, 0, 0)
    books = Books([other, row], producers_max=2)

    assert row == books.it.row
    assert (2, 1, 11) == sums(books)
    assert (2, 7) == (books.it.missing, books.it.last)
    books.count(1, source="new")
    assert books.it is None
    assert (0, 0, 13) == sums(books)
    assert other == books.sequences.producer("a").row


def test_row_is_what_was_noted():
    """The bookkeeper stores it in the commit of the usage."""
    books = Books().count(1, 2, wall=T0 + 1).count(4, wall=T0 + 2)
    since, latest = T0 + MIN, T0 + 4 * MIN

    row = ProducerRow("p", 1, ((1, 2), (4, 4)), since, latest, True, T0 + 2, 0)
    assert {"p": row} == books.noted.rows
    assert ((row,), ()) == (books.noted.kept, books.noted.gone)
    assert row == books.it.row


# -- Any order -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.permutations(range(1, 25)).map(list),
    st.lists(st.integers(1, 24), max_size=20),
    st.randoms(use_true_random=False),
)
def test_any_order_any_duplication_and_any_batches_leave_what_a_set_would(order, again, rng):
    """As long as nothing begins anew, intervals are a set of numbers from the first one on."""
    books, seen, known = Books(), set(), set()
    deliveries = [(number, True) for number in order]
    while deliveries:
        size = rng.randint(1, 5)
        batch, deliveries = deliveries[:size], deliveries[size:]
        events = [(number, T0 + number * MIN, fresh) for number, fresh in batch]
        for _ in range(rng.randint(0, 2) if seen and again else 0):
            number = again.pop() if again else 1
            if number in seen:
                events.append((number, T0 + number * MIN, False))
        seen |= {number for number, _ in batch}
        books.sequences.note({"p": events}, T0)
        known = {n for first, last in books.runs for n in range(first, last + 1)}
        floor = min(known)
        assert {number for number in seen if number >= floor} == known
        assert books.it.missing == books.it.last - floor + 1 - len(known)

    assert [(min(known), 24)] == books.runs
    assert 1 == books.it.run


class Life(RuleBasedStateMachine):
    """A producer, a way with any order, any delay and any repetition, and a memory of identities.

    What is counted is counted once, whatever happens. Nothing is taken for known that was not
    counted, as long as each numbering's first event comes first and in time.
    """

    window = 60 * MIN
    prompt = True  # The first event of each numbering comes at once.
    limits: dict[str, int] = {}  # noqa: RUF012  # Of the machine, not of its runs.

    def __init__(self):
        super().__init__()
        self.sequences = Sequences(**self.limits)
        self.now = T0
        self.number = 0
        self.sent = []  # (run, number, at)
        self.run = 1
        self.counted = set()
        self.late = set()  # Kept for a person.

    @rule(number=st.integers(1, 3), wait=st.sampled_from([1, MIN, 20 * MIN]))
    def send(self, number, wait):
        """The producer sends some events."""
        for _ in range(number):
            self.now += wait
            self.number += 1
            self.sent.append((self.run, self.number, self.now))
        if self.prompt and self.number == number:
            self._deliver([self.sent[-number]])

    @rule(wait=st.sampled_from([1, MIN, 2 * 60 * MIN]))
    def begin_anew(self, wait):
        """The producer forgets its number."""
        if self.number:
            self.now += wait
            self.run += 1
            self.number = 0

    @rule(wait=st.sampled_from([MIN, 30 * MIN, 2 * 60 * MIN, 24 * 60 * MIN]))
    def wait(self, wait):
        """Time passes."""
        self.now += wait

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def arrive(self, data):
        """A batch of whatever was sent, new or again."""
        self._deliver(data.draw(st.lists(st.sampled_from(self.sent), min_size=1, max_size=6)))

    @precondition(lambda self: self.sent)
    @rule()
    def restart(self):
        """The daemon comes back from its rows."""
        rows = [producer.row for producer in self.sequences.producers()]
        from_then = self.sequences._numbers_from
        self.sequences = Sequences(rows, from_then, **self.limits)

    def _deliver(self, events):
        batch, new = [], set()
        for event in events:
            _, number, at = event
            if at >= self.now - self.window:
                fresh = event not in self.counted | new
            else:
                known = self.sequences.judge("p", number, at)
                if event in self.counted and event not in new:
                    assert known is not Known.MISSING, f"{event} would be counted twice"
                elif event not in new:
                    assert known is not Known.SEEN or not self.prompt, f"{event} would be lost"
                fresh = known is Known.MISSING and number not in {other for _, other, _ in new}
                if not fresh:
                    self.late |= {event}
                    continue
            if fresh:
                new |= {event}
            batch.append((number, at, fresh))
        if batch:
            self.sequences.note({"p": batch}, self.now)
        self.counted |= new

    @invariant()
    def sums_agree(self):
        """The sums are those of the intervals."""
        producer = self.sequences.producer("p")
        if producer is not None:
            gaps = list(producer.gaps())
            assert all(first <= last for first, last in gaps)
            assert sum(last - first + 1 for first, last in gaps) == producer.missing
            assert producer.missing == self.sequences.missing
            assert (producer.missing > 0) == self.sequences.incomplete
            assert (producer.missing > 0) == (producer.missing_since > 0)
            assert producer.given_up == self.sequences.given_up


class Unordered(Life):
    """The first event of a numbering may come at any time, or never."""

    prompt = False


class Bounded(Unordered):
    """Few gaps are remembered."""

    limits = {"gaps_max": 1}  # noqa: RUF012


TestLife = Life.TestCase
TestUnordered = Unordered.TestCase
TestBounded = Bounded.TestCase
for case in (TestLife, TestUnordered, TestBounded):
    case.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
