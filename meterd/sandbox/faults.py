"""Failures on request: which rule meets which request, and how an answer is spoiled.

The rule kept here: a fault is drawn before the request is decided, at most one of each phase for a
request, so that the operations log can note what the asker got to see. A rule with a probability
owns its seeded generator: the same seed and the same order of requests give the same faults. Faults
live in memory; a restart of the service clears them. A rule's `escrow_id` is the payer's agent id
where the call is about a wallet.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from meterd.core.money import format_amount, format_scaled, parse_amount
from meterd.sandbox.wire import BadRequest, read_amount

RULES_MAX = 1000
SPENT_MAX = 100  # Spent rules stay in the list, so that a test can see that its fault took place.
SECONDS_MAX = 86_400
FOREVER = -1


class Call(StrEnum):
    """The calls of the contract, as rules name them."""

    CREATE = "create"
    RELEASE = "release"
    RELEASE_PARTIAL = "release_partial"
    REFUND = "refund"
    DISPUTE = "dispute"
    RESOLVE = "resolve"
    GET = "get"
    LIST = "list"
    DEBIT = "debit"
    WALLET = "wallet"
    FAUCET = "faucet"


ANY = "*"


class Phase(StrEnum):
    """When a fault takes hold."""

    MODE = "mode"  # As long as it stands; never spent.
    VIEW = "view"  # Which state of an escrow a reading shows.
    REQUEST = "request"  # What becomes of a request and of its answer.
    NOW = "now"  # At once, when it is posted; no rule remains.


@dataclass(frozen=True, slots=True)
class Sort:
    """One kind of fault.

    Its phase, the call it meets unless told, whether money moves, and what it may be told.
    """

    phase: Phase
    call: str = ANY
    moves: bool = True
    takes: frozenset[str] = frozenset()
    count: int = 1


def _request(*takes: str, moves: bool = True, call: str = ANY) -> Sort:
    return Sort(Phase.REQUEST, call, moves, frozenset({"moves", *takes}))


KINDS: Mapping[str, Sort] = {
    # Nothing is done, or it is done and the asker does not learn of it.
    "error_500_before": _request("status", moves=False),
    "error_500_after": _request("status", "status_lag"),
    "close_before": _request(moves=False),
    "close_after": _request("status_lag"),
    "close_during_answer": _request(),
    "delay_answer": _request("seconds"),
    "land_late": Sort(
        Phase.REQUEST, Call.RELEASE_PARTIAL, moves=False, takes=frozenset({"seconds", "status"})
    ),
    "duplicate_delivery": Sort(Phase.REQUEST, Call.RELEASE_PARTIAL),
    # Refusals that a documented service makes.
    "rate_limit": _request("retry_after", moves=False),
    "conflict_409": _request("on_repeat", moves=False),
    "unauthorized_401": _request(moves=False),
    "redirect": _request("status", "location", moves=False),
    # Readings that are old.
    "stale_reads": Sort(Phase.VIEW, Call.GET, takes=frozenset({"seconds"}), count=FOREVER),
    "backwards_read": Sort(Phase.VIEW, Call.GET),
    # Answers that are not what the contract says.
    "numbers_instead_of_strings": _request(),
    "float_noise": _request("direction"),
    "extra_fields": _request(),
    "html_page": _request("status"),
    "truncated_json": _request(),
    "empty_200": _request(),
    "empty_object_200": _request(),
    "wrong_escrow_id": _request(),
    "endless_body": _request(),
    "echo_key_in_error": _request("status", moves=False),
    "released_above_total": _request(),
    # Somebody else's hand on the escrow.
    "foreign_release": Sort(Phase.NOW, takes=frozenset({"amount", "memo"})),
    "refund": Sort(Phase.NOW, takes=frozenset({"amount"})),
    "dispute": Sort(Phase.NOW),
    "expire": Sort(Phase.NOW),
    "auto_release": Sort(Phase.NOW),
    # How the service is meant to be.
    "honour_idempotency": Sort(Phase.MODE, count=FOREVER),
}

_COMMON = frozenset({"kind", "call", "escrow_id", "count", "skip", "probability", "seed"})
_DEFAULTS: Mapping[str, Any] = {"seconds": 5, "status_lag": 0}


@dataclass(slots=True)
class Rule:
    """One fault that was asked for, and how often it still strikes."""

    rule_id: int
    kind: str
    call: str
    escrow_id: str
    left: int  # FOREVER: no end.
    skip: int  # So many requests that fit are let through first.
    probability: float | None
    generator: random.Random
    told: Mapping[str, Any] = field(default_factory=dict)
    struck: int = 0

    @property
    def sort(self) -> Sort:
        """What is fixed for its kind."""
        return KINDS[self.kind]

    @property
    def moves(self) -> bool:
        """Whether the request is carried out all the same."""
        return bool(self.told.get("moves", self.sort.moves))

    def ms(self, name: str) -> int:
        """A duration that it was told, or the default of that name, in whole milliseconds."""
        return int(self.told.get(name, _DEFAULTS[name]) * 1000)

    def fits(self, call: Call, escrow_id: str | None) -> bool:
        """Whether it is meant for this request at all."""
        return self.call in (ANY, call) and self.escrow_id in (ANY, escrow_id)

    def strikes(self) -> bool:
        """Whether it takes this request, which it fits; counts down."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.probability is not None and self.generator.random() >= self.probability:
            return False
        self.struck += 1
        self.left -= self.left > 0
        return True

    def listed(self) -> dict[str, Any]:
        """The rule as `GET /_faults` shows it."""
        return {
            "id": self.rule_id,
            "kind": self.kind,
            "call": self.call,
            "escrow_id": self.escrow_id,
            "left": None if self.left == FOREVER else self.left,
            "struck": self.struck,
            "probability": self.probability,
            **self.told,
        }


