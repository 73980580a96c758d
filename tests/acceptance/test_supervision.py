"""A service manager sees a real daemon serve, live, hang and stop."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from meterd.supervision import Supervision
from tests.acceptance.stage import Node, configuration, until
from tests.processes import Sandbox


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket at which a manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20)
        yield listening


def heard(manager: socket.socket) -> str:
    """The next thing that is said to it."""
    return manager.recv(1000).decode()


def hear_out(manager: socket.socket) -> None:
    """Listen until nothing more is said. Raises `TimeoutError`."""
    while heard(manager):
        pass


def test_manager_hears_that_it_serves_that_it_lives_and_that_it_stops(
    tmp_path: Path, manager: socket.socket
) -> None:
    """Ready means that the API answers; a process that stands still says nothing any more."""
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "200000"}
    with Sandbox(tmp_path / "sandbox") as sandbox:
        node = Node(tmp_path, configuration(sandbox), **environment)
        node.start()
        try:
            said = [heard(manager)]
            while "READY=1" not in said:
                said.append(heard(manager))
            assert node.ask("GET", "/readyz").status == 200
            assert [heard(manager) for _ in range(3)] == ["WATCHDOG=1"] * 3

            os.kill(node.pid, signal.SIGSTOP)
            manager.settimeout(1)
            with pytest.raises(TimeoutError):
                hear_out(manager)
            os.kill(node.pid, signal.SIGCONT)
            manager.settimeout(20)
            assert heard(manager) == "WATCHDOG=1"
        finally:
            node.stop()
        until(lambda: heard(manager) == "STOPPING=1", "it to say that it stops")


def test_without_a_manager_nothing_is_told_and_nothing_fails(tmp_path: Path) -> None:
    """Nor with one that has gone away, or with another process's watchdog."""
    Supervision({}).tell("READY=1")
    Supervision({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell("READY=1")
    Supervision({"NOTIFY_SOCKET": "@meterd-nobody"}).tell("READY=1")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "x"},
        {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"},
    ],
)
async def test_who_need_not_say_that_it_lives_does_not(environment: dict[str, str]) -> None:
    """It ends at once."""
    await Supervision(environment).keep_alive()
