"""What the middlewares share: who pays for a request, whether it is served, and what it used.

The rule kept here: a request is counted when it was served, once, and what the handler reported
comes before what the middleware assumes. An event that cannot be kept is logged as an error: the
customer has his answer by then.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

from meterd.sdk.failures import NotAnswered, Unreachable, UsageError
from meterd.sdk.gate import AsyncGate
from meterd.sdk.meter import Meter
from meterd.sdk.usage import Quantity, nanos_of, text_of_nanos
from meterd.sdk.verdicts import Verdict

log = logging.getLogger("meterd.sdk")

PROBLEM_JSON = "application/problem+json"
RETRY_AFTER_S = 1
_Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(slots=True)
class Usage:
    """What one request used, as its handler reports it.

    agreement  who pays for it.
    verdict    what the gate said of it.
    """

    agreement: str
    verdict: Verdict
    meter: str
    totals: dict[_Key, int] = field(default_factory=dict)
    reported: bool = False

    def add(
        self,
        quantity: Quantity,
        *,
        meter: str = "",
        dimensions: Mapping[str, str] | None = None,
    ) -> None:
        """Report that so much was used, instead of what the middleware would assume.

        meter  another than the middleware's. Reports of one meter and the same dimensions are
               summed up and told as one event; 0 alone: nothing is told.

        Raises `BadUsage`.
        """
        nanos = nanos_of(quantity)
        self.reported = True
        if nanos:
            key = (meter or self.meter, tuple(sorted((dimensions or {}).items())))
            self.totals[key] = self.totals.get(key, 0) + nanos


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served: a problem document (RFC 9457), its status and its headers."""

    status: int
    body: bytes
    headers: Mapping[str, str]


def refusal(status: int, kind: str, detail: str, **members: Any) -> Refusal:
    """Write a problem."""
    document = {
        "type": f"urn:meterd:problem:{kind}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **members,
    }
    headers = {"Content-Type": PROBLEM_JSON}
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return Refusal(status, msgspec.json.encode(document), headers)


@dataclass(frozen=True, slots=True)
class Serving:
    """The rules of one middleware."""

    gate: AsyncGate
    meter: Meter
    name: str
    quantity: Quantity
    dimensions: Mapping[str, str]
    hold_s: int | None

    async def admit(self, agreement: str | None) -> Usage | Refusal:
        """Ask the gate. Raises `NotAnswered` where meterd refuses the question itself."""
        if not agreement:
            return refusal(402, "no-agreement", "the request names nobody who pays for it")
        verdict = await self.gate.authorize(
            agreement, self.name, self.quantity, self.dimensions, hold=self.hold_s
        )
        if verdict.allowed:
            return Usage(agreement, verdict, self.name)
        if not verdict.asked:
            log.error("a request was refused because %s", verdict.reason)
            return refusal(503, "unavailable", "the meter cannot be asked now; try again")
        figures = {"headroom": verdict.headroom, "needed": verdict.needed}
        shown = {name: str(figure) for name, figure in figures.items() if figure is not None}
        return refusal(402, "payment-required", verdict.reason, **shown)

    async def over(self, usage: Usage, *, served: bool) -> None:
        """Tell what a request used; free what was set aside for it where that was nothing."""
        if served and not usage.reported:
            usage.add(self.quantity, dimensions=self.dimensions)
        hold = usage.verdict.hold
        for (name, dimensions), nanos in usage.totals.items():
            quantity, of = text_of_nanos(nanos), dict(dimensions)
            try:
                self.meter.emit(usage.agreement, name, quantity, dimensions=of, hold=hold)
                hold = ""
            except UsageError as error:
                log.error(
                    "%s %s of %s were used and are not counted: %s",
                    quantity,
                    name,
                    usage.agreement,
                    error,
                )
        if hold:
            with suppress(Unreachable, NotAnswered):
                await self.gate.void(hold)
