"""The settings of meterd: one frozen model for each table of the file, each key with its default.

The rule: a key is here (or, below `[plans]`, in `plans`) or it does not exist. What a later version
will take is known by name (`NOT_AVAILABLE`), so that it is refused with a sentence and never
ignored. A model checks what can be seen inside itself; what lies between two tables is in `checks`.
Fields that hold money or quantities say their unit, which the key in the file leaves out: `price`
in the file is `price_picos` here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, model_validator

from meterd.config.plans import LimitSettings, PlanSettings
from meterd.config.table import NOT_YET, Listed, Table, one_of
from meterd.config.values import (
    AGENT_ID,
    ESCROW_ID,
    WEBHOOK_PREFIX,
    Address,
    AgentId,
    ApiKey,
    Duration,
    EscrowIds,
    FilePath,
    HeaderName,
    JsonPath,
    Line,
    ListenAddress,
    Memo,
    Micros,
    Name,
    NamePattern,
    Password,
    RedisUrl,
    Secret,
    Size,
    Span,
    SpanOrZero,
    Token,
    WebhookSecret,
    is_loopback,
    read_amount,
    read_duration,
    read_size,
    refuse,
)

# Keys that a later version takes: known, so that nobody looks for a spelling mistake. `*` is any
# name, [] any place.
NOT_AVAILABLE: Mapping[str, str] = {
    "store.url": f'{NOT_YET}: remove it; kind = "sqlite" keeps its file in daemon.data_dir',
}

BATCH_MAX = 100_000


class DaemonSettings(Table):
    """`[daemon]`: the process itself."""

    data_dir: FilePath = Path("meterd-data")
    drain_timeout: SpanOrZero = read_duration("30s")


class LogSettings(Table):
    """`[log]`: how much is said, and to whom."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class TokenSettings(Table):
    """One entry of `http.tokens`: who may do what."""

    name: Name
    token: Token
    token_file: FilePath | None = None
    scopes: Listed[Literal["ingest", "gate", "read", "admin"]] = Field(min_length=1)


class HttpSettings(Table):
    """`[http]`: where meterd listens."""

    listen: ListenAddress = Address("127.0.0.1", 8787)
    tls_cert_file: FilePath | None = None
    tls_key_file: FilePath | None = None
    behind_proxy: bool = False
    tokens: Listed[TokenSettings] = ()
    body_limit_bytes: Size = Field(default=read_size("1MiB"), alias="body_limit")
    pending_max: int = Field(default=20_000, ge=1, le=10_000_000)

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> HttpSettings:
        given = (self.tls_cert_file is not None, self.tls_key_file is not None)
        if any(given) and not all(given):
            refuse(
                "tls_cert_file and tls_key_file belong together; write both or none",
                at="tls_key_file" if given[0] else "tls_cert_file",
            )
        if all(given) and self.listen.path:
            refuse("a Unix socket needs no TLS; remove both files", at="tls_cert_file")
        return self

    @property
    def speaks_tls(self) -> bool:
        """Whether meterd itself encrypts."""
        return self.tls_cert_file is not None


class OtlpSettings(Table):
    """`[otlp]`: which spans of OpenTelemetry's exporters are usage."""

    operations: Annotated[Listed[Name], Field(min_length=1)] = (
        *("chat", "text_completion", "generate_content", "embeddings"),
    )
    body_limit_bytes: Size = Field(default=read_size("4MiB"), alias="body_limit")


class StoreSettings(Table):
    """`[store]`: what survives a crash."""

    kind: Annotated[Literal["sqlite"], one_of(("sqlite",), "kind of store", ("redis",))] = "sqlite"


class DedupeSettings(Table):
    """`[dedupe]`: how long, and how many, identities of events are remembered."""

    window: Span = read_duration("72h")
    entries_max: int = Field(default=20_000_000, ge=1, le=1_000_000_000)


def _path_with_id(path: str) -> str:
    if path.count("{id}") != 1 or not _PATH.match(path):
        refuse('write a path that begins with / and has {id} once, such as "/escrow/{id}/release"')
    return path


def _path_without_id(path: str) -> str:
    if "{" in path or not _PATH.match(path):
        refuse('write a path that begins with /, such as "/escrow"')
    return path


_PATH = re.compile(r"/[A-Za-z0-9_./{}-]{0,255}\Z", re.ASCII)
PathWithId = Annotated[str, AfterValidator(_path_with_id)]
PathWithoutId = Annotated[str, AfterValidator(_path_without_id)]


