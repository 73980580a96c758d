"""Where meterd is served: with TLS, on a Unix socket, or to this machine alone; all with processes.

Certificates are openssl's, and beside meterd's own command line curl is the client.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import signal
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance.stage import Node, configuration, meterd, until
from tests.certificates import Pair, authority, signed
from tests.processes import Sandbox

TOKEN = "a-token-of-this-test-0123"
TOKENS = f"""
[[http.tokens]]
name = "all"
token = "{TOKEN}"
scopes = ["ingest", "read", "admin"]
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """An escrow service."""
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


class Elsewhere(Node):
    """A daemon that is asked by the command line alone, wherever it listens."""

    def wait_ready(self, seconds: float = 30) -> None:
        """Wait until it says that it listens."""
        until(lambda: self.logged("listening") or not self.running, self.log_tail, seconds)
        assert self.running, self.log_tail()


@dataclass
class Shown:
    """A daemon with a certificate of its own authority."""

    node: Elsewhere
    ca: Pair
    server: Pair
    port: int


@pytest.fixture
def shown(tmp_path: Path, sandbox: Sandbox) -> Iterator[Shown]:
    """A daemon on every address of this machine, with TLS and a token, without a proxy."""
    ca = authority(tmp_path)
    server = signed(tmp_path, ca, "server", "DNS:meterd.example.org", "IP:127.0.0.1")
    http_keys = f'tls_cert_file = "{server.cert}"\ntls_key_file = "{server.key}"'
    text = configuration(sandbox, http=http_keys, rest=TOKENS)
    node = Elsewhere(tmp_path, text)
    node.config.write_text(node.config.read_text().replace("127.0.0.1:", "0.0.0.0:", 1))
    with node:
        node.wait_ready()
        yield Shown(node, ca, server, node.port)


def curl(*words: str) -> subprocess.CompletedProcess[str]:
    """Call by curl, with its complaints."""
    return subprocess.run(
        ["curl", "-sS", "-m", "20", *words], capture_output=True, text=True, check=False
    )


def test_callers_elsewhere_come_in_by_tls_with_a_token(shown: Shown) -> None:
    """No proxy is needed: events are taken over https, and http at the same port is not spoken."""
    url = f"https://127.0.0.1:{shown.port}"
    trusted = ("--cacert", str(shown.ca.cert))
    good = curl(*trusted, f"{url}/v1/status", "-H", f"Authorization: Bearer {TOKEN}")
    bare = curl(*trusted, f"{url}/v1/status", "-o", "/dev/null", "-w", "%{http_code}")
    stranger = curl(f"{url}/v1/status")
    plain = curl(f"http://127.0.0.1:{shown.port}/healthz")

    assert '"version"' in good.stdout, good
    assert bare.stdout == "401"
    assert stranger.returncode == 60  # Not a certificate of the system's authorities.
    assert plain.returncode != 0


def test_the_command_line_knows_the_daemon_by_its_certificate(shown: Shown) -> None:
    """On the daemon's machine the configuration is enough; at a typed address, an authority."""
    own = shown.node.type("status", env={"METERD_TOKEN": TOKEN})
    url = f"https://127.0.0.1:{shown.port}"
    typed = meterd("status", "--url", url, METERD_TOKEN=TOKEN)
    trusted = meterd("status", "--url", url, METERD_TOKEN=TOKEN, SSL_CERT_FILE=str(shown.ca.cert))

    assert own.returncode == 0, own.stderr
    assert trusted.returncode == 0, trusted.stderr
    assert typed.returncode == 1
    assert "not trusted" in typed.stderr
    assert "SSL_CERT_FILE" in typed.stderr


def test_a_certificate_of_the_same_authority_is_not_the_daemons(
    tmp_path: Path, shown: Shown
) -> None:
    """The command line takes this very certificate: another server's gets no token."""
    other = signed(tmp_path, shown.ca, "other", "IP:127.0.0.1")
    config = tmp_path / "other.toml"
    text = shown.node.config.read_text()
    config.write_text(text.replace(str(shown.server.cert), str(other.cert)))
    answer = meterd("status", METERD_CONFIG=str(config), METERD_TOKEN=TOKEN)

    assert answer.returncode == 1
    assert "not trusted" in answer.stderr


