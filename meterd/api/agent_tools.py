"""What an agent reads of the daemon's tools: their arguments and their texts.

The rule kept here: money and quantities are decimal texts, an amount and everything are two
different arguments, and every text of a tool that changes something says what a retry does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from meterd.api.plans import LINES_MAX, Used
from meterd.api.wire import REASON_CHARS_MAX
from meterd.mcp.tools import one_line

LISTED_DEFAULT, LISTED_MAX = 20, 100  # An agent reads all that it is given: small pages.

INSTRUCTIONS = """\
meterd meters what a service's customers use and settles it, exactly, out of their escrows. An
agreement is a payer under a plan, with an escrow. All money is USDC as decimal texts such as
"0.007808", never numbers. Ids are chosen by you: when a call was cut off or you do not know what
came of it, call the same tool again with the same id and the same arguments; nothing is locked or
paid twice."""

_Name = Annotated[str, msgspec.Meta(description="The agreement's id, or its escrow's.")]
_Limit = Annotated[int, msgspec.Meta(ge=1, le=LISTED_MAX, description="How many to show at most.")]
_Cursor = Annotated[
    str, msgspec.Meta(description='The "next" of the page before; leave it out at the beginning.')
]


class Create(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `escrow_create`."""

    id: Annotated[
        str,
        msgspec.Meta(
            pattern=r"^[A-Za-z0-9_.:-]{1,128}$",
            description="The new agreement's id, chosen by you. Use the same one when you retry.",
        ),
    ]
    plan: Annotated[str, msgspec.Meta(description="The plan's name in meterd's configuration.")]
    payer: Annotated[str, msgspec.Meta(description="The payer's agent id.")] = ""
    provider: Annotated[
        str, msgspec.Meta(description="Who is paid; usually meterd's configuration says it.")
    ] = ""
    deposit: Annotated[
        str | None,
        msgspec.Meta(
            description='What usage draws on, USDC as a text: "10.00". Left out: the plan says it.'
        ),
    ] = None


class Release(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `escrow_release`: exactly one of `amount` and `everything_accrued`."""

    id: _Name
    amount: Annotated[
        str | None,
        msgspec.Meta(
            description='Exactly what escrow_status shows as "unsettled", as a text: "0.007808".'
        ),
    ] = None
    everything_accrued: Annotated[
        bool, msgspec.Meta(description="true: all that is unsettled now, whatever it is.")
    ] = False
    reason: Annotated[
        str,
        msgspec.Meta(max_length=REASON_CHARS_MAX, description="One line for the journal."),
    ] = ""


class One(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `escrow_status`."""

    id: _Name


class Listed(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `escrow_list`."""

    limit: _Limit = LISTED_DEFAULT
    cursor: _Cursor = ""
    state: Annotated[
        str | None, msgspec.Meta(description='Only those in this state, such as "active".')
    ] = None
    plan: Annotated[str | None, msgspec.Meta(description="Only those under this plan.")] = None


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """No arguments."""


class UsageOf(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `meter_usage`."""

    id: _Name
    limit: _Limit = LISTED_DEFAULT
    cursor: _Cursor = ""


class QuoteOf(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `meter_quote`: those of `POST /v1/quote`."""

    plan: Annotated[str, msgspec.Meta(description="The plan's name in meterd's configuration.")]
    usage: Annotated[
        list[Used],
        msgspec.Meta(
            max_length=LINES_MAX,
            description="Quantities are whole numbers or decimal texts. Prices are texts.",
        ),
    ] = []
    at: Annotated[
        str | None, msgspec.Meta(description="At which time, with its zone; left out: now.")
    ] = None
    ended: Annotated[
        bool,
        msgspec.Meta(description="The period is over, so that its fee and minimums are due."),
    ] = True


CHANGING = frozenset({"escrow_create", "escrow_release"})
# By tool: its title and its text, which an agent reads before it decides.
TEXTS: Mapping[str, tuple[str, str]] = {
    "escrow_create": (
        "Open an agreement: lock its escrow",
        one_line("""
            Lock the escrow that a plan needs and meter usage against it from then on. This locks
            the payer's money. Choose an id for the new agreement. When you retry, after an error,
            a time-out or a lost answer, reuse the same id: what is locked or being locked under an
            id is never locked twice, and the arguments of the first call count. "repeated": true
            says that the id was known before. With the state "opening" nobody knows yet whether it
            is locked; meterd looks for it by itself. Needs the scope admin.
        """),
    ),
    "escrow_release": (
        "Release what usage has earned",
        one_line("""
            Have meterd settle an agreement now instead of at its plan's next threshold. Give
            exactly one of amount and everything_accrued: true; an amount left out never means
            everything. meterd releases what usage has earned and never more: amount must be exactly
            what escrow_status shows as "unsettled", or nothing is done and the answer says what it
            is. What is earned between your call and the release may be paid with it. When you
            retry, reuse the same id and arguments: what was paid is not paid again. The release
            itself takes seconds or more: look with escrow_status. Needs the scope admin.
        """),
    ),
    "escrow_status": (
        "One agreement and its escrows",
        one_line("""
            Show an agreement: its state, its money (accrued, released, unsettled, in_doubt,
            headroom), its escrows as meterd last read them, its newest releases, and in "next" what
            a person should do, if anything. Changes nothing.
        """),
    ),
    "escrow_list": (
        "All agreements, page by page",
        one_line("""
            List the agreements with their money and escrows. "next" is the cursor of the next page,
            null at the end; "opening" names agreements whose escrow is still being locked. Changes
            nothing.
        """),
    ),
    "meter_status": (
        "The whole service",
        one_line("""
            Say whether money is flowing, how much is accrued, released and unsettled in all, which
            sources of usage are connected, and what needs a person. Changes nothing.
        """),
    ),
    "meter_usage": (
        "What one agreement has used",
        one_line("""
            Show an agreement's usage by meter and dimensions, newest period first, with what each
            adds to the bill (null where only the whole line has a price). Changes nothing.
        """),
    ),
    "meter_quote": (
        "The price of a usage",
        one_line("""
            Say what a given usage costs under a plan, with its working, line by line. Nothing is
            counted or charged. Changes nothing.
        """),
    ),
}
