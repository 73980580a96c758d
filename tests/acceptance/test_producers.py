"""Producers that sign, over HTTP, MQTT and Redis, against a daemon that knows their keys.

What nobody has signed is never usage and never silent: HTTP refuses it whole, and from a broker it
is a dead letter.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
import pytest
import redis
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.acceptance.stage import Answer, Node, configuration, until
from tests.processes import Sandbox
from tests.servers import MosquittoServer, RedisServer
from tests.signing import key_of, signed

TOKENS = {name: f"token-of-{name}-0123456789" for name in ("signer", "plain", "other", "admin")}
KEYS = {name: key_of(name) for name in ("signer", "before", "edge-1", "edge-2", "stream")}
SCOPES = {"admin": ["read", "admin"], "signer": ["ingest", "gate", "read"]}


def _tokens() -> str:
    return "".join(
        f'[[http.tokens]]\nname = "{name}"\ntoken = "{token}"\n'
        f"scopes = {json.dumps(SCOPES.get(name, ['ingest']))}\n"
        for name, token in TOKENS.items()
    )


def _producers() -> str:
    return f"""
[[producers]]
name = "signer"
token = "signer"
secret = "{KEYS["signer"]}"
old_secret = "{KEYS["before"]}"
agreements = ["mine-*"]
[[producers]]
name = "plain"
token = "plain"
agreements = ["mine-*"]
[[producers]]
name = "edge-1"
sources = ["mqtt"]
secret = "{KEYS["edge-1"]}"
agreements = ["mine-1"]
[[producers]]
name = "edge-2"
sources = ["mqtt"]
secret = "{KEYS["edge-2"]}"
[[producers]]
name = "stream"
sources = ["redis"]
secret = "{KEYS["stream"]}"
[ingest]
require_producer = true
"""


@dataclass
class Stage:
    """A daemon with two agreements, and the brokers that it reads."""

    node: Node
    redis: redis.Redis
    mqtt_port: int

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """Ask as the operator; the JSON of the answer."""
        answer = self.node.ask(method, path, body, **_bearer("admin"))
        assert answer.status < 300, answer.raw
        return answer.json

    def events(self, agreement: str) -> int:
        """How many events an agreement has."""
        return int(self.admin("GET", f"/v1/agreements/{agreement}")["events"])

    def state(self, agreement: str) -> str:
        """The state of an agreement."""
        return str(self.admin("GET", f"/v1/agreements/{agreement}")["state"])

    def post(self, token: str, body: object, path: str = "/v1/events", **headers: str) -> Answer:
        """Post as somebody."""
        return self.node.ask("POST", path, body, **_bearer(token), **headers)

    def letters(self, reason: str) -> list[Any]:
        """The dead letters of a reason, newest first."""
        return list(self.admin("GET", f"/v1/dead-letters?reason={reason}")["items"])

    def publish(self, topic: str, payload: bytes, named: dict[str, str]) -> None:
        """Publish one message at QoS 1, and wait until the broker has it."""
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.connect("127.0.0.1", self.mqtt_port)
        client.loop_start()
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.UserProperty = list(named.items())
        client.publish(topic, payload, qos=1, properties=properties).wait_for_publish(20)
        client.disconnect()
        client.loop_stop()


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[token]}"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Everything that runs."""
    directory = tmp_path_factory.mktemp("producers")
    with (
        RedisServer() as redis_server,
        MosquittoServer() as mosquitto,
        Sandbox(directory / "sandbox") as sandbox,
    ):
        url = f"redis://127.0.0.1:{redis_server.port}/0"
        sources = (
            f'[[sources]]\nkind = "redis"\nblock = "100ms"\nurl = "{url}"\n'
            f'[[sources]]\nkind = "mqtt"\nport = {mosquitto.port}\n'
            'topic = "usage/{agreement}/{meter}"\n'
        )
        text = configuration(sandbox, rest=_tokens() + sources + _producers())
        with Node(directory, text) as node, redis.Redis.from_url(url) as client:
            node.wait_ready()
            node.wait_sources()
            stage = Stage(node, client, mosquitto.port)
            for name in ("mine-1", "mine-2", "yours-1"):
                body = {"plan": "lazy", "escrows": {"main": sandbox.lock("5.00")}}
                stage.admin("PUT", f"/v1/agreements/{name}", body)
            until(lambda: stage.state("mine-1") == "active", node.log_tail)
            yield stage


def event(event_id: str, agreement: str = "mine-1", **more: object) -> bytes:
    """One usage event, as the bytes that are signed and sent."""
    named = {"id": event_id, "agreement": agreement, "meter": "units", "quantity": 1}
    return json.dumps({**named, **more}).encode()


# -- HTTP --------------------------------------------------------------------------------------


