"""What commands print: tables for people, JSON for programs.

The rule: texts that came from outside are shown, never obeyed: no control characters, no markup.
Standard output carries the answer and nothing else; what is said beside it goes to standard
error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPE_COLUMNS = 1000  # A file has no edge at which a table should be cut.


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading, the key (dots go deeper) whose value it shows, and how."""

    heading: str
    key: str
    kind: Literal["text", "number", "time", "state"] = "text"


GOOD = {"active", "confirmed", "closed", "connected", "ok"}
WAITING = {
    "adopting",
    "closing",
    "intended",
    "sent",
    "paused",
    "in_doubt",
    "not_sent",
    "void",
    "exhausted",
}
BAD = {"frozen", "escalated", "declined", "late", "down"}


def console() -> Console:
    """Make a console: colours and an edge on a terminal alone."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def say(sentence: str) -> None:
    """Tell a person something beside the answer."""
    sys.stderr.write(plain(sentence) + "\n")


def print_json(answer: object) -> None:
    """Print an answer for a program."""
    sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")


def plain(value: object) -> str:
    """A text without control characters."""
    text = "" if value is None else str(value)
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")


def find(item: Mapping[str, Any], key: str) -> Any:
    """Follow a key with dots into an answer; None where it leads nowhere."""
    value: Any = item
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def moment(value: object) -> str:
    """A time, given as ISO text or as milliseconds since the epoch, in UTC to the second."""
    if isinstance(value, int) and value > 0:
        return datetime.fromtimestamp(value // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (
        plain(value or "").replace("T", " ").removesuffix("Z").split(".")[0].removesuffix("+00:00")
    )


def styled(word: object) -> Text:
    """A state in the colour of its meaning."""
    from rich.text import Text

    text = plain(word)
    styles = ((GOOD, "green"), (WAITING, "yellow"), (BAD, "bold red"))
    return Text(text, next((style for words, style in styles if text in words), ""))


def table(
    columns: Sequence[Column], items: Iterable[Mapping[str, Any]], *, title: str = ""
) -> Table:
    """Lay items out as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    laid = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        number = column.kind == "number"
        laid.add_column(column.heading, justify="right" if number else "left", no_wrap=number)
    for item in items:
        laid.add_row(*(_cell(column, find(item, column.key)) for column in columns))
    return laid


def _cell(column: Column, value: object) -> Text:
    from rich.text import Text

    if column.kind == "state":
        return styled(value)
    return Text(moment(value) if column.kind == "time" else _words(value))


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(name)} = {plain(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(value)
