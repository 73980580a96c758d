"""`meterd simulate`: past usage under other plans and thresholds, side by side.

It asks no daemon and moves no money: usage comes from files or from a stopped store, and prices and
thresholds are those of the configuration, or what `--against` names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meterd.cli.daemon import WrongUse
from meterd.cli.options import AsJson, Config
from meterd.cli.screen import Column, console, plain, print_json, say, table
from meterd.core.money import format_amount

if TYPE_CHECKING:
    from meterd.config import Settings
    from meterd.core.plans import Plan, Settle
    from meterd.core.simulate import Outcome, Priced, Spread
    from meterd.history import History

FEE_BPS = 100
NOT_MODELLED = (
    "The service grants every call: doubts, outages and deadlines are not modelled,"
    " nor is an escrow's end without --deposit. At the end every agreement is closed and paid."
)


def simulate(  # A command has as many options as it has.
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE…]",
            help="NDJSON, one event a line; - is standard input. Without one: the store's usage.",
        ),
    ] = None,
    plan: Annotated[
        str, typer.Option("--plan", metavar="NAME", help="The plan of all agreements.")
    ] = "",
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="SPEC",
            help='Such as "amount=0.50", "units=100,interval=60s",'
            ' "adaptive,exposure_max=1.00", "plan=NAME"; again for another.',
        ),
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option(
            "--store",
            metavar="PLACE",
            help="A backup, or a state directory without a daemon; else daemon.data_dir.",
        ),
    ] = None,
    deposit: Annotated[
        str, typer.Option("--deposit", metavar="AMOUNT", help="What each escrow holds, in USDC.")
    ] = "",
    latency: Annotated[
        str, typer.Option("--latency", metavar="TIME", help="From a release's decision to its end.")
    ] = "1s",
    pace: Annotated[
        str,
        typer.Option(
            "--pace", metavar="TIME", help="Between two calls of an escrow; else min_interval."
        ),
    ] = "",
    fee_per_call: Annotated[
        str,
        typer.Option("--fee-per-call", metavar="AMOUNT", help="What calls would cost at this fee."),
    ] = "",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg|png", help="Draw it too.")
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Replay past usage against other plans and thresholds: calls, fees, exposure, delay."""
    from meterd import config as configuration

    settings = configuration.load(configuration.find(config, os.environ), os.environ)
    if plot is not None:
        from meterd.cli import plots

        plots.ready(plot)
    options = _Options.of(settings, deposit, latency, pace, fee_per_call)
    history = _history(settings, files or [], place)
    if not history.past:
        raise WrongUse("there is no usage with a time; name a file of events, or another --store")
    bench = _Bench(settings, options, history, plan)
    variants = [Variant.as_configured(plan), *(Variant.of(spec) for spec in against or ())]
    bench.refuse_unknown(variants)
    with _progress(len(history.past)) as tell:
        results = [(variant.name, bench.run(variant, tell)) for variant in variants]
    if plot is not None:
        from meterd.cli import plots

        plots.draw(plot, results)
    notes = [*history.notes, *bench.notes, NOT_MODELLED]
    if as_json:
        print_json(_document(results, bench, options, notes))
    else:
        _print(results, bench, options, notes)


# -- What is asked -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Options:
    """Amounts in micros, times in ms."""

    deposit: int | None
    pace: int
    latency: int
    fee_per_call: int | None
    release_max: int
    quantum: int
    wallet_minimum: int

    @classmethod
    def of(
        cls, settings: Settings, deposit: str, latency: str, pace: str, fee_per_call: str
    ) -> _Options:
        from meterd.config.values import read_amount, read_duration

        escrow = settings.escrow
        return cls(
            _read("--deposit", read_amount, deposit) if deposit else None,
            _read("--pace", read_duration, pace).ms if pace else escrow.min_interval.ms,
            _read("--latency", read_duration, latency).ms,
            _read("--fee-per-call", read_amount, fee_per_call) if fee_per_call else None,
            escrow.release_max_micros,
            escrow.quantum_micros,
            settings.wallet.minimum_micros,
        )


def _read(name: str, reader: Callable[[object], Any], text: str) -> Any:
    """Read a value by the rules of the configuration. Raises `WrongUse`."""
    from pydantic_core import PydanticCustomError

    try:
        return reader(text)
    except PydanticCustomError as error:
        raise WrongUse(f"{plain(name)}: {error.message()}") from None