def test_a_signed_body_is_taken_and_any_other_refused_whole(stage: Stage) -> None:
    """401 with a problem and nothing accrued, until the signature is right; then 200."""
    before = stage.events("mine-1")
    body = event("http-1")
    key = KEYS["signer"]
    late = int(time.time()) - 301
    genuine = signed(key, body)
    refused = {
        "unsigned": stage.post("signer", body),
        "another's key": stage.post("signer", body, **signed(KEYS["stream"], body)),
        "another body": stage.post("signer", event("http-2"), **genuine),
        "late": stage.post("signer", body, **signed(key, body, at=late)),
        "no timestamp": stage.post("signer", body, **{**genuine, "webhook-timestamp": ""}),
        "headers": stage.post("signer", body, **genuine, **{"ce-specversion": "1.0"}),
    }
    after = stage.events("mine-1")
    taken = stage.post("signer", body, **genuine)
    again = stage.post("signer", body, **genuine)

    assert {name: answer.status for name, answer in refused.items()} == dict.fromkeys(refused, 401)
    for answer in refused.values():
        assert answer.json["type"] == "urn:meterd:problem:bad-signature"
        assert answer.headers["WWW-Authenticate"].startswith("StandardWebhooks")
    assert "301 s ago" in refused["late"].json["detail"]
    assert after == before
    assert taken.json == {"accepted": 1, "duplicates": 0, "rejected": []}
    assert again.json == {"accepted": 0, "duplicates": 1, "rejected": []}


@pytest.mark.parametrize(
    "path", ["/v1/events", "/api/v1/events", "/v1/traces", "/v1/logs", "/v1/authorize", "/mcp"]
)
def test_no_other_call_is_a_way_around_the_signature(stage: Stage, path: str) -> None:
    """Whatever can lead to usage: with the token of a producer that signs, it is signed or 401."""
    content = {"Content-Type": "application/json"}
    answer = stage.post("signer", event("around"), path, **content)
    other = stage.post("other", event("around"), path, **content)

    assert answer.status == 401
    assert answer.json["type"] == "urn:meterd:problem:bad-signature"
    assert other.status in {401, 403}  # A token that is no producer's sends nothing either.


def test_a_cloudevent_of_openmeters_call_is_signed_like_any_other(stage: Stage) -> None:
    """204 where it counts; its bytes are what is signed."""
    before = stage.events("mine-1")
    cloudevent = {
        "specversion": "1.0",
        "id": "om-1",
        "source": "svc",
        "type": "meterd.usage",
        "subject": "mine-1",
        "data": {"meter": "units", "quantity": 1},
    }
    body = json.dumps(cloudevent).encode()
    kind = {"Content-Type": "application/cloudevents+json"}
    headers = {**kind, **signed(KEYS["signer"], body)}
    answer = stage.post("signer", body, "/api/v1/events", **headers)

    assert answer.status in {200, 204}, answer.raw
    assert stage.events("mine-1") == before + 1


def test_the_gate_wants_the_signature_too(stage: Stage) -> None:
    """A stolen token alone captures nothing: a capture is usage."""
    ask = json.dumps({"agreement": "mine-1", "meter": "units", "quantity": 1, "hold": 60}).encode()
    unsigned = stage.post("signer", ask, "/v1/authorize")
    held = stage.post("signer", ask, "/v1/authorize", **signed(KEYS["signer"], ask))
    path = f"/v1/holds/{held.json['hold']}/capture"
    stolen = stage.post("signer", b"{}", path)
    captured = stage.post("signer", b"{}", path, **signed(KEYS["signer"], b"{}"))

    assert (unsigned.status, held.status, stolen.status) == (401, 200, 401)
    assert captured.json["accepted"] == 1


def test_a_key_is_changed_without_a_gap(stage: Stage) -> None:
    """The old key counts beside the new one until it is removed; SIGHUP is all that it takes."""
    old, new = KEYS["before"], KEYS["signer"]
    both = [
        stage.post("signer", body, **signed(key, body)).status
        for key, body in (
            (old, event("change-1")),
            (new, event("change-2")),
        )
    ]
    two = event("change-3")
    more = signed(old, two)["webhook-signature"]
    with_two = stage.post("signer", two, **signed(new, two, more=more)).status
    text = stage.node.config.read_text()
    reloads = len(stage.node.logged("reloaded"))
    stage.node.config.write_text(text.replace(f'old_secret = "{old}"\n', ""))
    stage.node.signal(signal.SIGHUP)
    stage.node.wait_logged("reloaded", reloads + 1)
    body = event("change-4")
    gone = stage.post("signer", body, **signed(old, body)).status
    stays = stage.post("signer", body, **signed(new, body)).status

    assert both == [200, 200]
    assert with_two == 200
    assert (gone, stays) == (401, 200)
    assert stage.node.logged("reload_needs_restart") == []


def test_usage_of_an_agreement_that_is_not_his_is_refused_event_by_event(stage: Stage) -> None:
    """The others of the body count; what was refused is a dead letter with his name."""
    body = b"[" + b",".join([event("allow-1"), event("allow-2", "yours-1")]) + b"]"
    answer = stage.post("plain", body)
    letter = stage.letters("not_allowed")[0]

    assert answer.json["accepted"] == 1
    assert [(one["index"], one["reason"]) for one in answer.json["rejected"]] == [
        (1, "not_allowed")
    ]
    assert "plain may not send usage of yours-1" in letter["detail"]
    assert stage.events("yours-1") == 0
    again = stage.admin("POST", f"/v1/dead-letters/{letter['id']}/replay")
    assert again["rejected"][0]["reason"] == "not_allowed"


