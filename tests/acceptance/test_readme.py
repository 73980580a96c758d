"""What README.md and docs/*.md tell people to type is typed here, and does what they say it does.

The blocks of a document are one story, run from top to bottom in one directory against a real
daemon, the sandbox, Redis and Mosquitto. Only the ports are exchanged for free ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import redis
from paho.mqtt.enums import CallbackAPIVersion

from meterd import config
from tests.documents import DOCUMENTS, ROOT, Block, blocks
from tests.processes import PAYER_KEY, call
from tests.servers import MosquittoServer, RedisServer, free_port, wait_until

README, OPERATIONS = "README.md", "operations.md"
TIMEOUT_S = 60

NUMBERED = "tests/acceptance/test_numbered_events.py types it"
TYPED = "it wants meters of its own; tests/acceptance/test_typed_events.py types it"
TRACED = "it wants a plan of its own; tests/integration/test_otlp.py types the whole section"
# Blocks that are not typed here, by their first line, and why not.
NOT_RUN = {
    "make demo": "it installs packages; the demo has tests of its own",
    'make demo ARGS="--crash"': "it installs packages; the demo has tests of its own",
    "make test": "it is what runs this",
    "python3 -m venv ~/meterd-venv": "it installs packages, into the home of whoever runs this",
    "export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:8787": TRACED,
    "from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter": TRACED,
    "curl -fsS http://127.0.0.1:8787/v1/traces -H 'Content-Type: application/json' -d @- <<END": (
        TRACED
    ),
    "curl -fsS http://127.0.0.1:8787/v1/events \\": TYPED,
    "secret=$(cat svc-a-secret)": "tests/acceptance/test_security_page.py types it",
    "for n in 1 2 5; do": NUMBERED,
    'meterd producers give-up edge-7 --reason "the broker lost its disk"': NUMBERED,
    "export OPENMETER_API_ENDPOINT=http://127.0.0.1:8787": TYPED,
    **dict.fromkeys(
        (
            "# tell.py",
            "# tell_awaited.py",
            "# ask.py",
            "# count.py",
            "# serve_aiohttp.py",
            "# serve_fastapi.py",
        ),
        "it wants a plan of its own; tests/acceptance/test_sdk_document.py types it",
    ),
}
SHOWN_ONLY = {"text"}  # Pictures and output.
# Blocks that go on until they are stopped, and what answers when they are ready.
SERVERS = {
    "meterd sandbox --listen 127.0.0.1:8788": "http://127.0.0.1:8788/_totals",
    "meterd run": "http://127.0.0.1:8787/readyz",
}
# Blocks that only look, at something that comes about a moment later.
LOOKS = {
    "meterd releases customer-1",
    "meterd releases customer-2",
    "curl -fsS 'http://127.0.0.1:8787/v1/agreements/customer-7/releases?status=confirmed'",
}
# Blocks that are typed while the daemon is stopped.
STOPPED = {"tar -czf meterd-backup.tar.gz meterd-data"}


@dataclass
class Story:
    """A directory in which a person types, the servers, and the daemon that the person started."""

    directory: Path
    ports: dict[str, int]
    servers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def exports(self) -> Path:
        return self.directory.parent / "exports.sh"

    @property
    def environment(self) -> dict[str, str]:
        """That of the person, without what could make it another story, and with short waits."""
        clean = {name: text for name, text in os.environ.items() if not name.startswith("METERD_")}
        return {
            **clean,
            "PATH": f"{self.directory.parent / 'bin'}:{clean['PATH']}",
            "PYTHONPATH": str(ROOT),
            "METERD_HTTP__LISTEN": f"127.0.0.1:{self.ports['8787']}",
            "METERD_ESCROW__OBSERVE_GAP": "100ms",
            "METERD_ESCROW__MIN_INTERVAL": "0s",
        }

    def here(self, text: str) -> str:
        """A text with the ports of this story."""
        for documented, port in self.ports.items():
            text = re.sub(rf"\b{documented}\b", str(port), text)
        return text

    def ask(self, path: str) -> Any:
        """Ask the daemon."""
        return call("GET", self.here(f"http://127.0.0.1:8787{path}"))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is so."""
        wait_until(condition, what, TIMEOUT_S)

    # -- Typing ------------------------------------------------------------------------------------

    def run(self, block: Block) -> None:
        """Do what a block says, and see that it has its effect."""
        if block.text.strip() in SERVERS:
            self.start(block.text.strip())
            return
        stopped = block.name in STOPPED
        if stopped:
            self.stop("meterd run")
        typed = self.type(block)
        give_up = time.monotonic() + TIMEOUT_S
        while block.name in LOOKS and _missing(block, typed) and time.monotonic() < give_up:
            typed = self.type(block)

        assert typed.returncode == 0, f"{block.place}: {typed.stdout}{typed.stderr}"
        assert _missing(block, typed) == [], f"{block.place}: {typed.stdout}{typed.stderr}"

        if block.name in EFFECTS:
            EFFECTS[block.name](self)
        if stopped:
            self.start("meterd run")

    def type(self, block: Block) -> subprocess.CompletedProcess[str]:
        """Run a block to its end in its language."""
        text = self.here(block.text)
        match block.language:
            case "sh":
                command = ["bash", "-c", f"{self._begin()}\n{text}\nexport -p > {self.exports}"]
            case "python":
                command = [sys.executable, self._write("example.py", text)]
            case "js":
                command = ["node", self._write("example.mjs", text)]
        return subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def _begin(self) -> str:
        """What was exported in an earlier block is known in the next one."""
        return f"set -euo pipefail; if [ -f {self.exports} ]; then . {self.exports}; fi"

    def _write(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text)
        return str(path)

    # -- Servers -----------------------------------------------------------------------------------

    def start(self, command: str) -> None:
        """Start what goes on, as a person does in a terminal of its own, and wait for it."""
        log = self.directory.parent / f"{command.split()[1]}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"{self._begin()}\nexec {self.here(command)}"],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.servers[command] = process
        url = self.here(SERVERS[command])
        self.until(lambda: process.poll() is not None or _answers(url), f"{command} to be ready")

        assert process.poll() is None, log.read_text()

    def stop(self, command: str) -> None:
        """SIGTERM; ending in order is 0."""
        process = self.servers.pop(command)
        process.send_signal(signal.SIGTERM)

        assert process.wait(TIMEOUT_S) == 0, command

    def kill(self) -> None:
        """Leave nothing running."""
        for process in self.servers.values():
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def _missing(block: Block, typed: subprocess.CompletedProcess[str]) -> list[str]:
    """What the document says is printed, and is not, in that order."""
    missing, place = [], 0
    for text in block.expected:
        found = typed.stdout.find(text, place)
        if found < 0:
            missing.append(text)
        else:
            place = found + len(text)
    return missing


