"""What the ledger makes of each delivery: its verdict in words, its hour, and its one spelling."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from meterd.core.accounts import Agreement
from meterd.core.events import EventDecoder, Reason, Rejection, UsageEvent
from meterd.core.ledger import AHEAD_MAX_MS, HOUR_MS, Ledger, contents
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import NANOS, PICOS
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import MILESTONE_METER, OUTCOME_METER, Model, Rate, RateCard, Tier
from tests.unit.core.books import NOW, SENTINEL, WINDOW, Till, ledger, usage

METERS = {
    meter.name: meter
    for meter in (
        Meter("tokens"),
        Meter("calls", Aggregation.COUNT),
        Meter("seats", Aggregation.LATEST),
        Meter("users", Aggregation.UNIQUE),
        Meter("peak", Aggregation.MAX),
    )
}
EVERY = Plan(
    "every",
    Pattern.STREAMING,
    RateCard(
        (
            *(Rate(name, PICOS) for name in METERS if name != "tokens"),
            Rate("tokens", PICOS, 1, (("kind", "plain"),)),
            Rate("tokens", PICOS, 1, (("kind", "priced"),), Model.DYNAMIC),
            *(
                Rate(MILESTONE_METER, PICOS, where=(("name", name),))
                for name in ("design", "build")
            ),
            Rate(OUTCOME_METER, 0, model=Model.VOLUME, tiers=(Tier(None, PICOS),)),
        )
    ),
)


def every():
    """An agreement under a plan with rates of all kinds."""
    books = Ledger({"every": EVERY}, METERS)
    books.bind(Agreement("a", "every", "payer", (("main", "esc_a"),)), NOW)
    return Till(books)


def resolved(till, payloads, *, now=NOW, ids=None):
    """A batch as it is resolved."""
    decoded = EventDecoder(SENTINEL).decode(payloads)
    return till.books.resolve(decoded, ids, "s", now - WINDOW, now)


def iso(at):
    """A time as an event has it, to the microsecond."""
    return (datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=at)).isoformat()


# -- Refusals -------------------------------------------------------------------------------------

LONG = "x" * 90
GIVE_IT = "give it to one, or leave the type out and name the meter"
REFUSED = [
    (b"{", "", Reason.MALFORMED, "no JSON: it breaks off before its end"),
    (usage("x", type="?" * 90), "x", Reason.UNKNOWN_TYPE,
     f"no meter has the event_type {'?' * 80!r}; {GIVE_IT}"),
    (usage("x", agreement=LONG), "x", Reason.UNKNOWN_AGREEMENT,
     f"no agreement for {LONG[:80]!r}; bind it: meterd bind ESCROW --plan PLAN"),
    (usage("x", agreement=""), "x", Reason.UNKNOWN_AGREEMENT,
     "the event names no agreement and no escrow_id"),
    (usage("x", escrow_id="esc_x"), "x", Reason.MISMATCH,
     "agreement and escrow_id name different agreements"),
    (usage("x", type="meterd.void", voids=""), "x", Reason.MALFORMED,
     "voids: the id of the event to take back"),
    (usage("x", type="meterd.void", voids="v" * 257), "x", Reason.MALFORMED,
     "voids: the id of the event to take back"),
    (usage("x", type=MILESTONE_METER, name=LONG), "x", Reason.UNKNOWN_METER,
     f"no tranche {LONG[:80]!r}; known: design, build"),
    (usage("x", meter=LONG), "x", Reason.UNKNOWN_METER,
     f"plan every has no meter {LONG[:80]!r}; it has calls, peak, seats, tokens, users"),
    (usage("x", dimensions={"kind": "other"}), "x", Reason.NO_RATE,
     "no rate of plan every fits the dimensions"),
    (usage("x", dimensions={"kind": "a\nb"}), "x", Reason.MALFORMED,
     "at most 32 dimensions of 128 printable characters"),
    (usage("x", dimensions={"kind": "k" * 129}), "x", Reason.MALFORMED,
     "at most 32 dimensions of 128 printable characters"),
    (usage("x", dimensions={f"d{n}": "" for n in range(33)}), "x", Reason.MALFORMED,
     "at most 32 dimensions of 128 printable characters"),
    (usage("", meter="calls"), "", Reason.NO_ID, "the event has no id"),
    (usage("i" * 257, meter="calls"), "i" * 80, Reason.MALFORMED,
     "the id has 257 characters; 256 are allowed"),
    (usage("a\nb", meter="calls"), "a\\nb", Reason.MALFORMED, "the id has control characters"),
    (usage("x", meter="calls", source="s" * 257), "x", Reason.MALFORMED,
     "the source has 257 characters; 256 are allowed"),
    (usage("x", meter="calls", time=iso(NOW - WINDOW - 1)), "x", Reason.LATE,
     f"{iso(NOW - WINDOW - 1)} is older than the dedupe window"),
    (usage("x", meter="calls", time=iso(NOW + AHEAD_MAX_MS + 1)), "x", Reason.EARLY,
     f"{iso(NOW + AHEAD_MAX_MS + 1)} is more than 5 minutes ahead: check the clock"),
    (usage("x", 0, meter="peak"), "x", Reason.BAD_QUANTITY,
     "quantity: a quantity must be greater than 0 and at most 1e15"),
    (usage("x", 0, dimensions={"kind": "plain"}), "x", Reason.BAD_QUANTITY,
     "quantity: a quantity must be greater than 0 and at most 1e15"),
    (usage("x", meter="users", value=""), "x", Reason.MALFORMED,
     "value: 1 to 256 printable characters to tell apart"),
    (usage("x", meter="users", value="v" * 257), "x", Reason.MALFORMED,
     "value: 1 to 256 printable characters to tell apart"),
    (usage("x", meter="calls", price=1), "x", Reason.BAD_PRICE,
     "the plan has its own price for calls; leave price out"),
    (usage("x", price=2, dimensions={"kind": "priced"}), "x", Reason.BAD_PRICE,
     "price: the plan allows 1 at most"),
]  # fmt: skip


@pytest.mark.parametrize(("payload", "event_id", "reason", "detail"), REFUSED)
def test_delivery_is_refused_in_these_words_and_its_batch_goes_on(
    payload, event_id, reason, detail
):
    """They are seen in dead letters and answers; what stands around it is counted."""
    till = every()
    good = [usage(name, dimensions={"kind": "plain"}) for name in ("before", "behind")]
    for turn in range(2):
        till.take([good[0], payload, good[1]])

        assert [Rejection(1, event_id, reason, detail)] == till.rejections[turn:]
        assert 2 == till.books.accounts["a"].events
    assert (2, 2) == (till.accepted, till.duplicates)


def test_delivery_that_comes_too_late_for_its_state_is_refused_in_these_words():
    """The one content that came first stays, and what is reached is reached once."""
    till = every()
    tranche = {"type": MILESTONE_METER, "name": "design"}
    till.take([usage("x", meter="calls"), usage("t", **tranche), usage("o", type=OUTCOME_METER,
                                                                        score=1)])  # fmt: skip
    till.take([usage("x", meter="peak"), usage("u", **tranche), usage("p", type=OUTCOME_METER,
                                                                       score=1)])  # fmt: skip

    assert [
        Rejection(0, "x", Reason.CONFLICT, "the same source and id came before with other content"),
        Rejection(1, "u", Reason.REACHED, "agreement a had design before"),
        Rejection(2, "p", Reason.REACHED, "agreement a had an outcome before"),
    ] == till.rejections


@pytest.mark.parametrize(
    "payload",
    [
        usage("i" * 256, dimensions={"kind": "plain"}),
        usage("x", dimensions={"kind": "plain", **{f"d{n}": "" for n in range(31)}}),
        usage("x", meter="users", value="v"),
        usage("x", meter="users", value="v" * 256),
        usage("x", type="meterd.void", voids="v"),
        usage("x", type="meterd.void", voids="v" * 256),
        usage("x", meter="calls", time=iso(NOW - WINDOW)),
        usage("x", meter="calls", time=iso(NOW + AHEAD_MAX_MS)),
        usage("x", "", type=MILESTONE_METER, name="design"),
    ],
)
def test_delivery_at_its_limit_is_taken(payload):
    """Lengths and times to the last one that is allowed; a tranche needs no quantity."""
    assert [""] == every().verdicts([payload])


@pytest.mark.parametrize(("late", "taken"), [(0, True), (1, False)])
@pytest.mark.parametrize("ahead", [False, True])
def test_limits_of_time_hold_to_the_millisecond_in_another_hour_too(late, taken, ahead):
    """Two minutes before the full hour, the fifth minute ahead is in the next one."""
    now = (NOW // HOUR_MS + 1) * HOUR_MS - 120_000
    at = now + AHEAD_MAX_MS + late if ahead else now - WINDOW - late
    till = every()
    till.take([usage("x", meter="calls", time=iso(at))], now=now)

    assert taken is (till.accepted == 1)
    said = [Reason.EARLY if ahead else Reason.LATE] * late
    assert said == [rejection.reason for rejection in till.rejections]


# -- What is resolved -----------------------------------------------------------------------------


def test_event_lies_in_the_hour_of_its_own_time():
    """Without one, in the hour of its arrival; the identity is remembered by it."""
    hour = NOW // HOUR_MS
    now = (hour + 1) * HOUR_MS - 120_000
    moments = [
        (None, hour),
        ((hour + 1) * HOUR_MS - 1, hour),
        ((hour + 1) * HOUR_MS, hour + 1),
        (hour * HOUR_MS, hour),
        (hour * HOUR_MS - 1, hour - 1),
        ((hour - 70) * HOUR_MS, hour - 70),
        ((hour - 70) * HOUR_MS - 1, hour - 71),
    ]
    payloads = [
        usage(str(place), meter="calls", **({} if at is None else {"time": iso(at)}))
        for place, (at, _) in enumerate(moments)
    ]

    found = resolved(every(), payloads, now=now)

    assert [bucket for _, bucket in moments] == found.buckets
    assert {int} == set(map(type, found.buckets))


@pytest.mark.parametrize("number", [0, 7, "7"])
def test_event_with_a_number_is_taken_however_old_it_is(number):
    """Its number decides whether it came before; it is remembered from its arrival on."""
    long_ago, soon = iso(NOW - WINDOW - 1), iso(NOW + AHEAD_MAX_MS + 1)
    payloads = [
        usage("v", meter="calls"),
        usage("w", meter="calls", time=long_ago),
        usage("x", meter="calls", time=long_ago, sequence=number),
        usage("y", meter="calls", time=soon, sequence=number),
        usage("z", meter="calls", time=iso(NOW - WINDOW), sequence=number),
    ]

    found = resolved(every(), payloads)

    assert ["v", "x", "z"] == [event.id for event in found.events]
    assert {2} == found.late
    assert [NOW // HOUR_MS] * 2 + [(NOW - WINDOW) // HOUR_MS] == found.buckets
    assert [Reason.LATE, Reason.EARLY] == [rejection.reason for rejection in found.rejections]


CLOSE, VOID, TRANCHE, SCORE = "meterd.close", "meterd.void", MILESTONE_METER, OUTCOME_METER
SPELLINGS = [
    (usage("x", "5.0", meter="peak"), b'"quantity":5'),
    (usage("x", "2.5", meter="peak"), b'"quantity":"2.5"'),
    (usage("x", 7, meter="calls"), b'"quantity":1'),
    (usage("x", 7, meter="users", value="ada"), b'"quantity":1,"source":"s","value":"ada"'),
    (usage("x", 7, type=CLOSE), b'"quantity":0,"source":"s","type":"meterd.close"'),
    (usage("x", 7, type=VOID, voids="v"),
     b'"quantity":0,"source":"s","type":"meterd.void","voids":"v"'),
    (usage("x", 7, type=TRANCHE, name="design", meter=""),
     b'"meter":"meterd.milestone","name":"design","quantity":1'),
    (usage("x", 7, type=SCORE, score="0.50", meter=""),
     b'"quantity":1,"score":"0.5","source":"s","type":"meterd.outcome"'),
    (usage("x", 7, price="0.50", dimensions={"kind": "priced"}), b'"price":"0.5","quantity":7'),
]  # fmt: skip


@pytest.mark.parametrize(("payload", "part"), SPELLINGS)
@pytest.mark.parametrize("name", ["agreement", "escrow_id", "both"])
def test_content_has_one_spelling_for_good(payload, part, name):
    """Fingerprints of it are stored: the next version must find the same, to the byte."""
    names = {"agreement": b'"a"', "escrow_id": b'"a"', "both": b'"a"'}
    written = {
        "agreement": payload,
        "escrow_id": payload.replace(b'"agreement": "a"', b'"escrow_id": "esc_a"'),
        "both": payload.replace(b'"agreement": "a"', b'"agreement": "a", "escrow_id": "esc_a"'),
    }
    (content,) = contents(resolved(every(), [written[name]]).events)

    assert part in content
    assert content.startswith(b'{"agreement":' + names[name])
    assert b"escrow_id" not in content
    assert b"null" not in content


def test_sample_is_named_by_what_its_meter_looks_at():
    """Of the latest, by the event's own time, its id and its source."""
    payloads = [
        usage("x", 5, meter="seats", time=iso(NOW - 7)),
        usage("y", 5, meter="seats", source="t"),
        usage("z", 5, meter="peak"),
        usage("w", meter="users", value="ada"),
    ]

    assert {
        0: f"{NOW - 7:016d} x\ns",
        1: f"{NOW:016d} y\nt",
        2: f"{5 * NANOS}",
        3: "ada",
    } == resolved(every(), payloads).keys


