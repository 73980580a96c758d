from __future__ import annotations

import base64
from typing import Any

import pytest

from meterd.core.events import Reason
from meterd.producers import (
    BAD_ID,
    BAD_TIMESTAMP,
    NO_MATCH,
    UNSIGNED,
    Producer,
    Producers,
    flaw_of,
    kept,
    taken_out,
)
from meterd.sources import Deliveries, Fault, Proof
from tests.signing import key_of, signed

# The example that the libraries of Standard Webhooks are tested with.
SPEC_KEY = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
SPEC_BODY = b'{"test": 2432232314}'
SPEC_PROOF = Proof(
    "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "1614265330",
    "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
)
SPEC_NOW = 1614265330_000
MINUTE = 60_000
NEW, OLD = key_of("new"), key_of("old")
BODY = b'{"id": "a"}'
NOW = 1_800_000_000


def raw(key: str) -> bytes:
    return base64.b64decode(key.removeprefix("whsec_"))


def proof(key: str = NEW, body: bytes = BODY, **named: Any) -> Proof:
    found = Proof.of(signed(key, body, **{"at": NOW, **named}).items())
    assert found is not None
    return found


def test_the_example_of_the_specification_is_genuine():
    """A producer that uses any library of Standard Webhooks is understood."""
    assert flaw_of(SPEC_PROOF, SPEC_BODY, [SPEC_KEY], SPEC_NOW) == ""


@pytest.mark.parametrize(
    ("found", "body", "flaw"),
    [
        (None, BODY, UNSIGNED),
        (proof(), BODY + b" ", NO_MATCH),
        (proof(OLD), BODY, NO_MATCH),
        (Proof("", str(NOW), "v1,x"), BODY, BAD_ID),
        (Proof("a.b", str(NOW), "v1,x"), BODY, BAD_ID),
        (Proof("a\nb", str(NOW), "v1,x"), BODY, BAD_ID),
        (Proof("x" * 257, str(NOW), "v1,x"), BODY, BAD_ID),
        (Proof("a", "", "v1,x"), BODY, BAD_TIMESTAMP),
        (Proof("a", "1.5", "v1,x"), BODY, BAD_TIMESTAMP),
        (Proof("a", "-1", "v1,x"), BODY, BAD_TIMESTAMP),
        (Proof("a", "\uff11\uff12", "v1,x"), BODY, BAD_TIMESTAMP),
        (Proof("a", "9" * 5000, "v1,x"), BODY, BAD_TIMESTAMP),
        (Proof("a", str(NOW), ""), BODY, NO_MATCH),
        (Proof("a", str(NOW), "v1,ü"), BODY, NO_MATCH),
        (Proof("a", str(NOW), "v1,"), BODY, NO_MATCH),
        (proof(more="v1a,x v1,x"), BODY, ""),
        (proof(more=" ".join(["v1,x"] * 7)), BODY, ""),
        (proof(more=" ".join(["v1,x"] * 8)), BODY, NO_MATCH),
        (proof(more="v1," + "x" * 1024), BODY, NO_MATCH),
    ],
)
def test_a_delivery_is_taken_only_with_a_signature_of_a_live_key(found, body, flaw):
    """Whatever stands in the three headers, it is genuine or refused with a sentence."""
    assert flaw_of(found, body, [raw(NEW)], NOW * 1000) == flaw


def test_another_version_of_signature_is_no_signature():
    """`v1a` is of another scheme; it must not be read as `v1`."""
    genuine = proof()
    other = Proof(genuine.id, genuine.timestamp, genuine.signature.replace("v1,", "v2,"))

    assert flaw_of(other, BODY, [raw(NEW)], NOW * 1000) == NO_MATCH


@pytest.mark.parametrize("live", [(NEW, OLD), (OLD, NEW)])
@pytest.mark.parametrize("used", [NEW, OLD])
def test_two_keys_are_live_while_a_key_is_changed(live, used):
    """Either of them will do, in whichever order they stand."""
    assert flaw_of(proof(used), BODY, [raw(key) for key in live], NOW * 1000) == ""


@pytest.mark.parametrize(
    ("late", "flaw"),
    [
        (0, ""),
        (5 * MINUTE, ""),
        (5 * MINUTE + 1, "signed 300 s ago"),
        (-5 * MINUTE, ""),
        (-5 * MINUTE - 1, "300 s ahead"),
    ],
)
def test_a_signature_counts_for_five_minutes(late, flaw):
    """On both sides, since clocks differ; and the wait is said."""
    said = flaw_of(proof(), BODY, [raw(NEW)], NOW * 1000 + late)

    assert (flaw in said) if flaw else (said == "")


