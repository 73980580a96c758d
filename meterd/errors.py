"""The exceptions of meterd: few, and each stands for what its catcher must do.

Bad usage data is never an exception: it is a `core.events.Rejection`, a value that ends as a dead
letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class MeterdError(Exception):
    """Something went wrong that meterd knows how to explain."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake in the configuration: where it stands and what to write instead."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class ConfigurationError(MeterdError):
    """The configuration has mistakes; every one of them is listed."""

    exit_code = 2

    def __init__(self, mistakes: Sequence[Mistake], origin: str = "") -> None:
        self.mistakes = tuple(mistakes)
        self.origin = origin
        super().__init__("\n".join(str(mistake) for mistake in self.mistakes))


class SourceUnavailable(MeterdError):
    """The broker cannot be reached or refused us; the loop waits and connects again."""


class StoreLocked(MeterdError):
    """Another daemon owns this state; this one must not start."""

    exit_code = 2


class StoreFailed(MeterdError):
    """A commit may or may not be on the disk: the process must end and restart from the disk."""

    exit_code = 70


class StoreCorrupt(MeterdError):
    """What the store holds contradicts itself: refuse to start and call a person."""

    exit_code = 3


class InvariantBroken(MeterdError):
    """A sum of money does not add up: the process must end before it acts on it."""

    exit_code = 70


class Unavailable(MeterdError):
    """meterd cannot take this now (store full, draining, too many waiting); try again later."""


class NotFound(MeterdError):
    """What was named does not exist."""


class Refused(MeterdError):
    """The request contradicts what meterd knows; it names what to do instead."""
