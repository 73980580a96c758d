"""What networks do, done to each link of the daemon: at the end every sum agrees all the same.

Real Redis, real Mosquitto, the sandbox and the daemon, with a fault proxy on the link under test.
In the matrix each fault in each phase has a source or an escrow of its own, so that all are struck
at the same time, each as often as its script says, and the one that suffers is known by name.
Producers and the test's own questions go around the proxies.

A request that the *network* delivers twice to the escrow service, of a call that the daemon sent
once, is outside what the protocol assumes (a row is sent at most once; nobody can keep a service
that ignores keys from paying a copy). What is promised then: at most one release too much, and the
escrow is frozen.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import pytest
import redis

from tests.processes import Daemon, Sandbox, call, free_port, wait_until
from tests.proxy import Fate, Fault, FaultProxy, Network, Phase, every_fault
from tests.servers import MosquittoServer, RedisServer

SOAK_SEEDS = 12
PRICE = Decimal("0.001001")
QUANTUM = Decimal("0.000001")
REQUEST_TIMEOUT_S = 1.0
# Longer than the client waits, so that the request lands after it gave up; shorter than that and
# the quarantine together, as the protocol assumes.
LATE_S = 1.4
CONFIG = """
[daemon]
data_dir = "{data_dir}"
drain_timeout = "5s"

[http]
listen = "127.0.0.1:{port}"

[escrow]
base_url = "{escrow}"
api_key = "{key}"
request_timeout = "1s"
in_doubt_quarantine = "1s"
observe_gap = "300ms"
min_interval = "100ms"
voids_per_day = 1000
doubts_max = 1000
concurrency = 64
release_max = "0.25"

[meters.units]

[plans.stream]
pattern = "streaming"
rates = [{{ meter = "units", price = "{price}" }}]
settle = {{ units = "20", interval = "1s", min_release = "0.000001" }}
"""
AGREEMENT = '\n[[agreements]]\nid = "{id}"\nplan = "stream"\nescrows = {{ main = "{escrow}" }}\n'
REDIS = """
[[sources]]
kind = "redis"
name = "{name}"
url = "{url}"
stream = "{stream}"
block = "200ms"
"""
MQTT = """
[[sources]]
kind = "mqtt"
name = "{name}"
port = {port}
client_id = "{name}"
topic = "{topic}"
"""


@dataclass(frozen=True)
class Case:
    """One fault in one phase of one link, and what stands in its way."""

    name: str
    escrow: str
    proxy: FaultProxy


class Books:
    """The test's own count of distinct events, and the checks against it."""

    def __init__(self, sandbox: Sandbox, daemon: Daemon, escrows: Mapping[str, str]) -> None:
        self.sandbox = sandbox
        self.daemon = daemon
        self.escrows = escrows  # Agreement -> escrow.
        self.sent: collections.Counter[str] = collections.Counter()
        self.units: collections.Counter[str] = collections.Counter()

    def event(self, agreement: str, quantity: int = 1) -> dict[str, object]:
        """A new event, counted as sent."""
        self.sent[agreement] += 1
        self.units[agreement] += quantity
        return {
            "id": f"{agreement}-{self.sent[agreement]}",
            "agreement": agreement,
            "meter": "units",
            "quantity": quantity,
        }

    def post(self, agreement: str, quantity: int) -> None:
        """Send one event by HTTP."""
        call("POST", f"{self.daemon.url}/v1/events", self.event(agreement, quantity))

    def agreements(self) -> dict[str, Any]:
        """What the daemon says of each."""
        rows: dict[str, Any] = {}
        after = ""
        while True:
            page = call("GET", f"{self.daemon.url}/v1/agreements?limit=100{after}")
            rows |= {row["id"]: row for row in page["items"]}
            if not page["next"]:
                return rows
            after = f"&after={page['next']}"

    def owed(self, agreement: str) -> Decimal:
        """What was used, at its price."""
        return self.units[agreement] * PRICE

    async def until(self, what: str, true: Callable[[Any], bool], seconds: float = 60) -> None:
        """Wait until it is true of each agreement; names those of which it is not."""
        odd: dict[str, Any] = {}

        async def all_true() -> bool:
            rows = await asyncio.to_thread(self.agreements)
            odd.clear()
            odd.update({name: row for name, row in rows.items() if not true(row)})
            return not odd

        try:
            await wait_until(all_true, seconds)
        except AssertionError:
            shown = {
                name: (row["state"], row["reason"], row["events"], row["release"])
                for name, row in odd.items()
            }
            raise AssertionError(f"{what} is not so: {json.dumps(shown, indent=1)}") from None

    async def close(self) -> None:
        """Close every agreement: all is counted, all is paid to the last quantum, nothing twice."""
        await self.until("counted", lambda row: row["events"] == self.sent[row["id"]])
        for agreement in self.escrows:
            body = {"reason": "the test ends"}
            call("POST", f"{self.daemon.url}/v1/agreements/{agreement}/close", body)
        await self.until("closed", lambda row: row["state"] == "closed")
        self.check()

    def check(self) -> None:
        """Compare the counters and the service's own log with the test's own count."""
        for agreement, row in self.agreements().items():
            usage = call("GET", f"{self.daemon.url}/v1/agreements/{agreement}/usage")["items"]
            paid = self.sandbox.operations(self.escrows[agreement])
            keys = collections.Counter(operation["idempotency_key"] for operation in paid)
            owed = self.owed(agreement)

            assert [Decimal(self.units[agreement])] == [Decimal(line["quantity"]) for line in usage]
            assert owed == Decimal(row["accrued"]), agreement
            assert owed.quantize(QUANTUM, ROUND_FLOOR) == _sum(paid), agreement
            assert set(keys.values()) <= {1}, f"{agreement}: a release was paid twice"

        # A broker may deliver again, for want of an ack, what was counted before the close.
        letters = call("GET", f"{self.daemon.url}/v1/dead-letters?limit=1000")["items"]

        assert {letter["reason"] for letter in letters} <= {"closed"}


