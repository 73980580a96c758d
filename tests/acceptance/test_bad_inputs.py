"""Bad inputs over every transport: one verdict each, and the daemon goes on.

One table (`bad_inputs`), fired at one daemon with a real Redis, a real Mosquitto and the command
line: as a body, within a list and as a line over HTTP, by Redis streams in both modes, by MQTT 5
and 3.1.1, and by `meterd replay` from a file and from standard input. Behind each bad delivery
comes a good one by the same way: it must be counted, so nothing was stopped. Behind the tables
stands what only one transport can get wrong. At the end the sums agree and both brokers are empty.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
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

from tests.acceptance.bad_inputs import AGAIN, NEEDS_ID, OK, ROWS, WHOLE, Row, moment
from tests.acceptance.stage import PLANS, Node, configuration, paid, until
from tests.processes import Sandbox
from tests.servers import MosquittoServer, RedisServer

CHANGE = (datetime.now(UTC) - timedelta(hours=2)).replace(microsecond=0).isoformat()
RATES = f"""
[plans.kinds]
pattern = "pay_per_token"
rates = [{{ meter = "tokens", price = "0.001", where = {{ kind = "output" }} }}]
settle = {{ amount = "1000" }}

[plans.models]
pattern = "pay_per_token"
rates = [
    {{ meter = "tokens", price = "0.002", where = {{ model = "m-large" }} }},
    {{ meter = "tokens", price = "0.001" }},
]
settle = {{ amount = "100000" }}

[meters.requests]
event_type = "completion"
value = "$.usage.total"
dimensions = {{ model = "$.model" }}

[plans.typed]
pattern = "pay_per_token"
rates = [{{ meter = "requests", price = "0.001" }}]
settle = {{ amount = "1000" }}

[plans.rich]
pattern = "streaming"
rates = [{{ meter = "units", price = "0.001" }}]
settle = {{ amount = "999999999999999" }}

[plans.dearer]
pattern = "streaming"
rates = [{{ meter = "units", price = "0.001" }}]
settle = {{ amount = "1000" }}
[[plans.dearer.versions]]
effective_from = "{CHANGE}"
rates = [{{ meter = "units", price = "0.003" }}]
"""
SOURCES = """
[[sources]]
kind = "redis"
url = "{redis}"
block = "200ms"

[[sources]]
kind = "redis"
name = "group"
url = "{redis}"
stream = "grouped"
mode = "group"
block = "200ms"

[[sources]]
kind = "mqtt"
name = "plain"
port = {mqtt}
topic = "events/in"
client_id = "plain"

[[sources]]
kind = "mqtt"
name = "old"
protocol = "3.1.1"
port = {mqtt}
topic = "old/in"
client_id = "old"

[[sources]]
kind = "mqtt"
name = "topics"
port = {mqtt}
client_id = "topics"

[[sources]]
kind = "mqtt"
name = "oldtopics"
protocol = "3.1.1"
port = {mqtt}
topic = "old/{{escrow_id}}/{{meter}}"
client_id = "oldtopics"
"""
AGREEMENTS = [
    ("lazy", "other"),
    ("lazy", "closed"),
    ("kinds", "kinds"),
    ("typed", "typed"),
]
STREAMS = {"redis": "meterd:usage", "group": "grouped"}
TOPICS = {"plain": "events/in", "old": "old/in"}
# What a person must not be asked to understand.
JARGON = re.compile(r"`|codec|Expected|got |recursion|truncated|Traceback|0x|Error\b|msgspec")


# -- The stage -------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A daemon, both brokers, and ways to send."""

    node: Node
    sandbox: Sandbox
    redis: RedisServer
    mosquitto: MosquittoServer
    stream: redis.Redis
    mqtt: paho.Client
    mqtt3: paho.Client
    escrow: str
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def fresh(self, prefix: str = "g") -> str:
        """An id that was not used before."""
        return f"{prefix}-{next(self.numbers)}"

    def good(self, **changes: object) -> bytes:
        """An event that is accepted."""
        usual = {"id": self.fresh(), "escrow_id": self.escrow, "meter": "units", "quantity": 1}
        return json.dumps({**usual, **changes}).encode()

    def payload(self, row: Row) -> bytes:
        """What a row sends, with an id of its own."""
        payload = row.payload.replace(b"@escrow", self.escrow.encode())
        payload = payload.replace(b"@change", CHANGE.encode())
        return payload.replace(b"@id", self.fresh("c").encode())

    def post(self, body: bytes, content_type: str = "application/json") -> Any:
        """Post to the events' address; the answer."""
        return self.node.ask("POST", "/v1/events", body, Content_Type=content_type)

    def xadd(self, fields: Mapping[str, Any], stream: str = "meterd:usage") -> None:
        """Add an entry to a stream."""
        self.stream.xadd(stream, dict(fields))

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        event_id: str = "",
        qos: int = 1,
        retain: bool = False,
        client: paho.Client | None = None,
    ) -> None:
        """Publish, by MQTT 5 unless told, and wait for the PUBACK."""
        properties = None
        if event_id:
            properties = Properties(PacketTypes.PUBLISH)
            properties.UserProperty = [("id", event_id)]
        client = client or self.mqtt
        info = client.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        info.wait_for_publish(10)

    def verdict(self, send: Callable[[], None], send_good: Callable[[], None]) -> tuple[str, str]:
        """Send one delivery and a good one behind it; what became of the first, and why."""
        before = self.counts()
        send()
        send_good()
        want = sum(before.values()) + 2
        until(lambda: sum(self.counts().values()) >= want, lambda: (before, self.counts()))
        after = self.counts()
        made = {name: after[name] - before[name] for name in after}
        assert sum(made.values()) == 2, made
        made["accepted"] -= 1
        assert made["accepted"] >= 0, "the good event was not accepted"
        if made["rejected"]:
            letter = self.newest_letter()
            return str(letter["reason"]), str(letter["detail"])
        return (OK if made["accepted"] else AGAIN), ""

    def newest_letter(self) -> Any:
        """The dead letter that came last, whole."""
        (letter,) = self.node.get("/v1/dead-letters?limit=1")["items"]
        return self.node.get(f"/v1/dead-letters/{letter['id']}")

    def counts(self) -> dict[str, int]:
        """What became of all deliveries so far."""
        events = self.node.get("/v1/status")["events"]
        return {name: events[name] for name in ("accepted", "duplicates", "rejected")}


