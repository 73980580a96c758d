"""Bad inputs over every transport: one verdict each, and the daemon goes on.

Real Redis, real Mosquitto, a real daemon. Behind each bad delivery comes a good one by the same
way: it must be counted, so nothing was stopped. At the end both brokers are empty.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import redis
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.acceptance.stage import PLANS, Node, configuration, paid, until
from tests.processes import Sandbox
from tests.servers import MosquittoServer, RedisServer

OK, AGAIN, WHOLE = "accepted", "duplicate", "400"
RATES = """
[plans.kinds]
pattern = "pay_per_token"
rates = [{ meter = "tokens", price = "0.001", where = { kind = "output" } }]
settle = { amount = "1000" }
"""
SOURCES = """
[[sources]]
kind = "redis"
url = "{redis}"
block = "200ms"

[[sources]]
kind = "mqtt"
name = "plain"
port = {mqtt}
topic = "events/in"
client_id = "plain"

[[sources]]
kind = "mqtt"
name = "topics"
port = {mqtt}
client_id = "topics"
"""


# -- The stage -------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A daemon, both brokers, and ways to send."""

    node: Node
    sandbox: Sandbox
    redis: RedisServer
    mosquitto: MosquittoServer
    mqtt: paho.Client
    escrow: str
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def fresh(self, prefix: str = "g") -> str:
        """An id that was not used before."""
        return f"{prefix}-{next(self.numbers)}"

    def good(self, **changes: object) -> bytes:
        """An event that is accepted."""
        usual = {"id": self.fresh(), "escrow_id": self.escrow, "meter": "units", "quantity": 1}
        return json.dumps({**usual, **changes}).encode()

    def post(self, body: bytes, content_type: str = "application/json") -> Any:
        """Post to the events' address; the answer."""
        return self.node.ask("POST", "/v1/events", body, Content_Type=content_type)

    def xadd(self, fields: Mapping[str, Any]) -> None:
        """Add an entry to the stream."""
        with redis.Redis.from_url(self.redis.url) as client:
            client.xadd("meterd:usage", dict(fields))

    def publish(
        self, topic: str, payload: bytes, *, event_id: str = "", qos: int = 1, retain: bool = False
    ) -> None:
        """Publish, and wait for the PUBACK."""
        properties = Properties(PacketTypes.PUBLISH)
        if event_id:
            properties.UserProperty = [("id", event_id)]
        info = self.mqtt.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        info.wait_for_publish(10)

    def verdict(self, send: Callable[[], None], send_good: Callable[[], None]) -> str:
        """Send one delivery and a good one behind it; what became of the first."""
        before = self._counts()
        send()
        send_good()
        want = sum(before.values()) + 2
        until(lambda: sum(self._counts().values()) >= want, lambda: (before, self._counts()))
        after = self._counts()
        made = {name: after[name] - before[name] for name in after}
        assert sum(made.values()) == 2, made
        made["accepted"] -= 1
        assert made["accepted"] >= 0, "the good event was not accepted"
        if made["rejected"]:
            return str(self.newest_letter()["reason"])
        return OK if made["accepted"] else AGAIN

    def newest_letter(self) -> Any:
        """The dead letter that came last, whole."""
        (letter,) = self.node.get("/v1/dead-letters?limit=1")["items"]
        return self.node.get(f"/v1/dead-letters/{letter['id']}")

    def _counts(self) -> dict[str, int]:
        events = self.node.get("/v1/status")["events"]
        return {name: events[name] for name in ("accepted", "duplicates", "rejected")}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Everything that runs, with one agreement for good events and one that is closed."""
    directory = tmp_path_factory.mktemp("bad")
    with (
        RedisServer() as redis_server,
        MosquittoServer() as mosquitto,
        Sandbox(directory / "sandbox") as sandbox,
    ):
        sources = SOURCES.format(redis=redis_server.url, mqtt=mosquitto.port)
        text = configuration(sandbox, plans=PLANS + RATES, rest=sources, http='body_limit = "2MiB"')
        mqtt = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        mqtt.connect("127.0.0.1", mosquitto.port)
        mqtt.loop_start()
        with Node(directory, text) as node:
            node.wait_ready()
            node.wait_sources()
            escrow = sandbox.lock("1000.00")
            node.bind(escrow, "lazy", "good")
            node.bind(sandbox.lock("1.00"), "lazy", "closed")
            node.bind(sandbox.lock("1.00"), "kinds", "kinds")
            node.ask("POST", "/v1/agreements/closed/close", {})
            node.wait_state("closed", "closed")
            stage = Stage(node, sandbox, redis_server, mosquitto, mqtt, escrow)
            node.send(json.loads(stage.good(id="base", source="svc")))
            yield stage
            mqtt.disconnect()
            mqtt.loop_stop()


# -- Events as JSON, over every transport that takes JSON ------------------------------------------


@dataclass(frozen=True)
class Case:
    """A payload and its verdict; where a body of HTTP is refused as a whole, `single` says so."""

    payload: bytes
    verdict: str
    single: str = ""  # As the body of a request; "" is `verdict`.
    listed: str = ""  # As an item of a list.


def _now(**shift: float) -> str:
    return (datetime.now(UTC) + timedelta(**shift)).isoformat()


def _with(raw_quantity: str | None = None, **changes: object) -> bytes:
    """A good event with changes; `@id` becomes a fresh id and `@escrow` the good escrow."""
    fields = {"id": "@id", "escrow_id": "@escrow", "meter": "units", "quantity": 1, **changes}
    fields = {name: value for name, value in fields.items() if value is not ...}
    text = json.dumps(fields)
    if raw_quantity is not None:
        text = text.replace('"quantity": 1', f'"quantity": {raw_quantity}')
    return text.encode()


def _no_json(payload: bytes, listed: str = WHOLE) -> Case:
    return Case(payload, "malformed", WHOLE, listed)


def _no_event(payload: bytes) -> Case:
    """JSON, but no object."""
    return Case(payload, "malformed", WHOLE)


CASES: dict[str, Case] = {
    # JSON and numbers.
    "null": _no_event(b"null"),
    "a text": _no_event(b'"str"'),
    "a list": _no_event(b"[]"),
    "a number": _no_event(b"17"),
    "truncated": _no_json(b'{"id": "x", "escrow_id": "e'),
    "trailing garbage": _no_json(_with() + b" garbage"),
    "two documents": _no_json(_with() + _with()),
    "a byte order mark": _no_json(b"\xef\xbb\xbf" + _with()),
    "UTF-16": _no_json(_with().decode().encode("utf-16")),
    "invalid UTF-8": Case(_with(meter="x").replace(b'"x"', b'"\xff\xfe"'), "malformed", "*", "*"),
    "a lone surrogate": Case(_with(id="x\ud800"), "malformed", "*", "*"),
    "NUL in a text": Case(_with(id="x\0y"), "malformed"),
    "a hundred thousand brackets": _no_json(b"[" * 60_000),
    "nested deeply": Case(
        _with(x="@deep").replace(b'"@deep"', b"[" * 20_000 + b"]" * 20_000), "malformed", "*", "*"
    ),
    "a mebibyte and one": Case(b'{"x": "' + b"x" * (1024 * 1024 - 8) + b'"}', "too_large"),
    "thousands of unknown keys": Case(_with(**{f"k{n}": n for n in range(4000)}), OK),
    "gzip": _no_json(gzip.compress(_with())),
    "NaN": Case(_with("NaN"), "malformed", "*", "*"),
    "Infinity": Case(_with("Infinity"), "malformed", "*", "*"),
    "NaN as a text": Case(_with('"NaN"'), "bad_quantity"),
    "sNaN": Case(_with('"sNaN"'), "bad_quantity"),
    "1e400": Case(_with("1e400"), "bad_quantity"),
    "1e999999999": Case(_with("1e999999999"), "bad_quantity"),
    "1e1000000 as a text": Case(_with('"1e1000000"'), "bad_quantity"),
    "minus one": Case(_with("-1"), "bad_quantity"),
    "zero": Case(_with("0"), "bad_quantity"),
    "true": Case(_with("true"), "bad_quantity"),
    "no quantity": Case(_with(quantity=...), "bad_quantity"),
    "blanks": Case(_with('" 5\\n"'), "bad_quantity"),
    "an underscore": Case(_with('"1_000"'), "bad_quantity"),
    "full-width digits": Case(_with(quantity="\uff11"), "bad_quantity"),
    "hexadecimal": Case(_with('"0x10"'), "bad_quantity"),
    "2^53+1": Case(_with("9007199254740993"), "bad_quantity"),
    "2^63-1": Case(_with("9223372036854775807"), "bad_quantity"),
    "2^63": Case(_with("9223372036854775808"), "bad_quantity"),
    "2^70": Case(_with("1180591620717411303424"), "bad_quantity"),
    "5,000 digits": Case(_with("9" * 5000), "bad_quantity"),
    "60,000 decimals": Case(_with("0." + "3" * 60_000), "bad_quantity"),
    "a million decimals": Case(_with("0." + "3" * 1_000_000), "too_large"),
    "30 decimals": Case(_with("0." + "3" * 30), "bad_quantity"),
    "almost one": Case(_with("0.99999999999999999999"), "bad_quantity"),
    "nine decimals": Case(_with("0.000000001"), OK),
    "the most": Case(_with("1000000000000000"), OK),
    # Identity.
    "no id": Case(_with(id=...), "no_id"),
    "an empty id": Case(_with(id=""), "no_id"),
    "an id of 60 KiB": Case(_with(id="x" * 60_000), "malformed"),
    "an id of 64 KiB": Case(_with(id="x" * 65_536), "too_large"),
    "line breaks in an id": Case(_with(id="x\r\nSet-Cookie: y"), "malformed"),
    "SQL in an id": Case(_with(id="@id'; DROP TABLE counter; --"), OK),
    "the same again": Case(_with(id="base", source="svc"), AGAIN),
    "the same, spelt otherwise": Case(_with('"1.000"', id="base", source="svc"), AGAIN),
    "the same id, another quantity": Case(_with("2", id="base", source="svc"), "conflict"),
    "the same id, another time": Case(
        _with(id="base", source="svc", time=_now(hours=-1)), "conflict"
    ),
    "the same id of another producer": Case(_with(id="base", source="@id"), OK),
    "no agreement": Case(_with(escrow_id=...), "unknown_agreement"),
    "an unknown escrow": Case(_with(escrow_id="esc_unknown"), "unknown_agreement"),
    "a path for an escrow": Case(_with(escrow_id="../admin"), "unknown_agreement"),
    "line breaks in an escrow": Case(_with(escrow_id="esc\r\nx"), "unknown_agreement"),
    "a closed agreement": Case(_with(escrow_id=..., agreement="closed"), "closed"),
    "two agreements": Case(_with(agreement="kinds"), "mismatch"),
    "an unknown meter": Case(_with(meter="gpus"), "unknown_meter"),
    "a meter without a rate": Case(_with(meter="tokens"), "unknown_meter"),
    "no rate for the kind": Case(
        _with(escrow_id=..., agreement="kinds", meter="tokens", dimensions={"kind": "x"}), "no_rate"
    ),
    "a number for a dimension": Case(_with(dimensions={"kind": 1}), "malformed"),
    "an unknown type": Case(_with(type="meterd.milestone"), "unknown_type"),
    # Time.
    "1969": Case(_with(time="1969-12-31T23:59:59Z"), "late"),
    "9999": Case(_with(time="9999-12-31T23:59:59Z"), "early"),
    "a day ahead": Case(_with(time=_now(days=1)), "early"),
    "older than the window": Case(_with(time=_now(hours=-73)), "late"),
    "inside the window": Case(_with(time=_now(hours=-71)), OK),
    "no time zone": Case(_with(time="2026-11-23T12:00:00"), "malformed"),
    "no time": Case(_with(time="yesterday"), "malformed"),
    # What is given twice counts as it comes last, everywhere.
    "a key twice": Case(_with().replace(b'"id": "@id"', b'"id": "", "id": "@id"'), OK),
}
# Of JSON that the body's cutter may refuse or let through to the reader: both are right.
EITHER = {"malformed", WHOLE}
# An id that the payload lacks is the transport's own there.
REDIS_IDS = {"no id": OK, "an empty id": OK}


def _payload(stage: Stage, case: Case) -> bytes:
    payload = case.payload.replace(b"@escrow", stage.escrow.encode())
    return payload.replace(b"@id", stage.fresh("c").encode())


def _expected(column: Callable[[Case], str]) -> dict[str, str]:
    return {name: column(case) or case.verdict for name, case in CASES.items()}


def _told(answer: Any, index: int = 0) -> str:
    """What an answer says of one event of it."""
    if answer.status != 200:
        assert 400 <= answer.status < 500, answer.raw
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert {"type", "title", "status", "detail"} <= answer.json.keys()
        return str(answer.status)
    for rejection in answer.json["rejected"]:
        if rejection["index"] == index:
            return str(rejection["reason"])
    return AGAIN if answer.json["duplicates"] else OK


def _differences(expected: Mapping[str, str], found: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: (expected[name], verdict)
        for name, verdict in found.items()
        if verdict != expected[name] and not (expected[name] == "*" and verdict in EITHER)
    }


def test_each_bad_event_alone_over_http_is_told_what_is_wrong(stage: Stage) -> None:
    """A verdict or a problem, and the next event is taken."""
    found = {}
    for name, case in CASES.items():
        found[name] = _told(stage.post(_payload(stage, case)))
        good = stage.post(stage.good())
        assert (good.status, good.json["accepted"]) == (200, 1), name

    assert _differences(_expected(lambda case: case.single), found) == {}


def test_a_bad_event_in_a_list_over_http_spoils_no_other(stage: Stage) -> None:
    """Between two good ones, which are accepted unless the whole body is no JSON."""
    found = {}
    for name, case in CASES.items():
        items = [stage.good(), _payload(stage, case), stage.good()]
        answer = stage.post(b"[" + b",".join(items) + b"]")
        found[name] = _told(answer, 1)
        if answer.status == 200:
            assert answer.json["accepted"] == 2 + (found[name] == OK), name

    assert _differences(_expected(lambda case: case.listed), found) == {}


def test_a_bad_line_over_http_spoils_no_other(stage: Stage) -> None:
    """NDJSON is never refused as a whole: each line has its own verdict."""
    found = {}
    for name, case in CASES.items():
        lines = [stage.good(), _payload(stage, case).replace(b"\n", b" "), stage.good()]
        answer = stage.post(b"\n".join(lines), "application/x-ndjson")
        found[name] = _told(answer, 1)
        assert answer.json["accepted"] == 2 + (found[name] == OK), name

    assert _differences(_expected(lambda _: ""), found) == {}


def test_a_bad_entry_in_the_stream_is_a_dead_letter_that_holds_it(stage: Stage) -> None:
    """Redis, one field `event`: the payload is kept to the byte, up to the largest event."""
    found, kept = {}, {}
    for name, case in CASES.items():
        payload = _payload(stage, case)
        found[name] = stage.verdict(
            lambda payload=payload: stage.xadd({"event": payload}),
            lambda: stage.xadd({"event": stage.good()}),
        )
        if found[name] not in {OK, AGAIN}:
            held = base64.b64decode(stage.newest_letter()["payload_base64"])
            kept[name] = held == payload[: 64 * 1024]

    assert _differences({**_expected(lambda _: ""), **REDIS_IDS}, found) == {}
    assert [name for name, same in kept.items() if not same] == []


def test_a_bad_message_of_a_topic_is_a_dead_letter_that_holds_it(stage: Stage) -> None:
    """MQTT, JSON alone: the payload is kept to the byte, up to the largest event."""
    found, kept = {}, {}
    for name, case in CASES.items():
        payload = _payload(stage, case)
        found[name] = stage.verdict(
            lambda payload=payload: stage.publish("events/in", payload),
            lambda: stage.publish("events/in", stage.good()),
        )
        if found[name] not in {OK, AGAIN}:
            held = base64.b64decode(stage.newest_letter()["payload_base64"])
            kept[name] = held == payload[: 64 * 1024]

    assert _differences(_expected(lambda _: ""), found) == {}
    assert [name for name, same in kept.items() if not same] == []


# -- What only one transport can get wrong ---------------------------------------------------------

FLAT: dict[str, tuple[dict[str, Any], str]] = {
    "good": ({}, OK),
    "a decimal": ({"quantity": "0.000000001"}, OK),
    "no id: the entry's own": ({"id": None}, OK),
    "dimensions as JSON": ({"dimensions": '{"kind": "x"}'}, OK),
    "dimensions by name": ({"dimensions.kind": "x"}, OK),
    "no meter": ({"meter": None}, "malformed"),
    "no quantity": ({"quantity": None}, "bad_quantity"),
    "no escrow": ({"escrow_id": None}, "unknown_agreement"),
    "an unknown escrow": ({"escrow_id": "esc_unknown"}, "unknown_agreement"),
    "an unknown meter": ({"meter": "gpus"}, "unknown_meter"),
    "beside a field event": ({"event": "{}"}, "malformed"),
    "no UTF-8": ({"id": b"\xff"}, "malformed"),
    "dimensions are no JSON": ({"dimensions": "kind=x"}, "malformed"),
    "a dimension twice": ({"dimensions": '{"kind": "x"}', "dimensions.kind": "y"}, "malformed"),
    "a word": ({"quantity": "many"}, "bad_quantity"),
    "an exponent": ({"quantity": "1e1000000"}, "bad_quantity"),
    "blanks": ({"quantity": " 5\n"}, "bad_quantity"),
    "nothing": ({"quantity": ""}, "bad_quantity"),
    "zero": ({"quantity": "0"}, "bad_quantity"),
    "full-width digits": ({"quantity": "\uff11"}, "bad_quantity"),
    "late": ({"time": "1969-12-31T23:59:59Z"}, "late"),
    "early": ({"time": "9999-12-31T23:59:59Z"}, "early"),
    "no time": ({"time": "yesterday"}, "malformed"),
    "the same again": ({"id": "base", "source": "svc"}, AGAIN),
    "conflict": ({"id": "base", "source": "svc", "quantity": "2"}, "conflict"),
    "an unknown type": ({"type": "meterd.milestone"}, "unknown_type"),
    "a mebibyte": ({"note": "x" * 1024 * 1024}, "too_large"),
}


def test_flat_fields_in_the_stream_each_have_one_verdict(stage: Stage) -> None:
    """Redis, a field for each value, as `redis-cli XADD` writes them."""
    found = {}
    for name, (changes, _) in FLAT.items():
        fields = {"id": stage.fresh(), "escrow_id": stage.escrow, "meter": "units", "quantity": "1"}
        fields.update(changes)
        wanted = {key: value for key, value in fields.items() if value is not None}
        found[name] = stage.verdict(
            lambda wanted=wanted: stage.xadd(wanted),
            lambda: stage.xadd({"event": stage.good()}),
        )

    assert found == {name: verdict for name, (_, verdict) in FLAT.items()}


BARE: dict[str, tuple[bytes, str]] = {
    "good": (b"1", OK),
    "a decimal": (b"0.000000001", OK),
    "a line break behind it": (b"5\n", OK),
    "zero": (b"0", "bad_quantity"),
    "minus": (b"-1", "bad_quantity"),
    "plus": (b"+1", "bad_quantity"),
    "an exponent": (b"1e400", "bad_quantity"),
    "too many decimals": (b"0.0000000001", "bad_quantity"),
    "too much": (b"1000000000000001", "bad_quantity"),
    "a word behind it": (b"5 apples", "bad_quantity"),
    "an underscore": (b"1_000", "bad_quantity"),
    "hexadecimal": (b"0x10", "bad_quantity"),
    "5,000 digits": (b"9" * 5000, "malformed"),
    "a word": (b"many", "malformed"),
    "NaN": (b"NaN", "malformed"),
    "full-width digits": ("\uff11".encode(), "malformed"),
    "nothing": (b"", "malformed"),
    "blanks": (b" ", "malformed"),
}


def _bare_good(stage: Stage) -> None:
    stage.publish(f"meterd/usage/{stage.escrow}/units", b"1", event_id=stage.fresh())


def test_bare_numbers_each_have_one_verdict(stage: Stage) -> None:
    """MQTT, where the topic names all but the quantity and a user property the id."""
    topic = f"meterd/usage/{stage.escrow}/units"
    found = {
        name: stage.verdict(
            lambda payload=payload: stage.publish(topic, payload, event_id=stage.fresh()),
            lambda: _bare_good(stage),
        )
        for name, (payload, _) in BARE.items()
    }

    assert found == {name: verdict for name, (_, verdict) in BARE.items()}


def test_what_a_topic_says_must_fit_what_its_payload_says(stage: Stage) -> None:
    """Disagreement, no id, QoS 0, and unknown names in the topic."""
    mine, other = f"meterd/usage/{stage.escrow}/units", "meterd/usage/esc_other/units"
    agreed = stage.good(escrow_id="", meter="")
    sends: dict[str, tuple[Callable[[], None], str]] = {
        "payload and topic agree": (lambda: stage.publish(mine, stage.good()), OK),
        "the topic fills what is missing": (lambda: stage.publish(mine, agreed), OK),
        "by its agreement's name": (
            lambda: stage.publish(mine, stage.good(escrow_id="", agreement="good")),
            OK,
        ),
        "another agreement": (
            lambda: stage.publish(mine, stage.good(escrow_id="", agreement="kinds")),
            "mismatch",
        ),
        "another escrow": (lambda: stage.publish(other, stage.good()), "mismatch"),
        "another meter": (lambda: stage.publish(mine, stage.good(meter="tokens")), "mismatch"),
        "a bare number without an id": (lambda: stage.publish(mine, b"1"), "no_id"),
        "QoS 0": (lambda: stage.publish(mine, stage.good(), qos=0), "qos"),
        "an unknown escrow": (
            lambda: stage.publish(other, b"1", event_id=stage.fresh()),
            "unknown_agreement",
        ),
        "the id of 60 KiB": (lambda: stage.publish(mine, b"1", event_id="x" * 60_000), "malformed"),
    }
    found = {
        name: stage.verdict(send, lambda: _bare_good(stage)) for name, (send, _) in sends.items()
    }

    assert found == {name: verdict for name, (_, verdict) in sends.items()}


def test_a_retained_message_is_refused_once(tmp_path: Path, stage: Stage) -> None:
    """A new subscription is handed what was retained; it is a dead letter, not usage."""
    stage.publish("kept/in", stage.good(), retain=True)
    rest = (
        f'[[sources]]\nkind = "mqtt"\nport = {stage.mosquitto.port}\n'
        'topic = "kept/in"\nclient_id = "kept"\n'
    )
    with Node(tmp_path, configuration(stage.sandbox, rest=rest)) as node:
        node.wait_ready()
        node.wait_sources()
        until(lambda: node.get("/v1/dead-letters")["items"], node.log_tail)
        node.stop()
        node.start()
        node.wait_ready()
        node.wait_sources()
        stage.publish("kept/in", stage.good(escrow_id="unknown"))
        until(lambda: len(node.get("/v1/dead-letters")["items"]) > 1, node.log_tail)
        reasons = [one["reason"] for one in node.get("/v1/dead-letters")["items"]]
        node.stop()
    stage.publish("kept/in", b"", retain=True)

    assert reasons == ["unknown_agreement", "retained"]


def test_a_stream_that_is_no_stream_is_waited_for_and_a_new_one_is_read(stage: Stage) -> None:
    """A string at its key, then nothing, then a stream: each is seen, and no event is lost."""
    with redis.Redis.from_url(stage.redis.url) as client:
        client.delete("meterd:usage")
        client.set("meterd:usage", "no stream")
        until(lambda: stage.node.ask("GET", "/readyz").status == 503, stage.node.log_tail)
        said = until(
            lambda: next(
                (
                    one["error"]
                    for one in stage.node.get("/v1/status")["sources"]
                    if one["name"] == "redis" and "does not hold a stream" in one["error"]
                ),
                "",
            ),
            stage.node.log_tail,
        )
        client.delete("meterd:usage")
    before = stage.node.agreement("good")["events"]
    stage.xadd({"event": stage.good()})
    stage.node.wait_sources()
    stage.node.wait_agreement("good", events=before + 1)

    assert "TYPE meterd:usage" in said


# -- Requests --------------------------------------------------------------------------------------


def _raw(stage: Stage, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", stage.node.port), 10) as connection:
        connection.sendall(request)
        connection.settimeout(10)
        try:
            return connection.recv(65_536)
        except OSError:
            return b""


REQUESTS: dict[str, tuple[dict[str, str], bytes, int]] = {
    "nothing": ({}, b"", 400),
    "blanks": ({}, b" \r\n\t", 400),
    "an empty list": ({}, b"[]", 400),
    "no lines": ({"Content-Type": "application/x-ndjson"}, b"\n\n", 400),
    "a compressed body": ({"Content-Encoding": "gzip"}, gzip.compress(b"0" * 10**7), 415),
    "a body above the limit": ({}, b" " * (2 * 1024 * 1024 + 1), 413),
    "CloudEvents": ({"Content-Type": "application/cloudevents+json"}, b"{}", 415),
    "a foreign page": ({"Origin": "https://evil.example"}, b"{}", 403),
    "another host's name": ({"Host": "evil.example"}, b"{}", 403),
    "too many events": ({}, b"[" + b",".join([b"{}"] * 20_001) + b"]", 413),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_a_problem_and_counts_nothing(stage: Stage, name: str) -> None:
    """4xx as problem+json; no event and no dead letter comes of it."""
    headers, body, status = REQUESTS[name]
    before = stage.node.get("/v1/status")
    named = {key.replace("-", "_"): value for key, value in headers.items()}
    answer = stage.node.ask("POST", "/v1/events", body, **named)
    after = stage.node.get("/v1/status")

    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert (before["events"], before["dead_letters"]) == (after["events"], after["dead_letters"])


def test_any_content_type_is_read_as_what_it_is(stage: Stage) -> None:
    """Curl sends a form's type when it is told nothing."""
    answers = [
        stage.post(stage.good(), kind)
        for kind in ("application/x-www-form-urlencoded", "text/plain", "nonsense", "")
    ]

    assert [answer.status for answer in answers] == [200] * 4


