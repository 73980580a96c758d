"""What docs/sdk.md shows of meters, gates and middlewares runs, against a real daemon."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.stage import Node, configuration, until
from tests.documents import ROOT, Block, blocks
from tests.processes import Sandbox, free_port

PLAN = """
[plans.models]
pattern = "streaming"
rates = [{ meter = "calls", price = "0.10" }, { meter = "tokens", price = "0.0005" }]
settle = { amount = "1000" }
"""
EXAMPLES = {
    block.name.removeprefix("# "): block
    for block in blocks(ROOT / "docs" / "sdk.md")
    if block.language == "python" and "EscrowClient" not in block.text
}
# What each example uses, in the end.
USED = {
    "tell.py": {"calls": "3", "tokens": "1532"},
    "tell_awaited.py": {"tokens": "12"},
    "ask.py": {"tokens": "1312"},
    "count.py": {"calls": "1", "tokens": "5"},
    "serve_aiohttp.py": {"tokens": "1312"},
    "serve_fastapi.py": {"tokens": "1312"},
}
SERVERS = {"serve_aiohttp.py", "serve_fastapi.py"}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


@pytest.fixture
def node(sandbox: Sandbox, tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path, configuration(sandbox, plans=PLAN)) as running:
        running.wait_ready()
        running.bind(sandbox.lock("10.00"), "models", "customer-1")
        yield running


def write(node: Node, block: Block, port: int = 8000) -> Path:
    """Write an example as a person would, with the ports of this test."""
    text = block.text.replace("http://127.0.0.1:8787", node.url)
    file = node.directory / block.name.removeprefix("# ")
    file.write_text(text.replace("port=8000", f"port={port}"))
    return file


def wait_used(node: Node, name: str) -> None:
    def used() -> dict[str, str]:
        found: dict[str, str] = {}
        for row in node.get("/v1/agreements/customer-1/usage")["items"]:
            found[row["meter"]] = str(int(found.get(row["meter"], 0)) + int(row["quantity"]))
        return found

    until(lambda: used() == USED[name], lambda: f"{USED[name]}: {used()}")


def test_every_example_is_run() -> None:
    """One that is new says here what it uses."""
    assert set(EXAMPLES) == set(USED)


@pytest.mark.parametrize("name", sorted(set(USED) - SERVERS))
def test_example_prints_what_the_document_says_and_uses_what_it_shows(
    node: Node, name: str
) -> None:
    """Each is a whole program."""
    ran = subprocess.run(
        [sys.executable, write(node, EXAMPLES[name])],
        cwd=node.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == EXAMPLES[name].expected
    wait_used(node, name)


@contextmanager
def serving(node: Node, name: str) -> Iterator[str]:
    """Start an example of a service, and stop it as an operator does."""
    port = free_port()
    file = write(node, EXAMPLES[name], port)
    command = [sys.executable, str(file)]
    if name == "serve_fastapi.py":
        command = [sys.executable, "-m", "uvicorn", f"{file.stem}:app", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=node.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield f"http://127.0.0.1:{port}/answer"
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        finally:
            process.kill()


def ask(url: str, customer: str) -> int:
    request = urllib.request.Request(url, headers={"X-Customer": customer} if customer else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_example_of_a_service_serves_who_pays(node: Node, name: str) -> None:
    """And nobody else."""
    with serving(node, name) as url:
        until(lambda: ask(url, "") == 402, "the service to answer")
        assert ask(url, "customer-1") == 200
        assert ask(url, "customer-2") == 402

    wait_used(node, name)