def test_own_id_goes_before_that_of_the_transport():
    """Which stands in only where the event has none."""
    found = resolved(every(), [usage("", meter="calls"), usage("own", meter="calls")],
                     ids=["t-1", "t-2"])  # fmt: skip

    assert ["t-1", "own"] == [event.id for event in found.events]


def test_one_spelling_under_two_agreements_is_counted_for_each():
    """What is remembered of one says nothing of the other."""
    books = ledger()
    books.bind(Agreement("c", "stream", "payer", (("main", "esc_c"),)), NOW)
    till = Till(books)
    for turn in range(2):
        till.take([usage(f"{turn}{name}", agreement=name) for name in "ac"])
        till.take([usage(f"{turn}{name}e", agreement="", escrow_id=f"esc_{name}") for name in "ac"])

    assert [4, 4] == [books.accounts[name].events for name in "ac"]


def test_spelling_that_came_before_is_not_looked_up_again():
    """Of nearly all events the counter is known; a reading of the escrow makes none forgotten."""
    till = Till()
    till.take([usage("1"), usage("2", dimensions={"kind": "output"})])
    till.books.put(till.books.escrows["esc_a"])
    till.books._counter = None

    assert ["", ""] == till.verdicts([usage("3"), usage("4", dimensions={"kind": "output"})])