def test_broken_http_is_refused_and_others_are_served(stage: Stage) -> None:
    """A body that breaks off, one without end, a head without end, and rubbish."""
    head = b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\n"
    slow = socket.create_connection(("127.0.0.1", stage.node.port), 10)
    slow.sendall(head + b"Content-Length: 100\r\n\r\n{")  # Slow-loris: the rest never comes.
    endless = (
        head + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 40
    )
    answers = {
        "rubbish": _raw(stage, b"\x16\x03\x01\x00\r\n\r\n"),
        "an endless head": _raw(stage, head + b"X: " + b"x" * 100_000 + b"\r\n\r\n"),
        "an endless body": _raw(stage, endless),
        "lengths that disagree": _raw(
            stage, head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}"
        ),
    }
    good = stage.post(stage.good())
    slow.close()
    again = stage.post(stage.good())

    assert {name: answer[9:10] for name, answer in answers.items() if answer[9:10] != b"4"} == {}
    assert (good.json["accepted"], again.json["accepted"]) == (1, 1)


def test_a_thousand_values_of_a_dimension_make_no_thousand_counters(stage: Stage) -> None:
    """Values that no rate names are counted together; the metrics do not grow either."""
    node = stage.node
    before = node.ask("GET", "/metrics").raw.count(b"\n")
    events = [
        json.loads(stage.good(dimensions={"model": f"model-{number}"})) for number in range(1000)
    ]
    answer = node.send(*events)
    items = node.get("/v1/agreements/good/usage")["items"]
    after = node.ask("GET", "/metrics").raw.count(b"\n")

    assert answer["accepted"] == 1000
    assert len(items) == 1
    assert after - before < 50


