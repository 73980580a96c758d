"""The configuration: what it takes, what it refuses, and that it says so all at once."""

from __future__ import annotations

import base64
import json
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError, create_model
from pydantic_core import PydanticUndefined

from meterd import config
from meterd.config import Address, Duration, Secret, values
from meterd.config.patterns import REQUIRED_OF
from meterd.config.plans import (
    MODELS,
    PATTERNS,
    PATTERNS_OF,
    CapsSettings,
    GateSettings,
    LimitSettings,
    PlanSettings,
    QuotaSettings,
    RateSettings,
    SettleSettings,
    StepSettings,
    TierSettings,
    TrancheSettings,
    VersionSettings,
)
from meterd.config.settings import (
    AGGREGATIONS,
    TOPIC_FIELDS,
    AgreementEscrows,
    AgreementSettings,
    DiscoverSettings,
    MeterSettings,
    MqttSourceSettings,
    ProducerSettings,
    RedisSourceSettings,
    Settings,
    TokenSettings,
    WalletPaths,
)
from meterd.config.shape import keys_of, shape_of
from meterd.config.table import Table
from meterd.core import money
from meterd.core.meters import Aggregation
from meterd.core.plans import Pattern
from meterd.core.pricing import OWN_METERS, Model
from meterd.errors import ConfigurationError, Mistake
from meterd.sources.mqtt import TopicTemplate

REPOSITORY = Path(__file__).parents[2]
GOOD = REPOSITORY / "tests" / "config" / "good"
BAD = REPOSITORY / "tests" / "config" / "bad"
NOTEWORTHY = REPOSITORY / "tests" / "config" / "noted"
EXAMPLES = REPOSITORY / "config"

CANARY = "pf_live_canary_hunter2"
KEY = {"METERD_ESCROW__API_KEY": CANARY}

