"""The examples in docs/examples do what they say, with the very tools that they are for.

Each is run against a real daemon, Redis and Mosquitto: once, again with the same id, and through a
proxy that cuts off the answer. What is accrued is compared to the last unit. A tool that is not
installed is a failure, and never a skip.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

from tests.acceptance.stage import Node, configuration, until
from tests.documents import ROOT, blocks
from tests.processes import Sandbox
from tests.proxy import Fate, Fault, FaultProxy, Network, Phase
from tests.servers import MosquittoServer, RedisServer

EXAMPLES = ROOT / "docs" / "examples"
PAGE = EXAMPLES / "README.md"
TIMEOUT_S = 120  # `go run` compiles first, and other tests run beside.
PRICES = """
[plans.tokens]
pattern = "pay_per_token"
rates = [
    { meter = "tokens", price = "0.003", where = { kind = "output" } },
    { meter = "tokens", price = "0.001", where = { kind = "input" } },
    { meter = "tokens", price = "0.002" },
]
settle = { amount = "1000" }
"""
SOURCES = """
[[sources]]
kind = "redis"
url = "{redis}"
block = "200ms"

[[sources]]
kind = "mqtt"
port = {mqtt}
"""


@dataclass(frozen=True)
class Example:
    """A file, what runs it, how many events it sends, and what they cost."""

    runner: tuple[str, ...]
    events: int
    costs: str
    by: str = "http"  # The way that its events take.


EACH: dict[str, Example] = {
    "send-event.sh": Example(("sh",), 7, "3.3725"),  # 1686.25 x 0.002
    "send-event.mjs": Example(("node",), 2, "1.20025"),  # 400 x 0.003 + 0.125 x 0.002
    "gate.mjs": Example(("node",), 1, "2.624"),  # 1312 x 0.002
    "send-event.go": Example(("go", "run"), 2, "0.240000000002"),
    "mqtt-publish.sh": Example(("sh",), 2, "0.66", "mqtt"),  # 330 x 0.002
    "redis-add.sh": Example(("sh",), 2, "0.013", "redis"),  # 12 x 0.001 + 0.5 x 0.002
}
TOOLS = ("curl", "node", "go", "mosquitto_pub", "redis-cli")


@dataclass
class Place:
    """The daemon, where everything listens, and a directory for what a compiler leaves."""

    node: Node
    sandbox: Sandbox
    ports: Mapping[str, int]
    cache: Path

    def run(self, command: tuple[str, ...], **through: int) -> subprocess.CompletedProcess[str]:
        """Run a command as a person at the root of the repository does; ports may be others."""
        ports = {**self.ports, **through}
        clean = {name: text for name, text in os.environ.items() if not name.startswith("METERD_")}
        return subprocess.run(
            command,
            cwd=ROOT,
            env={
                **clean,
                "METERD_URL": f"http://127.0.0.1:{ports['http']}",
                "MQTT_PORT": str(ports["mqtt"]),
                "REDIS_URL": f"redis://127.0.0.1:{ports['redis']}/0",
                # A compiler that must not ask anybody for anything.
                "GOCACHE": str(self.cache),
                "GOFLAGS": "",
                "GOPROXY": "off",
                "GO111MODULE": "off",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def example(self, name: str, agreement: str, **through: int) -> str:
        """Run an example for an agreement; what it printed."""
        file = str((EXAMPLES / name).relative_to(ROOT))
        typed = self.run((*EACH[name].runner, file, agreement, agreement), **through)
        assert typed.returncode == 0, typed.stdout + typed.stderr
        return typed.stdout

    def agreement(self, name: str) -> str:
        """Bind a new agreement of this name; the name."""
        return self.node.bind(self.sandbox.lock("100.00"), "tokens", name)

    def counts(self) -> dict[str, int]:
        """What became of all deliveries so far."""
        events = self.node.get("/v1/status")["events"]
        return {name: events[name] for name in ("accepted", "duplicates", "rejected")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One daemon for all examples."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert missing == [], f"not installed, and these tests need it (make servers): {missing}"
    directory = tmp_path_factory.mktemp("examples")
    with (
        RedisServer() as redis_server,
        MosquittoServer() as mosquitto,
        Sandbox(directory / "sandbox") as sandbox,
    ):
        sources = SOURCES.format(redis=redis_server.url, mqtt=mosquitto.port)
        with Node(directory, configuration(sandbox, plans=PRICES, rest=sources)) as node:
            node.wait_ready()
            node.wait_sources()
            ports = {"http": node.port, "redis": redis_server.port, "mqtt": mosquitto.port}
            yield Place(node, sandbox, ports, directory / "cache")
            node.stop()
            assert node.returncode == 0


def _settled(place: Place, before: Mapping[str, int], **more: int) -> dict[str, int]:
    """Wait until so many more deliveries have their verdict; how many of each there are more."""
    want = {name: before[name] + more.get(name, 0) for name in before}
    until(
        lambda: sum(place.counts().values()) >= sum(want.values()),
        lambda: f"{want}, not {place.counts()}",
    )
    after = place.counts()
    return {name: after[name] - before[name] for name in before if after[name] != before[name]}


def _named(prefix: str, example: str) -> str:
    """An id for an example; `go run` would take one with a point for a file."""
    return f"{prefix}-{example.replace('.', '-')}"


@pytest.mark.parametrize("name", EACH)
def test_an_example_that_is_run_twice_is_charged_once(place: Place, name: str) -> None:
    """Every event is accepted, then known; what is accrued is right to the last unit."""
    example, agreement = EACH[name], place.agreement(_named("twice", name))
    before = place.counts()
    place.example(name, agreement)
    first = _settled(place, before, accepted=example.events)
    accrued = place.node.agreement(agreement)["accrued"]
    again = place.counts()
    place.example(name, agreement)
    # A hold that was captured is known by its key before any event is made.
    repeated = 0 if name == "gate.mjs" else example.events
    second = _settled(place, again, duplicates=repeated)
    row = place.node.agreement(agreement)

    assert first == {"accepted": example.events}
    assert second == ({"duplicates": repeated} if repeated else {})
    assert Decimal(accrued) == Decimal(row["accrued"]) == Decimal(example.costs)
    assert row["events"] == example.events


FATES = {
    # Nobody is there; then the request lands, and its answer is cut off.
    "http": [
        Fate(Fault.CUT, Phase.CONNECT),
        Fate(Fault.BAD_GATEWAY, Phase.CONNECT),
        Fate(Fault.RESET, Phase.ANSWER, 12),
    ],
    "redis": [Fate(Fault.CUT, Phase.CONNECT), Fate(Fault.CUT, Phase.ANSWER, 3, only=b"XADD")],
    "mqtt": [Fate(Fault.CUT, Phase.CONNECT), Fate(Fault.CUT, Phase.ANSWER, 6)],
}


@pytest.mark.parametrize("name", EACH)
def test_an_example_whose_answer_is_cut_off_sends_the_same_again(place: Place, name: str) -> None:
    """It ends well all the same, and nothing is charged twice."""
    example, agreement = EACH[name], place.agreement(_named("cut", name))
    with Network(1) as network:
        proxy: FaultProxy = network.proxy(place.ports[example.by], *FATES[example.by])
        place.example(name, agreement, **{example.by: proxy.port})
        place.node.wait_agreement(agreement, events=example.events)
        left = proxy.left
    row = place.node.agreement(agreement)

    assert left == []
    assert Decimal(row["accrued"]) == Decimal(example.costs)


def test_an_example_without_an_id_says_what_it_wants(place: Place) -> None:
    """And sends nothing."""
    before = place.counts()
    for name, example in EACH.items():
        typed = place.run((*example.runner, f"docs/examples/{name}"))

        assert typed.returncode != 0, name
        assert "ID [AGREEMENT" in typed.stderr, name
    assert place.counts() == before


@pytest.mark.parametrize("name", [name for name, one in EACH.items() if one.by == "http"])
def test_an_example_that_is_refused_says_why_and_fails(place: Place, name: str) -> None:
    """An unknown agreement is no reason to try again for minutes."""
    typed = place.run((*EACH[name].runner, f"docs/examples/{name}", "refused", "nobody"))

    assert typed.returncode == 1, typed.stdout
    assert typed.stderr


def test_the_page_is_typed_from_top_to_bottom(place: Place) -> None:
    """Every line of it ends well and prints what stands behind `# ->`."""
    place.agreement("customer-1")
    for block in blocks(PAGE):
        text = block.text.replace("127.0.0.1:8787", f"127.0.0.1:{place.ports['http']}")
        # An answer of "no" is one of the things that the page shows.
        typed = place.run(("bash", "-uo", "pipefail", "-c", text))
        rest = typed.stdout
        for expected in block.expected:
            assert expected in rest, f"{block.place}: {typed.stdout}{typed.stderr}"
            rest = rest.partition(expected)[2]


def test_every_example_is_on_the_page_and_is_run() -> None:
    """A new file is named in the table, and in the one above."""
    files = {path.name for path in EXAMPLES.iterdir()} - {PAGE.name}
    linked = set(re.findall(r"\]\(([\w.-]+)\)", PAGE.read_text()))
    typed = {
        word for block in blocks(PAGE) for word in re.findall(r"docs/examples/(\S+)", block.text)
    }

    assert files == linked == typed == set(EACH)
