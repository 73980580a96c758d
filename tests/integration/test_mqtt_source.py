from __future__ import annotations

import asyncio
import time

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from meterd.core.events import Reason
from meterd.errors import SourceUnavailable
from meterd.sources.mqtt import MqttSettings, MqttSource
from tests.servers import MosquittoServer, free_port

TOPIC = "meterd/usage/esc_1/tokens"
PROTOCOLS = ("5", "3.1.1")


@pytest.fixture
def server():
    with MosquittoServer() as running:
        yield running


@pytest.fixture
async def make(server):
    """Sources that are closed at the end, whatever happened."""
    made = []

    def one(protocol="5", **settings):
        settings = {"host": server.host, "port": server.port, "connect_timeout_s": 3.0, **settings}
        made.append(MqttSource(MqttSettings("m", protocol=protocol, **settings)))
        return made[-1]

    yield one
    for source in made:
        await source.close()


def publish(server, *payloads, topic=TOPIC, qos=1, retain=False, properties=()):
    """Publish in order by another client, and return when the broker has taken them all."""
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    client.max_queued_messages_set(0)
    client.connect(server.host, server.port)
    client.loop_start()
    about = Properties(PacketTypes.PUBLISH)
    if properties:
        about.UserProperty = list(properties)
    try:
        sent = [client.publish(topic, payload, qos, retain, about) for payload in payloads]
        for info in sent:
            info.wait_for_publish(20)
    finally:
        client.disconnect()
        client.loop_stop()


async def apublish(server, *payloads, **options):
    await asyncio.to_thread(lambda: publish(server, *payloads, **options))


async def take(source, count):
    """Read and ack until `count` payloads came."""
    payloads, last = [], None
    while len(payloads) < count:
        last = await asyncio.wait_for(source.read(), 20)
        payloads += last.payloads
        await source.ack(last)
    return payloads, last


