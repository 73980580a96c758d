"""Metrics, alert rules and dashboard, with a real Prometheus that scrapes a real daemon."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import typer

from meterd.cli.main import tree
from tests.acceptance.stage import Node, configuration, until
from tests.documents import ROOT
from tests.processes import Sandbox
from tests.servers import RedisServer, Server

DEPLOY = ROOT / "deploy" / "prometheus"
RULES = DEPLOY / "meterd.rules.yml"
RULE_TESTS = DEPLOY / "meterd.rules.test.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "meterd.json"
RUNBOOK = ROOT / "docs" / "operations.md"
METRICS = ROOT / "docs" / "metrics.md"
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())
COMMAND = re.compile(r"meterd ([a-z-]+)")
PARTS = ("**Means.**", "**Look.**", "**Do.**", "**Do not.**")


class Prometheus(Server):
    """Prometheus with the configuration of deploy/, on loopback, scraping every second."""

    program = "prometheus"

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def _command(self) -> list[str]:
        text = (DEPLOY / "prometheus.yml").read_text()
        for old, new in (
            ("scrape_interval: 15s", "scrape_interval: 1s"),
            ("evaluation_interval: 15s", "evaluation_interval: 1s"),
            ("- meterd.rules.yml", f"- {RULES}"),
            ("127.0.0.1:8787", self.target),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        file = self.directory / "prometheus.yml"
        file.write_text(text)
        return [
            *("prometheus", f"--config.file={file}", f"--storage.tsdb.path={self.directory}/data"),
            *(f"--web.listen-address={self.host}:{self.port}", "--log.level=warn"),
        ]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://{self.host}:{self.port}/-/ready", timeout=5
            ) as got:
                return bool(got.status == 200)
        except OSError:
            return False

    def ask(self, path: str, **query: str) -> Any:
        """The data of one call of its HTTP API."""
        url = f"http://{self.host}:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.loads(answer.read())["data"]

    def figures(self, expression: str) -> list[float]:
        """The numbers that an expression gives now."""
        found = self.ask("query", query=expression)["result"]
        numbers = [float(one["value"][1]) for one in found]
        return [number for number in numbers if not math.isnan(number)]


def promtool(*words: object, given: bytes = b"") -> str:
    """What promtool says; it must be content."""
    program = shutil.which("promtool")
    assert program, "promtool is missing; tests/install-servers installs it"
    done = subprocess.run(
        [program, *map(str, words)], input=given, capture_output=True, timeout=60, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text()))


def panels() -> list[dict[str, Any]]:
    """The panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Every expression of the dashboard, as Grafana would send it."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [
        expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
        for expression in found
    ]


def names_in(text: str) -> set[str]:
    """The families that a text names, without what a histogram adds to their names."""
    words = set(re.findall(r"\bmeterd_\w+", text))
    return {re.sub(r"_(bucket|sum|count)$", "", word) for word in words}


# -- A daemon with a little of everything ----------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


@pytest.fixture(scope="module")
def broker() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox, broker: RedisServer
) -> Iterator[Node]:
    source = f'[[sources]]\nkind = "redis"\nurl = "{broker.url}"\nblock = "200ms"\n'
    text = configuration(sandbox, rest=f"{source}[metrics]\nper_agreement = true\n")
    with Node(tmp_path_factory.mktemp("node"), text) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def prometheus(node: Node) -> Iterator[Prometheus]:
    with Prometheus(f"127.0.0.1:{node.port}") as running:
        yield running


@pytest.fixture(scope="module")
def used(node: Node, prometheus: Prometheus, sandbox: Sandbox, broker: RedisServer) -> None:
    """Something of everything, behind the first scrape: rates see what a counter began with."""
    until(lambda: prometheus.figures("meterd_build_info"), "the first scrape")
    for name, plan in (("customer-1", "stream"), ("customer-2", "lazy")):
        node.bind(sandbox.lock("1.00", auto_release_hours=5), plan, name)
    usage = {"agreement": "customer-1", "meter": "units", "quantity": 25}
    assert node.send({"id": "e-1", **usage}, {"id": "e-1", **usage}, {"id": "e-2"})["accepted"] == 1
    node.send({"id": "e-3", "agreement": "customer-2", "meter": "units", "quantity": 7})
    entry = {"id": "e-4", "agreement": "customer-2", "meter": "units", "quantity": "2"}
    client = redis.Redis(port=broker.port)
    client.xadd("meterd:usage", {key: str(value) for key, value in entry.items()})
    client.close()
    ask = {"agreement": "customer-2", "meter": "units", "quantity": 1}
    assert node.ask("POST", "/v1/authorize", {**ask, "hold": 600}).status == 200
    node.wait_agreement("customer-1", released="0.025", unsettled="0.00")
    node.wait_agreement("customer-2", accrued="0.009")