# Each bad file with its mistakes: the key, and a part of the sentence that says what to write.
EXPECTED: dict[str, list[tuple[str, str]]] = {
    "adaptive_without_exposure_max": [
        ("plans.fast.settle", 'write "adaptive", or a table such as settle = { amount = "0.50" }'),
        (
            "plans.calls.exposure_max",
            'is required by settle = "adaptive", which keeps the exposure below it; write',
        ),
    ],
    "agreement_under_an_unknown_plan": [
        ("agreements[0].plan", 'no plan "call"; write [plans.call]; did you mean "calls"?'),
    ],
    "agreement_without_an_escrow": [
        ("agreements[0].escrows", 'is required; write escrows = { main = "esc_9a81c4" }'),
        ("agreements[1].escrows.main", "write 1 to 64 letters, digits, _ or -"),
        (
            "agreements[2].escrows",
            'plan "calls" draws on main; write escrows = { main = "esc_9a81c4" }',
        ),
    ],
    "agreements_with_one_escrow": [
        ("agreements[1].escrows.main", 'agreements[0] draws on "esc_1" too'),
    ],
    "agreements_with_one_id": [
        ("agreements[1].id", 'agreements[0] has the id "one" too; write another id'),
        ("agreements[2].id", '"esc_1" is the escrow of agreements[0]; write another id'),
    ],
    "amount_below_min_release": [
        (
            "plans.calls.settle.amount",
            "is below min_release (0.01), which holds it back; raise it, or lower min_release",
        ),
    ],
    "auto_release_before_the_period_ends": [
        (
            "plans.pass.auto_release_hours",
            "the service would act before the period (7d) has ended; write at least 168",
        ),
    ],
    "brackets_without_end": [("configuration", "is nested too deeply; write it flatter")],
    "caps_that_cannot_be_reached": [
        ("producers[0].caps.velocity_max", "there is no such key; did you mean"),
        ("plans.stream.caps.day_max", "is below minute_max, which could never be reached; raise"),
        ("plans.calls.caps.velocity_window", "says nothing without velocity_max; write it, such"),
    ],
    "certificate_without_its_key": [
        ("http.tls_key_file", "tls_cert_file and tls_key_file belong together; write both or none"),
    ],
    "count_with_a_value": [
        ("meters.calls.value", 'count counts events; remove it, or write aggregation = "sum"'),
        (
            "meters.peak.value",
            'write a JSONPath that begins with $, such as "$.usage.total_tokens"',
        ),
    ],
    "deadline_within_a_doubt": [
        (
            "plans.pass.auto_release_hours",
            "the service acts after 1 h, which is no longer than a doubt takes (twice escrow.in_",
        ),
    ],
    "deposit_below_the_fee": [
        (
            "plans.pass.deposit",
            "is below the fee (10.50), so no period could be paid; raise it, or remove it",
        ),
    ],
    "discover_of_an_unknown_plan": [
        (
            "discover[0].plan",
            'there is no plan "streem"; write [plans.streem]; did you mean "stream"?',
        ),
        (
            "discover[1].plan",
            'a found escrow is bound as main, but plan "weekly" draws on base and overage; name',
        ),
        ("discover[2].memo", "discover[0] takes every escrow with this memo; write another memo"),
        (
            "escrow.agent_id",
            "is required by [[discover]], which asks for the escrows of this agent; write the",
        ),
    ],
    "duration_without_a_unit": [
        ("daemon.drain_timeout", 'write a duration in quotes, such as "250ms", "30s", "5m"'),
        ("dedupe.window", 'write a duration longer than zero, such as "1s"'),
        ("escrow.observe_gap", "write a duration in quotes"),
    ],
    "escrow_service_in_the_clear": [
        ("escrow.base_url", "sends the API key in the clear; write ht"),
    ],
    "escrow_service_with_a_password": [
        ("escrow.base_url", "write it without user, password, ? and #"),
        ("escrow.paths.list", 'write a path that begins with /, such as "/escrow"'),
        ("escrow.paths.release", "write a path that begins with / and has {id} once"),
        ("escrow.idempotency_header", "write the name of an HTTP header"),
    ],
    "escrow_twice_in_an_agreement": [
        ("agreements[1].escrows.base", "write at least 1 of them"),
        ("agreements[1].escrows.overage[0]", "write 1 to 64 letters, digits, _ or -"),
        (
            "agreements[0].escrows.overage[1]",
            'agreements[0] draws on "esc_1" too; what is drawn on has one agreement and one',
        ),
        (
            "agreements[2].escrows.base",
            'agreements[0] draws on "esc_2" too; what is drawn on has one agreement and one',
        ),
    ],
    "everything_at_once": [
        ("daemon.drain_timeout", "write a duration in quotes"),
        ("wallets", 'there is no such key; did you mean "wallet"?'),
        ("http.listen", "[::]:80 is open to other machines and no token is configured"),
        (
            "http.behind_proxy",
            "write tls_cert_file and tls_key_file, or put a TLS proxy in front and",
        ),
        (
            "plans.calls.rates[0].meter",
            'there is no meter "call"; write [meters.call]; did you mean "calls"?',
        ),
        ("plans.stream.rates[0].meter", 'no meter "call"; write [meters.call]; did you mean'),
        ("plans.calls.rates[0].price", "must be greater than 0"),
        (
            "plans.calls.settle",
            "has no threshold, so nothing would be paid before the deadline; write at least one",
        ),
        ("plans.stream.settle", "write at least one of units, interval and amount"),
        ("agreements[1].plan", 'there is no plan "stram"'),
        ("agreements[1].escrows.main", 'agreements[0] draws on "esc_1" too'),
    ],
    "exposure_max_without_adaptive": [
        (
            "plans.calls.exposure_max",
            'is the bound of settle = "adaptive" alone; write that, or remove it',
        ),
        (
            "plans.tight.exposure_max",
            "is below min_release (0.01), which holds it back; raise it, or lower min_release",
        ),
        (
            "plans.pass.settle",
            "each payment of a subscription plan is due at once, so no threshold can adapt;",
        ),
    ],
    "fee_above_a_million": [
        ("plans.pass.fee", "must be at most 1000000 USDC"),
        ("plans.calls.rates[0].price", "must be at most 1000000 USDC"),
    ],
    "fee_left_to_a_service_that_refunds": [
        (
            "plans.pass.at_period_end",
            '"auto" leaves the fee to the service, which gives it back (escrow.on_deadline =',
        ),
    ],
    "gate_that_owes": [
        ("plans.calls.gate.enforce", "write true or false without quotes"),
        ("plans.calls.gate.overdraft", 'must not be below 0; write for example "0.10"'),
        ("plans.calls.gate.hold", 'write a duration longer than zero, such as "1s"'),
        ("plans.calls.gate.on_unknown", 'write "closed" or "open"'),
    ],
    "key_of_another_pattern": [
        (
            "plans.calls.fee",
            'is no key of a streaming plan; remove it, or write pattern = "subscription" or',
        ),
        (
            "plans.calls.quota",
            'is no key of a streaming plan; remove it, or write pattern = "subscription"',
        ),
        (
            "plans.calls.ordered",
            'is no key of a streaming plan; remove it, or write pattern = "milestone"',
        ),
        (
            "plans.site.period",
            'is no key of a milestone plan; remove it, or write pattern = "pay_per_call" or',
        ),
    ],
    "key_of_another_source": [
        ("sources[0].stream", "there is no such key; known are allow_anonymous, allow_qos0, batch"),
        ("sources[1].url", 'write an address such as "redis://127.0.0.1:6379/0"'),
        ("sources[1].topic", "there is no such key; known are batch, block, group, kind, mode"),
    ],
    "key_twice": [("line 3, column 15", "this key stands here a second time; remove one")],
    "listen_without_a_port": [("http.listen", 'write host and port in quotes, such as "127.0.0.1')],
    "listening_to_all_without_tokens": [
        ("http.listen", 'no token is configured; write "127.0.0.1:8787", or give http.tokens'),
        ("http.behind_proxy", "write tls_cert_file and tls_key_file, or put a TLS proxy in front"),
    ],
    "memo_of_many_characters": [
        ("plans.calls.memo", "write one line of at most 200 characters"),
        ("discover[0].memo", "must not be empty"),
    ],
    "meter_that_no_event_feeds": [
        (
            "meters.tokens.event_type",
            'is "", so no event feeds the meter by value and dimensions; write event_type =',
        ),
    ],
    "min_release_above_release_max": [
        ("plans.calls.settle.min_release", "is above escrow.release_max (0.50)"),
    ],
    "min_release_below_the_wallets": [
        (
            "plans.calls.settle.min_release",
            "is below wallet.minimum (0.05), the least that the wallet's service takes; raise",
        ),
        (
            "plans.more.settle.amount",
            "is below min_release (0.05), which holds it back; raise it, or lower min_release",
        ),
    ],
    "minimum_above_maximum": [
        ("plans.calls.rates[0].minimum", "is above maximum (1.00); lower it, or raise maximum"),
    ],
    "moment_without_a_zone": [
        (
            "plans.pass.versions[0].effective_from",
            'write a moment with its zone, such as "2026-12-01T00:00:00Z"',
        ),
        (
            "plans.pass.versions[1].effective_from",
            'write a moment with its zone, such as "2026-12-01T00:00:00Z"',
        ),
    ],
    "money_that_is_no_plain_decimal": [
        ("escrow.quantum", "not a plain decimal such as 12 or 0.000001; write at most 6 decimals"),
        ("escrow.release_max", "write a plain decimal in quotes"),
        ("plans.calls.rates[0].price", "write a plain decimal in quotes"),
        ("plans.calls.settle.amount", "not a plain decimal"),
        ("plans.calls.settle.min_release", "write a plain decimal in quotes"),
    ],
    "money_with_too_many_decimals": [
        (
            "escrow.release_max",
            'more than 6 decimals; write at most 6 decimals in quotes, such as "',
        ),
        ("plans.calls.rates[0].price", "more than 12 decimals; write at most 12 decimals"),
    ],
    "mqtt_files_without_tls": [
        ("sources[0].tls", "is off, but ca_file given; write tls = true"),
        ("sources[1].key_file", "cert_file and key_file belong together; write both or none"),
        ("sources[2].username", "MQTT 3.1.1 takes no password without a user; write one"),
    ],
    "mqtt_topic_that_tells_nothing": [
        ("sources[0].topic", "such as meterd/usage/{escrow_id}/{meter}, without #"),
        ("sources[1].topic", 'leave $share out here and write share = "NAME"'),
        ("sources[2].topic", '"id-{escrow_id}" is no whole level of {escrow_id}, {agreement}'),
    ],
    "names_of_meterds_own": [
        (
            'meters."meterd.calls"',
            "is a name of meterd's own; write one that does not begin with meterd.",
        ),
        (
            "meters.closed.event_type",
            "is a type of meterd's own, which feeds no meter; write the type of your events",
        ),
        (
            "plans.calls.rates[0].meter",
            "is counted and priced by meterd itself; remove the rate, or name a meter of [meters]",
        ),
    ],
    "no_toml": [("line 4, column 25", 'stand in quotes, such as interval = "60s"')],
    "no_toml_at_the_end": [("line 2, column 14", "close the text with a quote on the line")],
    "number_out_of_range": [
        ("http.pending_max", "write at most 10000000"),
        ("escrow.concurrency", "write at least 1"),
    ],
    "number_without_end": [("configuration", "too many digits; write a shorter one")],
    "outcome_key_of_another_length": [
        (
            "plans.answer.outcome_key",
            "is no Ed25519 public key; write its 32 bytes as 64 hex digits or 44 characters of",
        ),
        (
            "plans.other.outcome_key",
            "is no Ed25519 public key; write its 32 bytes as 64 hex digits or 44 characters of",
        ),
    ],
    "overage_without_a_budget": [
        (
            "plans.weekly.deposit",
            "is required: usage beyond the fee is drawn on an escrow of its own, which is the",
        ),
    ],
    "pattern_misspelt": [
        ("plans.calls.pattern", 'there is no pattern "straming"; did you mean "streaming"?'),
    ],
    "pattern_without_its_keys": [
        ("plans.call.rates", 'is required; write rates = [{ meter = "tokens", price = "0.002" }]'),
        ("plans.pass.fee", 'is required; write fee = "10.00"'),
        (
            "plans.site.tranches",
            'is required; write tranches = [{ name = "draft", amount = "2.50" }]',
        ),
        ("plans.answer.deposit", 'is required; write deposit = "10.00"'),
        (
            "plans.answer.steps",
            'is required; write steps = [{ score = "0.9", share = "1" }, { score = "0.7", share',
        ),
        ("plans.weekly.fee", 'is required; write fee = "10.00"'),
        (
            "plans.weekly.rates",
            'is required; write rates = [{ meter = "tokens", price = "0.002" }]',
        ),
        (
            "plans.weekly.deposit",
            "is required: usage beyond the fee is drawn on an escrow of its own, which is the",
        ),
        (
            "plans.weekly.settle",
            "has no threshold, so nothing would be paid before the deadline; write at least one",
        ),
    ],
    "per_below_one": [("plans.calls.rates[0].per", "write at least 1")],
    "percent_above_100": [
        ("plans.share.rates[0].percent", 'must be at most 100; write for example "2.5"'),
    ],
    "plan_that_never_settles": [
        ("plans.calls.settle", "has no threshold, so nothing would be paid before the deadline"),
    ],
    "plan_without_rates": [
        ("plans.calls.rates", "write at least 1 of them"),
        ('plans."a b"', "write 1 to 128 letters, digits, _ . : or -"),
        ('plans."a b".rates', 'is required; write rates = [{ meter = "tokens", price = "0.002" }]'),
        (
            'plans."a b".settle',
            "a streaming plan is paid in batches; write at least one of units, interval and",
        ),
    ],
    "price_max_missing": [
        (
            "plans.calls.rates[1].model",
            'sums what each event costs, which is nothing for a meter with aggregation = "max";',
        ),
        ("plans.calls.rates[0].price_max", 'is required; write price_max = "0.05"'),
        (
            "plans.calls.rates[0].per",
            'says nothing under model = "dynamic", which is priced by price_max; remove it',
        ),
        (
            "plans.calls.rates[0].free_units",
            'says nothing under model = "dynamic", which is priced by price_max; remove it',
        ),
    ],
    "price_of_another_model": [
        (
            "plans.calls.rates[0].percent",
            'says nothing under model = "standard", which is priced by price; remove it',
        ),
        (
            "plans.calls.rates[1].tiers",
            'is required; write tiers = [{ up_to = 1000, price = "0.01" }, { price = "0.005" }]',
        ),
        (
            "plans.calls.rates[1].price",
            'says nothing under model = "volume", which is priced by tiers; remove it',
        ),
        (
            "plans.calls.rates[2].per",
            'says nothing under model = "percentage", which is priced by percent; remove it',
        ),
    ],
    "price_of_nothing": [
        ("plans.less.rates[0].price", 'must not be below 0; write for example "0.002"'),
        ("plans.calls.rates[0].price", 'must be greater than 0; write for example "0.002"'),
    ],
    "producers_that_cannot_be_told_apart": [
        ("producers[1].name", 'producers[0] is named "a" too; write another name'),
        ("producers[1].token", "is the token of producers[0] too, so nobody could tell them apart"),
        ("producers[2].secret", "is a key of producers[0] too; make one of its own"),
        ("producers[1].sources[0]", 'producers[0] sends over "mqtt" too, so both need a key to be'),
    ],
    "producers_that_cannot_send": [
        ("producers[0].token", "is required, or sources: by one of the two a producer is known;"),
        ("producers[1].token", 'the token "looker" may not send usage; give it the scope ingest'),
        ("producers[2].token", 'no token "loker" in http.tokens; did you mean "looker"?'),
        ("producers[2].sources[1]", 'there is no source "reddis" in [[sources]]; did you mean "re'),
    ],
    "producers_with_bad_keys": [
        (
            "producers[0].secret",
            "is no key of Standard Webhooks; write whsec_ and the base64 of 24",
        ),
        (
            "producers[1].secret",
            "is no key of Standard Webhooks; write whsec_ and the base64 of 24",
        ),
        ("producers[2].old_secret", "is the same key as secret; write the one before it, or none"),
        ("producers[3].agreements[0]", "write an id, or a pattern of one with * and ?, such as cu"),
        ("producers[4].secret", "is required beside old_secret; write the key that comes after it"),
    ],
    "quota_on_an_unknown_meter": [
        (
            "plans.pass.quota.meter",
            'there is no meter "request"; write [meters.request]; did you mean "requests"?',
        ),
    ],
    "rate_of_an_unknown_meter": [
        (
            "plans.calls.rates[0].meter",
            'no meter "cals"; write [meters.cals]; did you mean "calls"',
        ),
    ],
    "payer_without_a_provider": [
        ("escrow.agent_id", "is required beside payer_api_key: escrows are locked for this agent"),
    ],
    "renewal_without_the_payers_key": [
        ("plans.project.renew", "is no key of a milestone plan; remove it, or write pattern ="),
        ("plans.stream.renew", "needs his key; write escrow.payer_api_key_file, or remove it"),
    ],
    "rate_that_never_matches": [
        (
            "plans.calls.rates[1]",
            "never matches, since rates[0] of the same meter takes every even",
        ),
    ],
    "release_max_below_quantum": [("escrow.release_max", "is below quantum")],
    "roles_that_do_not_fit": [
        (
            "agreements[0].escrows",
            'plan "weekly" draws on base and overage; write escrows = { base = "esc_1f20b6",',
        ),
        (
            "agreements[1].escrows",
            'plan "stream" draws on main; write escrows = { main = "esc_9a81c4" }',
        ),
    ],
    "secret_in_a_missing_file": [
        ("http.tokens[0].token_file", "cannot read no/such/token: No such file or directory"),
        ("escrow.api_key_file", "cannot read no/such/file: No such file or directory; write the"),
    ],
    "secret_that_ends_a_header": [("escrow.api_key", "may hold only visible ASCII characters")],
    "secret_twice": [("escrow.api_key_file", "stands beside api_key; write one of the two")],
    "share_above_one": [
        ("plans.answer.steps[0].score", 'a score is from 0 to 1; write for example "0.9"'),
        (
            "plans.answer.steps[0].share",
            'must be at most 1, which is all of it; write for example "0.70"',
        ),
        ("plans.answer.steps[1].share", 'must be greater than 0; write for example "0.70"'),
    ],
    "share_that_is_no_amount": [
        (
            "plans.answer.steps[0].share",
            "of the deposit (1.000001) is no amount with twelve decimals; write fewer decimals",
        ),
    ],
    "socket_that_is_no_whole_path": [
        ("http.listen", 'the whole path of a socket, such as "unix:/run/meterd/http.sock"'),
    ],
    "socket_with_a_certificate": [
        ("http.tls_cert_file", "a Unix socket needs no TLS; remove both files"),
    ],
    "socket_with_a_long_path": [
        ("http.listen", "the path of a socket may have 107 bytes; write a shorter one"),
    ],
    "source_of_no_kind": [
        ("sources[0]", 'write kind = "redis" or kind = "mqtt"'),
        ("sources[1]", 'there is no kind "reddis"; did you mean "redis"?'),
        ("sources[2]", "needs no entry: POST /v1/events is served at http.listen; remove"),
    ],
    "sources_with_one_name": [
        ("sources[1].name", 'sources[0] is named "redis" too; write another'),
    ],
    "sources_with_one_session": [
        ("sources[1].client_id", 'sources[0] is "meterd" at the same broker too'),
    ],
    "steps_out_of_order": [
        (
            "plans.answer.steps[2].score",
            "is out of order: the scores must fall (or rise) from step to step; sort the steps",
        ),
        (
            "plans.answer.steps[3].score",
            "is out of order: the scores must fall (or rise) from step to step; sort the steps",
        ),
    ],
    "store_of_a_later_version": [
        ("store.kind", 'store "redis" is not available in this version; write "sqlite"'),
        ("store.url", "is not available in this version: remove it"),
    ],
    "stream_without_batches": [
        (
            "plans.calls.settle",
            "write at least one of units, interval and amount, such as settle =",
        ),
    ],
    "table_of_another_type": [
        ("log", "write a table of key = value"),
        ("sources", "write a list in [ ]"),
        ("plans", "write a table of key = value"),
    ],
    "tiers_out_of_order": [
        (
            "plans.calls.rates[0].tiers[1].up_to",
            "is not above the 1000 of the tier before; write the tiers in ascending order",
        ),
    ],
    "tiers_without_an_open_end": [
        (
            "plans.calls.rates[0].tiers",
            "has no price for more than 2000 units; add a last tier without up_to",
        ),
        (
            "plans.calls.rates[1].tiers[0].up_to",
            "is required on all tiers but the last; write up_to = 1000",
        ),
        (
            "plans.calls.rates[1].tiers[1]",
            'has no price; write price = "0.01", or price = "0" where it is free',
        ),
    ],
    "token_that_can_be_guessed": [
        ("http.tokens[1].token", "is required; write token_file, or token itself"),
        ("http.tokens[0].token", "must have at least 16 characters"),
        ("http.tokens[0].scopes", "write at least 1 of them"),
        ("http.tokens[1].scopes[0]", 'write "ingest", "gate", "read" or "admin"'),
    ],
    "tokens_alike": [
        ("http.tokens[1].name", 'an earlier token is named "a" too; write another name'),
        ("http.tokens[1].token", "is the token of an earlier entry too; write one of its own"),
    ],
    "tranche_twice": [
        ("plans.site.tranches[1].name", 'tranches[0] is named "draft" too; write another name'),
    ],
    "tranches_above_the_deposit": [
        (
            "plans.site.tranches",
            "sum up to 10.00, which is above deposit (9.00); lower them, or raise deposit",
        ),
    ],
    "unknown_key": [
        ("daemon.drain_timout", 'there is no such key; did you mean "drain_timeout"?'),
        (
            "http.frobnicate",
            "known are behind_proxy, body_limit, listen, pending_max, tls_cert_file",
        ),
    ],
    "unknown_table": [("escrw", 'there is no such key; did you mean "escrow"?')],
    "value_of_another_type": [
        ("log.level", 'write "debug", "info", "warning" or "error"'),
        ("escrow.agent_id", "write text in quotes"),
        ("escrow.voids_per_day", "write a whole number without quotes"),
        ("escrow.strict", "write true or false without quotes"),
        ("escrow.concurrency", "write a whole number without quotes"),
    ],
    "versions_out_of_order": [
        (
            "plans.calls.versions[1].fee",
            'is no key of a pay_per_token plan; remove it, or write pattern = "subscription"',
        ),
        (
            "plans.calls.versions[1].effective_from",
            "is not after the version before it; write the versions oldest first",
        ),
        ("plans.calls.versions[2]", "changes nothing; write rates, fee or both, or remove it"),
    ],
    "wallet_that_is_locked": [
        ("plans.calls.deposit", 'a wallet is not locked; remove it, or write draws_on = "escrow"'),
        (
            "plans.calls.auto_release_hours",
            'a wallet is not locked; remove it, or write draws_on = "escrow"',
        ),
        ("plans.calls.at_close", 'a wallet is not locked; remove it, or write draws_on = "escrow"'),
        (
            "plans.calls.settle.escrow_percent",
            "has no deposit to be a share of, since the plan draws on a wallet; remove it",
        ),
    ],
    "wallet_under_an_escrow_plan": [
        (
            "agreements[0].escrows",
            'plan "calls" draws on wallet; write escrows = { wallet = "agent-consumer" }',
        ),
        (
            "agreements[1].escrows",
            'plan "locked" draws on main; write escrows = { main = "esc_9a81c4" }',
        ),
    ],
}