def test_only_who_has_the_key_hears_of_the_clock():
    """An old delivery with a wrong signature is wrong, and nothing more is said."""
    assert flaw_of(proof(OLD), BODY, [raw(NEW)], (NOW + 10_000) * 1000) == NO_MATCH


@pytest.mark.parametrize(
    ("allowed", "agreement", "may"),
    [
        ((), "anything", True),
        (("customer-1",), "customer-1", True),
        (("customer-1",), "customer-10", False),
        (("customer-*", "x"), "customer-10", True),
        (("customer-?",), "customer-10", False),
        (("customer-*",), "CUSTOMER-1", False),
    ],
)
def test_an_allow_list_is_ids_and_patterns(allowed, agreement, may):
    """No list means all; letters are told apart by their case."""
    assert Producer("p", agreements=allowed).may_send_for(agreement) is may


def batch(*proofs: Proof | None, **named: Any) -> Deliveries:
    given = {index: found for index, found in enumerate(proofs) if found is not None}
    return Deliveries([BODY] * len(proofs), proofs=given, **named)


def test_who_shares_a_source_is_known_by_the_signature():
    """Each delivery is its signer's, and what nobody has signed is a fault."""
    one, two = (Producer(name, sources=("mqtt",), keys=(raw(key_of(name)),)) for name in "ab")
    deliveries = batch(proof(key_of("b")), None, proof(key_of("a")), proof(key_of("c")))
    senders = Producers([one, two]).senders("mqtt", deliveries, NOW * 1000, MINUTE)

    assert senders == [two, None, one, None]
    assert {index: fault.reason for index, fault in deliveries.faults.items()} == {
        1: Reason.BAD_SIGNATURE,
        3: Reason.BAD_SIGNATURE,
    }


def test_a_signed_delivery_has_the_id_that_was_signed():
    """A broker's own id changes when somebody sends the same again; the signed one does not."""
    producer = Producer("a", sources=("redis",), keys=(raw(NEW),))
    deliveries = batch(proof(msg="one"), None, ids=["1-0", "2-0"])
    Producers([producer]).senders("redis", deliveries, NOW * 1000, MINUTE)

    assert list(deliveries.ids or ()) == ["one", ""]


def test_a_fault_of_the_transport_stays_what_it_was():
    """What is retained or too large is told so, signed or not."""
    producer = Producer("a", sources=("mqtt",), keys=(raw(NEW),))
    fault = Fault(Reason.RETAINED, "retained")
    deliveries = batch(None, faults={0: fault})
    Producers([producer]).senders("mqtt", deliveries, NOW * 1000, MINUTE)

    assert deliveries.faults == {0: fault}


def test_a_source_of_one_producer_without_keys_is_his():
    """Where a broker's user stands for the producer, nothing need be signed."""
    producer = Producer("a", sources=("mqtt",))
    deliveries = batch(None, None)

    assert Producers([producer]).senders("mqtt", deliveries, NOW, MINUTE) == [producer, producer]
    assert deliveries.faults == {}


@pytest.mark.parametrize("required", [True, False])
def test_what_comes_from_nobody_known_is_taken_unless_a_producer_is_required(required):
    """With `require_producer` nothing slips in over a source that was forgotten."""
    producers = Producers([Producer("a", sources=("mqtt",))], required=required)
    deliveries = batch(None, None)
    senders = producers.senders("redis", deliveries, NOW, MINUTE)

    assert senders == [None, None]
    assert [fault.reason for fault in deliveries.faults.values()] == (
        [Reason.NOT_ALLOWED] * 2 if required else []
    )


def test_nothing_is_asked_where_nothing_is_configured():
    """Without producers there is nothing to look at; requiring one is a rule of its own."""
    assert not Producers()
    assert Producers(required=True)
    assert Producers([Producer("a")])


def test_a_dead_letter_keeps_its_sender_and_its_signature():
    """So that a later try is held against the same rules."""
    fields = {"meter": "tokens", **kept(Producer("a"), proof(msg="one"))}
    address, producer, found = taken_out(fields)

    assert (address, producer, found) == ({"meter": "tokens"}, "a", proof(msg="one"))
    assert taken_out(kept(None, None)) == ({}, "", None)


def test_a_producer_shows_no_key():
    """Neither its repr nor that of what holds it."""
    assert "keys" not in repr(Producer("a", keys=(raw(NEW),)))