def test_special_event_is_told_however_its_batch_goes_on():
    """A first usage behind it, in a spelling that nobody knows, makes it no usual batch."""
    till = every()
    closed = resolved(till, [usage("x", type=CLOSE), usage("y", meter="calls")])
    usual = resolved(till, [usage("y", meter="calls"), usage("z", meter="peak")])

    assert (True, False) == (closed.special, usual.special)
    till.take([usage("x", type=SCORE, score=1), usage("y", meter="seats")])
    assert till.books.accounts["a"].closing


def test_void_is_handed_on_and_touches_no_counter():
    """What it takes back is looked for by the bookkeeper; a close beside it is no void."""
    till = every()
    entry = till.take([usage("v", type=VOID, voids="x"), usage("c", type=CLOSE)])

    assert ["v"] == [event.id for event in entry.voids]
    assert ([till.books.accounts["a"]], {}, 2) == (entry.closes, entry.quantities, entry.accepted)
    assert [] == till.take([usage("y", meter="calls")]).voids


# -- What is decided ------------------------------------------------------------------------------


def decided(known, prints, digests=(b"x", b"y")):
    """Two events of these fingerprints, of which these are known."""
    books = ledger()
    events = [UsageEvent(id=name, agreement="a", meter="calls", quantity=1) for name in "xy"]
    found = books.resolve(events, None, "s", 0, NOW)
    return books.decide(found, digests, prints, known)