# Each file that loads with a word, with its notes.
NOTED: dict[str, list[tuple[str, str]]] = {
    "deposit_below_one": [
        (
            "plans.pass.fee",
            "0.50 is below 1.00, the least that the usual escrow service locks; meterd open may",
        ),
        (
            "plans.site.tranches",
            "0.25 is below 1.00, the least that the usual escrow service locks; meterd open may",
        ),
        (
            "plans.weekly.fee",
            "0.50 is below 1.00, the least that the usual escrow service locks; meterd open may",
        ),
        (
            "plans.weekly.deposit",
            "0.75 is below 1.00, the least that the usual escrow service locks; meterd open may",
        ),
    ],
    "dimension_that_no_event_carries": [
        (
            "plans.tokens.rates[0].where.model",
            'events of type "completion" carry no model; name it in meters.tokens.dimensions,',
        ),
    ],
    "fee_above_release_max": [
        (
            "plans.pass.fee",
            "is above escrow.release_max (2.00), so it is paid in several releases, as far apart",
        ),
        (
            "plans.site.tranches[1].amount",
            "is above escrow.release_max (2.00), so it is paid in several releases, as far apart",
        ),
        (
            "plans.answer.deposit",
            "is above escrow.release_max (2.00), so it is paid in several releases, as far apart",
        ),
    ],
    "fee_left_to_an_unknown_deadline": [
        (
            "plans.pass.at_period_end",
            '"auto" leaves the fee to the service, and escrow.on_deadline = "unknown"; write',
        ),
    ],
    "meter_that_no_rate_prices": [
        ("meters.spare", "no plan has a rate for it, so events that name it are rejected"),
    ],
}