@dataclass(frozen=True, slots=True)
class Variant:
    """One thing to compare: another plan, other thresholds, or both.

    `thresholds`: those that take the place of all of the plan's; None: the plan's own.
    """

    name: str
    plan: str = ""
    thresholds: Mapping[str, int] | None = None
    least: int | None = None
    adaptive: bool = False

    @classmethod
    def as_configured(cls, plan: str) -> Variant:
        """The first one: what the others are held against."""
        return cls(f"plan={plan}" if plan else "as configured", plan)

    @classmethod
    def of(cls, spec: str) -> Variant:
        """Read `plan=stream,amount=0.50`. Raises `WrongUse`."""
        readers = _readers()
        named: dict[str, Any] = {}
        for part in spec.split(","):
            key, equals, value = (text.strip() for text in part.partition("="))
            known = key in {*readers, "plan"} if equals else key == "adaptive"
            if not known or key in named or (equals and not value):
                raise WrongUse(
                    f"--against {plain(spec)}: {plain(part) or 'nothing'} is no threshold; write"
                    f" some of adaptive, plan=NAME, {', '.join(f'{name}=…' for name in readers)}"
                )
            named[key] = _read(f"{key}={value}", readers[key], value) if key in readers else value
        plan, least = named.pop("plan", ""), named.pop("min_release", None)
        adaptive = "adaptive" in named or "exposure_max" in named
        named.pop("adaptive", None)
        asked = named if named or adaptive else None
        return cls(spec, plan, asked, least, adaptive)

    def settle_of(self, plan: Plan) -> Settle:
        """The thresholds of an agreement under a plan. Raises `WrongUse`."""
        own = plan.settle
        if self.least is not None:
            own = replace(own, min_release=self.least)
        if self.thresholds is None:
            return own
        asked: dict[str, Any] = dict.fromkeys(
            ("amount", "units", "interval", "escrow_percent", "exposure_max")
        )
        asked.update(self.thresholds)
        if self.adaptive and asked["exposure_max"] is None:
            asked["exposure_max"] = own.exposure_max
            if own.exposure_max is None:
                raise WrongUse(
                    f"--against {plain(self.name)}: plan {plan.name} names no exposure_max; write"
                    ' "adaptive,exposure_max=1.00"'
                )
        amount = asked["amount"]
        if amount is not None and amount < own.min_release:
            raise WrongUse(
                f"--against {plain(self.name)}: the amount is below min_release"
                f" ({format_amount(own.min_release)}) of plan {plan.name}, which holds it back;"
                f" write more, or add min_release={format_amount(amount)}"
            )
        return replace(own, **asked)


def _readers() -> dict[str, Callable[[object], Any]]:
    from meterd.config.values import read_amount, read_positive_duration, read_quantity, refuse

    def percent(value: object) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= 100):
            refuse("write a whole number from 1 to 100")
        return int(text[:4])

    return {
        "amount": read_amount,
        "units": read_quantity,
        "interval": lambda value: read_positive_duration(value).ms,
        "escrow_percent": percent,
        "exposure_max": read_amount,
        "min_release": read_amount,
    }


def _history(settings: Settings, files: Sequence[str], place: Path | None) -> History:
    from meterd import history, parts
    from meterd.cli.events import open_file

    if files and place is not None:
        raise WrongUse("name files of events or --store, not both")
    if not files:
        where = Path(settings.daemon.data_dir) if place is None else place
        return history.from_store(where, parts.meters_of(settings))
    name_of = {
        escrow: agreement.id
        for agreement in parts.agreements_of(settings)
        for _, escrow in agreement.escrows
    }
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_file(name)) for name in files]
        return history.from_lines((line for file in opened for line in file), name_of)


# -- What is done --------------------------------------------------------------------------------


class _Bench:
    """Runs variants; what a plan makes of the usage is reckoned once for all its thresholds."""

    def __init__(self, settings: Settings, options: _Options, history: History, plan: str) -> None:
        from meterd import parts

        self.plans, self.meters = parts.plans_of(settings), parts.meters_of(settings)
        self._options, self._history = options, history
        self.chosen = self._choose(
            plan, {each.id: each.plan for each in parts.agreements_of(settings)}
        )
        self._priced: dict[tuple[str, ...], Priced] = {}
        self.notes: list[str] = []

    def _choose(self, plan: str, configured: Mapping[str, str]) -> dict[str, str]:
        """Find the plan of each agreement that has usage. Raises `WrongUse`."""
        names = dict.fromkeys(item.event.agreement for item in self._history.past)
        self._known(plan)
        only = next(iter(self.plans)) if len(self.plans) == 1 else ""
        known = {**configured, **self._history.plans}
        chosen = {name: plan or known.get(name) or only for name in names if name}
        for name, found in chosen.items():
            if not found:
                raise WrongUse(
                    f"which plan {plain(name)[:80]} has is not known: name one for all, --plan"
                    f" {next(iter(self.plans), 'NAME')}"
                )
            self._known(found)
        return chosen

    def _known(self, plan: str) -> None:
        if plan and plan not in self.plans:
            known = ", ".join(sorted(self.plans)) or "none"
            raise WrongUse(f"there is no plan {plain(plan)[:80]!r}; known: {known}")

    def refuse_unknown(self, variants: Sequence[Variant]) -> None:
        """Find mistakes before the long run. Raises `WrongUse`."""
        for variant in variants:
            self._known(variant.plan)
            for plan in {variant.plan or name for name in self.chosen.values()}:
                variant.settle_of(self.plans[plan])

    def run(self, variant: Variant, progress: Callable[[int], None]) -> Outcome:
        """Price the usage, unless that was done, and settle it."""
        from meterd.core import simulate as core

        options = self._options
        service = core.Service(
            options.pace,
            options.latency,
            options.release_max,
            options.quantum,
            options.wallet_minimum,
        )
        priced = self._price(variant.plan, progress)
        lives = []
        for curve in priced.curves:
            thresholds = variant.settle_of(curve.plan)
            if options.deposit is None:
                deposit = dict(curve.plan.deposits).get(curve.roles[-1])
                thresholds = core.without_share(thresholds, deposit)
            lives.append(core.settle(curve, thresholds, service))
        return core.outcome(lives, FEE_BPS)

    def _price(self, plan: str, progress: Callable[[int], None]) -> Priced:
        from meterd.core import simulate as core

        chosen = {name: plan or own for name, own in self.chosen.items()}
        key = tuple(chosen.values())
        if key not in self._priced:
            past, deposit = self._history.past, self._options.deposit
            priced = core.price(self.plans, self.meters, chosen, past, deposit, progress)
            self._priced[key] = priced
            lost = sum(priced.rejected.values())
            if lost:
                under = f"plan {key[0]}" if len(set(key)) == 1 else "the plans"
                self.notes.append(
                    f"{lost:,} events have no price under {under} and are left out, the first:"
                    f" {priced.example}"
                )
        return self._priced[key]

    @property
    def events(self) -> int:
        """How many events the first variant counted."""
        return next(iter(self._priced.values())).events


