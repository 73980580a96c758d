"""The ledger: agreements, their counters, and what they owe. Decide is pure, apply cannot refuse.

A batch passes in three steps. `resolve` finds for each event its counter and the quantity to add,
or a reason why not. `decide` adds what only the memory of identities can know: duplicates and
conflicts. `apply` then adds the sums, once for each counter of the batch and not once for each
event, and hands out the rows to be made durable.

What an agreement owes is its rate cards' charge for its counters, and nothing else. A counter
belongs to a period of its agreement and to the card that was in force at the event's own time. It
is kept as an integer over one denominator. Most rates are linear: what is owed grows by the same
integers by which the counters grow. For the others the charge of a whole line is worked out anew,
once for each batch that touches it.

An agreement may draw on several escrows of one role, oldest first. Which of them owes what is no
state of its own: it follows from what is owed in all, from how much each can hold, and from what
each has paid (`owed_on`). So the border between two escrows loses and doubles nothing.
"""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import compress, takewhile

import msgspec

from meterd.core.accounts import (
    Account,
    Agreement,
    Charged,
    Counter,
    Entry,
    Line,
    ResolvedBatch,
    Totals,
    Touched,
    Why,
    capacity,
    paid,
)
from meterd.core.caps import NO_CAPS, PLAN, Windows, windows_of
from meterd.core.changes import AgreementRow, CardRow, Change, CounterRow, SampleRow, State
from meterd.core.events import (
    DIMENSIONS_MAX,
    ID_CHARS_MAX,
    NAME_CHARS_MAX,
    Decoded,
    Reason,
    Rejection,
    UsageEvent,
    name_flaw,
    printable,
    score_nanos,
)
from meterd.core.feeds import (
    GENAI_TYPE,
    USAGE_TYPE,
    Feeds,
    Part,
    open_special,
    open_usage,
    unwrap,
)
from meterd.core.meters import Aggregation, Meter, Sample, Samples
from meterd.core.money import (
    MICROS,
    NANOS,
    QUANTITY_MAX,
    BadNumber,
    format_price,
    format_quantity,
    parse_price,
)
from meterd.core.plans import PeriodEnd, Plan
from meterd.core.pricing import (
    MILESTONE_METER,
    OUTCOME_METER,
    OWN_METERS,
    PERIOD_METER,
    Dimensions,
    Model,
    RateCard,
)
from meterd.core.settlement import Escrow, EscrowStatus
from meterd.core.thresholds import Bursts, Standing
from meterd.core.trial import Trial

CLOSE_TYPE = "meterd.close"
VOID_TYPE = "meterd.void"
MILESTONE_TYPE = MILESTONE_METER
OUTCOME_TYPE = OUTCOME_METER
SPECIAL_TYPES = (CLOSE_TYPE, VOID_TYPE, MILESTONE_TYPE, OUTCOME_TYPE)
ONCE = frozenset({MILESTONE_METER, OUTCOME_METER})  # What an agreement reaches once.
AHEAD_MAX_MS = 5 * 60 * 1000  # Clocks of producers differ; a day ahead is a mistake.
HOUR_MS = 3_600_000
# Spellings of (agreement, meter, dimension values) that are remembered; then begun anew.
RESOLVED_MAX = 200_000
VALUE_CHARS_MAX = 256
AWAITED_MS = 1000  # How often a period that waits for its escrow is looked at.


# A counter, the nanos that a typed event adds to it, and the value that tells it apart.
Fed = tuple[Counter, int, str]


class Conflict(Exception):
    """An agreement cannot be bound as asked; the message says why and what to do."""


