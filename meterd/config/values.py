"""What stands behind a `=`: durations, sizes, money, addresses and secrets, each read by rule.

The rule: a value is read whole or refused with a sentence that says what to write instead. Money
and quantities go from their text to scaled integers without ever being a float, and no sentence
repeats what was given for a secret.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from meterd.core import money, paths

MASK = "***"
SECRET_CHARS_MAX = 4096
EXPONENT_MAX = 40  # Far beyond any price; writing out 1e999999999 would take all memory.
PORT_MAX = 65_535


REFUSED = "refused"


def refuse(sentence: str, *, at: str = "") -> NoReturn:
    """Refuse a value inside a validator.

    `sentence` says what to write instead; `at` names the key inside the table where a whole table
    is checked.
    """
    # Braces in the sentence (a topic template) would be taken for the template's own, hence the
    # detour.
    raise PydanticCustomError(REFUSED, "{sentence}", {"sentence": sentence, "at": at})


# Durations and sizes


@dataclass(frozen=True, slots=True, order=True)
class Duration:
    """A span of time in whole milliseconds; a type of its own, so that nobody takes it for s."""

    ms: int

    @property
    def seconds(self) -> float:
        """The same span as `asyncio` wants it."""
        return self.ms / 1000

    def __str__(self) -> str:
        for unit, ms in reversed(_UNITS_MS.items()):
            if self.ms % ms == 0 and self.ms:
                return f"{self.ms // ms}{unit}"
        return "0s"


_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"([0-9]{1,9})(ms|s|m|h|d)\Z", re.ASCII)
DURATION_MAX = Duration(3650 * _UNITS_MS["d"])


def read_duration(value: object) -> Duration:
    """Read "250ms", "30s", "5m", "24h" or "7d"; at most ten years."""
    if isinstance(value, Duration):
        return value
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        refuse('write a duration in quotes, such as "250ms", "30s", "5m", "24h" or "7d"')
    duration = Duration(int(match[1]) * _UNITS_MS[match[2]])
    if duration > DURATION_MAX:
        refuse(f'write at most "{DURATION_MAX}"')
    return duration


def read_positive_duration(value: object) -> Duration:
    """Read a duration that is longer than nothing."""
    duration = read_duration(value)
    if duration.ms == 0:
        refuse('write a duration longer than zero, such as "1s"')
    return duration


_SIZES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_SIZE = re.compile(r"([0-9]{1,9})(B|KiB|MiB|GiB)\Z", re.ASCII)


def read_size(value: object) -> int:
    """Read "64KiB" or "1MiB", or a whole number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        refuse('write a size in quotes, such as "64KiB" or "1MiB"')
    return int(match[1]) * _SIZES[match[2]]


# Money and quantities