# -- Repairs ---------------------------------------------------------------------------------------


def _senders(stage: Stage) -> dict[str, Callable[[dict[str, object]], None]]:
    """Each transport, as a way to send one event given by its fields."""

    def flat(event: dict[str, object]) -> None:
        stage.xadd({name: str(value) for name, value in event.items()})

    def topic(event: dict[str, object]) -> None:
        meter = event.get("meter", "units")
        stage.publish(f"meterd/usage/{event['escrow_id']}/{meter}", json.dumps(event).encode())

    def bare(event: dict[str, object]) -> None:
        where = f"meterd/usage/{event['escrow_id']}/units"
        stage.publish(where, str(event["quantity"]).encode(), event_id=str(event["id"]))

    def lines(event: dict[str, object]) -> None:
        body = json.dumps(event).encode() + b"\n"
        stage.node.ask("POST", "/v1/events", body, Content_Type="application/x-ndjson")

    return {
        "http": lambda event: stage.node.ask("POST", "/v1/events", event) and None,
        "http list": lambda event: stage.node.ask("POST", "/v1/events", [event]) and None,
        "http lines": lines,
        "redis event": lambda event: stage.xadd({"event": json.dumps(event)}),
        "redis flat": flat,
        "mqtt json": topic,
        "mqtt bare": bare,
    }