def _sum(operations: Sequence[Mapping[str, str]]) -> Decimal:
    return sum((Decimal(operation["amount"]) for operation in operations), Decimal(0))


def _seed() -> int:
    seed = int(os.environ.get("METERD_SEED", random.SystemRandom().randrange(2**32)))
    print(f"METERD_SEED={seed}")
    return seed


def _config(path: Path, sandbox: Sandbox, api: str, parts: Sequence[str], **env: str) -> Daemon:
    """Write a configuration; the daemon that will run on it."""
    port = free_port()
    text = CONFIG.format(
        data_dir=path / "state", port=port, escrow=api, key=sandbox.provider_key, price=PRICE
    )
    (path / "meterd.toml").write_text(text + "".join(parts))
    return Daemon(path / "meterd.toml", port, **env)


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def _names(rng: random.Random, *, whole: bool) -> dict[str, tuple[Fault, Phase]]:
    """Each fault in each of its phases; else each fault, in a phase by seed."""
    phases: dict[Fault, list[Phase]] = {}
    for fault, phase in every_fault():
        phases.setdefault(fault, []).append(phase)
    return {
        f"{fault}-{phase}": (fault, phase)
        for fault, possible in phases.items()
        for phase in (possible if whole else [rng.choice(possible)])
    }


def _report(link: str, cases: Sequence[Case], proxies: Collection[FaultProxy]) -> None:
    """Print what struck; a fault that never did would have failed the test before."""
    struck = [(fate.fault, fate.phase) for proxy in proxies for fate in proxy.struck]
    kinds = len({fault for fault, _ in struck})
    print(
        f"{link}: {len(struck)} faults struck {len(cases)} cases: {kinds} kinds of fault,"
        f" {len(set(struck))} with a phase"
    )


async def _many(path: Path, run: Callable[[Path, int], Awaitable[object]], seeds: int) -> None:
    """Run again and again, each time from a seed of its own."""
    first = _seed()
    for seed in range(first, first + seeds):
        directory = path / str(seed)
        directory.mkdir()
        print(f"METERD_SEED={seed}")
        await run(directory, seed)


