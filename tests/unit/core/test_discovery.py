from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core.accounts import Agreement
from meterd.core.discovery import Discovery, Doubtful
from meterd.core.openings import Found
from meterd.core.settlement import EscrowStatus
from tests.unit.core.books import NOW, ledger

PATTERNS = [("stream:*", "stream"), ("strict-?", "strict"), ("*", "stream")]
FOUND = Found("esc_9", "stream:1", "ann", "me", 5_000_000, live=True)


def discovery(books=None, patterns=PATTERNS[:2]):
    return Discovery(books or ledger(), patterns, "me")


def placed(found, books=None, listed=()):
    """What becomes of one escrow, as the only candidate of a list."""
    sorter = discovery(books)
    ((candidate, plan),) = sorter.candidates([*listed, found])
    return sorter.place(candidate, plan)


@pytest.mark.parametrize(
    "found",
    [
        replace(FOUND, live=False),
        replace(FOUND, provider="somebody"),
        replace(FOUND, provider=""),
        replace(FOUND, escrow="esc_a"),
        replace(FOUND, memo="streams"),
        replace(FOUND, memo="strict-12"),
    ],
)
def test_what_is_ended_bound_of_others_or_fits_no_pattern_is_left_alone(found):
    """Each of these alone takes an escrow out."""
    assert [] == discovery().candidates([found])


def test_the_first_pattern_that_fits_names_the_plan():
    """Patterns are tried in the order of the file; dots and brackets stand for themselves."""
    sorter = discovery(patterns=PATTERNS)
    memos = ["stream:1", "strict-1", "strict-12", "x"]
    found = [replace(FOUND, escrow=f"e{n}", memo=memo) for n, memo in enumerate(memos)]

    assert ["stream", "strict", "stream", "stream"] == [p for _, p in sorter.candidates(found)]
    assert [] == discovery(patterns=[("a.[bc]*", "stream")]).candidates(
        [replace(FOUND, memo="axb")]
    )


def test_a_star_and_a_question_mark_fit_a_line_break_too():
    """They are any text and any one character: a memo is written by others."""
    found = [replace(FOUND, memo="stream:1\n2"), replace(FOUND, memo="strict-\n", escrow="z")]

    assert ["stream", "strict"] == [plan for _, plan in discovery().candidates(found)]


def test_the_oldest_comes_first():
    """So of two of one payer the older one begins and the younger one continues."""
    young, old = replace(FOUND, created_at=9), replace(FOUND, escrow="esc_z", created_at=8)

    assert [old, young] == [found for found, _ in discovery().candidates([young, old])]


def test_an_escrow_of_an_unknown_payer_begins_an_agreement_with_its_own_id():
    """Its creator is the payer."""
    expected = Agreement("esc_9", "stream", "ann", (("main", "esc_9"),), "api")

    assert expected == placed(FOUND)
    assert replace(expected, payer="") == placed(replace(FOUND, creator=""))


def test_an_escrow_of_the_same_payer_and_plan_continues_the_agreement():
    """By the payer that it was bound with, or by who created its escrow, as the list shows it."""
    expected = (("main", "esc_a"), ("main", "esc_9"))
    listed = replace(FOUND, escrow="esc_a", creator="bob")

    assert expected == placed(replace(FOUND, creator="payer")).escrows
    assert expected == placed(replace(FOUND, creator="bob"), listed=[listed]).escrows


def test_a_new_agreement_is_continued_by_the_next_escrow_of_the_same_list():
    """What the first one has begun is known when the second one is placed, once it is bound."""
    books = ledger()
    sorter = discovery(books)
    second = replace(FOUND, escrow="esc_z", created_at=1)
    (first, plan), (next_one, _) = sorter.candidates([FOUND, second])
    books.bind(sorter.place(first, plan), NOW)

    assert (("main", "esc_9"), ("main", "esc_z")) == sorter.place(next_one, plan).escrows


def test_an_escrow_that_could_continue_two_agreements_is_doubtful():
    """Nothing is guessed; a person is told of five of them at most."""
    books = ledger()
    books.bind(Agreement("c", "stream", "payer", (("main", "esc_c"),)), NOW)

    assert Doubtful("esc_9", "its payer has more than one under stream: a, c") == placed(
        replace(FOUND, creator="payer"), books
    )
    for name in "fdegh":
        books.bind(Agreement(name, "stream", "payer", (("main", f"esc_{name}"),)), NOW)
    many = "its payer has more than one under stream: a, c, d, e, f"
    assert Doubtful("esc_9", many) == placed(replace(FOUND, creator="payer"), books)


def test_a_named_agreement_decides():
    """The word agreement=ID begins an agreement of that id, or continues the one that there is."""
    named = replace(FOUND, memo="stream:1 agreement=a", creator="payer")

    assert (("main", "esc_a"), ("main", "esc_9")) == placed(named).escrows
    begun = Agreement("new", "stream", "payer", (("main", "esc_9"),), "api")
    assert begun == placed(replace(named, memo="stream:1 agreement=new"))


@pytest.mark.parametrize(
    ("memo", "creator", "why"),
    [
        ("stream:1 agreement=a", "ann", "agreement a is not known to be of its payer"),
        ("stream:1 agreement=a", "", "agreement a is not known to be of its payer"),
        ("stream:1 agreement=b", "payer", "agreement b is under plan strict"),
    ],
)
def test_a_named_agreement_of_another_payer_or_plan_is_not_continued(memo, creator, why):
    """A memo is written by the payer: it opens no way into another payer's agreement."""
    assert Doubtful("esc_9", why) == placed(replace(FOUND, memo=memo, creator=creator))


def test_an_agreement_that_is_closing_or_closed_is_not_continued():
    """Named, that is said; by the payer alone, a new one begins."""
    closing, closed = ledger(), ledger()
    closing.close(closing.accounts["a"])
    closed.put(replace(closed.escrows["esc_a"], status=EscrowStatus.CLOSED))
    plain = replace(FOUND, creator="payer")

    for books in (closing, closed):
        named = replace(plain, memo="stream:1 agreement=a")
        assert Doubtful("esc_9", "agreement a is closed") == placed(named, books)
        assert "esc_9" == placed(plain, books).id


def test_an_agreement_without_a_payer_is_continued_by_nobody():
    """An unknown payer is nobody's."""
    books = ledger()
    books.bind(Agreement("d", "stream", "", (("main", "esc_d"),)), NOW)
    named = replace(FOUND, memo="stream:1 agreement=d", creator="ann")

    for one in (named, replace(named, creator="")):
        assert Doubtful("esc_9", "agreement d is not known to be of its payer") == placed(
            one, books
        )
    for creator in ("", "ann"):
        assert "esc_9" == placed(replace(FOUND, creator=creator), books).id
