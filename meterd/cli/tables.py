"""What a running daemon knows, on a terminal: its status, the agreements, the releases.

The rule: looking changes nothing, and a status that needs a person says so by its exit code too.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meterd.cli.daemon import Daemon
from meterd.cli.options import AsJson, Config, Limit, TokenFile, Url, connect
from meterd.cli.screen import BAD, Column, console, moment, plain, print_json, say, styled, table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

PAGE_MAX = 1000  # What the API gives at once.
NEEDS_A_PERSON = 3

Item = Mapping[str, Any]


def collect(daemon: Daemon, *path: str, limit: int, **query: str) -> tuple[list[Item], str | None]:
    """Read at most `limit` items of a list, and the cursor behind them; None: that was all."""
    items: list[Item] = []
    cursor: str | None = ""
    while cursor is not None and len(items) < limit:
        size = min(PAGE_MAX, limit - len(items))
        page = daemon.get("v1", *path, limit=size, cursor=cursor, **query)
        items += page["items"]
        cursor = page.get("next")
    return items, cursor


# -- Agreements and releases ---------------------------------------------------------------------

AGREEMENTS = (
    Column("agreement", "id"),
    Column("plan", "plan"),
    Column("state", "state", "state"),
    Column("events", "events", "number"),
    Column("accrued", "accrued", "number"),
    Column("released", "released", "number"),
    Column("unsettled", "unsettled", "number"),
    Column("in doubt", "in_doubt", "number"),
    Column("headroom", "headroom", "number"),
    Column("reason", "reason"),
)
USAGE = (
    Column("meter", "meter"),
    Column("dimensions", "dimensions"),
    Column("quantity", "quantity", "number"),
    Column("unit", "unit"),
    Column("events", "events", "number"),
    Column("accrued", "accrued", "number"),
)
RELEASES = (
    Column("release", "id"),
    Column("agreement", "agreement"),
    Column("escrow", "escrow"),
    Column("amount", "amount", "number"),
    Column("status", "status", "state"),
    Column("why", "why"),
    Column("intended (UTC)", "created_at", "time"),
    Column("detail", "detail"),
)
DETAILS = (
    "plan", "payer", "origin", "state", "reason", "opened_at", "events", "accrued", "released",
    "unsettled", "in_doubt", "headroom", "uncollectible", "unsettled_since",
)  # fmt: skip


def agreements(
    agreement: Annotated[
        str | None, typer.Argument(metavar="[AGREEMENT]", help="One of them, with its usage.")
    ] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """List the agreements with what they owe and what was paid, or show one of them."""
    with connect(config, url, token_file) as daemon:
        if agreement is not None:
            _one(daemon, agreement, as_json=as_json)
            return
        found, more = collect(daemon, "agreements", limit=limit)
    if as_json:
        print_json({"items": found, "next": more})
    elif not found:
        say("There are no agreements. Bind an escrow: meterd bind ESCROW --plan PLAN")
    else:
        console().print(table(AGREEMENTS, found))
        _say_more(more, "agreements", limit)


def _one(daemon: Daemon, agreement: str, *, as_json: bool) -> None:
    item = daemon.get("v1", "agreements", agreement)
    usage = daemon.get("v1", "agreements", agreement, "usage")
    if as_json:
        print_json({**item, "usage": usage["items"]})
        return
    screen = console()
    screen.print(_facts(item["id"], {name: item.get(name) for name in DETAILS}))
    for escrow in item["escrows"]:
        screen.print(_facts(f"escrow {escrow['role']}", escrow))
    screen.print(table(USAGE, usage["items"], title="usage"))
    if item.get("next"):
        say(f"Next: {item['next']}")


def _facts(title: str, facts: Item) -> Any:
    """Lay one thing out as lines of name and value; what is empty is left out."""
    from rich.table import Table
    from rich.text import Text

    laid = Table(
        box=None, show_header=False, title=Text(plain(title), "bold"), title_justify="left"
    )
    for name, value in facts.items():
        if value not in (None, "", False):
            timely = name.endswith(("_at", "_since")) or name == "deadline"
            shown = Text(moment(value)) if timely else styled(value)
            laid.add_row(Text(name.replace("_", " "), "dim"), shown)
    return laid


def releases(
    agreement: Annotated[
        str, typer.Argument(metavar="[AGREEMENT]", help="Of this agreement alone.")
    ] = "",
    status: Annotated[str, typer.Option("--status", help="With this status alone.")] = "",
    limit: Limit = 50,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """List releases, newest first."""
    with connect(config, url, token_file) as daemon:
        found, more = collect(daemon, "releases", limit=limit, agreement=agreement, status=status)
    if as_json:
        print_json({"items": found, "next": more})
    elif not found:
        say("There are no such releases.")
    else:
        console().print(table(RELEASES, [{**item, "detail": _last_word(item)} for item in found]))
        _say_more(more, f"releases {agreement}".strip(), limit)


def _last_word(release: Item) -> str:
    history = release.get("history") or [{}]
    return str(history[-1].get("detail", ""))


def _say_more(more: str | None, command: str, limit: int) -> None:
    if more is not None:
        say(f"There are more: meterd {command} --limit {limit * 10}")


# -- Status --------------------------------------------------------------------------------------

SENTENCES = {
    "flowing": ("green", "Money is flowing."),
    "idle": ("green", "Nothing was used yet."),
    "waiting_for_sources": ("yellow", "A source is not connected; what it has waits there."),
    "blocked": ("bold red", "Nothing is released: {blocked}."),
    "stopped": ("bold red", "Nothing is taken and nothing released: the disk is full."),
    "needs_a_person": ("bold red", "A person is needed; see below."),
}
TOTALS = (
    Column("accrued", "accrued", "number"),
    Column("released", "released", "number"),
    Column("unsettled", "unsettled", "number"),
    Column("in doubt", "in_doubt", "number"),
    Column("headroom", "headroom", "number"),
    Column("uncollectible", "uncollectible", "number"),
    Column("difference", "reconciliation_difference", "number"),
)
SOURCES = (
    Column("source", "name"),
    Column("kind", "kind"),
    Column("address", "address"),
    Column("state", "state", "state"),
    Column("since (UTC)", "since", "time"),
    Column("waiting there", "lag", "number"),
    Column("not acked", "unacked", "number"),
    Column("says", "says"),
)
TROUBLES = ("in_doubt", "frozen", "exhausted", "paused")
AT_STAKE = {
    "escalated": "may or may not be paid",
    "in_doubt": "may or may not be paid",
    "late": "landed late",
    "exhausted": "used beyond what is left",
}


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Again each second, until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Tell in one screen whether money is flowing; exit 3 when something needs a person."""
    with connect(config, url, token_file) as daemon:
        if watch:
            _watch(daemon)
            return
        found = daemon.get("v1", "status")
    if as_json:
        print_json(found)
    else:
        console().print(status_screen(found))
    if needs_a_person(found):
        raise typer.Exit(NEEDS_A_PERSON)