TRANSPORTS = ["http", "http list", "http lines", "redis event", "redis flat", "mqtt json"]


@pytest.mark.parametrize("transport", [*TRANSPORTS, "mqtt bare"])
def test_usage_that_came_before_its_agreement_is_replayed_when_it_is_bound(
    stage: Stage, transport: str
) -> None:
    """The dead letter waits; its replay counts once; what is rubbish is discarded with a reason."""
    node, send = stage.node, _senders(stage)[transport]
    escrow = stage.sandbox.lock("1.00")
    before = node.get("/v1/status")["dead_letters"]
    event = {"id": stage.fresh(), "escrow_id": escrow, "meter": "units", "quantity": "2.5"}
    rubbish = {**event, "id": stage.fresh(), "quantity": "0"}
    send(event)
    send(rubbish)
    until(lambda: node.get("/v1/status")["dead_letters"] == before + 2, node.log_tail)
    bad, good = node.get("/v1/dead-letters?limit=2")["items"]
    early = node.ask("POST", f"/v1/dead-letters/{good['id']}/replay").json
    node.bind(escrow, "lazy")
    replayed = node.ask("POST", f"/v1/dead-letters/{good['id']}/replay").json
    gone = node.ask("POST", f"/v1/dead-letters/{good['id']}/replay").status
    still_bad = node.ask("POST", f"/v1/dead-letters/{bad['id']}/replay").json
    send(event)  # The producer sends it once more.
    unexplained = node.ask("DELETE", f"/v1/dead-letters/{bad['id']}")
    discarded = node.ask("DELETE", f"/v1/dead-letters/{bad['id']}", {"reason": "a test"})
    send({**event, "id": stage.fresh()})
    agreement = node.wait_agreement(escrow, events=2)

    assert [good["reason"], bad["reason"]] == ["unknown_agreement"] * 2
    assert [one["reason"] for one in early["rejected"]] == ["unknown_agreement"]
    assert replayed == {"accepted": 1, "duplicates": 0, "rejected": []}
    assert gone == 404
    assert [one["reason"] for one in still_bad["rejected"]] == ["bad_quantity"]
    assert (unexplained.status, discarded.status) == (400, 204)
    assert agreement["accrued"] == "0.005"
    assert node.get("/v1/status")["dead_letters"] == before