def _producer(server: MosquittoServer, protocol: int) -> paho.Client:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=protocol)
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    return client


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Everything that runs, with agreements for good events and one that is closed."""
    directory = tmp_path_factory.mktemp("bad")
    with (
        RedisServer() as redis_server,
        MosquittoServer() as mosquitto,
        Sandbox(directory / "sandbox") as sandbox,
        redis.Redis.from_url(redis_server.url) as stream,
    ):
        sources = SOURCES.format(redis=redis_server.url, mqtt=mosquitto.port)
        told = {"http": 'body_limit = "2MiB"', "daemon": 'drain_timeout = "1s"'}
        text = configuration(sandbox, plans=PLANS + RATES, rest=sources, **told)
        clients = [_producer(mosquitto, protocol) for protocol in (paho.MQTTv5, paho.MQTTv311)]
        with Node(directory, text) as node:
            node.wait_ready()
            node.wait_sources()
            escrow = sandbox.lock("1000.00")
            node.bind(escrow, "lazy", "good")
            for plan, name in AGREEMENTS:
                node.bind(sandbox.lock("1.00"), plan, name)
            # It owes more than anybody can lock; were it paid out, it would end before the test.
            rich = sandbox.lock("1.00")
            sandbox.fault(
                kind="rate_limit",
                call="release_partial",
                escrow_id=rich,
                count=None,
                retry_after="99",
            )
            node.bind(rich, "rich", "rich")
            node.bind(sandbox.lock("1000.00"), "dearer", "dearer")
            node.bind(sandbox.lock("1000.00"), "models", "models")
            node.ask("POST", "/v1/agreements/closed/close", {})
            node.wait_state("closed", "closed")
            stage = Stage(node, sandbox, redis_server, mosquitto, stream, *clients, escrow)
            node.send(json.loads(stage.good(id="base", source="svc")))
            yield stage
            for client in clients:
                client.disconnect()
                client.loop_stop()


# -- The table, over every transport ---------------------------------------------------------------


def _sender(stage: Stage, source: str) -> Callable[[bytes], None]:
    """How JSON is sent to a source of a broker."""
    if source in STREAMS:
        return lambda payload: stage.xadd({"event": payload}, STREAMS[source])
    client = stage.mqtt3 if source == "old" else stage.mqtt
    return lambda payload: stage.publish(TOPICS[source], payload, client=client)


def _told(answer: Any, index: int = 0) -> tuple[str, str]:
    """What an answer says of one event of it."""
    if answer.status != 200:
        assert 400 <= answer.status < 500, answer.raw
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert {"type", "title", "status", "detail"} <= answer.json.keys()
        return str(answer.status), str(answer.json["detail"])
    for rejection in answer.json["rejected"]:
        if rejection["index"] == index:
            return str(rejection["reason"]), str(rejection["detail"])
    return (AGAIN if answer.json["duplicates"] else OK), ""


def _flaw(verdict: str, says: str, found: tuple[str, str]) -> str:
    """What is wrong with a verdict; "" where it is the expected one and can be understood."""
    told, why = found
    if told != verdict:
        return f"{told} instead of {verdict}: {why}"
    if told in {OK, AGAIN}:
        return ""
    if not why.isprintable() or not 0 < len(why) <= 300 or JARGON.search(why):
        return f"nobody understands this: {why}"
    said = any(words in why for words in says.split(" | "))
    return "" if said else f"no {says!r} in it: {why}"


def _flaws(found: Mapping[str, str]) -> dict[str, str]:
    return {name: flaw for name, flaw in found.items() if flaw}


def test_each_bad_event_alone_over_http_is_told_what_is_wrong(stage: Stage) -> None:
    """A verdict or a problem, and the next event is taken."""
    found = {}
    for name, row in ROWS.items():
        says = row.body_says or row.says
        found[name] = _flaw(row.body or row.verdict, says, _told(stage.post(stage.payload(row))))
        good = stage.post(stage.good())
        assert (good.status, good.json["accepted"]) == (200, 1), name

    assert _flaws(found) == {}


def test_a_bad_event_in_a_list_over_http_spoils_no_other(stage: Stage) -> None:
    """Between two good ones, which are accepted unless the whole body is no JSON."""
    found = {}
    for name, row in ROWS.items():
        items = [stage.good(), stage.payload(row), stage.good()]
        answer = stage.post(b"[" + b",".join(items) + b"]")
        told = _told(answer, 1)
        # Within a list other words are right too for what cannot even be cut out of it.
        says = "" if row.listed == WHOLE else row.says
        found[name] = _flaw(row.listed or row.verdict, says, told)
        if answer.status == 200:
            assert answer.json["accepted"] == 2 + (told[0] == OK), name

    assert _flaws(found) == {}


def test_a_bad_line_over_http_spoils_no_other(stage: Stage) -> None:
    """NDJSON is never refused as a whole: each line has its own verdict."""
    found = {}
    for name, row in ROWS.items():
        lines = [stage.good(), stage.payload(row).replace(b"\n", b" "), stage.good()]
        answer = stage.post(b"\n".join(lines), "application/x-ndjson")
        told = _told(answer, 1)
        found[name] = _flaw(row.verdict, row.says, told)
        assert answer.json["accepted"] == 2 + (told[0] == OK), name

    assert _flaws(found) == {}


@pytest.mark.parametrize("source", [*STREAMS, *TOPICS])
def test_a_bad_delivery_of_a_broker_is_a_dead_letter_that_holds_it(
    stage: Stage, source: str
) -> None:
    """Redis in both modes, MQTT 5 and 3.1.1: kept to the byte, up to the largest event."""
    send = _sender(stage, source)
    found, kept = {}, {}
    for name, row in ROWS.items():
        payload = stage.payload(row)
        told = stage.verdict(lambda payload=payload: send(payload), lambda: send(stage.good()))
        served = source in STREAMS and name in NEEDS_ID
        found[name] = _flaw(OK if served else row.verdict, row.says, told)
        if told[0] not in {OK, AGAIN}:
            letter = stage.newest_letter()
            held = base64.b64decode(letter["payload_base64"])
            kept[name] = held == payload[: 64 * 1024] and letter["source"] == source

    assert _flaws(found) == {}
    assert [name for name, same in kept.items() if not same] == []


def _replayed(stage: Stage, lines: list[bytes], from_stdin: bool) -> Any:
    """Type `meterd replay` over these lines; what it printed for programs."""
    file = stage.node.directory / "bad.ndjson"
    file.write_bytes(b"\n".join(lines) + b"\n")
    with file.open("rb") as opened:
        typed = subprocess.run(
            [sys.executable, "-m", "meterd", "replay", "--json", "-" if from_stdin else str(file)],
            env={**os.environ, "METERD_CONFIG": str(stage.node.config)},
            stdin=opened if from_stdin else subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert typed.returncode == 1, typed.stderr
    return json.loads(typed.stdout)


@pytest.mark.parametrize("from_stdin", [False, True], ids=["file", "stdin"])
def test_a_bad_line_of_a_file_is_told_by_its_number_and_spoils_no_other(
    stage: Stage, *, from_stdin: bool
) -> None:
    """`meterd replay`: each line is accepted, a duplicate or rejected; all are in the books."""
    before = stage.counts()
    letters = stage.node.get("/v1/status")["dead_letters"]
    names = list(ROWS)
    payloads = [stage.payload(ROWS[name]).replace(b"\n", b" ").strip() for name in names]
    totals = _replayed(stage, [*payloads, stage.good()], from_stdin)
    after = stage.counts()
    made = {name: after[name] - before[name] for name in after}
    newest = stage.node.get("/v1/dead-letters?limit=1000")["items"][: totals["rejected"]]
    wholes = [stage.node.get(f"/v1/dead-letters/{letter['id']}") for letter in newest]
    whys = {
        base64.b64decode(letter["payload_base64"]): (letter["reason"], letter["detail"])
        for letter in wholes
    }
    verdicts = [ROWS[name].verdict for name in names]
    found = {
        name: _flaw(ROWS[name].verdict, ROWS[name].says, whys[payload[: 64 * 1024]])
        for name, payload in zip(names, payloads, strict=True)
        if ROWS[name].verdict not in {OK, AGAIN}
    }
    lines = {entry["line"]: entry["reason"] for entry in totals["rejections"]}

    assert _flaws(found) == {}
    assert made == {
        "accepted": verdicts.count(OK) + 1,
        "duplicates": verdicts.count(AGAIN),
        "rejected": len(found),
    }
    assert {name: totals[name] for name in made} == made
    assert stage.node.get("/v1/status")["dead_letters"] - letters == len(found)
    # The first of them are shown with the number of their line.
    assert lines == {number: verdicts[number - 1] for number in lines}
    assert len(lines) == 20


def test_usage_exactly_at_a_price_change_has_the_new_price(stage: Stage) -> None:
    """And a second before it the old one."""
    before = Decimal(stage.node.agreement("dearer")["accrued"])
    second = timedelta(seconds=1)
    earlier = (datetime.fromisoformat(CHANGE) - second).isoformat()
    for when in (CHANGE, earlier):
        event = json.loads(stage.good(escrow_id="", agreement="dearer", time=when))
        assert stage.node.send(event)["accepted"] == 1
    after = Decimal(stage.node.agreement("dearer")["accrued"])

    assert after - before == Decimal("0.004")


# -- What only one transport can get wrong ---------------------------------------------------------

FLAT: dict[str, tuple[dict[str, Any], str, str]] = {
    "good": ({}, OK, ""),
    "a decimal": ({"quantity": "0.000000001"}, OK, ""),
    "no id: the entry's own": ({"id": None}, OK, ""),
    "dimensions as JSON": ({"dimensions": '{"kind": "x"}'}, OK, ""),
    "dimensions by name": ({"dimensions.kind": "x"}, OK, ""),
    "a field that nobody knows": ({"colour": "blue"}, OK, ""),
    "no meter": ({"meter": None}, "malformed", "neither a field event nor meter or type"),
    "no quantity": ({"quantity": None}, "bad_quantity", "there is no quantity"),
    "no escrow": ({"escrow_id": None}, "unknown_agreement", "names no agreement"),
    "an unknown escrow": ({"escrow_id": "esc_unknown"}, "unknown_agreement", "bind it"),
    "an unknown meter": ({"meter": "gpus"}, "unknown_meter", "it has units"),
    "another case": ({"METER": "units", "meter": None}, "malformed", "nor meter or type"),
    "beside a field event": ({"event": "{}"}, "malformed", "the field event must stand alone"),
    "no UTF-8": ({"id": b"\xff"}, "malformed", "not valid UTF-8"),
    "no UTF-8 in a name": ({b"\xff": "x"}, "malformed", "not valid UTF-8"),
    "an empty name": ({"": "x"}, OK, ""),
    "dimensions are no JSON": ({"dimensions": "kind=x"}, "malformed", "is not a JSON object"),
    "dimensions are a list": ({"dimensions": "[]"}, "malformed", "is not a JSON object"),
    "dimensions are nested deeply": ({"dimensions": '{"a":' * 9000}, "malformed", "not a JSON obj"),
    "a dimension twice": (
        {"dimensions": '{"kind": "x"}', "dimensions.kind": "y"},
        "malformed",
        "given twice",
    ),
    "a dimension without a name": ({"dimensions.": "y"}, "malformed", "has no name"),
    "a word": ({"quantity": "many"}, "bad_quantity", "not a plain decimal"),
    "an exponent": ({"quantity": "1e1000000"}, "bad_quantity", "not a plain decimal"),
    "blanks": ({"quantity": " 5\n"}, "bad_quantity", "not a plain decimal"),
    "nothing": ({"quantity": ""}, "bad_quantity", "there is no quantity"),
    "zero": ({"quantity": "0"}, "bad_quantity", "greater than 0"),
    "full-width digits": ({"quantity": "\uff11"}, "bad_quantity", "not a plain decimal"),
    "late": ({"time": "1969-12-31T23:59:59Z"}, "late", "older than"),
    "early": ({"time": "9999-12-31T23:59:59Z"}, "early", "ahead"),
    "no time": ({"time": "yesterday"}, "malformed", "time: write a time with its zone"),
    "the same again": ({"id": "base", "source": "svc"}, AGAIN, ""),
    "conflict": ({"id": "base", "source": "svc", "quantity": "2"}, "conflict", "other content"),
    "an unknown type": ({"type": "meterd.milestone"}, "unknown_type", "meterd.milestone"),
    "a mebibyte": ({"note": "x" * 1024 * 1024}, "too_large", "an event may have 65536"),
}


@pytest.mark.parametrize("source", STREAMS)
def test_flat_fields_in_a_stream_each_have_one_verdict(stage: Stage, source: str) -> None:
    """Redis in both modes, a field for each value, as `redis-cli XADD` writes them."""
    send_good = _sender(stage, source)
    found = {}
    for name, (changes, verdict, says) in FLAT.items():
        usual = {"id": stage.fresh(), "escrow_id": stage.escrow, "meter": "units", "quantity": "1"}
        fields = {key: value for key, value in {**usual, **changes}.items() if value is not None}
        told = stage.verdict(
            lambda fields=fields: stage.xadd(fields, STREAMS[source]),
            lambda: send_good(stage.good()),
        )
        found[name] = _flaw(verdict, says, told)

    assert _flaws(found) == {}


def test_a_field_that_is_given_twice_is_a_dead_letter(stage: Stage) -> None:
    """Which of both was meant, nobody knows."""
    fields = ["id", stage.fresh(), "escrow_id", stage.escrow, "meter", "units"]
    twice = [*fields, "quantity", "1", "quantity", "2"]
    told = stage.verdict(
        lambda: stage.stream.execute_command("XADD", "meterd:usage", "*", *twice),
        lambda: stage.xadd({"event": stage.good()}),
    )

    assert told == ("malformed", "a field is given twice")


BARE: dict[str, tuple[bytes, str, str]] = {
    "good": (b"1", OK, ""),
    "a decimal": (b"0.000000001", OK, ""),
    "a line break behind it": (b"5\n", OK, ""),
    "zero": (b"0", "bad_quantity", "greater than 0"),
    "minus": (b"-1", "bad_quantity", "not a plain decimal"),
    "plus": (b"+1", "bad_quantity", "not a plain decimal"),
    "an exponent": (b"1e400", "bad_quantity", "not a plain decimal"),
    "too many decimals": (b"0.0000000001", "bad_quantity", "more than 9 decimals"),
    "too much": (b"1000000000000001", "bad_quantity", "at most 1e15"),
    "a word behind it": (b"5 apples", "bad_quantity", "not a plain decimal"),
    "an underscore": (b"1_000", "bad_quantity", "not a plain decimal"),
    "hexadecimal": (b"0x10", "bad_quantity", "not a plain decimal"),
    "5,000 digits": (b"9" * 5000, "malformed", "has too many digits"),
    "a word": (b"many", "malformed", "no JSON"),
    "NaN": (b"NaN", "malformed", "no JSON"),
    "full-width digits": ("\uff11".encode(), "malformed", "no JSON"),
    "nothing": (b"", "malformed", "the payload is empty"),
    "blanks": (b" ", "malformed", "no JSON"),
    "a list": (b"[1]", "malformed", "must be an object, and is a list"),
}


def _bare_good(stage: Stage) -> None:
    stage.publish(f"meterd/usage/{stage.escrow}/units", b"1", event_id=stage.fresh())


def test_bare_numbers_each_have_one_verdict(stage: Stage) -> None:
    """MQTT 5, where the topic names all but the quantity and a user property the id."""
    topic = f"meterd/usage/{stage.escrow}/units"
    found = {}
    for name, (payload, verdict, says) in BARE.items():
        told = stage.verdict(
            lambda payload=payload: stage.publish(topic, payload, event_id=stage.fresh()),
            lambda: _bare_good(stage),
        )
        found[name] = _flaw(verdict, says, told)

    assert _flaws(found) == {}


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_what_a_topic_says_must_fit_what_its_payload_says(stage: Stage, version: str) -> None:
    """Disagreement, no id, QoS 0, retained, empty, and unknown names in the topic."""
    base, client = ("meterd/usage", stage.mqtt) if version == "5" else ("old", stage.mqtt3)
    mine, other = f"{base}/{stage.escrow}/units", f"{base}/esc_other/units"
    agreed = stage.good(escrow_id="", meter="")

    def publish(topic: str, payload: bytes, **told: Any) -> Callable[[], None]:
        return lambda: stage.publish(topic, payload, client=client, **told)

    sends: dict[str, tuple[Callable[[], None], str, str]] = {
        "payload and topic agree": (publish(mine, stage.good()), OK, ""),
        "the topic fills what is missing": (publish(mine, agreed), OK, ""),
        "by its agreement's name": (
            publish(mine, stage.good(escrow_id="", agreement="good")),
            OK,
            "",
        ),
        "another agreement": (
            publish(mine, stage.good(escrow_id="", agreement="kinds")),
            "mismatch",
            "different agreements",
        ),
        "another escrow": (
            publish(other, stage.good()),
            "mismatch",
            "the address says escrow_id = esc_other, the payload another",
        ),
        "another meter": (
            publish(mine, stage.good(meter="tokens")),
            "mismatch",
            "the address says meter = units, the payload another",
        ),
        "an unknown escrow": (
            publish(other, stage.good(escrow_id="")),
            "unknown_agreement",
            "no agreement for 'esc_other'",
        ),
        "an unknown meter": (
            publish(f"{base}/{stage.escrow}/gpus", stage.good(meter="")),
            "unknown_meter",
            "no meter 'gpus'; it has units",
        ),
        "an empty level": (publish(f"{base}//units", stage.good()), "malformed", "the topic does"),
        "a bare number without an id": (publish(mine, b"1"), "no_id", "needs an id"),
        "QoS 0": (publish(mine, stage.good(), qos=0), "qos", "sent with QoS 0"),
        "QoS 2": (publish(mine, stage.good(), qos=2), OK, ""),  # Delivered with QoS 1.
        "no payload": (publish(mine, b""), "malformed", "the payload is empty"),
        # Passed on at once it is like any other; what is handed out later is refused.
        "retained while meterd listens": (publish(mine, stage.good(), retain=True), OK, ""),
        "nothing any more to retain": (publish(mine, b"", retain=True), "malformed", "is empty"),
    }
    if version == "5":
        sends["an unknown escrow for a number"] = (
            publish(other, b"1", event_id=stage.fresh()),
            "unknown_agreement",
            "bind it",
        )
        sends["the id of 60 KiB"] = (publish(mine, b"1", event_id="x" * 60_000), "malformed", "256")
    found = {}
    for name, (send, verdict, says) in sends.items():
        told = stage.verdict(send, publish(mine, stage.good()))
        found[name] = _flaw(verdict, says, told)

    assert _flaws(found) == {}


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_retained_message_is_refused_once(tmp_path: Path, stage: Stage, version: str) -> None:
    """A new subscription is handed what was retained; it is a dead letter, not usage.

    MQTT 3.1.1 cannot ask for it only once: there it comes, and is refused, with each connection.
    """
    topic, client_id = f"kept/{version}", f"kept-{version}"
    stage.publish(topic, stage.good(), retain=True)
    rest = (
        f'[[sources]]\nkind = "mqtt"\nport = {stage.mosquitto.port}\nprotocol = "{version}"\n'
        f'topic = "{topic}"\nclient_id = "{client_id}"\n'
    )
    with Node(tmp_path, configuration(stage.sandbox, rest=rest)) as node:
        node.wait_ready()
        node.wait_sources()
        until(lambda: node.get("/v1/dead-letters")["items"], node.log_tail)
        node.stop()
        node.start()
        node.wait_ready()
        node.wait_sources()
        stage.publish(topic, stage.good(escrow_id="unknown"))
        newest = "/v1/dead-letters?limit=1"
        until(lambda: node.get(newest)["items"][0]["reason"] == "unknown_agreement", node.log_tail)
        letters = node.get("/v1/dead-letters")["items"]
        node.stop()
    stage.publish(topic, b"", retain=True)

    times = 1 if version == "5" else 2
    assert [one["reason"] for one in letters] == ["unknown_agreement", *["retained"] * times]
    assert letters[1]["detail"] == "retained messages come again and again; publish without"


@pytest.mark.parametrize("source", STREAMS)
def test_a_stream_that_is_no_stream_is_waited_for_and_a_new_one_is_read(
    stage: Stage, source: str
) -> None:
    """A string at its key, then nothing, then a stream: each is seen, and no event is lost."""
    node, stream = stage.node, STREAMS[source]
    _empty(stage, stream)
    stage.stream.delete(stream)
    stage.stream.set(stream, "no stream")
    until(lambda: node.ask("GET", "/readyz").status == 503, node.log_tail)
    said = until(lambda: _error(node, source, "does not hold a stream"), node.log_tail)
    stage.stream.delete(stream)
    before = node.agreement("good")["events"]
    stage.xadd({"event": stage.good()}, stream)
    node.wait_sources()
    node.wait_agreement("good", events=before + 1)

    assert f"TYPE {stream}" in said


def _error(node: Node, source: str, words: str) -> str:
    """What the status says of a source, when it has these words."""
    (state,) = [one for one in node.get("/v1/status")["sources"] if one["name"] == source]
    return str(state["error"]) if words in state["error"] else ""


def _empty(stage: Stage, stream: str) -> None:
    """Wait until the stream's group shows that everything in it is committed."""

    def read() -> bool:
        (group,) = stage.stream.xinfo_groups(stream)
        last = stage.stream.xinfo_stream(stream)["last-generated-id"]
        return bool(group["last-delivered-id"] == last and group["pending"] == 0)

    until(read, stage.node.log_tail)