class Faults:
    """The rules that stand, in the order in which they were asked for.

    The first that strikes is taken.
    """

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._spent: deque[Rule] = deque(maxlen=SPENT_MAX)
        self._made = 0

    def add(self, fields: Mapping[str, Any]) -> Rule:
        """Read a rule as `POST /_faults` takes it, and let it stand unless its phase is NOW.

        Raises `BadRequest`.
        """
        if len(self._rules) >= RULES_MAX:
            raise BadRequest("too_many_rules", f"at most {RULES_MAX} rules; DELETE /_faults clears")
        rule = _read_rule(fields, self._made + 1)
        self._made += 1
        if rule.sort.phase is not Phase.NOW:
            self._rules.append(rule)
        return rule

    def pick(self, phase: Phase, call: Call, escrow_id: str | None, *, repeat: bool) -> Rule | None:
        """The fault of this phase for a request.

        None: it goes well. `repeat`: its key was seen before.
        """
        for rule in self._rules:
            if rule.sort.phase is not phase or not rule.fits(call, escrow_id):
                continue
            if rule.told.get("on_repeat") and not repeat:
                continue
            if rule.strikes():
                self._retire(rule)
                return rule
        return None

    def honours(self, call: Call, escrow_id: str | None) -> bool:
        """Whether idempotency keys are honoured for this request."""
        return any(
            rule.sort.phase is Phase.MODE and rule.fits(call, escrow_id) for rule in self._rules
        )

    @property
    def wants_repeats(self) -> bool:
        """Whether some rule asks if a key was seen before."""
        return any(rule.told.get("on_repeat") for rule in self._rules)

    @property
    def wants_history(self) -> bool:
        """Whether some rule shows old states, so that many of them must be kept."""
        return any(rule.sort.phase is Phase.VIEW for rule in self._rules)

    def listed(self) -> list[dict[str, Any]]:
        """Every rule that stands, and the last of those that are spent."""
        return [rule.listed() for rule in (*self._spent, *self._rules)]

    def clear(self) -> None:
        """Let everything go well again."""
        self._rules.clear()
        self._spent.clear()

    def _retire(self, rule: Rule) -> None:
        if rule.left == 0:
            self._rules.remove(rule)
            self._spent.append(rule)