def mistakes_in(text: str, environ: dict[str, str] | None = None) -> list[tuple[str, str]]:
    with pytest.raises(ConfigurationError) as caught:
        config.parse(text, KEY if environ is None else environ)
    return [(mistake.key, mistake.message) for mistake in caught.value.mistakes]


# Files


@pytest.mark.parametrize("file", sorted(GOOD.glob("*.toml")), ids=lambda file: file.stem)
def test_load_takes_a_good_file_without_a_word(file: Path):
    """A good file loads, and nothing is said about it."""
    notes: list[Mistake] = []

    settings = config.load(file, KEY, warn=notes.append)

    assert notes == []
    assert isinstance(settings, Settings)


@pytest.mark.parametrize("name", sorted(NOTED))
def test_load_takes_a_noteworthy_file_with_its_notes(name: str):
    """What is allowed but deserves a word gives exactly its notes, each with its key."""
    notes: list[Mistake] = []

    config.load(NOTEWORTHY / f"{name}.toml", KEY, warn=notes.append)

    assert [key for key, _ in NOTED[name]] == [note.key for note in notes]
    assert [
        note for note, (_, part) in zip(notes, NOTED[name], strict=True) if part not in str(note)
    ] == []


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_load_names_every_mistake_of_a_bad_file_with_its_key(name: str):
    """Each bad file gives exactly its mistakes, all at once, each with what to write instead."""
    file = BAD / f"{name}.toml"
    with pytest.raises(ConfigurationError) as caught:
        config.load(file, {} if name.startswith("secret_") else KEY)
    expected = EXPECTED[name]
    found = [
        (mistake.key, part if part in mistake.message else mistake.message)
        for mistake, (_, part) in zip(
            caught.value.mistakes, expected + [("", "\0")] * 20, strict=False
        )
    ]

    assert expected == found
    assert str(file) == caught.value.origin