def _connected(daemon: Daemon) -> bool:
    """Nothing is published before the broker holds the sessions that must keep it."""
    states = call("GET", f"{daemon.url}/v1/status")["sources"]
    return all(state["connected"] for state in states)


@contextmanager
def _mqtt_producer(server: MosquittoServer):
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    if server.tls:
        client.tls_set(str(server.ca_file))
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


async def _feed(cases: Sequence[Case], send: Callable[[Case], None], seconds: float) -> None:
    """Send to each case until its script is through, and once more behind that."""
    deadline = asyncio.get_running_loop().time() + seconds
    last = set(cases)
    while last:
        for case in list(last):
            await asyncio.to_thread(send, case)
            if not case.proxy.left:
                last.discard(case)
        late = {case.name: case.proxy.left for case in last}

        assert asyncio.get_running_loop().time() < deadline, f"never struck: {late}"
        await asyncio.sleep(0.3)


async def test_redis_link_counts_each_event_once_whatever_the_network_does(tmp_path):
    """Each fault, on the first connection and on a read or the group's position, by seed."""
    await _redis_link(tmp_path, _seed(), whole=False)


async def _redis_link(tmp_path: Path, seed: int, *, whole: bool = True) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        sandbox = stack.enter_context(Sandbox(tmp_path / "sandbox"))
        network = stack.enter_context(Network(seed))
        cases, parts = [], []
        for name, (fault, phase) in _names(rng, whole=whole).items():
            used = [
                Fate(fault, phase, after=rng.randrange(1, 60), only=only)
                for only in (b"XREAD", b"SETID")
            ]
            fates = [Fate(fault, phase), *(used if whole else [rng.choice(used)])]
            case = Case(name, sandbox.lock("10.00"), network.proxy(server.port, *fates))
            url = f"redis://127.0.0.1:{case.proxy.port}/0"
            parts.append(REDIS.format(name=name, url=url, stream=f"usage:{name}"))
            parts.append(AGREEMENT.format(id=name, escrow=case.escrow))
            cases.append(case)
        daemon = stack.enter_context(_config(tmp_path, sandbox, sandbox.api, parts))
        books = Books(sandbox, daemon, {case.name: case.escrow for case in cases})
        producer = stack.enter_context(redis.Redis(port=server.port))

        def send(case: Case) -> None:
            event = json.dumps(books.event(case.name))
            for _ in range(rng.choice((1, 1, 2))):  # The producer itself repeats some, too.
                producer.xadd(f"usage:{case.name}", {"event": event})

        daemon.wait_ready()
        await _feed(cases, send, 100)
        network.calm()
        await books.close()
        daemon.stop()
        _report("redis", cases, network.proxies)

        assert (3 if whole else 2) * len(cases) == sum(len(case.proxy.struck) for case in cases)


async def test_mqtt_link_counts_each_event_once_whatever_the_network_does(tmp_path):
    """Each fault, on the first connection, in mid-delivery or at a PUBACK, by seed."""
    await _mqtt_link(tmp_path, _seed(), whole=False)


