"""`@metered`: what a function or a stream gave is counted by what came out of it.

The rule kept here: what was handed over is counted, once, however it ended. A stream is told of
when it is over: read to its end, closed by a consumer who had enough, cancelled because the client
went away, or broken off by an error of its own.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from meterd.sdk.failures import BadUsage, Denied, NotAnswered, Unreachable
from meterd.sdk.gate import HOLD_S, AsyncGate, Gate
from meterd.sdk.meter import Meter
from meterd.sdk.usage import Quantity, nanos_of, text_of_nanos
from meterd.sdk.verdicts import Verdict

log = logging.getLogger("meterd.sdk")

F = TypeVar("F", bound=Callable[..., Any])
Agreement = str | Callable[..., str] | ContextVar[str]
Dimensions = Mapping[str, str] | Callable[[Any], Mapping[str, str]]


def metered(
    meter: Meter,
    name: str,
    *,
    agreement: Agreement,
    quantity: Callable[[Any], Quantity | None] | None = None,
    count: str = "",
    dimensions: Dimensions | None = None,
    chunks: Literal["sum", "last"] = "sum",
    on_error: Literal["count", "forget"] = "count",
    gate: Gate | AsyncGate | None = None,
    estimate: Quantity = 1,
    hold: int = HOLD_S,
) -> Callable[[F], F]:
    """Count what a function, a coroutine function, a generator or an async generator gives.

    meter       whom it is told.
    name        the meter of the plan, such as "tokens".
    agreement   who pays: the name of a parameter of the function, a function of the same
                parameters, or a `ContextVar`. It is looked at when the function is called.
    quantity    how much a result, or each chunk of a stream, is; None: nothing.
    count       the same as a path, such as "usage.output_tokens": attributes or keys; where it
                leads nowhere, the chunk counts nothing. Neither of both: each counts 1.
    dimensions  what the price looks at, fixed, or a function of the result or the chunk. One event
                is told for each set of them.
    chunks      "sum" of the chunks, or the "last" that counts, for streams that tell a running
                total.
    on_error    what was given before an error of the function itself: "count" it, or "forget" it.
                A stream that the consumer ends is always counted.
    gate        asked before for a hold of `estimate` for `hold` seconds, which the usage captures;
                an `AsyncGate` for what is awaited, else a `Gate`. Raises `Denied` for a no.

    Raises `BadUsage` where it is applied for what cannot be meant, and at the call for a quantity
    that is none.
    """

    def applied(function: F) -> F:
        rule = _Rule(
            meter=meter,
            name=name,
            agreement=_payer(function, agreement),
            quantity=_amount(quantity, count),
            dimensions=dimensions if callable(dimensions) else (lambda _: fixed),
            sums=chunks == "sum",
            counts_errors=on_error == "count",
            gate=gate,
            estimate=estimate,
            hold_s=hold,
        )
        return cast(F, _wrapped(function, rule))

    if chunks not in {"sum", "last"} or on_error not in {"count", "forget"}:
        raise BadUsage('chunks is "sum" or "last", on_error "count" or "forget"')
    fixed: Mapping[str, str] = {} if dimensions is None or callable(dimensions) else dimensions
    return applied


@dataclass(frozen=True, slots=True)
class _Rule:
    """What `metered` was told, made ready."""

    meter: Meter
    name: str
    agreement: Callable[[tuple[Any, ...], dict[str, Any]], str]
    quantity: Callable[[Any], Quantity | None]
    dimensions: Callable[[Any], Mapping[str, str]]
    sums: bool
    counts_errors: bool
    gate: Gate | AsyncGate | None
    estimate: Quantity
    hold_s: int

    def begin(self, args: tuple[Any, ...], named: dict[str, Any]) -> _Tally:
        return _Tally(self, self.agreement(args, named))

    def counts(self, error: BaseException) -> bool:
        """Whether what was given before this error is counted.

        `GeneratorExit` and a cancellation are no `Exception`: they come from the consumer.
        """
        return self.counts_errors or not isinstance(error, Exception)


@dataclass(slots=True)
class _Tally:
    """One call while it runs: how much it gave, in nanos, by its dimensions."""

    rule: _Rule
    agreement: str
    hold: str = ""
    totals: dict[tuple[tuple[str, str], ...], int] = field(default_factory=dict)

    def add(self, given: Any) -> None:
        """Count a result or a chunk. Raises `BadUsage`."""
        quantity = self.rule.quantity(given)
        nanos = 0 if quantity is None else nanos_of(quantity)
        if nanos:
            key = tuple(sorted(self.rule.dimensions(given).items()))
            before = self.totals.get(key, 0) if self.rule.sums else 0
            self.totals[key] = before + nanos

    def admitted(self, verdict: Verdict) -> None:
        """Take the gate's answer. Raises `Denied`."""
        if not verdict.allowed:
            raise Denied(verdict)
        self.hold = verdict.hold

    def tell(self) -> None:
        """Tell the meter: one event for each set of dimensions; the first captures the hold."""
        for key, nanos in self.totals.items():
            hold, self.hold = self.hold, ""
            quantity = text_of_nanos(nanos)
            self.rule.meter.emit(
                self.agreement, self.rule.name, quantity, dimensions=dict(key), hold=hold
            )

    def end(self, error: BaseException | None) -> None:
        """Tell what is to be told; what remains of the hold is to be voided."""
        if error is None or self.rule.counts(error):
            self.tell()
        if error is None and not self.totals:
            log.warning(
                "%s of %s came to an end and nothing was counted: see its quantity or count",
                self.rule.name,
                self.agreement,
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a function that waits runs."""
        gate = self.rule.gate
        if isinstance(gate, Gate):
            estimate, seconds = self.rule.estimate, self.rule.hold_s
            self.admitted(gate.authorize(self.agreement, self.rule.name, estimate, hold=seconds))
        try:
            with self._ended():
                yield
        finally:
            if self.hold and isinstance(gate, Gate):
                with suppress(Unreachable, NotAnswered):
                    gate.void(self.hold)

    @asynccontextmanager
    async def awaited(self) -> AsyncIterator[None]:
        """While a function that is awaited runs."""
        gate = self.rule.gate
        if isinstance(gate, AsyncGate):
            estimate, seconds = self.rule.estimate, self.rule.hold_s
            self.admitted(
                await gate.authorize(self.agreement, self.rule.name, estimate, hold=seconds)
            )
        try:
            with self._ended():
                yield
        finally:
            if self.hold and isinstance(gate, AsyncGate):
                with suppress(Unreachable, NotAnswered):
                    await gate.void(self.hold)

    @contextmanager
    def _ended(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise
        self.end(None)


def _wrapped(function: Callable[..., Any], rule: _Rule) -> Callable[..., Any]:
    awaited = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    if rule.gate is not None and isinstance(rule.gate, AsyncGate) != awaited:
        raise BadUsage("what is awaited wants an AsyncGate, everything else a Gate")
    if inspect.isasyncgenfunction(function):
        made = _async_stream
    elif inspect.iscoroutinefunction(function):
        made = _coroutine
    elif inspect.isgeneratorfunction(function):
        made = _stream
    else:
        made = _function
    return functools.wraps(function)(made(function, rule))


def _function(function: Callable[..., Any], rule: _Rule) -> Callable[..., Any]:
    def called(*args: Any, **named: Any) -> Any:
        tally = rule.begin(args, named)
        with tally.running():
            result = function(*args, **named)
            tally.add(result)
        return result

    return called


def _coroutine(function: Callable[..., Any], rule: _Rule) -> Callable[..., Any]:
    async def called(*args: Any, **named: Any) -> Any:
        tally = rule.begin(args, named)
        async with tally.awaited():
            result = await function(*args, **named)
            tally.add(result)
        return result

    return called


def _stream(function: Callable[..., Any], rule: _Rule) -> Callable[..., Any]:
    def called(*args: Any, **named: Any) -> Iterator[Any]:
        return streamed(rule.begin(args, named), args, named)

    def streamed(tally: _Tally, args: tuple[Any, ...], named: dict[str, Any]) -> Iterator[Any]:
        with tally.running(), closing(function(*args, **named)) as inner:
            for chunk in inner:
                tally.add(chunk)
                yield chunk

    return called


def _async_stream(function: Callable[..., Any], rule: _Rule) -> Callable[..., Any]:
    def called(*args: Any, **named: Any) -> AsyncIterator[Any]:
        return streamed(rule.begin(args, named), args, named)

    async def streamed(
        tally: _Tally, args: tuple[Any, ...], named: dict[str, Any]
    ) -> AsyncIterator[Any]:
        async with tally.awaited(), aclosing(function(*args, **named)) as inner:
            async for chunk in inner:
                tally.add(chunk)
                yield chunk

    return called


def _payer(
    function: Callable[..., Any], agreement: Agreement
) -> Callable[[tuple[Any, ...], dict[str, Any]], str]:
    """Make what finds out who pays for a call."""
    if isinstance(agreement, ContextVar):
        return lambda _args, _named: agreement.get()
    if callable(agreement):
        return lambda args, named: agreement(*args, **named)
    signature, parameter = inspect.signature(function), agreement
    if parameter not in signature.parameters:
        raise BadUsage(
            f"agreement: {function.__qualname__} has no parameter {parameter!r}; a fixed one is"
            f" written agreement=lambda *_, **__: {parameter!r}"
        )

    def from_the_call(args: tuple[Any, ...], named: dict[str, Any]) -> str:
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        return str(bound.arguments[parameter])

    return from_the_call


def _amount(
    quantity: Callable[[Any], Quantity | None] | None, count: str
) -> Callable[[Any], Quantity | None]:
    if quantity is not None and count:
        raise BadUsage("say quantity or count, not both")
    if quantity is not None:
        return quantity
    if not count:
        return lambda _: 1
    names = count.split(".")
    return lambda given: cast(Quantity | None, functools.reduce(_inside, names, given))


def _inside(thing: Any, name: str) -> Any:
    """What a thing has under a name, as a key or as an attribute; None: nothing."""
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