class Ledger:
    """All agreements of one daemon. It has one owner, the bookkeeper; no other may change it."""

    def __init__(self, plans: Mapping[str, Plan], meters: Mapping[str, Meter]) -> None:
        self.plans = dict(plans)
        self.meters = dict(meters)
        self.accounts: dict[str, Account] = {}
        self.escrows: dict[str, Escrow] = {}
        self._feeds = Feeds(meters.values())
        self._by_name: dict[str, Account] = {}  # Agreement ids and escrow ids.
        self._resolved: dict[tuple[str | None, ...], Counter] = {}
        self._asked: dict[str, tuple[str, ...]]
        self._accrued: dict[int, int] = {}  # Numerators by denominator.
        self.cards: dict[str, RateCard] = {}  # All that are known, by id.
        self._stored_cards: set[str] = set()  # Those that a change has been made for.
        self._counter_next = 1
        self._by_number: dict[int, Counter] = {}
        # Agreements whose next escrow meterd locks: they wait for it and do not lapse.
        self.awaited: set[str] = set()
        self._period_ends: list[tuple[int, str]] = []  # A heap of (wall ms, agreement).
        self._capped = False  # Whether any plan has caps.
        self._note_plans()

    # -- Reading back what was stored ---------------------------------------------------------

    @classmethod
    def restore(
        cls, plans: Mapping[str, Plan], meters: Mapping[str, Meter], state: State
    ) -> Ledger:
        """Rebuild the ledger. Raises `Conflict` when stored sums do not follow from counters."""
        ledger = cls(plans, meters)
        cards = {row.id: RateCard.from_text(row.text) for row in state.cards}
        ledger.cards.update(cards)
        ledger._stored_cards.update(cards)
        counted: dict[str, list[CounterRow]] = {}
        for row in state.counters:
            counted.setdefault(row.agreement, []).append(row)
        samples: dict[int, list[Sample]] = {}
        for sample in state.samples:
            known = samples.setdefault(sample.counter, [])
            known.append(Sample(sample.key, sample.quantity, sample.count))
        for escrow in state.escrows:
            ledger.escrows[escrow.id] = escrow
        for agreement in state.agreements:
            ledger._restore_account(agreement, counted.get(agreement.id, []), samples)
        return ledger

    def _restore_account(
        self,
        row: AgreementRow,
        counters: Sequence[CounterRow],
        samples: Mapping[int, Sequence[Sample]],
    ) -> None:
        plan = self.plans.get(row.plan)
        if plan is None:
            raise Conflict(
                f"agreement {row.id} has plan {row.plan!r}, which the configuration has no more: "
                f"put [plans.{row.plan}] back"
            )
        missing = [escrow for _, escrow in row.escrows if escrow not in self.escrows]
        if missing or not row.escrows:
            raise Conflict(f"agreement {row.id}: its escrow is not stored: {missing}")
        agreement = Agreement(row.id, row.plan, row.payer, row.escrows, row.origin)
        account = Account(agreement, plan, row.opened_at)
        account.events, account.units = row.events, row.units
        account.unsettled_since, account.closing = row.unsettled_since, row.closing
        account.period = row.period
        account.windows = windows_of(row.spent)
        for stored in counters:
            self._restore_counter(account, stored, samples.get(stored.number, ()))
        self._enter(account)
        if account.accrued != row.accrued:
            raise Conflict(
                f"agreement {row.id}: its counters are worth {account.accrued} USDC, "
                f"{row.accrued} is stored"
            )

    def _restore_counter(
        self, account: Account, stored: CounterRow, samples: Sequence[Sample]
    ) -> None:
        card = self.cards.get(stored.card)
        place = None if card is None else card.match(stored.meter, dict(stored.dimensions))
        if card is None or place is None:
            raise Conflict(
                f"agreement {stored.agreement}: no stored rate prices its counter of "
                f"{stored.meter!r}"
            )
        meter = self._meter(stored.meter)
        counter = Counter(
            account,
            stored.period,
            stored.card,
            meter,
            stored.dimensions,
            stored.number,
            samples=None if meter.additive else Samples.of(meter.aggregation, samples),
            quantity=stored.quantity,
            amount=stored.amount,
            events=stored.events,
            shared=stored.shared,
        )
        if counter.samples is None:
            fits = not any(sample.count for sample in samples)
        else:
            fits = counter.samples.quantity == stored.quantity
        if not fits:
            raise Conflict(
                f"agreement {stored.agreement}: its meter {stored.meter!r} was counted otherwise "
                f"than by {meter.aggregation.value}; put back its aggregation as it was, or write "
                "a meter of another name"
            )
        account.counters[stored.period, stored.card, stored.meter, stored.dimensions] = counter
        self._by_number[stored.number] = counter
        self._counter_next = max(self._counter_next, stored.number + 1)

    # -- Agreements ---------------------------------------------------------------------------

    def bind(self, agreement: Agreement, wall: int) -> Change:
        """Enter an agreement, or give a known one another plan, payer or more escrows.

        Binding again what is bound as asked changes nothing. Escrows that a known agreement has
        stay; new ones are drawn on behind them. Raises `Conflict`.
        """
        objection = self.objection(agreement, self.plans)
        if objection:
            raise Conflict(objection)
        plan = self.plans[agreement.plan]
        account = self.accounts.get(agreement.id)
        if account is None:
            account = Account(agreement, plan, wall)
            fresh = [Escrow(escrow, agreement.id, role) for role, escrow in agreement.escrows]
            self.escrows.update({escrow.id: escrow for escrow in fresh})
            self._enter(account)
            return Change(
                cards=self._new_cards(plan),
                agreements=(account.row,),
                escrows=tuple(fresh),
            )
        known = account.agreement.escrows
        added = tuple(pair for pair in agreement.escrows if pair not in known)
        merged = Agreement(
            agreement.id, agreement.plan, agreement.payer, (*known, *added), agreement.origin
        )
        if account.agreement == merged and account.plan == plan:
            return Change(cards=self._new_cards(plan))
        account.agreement = merged
        fresh = [Escrow(escrow, agreement.id, role) for role, escrow in added]
        for escrow in fresh:
            self.escrows[escrow.id] = escrow
            self._by_name[escrow.id] = account
        self._move_to(account, plan)
        return Change(cards=self._new_cards(plan), agreements=(account.row,), escrows=tuple(fresh))

    def objection(self, agreement: Agreement, plans: Mapping[str, Plan]) -> str:
        """Say why an agreement cannot be bound under these plans; "" when it can."""
        plan = plans.get(agreement.plan)
        if plan is None:
            known = ", ".join(sorted(plans)) or "none"
            return f"there is no plan {agreement.plan!r}; known: {known}"
        for name in (agreement.id, *(escrow for _, escrow in agreement.escrows)):
            other = self._by_name.get(name)
            if other is not None and other.agreement.id != agreement.id:
                return f"{name} belongs to agreement {other.agreement.id} already"
        account = self.accounts.get(agreement.id)
        given = set(agreement.escrows)
        if account is not None:
            flaw = _escrows_flaw(account, given)
            if flaw:
                return flaw
            given |= set(account.agreement.escrows)
        roles_given = {role for role, _ in given}
        if roles_given != set(plan.roles):
            return (
                f"plan {plan.name} draws on {' and '.join(plan.roles)}, "
                f"the agreement has {' and '.join(sorted(roles_given)) or 'no escrow'}"
            )
        return ""

    def _new_cards(self, *plans: Plan) -> tuple[CardRow, ...]:
        """Rows for the cards that no change has held yet.

        A price that was changed while the daemon was down is on a card that the store does not
        know, and a counter must never be stored before its card.
        """
        cards = {card.id: card for plan in plans for card in plan.cards}
        new = [card for name, card in cards.items() if name not in self._stored_cards]
        self._stored_cards.update(cards)
        return tuple(CardRow(card.id, card.text) for card in new)

    def _enter(self, account: Account) -> None:
        self.accounts[account.agreement.id] = account
        for name in (account.agreement.id, *account.escrow_ids):
            self._by_name[name] = account
        self._work_out(account)
        self._look_at_period(account)

    def _move_to(self, account: Account, plan: Plan) -> None:
        """Price further usage by another plan. What was accrued stays what it is."""
        self._accrued[account.denominator] -= account.numerator
        account.plan = plan
        self._work_out(account)
        self._look_at_period(account)
        self._resolved.clear()

    def _work_out(self, account: Account) -> None:
        """Reckon all that follows from an account's counters and its plan's cards."""
        cards = {card.id: card for card in account.plan.cards}
        for counter in account.counters.values():
            cards.setdefault(counter.card, self.cards[counter.card])
        account.denominator = math.lcm(*(card.denominator for card in cards.values()))
        roles = {role for card in cards.values() for role in card.roles}
        account.by_role = {} if len(roles) > 1 else None
        account.numerator = 0
        account.lines.clear()
        for counter in account.counters.values():
            self._price(counter, cards[counter.card])
            if counter.line is None:
                account.grow(
                    counter.role, self._linear_charge(counter, counter.quantity, counter.amount)
                )
            else:
                counter.line.quantity += counter.quantity
                counter.line.amount += counter.amount
                counter.line.events += counter.events
        for period, card, meter, _ in account.counters:
            if meter == PERIOD_METER:
                self._end_lines(account, period, cards[card])
        for line in account.lines.values():
            account.grow(line.card.rates[line.place].role, line.work_out())
        self._accrued[account.denominator] = (
            self._accrued.get(account.denominator, 0) + account.numerator
        )
        bounded = account.plan.settle.exposure_max is not None
        account.bursts = Bursts(account.owed) if bounded else None

    def _price(self, counter: Counter, card: RateCard) -> None:
        """Give a counter its weight or, where its rate is not linear, its line."""
        account = counter.account
        place = card.match(counter.meter.name, dict(counter.dimensions))
        assert place is not None, "a counter has been made by a rate of its card"
        rate = card.rates[place]
        counter.role = rate.role
        counter.dynamic, counter.price_max = rate.model is Model.DYNAMIC, rate.price
        counter.weight = card.weights[place] * (account.denominator // card.denominator)
        counter.line = None if rate.linear else self._line(account, counter.period, card, place)

    def _line(self, account: Account, period: int, card: RateCard, place: int) -> Line:
        key = period, card.id, place
        line = account.lines.get(key)
        if line is None:
            line = account.lines[key] = Line(account, card, place)
        return line

    @staticmethod
    def _linear_charge(counter: Counter, quantity: int, amount: int) -> int:
        return (amount if counter.dynamic else quantity) * counter.weight

    def _end_lines(self, account: Account, period: int, card: RateCard) -> list[Line]:
        """Mark the lines of a period as ended, those without usage but with a minimum too."""
        for place, rate in enumerate(card.rates):
            if rate.minimum is not None:
                self._line(account, period, card, place)
        ended = [line for key, line in account.lines.items() if key[:2] == (period, card.id)]
        for line in ended:
            line.ended = True
        return ended

    def reload(self, plans: Mapping[str, Plan], meters: Mapping[str, Meter]) -> Change:
        """Take changed plans and meters.

        Raises `Conflict`, having changed nothing, when a plan in use is gone, or its period or its
        roles have changed.
        """
        gone = sorted({account.plan.name for account in self.accounts.values()} - set(plans))
        if gone:
            raise Conflict(f"plans in use are missing: {', '.join(gone)}; put them back")
        for account in self.accounts.values():
            before, after = account.plan, plans[account.plan.name]
            if (before.period, before.roles) != (after.period, after.roles):
                raise Conflict(
                    f"plan {before.name} is in use: its period and the escrows that it draws on "
                    "stay; write a plan of another name"
                )
        self._refuse_other_aggregations(meters)
        self.plans, self.meters = dict(plans), dict(meters)
        self._feeds = Feeds(meters.values())
        self._note_plans()
        self._resolved.clear()
        for account in self.accounts.values():
            for counter in account.counters.values():
                counter.meter = self.meters.get(counter.meter.name, counter.meter)
        changed = [
            account
            for account in self.accounts.values()
            if account.plan != self.plans[account.plan.name]
        ]
        for account in changed:
            self._move_to(account, self.plans[account.plan.name])
        return Change(
            cards=self._new_cards(*(account.plan for account in self.accounts.values())),
            agreements=tuple(account.row for account in changed),
        )

    def _refuse_other_aggregations(self, meters: Mapping[str, Meter]) -> None:
        """What was counted is a sum, or it has samples of one kind: neither becomes the other."""
        for account in self.accounts.values():
            for counter in account.counters.values():
                known, fresh = counter.meter, meters.get(counter.meter.name)
                if fresh is None or known.name in OWN_METERS:
                    continue
                both = known.additive and fresh.additive
                if not both and fresh.aggregation is not known.aggregation:
                    raise Conflict(
                        f"meter {known.name} is in use: it stays {known.aggregation.value}; "
                        "write a meter of another name"
                    )

    def close(self, account: Account, wall: int | None = None) -> Touched:
        """Mark an agreement as closing, at wall ms: usage is taken until its escrows are closed.

        The running period ends with it, so its fee and its minimums are owed. Where the one before
        was ended early, for a deadline's sake, it may not have begun yet: then it never does. One
        whose fee nobody has locked is not owed, as it would not be at its own end.
        """
        touched = Touched(accounts={account: None})
        if not account.closing:
            plan = account.plan
            begun = wall is None or account.period <= plan.period_at(account.opened_at, wall)
            if begun and self.is_covered(account):
                self._end_period(account, touched)
            account.closing = True
        return touched

    # -- Periods ------------------------------------------------------------------------------

    def end_periods(self, now: int, margin: int) -> tuple[Touched, list[Account]]:
        """End the periods that are over, wall ms; and name the agreements that lapsed.

        `margin`: how long before an escrow's own deadline, in ms, a fee must be owed so that it can
        still be released. An agreement lapses when its escrows cannot hold the fee of the period
        that ends: then nobody has renewed it, and it is closed instead of owing what nobody has
        locked.
        """
        touched, lapsed = Touched(), []
        while self._period_ends and self._period_ends[0][0] <= now:
            _, name = heapq.heappop(self._period_ends)
            account = self.accounts[name]
            ends = self._period_due(account, margin)
            if ends is None or ends > now:
                self._note_period_end(account, margin)
                continue
            if self._is_awaited(account):
                heapq.heappush(self._period_ends, (now + AWAITED_MS, name))
                continue
            touched.accounts[account] = None
            if self.is_covered(account):
                self._end_period(account, touched)
                account.period += 1
                self._note_period_end(account, margin)
            else:
                account.closing = True
                lapsed.append(account)
        return touched, lapsed

    @property
    def next_period_end(self) -> int | None:
        """When to look for a period's end next, wall ms; None: never."""
        return self._period_ends[0][0] if self._period_ends else None

    def _look_at_period(self, account: Account) -> None:
        """Look at the next chance when its period is due: only there the margin is known.

        Nothing is asked of what was read before a restart, or under another plan.
        """
        if account.plan.period is not None and not account.closing:
            heapq.heappush(self._period_ends, (0, account.agreement.id))

    def _note_period_end(self, account: Account, margin: int) -> None:
        ends = self._period_due(account, margin)
        if ends is not None:
            heapq.heappush(self._period_ends, (ends, account.agreement.id))

    def _period_due(self, account: Account, margin: int) -> int | None:
        """When the running period is to be ended: before the deadline that would take its money.

        Where the service itself pays at the deadline, at the period's own end.
        """
        plan = account.plan
        ends = plan.period_ends(account.opened_at, account.period)
        if ends is None or account.closing:
            return None
        assert plan.period is not None
        if plan.period_end is PeriodEnd.AUTO:
            return ends
        lead = max(margin, plan.settle.before_deadline)
        deadlines = [
            escrow.deadline - lead
            for escrow in self.escrows_of(account)
            if escrow.deadline is not None
            and escrow.remaining > 0
            and ends - plan.period < escrow.deadline - lead < ends
        ]
        return min(deadlines, default=ends)

    def _is_awaited(self, account: Account) -> bool:
        """Whether the fee of the period that ends waits for an escrow that meterd is locking."""
        if account.agreement.id not in self.awaited:
            return False
        unread = any(escrow.status is EscrowStatus.ADOPTING for escrow in self.escrows_of(account))
        return unread or not self.is_covered(account)

    def is_covered(self, account: Account) -> bool:
        """Whether the escrows of the fee's role can hold the fees up to the running period."""
        card = self._period_card(account)
        place = card.match(PERIOD_METER, {})
        if place is None or not card.rates[place].price:
            return True
        rate = card.rates[place]
        fee = rate.price * MICROS // 10**12
        escrows = [
            self.escrows[name] for role, name in account.agreement.escrows if role == rate.role
        ]
        if any(not escrow.total for escrow in escrows):
            return True  # One that is not read yet may hold anything.
        return sum(map(capacity, escrows)) >= account.owed_by(rate.role) + fee

    def _period_card(self, account: Account) -> RateCard:
        """The card in force when the running period began: the fee and the minimums are its."""
        begins = account.opened_at + account.period * (account.plan.period or 0)
        return account.plan.card_at(begins)

    def _end_period(self, account: Account, touched: Touched) -> None:
        card = self._period_card(account)
        if card.match(PERIOD_METER, {}) is None:
            return
        counter = self._new_counter(account, account.period, card, PERIOD_METER, ())
        counter.quantity = NANOS
        touched.counters[counter] = None
        charges = [(counter.role, NANOS * counter.weight)]
        ended = self._end_lines(account, account.period, card)
        charges += [(card.rates[line.place].role, line.work_out()) for line in ended]
        for role, charge in charges:
            account.grow(role, charge)
            self._accrued[account.denominator] += charge
        if account.bursts is not None:
            account.bursts.level = account.owed  # A fee is no burst of usage.
        if not account.unsettled_since:
            account.unsettled_since = account.opened_at + (account.period + 1) * (
                account.plan.period or 0
            )

    # -- What each escrow owes ------------------------------------------------------------------

    def owed_on(self, account: Account, escrow: Escrow) -> int:
        """What one escrow should have released by meterd in all, micros.

        Of several of one role the oldest is drawn on first, up to what it can hold. Whatever the
        figures of the others do, all of them together are never asked for more than is owed.
        """
        if len(account.agreement.escrows) == 1:
            return account.owed
        owed = account.owed_by(escrow.role)
        rest, others, before = owed, 0, True
        for role, name in account.agreement.escrows:
            if role != escrow.role:
                continue
            if name == escrow.id:
                before = False
                continue
            other = self.escrows[name]
            has_paid = paid(other)
            others += has_paid
            if before:
                rest -= max(has_paid, min(rest, capacity(other)))
        return max(0, min(rest, owed - others))

    def free_on(self, account: Account, escrow: Escrow) -> int:
        """What one escrow can still pay beyond what it owes, micros."""
        return max(0, capacity(escrow) - max(self.owed_on(account, escrow), paid(escrow)))

    def uncovered(self, account: Account, role: str) -> int:
        """What is owed on the escrows of a role and none of them can pay, micros.

        One that is not read yet may hold anything.
        """
        escrows = [escrow for escrow in self.escrows_of(account) if escrow.role == role]
        if any(escrow.status is EscrowStatus.ADOPTING for escrow in escrows):
            return 0
        return max(0, account.owed_by(role) - sum(map(capacity, escrows)))

    def standing(self, account: Account, escrow: Escrow) -> Standing:
        """What the thresholds look at, for one of an account's escrows."""
        owed = self.owed_on(account, escrow)
        return Standing(owed, account.units, account.unsettled_since, account.bursts)

    def escrows_of(self, account: Account) -> Iterator[Escrow]:
        """The escrows of an account, in the order in which they are drawn on."""
        for _, name in account.agreement.escrows:
            yield self.escrows[name]

    def is_closed(self, account: Account) -> bool:
        """Whether nothing more can be paid to this agreement, so that usage is refused."""
        if len(account.agreement.escrows) == 1:
            return self.escrows[account.escrow].status is EscrowStatus.CLOSED
        return all(escrow.status is EscrowStatus.CLOSED for escrow in self.escrows_of(account))

    def settled_from(self, account: Account, wall: int) -> AgreementRow | None:
        """Begin the interval anew behind a release; None when nothing of the row changed."""
        unsettled = any(
            escrow.unsettled(self.owed_on(account, escrow)) > 0
            for escrow in self.escrows_of(account)
        )
        since = wall if unsettled else 0
        if since == account.unsettled_since:
            return None
        account.unsettled_since = since
        return account.row

    def put(self, escrow: Escrow) -> Escrow:
        """Replace an escrow's state, and hand back the one before."""
        before = self.escrows[escrow.id]
        self.escrows[escrow.id] = escrow
        if escrow.status is EscrowStatus.CLOSED and before.status is not EscrowStatus.CLOSED:
            self._resolved.clear()  # Its counters must be asked for anew, to be refused.
        if escrow.deadline != before.deadline:
            self._look_at_period(self.accounts[escrow.agreement])
        return before

    def account(self, name: str) -> Account | None:
        """Find an account by its agreement's id or by the id of one of its escrows."""
        return self._by_name.get(name)

    def counter(self, number: int) -> Counter | None:
        """Find a counter by its number."""
        return self._by_number.get(number)

    def totals(self) -> Totals:
        """Sum up over all agreements."""
        accrued = sum(
            (Fraction(numerator, denominator) for denominator, numerator in self._accrued.items()),
            Fraction(0),
        )
        settled = held = credited = 0
        for escrow in self.escrows.values():
            settled += escrow.settled
            held += escrow.held
            credited += escrow.credited
        return Totals(accrued, settled, held, credited)

    def _note_plans(self) -> None:
        """Note the cards, and the dimensions that a meter's price depends on in any of them."""
        asked: dict[str, set[str]] = {}
        for plan in self.plans.values():
            for card in plan.cards:
                self.cards[card.id] = card
                for rate in card.rates:
                    asked.setdefault(rate.meter, set()).update(name for name, _ in rate.where)
        self._asked = {meter: tuple(sorted(names)) for meter, names in asked.items()}
        self._capped = any(plan.caps is not None for plan in self.plans.values())

    def _meter(self, name: str) -> Meter:
        return _OWN.get(name) or self.meters.get(name) or Meter(name)

    # -- A batch ------------------------------------------------------------------------------

    # One pass over the batch: a call for each of its steps would cost more than the steps do.
    def resolve(  # noqa: C901, PLR0912, PLR0915
        self,
        decoded: Sequence[Decoded],
        ids: Sequence[str] | None,
        source: str,
        oldest: int,
        now: int,
    ) -> ResolvedBatch:
        """Find each event's counter and quantity. Pure but for its memory of spellings.

        `source` stands in for events that name none, `ids` for those without an id. Times in wall
        ms: events from before `oldest` are late, those more than five minutes ahead of `now` early.
        The events are brought to one spelling (agreement, source, quantity), so that their content
        can be compared.
        """
        found = ResolvedBatch()
        rejections = found.rejections
        remembered = self._resolved
        asked = self._asked
        oldest_s, newest_s, now_bucket = oldest / 1000, (now + AHEAD_MAX_MS) / 1000, now // HOUR_MS
        # Nearly all events are of this hour: then two comparisons say all there is to say.
        hour_begins = _EPOCH + timedelta(milliseconds=max(oldest, now_bucket * HOUR_MS))
        hour_ends = _EPOCH + timedelta(
            milliseconds=min(now + AHEAD_MAX_MS, (now_bucket + 1) * HOUR_MS - 1)
        )
        take_index, take_event = found.indices.append, found.events.append
        take_counter, take_quantity = found.counters.append, found.quantities.append
        take_bucket = found.buckets.append
        for index, event in enumerate(decoded):
            if isinstance(event, Rejection):
                rejections.append(event)
                continue
            if not event.id and ids is not None:
                event.id = ids[index]
            # 1. The counter, by the spelling as it came.
            name = event.agreement or event.escrow_id
            names = asked.get(event.meter)
            key: tuple[str | None, ...]
            if not names:
                key = (name, event.meter)
            elif len(names) == 1:
                key = (name, event.meter, event.dimensions.get(names[0]))
            else:
                key = (name, event.meter, *map(event.dimensions.get, names))
            counter = remembered.get(key)
            if (
                counter is None
                or event.type
                or (event.agreement and event.escrow_id)
                or len(event.dimensions) > DIMENSIONS_MAX
            ):
                counter_or_not = self._counter(event, key, now, index, found)
                if isinstance(counter_or_not, tuple):
                    rejections.append(Rejection(index, printable(event.id), *counter_or_not))
                    continue
                counter = counter_or_not
            # 2. The identity.
            event_id = event.id
            if not 0 < len(event_id) <= ID_CHARS_MAX or not event_id.isprintable():
                rejections.append(_bad_id(index, event_id))
                continue
            if not event.source:
                event.source = source
            elif flaw := name_flaw(event.source, "the source", ID_CHARS_MAX):
                rejections.append(Rejection(index, event_id, Reason.MALFORMED, flaw))
                continue
            # 3. The time.
            time = event.time
            if time is None or hour_begins <= time <= hour_ends:
                bucket = now_bucket
            else:
                seconds = time.timestamp()
                if oldest_s <= seconds <= newest_s:
                    bucket = int(seconds) // 3600
                elif event.sequence == "" or seconds > newest_s:
                    rejections.append(_untimely(index, event, early=seconds > newest_s))
                    continue
                else:
                    bucket = now_bucket  # Its number decides: it is remembered from now on.
                    found.late.add(index)
            # 4. The quantity.
            if counter is None:
                quantity = event.quantity = 0
                if index in found.fed:
                    charged = _charged(found.fed[index], event, now)
                    if isinstance(charged, tuple):
                        rejections.append(Rejection(index, event_id, *charged))
                        continue
                    found.parts[len(found.events)] = charged
                    if event.type == GENAI_TYPE:
                        # A span and the log record of the same call are one event, and neither is
                        # made at the other's time: it has done its work, and is no content here.
                        event.time = None
            else:
                number, meter = event.quantity, counter.meter
                plain = meter.aggregation is _SUM and not event.type  # A score is no quantity.
                if plain and type(number) is int and 0 < number <= QUANTITY_MAX:
                    quantity = number * NANOS
                else:
                    try:
                        quantity = _measured(meter, event)
                    except BadNumber as error:
                        rejections.append(
                            Rejection(index, event_id, Reason.BAD_QUANTITY, f"quantity: {error}")
                        )
                        continue
                event.agreement = counter.account.agreement.id
                if counter.samples is not None or counter.dynamic or event.price:
                    why = _note_extras(found, counter, event, quantity, now)
                    if why is not None:
                        rejections.append(Rejection(index, event_id, *why))
                        continue
            if event.hold:
                found.holds[len(found.events)] = event.hold
            event.escrow_id = ""
            take_index(index)
            take_event(event)
            take_counter(counter)
            take_quantity(quantity)
            take_bucket(bucket)
        return found

    def _counter(
        self,
        event: UsageEvent,
        key: tuple[str | None, ...],
        now: int,
        index: int,
        found: ResolvedBatch,
    ) -> Counter | Why | None:
        """Find or make the counter of an event, the slow way; None where it has none.

        What is refused only where it is no duplicate is noted in `found`, and what a typed event
        feeds.
        """
        if event.specversion or event.type == USAGE_TYPE:
            why = open_envelope(event)
            if why is not None:
                return why
            name = event.agreement or event.escrow_id
            key = self._spelling(name, event.meter, event.dimensions)
        account = self._addressed(event)
        if isinstance(account, tuple):
            return account
        closed = self.is_closed(account)
        if closed:
            found.refused[index] = Reason.CLOSED, f"agreement {account.agreement.id} is closed"
        at = now if event.time is None else (event.time - _EPOCH) // _MILLISECOND
        if not event.type:
            return self._counter_of(account, event.meter, event.dimensions, key, at, closed=closed)
        if event.type in self._feeds:
            fed = self._fed(account, event, at, closed=closed)
            if isinstance(fed, tuple):
                return fed
            found.fed[index] = fed
            event.agreement = account.agreement.id
            return None
        found.special = True
        return self._special(account, event, at)

    def _special(self, account: Account, event: UsageEvent, at: int) -> Counter | Why | None:
        """Find the counter of an event of a special type; None where it has none."""
        if event.type not in (CLOSE_TYPE, VOID_TYPE):
            return self._reached(account, event, at)
        event.agreement = account.agreement.id
        if event.type == VOID_TYPE and not 0 < len(event.voids) <= ID_CHARS_MAX:
            return Reason.MALFORMED, "voids: the id of the event to take back"
        return None

    def _spelling(
        self, name: str, meter: str, dimensions: Mapping[str, str]
    ) -> tuple[str | None, ...]:
        """Make the key under which a counter is remembered, as `resolve` does in its loop."""
        return (name, meter, *map(dimensions.get, self._asked.get(meter, ())))

    def _addressed(self, event: UsageEvent) -> Account | Why:
        """Find the account that an event names."""
        name = event.agreement or event.escrow_id
        account = self._by_name.get(name)
        if event.type and event.type not in SPECIAL_TYPES and event.type not in self._feeds:
            detail = (
                f"no meter has the event_type {event.type[:80]!r}; give it to one, "
                "or leave the type out and name the meter"
            )
            return Reason.UNKNOWN_TYPE, detail
        if account is None:
            detail = f"no agreement for {name[:80]!r}; bind it: meterd bind ESCROW --plan PLAN"
            if not name:
                detail = "the event names no agreement and no escrow_id"
            return Reason.UNKNOWN_AGREEMENT, detail
        if event.agreement and event.escrow_id:
            other = self._by_name.get(event.escrow_id)
            if other is not account:
                return Reason.MISMATCH, "agreement and escrow_id name different agreements"
        return account

    def _reached(self, account: Account, event: UsageEvent, at: int) -> Counter | Why:
        """Find or make the counter of a milestone or an outcome."""
        plan = account.plan
        card = plan.card_at(at)
        dimensions = (("name", event.name),) if event.type == MILESTONE_TYPE else ()
        if card.match(event.type, dict(dimensions)) is None:
            if event.type not in card.meters:
                return Reason.UNKNOWN_TYPE, f"plan {plan.name} knows no {event.type}"
            known = ", ".join(plan.tranches)
            return Reason.UNKNOWN_METER, f"no tranche {event.name[:80]!r}; known: {known}"
        event.meter = event.type
        counter = account.counters.get((0, card.id, event.type, dimensions))
        if counter is None:
            counter = self._new_counter(account, 0, card, event.type, dimensions)
        return counter

    def _counter_of(
        self,
        account: Account,
        name: str,
        dimensions: Mapping[str, str],
        key: tuple[str | None, ...],
        at: int,
        *,
        closed: bool,
    ) -> Counter | Why:
        """Find or make the counter of a meter by its name and an event's dimensions."""
        plan = account.plan
        card = plan.card_at(at)
        if name not in self.meters or name not in card.meters:
            known = ", ".join(sorted(card.meters - OWN_METERS))
            return (
                Reason.UNKNOWN_METER,
                f"plan {plan.name} has no meter {name[:80]!r}; it has {known}",
            )
        # Only the values that are remembered are looked at, so that the verdict on an event does
        # not depend on whether another one with the same spelling came before it.
        if len(dimensions) > DIMENSIONS_MAX or any(
            name_flaw(dimensions.get(asked, ""), asked, NAME_CHARS_MAX)
            for asked in self._asked[name]
        ):
            return (
                Reason.MALFORMED,
                f"at most {DIMENSIONS_MAX} dimensions of {NAME_CHARS_MAX} printable characters",
            )
        if card.match(name, dimensions) is None:
            return Reason.NO_RATE, f"no rate of plan {plan.name} fits the dimensions"
        priced = card.priced(name, dimensions)
        period = plan.period_at(account.opened_at, at)
        counter = account.counters.get((period, card.id, name, priced))
        if counter is None:
            counter = self._new_counter(account, period, card, name, priced)
        # A spelling is remembered only where the time of an event decides nothing.
        if not plan.timed and not closed:
            if len(self._resolved) >= RESOLVED_MAX:
                self._resolved.clear()
            self._resolved[key] = counter
        return counter

    def _fed(
        self, account: Account, event: UsageEvent, at: int, *, closed: bool
    ) -> list[Fed] | Why:
        """Find the counters of all that a typed event says to meters of its agreement's plan.

        A meter that the plan does not price is not this agreement's. A sum that grows by nothing is
        left out, where something else is left: it needs no rate.
        """
        plan = account.plan
        card = plan.card_at(at)
        parts = self._feeds.parts(event)
        if isinstance(parts, tuple):
            return parts
        if event.meter:
            parts = [part for part in parts if part.meter == event.meter]
        priced = [part for part in parts if part.meter in self.meters and part.meter in card.meters]
        if not priced:
            detail = f"plan {plan.name} prices none of {', '.join(self._feeds.meters(event.type))}"
            return Reason.NO_RATE, detail
        fed: list[tuple[Part, int]] = []
        idle: list[tuple[Part, int]] = []
        for part in priced:
            try:
                quantity = self._meter(part.meter).measure_fed(part.quantity)
            except BadNumber as error:
                return Reason.BAD_QUANTITY, f"{part.meter}: {error}"
            adds = quantity or not self._meter(part.meter).additive
            (fed if adds else idle).append((part, quantity))
        found = []
        for part, quantity in fed or idle[:1]:
            dimensions = part.dimensions
            if part.otherwise is not None and card.match(part.meter, dict(dimensions)) is None:
                dimensions = part.otherwise
            key = self._spelling(account.agreement.id, part.meter, dimensions)
            counter = self._resolved.get(key) or self._counter_of(
                account, part.meter, dimensions, key, at, closed=closed
            )
            if isinstance(counter, tuple):
                reason, detail = counter
                return reason, f"{part.meter}: {detail}"
            found.append((counter, quantity, part.value))
        return found

    def _new_counter(
        self, account: Account, period: int, card: RateCard, name: str, dimensions: Dimensions
    ) -> Counter:
        meter = self._meter(name)
        samples = None if meter.additive else Samples(meter.aggregation)
        counter = Counter(
            account, period, card.id, meter, dimensions, self._counter_next, samples=samples
        )
        self._counter_next += 1
        self._by_number[counter.number] = counter
        self._price(counter, card)
        account.counters[period, card.id, name, dimensions] = counter
        return counter

    def decide(
        self,
        resolved: ResolvedBatch,
        digests: Sequence[bytes],
        prints: Sequence[int],
        known: Sequence[int],
        now: int = 0,
    ) -> Entry:
        """Tell new identities from duplicates and conflicts, and what is over a cap. Pure.

        For each resolved event: its identity's digest, its content's fingerprint, and the
        fingerprint under which the identity is known (-1: it is not). `now` in wall ms, for caps.
        """
        rejections = list(resolved.rejections)
        fresh: list[bool] | None = None
        duplicates = 0
        trial = Trial(resolved, now) if self._capped or resolved.limits else None
        if (
            trial is not None
            or resolved.special
            or resolved.refused
            or max(known, default=-1) >= 0
            or len(set(digests)) < len(digests)
        ):
            fresh, duplicates = _tell_verdicts(resolved, digests, prints, known, rejections, trial)
        counters: Iterable[Counter | None] = resolved.counters
        pairs = zip(resolved.counters, resolved.quantities, strict=True)
        if fresh is not None:
            counters = list(compress(resolved.counters, fresh))
            pairs = compress(pairs, fresh)  # type: ignore[assignment]
        sums: dict[Counter | None, int] = {}
        for counter, quantity in pairs:
            sums[counter] = sums.get(counter, 0) + quantity
        events = collections.Counter(counters)
        accepted = sum(events.values())
        closes: list[Account] = []
        voids: list[UsageEvent] = []
        if None in sums:
            del sums[None]
            closes, voids = self._without_counter(resolved, fresh)
        if resolved.special:  # An outcome is the last that its agreement has to say.
            scored = (c.account for c in events if c is not None and c.meter.name == OUTCOME_METER)
            closes += scored
        del events[None]
        entry = Entry(
            accepted,
            duplicates,
            rejections,
            fresh,
            sums,  # type: ignore[arg-type]  # None was taken out above.
            events,  # type: ignore[arg-type]
            closes,
            voids,
        )
        if resolved.amounts or resolved.keys:
            _add_extras(entry, resolved, fresh)
        if resolved.parts:
            _add_parts(entry, resolved, fresh)
        if trial is not None:
            entry.spent = trial.spent
        return entry

    def _without_counter(
        self, resolved: ResolvedBatch, fresh: list[bool] | None
    ) -> tuple[list[Account], list[UsageEvent]]:
        asking = zip(resolved.counters, resolved.events, strict=True)
        chosen = asking if fresh is None else compress(asking, fresh)
        events = [event for counter, event in chosen if counter is None]
        closes = [self.accounts[event.agreement] for event in events if event.type == CLOSE_TYPE]
        return closes, [event for event in events if event.type == VOID_TYPE]

    def apply(self, entry: Entry, wall: int) -> Touched:
        """Add a decided batch; cannot refuse."""
        touched = Touched()
        for counter, quantity in entry.quantities.items():
            if counter.samples is not None:
                quantity = self._sample(counter, entry.samples[counter], touched)  # noqa: PLW2901
            amount = entry.amounts.get(counter, 0)
            self._count(counter, quantity, amount, entry.events[counter], touched)
        for counter, events in entry.shared.items():
            _share(counter, events)
        self._charge_lines(touched)
        for account in touched.accounts:
            if not account.unsettled_since:
                account.unsettled_since = wall
            if account.bursts is not None:
                account.bursts.note(account.owed, wall)
        for (account, name), charge in entry.spent.items():
            windows = account.windows.setdefault(name, Windows())
            caps = account.plan.caps if name == PLAN else None
            windows.note(Fraction(charge, account.denominator), wall, caps or NO_CAPS)
        for account in entry.closes:
            closed = self.close(account, wall)
            touched.counters.update(closed.counters)
            touched.accounts.update(closed.accounts)
        return touched

    def take_back(
        self,
        counter: Counter,
        quantity: int,
        amount: int,
        key: str,
        touched: Touched,
        *,
        shared: bool = False,
    ) -> None:
        """Take one event back: the counters are as if it had never come. What was paid is credit.

        `quantity`, `amount` and the sample's `key` are those that were added for it; `shared`: it
        fed another counter before this one.
        """
        if counter.samples is not None:
            before = counter.samples.quantity
            sample = counter.samples.add(key, quantity, -1)
            touched.samples.append(SampleRow(counter.number, key, sample.quantity, sample.count))
            quantity = before - counter.samples.quantity
        self._count(counter, -quantity, -amount, -1, touched)
        if shared:
            _share(counter, -1)
        self._charge_lines(touched)

    def _count(
        self, counter: Counter, quantity: int, amount: int, events: int, touched: Touched
    ) -> None:
        """Add to one counter and, where its rate is linear, to what is owed."""
        account = counter.account
        counter.quantity += quantity
        counter.events += events
        account.events += events
        if counter.meter.name not in OWN_METERS:
            account.units += quantity
        touched.counters[counter] = None
        touched.accounts[account] = None
        if counter.line is not None:
            counter.amount += amount
            counter.line.quantity += quantity
            counter.line.amount += amount
            counter.line.events += events
            return
        charge = quantity * counter.weight
        if counter.dynamic:
            counter.amount += amount
            charge = amount * counter.weight
        account.numerator += charge
        if account.by_role is not None:
            account.by_role[counter.role] = account.by_role.get(counter.role, 0) + charge
        self._accrued[account.denominator] += charge

    def _charge_lines(self, touched: Touched) -> None:
        """Work out anew the lines whose charge is no sum, once for all that touched them."""
        lines = {counter.line: None for counter in touched.counters if counter.line is not None}
        for line in lines:
            charge = line.work_out()
            line.account.grow(line.card.rates[line.place].role, charge)
            self._accrued[line.account.denominator] += charge

    def _sample(self, counter: Counter, said: Sequence[tuple[str, int]], touched: Touched) -> int:
        """Take samples in; by how much what the meter shows has grown."""
        samples = counter.samples
        assert samples is not None
        before = samples.quantity
        changed = {key: samples.add(key, quantity) for key, quantity in said}
        touched.samples += [
            SampleRow(counter.number, sample.key, sample.quantity, sample.count)
            for sample in changed.values()
        ]
        return samples.quantity - before


def _share(counter: Counter, events: int) -> None:
    """Note that an agreement's events are counted at other counters of it already."""
    counter.shared += events
    counter.account.events -= events


def _escrows_flaw(account: Account, given: set[tuple[str, str]]) -> str:
    """Say why a bound agreement cannot be given these escrows; "" when it can."""
    agreement, known = account.agreement, set(account.agreement.escrows)
    roles = {escrow: role for role, escrow in known}
    if any(roles.get(escrow, role) != role for role, escrow in given):
        return f"agreement {agreement.id} has one of these escrows in another role"
    if not (given <= known or known <= given):
        return (
            f"agreement {agreement.id} is bound to {_listed(agreement)}; name these too, with the"
            " new escrow behind them, or bind it under another id"
        )
    if account.closing and not given <= known:
        return f"agreement {agreement.id} is closing; bind the new escrow under another id"
    return ""


def _tell_verdicts(
    resolved: ResolvedBatch,
    digests: Sequence[bytes],
    prints: Sequence[int],
    known: Sequence[int],
    rejections: list[Rejection],
    trial: Trial | None,
) -> tuple[list[bool], int]:
    """Tell of each event whether it is fresh, in their order; and how many are duplicates.

    Of an event that came before nothing but its content matters: it was taken when it was in order.
    """
    fresh: list[bool] = []
    duplicates = 0
    seen: dict[bytes, int] = {}
    reached: set[Counter] = set()
    for place, digest in enumerate(digests):
        before = known[place] if known[place] >= 0 else seen.get(digest, -1)
        why: Why | None = None
        if before < 0:
            why = resolved.refused.get(resolved.indices[place])
            why = why or _out_of_turn(resolved, place, reached)
            if why is None and trial is not None:
                why = trial.refusal(place)
                if why is not None:
                    reached.discard(resolved.counters[place])
        elif before != prints[place]:
            why = Reason.CONFLICT, "the same source and id came before with other content"
        else:
            duplicates += 1
        fresh.append(before < 0 and why is None)
        if fresh[-1]:
            seen[digest] = prints[place]
        elif why is not None:
            event_id = resolved.events[place].id
            rejections.append(Rejection(resolved.indices[place], event_id, *why))
    return fresh, duplicates


def _out_of_turn(resolved: ResolvedBatch, place: int, reached: set[Counter]) -> Why | None:
    """Say why a milestone or an outcome that is new comes at the wrong time; note that it came."""
    counter = resolved.counters[place]
    if counter is None or counter.meter.name not in ONCE:
        return None
    account = counter.account
    # On whatever card: a price that has changed makes no second tranche of the same name.
    before = {
        other.dimensions
        for other in account.counters.values()
        if other.meter.name == counter.meter.name and (other.events or other in reached)
    }
    if counter.dimensions in before:
        what = dict(counter.dimensions).get("name", "an outcome")
        return Reason.REACHED, f"agreement {account.agreement.id} had {what} before"
    earlier = account.plan.tranches if account.plan.ordered else ()
    for name in takewhile(lambda name: (("name", name),) != counter.dimensions, earlier):
        if (("name", name),) not in before:
            return Reason.OUT_OF_ORDER, f"{name} comes first; send this one again after it"
    reached.add(counter)
    return None


def _listed(agreement: Agreement) -> str:
    """The escrows of an agreement as a person writes them."""
    return ", ".join(f"{role} {escrow}" for role, escrow in agreement.escrows)


def _measured(meter: Meter, event: UsageEvent) -> int:
    """Read what an event says, in nanos, and write it in one spelling. Raises `BadNumber`."""
    if meter.name == OUTCOME_METER:
        nanos = score_nanos(event.score)
        event.score, event.quantity = format_quantity(nanos), 1
        return nanos
    quantity = meter.measure(event.quantity)
    event.quantity = _one_spelling(meter, quantity)
    return quantity


def _note_extras(
    found: ResolvedBatch, counter: Counter, event: UsageEvent, quantity: int, now: int
) -> Why | None:
    """Note an event's sample or its own price; why it cannot be taken, if so."""
    charged = _charge(counter, event, quantity, event.value, now)
    if isinstance(charged, tuple):
        return charged
    place = len(found.events)
    if counter.samples is not None:
        found.keys[place] = charged.key
    if counter.dynamic:
        found.amounts[place] = charged.amount
    return None


def _charged(fed: Sequence[Fed], event: UsageEvent, now: int) -> list[Charged] | Why:
    """Work out what a typed event adds to each of the counters that it feeds."""
    parts = []
    for counter, quantity, value in fed:
        charged = _charge(counter, event, quantity, value, now)
        if isinstance(charged, tuple):
            return charged
        parts.append(charged)
    return parts


def _charge(
    counter: Counter, event: UsageEvent, quantity: int, value: str, now: int
) -> Charged | Why:
    """Work out what an event adds to a counter beside its quantity: a sample, its own price."""
    meter, key, amount = counter.meter, "", 0
    if counter.samples is not None:
        if meter.aggregation is Aggregation.UNIQUE and not (
            0 < len(value) <= VALUE_CHARS_MAX and value.isprintable()
        ):
            return (
                Reason.MALFORMED,
                f"value: 1 to {VALUE_CHARS_MAX} printable characters to tell apart",
            )
        at = now if event.time is None else (event.time - _EPOCH) // _MILLISECOND
        key = meter.sample_key(quantity, value, at, event.id, event.source)
    if counter.dynamic or event.price:
        priced = _own_price(counter, event, quantity)
        if isinstance(priced, tuple):
            return priced
        amount = priced
    return Charged(counter, quantity, amount, key)


def _own_price(counter: Counter, event: UsageEvent, quantity: int) -> int | Why:
    """The amount of an event that brings its own price, which only some rates want."""
    if not counter.dynamic:
        detail = f"the plan has its own price for {counter.meter.name}; leave price out"
        return Reason.BAD_PRICE, detail
    try:
        picos = parse_price(str(event.price))
    except BadNumber as error:
        return Reason.BAD_PRICE, f"price: {error}"
    if picos > counter.price_max:
        return Reason.BAD_PRICE, f"price: the plan allows {format_price(counter.price_max)} at most"
    event.price = format_price(picos)
    return quantity * picos


def _add_extras(entry: Entry, resolved: ResolvedBatch, fresh: list[bool] | None) -> None:
    for place, amount in resolved.amounts.items():
        counter = resolved.counters[place]
        if counter is not None and (fresh is None or fresh[place]):
            entry.amounts[counter] = entry.amounts.get(counter, 0) + amount
    for place, key in resolved.keys.items():
        counter = resolved.counters[place]
        if counter is not None and (fresh is None or fresh[place]):
            said = entry.samples.setdefault(counter, [])
            said.append((key, resolved.quantities[place]))


def _add_parts(entry: Entry, resolved: ResolvedBatch, fresh: list[bool] | None) -> None:
    """Add what typed events say to each of their counters."""
    for place, parts in resolved.parts.items():
        if fresh is not None and not fresh[place]:
            continue
        for number, part in enumerate(parts):
            counter = part.counter
            if number:
                entry.shared[counter] = entry.shared.get(counter, 0) + 1
            entry.quantities[counter] = entry.quantities.get(counter, 0) + part.quantity
            entry.events[counter] = entry.events.get(counter, 0) + 1
            if counter.dynamic:
                entry.amounts[counter] = entry.amounts.get(counter, 0) + part.amount
            if counter.samples is not None:
                entry.samples.setdefault(counter, []).append((part.key, part.quantity))


def open_envelope(event: UsageEvent) -> Why | None:
    """Bring a CloudEvent to the form of a bare event, as far as its type goes; why not, if so."""
    why = unwrap(event) if event.specversion else None
    if why is None and event.type == USAGE_TYPE:
        why = open_usage(event)
    elif why is None and event.type in SPECIAL_TYPES:
        why = open_special(event)
    return why


def _bad_id(index: int, event_id: str) -> Rejection:
    if not event_id:
        return Rejection(index, "", Reason.NO_ID, "the event has no id")
    flaw = name_flaw(event_id, "the id", ID_CHARS_MAX)
    return Rejection(index, printable(event_id, 80), Reason.MALFORMED, flaw)


def _untimely(index: int, event: UsageEvent, *, early: bool) -> Rejection:
    assert event.time is not None
    when = event.time.isoformat()
    if early:
        return Rejection(
            index, event.id, Reason.EARLY, f"{when} is more than 5 minutes ahead: check the clock"
        )
    return Rejection(index, event.id, Reason.LATE, f"{when} is older than the dedupe window")


def _one_spelling(meter: Meter, quantity: int) -> int | str:
    """12, "12" and 12.0 are the same content."""
    if meter.aggregation in (Aggregation.COUNT, Aggregation.UNIQUE):
        return 1
    return quantity // NANOS if quantity % NANOS == 0 else format_quantity(quantity)


# Meterd's own meters: one milestone counts as one, an outcome as its score.
_OWN = {
    PERIOD_METER: Meter(PERIOD_METER, Aggregation.COUNT),
    MILESTONE_METER: Meter(MILESTONE_METER, Aggregation.COUNT),
    OUTCOME_METER: Meter(OUTCOME_METER, Aggregation.SUM),
}
_SUM = Aggregation.SUM  # One look-up less for each event.
_EPOCH = datetime.fromtimestamp(0, UTC)
_MILLISECOND = timedelta(milliseconds=1)
_canonical = msgspec.json.Encoder(order="sorted")


def contents(events: Sequence[UsageEvent]) -> list[bytes]:
    """Write resolved events in one spelling each, to be fingerprinted: same content, same bytes."""
    return _canonical.encode_lines(events).split(b"\n")[:-1]
