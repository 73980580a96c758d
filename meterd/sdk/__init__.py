"""What other people's programs import: clients of the escrow service that move exact money.

The rule kept here: a program that uses this cannot pay by mistake. Amounts are exact texts or
decimals above 0; a part and the whole are two methods; a call that moves money leaves at most once;
and what may or may not have been done is an error of its own.

`EscrowClient` waits, `AsyncEscrowClient` is awaited; their methods have the same names and the same
parameters. docs/sdk.md shows them at work.
"""

from meterd.sdk.asynchronous import AsyncEscrowClient
from meterd.sdk.blocking import EscrowClient
from meterd.sdk.contract import Amount, Done, Escrow, new_key
from meterd.sdk.errors import (
    BadAmount,
    BadArgument,
    Conflict,
    EscrowError,
    InDoubt,
    KeyRefused,
    Limited,
    NotFound,
    NotSent,
    Refused,
    Unavailable,
)

__all__ = [
    "Amount",
    "AsyncEscrowClient",
    "BadAmount",
    "BadArgument",
    "Conflict",
    "Done",
    "Escrow",
    "EscrowClient",
    "EscrowError",
    "InDoubt",
    "KeyRefused",
    "Limited",
    "NotFound",
    "NotSent",
    "Refused",
    "Unavailable",
    "new_key",
]
