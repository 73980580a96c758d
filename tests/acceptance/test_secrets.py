"""No secret is ever seen: canaries in every place that holds one, and a look at all that comes out.

The daemon runs with real brokers that ask for passwords, a service that echoes the key, callers
that send wrong tokens, and failures on purpose. Whatever it writes or answers is searched.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import paho.mqtt.client as paho
import pytest
import redis

from tests.acceptance.stage import Node, configuration, meterd, until
from tests.certificates import authority
from tests.certificates import signed as certified
from tests.processes import PAYER_KEY, Process, Sandbox, free_port
from tests.servers import MosquittoServer, RedisServer
from tests.signing import key_of, signed

KEY = "pf_live_CANARYKEY0123456789abcdef"
REDIS_PASSWORD = "CANARYREDIS p@ss/w:rd%41"
MQTT_PASSWORD = 'CANARYMQTT "p\\w" ü'
SENDER = "CANARYTOKEN-sender-0123456789"
TOKENS = {scope: f"CANARYTOKEN-{scope}-0123456789" for scope in ("ingest", "read", "admin")}
# A producer's keys: they are shown neither as they stand nor as what they mean.
PRODUCER_KEYS = [key_of("CANARYPRODUCER"), key_of("CANARYPRODUCERBEFORE")]
# What a part of any of them holds, however it is quoted.
CANARIES = (
    *(b"CANARYKEY", b"CANARYREDIS", b"CANARYMQTT", b"CANARYTOKEN", b"0123456789abcdef"),
    b"CANARYPRODUCER",
    base64.b64encode(b"CANARYPRODUCE"),  # Whole groups of three, so that it stands in both keys.
)
SECRETS = {
    "METERD_ESCROW__API_KEY": KEY,
    "METERD_SOURCES__REDIS__URL": "",
    "METERD_SOURCES__MQTT__PASSWORD": MQTT_PASSWORD,
}


class KeyedSandbox(Sandbox):
    """A sandbox whose provider has the canary for a key."""

    provider_key = KEY

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        keys = {KEY: "agent_provider", PAYER_KEY: "agent_payer"}
        self._command += [
            word for key, agent in keys.items() for word in ("--key", f"{key}={agent}")
        ]


@dataclass
class Stage:
    """A daemon under way, and everything that it let out so far."""

    node: Node
    sandbox: Sandbox
    env: Mapping[str, str]
    seen: dict[str, bytes]
    mqtt_port: int = 0

    def ask(self, method: str, path: str, body: object = None, token: str = "") -> int:
        """One call; its whole answer is kept. The status."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = self.node.ask(method, path, body, **headers)
        self.seen[f"{method} {path} {len(self.seen)}"] = (
            repr(sorted(answer.headers.items())).encode() + answer.raw
        )
        return answer.status

    def type(self, *words: str, **env: str) -> int:
        """Type a command; what it printed is kept. Its exit code."""
        answer = meterd(*words, **{"METERD_CONFIG": str(self.node.config), **self.env, **env})
        self.seen[f"meterd {' '.join(words)} {len(self.seen)}"] = (
            answer.stdout + answer.stderr
        ).encode()
        return answer.returncode