TEXTS = [
    file.read_text()
    for file in sorted([*GOOD.glob("*.toml"), *BAD.glob("*.toml"), *EXAMPLES.glob("*.toml")])
    if not file.stem.endswith("without_end")
]
PIECES = [
    *('"', "[", "]", "{}", "=", "'", "nan", "1979-05-27", "[1]", "true", "-1", "x", '"\\u0000"'),
    *("\n[[sources]]\n", "\n[plans]\nx = 1\n", "kind = 3\n", "plans = {}\n", "[escrow]\n", "main"),
]


@tried(max_examples=300, deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    place=st.floats(min_value=0, max_value=1),
    piece=st.sampled_from(PIECES) | st.text(max_size=3),
    cut=st.integers(min_value=0, max_value=8),
)
def test_a_spoilt_file_is_settings_or_mistakes_with_sentences(
    text: str, place: float, piece: str, cut: int
):
    """Whatever stands in a file, it loads or is refused in our words; it never breaks meterd."""
    at = int(place * len(text))
    sentences: list[str] = []
    try:
        config.parse(text[:at] + piece + text[at + cut :], KEY)
    except ConfigurationError as error:
        sentences = [mistake.message for mistake in error.mistakes]

    assert not [sentence for sentence in sentences if "cannot be used" in sentence]


def test_every_bad_file_is_expected_and_every_expected_one_exists():
    """No bad file stands unused, and no noteworthy one."""
    assert sorted(EXPECTED) == sorted(file.stem for file in BAD.glob("*.toml"))
    assert sorted(NOTED) == sorted(file.stem for file in NOTEWORTHY.glob("*.toml"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_no_mistake_repeats_a_secret(name: str):
    """Neither the mistakes nor the traceback behind them show what was given for a secret."""
    with pytest.raises(ConfigurationError) as caught:
        config.load(BAD / f"{name}.toml", {} if name.startswith("secret_") else KEY)
    error: BaseException | None = caught.value
    shown = ""
    while error is not None:
        shown += str(error) + repr(error)
        error = error.__cause__ or error.__context__

    assert "hunter2" not in shown
    assert "swordfish" not in shown
    assert "0123456789abcdef" not in shown


# Values


def test_money_is_exact_integers_when_written_with_or_without_quotes():
    """Texts, decimals and integers of TOML become micros, nanos and picos without rounding."""
    settings = config.load(GOOD / "exact_decimals.toml", KEY)
    plan = settings.plans["points"]

    assert (settings.escrow.quantum_micros, settings.escrow.release_max_micros) == (1, 25_000_000)
    assert plan.rates[0].price_picos == 1
    assert (plan.settle.amount_micros, plan.settle.units_nanos) == (100_000, 500_000_000)
    assert Duration(250) == plan.settle.interval


@given(micros=st.integers(min_value=1, max_value=10**15))
def test_any_amount_comes_back_as_the_same_micros_in_both_notations(micros: int):
    """No amount is changed by its way through quotes or through TOML's own decimals."""
    text = money.format_amount(micros)

    assert micros == values.read_amount(text)
    assert micros == values.read_amount(Decimal(text))


@given(text=st.text(max_size=20) | st.from_regex(r"-?[0-9]{1,20}([.][0-9]{1,15})?(e[0-9]{1,9})?"))
def test_any_text_for_a_price_is_a_price_or_a_refusal(text: str):
    """Free text never ends as anything but a positive price or a sentence."""
    adapter = TypeAdapter(values.Picos)
    try:
        price = adapter.validate_python(text)
    except ValidationError:
        return

    assert price > 0
    assert re.fullmatch(r"[0-9]+(\.[0-9]+)?", text, re.ASCII)


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("250ms", 250),
        ("30s", 30_000),
        ("5m", 300_000),
        ("24h", 86_400_000),
        ("7d", 604_800_000),
        ("0s", 0),
        ("3650d", 3650 * 86_400_000),
    ],
)
def test_durations_are_whole_milliseconds(text: str, ms: int):
    """Each unit is read exactly."""
    duration = values.read_duration(text)

    assert Duration(ms) == duration
    assert ms / 1000 == duration.seconds
    assert duration == values.read_duration(str(duration))


@pytest.mark.parametrize(
    "given",
    ["", "5", "5 s", "-5s", "1.5s", "5S", "\u0665s", "5s\n", "3651d", 5, True, None, ["5s"]],
)
def test_what_is_no_duration_is_refused(given: object):
    """Only digits and a unit are a duration, of at most ten years."""
    with pytest.raises(ValidationError):
        TypeAdapter(values.SpanOrZero).validate_python(given)


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("127.0.0.1:8787", Address("127.0.0.1", 8787), True),
        ("localhost:0", Address("localhost", 0), True),
        ("[::1]:80", Address("::1", 80), True),
        ("0.0.0.0:80", Address("0.0.0.0", 80), False),
        ("[::]:80", Address("::", 80), False),
        ("meterd.internal:80", Address("meterd.internal", 80), False),
    ],
)
def test_addresses_know_whether_others_can_reach_them(text: str, address: Address, loopback: bool):
    """Only a name or number of this very machine is loopback."""
    read = values.read_address(text)

    assert (address, loopback, text) == (read, read.is_loopback, str(read))


@pytest.mark.parametrize(("given", "size"), [("64KiB", 65_536), ("1MiB", 1 << 20), (10, 10)])
def test_sizes_are_bytes(given: object, size: int):
    """A size is a number of bytes or a text with its unit."""
    assert size == values.read_size(given)


def test_secrets_show_as_stars_wherever_they_are_printed():
    """No way to print settings shows a secret."""
    settings = config.load(GOOD / "every_source.toml", KEY)
    shown = (
        f"{settings} {settings!r} {settings.escrow.api_key} {settings.model_dump()}"
        f" {settings.model_dump_json()}"
    )

    assert "***" in shown
    assert "hunter2" not in shown
    assert "p%40ss" not in shown


def test_secrets_refuse_to_be_pickled_and_compare_by_their_text():
    """A secret cannot be written out by accident, and two of the same text are equal."""
    with pytest.raises(TypeError):
        pickle.dumps(Secret(CANARY))

    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1


def test_settings_list_their_secrets_for_the_mask():
    """Everything to hide is listed, a password inside an address in both of its forms."""
    environ = {**KEY, "METERD_WALLET__API_KEY": "wallet-key"}
    secrets = list(config.load(GOOD / "every_source.toml", environ).secrets())

    assert secrets == [CANARY, "wallet-key", "p%40ss", "p@ss", "hunter2 hunter2"]


def test_settings_cannot_be_changed():
    """Settings are facts."""
    settings = config.parse("", KEY)

    with pytest.raises(ValidationError):
        settings.escrow.strict = True


def test_an_agreement_without_an_id_has_its_escrows_id():
    """The id of the escrow serves where none is given."""
    agreements = config.load(GOOD / "ids_of_agreements.toml", KEY).agreements

    assert [agreement.id for agreement in agreements] == ["customer-1", "esc_2"]