def _plain_decimal(value: object, example: str) -> str:
    """Write what TOML made of a number in plain notation, or refuse it."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**16:
        return str(value)
    if isinstance(value, Decimal) and value.is_finite():
        exponent = value.as_tuple().exponent
        assert isinstance(exponent, int)  # Only NaN and the infinities have letters there.
        if abs(exponent) <= EXPONENT_MAX and abs(value.adjusted()) <= EXPONENT_MAX:
            return format(value, "f")
    refuse(f'write a plain decimal in quotes, such as "{example}"')


def _read_number(value: object, *, decimals: int, example: str, zero: bool = False) -> int:
    """Read a decimal as an integer of 10^-decimals; `zero`: nothing is allowed too."""
    text = _plain_decimal(value, example)
    if text.startswith("-"):
        sentence = NOT_BELOW_NOTHING if zero else MORE_THAN_NOTHING
        refuse(sentence.format(example=example))
    try:
        scaled = money.parse_scaled(text, decimals)
    except money.BadNumber as error:
        refuse(f'{error}; write at most {decimals} decimals in quotes, such as "{example}"')
    if scaled == 0 and not zero:
        refuse(MORE_THAN_NOTHING.format(example=example))
    return scaled


MORE_THAN_NOTHING = 'must be greater than 0; write for example "{example}"'
NOT_BELOW_NOTHING = 'must not be below 0; write for example "{example}"'


def read_amount(value: object) -> int:
    """Read an amount of USDC greater than 0, at most 6 decimals, as micros."""
    return _read_number(value, decimals=money.AMOUNT_DECIMALS, example="0.10")


def read_amount_or_zero(value: object) -> int:
    """Read an amount of USDC, at most 6 decimals, as micros."""
    return _read_number(value, decimals=money.AMOUNT_DECIMALS, example="0.10", zero=True)


def read_charge(value: object) -> int:
    """Read an amount that becomes a price (a fee, a tranche), so at most 1e6 USDC, as micros."""
    micros = read_amount(value)
    if micros > money.PRICE_MAX * money.MICROS:
        refuse(AT_MOST_PRICE_MAX)
    return micros


AT_MOST_PRICE_MAX = f"must be at most {money.PRICE_MAX} USDC"
EXAMPLE_PRICE = "0.002"


def read_price(value: object) -> int:
    """Read a price in USDC greater than 0, at most 1e6 with 12 decimals, as picos."""
    return _read_price(value, zero=False)


def read_price_or_zero(value: object) -> int:
    """Read a price in USDC, at most 1e6 with 12 decimals, as picos."""
    return _read_price(value, zero=True)


def _read_price(value: object, *, zero: bool) -> int:
    picos = _read_number(value, decimals=money.PRICE_DECIMALS, example=EXAMPLE_PRICE, zero=zero)
    if picos > money.PRICE_MAX * money.PICOS:
        refuse(AT_MOST_PRICE_MAX)
    return picos


PERCENT_DECIMALS = money.PRICE_DECIMALS - 2  # A percent with ten is a share with twelve.


def read_percent(value: object) -> int:
    """Read a percentage greater than 0, at most 100, as picos of the whole."""
    picos = _read_number(value, decimals=PERCENT_DECIMALS, example="2.5")
    if picos > money.PICOS:
        refuse('must be at most 100; write for example "2.5"')
    return picos


def read_share(value: object) -> int:
    """Read a share greater than 0, at most 1, as picos of the whole."""
    picos = _read_number(value, decimals=money.PRICE_DECIMALS, example="0.70")
    if picos > money.PICOS:
        refuse('must be at most 1, which is all of it; write for example "0.70"')
    return picos


def read_quantity(value: object) -> int:
    """Read a quantity greater than 0, at most 1e15 and 9 decimals, as nanos."""
    nanos = _read_number(value, decimals=money.QUANTITY_DECIMALS, example="100")
    if nanos > money.QUANTITY_MAX * money.NANOS:
        refuse("must be at most 1000000000000000 (1e15)")
    return nanos


def read_score(value: object) -> int:
    """Read a score from 0 to 1, at most 9 decimals, as nanos."""
    nanos = _read_number(value, decimals=money.QUANTITY_DECIMALS, example="0.9", zero=True)
    if nanos > money.NANOS:
        refuse('a score is from 0 to 1; write for example "0.9"')
    return nanos


# Moments and public keys

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_ZONED = 'write a moment with its zone, such as "2026-12-01T00:00:00Z"'


def read_moment(value: object) -> int:
    """Read a date and time with its zone, in quotes or as TOML's own, as wall ms."""
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        moment = None
    if not isinstance(moment, datetime) or moment.utcoffset() is None or moment < _EPOCH:
        refuse(_ZONED)
    return (moment - _EPOCH) // _MS


def moment_text(ms: int) -> str:
    """Write wall ms as a moment in UTC."""
    return (_EPOCH + ms * _MS).isoformat().replace("+00:00", "Z")


PUBLIC_KEY_BYTES = 32  # Of Ed25519.


def read_public_key(value: object) -> bytes:
    """Read an Ed25519 public key in hex or base64."""
    key = _bytes_of(value.strip()) if isinstance(value, str) else b""
    if len(key) != PUBLIC_KEY_BYTES:
        refuse(
            f"is no Ed25519 public key; write its {PUBLIC_KEY_BYTES} bytes as 64 hex digits or"
            " 44 characters of base64"
        )
    return key


