"""OpenTelemetry's own SDK and exporters against a real daemon, to the last unit.

What the models used is summed up here as the spans are made; the daemon's counters, what it says is
owed, and what the escrow service paid in the end are held against it.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from opentelemetry._logs import LogRecord
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Span, Tracer, set_span_in_context

from meterd.otlp.genai import EVENT
from tests.acceptance.stage import Node, configuration, paid
from tests.documents import ROOT, blocks
from tests.processes import Sandbox
from tests.proxy import Fate, Fault, Network, Phase

SEED = 20261125
# By kind, in millionths of a dollar a token; reasoning has no rate of its own and is output.
PRICES = {"input": 10, "cached": 1, "cache_creation": 12, "output": 40}
CALL_PRICE = 1000
PLANS = """
[plans.models]
pattern = "pay_per_token"
rates = [
    { meter = "tokens", price = "0.00001", where = { kind = "input" } },
    { meter = "tokens", price = "0.000001", where = { kind = "cached" } },
    { meter = "tokens", price = "0.000012", where = { kind = "cache_creation" } },
    { meter = "tokens", price = "0.00004", where = { kind = "output" } },
    { meter = "calls", price = "0.001" },
]
settle = { amount = "0.05" }
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One escrow service for all of them."""
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


@pytest.fixture
def node(sandbox: Sandbox, tmp_path: Path) -> Iterator[Node]:
    """A daemon that sells tokens."""
    with Node(tmp_path, configuration(sandbox, plans=PLANS)) as daemon:
        daemon.wait_ready()
        yield daemon


@dataclass
class Bill:
    """What a customer's calls used, summed up beside the spans."""

    tokens: Counter[str] = field(default_factory=Counter)
    calls: int = 0

    def add(self, counts: dict[str, int]) -> None:
        """Take a call's counts apart: each token is of one kind."""
        cached, created = counts.get("cached", 0), counts.get("created", 0)
        self.tokens["input"] += counts["input"] - cached - created
        self.tokens["cached"] += cached
        self.tokens["cache_creation"] += created
        self.tokens["output"] += counts["output"]
        self.calls += 1

    @property
    def micros(self) -> int:
        """What it comes to."""
        return CALL_PRICE * self.calls + sum(
            PRICES[kind] * count for kind, count in self.tokens.items()
        )


SPELLINGS = {
    "input": "gen_ai.usage.input_tokens",
    "output": "gen_ai.usage.output_tokens",
    "cached": "gen_ai.usage.cache_read.input_tokens",
    "created": "gen_ai.usage.cache_creation.input_tokens",
    "reasoning": "gen_ai.usage.reasoning.output_tokens",
}


def counts_of(chance: random.Random) -> dict[str, int]:
    """What one call may have used; now and then nothing at all."""
    counts = {"input": chance.choice((0, chance.randrange(2000))), "output": chance.randrange(300)}
    if chance.random() < 0.5:
        counts["cached"] = chance.randint(0, counts["input"])
        counts["created"] = chance.randint(0, counts["input"] - counts["cached"])
    if chance.random() < 0.5:
        counts["reasoning"] = chance.randint(0, counts["output"])
    return counts


def call_model(tracer: Tracer, agreement: str, counts: dict[str, int]) -> Span:
    """One call of a model as an instrumentation records it."""
    with tracer.start_as_current_span("chat large") as span:
        span.set_attribute("meterd.agreement", agreement)
        span.set_attribute("gen_ai.operation.name", "chat")
        span.set_attribute("gen_ai.provider.name", "openai")
        span.set_attribute("gen_ai.request.model", "large")
        for name, count in counts.items():
            span.set_attribute(SPELLINGS[name], count)
    return span


def run_agent(tracer: Tracer, agreement: str, calls: list[dict[str, int]]) -> None:
    """An agent's turn: its span repeats the sums of its calls, as frameworks have it."""
    with tracer.start_as_current_span("invoke_agent helper") as around:
        around.set_attribute("meterd.agreement", agreement)
        around.set_attribute("gen_ai.operation.name", "invoke_agent")
        for counts in calls:
            with tracer.start_as_current_span("POST /v1/chat"):
                call_model(tracer, agreement, counts)
        for name in ("input", "output"):
            around.set_attribute(SPELLINGS[name], sum(counts[name] for counts in calls))


def provider_of(exporter: SpanExporter, **resource: str) -> TracerProvider:
    """A service's tracing that sends in batches."""
    about = Resource({"service.name": "checkout", **resource})
    provider = TracerProvider(resource=about)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=50))
    return provider


def exporter_to(url: str, compression: Compression = Compression.NoCompression) -> OTLPSpanExporter:
    """The exporter that everybody has."""
    return OTLPSpanExporter(f"{url}/v1/traces", compression=compression)


