"""The recipe for nginx, with a real nginx before a real daemon."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.acceptance.stage import Node, configuration, until
from tests.documents import ROOT
from tests.processes import Sandbox
from tests.servers import Server, free_port

RECIPE = ROOT / "deploy" / "nginx" / "meterd-gate.conf"
TOKEN = "a-token-of-the-scope-gate-0123456789"
TOKENS = f'tokens = [{{ name = "nginx", token = "{TOKEN}", scopes = ["gate"] }},'
TOKENS += ' { name = "test", token = "a-token-for-the-rest-0123456789", '
TOKENS += 'scopes = ["ingest", "read", "admin"] }]'
REST = {"Authorization": "Bearer a-token-for-the-rest-0123456789"}
PLAN = """
[plans.dear]
pattern = "streaming"
rates = [{ meter = "calls", price = "0.40" }]
settle = { amount = "1000" }
"""
FRAME = """
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
{recipe}
}}
"""


class Nginx(Server):
    """nginx on loopback, with a prefix and a configuration of its own."""

    program = "nginx"

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.recipe = recipe

    def _command(self) -> list[str]:
        recipe = self.recipe.replace("listen 80;", f"listen 127.0.0.1:{self.port};")
        file = self.directory / "nginx.conf"
        file.write_text(FRAME.format(directory=self.directory, recipe=recipe))
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        assert program, "nginx is missing; tests/install-servers installs it"
        return [program, "-e", "stderr", "-p", str(self.directory), "-c", str(file)]

    def _answers(self) -> bool:
        try:
            return ask(self.port, "").status > 0
        except OSError:
            return False


class Shown:
    """One answer through nginx."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()


def ask(port: int, key: str, path: str = "/answer", **headers: str) -> Shown:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    own = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request("POST", path, b"question", {"X-Api-Key": key, **own})
        return Shown(connection.getresponse())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[int, list[Any]]]:
    """The paid service: notes for whom it was asked; `/no` is its own 403."""
    served: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            served.append((self.headers["X-Meterd-Agreement"], body))
            self.send_response({"/no": 403, "/bug": 500}.get(self.path, 200))
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"done")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_address[1], served
    server.shutdown()
    server.server_close()
    thread.join()


def recipe_for(node: Node, service_port: int) -> str:
    text = RECIPE.read_text()
    for old, new in (
        ("127.0.0.1:8787", f"127.0.0.1:{node.port}"),
        ("127.0.0.1:8000", f"127.0.0.1:{service_port}"),
        (
            '# proxy_set_header Authorization "Bearer TOKEN"',
            f'proxy_set_header Authorization "Bearer {TOKEN}"',
        ),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    here = tmp_path_factory.mktemp("nginx")
    with (
        Sandbox(here / "sandbox") as sandbox,
        Node(here, configuration(sandbox, plans=PLAN, http=TOKENS)) as running,
    ):
        running.wait_ready()
        body = {"plan": "dear", "escrows": {"main": sandbox.lock("1.00")}}
        assert running.ask("PUT", "/v1/agreements/customer-1", body, **REST).status == 201
        yield running


def use(node: Node, number: int) -> None:
    event = {"id": f"e-{number}", "agreement": "customer-1", "meter": "calls", "quantity": 1}
    answer = node.ask("POST", "/v1/events", [event], **REST)
    assert answer.json["accepted"] == 1


def test_nginx_serves_what_is_paid_for_and_says_402_for_the_rest(
    node: Node, service: tuple[int, list[Any]]
) -> None:
    """From the first request to the last cent; nobody pays for another, whatever he sends."""
    port, served = service
    with Nginx(recipe_for(node, port)) as nginx:
        until(lambda: ask(nginx.port, "key-of-customer-1").status == 200, "the gate to open")
        served.clear()
        first = ask(nginx.port, "key-of-customer-1", X_Meterd_Agreement="somebody-else")
        assert (first.status, first.body) == (200, b"done")
        assert served == [("customer-1", b"question")]

        for key, forged in (("", "customer-1"), ("wrong", "customer-1"), ("", "")):
            refused = ask(nginx.port, key, X_Meterd_Agreement=forged, X_Meterd_Quantity="0")
            assert refused.status == 402
            assert refused.headers["X-Meterd-Reason"] == "the request names no agreement"
            assert json.loads(refused.body)["type"] == "urn:meterd:problem:payment-required"
        assert ask(nginx.port, "key-of-customer-1", "/_meterd").status == 404

        # What the service itself answers is handed on as it is.
        assert ask(nginx.port, "key-of-customer-1", "/no").body == b"done"
        assert ask(nginx.port, "key-of-customer-1", "/bug").status == 500

        use(node, 1)
        assert ask(nginx.port, "key-of-customer-1").status == 200
        use(node, 2)
        unpaid = ask(nginx.port, "key-of-customer-1")
        assert unpaid.status == 402
        assert "headroom" in unpaid.headers["X-Meterd-Reason"]


@pytest.mark.parametrize("opened", [False, True])
def test_nginx_follows_its_owner_where_meterd_cannot_be_asked(
    node: Node, service: tuple[int, list[Any]], opened: bool
) -> None:
    """Closed, with a 503 that says when to come again; or open, where he says so."""
    text = recipe_for(node, service[0]).replace(
        f"127.0.0.1:{node.port}", f"127.0.0.1:{free_port()}"
    )
    if opened:
        for line in ("proxy_intercept_errors on;", "error_page 500 502 503 504 = @meterd_away;"):
            assert text.count(f"# {line}") == 1
            text = text.replace(f"# {line}", line)
    with Nginx(text) as nginx:
        answer = ask(nginx.port, "key-of-customer-1")

    if opened:
        assert (answer.status, answer.body) == (200, b"done")
    else:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert json.loads(answer.body)["type"] == "urn:meterd:problem:unavailable"
