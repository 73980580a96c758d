"""Tests of the core notice it when the core is wrong: a sample of mutants, in every run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mutation.mutate import FLOOR, listed, mutate, sample, score, stage, told, unlisted

MODULES = ("settlement", "money")
SAMPLE = int(os.environ.get("METERD_MUTANTS", "40"))
SEED = int(os.environ.get("METERD_SEED", "20261124"))


def test_mutants_of_the_money_are_noticed(tmp_path: Path):
    """A seeded share of them; a survivor is listed with the reason why it may live."""
    stage(tmp_path, MODULES)
    mutants = mutate(tmp_path, sample(tmp_path, SAMPLE, SEED))

    print(told(mutants))
    assert len(mutants) == SAMPLE
    assert [] == [f"{mutant.name}\n{mutant.change}" for mutant in unlisted(mutants)]
    assert score(mutants) >= FLOOR


def test_listed_survivor_has_a_reason():
    """Nobody lists one to be rid of it."""
    assert all(len(reason) > 10 for reason in listed().values())


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_mutants_of_the_core_are_noticed(tmp_path: Path):
    """All of them; the same as `make mutate`."""
    stage(tmp_path)
    mutants = mutate(tmp_path, [])

    print(told(mutants))
    assert [] == [f"{mutant.name}\n{mutant.change}" for mutant in unlisted(mutants)]
    assert score(mutants) >= FLOOR
