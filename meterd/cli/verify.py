"""`meterd verify` and `meterd backup`: the books looked at from outside, and a copy of them.

The rule: looking changes nothing. What is printed first is the verdict's figures; every break names
its row, so that it can be found with a sqlite3 shell in a copy.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meterd.cli.daemon import WrongUse
from meterd.cli.options import AsJson, Config, TokenFile, Url, connect
from meterd.cli.screen import plain, print_json
from meterd.core.money import format_amount, format_exact

if TYPE_CHECKING:
    from meterd.audit import Audit, Books, Shown
    from meterd.config import Settings
    from meterd.escrow.service import PaymentService
    from meterd.receipts import Checked

ASKED_AT_ONCE = 4  # A service that limits what it is asked should not notice an audit.
SHOWN_MAX = 50  # Breaks on a terminal; --json has more.
NEEDS_A_PERSON = 3
KEY_DIGITS = 64


def verify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RECEIPTS]...",
            help="Check receipts in these files instead, as the API gives them; - is the input.",
        ),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="HEX", help="Who may have signed receipts: a public key."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="A state directory without a daemon on it."),
    ] = None,
    backup_file: Annotated[
        Path | None, typer.Option("--backup", metavar="FILE", help="A copy by meterd backup.")
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Ask the escrow service for its own figures; moves no money."),
    ] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Work out every sum again, apart from the daemon's code; exit 3 when one does not agree.

    With files: follow the chain of each agreement's receipts, with no daemon and no network.
    """
    if files:
        if data_dir is not None or backup_file is not None or live:
            raise WrongUse("files of receipts are checked by themselves: name no store with them")
        _receipts(files, _public(keys or []), as_json=as_json)
        return
    if keys:
        raise WrongUse("--key is for files of receipts: meterd verify FILE --key HEX")
    from meterd.audit import audit

    if data_dir is not None and backup_file is not None:
        raise WrongUse("name one of them: --data-dir DIR or --backup FILE")
    place = data_dir or backup_file
    settings = _settings(config) if live or place is None else None
    if place is None:
        assert settings is not None
        place = Path(settings.daemon.data_dir)
    found = audit(place)
    if live:
        assert settings is not None
        roles = {name: found.books.escrows[name].role for name in found.escrows}
        found.hold_against(asyncio.run(_answers(settings, roles)))
    if as_json:
        print_json(_document(found))
    else:
        sys.stdout.write("".join(f"{plain(line)}\n" for line in _lines(found)))
    if found.findings.broken:
        raise typer.Exit(NEEDS_A_PERSON)
    if found.findings.unasked:
        raise typer.Exit(1)


def _settings(file: Path | None) -> Settings:
    from meterd import config as configuration

    return configuration.load(file, os.environ)


# -- The service's own figures -------------------------------------------------------------------


async def _answers(settings: Settings, roles: Mapping[str, str]) -> dict[str, Shown | str]:
    """Ask for each escrow and each wallet, a few at once; the roles are by their ids."""
    from meterd.app import escrow_api_of, wallet_api_of
    from meterd.escrow.client import EscrowClient
    from meterd.escrow.service import PaymentService
    from meterd.escrow.wallet import WalletClient

    gate = asyncio.Semaphore(ASKED_AT_ONCE)
    async with (
        EscrowClient(escrow_api_of(settings)) as escrows,
        WalletClient(wallet_api_of(settings)) as wallets,
    ):
        service = PaymentService(escrows, wallets)
        asked = (_answer(service, gate, name, role) for name, role in roles.items())
        answers = await asyncio.gather(*asked)
    return dict(zip(roles, answers, strict=True))


async def _answer(
    service: PaymentService, gate: asyncio.Semaphore, escrow: str, role: str
) -> Shown | str:
    from meterd.audit import Shown
    from meterd.core.settlement import Reading

    async with gate:
        read = await service.read(escrow, role)
    if not isinstance(read, Reading):
        return f"{read.kind}: {read.detail}"
    if read.escrow != escrow:
        return f"it answered for another escrow, {read.escrow}"
    return Shown(
        read.status,
        read.total,
        read.released,
        read.remaining,
        read.refunded,
        read.release_ids,
        read.provider,
    )


# -- What is printed -----------------------------------------------------------------------------


def _figures(books: Books) -> dict[str, Any]:
    """What was counted, and the sums of money, by the auditor's own reckoning."""
    statuses = Counter(release.status for release in books.releases.values())
    accrued = sum(books.accrued.values(), Fraction(0))
    settled = sum(escrow.settled for escrow in books.escrows.values())
    credited = sum(escrow.credited for escrow in books.escrows.values())
    held = sum(
        release.amount
        for release in books.releases.values()
        if release.status in {"intended", "sent", "in_doubt", "escalated"}
    )
    rest = accrued - Fraction(settled + credited + held, 10**6)
    sign = "-" if rest < 0 else ""
    return {
        "agreements": len(books.agreements),
        "escrows": len(books.escrows),
        "events": sum(counter.events for counter in books.counters),
        "counters": len(books.counters),
        "cards": len(books.cards),
        "releases": dict(sorted(statuses.items())),
        "accrued": format_exact(accrued),
        "released": format_amount(settled),
        "in_doubt": format_amount(held),
        "credited": format_amount(credited),
        "unsettled": sign + format_exact(abs(rest)),
    }