@pytest.mark.parametrize(
    ("version", "answers"),
    [
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
def test_old_versions_of_tls_are_not_spoken(
    shown: Shown, version: ssl.TLSVersion, answers: bool
) -> None:
    """TLS 1.2 and 1.3, and nothing before."""
    context = ssl.create_default_context(cafile=str(shown.ca.cert))
    context.set_ciphers("ALL:@SECLEVEL=0")
    # Whoever asks for an old version is warned of it, and asks on purpose here.
    with (
        pytest.warns(DeprecationWarning, match="TLSv1") if not answers else contextlib.nullcontext()
    ):
        context.minimum_version = context.maximum_version = version
    connection = http.client.HTTPSConnection("127.0.0.1", shown.port, timeout=20, context=context)
    try:
        connection.request("GET", "/healthz")
        spoken = connection.getresponse().status == 200
    except ssl.SSLError:
        spoken = False
    finally:
        connection.close()

    assert spoken is answers


def _serial(port: int) -> str:
    pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=20)
    return str(ssl.PEM_cert_to_DER_cert(pem).hex())


def test_a_new_certificate_is_shown_after_sighup_and_open_connections_stay(
    tmp_path: Path, shown: Shown
) -> None:
    """No restart, and nobody is cut off; a pair that does not fit leaves the one before."""
    before = _serial(shown.port)
    context = ssl.create_default_context(cafile=str(shown.ca.cert))
    connection = http.client.HTTPSConnection("127.0.0.1", shown.port, timeout=20, context=context)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    fresh = signed(tmp_path, shown.ca, "fresh", "IP:127.0.0.1")
    shown.server.cert.write_bytes(fresh.cert.read_bytes())  # Half of it: the key is another.
    shown.node.signal(signal.SIGHUP)
    refused = shown.node.wait_logged("reload_refused")
    after_half = _serial(shown.port)
    shown.server.key.write_bytes(fresh.key.read_bytes())
    shown.node.signal(signal.SIGHUP)
    shown.node.wait_logged("reloaded")
    after = _serial(shown.port)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    answer.read()
    connection.close()

    assert "http.tls_key_file" in refused[0]["event"]
    assert after_half == before
    assert after != before
    assert answer.status == 200
    assert shown.node.logged("reload_needs_restart") == []


@pytest.mark.parametrize(
    ("cert", "key", "sentence"),
    [
        ("server.pem", "other-key.pem", "http.tls_key_file: .* is not the key of"),
        ("missing.pem", "server-key.pem", "http.tls_cert_file: cannot read"),
        ("server.pem", "missing.pem", "http.tls_key_file: cannot read"),
        ("server-key.pem", "server-key.pem", "http.tls_cert_file: .* cannot be used"),
        ("server.pem", "locked-key.pem", "a key without a password"),
    ],
)
def test_a_certificate_that_cannot_be_shown_is_told_before_anything_runs(
    tmp_path: Path, sandbox: Sandbox, cert: str, key: str, sentence: str
) -> None:
    """`meterd check` and `meterd run` name the key; nobody is asked for a password."""
    ca = authority(tmp_path)
    pair = signed(tmp_path, ca, "server", "IP:127.0.0.1")
    signed(tmp_path, ca, "other", "IP:127.0.0.1")
    locked = tmp_path / "locked-key.pem"
    lock = ["openssl", "ec", "-in", str(pair.key), "-aes256", "-passout", "pass:secret"]
    subprocess.run([*lock, "-out", str(locked)], check=True, capture_output=True)
    http_keys = f'tls_cert_file = "{tmp_path / cert}"\ntls_key_file = "{tmp_path / key}"'
    node = Elsewhere(tmp_path, configuration(sandbox, http=http_keys))
    for command in ("check", "run"):
        answer = node.type(command)

        assert answer.returncode == 2, answer
        assert_says(answer.stderr, sentence)


def assert_says(text: str, sentence: str) -> None:
    """Look for a sentence, however the terminal's width has broken it."""
    assert re.search(sentence, " ".join(text.split())), text


# -- Unix sockets ------------------------------------------------------------------------------


@pytest.fixture
def socket_node(tmp_path: Path, sandbox: Sandbox) -> Iterator[Elsewhere]:
    """A daemon on a Unix socket, without tokens."""
    node = Elsewhere(tmp_path, configuration(sandbox).replace("@listen@", f"unix:{tmp_path}/http"))
    with node:
        node.wait_ready()
        yield node


def test_a_unix_socket_is_for_its_user_and_group_alone(socket_node: Elsewhere) -> None:
    """It counts as this machine: no token, mode 0660, and curl and the command line come in."""
    path = socket_node.directory / "http"
    mode = stat.S_IMODE(path.stat().st_mode)
    answer = curl("--unix-socket", str(path), "http://localhost/v1/status")
    status = socket_node.type("status")
    other = meterd("status", "--url", f"unix:{path}")

    assert stat.S_ISSOCK(path.stat().st_mode)
    assert mode == 0o660
    assert '"version"' in answer.stdout
    assert status.returncode == 0, status.stderr
    assert other.returncode == 0, other.stderr


def test_a_socket_is_gone_after_a_stop_and_found_again_after_a_kill(
    socket_node: Elsewhere,
) -> None:
    """What a killed daemon left is taken away; a stopped one leaves nothing."""
    path = socket_node.directory / "http"
    socket_node.kill()
    left = path.exists()
    unreachable = socket_node.type("status")
    socket_node.start()
    until(lambda: len(socket_node.logged("listening")) == 2, socket_node.log_tail)
    again = socket_node.type("status")
    socket_node.stop()
    gone = socket_node.type("status")

    assert left
    assert again.returncode == 0, again.stderr
    assert not path.exists()
    assert (unreachable.returncode, gone.returncode) == (1, 1)
    assert "meterd run" in unreachable.stderr
    assert "meterd run" in gone.stderr


def test_a_socket_that_another_program_serves_is_left_alone(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """Neither a served socket nor a file of another kind is taken away."""
    served, file = tmp_path / "served", tmp_path / "file"
    file.write_text("mine")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(served))
        other.listen()
        for path, sentence in ((served, "another program serves"), (file, "of another kind")):
            text = configuration(sandbox).replace("@listen@", f"unix:{path}")
            answer = Elsewhere(tmp_path, text).type("run")

            assert answer.returncode == 2
            assert_says(answer.stderr, f"http.listen: cannot listen on .*{sentence}")
            assert path.exists()
    assert file.read_text() == "mine"


def test_a_port_that_others_reach_is_refused_without_tls_and_tokens(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """Loopback is the default; the way out names both keys."""
    node = Elsewhere(tmp_path, configuration(sandbox).replace("@listen@", "0.0.0.0:0"))
    answer = node.type("run")

    assert answer.returncode == 2
    assert_says(answer.stderr, "http.listen: .* no token is configured")
    assert_says(answer.stderr, "http.behind_proxy: .* write tls_cert_file and tls_key_file")