async def _mqtt_link(tmp_path: Path, seed: int, *, whole: bool = True) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        # A silent broker is given up after as long as its keep-alive.
        server = stack.enter_context(MosquittoServer(options={"max_keepalive": 10}))
        sandbox = stack.enter_context(Sandbox(tmp_path / "sandbox"))
        network = stack.enter_context(Network(seed))
        cases, parts = [], []
        for name, (fault, phase) in _names(rng, whole=whole).items():
            fates = [
                Fate(fault, phase),
                Fate(fault, phase, after=rng.randrange(30, 200)),
                Fate(fault, phase, after=rng.randrange(1, 4), only=b"\x40\x02"),
            ]
            if not whole:
                fates = [rng.choice(fates)]  # Each may have to wait for a silent broker.
            case = Case(name, sandbox.lock("10.00"), network.proxy(server.port, *fates))
            topic = f"{name}/{{agreement}}/{{meter}}"
            parts.append(MQTT.format(name=name, port=case.proxy.port, topic=topic))
            parts.append(AGREEMENT.format(id=name, escrow=case.escrow))
            cases.append(case)
        daemon = stack.enter_context(_config(tmp_path, sandbox, sandbox.api, parts))
        books = Books(sandbox, daemon, {case.name: case.escrow for case in cases})
        producer = stack.enter_context(_mqtt_producer(server))

        def send(case: Case) -> None:
            event = json.dumps(books.event(case.name))
            for _ in range(rng.choice((1, 1, 2))):
                topic = f"{case.name}/{case.name}/units"
                producer.publish(topic, event, qos=1).wait_for_publish(10)

        daemon.wait_ready()
        await wait_until(lambda: asyncio.to_thread(_connected, daemon), 60)
        await _feed(cases, send, 120)
        network.calm()
        await books.close()
        daemon.stop()
        _report("mqtt", cases, network.proxies)

        assert (3 if whole else 1) * len(cases) == sum(len(case.proxy.struck) for case in cases)


def _is_a_copied_payment(call_: str, fault: Fault) -> bool:
    return call_ == "release" and fault is Fault.TWICE


async def test_escrow_link_pays_each_unit_once_whatever_the_network_does(tmp_path):
    """Each fault, of a reading and of a release, at its first and at a later byte."""
    await _escrow_link(tmp_path, _seed(), whole=False)


async def _escrow_link(tmp_path: Path, seed: int, *, whole: bool = True) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(tmp_path / "sandbox"))
        network = stack.enter_context(Network(seed))
        cases, parts = [], []
        proxy = network.proxy(_port(sandbox.api))
        for call_ in ("reading", "release"):
            for name, (fault, phase) in _names(rng, whole=whole).items():
                if _is_a_copied_payment(call_, fault):
                    continue
                escrow = sandbox.lock("10.00")
                method, tail = ("GET", "") if call_ == "reading" else ("POST", "/release-partial")
                only = f"{method} /api/v1/escrow/{escrow}{tail} ".encode()
                script = [
                    Fate(fault, phase, after, seconds, only)
                    for after, seconds in ((0, LATE_S), (rng.randrange(1, 150), 0.3))
                ]
                proxy.script(*script)
                cases.append(Case(f"{call_}-{name}", escrow, proxy))
                parts.append(AGREEMENT.format(id=cases[-1].name, escrow=escrow))
        api = sandbox.api.replace(str(_port(sandbox.api)), str(proxy.port))
        daemon = stack.enter_context(_config(tmp_path, sandbox, api, parts))
        books = Books(sandbox, daemon, {case.name: case.escrow for case in cases})
        daemon.wait_ready()
        for case in cases:
            books.post(case.name, 1)
        deadline = asyncio.get_running_loop().time() + 40
        while left := proxy.left:
            waiting = {fate.only.split(b"/")[4].split()[0].decode() for fate in left}
            names = [case.name for case in cases if case.escrow in waiting]

            assert asyncio.get_running_loop().time() < deadline, f"never struck: {names}"
            for name in names:
                await asyncio.to_thread(books.post, name, rng.randrange(20, 60))
            await asyncio.sleep(1)
        network.calm()
        await books.close()
        daemon.stop()
        _report("escrow service", cases, [proxy])

        assert 2 * len(cases) == len(proxy.struck)


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("link", [_redis_link, _mqtt_link, _escrow_link])
async def test_each_fault_in_each_phase_of_a_link_costs_nothing(tmp_path, link):
    """Every fault in every phase of one link, from many seeds."""
    await _many(tmp_path, link, SOAK_SEEDS)


def _cuts(rng: random.Random) -> list[Fate]:
    """At once, within the handshake and behind it, of what either side says."""
    return [
        Fate(Fault.CUT, Phase.CONNECT),
        Fate(Fault.CUT, Phase.REQUEST, rng.randrange(1, 400)),
        Fate(Fault.CUT, Phase.ANSWER, rng.randrange(1, 500)),
        Fate(Fault.CUT, Phase.REQUEST, rng.randrange(550, 900)),
        Fate(Fault.CUT, Phase.ANSWER, rng.randrange(1300, 1700)),
    ]


