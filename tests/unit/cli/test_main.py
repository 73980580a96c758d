from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meterd import __version__
from meterd.cli.main import main

COMMANDS = (
    "run", "demo", "sandbox", "check", "version", "config", "config example", "config schema",
    "status", "agreements", "releases", "dead-letters", "dead-letters replay",
    "dead-letters discard", "bind", "settle", "close", "freeze", "resume", "resolve", "emit",
    "replay", "journal", "verify", "backup", "producers", "producers give-up",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` works everywhere and says something."""
    code = main([*command.split(), "--help"])

    assert code == 0
    assert "Usage: meterd " + command in " ".join(capsys.readouterr().out.split())


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is the package's."""
    code = main(["version"])

    assert (code, capsys.readouterr().out) == (0, f"meterd {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["status", "--no-such-option"],
        ["freeze", "agr-1"],
        ["resume", "agr-1"],
        ["close", "agr-1"],
        ["resolve", "rel_1", "--reason", "seen"],
        ["dead-letters", "replay"],
        ["producers", "give-up", "svc-a"],
        ["dead-letters", "replay", "1", "--all"],
        ["dead-letters", "discard", "zero", "--reason", "x"],
        ["emit", "agr-1", "tokens", "1e3"],
        ["emit", "agr-1", "tokens", "0"],
        ["emit", "agr-1", "tokens", "1", "--dimension", "model"],
        ["replay", "no-such-file.ndjson"],
        ["status", "-c", "no-such-file.toml"],
        ["status", "--url", "nowhere"],
        ["status", "--token-file", "no-such-file"],
        ["sandbox", "--key", "no-agent"],
        ["sandbox", "--listen", "0.0.0.0:1"],
        ["check"],
        ["run", "-c", "no-such-file.toml"],
    ],
)
def test_wrong_use_ends_with_2_and_a_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in what was typed or configured is 2, on standard error, without a traceback."""
    code = main(arguments)
    said = capsys.readouterr()

    assert (code, said.out) == (2, "")
    assert said.err
    assert "Traceback" not in said.err


def test_check_prints_every_mistake_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run shows all there is to repair."""
    file = tmp_path / "bad.toml"
    file.write_text('[http]\nlisten = "nowhere"\n[daemon]\ndata_dri = "x"\n')
    code = main(["check", "-c", str(file)])
    said = capsys.readouterr().err

    assert code == 2
    assert all(key in said for key in ("http.listen", "daemon.data_dri", "escrow"))
    assert 'did you mean "data_dir"' in said


def test_the_example_passes_the_check_and_follows_the_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `config example` prints can be used once the key is given."""
    main(["config", "example"])
    file = tmp_path / "meterd.toml"
    file.write_text(capsys.readouterr().out)
    monkeypatch.setenv("METERD_ESCROW__API_KEY", "pf_live_test")
    code = main(["check"])
    schema_code = main(["config", "schema"])
    said = capsys.readouterr().out

    assert (code, schema_code) == (0, 0)
    assert "no mistakes" in said
    assert json.loads(said.partition("\n")[2])["title"] == "meterd.toml"


def test_python_m_meterd_is_the_console_script() -> None:
    """Both ways in lead to the same place."""
    command = [sys.executable, "-m", "meterd", "version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)

    assert answer.stdout == f"meterd {__version__}\n"


REPOSITORY = Path(__file__).parents[3]
HEAVY = {"aiohttp", "redis", "numpy", "structlog", "paho", "meterd.config", "meterd.app"}


def test_asking_for_the_status_loads_nothing_heavy() -> None:
    """A status must be quick, so it imports neither the daemon nor its libraries."""
    lines = [
        "import sys",
        "from meterd.cli.main import main",
        "main(['status', '--url', 'http://127.0.0.1:1'])",
        "print(' '.join(sys.modules))",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)

    assert HEAVY & set(answer.stdout.split()) == set()
