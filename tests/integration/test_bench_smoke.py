"""The benchmark itself: every row of it runs, and ends with right books."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = {
    "redis-exclusive",
    "redis-group",
    "mqtt",
    "http",
    "gate",
    "release-latency",
    "releases",
    "memory",
    "start",
    "idle",
    "growth-ids",
    "growth-agreements",
}
OPTIONAL = {"mqtt-aiomqtt"}  # Where its peer is installed.


def test_bench_run_small_measures_every_row_and_judges_none(tmp_path):
    """`python -m bench --smoke` does all of it once; a wrong sum anywhere would end it."""
    results = tmp_path / "results.json"

    done = subprocess.run(
        [sys.executable, "-m", "bench", "--smoke", "--results", str(results)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert (0, "") == (done.returncode, done.stderr)
    document = json.loads(results.read_text())
    assert {row["name"] for row in document["rows"]} | OPTIONAL == ROWS | OPTIONAL
    assert document["judged"] is False
    assert str(tmp_path) not in results.read_text()
