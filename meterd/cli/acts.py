"""What a person does to a running daemon: agreements, releases in doubt, dead letters.

The rule: acts that stop or end something need a reason, which the daemon journals. Those that
cannot be taken back are shown and asked about first, where somebody sits at a terminal; with
`--dry-run` they are only shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Annotated, Any

import typer

from meterd.cli.daemon import Daemon, WrongUse
from meterd.cli.options import AsJson, Config, DryRun, Limit, Reason, TokenFile, Url, Yes, connect
from meterd.cli.screen import Column, console, plain, print_json, say, table
from meterd.cli.tables import collect
from meterd.errors import NotFound

AgreementId = Annotated[str, typer.Argument(metavar="AGREEMENT", help="Its id, or its escrow's.")]
OptionalReason = Annotated[
    str, typer.Option("--reason", help="Why; it is written into the journal.")
]


def bind(
    escrow: Annotated[str, typer.Argument(metavar="ESCROW", help="The id of an existing escrow.")],
    plan: Annotated[
        str, typer.Option("--plan", metavar="PLAN", help="A plan of the configuration.")
    ],
    agreement: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="The agreement's id; else the escrow's."),
    ] = None,
    payer: Annotated[str | None, typer.Option("--payer", help="Who pays.")] = None,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Bind an existing escrow to a plan: usage of it is metered and paid from now on."""
    name = agreement or escrow
    body: dict[str, object] = {"plan": plan, "escrows": {"main": escrow}}
    if payer is not None:
        body["payer"] = payer
    with connect(config, url, token_file) as daemon:
        answer = daemon.ask("PUT", "v1", "agreements", name, body=body)
    _done(answer, f"{name} is bound to {plan}. Look: meterd agreements {name}", as_json=as_json)


