from __future__ import annotations

import socket
from pathlib import Path

import pytest

from meterd.cli.daemon import Daemon, WrongUse, address, token_of
from meterd.errors import MeterdError, NotFound, Refused, Unavailable


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        (None, {}, "http://127.0.0.1:8787"),
        ("http://there:1/", {}, "http://there:1"),
        ("http://there:1", {"METERD_HTTP__LISTEN": "127.0.0.1:2"}, "http://there:1"),
        (None, {"METERD_HTTP__LISTEN": "127.0.0.1:2"}, "http://127.0.0.1:2"),
        (None, {"METERD_HTTP__LISTEN": "0.0.0.0:2"}, "http://127.0.0.1:2"),
        (None, {"METERD_HTTP__LISTEN": "[::]:2"}, "http://[::1]:2"),
    ],
)
def test_an_address_is_what_was_given_last_and_nearest(
    url: str | None, environ: dict[str, str], expected: str
) -> None:
    """The option wins over the environment, the environment over what is usual."""
    found = address(url, None, environ)

    assert found == expected


def test_an_address_comes_from_the_configuration_even_if_the_rest_of_it_is_wrong(
    tmp_path: Path,
) -> None:
    """Who asks for the status need not be able to read the keys."""
    file = tmp_path / "meterd.toml"
    file.write_text('[http]\nlisten = "127.0.0.1:9999"\n[escrow]\napi_key_file = "/not/for/you"\n')

    found = (address(None, file, {}), address(None, None, {"METERD_CONFIG": str(file)}))

    assert found == ("http://127.0.0.1:9999", "http://127.0.0.1:9999")


@pytest.mark.parametrize("content", [None, "http = ", "http = 1", b"\xff"])
def test_a_named_configuration_that_cannot_be_read_is_wrong_use(
    tmp_path: Path, content: str | bytes | None
) -> None:
    """A file that was named is not silently passed over."""
    file = tmp_path / "named.toml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(WrongUse, match=r"named\.toml"):
        address(None, file, {})


def test_a_token_comes_from_the_file_before_the_environment(tmp_path: Path) -> None:
    """What was typed wins; blanks and line ends around a token are none of it."""
    file = tmp_path / "token"
    file.write_text("from-file\n")

    found = (
        token_of(file, {"METERD_TOKEN": "from-environment"}),
        token_of(None, {"METERD_TOKEN": "from-environment\n"}),
        token_of(None, {"METERD_TOKEN_FILE": str(file)}),
        token_of(None, {}),
    )

    assert found == ("from-file", "from-environment", "from-file", "")


def test_a_token_is_sent_and_never_named_in_an_error(daemon, tmp_path: Path) -> None:
    """The daemon gets the token; the person who sees the error does not."""
    daemon.answer("GET", "/v1/status", {"detail": "no"}, 401)
    with Daemon(daemon.url, "a-secret-token-of-mine") as client, pytest.raises(Refused) as refused:
        client.get("v1", "status")

    assert daemon.asked[0].headers["Authorization"] == "Bearer a-secret-token-of-mine"
    assert "secret" not in str(refused.value)
    assert "--token-file" in str(refused.value)


@pytest.mark.parametrize(
    ("status", "kind", "exit_code"),
    [
        (400, Refused, 1),
        (401, Refused, 1),
        (403, Refused, 1),
        (404, NotFound, 1),
        (409, Refused, 1),
        (500, Unavailable, 1),
        (503, Unavailable, 1),
    ],
)
def test_an_answer_that_is_no_success_is_an_error_with_its_detail(
    daemon, status: int, kind: type[MeterdError], exit_code: int
) -> None:
    """The problem's own sentence is what a person sees."""
    daemon.answer("GET", "/v1/status", {"detail": "because of it"}, status)
    with Daemon(daemon.url) as client, pytest.raises(kind) as raised:
        client.get("v1", "status")

    assert raised.value.exit_code == exit_code
    assert status == 401 or "because of it" in str(raised.value)


def test_a_daemon_that_is_not_there_is_named_with_the_command_that_starts_it() -> None:
    """Nobody has to look up what to do next."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with Daemon(f"http://127.0.0.1:{port}") as client, pytest.raises(Unavailable) as raised:
        client.get("v1", "status")

    assert f"http://127.0.0.1:{port}" in str(raised.value)
    assert "meterd run" in str(raised.value)


@pytest.mark.parametrize("url", ["", "there", "ftp://there", "http://", "http://there:port"])
def test_an_address_that_is_none_is_wrong_use(url: str) -> None:
    """A mistake in an address is found before anything is sent."""
    with pytest.raises(WrongUse):
        Daemon(url)


def test_an_id_cannot_name_another_call(daemon) -> None:
    """Slashes and dots in an id are sent as an id."""
    daemon.answer("GET", "/v1/agreements/..%2F..%2Fadmin%3Fx", {"id": "odd"})
    with Daemon(daemon.url) as client:
        found = client.get("v1", "agreements", "../../admin?x")

    assert found == {"id": "odd"}