@contextlib.contextmanager
def _progress(events: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, on a terminal alone."""
    from rich.console import Console
    from rich.progress import Progress

    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("simulating", total=events)

        def tell(done: int) -> None:
            if progress.tasks[0].finished:
                progress.reset(task)  # Another plan: from the beginning.
            progress.update(task, advance=done)

        yield tell


# -- What is printed -----------------------------------------------------------------------------

COLUMNS = (
    Column("variant", "variant"),
    Column("calls", "calls", "number"),
    Column("why", "why"),
    Column("charged", "charged", "number"),
    Column("fee 1 %", "fee", "number"),
)
FEE = Column("fee a call", "calls_fee", "number")
SPREADS = (
    Column("exposure mean", "exposure.mean", "number"),
    Column("95 %", "exposure.p95", "number"),
    Column("worst", "exposure.worst", "number"),
)
TOGETHER = Column("all at once", "together.worst", "number")
WAITS = (
    Column("to payment mean", "wait.mean", "number"),
    Column("95 %", "wait.p95", "number"),
    Column("worst", "wait.worst", "number"),
)

Results = Sequence[tuple[str, "Outcome"]]


def _print(results: Results, bench: _Bench, options: _Options, notes: Sequence[str]) -> None:
    several = len(bench.chosen) > 1
    columns = (
        *COLUMNS,
        *((FEE,) if options.fee_per_call is not None else ()),
        *SPREADS,
        *((TOGETHER,) if several else ()),
        *WAITS,
    )
    screen = console()
    rows = []
    for name, found in results:
        row = _figures(name, found, options, duration)
        row["why"] = ", ".join(f"{why} {count}" for why, count in found.whys)
        rows.append(row)
    agreements = f"{len(bench.chosen):,} agreement{'s' if several else ''}"
    screen.print(f"{bench.events:,} events of {agreements}")
    screen.print(table(columns, rows))
    for note in notes:
        say(note)


def _document(
    results: Results, bench: _Bench, options: _Options, notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "events": bench.events,
        "agreements": len(bench.chosen),
        "fee_bps": FEE_BPS,
        "latency_ms": options.latency,
        "min_interval_ms": options.pace,
        "variants": [_figures(name, found, options, lambda ms: ms) for name, found in results],
        "notes": list(notes),
    }


def _figures(
    name: str, found: Outcome, options: _Options, time: Callable[[int], str | int]
) -> dict[str, Any]:
    """One variant; amounts are texts, times are what `time` makes of milliseconds."""
    fee = options.fee_per_call
    unpaid = found.charged - found.paid
    return {
        "variant": name,
        "calls": found.releases,
        "why": dict(found.whys),
        "charged": format_amount(found.charged),
        "paid": format_amount(found.paid),
        "unpaid": format_amount(unpaid) if unpaid >= 0 else f"-{format_amount(-unpaid)}",
        "fee": format_amount(found.fee),
        "calls_fee": None if fee is None else format_amount(found.releases * fee),
        "exposure": _spread(found.exposure, format_amount),
        "together": _spread(found.together, format_amount),
        "wait": _spread(found.wait, time),
    }


def _spread(spread: Spread, words: Callable[[int], str | int]) -> dict[str, str | int]:
    return {name: words(getattr(spread, name)) for name in ("mean", "p95", "worst")}


def duration(ms: int) -> str:
    """Write a time as people say it, in its two largest units."""
    if ms < 60_000:
        return f"{ms // 1000}.{ms % 1000 // 100} s"
    minutes, seconds = divmod(ms // 1000, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


COMMANDS: dict[str, Callable[..., None]] = {"simulate": simulate}
