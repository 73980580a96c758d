"""What can come of a call to the escrow service, besides an answer: one type for each next step.

The rule kept here: the type alone says what to do. `NotSent`, `Limited` and `Refused` promise that
nothing was moved; `InDoubt` promises nothing, and nobody may repeat a call that raised it before
the escrow was read.

| raised        | what was moved         | what to do                                           |
|---------------|------------------------|------------------------------------------------------|
| `BadArgument` | nothing, nothing asked | correct the program                                  |
| `NotSent`     | nothing, nothing asked | ask again later, with the same key                   |
| `Limited`     | nothing                | wait `retry_after` seconds, then ask again           |
| `Refused`     | nothing                | look at `code`; the same again is refused again      |
| `NotFound`    | nothing                | look for the right id                                |
| `KeyRefused`  | nothing                | stop, and get a key that is taken                    |
| `Unavailable` | nothing: it was a read | read again later                                     |
| `InDoubt`     | **perhaps everything** | read the escrow before you do anything else          |
| `Conflict`    | **perhaps everything** | the same; `code` says what the service holds against |

No text of an error shows the API key.
"""

from __future__ import annotations

from decimal import Decimal


class EscrowError(Exception):
    """A call to the escrow service gave no answer that can be used; its subclasses say what to do.

    status  the HTTP status; None where no answer came.
    code    the service's own word for the error, such as "insufficient_remaining"; None: it gave
            none.
    """

    def __init__(
        self, message: str = "", *, status: int | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class BadArgument(EscrowError, ValueError):
    """What was handed over cannot be meant; nothing was sent. The message says what to write."""


class BadAmount(BadArgument):
    """The amount is no exact sum above 0; nothing was sent. The message says what to write."""


class NotSent(EscrowError):
    """Not a byte of the request left this machine. It may be asked again, with the same key."""


class Limited(EscrowError):
    """The service was asked too often and has not done this. It may be asked again, later.

    retry_after  seconds that the service asks to be left alone, 0 to 86400; None: it did not say.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, status=status, code=code)
        self.retry_after = retry_after


class Refused(EscrowError):
    """The service refused with a documented error (400, 402, 403, 404, 422); nothing was moved.

    403 is about this escrow alone: the key may be right for others.
    """


class NotFound(Refused):
    """The service knows no such escrow, or no such call; it has moved nothing."""


class KeyRefused(EscrowError):
    """The service does not take this API key (401), for any escrow; it has moved nothing."""


class Unavailable(EscrowError):
    """A reading gave nothing that can be relied on. Readings move nothing: read again later."""


class InDoubt(EscrowError):
    """The call may or may not have been carried out: read the escrow before you do anything else.

    call       the method that was called, such as "release_partial".
    escrow_id  the escrow; None for `lock`: look for its memo in `list`.
    amount     what was asked for, in USDC; None: everything that was left.
    key        the idempotency key that was sent; `Escrow.release_keys` may show it.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        code: str | None = None,
        call: str = "",
        escrow_id: str | None = None,
        amount: Decimal | None = None,
        key: str = "",
    ) -> None:
        super().__init__(message, status=status, code=code)
        self.call = call
        self.escrow_id = escrow_id
        self.amount = amount
        self.key = key


class Conflict(InDoubt):
    """The service answered 409: the escrow's state speaks against the call, or it is a repeat.

    Whether an earlier or a doubled call moved money, only a reading shows.
    """
