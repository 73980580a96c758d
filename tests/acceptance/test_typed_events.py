"""Typed events as other people's programs send them: they change an address, and nothing else.

Each test ends with the agreement's figures to the last unit, and each event goes over the wire more
than once.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import paho.mqtt.client as paho
import pytest
import redis
from cloudevents.conversion import to_binary, to_structured
from cloudevents.http import CloudEvent
from openmeter import Client
from openmeter.models import Event
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.acceptance.stage import Node, configuration, until
from tests.documents import ROOT, blocks
from tests.processes import Sandbox
from tests.servers import MosquittoServer, RedisServer

PLANS = """
[meters.prompt]
event_type = "litellm_tokens"
value = "$.prompt_tokens"
dimensions = { model = "$.model" }
[meters.completion]
event_type = "litellm_tokens"
value = "$.completion_tokens"
dimensions = { model = "$.model" }
[meters.requests]
event_type = "litellm_tokens"
aggregation = "count"
[meters.first]
event_type = "litellm_tokens"
value = "$.items[0].n"

[plans.model]
pattern = "streaming"
settle = { amount = "1000" }
rates = [
    { meter = "prompt", price = "0.001", where = { model = "gpt-large" } },
    { meter = "completion", price = "0.002" },
    { meter = "requests", price = "0.1" },
]
"""
CHAT = """
[plans.chat]
pattern = "streaming"
settle = { amount = "1000" }
rates = [
    { meter = "tokens", price = "0.001", where = { kind = "input" } },
    { meter = "tokens", price = "0.01", where = { kind = "output" } },
    { meter = "calls", price = "0.1" },
]
"""
PRICE = 7 * Decimal("0.001") + 11 * Decimal("0.002") + Decimal("0.1")  # Of one event of `call`.


def call(event_id: str, subject: str, **changes: Any) -> dict[str, Any]:
    """What a proxy for language models tells OpenMeter of one call."""
    return {
        "specversion": "1.0",
        "type": "litellm_tokens",
        "id": event_id,
        "time": changes.pop("time", None),
        "subject": subject,
        "source": "litellm-proxy",
        "data": {
            "model": "gpt-large",
            "cost": 1.7499999999999998e-05,
            "prompt_tokens": 7,
            "completion_tokens": 11,
            "total_tokens": 18,
            **changes,
        },
    }


@dataclass
class Stage:
    """A daemon with a stream and a topic, and who sends to it."""

    node: Node
    sandbox: Sandbox
    stream: redis.Redis
    mqtt_port: int

    def bind(self, name: str) -> str:
        """An agreement of that name over an escrow of its own."""
        return self.node.bind(self.sandbox.lock("10.00"), "model", name)

    def publish(
        self, topic: str, payload: bytes, content_type: str, attributes: dict[str, str]
    ) -> None:
        """Publish one message over MQTT 5 at QoS 1."""
        client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.connect("127.0.0.1", self.mqtt_port)
        client.loop_start()
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = content_type
        if attributes:
            properties.UserProperty = list(attributes.items())
        client.publish(topic, payload, qos=1, properties=properties).wait_for_publish(20)
        client.disconnect()
        client.loop_stop()

    def counts(self) -> tuple[int, int, int]:
        """How many deliveries were accepted, duplicates and rejected so far."""
        text = self.node.ask("GET", "/metrics").raw.decode()
        found = dict.fromkeys(("accepted", "duplicate", "rejected"), 0)
        for line in text.splitlines():
            for result in found:
                if line.startswith("meterd_events_total") and f'result="{result}"' in line:
                    found[result] += int(float(line.rsplit(" ", 1)[1]))
        return found["accepted"], found["duplicate"], found["rejected"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Everything that runs."""
    directory = tmp_path_factory.mktemp("typed")
    with (
        Sandbox(directory / "sandbox") as sandbox,
        RedisServer() as server,
        MosquittoServer() as broker,
        redis.Redis.from_url(server.url) as stream,
    ):
        text = configuration(
            sandbox,
            plans=PLANS + CHAT,
            rest=f"""
[[sources]]
kind = "redis"
url = "{server.url}"
block = "50ms"
[[sources]]
kind = "mqtt"
port = {broker.port}
topic = "agents/{{agreement}}"
""",
        )
        with Node(directory, text) as node:
            node.wait_ready()
            node.wait_sources()
            yield Stage(node, sandbox, stream, broker.port)


def accrued(stage: Stage, name: str) -> Decimal:
    """What an agreement owes."""
    return Decimal(stage.node.agreement(name)["accrued"])


def test_the_page_shows_a_call_that_works(stage: Stage) -> None:
    """What docs/ingest.md tells people to type, typed."""
    stage.node.bind(stage.sandbox.lock("10.00"), "chat", "customer-1")
    (block,) = [
        block
        for block in blocks(ROOT / "docs" / "ingest.md")
        if block.language == "sh" and "ce-specversion" in block.text
    ]
    text = block.text.replace("http://127.0.0.1:8787", stage.node.url)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert [done.stdout.strip()] == block.expected
    assert accrued(stage, "customer-1") == Decimal("0.1") + 100 * Decimal("0.001") + 20 * Decimal(
        "0.01"
    )