def test_fingerprint_of_0_is_known_like_any_other():
    """It is a number of 32 bits, and no sign of absence."""
    known = decided([0, -1], [0, 0])
    twice = decided([-1, -1], [0, 0], [b"x", b"x"])
    other = decided([0, -1], [1, 1])

    assert (1, 1, [False, True]) == (known.accepted, known.duplicates, known.fresh)
    assert (1, 1, [True, False]) == (twice.accepted, twice.duplicates, twice.fresh)
    assert [Reason.CONFLICT] == [rejection.reason for rejection in other.rejections]


@pytest.mark.parametrize("part", ["quantities", "events"])
def test_batch_whose_lists_are_not_of_one_length_is_a_mistake(part):
    """Whatever is shorter would leave usage uncounted."""
    till = every()
    found = resolved(till, [usage("x", meter="calls"), usage("y", type=CLOSE)])
    getattr(found, part).pop()

    with pytest.raises((ValueError, IndexError)):
        till.books.decide(found, [b"x", b"y"], [1, 2], [-1, -1])


def test_batch_of_new_identities_is_taken_as_a_whole():
    """Nothing is asked of each of them; nor of none."""
    assert decided([-1, -1], [5, 6]).fresh is None
    assert Till().take([]).fresh is None


def test_event_that_comes_twice_in_one_batch_leaves_one_sample_and_one_amount():
    """The second one adds nothing."""
    till = every()
    seats, priced = (
        usage("x", 5, meter="seats"),
        usage("y", 2, price=1, dimensions={"kind": "priced"}),
    )
    till.take([seats, seats, priced, priced])

    assert [1] == [row.count for row in till.samples.values()]
    assert 5 + 2 == till.books.accounts["a"].accrued


