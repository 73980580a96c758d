"""Commands that need no running daemon: run one, the sandbox, the demo, the configuration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meterd import __version__
from meterd.cli.daemon import WrongUse
from meterd.cli.options import Config, Yes
from meterd.cli.screen import plain
from meterd.core.money import BadNumber, parse_amount
from meterd.core.plans import Pattern
from meterd.errors import MeterdError, Mistake

if TYPE_CHECKING:
    from meterd.config import Settings

DEMO_SECONDS = 60
LIFE_SECONDS = 15  # One pattern's.
ForPattern = Annotated[
    Pattern | None,
    typer.Option("--pattern", metavar="NAME", help=f"One of {', '.join(Pattern)}."),
]


class Deadline(StrEnum):
    """Who gets the remainder of a sandbox escrow at its deadline."""

    RELEASE = "release"
    REFUND = "refund"


def run(config: Config = None) -> None:
    """Run the daemon until SIGTERM or Ctrl-C; a second one ends it at once."""
    from meterd import app

    raise typer.Exit(app.run(config))


def demo(
    pattern: ForPattern = None,
    crash: Annotated[
        bool, typer.Option("--crash", help="Kill the daemon again and again meanwhile.")
    ] = False,
    seconds: Annotated[
        int | None,
        typer.Option(
            "--seconds",
            metavar="N",
            min=1,
            max=86_400,
            help=f"How long it runs: {DEMO_SECONDS}, or {LIFE_SECONDS} with --pattern.",
        ),
    ] = None,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the dashboard in a browser.")
    ] = True,
) -> None:
    """Run everything on this machine, with nothing installed beside, and check the sums.

    With --pattern: the whole life of an agreement under that pattern's example configuration.
    """
    from meterd import config as configuration
    from meterd import demo as show

    if pattern is None:
        length = DEMO_SECONDS if seconds is None else seconds
        raise typer.Exit(show.run(crash=crash, seconds=length, no_browser=not browser))
    if crash:
        raise WrongUse("--pattern plays one life to its end; leave out --crash")
    text = configuration.example(pattern.value)
    length = LIFE_SECONDS if seconds is None else seconds
    raise typer.Exit(show.run_pattern(pattern.value, text, seconds=length))


def sandbox(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Loopback alone.")
    ] = "127.0.0.1:8788",
    data_file: Annotated[
        Path, typer.Option(metavar="FILE", help="What it keeps; made if it is not there.")
    ] = Path("meterd-sandbox.db"),
    key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=AGENT", help="An API key and whose it is; again for another."),
    ] = None,
    deadline: Annotated[
        Deadline, typer.Option(help="Who is paid at a deadline.")
    ] = Deadline.RELEASE,
    fee_bps: Annotated[int, typer.Option(help="The payee's fee in hundredths of a percent.")] = 100,
    rate_limit: Annotated[
        int | None, typer.Option(metavar="N", help="Releases a minute for each escrow.")
    ] = None,
    honour_idempotency: Annotated[
        bool, typer.Option("--honour-idempotency", help="A repeated Idempotency-Key moves nothing.")
    ] = False,
    wallet_minimum: Annotated[
        str, typer.Option(metavar="AMOUNT", help="The smallest debit from a wallet, in USDC.")
    ] = "0.01",
) -> None:
    """Serve the escrow service for development, with its faults on request, until Ctrl-C."""
    import asyncio

    from meterd.sandbox import server
    from meterd.sandbox.settings import DEVELOPMENT_KEYS, SandboxSettings

    keys = dict(_key_of(text) for text in key) if key else dict(DEVELOPMENT_KEYS)
    settings = SandboxSettings(
        data_file=data_file,
        listen=listen,
        keys=keys,
        deadline=deadline.value,
        fee_bps=fee_bps,
        rate_limit_per_minute=rate_limit,
        honour_idempotency=honour_idempotency,
        wallet_minimum=_amount_of(wallet_minimum),
    )

    def ready(origin: str) -> None:
        lines = [f"base_url  {origin}{server.API}", f"controls  {origin}/_faults and others"]
        # Keys that somebody chose are theirs to know; those for development everybody knows.
        lines += [f"api_key   {name} ({agent})" for name, agent in keys.items() if not key]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()

    try:
        asyncio.run(server.serve(settings, ready))
    except OSError as error:
        raise MeterdError(
            f"{listen}: {error.strerror}; name another: --listen 127.0.0.1:0"
        ) from None


def _amount_of(text: str) -> int:
    try:
        return parse_amount(text)
    except BadNumber as error:
        raise WrongUse(f"--wallet-minimum: {error}; write --wallet-minimum 0.01") from None


def _key_of(text: str) -> tuple[str, str]:
    name, equals, agent = text.rpartition("=")
    if not (name and equals and agent):
        raise WrongUse("write --key KEY=AGENT, such as --key pf_live_mine=agent_mine")
    return name, agent


def check(
    config: Config = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Ask the escrow service and the brokers too; moves no money."),
    ] = False,
) -> None:
    """List every mistake in the configuration, with its key; exit 2 when there is one."""
    from meterd import config as configuration

    notes: list[Mistake] = []
    file = configuration.find(config, os.environ)
    settings = configuration.load(file, os.environ, warn=notes.append)
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    _check_certificate(settings)
    sys.stdout.write(f"{file}: no mistakes\n")
    if live:
        from meterd.cli import live as questions

        raise typer.Exit(questions.ask(settings))


def _check_certificate(settings: Settings) -> None:
    """Read the certificate as the daemon will. Raises `ConfigurationError`."""
    if settings.http.speaks_tls:
        from meterd.app import certificate_files_of
        from meterd.listening import Certificate

        files = certificate_files_of(settings)
        if files is not None:
            Certificate(files)


RESTORED = """\
{database} is the copy now.
{kept}
What was released since the copy was made is noticed and never paid again. Next:
  meterd verify --live     shows what that is; exit 3 is expected when there is something
  meterd run               the escrows concerned freeze; send usage since then once more, then
  meterd resume AGREEMENT --reason TEXT
"""


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A copy by meterd backup.")],
    yes: Yes = False,
    config: Config = None,
) -> None:
    """Put a copy in the place of the store, while no daemon runs; what was there is kept."""
    from meterd import app
    from meterd import config as configuration

    settings = configuration.load(config, os.environ)
    if not yes and sys.stdin.isatty() and sys.stdout.isatty():
        question = f"Put {file} in the place of the store in {settings.daemon.data_dir}?"
        typer.confirm(plain(question), abort=True)
    done = app.put_back(file, settings)
    kept = f"What was there is kept: meterd restore {done.kept} undoes this."
    if done.kept is None:
        kept = "There was no store before."
    said = RESTORED.format(database=done.database, kept=kept)
    sys.stdout.write("".join(f"{plain(line)}\n" for line in said.splitlines()))


def version() -> None:
    """Print the version."""
    sys.stdout.write(f"meterd {__version__}\n")


def config_example(pattern: ForPattern = None) -> None:
    """Print a configuration with every key, its default and a comment."""
    from meterd import config as configuration

    sys.stdout.write(configuration.example("" if pattern is None else pattern.value))


def config_schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from meterd import config as configuration

    sys.stdout.write(json.dumps(configuration.schema(), indent=2) + "\n")


COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run,
    "demo": demo,
    "sandbox": sandbox,
    "check": check,
    "restore": restore,
    "version": version,
}
CONFIG_COMMANDS: dict[str, Callable[..., Any]] = {
    "example": config_example,
    "schema": config_schema,
}