def test_a_token_without_a_producer_sends_nothing_where_one_is_required(stage: Stage) -> None:
    """403, and the sentence names the table."""
    answer = stage.post("other", event("nobody-1"))

    assert answer.status == 403
    assert answer.json["type"] == "urn:meterd:problem:producer-unknown"
    assert "[[producers]]" in answer.json["detail"]


# -- Brokers -----------------------------------------------------------------------------------


def test_a_message_is_its_signers_and_what_nobody_signed_a_dead_letter(stage: Stage) -> None:
    """Two producers share the broker; each is known by its key, and an allow-list is its own."""
    before = stage.events("mine-1")
    forged, good = event("mqtt-forged"), event("mqtt-1")
    topic = "usage/mine-1/units"
    stage.publish(topic, forged, {})
    stage.publish(topic, forged, signed(KEYS["stream"], forged))
    stage.publish(topic, good, signed(KEYS["edge-1"], good))
    foreign = event("mqtt-2", "yours-1")
    stage.publish("usage/yours-1/units", foreign, signed(KEYS["edge-1"], foreign))
    allowed = event("mqtt-3", "yours-1")
    stage.publish("usage/yours-1/units", allowed, signed(KEYS["edge-2"], allowed))
    until(lambda: stage.events("yours-1") == 1, stage.node.log_tail)
    letters = stage.letters("bad_signature")

    assert stage.events("mine-1") == before + 1
    assert [letter["event_id"] for letter in letters[:2]] == ["mqtt-forged", "mqtt-forged"]
    assert "none of this producer's keys" in letters[0]["detail"]
    assert "not signed" in letters[1]["detail"]
    assert stage.letters("not_allowed")[0]["event_id"] == "mqtt-2"
    again = stage.admin("POST", f"/v1/dead-letters/{letters[0]['id']}/replay")
    assert again["rejected"][0]["reason"] == "bad_signature"


def test_the_topic_of_a_signed_message_tells_nothing(stage: Stage) -> None:
    """Whoever controls the broker could send it to another topic; a number alone is unsigned."""
    before = stage.events("mine-1")
    open_ended = json.dumps({"id": "mqtt-topic", "quantity": 3}).encode()
    stage.publish("usage/mine-1/units", open_ended, signed(KEYS["edge-1"], open_ended))
    stage.publish("usage/mine-1/units", b"5", signed(KEYS["edge-1"], b"5"))
    whole = event("mqtt-whole")
    stage.publish("usage/mine-2/units", whole, signed(KEYS["edge-1"], whole))
    until(lambda: stage.letters("mismatch"), stage.node.log_tail)

    assert stage.events("mine-1") == before
    assert stage.letters("unknown_agreement")[0]["event_id"] == "mqtt-topic"
    assert stage.letters("bad_signature")[0]["source"] == "mqtt"


def test_an_entry_is_signed_beside_its_event_and_copied_for_nothing(stage: Stage) -> None:
    """An event without an id has the one that was signed, so a copied entry is a duplicate."""
    before = stage.events("mine-2")
    body = json.dumps({"agreement": "mine-2", "meter": "units", "quantity": 2}).encode()
    fields: dict[Any, Any] = {"event": body, **signed(KEYS["stream"], body)}
    stage.redis.xadd("meterd:usage", fields)
    stage.redis.xadd("meterd:usage", fields)
    stage.redis.xadd("meterd:usage", {**fields, "event": body.replace(b"2}", b"200}")})
    stage.redis.xadd(
        "meterd:usage", {"id": "flat", "agreement": "mine-2", "meter": "units", "quantity": "1"}
    )
    last = event("redis-last", "mine-2")
    stage.redis.xadd("meterd:usage", {**signed(KEYS["stream"], last), "event": last})
    until(lambda: stage.events("mine-2") >= before + 2, stage.node.log_tail)
    letters = [one for one in stage.letters("bad_signature") if one["source"] == "redis"]

    assert stage.events("mine-2") == before + 2
    assert len(letters) == 2


def test_what_waited_at_a_broker_may_be_as_old_as_the_memory(stage: Stage) -> None:
    """An hour of absence makes no signature late; older than the window, it is, and kept."""
    before = stage.events("mine-2")
    for name, age in (("hour", 3600), ("week", 7 * 86_400)):
        body = event(f"waited-{name}", "mine-2")
        at = int(time.time()) - age
        fields: dict[Any, Any] = {"event": body, **signed(KEYS["stream"], body, at=at)}
        stage.redis.xadd("meterd:usage", fields)
    until(lambda: stage.events("mine-2") == before + 1, stage.node.log_tail)
    until(
        lambda: stage.letters("bad_signature")[0]["event_id"] == "waited-week", stage.node.log_tail
    )

    assert "s ago" in stage.letters("bad_signature")[0]["detail"]
