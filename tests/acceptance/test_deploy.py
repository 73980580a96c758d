"""The files of deploy/, each with the program that it is for.

systemd judges the unit, and what a daemon really calls is held against the unit's filter; the
access lists are given to real brokers, whose users then try what they may and what they may not.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import paho.mqtt.client as paho
import pytest
import redis

from tests.acceptance.stage import Node, configuration, until
from tests.processes import Sandbox
from tests.servers import MosquittoServer, RedisServer

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "meterd.service"
EXPOSURE_MAX = 1.5


def unit(*keys: str) -> list[str]:
    """The values of these keys of the unit, in their order."""
    pairs = (line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line)
    return [value for key, value in pairs if key in keys]


def systemd_analyze(*words: str) -> str:
    """What systemd says of a file, without running as the first process of this machine."""
    done = subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout + done.stderr


def test_the_unit_exposes_no_more_than_the_limit() -> None:
    """Systemd's own figure, of 10; everything that is left is the network that it must have."""
    said = systemd_analyze("security", "--offline=true", "--no-pager", str(UNIT))
    found = re.search(r"Overall exposure level for meterd\.service: ([0-9.]+)", said)

    assert found is not None, said
    assert float(found[1]) <= EXPOSURE_MAX


def test_systemd_understands_every_line_of_the_unit(tmp_path: Path) -> None:
    """No unknown key and no bad value; the program's own path is the one thing that differs."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/meterd/bin/meterd", sys.executable))

    assert systemd_analyze("verify", "--man=no", str(copy)) == ""


def _allowed(filters: list[str]) -> set[str]:
    """The system calls that the unit's filters leave."""
    allowed: set[str] = set()
    for text in filters:
        names = {name for group in text.lstrip("~").split() for name in _calls(group)}
        allowed = allowed - names if text.startswith("~") else allowed | names
    return allowed


def _calls(group: str) -> set[str]:
    """The calls of a group, with those of the groups in it; a call is itself."""
    if not group.startswith("@"):
        return {group}
    listed = systemd_analyze("syscall-filter", group, "--no-pager").splitlines()[1:]
    words = {line.strip() for line in listed if line.strip() and not line.strip().startswith("#")}
    inner = {word for word in words if word.startswith("@")}
    return (words - inner) | {call for one in inner for call in _calls(one)}


def test_a_whole_life_calls_nothing_that_the_unit_forbids(tmp_path: Path) -> None:
    """Start, usage, payment, reload and drain: each call is in the filter."""
    trace = tmp_path / "trace"
    with Sandbox(tmp_path / "sandbox") as sandbox:
        node = Node(tmp_path, configuration(sandbox))
        node._command = ["strace", "-f", "-qq", "-o", str(trace), *node._command]
        with node:
            node.wait_ready(120)
            escrow = sandbox.lock("1.00")
            node.bind(escrow, "stream")
            node.use(escrow, 20, "one")
            node.wait_agreement(escrow, released="0.02")
            child = subprocess.run(
                ["pgrep", "-P", str(node.pid)], capture_output=True, text=True, check=True
            )
            subprocess.run(["kill", "-HUP", child.stdout.split()[0]], check=True)
            node.wait_logged("reloaded")
            subprocess.run(["kill", "-TERM", child.stdout.split()[0]], check=True)
            node.wait(60)
    called = set(
        re.findall(r"^\d+ +([a-z_0-9]+)\(", trace.read_text(errors="replace"), re.MULTILINE)
    )

    # SQLite gives files the owner of their directory where root runs it, which nobody does here.
    called -= {"fchown"} if os.geteuid() == 0 else set()

    assert {"fdatasync", "accept4", "openat"} & called
    assert called - _allowed(unit("SystemCallFilter")) == set()


