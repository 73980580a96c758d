"""The life of a daemon: it starts, waits, pays, doubts, reloads, drains and stops as promised."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import redis

from tests.acceptance.stage import (
    PLANS,
    Node,
    clear_faults,
    configuration,
    meterd,
    move_clock,
    paid,
    until,
)
from tests.processes import PAYER_KEY, Sandbox, call, free_port
from tests.servers import MosquittoServer, RedisServer

QUANTUM = Decimal("0.000001")
# Each threshold alone. `min_release` would hide the small ones.
THRESHOLDS = """
[plans.amount]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { amount = "0.05" }

[plans.units]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { units = "100" }

[plans.interval]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { interval = "1500ms", min_release = "0.000001" }

[plans.percent]
pattern = "pay_per_token"
rates = [{ meter = "tokens", price = "1", per = 1000 }]
settle = { escrow_percent = 10 }

[plans.deadline]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { amount = "1000", before_deadline = "0s" }

[plans.tiny]
pattern = "streaming"
rates = [{ meter = "units", price = "0.0000005" }]
settle = { amount = "1000" }
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One escrow service for all tests that do not stop it."""
    with Sandbox(tmp_path_factory.mktemp("life") / "sandbox") as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def bench(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One daemon without brokers for all tests that need only escrows of their own."""
    text = configuration(sandbox, plans=PLANS + THRESHOLDS)
    with Node(tmp_path_factory.mktemp("bench"), text) as node:
        node.wait_ready()
        yield node


@pytest.fixture
def good(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox, free of faults before and after."""
    clear_faults(sandbox)
    yield sandbox
    clear_faults(sandbox)


# -- Starting --------------------------------------------------------------------------------------


def test_a_daemon_on_an_empty_store_is_ready_and_says_so(tmp_path: Path, sandbox: Sandbox) -> None:
    """Health, readiness, a log in JSON, and the second start finds what the first one kept."""
    text = configuration(sandbox)
    escrow = sandbox.lock("1.00")
    with Node(tmp_path, text) as node:
        began = time.monotonic()
        node.wait_ready()
        sys.stdout.write(f"started within {time.monotonic() - began:.2f} s\n")
        alive, ready = node.ask("GET", "/healthz"), node.ask("GET", "/readyz")
        node.bind(escrow, "lazy", "kept")
        node.use(escrow, "1.5", "e1")
        node.stop()
        first = node.returncode
        node.start()
        node.wait_ready()
        again = node.send({"id": "e1", "agreement": "kept", "meter": "units", "quantity": "1.5"})
        agreement = node.agreement("kept")
        node.stop()

    assert (alive.status, alive.json) == (200, {"status": "ok"})
    assert (ready.status, ready.json) == (200, {"status": "ready", "degraded": ""})
    assert (first, node.returncode) == (0, 0)
    assert again == {"accepted": 0, "duplicates": 1, "rejected": []}
    assert (agreement["accrued"], agreement["events"]) == ("0.0015", 1)
    assert len(node.logged("started")) == len(node.logged("stopped")) == 2
    assert node.logged("started")[0]["seconds"] >= 0


def test_a_second_daemon_on_the_same_directory_names_the_first(bench: Node, tmp_path: Path) -> None:
    """It exits 2 with the holder's pid, and the first goes on."""
    other = tmp_path / "other.toml"
    other.write_text(
        bench.config.read_text().replace(f"127.0.0.1:{bench.port}", f"127.0.0.1:{free_port()}")
    )
    answer = meterd("run", "-c", str(other))

    assert answer.returncode == 2
    assert f"process {bench.pid} on " in answer.stderr
    assert bench.ask("GET", "/readyz").status == 200


def test_every_mistake_of_the_configuration_is_listed_at_once(tmp_path: Path) -> None:
    """Exit 2, a line for each mistake with its key, and nothing is made on the disk."""
    config = tmp_path / "meterd.toml"
    config.write_text(
        f'[daemon]\ndata_dir = "{tmp_path}/state"\n[escrow]\nbase_url = "http://example.com"\n'
        'min_intervall = "2s"\n[plans.p]\npattern = "streaming"\nrates = []\n'
        '[[agreements]]\nplan = "q"\nescrows = { main = "../admin" }\n'
    )
    answer = meterd("run", "-c", str(config))

    assert answer.returncode == 2
    for key in (
        "escrow.base_url",
        "escrow.api_key",
        "escrow.min_intervall",
        "plans.p.rates",
        "agreements[0].escrows.main",
    ):
        assert f"  {key}: " in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "state").exists()


