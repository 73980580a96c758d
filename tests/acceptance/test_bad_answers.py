"""What an escrow service may answer: each bad answer delays money at most, and is told in words.

One daemon, the real sandbox with its faults, an escrow for each row, all of them under way at once.
What `test_life` has of doubts and readings is not repeated here; these are the other statuses,
headers and places in which an answer can be bad, and a key that comes back in an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest

from tests.acceptance.stage import Node, clear_faults, configuration, paid, until
from tests.processes import Sandbox, call

# The key of the provider, and what a redirect would hand it to.
ELSEWHERE = "http://127.0.0.1:9/api/v1/stolen"
CENTURY_S = "3155760000"
ALONE, AGAIN = ["confirmed"], ["confirmed", "void"]

# Of a release: the fault, and what became of the release and of those that replaced it.
RELEASES: dict[str, tuple[dict[str, object], list[str]]] = {
    "a page of HTML with 200": ({"kind": "html_page", "status": 200}, ALONE),
    "a page of HTML with 404": ({"kind": "html_page", "status": 404}, ALONE),
    "a page of HTML with 403": ({"kind": "html_page", "status": 403}, ALONE),
    "paid but 503": ({"kind": "error_500_after", "status": 503}, ALONE),
    "an answer of 301": ({"kind": "redirect", "status": 301, "location": ELSEWHERE}, AGAIN),
    "an answer of 302": ({"kind": "redirect", "status": 302, "location": ELSEWHERE}, AGAIN),
    "an answer of 303": ({"kind": "redirect", "status": 303, "location": ELSEWHERE}, AGAIN),
    "an answer of 308": ({"kind": "redirect", "status": 308, "location": ELSEWHERE}, AGAIN),
    "a way elsewhere without a place": ({"kind": "redirect", "status": 307}, AGAIN),
    "noise below the amount": ({"kind": "float_noise", "direction": "down"}, ALONE),
    "unknown fields": ({"kind": "extra_fields"}, ALONE),
    "more released than there is": ({"kind": "released_above_total"}, ALONE),
    "the key in an error": ({"kind": "echo_key_in_error", "status": 500}, AGAIN),
    "taken note of, and paid later": ({"kind": "land_late", "seconds": 0.4, "status": 200}, ALONE),
    "too often, without a wait": ({"kind": "rate_limit"}, ["confirmed", "declined"]),
    "too often, with a wait that is no number": (
        {"kind": "rate_limit", "retry_after": "soon"},
        ["confirmed", "declined"],
    ),
    "too often, with a negative wait": (
        {"kind": "rate_limit", "retry_after": "-5"},
        ["confirmed", "declined"],
    ),
}
# Of a reading: it is made again, and then everything is paid.
READINGS: dict[str, dict[str, object]] = {
    "a page of HTML with 200": {"kind": "html_page", "status": 200},
    "a page of HTML with 404": {"kind": "html_page", "status": 404},
    "an answer of 301": {"kind": "redirect", "status": 301, "location": ELSEWHERE},
    "an answer of 307": {"kind": "redirect", "status": 307, "location": ELSEWHERE},
    "an answer of 308": {"kind": "redirect", "status": 308, "location": ELSEWHERE},
    "half a connection": {"kind": "close_during_answer"},
    "noise below the amount": {"kind": "float_noise", "direction": "down"},
    "too often, without a wait": {"kind": "rate_limit"},
    "too often, with a wait that is no number": {"kind": "rate_limit", "retry_after": "soon"},
    "the key in an error of 400": {"kind": "echo_key_in_error", "status": 400},
    "the key in an error of 500": {"kind": "echo_key_in_error", "status": 500},
    "a released that goes down": {"kind": "backwards_read"},
}


@dataclass
class Bench:
    """A daemon, the service, and the escrows by row."""

    node: Node
    sandbox: Sandbox
    releases: dict[str, str] = field(default_factory=dict)
    readings: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Every fault stands before the first event comes."""
    directory = tmp_path_factory.mktemp("answers")
    with (
        Sandbox(directory / "sandbox") as sandbox,
        Node(directory, configuration(sandbox, daemon='drain_timeout = "2s"')) as node,
    ):
        node.wait_ready()
        bench = Bench(node, sandbox)
        for name in RELEASES:
            bench.releases[name] = node.bind(sandbox.lock("1.00"), "stream")
        for name in READINGS:
            bench.readings[name] = node.bind(sandbox.lock("1.00"), "stream")
        for name, (fault, _) in RELEASES.items():
            sandbox.fault(call="release_partial", escrow_id=bench.releases[name], **fault)
        for name, escrow in bench.releases.items():
            node.use(escrow, "20.0005", f"release-{name}")
        for name, escrow in bench.readings.items():
            node.use(escrow, 20, f"reading-{name}-1")
        for name, escrow in bench.readings.items():
            node.wait_agreement(escrow, released="0.02", release=None)
            sandbox.fault(call="get", escrow_id=escrow, count=1, **READINGS[name])
            node.use(escrow, 10, f"reading-{name}-2")
        yield bench
        node.stop()
        assert node.returncode == 0


