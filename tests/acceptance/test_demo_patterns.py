"""`meterd demo --pattern`: the seven examples, lived through with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from meterd import config
from meterd.core.plans import Pattern
from tests.acceptance.stage import meterd

EXAMPLES = Path(__file__).parents[2] / "config"
each_pattern = pytest.mark.parametrize("pattern", list(Pattern))
# What must be seen of each life, besides its proof.
SEEN = {
    "pay_per_call": ["held 0.007", "accrued 0.006     released 0", "accrued 0.022"],
    "pay_per_token": ["accrued 0.921694", "0.568004", "that event is taken back"],
    "subscription": ["no, the quota is used up", "the first request is allowed", "accrued 20"],
    "milestone": ["under another id: reached", "name = build", "accrued 10"],
    "streaming": ["killed with SIGKILL", "372 x 0.001 = 0.372", "9.628"],
    "performance": ["which earns 0.70 of it", "is rejected: closed", "7.00"],
    "hybrid": ["1270 - 1000 free = 270", "would pass the overage's budget: refused", "2.3"],
}


@each_pattern
def test_person_who_plays_a_pattern_sees_its_life_and_a_difference_of_0(pattern: str) -> None:
    """The example as it is shipped runs to its end, and four accounts agree."""
    done = meterd("demo", "--pattern", pattern, "--seconds", "8", COLUMNS="120")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Difference 0: paid is exactly what was used."
    assert [text for text in SEEN[pattern] if text not in done.stdout] == []


@each_pattern
def test_person_gets_the_example_of_each_pattern_from_an_installed_package(pattern: str) -> None:
    """`meterd config example --pattern` prints config/PATTERN.toml, byte for byte."""
    done = meterd("config", "example", "--pattern", pattern)

    assert done.stdout == (EXAMPLES / f"{pattern}.toml").read_text()
    assert done.stdout == config.example(pattern)


def test_person_who_names_an_unknown_pattern_sees_those_there_are() -> None:
    """Wrong use is 2 and a sentence; so is a crash test of one pattern."""
    unknown = meterd("demo", "--pattern", "lottery")
    crash = meterd("demo", "--pattern", "hybrid", "--crash")

    assert (unknown.returncode, crash.returncode) == (2, 2)
    assert "pay_per_token" in unknown.stderr
    assert "leave out --crash" in crash.stderr