def numbers(count, start=0):
    return [b'{"id":"%d"}' % number for number in range(start, start + count)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_source_reads_in_order_with_the_fields_of_the_topic(server, make, protocol):
    """Messages come in order and whole, with what their topic says beside them."""
    source = make(protocol)
    warnings = await source.connect(None)
    await apublish(server, *numbers(100))
    payloads, last = await take(source, 100)

    assert (list(warnings), payloads, await source.lag()) == ([], numbers(100), None)
    assert last.fields[-1] == {"escrow_id": "esc_1", "meter": "tokens"}
    assert dict(last.faults) == {}


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_unacked_messages_come_again_and_acked_ones_do_not(server, make, protocol):
    """After a reconnect the broker sends exactly what was not acknowledged, then the new."""
    source = make(protocol, batch=5)
    await source.connect(None)
    await apublish(server, *numbers(10))
    done, last = await take(source, 5)
    while len(done) < 10:
        held = await source.read()
        done += held.payloads
    await source.close()
    await apublish(server, *numbers(3, start=10))
    warnings = await source.connect(last.position)
    payloads, _ = await take(source, 8)

    assert (list(warnings), payloads) == ([], numbers(8, start=5))


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_ack_of_an_earlier_connection_is_dropped(server, make, protocol):
    """A late ack says nothing on a new connection; the message comes again and is acked there."""
    source = make(protocol)
    await source.connect(None)
    await apublish(server, b"{}")
    late = await source.read()
    await source.connect(None)
    await source.ack(late)
    payloads, _ = await take(source, 1)

    assert payloads == [b"{}"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_killed_broker_ends_the_read_and_its_queue_survives(server, make, protocol):
    """A kill ends the read soon; after the restart what was waiting comes."""
    source = make(protocol)
    await source.connect(None)
    reading = asyncio.create_task(source.read())
    await asyncio.sleep(0)
    server.kill()
    with pytest.raises(SourceUnavailable, match=str(server.port)):
        await asyncio.wait_for(reading, 10)
    with pytest.raises(SourceUnavailable, match=r"refused|failed"):
        await source.connect(None)
    server.start()
    await source.connect(None)
    await apublish(server, *numbers(3))
    await source.read()
    await source.close()
    await asyncio.to_thread(server.restart)
    warnings = await source.connect(None)
    payloads, _ = await take(source, 3)

    assert (list(warnings), payloads) == ([], numbers(3))


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_ack_to_a_killed_broker_is_unavailable(server, make, protocol):
    """An ack that cannot be told raises once the loss is known, and so does the next read."""
    source = make(protocol)
    await source.connect(None)
    await apublish(server, b"{}")
    deliveries = await source.read()
    server.kill()
    with pytest.raises(SourceUnavailable):
        await asyncio.wait_for(source.read(), 10)
    with pytest.raises(SourceUnavailable):
        await source.ack(deliveries)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("same_process", [True, False])
async def test_lost_session_is_told_when_one_was_expected(server, make, protocol, same_process):
    """A broker without our session has lost what waited: a warning, even after our restart."""
    source = make(protocol)
    assert list(await source.connect(None)) == []
    await apublish(server, b"{}")
    _, last = await take(source, 1)
    await source.close()
    server.stop()
    server.forget()
    server.start()
    after = source if same_process else make(protocol)
    warnings = await after.connect(None if same_process else last.position)

    assert len(warnings) == 1
    assert "no session for the client id meterd-m" in warnings[0]


async def test_position_of_another_client_id_expects_no_session(make):
    """A new client id begins a new session, and nothing is wrong with that."""
    assert list(await make(client_id="new").connect("session meterd-m")) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_retained_messages_are_refused_once(server, make, protocol):
    """What was retained before us is a fault; a live message counts, retained or not."""
    await apublish(server, b'{"id":"old"}', retain=True)
    source = make(protocol)
    await source.connect(None)
    old = await source.read()
    await source.ack(old)
    await apublish(server, b'{"id":"live"}', retain=True)
    live = await source.read()
    await source.ack(live)

    assert (old.faults[0].reason, dict(live.faults)) == (Reason.RETAINED, {})


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_qos_0_is_a_fault_unless_allowed(server, make, protocol, allowed):
    """What a broker may lose or repeat is not charged unless somebody said so."""
    source = make(protocol, allow_qos0=allowed)
    await source.connect(None)
    await apublish(server, b"{}", qos=0)
    deliveries = await source.read()
    await source.ack(deliveries)

    assert [fault.reason for fault in deliveries.faults.values()] == [Reason.QOS] * (not allowed)


async def test_qos_2_publishers_are_read_with_qos_1(server, make):
    """A QoS 2 publisher is served, each message once, at the QoS we asked for."""
    source = make()
    await source.connect(None)
    await apublish(server, *numbers(3), qos=2)

    assert (await take(source, 3))[0] == numbers(3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_bad_messages_are_faults_and_do_not_come_again(server, make, protocol):
    """Empty payloads and bare numbers without an id are acked as what they are, once."""
    source = make(protocol)
    await source.connect(None)
    await apublish(server, b"", b"12", b"{}")
    deliveries = await source.read()
    while len(deliveries.payloads) < 3:  # Whatever was cut into two batches comes as one again.
        await source.connect(None)
        deliveries = await source.read()
    await source.ack(deliveries)
    await source.close()
    await apublish(server, b'{"id":"next"}')
    await source.connect(None)

    assert {i: fault.reason for i, fault in deliveries.faults.items()} == {
        0: Reason.MALFORMED,
        1: Reason.NO_ID,
    }
    assert (await take(source, 1))[0] == [b'{"id":"next"}']


async def test_bare_number_with_an_id_property_is_usage(server, make):
    """The user property id makes a bare number an event that can be told from another."""
    source = make()
    await source.connect(None)
    await apublish(server, b"12.5", properties=[("id", "req-1")])
    deliveries = await source.read()

    assert (deliveries.payloads, deliveries.ids) == ([b'{"quantity":"12.5"}'], ["req-1"])
    assert dict(deliveries.faults) == {}


async def test_broker_that_overruns_the_receive_maximum_is_read_to_the_end(server, make):
    """A small receive maximum, kept to or not, neither loses a message nor the connection."""
    source = make(receive_maximum=10, batch=7)
    await source.connect(None)
    await source.close()
    sent = numbers(2000)
    await apublish(server, *sent)
    await source.connect(None)

    assert (await take(source, 2000))[0] == sent


async def test_queue_is_bounded_while_nobody_reads(server, make):
    """A flood stops at the bound, and goes on when somebody reads."""
    source = make(receive_maximum=50, batch=50, allow_qos0=True)
    await source.connect(None)
    sent = [b'{"id":"%d","pad":"%s"}' % (number, b"x" * 50_000) for number in range(300)]
    publishing = asyncio.create_task(apublish(server, *sent))
    await publishing

    assert len(source._inbox.arrivals) < 100
    assert (await take(source, 300))[0] == sent


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_shared_subscription_gives_each_message_to_one(server, make, protocol):
    """Two sources of one share get every message once between them."""
    sources = [make(protocol, client_id=name, share="g") for name in "ab"]
    for source in sources:
        await source.connect(None)
    await apublish(server, *numbers(20))
    halves = [await take(source, 10) for source in sources]

    assert sorted(halves[0][0] + halves[1][0]) == sorted(numbers(20))


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_cancelled_read_loses_nothing(server, make, protocol):
    """A read that was cancelled while it waited takes nothing with it."""
    source = make(protocol)
    await source.connect(None)
    reading = asyncio.create_task(source.read())
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    await apublish(server, b"{}")

    assert (await take(source, 1))[0] == [b"{}"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_quiet_connection_is_kept_alive(make, protocol, server):
    """Pings keep a connection that nothing is said on for longer than its keep-alive."""
    source = make(protocol, keep_alive_s=1)
    await source.connect(None)
    reading = asyncio.create_task(source.read())
    done, _ = await asyncio.wait([reading], timeout=3.5)
    assert not done
    await apublish(server, b"{}")

    assert (await asyncio.wait_for(reading, 10)).payloads == [b"{}"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_broker_that_is_down_is_unavailable_with_its_address(make, protocol):
    """A refused connection names host and port."""
    port = free_port()
    with pytest.raises(SourceUnavailable, match=str(port)):
        await make(protocol, port=port).connect(None)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_listener_that_never_answers_is_unavailable_in_time(make, protocol):
    """A listener that accepts and stays silent ends in the connect time-out."""
    writers = []
    silent = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    began = time.monotonic()
    with pytest.raises(SourceUnavailable, match="no answer within"):
        await make(protocol, port=port, connect_timeout_s=0.2).connect(None)
    for writer in writers:
        writer.close()
    silent.close()

    assert time.monotonic() - began < 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_second_client_of_the_same_id_ends_the_first(make, protocol):
    """Two daemons with one client id cannot both read: the first one hears of it."""
    first, second = make(protocol), make(protocol)
    await first.connect(None)
    await second.connect(None)
    with pytest.raises(SourceUnavailable):
        await asyncio.wait_for(first.read(), 10)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_wrong_password_is_unavailable_and_is_not_shown(protocol):
    """A refused password never appears in the error; the right one is let in."""
    with MosquittoServer(users={"meterd": "right-s3cret"}) as server:
        settings = MqttSettings(
            "m", server.host, server.port, protocol=protocol, username="meterd",
            password="wrong-s3cret",
        )  # fmt: skip
        with pytest.raises(SourceUnavailable, match=r"(?i)not authori[sz]ed") as caught:
            await MqttSource(settings).connect(None)
        good = MqttSource(
            MqttSettings(
                "m", server.host, server.port, protocol=protocol, username="meterd",
                password="right-s3cret",
            )
        )  # fmt: skip
        await good.connect(None)
        await good.close()

    assert "s3cret" not in str(caught.value)


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*SSLSocket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_tls_is_spoken_and_its_certificate_checked(protocol):
    """With the right authority messages come; without it the connection is refused by us."""
    with MosquittoServer(tls=True) as server:
        about = {"host": server.host, "port": server.port, "tls": True, "protocol": protocol}
        source = MqttSource(MqttSettings("m", tls_ca_file=str(server.ca_file), **about))
        await source.connect(None)
        await source.close()
        with pytest.raises(SourceUnavailable, match=r"(?i)certificate"):
            await MqttSource(MqttSettings("m", **about)).connect(None)
