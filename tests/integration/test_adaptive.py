"""Adaptive thresholds in a daemon that pays through the sandbox."""

from __future__ import annotations

import json
from pathlib import Path

from tests.acceptance.stage import Node, configuration, until
from tests.processes import Sandbox

PLANS = """
[plans.careful]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = "adaptive"
exposure_max = "1.00"
"""


def test_reason_of_an_adaptive_release_stands_with_it(tmp_path: Path) -> None:
    """Half of the bound is kept for a burst at first; the API and the command line say so."""
    with Sandbox(tmp_path / "sandbox") as sandbox:
        text = configuration(sandbox, plans=PLANS)
        with Node(tmp_path, text) as node:
            node.wait_ready()
            name = node.bind(sandbox.lock("10.00"), "careful")
            node.use(name, 499, "calm")
            assert node.agreement(name)["unsettled"] == "0.499"
            node.use(name, 1, "half")
            node.wait_agreement(name, released="0.50")

            (release,) = node.releases(name)
            typed = node.type("releases", name, "--json")

            assert release["why"].startswith("adaptive: 0.50 of 1.00 at ")
            assert release["why"].endswith(" an hour, 0.50 kept for a burst")
            assert json.loads(typed.stdout)["items"][0]["why"] == release["why"]
            assert release["why"] in node.type("releases", name).stdout


def test_store_of_a_stopped_daemon_is_simulated(tmp_path: Path) -> None:
    """What the daemon has counted is the usage, worth the same; a running one is refused."""
    with Sandbox(tmp_path / "sandbox") as sandbox:
        with Node(tmp_path, configuration(sandbox, plans=PLANS)) as node:
            node.wait_ready()
            name = node.bind(sandbox.lock("10.00"), "careful")
            for place in range(12):
                node.use(name, 100, f"{place}")
            until(lambda: node.agreement(name)["accrued"] == "1.20", "all of it to be counted")
            refused = node.type("simulate", "--json")
            backup = tmp_path / "copy.db"
            assert node.type("backup", str(backup)).returncode == 0
        before = (node.data_dir / "meterd.db").read_bytes()

        stopped = node.type("simulate", "--against", "amount=0.25", "--json")
        copied = node.type("simulate", "--store", str(backup), "--json")

        assert refused.returncode == 2
        assert "is in use" in refused.stderr
        found = json.loads(stopped.stdout)
        assert found["events"] == 12
        assert [each["charged"] for each in found["variants"]] == ["1.20", "1.20"]
        assert found["variants"][1]["why"] == {"amount": 4}
        assert found["notes"][0].startswith("12 events are known by their hour alone")
        assert json.loads(copied.stdout)["variants"][0] == found["variants"][0]
        assert (node.data_dir / "meterd.db").read_bytes() == before