def _read_rule(fields: Mapping[str, Any], rule_id: int) -> Rule:
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise BadRequest("unknown_fault", "kind is one of: " + ", ".join(KINDS))
    sort = KINDS[kind]
    unknown = set(fields) - _COMMON - sort.takes
    if unknown:
        allowed = ", ".join(sorted(_COMMON | sort.takes))
        raise BadRequest("invalid_fault", f"{kind} takes only: {allowed}")
    probability = _read_probability(fields)
    return Rule(
        rule_id=rule_id,
        kind=kind,
        call=_read_call(fields, sort),
        escrow_id=_read_escrow(fields, sort),
        left=_read_count(fields, FOREVER if probability is not None else sort.count),
        skip=_read_number(fields, "skip", 0),
        probability=probability,
        generator=random.Random(_read_number(fields, "seed", 0)),  # noqa: S311 - No secret.
        told={name: _TOLD[name](fields) for name in sorted(sort.takes & set(fields))},
    )


def _read_call(fields: Mapping[str, Any], sort: Sort) -> str:
    call = fields.get("call", sort.call)
    if call != ANY and call not in tuple(Call):
        raise BadRequest("invalid_fault", "call is * or one of: " + ", ".join(Call))
    return str(call)


def _read_escrow(fields: Mapping[str, Any], sort: Sort) -> str:
    escrow_id = fields.get("escrow_id", ANY)
    if not isinstance(escrow_id, str):
        raise BadRequest("invalid_fault", "escrow_id is a text")
    if sort.phase is Phase.NOW and escrow_id == ANY:
        raise BadRequest("invalid_fault", "this fault needs the id of one escrow")
    return escrow_id


def _read_count(fields: Mapping[str, Any], default: int) -> int:
    if "count" in fields and fields["count"] is None:
        return FOREVER
    count = fields.get("count", default)
    if type(count) is not int or (count < 1 and count != FOREVER):
        raise BadRequest("invalid_fault", "count is a whole number from 1, or null for no end")
    return count


def _read_number(fields: Mapping[str, Any], name: str, default: int) -> int:
    number = fields.get(name, default)
    if type(number) is not int or number < 0:
        raise BadRequest("invalid_fault", f"{name} is a whole number from 0")
    return number


def _read_probability(fields: Mapping[str, Any]) -> float | None:
    probability = fields.get("probability")
    if probability is None:
        return None
    if type(probability) not in (int, float) or not 0 <= probability <= 1:
        raise BadRequest("invalid_fault", "probability is a number from 0 to 1")
    return float(probability)


def _read_seconds(name: str, fields: Mapping[str, Any]) -> float:
    seconds = fields[name]
    if type(seconds) not in (int, float) or not 0 <= seconds <= SECONDS_MAX:
        raise BadRequest("invalid_fault", f"{name} is a number from 0 to {SECONDS_MAX}")
    return float(seconds)


def _read_flag(name: str, fields: Mapping[str, Any]) -> bool:
    if not isinstance(fields[name], bool):
        raise BadRequest("invalid_fault", f"{name} is true or false")
    return bool(fields[name])


def _read_status(fields: Mapping[str, Any]) -> int:
    status = fields["status"]
    if type(status) is not int or not 200 <= status <= 599:
        raise BadRequest("invalid_fault", "status is a number from 200 to 599")
    return status


def _read_text(name: str, fields: Mapping[str, Any]) -> str:
    """Any text that a header can carry.

    An absurd `retry_after` is wanted, a broken header is not.
    """
    text = str(fields[name])
    if len(text) > 500 or not text.isascii() or not text.isprintable():
        raise BadRequest("invalid_fault", f"{name} is a short printable text")
    return text