def test_an_agreement_that_contradicts_the_store_is_a_mistake_with_its_key(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """A known agreement with another escrow, and a plan that is gone: exit 2, each named."""
    agreement = '[[agreements]]\nid = "a"\nplan = "{plan}"\nescrows = {{ main = "{escrow}" }}\n'
    text = configuration(sandbox, rest=agreement.format(plan="stream", escrow="esc_one"))
    with Node(tmp_path, text) as node:
        node.wait_ready()
        node.stop()
        node.write(configuration(sandbox, rest=agreement.format(plan="stream", escrow="esc_two")))
        other_escrow = meterd("run", "-c", str(node.config))
        node.write(configuration(sandbox, plans=PLANS.replace("plans.stream", "plans.renamed")))
        plan_gone = meterd("run", "-c", str(node.config))

    assert other_escrow.returncode == 2
    assert "agreements[0]: agreement a is bound to" in other_escrow.stderr
    assert plan_gone.returncode == 2
    assert "plans.stream" in plan_gone.stderr


def test_a_port_in_use_is_named(tmp_path: Path, sandbox: Sandbox) -> None:
    """Exit 2 with the key, the address and the cause; no traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        node = Node(tmp_path, configuration(sandbox), port=taken.getsockname()[1])
        answer = meterd("run", "-c", str(node.config))

    assert answer.returncode == 2
    assert f"http.listen: cannot listen on 127.0.0.1:{node.port}" in answer.stderr
    assert "in use" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_data_directory_that_cannot_be_used_is_named(tmp_path: Path, sandbox: Sandbox) -> None:
    """Below a file no directory can be made, not even by root."""
    (tmp_path / "file").write_text("")
    text = configuration(sandbox).replace("@data_dir@", f"{tmp_path}/file/state")
    node = Node(tmp_path, text)
    answer = meterd("run", "-c", str(node.config))

    assert answer.returncode not in {0, 1}
    assert "the data directory cannot be used" in answer.stderr
    assert f"{tmp_path}/file/state" in answer.stderr
    assert "Traceback" not in answer.stderr


# -- Brokers ---------------------------------------------------------------------------------------


def _sources(redis_port: int, mqtt_port: int) -> str:
    return (
        f'[[sources]]\nkind = "redis"\nurl = "redis://127.0.0.1:{redis_port}/0"\nblock = "200ms"\n'
        f'[[sources]]\nkind = "mqtt"\nport = {mqtt_port}\n'
    )


def test_brokers_that_are_down_at_the_start_are_waited_for(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """Status, readiness and log name them; HTTP goes on meanwhile; they are used when they come."""
    ports = free_port(), free_port()
    escrow = sandbox.lock("1.00")
    with Node(tmp_path, configuration(sandbox, rest=_sources(*ports))) as node:
        node.wait_ready()
        node.bind(escrow, "lazy")
        until(
            lambda: {each["source"] for each in node.logged("source_waiting")} == {"redis", "mqtt"},
            node.log_tail,
        )
        unready, status = node.ask("GET", "/readyz"), node.get("/v1/status")
        node.use(escrow, 1, "http-1")
        with RedisServer(ports[0]) as redis_server, MosquittoServer(ports[1]) as mosquitto:
            node.wait_sources()
            _xadd(redis_server, {"id": "r1", "escrow_id": escrow, "meter": "units", "quantity": 2})
            _publish(mosquitto, [_event("m1", escrow, 4)])
            node.wait_agreement(escrow, accrued="0.007")
            connected = node.get("/v1/status")["sources"]
            node.stop()

    assert unready.status == 503
    assert unready.json["reasons"] == [
        "source redis is not connected",
        "source mqtt is not connected",
    ]
    assert [one["connected"] for one in status["sources"]] == [False, False]
    assert ["Redis" in status["sources"][0]["error"], "MQTT" in status["sources"][1]["error"]] == [
        True,
        True,
    ]
    assert status["flow"]["word"] == "waiting_for_sources"
    assert [(one["connected"], one["error"]) for one in connected] == [(True, "")] * 2
    assert {each["source"] for each in node.logged("source_connected")} == {"redis", "mqtt"}
    assert node.returncode == 0


def test_brokers_that_die_under_load_cost_nothing(tmp_path: Path, sandbox: Sandbox) -> None:
    """Redis by SIGKILL, Mosquitto by SIGTERM (with -9 it loses itself what it had taken)."""
    events = 4000
    escrow = sandbox.lock("10.00")
    with RedisServer() as redis_server, MosquittoServer() as mosquitto:
        rest = _sources(redis_server.port, mosquitto.port)
        with Node(tmp_path, configuration(sandbox, rest=rest)) as node:
            node.wait_ready()
            node.bind(escrow, "lazy")
            node.wait_sources()
            half = threading.Barrier(3, timeout=30)
            feeders = [
                threading.Thread(target=feed, args=(server, escrow, events, half))
                for feed, server in ((_feed_redis, redis_server), (_feed_mqtt, mosquitto))
            ]
            for feeder in feeders:
                feeder.start()
            half.wait()
            redis_server.kill()
            mosquitto.stop()
            until(lambda: len(node.logged("source_down")) >= 2, node.log_tail)
            down = node.ask("GET", "/readyz")
            redis_server.start()
            mosquitto.start()
            for feeder in feeders:
                feeder.join(60)
            agreement = node.wait_agreement(escrow, events=2 * events)
            status = node.get("/v1/status")
            node.stop()

    assert down.status == 503
    assert agreement["accrued"] == "8.00"
    assert status["dead_letters"] == 0
    assert status["events"]["rejected"] == 0
    assert node.returncode == 0


def test_a_broker_that_breaks_off_at_once_is_not_asked_without_pause(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """Connecting works and reading is refused: each try is a pause later than the one before."""
    with RedisServer() as server:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL", "SETUSER", "default", "-xread")
        rest = f'[[sources]]\nkind = "redis"\nurl = "{server.url}"\n'
        with Node(tmp_path, configuration(sandbox, rest=rest)) as node:
            node.wait_ready()
            node.wait_logged("source_down", 2)
            with redis.Redis.from_url(server.url) as client:
                begun = client.info("stats")["total_connections_received"]
                time.sleep(2)  # The promise is about how little happens in a time.
                made = client.info("stats")["total_connections_received"] - begun
                client.execute_command("ACL", "SETUSER", "default", "+xread")
            until(lambda: node.ask("GET", "/readyz").status == 200, node.log_tail)
            node.stop()

    assert made < 20
    assert "lacks what meterd needs" in node.logged("source_down")[0]["event"]


def _event(event_id: str, escrow: str, quantity: int = 1) -> dict[str, object]:
    return {"id": event_id, "escrow_id": escrow, "meter": "units", "quantity": quantity}


def _xadd(server: RedisServer, fields: dict[str, Any]) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.xadd("meterd:usage", fields)


def _publish(server: MosquittoServer, events: list[dict[str, object]]) -> None:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    try:
        for event in events:
            topic = f"meterd/usage/{event['escrow_id']}/{event['meter']}"
            client.publish(topic, json.dumps(event), qos=1).wait_for_publish(10)
    finally:
        client.disconnect()
        client.loop_stop()


def _feed_redis(server: RedisServer, escrow: str, events: int, half: threading.Barrier) -> None:
    """Send until each is answered; what was not answered is sent again."""
    sent, waited = 0, False
    while sent < events:
        if sent >= events // 2 and not waited:
            half.wait()
            waited = True
        try:
            with redis.Redis.from_url(server.url) as client:
                pipe = client.pipeline(transaction=False)
                for number in range(sent, sent + 100):
                    pipe.xadd("meterd:usage", _event(f"r{number}", escrow))  # type: ignore[arg-type]
                pipe.execute()
            sent += 100
        except (redis.RedisError, OSError):
            time.sleep(0.1)


def _feed_mqtt(server: MosquittoServer, escrow: str, events: int, half: threading.Barrier) -> None:
    """Publish at QoS 1 and in a session that sends again what has no PUBACK."""
    client = paho.Client(
        paho.CallbackAPIVersion.VERSION2, "feeder", protocol=paho.MQTTv311, clean_session=False
    )
    client.reconnect_delay_set(1, 1)
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    try:
        topic, waiting = f"meterd/usage/{escrow}/units", []
        for number in range(events):
            if number == events // 2:
                half.wait()
            waiting += [client.publish(topic, json.dumps(_event(f"m{number}", escrow)), qos=1)]
        until(lambda: all(info.is_published() for info in waiting), "each has its PUBACK")
    finally:
        client.disconnect()
        client.loop_stop()


# -- Stopping --------------------------------------------------------------------------------------


def test_a_daemon_that_is_told_to_stop_settles_what_is_due_and_says_what_is_left(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """SIGTERM: what is due leaves in as many paced releases as it takes; the rest is in the log."""
    escrow = sandbox.lock("1.00")
    settings = 'release_max = "0.02"\nmin_interval = "200ms"\n'
    with RedisServer() as server:
        rest = f'[[sources]]\nkind = "redis"\nurl = "{server.url}"\nblock = "200ms"\n'
        text = configuration(sandbox, escrow=settings, rest=rest, daemon='drain_timeout = "15s"')
        with Node(tmp_path, text) as node:
            node.wait_ready()
            node.bind(escrow, "stream")
            node.wait_sources()
            _xadd(server, {"id": "r1", "escrow_id": escrow, "meter": "units", "quantity": 105})
            node.wait_agreement(escrow, accrued="0.105")
            node.stop()
            with redis.Redis.from_url(server.url) as client:
                stream = client.xinfo_stream("meterd:usage")
                (group,) = client.xinfo_groups("meterd:usage")
            amounts = [row["amount"] for row in sandbox.operations(escrow)]

    (drained,) = node.logged("drained")
    assert node.returncode == 0
    assert amounts == ["0.02"] * 5
    assert (drained["accrued_usdc"], drained["released_usdc"]) == ("0.105", "0.10")
    assert drained["unsettled_usdc"] == "0.005"
    assert group["last-delivered-id"] == stream["last-generated-id"]
    assert [each["action"] for each in node.logged()[-2:]] == ["drained", "stopped"]


def test_a_daemon_that_drains_takes_nothing_new(tmp_path: Path, good: Sandbox) -> None:
    """While a slow release keeps it, events are answered 503; a second signal ends it."""
    escrow = good.lock("1.00")
    text = configuration(good, escrow='request_timeout = "20s"', daemon='drain_timeout = "25s"')
    with RedisServer() as server:
        text += f'[[sources]]\nkind = "redis"\nurl = "{server.url}"\nblock = "200ms"\n'
        with Node(tmp_path, text) as node:
            node.wait_ready()
            node.bind(escrow, "stream")
            node.wait_sources()
            good.fault(kind="delay_answer", call="release_partial", seconds=15, escrow_id=escrow)
            node.use(escrow, 20, "e1")
            until(lambda: node.agreement(escrow)["release"], "a release under way")
            node.signal(signal.SIGTERM)
            node.wait_logged("draining")
            refused = node.ask("POST", "/v1/events", _event("e2", escrow))
            _xadd(server, {"id": "r1", "escrow_id": escrow, "meter": "units", "quantity": 1})
            node.signal(signal.SIGTERM)
            began = time.monotonic()
            code = node.wait(20)
            seconds = time.monotonic() - began
            clear_faults(good)
            node.start()
            node.wait_ready()
            node.wait_agreement(escrow, accrued="0.021", in_doubt="0.00", released="0.02")
            node.stop()

    assert refused.status == 503
    assert "Retry-After" in refused.headers
    assert code == 0
    assert seconds < 10
    assert [each["in_doubt_usdc"] for each in node.logged("drain_cut_off")] == ["0.02"]
    assert paid(good, escrow) == Decimal("0.02")


def test_a_drain_that_takes_too_long_is_cut_off(tmp_path: Path, good: Sandbox) -> None:
    """After `drain_timeout` the daemon ends with 0, and the next one ends the doubt exactly."""
    escrow = good.lock("1.00")
    text = configuration(good, escrow='request_timeout = "30s"', daemon='drain_timeout = "500ms"')
    with Node(tmp_path, text) as node:
        node.wait_ready()
        node.bind(escrow, "stream")
        good.fault(kind="delay_answer", call="release_partial", seconds=20, escrow_id=escrow)
        node.use(escrow, 20, "e1")
        until(lambda: node.agreement(escrow)["release"], "a release under way")
        node.stop(15)
        cut = node.returncode, len(node.logged("drain_cut_off"))
        clear_faults(good)
        node.start()
        node.wait_ready()
        node.wait_agreement(escrow, in_doubt="0.00", released="0.02", release=None)
        (release,) = node.releases(escrow)
        node.stop()

    assert cut == (0, 1)
    assert [row["status"] for row in release["history"]] == [
        "intended",
        "in_doubt",
        "confirmed",
    ]
    assert paid(good, escrow) == Decimal("0.02")


# -- Reloading -------------------------------------------------------------------------------------


def _bound(agreement: str, escrow: str, plan: str = "lazy") -> str:
    return (
        f'[[agreements]]\nid = "{agreement}"\nplan = "{plan}"\nescrows = {{ main = "{escrow}" }}\n'
    )


def test_a_reload_prices_later_usage_alone_and_binds_what_is_new(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """What was accrued stays; new agreements, meters and plans are there; a restart agrees."""
    one, two = sandbox.lock("1.00"), sandbox.lock("1.00")
    with Node(tmp_path, configuration(sandbox, rest=_bound("one", one))) as node:
        node.wait_ready()
        node.use(one, 10, "e1")
        dearer = PLANS.replace('"0.001"', '"0.003"') + (
            '[plans.fresh]\npattern = "streaming"\n'
            'rates = [{ meter = "minutes", price = "0.5" }]\nsettle = { amount = "1000" }\n'
        )
        rest = _bound("one", one) + _bound("two", two, "fresh") + "[meters.minutes]\n"
        node.write(configuration(sandbox, plans=dearer, rest=rest))
        node.signal(signal.SIGHUP)
        node.wait_logged("reloaded")
        node.use(one, 10, "e2")
        node.use(two, "0.5", "e3", "minutes")
        again = node.send(_event("e1", one, 10))
        before = [node.agreement(name)["accrued"] for name in ("one", "two")]
        usage = node.get("/v1/agreements/one/usage")["items"]
        metrics = node.ask("GET", "/metrics").raw.decode()
        node.stop()
        node.start()
        node.wait_ready()
        after = [node.agreement(name)["accrued"] for name in ("one", "two")]
        node.stop()

    assert again == {"accepted": 0, "duplicates": 1, "rejected": []}
    assert before == after == ["0.04", "0.25"]
    assert {(row["quantity"], row["accrued"]) for row in usage} == {("10", "0.03"), ("10", "0.01")}
    assert "meterd_config_reload_success 1.0" in metrics


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("agreements", ["agreements[0]", "agreements[2]"]),
        ("file", ["escrow.base_url", "plans.lazy.rates[0].meter"]),
        ("plan gone", ["lazy"]),
    ],
)
def test_a_bad_reload_changes_nothing_and_says_every_mistake(
    tmp_path: Path, sandbox: Sandbox, change: str, said: list[str]
) -> None:
    """Neither the price, nor an agreement beside the bad one, nor the log level."""
    one, two, three = (sandbox.lock("1.00") for _ in range(3))
    bound = _bound("one", one) + _bound("two", two, "stream")
    with Node(tmp_path, configuration(sandbox, rest=bound)) as node:
        node.wait_ready()
        plans, rest = PLANS.replace('"0.001"', '"0.003"'), bound + _bound("three", three)
        if change == "agreements":  # Another escrow for a known agreement, twice; one is new.
            rest = _bound("one", "esc_x") + _bound("three", three) + _bound("two", "esc_y")
        if change == "plan gone":
            plans, rest = plans.replace("plans.lazy", "plans.other"), _bound("two", two, "stream")
        text = configuration(sandbox, plans=plans, rest=rest)
        if change == "file":
            text = text.replace(sandbox.api, "http://example.com").replace(
                '[plans.lazy]\npattern = "streaming"\nrates = [{ meter = "units"',
                '[plans.lazy]\npattern = "streaming"\nrates = [{ meter = "unitz"',
            )
        node.write(text)
        node.signal(signal.SIGHUP)
        (refused,) = node.wait_logged("reload_refused")
        node.use("one", 10, "e1")
        accrued = node.agreement("one")["accrued"]
        plan = next(each for each in node.get("/v1/plans")["items"] if each["name"] == "lazy")
        three_found = node.ask("GET", "/v1/agreements/three").status
        metrics = node.ask("GET", "/metrics").raw.decode()
        node.stop()

    assert [key for key in said if key not in refused["event"]] == []
    assert accrued == "0.01"
    assert plan["rates"][0]["price"] == "0.001"
    assert three_found == 404
    assert "meterd_config_reload_success 0.0" in metrics
    assert node.returncode == 0


# -- The escrow service away -----------------------------------------------------------------------


def test_an_escrow_service_that_is_away_delays_payment_and_nothing_else(tmp_path: Path) -> None:
    """Down at the start and later: usage accrues, status says paused, then all of it is paid."""
    with Sandbox(tmp_path / "sandbox") as sandbox:
        escrow = sandbox.lock("1.00")
        sandbox.stop()
        text = configuration(sandbox, rest=_bound("one", escrow, "stream"))
        with Node(tmp_path, text) as node:
            node.wait_ready()
            ready = node.ask("GET", "/readyz").status
            node.use(escrow, 20, "e1")
            adopting = until(
                lambda: found if (found := node.agreement("one"))["reason"] else None, "a reason"
            )
            sandbox.start()
            sandbox.wait_ready()
            node.wait_agreement("one", released="0.02", state="active")
            sandbox.stop()
            node.use(escrow, 30, "e2")
            paused = node.wait_state("one", "paused")
            node.use(escrow, 1, "e3")
            away = node.ask("GET", "/readyz").status
            sandbox.start()
            sandbox.wait_ready()
            node.wait_agreement("one", released="0.051", state="active")
            node.stop()
        operations = [row["amount"] for row in sandbox.operations(escrow)]

    assert (ready, away) == (200, 200)
    assert adopting["state"] == "adopting"
    assert "refused" in adopting["reason"].lower() or "connect" in adopting["reason"].lower()
    assert (paused["accrued"], paused["released"]) == ("0.05", "0.02")
    assert paused["reason"] != ""
    assert operations == ["0.02", "0.031"]


@pytest.mark.parametrize("which", ["get", "release_partial"])
def test_a_refused_key_stops_releases_until_it_works_again(
    bench: Node, good: Sandbox, which: str
) -> None:
    """Status, readiness and log say so; usage accrues; nothing is lost when the key is back."""
    escrow, other = good.lock("1.00"), good.lock("1.00")
    bench.bind(escrow, "stream")
    bench.bind(other, "stream")
    said = len(bench.logged("key_refused"))
    good.fault(kind="unauthorized_401", call=which, count=1 if which != "get" else None)
    bench.use(escrow, 20, f"{escrow}-1")
    bench.wait_logged("key_refused", said + 1)
    blocked = bench.get("/v1/status")["flow"]
    ready = bench.ask("GET", "/readyz")
    bench.use(other, 20, f"{other}-1")
    paused = bench.wait_state(escrow, "paused", "active")
    held = bench.agreement(other)["released"]
    clear_faults(good)
    bench.wait_agreement(escrow, released="0.02")
    bench.wait_agreement(other, released="0.02")

    assert blocked["blocked"] == "the escrow service refuses the key"
    assert blocked["word"] in {"blocked", "needs_a_person"}
    assert (ready.status, ready.json["degraded"]) == (200, "the escrow service refuses the key")
    assert paused["accrued"] == "0.02"
    assert held == "0.00"
    assert (paid(good, escrow), paid(good, other)) == (Decimal("0.02"), Decimal("0.02"))


def test_a_release_that_is_forbidden_holds_up_its_own_escrow_alone(
    bench: Node, good: Sandbox
) -> None:
    """A 403 is about one escrow: the others are paid on, and it is paid when it may be."""
    escrow, other = good.lock("1.00"), good.lock("1.00")
    bench.bind(escrow, "stream")
    bench.bind(other, "stream")
    refused = len(bench.logged("key_refused"))
    told = len(bench.logged("release_forbidden"))
    good.fault(kind="error_500_before", call="release_partial", status=403, escrow_id=escrow)
    bench.use(escrow, 20, f"{escrow}-1")
    bench.wait_logged("release_forbidden", told + 1)
    bench.use(other, 20, f"{other}-1")
    bench.wait_agreement(other, released="0.02")
    unpaid = bench.agreement(escrow)["released"]
    blocked = bench.get("/v1/status")["flow"]["blocked"]
    bench.wait_agreement(escrow, released="0.02", state="active")

    assert (unpaid, blocked) == ("0.00", "")
    assert len(bench.logged("key_refused")) == refused
    assert [one["status"] for one in bench.releases(escrow)] == ["confirmed", "declined"]


@pytest.mark.parametrize("end", ["refund", "expire"])
def test_an_escrow_that_ends_before_it_is_adopted_is_closed_with_the_reason(
    tmp_path: Path, good: Sandbox, end: str
) -> None:
    """It does not stay half bound for ever, and the usage that came meanwhile shows as lost."""
    escrow = good.lock("1.00")
    text = configuration(good, escrow='observe_gap = "1s"')
    with Node(tmp_path, text) as node:
        node.wait_ready()
        good.fault(kind=end, escrow_id=escrow)
        node.ask("PUT", f"/v1/agreements/{escrow}", {"plan": "stream"})
        node.use(escrow, 20, "e1")
        closed = node.wait_state(escrow, "closed")
        late = node.send({"id": "e2", "escrow_id": escrow, "meter": "units", "quantity": 1})
        node.stop()

    assert "ended before it was adopted" in closed["reason"]
    assert closed["uncollectible"] == "0.02"
    assert [one["reason"] for one in late["rejected"]] == ["closed"]
    assert paid(good, escrow) == 0


# -- Persons ---------------------------------------------------------------------------------------


def test_a_release_by_somebody_else_freezes_until_a_person_resumes(
    bench: Node, good: Sandbox
) -> None:
    """Usage is counted meanwhile; afterwards the foreign release counts as payment."""
    escrow = good.lock("1.00")
    bench.bind(escrow, "stream")
    good.fault(kind="foreign_release", escrow_id=escrow, amount="0.004")
    bench.use(escrow, 20, f"{escrow}-1")
    frozen = bench.wait_state(escrow, "frozen")
    bench.use(escrow, 10, f"{escrow}-2")
    listed = {one["agreement"]: one for one in bench.get("/v1/status")["frozen"]}
    status = bench.type("status")
    unexplained = bench.type("resume", escrow)
    resumed = bench.type("resume", escrow, "--reason", "the payer paid by hand")
    bench.wait_agreement(escrow, released="0.03", state="active", unsettled="0.00")

    assert "somebody else released" in frozen["reason"]
    assert frozen["next"] == f"meterd resume {escrow} --reason TEXT"
    assert status.returncode == 3
    assert escrow in listed or bench.get("/v1/status")["frozen"] == []
    assert unexplained.returncode == 2
    assert resumed.returncode == 0, resumed.stderr
    assert paid(good, escrow) == Decimal("0.026")
    assert good.status(escrow)["released_amount"] == "0.03"


def test_a_person_may_resume_soon_after_a_declined_release(bench: Node, good: Sandbox) -> None:
    """A decline forgets the last reading; the next one does not take minutes to come."""
    escrow = good.lock("1.00")
    bench.bind(escrow, "stream")
    good.fault(
        kind="error_500_before", call="release_partial", status=422, escrow_id=escrow, count=1
    )
    bench.use(escrow, 20, f"{escrow}-1")
    bench.wait_state(escrow, "frozen")
    until(
        lambda: bench.type("resume", escrow, "--reason", "looked at it").returncode == 0,
        lambda: bench.agreement(escrow),
        seconds=15,
    )
    bench.wait_agreement(escrow, released="0.02", state="active")

    assert paid(good, escrow) == Decimal("0.02")


@pytest.mark.parametrize("landed", [True, False])
def test_a_person_resolves_a_doubt_that_meterd_may_not(
    tmp_path: Path, good: Sandbox, landed: bool
) -> None:
    """With strict = true nothing is taken for absent; `meterd resolve` and `resume` go on."""
    escrow = good.lock("1.00")
    with Node(tmp_path, configuration(good, escrow="strict = true")) as node:
        node.wait_ready()
        node.bind(escrow, "stream")
        # It lands where readings do not show it for a long time, or never.
        fault = (
            {"kind": "error_500_after", "status_lag": 600} if landed else {"kind": "close_before"}
        )
        good.fault(call="release_partial", escrow_id=escrow, **fault)
        node.use(escrow, 20, "e1")
        frozen = node.wait_state(escrow, "frozen")
        (listed,) = until(lambda: node.get("/v1/status")["in_doubt"], "a doubt in the status")
        release = frozen["release"]["id"]
        early = node.type("resume", escrow, "--reason", "too early")
        word = "--landed" if landed else "--absent"
        resolved = node.type("resolve", release, word, "--reason", "asked the service")
        clear_faults(good)
        resumed = until(
            lambda: node.type("resume", escrow, "--reason", "all clear").returncode == 0,
            lambda: node.agreement(escrow),
        )
        node.wait_agreement(escrow, released="0.02", state="active", in_doubt="0.00")
        statuses = [one["status"] for one in node.releases(escrow)]
        node.stop()

    assert listed["next"] == f"meterd resolve {release} --landed|--absent --reason TEXT"
    assert early.returncode == 1
    assert (resolved.returncode, resumed) == (0, True), resolved.stderr
    assert statuses == (["confirmed"] if landed else ["confirmed", "void"])
    assert paid(good, escrow) == Decimal("0.02")


# -- Doubts ----------------------------------------------------------------------------------------

DOUBTS: dict[str, tuple[dict[str, object], list[str]]] = {
    "paid but 500": ({"kind": "error_500_after"}, ["confirmed"]),
    "500 and not paid": ({"kind": "error_500_before"}, ["confirmed", "void"]),
    "paid and shown late": ({"kind": "error_500_after", "status_lag": 0.5}, ["confirmed"]),
    "paid, no answer": ({"kind": "close_after"}, ["confirmed"]),
    "not paid, no answer": ({"kind": "close_before"}, ["confirmed", "void"]),
    "paid, half an answer": ({"kind": "close_during_answer"}, ["confirmed"]),
    "lands later": ({"kind": "land_late", "seconds": 0.5}, ["confirmed"]),
    "answers too late": ({"kind": "delay_answer", "seconds": 2}, ["confirmed"]),
    "a proxy's page": ({"kind": "html_page"}, ["confirmed"]),
    "a bare 200": ({"kind": "empty_200"}, ["confirmed"]),
    "an empty object": ({"kind": "empty_object_200"}, ["confirmed"]),
    "half a document": ({"kind": "truncated_json"}, ["confirmed"]),
    "a body without end": ({"kind": "endless_body"}, ["confirmed"]),
    "another escrow's id": ({"kind": "wrong_escrow_id"}, ["confirmed"]),
    "sent elsewhere": ({"kind": "redirect", "status": 307}, ["confirmed", "void"]),
    "conflict": ({"kind": "conflict_409"}, ["confirmed", "void"]),
    "too often": ({"kind": "rate_limit", "retry_after": "1"}, ["confirmed", "declined"]),
    "numbers": ({"kind": "numbers_instead_of_strings"}, ["confirmed"]),
    "float noise": ({"kind": "float_noise"}, ["confirmed"]),
}


@pytest.fixture(scope="module")
def doubted(bench: Node, sandbox: Sandbox) -> dict[str, str]:
    """An escrow for each fault, all of them under way at once."""
    clear_faults(sandbox)
    escrows = {}
    for name, (fault, _) in DOUBTS.items():
        escrows[name] = escrow = sandbox.lock("1.00")
        bench.bind(escrow, "stream")
        sandbox.fault(call="release_partial", escrow_id=escrow, **fault)
    for name, escrow in escrows.items():
        bench.use(escrow, "20.0005", f"doubt-{name}")
    return escrows


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubt_ends_exactly_whatever_the_network_did(
    bench: Node, sandbox: Sandbox, doubted: dict[str, str], name: str
) -> None:
    """Confirmed where it was paid, void and paid anew where it was not; never twice."""
    escrow = doubted[name]
    bench.wait_agreement(escrow, released="0.02", in_doubt="0.00", release=None, state="active")
    statuses = [one["status"] for one in bench.releases(escrow)]

    assert statuses == DOUBTS[name][1]
    assert [row["amount"] for row in sandbox.operations(escrow)] == ["0.02"]


READINGS: dict[str, dict[str, object]] = {
    "a proxy's page": {"kind": "html_page"},
    "nothing": {"kind": "empty_200"},
    "an empty object": {"kind": "empty_object_200"},
    "half a document": {"kind": "truncated_json"},
    "a body without end": {"kind": "endless_body"},
    "another escrow's id": {"kind": "wrong_escrow_id"},
    "more released than there is": {"kind": "released_above_total"},
    "numbers": {"kind": "numbers_instead_of_strings"},
    "float noise": {"kind": "float_noise"},
    "unknown fields": {"kind": "extra_fields"},
    "elsewhere": {"kind": "redirect", "status": 302},
    "too often, for a century": {"kind": "rate_limit", "retry_after": "3155760000"},
    "an error": {"kind": "error_500_before"},
    "the key in an error": {"kind": "echo_key_in_error", "status": 503},
    "too late": {"kind": "delay_answer", "seconds": 2},
    "an old state": {"kind": "stale_reads", "seconds": 1, "count": 3},
}


@pytest.fixture(scope="module")
def misread(bench: Node, sandbox: Sandbox) -> dict[str, str]:
    """An escrow for each fault of a reading, all of them under way at once."""
    clear_faults(sandbox)
    escrows = {}
    for name, fault in READINGS.items():
        escrows[name] = escrow = sandbox.lock("1.00")
        bench.bind(escrow, "stream")
        sandbox.fault(**{"call": "get", "escrow_id": escrow, "count": 1, **fault})
    for name, escrow in escrows.items():
        bench.use(escrow, 20, f"misread-{name}-1")
        bench.use(escrow, 10, f"misread-{name}-2")
    return escrows


@pytest.mark.parametrize("name", READINGS)
def test_a_reading_that_makes_no_sense_delays_payment_and_nothing_else(
    bench: Node, sandbox: Sandbox, misread: dict[str, str], name: str
) -> None:
    """Once is no deviation: the next reading is right, and all is paid, exactly."""
    escrow = misread[name]
    bench.wait_agreement(escrow, released="0.03", release=None, state="active")

    assert paid(sandbox, escrow) == Decimal("0.03")


def test_many_doubts_one_after_the_other_stop_all_releases_for_a_while(
    tmp_path: Path, good: Sandbox
) -> None:
    """Status and log say so; usage is counted; behind the window everything is paid."""
    settings = 'doubts_max = 2\ndoubts_window = "3s"\n'
    one, two, three = (good.lock("1.00") for _ in range(3))
    with Node(tmp_path, configuration(good, escrow=settings)) as node:
        node.wait_ready()
        for escrow in (one, two, three):
            node.bind(escrow, "stream")
        for escrow in (one, two):
            good.fault(kind="error_500_after", call="release_partial", escrow_id=escrow)
            node.use(escrow, 20, escrow)
        node.wait_logged("releases_blocked")
        node.use(three, 20, three)
        status, ready = node.get("/v1/status"), node.ask("GET", "/readyz")
        for escrow in (one, two, three):
            node.wait_agreement(escrow, released="0.02", in_doubt="0.00")
        (release,) = node.releases(three)
        node.stop()

    (said,) = node.logged("releases_blocked")
    assert status["flow"]["blocked"] == "2 releases came into doubt one after the other"
    assert (ready.status, ready.json["degraded"]) == (200, status["flow"]["blocked"])
    assert _ms(release["created_at"]) > _ms(said["timestamp"])
    assert [paid(good, escrow) for escrow in (one, two, three)] == [Decimal("0.02")] * 3


def test_a_release_that_was_delivered_twice_costs_one_release_and_freezes(
    bench: Node, good: Sandbox
) -> None:
    """What no client can prevent is seen at the next reading, and nothing more is paid."""
    escrow = good.lock("1.00")
    bench.bind(escrow, "stream")
    good.fault(kind="duplicate_delivery", call="release_partial", escrow_id=escrow)
    bench.use(escrow, 20, f"{escrow}-1")
    until(lambda: len(good.operations(escrow)) == 2, "both deliveries")
    bench.use(escrow, 30, f"{escrow}-2")
    frozen = bench.wait_state(escrow, "frozen")

    assert frozen["accrued"] == "0.05"
    assert paid(good, escrow) == Decimal("0.04")


# -- Amounts and moments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "meter", "below", "rest", "amount"),
    [
        ("amount", "units", "49.999999", "0.000001", "0.05"),
        ("units", "units", "99.999999999", "0.000000001", "0.10"),
        ("percent", "tokens", "99.999", "0.001", "0.10"),
    ],
)
def test_a_threshold_alone_pays_when_it_is_reached_and_not_before(
    bench: Node, good: Sandbox, plan: str, meter: str, below: str, rest: str, amount: str
) -> None:
    """One release of all that is owed, named for its threshold."""
    escrow = good.lock("1.00")
    bench.bind(escrow, plan)
    bench.use(escrow, below, f"{escrow}-1", meter)
    bench.use(escrow, rest, f"{escrow}-2", meter)
    bench.wait_agreement(escrow, released=amount)

    assert [row["amount"] for row in good.operations(escrow)] == [amount]
    assert [one["why"] for one in bench.releases(escrow)] == [
        "escrow_percent" if plan == "percent" else plan
    ]


def test_an_interval_alone_pays_what_came_in_its_time(bench: Node, good: Sandbox) -> None:
    """It runs from the oldest unsettled usage, and takes all that came until it ends."""
    escrow = good.lock("1.00")
    bench.bind(escrow, "interval")
    bench.use(escrow, 3, f"{escrow}-1")
    bench.use(escrow, 4, f"{escrow}-2")
    since = _ms(bench.agreement(escrow)["unsettled_since"])
    bench.wait_agreement(escrow, released="0.007", unsettled_since=None)
    (release,) = bench.releases(escrow)

    assert release["why"] == "interval"
    assert _ms(release["created_at"]) - since >= 1500


def test_what_is_owed_is_paid_before_the_deadline(bench: Node, good: Sandbox) -> None:
    """So early that a doubt could still be resolved, however little it is."""
    ahead_s = 65  # The margin is 2 x the quarantine and a minute.
    move_clock(good, ahead_s - 3600)
    try:
        body = {"to_agent_id": "agent_provider", "amount": "1.00", "auto_release_hours": 1}
        made = call("POST", f"{good.api}/escrow", body, PAYER_KEY)
        escrow = made["escrow_id"]
        bench.bind(escrow, "deadline")
        bench.use(escrow, "0.001", f"{escrow}-1")
        bench.wait_agreement(escrow, released="0.000001")
        (release,) = bench.releases(escrow)
        status = good.status(escrow)["status"]
    finally:
        move_clock(good, 3600 - ahead_s)

    assert release["why"] == "deadline"
    assert status not in {"released", "expired"}
    assert _ms(made["auto_release_at"]) - _ms(release["created_at"]) > 60_000


def test_nothing_is_sent_so_near_to_the_deadline_that_a_doubt_would_stay(
    tmp_path: Path, good: Sandbox
) -> None:
    """Nor is the service asked again and again meanwhile."""
    move_clock(good, 300 - 3600)
    try:
        body = {"to_agent_id": "agent_provider", "amount": "1.00", "auto_release_hours": 1}
        escrow = call("POST", f"{good.api}/escrow", body, PAYER_KEY)["escrow_id"]
        with Node(tmp_path, configuration(good, escrow='in_doubt_quarantine = "10m"')) as node:
            node.wait_ready()
            node.bind(escrow, "stream")
            node.use(escrow, 20, "e1")
            before = until(lambda: node.requests("read"), "a reading")
            time.sleep(1.5)  # The promise is about how little happens in a time.
            asked = node.requests("read") - before
            releases = node.releases(escrow)
            node.stop()
    finally:
        move_clock(good, 3600 - 300)

    assert releases == []
    assert asked <= 8
    assert paid(good, escrow) == 0


SPLIT = """
[plans.units]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { units = "100" }

[plans.interval]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { interval = "2s", min_release = "0.000001" }
"""
INTERVAL_MS = 300


@pytest.fixture(scope="module")
def splitting(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon that releases little at once, and not often."""
    settings = f'release_max = "0.10"\nmin_interval = "{INTERVAL_MS}ms"\n'
    text = configuration(sandbox, plans=PLANS + SPLIT, escrow=settings)
    with Node(tmp_path_factory.mktemp("splitting"), text) as node:
        node.wait_ready()
        yield node


@pytest.mark.parametrize(
    ("plan", "amounts"),
    [
        ("stream", ["0.10", "0.10", "0.10", "0.05"]),
        ("units", ["0.10", "0.10", "0.10", "0.05"]),
        ("interval", ["0.10", "0.10", "0.10", "0.05"]),
        ("lazy", ["0.10", "0.10", "0.10", "0.05"]),  # Asked for by a person.
    ],
)
def test_what_is_more_than_release_max_leaves_in_pieces_with_the_pace_between(
    splitting: Node, good: Sandbox, plan: str, amounts: list[str]
) -> None:
    """All that was due, no piece above the limit, and none sooner than the pace allows."""
    escrow = good.lock("1.00")
    splitting.bind(escrow, plan)
    splitting.use(escrow, 350, f"{escrow}-1")
    if plan == "lazy":
        splitting.type("settle", escrow)
    splitting.wait_agreement(escrow, released="0.35")
    operations = good.operations(escrow)
    times = [_ms(row["time"]) for row in operations]
    gaps = [later - earlier for earlier, later in pairwise(times)]

    assert [row["amount"] for row in operations] == amounts
    assert min(gaps) >= INTERVAL_MS - 50
    assert times[-1] - times[0] < 2000  # An interval that began anew with each piece would not do.


def test_usage_that_keeps_coming_is_paced(splitting: Node, good: Sandbox) -> None:
    """Every event reaches the threshold; the releases keep their distance all the same."""
    escrow = good.lock("1.00")
    splitting.bind(escrow, "stream")
    for number in range(60):
        splitting.use(escrow, 10, f"{escrow}-{number}")
    splitting.wait_agreement(escrow, released="0.60")
    times = [_ms(row["time"]) for row in good.operations(escrow)]
    gaps = [later - earlier for earlier, later in pairwise(times)]

    assert paid(good, escrow) == Decimal("0.60")
    assert min(gaps) >= INTERVAL_MS - 50


def test_an_exhausted_escrow_pays_all_it_has_and_the_rest_is_shown(
    bench: Node, good: Sandbox
) -> None:
    """Never more than the deposit; what the provider works for nothing is uncollectible."""
    escrow = good.lock("1.00")
    bench.bind(escrow, "stream")
    bench.use(escrow, 1500, f"{escrow}-1")
    agreement = bench.wait_agreement(escrow, released="1.00", uncollectible="0.50")
    until(
        lambda: Decimal(bench.get("/v1/status")["totals"]["uncollectible"]) >= Decimal("0.50"),
        lambda: bench.get("/v1/status"),
    )

    assert agreement["state"] in {"exhausted", "closed"}
    assert agreement["accrued"] == "1.50"
    assert paid(good, escrow) == Decimal("1.00")


def test_a_close_pays_the_last_quantum_and_keeps_what_is_below_it(
    bench: Node, good: Sandbox
) -> None:
    """Three units of half a quantum are one quantum; usage after the close is refused."""
    escrow = good.lock("1.00")
    bench.bind(escrow, "tiny")
    bench.use(escrow, 3, f"{escrow}-1")
    closing = bench.ask("POST", f"/v1/agreements/{escrow}/close", {"reason": "over"})
    closed = bench.wait_state(escrow, "closed")
    late = bench.send(_event(f"{escrow}-2", escrow))
    again = bench.ask("POST", f"/v1/agreements/{escrow}/close", {})

    assert closing.status == 202
    assert (closed["accrued"], closed["released"]) == ("0.0000015", "0.000001")
    assert paid(good, escrow) == QUANTUM
    assert [one["reason"] for one in late["rejected"]] == ["closed"]
    assert again.status == 200


def _ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def test_the_sums_of_all_that_happened_here_agree(bench: Node, sandbox: Sandbox) -> None:
    """After all doubts and faults what each agreement confirmed is what was booked."""
    page = bench.get("/v1/agreements?limit=1000")["items"]
    names = [row["id"] for row in page if row["state"] != "frozen"]
    confirmed = {
        name: sum(
            Decimal(one["amount"]) for one in bench.releases(name) if one["status"] == "confirmed"
        )
        for name in names
    }
    booked = {name: paid(sandbox, name) for name in names}

    assert len(names) > 20
    assert confirmed == booked
