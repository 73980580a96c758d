"""The ledger: agreements, their counters, and what they owe. Decide is pure, apply cannot refuse.

A batch passes in three steps. `resolve` finds for each event its counter and the quantity to add,
or a reason why not. `decide` adds what only the memory of identities can know: duplicates and
conflicts. `apply` then adds the sums, once for each counter of the batch and not once for each
event, and hands out the rows to be made durable.

What an agreement owes is its rate cards' charge for its counters, and nothing else. It is kept as
an integer over the card's denominator and grows by the same integers by which the counters grow.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import compress

import msgspec

from meterd.core.changes import AgreementRow, CardRow, Change, CounterRow, State
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
)
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import MICROS, NANOS, QUANTITY_MAX, BadNumber, format_quantity
from meterd.core.plans import Plan
from meterd.core.pricing import Dimensions, RateCard
from meterd.core.settlement import Escrow, EscrowStatus
from meterd.core.thresholds import Standing

CLOSE_TYPE = "meterd.close"
AHEAD_MAX_MS = 5 * 60 * 1000  # Clocks of producers differ; a day ahead is a mistake.
HOUR_MS = 3_600_000
# Spellings of (agreement, meter, dimension values) that are remembered; then begun anew.
RESOLVED_MAX = 200_000


@dataclass(frozen=True, slots=True)
class Agreement:
    """A payer under a plan, with its escrows by role, as the configuration or the API has it."""

    id: str
    plan: str
    payer: str
    escrows: tuple[tuple[str, str], ...]
    origin: str = "api"


@dataclass(eq=False, slots=True)
class Counter:
    """Cumulative usage of one agreement by meter and priced dimensions. Hashed by identity."""

    account: Account
    card: str
    meter: Meter
    dimensions: Dimensions
    weight: int  # What one nano costs, in 1 / account.denominator USDC.
    quantity: int = 0
    events: int = 0

    @property
    def row(self) -> CounterRow:
        """The counter as it is to be stored."""
        account = self.account.agreement.id
        return CounterRow(
            account, self.card, self.meter.name, self.dimensions, self.quantity, self.events
        )


@dataclass(eq=False, slots=True)
class Account:
    """One agreement's side of the ledger."""

    agreement: Agreement
    plan: Plan
    opened_at: int
    denominator: int
    numerator: int = 0  # Accrued, in 1 / denominator USDC.
    events: int = 0
    units: int = 0
    unsettled_since: int = 0
    closing: bool = False
    counters: dict[tuple[str, str, Dimensions], Counter] = field(default_factory=dict)

    @property
    def accrued(self) -> Fraction:
        """Owed for usage so far, exact USDC."""
        return Fraction(self.numerator, self.denominator)

    @property
    def owed(self) -> int:
        """Accrued, floored to micros."""
        micros: int = self.numerator * MICROS // self.denominator
        return micros

    @property
    def standing(self) -> Standing:
        """What the thresholds look at."""
        return Standing(self.owed, self.units, self.unsettled_since)

    @property
    def escrow(self) -> str:
        """The escrow that usage is drawn from."""
        return self.agreement.escrows[0][1]

    @property
    def row(self) -> AgreementRow:
        """The account as it is to be stored."""
        return AgreementRow(
            id=self.agreement.id,
            plan=self.plan.name,
            payer=self.agreement.payer,
            origin=self.agreement.origin,
            escrows=self.agreement.escrows,
            closing=self.closing,
            opened_at=self.opened_at,
            accrued=self.accrued,
            events=self.events,
            units=self.units,
            unsettled_since=self.unsettled_since,
        )


