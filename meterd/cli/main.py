"""All commands in one tree, and what becomes of an error: a sentence and an exit code.

The rule: a person who made a mistake sees a sentence; a traceback is a bug of meterd's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from meterd.cli import acts, events, local, numbers, quotes, simulate, tables, verify
from meterd.errors import ConfigurationError, MeterdError

EPILOG = "Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 3 something needs a person."
SETTINGS = {"help_option_names": ["-h", "--help"]}


def tree() -> typer.Typer:
    """Build the tree of commands."""
    app = typer.Typer(
        name="meterd",
        help="Exact metering and settlement beside an AI-agent service.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
    )
    for panel, commands in (
        (
            "On this machine",
            {**local.COMMANDS, **quotes.COMMANDS, **simulate.COMMANDS, **verify.COMMANDS},
        ),
        ("What a running daemon knows", tables.COMMANDS),
        ("Acts on a running daemon", {**acts.COMMANDS, **verify.ACTS}),
        ("Usage events", events.COMMANDS),
    ):
        for name, command in commands.items():
            app.command(name, rich_help_panel=panel)(command)
    config = typer.Typer(no_args_is_help=True, help="Print an example configuration or its schema.")
    for name, command in local.CONFIG_COMMANDS.items():
        config.command(name)(command)
    app.add_typer(config, name="config", rich_help_panel="On this machine")
    letters = typer.Typer(invoke_without_command=True)
    letters.callback()(acts.dead_letters)
    for name, command in acts.DEAD_LETTER_COMMANDS.items():
        letters.command(name)(command)
    app.add_typer(letters, name="dead-letters", rich_help_panel="What a running daemon knows")
    numbering = typer.Typer(invoke_without_command=True)
    numbering.callback()(numbers.producers)
    for name, command in numbers.COMMANDS.items():
        numbering.command(name)(command)
    app.add_typer(numbering, name="producers", rich_help_panel="What a running daemon knows")
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (that of the process, where none is given) and return its exit code."""
    command = typer.main.get_command(tree())
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name="meterd")
    except MeterdError as error:
        return tell(error)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def tell(error: MeterdError) -> int:
    """Say what went wrong on standard error; the exit code that belongs to it."""
    if isinstance(error, ConfigurationError):
        tell_mistakes(error)
    else:
        sys.stderr.write(f"meterd: {error}\n")
    return error.exit_code


def tell_mistakes(error: ConfigurationError) -> None:
    """List every mistake of a configuration, one a line."""
    count = len(error.mistakes)
    origin = f" in {error.origin}" if error.origin else ""
    sys.stderr.write(f"meterd: {count} mistake{'s' if count != 1 else ''}{origin}\n")
    for mistake in error.mistakes:
        sys.stderr.write(f"  {mistake}\n")