def customers(sandbox: Sandbox, node: Node, *names: str) -> dict[str, str]:
    """Agreements under the plan, and the escrow of each."""
    escrows = {name: sandbox.lock("100.00") for name in names}
    for name, escrow in escrows.items():
        node.bind(escrow, "models", name)
    return escrows


def micros(amount: str) -> int:
    """An amount of the API in millionths."""
    exact = Fraction(amount) * 10**6
    assert exact.denominator == 1
    return int(exact)


def holds_against(node: Node, name: str, bill: Bill) -> None:
    """Counters and sum of an agreement are those of the bill, to the last token."""
    counted: Counter[str] = Counter()
    for row in node.get(f"/v1/agreements/{name}/usage?limit=1000")["items"]:
        counted[row["dimensions"].get("kind", row["meter"])] += int(row["quantity"])
    expected = {**bill.tokens, "calls": bill.calls}

    assert counted == Counter({kind: count for kind, count in expected.items() if count})
    assert micros(node.agreement(name)["accrued"]) == bill.micros


def metric(node: Node, name: str) -> int:
    """One series of the daemon."""
    text = node.ask("GET", "/metrics").raw.decode()
    (found,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return int(Fraction(found))


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip])
def test_what_agents_use_is_paid_to_the_last_unit_when_a_service_exports_its_traces(
    sandbox, node, compression
):
    """Two customers, agents around their calls, caches, reasoning and zeros; then all of it again.

    Counters, sum and payment are those of the calls alone, and the second time changes nothing.
    """
    chance = random.Random(SEED)
    escrows = customers(sandbox, node, "ada", "bo")
    bills = {name: Bill() for name in escrows}
    kept = InMemorySpanExporter()
    exporter = exporter_to(node.url, compression)
    provider = provider_of(exporter)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("test")
    for turn in range(60):
        name = "ada" if turn % 3 else "bo"
        calls = [counts_of(chance) for _ in range(chance.randint(1, 6))]
        for counts in calls:
            bills[name].add(counts)
        run_agent(tracer, name, calls)
    assert provider.force_flush()
    spans = kept.get_finished_spans()
    again = exporter.export(spans)
    provider.shutdown()

    calls_made = sum(bill.calls for bill in bills.values())
    assert again is SpanExportResult.SUCCESS
    assert metric(node, 'meterd_events_total{result="accepted",source="otlp"}') == calls_made
    assert metric(node, 'meterd_events_total{result="duplicate",source="otlp"}') == calls_made
    ignored = 2 * (len(spans) - calls_made)
    assert metric(node, 'meterd_otlp_ignored_total{signal="traces"}') == ignored > 0
    for name, bill in bills.items():
        holds_against(node, name, bill)
        node.ask("POST", f"/v1/agreements/{name}/close", {"reason": "the end"})
        node.wait_state(name, "closed")
        assert paid(sandbox, escrows[name]) * 10**6 == bill.micros


def test_calls_are_charged_once_when_a_service_exports_traces_and_logs(sandbox, node):
    """The event of a call stands in the context of its span: whichever comes second is nothing."""
    customers(sandbox, node, "cy")
    bill, resource = Bill(), Resource({"service.name": "checkout", "meterd.agreement": "cy"})
    tracing, logging = TracerProvider(resource=resource), LoggerProvider(resource=resource)
    tracing.add_span_processor(SimpleSpanProcessor(exporter_to(node.url)))
    exporter = OTLPLogExporter(f"{node.url}/v1/logs", compression=Compression.Gzip)
    logging.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    tracer, logger = tracing.get_tracer("test"), logging.get_logger("test")
    for place in range(6):
        counts = {"input": 100 + place, "output": 7, "cached": 40}
        bill.add(counts)
        span = call_model(tracer, "cy", counts) if place % 2 else None
        with tracer.start_as_current_span("not exported by anybody") as other:
            of_call = other if span is None else span
            attributes = {SPELLINGS[name]: count for name, count in counts.items()}
            logger.emit(
                LogRecord(
                    timestamp=time.time_ns(),
                    context=set_span_in_context(of_call),
                    event_name=EVENT,
                    attributes={
                        "gen_ai.operation.name": "chat",
                        "gen_ai.provider.name": "openai",
                        "gen_ai.request.model": "large",
                        **attributes,
                    },
                )
            )
            logger.emit(LogRecord(body="a line of a log", context=set_span_in_context(other)))
    tracing.shutdown()
    logging.shutdown()

    holds_against(node, "cy", bill)
    assert metric(node, 'meterd_events_total{result="duplicate",source="otlp"}') == 3
    assert metric(node, 'meterd_events_total{result="rejected",source="otlp"}') == 0
    assert metric(node, 'meterd_otlp_ignored_total{signal="logs"}') == 6


