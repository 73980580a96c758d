"""What can go wrong between a program and meterd: one type for each thing to do about it.

The rule kept here: nothing is lost without a word. Usage that was not kept raises at the call that
told of it, unless the program chose to be told otherwise. (What the *escrow service* can do to a
call stands in `meterd.sdk.errors`.)

| raised        | what became of the usage        | what to do                                  |
|---------------|---------------------------------|---------------------------------------------|
| `BadUsage`    | nothing was kept or sent        | correct the program                         |
| `NotKept`     | nothing was kept or sent        | make room: the text says where              |
| `Unsent`      | it is in `events` alone         | keep them, send them later, ids and all     |
| `Unreachable` | nothing is known                | ask again, with the same key                |
| `NotAnswered` | the question itself was refused | correct the address, token or program       |
| `Denied`      | nothing was used                | do not serve                                |

No text of an error shows a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meterd.sdk.verdicts import Verdict


class UsageError(Exception):
    """Usage could not be told, or the gate not asked; the subclasses say what to do."""


class BadUsage(UsageError, ValueError):
    """What was handed over cannot be meant; nothing was kept. The message says what to write."""


class NotKept(UsageError):
    """There is no room for the event, in memory or in the spool, or the disk refused it."""


class Unsent(UsageError):
    """The meter was closed with events that meterd has not taken, and it has no spool for them.

    events  all of them, in order, as they would have been sent.
    """

    def __init__(self, message: str, events: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.events = events


class Unreachable(UsageError):
    """Meterd gave no answer that can be used, within the time that it was given."""


class NotAnswered(UsageError):
    """Meterd refused the question itself: its form, or the token.

    status  the HTTP status of the refusal.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Denied(UsageError):
    """The gate said no.

    verdict  what it said.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason or "the gate said no")
        self.verdict = verdict