def _config(sandbox: Sandbox, mosquitto: MosquittoServer, tmp: Path) -> str:
    """The key comes from the environment, the tokens from files, the passwords from both."""
    tokens = ""
    for scope, token in TOKENS.items():
        file = tmp / f"{scope}.token"
        file.write_text(token + "\n")
        tokens += (
            f'[[http.tokens]]\nname = "{scope}"\ntoken_file = "{file}"\nscopes = ["{scope}"]\n'
        )
    sources = (
        '[[sources]]\nkind = "redis"\nblock = "200ms"\n'
        f'[[sources]]\nkind = "mqtt"\nport = {mosquitto.port}\nusername = "meterd"\n'
    )
    secret = tmp / "producer.secret"
    secret.write_text(PRODUCER_KEYS[0] + "\n")
    sources += (
        f'[[producers]]\nname = "svc"\ntoken = "sender"\nsecret_file = "{secret}"\n'
        f'old_secret = "{PRODUCER_KEYS[1]}"\n'
        f'[[http.tokens]]\nname = "sender"\ntoken = "{SENDER}"\nscopes = ["ingest", "gate"]\n'
    )
    text = configuration(sandbox, rest=tokens + sources)
    return text.replace('format = "json"', 'format = "json"\nlevel = "debug"').replace(
        f'api_key = "{KEY}"\n', ""
    )


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Everything that runs, after a life with payments, doubts, errors and wrong callers."""
    directory = tmp_path_factory.mktemp("secrets")
    with (
        RedisServer(password=REDIS_PASSWORD) as redis_server,
        MosquittoServer(users={"meterd": MQTT_PASSWORD}) as mosquitto,
        KeyedSandbox(directory / "sandbox") as sandbox,
    ):
        url = f"redis://:{quote(REDIS_PASSWORD, safe='')}@127.0.0.1:{redis_server.port}/0"
        env = {**SECRETS, "METERD_SOURCES__REDIS__URL": url}
        with Node(directory, _config(sandbox, mosquitto, directory), **env) as node:
            node.wait_ready()
            node.wait_sources()
            stage = Stage(node, sandbox, env, {}, mosquitto.port)
            yield stage


def _agreement(stage: Stage, fault: Mapping[str, object] | None = None) -> str:
    """An agreement that wants to pay, with a service that fails as told."""
    escrow = stage.sandbox.lock("1.00")
    body = {"plan": "stream", "escrows": {"main": escrow}}
    assert stage.ask("PUT", f"/v1/agreements/{escrow}", body, TOKENS["admin"]) == 201
    if fault:
        stage.sandbox.fault(escrow_id=escrow, **fault)
    event = {"id": f"e-{escrow}", "escrow_id": escrow, "meter": "units", "quantity": 20}
    assert stage.ask("POST", "/v1/events", event, TOKENS["ingest"]) == 200
    return escrow


def _wait(stage: Stage, escrow: str, text: bytes) -> None:
    """Wait until an agreement shows a text."""
    path, headers = f"/v1/agreements/{escrow}", {"Authorization": f"Bearer {TOKENS['read']}"}
    until(lambda: text in stage.node.ask("GET", path, **headers).raw, stage.node.log_tail)


def _clean(seen: Mapping[str, bytes]) -> list[str]:
    return [
        f"{name}: {canary!r}"
        for name, text in seen.items()
        for canary in CANARIES
        if canary in text
    ]


def test_no_answer_and_no_command_shows_a_secret(stage: Stage) -> None:
    """Each call with each token, wrong ones, and what the service echoed of the key."""
    escrow = _agreement(stage)
    _wait(stage, escrow, b'"released":"0.02"')
    echo = {"kind": "echo_key_in_error", "call": "release_partial", "count": 1}
    doubtful = _agreement(stage, echo)
    _wait(stage, doubtful, b"in_doubt")
    declined = _agreement(stage, {**echo, "status": 422})
    _wait(stage, declined, b"frozen")
    unread = _agreement(stage, {**echo, "call": "get", "count": 2, "status": 503})
    _wait(stage, unread, b'"released":"0.02"')
    _wait(stage, doubtful, b'"released":"0.02"')
    for path in (
        *("/", "/healthz", "/readyz", "/metrics", "/v1/status", "/v1/plans", "/v1/agreements"),
        *(f"/v1/agreements/{name}" for name in (escrow, doubtful, declined, unread)),
        *(f"/v1/agreements/{name}/releases" for name in (doubtful, declined)),
        *("/v1/releases", "/v1/dead-letters", "/v1/nowhere", "/v1/agreements/nobody"),
    ):
        for token in ("", "wrong", *TOKENS.values()):
            stage.ask("GET", path, token=token)
    for path in (f"/v1/agreements/{escrow}/freeze", f"/v1/agreements/{escrow}/resume"):
        stage.ask("POST", path, {"reason": "a test"}, TOKENS["admin"])
    stage.ask("POST", "/v1/events", b"rubbish", TOKENS["ingest"])
    stage.ask("POST", "/v1/events", {"id": "x"}, TOKENS["ingest"])
    codes = [
        stage.type("check"),
        stage.type("check", "--live"),
        stage.type("status", METERD_TOKEN=TOKENS["read"]),
        stage.type("status", METERD_TOKEN="CANARYTOKEN-wrong"),
        stage.type("agreements", METERD_TOKEN=TOKENS["read"]),
        stage.type("releases", "--json", METERD_TOKEN=TOKENS["read"]),
        stage.type("config", "example"),
    ]

    assert codes == [0, 0, 3, 1, 0, 0, 0], stage.seen
    assert len(stage.seen) > 80
    assert _clean(stage.seen) == []
    assert any(b"rejected header: ***" in text or b"***" in text for text in stage.seen.values())


def test_a_signature_that_is_refused_shows_no_key(stage: Stage) -> None:
    """Over HTTP, each way to be wrong; what comes back and the dead letters hold no key."""
    escrow = stage.sandbox.lock("1.00")
    body = {"plan": "lazy", "escrows": {"main": escrow}}
    assert stage.ask("PUT", f"/v1/agreements/{escrow}", body, TOKENS["admin"]) == 201
    event = {"id": "signed-1", "escrow_id": escrow, "meter": "units", "quantity": 1}
    content = json.dumps(event).encode()
    good = signed(PRODUCER_KEYS[1], content)
    attempts = [
        {},
        signed(key_of("another"), content),
        signed(PRODUCER_KEYS[0], content, at=1),
        {**good, "webhook-id": "a.b"},
        {**good, "webhook-signature": PRODUCER_KEYS[0]},
        good,
    ]
    bearer = {"Authorization": f"Bearer {SENDER}"}
    statuses = []
    for number, headers in enumerate(attempts):
        answer = stage.node.ask("POST", "/v1/events", content, **bearer, **headers)
        statuses.append(answer.status)
        said = repr(sorted(answer.headers.items())).encode() + answer.raw
        stage.seen[f"signature {number}"] = said
    for path in ("/v1/dead-letters", "/v1/journal", "/mcp"):
        stage.ask("GET", path, token=TOKENS["admin"])

    assert statuses == [401, 401, 401, 401, 401, 200]
    assert _clean(stage.seen) == []


def test_what_agents_and_streams_are_told_holds_no_secret(stage: Stage) -> None:
    """Each tool of /mcp that only asks, and the first events of a stream."""
    headers = {
        "Authorization": f"Bearer {TOKENS['read']}",
        "Accept": "application/json, text/event-stream",
        "Content-Type": "application/json",
    }
    calls = [("initialize", _INITIALIZE), ("tools/list", {})]
    for method, params in calls:
        question = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = stage.node.ask("POST", "/mcp", question, **headers)
        stage.seen[f"mcp {method}"] = answer.raw
    connection = http.client.HTTPConnection("127.0.0.1", stage.node.port, timeout=10)
    connection.request("GET", "/v1/stream", headers=headers)
    response = connection.getresponse()
    stage.seen["stream"] = response.read1(65_536) if response.status == 200 else response.read()
    connection.close()

    assert stage.seen["mcp tools/list"]
    assert _clean(stage.seen) == []


_INITIALIZE = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "canary", "version": "1"},
}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        (f"Basic {TOKENS['read']}", 401),
        (f"Bearer {TOKENS['read']}x", 401),
        (f"Bearer {TOKENS['ingest']}", 403),
        (f"bearer {TOKENS['read']}", 200),
        ("Bearer " + "x" * 1024 * 1024, 400),
    ],
    ids=["none", "empty", "wrong", "basic", "longer", "another scope", "right", "1 MiB"],
)
def test_a_call_without_the_right_token_is_refused(stage: Stage, header: str, status: int) -> None:
    """4xx, whatever the token looks like; and it is not said what would have been right."""
    connection = http.client.HTTPConnection("127.0.0.1", stage.node.port, timeout=10)
    try:
        connection.request("GET", "/v1/status", headers={"Authorization": header} if header else {})
        response = connection.getresponse()
        body = response.read()
    except (BrokenPipeError, ConnectionResetError):
        response, body = None, b""  # It hung up while the rest of a mebibyte was on its way.
    finally:
        connection.close()

    assert response is None or response.status == status
    assert response is not None or status == 400
    assert b"CANARY" not in body


def test_no_log_and_no_file_holds_a_secret(stage: Stage) -> None:
    """The log at debug and every byte below data_dir; brokers came and went meanwhile."""
    with redis.Redis.from_url(stage.env["METERD_SOURCES__REDIS__URL"]) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        client.xadd("meterd:usage", {"meter": "units"})
    stage.node.wait_logged("source_down")
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "meterd", protocol=paho.MQTTv5)
    client.username_pw_set("meterd", MQTT_PASSWORD)
    client.connect("127.0.0.1", stage.mqtt_port)
    client.loop_start()  # A second client with our id: the broker cuts us off.
    stage.node.wait_logged("source_down", 2)
    client.disconnect()
    client.loop_stop()
    running = _files(stage.node)
    stage.node.stop()

    assert stage.node.returncode == 0
    assert len(stage.node.logged()) > 10
    assert any(name.endswith("-wal") for name in running)
    seen = {**running, **_files(stage.node), "log": stage.node._log.read_bytes()}
    assert _clean(seen) == []
    # The key that signs receipts is a file for itself: no other holds it, whole or as hex.
    [own] = [name for name in running if name.endswith("receipts.key")]
    words = _words_of_a_key(running[own])
    others = {name: text for name, text in {**seen, **stage.seen}.items() if name != own}
    assert [name for name, text in others.items() for word in words if word in text] == []


def _words_of_a_key(pem: bytes) -> list[bytes]:
    """What a key could be known by: its lines, and its bytes in each spelling."""
    lines = [line for line in pem.splitlines() if line and not line.startswith(b"-----")]
    text = b"".join(lines)
    raw = bytes.fromhex(text.decode()) if len(text) == 64 else base64.b64decode(text)[-32:]
    return [*lines, raw, raw.hex().encode(), base64.b64encode(raw)]


def _files(node: Node) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in node.data_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["user part", "query"])
def test_wrong_passwords_are_not_shown_when_brokers_refuse_them(
    tmp_path: Path, stage: Stage, where: str
) -> None:
    """The broker's own words about a refused login go into status and log, without the password."""
    with (
        RedisServer(password="another") as redis_server,
        MosquittoServer(users={"meterd": "another"}) as mosquitto,
    ):
        password = quote(REDIS_PASSWORD, safe="")
        address = f"127.0.0.1:{redis_server.port}/0"
        urls = {
            "user part": f"redis://CANARYREDISUSER:{password}@{address}",
            "query": f"redis://{address}?password={password}",
        }
        env = {**stage.env, "METERD_SOURCES__REDIS__URL": urls[where]}
        with Node(tmp_path, _config(stage.sandbox, mosquitto, tmp_path), **env) as node:
            node.wait_ready()
            node.wait_logged("source_waiting", 2)
            seen = Stage(node, stage.sandbox, env, {})
            seen.ask("GET", "/readyz")
            seen.ask("GET", "/v1/status", token=TOKENS["read"])
            live = seen.type("check", "--live")
            node.stop()

    masked = {name: text.replace(b"CANARYREDISUSER", b"") for name, text in seen.seen.items()}
    assert live == 1
    assert _clean({**masked, "log": node._log.read_bytes().replace(b"CANARYREDISUSER", b"")}) == []


