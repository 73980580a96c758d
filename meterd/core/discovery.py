"""Which agreement an escrow belongs to that the service lists and nobody has bound.

The rule, in the order in which it is applied to each escrow of the list, the oldest first:

1. it is looked at only if it is live, is bound to nothing, and its provider is ours;
2. its plan is that of the first `[[discover]]` entry whose pattern fits the whole memo (`*` is any
   text, `?` one character). An escrow that fits none is nobody's;
3. a memo with the word `agreement=ID` names its agreement. If there is one of that id the escrow
   *continues* it, provided that plan and payer are the same and that it is not closing; if there is
   none a new agreement of that id begins;
4. without that word it continues the running agreement of the same payer under the same plan. Where
   there is none a new agreement begins, with the escrow's id. Where there are two nothing is
   guessed: it is left alone and a person is told.

The payer of an escrow is who created it. The payer of an agreement is whoever created its escrows,
by the same list, or the `payer` that it was bound with. An unknown payer is nobody's: it continues
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from meterd.core.accounts import Agreement
from meterd.core.ledger import Ledger
from meterd.core.openings import Found, named_in

MAIN = "main"  # A found escrow has this role: plans of several roles are not discovered.


@dataclass(frozen=True, slots=True)
class Doubtful:
    """A found escrow that is not bound, and why, for a person."""

    escrow: str
    why: str


class Discovery:
    """Sorts out one list. Its owner binds what it hands out before it asks for the next one."""

    def __init__(self, ledger: Ledger, patterns: Sequence[tuple[str, str]], provider: str) -> None:
        self._ledger = ledger
        self._patterns = [(_pattern(memo), plan) for memo, plan in patterns]
        self._provider = provider
        self._payers: dict[str, set[str]] = {}

    def candidates(self, listed: Iterable[Found]) -> list[tuple[Found, str]]:
        """Pick the escrows that may be bound, the oldest first, each with its plan."""
        listed = list(listed)
        for found in listed:
            bound = self._ledger.escrows.get(found.escrow)
            if bound is not None and found.creator:
                self._payers.setdefault(bound.agreement, set()).add(found.creator)
        fitting = [(found, self._plan(found)) for found in listed if self._is_ours(found)]
        ours = [(found, plan) for found, plan in fitting if plan]
        return sorted(ours, key=lambda pair: (pair[0].created_at, pair[0].escrow))

    def place(self, found: Found, plan: str) -> Agreement | Doubtful:
        """Say what a candidate is to be bound as."""
        named = named_in(found.memo)
        return self._named(found, plan, named) if named else self._by_payer(found, plan)

    def _is_ours(self, found: Found) -> bool:
        unbound = self._ledger.account(found.escrow) is None
        return found.live and unbound and found.provider == self._provider

    def _plan(self, found: Found) -> str:
        fitting = (plan for pattern, plan in self._patterns if pattern.fullmatch(found.memo))
        return next(fitting, "")

    def _named(self, found: Found, plan: str, named: str) -> Agreement | Doubtful:
        account = self._ledger.account(named)
        if account is None:
            return _begun(named, found, plan)
        agreement = account.agreement
        if account.plan.name != plan:
            return Doubtful(found.escrow, f"agreement {named} is under plan {account.plan.name}")
        if account.closing or self._ledger.is_closed(account):
            return Doubtful(found.escrow, f"agreement {named} is closed")
        if not self._pays(found.creator, agreement):
            return Doubtful(found.escrow, f"agreement {named} is not known to be of its payer")
        return _continued(agreement, found)

    def _by_payer(self, found: Found, plan: str) -> Agreement | Doubtful:
        running = [
            account.agreement
            for account in self._ledger.accounts.values()
            if account.plan.name == plan
            and self._pays(found.creator, account.agreement)
            and not account.closing
            and not self._ledger.is_closed(account)
        ]
        if not running:
            return _begun(found.escrow, found, plan)
        if len(running) > 1:
            names = ", ".join(sorted(agreement.id for agreement in running)[:5])
            return Doubtful(found.escrow, f"its payer has more than one under {plan}: {names}")
        return _continued(running[0], found)

    def _pays(self, creator: str, agreement: Agreement) -> bool:
        """Whether a creator is known to be an agreement's payer; one without a name is nobody."""
        known = self._payers.get(agreement.id, ())
        return bool(creator) and (creator == agreement.payer or creator in known)


def _begun(name: str, found: Found, plan: str) -> Agreement:
    return Agreement(name, plan, found.creator, ((MAIN, found.escrow),))


def _continued(agreement: Agreement, found: Found) -> Agreement:
    return replace(agreement, escrows=(*agreement.escrows, (MAIN, found.escrow)))


def _pattern(memo: str) -> re.Pattern[str]:
    """Read a shell-style pattern; what is no star and no question mark is itself."""
    parts = re.escape(memo).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(parts, re.DOTALL)
