"""What must agree between two tables of the configuration.

The rule: a check looks only at tables that are good by themselves and at the names that were given,
so that one bad rate neither hides a second mistake nor makes a third one up (a plan that has a
mistake still exists).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from meterd.config.settings import (
    AgreementSettings,
    EscrowSettings,
    HttpSettings,
    MqttSourceSettings,
    PlanSettings,
    RateSettings,
    RedisSourceSettings,
    SettleSettings,
    nearest,
)
from meterd.core import money
from meterd.errors import Mistake

Place = tuple[str | int, ...]
Source = RedisSourceSettings | MqttSourceSettings


# What is said of each contradiction: what is wrong, and what to write instead.
OPEN_WITHOUT_TOKENS = (
    "{listen} is open to other machines and no token is configured;"
    ' write "127.0.0.1:{port}", or give http.tokens'
)
OPEN_WITHOUT_TLS = (
    "{listen} is open to other machines, where tokens would travel in the clear; put a TLS proxy"
    ' in front and write behind_proxy = true, or listen = "127.0.0.1:{port}"'
)
TOKENS_NAMED_ALIKE = 'an earlier token is named "{name}" too; write another name'
TOKENS_ALIKE = "is the token of an earlier entry too; write one of its own"
SAME_SOURCE_NAME = 'sources[{first}] is named "{name}" too; write another name'
SAME_CLIENT_ID = (
    'sources[{first}] is "{client_id}" at the same broker too, which lets only one of them in;'
    " write another client_id"
)
NEVER_MATCHES = (
    "never matches, since rates[{first}] of the same meter takes every event that it would;"
    " put the one with more in `where` first, or remove one"
)
STREAM_WITHOUT_THRESHOLD = (
    "a streaming plan is paid in batches; write at least one of units, interval and amount,"
    ' such as settle = { units = 100, interval = "60s" }'
)
PLAN_WITHOUT_THRESHOLD = (
    "has no threshold, so nothing would be paid before the deadline; write at least one of"
    ' amount, units, interval and escrow_percent, such as settle = { amount = "0.50" }'
)
MIN_ABOVE_MAX = (
    "is above escrow.release_max ({release_max}), so nothing could be released;"
    " lower it, or raise escrow.release_max"
)
SAME_ESCROW = (
    'agreements[{first}] draws on "{escrow}" too; an escrow has one agreement, so write another'
)
SAME_ID = 'agreements[{first}] has the id "{id}" too; write another id'
ID_IS_ESCROW = '"{id}" is the escrow of agreements[{owner}]; write another id'
TOO_CLOSE_TO_DEADLINE = (
    "{asked} leaves no time to resolve a doubt, so meterd settles twice"
    " escrow.in_doubt_quarantine ({quarantine}) before the deadline all the same"
)


@dataclass(frozen=True, slots=True)
class Good:
    """The tables that are good by themselves, by their place, and the names that were given."""

    meter_names: frozenset[str]
    plan_names: frozenset[str]
    http: HttpSettings | None = None
    escrow: EscrowSettings | None = None
    sources: Mapping[int, Source] = field(default_factory=dict)
    plans: Mapping[str, PlanSettings] = field(default_factory=dict)
    agreements: Mapping[int, AgreementSettings] = field(default_factory=dict)


def key_of(place: Place) -> str:
    """Write a place as TOML would: `plans.stream.rates[0].price`; odd names in quotes."""
    key = ""
    for part in place:
        if isinstance(part, int):
            key += f"[{part}]"
        else:
            key += ("." if key else "") + _key_part(part)
    return key


_BARE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
KEY_CHARS_MAX = 128


def _key_part(part: str) -> str:
    if part and _BARE.issuperset(part):
        return part[:KEY_CHARS_MAX]
    quoted = part[:KEY_CHARS_MAX].replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted) + '"'


def mistakes_between(good: Good) -> Iterator[Mistake]:
    """Yield every contradiction between tables, with what to write instead."""
    for check in CHECKS:
        for place, sentence in check(good):
            yield Mistake(key_of(place), sentence)


def notes_on(good: Good) -> Iterator[Mistake]:
    """Yield what is allowed but deserves a word at start."""
    for name, plan in good.plans.items():
        if good.escrow is not None:
            yield from _deadline_note(name, plan.settle, good.escrow)


def _deadline_note(name: str, settle: SettleSettings, escrow: EscrowSettings) -> Iterator[Mistake]:
    usual = SettleSettings.model_fields["before_deadline"].default
    asked = settle.before_deadline
    if asked != usual and asked.ms < 2 * escrow.in_doubt_quarantine.ms:
        sentence = TOO_CLOSE_TO_DEADLINE.format(asked=asked, quarantine=escrow.in_doubt_quarantine)
        yield Mistake(key_of(("plans", name, "settle", "before_deadline")), sentence)


Found = Iterator[tuple[Place, str]]


def _listen_is_guarded(good: Good) -> Found:
    """A port that others can reach wants tokens, and somebody who speaks TLS in front."""
    if good.http is None or good.http.listen.is_loopback:
        return
    listen = good.http.listen
    if not good.http.tokens:
        yield ("http", "listen"), OPEN_WITHOUT_TOKENS.format(listen=listen, port=listen.port)
    if not good.http.behind_proxy:
        yield ("http", "behind_proxy"), OPEN_WITHOUT_TLS.format(listen=listen, port=listen.port)


def _tokens_differ(good: Good) -> Found:
    tokens = good.http.tokens if good.http is not None else ()
    for index, entry in enumerate(tokens):
        place: Place = ("http", "tokens", index)
        earlier = tokens[:index]
        if entry.name in {other.name for other in earlier}:
            yield (*place, "name"), TOKENS_NAMED_ALIKE.format(name=entry.name)
        if entry.token in {other.token for other in earlier}:
            yield (*place, "token"), TOKENS_ALIKE


def _sources_differ(good: Good) -> Found:
    names: dict[str, int] = {}
    for index, source in good.sources.items():
        first = names.setdefault(source.name, index)
        if first != index:
            yield (
                ("sources", index, "name"),
                SAME_SOURCE_NAME.format(first=first, name=source.name),
            )


def _sessions_differ(good: Good) -> Found:
    """A broker cuts off a client when another one comes with its id."""
    sessions: dict[tuple[str, int, str], int] = {}
    for index, source in good.sources.items():
        if not isinstance(source, MqttSourceSettings):
            continue
        first = sessions.setdefault((source.host, source.port, source.client_id), index)
        if first != index:
            yield (
                ("sources", index, "client_id"),
                SAME_CLIENT_ID.format(first=first, client_id=source.client_id),
            )


def _rates_have_meters(good: Good) -> Found:
    for place, _, rate in _rates(good):
        if rate.meter not in good.meter_names:
            yield (*place, "meter"), _missing("meter", rate.meter, good.meter_names)


def _rates_can_match(good: Good) -> Found:
    """The first match wins: a rate behind a wider one of its meter never prices anything."""
    for place, earlier, rate in _rates(good):
        for first, other in enumerate(earlier):
            if other.meter == rate.meter and other.where.items() <= rate.where.items():
                yield place, NEVER_MATCHES.format(first=first)
                break


def _rates(
    good: Good,
) -> Iterator[tuple[Place, Sequence[RateSettings], RateSettings]]:
    """Yield each rate with its place and those that come before it in its plan."""
    for name, plan in good.plans.items():
        for index, rate in enumerate(plan.rates):
            yield ("plans", name, "rates", index), plan.rates[:index], rate


def _plans_settle(good: Good) -> Found:
    """Something other than the deadline must make money move; a stream wants steady batches."""
    for name, plan in good.plans.items():
        settle = plan.settle
        place: Place = ("plans", name, "settle")
        if settle.amount_micros or settle.units_nanos or settle.interval is not None:
            continue
        if plan.pattern == "streaming":
            yield place, STREAM_WITHOUT_THRESHOLD
        elif settle.escrow_percent is None:
            yield place, PLAN_WITHOUT_THRESHOLD


def _release_max_lets_plans_settle(good: Good) -> Found:
    if good.escrow is None:
        return
    release_max = good.escrow.release_max_micros
    for name, plan in good.plans.items():
        if plan.settle.min_release_micros > release_max:
            sentence = MIN_ABOVE_MAX.format(release_max=money.format_amount(release_max))
            yield ("plans", name, "settle", "min_release"), sentence


def _agreements_have_plans(good: Good) -> Found:
    for index, agreement in good.agreements.items():
        if agreement.plan not in good.plan_names:
            yield ("agreements", index, "plan"), _missing("plan", agreement.plan, good.plan_names)


def _missing(what: str, name: str, known: Collection[str]) -> str:
    return f'there is no {what} "{name}"; write [{what}s.{_key_part(name)}]; {nearest(name, known)}'


def _escrows_differ(good: Good) -> Found:
    escrows: dict[str, int] = {}
    for index, agreement in good.agreements.items():
        escrow = agreement.escrows.main
        first = escrows.setdefault(escrow, index)
        if first != index:
            yield (
                ("agreements", index, "escrows", "main"),
                SAME_ESCROW.format(first=first, escrow=escrow),
            )


def _agreement_ids_differ(good: Good) -> Found:
    """An event may name an agreement or its escrow, so no id may mean two agreements."""
    ids: dict[str, int] = {}
    owners = {agreement.escrows.main: index for index, agreement in good.agreements.items()}
    for index, agreement in good.agreements.items():
        place: Place = ("agreements", index, "id")
        first = ids.setdefault(agreement.id, index)
        owner = owners.get(agreement.id)
        if owner is None and first != index:
            yield place, SAME_ID.format(first=first, id=agreement.id)
        elif owner is not None and agreement.escrows.main != agreement.id:
            yield place, ID_IS_ESCROW.format(owner=owner, id=agreement.id)


CHECKS: tuple[Callable[[Good], Found], ...] = (
    _listen_is_guarded,
    _tokens_differ,
    _sources_differ,
    _sessions_differ,
    _rates_have_meters,
    _rates_can_match,
    _plans_settle,
    _release_max_lets_plans_settle,
    _agreements_have_plans,
    _escrows_differ,
    _agreement_ids_differ,
)