def test_late_usage_is_priced_when_a_person_replays_it(stage: Stage) -> None:
    """Never silently; and once, however often it is replayed or sent again."""
    node = stage.node
    before = Decimal(node.agreement("good")["accrued"])
    late = json.loads(stage.good(quantity=7, time=_now(days=-30)))
    told = node.send(late)["rejected"][0]["reason"]
    letter = stage.newest_letter()
    replayed = node.ask("POST", f"/v1/dead-letters/{letter['id']}/replay").json
    again = node.send(late)["rejected"][0]["reason"]
    second = stage.newest_letter()
    once_more = node.ask("POST", f"/v1/dead-letters/{second['id']}/replay").json

    assert (told, again) == ("late", "late")
    assert (replayed["accepted"], once_more["duplicates"]) == (1, 1)
    assert Decimal(node.agreement("good")["accrued"]) - before == Decimal("0.007")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_event_that_closes_settles_to_the_last_unit(stage: Stage, transport: str) -> None:
    """`meterd.close` by whichever way it comes; usage behind it is refused as closed."""
    node, send = stage.node, _senders(stage)[transport]
    escrow = stage.sandbox.lock("1.00")
    node.bind(escrow, "lazy")
    node.use(escrow, "1.2345", stage.fresh())
    send({"id": stage.fresh(), "escrow_id": escrow, "type": "meterd.close"})
    closed = node.wait_state(escrow, "closed")
    late = node.send(json.loads(stage.good(escrow_id=escrow)))

    assert (closed["accrued"], closed["released"]) == ("0.0012345", "0.001234")
    assert paid(stage.sandbox, escrow) == Decimal("0.001234")
    assert [one["reason"] for one in late["rejected"]] == ["closed"]