def open_agreement(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan of the configuration.")],
    agreement: Annotated[
        str, typer.Option("--id", metavar="ID", help="The agreement's id; else one is made.")
    ] = "",
    payer: Annotated[str, typer.Option("--payer", metavar="AGENT", help="Who pays.")] = "",
    deposit: Annotated[
        str | None, typer.Option("--deposit", metavar="USDC", help="Instead of the plan's.")
    ] = None,
    provider: Annotated[
        str, typer.Option("--provider", metavar="AGENT", help="Who is paid; else escrow.agent_id.")
    ] = "",
    following: Annotated[
        bool, typer.Option("--next", help="Lock the next escrow of an agreement that there is.")
    ] = False,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Lock the escrows that a plan needs, and bind them: usage may begin."""
    body: dict[str, object] = {"plan": plan, "next": following}
    given = {"id": agreement, "payer": payer, "deposit": deposit, "provider": provider}
    body.update({name: value for name, value in given.items() if value})
    with connect(config, url, token_file) as daemon:
        answer = daemon.ask("POST", "v1", "agreements", body=body)
    name = answer["id"]
    if answer["state"] == "opening":
        sentence = (
            f"Nobody knows yet whether the escrow of {name} was locked; it is looked for in the"
            f" service's list and bound when it is there. Look: meterd agreements {name}"
        )
    else:
        locked = ", ".join(escrow["id"] for escrow in answer["escrows"])
        sentence = f"{name} is open under {plan}: {locked}. Look: meterd agreements {name}"
    _done(answer, sentence, as_json=as_json)
    if answer["state"] == "opening":
        raise typer.Exit(3)


def settle(
    agreement: AgreementId,
    reason: OptionalReason = "",
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Release what is unsettled now, whatever the thresholds say."""
    with connect(config, url, token_file) as daemon:
        answer = _act(daemon, agreement, "settle", reason)
    sentence = f"{agreement} is being settled. Look: meterd releases {agreement}"
    _done(answer, sentence, as_json=as_json)


def close(
    agreement: AgreementId,
    reason: Reason,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Settle an agreement to the last unit and end it: later usage of it is rejected."""
    with connect(config, url, token_file) as daemon:
        if dry_run or asks(yes=yes):
            _show(_closing(daemon.get("v1", "agreements", agreement)))
            if dry_run:
                return
            confirm(f"Close {agreement} for good?")
        answer = _act(daemon, agreement, "close", reason)
    sentence = f"{agreement} is being closed. Look: meterd agreements {agreement}"
    _done(answer, sentence, as_json=as_json)


def freeze(
    agreement: AgreementId,
    reason: Reason,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Make no more releases for an agreement until it is resumed; metering goes on."""
    with connect(config, url, token_file) as daemon:
        answer = _act(daemon, agreement, "freeze", reason)
    sentence = f'{agreement} is frozen. Undo it: meterd resume {agreement} --reason "…"'
    _done(answer, sentence, as_json=as_json)


def resume(
    agreement: AgreementId,
    reason: Reason,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Go on with a frozen agreement, from what its escrow shows now."""
    with connect(config, url, token_file) as daemon:
        if dry_run or asks(yes=yes):
            _show(_resuming(daemon.get("v1", "agreements", agreement)))
            if dry_run:
                return
            confirm(f"Resume {agreement}?")
        answer = _act(daemon, agreement, "resume", reason)
    _done(answer, f"{agreement} goes on. Look: meterd agreements {agreement}", as_json=as_json)


def resolve(
    release: Annotated[
        str, typer.Argument(metavar="RELEASE", help="The id of a release in doubt.")
    ],
    reason: Reason,
    landed: Annotated[
        bool | None,
        typer.Option("--landed/--absent", help="The money arrived, or it certainly did not."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Say what became of a release in doubt, having looked at the escrow service."""
    if landed is None:
        raise WrongUse(f"say which: meterd resolve {release} --landed (or --absent) --reason …")
    with connect(config, url, token_file) as daemon:
        if dry_run or asks(yes=yes):
            _show(_resolving(_unfinished(daemon, release), landed=landed))
            if dry_run:
                return
            confirm("Are you certain?")
        body = {"landed": landed, "reason": reason}
        answer = daemon.ask("POST", "v1", "releases", release, "resolve", body=body)
    word = "landed" if landed else "absent"
    _done(answer, f"{release} is noted as {word}. Look: meterd releases", as_json=as_json)


# -- Dead letters --------------------------------------------------------------------------------

DEAD_LETTERS = (
    Column("number", "id", "number"),
    Column("received (UTC)", "received_at", "time"),
    Column("source", "source"),
    Column("event id", "event_id"),
    Column("reason", "reason"),
    Column("detail", "detail"),
)


def dead_letters(
    context: typer.Context,
    reason: Annotated[str, typer.Option("--reason", help="Those with this reason alone.")] = "",
    limit: Limit = 50,
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Rejected deliveries: list them, newest first; replay or discard one."""
    if context.invoked_subcommand is not None:
        return
    with connect(config, url, token_file) as daemon:
        found, more = collect(daemon, "dead-letters", limit=limit, reason=reason)
    if as_json:
        print_json({"items": found, "next": more})
        return
    if not found:
        say("There are no dead letters.")
        return
    console().print(table(DEAD_LETTERS, found))
    if more is not None:
        say(f"There are more: meterd dead-letters --limit {limit * 10}")
    say("Repair what was wrong, then: meterd dead-letters replay NUMBER")


Number = Annotated[int, typer.Argument(metavar="NUMBER", min=1, help="As in the list.")]


def replay_dead_letter(
    number: Annotated[
        int | None, typer.Argument(metavar="NUMBER", min=1, help="As in the list.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them, oldest first.")] = False,
    reason: Annotated[
        str, typer.Option("--reason", help="With --all: those with this reason alone.")
    ] = "",
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Try rejected deliveries again, as they came; exit 1 when one is rejected again."""
    if (number is None) != everything:
        raise WrongUse("name one, or all: meterd dead-letters replay NUMBER, or --all")
    totals = {"accepted": 0, "duplicates": 0, "rejected": 0}
    with connect(config, url, token_file) as daemon:
        for chosen in _chosen(daemon, number, reason):
            answer = daemon.ask("POST", "v1", "dead-letters", str(chosen), "replay")
            _count(totals, answer, chosen)
    if as_json:
        print_json(totals)
    else:
        console().print(_totals_line(totals))
    if totals["rejected"]:
        raise typer.Exit(1)


def _chosen(daemon: Daemon, number: int | None, reason: str) -> list[int]:
    if number is not None:
        return [number]
    found, _ = collect(daemon, "dead-letters", limit=100_000, reason=reason)
    return sorted(int(letter["id"]) for letter in found)


def _count(totals: dict[str, int], answer: Mapping[str, Any], number: int) -> None:
    rejections = answer.get("rejected") or []
    totals["accepted"] += answer.get("accepted", 0)
    totals["duplicates"] += answer.get("duplicates", 0)
    totals["rejected"] += len(rejections)
    for rejection in rejections:
        say(f"{number}: {rejection.get('reason')}: {rejection.get('detail')}")


def _totals_line(totals: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in totals.items())


def discard_dead_letter(
    number: Number,
    reason: Reason,
    yes: Yes = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Throw a rejected delivery away for good."""
    if asks(yes=yes):
        confirm(f"Throw dead letter {number} away for good?")
    with connect(config, url, token_file) as daemon:
        daemon.ask("DELETE", "v1", "dead-letters", str(number), query={"reason": reason})
    sys.stdout.write(f"Dead letter {number} is gone.\n")


# -- Together ------------------------------------------------------------------------------------


def _act(daemon: Daemon, agreement: str, act: str, reason: str) -> Any:
    return daemon.ask("POST", "v1", "agreements", agreement, act, body={"reason": reason})


def asks(*, yes: bool) -> bool:
    """Tell whether somebody is there to be asked; a program that got this far has decided."""
    return not yes and sys.stdin.isatty() and sys.stdout.isatty()


def confirm(question: str) -> None:
    """Ask a person; "no" ends the command."""
    typer.confirm(plain(question), abort=True)


def _show(sentences: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{plain(sentence)}\n" for sentence in sentences))


def _closing(item: Mapping[str, Any]) -> Iterator[str]:
    """What closing an agreement does."""
    yield f"{item['id']} has accrued {item['accrued']} USDC, {item['released']} are released."
    yield f"What is unsettled, {item['unsettled']}, is released now, as far as the escrow has it."
    yield "Then it is closed for good: later usage is rejected and kept as dead letters."


def _resuming(item: Mapping[str, Any]) -> Iterator[str]:
    """What resuming an agreement takes for true."""
    yield f"{item['id']} is {item['state']}: {item['reason'] or 'no reason is noted'}."
    for escrow in item["escrows"]:
        shown, expected = Decimal(escrow["released"]), Decimal(escrow["expected"])
        yield f"Escrow {escrow['id']} shows {shown:f} USDC released, meterd knows of {expected:f}."
        if shown > expected:
            yield f"The {shown - expected:f} beyond that are taken as payment for usage."
        elif shown < expected:
            yield f"The {expected - shown:f} that it lacks are taken as lost and may be paid again."
    yield f"After that the {item['unsettled']} USDC that are unsettled are released again."


def _unfinished(daemon: Daemon, release: str) -> Mapping[str, Any]:
    """Find a release whose outcome is open. Raises `NotFound`."""
    for status in ("escalated", "in_doubt"):
        found, _ = collect(daemon, "releases", limit=10_000, status=status)
        for item in found:
            if item["id"] == release:
                return item
    raise NotFound(f"no release in doubt is named {release}; list them: meterd releases")


def _resolving(item: Mapping[str, Any], *, landed: bool) -> Iterator[str]:
    """What a person's word on a release does."""
    yield (
        f"Release {item['id']} of {item['amount']} USDC on escrow {item['escrow']} is"
        f" {item['status']}: {item['history'][-1]['detail']}."
    )
    if landed:
        yield "With --landed it counts as paid for good; if it was not, you have lost that much."
    else:
        yield "With --absent it is owed again; if it was paid, your customer pays it twice."
    yield f"Look first: the escrow service shows {item['id']} in the memo of what it paid."


def _done(answer: object, sentence: str, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        sys.stdout.write(plain(sentence) + "\n")


COMMANDS: dict[str, Callable[..., Any]] = {
    "open": open_agreement,
    "bind": bind,
    "settle": settle,
    "close": close,
    "freeze": freeze,
    "resume": resume,
    "resolve": resolve,
}
DEAD_LETTER_COMMANDS: dict[str, Callable[..., Any]] = {
    "replay": replay_dead_letter,
    "discard": discard_dead_letter,
}