@dataclass(slots=True)
class Resolved:
    """The events of a batch that may accrue, as parallel lists, and those that cannot.

    `quantities` in nanos; `buckets` are hours since the epoch. A counter of None marks a
    `meterd.close`.
    """

    rejections: list[Rejection] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    events: list[UsageEvent] = field(default_factory=list)
    counters: list[Counter | None] = field(default_factory=list)
    quantities: list[int] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Entry:
    """What a batch does: each delivery counts as one of accepted, duplicates, rejections.

    `fresh` says for each resolved event whether its identity is new; None: all of them are.
    """

    accepted: int
    duplicates: int
    rejections: list[Rejection]
    fresh: list[bool] | None
    quantities: dict[Counter, int]
    events: Mapping[Counter, int]
    closes: list[Account]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all agreements. `accrued` exact USDC, the rest in micros."""

    accrued: Fraction
    settled: int
    held: int
    credited: int


class Conflict(Exception):
    """An agreement cannot be bound as asked; the message says why and what to do."""


class Ledger:
    """All agreements of one daemon. It has one owner, the bookkeeper; no other may change it."""

    def __init__(self, plans: Mapping[str, Plan], meters: Mapping[str, Meter]) -> None:
        self.plans = dict(plans)
        self.meters = dict(meters)
        self.accounts: dict[str, Account] = {}
        self.escrows: dict[str, Escrow] = {}
        self._by_name: dict[str, Account] = {}  # Agreement ids and escrow ids.
        self._resolved: dict[tuple[str | None, ...], Counter] = {}
        self._asked: dict[str, tuple[str, ...]] = {}
        self._accrued: dict[int, int] = {}  # Numerators by denominator.
        self._stored_cards: set[str] = set()  # Those that a change has been made for.
        self._note_dimensions()

    # -- Reading back what was stored ---------------------------------------------------------

    @classmethod
    def restore(
        cls, plans: Mapping[str, Plan], meters: Mapping[str, Meter], state: State
    ) -> Ledger:
        """Rebuild the ledger. Raises `Conflict` when stored sums do not follow from counters."""
        ledger = cls(plans, meters)
        cards = {row.id: RateCard.from_text(row.text) for row in state.cards}
        ledger._stored_cards.update(cards)
        counted: dict[str, list[CounterRow]] = {}
        for row in state.counters:
            counted.setdefault(row.agreement, []).append(row)
        for escrow in state.escrows:
            ledger.escrows[escrow.id] = escrow
        for agreement in state.agreements:
            ledger._restore_account(agreement, counted.get(agreement.id, []), cards)
        return ledger

    def _restore_account(
        self, row: AgreementRow, counters: Sequence[CounterRow], cards: Mapping[str, RateCard]
    ) -> None:
        charge = sum((_worth(counter, cards) for counter in counters), Fraction(0))
        if charge != row.accrued:
            raise Conflict(
                f"agreement {row.id}: its counters are worth {charge} USDC, {row.accrued} is stored"
            )
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
        account = self._enter(agreement, plan, row.opened_at, row.accrued)
        account.events, account.units = row.events, row.units
        account.unsettled_since, account.closing = row.unsettled_since, row.closing
        for stored in counters:
            meter = self.meters.get(stored.meter) or Meter(stored.meter)
            weight = 0
            if stored.card == plan.card.id:
                place = plan.card.match(stored.meter, dict(stored.dimensions))
                assert place is not None, "its charge has been worked out above"
                weight = plan.card.weights[place] * (account.denominator // plan.card.denominator)
            account.counters[stored.card, stored.meter, stored.dimensions] = Counter(
                account,
                stored.card,
                meter,
                stored.dimensions,
                weight,
                stored.quantity,
                stored.events,
            )

    # -- Agreements ---------------------------------------------------------------------------

    def bind(self, agreement: Agreement, wall: int) -> Change:
        """Enter an agreement, or give a known one another plan or payer. Raises `Conflict`.

        Binding again what is bound as asked changes nothing. Escrows of a known agreement stay what
        they are.
        """
        objection = self.objection(agreement, self.plans)
        if objection:
            raise Conflict(objection)
        plan = self.plans[agreement.plan]
        account = self.accounts.get(agreement.id)
        if account is None:
            account = self._enter(agreement, plan, wall, Fraction(0))
            fresh = [Escrow(escrow, agreement.id, role) for role, escrow in agreement.escrows]
            self.escrows.update({escrow.id: escrow for escrow in fresh})
            return Change(
                cards=self._new_cards(plan),
                agreements=(account.row,),
                escrows=tuple(fresh),
            )
        if account.agreement == agreement and account.plan == plan:
            return Change(cards=self._new_cards(plan))
        account.agreement = agreement
        self._move_to(account, plan)
        return Change(cards=self._new_cards(plan), agreements=(account.row,))

    def objection(self, agreement: Agreement, plans: Mapping[str, Plan]) -> str:
        """Say why an agreement cannot be bound under these plans; "" when it can."""
        if agreement.plan not in plans:
            known = ", ".join(sorted(plans)) or "none"
            return f"there is no plan {agreement.plan!r}; known: {known}"
        for name in (agreement.id, *(escrow for _, escrow in agreement.escrows)):
            other = self._by_name.get(name)
            if other is not None and other.agreement.id != agreement.id:
                return f"{name} belongs to agreement {other.agreement.id} already"
        account = self.accounts.get(agreement.id)
        if account is not None and account.agreement.escrows != agreement.escrows:
            return (
                f"agreement {agreement.id} is bound to {dict(account.agreement.escrows)}; "
                "close it and bind the new escrow under another id"
            )
        return ""

    def _new_cards(self, *plans: Plan) -> tuple[CardRow, ...]:
        """Rows for the cards that no change has held yet.

        A price that was changed while the daemon was down is on a card that the store does not
        know, and a counter must never be stored before its card.
        """
        cards = {plan.card.id: plan.card for plan in plans}
        new = [card for name, card in cards.items() if name not in self._stored_cards]
        self._stored_cards.update(cards)
        return tuple(CardRow(card.id, card.text) for card in new)

    def _enter(
        self, agreement: Agreement, plan: Plan, opened_at: int, accrued: Fraction
    ) -> Account:
        denominator = math.lcm(plan.card.denominator, accrued.denominator)
        numerator = accrued.numerator * (denominator // accrued.denominator)
        account = Account(agreement, plan, opened_at, denominator, numerator)
        self._accrued[denominator] = self._accrued.get(denominator, 0) + numerator
        self.accounts[agreement.id] = account
        for name in (agreement.id, *(escrow for _, escrow in agreement.escrows)):
            self._by_name[name] = account
        return account

    def _move_to(self, account: Account, plan: Plan) -> None:
        """Price further usage by another card. What was accrued stays what it is."""
        accrued = account.accrued
        self._accrued[account.denominator] -= account.numerator
        account.plan = plan
        account.denominator = math.lcm(plan.card.denominator, accrued.denominator)
        account.numerator = accrued.numerator * (account.denominator // accrued.denominator)
        self._accrued[account.denominator] = (
            self._accrued.get(account.denominator, 0) + account.numerator
        )
        for counter in account.counters.values():
            if counter.card == plan.card.id:
                place = plan.card.match(counter.meter.name, dict(counter.dimensions))
                assert place is not None
                factor = account.denominator // plan.card.denominator
                counter.weight = plan.card.weights[place] * factor
        self._resolved.clear()

    def reload(self, plans: Mapping[str, Plan], meters: Mapping[str, Meter]) -> Change:
        """Take changed plans and meters.

        Raises `Conflict`, having changed nothing, when a plan in use is gone.
        """
        gone = sorted({account.plan.name for account in self.accounts.values()} - set(plans))
        if gone:
            raise Conflict(f"plans in use are missing: {', '.join(gone)}; put them back")
        self.plans, self.meters = dict(plans), dict(meters)
        self._note_dimensions()
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

    def close(self, account: Account) -> AgreementRow:
        """Mark an agreement as closing: usage is still taken until its escrow is closed."""
        account.closing = True
        return account.row

    def settled_from(self, account: Account, wall: int) -> AgreementRow | None:
        """Begin the interval anew behind a release; None when nothing of the row changed."""
        escrow = self.escrows[account.escrow]
        since = wall if escrow.unsettled(account.owed) > 0 else 0
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
        return before

    def account(self, name: str) -> Account | None:
        """Find an account by its agreement's id or by the id of one of its escrows."""
        return self._by_name.get(name)

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

    def _note_dimensions(self) -> None:
        """Note the dimensions that a meter's price depends on in any plan: a spelling has them."""
        asked: dict[str, set[str]] = {}
        for plan in self.plans.values():
            for rate in plan.card.rates:
                asked.setdefault(rate.meter, set()).update(name for name, _ in rate.where)
        self._asked = {meter: tuple(sorted(names)) for meter, names in asked.items()}

    # -- A batch ------------------------------------------------------------------------------

    # One pass over the batch: a call for each of its steps would cost more than the steps do.
    def resolve(  # noqa: C901, PLR0912, PLR0915
        self,
        decoded: Sequence[Decoded],
        ids: Sequence[str] | None,
        source: str,
        oldest: int,
        now: int,
    ) -> Resolved:
        """Find each event's counter and quantity. Pure but for its memory of spellings.

        `source` stands in for events that name none, `ids` for those without an id. Times in wall
        ms: events from before `oldest` are late, those more than five minutes ahead of `now` early.
        The events are brought to one spelling (agreement, source, quantity), so that their content
        can be compared.
        """
        found = Resolved()
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
                counter_or_not = self._counter(event, key)
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
                if not oldest_s <= seconds <= newest_s:
                    rejections.append(_untimely(index, event, early=seconds > newest_s))
                    continue
                bucket = int(seconds) // 3600
            # 4. The quantity.
            if counter is None:
                quantity = event.quantity = 0
            else:
                number, meter = event.quantity, counter.meter
                if type(number) is int and 0 < number <= QUANTITY_MAX and meter.aggregation is _SUM:
                    quantity = number * NANOS
                else:
                    try:
                        quantity = meter.measure(number)
                    except BadNumber as error:
                        rejections.append(
                            Rejection(index, event_id, Reason.BAD_QUANTITY, f"quantity: {error}")
                        )
                        continue
                    event.quantity = _one_spelling(meter, quantity)
                event.agreement = counter.account.agreement.id
            event.escrow_id = ""
            take_index(index)
            take_event(event)
            take_counter(counter)
            take_quantity(quantity)
            take_bucket(bucket)
        return found

    def _counter(
        self, event: UsageEvent, key: tuple[str | None, ...]
    ) -> Counter | tuple[Reason, str] | None:
        """Find or make the counter of an event, the slow way; None for a `meterd.close`."""
        name = event.agreement or event.escrow_id
        account = self._by_name.get(name)
        if event.type and event.type != CLOSE_TYPE:
            detail = f"type {event.type[:80]!r} is not known; leave it out for usage"
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
        if self.escrows[account.escrow].status is EscrowStatus.CLOSED:
            return Reason.CLOSED, f"agreement {account.agreement.id} is closed"
        if event.type:
            event.agreement = account.agreement.id
            return None
        return self._counter_of(account, event, key)

    def _counter_of(
        self, account: Account, event: UsageEvent, key: tuple[str | None, ...]
    ) -> Counter | tuple[Reason, str]:
        card = account.plan.card
        meter = self.meters.get(event.meter)
        if meter is None or event.meter not in card.meters:
            known = ", ".join(sorted(card.meters))
            return (
                Reason.UNKNOWN_METER,
                f"plan {account.plan.name} has no meter {event.meter[:80]!r}; it has {known}",
            )
        # Only the values that are remembered are looked at, so that the verdict on an event does
        # not depend on whether another one with the same spelling came before it.
        if len(event.dimensions) > DIMENSIONS_MAX or any(
            name_flaw(event.dimensions.get(name, ""), "a dimension", NAME_CHARS_MAX)
            for name in self._asked.get(event.meter, ())
        ):
            return (
                Reason.MALFORMED,
                f"at most {DIMENSIONS_MAX} dimensions of {NAME_CHARS_MAX} printable characters",
            )
        place = card.match(event.meter, event.dimensions)
        if place is None:
            return Reason.NO_RATE, f"no rate of plan {account.plan.name} fits the dimensions"
        dimensions = card.priced(event.meter, event.dimensions)
        counter = account.counters.get((card.id, event.meter, dimensions))
        if counter is None:
            weight = card.weights[place] * (account.denominator // card.denominator)
            counter = Counter(account, card.id, meter, dimensions, weight)
            account.counters[card.id, event.meter, dimensions] = counter
        if len(self._resolved) >= RESOLVED_MAX:
            self._resolved.clear()
        self._resolved[key] = counter
        return counter

    def decide(
        self,
        resolved: Resolved,
        digests: Sequence[bytes],
        prints: Sequence[int],
        known: Sequence[int],
    ) -> Entry:
        """Tell new identities from duplicates and conflicts. Pure.

        For each resolved event: its identity's digest, its content's fingerprint, and the
        fingerprint under which the identity is known (-1: it is not).
        """
        rejections = list(resolved.rejections)
        fresh: list[bool] | None = None
        duplicates = 0
        if max(known, default=-1) >= 0 or len(set(digests)) < len(digests):
            fresh = []
            seen: dict[bytes, int] = {}
            for place, digest in enumerate(digests):
                before = known[place] if known[place] >= 0 else seen.get(digest, -1)
                fresh.append(before < 0)
                if before < 0:
                    seen[digest] = prints[place]
                elif before == prints[place]:
                    duplicates += 1
                else:
                    event = resolved.events[place]
                    detail = "the same source and id came before with other content"
                    rejections.append(
                        Rejection(resolved.indices[place], event.id, Reason.CONFLICT, detail)
                    )
        counters: Iterable[Counter | None] = resolved.counters
        pairs = zip(resolved.counters, resolved.quantities, strict=True)
        if fresh is not None:
            counters = list(compress(resolved.counters, fresh))
            pairs = compress(pairs, fresh)  # type: ignore[assignment]
        sums: dict[Counter | None, int] = {}
        for counter, quantity in pairs:
            sums[counter] = sums.get(counter, 0) + quantity
        events = collections.Counter(counters)
        closes: list[Account] = []
        if None in sums:
            del sums[None]
            closes = self._closes(resolved, fresh)
        accepted = sum(events.values())
        del events[None]
        return Entry(
            accepted,
            duplicates,
            rejections,
            fresh,
            sums,  # type: ignore[arg-type]  # None was taken out above.
            events,  # type: ignore[arg-type]
            closes,
        )

    def _closes(self, resolved: Resolved, fresh: list[bool] | None) -> list[Account]:
        asking = zip(resolved.counters, resolved.events, strict=True)
        chosen = asking if fresh is None else compress(asking, fresh)
        return [self.accounts[event.agreement] for counter, event in chosen if counter is None]

    def apply(self, entry: Entry, wall: int) -> tuple[list[CounterRow], list[Account]]:
        """Add a decided batch. Hands out the changed counters and accounts; cannot refuse."""
        touched: dict[Account, int] = {}
        rows: list[CounterRow] = []
        for counter, quantity in entry.quantities.items():
            account = counter.account
            events = entry.events[counter]
            counter.quantity += quantity
            counter.events += events
            charge = quantity * counter.weight
            account.numerator += charge
            account.events += events
            account.units += quantity
            touched[account] = touched.get(account, 0) + charge
            rows.append(counter.row)
        for account, charge in touched.items():
            self._accrued[account.denominator] += charge
            if not account.unsettled_since:
                account.unsettled_since = wall
        for account in entry.closes:
            account.closing = True
            touched.setdefault(account, 0)
        return rows, list(touched)


def _worth(counter: CounterRow, cards: Mapping[str, RateCard]) -> Fraction:
    """Price one stored counter by its own card. Raises `Conflict` when that cannot be done."""
    card = cards.get(counter.card)
    if card is None or card.match(counter.meter, dict(counter.dimensions)) is None:
        raise Conflict(
            f"agreement {counter.agreement}: no stored rate prices its counter of {counter.meter!r}"
        )
    return card.charge({(counter.meter, counter.dimensions): counter.quantity})


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
    if meter.aggregation is Aggregation.COUNT:
        return 1
    return quantity // NANOS if quantity % NANOS == 0 else format_quantity(quantity)


_SUM = Aggregation.SUM  # One look-up less for each event.
_EPOCH = datetime.fromtimestamp(0, UTC)
_canonical = msgspec.json.Encoder(order="sorted")


def contents(events: Sequence[UsageEvent]) -> list[bytes]:
    """Write resolved events in one spelling each, to be fingerprinted: same content, same bytes."""
    return _canonical.encode_lines(events).split(b"\n")[:-1]
