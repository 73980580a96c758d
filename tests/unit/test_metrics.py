from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from meterd import __version__
from meterd.api.overview import AgreementFigures
from meterd.core.accounts import Entry
from meterd.core.events import Reason, Rejection
from meterd.core.settlement import Release, ReleaseStatus
from meterd.metrics import ALARMS, OTHERS, OUTCOMES, Metrics, Reads

# Every family and its labels, without the prefix: dashboards and alerts are written against them.
TABLE = {
    "deliveries_total": ("source",),
    "events_total": ("source", "result"),
    "rejections_total": ("reason",),
    "otlp_ignored_total": ("signal",),
    "dead_letters": (),
    "sequence_missing": (),
    "sequence_given_up_total": (),
    "source_lag_events": ("source",),
    "source_connected": ("source",),
    "unacked_deliveries": ("source",),
    "usage_total": ("meter",),
    "accrued_usdc_total": (),
    "released_usdc_total": (),
    "unsettled_usdc": (),
    "headroom_usdc": (),
    "holds_usdc": (),
    "gate_decisions_total": ("allowed",),
    "in_doubt_usdc": (),
    "uncollectible_usdc": (),
    "releases_total": ("outcome",),
    "release_seconds": (),
    "releases_in_doubt": (),
    "releases_escalated": (),
    "escrows_frozen": (),
    "escrows_paused": (),
    "escrows_exhausted": (),
    "escrows_low": (),
    "deadline_seconds": (),
    "event_to_commit_seconds": (),
    "event_to_release_seconds": (),
    "gate_seconds": (),
    "settlement_lag_seconds": (),
    "reconciliation_difference_usdc": (),
    "escrow_requests_total": ("call", "code"),
    "escrow_request_seconds": ("call",),
    "http_requests_total": ("route", "method", "code"),
    "http_request_seconds": (),
    "commit_seconds": (),
    "commit_batch_events": (),
    "commit_changes": (),
    "store_bytes": (),
    "store_writable": (),
    "build_info": ("version",),
    "config_reload_success": (),
    "alarms_total": ("action",),
}
NOT_ZERO = {"meterd_build_info", "meterd_config_reload_success", "meterd_store_writable"}


@dataclass
class State:
    """A source."""

    name: str
    connected: bool = False
    lag: int | None = 0
    unacked: int = 0


@dataclass
class Sums:
    """Figures of a ledger."""

    accrued: Fraction = Fraction(0)
    settled: int = 0
    unsettled: int = 0
    headroom: int = 0
    in_doubt: int = 0
    uncollectible: int = 0
    difference: int = 0
    releases_in_doubt: int = 0
    releases_escalated: int = 0
    lag_ms: int = 0
    deadline_ms: int | None = 0
    low: int = 0
    states: dict[str, int] = field(default_factory=dict)
    by_agreement: tuple[AgreementFigures, ...] = ()


def make(sums=None, states=(), letters=0, size=0) -> Metrics:
    metrics = Metrics(CollectorRegistry(), meters=("tokens",), sources=("mqtt",))
    metrics.watch(
        Reads(lambda: sums or Sums(), lambda: states, lambda: letters, lambda: 0, lambda: size)
    )
    return metrics


def test_missing_numbers_are_read_at_the_scrape():
    """In all, without the name of a producer: there may be ten thousand."""
    metrics = Metrics(CollectorRegistry(), meters=())
    nothing = (Sums, tuple, lambda: 0, lambda: 0, lambda: 0)
    metrics.watch(Reads(*nothing, missing=lambda: 12, given_up=lambda: 34))
    found = samples(metrics)

    assert 12 == found["meterd_sequence_missing", ()]
    assert 34 == found["meterd_sequence_given_up_total", ()]