def test_a_stream_that_is_deleted_and_recreated_is_read_from_its_beginning(stage: Stage) -> None:
    """New entries with smaller ids than those before are counted all the same, once."""
    before = stage.counts()
    _empty(stage, "meterd:usage")
    stage.stream.delete("meterd:usage")
    for number in (1, 2, 3):
        stage.stream.xadd("meterd:usage", {"event": stage.good()}, id=f"{number}-0")
    until(lambda: stage.counts()["accepted"] >= before["accepted"] + 3, stage.node.log_tail)
    stage.node.wait_sources()
    after = stage.counts()

    assert after["accepted"] - before["accepted"] == 3
    assert after["rejected"] == before["rejected"]


def test_entries_that_are_trimmed_before_they_were_read_are_told_by_their_number(
    stage: Stage,
) -> None:
    """While the daemon stands still three are trimmed away: a person is told, the rest counts.

    The first of the five is on its way already, since a read waits for it, and the last is kept.
    """
    node, before = stage.node, stage.node.agreement("good")["events"]
    _empty(stage, "meterd:usage")
    node.signal(signal.SIGSTOP)
    try:
        for _ in range(5):
            stage.xadd({"event": stage.good()})
        stage.stream.xtrim("meterd:usage", maxlen=1, approximate=False)
    finally:
        node.signal(signal.SIGCONT)
    node.wait_agreement("good", events=before + 2)
    stage.xadd({"event": stage.good()})
    node.wait_agreement("good", events=before + 3)
    gaps = until(
        lambda: [one for one in node.logged("source_gap") if "3 entries left it" in one["event"]],
        node.log_tail,
    )

    assert "raise MAXLEN" in gaps[0]["event"]


