"""Every instrument of meterd, in an injected registry: counted by the batch, read at the scrape.

Rules: labels come from the configuration or from tables in here, everything else is `other`; every
series is there from the start, at zero. The hot path adds to a counter once for each batch. What
the ledger already sums up is read from it, at the scrape. Prometheus knows only floats: money and
quantities become floats in `_usdc` and `_units`, for display, and nowhere else in meterd.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from meterd import __version__
from meterd.core.accounts import Entry
from meterd.core.events import Reason
from meterd.core.money import MICROS, NANOS
from meterd.core.settlement import EscrowStatus, Release, ReleaseStatus

OTHER = "other"
OTHERS = "(others)"  # No id of an agreement is written so.
HTTP_SOURCE, OTLP_SOURCE = "http", "otlp"  # They need no entry in the configuration.
OTLP_SIGNALS = ("traces", "logs")
RESULTS = ("accepted", "duplicate", "rejected")
# A release that is only intended, or whose call is under way, has come to nothing yet.
OUTCOMES = tuple(
    status.value
    for status in ReleaseStatus
    if status not in {ReleaseStatus.INTENDED, ReleaseStatus.SENT}
)
ALARMS = (
    "dedupe_window_shrunk",
    "escrow_frozen",
    "escrow_not_bound",
    "escrow_paused",
    "escrow_resumed",
    "foreign_release_credited",
    "key_refused",
    "opened_twice",
    "opening_absent",
    "opening_failed",
    "opening_in_doubt",
    "opening_late",
    "release_forbidden",
    "release_in_doubt",
    "release_key_refused",
    "release_missing",
    "uncollectible",
    "velocity_exceeded",
    "void_failed",
)
ESCROW_CALLS = (
    *("read", "release_partial", "list", "probe"),
    *("create", "refund_rest", "release_rest", "wallet_read", "debit"),
)
HTTP_SERIES_MAX = 400  # Of routes, methods and codes together; far more than the API has.
ESCROW_CODES = frozenset({"no_answer", "not_sent"})

COMMIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BATCH_BUCKETS = (1, 10, 100, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000)
CHANGE_BUCKETS = (1, 2, 5, 10, 25, 50, 100, 500, 1_000)
CALL_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
RELEASE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
# From a producer's clock to the disk, and from usage to its payment: hours, where a part was away.
EVENT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0)
PAID_BUCKETS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
GATE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
REQUEST_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


class SourceState(Protocol):
    """What the metrics read of a source."""

    @property
    def name(self) -> str:
        """Its name in the configuration."""

    @property
    def connected(self) -> bool:
        """Whether deliveries can come now."""

    @property
    def lag(self) -> int | None:
        """Deliveries that wait at the broker; None: it does not tell."""

    @property
    def unacked(self) -> int:
        """Deliveries read and not yet acked."""


class AgreementFigures(Protocol):
    """What the metrics read of one agreement, in micros unless it says otherwise."""

    @property
    def agreement(self) -> str:
        """Its id; "": all those that have no series of their own."""

    @property
    def accrued(self) -> Fraction:
        """Exact USDC."""

    @property
    def settled(self) -> int:
        """Released by meterd, or accepted as payment."""

    @property
    def unsettled(self) -> int:
        """Owed and not paid."""

    @property
    def headroom(self) -> int:
        """What the payer can still use."""

    @property
    def in_doubt(self) -> int:
        """Amounts of releases in doubt."""

    @property
    def uncollectible(self) -> int:
        """Used beyond what is left."""


class Figures(Protocol):
    """Sums over all agreements, in micros unless they say otherwise."""

    @property
    def accrued(self) -> Fraction:
        """Exact USDC."""

    @property
    def settled(self) -> int:
        """Released by meterd, or accepted as payment."""

    @property
    def unsettled(self) -> int:
        """Owed and not paid."""

    @property
    def headroom(self) -> int:
        """What the payers can still use."""

    @property
    def in_doubt(self) -> int:
        """Amounts of releases in doubt."""

    @property
    def uncollectible(self) -> int:
        """Used beyond what is left."""

    @property
    def difference(self) -> int:
        """What readings and ledger disagree on."""

    @property
    def releases_in_doubt(self) -> int:
        """How many releases are in doubt."""

    @property
    def releases_escalated(self) -> int:
        """How many of them wait for a person."""

    @property
    def lag_ms(self) -> int:
        """Age of the oldest usage that is due and not paid."""

    @property
    def deadline_ms(self) -> int | None:
        """Until the nearest deadline of an escrow with usage to pay; None: there is none."""

    @property
    def low(self) -> int:
        """Agreements with less than a tenth of their deposit left."""

    @property
    def states(self) -> Mapping[str, int]:
        """Agreements by state."""

    @property
    def by_agreement(self) -> Sequence[AgreementFigures]:
        """Each agreement's own, where the configuration asks for them."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What is asked at each scrape. All of it must answer at once: cached, or a plain look."""

    figures: Callable[[], Figures]
    sources: Callable[[], Iterable[SourceState]]
    dead_letters: Callable[[], int]
    holds: Callable[[], int]  # Micros.
    store_bytes: Callable[[], int]
    missing: Callable[[], int] = lambda: 0  # Numbers of producers that number their events.
    given_up: Callable[[], int] = lambda: 0