@pytest.mark.parametrize(
    "change",
    [
        {"METERD_ESCROW__API_KEY": f"{KEY}\nX-Evil: 1"},
        {"METERD_ESCROW__API_KEY": f"{KEY} ü"},
        {"METERD_SOURCES__REDIS__URL": f"rediss//:{REDIS_PASSWORD}@nowhere"},
        {"METERD_SOURCES__REDIS__URL": f"redis://:{REDIS_PASSWORD}@127.0.0.1/0"},
        {"METERD_SOURCES__REDIS__URL": "redis://:one/CANARYREDIS@127.0.0.1/0"},
        {"METERD_SOURCES__REDIS__URL": "redis://:one#CANARYREDIS@127.0.0.1/0"},
        {"METERD_SOURCES__MQTT__PASSWORD": "CANARYMQTT\x00" + "x" * 70_000},
        {"METERD_ESCROW__BASE_URL": f"https://user:{KEY}@example.com"},
        {"METERD_PRODUCERS__SVC__OLD_SECRET": "whsec_CANARYPRODUCER"},
        {"METERD_PRODUCERS__SVC__OLD_SECRET": PRODUCER_KEYS[0]},
        {"METERD_PRODUCERS__SVC__OLD_SECRET": "CANARYPRODUCER" * 400},
        {"METERD_HTTP__LISTEN": "0.0.0.0:0", "METERD_ESCROW__IDEMPOTENCY_HEADER": f"{KEY}: x"},
    ],
    ids=lambda change: next(iter(change)).removeprefix("METERD_").lower(),
)
def test_a_mistake_in_a_secret_is_told_without_it(stage: Stage, change: Mapping[str, str]) -> None:
    """`meterd check` and `meterd run` name the key, not its value."""
    change = {name: value.replace("\0", "\x01") for name, value in change.items()}
    seen = Stage(stage.node, stage.sandbox, stage.env, {})
    codes = [seen.type("check", **change), seen.type("run", **change)]

    assert codes == [2, 2], seen.seen
    assert _clean(seen.seen) == []