# -- Requests --------------------------------------------------------------------------------------


def _raw(node: Node, request: bytes) -> bytes:
    """The beginning of what is answered to these bytes; b"" where the connection is cut off."""
    with socket.create_connection(("127.0.0.1", node.port), 10) as connection:
        try:
            connection.sendall(request)
            return connection.recv(65_536)
        except ConnectionError:
            return b""


REQUESTS: dict[str, tuple[dict[str, str], bytes, int, str]] = {
    "nothing": ({}, b"", 400, "the body is empty; send"),
    "blanks": ({}, b" \r\n\t", 400, "the body is empty; send"),
    "an empty list": ({}, b"[]", 400, "the list is empty; send"),
    "no lines": ({"Content-Type": "application/x-ndjson"}, b"\n\n", 400, "the body is empty"),
    "a form": ({}, b"id=x&meter=units", 400, "no JSON"),
    "a compressed body": (
        {"Content-Encoding": "gzip"},
        gzip.compress(b"0" * 10**7),
        415,
        "send the body uncompressed",
    ),
    "a body above the limit": ({}, b" " * (2 * 1024 * 1024 + 1), 413, "http.body_limit"),
    "a foreign page": ({"Origin": "https://evil.example"}, b"{}", 403, ""),
    "another host's name": ({"Host": "evil.example"}, b"{}", 403, "answers only to localhost"),
    "too many events": ({}, b"[" + b",".join([b"{}"] * 20_001) + b"]", 413, "at most 20000"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_a_problem_and_counts_nothing(stage: Stage, name: str) -> None:
    """4xx as problem+json; no event and no dead letter comes of it."""
    headers, body, status, says = REQUESTS[name]
    before = stage.node.get("/v1/status")
    named = {key.replace("-", "_"): value for key, value in headers.items()}
    answer = stage.node.ask("POST", "/v1/events", body, **named)
    after = stage.node.get("/v1/status")

    assert answer.headers["Content-Type"] == "application/problem+json"
    assert _flaw(str(status), says, _told(answer)) == ""
    assert (before["events"], before["dead_letters"]) == (after["events"], after["dead_letters"])


TOKENS: dict[str, tuple[dict[str, str], int, str]] = {
    "no token": ({}, 401, "Authorization: Bearer TOKEN"),
    "an empty token": ({"Authorization": "Bearer "}, 401, "Authorization: Bearer TOKEN"),
    "an empty header": ({"Authorization": ""}, 401, "Authorization: Bearer TOKEN"),
    "another token": ({"Authorization": "Bearer nobody-knows-this-one"}, 401, "a known token"),
    "another scheme": ({"Authorization": "Basic bWU6bWU="}, 401, "Authorization: Bearer TOKEN"),
    "no ASCII": ({"Authorization": "Bearer \xe9"}, 401, "a known token"),
    "a token that may only read": ({"Authorization": "Bearer READER"}, 403, "the scope ingest"),
}


def test_a_bad_token_is_refused_and_a_good_one_is_let_in(tmp_path: Path, stage: Stage) -> None:
    """None, an empty one, a huge one: each is told how it is done; nothing is counted."""
    tokens = {name: f"{name}-{'0123456789abcdef' * 2}" for name in ("ingest", "read")}
    listed = ", ".join(
        f'{{ name = "{name}", token = "{token}", scopes = ["{name}"] }}'
        for name, token in tokens.items()
    )
    text = configuration(stage.sandbox, http=f"tokens = [{listed}]")
    found = {}
    with Node(tmp_path, text) as node:
        node.wait_ready()
        for name, (headers, status, says) in TOKENS.items():
            named = {key: value.replace("READER", tokens["read"]) for key, value in headers.items()}
            answer = node.ask("POST", "/v1/events", stage.good(), **named)
            assert answer.status == status, name
            assert tokens["read"].encode() not in answer.raw
            found[name] = _flaw(str(status), says, _told(answer))
        # It is refused, or cut off, before it is a request.
        huge = _raw(node, b"GET /v1/status HTTP/1.1\r\nAuthorization: Bearer " + b"x" * 1024 * 1024)
        assert huge[9:12] in {b"400", b""}
        bearer = f"Bearer {tokens['ingest']}"
        good = node.ask("POST", "/v1/events", stage.good(), Authorization=bearer)
        seen = node.ask("GET", "/v1/status", Authorization=f"Bearer {tokens['read']}").json
        node.stop()

    assert _flaws(found) == {}
    assert [one["reason"] for one in good.json["rejected"]] == ["unknown_agreement"]
    assert seen["events"]["rejected"] == 1


def test_any_content_type_is_read_as_what_it_is(stage: Stage) -> None:
    """Curl sends a form's type when it is told nothing."""
    answers = [
        stage.post(stage.good(), kind)
        for kind in ("application/x-www-form-urlencoded", "text/plain", "nonsense", "")
    ]

    assert [answer.status for answer in answers] == [200] * 4


def test_broken_http_is_refused_and_others_are_served(stage: Stage) -> None:
    """Bodies that break off or never end, a head without end, rubbish, and slow-loris beside."""
    head = b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", stage.node.port), 10) for _ in range(20)]
    for number, connection in enumerate(slow):  # Slow-loris: the rest never comes.
        begun = (head, head + b"Content-Length: 100\r\n\r\n{", chunked + b"5\r\n{", b"PO")
        connection.sendall(begun[number % len(begun)])
    requests = {
        "rubbish": b"\x16\x03\x01\x00\r\n\r\n",
        "an endless head": head + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
        "chunks without end": chunked + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 40,
        "a chunk of a negative size": chunked + b"-5\r\nhello\r\n0\r\n\r\n",
        "a chunk whose size is no number": chunked + b"five\r\nhello\r\n0\r\n\r\n",
        "lengths that disagree": head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        "a length and chunks": chunked.removesuffix(b"\r\n")
        + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
        "a length that is no number": head + b"Content-Length: 1e3\r\n\r\n{}",
        "no version": b"POST /v1/events\r\n\r\n",
    }
    answers = {name: _raw(stage.node, request) for name, request in requests.items()}
    good = stage.post(stage.good())
    for connection in slow:
        connection.close()
    again = stage.post(stage.good())

    served = {name: answer for name, answer in answers.items() if answer[9:10] not in {b"4", b""}}
    assert served == {}
    assert (good.json["accepted"], again.json["accepted"]) == (1, 1)


def _memory_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


def test_many_thousand_models_make_no_counters_and_no_metrics(stage: Stage) -> None:
    """Values that no rate names are counted together: what grows is the memory of ids alone."""
    node = stage.node

    def send(part: int) -> None:
        events = [
            {
                "id": stage.fresh("m"),
                "agreement": "models",
                "meter": "tokens",
                "quantity": 1,
                "dimensions": {"model": f"model-{part}-{number}"},
            }
            for number in range(12_500)
        ]
        assert node.send(*events)["accepted"] == 12_500

    send(0)
    lines, memory = node.ask("GET", "/metrics").raw.count(b"\n"), _memory_kib(node.pid)
    for part in (1, 2, 3):
        send(part)
    after = node.ask("GET", "/metrics").raw.count(b"\n"), _memory_kib(node.pid)
    items = node.get("/v1/agreements/models/usage")["items"]

    assert [(item["quantity"], len(items)) for item in items] == [("50000", 1)]
    assert after[0] - lines < 20
    # 37,500 more: a counter, or a remembered spelling, for each would cost several times this.
    assert after[1] - memory < 24 * 1024


# -- CloudEvents, OpenMeter's call, OpenTelemetry --------------------------------------------------

DATA = b'{"meter": "units", "quantity": 1}'
BINARY: dict[str, tuple[dict[str, str], bytes, str, str]] = {
    "good": ({}, DATA, OK, ""),
    "a subject that is percent-encoded": ({"subject": "%67ood"}, DATA, OK, ""),
    "an attribute of one's own": ({"traceparent": "00-1"}, DATA, OK, ""),
    "specversion 0.3": ({"specversion": "0.3"}, DATA, "malformed", 'only "1.0" is known'),
    "no type": ({"type": ""}, DATA, "malformed", "must say what it is"),
    "an unknown type": ({"type": "com.example.x"}, DATA, "unknown_type", "com.example.x"),
    "no id": ({"id": ""}, DATA, "no_id", "the event has no id"),
    "an unknown subject": ({"subject": "nobody"}, DATA, "unknown_agreement", "bind it"),
    "no data": ({}, b"", "malformed", "there is none, and meterd.usage needs it"),
    "data that are no JSON": ({}, b"meter=units", "malformed", "no JSON"),
    "data that are a list": ({}, b"[1]", "malformed", "must be an object, and is a list"),
    "data of XML": ({"Content-Type": "text/xml"}, b"<x/>", "malformed", "text/xml cannot be read"),
    "brackets": ({}, b"[" * 20_000, "malformed", "must be an object, and is a list"),
    "no time": ({"time": "yesterday"}, DATA, "malformed", "time: write a time with its zone"),
}
# What only headers can get wrong: refused as a whole.
HEADERS: dict[str, tuple[dict[str, str], str]] = {
    "percent-encoding that is no UTF-8": ({"ce-subject": "%FF%FE"}, "ce-subject: its percent-enc"),
    "data in a header": ({"ce-data": "{}"}, "'data' cannot be an attribute"),
    "a name with a point": ({"ce-x.y": "1"}, "'x.y' cannot be an attribute"),
    "a name without end": ({"ce-" + "x" * 70: "1"}, "cannot be an attribute"),
}


def _attributes(stage: Stage, changes: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The attributes of a CloudEvent that is accepted, with changes; and its content type."""
    usual = {"specversion": "1.0", "id": stage.fresh("b"), "source": "/svc", "subject": "good"}
    said = {**usual, "type": "meterd.usage", "Content-Type": "application/json", **changes}
    kind = said.pop("Content-Type")
    return {name: value for name, value in said.items() if value}, kind


def test_a_bad_cloudevent_in_headers_is_told_what_is_wrong(stage: Stage) -> None:
    """Binary mode over HTTP: one verdict, or a problem where a header itself is wrong."""
    found = {}
    for name, (changes, body, verdict, says) in BINARY.items():
        attributes, kind = _attributes(stage, changes)
        headers = {f"ce-{key}": value for key, value in attributes.items()}
        answer = stage.node.ask("POST", "/v1/events", body, **headers, **{"Content-Type": kind})
        found[name] = _flaw(verdict, says, _told(answer))
    for name, (changes, says) in HEADERS.items():
        attributes, kind = _attributes(stage, {})
        headers = {**{f"ce-{key}": value for key, value in attributes.items()}, **changes}
        answer = stage.node.ask("POST", "/v1/events", DATA, **headers, **{"Content-Type": kind})
        found[name] = _flaw(WHOLE, says, _told(answer))

    assert _flaws(found) == {}


def test_a_bad_cloudevent_in_user_properties_is_a_dead_letter(stage: Stage) -> None:
    """Binary mode over MQTT 5."""
    found = {}
    for name, (changes, body, verdict, says) in BINARY.items():
        encoded = "percent" in name  # Nothing is decoded here: a property is plain UTF-8.
        attributes, kind = _attributes(stage, {} if encoded else changes)

        def send(
            attributes: dict[str, str] = attributes, kind: str = kind, body: bytes = body
        ) -> None:
            properties = Properties(PacketTypes.PUBLISH)
            properties.UserProperty = list(attributes.items())
            properties.ContentType = kind
            stage.mqtt.publish("events/in", body, 1, properties=properties).wait_for_publish(10)

        told = stage.verdict(send, lambda: stage.publish("events/in", stage.good()))
        found[name] = _flaw(verdict, says, told)

    assert _flaws(found) == {}


def test_what_a_content_type_of_cloudevents_promises_must_be_there(stage: Stage) -> None:
    """One where one is said, a list where a batch is said."""
    one, batch = "application/cloudevents+json", "application/cloudevents-batch+json"
    event = stage.payload(ROWS["a CloudEvent"])
    found = {
        "a list for one": _flaw(WHOLE, "is one CloudEvent", _told(stage.post(b"[]", one))),
        "one for a list": _flaw(WHOLE, "is a list of CloudEvents", _told(stage.post(event, batch))),
        "nothing": _flaw(WHOLE, "", _told(stage.post(b"", one))),
        "an empty batch": _flaw(WHOLE, "the list is empty", _told(stage.post(b"[]", batch))),
        "good": _flaw(OK, "", _told(stage.post(event, one))),
        "known": _flaw(AGAIN, "", _told(stage.post(b"[" + event + b"]", batch))),
    }

    assert _flaws(found) == {}


def test_openmeters_call_says_what_it_did_not_take(stage: Stage) -> None:
    """204 without a body where something was taken, 400 with the reason where nothing was."""

    def post(body: bytes, kind: str = "application/cloudevents+json") -> Any:
        return stage.node.ask("POST", "/api/v1/events", body, Content_Type=kind)

    before = stage.counts()
    bad = stage.payload(ROWS["specversion 0.3"])
    answers = {
        "good": post(stage.payload(ROWS["a CloudEvent"])),
        "partly": post(
            b"[" + stage.payload(ROWS["a CloudEvent"]) + b"," + bad + b"]",
            "application/cloudevents-batch+json",
        ),
        "bad": post(bad),
        "no JSON": post(b"{"),
        "nothing": post(b""),
    }
    after = stage.counts()

    assert [answer.status for answer in answers.values()] == [204, 204, 400, 400, 400]
    assert answers["partly"].headers["Meterd-Rejected"] == "1"
    assert 'only "1.0" is known' in answers["bad"].json["detail"]
    assert "breaks off" in answers["no JSON"].json["detail"]
    assert (after["accepted"] - before["accepted"], after["rejected"] - before["rejected"]) == (
        2,
        2,
    )


JSON_TYPE, PROTOBUF = "application/json", "application/x-protobuf"
EXPORTS: dict[str, tuple[str, bytes, dict[str, str], int]] = {
    "nothing at all": (PROTOBUF, b"", {}, 200),  # An empty export is one.
    "an empty object": (JSON_TYPE, b"{}", {}, 200),
    "rubbish": (PROTOBUF, b"\xff\xff\xff", {}, 400),
    "text as protobuf": (PROTOBUF, b"resourceSpans", {}, 400),
    "a length beyond the end": (PROTOBUF, b"\x0a\x7f\x00", {}, 400),
    "no JSON": (JSON_TYPE, b"{", {}, 400),
    "a list": (JSON_TYPE, b"[]", {}, 400),
    "null": (JSON_TYPE, b"null", {}, 400),
    "brackets": (JSON_TYPE, b'{"resourceSpans":' + b"[" * 60_000, {}, 400),
    "another kind": ("text/plain", b"{}", {}, 415),
    "gzip that is none": (PROTOBUF, b"no gzip", {"Content-Encoding": "gzip"}, 400),
    "a bomb": (PROTOBUF, gzip.compress(b"\0" * 10**8), {"Content-Encoding": "gzip"}, 413),
    "another compression": (PROTOBUF, b"x", {"Content-Encoding": "br"}, 415),
}


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/logs"])
def test_a_bad_export_of_opentelemetry_is_refused_and_counts_nothing(
    stage: Stage, path: str
) -> None:
    """In words, whichever encoding it came in."""
    before, wrong = stage.counts(), {}
    for name, (kind, body, headers, status) in EXPORTS.items():
        answer = stage.node.ask("POST", path, body, **{"Content-Type": kind, **headers})
        if answer.status != status or (status != 200 and len(answer.raw) < 20):
            wrong[name] = (answer.status, answer.raw[:200])
        elif JARGON.search(answer.raw.decode("utf-8", "replace")):
            wrong[name] = answer.raw

    assert wrong == {}
    assert stage.counts() == before


def _span(attributes: Mapping[str, object]) -> bytes:
    listed = [
        {"key": key, "value": {"intValue" if type(value) is int else "stringValue": value}}
        for key, value in attributes.items()
    ]
    ids = {"traceId": "5b8efff798038103d269b633813fc60c", "spanId": "eee19b7ec3c1b174"}
    ended = str(time.time_ns())
    spans = [{**ids, "name": "chat", "endTimeUnixNano": ended, "attributes": listed}]
    return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode()


def test_a_span_that_cannot_be_charged_is_a_dead_letter_and_is_told(stage: Stage) -> None:
    """As OTLP says: 200 with what was rejected, which is not to be sent again."""
    chat = {
        "gen_ai.operation.name": "chat",
        "gen_ai.usage.input_tokens": 5,
        "meterd.agreement": "nobody",
    }
    before = stage.counts()
    answer = stage.node.ask("POST", "/v1/traces", _span(chat), Content_Type=JSON_TYPE)
    after = stage.counts()

    assert (answer.status, after["rejected"] - before["rejected"]) == (200, 1)
    assert "no agreement for 'nobody'" in answer.json["partialSuccess"]["errorMessage"]


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
    late = json.loads(stage.good(quantity=7, time=moment(days=-30)))
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


def test_the_daemon_goes_on_and_its_counters_add_up(stage: Stage) -> None:
    """By every way a good event is accepted, and each delivery so far has exactly one verdict."""
    node, before = stage.node, stage.counts()
    for source in (*STREAMS, *TOPICS):
        _sender(stage, source)(stage.good())
    _bare_good(stage)
    stage.publish(f"old/{stage.escrow}/units", stage.good(), client=stage.mqtt3)
    assert stage.post(stage.good()).json["accepted"] == 1
    until(lambda: stage.counts()["accepted"] == before["accepted"] + 7, node.log_tail)
    metrics = _samples(node.ask("GET", "/metrics").raw.decode())
    status = node.get("/v1/status")
    deliveries, verdicts = (
        _by_source(metrics, name) for name in ("meterd_deliveries_total", "meterd_events_total")
    )
    rejections = sum(value for (name, _), value in metrics.items() if name == REJECTIONS)

    assert verdicts == deliveries
    assert {"http", "otlp", *STREAMS, *TOPICS, "topics", "oldtopics"} <= deliveries.keys()
    assert sum(deliveries.values()) == sum(status["events"].values())
    assert rejections == status["events"]["rejected"]
    assert stage.counts()["rejected"] == before["rejected"]


REJECTIONS = "meterd_rejections_total"


def _by_source(metrics: Mapping[tuple[str, str], int], metric: str) -> dict[str, int]:
    """The sums of a metric by source, without those of which nothing came."""
    sums: dict[str, int] = {}
    for (name, labels), value in metrics.items():
        if name == metric and value:
            source = re.search(r'source="(\w+)"', labels)[1]
            sums[source] = sums.get(source, 0) + value
    return sums


def _samples(text: str) -> dict[tuple[str, str], int]:
    """The whole numbers of the metrics, by name and labels."""
    found = re.findall(r"^(\w+)\{(.*)\} (\d+)\.0$", text, re.MULTILINE)
    return {(name, labels): int(value) for name, labels, value in found}


def test_both_brokers_are_empty_when_all_bad_inputs_were_sent(stage: Stage) -> None:
    """Everything was acknowledged: a client that takes the session over is handed nothing old."""
    for stream in STREAMS.values():
        _empty(stage, stream)
    status = stage.node.get("/v1/status")
    stage.node.stop()
    sessions = {**TOPICS, "topics": f"meterd/usage/{stage.escrow}/units"}
    sessions["oldtopics"] = f"old/{stage.escrow}/units"
    first = {name: _first_message(stage, name, topic) for name, topic in sessions.items()}
    records = stage.node.logged()

    assert stage.node.returncode == 0
    assert {one["unacked"] for one in status["sources"]} == {0}
    assert set(first.values()) == {b"a marker"}
    assert [one for one in records if one["level"] in {"error", "critical"}] == []
    assert len(records) < 400  # No line for each bad event.


def _first_message(stage: Stage, client_id: str, topic: str) -> bytes:
    """Take a session over, publish a marker, and say which message comes first."""
    arrived, payloads = threading.Event(), []

    def on_message(_: object, __: object, message: paho.MQTTMessage) -> None:
        payloads.append(message.payload)
        arrived.set()

    if client_id.startswith("old"):
        version, told = paho.MQTTv311, {"clean_session": False}
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id, protocol=version, **told)
        client.connect("127.0.0.1", stage.mosquitto.port)
    else:
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 3600
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5)
        client.connect("127.0.0.1", stage.mosquitto.port, clean_start=False, properties=session)
    client.on_message = on_message
    client.loop_start()
    try:
        stage.publish(topic, b"a marker")
        assert arrived.wait(10)
    finally:
        client.disconnect()
        client.loop_stop()
    return bytes(payloads[0])