def _read_direction(fields: Mapping[str, Any]) -> str:
    if fields["direction"] not in ("up", "down"):
        raise BadRequest("invalid_fault", 'direction is "up" or "down"')
    return str(fields["direction"])


_TOLD: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "moves": lambda fields: _read_flag("moves", fields),
    "on_repeat": lambda fields: _read_flag("on_repeat", fields),
    "seconds": lambda fields: _read_seconds("seconds", fields),
    "status_lag": lambda fields: _read_seconds("status_lag", fields),
    "status": _read_status,
    "retry_after": lambda fields: _read_text("retry_after", fields),
    "location": lambda fields: _read_text("location", fields),
    "memo": lambda fields: _read_text("memo", fields),
    "direction": _read_direction,
    "amount": lambda fields: format_amount(read_amount(fields)),
}

_MONEY = frozenset(
    {
        *("amount", "released_amount", "remaining", "refunded_amount", "fee", "balance", "debited"),
        *("net_released_amount", "gross_amount", "net_amount"),
    }
)
_NOISE_DECIMALS = 15
Answer = dict[str, Any]


def spoiled(kind: str, answer: Answer, told: Mapping[str, Any]) -> Answer:
    """The answer as this kind of fault has it.

    Kinds that do not touch its fields leave it as it is.
    """
    spoil = _SPOILS.get(kind)
    return answer if spoil is None else spoil(answer, told)


def _as_floats(answer: Answer, told: Mapping[str, Any]) -> Answer:
    noise = 1 if told.get("direction", "up") == "up" else -2
    return _with_amounts(answer, lambda micros: _noisy(micros, noise))


def _with_more(answer: Answer, _: Mapping[str, Any]) -> Answer:
    return {"api_version": "9", **answer, "data": {"escrow": {}}, "fees": [{"bps": 100}, None]}


def _of_another(answer: Answer, _: Mapping[str, Any]) -> Answer:
    """The answer as if it were about another escrow, or another agent's wallet."""
    if "debited" in answer:
        return {**answer, "agent_id": "agent_AAAAAAAAAAAAAAAAAAAAAA"}
    return {**answer, "escrow_id": "esc_AAAAAAAAAAAAAAAAAAAAAAAA"}


def _too_much(answer: Answer, _: Mapping[str, Any]) -> Answer:
    """More paid than there was, or than was debited."""
    if "debited" in answer:
        return {**answer, "debited": format_amount(parse_amount(answer["debited"]) + 1_000_000)}
    if "amount" in answer:
        above = format_amount(parse_amount(answer["amount"]) + 1_000_000)
        return {**answer, "released_amount": above, "remaining": "0.00"}
    return answer


_SPOILS: Mapping[str, Callable[[Answer, Mapping[str, Any]], Answer]] = {
    "numbers_instead_of_strings": lambda answer, _: _with_amounts(
        answer, lambda micros: format_scaled(micros, 6)
    ),
    "float_noise": _as_floats,
    "extra_fields": _with_more,
    "wrong_escrow_id": _of_another,
    "released_above_total": _too_much,
}


def _with_amounts(answer: Answer, write: Callable[[int], str]) -> Answer:
    return {name: _as_number(name, value, write) for name, value in answer.items()}


def _as_number(name: str, value: Any, write: Callable[[int], str]) -> Any:
    """An amount of money, however deep, as a JSON number of the digits that `write` gives."""
    if isinstance(value, dict):
        return _with_amounts(value, write)
    if isinstance(value, list):
        return [_as_number("", item, write) for item in value]
    if name in _MONEY and isinstance(value, str):
        return msgspec.Raw(write(parse_amount(value)).encode())
    return value


def _noisy(micros: int, noise: int) -> str:
    """What a float makes of an amount.

    14.85 becomes 14.850000000000001 or 14.849999999999998; 0 stays.
    """
    if micros == 0:
        return "0.0"
    return format_scaled(micros * 10 ** (_NOISE_DECIMALS - 6) + noise, _NOISE_DECIMALS)