def _bytes_of(text: str) -> bytes:
    if re.fullmatch(r"[0-9A-Fa-f]{64}", text, re.ASCII):
        return bytes.fromhex(text)
    try:
        padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
        return base64.b64decode(padded.translate(str.maketrans("-_", "+/")), validate=True)
    except (binascii.Error, ValueError):
        return b""


# Addresses and paths


UNIX = "unix:"
SOCKET_BYTES_MAX = 107  # What the kernel has room for.


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a host name or IP address, and a port (0: any that is free).

    With a `path` it is a Unix socket, without host and port.
    """

    host: str
    port: int
    path: str = ""

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can connect."""
        return bool(self.path) or is_loopback(self.host)

    def __str__(self) -> str:
        if self.path:
            return f"{UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Tell whether `host` is this machine by its name or its number; no resolver is asked."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})\Z", re.ASCII)


def read_address(value: object) -> Address:
    """Read "127.0.0.1:8787", "localhost:8787", "[::1]:8787" or "unix:/run/meterd/http.sock"."""
    if isinstance(value, Address):
        return value
    if isinstance(value, str) and value.startswith(UNIX):
        return _read_socket(value.removeprefix(UNIX))
    match = _ADDRESS.match(value) if isinstance(value, str) else None
    if match is None or int(match[3]) > PORT_MAX:
        refuse('write host and port in quotes, such as "127.0.0.1:8787" or "[::1]:8787"')
    return Address(match[1] or match[2], int(match[3]))


def _read_socket(path: str) -> Address:
    if not path.startswith("/") or path.endswith("/") or not path.isprintable():
        refuse('write the whole path of a socket, such as "unix:/run/meterd/http.sock"')
    if len(path.encode()) > SOCKET_BYTES_MAX:
        refuse(f"the path of a socket may have {SOCKET_BYTES_MAX} bytes; write a shorter one")
    return Address("", 0, path)


def read_path(value: object) -> Path:
    """Read a path; a relative one starts in the directory in which meterd was started."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        refuse("write a path in quotes")
    return Path(value)


# Secrets


class Secret:
    """A text that nobody may see: it is printed as `***`, and refuses to be pickled."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself, for the one line of code that sends it to whom it belongs."""
        return self._text

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written anywhere")


class Unread(Secret):
    """What stands in for a secret that could not be read, so that the rest can be checked."""

    __slots__ = ()


def read_secret(value: object) -> Secret:
    """Read a secret that may hold any character (a password)."""
    if isinstance(value, Secret):
        return value
    if not isinstance(value, str):
        refuse("write the text in quotes")
    if not value or len(value) > SECRET_CHARS_MAX:
        refuse(f"must have between 1 and {SECRET_CHARS_MAX} characters")
    return Secret(value)


def read_bearer(value: object, *, chars_min: int) -> Secret:
    """Read a secret that travels in an HTTP header: visible ASCII, so that it cannot end it."""
    secret = read_secret(value)
    text = secret.reveal()
    if not all("!" <= char <= "~" for char in text):
        refuse("may hold only visible ASCII characters, without blanks or line ends")
    if len(text) < chars_min:
        refuse(f"must have at least {chars_min} characters")
    return secret


WEBHOOK_PREFIX = "whsec_"
WEBHOOK_BYTES_MIN, WEBHOOK_BYTES_MAX = 24, 64  # As Standard Webhooks has it.


