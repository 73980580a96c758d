"""The loop that locks and finds escrows: openings, renewals, and what the service's list shows.

It keeps three rules. An escrow is locked by one call that leaves at most once, behind a durable
intention (`core.openings` says what an outcome means). Whatever is not certain is looked up in the
service's list, never sent again. And what the list shows is bound by the rule of `core.discovery`;
a list that failed changes nothing.

Openings are made one after the other: there are few of them, and services limit them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from meterd.bookkeeper import Bookkeeper
from meterd.core import openings
from meterd.core.accounts import Account, Agreement
from meterd.core.discovery import Discovery, Doubtful
from meterd.core.money import format_amount
from meterd.core.openings import Census, Found, Locked, Opening, OpeningStatus, Wish
from meterd.core.plans import Plan
from meterd.core.renewals import amount_for, hours_for, lacking
from meterd.core.settlement import Answer
from meterd.errors import NotFound, Refused, Unavailable
from meterd.logs import get_logger

log = get_logger(__name__)

RENEW_LOOK_S = 1.0  # How often agreements that meterd renews are looked at.
FAILURES_MAX = 3  # Refusals in a row after which a period that nobody can pay for lapses.
FAILED_WAIT_S, FAILED_WAIT_MAX_S = 30.0, 3600.0  # Before a refused renewal is tried again.
BOUND_MAX = 100  # Found escrows that one list may bind; the next list goes on.
WARNED_MAX = 10_000  # Found escrows that a person has been told of; then begun anew.
ASKED, AGAIN = "asked", "again"  # Why an opening is made; given up, that another one took over.
BY_METERD, BY_DISCOVERY = "meterd", "discovery"
NO_PAYER = (
    "escrow.payer_api_key is not set, so escrow.api_key would lock: write escrow.payer_api_key_file"
    " with the payer's key; or, where escrow.api_key is the payer's own, name his agent: payer"
    " (meterd open --payer AGENT)"
)


class Unlisted(Protocol):
    """A list that gave nothing, and why."""

    @property
    def kind(self) -> str:
        """One of key_refused, forbidden, missing, limited, unavailable, nonsense."""

    @property
    def detail(self) -> str:
        """What happened, for a person."""


class LockService(Protocol):
    """The escrow service as the opener needs it. No call raises but when it is cancelled.

    But `ValueError`, before anything is sent, for what no service could take.
    """

    async def lock(self, opening: Opening) -> Locked | Answer:
        """Make the call: at most one request leaves, in all of this opening's life."""

    async def list_escrows(self, agent_id: str) -> Census | Unlisted:
        """Read an agent's escrows."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the configuration says about opening and finding.

    agent_id   the provider's agent, or "".
    payer_key  escrows are locked with the payer's own key; what is locked is found again in the
               provider's list. Without it the daemon's key is the payer's, and so is the list.
    patterns   (memo, plan) of `[[discover]]`.
    """

    agent_id: str = ""
    payer_key: bool = False
    patterns: tuple[tuple[str, str], ...] = ()
    discover_interval: float = 60.0