async def _tls_links(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        redis_server = stack.enter_context(RedisServer())
        mosquitto = stack.enter_context(
            MosquittoServer(options={"max_keepalive": 10, "set_tcp_nodelay": "true"}, tls=True)
        )
        sandbox = stack.enter_context(Sandbox(tmp_path / "sandbox"))
        network = stack.enter_context(Network(seed))
        files = mosquitto.ca_file, mosquitto._key_file
        links = {
            name: network.proxy(port, *_cuts(rng))
            for name, port in (
                ("redis", network.tls(redis_server.port, *files)),
                ("mqtt", mosquitto.port),
                ("escrow", network.tls(_port(sandbox.api), *files)),
            )
        }
        cases = [Case(name, sandbox.lock("10.00"), link) for name, link in links.items()]
        url = f"rediss://127.0.0.1:{links['redis'].port}/0?ssl_ca_certs={files[0]}"
        parts = [
            REDIS.format(name="redis", url=url, stream="usage"),
            MQTT.format(name="mqtt", port=links["mqtt"].port, topic="{agreement}/{meter}"),
            f'tls = true\nhost = "127.0.0.1"\nca_file = "{files[0]}"\n',
            *(AGREEMENT.format(id=case.name, escrow=case.escrow) for case in cases),
        ]
        api = f"https://127.0.0.1:{links['escrow'].port}{urlsplit(sandbox.api).path}"
        daemon = _config(tmp_path, sandbox, api, parts, SSL_CERT_FILE=str(files[0]))
        stack.enter_context(daemon)
        books = Books(sandbox, daemon, {case.name: case.escrow for case in cases})
        stream = stack.enter_context(redis.Redis(port=redis_server.port))
        producer = stack.enter_context(_mqtt_producer(mosquitto))
        daemon.wait_ready()
        await wait_until(lambda: asyncio.to_thread(_connected, daemon), 60)

        def send(case: Case) -> None:
            event = books.event(case.name, rng.randrange(1, 30))
            if case.name == "redis":
                stream.xadd("usage", {"event": json.dumps(event)})
            elif case.name == "mqtt":
                producer.publish("mqtt/units", json.dumps(event), qos=1).wait_for_publish(10)
            else:
                call("POST", f"{daemon.url}/v1/events", event)

        await _feed(cases, send, 100)
        network.calm()
        await books.close()
        daemon.stop()
        _report("all links with TLS", cases, network.proxies)

        assert [len(_cuts(rng))] * 3 == [len(case.proxy.struck) for case in cases]


async def test_links_with_tls_that_is_cut_cost_nothing(tmp_path):
    """No farewell of TLS, within the handshake and behind it, on every link at once."""
    await _tls_links(tmp_path, _seed())


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_links_with_tls_that_is_cut_at_many_bytes_cost_nothing(tmp_path):
    """The same from many seeds."""
    await _many(tmp_path, _tls_links, SOAK_SEEDS)


@pytest.mark.parametrize("phase", list(Phase))
async def test_release_copied_by_the_network_costs_at_most_one_release_and_freezes(tmp_path, phase):
    """Outside the assumptions: one release too much at most, then the escrow is frozen for good."""
    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(tmp_path / "sandbox"))
        network = stack.enter_context(Network(1))
        escrow = sandbox.lock("10.00")
        only = f"POST /api/v1/escrow/{escrow}/release-partial ".encode()
        proxy = network.proxy(_port(sandbox.api), Fate(Fault.TWICE, phase, only=only))
        api = sandbox.api.replace(str(_port(sandbox.api)), str(proxy.port))
        parts = [AGREEMENT.format(id="a", escrow=escrow)]
        daemon = stack.enter_context(_config(tmp_path, sandbox, api, parts))
        books = Books(sandbox, daemon, {"a": escrow})
        daemon.wait_ready()
        books.post("a", 100)

        async def paid_twice() -> bool:
            return len(await asyncio.to_thread(sandbox.operations, escrow)) == 2

        await wait_until(paid_twice, 30)
        paid = sandbox.operations(escrow)

        assert 1 == len({operation["idempotency_key"] for operation in paid})
        assert _sum(paid) == books.owed("a") + Decimal(paid[0]["amount"])

        # More than was paid too much is used: it is counted, and the reading before the next
        # release shows what happened.
        books.post("a", 1000)
        await books.until("frozen", lambda row: row["state"] == "frozen")
        row = books.agreements()["a"]
        daemon.stop()

        assert 2 == row["events"]
        assert paid == sandbox.operations(escrow)


