"""What must agree between two tables of the configuration.

The rule: a check looks only at tables that are good by themselves and at the names that were given,
so that one bad rate neither hides a second mistake nor makes a third one up (a plan that has a
mistake still exists).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from meterd.config.patterns import mistakes_in, period_mistakes, rates_of, release_mistakes
from meterd.config.plans import PATTERNS_OF, PlanSettings, RateSettings, SettleSettings
from meterd.config.settings import (
    AgreementSettings,
    DiscoverSettings,
    EscrowSettings,
    HttpSettings,
    MeterSettings,
    MqttSourceSettings,
    ProducerSettings,
    RedisSourceSettings,
    WalletSettings,
)
from meterd.config.table import Found, Place, nearest
from meterd.core import money
from meterd.errors import Mistake

Source = RedisSourceSettings | MqttSourceSettings


# What is said of each contradiction: what is wrong, and what to write instead.
OPEN_WITHOUT_TOKENS = (
    "{listen} is open to other machines and no token is configured;"
    ' write "127.0.0.1:{port}", or give http.tokens'
)
OPEN_WITHOUT_TLS = (
    "{listen} is open to other machines, where tokens would travel in the clear; write"
    " tls_cert_file and tls_key_file, or put a TLS proxy in front and write behind_proxy = true, or"
    ' listen = "127.0.0.1:{port}"'
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
MIN_ABOVE_MAX = (
    "is above escrow.release_max ({release_max}), so nothing could be released;"
    " lower it, or raise escrow.release_max"
)
SAME_ESCROW = (
    'agreements[{first}] draws on "{escrow}" too; what is drawn on has one agreement and one role,'
    " so write another"
)
OWN_METER = "is a name of meterd's own; write one that does not begin with meterd."
OWN_RATE = "is counted and priced by meterd itself; remove the rate, or name a meter of [meters]"
OWN_TYPE = "is a type of meterd's own, which feeds no meter; write the type of your events"
NO_VALUE = (
    'is required: {aggregation} needs a value of each event of type "{event_type}"; write where it'
    ' stands, such as value = "$.usage.total_tokens"'
)
NEVER_FED = (
    'is "", so no event feeds the meter by {keys}; write event_type = "completion", or remove'
    " {keys}"
)
DYNAMIC_SUM = (
    'sums what each event costs, which is nothing for a meter with aggregation = "{aggregation}";'
    " write another model"
)
OTHER_ROLES = 'plan "{plan}" draws on {roles}; write escrows = {{ {example} }}'
WITHOUT_AGENT = (
    "is required by [[discover]], which asks for the escrows of this agent; write the provider's id"
)
PAYER_WITHOUT_AGENT = (
    "is required beside payer_api_key: escrows are locked for this agent and found again in its"
    " list; write the provider's id"
)
RENEWS_WITHOUT_KEY = (
    "locks the payer's money, so it needs his key; write escrow.payer_api_key_file, or remove it"
)
ROLES_NOT_DISCOVERED = (
    'a found escrow is bound as main, but plan "{plan}" draws on {roles}; name another plan, or'
    " bind its agreements in [[agreements]]"
)
SAME_MEMO = "discover[{first}] takes every escrow with this memo; write another memo"
NOT_CARRIED = (
    'events of type "{event_type}" carry no {dimension}; name it in meters.{meter}.dimensions, such'
    ' as dimensions = {{ {dimension} = "$.{dimension}" }}'
)
NEVER_PRICED = "no plan has a rate for it, so events that name it are rejected"
PAID_IN_PIECES = (
    "is above escrow.release_max ({release_max}), so it is paid in several releases, as far apart"
    " as escrow.min_interval"
)
NOT_LOCKED = (
    "{amount} is below 1.00, the least that the usual escrow service locks; meterd open may be"
    " refused"
)
AUTO_UNKNOWN = (
    '"auto" leaves the fee to the service, and escrow.on_deadline = "unknown"; write "provider"'
    " there if the service pays the provider"
)
SAME_PRODUCER = 'producers[{first}] is named "{name}" too; write another name'
ONE_COMES_WITH = (
    "is the token of producers[{first}] too, so nobody could tell them apart; write another"
)
ONE_SIGNS_WITH = "is a key of producers[{first}] too; make one of its own"
COMES_WITH_NOTHING = 'there is no token "{token}" in http.tokens; {nearest}'
MAY_NOT_SEND = 'the token "{token}" may not send usage; give it the scope ingest in http.tokens'
NO_SUCH_SOURCE = 'there is no source "{source}" in [[sources]]; {nearest}'
SHARED_SOURCE = (
    'producers[{first}] sends over "{source}" too, so both need a key to be told apart; write'
    " secret_file for each, or a source of its own"
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
    wallet: WalletSettings | None = None
    meters: Mapping[str, MeterSettings] = field(default_factory=dict)
    sources: Mapping[int, Source] = field(default_factory=dict)
    source_names: frozenset[str] = frozenset()
    producers: Mapping[int, ProducerSettings] = field(default_factory=dict)
    plans: Mapping[str, PlanSettings] = field(default_factory=dict)
    agreements: Mapping[int, AgreementSettings] = field(default_factory=dict)
    discover: Mapping[int, DiscoverSettings] = field(default_factory=dict)


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
            for place, sentence in _plan_notes(plan, good.escrow):
                yield Mistake(key_of(("plans", name, *place)), sentence)
    for place, _, rate in _rates(good):
        yield from _dimension_notes(place, rate, good.meters.get(rate.meter))
    if good.plans:
        for name in sorted(good.meter_names - _priced(good)):
            yield Mistake(key_of(("meters", name)), NEVER_PRICED)


def _plan_notes(plan: PlanSettings, escrow: EscrowSettings) -> Found:
    release_max = escrow.release_max_micros
    in_pieces = PAID_IN_PIECES.format(release_max=money.format_amount(release_max))
    if plan.fee_max > release_max:
        yield ("fee",), in_pieces
    for index, tranche in enumerate(plan.tranches):
        if tranche.amount_micros > release_max:
            yield ("tranches", index, "amount"), in_pieces
    if plan.steps and (plan.deposit_micros or 0) > release_max:
        yield ("deposit",), in_pieces
    if plan.at_period_end == "auto" and escrow.on_deadline == "unknown":
        yield ("at_period_end",), AUTO_UNKNOWN
    for role, amount in plan.deposits:
        if amount < LOCKED_MIN:
            key = "fee" if role == "base" or not plan.wrote("deposit") else "deposit"
            key = "tranches" if plan.tranches and key == "fee" else key
            yield (key,), NOT_LOCKED.format(amount=money.format_amount(amount))


def _dimension_notes(
    place: Place, rate: RateSettings, meter: MeterSettings | None
) -> Iterator[Mistake]:
    """What a rate asks for must come out of the events, where the meter says what comes out."""
    if meter is None or not meter.event_type:
        return
    for dimension in rate.where:
        if dimension not in meter.dimensions:
            sentence = NOT_CARRIED.format(
                event_type=meter.event_type, dimension=dimension, meter=rate.meter
            )
            yield Mistake(key_of((*place, "where", dimension)), sentence)


LOCKED_MIN = money.MICROS  # What the service's documents say.


def _priced(good: Good) -> set[str]:
    """The meters that a rate or a quota names."""
    quotas = {plan.quota.meter for plan in good.plans.values() if plan.quota is not None}
    return quotas | {rate.meter for _, _, rate in _rates(good)}


def _deadline_note(name: str, settle: SettleSettings, escrow: EscrowSettings) -> Iterator[Mistake]:
    usual = SettleSettings.model_fields["before_deadline"].default
    asked = settle.before_deadline
    if asked != usual and asked.ms < 2 * escrow.in_doubt_quarantine.ms:
        sentence = TOO_CLOSE_TO_DEADLINE.format(asked=asked, quarantine=escrow.in_doubt_quarantine)
        yield Mistake(key_of(("plans", name, "settle", "before_deadline")), sentence)


def _listen_is_guarded(good: Good) -> Found:
    """A port that others can reach wants tokens, and TLS: its own, or that of a proxy."""
    if good.http is None or good.http.listen.is_loopback:
        return
    listen = good.http.listen
    if not good.http.tokens:
        yield ("http", "listen"), OPEN_WITHOUT_TOKENS.format(listen=listen, port=listen.port)
    if not (good.http.behind_proxy or good.http.speaks_tls):
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


def _producers_differ(good: Good) -> Found:
    """No name, no token and no key may mean two producers."""
    names: dict[str, int] = {}
    tokens: dict[str, int] = {}
    keys: dict[str, int] = {}
    for index, producer in good.producers.items():
        place: Place = ("producers", index)
        if (first := names.setdefault(producer.name, index)) != index:
            yield (*place, "name"), SAME_PRODUCER.format(first=first, name=producer.name)
        if producer.token and (first := tokens.setdefault(producer.token, index)) != index:
            yield (*place, "token"), ONE_COMES_WITH.format(first=first)
        for key in ("secret", "old_secret"):
            given = getattr(producer, key)
            if given and (first := keys.setdefault(given.reveal(), index)) != index:
                yield (*place, key), ONE_SIGNS_WITH.format(first=first)


def _producers_can_send(good: Good) -> Found:
    tokens = {entry.name: entry for entry in good.http.tokens} if good.http is not None else {}
    for index, producer in good.producers.items():
        place: Place = ("producers", index)
        token = tokens.get(producer.token)
        if producer.token and good.http is not None and token is None:
            near = nearest(producer.token, tokens)
            yield (*place, "token"), COMES_WITH_NOTHING.format(token=producer.token, nearest=near)
        elif token is not None and not {"ingest", "gate"} & set(token.scopes):
            yield (*place, "token"), MAY_NOT_SEND.format(token=producer.token)
        for number, source in enumerate(producer.sources):
            if source not in good.source_names:
                near = nearest(source, good.source_names)
                sentence = NO_SUCH_SOURCE.format(source=source, nearest=near)
                yield (*place, "sources", number), sentence


def _shared_sources_are_signed(good: Good) -> Found:
    """Who shares a broker's user with another is known by its signature alone."""
    firsts: dict[str, int] = {}
    for index, producer in good.producers.items():
        for number, source in enumerate(producer.sources):
            first = firsts.setdefault(source, index)
            both = producer.secrets and good.producers[first].secrets
            if first != index and not both:
                place = ("producers", index, "sources", number)
                yield place, SHARED_SOURCE.format(first=first, source=source)


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