# -- What blocks do beside what they print ---------------------------------------------------------


def _counted(agreement: str, events: int) -> Callable[[Story], None]:
    def seen(story: Story) -> None:
        def counted() -> bool:
            return bool(story.ask(f"/v1/agreements/{agreement}")["events"] == events)

        story.until(counted, f"{events} events of {agreement}")

    return seen


def _locked(story: Story) -> None:
    assert '"escrow_id"' in (story.directory / "escrow.json").read_text()


def _closed(story: Story) -> None:
    """The last release is paid, at the service too."""
    agreement = "/v1/agreements/customer-1"
    story.until(lambda: bool(story.ask(agreement)["state"] == "closed"), "customer-1 to be closed")
    escrow = story.ask(agreement)["escrows"][0]["id"]
    url = story.here(f"http://127.0.0.1:8788/api/v1/escrow/{escrow}")

    assert call("GET", url, key=PAYER_KEY)["released_amount"] == "0.007808"


def _active(story: Story) -> None:
    agreement = "/v1/agreements/customer-7"
    story.until(lambda: bool(story.ask(agreement)["state"] == "active"), "customer-7 to be active")


def _saved(story: Story) -> None:
    with tarfile.open(story.directory / "meterd-backup.tar.gz") as archive:
        assert "meterd-data/meterd.db" in archive.getnames()