FAILURES = {
    # An error behind which the process ends: the loop that pays breaks.
    "loop": (
        "from meterd.settler import Settler\n"
        "def broken(self): raise RuntimeError('broken with ' + SECRETS)\n"
        "Settler._wait = broken\n"
    ),
    # A call of the API that breaks: a 500, and the process goes on.
    "call": (
        "from meterd.api.plans import Plans\n"
        "from meterd.api import plans\n"
        "def broken(*_): raise RuntimeError('broken with ' + SECRETS)\n"
        "plans.plan_view = broken\n"
    ),
    # Something that nobody waits for.
    "side": (
        "from meterd.app import Daemon\n"
        "async def broken(self): raise ValueError('broken with ' + SECRETS)\n"
        "Daemon._tidy = broken\n"
    ),
    # Before anything runs.
    "start": (
        "from meterd.store.sqlite import SqliteStore\n"
        "def broken(self, **_): raise RuntimeError('broken with ' + SECRETS)\n"
        "SqliteStore.load = broken\n"
    ),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_traceback_of_meterds_own_mistake_shows_no_secret(
    tmp_path: Path, stage: Stage, kind: str
) -> None:
    """A broken meterd ends with 70 and a traceback in the log, in which secrets are masked."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, sys\n"
        "from meterd.cli.main import main\n"
        "SECRETS = ' '.join([os.environ['METERD_ESCROW__API_KEY'],\n"
        "    os.environ['METERD_SOURCES__REDIS__URL'],\n"
        "    os.environ['METERD_SOURCES__MQTT__PASSWORD'], os.environ['TOKEN']])\n"
        f"{FAILURES[kind]}"
        "sys.exit(main(['run', '-c', sys.argv[1]]))\n"
    )
    port = free_port()
    config = tmp_path / "meterd.toml"
    text = stage.node.config.read_text().replace(str(stage.node.data_dir), str(tmp_path / "state"))
    config.write_text(text.replace(f"127.0.0.1:{stage.node.port}", f"127.0.0.1:{port}"))
    env = {**stage.env, "TOKEN": TOKENS["admin"], "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tmp_path / "log"
    process = Process([], log, f"http://127.0.0.1:{port}/healthz", env)
    process._command = [sys.executable, str(script), str(config)]
    with process:
        if kind == "call":
            process.wait_ready()
            headers = {"Authorization": f"Bearer {TOKENS['read']}"}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/v1/plans", headers=headers)
            response = connection.getresponse()
            answer = response.read()
            connection.close()
            process.stop()
            assert (response.status, process.returncode) == (500, 0)
            assert b"CANARY" not in answer
        else:
            code = process.wait()
            assert code == 70

    written = log.read_bytes()
    assert b"broken with" in written
    assert b"Traceback" in written
    assert _clean({"log": written}) == []


def test_the_key_of_a_certificate_is_shown_by_nothing(tmp_path: Path, stage: Stage) -> None:
    """A daemon with TLS: its log, its files, its answers, and the words about a bad key."""
    ca = authority(tmp_path)
    pair = certified(tmp_path, ca, "server", "IP:127.0.0.1")
    words = _words_of_a_key(pair.key.read_bytes())
    text = configuration(stage.sandbox, key=KEY).replace(
        "[escrow]",
        f'tls_cert_file = "{pair.cert}"\ntls_key_file = "{pair.key}"\n[escrow]',
        1,
    )
    with Node(tmp_path, text) as node:
        node.wait_logged("listening")
        seen = Stage(node, stage.sandbox, {}, {})
        seen.type("status")
        seen.type("check")
        pair.key.write_bytes(pair.key.read_bytes().replace(b"\n-----END", b"x\n-----END"))
        seen.type("check")
        node.signal(1)
        node.wait_logged("reload_refused")
        node.stop()
    told = {**seen.seen, **_files(node), "log": node._log.read_bytes()}

    assert len(seen.seen) == 3
    assert [name for name, text in told.items() for word in words if word in text] == []
