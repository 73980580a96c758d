"""A backlog at an MQTT broker, QoS 1: meterd's whole path beside clients that only acknowledge."""

from __future__ import annotations

import importlib.util
import socket
import struct
import time
from collections.abc import Sequence

from bench.figures import Goal, Row, ratios
from bench.load import Workload, escrow_ids
from bench.plan import Plan, chunks
from bench.stage import DONE_TIMEOUT_S, MQTT, Peer, wait_for
from tests.servers import MosquittoServer

AGREEMENTS = 1000
WINDOW = 2000  # PUBLISHes before their PUBACKs are waited for.
TOPIC = "meterd/usage/+/+"
EVENTS_SHARE = 0.4  # Of the Redis backlog: 200,000 of 500,000.
ENGINE, AIOMQTT = "same engine, acking only", "aiomqtt, throwing away"
SLOW_SHARE = 10  # The usual library is so slow that it gets a tenth of the backlog.


def broker() -> MosquittoServer:
    # Its window for publishers is opened wide; what it keeps it keeps in memory.
    return MosquittoServer(persistence=False, options={"max_inflight_messages": 0})


def publish(port: int, messages: Sequence[tuple[str, bytes]]) -> None:
    """Publish with QoS 1 and wait for every PUBACK: MQTT 3.1.1, which has the simplest packets."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        name = b"bench-publisher"
        body = b"\x00\x04MQTT\x04\x02\x00\x3c" + struct.pack(">H", len(name)) + name
        connection.sendall(b"\x10" + bytes([len(body)]) + body)
        _receive(connection, 4)
        for chunk in chunks(messages, WINDOW):
            connection.sendall(
                b"".join(_publish(number, *message) for number, message in enumerate(chunk, 1))
            )
            _receive(connection, 4 * len(chunk))
        connection.sendall(b"\xe0\x00")


def _publish(number: int, topic: str, payload: bytes) -> bytes:
    name = topic.encode()
    body = struct.pack(">H", len(name)) + name + struct.pack(">H", number) + payload
    length = len(body)
    size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
    return b"\x32" + size + body


def _receive(connection: socket.socket, wanted: int) -> None:
    while wanted:
        part = connection.recv(min(wanted, 65_536))
        if not part:
            raise ConnectionError("the broker closed the connection")
        wanted -= len(part)


def run(plan: Plan) -> list[Row]:
    count = int(plan.events * EVENTS_SHARE)
    workload = Workload(escrow_ids(AGREEMENTS))
    messages = [
        (f"meterd/usage/{escrow}/tokens", payload) for escrow, payload in workload.events(count)
    ]

    def meterd() -> float:
        with (
            broker() as server,
            plan.stage.sandbox(workload.escrows) as sandbox,
            plan.stage.daemon(
                sandbox,
                workload.escrows,
                known=plan.known,
                sources=MQTT.format(port=server.port),
            ) as daemon,
        ):
            daemon.wait_settled_in()
            daemon.hold()
            publish(server.port, messages)
            started = daemon.go()

            def done() -> bool:
                status = daemon.status()
                events = status["events"]
                unacked = sum(source["unacked"] for source in status["sources"])
                return bool(events["accepted"] + events["duplicates"] == count and not unacked)

            finished = wait_for(done, "the backlog's end", DONE_TIMEOUT_S, 0.02)
            daemon.check(workload)
            return count / (finished - started)

    def bare(what: str, events: int) -> float:
        with (
            broker() as server,
            Peer(what, "--port", server.port, "--topic", TOPIC, "--events", events) as peer,
        ):
            time.sleep(0.1)
            peer.hold()
            publish(server.port, messages[:events])
            started = peer.go()
            return events / (float(peer.result()["finished"]) - started)

    contestants = {
        "meterd": meterd,
        ENGINE: lambda: bare("mqtt-engine", count),
        AIOMQTT: lambda: bare("mqtt-aiomqtt", count // SLOW_SHARE),
    }
    if importlib.util.find_spec("aiomqtt") is None:
        del contestants[AIOMQTT]
        plan.say("aiomqtt is left out: pip install -r bench/requirements.txt")
    found = plan.alternately(contestants, "messages/s")
    notes = (
        f"{count:,} messages of QoS 1, {AGREEMENTS:,} agreements, {plan.known:,} known ids",
        "the peers do not decode, dedupe, price or keep anything",
    )
    rows = [
        Row(
            "mqtt",
            "MQTT QoS 1 backlog: meterd : same engine, acking only",
            ratios(found["meterd"], found[ENGINE]),
            Goal(0.5, 0.8),
            found,
            notes,
        )
    ]
    if AIOMQTT in found:
        rows.append(
            Row(
                "mqtt-aiomqtt",
                "MQTT QoS 1 backlog: meterd : aiomqtt that throws away",
                ratios(found["meterd"], found[AIOMQTT]),
                Goal(3, 10),
                {},
                ("aiomqtt acknowledges before it hands over: a crash loses what it had",),
            )
        )
    return rows