def test_openmeters_own_client_works_by_its_address(stage: Stage) -> None:
    """One event and a list of them, some sent twice; nothing of the client is told of meterd."""
    stage.bind("om")
    client = Client(endpoint=stage.node.url, token="any-token-that-openmeter-takes")
    client.events.ingest_event(Event(call("a", "om")))
    for _ in range(2):
        client.events.ingest_events([Event(call(name, "om")) for name in ("a", "b", "c")])
    assert accrued(stage, "om") == 3 * PRICE


def test_a_proxys_callback_works_by_its_address(stage: Stage) -> None:
    """LiteLLM's: one CloudEvent a call, its cost a float that nobody looks at."""
    stage.bind("llm")
    when = datetime.now(UTC).isoformat()
    for event in (call("x", "llm", time=when), call("y", "llm", time=when)) * 2:
        answer = stage.node.ask(
            "POST",
            "/api/v1/events",
            json.dumps(event).encode(),
            Content_Type="application/cloudevents+json",
            Authorization="Bearer a-key",
        )
        assert answer.status == 204, answer.raw
    assert accrued(stage, "llm") == 2 * PRICE


def test_the_cloudevents_sdk_works_in_each_mode(stage: Stage) -> None:
    """Structured and binary over HTTP are one event."""
    stage.bind("ce")
    event = call("e", "ce")
    data = event.pop("data")
    del event["time"]
    before = stage.counts()
    sent = CloudEvent(event, data)  # It gives itself a time.
    for convert in (to_structured, to_binary):
        headers, body = convert(sent)
        named: dict[str, Any] = headers
        answer = stage.node.ask("POST", "/v1/events", body, **named)
        assert answer.json["rejected"] == []
    assert accrued(stage, "ce") == PRICE
    assert [now - then for now, then in zip(stage.counts(), before, strict=True)] == [1, 1, 0]


def test_one_event_over_every_transport_is_one_event(stage: Stage) -> None:
    """Redis, MQTT structured and binary, HTTP in a batch: accepted once, and all else duplicates.

    But for its time, which the CloudEvent names here, as its arrival differs.
    """
    stage.bind("all")
    event = call("everywhere", "all", time=datetime.now(UTC).isoformat())
    document = json.dumps(event).encode()
    kind = "application/cloudevents+json"
    attributes = {name: value for name, value in event.items() if name not in {"data", "subject"}}
    before = stage.counts()

    stage.stream.xadd("meterd:usage", {"event": document})
    flat: dict[Any, Any] = {**attributes, "subject": "all", "data": json.dumps(event["data"])}
    stage.stream.xadd("meterd:usage", flat)
    stage.publish("agents/all", document, kind, {})
    # The topic names the agreement, so a binary event may leave its subject out.
    data = json.dumps(event["data"]).encode()
    stage.publish("agents/all", data, "application/json", attributes)
    batch = "application/cloudevents-batch+json"
    stage.node.ask("POST", "/v1/events", b"[" + document + b"]", Content_Type=batch)

    def seen() -> list[int]:
        return [now - then for now, then in zip(stage.counts(), before, strict=True)]

    until(lambda: sum(seen()) == 5, lambda: f"five deliveries: {seen()}")
    assert seen() == [1, 4, 0], stage.node.get("/v1/dead-letters")["items"]
    assert accrued(stage, "all") == PRICE


def test_what_a_typed_event_added_survives_a_kill_and_is_taken_back_whole(stage: Stage) -> None:
    """A void names the event, and every meter that it fed is as if it had never come."""
    stage.bind("void")
    stage.node.send(call("one", "void"), call("two", "void"))
    assert accrued(stage, "void") == 2 * PRICE
    stage.node.kill()
    stage.node.start()
    stage.node.wait_ready()
    stage.node.wait_state("void", "active")
    data = {"voids": "one"}
    void = {**call("v", "void"), "type": "meterd.void", "data": data}
    assert stage.node.send(void, call("two", "void"))["duplicates"] == 1
    until(lambda: accrued(stage, "void") == PRICE, "one event to be taken back")
    usage = stage.node.get("/v1/agreements/void/usage")["items"]
    assert {line["meter"]: line["quantity"] for line in usage} == {
        "prompt": "7",
        "completion": "11",
        "requests": "1",
    }


def test_a_topic_that_disagrees_and_a_model_without_a_rate_are_dead_letters(stage: Stage) -> None:
    """Neither is charged, neither is lost."""
    stage.bind("dead")
    before = stage.counts()
    document = json.dumps(call("t", "dead")).encode()
    stage.publish("agents/other", document, "application/cloudevents+json", {})
    until(lambda: stage.counts()[2] == before[2] + 1, "the first to be rejected")
    (rejected,) = stage.node.send(call("m", "dead", model="gpt-unknown"))["rejected"]
    assert (rejected["reason"], rejected["detail"][:7]) == ("no_rate", "prompt:")
    assert accrued(stage, "dead") == 0
    letters = stage.node.get("/v1/dead-letters")["items"]
    assert [letter["reason"] for letter in letters[:2]] == ["no_rate", "mismatch"]


def test_the_books_of_typed_events_pass_the_audit(stage: Stage) -> None:
    """`meterd verify` finds each counter worth what it says."""
    stage.node.stop()
    done = stage.node.type("verify")
    assert done.returncode == 0, done.stdout + done.stderr