async def _storm(path: Path, seed: int, seconds: float = 20) -> None:
    """Faults by seed on all links at once, then calm."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        redis_server = stack.enter_context(RedisServer())
        mosquitto = stack.enter_context(MosquittoServer(options={"max_keepalive": 10}))
        sandbox = stack.enter_context(Sandbox(path / "sandbox"))
        network = stack.enter_context(Network(seed))
        links = [
            network.proxy(port, share=share)
            for port, share in (
                (redis_server.port, 0.1),
                (mosquitto.port, 0.3),
                (_port(sandbox.api), 0.0),
            )
        ]
        # Readings alone may be copied: what a copied release costs has a test of its own.
        names = [f"agreement-{number}" for number in range(4)]
        escrows = {name: sandbox.lock("50.00") for name in names}
        for fault, phase in rng.sample(every_fault(), len(every_fault())):
            for escrow in escrows.values():
                tail = "/release-partial" if fault is not Fault.TWICE else ""
                only = f"/api/v1/escrow/{escrow}{tail} ".encode()
                after = rng.choice((0, rng.randrange(200)))
                links[2].script(Fate(fault, phase, after, rng.uniform(0.1, LATE_S), only))
        parts = [AGREEMENT.format(id=name, escrow=escrow) for name, escrow in escrows.items()]
        url = f"redis://127.0.0.1:{links[0].port}/0"
        parts.append(REDIS.format(name="redis", url=url, stream="meterd:usage"))
        topic = "meterd/usage/{agreement}/{meter}"
        parts.append(MQTT.format(name="mqtt", port=links[1].port, topic=topic))
        api = sandbox.api.replace(str(_port(sandbox.api)), str(links[2].port))
        daemon = stack.enter_context(_config(path, sandbox, api, parts))
        books = Books(sandbox, daemon, escrows)
        stream = stack.enter_context(redis.Redis(port=redis_server.port))
        producer = stack.enter_context(_mqtt_producer(mosquitto))
        daemon.wait_ready()

        async def mqtt_is_up() -> bool:
            states = call("GET", f"{daemon.url}/v1/status")["sources"]
            return all(state["connected"] for state in states if state["name"] == "mqtt")

        await wait_until(mqtt_is_up, 60)
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            for name in names:
                if rng.random() < 0.5:
                    event = json.dumps(books.event(name, rng.randrange(1, 30)))
                    await asyncio.to_thread(stream.xadd, "meterd:usage", {"event": event})
                else:
                    event = json.dumps(books.event(name, rng.randrange(1, 30)))
                    info = producer.publish(f"meterd/usage/{name}/units", event, qos=1)
                    await asyncio.to_thread(info.wait_for_publish, 10)
            await asyncio.sleep(rng.uniform(0, 0.2))
        network.calm()
        await books.close()
        daemon.stop()
        _report("a storm", [], links)

        assert any(link.struck for link in links)


async def test_books_close_after_a_storm_on_all_links(tmp_path):
    """Faults by seed on all three links at once: afterwards every sum is exact."""
    await _storm(tmp_path, _seed(), 5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_books_close_after_many_storms(tmp_path):
    """Storm after storm, each from a seed of its own."""
    await _many(tmp_path, _storm, 40)
