"""A stand-in for the running daemon: it answers from a table and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    target: str
    body: bytes
    headers: dict[str, str]

    @property
    def document(self) -> Any:
        return json.loads(self.body) if self.body else None


@dataclass
class FakeDaemon:
    """Answers from a list for each (method, path): (status, document, headers); the last stays."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    answers: dict[tuple[str, str], list[tuple[int, Any, dict[str, str]]]] = field(
        default_factory=dict
    )

    def answer(
        self, method: str, path: str, document: Any, status: int = 200, **headers: str
    ) -> None:
        """Answer a call so; called again, the next time."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.setdefault((method, path), []).append((status, document, named))

    def answer_to(self, asked: Asked) -> tuple[int, Any, dict[str, str]]:
        self.asked.append(asked)
        prepared = self.answers.get((asked.method, asked.target.partition("?")[0]))
        if not prepared:
            return 404, {"detail": f"there is no {asked.target}"}, {}
        return prepared.pop(0) if len(prepared) > 1 else prepared[0]


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon that METERD_URL names."""
    fake = FakeDaemon()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            asked = Asked(self.command, self.path, self.rfile.read(length), dict(self.headers))
            status, document, headers = fake.answer_to(asked)
            body = b"" if document is None else json.dumps(document).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    for method in ("GET", "POST", "PUT", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("METERD_URL", fake.url)
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Each test starts in an empty directory, without a variable of meterd's."""
    monkeypatch.chdir(tmp_path)
    for name in ("METERD_URL", "METERD_TOKEN", "METERD_TOKEN_FILE", "METERD_CONFIG"):
        monkeypatch.delenv(name, raising=False)
