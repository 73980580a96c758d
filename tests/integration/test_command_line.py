"""The command line against a running daemon, real brokers and the sandbox: in earnest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Daemon, Sandbox
from tests.servers import MosquittoServer, RedisServer, free_port

CONFIGURATION = """
[daemon]
data_dir = "{data_dir}"
[http]
listen = "127.0.0.1:{port}"
[escrow]
base_url = "{escrow}"
api_key = "{key}"
observe_gap = "50ms"
min_interval = "0s"
[[sources]]
kind = "redis"
url = "{redis}"
block = "50ms"
[[sources]]
kind = "mqtt"
host = "{mqtt_host}"
port = {mqtt_port}
[meters.tokens]
[plans.stream]
pattern = "streaming"
rates = [{{ meter = "tokens", price = "0.001" }}]
settle = {{ amount = "5.00" }}
"""
TIMEOUT_S = 30


@dataclass(frozen=True)
class Stage:
    """Everything that runs, and the configuration that names it."""

    config: Path
    sandbox: Sandbox
    redis: RedisServer

    def type(self, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        """Type a command; what it printed and its exit code."""
        environment = {**os.environ, "METERD_CONFIG": str(self.config)}
        command = [sys.executable, "-m", "meterd", *words]
        return subprocess.run(
            command, input=typed, capture_output=True, text=True, env=environment, check=False
        )

    def ask(self, *words: str) -> Any:
        """Type a command for its JSON."""
        answer = self.type(*words, "--json")
        assert answer.returncode in {0, 3}, answer.stderr
        return json.loads(answer.stdout)

    def bound(self, name: str, amount: str = "20.00") -> str:
        """A new agreement, adopted and ready."""
        escrow = self.sandbox.lock(amount)
        answer = self.type("bind", escrow, "--plan", "stream", "--id", name, "--payer", "Ada")
        assert answer.returncode == 0, answer.stderr
        self.until(lambda: self.ask("agreements", name)["state"] == "active")
        return escrow

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so."""
        give_up = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < give_up
            time.sleep(0.05)

    def accrued(self, name: str) -> str:
        """What an agreement owes."""
        return str(self.ask("agreements", name)["accrued"])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A daemon with both brokers and a sandbox."""
    directory = tmp_path_factory.mktemp("command-line")
    port = free_port()
    config = directory / "meterd.toml"
    with RedisServer() as redis, MosquittoServer() as mqtt, Sandbox(directory / "s") as sandbox:
        config.write_text(
            CONFIGURATION.format(
                data_dir=directory / "data",
                port=port,
                escrow=sandbox.api,
                key=sandbox.provider_key,
                redis=redis.url,
                mqtt_host=mqtt.host,
                mqtt_port=mqtt.port,
            )
        )
        with Daemon(config, port) as daemon:
            daemon.wait_ready()
            stage = Stage(config, sandbox, redis)
            stage.until(lambda: all(one["connected"] for one in stage.ask("status")["sources"]))
            yield stage


def test_a_check_of_what_is_live_finds_escrow_and_brokers_usable(stage: Stage) -> None:
    """Each service gets its line, and no money moved for it."""
    answer = stage.type("check", "--live")

    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "release-partial" in answer.stdout
    assert "Redis" in answer.stdout
    assert "MQTT 5 broker answers" in answer.stdout
    assert stage.sandbox.operations("") == []


@pytest.mark.parametrize("transport", ["http", "redis", "mqtt"])
def test_an_emitted_event_is_accrued_whichever_way_it_takes(stage: Stage, transport: str) -> None:
    """One event over each transport, priced exactly."""
    name = f"emit-{transport}"
    stage.bound(name)
    answer = stage.type("emit", name, "tokens", "0.000001", "--to", transport)
    stage.until(lambda: stage.accrued(name) != "0.00")

    assert answer.returncode == 0, answer.stderr
    assert stage.accrued(name) == "0.000000001"


def test_a_file_that_is_replayed_twice_counts_once(stage: Stage, tmp_path: Path) -> None:
    """A second run finds duplicates alone, and the sum stays."""
    stage.bound("replayed")
    file = tmp_path / "usage.ndjson"
    event = {"agreement": "replayed", "meter": "tokens", "quantity": 1}
    lines = [json.dumps({"id": f"e{number}", **event}) for number in range(2500)]
    file.write_text("\n".join(lines))
    said = [stage.type("replay", str(file)).stdout for _ in range(2)]

    assert said == [
        "2500 accepted, 0 duplicates, 0 rejected\n",
        "0 accepted, 2500 duplicates, 0 rejected\n",
    ]
    assert stage.accrued("replayed") == "2.50"


def test_a_settlement_that_is_asked_for_pays_what_is_owed(stage: Stage) -> None:
    """`settle` pays below the threshold; `releases` shows it, and the escrow agrees."""
    escrow = stage.bound("settled")
    stage.type("emit", "settled", "tokens", "1234.5")
    answer = stage.type("settle", "settled", "--reason", "end of the week")
    stage.until(lambda: stage.ask("agreements", "settled")["released"] != "0.00")
    releases = stage.ask("releases", "settled")["items"]

    assert answer.returncode == 0, answer.stderr
    assert [(one["amount"], one["status"]) for one in releases] == [("1.2345", "confirmed")]
    assert [one["amount"] for one in stage.sandbox.operations(escrow)] == ["1.2345"]


def test_a_frozen_agreement_needs_a_person_until_it_is_resumed(stage: Stage) -> None:
    """The status ends with 3 while something is frozen, and with 0 afterwards."""
    stage.bound("cold")
    codes = [stage.type("status").returncode]
    stage.type("freeze", "cold", "--reason", "odd usage")
    stage.until(lambda: stage.type("status").returncode == 3)
    codes.append(stage.type("status").returncode)
    resumed = stage.type("resume", "cold", "--reason", "looked at it")
    stage.until(lambda: stage.type("status").returncode == 0)
    codes.append(stage.type("status").returncode)

    assert resumed.returncode == 0, resumed.stderr
    assert codes == [0, 3, 0]


def test_a_closed_agreement_is_paid_to_the_last_unit(stage: Stage) -> None:
    """`close` releases everything that was used, however little it is."""
    escrow = stage.bound("ended")
    stage.type("emit", "ended", "tokens", "0.001")
    answer = stage.type("close", "ended", "--reason", "it is over")
    stage.until(lambda: stage.ask("agreements", "ended")["state"] == "closed")

    assert answer.returncode == 0, answer.stderr
    assert [one["amount"] for one in stage.sandbox.operations(escrow)] == ["0.000001"]


def test_a_dead_letter_is_replayed_after_the_repair_or_discarded(stage: Stage) -> None:
    """Usage that came before its agreement is not lost; what is rubbish goes with a reason."""
    emitted = stage.type("emit", "later", "tokens", "3", "--id", "early")
    rubbish = stage.type("replay", "-", typed="rubbish\n")
    letters = stage.ask("dead-letters")["items"]
    stage.bound("later")
    codes = [
        stage.type("dead-letters", "replay", str(letters[1]["id"])).returncode,
        stage.type("dead-letters", "discard", str(letters[0]["id"]), "--reason", "x").returncode,
    ]

    assert (emitted.returncode, rubbish.returncode) == (1, 1)
    assert [one["reason"] for one in letters] == ["malformed", "unknown_agreement"]
    assert codes == [0, 0]
    assert stage.ask("dead-letters")["items"] == []
    assert stage.accrued("later") == "0.003"


def test_what_is_not_there_is_an_error_in_a_sentence(stage: Stage) -> None:
    """Unknown names are 1, with the daemon's hint."""
    answers = [
        stage.type("agreements", "nobody"),
        stage.type("settle", "nobody"),
        stage.type("resolve", "rel_none", "--landed", "--reason", "x"),
        stage.type("dead-letters", "replay", "999999"),
        stage.type("bind", "esc_none", "--plan", "no-plan"),
    ]

    assert [answer.returncode for answer in answers] == [1] * 5
    assert all(answer.stderr.startswith("meterd: ") for answer in answers)
