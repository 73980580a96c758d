"""`meterd quote`: what a usage costs under a plan of the configuration, with its working.

It asks no daemon: a price is the plan's, and the plan is in the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from meterd.cli.daemon import WrongUse
from meterd.cli.options import AsJson, Config
from meterd.cli.screen import Column, console, print_json, table

USAGE_HELP = (
    "METER=QUANTITY, with ,NAME=VALUE behind it for each dimension; "
    "price=… where it brings its own."
)


def quote(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan of the configuration.")],
    usage: Annotated[
        list[str] | None, typer.Argument(metavar="METER=QUANTITY…", help=USAGE_HELP)
    ] = None,
    running: Annotated[
        bool, typer.Option("--running", help="The period is not over: no fee and no minimum yet.")
    ] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Say what a usage costs under a plan, line by line."""
    from meterd import config as configuration
    from meterd import parts
    from meterd.core.quotes import Unpriced
    from meterd.core.quotes import quote as price

    settings = configuration.load(configuration.find(config, os.environ), os.environ)
    plans = parts.plans_of(settings)
    if plan not in plans:
        raise WrongUse(f"there is no plan {plan!r}; known: {', '.join(sorted(plans)) or 'none'}")
    used = [_use(text) for text in usage or ()]
    now = time.time_ns() // 1_000_000
    try:
        quoted = price(plans[plan], parts.meters_of(settings), used, now, ended=not running)
    except Unpriced as error:
        raise WrongUse(str(error)) from None
    document = _document(quoted)
    if as_json:
        print_json(document)
        return
    screen = console()
    screen.print(table(LINES, document["lines"]))
    screen.print(f"total {document['total']} USDC; payable {document['payable']}")


LINES = (
    Column("meter", "meter"),
    Column("rate", "rate"),
    Column("working", "working"),
    Column("charge", "charge", "number"),
    Column("drawn on", "role"),
)


def _use(text: str) -> Any:
    """Read `tokens=1500,kind=output`."""
    from meterd.core.events import quantity_nanos
    from meterd.core.money import BadNumber, parse_price
    from meterd.core.quotes import Use

    first, *others = text.split(",")
    meter, separator, quantity = first.partition("=")
    pairs = dict(other.partition("=")[::2] for other in others)
    price = pairs.pop("price", None)
    if not meter or not separator or not all(pairs):
        raise WrongUse(f"{text!r} is not METER=QUANTITY, such as tokens=1500,kind=output")
    try:
        return Use(
            meter, quantity_nanos(quantity), pairs, None if price is None else parse_price(price)
        )
    except BadNumber as error:
        raise WrongUse(f"{text!r}: {error}") from None


def _document(quoted: Any) -> dict[str, Any]:
    from meterd.core.money import format_amount, format_exact, format_quantity

    return {
        "plan": quoted.plan,
        "lines": [
            {
                "meter": line.meter,
                "rate": line.rate,
                "quantity": format_quantity(line.quantity),
                "working": list(line.working),
                "charge": format_exact(line.charge),
                "role": line.role,
            }
            for line in quoted.lines
        ],
        "total": format_exact(quoted.total),
        "payable": format_amount(quoted.payable),
    }


COMMANDS: dict[str, Callable[..., None]] = {"quote": quote}
