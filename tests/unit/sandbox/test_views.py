"""What readers are shown: the present, a lagging state, or one of the past."""

from __future__ import annotations

import pytest

from meterd.sandbox.faults import Faults, Phase, Rule
from meterd.sandbox.views import PAST_MAX, Views


def rule(kind: str, **told: object) -> Rule:
    made = Faults().add({"kind": kind, **told})
    assert made.sort.phase is Phase.VIEW
    return made


@pytest.fixture
def views() -> Views[str]:
    made: Views[str] = Views()
    made.keep("e", "first", 1000, wanted=True)
    made.keep("e", "second", 2000, wanted=True)
    return made


def test_reader_without_a_fault_sees_the_present(views):
    """The past is kept, and nobody looks at it."""
    assert views.shown("e", "third", None, 2500) == "third"


def test_reader_sees_what_was_true_so_many_seconds_ago(views):
    """Each state until its own end, then the next."""
    rows = [(2500, "second"), (1999, "first"), (4000, "third")]

    for now_ms, state in rows:
        assert views.shown("e", "third", rule("stale_reads", seconds=1), now_ms) == state


def test_reader_sees_the_state_before_once(views):
    """A replica that is one write behind."""
    assert views.shown("e", "third", rule("backwards_read"), 9999) == "second"


def test_state_that_hides_the_present_does_so_until_its_end(views):
    """Whatever happens meanwhile; or until everything is shown again."""
    views.hide("e", "second", 5000)
    shown = [views.shown("e", "third", None, now_ms) for now_ms in (4999, 5000)]
    views.hide("e", "second", 5000)
    views.hide_nothing()

    assert [*shown, views.shown("e", "third", None, 1)] == ["second", "third", "third"]


def test_thing_without_a_past_is_shown_as_it_is(views):
    """A fault on it changes nothing."""
    assert views.shown("other", "now", rule("backwards_read"), 1) == "now"


def test_past_is_bounded():
    """Nobody asked for stale readings, so few states are kept."""
    views: Views[int] = Views()
    for number in range(PAST_MAX + 5):
        views.keep("e", number, number, wanted=False)

    assert views.shown("e", -1, rule("stale_reads", seconds=1000), 0) == 5
