"""What the HTTP API is told: limits and tokens, and nothing else of the configuration."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from meterd.otlp.genai import COUNTED


class Scope(enum.StrEnum):
    """What a token may do.

    None of them implies another: a token has the scopes that are listed for it.
    """

    INGEST = "ingest"
    GATE = "gate"
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class ApiToken:
    """One bearer token; its text is in no repr."""

    name: str  # Stands as the actor in the journal.
    text: str = field(repr=False)
    scopes: frozenset[Scope]


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Limits and tokens.

    Without a token everything is open, and the configuration allows loopback alone.
    """

    tokens: tuple[ApiToken, ...] = ()
    body_limit: int = 4 * 1024 * 1024  # Bytes.
    events_max: int = (
        20_000  # In one request: each may become a dead letter, and all are decided at once.
    )
    retry_after_s: int = 1
    otlp_operations: frozenset[str] = COUNTED  # Those that are charged.
    otlp_body_limit: int = 4 * 1024 * 1024  # Bytes, unpacked.
