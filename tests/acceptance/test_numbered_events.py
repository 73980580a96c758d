"""Numbered events against a daemon that is killed: what is missing is seen, on every way.

Each test looks at what a person and a program see, and at what the customer is charged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import redis
from paho.mqtt.enums import CallbackAPIVersion

from tests.acceptance.stage import Node, configuration, until
from tests.documents import ROOT, blocks
from tests.processes import Sandbox
from tests.servers import MosquittoServer, RedisServer

TOKENS = """
[plans.tokens]
pattern = "pay_per_token"
rates = [{ meter = "tokens", price = "0.001" }]
settle = { amount = "1000" }
"""


@dataclass
class Stage:
    """A daemon with every way in, and one customer."""

    node: Node
    redis: redis.Redis
    mqtt: paho.Client

    def event(self, number: int, **more: object) -> dict[str, object]:
        """One of ten tokens."""
        now = datetime.now(UTC).isoformat()
        named = {"id": f"n-{number}", "source": "edge-7", "agreement": "customer-1"}
        used = {"meter": "tokens", "quantity": 10, "time": now, "sequence": number}
        return {**named, **used, **more}

    @property
    def producer(self) -> dict[str, Any]:
        """What is known of the producer."""
        (one,) = self.node.get("/v1/producers")["items"]
        found: dict[str, Any] = one
        return found

    @property
    def accrued(self) -> str:
        """What the customer owes."""
        text: str = self.node.agreement("customer-1")["accrued"]
        return text


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Real brokers, a sandbox, and a daemon that reads from all of them."""
    with Sandbox(tmp_path) as sandbox, RedisServer() as stream, MosquittoServer() as broker:
        sources = (
            f'[[sources]]\nkind = "redis"\nurl = "redis://127.0.0.1:{stream.port}/0"\n'
            f'[[sources]]\nkind = "mqtt"\nhost = "127.0.0.1"\nport = {broker.port}\n'
        )
        text = configuration(sandbox, plans=TOKENS) + sources
        client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.connect("127.0.0.1", broker.port)
        client.loop_start()
        with Node(tmp_path, text) as node:
            node.wait_ready()
            node.bind(sandbox.lock("10.00"), "tokens", "customer-1")
            yield Stage(node, redis.Redis(port=stream.port), client)
        client.loop_stop()


def test_gap_outlives_a_kill_and_is_filled_over_whatever_way(stage: Stage) -> None:
    """Numbers are durable with the usage; a producer may use all ways at once."""
    stage.node.send(stage.event(1), stage.event(2), stage.event(9))
    before = stage.producer
    stage.node.kill()
    stage.node.start()
    stage.node.wait_ready()

    assert (before["missing"], before["missing_ranges"]) == (6, [[3, 8]])
    assert stage.producer == before
    assert "6 numbered events have not come" in stage.node.type("status").stdout

    flat = {name: str(value) for name, value in stage.event(3).items()}
    stage.redis.xadd("meterd:usage", flat)
    stage.redis.xadd("meterd:usage", {"event": json.dumps(stage.event(4, sequence="0004"))})
    document = json.dumps(stage.event(5)).encode()
    stage.mqtt.publish("meterd/usage/customer-1/tokens", document, qos=1).wait_for_publish(10)
    headers = {
        "ce-specversion": "1.0",
        "ce-type": "meterd.usage",
        "ce-source": "edge-7",
        "ce-id": "n-6",
        "ce-subject": "customer-1",
        "ce-sequence": "6",
        "ce-sequencetype": "Integer",
        "Content-Type": "application/json",
    }
    data = {"meter": "tokens", "quantity": 10}
    assert stage.node.ask("POST", "/v1/events", data, **headers).status == 200
    cloud = {"specversion": "1.0", "type": "meterd.usage", "source": "edge-7", "id": "n-7"}
    cloud |= {"subject": "customer-1", "data": data, "sequence": "00000007"}  # type: ignore[dict-item]
    content = {"Content-Type": "application/cloudevents+json"}
    assert stage.node.ask("POST", "/v1/events", cloud, **content).status == 200
    path = stage.node.directory / "rest.ndjson"
    path.write_text(json.dumps(stage.event(8)) + "\n")
    assert stage.node.type("replay", str(path)).returncode == 0
    until(lambda: not stage.producer["missing"], lambda: stage.producer)
    stage.node.kill()
    stage.node.start()
    stage.node.wait_ready()

    assert (stage.producer["last"], stage.producer["missing_ranges"]) == (9, [])
    assert stage.accrued == "0.09"


def test_producer_that_begins_anew_is_told_of_and_charged(stage: Stage) -> None:
    """Its second numbering is another run; what comes again of the first changes nothing."""
    first = [stage.event(number) for number in (1, 2, 4)]
    stage.node.send(*first)
    second = [stage.event(number, id=f"again-{number}") for number in (1, 2, 3)]
    stage.node.send(second[0])
    stage.node.send(*first, *second)
    stage.node.wait_logged("numbers_anew")

    assert (stage.producer["runs"], stage.producer["exact"]) == (2, True)
    assert (stage.producer["last"], stage.producer["missing"]) == (3, 0)
    assert (stage.producer["given_up"], stage.accrued) == (1, "0.06")


def test_the_section_of_the_document_does_what_it_says_when_it_is_typed(stage: Stage) -> None:
    """Every command, and what it prints."""
    page = ROOT / "docs" / "ingest.md"
    before, _, after = page.read_text().partition("## Numbered events\n")
    first = before.count("\n")
    last = first + after.partition("\n## ")[0].count("\n") + 1
    own = [block for block in blocks(page) if first < block.line <= last]
    script = ["set -e", f"meterd() {{ '{sys.executable}' -m meterd \"$@\"; }}"]
    script += [block.text for block in own]
    typed = "\n".join(script).replace("http://127.0.0.1:8787", stage.node.url)
    ran = subprocess.run(
        ["bash", "-c", typed],
        capture_output=True,
        text=True,
        env={**os.environ, "METERD_CONFIG": str(stage.node.config)},
        timeout=60,
        check=False,
    )
    expected = [text for block in own for text in block.expected]

    assert ran.returncode == 0, ran.stderr
    assert len(expected) == 4
    assert [text for text in expected if text not in ran.stdout] == []
    metrics = stage.node.ask("GET", "/metrics").raw.decode()
    assert "\nmeterd_sequence_missing 0.0\n" in metrics
    assert "\nmeterd_sequence_given_up_total 2.0\n" in metrics