def test_mqtt_over_tls_has_its_own_port_unless_one_is_given():
    """TLS moves the default port, never a given one."""
    ports = [
        source.port
        for source in config.load(GOOD / "every_source.toml", KEY).sources
        if isinstance(source, MqttSourceSettings)
    ]

    assert ports == [8883, 1883]
    assert MqttSourceSettings(kind="mqtt", tls=True, port=1).port == 1


@pytest.mark.parametrize(
    "topic", ["", "/usage", "usage//{meter}", "usage/a+", "$SYS/x", "{meter}/{meter}", "{x}", "#"]
)
def test_a_topic_that_no_source_can_subscribe_to_is_refused(topic: str):
    """What the source would stumble over is found before it is made."""
    with pytest.raises(ValidationError):
        MqttSourceSettings(kind="mqtt", topic=topic)
    with pytest.raises(ValueError, match=r"level|field|none of"):
        TopicTemplate.parse(topic)


def test_both_sides_know_the_same_fields_of_a_topic():
    """What the configuration lets through, the source can read."""
    template = TopicTemplate.parse("/".join(TOPIC_FIELDS))

    assert template.names == {name.strip("{}") for name in TOPIC_FIELDS}


def test_a_deadline_that_is_too_close_for_a_doubt_is_noted_only():
    """A chosen before_deadline below twice the quarantine loads, with a word about it."""
    notes: list[Mistake] = []
    text = (
        (GOOD / "ids_of_agreements.toml")
        .read_text()
        .replace("escrow_percent = 5", 'escrow_percent = 5, before_deadline = "20m"')
    )

    config.parse(text, KEY, warn=notes.append)

    assert [note.key for note in notes] == ["plans.calls.settle.before_deadline"]


# Plans


def plan(pattern: str, keys: str = "") -> PlanSettings:
    text = f'[meters.units]\n[plans.one]\npattern = "{pattern}"\n{keys}\n'
    return config.parse(text, KEY).plans["one"]


def test_the_words_of_the_configuration_are_those_of_the_core():
    """The configuration does not import what it names, so each list is held against the core's."""
    assert set(PATTERNS) == set(Pattern)
    assert set(MODELS) == set(Model)
    assert set(AGGREGATIONS) == set(Aggregation)
    assert all(name.startswith("meterd.") for name in OWN_METERS)


def test_every_pattern_has_its_keys_and_every_key_its_patterns():
    """What a pattern cannot do without belongs to it, and every key of the table exists."""
    assert set(REQUIRED_OF) == set(PATTERNS)
    assert set(PATTERNS_OF) <= set(keys_of(PlanSettings))
    assert all(
        pattern in PATTERNS_OF.get(key, PATTERNS)
        for pattern, keys in REQUIRED_OF.items()
        for key in keys
    )


RATES = 'rates = [{ meter = "units", price = "0.01" }]\nsettle = { units = 100 }'


@pytest.mark.parametrize(
    ("pattern", "keys", "roles", "deposits", "hours", "close"),
    [
        ("pay_per_call", RATES, ("wallet",), (), None, "leave"),
        ("pay_per_call", f'draws_on = "escrow"\n{RATES}', ("main",), (), None, "leave"),
        ("pay_per_token", RATES, ("main",), (), None, "leave"),
        ("streaming", f'deposit = "10"\n{RATES}', ("main",), (("main", 10**7),), None, "refund"),
        ("subscription", 'fee = "10"', ("main",), (("main", 10**7),), 168, "leave"),
        (
            "subscription",
            'fee = "5"\nperiod = "90m"',
            ("main",),
            (("main", 5 * 10**6),),
            2,
            "leave",
        ),
        (
            "subscription",
            'fee = "5"\nversions = [{ effective_from = 2027-01-01T00:00:00Z, fee = "6" }]',
            ("main",),
            (("main", 6 * 10**6),),
            168,
            "leave",
        ),
        (
            "milestone",
            'tranches = [{ name = "a", amount = "2.50" }, { name = "b", amount = "5" }]',
            ("main",),
            (("main", 7_500_000),),
            None,
            "leave",
        ),
        (
            "performance",
            'deposit = "10"\nsteps = [{ score = "0.9", share = "1" }]',
            ("main",),
            (("main", 10**7),),
            None,
            "refund",
        ),
        (
            "hybrid",
            f'fee = "5"\ndeposit = "2"\nat_close = "leave"\n{RATES}',
            ("base", "overage"),
            (("base", 5 * 10**6), ("overage", 2 * 10**6)),
            168,
            "leave",
        ),
    ],
)
def test_a_plan_says_what_it_locks_and_for_how_long_when_the_file_does_not(
    pattern: str,
    keys: str,
    roles: tuple[str, ...],
    deposits: tuple[tuple[str, int], ...],
    hours: int | None,
    close: str,
):
    """Roles, deposits, the service's deadline and the end follow from the pattern."""
    one = plan(pattern, keys)

    assert (roles, deposits, hours, close) == (one.roles, one.deposits, one.hours, one.close)


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2026-12-01T00:00:00Z", 1_796_083_200_000),
        ("2026-12-01 01:00:00.250+01:00", 1_796_083_200_250),
        ("1970-01-01T00:00:00Z", 0),
    ],
)
def test_moments_are_whole_milliseconds_of_utc(text: str, ms: int):
    """A zone is read, and TOML's own moments are the same as those in quotes."""
    moment = tomllib.loads(f"at = {text}")["at"]

    assert (ms, ms) == (values.read_moment(text), values.read_moment(moment))
    assert ms == values.read_moment(values.moment_text(ms))


@pytest.mark.parametrize(
    "given",
    ["", "soon", "2026-12-01", "2026-12-01T00:00:00", "1969-12-31T00:00:00Z", 5, True, None],
)
def test_what_is_no_moment_is_refused(given: object):
    """A moment without a zone is none: it would mean another time on another machine."""
    with pytest.raises(ValidationError):
        TypeAdapter(values.Moment).validate_python(given)


@given(key=st.binary(min_size=32, max_size=32))
def test_a_public_key_is_read_in_hex_and_in_any_base64(key: bytes):
    """Padded or not, with the letters of files or of addresses."""
    plain, safe = base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode()
    texts = [key.hex(), key.hex().upper(), plain, plain.rstrip("="), safe, safe.rstrip("=")]

    assert [key] * 6 == [values.read_public_key(text) for text in texts]


@given(text=st.text(max_size=70))
def test_any_text_for_a_public_key_is_a_key_or_a_refusal(text: str):
    """Nothing else than 32 bytes passes."""
    try:
        key = TypeAdapter(values.PublicKey).validate_python(text)
    except ValidationError:
        return

    assert len(key) == 32


def test_settings_are_written_as_json_in_words_that_can_be_read_again():
    """Moments, keys and amounts go out as texts."""
    settings = config.load(GOOD / "outcome_key_of_another_length.toml", KEY)
    versions = config.load(GOOD / "versions_out_of_order.toml", KEY)

    assert settings.plans["other"].outcome_key is not None
    assert settings.plans["other"].outcome_key.hex() in settings.model_dump_json()
    assert "2026-12-01T00:00:00Z" in versions.model_dump_json()