class Opener:
    """Locks escrows on request and ahead of time, and binds those that the service lists."""

    def __init__(
        self,
        bookkeeper: Bookkeeper,
        service: LockService,
        terms: Terms,
        *,
        unbound: Iterable[Opening] = (),
        opened: Iterable[str] = (),
    ) -> None:
        self.terms = terms
        self._bookkeeper = bookkeeper
        self._ledger = bookkeeper.ledger
        self._service = service
        self._clock = bookkeeper.clock
        # Those whose escrow is not bound: unfinished, absent, or locked and waiting for others.
        self._openings = {opening.id: opening for opening in unbound}
        self._opened = set(opened)  # Agreements that meterd has locked an escrow for.
        self._one_at_a_time = asyncio.Lock()
        self._changed = asyncio.Event()
        self._doubts_at = 0.0  # When the list is to be read next, mono: for what is in doubt,
        self._discover_at = 0.0  # and for what is to be found.
        self._renew_at = 0.0
        self._failures: dict[str, int] = {}
        self._retry_at: dict[str, float] = {}
        self._warned: set[str] = set()
        self._list_fails = False
        self._await()

    @property
    def unfinished(self) -> list[Opening]:
        """The openings whose escrow nothing draws on, oldest first."""
        return list(self._openings.values())

    # -- On request ----------------------------------------------------------------------------

    async def open(self, wish: Wish, actor: str) -> str:
        """Lock the escrows that an agreement needs and bind them; the agreement's id.

        Asked for again under the same id nothing more is locked. What is in doubt when this returns
        is in `unfinished`, and is bound when it is found. Raises `Refused` and `Unavailable`.
        """
        agreement, rows = self._rows(wish)
        failed = await self._make(rows, actor) if rows else []
        if failed:
            raise Refused(self._said(failed[0]))
        return agreement

    def _said(self, failed: Opening) -> str:
        """Say to whoever asked why nothing was locked, and what stays."""
        key = "escrow.payer_api_key" if self.terms.payer_key else "escrow.api_key"
        kept = [
            f"{row.role} ({row.escrow})"
            for row in self._openings.values()
            if row.agreement == failed.agreement and row.status is OpeningStatus.LOCKED
        ]
        waits = f"; {', '.join(kept)} is locked and waits for it" if kept else ""
        return (
            f"the escrow of role {failed.role} was not locked with {key}: {failed.detail}{waits};"
            f" put that right, then again: meterd open {failed.plan} --id {failed.agreement}"
        )

    def _rows(self, wish: Wish) -> tuple[str, list[Opening]]:
        """Say what is to be locked. Without an await up to the intention: two cannot get in."""
        plan = self._ledger.plans.get(wish.plan)
        if plan is None:
            known = ", ".join(sorted(self._ledger.plans)) or "none"
            raise Refused(f"there is no plan {wish.plan!r}; known: {known}")
        agreement = wish.agreement or f"agr_{secrets.token_hex(8)}"
        account = self._known(agreement, plan, wish)
        if account is not None and not wish.next:
            return agreement, []
        waiting = [row for row in self._openings.values() if row.agreement == agreement]
        if any(row.status in openings.UNFINISHED for row in waiting):
            return agreement, []
        if any(row.plan != plan.name for row in waiting):
            raise Refused(f"agreement {agreement} is being opened under plan {waiting[0].plan}")
        if not self._bookkeeper.store.writable:
            raise Unavailable("the disk is full: nothing is locked that could not be written down")
        payer = wish.payer or (account.agreement.payer if account is not None else "")
        provider = self._provider(wish, payer)
        have = {row.role for row in waiting if row.status is OpeningStatus.LOCKED}
        amounts = _amounts(plan, wish)
        rows = [
            self._row(agreement, plan, payer, role, amounts[role], provider, ASKED)
            for role in plan.roles
            if role not in have
        ]
        return agreement, rows

    def _known(self, agreement: str, plan: Plan, wish: Wish) -> Account | None:
        """Find the agreement that is asked for again, or whose next escrow is."""
        account = self._ledger.account(agreement)
        if account is None:
            if wish.next:
                raise NotFound(f"there is no agreement {agreement}; list them: meterd agreements")
            return None
        if account.agreement.id != agreement:
            raise Refused(f"{agreement} is an escrow of agreement {account.agreement.id}")
        if account.plan.name != plan.name:
            raise Refused(f"agreement {agreement} is under plan {account.plan.name}")
        if wish.next and (account.closing or self._ledger.is_closed(account)):
            raise Refused(f"agreement {agreement} is closed; open another one")
        return account

    def _provider(self, wish: Wish, payer: str) -> str:
        """Say whom the escrow is for, where what is locked can be found again."""
        ours = self.terms.agent_id
        if ours and wish.provider not in ("", ours):
            raise Refused(f"the provider is escrow.agent_id, {ours}: leave it out, or change that")
        provider = wish.provider or ours
        if not provider:
            raise Refused("nobody to pay is known; write escrow.agent_id, or name the provider")
        if not self.terms.payer_key and not payer:
            raise Refused(NO_PAYER)
        return provider

    def _row(
        self,
        agreement: str,
        plan: Plan,
        payer: str,
        role: str,
        amount: int,
        provider: str,
        why: str,
        hours: int | None = None,
    ) -> Opening:
        key = f"open_{secrets.token_hex(12)}"
        memo = openings.memo_of(plan.memo, agreement, key)
        flaw = openings.memo_flaw(memo)
        if flaw:
            raise Refused(f"the escrow's memo {flaw}; shorten plans.{plan.name}.memo, or the id")
        now = self._clock.wall()
        return Opening(
            id=key,
            agreement=agreement,
            plan=plan.name,
            payer=payer,
            role=role,
            amount=amount,
            provider=provider,
            hours=hours or plan.auto_release_hours,
            memo=memo,
            why=why,
            status=OpeningStatus.INTENDED,
            created_at=now,
            changed_at=now,
        )

    # -- Locking -------------------------------------------------------------------------------

    async def _make(self, rows: Sequence[Opening], actor: str) -> list[Opening]:
        """Intend, lock and bind; those that were refused.

        Whatever cuts this off is found unfinished at the next start.
        """
        agreement = rows[0].agreement
        # 1. Intend.
        before = self._absent(agreement, {row.role for row in rows})
        for row in (*before, *rows):
            self._openings[row.id] = row
        amounts = ", ".join(f"{row.role} {format_amount(row.amount)} USDC" for row in rows)
        await self._bookkeeper.note_openings(
            (*before, *rows), actor, "escrow_opening", agreement, f"{rows[0].why}: {amounts}"
        )
        # 2. Lock, one at a time; once one was refused the rest of them would help nobody.
        failed: list[Opening] = []
        for row in rows:
            if failed:
                detail = f"not sent: the escrow of role {failed[0].role} was refused"
                after = replace(row, status=OpeningStatus.FAILED, detail=detail)
                await self._note(after, "opening_failed")
            else:
                after = await self._lock(row)
            failed += [after] if after.status is OpeningStatus.FAILED else []
        # 3. Bind.
        await self._bind(agreement)
        return failed

    def _absent(self, agreement: str, roles: set[str]) -> list[Opening]:
        """Openings that were given up and are now made again: they stand in nobody's way."""
        return [
            replace(row, why=AGAIN)
            for row in self._openings.values()
            if row.status is OpeningStatus.ABSENT
            and row.agreement == agreement
            and row.role in roles
        ]

    async def _lock(self, row: Opening) -> Opening:
        """Make the one call of an opening, and book what came back."""
        async with self._one_at_a_time:
            try:
                answer = await self._service.lock(row)
            except ValueError as error:
                detail = f"nothing was sent: {error}"
                failed = replace(row, status=OpeningStatus.FAILED, detail=detail)
                await self._note(failed, "opening_failed")
                return failed
        mono, wall = self._clock.mono(), self._clock.wall()
        if isinstance(answer, Locked):
            locked = openings.landed(row, answer, "answered", wall)
            await self._note(locked, "escrow_locked")
            return locked
        after = openings.answered(row, answer.kind, answer.detail, mono, wall)
        if after.status is OpeningStatus.FAILED:
            self._hold_off(row.agreement, answer.retry_after)
            await self._note(after, "opening_failed")
            return after
        await self._note(after, "opening_in_doubt")
        self._doubts_at = mono
        self._changed.set()
        return after

    async def _note(self, row: Opening, action: str) -> None:
        """Write down where an opening stands, and say it."""
        self._openings[row.id] = row
        detail = f"{row.role} {format_amount(row.amount)} USDC {row.escrow}: {row.detail}"
        await self._bookkeeper.note_openings((row,), BY_METERD, action, row.agreement, detail)
        if row.status is OpeningStatus.FAILED:
            del self._openings[row.id]
        if row.status is OpeningStatus.LOCKED:
            log.info("An escrow is locked.", action=action, agreement=row.agreement, detail=detail)
            return
        again = " --next" if row.agreement in self._ledger.accounts else ""
        command = f"meterd open {row.plan} --id {row.agreement}{again}"
        wait = row.status is OpeningStatus.IN_DOUBT
        log.error(
            _SENTENCES[row.status],
            action=action,
            agreement=row.agreement,
            opening=row.id,
            detail=detail,
            next="nothing: it is looked for in the service's list" if wait else command,
        )
        self._bookkeeper.alarm(action)

    async def _bind(self, agreement: str) -> None:
        """Bind what is locked for an agreement, once there is an escrow for each of its roles."""
        locked = [
            row
            for row in self._openings.values()
            if row.agreement == agreement and row.status is OpeningStatus.LOCKED
        ]
        plan = self._ledger.plans.get(locked[0].plan) if locked else None
        account = self._ledger.accounts.get(agreement)
        roles = {row.role for row in locked}
        if not locked or (account is None and plan is not None and roles != set(plan.roles)):
            return
        known = (
            account.agreement
            if account is not None
            else Agreement(agreement, locked[0].plan, locked[0].payer, ())
        )
        added = tuple((row.role, row.escrow) for row in locked)
        fresh = tuple(pair for pair in added if pair not in known.escrows)
        try:
            await self._bookkeeper.bind(replace(known, escrows=(*known.escrows, *fresh)), BY_METERD)
        except Refused as error:
            self._warn(
                locked[0].escrow,
                f"An escrow that meterd has locked cannot be bound: {error}",
                "escrow_not_bound",
                agreement=agreement,
            )
            return
        for row in locked:
            del self._openings[row.id]
        self._opened.add(agreement)
        self._failures.pop(agreement, None)
        self._await()
        self._changed.set()

    def _hold_off(self, agreement: str, retry_after: float | None) -> None:
        """Let a refused renewal wait, longer each time."""
        failures = self._failures[agreement] = self._failures.get(agreement, 0) + 1
        wait = min(FAILED_WAIT_MAX_S, FAILED_WAIT_S * 2 ** min(failures - 1, 10))
        self._retry_at[agreement] = self._clock.mono() + max(wait, retry_after or 0.0)

    # -- The loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Find, bind and renew until cancelled. Raises only what must end the process."""
        await self._restart()
        while True:
            self._changed.clear()
            await self._read_lists()
            await self._renew()
            try:
                async with asyncio.timeout(max(0.0, self._next() - self._clock.mono())):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _restart(self) -> None:
        """What was intended when the process died may have left: it is in doubt now."""
        mono, wall = self._clock.mono(), self._clock.wall()
        for row in self.unfinished:
            after = openings.restarted(row, mono, wall)
            self._openings[row.id] = after
            if after.status is not row.status:
                await self._note(after, "opening_in_doubt")
        for agreement in dict.fromkeys(row.agreement for row in self.unfinished):
            await self._bind(agreement)

    def _next(self) -> float:
        """When to look again, mono."""
        moments = [self._clock.mono() + 3600.0]
        if self._with(OpeningStatus.IN_DOUBT):
            moments.append(self._doubts_at)
        if self._finds():
            moments.append(self._discover_at)
        if self._renewable():
            moments.append(self._renew_at)
        return min(moments)

    def _finds(self) -> bool:
        """Whether the list may show something although nothing is in doubt."""
        return bool(self.terms.patterns) or bool(self._with(OpeningStatus.ABSENT))

    def _with(self, status: OpeningStatus) -> list[Opening]:
        return [row for row in self._openings.values() if row.status is status]

    # -- What the list shows -------------------------------------------------------------------

    async def _read_lists(self) -> None:
        """Read the lists that are due, and take what they show."""
        mono, rules = self._clock.mono(), self._bookkeeper.rules
        doubtful = self._with(OpeningStatus.IN_DOUBT) if mono >= self._doubts_at else []
        finds = self._finds() and mono >= self._discover_at
        if not doubtful and not finds:
            return
        # Ten looks in a quarantine find what landed soon enough, and lists are long.
        self._doubts_at = mono + max(rules.observe_gap, rules.quarantine / 10)
        if finds:
            self._discover_at = mono + self.terms.discover_interval
        looked_for = [*doubtful, *(self._with(OpeningStatus.ABSENT) if finds else [])]
        agents = {self._lister(row) for row in looked_for}
        if finds and self.terms.patterns:
            agents.add(self.terms.agent_id)
        for agent in sorted(agents - {""}):
            await self._read_list(agent, looked_for, finds=finds)

    def _lister(self, row: Opening) -> str:
        """In whose list an opening is found again."""
        return self.terms.agent_id if self.terms.payer_key else row.payer or self.terms.agent_id

    async def _read_list(self, agent: str, looked_for: Sequence[Opening], *, finds: bool) -> None:
        mono = self._clock.mono()
        try:
            census = await self._service.list_escrows(agent)
        except ValueError as error:
            self._say_unlisted(agent, str(error))
            return
        if not isinstance(census, Census):
            self._say_unlisted(agent, census.detail)
            return
        self._list_fails = False
        for row in looked_for:
            if self._lister(row) == agent:
                await self._look_for(row, census, mono)
        if finds and agent == self.terms.agent_id:
            await self._discover(census)

    def _say_unlisted(self, agent: str, detail: str) -> None:
        if not self._list_fails:
            log.warning(
                f"The list of escrows of {agent} could not be read: {detail}",
                action="list_failed",
                next="meterd check --live",
            )
        self._list_fails = True

    async def _look_for(self, row: Opening, census: Census, mono: float) -> None:
        """Take what a list says of one opening."""
        wall, rules = self._clock.wall(), self._bookkeeper.rules
        found = openings.find(row, census.escrows)
        if found:
            late = row.status is OpeningStatus.ABSENT
            detail = "found in the list, after it was given up" if late else "found in the list"
            locked = Locked(found[0].escrow, found[0].creator)
            await self._note(openings.landed(row, locked, detail, wall), "escrow_locked")
            self._say_extra(row, found, late=late)
            await self._bind(row.agreement)
            return
        if not census.whole:
            return
        after = openings.unseen(row, mono, wall, quarantine=rules.quarantine, gap=rules.observe_gap)
        self._openings[row.id] = after
        if after.status is not row.status:
            await self._note(after, "opening_absent")

    def _say_extra(self, row: Opening, found: Sequence[Found], *, late: bool) -> None:
        if late:
            log.error(
                "An escrow that was given up has been locked after all: it is bound.",
                action="opening_late",
                agreement=row.agreement,
                escrow=found[0].escrow,
                next=f"meterd agreements {row.agreement}",
            )
            self._bookkeeper.alarm("opening_late")
        for extra in found[1:]:
            self._warn(
                extra.escrow,
                "One request has locked two escrows; this one is not drawn on. Have it refunded.",
                "opened_twice",
                agreement=row.agreement,
            )

    async def _discover(self, census: Census) -> None:
        """Bind what the list shows and `[[discover]]` names."""
        own = {row.memo for row in self._openings.values()}
        discovery = Discovery(self._ledger, self.terms.patterns, self.terms.agent_id)
        candidates = discovery.candidates(census.escrows)
        for found, plan in [pair for pair in candidates if pair[0].memo not in own][:BOUND_MAX]:
            placed = discovery.place(found, plan)
            if isinstance(placed, Agreement):
                await self._bind_found(placed, found)
            else:
                self._warn_doubtful(placed, plan)

    async def _bind_found(self, agreement: Agreement, found: Found) -> None:
        try:
            await self._bookkeeper.bind(agreement, BY_DISCOVERY)
        except Refused as error:
            self._warn_doubtful(Doubtful(found.escrow, str(error)), agreement.plan)
            return
        log.info(
            f"An escrow of {found.creator or 'an unknown payer'} was found and bound.",
            action="escrow_discovered",
            agreement=agreement.id,
            escrow=found.escrow,
        )

    def _warn_doubtful(self, doubtful: Doubtful, plan: str) -> None:
        sentence = f"An escrow was found and is not bound: {doubtful.why}."
        self._warn(doubtful.escrow, sentence, "escrow_not_bound", plan=plan)

    def _warn(self, escrow: str, sentence: str, action: str, **fields: str) -> None:
        """Tell a person once of an escrow that is left alone."""
        if escrow in self._warned:
            return
        if len(self._warned) >= WARNED_MAX:
            self._warned.clear()
        self._warned.add(escrow)
        command = f"meterd bind {escrow} --plan PLAN --id AGREEMENT"
        log.warning(sentence, action=action, escrow=escrow, next=command, **fields)
        self._bookkeeper.alarm(action)

    # -- Renewals ------------------------------------------------------------------------------

    def _renewable(self) -> bool:
        return self.terms.payer_key and any(plan.renew for plan in self._ledger.plans.values())

    async def _renew(self) -> None:
        """Lock the next escrow of each agreement that needs one and that meterd has opened."""
        mono = self._clock.mono()
        if not self._renewable() or mono < self._renew_at:
            return
        self._renew_at = mono + RENEW_LOOK_S
        self._await()
        for account in list(self._renewed()):
            rows = list(self._lacking(account, mono))
            if rows and self._bookkeeper.store.writable:
                await self._make(rows, BY_METERD)

    def _renewed(self) -> Iterator[Account]:
        for name in self._opened:
            account = self._ledger.accounts.get(name)
            if account is not None and account.plan.renew:
                yield account

    def _await(self) -> None:
        """Let no agreement lapse whose next escrow meterd is about to lock."""
        absent = self._with(OpeningStatus.ABSENT)
        given_up = {row.agreement for row in absent if row.why != AGAIN}
        renewed = [account.agreement.id for account in self._renewed()] if self._renewable() else []
        self._ledger.awaited = {
            name
            for name in renewed
            if name not in given_up and self._failures.get(name, 0) < FAILURES_MAX
        }

    def _lacking(self, account: Account, mono: float) -> Iterator[Opening]:
        name, plan, wall = account.agreement.id, account.plan, self._clock.wall()
        if mono < self._retry_at.get(name, 0.0):
            return
        for role, why in lacking(self._ledger, account, wall, self._ahead(plan)):
            # One that is open counts as locked; one that was given up waits for a person.
            if any(
                row.agreement == name and row.role == role and row.why != AGAIN
                for row in self._openings.values()
            ):
                continue
            amount = amount_for(self._ledger, account, role)
            hours = hours_for(account, wall)
            payer, provider = account.agreement.payer, self.terms.agent_id
            yield self._row(name, plan, payer, role, amount, provider, why, hours)

    def _ahead(self, plan: Plan) -> int:
        """How long before it is needed, in ms, an escrow is asked for.

        Before what is due before a deadline is due, and by as much as a doubt may take.
        """
        margin = self._bookkeeper.margin
        ahead = max(margin, plan.settle.before_deadline) + margin
        hours = plan.auto_release_hours
        limits = [plan.period, None if hours is None else hours * 3_600_000]
        return min([ahead, *(limit // 2 for limit in limits if limit is not None)])


_SENTENCES = {
    OpeningStatus.FAILED: "An escrow was not locked.",
    OpeningStatus.IN_DOUBT: "Nobody knows whether an escrow was locked.",
    OpeningStatus.ABSENT: "An escrow was not locked, as far as the service's list shows.",
}


def _amounts(plan: Plan, wish: Wish) -> dict[str, int]:
    """How much is locked for each role; a deposit that is asked for is that of usage."""
    amounts = dict(plan.deposits)
    if wish.deposit is not None:
        amounts[plan.roles[-1]] = wish.deposit
    if "wallet" in plan.roles:
        raise Refused(f"plan {plan.name} draws on a wallet, which is not locked: bind it")
    missing = [role for role in plan.roles if not amounts.get(role)]
    if missing:
        raise Refused(
            f"plan {plan.name} does not say how much is locked; write plans.{plan.name}.deposit, or"
            " name a deposit"
        )
    return amounts
