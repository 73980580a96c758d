"""How the escrow service reads requests and writes answers: strict, with money as strings.

The rule kept here: an amount is a JSON string in plain notation with at most six decimals, or the
request is refused with 400. A number is refused even where it is whole: who sends numbers sends
floats sooner or later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import msgspec

from meterd.core.money import AMOUNT_DECIMALS, BadNumber, format_amount, parse_amount
from meterd.sandbox.ledger import AMOUNT_MAX, Deadline, Escrow, Operation, Wallet

BODY_BYTES_MAX = 64 * 1024
MEMO_CHARS_MAX = 280
KEY_CHARS_MAX = 255
AUTO_RELEASE_HOURS_MAX = 366 * 24
HOUR_MS = 3_600_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AGENT_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z", re.ASCII)
_KEY = re.compile(rf"[!-~]{{1,{KEY_CHARS_MAX}}}\Z", re.ASCII)
_WHOLE = re.compile(r"[0-9]{1,18}\Z", re.ASCII)


@dataclass(frozen=True)
class BadRequest(Exception):
    """What was sent cannot be read.

    `text` says why and never repeats it. `code` is the wire's `error` field.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


def read_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object; an empty body is an empty object. Raises `BadRequest`."""
    if not body:
        return {}
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise BadRequest("invalid_json", "the body is no JSON document") from error
    if not isinstance(value, dict):
        raise BadRequest("invalid_json", "the body is no JSON object")
    return value


def read_amount(fields: Mapping[str, Any], name: str = "amount") -> int:
    """Read an amount of USDC greater than 0, as micros. Raises `BadRequest`."""
    if name not in fields:
        raise BadRequest("amount_required", f"{name} is missing")
    value = fields[name]
    if not isinstance(value, str):
        raise BadRequest("invalid_amount", f'{name} must be a decimal string such as "0.01"')
    if len(value.partition(".")[2]) > AMOUNT_DECIMALS:
        raise BadRequest("invalid_amount", f"{name} has more than {AMOUNT_DECIMALS} decimals")
    try:
        micros = parse_amount(value)
    except BadNumber as error:
        raise BadRequest("invalid_amount", f"{name}: {error}") from error
    if micros == 0:
        raise BadRequest("invalid_amount", f"{name} must be greater than 0")
    if micros > AMOUNT_MAX:
        raise BadRequest("invalid_amount", f"{name} is too large")
    return micros


def read_memo(fields: Mapping[str, Any]) -> str | None:
    """Read the memo, a text of at most 280 printable characters.

    None where there is none. Raises `BadRequest`.
    """
    memo = fields.get("memo")
    if memo is None:
        return None
    if not isinstance(memo, str) or len(memo) > MEMO_CHARS_MAX or not memo.isprintable():
        raise BadRequest("invalid_memo", f"memo: at most {MEMO_CHARS_MAX} printable characters")
    return memo


def read_key(header: str | None) -> str | None:
    """Read the Idempotency-Key, at most 255 visible ASCII characters. Raises `BadRequest`."""
    if header is not None and _KEY.match(header) is None:
        raise BadRequest("invalid_idempotency_key", "Idempotency-Key: 1 to 255 visible characters")
    return header


def read_agent(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """Read an agent's id: 1 to 64 of letters, digits and `_.:-`. Raises `BadRequest`."""
    value = fields.get(name, default)
    if not isinstance(value, str) or _AGENT_ID.match(value) is None:
        raise BadRequest("invalid_agent", f"{name}: 1 to 64 letters, digits and _ . : -")
    return value


def read_deadline(fields: Mapping[str, Any], now_ms: int) -> int | None:
    """Read `auto_release_hours`, whole hours from now.

    None: no deadline. Milliseconds. Raises `BadRequest`.
    """
    hours = fields.get("auto_release_hours")
    if hours is None:
        return None
    if type(hours) is not int or not 0 < hours <= AUTO_RELEASE_HOURS_MAX:
        raise BadRequest(
            "invalid_deadline", f"auto_release_hours: 1 to {AUTO_RELEASE_HOURS_MAX}, a whole number"
        )
    return now_ms + hours * HOUR_MS


