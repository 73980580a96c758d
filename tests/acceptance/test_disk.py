"""What a machine can run out of: room on the disk, the size of a file, file descriptors.

Nothing is acknowledged that is not on the disk, nothing is paid that is not written down, and when
there is room again every sum is exact.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as paho
import pytest
import redis

from tests.acceptance.stage import Node, configuration, paid, until
from tests.processes import Sandbox
from tests.servers import MosquittoServer, RedisServer

DISK_BYTES = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One escrow service for all tests."""
    with Sandbox(tmp_path_factory.mktemp("disk") / "sandbox") as sandbox:
        yield sandbox


class SmallDisk:
    """A file system of some mebibytes, and a file that takes all that is left of it.

    Where this process may not mount one, the daemon is started in a user namespace of its own that
    has it, and is reached through /proc.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        options = ("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory))
        self.mounted = _succeeds("mount", *options)
        self._mount = " ".join(("mount", *options[:-1], '"$0"'))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            assert _succeeds("umount", "--lazy", str(self.directory))

    def carry(self, node: Node) -> None:
        """See to it that a daemon that was not started yet finds the disk."""
        if not self.mounted:
            if not _succeeds("unshare", "--user", "--map-root-user", "--mount", "true"):
                pytest.skip(
                    "NOT SHOWN: no disk was filled, since this machine lets nobody mount one; run"
                    " as root or allow user namespaces. The limit of a file's size is shown"
                )
            inside = ["sh", "-c", f'{self._mount} && exec "$@"', str(self.directory)]
            namespace = ["unshare", "--user", "--map-root-user", "--mount"]
            node._command = [*namespace, *inside, *node._command]

    def ballast(self, node: Node) -> Path:
        """The file that fills the disk, as this process sees it."""
        root = "" if self.mounted else f"/proc/{node.pid}/root"
        return Path(f"{root}{self.directory}") / "ballast"

    def fill(self, node: Node) -> None:
        """Leave no page of it free."""
        with self.ballast(node).open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    def free(self, node: Node) -> None:
        """Give all of it back."""
        self.ballast(node).unlink()


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _descriptors(node: Node) -> int:
    return sum(1 for _ in Path(f"/proc/{node.pid}/fd").iterdir())


def _event(event_id: str, escrow: str, quantity: int) -> dict[str, Any]:
    return {"id": event_id, "escrow_id": escrow, "meter": "units", "quantity": quantity}


def test_a_full_disk_stops_acks_and_payments_until_there_is_room(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """503 with Retry-After, not ready, nothing acked or paid; afterwards everything, exactly."""
    escrow = sandbox.lock("10.00")
    with (
        RedisServer() as redis_server,
        MosquittoServer() as mosquitto,
        SmallDisk(tmp_path / "disk") as disk,
    ):
        rest = (
            f'[[sources]]\nkind = "redis"\nurl = "{redis_server.url}"\nblock = "200ms"\n'
            f'[[sources]]\nkind = "mqtt"\nport = {mosquitto.port}\n'
        )
        text = configuration(sandbox, rest=rest)
        node = Node(tmp_path, text.replace("@data_dir@", str(disk.directory / "state")))
        disk.carry(node)
        with node:
            node.wait_ready()
            node.bind(escrow, "stream")
            node.wait_sources()
            node.use(escrow, 9, "before")  # The next unit reaches the threshold.

            # 1. No room. The reserve may take some events yet; then the answer is 503.
            taken, refused = _until_refused(node, disk, escrow)
            disk.fill(node)
            _xadd(redis_server, _event("r1", escrow, 20))
            client = _publish(mosquitto, _event("m1", escrow, 30))
            until(lambda: _unacked(node) == [1, 1], lambda: node.get("/v1/status"))
            ready, status = node.ask("GET", "/readyz"), node.get("/v1/status")
            again = node.ask("POST", "/v1/events", refused[1])
            acked = _acked(redis_server)
            paid_meanwhile = paid(sandbox, escrow)

            # 2. Room. What was refused is sent once more, as a producer does.
            disk.free(node)
            node.wait_sources()
            last = node.ask("POST", "/v1/events", refused[1]).json
            owed = 9 + taken + 1 + 20 + 30
            sums = node.wait_agreement(escrow, released=f"0.{owed:03}".rstrip("0"))
            until(lambda: _unacked(node) == [0, 0], lambda: node.get("/v1/status"))
            drained = until(lambda: _acked(redis_server), "the group to follow")
            client.disconnect()
            client.loop_stop()
            node.stop()

    assert refused[0].headers["Retry-After"].isdecimal()
    assert (ready.status, again.status) == (503, 503)
    assert ready.json["reasons"] == ["the store takes no commits: the disk is full"]
    assert (status["store"]["writable"], status["flow"]["word"]) == (False, "stopped")
    assert status["flow"]["blocked"] == "the disk is full"
    assert not acked
    assert paid_meanwhile == 0
    assert last["accepted"] + last["duplicates"] == 1
    assert Decimal(sums["accrued"]) == Decimal(owed) / 1000
    assert drained
    assert paid(sandbox, escrow) == Decimal(owed) / 1000
    assert node.returncode == 0


def _until_refused(
    node: Node, disk: SmallDisk, escrow: str
) -> tuple[int, tuple[Any, dict[str, Any]]]:
    """Fill the disk and post units until one is refused; how many were taken, and that one."""
    for number in range(1, 1000):
        disk.fill(node)
        event = _event(f"h{number}", escrow, 1)
        answer = node.ask("POST", "/v1/events", event, timeout=10)
        if answer.status == 503:
            return number - 1, (answer, event)
        assert answer.status == 200, answer.raw
    raise AssertionError("the disk is not full")


def _unacked(node: Node) -> list[int]:
    return [one["unacked"] for one in node.get("/v1/status")["sources"]]


def _xadd(server: RedisServer, event: dict[str, Any]) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.xadd("meterd:usage", event)


def _acked(server: RedisServer) -> bool:
    with redis.Redis.from_url(server.url) as client:
        (group,) = client.xinfo_groups("meterd:usage")
        last = client.xinfo_stream("meterd:usage")["last-generated-id"]
    return bool(group["last-delivered-id"] == last)


def _publish(server: MosquittoServer, event: dict[str, Any]) -> paho.Client:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    topic = f"meterd/usage/{event['escrow_id']}/{event['meter']}"
    client.publish(topic, json.dumps(event), qos=1).wait_for_publish(10)
    return client


def test_a_daemon_told_to_stop_while_its_disk_is_full_loses_nothing(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """It ends within its time; what it could not write was not acked and comes again."""
    escrow = sandbox.lock("1.00")
    with RedisServer() as server:
        rest = f'[[sources]]\nkind = "redis"\nurl = "{server.url}"\nblock = "200ms"\n'
        text = configuration(sandbox, rest=rest, daemon='drain_timeout = "1s"')
        with SmallDisk(tmp_path / "disk") as disk:
            node = Node(tmp_path, text.replace("@data_dir@", str(disk.directory / "state")))
            disk.carry(node)
            with node:
                node.wait_ready()
                node.bind(escrow, "lazy")
                node.wait_sources()
                _until_refused(node, disk, escrow)
                disk.fill(node)
                _xadd(server, _event("r1", escrow, 20))
                until(lambda: _unacked(node) == [1], lambda: node.get("/v1/status"))
                node.stop(20)

    assert node.returncode in {0, 70}
    assert not server.running
    assert len(node.logged("drain_cut_off")) == 1
    assert node.logged("stopped_by_mistake") == []


def test_a_write_that_fails_for_another_reason_ends_the_process_at_once(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """A file may grow no more: exit 70; the next start takes what was not acked, exactly once."""
    escrow = sandbox.lock("1.00")
    with Node(tmp_path, configuration(sandbox)) as node:
        node.wait_ready()
        node.bind(escrow, "stream")
        node.use(escrow, 5, "e0")
        largest = max(path.stat().st_size for path in node.data_dir.iterdir())
        wal = (node.data_dir / "meterd.db-wal").stat().st_size
        resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (wal + 8192, wal + 8192))
        accepted, statuses = 0, []
        for number in range(1, 100):
            try:
                status = node.ask("POST", "/v1/events", _event(f"e{number}", escrow, 1)).status
            except (OSError, ConnectionError):
                status = 0
            statuses.append(status)
            if status != 200:
                break
            accepted += 1
        code = node.wait()
        node.start()
        node.wait_ready()
        last = node.send(_event(f"e{accepted + 1}", escrow, 1))
        owed = Decimal(5 + accepted + 1) / 1000
        agreement = node.agreement(escrow)
        node.stop()

    assert largest > 0
    assert code == 70
    assert statuses[-1] in {0, 503}
    assert last["accepted"] + last["duplicates"] == 1
    assert Decimal(agreement["accrued"]) == owed
    assert "the store failed" in node.logged("stopped_by_failure")[0]["event"]


def test_a_daemon_without_file_descriptors_goes_on_when_some_are_free(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """Connections beyond the limit wait; neither events nor releases are lost."""
    escrow = sandbox.lock("1.00")
    with Node(tmp_path, configuration(sandbox)) as node:
        node.wait_ready()
        node.bind(escrow, "stream")
        limit = _descriptors(node) + 4
        resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (limit, limit))
        with contextlib.ExitStack() as stack:
            for _ in range(12):
                stack.enter_context(socket.create_connection(("127.0.0.1", node.port), 5))
            until(lambda: _descriptors(node) >= limit, "all of them in use")
        node.use(escrow, 20, "e1")
        node.wait_agreement(escrow, released="0.02")
        node.stop()

    assert node.returncode == 0
    assert paid(sandbox, escrow) == Decimal("0.02")