def _meters_are_fed(good: Good) -> Found:
    """What a meter reads out of events, it reads out of those of its type alone."""
    for name, meter in good.meters.items():
        place: Place = ("meters", name)
        if name.startswith(OWN_PREFIX):
            yield place, OWN_METER
        if meter.event_type.startswith(OWN_PREFIX) and meter.event_type != GENAI_TYPE:
            yield (*place, "event_type"), OWN_TYPE
        if meter.event_type and meter.value is None and meter.aggregation != "count":
            sentence = NO_VALUE.format(aggregation=meter.aggregation, event_type=meter.event_type)
            yield (*place, "value"), sentence
        keys = [key for key in ("value", "dimensions") if getattr(meter, key)]
        if keys and not meter.event_type:
            yield (*place, "event_type"), NEVER_FED.format(keys=" and ".join(keys))


GENAI_TYPE = "meterd.genai"  # What calls of models are; meters may read them.
OWN_PREFIX = "meterd."  # Of what meterd counts itself: periods, milestones, scores.


def _rates_have_meters(good: Good) -> Found:
    for place, _, rate in _rates(good):
        meter = good.meters.get(rate.meter)
        if rate.meter.startswith(OWN_PREFIX):
            yield (*place, "meter"), OWN_RATE
        elif rate.meter not in good.meter_names:
            yield (*place, "meter"), _missing("meter", rate.meter, good.meter_names)
        elif rate.model == "dynamic" and meter is not None and not meter.adds_up:
            yield (*place, "model"), DYNAMIC_SUM.format(aggregation=meter.aggregation)
    for name, plan in good.plans.items():
        if plan.quota is not None and plan.quota.meter not in good.meter_names:
            sentence = _missing("meter", plan.quota.meter, good.meter_names)
            yield ("plans", name, "quota", "meter"), sentence


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
    """Yield each rate with its place and those that come before it in its version."""
    for name, plan in good.plans.items():
        for place, earlier, rate in rates_of(plan):
            yield ("plans", name, *place), earlier, rate