@pytest.mark.parametrize("name", RELEASES)
def test_a_bad_answer_to_a_release_costs_time_and_no_money(bench: Bench, name: str) -> None:
    """It is paid once, to the quantum, and what happened is kept beside the release."""
    node, escrow = bench.node, bench.releases[name]
    node.wait_agreement(escrow, released="0.02", in_doubt="0.00", release=None, state="active")
    releases = node.releases(escrow)

    assert [one["status"] for one in releases] == RELEASES[name][1]
    assert [row["amount"] for row in bench.sandbox.operations(escrow)] == ["0.02"]


@pytest.mark.parametrize("name", READINGS)
def test_a_bad_answer_to_a_reading_costs_time_and_no_money(bench: Bench, name: str) -> None:
    """Once is no deviation: the next reading is right."""
    node, escrow = bench.node, bench.readings[name]
    node.wait_agreement(escrow, released="0.03", release=None, state="active")

    assert paid(bench.sandbox, escrow) == Decimal("0.03")


@pytest.mark.parametrize("operation", ["get", "release_partial"])
def test_a_wait_of_a_century_is_not_believed(bench: Bench, operation: str) -> None:
    """Other escrows are served meanwhile, and this one is not given up."""
    node, sandbox = bench.node, bench.sandbox
    slow, other = (node.bind(sandbox.lock("1.00"), "stream") for _ in range(2))
    sandbox.fault(kind="rate_limit", call=operation, escrow_id=slow, retry_after=CENTURY_S)
    node.use(slow, 20, f"century-{operation}")
    until(lambda: _struck(sandbox, slow), node.log_tail)
    node.use(other, 20, f"beside-{operation}")
    node.wait_agreement(other, released="0.02")
    waiting = node.agreement(slow)

    assert paid(sandbox, other) == Decimal("0.02")
    assert waiting["state"] in {"active", "paused"}  # Paused: not read, and read again later.
    assert waiting["in_doubt"] == "0.00"
    assert node.ask("GET", "/readyz").status == 200


def _struck(sandbox: Sandbox, escrow: str) -> list[Any]:
    """The faults of an escrow that have taken place."""
    rules = call("GET", f"{sandbox.base}/_faults")["faults"]
    return [rule for rule in rules if rule["escrow_id"] == escrow and rule["struck"]]


def test_a_release_that_was_paid_and_called_refused_freezes_and_is_not_paid_again(
    bench: Bench,
) -> None:
    """A service that contradicts itself: a person looks, and nothing more leaves."""
    node, sandbox = bench.node, bench.sandbox
    escrow = node.bind(sandbox.lock("1.00"), "stream")
    sandbox.fault(kind="error_500_after", status=400, call="release_partial", escrow_id=escrow)
    node.use(escrow, 20, f"{escrow}-1")
    frozen = node.wait_state(escrow, "frozen")

    assert frozen["reason"].startswith("the service declined a release")
    assert paid(sandbox, escrow) == Decimal("0.02")


def test_a_released_that_stays_lower_than_it_was_freezes(bench: Bench) -> None:
    """Money that comes back is nothing that meterd may explain away: a person looks."""
    node, sandbox = bench.node, bench.sandbox
    escrow = node.bind(sandbox.lock("1.00"), "stream")
    node.use(escrow, 20, f"{escrow}-1")
    node.wait_agreement(escrow, released="0.02", release=None)
    sandbox.fault(kind="stale_reads", call="get", escrow_id=escrow, seconds=3600)
    node.use(escrow, 20, f"{escrow}-2")
    frozen = node.wait_state(escrow, "frozen")
    clear_faults(sandbox)

    assert frozen["reason"]
    assert frozen["reason"].isprintable()
    assert paid(sandbox, escrow) == Decimal("0.02")


def test_no_key_stands_anywhere_when_the_service_has_told_it(bench: Bench) -> None:
    """Not in the log, not in an answer, not in the ledger; nor did a redirect take it elsewhere."""
    node, key = bench.node, bench.sandbox.provider_key
    shown = [
        node.ask("GET", path).raw.decode()
        for path in (
            "/v1/status",
            "/v1/agreements?limit=1000",
            "/metrics",
            "/v1/journal?limit=1000",
        )
    ]
    shown += [str(node.releases(escrow)) for escrow in bench.releases.values()]
    kept = [path.read_bytes() for path in node.data_dir.iterdir() if path.is_file()]

    assert [text for text in shown if key in text] == []
    assert key not in node._log.read_text()
    assert [content for content in kept if key.encode() in content] == []