def _document(found: Audit) -> dict[str, Any]:
    findings = found.findings
    return {
        "place": str(found.place),
        "backup": found.is_copy,
        "agrees": not findings.broken,
        "broken": findings.broken,
        "breaks": [
            {"invariant": each.invariant, "row": each.row, "detail": each.detail}
            for each in findings.breaks
        ],
        "notes": findings.notes,
        "not_asked": findings.unasked,
        **_figures(found.books),
        "checked": dict(findings.checked),
    }


def _lines(found: Audit) -> list[str]:
    figures, findings = _figures(found.books), found.findings
    releases = ", ".join(f"{count:,} {word}" for word, count in figures["releases"].items())
    checked = ", ".join(f"{count:,} {word}" for word, count in findings.checked.items() if count)
    lines = [
        f"looked at  {found.place}" + (", a backup" if found.is_copy else ""),
        (
            f"counted    {figures['agreements']:,} agreements, {figures['events']:,} events in"
            f" {figures['counters']:,} counters, {figures['cards']:,} rate cards,"
            f" {figures['escrows']:,} escrows"
        ),
        (
            f"money      accrued {figures['accrued']} = released {figures['released']} + in doubt"
            f" {figures['in_doubt']} + credited {figures['credited']} + unsettled"
            f" {figures['unsettled']} USDC"
        ),
        f"releases   {releases or 'none yet'}",
        f"checked    {checked or 'nothing beside'}",
        *(f"note       {note}" for note in findings.notes),
        *(f"BROKEN     {each}" for each in findings.breaks[:SHOWN_MAX]),
    ]
    if findings.broken > SHOWN_MAX:
        lines.append(f"           and {findings.broken - SHOWN_MAX:,} more: --json")
    if findings.broken:
        lines.append(f"{findings.broken:,} do not agree. Keep the file as it is, and look.")
    elif findings.unasked:
        lines.append(f"The store agrees; {findings.unasked:,} escrows could not be compared.")
    else:
        lines.append("Everything agrees.")
    return lines


# -- Receipts ------------------------------------------------------------------------------------


def _public(keys: Sequence[str]) -> list[str]:
    texts = [key.strip().lower() for key in keys]
    if any(len(text) != KEY_DIGITS or set(text) - set("0123456789abcdef") for text in texts):
        raise WrongUse("--key takes the 64 hexadecimal digits of GET /v1/receipts/key")
    return texts


def _receipts(files: Sequence[Path], keys: Sequence[str], *, as_json: bool) -> None:
    from meterd.receipts import NoReceipts, check, read

    found = []
    for file in files:
        try:
            text = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
            found += read(text)
        except OSError as error:
            raise WrongUse(f"{file} cannot be read: {error.strerror}") from None
        except NoReceipts as error:
            raise WrongUse(f"{file} holds no receipts: {error}") from None
    checked = check(found, keys)
    if as_json:
        print_json(
            {
                "agrees": not checked.broken,
                "keys": sorted(checked.keys),
                "chains": [asdict(chain) for chain in checked.chains.values()],
            }
        )
    else:
        sys.stdout.write("".join(f"{plain(line)}\n" for line in _chains(checked, keys)))
    if checked.broken:
        raise typer.Exit(NEEDS_A_PERSON)


def _chains(checked: Checked, keys: Sequence[str]) -> list[str]:
    lines = []
    for chain in checked.chains.values():
        if chain.last:
            lines.append(
                f"agrees     {chain.agreement}: receipts {chain.first:,} to {chain.last:,}, accrued"
                f" {chain.accrued}, released {chain.released} USDC"
            )
        if chain.first > 1:
            lines.append(f"note       {chain.agreement}: those before are not here")
        if chain.broken:
            lines.append(f"BROKEN     {chain.broken}")
    if not keys:
        lines += [f"signed by  {key}; hold it against the seller's" for key in sorted(checked.keys)]
    return lines or ["There is no receipt in it."]


# -- A copy --------------------------------------------------------------------------------------

RESTORE = """\
To look at it:     meterd verify --backup {path}
To restore it:     stop the daemon, type meterd restore {path}, start the daemon
What was released since then is noticed and never paid again: the escrow freezes until
meterd resume AGREEMENT --reason TEXT. Usage since then has to be sent once more.
"""


def backup(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A new file on the daemon's machine, absolute.")
    ],
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Copy the whole store of a running daemon, as of one moment, into a new file."""
    if not path.is_absolute():
        raise WrongUse(f"{path} is not absolute; the daemon may stand in another directory")
    with connect(config, url, token_file) as daemon:
        answer = daemon.ask("POST", "v1", "backup", body={"path": str(path)})
    if as_json:
        print_json(answer)
        return
    sys.stdout.write(f"{plain(path)} has {answer['bytes']:,} bytes.\n")
    sys.stdout.write(RESTORE.format(path=plain(path)))


COMMANDS: dict[str, Callable[..., Any]] = {"verify": verify}
ACTS: dict[str, Callable[..., Any]] = {"backup": backup}