EFFECTS: dict[str, Callable[[Story], None]] = {
    "curl -fsS http://127.0.0.1:8788/api/v1/escrow"
    " -H 'Authorization: Bearer pf_live_sandbox_payer' \\": _locked,
    "redis-cli -p 6379 XADD meterd:usage '*' id req-2"
    " agreement customer-1 meter tokens quantity 12 dimensions.kind input": _counted(
        "customer-1", 3
    ),
    "mosquitto_pub -p 1883 -q 1 -t meterd/usage/customer-1/tokens"
    """ -m '{"id": "req-4", "quantity": 250}'""": _counted("customer-1", 5),
    'meterd close customer-1 --reason "the story is over"': _closed,
    "# A payer locks a deposit, and you bind it; with its key that is one thing.": _active,
    "tar -czf meterd-backup.tar.gz meterd-data": _saved,
    "redis-cli -p 6379 XADD meterd:usage MAXLEN '~' 1000000 '*' id req-20"
    " agreement customer-2 meter tokens quantity 12": _counted("customer-2", 1),
}


def _bind(story: Story, agreement: str) -> None:
    body = {"to_agent_id": "agent_provider", "amount": "10.00"}
    url = story.here("http://127.0.0.1:8788/api/v1/escrow")
    escrow = call("POST", url, body, PAYER_KEY)["escrow_id"]
    url = story.here(f"http://127.0.0.1:8787/v1/agreements/{agreement}")
    call("PUT", url, {"plan": "tokens", "escrows": {"main": escrow}})
    shown = f"/v1/agreements/{agreement}"
    story.until(lambda: bool(story.ask(shown)["state"] == "active"), f"{agreement} to be active")


def _before_operations(story: Story) -> None:
    """A document that comes after the README takes a running daemon for granted, and customers."""
    for command in SERVERS:
        if command not in story.servers:
            story.start(command)
    _bind(story, "customer-2")


# -- The tests -------------------------------------------------------------------------------------

RUN = {"sh", "python", "js"}
EXAMINED = {"toml", "conf", "json"}  # By the tests at the end.
CALLERS = ("svc-a", "agent")  # Whose tokens stand in files, in the pieces of configuration.


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    """An empty directory, `meterd` on the path, and both brokers."""
    for name in ("bin", "here"):
        (tmp_path / name).mkdir()
    command = tmp_path / "bin" / "meterd"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m meterd "$@"\n')
    command.chmod(0o755)
    for program in ("node", "curl", "redis-cli", "mosquitto_pub"):
        assert shutil.which(program), f"{program} is not installed; these tests need it"
    with RedisServer() as redis_server, MosquittoServer() as mosquitto:
        ports = {"6379": redis_server.port, "1883": mosquitto.port}
        story = Story(tmp_path / "here", {**ports, "8787": free_port(), "8788": free_port()})
        try:
            yield story
        finally:
            story.kill()
            for log in tmp_path.glob("*.log"):  # Shown where the test has failed.
                sys.stdout.write(log.read_text()[-4000:])


def test_person_who_types_the_documents_from_top_to_bottom_sees_what_they_say(story: Story) -> None:
    """Every command ends with 0, prints what stands behind `# ->`, and has its effect."""
    for document in DOCUMENTS:
        if document.name == OPERATIONS:
            _before_operations(story)
        for block in blocks(document):
            if block.language in RUN and block.name not in NOT_RUN:
                story.run(block)
    letters = story.ask("/v1/dead-letters")["items"]

    assert letters == []


def test_every_block_is_run_or_says_why_not() -> None:
    """A new block shows what it does, here or behind `# ->`; no entry here is left over."""
    found = [block for document in DOCUMENTS for block in blocks(document)]
    languages = RUN | EXAMINED | SHOWN_ONLY
    unknown = [block.place for block in found if block.language not in languages]
    mute = [
        block.place
        for block in found
        if block.language in RUN
        and not block.expected
        and block.name not in {*NOT_RUN, *SERVERS, *EFFECTS}
    ]
    names = {block.name for block in found}
    left_over = {*NOT_RUN, *SERVERS, *EFFECTS, *LOOKS, *STOPPED} - names

    assert unknown == []
    assert mute == []
    assert left_over == set()


def _examples(language: str) -> list[Block]:
    return [
        block for document in DOCUMENTS for block in blocks(document) if block.language == language
    ]


