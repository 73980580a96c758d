"""Real brokers for tests: Redis and Mosquitto as child processes on free loopback ports.

Each server keeps its data in a directory of its own that survives `kill()` and `restart()` and is
removed when the context ends. `start()` returns only when the server answers its own protocol, so
no test needs to sleep. A server that is not installed is a failure, never a skip.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 20
PROBE_TIMEOUT_S = 2
POLL_S = 0.02


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return as soon as `true()`; raise `TimeoutError` that says what did not happen."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(POLL_S)


class Server(ABC):
    """A child process with a port and a directory that outlive its restarts."""

    program = ""

    def __init__(self, port: int = 0) -> None:
        self.host = HOST
        self.port = port or free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.program}-"))
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _command(self) -> list[str]:
        """The command line of the server; writes its configuration first where it needs one."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the server answers its own protocol now."""

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start the server on its port and its data, and wait until it answers."""
        assert not self.running
        if shutil.which(self.program) is None:
            raise FileNotFoundError(f"{self.program} is not installed; these tests need it")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            wait_until(lambda: not self.running or self._answers(), f"{self.program} to answer")
        except TimeoutError:
            self.kill()
            raise
        if not self.running:
            raise RuntimeError(f"{self.program} ended at once: {self.log.read_text()[-2000:]}")
        return self

    def stop(self) -> None:
        """Stop the server as an operator would, with SIGTERM, and wait for its end."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """Kill the server with SIGKILL and wait for its end; its data stays as it was."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)
        self._process = None

    def restart(self) -> None:
        """Stop in order and start again on the same port and data."""
        self.stop()
        self.start()

    @property
    def log(self) -> Path:
        """What the server wrote."""
        return self.directory / "log.txt"

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _exchange(self, question: bytes, *, tls: bool = False) -> bytes:
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(
                    socket.create_connection((self.host, self.port), PROBE_TIMEOUT_S)
                )
                if tls:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE
                    connection = stack.enter_context(context.wrap_socket(connection))
                connection.sendall(question)
                return connection.recv(256)
            except OSError:
                return b""


class RedisServer(Server):
    """A real redis-server whose answered writes are on the disk: appendonly, appendfsync always."""

    program = "redis-server"

    def __init__(
        self,
        port: int = 0,
        *,
        appendonly: bool = True,
        appendfsync: str = "always",
        password: str = "",
    ) -> None:
        super().__init__(port)
        self.appendonly = appendonly
        self.appendfsync = appendfsync
        self.password = password

    @property
    def url(self) -> str:
        """The address for clients, with the password where there is one."""
        return f"redis://{f':{self.password}@' if self.password else ''}{self.host}:{self.port}/0"

    def _command(self) -> list[str]:
        options = {
            "bind": self.host,
            "port": str(self.port),
            "dir": str(self.directory),
            "save": "",
            "appendonly": "yes" if self.appendonly else "no",
            "appendfsync": self.appendfsync,
            "daemonize": "no",
            "loglevel": "warning",
        }
        if self.password:
            options["requirepass"] = self.password
        return [self.program, *(part for name in options for part in (f"--{name}", options[name]))]

    def _answers(self) -> bool:
        return self._exchange(b"PING\r\n").startswith((b"+PONG", b"-NOAUTH"))


class MosquittoServer(Server):
    """A real mosquitto with persistence on: killed with -9 it loses at most its last second.

    `options` are lines of mosquitto.conf by name (`max_inflight_messages`, `max_queued_messages`,
    ...). With `users` (name -> password) nobody else is let in; with `tls` it serves TLS alone,
    under a certificate that `ca_file` signs.
    """

    program = "mosquitto"

    def __init__(
        self,
        port: int = 0,
        *,
        options: Mapping[str, int | str] | None = None,
        users: Mapping[str, str] | None = None,
        persistence: bool = True,
        tls: bool = False,
    ) -> None:
        super().__init__(port)
        self.options = {"max_queued_messages": 0, **(options or {})}  # 0: nothing is dropped.
        self.users = dict(users or {})
        self.persistence = persistence
        self.tls = tls
        self.ca_file = self.directory / "certificate.pem"
        self._key_file = self.directory / "key.pem"

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"

    def forget(self) -> None:
        """Remove every stored session and message; for a stopped server."""
        assert not self.running
        (self.directory / "mosquitto.db").unlink(missing_ok=True)

    def _command(self) -> list[str]:
        lines = [
            f"listener {self.port} {self.host}",
            f"allow_anonymous {'false' if self.users else 'true'}",
            f"persistence {'true' if self.persistence else 'false'}",
            f"persistence_location {self.directory}/",
            "log_type error",
            "log_type warning",
            *(f"{name} {value}" for name, value in self.options.items()),
        ]
        if self.persistence:
            lines.append("autosave_interval 1")
        if os.geteuid() == 0:
            lines.append("user root")  # Or it would give up the right to write to its directory.
        if self.users:
            lines.append(f"password_file {self._password_file()}")
        if self.tls:
            self._make_certificate()
            lines += [f"certfile {self.ca_file}", f"keyfile {self._key_file}"]
        configuration = self.directory / "mosquitto.conf"
        configuration.write_text("\n".join(lines) + "\n")
        return [self.program, "-c", str(configuration)]

    def _password_file(self) -> Path:
        path = self.directory / "passwords"
        path.write_text("".join(f"{user}:{word}\n" for user, word in self.users.items()))
        path.chmod(0o600)
        subprocess.run(["mosquitto_passwd", "-U", str(path)], check=True, capture_output=True)
        return path

    def _make_certificate(self) -> None:
        if self.ca_file.exists():
            return
        command = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
            f"-subj /CN=localhost -addext subjectAltName=IP:{HOST},DNS:localhost"
        )
        files = ["-keyout", str(self._key_file), "-out", str(self.ca_file)]
        subprocess.run([*command.split(), *files], check=True, capture_output=True)

    def _answers(self) -> bool:
        # CONNECT, MQTT 3.1.1, clean session, client id "probe"; any CONNACK will do.
        connect = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x0a\x00\x05probe"
        return self._exchange(connect, tls=self.tls).startswith(b"\x20")
