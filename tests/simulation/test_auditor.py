"""Every simulated life ends with books that the auditor, who shares no code with them, agrees to.

What the world did meanwhile (foreign releases, late landings, lost writes, a store that somebody
changed) has been looked at by a person, put back or resolved when a life ends. So nothing may be
left that does not add up: by the rows alone, without a word of the simulation's own reckoning.
"""

from __future__ import annotations

from collections import Counter

import pytest

from meterd.audit import audit
from tests.simulation import run

SEEDS = range(20_000_000, 20_000_020)  # Others than those of test_simulation.py.


def test_auditor_agrees_with_the_store_that_each_life_leaves_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Crashes, failed commits and steps of the clock included: no break, and no false alarm."""
    ended, audited = run._run, Counter[str]()

    def looked_at(sim: run.Simulation) -> None:
        ended(sim)
        found = audit(sim.directory)
        audited["lives"] += 1
        audited["releases"] += len(found.books.releases)
        audited["events"] += sum(counter.events for counter in found.books.counters)
        assert [str(each) for each in found.findings.breaks] == [], f"METERD_SEED={sim.seed}"

    monkeypatch.setattr(run, "_run", looked_at)
    for seed in SEEDS:
        run.simulate(seed)
    print(", ".join(f"{count:,} {what}" for what, count in audited.items()), "audited: 0 breaks")

    assert audited["lives"] == len(SEEDS)
    assert audited["releases"] > 0