@pytest.mark.parametrize(
    "escrows", ["3", "{}", "{ main = 3 }", "{ main = [3] }", '{ main = "" }', "{ main = [[]] }"]
)
def test_escrows_that_are_none_are_one_mistake_and_none_for_the_id(escrows: str):
    """Nobody is told of an id that he never wrote."""
    text = f"""
[meters.units]
[plans.one]
pattern = "pay_per_token"
rates = [{{ meter = "units", price = "0.01" }}]
settle = {{ amount = "1" }}
[[agreements]]
plan = "one"
escrows = {escrows}
"""
    found = mistakes_in(text)

    assert len(found) == 1
    assert found[0][0].startswith("agreements[0].escrows")


# Where the file is


def test_the_file_is_searched_from_the_option_to_the_system(tmp_path: Path):
    """The option wins over the environment, that over the working directory, that over /etc."""
    here, system = tmp_path / "meterd.toml", tmp_path / "etc.toml"
    searched = (here, system)
    system.touch()
    from_system = config.find(None, {}, searched)
    here.touch()

    assert system == from_system
    assert here == config.find(None, {}, searched)
    assert Path("env.toml") == config.find(None, {"METERD_CONFIG": "env.toml"}, searched)
    assert Path("c.toml") == config.find(Path("c.toml"), {"METERD_CONFIG": "env.toml"}, searched)


def test_without_a_file_the_error_says_how_to_get_one(tmp_path: Path):
    """The next command stands in the error, for a search and for a name."""
    with pytest.raises(ConfigurationError, match=r"meterd config example > meterd\.toml"):
        config.load(None, KEY, searched=(tmp_path / "none.toml",))
    with pytest.raises(ConfigurationError, match=r"meterd config example > meterd\.toml") as caught:
        config.load(tmp_path / "none.toml", KEY)

    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[log]\n# \xff\n", "is not UTF-8 in line 2"),
        ("[log]".encode("utf-16"), "is not UTF-8 in line 1"),
        (b"#" * (5 << 20), "is larger than 4 MiB"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, part: str):
    """Bytes that are no UTF-8, or too many, are one clear mistake."""
    file = tmp_path / "meterd.toml"
    file.write_bytes(content)

    with pytest.raises(ConfigurationError, match=part):
        config.load(file, KEY)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path):
    """Editors that put a mark in front are forgiven."""
    file = tmp_path / "meterd.toml"
    file.write_bytes(b'\xef\xbb\xbf[log]\r\nlevel = "debug"\r\n')

    assert config.load(file, KEY).log.level == "debug"


# Environment


def test_the_environment_replaces_keys_by_the_type_that_they_have():
    """Texts, numbers, booleans, money, durations, lists, nested tables: each as its key wants."""
    settings = config.parse(
        '[escrow]\nstrict = false\n[meters."a.b"]\n[[sources]]\nkind = "mqtt"\nname = "edge-1"\n',
        {
            **KEY,
            "METERD_HTTP__LISTEN": "127.0.0.1:0",
            "METERD_ESCROW__STRICT": "true",
            "METERD_ESCROW__CONCURRENCY": "3",
            "METERD_ESCROW__RELEASE_MAX": "2.50",
            "METERD_ESCROW__MIN_INTERVAL": "0s",
            "METERD_ESCROW__AGENT_ID": "007",
            "METERD_ESCROW__PATHS__LIST": "/all",
            "METERD_SOURCES__EDGE_1__PASSWORD": "12345678",
            "METERD_METERS__A_B__UNIT": "token",
            "METERD_HTTP__TOKENS": '[{name="a", token="0123456789abcdef", scopes=["read"]}]',
        },
    )
    source = settings.sources[0]

    assert Address("127.0.0.1", 0) == settings.http.listen
    assert (
        settings.escrow.strict,
        settings.escrow.concurrency,
        settings.escrow.release_max_micros,
    ) == (True, 3, 2_500_000)
    assert (Duration(0), "007") == (settings.escrow.min_interval, settings.escrow.agent_id)
    assert settings.escrow.paths.list == "/all"
    assert isinstance(source, MqttSourceSettings)
    assert Secret("12345678") == source.password
    assert settings.meters["a.b"].unit == "token"
    assert settings.http.tokens[0].scopes == ("read",)


def test_a_bad_value_of_the_environment_is_named_with_its_variable():
    """The mistake says where the value came from, since the file does not hold it."""
    found = mistakes_in("", {**KEY, "METERD_ESCROW__CONCURRENCY": "many"})

    assert found == [
        (
            "escrow.concurrency",
            "write a whole number without quotes (given by METERD_ESCROW__CONCURRENCY)",
        )
    ]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("METERD_HTTP__LISTN", 'did you mean "METERD_HTTP__LISTEN"?'),
        ("METERD_ESCROW_API_KEY", 'did you mean "METERD_ESCROW__API_KEY"?'),
        ("METERD_ESCROW__PATHS__LISTS", 'did you mean "METERD_ESCROW__PATHS__LIST"?'),
        ("METERD_ESCROW__STRICT__NOW", 'did you mean "METERD_ESCROW__STRICT"?'),
        ("METERD_DAEMON", "there is no such setting"),
        ("METERD_", "meterd config example shows all there are"),
        ("METERD_WALLET__BASE_UL", 'did you mean "METERD_WALLET__BASE_URL"?'),
        ("METERD_STORE__URL", "is not available in this version"),
        ("METERD_SOURCES__EDGE__URL", 'the file has no entry of sources named "edge"'),
    ],
)
def test_an_unknown_name_of_the_environment_is_a_mistake(name: str, part: str):
    """A misspelt variable never passes for nothing; the nearest name is given."""
    found = mistakes_in("", {**KEY, name: "true"})

    assert [name] == [key for key, _ in found]
    assert part in found[0][1]


@pytest.mark.parametrize(
    "name",
    [
        "METERD_CONFIG",
        "METERD_SERVICE_HOST",
        "METERD_SERVICE_PORT",
        "METERD_SERVICE_PORT_HTTP",
        "METERD_PORT",
        "METERD_PORT_8787_TCP",
        "METERD_PORT_8787_TCP_ADDR",
        "METERD_SANDBOX_SERVICE_HOST",
        "METEROLOGY",
        "PATH",
    ],
)
def test_names_that_others_set_are_left_alone(name: str):
    """What Kubernetes sets for a service called meterd does not stop the daemon."""
    assert config.parse("", {**KEY, name: "x"}) == config.parse("", KEY)


# Secret files


def test_a_secret_comes_from_its_file_without_the_line_end(tmp_path: Path):
    """One trailing line end is no part of the secret; a private file gives no warning."""
    file = tmp_path / "key"
    file.write_text(CANARY + "\n")
    file.chmod(0o600)
    notes: list[Mistake] = []

    settings = config.parse(f"[escrow]\napi_key_file = '{file}'\n", {}, warn=notes.append)

    assert settings.escrow.api_key.reveal() == CANARY
    assert notes == []


def test_a_secret_file_that_everybody_can_read_is_a_warning(tmp_path: Path):
    """The daemon starts all the same, and says what to run."""
    file = tmp_path / "key"
    file.write_text(CANARY)
    file.chmod(0o644)
    notes: list[Mistake] = []

    config.parse("", {"METERD_ESCROW__API_KEY_FILE": str(file)}, warn=notes.append)

    assert [f"escrow.api_key_file: {file} can be read by every user; run: chmod o-r {file}"] == [
        str(note) for note in notes
    ]


