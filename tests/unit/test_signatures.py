"""Outcomes that must be signed: what is taken, what is refused, and what comes twice."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meterd.core.accounts import Agreement
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import OUTCOME_METER, Model, Rate, RateCard, Tier
from meterd.signatures import ID_MISREAD, NOT_BASE64, UNSIGNED, outcome_flaw
from meterd.sources import Deliveries
from tests.fakes import FakeStore, adopt, make_bookkeeper

# RFC 8032, 7.1, TEST 1: the secret key, and its public key.
EVALUATOR = Ed25519PrivateKey.from_private_bytes(
    bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
)
KEY = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")


def signed(text: str) -> str:
    return base64.b64encode(EVALUATOR.sign(text.encode())).decode()


def test_evaluator_signs_in_any_spelling_of_base64():
    """Both alphabets, with padding or without it."""
    # These bytes have the characters that the alphabets differ in.
    number = next(n for n in range(1000) if {"+", "/"} <= set(signed(f"a.{n}x.0.9")))
    text = f"{number}x"
    plain = signed(f"a.{text}.0.9")
    spellings = [plain, plain.rstrip("="), plain.replace("+", "-").replace("/", "_")]

    assert [""] * 3 == [outcome_flaw(KEY, "a", text, "0.9", spelling) for spelling in spellings]


@pytest.mark.parametrize(
    ("signature", "flaw"),
    [
        ("", UNSIGNED),
        ("not base64 at all!", NOT_BASE64),
        ("é" * 88, NOT_BASE64),
        ("AAAA", NOT_BASE64),
        ("A" * 100_000, NOT_BASE64),
    ],
)
def test_anybody_sends_what_is_no_signature(signature, flaw):
    """Whatever it is, it is a flaw with a sentence."""
    assert flaw == outcome_flaw(KEY, "a", "x", "0.9", signature)


@pytest.mark.parametrize(
    ("agreement", "event_id", "score"),
    [("b", "x", "0.9"), ("a", "y", "0.9"), ("a", "x", "0.91"), ("a", "x", "0.90")],
)
def test_provider_uses_a_signature_for_something_else(agreement, event_id, score):
    """It stands for one agreement, one id and one spelling of one score."""
    signature = signed("a.x.0.9")

    assert not outcome_flaw(KEY, "a", "x", "0.9", signature)
    assert "not by the plan's outcome_key" in outcome_flaw(
        KEY, agreement, event_id, score, signature
    )


@pytest.mark.parametrize(("agreement", "event_id"), [("a", "x.0"), ("a.x", "0")])
def test_provider_reads_a_poor_score_as_the_best_one(agreement, event_id):
    """The text of `x` with 0.1 is that of `x.0` with 1: no signature may serve for both."""
    signature = signed("a.x.0.1")

    assert not outcome_flaw(KEY, "a", "x", "0.1", signature)
    assert ID_MISREAD == outcome_flaw(KEY, agreement, event_id, "1", signature)


# -- In the books --------------------------------------------------------------------------------

STEPS = (Tier(699_999_999, 0, 0), Tier(899_999_999, 0, 7 * 10**12), Tier(None, 0, 10 * 10**12))
CARD = RateCard((Rate(OUTCOME_METER, 0, model=Model.VOLUME, tiers=STEPS),))


@pytest.fixture
async def books():
    """A bookkeeper with an agreement that is paid by a signed score."""
    bookkeeper = make_bookkeeper(FakeStore())
    plan = Plan("answer", Pattern.PERFORMANCE, CARD, outcome_key=KEY)
    plans = {**bookkeeper.ledger.plans, "answer": plan}
    plans["free"] = replace(plan, name="free", outcome_key=None)
    await bookkeeper.reload(plans, bookkeeper.ledger.meters)
    for name, kind in (("a", "answer"), ("b", "free")):
        await bookkeeper.bind(Agreement(name, kind, "p", (("main", f"esc_{name}"),)), "test")
        await adopt(bookkeeper, bookkeeper.clock, f"esc_{name}", total=10**7)
    return bookkeeper


def outcome(event_id, score, signature="", agreement="a", **fields):
    """One `meterd.outcome`."""
    event = {"id": event_id, "agreement": agreement, "type": "meterd.outcome", "score": score}
    return json.dumps({**event, "signature": signature, **fields}).encode()


def record(bookkeeper, *payloads):
    """What became of some deliveries: (accepted, duplicates, reasons)."""
    recorded = bookkeeper.record("s", Deliveries(payloads=list(payloads)))
    reasons = [one.reason.value for one in recorded.rejections]
    return recorded.accepted, recorded.duplicates, reasons


async def test_provider_sets_the_score_himself(books):
    """Nothing is owed and nothing is closed; the evaluator's own outcome counts afterwards."""
    account = books.ledger.accounts["a"]

    assert (0, 0, ["bad_signature"]) == record(books, outcome("x", "1"))
    assert (0, 0, ["bad_signature"]) == record(books, outcome("x", "1", signed("a.x.0.7")))
    assert (0, False) == (account.accrued, account.closing)
    assert (1, 0, []) == record(books, outcome("x", "0.7", signed("a.x.0.7")))
    assert (7, True) == (account.accrued, account.closing)


async def test_outcome_in_another_spelling_is_the_one_that_was_signed(books):
    """The text has the score as meterd writes it, and the agreement's own id."""
    event = {"id": "x", "escrow_id": "esc_a", "type": "meterd.outcome", "score": "0.900"}
    payload = json.dumps({**event, "signature": signed("a.x.0.9")}).encode()

    assert (1, 0, []) == record(books, payload)
    assert 10 == books.ledger.accounts["a"].accrued


async def test_redelivered_outcome_stays_a_duplicate(books):
    """A good one that comes again is no rejection; with another score it is a conflict."""
    good = outcome("x", "0.7", signed("a.x.0.7"))

    assert (1, 1, []) == record(books, good, good)
    assert (0, 1, []) == record(books, good)
    assert (0, 0, ["conflict"]) == record(books, outcome("x", "1", signed("a.x.1")))
    assert (0, 0, ["conflict"]) == record(books, outcome("x", "1"))
    assert (0, 0, ["bad_signature"]) == record(books, outcome("y", "1"))
    assert (0, 0, ["reached"]) == record(books, outcome("y", "1", signed("a.y.1")))
    assert 7 == books.ledger.accounts["a"].accrued


async def test_a_good_outcome_stands_beside_a_forged_one_in_a_batch(books):
    """The forged one does not take the place of the good one."""
    forged, good = outcome("w", "1"), outcome("x", "0.7", signed("a.x.0.7"))

    assert (1, 0, ["bad_signature"]) == record(books, forged, good)
    assert 7 == books.ledger.accounts["a"].accrued


async def test_a_plan_without_a_key_takes_any_outcome(books):
    """Then the score is as trustworthy as whoever may send usage."""
    assert (1, 0, []) == record(books, outcome("x.0", "1", "whatever", "b"))
    assert 10 == books.ledger.accounts["b"].accrued