@pytest.mark.parametrize(
    "fate",
    [
        Fate(Fault.BAD_GATEWAY, Phase.ANSWER),
        Fate(Fault.RESET, Phase.ANSWER),
        Fate(Fault.CUT, Phase.REQUEST),
    ],
    ids=lambda fate: f"{fate.fault}-{fate.phase}",
)
def test_a_batch_is_charged_once_when_its_answer_is_lost_and_the_exporter_sends_it_again(
    sandbox, node, fate
):
    """A gateway's 502 behind the commit, a reset, a request cut off: the exporter's own retries."""
    customers(sandbox, node, "di")
    bill = Bill()
    with Network(SEED) as network:
        proxy = network.proxy(node.port, fate)
        provider = provider_of(exporter_to(f"http://127.0.0.1:{proxy.port}"))
        for place in range(20):
            counts = {"input": 1000 + place, "output": place}
            bill.add(counts)
            call_model(provider.get_tracer("test"), "di", counts)
        assert provider.force_flush()
        assert proxy.left == []
        provider.shutdown()

    holds_against(node, "di", bill)


def test_nothing_is_lost_or_charged_twice_when_the_daemon_is_killed_between_the_batches(
    sandbox, node
):
    """What was answered is on the disk; what was not comes again."""
    customers(sandbox, node, "ed")
    bill = Bill()
    kept = InMemorySpanExporter()
    exporter = exporter_to(node.url)
    tracing = TracerProvider(resource=Resource({"service.name": "checkout"}))
    tracing.add_span_processor(SimpleSpanProcessor(kept))
    for place in range(30):
        counts = {"input": 10 * place, "output": place, "cached": place}
        bill.add(counts)
        call_model(tracing.get_tracer("test"), "ed", counts)
    spans: tuple[ReadableSpan, ...] = kept.get_finished_spans()
    for part in (spans[:10], spans[5:20], spans[15:]):
        assert exporter.export(part) is SpanExportResult.SUCCESS
        node.kill()
        node.start()
        node.wait_ready()
    exporter.shutdown()
    tracing.shutdown()

    holds_against(node, "ed", bill)


def test_what_cannot_be_charged_is_kept_and_told_when_a_customer_is_not_known(sandbox, node):
    """The exporter has no second try; a person has, behind the repair."""
    customers(sandbox, node, "flo")
    provider = provider_of(exporter_to(node.url))
    counts = {"input": 50, "output": 5}
    bill = Bill()
    bill.add(counts)
    call_model(provider.get_tracer("test"), "gus", counts)
    assert provider.force_flush()
    provider.shutdown()
    (letter,) = node.get("/v1/dead-letters")["items"]
    customers(sandbox, node, "gus")
    tried: Any = node.ask("POST", f"/v1/dead-letters/{letter['id']}/replay").json

    assert (letter["source"], letter["reason"]) == ("otlp", "unknown_agreement")
    assert tried["accepted"] == 1
    holds_against(node, "gus", bill)


# -- The document ----------------------------------------------------------------------------------


def test_the_section_of_the_document_does_what_it_says_when_it_is_typed(sandbox, tmp_path):
    """Its plan, the environment of an SDK, the program, and what each command prints."""
    page = ROOT / "docs" / "ingest.md"
    first = page.read_text().partition("## OpenTelemetry\n")[0].count("\n")
    last = first + page.read_text().partition("## OpenTelemetry\n")[2].partition("\n## ")[0].count(
        "\n"
    )
    own = [block for block in blocks(page) if first < block.line <= last + 1]
    (plans,) = [block.text for block in own if block.language == "toml"]
    # The stage has the meters of the document's plan already.
    text = configuration(sandbox, plans=plans.partition('aggregation = "count"\n')[2])
    with Node(tmp_path, text) as node:
        node.wait_ready()
        node.bind(sandbox.lock("10.00"), "models", "customer-1")
        script = ["set -e", f"meterd() {{ '{sys.executable}' -m meterd \"$@\"; }}"]
        for block in own:
            if block.language == "python":
                program = tmp_path / "program.py"
                program.write_text(block.text)
                script.append(f"'{sys.executable}' '{program}'")
            elif block.language == "sh":
                script.append(block.text)
        typed = "\n".join(script).replace("http://127.0.0.1:8787", node.url)
        environment = {**os.environ, "METERD_CONFIG": str(node.config), "METERD_TOKEN": "unused"}
        ran = subprocess.run(
            ["bash", "-c", typed],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
            check=False,
        )
        accrued = node.agreement("customer-1")["accrued"]

    assert (ran.returncode, ran.stderr) == (0, "")
    printed = iter(ran.stdout.splitlines())
    expected = [text for block in own for text in block.expected]
    assert len(expected) == 2
    assert [text for text in expected if not any(text in line for line in printed)] == []
    assert accrued == "0.0096"