def test_the_secrets_of_the_unit_reach_meterd_by_their_files(tmp_path: Path) -> None:
    """The names in Environment= are keys of the configuration, and each file is a credential."""
    credentials = {value.split(":")[0] for value in unit("LoadCredential")}
    named = dict(value.split("=", 1) for value in unit("Environment"))
    files = {value.removeprefix("%d/") for value in named.values() if value.startswith("%d/")}

    assert files == credentials
    (tmp_path / "escrow-api-key").write_text("pf_live_x\n")
    config = tmp_path / "meterd.toml"
    config.write_text("")
    env = {
        name: value.replace("%d", str(tmp_path)).replace("%S", str(tmp_path))
        for name, value in named.items()
    }
    done = subprocess.run(
        [sys.executable, "-m", "meterd", "check", "-c", str(config)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# -- Mosquitto ---------------------------------------------------------------------------------


def _publish(server: MosquittoServer, user: str, topic: str) -> int:
    """Publish one message with QoS 1 as a user; the broker's reason code, 0 for taken."""
    codes: list[int] = []
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.on_publish = lambda *given: codes.append(given[3].value)
    client.username_pw_set(user, f"of-{user}")
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    try:
        client.publish(topic, b'{"id": "e", "quantity": 3}', qos=1)
        until(lambda: codes, "the broker to answer")
    finally:
        client.disconnect()
        client.loop_stop()
    return codes[0]


NOT_AUTHORIZED = 0x87


def test_a_producer_writes_for_its_agreements_alone_at_mosquitto(tmp_path: Path) -> None:
    """Meterd reads what the right user wrote; another agreement's topic is refused."""
    users = {user: f"of-{user}" for user in ("meterd", "svc-a", "svc-b")}
    acl = tmp_path / "meterd.acl"
    acl.write_text((DEPLOY / "mosquitto" / "meterd.acl").read_text())
    acl.chmod(0o600)
    source = (
        '[[sources]]\nkind = "mqtt"\nport = {}\nusername = "meterd"\npassword = "of-meterd"\n'
        'topic = "meterd/usage/{{agreement}}/{{meter}}"\n'
    )
    with (
        MosquittoServer(users=users, options={"acl_file": str(acl)}) as server,
        Sandbox(tmp_path / "sandbox") as sandbox,
        Node(tmp_path, configuration(sandbox, rest=source.format(server.port))) as node,
    ):
        node.wait_ready()
        node.wait_sources()
        node.bind(sandbox.lock("1.00"), "lazy", "customer-1")
        codes = [
            _publish(server, "svc-b", "meterd/usage/customer-1/units"),
            _publish(server, "meterd", "meterd/usage/customer-1/units"),
            _publish(server, "svc-a", "meterd/usage/customer-1/units"),
        ]
        shown = node.wait_agreement("customer-1", events=1)

    assert codes[:2] == [NOT_AUTHORIZED, NOT_AUTHORIZED]
    assert codes[2] == 0
    assert shown["accrued"] == "0.003"


# -- Redis -------------------------------------------------------------------------------------


@pytest.fixture
def redis_server() -> RedisServer:
    """A Redis with the users of the file."""
    return RedisServer()


def test_a_producer_adds_to_its_own_stream_alone_at_redis(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """Each adds to its own stream, and reaches nothing else; the daemon's user reads both."""
    lines = (DEPLOY / "redis" / "users.acl").read_text().splitlines()
    with redis_server as server, Sandbox(tmp_path / "sandbox") as sandbox:
        with redis.Redis(port=server.port) as operator:
            for line in sorted(lines, key=lambda line: "default" in line):  # He locks himself out.
                operator.execute_command("ACL", "SETUSER", *shlex.split(line)[1:])
        sources = "".join(
            f'[[sources]]\nkind = "redis"\nname = "{user}"\nstream = "meterd:usage:{user}"\n'
            f'url = "redis://meterd:change-meterd@127.0.0.1:{server.port}/0"\nblock = "100ms"\n'
            for user in ("svc-a", "svc-b")
        )
        with Node(tmp_path, configuration(sandbox, rest=sources)) as node:
            node.wait_ready()
            node.wait_sources()
            node.bind(sandbox.lock("1.00"), "lazy", "customer-1")
            live = node.type("check", "--live")
            producer = redis.Redis(port=server.port, username="svc-a", password="change-svc-a")
            with producer:
                fields = {"id": "e", "agreement": "customer-1", "meter": "units", "quantity": "3"}
                producer.xadd("meterd:usage:svc-a", fields)  # type: ignore[arg-type]
                for forbidden in (
                    lambda: producer.xadd("meterd:usage:svc-b", fields),  # type: ignore[arg-type]
                    lambda: producer.xrange("meterd:usage:svc-a"),
                    lambda: producer.delete("meterd:usage:svc-a"),
                    lambda: producer.execute_command("ACL", "LIST"),
                ):
                    with pytest.raises(redis.exceptions.NoPermissionError):
                        forbidden()
            shown = node.wait_agreement("customer-1", events=1)

    assert shown["accrued"] == "0.003"
    assert live.returncode == 0, live.stdout
    with pytest.raises(redis.exceptions.RedisError), redis.Redis(port=server.port) as nobody:
        nobody.ping()