def _plans_agree_with_themselves(good: Good) -> Found:
    """What the plan's own keys, and the services behind it, have to say."""
    wallet = good.wallet or WalletSettings()
    for name, plan in good.plans.items():
        for place, sentence in (*mistakes_in(plan), *release_mistakes(plan, wallet.minimum_micros)):
            yield ("plans", name, *place), sentence
        if good.escrow is not None:
            quarantine = good.escrow.in_doubt_quarantine.ms
            for place, sentence in period_mistakes(plan, quarantine, good.escrow.on_deadline):
                yield ("plans", name, *place), sentence


def _release_max_lets_plans_settle(good: Good) -> Found:
    if good.escrow is None:
        return
    release_max = good.escrow.release_max_micros
    for name, plan in good.plans.items():
        if plan.least_release((good.wallet or WalletSettings()).minimum_micros) > release_max:
            sentence = MIN_ABOVE_MAX.format(release_max=money.format_amount(release_max))
            yield ("plans", name, "settle", "min_release"), sentence


def _agreements_have_plans(good: Good) -> Found:
    for index, agreement in good.agreements.items():
        if agreement.plan not in good.plan_names:
            yield ("agreements", index, "plan"), _missing("plan", agreement.plan, good.plan_names)


def _missing(what: str, name: str, known: Collection[str]) -> str:
    return f'there is no {what} "{name}"; write [{what}s.{_key_part(name)}]; {nearest(name, known)}'


