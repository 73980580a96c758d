"""Agreements, releases, usage, plans and dead letters as JSON documents.

Looking changes nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from meterd.api.overview import balance, spokesman, state_word
from meterd.api.parts import Parts, SourceView
from meterd.api.wire import iso_time
from meterd.bookkeeper import Journalled
from meterd.core.accounts import Account, Counter
from meterd.core.advice import next_command
from meterd.core.changes import DeadLetter, ReceiptRow
from meterd.core.money import format_amount, format_exact, format_price, format_quantity
from meterd.core.plans import Plan
from meterd.core.quotes import Quote
from meterd.core.settlement import Escrow, Release

Document = dict[str, Any]
EXCERPT_BYTES_MAX = 2048


def agreement_view(parts: Parts, account: Account) -> Document:
    """Show an agreement: its money is of one instant."""
    books, ledger = parts.bookkeeper, parts.bookkeeper.ledger
    agreement, money = account.agreement, balance(ledger, account)
    holds = books.holds.amount(agreement.id)  # Set aside for work under way.
    headroom = None if money.headroom is None else money.headroom - holds
    escrow = spokesman(ledger, account)
    word = state_word(escrow, money)
    return {
        "id": agreement.id,
        "plan": account.plan.name,
        "payer": agreement.payer,
        "origin": agreement.origin,
        "state": word,
        "reason": escrow.reason,
        "next": next_command(agreement.id, escrow, word, account.plan.name) or None,
        "closing": account.closing or escrow.closing,
        "opened_at": iso_time(account.opened_at),
        "events": account.events,
        "accrued": format_exact(account.accrued),
        "released": format_amount(money.released),
        "unsettled": format_amount(money.unsettled),
        "in_doubt": format_amount(money.in_doubt),
        "headroom": None if headroom is None else format_amount(headroom),
        "holds": format_amount(holds),
        "uncollectible": format_amount(money.uncollectible),
        "runway": parts.runways.seconds(account, headroom, books.clock.wall()),
        "unsettled_since": iso_time(account.unsettled_since),
        "period": account.period,
        "period_ends": iso_time(account.plan.period_ends(account.opened_at, account.period)),
        "escrows": [escrow_view(one) for one in ledger.escrows_of(account)],
        "release": None if escrow.release is None else release_view(escrow.release, agreement.id),
    }


def escrow_view(escrow: Escrow) -> Document:
    """Show an escrow as meterd last read it. `total` 0: not adopted yet."""
    return {
        "id": escrow.id,
        "role": escrow.role,
        "status": escrow.status.value,
        "service_status": escrow.service_status,
        "total": format_amount(escrow.total),
        "released": format_amount(escrow.observed),
        "released_before": format_amount(escrow.baseline),
        "expected": format_amount(escrow.expected),
        "remaining": format_amount(escrow.remaining),
        "deadline": iso_time(escrow.deadline),
        "settled_at": iso_time(escrow.settled_at),
    }


def release_view(release: Release, agreement: str | None) -> Document:
    """Show a release with all of its history."""
    return {
        "id": release.id,
        "agreement": agreement,
        "escrow": release.escrow,
        "amount": format_amount(release.amount),
        "status": release.status.value,
        "why": release.why,
        "units": format_quantity(release.units),
        "created_at": iso_time(release.created_at),
        "history": [
            {"at": iso_time(at), "status": status, "detail": detail}
            for at, status, detail in release.history
        ],
    }


def receipt_view(row: ReceiptRow) -> Document:
    """Show a receipt. What is signed is the statement in its canonical form."""
    return {
        "number": row.number,
        "at": iso_time(row.at),
        "statement": json.loads(row.statement),
        "hash": row.hash.hex(),
        "signature": base64.b64encode(row.signature).decode("ascii"),
    }


def counter_view(counter: Counter) -> Document:
    """Show usage of one meter in one period.

    `accrued` is None where the price is that of a whole line, tiers for instance: the bill has it.
    """
    accrued = None
    if counter.line is None:
        said = counter.amount if counter.dynamic else counter.quantity
        accrued = format_exact(Fraction(said * counter.weight, counter.account.denominator))
    return {
        "meter": counter.meter.name,
        "unit": counter.meter.unit,
        "dimensions": dict(counter.dimensions),
        "quantity": format_quantity(counter.quantity),
        "events": counter.events,
        "period": counter.period,
        "card": counter.card,
        "accrued": accrued,
    }


def plan_view(plan: Plan) -> Document:
    """Show a plan: its rates and its thresholds. A threshold of None is not used."""
    settle = plan.settle
    return {
        "name": plan.name,
        "pattern": plan.pattern.value,
        "card": plan.card.id,
        "rates": [
            {
                "meter": rate.meter,
                "price": format_price(rate.price),
                "per": rate.per,
                "where": dict(rate.where),
                "words": rate.words,
            }
            for rate in plan.card.rates
        ],
        "settle": {
            "amount": None if settle.amount is None else format_amount(settle.amount),
            "units": None if settle.units is None else format_quantity(settle.units),
            "interval_ms": settle.interval,
            "escrow_percent": settle.escrow_percent,
            "before_deadline_ms": settle.before_deadline,
            "min_release": format_amount(settle.min_release),
        },
    }


def quote_view(quoted: Quote) -> Document:
    """Show a price with its working."""
    return {
        "plan": quoted.plan,
        "card": quoted.card,
        "lines": [
            {
                "meter": line.meter,
                "rate": line.rate,
                "quantity": format_quantity(line.quantity),
                "working": list(line.working),
                "charge": format_exact(line.charge),
                "role": line.role,
            }
            for line in quoted.lines
        ],
        "total": format_exact(quoted.total),
        "payable": format_amount(quoted.payable),
    }


def dead_letter_view(letter: DeadLetter, *, whole: bool) -> Document:
    """Show a dead letter: in a list an excerpt of its payload.

    A payload that is no UTF-8 is given as base64 too.
    """
    payload = letter.payload if whole else letter.payload[:EXCERPT_BYTES_MAX]
    document: Document = {
        "id": letter.number,
        "source": letter.source,
        "event_id": letter.event_id,
        "reason": letter.reason,
        "detail": letter.detail,
        "received_at": iso_time(letter.received_at),
        "transport_id": letter.transport_id,
        "fields": dict(letter.fields),
        "payload": payload.decode("utf-8", "replace"),
        "payload_bytes": len(letter.payload),
    }
    if whole:
        document["payload_base64"] = base64.b64encode(payload).decode("ascii")
    return document


def journal_view(journalled: Journalled) -> Document:
    """Show an entry of the journal."""
    entry = journalled.entry
    return {
        "number": journalled.number,
        "at": iso_time(entry.at),
        "actor": entry.actor,
        "action": entry.action,
        "subject": entry.subject,
        "detail": entry.detail,
        "hash": journalled.hash.hex(),
    }


def source_view(state: SourceView) -> Document:
    """Show a source."""
    return {
        "name": state.name,
        "kind": state.kind,
        "address": state.address,
        "connected": state.connected,
        "since": iso_time(state.since),
        "error": state.error,
        "warning": state.warning,
        "lag": state.lag,
        "unacked": state.unacked,
    }


def agreement_of(escrows: Mapping[str, Escrow], release: Release) -> str | None:
    """Name the agreement of a release; None when its escrow is no more known."""
    escrow = escrows.get(release.escrow)
    return None if escrow is None else escrow.agreement