@pytest.mark.parametrize(
    ("content", "key", "part"),
    [
        (b"", "escrow.api_key_file", "is empty"),
        (b"\n", "escrow.api_key_file", "is empty"),
        (b"\xff\xfe", "escrow.api_key_file", "is no UTF-8 text"),
        (b"x" * 5000, "escrow.api_key_file", "holds more than 4096 characters"),
        (b"hunter2\nhunter2\n", "escrow.api_key", "may hold only visible ASCII characters"),
    ],
)
def test_a_secret_file_that_holds_no_secret_is_a_mistake(
    tmp_path: Path, content: bytes, key: str, part: str
):
    """Whatever is wrong with the file is said, and nothing of what it holds."""
    file = tmp_path / "key"
    file.write_bytes(content)
    found = mistakes_in(f"[escrow]\napi_key_file = '{file}'\n", {})

    assert [key] == [each for each, _ in found]
    assert part in found[0][1]
    assert str(file) in found[0][1]
    assert "hunter2" not in found[0][1]


def test_the_environment_wins_over_a_secret_file_and_a_file_over_a_secret(tmp_path: Path):
    """Secret and file replace each other when one comes from the environment."""
    file = tmp_path / "key"
    file.write_text("from-file")
    by_text = config.parse("[escrow]\napi_key_file = 'none'\n", KEY)
    by_file = config.parse(
        '[escrow]\napi_key = "in-toml"\n', {"METERD_ESCROW__API_KEY_FILE": str(file)}
    )

    assert by_text.escrow.api_key.reveal() == CANARY
    assert by_file.escrow.api_key.reveal() == "from-file"


def test_a_missing_api_key_says_both_ways_to_give_it():
    """The one key without a default is asked for, file or environment."""
    assert mistakes_in("", {}) == [
        ("escrow.api_key", "is required; write api_key_file, or set METERD_ESCROW__API_KEY")
    ]


# The example and the schema


def test_the_example_loads_cleanly_and_stands_in_the_repository():
    """`meterd config example` is config/meterd.toml, and works once it is given a key."""
    notes: list[Mistake] = []

    settings = config.parse(config.example(), KEY, warn=notes.append)

    assert notes == []
    assert (EXAMPLES / "meterd.toml").read_bytes() == config.example().encode()
    assert list(settings.plans) == ["tokens"]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_configuration_loads_cleanly(file: Path):
    """Nothing that is shipped as an example has a mistake or earns a note."""
    notes: list[Mistake] = []

    config.load(file, KEY, warn=notes.append)

    assert notes == []


_COMMENTED_OUT = re.compile(r"# (\[[a-z.\[\]]+\]|[a-z0-9_]+ = .+)")


def uncommented() -> str:
    return "\n".join(
        found[1] if (found := _COMMENTED_OUT.fullmatch(line)) else line
        for line in config.example().splitlines()
    )


def tables_of_the_example() -> Iterator[tuple[str, type[Table], dict[str, object]]]:
    raw = tomllib.loads(uncommented(), parse_float=Decimal)
    for name, field in keys_of(Settings).items():
        shape = shape_of(field)
        if shape.container is None:
            yield name, shape.tables[""], raw[name]
    yield "http.tokens", TokenSettings, raw["http"]["tokens"][0]
    yield "escrow.paths", config.EscrowPaths, raw["escrow"]["paths"]
    yield "wallet.paths", WalletPaths, raw["wallet"]["paths"]
    yield "sources.redis", RedisSourceSettings, raw["sources"][0]
    yield "sources.mqtt", MqttSourceSettings, raw["sources"][1]
    yield "producers", ProducerSettings, raw["producers"][0]
    yield "producers.caps", LimitSettings, raw["producers"][0]["caps"]
    yield "meters", MeterSettings, raw["meters"]["tokens"]
    plan = raw["plans"]["tokens"]
    yield "plans", PlanSettings, plan
    yield "plans.rates", RateSettings, plan["rates"][0]
    yield "plans.rates.tiers", TierSettings, plan["rates"][0]["tiers"][0]
    yield "plans.settle", SettleSettings, plan["settle"]
    yield "plans.gate", GateSettings, plan["gate"]
    yield "plans.caps", CapsSettings, plan["caps"]
    yield "plans.versions", VersionSettings, plan["versions"][0]
    yield "plans.quota", QuotaSettings, plan["quota"]
    yield "plans.tranches", TrancheSettings, plan["tranches"][0]
    yield "plans.steps", StepSettings, plan["steps"][0]
    yield "agreements", AgreementSettings, raw["agreements"][0]
    yield "agreements.escrows", AgreementEscrows, raw["agreements"][0]["escrows"]
    yield "discover", DiscoverSettings, raw["discover"][0]


@pytest.mark.parametrize(
    ("model", "table"),
    [pytest.param(model, table, id=name) for name, model, table in tables_of_the_example()],
)
def test_the_example_has_every_key_with_its_default(model: type[Table], table: dict[str, object]):
    """Each key of each table stands in the example, with its default where it has one."""
    fields = keys_of(model)
    written = {}
    defaults = {}
    for key, field in fields.items():
        default = field.get_default(call_default_factory=True)
        shape = shape_of(field)
        illustrated = default in (PydanticUndefined, None) or (model, key) in ILLUSTRATED
        if not (illustrated or shape.tables):
            one = create_model("One", __base__=Table, value=(field.rebuild_annotation(), ...))
            written[key] = one.model_validate({"value": table[key]}).value
            defaults[key] = default

    assert set(fields) == set(table)
    assert defaults == written


# Keys whose line in the example shows a use instead of the default.
ILLUSTRATED = {(RateSettings, "per"), (TierSettings, "price"), (TierSettings, "flat")}


def test_every_key_of_the_example_has_its_comment():
    """The line above each key, or above its table, says what it is for."""
    lines = config.example().splitlines()
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if (_COMMENTED_OUT.fullmatch(line) or re.match(r"[a-z0-9_]+ = ", line))
        and "[[" not in line
        and not (above.startswith("# ") and not _COMMENTED_OUT.fullmatch(above))
    ]

    assert bare == []


def test_the_schema_describes_the_keys_of_the_file():
    """Editors get a JSON Schema in the file's own keys, which asks for no secret."""
    schema = config.schema()

    assert set(keys_of(Settings)) == set(schema["properties"])
    assert "api_key" not in schema["$defs"]["EscrowSettings"].get("required", [])
    assert {"price", "per"} < set(schema["$defs"]["RateSettings"]["properties"])
    assert schema == json.loads(json.dumps(schema))


def test_importing_the_configuration_brings_no_other_room():
    """The configuration depends on core and errors alone, and on no slow library but pydantic."""
    script = (
        "import sys, meterd.config;"
        "print(*sorted(m for m in sys.modules if m.split('.')[0] in"
        " {'meterd', 'asyncio', 'numpy', 'aiohttp', 'structlog', 'rich'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    rooms = {name for name in done.stdout.split() if not name.startswith("meterd.config")}

    assert rooms == {
        "meterd",
        "meterd.core",
        "meterd.core.money",
        "meterd.core.paths",
        "meterd.errors",
    }
