from __future__ import annotations

import msgspec
import pytest

from meterd.core.events import Reason
from meterd.errors import ConfigurationError, SourceUnavailable
from meterd.sources.mqtt import Message, MqttSettings, MqttSource, Reading, TopicTemplate

TEMPLATE = TopicTemplate.parse("meterd/usage/{escrow_id}/{meter}")
TOPIC = "meterd/usage/esc_1/tokens"


def read_one(payload=b"{}", topic=TOPIC, *, retain=False, packet_id=1, properties=(), **allow):
    reading = Reading(TEMPLATE, **{"anonymous": False, "qos0": False, **allow})
    return reading.deliveries([Message(topic, payload, retain, packet_id, properties)])


ATTRIBUTES = (
    ("specversion", "1.0"),
    ("type", "completion"),
    ("source", "svc"),
    ("id", "e"),
    ("webhook-id", "no attribute"),
)


def test_binary_cloudevent_is_put_together():
    """Its attributes are user properties, its data the payload; any payload, a number too."""
    for payload in (b'{"n": 1}', b"7"):
        deliveries = read_one(payload, properties=ATTRIBUTES)
        document = msgspec.json.decode(deliveries.payloads[0])
        expected = {name: value for name, value in ATTRIBUTES if name.isalnum()}
        assert document == {**expected, "data": msgspec.json.decode(payload)}
        assert not deliveries.faults
    assert not read_one(b"", properties=ATTRIBUTES).faults  # An event may be its type alone.


def test_structured_cloudevent_stays_as_it_came():
    """Whatever stands beside it: the content type tells."""
    reading = Reading(TEMPLATE, anonymous=False, qos0=False)
    kind = "application/cloudevents+json; charset=utf-8"
    payload = b'{"specversion": "1.0"}'
    deliveries = reading.deliveries([Message(TOPIC, payload, False, 1, ATTRIBUTES, kind)])
    assert deliveries.payloads == [payload]


def test_binary_cloudevent_with_an_attribute_twice_is_a_fault():
    """Nobody can say which is meant."""
    deliveries = read_one(b"{}", properties=(*ATTRIBUTES, ("id", "f")))
    assert deliveries.faults[0].reason is Reason.MALFORMED
    assert "id is given twice" in deliveries.faults[0].detail


def test_template_becomes_a_filter_and_reads_topics():
    """Named levels are wildcards for the broker and fields for us."""
    assert TEMPLATE.filter == "meterd/usage/+/+"
    assert TEMPLATE.fields(TOPIC) == {"escrow_id": "esc_1", "meter": "tokens"}
    assert TEMPLATE.names_usage


@pytest.mark.parametrize(
    "topic", ["", "meterd/usage/e", "meterd/usage/e/m/x", "other/usage/e/m", "meterd/usage//m"]
)
def test_topic_that_does_not_fit_says_nothing(topic):
    """A topic of another shape, or with an empty name, gives no fields."""
    assert TEMPLATE.fields(topic) is None


def test_template_may_leave_levels_open():
    """A plain + matches anything and names nothing."""
    template = TopicTemplate.parse("+/{meter}")

    assert template.fields("x/m") == {"meter": "m"}
    assert not template.names_usage


@pytest.mark.parametrize(
    "text",
    ["", "a//b", "a/#", "a/{meter}/{meter}", "a/{colour}", "a/x{meter}", "$share/g/a", "a/{", "a+"],
)
def test_template_with_a_mistake_is_refused_with_its_key(text):
    """A template that cannot be read is a configuration mistake that names its key."""
    with pytest.raises(ConfigurationError, match=r"sources\.m\.topic"):
        MqttSource(MqttSettings("m", "h", topic=text))


def test_json_payload_passes_as_it_is():
    """A JSON payload is untouched, and the topic's names stand beside it."""
    deliveries = read_one(b'{"id": "a"}')

    assert (deliveries.payloads, deliveries.ids, deliveries.faults) == ([b'{"id": "a"}'], None, {})
    assert deliveries.fields == [{"escrow_id": "esc_1", "meter": "tokens"}]


@pytest.mark.parametrize("number", ["12", "0.50", " 7\n", "-5", "1e5"])
def test_bare_number_with_an_id_becomes_a_quantity(number):
    """A number is carried as text with every digit; whether it is good is not decided here."""
    deliveries = read_one(number.encode(), properties=[("x", "y"), ("id", "req-1")])

    assert msgspec.json.decode(deliveries.payloads[0]) == {"quantity": number.strip()}
    assert (deliveries.ids, deliveries.faults) == (["req-1"], {})


def test_bare_number_without_an_id_is_a_fault():
    """Nothing tells a redelivered number from another one."""
    assert read_one(b"12").faults[0].reason == Reason.NO_ID


def test_bare_number_without_an_id_gets_one_when_allowed():
    """With allow_anonymous every arrival without an id gets one of its own."""
    first, second = (read_one(b"12", anonymous=True) for _ in range(2))

    assert (first.faults, second.faults) == ({}, {})
    assert first.ids != second.ids


@pytest.mark.parametrize(
    ("arrival", "reason"),
    [
        ({"payload": b""}, Reason.MALFORMED),
        ({"topic": "meterd/usage//tokens"}, Reason.MALFORMED),
        ({"retain": True}, Reason.RETAINED),
        ({"packet_id": None}, Reason.QOS),
        ({"packet_id": None, "retain": True}, Reason.RETAINED),
    ],
)
def test_bad_arrival_is_a_fault(arrival, reason):
    """What the transport knows to be bad is a fault with its reason and keeps its payload."""
    deliveries = read_one(**arrival)

    assert deliveries.faults[0].reason == reason
    assert deliveries.payloads == [arrival.get("payload", b"{}")]


def test_qos_0_is_taken_when_allowed():
    """With allow_qos0 a QoS 0 message is a delivery like any other."""
    assert read_one(packet_id=None, qos0=True).faults == {}


@pytest.mark.parametrize("payload", [b"null", b"[]", b"NaN", b"\xff", b"9" * 65, b"  ", b"1\xff"])
def test_other_payloads_pass_for_the_core_to_judge(payload):
    """What is neither an object nor a bare number is handed on untouched."""
    assert read_one(payload).payloads == [payload]


def test_settings_never_show_a_password():
    """Neither the address nor the settings' repr shows the password."""
    settings = MqttSettings("m", "h", username="u", password="s3cret", tls=True)

    assert "s3cret" not in repr(settings) + MqttSource(settings).address


def test_tls_file_that_is_missing_is_a_mistake_with_its_key():
    """A certificate file that cannot be read is found at start."""
    with pytest.raises(ConfigurationError, match=r"sources\.m\.tls"):
        MqttSource(MqttSettings("m", "h", tls=True, tls_ca_file="no-such-file"))


async def test_read_without_a_connection_says_so():
    """Before connect a read raises SourceUnavailable; close does nothing."""
    source = MqttSource(MqttSettings("m", "h"))
    await source.close()
    with pytest.raises(SourceUnavailable, match="not connected"):
        await source.read()
