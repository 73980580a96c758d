"""The HTTP API of a real daemon under cases that are made of its own description.

Half of the cases keep to `/openapi.json`, half break it. Whatever comes: the answer is one that is
described, of the content type and shape that are described, and never of 5xx.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.acceptance.stage import Node, configuration
from tests.processes import Sandbox

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
CASES = 300
SOAK_CASES = int(os.environ.get("METERD_API_CASES", "10000"))
# It writes wherever it is told to; its refusals are tests of its own.
NOT_FIRED_AT = {"/v1/backup"}
# It does not end by itself.
ENDING = {"/v1/stream": {"seconds": "0"}}
SEED = int(os.environ.get("METERD_SEED", "20261124"))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A daemon with an agreement that has a release and a dead letter."""
    with Sandbox(tmp_path / "sandbox") as sandbox:
        escrow = sandbox.lock("10.00")
        with Node(tmp_path, configuration(sandbox)) as daemon:
            daemon.wait_ready()
            daemon.bind(escrow, "stream", "customer-1")
            daemon.use(escrow, 20, "e-1")
            daemon.wait_agreement("customer-1", released="0.02")
            daemon.send({"id": "e-2", "agreement": "customer-1", "meter": "?", "quantity": 1})
            yield daemon


def fire(daemon: Node, cases: int) -> Counter[int]:
    """Fire so many cases at all calls together; the answers by status."""
    schema = schemathesis.openapi.from_url(f"{daemon.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [one for one in operations if one.path not in NOT_FIRED_AT]
    fired = [(operation, mode) for operation in operations for mode in _modes(operation)]
    answers: Counter[int] = Counter()
    for place, (operation, mode) in enumerate(fired):
        # What a call without parameters does not need is left to those behind it.
        each = -(-(cases - answers.total()) // (len(fired) - place))
        _fire_at(operation, mode, max(each, 1), answers)
    return answers


def _modes(operation):
    """What takes nothing cannot be given anything wrong."""
    takes = operation.definition.raw
    breakable = takes["parameters"] or "requestBody" in takes
    return list(GenerationMode) if breakable else [GenerationMode.POSITIVE]


def _fire_at(operation, mode, cases, answers):
    @seed(SEED)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def one(case):
        case.query = {**(case.query or {}), **ENDING.get(operation.path, {})}
        response = case.call()
        answers[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    one()


def test_daemon_answers_as_described_when_cases_are_made_of_its_description(node):
    """No 5xx, no status, content type or shape that is not described; and it goes on."""
    answers = fire(node, CASES)

    print(f"{sum(answers.values())} cases: {dict(sorted(answers.items()))}")
    assert answers.total() >= CASES // 2
    assert {200, 400, 404} <= set(answers)
    assert all(status < 500 for status in answers)
    node.use("customer-1", 1, "after-all-of-it")


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_daemon_answers_as_described_ten_thousand_times(node):
    """The same for METERD_API_CASES cases: 10,000 unless it is set."""
    answers = fire(node, SOAK_CASES)

    print(f"{sum(answers.values())} cases: {dict(sorted(answers.items()))}")
    assert all(status < 500 for status in answers)
    node.use("customer-1", 1, "after-all-of-it")
