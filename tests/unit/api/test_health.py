from __future__ import annotations

from tests.unit.api.conftest import source_state


async def test_a_daemon_that_runs_is_alive_whatever_else(world):
    """Alive is less than ready: a supervisor must not kill for a full disk."""
    world.store.writable = False
    answer = await world.get("/healthz")

    assert (answer.status, answer.json) == (200, {"status": "ok"})


async def test_a_daemon_is_ready_when_store_and_sources_are(world):
    """Each reason against it is named."""
    ready = await world.get("/readyz")
    world.intake.states["mqtt"] = source_state(connected=False)
    world.store.writable = False
    unready = await world.get("/readyz")

    assert (ready.status, ready.json) == (200, {"status": "ready", "degraded": ""})
    assert unready.status == 503
    assert unready.headers["Content-Type"] == "application/problem+json"
    assert unready.json["reasons"] == [
        "the store takes no commits: the disk is full",
        "source mqtt is not connected",
    ]


async def test_an_escrow_service_that_is_away_degrades_only(world):
    """Usage is still taken, so the daemon is ready."""
    world.settler.reason = "the escrow service refuses the key"
    answer = await world.get("/readyz")

    assert (answer.status, answer.json["degraded"]) == (200, "the escrow service refuses the key")


async def test_metrics_show_the_sums_of_now(world):
    """A scrape makes the pass over all agreements anew when it is old."""
    usage = {"id": "a", "escrow_id": "esc_1", "meter": "calls"}
    await world.post("/v1/events", usage)
    answer = await world.get("/metrics")

    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "meterd_accrued_usdc_total 0.001\n" in answer.body.decode()
    route = 'meterd_http_requests_total{code="200",method="POST",route="/v1/events"} 1.0'
    assert route in answer.body.decode()


async def test_metrics_speak_openmetrics_when_they_are_asked_to(world):
    """The scraper chooses."""
    answer = await world.get("/metrics", headers={"Accept": "application/openmetrics-text"})

    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")