def needs_a_person(found: Item) -> bool:
    """Whether somebody must act, and not only wait: the daemon says so."""
    return bool(found["needs_a_person"])


def _watch(daemon: Daemon) -> None:
    from rich.live import Live

    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(console=console(), auto_refresh=False) as live,
    ):
        while True:
            live.update(status_screen(daemon.get("v1", "status")), refresh=True)
            sys.stdout.flush()
            time.sleep(1)


def status_screen(found: Item) -> Group:
    """Lay a status out, the most important first."""
    from rich.console import Group
    from rich.text import Text

    flow = found["flow"]
    style, sentence = SENTENCES.get(flow["word"], ("", flow["word"]))
    parts: list[Any] = [
        Text.assemble(
            (plain(sentence.format(blocked=flow["blocked"])), style),
            (f"  meterd {plain(found['version'])}, since {moment(found['started_at'])} UTC", "dim"),
        ),
        *([Text(f"Next: {plain(flow['next'])}", "bold")] if flow["next"] else ()),
        table(TOTALS, [found["totals"]]),
        Text("\n".join(_sentences(found))),
    ]
    if found["sources"]:
        parts.append(table(SOURCES, [_source(source) for source in found["sources"]]))
    parts += [line for item in _troubles(found) for line in _trouble(item)]
    return Group(*parts)


