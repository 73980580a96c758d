"""The live stream of a real daemon: releases as they happen, a kill in between, and the stop."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.acceptance.stage import SECONDS, Node, configuration, until
from tests.processes import Sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    with Sandbox(tmp_path / "sandbox") as server:
        yield server


class Ear(threading.Thread):
    """Listens until the stream ends, and keeps what it heard."""

    def __init__(self, node: Node, last: str = "") -> None:
        super().__init__(daemon=True)
        self.heard: list[tuple[str, str, dict]] = []  # (id, event, data)
        self._address = urlsplit(node.url)
        self._last = last
        self.start()
        until(lambda: self.heard, "the first event")

    def run(self) -> None:
        address = self._address
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=SECONDS)
        headers = {"Last-Event-ID": self._last} if self._last else {}
        connection.request("GET", "/v1/stream", headers=headers)
        fields: dict[str, str] = {}
        try:
            for line in connection.getresponse():
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                    continue
                if "event" in fields:
                    found = fields.get("id", ""), fields["event"], json.loads(fields["data"])
                    self.heard.append(found)
                fields = {}
        except (OSError, http.client.HTTPException):
            return  # The daemon was killed.
        finally:
            connection.close()

    def all(self, kind: str) -> list[dict]:
        """What was told of one kind."""
        return [data for _, event, data in self.heard if event == kind]


def test_listener_hears_of_usage_releases_and_the_end(sandbox, tmp_path):
    """In their order; a stop in order says goodbye and is not held up by who listens."""
    escrow = sandbox.lock("10.00")
    with Node(tmp_path, configuration(sandbox)) as node:
        node.wait_ready()
        node.bind(escrow, "stream", "customer-1")
        ear = Ear(node)
        node.use(escrow, 20, "e-1")
        until(lambda: len(ear.all("release")) >= 2, lambda: ear.heard)
        paid = "0.02"
        until(lambda: paid in {each["released"] for each in ear.all("accrual")}, lambda: ear.heard)
        node.ask("POST", "/v1/agreements/customer-1/close", {"reason": "the end"})
        until(lambda: "closed" in {each["state"] for each in ear.all("state")}, lambda: ear.heard)
        node.stop()
        ear.join(SECONDS)

    assert ["intended", "confirmed"] == [each["status"] for each in ear.all("release")]
    assert {"customer-1"} == {each["agreement"] for each in ear.all("accrual")}
    assert ("start", "bye") == (ear.heard[0][1], ear.heard[-1][1])
    assert 0 == node.returncode


def test_listener_of_a_daemon_that_was_killed_is_told_to_read_afresh(sandbox, tmp_path):
    """What it heard before has another process's number."""
    escrow = sandbox.lock("10.00")
    with Node(tmp_path, configuration(sandbox)) as node:
        node.wait_ready()
        node.bind(escrow, "stream", "customer-1")
        ear = Ear(node)
        node.kill()
        ear.join(SECONDS)
        node.start()
        node.wait_ready()
        again = Ear(node, ear.heard[-1][0])

    assert "reset" == again.heard[0][1]