class Metrics:
    """All instruments.

    It is the bookkeeper's `Facts`, and the hooks of store, escrow client and API.
    """

    def __init__(
        self, registry: CollectorRegistry, *, meters: Collection[str], sources: Collection[str] = ()
    ) -> None:
        self.accepted = 0  # Since the start, like the four below.
        self.duplicates = 0
        self.rejected = 0
        self.last_event_at = 0  # Wall ms; 0: none.
        self.last_release_at = 0
        self._registry = registry
        self._http_series: set[tuple[str, str, str]] = set()
        self._make_intake(registry, (*dict.fromkeys((*sources, HTTP_SOURCE, OTLP_SOURCE)), OTHER))
        self._make_money(registry, (*dict.fromkeys(meters), OTHER))
        self._make_edges(registry)
        self._make_life(registry)

    # -- Making ------------------------------------------------------------------------------------

    def _make_intake(self, registry: CollectorRegistry, sources: Iterable[str]) -> None:
        deliveries = Counter(
            "meterd_deliveries",
            "Arrivals of a payload, repeated ones included.",
            ["source"],
            registry=registry,
        )
        events = Counter(
            "meterd_events",
            "Deliveries by verdict; each has exactly one.",
            ["source", "result"],
            registry=registry,
        )
        rejections = Counter(
            "meterd_rejections",
            "Deliveries that accrue nothing, by reason.",
            ["reason"],
            registry=registry,
        )
        self._deliveries = {name: deliveries.labels(name) for name in sources}
        self._events = {
            name: tuple(events.labels(name, result) for result in RESULTS)
            for name in self._deliveries
        }
        self._rejections = {reason: rejections.labels(reason.value) for reason in Reason}
        ignored = Counter(
            "meterd_otlp_ignored",
            "Spans (traces) and log records (logs) that came and are no usage.",
            ["signal"],
            registry=registry,
        )
        self._otlp_ignored = {signal: ignored.labels(signal) for signal in OTLP_SIGNALS}

    def _make_money(self, registry: CollectorRegistry, meters: Iterable[str]) -> None:
        usage = Counter(
            "meterd_usage",
            "Quantity of accepted usage since the start, in the meter's unit; rounded for display.",
            ["meter"],
            registry=registry,
        )
        releases = Counter(
            "meterd_releases",
            "Releases by what they came to; one in doubt is counted again when it is resolved.",
            ["outcome"],
            registry=registry,
        )
        self._usage = {name: usage.labels(name) for name in meters}
        self._releases = {outcome: releases.labels(outcome) for outcome in OUTCOMES}
        gate = Counter(
            "meterd_gate_decisions",
            "Answers to the question whether a call may be served.",
            ["allowed"],
            registry=registry,
        )
        self._gate = {allowed: gate.labels(str(allowed).lower()) for allowed in (True, False)}
        self._gate_seconds = Histogram(
            "meterd_gate_seconds",
            "From that question to its answer, a hold's commit included.",
            buckets=GATE_BUCKETS,
            registry=registry,
        )
        self._release_seconds = Histogram(
            "meterd_release_seconds",
            "From a release's intention to its confirmation.",
            buckets=RELEASE_BUCKETS,
            registry=registry,
        )
        self._event_to_release = Histogram(
            "meterd_event_to_release_seconds",
            "From the oldest usage that a confirmed release pays, as it arrived, to that moment.",
            buckets=PAID_BUCKETS,
            registry=registry,
        )

    def _make_edges(self, registry: CollectorRegistry) -> None:
        self._escrow_requests = Counter(
            "meterd_escrow_requests",
            "Calls of the escrow service, by HTTP status or what happened instead of one.",
            ["call", "code"],
            registry=registry,
        )
        self._escrow_seconds = Histogram(
            "meterd_escrow_request_seconds",
            "How long calls of the escrow service took.",
            ["call"],
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        for call in ESCROW_CALLS:
            self._escrow_requests.labels(call, "200")
            self._escrow_seconds.labels(call)
        self._http_requests = Counter(
            "meterd_http_requests",
            "Answered HTTP requests.",
            ["route", "method", "code"],
            registry=registry,
        )
        self._http_requests.labels("/v1/events", "POST", "200")
        self._http_seconds = Histogram(
            "meterd_http_request_seconds",
            "How long HTTP requests took until their answer.",
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )

    def _make_life(self, registry: CollectorRegistry) -> None:
        self._commit_seconds = Histogram(
            "meterd_commit_seconds",
            "How long commits took until they were on the disk.",
            buckets=COMMIT_BUCKETS,
            registry=registry,
        )
        self._commit_batch = Histogram(
            "meterd_commit_batch_events",
            "Deliveries in each batch handed to the store.",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._commit_changes = Histogram(
            "meterd_commit_changes",
            "Changes that shared one commit.",
            buckets=CHANGE_BUCKETS,
            registry=registry,
        )
        self._event_to_commit = Histogram(
            "meterd_event_to_commit_seconds",
            "From an event's own time, or else its arrival, to the disk; one of each batch.",
            buckets=EVENT_BUCKETS,
            registry=registry,
        )
        alarms = Counter(
            "meterd_alarms",
            "What a person must know, by the action that the log names.",
            ["action"],
            registry=registry,
        )
        self._alarms = {action: alarms.labels(action) for action in (*ALARMS, OTHER)}
        self._writable = Gauge(
            "meterd_store_writable", "1 while the store takes commits.", registry=registry
        )
        self._writable.set(1)
        self._reload = Gauge(
            "meterd_config_reload_success",
            "1 when the configuration was last read without a mistake.",
            registry=registry,
        )
        self._reload.set(1)
        build = Gauge("meterd_build_info", "The version that runs.", ["version"], registry=registry)
        build.labels(__version__).set(1)

    def watch(self, reads: Reads) -> None:
        """Register what is read at the scrape. Called once, when there is something to read."""
        self._registry.register(_AtScrape(reads))

    # -- Facts of the bookkeeper -------------------------------------------------------------------

    def batch(self, source: str, entry: Entry, sums: Mapping[str, int]) -> None:
        """Count a batch. `sums` is the quantity for each meter, in nanos."""
        label = source if source in self._deliveries else OTHER
        rejected = len(entry.rejections)
        received = entry.accepted + entry.duplicates + rejected
        self._deliveries[label].inc(received)
        self._commit_batch.observe(received)
        accepted_total, duplicates_total, rejected_total = self._events[label]
        if entry.accepted:
            accepted_total.inc(entry.accepted)
            self.accepted += entry.accepted
            self.last_event_at = _wall_ms()
        if entry.duplicates:
            duplicates_total.inc(entry.duplicates)
            self.duplicates += entry.duplicates
        if rejected:
            rejected_total.inc(rejected)
            self.rejected += rejected
            for rejection in entry.rejections:
                self._rejections[rejection.reason].inc()
        for meter, nanos in sums.items():
            self._usage.get(meter, self._usage[OTHER]).inc(_units(nanos))

    def committed(self, seconds: float) -> None:
        """Note that a batch is on the disk; `seconds` since its first event happened."""
        self._event_to_commit.observe(max(0.0, seconds))

    def released(self, release: Release, seconds: float) -> None:
        """Count what a release came to; `seconds` since it was intended."""
        counter = self._releases.get(release.status.value)
        if counter is None:
            return
        counter.inc()
        if release.status is ReleaseStatus.CONFIRMED:
            self.last_release_at = _wall_ms()
            self._release_seconds.observe(max(0.0, seconds))

    def paid(self, seconds: float) -> None:
        """Note that usage was paid; `seconds` since the oldest of it came."""
        self._event_to_release.observe(max(0.0, seconds))

    def gate(self, *, allowed: bool, seconds: float) -> None:
        """Count an answer of the gate; `seconds` since it was asked."""
        self._gate[allowed].inc()
        self._gate_seconds.observe(max(0.0, seconds))

    def alarm(self, action: str) -> None:
        """Count something that a person must know."""
        self._alarms.get(action, self._alarms[OTHER]).inc()

    # -- Hooks of the edges ------------------------------------------------------------------------

    def on_commit(self, seconds: float, changes: int) -> None:
        """Note a commit: how long it took, and how many changes shared it.

        May be called from the store's thread.
        """
        self._commit_seconds.observe(seconds)
        self._commit_changes.observe(changes)

    def on_writable(self, writable: bool) -> None:
        """Note whether the store takes commits."""
        self._writable.set(1 if writable else 0)

    def observe(self, call: str, code: str, seconds: float) -> None:
        """Count one call of the escrow service: its HTTP status, or what happened instead."""
        name = call if call in ESCROW_CALLS else OTHER
        known = code in ESCROW_CODES or (len(code) == 3 and code.isascii() and code.isdecimal())
        self._escrow_requests.labels(name, code if known else OTHER).inc()
        self._escrow_seconds.labels(name).observe(seconds)

    def http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answered HTTP request. `route` is the pattern of its path."""
        series = (route, method, str(status))
        if series not in self._http_series:
            if len(self._http_series) >= HTTP_SERIES_MAX:
                series = (OTHER, OTHER, OTHER)
            self._http_series.add(series)
        self._http_requests.labels(*series).inc()
        self._http_seconds.observe(seconds)

    def otlp_ignored(self, signal: str, count: int) -> None:
        """Count spans (`traces`) or log records (`logs`) that are no usage."""
        self._otlp_ignored[signal].inc(count)

    def reloaded(self, *, success: bool) -> None:
        """Note whether the configuration could be read again."""
        self._reload.set(1 if success else 0)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Write every series as the Accept header of a scraper wants it, with the content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _AtScrape(Collector):
    """What is read when it is asked for."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def collect(self) -> Iterator[Metric]:
        """Yield the families that are read. Called by the registry, once for each scrape."""
        figures = self._reads.figures()
        yield from _money(figures)
        yield from _escrows(figures)
        if figures.by_agreement:
            yield from _agreements(figures.by_agreement)
        yield from _sources(self._reads.sources())
        yield _gauge("holds_usdc", "Set aside for work under way.", _usdc(self._reads.holds()))
        yield _gauge("dead_letters", "Rejected deliveries kept.", self._reads.dead_letters())
        missing = float(self._reads.missing())
        yield _gauge("sequence_missing", "Numbered events that have not come.", missing)
        given_up = float(self._reads.given_up())
        yield _counter("sequence_given_up", "Of these, waited for no more.", given_up)
        yield _gauge("store_bytes", "Size of the store on the disk.", self._reads.store_bytes())


def _money(figures: Figures) -> Iterator[Metric]:
    accrued = Fraction(figures.accrued)
    yield _counter("accrued_usdc", "Owed for all usage so far.", float(accrued))
    yield _counter("released_usdc", "Paid out of the escrows so far.", _usdc(figures.settled))
    yield _gauge("unsettled_usdc", "Earned and not yet paid.", _usdc(figures.unsettled))
    yield _gauge("headroom_usdc", "What the payers can still use.", _usdc(figures.headroom))
    yield _gauge("in_doubt_usdc", "May or may not have been paid.", _usdc(figures.in_doubt))
    yield _gauge("uncollectible_usdc", "Used beyond what is left.", _usdc(figures.uncollectible))
    yield _gauge(
        "reconciliation_difference_usdc",
        "What the ledger and the escrows' own figures disagree on.",
        _usdc(figures.difference),
    )


def _escrows(figures: Figures) -> Iterator[Metric]:
    states = figures.states
    frozen = states.get(EscrowStatus.FROZEN.value, 0)
    yield _gauge("escrows_frozen", "Escrows that wait for a person.", frozen)
    yield _gauge(
        "escrows_exhausted", "Escrows with nothing left to pay with.", states.get("exhausted", 0)
    )
    yield _gauge(
        "escrows_low",
        "Agreements in use with less than a tenth of their deposit left.",
        figures.low,
    )
    paused = states.get(EscrowStatus.PAUSED.value, 0)
    yield _gauge("escrows_paused", "Escrows that the service does not let be paid.", paused)
    yield _gauge("releases_in_doubt", "Releases of unknown outcome.", figures.releases_in_doubt)
    yield _gauge(
        "releases_escalated",
        "Of those in doubt, the releases that wait for a person.",
        figures.releases_escalated,
    )
    yield _gauge(
        "settlement_lag_seconds",
        "Age of the oldest usage that is due and not paid.",
        figures.lag_ms / 1000,
    )
    left = figures.deadline_ms
    yield _gauge(
        "deadline_seconds",
        "Until the nearest deadline of an escrow with usage to pay; NaN: there is none.",
        float("nan") if left is None else left / 1000,
    )


def _agreements(each: Sequence[AgreementFigures]) -> Iterator[Metric]:
    """Each agreement's money, as the families without a label have it in sum."""
    accrued, released = (
        CounterMetricFamily(f"meterd_agreement_{name}", text, labels=["agreement"])
        for name, text in (
            ("accrued_usdc", "Owed by each agreement for all usage so far."),
            ("released_usdc", "Paid for each agreement so far."),
        )
    )
    unsettled, headroom, in_doubt, uncollectible = (
        GaugeMetricFamily(f"meterd_agreement_{name}", text, labels=["agreement"])
        for name, text in (
            ("unsettled_usdc", "Earned under each agreement and not yet paid."),
            ("headroom_usdc", "What each payer can still use."),
            ("in_doubt_usdc", "May or may not have been paid for each agreement."),
            ("uncollectible_usdc", "Used under each agreement beyond what is left."),
        )
    )
    for one in each:
        labels = [one.agreement or OTHERS]
        accrued.add_metric(labels, float(one.accrued))
        released.add_metric(labels, _usdc(one.settled))
        unsettled.add_metric(labels, _usdc(one.unsettled))
        headroom.add_metric(labels, _usdc(one.headroom))
        in_doubt.add_metric(labels, _usdc(one.in_doubt))
        uncollectible.add_metric(labels, _usdc(one.uncollectible))
    yield from (accrued, released, unsettled, headroom, in_doubt, uncollectible)


def _sources(states: Iterable[SourceState]) -> Iterator[Metric]:
    lag = GaugeMetricFamily(
        "meterd_source_lag_events", "Deliveries that wait at the broker.", labels=["source"]
    )
    connected = GaugeMetricFamily(
        "meterd_source_connected", "1 while the source is connected.", labels=["source"]
    )
    unacked = GaugeMetricFamily(
        "meterd_unacked_deliveries", "Deliveries read and not yet acked.", labels=["source"]
    )
    for state in states:
        lag.add_metric([state.name], float("nan") if state.lag is None else state.lag)
        connected.add_metric([state.name], 1 if state.connected else 0)
        unacked.add_metric([state.name], state.unacked)
    yield from (lag, connected, unacked)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"meterd_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"meterd_{name}", text, value=value)


def _usdc(micros: int) -> float:
    """Micros as a float of USDC: for display, and the last thing that happens to them."""
    return micros / MICROS


def _units(nanos: int) -> float:
    """Nanos of a quantity as a float of its unit: for display."""
    return nanos / NANOS


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
