"""What every table of the configuration is made of: strict, frozen, closed to unknown keys.

The rule: nothing is ignored. An unknown key, an unknown word and a word of a later version are each
refused with a sentence that says what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meterd.config.values import refuse

# Where something stands: names of keys, and numbers in lists.
Place = tuple[str | int, ...]
Found = Iterator[tuple[Place, str]]  # Mistakes: the place, and what to write instead.

NOT_YET = "is not available in this version"

# What a key without a default may look like.
REQUIRED: Mapping[str, str] = {
    "amount": 'amount = "2.50"',
    "deposit": 'deposit = "10.00"',
    "effective_from": 'effective_from = "2026-12-01T00:00:00Z"',
    "escrows": 'escrows = { main = "esc_9a81c4" }',
    "fee": 'fee = "10.00"',
    "memo": 'memo = "inference_stream:*"',
    "meter": 'meter = "tokens"',
    "name": 'name = "svc-a"',
    "pattern": 'pattern = "streaming"',
    "percent": 'percent = "2.5"',
    "plan": 'plan = "stream"',
    "price": 'price = "0.002"',
    "price_max": 'price_max = "0.05"',
    "rates": 'rates = [{ meter = "tokens", price = "0.002" }]',
    "scopes": 'scopes = ["ingest"]',
    "score": 'score = "0.9"',
    "share": 'share = "0.70"',
    "steps": 'steps = [{ score = "0.9", share = "1" }, { score = "0.7", share = "0.70" }]',
    "tiers": 'tiers = [{ up_to = 1000, price = "0.01" }, { price = "0.005" }]',
    "tranches": 'tranches = [{ name = "draft", amount = "2.50" }]',
    "units": "units = 1000",
}

SHOWN_MAX = 24  # Names in one sentence; more help nobody.
T = TypeVar("T")
# TOML has lists, frozen settings have tuples; the items stay as strict as their own type.
Listed = Annotated[tuple[T, ...], Field(strict=False)]


def nearest(word: str, known: Collection[str]) -> str:
    """Name the known word that was probably meant, or all of them where none is near."""
    if not known:
        return "there are none"
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f'did you mean "{close[0]}"?'
    if len(known) > SHOWN_MAX:
        return "meterd config example shows all there are"
    return "known are " + ", ".join(sorted(known))


def one_of(available: tuple[str, ...], what: str, later: tuple[str, ...] = ()) -> BeforeValidator:
    """Refuse the words that a later version will take with a sentence of their own."""
    choice = " or ".join(f'"{word}"' for word in available)

    def check(value: object) -> object:
        if not isinstance(value, str):
            refuse(f"write {choice}")
        if value in later:
            refuse(f'the {what} "{value}" {NOT_YET}; write {choice}')
        if value not in available:
            refuse(f'there is no {what} "{value[:64]}"; {nearest(value, available + later)}')
        return value

    return BeforeValidator(check)


class Table(BaseModel):
    """One table of the file: strict, frozen, closed to unknown keys, silent about its input."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
    )