def webhook_key(secret: Secret) -> bytes:
    """Decode a signing key of Standard Webhooks; nothing where it is none."""
    text = secret.reveal()
    try:
        key = base64.b64decode(text.removeprefix(WEBHOOK_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return b""
    fits = WEBHOOK_BYTES_MIN <= len(key) <= WEBHOOK_BYTES_MAX
    return key if fits and text.startswith(WEBHOOK_PREFIX) else b""


def read_webhook_secret(value: object) -> Secret:
    """Read a signing key in the form of Standard Webhooks."""
    secret = read_secret(value)
    if not isinstance(secret, Unread) and not webhook_key(secret):
        refuse(
            f"is no key of Standard Webhooks; write {WEBHOOK_PREFIX} and the base64 of"
            f" {WEBHOOK_BYTES_MIN} to {WEBHOOK_BYTES_MAX} random bytes:"
            f' echo "{WEBHOOK_PREFIX}$(openssl rand -base64 32)"'
        )
    return secret


REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def read_redis_url(value: object) -> Secret:
    """Read a Redis address; it is a secret because it may hold a password."""
    secret = read_secret(value)
    if not secret.reveal().startswith(REDIS_SCHEMES):
        refuse('write an address such as "redis://127.0.0.1:6379/0", "rediss://…" or "unix://…"')
    if not secret.reveal().startswith("unix:") and not _names_a_host_and_a_number(secret.reveal()):
        refuse(
            "is no redis://[user]:[password]@host:port/number; in the password write %2F for /, "
            "%40 for @, %23 for #, %3F for ?, %25 for %"
        )
    return secret


def _names_a_host_and_a_number(url: str) -> bool:
    """Whether all of a password stands where one is looked for, so that the rest may be shown."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    plain = parts.netloc.count("@") <= 1 and not parts.fragment
    return bool(host) and plain and re.fullmatch(r"(/[0-9]*)?", parts.path, re.ASCII) is not None


TOKEN_CHARS_MIN = 16  # Shorter ones can be guessed over a network.

_DURATION_SCHEMA = {"type": "string", "pattern": "^[0-9]{1,9}(ms|s|m|h|d)$"}
_DECIMAL_SCHEMA = {"type": ["string", "number"], "pattern": "^[0-9]+(\\.[0-9]+)?$"}
_TEXT = PlainSerializer(str, when_used="json")
_SECRET_SCHEMA = WithJsonSchema({"type": "string", "writeOnly": True})


def _decimal_text(scaled: int, decimals: int) -> str:
    return money.format_scaled(scaled, decimals)


def _decimal(decimals: int) -> PlainSerializer:
    return PlainSerializer(partial(_decimal_text, decimals=decimals), when_used="json")


Span = Annotated[
    Duration, BeforeValidator(read_positive_duration), WithJsonSchema(_DURATION_SCHEMA), _TEXT
]
SpanOrZero = Annotated[
    Duration, BeforeValidator(read_duration), WithJsonSchema(_DURATION_SCHEMA), _TEXT
]
Size = Annotated[
    int,
    BeforeValidator(read_size),
    WithJsonSchema({"type": ["string", "integer"], "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"}),
]
Micros = Annotated[
    int,
    BeforeValidator(read_amount),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(money.AMOUNT_DECIMALS),
]
Picos = Annotated[
    int,
    BeforeValidator(read_price),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(money.PRICE_DECIMALS),
]
Nanos = Annotated[
    int,
    BeforeValidator(read_quantity),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(money.QUANTITY_DECIMALS),
]
MicrosOrZero = Annotated[
    int,
    BeforeValidator(read_amount_or_zero),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(money.AMOUNT_DECIMALS),
]
Charge = Annotated[
    int,
    BeforeValidator(read_charge),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(money.AMOUNT_DECIMALS),
]
PicosOrZero = Annotated[
    int,
    BeforeValidator(read_price_or_zero),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(money.PRICE_DECIMALS),
]
Percent = Annotated[
    int,
    BeforeValidator(read_percent),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(PERCENT_DECIMALS),
]
Share = Annotated[
    int,
    BeforeValidator(read_share),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(money.PRICE_DECIMALS),
]
Score = Annotated[
    int,
    BeforeValidator(read_score),
    WithJsonSchema(_DECIMAL_SCHEMA),
    _decimal(money.QUANTITY_DECIMALS),
]
Moment = Annotated[
    int,
    BeforeValidator(read_moment),
    WithJsonSchema({"type": "string", "format": "date-time"}),
    PlainSerializer(moment_text, when_used="json"),
]
PublicKey = Annotated[
    bytes,
    BeforeValidator(read_public_key),
    WithJsonSchema({"type": "string", "minLength": 43}),
    PlainSerializer(bytes.hex, when_used="json"),
]
ListenAddress = Annotated[
    Address,
    BeforeValidator(read_address),
    WithJsonSchema({"type": "string", "pattern": "^unix:/|:[0-9]{1,5}$"}),
    _TEXT,
]
FilePath = Annotated[
    Path, BeforeValidator(read_path), WithJsonSchema({"type": "string", "minLength": 1}), _TEXT
]
Password = Annotated[Secret, BeforeValidator(read_secret), _SECRET_SCHEMA, _TEXT]
ApiKey = Annotated[
    Secret, BeforeValidator(partial(read_bearer, chars_min=1)), _SECRET_SCHEMA, _TEXT
]
Token = Annotated[
    Secret,
    BeforeValidator(partial(read_bearer, chars_min=TOKEN_CHARS_MIN)),
    _SECRET_SCHEMA,
    _TEXT,
]
WebhookSecret = Annotated[Secret, BeforeValidator(read_webhook_secret), _SECRET_SCHEMA, _TEXT]
RedisUrl = Annotated[Secret, BeforeValidator(read_redis_url), _SECRET_SCHEMA, _TEXT]

# Escrow ids are put into addresses; anything else in them could name another call.
ESCROW_ID = r"^[A-Za-z0-9_-]{1,64}$"
# Names become labels, levels of topics and parts of addresses.
NAME = r"^[A-Za-z0-9_.:-]{1,128}$"
NAME_PATTERN = r"^[A-Za-z0-9_.:*?\[\]!-]{1,128}$"
LINE = r"^[^\x00-\x1f\x7f]{0,256}$"
MEMO = r"^[^\x00-\x1f\x7f]{0,200}$"
AGENT_ID = r"^[A-Za-z0-9_.:-]{1,64}$"
HEADER = r"^[A-Za-z0-9-]{1,64}$"
JSON_PATH = r"^\$[^\x00-\x1f\x7f]{0,255}$"

# What to write instead, for each of the patterns above.
PATTERN_SENTENCES = {
    ESCROW_ID: "write 1 to 64 letters, digits, _ or -",
    NAME_PATTERN: "write an id, or a pattern of one with * and ?, such as customer-*",
    NAME: "write 1 to 128 letters, digits, _ . : or -",
    LINE: "write one line of at most 256 characters",
    MEMO: "write one line of at most 200 characters",
    AGENT_ID: "write 1 to 64 letters, digits, _ . : or -",
    HEADER: "write the name of an HTTP header, such as Idempotency-Key",
    JSON_PATH: 'write a JSONPath that begins with $, such as "$.usage.total_tokens"',
}

EscrowId = Annotated[str, StringConstraints(pattern=ESCROW_ID)]


def _one_or_more(value: object) -> object:
    """Take one id for a list of one, and say what is wrong with it at its own key."""
    if not isinstance(value, str):
        return value
    if re.search(ESCROW_ID, value) is None or "\n" in value:
        refuse(PATTERN_SENTENCES[ESCROW_ID])
    return (value,)


# Oldest first: an escrow cannot be topped up, so a payer comes with the next one.
EscrowIds = Annotated[
    tuple[EscrowId, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_one_or_more, json_schema_input_type=EscrowId | tuple[EscrowId, ...]),
]
Name = Annotated[str, StringConstraints(pattern=NAME)]
NamePattern = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Line = Annotated[str, StringConstraints(pattern=LINE)]
Memo = Annotated[str, StringConstraints(pattern=MEMO)]
AgentId = Annotated[str, StringConstraints(pattern=AGENT_ID)]
HeaderName = Annotated[str, StringConstraints(pattern=HEADER)]


def _followed(path: str) -> str:
    try:
        paths.Path(path)
    except paths.BadPath as error:
        refuse(f'is no JSONPath ({error}); write one such as "$.usage.total_tokens"')
    return path


JsonPath = Annotated[str, StringConstraints(pattern=JSON_PATH), AfterValidator(_followed)]