class EscrowPaths(Table):
    """`escrow.paths`: what stands behind `base_url` for each call."""

    create: PathWithoutId = "/escrow"
    list: PathWithoutId = "/escrow"
    status: PathWithId = "/escrow/{id}"
    release: PathWithId = "/escrow/{id}/release"
    release_partial: PathWithId = "/escrow/{id}/release-partial"
    refund: PathWithId = "/escrow/{id}/refund"


def _service_address(url: str) -> str:
    """The API key is sent here, so the address must be plain to see and safe from listeners."""
    example = 'such as "https://escrow.example.com/api/v1"'
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        refuse(f"write an address, {example}")
    if parts.scheme not in {"http", "https"} or not host or not _URL.match(url):
        refuse(f"write an address with https and a host, {example}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        refuse(f"write it without user, password, ? and #, {example}")
    if parts.scheme == "http" and not is_loopback(host):
        refuse("http sends the API key in the clear; write https (http is for loopback alone)")
    return url.rstrip("/")


_URL = re.compile(r"[!-~]{1,512}\Z", re.ASCII)


class EscrowSettings(Table):
    """`[escrow]`: the service that holds the money, and how far it is trusted."""

    base_url: Annotated[str, AfterValidator(_service_address)] = (
        "https://escrow.purpleflea.com/api/v1"
    )
    api_key: ApiKey
    api_key_file: FilePath | None = None
    payer_api_key: ApiKey | None = None
    payer_api_key_file: FilePath | None = None
    agent_id: Line = ""
    paths: EscrowPaths = Field(default_factory=EscrowPaths)
    idempotency_header: HeaderName = "Idempotency-Key"
    idempotency: Literal["ignored", "honoured"] = "ignored"
    quantum_micros: Micros = Field(default=read_amount("0.000001"), alias="quantum")
    request_timeout: Span = read_duration("30s")
    in_doubt_quarantine: Span = read_duration("15m")
    observe_gap: SpanOrZero = read_duration("10s")
    voids_per_day: int = Field(default=1, ge=0, le=1000)
    doubts_max: int = Field(default=3, ge=1, le=1000)
    doubts_window: Span = read_duration("10m")
    strict: bool = False
    release_max_micros: Micros = Field(default=read_amount("10.00"), alias="release_max")
    on_foreign_release: Literal["freeze", "credit"] = "freeze"
    on_deadline: Literal["provider", "consumer", "unknown"] = "unknown"
    min_interval: SpanOrZero = read_duration("2s")
    concurrency: int = Field(default=16, ge=1, le=1024)
    discover_interval: Span = read_duration("60s")

    @model_validator(mode="after")
    def _one_release_can_move_money(self) -> EscrowSettings:
        if self.release_max_micros < self.quantum_micros:
            refuse("is below quantum, so nothing could be released; raise it", at="release_max")
        return self


class RedisSourceSettings(Table):
    """`[[sources]]` with kind = "redis": a stream of a Redis server."""

    kind: Literal["redis"]
    name: Name = "redis"
    url: RedisUrl = Field(default_factory=lambda: Secret("redis://127.0.0.1:6379/0"))
    url_file: FilePath | None = None
    stream: Annotated[Line, Field(min_length=1)] = "meterd:usage"
    group: Annotated[Line, Field(min_length=1)] = "meterd"
    mode: Literal["exclusive", "group"] = "exclusive"
    batch: int = Field(default=5_000, ge=1, le=BATCH_MAX)
    block: Span = read_duration("1s")


TOPIC_FIELDS = ("{escrow_id}", "{agreement}", "{meter}", "{source}", "{type}")
MQTT_PORT, MQTT_TLS_PORT = 1883, 8883
SESSION_EXPIRY_MAX = Duration((2**32 - 2) * 1000)  # Beyond it the protocol means "for ever".


def _topic_template(topic: str) -> str:
    levels = topic.split("/")
    if levels[0] == "$share":
        refuse('leave $share out here and write share = "NAME"')
    if "#" in topic:
        refuse("write one level for each part, such as meterd/usage/{escrow_id}/{meter}, without #")
    for level in levels:
        if ("{" in level or "}" in level) and level not in TOPIC_FIELDS:
            refuse(f'"{level[:64]}" is no whole level of {", ".join(TOPIC_FIELDS)}')
        if "+" in level and level != "+":
            refuse("+ must be a whole level")
        if not level or "$" in level:
            refuse("write at least one character in each level, and no $")
    if any(levels.count(field) > 1 for field in TOPIC_FIELDS):
        refuse("name each field once")
    return topic


def _share_name(share: str) -> str:
    if set(share) & set("/+#"):
        refuse("write a name without / + and #")
    return share


def _session_expiry(expiry: Duration) -> Duration:
    if expiry > SESSION_EXPIRY_MAX or expiry.ms % 1000:
        refuse('write whole seconds, such as "7d"')
    return expiry


class MqttSourceSettings(Table):
    """`[[sources]]` with kind = "mqtt": a topic of an MQTT broker, in a session that survives."""

    kind: Literal["mqtt"]
    name: Name = "mqtt"
    host: Annotated[Line, Field(min_length=1)] = "127.0.0.1"
    port: int = Field(default=MQTT_PORT, ge=1, le=65_535)
    topic: Annotated[Line, AfterValidator(_topic_template)] = "meterd/usage/{escrow_id}/{meter}"
    client_id: Name = "meterd"
    protocol: Literal["5", "3.1.1"] = "5"
    username: Line = ""
    password: Password | None = None
    password_file: FilePath | None = None
    tls: bool = False
    ca_file: FilePath | None = None
    cert_file: FilePath | None = None
    key_file: FilePath | None = None
    receive_maximum: int = Field(default=5_000, ge=1, le=65_535)
    session_expiry: Annotated[Span, AfterValidator(_session_expiry)] = read_duration("7d")
    share: Annotated[Line, AfterValidator(_share_name)] = ""
    allow_anonymous: bool = False
    allow_qos0: bool = False
    batch: int = Field(default=5_000, ge=1, le=BATCH_MAX)

    @model_validator(mode="before")
    @classmethod
    def _tls_has_its_own_port(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tls") is True:
            return {"port": MQTT_TLS_PORT, **given}
        return given

    @model_validator(mode="after")
    def _files_belong_to_tls(self) -> MqttSourceSettings:
        files = {"ca_file": self.ca_file, "cert_file": self.cert_file, "key_file": self.key_file}
        given = [key for key, path in files.items() if path is not None]
        if given and not self.tls:
            refuse(f"is off, but {' and '.join(given)} given; write tls = true", at="tls")
        if ("cert_file" in given) != ("key_file" in given):
            refuse(
                "cert_file and key_file belong together; write both or none",
                at="key_file" if "cert_file" in given else "cert_file",
            )
        return self

    @model_validator(mode="after")
    def _old_protocol_wants_a_user(self) -> MqttSourceSettings:
        if self.protocol == "3.1.1" and self.password is not None and not self.username:
            refuse("MQTT 3.1.1 takes no password without a user; write one", at="username")
        return self


SourceSettings = Annotated[RedisSourceSettings | MqttSourceSettings, Field(discriminator="kind")]
SOURCE_KINDS = ("redis", "mqtt")
# Kinds of the glossary that need no entry of their own.
BUILT_IN_SOURCES: Mapping[str, str] = {
    "http": "needs no entry: POST /v1/events is served at http.listen; remove the entry",
    "file": "needs no entry: files come in by `meterd replay FILE`; remove the entry",
    "otlp": (
        "needs no entry: POST /v1/traces and /v1/logs are served at http.listen; remove the entry"
    ),
}


class IngestSettings(Table):
    """`[ingest]`: what comes in at all."""

    require_producer: bool = False


class ProducerSettings(Table):
    """`[[producers]]`: who sends usage, how it proves it, and for which agreements it may."""

    name: Name
    token: Annotated[Line, Field(max_length=128)] = ""
    sources: Listed[Name] = ()
    secret: WebhookSecret | None = None
    secret_file: FilePath | None = None
    old_secret: WebhookSecret | None = None
    old_secret_file: FilePath | None = None
    agreements: Listed[NamePattern] = ()
    caps: LimitSettings | None = None

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The keys that are live."""
        return tuple(key for key in (self.secret, self.old_secret) if key is not None)

    @model_validator(mode="after")
    def _can_be_known(self) -> ProducerSettings:
        if not self.token and not self.sources:
            refuse(
                "is required, or sources: by one of the two a producer is known; write the name of"
                ' one of http.tokens, such as token = "svc-a"',
                at="token",
            )
        if self.old_secret is not None and self.secret is None:
            refuse("is required beside old_secret; write the key that comes after it", at="secret")
        if self.old_secret is not None and self.old_secret == self.secret:
            refuse("is the same key as secret; write the one before it, or none", at="old_secret")
        return self


AGGREGATIONS = ("sum", "count", "max", "unique", "latest")


class MeterSettings(Table):
    """`[meters.NAME]`: what is measured."""

    aggregation: Annotated[
        Literal["sum", "count", "max", "unique", "latest"],
        one_of(AGGREGATIONS, "aggregation"),
    ] = "sum"
    event_type: Line = ""
    value: JsonPath | None = None
    dimensions: dict[Name, JsonPath] = Field(default_factory=dict)
    unit: Line = ""

    @property
    def adds_up(self) -> bool:
        """Whether what it shows is a sum over events."""
        return self.aggregation in {"sum", "count"}

    @model_validator(mode="after")
    def _count_counts_events(self) -> MeterSettings:
        if self.aggregation == "count" and self.value is not None:
            refuse('count counts events; remove it, or write aggregation = "sum"', at="value")
        return self


class WalletPaths(Table):
    """`wallet.paths`: what stands behind its `base_url` for each call; {id} is the payer's."""

    debit: PathWithoutId = "/wallet/debit"
    status: PathWithId = "/wallet/{id}"


class WalletSettings(Table):
    """`[wallet]`: the service that keeps payers' wallets; usually it is the escrow service."""

    base_url: Annotated[str, AfterValidator(_service_address)] | None = None
    api_key: ApiKey | None = None
    api_key_file: FilePath | None = None
    paths: WalletPaths = Field(default_factory=WalletPaths)
    minimum_micros: Micros = Field(default=read_amount("0.01"), alias="minimum")


class AgreementEscrows(Table):
    """`escrows`: what an agreement draws on, by role; a plan says which roles it has."""

    base: EscrowIds | None = None
    main: EscrowIds | None = None
    overage: EscrowIds | None = None
    wallet: AgentId | None = None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """All of them as (role, id): by role, and the oldest of a role first."""
        listed = (("base", self.base), ("main", self.main), ("overage", self.overage))
        pairs = tuple((role, escrow) for role, ids in listed for escrow in ids or ())
        return pairs if self.wallet is None else (*pairs, ("wallet", self.wallet))

    @property
    def ids(self) -> tuple[str, ...]:
        """All of them, in the same order."""
        return tuple(escrow for _, escrow in self.pairs)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that are given, sorted."""
        return tuple(sorted({role for role, _ in self.pairs}))


class AgreementSettings(Table):
    """`[[agreements]]`: a payer under a plan. Without an id, its first escrow's id serves."""

    id: Name
    plan: Name
    payer: Line = ""
    escrows: AgreementEscrows

    @model_validator(mode="before")
    @classmethod
    def _id_of_the_first_escrow(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # An escrow that will be refused is one mistake, not one more for an id that nobody wrote.
        return {"id": _first_escrow(given.get("escrows")) or "unknown", **given}


def _first_escrow(escrows: object) -> str:
    """The id of the first escrow as it stands in the file; "" where there is none to read."""
    if not isinstance(escrows, dict):
        return ""
    for role in AgreementEscrows.model_fields:
        given = escrows.get(role)
        first = given[0] if isinstance(given, list) and given else given
        if isinstance(first, str) and re.search(AGENT_ID if role == "wallet" else ESCROW_ID, first):
            return first
    return ""


class DiscoverSettings(Table):
    """`[[discover]]`: escrows that are bound by their memo as soon as the service lists them."""

    memo: Annotated[Memo, Field(min_length=1)]
    plan: Name


class MetricsSettings(Table):
    """`[metrics]`: which labels the metrics carry."""

    per_agreement: bool = False


class Settings(Table):
    """The whole configuration, checked."""

    daemon: DaemonSettings = Field(default_factory=DaemonSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    otlp: OtlpSettings = Field(default_factory=OtlpSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    dedupe: DedupeSettings = Field(default_factory=DedupeSettings)
    escrow: EscrowSettings
    wallet: WalletSettings = Field(default_factory=WalletSettings)
    sources: Listed[SourceSettings] = ()
    ingest: IngestSettings = Field(default_factory=IngestSettings)
    producers: Listed[ProducerSettings] = ()
    meters: dict[Name, MeterSettings] = Field(default_factory=dict)
    plans: dict[Name, PlanSettings] = Field(default_factory=dict)
    agreements: Listed[AgreementSettings] = ()
    discover: Listed[DiscoverSettings] = ()
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)

    def secrets(self) -> Iterator[str]:
        """Every text in here that must never be printed, passwords inside addresses included."""
        yield self.escrow.api_key.reveal()
        if self.escrow.payer_api_key is not None:
            yield self.escrow.payer_api_key.reveal()
        if self.wallet.api_key is not None:
            yield self.wallet.api_key.reveal()
        yield from (entry.token.reveal() for entry in self.http.tokens)
        for producer in self.producers:
            for secret in producer.secrets:
                yield secret.reveal()
                yield secret.reveal().removeprefix(WEBHOOK_PREFIX)
        for source in self.sources:
            if isinstance(source, MqttSourceSettings):
                if source.password is not None:
                    yield source.password.reveal()
            elif password := urlsplit(source.url.reveal()).password:
                yield password
                yield unquote(password)