def _troubles(found: Item) -> Iterator[Item]:
    """Each agreement in trouble once, and last what is gravest: it stands next to the prompt."""
    shown: dict[str, Item] = {}
    for kind in TROUBLES:
        for item in found[kind]:
            known = shown.get(item["agreement"])
            if known is None or known["state"] == "in_doubt":
                shown[item["agreement"]] = item
    yield from sorted(shown.values(), key=lambda item: item["state"] in BAD)


def _trouble(item: Item) -> Iterator[Text]:
    """What is wrong, what it costs, and what to type, a line each; a command is never broken."""
    from rich.text import Text

    state, cost = item["state"], ""
    if item["amount"] != "0.00":
        cost = f"  {item['amount']} USDC {AT_STAKE.get(state, 'earned and not paid')}"
    yield Text.assemble(styled(state), " ", (plain(item["agreement"]), "bold"), plain(cost))
    yield Text(f"  {plain(item['reason'])}")
    if item["next"]:
        yield Text(f"  > {plain(item['next'])}", "bold", no_wrap=True, overflow="ignore")


def _sentences(found: Item) -> Iterator[str]:
    events, flow, agreements_ = found["events"], found["flow"], found["agreements"]
    yield (
        f"events      {events['accepted']:,} accepted, {events['duplicates']:,} duplicates,"
        f" {events['rejected']:,} rejected since the start;"
        f" {events['pending']:,} wait for their commit"
    )
    states = ", ".join(
        f"{count:,} {plain(word)}" for word, count in agreements_["by_state"].items()
    )
    yield f"agreements  {agreements_['total']:,}" + (f": {states}" if states else "")
    last = moment(flow["last_event_at"]) or "none since the start"
    yield f"last event  {last}; last release {moment(flow['last_release_at']) or 'none yet'}"
    if flow["settlement_lag_s"]:
        yield f"overdue     usage has been due for {flow['settlement_lag_s']:,} s"
    if found["dead_letters"]:
        yield f"rejected    {found['dead_letters']:,} dead letters are kept: meterd dead-letters"
    if found.get("missing_events"):
        missing = found["missing_events"]
        yield f"missing     {missing:,} numbered events have not come: meterd producers"


def _source(source: Item) -> Item:
    state = "connected" if source["connected"] else "down"
    return {**source, "state": state, "says": source["error"] or source["warning"]}


# -- Journal -------------------------------------------------------------------------------------

JOURNAL = (
    Column("number", "number", "number"),
    Column("at (UTC)", "at", "time"),
    Column("by", "actor"),
    Column("act", "action"),
    Column("on", "subject"),
    Column("why", "detail"),
)


def journal(
    limit: Limit = 50,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Show who did what to the money and why, newest first; `meterd verify` proves it unbroken."""
    with connect(config, url, token_file) as daemon:
        found, more = collect(daemon, "journal", limit=limit)
    if as_json:
        print_json({"items": found, "next": more})
    elif not found:
        say("The journal is empty; there is nothing yet that anybody did.")
    else:
        console().print(table(JOURNAL, found))
        _say_more(more, "journal", limit)


# -- Holds ---------------------------------------------------------------------------------------

HOLDS = (
    Column("hold", "id"),
    Column("agreement", "agreement"),
    Column("meter", "meter"),
    Column("quantity", "quantity", "number"),
    Column("amount", "amount", "number"),
    Column("made (UTC)", "created_at", "time"),
    Column("expires (UTC)", "expires_at", "time"),
)


def holds(
    limit: Limit = 50,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """List what is set aside for calls that are being served."""
    with connect(config, url, token_file) as daemon:
        found, more = collect(daemon, "holds", limit=limit)
    if as_json:
        print_json({"items": found, "next": more})
    elif not found:
        say("Nothing is set aside: no call is being served behind a hold.")
    else:
        console().print(table(HOLDS, found))
        _say_more(more, "holds", limit)


COMMANDS: dict[str, Callable[..., Any]] = {
    "status": status,
    "agreements": agreements,
    "releases": releases,
    "holds": holds,
    "journal": journal,
}