def test_taken_back_sample_is_stored_as_it_is_afterwards():
    """Two events said the same; one of them goes."""
    till = every()
    till.take([usage("x", 5, meter="peak"), usage("y", 5, meter="peak")])
    (row,) = till.take_back("y").samples

    assert (f"{5 * NANOS}", 5 * NANOS, 1) == (row.key, row.quantity, row.count)
    (row,) = till.take_back("x").samples
    assert (5 * NANOS, 0) == (row.quantity, row.count)


def test_amount_is_of_the_counter_whose_events_brought_their_price():
    """Another one in the same batch, in tiers, has none."""
    tiers = Rate("tokens", 0, 1, (("kind", "tiers"),), Model.GRADUATED, (Tier(None, PICOS),))
    plan = Plan("p", Pattern.STREAMING, RateCard((*EVERY.card.rates, tiers)))
    books = Ledger({"p": plan}, METERS)
    books.bind(Agreement("a", "p", "payer", (("main", "esc_a"),)), NOW)
    till = Till(books)
    till.take([usage("x", 2, price=1, dimensions={"kind": "priced"}),
               usage("y", 2, dimensions={"kind": "tiers"})])  # fmt: skip

    assert [2 * NANOS * PICOS, 0] == [row.amount for row in till.rows.values()]


TYPED = {
    "specversion": "1.0",
    "type": "meterd.genai",
    "source": "s",
    "subject": "a",
    "data": {"input_tokens": 5},
}
SPOILT = {
    "no JSON": b"{",
    "an unknown agreement": usage("x", agreement="nobody"),
    "no id": usage(""),
    "a source with a line": usage("x", source="a\nb"),
    "a day ahead": usage("x", time="2036-01-01T00:00:00Z"),
    "no quantity": usage("x", 0),
    "a price that no rate wants": usage("x", price="1"),
    "a typed price that no rate wants": json.dumps({**TYPED, "id": "x", "price": "1"}).encode(),
}


@pytest.mark.parametrize("name", SPOILT)
def test_event_behind_one_that_is_refused_is_taken(name):
    """Whatever it was refused for: the batch goes on behind it."""
    till = Till()
    entry = till.take([SPOILT[name], usage("good")])

    assert (entry.accepted, [one.index for one in entry.rejections]) == (1, [0])


def test_content_of_a_call_of_a_model_says_nothing_of_its_time():
    """Its span and its log record are written at different moments, and are one event."""
    books = ledger()
    payload = json.dumps({**TYPED, "id": "x", "time": "2026-11-03T07:33:20Z"}).encode()
    decoded = EventDecoder(SENTINEL).decode([payload])
    resolved = books.resolve(decoded, None, "s", 0, NOW)

    [content] = contents(resolved.events)
    assert b'"time"' not in content
