"""A meterd that keeps what it takes in memory, and fails on cue."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakeMeterd:
    """Takes events once by their id, and answers the gate; `script` goes before either.

    Each entry of the script is used for one request: a status with headers; "lose" takes what came
    and closes the connection without an answer; "page" is a 200 that is not meterd's.
    """

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.order: list[str] = []
        self.batches: list[int] = []
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.script: list[Any] = []
        self.duplicates = 0
        self.events_max = 20_000
        self.headroom = 10
        self.holds: dict[str, str] = {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, headers, answer = fake.answer(self.path, dict(self.headers), body)
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        document = json.loads(body)
        self.asked.append((path, headers, document))
        now = self.script.pop(0) if self.script else None
        if isinstance(now, tuple):
            return now[0], now[1], b'{"detail": "as the script says"}'
        if now == "page":
            return 200, {}, b"<html>welcome</html>"
        status, answer = self._do(path, headers, document)
        return (0 if now == "lose" else status), {}, json.dumps(answer).encode()

    def _do(self, path: str, headers: dict[str, str], document: Any) -> tuple[int, Any]:
        if path == "/v1/events":
            return self._record(document)
        if path == "/v1/authorize":
            return self._authorize(headers, document)
        hold, act = path.split("/")[3:5]
        if hold not in self.holds:
            return 404, {"type": "urn:meterd:problem:not-found"}
        self.holds[hold] = f"{act}:{document.get('quantity', 'all')}"
        return 200, {"accepted": 1, "duplicates": 0, "rejected": []}

    def _record(self, events: list[dict[str, Any]]) -> tuple[int, Any]:
        if len(events) > self.events_max:
            return 413, {"detail": "too many"}
        rejected, accepted, duplicates = [], 0, 0
        self.batches.append(len(events))
        for index, event in enumerate(events):
            if event["meter"] == "unknown":
                rejected.append({"index": index, "id": event["id"], "reason": "unknown_meter"})
            elif event["id"] in self.events:
                assert self.events[event["id"]] == event, "what is sent again is the same"
                duplicates += 1
            else:
                self.events[event["id"]] = event
                self.order.append(event["id"])
                accepted += 1
        self.duplicates += duplicates
        return 200, {"accepted": accepted, "duplicates": duplicates, "rejected": rejected}

    def _authorize(self, headers: dict[str, str], asked: Any) -> tuple[int, Any]:
        if asked["agreement"] == "nobody":
            return 404, {"type": "urn:meterd:problem:not-found"}
        allowed = float(asked["quantity"]) <= self.headroom
        answer = {"allowed": allowed, "headroom": f"{self.headroom}.00", "needed": "1.00"}
        if not allowed:
            return 402, {**answer, "reason": "the headroom is too small"}
        if "hold" in asked:
            answer["hold"] = f"hold_{headers['Idempotency-Key']}"
            self.holds.setdefault(answer["hold"], "live")
        return 200, answer

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def meterd() -> Iterator[FakeMeterd]:
    fake = FakeMeterd()
    yield fake
    fake.close()
