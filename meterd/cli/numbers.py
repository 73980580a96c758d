"""`meterd producers`: who numbers events, what is missing of them, and waiting for it no more.

The rule: what is given up can be seen before, and stands in the journal with its reason after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from meterd.cli.acts import asks, confirm
from meterd.cli.options import AsJson, Config, Limit, Reason, TokenFile, Url, Yes, connect
from meterd.cli.screen import Column, console, print_json, say, table
from meterd.cli.tables import collect

SHOWN = 4  # Ranges in a cell; all that the API gives stand in --json.
PRODUCERS = (
    Column("producer", "source"),
    Column("last number", "last", "number"),
    Column("last event (UTC)", "last_at", "time"),
    Column("missing", "missing", "number"),
    Column("since (UTC)", "missing_since", "time"),
    Column("which", "which"),
    Column("given up", "given_up", "number"),
    Column("decides late ones", "exact"),
)


def producers(
    context: typer.Context,
    missing: Annotated[
        bool, typer.Option("--missing", help="Those alone of which something is missing.")
    ] = False,
    limit: Limit = 50,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Producers that number their events, and what is missing; or give up what is."""
    if context.invoked_subcommand is not None:
        return
    with connect(config, url, token_file) as daemon:
        asked = {"missing": "true"} if missing else {}
        found, more = collect(daemon, "producers", limit=limit, **asked)
    if as_json:
        print_json({"items": found, "next": more})
        return
    if not found:
        say("Nothing is missing." if missing else "No producer has numbered an event yet.")
        return
    console().print(table(PRODUCERS, [{**item, "which": _ranges(item)} for item in found]))
    if more is not None:
        say(f"There are more: meterd producers --limit {limit * 10}")
    if any(item["missing"] for item in found):
        say("Have the producer send what is missing again, however late; or, if it is lost:")
        say('meterd producers give-up PRODUCER --reason "…"')


def _ranges(item: Mapping[str, Any]) -> str:
    """Write missing ranges as "3-4, 9", the lowest first."""
    ranges = item["missing_ranges"]
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:SHOWN]]
    return ", ".join([*shown, *(["…"] if len(ranges) > SHOWN else [])])


def give_up(
    producer: Annotated[str, typer.Argument(metavar="PRODUCER", help="As in the list.")],
    reason: Reason,
    yes: Yes = False,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Wait no more for what is missing of a producer: it is lost, or was settled by hand."""
    if asks(yes=yes):
        confirm(f"Wait no more for what is missing of {producer}?")
    body = {"source": producer, "reason": reason}
    with connect(config, url, token_file) as daemon:
        answer = daemon.ask("POST", "v1", "producers", "give-up", body=body)
    if as_json:
        print_json(answer)
    else:
        console().print(f"{answer['given_up']:,} events of {producer} are waited for no more.")


COMMANDS: dict[str, Callable[..., Any]] = {"give-up": give_up}
