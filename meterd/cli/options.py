"""Options that many commands share, so that they have one name and one sentence everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meterd.cli.daemon import Daemon, address, certificate, token_of

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="The configuration; without it METERD_CONFIG, ./meterd.toml, /etc/meterd/meterd.toml.",
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        envvar="METERD_URL",
        help="Where the daemon is, instead of http.listen of the configuration.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="A file with the bearer token, instead of METERD_TOKEN.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is written into the journal.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what it would do, and do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=100_000, help="How many to show.")]


def connect(config: Path | None, url: str | None, token_file: Path | None) -> Daemon:
    """Address the daemon that these options name; nothing is sent yet."""
    return Daemon(address(url, config), token_of(token_file), certificate(url, config))