@pytest.mark.parametrize("block", _examples("toml"), ids=lambda block: block.place)
def test_a_piece_of_configuration_has_no_mistake(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken as it stands, beside the key of the escrow service."""
    monkeypatch.chdir(tmp_path)
    for caller in CALLERS:
        (tmp_path / f"{caller}-token").write_text(f"a-long-random-text-of-{caller}")
        (tmp_path / f"{caller}-secret").write_text(
            f"whsec_{b64encode(caller.encode() * 8).decode()}"
        )
    notes: list[object] = []
    settings = config.parse(
        block.text, {"METERD_ESCROW__API_KEY": "pf_live_example"}, warn=notes.append
    )

    assert {token.name for token in settings.http.tokens} <= set(CALLERS)


@pytest.mark.parametrize("block", _examples("json"), ids=lambda block: block.place)
def test_a_piece_of_json_is_whole(block: Block) -> None:
    """A program could read it."""
    assert json.loads(block.text)


def _conf(name: str) -> str:
    (block,) = [block for block in _examples("conf") if block.name == f"# {name}"]
    return block.text


def test_every_conf_block_is_examined() -> None:
    """There is one for each broker, and no other."""
    names = [block.name for block in _examples("conf")]

    assert names == ["# redis.conf", "# mosquitto.conf"]


class DocumentedRedis(RedisServer):
    """Redis with what the document says, and a port."""

    def _command(self) -> list[str]:
        file = self.directory / "redis.conf"
        file.write_text(f"{_conf('redis.conf')}\nport {self.port}\ndir {self.directory}\n")
        return [self.program, str(file)]


def test_redis_as_documented_keeps_what_it_took_when_it_is_killed() -> None:
    """An entry that was answered is there after SIGKILL."""
    with DocumentedRedis() as server:
        with redis.Redis(port=server.port) as client:
            entry = client.xadd("meterd:usage", {"event": "{}"})
        server.kill()
        server.start()
        with redis.Redis(port=server.port) as client:
            kept = [found for found, _ in client.xrange("meterd:usage")]
            policy = client.config_get("maxmemory-policy")

    assert kept == [entry]
    assert policy == {"maxmemory-policy": "noeviction"}


class DocumentedMosquitto(MosquittoServer):
    """Mosquitto with what the document says, and a listener."""

    def _command(self) -> list[str]:
        text = _conf("mosquitto.conf").replace("/var/lib/mosquitto/", f"{self.directory}/")
        lines = [text, f"listener {self.port} {self.host}", "allow_anonymous true"]
        if os.geteuid() == 0:
            lines.append("user root")  # Or it would give up the right to write to its directory.
        file = self.directory / "mosquitto.conf"
        file.write_text("\n".join(lines) + "\n")
        return [self.program, "-c", str(file)]


def _session(server: MosquittoServer) -> paho.Client:
    """A connected client whose session stays at the broker."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="meterd", clean_session=False)
    client.connect(server.host, server.port)
    client.loop_start()
    wait_until(client.is_connected, "the broker to let us in")
    return client


def _leave(client: paho.Client) -> None:
    client.disconnect()
    client.loop_stop()


def test_mosquitto_as_documented_keeps_a_long_queue_when_it_is_killed() -> None:
    """More than its usual thousand messages wait for a client that is away, through a SIGKILL."""
    count = 1500
    with DocumentedMosquitto() as server:
        subscriber = _session(server)
        granted: list[object] = []
        subscriber.on_subscribe = lambda *_: granted.append(True)
        subscriber.subscribe("meterd/usage/+/+", qos=1)
        wait_until(lambda: bool(granted), "the subscription")
        _leave(subscriber)
        publisher = paho.Client(CallbackAPIVersion.VERSION2)
        publisher.connect(server.host, server.port)
        publisher.loop_start()
        sent = [publisher.publish("meterd/usage/a/b", str(n), qos=1) for n in range(count)]
        for message in sent:
            message.wait_for_publish(TIMEOUT_S)
        _leave(publisher)
        taken_at = time.time_ns()
        database = server.directory / "mosquitto.db"
        wait_until(
            lambda: database.exists() and database.stat().st_mtime_ns > taken_at, "an autosave"
        )
        server.kill()
        server.start()
        received: list[bytes] = []
        again = paho.Client(CallbackAPIVersion.VERSION2, client_id="meterd", clean_session=False)
        again.on_message = lambda _, __, message: received.append(message.payload)
        again.connect(server.host, server.port)
        again.loop_start()
        wait_until(lambda: len(received) >= count, f"{count} messages, not {len(received)}")
        _leave(again)

    assert sorted(map(int, received)) == list(range(count))