# -- At the end ------------------------------------------------------------------------------------


def test_both_brokers_are_empty_when_all_bad_inputs_were_sent(stage: Stage) -> None:
    """Everything was acknowledged: a client that takes the session over is handed nothing old."""
    status = stage.node.get("/v1/status")
    stage.node.stop()
    with redis.Redis.from_url(stage.redis.url) as client:
        last = client.xinfo_stream("meterd:usage")["last-generated-id"]
        (group,) = client.xinfo_groups("meterd:usage")
    first = {name: _first_message(stage, name, topic) for name, topic in _sessions(stage).items()}
    records = stage.node.logged()

    assert stage.node.returncode == 0
    assert [one["unacked"] for one in status["sources"]] == [0, 0, 0]
    assert group["last-delivered-id"] == last
    assert first == {"plain": b"a marker", "topics": b"a marker"}
    assert [one for one in records if one["level"] in {"error", "critical"}] == []
    assert len(records) < 400  # No line for each bad event.


def _sessions(stage: Stage) -> dict[str, str]:
    return {"plain": "events/in", "topics": f"meterd/usage/{stage.escrow}/units"}


def _first_message(stage: Stage, client_id: str, topic: str) -> bytes:
    """Take a session over, publish a marker, and say which message comes first."""
    arrived, payloads = threading.Event(), []

    def on_message(_: object, __: object, message: paho.MQTTMessage) -> None:
        payloads.append(message.payload)
        arrived.set()

    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5)
    client.on_message = on_message
    session = Properties(PacketTypes.CONNECT)
    session.SessionExpiryInterval = 3600
    client.connect("127.0.0.1", stage.mosquitto.port, clean_start=False, properties=session)
    client.loop_start()
    try:
        stage.publish(topic, b"a marker")
        assert arrived.wait(10)
    finally:
        client.disconnect()
        client.loop_stop()
    return bytes(payloads[0])