def read_direction(fields: Mapping[str, Any], default: Deadline) -> Deadline:
    """Read `on_deadline`: "release" or "refund". Raises `BadRequest`."""
    value = fields.get("on_deadline", default)
    if value not in tuple(Deadline):
        raise BadRequest("invalid_deadline", 'on_deadline is "release" or "refund"')
    return Deadline(value)


def read_whole(text: str | None, name: str, default: int, most: int) -> int:
    """Read a whole number of a query, at most `most` (more is cut down to it).

    Raises `BadRequest`.
    """
    if text is None:
        return default
    if _WHOLE.match(text) is None:
        raise BadRequest("invalid_query", f"{name} must be a whole number")
    return min(int(text), most)


@lru_cache(maxsize=1 << 16)  # The same few times are shown again and again.
def iso_time(ms: int) -> str:
    """Milliseconds since 1970 as "2026-11-23T12:00:00.000Z"."""
    moment = _EPOCH + timedelta(milliseconds=ms)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def escrow_answer(escrow: Escrow) -> dict[str, Any]:
    """An escrow as the wire shows it, without its history."""
    return {
        "escrow_id": escrow.escrow_id,
        "status": escrow.status,
        "currency": "USDC",
        "amount": format_amount(escrow.amount),
        "released_amount": format_amount(escrow.released),
        "remaining": format_amount(escrow.remaining),
        "refunded_amount": format_amount(escrow.refunded),
        "fee": format_amount(escrow.fee),
        "net_released_amount": format_amount(escrow.released - escrow.fee),
        "from_agent_id": escrow.creator,
        "to_agent_id": escrow.provider,
        "memo": escrow.memo,
        "created_at": iso_time(escrow.created_ms),
        "auto_release_at": None if escrow.deadline_ms is None else iso_time(escrow.deadline_ms),
        "on_deadline": escrow.on_deadline,
        "releases_count": escrow.releases,
    }


def release_answer(operation: Operation) -> dict[str, Any]:
    """One release as the wire shows it: gross, the fee, and what the provider got of it."""
    return {
        "release_id": f"rel_{operation.seq}",
        "kind": operation.kind,
        "gross_amount": format_amount(operation.gross),
        "fee": format_amount(operation.fee),
        "net_amount": format_amount(operation.gross - operation.fee),
        "memo": operation.memo,
        "idempotency_key": operation.key,
        "created_at": iso_time(operation.time_ms),
    }


def wallet_answer(wallet: Wallet, payee: str) -> dict[str, Any]:
    """A wallet as one payee sees it, without the history of its debits."""
    return {
        "agent_id": wallet.agent,
        "to_agent_id": payee,
        "balance": format_amount(wallet.balance),
        "debited": format_amount(wallet.debited.get(payee, 0)),
        "currency": "USDC",
    }


def debit_answer(operation: Operation) -> dict[str, Any]:
    """One debit as the wire shows it."""
    return {
        "debit_id": f"deb_{operation.seq}",
        "gross_amount": format_amount(operation.gross),
        "memo": operation.memo,
        "idempotency_key": operation.key,
        "created_at": iso_time(operation.time_ms),
    }


def operation_answer(operation: Operation) -> dict[str, Any]:
    """One line of the operations log."""
    return {
        "seq": operation.seq,
        "time": iso_time(operation.time_ms),
        "kind": operation.kind,
        "escrow_id": operation.escrow_id,
        "agent_id": operation.agent,
        "to_agent_id": operation.payee,
        "amount": format_amount(operation.gross),
        "fee": format_amount(operation.fee),
        "memo": operation.memo,
        "idempotency_key": operation.key,
        "outcome": operation.outcome,
    }
