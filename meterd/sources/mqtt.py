"""Usage events from an MQTT broker: QoS 1, a session that outlives us, and PUBACK after the commit.

The broker is the memory: it keeps what is not acknowledged, under our fixed client id, and sends it
again when we connect again. So the rules are about acknowledging:

- never more than QoS 1 is asked for; identities make "at least once" into "once";
- PUBACKs go out after the commit, in order of arrival, one write for each batch;
- an acknowledgement belongs to the connection its message came over. After a reconnect the same
  packet id may stand for another message, so what is late is dropped: the broker sends again what
  it has no PUBACK for, and by then it is known as a duplicate;
- a bad message is handed on with its fault and acknowledged like any other, or it would never end.

A broker that forgets the session (`session present` 0 where one was expected) has lost what was
waiting for us. That cannot be repaired here, but it is said. What a broker drops because its own
queue is full it tells nobody: set `max_queued_messages` high enough.

Two engines do the wire, behind `Link`. MQTT 5: `mqtt5`, a codec without any input or output, with
the socket in our hands (250 k messages/s). MQTT 3.1.1, for brokers that know no 5: paho, driven by
this event loop without its thread (slower, but so is a broker whose window there is usually 20).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import mqtt5
import msgspec
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from meterd.core import envelopes
from meterd.core.events import Reason
from meterd.errors import ConfigurationError, Mistake, SourceUnavailable
from meterd.sources import Deliveries, Fault, Proof

TOPIC_FIELDS = frozenset({"escrow_id", "agreement", "meter", "source", "type"})
ID_PROPERTY = "id"
SIGNED_MIN = 3  # A signature takes three user properties; with fewer nobody looks for it.
PUBACK_SUCCESS = 0x40020000  # The four bytes of a PUBACK without a reason code; the id is added.
CLOSE_TIMEOUT_S = 1  # A broker that does not part within this is left.
NUMBER_CHARS_MAX = 64  # A longer text is no number; the core says so.
# The codec's enumerations compare for equality alone, whatever its stub file says.
GRANTED = (
    mqtt5.SubAckReasonCode.GRANTED_QOS_AT_MOST_ONCE,
    mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE,
)
TOPICS_KNOWN_MAX = 100_000  # Topics are remembered to be read once; a flood of new ones is not.


@dataclass(frozen=True, slots=True)
class MqttSettings:
    """Where the broker is and how it is spoken to. Passwords are never shown."""

    name: str
    host: str
    port: int = 1883
    topic: str = "meterd/usage/{escrow_id}/{meter}"
    client_id: str = ""  # "" is meterd-NAME. It names the session, so it must never change.
    protocol: Literal["5", "3.1.1"] = "5"
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    tls_ca_file: str = ""  # "" is the system's.
    tls_cert_file: str = ""
    tls_key_file: str = ""
    share: str = ""  # The group of a shared subscription.
    receive_maximum: int = 5000  # Caps a group commit; a broker's usual 20 would cap it at 20.
    session_expiry_s: int = 7 * 24 * 3600
    keep_alive_s: int = 30
    connect_timeout_s: float = 5.0
    batch: int = 5000
    allow_anonymous: bool = False  # Take bare numbers without an id: a redelivery counts twice.
    allow_qos0: bool = False  # Take what the broker may lose.


# Topics -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TopicTemplate:
    """A topic with named levels, such as `meterd/usage/{escrow_id}/{meter}`, and what they say."""

    filter: str
    names: frozenset[str]
    _levels: tuple[tuple[str, str], ...]  # ("is", text), ("name", field) or ("any", "").

    @classmethod
    def parse(cls, text: str) -> TopicTemplate:
        """Read a template of levels: text, `{field}` and `+`. Raises `ValueError` if wrong."""
        levels = tuple(_level(part) for part in text.split("/"))
        names = [value for kind, value in levels if kind == "name"]
        if len(set(names)) != len(names):
            raise ValueError("a field stands in it twice")
        wanted = "/".join(value if kind == "is" else "+" for kind, value in levels)
        return cls(wanted, frozenset(names), levels)

    @property
    def names_usage(self) -> bool:
        """Whether the topic says all but the quantity, so that a payload may be a bare number."""
        return "meter" in self.names and bool(self.names & {"escrow_id", "agreement"})

    def fields(self, topic: str) -> dict[str, str] | None:
        """What a topic says by name; None when it does not fit."""
        parts = topic.split("/")
        if len(parts) != len(self._levels):
            return None
        fields = {}
        for (kind, value), part in zip(self._levels, parts, strict=True):
            if kind == "name":
                fields[value] = part
            if (kind == "is" and part != value) or (kind == "name" and not part):
                return None
        return fields


def _level(part: str) -> tuple[str, str]:
    if part == "+":
        return "any", ""
    named = re.fullmatch(r"\{([a-z_]+)\}", part)
    if named is None:
        if not part or set(part) & set("{}+#$\0"):
            raise ValueError(f"the level {part!r} is not a plain text, +, or one {{field}}")
        return "is", part
    if named[1] not in TOPIC_FIELDS:
        raise ValueError(f"{{{named[1]}}} is none of {', '.join(sorted(TOPIC_FIELDS))}")
    return "name", named[1]


# From messages to deliveries --------------------------------------------------------------------


class Arrival(Protocol):
    """One PUBLISH, as either engine gives it. No packet id means QoS 0: nothing to acknowledge."""

    @property
    def topic(self) -> str:
        """The topic it was published to."""

    @property
    def payload(self) -> bytes:
        """What was published."""

    @property
    def retain(self) -> bool:
        """Whether the broker had kept it, rather than passed it on."""

    @property
    def packet_id(self) -> int | None:
        """What the PUBACK names."""

    @property
    def user_properties(self) -> Sequence[tuple[str, str]]:
        """Names and values; none before MQTT 5."""

    @property
    def content_type(self) -> str | None:
        """What the payload is; not said before MQTT 5."""


class Reading:
    """How the messages of one source are read: by its topic template and what it allows."""

    def __init__(self, template: TopicTemplate, *, anonymous: bool, qos0: bool) -> None:
        self._template = template
        self._anonymous = anonymous
        self._qos0 = qos0
        self._known: dict[str, dict[str, str] | None] = {}

    def deliveries(self, batch: Sequence[Arrival]) -> Deliveries:
        """The batch without position and receipt; a bad message is a fault, never an error."""
        payloads = [arrival.payload for arrival in batch]
        properties = [arrival.user_properties for arrival in batch]
        ids = [_id_of(named) for named in properties]
        proofs = {
            index: proof
            for index, named in enumerate(properties)
            if len(named) >= SIGNED_MIN and (proof := Proof.of(named)) is not None
        }
        fields: list[Mapping[str, str]] = []
        faults: dict[int, Fault] = {}
        for index, arrival in enumerate(batch):
            said = self._fields(arrival.topic)
            fields.append(said or {})
            payload = payloads[index]
            if arrival.user_properties and is_binary(arrival):
                try:
                    payloads[index] = payload = assembled(arrival)
                except ValueError as error:
                    faults[index] = Fault(Reason.MALFORMED, str(error))
            elif payload[:1] != b"{" and self._template.names_usage:
                payloads[index] = payload = _with_bare_number(payload)
                if payload[:1] == b"{" and not ids[index] and not self._anonymous:
                    detail = "a bare number needs an id as the user property id of MQTT 5"
                    faults[index] = Fault(Reason.NO_ID, detail)
            if said is None or not payload or arrival.retain or arrival.packet_id is None:
                fault = self._fault(arrival, said)
                if fault is not None:
                    faults[index] = fault
        if self._anonymous:
            ids = [known or uuid.uuid4().hex for known in ids]
        known = ids if any(ids) else None
        return Deliveries(payloads, ids=known, fields=fields, faults=faults, proofs=proofs)

    def _fields(self, topic: str) -> dict[str, str] | None:
        try:
            return self._known[topic]
        except KeyError:
            if len(self._known) >= TOPICS_KNOWN_MAX:
                self._known.clear()
            said = self._known[topic] = self._template.fields(topic)
            return said

    def _fault(self, arrival: Arrival, said: Mapping[str, str] | None) -> Fault | None:
        if arrival.retain:
            return Fault(Reason.RETAINED, "retained messages come again and again; publish without")
        if arrival.packet_id is None and not self._qos0:
            return Fault(Reason.QOS, "sent with QoS 0, which may lose or repeat it; publish with 1")
        if said is None:
            return Fault(Reason.MALFORMED, f"the topic does not fit {self._template.filter[:200]}")
        if not arrival.payload:
            return Fault(Reason.MALFORMED, "the payload is empty")
        return None


def is_binary(arrival: Arrival) -> bool:
    """Whether a message is a CloudEvent in binary mode: its attributes are user properties."""
    if (arrival.content_type or "").startswith(envelopes.STRUCTURED):
        return False
    return any(name == envelopes.SPECVERSION for name, _ in arrival.user_properties)


def assembled(arrival: Arrival) -> bytes:
    """Write a binary CloudEvent as one JSON document. Raises `ValueError`.

    What stands in the user properties and cannot be an attribute is not the event's.
    """
    attributes = [(name, value) for name, value in arrival.user_properties if name.isalnum()]
    return envelopes.assemble(attributes, arrival.content_type or "", arrival.payload)


def _id_of(properties: Sequence[tuple[str, str]]) -> str:
    for name, value in properties:
        if name == ID_PROPERTY:
            return value
    return ""


def _with_bare_number(payload: bytes) -> bytes:
    """The JSON object for a bare number, its digits untouched; any other payload as it is."""
    text = payload.strip()
    if len(text) > NUMBER_CHARS_MAX or text[:1] not in b"+-.0123456789" or not text.isascii():
        return payload
    return msgspec.json.encode({"quantity": text.decode()}) if text else payload


# The two engines --------------------------------------------------------------------------------


class Inbox:
    """What has arrived and was not read yet, bounded, and why no more will come."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.arrivals: list[Arrival] = []
        self.lost = ""
        self.changed = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether the engine should stop reading from its socket."""
        return len(self.arrivals) >= self.limit

    def lose(self, reason: str) -> None:
        """Say once why the connection is gone."""
        self.lost = self.lost or reason
        self.changed.set()


class Link(Protocol):
    """One connection to a broker, by either engine. Never used again once it is closed or lost."""

    async def open(self) -> bool:
        """Connect and subscribe; True if it had our session. Raises `Declined`, `OSError`."""

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """Send the PUBACKs, in this order."""

    def resume(self) -> None:
        """Read on from the socket, after the inbox was full."""

    async def close(self) -> None:
        """Disconnect and keep the session."""


class Declined(Exception):
    """The broker answered, and said no; the message says why."""


class Link5(asyncio.Protocol):
    """MQTT 5 by the `mqtt5` codec."""

    def __init__(
        self, settings: MqttSettings, wanted: str, tls: ssl.SSLContext | None, inbox: Inbox
    ) -> None:
        self._settings = settings
        self._wanted = wanted
        self._tls = tls
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[mqtt5.Packet] | None = None
        self._paused = False
        self._opened = False
        self._parted = asyncio.Event()
        self._ping_open = False
        self._beat_timer: asyncio.TimerHandle | None = None

    async def open(self) -> bool:
        """As `Link.open`."""
        settings = self._settings
        await self._loop.create_connection(
            lambda: self, settings.host, settings.port, ssl=self._tls
        )
        connack = await self._ask(
            mqtt5.ConnectPacket(
                client_id=_client_id(settings),
                username=settings.username or None,
                password=settings.password.encode() or None,
                clean_start=False,
                keep_alive=settings.keep_alive_s,
                session_expiry_interval=settings.session_expiry_s,
                receive_max=settings.receive_maximum,
            ).write()
        )
        if not isinstance(connack, mqtt5.ConnAckPacket):
            raise Declined("it does not speak MQTT 5; set protocol = '3.1.1'")
        if connack.reason_code != mqtt5.ConnAckReasonCode.SUCCESS:
            raise Declined(f"refused: {_in_words(connack)}")
        self._beat_s = (connack.server_keep_alive or settings.keep_alive_s) / 2
        self._beat_timer = self._loop.call_later(self._beat_s, self._beat)
        # Retained messages are sent once, for a new subscription, and end as dead letters. A live
        # message keeps no mark of having been published as retained, and counts.
        wanted = mqtt5.TopicFilter(
            self._wanted,
            max_qos=mqtt5.QoS.AT_LEAST_ONCE,
            retain_as_published=False,
            retain_handling=mqtt5.RetainHandling.SEND_IF_SUBSCRIPTION_NOT_EXISTS,
        )
        self._opened = True
        subscribe = mqtt5.SubscribePacket(1, [wanted]).write()
        if connack.session_present:
            # The answer comes behind all that the broker kept for us, more than the inbox may hold.
            assert self._transport is not None
            self._transport.write(subscribe)
            return True
        suback = await self._ask(subscribe)
        assert isinstance(suback, mqtt5.SubAckPacket)
        if suback.reason_codes[0] not in GRANTED:
            raise Declined(f"refused the subscription to {self._wanted}")
        return False

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """As `Link.acknowledge`: four bytes each, packed and written at once."""
        assert self._transport is not None
        packets = (PUBACK_SUCCESS | packet_id for packet_id in packet_ids)
        self._transport.write(struct.pack(f">{len(packet_ids)}I", *packets))

    def resume(self) -> None:
        """As `Link.resume`."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    async def close(self) -> None:
        """As `Link.close`. Waits for the broker to part, since it reads our last PUBACKs first."""
        if self._beat_timer is not None:
            self._beat_timer.cancel()
        if self._transport is None or self._transport.is_closing():
            return
        if not self._opened:
            self._transport.abort()
            return
        self._transport.write(mqtt5.DisconnectPacket().write())
        self.resume()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._parted.wait()
        except TimeoutError:
            pass
        finally:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits."""
        self._parted.set()
        self._lose(f"the connection broke: {exc}" if exc else "the broker closed the connection")

    def data_received(self, data: bytes) -> None:
        """Cut the stream into packets; what is left of the last one waits for more."""
        self._ping_open = False
        self._buffer += data
        arrivals = self._inbox.arrivals
        before, position = len(arrivals), 0
        with memoryview(self._buffer) as view:
            try:
                while True:
                    packet, size = mqtt5.read(view[position:])
                    position += size
                    if type(packet) is mqtt5.PublishPacket:
                        arrivals.append(packet)
                    else:
                        self._receive(packet)
            except IndexError:  # The codec's word for "not enough bytes".
                pass
            except ValueError as error:
                self._lose(f"what the broker sent is not MQTT 5: {error}")
                return
        del self._buffer[:position]
        if len(arrivals) > before:
            self._inbox.changed.set()
        # A broker may send more than our receive maximum (Mosquitto 2.0.11 does). That is no reason
        # to part from it: TCP holds the rest back.
        if self._inbox.full and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _receive(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.DisconnectPacket):
            self._lose(f"the broker disconnected us: {_in_words(packet)}")
        elif not isinstance(packet, mqtt5.ConnAckPacket | mqtt5.SubAckPacket):
            return  # A PINGRESP: that something came is what counts.
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(packet)
        elif isinstance(packet, mqtt5.SubAckPacket) and packet.reason_codes[0] not in GRANTED:
            self._lose(f"refused the subscription to {self._wanted}")

    async def _ask(self, packet: bytes) -> mqtt5.Packet:
        assert self._transport is not None
        if self._inbox.lost:
            raise ConnectionError(self._inbox.lost)
        self._answer = self._loop.create_future()
        self._transport.write(packet)
        return await self._answer

    def _beat(self) -> None:
        # Nothing at all came in since the last ping: the broker is gone. While we hold the stream
        # back ourselves, silence says nothing.
        if self._ping_open and not self._paused:
            self._lose(f"no sign of life for {self._beat_s:.0f} s")
            return
        assert self._transport is not None
        self._transport.write(mqtt5.PingReqPacket().write())
        self._ping_open = True
        self._beat_timer = self._loop.call_later(self._beat_s, self._beat)

    def _lose(self, reason: str) -> None:
        if self._beat_timer is not None:
            self._beat_timer.cancel()
        self._inbox.lose(reason)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(reason))
        if self._transport is not None:
            self._transport.abort()


def _in_words(packet: mqtt5.ConnAckPacket | mqtt5.DisconnectPacket) -> str:
    words = str(packet.reason_code.name).lower().replace("_", " ")
    return f"{words} ({packet.reason_str})" if packet.reason_str else words


class Message(NamedTuple):
    """An `Arrival` of the 3.1.1 engine."""

    topic: str
    payload: bytes
    retain: bool
    packet_id: int | None
    user_properties: Sequence[tuple[str, str]] = ()
    content_type: str | None = None


class Link311:
    """MQTT 3.1.1 by paho, its socket watched by this event loop."""

    READS_AT_ONCE = 64  # paho reads one packet a call; more for each wake-up saves wake-ups.

    def __init__(
        self, settings: MqttSettings, wanted: str, tls: ssl.SSLContext | None, inbox: Inbox
    ) -> None:
        self._settings = settings
        self._wanted = wanted
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()
        self._socket: Any = None
        self._paused = False
        self._beat_timer: asyncio.TimerHandle | None = None
        self._connected: asyncio.Future[tuple[bool, str]] = self._loop.create_future()
        self._subscribed: asyncio.Future[bool] = self._loop.create_future()
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=_client_id(settings),
            clean_session=False,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = settings.connect_timeout_s
        if settings.username:
            client.username_pw_set(settings.username, settings.password or None)
        if tls is not None:
            client.tls_set_context(tls)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_disconnect = self._on_disconnect
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write

    async def open(self) -> bool:
        """As `Link.open`."""
        settings = self._settings
        # paho connects with a blocking call, within its connect time-out.
        await asyncio.to_thread(
            self._client.connect, settings.host, settings.port, settings.keep_alive_s
        )
        self._socket = self._client.socket()
        if self._socket is None:
            raise ConnectionError("the broker closed the connection")
        self._loop.add_reader(self._socket, self._readable)
        if self._client.want_write():
            self._loop.add_writer(self._socket, self._client.loop_write)
        present, refusal = await self._connected
        if refusal:
            raise Declined(f"refused: {refusal}")
        self._beat()
        self._client.subscribe(self._wanted, qos=1)
        if not present and not await self._subscribed:
            raise Declined(f"refused the subscription to {self._wanted}")
        return present

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """As `Link.acknowledge`."""
        for packet_id in packet_ids:
            self._client.ack(packet_id, 1)

    def resume(self) -> None:
        """As `Link.resume`."""
        if self._paused and self._socket is not None:
            self._paused = False
            self._loop.add_reader(self._socket, self._readable)

    async def close(self) -> None:
        """As `Link.close`. paho parts at once: the broker may be too late for the last PUBACKs."""
        if self._beat_timer is not None:
            self._beat_timer.cancel()
        for waiting in (self._connected, self._subscribed):
            waiting.cancel()
        self._client.disconnect()
        self._client.loop_write()
        self._detach()

    def _readable(self) -> None:
        arrivals = self._inbox.arrivals
        for _ in range(self.READS_AT_ONCE):
            before = len(arrivals)
            self._client.loop_read()
            # TLS may hold decrypted packets of which the socket itself tells nothing.
            pending = getattr(self._socket, "pending", None)
            if len(arrivals) == before and not (pending and pending()):
                break
        if self._inbox.full and not self._paused and self._socket is not None:
            self._paused = True
            self._loop.remove_reader(self._socket)

    def _beat(self) -> None:
        if self._client.loop_misc() == MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._beat_timer = self._loop.call_later(self._settings.keep_alive_s / 4, self._beat)

    def _detach(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket = None

    # What paho calls.

    def _on_connect(self, _: Any, __: Any, flags: Any, reason: Any, ___: Any) -> None:
        if not self._connected.done():
            refusal = str(reason) if reason.is_failure else ""
            self._connected.set_result((flags.session_present, refusal))

    def _on_subscribe(self, _: Any, __: Any, ___: int, reasons: Any, ____: Any) -> None:
        if not self._subscribed.done():
            self._subscribed.set_result(not reasons[0].is_failure)
        if reasons[0].is_failure:
            self._inbox.lose(f"refused the subscription to {self._wanted}")

    def _on_message(self, _: Any, __: Any, message: paho.MQTTMessage) -> None:
        packet_id = message.mid if message.qos else None
        self._inbox.arrivals.append(
            Message(message.topic, bytes(message.payload), message.retain, packet_id)
        )
        self._inbox.changed.set()

    def _on_disconnect(self, _: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
        words = f"the connection broke: {reason}"
        self._inbox.lose(words)
        for waiting in (self._connected, self._subscribed):
            if not waiting.done():
                waiting.set_exception(ConnectionError(words))
                waiting.exception()  # Nobody may be waiting for it.

    def _on_socket_close(self, _: Any, __: Any, ___: Any) -> None:
        self._detach()

    def _on_register_write(self, _: Any, __: Any, ___: Any) -> None:
        if self._socket is not None:
            self._loop.add_writer(self._socket, self._client.loop_write)

    def _on_unregister_write(self, _: Any, __: Any, ___: Any) -> None:
        if self._socket is not None:
            self._loop.remove_writer(self._socket)


LINKS: Mapping[str, Callable[[MqttSettings, str, ssl.SSLContext | None, Inbox], Link]] = {
    "5": Link5,
    "3.1.1": Link311,
}


# The source -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Receipt:
    generation: int
    packet_ids: tuple[int, ...]


class MqttSource:
    """One MQTT subscription as a `Source`. Wrong settings raise `ConfigurationError`."""

    kind = "mqtt"

    def __init__(self, settings: MqttSettings) -> None:
        self.name = settings.name
        self.address = f"{'mqtts' if settings.tls else 'mqtt'}://{settings.host}:{settings.port}"
        self._settings = settings
        self._template = _template_of(settings)
        self._tls = _tls_of(settings)
        self._reading = Reading(
            self._template, anonymous=settings.allow_anonymous, qos0=settings.allow_qos0
        )
        # Stored with each commit: it says that the broker had a session for this client id.
        self._session = f"session {_client_id(settings)}"
        self._session_expected = False
        self._generation = 0
        self._link: Link | None = None
        self._inbox = Inbox(settings.receive_maximum)

    async def connect(self, position: str | None) -> Sequence[str]:
        """As `Source.connect`. A position only says that the broker should have our session."""
        await self.close()
        self._generation += 1
        settings = self._settings
        wanted = f"$share/{settings.share}/" if settings.share else ""
        self._inbox = Inbox(max(settings.receive_maximum, settings.batch))
        link = LINKS[settings.protocol](
            settings, wanted + self._template.filter, self._tls, self._inbox
        )
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                present = await link.open()
        except BaseException as error:
            await link.close()
            if isinstance(error, Declined | OSError | ValueError):
                raise self._unavailable(self._explain(error)) from None
            raise
        self._link = link
        expected = self._session_expected or position == self._session
        self._session_expected = True
        if present or not expected:
            return []
        warning = (
            f"{self.address} has no session for the client id {_client_id(settings)} now: what "
            "it kept for meterd while away is lost; check its persistence and the session expiry"
        )
        return [warning]

    async def read(self) -> Deliveries:
        """As `Source.read`."""
        inbox = self._inbox
        while self._link is not None and not inbox.lost and not inbox.arrivals:
            inbox.changed.clear()
            await inbox.changed.wait()
        if self._link is None or inbox.lost:
            await self.close()
            raise self._unavailable(inbox.lost or "not connected")
        batch = inbox.arrivals[: self._settings.batch]
        del inbox.arrivals[: len(batch)]
        if len(inbox.arrivals) * 2 < inbox.limit:
            self._link.resume()
        deliveries = self._reading.deliveries(batch)
        deliveries.position = self._session
        packet_ids = (arrival.packet_id for arrival in batch)
        deliveries.receipt = _Receipt(
            self._generation, tuple(known for known in packet_ids if known is not None)
        )
        return deliveries

    async def ack(self, deliveries: Deliveries) -> None:
        """As `Source.ack`; for deliveries of an earlier connection there is nothing left to say."""
        receipt = deliveries.receipt
        assert isinstance(receipt, _Receipt)
        if receipt.generation != self._generation:
            return
        if self._link is None or self._inbox.lost:
            raise self._unavailable(self._inbox.lost or "not connected")
        self._link.acknowledge(receipt.packet_ids)

    async def lag(self) -> int | None:
        """None: MQTT has no question for it."""
        return None

    async def close(self) -> None:
        """As `Source.close`. The broker keeps the session."""
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(OSError):
                await link.close()
        self._inbox.changed.set()

    def _unavailable(self, reason: str) -> SourceUnavailable:
        return SourceUnavailable(f"MQTT broker at {self.address}: {reason}")

    def _explain(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError) and not str(error):
            return f"no answer within {self._settings.connect_timeout_s} s"
        text = str(error) or type(error).__name__
        password = self._settings.password
        return text.replace(password, "***") if password else text


def _client_id(settings: MqttSettings) -> str:
    return settings.client_id or f"meterd-{settings.name}"


def _template_of(settings: MqttSettings) -> TopicTemplate:
    try:
        return TopicTemplate.parse(settings.topic)
    except ValueError as error:
        mistake = Mistake(f"sources.{settings.name}.topic", str(error))
        raise ConfigurationError([mistake]) from None


def _tls_of(settings: MqttSettings) -> ssl.SSLContext | None:
    if not settings.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca_file or None)
        if settings.tls_cert_file:
            context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file or None)
    except (OSError, ssl.SSLError) as error:
        mistake = Mistake(f"sources.{settings.name}.tls", f"a file cannot be used: {error}")
        raise ConfigurationError([mistake]) from None
    return context