def _agreements_have_the_roles(good: Good) -> Found:
    for index, agreement in good.agreements.items():
        plan = good.plans.get(agreement.plan)
        if plan is None or plan.roles == agreement.escrows.roles:
            continue
        example = ", ".join(f'{role} = "{EXAMPLE_IDS[role]}"' for role in plan.roles)
        roles = " and ".join(plan.roles)
        sentence = OTHER_ROLES.format(plan=agreement.plan, roles=roles, example=example)
        yield ("agreements", index, "escrows"), sentence


EXAMPLE_IDS = {
    "base": "esc_1f20b6",
    "main": "esc_9a81c4",
    "overage": "esc_77d05e",
    "wallet": "agent-consumer",
}


def _escrows_differ(good: Good) -> Found:
    escrows: dict[str, int] = {}
    for index, agreement in good.agreements.items():
        listed = [role for role, _ in agreement.escrows.pairs]
        for number, (role, escrow) in enumerate(agreement.escrows.pairs):
            first = escrows.setdefault(escrow, index)
            if first == index and _is_first(agreement, number):
                continue
            place: Place = ("agreements", index, "escrows", role)
            inner = (number - listed.index(role),) if listed.count(role) > 1 else ()
            yield (*place, *inner), SAME_ESCROW.format(first=first, escrow=escrow)


def _is_first(agreement: AgreementSettings, number: int) -> bool:
    """Whether no earlier place of the same agreement holds the same escrow."""
    ids = agreement.escrows.ids
    return ids.index(ids[number]) == number


def _agreement_ids_differ(good: Good) -> Found:
    """An event may name an agreement or its escrow, so no id may mean two agreements."""
    ids: dict[str, int] = {}
    owners = {
        escrow: index
        for index, agreement in good.agreements.items()
        for escrow in agreement.escrows.ids
    }
    for index, agreement in good.agreements.items():
        place: Place = ("agreements", index, "id")
        first = ids.setdefault(agreement.id, index)
        owner = owners.get(agreement.id)
        if owner is None and first != index:
            yield place, SAME_ID.format(first=first, id=agreement.id)
        elif owner is not None and agreement.id not in agreement.escrows.ids:
            yield place, ID_IS_ESCROW.format(owner=owner, id=agreement.id)


def _discovery_can_bind(good: Good) -> Found:
    memos: dict[str, int] = {}
    for index, entry in good.discover.items():
        place: Place = ("discover", index)
        plan = good.plans.get(entry.plan)
        if entry.plan not in good.plan_names:
            yield (*place, "plan"), _missing("plan", entry.plan, good.plan_names)
        elif plan is not None and plan.roles != ("main",):
            roles = " and ".join(plan.roles)
            yield (*place, "plan"), ROLES_NOT_DISCOVERED.format(plan=entry.plan, roles=roles)
        if (first := memos.setdefault(entry.memo, index)) != index:
            yield (*place, "memo"), SAME_MEMO.format(first=first)
    if good.discover and good.escrow is not None and not good.escrow.agent_id:
        yield ("escrow", "agent_id"), WITHOUT_AGENT


def _payer_can_be_served(good: Good) -> Found:
    """What meterd locks for a payer must be found again by the provider's own list."""
    if good.escrow is None:
        return
    if good.escrow.payer_api_key is not None and not good.escrow.agent_id:
        yield ("escrow", "agent_id"), PAYER_WITHOUT_AGENT
    if good.escrow.payer_api_key is None:
        for name, plan in good.plans.items():
            if plan.renew and plan.pattern in PATTERNS_OF["renew"]:
                yield ("plans", name, "renew"), RENEWS_WITHOUT_KEY


CHECKS: tuple[Callable[[Good], Found], ...] = (
    _listen_is_guarded,
    _tokens_differ,
    _sources_differ,
    _sessions_differ,
    _producers_differ,
    _producers_can_send,
    _shared_sources_are_signed,
    _meters_are_fed,
    _rates_have_meters,
    _rates_can_match,
    _plans_agree_with_themselves,
    _release_max_lets_plans_settle,
    _agreements_have_plans,
    _agreements_have_the_roles,
    _escrows_differ,
    _agreement_ids_differ,
    _discovery_can_bind,
    _payer_can_be_served,
)
