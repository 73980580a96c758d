"""The gate's question and its answers without a network, the same for both clients of it.

The rule kept here: a question that was not answered is not an answer. Whether a call is served
then is the program's own policy (`on_unreachable`), and the verdict says that it was not asked.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import msgspec

from meterd.sdk.failures import BadUsage, NotAnswered, Unreachable
from meterd.sdk.usage import Quantity, nanos_of, text_of_nanos
from meterd.sdk.wire import Reply

Policy = Literal["allow", "deny"]

AUTHORIZE = "/v1/authorize"
TIMEOUT_S = 2.0
TRIES = 2  # Of one question, within its time.
CAPTURE_TRIES = 4
HOLD_S_MAX = 86_400
PROBLEM = b"urn:meterd:problem:not-found"
_REFUSED = frozenset({400, 401, 403, 404, 405, 413, 415, 422})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate said of a call.

    allowed   serve it.
    reason    why not, or what is missing; "" where nothing is.
    headroom  what the payer can still use, in USDC, exact; None: not known.
    needed    the price of what was asked for, in USDC, exact; None: not known.
    hold      the hold that was made for it; "": none was.
    asked     False: meterd did not answer, and this is the program's own policy.
    """

    allowed: bool
    reason: str = ""
    headroom: Decimal | None = None
    needed: Decimal | None = None
    hold: str = ""
    asked: bool = True


class _Answer(msgspec.Struct):
    allowed: bool
    needed: Decimal
    headroom: Decimal | None = None
    reason: str = ""
    hold: str = ""


class _Refused(msgspec.Struct):
    reason: str
    detail: str = ""


class _Captured(msgspec.Struct):
    accepted: int
    rejected: list[_Refused]


@dataclass(frozen=True, slots=True)
class Question:
    """One question, whole: what is asked again is the same, under the same key."""

    agreement: str
    meter: str
    quantity: str
    dimensions: Mapping[str, str]
    hold_s: int | None
    key: str

    @property
    def body(self) -> bytes:
        """Write it as the body of a request."""
        document: dict[str, Any] = {
            "agreement": self.agreement,
            "meter": self.meter,
            "quantity": self.quantity,
            "dimensions": dict(self.dimensions),
        }
        if self.hold_s is not None:
            document["hold"] = self.hold_s
        return msgspec.json.encode(document)

    @property
    def headers(self) -> dict[str, str]:
        """The key under which meterd makes one hold, however often it is asked."""
        return {} if self.hold_s is None else {"Idempotency-Key": self.key}

    def read(self, reply: Reply, policy: Policy) -> Verdict:
        """Read what came back. Raises `NotAnswered`."""
        if reply.status in {200, 402} and (answer := _answer(reply.body)) is not None:
            return Verdict(
                answer.allowed,
                answer.reason,
                answer.headroom,
                answer.needed,
                answer.hold,
            )
        if reply.status == 404 and PROBLEM in reply.body:
            return Verdict(False, f"there is no agreement {self.agreement!r}")
        refuse(reply)
        allowed = policy == "allow"
        return Verdict(allowed, f"meterd did not answer: {reply.said}", asked=False)


def question(
    agreement: str,
    meter: str,
    quantity: Quantity,
    dimensions: Mapping[str, str] | None,
    hold_s: int | None,
    key: str | None,
) -> Question:
    """Make a question. Raises `BadUsage`."""
    nanos = nanos_of(quantity)
    if nanos == 0:
        raise BadUsage("a quantity of 0 needs no gate")
    if hold_s is not None and (type(hold_s) is not int or not 0 < hold_s <= HOLD_S_MAX):
        raise BadUsage(f"a hold lasts from 1 to {HOLD_S_MAX} whole seconds")
    made = key or f"ask_{secrets.token_hex(16)}"
    return Question(agreement, meter, text_of_nanos(nanos), dimensions or {}, hold_s, made)


def is_lost(reply: Reply) -> bool:
    """Whether nothing is known, so that the question may be put again at once."""
    return reply.status == 0 or reply.status in {408, 429} or reply.status >= 500


def refuse(reply: Reply) -> None:
    """Raise `NotAnswered` for a question that will be refused again."""
    if reply.status in _REFUSED:
        raise NotAnswered(f"meterd refused the question: {reply.said}", reply.status)


def capture_body(quantity: Quantity | None) -> bytes:
    """Write what a hold's work used; None: what was asked for. Raises `BadUsage`."""
    if quantity is None:
        return b"{}"
    return msgspec.json.encode({"quantity": text_of_nanos(nanos_of(quantity))})


def read_capture(reply: Reply, hold: str) -> None:
    """Read the answer to a capture. Raises `Unreachable` and `NotAnswered`."""
    if reply.status != 200:
        refuse(reply)
        raise Unreachable(f"the hold {hold} was not captured: {reply.said}")
    try:
        found = msgspec.json.decode(reply.body, type=_Captured)
    except (msgspec.MsgspecError, ValueError):
        raise Unreachable(f"the hold {hold}: 200, but the answer is not meterd's") from None
    if found.rejected:
        detail = f"{found.rejected[0].reason}: {found.rejected[0].detail}"
        raise NotAnswered(f"the usage of hold {hold} was rejected: {detail}", 200)


def _answer(body: bytes) -> _Answer | None:
    try:
        return msgspec.json.decode(body, type=_Answer)
    except (msgspec.MsgspecError, ValueError):
        return None
