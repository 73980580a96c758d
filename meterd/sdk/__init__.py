"""What other people's programs import: tell usage, ask the gate, and move exact money.

The rule kept here: a program that uses this cannot pay or charge by mistake. Usage gets its id when
it is told, so that what is sent again is never charged again. Amounts are exact texts or decimals
above 0; a part and the whole are two methods; a call that moves money leaves at most once; and what
may or may not have been done is an error of its own.

To tell usage: `Meter` and `AsyncMeter`, and `metered` for functions and streams. To ask before a
call is served: `Gate` and `AsyncGate`, and the middlewares in `meterd.sdk.aiohttp` and
`meterd.sdk.asgi`. To move money: `EscrowClient` waits, `AsyncEscrowClient` is awaited. docs/sdk.md
shows all of them at work. None of it imports the daemon.
"""

from meterd.sdk.asynchronous import AsyncEscrowClient
from meterd.sdk.blocking import EscrowClient
from meterd.sdk.contract import Amount, Done, Escrow, new_key
from meterd.sdk.counting import metered
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
from meterd.sdk.failures import (
    BadUsage,
    Denied,
    NotAnswered,
    NotKept,
    Unreachable,
    Unsent,
    UsageError,
)
from meterd.sdk.gate import AsyncGate, AsyncHold, Gate, Hold
from meterd.sdk.meter import AsyncMeter, Meter
from meterd.sdk.usage import Quantity, Rejected, new_id
from meterd.sdk.verdicts import Verdict

__all__ = [
    "Amount",
    "AsyncEscrowClient",
    "AsyncGate",
    "AsyncHold",
    "AsyncMeter",
    "BadAmount",
    "BadArgument",
    "BadUsage",
    "Conflict",
    "Denied",
    "Done",
    "Escrow",
    "EscrowClient",
    "EscrowError",
    "Gate",
    "Hold",
    "InDoubt",
    "KeyRefused",
    "Limited",
    "Meter",
    "NotAnswered",
    "NotFound",
    "NotKept",
    "NotSent",
    "Quantity",
    "Refused",
    "Rejected",
    "Unavailable",
    "Unreachable",
    "Unsent",
    "UsageError",
    "Verdict",
    "metered",
    "new_id",
    "new_key",
]