def samples(metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels, as a scraper would read it."""
    body, _ = metrics.exposition("")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(metrics, name, **labels) -> float:
    return samples(metrics)[f"meterd_{name}", tuple(sorted(labels.items()))]


def entry(accepted=0, duplicates=0, reasons=()) -> Entry:
    rejections = [Rejection(index, "", reason, "") for index, reason in enumerate(reasons)]
    return Entry(accepted, duplicates, rejections, None, {}, {}, [])


def release(status) -> Release:
    return Release("rel_1", "esc_1", 5, 0, status, "amount", 0, 0, ((0, status.value, ""),))


def test_names_and_labels_are_those_of_the_table():
    """A family that is added, lost or renamed fails here."""
    found: dict[str, set[str]] = {}
    for name, labels in samples(make(states=[State("mqtt")])):
        base = name.removeprefix("meterd_")
        for ending in ("_bucket", "_count", "_sum"):
            base = base.removesuffix(ending)
        found.setdefault(base, set()).update(key for key, _ in labels if key != "le")

    assert found == {name: set(labels) for name, labels in TABLE.items()}


def test_every_family_has_a_help_text():
    """What a figure means stands beside it."""
    body, _ = make(states=[State("mqtt")]).exposition("")
    families = list(text_string_to_metric_families(body.decode()))

    assert [family.name for family in families if not family.documentation.endswith(".")] == []


def test_every_series_is_there_from_the_start_at_zero():
    """An alert on a rate sees the first event."""
    found = samples(make(states=[State("mqtt")]))

    assert {name for (name, _), figure in found.items() if figure != 0} == NOT_ZERO
    for reason in Reason:
        assert ("meterd_rejections_total", (("reason", reason.value),)) in found
    for outcome in OUTCOMES:
        assert ("meterd_releases_total", (("outcome", outcome),)) in found
    for action in (*ALARMS, "other"):
        assert ("meterd_alarms_total", (("action", action),)) in found
    for source in ("mqtt", "http", "other"):
        for result in ("accepted", "duplicate", "rejected"):
            labels = (("result", result), ("source", source))
            assert ("meterd_events_total", labels) in found


def test_a_batch_is_counted_by_verdict():
    """Deliveries are the sum of the three."""
    metrics = make()
    metrics.batch("mqtt", entry(3, 2, [Reason.LATE]), {"tokens": 1_500_000_000})

    assert value(metrics, "deliveries_total", source="mqtt") == 6
    assert value(metrics, "events_total", source="mqtt", result="accepted") == 3
    assert value(metrics, "events_total", source="mqtt", result="duplicate") == 2
    assert value(metrics, "events_total", source="mqtt", result="rejected") == 1
    assert value(metrics, "rejections_total", reason="late") == 1
    assert value(metrics, "usage_total", meter="tokens") == 1.5
    assert value(metrics, "commit_batch_events_sum") == 6
    assert (metrics.accepted, metrics.duplicates, metrics.rejected) == (3, 2, 1)
    assert metrics.last_event_at > 0


def test_labels_from_outside_make_no_series():
    """A source, meter, alarm, call or code that nobody knows is `other`."""
    metrics = make()
    before = len(samples(metrics))
    for number in range(100):
        metrics.batch(f"source {number}", entry(1), {f"meter {number}": 10**9})
        metrics.alarm(f"alarm {number}")
    after_ours = len(samples(metrics))
    for number in range(2000):
        metrics.observe(f"call {number}", f"code {number}", 0.1)
        metrics.http(f"/route/{number}", "GET", 200, 0.1)

    assert after_ours == before
    assert value(metrics, "deliveries_total", source="other") == 100
    assert value(metrics, "escrow_requests_total", call="other", code="other") == 2000
    assert len(samples(metrics)) < before + 450


@pytest.mark.parametrize("status", list(ReleaseStatus))
def test_a_release_is_counted_when_it_comes_to_something(status):
    """An intention is no outcome; only a confirmation has a duration."""
    metrics = make()
    metrics.released(release(status), 2.0)
    counted = {
        dict(labels)["outcome"]
        for (name, labels), figure in samples(metrics).items()
        if name == "meterd_releases_total" and figure
    }

    unfinished = {ReleaseStatus.INTENDED, ReleaseStatus.SENT}
    assert counted == (set() if status in unfinished else {status.value})
    assert value(metrics, "release_seconds_count") == (status is ReleaseStatus.CONFIRMED)
    assert (metrics.last_release_at > 0) == (status is ReleaseStatus.CONFIRMED)


def test_what_the_ledger_knows_is_read_at_the_scrape():
    """Micros are shown as USDC, states and sources as they are now."""
    sums = Sums(
        accrued=Fraction(7, 2),
        settled=2_500_000,
        unsettled=1_000_000,
        headroom=3,
        in_doubt=4,
        uncollectible=5,
        difference=6,
        releases_in_doubt=5,
        releases_escalated=1,
        lag_ms=1500,
        deadline_ms=2500,
        low=6,
        states={"frozen": 2, "exhausted": 3, "paused": 4, "active": 9},
    )
    metrics = make(sums, [State("mqtt", True, None, 8)], letters=11, size=4096)
    expected = {
        "accrued_usdc_total": 3.5,
        "released_usdc_total": 2.5,
        "unsettled_usdc": 1,
        "headroom_usdc": 0.000003,
        "in_doubt_usdc": 0.000004,
        "uncollectible_usdc": 0.000005,
        "reconciliation_difference_usdc": 0.000006,
        "releases_in_doubt": 5,
        "releases_escalated": 1,
        "escrows_paused": 4,
        "settlement_lag_seconds": 1.5,
        "deadline_seconds": 2.5,
        "escrows_low": 6,
        "escrows_frozen": 2,
        "escrows_exhausted": 3,
        "dead_letters": 11,
        "store_bytes": 4096,
    }

    assert {name: value(metrics, name) for name in expected} == expected
    assert value(metrics, "source_connected", source="mqtt") == 1
    assert value(metrics, "unacked_deliveries", source="mqtt") == 8
    assert math.isnan(value(metrics, "source_lag_events", source="mqtt"))


def test_no_deadline_is_no_number():
    """Zero would say that it is now."""
    assert math.isnan(value(make(Sums(deadline_ms=None)), "deadline_seconds"))


def test_agreements_have_series_only_where_figures_have_them():
    """With their ids, and one for all that have none of their own."""
    one = AgreementFigures("customer-1", Fraction(7, 2), 2_500_000, 1_000_000, 4, 5, 6)
    rest = AgreementFigures("", Fraction(1), 1, 2, 3, 4, 5)
    metrics = make(Sums(by_agreement=(one, rest)))
    expected = {
        "accrued_usdc_total": 3.5,
        "released_usdc_total": 2.5,
        "unsettled_usdc": 1,
        "headroom_usdc": 0.000004,
        "in_doubt_usdc": 0.000005,
        "uncollectible_usdc": 0.000006,
    }
    found = {name: value(metrics, f"agreement_{name}", agreement="customer-1") for name in expected}

    assert found == expected
    assert value(metrics, "agreement_accrued_usdc_total", agreement=OTHERS) == 1
    assert not any(name.startswith("meterd_agreement") for name, _ in samples(make()))


def test_durations_are_observed_once_each_and_never_below_zero():
    """A producer's clock may be ahead of this one."""
    metrics = make()
    for seconds in (-3.0, 1.5):
        metrics.committed(seconds)
        metrics.paid(seconds)
        metrics.gate(allowed=seconds > 0, seconds=seconds)

    for name in ("event_to_commit_seconds", "event_to_release_seconds", "gate_seconds"):
        assert value(metrics, f"{name}_count") == 2
        assert value(metrics, f"{name}_sum") == 1.5
    assert value(metrics, "gate_decisions_total", allowed="true") == 1


def test_the_hooks_of_the_edges_are_counted():
    """Commits, a full disk, calls of the service, requests, a reload that failed."""
    metrics = make()
    metrics.on_commit(0.002, 3)
    metrics.on_writable(False)
    metrics.observe("release_partial", "200", 0.2)
    metrics.observe("read", "no_answer", 30.0)
    metrics.http("/v1/events", "POST", 200, 0.001)
    metrics.reloaded(success=False)
    metrics.alarm("escrow_frozen")

    assert value(metrics, "commit_seconds_count") == 1
    assert value(metrics, "commit_changes_sum") == 3
    assert value(metrics, "store_writable") == 0
    assert value(metrics, "escrow_requests_total", call="release_partial", code="200") == 1
    assert value(metrics, "escrow_requests_total", call="read", code="no_answer") == 1
    assert value(metrics, "http_requests_total", route="/v1/events", method="POST", code="200") == 1
    assert value(metrics, "config_reload_success") == 0
    assert value(metrics, "alarms_total", action="escrow_frozen") == 1
    assert value(metrics, "build_info", version=__version__) == 1