# -- Metrics ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("used")
def test_promtool_finds_nothing_to_say_about_the_metrics(node: Node) -> None:
    """Names, units and help texts are as Prometheus wants them, agreements included."""
    line = b'\nmeterd_agreement_headroom_usdc{agreement="customer-2"} 0.991\n'
    until(lambda: line in node.ask("GET", "/metrics").raw, "figures of now")

    assert promtool("check", "metrics", given=node.ask("GET", "/metrics").raw) == ""


@pytest.mark.usefixtures("used")
def test_durations_from_usage_to_disk_and_payment_are_measured(node: Node) -> None:
    """Once for each batch with something new, each confirmed release and each answer."""
    shown = node.ask("GET", "/metrics").raw.decode()
    counts = dict(re.findall(r"^meterd_(\w+_seconds)_count (\S+)$", shown, re.MULTILINE))

    assert float(counts["event_to_commit_seconds"]) == 3
    assert float(counts["event_to_release_seconds"]) == 1
    assert float(counts["gate_seconds"]) == 1


# -- Rules -----------------------------------------------------------------------------------------


def test_promtool_takes_rules_configuration_and_the_rules_tests() -> None:
    """Each alert begins when it should, over nothing else and no earlier."""
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", RULES)
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("test", "rules", RULE_TESTS)

    assert set(re.findall(r'alertname="(\w+)"', RULE_TESTS.read_text())) == set(ALERTS)


@pytest.mark.usefixtures("used")
def test_prometheus_evaluates_every_rule_and_tells_what_is_wrong(prometheus: Prometheus) -> None:
    """One delivery was rejected in here; the alert about it is on its way, and no other one."""

    def rules() -> list[Any]:
        return [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] == "ok" for rule in rules()), lambda: str(rules()))
    until(lambda: any(rule["alerts"] for rule in rules()), lambda: str(rules()))
    found = rules()

    assert sorted(rule["name"] for rule in found) == sorted(ALERTS)
    assert [rule["name"] for rule in found if rule["alerts"]] == ["MeterdDeadLettersGrow"]
    for rule in found:
        said, labels = rule["annotations"], rule["labels"]
        assert labels["severity"] in {"critical", "warning"}
        assert set(said) == {"summary", "description", "runbook"}
        assert "Next: meterd " in said["description"]
        assert said["runbook"] == f"docs/operations.md#{rule['name'].lower()}"


def test_every_alert_has_an_entry_in_the_runbook() -> None:
    """With what it means, how to see it, what to do and what not; and no entry is left over."""
    chapter = RUNBOOK.read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    entries = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", chapter, re.DOTALL | re.MULTILINE))

    assert list(entries) == ALERTS
    for name, text in entries.items():
        assert [part for part in PARTS if text.count(part) != 1] == [], name
        assert "`meterd " in text, name


def test_every_command_that_an_alert_names_exists() -> None:
    """Whoever is woken by it types it as it stands."""
    text = " ".join(RULES.read_text().split())
    said = {
        word for line in re.findall(r"Next: .+?runbook", text) for word in COMMAND.findall(line)
    }

    assert len(said) >= 5
    assert said <= set(getattr(typer.main.get_command(tree()), "commands", {}))


@pytest.mark.parametrize("file", [RULES, DASHBOARD, RULE_TESTS], ids=lambda file: file.name)
def test_every_metric_that_a_file_of_deploy_names_is_in_the_table(file: Path) -> None:
    """The table is the program's: tests/test_documents.py."""
    table = set(re.findall(r"^\| `(meterd_\w+)`", METRICS.read_text(), re.MULTILINE))

    assert names_in(file.read_text()) <= table


# -- Dashboard -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("used")
def test_every_expression_of_the_dashboard_gives_numbers(prometheus: Prometheus) -> None:
    """As Grafana would ask, against what was scraped."""
    wanting: list[str] = []

    def all_give() -> bool:
        wanting[:] = [one for one in expressions() if not prometheus.figures(one)]
        return not wanting

    until(all_give, lambda: "\n".join(wanting))
    (variable,) = [one for one in dashboard()["templating"]["list"] if one["name"] == "instance"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()

    assert prometheus.ask(f"label/{label}/values", **{"match[]": metric}) == [prometheus.target]


def test_every_panel_says_what_it_shows() -> None:
    """With a unit and a description; each number and place once."""
    every = dashboard()["panels"]

    assert len({panel["id"] for panel in every}) == len(every)
    assert len({tuple(panel["gridPos"].values()) for panel in every}) == len(every)
    for panel in panels():
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert 'instance=~"$instance"' in target["expr"], panel["title"]


def test_the_dashboard_shows_every_metric() -> None:
    """What is measured and shown nowhere is found by nobody."""
    table = set(re.findall(r"^\| `(meterd_\w+)`", METRICS.read_text(), re.MULTILINE))

    assert table - names_in(DASHBOARD.read_text()) == set()
