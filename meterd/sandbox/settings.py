"""How one escrow service is set up, and what is wrong with a set-up: every mistake at once."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meterd.core.money import MICROS
from meterd.errors import ConfigurationError, Mistake
from meterd.sandbox.ledger import AMOUNT_MAX, BPS, Deadline

DEVELOPMENT_KEYS: Mapping[str, str] = {
    "pf_live_sandbox_provider": "agent_provider",
    "pf_live_sandbox_payer": "agent_payer",
}
OPENING_BALANCE = 10_000 * MICROS
WALLET_MINIMUM = MICROS // 100


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """How one escrow service is set up.

    listen                 "host:port", loopback only; port 0 takes a free one.
    data_file              its SQLite file; made if it is not there.
    keys                   API key -> the agent whom it belongs to.
    deadline               who gets the remainder at a deadline, unless the escrow says otherwise.
    fee_bps                the payee's fee in hundredths of a percent.
    rate_limit_per_minute  releases for each escrow, debits for each payer, creations for each
                           agent; None: no limit.
    honour_idempotency     a POST that repeats an Idempotency-Key moves nothing, and is answered.
    wallet_minimum         micros; a debit of less is refused.
    opening_balance        micros that each agent of `keys` gets when the file does not know it.
    """

    data_file: Path
    listen: str = "127.0.0.1:8788"
    keys: Mapping[str, str] = field(default_factory=lambda: dict(DEVELOPMENT_KEYS))
    deadline: Literal["release", "refund"] = "release"
    fee_bps: int = 100
    rate_limit_per_minute: int | None = None
    honour_idempotency: bool = False
    opening_balance: int = OPENING_BALANCE
    wallet_minimum: int = WALLET_MINIMUM


def check(settings: SandboxSettings) -> tuple[str, int]:
    """The address to listen on. Raises `ConfigurationError` with every mistake of the settings."""
    mistakes = []
    host, _, port = settings.listen.rpartition(":")
    host = host.strip("[]")
    if not port.isascii() or not port.isdigit() or int(port) > 65_535:
        mistakes.append(Mistake("sandbox.listen", "must be host:port, such as 127.0.0.1:8788"))
    elif not _is_loopback(host):
        mistakes.append(
            Mistake(
                "sandbox.listen", "only loopback, such as 127.0.0.1: its controls ask for no key"
            )
        )
    if not settings.keys:
        mistakes.append(Mistake("sandbox.keys", "needs at least one API key"))
    if settings.deadline not in tuple(Deadline):
        mistakes.append(Mistake("sandbox.deadline", 'is "release" or "refund"'))
    if not 0 <= settings.fee_bps <= BPS:
        mistakes.append(Mistake("sandbox.fee_bps", f"is a whole number from 0 to {BPS}"))
    if settings.rate_limit_per_minute is not None and settings.rate_limit_per_minute < 1:
        mistakes.append(Mistake("sandbox.rate_limit_per_minute", "is at least 1, or left out"))
    if not 0 <= settings.wallet_minimum <= AMOUNT_MAX:
        mistakes.append(Mistake("sandbox.wallet_minimum", 'is an amount, such as "0.01"'))
    if mistakes:
        raise ConfigurationError(mistakes)
    return host, int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
