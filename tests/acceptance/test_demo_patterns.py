"""`meterd demo`: the seven examples, and all customers together, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meterd import config
from meterd.core.plans import Pattern

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "config"
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


def meterd(*words: str, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    """Type a command as somebody does whose own meterd is configured by the environment."""
    own = {"METERD_ESCROW__BASE_URL": "http://127.0.0.1:1/api/v1", "METERD_LOG__LEVEL": "error"}
    return subprocess.run(
        [sys.executable, "-m", "meterd", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **own, "COLUMNS": "120"},
        timeout=seconds,
        check=False,
    )


@each_pattern
def test_person_who_plays_a_pattern_sees_its_life_and_a_difference_of_0(pattern: str) -> None:
    """The example as it is shipped runs to its end, and four accounts agree."""
    done = meterd("demo", "--pattern", pattern, "--seconds", "5", seconds=100)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Difference 0: paid is exactly what was used."
    assert [text for text in SEEN[pattern] if text not in done.stdout] == []


def test_person_who_watches_the_whole_demo_through_crashes_sees_all_accounts_agree() -> None:
    """All seven patterns over six transports, while the daemon is killed, end with 0."""
    words = ("demo", "--crash", "--seconds", "10", "--no-browser")
    done = meterd(*words, seconds=200)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees") == 13
    assert done.stdout.splitlines()[-1] == "Difference 0: paid is exactly what was used."


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
